"""`python -m hf_pearl COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from transformers.utils import logging

from . import __version__
from .commands import bench, demo
from .commands import plan as plan_command
from .commands import tune as tune_command
from .commands.command_line import UsageError

# Every command is a module with `add_arguments(parser)` and `run(args) -> exit status`; its docstring is its help.
COMMANDS = {"demo": demo, "bench": bench, "tune": tune_command, "plan": plan_command}
INTERRUPTED = 130
CLOSED = 141  # What a shell says of a program that SIGPIPE has ended.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for a failure, 2 for a wrong option, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m hf_pearl", description="Parallel speculative decoding (PEARL).")
    parser.add_argument("--version", action="version", version=f"hf_pearl {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        parsers[name] = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(parsers[name])
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return COMMANDS[args.command].run(args)
    except UsageError as error:
        parsers[args.command].error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def main_of_process() -> int:
    """`main`, which ends without a word where whoever reads its output has gone, as `head` goes."""
    try:
        try:
            return main()
        finally:
            _print("")
    except BrokenPipeError:
        try:
            _print("\n")
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
            return CLOSED
        raise  # It was another pipe.


def _print(text: str) -> None:
    if sys.stdout is not None:  # None where it was closed from the start
        sys.stdout.write(text)
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main_of_process())
