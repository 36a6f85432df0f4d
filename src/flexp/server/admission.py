"""Whom a server lets in, and the one line that says why not."""

from __future__ import annotations

from collections.abc import Collection

from flexp.config import CodecConfig, LoraConfig
from flexp.errors import LinkError
from flexp.links.messages import Join
from flexp.models.fingerprint import fingerprint
from flexp.models.stage import Stage


def check_taking_part(
    client: str, request: Join, only: Collection[str] | None, tuning: str | None, quantization: str | None
) -> None:
    """Refuse a client that does not belong to the run, or has its blocks in another way than it.

    Args:
        only: who belongs to it; ``None``: everybody.
        tuning: of the run's clients; ``None``: any. Likewise their ``quantization``.

    Raises:
        LinkError: see above.
    """
    if only is not None and client not in only:
        raise LinkError(f"client {client} takes no part in this run: it has {', '.join(only)} (deployment.clients)")
    for key, own, wanted in (
        ("tuning", request.tuning, tuning),
        ("quantization", request.quantization, quantization),
    ):
        if wanted not in (None, own):
            raise LinkError(
                f"client {client} was refused: its {key} is {own}, that of this server's clients {wanted}; set the "
                f"same model.{key} on both sides"
            )


def check_join(
    client: str,
    request: Join,
    stage: Stage,
    blocks: tuple[int, int],
    tuning: str,
    lora: LoraConfig | None,
    codecs: Collection[str] | None = None,
) -> None:
    """Refuse a client whose model or cut does not go with the shared ``blocks`` of ``stage``, tuned as ``tuning``.

    ``codecs`` are those that it may ask for; ``None``: any.

    Raises:
        LinkError: see above.
    """
    start, stop = blocks
    cut_start, cut_stop = request.cut
    problem = None
    odd = [name for name in (request.codec or CodecConfig()).names() if codecs is not None and name not in codecs]
    if request.client != client:
        problem = f"its message names another client, {request.client}"
    elif not 0 <= request.numbering < 1 << 63:
        problem = f"it numbers its steps in the run {request.numbering}, expected 0 to 2**63 - 1"
    elif request.fingerprint != fingerprint(stage.model.config):
        problem = "its model is another one than the server's; load the same pretrained model on both sides"
    elif request.weights != stage.weights:
        problem = (
            f"its pretrained weights ({request.weights or 'unknown'}) are not the server's "
            f"({stage.weights or 'unknown'}); load the same pretrained model on both sides"
        )
    elif request.tuning == tuning == "lora" and request.lora != lora:
        problem = f"its LoRA settings ({request.lora}) are not the server's ({lora}); set the same model.lora"
    elif request.dtype != str(stage.model.dtype):
        problem = f"it computes in {request.dtype}, the server in {stage.model.dtype}; set the same model.dtype"
    elif request.autocast != stage.autocast_name:
        problem = (
            f"it computes with autocast = {request.autocast}, the server with {stage.autocast_name}; set the same "
            "model.autocast"
        )
    elif not (start <= cut_start < cut_stop <= stop or cut_start == cut_stop == start == stop):
        problem = f"its cut {request.cut} needs blocks that the server does not hold: it has [{start}, {stop})" + (
            "; set the same method.name on both sides" if start == stop or cut_start == cut_stop else ""
        )
    elif request.align.kind == "weights" and request.tuning != tuning:
        problem = (
            f"alignment in weight space needs the same tuning on both sides: the client's is {request.tuning}, "
            f"the server's {tuning}"
        )
    elif odd:
        problem = f"it asks for the codec {odd[0]}, the server has {', '.join(codecs or ())}; set another link.codec"
    if problem:
        raise LinkError(f"client {client} was refused: {problem}")
