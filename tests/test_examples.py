"""The examples run as a user runs them, in a smaller setting."""

from __future__ import annotations

import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lightning_trak import FeatureStore
from tests.influence.test_scores import traker_scores

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_digits(tmp_path):
    command = [sys.executable, EXAMPLES / "digits.py", "--epochs", "15", "--runs", "1", "--output", tmp_path]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "digits.png").stat().st_size > 20_000
    assert len(re.findall(r"most helpful: #\d+ \(a \d", result.stdout)) == 4
    assert len(re.findall(r"most harmful: #\d+ \(a \d", result.stdout)) == 4
    found = re.search(r"(\d+) of the 140 planted mislabels .* \(AUROC (\d\.\d+)\)", result.stdout)
    assert int(found[1]) >= 100
    assert float(found[2]) > 0.9
    assert len(re.findall(r"#\d+ is labelled \d, it is a \d", result.stdout)) == int(found[1])
    before, after, left = re.search(r"(\d+\.\d) % with all, (\d+\.\d) % with the (\d+) that", result.stdout).groups()
    assert min(float(before), float(after)) > 85  # one training alone does not tell which is better
    assert int(left) == 1260
    assert "probably mislabelled" in (tmp_path / "digits.html").read_text(encoding="utf-8")


def test_cifar_quickstart(tmp_path):
    script = [sys.executable, EXAMPLES / "cifar_quickstart.py", "--output", tmp_path]
    smaller = {"n-train": 200, "n-test": 50, "width": 6, "batch-size": 20, "epochs": 8}
    smaller |= {"runs": 2, "subsets": 10, "repeats": 1}
    options = [f"--{name}={value}" for name, value in smaller.items()]
    result = subprocess.run([*script, *options], check=True, capture_output=True, text=True)
    assert (tmp_path / "cifar_quickstart.png").stat().st_size > 20_000
    assert len(re.findall(r"run \d: test accuracy", result.stdout)) == 2
    same = re.search(r"images (\d+\.\d)% show the target's own shape \(chance (\d+\.\d)%\)", result.stdout)
    assert float(same[1]) > 2 * float(same[2])
    lds = re.search(r"  scores +(-?\d\.\d+)  \(95 %", result.stdout)
    random = re.search(r"  random scores +(-?\d\.\d+)", result.stdout)
    assert float(lds[1]) > float(random[1]) + 0.1


@pytest.fixture
def cifar(tmp_path):
    """A folder in CIFAR-10's format, whose cats are reddish and whose dogs bluish; the pixels of the first file."""
    random, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(5, 0, -1))):
        labels = random.permutation(np.arange(60) % 10)
        pixels = random.integers(0, 128, (60, 3, 1024), dtype=np.uint8)
        pixels[labels == 3, 0] += 100
        pixels[labels == 5, 2] += 100
        content = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": pixels.reshape(60, 3072)}
        (folder / name).write_bytes(pickle.dumps(content))
    return folder, pixels, labels


def test_cifar_is_read(cifar):
    folder, pixels, labels = cifar
    read_cifar = functions("cifar_quickstart.py")["read_cifar"]
    images, classes = read_cifar([folder / "data_batch_1", folder / "data_batch_2"], (3, 5), 20)
    assert images.shape == (20, 3, 32, 32)
    chosen = np.isin(labels, (3, 5))
    assert torch.equal(images[:12], torch.tensor(pixels[chosen].reshape(12, 3, 32, 32)) / 255)
    assert classes[:12].tolist() == (labels[chosen] == 5).tolist()
    assert torch.equal(images[:, 2].mean((1, 2)) > images[:, 0].mean((1, 2)), classes == 1)


def test_cifar_quickstart_on_cifar(cifar, tmp_path):
    script = [sys.executable, EXAMPLES / "cifar_quickstart.py", "--output", tmp_path, "--cifar", cifar[0]]
    smaller = {"width": 4, "batch-size": 20, "epochs": 2, "runs": 1, "subsets": 2, "repeats": 1}
    options = [f"--{name}={value}" for name, value in smaller.items()]
    result = subprocess.run([*script, *options], check=True, capture_output=True, text=True)
    assert "Attribution of 60 training examples for 12 targets: 2 checkpoints" in result.stdout
    assert (tmp_path / "cifar_quickstart.png").stat().st_size > 20_000


def test_cifar_is_not_there(cifar):
    folder, _, _ = cifar
    (folder / "data_batch_4").unlink()
    with pytest.raises(SystemExit, match=r"folder cifar-10-batches-py: '.*' is without data_batch_4\.$"):
        functions("cifar_quickstart.py")["cats_and_dogs"](folder, 10, 10, 10)


def test_clip(tmp_path):
    command = [sys.executable, EXAMPLES / "clip.py", "--epochs", "9", "--output", tmp_path]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "clip.png").stat().st_size > 20_000
    assert len(re.findall(r"most (?:helpful|harmful):\n(?:    [+-]\d\.\d\d  #\d+ “.*\n){4}", result.stdout)) == 8
    same = re.search(r"pairs (\d+\.\d)% show the target's own digit \(chance (\d+\.\d)%\)", result.stdout)
    assert float(same[1]) > 5 * float(same[2])
    found = re.search(r"(\d+) of the 40 swapped captions .* AUROC (\d\.\d+), ", result.stdout)
    assert int(found[1]) >= 15
    assert float(found[2]) > 0.9
    assert len(re.findall(r"#\d+ “.*”: the image is of \w+", result.stdout)) == int(found[1])


def test_language_model(tmp_path):
    command = [
        sys.executable,
        EXAMPLES / "language_model.py",
        "--epochs",
        "4",
        "--n-train",
        "200",
        "--output",
        tmp_path,
    ]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(re.findall(r"\ntarget \d+: .*\n  completion: .*\n(?:  #\d+ \([+-].*\n){3}", result.stdout)) == 3
    first = re.search(r"the first for (\d+) of 40 targets \(by chance: 0.20\)", result.stdout)
    among = re.search(r"the first 5 for (\d+) of 40 targets \(by chance: 1.00\)", result.stdout)
    assert int(first[1]) >= 25
    assert int(among[1]) >= int(first[1])


def test_language_model_on_a_text(tmp_path):
    (tmp_path / "text").write_text("It is a short text.")
    command = [sys.executable, EXAMPLES / "language_model.py", "--text", tmp_path / "text", "--output", tmp_path]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "There are 0 training passages of 48 words; at least 40 are needed." in result.stderr


def test_language_model_of_other_passages(tmp_path):
    smaller = ["--epochs", "1", "--n-train"]
    assert numbers("language_model.py", r"among (60) passages", tmp_path, *smaller, "60")
    assert numbers("language_model.py", r"among (50) passages", tmp_path, *smaller, "50")


@pytest.mark.parametrize("content", [None, b"caf\xe9"])
def test_language_model_of_no_text(tmp_path, content):
    if content:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(SystemExit, match="--text must be a text file in UTF-8: '.*text' cannot be read"):
        functions("language_model.py")["read"](tmp_path / "text")


def test_bert_text_classification(tmp_path):
    script = EXAMPLES / "bert_text_classification.py"
    command = [sys.executable, script, "--epochs", "4", "--n-train", "1600", "--output", tmp_path]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(re.findall(r"\ntest pair \d+: .*\n(?:  most helpful: #\d+ \([+-].*\n){3}", result.stdout)) == 3
    found = re.search(r"(\d+) of the \d+ .* \(by chance: (\d+\.\d)\); AUROC (\d\.\d+)", result.stdout)
    assert int(found[1]) > 1.5 * float(found[2])
    assert float(found[3]) > 0.68


def test_bert_of_too_few_pairs():
    example = functions("bert_text_classification.py")
    pairs = [(f"the first of {row}", "the second", row % 2) for row in range(30)]
    tokenizer = example["train_tokenizer"]([first for first, _, _ in pairs])
    data = example["PairData"](pairs, tokenizer, n_train=20, n_test=10, max_length=8)
    assert (len(data.train_set), len(data.test_set)) == (20, 10)
    with pytest.raises(SystemExit, match=r"There are 30 pairs, 10 of them for the test: .* at most 20, got 21\."):
        example["PairData"](pairs, tokenizer, n_train=21, n_test=10, max_length=8)


def test_custom_task(tmp_path):
    found, of, _, area = numbers(
        "custom_task.py", r"(\d+) of the (\d+) wrong .* first (\d+) .*AUROC (\d\.\d+)", tmp_path
    )
    assert found >= of / 2
    assert area > 0.9
    (other,) = numbers("custom_task.py", r"AUROC (\d\.\d+)", tmp_path, "--epochs", "1")
    assert other != area  # the ten checkpoints are left alone


def test_from_traker(tmp_path):
    pattern = r"estimator of traker: (\d+\.\d) %\n +the default: (\d+\.\d) %"
    theirs, ours = numbers("from_traker.py", pattern, tmp_path, "--epochs", "5", "--networks", "2")
    assert theirs > 20
    assert ours > 50


def test_ported_scores_are_those_of_traker(tmp_path):
    """At one checkpoint, where traker's division of H⁻¹ changes no rank; λ is that of gradients divided by √p there."""
    example = functions("from_traker.py")
    data = example["Digits"]()
    state = example["train"](data, epochs=2, seed=0)
    checkpoints = example["port"]([state], tmp_path)
    ours = example["attribute"](data, checkpoints, tmp_path / "store", "trak")
    (entry,) = FeatureStore(tmp_path / "store")
    lambda_reg = ours.info.dampings[0] * np.square(entry.features).sum() / entry.features.shape[1] ** 2
    network = example["make_network"]().eval()
    train, targets = data.train_set.tensors, data.test_set[:20]
    theirs = traker_scores(tmp_path / "traker", network, [state], train, targets, lambda_reg)
    assert min(spearmanr(theirs[:, j], ours.scores[:, j]).statistic for j in range(20)) > 0.998


def test_tabular_regression(tmp_path):
    pattern = r"AUROC of (\d\.\d+).*scores +(\d\.\d+) .*random scores +(-?\d\.\d+)"
    area, lds, random = numbers("tabular_regression.py", pattern, tmp_path, "--subsets", "8")
    assert area > 0.6
    assert lds > 0.5 > random
    assert (tmp_path / "tabular_regression.png").stat().st_size > 10_000


def test_tabular_regression_of_a_table(tmp_path):
    rows = ["a,b,price", *(f"{i % 7},{i % 5},{2 * (i % 7) - i % 5}" for i in range(80))]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    options = ["--csv", tmp_path / "table.csv", "--target", "price", "--subsets", "2", "--epochs", "2"]
    numbers("tabular_regression.py", r"(6) of (60) train labels", tmp_path, *options)
    numbers("tabular_regression.py", r"(6) of (60) train labels", tmp_path, *options, "--epochs", "3")
    assert len(list(tmp_path.glob("tabular_regression/*/retraining/runs/*.safetensors"))) == 4  # two for each setting


@pytest.fixture
def table(tmp_path):
    """Writes a table, and returns what the example reads there."""
    read = functions("tabular_regression.py")["read"]

    def write_and_read(*columns, target="house price"):
        path = tmp_path / "table.csv"
        header = ("size", "house price", "district", "year")
        path.write_text("\n".join(", ".join(map(str, row)) for row in [header, *zip(*columns, strict=True)]))
        return read(path, target)

    return write_and_read


SIZE, PRICE, DISTRICT = range(60), range(100, 160), [row % 7 for row in range(60)]


def test_tabular_regression_drops_constant_columns(table):
    x, y, columns = table(SIZE, PRICE, DISTRICT, [2020] * 60)
    assert columns == ["size", "district"]
    assert np.array_equal(x, np.stack([SIZE, DISTRICT], 1))
    assert np.array_equal(y, PRICE)
    with pytest.raises(SystemExit, match="target or all other columns are constant"):
        table(SIZE, [1] * 60, DISTRICT, SIZE)
    with pytest.raises(SystemExit, match="target or all other columns are constant"):
        table([1] * 60, PRICE, [2] * 60, [3] * 60)


def test_tabular_regression_names_what_is_no_number(table):
    year = [*range(5), "", *range(54)]
    with pytest.raises(SystemExit, match=r"'district': 60 rows, first in line 2; 'year': 1 rows, first in line 7\."):
        table(SIZE, PRICE, ["north"] * 60, year)
    with pytest.raises(SystemExit, match=r"numbers alone.*: 'size': 1 rows, first in line 61\."):
        table([*range(59), "inf"], PRICE, DISTRICT, SIZE)


def test_tabular_regression_names_the_columns(table):
    with pytest.raises(SystemExit, match=r"got 'price'\. There are: size, house price, district, year\."):
        table(SIZE, PRICE, DISTRICT, SIZE, target="price")


def test_tabular_regression_of_no_table(table, tmp_path):
    with pytest.raises(SystemExit, match="has 10 rows; at least 40 are needed"):
        table(*[range(10)] * 4)
    read = functions("tabular_regression.py")["read"]
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name in ("missing", "empty", "latin"):
        with pytest.raises(SystemExit, match="--csv must be a table in UTF-8 with a header: .* cannot be read"):
            read(tmp_path / name, "target")


def functions(script):
    """Return what an example defines."""
    return runpy.run_path(str(EXAMPLES / script))


def numbers(script, pattern, output, *options):
    """Run an example, and return the numbers that it printed."""
    command = [sys.executable, EXAMPLES / script, "--output", output, *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in re.search(pattern, result.stdout, re.DOTALL).groups()]
