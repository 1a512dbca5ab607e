"""One line about an attribution: what was averaged over, and whether that was enough."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_trak.results.terminal import count

_ENOUGH = 2 / 3  # then all checkpoints together agree to 0.8 with as many others (Spearman and Brown)


def status_of(
    checkpoints: int,
    runs: int,
    parameters: tuple[int, int],
    gradients: str = "",
    dampings: Sequence[float] = (),
    rules: Sequence[str] = (),
    agreement: float | None = None,
    *,
    whitened: bool = False,
) -> str:
    """Return one line about what scores were averaged over.

    ``parameters`` are the numbers of attributed ones and of all. Numbers are 0, texts empty, and the agreement of two
    halves of the checkpoints None, where they are unknown.

    >>> status_of(8, 2, (66, 66), "hooks", [3.1] * 8, ["from the training time"] * 8, 0.93)
    '8 checkpoints of 2 runs, 66 of 66 parameters by hooks, damping 3.1 from the training time, halves agree 0.93'
    >>> status_of(2, 1, (1200, 34000), "", [0.1, 0.2], ["by cross-validation"] * 2, 0.4).partition(": ")[0]
    '2 checkpoints of 1 run, 1 200 of 34 000 parameters, damping 0.1 to 0.2 by cross-validation, halves agree 0.40 only'
    """
    parts = [count(checkpoints, "checkpoint") + (f" of {count(runs, 'run')}" if runs else "")]
    if all(parameters):
        own, whole = (f"{number:,}".replace(",", " ") for number in parameters)
        parts.append(f"{own} of {whole} parameters" + (f" by {gradients}" if gradients else ""))
    if whitened:
        parts.append("whitened")
    if dampings:
        values = " to ".join(f"{value:.2g}" for value in sorted({min(dampings), max(dampings)}))
        rule = " or ".join(sorted(set(rules)))
        parts.append(f"damping {values} {f'({rule})' if ',' in rule else rule}".rstrip())
    if agreement is None:
        return ", ".join(parts)
    if agreement >= _ENOUGH:
        return ", ".join([*parts, f"halves agree {agreement:.2f}"])
    return ", ".join([*parts, f"halves agree {agreement:.2f} only"]) + (
        ": the ranks of training examples are uncertain. Average over more checkpoints: fit again with another seed and"
        " the same TRAKCallback(dirpath=...), see convergence()"
    )
