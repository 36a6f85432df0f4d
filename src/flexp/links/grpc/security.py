"""Who may connect, and over what: addresses and TLS. Tokens are in tokens.py."""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import grpc

from flexp.errors import ConfigError, StorageError
from flexp.links.grpc.tokens import Tokens, check_name, check_token

__all__ = [
    "Address",
    "ServerTls",
    "Tokens",
    "channel_credentials",
    "check_connecting",
    "check_listening",
    "check_name",
    "check_token",
]

SCHEMES = ("grpc", "grpcs")
CLIENT_KEY = "flexp-client-bin"  # -bin: names need not be ASCII
TOKEN_KEY = "flexp-token-bin"
OPERATOR = "operator"  # whose token it takes to ask how a server is, on one with tokens
PEM_BEGIN, PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
PROTOCOL_KEY = "flexp-protocol"  # the version, from the client and from a server that lets it in


@dataclass(frozen=True)
class Address:
    """Where a server is, as ``grpc://[CLIENT@]HOST:PORT`` or ``grpcs://…`` says; ``secure``: TLS is asked for."""

    host: str
    port: int
    client: str | None = None
    secure: bool = False

    @classmethod
    def of_url(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            ConfigError: it is none of the above.
        """
        try:
            parts = urlsplit(url)
            host, port, user, password = parts.hostname, parts.port, parts.username, parts.password
        except ValueError:
            host = port = user = password = None
        odd = parts.path not in ("", "/") or parts.query or parts.fragment or password if host else True
        if odd or parts.scheme not in SCHEMES or host is None or not port:
            one = ", of one server (several can answer, and not train)" if "," in url else ""
            raise ConfigError(
                f"{_without_secrets(url)!r} is no address: expected grpc://HOST:PORT or grpcs://HOST:PORT{one}"
            )
        return cls(host, port, unquote(user) if user else None, parts.scheme == "grpcs")

    @classmethod
    def all_of(cls, url: str) -> list[Address]:
        """Read a URL of one server, or of several that stand for each other: ``grpc://[CLIENT@]HOST:PORT,HOST:PORT``.

        Raises:
            ConfigError: it is none.
        """
        before, mark, hosts = url.rpartition("@") if "@" in url else url.rpartition("://")
        return [cls.of_url(f"{before}{mark}{host}") for host in hosts.split(",")]

    @classmethod
    def of_text(cls, text: str) -> Address:
        """Read ``HOST:PORT``; port 0 is any that is free.

        Raises:
            ConfigError: it is none.
        """
        match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/@\s]+)):(\d{1,5})", text)
        if match is None or int(match[3]) > 65_535:
            raise ConfigError(f"{text!r} is no address: expected HOST:PORT, for instance 127.0.0.1:7070 or [::1]:7070")
        return cls(match[1] or match[2], int(match[3]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class ServerTls:
    """The server's certificate and key (PEM files); with ``client_ca`` clients need a certificate of its own."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def certificate_der(self) -> bytes:
        """The server's own certificate, the first in its file.

        Raises:
            StorageError: it cannot be read, or has no certificate.
        """
        after = _pem(self.certificate).decode("ascii", "replace").partition(PEM_BEGIN)[2]  # openssl puts text before it
        try:
            found = ssl.PEM_cert_to_DER_cert(PEM_BEGIN + after.partition(PEM_END)[0] + PEM_END)
        except ValueError:
            found = b""
        if not found:
            raise StorageError(f"{self.certificate}: has no certificate; expected PEM, from {PEM_BEGIN} on")
        return found

    @property
    def outdated(self) -> str | None:
        """What to say of a certificate that no client takes today; ``None``: nothing, or it cannot be told without the
        package cryptography."""
        try:
            from cryptography.x509 import load_der_x509_certificate

            found = load_der_x509_certificate(self.certificate_der)
        except (ImportError, ValueError):
            return None
        first, last, now = found.not_valid_before_utc, found.not_valid_after_utc, datetime.now(UTC)
        why = f"is not valid before {first}" if now < first else f"has expired ({last})" if now > last else ""
        return f"warning: the certificate {self.certificate} {why}, so clients refuse this server" if why else None

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC.

        Raises:
            StorageError: a file cannot be read.
            ConfigError: a file is none, or the key is another's.
        """
        _check(self.client_ca, self.certificate, self.key)
        pair = (_pem(self.key), _pem(self.certificate))
        if self.client_ca is None:
            return grpc.ssl_server_credentials([pair])
        return grpc.ssl_server_credentials([pair], _pem(self.client_ca), require_client_auth=True)


def channel_credentials(
    ca: Path | bytes | None, certificate: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """A client's side of TLS: whom it trusts (PEM; ``None``: gRPC's own roots), and its certificate if the server wants
    one.

    Raises:
        StorageError: a file cannot be read.
        ConfigError: a certificate came without its key, or the other way round; or a file is none, or the key is
            another's.
    """
    if (certificate is None) != (key is None):
        raise ConfigError("a client's certificate and its key go together: give both, or neither")
    _check(ca if isinstance(ca, Path) else None, certificate, key)
    return grpc.ssl_channel_credentials(
        root_certificates=_pem(ca) if isinstance(ca, Path) else ca,
        private_key=None if key is None else _pem(key),
        certificate_chain=None if certificate is None else _pem(certificate),
    )


def check_listening(address: Address, tls: ServerTls | None, tokens: Tokens | None, *, insecure: bool) -> None:
    """Refuse to listen beyond this machine in plaintext, unless asked for, or without tokens. Raises ConfigError."""
    if address.loopback:
        return
    if tls is None and not insecure:
        raise ConfigError(
            f"{address} can be reached from other machines, and plaintext shows them all activations: give "
            "a certificate and its key, or say insecure (--insecure)"
        )
    if tokens is None:
        raise ConfigError(f"{address} can be reached from other machines: give a file of tokens, one for each client")


def check_connecting(address: Address, tls: bool, *, insecure: bool) -> None:
    """Refuse to send activations in plaintext beyond this machine, unless asked for. Raises ConfigError."""
    if not tls and not insecure and not address.loopback:
        raise ConfigError(
            f"{address} is another machine, and plaintext shows activations and tokens to everybody on the way: "
            "use grpcs://, give the server's ca=…, or say insecure=True"
        )


def _check(ca: Path | None, certificate: Path | None, key: Path | None) -> None:
    """Refuse files that gRPC would take and never connect with, and say nothing of; raises as who calls it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for path in filter(None, (ca, certificate, key)):
        _pem(path)
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise ConfigError(f"{ca}: has no certificate to trust; expected PEM, from {PEM_BEGIN} on") from error
    if certificate is not None and key is not None:
        try:
            context.load_cert_chain(certificate, key, password="")  # or it would ask for one
        except ssl.SSLError as error:
            raise ConfigError(
                f"{certificate} and {key}: are no certificate and its own key, in PEM and without a password"
                f" ({error.reason})"
            ) from error


def _pem(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: the certificate or key cannot be read ({error.strerror or error})") from error


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//…@", url)
