"""A headless Chromium: the system's, Playwright's, or Debian's package unpacked into the cache outside of the checkout."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.cluster.cache import digest, product
from tests.support import debian
from tests.support.commands import CHROMIUM
from tests.support.limits import HANG_S

# The browser without windows, and a font, which slim systems lack.
_PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core")
_FONTS = """\
<?xml version="1.0"?>
<fontconfig>
<include ignore_missing="yes">/etc/fonts/fonts.conf</include>
<include ignore_missing="yes" prefix="relative">etc/fonts/fonts.conf</include>
<dir>/usr/share/fonts</dir><dir prefix="relative">usr/share/fonts</dir><cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""


@dataclass
class PageActivity:
    """The activity of a page.

    Attributes:
        messages: Messages on the console, and errors of scripts.
        requests: URLs that it requested, without its own and `data:` URIs.
    """

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@functools.cache
def chromium() -> tuple[str, dict[str, str]]:
    """Return the browser's command and its environment variables; the variable CHROMIUM overrides the command."""
    if command := os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None):
        return command, {}
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    if Path(own).is_file():
        return own, {}
    return _unpacked()


def _unpacked() -> tuple[str, dict[str, str]]:
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").is_file() else platform.system()
    root = product("chromium", digest(*_PACKAGES, _FONTS, release, platform.machine()), _unpack)
    libraries = sorted({str(library.parent) for library in (root / "usr/lib").rglob("*.so*")})
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(libraries), "FONTCONFIG_FILE": str(root / "fonts.conf")}
    return str(root / "usr/lib/chromium/chromium-headless-shell"), environment


def _unpack(folder: Path) -> None:
    debian.unpack(folder, *_PACKAGES)
    (folder / "fonts.conf").write_text(_FONTS)


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """Start a browser, and close it afterwards."""
    command, environment = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=command,
            env={**os.environ, **environment},
            args=["--no-sandbox"] if os.geteuid() == 0 else [],
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(
    browser: Browser, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False, scripts: bool = True
) -> Iterator[tuple[Page, PageActivity]]:
    """Open a page from a file; yield it and its activity."""
    activity = PageActivity()
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        java_script_enabled=scripts,
        reduced_motion="reduce",
    )
    try:
        page = context.new_page()
        page.set_default_timeout(HANG_S * 1000)
        page.on("console", lambda message: activity.messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: activity.messages.append(f"error: {error}"))
        url = file.as_uri()
        page.on(
            "request",
            lambda request: (
                None if request.url == url or request.url.startswith("data:") else activity.requests.append(request.url)
            ),
        )
        page.goto(url, wait_until="load")
        yield page, activity
    finally:
        context.close()
