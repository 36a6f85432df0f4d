"""A model whose middle runs on a server, used like any other Hugging Face model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexp.client.exchange import OneWayCall, Piece, RemoteCall
from flexp.client.joined import JoinedModel
from flexp.client.once import request_moved, request_once, right_padded, standing
from flexp.client.watching import most_alignment
from flexp.errors import ConfigError, LinkError
from flexp.kinds import KINDS, ModelKind
from flexp.links.messages import ForwardRequest
from flexp.links.packing import Places, without_padding
from flexp.models.batches import PER_TOKEN, labelled, refuse_cache
from flexp.models.execution import ExecutionPlan
from flexp.models.pooling import pooled_texts

log = logging.getLogger("flexp")


@dataclass(frozen=True)
class Sent:
    """What :meth:`SplitModel.head` leaves for :meth:`SplitModel.tail`: an exchange on its way."""

    call: RemoteCall
    z_BTH: Tensor
    inner_BTH: tuple[Tensor, ...]
    inputs: Mapping[str, Any]
    plan: ExecutionPlan


class SplitModel(JoinedModel):
    """The client's stage with the server in its middle.

    ``forward`` takes what the Hugging Face model takes and gives what it gives; ``loss.backward()`` trains the personal
    parameters here and the shared ones on the server.

    Args:
        stage: the client's ends and blocks, tuned already.
        cut: (s, e).
        link: to the server, which is joined at once.
        align: the alignment, whose gradient the server computes.
        tuning: how ``stage`` was tuned.
        lora: with what adapters; the server's must be the same.
        accumulation: exchanges of a step, for loops of one's own without :meth:`part_of_step`; a Trainer's are known.
        expose_embeddings: whether bare embeddings may go up, from which the server can read every token.
        numbering: of an earlier life of this client, whose steps it goes on with; ``None``: it begins anew.
        codec: in what form tensors cross; ``None``: as they are inside one process, bfloat16 over a network, or what
            :func:`flexp.connect` was told.
        cache: where the server keeps z of an example, which then crosses once, if nothing that makes it is trained.
        reuse: with ``cache``, the share of its norm by which z of an example must have moved to go up again, where
            something that makes it is trained; 0: it goes up each time.
        rows: which rows of h cross where no block comes after them: all but padding (``all``), those that logits depend
            on (``logits``), or of those that a training loss reads (``loss``), when other tokens' logits mean nothing.
        base_depth: the s_min that the server must have; ``None``: the one that it says on joining first. Later it may
            say no other, since what goes up for alignment comes out of block s_min − 1.
        pools: of each text one vector goes up, the mean of its tokens, and all blocks after s go on with that one
            (``privacy.pool``; for classifiers that read the mean).
        gradients: whether ∂task/∂h goes up (``privacy.gradients``). Without, nothing below the cut may be trained, and
            the server's blocks run as in evaluation.

    Raises:
        ConfigError: bare embeddings would go up.
        LinkError: the server refuses this client.
    """

    kind: ClassVar[ModelKind]

    @property
    def whole(self) -> bool:
        """Whether all of the model is here, and nothing of it crosses: cut (L, L)."""
        return self.cut[0] == self.stage.anatomy.blocks

    @property
    def base_model(self) -> Callable[..., Any]:
        """The same without the head, for loops that apply the head themselves (trl)."""
        return lambda **inputs: self.tail(self.head(inputs, headless=True), headless=True)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """As of the model inside. A Trainer asks while it is made, which is when its callback has to come in."""
        from flexp.client.trainers import attend

        attend()
        return super().accepts_loss_kwargs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The whole model's output for a batch, with ``loss`` when ``labels`` are given. Labels stay here.

        Logits at padding are others than the whole model's, since nothing of it crosses. Without gradients the server's
        blocks run as in evaluation, in train mode, too. ``past_key_values`` stays ``None``: write with ``generate``.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
            "labels": labels,
        }
        inputs = {key: value for key, value in {**named, **others}.items() if value is not None}
        if self.whole:
            refuse_cache(inputs)
            with self.stage.computing():
                return self.stage.model(**(self.stage.placed(inputs) | self.stage.no_cache))
        return self.tail(self.head(inputs))

    def head(self, inputs: Mapping[str, Any], *, headless: bool = False) -> Sent:
        """Run embeddings and blocks [0, s) and send the activation: z_base = head[0, s_min), z = head[s_min, s).

        ``headless``: :meth:`tail` will be asked for neither head nor loss.
        """
        train = self.training and torch.is_grad_enabled()
        self._check_place()
        if train:
            if self.steps.piece is None:  # loops that know nothing of FlexP
                self.steps.refuse_half_steps(self.stage.trainable().values())
            self.after_step()
        start, base_depth = self.cut[0], self.base_depth
        if self.guard is not None:
            self.guard.teach(self.stage, start, self.steps.done)  # before anything is sent
            inputs = self.guard.told(inputs) if train else inputs
        align_now = train and self._align_due()
        inner = align_now and self.align.has_term and self.align.at == "every-block"  # teaching needs z_base alone
        embedded_BTH, plan = self.stage.plan(inputs)
        if train and not align_now and self._may_cross_once(inputs, embedded_BTH):
            sent = self._head_once(inputs, embedded_BTH, plan, headless=headless)
            if sent is not None:
                return sent
        base_BTH = z_BTH = self.stage.run(embedded_BTH, plan, 0, min(base_depth, start))
        inner_BTH: list[Tensor] = []
        for index in range(base_depth, start - 1) if inner else ():
            z_BTH = self.stage.run(z_BTH, plan, index, index + 1)
            inner_BTH.append(z_BTH)
        if base_depth + len(inner_BTH) < start:
            z_BTH = self.stage.run(z_BTH, plan, base_depth + len(inner_BTH), start)
        texts = inputs
        if self.pools:
            z_BTH, inputs, plan = pooled_texts(self.stage, z_BTH, inputs)
        if self.guard is not None and self.guard.config.of_texts:
            z_BTH = self.guard.sent(texts["input_ids"], texts.get("attention_mask"), z_BTH)
        one_way = train and not self.gradients
        if one_way:
            self._refuse_trained_head()
            z_BTH = z_BTH.detach()  # gradient checkpointing has the embeddings ask for a gradient
        back = z_BTH.requires_grad
        if train and not (back or one_way):
            z_BTH = z_BTH.detach().requires_grad_()  # the server's blocks need a backward even if nothing here does
        examples = self._numbered(inputs) if train and self.reuse and not align_now else ()
        kept, rows_BT = self._crossing(inputs, plan, z_BTH, train=train, headless=headless)
        place = self.steps.place(self.kind, inputs) if train else None
        request = ForwardRequest(
            exchange=0 if place is None else place.exchange,
            hidden_BTH=z_BTH.detach(),
            mask_BT=inputs.get("attention_mask"),
            positions_BT=inputs.get("position_ids"),
            base_BTH=base_BTH.detach() if align_now else None,
            inner_BTH=tuple(value.detach() for value in inner_BTH),
            rows_BT=rows_BT,
            train=train and not one_way,
            step=0 if place is None else place.step,
        )
        crosses = None
        if examples and (kept is not None or bool(inputs["attention_mask"].all())):
            request, crosses = request_moved(request, examples, self.sent, self.known, self.reuse)
            kept = Places.of(inputs["attention_mask"])
        look = None if self.watch is None else self._look
        own_BTH = None
        if self.guard is not None and self.guard.penalises and place is not None:
            ids_BT, mask_BT = inputs["input_ids"], inputs.get("attention_mask")
            own_BTH = place.tokens * self.guard.gradient(
                self.stage, ids_BT, mask_BT, z_BTH, (place.step, place.exchange)
            )
        made = OneWayCall if one_way else RemoteCall
        call = made(self.link, request, place, back=back, look=look, own_BTH=own_BTH, kept=kept, crosses=crosses)
        if train:
            self.steps.remember(call)
        return Sent(call, z_BTH, tuple(inner_BTH), inputs, plan)

    def _check_place(self) -> None:
        """Refuse to go on where another model has taken this one's place, which would be answered in its stead: one
        has joined a server in this process under the same name since. (Over a network nobody can.)"""
        known = None if self.behind is None else self.behind.clients.get(self.joined_as)
        if known is not None and known.progress.numbering != self.steps.numbering:
            raise LinkError(
                f"another model has joined this server as client {self.joined_as!r} since, and has this one's place; "
                "give each a name of its own (server.connect)"
            )

    def _refuse_trained_head(self) -> None:
        trained = [name for name in self.stage.trainable() if self.stage.within(name, 0, self.cut[0])]
        if trained:
            raise ConfigError(f"privacy.gradients = false: {trained[0]} below the cut is trained, expected nothing")

    def _numbered(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        """The numbers of a batch's examples, if they have any and a server could keep z of each."""
        piece, mask_BT = self.steps.piece, inputs.get("attention_mask")
        if self.cache == "off" or self.guard is not None or not self.gradients or piece is None or mask_BT is None:
            return ()
        whole = self.ignores_padding and right_padded(mask_BT) and "position_ids" not in inputs
        return piece.examples if whole and "input_ids" in inputs and len(piece.examples) == len(mask_BT) else ()

    def _may_cross_once(self, inputs: Mapping[str, Any], embedded_BTH: Tensor) -> bool:
        """Whether the examples have numbers, and nothing of what makes their z is trained."""
        if not self._numbered(inputs):
            return False
        made_by = None if embedded_BTH.requires_grad else standing(self.stage, self.cut[0])
        if made_by != self.known_of:  # somebody has trained or loaded a head meanwhile
            self.known, self.known_of = set(), made_by
        return made_by is not None

    def _head_once(
        self, inputs: Mapping[str, Any], embedded_BTH: Tensor, plan: ExecutionPlan, *, headless: bool
    ) -> Sent | None:
        """:meth:`head` for examples that the server may keep; ``None``: their z is another one each time (dropout)."""
        mask_BT = inputs["attention_mask"]
        kept, rows_BT = self._crossing(inputs, plan, embedded_BTH, train=True, headless=headless)
        if kept is None and not bool(mask_BT.all()):
            return None  # padding is read
        place = self.steps.place(self.kind, inputs)
        like_BTH = embedded_BTH.new_zeros(1).expand(embedded_BTH.shape)  # of the size that would cross
        whole = ForwardRequest(place.exchange, like_BTH, mask_BT, None, train=True, step=place.step, rows_BT=rows_BT)
        crosses = request_once(whole, self.stage, inputs, place.examples, self.known, self.cut[0])
        if crosses is None:
            return None
        call = RemoteCall(self.link, whole, place, back=False, kept=Places.of(mask_BT), crosses=crosses)
        self.steps.remember(call)
        return Sent(call, embedded_BTH.new_zeros(1).requires_grad_(), (), inputs, plan)

    def tail(self, sent: Sent, *, apart: bool = False, headless: bool = False) -> Any:
        """Wait for h, run blocks [e, L), final norm, head and loss.

        ``apart``: the loss's backward then ends with sending ∂task/∂h, and the head has one of its own
        (:mod:`flexp.client.overlap`). ``headless``: neither head nor loss.
        """
        sent.call.apart = apart
        ends = (sent.z_BTH.detach().requires_grad_(),) if apart else (sent.z_BTH, *sent.inner_BTH)
        h_BTH = sent.call.through(*ends)
        self.last_align = sent.call.align
        if sent.call.kept and sent.call.place is not None:
            self.known.update(sent.call.place.examples)
        hidden_BTH = self.stage.run(h_BTH, sent.plan, self.cut[1], self.stage.anatomy.blocks)
        return self.stage.finish(hidden_BTH, sent.inputs, sent.plan, headless=headless)

    @contextmanager
    def part_of_step(self, piece: Piece) -> Iterator[None]:
        """Say which piece of a step the exchange inside the ``with`` block is; if it fails, the step is given up."""
        try:
            with self.steps.during(piece):
                yield
            self.steps.done += int(piece.last)
        except BaseException:
            with suppress(LinkError):  # the first failure is the one to tell
                self.abort()
            raise

    def after_step(self) -> None:
        """Once the optimiser has stepped: pull the aligned blocks towards the server's, if the alignment says so.

        θ_k ← θ_k + μ·(θ_server − θ_k) for the personal copies of blocks [s_min, s), every n-th step. With ``follow``
        that is all that ever happens to them. Whoever does not call this has it done at the beginning of the next step.
        """
        done = self.steps.done
        if done == self._pulled or done % self.align.every:
            return
        if self.align.kind == "weights" and self.cut[0] > self.base_depth:
            self.pull(done, self.align.pull)
        self._pulled = done

    def _look(self, request: ForwardRequest, h_BTH: Tensor, sent_BTH: Tensor, got_BTH: Tensor, share: float) -> None:
        assert self.watch is not None
        self.watch.exchange(request, h_BTH, sent_BTH, got_BTH, most_alignment(self.align, request, share))

    def _crossing(
        self, inputs: Mapping[str, Any], plan: ExecutionPlan, z_BTH: Tensor, *, train: bool, headless: bool
    ) -> tuple[Places | None, Tensor | None]:
        """The tokens of z that cross (``None``: all), and flags (B, T) of the rows of h (``None``: the same tokens)."""
        mask_BT, answers = inputs.get("attention_mask"), KINDS[self.kind].answers
        per_token = answers in PER_TOKEN
        if answers == "span" and not headless:
            return None, None  # the loss is a softmax over all places, padding among them
        kept = without_padding(mask_BT) if self.ignores_padding else None
        if headless:
            return kept, None
        if per_token:
            read_BT = labelled(self.kind, inputs) if self.gradients else None  # which rows they are tells of labels
        else:
            read_BT = self._pooling.rows(inputs, plan, tuple(z_BTH.shape))
            if read_BT is None and kept is not None and self._pooling.reads_padding(inputs, plan, z_BTH):
                kept = None
        if kept is not None and read_BT is not None and bool(read_BT[mask_BT == 0].any()):
            kept = None  # whoever labels padding trains on it
        if self.rows == "all" or self.cut[1] < self.stage.anatomy.blocks:
            return kept, None
        if read_BT is None or not bool(read_BT.any()) or (per_token and (self.rows == "logits" or not train)):
            return kept, None
        return kept, read_BT

    def _align_due(self) -> bool:
        """Whether z_base goes up with the next exchange."""
        if self.cut[0] == self.base_depth:
            return False
        return self.steps.done % self.align.every == 0 if self.align.has_term else self.align.teach
