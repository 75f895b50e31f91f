"""Denoisers from score_sde's checkpoints (Song et al. 2021, arXiv 2011.13456): DDPM, DDPM++ and NCSN++, VP or VE.

A checkpoint keeps its averaged weights as a list in the order of the trainable parameters; `averaged` gives them their
names. What the tensors don't say stands in a JSON beside it, with the keys of that project's configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from assay.defenses.checkpoints import load_state
from assay.defenses.denoiser import Denoiser
from assay.defenses.schedule import Schedule, Sigma, alpha_bar_of, column, linear_schedule
from assay.defenses.song_shapes import FILTER
from assay.defenses.song_unet import SongUNet
from assay.errors import InputError

CONFIG = (
    "training.sde",
    "training.continuous",
    "data.centered",
    "data.image_size",
    "model.name",
    "model.skip_rescale",
    "model.fir",
)
"""What score_sde's tensors don't say."""
_BETAS = 0.1, 20.0
_MODULES = "all_modules."


class VPDenoiser(Denoiser):
    """A network trained on the variance-preserving SDE (Song et al. 2021, eq. 11), β(t) from .1 to 20.

    Args:
        network: predicts ε at times 999·t, or, where it was trained on 1000 levels, 0 … 999.
        continuous: which of the two.
    """

    def __init__(self, network: SongUNet, continuous: bool) -> None:
        super().__init__(_vp_schedule() if continuous else linear_schedule())
        self.network = network
        self.continuous = continuous

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`."""
        given = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        if self.continuous:
            # ∫β = .1·t + 19.9·t²/2 = −ln ᾱ = ln(1 + σ²), solved for t.
            low, slope = _BETAS[0], _BETAS[1] - _BETAS[0]
            times = 999 * ((low**2 + 2 * slope * given.square().log1p()).sqrt() - low) / slope
        else:
            times = self.schedule.level(given) - 1
        x_t = x * column(alpha_bar_of(given), x).sqrt()
        output: Tensor = self.network(x_t, times.to(x.dtype))
        return x - column(given, x) * output


class VEDenoiser(Denoiser):
    """A network trained on the variance-exploding SDE, whose output over σ is the score (Song et al. 2021, eq. 9).

    Args:
        network: called with ln σ in units of `unit`.
        unit: σ of [−1, 1] per σ that it was trained with: 2 where images were in [0, 1] then.
    """

    def __init__(self, network: SongUNet, unit: float) -> None:
        super().__init__(sigma_range=(0.01 * unit, 50.0 * unit))
        self.network = network
        self.unit = unit

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`: x + σ²·s(x, σ), the same in either unit."""
        given = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        output: Tensor = self.network(x, (given / self.unit).log())
        return x + column(given, x) * output


def is_score_sde(state: Mapping[str, Any]) -> bool:
    """Whether a state has the keys of score_sde's networks."""
    return any(key.startswith(_MODULES) for key in state)


def averaged(raw: Mapping[str, Tensor], shadow: Sequence[Tensor], origin: str) -> dict[str, Tensor]:
    """The averaged weights of a score_sde checkpoint by name.

    Args:
        raw: its `model`, whose names are taken.
        shadow: its `ema.shadow_params`, whose values are.
        origin: what errors call the file.

    Raises:
        InputError: where the two don't agree in number or shapes.
    """
    model = {key.removeprefix("module."): value for key, value in raw.items()}
    # Not trained, so not averaged: the table of levels, and the frequencies of a Fourier embedding.
    fixed = [key for key in model if key == "sigmas" or (key.endswith(".W") and model[key].ndim == 1)]
    names = [key for key in model if key not in fixed]
    if len(names) != len(shadow):
        raise InputError(
            f"{origin} has {len(shadow)} averaged tensors in ema.shadow_params, but {len(names)} trainable ones in "
            f"model; expected as many. Without names they can't be told apart."
        )
    other = [
        f"{name} is {tuple(value.shape)}, averaged {tuple(mean.shape)}"
        for name, mean in zip(names, shadow, strict=True)
        if (value := model[name]).shape != mean.shape
    ]
    if other:
        raise InputError(f"{origin}: ema.shadow_params is not in the order of model. misshapen: {', '.join(other)}.")
    return {**{key: model[key] for key in fixed if key != "sigmas"}, **dict(zip(names, shadow, strict=True))}


def score_sde(state: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> Denoiser:
    """The denoiser in the averaged weights of a score_sde network (DDPM, DDPM++, NCSN++; VP or VE).

    Args:
        state: see `averaged`.
        config: that project's configuration; `CONFIG` lists what it has to say.
        origin: what errors call the file.

    Raises:
        InputError: for a configuration that lacks something or is not one of these, or where keys or shapes don't fit.
    """
    said = _settings(config, origin)
    sde, continuous = str(said["training.sde"]).lower(), bool(said["training.continuous"])
    if sde not in ("vpsde", "vesde"):
        why = " (sub-VP: its noise is not a scaled image plus noise of a level that a DDPM has)" * (sde == "subvpsde")
        raise InputError(f"{origin} was trained on the {sde}{why}; expected vpsde or vesde.")
    if sde == "vesde" and not continuous:
        raise InputError(f"{origin} is a vesde of discrete levels; expected a continuous one.")
    scaled = bool(config.get("model", {}).get("scale_by_sigma", sde == "vesde"))
    if scaled != (sde == "vesde"):
        raise InputError(f"{origin} has model.scale_by_sigma {scaled} with {sde}; expected it with vesde only.")
    try:
        trained = {key: value for key, value in state.items() if key != "sigmas"}
        named = _edm_names(trained, int(said["data.image_size"]), bool(said["model.fir"]), origin)
    except InputError:
        raise
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"{origin} does not fit score_sde's networks: {error!r}.") from error
    # Its first network always has 32 groups, the others at least four channels in each.
    least = 1 if said["model.name"] == "ddpm" else 4
    network = SongUNet(named, math.sqrt(0.5) if said["model.skip_rescale"] else 1.0, least, origin)
    load_state(network, named, f"{origin} (its modules under EDM's names)")
    if network.fourier != (sde == "vesde"):
        raise InputError(f"{origin} is a {sde} with {'Fourier' if network.fourier else 'positional'} times; not read.")
    if sde == "vesde":
        return VEDenoiser(network, 1.0 if said["data.centered"] else 2.0)
    return VPDenoiser(network, continuous)


def _settings(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    found = {}
    for name in CONFIG:
        section, _, key = name.partition(".")
        if isinstance(config.get(section), Mapping) and key in config[section]:
            found[name] = config[section][key]
    if missing := [name for name in CONFIG if name not in found]:
        raise InputError(
            f"{origin} needs a JSON of the same name beside it with score_sde's configuration "
            f'({{"training": {{"sde": "vpsde", …}}, …}}); it lacks {", ".join(missing)}.'
        )
    return found


def _vp_schedule() -> Schedule:
    """The continuous process at t = 0, 1/1000, …, 1."""
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    return Schedule((-(_BETAS[0] * times + (_BETAS[1] - _BETAS[0]) * times**2 / 2)).exp())


_PARTS = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
    "NIN_0": "skip",
}


def _edm_names(state: Mapping[str, Tensor], size: int, fir: bool, origin: str) -> dict[str, Tensor]:
    """A score_sde state under EDM's keys; resizing filters, which have no keys there, are added."""
    modules: list[dict[str, Tensor]] = []
    for key, value in state.items():
        found = re.fullmatch(r"all_modules\.(\d+)\.(.+)", key)
        if found is None:
            raise InputError(f"{origin} does not fit score_sde's networks. unexpected: {key}.")
        modules += [{} for _ in range(int(found[1]) + 1 - len(modules))]
        modules[int(found[1])][found[2]] = value
    if sum(_dimensions(module) == 1 for module in modules) > 1:
        raise InputError(f"{origin} adds up images of every size (progressive output), which is not read.")
    named: dict[str, Tensor] = {}
    if modules and "W" in modules[0]:
        named["map_noise.freqs"] = modules.pop(0)["W"]
    taps = torch.tensor([1.0, 3, 3, 1] if fir else [1.0, 1])
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    side, layer, width, blocks, decoded = "enc", "", 0, 0, False
    first = _first_of_decoder(modules, origin)
    for index, module in enumerate(modules):
        if index < 2:
            name = f"map_layer{index}"
        elif "NIN_3.W" in module:
            _attention(module, layer, named)
            continue
        elif "GroupNorm_1.weight" in module:
            outputs, inputs = module["Conv_0.weight"].shape[:2]
            resized = "Conv_2.weight" in module and outputs == inputs
            if index in (first - 3, first - 1):
                side, name = "dec", f"dec.{size}x{size}_in{int(index == first - 1)}"
            elif resized:
                size, blocks = (size // 2, 0) if side == "enc" else (size * 2, 0)
                name = f"{side}.{size}x{size}_{'down' if side == 'enc' else 'up'}"
                named |= {f"{name}.{part}.{FILTER}": kernel for part in ("conv0", "skip")}
            else:
                name, blocks = f"{side}.{size}x{size}_block{blocks}", blocks + 1
            if index == first - 1:
                blocks = 0
            layer, width = name, outputs
        elif "Conv2d_0.weight" in module:
            if not layer.endswith("_down"):
                raise InputError(f"{origin}: all_modules.{index} resizes with a filter outside a block; not read.")
            name = f"enc.{size}x{size}_aux_residual"
            named[f"{name}.{FILTER}"] = kernel
        elif "Conv_0.weight" in module:
            if module["Conv_0.weight"].shape[:2] != (width, width) or module["Conv_0.weight"].shape[2] != 3:
                raise InputError(f"{origin}: all_modules.{index} combines images (progressive input); not read.")
            size, blocks = (size // 2, 0) if side == "enc" else (size * 2, 0)
            name = f"{side}.{size}x{size}_{'down' if side == 'enc' else 'up'}"
        else:
            name = f"enc.{size}x{size}_conv" if index == 2 else f"dec.{size}x{size}_aux_{'conv' if decoded else 'norm'}"
            decoded = index > 2
        for key, value in module.items():
            part, _, parameter = key.rpartition(".")
            part = "" if part in ("Conv2d_0", "Conv_0") and "GroupNorm_1.weight" not in module else part
            whole = ".".join(
                filter(None, (name, _PARTS.get(part, part), {"W": "weight", "b": "bias"}.get(parameter, parameter)))
            )
            named[whole] = value.mT[..., None, None] if parameter == "W" else value
    return named


def _dimensions(module: Mapping[str, Tensor]) -> int:
    return module["weight"].ndim if "weight" in module else 0


def _first_of_decoder(modules: list[dict[str, Tensor]], origin: str) -> int:
    """Where the decoder's first block stands: the first that takes more channels than the one before gave."""
    width = 0
    for index, module in enumerate(modules):
        if "GroupNorm_1.weight" in module and "Conv_0.weight" in module:
            outputs, inputs = module["Conv_0.weight"].shape[:2]
            if width and inputs != width:
                return index
            width = outputs
    raise InputError(f"{origin} does not fit score_sde's networks: it has no decoder.")


def _attention(module: Mapping[str, Tensor], layer: str, named: dict[str, Tensor]) -> None:
    """Attention as part of the block before it; the rows of qkv are three of every channel."""
    for long in ("weight", "bias"):
        named[f"{layer}.norm2.{long}"] = module[f"GroupNorm_0.{long}"]
    weights = [module[f"NIN_{index}.W"].mT[..., None, None] for index in range(4)]
    biases = [module[f"NIN_{index}.b"] for index in range(4)]
    for long, values in (("weight", weights), ("bias", biases)):
        named[f"{layer}.qkv.{long}"] = torch.stack(values[:3], 1).flatten(0, 1)
        named[f"{layer}.proj.{long}"] = values[3]
