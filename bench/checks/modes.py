"""`modes`: nothing in training mode, and no state, its own or the process's, that a call changes."""

from __future__ import annotations

from torch import Tensor, nn

from assay.checks.ambient import generators
from assay.checks.subject import Subject
from assay.finding import Finding


def check(subject: Subject) -> Finding:
    """Looks for submodules in training mode, and compares parameters and buffers across a forward and a gradient.

    A layer in training mode (dropout, batch statistics) or a state that moves with every call makes
    the defense another one at each evaluation. Settings of the process (the default dtype, autocast, hooks on every
    module, functions that were replaced) and global generators belong to the attack as much as to the defense: they
    are put back. Fails for any of these. Costs 2n forward and n backward calls.
    """
    if training := _training(subject.defense):
        return _in_training(training)
    frozen = _requiring(subject.defense)
    before = {name: tensor.clone() for name, tensor in _state(subject.defense).items()}
    subject.answer()
    drawn = generators()
    subject.gradient()
    if moved := [name for name, state in generators().items() if state != drawn[name]]:
        return _changed([f"{name}'s global generator, where gradients are enabled" for name in moved])
    if training := _training(subject.defense):
        return _in_training(training)
    after = _state(subject.defense)
    moved = [name for name, tensor in before.items() if name not in after or not _equal(tensor, after[name])]
    moved += sorted(_requiring(subject.defense) ^ frozen)
    if settings := subject.ambient.changed():
        subject.ambient.restore()
        return _changed(settings)
    return Finding(
        check="modes",
        value=float(len(moved)),
        threshold=0.0,
        status="fail" if moved else "pass",
        message=(
            f"A forward pass changes {', '.join(moved[:5])}: a defense must answer the same whatever it saw before."
            if moved
            else "Evaluation mode throughout; a forward pass changes no parameter or buffer."
        ),
    )


def _training(defense: nn.Module) -> list[str]:
    return [name or "the defense itself" for name, module in defense.named_modules() if module.training]


def _in_training(names: list[str]) -> Finding:
    return Finding(
        check="modes",
        value=float(len(names)),
        threshold=0.0,
        status="fail",
        message=f"Modules in training mode: {', '.join(names[:5])}. Call eval() before handing it over.",
    )


def _changed(names: list[str]) -> Finding:
    return Finding(
        check="modes",
        value=float(len(names)),
        threshold=0.0,
        status="fail",
        message=(
            f"A call changes what others in the process rely on: {', '.join(names[:5])}. Set it inside a context that "
            "ends with the call, or not at all."
        ),
    )


def _requiring(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; a NaN that stays is no change."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; unlike the state dict, with the buffers that are not saved."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
