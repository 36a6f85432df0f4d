"""One module per asset: from the members of a package to files that FlexP reads. Here is what they share."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_rows(path: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Write ``rows`` to ``path`` (JSON lines, UTF-8); return number, columns, labels by client."""
    labels: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    columns: list[str] = []
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            columns = columns or list(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            labels[str(row["client"])][str(row.get("label", "rows"))] += 1
            count += 1
    clients = {client: dict(sorted(counts.items())) for client, counts in labels.items()}
    return {"rows": count, "columns": columns, "clients": clients}


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space."""
    return " ".join(text.split())
