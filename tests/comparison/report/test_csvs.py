from __future__ import annotations

import csv
import io

import pytest

from flexp.comparison.report.write import clients_csv, methods_csv

from . import synthetic
from .test_results import BY_HAND


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_line_a_method_with_plain_numbers() -> None:
    mine, other = rows(methods_csv(synthetic.tiny(BY_HAND)))
    assert float(mine["personal"]) == pytest.approx(2.5 / 3)
    assert float(other["reference_better_by"]) == pytest.approx(0.05)
    assert (mine["reference_better_by"], mine["peak_memory_bytes"]) == ("", "")
    assert (float(other["bytes_up"]), other["personal_n"]) == (100.0, "3")


def test_a_line_a_client_and_run() -> None:
    made = synthetic.comparison(devices=True, seeds=(0, 1))
    lines = rows(clients_csv(made))
    assert len(lines) == len(synthetic.METHODS) * 2 * 8
    line = next(line for line in lines if (line["method"], line["seed"], line["client"]) == ("fedavg", "1", "Tweets"))
    run = made["methods"][2]["runs"][1]
    assert line["dropped"] == "1"
    assert line["device"] == "laptop"
    assert float(line["personal_last"]) == run["rounds"][-1]["personal"]["Tweets"]
    assert float(line["global_best"]) == run["rounds"][run["best_round"] - 1]["global"]["Tweets"]
    assert float(line["personal_before"]) == run["before"]["personal"]["Tweets"]
    assert next(line for line in lines if line["method"] == "flexp-sfl")["cut"] == "1:6"


def test_names_come_back_as_they_are_but_never_as_formulas() -> None:
    names = ('a,"b"\nc', "=1+1", "@x")
    made = synthetic.comparison(methods=("-m", "local"), clients=names, seeds=(0,))
    assert [line["client"] for line in rows(clients_csv(made))][:3] == ['a,"b"\nc', "'=1+1", "'@x"]
    assert rows(methods_csv(made))[0]["method"] == "'-m"
    signed = synthetic.tiny({"mine": [[0.5]], "other": [[0.9]]})
    assert float(rows(methods_csv(signed))[1]["reference_better_by"]) == pytest.approx(-0.4)  # numbers keep their sign
