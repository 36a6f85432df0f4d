"""Where a Hugging Face model keeps its blocks, whether it can be cut between them exactly, and which part a party owns.

Block indices never change: block 7 of the whole model is ``layers[7]`` of every party, so that models whose blocks
differ (sliding windows, mixtures of experts) stay right and ``state_dict`` keys stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flexp.errors import ConfigError, ModelError
from flexp.models.execution import Absent, PassThrough, ZeroEmbedding, ZeroPatches

_NOT_SPLIT = {
    "layerdrop": "blocks that are left out at random differ between client and server",
    "output_router_logits": "the loss on the load of experts needs all blocks in one place",
}
"""Settings of a configuration that no split can follow, and why."""


@dataclass(frozen=True)
class Anatomy:
    """What has to be known of a model before it can be cut.

    Attributes:
        path: dotted name of the ``ModuleList`` that holds the blocks, for instance ``model.layers``.
        blocks: the number of blocks, L.
        hidden: the width of the hidden state, H.
        image: whether the model reads pixels rather than tokens.
    """

    path: str
    blocks: int
    hidden: int
    image: bool


def dissect(model: nn.Module) -> Anatomy:
    """Find the blocks of ``model`` and refuse, by name, what cannot be cut between them exactly.

    Raises:
        ModelError: the model has no single list of blocks, or something ties its blocks together.
    """
    name = type(model).__name__
    config: Any = model.config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    refuse_by_design(name, config)
    if getattr(config, "_attn_implementation", None) is None:
        raise ModelError(
            f"{name} cannot be split: its attention implementation was never set, which makes attention silently "
            "non-causal; make the model with from_pretrained, or from_config(..., attn_implementation='sdpa')"
        )
    blocks = block_count(name, config)
    found = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == blocks
    ]
    # A mixture of experts may have as many experts as blocks: only the outermost lists count.
    outermost = [path for path in found if not any(path.startswith(other + ".") for other in found)]
    if len(outermost) > 1:  # a tower for images or sounds has blocks as well
        within = next((path for path, module in model.named_modules() if module is _decoder_of(model)), "")
        decoder = f"{within}." if within else ""
        outermost = [path for path in outermost if path.startswith(decoder)]
    if len(outermost) != 1:
        where = ", ".join(outermost) or "none"
        raise ModelError(
            f"{name} cannot be split: expected one ModuleList of {blocks} blocks, found {len(outermost)} ({where}); "
            "use an architecture that `flexp verify --list` names"
        )
    _refuse_sharing(name, model, outermost[0])
    image = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    return Anatomy(path=outermost[0], blocks=blocks, hidden=int(text.hidden_size), image=image)


def _decoder_of(model: Any) -> nn.Module:
    """The part that reads text."""
    found: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    return found


def block_count(name: str, config: Any) -> int:
    """The number of a model's blocks, L, as its configuration says it; ``name`` is the model's in the message.

    Raises:
        ModelError: it has no row of like blocks.
    """
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    blocks = getattr(text, "num_hidden_layers", None)
    if not isinstance(blocks, int) or blocks < 1:
        raise ModelError(
            f"{name} cannot be split: its configuration names no row of like blocks (num_hidden_layers), which "
            "networks of convolutions or stages do not have; use an architecture that `flexp verify --list` names"
        )
    return blocks


def refuse_by_design(name: str, config: Any) -> None:
    """Refuse what a model's configuration alone shows to be impossible; ``name`` is the model's in the message.

    Raises:
        ModelError: models of that kind, or with such settings, cannot be split exactly.
    """
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} cannot be split: it is an encoder–decoder, whose decoder blocks all read the encoder's output, "
            "so every client would keep the whole decoder; use a decoder-only or encoder-only model (a decoder learns "
            "sequence to sequence from prompts and answers)"
        )
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise ModelError(
            f"{name} cannot be split: every block reads an embedding of the token ids of its own (per-layer inputs), "
            "which must not reach the server; use Gemma 1–3, Llama or Qwen instead"
        )
    if getattr(text, "relative_attention", False):
        raise ModelError(
            f"{name} cannot be split: all blocks share one trainable table of relative positions, so its gradient "
            "would have to be summed over client and server; use BERT, RoBERTa or ModernBERT instead"
        )
    if getattr(text, "num_hidden_groups", 0):
        raise ModelError(
            f"{name} cannot be split: it applies the same block again and again, whose weights cannot belong to two "
            "parties; use BERT or RoBERTa instead"
        )
    block_count(name, config)
    for key, why in _NOT_SPLIT.items():
        if getattr(text, key, None):
            raise ModelError(
                f"{name} cannot be split: its config.{key} is {getattr(text, key)}, and {why}; switch it off there"
            )


def _refuse_sharing(name: str, model: nn.Module, path: str) -> None:
    blocks = model.get_submodule(path)
    inside: Counter[int] = Counter()
    for block in blocks.children():
        inside.update({id(parameter) for parameter in block.parameters()})
    if any(count > 1 for count in inside.values()):
        raise ModelError(
            f"{name} cannot be split: some of its blocks share one parameter, which client and server would train "
            "apart; use a model whose blocks have weights of their own"
        )
    within = {id(module) for module in blocks.modules()}
    outside = {
        id(parameter)
        for module in model.modules()
        if id(module) not in within
        for parameter in module.parameters(recurse=False)
    }
    if outside & set(inside):
        raise ModelError(
            f"{name} cannot be split: a block shares a parameter with the embeddings or the head; "
            "use a model whose blocks have weights of their own"
        )


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
        """The ends, blocks [0, s) and blocks [e, L) of a model with L = ``blocks``; (L, L): all of it."""
        start, stop = check_cut(cut, blocks, nothing=True)
        return cls(frozenset(range(start)) | frozenset(range(stop, blocks)), ends=True)

    @property
    def start(self) -> int:
        """The first block that it has not: a client's s."""
        return next(index for index in range(len(self.blocks) + 1) if index not in self.blocks)

    @classmethod
    def server(cls, start: int, stop: int) -> Part:
        """Blocks [start, stop), and nothing that ever sees a token, a pixel or a label."""
        return cls(frozenset(range(start, stop)), ends=False)


def check_cut(
    cut: tuple[int, int | None], blocks: int, where: str = "cut", *, nothing: bool = False
) -> tuple[int, int]:
    """Complete ``cut`` = (s, e) for a model with L = ``blocks`` and check 0 ≤ s < e ≤ L, or with ``nothing`` (L, L).

    Raises:
        ConfigError: the cut lies outside of the model, or leaves nothing to the server.
    """
    start, stop = cut[0], blocks if cut[1] is None else cut[1]
    if not (0 <= start < stop <= blocks or (nothing and start == stop == blocks)):
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
            stub = ZeroEmbedding(
                module.embedding_dim, getattr(module, "dtype", module.weight.dtype)
            )  # a packed one's is of its rows
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
