"""Components are found by name, in the package and in others, and what is wrong with one is told in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexp import registry
from flexp.errors import ConfigError

REGISTRIES = [registry.METHODS, registry.ALIGNMENTS, registry.CODECS, registry.TASKS, registry.PARTITIONERS]


@pytest.mark.parametrize("kind", REGISTRIES, ids=lambda kind: kind.word)
def test_what_the_source_says_is_what_is_imported(kind: registry.Registry) -> None:
    assert len(kind) > 2
    for name, component in kind.items():
        assert component.name == name
        assert kind.owner(name) == "flexp"


def test_names_are_known_without_importing_anything_heavy() -> None:
    program = (
        "import sys; from flexp import registry; "
        "assert 'fedavg' in registry.METHODS and 'kl' in registry.ALIGNMENTS; "
        "assert not {'torch', 'pydantic', 'flexp.methods'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^there is no method 'fedavgg'; did you mean 'fedavg'\? known: apfl, "):
        registry.METHODS["fedavgg"]
