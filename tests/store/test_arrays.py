"""Arrays in files: they come back as they were, or the file is damaged."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_trak.store.arrays import read_arrays, read_with_notes, write_arrays
from lightning_trak.store.files import Damaged
from tests.store.processes import output_of

NAMES = ("?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", ">f4", ">i8")
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = hnp.arrays(st.sampled_from(NAMES), SHAPES).flatmap(lambda one: st.sampled_from([one, one.T, np.flip(one)]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("arrays") / "file.safetensors"


def same(one, other):
    return one.keys() == other.keys() and all(
        (array.dtype.str, array.shape, array.tobytes())
        == (other[name].dtype.str, other[name].shape, other[name].tobytes())
        for name, array in one.items()
    )


def what_is_read(path, names=None):
    try:
        return read_with_notes(path, "here", names)
    except Damaged as error:
        return error


def safetensors_file(header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), ARRAYS, min_size=1, max_size=3),
    st.text(max_size=20),
    st.dictionaries(st.text(max_size=5), JSON, max_size=3),
)
def test_arrays_and_notes_come_back(path, arrays, place, notes):
    write_arrays(path, arrays, place, notes)
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    found, known = read_with_notes(path, place)
    assert same(found, native)
    assert json.dumps(known, sort_keys=True) == json.dumps(notes, sort_keys=True)
    name = next(iter(arrays))
    assert same(read_arrays(path, place, [name]), {name: native[name]})
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_no_rows_and_no_dimensions(tmp_path):
    arrays = {"rows": np.zeros((0, 3), np.float32), "number": np.array(2.5), "columns": np.zeros((3, 0), bool)}
    write_arrays(tmp_path / "file", arrays, "here")
    assert same(read_arrays(tmp_path / "file", "here"), arrays)


def test_what_is_read_may_be_changed_without_changing_the_file(tmp_path):
    path, numbers = tmp_path / "file", np.arange(4000.0)
    write_arrays(path, {"x": numbers}, "here")
    content, found = path.read_bytes(), read_arrays(path, "here")["x"]
    found += 1
    assert path.read_bytes() == content
    assert same(read_arrays(path, "here"), {"x": numbers})
    write_arrays(path, {"x": -numbers}, "here")
    path.unlink()
    assert found.tolist() == (numbers + 1).tolist()  # it is of the file that was read


def test_a_type_that_the_format_lacks_leaves_no_file(tmp_path):
    for array in (np.ones(2, complex), np.array(["a"]), np.array([{}]), np.zeros(1, [("a", "f4")])):
        with pytest.raises(Exception, match="dtype|data-type"):
            write_arrays(tmp_path / "file", {"x": array}, "here")
    assert list(tmp_path.iterdir()) == []


def damaged_forms(content):
    """Yield what damage makes of a file, with the first byte that differs."""
    for place in range(len(content)):
        before, byte, after = content[:place], content[place], content[place + 1 :]
        for bit in range(8):
            yield place, before + bytes([byte ^ 1 << bit]) + after
        yield place, before  # truncated
        yield place, before + after
        yield place, before + b"\0" + bytes([byte]) + after
        if byte:
            yield place, before + b"\0" + after
    yield len(content), content + b"\0"


def test_damage_is_noticed_or_harmless(tmp_path):
    """Every bit of a small file, and every length."""
    path = tmp_path / "file"
    arrays, notes = {"a": np.arange(3, dtype=np.float32), "bc": np.array([[True], [False]])}, {"n": [1, 2]}
    write_arrays(path, arrays, "here", notes)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert len(content) == start + 14
    harmless, noticed = set(), 0
    for place, form in damaged_forms(content):
        path.write_bytes(form)
        found = what_is_read(path)
        if isinstance(found, Damaged):
            noticed += 1
        else:
            assert same(found[0], arrays)
            assert found[1] == notes
            harmless.add(place)
    assert harmless <= set(range(8, start))  # spaces, and where the file says that it belongs: the checksums say it too
    assert len(harmless) < 30
    assert noticed > 10 * len(content)


def test_a_file_of_another_place_is_damaged(tmp_path):
    write_arrays(tmp_path / "one", {"x": np.arange(3)}, "rows 0 to 3")
    content = (tmp_path / "one").read_bytes()
    (tmp_path / "two").write_bytes(content)
    assert same(read_arrays(tmp_path / "two", "rows 0 to 3"), {"x": np.arange(3)})
    with pytest.raises(Damaged, match="two' is damaged: it belongs elsewhere"):
        read_arrays(tmp_path / "two", "rows 3 to 6")
    (tmp_path / "two").write_bytes(content.replace(b"rows 0 to 3", b"rows 3 to 6"))
    with pytest.raises(Damaged, match="the checksum of 'x' has changed"):
        read_arrays(tmp_path / "two", "rows 3 to 6")


@pytest.mark.parametrize(
    "swaps",
    [
        [(b'"aa":{', b'"cc":{'), (b'"bb":{', b'"aa":{'), (b'"cc":{', b'"bb":{')],
        [(b"[4]", b"[2,2]")],
        [(b"I32", b"U32")],
    ],
)
def test_arrays_of_another_name_shape_or_type_are_damaged(tmp_path, swaps):
    path = tmp_path / "file"
    write_arrays(path, {"aa": np.zeros(4, np.int32), "bb": np.ones(4, np.int32)}, "here")
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    for old, new in swaps:
        assert old in header
        header = header.replace(old, new)
    path.write_bytes(safetensors_file(header, content[-32:]))
    with pytest.raises(Damaged, match="the checksum of"):
        read_arrays(path, "here")


def test_a_missing_file_and_a_missing_array(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "file", "here")
    write_arrays(tmp_path / "file", {"x": np.zeros(1)}, "here")
    with pytest.raises(Damaged, match="file' is damaged"):
        read_arrays(tmp_path / "file", "here", ["x", "y"])


def test_huge_arrays_that_a_header_declares_are_not_allocated(tmp_path):
    """In a process that may take 1 GiB more than it has."""
    metadata = {"place": "here", "notes": "{}", "checksums": '{"x": 0}'}
    shapes = [[2**31], [2**40], [2**61], [2**63], [2**64], [2**31, 2**31], [2**32, 2**32], [2**60, 0], [2**63, 0]]
    shapes += [[1] * 65, [0] * 65, [2**62, 2**62, 0], [2**31, 2**31, 0], [0, 2, 2**62]]
    forms = []
    for shape in shapes:
        size = int(np.prod(np.array(shape, dtype=object))) * 8
        for stop in {0, 8, size, 2**64 - 1}:
            entry = {"dtype": "F64", "shape": shape, "data_offsets": [0, stop]}
            forms.append(safetensors_file({"__metadata__": metadata, "x": entry}, b"12345678"[:stop]))
    forms += [struct.pack("<Q", size) + b"{}" for size in (2**30, 2**40, 2**63, 2**64 - 1)]
    for number, form in enumerate(forms):
        (tmp_path / str(number)).write_bytes(form)
    script = """
        import torch  # of which reading may make use
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        for path in Path(sys.argv[1]).iterdir():
            try:
                print(read_arrays(path, "here"))
            except Damaged:
                print("damaged")
        """
    assert output_of(script, tmp_path).split() == ["damaged"] * len(forms)


class Trap:
    """What is run when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["pickle", "npy", "npz", "empty", "text", "zeros"])
def test_other_files_are_damaged(tmp_path, kind):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        if kind == "pickle":
            pickle.dump(Trap(tmp_path / "trapped"), file)
        elif kind == "npy":
            np.save(file, np.array([Trap(tmp_path / "trapped")]), allow_pickle=True)
        elif kind == "npz":
            np.savez(file, x=np.zeros(3))
        else:
            file.write({"empty": b"", "text": b'{"x": 1}\n', "zeros": bytes(1000)}[kind])
    with pytest.raises(Damaged, match="file' is damaged"):
        read_arrays(path, "here")
    assert not (tmp_path / "trapped").exists()


def assert_read_or_damaged(path, content):
    path.write_bytes(content)
    for names in (None, ["x"], []):
        found = what_is_read(path, names)
        assert isinstance(found, tuple) or str(found).startswith(f"'{path}' is damaged: ")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes(path, content, has_a_header):
    assert_read_or_damaged(path, safetensors_file(content) if has_a_header else content)


@pytest.mark.parametrize(
    ("metadata", "dtype"),
    [
        *[({}, dtype) for dtype in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "X", 1)],
        *[({"checksums": text}, "U8") for text in ("", "1", "null", '"x"', '["x"]', '[["x"]]', "[" * 100_000)],
        *[({"checksums": text}, "U8") for text in ('{"y": 0}', '{"x": {}}', '{"\\ud800": 0}', '{"": 0}', "1" * 5000)],
        *[({"checksums": "{}", "notes": text}, "U8") for text in ("", "[" * 100_000, "1" * 5000)],
        *[({name: 1}, "U8") for name in ("notes", "place", "checksums")],
        *[({name: None}, "U8") for name in ("notes", "checksums")],
        (None, "U8"),
    ],
)
def test_headers_that_are_never_written(tmp_path, metadata, dtype):
    path, header = tmp_path / "file", {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}
    if metadata is not None:
        metadata = {"place": "here", "notes": "{}", "checksums": '{"x": 0}', **metadata}
        header["__metadata__"] = {name: value for name, value in metadata.items() if value is not None}
    path.write_bytes(safetensors_file(header, bytes(4 if dtype == "F4" else 8)))
    with pytest.raises(Damaged, match="file' is damaged: "):
        read_arrays(path, "here")


SIZES = st.integers(0, 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1]) | JSON
TYPES = st.sampled_from(["F64", "F32", "BF16", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F4", "F6_E2M3"]) | JSON
ENTRIES = st.fixed_dictionaries(
    {"dtype": TYPES, "shape": st.lists(SIZES, max_size=4), "data_offsets": st.lists(SIZES, min_size=2, max_size=2)}
)
TEXTS = JSON.map(json.dumps) | st.text() | st.just('{"x": 0}') | st.just("[" * 100_000)
METADATA = st.fixed_dictionaries({}, optional={"place": TEXTS, "notes": TEXTS, "checksums": TEXTS})


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={"__metadata__": METADATA | JSON, "x": ENTRIES | JSON, "y": ENTRIES}),
    st.binary(max_size=16),
)
def test_any_header(path, header, data):
    assert_read_or_damaged(path, safetensors_file(header, data))


def test_an_error_of_a_damaged_file_comes_back_from_another_process(tmp_path):
    """A pool of processes pickles errors."""
    error = pickle.loads(pickle.dumps(Damaged(tmp_path / "file", "it is empty", "Delete it.")))
    assert str(error) == f"'{tmp_path / 'file'}' is damaged: it is empty. Delete it."
    assert (error.path, error.why) == (tmp_path / "file", "it is empty")
