"""Denoisers that people bring: a diffusers folder or hub id, or a weight file.

A source is recognised by what is in it, not by its name. Files are not executed: safetensors, or torch
files read with `weights_only`; keys have to agree exactly. Whose network is none of these names code that
makes it. Each denoiser that comes from outside then has to show on images that it denoises
(`check_denoiser`), which finds much of what no key can: pixels in another range, another schedule, raw
instead of averaged weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import snapshot_download
from torch import Tensor

from assay import data
from assay.defenses.checkpoints import load_state
from assay.defenses.denoiser import Denoiser, EDMDenoiser, GaussianDenoiser, UNetDenoiser, decode, encode
from assay.defenses.denoiser_formats import FORMATS, config_file, read_json, read_weights, recognise
from assay.defenses.gaussian_networks import FDnCNN, FFDNet
from assay.defenses.schedule import Schedule, with_start
from assay.errors import InputError
from assay.foreign import code_file, is_code, make_module
from assay.noise import Noise

UNDERSTOOD = (
    "a diffusers folder (the config.json and diffusion_pytorch_model.safetensors of a UNet2DModel with a "
    "scheduler_config.json beside them, or the same in unet/ and scheduler/), the hub id owner/name of one, or a torch "
    f"or safetensors file with the weights of FDnCNN or FFDNet for colour images, or of {FORMATS}; or module:object or "
    "path.py:object of an assay.defenses.denoiser.Denoiser, or of what makes one"
)
_CONFIG, _SCHEDULER = "config.json", "scheduler_config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
"""Samplers whose configuration says which ᾱ the network was trained on; other families have other processes."""
_SMOKE_IMAGES = 8


def take_denoiser(source: str, dataset: str, n_classes: int = 0) -> Denoiser:
    """A denoiser for a data set, loaded and seen to denoise its images.

    Args:
        source: see `load_denoiser`.
        dataset: whose images it is checked on.
        n_classes: how many classes it has to know; 0 for one without classes.

    Raises:
        InputError: as `load_denoiser` and `check_denoiser` do, or where it knows other classes or is
            for images of other channels.
    """
    denoiser = load_denoiser(source)
    channels = data.describe(dataset).shape[0]
    made_for = channels if is_code(source) else _channels(denoiser)
    if made_for != channels:
        raise InputError(f"{source} is for images of {made_for} channels; those of {dataset} have {channels}.")
    if denoiser.n_classes and not n_classes:
        raise InputError(f"{source} takes class labels, which a purifier doesn't have; expected one without classes.")
    if denoiser.n_classes != n_classes:
        known = denoiser.n_classes or "no"
        raise InputError(f"{source} knows {known} classes; expected a U-Net that takes the {n_classes} of {dataset}.")
    # Digits may be checked on training images; CIFAR-10's ids are all of its test split. Nothing is chosen by this.
    ids = data.train_split(dataset) if dataset == "digits" else data.test_ids(dataset)
    images, _ = data.load(dataset, ids[:: len(ids) // _SMOKE_IMAGES][:_SMOKE_IMAGES])
    check_denoiser(denoiser, images)
    return denoiser


def load_denoiser(source: str) -> Denoiser:
    """A denoiser in evaluation mode.

    Args:
        source: what `UNDERSTOOD` lists. A hub id is downloaded once, then read from the hub's cache.

    Raises:
        InputError: for a source that is not found or not understood, or whose keys or shapes don't
            fit (the differences are listed).
    """
    if is_code(source):
        return make_module(source, Denoiser, UNDERSTOOD).eval()
    path = _locate(source)
    denoiser = _from_folder(path) if path.is_dir() else _from_file(path)
    return denoiser.eval()


def denoiser_files(source: str) -> dict[str, Path]:
    """The files that `load_denoiser(source)` reads, by name: `denoiser/` and the path inside the folder.

    Raises:
        InputError: for a source that is not found or not understood.
    """
    if is_code(source):
        file = code_file(source)
        return {f"denoiser/{file.name}": file} if file is not None else {}
    path = _locate(source)
    if path.is_file():
        beside = config_file(path)
        return {f"denoiser/{file.name}": file for file in (path, beside) if file == path or beside.is_file()}
    network, scheduler = _parts(path)
    files = (network / _CONFIG, _weights(network), scheduler / _SCHEDULER)
    return {f"denoiser/{file.relative_to(path).as_posix()}": file for file in files}


def smoke_sigmas(denoiser: Denoiser) -> tuple[float, float, float]:
    """The three levels at which `check_denoiser` looks: σ_top/16, /4 and σ_top, the lower of 1 and the highest σ."""
    low, high = denoiser.sigma_range
    top = max(low, min(high, 1.0))
    return max(low, top / 16), max(low, top / 4), top


def psnr(x: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [0, 1], 10·log10(1/MSE), averaged over images."""
    errors = (x - clean).square().flatten(1).mean(1).clamp_min(1e-20)
    return float(-10 * errors.log10().mean())


@torch.no_grad()
def check_denoiser(denoiser: Denoiser, images: Tensor) -> None:
    """Checks that a denoiser removes noise: at three levels its PSNR has to beat the noisy image's own.

    Args:
        images: `(n, c, h, w)` in [0, 1], of the kind it will be used on.

    Raises:
        InputError: for the first level at which it doesn't, with what usually causes that.
    """
    noise = Noise.from_seed(0, len(images)).child("smoke")
    for sigma in smoke_sigmas(denoiser):
        noisy = encode(images) + sigma * noise.normal(shape=images.shape[1:], like=images)
        # The project's own multi-head network knows classes and predicts without one as well.
        conditional = denoiser.n_classes and not isinstance(denoiser, EDMDenoiser)
        clean = denoiser.denoise_each(noisy, sigma).mean(1) if conditional else denoiser.denoise(noisy, sigma)
        before, after = psnr(decode(noisy), images), psnr(decode(clean), images)
        # Written so that NaN fails.
        if not after > before:
            raise InputError(
                f"the denoiser doesn't denoise: at σ = {sigma:.3g} (in [−1, 1] units) the image it predicts has "
                f"{after:.1f} dB, the noisy one {before:.1f} dB. Usual causes: weights made for pixels in another "
                f"range than [−1, 1] (Gaussian denoisers: [0, 1]), another noise schedule or prediction type than the "
                f"configuration says, or raw weights instead of their moving average (EMA)."
            )


def _locate(source: str) -> Path:
    """The file or folder behind a source."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return _download(source)
    raise InputError(f"no denoiser at {source!r}. Expected {UNDERSTOOD}.")


@functools.cache
def _download(name: str) -> Path:
    """The cached folder of a hub repository, with the files that `_from_folder` reads."""
    patterns = [f"{part}{file}" for part in ("", "unet/", "scheduler/") for file in (_CONFIG, _SCHEDULER, _WEIGHTS[0])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.rglob(_WEIGHTS[0])):
            patterns += [_WEIGHTS[1], f"unet/{_WEIGHTS[1]}"]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    # The hub's client raises the errors of its HTTP library as well as its own, which share no base class.
    except Exception as error:
        raise InputError(
            f"{name!r} is no file or folder here, and as a hub id it could not be downloaded ({type(error).__name__}). "
            f"Check the name and the network, or download it elsewhere and give the folder's path. "
            f"Expected {UNDERSTOOD}."
        ) from error
    return folder


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where network and scheduler lie in a folder of either layout."""
    parts = (folder / "unet", folder / "scheduler") if (folder / "unet").is_dir() else (folder, folder)
    for part, file in zip(parts, (_CONFIG, _SCHEDULER), strict=True):
        if not (part / file).is_file():
            raise InputError(f"{folder} holds no {(part / file).relative_to(folder)}. Expected {UNDERSTOOD}.")
    return parts


def _weights(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds no {' or '.join(_WEIGHTS)}.")


def _from_folder(folder: Path) -> UNetDenoiser:
    network_folder, scheduler_folder = _parts(folder)
    config = read_json(network_folder / _CONFIG)
    if config.get("_class_name") != "UNet2DModel":
        raise InputError(f"{folder} holds a {config.get('_class_name')}, expected a UNet2DModel.")
    scheduler = _scheduler(scheduler_folder)
    network = _network(network_folder)
    _check_outputs(folder, network, str(scheduler.config.get("variance_type", "")))
    return UNetDenoiser(
        network,
        Schedule(with_start(scheduler.alphas_cumprod)),
        scheduler.config.prediction_type,
        network.config.num_class_embeds or 0,
    )


def _scheduler(folder: Path) -> DDPMScheduler:
    kind = read_json(folder / _SCHEDULER).get("_class_name")
    if kind not in _SCHEDULERS:
        raise InputError(f"{folder / _SCHEDULER} is of a {kind}, expected one of {', '.join(_SCHEDULERS)}.")
    try:
        return DDPMScheduler.from_pretrained(folder)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise InputError(f"{folder / _SCHEDULER} makes no schedule: {error}.") from error


def _network(folder: Path) -> UNet2DModel:
    """The U-Net; its own loader knows the older names of attention layers, as in google/ddpm-cifar10-32."""
    safe = _weights(folder).suffix == ".safetensors"
    try:
        # Without low_cpu_mem_usage it needs no further package, and lists the differences instead of raising.
        network, found = UNet2DModel.from_pretrained(
            folder, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder} holds no UNet2DModel that loads: {error}") from error
    differences = [
        f"{title}: {', '.join(sorted(map(str, found[key])))}"
        for title, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("other", "error_msgs"))
        if found[key]
    ]
    if differences:
        raise InputError(f"{_weights(folder)} does not fit its config.json. {'; '.join(differences)}.")
    return network


def _check_outputs(folder: Path, network: UNet2DModel, variance: str) -> None:
    """Refuses a network whose output is not the image, or the image and a learned variance."""
    inputs, outputs = network.config.in_channels, network.config.out_channels
    expected = 2 * inputs if variance.startswith("learned") else inputs
    if outputs != expected:
        raise InputError(
            f"{folder}: the network turns {inputs} channels into {outputs}; its scheduler's variance_type is "
            f"{variance!r}, so {expected} were expected."
        )
    if network.config.class_embed_type is not None:
        raise InputError(f"{folder}: class_embed_type is {network.config.class_embed_type!r}, expected none.")


def _from_file(path: Path) -> Denoiser:
    """FDnCNN has a 4-channel first convolution (the image and σ), FFDNet one of 15 (σ thrice, four phases)."""
    weights = read_weights(path)
    denoiser = recognise(weights, path)
    if denoiser is not None:
        return denoiser
    state = _numbered(weights)
    first = state.get("layers.0.weight")
    channels = first.shape[1] if first is not None and first.ndim == 4 else 0
    if channels not in (4, 15):
        raise InputError(f"{path} holds neither FDnCNN nor FFDNet for colour images. Expected {UNDERSTOOD}.")
    network = FDnCNN() if channels == 4 else FFDNet()
    load_state(network, state, path.name)
    return GaussianDenoiser(network)


def _channels(denoiser: Denoiser) -> int:
    """Of the images that a denoiser is for."""
    if isinstance(denoiser, UNetDenoiser):
        return int(denoiser.network.config.in_channels)
    return int(getattr(denoiser.network, "channels", 3))


def _numbered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys such as `any.prefix.0.weight` as `layers.0.weight`; empty where they have no such prefix in common."""
    parts = [re.fullmatch(r"(.*\.)?(\d+\.\w+)", key) for key in state]
    prefixes = {part[1] for part in parts if part}
    if not all(parts) or len(prefixes) != 1:
        return {}
    return {f"layers.{part[2]}": value for part, value in zip(parts, state.values(), strict=True) if part}
