"""The whole of a run: what a ``CONFIG.toml`` may say, what it means, and what stands when it says nothing.

Unknown keys, wrong types and impossible values are refused by name. :mod:`flexp.config.loading` reads the file;
these modules, one a table, only state the shape.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flexp.config.data import ClientsConfig, DataConfig
from flexp.config.devices import DevicesConfig, RecutConfig
from flexp.config.link import LinkConfig
from flexp.config.methods import DEFAULT, MethodConfig
from flexp.config.model import ModelConfig
from flexp.config.privacy import PrivacyConfig
from flexp.config.section import PositiveInt, Section, Seed
from flexp.config.server import ServerConfig
from flexp.config.train import TrainConfig
from flexp.registry import METHODS


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
    report_to: list[Literal["mlflow", "wandb"]] = Field(default=[])  # further trackers
    html: bool = True


class RunConfig(Section):
    """A whole run."""

    name: str = "run"
    seed: Seed = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # torch threads, 1 to 1024; None: as many as cores
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()
    server: ServerConfig = ServerConfig()
    link: LinkConfig = LinkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()
    devices: DevicesConfig = DevicesConfig()
    recut: RecutConfig = RecutConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.micro_batch is not None and self.train.micro_batch > self.train.batch_size:
            raise ValueError(
                f"train.micro_batch = {self.train.micro_batch} is larger than "
                f"train.batch_size = {self.train.batch_size}"
            )
        if self.train.early_stopping.patience is not None and not self.data.validation_fraction:
            raise ValueError(
                "train.early_stopping looks at validation data: set data.validation_fraction, to 0.2 for instance"
            )
        if self.train.in_flight > self.server.max_in_flight:
            raise ValueError(
                f"train.in_flight = {self.train.in_flight} is more than "
                f"server.max_in_flight = {self.server.max_in_flight}"
            )
        if self.link.cache != "off" and self.link.codec.activation == "int8-channel":
            raise ValueError(
                'link.cache keeps examples one by one, and link.codec.activation = "int8-channel" rounds them by what '
                'comes along: use "int8-row"'
            )
        if self.link.reuse and (self.link.cache == "off" or self.privacy.on):
            raise ValueError('link.reuse needs link.cache = "memory" or "disk", and no [privacy], whose z is another '
                             "one each time")  # fmt: skip
        if self.devices != DevicesConfig() and not self.on_devices:
            raise ValueError("[devices] is there, but no client has a device class: set data.clients.device, or device "
                             "in [[data.clients.each]]")  # fmt: skip
        if (self.recut.on or self.devices.changes) and not METHODS[self.method.name].recuts:
            what = "recut.on" if self.recut.on else "devices.changes"
            raise ValueError(f'{what} needs a method that moves cuts while it trains, such as "{DEFAULT}"')
        if self.privacy.on and not METHODS[self.method.name].guards:
            raise ValueError(f'[privacy] needs a method whose heads stay on their clients, such as "{DEFAULT}"')
        if self.server.noise and not METHODS[self.method.name].guards:
            raise ValueError(f'server.noise needs clients that share a server\'s blocks alone, as in "{DEFAULT}"')
        if self.privacy.of_texts and (self.recut.on or self.devices.changes):
            raise ValueError("[privacy] is for one cut, which recut.on and devices.changes move: "
                             "choose one")  # fmt: skip
        if self.privacy.pool and self.model.pooling != "mean":
            raise ValueError(
                "privacy.pool sends the mean of a text's tokens, whose classifier reads their mean as well: set "
                'model.pooling = "mean", which is for one class of a text'
            )
        if not self.privacy.gradients:
            self.check_without_gradients()
        if self.privacy.of_labels and self.privacy.gradients and self.train.class_weights is not None:
            raise ValueError("privacy.label_epsilon hides the labels that train.class_weights counts: leave one out")
        if self.recut.on and self.server.tuning not in (None, self.model.tuning):
            raise ValueError(
                f"recut.on needs the same tuning on both sides: model.tuning is {self.model.tuning}, server.tuning "
                f"{self.server.tuning}, so a block that moves would lose what the server trained"
            )
        if self.model.tuning == "lora" and self.model.train_embeddings:
            raise ValueError(
                "model.train_embeddings = true needs model.tuning = 'full': LoRA trains adapters in the blocks only"
            )
        if self.recut.on and self.server.quantization not in (None, self.model.quantization):
            raise ValueError(
                f"recut.on needs the same quantization on both sides: model.quantization is {self.model.quantization}, "
                f"server.quantization {self.server.quantization}, so a block that moves would be another one"
            )
        if self.model.quantization != "off" and self.model.tuning == "full":
            raise ValueError(
                f'model.quantization = "{self.model.quantization}" keeps whole numbers, which full tuning cannot train;'
                ' set model.tuning = "lora"'
            )
        if self.model.quantize_ends and self.model.quantization == "off":
            raise ValueError(
                'model.quantize_ends = true packs the ends as model.quantization packs the blocks, and that is "off": '
                'set it to "nf4" or "int8"'
            )
        if self.model.embeddings == "file" and self.model.train_embeddings:
            raise ValueError(
                'model.embeddings = "file" leaves them as they are, and model.train_embeddings = true trains them: '
                "choose one"
            )
        if self.model.blocks == "file" and (self.model.tuning == "full" or self.model.quantization != "off"):
            what = "model.tuning" if self.model.tuning == "full" else "model.quantization"
            raise ValueError(
                f'model.blocks = "file" leaves the blocks\' weights as the file has them, and {what} = '
                f'"{self.model.tuning if what == "model.tuning" else self.model.quantization}" does not; set '
                'model.tuning = "lora" and model.quantization = "off", or model.blocks = "memory"'
            )
        if self.model.blocks == "file" and (self.recut.on or self.devices.changes):
            raise ValueError(
                'model.blocks = "file" is for one cut, which recut.on and devices.changes move: choose one'
            )
        return self

    def check_without_gradients(self) -> None:
        """See that nothing else of the configuration is against ``privacy.gradients = false``. Raises ValueError."""
        align = self.method.align
        if align.kind != "off" or align.teach:
            raise ValueError('privacy.gradients = false leaves the head as it is, so nothing is aligned: set '
                             'method.align.kind = "off" and method.align.teach = false')  # fmt: skip
        if self.model.train_embeddings or self.privacy.penalty != "off":
            what = "model.train_embeddings" if self.model.train_embeddings else "privacy.penalty"
            raise ValueError(f"privacy.gradients = false trains nothing below the cut: leave {what} out")
        if self.recut.on or self.devices.changes:
            raise ValueError("privacy.gradients = false is for one cut, which recut.on and devices.changes move: "
                             "choose one")  # fmt: skip
        if self.method.meet.on is not False and not self.method.meet.masked:
            raise ValueError(
                "privacy.gradients = false sends nothing that labels tell, and class sums without masks tell them: "
                "leave method.meet.masked = false out, or set method.meet.on = false"
            )
        if self.train.early_stopping.patience is not None:
            raise ValueError("privacy.gradients = false: when a client stops early tells of its labels; leave "
                             "train.early_stopping out")  # fmt: skip
        if self.data.clients.planned:
            raise ValueError(
                "privacy.gradients = false: plans do not know what is not sent, nor that a tail needs blocks to learn "
                "with; name the cuts"
            )
        if self.privacy.label_epsilon is not None:
            raise ValueError(
                "privacy.gradients = false sends nothing that labels tell: leave privacy.label_epsilon out"
            )

    def frozen(self, start: int) -> int:
        """How many of its first blocks a client with a cut at ``start`` leaves as they are."""
        return self.method.personal.frozen_head_blocks if self.privacy.gradients else start

    @property
    def on_devices(self) -> bool:
        """Whether the clients' device classes are known; without them nobody is short of memory."""
        return self.data.clients.on_devices

    def on(self, device: str | None) -> RunConfig:
        """The same run with all of it on another device; ``None``: as it is; of several, with commas, the server's
        blocks are spread over all, and all else is on the first."""
        if device is None:
            return self
        first, *others = device.split(",")
        model, *_ = [ModelConfig.of(self.model, device=name) for name in (first, *others)]  # which looks at the names
        several = [first, *others] if others else None
        server = ServerConfig.checked({**self.server.model_dump(), "device": several}, "--device", "server")
        return self.model_copy(update={"model": model, "server": server})

    def with_clients(self, clients: ClientsConfig) -> RunConfig:
        """The same run, whose clients have other settings."""
        return self.model_copy(update={"data": self.data.model_copy(update={"clients": clients})})

    def resolved(self) -> dict[str, Any]:
        """The configuration with every default written out, as JSON-ready values; of other methods what was said."""
        content, method = self.model_dump(mode="json"), METHODS[self.method.name]
        if method.Config is not None:
            content["method"][method.table] = self.method.own(method.table, method.Config).model_dump(mode="json")
        return content
