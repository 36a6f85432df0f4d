"""Where a run's figures go besides its own folder: accelerate's trackers, all behind one method.

TensorBoard has a run for each client, so that clients lie over one another in one chart. MLflow and Weights & Biases
have one run for all, in which a client's figures are called ``NAME/train/loss``; where they go is their own business
(``MLFLOW_TRACKING_URI``, ``WANDB_MODE=offline``): without an address MLflow writes into the run's folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import tracking

from flexp.errors import ConfigError
from flexp.files import read_json, write_json

PROJECT = "flexp"
"""The experiment of MLflow, and the project of Weights & Biases."""
FILE = "trackers.json"
"""Beside the run: under which identity it was begun, for whoever resumes it."""


class OneRun:
    """A tracker with one run for all clients.

    Args:
        kind: ``mlflow`` or ``wandb``.
        folder: the run's.
        settings: written down when the run begins.

    Raises:
        ConfigError: the package is not there, or the tracker cannot begin.
    """

    def __init__(self, kind: str, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.kind = kind
        if not {"mlflow": tracking.is_mlflow_available, "wandb": tracking.is_wandb_available}[kind]():
            raise ConfigError(f"output.report_to: {kind} is not installed: pip install 'flexp[trackers]'")
        known = read_json(folder / FILE) if (folder / FILE).is_file() else {}
        try:
            self._tracker = self._begin(folder, name, known.get(kind))
            if kind not in known:
                self._tracker.store_init_configuration(dict(settings))
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"output.report_to: {kind} cannot begin ({first})") from error
        run = self._tracker.tracker
        write_json(folder / FILE, {**known, kind: run.info.run_id if kind == "mlflow" else run.id})

    def _begin(self, folder: Path, name: str, known: str | None) -> Any:
        tracker: Any
        if self.kind == "mlflow":
            import mlflow

            if "MLFLOW_TRACKING_URI" not in os.environ:
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no data base
                mlflow.set_tracking_uri((folder / "mlruns").absolute().as_uri())
            tracker = tracking.MLflowTracker(PROJECT, run_id=known, run_name=None if known else name)
        else:
            tracker = tracking.WandBTracker(PROJECT, name=name, dir=str(folder), id=known, resume="allow")
        tracker.start()
        return tracker

    def log(self, whose: str, values: Mapping[str, float], step: int) -> None:
        """Figures of a client, or of all, at its own step."""
        named = {f"{whose}/{key}": value for key, value in values.items()}
        if self.kind == "mlflow":  # which allows few signs in names
            self._tracker.log({re.sub(r"[^\w./ -]", "-", key): value for key, value in named.items()}, step=step)
        else:  # whose own steps only rise, while every client counts its own
            self._tracker.log({**named, f"{whose}/step": step})

    def finish(self) -> None:
        """The run is over, or stopped."""
        self._tracker.finish()


def event_files(folder: Path, name: str, purge: int | None) -> Any:
    """TensorBoard's tracker for the run ``name`` below ``folder``; what is later than step ``purge`` is forgotten."""
    tracker = tracking.TensorBoardTracker(name, folder, purge_step=purge)
    tracker.start()
    return tracker
