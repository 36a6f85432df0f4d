"""The table ``[method]``: which method, and how clients align with the server.

What only one method reads is declared by its class (:mod:`flexp.methods.base`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, PositiveFloat, create_model, model_validator

from flexp.config.section import Fraction, PositiveInt, Rate, Section, named
from flexp.registry import ALIGNMENTS, METHODS

DEFAULT = "flexp-sfl"
"""The method when nothing is said."""

HEADLINE = (DEFAULT, "closed-form", "local", "fedavg", "fedavg-ft", "pfedme", "ditto")
"""What ``flexp compare`` compares when nothing is said."""

S = TypeVar("S", bound=Section)


class AlignConfig(Section):
    """The term that keeps a personal layer useful on everybody's data (FlexP-SFL, arXiv 2508.10349)."""

    # a term of the loss (:mod:`flexp.server.alignment`); weights: the client pulls the server's; off: neither
    kind: Annotated[str, named(ALIGNMENTS, "off", "weights")] = "off"
    weight: Annotated[float, Field(ge=0.0)] = 0.25  # λ
    temperature: Rate = 1.0  # kl
    normalize: bool = False  # compare standardised hidden states
    at: Literal["cut", "every-block"] = "cut"
    every: PositiveInt = 1  # align (with kind = "weights": pull) on every n-th step
    combine: Literal["sum", "project"] = "sum"
    pull: Fraction = 0.2  # μ of kind = "weights"
    # clients with deeper cuts train the server's copies of their aligned blocks, too (needs z_base, like kl)
    teach: bool = False
    # weights: the client trains none of its aligned blocks; it teaches the server's, and pulls them
    follow: bool = False

    @model_validator(mode="after")
    def _follow_whom(self) -> AlignConfig:
        if self.follow and not (self.kind == "weights" and self.teach):
            raise ValueError('follow needs kind = "weights" and teach = true: who trains no copy of its own takes the '
                             "server's, which must learn from its data")  # fmt: skip
        return self

    @property
    def has_term(self) -> bool:
        """Whether there is a term, whose gradient the server computes; with a weight of 0 there is none."""
        return self.kind not in ("off", "weights") and self.weight > 0


class MeetConfig(Section):
    """Clients meet in a classifier in closed form, made of their summed class statistics: before the first step, and
    again after the last, from where each has its own (:mod:`flexp.client.closed_form`)."""

    # auto: in runs, comparisons and fleets, where the classifier begins as drawn and has more than two classes
    on: bool | Literal["auto"] = "auto"
    gram: bool = True  # also sum Σφφᵀ, H² numbers; without, class means alone
    min_examples: PositiveInt = 3  # of all clients together; a class with fewer is left out of the sums
    noise: Annotated[float, Field(ge=0.0)] = 0.0  # in each sum, as a multiple of what one example can change
    clip: PositiveFloat | None = None  # with noise: no feature counts as longer
    masked: bool = True  # over a network, sums are hidden from the server, also those of weights that are averaged
    secret: str | None = None  # a file that the clients' owners share; None: clients agree on a key through the server
    group: str | None = (
        None  # the fingerprint that the clients' public keys must have; None: it is told, to be compared
    )

    @model_validator(mode="after")
    def _noise_beside_what(self) -> MeetConfig:
        if self.noise and self.clip is None:
            raise ValueError(
                "noise is a multiple of clip, the length that no feature exceeds in the sums: set that, too"
            )
        return self


class PersonalConfig(Section):
    """What of its personal parts a client of a split method trains."""

    # its first blocks, which stay as they came; where all blocks below its cut do, no gradient comes back to them
    frozen_head_blocks: Annotated[int, Field(ge=0)] = 0


class MethodConfig(Section):
    """The method and its own settings.

    ``[method.TABLE]`` has those of a method, checked by its class's ``Config``. Other methods may have theirs as well,
    as a comparison needs. A table that says what stands anyway is left out, so that equal settings are equal.

    ``budget`` matters to methods that compute several gradients a step or train two models: with ``equal`` a client
    spends ``train.steps_per_round`` gradient evaluations a round in all, as with every other method; with ``paper``
    every step and every model has as many as its paper gives it, on top.
    """

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, named(METHODS)] = DEFAULT
    budget: Literal["equal", "paper"] = "equal"
    align: AlignConfig = AlignConfig()
    meet: MeetConfig = MeetConfig()
    personal: PersonalConfig = PersonalConfig()

    @model_validator(mode="before")
    @classmethod
    def _own_tables(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        own = {key: value for key, value in content.items() if key not in cls.model_fields}
        known: dict[str, Any] = {key: (config, ...) for key in own if (config := _config_of(key)) is not None}
        checked = create_model("Tables", __base__=Section, **known).model_validate(own)
        return {key: value for key, value in content.items() if key not in own} | {
            key: table for key, table in checked if table != type(table)()
        }

    def own(self, table: str, config: type[S]) -> S:
        """The settings of ``[method.TABLE]``, an instance of ``config``."""
        found = (self.model_extra or {}).get(table, config())
        assert isinstance(found, config)
        return found

    @classmethod
    def holds(cls) -> dict[str, Any]:
        methods = [METHODS[name] for name in METHODS]
        return super().holds() | {method.table: method.Config for method in methods if method.Config is not None}


def _config_of(table: str) -> type[Section] | None:
    """What checks ``[method.TABLE]``, if some method has it: the one of that name, else one of ours, else another's."""
    for name in sorted(METHODS, key=lambda name: (name.replace("-", "_") != table, METHODS.owner(name) != "flexp")):
        if METHODS[name].table == table:
            config: type[Section] | None = METHODS[name].Config
            return config
    return None
