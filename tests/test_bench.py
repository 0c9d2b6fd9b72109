"""bench.py in miniature: every benchmark runs, and contestants that should agree do."""

import sys

import pytest

import bench

TINY = {
    "edit_distance": "--lengths 16 --noise 0.3 --pairs 2",
    "loss": "--hidden 64 --layers 1 --vocab 300 --length 12 --batch 2",
    "sampling": "--hidden 64 --layers 1 --vocab 300 --steps 4 --batch 2",
    "decode": "--hidden 64 --layers 1 --vocab 300 --length 6 --batch 2", "rollout": "--preset tiny --batch 2",
}  # fmt: skip


def run(monkeypatch, capsys, name: str) -> str:
    monkeypatch.setattr(sys, "argv", ["bench.py", name, "--repeats", "2", "--threads", "1", *TINY[name].split()])
    bench.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs(name, monkeypatch, capsys):
    assert run(monkeypatch, capsys, name)


def test_the_plain_ways_compute_the_same(monkeypatch, capsys):
    ours, plain = run(monkeypatch, capsys, "loss").splitlines()[2:4]
    assert ours.split()[5] == plain.split()[3]
    assert "same texts: True" in run(monkeypatch, capsys, "decode")
