"""EDM's networks (Karras et al. 2022, arXiv 2206.00364) from their tensors: a state dict, never its pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.defenses.checkpoints import load_state
from assay.defenses.denoiser import Denoiser
from assay.defenses.schedule import Sigma, column
from assay.defenses.song_unet import SongUNet
from assay.errors import InputError

PICKLED = (b"torch_utils.persistence", b"_reconstruct_persistent_obj")
"""What the bytes of its pickles hold: the function that executes the source code beside the weights."""


class EDMNetworkDenoiser(Denoiser):
    """EDM's preconditioning (Karras et al. 2022, table 1) around its own network, class-conditional or not.

    Args:
        network: called with `c_noise = ln(σ)/4`.
        sigma_data: σ_d.
    """

    def __init__(self, network: SongUNet, sigma_data: float = 0.5) -> None:
        super().__init__(sigma_range=(0.002, 80.0))
        self.network = network
        self.sigma_data = sigma_data
        self.n_classes = network.n_classes

    def denoise(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise`.

        Raises:
            InputError: where the network takes class labels.
        """
        if self.n_classes:
            raise InputError("this EDM network takes class labels: it predicts no image without one.")
        return self._denoise(x, sigma, None)

    def _denoise(self, x: Tensor, sigma: Sigma, labels: Tensor | None) -> Tensor:
        given = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scale = column(given, x)
        total = (scale**2 + self.sigma_data**2).sqrt()
        output: Tensor = self.network(x / total, given.log() / 4, labels)
        return (self.sigma_data / total) ** 2 * x + scale * self.sigma_data / total * output

    def denoise_each(self, x: Tensor, sigma: Sigma) -> Tensor:
        """See `Denoiser.denoise_each`; costs k network calls."""
        if not self.n_classes:
            return super().denoise_each(x, sigma)
        return self.denoise_some(x, sigma, torch.arange(self.n_classes, device=x.device).expand(len(x), -1))

    def denoise_some(self, x: Tensor, sigma: Sigma, classes: Tensor) -> Tensor:
        """See `Denoiser.denoise_some`; costs m network calls."""
        if not self.n_classes:
            return super().denoise_some(x, sigma, classes)
        m = classes.shape[1]
        given = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)).repeat_interleave(m)
        clean = self._denoise(x.repeat_interleave(m, 0), given, classes.reshape(-1))
        return clean.reshape(len(x), m, *x.shape[1:])


def is_pickle(content: bytes) -> bool:
    """Whether bytes are EDM's pickle, found without unpickling them."""
    return content[:1] == b"\x80" and any(name in content for name in PICKLED)


def conversion(origin: str) -> str:
    """Why the pickle is refused, and what to do instead."""
    return (
        f"{origin} is an EDM pickle: loading it executes source code that it carries, so it is not read. Where you "
        f"trust it, with EDM's repository on the path, run python -c \"import pickle, torch; "
        f"torch.save(pickle.load(open('{origin}', 'rb'))['ema'].state_dict(), 'weights.pt')\" and give weights.pt "
        f"(or the same tensors as safetensors). Its keys are model.enc.32x32_conv.weight, model.map_layer0.weight, …; "
        f"a weights.json beside it may say sigma_data and precond (by default 0.5 and EDMPrecond)."
    )


def is_edm(state: Mapping[str, Any]) -> bool:
    """Whether a state has the keys of EDM's networks."""
    return bool({"model.map_layer0.weight", "map_layer0.weight"} & state.keys())


def edm(state: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> EDMNetworkDenoiser:
    """The denoiser in the tensors of an EDM network.

    Args:
        state: `net.state_dict()`, or that of `net.model`.
        config: `sigma_data` (.5), `precond` (`EDMPrecond`).
        origin: what errors call the file.

    Raises:
        InputError: for another architecture or preconditioning, or keys and shapes that don't fit.
    """
    if config.get("precond", "EDMPrecond") not in ("EDMPrecond", "edm"):
        raise InputError(f"{origin} is preconditioned by {config['precond']}, expected EDMPrecond.")
    plain = {key.removeprefix("model."): value for key, value in state.items()}
    network = SongUNet(plain, origin=origin)
    load_state(network, plain, origin)
    return EDMNetworkDenoiser(network, float(config.get("sigma_data", 0.5)))
