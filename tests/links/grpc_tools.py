"""Servers, certificates and raw streams for the tests of the link over gRPC."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexp.links.frames import Head
from flexp.links.grpc.link import GrpcLink, _Call
from flexp.links.grpc.loop import background
from flexp.links.grpc.security import ServerTls
from flexp.links.messages import Abort

SOON = 20.0


@dataclass
class Certificates:
    """PEM files: an authority, a server's certificate for 127.0.0.1 and a client's, and a stranger's authority."""

    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: Path

    def expired(self) -> Path:
        """The server's certificate as it was some years ago."""
        folder = self.ca.parent
        (folder / "index.txt").touch()
        (folder / "serial").write_text("01", encoding="utf-8")
        files = "database=index.txt\nserial=serial\nnew_certs_dir=.\n"
        settings = f"[ca]\ndefault_ca=d\n[d]\n{files}default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n"
        (folder / "ca.cnf").write_text(settings, encoding="utf-8")
        subprocess.run(
            ["openssl", "ca", "-batch", "-notext", "-config", "ca.cnf", "-in", "server.csr", "-cert", "ca.pem",
             "-keyfile", "ca.key", "-out", "old.pem", "-startdate", "20200101000000Z", "-enddate", "20210101000000Z",
             "-extfile", "server.ext"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        return folder / "old.pem"

    def second(self) -> bytes:
        """Another server's certificate (DER) of the same authority, for the same name."""
        folder = self.ca.parent
        subprocess.run(
            ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "two.key",
             "-out", "two.csr", "-subj", "/CN=server"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        subprocess.run(
            ["openssl", "x509", "-req", "-in", "two.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
             "-days", "2", "-out", "two.pem", "-extfile", "server.ext"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        return ssl.PEM_cert_to_DER_cert((folder / "two.pem").read_text(encoding="ascii"))

    def tls(self, mutual: bool = False) -> ServerTls:
        return ServerTls(*self.server, client_ca=self.ca if mutual else None)


def make_certificates(folder: Path) -> Certificates:
    """With the program ``openssl``; the test is skipped where it is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("the program openssl, which makes the certificates of this test, is missing")

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def authority(name: str) -> Path:
        run(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}",
        )  # fmt: skip
        return folder / f"{name}.pem"

    def signed(name: str, extension: str) -> tuple[Path, Path]:
        run(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}",
        )  # fmt: skip
        (folder / f"{name}.ext").write_text(extension, encoding="utf-8")
        run(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-out", f"{name}.pem", "-extfile", f"{name}.ext",
        )  # fmt: skip
        return folder / f"{name}.pem", folder / f"{name}.key"

    ca = authority("ca")
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    return Certificates(ca, signed("server", names), signed("client", "basicConstraints=CA:FALSE"), authority("other"))


def send_raw(link: GrpcLink, messages: Callable[[int], list[bytes]]) -> Future[Any]:
    """Send bytes past every check of this side, as the request of a number; what comes of it."""
    call = _Call(Abort(), Head("Abort", next(link._places)), Future(), None, torch.device("cpu"), None)
    background().call_soon_threadsafe(link._enqueue, call, SimpleNamespace(messages=messages))
    return call.future


def vanish(link: GrpcLink) -> None:
    """Cut the stream without a word, as a process that is killed does."""
    background().call_soon_threadsafe(link._stream.cancel)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true soon."""
    end = time.monotonic() + SOON
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
