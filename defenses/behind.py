"""What stands behind a purifier: the data set's undefended classifier, another of the registry's, or a user's own.

The purifiers' option `classifier` names it. A purifier in front of a robust classifier is another
defense than in front of one that falls at once, and papers report both.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from assay.defense import DefenseSpec
from assay.defenses import adversarial_training, classifier, trades, undefended
from assay.defenses.undefended import Classifier
from assay.defenses.zoo import borrowed_files
from assay.errors import InputError, nearest
from assay.foreign import PACKAGES, code_file, is_code

_REGISTERED: dict[str, DefenseSpec] = {
    spec.card.name: spec for spec in (undefended.SPEC, adversarial_training.SPEC, adversarial_training.L2, trades.SPEC)
}
UNDERSTOOD = (
    f"{', '.join(_REGISTERED)}; PACKAGE:NAME of {', '.join(PACKAGES)} (robustbench:NAME@Linf where several threat "
    "models have the name); or module:object or path.py:object of a torch.nn.Module from images in [0, 1] to logits, "
    "or of what makes one"
)


def take_classifier(source: str, dataset: str, role: str = "classifier") -> nn.Module:
    """The classifier behind a purifier, images in [0, 1] to logits.

    Args:
        source: what `UNDERSTOOD` lists; empty for the undefended one. Code is executed: see `assay.foreign.OpenSpec`.
        dataset: whose images it is for.
        role: the option that names it.

    Raises:
        InputError: for a source that can't be used, or a network that doesn't recognise the data set's images.
    """
    if ":" in source:
        name, threat = _threat(source)
        network, _ = classifier.take_network(name, dataset, borrowing=threat)
        return network
    defense = _registered(source, dataset, role).load(dataset)
    assert isinstance(defense, Classifier)
    return defense.network


def behind_files(source: str, dataset: str, role: str = "classifier") -> dict[str, Path]:
    """The weight files that `take_classifier` reads, by name, and the file of a user's code.

    Raises:
        InputError: for a source that can't be used.
    """
    if ":" not in source:
        return dict(_registered(source, dataset, role).weight_files(dataset))
    if is_code(source):
        file = code_file(source)
        return {f"{role}/{file.name}": file} if file is not None else {}
    name, threat = _threat(source)
    package, _, model = name.partition(":")
    return borrowed_files(package, model, dataset, **threat)


def _registered(source: str, dataset: str, role: str) -> DefenseSpec:
    name = source or undefended.CARD.name
    if name not in _REGISTERED:
        raise InputError(f"no classifier {source!r}.{nearest(source, _REGISTERED)} Expected {UNDERSTOOD}.")
    spec = _REGISTERED[name]
    if dataset not in spec.card.datasets:
        known = ", ".join(spec.card.datasets)
        raise InputError(f"{name} has weights for {known}, not for {dataset!r}; give --option {role}=… another.")
    return spec


def _threat(source: str) -> tuple[str, dict[str, str]]:
    """A model of RobustBench without the threat model after its @, and that."""
    if not source.startswith("robustbench:"):
        return source, {}
    name, _, threat = source.partition("@")
    return name, {"threat": threat}
