"""Split models write with transformers' own ``generate``: token for token, and logit for logit, as the whole model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client import joined
from flexp.client.generation import SplitGenerator
from flexp.client.model import SplitModel
from flexp.client.pretrained import SplitModelForCausalLM
from flexp.config import ModelConfig, ServerConfig
from flexp.errors import ConfigError, LinkError, LinkLostError, ModelError
from flexp.links.asking import EndGeneration, ExtendRequest
from flexp.links.base import Link
from flexp.links.declaring import tensors
from flexp.links.grpc import connect, serve
from flexp.models.anatomy import Part
from flexp.models.architectures import ARCHITECTURES
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_model
from flexp.server import Server
from tests.harness import RecordingLink, disturb, seeded, world
from tests.links.grpc_tools import vanish

WRITERS = [name for name, spec in ARCHITECTURES.items() if "causal-lm" in spec.tasks and not spec.refused]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": 7},
    "chunks": {"prefill_chunk_size": 4},
}


class Pair:
    """A whole model, and the same one split between a server and client ``a``."""

    def __init__(self, name: str = "llama", cut: tuple[int, int] = (1, 3), config: ServerConfig | None = None) -> None:
        self.whole: Any = tiny_model(name, task="causal-lm").requires_grad_(False)
        self.source = Stage.whole(self.whole)
        stage = carve(self.source, Part.server(min(cut[0], 1), 4))
        tune(stage, ModelConfig(id="any"), "frozen")
        self.server, self.cut = Server(stage, tuning="frozen", config=config), cut

    def split(self, link: Link | None = None, name: str = "a") -> SplitModel:
        stage = carve(self.source, Part.client(self.cut, 4))
        tune(stage, ModelConfig(id="any"), "frozen")
        link = link or self.server.connect(name)
        return SplitModelForCausalLM(stage, self.cut, link, tuning="frozen", expose_embeddings=True)

    def batch(self, length: int = 9) -> dict[str, Tensor]:
        """Three rows, two of them padded on the left."""
        ids = torch.randint(5, 97, (3, length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[1, :3], mask[2, :1] = 0, 0
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}

    def answers(self, writer: Any, **options: Any) -> Any:
        torch.manual_seed(3)
        wanted = {"use_cache": True} if writer is self.whole else {}
        settings = {**GREEDY, **options, **wanted, "output_logits": True, "return_dict_in_generate": True}
        return writer.generate(**self.batch(), **settings)

    @property
    def held(self) -> list[int]:
        """The lengths that the server holds of client a's answers."""
        return [answer.cache.length for answer in self.server._sessions["a"].generations.answers.values()]


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one.sequences, other.sequences) and all(
        torch.equal(left, right) for left, right in zip(one.logits, other.logits, strict=True)
    )


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_answers_are_the_whole_models(name: str) -> None:
    """Windows of the zoo are shorter than the answers, so that sliding caches slide."""
    pair = Pair(name)
    writer = SplitGenerator(pair.split())
    assert equal(pair.answers(writer), pair.answers(pair.whole))
    assert (pair.held, writer.rebuilt) == ([], 0)


@pytest.mark.parametrize("cut", [(0, 2), (2, 4), (0, 4), (1, 2)])
def test_every_cut(cut: tuple[int, int]) -> None:
    pair = Pair("gemma3", cut)
    assert equal(pair.answers(SplitGenerator(pair.split())), pair.answers(pair.whole))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_ways_to_choose_tokens(name: str, way: str) -> None:
    pair = Pair(name)
    writer = SplitGenerator(pair.split())
    assert equal(pair.answers(writer, **WAYS[way]), pair.answers(pair.whole, **WAYS[way]))
    assert writer.rebuilt == 0


def test_only_new_tokens_cross() -> None:
    pair = Pair()
    link = RecordingLink(pair.server.connect("a"))
    pair.answers(SplitGenerator(pair.split(link)))
    sent = list(link.sent(ExtendRequest))
    first = sent[0].mask_BT
    assert first is not None
    assert (first.shape, int(first.sum())) == ((3, 9), 23)
    assert [(request.past, tuple(request.hidden_BTH.shape)) for request in sent] == [
        (0, (1, 23, 32)),  # without padding
        *((9 + k, (3, 1, 32)) for k in range(9)),
    ]
    assert all(request.mask_BT.shape == request.hidden_BTH.shape[:2] for request in sent[1:])


def test_no_token_crosses() -> None:
    """Nothing that goes up is a token, or an embedding of one, or tells what was chosen."""
    pair = Pair()
    link = RecordingLink(pair.server.connect("a"))
    ids = pair.batch()["input_ids"][:1, 3:]
    answer = SplitGenerator(pair.split(link)).generate(ids, **GREEDY)[0]
    embedded_TH = pair.whole.get_input_embeddings()(answer)
    up = [(name, value) for way, message in link.messages if way == "up" for name, value in tensors(message)]
    assert {name for name, _ in up} == {"hidden_BTH", "positions_BT"}
    assert torch.equal(torch.cat([value[0] for name, value in up if name == "positions_BT"]), torch.arange(15))
    seen_TH = torch.cat([value[0] for name, value in up if name == "hidden_BTH"])
    assert float((seen_TH - embedded_TH[:15]).abs().amax(-1).min()) > 0.1


def test_over_a_network() -> None:
    pair = Pair("qwen3")
    with serve(pair.server) as serving:
        link = connect(f"grpc://{serving.address}", "a")
        writer = SplitGenerator(pair.split(link))
        assert equal(pair.answers(writer), pair.answers(pair.whole))
        assert equal(pair.answers(writer, **WAYS["beams"]), pair.answers(pair.whole, **WAYS["beams"]))
        assert (pair.held, writer.rebuilt) == ([], 0)
        link.close()


class Forgetful(RecordingLink):
    """A link whose server loses all answers before some of the exchanges, or that breaks for good there."""

    def __init__(self, inner: Link, server: Server, at: tuple[int, ...], breaks: bool = False) -> None:
        super().__init__(inner)
        self.server, self.at, self.breaks, self.count, self.broken = server, at, breaks, 0, False

    def call(self, request: Any) -> Any:
        if isinstance(request, ExtendRequest):
            self.count += 1
            if self.count in self.at:
                self.server._sessions["a"].generations.answers.clear()
                self.broken = self.breaks
        if self.broken and isinstance(request, ExtendRequest | EndGeneration):
            raise LinkLostError("the link is broken")
        return super().call(request)


@pytest.mark.parametrize("options", [{}, WAYS["beams"]], ids=["greedy", "beams"])
def test_a_server_that_lost_an_answer_gets_it_again(options: dict[str, Any]) -> None:
    pair = Pair("gemma2")
    link = Forgetful(pair.server.connect("a"), pair.server, at=(4, 8))
    writer = SplitGenerator(pair.split(link))
    found, expected = pair.answers(writer, **options), pair.answers(pair.whole, **options)
    assert writer.rebuilt == 2
    assert torch.equal(found.sequences, expected.sequences)
    # one prefill rounds otherwise than token by token
    assert all(torch.allclose(*both, atol=1e-4) for both in zip(found.logits, expected.logits, strict=True))
    again = [request for request in link.sent(ExtendRequest) if not request.past]
    masks = [request.mask_BT for request in again]
    assert [mask.shape[1] for mask in masks if mask is not None] == [9, 12, 15]
    assert [request.hidden_BTH.shape[1] for request in again] == [int(mask.sum()) for mask in masks if mask is not None]


def test_an_answer_goes_on_over_a_new_link(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pauses: list[float] = []
    monkeypatch.setattr(joined.time, "sleep", pauses.append)
    offers: list[Link] = [
        Forgetful(pair.server.connect("a"), pair.server, at=(1,), breaks=True),
        pair.server.connect("a"),
    ]
    broken = Forgetful(pair.server.connect("a"), pair.server, at=(5,), breaks=True)
    writer = SplitGenerator(pair.split(broken), reconnect=lambda: offers.pop(0))
    found, expected = pair.answers(writer), pair.answers(pair.whole)
    assert torch.equal(found.sequences, expected.sequences)
    assert (writer.rebuilt, offers, pauses) == (1, [], [0.0, 0.5])


def test_a_stream_that_breaks_in_the_middle_of_an_answer() -> None:
    pair = Pair()
    with serve(pair.server) as serving:
        url, links = f"grpc://{serving.address}", []

        def reach() -> Link:
            links.append(connect(url, "a"))
            return links[-1]

        writer = SplitGenerator(pair.split(reach()), reconnect=reach)

        class Cut:
            """Cuts the stream after the fourth token."""

            tokens = 0

            def put(self, _: Tensor) -> None:
                self.tokens += 1
                if self.tokens == 5:  # the prompt is the first
                    vanish(links[0])

            def end(self) -> None:
                pass

        ids = pair.batch()["input_ids"][:1]
        found = writer.generate(ids, streamer=Cut(), **GREEDY)
        assert torch.equal(found, pair.whole.generate(ids, use_cache=True, **GREEDY))
        assert (len(links), writer.rebuilt) == (2, 1)
        links[-1].close()


def test_a_link_that_stays_broken_says_so() -> None:
    pair = Pair()
    link = Forgetful(pair.server.connect("a"), pair.server, at=(3,), breaks=True)
    with pytest.raises(LinkLostError, match="the link is broken"):
        pair.answers(SplitGenerator(pair.split(link)))


def test_a_server_that_stays_away_and_one_that_refuses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(joined.time, "sleep", pauses.append)
    pair = Pair()

    def broken() -> Link:
        return Forgetful(pair.server.connect("a"), pair.server, at=(3,), breaks=True)

    def away() -> Link:
        raise LinkLostError("nobody is there")

    with pytest.raises(LinkLostError, match="nobody is there"):
        pair.answers(SplitGenerator(pair.split(broken()), away))
    assert tuple(pauses) == joined.PAUSES

    def refused() -> Link:
        raise LinkError("the token is wrong")

    with pytest.raises(LinkError, match="the token is wrong"):
        pair.answers(SplitGenerator(pair.split(broken()), refused))
    assert len(pauses) == len(joined.PAUSES) + 1


def test_of_several_servers_one_answers_and_another_goes_on_where_it_fails() -> None:
    whole, pairs = Pair(), [Pair(), Pair()]
    expected = whole.answers(whole.whole)
    with ExitStack() as one, ExitStack() as other:
        ends = [way.enter_context(serve(pair.server)) for way, pair in zip((one, other), pairs, strict=True)]
        url = "grpc://" + ",".join(str(serving.address) for serving in ends)
        writer = SplitGenerator(pairs[0].split(connect(url, "a", codec="off")), lambda: connect(url, "a", codec="off"))
        (there,) = (at for at, serving in enumerate(ends) if serving.clients)
        ask, asked = writer._ask, list[Any]()

        def stopping(request: ExtendRequest) -> Tensor:
            asked.append(request)
            if len(asked) == 4:
                (one, other)[there].close()
            return ask(request)

        writer._ask = stopping  # type: ignore[method-assign]
        found = whole.answers(writer)
        assert torch.equal(found.sequences, expected.sequences)
        assert (writer.rebuilt, ends[1 - there].clients) == (1, ["a"])
        writer.split.link.close()


def test_of_several_servers_none_may_be_trained_and_all_have_the_same_weights() -> None:
    one, other = world("llama"), world("llama")
    disturb(other.server.shared.updater.parameters)
    with serve(one.server) as first, serve(other.server) as second:
        both = f"grpc://a@{first.address},{second.address}"
        with pytest.raises(LinkError, match=r"2 servers are named, and that at .* may still be trained, or is one of"):
            one.client("a", (1, 4), link=connect(both, codec="off"))
        first_link = connect(f"grpc://b@{first.address}", codec="off")
        one.server.sealed = other.server.sealed = True
        writer = SplitGenerator(
            one.client("b", (1, 4), link=first_link), lambda: connect(f"grpc://b@{second.address}", codec="off")
        )
        cache = writer.new_cache()
        writer(input_ids=torch.arange(5)[None], past_key_values=cache)
        vanish(first_link)
        for _ in range(2):
            with pytest.raises(LinkError, match="the server that answers now has other weights than the one before it"):
                writer(input_ids=torch.arange(1)[None], past_key_values=cache)
        again = writer.new_cache()
        assert writer(input_ids=torch.arange(5)[None], past_key_values=again).logits.shape[:2] == (1, 5)
        writer.split.link.close()
    gone = f"grpc://a@{first.address},{second.address}"
    with pytest.raises(LinkLostError, match=r"none of the 2 servers can be used: .* cannot be reached"):
        connect(gone)


def test_a_refusal_is_told_and_not_asked_again() -> None:
    pair = Pair(config=ServerConfig(max_cached_tokens=36))
    writer = SplitGenerator(pair.split(), reconnect=lambda: pytest.fail("the link is not broken"))
    with pytest.raises(
        LinkError, match=r"its answers would have 39 tokens, server.max_cached_tokens allows at most 36"
    ):
        pair.answers(writer)
    assert pair.held == []


def test_answers_of_several_clients_and_of_one_take_turns() -> None:
    pair = Pair("qwen2")
    writers = [SplitGenerator(pair.split(name="a")), SplitGenerator(pair.split(name="b"))]
    ids = torch.randint(5, 97, (2, 9), generator=seeded(4))
    runs = [(writer, writer.new_cache(), row) for writer in writers for row in (0, 1)]
    rows = [ids[row : row + 1] for _, _, row in runs]
    for step in range(6):
        for place, (writer, cache, _) in enumerate(runs):
            new = rows[place] if not step else rows[place][:, -1:]
            logits = writer(input_ids=new, past_key_values=cache).logits
            rows[place] = torch.cat([rows[place], logits[:, -1:].argmax(-1)], dim=1)
    assert pair.held == [14, 14]
    for place, (writer, cache, row) in enumerate(runs):
        expected = pair.whole.generate(ids[row : row + 1], use_cache=True, **{**GREEDY, "max_new_tokens": 6})
        assert torch.equal(rows[place], expected)
        writer.end(cache)
    assert pair.held == []


def test_a_cache_of_ones_own_goes_on() -> None:
    pair = Pair()
    writer = SplitGenerator(pair.split())
    cache, ids = writer.new_cache(), pair.batch()["input_ids"][:1]
    first = writer.generate(ids, past_key_values=cache, **GREEDY)
    assert pair.held == [9 + 9]  # the last token has not been read yet
    more = writer.generate(torch.cat([first, ids], dim=1), past_key_values=cache, **GREEDY)
    whole = pair.whole.generate(torch.cat([first, ids], dim=1), use_cache=True, **GREEDY)
    assert torch.equal(more, whole)


def test_training_goes_on_after_an_answer() -> None:
    here = world("llama")
    model = here.client("a", (2, 4))
    expected = here.client("b", (2, 4))(**here.batch()).loss
    SplitGenerator(model).generate(here.batch()["input_ids"], **GREEDY)
    loss = model.train()(**here.batch()).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert here.server.shared.version == 1


def test_what_cannot_be_had_is_refused() -> None:
    pair = Pair()
    writer, batch = SplitGenerator(pair.split()), pair.batch()
    for option in ({"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False}):
        with pytest.raises(ConfigError):
            writer.generate(**batch, **option)
    with pytest.raises(ModelError, match="cannot take tokens back"):
        writer.generate(batch["input_ids"][:1], prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ModelError, match="needs past_key_values"):
        writer(input_ids=batch["input_ids"])
    with pytest.raises(ModelError, match="writes no text"):
        SplitGenerator(world("bert").client("a", (1, 4)))


def test_a_model_that_keeps_more_than_keys_and_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    split = pair.split()
    monkeypatch.setattr(split.config, "layer_types", ["linear_attention"] * 4, raising=False)
    with pytest.raises(ModelError, match=r"it keeps Linear\w+, expected keys and values"):
        SplitGenerator(split)


def test_a_cache_that_a_checkpoint_wants_of_whole_models_is_its_own_matter() -> None:
    pair = Pair("gemma3")
    expected = pair.answers(pair.whole)
    split = pair.split()
    split.model.generation_config.cache_implementation = "hybrid"  # as Gemma's checkpoints say
    assert equal(expected, pair.answers(SplitGenerator(split)))
