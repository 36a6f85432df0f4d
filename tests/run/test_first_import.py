"""What a client's process imports before its model: neither what others do nor what few runs ask for."""

from __future__ import annotations

import subprocess
import sys

NOT_ITS_OWN = (
    "flexp.server", "flexp.audit", "flexp.planner", "flexp.methods.split",
    "bitsandbytes", "datasets", "flwr_datasets", "grpc", "pandas", "peft", "plotly", "sklearn", "tensorboard",
)  # fmt: skip


def test_a_client_brings_no_server_no_planner_and_no_heavy_library() -> None:
    code = (
        "import sys, flexp.cli.main, flexp.run.client, flexp.run.settle; "
        f"found = sorted(set({NOT_ITS_OWN!r}) & set(sys.modules)); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
