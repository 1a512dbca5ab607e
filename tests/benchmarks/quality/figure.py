"""LDS against compute, training included."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.quality.every_task import TASKS
from tests.benchmarks.quality.results import Table

SHOWN = {"ours": "o-", "ours, as in the paper": "s:", "traker, best λ": "^--", "EK-FAC": "d--"}


def draw(tables: dict[str, Table], path: Path) -> None:
    """Draw a panel for each task: a point for each choice of checkpoints, joined in the order of their cost."""
    from matplotlib.figure import Figure

    n_rows, n_columns = min(2, len(tables)), (len(tables) + 1) // 2
    figure = Figure(figsize=(3.2 * n_columns, 3.1 * n_rows + 0.3), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel, (key, table) in zip(grid.flat, tables.items(), strict=False):
        for name, style in SHOWN.items():
            results = [result for (_, method), result in table.results.items() if method == name]
            points = sorted((result.seconds, result.evaluation.lds) for result in results)
            panel.plot([x for x, _ in points], [y for _, y in points], style, label=name, markersize=4)
        if table.ceiling is not None:
            panel.axhline(table.ceiling, color="0.7", linewidth=1)
        panel.set(title=TASKS[key].name, xscale="log", ylim=(0, None))
    for panel in grid.flat[len(tables) :]:
        panel.set_axis_off()
    figure.supxlabel("seconds of training and attribution", fontsize="medium")
    figure.supylabel("LDS (grey: noise ceiling)", fontsize="medium")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SHOWN), fontsize=8)
    figure.savefig(path, dpi=110)
