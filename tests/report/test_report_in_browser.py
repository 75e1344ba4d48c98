"""The report as a person meets it: opened, walked by keyboard, in the dark, on paper, small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from fake_run import fake_run

from moeprune.report import room
from moeprune.report.html import render_report

EVIL = "<img src=x onerror=alert(1)>\"'</script>\N{RIGHT-TO-LEFT OVERRIDE}ф"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of pages: an ordinary run, one without typical tokens, one of hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = fake_run()
    hostile["model"]["name"] = hostile["command"] = EVIL
    hostile["atlas"]["domains"] = [f"{EVIL}{i}" for i in range(4)]
    hostile["atlas"]["tokens"] = [EVIL] * 3
    row = hostile["rows"][1]
    row["name"] = row["method"] = EVIL
    row["plan"] = {i: {**e, "scores": {EVIL: [0.5] * 32}} for i, e in row["plan"].items()}
    wordless = fake_run()
    wordless["atlas"] = room._trimmed(wordless["atlas"], {"tokens": [-1]}, set())
    found = {}
    for name, run in (("plain", fake_run()), ("hostile", hostile), ("wordless", wordless)):
        path = folder / f"{name}.html"
        path.write_text(render_report(run), encoding="utf-8")
        found[name] = path.as_uri()
    return found


class Opened:
    """A page, with everything that it said and asked for."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.address = address

    def close(self) -> None:
        assert self.said == [] and self.asked == [self.address]
        self.context.close()


@pytest.fixture
def plain(browser: Any, files: dict[str, str]) -> Iterator[Opened]:
    opened = Opened(browser, files["plain"], viewport={"width": 1280, "height": 900})
    yield opened
    opened.close()


def test_it_opens_and_says_the_main_numbers(plain: Opened) -> None:
    shown = plain.page.inner_text("main").replace("\N{NARROW NO-BREAK SPACE}", " ")
    for number in (
        "25.4 MB",
        "14.0 MB",
        "×1.31",
        "0.0208",
        "2.13.0",
        "moeprune demo --out demo-out",
    ):
        assert number in shown, number
    panel = plain.page.inner_text("#atlas-panel")
    assert panel.startswith("Layer ")
    assert all(text in panel for text in ("german", "␣und", "moeits-50"))


def test_an_atlas_whose_tokens_had_no_room(browser: Any, files: dict[str, str]) -> None:
    opened = Opened(browser, files["wordless"])
    panel = opened.page.inner_text("#atlas-panel")
    assert "german" in panel and "␣und" not in panel and "moeits-50" in panel
    assert "␣und" not in opened.page.content()
    opened.close()


def test_the_atlas_is_walked_by_keyboard(plain: Opened) -> None:
    page = plain.page
    grid = page.get_by_role("grid", name="Layers by experts")
    assert grid.get_by_role("gridcell").count() == 6 * 32
    assert page.locator("#atlas-grid [tabindex='0']").count() == 1
    page.locator("#atlas-measure").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # past the other choice, into the grid

    def here() -> str:
        return str(page.evaluate("document.activeElement.getAttribute('aria-label')"))

    page.keyboard.press("Control+Home")
    assert here().startswith("layer 0, expert 0: usage: share of slots ")
    for key, place in (
        ("ArrowRight", "layer 0, expert 1:"), ("ArrowDown", "layer 1, expert 1:"),
        ("End", "layer 1, expert 31:"), ("ArrowRight", "layer 1, expert 31:"),
        ("Control+End", "layer 5, expert 31:"), ("Home", "layer 5, expert 0:"),
        ("PageUp", "layer 0, expert 0:"), ("ArrowUp", "layer 0, expert 0:"),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert here().startswith(place), key
        assert page.inner_text("#atlas-panel h3") == place.removesuffix(":").replace("l", "L", 1)
    assert here().endswith(("kept", "novice"))
    page.keyboard.press("Enter")
    assert page.locator("#atlas-grid [aria-selected='true']").count() == 1
    page.hover("#atlas-grid tbody tr:nth-child(3) td:nth-child(8)")
    assert page.inner_text("#atlas-panel h3") == "Layer 0, expert 0"
    page.keyboard.press("Escape")
    assert page.locator("#atlas-grid [aria-selected='true']").count() == 0


def test_a_pointer_shows_and_a_click_keeps(plain: Opened) -> None:
    page = plain.page
    page.hover("#atlas-grid tbody tr:nth-child(3) td:nth-child(8)")  # the heading comes first
    assert page.inner_text("#atlas-panel h3") == "Layer 2, expert 6"
    page.click("#atlas-grid tbody tr:nth-child(4) td:nth-child(9)")
    page.hover("#atlas-grid tbody tr:nth-child(1) td:nth-child(2)")
    assert page.inner_text("#atlas-panel h3") == "Layer 3, expert 7"


def test_colours_and_marks_follow_the_choices(plain: Opened) -> None:
    page = plain.page
    classes = "[...document.querySelectorAll('#atlas-grid td')].map(c => c.className)"
    usage = page.evaluate(classes)
    assert sum("n" in name.split() for name in usage) == 6 * 8  # mone-25 is the first result
    page.select_option("#atlas-measure", label="affinity to german")
    affinity = page.evaluate(classes)
    assert all(name.startswith(("v", "c ", "c")) for name in affinity)
    assert {name.split()[0] for name in affinity} > {"v0", "v8"}
    assert page.is_visible("#ramp-signed") and not page.is_visible("#ramp-plain")
    page.select_option("#atlas-fate", label="moeits-50")
    assert sum("d" in name.split() for name in page.evaluate(classes)) == 6 * 16
    assert page.is_visible("[data-fate=d]") and not page.is_visible("[data-fate=n]")
    page.click("text=Show its fates and scores in the atlas")
    assert page.input_value("#atlas-measure") == '["score",0,"fusion"]'
    assert page.input_value("#atlas-fate") == "0"


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_window(browser: Any, files: dict[str, str], width: int) -> None:
    for address in files.values():
        opened = Opened(browser, address, viewport={"width": width, "height": 800})
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width
        opened.close()


def test_light_and_dark_and_the_button(browser: Any, files: dict[str, str]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        opened = Opened(browser, files["plain"], color_scheme=scheme)
        seen[scheme] = opened.page.evaluate(colour)
        opened.page.click("#theme")
        seen[f"not {scheme}"] = opened.page.evaluate(colour)
        opened.close()
    assert seen["light"] == seen["not dark"] == "rgb(252, 252, 251)"
    assert seen["dark"] == seen["not light"] == "rgb(20, 23, 26)"


def test_it_prints_in_light_colours_with_everything_unfolded(plain: Opened) -> None:
    plain.page.click("#theme")
    assert plain.page.evaluate("document.documentElement.dataset.theme") == "dark"
    content = plain.page.pdf(prefer_css_page_size=True)
    assert content.startswith(b"%PDF") and len(content) > 20_000
    plain.page.emulate_media(media="print")
    assert plain.page.evaluate("getComputedStyle(document.body).backgroundColor").startswith(
        "rgb(252"
    )
    assert not plain.page.is_visible("#theme") and plain.page.is_visible("#atlas-panel")


def test_hostile_names_are_texts(browser: Any, files: dict[str, str]) -> None:
    opened = Opened(browser, files["hostile"])
    page = opened.page
    assert page.locator("img").count() == 0
    assert EVIL in page.inner_text("h1") and "<img src=x" in page.inner_text("#atlas-panel")
    page.select_option("#atlas-measure", index=3)
    page.select_option("#atlas-fate", label=EVIL)
    page.click("#atlas-grid tbody tr:nth-child(2) td:nth-child(5)")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 3
    opened.close()


def test_without_scripts_the_numbers_are_there(browser: Any, files: dict[str, str]) -> None:
    opened = Opened(browser, files["plain"], java_script_enabled=False)
    assert "14.0" in opened.page.inner_text("main")
    assert not opened.page.is_visible("#atlas-measure")
    assert "Without scripts" in opened.page.content()
    opened.close()


def test_nothing_can_be_fetched(browser: Any, files: dict[str, str], tmp_path: Path) -> None:
    """Even markup that slipped in would neither load nor run: the policy holds."""
    address = files["plain"].removeprefix("file://")
    page = Path(address).read_text(encoding="utf-8")
    slipped = '<script>document.title="run"</script><img src="file:///x.png"></main>'
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("</main>", slipped), encoding="utf-8")
    opened = Opened(browser, broken.as_uri())
    assert opened.page.title() == "moeprune report: demo"
    assert len(opened.said) == 2 and all("Content Security Policy" in text for text in opened.said)
    opened.context.close()
