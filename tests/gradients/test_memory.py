"""How much memory there is, how much is taken, and what batch size follows."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lightning_trak.gradients.memory import fitting_batch_size, free_bytes, peak_bytes

CPU = torch.device("cpu")
KB4 = 1000  # elements of 4 bytes: a tensor of 4000 bytes


def ones():
    return torch.ones(KB4)


def chain(tensor, steps=5):
    for _ in range(steps):
        tensor = tensor * 2
    return tensor


def freed_before_the_peak():
    first = torch.ones(2, KB4)
    del first
    return [ones(), ones()]


def peak_in_the_middle():
    large = [ones() for _ in range(4)]
    del large
    return ones()


COUNTED = {
    "nothing": (lambda: None, 0),
    "one tensor": (ones, 4000),
    "float64": (lambda: torch.ones(KB4, dtype=torch.float64), 8000),
    "bytes": (lambda: torch.ones(KB4, dtype=torch.uint8), 1000),
    "five tensors that are kept": (lambda: [ones() for _ in range(5)], 20000),
    "five tensors of which the sums are kept": (lambda: [ones().sum() for _ in range(5)], 4 * 4 + 4000 + 4),
    "old and new at each step": (lambda: chain(ones()), 8000),
    "freed before the peak": (freed_before_the_peak, 8000),
    "a peak in the middle": (peak_in_the_middle, 16000),
    "views": (lambda: ones().view(10, 100).t()[3].unsqueeze(0), 4000),
    "two views that are kept": (lambda: ones().split(500), 4000),
    "an expanded tensor": (lambda: torch.ones(1).expand(KB4), 4),
    "a copy of a view": (lambda: ones()[:500].clone(), 6000),
    "in place": (lambda: ones().add_(1).mul_(2).relu_(), 4000),
    "several outputs": (lambda: ones().sort(), 4000 + 4000 + 8000),
}


@pytest.mark.parametrize("case", COUNTED)
def test_peak_by_hand(case):
    run, expected = COUNTED[case]
    assert peak_bytes(run, CPU) == expected
    assert peak_bytes(run, CPU) == expected  # nothing is left of the first time


def test_peak_of_a_backward_pass():
    weight = torch.ones(KB4, requires_grad=True)

    def saves_nothing():
        (weight * 2).sum().backward()

    def saves_every_step():
        hidden = weight.exp()
        for _ in range(8):
            hidden = hidden.exp()
        hidden.sum().backward()

    assert 4000 < peak_bytes(saves_nothing, CPU) < 4100  # the product is gone when its gradient comes
    weight.grad = None
    assert 9 * 4000 < peak_bytes(saves_every_step, CPU) < 11 * 4000 + 100  # nine are kept, and one or two gradients
    with torch.no_grad():
        assert peak_bytes(lambda: weight.exp().exp().exp().exp(), CPU) == 8000


def test_what_was_there_before_is_not_counted():
    there = torch.ones(100, KB4)
    assert peak_bytes(lambda: there.sum(), CPU) == 4
    assert peak_bytes(lambda: there * 2, CPU) == there.nbytes


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda there: there.view(10, 100), 0),
        (lambda there: there[:10], 0),
        (lambda there: there.detach(), 0),
        (lambda there: there.add_(1), 0),
        (lambda there: there[:10] * 2, 40),
        (lambda there: torch.nn.functional.linear(torch.ones(1, 100), there.view(10, 100)), 440),
    ],
)
def test_views_and_changes_of_what_was_there_before_are_not_counted(run, expected):
    there = ones()
    assert peak_bytes(lambda: run(there), CPU) == expected


@pytest.mark.parametrize(
    "run", [lambda: torch.empty(0).resize_(KB4), lambda: torch.mul(torch.ones(1), torch.ones(1), out=torch.empty(0))]
)
def test_storages_that_grow(run):
    assert peak_bytes(run, CPU) >= 12


def test_peak_when_the_work_fails():
    def fails():
        ones()
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        peak_bytes(fails, CPU)
    assert peak_bytes(ones, CPU) == 4000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_on_a_gpu():
    device = torch.device("cuda")
    there = torch.ones(1000, KB4, device=device)
    run = lambda: [torch.ones(1 << 20, device=device) * 2 for _ in range(3)]  # noqa: E731
    assert peak_bytes(run, device) == 4 * (4 << 20)
    assert peak_bytes(lambda: there.view(-1)[:10].add_(1), device) == 0
    assert 0 < free_bytes(device) <= torch.cuda.get_device_properties(device).total_memory


# ------------------------------------------------------------------------------------------------- what is there

MEMINFO = "MemTotal:       9000 kB\nMemFree:         500 kB\nMemAvailable:   2000 kB\nBuffers: 1 kB\n"
GROUP, V1, STAT = "/sys/fs/cgroup/job", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory.stat"
MAX, CURRENT = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"


@pytest.fixture
def files(monkeypatch):
    """The only files that there are, by path."""
    found = {"/proc/self/cgroup": "1:cpu,memory:/job/step\n0::/job\n"}

    class Path:
        def __init__(self, path):
            self.path = path

        def read_text(self):
            if self.path not in found:
                raise FileNotFoundError(self.path)
            return found[self.path]

    monkeypatch.setattr("lightning_trak.gradients.memory.Path", Path)
    return found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"/proc/meminfo": MEMINFO}, 2000 * 1024),
        ({"/proc/meminfo": MEMINFO, MAX: "max\n", CURRENT: "500\n"}, 2000 * 1024),
        ({"/proc/meminfo": MEMINFO, MAX: "500000\n", CURRENT: "200000\n"}, 300000),
        ({"/proc/meminfo": MEMINFO, MAX: "90000000\n", CURRENT: "200000\n"}, 2000 * 1024),
        ({"/proc/meminfo": MEMINFO, MAX: "500000\n"}, 2000 * 1024),
        ({"/proc/meminfo": MEMINFO, CURRENT: "200000\n"}, 2000 * 1024),
        ({"/proc/meminfo": MEMINFO.replace("MemAvailable", "Other")}, None),
        ({"/proc/meminfo": "", MAX: "500000\n", CURRENT: "200000\n"}, 300000),
        ({MAX: "500000\n", CURRENT: "200000\n"}, 300000),
        ({MAX: "max\n", CURRENT: "200000\n"}, None),
        ({MAX: "900\n", CURRENT: "200\n", f"{GROUP}/memory.max": "500", f"{GROUP}/memory.current": "200"}, 300),
        ({MAX: "500\n", CURRENT: "400\n", STAT: "anon 7\ninactive_file 250\nfile 9\n"}, 350),
        ({f"{V1}/memory.limit_in_bytes": "700", f"{V1}/memory.usage_in_bytes": "300"}, 400),
        (
            {
                f"{V1}/job/step/memory.limit_in_bytes": "700",
                f"{V1}/job/step/memory.usage_in_bytes": "300",
                f"{V1}/job/step/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            500,
        ),
        ({}, None),
    ],
)
def test_free_memory_is_the_least_of_what_is_known(files, content, expected):
    files.update(content)
    assert free_bytes(CPU) == expected


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_free_memory_of_an_unknown_device(files, device):
    files["/proc/meminfo"] = MEMINFO
    assert free_bytes(torch.device(device)) is None


def test_free_memory_of_a_gpu_has_what_torch_keeps_in_reserve(monkeypatch):
    device = torch.device("cuda", 1)
    numbers = {"mem_get_info": (100, 999), "memory_reserved": 50, "memory_allocated": 30}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda of, number=number: number if of == device else None)
    assert free_bytes(device) == 120


# ------------------------------------------------------------------------------------------- the batch size

EACH, FIXED = 4 * KB4, 10_000


def work(size):
    """Takes FIXED + EACH · size bytes."""
    return torch.ones(FIXED, dtype=torch.uint8), torch.ones(size, KB4)


def fitting(monkeypatch, free, largest=10**6, run=work):
    monkeypatch.setattr("lightning_trak.gradients.memory.free_bytes", lambda device: free)
    return fitting_batch_size(run, largest, CPU)


@pytest.mark.parametrize("size", [1, 2, 5, 32, 1000])
def test_half_of_the_memory_is_filled(monkeypatch, size):
    needed = FIXED + size * EACH
    assert fitting(monkeypatch, 2 * needed) == size
    assert fitting(monkeypatch, 2 * needed + 2 * EACH - 2) == size
    assert fitting(monkeypatch, 2 * needed + 2 * EACH) == size + 1


def test_twice_the_memory_twice_the_batch(monkeypatch):
    sizes = [fitting(monkeypatch, 10**6 * 2**power) for power in range(6)]
    assert all(2 * small <= large <= 2 * small + 4 for small, large in pairwise(sizes))


@pytest.mark.parametrize("largest", [5, 8, 100])
def test_never_more_than_asked_for(monkeypatch, largest):
    result = fitting(monkeypatch, 2**60, largest)
    assert result == largest
    assert type(result) is int


@pytest.mark.parametrize("free", [-(10**6), 0, 1, 2 * FIXED])
def test_never_less_than_one(monkeypatch, free):
    result = fitting(monkeypatch, free, 8)
    assert result == 1
    assert type(result) is int


def test_work_that_takes_the_same_whatever_the_size(monkeypatch):
    assert fitting(monkeypatch, 10**6, 64, lambda size: ones()) == 64


@pytest.mark.parametrize(("free", "largest"), [(None, 32), (None, 1), (10, 4), (10, 1)])
def test_nothing_is_measured_where_it_is_of_no_use(monkeypatch, free, largest):
    sizes = []
    assert fitting(monkeypatch, free, largest, sizes.append) == largest
    assert sizes == []


def test_measured_on_four_examples_at_most(monkeypatch):
    sizes = []

    def run(size):
        sizes.append(size)
        return work(size)

    assert fitting(monkeypatch, 2**60, 5, run) == 5
    assert set(sizes) == {1, 4}


def test_what_the_first_run_makes_for_all_is_not_counted_again(monkeypatch):
    cache = []

    def run(size):
        if not cache:
            cache.append(torch.ones(10**6))
        return work(size)

    assert fitting(monkeypatch, 2 * (FIXED + 20 * EACH), run=run) == 20


def test_what_the_first_run_keeps_is_not_free(monkeypatch):
    cache = []

    def run(size):
        if not cache:
            cache.append(torch.ones(10**6, dtype=torch.uint8))
        return work(size)

    monkeypatch.setattr(
        "lightning_trak.gradients.memory.free_bytes",
        lambda device: 10**6 + 2 * (FIXED + 20 * EACH) - sum(map(len, cache)),
    )
    assert fitting_batch_size(run, 1000, CPU) == 20


def test_the_device_is_asked_for(monkeypatch):
    asked = SimpleNamespace(free=[], peak=[])
    monkeypatch.setattr("lightning_trak.gradients.memory.free_bytes", lambda device: asked.free.append(device) or 1000)
    monkeypatch.setattr(
        "lightning_trak.gradients.memory.peak_bytes",
        lambda run, device: asked.peak.append(device) or (run(), 10 * len(asked.peak))[1],
    )
    device = torch.device("cuda", 3)
    assert fitting_batch_size(lambda size: None, 8, device) == 8
    assert {*asked.free, *asked.peak} == {device}
