"""The file: data, style and script in one HTML document, which reaches for nothing outside and runs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_trak.results.numbers import number_text
from lightning_trak.results.report.content import Known, content
from lightning_trak.results.report.data_set import LABEL, PREDICTION, texts
from lightning_trak.results.report.drawing import Drawing, Render
from lightning_trak.results.report.suspects import ListedSuspects
from lightning_trak.results.report.trust import bars, cautions, checkpoints, curve, facts, headline
from lightning_trak.results.sides import of_sign
from lightning_trak.results.values import label_text, value_text
from lightning_trak.store.files import atomically
from lightning_trak.store.remote import RemotePath, path_of, writable

_CHUNK = 2**18  # characters of drawings that the browser reads at a time
_TITLE = "Data attribution"


def write_report(
    path: str | os.PathLike[str] | RemotePath,
    known: Known,
    train: Any,
    targets: Any,
    *,
    render: Render | None,
    suspects: Any,
    evaluation: Any,
    title: str | None,
) -> Path:
    """Write the report; see `Attribution.report`."""
    check_html("path", path)
    file = writable(path_of(path))
    found = None if suspects is None else ListedSuspects(suspects, known.train)
    page = page_of(known, content(known, train, targets, render, found), evaluation, title or _TITLE)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomically(file) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))  # half of a surrogate pair has no UTF-8
    return file


def check_html(argument: str, path: str | os.PathLike[str] | RemotePath) -> None:
    """Raise a ValueError that names the argument unless a path is one of an HTML file."""
    if not str(path).lower().endswith((".html", ".htm")):
        raise ValueError(f"{argument} must end in .html, so that browsers open it; got '{path}'.")


def page_of(known: Known, shown: Mapping[str, Any], evaluation: Any, title: str) -> str:
    """Return the document."""
    environment = _environment()
    sources = {name: _source(environment, f"report.{name}") for name in ("css", "js")}
    titles, rows = checkpoints(known.info)
    drawn = list(_chunks(shown["drawn"]))
    firsts = [first for first, _ in drawn]
    return environment.get_template("report.html").render(
        title=title,
        policy=_policy(sources),
        style=sources["css"],
        script=sources["js"],
        headline=headline(known.info),
        data=in_script({**{name: value for name, value in shown.items() if name != "drawn"}, "firsts": firsts}),
        drawn=[text for _, text in drawn],
        suspects=shown["suspects"] is not None,
        self_influence=shown["suspects"] is not None and shown["suspects"]["self_influence"],
        facts=facts(known.info),
        checkpoint_titles=titles,
        checkpoint_rows=rows,
        curve=None if known.convergence is None or not known.convergence[0] else curve(known.convergence),
        bars=None if evaluation is None else bars(evaluation),
        slope=None if evaluation is None else number_text(float(evaluation.slope)),
        cautions=cautions(known.info, known.convergence, evaluation, partial=known.partial),
    )


def notebook_page(known: Known) -> str:
    """Return a small table of those targets whose scores are known, for notebooks: without script or data."""
    sides = of_sign(known.top, 1), of_sign(known.bottom, -1)
    targets, ids = known.targets, known.train.ids
    rows = []
    for target in range(len(known.top.indices)):
        columns = [targets.columns[name][target] if name in targets.columns else None for name in (LABEL, PREDICTION)]
        output = None if known.outputs is None else known.outputs[target].item()
        examples = [
            [(name_of(ids[row]), number_text(score, signed=True)) for row, score in side[target]] for side in sides
        ]
        rows.append((name_of(targets.ids[target]), [*texts(columns, label_text), *texts([output])], examples))
    return (
        _environment()
        .get_template("notebook.html")
        .render(headline=headline(known.info), rows=rows, left_out=len(targets) - len(rows))
    )


def name_of(identity: str | int) -> str:
    """Return an id as it is shown: a number as #3."""
    return value_text(identity) if isinstance(identity, str) else f"#{identity}"


def in_script(value: Any) -> Markup:
    r"""Return JSON that may stand in a script element: nothing in it ends the element, or begins a comment.

    >>> print(in_script({"id": "</script><!--\u2028"}))
    {"id":"\u003c/script\u003e\u003c!--\u2028"}
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _chunks(drawn: Sequence[Sequence[Drawing]]) -> Iterator[tuple[int, Markup]]:
    """Yield drawings in parts of about equal length, each with the place of its first: few are needed at once."""
    first, texts, length = 0, [], 0
    for place, drawings in enumerate(drawn):
        texts.append(in_script(drawings))
        length += len(texts[-1])
        if length >= _CHUNK or place == len(drawn) - 1:
            yield first, Markup("[{}]").format(Markup(",").join(texts))
            first, texts, length = place + 1, [], 0


def _policy(sources: Mapping[str, str]) -> str:
    """Return what the browser allows the document: this script, this style and images in it, and nothing else."""
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in sources.items()
    }
    return (
        f"default-src 'none'; script-src 'sha256-{digests['js']}'; style-src 'sha256-{digests['css']}'; img-src data:;"
        " base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("lightning_trak.results.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(environment: Environment, name: str) -> Markup:
    """Return style or script of the package, which is written into the document as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])
