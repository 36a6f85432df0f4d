"""The one schema of a run: what a ``CONFIG.toml`` may say, what it means, and what stands when it says nothing.

Unknown keys, wrong types and impossible values are refused by name. :mod:`flexp.experiments.settings` reads the file;
this module only states the shape.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

Task = Literal["classification", "causal-lm", "instruction", "multiple-choice", "image-classification"]
Tuning = Literal["full", "lora"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _to_the_end(cut: Any) -> Any:
    """``[s]`` is ``[s, None]``: TOML has no null."""
    if not isinstance(cut, list | tuple) or len(cut) not in (1, 2):
        raise ValueError(f"{cut!r} is no cut: expected a list of cuts [s, e] or [s], for instance [[1, 4], [2]]")
    return (cut[0], None) if len(cut) == 1 else cut


Cut = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)] | None], BeforeValidator(_to_the_end)]


class Section(BaseModel):
    """A table of the file: immutable, and closed to keys that it does not name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al., 2021, arXiv 2106.09685), used when ``model.tuning`` is ``lora``."""

    rank: PositiveInt = 8
    alpha: float = 16.0
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"  # names of linear modules inside the blocks, as peft takes them


class ModelConfig(Section):
    """The pretrained model and how it is tuned."""

    # folder (beside the TOML file, or as given), Hugging Face id, asset:NAME, or arch:NAME (tiny, random weights)
    id: str
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is for LoRA: full tuning in it loses small steps
    # mixed precision: weights, optimiser and what crosses stay in dtype, matrix products are computed in bfloat16
    autocast: Literal["off", "bfloat16"] = "off"
    attention: Literal["sdpa", "eager"] = "sdpa"
    tuning: Tuning = "full"
    lora: LoraConfig = LoraConfig()
    train_embeddings: bool = False  # with full tuning: also the client's embeddings (and a head tied to them)
    gradient_checkpointing: bool = False  # on the client's own blocks
    base_depth: Annotated[int, Field(ge=0)] | None = None  # s_min; None: the smallest s of the clients
    expose_embeddings: bool = False  # allow s = 0, where the server can read every token from what it receives


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
    # (s, e) per client, repeated for more clients; [s] keeps no block in the tail: e = L
    cuts: Annotated[list[Cut], Field(min_length=1)] = [(1, None)]


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
    micro_batch: PositiveInt | None = None  # examples of one exchange; None: the whole batch
    order: Literal["round-robin", "random"] = "round-robin"
    turn: Literal["round", "step"] = "step"  # clients take turns after every step, or after a whole round
    personal: OptimizerConfig = OptimizerConfig()
    shared: OptimizerConfig = OptimizerConfig()


TERMS = ("kl", "mse", "cosine")
"""Kinds of alignment that are a term of the loss, whose gradient the server computes from z_base and z."""


class AlignConfig(Section):
    """The term that keeps a personal layer useful on everybody's data (FlexP-SFL, arXiv 2508.10349)."""

    kind: Literal["off", "kl", "mse", "cosine", "weights"] = "kl"
    weight: Annotated[float, Field(ge=0.0)] = 0.25  # λ
    temperature: Rate = 1.0  # kl
    normalize: bool = False  # compare standardised hidden states
    at: Literal["cut", "every-block"] = "cut"
    every: PositiveInt = 1  # align (with kind = "weights": pull) on every n-th step
    combine: Literal["sum", "project"] = "sum"
    pull: Fraction = 0.2  # μ of kind = "weights"
    # clients with deeper cuts train the server's copies of their aligned blocks, too (needs z_base, like kl)
    teach: bool = False


class FedAvgFtConfig(Section):
    """FedAvg, then local fine-tuning of the average."""

    finetune_steps: PositiveInt | None = None  # None: train.steps_per_round


class FedProxConfig(Section):
    """FedAvg with a proximal term (Li et al., 2020, arXiv 1812.06127)."""

    mu: Annotated[float, Field(ge=0.0)] = 0.1  # μ; 0 is FedAvg


class PFedMeConfig(Section):
    """Personal models by Moreau envelopes (Dinh et al., 2020, arXiv 2006.08848)."""

    lam: Rate = 15.0  # λ, the pull of a personal model towards the local one
    inner_steps: PositiveInt = 5  # K, gradient evaluations of one approximate solve, all on one batch
    eta: Rate | None = None  # η of the outer step; None: 1/λ, the classical step for a λ-smooth function
    beta: Rate = 1.0  # β of the server's mixing


class DittoConfig(Section):
    """A personal model beside the average, tied to it (Li et al., 2021, arXiv 2012.04221)."""

    lam: Annotated[float, Field(ge=0.0)] = 0.1  # λ; 0 is local training
    personal_steps: PositiveInt | None = None  # a round; None: half of the budget, or all of it with budget = "paper"


class FedPerConfig(Section):
    """Which trained weights are personal (Arivazhagan et al., 2019, arXiv 1912.00818)."""

    classifier: bool = True  # the head
    last_blocks: Annotated[int, Field(ge=0)] = 0  # and that many of the last blocks


class FedRepConfig(FedPerConfig):
    """FedPer's parts, trained one after the other (Collins et al., 2021, arXiv 2102.07078)."""

    head_steps: PositiveInt | None = None  # a round; None: half of the budget, or all of it with budget = "paper"


class PerFedAvgConfig(Section):
    """An average that one gradient step makes personal (Fallah et al., 2020, arXiv 2002.07948)."""

    alpha: Annotated[float, Field(ge=0.0)] = 0.01  # α, the rate of the inner SGD step; 0 is FedAvg
    variant: Literal["first-order", "hessian-free"] = "first-order"
    delta: Rate = 1e-3  # δ of the finite difference, hessian-free only
    adapt_steps: PositiveInt = 1  # inner steps that make a personal model out of the average


class ApflConfig(Section):
    """A mixture of a personal model and the average (Deng et al., 2020, arXiv 2003.13461)."""

    alpha: Fraction = 0.5  # α at the start: 0 is FedAvg, 1 is local training
    alpha_lr: Annotated[float, Field(ge=0.0)] = 0.1  # of α, which is adapted once a round; 0: fixed


class SplitFedConfig(Section):
    """The one cut of an L-shaped split, the same for all clients (Thapa et al., 2022, arXiv 2004.12088)."""

    cut: Annotated[int, Field(ge=0)] | None = None  # s; None: the smallest s of the clients


class SplitLoraConfig(SplitFedConfig):
    """The same with adapters on both sides (Lin et al., 2024, arXiv 2407.00952)."""

    average_every: PositiveInt = 1  # rounds between two averages of the clients' adapters


class SplitFtConfig(Section):
    """Adapters of a lower rank next to the cut (after SplitFT, arXiv 2604.26388)."""

    cut_rank: PositiveInt | None = None  # of the client's blocks next to the cut; None: half of model.lora.rank


class HetLoraConfig(Section):
    """Averaged adapters of unequal ranks (Cho et al., 2024, arXiv 2401.06432)."""

    # of the clients in their order, repeated for more; None: model.lora.rank for all
    ranks: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    weighting: Literal["examples", "sparsity"] = "examples"  # sparsity: by the norm of B·A


class MethodConfig(Section):
    """The method and its own settings.

    ``budget`` matters to methods that compute several gradients a step or train two models: with ``equal`` a client
    spends ``train.steps_per_round`` gradient evaluations a round in all, as with every other method; with ``paper``
    every step and every model has as many as its paper gives it, on top.
    """

    name: Literal[
        "flexp-sfl",
        "local",
        "centralized",
        "pretrained",
        "fedavg",
        "fedavg-ft",
        "fedprox",
        "pfedme",
        "ditto",
        "fedper",
        "fedrep",
        "per-fedavg",
        "apfl",
        "splitfed-v1",
        "splitfed-v2",
        "splitlora",
        "split-fedavg",
        "splitft",
        "hetlora",
    ] = "flexp-sfl"
    budget: Literal["equal", "paper"] = "equal"
    align: AlignConfig = AlignConfig()
    fedavg_ft: FedAvgFtConfig = FedAvgFtConfig()
    fedprox: FedProxConfig = FedProxConfig()
    pfedme: PFedMeConfig = PFedMeConfig()
    ditto: DittoConfig = DittoConfig()
    fedper: FedPerConfig = FedPerConfig()
    fedrep: FedRepConfig = FedRepConfig()
    per_fedavg: PerFedAvgConfig = PerFedAvgConfig()
    apfl: ApflConfig = ApflConfig()
    splitfed: SplitFedConfig = SplitFedConfig()
    splitlora: SplitLoraConfig = SplitLoraConfig()
    splitft: SplitFtConfig = SplitFtConfig()
    hetlora: HetLoraConfig = HetLoraConfig()


class ServerConfig(Section):
    """The shared blocks' side."""

    update: Literal["every", "mean"] = "every"
    mean_over: PositiveInt = 4  # with update = "mean": client steps in one update, weighted by tokens
    memory: Literal["keep", "recompute"] = "keep"
    max_in_flight: PositiveInt = 8  # forwards of one client whose backward has not come yet
    max_in_flight_total: PositiveInt = 64  # the same over all clients
    tuning: Literal["full", "lora", "frozen"] | None = None  # of the shared blocks; None: as model.tuning


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


class DeviceClassConfig(Section):
    """A device class of one's own (all figures are needed), or a ready one with some other figures."""

    base: str | None = None  # the ready class whose figures stand where nothing is said; None: that of the same name
    memory_bytes: PositiveInt | None = None  # what training may use
    flops: Rate | None = None  # floating-point operations a second that training sustains
    uplink_bps: Rate | None = None  # bits a second
    downlink_bps: Rate | None = None
    latency_s: Annotated[float, Field(ge=0.0)] | None = None  # of a message, one way
    mean_on_s: Rate | None = None  # on average a device is there so long, …
    mean_off_s: Rate | None = None  # … and then away so long; None: always there


class DevicesConfig(Section):
    """What the clients run on: who can take part in a method, and how long it would take (a virtual clock)."""

    # the class of each client, repeated for more clients
    assign: Annotated[list[str], Field(min_length=1)]
    server: str = "server"  # the class of the server
    server_slots: PositiveInt = 1  # requests that the server works on at once, each at its full speed
    classes: dict[str, DeviceClassConfig] = {}  # beside phone, raspberry-pi, jetson, laptop, workstation, server


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
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    devices: DevicesConfig | None = None  # None: nobody is short of memory, and no virtual clock

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.micro_batch is not None and self.train.micro_batch > self.train.batch_size:
            raise ValueError(
                f"train.micro_batch = {self.train.micro_batch} is larger than "
                f"train.batch_size = {self.train.batch_size}"
            )
        if self.model.tuning == "lora" and self.model.train_embeddings:
            raise ValueError(
                "model.train_embeddings = true needs model.tuning = 'full': LoRA trains adapters in the blocks only"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """The configuration with every default written out, as JSON-ready values."""
        return self.model_dump(mode="json")
