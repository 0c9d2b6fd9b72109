"""A real pseudo-terminal, and what a person would see on it.

The terminal is the kernel's, with a window of so many columns and rows; pyte draws what is written into it. A program
is forked off a server that has torch loaded, so that it starts within milliseconds, and its terminal controls it: keys
such as Ctrl-C and Ctrl-D do what they do in a shell.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys
import termios
import time

import pyte
from conftest import HANGING
from fleet import forkserver
from pyte.modes import DECAWM

BRACKETED = 2004 << 5  # the mode, as pyte counts
CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"


class Eager(pyte.HistoryScreen):
    """A terminal that goes to the next line as soon as one is full, not when the next letter comes."""

    def draw(self, data: str) -> None:
        for letter in data:
            super().draw(letter)
            if self.cursor.x == self.columns and DECAWM in self.mode:
                self.carriage_return()
                self.linefeed()


class Terminal:
    def __init__(self, columns: int = 80, rows: int = 24):
        self.outside, inside = os.openpty()
        self.name = os.ttyname(inside)
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.file = os.fdopen(inside, "w", encoding="utf-8")  # for what is written to it by the test itself
        self.screens = [kind(columns, rows, history=100_000) for kind in (pyte.HistoryScreen, Eager)]
        self.streams = [pyte.ByteStream(screen) for screen in self.screens]
        self.process = None

    def lines(self, which: int = 0) -> list[str]:
        """All lines that were ever on the screen and are not overwritten, those that have scrolled away, too."""
        screen = self.screens[which]
        above = ["".join(row[x].data for x in range(screen.columns)) for row in screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *screen.display]).rstrip("\n").split("\n")

    def text(self) -> str:
        return "\n".join(self.lines())

    def print(self, text: str) -> None:
        """What the test itself writes."""
        self.file.write(text)
        self.sync()

    def sync(self) -> None:
        """Reads all that was written by this process, which must be less than the kernel keeps: a few frames. It must
        look the same whenever the terminal wraps."""
        self.file.write("\0")  # which no terminal shows
        self.file.flush()
        while not self._read().endswith(b"\0"):
            pass
        assert self.lines(0) == self.lines(1), "whenever the terminal wraps"

    def _read(self) -> bytes:
        data = os.read(self.outside, 1 << 16)
        for stream in self.streams:
            stream.feed(data)
        return data

    def start(self, main, argv: list[str]) -> None:
        """Runs a script as from a shell in this terminal."""
        self.process = forkserver.Process(target=_inside, args=(self.name, main, argv))
        self.process.start()

    def type(self, keys: str) -> None:
        data = keys.encode()
        while data:
            readable, writable, _ = select.select([self.outside], [self.outside], [], HANGING)
            assert readable or writable, "nobody reads what is typed"
            if readable:
                self._read()
            else:
                data = data[os.write(self.outside, data[:512]) :]

    def paste(self, text: str) -> None:
        """As a terminal does it: in brackets, where the program has asked for them."""
        self.type(f"\x1b[200~{text}\x1b[201~" if BRACKETED in self.screens[0].mode else text.replace("\n", "\r"))

    def wait(self, until) -> None:
        """Reads on until until() holds."""
        end = time.monotonic() + HANGING
        while not until():
            assert time.monotonic() < end, f"hangs, with this on the screen:\n{self.text()}"
            if select.select([self.outside], [], [], 0.1)[0]:
                self._read()

    def see(self, text: str, times: int = 1) -> None:
        """Waits until a text is on the screen so many times."""
        self.wait(lambda: self.text().count(text) >= times or self.process.exitcode is not None)
        assert self.text().count(text) >= times, f"{text!r} is missing:\n{self.text()}"

    def end(self) -> int:
        """Waits for the end of the program; its exit status."""
        self.wait(lambda: self.process.exitcode is not None)
        while select.select([self.outside], [], [], 0)[0]:
            self._read()
        return self.process.exitcode

    def close(self) -> None:
        if self.process and self.process.is_alive():
            self.process.kill()
        self.file.close()
        os.close(self.outside)


def _inside(name: str, main, argv) -> None:
    os.setsid()  # and the first terminal that is opened now is the one that controls
    terminal = os.open(name, os.O_RDWR)
    for n in range(3):
        os.dup2(terminal, n)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "INPUTRC"):
        os.environ.pop(name, None)
    import torch

    from plumbing import cli

    torch.set_num_threads(1)
    sys.argv = ["sample.py", *argv]
    with contextlib.suppress(BrokenPipeError):
        cli.run(main)
