"""`step_count`: how often its networks run, against the card, and the same whether it is attacked or not.

A purifier of a hundred steps is costly to differentiate, and the easiest way to a good number is to attack a shorter
process than the one that answers; how much that flatters a purifier is in Lee & Kim 2023 (arXiv 2303.09051). Here
the network calls of a plain answer are counted and held against those of a draw, of a draw whose gradient is wanted,
and of the chain, and against the card.

Counted are the rows that pass each module with parameters, per image, and apart from modules the rows of convolutions
and affine maps, for networks that are used without being called. Fails where a module's count differs between the
four; an answer of several votes may share work between them, but not take less than a draw or more than all of them.
Fails too where a backward pass runs a network that the forward pass doesn't, or one again, but fewer than half as
often (checkpoints may spare some of the calls): then the gradient is another process's. And where the card declares
more calls than a draw makes and the surrogate handle, asked for so many steps, makes them: what answers is then a
shortened process that passes for the declared one.

Flags where `network_calls` lies outside every reading of the counts otherwise: what answers is also what is attacked,
so that no accuracy is wrong, only the cost on the card, or what it is read as. Also where the surrogate is no shorter
than the chain, or never runs a network that a draw does, and where the stages run one at another rate than a draw:
handles that serve some attacks beside others. A reading takes a called module as one network, or, where parts of it
are called more often than itself, adds its parts up; so a network of many layers has one, a purifier with its
classifier a few. `None` on the card is not read.

Costs, for `IMAGES` images, one answer with its votes, as many draws again, 3 draws, up to 2 of the surrogate, 1 of the
stages, and a gradient of the draw and of the chain.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from assay.chain import Chain
from assay.checks.counting import SLACK, Counts, count, hooked, readings
from assay.checks.subject import Subject
from assay.defense import Stages
from assay.errors import AssayError
from assay.finding import Finding, Status
from assay.noise import Noise
from assay.target import Forward

IMAGES = 4
"""Counts don't depend on the image but for adaptive processes."""


def check(subject: Subject) -> Finding:
    """Counts the networks' calls in each way of running the defense; see the module."""
    n = min(IMAGES, len(subject.x))
    x, noise, votes = subject.x[:n], subject.noise[:n], subject.votes
    target, defense = subject.target(), subject.defense
    folded = noise.draws(votes) if votes > 1 else noise
    repeated = x.repeat_interleave(votes, 0)

    def graph(x: Tensor, noise: Noise) -> Tensor:
        with torch.enable_grad():
            return defense.draw(x.detach().requires_grad_(), noise).detach()

    answered = count(defense, n, lambda: subject.answer(slice(0, n)))
    drawn = count(defense, n, lambda: target.draws(repeated, folded))
    plain = count(defense, n, lambda: target.draws(x, noise)) if votes > 1 else drawn
    once = {name: count / votes for name, count in drawn.items()}
    chain: Chain | None = target.handle("chain")() if "chain" in defense.card.handles else None
    ways = {
        "the answer": (_nearest(answered, once, drawn), answered),
        "a draw whose gradient is wanted": (plain, count(defense, n, lambda: target.draws(x, noise, forward=graph))),
    }
    if chain is not None:
        ways["the chain"] = (plain, count(defense, n, lambda: target.draws(x, noise, forward=chain)))
    data: dict[str, Any] = {"calls": _called(plain)}
    for name, (expected, got) in ways.items():
        other = _differing(expected, got)
        if other:
            now, then = got.get(other, 0.0), expected.get(other, 0.0)
            return Finding(
                check="step_count",
                value=now,
                threshold=then,
                status="fail",
                samples=tuple(subject.ids[:n]),
                message=(
                    f"Per image {name} runs {other} {now:g} times, plain draws {then:g} times: "
                    "what is attacked must be the process that answers."
                ),
                data=data,
            )
    low, high = readings(defense, plain)
    declared = defense.card.network_calls
    failed = _backwards(subject, x, noise, plain, chain) or _passed_off(subject, declared, high, x, noise)
    if failed:
        return Finding(
            check="step_count",
            value=high,
            threshold=None if declared is None else float(declared),
            status="fail",
            samples=tuple(subject.ids[:n]),
            message=failed,
            data=data,
        )
    problem = _against_card(declared, low, high)
    if chain is not None and not problem:
        problem = _shorter(subject, chain, plain, x, noise) or _declared_twice(chain, declared)
    problem = problem or _staged(subject, plain, x, noise)
    status: Status = "flag" if problem else "pass"
    return Finding(
        check="step_count",
        value=high,
        threshold=None if declared is None else float(declared),
        status=status,
        message=problem or "The networks run as often when attacked as when answering, and as often as the card says.",
        data={**data, "fewest": low, "most": high},
    )


def _nearest(counts: Counts, low: Counts, high: Counts) -> Counts:
    """The counts between two bounds that are nearest to these."""
    return {name: min(max(counts.get(name, 0.0), low[name]), high[name]) for name in high}


def _against_card(declared: int | None, low: float, high: float) -> str:
    # Nothing that could be counted: the parameters are used by hand, or are none of the defense's.
    if declared is None or not high:
        return ""
    if low - SLACK <= declared <= high + SLACK:
        return ""
    counted = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return (
        f"The card declares {declared} network calls a draw, counted are {counted}: correct network_calls, or find "
        "out which process runs."
    )


def _declared_twice(chain: Chain, declared: int | None) -> str:
    if declared is None or chain.network_calls in (0, declared):
        return ""
    return f"The card declares {declared} network calls a draw, the chain {chain.network_calls}: correct one of them."


def _backwards(subject: Subject, x: Tensor, noise: Noise, plain: Counts, chain: Chain | None) -> str:
    """What is wrong with the calls of a backward pass; a declared approximation may run what it likes."""
    if subject.defense.card.traits.non_differentiable:
        return ""
    target = subject.target()
    ways: dict[str, Forward] = {"draw": target.defense.draw}
    if chain is not None:
        ways["chain"] = chain
    mix = noise.child("step_count").normal("mix", shape=(target.n_classes,), like=x)

    for name, forward in ways.items():
        before: Counts = {}

        def told(x: Tensor, noise: Noise, forward: Forward = forward, before: Counts = before) -> Tensor:
            rows: defaultdict[str, float] = defaultdict(float)
            with hooked(target.defense, rows):
                answer = forward(x, noise)
            before.update({key: before.get(key, 0.0) + count for key, count in rows.items()})
            assert isinstance(answer, Tensor)
            return answer

        def both(told: Forward = told) -> None:
            target.gradient(x, (mix,), lambda logits, mix: (logits * mix).sum(1), noise, forward=told)

        whole = count(subject.defense, len(x), both)
        for key in sorted(whole, key=lambda key: key.count(".")):
            forwards = before.get(key, 0.0) / len(x)
            again = whole[key] - forwards
            # Operations apart from modules are not compared: a derivative of a convolution is made of convolutions.
            if not key.startswith("all ") and 1e-6 < again < 0.5 * forwards - 1e-6:
                return (
                    f"The {name}'s backward pass runs {key} {again:g} times an image, its forward pass {forwards:g} "
                    "times: differentiate the process that answers, or declare the trait non_differentiable."
                )
            if not key.startswith("all ") and again > 1e-6 and not plain.get(key):
                return (
                    f"The {name}'s backward pass runs {key}, which the forward pass doesn't: differentiate the "
                    "process that answers, or declare the trait non_differentiable."
                )
    return ""


def _passed_off(subject: Subject, declared: int | None, high: float, x: Tensor, noise: Noise) -> str:
    """Whether the process of the card is there, behind the surrogate handle, and a shorter one answers."""
    if declared is None or not high or declared <= high + SLACK or "surrogate" not in subject.defense.card.handles:
        return ""
    target = subject.target()
    try:
        longer: Chain = target.handle("surrogate")(declared)
        counted = count(subject.defense, len(x), lambda: target.draws(x, noise, forward=longer))
    except AssayError:  # it can't be had as long
        return ""
    most = readings(subject.defense, counted)[1]
    if most <= high + SLACK:
        return ""
    return (
        f"The card declares {declared} network calls a draw, a draw makes {high:g}, and the surrogate handle has "
        f"{most:g} where it is asked for as many steps: a shortened process answers in the declared one's name."
    )


def _staged(subject: Subject, plain: Counts, x: Tensor, noise: Noise) -> str:
    if "stages" not in subject.defense.card.handles:
        return ""
    target = subject.target()
    stages: Stages = target.handle("stages")()
    counted = count(
        subject.defense,
        len(x),
        lambda: target.draws(x, noise, forward=lambda x, noise: stages.classify(stages.purify(x, noise), noise)),
    )
    other = _differing(plain, counted)
    if not other:
        return ""
    return (
        f"Purifier and classifier of the stages handle run {other} {counted.get(other, 0.0):g} times an image, a draw "
        f"{plain.get(other, 0.0):g} times: attacks through the stages attack another process; let them be the draw's."
    )


def _shorter(subject: Subject, chain: Chain, plain: Counts, x: Tensor, noise: Noise) -> str:
    steps = max(1, len(chain) // 2)
    if "surrogate" not in subject.defense.card.handles or steps >= len(chain):
        return ""
    target = subject.target()
    surrogate: Chain = target.handle("surrogate")(steps)
    counted = count(subject.defense, len(x), lambda: target.draws(x, noise, forward=surrogate))
    if not any(plain.values()):
        return ""
    outermost = sorted(plain, key=lambda key: (key.startswith("all "), key.count("."), key))
    left_out = next((key for key in outermost if plain[key] and not counted.get(key)), "")
    if left_out:
        return (
            f"A surrogate of {steps} steps never runs {left_out}, which a draw runs {plain[left_out]:g} times an "
            "image: let it be the same process in fewer steps."
        )
    if sum(counted.values()) < sum(plain.values()):
        return ""
    return (
        f"A surrogate of {steps} steps runs the networks as often as the chain of {len(chain)}: attacks through it "
        "save nothing; let surrogate(steps) take at most that many steps."
    )


def _called(counts: Counts) -> Counts:
    """The counts of the outermost modules that are called, and of those below that are called at another rate."""
    kept: Counts = {}
    for name in sorted(counts):
        parents = [counts[key] for key in counts if name.startswith(f"{key}.")]
        if counts[name] and counts[name] not in parents:
            kept[name] = counts[name]
    return dict(list(kept.items())[:20])


def _differing(expected: Counts, got: Counts) -> str:
    """The name of what runs at another rate, the outermost first; empty where nothing does."""
    names = sorted({*expected, *got}, key=lambda name: (name.startswith("all "), name.count("."), name))
    # Counts are rows over images: exact but for their own division.
    return next((k for k in names if abs(expected.get(k, 0.0) - got.get(k, 0.0)) > 1e-6 * expected.get(k, 1.0)), "")
