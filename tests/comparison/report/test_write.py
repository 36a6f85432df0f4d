from __future__ import annotations

import re
from pathlib import Path

import pytest

from flexp.comparison.report.tables import terminal_table
from flexp.comparison.report.write import write_all
from flexp.errors import StorageError
from tests.report.test_html import EVIL, Page, own_part

from . import synthetic

FILES = ["table.md", "table.csv", "table.tex", "clients.csv", "comparison.html"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of a whole comparison, in a folder that was not there."""
    return write_all(synthetic.comparison(devices=True), tmp_path_factory.mktemp("full") / "new")


def test_every_file_is_written_and_nothing_else(full: list[Path]) -> None:
    assert [path.name for path in full] == FILES
    assert {path.parent.name for path in full} == {"new"}
    assert sorted(full[0].parent.iterdir()) == sorted(full)


def test_the_page_has_tables_plots_and_numbers(full: list[Path]) -> None:
    text = own_part(full[-1])
    page = Page(text)
    assert len(re.findall(r'id="plot-[\w-]+"', text)) == 8
    assert page.tags["table"] == 6
    assert page.tags["tr"] == 5 * (1 + len(synthetic.METHODS)) + 1 + 42
    assert "83.8 ± 1.9 %" in text
    assert "4 of 8 clients dropped: need 316 MB" in text
    assert "not finished" not in text
    assert page.addresses == []
    assert "default-src 'none'" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    made = synthetic.comparison(methods=("a", "b", "c"), clients=("d", "e", "f"), seeds=(0, 1))
    plain = Page(own_part(write_all(made, tmp_path / "plain")[-1]))
    evil = synthetic.comparison(methods=EVIL, clients=EVIL, seeds=(0, 1), name=EVIL[0])
    evil["model"]["id"] = evil["config"]["name"] = evil["machine"]["system"] = EVIL[1]
    for method in evil["methods"]:
        for trial in method["trials"]:
            trial["settings"] = {EVIL[2]: 1}
    hostile = Page(own_part(write_all(evil, tmp_path / "hostile")[-1]))
    assert hostile.tags == plain.tags
    assert hostile.addresses == hostile.handlers == []
    assert EVIL[1] in hostile.text


def test_equal_comparisons_give_equal_files(tmp_path: Path) -> None:
    def files() -> list[bytes]:
        made = synthetic.comparison(synthetic.METHODS[:3], ("a", "b"), (0, 1), devices=True)
        return [path.read_bytes() for path in write_all(made, tmp_path)]

    assert files() == files()


def test_a_comparison_that_has_just_begun(tmp_path: Path) -> None:
    """No run is finished: neither the metric nor the model is known yet."""
    made = synthetic.comparison()
    made |= {"metric": None, "higher_is_better": None, "machine": {}, "versions": {}}
    made["model"] = dict.fromkeys(made["model"])
    for method in made["methods"]:
        method["runs"] = []
        for trial in method["trials"]:
            trial["validation"] = None
    text = own_part(write_all(made, tmp_path)[-1])
    assert "This comparison is not finished." in text
    assert "None" not in Page(text).text
    assert terminal_table(made).row_count == len(synthetic.METHODS)


def test_missing_runs_are_named(tmp_path: Path) -> None:
    made = synthetic.comparison(synthetic.METHODS[:4], ("a", "b"), (0, 1))
    del made["methods"][3]["runs"][1]
    assert "Runs are missing of: fedavg-ft." in own_part(write_all(made, tmp_path)[-1])
    assert "Runs are missing of: fedavg-ft." in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_method_that_no_device_can_hold_is_a_result(tmp_path: Path) -> None:
    """Also when it is the reference."""
    for which in (0, 2):
        made = synthetic.comparison(synthetic.METHODS[:3], devices=True, seeds=(0, 1))
        for run in made["methods"][which]["runs"]:
            run.update(rounds=[], best_round=None, picked_on=None, dropped=list(synthetic.NAMES))
            run["before"] = {"personal": {}, "global": {}}
            for client in run["clients"]:
                client.update(peak_memory_bytes=400_000_000, available_bytes=300_000_000)
        text = own_part(write_all(made, tmp_path)[-1])
        assert "all 8 clients dropped: need 400 MB, have 300 MB" in text
        assert "not finished" not in text
        name = made["methods"][which]["name"]
        rows = (
            line
            for line in (tmp_path / "table.md").read_text().splitlines()
            if line.replace("*", "").startswith(f"| {name} †")
        )
        assert next(rows).count("–") >= 5  # no score of any kind


def test_costs_are_said_to_be_those_of_participants(full: list[Path]) -> None:
    text = own_part(full[-1])
    assert "sent and received, mean over clients and seeds" not in text
    assert text.count("sent and received, mean over the clients that take part and over seeds") == 2
    assert "those that train compute on as many examples" not in text
    assert "a client that takes part in a\nmethod's training computes on as many examples" in text


def test_a_run_without_a_best_round_or_any_round(tmp_path: Path) -> None:
    made = synthetic.comparison(seeds=(0,))
    made["methods"][7]["runs"][0].update(rounds=[], best_round=None)  # pretrained: never trains
    write_all(made, tmp_path)
    row = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| pretrained"))
    before = made["methods"][7]["runs"][0]["before"]["personal"]
    assert f"{100 * sum(before.values()) / 8:.1f} % (n = 1)" in row
    assert row.count("–") == 2  # no loss and no best round


def test_what_is_not_a_comparison_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="has schema None, expected 1"):
        write_all({}, tmp_path)
    made = synthetic.comparison()
    del made["methods"][0]["runs"][0]["before"]
    with pytest.raises(StorageError, match=r"is not as FlexP writes it \(KeyError: 'before'\)"):
        write_all(made, tmp_path)
    assert list(tmp_path.iterdir()) == []
