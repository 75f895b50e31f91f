"""Weights: digests are checked, keys are strict, differences are listed, and the packaged files are small."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from assay.defenses import checkpoints
from assay.defenses.networks import DigitsCNN
from assay.errors import InputError, IntegrityError


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def module() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_what_is_saved_is_what_is_loaded(module: nn.Module, tmp_path: Path) -> None:
    state = {key: torch.full_like(value, 2) for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        checkpoints.load_weights(fresh, tmp_path / name, sha256(tmp_path / name))
        assert all(bool((value == 2).all()) for value in fresh.state_dict().values())


def test_another_file_than_the_declared_one_is_refused(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: value + 1 for key, value in module.state_dict().items()}, path)
    declared = sha256(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(IntegrityError, match=f"a.safetensors has the SHA-256 {sha256(path)}, expected {declared}"):
        checkpoints.load_weights(module, path, declared)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_all_differences_are_listed(module: nn.Module) -> None:
    state = dict(module.state_dict())
    state["0.extra"] = state.pop("0.bias")
    del state["1.running_mean"]
    state["0.weight"] = torch.zeros(2, 4)
    with pytest.raises(InputError) as caught:
        checkpoints.load_state(module, state, "some.file")
    assert str(caught.value) == (
        "some.file does not fit Sequential. missing: 0.bias, 1.running_mean; unexpected: 0.extra; "
        "misshapen: 0.weight is (2, 4), expected (2, 3)."
    )


def test_batch_norm_s_counter_may_be_missing(module: nn.Module) -> None:
    state = {key: value for key, value in module.state_dict().items() if "num_batches" not in key}
    checkpoints.load_state(module, state, "old.file")


def test_a_missing_file_is_named(module: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights at .*none\.safetensors"):
        checkpoints.load_weights(module, tmp_path / "none.safetensors", "")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_file_of_another_format_is_named(module: nn.Module, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    with pytest.raises(InputError, match=f"{name} is not a"):
        checkpoints.load_weights(module, path, sha256(path))


def test_a_pickle_is_not_executed(module: nn.Module, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "a.pt"
    torch.save({"0.weight": Payload()}, path)
    with pytest.raises(InputError, match=r"a\.pt is not a torch file of plain tensors"):
        checkpoints.load_weights(module, path, sha256(path))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"weights": {"a": {}}}', '{"weights": 3}'])
def test_a_spoiled_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json is not a manifest of weights"):
        checkpoints.read_manifest(tmp_path)


def test_an_unlisted_file_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"no entry for digits/none\.safetensors"):
        checkpoints.packaged("digits/none.safetensors")


def test_the_manifest_is_the_folder() -> None:
    files = {str(path.relative_to(checkpoints.WEIGHTS)) for path in checkpoints.WEIGHTS.rglob("*.safetensors")}
    entries = checkpoints.read_manifest()
    assert set(entries) == files
    for name, entry in entries.items():
        assert sha256(checkpoints.WEIGHTS / name) == entry["sha256"]


def test_all_weights_are_under_four_megabytes_and_float32() -> None:
    assert sum(path.stat().st_size for path in checkpoints.WEIGHTS.rglob("*")) < 4_000_000
    network = DigitsCNN()
    checkpoints.load_packaged(network, "digits/undefended.safetensors")
    assert all(value.dtype == torch.float32 for value in network.state_dict().values())


def test_the_manifest_is_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    json.loads((checkpoints.WEIGHTS / "manifest.json").read_text(), parse_constant=refuse)
