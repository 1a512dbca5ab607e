"""Chunks: any block of rows comes back, damage is noticed. Claims: each chunk is one process's at a time."""

from __future__ import annotations

import itertools
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_trak.store.chunks import Chunks, Claim, scattered
from lightning_trak.store.files import Damaged
from tests.store.processes import output_of, start


def rows_of(rows):
    """What is stored of some rows."""
    rows = np.asarray(rows)
    return {"x": rows[:, None] * np.array([1.0, 10.0]), "row": rows.astype(np.int32), "empty": np.zeros((len(rows), 0))}


def filled(folder, n=7, size=3, place="here"):
    chunks = Chunks(folder, place, n, size)
    with Claim(chunks) as claim:
        rows = list(claim)
        claim.write(rows, rows_of(rows))
    return chunks


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_files_of_chunks(tmp_path):
    chunks = Chunks(tmp_path / "train", "here", 7, 3)
    assert chunks.all() == chunks.missing() == [range(3), range(3, 6), range(6, 7)]
    assert chunks.present() == []
    assert not chunks.complete
    chunks.write(3, rows_of(range(3, 6)))
    assert chunks.missing() == [range(3), range(6, 7)]
    assert chunks.present() == [range(3, 6)]
    assert chunks.path(3) == tmp_path / "train" / "0000000003.safetensors"
    assert list(chunks.folder.iterdir()) == [chunks.path(3)]
    filled(chunks.folder)
    assert chunks.complete
    assert sorted(chunks.folder.iterdir()) == [chunks.path(row) for row in (0, 3, 6)]


def test_other_files_are_no_chunks(tmp_path):
    for name in ("3.safetensors", "0000000001.safetensors", "0000000009.safetensors", "٣.safetensors", "0000000003"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "0000000000.safetensors.1f.partial").write_bytes(b"")  # of a process that was killed
    chunks = Chunks(tmp_path, "here", 7, 3)
    assert chunks.present() == []
    assert not chunks.complete
    assert filled(tmp_path).complete


def test_a_huge_number_of_rows_is_not_counted_one_by_one(tmp_path):
    assert not Chunks(tmp_path, "here", 2**90, 1).complete


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 14), size=st.integers(1, 15), data=st.data())
def test_rows_come_back_as_blocks_and_in_any_order(tmp_path_factory, n, size, data):
    chunks = filled(tmp_path_factory.mktemp("chunks"), n, size)
    whole = rows_of(range(n))
    for block_size in (1, data.draw(st.integers(1, n + 2)), n, 100):
        blocks = list(chunks.blocks(None, block_size))
        assert_same({name: np.concatenate([block[name] for block in blocks]) for name in whole}, whole)
        assert [len(block["row"]) for block in blocks[:-1]] == [block_size] * (len(blocks) - 1)
        assert 0 < len(blocks[-1]["row"]) <= block_size
    assert [list(block) for block in chunks.blocks(["row"], n)] == [["row"]]
    for name, array in whole.items():
        np.testing.assert_array_equal(chunks.column(name), array, strict=True)
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1))
    assert_same(chunks.rows(chosen), rows_of(chosen))
    assert list(chunks.rows(chosen, ["x"])) == ["x"]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), size=st.integers(1, 5), data=st.data())
def test_rows_may_be_written_in_any_order_and_batches(tmp_path_factory, n, size, data):
    chunks = Chunks(tmp_path_factory.mktemp("chunks"), "here", n, size)
    order = data.draw(st.permutations(range(n)))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=4))), n]
    with Claim(chunks) as claim:
        assert list(claim) == list(range(n))
        for first, stop in itertools.pairwise(edges):
            claim.write(order[first:stop], rows_of(order[first:stop]) if first < stop else {})
            assert chunks.missing() == [rows for rows in chunks.all() if not set(rows) <= set(order[:stop])]
    assert_same(chunks.rows(range(n)), rows_of(range(n)))


def test_a_row_is_written_once(tmp_path):
    chunks = Chunks(tmp_path, "here", 6, 3)
    with Claim(chunks) as claim:
        rows = iter(claim)
        assert next(rows) == 0
        with pytest.raises(ValueError, match=r"rows \[3\] are written already, or are not claimed"):
            claim.write([3], rows_of([3]))
        claim.write([0, 1, 2], rows_of([0, 1, 2]))
        with pytest.raises(ValueError, match=r"rows \[1\] are written already"):
            claim.write([1], rows_of([1]))
        assert list(rows) == [1, 2, 3, 4, 5]
        claim.write([3, 4], rows_of([3, 4]))
        with pytest.raises(ValueError, match=r"rows came twice: \[3, 4, 4\]"):
            claim.write([4], rows_of([4]))
    assert chunks.missing() == [range(3, 6)]


def test_scattered_rows():
    parts = [(rows, rows_of(rows)) for rows in ([2, 0], [4], [1, 3])]
    assert_same(scattered(parts, 5), rows_of(range(5)))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "swapped", "of another place", "of others"])
def test_a_damaged_chunk_is_noticed_and_computed_again(tmp_path, damage):
    chunks = filled(tmp_path / "one", 9)
    path = chunks.path(3)
    if damage == "flipped":
        flip(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "swapped":
        path.write_bytes(chunks.path(6).read_bytes())
    elif damage == "of another place":
        path.write_bytes(filled(tmp_path / "two", 9, place="there").path(3).read_bytes())
    else:  # when there were fewer rows
        path.write_bytes(filled(tmp_path / "two", 5).path(3).read_bytes())
    readers = [
        lambda: chunks.read(range(3, 6)),
        lambda: chunks.rows([0, 4]),
        lambda: chunks.column("empty"),
        lambda: list(chunks.blocks(["empty", "x"], 2)),
    ]
    for read in readers[: 2 if damage == "flipped" else None]:  # there, a part was flipped that the others do not read
        with pytest.raises(Damaged, match="0000000003.safetensors' is damaged: .*computes its rows again"):
            read()
    assert_same(chunks.rows([8, 0]), rows_of([8, 0]))
    assert chunks.delete_damaged() == [path]
    assert chunks.missing() == [range(3, 6)]
    with Claim(chunks) as claim:
        rows = list(claim)
        assert rows == [3, 4, 5]
        claim.write(rows, rows_of(rows))
    assert chunks.delete_damaged() == []
    assert_same(chunks.rows(range(9)), rows_of(range(9)))


def test_two_chunks_that_changed_places_are_both_damaged(tmp_path):
    chunks = filled(tmp_path, 6)
    first, second = chunks.path(0), chunks.path(3)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert chunks.delete_damaged() == [first, second]


def test_a_chunk_that_went_missing_is_told(tmp_path):
    chunks = filled(tmp_path)
    chunks.path(3).unlink()
    for read in (lambda: chunks.column("x"), lambda: chunks.rows([3]), lambda: list(chunks.blocks(None, 1))):
        with pytest.raises(Damaged, match="0000000003.safetensors' is damaged: it is missing"):
            read()


def test_claims_share_the_chunks(tmp_path):
    """A claim takes a chunk when its first row is asked for, and no other claim gets it then."""
    chunks = Chunks(tmp_path, "here", 8, 2)
    with Claim(chunks) as one, Claim(chunks) as other:
        rows, other_rows = iter(one), iter(other)
        assert [next(rows), next(other_rows), next(rows), next(rows), next(other_rows)] == [0, 2, 1, 4, 3]
        one.write([0, 1], rows_of([0, 1]))
        with Claim(chunks) as third:
            assert list(third) == [6, 7]
            assert list(other_rows) == []
        assert list(rows) == [5, 6, 7]  # which the third gave back
        other.write([2, 3], rows_of([2, 3]))
        one.write([4, 5, 6, 7], rows_of([4, 5, 6, 7]))
        assert list(tmp_path.glob("*.lock")) == []
    assert_same(chunks.rows(range(8)), rows_of(range(8)))


def test_a_chunk_that_another_has_written_in_the_meantime_is_left_out(tmp_path):
    chunks = Chunks(tmp_path, "here", 4, 2)
    with Claim(chunks) as claim:
        rows = iter(claim)
        assert next(rows) == 0
        chunks.write(2, rows_of([2, 3]))
        assert list(rows) == [1]
        assert [path.name for path in tmp_path.glob("*.lock")] == ["0000000000.lock"]


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_a_claim_that_ends_early_gives_its_chunks_back(tmp_path, error):
    chunks = Chunks(tmp_path, "here", 6, 2)

    def begin():
        with Claim(chunks) as claim:
            assert list(claim) == list(range(6))
            claim.write([0, 1, 2], rows_of([0, 1, 2]))
            if error:
                raise error

    if error:
        with pytest.raises(error):
            begin()
    else:
        begin()
    assert [path.name for path in tmp_path.iterdir()] == ["0000000000.safetensors"]
    with Claim(chunks) as claim:
        assert list(claim) == [2, 3, 4, 5]
        claim.write([2, 3, 4, 5], rows_of([2, 3, 4, 5]))
    assert_same(chunks.rows(range(6)), rows_of(range(6)))


HOLD = """
    with Claim(Chunks(Path(sys.argv[1]), "here", 6, 2)) as claim:
        rows = iter(claim)
        print([next(rows) for _ in range(3)], flush=True)
        claim.write([0, 1], {"x": np.zeros(2)})
        claim.write([2], {"x": np.zeros(1)})
        print("written", flush=True)
        sys.stdin.readline()
    """


@pytest.mark.parametrize("killed", [True, False])
def test_what_another_process_has_is_free_when_it_ends(tmp_path, killed):
    """A process that is killed loses only the chunks that are not written."""
    chunks = Chunks(tmp_path, "here", 6, 2)
    with start(HOLD, tmp_path) as process:
        assert process.stdout.readline() == "[0, 1, 2]\n"
        assert process.stdout.readline() == "written\n"
        with Claim(chunks) as claim:
            assert list(claim) == [4, 5]
        if killed:
            process.kill()
        else:
            process.stdin.write("\n")
        process.communicate()
    assert process.returncode == (-signal.SIGKILL if killed else 0)
    assert chunks.missing() == [range(2, 4), range(4, 6)]
    with Claim(chunks) as claim:
        assert list(claim) == [2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["0000000000.safetensors"]


FORK = """
    def leave(how):
        if how == "exit":
            os._exit(0)
        sys.stderr = open(os.devnull, "w")
        if how == "exception":
            raise RuntimeError("in the fork")
        sys.exit(0)

    folder, how = Path(sys.argv[1]), sys.argv[2]
    chunks = Chunks(folder, "here", 4, 2)
    with Claim(chunks) as claim:
        rows = iter(claim)
        assert next(rows) == 0
        if how.startswith("multiprocessing"):
            import multiprocessing
            child = multiprocessing.get_context("fork").Process(target=leave, args=(how.split()[1],))
            child.start()
            child.join()
        else:
            child = os.fork()
            if not child:
                leave(how)
            os.waitpid(child, 0)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["0000000000.lock"], names
        with Claim(chunks) as other:
            assert list(other) == [2, 3]
        assert list(rows) == [1, 2, 3]
        claim.write([0, 1, 2, 3], {"x": np.arange(4.0)})
    print(chunks.column("x").tolist())
    """


@pytest.mark.parametrize("how", ["exit", "unwinding", "exception", "multiprocessing exit", "multiprocessing unwinding"])
def test_a_fork_that_ends_does_not_give_the_claim_of_its_parent_back(tmp_path, how):
    assert output_of(FORK, tmp_path, how) == "[0.0, 1.0, 2.0, 3.0]\n"


LOADER = """
    from torch.utils.data import DataLoader

    class Squares:
        def __getitem__(self, row):
            return row, float(row**2)

    chunks = Chunks(Path(sys.argv[1]), "here", 20, 4)
    with Claim(chunks) as claim:
        rows = iter(claim)
        loader = DataLoader(Squares(), 3, sampler=rows, num_workers=2, multiprocessing_context="fork")
        for batch_rows, values in loader:
            first = batch_rows[0].item() // 4 * 4
            with Claim(chunks) as other:
                assert not set(other) & set(range(first, first + 4))
            claim.write(batch_rows.tolist(), {"x": values.numpy()})
    assert list(chunks.folder.glob("*.lock")) == []
    print(chunks.column("x").astype(int).tolist())
    """


def test_rows_go_to_the_workers_of_a_loader(tmp_path):
    assert output_of(LOADER, tmp_path) == f"{[row**2 for row in range(20)]}\n"


SHARE = """
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    chunks, draw = Chunks(folder / "chunks", "here", 60, 3), random.Random(seed)
    print("ready", flush=True)
    sys.stdin.readline()
    while chunks.missing():
        with Claim(chunks) as claim:
            for row in claim:
                busy = folder / f"busy-{row - row % 3}"
                if not row % 3:
                    os.close(os.open(busy, os.O_CREAT | os.O_EXCL))  # fails if another process has the chunk
                if row % 3 == 2:
                    busy.unlink()
                    if draw.random() < 0.2:
                        break  # gives the chunk back
                claim.write([row], {"x": np.array([row])})
    print("done")
    """


def test_no_two_processes_have_the_same_chunk_at_the_same_time(tmp_path):
    processes = [start(SHARE, tmp_path, seed) for seed in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["done\n"] * 3
    assert Chunks(tmp_path / "chunks", "here", 60, 3).column("x").tolist() == list(range(60))
    assert not list((tmp_path / "chunks").glob("*.lock"))


DIE = """
    # Dies at random, if it is mortal: at a row, and before, within and after the moment when a file gets its name.
    draw, mortal = random.Random(sys.argv[2]), int(sys.argv[2]) < 12
    replace, write_bytes = os.replace, Path.write_bytes

    def may_die(probability):
        if mortal and draw.random() < probability:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced(*paths):
        may_die(0.07)
        replace(*paths)
        may_die(0.07)

    def written(path, content):
        half = len(content) // 2
        with open(path, "wb") as file:
            file.write(content[:half])
            file.flush()
            may_die(0.07)
            file.write(content[half:])

    os.replace, Path.write_bytes = replaced, written
    chunks = Chunks(Path(sys.argv[1]), "here", 90, 3)
    while chunks.missing():
        with Claim(chunks) as claim:
            for row in claim:
                may_die(0.03)
                claim.write([row], {"x": np.array([row * 1.5])})
    """


def test_processes_that_are_killed_at_random_and_begin_anew_end_in_the_right_result(tmp_path):
    seeds, deaths = itertools.count(), 0
    running = [start(DIE, tmp_path, next(seeds)) for _ in range(3)]
    while running:
        process = running.pop(0)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode:
            deaths += 1
            running.append(start(DIE, tmp_path, next(seeds)))
    assert deaths
    chunks = Chunks(tmp_path, "here", 90, 3)
    assert chunks.delete_damaged() == []
    np.testing.assert_array_equal(chunks.column("x"), np.arange(90) * 1.5)


def test_a_limit_of_the_system_is_an_error_and_not_a_crash(tmp_path):
    script = """
        chunks = Chunks(Path(sys.argv[1]), "here", 4, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with Claim(chunks) as claim:
            rows = list(claim)
            claim.write(rows[:2], {"x": np.zeros((2, 10))})
            try:
                claim.write(rows[2:], {"x": np.zeros((2, 10_000))})
            except OSError as error:
                print(error)
        print(sorted(path.name for path in chunks.folder.iterdir()))
        """
    message, names = output_of(script, tmp_path).splitlines()
    assert f"The feature store cannot be written in '{tmp_path}'" in message
    assert "Free space there" in message
    assert "What is written so far is kept" in message
    assert names == "['0000000000.safetensors']"
