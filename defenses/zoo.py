"""Models of packages that people have installed: RobustBench's zoo, timm, torchvision.

Each is loaded by its package's own loader, and its normalisation made part of the model. None of
the packages is needed otherwise, so each is imported only when one of its models is asked for.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from assay import data
from assay.card import Claim
from assay.defenses.classifier_sources import Preprocessed
from assay.errors import InputError, nearest

_THREATS = {"linf": "Linf", "l2": "L2"}
"""Norms as boards write them, to RobustBench's names of threat models."""
_URLS = {
    "robustbench": "https://robustbench.github.io",
    "timm": "https://github.com/huggingface/pytorch-image-models",
    "torchvision": "https://pytorch.org/vision",
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Borrowed:
    """A model of a package, with what is known of it.

    Attributes:
        network: images in [0, 1] to logits, preprocessing included.
        title, source, url, claims: as a card has them.
        choices: what the package decided, in words.
    """

    network: nn.Module
    title: str
    source: str
    url: str = ""
    claims: tuple[Claim, ...] = ()
    choices: tuple[str, ...] = field(default=())


def package_of(name: str) -> Any:
    """An installed package.

    Raises:
        InputError: for one that isn't, or can't be imported, with how to get it.
    """
    package = name.partition(".")[0]
    how = f"pip install {package}, or this project with its extra [{package}]"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise InputError(f"{package} is not installed: {how}.") from error
        raise InputError(f"{package} needs {error.name}, which is not installed: {how}.") from error
    # A build of torchvision for another torch says so with one of these.
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{package} can't be imported here ({type(error).__name__}: {reason}): {how}.") from error


def plain_network(package: str, name: str, n_classes: int) -> nn.Module:
    """An architecture of timm or torchvision without weights, for a number of classes.

    Raises:
        InputError: for an unknown name, or a package that has no architectures apart from their weights.
    """
    if package == "timm":
        timm = package_of("timm")
        with _asking(package, name):
            network: nn.Module = timm.create_model(name, pretrained=False, num_classes=n_classes)
        return network
    if package == "torchvision":
        models = package_of("torchvision.models")
        with _asking(package, name):
            made: nn.Module = models.get_model(name, weights=None, num_classes=n_classes)
        return made
    raise InputError(f"{package}'s models come with their weights; leave out the option weights for {name!r}.")


def borrow(package: str, name: str, dataset: str, **options: str) -> Borrowed:
    """A pretrained model.

    Args:
        package: robustbench, timm or torchvision.
        name: as that package calls it.
        dataset: RobustBench has other models for each.
        options: of `robustbench_model`.

    Raises:
        InputError: for a package that isn't installed, a name that it doesn't know, or one whose weights can't be had.
    """
    if package == "robustbench":
        return robustbench_model(name, dataset, **options)
    return timm_model(name, dataset) if package == "timm" else torchvision_model(name, dataset)


def borrowed_files(package: str, name: str, dataset: str, **options: str) -> dict[str, Path]:
    """The weight files behind a model that was loaded already, as far as the package says where they lie."""
    if package == "robustbench":
        found = _robustbench_files(name, dataset, **options)
    else:
        found = _timm_files(name) if package == "timm" else _torchvision_files(name)
    return {f"{package}/{file.name}": file for file in found if file.is_file()}


def robustbench_model(name: str, dataset: str, *, threat: str = "", norm: str = "", model_dir: str = "") -> Borrowed:
    """A model of RobustBench's zoo, whose models contain their own normalisation.

    Args:
        threat: `Linf`, `L2` or `corruptions`; empty for the only one with a model of the name, or the board's.
        norm: the board's.
        model_dir: where the package keeps its weights.

    Raises:
        InputError: see `borrow`.
    """
    utils = package_of("robustbench.utils")
    chosen = _threat_model(name, dataset, threat, norm)
    with _asking("robustbench", name):
        loaded = utils.load_model(
            model_name=name, model_dir=model_dir or "./models", dataset=dataset, threat_model=chosen
        )
    info = _info(name, dataset, chosen)
    claims = _claims(info, dataset, chosen)
    source = ", ".join(str(info[part]) for part in ("name", "authors", "venue") if info.get(part)) or "RobustBench"
    choices = [f"RobustBench's model for {dataset}, {chosen}"]
    choices += [str(info[part]) for part in ("architecture", "footnote") if info.get(part)]
    if info.get("unreliable"):
        choices.append("RobustBench marks its own robust accuracy of it as potentially unreliable")
    link = str(info.get("link", ""))
    url = link if link.startswith(("http://", "https://")) and " " not in link else _URLS["robustbench"]
    return Borrowed(loaded, f"{name} (RobustBench, {chosen})", source[:600], url, claims, tuple(choices))


def _threat_model(name: str, dataset: str, threat: str, norm: str) -> str:
    """The threat model under which RobustBench lists a model."""
    zoo: Mapping[Any, Mapping[Any, Mapping[str, Any]]] = package_of("robustbench.model_zoo").model_dicts
    lists = next((lists for known, lists in zoo.items() if str(getattr(known, "value", known)) == dataset), None)
    if lists is None:
        raise InputError(f"RobustBench has no models for {dataset!r}.")
    listed = {str(getattr(known, "value", known)): models for known, models in lists.items()}
    having = [each for each, models in listed.items() if name in models]
    if threat:
        if threat not in listed:
            raise InputError(
                f"option 'threat' takes a threat model of RobustBench, got {threat!r}.{nearest(threat, listed)}"
            )
        having = [each for each in having if each == threat]
    if not having:
        known = {model for each, models in listed.items() if threat in ("", each) for model in models}
        close = nearest(name, known) if len(known) <= 12 else nearest(name, known).partition(" Known:")[0]
        where = f"{dataset}, {threat}" if threat else dataset
        raise InputError(f"RobustBench has no model {name!r} for {where}.{close}")
    boards = _THREATS.get(norm, norm)
    if boards in having or len(having) == 1:
        return boards if boards in having else having[0]
    raise InputError(f"RobustBench has {name!r} for {', '.join(having)}; choose with --option threat={having[0]}.")


def _robustbench_files(name: str, dataset: str, *, threat: str = "", norm: str = "", model_dir: str = "") -> list[Path]:
    folder = Path(model_dir or "./models").expanduser() / dataset / _threat_model(name, dataset, threat, norm)
    # An ensemble has a file a member.
    members = sorted(path for path in folder.glob("*.pt") if path.name.startswith(f"{name}_m"))
    return [path for path in members if path.stem.removeprefix(f"{name}_m").isdigit()] or [folder / f"{name}.pt"]


def _info(name: str, dataset: str, threat: str) -> dict[str, Any]:
    """What RobustBench knows of a model; empty where it was installed without these files."""
    package = Path(str(package_of("robustbench").__file__)).parent
    for folder in (package, package.parent):
        path = folder / "model_info" / dataset / threat / f"{name}.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _claims(info: Mapping[str, Any], dataset: str, threat: str) -> tuple[Claim, ...]:
    """The accuracies that RobustBench states, in percent there."""
    norm = next((norm for norm, called in _THREATS.items() if called == threat), threat)
    eps = info.get("eps")
    attacked = f"{dataset} {norm}{f' {eps}' if eps else ''}"
    stated = (
        ("clean_acc", dataset, "none", "RobustBench"),
        ("autoattack_acc", attacked, "AutoAttack", "RobustBench"),
        ("external", attacked, "the strongest known", "RobustBench"),
        ("reported", attacked, "the paper's own", "RobustBench, from the paper"),
    )
    claims = []
    for key, against, attack, source in stated:
        try:
            value = float(info[key]) / 100
        except (KeyError, TypeError, ValueError):
            continue
        if 0 <= value <= 1:
            claims.append(Claim(value=value, threat=against, attack=attack, source=source))
    return tuple(claims)


def timm_model(name: str, dataset: str) -> Borrowed:
    """A pretrained model of timm, with the mean, std and size of its configuration.

    Raises:
        InputError: see `borrow`.
    """
    timm = package_of("timm")
    with _asking("timm", name):
        network = timm.create_model(name, pretrained=True)
    config: Mapping[str, Any] = network.pretrained_cfg
    side, source_side = int(tuple(config["input_size"])[-1]), data.describe(dataset).shape[-1]
    wrapped = Preprocessed(network, source_side, tuple(config["mean"]), tuple(config["std"]), side)
    source = ", ".join(str(config[part]) for part in ("origin_url", "paper_name", "hf_hub_id") if config.get(part))
    return Borrowed(wrapped, f"{name} (timm)", source or "timm", _URLS["timm"], choices=(_described(wrapped),))


def _timm_files(name: str) -> list[Path]:
    """The weights in the cache of the hub that timm loads from: by the model's own id, or its configuration's."""
    head, _, hub_id = name.partition(":")
    url = file = ""
    if head not in ("hf_hub", "hf-hub"):
        config = package_of("timm").get_pretrained_cfg(name)
        hub_id, url, file = (str(getattr(config, part, None) or "") for part in ("hf_hub_id", "url", "file"))
    if file:
        return [Path(file)]
    hub_id, _, revision = hub_id.partition("@")
    cached = [try_to_load_from_cache(hub_id, each, revision=revision or None) for each in _WEIGHTS] if hub_id else []
    found = [Path(path) for path in cached if isinstance(path, str)]
    return found[:1] or ([_downloaded(url)] if url else [])


def torchvision_model(name: str, dataset: str) -> Borrowed:
    """A model of torchvision with the default one of its weights, and their transforms' mean, std and size.

    Raises:
        InputError: see `borrow`.
    """
    models = package_of("torchvision.models")
    with _asking("torchvision", name):
        weights = models.get_model_weights(name).DEFAULT
        network = models.get_model(name, weights=weights)
        transforms = weights.transforms()
    side, source_side = int(transforms.crop_size[0]), data.describe(dataset).shape[-1]
    wrapped = Preprocessed(network, source_side, tuple(transforms.mean), tuple(transforms.std), side)
    recipe = str(weights.meta.get("recipe", ""))
    source = f"torchvision, {weights}"
    return Borrowed(
        wrapped, f"{name} (torchvision)", source, recipe or _URLS["torchvision"], choices=(_described(wrapped),)
    )


def _torchvision_files(name: str) -> list[Path]:
    return [_downloaded(str(package_of("torchvision.models").get_model_weights(name).DEFAULT.url))]


def _downloaded(url: str) -> Path:
    """Where torch keeps what it downloaded from an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.partition("?")[0].rpartition("/")[2]


def _described(network: Preprocessed) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in part.flatten().tolist()) for part in (network.mean, network.std))
    side = network.resize.side
    return f"preprocessing inside the model: images of {side}×{side} pixels, mean {mean}, std {std}"


@contextmanager
def _asking(package: str, name: str) -> Iterator[None]:
    """What a package's own loader raises, as an error that says what was asked of it."""
    try:
        yield
    except InputError:
        raise
    # The loaders' errors share no base class: unknown names, networks, old files.
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
        raise InputError(f"{package}:{name} could not be loaded ({type(error).__name__}: {reason}).") from error
