"""assay: how much of a defense's claimed robustness is real.

The project in the order that makes it readable:

* `assay.threat`: what the attacker may do: a norm, an exact eps, the box [0, 1].
* `assay.norms`: the only code that knows what an Lp ball is.
* `assay.noise`: randomness as an argument; a stochastic defense is a function of `(x, noise)`.
* `assay.chain`: long differentiable processes with exact gradients in the memory of one step.
* `assay.card` and `assay.defense`: what an author declares, and the defense itself.
* `assay.attack` and `assay.target`: the signature of an attack, and the counting `Target` that it sees.
* `assay.certificate` and `assay.bounds`: what a certificate measures, and the radii that follow from its counts.
* `assay.boards`, `assay.rules` and `assay.protocol`: which samples, which threat, which attacks are mandatory.
* `assay.job`, `assay.shard` and `assay.harness`: run the protocol in shards, verify every candidate themselves.
* `assay.certifying` and `assay.certification`: the certified half of a shard, and of a record.
* `assay.record`, `assay.results` and `assay.rundir`: the validated result, and a run on disk.
* `assay.checks` and `assay.certificates`: one check a file, and one certificate, or two that share their counts.
* `assay.attacks`, `assay.defenses`, `assay.leaderboards`: three houses that know only the ground floor.

Importing this package imports no torch. Its functions for notebooks are imported when they are asked for:

    import assay
    record = assay.run("diffpure", board="digits-linf", profile="quick")
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.api import board, examples, load_defense, run
    from assay.record import read_record

__version__ = "0.1.0"
__all__ = ["__version__", "board", "examples", "load_defense", "read_record", "run"]

_LAZY = {
    **dict.fromkeys(("board", "examples", "load_defense", "run"), "assay.api"),
    "read_record": "assay.record",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
