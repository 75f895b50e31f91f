"""The recipes of CIFAR-10 at toy size: they learn, resume to the bit, and write nothing that fails its smoke test."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from PIL import Image
from pyarrow import parquet
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from assay.defenses import (
    augment,
    cifar10_split,
    conditional,
    diffpure,
    fitting_cifar10,
    train,
    variants,
    variational_smoothing,
    weight_files,
)
from assay.defenses.checkpoints import WEIGHTS, load_weights, read_manifest
from assay.defenses.conditional import LabelledDenoiser
from assay.defenses.denoiser import ScoreDenoiser, encode
from assay.defenses.networks_cifar10 import NarrowResNet18, labelled_unet
from assay.defenses.recipes_cifar10 import CIFAR10
from assay.defenses.train_cifar10 import LARGEST, train_cifar10
from assay.defenses.training import Plan
from assay.errors import AssayError, InputError
from assay.noise import Noise


class Interruption(Exception):
    """Stands for whatever ends a process."""


def write_parquet(path: Path, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
    """The hub's layout: a struct of compressed bytes and a path, and the label."""
    rows = []
    for image in pixels:
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        rows.append({"bytes": png.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    parquet.write_table(pa.table({"img": pa.array(rows, kind), "label": pa.array(labels.tolist())}), path)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """80 smooth images, brighter the higher their label, and their labels."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 80)
    coarse = 20 * labels[:, None, None, None] + random.integers(0, 50, (80, 4, 4, 3))
    return coarse.repeat(8, 1).repeat(8, 2).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data_root(
    drawn: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("data")
    for i, rows in enumerate((slice(0, 50), slice(50, 80))):
        path = root / "cifar10" / "plain_text" / f"train-{i:05d}-of-00002.parquet"
        write_parquet(path, drawn[0][rows], drawn[1][rows])
    return root


@pytest.fixture
def toy_data(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_DATA", str(data_root))
    return data_root


def run(names: list[str], out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    options = {"toy": True, "device": "cpu", "console": Console(file=io.StringIO()), **options}
    return train_cifar10(names, out, **options)


@pytest.fixture(scope="module")
def trained(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all recipes were trained at toy size."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_DATA", str(data_root))
        run(list(CIFAR10), out)
    return out


def log_of(out: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "cifar10" / f"{name}.log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CIFAR10)
def test_every_recipe_lowers_its_loss(trained: Path, name: str) -> None:
    lines = log_of(trained, name)
    assert lines[-1]["loss"] < 0.97 * lines[0]["loss"]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] == CIFAR10[name].toy_plan.steps
    assert all(line["rate"] >= 0 and line["images_per_second"] > 0 for line in lines)


@pytest.mark.parametrize("name", CIFAR10)
def test_files_are_16_bit_and_load_strictly(trained: Path, name: str) -> None:
    path = trained / "cifar10" / f"{name}.safetensors"
    entry = read_manifest(trained)[f"cifar10/{name}.safetensors"]
    content = path.read_bytes()
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert entry["bytes"] == len(content) <= LARGEST
    state = cifar10_split.load_file(path)
    assert {value.dtype for value in state.values()} == {torch.float16}
    network = CIFAR10[name].toy()
    load_weights(network, path, entry["sha256"])
    loaded = network.state_dict()
    for key, value in state.items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], value.float())


def test_the_manifest_says_how_and_what(trained: Path) -> None:
    entries = read_manifest(trained)
    assert set(entries) == {f"cifar10/{name}.safetensors" for name in CIFAR10}
    for file, entry in entries.items():
        recipe = CIFAR10[Path(file).stem]
        assert entry["recipe"]["toy"] is True
        assert entry["recipe"]["batch"] == recipe.toy_plan.batch
        assert (entry["seed"], entry["device"], entry["precision"]) == (0, "cpu", "float32")
        assert entry["torch"] == torch.__version__
        assert entry["steps"] == recipe.toy_plan.steps
        assert entry["seconds"] > 0
        if recipe.floor is None:
            assert sum(key.startswith("psnr_noisy_") for key in entry["test"]) == 3
        else:
            assert 0 <= entry["test"]["clean_accuracy"] <= 1


def test_a_finished_training_leaves_its_three_files_and_is_left_alone(trained: Path, toy_data: Path) -> None:
    names = {path.name for path in (trained / "cifar10").iterdir()}
    assert names == {f"{name}{end}" for name in CIFAR10 for end in (".safetensors", ".log.jsonl")}
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    entries = run(["trades", "score"], trained)
    assert entries["cifar10/trades.safetensors"] == read_manifest(trained)["cifar10/trades.safetensors"]
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Training ends by an exception in its n-th writing of a checkpoint, in the middle of it."""
    count = 0
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        nonlocal count
        count += target.suffix == ".resume"
        if count == at:
            raise Interruption
        real(source, target)

    monkeypatch.setattr(weight_files.os, "replace", failing)


@pytest.mark.parametrize("name", ["noise_classifier", "score", pytest.param("trades", marks=pytest.mark.slow)])
def test_an_interrupted_training_ends_on_the_same_bits(
    trained: Path, toy_data: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in (1, 3):
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            with pytest.raises(Interruption):
                run([name], tmp_path, save_every=0)
        # The first interruption left no checkpoint, and no half of one under its name.
        assert (tmp_path / "cifar10" / f".{name}.resume").exists() == (at == 3)
        assert not list(tmp_path.rglob("*.safetensors"))
        assert not (tmp_path / "manifest.json").exists()
    run([name], tmp_path)
    file = f"cifar10/{name}.safetensors"
    assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()
    # The log has every step once, though steps after the last checkpoint were taken twice.
    logged, whole = ([(line["step"], line["loss"]) for line in log_of(out, name)] for out in (tmp_path, trained))
    assert logged == whole


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files_that_training_goes_on_from(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "assay.defenses.train", "cifar10", "--toy", "--only", "diffusion"]
    command += ["--out", str(tmp_path), "--device", "cpu", "--save-every", "0"]
    checkpoint = tmp_path / "cifar10" / ".diffusion.resume"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert checkpoint.exists()
    assert torch.load(checkpoint, weights_only=True)["step"] > 0
    assert not list(tmp_path.rglob("*.safetensors"))
    run(["diffusion"], tmp_path)
    file = "cifar10/diffusion.safetensors"
    assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()


def test_a_checkpoint_of_another_training_is_refused(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interruption):
            run(["score"], tmp_path, save_every=0)
    with pytest.raises(InputError, match=r"another training \(its seed differ\)"):
        run(["score"], tmp_path, seed=1)
    (tmp_path / "cifar10" / ".score.resume").write_bytes(b"half")
    with pytest.raises(InputError, match="not a checkpoint"):
        run(["score"], tmp_path)


def backwards(denoiser: ScoreDenoiser, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Teaches a score to point away from the image."""
    z = augment.normal(x, generator)
    return F.mse_loss(denoiser.network(encode(x) + 0.3 * z), z)


def test_a_denoiser_that_does_not_denoise_is_not_written(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CIFAR10, "score", replace(CIFAR10["score"], loss=backwards))
    with pytest.raises(InputError, match=r"score fails its smoke test: the denoiser doesn't denoise"):
        run(["score"], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "manifest.json").exists()


def test_a_classifier_below_its_floor_is_not_written(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*given: object) -> dict[str, float]:
        return {"clean_accuracy": float("nan")}

    monkeypatch.setitem(CIFAR10, "noise_classifier", replace(CIFAR10["noise_classifier"], measure=nothing))
    with pytest.raises(InputError, match="noise_classifier fails its smoke test"):
        run(["noise_classifier"], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    for name, recipe in CIFAR10.items():
        if recipe.floor is not None:
            with pytest.raises(InputError, match="expected at least"):
                recipe.check(NarrowResNet18(4), torch.zeros(8, 3, 32, 32), {"clean_accuracy": 0.2}, toy=False)
            assert recipe.floor > 0.3, name


def test_a_training_that_diverges_says_so(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(denoiser: ScoreDenoiser, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return denoiser.network(x).square().mean() * float("inf")

    monkeypatch.setitem(CIFAR10, "score", replace(CIFAR10["score"], loss=infinite))
    with pytest.raises(AssayError, match="diverged"):
        run(["score"], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_that_is_too_large_is_not_written(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.defenses.train_cifar10.LARGEST", 1000)
    with pytest.raises(InputError, match="at most 1000 are allowed"):
        run(["score"], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_networks_of_the_package_are_small_enough() -> None:
    with torch.device("meta"):
        sizes = [sum(2 * v.numel() for v in recipe.build().state_dict().values()) for recipe in CIFAR10.values()]
    # A safetensors file adds a header of some kilobytes.
    assert max(sizes) < LARGEST - 100_000
    assert sum(sizes) < 60e6


def test_labels_are_dropped_and_what_is_dropped_trains_the_branch_without() -> None:
    y = torch.arange(1000) % 10
    dropped = fitting_cifar10.drop_labels(y, 0.2, 10, torch.Generator().manual_seed(0))
    assert 0.15 < float((dropped == 10).double().mean()) < 0.25
    assert torch.equal(dropped[dropped < 10], y[dropped < 10])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = LabelledDenoiser(labelled_unet((8, 16), 1, 8))
    x, labels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 2])
    moved = {}
    for drop in (0.0, 1.0):
        denoiser.zero_grad()
        generator = torch.Generator().manual_seed(0)
        fitting_cifar10.diffusion(denoiser, x, labels, generator, mean=-1.2, std=1.2, drop=drop).backward()
        gradient = denoiser.network.class_embedding.weight.grad
        moved[drop] = gradient.abs().sum(1).nonzero().flatten().tolist()
    assert moved == {0.0: [0, 1, 2], 1.0: [10]}


def test_a_labelled_denoiser_answers_with_and_without_a_class() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = LabelledDenoiser(labelled_unet((8, 16), 1, 8)).eval().requires_grad_(False)
    x = encode(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    each = denoiser.denoise_each(x, 0.5)
    assert each.shape == (2, 10, 3, 32, 32)
    some = denoiser.denoise_some(x, torch.tensor([0.5, 0.5]), torch.tensor([[3, 7], [9, 0]]))
    torch.testing.assert_close(some[1], each[1, [9, 0]])
    without = denoiser.denoise(x, 0.5)
    torch.testing.assert_close(without, denoiser.predict(x, 0.5, torch.tensor([10, 10])))
    assert not torch.allclose(without, each[:, 0])
    # The preconditioning: without noise the image itself, with much of it next to nothing of the image.
    torch.testing.assert_close(denoiser.denoise(x, 1e-6), x, atol=1e-4, rtol=0)


def test_diffpure_takes_the_trained_model_where_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = LabelledDenoiser(labelled_unet((8, 16), 1, 8)).eval()
    file = tmp_path / "diffusion.safetensors"
    file.write_bytes(b"stands for the weights")
    monkeypatch.setattr(variants, "cifar10_denoiser", lambda: denoiser)
    monkeypatch.setattr(variants, "cifar10_files", lambda: {conditional.CIFAR10: file})
    defense = diffpure.load("cifar10", level=100, steps=2)
    assert set(defense.card.weights) == set(diffpure.weight_files("cifar10"))
    assert conditional.CIFAR10 in defense.card.weights
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert defense.eval()(x, Noise.from_seed(0, 2)).shape == (2, 10)


def test_variational_smoothing_takes_its_levels_from_what_training_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "selector.safetensors"
    file.write_bytes(b"stands for the weights")
    test = {"median_sigma": 0.4, "spread_of_log_sigma": 0.1}
    loaded: list[str] = []
    monkeypatch.setattr(variational_smoothing, "WEIGHTS", tmp_path.parent)
    monkeypatch.setattr(variational_smoothing, "CIFAR10", f"{tmp_path.name}/selector.safetensors")
    monkeypatch.setattr(variational_smoothing, "read_manifest", lambda: {variational_smoothing.CIFAR10: {"test": test}})
    monkeypatch.setattr(variational_smoothing, "load_packaged", lambda network, name: loaded.append(name))
    defense = variational_smoothing.load("cifar10", votes=3)
    assert loaded == [variational_smoothing.CIFAR10]
    assert defense.levels[0] == pytest.approx(0.4 * math.exp(-0.3), rel=5e-3)
    assert defense.levels[-1] == pytest.approx(0.4 * math.exp(0.3), rel=5e-3)
    assert variational_smoothing.load("cifar10", sigma_min=0.1).bounds == (0.1, defense.bounds[1])
    assert "from 0.296 to 0.54" in " ".join(defense.card.choices)
    assert set(defense.card.weights) == {variational_smoothing.CIFAR10}
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert defense.eval()(x, Noise.from_seed(0, 2)).shape == (2, 10)


def test_the_rate_rises_and_falls_and_the_average_forgets_its_start() -> None:
    plan = Plan(100, 10, 0.5, "sgd", warmup=0.1, half_life=1000)
    rates = [plan.rate_at(i / 100) for i in range(100)]
    assert 0 < rates[0] < 0.01
    assert rates.index(max(rates)) == 10
    assert max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert plan.kept(1) < 1e-5
    assert plan.kept(10_000) == 0.5 ** (10 / 1000)


def test_minutes_replace_steps(toy_data: Path, tmp_path: Path) -> None:
    entry = run(["score"], tmp_path, minutes=0.03)["cifar10/score.safetensors"]
    assert entry["seconds"] >= 1.8
    assert entry["recipe"]["minutes"] == 0.03
    assert entry["recipe"]["steps"] is None
    assert log_of(tmp_path, "score")[-1]["rate"] < 0.1 * CIFAR10["score"].toy_plan.rate


def test_crops_are_shifts_of_the_padded_image() -> None:
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changed = augment.crop_and_flip(x, torch.Generator().manual_seed(1), pad=2)
    assert changed.shape == x.shape
    padded = F.pad(torch.stack([x, x.flip(3)]), (2, 2, 2, 2))
    windows = padded.unfold(3, 8, 1).unfold(4, 8, 1)  # (2, n, c, 5, 5, 8, 8)
    found = (windows == changed[None, :, :, None, None]).flatten(5).all(5).all(2)  # (2, n, 5, 5)
    assert found.flatten(2).any(2).any(0).all()
    assert found.flatten(2).any(2).any(1).all()  # some are mirrored, some are not
    assert int(found.any(0).any(0).sum()) > 10


def test_the_training_split_is_read_in_order(
    toy_data: Path, drawn: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x, y = cifar10_split.read_split("train", 60)
    assert (x.shape, x.dtype, y.dtype) == ((60, 3, 32, 32), torch.uint8, torch.int64)
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), drawn[0][:60])
    assert y.tolist() == drawn[1][:60].tolist()
    with pytest.raises(InputError, match="80 images with the content digest"):
        cifar10_split.read_split("train")
    packed = tmp_path / "cifar10" / "plain_text"
    made = cifar10_split.pack(toy_data / "cifar10" / "plain_text", packed)
    assert [path.name for path in made] == [f"train-{i:05d}-of-00002.safetensors" for i in range(2)]
    monkeypatch.setenv("ASSAY_DATA", str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(cifar10_split.read_split("train", 60), (x, y), strict=True))
    with pytest.raises(InputError, match=r"test split is not in ASSAY_DATA=.*expected .*test-\*.parquet"):
        cifar10_split.read_split("test")


@pytest.mark.slow
@pytest.mark.parametrize(("split", "rows"), [("train", 50_000), ("test", 10_000)])
def test_the_real_splits_have_the_pinned_digests(split: Any, rows: int) -> None:
    folder = Path(os.environ.get("ASSAY_DATA", "")) / "cifar10" / "plain_text"
    if not any(folder.glob(f"{split}-*.parquet")):
        pytest.skip(f"ASSAY_DATA names no folder with CIFAR-10's {split} split")
    x, y = cifar10_split.read_split(split)
    assert len(x) == rows
    assert y.bincount().tolist() == [rows // 10] * 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: run(["trade"], out), "Did you mean 'trades'"),
        (lambda out: run(["score"], WEIGHTS), "toy weights are not for the package"),
        (lambda out: run(["score"], out, device="tpu"), "auto, cpu or cuda"),
        pytest.param(
            lambda out: run(["score"], out, device="cuda"),
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10", "--epochs", "3"], "--epochs is for digits"),
        (["digits", "--toy"], "are for cifar10"),
        (["cifar10", "--toy", "--minutes", "-1"], "must be positive"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(arguments: list[str], message: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_command_trains_and_says_what_it_wrote(toy_data: Path, trained: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, ["cifar10", "--toy", "--only", "score", "--out", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "psnr" in result.output
    file = "cifar10/score.safetensors"
    assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()
