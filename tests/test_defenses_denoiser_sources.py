"""Denoisers that people bring: each format loads to the same predictions, and what doesn't fit is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from assay import data
from assay.defenses import denoiser_sources
from assay.defenses.denoiser import Denoiser, GaussianDenoiser, UNetDenoiser, encode
from assay.defenses.denoiser_sources import (
    check_denoiser,
    denoiser_files,
    load_denoiser,
    psnr,
    smoke_sigmas,
    take_denoiser,
)
from assay.defenses.gaussian_networks import FDnCNN, FFDNet
from assay.defenses.mixture import MixtureDenoiser
from assay.errors import InputError
from assay.noise import Noise

HAS_DATA = data.DATA_VARIABLE in os.environ
DENOISERS = Path(os.environ.get(data.DATA_VARIABLE, "")) / "denoisers"
FDNCNN_FILE, FFDNET_FILE = DENOISERS / "fdncnn_color_converted.pth", DENOISERS / "ffdnet_net_rgb.pth"
needs_denoisers = pytest.mark.skipif(
    not (HAS_DATA and FDNCNN_FILE.is_file() and FFDNET_FILE.is_file()),
    reason="ASSAY_DATA names no folder with cifar10 and denoisers/",
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet(**config: Any) -> UNet2DModel:
    """A tiny U-Net with an attention layer, weights drawn without the global generator's help."""
    model = UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            **config,
        }
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write(
    folder: Path, network: UNet2DModel, scheduler: Any = None, *, pipeline: bool = False, safe: bool = True
) -> Path:
    """A diffusers folder: flat as `google/ddpm-cifar10-32`, or with the subfolders that a pipeline saves."""
    network.save_pretrained(folder / "unet" if pipeline else folder, safe_serialization=safe)
    scheduler = scheduler or DDPMScheduler()
    scheduler.save_pretrained(folder / "scheduler" if pipeline else folder)
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return folder


@pytest.fixture
def x() -> Tensor:
    """Four noised images `(4, 3, 8, 8)`."""
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# diffusers folders


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["flat", "pipeline"])
def test_a_diffusers_folder_reads_back_with_equal_predictions(
    tmp_path: Path, x: Tensor, pipeline: bool, safe: bool
) -> None:
    network = unet()
    scheduler = DDPMScheduler(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2")
    denoiser = load_denoiser(str(write(tmp_path, network, scheduler, pipeline=pipeline, safe=safe)))
    assert isinstance(denoiser, UNetDenoiser)
    assert not denoiser.training
    assert denoiser.schedule.levels == 500
    assert torch.equal(denoiser.schedule.alpha_bars[1:], scheduler.alphas_cumprod.double())
    with torch.no_grad():
        for t in (1, 250, 500):
            assert torch.equal(denoiser.eps(x, t), network(x, t - 1).sample)
    files = denoiser_files(str(tmp_path))
    assert all(path.is_file() for path in files.values())
    name = WEIGHTS if safe else "diffusion_pytorch_model.bin"
    assert (f"denoiser/unet/{name}" if pipeline else f"denoiser/{name}") in files
    assert len(files) == 3


def test_attention_layers_under_their_older_names_load(tmp_path: Path, x: Tensor) -> None:
    """google/ddpm-cifar10-32 was written before diffusers renamed them."""
    network = unet()
    write(tmp_path, network)
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(tmp_path / WEIGHTS)
    renamed = {}
    for key, value in state.items():
        for name, older in new.items():
            key = key.replace(name, older)
        renamed[key] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / WEIGHTS, {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_denoiser(str(tmp_path)).eps(x, 100), network(x, 99).sample)


def test_a_v_prediction_is_turned_into_noise(tmp_path: Path, x: Tensor) -> None:
    network = unet()
    write(tmp_path, network, DDPMScheduler(prediction_type="v_prediction"))
    denoiser = load_denoiser(str(tmp_path))
    with torch.no_grad():
        v = network(x, 299).sample
        alpha_bar = DDPMScheduler().alphas_cumprod[299]
        torch.testing.assert_close(denoiser.eps(x, 300), alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x)


def test_a_learned_variance_is_left_out(tmp_path: Path, x: Tensor) -> None:
    network = unet(out_channels=6)
    write(tmp_path, network, DDPMScheduler(variance_type="learned_range"))
    with torch.no_grad():
        assert torch.equal(load_denoiser(str(tmp_path)).eps(x, 10), network(x, 9).sample[:, :3])


@pytest.mark.parametrize(("outputs", "variance"), [(6, "fixed_small"), (3, "learned_range"), (4, "fixed_large")])
def test_outputs_that_the_scheduler_does_not_explain_are_refused(tmp_path: Path, outputs: int, variance: str) -> None:
    write(tmp_path, unet(out_channels=outputs), DDPMScheduler(variance_type=variance))
    with pytest.raises(InputError, match=f"3 channels into {outputs}.*variance_type is '{variance}'"):
        load_denoiser(str(tmp_path))


def test_class_labels_are_used_and_never_guessed(tmp_path: Path, x: Tensor) -> None:
    network = unet(num_class_embeds=5)
    denoiser = load_denoiser(str(write(tmp_path, network)))
    assert denoiser.n_classes == 5
    with torch.no_grad():
        each = denoiser.denoise_each(x, 0.5)
        ones = denoiser.denoise_some(x, 0.5, torch.ones(4, 1, dtype=torch.int64))
    assert each.shape == (4, 5, 3, 8, 8)
    torch.testing.assert_close(each[:, 1:2], ones)
    assert not torch.equal(each[:, 0], each[:, 1])
    with pytest.raises(InputError, match="takes class labels"):
        denoiser.denoise(x, 0.5)


def test_another_sampler_s_configuration_gives_the_same_schedule(tmp_path: Path) -> None:
    write(tmp_path, unet(), DDIMScheduler(beta_start=1e-3, beta_end=1e-2))
    expected = DDPMScheduler(beta_start=1e-3, beta_end=1e-2).alphas_cumprod.double()
    assert torch.equal(load_denoiser(str(tmp_path)).schedule.alpha_bars[1:], expected)


def test_a_sampler_of_another_process_is_refused(tmp_path: Path) -> None:
    write(tmp_path, unet(), EulerDiscreteScheduler())
    with pytest.raises(InputError, match="EulerDiscreteScheduler, expected one of DDPMScheduler"):
        load_denoiser(str(tmp_path))


def _rename_a_key(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["conv_inn.weight"] = state.pop("conv_in.weight")
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def _reshape_a_key(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"] = torch.zeros(9)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_rename_a_key, r"missing: conv_in\.weight; unexpected: conv_inn\.weight"),
        (_reshape_a_key, "conv_in.bias"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no diffusion_pytorch_model.safetensors or"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"not weights"), "no UNet2DModel that loads"),
        (lambda folder: (folder / "scheduler_config.json").unlink(), "holds no scheduler_config.json"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
        (
            lambda folder: edit(folder / "config.json", lambda c: c.update(_class_name="UNet2DConditionModel")),
            "a UNet2DConditionModel, expected a UNet2DModel",
        ),
        (
            lambda folder: edit(folder / "config.json", lambda c: c.update(class_embed_type="timestep")),
            "class_emb",
        ),
        (
            lambda folder: edit(folder / "scheduler_config.json", lambda c: c.update(beta_schedule="cubic")),
            "makes no schedule",
        ),
        (
            lambda folder: edit(folder / "scheduler_config.json", lambda c: c.update(prediction_type="flow")),
            "prediction must be epsilon",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(write(tmp_path, unet()))
    with pytest.raises(InputError, match=says):
        load_denoiser(str(tmp_path))


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    write(tmp_path / "folder", unet(), safe=False)
    (tmp_path / "folder" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Evil()}))
    torch.save({"0.weight": Evil()}, tmp_path / "evil.pth")
    for source in ("folder", "evil.pth"):
        with pytest.raises(InputError):
            load_denoiser(str(tmp_path / source))
    assert not (tmp_path / "ran").exists()


# The hub


def test_a_hub_id_is_downloaded_and_read_as_a_folder(
    tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, asked = unet(), []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if "diffusion_pytorch_model.bin" in allow_patterns:  # an old repository, with a .bin only
            write(tmp_path, network, safe=False)
        return str(tmp_path)

    monkeypatch.setattr(denoiser_sources, "snapshot_download", download)
    denoiser_sources._download.cache_clear()
    with torch.no_grad():
        assert torch.equal(load_denoiser("someone/ddpm-32").eps(x, 7), network(x, 6).sample)
    assert "denoiser/diffusion_pytorch_model.bin" in denoiser_files("someone/ddpm-32")
    assert [name for name, _ in asked] == ["someone/ddpm-32"] * 2  # and not again for the files
    assert WEIGHTS in asked[0][1]
    denoiser_sources._download.cache_clear()


def test_a_hub_id_that_can_not_be_downloaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise OSError("no network")

    monkeypatch.setattr(denoiser_sources, "snapshot_download", download)
    with pytest.raises(InputError, match=r"'google/ddpm-cifar10-32'.*OSError.*give the folder's path"):
        load_denoiser("google/ddpm-cifar10-32")


@pytest.mark.parametrize("source", ["nowhere", "./nowhere/at/all.pth", "https://example.org/a"])
def test_what_is_neither_here_nor_a_hub_id_is_listed(source: str) -> None:
    with pytest.raises(InputError, match=r"no denoiser at .*a diffusers folder.*hub id.*FDnCNN or FFDNet"):
        load_denoiser(source)


# Gaussian denoisers


@pytest.mark.parametrize(
    ("network", "prefix"),
    [(FDnCNN(), ""), (FDnCNN(), "model."), (FFDNet(), "module.intermediate_dncnn.itermediate_dncnn.")],
)
def test_a_gaussian_denoiser_s_file_reads_back(tmp_path: Path, x: Tensor, network: nn.Module, prefix: str) -> None:
    state = {key.replace("layers.", prefix, 1): value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    denoiser = load_denoiser(str(tmp_path / "weights.pth"))
    assert isinstance(denoiser, GaussianDenoiser)
    assert isinstance(denoiser.network, type(network))
    network.eval()
    with torch.no_grad():
        expected = 2 * network((x + 1) / 2, torch.full((4,), 0.1)) - 1
        torch.testing.assert_close(denoiser.denoise(x, 0.2), expected)
    assert denoiser_files(str(tmp_path / "weights.pth")) == {"denoiser/weights.pth": tmp_path / "weights.pth"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("2.bias"), r"does not fit FDnCNN\. missing: layers\.2\.bias"),
        (lambda s: s.update({"40.weight": torch.zeros(1)}), r"unexpected: layers\.40\.weight"),
        (lambda s: s.update({"38.bias": torch.zeros(1)}), r"layers\.38\.bias is \(1,\), expected \(3,\)"),
        (lambda s: s.update({"0.weight": torch.zeros(64, 2, 3, 3)}), "neither FDnCNN nor FFDNet"),
        (lambda s: s.update({"other": torch.zeros(1)}), "neither FDnCNN nor FFDNet"),
        (lambda s: s.update({"meta": {"a": 1}}), "not tensors by name"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    state = {key.removeprefix("layers."): value for key, value in FDnCNN().state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=says):
        load_denoiser(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_ffdnet_s_phases_are_in_the_order_of_pixel_unshuffle(rows: int) -> None:
    from assay.defenses.gaussian_networks import _join, _split

    x = torch.arange(rows * 3 * 4 * 6.0).reshape(rows, 3, 4, 6)
    phases = _split(x)
    assert phases.shape == (rows, 12, 2, 3)
    if rows:
        assert torch.equal(phases, nn.functional.pixel_unshuffle(x, 2))
    assert torch.equal(_join(phases), x)


# The smoke test


class Scaled(Denoiser):
    """Another denoiser, seeing `scale·x + shift` for x: the wrong range, for instance."""

    def __init__(self, inner: Denoiser, scale: float = 1.0, shift: float = 0.0, sigma: float = 1.0) -> None:
        super().__init__(sigma_range=inner.sigma_range)
        self.inner, self.scale, self.shift, self.sigma = inner, scale, shift, sigma

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.inner.denoise(self.scale * x + self.shift, torch.as_tensor(sigma) * self.sigma)


@pytest.fixture
def photographs() -> Tensor:
    """16 images of the mixture that `exact` knows, in [0, 1]."""
    return _means()[torch.arange(16) % 4] / 2 + 0.5


def _means() -> Tensor:
    return 0.8 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)


@pytest.fixture
def exact() -> MixtureDenoiser:
    return MixtureDenoiser(torch.full((4,), 0.25), _means(), torch.full((4,), 0.05))


def test_an_exact_denoiser_passes_and_one_that_does_nothing_fails(exact: MixtureDenoiser, photographs: Tensor) -> None:
    check_denoiser(exact, photographs)

    class Identity(Denoiser):
        def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match=r"σ = 0\.0625 .*Usual causes.*range.*schedule.*raw weights"):
        check_denoiser(Identity(), photographs)


@pytest.mark.parametrize(
    "fault",
    [{"scale": 0.5, "shift": 0.5}, {"scale": 2.0, "shift": -1.0}, {"scale": float("nan")}],
    ids=["pixels where [-1, 1] is meant", "[-1, 1] twice", "nan"],
)
def test_a_wrong_range_fails(exact: MixtureDenoiser, photographs: Tensor, fault: dict[str, float]) -> None:
    with pytest.raises(InputError, match="doesn't denoise"):
        check_denoiser(Scaled(exact, **fault), photographs)


def test_a_wrong_prediction_type_fails(tmp_path: Path) -> None:
    """The packaged U-Net of the digits, which predicts the noise, said to predict the image."""
    from assay.defenses.checkpoints import load_packaged
    from assay.defenses.denoiser import small_unet

    packaged = UNetDenoiser(small_unet())
    load_packaged(packaged, "digits/denoiser.safetensors")
    write(tmp_path, packaged.network)
    x, _ = data.load("digits", data.train_split("digits")[:32])
    check_denoiser(take_denoiser(str(tmp_path), "digits"), x)
    edit(tmp_path / "scheduler_config.json", lambda config: config.update(prediction_type="sample"))
    with pytest.raises(InputError, match="prediction type"):
        take_denoiser(str(tmp_path), "digits")


def test_a_network_that_was_not_trained_fails(tmp_path: Path) -> None:
    write(tmp_path, unet(in_channels=1, out_channels=1))
    with pytest.raises(InputError, match="doesn't denoise"):
        take_denoiser(str(tmp_path), "digits")


def test_a_purifier_takes_no_other_channels_and_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "colour", unet())
    with pytest.raises(InputError, match="for images of 3 channels; those of digits have 1"):
        take_denoiser(str(tmp_path / "colour"), "digits")
    write(tmp_path / "classes", unet(in_channels=1, out_channels=1, num_class_embeds=10))
    with pytest.raises(InputError, match="takes class labels"):
        take_denoiser(str(tmp_path / "classes"), "digits")


def test_the_smoke_levels_lie_in_the_range() -> None:
    for low, high in ((0.0, 75 / 255 * 2), (0.002, 80.0), (0.3, 0.6), (2.0, 4.0), (0.0, float("inf"))):
        sigmas = smoke_sigmas(Denoiser(sigma_range=(low, high)))
        assert low <= min(sigmas)
        assert max(sigmas) <= high
        assert list(sigmas) == sorted(sigmas)


def test_psnr_of_known_noise() -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    assert psnr(x + 0.1, x) == pytest.approx(20)


# The real ones, on real photographs


@needs_denoisers
@pytest.mark.parametrize(
    ("file", "sigma", "expected"),
    [(FFDNET_FILE, 25 / 255, 29.0), (FDNCNN_FILE, 25 / 255, 29.1), (FDNCNN_FILE, 0.25, 24.2)],
)
def test_the_known_psnr_on_cifar10(file: Path, sigma: float, expected: float) -> None:
    images, _ = data.load("cifar10", data.board_ids("cifar10")[:128])
    noise = Noise.from_seed(0, len(images)).normal(shape=images.shape[1:], like=images)
    with torch.no_grad():
        clean = load_denoiser(str(file)).denoise(encode(images + sigma * noise), 2 * sigma)
    assert psnr((clean + 1) / 2, images) == pytest.approx(expected, abs=0.5)


@needs_denoisers
@pytest.mark.parametrize("file", [FFDNET_FILE, FDNCNN_FILE], ids=lambda file: file.name)
def test_the_real_denoisers_pass_the_smoke_test_and_fail_it_in_the_wrong_range(file: Path) -> None:
    denoiser = take_denoiser(str(file), "cifar10")
    images, _ = data.load("cifar10", range(8))
    check_denoiser(denoiser, images)
    for fault in ({"sigma": 3.0}, {"scale": 0.5, "shift": 0.5}, {"scale": 127.5, "shift": 127.5}):
        with pytest.raises(InputError, match="doesn't denoise"):
            check_denoiser(Scaled(denoiser, **fault), images)
