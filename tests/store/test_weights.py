"""Digests, files and selections of weights."""

from __future__ import annotations

import argparse
import errno

import pytest
import torch
from torch import nn

from lightning_trak.gradients.parameters import select_parameters
from lightning_trak.store.weights import load_weights, read_weights, save_weights, tensors_in, weights_digest

WEIGHTS = {
    "a": torch.randn(3, 2),
    "half": torch.randn(4).bfloat16(),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 3),
}


def test_digest_is_the_identity_of_weights():
    digest = weights_digest(WEIGHTS)
    assert digest == weights_digest({name: value.clone() for name, value in reversed(WEIGHTS.items())})
    assert digest == weights_digest({**WEIGHTS, "a": WEIGHTS["a"].T.contiguous().T})
    assert digest == weights_digest({**WEIGHTS, "a": nn.Parameter(WEIGHTS["a"])})
    assert weights_digest({"a": WEIGHTS["a"][1:2, 1]}) == weights_digest({"a": WEIGHTS["a"][1:2, 1].clone()})
    assert weights_digest({"a": torch.ones(2).neg()}) == weights_digest({"a": torch.full((2,), -1.0)})
    conjugate = torch.tensor([1 + 2j, 3j]).conj()
    assert weights_digest({"a": conjugate}) == weights_digest({"a": conjugate.resolve_conj()})
    others = [
        {**WEIGHTS, "a": WEIGHTS["a"] + 1e-6},
        {**WEIGHTS, "a": WEIGHTS["a"].T},
        {**WEIGHTS, "a": WEIGHTS["a"].double()},
        {**WEIGHTS, "none": torch.zeros(3, 0)},
        {**WEIGHTS, "half": WEIGHTS["half"].view(torch.float16)},
        {("b" if name == "a" else name): value for name, value in WEIGHTS.items()},
        {name: value for name, value in WEIGHTS.items() if name != "count"},
    ]
    assert len({digest, *map(weights_digest, others)}) == len(others) + 1


def test_save_and_load(tmp_path):
    path = tmp_path / "weights.pt"
    save_weights(WEIGHTS, path)
    loaded = load_weights(path, weights_digest(WEIGHTS))
    assert all(torch.equal(loaded[name], value) for name, value in WEIGHTS.items())
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pt"]
    with pytest.raises(ValueError, match="is damaged: its digest is"):
        load_weights(path, "0" * 32)


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    save_weights({"a": torch.zeros(1_000_000)[:10]}, tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").stat().st_size < 10_000


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_weights(tmp_path, content):
    path = tmp_path / "weights.pt"
    save_weights(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ValueError, match=r"is damaged.*ckpt_path"):
        load_weights(path, weights_digest(WEIGHTS))
    path.unlink()
    with pytest.raises(ValueError, match=r"unreadable \(FileNotFoundError\)"):
        load_weights(path, weights_digest(WEIGHTS))


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    save_weights(WEIGHTS, path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights({"a": torch.zeros(1)}, path)
    monkeypatch.undo()
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pt"]
    load_weights(path, weights_digest(WEIGHTS))


def test_read_checkpoint(tmp_path):
    torch.save({"state_dict": {**WEIGHTS, "extra": {"no": "tensor"}}, "epoch": 1}, tmp_path / "lightning.ckpt")
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    digest = weights_digest(WEIGHTS)
    assert weights_digest(read_weights(tmp_path / "lightning.ckpt")) == digest
    assert weights_digest(read_weights(str(tmp_path / "plain.pt"))) == digest


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(FileNotFoundError, match="which is no file"):
        read_weights(path)
    with pytest.raises(FileNotFoundError, match="which is no file"):
        read_weights(tmp_path)
    for content in (b"", b"garbage"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file.pt"):
            read_weights(path)
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        read_weights(path)
    torch.save({"state_dict": WEIGHTS, "hyper_parameters": argparse.Namespace(a=1)}, path)
    with pytest.raises(ValueError, match=r"weights_only=True\)(.|\n)*save its weights alone"):
        read_weights(path)
    for content in ({"epoch": 1}, [torch.zeros(1)], {"state_dict": {}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no weights"):
            read_weights(path)


def test_tensors_in_leaves_extra_state_out():
    assert set(tensors_in({"a": nn.Parameter(torch.zeros(1)), "_extra_state": {"x": 1}})) == {"a"}


def test_select_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    net[0].requires_grad_(False)
    net.register_parameter("counts", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    assert select_parameters(net, None) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert select_parameters(net, "0.weight") == ["0.weight"]
    with pytest.raises(ValueError, match="parameters names none"):
        select_parameters(net, [])
    assert select_parameters(net, ["2.*", "*.weight"]) == ["0.weight", "1.weight", "2.weight", "2.bias"]
    for unknown in ("3.*", ["2.*", "2.wait"], "counts"):
        with pytest.raises(ValueError, match=r"matches no parameter of Sequential; there are, for example, '\d"):
            select_parameters(net, unknown)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        select_parameters(net.requires_grad_(False), None)


def spectral():
    net = nn.Sequential(nn.Linear(2, 2), nn.Module())
    net[1].register_parameter("modes", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    return net


@pytest.mark.parametrize("parameters", [None, "*", ["0.weight", "1.modes"]])
def test_complex_parameters_are_refused_not_left_out(parameters):
    with pytest.raises(ValueError, match=r"complex, e.g. '1.modes' \(torch.complex64\).*view_as_real.*parameters=\["):
        select_parameters(spectral(), parameters)


def test_complex_parameters_that_are_not_attributed():
    assert select_parameters(spectral(), "0.*") == ["0.weight", "0.bias"]
    net = spectral()
    net[1].requires_grad_(False)
    assert select_parameters(net, None) == ["0.weight", "0.bias"]
