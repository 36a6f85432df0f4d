"""Whether blocks that a server gives do anything: looked at before they are used.

A server that lies can write blocks into what is pulled (``align.kind = "weights"``) that hand activations on, so that
what a deep cut sends is what a shallow one would. Blocks are therefore tried on random tokens, and compared with those
that the client began with: by how unlike what they make is to what they are given (1 − linear CKA, to which a rotation,
a scale and a shift of all tokens are no difference). A server that knows this can pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flexp.client.watching import cka
from flexp.errors import LinkError
from flexp.models.stage import Stage

TOKENS = 64
LEAST = 0.5
"""Of how unlike the client's own blocks made activations at the beginning; less is refused."""
CLEAR = 0.02
"""Below it a client's own blocks hand on nearly all themselves, and nothing is judged."""


class Trial:
    """Judges the aligned blocks of one client, [base, stop)."""

    def __init__(self) -> None:
        self._began: dict[tuple[int, int], float] = {}

    def check(
        self, stage: Stage, base: int, stop: int, personal: Mapping[str, nn.Parameter], pulled: Mapping[str, Tensor]
    ) -> None:
        """Refuse ``pulled`` weights of the blocks [base, stop) that hand activations on.

        Raises:
            LinkError: they do.
        """
        if stage.anatomy.image or not pulled:
            return
        if (base, stop) not in self._began:
            self._began[base, stop] = unlike(stage, base, stop)
        began = self._began[base, stop]
        if began < CLEAR:
            return
        with _holding(personal, pulled):
            now = unlike(stage, base, stop)
        if not now >= LEAST * began:
            raise LinkError(
                f"the server's blocks [{base}, {stop}) hand this client's activations on nearly as they come (changed "
                f"by {now:.3f}, by its own {began:.3f}), from which its texts could be read however deep it cuts; "
                "nothing was taken over"
            )


def unlike(stage: Stage, base: int, stop: int) -> float:
    """1 − CKA of what enters the blocks [base, stop) and what leaves them, for random tokens; without dropout."""
    model, training = stage.model, stage.model.training
    config = model.config.get_text_config()
    length = min(TOKENS, stage.longest or TOKENS)
    size, pad = int(config.vocab_size), getattr(config, "pad_token_id", None)
    ids_BT = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    ids_BT = (ids_BT if pad is None else torch.where(ids_BT == pad, (pad + 1) % size, ids_BT)).to(model.device)
    model.eval()
    try:
        with torch.no_grad():
            embedded_BTH, plan = stage.plan({"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)})
            given_BTH = stage.run(embedded_BTH, plan, 0, base)
            made_BTH = stage.run(given_BTH, plan, base, stop)
    finally:
        model.train(training)
    return 1 - cka(given_BTH.float().flatten(0, 1), made_BTH.float().flatten(0, 1))


@contextmanager
def _holding(personal: Mapping[str, nn.Parameter], pulled: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the ``with`` block parameters are the pulled values; nothing is copied that need not be."""
    own = {name: personal[name].data for name in pulled}
    try:
        for name, value in pulled.items():
            personal[name].data = value.to(own[name])
        yield
    finally:
        for name, value in own.items():
            personal[name].data = value
