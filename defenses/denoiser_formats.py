"""Weight files of other projects' diffusion models, recognised by what is in them.

| format | container | what a JSON beside it (`weights.pt`, `weights.json`) says |
|---|---|---|
| DDPM in PyTorch | tensors; those under `ema`; or the list of DDIM's trainer, whose last entry is averaged | nothing |
| guided-diffusion | tensors | heads and schedule, unless it is `256x256_diffusion_uncond.pt` |
| EDM | tensors; its pickle is refused | σ_d, where it is not .5 |
| score_sde | `model`, and `ema.shadow_params` without names | `score_sde.CONFIG` |
| NCSNv2 | a list, the first entry | `data.rescaled`, where its σ are in units of [−1, 1] |

Files are read with `weights_only`: nothing in them is executed.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from assay.defenses.checkpoints import parse_state
from assay.defenses.denoiser import Denoiser
from assay.defenses.edm import conversion, edm, is_edm, is_pickle
from assay.defenses.ncsnv2 import is_ncsnv2, ncsnv2
from assay.defenses.score_sde import averaged, is_score_sde, score_sde
from assay.defenses.unet_keys import ddpm, guided, is_ddpm, is_guided
from assay.errors import InputError

FORMATS = "DDPM, guided-diffusion, EDM (a state dict, not the pickle), score_sde or NCSNv2"


def read_json(path: Path) -> dict[str, Any]:
    """A configuration.

    Raises:
        InputError: where the file is no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no configuration: it holds a {type(content).__name__}.")
    return content


def config_file(path: Path) -> Path:
    """Where the configuration of a weight file lies, if it has one."""
    return path.with_suffix(".json")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weight file by name, the averaged ones where it also holds others; without `module.`.

    Raises:
        InputError: for EDM's pickle (with its conversion), a file that is not of tensors, or one with raw weights
            where averaged ones are expected.
    """
    content = path.read_bytes()
    if is_pickle(content):
        raise InputError(conversion(str(path)))
    if path.suffix == ".safetensors":
        return _bare(parse_state(content, path))
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise InputError(f"{path} is not a torch file of plain tensors: {str(error).splitlines()[0]}") from error
    return _opened(found, path)


def recognise(state: Mapping[str, Tensor], path: Path) -> Denoiser | None:
    """The denoiser in a state of one of the formats, `None` where it is of none.

    Args:
        state: see `read_weights`.
        path: the file; its configuration is read where the format has one.

    Raises:
        InputError: for an architecture that is not read, or keys, shapes or a configuration that don't fit.
    """
    if is_ddpm(state):
        return ddpm(state, path.name)
    for belongs, load in ((is_guided, guided), (is_edm, edm), (is_score_sde, score_sde), (is_ncsnv2, ncsnv2)):
        if belongs(state):
            beside = config_file(path)
            return load(state, read_json(beside) if beside.is_file() else {}, path.name)
    return None


def _opened(found: Any, path: Path) -> Mapping[str, Tensor]:
    """The tensors in what a torch file holds."""
    if _is_state(found):
        return _bare(found)
    mean = found.get("ema") if isinstance(found, Mapping) else None
    if _is_state(mean):
        return _bare(mean)
    if isinstance(mean, Mapping) and _is_state(found.get("model")):
        shadow = mean.get("shadow_params")
        if isinstance(shadow, Sequence) and all(isinstance(value, Tensor) for value in shadow):
            return averaged(found["model"], shadow, path.name)
    if isinstance(found, Sequence) and found and _is_state(found[0]):
        first = _bare(found[0])
        if is_ncsnv2(first):
            return first
        if is_ddpm(first) and len(found) > 1 and _is_state(found[-1]):
            return _bare(found[-1])
    raise InputError(f"{path} holds a {type(found).__name__}, not tensors by name.{_raw(found)}")


def _raw(found: Any) -> str:
    """Where a file holds weights, but not averaged ones: in other words, where they are."""
    entries = found.items() if isinstance(found, Mapping) else enumerate(found) if isinstance(found, Sequence) else ()
    states = [str(name) for name, value in entries if _is_state(value)]
    if not states:
        return ""
    return (
        f" It has weights in its entry {', '.join(states)}, but none that are known as their moving average; save the "
        f"tensors that are meant to a file of their own."
    )


def _is_state(value: Any) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of a network that was trained on several devices."""
    return {key.removeprefix("module."): value for key, value in state.items()}
