"""Which values stand out above the others?"""

from __future__ import annotations

import torch
from torch import Tensor

_QUANTILE, _OF_NORMAL = 0.85, 1.0364  # the normal distribution's quantile of 0.85


def outliers(values: Tensor, strength: float) -> Tensor:
    """Say which values are larger than the median by ``strength`` standard deviations of the upper half, (n,) bool.

    The standard deviation is taken from the 85th percentile, as of a normal distribution. So up to a tenth of the
    values may be outliers without hiding each other, and where many values lie far above the median (hard examples),
    it takes more to stand out. None stands out if the 85th percentile equals the median.

    >>> outliers(torch.tensor([*range(20), 100.0]), strength=4.5).nonzero().tolist()
    [[20]]
    """
    if not len(values):
        return torch.zeros(0, dtype=torch.bool)
    ordered = values.double().sort()[0]
    middle, upper = (ordered[int(part * (len(values) - 1))] for part in (0.5, _QUANTILE))
    deviation = (upper - middle) / _OF_NORMAL
    return (values.double() > middle + strength * deviation) & (deviation > 0)
