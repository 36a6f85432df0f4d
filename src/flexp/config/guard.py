"""The part of a run's schema that says which gradients the server refuses, and what happens to who keeps sending them.

:mod:`flexp.config.run` gives this name as well; whoever reads the configuration imports that.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from flexp.config.section import Rate, Section

Factor = Annotated[float, Field(gt=1.0)]


class GuardConfig(Section):
    """Bounds on what a client's step may do to the shared blocks. Norms are global, of a whole step's gradient."""

    max_norm: Rate | None = None  # a larger norm is refused; None: no bound
    clip: Rate | None = None  # a larger norm is scaled down to it, step by step, before anything is averaged
    explode: Factor | None = 1000.0  # more than so many times the median of the norms accepted last is refused
    median_over: PositiveInt = 64  # norms that the median is of, all clients' together
    settle: PositiveInt = 16  # steps to be accepted before explode means anything
    strikes: PositiveInt = 5  # bad requests of a client …
    within: PositiveInt = 100  # … among so many of its last, and it is put aside
    aside_seconds: Rate | None = 3600.0  # for so long; None: until the operator lets it in again (flexp readmit)
