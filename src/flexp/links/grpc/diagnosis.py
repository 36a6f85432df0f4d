"""Why a server cannot be reached: what will not pass is told apart from an outage, and names what to change."""

from __future__ import annotations

import os
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flexp.links.grpc.security import Address

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
WITHOUT = ("no_grpc_proxy", "no_proxy")
"""The variables that gRPC reads, in their order."""
SECONDS = 5.0
NO_TOKEN = "no token was given: set FLEXP_TOKEN, or say --token (token=…)"


@dataclass(frozen=True)
class Way:
    """How a client tries to reach a server: with TLS or without, and with which files (PEM)."""

    address: Address
    secure: bool
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def options(self, options: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """gRPC's, with which it uses no proxy on this machine, whatever the environment says."""
        return [*options, ("grpc.enable_http_proxy", 0)] if self.address.loopback else options

    def by_proxy(self) -> str:
        """What to add where a proxy of the environment stands in between; nothing without one."""
        found = proxy(self.address)
        if found is None:
            return ""
        name, place = found
        return f", by way of the proxy {place} ({name}; no_proxy={self.address.host} goes without it)"

    def certificate_there(self) -> bytes:
        """The server's certificate (DER), if its authority is trusted and it is for this name.

        Raises:
            OSError, ValueError: it is not, or nothing answers.
        """
        with self._handshake(self._context(verified=True)) as stream:
            return stream.getpeercert(binary_form=True) or b""

    def will_not_pass(self, details: str) -> str | None:
        """What is wrong with TLS, and how to mend it, going by gRPC's ``details`` of a failure and a handshake of its
        own; ``None``: nothing is, or it cannot be said."""
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return self._untrusted(details)
        if "Hostname Verification" in details:
            return f"its certificate is not for the name {self.address.host}: say the name that it is for"
        if "WRONG_VERSION_NUMBER" in details and not self._speaks_tls():
            return (
                "it speaks no TLS: start it with --cert and --key, or say grpc:// and leave out --ca (and, beyond this "
                "machine, --insecure)"
            )
        if not self.secure and self._speaks_tls():
            return f"it speaks TLS: say grpcs://{self.address} and, if its certificate is your own, --ca"
        if self.secure and all(self._hangs_up() for _ in range(2)):  # once may be a server that is stopping
            if self.certificate is None:
                return "it asks for a client's certificate: say --cert and --key"
            return f"it does not accept the certificate {self.certificate} (--cert)"
        return None

    def _untrusted(self, details: str) -> str | None:
        why = re.sub(r"^.*CERTIFICATE_VERIFY_FAILED:? ?", "", details).removesuffix(": OK").rstrip(".)")
        if self.ca is not None:  # a bit that was turned on the way looks the same, once
            try:
                self._handshake(self._context(verified=True)).close()
                return None
            except ssl.SSLCertVerificationError as error:
                why = error.verify_message
            except (OSError, ValueError):
                return None
        if "expired" in why or "not yet valid" in why:
            return f"its certificate cannot be used ({why}): have its operator renew it (flexp server --cert)"
        given = "no --ca was given" if self.ca is None else f"--ca {self.ca} is another's"
        return f"its certificate is not trusted ({why}; {given}): say --ca (ca=…, FLEXP_CA), what it is signed with"

    def _speaks_tls(self) -> bool:
        try:
            self._handshake(self._context(verified=False)).close()
            return True
        except (OSError, ValueError):
            return False

    def _hangs_up(self) -> bool:
        """Whether it agrees on TLS and then ends the connection: TLS 1.3 judges a client's certificate that late."""
        try:
            with self._handshake(self._context(verified=False)) as stream:
                try:
                    return stream.recv(1) == b""
                except ssl.SSLError:
                    return True
        except (OSError, ValueError):
            return False

    def _context(self, *, verified: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        if not verified:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        context.set_alpn_protocols(["h2"])
        return context

    def _handshake(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        plain = socket.create_connection((self.address.host, self.address.port), SECONDS)
        try:
            return context.wrap_socket(plain, server_hostname=self.address.host)
        except BaseException:
            plain.close()
            raise


def proxy(address: Address) -> tuple[str, str] | None:
    """The variable of the environment that names a proxy for this address, and the proxy's HOST:PORT; ``None``: there
    is none, as on this machine."""
    if address.loopback:
        return None
    spared = next((value for name in WITHOUT if (value := os.environ.get(name))), "")
    if any(address.host.endswith(part.strip()) for part in spared.split(",") if part.strip()):
        return None
    for name in PROXIES:
        value = os.environ.get(name)
        if value:
            return name, urlsplit(value if "://" in value else f"http://{value}").netloc.rpartition("@")[2]
    return None
