"""Every test leaves no figure open but those that it made, and these are closed."""

from __future__ import annotations

import matplotlib as mpl
import pytest

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # whatever was drawn can be shown
    plt.close("all")
