"""Files of adversarial examples: what is refused, with one error, and what is only not counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from assay.bundles import Bundle, examine, read_bundle, refuse_invalid
from assay.errors import InputError
from assay.perturbation import bundle_bytes, masked
from assay.threat import ThreatModel

IDS = (7, 3, 11, 20)
SHAPE = (1, 4, 4)
X = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
THREAT = ThreatModel("linf", Fraction(1, 10))


def content(**changes: np.ndarray | None) -> bytes:
    tensors = {"id": np.asarray(IDS, dtype=np.int64), "x_adv": X.numpy(), **changes}
    return bytes(save({name: value for name, value in tensors.items() if value is not None}))


def hidden(**changes: np.ndarray | None) -> bytes:
    return content(**{"x_adv": None, **masked(X.numpy() + np.float32(0.05), X.numpy()), **changes})


def read(path: Path) -> Bundle:
    return read_bundle(path, ids=IDS, x=X)


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    examples = (X + torch.linspace(-0.1, 0.1, 4)[:, None, None, None]).numpy()
    for clean in (None, X.numpy()):
        path.write_bytes(bundle_bytes(np.array(IDS), examples, clean))
        found = read(path)
        assert found.ids.tolist() == list(IDS)
        assert torch.equal(found.images, torch.from_numpy(examples))
        assert len(found) == 4


def test_a_part_of_the_samples_in_any_order_will_do(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    examples = X[[3, 0]].numpy() + np.float32(0.05)
    for clean in (None, X[[3, 0]].numpy()):
        path.write_bytes(bundle_bytes(np.array([20, 7]), examples, clean))
        found = read(path)
        assert found.ids.tolist() == [20, 7]
        np.testing.assert_array_equal(found.images, examples)


def test_perturbations_of_other_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    other = X.clone()
    other[2, 0, 1, 1] += 1e-7
    path.write_bytes(bundle_bytes(np.array(IDS), X.numpy() + np.float32(0.05), other.numpy()))
    with pytest.raises(InputError, match=r"b\.safetensors: its perturbations can't be unmasked"):
        read(path)


F64 = {"dtype": "F64", "shape": [4, *SHAPE], "data_offsets": [32, 544]}
I64 = {"dtype": "I64", "shape": [4], "data_offsets": [0, 32]}
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not a safetensors file"),
    "text": (lambda: b"<script>alert(1)</script>" * 10, "not a safetensors file"),
    "pickle": (lambda: b"\x80\x04\x95\x10" + bytes(60), "not a safetensors file"),
    "header beyond the file": (lambda: (1 << 40).to_bytes(8, "little") + b"{}", "header can't be read"),
    "header no object": (lambda: with_header([1, 2]), "no JSON object"),
    "header no JSON": (lambda: with_header(b"{{{{"), "no JSON"),
    "deep header": (lambda: with_header(b"[" * 60000), "no JSON"),
    "a tensor twice": (lambda: with_header(b'{"id":{},"id":{},"x_adv":{}}'), "there twice"),
    "no images": (lambda: content(x_adv=None), "expected exactly 'id' and 'x_adv'"),
    "no ids": (lambda: content(id=None), "expected exactly 'id' and 'x_adv'"),
    "another tensor": (lambda: content(weights=np.zeros(3)), "expected exactly 'id' and 'x_adv'"),
    "images and perturbations": (lambda: content(**masked(X.numpy(), X.numpy())), "expected exactly 'id' and"),
    "no digest": (lambda: hidden(digest=None), "'masked' and 'digest'"),
    "a mask of another dtype": (lambda: hidden(masked=np.zeros(9)), "masked has dtype F64, expected U8"),
    "a digest of another length": (lambda: hidden(digest=np.zeros(16, np.uint8)), "digest [16]; expected [n] and [m]"),
    "a mask of two dimensions": (lambda: hidden(masked=np.zeros((2, 9), np.uint8)), "masked [2, 9], digest [32]; exp"),
    "masked by other images": (lambda: hidden(**masked(X.numpy(), X.numpy() / 2)), "not, to the last bit"),
    "masked by fewer images": (lambda: hidden(**masked(X[:3].numpy(), X[:3].numpy())), "not, to the last bit"),
    "a tensor that is no object": (lambda: with_header({"id": 3, "x_adv": F64}), "id has dtype None"),
    "ids of another dtype": (lambda: content(id=np.asarray(IDS, dtype=np.int32)), "id has dtype I32, expected I64"),
    "images of another dtype": (lambda: content(x_adv=X.double().numpy()), "x_adv has dtype F64, expected F32"),
    "pixels of 0 to 255": (lambda: content(x_adv=(X * 255).byte().numpy()), "x_adv has dtype U8, expected F32"),
    "channels": (lambda: content(x_adv=X.repeat(1, 3, 1, 1).numpy()), "x_adv [4, 3, 4, 4]; expected"),
    "channels last": (lambda: content(x_adv=X.permute(0, 2, 3, 1).contiguous().numpy()), "expected [n] and"),
    "another size": (lambda: content(x_adv=np.zeros((4, 1, 8, 8), np.float32)), "expected [n] and [n, 1, 4, 4]"),
    "flat": (lambda: content(x_adv=X.flatten(1).numpy()), "expected [n] and [n, 1, 4, 4]"),
    "ids of two dimensions": (lambda: content(id=np.asarray([IDS], dtype=np.int64)), "id has shape [1, 4]"),
    "more ids than images": (lambda: content(id=np.arange(3)), "id has shape [3]"),
    "no example": (
        lambda: content(id=np.zeros(0, np.int64), x_adv=np.zeros((0, *SHAPE), np.float32)), "holds 0 images",
    ),
    "one too many": (
        lambda: content(id=np.arange(5), x_adv=np.zeros((5, *SHAPE), np.float32)), "holds 5 images; expected 1 to 4",
    ),
    "an id twice": (lambda: content(id=np.asarray([7, 3, 7, 20])), "more than one image for sample 7"),
    "another data set's ids": (lambda: content(id=np.asarray([7, 3, 900, -1])), "samples -1, 900, not among"),
    "shapes that are not there": (
        lambda: with_header({"id": I64, "x_adv": {**F64, "dtype": "F32", "shape": [4, *SHAPE]}}, bytes(40)),
        "not a safetensors file",
    ),
    "a length that is no number": (
        lambda: with_header({"id": {**I64, "shape": ["4"]}, "x_adv": {**F64, "dtype": "F32"}}), "expected [n] and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_no_bundle_gets_one_error(case: str, tmp_path: Path) -> None:
    make, says = HOSTILE[case]
    path = tmp_path / "b.safetensors"
    path.write_bytes(make())
    with pytest.raises(InputError) as caught:
        read(path)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(InputError, match="1099511627776 bytes, a bundle of 4 images at most 65920"):
        read(path)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "nothing", "device"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    match kind:
        case "link":
            (tmp_path / "real").write_bytes(content())
            path.symlink_to(tmp_path / "real")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
    with pytest.raises(InputError, match=r"symbolic link|is not a file|can't be read"):
        read(path)


def moved(by: float) -> torch.Tensor:
    """The images with one pixel of the second moved by so much, as near as float32 can."""
    images = X.clone()
    images[1, 0, 2, 2] = float(X[1, 0, 2, 2].double() + by)
    return images


@pytest.mark.parametrize(
    ("by", "valid"), [(0.1 - 1e-6, True), (0.1, True), (0.1 + 3e-8, True), (0.1 + 1e-6, False), (0.2, False)]
)
def test_a_millionth_outside_the_ball_is_outside(by: float, valid: bool) -> None:
    found = examine(moved(by), X, THREAT)
    assert found.valid.tolist() == [True, valid, True, True]
    assert found.norms[1] == pytest.approx(by, abs=1e-7)
    if not valid:
        assert found.reasons[1] == "outside the ball linf 1/10"
        with pytest.raises(InputError, match="sample 3: outside the ball linf 1/10"):
            refuse_invalid("it", IDS, found)


@pytest.mark.parametrize(("by", "says"), [(1e-6, "outside the ball l2 1/10"), (-1e-6, "")])
def test_the_same_of_an_l2_ball(by: float, says: str) -> None:
    # Sixteen pixels, each moved by a quarter of the length.
    found = examine((X.double() + (0.1 + by) / 4).float(), X, ThreatModel("l2", Fraction(1, 10)))
    assert set(found.reasons) == {says}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_counts(value: float) -> None:
    images = X.clone()
    images[2, 0, 0, 0] = value
    assert examine(images, X, THREAT).reasons == ("", "", "not finite", "")


def test_outside_the_box_is_no_image() -> None:
    bright = torch.full_like(X, 0.99)
    images = bright.clone()
    images[0, 0, 0, 0], images[3, 0, 0, 0] = 1 + 1e-6, 1.0
    assert examine(images, bright, THREAT).reasons == ("outside the box [0, 1]", "", "", "")
