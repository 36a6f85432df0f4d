"""Probes in processes that need not import everything anew."""

from __future__ import annotations

import json
from dataclasses import asdict

from flexp.cost.probe import Measured, Probe
from tests import warm


def warmly(probe: Probe) -> Measured:
    """:func:`flexp.cost.probe.measure` in a fork. A few MB more than there: pages of the libraries' code count anew."""
    done = warm.run(["-m", "flexp.cost.echo", json.dumps(asdict(probe))])
    assert done.returncode == 0, done.stderr
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))
