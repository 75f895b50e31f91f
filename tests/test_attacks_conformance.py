"""One suite for every registered attack: budget, purity, determinism, and batches and defenses that are awkward."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from assay.attack import AttackSpec, Target
from assay.attacks.autoattack import _Model
from assay.card import Card, Traits
from assay.chain import Chain
from assay.defense import Defense, Stages
from assay.errors import InputError, ThreatViolation
from assay.noise import Noise
from assay.norms import TOLERANCE, violation
from assay.registry import ATTACKS
from assay.threat import NORMS, Norm, ThreatModel

N, K, SHAPE = 7, 4, (1, 8, 8)
EPS: dict[Norm, Any] = {"linf": "1/20", "l2": "1/3"}

BRIEF: dict[str, dict[str, Any]] = {
    "uniform": {"tries": 3},
    "pgd": {"steps": 6, "restarts": 2},
    "apgd": {"steps": 8, "restarts": 2},
    "square": {"queries": 25},
    "bpda": {"steps": 5},
    "through_chain": {"steps": 5},
    "surrogate": {"steps": 5, "chain_steps": 2},
    "transfer": {"steps": 5},
    "step_losses": {"steps": 5},
    "diffhammer": {"steps": 5, "restarts": 1},
}
"""Small budgets. An attack that is not listed runs with its defaults."""
EOT = (
    "uniform",
    "pgd",
    "apgd",
    "square",
    "bpda",
    "through_chain",
    "surrogate",
    "transfer",
    "step_losses",
    "diffhammer",
)
REFERENCE = ("autoattack",)
"""Wrap foreign code that works on whole batches: their rows are not independent of each other."""

Slope = Literal["exact", "zero", "nan", "severed"]


class _Spoil(torch.autograd.Function):
    """The identity with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope * ctx.factor, None


class Everything(Defense):
    """A linear classifier behind a noisy three-step purifier; offers all handles, has batch norm and dropout."""

    def __init__(
        self, *, stochastic: bool = False, slope: Slope = "exact", handles: bool = True, dtype: Any = torch.float32
    ) -> None:
        super().__init__()
        self.card = Card(
            name="everything",
            title="Everything",
            summary="",
            traits=Traits(stochastic=stochastic, purifies=True, iterative=True),
            handles=("stages", "chain", "surrogate", "relaxed", "components") if handles else (),
        )
        self.n_classes = K
        self._slope = slope
        self._sigma = 0.05 if stochastic else 0.0
        self.head = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, K))
        generator = torch.Generator().manual_seed(0)
        linear = self.head[3]
        assert isinstance(linear, nn.Linear)
        linear.weight.data = torch.randn(K, 64, generator=generator)
        linear.bias.data = -0.5 * linear.weight.data.sum(1)
        self.to(dtype).eval().requires_grad_(False)

    def classify(self, x: Tensor, noise: Noise) -> Tensor:
        if self._slope == "severed":
            x = x.detach()
        elif self._slope != "exact":
            x = _Spoil.apply(x, 0.0 if self._slope == "zero" else float("nan"))
        logits: Tensor = self.head(x)
        return logits

    def purifier(self, steps: int) -> Chain:
        def start(x: Tensor, noise: Noise) -> Tensor:
            return x

        def step(state: Any, x: Tensor, noise: Noise) -> Tensor:
            jitter = self._sigma * noise.normal("jitter", shape=SHAPE, like=x) if self._sigma else 0.0
            moved: Tensor = state + 0.3 / steps * (0.5 - state) + jitter
            return moved.clamp(0, 1)

        return Chain(start, [step] * steps)

    def chain(self) -> Chain:
        return self.purifier(3).then(self.classify)

    def surrogate(self, steps: int) -> Chain:
        return self.purifier(steps).then(self.classify)

    def relaxed(self) -> Chain:
        return self.chain()

    def components(self) -> Mapping[str, Callable[[Tensor, Noise], Tensor]]:
        return {"classifier": self.classify, "whole": self.draw}

    def stages(self) -> Stages:
        return Stages(self.purifier(3), self.classify)

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return self.chain()(x, noise, mode="full")


def batch(defense: Defense, n: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Noise]:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    x.flatten(1)[:, :3] = torch.tensor([0.0, 1.0, 0.5], dtype=dtype)  # at the box, too
    noise = Noise.from_seed(3, n)
    with torch.no_grad():
        return x, defense(x, noise).argmax(1), noise


def run(name: str, target: Target, x: Tensor, y: Tensor, norm: Norm, noise: Noise, **more: Any) -> Tensor:
    options = dict(BRIEF.get(name, {}))
    if target.stochastic and name in EOT:
        options["eot"] = 2
    if target.stochastic and name in REFERENCE:
        options["version"] = "rand"
    z: Tensor = ATTACKS[name].attack(target, x, y, ThreatModel(norm, EPS[norm]), noise, **{**options, **more})
    return z


def assert_allowed(z: Tensor, x: Tensor, norm: Norm) -> None:
    assert z.shape == x.shape
    assert z.dtype == x.dtype
    assert z.device == x.device
    assert not z.requires_grad
    excess = violation(norm, float(ThreatModel(norm, EPS[norm]).eps), z, x)
    assert (excess <= TOLERANCE).all()  # False for a NaN


each_attack = pytest.mark.parametrize("name", list(ATTACKS))
in_house = pytest.mark.parametrize("name", [name for name in ATTACKS if name not in REFERENCE])
each_norm = pytest.mark.parametrize("norm", NORMS)
each_kind = pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
# The reference's version for stochastic targets makes 4,040 evaluations a run and has no smaller budget.
each_case = pytest.mark.parametrize(
    ("name", "stochastic"),
    [
        pytest.param(name, kind, id=f"{name}-{word}", marks=[pytest.mark.slow] * (kind and name in REFERENCE))
        for name in ATTACKS
        for kind, word in ((False, "deterministic"), (True, "stochastic"))
    ],
)


@each_attack
def test_spec_names_itself(name: str) -> None:
    spec = ATTACKS[name]
    assert isinstance(spec, AttackSpec)
    assert spec.name == name
    assert spec.summary.endswith(".")
    assert spec.attack.__doc__
    assert not spec.deterministic_only


@each_case
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_stays_inside_and_changes_nothing_else(name: str, norm: Norm, stochastic: bool, dtype: torch.dtype) -> None:
    defense = Everything(stochastic=stochastic, dtype=dtype)
    x, y, noise = batch(defense, dtype=dtype)
    before = {key: value.clone() for key, value in defense.state_dict().items()}
    x_before, y_before, keys_before = x.clone(), y.clone(), noise.keys.clone()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    trace, grad_enabled = sys.gettrace(), torch.is_grad_enabled()
    z = run(name, Target(defense, N), x, y, norm, noise)
    assert_allowed(z, x, norm)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert not x.requires_grad
    assert torch.equal(noise.keys, keys_before)
    assert z.data_ptr() != x.data_ptr()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == python_state
    assert sys.gettrace() is trace
    assert torch.is_grad_enabled() == grad_enabled
    for key, value in defense.state_dict().items():
        assert torch.equal(value, before[key])
    for module in defense.modules():
        assert not module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(not p.requires_grad and p.grad is None for p in defense.parameters())


@each_case
@each_norm
def test_same_noise_same_answer(name: str, norm: Norm, stochastic: bool) -> None:
    defense = Everything(stochastic=stochastic)
    x, y, noise = batch(defense)
    first = run(name, Target(defense, N), x, y, norm, noise)
    torch.manual_seed(12345)  # the global generator's state plays no part
    assert torch.equal(first, run(name, Target(defense, N), x, y, norm, noise))


@in_house
@each_norm
@each_kind
def test_rows_do_not_depend_on_other_rows(name: str, norm: Norm, stochastic: bool) -> None:
    defense = Everything(stochastic=stochastic, dtype=torch.float64)
    x, y, noise = batch(defense, dtype=torch.float64)
    whole = run(name, Target(defense, N), x, y, norm, noise)
    rows = torch.tensor([5, 0, 3])
    part = run(name, Target(defense, N), x[rows], y[rows], norm, noise[rows])
    torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-9)


@in_house
def test_rows_in_small_chunks_give_the_same(name: str) -> None:
    defense = Everything(stochastic=True, dtype=torch.float64)
    x, y, noise = batch(defense, dtype=torch.float64)
    whole, split = Target(defense, N), Target(defense, N, rows=3)
    one = run(name, whole, x, y, "linf", noise)
    torch.testing.assert_close(run(name, split, x, y, "linf", noise), one, rtol=0, atol=1e-9)
    assert torch.equal(whole.calls.forward, split.calls.forward)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("through_chain", {"variant": "first-order"}),
    ("through_chain", {"variant": "relaxed"}),
    ("through_chain", {"optimizer": "pgd"}),
    ("step_losses", {"optimizer": "pgd", "loss": "ce"}),
    ("diffhammer", {"graft": False}),
    ("diffhammer", {"loss": "margin-targeted", "targets": 2}),
    ("transfer", {"source": "components"}),
    *((name, {"clip": True}) for name in ("pgd", "apgd", "bpda", "through_chain", "surrogate", "step_losses")),
]
"""Options that take another path through an attack than its defaults do."""


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@each_norm
@each_kind
def test_other_paths_through_an_attack_obey_too(
    name: str, options: dict[str, Any], norm: Norm, stochastic: bool
) -> None:
    """Inside the ball, the same again, the same in small chunks and for some of the rows; nothing asked for no rows."""
    defense = Everything(stochastic=stochastic, dtype=torch.float64)
    x, y, noise = batch(defense, dtype=torch.float64)
    target = Target(defense, N)
    z = run(name, target, x, y, norm, noise, **options)
    assert_allowed(z, x, norm)
    assert torch.equal(run(name, Target(defense, N), x, y, norm, noise, **options), z)
    split, rows = Target(defense, N, rows=3), torch.tensor([5, 0, 3])
    torch.testing.assert_close(run(name, split, x, y, norm, noise, **options), z, rtol=0, atol=1e-9)
    assert torch.equal(split.calls.forward, target.calls.forward)
    part = run(name, Target(defense, N), x[rows], y[rows], norm, noise[rows], **options)
    torch.testing.assert_close(part, z[rows], rtol=0, atol=1e-9)
    idle = Target(defense, N)
    assert run(name, idle, x[:0], y[:0], norm, noise[:0], **options).shape == (0, *SHAPE)
    assert not idle.calls.forward.any()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("slope", ["zero", "nan", "severed"])
def test_useless_gradients_stop_no_other_path(name: str, options: dict[str, Any], slope: Slope) -> None:
    defense = Everything(slope=slope)
    x, y, noise = batch(defense, 3)
    assert_allowed(run(name, Target(defense, 3), x, y, "l2", noise, **options), x, "l2")


@each_attack
@each_norm
@each_kind
def test_empty_batch(name: str, norm: Norm, stochastic: bool) -> None:
    defense = Everything(stochastic=stochastic)
    x, y, noise = batch(defense)
    target = Target(defense, N)
    z = run(name, target, x[:0], y[:0], norm, noise[:0])
    assert z.shape == (0, *SHAPE)
    assert not target.calls.forward.any()


@each_case
@each_norm
def test_single_sample(name: str, norm: Norm, stochastic: bool) -> None:
    defense = Everything(stochastic=stochastic)
    x, y, noise = batch(defense)
    assert_allowed(run(name, Target(defense, N), x[:1], y[:1], norm, noise[:1]), x[:1], norm)


@each_attack
@each_norm
@each_kind
def test_all_samples_already_broken(name: str, norm: Norm, stochastic: bool) -> None:
    defense = Everything(stochastic=stochastic)
    x, _, noise = batch(defense)
    with torch.no_grad():
        wrong = defense(x, noise).argmin(1)
    target = Target(defense, N)
    z = run(name, target, x, wrong, norm, noise)
    assert_allowed(z, x, norm)
    assert (defense(z, noise.child("fresh")).argmax(1) != wrong).all()


@each_attack
@each_norm
@pytest.mark.parametrize("slope", ["zero", "nan", "severed"])
def test_useless_gradients_stop_nothing(name: str, norm: Norm, slope: Slope) -> None:
    defense = Everything(slope=slope)
    x, y, noise = batch(defense, 3)
    assert_allowed(run(name, Target(defense, 3), x, y, norm, noise), x, norm)


@each_case
@each_norm
def test_breaks_something_that_can_be_broken(name: str, norm: Norm, stochastic: bool) -> None:
    """At eight times the radius at which most of these images fall, even random search gets somewhere."""
    defense = Everything(stochastic=stochastic)
    x, y, noise = batch(defense, 32)
    options = {**BRIEF.get(name, {})}
    if stochastic and name in REFERENCE:
        options["version"] = "rand"
    threat = ThreatModel(norm, {"linf": "2/5", "l2": "3"}[norm])  # type: ignore[arg-type]
    z = ATTACKS[name].attack(Target(defense, 32), x, y, threat, noise, **options)
    fallen = (defense(z, noise.child("fresh")).argmax(1) != y).double().mean()
    # The reference gives a sample up after one unlucky draw, so some of its successes are luck.
    assert fallen > (0.2 if name == "uniform" else 0.6 if name in REFERENCE else 0.9)


@pytest.mark.parametrize("name", [name for name in ATTACKS if not ATTACKS[name].handles and name != "transfer"])
def test_counts_what_it_asks(name: str) -> None:
    """Every row that an attack on the defense itself (not a handle) asks for is charged to a slot, once."""

    class Counting(Everything):
        rows = 0

        def draw(self, x: Tensor, noise: Noise) -> Tensor:
            self.rows += len(x)
            return super().draw(x, noise)

    defense = Counting()
    x, y, noise = batch(defense)
    defense.rows = 0
    target = Target(defense, N)
    run(name, target, x, y, "linf", noise)
    assert int(target.calls.forward.sum()) == defense.rows
    assert int(target.calls.backward.sum()) <= defense.rows


@each_attack
def test_black_box_gets_no_gradients(name: str) -> None:
    defense = Everything()
    x, y, noise = batch(defense)
    target = Target(defense, N, white_box=False)
    if ATTACKS[name].black_box:
        run(name, target, x, y, "linf", noise)
        assert not target.calls.backward.any()
    else:
        with pytest.raises(ThreatViolation, match="black-box"):
            run(name, target, x, y, "linf", noise)


@each_attack
def test_asks_only_for_the_handles_it_declares(name: str) -> None:
    defense = Everything(handles=False)
    x, y, noise = batch(defense)
    target = Target(defense, N)
    if ATTACKS[name].handles:
        with pytest.raises(ThreatViolation, match=ATTACKS[name].handles[0]):
            run(name, target, x, y, "linf", noise)
    else:
        more = {"source": target} if name == "transfer" else {}
        run(name, target, x, y, "linf", noise, **more)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pgd", {"steps": 0}, "steps must be at least 1"),
        ("pgd", {"restarts": 0}, "restarts must be at least 1"),
        ("pgd", {"loss": "crossentropy"}, "no loss is called"),
        ("apgd", {"eot": 0}, "eot must be at least 1"),
        ("apgd", {"loss": "dlr-targetted"}, "Did you mean 'dlr-targeted'"),
        ("uniform", {"tries": 0}, "tries must be at least 1"),
        ("square", {"queries": 0}, "queries must be at least 1"),
        ("bpda", {"optimizer": "adam"}, "no optimizer is called 'adam'"),
        ("through_chain", {"optimizer": "apgd", "alpha": 0.1}, "apgd chooses its own step"),
        ("surrogate", {"chain_steps": 0}, "chain_steps must be at least 1"),
        ("through_chain", {"variant": "relaxd"}, "Did you mean 'relaxed'"),
        ("step_losses", {"weight": -1.0}, "weight of at least 0"),
        ("diffhammer", {"rounds": 0}, "rounds must be at least 1"),
        ("transfer", {"loss": "dlr"}, "transfer has no loss"),
        ("autoattack", {"version": "plus"}, "'standard' or 'rand'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    defense = Everything()
    x, y, noise = batch(defense)
    with pytest.raises(InputError, match=message):
        run(name, Target(defense, N), x, y, "linf", noise, **options)


def test_autoattack_standard_refuses_a_stochastic_target() -> None:
    defense = Everything(stochastic=True)
    x, y, noise = batch(defense)
    with pytest.raises(InputError, match="needs version='rand'"):
        run("autoattack", Target(defense, N), x, y, "linf", noise, version="standard")


class Constant(Defense):
    """Nothing in the ball changes its answer, so an attack runs to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.card = Card(name="constant", title="Constant", summary="")
        self.n_classes = K

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return torch.eye(K, dtype=x.dtype)[:1].expand(len(x), K) + 1e-3 * x.flatten(1)[:, :K]


@each_norm
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 5, 5), (1, 4, 4), (2, 7, 9), (1, 28, 3), (1, 1, 1)])
def test_square_fits_images_of_any_size_and_its_budget(norm: Norm, shape: tuple[int, int, int]) -> None:
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x], dim=1) if shape[0] * shape[1] * shape[2] < K else x
    x = x.repeat(1, 2, 1, 1) if x[0].numel() < K else x
    y, noise = torch.zeros(2, dtype=torch.int64), Noise.from_seed(0, 2)
    target = Target(Constant(), 2)
    z = ATTACKS["square"].attack(target, x, y, ThreatModel(norm, "1/10"), noise, queries=210)  # type: ignore[arg-type]
    assert target.calls.forward.tolist() == [210, 210]
    assert (violation(norm, 0.1, z, x) <= TOLERANCE).all()
    assert not torch.equal(z, x)


@pytest.mark.slow
@each_norm
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 5, 5)])
def test_autoattack_fits_images_of_the_boards(norm: Norm, shape: tuple[int, int, int]) -> None:
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    y, noise = torch.zeros(2, dtype=torch.int64), Noise.from_seed(0, 2)
    z = ATTACKS["autoattack"].attack(Target(Constant(), 2), x, y, ThreatModel(norm, "1/10"), noise)  # type: ignore[arg-type]
    assert torch.equal(z, x)


def test_autoattack_leaves_a_tracer_in_place() -> None:
    """Its check for dynamic models ends tracing, and so debuggers and coverage, unless that is put back."""
    defense = Everything()
    x, _, noise = batch(defense, 2)
    with torch.no_grad():
        wrong = defense(x, noise).argmin(1)
    before = sys.gettrace()

    def tracer(*event: Any) -> None:
        return None

    sys.settrace(tracer)
    try:
        run("autoattack", Target(defense, 2), x, wrong, "linf", noise)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer


def test_autoattack_draws_anew_at_each_call() -> None:
    defense = Everything(stochastic=True)
    x, _, noise = batch(defense)
    model = _Model(Target(defense, N), noise, x.dtype)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, _Model(Target(defense, N), noise, x.dtype)(x))


def test_autoattack_says_which_images_are_too_small() -> None:
    defense = Everything()
    x, y, noise = batch(defense)
    with pytest.raises(InputError, match="at least 5 pixels"):
        run("autoattack", Target(defense, N), x[..., :4, :4], y, "l2", noise)
