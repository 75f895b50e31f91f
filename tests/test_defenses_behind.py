"""The options `classifier` and `denoiser` of purifiers: named classifiers, and networks that a user's code makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from assay import data
from assay.defenses import behind
from assay.defenses.behind import behind_files, take_classifier
from assay.defenses.checkpoints import packaged
from assay.digest import sha256_of_file
from assay.errors import InputError
from assay.noise import Noise
from assay.registry import DEFENSES, resolve_defense

PURIFIERS = (
    "diffpure",
    "gdmp",
    "likelihood_maximisation",
    "victim_guided",
    "robust_guidance",
    "denoised_smoothing",
    "adp",
)
ROBUST = "digits/adversarial_training.safetensors"

CODE = """
from assay.defenses.checkpoints import load_packaged
from assay.defenses.denoiser import Denoiser, UNetDenoiser, small_unet
from assay.defenses.networks import DigitsCNN

def robust():
    network = DigitsCNN()
    load_packaged(network, "digits/adversarial_training.safetensors")
    return network

def denoiser():
    made = UNetDenoiser(small_unet())
    load_packaged(made, "digits/denoiser.safetensors")
    return made

def untrained():
    return UNetDenoiser(small_unet())
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def _build(name: str, **options: str) -> Any:
    return resolve_defense(name, trust=True).build("digits", options=options)


def _logits(defense: Any) -> torch.Tensor:
    x, _ = data.load("digits", data.test_ids("digits")[:4])
    with torch.no_grad():
        found: torch.Tensor = defense.draw(x, Noise.from_seed(0, 4))
    return found


@pytest.mark.parametrize("name", PURIFIERS)
def test_a_purifier_stands_before_the_named_classifier(name: str) -> None:
    usual, robust = _build(name), _build(name, classifier="adversarial_training")
    x, _ = data.load("digits", data.test_ids("digits")[:4])
    trained = _build("adversarial_training").network
    assert torch.equal(robust.classifier(x), trained(x))
    assert not torch.equal(usual.classifier(x), trained(x))
    assert not torch.equal(_logits(robust), _logits(usual))
    # The card says which weights these are and claims no other, and the record tells the two rows apart.
    assert "undefended" not in " ".join((robust.card.summary, *robust.card.choices))
    assert packaged(ROBUST).items() <= robust.card.weights.items()
    spec = DEFENSES[name]
    assert spec.files("digits", {"classifier": "adversarial_training"}).keys() == robust.card.weights.keys()
    recorded = spec.recorded("digits", {"classifier": "adversarial_training"})
    assert recorded == {"classifier": "adversarial_training"}


@pytest.mark.parametrize("name", PURIFIERS)
def test_code_makes_classifier_and_denoiser_once_it_is_trusted(name: str, code: Path) -> None:
    options = {"classifier": f"{code}:robust"}
    if name != "adp":
        options["denoiser"] = f"{code}:denoiser"  # the packaged one: adp climbs a score network instead
    assert torch.equal(_logits(_build(name, **options)), _logits(_build(name, classifier="adversarial_training")))
    for option, value in options.items():
        with pytest.raises(InputError, match=r"--trust"):
            DEFENSES[name].build("digits", options={option: value})
    files = DEFENSES[name].files("digits", options)
    assert {sha256_of_file(path) for path in files.values()} >= {sha256_of_file(code)}
    # A path is nobody's business: the record keeps the file's name, and its digest among the weights.
    assert DEFENSES[name].recorded("digits", options)["classifier"] == "mine.py:robust"


def test_the_victim_that_guides_is_the_victim_that_classifies() -> None:
    defense = _build("victim_guided", classifier="adversarial_training")
    assert defense.purifier.victim is defense.classifier


def test_what_is_no_classifier_is_refused_with_what_is() -> None:
    with pytest.raises(InputError, match=r"no classifier 'adversarial'\. Did you mean 'adversarial_training'\?"):
        take_classifier("adversarial", "digits")
    with pytest.raises(InputError, match=r"trades has weights for digits, not for 'cifar10'"):
        take_classifier("trades", "cifar10")
    with pytest.raises(InputError, match=r"trades has weights for digits"):
        behind_files("trades", "cifar10")


def test_a_denoiser_of_code_has_to_be_one_and_to_denoise(code: Path) -> None:
    with pytest.raises(InputError, match=r"makes a DigitsCNN; expected a diffusers folder"):
        _build("diffpure", denoiser=f"{code}:robust")
    with pytest.raises(InputError, match=r"the denoiser doesn't denoise"):
        _build("diffpure", denoiser=f"{code}:untrained")


def test_robustbench_models_name_their_threat_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def take_network(name: str, dataset: str, *, borrowing: Any) -> tuple[nn.Module, None]:
        asked.append((name, borrowing))
        return nn.Identity(), None

    def borrowed_files(package: str, name: str, dataset: str, **options: str) -> dict[str, Path]:
        asked.append((f"{package}:{name}", options))
        return {}

    monkeypatch.setattr(behind.classifier, "take_network", take_network)
    monkeypatch.setattr(behind, "borrowed_files", borrowed_files)
    for source in ("robustbench:Wang2023Better_WRN-28-10@Linf", "timm:hf_hub:someone/net@v1"):
        take_classifier(source, "cifar10")
        behind_files(source, "cifar10")
    # Only RobustBench's names end in a threat model; what timm takes an @ for is timm's.
    robust = ("robustbench:Wang2023Better_WRN-28-10", {"threat": "Linf"})
    assert asked == [robust, robust, ("timm:hf_hub:someone/net@v1", {}), ("timm:hf_hub:someone/net@v1", {})]


def test_the_example_of_a_denoiser_runs_on_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    weights = root.parent / "shared" / "data" / "diffusion" / "fahad00888_ddpm_animals32_rgb.pth"
    if not weights.is_file():
        pytest.skip(f"no {weights.name} in the shared data")
    monkeypatch.setenv("SMALL_DDPM", str(weights))
    source = f"{root / 'docs' / 'examples' / 'small_ddpm.py'}:make"
    defense: Any = resolve_defense("diffpure", trust=True).build(
        "cifar10", options={"denoiser": source, "level": "60", "steps": "2"}
    )
    x, _ = data.load("cifar10", range(0, 10_000, 160))
    clean = 2 * x - 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator)
    # Errors of ε that a network fed with other times, pixels or frequencies doesn't reach.
    for level, most in ((51, 0.18), (101, 0.106), (201, 0.0525), (401, 0.0172)):
        alpha_bar = defense.denoiser.alpha_bar(level).float()
        noised = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        with torch.no_grad():
            assert float((defense.denoiser.eps(noised, level) - noise).square().mean()) < most
    with torch.no_grad():
        assert defense(x[:8], Noise.from_seed(0, 8)).shape == (8, 10)
