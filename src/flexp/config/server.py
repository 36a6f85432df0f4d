"""The table ``[server]``: the shared blocks' side, what it keeps, and which gradients it refuses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flexp.config.link import CodecName
from flexp.config.model import Device, Quantization
from flexp.config.section import Bytes, PositiveInt, Rate, Section

Factor = Annotated[float, Field(gt=1.0)]


class GuardConfig(Section):
    """Bounds on what a client's step may do to the shared blocks. Norms are global, of a whole step's gradient."""

    max_norm: Rate | None = None  # a larger norm is refused; None: no bound
    # a larger norm is scaled down to it, step by step, before anything is averaged; median: of what others have
    clip: Rate | Literal["median"] | None = None
    # a step is answered and not applied if the cosine of its gradient with the last steps' is less; None: never
    similar: Annotated[float, Field(ge=-1.0, lt=1.0)] | None = None
    explode: Factor | None = 1000.0  # more than so many times the median of the norms accepted last is refused
    median_over: PositiveInt = 64  # norms that the median is of, all clients' together
    settle: PositiveInt = 16  # steps to be accepted before explode and similar mean anything
    strikes: PositiveInt = 5  # bad requests of a client …
    within: PositiveInt = 100  # … among so many of its last, and it is quarantined
    aside_seconds: Rate | None = 3600.0  # for so long; None: until the operator lets it in again (flexp readmit)


class ServerConfig(Section):
    """The shared blocks' side."""

    update: Literal["every", "mean", "trimmed"] = "every"
    # client steps in one update; with "mean" weighted by their items (classified examples, predicted tokens)
    mean_over: PositiveInt = 4
    trim: PositiveInt = 1  # with "trimmed": of each number so many of the largest and of the smallest are left out
    # σ: gaussian noise on what an update adds up, ÷ guard.clip, so that the shared weights tell other clients of nobody
    # more than an ε that the run says; steps count alike then, and guard.explode does nothing
    noise: Annotated[float, Field(ge=0.0)] = 0.0
    memory: Literal["keep", "recompute"] = "keep"
    max_in_flight: PositiveInt = 8  # forwards of one client whose backward has not come yet
    max_in_flight_total: PositiveInt = 64  # the same over all clients; beyond it a forward waits
    # of the trained weights at once: beyond it a forward waits until a step ends that began with older ones
    max_versions: Annotated[int, Field(ge=2)] | None = None
    # requests that wait go through the blocks together where that is faster; answers are those alone up to rounding
    joined: bool = False
    # what forwards keep until their backward, graphs included, of all clients; a client has at most half. Beyond
    # that only inputs are kept, and the blocks run again (as with memory = "recompute": equal numbers, a third slower)
    max_kept_bytes: Bytes = 2 * 2**30
    exchange_seconds: Rate = 1800.0  # a forward whose backward has not come in that time is given up
    # sooner, where others wait for its room: after so long, or twice what its client's last exchanges took if that is
    # longer
    hold_seconds: Rate = 60.0
    tuning: Literal["full", "lora", "frozen"] | None = None  # of the shared blocks; None: as model.tuning
    # own: each client trains LoRA adapters of its own in the shared blocks, which nobody else's steps reach
    adapters: Literal["shared", "own"] = "shared"
    quantization: Quantization | None = None  # of the shared blocks; None: as model.quantization
    # of the shared blocks; None: as model.device; several of one kind: blocks are spread over them, in their order
    device: Device | Annotated[list[Device], Field(min_length=2)] | None = None
    keep_answers_bytes: Bytes = 256 << 20  # of each client's last steps, for when it goes back to a snapshot
    codecs: list[CodecName] | None = None  # that clients may ask for; None: all
    max_generations: PositiveInt = 8  # answers of one client under way, each with a cache of keys and values
    max_generations_total: PositiveInt = 64  # the same over all clients
    max_cached_tokens: PositiveInt = 65_536  # batch × length in the caches of one client
    max_cached_bytes: Bytes = 4 * 2**30  # the caches of all clients
    generation_seconds: Rate = 600.0  # a cache that long unused is forgotten
    max_examples_bytes: Annotated[int, Field(ge=0)] = 2 * 2**30  # of all clients, with link.cache; more is not kept
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _something_left(self) -> ServerConfig:
        if self.update == "trimmed" and self.mean_over <= 2 * self.trim:
            raise ValueError(
                f'update = "trimmed" leaves out {2 * self.trim} of mean_over = {self.mean_over} steps; expected fewer'
            )
        if isinstance(self.device, list) and len({name.partition(":")[0] for name in self.device}) > 1:
            raise ValueError(
                f"device = {self.device} are of several kinds; expected several of one, as cuda:0 and cuda:1"
            )
        if self.adapters == "own" and self.update != "every":
            raise ValueError(f'update = "{self.update}" takes several clients\' steps together, and adapters = "own" '
                             'leaves each its own; set update = "every"')  # fmt: skip
        if self.adapters == "own" and self.guard.clip == "median":
            raise ValueError('guard.clip = "median" looks at other clients\' norms, and adapters = "own" leaves each '
                             'its own; set a number')  # fmt: skip
        if self.noise and not isinstance(self.guard.clip, float):
            raise ValueError("noise covers steps of at most guard.clip: set server.guard.clip to a number")
        shows = {'update = "trimmed"': self.update == "trimmed", "guard.max_norm": self.guard.max_norm is not None,
                 "guard.similar": self.guard.similar is not None}  # fmt: skip
        if self.noise and any(shows.values()):
            odd = next(key for key, is_set in shows.items() if is_set)
            raise ValueError(f"{odd} chooses steps by what they are, which noise does not cover: leave it out")
        if self.noise and self.adapters == "own":
            raise ValueError('noise covers steps from other clients, and adapters = "own" leaves each its own, which '
                             "nobody else sees: leave it out")  # fmt: skip
        return self

    def trained_by(self, steps: int, clients: int | None) -> int | None:
        """Steps that train one set of weights, of ``clients`` that take so many each; ``None``: nobody knows."""
        if self.adapters == "own":
            return steps
        return None if clients is None else steps * clients
