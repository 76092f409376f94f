"""Pages in a real browser: Chromium without a window, driven by Playwright.

A test takes the fixture `open_page`. Until a module's tests have ended, Playwright's event loop
runs in this thread, and no other can (`asyncio.run` raises): what needs one, such as Orbax, comes
before the first page or runs in a process of its own.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """The program that $CHROMIUM names, else the first of the usual names on the PATH."""
    wanted = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [wanted] if wanted else NAMES)), None)


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    program = find_chromium()
    if program is None:
        pytest.fail(
            f"no Chromium found ($CHROMIUM, or one of {', '.join(NAMES)} on the PATH): install it,"
            " as launch/test.sh does (Debian: apt-get install chromium)"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=list(_FLAGS))
        yield launched
        launched.close()


class Visitor:
    """Opens pages, each as a new visitor, and notes in `wrong` what should not be there.

    A page from a file may ask for nothing else, and one from a server for what that server has.
    Another request is wrong, and so is an error on the console, an exception or a dialog.
    """

    def __init__(self, chromium):
        self._chromium, self._contexts, self.wrong = chromium, [], []

    def open(self, url: str, **options):
        """Playwright's page; `options` are those of `Browser.new_context`, as in
        color_scheme='dark'."""
        context = self._chromium.new_context(**options)
        self._contexts.append(context)

        def asked(request) -> None:
            if url.startswith("file:"):
                same = request.url.partition("#")[0] == url.partition("#")[0]
            else:
                same = urlsplit(request.url)[:2] == urlsplit(url)[:2]
            if not same:
                self.wrong.append(f"request: {request.url}")

        def said(message) -> None:
            if message.type == "error":
                self.wrong.append(f"console: {message.text}")

        def asks(dialog) -> None:
            self.wrong.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        context.on("request", asked)
        page = context.new_page()
        page.on("console", said)
        page.on("pageerror", lambda error: self.wrong.append(f"exception: {error}"))
        page.on("dialog", asks)
        page.goto(url)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """`Visitor.open`; what is wrong fails the test at its end."""
    visitor = Visitor(chromium)
    yield visitor.open
    visitor.close()
    assert visitor.wrong == []
