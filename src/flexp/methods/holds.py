"""What a client of each method holds at its peak: which part of the model, and what besides.

Everybody's peak has the part's weights, the activations and gradients of a step, and one optimiser state over what is
trained. What comes on top, in copies of *what is trained* and in further optimiser states, follows from the method:

================  =======  ==========  =======================================================================
method            weights  optimisers  why, at the moment when a step's backward is under way
================  =======  ==========  =======================================================================
local, fedavg,          0           0  one model, trained in place; what is sent is what is there
fedavg-ft, fedper
fedrep                  0           0  two phases, whose optimisers are over disjoint parts of one model
hetlora                 0           0  adapters of the client's own rank, padded by the server
fedprox                 1           0  the received weights w, which the proximal term pulls to
pfedme                  1           0  w_i beside θ_i
ditto                   2           1  while w_k trains: the received w, v_k, and v_k's optimiser, which lasts
per-fedavg              1           0  first-order: w, while the modules hold u. Without an inner step (α = 0): none
                        3           0  hessian-free, at its fourth gradient: w, g, and ∇f(w + δg)
apfl                    2           1  w_i and v_i beside their mixture in the modules, each with an optimiser
flexp-sfl and           0           0  the client's part of the model (alignment's share is in the probe)
other split ones
================  =======  ==========  =======================================================================

Copies that are only on their way (a download, an upload) are not counted for anyone, nor is moving what rests to flash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexp.config import MethodConfig


@dataclass(frozen=True)
class Holds:
    """What a client holds.

    Attributes:
        part: ``whole``: all of the model. ``ends``: embeddings, blocks [0, s) and [e, L), norm and head. ``start``:
            embeddings and blocks [0, s), the rest being the server's. ``None``: no client trains.
        weights: further copies of what it trains.
        optimizers: further optimiser states over it.
    """

    part: Literal["whole", "ends", "start"] | None
    weights: int = 0
    optimizers: int = 0


HOLDS: dict[str, Holds] = {
    "flexp-sfl": Holds("ends"),
    "split-fedavg": Holds("ends"),
    "splitft": Holds("ends"),
    "splitfed-v1": Holds("start"),
    "splitfed-v2": Holds("start"),
    "splitlora": Holds("start"),
    "local": Holds("whole"),
    "fedavg": Holds("whole"),
    "fedavg-ft": Holds("whole"),
    "fedper": Holds("whole"),
    "fedrep": Holds("whole"),
    "hetlora": Holds("whole"),
    "fedprox": Holds("whole", weights=1),
    "pfedme": Holds("whole", weights=1),
    "ditto": Holds("whole", weights=2, optimizers=1),
    "per-fedavg": Holds("whole", weights=1),
    "apfl": Holds("whole", weights=2, optimizers=1),
    "centralized": Holds(None),
    "pretrained": Holds(None),
}
"""The table above, and which part of the model it is about."""


def holds(method: MethodConfig) -> Holds:
    """What a client of ``method`` with its settings holds."""
    if method.name == "per-fedavg":
        own = method.per_fedavg
        return Holds("whole", weights=0 if own.alpha == 0 else 3 if own.variant == "hessian-free" else 1)
    return HOLDS[method.name]
