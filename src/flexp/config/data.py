"""The table ``[data]``: where the examples come from, and how they are divided among clients."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from flexp.config.link import CodecName
from flexp.config.section import Fraction, Rate, Section

Task = Literal["classification", "causal-lm", "instruction", "multiple-choice", "image-classification"]


def _to_the_end(cut: Any) -> Any:
    """``[s]`` is ``[s, None]``: TOML has no null."""
    if not isinstance(cut, list | tuple) or len(cut) not in (1, 2):
        raise ValueError(f"{cut!r} is no cut: expected a list of cuts [s, e] or [s], for instance [[1, 4], [2]]")
    return (cut[0], None) if len(cut) == 1 else cut


Cut = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)] | None], BeforeValidator(_to_the_end)]


class ClientsConfig(Section):
    """How the data is divided among clients, and what every client keeps of the model."""

    by: Literal["column", "file", "iid", "dirichlet", "pathological", "size", "length", "skew"] = "column"
    column: str = "client"  # column: names the client; skew: every value becomes two clients, VALUE-a and VALUE-b
    names: list[str] | None = None  # only these clients (column, file and skew), in this order
    count: PositiveInt | None = None  # how many clients (partitioners)
    alpha: Rate = 0.5  # dirichlet: concentration (smaller is more skewed)
    over: str | None = None  # dirichlet, pathological: divide by this column (a domain, say) instead of the label
    classes: PositiveInt = 2  # pathological: labels per client
    min_examples: PositiveInt = 2  # dirichlet: the smallest admissible client
    skew: Annotated[float, Field(ge=0.5, le=1.0)] = 0.75  # skew: share of the first half of the labels at VALUE-a
    # (s, e) per client, repeated for more clients; [s] keeps no block in the tail: e = L; "auto": planned
    cuts: Literal["auto"] | Annotated[list[Cut], Field(min_length=1)] = Field(default=[(1, None)])
    plan: str | None = None  # a file that flexp plan --out wrote; then cuts are not read
    # files of flexp profile, per client, repeated for more clients, for cuts = "auto"; None: [devices], or this machine
    profiles: Annotated[list[str], Field(min_length=1)] | None = None
    # examples of one exchange per client, repeated for more clients; None: train.micro_batch for all
    micro_batches: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    # the same of model.gradient_checkpointing
    checkpointing: Annotated[list[bool], Field(min_length=1)] | None = None
    # the same of link.codec.activation, .gradient and .aligned
    codecs: Annotated[list[CodecName], Field(min_length=1)] | None = None


class DataConfig(Section):
    """Where the examples come from, which columns matter, and how they are divided."""

    source: str  # file or folder (beside the TOML file, or as given), asset:NAME, or a datasets id
    task: Task = "classification"
    config: str | None = None  # the configuration of a datasets id
    split: str | None = None  # the split of a datasets id or asset that holds the examples (default: train)
    test_source: str | None = None  # a file with test examples of all clients; else they are split off `source`
    text: str = "text"  # classification, causal-lm
    text_pair: str | None = None  # classification: a second text
    label: str = "label"  # classification, multiple-choice (index or letter)
    image: str = "image"  # image-classification
    prompt: str = "prompt"  # instruction, multiple-choice: the question
    answer: str = "answer"  # instruction
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
    seed: int | None = None  # of who owns what and of the test examples; None: the run's seed
    private_seed: int | None = None  # of the draw of a client's private examples; None: the same
