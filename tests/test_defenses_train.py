"""The training command: reproducible, honest about what it wrote, and only ever in the folder it was given."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch.nn import functional as F
from typer.testing import CliRunner

from assay import data
from assay.defenses import diffpure, smoothing, train
from assay.defenses.checkpoints import WEIGHTS, load_weights, read_manifest
from assay.defenses.denoiser import MixtureDenoiser, UNetDenoiser, digits_unet
from assay.defenses.networks import DigitsCNN


def run(names: list[str], out: Path, epochs: int = 1, seed: int = 0) -> dict[str, dict[str, Any]]:
    return train.train(names, out, seed, epochs, Console(file=io.StringIO()))


def test_one_network_alone_gets_the_weights_it_gets_among_all(tmp_path: Path) -> None:
    together = run(["undefended", "smoothing"], tmp_path / "together")
    alone = run(["smoothing"], tmp_path / "alone")
    other = run(["smoothing"], tmp_path / "other", seed=1)
    file = "digits/smoothing.safetensors"
    assert together[file] == alone[file]
    assert alone[file]["sha256"] != other[file]["sha256"]


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(["undefended"], tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_manifest_keeps_other_entries_and_tells_the_truth(tmp_path: Path) -> None:
    run(["undefended"], tmp_path)
    run(["denoiser"], tmp_path)
    entries = read_manifest(tmp_path)
    assert set(entries) == {"digits/undefended.safetensors", "digits/denoiser.safetensors"}
    for name, entry in entries.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == entry["sha256"]
        assert entry["recipe"]["epochs"] == 1
        assert entry["seed"] == 0
    denoiser = "digits/denoiser.safetensors"
    load_weights(UNetDenoiser(digits_unet()), tmp_path / denoiser, entries[denoiser]["sha256"])
    assert not list(tmp_path.rglob("*.partial"))


def test_a_short_training_learns_the_digits(tmp_path: Path) -> None:
    entries = run(["undefended"], tmp_path, epochs=5)
    assert entries["digits/undefended.safetensors"]["test"]["clean_accuracy"] > 0.85


def test_pgd_perturbs_inside_the_ball_and_raises_the_loss() -> None:
    x, y = data.load("digits", data.train_split("digits")[:64])
    network = DigitsCNN()
    entry = read_manifest()["digits/undefended.safetensors"]
    load_weights(network, WEIGHTS / "digits/undefended.safetensors", entry["sha256"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = train.pgd("1/5", 7)(network.requires_grad_(False), x, y)
    assert float((z - x).abs().max()) <= 0.2 + 1e-7
    assert 0 <= float(z.min()) <= float(z.max()) <= 1
    assert float(F.cross_entropy(network(z), y)) > 10 * float(F.cross_entropy(network(x), y))


def test_noise_error_of_an_exact_denoiser_is_its_closed_form() -> None:
    std = 0.3
    exact = MixtureDenoiser(torch.ones(1), torch.zeros(1, 1, 8, 8), torch.tensor([std]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        measured = train.noise_error(exact, exact.decode(std * torch.randn(2000, 1, 8, 8)))
    alpha_bars = exact.alpha_bars[50:401:50]
    # Of N(0, s²) data, eps keeps the variance ᾱs²/(ᾱs² + 1 − ᾱ).
    signal = alpha_bars * std**2
    assert measured == pytest.approx(float((signal / (signal + 1 - alpha_bars)).mean()), rel=0.02)


def test_the_packaged_weights_are_the_recipes() -> None:
    entries = read_manifest()
    assert {Path(name).stem for name in entries} == set(train.DIGITS)
    for name, entry in entries.items():
        assert entry["recipe"] == train.DIGITS[Path(name).stem].options
    assert entries[smoothing.DIGITS]["recipe"]["sigma"] == smoothing.SIGMA
    assert entries[diffpure.DENOISER]["test"]["noise_error"] < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "recipes for digits only"),
        (["digits", "--only", "smooting"], "Did you mean 'smoothing'"),
    ],
)
def test_bad_arguments_exit_with_two(arguments: list[str], message: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_it_wrote(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, ["digits", "--only", "undefended", "--epochs", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert "clean accuracy" in result.output
    assert set(json.loads((tmp_path / "manifest.json").read_text())["weights"]) == {"digits/undefended.safetensors"}


@pytest.mark.slow
def test_every_recipe_runs(tmp_path: Path) -> None:
    entries = run(list(train.DIGITS), tmp_path, epochs=2)
    assert len(entries) == len(train.DIGITS)
    assert entries["digits/adversarial_training.safetensors"]["test"]["clean_accuracy"] > 0.3


@pytest.mark.slow
def test_a_denoiser_learns_and_ends_on_its_average() -> None:
    x, _ = data.load("digits", data.train_split("digits"))
    steps: list[None] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (UNetDenoiser(digits_unet()) for _ in range(2))
        before = {key: value.clone() for key, value in second.state_dict().items()}
        train.fit_denoiser(first, x, lambda: steps.append(None), epochs=15, ema=0.9)
        assert train.noise_error(first, x) < 0.5
        # An average that forgets nothing stays where it began, wherever training went.
        train.fit_denoiser(second, x[:64], lambda: None, epochs=2, ema=1.0)
    assert len(steps) == 15
    assert all(torch.equal(before[key], value) for key, value in second.state_dict().items())
