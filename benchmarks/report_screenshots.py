"""Pictures of a report for the documentation: light, dark, and the atlas in detail.

    python benchmarks/report_screenshots.py demo-out/report.html

Opens the page in the Chromium on PATH and writes docs/report-*.png.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import arguments
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MOST = 300_000  # bytes a picture
EDGE = 28  # pixels around the atlas
EXPERT = "#atlas-grid .shown"


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=Path("demo-out/report.html"))
    page = parser.parse_args().page.resolve()
    browser_path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            opened = browser.new_page(viewport={"width": 1280, "height": 960}, color_scheme=scheme)
            opened.goto(page.as_uri())
            keep(opened.screenshot(), f"report-{scheme}.png")
            if scheme == "light":
                detail(opened)
            opened.close()
        browser.close()


def detail(opened: Any) -> None:
    """The atlas, coloured by the domain that its first expert serves most, that expert pinned."""
    first = opened.inner_text("#atlas-panel .served tbody tr:first-child th")
    opened.select_option("#atlas-measure", label=f"affinity to {first}")
    opened.click(EXPERT)
    opened.mouse.move(0, 0)
    box = opened.locator("#atlas-section").bounding_box()
    clip = {"x": 0, "y": box["y"] - EDGE, "width": 1280, "height": box["height"] + 2 * EDGE}
    clip["y"] += opened.evaluate("scrollY")
    keep(opened.screenshot(full_page=True, clip=clip), "report-atlas.png")


def keep(picture: bytes, name: str) -> None:
    if len(picture) > MOST:
        raise SystemExit(f"{name} would be {len(picture)} bytes, more than {MOST}")
    (DOCS / name).write_bytes(picture)
    print(DOCS / name, len(picture))


if __name__ == "__main__":
    main()
