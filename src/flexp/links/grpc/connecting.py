"""Opening a link over gRPC: address, TLS, token, and the server's first word."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from pathlib import Path

import grpc

from flexp.config import CodecConfig, CodecName
from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.links.frames import VERSION
from flexp.links.grpc.attesting import Verifier, attested
from flexp.links.grpc.diagnosis import NO_TOKEN, Way
from flexp.links.grpc.link import GrpcLink, reason
from flexp.links.grpc.loop import CLIENT_OPTIONS, METHOD, SERVICE, wait_for, within
from flexp.links.grpc.security import (
    CLIENT_KEY,
    PROTOCOL_KEY,
    TOKEN_KEY,
    Address,
    channel_credentials,
    check_connecting,
    check_name,
    check_token,
)
from flexp.registry import VERIFIERS


def connect(
    url: str,
    client: str | None = None,
    *,
    token: str | None = None,
    ca: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    insecure: bool = False,
    verifier: Verifier | str | None = None,
    measurement: str | None = None,
    codec: CodecConfig | CodecName = "bf16",
    timeout: float = 600.0,
    connect_timeout: float = 20.0,
) -> GrpcLink:
    """A link to a server that another process runs.

    Args:
        url: ``grpc://HOST:PORT``, which is plaintext unless ``ca`` is given, or ``grpcs://HOST:PORT``, which is TLS.
            The client's name may stand in it: ``grpc://clinic-a@HOST:PORT``. Of several, ``HOST:PORT,HOST:PORT``, that
            are not trained any more and stand for each other, it leads to one at random that can be reached.
        token: this client's; ``None``: what the environment variable FLEXP_TOKEN holds, if anything.
        ca: the certificate (PEM) that the server's is signed with; with ``grpcs://``, ``None`` means FLEXP_CA, or else
            the authorities that gRPC knows.
        certificate: this client's own (PEM), if the server asks for one.
        key: that certificate's.
        insecure: allow plaintext to other machines.
        verifier: what reads the server's evidence of what runs there, or its name among ``flexp.verifiers``; nothing is
            sent before that names ``measurement`` and is bound to this connection.
        measurement: in hexadecimal.
        codec: in what form tensors cross, for models that do not say it themselves. The default halves the bytes of
            float32; ``"off"`` gives what the link inside one process gives, bit for bit.
        timeout: seconds that an answer may take, after which the link is given up.

    Raises:
        ConfigError: the address or the token is none, or plaintext would leave this machine.
        LinkLostError: no server answers, or not yet.
        LinkError: it refuses this client, or its TLS and this client's do not go together.
    """
    places = Address.all_of(url)
    name = client or places[0].client
    if name is None:
        raise ConfigError("the link needs the client's name: client='clinic-a', or grpc://clinic-a@HOST:PORT")
    check_name(name)
    ca = ca or os.environ.get("FLEXP_CA") or None
    token = check_token(token or os.environ.get("FLEXP_TOKEN"))
    secure = places[0].secure or ca is not None
    for address in places:
        check_connecting(address, secure, insecure=insecure)
    paths = [None if path is None else Path(path) for path in (ca, certificate, key)]
    if (verifier is None) != (measurement is None) or (verifier is not None and not secure):
        raise ConfigError(
            "a server that attests needs verifier, measurement and TLS (grpcs://), or none of the first two"
        )
    judge: Verifier | None = VERIFIERS[verifier]() if isinstance(verifier, str) else verifier
    random.SystemRandom().shuffle(places)
    failed: list[LinkLostError] = []
    for address in places:
        way = Way(address, secure, *paths)
        try:
            link = _open(way, name, token, judge, measurement, timeout, connect_timeout)
        except LinkLostError as error:
            failed.append(error)
            continue
        link.codec = codec if isinstance(codec, CodecConfig) else CodecConfig.all(codec)
        link.one_of = len(places)
        return link
    if len(failed) == 1:
        raise failed[0]
    raise LinkLostError(f"none of the {len(places)} servers can be used: {'; '.join(map(str, failed))}")


def _open(
    way: Way,
    name: str,
    token: str | None,
    judge: Verifier | None,
    measurement: str | None,
    timeout: float,
    connect_timeout: float,
) -> GrpcLink:
    """A link to one server; raises as :func:`connect` does."""
    address = way.address
    certificate_there = b"" if judge is None else _certificate(way)
    # who has its key is from here on the only one that can answer
    trusted = way.ca if judge is None else ssl.DER_cert_to_PEM_cert(certificate_there).encode()
    credentials = channel_credentials(trusted, way.certificate, way.key) if way.secure else None
    metadata = [(PROTOCOL_KEY, str(VERSION)), (CLIENT_KEY, name.encode())] + (
        [(TOKEN_KEY, token.encode())] if token else []
    )

    async def open_stream() -> GrpcLink:
        target = str(address)
        if credentials is None:
            channel = grpc.aio.insecure_channel(target, way.options(CLIENT_OPTIONS))
        else:
            channel = grpc.aio.secure_channel(target, credentials, way.options(CLIENT_OPTIONS))
        try:
            if judge is not None and measurement is not None:
                async with within(connect_timeout, f"no server answered at {target}"):
                    await attested(channel, judge, certificate_there, measurement)
            stream = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=metadata)
            async with within(connect_timeout, f"no server answered at {target}"):
                version = dict(await stream.initial_metadata() or ()).get(PROTOCOL_KEY)
                if version is None:
                    await stream.read()  # raises what the server, or whoever answers there, says instead
                    raise LinkError(f"what answers at {target} is no FlexP server")
                if version != str(VERSION):
                    raise LinkError(
                        f"the server at {target} speaks version {version} of the protocol, this client {VERSION}: "
                        "use the same FlexP on both sides"
                    )
        except BaseException as error:
            await channel.close()
            if isinstance(error, grpc.aio.AioRpcError):
                raise await refusal(error, way, token) from error
            raise
        return GrpcLink(channel, stream, address, name, timeout)

    return wait_for(open_stream())


def _certificate(way: Way) -> bytes:
    """The certificate of the server that is to attest.

    Raises:
        LinkLostError: nothing answers.
        LinkError: it is not trusted.
    """
    try:
        return way.certificate_there()
    except (OSError, ValueError) as error:
        for_good = way.will_not_pass(str(error))
        if for_good is None:
            raise LinkLostError(f"the server at {way.address} cannot be reached, or has gone ({error})") from error
        raise LinkError(f"the server at {way.address} cannot be used: {for_good}") from error


async def refusal(error: grpc.aio.AioRpcError, way: Way, token: str | None) -> LinkError:
    """What a stream that could not be opened comes to: a :class:`LinkLostError` where waiting may help."""
    code = error.code()
    if code == grpc.StatusCode.UNAVAILABLE:
        for_good = await asyncio.to_thread(way.will_not_pass, error.details() or "")
        if for_good is not None:
            return LinkError(f"the server at {way.address} cannot be used: {for_good}")
        return LinkLostError(reason(error, way.address) + way.by_proxy())
    if code == grpc.StatusCode.UNAUTHENTICATED and not token:
        return LinkError(f"{reason(error, way.address)}; {NO_TOKEN}")
    # CANCELLED: a server falls just now; INTERNAL, "Stream removed": what came was damaged on its way
    lost = code in (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
    lost = lost or (code == grpc.StatusCode.UNKNOWN and (error.details() or "").startswith("Stream removed"))
    return (LinkLostError if lost else LinkError)(reason(error, way.address))
