"""The attacks on tokens, one file each, in the order in which they are made."""

from __future__ import annotations

from flexp.attacks.base import Attack
from flexp.attacks.decoder import Decoder
from flexp.attacks.linear import Linear
from flexp.attacks.prefix import Prefix
from flexp.attacks.pursuit import Pursuit
from flexp.attacks.table import Table
from flexp.attacks.transformer import Transformer
from flexp.attacks.words import Words

ATTACKS: tuple[type[Attack], ...] = (Table, Linear, Decoder, Transformer, Prefix)
ON_MEANS: tuple[type[Attack], ...] = (Table, Linear, Words, Pursuit, Decoder)
"""Where one vector of each text is sent."""
