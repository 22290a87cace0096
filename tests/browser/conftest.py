"""A headless Chromium for the tests of pages, one for each file of tests; without one they skip, with the reason."""

from __future__ import annotations

import os
import shutil

import pytest

from kvprofile.report import html
from kvprofile.report.compare import summarise

FLAGS = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


def executable():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def chromium():
    """The browser. While it lives an event loop runs in this thread, which would be in the way of other tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra 'dev'")
    path = executable()
    if path is None:
        pytest.skip("needs Chromium, which is neither installed nor installable here; see `make browser`")
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with everything it said and asked for since it was opened."""

    def __init__(self, chromium, path, **context):
        self.path = path
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.said, self.requested = [], []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(path.as_uri())

    def close(self):
        self.context.close()


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Writes the page of records and gives (its path, their summary)."""

    def write(*records):
        summary = summarise(records)
        path = tmp_path_factory.mktemp("pages") / "report.html"
        html.write(summary, path)
        return path, summary

    return write


@pytest.fixture
def opened(chromium):
    """Opens a page; closes it after the test."""
    pages = []

    def open_page(path, **context):
        pages.append(Opened(chromium, path, **context))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
