"""The link over gRPC is the link inside the process: the same weights, bytes and refusals."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.pretrained import SplitModelForCausalLM
from flexp.config import AlignConfig, ServerConfig
from flexp.errors import LinkError, LinkLostError
from flexp.links.asking import PullRequest
from flexp.links.base import Link
from flexp.links.coding import PLAIN
from flexp.links.emulated import EmulatedLink, Network
from flexp.links.frames import CHUNK, VERSION, Frame, encode
from flexp.links.grpc import connect, serve
from flexp.links.grpc.connecting import refusal
from flexp.links.grpc.link import _Call, last_part
from flexp.links.grpc.loop import background
from flexp.links.messages import AGAIN, BackwardRequest, ForwardRequest, Order, Ready
from flexp.links.opening import connected, loopback
from flexp.links.rules import Limits
from flexp.rng import RandomStream
from flexp.server import Server
from tests.harness import World, copied, equal, seeded, shared_weights, world

from .grpc_tools import SOON, Certificates, eventually, make_certificates, send_raw, vanish

CUTS = {"clinic-a": (2, 4), "Klinik Süd": (3, 4)}
KL = AlignConfig(kind="kl", weight=0.3, at="every-block")
WEIGHTS = AlignConfig(kind="weights", pull=0.3)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def train(links: dict[str, Link], here: World, align: AlignConfig) -> dict[str, Tensor]:
    """Three steps of two clients in turns, with dropout, micro-batches and padding; all weights and meters."""
    models = {name: here.client(name, cut, align, link=links[name]) for name, cut in CUTS.items()}
    streams = {name: RandomStream(seed) for seed, name in enumerate(CUTS)}
    for step in range(3):
        for name, model in models.items():
            personal = model.stage.trainable()
            with streams[name].active():
                for number in (1, 2):
                    batch = here.batch(seed=2 * step + number, padding="right")
                    with model.part_of_step(Piece(number, 2, 0.5, 0.5)):
                        (model(**batch).loss * 0.5).backward()
                with torch.no_grad():
                    for value in personal.values():
                        if value.grad is not None:
                            value -= 0.01 * value.grad
                            value.grad = None
                model.after_step()
        with torch.no_grad():
            models["clinic-a"].eval()(**here.batch(seed=99))
            models["clinic-a"].train()
    found = {f"shared/{name}": value for name, value in shared_weights(here.server).items()}
    for name, model in models.items():
        found |= {f"{name}/{key}": value for key, value in copied(model.stage.trainable()).items()}
    for name, link in links.items():
        for account in (link.meter.training, link.meter.evaluation):
            counts = [account.bytes_up, account.bytes_down, account.exchanges]
            found[f"{name}/meter/{account is link.meter.training}"] = torch.tensor(counts)
    return found


@pytest.mark.parametrize("align", [KL, WEIGHTS], ids=["kl", "weights"])
def test_every_link_gives_the_same_weights_and_bytes(
    align: AlignConfig, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to exchanges may be encoded outside the thread that computes."""
    encoded: list[tuple[str, str]] = []

    def told(frame: Frame) -> list[bytes]:
        encoded.append((frame.head.message, threading.current_thread().name.rsplit("_", 1)[0]))
        return encode(frame)

    monkeypatch.setattr("flexp.links.grpc.serving.encode", told)

    def fresh() -> World:
        return world("bert", dropout=0.2, config=ServerConfig(update="mean", mean_over=2))

    here = fresh()
    expected = train({name: here.server.connect(name) for name in CUTS}, here, align)
    assert int(expected["clinic-a/meter/True"][0]) > 0
    for secure in (False, True):
        here = fresh()
        encoded.clear()
        monkeypatch.setattr("flexp.links.grpc.serving.LARGE", 0 if secure else 1 << 30)
        options: dict[str, Any] = {}
        settings: dict[str, Any] = {"tls": certificates.tls(mutual=True)} if secure else {}
        if secure:
            options = {"ca": certificates.ca, "certificate": certificates.client[0], "key": certificates.client[1]}
        with ExitStack() as stack:
            serving = stack.enter_context(serve(here.server, **settings))
            url = f"grpc{'s' if secure else ''}://{serving.address}"
            links = {name: stack.enter_context(connected(connect(url, name, codec="off", **options))) for name in CUTS}
            got = train(links, here, align)
        assert equal(got, expected)
        assert not here.server._sessions  # closing is leaving
        outside = {message for message, thread in encoded if thread == "flexp-encoder"}
        assert outside == ({"ForwardReply", "BackwardReply"} if secure else set())


def test_refusals_have_the_servers_words() -> None:
    here = world("llama", config=ServerConfig(max_in_flight=1))
    with loopback(here.server, "a") as link:
        with pytest.raises(LinkError, match=r"client a has not joined: Join comes first"):
            link.call(ForwardRequest(1, torch.zeros(1, 2, 32))).result(SOON)
        with pytest.raises(LinkError, match="client a was refused: its cut"):
            here.client("a", (0, 4), link=link, expose_embeddings=True)
        model = here.client("a", (2, 4), link=link)
        for call, words in (
            (
                link.call(ForwardRequest(1, torch.zeros(1, 2, 31))),
                r"is \(1, 2, 31\) torch.float32, expected \(B, T, 32",
            ),
            (link.call(ForwardRequest(1, torch.zeros(1, 2, 32).double())), "float64, expected"),
            (link.call(ForwardRequest(1, torch.zeros(1, 2, 32), 2 * torch.ones(1, 2))), "other values than 0 and 1"),
            (link.call(BackwardRequest(7, torch.zeros(1, 2, 32))), "exchange 7 has no forward in flight"),
            (link.call(PullRequest(0, 4)), r"the weights of blocks \[0, 4\) were asked for"),
        ):
            with pytest.raises(LinkError, match=words):
                call.result(SOON)
        before = shared_weights(here.server)
        model(**here.batch())
        with pytest.raises(LinkError, match=r"the most that server.max_in_flight allows"):
            model(**here.batch())
        model.abort()
        loss = model(**here.batch()).loss
        with pytest.raises(LinkError, match="not finite"):
            (loss * float("nan")).backward()
        assert equal(shared_weights(here.server), before)
        model(**here.batch()).loss.backward()  # the stream has survived all of it
        assert here.server.shared.version == 1


def test_large_frames_and_several_exchanges_in_flight() -> None:
    """Frames of many messages; answers find their requests, although all were sent before any was read."""
    here = world("llama")
    sizes = [(1, 3), (120, 200), (2, 5), (8, 2048)]  # up to 3 MB
    assert 2 * CHUNK < 4 * 32 * 120 * 200
    with loopback(here.server, "a") as link:
        here.client("a", (2, 4), link=link)
        sent = [torch.randn(*size, 32, generator=seeded(index)) for index, size in enumerate(sizes)]
        answers = [link.call(ForwardRequest(index, z, train=False)) for index, z in enumerate(sent)]
        got = [answer.result(60).hidden_BTH for answer in answers]
    near = here.server.connect("b")
    here.client("b", (2, 4), link=near)
    for z, h in zip(sent, got, strict=True):
        assert torch.equal(near.call(ForwardRequest(0, z)).result().hidden_BTH, h)


def test_the_limit_on_tokens_holds_on_both_sides() -> None:
    here = world("llama")
    with serve(here.server, limits=Limits(max_tokens=10)) as serving:
        link = connect(f"grpc://{serving.address}", "a")
        here.client("a", (2, 4), link=link)
        link.call(ForwardRequest(1, torch.zeros(2, 5, 32))).result(SOON)
        with pytest.raises(LinkError, match="2 × 6 tokens, the server takes at most 10"):
            link.call(ForwardRequest(2, torch.zeros(2, 6, 32))).result(SOON)
        link.close()


def test_who_vanishes_is_dropped_and_the_others_go_on() -> None:
    here = world("llama")
    with serve(here.server) as serving:
        url = f"grpc://{serving.address}"
        a, b = connect(url, "a", codec="off"), connect(url, "b")
        lost, other = here.client("a", (2, 4), link=a), here.client("b", (3, 4), link=b)
        lost(**here.batch())
        assert len(here.server._sessions["a"].pending) == 1
        frame = encode(PLAIN.frame(ForwardRequest(2, torch.zeros(60, 200, 32)), 9))
        half = send_raw(a, lambda _: frame[:1])  # the first of its two messages
        vanish(a)
        assert eventually(lambda: "a" not in here.server._sessions)
        assert half.exception(SOON) is not None
        assert not here.server.shared._held
        other(**here.batch()).loss.backward()
        assert here.server.shared.version == 1
        again = connect(url, "a")  # and may come again
        here.client("a", (2, 4), link=again)(**here.batch()).loss.backward()
        assert here.server.shared.version == 2
        again.close()
        b.close()


def test_one_stream_a_client() -> None:
    here = world("llama")
    with serve(here.server) as serving:
        url = f"grpc://{serving.address}"
        with connected(connect(url, "a")), pytest.raises(LinkError, match="client a is connected already"):
            connect(url, "a")
        assert eventually(lambda: not serving.clients)
        connect(url, "a").close()


@pytest.mark.parametrize("how", ["url", "same", "new"])
def test_after_a_refused_join_the_same_process_joins(how: str) -> None:
    """Over a link of its own, over the same link, and over another while the first is still held."""
    server = Server.from_pretrained("arch:llama")
    with serve(server) as serving:
        url = f"grpc://a@{serving.address}"
        link: Any = url if how == "url" else connect(url)
        with pytest.raises(LinkError, match=r"set the same model\.tuning on both sides"):
            SplitModelForCausalLM.from_pretrained("arch:llama", cut=(1, 3), link=link, tuning="lora")
        again = connect(url) if how == "new" else link
        model = SplitModelForCausalLM.from_pretrained("arch:llama", cut=(1, 3), link=again)
        ids = torch.arange(6)[None]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert server.shared.version == 1
        model.link.close()


@pytest.mark.parametrize(
    ("older", "says"), [("connecting", f"server speaks version {VERSION}"), ("gate", "speaks version 3")]
)
def test_another_version_is_refused_in_one_line(older: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 is the last that knew neither rows nor packed tokens."""
    monkeypatch.setattr(f"flexp.links.grpc.{older}.VERSION", 3)
    refused = pytest.raises(LinkError, match=f"{says}.*: use the same FlexP on both sides$")
    with serve(world("llama").server) as serving, refused:
        connect(f"grpc://a@{serving.address}")


def test_a_late_answer_gives_the_link_up(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("llama")
    held = threading.Event()
    with serve(here.server) as serving:
        link = connect(f"grpc://{serving.address}", "a", timeout=0.3)
        here.client("a", (2, 4), link=link)
        monkeypatch.setattr(here.server, "answer", lambda *_: held.wait(SOON))
        with pytest.raises(LinkError, match=r"no answer to PullRequest within 0.3 s"):
            link.call(PullRequest(1, 2)).result(SOON)
        with pytest.raises(LinkError, match=r"no answer to PullRequest within 0.3 s"):
            link.call(ForwardRequest(1, torch.zeros(1, 2, 32))).result(SOON)
        held.set()
        link.close()


class Waits:
    """A conductor that lets clients wait; ``there``: whether it says so when it is asked again."""

    def __init__(self, there: bool) -> None:
        self.there, self.asked = there, list[Future[Order]]()

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        if self.there and self.asked:
            self.asked[-1].set_exception(LinkLostError(AGAIN))
        self.asked.append(Future())
        return self.asked[-1]

    def gone(self, client: str) -> None:
        pass

    def dismiss(self, why: LinkError) -> None:
        pass


def test_whoever_waits_for_others_asks_again_over_the_same_link() -> None:
    here = world("llama")
    here.server.conductor = waits = Waits(there=True)
    with serve(here.server) as serving:
        link = connect(f"grpc://{serving.address}", "a", timeout=0.3)
        here.client("a", (2, 4), link=link)
        order = link.call(Ready(0))
        with pytest.raises(TimeoutError):
            order.result(1.5)
        assert link.broken is None
        assert len(waits.asked) >= 3
        waits.asked[-1].set_result(Order("evaluate", "run", number=7))
        assert order.result(SOON).number == 7
        waits.asked.clear()
        assert link.call(PullRequest(1, 2)).result(SOON).total > 0  # nothing is left over on the stream
        waits.there = False
        with pytest.raises(LinkError, match=r"no answer to Ready within 0.3 s"):
            link.call(Ready(0)).result(SOON)
        assert len(waits.asked) == 2
        link.close()


def test_a_server_that_goes_is_told_in_one_line() -> None:
    here = world("llama")
    with serve(here.server) as serving:
        address = serving.address
        link = connect(f"grpc://{address}", "a")
        here.client("a", (2, 4), link=link)
        serving.refuse_more()
        with pytest.raises(LinkError, match="the server is stopping"):
            link.call(ForwardRequest(1, torch.zeros(1, 2, 32))).result(SOON)
    with pytest.raises(LinkError, match=r"cannot be reached, or has gone|ended the stream|Cancel"):
        link.call(ForwardRequest(1, torch.zeros(1, 2, 32))).result(SOON)
    link.close()
    link.close()
    with pytest.raises(LinkError, match=f"the server at {address} cannot be reached"):
        connect(f"grpc://{address}", "a")


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        ("all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:7999: Failed to connect", "[::1]:7999: Failed to connect"),
        ("ipv6:[fe80::1%25eth0]:7999: Failed", "[fe80::1%eth0]:7999: Failed"),
        ("UNKNOWN: ipv4:127.0.0.1:7999: Failed", "UNKNOWN: 127.0.0.1:7999: Failed"),
        ("ipv6:%5B::1%5D%0A:1", "[::1]\\x0a:1"),
        ("100%25 of ipv6: none", "100%25 of ipv6: none"),
    ],
)
def test_addresses_are_shown_as_they_are_written(details: str, shown: str) -> None:
    assert last_part(details) == shown


def test_a_fault_of_the_server_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("llama")

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    with loopback(here.server, "a") as link:
        model = here.client("a", (2, 4), link=link)
        with monkeypatch.context() as patch:
            patch.setattr(here.server, "answer", broken)
            with pytest.raises(LinkError, match=r"the server failed \(ZeroDivisionError: a mistake\)"):
                model(**here.batch())
        model(**here.batch()).loss.backward()


def test_waiting_at_the_server_lets_others_draw() -> None:
    """A client that gives up inside its own turn must not hold the generator that the server needs to answer."""
    here = world("bert", dropout=0.2)
    with serve(here.server) as serving:
        links = [connect(f"grpc://{serving.address}", name) for name in "ab"]
        a, b = (here.client(link.client, (2, 4), link=link) for link in links)
        answer: list[Any] = []
        with RandomStream(0).active():
            thread = threading.Thread(target=lambda: answer.append(b(**here.batch())))
            thread.start()  # its forward waits at the server for this turn
            time.sleep(0.1)
            a.abort()
        thread.join(SOON)
        assert len(answer) == 1
        for link in links:
            link.close()


def test_urls_where_links_are_taken(tmp_path: Path) -> None:
    import flexp
    from flexp.models.zoo import save_tiny

    folder = save_tiny("llama", tmp_path)
    server = flexp.Server.from_pretrained(folder, base_depth=1)
    with flexp.serve(server) as serving:
        url = f"grpc://clinic-a@{serving.address}"
        model = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(2, 4), link=url)
        assert model.link.client == "clinic-a"
        assert serving.clients == ["clinic-a"]
        model.link.close()


def test_frames_that_come_twice_or_too_late_are_computed_once_or_never() -> None:
    here = world("llama")
    counted: list[int] = []
    answer = here.server.answer

    def counting(client: str, request: Any) -> Any:
        if isinstance(request, ForwardRequest):
            counted.append(request.exchange)
        return answer(client, request)

    here.server.answer = counting  # type: ignore[method-assign]
    with serve(here.server) as serving:
        link = connect(f"grpc://{serving.address}", "a", codec="off")
        here.client("a", (2, 4), link=link)
        z = torch.randn(1, 3, 32)

        def send(exchange: int, *, before: list[bytes] = [], twice: bool = False) -> Future[Any]:  # noqa: B006
            request = ForwardRequest(exchange, z)
            head = PLAIN.frame(request, next(link._places)).head
            call = _Call(request, head, Future(), link.meter.evaluation, torch.device("cpu"), None)

            def messages(number: int) -> list[bytes]:
                return [*before, *encode(PLAIN.frame(request, number)) * (2 if twice else 1)]

            background().call_soon_threadsafe(link._enqueue, call, SimpleNamespace(messages=messages))
            return call.future

        assert send(1, twice=True).result(SOON).hidden_BTH.shape == z.shape
        late = next(link._numbers)
        assert send(2).result(SOON).hidden_BTH.shape == z.shape  # the second copy harmed nothing
        lost = send(4, before=encode(PLAIN.frame(ForwardRequest(3, z), late)))
        with pytest.raises(LinkLostError, match="came after one that was sent later"):  # told at once, to be done again
            lost.result(SOON)
        assert counted == [1, 2]
        link.close()
        assert eventually(lambda: serving._memory.used == 0)


@pytest.mark.parametrize(("kind", "expected"), [("grpc", "B1 F2 F3"), ("emulated", "F2 B1 F3")])
def test_gradients_leave_before_other_exchanges_that_wait(kind: str, expected: str) -> None:
    """Behind them, they would go up only when all z are up, and ∂total/∂z would come down only then."""
    here = world("bert")
    z, came, answer = torch.randn(1, 3, 32), list[str](), here.server.answer

    def noting(client: str, request: Any) -> Any:
        if isinstance(request, ForwardRequest | BackwardRequest):
            came.append(f"{type(request).__name__[0]}{request.exchange}")
        return answer(client, request)

    with serve(here.server) as serving:
        link: Link = connect(f"grpc://{serving.address}", "a", codec="off")
        if kind == "emulated":
            link = EmulatedLink(here.server.connect("b"), Network(uplink_bps=8 * z.nbytes / 0.1))
        with connected(link):
            here.client(link.client, (2, 4), link=link)
            link.call(ForwardRequest(1, z, train=True)).result(SOON)
            here.server.answer = noting  # type: ignore[method-assign]
            if kind == "grpc":  # nothing leaves until all wait; the other network has begun with what came first
                background().call_soon_threadsafe(time.sleep, 0.3)
            requests = [ForwardRequest(2, z, train=True), ForwardRequest(3, z, train=True), BackwardRequest(1, z)]
            wait([link.call(request) for request in requests], SOON)
            assert " ".join(came) == expected


@pytest.mark.parametrize(
    ("code", "details", "lost"),
    [
        ("CANCELLED", "why", True),
        ("ALREADY_EXISTS", "why", True),
        ("INTERNAL", "Stream removed (Metadata keys cannot be zero length)", True),
        ("UNKNOWN", "Stream removed (Failed parsing HTTP/2 (non-empty settings ack frame received))", True),
        ("UNKNOWN", "Unexpected KeyError", False),
        ("UNIMPLEMENTED", "Method not found!", False),
        ("UNAUTHENTICATED", "why", False),
    ],
)
def test_what_a_stream_that_does_not_open_comes_to(code: str, details: str, lost: bool) -> None:
    """Of a server that falls just then gRPC says CANCELLED, and of damage on the way the others: the client waits."""
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode[code], nothing, nothing, details=details)
    found = asyncio.run(refusal(error, SimpleNamespace(address="here:1"), "token"))  # type: ignore[arg-type]
    assert isinstance(found, LinkLostError) is lost
