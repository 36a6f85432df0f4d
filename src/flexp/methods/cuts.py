"""Where each method really cuts: some have one cut for all clients, whatever each could afford for itself.

A :class:`~flexp.methods.base.World` holds these cuts, so that memory, operations and the summary are about what runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexp.config import RunConfig
from flexp.errors import ConfigError
from flexp.models.parts import check_cut

Cuts = dict[str, tuple[int, int]]

L_SHAPED = frozenset({"splitfed-v1", "splitfed-v2", "splitlora"})
"""Methods whose server has everything behind one s, labels included."""


def method_cuts(config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> Cuts:
    """(s, e) of each client in the method of ``config``; applied once more, it changes nothing.

    Args:
        cuts: what ``data.clients.cuts`` says.
        blocks: of the model.

    Raises:
        ConfigError: the method's own cut does not fit the model, or would send bare embeddings unasked.
    """
    name = config.method.name
    if name == "split-fedavg":
        return dict.fromkeys(cuts, (min(start for start, _ in cuts.values()), max(stop for _, stop in cuts.values())))
    if name in L_SHAPED:
        return dict.fromkeys(cuts, (_one_start(config, cuts, blocks), blocks))
    return dict(cuts)


def base_depth(config: RunConfig, cuts: Mapping[str, tuple[int, int]]) -> int:
    """s_min of FlexP-SFL's server: as configured, else the smallest s, or 1 where cuts may move."""
    if config.model.base_depth is not None:
        return config.model.base_depth
    return 1 if config.recut.on else min(start for start, _ in cuts.values())


def _one_start(config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> int:
    """s as the method's ``cut`` says, else the smallest of the clients', so that it fits every device."""
    method = config.method
    wanted = method.splitlora.cut if method.name == "splitlora" else method.splitfed.cut
    start = min(start for start, _ in cuts.values()) if wanted is None else wanted
    start, _ = check_cut((start, None), blocks, where=f"method {method.name}: cut")
    if start == 0 and not config.model.expose_embeddings:
        raise ConfigError(
            f"method {method.name}: with a cut of 0 the clients would send their embeddings as they are, from which "
            "the server can read every token; use 1 or more, or set model.expose_embeddings = true if that is "
            "acceptable"
        )
    return start
