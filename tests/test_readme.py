"""The documents keep their word: Python blocks run, links lead somewhere, quoted messages and commands are real."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_trak.gradients import HooksEngine, ModelFunction, VmapEngine

pytestmark = pytest.mark.filterwarnings("ignore:.*val_dataloader.*", "ignore:.*`test_step`.*")

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
EXTERNAL = ("https://", "http://")


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


class TheirTask(L.LightningModule):
    """Stands for the README's task of torchgeo: batches are dictionaries."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def as_dictionaries(subset):
    return [{"image": image, "label": label} for image, label in subset]


def run(path, names):
    """Run the Python blocks of a document in their order, as one program."""
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), names)
    return names


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """What the README's blocks define, and the folder that they wrote into."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(README, {"TheirTask": TheirTask}), folder


def test_python_blocks_of_the_readme_run(readme, tmp_path):
    """What they define does what the text says."""
    names, _ = readme
    assert len(blocks(README, "python")) == 4
    assert names["attribution"].top(10).indices.shape == (50, 10)
    assert sorted(names["suspects"].indices.tolist()) == list(range(250))
    check_someone_elses_module(names, tmp_path)
    check_vae(names["VAE"]())


def check_someone_elses_module(names, path):
    train, targets = (as_dictionaries(names["Subset"](names["data"], range(*rows))) for rows in ((0, 40), (40, 45)))
    callback = names["TRAKCallback"](path / "theirs")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=path, callbacks=[callback])
    trainer.fit(names["Mine"](), DataLoader(train, 8))
    assert trainer.attribute(dataloaders=DataLoader(targets, 5)).scores.shape == (40, 5)


def check_vae(vae):
    """Its loss is what one would write: reconstruction error plus the Kullback–Leibler divergence."""
    x = torch.randn(5, 8)
    mean, log_variance = vae.encoder(x).chunk(2, 1)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1)).sum(1)
    expected = F.mse_loss(vae.decoder(mean), x, reduction="none").sum(1) + divergence
    torch.testing.assert_close(vae.per_sample_loss(x), expected)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != README], ids=lambda path: path.parent.name)
def test_python_blocks_of_other_documents_run(path, readme, monkeypatch):
    """They go on from those of the README, and define something; a document without blocks defines nothing."""
    names, folder = readme
    monkeypatch.chdir(folder)
    defined = run(path, {**names}).keys() - names.keys()
    assert bool(defined) == bool(blocks(path, "python"))


def test_the_rule_of_the_examples_is_right():
    """Against vmap, with positions and without."""
    names = {"torch": torch}
    (block,) = (block for block in blocks(ROOT / "examples" / "README.md", "python") if "@layer_rule" in block)
    exec(block, names)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = names["Scale"](3)

        def model_output(self, x):
            return self.scale(x).flatten(1).cos().sum(1)

    model = Model()
    for shape in ((4, 3), (4, 5, 3)):
        batch, found = torch.randn(shape), {}
        function = ModelFunction(model, model.state_dict(), ["scale.factor"])
        for kind in (HooksEngine, VmapEngine):
            engine = kind()
            engine.prepare(function, batch, 4)
            assert "modules" not in str(engine)
            engine(function, batch, 4, partial(_note, found, kind))
        torch.testing.assert_close(found[HooksEngine], found[VmapEngine])


def _note(found, kind, rows, name, gradient):
    found[kind] = gradient.dense()


def test_there_are_exactly_two_commands():
    assert [command.strip() for command in blocks(README, "bash")] == [
        'pip install -e ".[examples]" && python examples/digits.py',
        'pip install -e ".[dev]" && pytest',
    ]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


# ------------------------------------------------------------------------------------------------------ links


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links(path):
    return re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text()))


def anchors(path):
    """The names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path):
    """The links of a document that lead nowhere in the repository."""
    for link in links(path):
        if not link.startswith(EXTERNAL):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield link


def test_all_documents_are_known():
    here = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert here >= {
        "README.md",
        "CHANGELOG.md",
        "examples/README.md",
        "tests/benchmarks/README.md",
        "tests/benchmarks/quality/README.md",
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert list(broken(path)) == []


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "other.md").write_text("# It is: there!\n```\n# not here\n```\n")
    document = tmp_path / "document.md"
    document.write_text("[a](other.md#it-is-there) [b](other.md#not-here) [c](no.md) [d](#none) `[e](code.md)`")
    assert list(broken(document)) == ["other.md#not-here", "no.md", "#none"]


def test_the_readme_shows_one_small_picture():
    pictures = [link for link in links(README) if link.endswith((".png", ".svg"))]
    assert pictures == ["examples/digits.png"]
    assert (ROOT / pictures[0]).stat().st_size < 100_000


# --------------------------------------------------------------------------------------------------- messages


def texts_of_the_package():
    """Every string in the package but long docstrings; what is filled in stands as an ellipsis."""
    for path in (ROOT / "lightning_trak").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                yield node.value


def test_quoted_messages_are_in_the_source():
    section = README.read_text().split("## Troubleshooting\n")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^|]*)` \|", section, flags=re.MULTILINE)
    texts = list(texts_of_the_package())
    assert len(quoted) >= 8
    assert [message for message in quoted if not any(message in text for text in texts)] == []


# ----------------------------------------------------------------------------------------------------- tables


def rows(path, header):
    """The rows of all tables whose header begins so, as cells by column."""
    head = None
    for line in path.read_text().splitlines():
        if head is None and line.startswith(header):
            head = cells(line)
        elif head is not None and not line.startswith("|"):
            head = None
        elif head is not None and not line.startswith("|---"):
            yield dict(zip(head, cells(line), strict=True))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


BENCHMARKS = ROOT / "tests" / "benchmarks" / "README.md"


def test_the_quality_table_is_that_of_the_benchmark():
    table = rows(BENCHMARKS, "| task | checkpoints | ours |")
    measured = {row["task"]: row for row in table if row["checkpoints"] == "all of 1 run"}
    names = {"lightning_trak": "ours", "`traker`, best λ": "traker, best λ", "EK-FAC": "EK-FAC"}
    short = list(rows(README, "| task |"))
    assert [row["task"] for row in short] == list(measured)
    for row in short:
        assert row.pop("noise ceiling") == measured[row["task"]]["noise ceiling"]
        assert {names[name]: row[name] for name in names} == {
            name: measured[row["task"]][name].split(" ")[0] for name in names.values()
        }


def test_the_speed_table_is_that_of_the_benchmark():
    defaults = {"gradients": "auto", "projector": "auto"}
    speed = {row["model"]: row for row in rows(BENCHMARKS, "| model | gradients |") if defaults.items() <= row.items()}
    memory = {row["model"]: row for row in rows(BENCHMARKS, "| model | × a training step |")}
    short = list(rows(README, "| speed of"))
    assert len(short) >= 2
    for model, plain, traker, peak in (row.values() for row in short):
        assert (plain, traker) == (speed[model]["× plain forward + backward"], speed[model]["× traker"])
        assert peak == memory[model]["× a training step"]
