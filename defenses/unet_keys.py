"""U-Nets of other code bases as diffusers' `UNet2DModel`: built as the shapes say, with the keys renamed.

Two families compute exactly what diffusers' U-Net can: the PyTorch ports of DDPM (Ho et al. 2020, arXiv 2006.11239;
keys `conv_in`, `temb.dense.0`, `down.0.block.0.norm1`, …), and guided-diffusion with its forerunner (Nichol and
Dhariwal 2021, arXiv 2102.09672; Dhariwal and Nichol 2021, arXiv 2105.05233; keys `input_blocks.0.0`, `time_embed.0`).
Differences are listed in the file's own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from assay.defenses.checkpoints import load_state
from assay.defenses.denoiser import UNetDenoiser
from assay.defenses.schedule import Schedule, linear_schedule, with_start
from assay.errors import InputError

PUBLISHED_256 = (256, 256, 512, 512, 1024, 1024)
"""The widths of `256x256_diffusion_uncond.pt`, whose heads (64 channels each) and schedule are known."""


class ForeignUNet(nn.Module):
    """A `UNet2DModel` whose state has another code base's keys.

    Args:
        network: the U-Net.
        foreign: one of its own keys -> the other code base's.
    """

    def __init__(self, network: UNet2DModel, foreign: Callable[[str], str]) -> None:
        super().__init__()
        self.network = network
        self.own = {foreign(key): key for key in network.state_dict()}

    # torch's own signature is an overload that names what is passed on here.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The U-Net's state under the foreign keys."""
        state = self.network.state_dict(*args, **kwargs)
        return {key: state[own] for key, own in self.own.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state with the foreign keys."""
        own = {self.own[key]: value for key, value in state_dict.items()}
        return self.network.load_state_dict(own, strict=strict, assign=assign)


def is_ddpm(state: Mapping[str, Any]) -> bool:
    """Whether a state has the keys of the DDPM ports."""
    return {"conv_in.weight", "temb.dense.0.weight"} <= state.keys()


def is_guided(state: Mapping[str, Any]) -> bool:
    """Whether a state has the keys of guided-diffusion."""
    return {"input_blocks.0.0.weight", "time_embed.0.weight"} <= state.keys()


def ddpm(state: Mapping[str, Tensor], origin: str) -> UNetDenoiser:
    """The denoiser in a DDPM port's averaged weights: it predicts ε on the linear schedule of T = 1000.

    Args:
        state: the file's tensors.
        origin: what errors call the file.

    Raises:
        InputError: for keys or shapes that don't fit the U-Net that the first ones describe.
    """
    levels = 1 + max((int(found[1]) for key in state if (found := re.match(r"down\.(\d+)\.", key))), default=-1)
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    network = _unet(
        origin,
        in_channels=_shape(state, "conv_in.weight", origin)[1],
        out_channels=_shape(state, "conv_out.weight", origin)[0],
        block_out_channels=[_shape(state, f"down.{level}.block.0.conv1.weight", origin)[0] for level in range(levels)],
        layers_per_block=sum(bool(re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", key)) for key in state),
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        add_attention="mid.attn_1.q.weight" in state,
        attention_head_dim=None,  # a single head
        # What the original does otherwise than diffusers' defaults.
        downsample_padding=0,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    # The attention's 1×1 convolutions are linear layers here.
    plain = {
        key: value.flatten(1) if re.search(r"\.(q|k|v|proj_out)\.weight$", key) and value.shape[2:] == (1, 1) else value
        for key, value in state.items()
    }
    load_state(ForeignUNet(network, lambda key: _ddpm_key(key, levels)), plain, origin)
    _check_outputs(network, origin, learned=False)
    return UNetDenoiser(network, linear_schedule())


def guided(state: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> UNetDenoiser:
    """The denoiser in a guided-diffusion or improved-diffusion file.

    The network is asked at times 0 … T−1 for T levels. `rescale_timesteps` turns them into 1000/T times as much; with
    the usual T = 1000 it changes nothing, so that either setting is right. A learned variance (twice the channels) is
    left out.

    Args:
        state: the file's tensors.
        config: what they don't say, under the names of that project's options: `num_heads` or `num_head_channels`,
            `use_new_attention_order`, `diffusion_steps`, `noise_schedule`, `rescale_timesteps`, `predict_xstart`. Not
            needed for `256x256_diffusion_uncond.pt`.
        origin: what errors call the file.

    Raises:
        InputError: for keys or shapes that don't fit, or where the tensors don't say how many heads there are.
    """
    # A decoder level ends with a layer that enlarges: a convolution, or a residual block that is not the first layer.
    enlarges = re.compile(r"output_blocks\.(\d+)\.(?:\d\.(conv)|[1-9]\.in_layers\.0)\.bias")
    ups = [found for key in state if (found := enlarges.fullmatch(key))]
    numbers = [int(found[1]) for key in state if (found := re.match(r"output_blocks\.(\d+)\.", key))]
    blocks = 1 + max(numbers, default=-1)
    per_level = 1 + min((int(found[1]) for found in ups), default=blocks - 1)
    levels = blocks // per_level if blocks else 0
    firsts = [1 + level * per_level for level in range(levels)]
    attends = [f"input_blocks.{first}.1.qkv.weight" in state for first in firsts]
    widths = [_shape(state, f"input_blocks.{first}.0.in_layers.2.weight", origin)[0] for first in firsts]
    resampled = "resnet" if any(found[2] is None for found in ups) else "conv"
    plain = "DownBlock2D", "UpBlock2D"
    if resampled == "resnet":
        plain = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    shift = _shape(state, "middle_block.0.emb_layers.1.weight", origin)[0]
    network = _unet(
        origin,
        in_channels=_shape(state, "input_blocks.0.0.weight", origin)[1],
        out_channels=_shape(state, "out.2.weight", origin)[0],
        block_out_channels=widths,
        layers_per_block=per_level - 1,
        down_block_types=["AttnDownBlock2D" if attend else plain[0] for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)],
        downsample_type=resampled,
        upsample_type=resampled,
        resnet_time_scale_shift="scale_shift" if widths and shift == 2 * widths[-1] else "default",
        attn_norm_num_groups=32,
        attention_head_dim=None,
        num_class_embeds=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
    )
    heads = _heads(config, tuple(widths), origin)
    split = _split_attention(state, heads, bool(config.get("use_new_attention_order", False)))
    load_state(ForeignUNet(network, lambda key: _guided_key(key, per_level, attends)), split, origin)
    _check_outputs(network, origin, learned=True)
    for layer in network.modules():
        if hasattr(layer, "to_q"):
            layer.heads = heads(layer.to_q.out_features)
    schedule = _guided_schedule(config, origin)
    if config.get("rescale_timesteps", False):
        network.time_proj.scale = 1000 / schedule.levels
    prediction = "sample" if config.get("predict_xstart", False) else "epsilon"
    return UNetDenoiser(network, schedule, prediction, network.config.num_class_embeds or 0)


def _shape(state: Mapping[str, Tensor], key: str, origin: str) -> tuple[int, ...]:
    if key not in state:
        raise InputError(f"{origin} has no {key}, so that its architecture can't be read off; is the file complete?")
    if state[key].ndim < 2:
        raise InputError(f"{origin} has {key} of shape {tuple(state[key].shape)}, expected that of a layer's weight.")
    return tuple(state[key].shape)


def _unet(origin: str, **config: Any) -> UNet2DModel:
    try:
        return UNet2DModel(**config)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{origin} describes a U-Net that can't be built: {error}.") from error


def _check_outputs(network: UNet2DModel, origin: str, learned: bool) -> None:
    inputs, outputs = network.config.in_channels, network.config.out_channels
    if outputs != inputs and not (learned and outputs == 2 * inputs):
        also = f" or, with a learned variance, {2 * inputs}" if learned else ""
        raise InputError(f"{origin} turns {inputs} channels into {outputs}, expected {inputs}{also}.")


_DDPM_PARTS = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _ddpm_key(key: str, levels: int) -> str:
    """`up_blocks.0.resnets.1.conv_shortcut.weight` -> `up.3.block.1.nin_shortcut.weight`, counted downwards."""
    for own, foreign in _DDPM_PARTS.items():
        key = key.replace(f".{own}.", f".{foreign}.")
    key = re.sub(r"^time_embedding\.linear_(\d)", lambda found: f"temb.dense.{int(found[1]) - 1}", key)
    key = re.sub(r"^mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = re.sub(r"^up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("down_blocks.", "down.")
    key = key.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
    key = key.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    return key.replace("conv_norm_out", "norm_out")


_GUIDED_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv[q]",
    "to_k": "qkv[k]",
    "to_v": "qkv[v]",
    "to_out.0": "proj_out",
}


def _guided_key(key: str, per_level: int, attends: list[bool]) -> str:
    """`up_blocks.1.attentions.0.to_q.weight` -> `output_blocks.3.1.qkv[q].weight` (the name of a third of that key)."""
    whole = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    stem, _, parameter = key.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{parameter}"
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnet|attention|down|up)\w*\.(\d+)\.(.+)", stem)
    assert found is not None, key
    side, kind, index, part = found[1], found[3], int(found[4]), found[5]
    part = _GUIDED_PARTS.get(part, part)
    if side is None:  # residual, attention, residual
        return f"middle_block.{2 * index if kind == 'resnet' else 1}.{part}.{parameter}"
    level = int(found[2])
    if side == "down":
        block = 1 + level * per_level + (per_level - 1 if kind == "down" else index)
        part = "op" if part == "conv" else part
        return f"input_blocks.{block}.{int(kind == 'attention')}.{part}.{parameter}"
    block = level * per_level + (per_level - 1 if kind == "up" else index)
    place = {"resnet": 0, "attention": 1, "up": 1 + attends[::-1][level]}[kind]
    return f"output_blocks.{block}.{place}.{part}.{parameter}"


def _heads(config: Mapping[str, Any], widths: tuple[int, ...], origin: str) -> Callable[[int], int]:
    """How many heads an attention layer of given channels has."""
    if int(config.get("num_head_channels", -1)) > 0:
        return lambda channels: max(1, channels // int(config["num_head_channels"]))
    if "num_heads" in config:
        return lambda channels: int(config["num_heads"])
    if widths == PUBLISHED_256:
        return lambda channels: channels // 64
    raise InputError(
        f"{origin} does not say how its attention is divided into heads; put a JSON of the same name beside it with "
        f"num_heads or num_head_channels, and diffusion_steps, noise_schedule and rescale_timesteps where they are "
        f"not 1000, linear and false."
    )


def _split_attention(state: Mapping[str, Tensor], heads: Callable[[int], int], grouped: bool) -> dict[str, Tensor]:
    """`qkv` as its three thirds: rows lie by head, then q, k, v, then channel; `grouped`: by q, k, v, head, channel."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, parameter = key.rpartition(".")
        value = value.squeeze(-1) if stem.endswith((".qkv", ".proj_out")) and value.ndim == 3 else value
        channels, rest = divmod(value.shape[0] if value.ndim else 0, 3)
        count = heads(channels) if stem.endswith(".qkv") and not rest else 0
        if not count or channels % count:
            split[key] = value
            continue
        thirds = value.unflatten(0, (3, -1) if grouped else (count, 3, -1))
        for name, third in zip("qkv", thirds.unbind(0 if grouped else 1), strict=True):
            split[f"{stem}[{name}].{parameter}"] = third if grouped else third.flatten(0, 1)
    return split


def _guided_schedule(config: Mapping[str, Any], origin: str) -> Schedule:
    levels, kind = int(config.get("diffusion_steps", 1000)), config.get("noise_schedule", "linear")
    if kind == "linear":
        scale = 1000 / levels
        scheduler = DDPMScheduler(levels, beta_start=scale * 1e-4, beta_end=scale * 0.02)
    elif kind == "cosine":
        scheduler = DDPMScheduler(levels, beta_schedule="squaredcos_cap_v2")
    else:
        raise InputError(f"{origin} has the noise_schedule {kind!r}, expected linear or cosine.")
    return Schedule(with_start(scheduler.alphas_cumprod))
