"""Text and numbers for tables: other people's text made harmless, numbers made short."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from urllib.parse import quote, urlsplit

from assay.record import Certification, Record

_MARKED = {ord(sign): f"\\{sign}" for sign in "\\`*_[]<>|~&@#$"}
_WWW = re.compile(r"www\.", re.IGNORECASE)


class Plain(str):
    """Text that is Markdown already and isn't escaped again."""


def one_line(text: object) -> str:
    """Text on one line, without control characters or those that turn the reading direction."""
    plain = str(text)
    if plain.isprintable() and "  " not in plain:  # nearly all text: nothing to replace
        return plain
    collapsed = re.sub(r"\s+", " ", plain)
    return "".join(c for c in collapsed if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def markdown(text: object) -> Plain:
    """Text that GitHub Markdown shows as it is: no markup, link, mention, formula or table cell comes of it."""
    if isinstance(text, Plain):
        return text
    return Plain(_escaped(one_line(text)))


@lru_cache(maxsize=4096)
def _escaped(line: str) -> str:
    escaped = line.translate(_MARKED)
    # These two are how a bare address becomes a link.
    return _WWW.sub(r"www\\.", escaped.replace("://", r"\://"))


def web_address(url: str) -> str:
    """`url` where it is an http or https address with a host, otherwise empty."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return url if parts.scheme in ("http", "https") and parts.netloc else ""


def markdown_title(record: Record) -> Plain:
    """The defense's title, linked to its source where it has an address."""
    return markdown_link(record.defense.title, record.defense.card.url)


def markdown_link(text: str, url: str) -> Plain:
    """Text, linked where `url` is an http or https address."""
    # Percent-encoded, an address holds nothing that ends the link or the cell; `&` would begin an entity.
    target = quote(web_address(url), safe=":/?#@!&*+,;=%").replace("&", "&amp;")
    return Plain(f"[{markdown(text)}]({target})") if target else markdown(text)


def csv_text(text: object) -> str:
    """Text that a spreadsheet doesn't take for a formula."""
    line = one_line(text).strip()
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


def percent(value: float) -> str:
    """An accuracy in [0, 1] as percent with one decimal."""
    return f"{100 * value:.1f}"


def compact(count: int) -> str:
    """A count with three figures: 950, 12.3 k, 4.56 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,950 would round to 1000.0 k.
        if count >= size * 0.9995:
            scaled = count / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return str(count)


def flags(record: Record) -> list[str]:
    """The names of the checks that objected without failing the record, each once, in order."""
    return list(dict.fromkeys(finding.check for finding in record.findings if finding.status == "flag"))


def minutes(record: Record) -> str:
    """The run's wall time in minutes."""
    return f"{record.cost.seconds / 60:.1f}"


def thousands(value: float) -> str:
    """A whole number with commas: 20,000."""
    return f"{value:,.0f}"


def refuted(found: Certification) -> str:
    """Refuted samples at each radius, or 0 where there are none at any."""
    counts = [share.refuted for share in found.radii.values()]
    return ", ".join(map(str, counts)) if any(counts) else "0"
