"""Attribution: what the user gets back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_trak.influence import Extremes, Ranked, Spread, extremes_of, fit_weights, rank
from lightning_trak.influence.train_features import evenly_spaced
from lightning_trak.isolation.random_states import kept_random_states
from lightning_trak.metrics import predicted_outputs
from lightning_trak.results.convergence import Convergence, agreement_of_all, convergence_of
from lightning_trak.results.examples import Examples, plain
from lightning_trak.results.info import AttributionInfo
from lightning_trak.results.kept import Kept
from lightning_trak.results.plots.extremes import plot_extremes
from lightning_trak.results.report.content import Known
from lightning_trak.results.report.page import notebook_page, write_report
from lightning_trak.results.saved import Saved, check_saved, read_saved, write_saved
from lightning_trak.results.score_parts import SplitScore
from lightning_trak.results.status import status_of
from lightning_trak.results.stored_scores import StoredScores, scores_at
from lightning_trak.results.subsets import kept_subset, masks_of
from lightning_trak.results.tables import Table, long_frame, long_table, wide_frame, write_csv, write_parquet
from lightning_trak.results.terminal import count
from lightning_trak.store.remote import RemotePath, path_of, writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


_CURVE = 200  # targets from which a report tells how well checkpoints agree: of thousands it would take a minute
_NOTEBOOK = 5, 3  # targets in a notebook's table, and training examples on each side


class Attribution:
    """Scores of every training example for every target.

    A positive score says that training on the example raised the model output of the target: the example is *helpful*,
    a proponent. A negative score says that training on it lowered the output. With ``curvature=True`` a score predicts
    by how much the output falls if the example is left out of training.

    Args:
        scores: τ, (n, m), in memory or on disk; or `Extremes`, the highest and lowest scores of each target alone.
        info: how scores were computed.
        spread: how scores vary from checkpoint to checkpoint, where that is known.
        outputs: the model outputs of the targets, (m,), where they are known.
        kept: the features, where they are at hand.
        train: what is known of the training examples; by default their row numbers.
        targets: what is known of the targets; by default their row numbers.

    Attributes:
        info: how scores were computed.
        train: what is known of the n training examples: their ids, and columns such as ``"label"``.
        targets: what is known of the m targets: their ids, and columns such as ``"label"`` and ``"prediction"``.

    >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
    >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
    >>> attribution
    Attribution of 3 training examples for 1 target: 1 checkpoint
    >>> attribution.top(2).indices, attribution.bottom(1).values
    (tensor([[2, 0]]), tensor([[-1.]]))
    """

    def __init__(
        self,
        scores: Tensor | StoredScores | Extremes,
        info: AttributionInfo,
        spread: Spread | None = None,
        *,
        outputs: Tensor | None = None,
        kept: Kept | None = None,
        train: Examples | None = None,
        targets: Examples | None = None,
    ) -> None:
        self._scores = scores
        self._spread = spread
        self._outputs = outputs
        self._kept = kept
        self.info = info
        self.train = _described("train", train, info.n_train)
        self.targets = _described("targets", targets, info.n_targets)

    @property
    def scores(self) -> Tensor | StoredScores:
        """τ, (n, m): row i, column j says how much training example i raised the model output on target j.

        A tensor; or, beyond ``TRAKCallback(memory_limit=...)``, `StoredScores`: a matrix on disk, whose parts are
        tensors. Index it in the same way: ``scores[i, j]``, ``scores[i]``, ``scores[:, j]``.
        """
        if isinstance(self._scores, Extremes):
            kept = self._scores.top.indices.shape[1]
            raise AttributeError(
                f"Only the {kept} highest and lowest scores of each target were kept; .top(k) and .bottom(k) return"
                " them. For all scores call trainer.attribute(...) without top_k."
            )
        return self._scores

    @property
    def standard_error(self) -> Tensor:
        """The standard error of every score, (n, m): its standard deviation over checkpoints / √(their number).

        Checkpoints of one run are alike. So this tells how much scores would change with other checkpoints of the same
        run, not with another run. With ``estimator="trak"`` it leaves out the variation of Q, which is averaged over
        checkpoints separately.

        Of more than 16 million scores it is computed when it is first asked for, from the stored features. `save` saves
        it if it was.
        """
        return self._known_spread().standard_error

    def convergence(self, splits: int = 20, seed: int = 0) -> Convergence:
        """Are the checkpoints enough? Return how well two halves of them agree, for 2, 4, 6, ... checkpoints.

        Checkpoints are drawn at random and split into halves. Agreement is Spearman's rank correlation of the halves'
        scores over training examples, averaged over targets and splits. Once it stops rising, more checkpoints of the
        same kind will not help.

        Args:
            splits: the number of random splits for each number of checkpoints.
            seed: the seed of the splits.

        Returns:
            ``checkpoints``, even numbers, and ``agreement`` for each; ``.plot()`` draws them.
        """
        return convergence_of(self._known_spread().sample, splits, seed)

    def _known_spread(self) -> Spread:
        computable = len(self.info.checkpoints) > 1 and not isinstance(self._scores, Extremes)
        if self._spread is None and self._kept is not None and computable:
            self._spread = self._kept.spread()
        if self._spread is None:
            raise AttributeError(
                "How scores vary over checkpoints is known only where trainer.attribute(...) averaged over two"
                f" checkpoints or more, without top_k and calibrate; here are {len(self.info.checkpoints)}. Of more"
                " than 16 million scores it is saved only if attribution.standard_error was asked for before."
            )
        return self._spread

    @property
    def outputs(self) -> Tensor:
        """f of every target, (m,): at the last checkpoint of each run, averaged over runs.

        A checkpoint file that was passed with ``ckpt_path`` counts as a run.
        """
        if self._outputs is None:
            raise AttributeError("The outputs of the targets are not known. Call trainer.attribute(...) to get them.")
        return self._outputs

    @property
    def data_sets(self) -> tuple[Any, Any] | None:
        """Train set and targets as they were read, for `report` and `plot`; None for a train set that was not needed.

        None if this attribution was loaded, copied or calibrated: data sets are not saved with scores.
        """
        return None if self._kept is None else self._kept.data_sets

    def with_columns(
        self, train: Mapping[str, Iterable[Any]] | None = None, targets: Mapping[str, Iterable[Any]] | None = None
    ) -> Attribution:
        """Return the same attribution with ids, labels or other columns of training examples and targets.

        Args:
            train: values by name, one for each training example: text, numbers, True, False or None. The name ``"id"``
                sets the ids. Columns that are there already are replaced.
            targets: likewise, one for each target.

        Raises:
            TypeError: if an id or a value has another type.
            ValueError: if a column has another length.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> named = attribution.with_columns(train={"id": ["a", "b", "c"], "source": ["web", "web", "book"]})
        >>> named.train.ids, named.train.columns["source"][2]
        (('a', 'b', 'c'), 'book')
        """
        return self._with(train=self.train.with_columns(train or {}), targets=self.targets.with_columns(targets or {}))

    def _with(self, **changes: Any) -> Attribution:
        """Return another attribution, of which some arguments differ."""
        own = {"scores": self._scores, "info": self.info, "spread": self._spread, "outputs": self._outputs}
        return Attribution(**{**own, "kept": self._kept, "train": self.train, "targets": self.targets, **changes})

    def without(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Predict the outputs of the targets after training without a set of training examples.

        Examples that are alike stand in for each other: each of ten duplicates alone may have hardly any influence, and
        all ten together much. Sums of scores do not know that. This is a Newton step for the whole set, with the
        curvature of the rest. Koh, Ang, Teo and Liang, "On the accuracy of influence functions for measuring group
        effects", NeurIPS 2019, arXiv 1905.13289, Section 3.

        Take the checkpoints of all epochs: with the last one alone, or for whole classes that the model has memorised,
        changes are predicted to be larger than they are.

        Where gradients are whitened by the whole curvature, it is the sum of scores, times n / (n − |S|) for a set of
        |S| examples. By default these are the gradients of language models, labelled pixels and tags. See also
        `counterfactuals`, which trains without the examples.

        Args:
            indices: rows of the train set; or a mask, (n,), bool; or several masks, (s, n).

        Returns:
            Predicted outputs, (m,), comparable with `outputs`; (s, m) for several masks.

        Raises:
            AttributeError: if this attribution was loaded, copied or calibrated: it needs the features that `attribute`
                used.
            ValueError: if a row is not in the train set, or no training example is left.
        """
        kept = self._known_features("without")
        masks = masks_of(indices, self.info.n_train)
        sets = masks.reshape(-1, self.info.n_train)
        predicted = self.outputs + (kept.without(sets) if masks.any() else torch.zeros(len(sets), 1))
        return predicted if masks.ndim == 2 else predicted[0]

    def parts(self, i: int, j: int) -> SplitScore:
        """Split the score of training example i for target j: by layer, and by parts of both examples.

        Scores are linear in the gradients of both examples, and these are sums over layers. Where the model output is
        made of the losses of parts (tokens, pixels, tags, several numbers), they are sums over parts too: which tokens
        of the training example speak for which tokens of the target? The gradient of each part is computed again, at
        every checkpoint: as many backward passes as both examples have parts.

        In a language model, part t is the prediction of token t + 1.

        Args:
            i: the row of the training example.
            j: the column of the target.

        Returns:
            The score, what each layer adds to it, and what each pair of parts adds to it.

        Raises:
            AttributeError: if this attribution was loaded, copied or calibrated: it needs model and data.
            ValueError: if there is no such example, or it has changed since it was featurized.
        """
        kept = self._known_features("parts")
        if not (0 <= i < self.info.n_train and 0 <= j < self.info.n_targets):
            raise ValueError(
                f"i must be a row of the train set, 0 to {self.info.n_train - 1}, and j a target, 0 to"
                f" {self.info.n_targets - 1}; got {i} and {j}."
            )
        found = kept.split(i, j)
        if not isinstance(self._scores, Extremes):
            score, size = self._scores[i, j].item(), sum(map(abs, found.layers.values()))
            if not abs(found.score - score) <= 0.02 * size:
                raise ValueError(
                    f"The layers of the examples {i} and {j} add up to {found.score:.3g}, their score is {score:.3g}:"
                    " the data or model_output have changed since they were featurized, or one of them is random."
                )
        return found

    def _known_features(self, method: str) -> Kept:
        if self._kept is None:
            raise AttributeError(
                f"{method}(...) needs model, data and features, which are not saved with scores. Call {method}(...) on"
                " what trainer.attribute(...) returned."
            )
        return self._kept

    def calibrated(self, masks: Tensor, outputs: Tensor) -> Attribution:
        """Return scores that predict the outputs of retrained models; see `calibrate`, which checks its arguments."""
        info, scores = replace(self.info, calibrated_on=len(masks)), self.scores
        if self._kept is not None:
            calibrated = self._kept.calibrated(masks, outputs)
        else:
            predicted = predicted_outputs(scores, masks) / masks.float().mean(1, keepdim=True)
            calibrated = scores * fit_weights(predicted[None], outputs, torch.ones(1)).item()
        return self._with(scores=calibrated, info=info, spread=None, kept=None)

    def top(self, k: int = 5) -> Ranked:
        """Return the most helpful training examples of every target, the highest score first.

        Args:
            k: how many.

        Returns:
            ``indices`` (m, k) into the train set, and ``values`` (m, k), their scores.
        """
        return self._ranked(k, largest=True)

    def bottom(self, k: int = 5) -> Ranked:
        """Return the most harmful training examples of every target, the lowest score first; see `top`."""
        return self._ranked(k, largest=False)

    def to_pandas(self, *, wide: bool = False, k: int = 5) -> DataFrame:
        """Return scores as a DataFrame of pandas.

        The long form has a row for each target and each of its ``k`` most helpful training examples, whose scores are
        above zero, and of its ``k`` most harmful ones, below zero. Its columns are:

        - ``target_id``, ``target_row``: the target, by id and by column of the scores;
        - ``side``: ``"helpful"`` or ``"harmful"``; ``rank``: from 1, the most helpful or harmful;
        - ``train_id``, ``train_row``: the training example, by id and by row of the scores;
        - ``score``, and ``standard_error`` where it is known: of more than 16 million scores, once it was asked for;
        - ``target_output``: f of the target, where it is known;
        - the columns of `targets` and `train`, such as ``target_label``, ``target_prediction`` and ``train_label``.

        Args:
            wide: return all scores instead, (n, m), with ids as index and columns. Scores on disk are read into memory.
            k: how many on each side; all where there are fewer.

        Raises:
            ModuleNotFoundError: if pandas is not installed.
            ValueError: if ``k`` is not positive.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> attribution.with_columns(train={"id": ["a", "b", "c"]}).to_pandas()[["side", "rank", "train_id", "score"]]
              side  rank train_id  score
        0  helpful     1        c    2.0
        1  helpful     2        a    0.5
        2  harmful     1        b   -1.0
        """
        return wide_frame(self.scores, self.train, self.targets) if wide else long_frame(self.table(k))

    def to_csv(self, path: str | os.PathLike[str], *, k: int = 5) -> None:
        """Write the long form of `to_pandas` as CSV, in UTF-8. It needs no pandas.

        A spreadsheet would compute text that begins with "=", "+", "-", "@", a tab or a line break. Such text gets an
        apostrophe in front, unless it is a plain number. `to_parquet` leaves text as it is.

        Args:
            path: the file; it is replaced whole, and its folder is made if it is not there.
            k: how many on each side; all where there are fewer.

        >>> import tempfile
        >>> from pathlib import Path
        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     attribution.to_csv(Path(folder, "scores.csv"), k=1)
        ...     print(Path(folder, "scores.csv").read_text())
        "target_id","target_row","side","rank","train_id","train_row","score"
        0,0,"helpful",1,2,2,2.0
        0,0,"harmful",1,1,1,-1.0
        """
        write_csv(path, self.table(k))

    def to_parquet(self, path: str | os.PathLike[str], *, k: int = 5) -> None:
        """Write the long form of `to_pandas` as Parquet. It needs pyarrow, and no pandas; see `to_csv`.

        A column of both text and numbers becomes text.

        Raises:
            ModuleNotFoundError: if pyarrow is not installed.
        """
        write_parquet(path, self.table(k))

    def table(self, k: int = 5) -> Table:
        """Return the long form of `to_pandas` without pandas: its columns by name, lists or arrays of the same length.

        Args:
            k: how many on each side; all where there are fewer.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> attribution.table()["train_id"], attribution.table()["side"]
        ([2, 0, 1], ['helpful', 'helpful', 'harmful'])
        """
        extremes = self._extremes(self._at_most(k))
        errors = None if self._spread is None else self._spread.standard_error
        return long_table(extremes, self.train, self.targets, self._outputs, errors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all scores, (n, m), for ``np.asarray(attribution)``.

        The array shares the memory of a tensor. Scores on disk are read into memory, 4 n m bytes.

        Raises:
            MemoryError: if these are more than are free.
            AttributeError: if only extremes were kept.
        """
        scores = self.scores
        array = scores.numpy() if isinstance(scores, Tensor) else scores.__array__(copy=copy)
        return array if dtype is None and not copy else np.array(array, dtype, copy=copy)

    def by_id(
        self,
        train: str | int | Sequence[str | int] | None = None,
        targets: str | int | Sequence[str | int] | None = None,
    ) -> Tensor:
        """Return scores by the ids of training examples and targets, never by rows: these index `scores`.

        Args:
            train: an id, or several; None for all training examples.
            targets: likewise.

        Returns:
            The scores, (train, targets), in the order of the ids; without the axis of a single id.

        Raises:
            ValueError: if no example has an id, or several have it.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> attribution.with_columns(train={"id": [30, 10, 20]}).by_id(train=[10, 30], targets=0)
        tensor([-1.0000,  0.5000])
        """
        rows, columns = _places(self.train, train), _places(self.targets, targets)
        if isinstance(rows, list):
            return self.scores[rows][:, columns]
        return self.scores[rows, columns]

    def keep(
        self, train_set: Any, rows: Sequence[int] | Tensor | None = None, *, ids: Sequence[str | int] | None = None
    ) -> Subset[Any]:
        """Return the chosen training examples alone, for the next training; see `remove` for arguments and errors.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> list(attribution.keep(["first", "second", "third"], attribution.scores[:, 0] > 0))
        ['first', 'third']
        """
        return kept_subset(train_set, self.train, rows, ids)

    def remove(
        self, train_set: Any, rows: Sequence[int] | Tensor | None = None, *, ids: Sequence[str | int] | None = None
    ) -> Subset[Any]:
        """Return the train set without some examples, for the next training.

        The order stays, and an example that is named twice counts once.

        Args:
            train_set: the data set that was attributed.
            rows: which training examples, by row; or a mask, (n,), bool.
            ids: which training examples, by id, in place of ``rows``.

        Returns:
            A part of ``train_set``; its ``indices`` are the rows that are left.

        Raises:
            TypeError: if ``train_set`` is no data set, or not one of ``rows`` and ``ids`` is given.
            ValueError: if the train set has another length, or tells ids in another order; if there is no such
                example, or none is left.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> harmful = attribution.bottom(1).indices.flatten()
        >>> subset = attribution.remove(["first", "second", "third"], harmful)
        >>> list(subset), subset.indices
        (['first', 'third'], [0, 2])
        """
        return kept_subset(train_set, self.train, rows, ids, remove=True)

    def plot(
        self,
        train: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        columns: Sequence[int] | None = None,
        k: int = 5,
        marked: Any = None,
        ax: Any = None,
    ) -> tuple[Figure, Any]:
        """Draw targets beside their k most helpful and k most harmful training examples.

        Examples are drawn for what they are: images, with class maps in colours; texts and tokens; the columns of a
        table that differ most from the target; series as curves; and pairs of these. ``report`` draws the same kinds.
        Ids and labels are those of `train` and `targets`, or else labels are read from the examples.

        Only positive scores are helpful, and only negative ones harmful. Where fewer than k are, places stay empty.

        Args:
            train: the train set: n examples, in the order of the scores. Without it, scores are drawn as bars.
            targets: the target set, m examples.
            columns: the targets to draw, by index; the first five if None.
            k: how many helpful and how many harmful training examples; all where there are fewer.
            marked: training examples that get a thick frame, such as known mislabels: rows, a mask (n,), or ids that
                are text.
            ax: where to draw: one Axes of matplotlib, which is divided, or an array of Axes as it is returned. Bars of
                several targets need an array. None for a new figure.

        Returns:
            The figure, and its axes as a NumPy array: (targets, 1 + 2k) with examples, (targets,) with bars.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            TypeError: if a data set is no sequence, or ``ax`` is no Axes.
            ValueError: if there is no such target or training example, a data set or ``ax`` has another shape, or
                scores are not finite.

        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> figure, axes = attribution.plot(["a cat", "a dog", "two cats"], ["my cat"], k=2)
        >>> [axis.get_title() for axis in axes[0]]
        ['target 0', '+2.00', '+0.500', '−1.00', '']
        >>> import matplotlib.pyplot as plt
        >>> plt.close(figure)
        """
        with kept_random_states():  # data sets may augment at random
            known, data = (self.train, self.targets), (train, targets)
            return plot_extremes(self._extremes(self._at_most(k)), known, data, columns, marked, ax)

    def report(
        self,
        path: str | os.PathLike[str] | RemotePath,
        train: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        render: Callable[[Any], Any] | None = None,
        suspects: Any = None,
        evaluation: Any = None,
        title: str | None = None,
        k: int = 5,
    ) -> Path:
        """Write a report that anyone can open: one HTML file, which needs no network and no server.

        It shows every target with its example, label, prediction and output, and the training examples that helped and
        harmed it most; the training examples to look at; and how far scores can be relied on. Targets can be searched,
        sorted and filtered. Whatever the data contain is shown as text.

        Examples are drawn for what they are: images, with classes of pixels as colours; texts; tokens; rows of tables,
        whose values that differ most from the target are marked; series as curves; and tuples and mappings of these.
        Labels are those of the column ``"label"``, or else the examples' own: y of a pair ``(x, y)``, or what a mapping
        has as "label", "labels" or "y". Images are made smaller, the more of them there are.

        Args:
            path: the file, which ends in ``.html``. A file that is there is replaced.
            train: the train set, in the order in which it was attributed; of it, only what is shown is read. Without
                it, training examples are shown by id and label.
            targets: the target set, likewise.
            render: draws an example itself, for example by decoding its tokens. It returns text, a list of tokens, an
                image, a mapping of numbers, a tuple of these, or a figure of matplotlib. HTML is shown as text.
            suspects: training examples to look at, the most suspicious first: an object with ``to_rows()``, a sequence
                of mappings with "row" or "id" and whatever else is to be shown, or what ``trainer.attribute_self()``
                returned. The first 500 are shown.
            evaluation: what `evaluate` returned, to show how well the scores predict retraining.
            title: of the report.
            k: how many helpful and how many harmful training examples of each target, at most.

        Returns:
            The path of the file.

        Raises:
            TypeError: if an argument has another type, or ``render`` returns something else.
            ValueError: if ``path`` does not end in ``.html``, a data set has another length than was attributed, or
                scores are not finite.

        >>> import tempfile
        >>> info = AttributionInfo(3, 1, ("a1b2",), "sparse", 2048, 0.3, True)
        >>> attribution = Attribution(torch.tensor([[0.5], [-1.0], [2.0]]), info)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = attribution.report(f"{folder}/report.html", train=["a cat", "a dog", "two cats"])
        ...     "two cats" in file.read_text(encoding="utf-8")
        True
        """
        with kept_random_states():  # data sets may augment at random
            return write_report(
                path,
                self._known(k),
                train,
                targets,
                render=render,
                suspects=suspects,
                evaluation=evaluation,
                title=title,
            )

    def _repr_html_(self) -> str:
        """Return a small table for notebooks; it needs no data, computes nothing that takes long, and has no script."""
        few, k = min(_NOTEBOOK[0], self.info.n_targets), min(_NOTEBOOK[1], self._most())
        if isinstance(self._scores, StoredScores):  # whatever part is asked for, all of them would be read
            few = 0
        if isinstance(self._scores, Extremes):
            sides = self._scores.top, self._scores.bottom
            top, bottom = (Ranked(side.indices[:few, :k], side.values[:few, :k]) for side in sides)
        else:
            columns = self._scores[:, :few].T if few else torch.zeros(0, self.info.n_train)
            top, bottom = (rank(columns, k, largest) for largest in (True, False))
        return notebook_page(Known(asdict(self.info), top, bottom, None, self._outputs, self.train, self.targets))

    def _known(self, k: int) -> Known:
        """Return what reports show; nothing that takes long to compute."""
        extremes, spread = self._extremes(self._at_most(k)), self._spread  # not one that would have to be computed
        top, bottom = extremes.top, extremes.bottom
        error = None if spread is None else spread.standard_error
        return Known(
            asdict(self.info),
            top,
            bottom,
            None if error is None else (scores_at(error, top.indices), scores_at(error, bottom.indices)),
            self._outputs,
            self.train,
            self.targets,
            None if spread is None else convergence_of(spread.sample[:, :, evenly_spaced(self.info.n_targets, _CURVE)]),
            partial=isinstance(self._scores, Extremes),
        )

    def save(self, path: str | os.PathLike[str] | RemotePath) -> None:
        """Write the attribution into the directory ``path``.

        An earlier attribution there is replaced in one step. Whatever else is in the directory stays.

        Raises:
            FileExistsError: if ``path`` exists, is not empty, and has no saved attribution.
            OSError: if it cannot be written, as a URL cannot.
        """
        sides = {"train": self.train, "targets": self.targets}
        tables = {side: examples.saved() for side, examples in sides.items() if not examples.unknown}
        write_saved(writable(path_of(path)), Saved(asdict(self.info), self._arrays(), self.on_disk, tables))

    @classmethod
    def load(cls, path: str | os.PathLike[str] | RemotePath) -> Attribution:
        """Read an attribution that `save` wrote, also by a URL such as ``"s3://bucket/store/scores/name"``.

        Raises:
            FileNotFoundError: if there is none in ``path``.
            ValueError: if it is damaged.
        """
        folder = path_of(path)
        check_saved(folder)
        try:
            fields, arrays, stored, tables = read_saved(folder)
            info = AttributionInfo.loaded(fields)
            known: dict[str, Any] = {side: Examples(**table) for side, table in tables.items()}
            known["outputs"] = arrays.get("outputs")
            if "top" in arrays:
                sides = [Ranked(arrays[side], arrays[f"{side}_values"]) for side in ("top", "bottom")]
                return cls(Extremes(*sides), info, **known)
            found: dict[str, Any] = {**arrays, **stored}
            spread = Spread(found["standard_error"], found["sample"]) if "sample" in found else None
            return cls(found["scores"], info, spread, **known)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError) as error:
            raise ValueError(f"The attribution in '{path}' is damaged: {error}. Compute it again.") from error

    def _arrays(self) -> dict[str, Tensor]:
        """Return all that is saved and in memory, by name."""
        known = {} if self._outputs is None else {"outputs": self._outputs}
        if not isinstance(self._scores, Extremes):
            return known | {name: part for name, part in self._parts().items() if isinstance(part, Tensor)}
        for side, ranked in (("top", self._scores.top), ("bottom", self._scores.bottom)):
            known |= {side: ranked.indices, f"{side}_values": ranked.values}
        return known

    @property
    def on_disk(self) -> dict[str, StoredScores]:
        """The scores and standard errors that are not in memory, by name."""
        return {name: part for name, part in self._parts().items() if isinstance(part, StoredScores)}

    def _parts(self) -> dict[str, Any]:
        """Return scores and how they vary, by name, in memory or on disk."""
        return {"scores": self._scores} | ({} if self._spread is None else vars(self._spread))

    def _ranked(self, k: int, *, largest: bool) -> Ranked:
        self._check_ranks(k)
        if isinstance(self._scores, Tensor):
            return rank(self._scores.T, k, largest)
        extremes = self._extremes(k)
        return extremes.top if largest else extremes.bottom

    def _extremes(self, k: int) -> Extremes:
        """Return the highest and the lowest k scores of each target; scores on disk are read once."""
        if isinstance(self._scores, Extremes):
            sides = self._scores.top, self._scores.bottom
            return Extremes(*(Ranked(side.indices[:, :k], side.values[:, :k]) for side in sides))
        if isinstance(self._scores, StoredScores):
            return extremes_of(self._scores.blocks(), k)
        return Extremes(*(rank(self._scores.T, k, largest) for largest in (True, False)))

    def _check_ranks(self, k: int) -> None:
        if not 1 <= k <= self._most():
            few = isinstance(self._scores, Extremes)
            why = "kept by trainer.attribute(top_k=...)" if few else "in the train set"
            raise ValueError(f"k must be between 1 and {self._most()}, the number of examples {why}; got {k}.")

    def _at_most(self, k: int) -> int:
        """Return k, or the number of all that can be ranked if there are fewer."""
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a positive integer, got {k!r}.")
        return min(k, self._most())

    def _most(self) -> int:
        """Return how many training examples can be ranked for each target."""
        return self._scores.top.indices.shape[1] if isinstance(self._scores, Extremes) else self.info.n_train

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled: the way to the features."""
        return {**vars(self), "_kept": None}

    @property
    def status(self) -> str:
        """What was averaged over and, where it is known without work, whether that was enough: one line."""
        info = self.info
        return status_of(
            len(info.checkpoints),
            info.runs,
            (info.n_attributed, info.n_params),
            info.gradients,
            info.dampings,
            info.damping_rules,
            None if self._spread is None else self._agreement,
            whitened=info.preconditioner is not None,
        )

    @cached_property  # it takes half a second
    def _agreement(self) -> float | None:
        """How well two halves of the checkpoints agree; asked for only where the spread is known."""
        return None if self._spread is None else agreement_of_all(self._spread.sample)

    def __repr__(self) -> str:
        """Say in one line what it is of, and its `status`."""
        n, m = count(self.info.n_train, "training example"), count(self.info.n_targets, "target")
        return f"Attribution of {n} for {m}: {self.status}"


def _described(side: str, examples: Examples | None, size: int) -> Examples:
    """Return what is known of examples; by default their row numbers."""
    if examples is not None and len(examples) != size:
        raise ValueError(f"{side} describes {len(examples)} examples, and the scores are of {size}.")
    return Examples(size) if examples is None else examples


def _places(examples: Examples, ids: Any) -> Any:
    """Return the row of an id, those of several ids, or a slice of all rows."""
    if ids is None:
        return slice(None)
    single = isinstance(plain(ids), (str, int))
    return examples.rows_of([ids])[0] if single else examples.rows_of(ids)
