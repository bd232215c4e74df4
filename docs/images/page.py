"""Takes the picture of the page, page.webp, from a server that is ready and has nothing else to do.

    tome-server serve
    python docs/images/page.py http://localhost:8000 docs/images/page.webp

It needs Playwright and a Chromium. The times in the picture are what the page has measured on this machine.
"""

from __future__ import annotations

import io
import shutil
import sys

from PIL import Image
from playwright.sync_api import FloatRect, expect, sync_playwright

WIDTH, QUALITY = 1100, 82
COMPILED_MS, MEASURED_MS = 600_000, 120_000
PARTS = ("header", ".intro", ".photo", ".compare", ".curve")


def picture(url: str, photo: str = "School bus") -> Image.Image:
    """The page from its top to the end of the curve, with medians of 20 times."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800})
        page.goto(url)
        expect(page.locator("#health")).to_have_text("ready", timeout=COMPILED_MS)
        page.get_by_role("button", name=photo).click()
        expect(page.locator("#verdict")).to_contain_text("medians of 5", timeout=MEASURED_MS)
        page.get_by_role("button", name="Measure 20 times").click()
        expect(page.locator("#verdict")).to_contain_text("medians of 20", timeout=MEASURED_MS)
        page.mouse.move(0, 0)
        boxes = [page.locator(part).bounding_box() for part in PARTS]
        end = max(box["y"] + box["height"] for box in boxes if box)
        clip: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": end + 16}
        taken = page.screenshot(full_page=True, clip=clip)
        browser.close()
    return Image.open(io.BytesIO(taken)).convert("RGB")


if __name__ == "__main__":
    picture(sys.argv[1]).save(sys.argv[2], "WEBP", quality=QUALITY, method=6)
