"""Attacks, one a file, each a pure function `attack(target, x, y, threat, noise, *, …) -> x_adv`.

Shared by the rest:

* `assay.attacks.losses`: what an attack increases: cross-entropy, margin, DLR, and targeted forms.
* `assay.attacks.eot`: which samples still stand, their best candidates, expectation over draws.
* `assay.attacks.ascent`: PGD or APGD on any differentiable forward pass, by name.

Black box:

* `assay.attacks.uniform`: points drawn uniformly in the ball.
* `assay.attacks.square`: random search with square-shaped changes.

White box:

* `assay.attacks.pgd`: projected gradient ascent.
* `assay.attacks.apgd`: Auto-PGD, with momentum and a step that halves itself.
* `assay.attacks.autoattack`: the reference suite, from its authors' package.

White box, through a defense's handles:

* `assay.attacks.bpda`: the real purifier forward, the identity backward.
* `assay.attacks.through_chain`: the exact gradient of an iterated defense; first-order and relaxed ones too.
* `assay.attacks.step_losses`: a loss at every step of an iterated defense, beside the classification loss.
* `assay.attacks.diffhammer`: the gradient of the draws that can be broken together.
* `assay.attacks.surrogate`: the gradient of the same process with fewer steps.
* `assay.attacks.transfer`: white box on another model, or on a defense's own parts.

An attack reports candidates; whether one counts is for the harness to decide. Importing this
package imports no torch.
"""
