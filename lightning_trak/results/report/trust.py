"""How far scores can be relied on: settings in words, how checkpoints agree, how well scores predict retraining."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_trak.results.numbers import number_text

_DIGITS = 12  # of a checkpoint's digest
_AGREE = 0.5  # the rank correlation from which on two halves of the checkpoints say much the same
_LISTED = ("checkpoints", "dampings", "damping_rules", "loss_explained", "warnings")  # these have tables of their own
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 200, 44, 14, 12, 34  # of a curve, and its margins
_TICKS = 6  # numbers that are written at the horizontal axis, at most


class Fact(NamedTuple):
    """A setting: its name and its value in words, and what it means for the reader, which may be empty."""

    name: str
    value: str
    meaning: str = ""


class Curve(NamedTuple):
    """A curve between axes, in the coordinates of a drawing.

    Attributes:
        line: its points, as SVG takes them.
        dots: (x, y, number of checkpoints, agreement) of each point.
        ticks: (x, text) along the horizontal axis.
        levels: (y, text) along the vertical axis.
    """

    line: str
    dots: list[tuple[float, float, int, str]]
    ticks: list[tuple[float, str]]
    levels: list[tuple[float, str]]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM


class Bar(NamedTuple):
    """A measured value: its name, the value as text, and its length in percent; of an interval the two ends."""

    name: str
    value: str
    length: float
    interval: tuple[float, float] | None = None


def facts(info: Mapping[str, Any]) -> list[Fact]:
    """Return all settings, by the names of `AttributionInfo`, in plain words; an unknown one under its own name.

    >>> [fact.value for fact in facts({"temperature": 1.3, "new_setting": 3})]
    ['1.30', '3']
    """
    known = {name: _FACTS[name](value) for name, value in info.items() if name in _FACTS}
    others = [name for name in info if name not in known and name not in _LISTED]
    return [*known.values(), *(Fact(name.replace("_", " "), str(info[name])) for name in others)]


_RUNS = (
    "How many trainings the checkpoints come from was not noted.",
    "Scores of one training share its chance events. Other seeds in the same store average these out.",
    "Scores are averaged over trainings, which averages out their chance events.",
)
_PARAMETERS = "Only what examples do to these parameters is scored."
_GRADIENTS = "How they were computed. All ways give the same gradients, up to rounding."
_WHITENING = (
    ("none", "Gradients are projected as they are."),
    (
        "by the curvature of each parameter",
        "Gradients are divided by the curvature before they are compressed (EK-FAC).",
    ),
)
_DAMPING = "What is added to the curvature before it is inverted. More damping makes scores smaller."
_CURVATURE = (
    ("not used", "The Gauss–Newton matrix weighs all examples alike. Ranks can be compared, sizes cannot."),
    ("used", "A score predicts by how much the output falls if the example is left out of training."),
)
_TEMPERATURE = "Model outputs were divided by it before their loss."
_ESTIMATORS = {
    "gauss_newton": "One Newton step on the linearised model, averaged over checkpoints.",
    "trak": "As in the TRAK paper: the loss's slope is averaged over checkpoints separately.",
}


def _calibrated(subsets: int) -> tuple[str, str]:
    if not subsets:
        return "no", "Ranks are more reliable than sizes."
    return f"on {_count(subsets)} retrained subsets", "The size of scores was fitted to real retraining."


_FACTS: dict[str, Callable[[Any], Fact]] = {
    "n_train": lambda value: Fact("Training examples", _count(value)),
    "n_targets": lambda value: Fact("Targets", _count(value)),
    "runs": lambda value: Fact("Training runs", _known_count(value), _RUNS[min(value, 2)]),
    "n_attributed": lambda value: Fact("Parameters attributed", _known_count(value), _PARAMETERS),
    "n_params": lambda value: Fact("Parameters of the model", _known_count(value)),
    "gradients": lambda value: Fact("Per-sample gradients by", value or "unknown", _GRADIENTS),
    "projector": lambda value: Fact("Projection", value, "Gradients are compressed by it before they are stored."),
    "proj_dim": lambda value: Fact("Size of a projected gradient", _count(value), "The more numbers, the less noise."),
    "preconditioner": lambda value: Fact("Whitening", *_WHITENING[value is not None]),
    "damping": lambda value: Fact("Damping λ", value if isinstance(value, str) else number_text(value), _DAMPING),
    "curvature": lambda value: Fact("Curvature of the loss", *_CURVATURE[bool(value)]),
    "temperature": lambda value: Fact("Temperature", number_text(value), _TEMPERATURE),
    "estimator": lambda value: Fact("Estimator", value, _ESTIMATORS.get(value, "")),
    "calibrated_on": lambda value: Fact("Calibrated", *_calibrated(value)),
}


def checkpoints(info: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of checkpoints: its titles and its rows.

    >>> checkpoints({"checkpoints": ("a1b2",), "dampings": (0.3,), "damping_rules": ("as given",)})
    (['Number', 'Checkpoint', 'Damping λ', 'Chosen by'], [['1', 'a1b2', '0.300', 'as given']])
    """
    digests = [digest[:_DIGITS] for digest in info["checkpoints"]]
    columns = {
        "Number": [str(number) for number in range(1, len(digests) + 1)],
        "Checkpoint": digests,
        "Damping λ": [number_text(value) for value in info.get("dampings", ())],
        "Chosen by": list(info.get("damping_rules", ())),
        "Loss explained": [number_text(value) for value in info.get("loss_explained", ())],
    }
    shown = {title: values for title, values in columns.items() if len(values) == len(digests)}
    return list(shown), [list(row) for row in zip(*shown.values(), strict=True)]


def curve(convergence: tuple[Sequence[int], Sequence[float]]) -> Curve:
    """Return how well halves of the checkpoints agree, over their number, as a curve."""
    numbers, agreement = convergence
    low = min(0.0, *agreement) if agreement else 0.0
    span = max(numbers[-1] - numbers[0], 1) if numbers else 1

    def x(number: int) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * ((number - numbers[0]) / span if len(numbers) > 1 else 0.5), 1)

    def y(value: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value) / (1 - low), 1)

    dots = [(x(number), y(value), number, number_text(value)) for number, value in zip(numbers, agreement, strict=True)]
    step = -(-len(numbers) // _TICKS) or 1
    levels = [(0.5, ""), *((level, number_text(level)) for level in (-1, 0, 1) if level >= low)]
    return Curve(
        " ".join(f"{dot[0]},{dot[1]}" for dot in dots),
        dots,
        [(x(number), str(number)) for number in numbers[::step]],
        [(y(value), text) for value, text in levels],
    )


def bars(evaluation: Any) -> list[Bar]:
    """Return the linear datamodeling score, the noise ceiling and the score of random numbers as bars.

    Raises:
        TypeError: if it is something else.
    """
    if not all(hasattr(evaluation, name) for name in ("lds", "interval", "ceiling", "random", "slope")):
        raise TypeError(
            f"evaluation must be what evaluate(attribution, ground_truth) returned, got {type(evaluation).__name__}."
        )
    lower, upper = (float(bound) for bound in evaluation.interval)
    text = f"{number_text(evaluation.lds)}, 95 % interval {number_text(lower)} to {number_text(upper)}"
    found = [Bar("These scores", text, _percent(evaluation.lds), (_percent(lower), _percent(upper)))]
    if evaluation.ceiling is not None:
        found.append(Bar("Noise ceiling", number_text(evaluation.ceiling), _percent(evaluation.ceiling)))
    return [*found, Bar("Random scores", number_text(evaluation.random), _percent(evaluation.random))]


def _percent(value: float) -> float:
    return round(100 * min(1.0, max(0.0, value)), 1)


def cautions(
    info: Mapping[str, Any],
    convergence: tuple[Sequence[int], Sequence[float]] | None,
    evaluation: Any,
    *,
    partial: bool,
) -> list[str]:
    """Return what a reader should keep in mind, the most serious first."""
    found = list(info.get("warnings", ()))
    if evaluation is not None and float(evaluation.interval[0]) <= 0:
        found.append(
            "Of these scores it is not shown that they predict retraining: the interval of the LDS has 0 in it."
        )
    count = len(info["checkpoints"])
    if count == 1:
        found.append(
            "Scores come from one checkpoint, so how much they would vary with another is not known. Save more"
            " checkpoints: ModelCheckpoint(save_top_k=-1)."
        )
    if convergence and convergence[1] and convergence[1][-1] < _AGREE:
        found.append(
            f"Two halves of the {convergence[0][-1]} checkpoints agree by {number_text(convergence[1][-1])} only: ranks"
            " would change much with other checkpoints. Average over more of them, of more runs."
        )
    if partial:
        found.append(
            "Only the highest and lowest scores of each target were kept: their standard errors are not known."
        )
    if evaluation is None:
        found.append(
            "Whether scores predict retraining was not measured here. evaluate(attribution, retrain_subsets(...))"
            " measures it; report(..., evaluation=...) shows it."
        )
    return found


def headline(info: Mapping[str, Any]) -> str:
    """Return in one line what was attributed.

    >>> headline({"n_targets": 1, "n_train": 1400, "checkpoints": ("a", "b"), "runs": 1})
    '1 target, 1\u202f400 training examples, 2 checkpoints of 1 run'
    """
    runs = f" of {_plural(info['runs'], 'run')}" if info.get("runs") else ""
    counts = (
        (info["n_targets"], "target"),
        (info["n_train"], "training example"),
        (len(info["checkpoints"]), "checkpoint"),
    )
    return ", ".join(_plural(*count) for count in counts) + runs


def _plural(number: int, noun: str) -> str:
    return f"{_count(number)} {noun}{'s' * (number != 1)}"


def _known_count(number: int) -> str:
    return _count(number) if number else "unknown"


def _count(number: int) -> str:
    """Return a whole number with thin gaps between thousands."""
    return f"{number:,}".replace(",", "\u202f")
