"""docs/cifar10.md says of each row what its record says."""

from __future__ import annotations

from pathlib import Path

from assay.record import Record, read_record
from assay.results import Estimate

ROOT = Path(__file__).parents[1]
ATTACKS = {"APGD-CE": "apgd-ce", "AutoAttack": "autoattack", "BPDA": "bpda", "DiffHammer": "diffhammer",
           "through the chain": "through_chain", "first order": "first-order"}  # fmt: skip


def estimate(found: Estimate) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def shown() -> list[dict[str, str]]:
    """The rows of the page's tables, each with its table's headings."""
    rows: list[dict[str, str]] = []
    heading: list[str] = []
    for line in (ROOT / "docs" / "cifar10.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if cells and cells[0] == "row":
            heading = cells
        elif cells and heading:
            rows.append(dict(zip(heading, cells, strict=True)))
        elif not line.startswith("|"):
            heading = []
    return rows


def samples(record: Record) -> str:
    """Board and number of samples; the profile where it isn't `standard`."""
    profile = record.protocol.profile
    return f"{record.board.name}, {record.board.n}" + (f", {profile}" if profile != "standard" else "")


def expected(record: Record, headings: list[str]) -> dict[str, str]:
    results, cost = record.results, record.cost
    assert results is not None
    said = {
        "row": record.defense.title,
        "board, samples": samples(record),
        "clean": estimate(results.clean),
        "robust": estimate(results.robust),
        "verdict": record.verdict,
        "model calls": f"{cost.forward + cost.backward:,}",
        "minutes": f"{cost.seconds / 60:.1f}",
    }
    for heading, attack in ATTACKS.items():
        said[heading] = f"{100 * results.attacks[attack].value:.1f}" if attack in results.attacks else "–"
    for radius, found in record.certification.radii.items() if record.certification else ():
        assert found.attacked is not None
        said[f"r = {radius}"] = f"{100 * found.value:.1f} / {100 * found.attacked.value:.1f}"
    return {heading: said[heading] for heading in headings}


def test_the_tables_are_what_the_records_say() -> None:
    rows = shown()
    records = [
        read_record(file) for file in sorted((ROOT / "leaderboards" / "records").glob("cifar10-*/*/*/record.json"))
    ]
    assert len(rows) == len(records) > 0
    by_name = {(row["row"], row["board, samples"]): row for row in rows}
    for record in records:
        row = by_name[record.defense.title, samples(record)]
        assert row == expected(record, list(row))
