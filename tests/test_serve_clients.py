"""What real clients send and look for: openai, LangChain, LiteLLM, lm-eval, httpx, requests."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import HTTPException

from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.serve.completions import Completions, _Active
from sota_transformer.serve.schema import Completion
from tests.inference_models import FULL, small_model, write_run
from tests.serving import Server

MODEL = small_model(dataclasses.replace(FULL, seq_len=160))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_run(tmp_path_factory.mktemp("runs") / "served", MODEL))
    yield server
    server.stop()


def test_what_clients_send_for_nothing_is_accepted(server: Server) -> None:
    """LangChain sends penalties of 0, the openai client a None that it was given."""
    fields = set(Completion.model_fields) - {"prompt", "max_tokens", "seed"}
    plain: dict[str, Any] = {"prompt": "a", "max_tokens": 4, "seed": 1}
    nothing: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1}
    nothing |= {"logit_bias": {}, "suffix": ""}
    text = server.ask(**plain).json()["choices"][0]["text"]
    for added in (nothing, dict.fromkeys(fields)):
        answer = server.ask(**plain, **added)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == text
    default = server.ask(prompt=None, max_tokens=None, seed=1, top_k=1).json()
    assert default["usage"] == {"prompt_tokens": 1, "completion_tokens": 16, "total_tokens": 17}


def test_more_prompts_than_may_wait_are_answered_together(server: Server) -> None:
    """LangChain asks for 20 at a time."""
    answer = server.ask(prompt=[str(number) for number in range(32)], max_tokens=2, seed=1)
    assert answer.status_code == 200, answer.text
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(32))


def test_a_client_that_splits_lines_like_python_can_read_a_stream(server: Server) -> None:
    prompt = "a\u2028b\u2029c\x85\U0001f642"
    given = {"prompt": prompt, "echo": True, "max_tokens": 1, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=given) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert text.startswith(prompt)


def test_the_model_is_found_by_its_name(server: Server) -> None:
    (entry,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert httpx.get(f"{server.url}/v1/models/served").json() == entry
    answer = httpx.get(f"{server.url}/v1/models/other")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no such model; this server has served"


def test_a_prompt_too_long_is_told_in_the_words_that_clients_look_for(server: Server) -> None:
    answer = server.ask(prompt="word " * 400)
    assert answer.status_code == 400  # LangChain's and LiteLLM's words, and the status
    said = answer.json()["error"]["message"]
    assert said.startswith("this model's maximum context length is 160 tokens; a prompt of")


def test_a_timeout_is_not_worth_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai client sends a request again after any 5xx without this header."""
    monkeypatch.setattr("sota_transformer.serve.completions.SECONDS", 0.01)
    engine: Any = SimpleNamespace(cancel=lambda keys: None)

    async def wait() -> None:
        going = _Active(Completion(), 1, [0], asyncio.Queue())
        async for _ in Completions(MODEL, Tokenizer(), "m", engine)._events(going):
            pass

    with pytest.raises(HTTPException) as caught:
        asyncio.run(wait())
    assert (caught.value.status_code, caught.value.headers) == (504, {"x-should-retry": "false"})
