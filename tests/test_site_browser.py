"""The site in headless Chromium, from files: sorting, filtering, following links; no errors, no request outside."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from assay.leaderboards.site import write_site
from assay.protocol import PROTOCOLS

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium or google-chrome on PATH"),
]
zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of one record of each kind, on two boards."""
    folder = tmp_path_factory.mktemp("leaderboards")
    (folder / "records").mkdir()
    with mock.patch.dict(PROTOCOLS, {"test.1": zoo.PROTOCOL}):
        zoo.write_board(folder)
        zoo.write_all(folder)
        zoo.write_certified(folder)
        write_site(folder, folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # The sandbox needs rights that a container's root has not; the pages are this test's own.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong: no message of the console, no error, no request but of files."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(str(asked.url))
    )
    opened.set_default_timeout(20_000)
    yield opened
    opened.close()
    assert wrong == []


def titles(page: Any) -> list[str]:
    """The titles of the rows of the first table that are shown, in order."""
    found: list[str] = page.eval_on_selector_all(
        "#standard ~ .scroll >> nth=0 >> tr[data-row]",
        "rows => rows.filter(r => r.offsetParent !== null).map(r => r.cells[1].querySelector('a').textContent)",
    )
    return found


BEST_FIRST = ["Trained", "Trained-Too", "Diffusion", "None", "Quantised", "Partial", "Careless"]


def test_a_column_sorts_down_up_and_back(site: Path, page: Any) -> None:
    page.goto((site / "boards" / "board.html").as_uri())
    assert titles(page) == BEST_FIRST
    header = page.locator("#standard ~ .scroll").first.locator("th", has_text="Defense")
    button = header.get_by_role("button")
    for expected, ranked in (("ascending", ["Diffusion", "None", "Trained", "Trained-Too"]),
                             ("descending", ["Trained-Too", "Trained", "None", "Diffusion"]),
                             ("none", BEST_FIRST[:4])):  # fmt: skip
        button.focus()
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == expected
        assert titles(page)[:4] == ranked  # the groups below stay where they are
    page.locator("#standard ~ .scroll").first.get_by_role("button", name="apgd").click()
    assert titles(page)[:4] == ["Trained", "Trained-Too", "Diffusion", "None"]
    assert "sorted by apgd, descending" in page.locator("#status").inner_text()


def test_what_is_missing_stands_last_either_way(site: Path, page: Any) -> None:
    page.goto((site / "boards" / "board.html").as_uri())
    clean = page.locator("#standard ~ .scroll").first.get_by_role("button", name="Clean")
    for _ in range(2):
        clean.click()
        assert titles(page)[-2:] == ["Partial", "Careless"]  # nothing was measured of the careless one


def test_filters_narrow_and_can_be_taken_back(site: Path, page: Any) -> None:
    page.goto((site / "boards" / "board.html").as_uri())
    page.get_by_label("Text").fill("trained too")
    assert titles(page) == ["Trained-Too"]
    assert page.locator("#status").inner_text() == "1 of 9 rows"
    page.get_by_role("button", name="Show all").click()
    # The page's policy forbids evaluated code, which a waiting function would be.
    sync_api.expect(page.locator("#status")).to_contain_text("9 of 9 rows")
    page.get_by_label("purifies").check()
    assert titles(page) == ["Diffusion"]
    page.get_by_label("purifies").uncheck()
    page.get_by_label("Verdict").select_option("failed")
    assert titles(page) == ["Careless"]


def test_certifying_rows_alone(site: Path, page: Any) -> None:
    page.goto((site / "boards" / "balls.html").as_uri())
    assert "Trained" in titles(page)
    page.get_by_label("only rows with a certificate").check()
    assert "Trained" not in titles(page)
    assert {"Weak", "Fair", "Strong"} < set(titles(page))


def test_links_lead_from_the_index_to_a_record_and_back(site: Path, page: Any) -> None:
    page.goto((site / "index.html").as_uri())
    page.get_by_role("link", name="board", exact=True).click()
    page.get_by_role("link", name="Diffusion", exact=True).first.click()
    assert page.locator("h1").inner_text() == "Diffusion"
    page.get_by_role("link", name="board, standard").first.click()
    assert page.locator("h1").inner_text() == "Diffusion on board"
    page.locator("summary").or_(page.locator("h2")).first.click()
    page.get_by_role("link", name="Boards").click()
    assert page.locator("h1").inner_text() == "Leaderboards"


def test_the_first_key_leads_past_the_navigation(site: Path, page: Any) -> None:
    page.goto((site / "boards" / "board.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_a_phone(site: Path, browser: Any, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    phone = context.new_page()
    colours = set()
    for path in sorted(site.rglob("*.html")):
        phone.goto(path.as_uri())
        assert phone.evaluate("document.documentElement.scrollWidth") <= 360, path
        colours.add(phone.evaluate("getComputedStyle(document.body).backgroundColor"))
    context.close()
    assert colours == {"rgb(22, 24, 27)" if scheme == "dark" else "rgb(253, 253, 252)"}


def test_without_scripts_everything_is_there(site: Path, browser: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto((site / "boards" / "board.html").as_uri())
    assert plain.locator("tr[data-row]").count() == 9
    assert not plain.locator("#filters").is_visible()
    context.close()
