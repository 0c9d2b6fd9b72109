"""Two machines, as two network namespaces where these can be made (root on Linux), else as two agents on loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fleet import ALONE, metrics, run

import train

RECIPE = Path(train.__file__).parent / "recipes/multinode.sh"
FLAGS = (
    "--method medlm --dataset_args toy[train:64,test:7] --max_length 64 --pad_len 8 --per_device_train_batch_size 2 "
    "--intermediate_ratio 0.5 --max_diffusion_steps 3 --min_t 0.1 --learning_rate 1e-3 --eval_samples 0 "
    "--max_steps 60 --logging_steps 1 --save_steps 5 --eval_steps 20"
)


def ip(*words) -> bool:
    return bool(shutil.which("ip")) and subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def nodes():
    """For each node the command that runs something on it, and its address."""
    names = [f"node{os.getpid()}{x}" for x in "ab"]
    made = os.geteuid() == 0 and all(ip("netns", "add", name) for name in names)
    wire = ["link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1]]
    made = made and ip(*wire)
    for i, name in enumerate(names) if made else ():
        made = made and ip("-n", name, "address", "add", f"10.7.0.{i + 1}/24", "dev", "wire")
        made = made and ip("-n", name, "link", "set", "wire", "up") and ip("-n", name, "link", "set", "lo", "up")
    if made:
        yield [(["ip", "netns", "exec", name], f"10.7.0.{i + 1}") for i, name in enumerate(names)]
    else:
        yield [([], "127.0.0.1"), ([], "127.0.0.1")]
    for name in names:
        ip("netns", "delete", name)


def start(nodes, out, port):
    """An agent per node."""
    agents = []
    for number, (on_node, address) in enumerate(nodes):
        log = open(out.with_name(f"node{number}.log"), "w")  # noqa: SIM115
        command = [*on_node, RECIPE, "2", nodes[0][1], address, *FLAGS.split(), "--output_dir", out]
        agents.append(
            subprocess.Popen(
                list(map(str, command)),
                env=os.environ
                | ALONE
                | {"PROCESSES": "1", "PORT": str(port), "PYTHON": sys.executable}
                | ({} if on_node else {"INTERFACE": "lo"}),
                stdout=log,
                stderr=log,
            )
        )
        log.close()
    return agents


def kill_node(agent):
    """Everything at once, as when the power fails: the agent and the processes it has started, which have groups of
    their own."""
    family = [agent.pid]
    for pid in family:
        with contextlib.suppress(OSError):  # it has ended by itself
            family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def said(out):
    return "\n".join(log.read_text() for log in sorted(out.parent.glob("node*.log")))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0], ids=["the second node", "the node where they meet"])
def test_a_node_is_killed_the_other_ends_and_a_restart_goes_on(victim, nodes, tmp_path):
    run(f"{FLAGS} --preset tiny", tmp_path / "undisturbed", 2)
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    out = tmp_path / "out"
    agents = start(nodes, out, port)
    end = time.monotonic() + 300
    while not (out / "checkpoint-10").exists():
        assert time.monotonic() < end, said(out)
        assert all(agent.poll() is None for agent in agents), said(out)
        time.sleep(0.02)
    kill_node(agents[victim])
    try:
        assert agents[1 - victim].wait(300) != 0
    finally:
        kill_node(agents[1 - victim])
    assert not (out / "checkpoint-final").exists()

    agents = start(nodes, out, port)
    assert [agent.wait(300) for agent in agents] == [0, 0], said(out)
    assert "continuing" in said(out)
    steps = [line["step"] for line in metrics(out) if "loss" in line]
    assert steps == list(range(1, 61))
