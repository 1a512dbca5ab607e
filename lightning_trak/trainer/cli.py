"""TRAKCLI: the command line of Lightning, with subcommands that attribute."""

from __future__ import annotations

import os
import shlex
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import Tensor

from lightning_trak.results.attribution import Attribution
from lightning_trak.results.numbers import terminal_number
from lightning_trak.results.ranking import target_texts
from lightning_trak.results.report.page import check_html
from lightning_trak.results.suspects import Suspects
from lightning_trak.results.tables import write_csv
from lightning_trak.results.terminal import printable, table
from lightning_trak.trainer.callback import TRAKCallback, find_callback
from lightning_trak.trainer.host.framework import LightningDataModule, LightningModule, Trainer, framework_of

_OWN = ("attribute", "attribute_self", "suspects")
_TARGETS = 5  # that are printed
_MISSING = """The Trainer has no TRAKCallback. Add these lines to the YAML file, and pass the same file to fit:

trainer:
  callbacks:
    - {class_path: lightning_trak.TRAKCallback, init_args: {dirpath: attributions}}
"""


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration under the first free name of ``config.yaml``, ``config-1.yaml``, ``config-2.yaml``, ...

    Lightning's stops if ``config.yaml`` is there, as it is after ``fit`` without a logger.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the name of the file, then save as Lightning does."""
        folder = trainer.log_dir  # in all processes, since it broadcasts
        if self.save_to_log_dir and not self.overwrite and not self.already_saved and folder is not None:
            exists, (stem, ending) = get_filesystem(folder).exists, os.path.splitext(self.config_filename)
            names = chain([self.config_filename], (f"{stem}-{number}{ending}" for number in count(1)))
            free = next(name for name in names if not exists(os.path.join(folder, name)))
            self.config_filename = trainer.strategy.broadcast(free)
        super().setup(trainer, pl_module, stage)


class TRAKCLI(LightningCLI):
    """``LightningCLI`` with the subcommands ``attribute``, ``attribute_self`` and ``suspects``, from the same YAML.

    It takes the arguments of ``LightningCLI``, which needs ``pip install "lightning-trak[cli]"``. Let ``main.py`` be::

        from lightning_trak import TRAKCLI

        if __name__ == "__main__":
            TRAKCLI(LitModel, Data)

    The callback is one of the trainer's, as in a program, so that ``fit`` and ``attribute`` have the same settings::

        seed_everything: 0
        trainer:
          max_epochs: 3
          callbacks:
            - class_path: lightning_trak.TRAKCallback
              init_args: {dirpath: attributions}

    Then ``python main.py fit -c trak.yaml`` trains. ``python main.py attribute -c trak.yaml --name first`` scores the
    targets of the datamodule, prints some, and saves the scores in the store. Each subcommand is a new process. So fix
    ``seed_everything`` if ``setup`` splits the data at random. ``fit`` and other subcommands of Lightning save the
    configuration as ``config.yaml``, or ``config-1.yaml`` where that is taken; those of this class save none.

    To use what they return, override the method of that name, and call ``super()``.

    >>> list(TRAKCLI.subcommands())
    ['fit', 'validate', 'test', 'predict', 'attribute', 'attribute_self', 'suspects']
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, and the arguments of each that are no options."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _OWN}}

    def attribute(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: list[str] | str | None = None,
        name: str | None = None,
        top_k: int | None = None,
        dry_run: bool = False,
        k: int = 5,
        csv: str | None = None,
        report: str | None = None,
    ) -> Any:
        """Print, and save, how much every training example raised the model output on every target.

        Args:
            model: the model.
            datamodule: supplies the targets by attribute_dataloader(), predict_dataloader() or test_dataloader(), the
                first that it or the model defines.
            ckpt_path: the checkpoints to average over: null for all in the store, "last" for the last one, a file, or a
                list of files such as '[a.ckpt, b.ckpt]'. Files that have no features yet are featurized first.
            name: save the scores in the store under this name, for "python -m lightning_trak top" and "report", and for
                Attribution.load. Earlier scores of this name are replaced.
            top_k: keep only so many of the highest and of the lowest scores of each target, not all. Take it where
                all scores would fill the disk.
            dry_run: compute nothing, but print the time, disk and memory that each stage would take.
            k: print so many helpful and so many harmful training examples of each target, at most. It holds for csv and
                report, too.
            csv: write a table with the helpful and harmful training examples of all targets to this file.
            report: write a report with drawn examples to this file, which ends in .html.

        Returns:
            What ``trainer.attribute`` returned.
        """
        self._check(csv, report, k=k)
        if report is not None:
            check_html("report", report)
        options: dict[str, Any] = {"name": name, "top_k": top_k, "dry_run": dry_run}
        found = self._trainer.attribute(model, datamodule=datamodule, ckpt_path=ckpt_path, **options)
        if not self.trainer.is_global_zero:
            return found
        if dry_run:
            print(found)
            return found
        self._print(found, name, k)
        if csv is not None:
            found.to_csv(csv, k=k)
            print(f"The table is in '{csv}'.")
        if report is not None:
            found.report(report, *(found.data_sets or ()), k=k)
            print(f"The report is in '{report}'.")
        return found

    def attribute_self(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: list[str] | str | None = None,
        k: int = 10,
        csv: str | None = None,
    ) -> Tensor:
        """Print the training examples whose self-influence is highest; "suspects" also says what is wrong with them.

        Args:
            model: the model.
            datamodule: supplies the train set.
            ckpt_path: as for "attribute".
            k: print so many training examples.
            csv: write the self-influence of all training examples to this file, in the order of the train set.

        Returns:
            What ``trainer.attribute_self`` returned.
        """
        self._check(csv, k=k)
        found: Tensor = self._trainer.attribute_self(model, datamodule=datamodule, ckpt_path=ckpt_path)
        if self.trainer.is_global_zero:
            highest = found.topk(min(k, len(found)))
            pairs = zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
            rows = [(str(row), terminal_number(value)) for row, value in pairs]
            print(f"The highest self-influences of {len(found)} training examples:")
            print(table([("row", "self-influence"), *rows], right="row self-influence"))
            if csv is not None:
                write_csv(csv, {"train_row": torch.arange(len(found)).numpy(), "self_influence": found.numpy()})
                print(f"All of them are in '{csv}'.")
        return found

    def suspects(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: list[str] | str | None = None,
        targets: bool = False,
        csv: str | None = None,
    ) -> Suspects:
        """Print the training examples that someone should look at, and what is wrong with each.

        Args:
            model: the model.
            datamodule: supplies the train set, and the targets.
            ckpt_path: as for "attribute".
            targets: also compare the train set with the targets of "attribute": which training examples leak one of
                them, or harm them?
            csv: write all training examples, the most suspicious first, to this file.

        Returns:
            What ``trainer.suspects`` returned.
        """
        self._check(csv)
        found: Suspects = self._trainer.suspects(model, datamodule=datamodule, ckpt_path=ckpt_path, targets=targets)
        if self.trainer.is_global_zero:
            print(found)
            if csv is not None:
                found.to_csv(csv)
                print(f"All training examples are in '{csv}'.")
        return found

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of trainer, model and data.

        Raises:
            TypeError: if one of the classes is of ``pytorch_lightning``.
        """
        for argument in ("model_class", "datamodule_class", "trainer_class"):
            kind = getattr(self, argument)
            if any(base.__module__.split(".")[0] == "pytorch_lightning" for base in getattr(kind, "__mro__", ())):
                raise TypeError(
                    f"{argument} must be of lightning.pytorch, as TRAKCLI is, got {kind.__name__} of pytorch_lightning."
                    " Derive it from lightning.pytorch, or call trainer.attribute(...) in a program."
                )
        super().add_core_arguments_to_parser(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; an earlier configuration in its folder is neither an error nor replaced."""
        if self.save_config_callback is SaveConfigCallback:
            self.save_config_callback = _SaveConfig
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Take the options of the own subcommands from the methods above: they print, and name files."""
        return super()._prepare_subcommand_parser(type(self) if subcommand in _OWN else klass, subcommand, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters from a checkpoint file, as for ``test``; of several, none could be preferred."""
        subcommand = self.config.get("subcommand")
        if not (subcommand and isinstance(self.config[subcommand].get("ckpt_path"), list)):
            super()._parse_ckpt_path()

    @property
    def _trainer(self) -> Any:
        """The trainer, whose methods are registered by the package."""
        return self.trainer

    def _check(self, *files: str | None, k: int = 1) -> None:
        """Check what would fail after a long wait, such as files that cannot be written."""
        for file in filter(None, files):
            there = next(folder for folder in Path(file).absolute().parents if folder.exists())  # the others are made
            if Path(file).is_dir() or not (there.is_dir() and os.access(there, os.W_OK)):
                raise OSError(f"'{file}' cannot be written. Name a file in a folder that you may write to.")
        if k < 1:
            raise ValueError(f"k must be a positive integer, got {k}.")
        if not any(isinstance(callback, TRAKCallback) for callback in self._trainer.callbacks):
            raise framework_of(self.trainer).MisconfigurationException(_MISSING)

    def _print(self, attribution: Attribution, name: str | None, k: int) -> None:
        """Print the first targets, and how to see the others."""
        m = attribution.info.n_targets
        print(attribution)
        for text in target_texts(attribution, range(min(m, _TARGETS)), k):
            print(f"\n{text}")
        more = f"{m - _TARGETS} more targets. " if m > _TARGETS else ""
        if name is None:
            print(f"\n{more}The scores are not saved; '--name NAME' saves them in the store.")
        else:
            store, shown = find_callback(self.trainer).store_path(self.trainer), printable(shlex.quote(name))
            print(f"\n{more}All are shown by:\npython -m lightning_trak top {shlex.quote(str(store))} --name {shown}")
