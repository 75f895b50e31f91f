"""A classifier that people have: any network of theirs, or a model of RobustBench, timm or torchvision, by options.

The network's preprocessing (resizing, normalisation) is made part of the model: images are in
[0, 1] here, and so are the attack's budget and gradient. Whoever brings a model has forgotten its
normalisation once, so it then has to show that it recognises images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from assay import data
from assay.card import Card
from assay.defense import DefenseSpec
from assay.defenses.classifier_sources import (
    Preprocessed,
    check_classifier,
    check_shape,
    load_file,
    read_normalisation,
)
from assay.defenses.undefended import Classifier
from assay.defenses.variants import with_files
from assay.defenses.zoo import Borrowed, borrow, borrowed_files, plain_network
from assay.errors import InputError
from assay.foreign import OpenSpec, code_file, is_code, make_module

CARD = Card(
    name="classifier",
    title="Classifier",
    summary="A network from outside, given by its options: what makes it, its weights, its normalisation.",
    network_calls=1,
    gradient_calls=1,
)
_EXPECTED = "module:object or path.py:object of a torch.nn.Module or of what makes one, timm:NAME or torchvision:NAME"


def take_network(
    architecture: str,
    dataset: str,
    *,
    weights: str = "",
    key: str = "",
    mean: str = "",
    std: str = "",
    resize: int = 0,
    smoke: bool = True,
    borrowing: Mapping[str, str] | None = None,
) -> tuple[nn.Module, Borrowed | None]:
    """A network from images in [0, 1] to logits, checked on a data set's images; of a package's model what is known.

    Executes the code that `architecture` names: see `assay.foreign.OpenSpec`.

    Args:
        architecture: `_EXPECTED`, or `robustbench:NAME`.
        dataset: whose images it is for.
        weights, key, mean, std, resize, smoke: see `load`.
        borrowing: options of `zoo.robustbench_model`.

    Raises:
        InputError: for any of these that can't be used.
    """
    package, _, name = architecture.partition(":")
    if not name:
        given = f"got {architecture!r}" if architecture else "none was given"
        raise InputError(f"a classifier needs --option architecture=…: {_EXPECTED}; {given}.")
    described = data.describe(dataset)
    means, stds = read_normalisation(mean, std, described.shape[0])
    borrowed: Borrowed | None = None
    if not is_code(architecture) and not weights:
        if means or resize or key:
            raise InputError(f"{architecture} has its own weights and preprocessing: leave out key, mean, std, resize.")
        borrowed = borrow(package, name, dataset, **(borrowing or {}))
        network = borrowed.network
    else:
        code = is_code(architecture)
        plain = (
            make_module(architecture, nn.Module, _EXPECTED)
            if code
            else plain_network(package, name, described.n_classes)
        )
        if weights:
            load_file(plain, Path(weights).expanduser(), key)
        elif key:
            raise InputError("key says where in a weight file the network lies; give weights too.")
        network = Preprocessed(plain, described.shape[-1], means, stds, resize)
    # In half precision an attack's steps would drown in rounding.
    network = network.float().eval().requires_grad_(False)
    check_shape(network, dataset, architecture)
    if smoke:
        check_classifier(network, dataset, architecture)
    return network, borrowed


def weight_files(dataset: str, *, architecture: str = "", weights: str = "") -> dict[str, Path]:
    """The weight file, and that of the code that makes the network; of a package's model what it has loaded."""
    files: dict[str, Path] = {}
    package, _, name = architecture.partition(":")
    code = code_file(architecture) if is_code(architecture) else None
    if code is not None:
        files[f"architecture/{code.name}"] = code
    if weights:
        path = Path(weights).expanduser()
        files[f"weights/{path.name}"] = path
    elif name and not is_code(architecture):
        files |= borrowed_files(package, name, dataset)
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise InputError(f"no file {missing[0]!r}.")
    return files


def load(
    dataset: str,
    *,
    architecture: str = "",
    weights: str = "",
    key: str = "",
    mean: str = "",
    std: str = "",
    resize: int = 0,
    smoke: bool = True,
    title: str = "",
    source: str = "",
) -> Classifier:
    """A classifier from outside.

    Args:
        dataset: whose images it is for; their number of classes has to be the network's.
        architecture: what makes the network: `module:object` or `path.py:object` (a `torch.nn.Module`, or a class or
            function that makes one without arguments), `timm:NAME` or `torchvision:NAME`. The last two without
            `weights` have their pretrained ones and their own preprocessing.
        weights: a safetensors or torch file; empty where the code loads its own.
        key: where in a torch file the network lies, such as `state_dict` or `state_dict.0`.
        mean, std: of the normalisation that the network was trained with, for images in [0, 1]: comma-separated, or
            `cifar10` or `imagenet`. Empty for none.
        resize: the side that images are resized to, such as 224; 0 leaves them as they are.
        smoke: check that it recognises images.
        title: what tables call it, at most 120 characters, in place of these options.
        source: the paper or origin, at most 600 characters.

    Raises:
        InputError: see `take_network`; for a title or a source that is too long.
    """
    for what, text, most in (("title", title, 120), ("source", source, 600)):
        if len(text) > most:
            raise InputError(f"the {what} has {len(text)} characters, expected at most {most}.")
    network, borrowed = take_network(
        architecture, dataset, weights=weights, key=key, mean=mean, std=std, resize=resize, smoke=smoke
    )
    card = _card(CARD, dataset, borrowed, weight_files(dataset, architecture=architecture, weights=weights))
    card = card.model_copy(update={"title": title or card.title, "source": source or card.source})
    return Classifier(card, network, data.describe(dataset).n_classes)


def _card(card: Card, dataset: str, borrowed: Borrowed | None, files: dict[str, Path]) -> Card:
    """The card of what was built."""
    card = with_files(card, files, datasets=(dataset,))
    if borrowed is None:
        return card
    known = {name: getattr(borrowed, name) for name in ("title", "source", "url", "claims", "choices")}
    # Titles and sources come from other people's files: validated, where `model_copy` would not.
    return Card.model_validate({**dict(card), **known, "title": borrowed.title[:120], "source": borrowed.source[:600]})


def named(package: str, name: str, norm: str) -> DefenseSpec:
    """The defense `PACKAGE:NAME`.

    Args:
        package: robustbench, timm or torchvision.
        name: as that package calls the model.
        norm: the board's.
    """
    architecture = f"{package}:{name}"
    card = CARD.model_copy(
        update={
            "name": re.sub(r"[^a-z0-9_./:-]", "-", architecture.lower())[:120],
            "title": f"{name} ({package})"[:120],
            "summary": f"{package}'s model {name}, with its own preprocessing and weights.",
        }
    )

    def zoo_files(dataset: str, *, threat: str = "", model_dir: str = "") -> dict[str, Path]:
        return borrowed_files(package, name, dataset, threat=threat, norm=norm, model_dir=model_dir)

    def from_zoo(dataset: str, *, threat: str = "", model_dir: str = "", smoke: bool = True) -> Classifier:
        borrowing = {"threat": threat, "norm": norm, "model_dir": model_dir}
        network, borrowed = take_network(architecture, dataset, smoke=smoke, borrowing=borrowing)
        built = _card(card, dataset, borrowed, zoo_files(dataset, threat=threat, model_dir=model_dir))
        return Classifier(built, network, data.describe(dataset).n_classes)

    def pretrained_files(dataset: str) -> dict[str, Path]:
        return borrowed_files(package, name, dataset)

    def pretrained(dataset: str, *, smoke: bool = True) -> Classifier:
        network, borrowed = take_network(architecture, dataset, smoke=smoke)
        built = _card(card, dataset, borrowed, pretrained_files(dataset))
        return Classifier(built, network, data.describe(dataset).n_classes)

    if package == "robustbench":
        return DefenseSpec(card, from_zoo, Path(__file__), zoo_files)
    return DefenseSpec(card, pretrained, Path(__file__), pretrained_files)


SPEC = OpenSpec(CARD, load, Path(__file__), weight_files, needs=("architecture",), code=("architecture",))
