"""MMLU's test split (Hendrycks et al. 2021, arXiv 2009.03300): 57 subjects, four choices each.

Four fields group the subjects, as its authors do; they are the natural clients. Fifty-seven clients are to be
had with the column ``subject``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from flexp.assets.converters import Row, write_rows
from flexp.errors import AssetError

_FIELDS = {
    "stem": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics "
        "electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
        "high_school_computer_science high_school_mathematics high_school_physics "
        "high_school_statistics machine_learning "
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history "
        "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy "
        "prehistory professional_law world_religions "
    ),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics "
        "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
        "professional_psychology public_relations security_studies sociology us_foreign_policy "
    ),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
        "marketing medical_genetics miscellaneous nutrition professional_accounting "
        "professional_medicine virology "
    ),
}
FIELD_OF = {subject: field for field, subjects in _FIELDS.items() for subject in subjects.split()}
"""The field of every subject."""


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Write ``mmlu.jsonl``: prompt, choices (four texts), label ("A" to "D"), subject, client (the field)."""
    rows: list[Row] = []
    for path in sorted(source.rglob("*_test.csv")):
        rows += _read(path, path.name.removesuffix("_test.csv"))
    return write_rows(target / "mmlu.jsonl", rows)


def _read(path: Path, subject: str) -> list[Row]:
    if subject not in FIELD_OF:
        raise AssetError(f"{path.name}: {subject!r} is no subject of MMLU")
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.reader(file), start=1):
            if len(line) != 6 or line[5] not in {"A", "B", "C", "D"}:
                raise AssetError(f"{path.name}, row {number}: expected a question, four choices and a letter")
            question, *choices, answer = (field.strip() for field in line)
            rows.append(
                {
                    "prompt": question,
                    "choices": choices,
                    "label": answer,
                    "subject": subject,
                    "client": FIELD_OF[subject],
                }
            )
    return rows
