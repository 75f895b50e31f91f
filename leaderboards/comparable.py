"""Which records may stand beside each other, and which of those may be ranked: the reasons where they may not."""

from __future__ import annotations

from assay.boards import Board
from assay.record import Record


def differences(record: Record, board: Board, digest: str, ids_sha256: str) -> tuple[str, ...]:
    """Why a record can't be compared with this board's rows, given the digest of as many of the board's ids."""
    ran, protocol = record.board, record.protocol
    reasons = []
    if (protocol.id, protocol.digest) != (board.protocol, digest):
        reasons.append(
            f"protocol {protocol.id} {protocol.profile} ({protocol.digest[:12]}), here {board.protocol} ({digest[:12]})"
        )
    if ran.name != board.name:
        reasons.append(f"run on board {ran.name}")
    if (ran.dataset, ran.revision) != (board.dataset, board.revision):
        reasons.append(f"data {ran.dataset} {ran.revision}, here {board.dataset} {board.revision}")
    if (ran.threat.norm, ran.threat.eps) != (board.norm, board.eps):
        reasons.append(f"threat {ran.threat.norm} {ran.threat.eps}, here {board.threat}")
    if ran.draws != board.draws:
        reasons.append(f"{ran.draws} draws a candidate, here {board.draws}")
    if ran.size != len(board.ids) or ran.ids_sha256 != ids_sha256:
        reasons.append(f"other samples ({ran.n} of {ran.size}, ids {ran.ids_sha256[:12]})")
    if record.certification is not None and set(record.certification.radii) != set(board.radii):
        radii, here = (", ".join(found) or "none" for found in (record.certification.radii, board.radii))
        reasons.append(f"certified radii {radii}, here {here}")
    return tuple(reasons)


def why_unranked(record: Record, board: Board) -> tuple[str, ...]:
    """Why a row isn't ranked; empty where it may be."""
    reasons = []
    if record.protocol.profile == "quick":
        reasons.append("the quick profile is never ranked")
    if record.board.n < record.board.size:
        reasons.append(f"{record.board.n} of the board's {record.board.size} samples")
    if record.verdict == "failed":
        checks = ", ".join(finding.check for finding in record.findings if finding.status == "fail")
        reasons.append(f"failed: {checks}" if checks else "failed")
    ran = record.results.attacks if record.results else {}
    absent = {name: "not in the record" for name in record.protocol.mandatory if name not in ran}
    if board.radii and record.defense.card.traits.certifies and record.certification is None:
        absent["certify"] = "not in the record"
    absent |= record.protocol.missing
    if record.results is None and record.certification is not None:
        reasons.append("the certified half alone, without any attack")
    elif record.results is None and record.verdict != "failed":
        reasons.append("nothing was measured")
    elif record.results is not None and absent:
        # What is missing for one reason is named together.
        together = {why: [name for name, reason in absent.items() if reason == why] for why in absent.values()}
        reasons += [f"missing {', '.join(names)}: {why}" for why, names in together.items()]
    if not reasons and not record.ranked:
        reasons.append(record.verdict)
    return tuple(reasons)
