"""A link around another one."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor

from flexp.links.base import Link, Meter
from flexp.links.declaring import Request

R = TypeVar("R")


class Wrapping:
    """A link around another one: what it does not override is the inner link's."""

    def __init__(self, inner: Link) -> None:
        self.inner = inner

    @property
    def meter(self) -> Meter:
        return self.inner.meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self.inner.meter = meter

    @property
    def residuals(self) -> dict[str, Tensor]:
        return self.inner.residuals

    @residuals.setter
    def residuals(self, residuals: dict[str, Tensor]) -> None:
        self.inner.residuals = residuals

    @property
    def client(self) -> str:
        return self.inner.client

    def call(self, request: Request[R]) -> Future[R]:
        return self.inner.call(request)

    def close(self) -> None:
        self.inner.close()
