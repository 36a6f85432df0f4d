"""The one schema of a run: what a ``CONFIG.toml`` may say, what it means, and what stands when it says nothing.

Unknown keys, wrong types and impossible values are refused by name. :mod:`flexp.config.loading` reads the file;
this module only states the shape. Names from :mod:`flexp.config.methods` are meant to be imported from here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from flexp.config.devices import DeviceChange, DeviceClassConfig, DevicesConfig, RecutConfig
from flexp.config.guard import GuardConfig
from flexp.config.link import CodecConfig, CodecName, LinkConfig
from flexp.config.methods import DEFAULT, AlignConfig, MethodConfig
from flexp.config.model import LoraConfig, ModelConfig, Tuning
from flexp.config.section import Beta, Fraction, Rate, Section, all_keys
from flexp.registry import METHODS

__all__ = [
    "AlignConfig",
    "Beta",
    "ClientsConfig",
    "CodecConfig",
    "CodecName",
    "Cut",
    "DataConfig",
    "DeviceChange",
    "DeviceClassConfig",
    "DevicesConfig",
    "EvaluationConfig",
    "Fraction",
    "GuardConfig",
    "LinkConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Rate",
    "RecutConfig",
    "RunConfig",
    "Section",
    "ServerConfig",
    "Task",
    "TrainConfig",
    "Tuning",
    "all_keys",
]

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


class OptimizerConfig(Section):
    """An optimiser with its schedule; the personal and the shared parts have one each."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-4
    new_lr: Rate | None = None  # of weights that no checkpoint holds, such as a new classifier; None: lr
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    momentum: Fraction = 0.0  # sgd
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip: Rate | None = 1.0  # the largest global norm of a step's gradient


class TrainConfig(Section):
    """The client's loop. A round is one turn of every client; FlexP-SFL itself knows no rounds."""

    rounds: PositiveInt = 5
    steps_per_round: PositiveInt = 10  # optimiser steps of a client in its turn
    batch_size: PositiveInt = 8  # examples of a step
    micro_batch: PositiveInt | None = None  # examples of one exchange; None: the batch divided by in_flight
    in_flight: PositiveInt = 1  # exchanges of a step that are under way at once: the next one's head does not wait
    order: Literal["round-robin", "random"] = "round-robin"
    turn: Literal["round", "step"] = "step"  # clients take turns after every step, or after a whole round
    personal: OptimizerConfig = OptimizerConfig()
    shared: OptimizerConfig = OptimizerConfig()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of one client in the whole run."""
        return self.rounds * self.steps_per_round


class ServerConfig(Section):
    """The shared blocks' side."""

    update: Literal["every", "mean"] = "every"
    # with update = "mean": client steps in one update, weighted by their items (classified examples, predicted tokens)
    mean_over: PositiveInt = 4
    memory: Literal["keep", "recompute"] = "keep"
    max_in_flight: PositiveInt = 8  # forwards of one client whose backward has not come yet
    max_in_flight_total: PositiveInt = 64  # the same over all clients
    tuning: Literal["full", "lora", "frozen"] | None = None  # of the shared blocks; None: as model.tuning
    keep_answers_bytes: PositiveInt = 256 << 20  # of each client's last steps, for when it goes back to a snapshot
    codecs: list[CodecName] | None = None  # that clients may ask for; None: all
    max_generations: PositiveInt = 8  # answers of one client under way, each with a cache of keys and values
    max_generations_total: PositiveInt = 64  # the same over all clients
    max_cached_tokens: PositiveInt = 65_536  # batch × length in the caches of one client
    max_cached_bytes: PositiveInt = 4 * 2**30  # the caches of all clients
    generation_seconds: Rate = 600.0  # a cache that long unused is forgotten
    guard: GuardConfig = GuardConfig()


class EvaluationConfig(Section):
    """When and on how much personal models are scored."""

    every: PositiveInt = 1  # rounds
    batch_size: PositiveInt = 32
    global_examples: PositiveInt | None = None  # at most that many of everybody's test examples
    measure_memory: bool = True  # a client's peak memory, in a process of its own for each distinct cut


class OutputConfig(Section):
    """What a run leaves behind."""

    # rounds; the last two stay, and with validation data the best; 0: none at all, so that nothing can be resumed
    checkpoint_every: Annotated[int, Field(ge=0)] = 1
    tensorboard: bool = True
    html: bool = True


class RunConfig(Section):
    """A whole run."""

    name: str = "run"
    seed: int = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # torch threads, 1 to 1024; None: as many as cores
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()
    server: ServerConfig = ServerConfig()
    link: LinkConfig = LinkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    devices: DevicesConfig | None = None  # None: nobody is short of memory, and no virtual clock
    recut: RecutConfig = RecutConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.micro_batch is not None and self.train.micro_batch > self.train.batch_size:
            raise ValueError(
                f"train.micro_batch = {self.train.micro_batch} is larger than "
                f"train.batch_size = {self.train.batch_size}"
            )
        if self.train.in_flight > self.server.max_in_flight:
            raise ValueError(
                f"train.in_flight = {self.train.in_flight} is more than "
                f"server.max_in_flight = {self.server.max_in_flight}"
            )
        changes = () if self.devices is None else self.devices.changes
        if (self.recut.on or changes) and not METHODS[self.method.name].recuts:
            what = "recut.on" if self.recut.on else "devices.changes"
            raise ValueError(f'{what} needs a method that moves cuts while it trains, such as "{DEFAULT}"')
        if self.recut.on and self.server.tuning not in (None, self.model.tuning):
            raise ValueError(
                f"recut.on needs the same tuning on both sides: model.tuning is {self.model.tuning}, server.tuning "
                f"{self.server.tuning}, so a block that moves would lose what the server trained"
            )
        if self.model.tuning == "lora" and self.model.train_embeddings:
            raise ValueError(
                "model.train_embeddings = true needs model.tuning = 'full': LoRA trains adapters in the blocks only"
            )
        if self.model.embeddings == "file" and self.model.train_embeddings:
            raise ValueError(
                'model.embeddings = "file" leaves them as they are, and model.train_embeddings = true trains them: '
                "choose one"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """The configuration with every default written out, as JSON-ready values; of other methods what was said."""
        content, method = self.model_dump(mode="json"), METHODS[self.method.name]
        if method.Config is not None:
            content["method"][method.table] = self.method.own(method.table, method.Config).model_dump(mode="json")
        return content
