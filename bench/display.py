"""What the command line shows, with rich: plans, progress, verdicts, rows. No decisions are made here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assay.certifying import CERTIFY
from assay.record import BUNDLE, COUNTS, RECORD, SAMPLES, Certification, Estimate, Record
from assay.results import knobs_text

if TYPE_CHECKING:
    from assay.attack import AttackSpec
    from assay.boards import Board
    from assay.certificate import Certificate
    from assay.certifying import PlannedCertificate
    from assay.defense import DefenseSpec
    from assay.finding import Finding
    from assay.prepare import Prepared

console = Console(highlight=False)
_COLOURS = {"verified": "green", "flagged": "yellow", "failed": "red", "incomplete": "magenta"}
_MEANING = {
    "verified": "every mandatory attack ran and no check objected",
    "flagged": "every mandatory attack ran, but a check objected; the findings below stand beside the row",
    "failed": "the defense breaks the rules; not ranked",
    "incomplete": "a mandatory part is missing; not ranked",
}


def default_folder(prepared: Prepared) -> Path:
    """`runs/BOARD/DEFENSE[+OPTIONS]-PROFILE[-nN][-sSEED]`, from the arguments that make runs differ."""
    job = prepared.job
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", prepared.name).strip("-.")
    parts = [name + prepared.defense_ref.variant, prepared.profile]
    if len(job.ids) != (prepared.protocol.samples[prepared.profile] or len(job.board.ids)):
        parts.append(f"n{len(job.ids)}")
    if job.seed:
        parts.append(f"s{job.seed}")
    if not job.scored:
        parts.append("certify")
    elif len(job.planned) < len(prepared.mandatory):
        parts.append("+".join(attack.name for attack in job.planned) or "none")
    return Path("runs") / job.board.name / "-".join(parts)


def percent(estimate: Estimate | None) -> tuple[str, str]:
    """An accuracy in percent and its interval, such as `61.0` and `[53.9, 67.8]`."""
    if estimate is None:
        return "-", ""
    return f"{100 * estimate.value:.1f}", f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3.5 min` or `2.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def registry(
    defenses: Sequence[DefenseSpec],
    attacks: Sequence[AttackSpec],
    certificates: Sequence[Certificate],
    boards: Sequence[Board],
) -> None:
    """Four tables: defenses, attacks, certificates, boards."""
    table = _listing("Defenses", "defense", "traits, handles, data sets", "summary")
    for spec in defenses:
        card = spec.card
        facts = [", ".join(card.traits.names()) or "deterministic"]
        if card.handles:
            facts.append(f"[dim]handles: {', '.join(card.handles)}[/]")
        if card.datasets:
            facts.append(f"[dim]data: {', '.join(card.datasets)}[/]")
        if card.certificate:
            facts.append(f"[dim]certificate: {card.certificate}[/]")
        if spec.options:
            facts.append(f"[dim]options: {', '.join(spec.options)}[/]")
        broken = "[red]Known broken: calibrates the board.[/] " if card.known_broken else ""
        table.add_row(card.name, "\n".join(facts), broken + escape(card.summary))
    console.print(table)
    table = _listing("Attacks", "attack", "needs", "summary")
    for attack in attacks:
        needs = "logits" if attack.black_box else ", ".join(("gradients", *attack.handles))
        table.add_row(attack.name, needs, escape(attack.summary))
    console.print(table)
    table = _listing("Certificates", "certificate", "summary", "source")
    for certificate in certificates:
        table.add_row(certificate.name, escape(certificate.summary), escape(certificate.source))
    console.print(table)
    table = _listing("Boards", "board", "data set", "samples", "threat", "certified radii", "protocol", "draws")
    for board in boards:
        table.add_row(
            board.name,
            board.dataset,
            str(len(board.ids)),
            str(board.threat),
            ", ".join(board.radii),
            board.protocol,
            str(board.draws),
        )
    console.print(table)


def _listing(title: str, name: str, *columns: str) -> Table:
    table = Table(title=f"[bold]{title}[/]", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(name, no_wrap=True, style="bold")
    for column in columns:
        table.add_column(column)
    return table


def plan(prepared: Prepared, seconds: Mapping[str, float], checks: Mapping[str, float]) -> None:
    """The mandatory attacks, why each is, what each costs at most; the checks and about what they cost."""
    job, n = prepared.job, len(prepared.job.ids)
    board = job.board
    card = job.defense.card
    title = (
        f"{escape(prepared.defense_ref.with_options(prepared.name))} on {board.name} "
        f"({board.threat}, {n} of {len(board.ids)} samples), "
        f"protocol {prepared.protocol.id}, {prepared.profile}"
    )
    console.print(f"[bold]{title}[/bold]")
    console.print(f"traits: {', '.join(card.traits.names()) or 'deterministic'}")
    examining = sum(checks.values())
    total = sum(seconds[stage] for stage in job.stages) * n + examining
    if job.certificate is not None:
        _planned_certificate(job.certificate, n, seconds)
    if job.scored:
        _planned_attacks(prepared, seconds, total)
        console.print("calls: forward and backward passes a sample, an upper bound.")
    before = f"{len(job.checks)} of the defense and its gradients"
    after = f", {len(job.health.rule.checks)} of the attacks once they have run" if job.health else ""
    console.print(f"checks: {before}{after}{f'; about {duration(examining)}' if total else ''}.")
    most = f"at most {duration(total)}" if total else "unknown, the defense fails"
    console.print(f"Estimated time: {most}.")


def _planned_certificate(planned: PlannedCertificate, n: int, seconds: Mapping[str, float]) -> None:
    """What is certified, how, and what that costs at most."""
    budget = planned.rule.budget
    knobs = escape(knobs_text(planned.knobs))
    at_most = duration(sum(seconds[stage] for stage in (CERTIFY, *planned.attacked)) * n)
    draws = f"at most {planned.most_draws:,} calls a sample"
    means = "deterministic" if planned.certificate.deterministic else f"{draws}, alpha = {budget.alpha:g}"
    attack = f", then {planned.attack.name} at each radius" if planned.attack else ""
    console.print(
        f"certificate: [bold]{escape(planned.name)}[/] ({knobs}) at l2 {', '.join(planned.radii)}: "
        f"{means}{attack}; at most {at_most}"
    )


def _planned_attacks(prepared: Prepared, seconds: Mapping[str, float], total: float) -> None:
    n = len(prepared.job.ids)
    table = Table(box=None, pad_edge=False)
    table.add_column("mandatory attack", no_wrap=True)
    table.add_column("asked for by", max_width=20)
    table.add_column("why")
    table.add_column("calls", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    for attack in prepared.mandatory:
        traits, reasons = zip(*(reason.split(": ", 1) for reason in attack.reasons), strict=True)
        asked = ", ".join(dict.fromkeys(trait for joined in traits for trait in joined.split("+")))
        # The first reason is what the attack is for, the last what the defense's traits made of it.
        why = escape("; ".join(dict.fromkeys((reasons[0], reasons[-1]))))
        if attack.name in prepared.missing:
            why = f"{why}\n[magenta]will not run: {escape(prepared.missing[attack.name])}[/]"
            table.add_row(attack.name, asked, why, "", "")
            continue
        bound = duration(seconds[attack.name] * n) if total else "?"
        table.add_row(attack.name, asked, why, f"{attack.forward + attack.backward:,}", bound)
    console.print(table)


def outcome(record: Record, folder: Path) -> None:
    """Verdict, findings, the row, and where the files are."""
    colour = _COLOURS[record.verdict]
    alone = record.results is None and record.certification is not None
    if not alone:
        console.print(f"\n[bold {colour}]{record.verdict}[/] - {_MEANING[record.verdict]}")
    for name, value in record.defense.options.items():
        console.print(f"  option {escape(name)}: {escape(value)}")
    for name, reason in record.protocol.missing.items() if not alone else ():
        console.print(f"  [magenta]missing[/] {name}: {escape(reason)}")
    for finding in record.findings:
        if finding.status != "pass":
            ids = f" (samples {', '.join(map(str, finding.samples[:8]))})" if finding.samples else ""
            console.print(
                f"  [{_COLOURS['failed']}]{finding.status}[/] {finding.check}: {escape(finding.message)}{ids}"
            )
    if record.results is not None:
        _numbers(record)
    if record.certification is not None:
        certified(record.defense.with_options(record.defense.name), record.certification, record.board.n)
    if alone:
        console.print("[dim]No attack ran: not a row. assay run makes one.[/dim]")
    elif not record.ranked:
        console.print(f"[dim]Not ranked: {', '.join(_why_unranked(record))}.[/dim]")
    files = [name for name in (RECORD, SAMPLES, BUNDLE, COUNTS) if (folder / name).is_file()]
    console.print(f"{folder}/: {', '.join(files)}", soft_wrap=True)


def findings(name: str, found: Sequence[Finding]) -> None:
    """What each check measured, against its threshold, and what to do."""
    table = Table(title=f"[bold]{escape(name)}[/], examined", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True, style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("measured", "threshold", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it means")
    for finding in found:
        numbers = ("" if value is None else f"{value:.3g}" for value in (finding.value, finding.threshold))
        colour = {"pass": "green", "flag": "yellow", "fail": "red"}[finding.status]
        ids = (
            f" (samples {', '.join(map(str, finding.samples[:8]))})"
            if finding.status != "pass" and finding.samples
            else ""
        )
        calls = f"{finding.forward + finding.backward:,}"
        table.add_row(finding.check, f"[{colour}]{finding.status}[/]", *numbers, calls, escape(finding.message) + ids)
    console.print(table)


def certified(name: str, found: Certification, n: int) -> None:
    """The certified shares, beside what an attack at each radius left of the same model."""
    title = f"{escape(name)}, certified by {escape(found.certificate)} ({escape(knobs_text(found.knobs))}), n = {n}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("l2 radius", "certified, 95 %", "99.9 % sure", *(("left by an attack",) if found.attack else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for radius, result in found.radii.items():
        refuted = f" [red]({result.refuted} refuted)[/]" if result.refuted else ""
        attacked = (" ".join(percent(result.attacked)),) if result.attacked else ()
        table.add_row(radius, " ".join(percent(result)), f"{result.confident} of {n}{refuted}", *attacked)
    console.print(table)
    console.print(
        f"class right without an attack: {found.right} of {n}, {found.abstained} of them without any radius; "
        f"average radius {found.average_radius:.3f}; {_certainty(found, n)}; {found.forward:,} calls, "
        f"{duration(found.seconds)}."
    )


def _certainty(found: Certification, n: int) -> str:
    if not found.budget.alpha:
        return "without chance: no certificate is wrong"
    return (
        f"{found.drawn / n:,.0f} draws a sample, each certificate wrong with probability {found.budget.alpha:g} at most"
    )


def _why_unranked(record: Record) -> list[str]:
    reasons = []
    if record.protocol.profile == "quick":
        reasons.append("the quick profile never is")
    if record.board.n < record.board.size:
        reasons.append(f"{record.board.n} of the board's {record.board.size} samples")
    if record.verdict in ("failed", "incomplete"):
        reasons.append(record.verdict)
    return reasons


def _numbers(record: Record) -> None:
    results = record.results
    assert results is not None
    threat = record.board.threat
    stochastic = record.defense.card.traits.stochastic
    named = escape(record.defense.with_options(record.defense.name))
    title = f"{named} on {record.board.name} ({threat.norm} {threat.eps}, n = {record.board.n})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("accuracy under", no_wrap=True)
    for heading in ("%", "95 %", "broken", "calls", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("clean", *percent(results.clean), "", "", "")
    for name, attack in results.attacks.items():
        calls = f"{attack.forward + attack.backward:,}"
        broken = f"{attack.broken} of {attack.attempted}"
        table.add_row(name, *percent(attack), broken, calls, duration(attack.seconds))
    table.add_section()
    total = f"{record.cost.forward + record.cost.backward:,}"
    table.add_row("robust", *percent(results.robust), "", total, duration(record.cost.seconds), style="bold")
    console.print(table)
    if record.cost.checks is not None:
        checks, whole = record.cost.checks, max(1, record.cost.forward + record.cost.backward)
        passed = sum(finding.status == "pass" for finding in record.findings)
        share = 100 * (checks.forward + checks.backward) / whole
        took = f"{share:.0f} % of the calls, {duration(checks.seconds)}"
        console.print(f"checks: {passed} of {len(record.findings)} passed; {took}.")
    if stochastic:
        rules = results.rules
        table = Table("decision rule", "clean", "random noise", "robust", box=None, pad_edge=False)
        names = {"expected": "expected", "worst_of_n": f"all {record.board.draws} draws right",
                 "majority": f"majority of {record.board.draws}"}  # fmt: skip
        for key, label in names.items():
            rule = getattr(rules, key)
            cells = (" ".join(percent(estimate)) for estimate in (rule.clean, rule.noise, rule))
            table.add_row(label, *cells)
        console.print(table)
