"""What gaussian noise guarantees."""

from __future__ import annotations

import math

DELTA = 1e-5
"""δ of what is told."""


def epsilon(mu: float, delta: float = DELTA) -> float:
    """ε of two gaussians of deviation 1 whose means are ``mu`` apart: the gaussian mechanism, analytically (Balle and
    Wang, 2018, arXiv 1805.06530, theorem 8). Of several releases, each of which may depend on the earlier ones, the
    squares of ``mu`` add up, exactly (Dong et al., 2019, arXiv 1905.02383).
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def over(eps: float) -> float:
        first = math.exp(log_ndtr(mu / 2 - eps / mu))
        return first - math.exp(min(eps + log_ndtr(-mu / 2 - eps / mu), 0.0)) - delta

    return 0.0 if mu == 0 or over(0.0) <= 0 else float(brentq(over, 0.0, mu * mu / 2 + 10 * mu + 10))
