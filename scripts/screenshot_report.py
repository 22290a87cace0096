"""A picture of the first screen of a report, in light and in dark: give the page and OUTPUT.

Needs Chromium (`make browser`). Writes OUTPUT.png and OUTPUT-dark.png, with few colours so that they stay small.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from kvprofile.files import write_atomically

WIDTH, HEIGHT, COLOURS = 1280, 960, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("output", type=Path, help="without ending")
    parser.add_argument("--height", type=int, default=HEIGHT)
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("needs Chromium; `make browser` installs it where it can")
    flags = ["--disable-gpu", "--disable-background-networking", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=flags)
        schemes: tuple[tuple[Literal["light", "dark"], str], ...] = (("light", ""), ("dark", "-dark"))
        for scheme, ending in schemes:
            page = chromium.new_page(viewport={"width": WIDTH, "height": options.height}, color_scheme=scheme)
            page.goto(options.page.resolve().as_uri())
            path = options.output.with_name(f"{options.output.name}{ending}.png")
            write_atomically(path, reduced(page.screenshot()))
            print(f"wrote {path}", file=sys.stderr)
        chromium.close()


def reduced(png: bytes) -> bytes:
    """The same picture with a palette of COLOURS."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(stream, "PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    main()
