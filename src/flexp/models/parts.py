"""Which part of a model a party owns, and what stands where the rest was.

Block indices never change: block 7 of the whole model is ``layers[7]`` of every party, so that models whose blocks
differ (sliding windows, mixtures of experts) stay right and ``state_dict`` keys stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from flexp.errors import ConfigError, ModelError
from flexp.models.anatomy import Anatomy
from flexp.models.execution import Absent, PassThrough, ZeroEmbedding, ZeroPatches


@dataclass(frozen=True)
class Part:
    """What a party keeps: some blocks, and perhaps both ends of the model (embeddings, final norm, head)."""

    blocks: frozenset[int]
    ends: bool

    @classmethod
    def whole(cls, blocks: int) -> Part:
        """The whole model."""
        return cls(frozenset(range(blocks)), ends=True)

    @classmethod
    def client(cls, cut: tuple[int, int], blocks: int) -> Part:
        """The ends, blocks [0, s) and blocks [e, L) of a model with L = ``blocks``."""
        start, stop = check_cut(cut, blocks)
        return cls(frozenset(range(start)) | frozenset(range(stop, blocks)), ends=True)

    @classmethod
    def server(cls, start: int, stop: int) -> Part:
        """Blocks [start, stop), and nothing that ever sees a token, a pixel or a label."""
        return cls(frozenset(range(start, stop)), ends=False)


def check_cut(cut: tuple[int, int | None], blocks: int, where: str = "cut") -> tuple[int, int]:
    """Complete ``cut`` = (s, e) for a model with L = ``blocks`` and check 0 ≤ s < e ≤ L.

    Raises:
        ConfigError: the cut lies outside of the model, or leaves nothing to the server.
    """
    start, stop = cut[0], blocks if cut[1] is None else cut[1]
    if not 0 <= start < stop <= blocks:
        raise ConfigError(
            f"{where} = ({start}, {stop}) does not fit a model of {blocks} blocks: "
            f"expected 0 <= s < e <= {blocks}, so that the server runs blocks [s, e)"
        )
    return start, stop


def prune(model: nn.Module, anatomy: Anatomy, part: Part) -> None:
    """Take out of ``model``, in place, all that ``part`` does not name."""
    blocks = model.get_submodule(anatomy.path)
    assert isinstance(blocks, nn.ModuleList)
    for index in range(anatomy.blocks):
        if index not in part.blocks and not isinstance(blocks[index], Absent):
            blocks[index] = Absent(index, blocks[index])
    if part.ends:
        return
    if anatomy.image:
        _replace_patches(model)
    replaced: list[str] = []
    for path, module in list(outside_blocks(model, anatomy)):
        if any(path.startswith(other + ".") for other in replaced):
            continue
        own = anatomy.path.startswith(path + ".")
        if isinstance(module, PreTrainedModel) and not own:  # such as a tower for images
            stub: nn.Module = PassThrough(None)
        elif isinstance(module, nn.Embedding):
            stub = ZeroEmbedding(module.embedding_dim, module.weight.dtype)
        elif next(module.parameters(recurse=False), None) is not None:
            stub = PassThrough(getattr(module, "out_features", None))
        else:
            continue
        if own:
            raise ModelError(
                f"{type(model).__name__} cannot be split: {path}, which holds its blocks, has weights of its own; "
                "use an architecture that `flexp verify --list` names"
            )
        _replace(model, path, stub)
        replaced.append(path)


def outside_blocks(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """The named modules of ``model`` that are neither a block nor inside one."""
    prefix = anatomy.path + "."
    return ((path, module) for path, module in model.named_modules() if not path.startswith(prefix) and path)


def _replace_patches(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "embeddings":
            dtype = next(module.parameters()).dtype
            _replace(model, path, ZeroPatches(dtype))
            return
    raise ModelError(
        f"{type(model).__name__} cannot be split: its patch embedding was not found under the name 'embeddings'; "
        "use ViT or DeiT"
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
