"""Weights: read as data only, held against their digest, loaded with strict keys.

The project's own weights lie in `weights/` as safetensors; `weights/manifest.json` holds the
SHA-256 of each, with the recipe, seed and measured accuracy that it was trained with.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from assay.errors import InputError, IntegrityError

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"


@functools.cache
def read_manifest(folder: Path = WEIGHTS) -> dict[str, dict[str, Any]]:
    """File name relative to `folder` -> what is known of it: `sha256`, recipe, seed, accuracy.

    Raises:
        IntegrityError: when the manifest is missing or is not what the training command writes.
    """
    path = folder / MANIFEST
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text())["weights"]
        if not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise ValueError("a digest that is not text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is not a manifest of weights ({error!r}); write one with python -m assay.defenses.train digits."
        ) from error
    return entries


def packaged(*names: str) -> dict[str, str]:
    """SHA-256 of the project's own weight files, as a card lists them: `{file name: sha256}`."""
    entries = read_manifest()
    missing = sorted(set(names) - set(entries))
    if missing:
        raise IntegrityError(f"{WEIGHTS / MANIFEST} has no entry for {', '.join(missing)}.")
    return {name: entries[name]["sha256"] for name in names}


def trained(*names: str) -> tuple[str, ...]:
    """Those of these files that the manifest lists: the same network's, of several data sets, each in its folder."""
    return tuple(name for name in names if name in read_manifest())


def data_sets(*names: str) -> tuple[str, ...]:
    """The data sets that `trained` finds weights for."""
    return tuple(name.partition("/")[0] for name in trained(*names))


def load_packaged(module: nn.Module, name: str) -> None:
    """Loads one of the project's own weight files into `module`; see `load_weights`."""
    load_weights(module, WEIGHTS / name, packaged(name)[name])


def load_weights(module: nn.Module, path: Path, sha256: str) -> None:
    """Loads a weight file into `module`: a `.safetensors`, or a torch file of plain tensors.

    Args:
        module: its state gets the file's values, in the module's own dtype.
        path: the file; anything but `.safetensors` goes through `torch.load(weights_only=True)`.
        sha256: what the file's digest must be.

    Raises:
        InputError: for a missing file, one in another format, or one whose keys or shapes are not
            the module's (all differences are listed).
        IntegrityError: when the file's digest is not `sha256`; nothing is loaded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"no weights at {path}: {error.strerror}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise IntegrityError(f"{path.name} has the SHA-256 {found}, expected {sha256}: it is not the declared weights.")
    load_state(module, parse_state(content, path), path.name)


def parse_state(content: bytes, path: Path) -> Mapping[str, Tensor]:
    """The tensors by name in the bytes of a weight file: safetensors by its suffix, otherwise a torch file.

    Raises:
        InputError: for content in another format, a pickle that would run code among them.
    """
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}.") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise InputError(f"{path} is not a torch file of plain tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds a {type(state).__name__}, not tensors by name.")
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies `state` into `module` if every key and shape agrees.

    Raises:
        InputError: otherwise, listing missing, unexpected and misshapen keys.
    """
    expected = module.state_dict()
    # Batch norm's step counter does not enter an evaluation; old files don't hold it.
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    differences = [
        f"{title}: {', '.join(keys)}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if differences:
        raise InputError(f"{origin} does not fit {type(module).__name__}. {'; '.join(differences)}.")
    module.load_state_dict(dict(state), strict=False)
