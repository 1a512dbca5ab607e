"""``info``: what is in a store, and who works at it. Names and metadata are read, no arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from lightning_trak.commands.opening import DIGITS, command, open_store
from lightning_trak.commands.scores import score_folders
from lightning_trak.results.saved import INDEX
from lightning_trak.results.terminal import count, short, size_text, table
from lightning_trak.store.checkpoint import CheckpointEntry
from lightning_trak.store.files import Damaged, read_json
from lightning_trak.store.inspection import FOLDERS, checkpoints_of, claimed, listed, size_of
from lightning_trak.store.leftovers import leftovers
from lightning_trak.store.store import FeatureStore

_FILE = 30  # characters of a checkpoint file's name
_NAME = 50  # of saved scores
_CLAIMS = 4  # chunks that are named


def info(path: Path) -> int:
    """Print what is in a store; return the exit status, 0."""
    store = open_store(path)
    checkpoints = checkpoints_of(store)
    print(_headline(store, checkpoints))
    print("\n" + table(list(_settings(store.manifest))))
    if checkpoints:
        rows = [_row(store, *item) for item in checkpoints.items()]
        print("\n" + table([_TITLES, *rows], right="epoch step rows size"))
    for section in (_scores(store), _targets(store), _claims(store), _advice(store, checkpoints)):
        if section:
            print("\n" + "\n".join(section))
    return 0


def _headline(store: FeatureStore, checkpoints: dict[str, CheckpointEntry | Damaged]) -> str:
    """Return how much there is."""
    entries = [entry for entry in checkpoints.values() if isinstance(entry, CheckpointEntry)]
    runs = len({entry.meta.get("run") for entry in entries} - {None})
    complete = sum(sum(map(len, entry.chunk_paths)) == store.n_train for entry in entries)
    size = sum(size_of(store.root / name) for name in (*FOLDERS, "manifest.json"))
    return (
        f"{store.dirpath}: {count(len(checkpoints), 'checkpoint')} of {count(runs, 'run')}, {complete} of them with all"
        f" rows, {size_text(size)} on disk"
    )


def _settings(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that all checkpoints share."""
    yield "train set", f"{count(manifest['n_train'], 'example')}, {count(manifest['chunk_rows'], 'row')} in a chunk"
    shapes = manifest["parameters"]
    yield "parameters", f"{sum(prod(shape) for shape in shapes.values())} in {count(len(shapes), 'tensor')}"
    projection = manifest["projection"]
    arguments = [f"{name}={value}" for name, value in projection.get("arguments", {}).items()]
    named = [f"{name}={projection[name]}" for name in ("proj_dim", "seed") if name in projection]
    yield "projection", ", ".join([str(projection.get("projector")), *named, *arguments])
    yield "preconditioner", (manifest.get("preconditioner") or {}).get("name", "none")
    yield "format", str(manifest["format_version"])


_TITLES = ("checkpoint", "run", "epoch", "step", "rows", "size", "file")


def _row(store: FeatureStore, digest: str, entry: CheckpointEntry | Damaged) -> Sequence[str]:
    """Return the line of a checkpoint."""
    size = size_text(size_of(store.root / "checkpoints" / digest))
    if isinstance(entry, Damaged):
        return digest[:DIGITS], "?", "?", "?", "damaged", size, "?"
    meta = entry.meta
    known = [str("-" if meta.get(name) is None else meta[name]) for name in ("run", "epoch", "global_step", "file")]
    rows = sum(map(len, entry.chunk_paths))
    return digest[:DIGITS], known[0][:8], known[1], known[2], f"{rows} of {store.n_train}", size, short(known[3], _FILE)


def _scores(store: FeatureStore) -> list[str]:
    """Return the table of saved scores."""
    rows = []
    for folder in score_folders(store):
        try:
            found = read_json(folder / INDEX)["info"]
            sizes = str(found["n_targets"]), str(len(found["checkpoints"]))
        except (Damaged, KeyError, TypeError):
            sizes = "damaged", "?"
        rows.append((short(folder.name, _NAME), *sizes, size_text(size_of(folder))))
    titles = ("scores", "targets", "checkpoints", "size")
    return [table([titles, *rows], right="targets checkpoints size")] if rows else []


def _targets(store: FeatureStore) -> list[str]:
    """Return how much is kept of targets."""
    folders = [path for path in listed(store.root / "targets") if path.is_dir()]
    size = size_text(size_of(store.root / "targets"))
    return [f"Features and scores of {count(len(folders), 'set')} of targets: {size}."] if folders else []


def _claims(store: FeatureStore) -> list[str]:
    """Return what living processes compute now."""
    held, unknown = [], 0
    for path, known in claimed(store).items():
        held += [path] if known else []
        unknown += not known
    lines = [f"At work now: {where}: {what}." for where, what in _by_place(store, held)]
    if unknown:
        lines.append(
            f"Whether {count(unknown, 'more lock')} in '{store.dirpath}' are held cannot be told: this process may not"
            " write there."
        )
    return lines


def _by_place(store: FeatureStore, locks: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the checkpoints, and the sets of targets, with what is computed there."""
    root = store.root
    places = {path: path.relative_to(root).parts[:2] for path in locks}
    for kind, name in Counter(places.values()):
        own = [path for path, place in places.items() if place == (kind, name)]
        chunks = [int(path.stem) for path in own if path.stem.isdecimal()]
        what = ["the curvature"] * (len(chunks) < len(own))
        if chunks:
            firsts = ", ".join(map(str, chunks[:_CLAIMS])) + ", ..." * (len(chunks) > _CLAIMS)
            what.append(f"{count(len(chunks), 'chunk')} of rows that begin with row {firsts}")
        yield f"{kind.removesuffix('s')} {name[:DIGITS]}", " and ".join(what)


def _advice(store: FeatureStore, checkpoints: dict[str, CheckpointEntry | Damaged]) -> list[str]:
    """Return what the user may do next."""
    damaged = sum(isinstance(entry, Damaged) for entry in checkpoints.values())
    lines = [f"Damaged: {count(damaged, 'checkpoint')}. {command('verify', store)} says why."] * (damaged > 0)
    found = leftovers(store)
    if found:
        size = size_text(sum(one.size for one in found))
        left = f"Left by processes that ended: {count(len(found), 'item')}, {size}."
        lines.append(f"{left} {command('clean', store)} deletes them.")
    return lines
