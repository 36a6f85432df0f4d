"""FedAvg: federated averaging (McMahan et al., AISTATS 2017, arXiv 1602.05629).

Every round each client takes local steps from the global weights w and the server averages what comes back:

    w_k ← w,  w_k ← w_k − η ∇f_k(w_k; batch)  ``train.steps_per_round`` times,    w ← Σ n_k/n · w_k

The personal model of every client is w. Budget: exact. With one client and one round it is local training.
"""

from __future__ import annotations

from typing import ClassVar

from flexp.methods.base import Deployed
from flexp.methods.federated import Federated


class FedAvg(Federated):
    """Federated averaging: one global model (McMahan et al., 2017)."""

    name = "fedavg"
    same_for_all = True
    effort = 0.8
    deployed: ClassVar[Deployed | None] = Deployed(averages=True, middle=False)
