"""Files in other projects' formats: each gives what the original network computed, and what doesn't fit is listed.

`formats/denoiser_formats.json` holds, for a small network of each format, the names and shapes of its tensors in the
original's order, and predictions that the original implementation made with the weights of `weight` below.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import types
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from assay import data
from assay.defenses import denoiser_sources
from assay.defenses.denoiser import Denoiser, ScoreDenoiser, UNetDenoiser
from assay.defenses.denoiser_formats import read_weights
from assay.defenses.denoiser_sources import check_denoiser, denoiser_files, load_denoiser, take_denoiser
from assay.defenses.edm import EDMNetworkDenoiser
from assay.defenses.score_sde import VEDenoiser, VPDenoiser
from assay.defenses.song_unet import SongUNet
from assay.defenses.unet_keys import _heads
from assay.errors import InputError

CASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "formats/denoiser_formats.json").read_text())
SCORE_SDE = [name for name in CASES if name.startswith("score_sde")]
KINDS: dict[str, type[Denoiser]] = {
    "ddpm": UNetDenoiser,
    "guided": UNetDenoiser,
    "improved": UNetDenoiser,
    "edm_ddpmpp": EDMNetworkDenoiser,
    "edm_ncsnpp": EDMNetworkDenoiser,
    "score_sde_ddpmpp": VPDenoiser,
    "score_sde_ddpm": VPDenoiser,
    "score_sde_ncsnpp": VEDenoiser,
    "ncsnv2": ScoreDenoiser,
}


def weight(key: str, shape: list[int]) -> Tensor:
    """A tensor in closed form: waves of a phase of its own, scaled by its inputs; gains about 1."""
    if key.endswith("resample_filter"):
        taps = torch.tensor({2: [1.0, 1], 4: [1.0, 3, 3, 1]}[shape[-1]])
        return torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    steps = torch.arange(math.prod(shape), dtype=torch.float64) ** 2
    wave = (0.37 * steps + zlib.crc32(key.encode()) % 1000).cos().reshape(shape)
    if len(shape) < 2:
        return (0.1 * wave + float(key.endswith(("weight", "gamma", "alpha")))).float()
    inputs = shape[0] if key.endswith(".W") else math.prod(shape[1:])
    return (wave / math.sqrt(inputs)).float()


def state(name: str) -> OrderedDict[str, Tensor]:
    case = CASES[name]
    tensors = OrderedDict((key, weight(key, shape)) for key, shape in case["shapes"].items())
    if "sigmas" in case:
        tensors["sigmas"] = torch.tensor(case["sigmas"])
    elif "sigmas" in tensors:
        tensors["sigmas"] = torch.ones(1000, dtype=torch.float64)
    return tensors


def checkpoint(name: str) -> dict[str, Any]:
    """A score_sde checkpoint: names with raw weights, averaged weights without names."""
    tensors = state(name)
    fixed = {"sigmas"} | ({"all_modules.0.W"} if tensors["all_modules.0." + _first(tensors)].ndim == 1 else set())
    raw = {f"module.{key}": value if key in fixed else value + 1 for key, value in tensors.items()}
    means = [value for key, value in tensors.items() if key not in fixed]
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    ema = {"decay": 0.9999, "num_updates": 3, "shadow_params": means}
    return {"optimizer": optimizer.state_dict(), "model": raw, "ema": ema, "step": 3}


def _first(tensors: dict[str, Tensor]) -> str:
    return next(key.removeprefix("all_modules.0.") for key in tensors if key.startswith("all_modules.0."))


def write(folder: Path, name: str, change: Callable[[Any], object] = lambda content: None) -> str:
    """A file in the format, with the configuration beside it."""
    content: Any = state(name)
    if name in SCORE_SDE:
        content = checkpoint(name)
    elif name == "ncsnv2":
        content = [{f"module.{key}": value for key, value in content.items()}, {"state": {}}, 2, 100]
    changed = change(content)
    torch.save(content if changed is None else changed, folder / "weights.pth")
    if "config" in CASES[name]:
        (folder / "weights.json").write_text(json.dumps(CASES[name]["config"]))
    return str(folder / "weights.pth")


def predictions(denoiser: Denoiser, name: str) -> Tensor:
    x = (0.37 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)).cos().reshape(2, 3, 16, 16).float()
    sigmas = torch.tensor([0.25, 3.0])
    with torch.no_grad():
        if denoiser.n_classes:
            classes = torch.tensor(CASES[name]["classes"])[:, None]
            clean = denoiser.denoise_some(x, sigmas, classes)[:, 0]
            torch.testing.assert_close(denoiser.denoise_each(x, sigmas)[torch.arange(2), classes[:, 0]], clean)
        else:
            clean = denoiser.denoise(x, sigmas)
    return clean[:, :, 3::7, 1::6].flatten()


def assert_original(denoiser: Denoiser, name: str) -> None:
    torch.testing.assert_close(predictions(denoiser, name), torch.tensor(CASES[name]["output"]), rtol=0, atol=2e-4)


# What loads


@pytest.mark.parametrize("name", CASES)
def test_a_file_predicts_what_the_original_did(tmp_path: Path, name: str) -> None:
    source = write(tmp_path, name)
    denoiser = load_denoiser(source)
    assert isinstance(denoiser, KINDS[name])
    assert not denoiser.training
    assert_original(denoiser, name)
    files = {"denoiser/weights.pth", *(["denoiser/weights.json"] if "config" in CASES[name] else [])}
    assert denoiser_files(source).keys() == files


@pytest.mark.parametrize("name", [name for name in CASES if name not in SCORE_SDE])
def test_safetensors_sorted_by_name_do_as_well(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    tensors = {key: value.contiguous() for key, value in sorted(state(name).items())}
    save_file(tensors, tmp_path / "weights.safetensors")
    assert_original(load_denoiser(str(tmp_path / "weights.safetensors")), name)


def test_averaged_weights_are_taken_wherever_both_are(tmp_path: Path) -> None:
    """DDPM's: under `ema`, or last in the list that DDIM's trainer writes; EDM's: without the outer module."""
    source = write(tmp_path, "ddpm", lambda mean: {"ema": mean, "model": _raw(mean), "step": 1})
    assert_original(load_denoiser(source), "ddpm")
    trained: Callable[[Any], Any] = lambda mean: [_raw(mean), {"state": {}}, 2, 100, mean]  # noqa: E731
    assert_original(load_denoiser(write(tmp_path, "ddpm", trained)), "ddpm")
    inner: Callable[[Any], Any] = lambda mean: {key.removeprefix("model."): mean[key] for key in mean}  # noqa: E731
    assert_original(load_denoiser(write(tmp_path, "edm_ncsnpp", inner)), "edm_ncsnpp")


def _raw(mean: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value + 1 for key, value in mean.items()}


def test_the_learned_variance_is_left_out(tmp_path: Path) -> None:
    denoiser = load_denoiser(write(tmp_path, "guided"))
    assert isinstance(denoiser, UNetDenoiser)
    assert denoiser.network.config.out_channels == 6
    assert denoiser.eps(torch.zeros(1, 3, 16, 16), 5).shape == (1, 3, 16, 16)


def test_with_a_thousand_levels_rescaled_times_are_the_same(tmp_path: Path) -> None:
    source = write(tmp_path, "guided")
    for rescale in (False, True):
        config = {**CASES["guided"]["config"], "rescale_timesteps": rescale}
        (tmp_path / "weights.json").write_text(json.dumps(config))
        assert_original(load_denoiser(source), "guided")


def test_the_published_256_network_needs_no_configuration() -> None:
    heads = _heads({}, (256, 256, 512, 512, 1024, 1024), "256x256_diffusion_uncond.pt")
    assert (heads(512), heads(1024)) == (8, 16)


def test_classes_are_never_guessed(tmp_path: Path) -> None:
    denoiser = load_denoiser(write(tmp_path, "edm_ddpmpp"))
    assert denoiser.n_classes == 4
    with pytest.raises(InputError, match="takes class labels"):
        denoiser.denoise(torch.zeros(1, 3, 16, 16), 0.5)
    with pytest.raises(InputError, match="not class-conditional"):
        load_denoiser(write(tmp_path, "edm_ncsnpp")).denoise_each(torch.zeros(1, 3, 16, 16), 0.5)


def test_sigma_ranges_are_in_units_of_minus_one_to_one(tmp_path: Path) -> None:
    source = write(tmp_path, "ncsnv2")
    assert load_denoiser(source).sigma_range == pytest.approx((0.25, 3.0))
    (tmp_path / "weights.json").write_text('{"data": {"rescaled": true}}')
    assert load_denoiser(source).sigma_range == pytest.approx((0.125, 1.5))


@pytest.mark.parametrize("name", ["edm_ncsnpp", "score_sde_ddpmpp", "score_sde_ncsnpp", "score_sde_ddpm", "ncsnv2"])
def test_gradients_reach_the_image(tmp_path: Path, name: str) -> None:
    denoiser = load_denoiser(write(tmp_path, name)).double()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = x.clone().requires_grad_()
    denoiser.denoise(given, 0.5).square().sum().backward()
    assert given.grad is not None
    step = 1e-6

    def value(point: Tensor) -> float:
        with torch.no_grad():
            return float(denoiser.denoise(point, 0.5).square().sum())

    slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float((given.grad * direction).sum()) == pytest.approx(slope, rel=1e-4)


# The smoke test


class _Averages(nn.Module):
    """Predicts the noise in images that are constant over all pixels."""

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


def test_the_smoke_test_is_run_on_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "test_ids", lambda dataset: range(8))
    monkeypatch.setattr(data, "load", lambda dataset, ids: (torch.full((len(ids), 3, 16, 16), 0.4), torch.zeros(8)))
    for name in ("ddpm", "guided", "edm_ncsnpp", "score_sde_ddpmpp", "score_sde_ddpm", "ncsnv2"):
        with pytest.raises(InputError, match="doesn't denoise"):
            take_denoiser(write(tmp_path, name), "cifar10")
    with pytest.raises(InputError, match="doesn't denoise"):
        take_denoiser(write(tmp_path, "edm_ddpmpp"), "cifar10", 4)
    with pytest.raises(InputError, match="for images of 3 channels; those of digits have 1"):
        take_denoiser(write(tmp_path, "ncsnv2"), "digits")


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_network_in_its_frame_passes_and_a_silent_one_fails(tmp_path: Path, scale: float) -> None:
    """The constant image is found by each frame when its network returns what was added to it."""
    images = torch.full((4, 3, 16, 16), 0.4)
    vp = load_denoiser(write(tmp_path, "score_sde_ddpmpp"))
    ve = load_denoiser(write(tmp_path, "score_sde_ncsnpp"))
    assert isinstance(vp, VPDenoiser)
    assert isinstance(ve, VEDenoiser)

    class Scaled(_Averages):
        def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
            return scale * super().forward(x, times, labels)

    class Exact(Denoiser):
        def __init__(self, inner: Denoiser, sign: float) -> None:
            super().__init__(sigma_range=inner.sigma_range)
            self.inner, self.sign = inner, sign

        def denoise(self, x: Tensor, sigma: Any) -> Tensor:
            given = torch.as_tensor(sigma, dtype=x.dtype)
            factor = (1 + given**2).sqrt() / given if self.sign > 0 else 1 / given
            self.inner.network = _Times(Scaled(), self.sign * factor)
            return self.inner.denoise(x, sigma)

    for inner, sign in ((vp, 1.0), (ve, -1.0)):
        if scale:
            check_denoiser(Exact(inner, sign), images)
        else:
            with pytest.raises(InputError, match="doesn't denoise"):
                check_denoiser(Exact(inner, sign), images)


class _Times(nn.Module):
    def __init__(self, inner: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        result: Tensor = self.factor * self.inner(x, times, labels)
        return result


# What is refused


def _tensors(content: Any) -> dict[str, Tensor]:
    """The named tensors of a file, to be changed."""
    if isinstance(content, list):
        first: dict[str, Tensor] = content[0]
        return first
    tensors: dict[str, Tensor] = content
    return tensors


KEYS = {
    "ddpm": "up.1.block.0.nin_shortcut.weight",
    "guided": "output_blocks.1.2.in_layers.2.weight",
    "edm_ddpmpp": "model.dec.16x16_up.conv1.bias",
    "ncsnv2": "module.refine2.msf.convs.1.bias",
}


@pytest.mark.parametrize(("name", "key"), KEYS.items())
def test_every_difference_is_listed_under_the_files_own_names(tmp_path: Path, name: str, key: str) -> None:
    said = key.removeprefix("module.").removeprefix("model.")
    source = write(tmp_path, name, lambda content: _tensors(content).pop(key) is None)
    (tmp_path / "weights.pth").unlink()
    for change, expected in (
        (lambda tensors: tensors.pop(key), rf"missing: .*{said}"),
        (lambda tensors: tensors.update({f"{key}.more": torch.zeros(1)}), rf"unexpected: {said}\.more"),
        (lambda tensors: tensors.update({key: torch.zeros(5, 7)}), rf"misshapen: .*{said} is \(5, 7\), expected \("),
    ):
        write(tmp_path, name, lambda content, change=change: (change(_tensors(content)), None)[1])  # type: ignore[misc]
        with pytest.raises(InputError, match=expected):
            load_denoiser(source)


def test_a_block_that_is_missing_as_a_whole_is_listed(tmp_path: Path) -> None:
    def cut(content: Any) -> None:
        for key in [key for key in content if key.startswith("model.enc.8x8_block0.conv1")]:
            del content[key]
        for key in [key for key in content if key.startswith("model.dec.8x8_block1.")]:
            del content[key]

    with pytest.raises(InputError, match=r"missing: dec\.8x8_block1\.affine\.bias, .*, enc\.8x8_block0\.conv1\.bias"):
        load_denoiser(write(tmp_path, "edm_ddpmpp", cut))


@pytest.mark.parametrize("name", SCORE_SDE)
def test_averaged_weights_that_do_not_match_their_names_are_refused(tmp_path: Path, name: str) -> None:
    means: Callable[[Any], list[Tensor]] = lambda content: content["ema"]["shadow_params"]  # noqa: E731
    source = write(tmp_path, name, lambda content: means(content).pop() is None or None)
    with pytest.raises(InputError, match=r"has \d+ averaged tensors in ema.shadow_params, but \d+ trainable"):
        load_denoiser(source)
    write(tmp_path, name, lambda content: means(content).reverse())
    with pytest.raises(InputError, match=r"not in the order of model\. misshapen: all_modules"):
        load_denoiser(source)
    write(tmp_path, name, lambda content: content["model"].update({"module.all_modules.3.Other": torch.zeros(1)}))
    with pytest.raises(InputError, match="trainable"):
        load_denoiser(source)


@pytest.mark.parametrize("name", ["ddpm", *SCORE_SDE])
def test_raw_weights_alone_are_refused(tmp_path: Path, name: str) -> None:
    def drop(content: Any) -> Any:
        if name == "ddpm":
            return [content, {"state": {}}, 2, 100]
        return {key: value for key, value in content.items() if key != "ema"}

    entry = "0" if name == "ddpm" else "model"
    with pytest.raises(InputError, match=rf"weights in its entry {entry}, but none .* moving average"):
        load_denoiser(write(tmp_path, name, drop))


def test_a_pickle_of_edm_is_refused_unread_and_its_conversion_named(tmp_path: Path) -> None:
    """The same opcodes: a class that rebuilds itself from source by a function of `torch_utils.persistence`."""
    ran = []
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: object) -> object:
        ran.append(meta)
        return meta

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    vars(module)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj

    class Network:
        def __reduce__(self) -> tuple[Any, ...]:
            return (_reconstruct_persistent_obj, ({"type": "class", "module_src": "import os"},))

    path = tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
        patch.setitem(sys.modules, module.__name__, module)
        path.write_bytes(pickle.dumps({"ema": Network()}))
        with pytest.raises(InputError, match=r"is an EDM pickle.*executes.*state_dict\(\).*model\.enc\.32x32_conv"):
            load_denoiser(str(path))
        renamed = tmp_path / "weights.pth"  # found by what is in it
        renamed.write_bytes(path.read_bytes())
        with pytest.raises(InputError, match="is an EDM pickle"):
            load_denoiser(str(renamed))
    assert not ran


def _config(name: str, **changes: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(CASES[name]["config"]))
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        part = config.setdefault(section, {}) if section else config
        if value is None:
            del part[last]
        else:
            part[last] = value
    result: dict[str, Any] = config
    return result


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("score_sde_ddpmpp", {"training__sde": "subvpsde"}, "trained on the subvpsde.*sub-VP.*expected vpsde or vesde"),
        ("score_sde_ddpmpp", {"training__sde": None, "model__fir": None}, r"lacks training\.sde, model\.fir"),
        ("score_sde_ddpmpp", {"model__scale_by_sigma": True}, "scale_by_sigma True with vpsde"),
        ("score_sde_ddpmpp", {"training__sde": "vesde", "model__scale_by_sigma": True}, "positional times"),
        ("score_sde_ncsnpp", {"training__continuous": False}, "vesde of discrete levels"),
        ("guided", {"num_head_channels": None}, "does not say how its attention is divided.*num_heads or"),
        ("guided", {"noise_schedule": "sqrt"}, "noise_schedule 'sqrt', expected linear or cosine"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    source = write(tmp_path, name)
    (tmp_path / "weights.json").write_text(json.dumps(_config(name, **changes)))
    with pytest.raises(InputError, match=says):
        load_denoiser(source)


def test_an_edm_configuration_is_read(tmp_path: Path) -> None:
    source = write(tmp_path, "edm_ncsnpp")
    (tmp_path / "weights.json").write_text('{"sigma_data": 0.25, "precond": "EDMPrecond"}')
    denoiser = load_denoiser(source)
    assert isinstance(denoiser, EDMNetworkDenoiser)
    assert denoiser.sigma_data == 0.25
    for text, says in (('{"precond": "VPPrecond"}', "VPPrecond, expected EDMPrecond"), ("[]", "holds a list")):
        (tmp_path / "weights.json").write_text(text)
        with pytest.raises(InputError, match=says):
            load_denoiser(source)


def test_a_missing_configuration_is_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path, "score_sde_ddpmpp")
    (tmp_path / "weights.json").unlink()
    with pytest.raises(InputError, match=r"needs a JSON of the same name beside it.*lacks training\.sde"):
        load_denoiser(source)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        (
            "edm_ncsnpp",
            {"model.enc.8x8_aux_skip.weight": [16, 3, 1, 1]},
            "layer enc.8x8_aux_skip.*not read",
        ),
        ("edm_ncsnpp", {"model.out_norm.weight": [16]}, "EDM's version of ADM"),
        ("ncsnv2", {"res5.0.conv1.weight": [8, 8, 3, 3]}, "deeper NCSNv2.*res5"),
    ],
)
def test_other_architectures_are_named(tmp_path: Path, name: str, changed: dict[str, list[int]], says: str) -> None:
    more = {key: torch.zeros(shape) for key, shape in changed.items()}
    with pytest.raises(InputError, match=says):
        load_denoiser(write(tmp_path, name, lambda content: _tensors(content).update(more)))


def test_an_architecture_of_score_sde_that_is_not_read_is_named(tmp_path: Path) -> None:
    def pyramid(content: Any) -> None:
        """Progressive output: one more normalisation of an image in the decoder."""
        content["model"]["module.all_modules.40.weight"] = torch.zeros(16)
        content["ema"]["shadow_params"].append(torch.zeros(16))

    with pytest.raises(InputError, match="progressive output"):
        load_denoiser(write(tmp_path, "score_sde_ddpmpp", pyramid))

    def empty(content: Any) -> None:
        content["model"] = {"module.all_modules.0.weight": torch.zeros(2, 2)}
        content["ema"]["shadow_params"] = [torch.zeros(2, 2)]

    with pytest.raises(InputError, match="it has no decoder"):
        load_denoiser(write(tmp_path, "score_sde_ddpmpp", empty))


def test_a_ddpm_of_other_outputs_is_refused(tmp_path: Path) -> None:
    def six(tensors: Any) -> None:
        tensors.update({"conv_out.weight": torch.zeros(6, 32, 3, 3), "conv_out.bias": torch.zeros(6)})

    with pytest.raises(InputError, match="turns 3 channels into 6, expected 3"):
        load_denoiser(write(tmp_path, "ddpm", six))


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("ddpm", {"conv_in.weight": (32,)}, r"conv_in\.weight of shape \(32,\), expected that of a layer"),
        ("ddpm", {"down.0.block.0.conv1.weight": (20, 32, 3, 3)}, "can't be built: .*num_channels"),
        ("ddpm", {"down.1.block.0.conv1.weight": None}, r"has no down\.1\.block\.0\.conv1\.weight, .*complete\?"),
        ("guided", {"middle_block.0.emb_layers.1.weight": None}, r"has no middle_block\.0\.emb_layers\.1\.weight"),
        ("guided", {"input_blocks.2.0.in_layers.2.weight": None}, r"missing: input_blocks\.2\.0\.in_layers\.2\.weight"),
        (
            "guided",
            {"middle_block.1.qkv.bias": (7,)},
            r"missing: .*qkv\[k\]\.bias.*unexpected: middle_block\.1\.qkv\.bias",
        ),
        ("ncsnv2", {"module.begin_conv.weight": (8,)}, r"begin_conv\.weight of shape \(8,\)"),
    ],
)
def test_shapes_that_tell_no_network_are_refused(
    tmp_path: Path, name: str, changes: dict[str, tuple[int, ...] | None], says: str
) -> None:
    def change(content: Any) -> None:
        for key, shape in changes.items():
            if shape is None:
                del _tensors(content)[key]
            else:
                _tensors(content)[key] = torch.zeros(shape)

    with pytest.raises(InputError, match=says):
        load_denoiser(write(tmp_path, name, change))


def test_a_network_that_is_incomplete_is_not_built() -> None:
    with pytest.raises(InputError, match="has no encoder"):
        SongUNet({})
    with pytest.raises(InputError, match=r"of shape \(8,\), expected 4 dimensions"):
        SongUNet({"enc.8x8_conv.weight": torch.zeros(8)})
    with pytest.raises(
        InputError, match=r"cut\.pt has no enc\.8x8_block0\.conv0\.weight, so that its network can't be told"
    ):
        SongUNet({"enc.8x8_conv.weight": torch.zeros(8, 3, 3, 3)}, origin="cut.pt")


def test_files_of_other_things_are_still_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list, not tensors by name"):
        read_weights(tmp_path / "list.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"neither FDnCNN nor FFDNet.*guided-diffusion.*score_sde or NCSNv2"):
        load_denoiser(str(tmp_path / "other.pth"))
    assert denoiser_sources.UNDERSTOOD.count("NCSNv2") == 1


@pytest.mark.skipif(
    data.DATA_VARIABLE not in os.environ, reason="ASSAY_DATA names no folder with a diffusion model of another kind"
)
def test_a_diffusion_model_of_its_own_architecture_is_refused() -> None:
    path = Path(os.environ[data.DATA_VARIABLE]) / "diffusion/fahad00888_ddpm_animals32_rgb.pth"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with pytest.raises(InputError, match="neither FDnCNN nor FFDNet"):
        load_denoiser(str(path))
