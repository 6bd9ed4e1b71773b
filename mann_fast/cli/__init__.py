"""The command line ``mann-fast``: one module per command, each with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import NoReturn

from .. import __version__
from ..ops._loading import missing
from . import bench, demo, doctor, draw, evaluate, predict, show, train
from ._stderr import ForgivingStream, discard, open_standard_files

COMMANDS = (train, evaluate, predict, draw, show, bench, demo, doctor)

DESCRIPTION = """\
Memory-augmented neural networks that learn new classes from a few examples.

  mann-fast demo                               see it work, in a few minutes
  mann-fast train --data glyphs --out run      train a model
  mann-fast evaluate --checkpoint run          measure it on classes it has never seen
  mann-fast show --checkpoint run              see what its memory does in one episode
  mann-fast predict --checkpoint run --support examples image.png
                                               use it on classes of your own
  mann-fast draw                               teach it symbols that you draw, in your browser
  mann-fast bench                              measure it beside what you would use instead
"""


# What torch says in a RuntimeError where there is no memory, or a size is beyond any.
OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mann-fast", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mann-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done; 1: the command ran, but its result is not what was asked for; 2: a mistake in the call or its
    files; 128 + n: stopped by signal n. With MANN_FAST_DEBUG=1 in the environment, an error comes with its
    traceback.
    """
    open_standard_files()
    with (
        open(os.devnull, "w", encoding="utf-8") as nothing,
        redirect_stderr(ForgivingStream(sys.stderr or nothing)),
    ):
        return _run(build_parser().parse_args(argv))


def _run(args: argparse.Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            if os.environ.get("MANN_FAST_CPU_ISA"):
                missing("cpp")  # raises for a bad one, before a command writes anything
            return args.run(args)
    except KeyboardInterrupt:
        print("mann-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `mann-fast ... | head`
        discard(sys.stdout)
        return 141
    except Exception as error:
        if os.environ.get("MANN_FAST_DEBUG") == "1":
            traceback.print_exc()
        return _print_error(error)


def _print_error(error: Exception) -> int:
    """Print one line about an error; the exit status that goes with it."""
    from ..training import TrainingDiverged

    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        message, status = f"{error.strerror}{where}", 2
    elif isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        message, status = str(error), 2
    elif isinstance(error, TrainingDiverged):
        message, status = str(error), 1
    elif isinstance(error, MemoryError) or any(words in str(error) for words in OF_MEMORY):
        said = str(error).partition("DefaultCPUAllocator: ")[2] or str(error) or "no more is to be had"
        message, status = f"out of memory, choose smaller sizes: {said.splitlines()[0]}", 2
    else:
        message, status = f"unexpected {type(error).__name__}: {error} (MANN_FAST_DEBUG=1 shows where)", 1
    print(f"mann-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"mann-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)
