"""What the four scripts share on the command line: flags in the published spelling, and errors in one line."""

import argparse
import contextlib
import faulthandler
import math
import operator
import os
import signal
import sys
from dataclasses import dataclass


def boolean(text: str) -> bool:
    """True / False, yes / no, 1 / 0. Raises argparse.ArgumentTypeError, which names the flag."""
    if text.lower() in ("true", "1", "yes", "y", "t"):
        return True
    if text.lower() in ("false", "0", "no", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {shortened(text)}")


LARGEST = 2**32 - 1  # of whole numbers: seeds and sizes then fit into 64 bits, also after they are multiplied


@dataclass(frozen=True)
class number:
    """An argparse type: a finite number of this kind with low <= x <= high, or above < x < below."""

    kind: type = float
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __call__(self, text: str):
        high = LARGEST if self.kind is int and self.high is None else self.high
        bounds = [
            ("at least", self.low, operator.ge), ("above", self.above, operator.gt),
            ("at most", high, operator.le), ("below", self.below, operator.lt),
        ]  # fmt: skip
        bounds = [bound for bound in bounds if bound[1] is not None]
        try:
            value = self.kind(text)
            if math.isfinite(value) and all(holds(value, limit) for _, limit, holds in bounds):
                return value
        except (ValueError, OverflowError):
            pass
        what = "a whole number" if self.kind is int else "a number"
        words = " and ".join(f"{word} {limit}" for word, limit, _ in bounds)
        raise argparse.ArgumentTypeError(f"expected {what} {words}, got {shortened(text)}")


def text(text: str) -> str:
    """An argparse type: words for the model, which may be none. Raises argparse.ArgumentTypeError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8, got {shortened(text)}") from None
    return text


def name(text: str) -> str:
    """An argparse type, and that of every flag without one: a path or name. An empty one is an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a name or path, got {text!r}")
    return text


def spec(read):
    """An argparse type: text that the function `read` accepts without a ValueError, kept as it is."""

    def check(text: str) -> str:
        try:
            read(name(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check


def shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")


class Flags(argparse.ArgumentParser):
    """argparse with full flag names only, defaults in the help, and booleans as --flag, --flag True or --flag False.

    `group` begins a section of the help; the methods below it add a flag to the latest section.
    """

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.register("type", None, name)
        self.section = self

    def error(self, message: str):
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")

    def format_help(self) -> str:
        needed = [action for action in self._actions if action.required]
        needed = [f"{max(a.option_strings, key=len)} {a.metavar or '{' + ','.join(a.choices) + '}'}" for a in needed]
        self.usage = " ".join(["%(prog)s", *needed, "[flags]"])
        return super().format_help()

    def print_help(self, file=None) -> None:
        """argparse's own hides that nobody reads on."""
        (file or sys.stdout).write(self.format_help())

    def group(self, title: str) -> None:
        self.section = self.add_argument_group(title)

    @contextlib.contextmanager
    def exclusive(self):
        """Of the flags added inside, only one may be given."""
        section, self.section = self.section, self.section.add_mutually_exclusive_group()
        yield
        self.section = section

    def choice(self, *names: str, metavar: str | None = None, **options) -> None:
        default = options.get("default")
        if options.get("required"):
            options["help"] += " (required)"
        elif default is not None and default is not False and default != []:
            default = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] = options["help"].partition(" (default:")[0] + f" (default: {default})"
        if metavar or "choices" not in options:
            options["metavar"] = metavar or "NAME"
        self.section.add_argument(*names, **options)

    def flag(self, *names: str, default=False, words: tuple = (), **options) -> None:
        """True, False, or one of some words."""
        options |= {"type": lambda text: text if text in words else boolean(text)}
        options |= {"nargs": "?", "const": True, "default": default, "metavar": "BOOL"}
        self.choice(*names, **options)

    def number(self, *names: str, low=None, high=None, above=None, below=None, **options) -> None:
        self.choice(*names, type=number(float, low, high, above, below), metavar="X", **options)

    def integer(self, *names: str, low=None, high=None, **options) -> None:
        self.choice(*names, type=number(int, low, high), metavar="N", **options)

    def text(self, *names: str, read=str, **options) -> None:
        """A text that the function `read` accepts without a ValueError."""
        self.choice(*names, type=spec(read), metavar="SPEC", **options)


def run(main) -> None:
    """Call main(); what the user can mend becomes one line on stderr and exit status 1, Ctrl-C exit status 130. SIGUSR1
    shows where the process stands."""
    faulthandler.register(signal.SIGUSR1, file=2)
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on. Python must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 128 + signal.SIGPIPE  # as the shell has it
    except (ValueError, OSError, MemoryError) as e:
        name = sys.argv[0].rsplit("/", 1)[-1]
        print(f"{name}: error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
