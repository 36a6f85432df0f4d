"""Who may connect, and over what."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from flexp.errors import ConfigError, LinkError, LinkLostError, StorageError
from flexp.links.grpc import ServerTls, Tokens, connect, serve
from flexp.links.grpc.diagnosis import NO_TOKEN, proxy
from flexp.links.grpc.security import Address, check_connecting, check_listening
from flexp.links.grpc.status import ask_status
from flexp.links.grpc.tokens import issue
from flexp.links.opening import connected
from tests.harness import world

from .grpc_tools import Certificates, make_certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def refusal_of(url: str, words: str, **options: Any) -> None:
    """Waiting does not help, so this is no LinkLostError, which clients try again for a day."""
    with pytest.raises(LinkError, match=words) as refused:
        connect(url, "a", connect_timeout=10, **options)
    assert not isinstance(refused.value, LinkLostError)
    assert "\n" not in str(refused.value)


def token_file(folder: Path, **tokens: str) -> Path:
    path = folder / "tokens"
    lines = [f"{hashlib.sha256(token.encode()).hexdigest()} {name}" for name, token in tokens.items()]
    path.write_text("# who may come\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("llama")
    tokens = Tokens.read(token_file(tmp_path, a="secret-a", b="secret-b"))
    with serve(here.server, tokens=tokens) as serving:
        url = f"grpc://{serving.address}"
        refusals = set()
        for name, token in (
            ("a", "secret-b"),
            ("a", None),
            ("a", ""),
            ("c", "secret-a"),
            ("c", None),
            ("a", "Secret-a"),
        ):
            with pytest.raises(LinkError) as refused:
                connect(url, name, token=token)
            refusals.add(str(refused.value))
        refused_alike = "client and token do not go together"  # not even whether the name is known
        assert refusals == {refused_alike, f"{refused_alike}; {NO_TOKEN}"}
        assert "FLEXP_TOKEN" in NO_TOKEN
        assert not serving.clients
        with connected(connect(url, "a", token="secret-a")) as link:
            here.client("a", (2, 4), link=link)
        monkeypatch.setenv("FLEXP_TOKEN", "secret-b")
        connect(url, "b").close()


def test_another_name_than_the_tokens_is_refused_at_joining(tmp_path: Path) -> None:
    here = world("llama")
    tokens = Tokens.read(token_file(tmp_path, a="secret-a"))
    with serve(here.server, tokens=tokens) as serving:
        link = connect(f"grpc://{serving.address}", "a", token="secret-a")
        link._client = "b"  # what an honest client cannot do
        with pytest.raises(LinkError, match="its message names another client, b"):
            here.client("b", (2, 4), link=link)
        link.close()


@pytest.mark.parametrize("line", ["secret a", f"{'0' * 63} a", f"{'0' * 64}", f"{'0' * 64} b"])
def test_odd_lines_of_tokens_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{'1' * 64} b\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: expected a SHA-256 hash"):
        Tokens.read(path)
    with pytest.raises(StorageError, match="cannot be read"):
        Tokens.read(tmp_path / "none")


def test_a_token_is_what_stands_between_spaces(tmp_path: Path) -> None:
    here, path = world("llama"), tmp_path / "tokens"
    tokens = {name: issue(path, name) for name in ("a", "operator")}
    with serve(here.server, tokens=Tokens.read(path), facts=lambda _: {"well": 1}) as serving:
        url = f"grpc://{serving.address}"
        connect(url, "a", token=f" {tokens['a']}\r\n").close()
        assert ask_status(url, token=f"{tokens['operator']}\n") == {"well": 1}
        for odd in ("\udcff", "é"):
            with pytest.raises(ConfigError, match="has characters that no token has"):
                connect(url, "a", token=odd)
            with pytest.raises(ConfigError, match="has characters that no token has"):
                ask_status(url, token=odd)


def test_tls_refuses_strangers(certificates: Certificates) -> None:
    here = world("llama")
    one, two = certificates.client
    with serve(here.server, tls=certificates.tls(mutual=True)) as serving:
        url = f"grpcs://{serving.address}"
        wrong: list[tuple[str, dict[str, Any], str]] = [
            (url, {"ca": certificates.stranger, "certificate": one, "key": two}, r"not trusted .*other.pem.*say --ca"),
            (url, {}, "not trusted .*no --ca was given.*say --ca"),
            (url, {"ca": certificates.ca}, "asks for a client's certificate: say --cert and --key"),
            (f"grpc://{serving.address}", {}, "it speaks TLS: say grpcs://"),
        ]
        for place, options, words in wrong:
            refusal_of(place, words, **options)
        assert not serving.clients
        connect(url, "a", ca=certificates.ca, certificate=one, key=two).close()
    with pytest.raises(ConfigError, match="go together"):
        connect(url, "a", ca=certificates.ca, certificate=one)
    with pytest.raises(StorageError, match="cannot be read"):
        connect(url, "a", ca="nowhere.pem")


def test_tls_files_that_are_none_are_named_at_once(certificates: Certificates) -> None:
    (_, key), (one, two) = certificates.server, certificates.client
    url = "grpcs://127.0.0.1:9"  # where nobody is, for whom a client would wait
    for ca in ("/dev/null", str(key)):
        with pytest.raises(ConfigError, match=f"{ca}: has no certificate"):
            connect(url, "a", ca=ca)
    for pair in ((one, key), (two, two), (one, one)):
        words = re.escape(f"{pair[0]} and {pair[1]}: are no certificate and its own key")
        with pytest.raises(ConfigError, match=words):
            connect(url, "a", ca=certificates.ca, certificate=pair[0], key=pair[1])
        with pytest.raises(ConfigError, match=words):
            ServerTls(*pair).credentials()


def test_tls_that_will_not_pass_ends_at_once(certificates: Certificates) -> None:
    here, heard = world("llama"), list[str]()
    old = ServerTls(certificates.expired(), certificates.server[1])
    with serve(here.server, tls=old, say=heard.append) as serving:
        refusal_of(f"grpcs://{serving.address}", "has expired.*have its operator renew it", ca=certificates.ca)
        with pytest.raises(LinkError, match="has expired"):
            ask_status(f"grpcs://{serving.address}", ca=certificates.ca)
    pytest.importorskip("cryptography")
    assert len(heard) == 1
    assert "old.pem has expired (2021-01-01" in heard[0]
    with serve(here.server, "127.0.0.2:0", tls=certificates.tls()) as serving:  # it is for 127.0.0.1 and localhost
        words = "its certificate is not for the name 127.0.0.2: say the name that it is for"
        refusal_of(f"grpcs://{serving.address}", words, ca=certificates.ca)
    with serve(here.server) as serving:
        refusal_of(f"grpcs://{serving.address}", "speaks no TLS: start it with --cert and --key", ca=certificates.ca)
        gone = serving.address
    for scheme, options in (("grpcs", {"ca": certificates.ca}), ("grpc", {})):
        with pytest.raises(LinkLostError, match="cannot be reached"):  # nobody is there, yet
            connect(f"{scheme}://{gone}", "a", **options)  # type: ignore[arg-type]


def test_proxies_are_for_others_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("llama")
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org, .internal")
    with serve(here.server) as serving:
        connect(f"grpc://{serving.address}", "a").close()
        with pytest.raises(LinkError, match=r"FLEXP_TOKEN|conducts|Method not found"):
            ask_status(f"grpc://{serving.address}")
    with pytest.raises(LinkLostError, match=r"by way of the proxy 127.0.0.1:9 \(grpc_proxy; no_proxy=") as lost:
        connect("grpc://192.0.2.1:7070", "a", insecure=True)
    assert "secret" not in str(lost.value)
    assert proxy(Address("a.internal", 1)) is None
    assert proxy(Address("localhost", 1)) is None
    assert proxy(Address("example.com", 1)) == ("grpc_proxy", "127.0.0.1:9")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "[::]", "example.org"])
def test_beyond_this_machine_needs_tls_and_tokens(host: str, certificates: Certificates) -> None:
    address, tokens, tls = Address.of_text(f"{host}:7070"), Tokens({}), certificates.tls()
    for given, insecure in (((None, None), False), ((None, tokens), False), ((tls, None), False), ((None, None), True)):
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            check_listening(address, *given, insecure=insecure)
    check_listening(address, tls, tokens, insecure=False)
    check_listening(address, None, tokens, insecure=True)
    with pytest.raises(ConfigError, match="plaintext shows"):
        check_connecting(address, False, insecure=False)
    check_connecting(address, True, insecure=False)
    check_connecting(address, False, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_this_machine_needs_neither(host: str) -> None:
    address = Address.of_text(f"{host}:7070")
    check_listening(address, None, None, insecure=False)
    check_connecting(address, False, insecure=False)
    assert str(address) == f"{host}:7070"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:7070", "http://a@127.0.0.1:7070", "grpc://127.0.0.1", "grpc://:7070", "grpc://h:7070/path",
     "grpc://a:password@h:7070", "grpc://h:99999", "grpc://h:7070?ca=x"],
)  # fmt: skip
def test_odd_urls_are_refused_without_showing_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address") as refused:
        connect(url, "a")
    assert "password" not in str(refused.value)


def test_clients_have_usable_names() -> None:
    with pytest.raises(ConfigError, match="needs the client's name"):
        connect("grpc://127.0.0.1:1")
    for name in ("\n", "a\x00", "x" * 201):
        with pytest.raises(ConfigError, match="is no name for a client"):
            connect("grpc://127.0.0.1:1", name)
    assert Address.of_url("grpcs://Klinik%20S%C3%BCd@[::1]:7070") == Address("::1", 7070, "Klinik Süd", True)


def test_a_port_in_use_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    here = world("llama")
    with (
        serve(here.server) as serving,
        pytest.raises(ConfigError, match=r"cannot listen at .* \(.*in use\); give another HOST:PORT"),
        serve(here.server, str(serving.address)),
    ):
        pass
    assert capfd.readouterr().err == ""  # gRPC would have written one of its own


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a" * 64 + ".example"])
def test_a_host_that_is_not_this_machine_is_told_in_one_line(
    host: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = Tokens.read(token_file(tmp_path, a="secret-a"))
    with (
        pytest.raises(ConfigError, match=rf"cannot listen at {host}:1 \([^\n]+\); give another HOST:PORT"),
        serve(world("llama").server, f"{host}:1", tokens=tokens, insecure=True),
    ):
        pass
    assert capfd.readouterr().err == ""
