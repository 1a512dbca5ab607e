"""LDS against compute, training included."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.quality.every_task import TASKS
from tests.benchmarks.quality.results import Table

SHOWN = {"ours": "o-", "ours, as in the paper": "s:", "traker, best λ": "^--", "EK-FAC": "d--"}


def draw(tables: dict[str, Table], path: Path) -> None:
    """Draw a panel for each task: a point for each choice of checkpoints, joined in the order of their cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(tables), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (key, table) in zip(panels, tables.items(), strict=True):
        for name, style in SHOWN.items():
            results = [result for (_, method), result in table.results.items() if method == name]
            points = sorted((result.seconds, result.evaluation.lds) for result in results)
            panel.plot([x for x, _ in points], [y for _, y in points], style, label=name, markersize=4)
        if table.ceiling is not None:
            panel.axhline(table.ceiling, color="0.7", linewidth=1)
        panel.set(title=TASKS[key].name, xscale="log", xlabel="seconds of training and attribution", ylim=(0, None))
    panels[0].set_ylabel("LDS (grey: noise ceiling)")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
