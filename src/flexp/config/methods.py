"""The table ``[method]``: which method, and what only one method reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from flexp.config.section import Fraction, Rate, Section

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
        return self.kind in TERMS and self.weight > 0


class FedAvgFtConfig(Section):
    """FedAvg, then local fine-tuning of the average."""

    finetune_steps: PositiveInt | None = None  # None: train.steps_per_round
    finetune_lr: Rate | None = None  # peak of the schedule while fine-tuning; None: train.personal.lr
    finetune_schedule: Literal["rest", "own"] = "rest"  # of the run's schedule, or one of its own after averaging's


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
    weighting: Literal["examples", "sparsity"] = "sparsity"  # by the norm of B·A, as in the paper


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
