"""Take the screenshot of the demo's report that README.md shows.

    cytosae-cache demo && python scripts/make_screenshot.py cytosae-demo/out/feature_data/*/custom/*/report

Needs Chromium and playwright (the `test` extra); CYTOSAE_TEST_CHROMIUM names another program than `chromium`.
"""

import argparse
import io
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    """Take the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "report.png")
    parser.add_argument("--card", type=int, default=16, help="index of the selected latent among the featured ones")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        program = os.environ.get("CYTOSAE_TEST_CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto((options.report.resolve() / "index.html").as_uri() + "#/latents")
        page.wait_for_function("() => state.scatter && !state.scatter.pending")
        latent = page.evaluate("at => state.overview.featured[at]", options.card)
        x, y = page.evaluate("i => state.scatter.toScreen(state.latents.x[i], state.latents.y[i])", latent)
        page.click(".scatter canvas", position={"x": x, "y": y})
        page.wait_for_selector(".side .top-image img")
        page.mouse.move(640, 30)
        page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    picture.convert("RGB").save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
