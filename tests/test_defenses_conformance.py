"""Every registered defense is what the vocabulary says a defense is, and what its own card says it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.chain import State
from assay.defense import Defense, aggregate
from assay.defenses.checkpoints import read_manifest
from assay.defenses.networks import resize_and_pad
from assay.errors import InputError
from assay.noise import Noise
from assay.registry import DEFENSES

HANDLES = ("stages", "chain", "surrogate", "relaxed", "components", "certified")
NETWORKS: dict[str, tuple[str, ...]] = {
    "undefended": ("network",),
    "adversarial_training": ("network",),
    "adversarial_training_l2": ("network",),
    "trades": ("network",),
    "lipschitz": ("network",),
    "smoothing": ("network",),
    "diffpure": ("denoiser.network", "classifier"),
    "diffusion_classifier": ("denoiser.network",),
    "epndc": ("denoiser.network",),
    "apndc": ("denoiser.network",),
    "denoised_smoothing": ("denoiser.network", "classifier"),
    "variational_smoothing": ("selector", "classifier"),
    "adp": ("denoiser.network", "classifier"),
    "adp_energy": ("denoiser.network", "classifier"),
    "gdmp": ("denoiser.network", "classifier"),
    "likelihood_maximisation": ("denoiser.network", "classifier"),
    "victim_guided": ("denoiser.network", "classifier"),
    "robust_guidance": ("denoiser.network", "guide", "classifier"),
    "bit_depth": ("classifier",),
    "saturated_logits": ("network",),
    "random_resize": ("classifier",),
}
"""The networks of each defense, whose calls are counted."""
BROKEN = {"bit_depth", "saturated_logits", "random_resize"}


def having(handle: str) -> list[str]:
    """The defenses whose card lists a handle."""
    return [name for name in NETWORKS if handle in DEFENSES[name].card.handles]


every = pytest.mark.parametrize("name", sorted(NETWORKS))
each_chain = pytest.mark.parametrize("name", having("chain"))


@pytest.fixture(scope="module")
def built() -> dict[str, Defense]:
    return {name: DEFENSES[name].build("digits") for name in NETWORKS}


@pytest.fixture(scope="module")
def precise() -> dict[str, Defense]:
    """The same in double precision, where finite differences mean something."""
    return {name: DEFENSES[name].build("digits").double() for name in NETWORKS}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Noise]:
    ids = data.board_ids("digits")[:12]
    x, y = data.load("digits", ids)
    return x, y, Noise.from_seed(0, ids)


@pytest.fixture(scope="module")
def inner() -> tuple[Tensor, Tensor, Noise]:
    """Three images inside the box, in double precision."""
    ids = data.board_ids("digits")[:3]
    x, y = data.load("digits", ids)
    return 0.1 + 0.8 * x.double(), y, Noise.from_seed(0, ids)


def networks(name: str, defense: Defense) -> list[nn.Module]:
    return [defense.get_submodule(path) for path in NETWORKS[name]]


@contextmanager
def counting(modules: list[nn.Module]) -> Iterator[list[int]]:
    """Rows of each forward call of the modules."""
    calls: list[int] = []
    hooks = [module.register_forward_hook(lambda m, inputs, output: calls.append(len(inputs[0]))) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def slope(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy of `function(x)`, summed over rows."""
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(function(point), y, reduction="sum"), point)
    return gradient


def assert_finite_difference(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The gradient of a mix of logits against central differences, along a random direction and along itself."""
    mix = Noise.from_seed(2, len(x)).normal("mix", shape=(10,), like=x)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((function(point) * mix).sum(), point)
    assert gradient.abs().max() > 0
    random_ = Noise.from_seed(1, len(x)).normal("direction", shape=x.shape[1:], like=x)
    for direction in (random_, gradient / gradient.square().mean().sqrt()):
        step = 1e-6
        with torch.no_grad():
            up, down = ((function(x + sign * step * direction) * mix).sum() for sign in (1, -1))
        numeric, analytic = float((up - down) / (2 * step)), float((gradient * direction).sum())
        scale = float(gradient.norm() * direction.norm())
        assert abs(numeric - analytic) < 1e-4 * abs(analytic) + 1e-6 * scale


@every
def test_logits_have_a_row_a_sample_for_any_n(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    for n in (0, 1, 5):
        logits = built[name](x[:n], noise[:n])
        assert logits.shape == (n, 10)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


@every
def test_the_same_noise_gives_the_same_answer(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    before = torch.get_rng_state()
    first, second = built[name](x, noise), built[name](x, noise)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_other_noise_changes_a_draw_exactly_where_the_card_says_stochastic(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    defense = built[name]
    differs = not torch.equal(defense.draw(x, noise), defense.draw(x, noise.child("other")))
    assert differs == defense.card.traits.stochastic


@every
def test_rows_keep_their_answers_in_any_subset(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    rows = torch.tensor([7, 0, 11, 3])
    whole = built[name].draw(x, noise)
    assert torch.allclose(built[name].draw(x[rows], noise[rows]), whole[rows], atol=1e-4)
    assert torch.allclose(built[name](x[rows], noise[rows]), built[name](x, noise)[rows], atol=1e-4)


@every
def test_the_input_is_not_changed(name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]) -> None:
    x, _, noise = batch
    given = x.clone()
    built[name](given, noise)
    assert torch.equal(given, x)


@every
def test_handles_are_exactly_the_overridden_ones(name: str, built: dict[str, Defense]) -> None:
    defense = built[name]
    overridden = {handle for handle in HANDLES if getattr(type(defense), handle) is not getattr(Defense, handle)}
    assert set(defense.card.handles) - {"votes"} == overridden
    assert ("votes" in defense.card.handles) == (defense.card.votes.draws > 1)


@every
def test_network_calls_are_as_declared(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    defense = built[name]
    with counting(networks(name, defense)) as calls, torch.no_grad():
        defense.draw(x, noise)
    assert sum(calls) == defense.card.network_calls * len(x)
    point = x.clone().requires_grad_()
    with counting(networks(name, defense)) as calls:
        logits = defense.draw(point, noise)
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), point)
    assert sum(calls) == defense.card.gradient_calls * len(x)


@each_chain
def test_chains_count_their_calls(name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]) -> None:
    x, _, noise = batch
    defense = built[name]
    chains = [defense.chain()]
    if "surrogate" in defense.card.handles:
        chains.append(defense.surrogate(2))
        assert len(chains[1]) <= len(chains[0])
        assert chains[1].network_calls < chains[0].network_calls
    for chain in chains:
        with counting(networks(name, defense)) as calls, torch.no_grad():
            chain(x, noise)
        assert sum(calls) == chain.network_calls * len(x)
    assert chains[0].network_calls == defense.card.network_calls


@each_chain
def test_the_chain_is_the_draw(name: str, precise: dict[str, Defense], inner: tuple[Tensor, Tensor, Noise]) -> None:
    x, y, noise = inner
    defense = precise[name]
    chain = defense.chain()
    with torch.no_grad():
        assert torch.allclose(chain(x, noise), defense.draw(x, noise), rtol=1e-9, atol=1e-9)
    drawn, exact, full = (
        slope(function, x, y)
        for function in (
            lambda z: defense.draw(z, noise),
            lambda z: chain(z, noise),
            lambda z: chain(z, noise, mode="full"),
        )
    )
    assert torch.allclose(exact, full, rtol=1e-10, atol=1e-10 * float(full.abs().max()))
    assert torch.allclose(drawn, full, rtol=1e-7, atol=1e-8 * float(full.abs().max()))


@each_chain
def test_every_step_replays_bit_for_bit(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    chain = built[name].chain()
    states: list[State] = []
    with torch.no_grad():
        chain(x, noise, observe=lambda i, state: states.append(state))
        for i, step in enumerate(chain.steps):
            again = step(states[i], x, noise.child("step", i))
            for kept, replayed in zip(parts(states[i + 1]), parts(again), strict=True):
                assert torch.equal(kept, replayed)
    assert len(states) == len(chain) + 1


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "bit_depth"])
def test_gradients_are_finite_differences(
    name: str, precise: dict[str, Defense], inner: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = inner
    assert_finite_difference(lambda z: precise[name].draw(z, noise), x)


@pytest.mark.parametrize("name", sorted({*having("relaxed"), *having("surrogate")}))
def test_stand_ins_have_gradients_of_their_own(
    name: str, precise: dict[str, Defense], inner: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = inner
    defense = precise[name]
    for handle, chain in (("relaxed", defense.relaxed), ("surrogate", lambda: defense.surrogate(2))):
        if handle in defense.card.handles:
            stand_in = chain()
            assert stand_in(x, noise).shape == (3, 10)
            assert_finite_difference(lambda z, stand_in=stand_in: stand_in(z, noise), x)


@pytest.mark.parametrize("name", having("components"))
def test_components_are_classifiers(name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]) -> None:
    x, _, noise = batch
    components = built[name].components()
    assert components
    for component in components.values():
        point = x.clone().requires_grad_()
        logits = component(point, noise)
        assert logits.shape == (12, 10)
        assert torch.autograd.grad(logits.square().sum(), point)[0].abs().sum() > 0


@every
def test_inner_gradients_are_taken_exactly_where_the_card_says(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, noise = batch
    taken: list[object] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: taken.append(args) or real(*args, **kwargs))
    with torch.no_grad():
        built[name].draw(x, noise)
    assert bool(taken) == built[name].card.traits.inner_gradient
    if taken:
        # Dropping the second-order terms makes another gradient of the same answer.
        chain = built[name].chain()
        first = chain.first_order()
        with torch.no_grad():
            assert torch.equal(first(x, noise), chain(x, noise))
        assert not torch.allclose(slope(lambda z: first(z, noise), x, y), slope(lambda z: chain(z, noise), x, y))


@every
def test_traits_and_handles_agree(name: str, built: dict[str, Defense]) -> None:
    card = built[name].card
    assert card.traits.purifies == ("stages" in card.handles)
    assert not card.traits.iterative or {"chain", "surrogate"} <= set(card.handles)
    if card.traits.iterative:
        assert len(built[name].chain()) > 1
    if card.reconstruction:
        assert card.choices


@every
def test_networks_are_frozen_and_evaluating(name: str, built: dict[str, Defense]) -> None:
    listed = {id(p) for network in networks(name, built[name]) for p in network.parameters()}
    assert listed == {id(p) for p in built[name].parameters()}
    assert not any(parameter.requires_grad for parameter in built[name].parameters())
    assert not any(module.training for module in built[name].modules())


@every
def test_two_builds_share_no_parameter(name: str, built: dict[str, Defense]) -> None:
    other = DEFENSES[name].build("digits")
    for mine, theirs in zip(built[name].parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


@every
def test_the_spec_names_its_files(name: str) -> None:
    spec = DEFENSES[name]
    assert spec.card.name == name
    assert spec.source is not None
    assert spec.source.is_file()
    for dataset in spec.card.datasets:
        try:
            files = spec.weight_files(dataset)
        except InputError as error:
            if "not installed" in str(error):  # weights that come in a package of their own
                continue
            raise
        assert files
        assert set(files) <= set(spec.card.weights)
        assert all(path.is_file() for path in files.values())


@every
def test_the_gradient_is_useful_exactly_where_the_card_says(
    name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    point = x.clone().requires_grad_()
    logits = built[name](point, noise)
    useful = logits.requires_grad and bool(torch.autograd.grad(logits.square().sum(), point)[0].abs().sum() > 0)
    assert useful != built[name].card.traits.non_differentiable


@pytest.mark.parametrize("name", having("stages"))
def test_stages_compose_to_the_draw(name: str, built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]) -> None:
    x, _, noise = batch
    stages = built[name].stages()
    with torch.no_grad():
        purified = stages.purify(x, noise)
        assert purified.shape == x.shape
        assert not torch.equal(purified, x)
        assert torch.equal(stages.classify(purified, noise), built[name].draw(x, noise))


def test_smoothing_answers_by_majority_of_its_draws(
    built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    defense = built["smoothing"]
    votes = defense.card.votes
    draws = torch.stack(
        [defense.draw(x, noise.draws(votes.draws)[torch.arange(len(x)) * votes.draws + j]) for j in range(votes.draws)]
    )
    shares = nn.functional.one_hot(draws.argmax(-1), 10).double().mean(0)
    answer = defense(x, noise)
    assert torch.allclose(answer.exp().double(), shares.clamp_min(0.5 / votes.draws), atol=1e-6)
    assert torch.equal(answer, aggregate(draws.transpose(0, 1), votes))


def test_smoothing_adds_noise_of_the_declared_size(built: dict[str, Defense]) -> None:
    defense = built["smoothing"]
    sigma = read_manifest()["digits/smoothing.safetensors"]["recipe"]["sigma"]
    seen: list[Tensor] = []
    hook = defense.network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.full((2000, 1, 8, 8), 0.5)
    defense.draw(x, Noise.from_seed(0, 2000))
    hook.remove()
    added = seen[0] - x
    # 128,000 values: the mean's deviation is sigma/358, the standard deviation's sigma/506.
    assert abs(float(added.mean())) < 5 * sigma / 358
    assert abs(float(added.std()) - sigma) < 5 * sigma / 506


def test_smoothing_offers_its_network_without_noise(
    built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    base = built["smoothing"].components()["base"]
    assert torch.equal(base(x, noise), base(x, noise.child("other")))


def test_bit_depth_keeps_four_levels(built: dict[str, Defense]) -> None:
    x = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    purified = built["bit_depth"].stages().purify(x, Noise.from_seed(0, 1))
    assert torch.allclose(purified.unique(), torch.tensor([0, 1, 2, 3]) / 3)
    assert float((purified - x).abs().max()) <= 1 / 6 + 1e-6


def test_the_calibrators_are_known_broken_and_nothing_else() -> None:
    assert {name for name in DEFENSES if DEFENSES[name].card.known_broken} == BROKEN


def test_every_registered_defense_stands_in_this_suite() -> None:
    # Other test modules register a toy for as long as the session lasts.
    assert {name for name in DEFENSES if "digits" in DEFENSES[name].card.datasets} == set(NETWORKS)


def test_saturated_logits_leave_the_cross_entropy_no_gradient(
    built: dict[str, Defense], batch: tuple[Tensor, Tensor, Noise]
) -> None:
    x, _, noise = batch
    y = built["undefended"](x, noise).argmax(1)
    defense = built["saturated_logits"]
    assert not slope(lambda z: defense.draw(z, noise), x, y).any()
    assert slope(lambda z: defense.draw(z, noise) / defense.scale, x, y).any()


def test_random_resizing_places_every_size_everywhere() -> None:
    x = torch.ones(4000, 1, 8, 8)
    padded = resize_and_pad(x, Noise.from_seed(0, 4000), 10)
    # Of 8, 9 and 10 pixels a third each: full images stay as they are, the others leave room at the edges.
    full = (padded == 1).flatten(1).all(1).double().mean()
    assert abs(float(full) - 1 / 3) < 4 * (2 / 9 / 4000) ** 0.5
    corners = torch.stack([padded[:, 0, i, j] for i in (0, -1) for j in (0, -1)]).double().mean(1)
    assert float(corners.max() - corners.min()) < 0.05
