"""What the four scripts share on the command line: flags in the published spelling, and errors in one line."""

import argparse
import sys


def boolean(text: str) -> bool:
    """True / False, yes / no, 1 / 0. Raises argparse.ArgumentTypeError, which names the flag."""
    if text.lower() in ("true", "1", "yes", "y", "t"):
        return True
    if text.lower() in ("false", "0", "no", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def number(kind=float, low=None, high=None, above=None):
    """An argparse type: a finite number of this kind with low <= x <= high, or above < x."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'}, got {text!r}"
            ) from None
        if value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
        if (
            (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
        ):
            bounds = (
                [f"at least {low}"] * (low is not None)
                + [f"above {above}"] * (above is not None)
                + [f"at most {high}"] * (high is not None)
            )
            raise argparse.ArgumentTypeError(f"expected a number {' and '.join(bounds)}, got {text}")
        return value

    return read


class Flags(argparse.ArgumentParser):
    """argparse with full flag names only, defaults in the help, and booleans as --flag, --flag True or --flag False."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str):
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def flag(self, *names: str, default=False, help: str):
        self.add_argument(*names, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def run(main) -> None:
    """Call main(); what the user can mend becomes one line on stderr and exit status 1, Ctrl-C exit status 130."""
    try:
        status = main()
    except (ValueError, OSError, MemoryError) as e:
        name = sys.argv[0].rsplit("/", 1)[-1]
        print(f"{name}: error: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
