"""The table ``[data]``: where the examples come from, and how they are divided among clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from flexp.config.link import CodecName
from flexp.config.section import Fraction, PositiveInt, Rate, Section, Seed, named
from flexp.errors import ConfigError
from flexp.registry import PARTITIONERS, TASKS

Task = Annotated[str, named(TASKS)]


def _to_the_end(cut: Any) -> Any:
    """``[s]`` is ``[s, None]``: TOML has no null."""
    if not isinstance(cut, list | tuple) or len(cut) not in (1, 2):
        raise ValueError(f"{cut!r} is no cut: expected [s, e] or [s], for instance [1, 4]")
    return (cut[0], None) if len(cut) == 1 else tuple(cut)


Cut = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)] | None], BeforeValidator(_to_the_end)]


class ClientConfig(Section):
    """What one client keeps of the model, and how and on what it trains; what is left out is as for all clients."""

    name: str | None = None  # only the client of that name; None: clients in their order, repeated for more
    cut: Cut | None = None
    micro_batch: PositiveInt | None = None
    checkpointing: bool | None = None
    codec: CodecName | None = None
    rank: PositiveInt | None = None
    device: str | None = None
    profile: str | None = None


SETTINGS = tuple(key for key in ClientConfig.model_fields if key != "name")
"""What a client may have of its own."""


class ClientsConfig(Section):
    """How the data is divided among clients; and what clients have, all of them or each."""

    by: Annotated[str, named(PARTITIONERS)] = "column"
    column: str = "client"  # column: names the client; skew: every value becomes two clients, VALUE-a and VALUE-b
    names: list[str] | None = None  # only these clients (column, file and skew), in this order
    count: PositiveInt | None = None  # how many clients (partitioners)
    alpha: Rate = 0.5  # dirichlet: concentration (smaller is more skewed)
    over: str | None = None  # dirichlet, pathological: divide by this column (a domain, say) instead of the label
    classes: PositiveInt = 2  # pathological: labels per client
    min_examples: PositiveInt = 2  # dirichlet: the smallest admissible client
    skew: Annotated[float, Field(ge=0.5, le=1.0)] = 0.75  # skew: share of the first half of the labels at VALUE-a
    plan: str | None = None  # a file that flexp plan --out wrote; then cuts are not read
    # (s, e); [s] keeps no block in the tail: e = L; "auto": planned, for all clients
    cut: Literal["auto"] | Cut = (1, None)
    micro_batch: PositiveInt | None = None  # examples of one exchange; None: train.micro_batch
    checkpointing: bool | None = None  # None: model.gradient_checkpointing
    codec: CodecName | None = None  # None: link.codec, else for activation, gradient and aligned
    rank: PositiveInt | None = None  # of the client's adapters, where a method lets them differ; None: model.lora.rank
    device: str | None = None  # its device class; None: nobody is short of memory, and no virtual clock
    # a file of flexp profile, for cut = "auto"; None: the device class, or this machine
    profile: str | None = None
    each: list[ClientConfig] = Field(default=[])  # what single clients have otherwise

    @model_validator(mode="after")
    def _one_plan(self) -> ClientsConfig:
        if self.cut == "auto" and any(one.cut is not None for one in self.each):
            raise ValueError('cut = "auto" plans the cuts of all clients: leave out those in each')
        return self

    @property
    def planned(self) -> bool:
        """Whether cuts are planned, not written down."""
        return self.plan is not None or self.cut == "auto"

    @property
    def on_devices(self) -> bool:
        """Whether clients have device classes, so that there is a virtual clock."""
        return self.device is not None or any(one.device is not None for one in self.each)

    def _of(self, name: str, index: int) -> ClientConfig:
        """What the client ``name`` has, the ``index``-th of all."""
        turns = [one for one in self.each if one.name is None]
        turn = [turns[index % len(turns)]] if turns else []
        found: dict[str, Any] = {}
        for layer in (self, *turn, *(one for one in self.each if one.name == name)):
            found |= {key: value for key in SETTINGS if (value := getattr(layer, key)) not in (None, "auto")}
        return ClientConfig.model_construct(name=name, **found)

    def every(self, names: Sequence[str]) -> dict[str, ClientConfig]:
        """What each of these clients has, which are all."""
        return {name: self._of(name, index) for index, name in enumerate(names)}

    def devices(self, names: Sequence[str]) -> dict[str, str]:
        """The device class of each client.

        Raises:
            ConfigError: some clients have one, and others have none.
        """
        found = {}
        for name, own in self.every(names).items():
            if own.device is None:
                raise ConfigError(f"client {name} has no device; set data.clients.device, which is for all, or its own")
            found[name] = own.device
        return found

    def written(self, names: Sequence[str], **changes: Sequence[Any]) -> ClientsConfig:
        """The same with a record for each client of ``names``, of which some keys change: a value a client."""
        each = list(self.every(names).values())
        for key, values in changes.items():
            each = [own.model_copy(update={key: value}) for own, value in zip(each, values, strict=True)]
        plain: dict[str, Any] = {key: type(self).model_fields[key].default for key in changes}
        return self.model_copy(update={**plain, "plan": None, "each": each})


class DataConfig(Section):
    """Where the examples come from, which columns matter, and how they are divided."""

    source: str  # file or folder (beside the TOML file, or as given), asset:NAME, or a datasets id
    task: Task = "classification"
    config: str | None = None  # the configuration of a datasets id
    split: str | None = None  # the split of a datasets id or asset that holds the examples (default: train)
    test_source: str | None = None  # a file with test examples of all clients; else they are split off `source`
    text: str = "text"  # classification, causal-lm; question-answering: the context
    text_pair: str | None = None  # classification: a second text
    label: str = "label"  # classification, multiple-choice (index or letter), regression; a list: multi-label, tokens
    label_separator: str | None = None  # multi-label: what divides labels in text, "|" for instance
    image: str = "image"  # image-classification
    prompt: str = "prompt"  # instruction; multiple-choice, question-answering: the question
    answer: str = "answer"  # instruction, question-answering
    unanswerable: bool = False  # question-answering: rows may have no answer, and a model may find none
    messages: str | None = None  # instruction: a column of chats, instead of prompt and answer
    choices: str | list[str] = "choices"  # multiple-choice: a list column, or one column per choice
    template: str | None = None  # with {column} fields; instruction and multiple-choice have defaults
    max_length: PositiveInt = 128  # tokens; what is longer is cut off, and counted
    group: str | None = None  # a column (document, patient): equal values share a client and a side of every split
    long_texts: Literal["truncate", "error"] = "truncate"
    block_length: PositiveInt | None = None  # causal-lm: join texts and cut them in blocks of that many tokens
    test_fraction: Fraction = 0.3  # of every client's examples
    validation_fraction: Fraction = 0.0  # of what is left for training; scored too, and then `best` is picked on it
    train_examples: PositiveInt | None = None  # few-shot: private examples of a client
    test_examples: PositiveInt | None = None  # at most that many test examples of a client
    clients: ClientsConfig = ClientsConfig()
    seed: Seed | None = None  # of who owns what and of the test examples; None: the run's seed
    private_seed: Seed | None = None  # of the draw of a client's private examples; None: the same
