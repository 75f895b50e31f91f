"""Every registered defense is what the vocabulary says a defense is, and what its own card says it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from assay import data
from assay.defense import Defense, aggregate
from assay.defenses.checkpoints import read_manifest
from assay.noise import Noise
from assay.registry import DEFENSES

HANDLES = ("stages", "chain", "surrogate", "components")
NETWORKS: dict[str, Callable[[Defense], list[nn.Module]]] = {
    "undefended": lambda defense: [defense.network],
    "adversarial_training": lambda defense: [defense.network],
    "smoothing": lambda defense: [defense.network],
    "diffpure": lambda defense: [defense.denoiser.network, defense.classifier],
    "bit_depth": lambda defense: [defense.network],
}
every = pytest.mark.parametrize("name", sorted(NETWORKS))


@pytest.fixture(scope="module")
def built() -> dict[str, Defense]:
    return {name: DEFENSES[name].build("digits") for name in NETWORKS}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Noise]:
    ids = data.board_ids("digits")[:12]
    x, y = data.load("digits", ids)
    return x, y, Noise.from_seed(0, ids)


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
    calls: list[int] = []
    hooks = [
        network.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
        for network in NETWORKS[name](built[name])
    ]
    with torch.no_grad():
        built[name].draw(x, noise)
    for hook in hooks:
        hook.remove()
    assert sum(calls) == built[name].card.network_calls * len(x)


@every
def test_networks_are_frozen_and_evaluating(name: str, built: dict[str, Defense]) -> None:
    networks = NETWORKS[name](built[name])
    assert {id(p) for network in networks for p in network.parameters()} == {id(p) for p in built[name].parameters()}
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
        files = spec.weight_files(dataset)
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


@pytest.mark.parametrize("name", ["diffpure", "bit_depth"])
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


def test_only_the_calibrator_is_known_broken() -> None:
    assert [name for name in NETWORKS if DEFENSES[name].card.known_broken] == ["bit_depth"]
