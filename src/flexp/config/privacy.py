"""The table ``[privacy]``: what a client does so that the server reads less of its texts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from flexp.config.section import Fraction, PositiveInt, Rate, Section


class WarmUpConfig(Section):
    """Steps that a client teaches its head by itself, before it sends anything."""

    steps: Annotated[int, Field(ge=0)] = 150  # at most; fewer where max_content_words is met
    weight: Rate = 2.0  # of the penalty, beside staying close to the pooled activations that the head came with
    lr: Rate = 3e-4
    batch_size: Annotated[int, Field(ge=2)] = 8  # texts
    check_every: PositiveInt = 25  # steps, of training as well, where max_content_words is set


class PrivacyConfig(Section):
    """A client teaches its head not to tell its tokens (:mod:`flexp.client.guarding`), covers what it sends with noise
    (:mod:`flexp.client.noise`), sends one vector of each text alone, and trains on labels that were answered at random
    (:mod:`flexp.client.random_labels`)."""

    DEFENCE: ClassVar = ("pool", "penalty", "noise")  # of texts: what a bound chooses where it is not named

    # nopeek: the distance correlation between what is sent and the input embeddings (NoPeek, arXiv 2008.09161);
    # adversary: how well a small network reads these embeddings, which learns along with the head
    penalty: Literal["off", "nopeek", "adversary"] = "off"
    weight: Annotated[float, Field(ge=0.0)] = 0.1  # of the penalty along with the task
    noise: Annotated[float, Field(ge=0.0)] = 0.0  # ρ: its norm ÷ the norm that every token's activation is clipped to
    clip: Rate | None = None  # that norm; None: the median that the head gives public texts when it comes
    # of each text one vector is sent, the mean of its tokens' activations, and the blocks after the cut go on with that
    pool: bool = False
    # whether ∂task/∂h is sent. Without, nothing leaves that labels tell: what is below the cut is not trained, and the
    # server's blocks learn nothing from this client
    gradients: bool = True
    # ε of the labels: each is answered at random once, and training knows that answer alone; None: as they are
    label_epsilon: Rate | None = None
    # of labels, what may be told at most (0.5: nothing): chooses label_epsilon where that is not set, or judges it; or
    # gradients = false, where neither is named and that is expected to cost less
    max_label_auc: Annotated[float, Field(gt=0.5, lt=1.0)] | None = None
    public: str | None = None  # a file of public texts, one a line; None: the manual that comes with Python
    # what an attacker who is given the head itself may read when the warm-up ends, and while it trains; else nothing
    # (more) is sent. With data.clients.cut = "auto" it chooses the cut, and pool, noise and penalty where those are not
    # named. None: no bound
    max_content_words: Fraction | None = None
    audit: bool = False  # attack what the server is sent in the first round, and say what it can read
    warm_up: WarmUpConfig = WarmUpConfig()

    @model_validator(mode="after")
    def _one_vector_or_a_taught_head(self) -> PrivacyConfig:
        if self.pool and self.penalty != "off":
            raise ValueError("privacy.pool and privacy.penalty: no token's activation is sent that could be taught; "
                             "choose one")  # fmt: skip
        return self

    @property
    def of_texts(self) -> bool:
        """Whether anything is done for texts, or looked at before they are sent."""
        return self.penalty != "off" or self.noise > 0 or self.pool or self.max_content_words is not None

    @property
    def on(self) -> bool:
        """Whether anything is done."""
        return self.of_texts or self.of_labels or not self.gradients

    @property
    def of_labels(self) -> bool:
        """Whether anything is done for labels."""
        return self.label_epsilon is not None or self.max_label_auc is not None
