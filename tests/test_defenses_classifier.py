"""Classifiers that people bring: read strictly from every usual shape of file, normalised inside, seen to recognise."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from torch import Tensor, nn

from assay import data
from assay.defense import Defense, DefenseSpec
from assay.defenses.checkpoints import WEIGHTS
from assay.defenses.classifier_sources import (
    PRESETS,
    Preprocessed,
    check_classifier,
    check_shape,
    find_state,
    read_normalisation,
    smoke_ids,
)
from assay.digest import sha256_of_file
from assay.errors import InputError
from assay.noise import Noise
from assay.prepare import prepare
from assay.registry import DEFENSES, resolve_defense

PACKAGED = WEIGHTS / "digits/undefended.safetensors"
FACTORIES = """
    import torch
    from torch import nn
    from assay.defenses.networks import DigitsCNN
    from assay.registry import DEFENSES

    def make():
        return DigitsCNN()

    def half():
        return DigitsCNN().half()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = DigitsCNN()

        def forward(self, x):
            return self.model(x)

    instance = DigitsCNN()
    junk = 3

    def number():
        return 3

    def demanding(depth):
        return DigitsCNN()

    def defended():
        return DEFENSES["undefended"].build("digits")

    defense = DEFENSES["undefended"].build("digits")

    class Tuple(nn.Module):
        def forward(self, x):
            return x, x

    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(100, 10))
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "my_networks.py"
    path.write_text(dedent(FACTORIES))
    return path


@pytest.fixture
def state() -> dict[str, Tensor]:
    return load_file(PACKAGED)


@pytest.fixture
def build(code: Path) -> Callable[..., Defense]:
    def make(name: str = "make", **options: str) -> Defense:
        given = {"architecture": f"{code}:{name}", **options}
        return resolve_defense("classifier", trust=True).build("digits", options=given)

    return make


@pytest.fixture(scope="module")
def images() -> Tensor:
    return data.load("digits", data.board_ids("digits")[:8])[0]


@pytest.fixture(scope="module")
def answers(images: Tensor) -> Tensor:
    return DEFENSES["undefended"].build("digits")(images, Noise.from_seed(0, 8))


# What makes the network


@pytest.mark.parametrize("name", ["make", "instance"])
def test_any_module_or_what_makes_one(
    name: str, build: Callable[..., Defense], images: Tensor, answers: Tensor
) -> None:
    defense = build(name, weights=str(PACKAGED))
    assert torch.equal(defense(images, Noise.from_seed(0, 8)), answers)
    assert not defense.card.traits.names()
    assert not any(parameter.requires_grad for parameter in defense.parameters())
    assert not any(module.training for module in defense.modules())


def test_a_class_is_called(build: Callable[..., Defense], state: dict[str, Tensor], tmp_path: Path) -> None:
    # All of the network's own keys share this prefix too, so it stays.
    torch.save({f"model.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    assert build("Wrapped", weights=str(tmp_path / "w.pt")).n_classes == 10


def test_half_precision_becomes_single(build: Callable[..., Defense]) -> None:
    defense = build("half", weights=str(PACKAGED))
    assert {parameter.dtype for parameter in defense.parameters()} == {torch.float32}


def test_two_builds_of_an_instance_share_no_parameter(build: Callable[..., Defense]) -> None:
    first, second = (build("instance", weights=str(PACKAGED)) for _ in range(2))
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("junk", r"is a int; expected module:object or path\.py:object"),
        ("number", r"makes a int; expected module:object or path\.py:object of a torch\.nn\.Module"),
        ("demanding", "can't be called without arguments: missing a required argument: 'depth'"),
        ("defended", "makes a Classifier; expected"),
        ("defense", "is a defense already: run it by that name"),
        ("maek", "no object 'maek'. Did you mean 'make'"),
        ("Tuple", r"answers with a tuple; expected a tensor of \(1, 10\)"),
        ("few", r"answers with a tensor of \(1, 3\); expected \(1, 10\), one logit for each class of digits"),
        ("wide", r"can't take an image of digits, \(1, 8, 8\): .*give --option resize=SIDE"),
    ],
)
def test_what_is_no_classifier_of_the_data_set_is_refused(name: str, says: str, build: Callable[..., Defense]) -> None:
    with pytest.raises(InputError, match=says):
        build(name)


@pytest.mark.parametrize("architecture", ["", "resnet18", "timm:"])
def test_it_needs_an_architecture(architecture: str) -> None:
    with pytest.raises(InputError, match="a classifier needs --option architecture=…: "):
        DEFENSES["classifier"].build("digits", options={"architecture": architecture})


def test_code_is_not_run_without_trust(tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for spec in (resolve_defense("classifier"), DEFENSES["classifier"]):
        with pytest.raises(InputError, match=r"is code from outside the registry.*--trust"):
            spec.build("digits", options={"architecture": f"{trap}:x"})
    assert not (tmp_path / "ran").exists()


# Weight files


def nested(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, str]]:
    """Contents of a torch file, and the key under which they have to be loaded."""
    other = {name: value + 1 for name, value in state.items()}
    adam = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    return {
        "plain": (state, ""),
        "state_dict": ({"state_dict": state, "epoch": 3}, ""),
        "training": ({"model": state, "optimizer": adam, "lr_scheduler": {"a": torch.zeros(1)}}, ""),
        "model_and_ema": ({"model": other, "ema": state}, "ema"),
        "deep": ({"nets": {"ema": {"shadow": state}, "raw": other}}, "nets.ema"),
        "list": ({"state_dict": [state]}, ""),
        "stages": ({"state_dict": [state, other]}, "state_dict.0"),
        "parallel": ({"state_dict": {f"module.{name}": value for name, value in state.items()}}, ""),
        "compiled": ({f"_orig_mod.module.{name}": value for name, value in state.items()}, ""),
        "lightning": ({"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}}, ""),
    }


@pytest.mark.parametrize(
    "shape",
    ["plain", "state_dict", "training", "model_and_ema", "deep", "list", "stages", "parallel", "compiled", "lightning"],
)
def test_the_usual_shapes_of_files_are_understood(
    shape: str, build: Callable[..., Defense], state: dict[str, Tensor], tmp_path: Path, images: Tensor, answers: Tensor
) -> None:
    content, key = nested(state)[shape]
    torch.save(content, tmp_path / "w.pt")
    assert torch.equal(build(weights=str(tmp_path / "w.pt"), key=key)(images, Noise.from_seed(0, 8)), answers)


def test_safetensors_of_half_precision_are_read_too(
    build: Callable[..., Defense], state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "w.safetensors")
    defense = build(weights=str(tmp_path / "w.safetensors"))
    assert {parameter.dtype for parameter in defense.parameters()} == {torch.float32}


def test_several_places_are_listed_and_a_wrong_one_named() -> None:
    content = {"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}, "epoch": 3, "notes": {}}
    with pytest.raises(InputError, match=r"w\.pt holds .* choose with option key=PLACE: model, ema\."):
        find_state(content, "", "w.pt")
    with pytest.raises(InputError, match=r"has no 'emma' of key 'emma'; there is model, ema, epoch, notes"):
        find_state(content, "emma", "w.pt")
    with pytest.raises(InputError, match=r"w\.pt holds no tensors by name at key 'epoch'"):
        find_state(content, "epoch", "w.pt")


def test_a_prefix_of_some_keys_stays_and_all_differences_are_listed(
    build: Callable[..., Defense], state: dict[str, Tensor], tmp_path: Path
) -> None:
    first, *others = sorted(state)
    torch.save({f"module.{first}": state[first], **{name: state[name] for name in others}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=rf"missing: {first}; unexpected: module\.{first}"):
        build(weights=str(tmp_path / "w.pt"))


def test_a_pickle_is_not_executed(build: Callable[..., Defense], tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(
        InputError, match=r"whole\.pt is not a torch file of plain tensors.*save the network's state_dict"
    ):
        build(weights=str(tmp_path / "whole.pt"))


@pytest.mark.parametrize("name", ["none.pt", "junk.pt", "junk.safetensors"])
def test_a_file_that_is_no_weights_is_named(name: str, build: Callable[..., Defense], tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"nothing")
    (tmp_path / "junk.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=name):
        build(weights=str(tmp_path / name))


def test_a_key_without_weights_is_refused(build: Callable[..., Defense]) -> None:
    with pytest.raises(InputError, match="give weights too"):
        build(key="state_dict")


# Preprocessing


def test_normalisation_and_resizing_are_part_of_the_model() -> None:
    seen: list[Tensor] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    mean, std = PRESETS["cifar10"]
    model = Preprocessed(network, 32, mean, std, 64)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    model(x).sum().backward()
    resized = nn.functional.interpolate(x, (64, 64), mode="bilinear", align_corners=False, antialias=True)
    expected = (resized - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(seen[0], expected)
    assert x.grad is not None
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())


def test_without_either_the_images_come_as_they_are() -> None:
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(Preprocessed(nn.Identity(), 8)(x), x)


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ("", "", ((), ())),
        ("imagenet", "", PRESETS["imagenet"]),
        ("cifar10", "cifar10", PRESETS["cifar10"]),
        (".5,.4,.3", ".2", ((0.5, 0.4, 0.3), (0.2,))),
        ("cifar10", ".2023,.1994,.2010", (PRESETS["cifar10"][0], (0.2023, 0.1994, 0.2010))),
        ("0", "0.00392156862745098", ((0.0,), (1 / 255,))),
    ],
)
def test_normalisation_from_text(mean: str, std: str, expected: object) -> None:
    assert read_normalisation(mean, std, 3) == expected


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        (".5", "", "mean and std go together"),
        ("", ".5", "mean and std go together"),
        (".5,.5", ".5", "mean takes 3 numbers with commas between them"),
        ("cifar", ".5", r"or a preset \(cifar10, imagenet\); got 'cifar'"),
        (".5", "0", "std must be positive"),
        ("123.7,116.3,103.5", "58.4", "Divide it and std by 255"),
    ],
)
def test_a_normalisation_that_can_t_be_meant_is_refused(mean: str, std: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_normalisation(mean, std, 3)


# The smoke test


def test_a_network_that_recognises_nothing_is_refused_with_the_usual_causes(build: Callable[..., Defense]) -> None:
    with pytest.raises(InputError, match=r"recognises \d+ of 256 images of digits.*mean and std.*order of classes"):
        build("untrained")
    assert build("untrained", smoke="false").n_classes == 10


def test_a_forgotten_normalisation_and_another_order_of_classes_are_noticed(
    build: Callable[..., Defense], state: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="Usual causes"):
        build(weights=str(PACKAGED), mean="0.5", std="1000")
    last = [name for name, value in state.items() if len(value) == 10]
    torch.save({**state, **{name: state[name].roll(1, 0) for name in last}}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="Usual causes"):
        build(weights=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_the_smoke_test_looks_at_no_image_of_a_board(dataset: str) -> None:
    ids = smoke_ids(dataset)
    assert len(ids) == len(set(ids)) == 256
    assert not set(ids) & set(data.board_ids(dataset))
    assert set(ids) <= set(data.test_ids(dataset))


def test_every_prefix_of_the_smoke_images_is_spread() -> None:
    ids = data.test_ids("cifar10")
    for look in (16, 32, 64):
        quarters = torch.tensor(smoke_ids("cifar10")[:look]) * 4 // len(ids)
        assert torch.bincount(quarters, minlength=4).min() >= look // 5


class Guess(nn.Module):
    """Right on a share of the digits, always on the same ones; counts the images it sees."""

    def __init__(self, share: float) -> None:
        super().__init__()
        ids = smoke_ids("digits")
        x, y = data.load("digits", ids)
        wrong = torch.rand(256, generator=torch.Generator().manual_seed(3)) >= share
        self.known, self.label, self.seen = x, torch.where(wrong, (y + 1) % 10, y), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        rows = (x[:, None] == self.known).flatten(2).all(2).int().argmax(1)
        return nn.functional.one_hot(self.label[rows], 10).float()


def test_a_good_classifier_is_seen_at_once_and_a_weak_one_in_the_end() -> None:
    good, weak, chance = Guess(0.9), Guess(0.4), Guess(0.2)
    check_classifier(good, "digits", "good")
    check_classifier(weak, "digits", "weak")
    assert good.seen == 16 < weak.seen <= 256
    with pytest.raises(InputError, match="twice chance"):
        check_classifier(chance, "digits", "chance")
    assert chance.seen == 256


def test_nan_is_no_answer() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 10), torch.nan)

    check_shape(Broken(), "digits", "broken")
    with pytest.raises(InputError, match="recognises"):
        check_classifier(Broken(), "digits", "broken")


# What a record says


def test_the_record_holds_code_and_weights_by_digest_and_no_path(code: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(PACKAGED.read_bytes())
    options = {"architecture": f"{code}:make", "weights": str(weights), "smoke": "false"}
    prepared = prepare("classifier", "digits-linf", only=("uniform",), trust=True, options=options)
    found = prepared.defense_ref
    assert found.name == "classifier"
    assert found.options == {"architecture": "my_networks.py:make", "smoke": "false", "weights": "w.safetensors"}
    assert found.weights == found.card.weights
    assert found.weights == {
        "architecture/my_networks.py": sha256_of_file(code),
        "weights/w.safetensors": sha256_of_file(weights),
    }
    assert found.card.datasets == ("digits",)
    assert str(tmp_path) not in found.model_dump_json()
    assert found.title.startswith("Classifier (architecture=my_networks.py:make, ")


def test_a_title_stands_in_place_of_the_options(code: Path) -> None:
    text = {"title": "A network of <ours>/theirs", "source": "Someone et al. " + "x" * 500}
    options = {"architecture": f"{code}:instance", "weights": str(PACKAGED), **text}
    found = prepare("classifier", "digits-linf", only=("uniform",), trust=True, options=options).defense_ref
    assert found.title == found.card.title == text["title"]
    assert found.with_options(found.name) == "classifier (A network of <ours>/theirs)"
    assert re.fullmatch(r"\+A-network-of-ours-theirs\+[0-9a-f]{8}", found.variant)
    assert found.card.source == text["source"]
    # An option of that name which is something else is an option like any other.
    other = found.model_copy(
        update={"card": found.card.model_copy(update={"title": "Else"}), "options": {"title": "x"}}
    )
    assert other.title == "Else (title=x)"
    assert other.variant.startswith("+title=x+")
    assert {name: found.options[name] for name in text} == text
    for name, most in (("title", 120), ("source", 600)):
        with pytest.raises(InputError, match=f"the {name} has {most + 1} characters"):
            prepare(
                "classifier", "digits-linf", only=("uniform",), trust=True, options={**options, name: "x" * (most + 1)}
            )


def test_weight_files_that_are_missing_are_named(code: Path) -> None:
    options = {"architecture": f"{code}:make", "weights": "no_such.pt"}
    with pytest.raises(InputError, match=r"no file 'no_such\.pt'"):
        DEFENSES["classifier"].files("digits", options)


# Real files: architectures as a user would write them, beside weights that were published without any code of ours


EXAMPLES = Path(__file__).parents[1] / "docs" / "examples" / "small_cifar10.py"
IMAGENET = {"mean": "imagenet"}
NEAR_IMAGENET = {"mean": ".485,.456,.406", "std": ".225"}
PUBLISHED = {
    "akamaster_resnet20-12fca82f.th": ("ResNet20", IMAGENET, 0.9173),
    "abcrown_resnet4b.pth": ("ResNet4b", {"mean": "cifar10"}, 0.7720),
    "abcrown_cifar_cnn_a_adv4.model": ("cnn", NEAR_IMAGENET, 0.5782),
    "abcrown_cifar_wide.pth": ("cnn", NEAR_IMAGENET, 0.6162),
    "wongkolter_l2_cifar_small_36px.pth": ("cnn", {**NEAR_IMAGENET, "key": "state_dict.0"}, 0.5439),
}
"""File -> architecture, options, and clean accuracy on all 10,000 test images."""


def published(name: str) -> tuple[DefenseSpec, dict[str, str]]:
    """The defense and its options, as a user would give them; skips where the file is absent."""
    path = Path(__file__).parents[2] / "shared" / "data" / "classifiers" / name
    if not path.is_file():
        pytest.skip(f"no {path.name} in the shared data")
    architecture, options, _ = PUBLISHED[name]
    given = {"architecture": f"{EXAMPLES}:{architecture}", "weights": str(path), **options}
    return resolve_defense("classifier", trust=True), given


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_classifiers_have_their_published_accuracy(name: str) -> None:
    spec, options = published(name)
    defense = spec.build("cifar10", options=options)
    x, y = data.load("cifar10", range(1000))
    with torch.no_grad():
        right = sum(
            int((defense(x[i : i + 100], Noise.from_seed(0, 100)).argmax(1) == y[i : i + 100]).sum())
            for i in range(0, 1000, 100)
        )
    low, high = binom.interval(0.999, 1000, PUBLISHED[name][2])
    assert low <= right <= high
    print(f"{name}: {right} of 1,000")


@pytest.mark.parametrize(
    ("function", "variable", "name"),
    [("loaded", "RESNET4B", "abcrown_resnet4b.pth"), ("resnet20", "RESNET20", "akamaster_resnet20-12fca82f.th")],
)
def test_code_that_loads_its_own_weights_makes_the_same_classifier(
    function: str, variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, options = published(name)
    monkeypatch.setenv(variable, options["weights"])
    given = spec.build("cifar10", options=options)
    own = spec.build("cifar10", options={"architecture": f"{EXAMPLES}:{function}"})
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(own(x, Noise.from_seed(0, 4)), given(x, Noise.from_seed(0, 4)))


@pytest.mark.slow
def test_a_published_classifier_without_its_normalisation_is_noticed() -> None:
    spec, options = published("abcrown_cifar_cnn_a_adv4.model")
    with pytest.raises(InputError, match="mean and std"):
        spec.build("cifar10", options={name: options[name] for name in ("architecture", "weights")})
