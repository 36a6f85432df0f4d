"""What a client sends once: z of its examples, from a head that does not change, for as long as it is joined."""

from __future__ import annotations

import os
import secrets
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

from flexp.errors import LinkError, LinkLostError
from flexp.links.messages import ForwardRequest, KeptForwardRequest
from flexp.links.packing import Places
from flexp.masking import cryptography

NONCE, TAG = 12, 16
"""Bytes that sealing adds before and behind."""


class InMemory(dict[int, Tensor]):
    """Examples as they came."""

    def size(self, value: Tensor) -> int:
        """Bytes that it takes."""
        return value.numel() * value.element_size()

    def frees(self, number: int, value: Tensor) -> int:
        """Bytes that ``value`` does not take, since it comes in the place of what is there."""
        return self.size(self[number]) if number in self else 0


class Sealed:
    """Examples in a file, each sealed with a client's key (AES-256-GCM), bound to its number.

    The file has no name, so it is gone with this object or with the process, whatever ends that. It lies where Python
    puts temporary files (``TMPDIR``). An example that comes again takes its old place, if it is of its size.

    Raises:
        ConfigError: the library ``cryptography`` is not here.
    """

    def __init__(self, key: str) -> None:
        self._seal = cryptography("ciphers.aead", 'link.cache = "disk" needs').AESGCM(bytes.fromhex(key))
        self._file = tempfile.TemporaryFile(prefix="flexp-examples-", buffering=0)  # noqa: SIM115
        self._end = 0
        self._places: dict[int, _Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def size(self, value: Tensor) -> int:
        """Bytes that it takes."""
        return NONCE + value.numel() * value.element_size() + TAG

    def frees(self, number: int, value: Tensor) -> int:
        """As :meth:`InMemory.frees`."""
        size = self.size(value)
        return size if number in self and self._places[number].size == size else 0

    def __setitem__(self, number: int, value: Tensor) -> None:
        nonce, bound = secrets.token_bytes(NONCE), number.to_bytes(8, "big", signed=True)
        plain = value.cpu().contiguous().view(torch.uint8).numpy()
        left = memoryview(nonce + self._seal.encrypt(nonce, plain, bound))
        before, size = self._places.pop(number, None), self.size(value)  # a half-written one is none
        begins = place = self._end if before is None or before.size != size else before.begins
        while left:
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written
        self._places[number] = _Place(begins, size, value.shape, value.dtype, value.device)
        self._end = max(self._end, place)

    def __getitem__(self, number: int) -> Tensor:
        from cryptography.exceptions import InvalidTag

        place = self._places[number]
        read = os.pread(self._file.fileno(), place.size, place.begins)
        try:
            plain = self._seal.decrypt(read[:NONCE], read[NONCE:], number.to_bytes(8, "big", signed=True))
        except InvalidTag:
            raise OSError("it is not what was written") from None
        return torch.frombuffer(bytearray(plain), dtype=place.dtype).view(place.shape).to(place.device)


class _Place(NamedTuple):
    begins: int
    size: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Examples:
    """By the client's own numbers: z of an example without padding, (tokens, H).

    Args:
        key: of the client's, in hexadecimal, with which they are sealed on the disk; empty: they stay in memory.

    Attributes:
        bytes: that they take.
    """

    def __init__(self, key: str = "") -> None:
        self.kept: InMemory | Sealed = Sealed(key) if key else InMemory()
        self.bytes = 0

    def whole(self, request: KeptForwardRequest, client: str) -> tuple[ForwardRequest, dict[int, Tensor]]:
        """The forward that is asked for, with its activation put together; and the examples that came with it.

        Raises:
            LinkError: what came is not what its mask and its flags say.
            LinkLostError: an example is not kept here (any more): who joins anew sends all of them again.
        """
        numbers, fresh = request.examples_B.tolist(), request.fresh_B.tolist()
        mask_BT = request.mask_BT.bool()
        lengths = mask_BT.sum(1).tolist()
        if not all(lengths):
            raise LinkError(f"client {client}: an example without a token came")
        told = [length for length, new in zip(lengths, fresh, strict=True) if new]
        came = 0 if request.hidden_BTH is None else request.hidden_BTH.shape[1]
        if sum(told) != came or (request.hidden_BTH is not None and request.hidden_BTH.shape[0] != 1):
            raise LinkError(f"client {client}: {came} tokens came, expected {sum(told)} as its mask says")
        parts = iter(() if request.hidden_BTH is None else torch.split(request.hidden_BTH[0], told))
        new = {number: next(parts) for number, is_new in zip(numbers, fresh, strict=True) if is_new}
        rows = [new[number] if number in new else self._one(number, client) for number in numbers]
        for number, value, length in zip(numbers, rows, lengths, strict=True):
            if len(value) != length:
                raise LinkError(
                    f"client {client}: of its example {number} {len(value)} tokens are kept, expected {length} as its "
                    "mask says"
                )
        hidden_BTH = Places.of(mask_BT).unpack(torch.cat(rows).unsqueeze(0))
        whole = ForwardRequest(
            request.exchange, hidden_BTH, request.mask_BT, train=True, step=request.step, rows_BT=request.rows_BT
        )
        return whole, new

    def keep(self, new: dict[int, Tensor], room: int) -> bool:
        """Keep examples if they take no more than ``room`` bytes, and the disk has them; gives whether they are kept.

        What comes again takes the place of what was there.
        """
        size = sum(self.kept.size(value) - self.kept.frees(number, value) for number, value in new.items())
        if size > room:
            return False
        try:
            for number, value in new.items():
                self.kept[number] = value.clone()
        except OSError:  # it comes again each time
            return False
        self.bytes += size
        return True

    def _one(self, number: int, client: str) -> Tensor:
        try:
            return self.kept[number]
        except (KeyError, OSError) as error:
            why = "" if isinstance(error, KeyError) else f" any more ({error})"
            raise LinkLostError(
                f"client {client}: example {number} is not kept here{why}: join anew and send it again"
            ) from error
