"""Victim guidance: the guided prediction in closed form, its options, its gradient, and where it leads."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from assay.defenses.guidance import has_kinks
from assay.defenses.purifier import Purifier
from assay.defenses.victim_guided import SPEC, LabelOf, TowardsLabel, VictimGuided, Where
from assay.errors import InputError
from assay.noise import Noise
from assay.registry import resolve_defense

checks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("guided_checks.py"))))

OPTIONS: dict[str, dict[str, Any]] = {
    f"{target}-{at}": {"target": target, "at": at} for target in get_args(LabelOf) for at in get_args(Where)
}
options = pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)


def guided(scale: float = 0.5, **changes: Any) -> TowardsLabel:
    given: dict[str, Any] = {"victim": checks.curved(), "target": "x0", "at": "x0hat", **changes}
    return TowardsLabel(checks.mixture(), 300, 3, scale=scale, **given)


@pytest.fixture(scope="module")
def defense() -> VictimGuided:
    built = SPEC.build("digits").double()
    assert isinstance(built, VictimGuided)
    return built


@options
def test_without_scale_it_is_diffpure(chosen: dict[str, Any]) -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    plain = Purifier(checks.mixture(), 300, 3).chain()(x, noise)
    assert torch.equal(guided(0.0, **chosen).chain()(x, noise), plain)
    assert not torch.allclose(guided(**chosen).chain()(x, noise), plain)


@options
def test_the_prediction_is_ddpm_s_corrected_noise(chosen: dict[str, Any]) -> None:
    """ε̃ = ε − s·√(1−ᾱ)·∇_{x_t} log p, then x̃_0 = (x_t − √(1−ᾱ)·ε̃)/√ᾱ, all at the variance-preserving scale."""
    purifier, t, x = guided(**chosen), 250, checks.images()
    denoiser, victim = purifier.denoiser, purifier.victim
    alpha_bar = denoiser.schedule.alpha_bars[t]
    z = 2 * checks.images(6)[3:] - 1
    x_t = (alpha_bar.sqrt() * z).requires_grad_()
    predicted = (x_t - (1 - alpha_bar).sqrt() * denoiser.eps(x_t, t)) / alpha_bar.sqrt()
    seen = predicted if purifier.at == "x0hat" else x_t / alpha_bar.sqrt()
    log_p = victim((seen + 1) / 2).log_softmax(1)
    label = victim((predicted + 1) / 2 if purifier.target == "x0" else x).argmax(1)
    weights = victim(x).softmax(1) if purifier.target == "soft" else torch.eye(3).double()[label]
    (slope,) = torch.autograd.grad((weights * log_p).sum(), x_t)
    eps = denoiser.eps(x_t, t) - purifier.scale * (1 - alpha_bar).sqrt() * slope
    expected = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    # A step to σ = 0 is the guided prediction itself.
    mean, variance = purifier.mean(z, purifier.keep(x), x, denoiser.schedule.sigma(t), 0.0, Noise.from_seed(0, 3))
    assert variance == 0
    assert torch.allclose(mean, expected.detach(), atol=1e-9)


@pytest.mark.parametrize("at", get_args(Where))
def test_the_prediction_in_closed_form(at: Where) -> None:
    std, sigma, scale, slope = 0.4, 0.7, 1.5, 0.6
    purifier = TowardsLabel(
        checks.gaussian(std), 300, 3, victim=checks.Brightness(slope), scale=scale, target="hard", at=at
    )
    bright, z = torch.full((2, 1, 4, 4), 0.8).double(), 2 * checks.images(2) - 1
    shrink = std**2 / (std**2 + sigma**2)
    x_0 = 0.25 + shrink * (z - 0.25)
    seen = z if at == "x_t" else x_0
    # Two linear logits 2·k·b apart: ∇ log p_bright = (1 − p_bright)·2k a pixel, half of that by the decoding.
    margin = 2 * slope * (seen / 2).flatten(1).sum(1)
    pull = (1 - margin.sigmoid()) * slope * (1 if at == "x_t" else shrink)
    expected = x_0 + scale * sigma**2 * pull[:, None, None, None]
    mean, _ = purifier.mean(z, purifier.keep(bright), bright, sigma, 0.0, Noise.from_seed(0, 2))
    assert torch.allclose(mean, expected, atol=1e-12)


@pytest.mark.parametrize("at", get_args(Where))
@pytest.mark.parametrize("target", ["hard", "soft"])
def test_guidance_pulls_samples_to_the_target(target: LabelOf, at: Where) -> None:
    x, noise = torch.full((200, 1, 4, 4), 0.55).double(), Noise.from_seed(0, 200)

    def bright(scale: float) -> float:
        made = TowardsLabel(
            checks.mixture(), 900, 12, victim=checks.Brightness(3.0), scale=scale, target=target, at=at
        ).chain()
        return float((made(x, noise).flatten(1).mean(1) > 0.5).double().mean())

    # Level 900 forgets the input, so that without guidance the two modes are equally likely.
    assert 0.35 < bright(0.0) < 0.65
    assert bright(1.0) > 0.95


def test_the_predicted_image_s_own_label_does_not_follow_the_input() -> None:
    x, noise = torch.full((200, 1, 4, 4), 0.55).double(), Noise.from_seed(0, 200)
    made = TowardsLabel(checks.mixture(), 900, 12, victim=checks.Brightness(3.0), scale=1.0, target="x0", at="x0hat")
    assert 0.3 < float((made.chain()(x, noise).flatten(1).mean(1) > 0.5).double().mean()) < 0.7


@pytest.mark.parametrize("wrong", [{"target": "label"}, {"at": "x0"}])
def test_unknown_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="target must be one of hard, soft, x0 and at one of x_t, x0hat"):
        guided(**wrong)


@options
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_gradient_on_a_mixture(chosen: dict[str, Any], temperature: float) -> None:
    chain = guided(temperature=temperature, rounds=2, **chosen).chain().then(lambda z, noise: checks.curved()(z))
    checks.check_gradient(chain, checks.images())


@options
def test_second_order_terms_matter(chosen: dict[str, Any]) -> None:
    checks.check_second_order(guided(2.0, **chosen).chain(), checks.images())


def test_the_gradient_and_second_order_on_digits(defense: VictimGuided) -> None:
    for chain in (defense.chain(), defense.relaxed()):
        checks.check_gradient(chain, checks.digits())
        # The victim is sure of most predicted images, so that little of the guidance is left there.
        checks.check_second_order(chain, checks.digits(4), least=1e-5)


def test_the_path_through_the_target_reaches_the_input() -> None:
    class Severed(TowardsLabel):
        def keep(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.detach() for part in super().keep(x))

    x, noise = checks.images(), Noise.from_seed(0, 3)
    for target, temperature, matters in (("soft", 0.0, True), ("hard", 0.5, True), ("hard", 0.0, False)):
        whole = guided(2.0, target=target, temperature=temperature)
        severed = Severed(**{name: getattr(whole, name) for name in whole.__dataclass_fields__})
        same = torch.allclose(
            checks.gradient(whole.chain(), x, noise), checks.gradient(severed.chain(), x, noise), atol=1e-9
        )
        assert same != matters


@options
def test_a_cold_relaxation_is_the_defense(chosen: dict[str, Any]) -> None:
    x, noise = checks.images(), Noise.from_seed(0, 3)
    hard = guided(**chosen)
    cold, warm = (replace(hard, temperature=value).chain()(x, noise) for value in (1e-4, 0.5))
    exact = hard.chain()(x, noise)
    assert torch.allclose(cold, exact, atol=1e-6)
    assert torch.allclose(warm, exact, atol=1e-6) == (hard.target == "soft")


def test_first_order_keeps_the_gradient_of_the_prediction() -> None:
    """At scale 0 the guidance contributes nothing, so that both gradients are the unguided process's."""
    x, noise = checks.images(), Noise.from_seed(0, 3)
    plain = checks.gradient(Purifier(checks.mixture(), 300, 3).chain(), x, noise)
    for chain in (guided(0.0).chain(), guided(0.0).chain().first_order()):
        assert torch.allclose(checks.gradient(chain, x, noise), plain, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "jumps"),
    [(nn.ReLU(), True), (nn.ReLU(inplace=True), True), (nn.LeakyReLU(), True), (nn.PReLU(), True), (nn.ReLU6(), True),
     (nn.MaxPool2d(2), True), (nn.Hardswish(), True), (nn.SiLU(), False), (nn.GELU(), False), (nn.Softplus(), False),
     (nn.AvgPool2d(2), False), (nn.BatchNorm2d(4), False)],
    ids=str,
)  # fmt: skip
def test_a_network_with_kinks_is_told_from_a_smooth_one(layer: nn.Module, jumps: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Flatten(), nn.LazyLinear(5)).eval()
    assert has_kinks(network, torch.zeros(1, 3, 8, 8)) is jumps


@pytest.mark.parametrize(("activation", "scale"), [("ReLU", "1"), ("SiLU", "1"), ("ReLU", "0")])
def test_a_victim_of_relus_makes_the_process_jump(activation: str, scale: str, tmp_path: Path) -> None:
    code = tmp_path / "victim.py"
    code.write_text(
        "from torch import nn\nfrom assay.registry import DEFENSES\n"
        f"network = nn.Sequential(DEFENSES['undefended'].build('digits').network, nn.{activation}())\n"
    )
    options = {"classifier": f"{code}:network", "scale": scale}
    defense = resolve_defense("victim_guided", trust=True).build("digits", options=options)
    assert defense.card.traits.non_differentiable is (activation == "ReLU" and scale == "1")


@pytest.mark.parametrize(("at", "jumps"), [("x0hat", True), ("x_t", False)])
def test_a_denoiser_of_relus_makes_it_jump_where_the_gradient_passes(at: str, jumps: bool, tmp_path: Path) -> None:
    options = {"denoiser": checks.write_denoiser(tmp_path, "ReLU"), "at": at}
    defense = resolve_defense("victim_guided", trust=True).build("digits", options=options)
    assert defense.card.traits.non_differentiable is jumps


def test_replay(defense: VictimGuided) -> None:
    checks.check_replay(defense, checks.digits())


@options
def test_calls_are_as_declared(chosen: dict[str, Any], defense: VictimGuided) -> None:
    other = VictimGuided(replace(defense.purifier, **chosen), defense.classifier, 10)
    forward, backward = checks.calls(other, [other.denoiser.network, other.classifier], checks.digits(3))
    assert forward == other.chain().network_calls
    assert backward == 2 * forward
    registered = {"target": defense.purifier.target, "at": defense.purifier.at}
    if chosen == registered:
        assert (forward, backward) == (defense.card.network_calls, defense.card.gradient_calls)


def test_the_surrogate_starts_at_the_same_level(defense: VictimGuided) -> None:
    x, noise, starts = checks.digits(), Noise.from_seed(0, 2), list[Tensor]()
    for chain in (defense.chain(), defense.surrogate(2)):
        chain(x, noise, observe=lambda i, state: starts.append(state[0]) if i == 0 else None)
    assert len(defense.surrogate(2)) == 2
    assert torch.equal(starts[0], starts[1])
