"""Models of RobustBench, timm and torchvision, by name. The packages are stand-ins with their documented interfaces,
which read weight files in their packages' own layout on disk."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from assay import data
from assay.defense import Defense
from assay.defenses import zoo as zoo_module
from assay.defenses.checkpoints import WEIGHTS
from assay.defenses.networks import DigitsCNN
from assay.defenses.undefended import load_network
from assay.digest import sha256_of_file
from assay.errors import InputError
from assay.noise import Noise
from assay.prepare import prepare
from assay.registry import is_foreign, resolve_defense

PACKAGED = WEIGHTS / "digits/undefended.safetensors"
NAME = "Author2026Better_CNN-8"
MEAN, STD = (0.3,), (0.5,)


class Normalised(nn.Module):
    """As the packages' own: takes images that were normalised; undoes that before a network that knows none of it."""

    def __init__(self, n_classes: int = 10, side: int = 8) -> None:
        super().__init__()
        self.body, self.side = DigitsCNN(), side
        self.more = nn.Parameter(torch.zeros(n_classes - 10))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.side
        x = x * STD[0] + MEAN[0]
        if self.side != 8:
            x = nn.functional.interpolate(x, (8, 8), mode="bilinear", align_corners=False, antialias=True)
        logits: Tensor = self.body(x)
        return torch.cat([logits, self.more.expand(len(x), -1)], 1)


@pytest.fixture
def answers() -> Tensor:
    with torch.no_grad():
        answers: Tensor = load_network("digits").eval()(images())
    return answers


def images() -> Tensor:
    return data.load("digits", data.board_ids("digits")[:8])[0]


def answer(defense: Defense) -> Tensor:
    return defense(images(), Noise.from_seed(0, 8))


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def weights_for(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {**state, **{f"body.{name}": value for name, value in load_file(PACKAGED).items()}}


@pytest.mark.parametrize("name", ["robustbench:Standard", "timm:resnet18.a1_in1k", "torchvision:resnet18"])
def test_names_of_packages_are_no_foreign_code(name: str) -> None:
    assert not is_foreign(name)
    spec = resolve_defense(name)
    assert spec.card.name == name.lower()
    assert "smoke" in spec.options


@pytest.mark.parametrize("package", ["robustbench", "timm", "torchvision"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(zoo_module.importlib, "import_module", missing(package))
    with pytest.raises(InputError, match=rf"{package} is not installed: .*its extra \[{package}\]"):
        resolve_defense(f"{package}:anything").build("digits")


def missing(package: str) -> Callable[[str], ModuleType]:
    def import_module(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    return import_module


def test_a_package_that_can_t_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(zoo_module.importlib, "import_module", import_module)
    with pytest.raises(
        InputError, match=r"torchvision can't be imported here \(RuntimeError: operator torchvision::nms"
    ):
        resolve_defense("torchvision:resnet18").build("digits")
    monkeypatch.setattr(zoo_module.importlib, "import_module", missing("gdown"))
    with pytest.raises(InputError, match="robustbench needs gdown, which is not installed"):
        resolve_defense("robustbench:X").build("digits")


# RobustBench


class BenchmarkDataset(enum.Enum):
    digits = "digits"
    imagenet = "imagenet"


class ThreatModel(enum.Enum):
    Linf = "Linf"
    L2 = "L2"


class Network(nn.Module):
    """RobustBench's models take images in [0, 1] and normalise them themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Normalised()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network((x - MEAN[0]) / STD[0])
        return logits


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights as RobustBench keeps it, MODELS/DATASET/THREAT/NAME.pt, with the package that reads it."""
    entry = {"model": Network, "gdrive_id": "abc"}
    listed = {
        ThreatModel.Linf: {NAME: entry, "Both": entry, "Absent": entry, "Ensemble": {**entry, "gdrive_id": ["a", "b"]}},
        ThreatModel.L2: {"Both": entry, "OnlyL2": entry},
    }
    model_dicts = {BenchmarkDataset.digits: listed, BenchmarkDataset.imagenet: {}}

    def load_model(
        model_name: str, model_dir: str = "./models", dataset: str = "cifar10", threat_model: str = "Linf"
    ) -> nn.Module:
        found = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)][model_name]
        model: nn.Module = found["model"]()
        folder = Path(model_dir) / dataset / threat_model
        members = (
            [f"{model_name}_m{i}.pt" for i in (0, 1)] if isinstance(found["gdrive_id"], list) else [f"{model_name}.pt"]
        )
        for member in members:
            state = torch.load(folder / member, map_location="cpu")["state_dict"]
            model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
        return model.eval()

    folder = tmp_path / "models" / "digits"
    state = {f"module.network.{name}": value for name, value in weights_for(Normalised()).items()}
    for name in (f"Linf/{NAME}", "Linf/Both", "L2/Both", "L2/OnlyL2", "Linf/Ensemble_m0", "Linf/Ensemble_m1"):
        path = folder / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": state, "epoch": name}, path)
    info = {
        "link": "https://arxiv.org/abs/2611.00000",
        "name": "Better Models Are Better",
        "authors": "A. Author, B. Author",
        "venue": "Journal 2026",
        "architecture": "CNN-8",
        "eps": "8/255",
        "clean_acc": "92.44",
        "reported": "68.0",
        "autoattack_acc": "67.31",
        "footnote": "",
        "unreliable": False,
    }
    told = tmp_path / "package" / "model_info" / "digits" / "Linf" / f"{NAME}.json"
    told.parent.mkdir(parents=True)
    told.write_text(json.dumps(info))
    (told.parent / "Both.json").write_text(json.dumps({"clean_acc": "?", "unreliable": True, "link": "none"}))
    install(monkeypatch, "robustbench", __file__=str(tmp_path / "package" / "robustbench" / "__init__.py"))
    install(monkeypatch, "robustbench.model_zoo", model_dicts=model_dicts)
    install(monkeypatch, "robustbench.utils", load_model=load_model)
    return tmp_path / "models"


def robustbench(name: str, models: Path, norm: str = "", **options: str) -> Defense:
    given = {"model_dir": str(models), **options}
    return resolve_defense(f"robustbench:{name}", norm=norm).build("digits", options=given)


def test_a_model_of_robustbench_with_what_is_known_of_it(models: Path, answers: Tensor) -> None:
    defense = robustbench(NAME, models, "linf")
    torch.testing.assert_close(answer(defense), answers, atol=1e-4, rtol=1e-4)
    card = defense.card
    assert card.name == f"robustbench:{NAME.lower()}"
    assert card.title == f"{NAME} (RobustBench, Linf)"
    assert card.source == "Better Models Are Better, A. Author, B. Author, Journal 2026"
    assert card.url == "https://arxiv.org/abs/2611.00000"
    assert "CNN-8" in card.choices
    assert {(claim.value, claim.threat, claim.attack) for claim in card.claims} == {
        (0.9244, "digits", "none"),
        (0.6731, "digits linf 8/255", "AutoAttack"),
        (0.68, "digits linf 8/255", "the paper's own"),
    }
    assert card.weights == {f"robustbench/{NAME}.pt": sha256_of_file(models / "digits" / "Linf" / f"{NAME}.pt")}


def test_what_robustbench_doesn_t_know_is_left_out(models: Path) -> None:
    card = robustbench("Both", models, "linf").card
    assert card.claims == ()
    assert card.url == "https://robustbench.github.io"
    assert any("unreliable" in choice for choice in card.choices)


def test_two_models_of_one_name_are_told_apart_by_the_board_or_an_option(models: Path) -> None:
    files = {each: sha256_of_file(models / "digits" / each / "Both.pt") for each in ("Linf", "L2")}
    assert robustbench("Both", models, "l2").card.weights == {"robustbench/Both.pt": files["L2"]}
    assert robustbench("Both", models, "linf").card.weights == {"robustbench/Both.pt": files["Linf"]}
    assert robustbench("Both", models, "linf", threat="L2").card.weights == {"robustbench/Both.pt": files["L2"]}
    with pytest.raises(InputError, match="for Linf, L2; choose with --option threat=Linf"):
        robustbench("Both", models)
    # A model that was made for one norm alone may be run on a board of another.
    assert robustbench("OnlyL2", models, "linf").card.title == "OnlyL2 (RobustBench, L2)"


def test_an_ensemble_has_a_file_a_member(models: Path) -> None:
    assert set(robustbench("Ensemble", models, "linf").card.weights) == {
        "robustbench/Ensemble_m0.pt",
        "robustbench/Ensemble_m1.pt",
    }


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Author2026Beter_CNN-8", {}, rf"no model 'Author2026Beter_CNN-8' for digits\. Did you mean '{NAME}'"),
        (NAME, {"threat": "L2"}, "has no model .* for digits, L2"),
        (NAME, {"threat": "l2"}, "takes a threat model of RobustBench, got 'l2'"),
        ("Absent", {}, r"robustbench:Absent could not be loaded \(FileNotFoundError"),
    ],
)
def test_a_model_that_robustbench_hasn_t_is_refused(
    name: str, options: dict[str, str], says: str, models: Path
) -> None:
    with pytest.raises(InputError, match=says):
        robustbench(name, models, "linf", **options)


def test_a_data_set_that_robustbench_hasn_t_is_refused(models: Path) -> None:
    with pytest.raises(InputError, match="RobustBench has no models for 'cifar10'"):
        resolve_defense(f"robustbench:{NAME}").build("cifar10")


def test_a_record_names_a_model_of_robustbench(models: Path) -> None:
    prepared = prepare(f"robustbench:{NAME}", "digits-linf", only=("uniform",), options={"model_dir": str(models)})
    found = prepared.defense_ref
    assert found.name == f"robustbench:{NAME}"
    assert found.options == {"model_dir": "models"}
    assert found.weights == found.card.weights != {}
    assert found.card.claims


# timm


@pytest.fixture
def timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """timm with one network of two classes' numbers and two sizes, its weights in a cache laid out like the hub's."""
    cache = tmp_path / "hub"
    paths: dict[str, Path] = {}
    for name, made in (
        ("cnn8.digits", Normalised()),
        ("cnn8_16.digits", Normalised(side=16)),
        ("cnn8.in1k", Normalised(20)),
    ):
        folder = cache / f"models--timm--{name}" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder.parent.parent / "refs").mkdir()
        (folder.parent.parent / "refs" / "main").write_text("abc")
        paths[name] = folder / "model.safetensors"
        save_file(weights_for(made), paths[name])

    def config(name: str) -> dict[str, Any]:
        side = 16 if "_16" in name else 8
        return {
            "hf_hub_id": f"timm/{name}", "url": "", "file": None, "input_size": (1, side, side), "mean": MEAN,
            "std": STD, "crop_pct": 0.875, "interpolation": "bicubic", "origin_url": "https://example.org/cnn8",
        }  # fmt: skip

    def create_model(model_name: str, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
        known = model_name if model_name in paths else f"{model_name}.digits"
        if known not in paths:
            raise RuntimeError(f"Unknown model ({model_name})")
        model = Normalised(20 if "in1k" in known else num_classes or 10, side=16 if "_16" in known else 8)
        if pretrained:
            model.load_state_dict(load_file(paths[known]))
        vars(model)["pretrained_cfg"] = config(known)
        return model

    def get_pretrained_cfg(model_name: str) -> SimpleNamespace:
        return SimpleNamespace(**config(model_name if model_name in paths else f"{model_name}.digits"))

    def cached(repository: str, file: str, revision: str | None = None) -> str | None:
        path = paths.get(repository.removeprefix("timm/"))
        return str(path) if path is not None and path.name == file else None

    monkeypatch.setattr(zoo_module, "try_to_load_from_cache", cached)
    return install(monkeypatch, "timm", create_model=create_model, get_pretrained_cfg=get_pretrained_cfg)


def test_a_model_of_timm_with_its_own_normalisation(timm: ModuleType, tmp_path: Path, answers: Tensor) -> None:
    defense = resolve_defense("timm:cnn8").build("digits")
    torch.testing.assert_close(answer(defense), answers, atol=1e-4, rtol=1e-4)
    assert defense.card.title == "cnn8 (timm)"
    assert "https://example.org/cnn8" in defense.card.source
    file = tmp_path / "hub" / "models--timm--cnn8.digits" / "snapshots" / "abc" / "model.safetensors"
    assert defense.card.weights == {"timm/model.safetensors": sha256_of_file(file)}
    assert resolve_defense("timm:hf_hub:timm/cnn8.digits").files("digits") == {"timm/model.safetensors": file}


def test_a_model_of_timm_of_another_size_resizes_inside_the_gradient(timm: ModuleType) -> None:
    defense = resolve_defense("timm:cnn8_16").build("digits")
    x = images().requires_grad_()
    logits = defense(x, Noise.from_seed(0, 8))
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    assert "16×16 pixels, mean 0.3, std 0.5" in defense.card.choices[0]


def test_a_model_of_timm_for_other_classes_is_refused(timm: ModuleType) -> None:
    with pytest.raises(InputError, match=r"timm:cnn8\.in1k answers with a tensor of \(1, 20\); expected \(1, 10\)"):
        resolve_defense("timm:cnn8.in1k").build("digits")
    with pytest.raises(InputError, match=r"timm:vit could not be loaded \(RuntimeError: Unknown model \(vit"):
        resolve_defense("timm:vit").build("digits")


def test_an_architecture_of_timm_with_weights_of_one_s_own(timm: ModuleType, tmp_path: Path, answers: Tensor) -> None:
    torch.save({"state_dict": weights_for(Normalised())}, tmp_path / "mine.pt")
    options = {"architecture": "timm:cnn8", "weights": str(tmp_path / "mine.pt"), "mean": "0.3", "std": "0.5"}
    spec = resolve_defense("classifier")
    defense = spec.build("digits", options=options)
    torch.testing.assert_close(answer(defense), answers, atol=1e-4, rtol=1e-4)
    assert spec.recorded("digits", options)["architecture"] == "timm:cnn8"
    with pytest.raises(InputError, match="timm:cnn8 has its own weights and preprocessing: leave out key, mean"):
        spec.build("digits", options={"architecture": "timm:cnn8", "mean": "0.3", "std": "0.5"})
    with pytest.raises(InputError, match="robustbench's models come with their weights"):
        spec.build("digits", options={**options, "architecture": "robustbench:X"})


# torchvision


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision with one network; the file of its weights lies where torch keeps what it downloads."""
    file = tmp_path / "checkpoints" / "cnn8-abcdef12.pth"
    file.parent.mkdir()
    torch.save(weights_for(Normalised()), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    transforms = SimpleNamespace(
        crop_size=[8], resize_size=[9], mean=list(MEAN), std=list(STD), interpolation=SimpleNamespace(value="bilinear")
    )

    class Weights(enum.Enum):
        DIGITS_V1 = "v1"
        DEFAULT = "v1"

        @property
        def url(self) -> str:
            return f"https://example.org/models/{file.name}"

        @property
        def meta(self) -> dict[str, str]:
            return {"recipe": "https://example.org/recipe"}

        def transforms(self) -> SimpleNamespace:
            return transforms

    def known(name: str) -> None:
        if name != "cnn8":
            raise ValueError(f"Unknown model {name}")

    def get_model_weights(name: str) -> type[Weights]:
        known(name)
        return Weights

    def get_model(name: str, weights: Weights | None = None, num_classes: int = 10) -> nn.Module:
        known(name)
        model = Normalised(num_classes)
        if weights is not None:
            model.load_state_dict(torch.load(file, weights_only=True))
        return model

    install(monkeypatch, "torchvision")
    install(monkeypatch, "torchvision.models", get_model=get_model, get_model_weights=get_model_weights)
    return file


def test_a_model_of_torchvision_with_its_default_weights(torchvision: Path, answers: Tensor) -> None:
    defense = resolve_defense("torchvision:cnn8").build("digits")
    torch.testing.assert_close(answer(defense), answers, atol=1e-4, rtol=1e-4)
    assert defense.card.weights == {f"torchvision/{torchvision.name}": sha256_of_file(torchvision)}
    assert defense.card.url == "https://example.org/recipe"
    assert "DIGITS_V1" in defense.card.source
    with pytest.raises(InputError, match=r"torchvision:cnn9 could not be loaded \(ValueError: Unknown model cnn9\)"):
        resolve_defense("torchvision:cnn9").build("digits")


def test_an_architecture_of_torchvision_with_weights_of_one_s_own(torchvision: Path, answers: Tensor) -> None:
    options = {"architecture": "torchvision:cnn8", "weights": str(torchvision), "mean": "0.3", "std": "0.5"}
    defense = resolve_defense("classifier").build("digits", options=options)
    torch.testing.assert_close(answer(defense), answers, atol=1e-4, rtol=1e-4)
