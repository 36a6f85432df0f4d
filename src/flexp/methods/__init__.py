"""The methods: one file each, behind the Protocol of :mod:`flexp.methods.base`."""

from __future__ import annotations

from collections.abc import Callable

from flexp.methods.apfl import Apfl
from flexp.methods.base import Account, Method, World
from flexp.methods.centralized import Centralized
from flexp.methods.ditto import Ditto
from flexp.methods.fedavg import FedAvg
from flexp.methods.fedavg_ft import FedAvgFt
from flexp.methods.fedper import FedPer
from flexp.methods.fedprox import FedProx
from flexp.methods.fedrep import FedRep
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.hetlora import HetLora
from flexp.methods.local import Local
from flexp.methods.per_fedavg import PerFedAvg
from flexp.methods.pfedme import PFedMe
from flexp.methods.pretrained import Pretrained
from flexp.methods.split_fedavg import SplitFedAvg
from flexp.methods.splitfed_v1 import SplitFedV1
from flexp.methods.splitfed_v2 import SplitFedV2
from flexp.methods.splitft import SplitFt
from flexp.methods.splitlora import SplitLora

METHODS: dict[str, Callable[[World], Method]] = {
    "flexp-sfl": FlexpSfl,
    "local": Local,
    "centralized": Centralized,
    "pretrained": Pretrained,
    "fedavg": FedAvg,
    "fedavg-ft": FedAvgFt,
    "fedprox": FedProx,
    "pfedme": PFedMe,
    "ditto": Ditto,
    "fedper": FedPer,
    "fedrep": FedRep,
    "per-fedavg": PerFedAvg,
    "apfl": Apfl,
    "splitfed-v1": SplitFedV1,
    "splitfed-v2": SplitFedV2,
    "splitlora": SplitLora,
    "split-fedavg": SplitFedAvg,
    "splitft": SplitFt,
    "hetlora": HetLora,
}

__all__ = ["METHODS", "Account", "FlexpSfl", "Local", "Method", "World"]
