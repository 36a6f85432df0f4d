"""A run's report: one HTML file that holds everything it needs, works offline and loads nothing from anywhere.

The page is a pure function of the run folder: equal folders give equal pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexp.errors import StorageError
from flexp.files import read_json, write_text
from flexp.report import formats, metrics, pages, plots, scores, tables
from flexp.report.metrics import Record
from flexp.report.summary import SCHEMA, UNKNOWN

FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Build ``report.html`` from a run folder alone and return its path.

    Needs ``summary.json``; ``metrics.jsonl`` and ``config.json`` are used where they exist.

    Raises:
        StorageError: the folder holds no readable summary of this version, or the page cannot be written.
    """
    run_dir = Path(run_dir)
    source = run_dir / "summary.json"
    if not source.is_file():
        raise StorageError(f"{run_dir}: has no summary.json; expected the folder of a run that has been evaluated")
    summary = read_json(source)
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        found = summary.get("schema") if isinstance(summary, dict) else None
        raise StorageError(
            f"{source}: has schema {found!r}, expected {SCHEMA}; "
            "use the version of FlexP that wrote it, or run it again"
        )
    diary, config = run_dir / "metrics.jsonl", run_dir / "config.json"
    records = metrics.read(diary) if diary.is_file() else []
    resolved = read_json(config) if config.is_file() else None
    try:
        text = render(summary, records, resolved)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(
            f"{run_dir}: summary.json or metrics.jsonl is not as FlexP writes it "
            f"({type(error).__name__}: {error}); restore them, or run again"
        ) from error
    write_text(run_dir / FILE, text)
    return run_dir / FILE


def render(summary: Mapping[str, Any], records: Sequence[Record], config: Any | None) -> str:
    """The whole page as text."""
    model = summary["model"]
    unfinished = "This run is not finished. The page shows what was recorded until its last evaluation."
    return pages.page(
        "report.html.j2",
        kind="report",
        name=summary["name"],
        facts=[
            f"method {summary['method']}",
            f"model {model['id']} ({model['blocks']} blocks, {formats.count(model['parameters'])} parameters)",
            f"{model['tuning']} tuning in {model['dtype']}",
            formats.plural(len(summary["clients"]), "client"),
            formats.plural(summary["rounds"], "round"),
            f"seed {summary['seed']}",
            f"what the server can read: {summary.get('server_reads', UNKNOWN)}",
            *([f"privacy: {summary['epsilon']['line']}"] if "epsilon" in summary else []),
        ],
        warnings=[*([] if summary["finished"] else [unfinished]), *summary.get("warnings", [])],
        run=summary,
        client_table=tables.clients(summary),
        score_tables=scores.of_clients(records, str(summary["metric"])),
        figures=plots.all_plots(summary, records),
        machine={**summary["machine"], **summary["versions"]},
        config=config,
        version=summary["versions"].get("flexp", ""),
        source="the run folder",
    )
