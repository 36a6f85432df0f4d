"""The documentation builds strictly, comes from the source, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import warm

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parents[2]
TAKES = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--site-dir", str(place)]
    done = warm.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return place


class Loaded(HTMLParser):
    """What a browser fetches for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "prev", "next"):
            return
        if tag in TAKES and values.get(TAKES[tag]):
            self.found.append(str(values[TAKES[tag]]))


def test_every_page_of_the_menu_is_there(site: Path) -> None:
    pages = re.findall(r": ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pages) > 20
    assert [page for page in pages if not (site / f"{page}.html").is_file()] == []
    assert not (site / "_hooks").exists()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.found
        for address in loaded.found:
            assert not re.match(r"(https?:)?//", address), (page.name, address)
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//", styles)


def test_the_reference_is_the_sources(site: Path) -> None:
    commands = (site / "reference/cli.html").read_text(encoding="utf-8")
    for word in (
        "flexp state restore",
        "--passphrase-env VARIABLE",
        "flexp join RUN --name TEXT --out PATH",
        "python -m benchmarks link",
    ):
        assert word in commands
    python = (site / "reference/python.html").read_text(encoding="utf-8")
    for word in ("SplitModel", "personal_state", "back_up", "From now on serve the shared blocks as they are"):
        assert word in python
    assert ":func:" not in python
    assert ":class:" not in python
