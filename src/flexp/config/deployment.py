"""The table ``[deployment]`` of a configuration: how a run on several machines is conducted, reached and saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from flexp.config.loading import overridden
from flexp.config.section import PAIR, PositiveInt, Rate, Section

RESERVED = ("operator", "chain")


class DeploymentConfig(Section):
    """What ``flexp server``, ``flexp client`` and ``flexp fleet`` do beside what a simulation does."""

    # free: nobody waits for anybody. deterministic: one client steps at a time, and the weights are a simulation's
    schedule: Literal["free", "deterministic"] = "free"
    clients: list[str] | None = None  # who takes part; None: whoever comes (schedule = "free")
    # free: a client's steps train the shared blocks up to so many times the median of the others' steps, and
    # quota_ahead more; further ones are answered alone. None: all of them do
    quota: Annotated[float, Field(ge=1.0)] | None = 2.0
    quota_ahead: PositiveInt = 8
    # free: who meets (method.meet), or is averaged, waits so long for the others; None: for all
    meeting_seconds: Rate | None = None
    save_every: PositiveInt = 10  # steps of each client between two snapshots of all
    keep: PositiveInt = 3  # snapshots that every party keeps
    patience: Rate = 300.0  # seconds that a client tries to reach a server that has gone
    # what clients do when the server is stopped (Ctrl-C, SIGTERM) before the run is over: save and leave, or wait for
    # it to come back, for ``patience`` seconds. If it falls, they wait
    on_stop: Literal["leave", "wait"] = "leave"
    allow_export: bool = False  # the server gives clients the trained weights of the blocks that it runs for them
    answer_seconds: Rate = 120.0  # that a client waits for an answer before it connects anew and asks again
    end: PositiveInt | None = None  # behind the last block that the server holds; None: all blocks
    # of these blocks those that this server holds, where several share them: [first, last); None: all
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], PositiveInt], PAIR] | None = None
    next: str | None = None  # the server that has the blocks behind them, e.g. grpcs://HOST:PORT; None: it is the last
    max_tokens: PositiveInt = 32_768  # batch × length of an exchange, at most
    requests_per_second: Rate = 1000.0  # of a client; requests of a faster one wait
    bytes_per_second: Rate | None = None  # of tensors that a client sends; None: no limit

    @field_validator("clients")
    @classmethod
    def _names(cls, names: list[str] | None) -> list[str] | None:
        odd = [name for name in names or () if not name.strip() or name in RESERVED or (names or []).count(name) > 1]
        if odd or names == []:
            raise ValueError(
                f"{odd[0] if odd else []!r} is not allowed: expected the names of clients, each once, and not "
                f"{' or '.join(RESERVED)}, whose tokens are no client's"
            )
        return names

    @model_validator(mode="after")
    def _known_to_all(self) -> DeploymentConfig:
        if self.schedule == "deterministic" and not self.clients:
            raise ValueError('schedule = "deterministic" needs deployment.clients, the names of all clients')
        return self


def load(path: Path, overrides: Iterable[str] = ()) -> DeploymentConfig:
    """The table of a ``CONFIG.toml`` with overrides; the defaults without one.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or impossible.
    """
    return DeploymentConfig.checked(overridden(path, overrides).get("deployment", {}), str(path), "deployment")
