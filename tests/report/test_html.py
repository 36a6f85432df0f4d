from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from flexp.errors import StorageError
from flexp.files import read_json, write_json
from flexp.report import write_report

from . import synthetic

EVIL = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><a href="javascript:alert(1)">x</a>',
)


class Page(HTMLParser):
    """Counts elements and collects addresses and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def own_part(path: Path) -> str:
    """The page without plotly.js itself, every space an ordinary one."""
    text = path.read_text()
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "").replace("\u00a0", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run's folder, with its report."""
    made = synthetic.run_folder(tmp_path_factory.mktemp("full") / "run")
    assert write_report(made) == made / "report.html"
    return made


def test_one_page_with_numbers_table_plots_config_and_versions(run: Path) -> None:
    text = own_part(run / "report.html")
    page = Page(text)
    summary = read_json(run / "summary.json")
    assert f"{100 * summary['scores']['last']['personal_mean']:.1f} %" in text
    assert page.tags["tr"] == 1 + len(synthetic.NAMES) + 2
    assert len(re.findall(r'id="plot-\w+"', text)) == 7
    assert "Resolved configuration" in text
    assert "2.13.0" in text
    assert "not finished" not in text


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    text = own_part(run / "report.html")
    assert Page(text).addresses == []
    assert "default-src 'none'" in text
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://(?!plot\.ly)""", text)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plain = Page(own_part(write_report(synthetic.run_folder(tmp_path / "a", ("a", "b", "c"), name="n"))))
    hostile = Page(own_part(write_report(synthetic.run_folder(tmp_path / "b", EVIL, name=EVIL[0]))))
    assert hostile.tags == plain.tags
    assert hostile.addresses == hostile.handlers == []
    assert EVIL[1] in hostile.text


def test_a_label_and_a_machine_stay_text_too(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    run = synthetic.run_folder(tmp_path, (script, "b"), name=script)
    write_json(run / "config.json", {"name": script, "data": {"label": script, "names": [script]}})
    summary = read_json(run / "summary.json")
    summary["model"]["id"] = summary["machine"]["processor"] = summary["versions"]["torch"] = script
    write_json(run / "summary.json", summary)
    text = own_part(write_report(run))
    assert script not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


def test_equal_folders_give_equal_pages(run: Path) -> None:
    first = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == first


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    run = synthetic.run_folder(tmp_path, ("a", "b"), metric="perplexity", finished=False)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "st')
    assert "This run is not finished." in own_part(write_report(run))


def test_only_the_summary_is_needed(tmp_path: Path) -> None:
    summary = synthetic.summary(diary=[])
    for client in summary["clients"]:
        client["peak_memory_bytes"] = None
    write_json(tmp_path / "summary.json", summary)
    text = own_part(write_report(tmp_path))
    assert "Peak memory was not measured." in text
    assert "Resolved configuration" not in text


def test_what_is_not_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"has no summary\.json; expected the folder of a run"):
        write_report(tmp_path)
    write_json(tmp_path / "summary.json", {"schema": 99})
    with pytest.raises(StorageError, match="has schema 99, expected 1"):
        write_report(tmp_path)
    write_json(tmp_path / "summary.json", {"schema": 1, "name": "x"})
    with pytest.raises(StorageError, match="is not as FlexP writes it"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
