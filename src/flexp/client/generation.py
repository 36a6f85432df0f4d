"""Answers of a split model, written with transformers' own ``generate``.

The client's model is the Hugging Face model itself, with its own class, cache and sampling. While it writes, the first
block that the server runs sends what reaches it and gives back what comes out of the last one; the others in between
let it pass. So one ``forward`` of the model is one exchange, and nothing of ``generate`` has to be written anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from flexp.client.exchange import waiting
from flexp.client.joined import JoinedModel
from flexp.errors import ConfigError, LinkError, LinkLostError, ModelError
from flexp.links.asking import EndGeneration, ExtendRequest
from flexp.links.base import Link, ask
from flexp.links.packing import sent, unpack, without_padding
from flexp.models.batches import NEED_ALL_BLOCKS
from flexp.models.caching import PartCache, check_cached
from flexp.models.execution import given_back, shadowed
from flexp.rng import current_turn

_numbers = itertools.count(1)


class SplitCache(PartCache):
    """The keys and values of the client's own blocks for one answer, and what the server needs to have those of its.

    Kept besides: all activations that went up, so that a server that lost its cache gets them again in one message.
    """

    def __init__(self, model: JoinedModel) -> None:
        super().__init__(model.model, model.stage.part.blocks)
        self.generation, self.trained = next(_numbers), model.trained
        self.sent: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self.rows_B: Tensor | None = None  # the order of rows since the last exchange

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.sent:
            rows = torch.arange(self.sent[-1][0].shape[0], device=self.sent[-1][0].device)
            self._reorder(rows.repeat_interleave(repeats))

    def request(self, new: tuple[Tensor, Tensor | None, Tensor | None]) -> ExtendRequest:
        """What the server needs to go on; it counts as sent from now on."""
        rows, self.rows_B = self.rows_B, None
        past = sum(z_BTH.shape[1] for z_BTH, *_ in self.sent)
        z_BTH, mask_BT, positions_BT = new
        if positions_BT is not None:
            positions_BT = positions_BT.expand(z_BTH.shape[0], -1)  # one row for all cannot be reordered
        self.sent.append((z_BTH, mask_BT, positions_BT))
        return ExtendRequest(self.generation, past, *new, rows_B=rows if past else None)

    def everything(self) -> ExtendRequest:
        """What a server needs that has nothing of this answer."""
        parts = [[part[kind] for part in self.sent] for kind in range(3)]
        joined = [None if values[0] is None else torch.cat(values, dim=1) for values in parts]  # type: ignore[arg-type]
        assert joined[0] is not None
        return ExtendRequest(self.generation, 0, joined[0], joined[1], joined[2])

    def _reorder(self, rows: Tensor) -> None:
        rows = rows.to(torch.int64)  # beam search counts in int32
        self.rows_B = rows.clone() if self.rows_B is None else self.rows_B[rows]
        self.sent = [tuple(value if value is None else value[rows] for value in part) for part in self.sent]  # type: ignore[misc]


class SplitGenerator:
    """Writes answers with a split causal language model.

    Args:
        model: joined; its link carries the answers.
        reconnect: gives a new link when the old one broke in the middle of an answer, which then goes on.

    Raises:
        ModelError: the model is none that writes, or keeps more than keys and values between two tokens.
    """

    def __init__(self, model: JoinedModel, reconnect: Callable[[], Link] | None = None) -> None:
        if not model.model.can_generate():
            raise ModelError(f"{type(model.model).__name__} writes no text; use a causal language model")
        if model.guard is not None:
            if model.guard.noise is not None:
                raise ConfigError(
                    "privacy.noise covers whole texts, and an answer is sent token by token: leave it out"
                )
            model.guard.teach(model.stage, model.cut[0], model.steps.done)  # before anything is sent
        self.split = model
        self.reconnect = reconnect
        self.rebuilt = 0  # how often a server got an answer anew
        check_cached(model.stage)
        self.model.generation_config.cache_implementation = None  # what a checkpoint says there is for whole models

    @property
    def model(self) -> Any:
        """The client's part of the Hugging Face model."""
        return self.split.model

    @property
    def device(self) -> torch.device:
        """Where the client's part computes."""
        return self.split.device

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """transformers' ``generate``, with all of its options but those that need every block in one place.

        ``past_key_values`` may be a cache of :meth:`new_cache`, to go on with later; whoever made it ends it.

        Raises:
            ConfigError: an option cannot be had of a split model.
            LinkError: the server refuses, or cannot be reached any more.
        """
        settings = options.get("generation_config") or self.model.generation_config
        for key in NEED_ALL_BLOCKS:
            if options.get(key, getattr(settings, key, None)):
                raise ConfigError(f"{key} was asked for, but a split model has its blocks in several places")
        chosen = options.get("cache_implementation") or settings.cache_implementation
        if options.get("use_cache") is False or chosen:
            raise ConfigError("a split model writes with its own cache: leave out use_cache and cache_implementation")
        given = options.pop("past_key_values", None)
        cache = given or self.new_cache()
        try:
            with self.writing():
                return self.model.generate(*inputs, **{"use_cache": True, **options}, past_key_values=cache)
        finally:
            if given is None:
                self.end(cache)

    def forward(self, **inputs: Any) -> Any:
        """One ``forward`` of the model on new tokens, with a cache of :meth:`new_cache` as ``past_key_values``."""
        with torch.no_grad(), self.writing():
            return self.model(**{"use_cache": True, **inputs})

    __call__ = forward

    def new_cache(self) -> SplitCache:
        """For one answer."""
        return SplitCache(self.split)

    def end(self, cache: SplitCache) -> None:
        """Let the server forget an answer."""
        with suppress(LinkError):
            ask(self.split.link, EndGeneration(cache.generation))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the ``with`` block the client's model answers as if it were whole, given a cache of this class."""
        stage, (start, stop) = self.split.stage, self.split.cut
        now: dict[str, Any] = {}

        def remember(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            if not isinstance(inputs.get("past_key_values"), SplitCache):
                raise ModelError("a split model needs past_key_values = new_cache() in every forward while it writes")
            now.clear()
            now.update(inputs)

        def remote(*args: Any, **kwargs: Any) -> Any:
            z_BTH = args[0] if args else kwargs["hidden_states"]
            cache: SplitCache = now["past_key_values"]
            mask, positions = now.get("attention_mask"), now.get("position_ids")
            h_BTH = self._extend(cache, z_BTH, mask, positions)
            return given_back(h_BTH, stage._tuples or 0)

        def passing(*args: Any, **kwargs: Any) -> Any:
            return given_back(args[0] if args else kwargs["hidden_states"], stage._tuples or 0)

        own = [block.forward for block in stage.blocks]
        forwards = [*own[:start], remote, *[passing] * (stop - start - 1), *own[stop:]]
        mode = self.split.training
        self.split.eval()
        handle = self.model.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            with shadowed(stage.blocks, forwards), stage.computing():
                yield
        finally:
            handle.remove()
            self.split.train(mode)

    def _extend(self, cache: SplitCache, z_BTH: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        new = z_BTH.shape[1]
        mask_BT = None if mask is None else mask[:, -new:].contiguous()
        request = cache.request((z_BTH.detach(), mask_BT, positions))
        cache.advance(new)
        try:
            return self._ask(request)
        except LinkError as error:
            return self._rebuild(cache, error)[:, -new:]

    def _ask(self, request: ExtendRequest) -> Tensor:
        link, mask_BT = self.split.link, request.mask_BT
        ends = mask_BT is not None and bool(mask_BT[:, -1].all())  # else the next token is read off padding
        kept = without_padding(mask_BT) if ends and self.split.ignores_padding else None
        with waiting(link, current_turn(), train=False):
            return unpack(link.call(sent(request, kept)).result().hidden_BTH, kept)

    def _rebuild(self, cache: SplitCache, why: LinkError) -> Tensor:
        """Send the whole answer to a server that has lost it, over a new link if the old one is broken."""
        if not isinstance(why, LinkLostError):
            self.split.check_trained(cache.trained)
            try:
                return self._ask_anew(cache)
            except LinkLostError as error:
                why = error
            except LinkError as error:
                raise why from error  # what is refused whole and in part is refused for the first reason
        if self.reconnect is None:
            raise why
        return self.split.again(lambda: self._ask_anew(cache), self.reconnect, why)

    def _ask_anew(self, cache: SplitCache) -> Tensor:
        self.split.check_trained(cache.trained)
        hidden_BTH = self._ask(cache.everything())
        self.rebuilt += 1
        return hidden_BTH
