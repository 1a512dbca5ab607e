"""A score, split by layer and by parts of both examples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SplitScore:
    """Where a score comes from; made by `Attribution.parts`.

    Attributes:
        score: τ of the training example for the target.
        layers: what each layer of the training example's gradient adds to the score, by name; the sum is the score.
        parts: what each pair of parts, of the training example and of the target, adds to the score: (training parts,
            target parts), e.g. tokens; for images of labelled pixels (height, width, height, width). The sum is the
            score. None if the model output has no parts.

    >>> split = SplitScore(0.5, {"body": 0.1, "head": 0.4}, None)
    >>> print(split)
    score 0.5
        head 0.4
        body 0.1
    """

    score: float
    layers: dict[str, float]
    parts: Tensor | None

    def __str__(self) -> str:
        ranked = sorted(self.layers.items(), key=lambda item: -abs(item[1]))
        width = max(map(len, self.layers), default=0)
        return "\n".join([f"score {self.score:.4g}", *(f"    {name:<{width}} {value:.4g}" for name, value in ranked)])
