"""``python -m tests.faults [--kills N] [--damages N] [--trials N] [--cuts N]``: prints a table of what was found."""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tests.faults.damages import damage_all
from tests.faults.kills import kill_all
from tests.faults.power import cut_all
from tests.faults.processes import share_all
from tests.faults.running import undisturbed
from tests.faults.scenarios import SCENARIOS, with_small_chunks
from tests.faults.trials import Found, stories, table


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Disturb the library, print a table.")
    parser.add_argument("--kills", type=int, default=600, help="runs that are killed and rerun")
    parser.add_argument("--damages", type=int, default=1000, help="files that are damaged")
    parser.add_argument("--trials", type=int, default=60, help="trials with several processes at a time")
    parser.add_argument("--cuts", type=int, default=200, help="power cuts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials at a time")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--json", type=Path, help="a file to which a line is added for each trial")
    return parser.parse_args()


def parts(asked: argparse.Namespace) -> dict[str, Callable[[], Iterable[Found]]]:
    """Return the parts of the harness that are asked for, by name."""
    runs = {name: undisturbed(name) for name in SCENARIOS} if asked.kills or asked.trials or asked.cuts else {}
    given = {"jobs": asked.jobs, "seed": asked.seed}
    every = {
        "kills": partial(kill_all, runs, asked.kills, **given) if asked.kills else None,
        "damages": partial(damage_all, asked.damages, **given) if asked.damages else None,
        "processes": partial(share_all, runs, asked.trials, **given) if asked.trials else None,
        "power": partial(cut_all, runs, asked.cuts, **given) if asked.cuts else None,
    }
    return {name: part for name, part in every.items() if part is not None}


def main() -> None:
    """Run all parts; print the table, and what happened where something is wrong."""
    asked, found = arguments(), []
    torch.set_num_threads(1)  # forks must not miss threads
    warnings.simplefilter("ignore")
    with_small_chunks()
    for name, part in parts(asked).items():
        start = time.monotonic()
        for one in part():
            found.append(one)
            if asked.json:
                with open(asked.json, "a") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
        print(f"{name}: {sum(one.part == name for one in found)} in {time.monotonic() - start:.0f} s", flush=True)
    print(f"\n{table(found)}\n\n{stories(found)}")


if __name__ == "__main__":
    main()
