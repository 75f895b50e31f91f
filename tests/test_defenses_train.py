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
from assay.defenses import diffpure, fitting, recipes, smoothing, train
from assay.defenses.checkpoints import WEIGHTS, load_weights, read_manifest
from assay.defenses.denoiser import EDMDenoiser, ScoreDenoiser, UNetDenoiser, decode, small_unet
from assay.defenses.mixture import MixtureDenoiser
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
    load_weights(UNetDenoiser(small_unet()), tmp_path / denoiser, entries[denoiser]["sha256"])
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
        z = fitting.pgd("1/5", 7)(network.requires_grad_(False), x, y)
    assert float((z - x).abs().max()) <= 0.2 + 1e-7
    assert 0 <= float(z.min()) <= float(z.max()) <= 1
    assert float(F.cross_entropy(network(z), y)) > 10 * float(F.cross_entropy(network(x), y))


def test_noise_error_of_an_exact_denoiser_is_its_closed_form() -> None:
    std = 0.3
    exact = MixtureDenoiser(torch.ones(1), torch.zeros(1, 1, 8, 8), torch.tensor([std]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = decode(std * torch.randn(2000, 1, 8, 8))
        measured = recipes.noise_error(exact, images, torch.zeros(2000))["noise_error"]
    sigmas = exact.schedule.sigmas[50:401:50]
    # Of N(0, s²) data, the noise keeps the variance s²/(s² + σ²).
    assert measured == pytest.approx(float((std**2 / (std**2 + sigmas**2)).mean()), rel=0.02)


def test_the_packaged_weights_are_the_recipes() -> None:
    entries = {name: entry for name, entry in read_manifest().items() if name.startswith("digits/")}
    assert {Path(name).stem for name in entries} == set(recipes.DIGITS)
    for name, entry in entries.items():
        assert entry["recipe"] == recipes.DIGITS[Path(name).stem].options
    assert entries[smoothing.DIGITS]["recipe"]["sigma"] == smoothing.SIGMA
    assert entries[diffpure.DENOISER]["test"]["noise_error"] < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet"], "recipes for digits and cifar10"),
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
    entries = run(list(recipes.DIGITS), tmp_path, epochs=2)
    assert len(entries) == len(recipes.DIGITS)
    assert entries["digits/adversarial_training.safetensors"]["test"]["clean_accuracy"] > 0.3


@pytest.mark.slow
def test_a_denoiser_learns_and_ends_on_its_average() -> None:
    x, y = data.load("digits", data.train_split("digits"))
    steps: list[None] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = (UNetDenoiser(small_unet()) for _ in range(2))
        before = {key: value.clone() for key, value in second.state_dict().items()}
        fitting.fit_denoiser(first, x, y, lambda: steps.append(None), epochs=15, ema=0.9)
        assert recipes.noise_error(first, x, y)["noise_error"] < 0.5
        # An average that forgets nothing stays where it began, wherever training went.
        fitting.fit_denoiser(second, x[:64], y[:64], lambda: None, epochs=2, ema=1.0)
    assert len(steps) == 15
    assert all(torch.equal(before[key], value) for key, value in second.state_dict().items())


def test_trades_penalises_the_divergence_that_its_attack_raises() -> None:
    x, y = data.load("digits", data.train_split("digits")[:128])
    gaps = []
    for beta in (0.0, 6.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = DigitsCNN(width=8)
            fitting.fit_trades(network, x, y, lambda: None, epochs=60, eps="1/10", steps=3, beta=beta)
            z = fitting.pgd("1/10", 5)(network, x, y)
            logits = network(z).log_softmax(1)
            gaps.append(float(F.kl_div(logits, network(x).softmax(1), reduction="batchmean").detach()))
    assert gaps[1] < 0.7 * gaps[0]


def test_score_matching_finds_the_score_of_a_gaussian() -> None:
    std = 0.5

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.slope * x

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = decode(std * torch.randn(4096, 1, 2, 2))
        denoiser = ScoreDenoiser(Linear(), (0.5, 0.5001))
        fitting.fit_score(denoiser, x, torch.zeros(4096), lambda: None, epochs=70, ema=0.0)
    # s(x, σ) = −x/(s² + σ²), so f = σ·s has the slope −σ/(s² + σ²) = −1.
    assert float(denoiser.network.slope.detach()) == pytest.approx(-1, abs=0.03)


def test_heads_are_trained_on_their_own_classes() -> None:
    class Constant(torch.nn.Module):
        """Predicts an image of one value a head, whatever it sees."""

        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (self.values[None, :, None, None].expand(len(x), 3, 2, 2),)

    y = torch.arange(512) % 2
    x = (0.25 + 0.5 * y)[:, None, None, None].expand(512, 1, 2, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = EDMDenoiser(Constant(), n_classes=2, sigma_range=(3.99, 4.01))
        fitting.fit_heads(denoiser, x, y, lambda: None, epochs=500, ema=0.0, mean=1.386, std=0.001)
    noised = 4 * torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    heads = denoiser.heads(noised, 4.0).mean((0, 2, 3, 4))
    # Pixels .25 and .75 are −.5 and .5; what all heads keep of the input averages out.
    assert heads.tolist() == pytest.approx([-0.5, 0.5, 0.0], abs=0.1)
