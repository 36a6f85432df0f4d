"""A model whose middle runs on a server, used like any other Hugging Face model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flexp.client.remote import Micro, RemoteCall, RemoteMiddle
from flexp.client.tied import save_ties_once
from flexp.config import AlignConfig, LoraConfig
from flexp.errors import ConfigError, ModelError
from flexp.links.base import Link
from flexp.links.messages import ForwardRequest, Join, PullRequest
from flexp.models.fingerprint import fingerprint
from flexp.models.loading import ModelKind, load_config, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.plan import Plan
from flexp.models.stage import Stage
from flexp.models.tuning import tune

OFF = AlignConfig(kind="off")


@dataclass(frozen=True)
class Sent:
    """What :meth:`SplitModel.head` leaves for :meth:`SplitModel.tail`: an exchange on its way."""

    call: RemoteCall
    z_BTH: Tensor
    inner_BTH: tuple[Tensor, ...]
    inputs: Mapping[str, Any]
    plan: Plan


class SplitModel(nn.Module):
    """The client's stage with the server in its middle.

    ``forward`` takes what the Hugging Face model takes and gives what it gives; ``loss.backward()`` trains the personal
    parameters here and the shared ones on the server.

    Args:
        stage: the client's ends and blocks, tuned already.
        cut: (s, e).
        link: to the server, which is joined at once.
        align: the alignment, whose gradient the server computes.
        tuning: how ``stage`` was tuned.
        accumulation: exchanges that make up one step, for loops that know nothing of FlexP (a Trainer with gradient
            accumulation, whose epochs must be a multiple of it); FlexP's own loop says it for each exchange instead,
            with :meth:`part_of_step`.
    """

    kind: ClassVar[ModelKind]

    def __init__(
        self,
        stage: Stage,
        cut: tuple[int, int],
        link: Link,
        *,
        align: AlignConfig = OFF,
        tuning: str = "full",
        accumulation: int = 1,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.model: Any = stage.model
        self.link = link
        self.align = align
        self.tuning = tuning
        self.accumulation = accumulation
        self.last_align: float | None = None
        self.steps = 0
        self._micro: Micro | None = None
        self._exchange = 0
        self._in_step = 0
        self._previous: RemoteCall | None = None
        save_ties_once(self)
        self._join(cut)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        *,
        cut: tuple[int, int | None],
        link: Link,
        labels: Sequence[str] | None = None,
        tuning: str = "full",
        lora: LoraConfig | None = None,
        train_embeddings: bool = False,
        gradient_checkpointing: bool = False,
        align: AlignConfig = OFF,
        dtype: str = "float32",
        attention: str = "sdpa",
        accumulation: int = 1,
        seed: int = 0,
    ) -> Self:
        """Load only this client's part of a pretrained model and join the server.

        Example:
            >>> model = flexp.SplitModelForSequenceClassification.from_pretrained(
            ...     "path/to/model", cut=(2, 5), link=server.connect("clinic-a"), labels=["benign", "malignant"]
            ... )

        Raises:
            ModelError: the model cannot be loaded or split.
            ConfigError: the cut does not fit the model.
            LinkError: the server refuses this client.
        """
        blocks = int(load_config(str(model_id)).get_text_config().num_hidden_layers)
        whole_cut = check_cut(cut, blocks)
        stage = load_stage(
            model_id,
            cls.kind,
            Part.client(whole_cut, blocks),
            labels=labels,
            dtype=dtype,
            attention=attention,
            seed=seed,
        )
        tune(
            stage,
            tuning,  # type: ignore[arg-type]
            lora=lora,
            embeddings=train_embeddings,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        return cls(stage, whole_cut, link, align=align, tuning=tuning, accumulation=accumulation)

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the whole model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the personal parameters are."""
        device: torch.device = self.model.device
        return device

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss divides by ``num_items_in_batch``, which transformers' Trainer asks."""
        declared = getattr(self.model, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def loss_type(self) -> str | None:
        """The name of the model's loss, by which transformers' Trainer knows how to count its items."""
        return getattr(self.model, "loss_type", None)

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
        """The whole model's output for a batch, with ``loss`` when ``labels`` are given. Labels stay here."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
            "labels": labels,
        }
        inputs = {key: value for key, value in {**named, **others}.items() if value is not None}
        return self.tail(self.head(inputs))

    def head(self, inputs: Mapping[str, Any]) -> Sent:
        """Run embeddings and blocks [0, s) and send the activation: z_base = head[0, s_min), z = head[s_min, s)."""
        train = self.training and torch.is_grad_enabled()
        start, base_depth = self.cut[0], self.base_depth
        align_now = train and self._align_due()
        embedded_BTH, plan = self.stage.plan(inputs)
        base_BTH = z_BTH = self.stage.run(embedded_BTH, plan, 0, min(base_depth, start))
        inner_BTH: list[Tensor] = []
        for index in range(base_depth, start):
            z_BTH = self.stage.run(z_BTH, plan, index, index + 1)
            if align_now and self.align.at == "every-block" and index < start - 1:
                inner_BTH.append(z_BTH)
        if train and not z_BTH.requires_grad:
            z_BTH = z_BTH.detach().requires_grad_()  # the server's blocks need a backward even if nothing here does
        request = ForwardRequest(
            exchange=self._next_exchange(),
            hidden_BTH=z_BTH.detach(),
            mask_BT=inputs.get("attention_mask"),
            positions_BT=inputs.get("position_ids"),
            base_BTH=base_BTH.detach() if align_now else None,
            inner_BTH=tuple(value.detach() for value in inner_BTH),
            train=train,
        )
        call = RemoteCall(self.link, request, self._count_micro(train))
        if train and self.accumulation > 1:
            self._previous = call
        return Sent(call, z_BTH, tuple(inner_BTH), inputs, plan)

    def tail(self, sent: Sent) -> Any:
        """Wait for h, run blocks [e, L), final norm, head and loss."""
        h_BTH = RemoteMiddle.apply(sent.call, sent.z_BTH, *sent.inner_BTH)  # type: ignore[no-untyped-call]
        self.last_align = sent.call.align
        hidden_BTH = self.stage.run(h_BTH, sent.plan, self.cut[1], self.stage.anatomy.blocks)
        return self.stage.finish(hidden_BTH, sent.inputs, sent.plan)

    @contextmanager
    def part_of_step(self, share: float, weight: float, last: bool) -> Iterator[None]:
        """Say what the exchanges inside the ``with`` block count in their step."""
        self._micro = Micro(share, weight, last)
        try:
            yield
        finally:
            self._micro = None

    def after_step(self) -> None:
        """Once the optimiser has stepped: pull the aligned blocks towards the server's, if the alignment says so.

        θ_k ← θ_k + μ·(θ_server − θ_k) for the personal copies of blocks [s_min, s), every n-th step.
        """
        due = self.align.kind == "weights" and self.steps % self.align.every == 0
        if not due or self.cut[0] <= self.base_depth:
            return
        shared = self.link.pull(PullRequest()).result().weights
        personal = self.stage.trainable()
        with torch.no_grad():
            for name, value in shared.items():
                if name in personal:
                    personal[name].lerp_(value.to(personal[name]), self.align.pull)

    def personal_state(self) -> dict[str, Tensor]:
        """All that is this client's own: what it trains, by name. It never leaves the client."""
        return {name: value.detach() for name, value in self.stage.trainable().items()}

    def load_personal_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`personal_state`.

        Raises:
            ModelError: the state is of another cut or another tuning.
        """
        own = self.stage.trainable()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[0]
            raise ModelError(f"the saved personal state does not fit this cut and tuning: {odd} is on one side only")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def _join(self, cut: tuple[int, int]) -> None:
        check_cut(cut, self.stage.anatomy.blocks)
        self.cut = cut
        welcome = self.link.join(
            Join(
                client=self.link.client,
                fingerprint=fingerprint(self.model.config),
                cut=cut,
                dtype=str(self.model.dtype),
                tuning=self.tuning,
                align=self.align,
            )
        )
        self.base_depth = welcome.base_depth
        if cut[0] < self.base_depth:
            raise ConfigError(f"cut = {cut} starts below the server's base depth s_min = {self.base_depth}")

    def _align_due(self) -> bool:
        wanted = self.align.kind not in ("off", "weights") and self.align.weight > 0
        return wanted and self.cut[0] > self.base_depth and self.steps % self.align.every == 0

    def _next_exchange(self) -> int:
        self._exchange += 1
        return self._exchange

    def _count_micro(self, train: bool) -> Micro:
        micro = self._micro
        if micro is None:
            if train and self.accumulation > 1:
                self._refuse_half_steps()
            last = self._in_step + 1 == self.accumulation
            micro = Micro(share=1.0 / self.accumulation, last=last)
        if train:
            self._in_step = 0 if micro.last else self._in_step + 1
            self.steps += int(micro.last)
        return micro

    def _refuse_half_steps(self) -> None:
        """Gradients that were there and are gone show that the optimiser stepped: a fused one leaves no other sign."""
        personal = self.stage.trainable().values()
        answered = self._previous is not None and self._previous.answered
        if self._in_step and answered and personal and all(parameter.grad is None for parameter in personal):
            raise ConfigError(
                f"the optimiser stepped after {self._in_step} of the accumulation = {self.accumulation} exchanges that "
                "the server was told to expect in a step; drop the last, shorter group of an epoch "
                "(examples = a multiple of batch size × accumulation), or use part_of_step"
            )


class SplitModelForCausalLM(SplitModel):
    """A causal language model whose middle runs on a server."""

    kind = "causal-lm"


class SplitModelForSequenceClassification(SplitModel):
    """A text classifier whose middle runs on a server."""

    kind = "sequence-classification"


class SplitModelForImageClassification(SplitModel):
    """An image classifier whose middle runs on a server."""

    kind = "image-classification"


SPLIT_MODELS: dict[str, type[SplitModel]] = {
    cls.kind: cls
    for cls in (SplitModelForCausalLM, SplitModelForSequenceClassification, SplitModelForImageClassification)
}
