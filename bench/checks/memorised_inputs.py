"""`memorised_inputs`: is the answer at a test image one that no image beside it gets?

A lookup of test images answers right exactly where accuracy is measured and nowhere an attack can begin. A model can't
do that: whatever it computes at x it nearly computes at x ± 1e-6. A quantiser can jump there, since pixels often lie on
its edges (multiples of 1/16 or 1/255 do); but it cuts space into pieces, of which x belongs to one, so that its
answer is shared by the images on one side of each edge. What gives a lookup away is therefore not that the
answer jumps, but that x stands alone: every way of moving it leads to another answer, and all of them to much the same.

Each image is moved in eight ways by at most s, for s of `SCALES`: all pixels up, all down, at random and the opposite,
each twice, with its noise kept. With d the smallest change of answers from x to a moved image and D the largest
among moved images, x stands alone where d > `LEAST` and d > `RATIO` · D. For a smooth function D is at least about d
(opposite moves), for a quantiser the moves up or those down change nothing, and for a function that is rough everywhere
D is large. The scales reach from one that only a comparison of bits can see to one that leaves the cell of an image
rounded to sixteenths. The same is measured around images 0.05 of noise away, which nobody has memorised: what stands
alone there is a property of the defense, and allowed for.

Flags: where more test images stand alone, at any scale, than the 99.9 % quantile of a binomial with the rate of the
images nearby; one is too many where none of those does. Costs 90 n draws; 9 n answers more where it votes, for a lookup
in front of the votes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from assay.bounds import wrong_at_most
from assay.checks.agreement import change
from assay.checks.subject import Subject
from assay.finding import Finding
from assay.noise import Noise

SCALES = (1e-6, 1e-4, 1e-3, 1e-2, 4e-2)
"""How far a pixel moves at most: to a few float32 roundings, and to more than half a sixteenth."""

LEAST = 1e-3
"""The smallest jump that counts, of a probability or a tenth of the logits' relative one: a thousand float32 roundings.
Logits are compared too, because a label that is looked up changes no probability of a confident network's."""

RATIO = 10.0
"""How many times farther than apart the moved images' answers must be. Of honest defenses the smallest ratio over
images is 0 to 1; a floor of every pixel at once, seen from its corner, could reach 4."""

NEAR = 0.05
"""Standard deviation of the noise that leads to images nobody has seen."""

VOTED = 1e-3
"""The scale at which the votes of a defense that votes are compared too."""

Answer = Callable[[Tensor, Noise], Tensor]


def check(subject: Subject) -> Finding:
    """Moves test images and images near them, and compares how often they stand alone; see the module's docstring."""
    target, noise = subject.target(), subject.noise
    near = (subject.x + NEAR * noise.child("near").normal(shape=subject.x.shape[1:], like=subject.x)).clamp(0, 1)

    def draw(x: Tensor, noise: Noise) -> Tensor:
        return target.draws(x, noise)[:, 0]

    at_test = torch.stack([alone(draw, subject.x, noise, scale) for scale in SCALES])
    at_near = torch.stack([alone(draw, near, noise, scale) for scale in SCALES])
    if subject.votes > 1:

        def vote(x: Tensor, noise: Noise) -> Tensor:
            return subject.answer(x=x, noise=noise)

        at_test = torch.cat([at_test, alone(vote, subject.x, noise, VOTED)[None]])
    standing, elsewhere = at_test.any(0), int(at_near.any(0).sum())
    n = len(standing)
    allowed = n if elsewhere == n else wrong_at_most(n, elsewhere / n) if elsewhere else 0
    found = int(standing.sum())
    flagged = found > allowed
    return Finding(
        check="memorised_inputs",
        value=float(found),
        threshold=float(allowed),
        status="flag" if flagged else "pass",
        samples=subject.ids_of(standing) if flagged else (),
        message=(
            f"The answers at {found} of {n} test images are shared by no image beside them, as those of a lookup would "
            f"be ({elsewhere} of {n} images nearby stand alone so). Remove whatever recognises test images: the "
            "accuracy is not the model's."
            if flagged
            else "Test images are answered as the images beside them."
        ),
        data={
            "scales": list(SCALES),
            "alone_at_test_images": [int(count) for count in at_test[: len(SCALES)].sum(1)],
            "alone_nearby": [int(count) for count in at_near.sum(1)],
        },
    )


def alone(answer: Answer, x: Tensor, noise: Noise, scale: float) -> Tensor:
    """`(n,)`: where every moved image has another answer than `x`, and they agree among themselves."""
    here = answer(x, noise)
    moved = [answer(image, noise) for image in _moves(x, noise.child("moves"), scale)]
    nearest = torch.stack([change(here, other) for other in moved]).amin(0)
    spread = torch.stack([change(a, b) for i, a in enumerate(moved) for b in moved[:i]]).amax(0)
    return (nearest > LEAST) & (nearest > RATIO * spread)


def _moves(x: Tensor, noise: Noise, scale: float) -> Iterator[Tensor]:
    """The eight images. Every pixel moves by between a half and the whole of `scale`, unless the box ends there."""

    def size(i: int) -> Tensor:
        return scale * (0.5 + 0.5 * noise.uniform("size", i, shape=x.shape[1:], like=x))

    for i in range(2):
        yield (x + size(i)).clamp(0, 1)
        yield (x - size(i)).clamp(0, 1)
        # At random, and the opposite.
        step = size(i) * (2.0 * noise.integers("sign", i, shape=x.shape[1:], high=2, like=x) - 1)
        yield (x + step).clamp(0, 1)
        yield (x - step).clamp(0, 1)
