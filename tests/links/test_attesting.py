"""Nothing is sent to a server that does not attest for this very connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexp.errors import ConfigError, LinkError, LinkLostError, StorageError
from flexp.links.grpc import ServerTls, Serving, connect, serve
from flexp.links.grpc.attesting import Attesting, Software, Verifier, bound_to
from flexp.links.opening import connected
from tests.harness import equal, shared_weights, world

from .grpc_tools import Certificates, make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


MEASURED = Software().evidence(bytes(32))[:32].hex()


class Old(Software):
    """A server that answers with what it saw another time."""

    def evidence(self, binding: bytes) -> bytes:
        return super().evidence(bytes(32))


class Other(Software):
    """Another program, on a processor that is genuine."""

    def evidence(self, binding: bytes) -> bytes:
        return bytes(32) + self._signature(bytes(32), binding)


class Forged(Software):
    """What is measured is right, and no processor signs it."""

    key = b"another"


class Nothing(Software):
    def evidence(self, binding: bytes) -> bytes:
        return b""


def in_between(serving: Serving) -> None:
    """It has a certificate that is trusted, and passes questions on to a server that is what it should be."""
    assert serving._attests is not None
    serving._attests._certificate = b"the other server's"


Change = Callable[[Serving], None]
LIES: dict[str, tuple[Verifier | None, Change, str]] = {
    "no evidence": (None, lambda _: None, "gives no evidence of what runs there"),
    "evidence of another time": (Old(), lambda _: None, "not signed for this connection"),
    "evidence of another key": (Software(), in_between, "not signed for this connection"),
    "another program": (Other(), lambda _: None, f"is measured as {'0' * 64}, and {MEASURED} is expected"),
    "evidence that is not genuine": (Forged(), lambda _: None, "not signed for this connection"),
    "empty evidence": (Nothing(), lambda _: None, "not signed for this connection"),
}


def url(serving: Serving) -> str:
    return f"grpcs://{serving.address}"


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_does_not_attest_is_sent_nothing(certificates: Certificates, name: str) -> None:
    verifier, change, words = LIES[name]
    asked: list[Any] = []
    with serve(world("llama").server, tls=certificates.tls(), verifier=verifier) as serving:
        change(serving)
        admit = serving._gate.admit

        async def seen(context: Any) -> str:
            asked.append(context.invocation_metadata())
            return await admit(context)

        serving._gate.admit = seen  # type: ignore[method-assign]
        with pytest.raises(LinkError, match=f"{words}.*nothing was sent") as refused:
            connect(url(serving), "a", ca=certificates.ca, verifier="software", measurement=MEASURED)
        assert not isinstance(refused.value, LinkLostError)
        assert "\n" not in str(refused.value)
        assert not asked  # neither name nor token has come
        connect(url(serving), "a", ca=certificates.ca).close()
        assert len(asked) == 1


@pytest.mark.parametrize("mutual", [False, True])
def test_a_server_that_attests_serves_as_ever(certificates: Certificates, mutual: bool) -> None:
    plain, here = world("llama"), world("llama")
    one, two = certificates.client if mutual else (None, None)
    with (
        serve(here.server, tls=certificates.tls(mutual), verifier=Software()) as serving,
        connected(connect(url(serving), "a", ca=certificates.ca, certificate=one, key=two, codec="off",
                          verifier=Software(), measurement=MEASURED.upper())) as link,
    ):  # fmt: skip
        far, near = here.client("a", (2, 4), link=link), plain.client("a", (2, 4))
        for model, of in ((far, here), (near, plain)):
            model(**of.batch()).loss.backward()
        assert equal(shared_weights(here.server), shared_weights(plain.server))


def test_the_channel_is_to_the_key_that_was_attested_alone(certificates: Certificates, monkeypatch: Any) -> None:
    """Of two servers that one authority trusts, the one whose certificate was looked at is the only one to talk to."""
    from flexp.links.grpc.diagnosis import Way

    with serve(world("llama").server, tls=certificates.tls(), verifier=Software()) as serving:
        other = certificates.second()
        monkeypatch.setattr(Way, "certificate_there", lambda self: other)
        with pytest.raises(LinkError, match=r"cannot be (used|reached)|no server answered"):
            connect(url(serving), "a", ca=certificates.ca, verifier="software", measurement=MEASURED,
                    connect_timeout=3.0)  # fmt: skip


def test_what_cannot_be_attested_is_refused_before_anything(certificates: Certificates, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs verifier, measurement and TLS"):
        connect("grpc://127.0.0.1:1", "a", verifier="software", measurement=MEASURED)
    with pytest.raises(ConfigError, match="or none of the first two"):
        connect("grpcs://127.0.0.1:1", "a", verifier="software")
    with pytest.raises(ConfigError, match=r"no verifier 'softwear'; did you mean 'software'"):
        connect("grpcs://127.0.0.1:1", "a", verifier="softwear", measurement=MEASURED)
    with pytest.raises(LinkLostError, match="cannot be reached"):  # not there yet: waiting may help
        connect("grpcs://127.0.0.1:1", "a", ca=certificates.ca, verifier="software", measurement=MEASURED)
    with pytest.raises(ConfigError, match="bound to the key of TLS"), serve(world("llama").server, verifier=Software()):
        pass
    with (
        serve(world("llama").server, tls=certificates.tls(), verifier=Software()) as serving,
        pytest.raises(LinkError, match="not trusted"),
    ):
        connect(url(serving), "a", ca=certificates.stranger, verifier="software", measurement=MEASURED)


def test_evidence_is_bound_to_number_and_key() -> None:
    attesting = Attesting(Software(), b"key")

    class Context:
        async def abort(self, *_: Any) -> None:
            raise LinkError("aborted")

    found = asyncio.run(attesting.answer(b"n" * 32, Context()))
    assert Software().measurement(found, bound_to(b"n" * 32, b"key")) == MEASURED
    for wrong in (bound_to(b"m" * 32, b"key"), bound_to(b"n" * 32, b"kez")):
        with pytest.raises(LinkError, match="not signed"):
            Software().measurement(found, wrong)
    with pytest.raises(LinkError, match="aborted"):
        asyncio.run(attesting.answer(b"short", Context()))


def test_a_certificate_with_text_around_it(certificates: Certificates) -> None:
    plain, (certificate, key) = certificates.tls(), certificates.server
    written = certificate.with_name("text.pem")
    text = "Certificate:\n    Issuer: Gem\u00fcse\n"  # as openssl x509 -text begins
    written.write_text(text + certificate.read_text(encoding="ascii") + "more\n", encoding="utf-8")
    assert ServerTls(written, key).certificate_der == plain.certificate_der
    for odd in (text, "-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n", ""):
        written.write_text(odd, encoding="utf-8")
        with pytest.raises(StorageError, match=r"text.pem: has no certificate; expected PEM"):
            ServerTls(written, key).certificate_der  # noqa: B018
