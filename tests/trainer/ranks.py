"""A program that trains and attributes in several processes: ``python -m tests.trainer.ranks FOLDER STRATEGY WORLD``.

WORLD is the number of processes, or nodes x processes of each. Given checkpoint files after that, it attributes them
without training. The first process writes the scores.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_trak import TRAKCallback
from tests.conftest import Blobs, Classifier

N, M = int(os.environ.get("N_TRAIN", "23")), int(os.environ.get("N_TARGETS", "5"))
BUDGET = float(os.environ["BUDGET"]) if "BUDGET" in os.environ else None


class OwnSampler(Blobs):
    """The user's own sampler pads the train set, so that each process has as many examples."""

    def train_dataloader(self):
        sampler = DistributedSampler(
            self.train_set, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank
        )
        return DataLoader(self.train_set, 4, sampler=sampler)


def main() -> None:
    """Run the program."""
    folder, strategy, world, *files = sys.argv[1:]
    nodes, _, devices = world.rpartition("x")
    warnings.simplefilter("ignore")
    callbacks = [TRAKCallback(Path(folder) / "store", budget=BUDGET)]
    if not files:
        callbacks.append(ModelCheckpoint(Path(folder) / "files", save_top_k=-1, save_weights_only=strategy == "ddp"))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(devices),
        num_nodes=int(nodes or 1),
        strategy=strategy if world != "1" else "auto",
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=not files,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=strategy == "ddp",
    )
    data = Blobs(N, M) if strategy == "ddp" or world == "1" else OwnSampler(N, M)
    module = Classifier()
    if not files:
        trainer.fit(module, datamodule=data)
    attribution = trainer.attribute(module, datamodule=data, ckpt_path=files or None, name="kept")
    few = trainer.attribute(module, datamodule=data, ckpt_path=files or None, top_k=2)
    (Path(folder) / f"top-{trainer.global_rank}.json").write_text(json.dumps(few.top(2).indices.tolist()))
    own = trainer.attribute_self(module, datamodule=data, ckpt_path=files or None)
    columns = {name: list(column) for name, column in attribution.targets.columns.items()}
    (Path(folder) / f"targets-{trainer.global_rank}.json").write_text(json.dumps(columns))
    suspects = trainer.suspects(module, datamodule=data, ckpt_path=files or None, targets=True)
    (Path(folder) / f"suspects-{trainer.global_rank}.json").write_text(json.dumps(suspects.to_rows()))
    if trainer.is_global_zero:
        torch.save((attribution.scores, own), Path(folder) / "found.pt")


if __name__ == "__main__":
    main()
