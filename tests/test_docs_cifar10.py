"""docs/cifar10.md says of each row what its record says."""

from __future__ import annotations

from pathlib import Path

from assay.record import read_record
from assay.results import Estimate

ROOT = Path(__file__).parents[1]


def estimate(found: Estimate) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def test_the_table_is_what_the_records_say() -> None:
    lines = [line for line in (ROOT / "docs" / "cifar10.md").read_text().splitlines() if line.startswith("| `")]
    shown = {
        cells[0].strip("`"): cells[2:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    }
    files = sorted((ROOT / "leaderboards" / "records").glob("cifar10-*/*/standard/record.json"))
    assert len(files) == len(shown) > 0
    for file in files:
        record = read_record(file)
        results, cost = record.results, record.cost
        assert results is not None
        assert shown[record.defense.options["weights"]] == [
            f"{record.board.name}, {record.board.n}",
            estimate(results.clean),
            f"{100 * results.attacks['apgd-ce'].value:.1f}",
            f"{100 * results.attacks['autoattack'].value:.1f}",
            estimate(results.robust),
            record.verdict,
            f"{cost.forward + cost.backward:,}",
            f"{cost.seconds / 60:.1f}",
        ]
