"""What one client does together with all others, in sums over the server: meetings, and averages after rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from flexp.client.adding import LateError, OverLink, Wait, agree
from flexp.client.averaging import MASKED, READABLE, averaged
from flexp.client.meeting import FIRST, LAST, RARE, UNMASKED, Meets
from flexp.client.model import SplitModel
from flexp.client.trainer import Trainer
from flexp.config import RunConfig
from flexp.errors import LinkError
from flexp.gaussian import kept_key
from flexp.links.sums import Adder, InOnePlace
from flexp.methods.base import deployed
from flexp.methods.parties import meet_at, renew, seat_of
from flexp.methods.turns import Place, gatherings
from flexp.run.settle import ClientSetup

NOISE_FILE, NOISE = "meet.noise", "this client's noise in sums"


def all_of(config: RunConfig) -> list[Place]:
    """Those that a run has, in their order."""
    return gatherings(config.train, Meets.of(config), deployed(config).averages)


def _names(clients: Iterable[str]) -> str:
    return ", ".join(sorted(clients)) or "nobody"


class Gathering:
    """One client at gatherings.

    Args:
        folder: keeps its own key for masked sums.
        note: is told what the client's owner should know.
        wait: for an answer, which may take as long as another client does.

    Attributes:
        met: how many of them it has been at.
    """

    def __init__(
        self, setup: ClientSetup, trainer: Trainer, folder: Path, note: Callable[[str], None], wait: Wait
    ) -> None:
        assert isinstance(trainer.model, SplitModel)
        self.config, self.data, self.task = setup.config, setup.data, setup.run.federation.task
        self.trainer, self.model, self.met = trainer, trainer.model, 0
        self._folder, self._note, self._wait = folder, note, wait
        self._told: set[str] = set()
        self._averaged: tuple[frozenset[str], frozenset[str]] | None = None  # whose weights the last average had

    def meet(self, number: int, run: str) -> None:
        """Before the first step or after the last: classifiers of class sums."""
        name, meet = self.data.name, self.config.method.meet
        adder: Adder
        try:
            adder = self._adder(run, UNMASKED)
        except LateError as error:
            self._note(f"{error}; it meets nobody (with method.meet.secret it could)")
            adder = InOnePlace([name])
        seat = seat_of(self.trainer, self.config)
        seat.personal = not deployed(self.config).averages
        seat.noise = kept_key(self._folder / NOISE_FILE, NOISE)
        choice = meet_at({name: seat}, {name: adder}, {name: self.trainer}, number)[name]
        if isinstance(adder, OverLink) and name not in (adder.everywhere or ()):
            others = _names(adder.anywhere - {name})
            self._note(f"{name} came too late to meet {others}: it adds its own to their sums, which they have not")
        self._was_at(Place("meet", number=number))
        if seat.rare and number == FIRST:
            self._note(RARE.format(seat.rare, meet.min_examples))
        if number == LAST:
            self._note(f"{name}: after the last meeting its classifier is: {choice}")

    def average(self, number: int, run: str) -> None:
        """After round ``number``: go on from the average of everybody's weights, with a fresh optimiser.

        Raises:
            LinkError: the others agreed on their key without this client, or train another model.
        """
        parameters, config = self.trainer.updater.parameters, self.config
        kinds = [[name, list(value.shape), str(value.dtype)] for name, value in parameters.items()]
        alike = json.dumps([kinds, self.task.label_names, config.seed, config.model.pooling])
        try:
            adder = self._adder(run, READABLE, alike)
        except LateError as error:
            raise LinkError(
                f"{error}; with method.meet.secret, alike at all clients, late ones take part as well"
            ) from error
        weights = averaged(parameters, len(self.data.train), adder, number)
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        renew(self.trainer, config)
        self._say_who(adder, number)
        self._was_at(Place("average", number=number))

    def _say_who(self, adder: OverLink, number: int) -> None:
        """Whose average it is, when that is not who the one before was of."""
        name, before = self.data.name, sum(place.what == "average" for place in all_of(self.config)[: self.met])
        whole, some = adder.everywhere or frozenset(), adder.anywhere
        if number > before + 1:
            lost = f"{before + 1} to {number - 1}" if number > before + 2 else f"{number - 1}"
            self._note(f"{name} came too late for the average of round {lost}, and goes on from that of round {number}")
        if name not in whole:
            what = "part of the average" if name in some else "the average"
            self._note(
                f"{name} came too late for {what} of round {number}: it takes that of {_names(some - {name})}, and "
                "keeps its own weights where they gave none"
            )
        elif (whole, some) != self._averaged:
            rest = some - whole
            also = f" (some pieces also of {_names(rest)})" if rest else ""
            self._note(f"from round {number} on weights are averaged of {_names(whole)}{also}")
        self._averaged = whole, some

    def _was_at(self, place: Place) -> None:
        self.met = all_of(self.config).index(place) + 1

    def _adder(self, run: str, unmasked: str, alike: str = "") -> OverLink:
        """Sums over the link, and a word about who can read them; of shares where there is something ``alike``."""

        def once(line: str) -> None:
            if line not in self._told:
                self._told.add(line)
                self._note(line)

        link, meet = self.model.link, self.config.method.meet
        if alike or not meet.masked:
            once(MASKED if meet.masked else unmasked)
        group = agree(link, meet, run, self._folder, once, self._wait)
        return OverLink(link, group, run, shares=bool(alike), wait=self._wait, alike=alike)
