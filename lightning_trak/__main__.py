"""``python -m lightning_trak``: look at a feature store, verify it, and clean it. Here arguments are only parsed."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

_PROGRAM = "python -m lightning_trak"
_WHAT = {
    "info": "Show what is in a store: settings, runs, checkpoints, rows, scores, and who works at it now.",
    "verify": "Read every file of a store, and say which are damaged and how to mend them.",
    "clean": "Delete what killed processes left, and damaged files that can be computed again.",
}
_STATUS = {
    "info": "",
    "verify": "Exit status: 0 if nothing is damaged, 1 if something is. Missing rows are no damage: they are computed"
    " when they are needed. A message tells of them, and the status is 0.",
    "clean": "All that would be deleted is listed first, with sizes. What a living process may be writing is left"
    " alone: while its lock is held, or within an hour of its last change. Symbolic links are not followed. The store"
    " does not know whether a checkpoint file of training still exists, so a checkpoint goes only if it is named. Exit"
    " status: 0, or 1 if something could not be deleted, or nobody could be asked.",
}
_CHECKPOINT = "also delete this checkpoint with its weights; the first digits are enough. May be repeated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: that of the command, or 2 after an error, which is one line on stderr."""
    try:
        chosen = _parser().parse_args(arguments)
        name = chosen.subcommand
        options = chosen[name].as_dict()
        command = getattr(import_module(f"lightning_trak.commands.{name}"), name)  # it takes a second to import torch
        status = int(command(_local(options.pop("store")), **options))
        sys.stdout.flush()
        return status
    except ArgumentError as error:
        message = re.sub(rf"\b({'|'.join(_WHAT)})\.", "", str(error))  # "info.store" is "store" to the user
        return _failed(f"{message.rstrip('.')}. '{_PROGRAM} --help' shows what is expected.")
    except BrokenPipeError:  # whoever reads the output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 1
    except (OSError, ValueError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _failed("interrupted", status=130)


def _failed(message: str, status: int = 2) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> ArgumentParser:
    """Return the parser of all commands."""
    parser = _one("Look at a feature store of lightning_trak, the directory that TRAKCallback writes.", "")
    commands = parser.add_subcommands(required=True)
    for name, what in _WHAT.items():
        one = _one(what, _STATUS[name])
        one.add_argument("store", type=str, help="the directory of the store, dirpath of TRAKCallback")
        if name == "clean":
            one.add_argument("--yes", action="store_true", help="do not ask")
            one.add_argument("--targets", action="store_true", help="also delete the features of targets")
            one.add_argument("--checkpoint", action="append", metavar="DIGEST", help=_CHECKPOINT)
        commands.add_subcommand(name, one, help=what)
        one.prog = f"{_PROGRAM} {name}"
    return parser


def _local(store: str) -> Path:
    """Return the path of a store; a command needs the files themselves."""
    if "://" in store:
        raise ValueError(f"'{store}' is a URL. Copy the store to a local folder, and pass that.")
    return Path(store)


def _one(description: str, epilog: str) -> ArgumentParser:
    """Return the parser of a command, or of all: it raises errors, and its help says no more than is written here."""
    return ArgumentParser(
        prog=_PROGRAM,
        description=description,
        epilog=epilog,
        exit_on_error=False,
        formatter_class=argparse.HelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main())
