"""``python -m tests.faults.child SCENARIO FOLDER``: runs one scenario, killed before the event ``FAULTS_KILL_AT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.faults.events import Counter, Watch
from tests.faults.scenarios import SCENARIOS, with_small_chunks


def main() -> None:
    """Run the scenario that is named, and say how many events there were."""
    name, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    with_small_chunks()
    folder.mkdir(parents=True, exist_ok=True)
    counter = Counter(int(os.environ.get("FAULTS_KILL_AT", "0")))
    Watch(folder, counter)
    SCENARIOS[name](folder)
    print(f"{counter.seen} events")


if __name__ == "__main__":
    main()
