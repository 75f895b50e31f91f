"""Options of the purifiers, the diffusion classifiers and smoothing: a card with options is as true as one without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from assay import data
from assay.card import Card
from assay.defense import Defense
from assay.defenses.checkpoints import WEIGHTS
from assay.defenses.denoiser import small_unet
from assay.digest import sha256_of_file
from assay.errors import InputError
from assay.noise import Noise
from assay.protocol import load_protocol
from assay.registry import DEFENSES

Options = dict[str, str]
ROWS: list[tuple[str, Options]] = [
    ("gdmp", {"level": "60", "steps": "2", "rounds": "3", "scale": "5"}),
    ("gdmp", {"steps": "1", "rounds": "1", "scale": "0"}),
    ("likelihood_maximisation", {"steps": "2", "step_size": ".05", "radius": ".1", "lowest": ".3", "highest": ".3"}),
    ("likelihood_maximisation", {"steps": "1"}),
    *(
        ("victim_guided", {"target": target, "at": at, "steps": "2", "rounds": "2", "scale": "0.5"})
        for target in ("hard", "soft", "x0")
        for at in ("x_t", "x0hat")
    ),
    ("victim_guided", {"steps": "1", "level": "80"}),
    ("victim_guided", {"scale": "0"}),
    ("robust_guidance", {"level": "100", "steps": "3", "label_scale": "5", "distance_scale": "0"}),
    ("robust_guidance", {"steps": "2", "label_scale": "0"}),
    ("robust_guidance", {"steps": "1"}),
    ("diffusion_classifier", {"weighting": "training", "levels": "3", "samples": "2"}),
    ("diffusion_classifier", {"levels": "1"}),
    ("diffusion_classifier", {"lowest": "0.05", "highest": "2", "spacing": "linear", "keep": "3", "every": "2"}),
    ("epndc", {"weighting": "training", "sigma": "0.1", "votes": "3"}),
    ("epndc", {"levels": "1", "votes": "1"}),
    ("epndc", {"samples": "2", "keep": "2", "highest": "2", "spacing": "linear"}),
    ("apndc", {"renoise": "noised"}),
    ("apndc", {"renoise": "noised", "weighting": "elbo", "votes": "1", "sigma": "0.1", "levels": "1"}),
    ("apndc", {"levels": "3", "samples": "2", "highest": "2", "spacing": "linear", "votes": "2"}),
    ("apndc", {"keep": "4", "every": "2"}),
    ("smoothing", {"votes": "5"}),
    ("diffusion_classifier", {"bound": "1", "lowest": "1"}),
    ("smoothing", {"votes": "1"}),
    ("smoothing", {"sigma": ".4"}),
    ("smoothing", {"soft": "true", "temperature": ".5"}),
]
each_row = pytest.mark.parametrize(
    ("name", "options"),
    ROWS,
    ids=lambda value: value if isinstance(value, str) else ",".join(map("=".join, value.items())),
)
CHANGES: dict[str, Options] = {
    "gdmp": {"level": "60", "steps": "2", "rounds": "1", "scale": "5"},
    "likelihood_maximisation": {"steps": "2", "step_size": ".05", "radius": ".05", "lowest": ".3", "highest": ".7"},
    "victim_guided": {"level": "80", "steps": "2", "rounds": "2", "scale": "3", "target": "soft", "at": "x_t"},
    "robust_guidance": {"level": "80", "steps": "3", "label_scale": "5", "distance_scale": "3"},
    "diffusion_classifier": {
        "weighting": "training",
        "levels": "5",
        "lowest": "0.2",
        "highest": "2",
        "spacing": "linear",
        "samples": "2",
        "keep": "2",
    },
    "epndc": {
        "sigma": "0.2",
        "weighting": "training",
        "levels": "4",
        "highest": "2",
        "spacing": "linear",
        "samples": "2",
        "keep": "2",
        "votes": "3",
    },
    "apndc": {
        "renoise": "noised",
        "sigma": "0.2",
        "weighting": "elbo",
        "levels": "3",
        "highest": "2",
        "spacing": "linear",
        "samples": "2",
        "keep": "2",
        "votes": "3",
    },
    "smoothing": {"votes": "3", "sigma": ".4", "soft": "true"},
}
"""Of each defense every option, but those of the networks and of sifting's grid, with another value."""
UNCHANGED = {"denoiser", "classifier", "guide", "every", "temperature", "bound"}
BROUGHT = ("gdmp", "likelihood_maximisation", "victim_guided")


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Noise]:
    """Four images halfway between two digits: no classifier is so sure of them that guidance by it does nothing."""
    ids = data.board_ids("digits")[:8]
    x, _ = data.load("digits", ids)
    return (x[:4] + x[4:]) / 2, Noise.from_seed(0, ids[:4])


def networks(defense: Defense) -> list[nn.Module]:
    names = ("denoiser.network", "classifier", "guide", "network")
    found = [module for name, module in defense.named_modules() if name in names]
    covered = {id(parameter) for module in found for parameter in module.parameters()}
    assert covered == {id(parameter) for parameter in defense.parameters()}
    return found


def calls(defense: Defense, x: Tensor, noise: Noise, *, gradient: bool) -> float:
    """Forward passes of all networks a sample, in one draw, with its gradient where asked for."""
    seen: list[int] = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, _: seen.append(len(inputs[0]))) for module in networks(defense)
    ]
    point = x.clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits = defense.draw(point, noise)
        if gradient:
            torch.autograd.grad(logits.square().sum(), point)
    for hook in hooks:
        hook.remove()
    return sum(seen) / len(x)


def assert_calls(defense: Defense, x: Tensor, noise: Noise) -> None:
    assert calls(defense, x, noise, gradient=False) == defense.card.network_calls
    assert calls(defense, x, noise, gradient=True) == defense.card.gradient_calls


@each_row
def test_a_card_with_options_counts_its_calls(name: str, options: Options, batch: tuple[Tensor, Noise]) -> None:
    defense = DEFENSES[name].build("digits", options=options)
    assert_calls(defense, *batch)
    if "chain" in defense.card.handles:
        assert defense.chain().network_calls == defense.card.network_calls


@each_row
def test_traits_and_handles_follow_the_options(
    name: str, options: Options, batch: tuple[Tensor, Noise], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, noise), spec = batch, DEFENSES[name]
    defense = spec.build("digits", options=options)
    card, traits = defense.card, defense.card.traits
    assert traits.stochastic
    assert not torch.equal(defense.draw(x, noise), defense.draw(x, noise.child("other")))
    assert traits.purifies == ("stages" in card.handles)
    assert traits.iterative == ("chain" in card.handles and len(defense.chain()) > 1)
    assert ("votes" in card.handles) == (card.votes.draws > 1)
    assert card.votes.draws == int(options.get("votes", spec.card.votes.draws))
    point = x.clone().requires_grad_()
    answer = defense(point, noise)
    assert answer.shape == (4, 10)
    assert answer.isfinite().all()
    assert answer.requires_grad != traits.non_differentiable
    taken: list[object] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: taken.append(args) or real(*args, **kwargs))
    with torch.no_grad():
        defense.draw(x, noise)
    assert bool(taken) == traits.inner_gradient


@each_row
def test_every_listed_handle_works_and_every_dropped_one_has_a_reason(
    name: str, options: Options, batch: tuple[Tensor, Noise]
) -> None:
    x, noise = batch
    defense = DEFENSES[name].build("digits", options=options)
    with torch.no_grad():
        drawn = defense.draw(x, noise)
        if "stages" in defense.card.handles:
            stages = defense.stages()
            assert torch.equal(stages.classify(stages.purify(x, noise), noise), drawn)
        if "chain" in defense.card.handles:
            torch.testing.assert_close(defense.chain()(x, noise), drawn, rtol=1e-4, atol=1e-3)
            assert defense.surrogate(1)(x, noise).isfinite().all()
        relaxed = defense.relaxed()(x, noise) if "relaxed" in DEFENSES[name].card.handles else None
    if relaxed is not None:
        # Where the handle is not offered there is no choice to soften, and the process is the same.
        assert torch.equal(relaxed, drawn) == ("relaxed" not in defense.card.handles)
    if name == "apndc" and "stages" not in defense.card.handles:
        with pytest.raises(InputError, match="no stages"):
            defense.stages()


@each_row
def test_a_card_with_options_says_so(name: str, options: Options) -> None:
    spec = DEFENSES[name]
    card = spec.build("digits", options=options).card
    assert card.summary != spec.card.summary or card.choices != spec.card.choices
    assert (card.name, card.source, card.weights, card.datasets) == (
        spec.card.name,
        spec.card.source,
        spec.card.weights,
        spec.card.datasets,
    )
    assert ("σ" in card.title) == ("σ" in spec.card.title and "sigma" not in options)
    # It is a valid card, and every attack that its traits demand finds its handle.
    assert Card.model_validate_json(card.model_dump_json(), strict=True) == card
    assert not any(attack.missing for attack in load_protocol("2026.1").plan(card, 10, "standard"))


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_defaults_are_the_registered_defense(name: str, batch: tuple[Tensor, Noise]) -> None:
    (x, noise), spec = batch, DEFENSES[name]
    plain = spec.build("digits")
    assert plain.card == spec.card
    spelt = spec.build("digits", options={option: str(value) for option, value in spec.options.items()})
    assert spelt.card == spec.card
    assert spec.recorded("digits", {option: str(value) for option, value in spec.options.items()}) == {}
    with torch.no_grad():
        assert torch.equal(spelt(x, noise), plain(x, noise))


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, changes in CHANGES.items() for option in changes]
)
def test_each_option_changes_the_answer(name: str, option: str, batch: tuple[Tensor, Noise]) -> None:
    (x, noise), spec = batch, DEFENSES[name]
    options = {option: CHANGES[name][option]}
    changed = spec.build("digits", options=options)
    assert spec.recorded("digits", options).keys() == {option}
    with torch.no_grad():
        if option in ("votes", "soft"):
            assert not torch.equal(changed(x, noise), spec.build("digits")(x, noise))
        else:
            assert not torch.allclose(changed.draw(x, noise), spec.build("digits").draw(x, noise), atol=1e-4)


def test_the_table_of_changes_has_every_option() -> None:
    for name, changes in CHANGES.items():
        assert set(DEFENSES[name].options) - UNCHANGED == set(changes)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gdmp", {"scale": "-1"}, r"scale must be at least 0 .*got -1\."),
        ("gdmp", {"rounds": "0"}, r"at least 1 round, got 0\."),
        ("gdmp", {"steps": "0"}, "from level 100 takes 1 to 100 steps, got 0"),
        ("gdmp", {"level": "1001"}, "levels 0 to 1000, got 1001"),
        ("gdmp", {"denoiser": "nowhere"}, "no denoiser at 'nowhere'"),
        ("likelihood_maximisation", {"steps": "0"}, "at least 1 step, got 0"),
        ("likelihood_maximisation", {"radius": "0"}, "a step and a radius above 0, got 0.1 and 0"),
        ("likelihood_maximisation", {"step_size": "-1"}, "above 0, got -1 and 0.2"),
        ("likelihood_maximisation", {"lowest": "0.9"}, "0 < lowest <= highest, got 0.9 and 0.6"),
        ("likelihood_maximisation", {"lowest": "0"}, "0 < lowest <= highest, got 0 and 0.6"),
        ("likelihood_maximisation", {"highest": "1000"}, "needs σ = 1000"),
        ("victim_guided", {"target": "harder"}, "target must be one of hard, soft, x0 .*got 'harder'"),
        ("victim_guided", {"at": "x0"}, "at one of x_t, x0hat, got 'x0' and 'x0'"),
        ("victim_guided", {"scale": "-1"}, "scale must be at least 0"),
        ("robust_guidance", {"label_scale": "-1"}, "label_scale must be at least 0"),
        ("robust_guidance", {"distance_scale": "-1"}, "distance_scale must be at least 0"),
        ("robust_guidance", {"steps": "200"}, "takes 1 to 150 steps, got 200"),
        ("robust_guidance", {"guide": "x"}, "no classifier 'x'"),
        ("smoothing", {"denoiser": "x"}, "has no option 'denoiser'"),
        ("diffusion_classifier", {"weighting": "kl"}, "training or elbo, got 'kl'"),
        ("diffusion_classifier", {"spacing": "even"}, "linear or log, got 'even'"),
        ("diffusion_classifier", {"levels": "0"}, "at least 1 level, got 0.3 to 3.0 with 0"),
        ("diffusion_classifier", {"samples": "0"}, "at least 1, got 0"),
        ("diffusion_classifier", {"lowest": "0.001"}, "needs σ = 0.001"),
        ("diffusion_classifier", {"every": "3"}, "needs keep, the classes kept"),
        ("diffusion_classifier", {"keep": "2", "every": "1"}, "every 2nd level, or fewer; got every = 1"),
        ("diffusion_classifier", {"keep": "11"}, "keeps 1 to 10 classes"),
        ("epndc", {"weighting": "elbo"}, "kl or training, got 'elbo'"),
        ("epndc", {"weighting": ""}, "kl or training, got ''"),
        ("epndc", {"sigma": "0"}, r"0 < 2·sigma < highest = 3, got sigma = 0\."),
        ("epndc", {"sigma": "2"}, "got sigma = 2"),
        ("epndc", {"votes": "0"}, "at least 1 vote, got 0"),
        ("apndc", {"weighting": "kl"}, "training or elbo, got 'kl'"),
        ("apndc", {"renoise": "both"}, "denoised or noised, got 'both'"),
        ("apndc", {"sigma": "-1"}, "got sigma = -1"),
        ("apndc", {"keep": "-1"}, "keeps 1 to 10 classes"),
        ("apndc", {"votes": "-3"}, "at least 1 vote, got -3"),
        ("diffusion_classifier", {"bound": "0.5", "keep": "3"}, "give one of them"),
        ("diffusion_classifier", {"bound": "-1"}, "bound must be"),
        ("smoothing", {"votes": "0"}, "at least 1 vote, got 0"),
        ("smoothing", {"sigma": "0"}, "sigma: expected a positive"),
        ("smoothing", {"soft": "true", "temperature": "0"}, "temperature: expected a positive"),
        ("smoothing", {"temperature": "2"}, "needs soft=true"),
    ],
)
def test_what_can_not_be_is_refused(name: str, options: Options, says: str) -> None:
    with pytest.raises(InputError, match=says):
        DEFENSES[name].build("digits", options=options)


# Denoisers that are brought


def write(folder: Path, state: Mapping[str, Tensor], classes: int | None = None) -> str:
    """A diffusers folder with a U-Net of the digits boards."""
    config = {key: value for key, value in small_unet().config.items() if not key.startswith("_")}
    network = UNet2DModel.from_config({**config, "num_class_embeds": classes})
    network.load_state_dict(dict(state))
    network.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def unet() -> dict[str, Tensor]:
    """The packaged denoiser's weights."""
    state = load_file(WEIGHTS / "digits/denoiser.safetensors")
    return {name.removeprefix("network."): value for name, value in state.items()}


@pytest.fixture(scope="module")
def conditional(unet: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packaged denoiser, told of ten classes that change its answer a little."""
    embedding = torch.randn(
        10, unet["time_embedding.linear_2.weight"].shape[0], generator=torch.Generator().manual_seed(0)
    )
    return write(tmp_path_factory.mktemp("conditional"), {**unet, "class_embedding.weight": 0.05 * embedding}, 10)


@pytest.mark.parametrize("name", [*BROUGHT, "robust_guidance"])
def test_the_packaged_denoiser_can_be_brought(
    name: str, unet: dict[str, Tensor], batch: tuple[Tensor, Noise], tmp_path: Path
) -> None:
    (x, noise), spec = batch, DEFENSES[name]
    options = {"denoiser": write(tmp_path / "mine", unet)}
    defense = spec.build("digits", options=options)
    with torch.no_grad():
        assert torch.equal(defense.draw(x, noise), spec.build("digits").draw(x, noise))
    files = spec.files("digits", options)
    assert "denoiser/config.json" in files
    assert "digits/denoiser.safetensors" not in files
    assert defense.card.weights == {key: sha256_of_file(path) for key, path in files.items()}
    assert spec.recorded("digits", options) == {"denoiser": "mine"}
    assert_calls(defense, x, noise)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("diffusion_classifier", {"levels": "3", "samples": "2"}, 3 * 2 * 10),
        ("diffusion_classifier", {"levels": "4", "keep": "3", "every": "2"}, 2 * 10 + 2 * 3),
        ("epndc", {"levels": "2", "votes": "2"}, 2 * 10),
    ],
)
def test_a_conditional_denoiser_costs_a_call_a_class(
    name: str, options: Options, expected: int, conditional: str, batch: tuple[Tensor, Noise]
) -> None:
    (x, noise), spec = batch, DEFENSES[name]
    options = {**options, "denoiser": conditional}
    defense = spec.build("digits", options=options)
    assert defense.card.network_calls == expected
    assert_calls(defense, x, noise)
    assert defense.card.weights == {k: sha256_of_file(path) for k, path in spec.files("digits", options).items()}
    assert any("a network call a class" in choice for choice in defense.card.choices)
    assert not any("all classes from one call" in choice for choice in defense.card.choices)
    assert defense(x, noise).isfinite().all()


def test_a_diffusion_classifier_needs_the_classes_of_its_data(unet: dict[str, Tensor], tmp_path: Path) -> None:
    width = unet["time_embedding.linear_2.weight"].shape[0]
    five = write(tmp_path / "five", {**unet, "class_embedding.weight": torch.zeros(5, width)}, 5)
    for source, known in ((write(tmp_path / "none", unet), "no"), (five, "5")):
        with pytest.raises(InputError, match=f"knows {known} classes; expected a U-Net that takes the 10 of digits"):
            DEFENSES["epndc"].build("digits", options={"denoiser": source})


@pytest.mark.parametrize("name", [*BROUGHT, "diffusion_classifier", "epndc"])
def test_other_images_need_their_denoiser(name: str, conditional: str) -> None:
    with pytest.raises(InputError, match=r"has weights for digits, not for 'cifar10'\. Give it --option denoiser=…"):
        DEFENSES[name].build("cifar10")
    with pytest.raises(InputError, match="is for images of 1 channels; those of cifar10 have 3"):
        DEFENSES[name].build("cifar10", options={"denoiser": conditional})
