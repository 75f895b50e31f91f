"""Checks, one a file, each returns a finding: of a defense before hours are spent on it, of its attacks afterwards.

`PREFLIGHT` and `GRADIENTS` name those of the form `check(subject)`, `HEALTH` those of the form `check(evidence)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from assay.checks import (
    attack_awareness,
    batch_independence,
    black_box_beats_white_box,
    chain_exact,
    constancy,
    converged,
    declared_traits,
    eot,
    eps_curve,
    finite_difference,
    honest_randomness,
    input_mutation,
    interface,
    memorised_inputs,
    modes,
    range,
    replay,
    saturation,
    single_step_beats_iterative,
    step_count,
    unbounded,
    zero_gradients,
)
from assay.checks.evidence import Evidence
from assay.checks.subject import Subject
from assay.finding import Finding

__all__ = [
    "GRADIENTS",
    "HEALTH",
    "PREFLIGHT",
    "SAMPLES",
    "Check",
    "Evidence",
    "Subject",
    "broken_run",
    "examine",
    "preflight",
    "run_checks",
]

Check = Callable[[Subject], Finding]
SAMPLES = 16
"""Images that a defense is examined on before it is attacked."""

PREFLIGHT: Mapping[str, Check] = {
    "interface": interface.check,
    "modes": modes.check,
    "honest_randomness": honest_randomness.check,
    "batch_independence": batch_independence.check,
    "range": range.check,
    "attack_awareness": attack_awareness.check,
    "input_mutation": input_mutation.check,
    "memorised_inputs": memorised_inputs.check,
    "declared_traits": declared_traits.check,
    "constancy": constancy.check,
}
"""In the order in which they run: a defense that fails `interface` can't be measured further."""


GRADIENTS: Mapping[str, Check] = {
    "finite_difference": finite_difference.check,
    "chain_exact": chain_exact.check,
    "replay": replay.check,
    "step_count": step_count.check,
    "zero_gradients": zero_gradients.check,
    "eot": eot.check,
    "saturation": saturation.check,
}
"""What is measured of a defense's gradients, before an attack relies on them."""


HEALTH: Mapping[str, Callable[[Evidence], Finding]] = {
    "unbounded": unbounded.check,
    "eps_curve": eps_curve.check,
    "converged": converged.check,
    "single_step_beats_iterative": single_step_beats_iterative.check,
    "black_box_beats_white_box": black_box_beats_white_box.check,
}
"""What is asked of the attacks once they have run. Beside them stand `ablations`, `binarization` and `calibration`."""


def preflight(subject: Subject, names: Iterable[str]) -> Sequence[Finding]:
    """Runs the named checks of a protocol; see `run_checks`."""
    return list(run_checks(subject, names))


def run_checks(subject: Subject, names: Iterable[str]) -> Iterator[Finding]:
    """Runs the named checks in the order of `PREFLIGHT` and `GRADIENTS`, stopping after a failed `interface`."""
    wanted = set(names)
    for name, check in {**PREFLIGHT, **GRADIENTS}.items():
        if name in wanted:
            finding = examine(name, subject, partial(check, subject))
            yield finding
            if name == "interface" and finding.status == "fail":
                return


def examine(
    name: str, subject: Subject, measure: Callable[[], Finding], blamed: type[Exception] = Exception
) -> Finding:
    """One measurement with its cost in calls; whatever is raised meanwhile becomes a failed finding.

    Args:
        blamed: what counts as raised by the defense; anything else is an error of the run, and says so.

    Raises:
        MemoryError, torch.OutOfMemoryError: for they say nothing of the defense, and may not come again.
    """
    before = subject.calls
    try:
        finding = measure()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Whatever a defense raises once `interface` has passed is as much a finding as what it answers.
    except blamed as error:
        message = f"The defense raised {type(error).__name__} while it was examined: {error}"
        finding = Finding(check=name, status="fail", samples=tuple(subject.ids), message=message)
    except Exception as error:
        finding = broken_run(name, error)
    finally:
        # What a defense changed in this process shall not meet the next check, nor the run.
        subject.ambient.restore()
    forward, backward = (now - then for now, then in zip(subject.calls, before, strict=True))
    return finding.model_copy(update={"forward": forward, "backward": backward})


def broken_run(name: str, error: Exception) -> Finding:
    """The finding of a check that could not be made, for no fault of the defense."""
    message = (
        f"An error of the run: {name} could not be measured, {type(error).__name__}: {error}. Repair the attack or the "
        "check, then measure the defense again."
    )
    return Finding(check=name, status="fail", message=message)
