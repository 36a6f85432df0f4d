"""FlexP-SFL: flexible personalized split federated learning (Yuan et al., 2025, arXiv 2508.10349).

Every client keeps as many blocks as its cut says (:mod:`flexp.methods.split`). Personal parts are never averaged,
nobody waits for anybody, and an alignment term ties the personal copies of the blocks [s_min, s) to the server's
(``method.align``). Cuts may move while it trains (``recut``).
"""

from __future__ import annotations

from dataclasses import replace

from flexp.config import RunConfig
from flexp.cost.clock import Schedule
from flexp.methods.base import Deployed
from flexp.methods.split import Split


class FlexpSfl(Split):
    """Split learning with personal ends, aligned with the shared middle (Yuan et al., 2025)."""

    name = "flexp-sfl"
    timing = Schedule("split-async")
    aligns = True
    recuts = True
    own_classifiers = True
    guards = True
    deployed = Deployed()

    @classmethod
    def schedule(cls, config: RunConfig) -> Schedule:
        align = config.method.align
        return replace(cls.timing, pull_every=align.every if align.kind == "weights" else 0)
