"""Chat templates: programs in Jinja that write a dialogue as one text.

    render(template, contexts)     one text for each context: {"messages": [{"role", "content"}, ...], ...}

Those below are this repository's. Any other came with a checkpoint, from whom nobody knows: it sees nothing but its
context (Jinja's sandbox), and runs in a process of its own, with limits that hold in the middle of any operation. They
are the kernel's: SECONDS of processor time for a dialogue, after which a signal that nobody catches ends the process,
and MEMORY bytes of address space (on Linux). A text may have LONGEST characters beside ten times what its context has.
`render` starts this file again as a script; a group of dialogues costs one start, a tenth of a second.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, LONGEST = 5, 1 << 30, 100_000

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
# The published systems' own: ME-DLM's processor; Edit Flows' for encoders, and for LLaDA.
PUBLISHED_TEMPLATE = CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
ENCODER_TEMPLATE = """\
{% for message in messages %}
{% set name = {"user": "Question", "assistant": "Answer", "system": "SYS"}.get(message.role, message.role) %}
[{{ name }}]
{{ message.content | trim }}
[/{{ name }}]

{% endfor %}
{% if add_generation_prompt %}
[Answer]
{% endif %}
"""
LLADA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""
OURS = (CHAT_TEMPLATE, PUBLISHED_TEMPLATE, ENCODER_TEMPLATE, LLADA_TEMPLATE)


def render(template: str, contexts: list[dict]) -> list[str]:
    """Raises ValueError, in one line, where a template fails, exceeds a limit, or writes what is no text."""
    if template in OURS:
        return [_write(template, context) for context in contexts]
    lines = [json.dumps(item) + "\n" for item in (template, *contexts)]
    command = [sys.executable, "-P", os.path.abspath(__file__)]
    done = subprocess.run(command, input="".join(lines), capture_output=True, encoding="utf-8")
    if done.returncode:
        slow = done.returncode == -signal.SIGPROF and f"more than {SECONDS} s for one dialogue"
        reason = slow or done.stderr.strip() or f"it was ended with status {done.returncode}"
        raise ValueError(f"the chat template fails on these messages: {reason}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _write(template: str, context: dict) -> str:
    text = _compile(template).render(context)
    text.encode()  # raises for half characters
    if len(text) > LONGEST + 10 * len(json.dumps(context)):
        raise ValueError(f"it writes {len(text)} characters")
    return text


@lru_cache
def _compile(template: str) -> jinja2.Template:
    """With what templates written for the hub expect to find."""

    def raise_exception(message):
        raise ValueError(message)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda f: datetime.now().strftime(f)}
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


def _child() -> None:
    """Template and contexts come as lines of JSON, and so do the texts go."""
    with contextlib.suppress(OSError, ValueError):  # where the limit is lower already, or there is none
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            print(json.dumps(_write(template, json.loads(line))))
        except Exception as error:  # a template is a program and can fail in any way
            sys.exit(f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": "))


if __name__ == "__main__":
    _child()
