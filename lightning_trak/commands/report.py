"""``report``: one HTML file from saved scores, without the data."""

from __future__ import annotations

from pathlib import Path

from lightning_trak.commands.choosing import chosen_scores
from lightning_trak.results.report.page import check_html
from lightning_trak.results.terminal import size_text


def report(path: Path, *, name: str | None = None, output: str = "report.html", k: int = 5) -> int:
    """Write the report, and say where it is; return the exit status, 0."""
    check_html("--output", output)
    written = chosen_scores(path, name).report(output, k=k)
    print(f"The report is in '{written.absolute()}' ({size_text(written.stat().st_size)}).")
    print("It shows examples by id and label. To draw them: attribution.report(path, train=..., targets=...).")
    return 0
