"""Our attacks and the reference package on real networks and the same images: the same samples, no more calls.

The data are no part of the project: the images are CIFAR-10's test split, found through `ASSAY_DATA`
or in a sibling folder `shared/data`, where the small robust network is, too; the ResNet-18 comes
with the reference package. What can't be found is skipped.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from assay.attack import Target
from assay.attacks.apgd import apgd
from assay.attacks.autoattack import autoattack
from assay.attacks.square import square
from assay.card import Card
from assay.data import load
from assay.defense import ForeignModule
from assay.noise import Noise
from assay.norms import TOLERANCE, violation
from assay.threat import Norm, ThreatModel

DATA = Path(os.environ.get("ASSAY_DATA") or Path(__file__).parents[2] / "shared" / "data")


class Counter(nn.Module):
    """A model as the reference sees it: counts the rows that pass forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        logits: Tensor = self.module(x)
        return logits


class CnnA(nn.Sequential):
    """The robust two-convolution network, with its normalisation."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2048, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype)[:, None, None]
        logits: Tensor = super().forward((x - mean) / 0.225)
        return logits


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    file = DATA / "classifiers" / "abcrown_cifar_cnn_a_adv4.model"
    if not file.is_file():
        pytest.skip("the robust CIFAR-10 network is not in the data folder; set ASSAY_DATA")
    return CnnA(torch.load(file, weights_only=True)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """The ResNet-18 that the reference package carries."""
    folder = Path(pyautoattack.__file__).parent / "examples"
    spec = importlib.util.spec_from_file_location("reference_resnet", folder / "resnet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.ResNet18()
    network.load_state_dict(torch.load(folder / "model_test.pt", weights_only=True, map_location="cpu"))
    return network.eval().requires_grad_(False)


def correct(module: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """The first `n` test images that the module gets right."""
    if not list((DATA / "cifar10" / "plain_text").glob("test-*.parquet")):
        pytest.skip("the CIFAR-10 test split is not in the data folder; set ASSAY_DATA")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASSAY_DATA", str(DATA))
        x, y = load("cifar10", range(2 * n + 20))
    right = torch.cat([module(part).argmax(1) for part in x.split(32)]) == y
    return x[right][:n], y[right][:n]


def targeted(module: nn.Module, n: int) -> Target:
    return Target(ForeignModule(module, Card(name="network", title="Network", summary=""), 10), n)


def reference(kind: str, module: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> tuple[Tensor, int]:
    """Which samples the reference breaks, and the rows it passed forward."""
    counter = Counter(module)
    common: dict[str, Any] = {"norm": norm, "eps": eps, "seed": 0, "device": "cpu"}
    attack: Any
    if kind == "square":
        attack = SquareAttack(counter, n_queries=500, p_init=0.8, resc_schedule=False, **common)
    elif kind == "apgd-t":
        attack = APGDAttack_targeted(counter, n_iter=25, n_target_classes=9, **common)
    else:
        attack = APGDAttack(counter, n_iter=50, loss="ce", **common)
    with torch.random.fork_rng():
        z = attack.perturb(x, y)
    return module(z).argmax(1) != y, counter.rows


def ours(kind: str, module: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: Any) -> tuple[Tensor, int]:
    target, noise, threat = targeted(module, len(x)), Noise.from_seed(0, len(x)), ThreatModel(norm, eps)
    if kind == "square":
        z = square(target, x, y, threat, noise, queries=500)
    elif kind == "apgd-t":
        z = apgd(target, x, y, threat, noise, loss="dlr-targeted", targets=9, steps=25)
    else:
        z = apgd(target, x, y, threat, noise, loss="ce", steps=50)
    assert (violation(norm, float(threat.eps), z, x) <= TOLERANCE).all()
    return module(z).argmax(1) != y, int(target.calls.forward.sum())


@pytest.mark.parametrize(("norm", "eps"), [("linf", "4/255"), ("l2", "1/3")])
@pytest.mark.parametrize(("kind", "permitted"), [("apgd-ce", 2), ("apgd-t", 2), ("square", 6)])
def test_same_samples_and_no_more_calls(cnn: nn.Module, kind: str, permitted: int, norm: Norm, eps: str) -> None:
    """200 images. Gradient attacks may differ on 2 of them, random search on 6, in either direction."""
    x, y = correct(cnn, 200)
    theirs, their_rows = reference(
        kind, cnn, x, y, {"linf": "Linf", "l2": "L2"}[norm], float(ThreatModel(norm, eps).eps)
    )  # type: ignore[arg-type]
    found, rows = ours(kind, cnn, x, y, norm, eps)
    assert 20 < int(theirs.sum()) < 180  # the radius decides something
    assert int((theirs & ~found).sum()) <= permitted
    assert int((theirs != found).sum()) <= 2 * permitted
    assert rows <= their_rows


@pytest.mark.parametrize("n", [64])
def test_autoattack_through_assay_breaks_what_it_breaks_alone(cnn: nn.Module, n: int) -> None:
    x, y = correct(cnn, n)
    noise = Noise.from_seed(0, n)
    target = targeted(cnn, n)
    z = autoattack(target, x, y, ThreatModel("linf", "8/255"), noise)  # type: ignore[arg-type]
    through = cnn(z).argmax(1) != y
    counter = Counter(cnn)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.settrace", lambda trace: None)  # its dynamic check would end coverage measurements
        suite = pyautoattack.AutoAttack(counter, norm="Linf", eps=8 / 255, seed=noise.seed())
        alone, _ = suite.run_standard_evaluation(x, y)
    assert torch.equal(through, cnn(alone).argmax(1) != y)
    assert 0 < int(through.sum()) < n
    assert int(target.calls.forward.sum()) == counter.rows
    assert (violation("linf", 8 / 255, z, x) <= TOLERANCE).all()


@pytest.mark.slow
def test_resnet_same_samples_and_no_more_calls(resnet: nn.Module) -> None:
    """Standard training, 1/255: the gradient attacks may differ on one of 16 images."""
    x, y = correct(resnet, 16)
    for kind in ("apgd-ce",):
        theirs, their_rows = reference(kind, resnet, x, y, "Linf", 1 / 255)
        found, rows = ours(kind, resnet, x, y, "linf", "1/255")
        assert 0 < int(theirs.sum()) < 16
        assert int((theirs != found).sum()) <= 1
        assert rows <= their_rows


@pytest.mark.slow
def test_resnet_falls_at_eight(resnet: nn.Module) -> None:
    """The package's own figure for this network is 0 % at 8/255."""
    x, y = correct(resnet, 16)
    target = targeted(resnet, 16)
    z = apgd(target, x, y, ThreatModel("linf", "8/255"), Noise.from_seed(0, 16))  # type: ignore[arg-type]
    assert (resnet(z).argmax(1) != y).all()
    assert int(target.calls.forward.sum()) < 16 * 10  # broken samples left the batch
