"""`modes`: nothing in training mode, and no state that a forward pass changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from assay.checks.subject import Subject
from assay.finding import Finding


def check(subject: Subject) -> Finding:
    """Looks for submodules in training mode, then compares parameters and buffers across a forward.

    A layer in training mode (dropout, batch statistics) or a state that moves with every call makes
    the defense another one at each evaluation. Fails for either. Costs n forward calls.
    """
    training = [name or "the defense itself" for name, module in subject.defense.named_modules() if module.training]
    if training:
        return Finding(
            check="modes",
            value=float(len(training)),
            threshold=0.0,
            status="fail",
            message=f"Modules in training mode: {', '.join(training[:5])}. Call eval() before handing it over.",
        )
    before = {name: tensor.clone() for name, tensor in _state(subject.defense).items()}
    subject.answer()
    after = _state(subject.defense)
    moved = [name for name, tensor in before.items() if name not in after or not torch.equal(tensor, after[name])]
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


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; unlike the state dict, with the buffers that are not saved."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
