"""Log-probabilities of the prompt: the server against `transformers`, and lm-eval against both."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import SotaError
from sota_transformer.inference.batch import Batch, Job
from sota_transformer.inference.generate import make_sampler
from sota_transformer.model.transformer import Transformer
from tests.inference_models import FULL, as_transformers, small_model, write_run
from tests.serving import Server

TOKENIZER = Tokenizer()
CONTEXT = 160
LAST = "That is the end."  # end-of-text most likely follows it
TEXTS = ["Once upon a time", LAST, "na\u00efve \u6f22\u5b57 \U0001f642\U0001f469\u200d\U0001f680 e"]
LONG = TOKENIZER.encode("One two three, four; " * 40)[: CONTEXT - 5]


def ending_model() -> Transformer:
    model = small_model(dataclasses.replace(FULL, seq_len=CONTEXT))
    with torch.no_grad():
        hidden = model(torch.tensor([TOKENIZER.encode(LAST)]))[0, -1]
        least = float(model.logits(hidden).max()) + 0.5
        model.embedding.weight[EOT] = least * hidden / hidden.square().sum()
        model.embedding.weight[EOT + 1] = 1.5 * model.embedding.weight[EOT]  # padding: never drawn
    return model


MODEL = ending_model()
PEER = as_transformers(MODEL)


def nats_after(tokens: list[int]) -> Tensor:
    """Log-probabilities (T, V) of what follows each token, from `transformers` in float64."""
    with torch.no_grad():
        logits = PEER(torch.tensor([tokens])).logits[0].double()
    return logits.log_softmax(-1)[:, : EOT + 1]


def shown(token: int) -> str:
    try:
        return TOKENIZER.decode_bytes([token]).decode() or "<|endoftext|>"
    except UnicodeDecodeError as error:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in error.object)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_run(tmp_path_factory.mktemp("runs") / "echoed", MODEL))
    yield server
    server.stop()


def ask(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.ask(**{"echo": True, "logprobs": 3, "temperature": 0} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def compare(choice: dict[str, Any], tokens: list[int]) -> None:
    """Everything that a choice reports about these tokens, the prompt's and the drawn ones."""
    found, nats = choice["logprobs"], nats_after(tokens)
    assert found["tokens"] == [shown(token) for token in tokens]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    own = nats[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert found["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=1e-4)
    for place, best in enumerate(found["top_logprobs"][1:]):
        likely = nats[place].topk(3)
        assert list(best) == [shown(token) for token in likely.indices.tolist()]
        assert list(best.values()) == pytest.approx(likely.values.tolist(), abs=1e-4)
    data = [TOKENIZER.decode_bytes(tokens[:count]) for count in range(len(tokens))]
    assert found["text_offset"] == [len(before.decode(errors="ignore")) for before in data]
    assert choice["text"] == TOKENIZER.decode(tokens)


CUT = TOKENIZER.encode("a\u6f22")[:-1]  # ends within a character
assert TOKENIZER.decode(CUT) == "a\ufffd"


@pytest.mark.parametrize(
    "given", [*TEXTS, LONG, CUT, [EOT, 40, EOT, 41], [EOT]], ids=lambda given: ascii(given)[:20]
)
def test_the_prompts_probabilities_are_the_models(server: Server, given: str | list[int]) -> None:
    tokens = TOKENIZER.encode(given) if isinstance(given, str) else given
    answer = ask(server, prompt=given, max_tokens=0)
    (choice,) = answer["choices"]
    compare(choice, tokens)
    assert choice["finish_reason"] == "length"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (
        len(tokens), 0,
    )  # fmt: skip


def test_several_prompts_and_continuations_of_each(server: Server) -> None:
    ids = {shown(token): token for token in range(EOT + 1)}
    prompts = [TOKENIZER.encode(TEXTS[0]), LONG]
    choices = ask(server, prompt=prompts, n=2, max_tokens=4, temperature=1, seed=5)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for number, choice in enumerate(choices):
        alone = server.ask(prompt=prompts[number // 2], max_tokens=4, seed=5 + number, logprobs=0)
        drawn = alone.json()["choices"][0]["logprobs"]["tokens"]
        compare(choice, prompts[number // 2] + [ids[token] for token in drawn])


def test_one_token_follows_the_prompt_even_if_the_text_ends(server: Server) -> None:
    """lm-eval asks for one token and drops the last entry, whatever it is."""
    (choice,) = ask(server, prompt=LAST, max_tokens=1)["choices"]
    assert choice["text"] == LAST and choice["finish_reason"] == "stop"
    compare(choice, [*TOKENIZER.encode(LAST), EOT])


def test_offsets_count_characters_held_back_for_a_stop_string(server: Server) -> None:
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 8, "temperature": 1, "seed": 2}
    (free,) = ask(server, **body)["choices"]
    assert len(free["logprobs"]["tokens"]) == 9
    stop = free["text"][1:] + "never"
    (held,) = ask(server, **body, stop=[stop])["choices"]
    assert held == free
    (within,) = ask(server, **body | {"prompt": "never a"}, stop=["never"])["choices"]
    assert within["text"].startswith("never a") and within["finish_reason"] == "length"


@pytest.mark.parametrize("body", [{"max_tokens": 5, "n": 2}, {"max_tokens": 0}], ids=json.dumps)
@pytest.mark.parametrize("logprobs", [2, None])
def test_a_stream_says_the_same(server: Server, body: dict[str, Any], logprobs: int | None) -> None:
    prompt = [LONG, CUT]
    body = body | {"prompt": prompt, "seed": 3, "logprobs": logprobs, "temperature": 1}
    whole = ask(server, **body)["choices"]
    lines = server.ask(echo=True, stream=True, **body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    for choice in whole:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert len(mine) <= 1 + body["max_tokens"]  # the prompt comes with the first drawn token
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for piece in mine for value in piece["logprobs"][name]] == values


def test_a_prompt_may_fill_the_context_if_nothing_is_added(server: Server) -> None:
    full = (LONG * 2)[:CONTEXT]
    compare(ask(server, prompt=full, max_tokens=0)["choices"][0], full)
    assert server.ask(prompt=full, max_tokens=1, echo=True, logprobs=1).status_code == 400
    assert server.ask(prompt=[*full, 1], max_tokens=0, echo=True).status_code == 400
    refused = server.ask(prompt="a", max_tokens=0, logprobs=1)
    assert refused.status_code == 400 and "echo" in refused.json()["error"]["message"]


def test_a_prompt_is_scored_in_slices_and_blocks_no_other_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    plain = MODEL.logits
    monkeypatch.setattr(MODEL, "logits", lambda hidden: rows.append(len(hidden)) or plain(hidden))
    batch = Batch(MODEL, TOKENIZER, 3)
    sampler, tokens = make_sampler(0.0), TOKENIZER.encode("Once")
    batch.add(1, Job(tokens=LONG, sampler=sampler, max_tokens=2, alternatives=5, echo=True))
    batch.add(2, Job(tokens=tokens, sampler=sampler, max_tokens=50, alternatives=5))
    batch.add(3, Job(tokens=LONG, sampler=sampler, max_tokens=0, alternatives=5, echo=True))
    told = []
    while batch.free < 2:
        drawn = batch.step()
        assert sum(key == 2 for key, _ in drawn) == 1
        assert sum(key == 1 for key, _ in drawn) <= 64
        told += [piece.token for key, piece in drawn if key == 3]
    assert told == LONG and max(rows) <= 64


def test_nan_logits_are_an_error_in_a_prompt_too() -> None:
    model = small_model(FULL)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    batch = Batch(model, TOKENIZER, 1)
    batch.add(1, Job(tokens=[1, 2], sampler=max, max_tokens=0, alternatives=0, echo=True))  # type: ignore[arg-type]
    with pytest.raises(SotaError, match="not finite"):
        batch.step()


def test_a_client_that_disconnects_during_its_prompt_frees_its_slot(server: Server) -> None:
    body = {"prompt": [LONG] * 4, "n": 4, "echo": True, "logprobs": 20, "max_tokens": 0}
    began = time.monotonic()
    assert server.ask(**body).status_code == 200
    whole = time.monotonic() - began
    began = time.monotonic()
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.1)
    while server.busy():
        time.sleep(0.05)
    assert server.ask(prompt="a", max_tokens=1).status_code == 200
    assert time.monotonic() - began < 0.9 * whole


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "by_token"), [(1, True), (3, True), (1, False)])
def test_lm_eval_gets_the_models_probabilities(
    server: Server, tmp_path: Path, batch_size: int, by_token: bool
) -> None:
    """Its class for servers, `local-completions`, with the tokenizer of an exported folder."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="lm-eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from sota_transformer.inference.benchmarks import encode_pair
    from sota_transformer.inference.tokenizer_files import huggingface_files

    for name, data in huggingface_files(CONTEXT).items():
        (tmp_path / name).write_bytes(data)
    api = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="echoed", tokenizer=str(tmp_path),
        max_length=CONTEXT, batch_size=batch_size, tokenized_requests=by_token, max_retries=1,
    )  # fmt: skip
    said = [TOKENIZER.decode([int(nats_after(TOKENIZER.encode(t))[-1].argmax())]) for t in TEXTS]
    pairs = [("Once upon", " a time"), (LAST, " Or not."), ("\u6f22", "\u5b57 \U0001f642 ")]
    pairs += [("One two three, four; " * 15, " five"), *zip(TEXTS, said, strict=True)]
    pairs += [("", "The beginning")] if by_token else []  # end-of-text is a token only as an id
    pairs = [(before, after) for before, after in pairs if after]
    ours = []
    for context, ending in (encode_pair(TOKENIZER, *pair) for pair in pairs):
        nats = nats_after(context + ending)[len(context) - 1 : -1]
        goals = torch.tensor(ending)
        ours.append((float(nats.gather(1, goals[:, None]).sum()), nats.argmax(-1).equal(goals)))
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = api.loglikelihood(asked)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in ours], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in ours]
    assert {greedy for _, greedy in found} == {True, False}
