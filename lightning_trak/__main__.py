"""``python -m lightning_trak``: look at a feature store, verify it, and clean it. Here arguments are only parsed."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from lightning_trak.results.terminal import printable

_PROGRAM = "python -m lightning_trak"
_WHAT = {
    "info": "Show what is in a store: settings, runs, checkpoints, rows, scores, and who works at it now.",
    "top": "Print the most helpful and the most harmful training examples of each target, from saved scores.",
    "report": "Write saved scores as a report, one HTML file to look at in a browser.",
    "verify": "Read every file of a store, and say which are damaged and how to mend them.",
    "clean": "Delete what killed processes left, and damaged files that can be computed again.",
}
_HOW_SAVED = (
    "Scores are saved in a store by trainer.attribute(..., name='NAME'), and by 'attribute --name NAME' of TRAKCLI."
)
_STATUS = {
    "info": "",
    "top": f"{_HOW_SAVED} Exit status: 0, or 2 if there are no such scores or targets.",
    "report": f"{_HOW_SAVED} The report shows examples by id, label and prediction, since the store has no examples."
    " Exit status: 0, or 2 if there are no such scores.",
    "verify": "Exit status: 0 if nothing is damaged, 1 if something is. Missing rows are no damage: they are computed"
    " when they are needed. A message tells of them, and the status is 0.",
    "clean": "All that would be deleted is listed first, with sizes. What a living process may be writing is left"
    " alone: while its lock is held, or within an hour of its last change. Symbolic links are not followed. The store"
    " does not know whether a checkpoint file of training still exists, so a checkpoint goes only if it is named. Exit"
    " status: 0, or 1 if something could not be deleted, or nobody could be asked.",
}
_STORE = "the directory of the store, dirpath of TRAKCallback"
_NAME = "the name of the scores; not needed where the store has but one"
_K = "how many helpful and how many harmful training examples of each target, at most. Default: 5"
_OUTPUT = "the file, which ends in .html. A file that is there is replaced. Default: report.html"
_TARGET = "the id of a target to print; may be repeated. Default: all targets"
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
        message = re.sub(r"(required: )\w+\.", r"\1", str(error))  # "info.store" is "store" to the user
        return _failed(f"{message.rstrip('.')}. '{_PROGRAM} --help' shows what is expected.")
    except BrokenPipeError:  # whoever reads the output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return 1
    except (OSError, ValueError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _failed("interrupted", status=130)


def _failed(message: str, status: int = 2) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return status


def _parser() -> ArgumentParser:
    """Return the parser of all commands."""
    parser = _one("Look at a feature store of lightning_trak, the directory that TRAKCallback writes.", "")
    commands = parser.add_subcommands(required=True)
    for name, what in _WHAT.items():
        one = _one(what, _STATUS[name])
        _add_arguments(one, name)
        commands.add_subcommand(name, one, help=what)
        one.prog = f"{_PROGRAM} {name}"
    return parser


def _add_arguments(parser: ArgumentParser, name: str) -> None:
    """Add the arguments of a command."""
    scored = name in ("top", "report")
    parser.add_argument(
        "store", type=str, help=f"{_STORE}; or that to which Attribution.save wrote" if scored else _STORE
    )
    if scored:
        parser.add_argument("--name", type=str, metavar="NAME", help=_NAME)
        parser.add_argument("--k", type=int, default=5, metavar="K", help=_K)
    if name == "top":
        parser.add_argument("--target", action="append", metavar="ID", help=_TARGET)
    if name == "report":
        parser.add_argument("--output", type=str, default="report.html", metavar="FILE", help=_OUTPUT)
    if name == "clean":
        parser.add_argument("--yes", action="store_true", help="do not ask")
        parser.add_argument("--targets", action="store_true", help="also delete the features of targets, and scores")
        parser.add_argument("--checkpoint", action="append", metavar="DIGEST", help=_CHECKPOINT)


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
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # ids may have characters that the terminal cannot show
    sys.exit(main())
