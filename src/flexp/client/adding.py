"""A client's sums over a link: fixed-point numbers, under masks that the server cannot take off (:mod:`flexp.masking`).

Masked or not, the same integers are added, so the sums are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexp.client.exchange import waiting
from flexp.config import MeetConfig
from flexp.errors import ConfigError, LinkError, StorageError
from flexp.files import kept, write_private
from flexp.links.asking import KEYS, SEALED, SumReply, SumRequest
from flexp.links.base import Link
from flexp.links.sums import Sums
from flexp.masking import NONCE_BYTES, SHARES, SUMS, Group, Identity, fingerprint, from_ring, to_ring
from flexp.rng import current_turn

KEY_FILE, GROUP_FILE = "meet.key", "meet.group"


class LateError(LinkError):
    """Others met already, with a key that this client cannot have."""


Wait = Callable[["Future[SumReply]"], SumReply]


def _result(future: Future[SumReply]) -> SumReply:
    return future.result()


class OverLink:
    """Sums that the server takes.

    Args:
        group: hides what this client gives; ``None``: the server reads it.
        run: the run's name, so that no mask serves twice.
        shares: what is given is multiplied by this client's share, and who comes too late takes what the others have;
            else it adds its own to that.
        wait: for an answer, which may take as long as another client does.
        alike: what all clients must have alike, in words; of those that have not, nothing is added up.

    Attributes:
        late: whether the last sum is without what this client gave.
        everywhere, anywhere: whose numbers are in all sums that were given to, and in some; ``None``: in none yet.
    """

    everywhere: frozenset[str] | None = None
    anywhere: frozenset[str] = frozenset()

    def __init__(
        self,
        link: Link,
        group: Group | None = None,
        run: str = "",
        *,
        shares: bool = False,
        wait: Wait = _result,
        alike: str = "",
    ) -> None:
        self._link, self._group, self._run, self._wait = link, group, run, wait
        self._scale, self._shares, self.late = SHARES if shares else SUMS, shares, False
        self._mark, digest = "-", hashlib.sha256(f"{run} {alike}".encode()).hexdigest()
        if group is not None:
            self._mark, digest = group.mark, group.digest(alike)
        self._alike = digest[:16]

    def give(self, number: int, values: Sums) -> Callable[[], Sums]:
        """See :class:`flexp.links.sums.Adder`.

        Raises:
            TrainingError: a number is not finite, or too large.
        """
        group, client, purpose = self._group, self._link.client, f"{self._run} {number}"
        scale = self._scale
        flat = torch.cat([value.double().flatten() for value in values.values()]).numpy()
        nonce = secrets.token_bytes(NONCE_BYTES)
        ring = to_ring(flat, scale) if group is None else group.hide(flat, client, purpose, nonce, scale)
        note = f"{'-' if group is None else nonce.hex()} {self._mark} {self._alike}"
        answer = _asked(self._link, SumRequest(number, torch.from_numpy(ring.view(np.int64)), note), self._wait)

        def total() -> Sums:
            reply = answer()
            if reply.values_N is None or reply.values_N.shape != (len(flat),):
                raise LinkError(f"client {client}: the server gives a sum that is not of what was given")
            self.late, there = client not in reply.notes, frozenset(reply.notes)
            self.everywhere = there if self.everywhere is None else self.everywhere & there
            self.anywhere |= there
            late = flat if self.late and not self._shares else 0.0
            added = reply.values_N.contiguous().numpy().view(np.uint64)
            nonces = {}
            for name, said in reply.notes.items():
                hidden, mark, alike = (*said.split(" "), "", "", "")[:3]
                if mark != self._mark:
                    raise LinkError(
                        f"client {client}: {name} hides its sums with another key of the group, or one of them does "
                        "not; set the same method.meet.masked and secret everywhere, and start the run anew"
                    )
                if alike != self._alike:
                    raise LinkError(
                        f"client {client}: {name} trains another model than this client: names of classes (in their "
                        "order), seed, [model], cut and method.personal.frozen_head_blocks must be alike where weights "
                        "are averaged"
                    )
                nonces[name] = _bytes("" if group is None else hidden)
            if group is None:
                return _shaped(from_ring(added, scale) + late, values)
            return _shaped(group.reveal(added, nonces, purpose, scale) + late, values)

        return total


def agree(
    link: Link,
    config: MeetConfig,
    run: str,
    folder: Path,
    clients: Callable[[str], None] = lambda _: None,
    wait: Wait = _result,
) -> Group | None:
    """The key of the run's clients, which the server does not learn; ``None``: their settings want none.

    With ``method.meet.secret`` it comes from what their owners share. Else the first of them by name draws it and seals
    it for each other, and the server carries that: ``clients`` is told the fingerprint of their public keys.

    Args:
        folder: keeps this client's own key.

    Raises:
        LateError: the others have agreed without this client, which came too late.
        ConfigError: the secret cannot be read or is too short, or the group is not the one in ``method.meet.group``.
        LinkError: what the server carried is not what a client sealed for this one.
    """
    if not config.masked:
        return None
    if config.secret is not None:
        try:
            return Group.from_secret(Path(config.secret).read_bytes().strip(), run)
        except OSError as error:
            raise ConfigError(f"method.meet.secret = {config.secret!r} cannot be read ({error.strerror})") from error
    own, client = _identity(folder / KEY_FILE), link.client
    keys = _asked(link, SumRequest(KEYS, note=own.public.hex()), wait)()
    publics = {name: _bytes(note) for name, note in keys.notes.items()}
    if client not in publics:
        raise LateError(f"client {client} comes when the others have agreed on their key without it")
    if publics.get(client) != own.public:
        raise LinkError(f"client {client}: the server holds another public key of it; start the run anew")
    found = fingerprint(publics)
    _same_as_before(folder / GROUP_FILE, run, found, client)
    if config.group is not None and config.group.split() != found.split():
        raise ConfigError(
            f"method.meet.group is {config.group!r}, and the server names clients whose fingerprint is {found!r}: it "
            "may have put keys of its own among them; compare with the other owners"
        )
    clients(
        f"{client} meets {', '.join(sorted(publics))}; fingerprint of their keys: {found}. Compare it with the other "
        "owners', or pin it with method.meet.group: a server with a key of its own in it could read the sums"
    )
    dealer = min(publics)
    sealed = own.deal(publics) if dealer == client else {}
    note = json.dumps({name: each.hex() for name, each in sealed.items()})
    told = _asked(link, SumRequest(SEALED, note=note), wait)().notes.get(dealer, "")
    try:
        mine = _bytes(json.loads(told)[client])
    except (ValueError, KeyError, TypeError) as error:
        raise LinkError(f"client {client}: the group's key did not arrive; start the run anew") from error
    # The dealer, too, takes what is sealed: after a restart it is what the others have.
    return own.open(mine, client, publics[dealer], publics)


def _same_as_before(file: Path, run: str, found: str, client: str) -> None:
    """Refuse another group of clients in the same run: what owners have compared holds to its end."""
    try:
        known = json.loads(file.read_bytes())
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError) as error:
        raise StorageError(f"{file}: cannot be read as the group of this run's clients ({error})") from error
    if known.get(run, found) != found:
        raise LinkError(
            f"client {client}: the server names other clients' keys than before in this run (their fingerprint was "
            f"{known[run]!r}, and is {found!r}): it may have put keys of its own among them; start the run anew"
        )
    if run not in known:
        write_private(file, json.dumps({run: found}).encode())


def _identity(file: Path) -> Identity:
    """This client's own key, kept so that it is the same after a restart."""
    what = "this client's key for meetings"
    found = kept(file, lambda: Identity().private, what)
    try:
        return Identity(found)
    except ValueError as error:
        raise StorageError(f"{file}: cannot be read as {what} ({error})") from error


def _asked(link: Link, request: SumRequest, wait: Wait) -> Callable[[], SumReply]:
    turn = current_turn()
    with waiting(link, turn):
        future = link.call(request)

    def answer() -> SumReply:
        with waiting(link, turn):
            return wait(future)

    return answer


def _bytes(note: str) -> bytes:
    try:
        return bytes.fromhex(note)
    except ValueError as error:
        raise LinkError(f"a note of a sum is not what a client sends: {note[:40]!r}") from error


def _shaped(numbers: np.ndarray[tuple[int, ...], np.dtype[np.float64]], like: Sums) -> Sums:
    flat: Tensor = torch.from_numpy(numbers)
    parts = torch.split(flat, [value.numel() for value in like.values()])
    return {
        name: part.reshape(value.shape).to(value.dtype) for (name, value), part in zip(like.items(), parts, strict=True)
    }
