"""What the server keeps of a client between its sessions: who comes back goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexp.links.coding import load_residuals, save_residuals
from flexp.rng import RandomStream, derived_seed
from flexp.server.progress import Progress


@dataclass
class Regular:
    """One client: its dropout on this side, its steps, what error feedback owes it, and the cut it joined with last."""

    random: RandomStream
    progress: Progress = field(default_factory=Progress)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    cut: tuple[int, int] | None = None

    def numbered(self, numbering: int) -> Progress:
        """Its progress in the run whose steps it numbers so; if that is another run, it begins anew."""
        if not self.progress.goes_on(numbering):
            self.progress = Progress(numbering)
        return self.progress

    def cuts(self, cut: tuple[int, int]) -> None:
        """It joins with that cut. Answers to steps with another one would be wrong: a step that comes again is computed
        again, and not applied again."""
        if self.cut not in (None, cut):
            self.progress.forget(self.progress.newest)
        self.cut = cut


class Regulars(dict[str, Regular]):
    """All clients that ever joined, by name.

    Args:
        seed: of the clients' dropout.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self._seed, self._device = seed, device

    def __missing__(self, client: str) -> Regular:
        random = RandomStream(derived_seed(self._seed, "server", client), self._device)
        self[client] = Regular(random)
        return self[client]

    def state(self, begun: Mapping[str, Tensor], *, progress: bool) -> dict[str, Tensor]:
        """As flat named tensors.

        Args:
            begun: the random generators' states of clients in the middle of a step, when it began.
            progress: whether their steps are part of it.
        """
        flat: dict[str, Tensor] = {}
        for name, regular in self.items():
            flat[f"random/{name}"] = begun.get(name, regular.random.state)
            if progress:
                flat[f"progress/{name}"] = regular.progress.state()
            flat |= save_residuals(regular.residuals, f"residuals/{name}/")
        return flat

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, whose entries may stand among others."""
        owed: dict[str, dict[str, Tensor]] = {name: {} for name in self}
        for regular in self.values():
            regular.progress = Progress()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "random":
                self[name].random.state = value
            elif kind == "progress":
                self[name].progress = Progress.restored(value)
            elif kind == "residuals":
                name, _, what = name.rpartition("/")
                owed.setdefault(name, {})[what] = value
        for name, residuals in owed.items():
            load_residuals(self[name].residuals, residuals)
