"""Targets beside training examples, and bars: what is drawn, by the artists of matplotlib."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from lightning_trak import Attribution
from lightning_trak.influence import Extremes, Ranked
from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.numbers import number_text

N, M = 12, 6
SCORES = torch.randn(N, M, generator=torch.Generator().manual_seed(0))
SCORES[:, 2] = -SCORES[:, 2].abs()  # nothing helps
SCORES[:, 2][[3, 7]] *= -1  # but two
SCORES[:, 3] = SCORES[:, 3].abs()  # nothing harms
SCORES[:, 3][5] = 0
SCORES[:, 4] = 0  # nothing does anything
INFO = AttributionInfo(N, M, ("aa", "bb"), "sparse", 2048, 0.3, True)
BLUE, RED, ORANGE = "#2166ac", "#b2182b", "#e69f00"


@pytest.fixture
def full():
    return Attribution(SCORES, INFO)


@pytest.fixture(params=["full", "extremes"])
def either(request):
    if request.param == "full":
        return Attribution(SCORES, INFO)
    top, bottom = (SCORES.topk(4, dim=0, largest=largest) for largest in (True, False))
    return Attribution(Extremes(Ranked(top[1].T, top[0].T), Ranked(bottom[1].T, bottom[0].T)), INFO)


def expected(column, k, sign):
    """The k most helpful or harmful rows: those of the sign alone, sorted by hand."""
    pairs = sorted(enumerate(SCORES[:, column].tolist()), key=lambda pair: -sign * pair[1])
    return [(row, score) for row, score in pairs if score * sign > 0][:k]


def below(axes):
    return [axis.get_xlabel() for axis in axes]


def text_of(axis):
    """All text within a cell, of a pair that of both parts, in its order."""
    return [one.get_text() for part in (axis, *axis.child_axes) for one in part.texts if one.get_text() not in HEADINGS]


HEADINGS = ("most helpful", "most harmful")


@pytest.mark.parametrize("k", [1, 3, 4])
def test_each_side_has_scores_of_its_sign_alone_and_in_order(either, k):
    _, axes = either.plot(torch.rand(N, 8, 8), torch.rand(M, 8, 8), columns=range(M), k=k)
    assert axes.shape == (M, 1 + 2 * k)
    for column in range(M):
        for first, sign, colour in ((1, 1, BLUE), (1 + k, -1, RED)):
            cells, pairs = axes[column, first : first + k], expected(column, k, sign)
            assert below(cells) == [f"#{row}" for row, _ in pairs] + [""] * (k - len(pairs))
            titles = [number_text(score, signed=True) for _, score in pairs]
            assert [cell.get_title() for cell in cells] == titles + [""] * (k - len(pairs))
            assert {to_hex(cell.title.get_color()) for cell in cells[: len(pairs)]} <= {colour}
            assert [bool(cell.images) for cell in cells] == [place < len(pairs) for place in range(k)]


def test_places_without_an_example_say_why(full):
    _, axes = full.plot(torch.rand(N, 8, 8), torch.rand(M, 8, 8), columns=[2, 3, 4], k=4)
    words = [[" ".join(" ".join(text_of(axis)).split()) for axis in row] for row in axes]
    assert words[0] == ["", "", "", "no other score is positive", "", "", "", "", ""]
    assert words[1][5:] == ["no score is negative", "", "", ""]
    assert words[2][1:] == ["no score is positive", "", "", "", "no score is negative", "", "", ""]
    assert [[text.get_text() for text in axes[0, column].texts][:1] for column in (1, 5)] == [[one] for one in HEADINGS]


def test_bars_of_each_sign_in_order(either):
    figure, axes = either.plot(columns=range(M), k=3)
    assert axes.shape == (M,)
    assert all(axis.figure is figure for axis in axes)
    for column, axis in enumerate(axes):
        pairs = expected(column, 3, 1) + expected(column, 3, -1)[::-1]
        assert [label.get_text() for label in axis.get_yticklabels()] == [f"train {row}" for row, _ in pairs]
        np.testing.assert_allclose([bar.get_width() for bar in axis.patches], [score for _, score in pairs], rtol=1e-6)
        colours = [BLUE if score > 0 else RED for _, score in pairs]
        assert [to_hex(bar.get_facecolor()) for bar in axis.patches] == colours
        numbers = [text.get_text() for text in axis.texts]
        assert numbers == ([number_text(s, signed=True) for _, s in pairs] or ["no score differs from 0"])
        assert axis.get_title() == f"target {column}"
        assert axis.get_xlabel() == "score"


def test_more_examples_than_there_are(either):
    """All of them, as in tables and reports."""
    _, axes = either.plot(torch.rand(N, 8, 8), columns=[0], k=100)
    most = either.top(4).indices.shape[1] if isinstance(either._scores, Extremes) else N
    assert axes.shape == (1, 1 + 2 * most)


GRAY = torch.rand(N, 8, 10, generator=torch.Generator().manual_seed(1))
BYTES = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
IMAGES = {
    "gray": (GRAY, GRAY),
    "channel first": (GRAY[:, None], GRAY),
    "colour": (GRAY[:, None].expand(-1, 3, -1, -1), GRAY[..., None].expand(-1, -1, -1, 3)),
    "bytes": (BYTES, torch.tensor(BYTES) / 255),
    "with labels": ([(image, torch.tensor(row % 10)) for row, image in enumerate(GRAY)], GRAY),
    "mappings": ([{"image": image, "label": row % 10} for row, image in enumerate(GRAY)], GRAY),
    "inputs in a mapping": ([({"pixel_values": image}, row % 10) for row, image in enumerate(GRAY)], GRAY),
    "NaN": ([torch.where(image > 0.5, torch.nan, image) for image in GRAY], None),
}


@pytest.mark.parametrize("form", IMAGES)
def test_images(either, form):
    data, pixels = IMAGES[form]
    _, axes = either.plot(data, data[:M], columns=[0, 5], k=2)
    assert axes.shape == (2, 5)
    for row, column in enumerate((0, 5)):
        shown = [column, *(one for one, _ in expected(column, 2, 1) + expected(column, 2, -1))]
        for axis, example in zip(axes[row], shown, strict=True):
            (image,) = axis.images
            if pixels is not None:
                np.testing.assert_allclose(image.get_array() / 255, pixels[example], atol=0.0021)
            assert image.get_clim() == (0, 255)  # black is 0 in every image: they can be compared
            if form in ("with labels", "mappings", "inputs in a mapping"):
                assert f"label {example % 10}" in axis.get_title().splitlines()


def test_class_maps_are_drawn_over_their_images_in_colours_that_the_legend_tells(full):
    classes = torch.zeros(N, 9, 9, dtype=torch.long)
    classes[:, :3], classes[:, -1] = 2, 255
    figure, axes = full.plot([(torch.full((3, 9, 9), 0.5), one) for one in classes], columns=[0], k=1)
    pixels = axes[0, 1].images[0].get_array()
    orange = np.array([0xE6, 0x9F, 0])
    np.testing.assert_allclose(pixels[0, 0], 0.45 * 127.5 + 0.55 * orange, atol=1)
    np.testing.assert_allclose(pixels[4, 0], 127.5, atol=1)  # class 0
    np.testing.assert_allclose(pixels[-1, 0], 127.5, atol=1)  # ignored
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["class 2"]
    assert to_hex(legend.get_patches()[0].get_facecolor()) == ORANGE


def test_text_is_wrapped_and_nothing_in_it_is_a_formula(full):
    """Text between two dollar signs would be, and this one could not be read."""
    words = "costs $5_{ and " * 40
    _, axes = full.plot([words] * N, [f"short\x00 {row} $_$" for row in range(M)], columns=[1], k=2)
    (text,) = text_of(axes[0, 1])
    lines = text.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 40
    assert " ".join(lines).startswith("costs $5_{ and costs $5_{ and costs")
    assert text.endswith("…")
    assert text_of(axes[0, 0]) == ["short 1 $_$"]
    for axis in axes[0]:
        axis.figure.canvas.draw()
        for one in axis.texts:
            if one.get_text() not in HEADINGS:
                assert one.get_window_extent().width <= axis.get_window_extent().width
                assert one.get_window_extent().height <= axis.get_window_extent().height


def test_tokens_of_a_tokenizer_come_without_padding(full):
    tokens, mask = torch.tensor([101, 7592, 102, 0, 0]), torch.tensor([1, 1, 1, 0, 0])
    batch = [{"input_ids": tokens + mask * row, "attention_mask": mask, "labels": row % 2} for row in range(N)]
    _, axes = full.plot(batch, batch[:M], columns=[1], k=2)
    assert text_of(axes[0, 0]) == ["102 7593 103"]
    (best, _), _ = expected(1, 2, 1)
    assert text_of(axes[0, 1]) == [f"{101 + best} {7592 + best} {102 + best}"]
    assert axes[0, 1].get_title().splitlines()[0] == f"label {best % 2}"
    _, axes = full.plot([["a", "cat"]] * N, columns=[1], k=1)
    assert text_of(axes[0, 1]) == ["a cat"]


def test_tables_show_the_columns_that_differ_most(full):
    """Against a slow reference: differences in standard deviations over the rows that are drawn."""
    values = np.random.default_rng(0).normal(size=(N + M, 9)) * 10.0 ** np.arange(9)
    frame = pd.DataFrame(values, columns=list("abcdefghi"))
    frame["label"] = range(N + M)
    figure, axes = full.plot(frame[:N], frame[N:], columns=[1], k=2)
    rows = [row for row, _ in expected(1, 2, 1) + expected(1, 2, -1)]
    target, spread = values[N + 1], values[[N + 1, *rows]].std(0)
    shown = set()
    for axis, row in zip(axes[0, 1:], rows, strict=True):
        difference = (values[row] - target) / spread
        order = np.argsort(-abs(difference))[:5]
        lines = [f"{'abcdefghi'[j]}: {number_text(values[row, j])} {'▲' if difference[j] > 0 else '▼'}" for j in order]
        assert text_of(axis) == ["\n".join(lines)]
        assert axis.get_title().splitlines()[0] == f"label {row}"
        shown |= {"abcdefghi"[j] for j in order}
    own = [line.split(": ") for line in text_of(axes[0, 0])[0].splitlines()]
    assert dict(own) == {j: number_text(target["abcdefghi".index(j)]) for j in shown}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["▲ ▼ higher, lower than in the target"]


def test_tables_that_are_alike_or_have_other_columns(full):
    rows = [{"a": 1.0, "b": 2.0}] * N
    _, axes = full.plot(rows, rows[:M], columns=[0], k=1)
    assert text_of(axes[0, 1]) == ["as the target"]
    assert text_of(axes[0, 0]) == ["a: 1.00\nb: 2.00"]
    _, axes = full.plot(rows, [{"c": 1.0}] * M, columns=[0], k=1)
    assert [text_of(axis) for axis in axes[0, :2]] == [["c: 1.00"], ["a: 1.00\nb: 2.00"]]


def test_series_are_curves_on_one_scale_in_each_row(full):
    series = torch.randn(N, 100, 3, generator=torch.Generator().manual_seed(2)).cumsum(1)
    _, axes = full.plot(series, series[:M], columns=[0, 1], k=2)
    for column in (0, 1):
        rows = [column, *(row for row, _ in expected(column, 2, 1) + expected(column, 2, -1))]
        for axis, row in zip(axes[column], rows, strict=True):
            np.testing.assert_allclose([line.get_ydata() for line in axis.lines], series[row].T, rtol=1e-6)
            assert axis.get_ylim() == axes[column, 0].get_ylim()
        low, high = series[rows].min().item(), series[rows].max().item()
        assert text_of(axes[column, 0]) == [number_text(high), number_text(low)]
        assert axes[column, 0].get_ylim()[0] < low < high < axes[column, 0].get_ylim()[1]


def test_pairs_are_drawn_beside_each_other(full):
    pairs = [(torch.rand(3, 9, 9), f"a photo of the number {row} here") for row in range(N)]
    _, axes = full.plot(pairs, pairs[:M], columns=[1], k=1)
    ((best, _),) = expected(1, 1, 1)
    for axis, row in ((axes[0, 0], 1), (axes[0, 1], best)):
        image, caption = axis.child_axes
        np.testing.assert_allclose(image.images[0].get_array() / 255, pairs[row][0].permute(1, 2, 0), atol=0.0021)
        assert " ".join(caption.texts[0].get_text().split()) == pairs[row][1]
    texts = [{"premise": "a man sleeps", "hypothesis": "he is awake", "label": 0}] * N
    _, axes = full.plot(texts, columns=[1], k=1)
    assert text_of(axes[0, 1]) == ["premise: a man sleeps", "hypothesis: he is awake"]


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(13, 8, 8), "Tensor of shape (13, 8, 8)"),
        (({"image": object()}, 1), "object"),
        ({}, "nothing to draw"),
        ((), "tuple"),
    ],
)
def test_what_cannot_be_drawn_is_named(full, example, words):
    named = full.with_columns(train={"label": ["cat"] * N, "id": [f"{row}.npy" for row in range(N)]})
    _, axes = named.plot([example] * N, columns=[0], k=1)
    ((best, score),) = expected(0, 1, 1)
    assert words in " ".join(" ".join(text_of(axes[0, 1])).split())
    assert axes[0, 1].get_title() == f"label cat\n{number_text(score, signed=True)}"
    assert axes[0, 1].get_xlabel() == f"{best}.npy"


def test_ids_labels_and_predictions_of_the_attribution(full):
    names = [f"a/very/long/folder/of/images/number{row:04d}.png" for row in range(N)]
    labels = {"label": [0, 1, 1, 1, 1, 1], "prediction": [0, 2.0, None, 1.0, 1, 1]}
    named = full.with_columns(train={"id": names, "label": ["$a$"] * N}, targets=labels)
    images = [(torch.rand(8, 8), 9)] * N  # their own label does not count
    _, axes = named.plot(images, images[:M], columns=[0, 1, 2, 3], k=1)
    first = ["label 0", "label 1\npredicted 2", "label 1", "label 1"]
    assert [axis.get_title() for axis in axes[:, 0]] == [f"target {row}\n{own}" for row, own in enumerate(first)]
    ((best, score),) = expected(0, 1, 1)
    assert axes[0, 1].get_title() == f"label $a$\n{number_text(score, signed=True)}"
    assert axes[0, 1].get_xlabel().startswith("…")
    assert axes[0, 1].get_xlabel().endswith(f"{best:04d}.png")
    _, axes = named.with_columns(targets={"id": list("uvwxyz")}).plot(images, images[:M], columns=[1], k=1)
    assert (axes[0, 0].get_title(), axes[0, 0].get_xlabel()) == ("target\nlabel 1\npredicted 2", "v")
    _, (axis,) = named.plot(columns=[1], k=1)
    assert axis.get_title() == "target 1, label 1, predicted 2"
    ((best, _),) = expected(1, 1, 1)
    assert axis.get_yticklabels()[0].get_text().endswith(f"images/number{best:04d}.png, label $a$")


def test_targets_that_are_not_passed_are_named(full):
    _, axes = full.with_columns(targets={"label": ["cat"] * M}).plot(torch.rand(N, 8, 8), columns=[2], k=1)
    assert text_of(axes[0, 0]) == ["target 2\nlabel cat"]
    assert not axes[0, 0].images


def framed(axis):
    return {to_hex(spine.get_edgecolor()) for spine in axis.spines.values()} == {ORANGE}


@pytest.mark.parametrize("form", ["rows", "mask", "tensor", "set", "ids", "none of them"])
def test_marked_examples_get_a_frame(full, form):
    rows = [] if form == "none of them" else [expected(0, 2, 1)[1][0], expected(0, 1, -1)[0][0]]
    mask = torch.isin(torch.arange(N), torch.tensor(rows))
    ids = [f"{row}.png" for row in range(N)]
    forms = {"mask": mask.numpy(), "tensor": mask, "set": {*rows}, "ids": [ids[row] for row in rows]}
    named = full.with_columns(train={"id": ids}) if form == "ids" else full
    figure, axes = named.plot(torch.rand(N, 8, 8), columns=[0], k=2, marked=forms.get(form, rows))
    shown = [row for row, _ in expected(0, 2, 1) + expected(0, 2, -1)]
    assert [framed(axis) for axis in axes[0]] == [False, *(row in rows for row in shown)]
    assert [text.get_text() for one in figure.legends for text in one.get_texts()] == ["marked"] * bool(rows)
    _, (axis,) = named.plot(columns=[0], k=2, marked=forms.get(form, rows))
    found = [to_hex(bar.get_edgecolor()) == ORANGE for bar in axis.patches]
    assert found == [row in rows for row in [*shown[:2], *shown[:1:-1]]]
    assert [name.get_fontweight() == "bold" for name in axis.get_yticklabels()] == found


@pytest.mark.parametrize(
    ("marked", "error", "message"),
    [
        ([N], ValueError, "marked must be rows of the train set, 0 to 11; got"),
        (["a"], ValueError, "No example has the id 'a'"),
        ("a", TypeError, "must be a list of ids"),
        ([0.5], ValueError, "marked must be rows of the train set"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"A mask must have shape \(12,\)"),
        (torch.ones(2, N, dtype=torch.bool), ValueError, r"marked must be one mask, \(12,\)"),
    ],
)
def test_marked_examples_that_are_not_there(full, marked, error, message):
    with pytest.raises(error, match=message):
        full.plot(marked=marked)
    assert not plt.get_fignums()


def test_one_axes_is_divided(full):
    figure, axs = plt.subplots(1, 2, figsize=(14, 6))
    marked = [expected(1, 1, 1)[0][0]]
    found, axes = full.plot(torch.rand(N, 8, 8), columns=[0, 1], k=2, marked=marked, ax=axs[1])
    assert found is figure
    assert axes.shape == (2, 5)
    assert framed(axes[1, 1])
    outer = axs[1].get_window_extent()
    for axis in axes.flat:
        inner = axis.get_window_extent()
        assert outer.x0 < inner.x0 < inner.x1 < outer.x1
        assert outer.y0 < inner.y0 < inner.y1 < outer.y1
    assert [text.get_text() for text in axs[1].get_legend().get_texts()] == ["marked"]
    assert not axs[0].child_axes
    plt.close(figure)
    assert not plt.get_fignums()


def test_axes_of_the_right_shape_are_drawn_into(full):
    figure, axs = plt.subplots(2, 5)
    found, axes = full.plot(torch.rand(N, 8, 8), columns=[0, 1], k=2, ax=axs)
    assert found is figure
    assert (axes == axs).all()
    assert axs[1, 0].texts[0].get_text() == "target 1"
    _, axs = plt.subplots(1, 5)  # plt.subplots leaves out what has length 1
    assert full.plot(["a"] * N, columns=[0], k=2, ax=axs)[1].shape == (1, 5)
    _, ax = plt.subplots()
    assert full.plot(columns=[1], ax=ax)[1].tolist() == [ax]
    _, axs = plt.subplots(2)
    assert full.plot(columns=[1, 2], ax=list(axs))[1].tolist() == list(axs)


def test_axes_of_the_wrong_kind_or_shape(full):
    figure, axs = plt.subplots(1, 2, figsize=(4, 3))
    images = torch.rand(N, 8, 8)
    for ax, error, message in (
        ("axes", TypeError, "ax must be Axes of matplotlib, got str. Make them with figure, ax = plt.subplots(5, 3)"),
        (figure, TypeError, "ax must be Axes of matplotlib, got Figure"),
        ([axs[0], None], TypeError, "got Axes and NoneType"),
        ([], TypeError, "ax must be Axes of matplotlib, got list"),
        (axs, ValueError, "ax must have the shape (5, 3), (targets, 1 + 2k): each beside 1 + 1 examples; got (2,)"),
        (axs[0], ValueError, "ax is too small for 5 targets with 2 training examples each: it has"),
    ):
        with pytest.raises(error) as caught:
            full.plot(images, k=1, ax=ax)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="ax is one Axes, and bars of 5 targets need one each. Pass an array of 5, or"):
        full.plot(ax=axs[0])
    assert plt.get_fignums() == [figure.number]


def test_what_is_wrong_is_named_and_no_figure_is_left(full):
    for columns in ([6], [-1], []):
        with pytest.raises(ValueError, match="columns must name some of the 6 targets, 0 to 5; got"):
            full.plot(columns=columns)
    for columns in (2, [0.5], "ab"):
        with pytest.raises(TypeError, match="columns must be a list of targets, by index"):
            full.plot(columns=columns)
    with pytest.raises(ValueError, match="train must have 12 examples.*got 11"):
        full.plot(torch.rand(N - 1, 8, 8))
    with pytest.raises(ValueError, match="targets must have 6 examples.*got 12"):
        full.plot(torch.rand(N, 8, 8), torch.rand(N, 8, 8))
    with pytest.raises(TypeError, match="train must be a sequence .* not its loader"):
        full.plot(torch.utils.data.DataLoader(torch.rand(N, 8, 8)))
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        full.plot(k=0)
    scores = SCORES.clone()
    scores[3, 0] = torch.nan
    with pytest.raises(ValueError, match="Some scores are not finite.*damping"):
        Attribution(scores, INFO).plot()
    assert not plt.get_fignums()


def test_without_matplotlib(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for options in ({}, {"train": torch.rand(N, 8, 8)}):
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            full.plot(**options)


def test_data_sets_that_draw_at_random_leave_random_states_as_they_were(full):
    class Augmenting:
        def __len__(self):
            return N

        def __getitem__(self, row):
            return torch.rand(8, 8)

    before = torch.get_rng_state()
    full.plot(Augmenting(), k=1)
    assert torch.equal(torch.get_rng_state(), before)
