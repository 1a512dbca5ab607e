"""How features are stored: as they are, in half precision, or by their largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.features.largest import Array, entry_bytes, largest_entries

DTYPES = ("float16", "float32")
_TERMS = 3 * 4  # bytes of Q, w and f


@dataclass(frozen=True)
class StoredForm:
    """How features of an example are stored.

    Attributes:
        dimension: k, the number of features.
        dtype: ``"float16"``, relative to the largest of the example; or ``"float32"``.
        entries: how many of the largest are stored; None for all.
    """

    dimension: int
    dtype: str = "float32"
    entries: int | None = None

    @property
    def row_bytes(self) -> int:
        """How many bytes are stored of an example, with Q, w and f.

        >>> StoredForm(2048).row_bytes, StoredForm(2048, "float16").row_bytes
        (8204, 4112)
        """
        if self.entries is not None:
            return entry_bytes(self.entries, self.dimension) + _TERMS
        return (4 * self.dimension if self.dtype == "float32" else 2 * self.dimension + 4) + _TERMS

    def arrays(self, features: Tensor) -> dict[str, Array]:
        """Return features, (b, k), as arrays for the store, by name.

        >>> StoredForm(2, "float16").arrays(torch.tensor([[1.0, -4.0]]))
        {'features': array([[ 0.25, -1.  ]], dtype=float16), 'scale': array([4.], dtype=float32)}
        """
        if self.entries is not None:
            return largest_entries(features, self.entries)
        if self.dtype == "float32":
            return {"features": features.float().cpu().numpy()}
        scale = features.abs().amax(1)
        relative = features / scale.where(scale > 0, 1)[:, None]
        return {"features": relative.half().cpu().numpy(), "scale": scale.float().cpu().numpy()}


def dense(arrays: Mapping[str, Array]) -> Tensor:
    """Return all features of some examples, (b, k), float32, from what `StoredForm.arrays` returned.

    >>> dense(StoredForm(2, "float16").arrays(torch.tensor([[1.0, -4.0]])))
    tensor([[ 1., -4.]])
    """
    features = torch.from_numpy(arrays["features"])
    scale = arrays.get("scale")
    return features if scale is None else features.float().mul_(torch.from_numpy(scale)[:, None])
