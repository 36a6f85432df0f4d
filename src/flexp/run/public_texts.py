"""What public texts tell with a defence: what a bound on content words is planned by.

Heads are taught, covered and attacked as clients do before they send anything (:class:`flexp.client.guarding.Guard`),
with public texts as if they were private. What was read is kept for the next plan, one file a model, cut and defence,
in ``$FLEXP_HOME/audits``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexp.assets.store import root
from flexp.attacks.base import Public
from flexp.attacks.public import encoded, known_to_all, paragraphs
from flexp.client.guarding import PUBLIC, Guard
from flexp.config import ModelConfig, PrivacyConfig
from flexp.data.types import Example
from flexp.errors import DataError, PrivacyError
from flexp.files import read_json, write_json
from flexp.kinds import ModelKind
from flexp.models.anatomy import Part
from flexp.models.fingerprint import fingerprint, tensor_fingerprint
from flexp.models.loading import load_stage
from flexp.models.packed import table_of
from flexp.models.stage import Stage
from flexp.models.tuning import tune

LEAST = 50
"""Content words of public texts that a bound is judged by."""
AUDIT = 3
"""The attack's version: what another one read is not taken for this one's. 2: it knows the whole vocabulary; 3: with a
trained decoder."""


@dataclass(frozen=True)
class Texts:
    """What a public audit needs to know: the model as clients load it, and what its texts are like.

    Attributes:
        pools: whether ``privacy.pool`` may be chosen: for classifiers that read the mean, or whose head is drawn anew.
        longest: tokens of a text, at most.
        frozen: so many of the first blocks are not trained, so that no head is taught there.
    """

    model: ModelConfig
    kind: ModelKind
    blocks: int
    processor: Any
    longest: int
    labels: Sequence[str] | None = None
    pools: bool = False
    frozen: int = 0
    seed: int = 0


def words(privacy: PrivacyConfig) -> str:
    """A defence in words: ``with privacy.pool = true and privacy.noise = 1``."""
    told = ["privacy.pool = true"] if privacy.pool else []
    told += [f'privacy.penalty = "{privacy.penalty}"'] if privacy.penalty != "off" else []
    told += [f"privacy.noise = {privacy.noise:g}"] if privacy.noise else []
    return f"with {' and '.join(told)}" if told else "without a defence"


class Reader:
    """Attacks public texts as a client's check attacks its own, for one plan: the model is loaded once, and what its
    head makes of a text is kept for other defences at the same depth.

    Args:
        public: of ``privacy.public``; half of its texts, :data:`PUBLIC` at most, are the attacker's, others are read.
        said: is told each attack's result.

    Raises:
        DataError: it cannot be read, or has too few texts.
    """

    def __init__(self, public: str | None, texts: Texts, said: Callable[[str], None] | None = None) -> None:
        self.texts, self._said = texts, said
        self._stage = self._load()
        found = paragraphs(None if public is None else Path(public), 2 * PUBLIC)
        self._file = public or "the Python manual"
        self._public = found[: min(PUBLIC, len(found) // 2)]
        if not self._public:
            raise DataError(f"{self._file}: privacy.max_content_words is planned on two public texts or more, and it "
                            "has one; set privacy.public to a file with more")  # fmt: skip
        own, held = (encoded(texts.processor, part, passes=0) for part in (self._public, found[len(self._public) :]))
        self._held: list[Example] = [{"input_ids": each["input_ids"][: texts.longest]} for each in held]
        model = self._stage.model
        tokens = json.dumps([[each["input_ids"] for each in part] for part in (own, self._held)])
        table = tensor_fingerprint(table_of(model.get_input_embeddings()))
        self._facts = (AUDIT, self._stage.weights, table, fingerprint(model.config), tokens, len(texts.processor))
        self._known: dict[object, Public] = {}

    def read(self, privacy: PrivacyConfig, depth: int) -> float:
        """The share of content words that is read at ``depth``, as it was found earlier, or now.

        Raises:
            DataError: the texts have too few content words.
        """
        texts, model = self.texts, self.texts.model
        taught = privacy.penalty != "off"
        facts: list[object] = [*self._facts, depth, texts.longest, texts.seed]
        facts += [model.dtype, model.autocast, model.quantization, model.quantize_ends]
        facts += [privacy.clip, privacy.pool, privacy.noise]
        if taught:
            facts += [privacy.penalty, privacy.max_content_words, privacy.warm_up]
            facts += [model.tuning, model.lora, texts.frozen]
        key = hashlib.sha256("|".join(map(str, facts)).encode()).hexdigest()[:32]
        kept = root().parent / "audits" / f"{key}.json"
        if kept.is_file() and self._stage.weights is not None:
            return float(read_json(kept)["content"])
        stage = self._load() if taught else self._stage
        if taught:
            tune(stage, model, seed=texts.seed, frozen=texts.frozen)
        guard = Guard(
            privacy, self._held, texts.processor, texts.seed,
            key=texts.seed,  # these are no secrets
            public=self._public, known=known_to_all if taught else self._once,
        )  # fmt: skip
        began = time.perf_counter()
        with suppress(PrivacyError):
            guard.teach(stage, depth)
        seconds = time.perf_counter() - began
        assert guard.read is not None
        if guard.attacked < LEAST:
            raise DataError(
                f"{self._file}: privacy.max_content_words is planned on {LEAST} content words of public texts or more, "
                f"and they have {guard.attacked}; set privacy.public to a file with more texts"
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = {"model": model.id, "s": depth, "with": words(privacy), "content": guard.read, "seconds": seconds}
        write_json(kept, found)
        if self._said is not None:
            self._said(f"{100 * guard.read:.0f} % of content words are read at s = {depth} {words(privacy)} "
                       f"(found in {seconds:.0f} s)")  # fmt: skip
        return guard.read

    def _load(self) -> Stage:
        texts, blocks = self.texts, self.texts.blocks
        return load_stage(texts.model, texts.kind, Part.client((blocks - 1, blocks), blocks), labels=texts.labels)

    def _once(self, stage: Stage, depth: int, examples: Sequence[Example]) -> Public:
        key = (depth, *(tuple(each["input_ids"]) for each in examples))
        if key not in self._known:
            self._known[key] = known_to_all(stage, depth, examples)
        return self._known[key]
