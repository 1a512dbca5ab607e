"""Suspects: training examples that someone should look at, and what is wrong with each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from lightning_trak.influence import Findings
from lightning_trak.results.examples import Examples, Value
from lightning_trak.results.export import write_export
from lightning_trak.results.numbers import terminal_number
from lightning_trak.results.plots.curves import plot_self_influence
from lightning_trak.results.subsets import rows_of
from lightning_trak.results.tables import imported, write_csv
from lightning_trak.results.terminal import cell_text, table
from lightning_trak.store.remote import RemotePath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 10  # rows of a printed table


@dataclass(frozen=True)
class Suspect:
    """A training example, and what is wrong with it.

    Attributes:
        row: in the train set.
        id: of the example.
        label: as the data set tells it; None if it tells none.
        prediction: of the last checkpoint; None where the task knows none.
        loss: the training loss: half of the last checkpoint's, and half of the average over checkpoints.
        self_influence: by how much training on it lowers its own loss, see `attribute_self`.
        duplicate_of: the id of an earlier training example that is nearly the same.
        similarity: the cosine with the nearest earlier training example; None for the first.
        leaks: the id of a target that is nearly the same.
        leak_similarity: the cosine with the nearest target; None without targets.
        harm: how much training on it worsened the outputs of the targets, on average; None without targets.
        wrong: what is wrong with it, in words; empty if nothing is.
    """

    row: int
    id: str | int
    label: Value
    prediction: Value
    loss: float
    self_influence: float
    duplicate_of: str | int | None
    similarity: float | None
    leaks: str | int | None
    leak_similarity: float | None
    harm: float | None
    wrong: tuple[str, ...]


class Suspects:
    """Training examples, ranked: first those with something wrong, then the others, each part by its loss.

    What is wrong is "probably mislabelled", "near-duplicate of ...", "leaks target ..." or "harmful on average"; see
    `trainer.suspects` for the limits. Of a near-duplicate the later example is named, so removing all of them leaves
    one of each. A sequence: ``suspects[0]`` is a `Suspect`, and ``suspects[:20]`` are `Suspects`.

    Args:
        findings: what is known of the n training examples.
        train: their ids and columns.
        targets: the ids of the targets, if there are any.
        order: rows of the train set; by default all, as ranked by `Findings.order`.

    Attributes:
        indices: the rows in the train set, as ranked.

    >>> from lightning_trak.influence.suspicion import findings
    >>> near = torch.tensor([-1, 0, 0]), torch.tensor([-1.0, 0.5, 0.99])
    >>> found = findings(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0.1, 0.4, 0.0]), near)
    >>> suspects = Suspects(found, Examples(["a.png", "b.png", "c.png"], {"label": [1, 0, 1]}))
    >>> suspects.wrong
    Suspects: 1 of 3 training examples, 1 near-duplicate
     row  id     label   loss  self-influence  what is wrong
       2  c.png  1      0.200               0  near-duplicate of 'a.png' (cosine 0.990)
    >>> suspects.indices, suspects[0].duplicate_of
    (tensor([2, 1, 0]), 'a.png')
    """

    def __init__(
        self, findings: Findings, train: Examples, targets: Examples | None = None, order: Tensor | None = None
    ) -> None:
        n = len(findings.loss)
        if len(train) != n:
            raise ValueError(f"train has {len(train)} examples, and findings are of {n}. Give those of the same set.")
        self.findings, self.train, self.targets = findings, train, targets
        self.indices = findings.order() if order is None else order

    @property
    def wrong(self) -> Suspects:
        """Those with something wrong."""
        return self._of(self.findings.wrong)

    @property
    def mislabelled(self) -> Suspects:
        """Those that are probably mislabelled."""
        return self._of(self.findings.mislabelled)

    @property
    def duplicates(self) -> Suspects:
        """Those that are near-duplicates of an earlier training example."""
        return self._of(self.findings.duplicate_of >= 0)

    @property
    def leaks(self) -> Suspects:
        """Those that are near-duplicates of a target."""
        return self._of(self.findings.leaks >= 0)

    @property
    def harmful(self) -> Suspects:
        """Those that are harmful on average over the targets."""
        return self._of(self.findings.harmful)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a dictionary of plain values for each example, as ranked; ``"wrong"`` is text, empty for none.

        Further columns of the train set are appended.
        """
        rows = []
        for suspect in self:
            own = {**asdict(suspect), "wrong": "; ".join(suspect.wrong)}
            known = {name: values[suspect.row] for name, values in self.train.columns.items()}
            rows.append(own | {name: value for name, value in known.items() if name not in own})
        return rows

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table of `to_rows` as CSV, in UTF-8; text is written as by `Attribution.to_csv`.

        Args:
            path: the file; it is replaced whole, and its folder is made if it is not there.
        """
        rows = self.to_rows()
        names = rows[0] if rows else Suspect.__dataclass_fields__
        write_csv(path, {name: [row[name] for row in rows] for name in names})

    def to_pandas(self) -> Any:
        """Return the table of `to_rows` as a data frame.

        Raises:
            ModuleNotFoundError: if pandas is not installed.
        """
        pd, rows = imported("pandas"), self.to_rows()
        frame = pd.DataFrame(rows, columns=list(rows[0] if rows else Suspect.__dataclass_fields__))
        for name in ("id", "duplicate_of", "leaks"):  # pandas would make floats of integers beside None
            frame[name] = pd.Series([row[name] for row in rows], dtype=object)
        return frame

    def export(self, path: str | os.PathLike[str] | RemotePath, train: Sequence[Any]) -> Path:
        """Write a folder that Hugging Face datasets, Renumics Spotlight and FiftyOne open: a table, and the images.

        ``metadata.csv`` has the columns of `to_rows`, in its order, and what else the examples hold: texts, tokens,
        columns of tables, series as lists. Images are PNG files in their own size, with classes of pixels in colours;
        the column "file_name" has their paths within the folder. This is the format ``ImageFolder`` of Hugging Face
        datasets. Labels that the columns do not tell are read from the examples. A name that is taken gets a number.

        Args:
            path: a new folder, or an empty one. It appears when it is whole.
            train: the train set, in the order in which it was attributed; of it, only these suspects are read.

        Returns:
            The path of the folder.

        Raises:
            FileExistsError: if there is something at ``path``, and it is no empty folder.
            TypeError: if ``train`` is no data set.
            ValueError: if it has another length than was attributed.

        >>> import tempfile
        >>> from lightning_trak.influence.suspicion import findings
        >>> near = torch.tensor([-1, 0]), torch.tensor([-1.0, 0.5])
        >>> suspects = Suspects(findings(torch.tensor([0.1, 0.3]), torch.tensor([0.1, 0.4]), near), Examples(2))
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = suspects[:1].export(f"{parent}/suspects", [(torch.rand(1, 8, 8), 7), (torch.rand(1, 8, 8), 3)])
        ...     (folder / "metadata.csv").read_text()[:40]
        '"file_name","row","id","label","predicti'
        """
        return write_export(path, self.to_rows(), train, len(self.train))

    def plot(self, marked: Any = None, ax: Any = None) -> tuple[Figure, Axes]:
        """Draw the self-influence of all training examples, the highest first, and some of them as dots.

        Args:
            marked: these are dots, such as mislabels that were planted: rows, a mask (n,), or ids that are text. By
                default those in this sequence with something wrong.
            ax: Axes of matplotlib to draw into; None for a new figure.

        Returns:
            The figure and its Axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            TypeError: if ``ax`` is no Axes.
            ValueError: if there is no such training example.
        """
        rows = self.wrong.indices.tolist() if marked is None else rows_of(marked, self.train, "marked")
        name = "something wrong" if marked is None else "marked"
        return plot_self_influence(self.findings.self_influence, rows, name, ax)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Suspect]:
        return map(self._suspect, self.indices.tolist())

    @overload
    def __getitem__(self, places: int) -> Suspect: ...
    @overload
    def __getitem__(self, places: slice) -> Suspects: ...
    def __getitem__(self, places: int | slice) -> Suspect | Suspects:
        if isinstance(places, slice):
            rows = self.indices.tolist()[places]
            return Suspects(self.findings, self.train, self.targets, torch.tensor(rows, dtype=torch.long))
        return self._suspect(int(self.indices[places]))

    def __repr__(self) -> str:
        head = f"Suspects: {len(self)} of {len(self.train)} training examples{self._counts()}"
        suspects = list(self[:_SHOWN])
        rows = [["row", "id", "label", "prediction", "loss", "self-influence", "what is wrong"]]
        for one in suspects:
            names = [cell_text(one.id), cell_text(one.label), cell_text(one.prediction)]
            numbers = [terminal_number(one.loss), terminal_number(one.self_influence)]
            rows.append([str(one.row), *names, *numbers, "; ".join(one.wrong)])
        columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
        lines = table(list(zip(*columns, strict=True)), right="row loss self-influence").splitlines()
        rest = [f"... and {len(self) - len(suspects)} more"] if len(self) > len(suspects) else []
        return "\n".join([head, *(f" {line}" for line in lines), *rest])

    def _counts(self) -> str:
        """Say how many have what wrong."""
        found = [
            (len(self.mislabelled), "probably mislabelled", "probably mislabelled"),
            (len(self.duplicates), "near-duplicate", "near-duplicates"),
            (len(self.leaks), "near-duplicate of a target", "near-duplicates of a target"),
            (len(self.harmful), "harmful on average", "harmful on average"),
        ]
        told = [f"{count} {one if count == 1 else several}" for count, one, several in found if count]
        return f", {', '.join(told)}" if told else ", nothing wrong was found"

    def _of(self, which: Tensor) -> Suspects:
        return Suspects(self.findings, self.train, self.targets, self.indices[which[self.indices]])

    def _suspect(self, row: int) -> Suspect:
        found, columns = self.findings, self.train.columns
        duplicate, leak = int(found.duplicate_of[row]), int(found.leaks[row])
        same, leak_same = found.similarity[row].item(), found.leak_similarity[row].item()
        twin = None if duplicate < 0 else self.train.ids[duplicate]
        target = None if leak < 0 else leak if self.targets is None else self.targets.ids[leak]
        harm = None if found.harm is None else found.harm[row].item()
        wrong = [
            (bool(found.mislabelled[row]), "probably mislabelled"),
            (duplicate >= 0, f"near-duplicate of {twin!r} (cosine {same:.3f})"),
            (leak >= 0, f"leaks target {target!r} (cosine {leak_same:.3f})"),
            (bool(found.harmful[row]), "harmful on average"),
        ]
        return Suspect(
            row=row,
            id=self.train.ids[row],
            label=columns["label"][row] if "label" in columns else None,
            prediction=columns["prediction"][row] if "prediction" in columns else None,
            loss=found.loss[row].item(),
            self_influence=found.self_influence[row].item(),
            duplicate_of=twin,
            similarity=same if row else None,
            leaks=target,
            leak_similarity=None if harm is None else leak_same,
            harm=harm,
            wrong=tuple(words for true, words in wrong if true),
        )
