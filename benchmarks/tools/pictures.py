"""The image task of a benchmark (Zhang et al., JMLR 2025, arXiv 2312.04992): its pictures, clients and network.

The benchmark joins training and test pictures, divides them among clients by one of two rules, and keeps a quarter of
every client's for testing. Its published clients are one draw, from numpy's legacy generator with seed 1, and some
partitions are easier than others by whole points. So the rules here draw from that generator in the same order: with
seed 1 they give the very clients that its script makes (a test compares them with a table that it published).

The network is the small convolutional one of federated learning's image benchmarks, as a stage that every method runs
on: two convolutions and two linear layers (McMahan et al., AISTATS 2017, arXiv 1602.05629, sect. 3, without padding),
as PFLlib's "4-layer CNN": 582,026 numbers for grey pictures of 28 × 28 pixels and ten classes. It is no transformer and
is never cut; its three first layers stand where a transformer has blocks, so that methods which tell a body from a head
find them where they look.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from flexp.assets import resolve
from flexp.config import DataConfig
from flexp.data.tasks import limit_of
from flexp.data.tasks.image_classification import ImageClassification
from flexp.data.types import ClientData, Example, Federation
from flexp.errors import DataError
from flexp.models.anatomy import Anatomy, Part
from flexp.models.stage import Stage

Rule = Literal["dirichlet", "pathological"]
Rows = npt.NDArray[np.int64]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts the four files."""

TRAIN_SHARE = 0.75
_FEATURES = 512
_FILES = ("train", "t10k")
_CODES = {3: "images", 1: "labels"}


@dataclass(frozen=True)
class Pictures:
    """``pixels`` (N, side, side) from 0 to 255 and ``labels`` (N,) from 0 to C − 1."""

    name: str
    pixels: npt.NDArray[np.uint8]
    labels: Rows


def read_pictures(reference: str | None) -> Pictures:
    """A folder with the four files of MNIST's form, plain or gzipped, or ``asset:digits``; ``None``: Debian's place.

    Raises:
        DataError: the files are not there, or are not of that form.
    """
    if reference is not None and reference.startswith("asset:"):
        return _from_table(reference)
    folder = DEBIAN if reference is None else Path(reference)
    found = {(part, dimensions): _idx(folder, part, dimensions) for part in _FILES for dimensions in (3, 1)}
    pixels = np.concatenate([found[part, 3] for part in _FILES])
    labels = np.concatenate([found[part, 1] for part in _FILES]).astype(np.int64)
    if len(pixels) != len(labels):
        raise DataError(f"{folder} holds {len(pixels)} pictures and {len(labels)} labels; expected as many of both")
    return Pictures(folder.name, pixels, labels)


def divide(labels: Rows, clients: int, rule: Rule, *, seed: int = 1, alpha: float = 0.1) -> list[tuple[Rows, Rows]]:
    """The rows of every client: for training, and for testing.

    Args:
        alpha: of the Dirichlet distribution. The pathological rule gives every client two labels.
    """
    draw = np.random.RandomState(seed)
    owned = _dirichlet(labels, clients, alpha, draw) if rule == "dirichlet" else _pathological(labels, clients, draw)
    made = []
    for rows in owned:
        order = rows[draw.permutation(len(rows))]
        test = len(rows) - int(TRAIN_SHARE * len(rows))
        made.append((order[test:], order[:test]))
    return made


def federation(pictures: Pictures, parts: list[tuple[Rows, Rows]]) -> Federation:
    """The clients' examples, pixels from −1 to 1 and of shape (1, side, side), under an image classification task."""
    pixels = torch.from_numpy(pictures.pixels).float().div_(127.5).sub_(1.0).unsqueeze(1)

    def examples(rows: Rows) -> list[Example]:
        return [{"pixel_values": pixels[row], "labels": int(pictures.labels[row])} for row in rows]

    names = [str(label) for label in range(int(pictures.labels.max()) + 1)]
    config = DataConfig(source=pictures.name, task="image-classification")
    task = ImageClassification(config, None, limit_of(config, None), names)
    clients = [
        ClientData(f"client-{number:02d}", examples(train), [], examples(test))
        for number, (train, test) in enumerate(parts)
    ]
    return Federation(clients, task)


def _dirichlet(labels: Rows, clients: int, alpha: float, draw: np.random.RandomState) -> list[Rows]:
    """Label by label, shares from a symmetric Dirichlet distribution; who has an equal share of all gets no more.

    Drawn anew, from the generator as it stands, until nobody is without rows.
    """
    while True:
        owned: list[list[Rows]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, dtype=np.int64)
        for label in range(int(labels.max()) + 1):
            rows = np.flatnonzero(labels == label)
            draw.shuffle(rows)
            shares = draw.dirichlet(np.full(clients, alpha)) * (sizes < len(labels) / clients)
            ends = (np.cumsum(shares / shares.sum()) * len(rows)).astype(np.int64)[:-1]
            for client, part in enumerate(np.split(rows, ends)):
                owned[client].append(part)
                sizes[client] += len(part)
        if sizes.min() > 0:
            return [np.concatenate(parts) for parts in owned]


def _pathological(labels: Rows, clients: int, draw: np.random.RandomState) -> list[Rows]:
    """Two labels a client, in order.

    Who shares a label gets from a tenth of an equal part to a whole one of it, and the last of them what is left.
    """
    classes, each = int(labels.max()) + 1, 2
    owned: list[list[Rows]] = [[] for _ in range(clients)]
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        takers = [client for client in range(clients) if len(owned[client]) < each][: -(-clients * each // classes)]
        equal = len(rows) / len(takers)
        sizes = draw.randint(int(equal / 10), int(equal), len(takers) - 1)
        for client, part in zip(takers, np.split(rows, np.cumsum(sizes)), strict=True):
            owned[client].append(part)
    return [np.concatenate(parts) for parts in owned]


def _idx(folder: Path, part: str, dimensions: int) -> npt.NDArray[np.uint8]:
    name = f"{part}-{_CODES[dimensions]}-idx{dimensions}-ubyte"
    place = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if place is None:
        raise DataError(
            f"{folder / name}(.gz) is not there; install Debian's package dataset-fashion-mnist, or name with --data a "
            "folder that has its four files, or asset:digits"
        )
    content = gzip.decompress(place.read_bytes()) if place.suffix == ".gz" else place.read_bytes()
    sizes = np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4").astype(int)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != 4 + 4 * dimensions + int(np.prod(sizes)):
        raise DataError(f"{place} is no file of {dimensions}-dimensional bytes in IDX form; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(*sizes).copy()


def _from_table(reference: str) -> Pictures:
    columns: dict[str, Any] = pyarrow.parquet.read_table(str(resolve(reference))).to_pydict()
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("L")) for image in columns["image"]]
    labels = np.array([int(label) for label in columns["label"]], dtype=np.int64)
    return Pictures(reference, np.stack(pixels), labels)


class SmallCnn(nn.Module):
    """Pictures (B, channels, side, side) to logits (B, classes), with the names that FlexP asks of a model."""

    base_model_prefix = "base"
    main_input_name = "pixel_values"

    def __init__(self, channels: int = 1, side: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.config = PretrainedConfig(hidden_size=_FEATURES)
        left = ((side - 4) // 2 - 4) // 2  # pixels of a side after two convolutions of 5 × 5 and two poolings
        self.base = nn.Module()
        self.base.blocks = nn.ModuleList(
            [
                _convolution(channels, 32),
                _convolution(32, 64),
                nn.Sequential(nn.Flatten(), nn.Linear(64 * left * left, _FEATURES), nn.ReLU()),
            ]
        )
        self.classifier = nn.Linear(_FEATURES, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on a CPU

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.classifier.weight.device

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """An object with ``logits`` and, given labels (B,), the mean cross-entropy ``loss``."""
        hidden = pixel_values
        blocks = self.base.blocks
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            hidden = block(hidden)
        logits_BC = self.classifier(hidden)
        return SimpleNamespace(loss=None if labels is None else F.cross_entropy(logits_BC, labels), logits=logits_BC)


def small_cnn(seed: int, *, channels: int = 1, side: int = 28, classes: int = 10) -> Stage:
    """The network with weights drawn from ``seed`` as torch's layers draw them, whole and frozen by nobody."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCnn(channels, side, classes)
    anatomy = Anatomy(path="base.blocks", blocks=3, hidden=_FEATURES, image=True)
    return Stage(model, anatomy, Part.whole(anatomy.blocks))


def _convolution(channels: int, filters: int) -> nn.Sequential:
    # Pooling first: it gives the same as ReLU first, and ReLU has a quarter of the work.
    return nn.Sequential(nn.Conv2d(channels, filters, 5), nn.MaxPool2d(2), nn.ReLU())
