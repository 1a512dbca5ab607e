"""Attributions to report on, and what is in the file that comes out."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import torch

from lightning_trak import Attribution
from lightning_trak.influence import Spread
from lightning_trak.results.info import AttributionInfo


def attribution(n=30, m=7, checkpoints=4, seed=0, **info):
    """Scores with a spread over checkpoints, and outputs."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(n, m, generator=generator) + 0.3 * torch.randn(checkpoints, n, m, generator=generator)
    digests = tuple(f"{number:016x}" for number in range(checkpoints))
    described = AttributionInfo(
        n, m, digests, "sparse", 64, "auto", True, (0.3,) * checkpoints, ("by cross-validation",) * checkpoints, **info
    )
    spread = Spread(sample.std(0) / checkpoints**0.5, sample)
    return Attribution(sample.mean(0), described, spread, outputs=torch.randn(m, generator=generator))


class Elements(HTMLParser):
    """The elements of a document with their attributes, and the text of each script by its id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.texts, self._script = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", "") if tag in ("script", "style") else None
        if self._script is not None:
            self.scripts[self._script if tag == "script" else "style"] = ""

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.texts.append(data)
        else:
            key = self._script if self._script in self.scripts else "style"
            self.scripts[key] += data


def read(path):
    """Return the data of a report, with all drawings; and its elements."""
    found = Elements(path.read_text(encoding="utf-8"))
    data = json.loads(found.scripts["data"])
    parts = [json.loads(text) for name, text in found.scripts.items() if name.startswith("drawn-")]
    data["drawn"] = [drawing for part in parts for drawing in part]
    return data, found
