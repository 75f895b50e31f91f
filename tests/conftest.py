"""What every test shares: threads, and small defenses whose robustness is known in closed form."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from assay.card import Card, Traits
from assay.defense import Defense
from assay.noise import Noise

# Two busy processes on two cores slow each other down tenfold when each takes both.
torch.set_num_threads(1)

# A folder of data sets beside the checkout is used when there is one and nobody names another.
_BESIDE = Path(__file__).parents[2] / "shared" / "data"
if (_BESIDE / "cifar10").is_dir():
    os.environ.setdefault("ASSAY_DATA", str(_BESIDE))

# What runs share is kept from the developer's own cache, and from one test session to the next.
os.environ["ASSAY_CACHE"] = tempfile.mkdtemp(prefix="assay-cache-")


class LinearDefense(Defense):
    """`logits = W x + b`, whose exact robust accuracy under linf (with the box) and l2 is known."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.card = Card(name="linear", title="Linear", summary="A linear classifier.", traits=Traits())
        self.n_classes = len(bias)
        self.linear = nn.Linear(weight.shape[1], len(bias), dtype=weight.dtype)
        self.linear.weight.data, self.linear.bias.data = weight, bias
        self.requires_grad_(False).eval()

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits


@pytest.fixture
def linear() -> LinearDefense:
    """Four classes over 1×4×4 images, fixed weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 16, generator=generator)
    return LinearDefense(weight, torch.randn(4, generator=generator) * 0.1)


@pytest.fixture
def images() -> Tensor:
    """64 images `(64, 1, 4, 4)` in [0, 1]."""
    return torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))


ZOO = Path(__file__).with_name("defense_zoo.py")


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """`defense_zoo.py`, whose defenses are also given to the harness as `path.py:object`."""
    spec = importlib.util.spec_from_file_location("defense_zoo", ZOO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy_source(zoo: ModuleType) -> Iterator[str]:
    """A registered defense that toy boards transfer from, so that no weight file is needed."""
    from assay.defense import DefenseSpec
    from assay.registry import DEFENSES

    entries = DEFENSES._entries
    entries["toy-source"] = DefenseSpec(zoo.NAMESAKE.card, lambda dataset: zoo.Linear("toy-source"))
    yield "toy-source"
    del entries["toy-source"]


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol that examines little before it attacks, for defenses that are caught at once otherwise."""
    from assay.protocol import PROTOCOLS

    few = ("interface", "modes")
    monkeypatch.setitem(PROTOCOLS, "2026.1", replace(PROTOCOLS["2026.1"], checks=few))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def toy_run(zoo: ModuleType, toy_source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished, complete quick run of the stochastic toy; copy it before changing it."""
    from assay.evaluation import execute
    from assay.prepare import prepare

    folder = tmp_path_factory.mktemp("toy") / "run"
    prepared = prepare(f"{ZOO}:ABSTAINING", zoo.board(source=toy_source), trust=True)
    execute(prepared, folder)
    return folder
