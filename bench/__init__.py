"""assay: how much of a defense's claimed robustness is real.

The project in the order that makes it readable:

* `assay.threat`: what the attacker may do: a norm, an exact eps, the box [0, 1].
* `assay.norms`: the only code that knows what an Lp ball is.
* `assay.noise`: randomness as an argument; a stochastic defense is a function of `(x, noise)`.
* `assay.chain`: long differentiable processes with exact gradients in the memory of one step.
* `assay.card` and `assay.defense`: what an author declares, and the defense itself.
* `assay.attack` and `assay.target`: the signature of an attack, and the counting `Target` that it sees.
* `assay.board`, `assay.rules` and `assay.protocol`: which samples, which threat, which attacks are mandatory.
* `assay.harness`: runs the protocol in shards, verifies every candidate itself.
* `assay.record` and `assay.rundir`: the validated result, and a run on disk.
* `assay.attacks`, `assay.defenses`, `assay.leaderboards`: three houses that know only the ground floor.

Importing this package imports no torch.
"""

__version__ = "0.1.0"
