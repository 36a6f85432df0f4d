"""Teaches a client's head to tell less of its tokens: alone, before anything is sent, and then along with the task.

The penalties (:mod:`flexp.client.penalties`) look at what is sent, z, and the input embeddings of its tokens. Without a
server there is no task to keep z useful for; what is kept instead is each text's *pooled* activation, close to what the
head made of it when it came: what a text is about, not which tokens stand where. Later the server's gradients say what
is needed.

The bound is checked against an attacker who is given this very head, more than a server ever has: it runs public text
and the vocabulary in random order through it, and learns the quick attacks of an audit from that, and, where each
token's activation is sent, the trained decoder, which reads most of a deep cut. While the client trains, the decoder
learns on as the head moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexp.attacks.base import Public
from flexp.attacks.decoder import Decoder
from flexp.attacks.public import dull_tokens, encoded, known_to_all, padded, paragraphs, pooled
from flexp.client.checking import asked, most_read
from flexp.client.noise import Noise
from flexp.client.penalties import Adversary, NoPeek
from flexp.client.random_labels import RandomLabels
from flexp.config import PrivacyConfig
from flexp.data.types import Example
from flexp.errors import ConfigError, PrivacyError
from flexp.gaussian import key_as_tensor, key_of, secret_key
from flexp.models.stage import Stage
from flexp.rng import RandomStream, derived_seed, generator

MOST = 256
"""Tokens of a batch whose distances are taken; more are drawn from."""
PUBLIC = 400
"""Public texts of the warm-up, and half as many of a check."""
FIRST, LATER = 150, 30
"""Steps that the decoder of a check learns: before anything is sent, and whenever the head was taught; and when it only
looks how far the task has moved the head since."""
STREAM = "privacy"


class Guard:
    """What one client does for its texts.

    Args:
        examples: its training examples.
        tokenizer: of the model.
        seed: of the client; what is drawn here is drawn by nobody else.
        key: of its noise and of its labels' answers; ``None``: a secret one. The seed is none: every party of a run
            knows it.
        classes: of its labels, where there are any.
        public: texts that everybody knows; ``None``: some of ``config.public``.
        known: what the head makes of texts, for a check.

    Attributes:
        taught: the cut's s that the head has been taught for; −1: for none yet.
        read: the share of content words that the last check read; ``None``: none was made.
        attacked: how many content words that check was about.
        checked: the steps after which it was made.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        examples: Sequence[Example],
        tokenizer: Any,
        seed: int,
        key: int | None = None,
        classes: int = 0,
        public: Sequence[str] | None = None,
        known: Callable[[Stage, int, Sequence[Example]], Public] = known_to_all,
    ) -> None:
        self.config, self.taught, self.checked, self.attacked = config, -1, 0, 0
        key = secret_key() if key is None else key
        self.noise = Noise(config.noise, key, config.clip) if config.noise else None
        epsilon = config.label_epsilon
        self.labels = None if epsilon is None else RandomLabels(epsilon, classes, key)
        self.penalty = Adversary(seed) if config.penalty == "adversary" else NoPeek()
        self.read: float | None = None
        self._decoder = Decoder()
        self._examples, self._tokenizer, self._seed = examples, tokenizer, seed
        self._public, self._known = public, known

    @property
    def penalises(self) -> bool:
        """Whether there is a penalty along with the task."""
        return self.config.penalty != "off" and self.config.weight > 0

    def teach(self, stage: Stage, depth: int, steps: int = 0) -> None:
        """Teach blocks [0, ``depth``) of ``stage``, if they are not yet; where there is a bound, look now and then
        whether it still holds, since the task moves them, and teach them again if it does not. Draws from a stream of
        its own.

        Args:
            steps: that the client has trained.

        Raises:
            ConfigError: they hold nothing that is trained.
            PrivacyError: the bound is not met after all steps.
        """
        again = self.taught == depth
        due = self.config.max_content_words is not None and steps != self.checked
        if not self.config.of_texts or (again and not (due and steps % self.config.warm_up.check_every == 0)):
            return
        trained = [value for name, value in stage.trainable().items() if stage.within(name, 0, depth)]
        if not trained and self.config.penalty != "off":
            raise ConfigError("privacy.penalty: nothing below the cut is trained; cut deeper, or freeze less")
        mode = stage.model.training
        with RandomStream(derived_seed(self._seed, STREAM), stage.model.device).active(), torch.enable_grad():
            try:
                self._warm_up(stage, depth, trained, again=again)
            finally:
                stage.model.train(mode)
        self.taught, self.checked = depth, steps

    def told(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as training may know it: with the answers for its labels."""
        if self.labels is None or "labels" not in batch:
            return dict(batch)
        return {**batch, "labels": self.labels.of(batch)}

    def sent(self, ids_BT: Tensor, mask_BT: Tensor | None, z_BTH: Tensor) -> Tensor:
        """What is sent of z, (B, T, H), or (B, 1, H) of pooled texts: nothing where there is padding, which knows the
        text as well."""
        mask_BT = torch.ones_like(ids_BT).bool() if mask_BT is None else mask_BT.bool()
        if self.noise is not None:
            z_BTH = self.noise.cover(z_BTH, ids_BT, mask_BT)
        return z_BTH if self.config.pool else z_BTH * mask_BT.unsqueeze(-1)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` needs."""
        clip = None if self.noise is None else self.noise.clip
        own = {"taught": torch.tensor(self.taught), "checked": torch.tensor(self.checked)}
        if self.noise is not None:
            own["noise_key"] = key_as_tensor(self.noise.key)
        if self.labels is not None:
            own["label_key"] = key_as_tensor(self.labels.key)
        own |= self.penalty.state() | self._decoder.state()
        return own if clip is None else own | {"clip": torch.tensor(clip, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.taught, self.checked = int(state.get("taught", -1)), int(state.get("checked", 0))
        self.penalty.load(state)
        self._decoder.load(state)
        if self.noise is not None:
            self.noise.key = key_of(state["noise_key"]) if "noise_key" in state else self.noise.key
            self.noise.clip = float(state["clip"]) if "clip" in state else self.config.clip
        if self.labels is not None:
            self.labels.key = key_of(state["label_key"]) if "label_key" in state else self.labels.key

    def gradient(
        self, stage: Stage, ids_BT: Tensor, mask_BT: Tensor | None, z_BTH: Tensor, at: tuple[int, int]
    ) -> Tensor:
        """The gradient of the weighted penalty at z, (B, T, H), in the step and exchange ``at``."""
        z_BTH = z_BTH.detach().requires_grad_()
        with torch.enable_grad():
            value = self.config.weight * self._penalty(stage, ids_BT, mask_BT, z_BTH, at)
        return torch.autograd.grad(value, z_BTH)[0]

    def _penalty(
        self,
        stage: Stage,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        z_BTH: Tensor,
        at: tuple[int, int] | None = None,
    ) -> Tensor:
        mask_BT = torch.ones_like(ids_BT).bool() if mask_BT is None else mask_BT.bool()
        with torch.no_grad():
            e_BTE = stage.model.get_input_embeddings()(ids_BT)
        z_NH, e_NE = z_BTH[mask_BT], e_BTE[mask_BT]
        if len(z_NH) > MOST:
            rows = torch.randperm(len(z_NH), device=z_NH.device)[:MOST]
            z_NH, e_NE = z_NH[rows], e_NE[rows]
        return self.penalty.value(z_NH, e_NE, at)

    def _warm_up(self, stage: Stage, depth: int, trained: list[torch.nn.Parameter], *, again: bool) -> None:
        warm, bound, read = self.config.warm_up, self.config.max_content_words, 1.0
        steps = 0 if self.config.penalty == "off" else warm.steps
        private = [_tokens(example) for example in self._examples]
        longest = max(map(len, private))
        texts = self._public
        if texts is None:
            texts = paragraphs(None if self.config.public is None else Path(self.config.public), PUBLIC)
        public = [example["input_ids"][:longest] for example in encoded(self._tokenizer, texts, passes=0)]
        everything = [*private, *public]
        if self.noise is not None and self.noise.clip is None:
            came = self._known(stage, depth, [{"input_ids": ids} for ids in public]).sent
            self.noise.clip = float((came.as_one() if self.config.pool else came).z_NH.norm(dim=1).median())
        if not steps:
            if bound is not None:
                read = self.read = self._check(stage, depth, private, public, LATER if again else FIRST)
                self._judge(read, depth, steps, again=again)
            return
        if again and bound is not None:
            self.read = self._check(stage, depth, private, public, LATER, bound)
            if self.read <= bound:
                return
        kept_NH = _pooled_of(stage, depth, everything)
        spread = kept_NH.var(0).mean().clamp_min(1e-12)
        draw = generator(self._seed, STREAM, "batches")
        optimiser = torch.optim.AdamW(trained, lr=warm.lr, weight_decay=0.0)
        for step in range(steps + 1):
            last = step == steps
            if bound is not None and (last or (step and step % warm.check_every == 0)):
                read = self.read = self._check(stage, depth, private, public, FIRST, 1.0 if last else bound)
                if read <= bound:
                    return
            if last:
                break
            side = step % 2  # private and public texts in turn
            count = len((private, public)[side])
            chosen = draw.choice(count, min(warm.batch_size, count), replace=False)
            numbers = [side * len(private) + int(number) for number in chosen]
            ids_BT, mask_BT = padded([everything[number] for number in numbers], stage.model.device)
            stage.model.train(True)
            z_BTH = _run(stage, depth, ids_BT, mask_BT)
            away = (pooled(z_BTH, mask_BT.bool()) - kept_NH[numbers]).square().mean() / spread
            if self.noise is not None:
                z_BTH = self.noise.cover(z_BTH, ids_BT, mask_BT.bool())
            loss = away + warm.weight * self._penalty(stage, ids_BT, mask_BT, z_BTH)
            for value, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
                value.grad = grad
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if bound is not None:
            self._judge(read, depth, steps, again=again)

    def _judge(self, read: float, depth: int, steps: int, *, again: bool) -> None:
        bound = self.config.max_content_words
        if bound is None or read <= bound:
            return
        teaches = self.config.penalty != "off"
        after, teach = (f"after {steps} steps of the warm-up ", "raise privacy.warm_up.steps or .weight, ")
        raise PrivacyError(
            f"{after if teaches else ''}an attacker who has the head reads {100 * read:.0f} % of content words, and "
            f"privacy.max_content_words is {bound:g}; nothing {'more ' if again else ''}was sent. Cut deeper (now s = "
            f"{depth}), {teach if teaches else ''}add privacy.noise, or raise the bound"
        )

    def covered(self, known: Public, said: bytes = b"") -> Public:
        """What a client with this guard, whose noise is another, would have sent; ``said``: see :meth:`Noise.fresh`."""
        noise = self.noise
        cover = (lambda z: z) if noise is None else (lambda z: noise.fresh(z, said))
        if self.config.pool:
            return replace(known, sent=known.sent.as_one(cover), apart=known.sent)
        return replace(known, sent=replace(known.sent, z_NH=cover(known.sent.z_NH)))

    def _check(
        self,
        stage: Stage,
        depth: int,
        private: list[list[int]],
        public: list[list[int]],
        steps: int,
        enough: float = 1.0,
    ) -> float:
        special, draw = set(self._tokenizer.all_special_ids), generator(self._seed, STREAM, "check")
        known, truth = asked(private, public[: PUBLIC // 2], len(self._tokenizer), special, draw)
        made = [self._known(stage, depth, [{"input_ids": ids} for ids in texts]) for texts in (known, truth)]
        content_N = ~torch.isin(made[1].ids_N, dull_tokens(made[0], special))
        self.attacked = int(content_N.sum())
        # With the same words said, row by row they would have the same noise.
        sent, texts = self.covered(made[0]), self.covered(made[1], b"texts")
        self._decoder.steps = steps if self._decoder.learnt else FIRST  # of an older snapshot it has not
        decoder = None if self.config.pool else self._decoder
        return most_read(sent, texts.sent, texts.ids_N, content_N, decoder, enough) if self.attacked else 0.0


def _run(stage: Stage, depth: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    hidden_BTH, plan = stage.plan({"input_ids": ids_BT, "attention_mask": mask_BT})
    return stage.run(hidden_BTH, plan, 0, depth)


def _pooled_of(stage: Stage, depth: int, texts: Sequence[Sequence[int]]) -> Tensor:
    stage.model.eval()
    found = []
    for start in range(0, len(texts), 16):
        ids_BT, mask_BT = padded(texts[start : start + 16], stage.model.device)
        with torch.no_grad():
            found.append(pooled(_run(stage, depth, ids_BT, mask_BT), mask_BT.bool()))
    return torch.cat(found)


def _tokens(example: Example) -> list[int]:
    if "input_ids" not in example:
        raise ConfigError("privacy.penalty teaches heads of texts; images are not guarded yet")
    return [int(token) for token in example["input_ids"]]
