"""Digests, files and selections of weights."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lightning_trak.gradients.parameters import select_parameters
from lightning_trak.store.files import Damaged
from lightning_trak.store.weights import (
    load_weights,
    names_of_weights,
    read_weights,
    save_weights,
    tensors_in,
    weights_digest,
)

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
    path = tmp_path / "weights.safetensors"
    save_weights(WEIGHTS, path)
    loaded = load_weights(path, weights_digest(WEIGHTS))
    assert loaded.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert torch.equal(loaded[name], value)
    assert names_of_weights(path) == set(WEIGHTS)
    assert [item.name for item in tmp_path.iterdir()] == ["weights.safetensors"]
    with pytest.raises(Damaged, match="is damaged: its digest is"):
        load_weights(path, "0" * 32)


def test_the_file_is_one_that_safetensors_reads(tmp_path):
    save_weights(WEIGHTS, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert weights_digest(loaded) == weights_digest(WEIGHTS)


def test_tensors_of_all_kinds_come_back(tmp_path):
    base = torch.randn(4, 3)
    complex_numbers = torch.tensor([1 + 2j, 3j])
    weights = {
        "base": base,
        "again": base,  # two names of one tensor
        "part": base[1:],
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "images": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base),
        "complex": complex_numbers,
        "conjugate": complex_numbers.conj(),
        "negative": complex_numbers.conj().imag,
        "bytes": torch.arange(256, dtype=torch.uint8),
        "eighths": torch.arange(4.0).to(torch.float8_e4m3fn),
        "half": torch.arange(4.0).half(),
        "long": torch.tensor([2**62, -1]),
        "": torch.zeros(0),
        'ünïcode "quoted"': torch.ones(1),
    }
    path = tmp_path / "weights.safetensors"
    save_weights(weights, path)
    loaded = load_weights(path, weights_digest(weights))
    assert loaded.keys() == weights.keys()
    assert torch.equal(loaded["conjugate"], complex_numbers.conj().resolve_conj())
    assert not any(value.requires_grad for value in loaded.values())
    loaded["part"].add_(1)  # nothing is shared, and the file stays as it is
    assert torch.equal(load_weights(path, weights_digest(weights))["part"], base[1:])


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    save_weights({"a": torch.zeros(1_000_000)[:10]}, tmp_path / "weights.safetensors")
    assert (tmp_path / "weights.safetensors").stat().st_size < 10_000


def test_types_that_the_format_lacks(tmp_path):
    with pytest.raises(TypeError, match="torch.complex128, torch.float32 cannot be stored as safetensors"):
        save_weights({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex128)}, tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "longer", "pickled", "gone", "folder"])
def test_damaged_weights(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    save_weights(WEIGHTS, path)
    content = path.read_bytes()
    path.unlink()
    if damage == "pickled":
        torch.save(WEIGHTS, path)
    elif damage == "folder":
        path.mkdir()
    elif damage != "gone":
        forms = {"empty": b"", "garbage": b"garbage", "truncated": content[:-4], "longer": content + b"\0"}
        path.write_bytes(forms[damage])
    with pytest.raises(Damaged, match=r"weights.safetensors' is damaged.*ckpt_path"):
        load_weights(path, weights_digest(WEIGHTS))
    if damage not in ("gone", "folder"):
        with pytest.raises(Damaged, match=r"weights.safetensors' is damaged.*Delete the folder"):
            names_of_weights(path)


def test_every_bit_of_the_weights_counts(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = {"a": torch.arange(3.0), "bc": torch.tensor([[True], [False]])}
    save_weights(weights, path)
    content, digest = path.read_bytes(), weights_digest(weights)
    start = 8 + int.from_bytes(content[:8], "little")
    noticed = set()
    for place, bit in itertools.product(range(len(content)), range(8)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            found = load_weights(path, digest)
        except Damaged:
            noticed.add(8 * place + bit)
        else:  # a space of the header
            assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert noticed >= {*range(8 * 8), *range(8 * start, 8 * len(content))}
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(Damaged):
            load_weights(path, digest)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("F8_E8M0", [8]),
        ("F4", [16]),
        ("X", [8]),
        ("F64", [2**60]),
        ("F64", [0, 2**63]),
        ("F64", [2**62, 2**62, 0]),
        ("F64", [0, 2, 2**62]),
    ],
)
def test_headers_that_are_never_written(tmp_path, dtype, shape):
    path = tmp_path / "weights.safetensors"
    size = 0 if 0 in shape else 8
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(Damaged, match="weights.safetensors' is damaged"):
        load_weights(path, "another digest")


HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "BOOL", "C64", "X"]),
            "shape": st.lists(st.integers(0, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1, -1]), max_size=4),
            "data_offsets": st.lists(st.integers(0, 17) | st.sampled_from([2**63, 2**64]), min_size=2, max_size=2),
        }
    )
    | st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | HEADERS.map(lambda header: json.dumps(header).encode()), st.binary(max_size=17))
def test_any_file_of_weights_is_read_or_damaged(tmp_path_factory, header, data):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(Damaged, match="any.safetensors' is damaged"):
        load_weights(path, "another digest")
    with suppress(Damaged):
        names_of_weights(path)


def test_names_of_weights_that_are_gone(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights.safetensors"):
        names_of_weights(tmp_path / "weights.safetensors")


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights(WEIGHTS, path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("os.fsync", "os.replace", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(function, full)
            with pytest.raises(OSError, match="No space left"):
                save_weights({"a": torch.zeros(1)}, path)
        assert [item.name for item in tmp_path.iterdir()] == ["weights.safetensors"]
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
