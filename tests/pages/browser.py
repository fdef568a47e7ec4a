"""What the tests of every page share: a strict parser, the rule that a page loads nothing, and a real browser."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE = '<img src=x onerror="alert(1)">\'&amp;</p><script>'
VOID = {"meta", "br", "path", "rect"}  # SVG's are closed by "/>", which html.parser reports as a start tag


class Page(HTMLParser):
    """A page that was parsed: its tags with attributes, its texts, and whether every tag was closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1:] != ["style"]:
            self.texts.append(" ".join(data.split()))

    def curves(self) -> dict[str, list[str]]:
        """The path data of the curves by role."""
        found: dict[str, list[str]] = {}
        for tag, attributes in self.tags:
            classes = (attributes.get("class") or "").split()
            if tag == "path" and classes[:1] == ["curve"]:
                found.setdefault(classes[1], []).append(attributes["d"] or "")
        return found

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def check_loads_nothing(html: str) -> None:
    """Fails for a page that could fetch or run something."""
    shown = Page(html)
    assert not {tag for tag, _ in shown.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "use",
    }
    loading = {"src", "srcset", "href", "xlink:href", "data", "action", "background", "poster"}
    for _, attributes in shown.tags:
        assert not attributes.keys() & loading
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in (attributes.get("style") or "")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for tag, a in shown.tags if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def opened_in_chromium(html: str, folder: Path) -> Page:
    """The page as Chromium shows it; the test is skipped where there is none."""
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    offline = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'user'}"]
    done = subprocess.run(
        [_chromium(), *quiet, *offline, "--enable-logging=stderr", "--dump-dom", file.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, "the page made the browser complain, or tried to load something"
    return Page(done.stdout)


def _chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on the PATH to open the page with")
