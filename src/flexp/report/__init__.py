"""What a run leaves for people: its diary, scores, tables, plots, events and one HTML page.

Nothing heavy is imported here; ask the modules for what they hold.
"""

from __future__ import annotations

from pathlib import Path


def write_report(run_dir: Path) -> Path:
    """Build ``report.html`` from a run folder alone; see :func:`flexp.report.html.write_report`."""
    from flexp.report import html

    return html.write_report(run_dir)
