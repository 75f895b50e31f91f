"""The static site from synthetic records: escaping, its policy, links, what it may overwrite, and pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup, escape
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from assay import cli_site
from assay.errors import InputError, IntegrityError
from assay.finding import Finding
from assay.leaderboards import site
from assay.leaderboards.site import MARKER, render_site, write_site
from assay.leaderboards.site_text import environment
from assay.leaderboards.text import one_line
from assay.pictures import MOST, PICTURES, Pictures, choose, of_bundle, read_pictures, write_pictures
from assay.protocol import PROTOCOLS
from assay.record import BUNDLE, RECORD, SAMPLES, Record, read_record, write_record

zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))
VOID = ("meta", "link", "br", "img", "input", "wbr", "rect", "path", "circle")
NASTY = "<script>alert(1)</script>\"'>&lt;{{ 7*7 }}\u202ecod\n</title>"
EOT = Finding(check="eot", value=0.9, threshold=0.5, status="pass", message="Gradients agree.",
              data={"draws": [1, 4, 16], "cosine": [0.5, 0.7, 0.9], "clipped": [0.5, 0.8, 0.95]})  # fmt: skip
EPS = Finding(check="eps_curve", value=0.0, status="pass", message="Never rises.",
              data={"eps": ["0", "1/10", "2/5"], "accuracy": [1.0, 0.6, 0.0]})  # fmt: skip
TRAITS = Finding(check="declared_traits", status="pass", message="As declared.",
                 data={"stochastic": {"declared": False, "measured": "no", "value": 0.0}})  # fmt: skip

TEMPLATE = environment().from_string(
    "{% macro m(text) %}[{{ text }}]{% endmacro %}{{ value }}|{{ m(value) }}|{{ value ~ ', b' }}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A leaderboards folder with one board and no records."""
    monkeypatch.setitem(PROTOCOLS, "test.1", zoo.PROTOCOL)  # type: ignore[misc]
    (tmp_path / "boards").mkdir()
    (tmp_path / "records").mkdir()
    zoo.write_board(tmp_path)
    return tmp_path


@pytest.fixture
def full(folder: Path) -> Path:
    """The same with one record of each kind, on a second board with certificates too."""
    zoo.write_all(folder)
    zoo.write_certified(folder)
    return folder


@given(st.one_of(st.text(), st.text(alphabet="<>&\"' ab\n\u202e"), st.integers(), st.floats(), st.builds(Markup)))
def test_whatever_a_template_shows_is_escaped_once(value: object) -> None:
    """Against markupsafe's own escaping, in text, in a macro's argument, and joined to text."""
    shown = value if isinstance(value, Markup) else escape(one_line(value))
    text = TEMPLATE.render(value=value)
    assert text == f"{shown}|[{shown}]|{shown}, b"


class Page(HTMLParser):
    """A page's elements with their attributes, their styles and scripts, and whether all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"style": [], "script": []}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (self._open and self._open[-1] == "svg"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.inline:
            self.inline[self._open[-1]].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(rendered: dict[str, bytes]) -> dict[str, Page]:
    return {name: Page(content.decode()) for name, content in rendered.items()}


def sealed_again(target: Path, **changes: Any) -> Record:
    """The record in a folder, changed and sealed anew."""
    record = read_record(target).model_copy(update=changes).sealed(None)
    write_record(record, target / RECORD)
    return record


def with_bundle(folder: Path, dataset: str = "digits") -> tuple[Path, Record, Pictures]:
    """A record whose bundle lies around the images of its samples; `Pictures` of eight held and eight fallen ones."""
    from sklearn.datasets import load_digits

    target = zoo.write(folder, "pictured", 0.5)
    clean = (load_digits().images[list(zoo.IDS)][:, None] / 16).astype(np.float32)
    attacked = np.clip(clean + 0.19 * np.sign(0.5 - clean), 0, 1).astype(np.float32)
    save_file({"id": np.array(zoo.IDS, np.int64), "x_adv": attacked}, target / BUNDLE)
    frame = __import__("pandas").read_parquet(target / SAMPLES)
    frame["clean"] = 1.0
    frame.to_parquet(target / SAMPLES, index=False)
    digest = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in (SAMPLES, BUNDLE)}
    record = sealed_again(target, files=digest)
    final = frame[frame["attack"] == "final"]
    held, fallen = choose(final["id"].tolist(), final["clean"].tolist(), final["expected"].tolist())
    found = of_bundle(target, record, held, fallen)
    assert found is not None
    return target, record, found


def test_every_page_is_whole_and_every_link_inside_leads_somewhere(full: Path) -> None:
    rendered = render_site(full)
    pages = parsed(rendered)
    assert {"index.html", "defenses/index.html", "boards/board.html", "boards/balls.html"} < set(pages)
    records = list((full / "records").rglob(RECORD))
    assert len([name for name in pages if name.startswith("records/")]) == len(records)
    for name, page in pages.items():
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), name
        for attributes in page.all("a"):
            parts = urlsplit(attributes["href"] or "")
            if parts.scheme:
                assert parts.scheme in ("http", "https")
                assert {"noopener", "noreferrer", "nofollow"} == set((attributes["rel"] or "").split())
            elif parts.path:
                target = (Path("/") / name).parent / unquote(parts.path)
                assert Path(target).resolve().relative_to("/").as_posix() in pages, (name, attributes)
            else:
                assert parts.fragment in ids, (name, attributes)
        for attributes in (attributes for _, attributes in page.elements if "aria-labelledby" in attributes):
            assert attributes["aria-labelledby"] in ids, (name, attributes)


def test_no_page_asks_anything_of_anybody(full: Path) -> None:
    with_bundle(full)
    for name, page in parsed(render_site(full)).items():
        for tag, attributes in page.elements:
            assert not {"style", "srcset", "background", "action", "ping"} & set(attributes), (name, tag)
            assert not any(key.startswith("on") for key in attributes), (name, tag)
            assert (attributes.get("src") or "data:").startswith("data:"), (name, tag)
            assert tag not in ("iframe", "object", "embed", "base"), (name, tag)
            if tag == "link":
                assert attributes["href"] == "data:,"
        assert "@import" not in "".join(page.inline["style"])
        assert "url(" not in "".join(page.inline["style"])


def test_the_policy_allows_what_the_page_carries_and_nothing_else(full: Path) -> None:
    for name, page in parsed(render_site(full)).items():
        policy = next(m["content"] or "" for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
        rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))

        def digests(kind: str, page: Page = page) -> str:
            made = (hashlib.sha256(text.encode()).digest() for text in page.inline[kind])
            return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in made) or "'none'"

        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["style-src"] == digests("style")
        assert rules["script-src"] == digests("script")
        assert rules["img-src"] == "data:"
        assert bool(page.inline["script"]) == name.startswith("boards/"), name


def test_the_same_folder_gives_the_same_bytes(full: Path) -> None:
    assert render_site(full) == render_site(full)


def test_other_peoples_text_is_text(folder: Path) -> None:
    flag = Finding(check=NASTY, status="flag", message=NASTY, value=1.0)
    claim = {"value": 0.5, "threat": NASTY, "attack": NASTY, "source": NASTY}
    target = zoo.write(
        folder, "nasty", 0.5, verdict="flagged", findings=(flag,), title=NASTY, summary=NASTY, source=NASTY,
        url="https://example.org/<script>alert(2)</script>\"'", choices=(NASTY,), claims=(claim,),
        weights={NASTY: NASTY},
    )  # fmt: skip
    record = read_record(target)
    assert record.results is not None
    attacks = {
        (NASTY if name == "square" else name): found.model_copy(update={"reasons": (NASTY,), "options": {NASTY: NASTY}})
        for name, found in record.results.attacks.items()
    }
    sealed_again(
        target,
        results=record.results.model_copy(update={"attacks": attacks}),
        defense=record.defense.model_copy(
            update={"name": NASTY, "options": {NASTY: NASTY}, "weights": {NASTY: NASTY}, "source_sha256": NASTY}
        ),
        protocol=record.protocol.model_copy(update={"missing": {NASTY: NASTY}}),
        provenance=record.provenance.model_copy(
            update={"platform": NASTY, "commit": NASTY, "packages": {NASTY: NASTY}, "device": NASTY, "started": NASTY}
        ),
    )
    rendered = render_site(folder)
    for name, page in parsed(rendered).items():
        assert len(page.all("script")) == name.startswith("boards/"), name
        assert len(page.all("title")) >= 1
        assert "\u202e" not in rendered[name].decode()
        assert b"<script>alert" not in rendered[name]
    shown = rendered["records/board/nasty.html"].decode()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "{{ 7*7 }}" in shown


def test_a_name_can_neither_climb_nor_take_anothers_page(folder: Path) -> None:
    long = "a" * 110
    for name in ("a/b", "a--b", "index", long, long + "b"):
        zoo.write(folder, name, 0.5)
    pages = render_site(folder)
    assert len([name for name in pages if name.startswith("records/")]) == 5
    assert len([name for name in pages if name.startswith("defenses/")]) == 6
    assert all(re.fullmatch(r"[a-z]+(/[A-Za-z0-9_.=+-]+)+\.html|index\.html", name) for name in pages)
    assert len({name.casefold() for name in pages}) == len(pages)


def test_a_defense_page_gathers_its_records_and_what_was_measured_of_it(folder: Path) -> None:
    zoo.write_board(folder, "balls", radii=zoo.RADII)
    zoo.write(folder, "twice", 0.8, findings=(TRAITS, EOT, zoo.FLAG), verdict="flagged", title="Twice")
    zoo.write(folder, "twice", 0.7, on="balls", title="Twice")
    text = render_site(folder)["defenses/twice.html"].decode()
    assert "../records/board/twice.html" in text
    assert "../records/balls/twice.html" in text
    assert "Square broke 3 more." in text
    assert (
        "Agreement of gradients by the number of draws; over 16 draws: plain average 0.90, longest clipped 0.95."
        in text
    )
    assert re.search(r"stochastic</th><td>[^<]*</td><td>no</td><td>no</td>", text)
    assert "says something else" not in text


def test_a_record_page_shows_the_curves_of_its_findings(folder: Path) -> None:
    zoo.write(folder, "curved", 0.8, findings=(EOT, EPS))
    zoo.write(folder, "plain", 0.7)
    pages = render_site(folder)
    assert b"Accuracy against" in pages["records/board/curved.html"]
    assert b"Convergence over draws" in pages["records/board/curved.html"]
    assert b"Accuracy against" in pages["boards/board.html"]
    assert b"Accuracy against" not in pages["records/board/plain.html"]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"eps": ["0", "1/5"], "accuracy": [1.0]},
        {"eps": ["0", "1/0"], "accuracy": [1.0, 0.5]},
        {"eps": ["0", "x"], "accuracy": [1.0, 0.5]},
        {"eps": "01", "accuracy": [1.0, 0.5]},
        {"eps": [True, "1/5"], "accuracy": [1.0, 0.5]},
    ],
)
def test_a_curve_that_is_none_is_left_out(folder: Path, data: dict[str, Any]) -> None:
    zoo.write(folder, "odd", 0.8, findings=(EPS.model_copy(update={"data": data}),))
    assert b"Accuracy against" not in render_site(folder)["records/board/odd.html"]


def test_a_long_board_comes_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.write_all(folder)
    monkeypatch.setattr(site, "ROWS", 3)
    pages = render_site(folder)
    parts = [pages[f"boards/board{suffix}.html"].decode() for suffix in ("", "+2", "+3")]
    rows = [re.findall(r"aria-label=\"record of ([^\"]+)\"", text) for text in parts]
    # Best first: three of seven standard rows, with the one row of each other profile.
    assert rows[0] == ["Trained", "Trained-Too", "Diffusion", "Patient", "Hasty"]
    assert [len(found) for found in rows] == [5, 3, 1]
    assert 'href="../boards/board%2B2.html"' in parts[0]


def test_a_folder_of_something_else_is_left_alone(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds files, but no site"):
        write_site(full, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["../boards/board.html", "/etc/x.html", "boards/../../x.html", "thesis.tex", 3])
def test_a_marker_names_pages_inside_alone(full: Path, tmp_path: Path, name: object) -> None:
    out = tmp_path / "site"
    out.mkdir()
    (out / MARKER).write_text(json.dumps({"files": [name]}))
    with pytest.raises(InputError, match="does not name a site's files"):
        write_site(full, out)


def test_writing_again_removes_its_own_pages_and_no_others(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    first = write_site(full, out)
    (out / "notes.html").write_text("mine")
    gone = full / "records" / "board" / "hasty"
    for path in gone.iterdir():
        path.unlink()
    second = write_site(full, out)
    assert set(first) - set(second) == {"records/board/hasty.html", "defenses/hasty.html"}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*second, MARKER, "notes.html"}
    assert {name: (out / name).read_bytes() for name in second} == render_site(full)


def test_the_command_needs_a_leaderboards_folder_and_names_what_it_wrote(full: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    cli_site.add_to(app)
    app.callback()(lambda: None)
    done = CliRunner().invoke(app, ["site", "--out", str(tmp_path / "site"), "--leaderboards", str(full)])
    assert done.exit_code == 0, done.output
    assert "pages in" in done.output
    assert (tmp_path / "site" / "index.html").is_file()
    done = CliRunner().invoke(app, ["site", "--out", str(tmp_path / "other"), "--leaderboards", str(tmp_path / "none")])
    assert isinstance(done.exception, InputError)
    assert not (tmp_path / "other").exists()


def test_what_held_and_what_fell() -> None:
    held, fallen = choose([1, 2, 3, 4], [1.0, 0.9, 0.2, 1.0], [0.5, 0.4, 0.1, 0.0])
    assert (held, fallen) == ([1], [2, 4])  # 3 was never right
    assert len(choose(list(range(50)), [1.0] * 50, [1.0] * 50)[0]) == MOST


def test_pictures_are_read_as_they_were_written(folder: Path) -> None:
    target, record, found = with_bundle(folder)
    assert read_pictures(target, record) is None
    purified = np.stack([found.clean, found.adversarial]) * np.float32(0.5)
    answers = np.stack([found.labels, found.labels + 1])
    given = Pictures(found.ids, found.labels, found.held, found.clean, found.adversarial, purified, answers)
    write_pictures(target, record, given)
    read = read_pictures(target, record)
    assert read is not None
    for name in ("ids", "labels", "held", "clean", "adversarial", "purified", "answers"):
        np.testing.assert_array_equal(getattr(read, name), getattr(given, name))
    text = render_site(folder)["records/board/pictured.html"].decode()
    assert text.count("<img ") == 2 * MOST * 5
    assert "attacked, purified" in text
    # Another record's pictures are not this one's.
    assert read_pictures(target, record.model_copy(update={"digest": "0" * 64})) is None


def test_without_the_file_digits_are_shown_from_the_bundle(folder: Path) -> None:
    with_bundle(folder)
    text = render_site(folder)["records/board/pictured.html"].decode()
    assert text.count("<img ") == 2 * MOST * 3
    assert "assay site --pictures" in text


def _nan(arrays: dict[str, Any]) -> None:
    arrays["purified"] = np.full((2, *arrays["clean"].shape), np.nan, np.float32)


def _double(arrays: dict[str, Any]) -> None:
    arrays["clean"] = arrays["clean"].astype(np.float64)


def _flat(arrays: dict[str, Any]) -> None:
    arrays["clean"] = arrays["clean"].reshape(len(arrays["clean"]), -1)


def _bright(arrays: dict[str, Any]) -> None:
    arrays["clean"] = arrays["clean"] + 1


def _twice(arrays: dict[str, Any]) -> None:
    arrays["id"][1] = arrays["id"][0]


def _other(arrays: dict[str, Any]) -> None:
    arrays["adversarial"] = arrays["adversarial"][::-1].copy()


def _moved(arrays: dict[str, Any]) -> None:
    arrays["clean"] = np.clip(arrays["clean"] + np.float32(0.001), 0, 1)


def _more(arrays: dict[str, Any]) -> None:
    arrays["password"] = arrays["clean"]


def _many(arrays: dict[str, Any]) -> None:
    for name in list(arrays):
        arrays[name] = np.concatenate([arrays[name]] * 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_nan, "not finite"),
        (_double, "float64"),
        (_flat, "images"),
        (_bright, "leaves the box"),
        (_twice, "twice"),
        (_other, "is not the one in"),
        (_moved, "clean image"),
        (_more, "password"),
        (_many, "1 to 16 images"),
    ],
)
def test_pictures_that_are_none_are_refused(folder: Path, spoil: Any, said: str) -> None:
    target, record, found = with_bundle(folder)
    path = write_pictures(target, record, found)
    arrays = load_file(path)
    spoil(arrays)
    save_file(arrays, path, metadata={"schema": "assay-pictures/1", "record": record.digest})
    with pytest.raises(IntegrityError, match=said):
        read_pictures(target, record)


def test_a_file_that_is_no_safetensors_is_named(folder: Path) -> None:
    target, record, _ = with_bundle(folder)
    (target / PICTURES).write_bytes(b"\xff" * 40)
    with pytest.raises(IntegrityError, match=PICTURES):
        read_pictures(target, record)
