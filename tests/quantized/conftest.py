"""Needs bitsandbytes, which makes peft's import slow and so stands in an environment of its own (``make test``)."""

import pytest

pytest.importorskip("bitsandbytes", reason="needs flexp[quantized]")
