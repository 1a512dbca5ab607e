"""Which rows a sampler never reads, and that it is not disturbed by the question."""

from __future__ import annotations

import random
import threading

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_trak import TRAKCallback
from lightning_trak.data.loaders import check_loader
from lightning_trak.data.sampling import never_read
from tests.conftest import Classifier, make_data, make_trainer

N = 23


class Numbers(Dataset):
    """Examples that must not be copied, nor read."""

    def __init__(self, n=N):
        self.n, self.lengths = n, [3 + row % 5 for row in range(n)]
        self.table = [Uncopied() for _ in range(3)]

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        raise AssertionError("read")


class Uncopied:
    def __deepcopy__(self, memo):
        raise AssertionError("copied")


class Buckets(Sampler):
    """Batches of examples of similar length, in random order: what text and speech are trained with."""

    def __init__(self, dataset, rows=None, size=4, drop_last=False, draw="torch"):
        self.dataset, self.table = dataset, dataset.table
        self.order = sorted(range(N) if rows is None else rows, key=lambda row: dataset.lengths[row])
        self.size, self.drop_last, self.draw = size, drop_last, draw
        self.generator, self.epochs = np.random.default_rng(0), 0

    def __len__(self):
        return len(self.order) // self.size

    def __iter__(self):
        self.epochs += 1
        batches = [self.order[first : first + self.size] for first in range(0, len(self.order), self.size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.size]
        if self.draw == "torch":
            batches = [batches[place] for place in torch.randperm(len(batches))]
        elif self.draw == "numpy":
            np.random.shuffle(batches)
        elif self.draw == "random":
            random.shuffle(batches)
        elif self.draw == "its own":
            self.generator.shuffle(self.order)  # in place: the next epoch depends on this one
        yield from batches


class Epochs(Buckets):
    """The same draw again, unless it is told the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        yield from (order[first : first + 4] for first in range(0, N - 3, 4))


class Endless(Buckets):
    def __iter__(self):
        while True:
            yield from super().__iter__()


class Ranked(Buckets):
    """The part of one process among two."""

    num_replicas = 2


class Draws(Sampler):
    """With replacement, the same number as there are examples."""

    def __len__(self):
        return N

    def __iter__(self):
        yield from torch.randint(N, (N,)).tolist()


class Fixed(Sampler):
    """As long as the data set, and yet of a part of it."""

    def __len__(self):
        return N

    def __iter__(self):
        yield from (row % 20 for row in range(N))


class Unsized:
    def __iter__(self):
        yield from range(5)


DATA = Numbers()
HALF = range(0, N, 2)
WHOLE = {
    "plain": {"batch_size": 4, "drop_last": True},
    "shuffled": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "some at a time": {"sampler": RandomSampler(DATA, num_samples=3)},
    "weighted": {"sampler": WeightedRandomSampler([1.0] * N, 3)},
    "another process": {"sampler": DistributedSampler(DATA, num_replicas=2, rank=0)},
    "a batch of another process": {
        "batch_sampler": BatchSampler(DistributedSampler(DATA, num_replicas=2, rank=1), 4, True)
    },
    "a list": {"sampler": list(range(N))[::-1]},
    "a list of batches": {"batch_sampler": [list(range(10)), list(range(10, N))]},
    "arrays": {"batch_sampler": [np.arange(10), torch.arange(10, N)]},
    "negative": {"sampler": [-row - 1 for row in range(N)]},
    "buckets": {"batch_sampler": Buckets(DATA)},
    "buckets, the last dropped": {"batch_sampler": Buckets(DATA, drop_last=True)},
    "buckets of epochs, the last dropped": {"batch_sampler": Epochs(DATA)},
    "buckets without end": {"batch_sampler": Endless(DATA)},
    "buckets of another process": {"batch_sampler": Ranked(DATA, HALF)},
    "drawn with replacement": {"sampler": Draws()},
    "drawn with replacement, in batches": {"batch_sampler": BatchSampler(Draws(), 4, True)},
}
PART = {
    "a list": ({"sampler": list(HALF)}, 12, 1),
    "a list of batches": ({"batch_sampler": [[0, 1, 2], [3, 5]]}, 5, 4),
    "a random part": ({"sampler": SubsetRandomSampler(HALF)}, 12, 1),
    "a random part, in batches": ({"batch_sampler": BatchSampler(SubsetRandomSampler(HALF), 4, True)}, 12, 1),
    "buckets": ({"batch_sampler": Buckets(DATA, HALF)}, 12, 1),
    "buckets without end": ({"batch_sampler": Endless(DATA, HALF)}, 12, 1),
    "repeats": ({"sampler": Fixed()}, 20, 20),
    "no length": ({"sampler": Unsized()}, 5, 5),
    "another data set": ({"sampler": RandomSampler(range(9))}, 9, 9),
    "another data set, in order": ({"batch_sampler": BatchSampler(SequentialSampler(range(9)), 4, False)}, 9, 9),
    "weights of zero": ({"sampler": WeightedRandomSampler([0.0, *[1.0] * (N - 1)], N)}, 22, 0),
}


@pytest.mark.parametrize("case", WHOLE)
def test_samplers_that_read_everything(case):
    loader = DataLoader(DATA, **WHOLE[case])
    assert never_read(loader) == []
    assert check_loader(loader, "x", "") is loader


@pytest.mark.parametrize("case", PART)
def test_samplers_that_leave_rows_out_are_refused(case):
    options, drawn, first = PART[case]
    loader = DataLoader(DATA, **options)
    missing = never_read(loader)
    assert (N - len(missing), missing[0]) == (drawn, first)
    with pytest.raises(
        ValueError, match=rf"^x has a \w+ that reads {drawn} of .* 23 .*never row {first}: .*Subset.*Do"
    ):
        check_loader(loader, "x", "Do this.")


def states(sampler):
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), str(vars(sampler))


@pytest.mark.parametrize("draw", ["torch", "numpy", "random", "its own"])
@pytest.mark.parametrize("rows", [None, HALF])
def test_a_sampler_is_not_disturbed(draw, rows):
    sampler = Buckets(DATA, rows, draw=draw)
    before, state = states(sampler), sampler.generator.bit_generator.state
    never_read(DataLoader(DATA, batch_sampler=sampler))
    assert states(sampler) == before
    assert sampler.generator.bit_generator.state == state


def test_a_sampler_that_cannot_be_copied_is_told_of():
    sampler = Buckets(DATA)
    sampler.lock = threading.Lock()
    loader = DataLoader(DATA, batch_sampler=sampler)
    with pytest.warns(
        UserWarning, match=r"Whether x reads every example cannot be told from its Buckets: TypeError.*Subset"
    ):
        assert check_loader(loader, "x", "") is loader


class BucketsOfBlobs(Buckets):
    def __init__(self, dataset, rows, draw):
        self.order, self.size, self.drop_last, self.draw = list(rows), 4, False, draw
        self.generator, self.epochs, self.dataset = np.random.default_rng(0), 0, dataset


def fit(root, rows, *callbacks, draw="its own"):
    L.seed_everything(0, verbose=False)
    data = make_data(N)
    trainer, module = make_trainer(root, *callbacks, max_epochs=2), Classifier()
    trainer.fit(module, DataLoader(data, batch_sampler=BucketsOfBlobs(data, rows, draw)), DataLoader(make_data(6), 6))
    return module.state_dict()


@pytest.mark.parametrize("draw", ["torch", "numpy", "its own"])
def test_training_with_a_sampler_of_ones_own_is_bit_identical(tmp_path, draw):
    without = fit(tmp_path, range(N), draw=draw)
    with_trak = fit(tmp_path, range(N), TRAKCallback(tmp_path / "store"), draw=draw)
    assert all(torch.equal(value, with_trak[name]) for name, value in without.items())


def test_training_on_a_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataloader has a BucketsOfBlobs that reads 12 of the dataset's 23"):
        fit(tmp_path, HALF, TRAKCallback(tmp_path / "store"))
