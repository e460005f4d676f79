"""The real server in its own process, with real clients and bad ones."""

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.batch import Drawn
from sota_transformer.inference.generate import generate, make_sampler
from sota_transformer.serve.completions import Completions, _Active
from sota_transformer.serve.guard import UNFINISHED
from sota_transformer.serve.schema import Completion
from tests.inference_models import FULL, small_model, write_run
from tests.serving import Server

TOKENIZER = Tokenizer()
MODEL = small_model(dataclasses.replace(FULL, seq_len=160))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "served", MODEL)
    lines = [{"step": s, "loss": 10 - s / 10} for s in range(1, 2001)]
    lines += [{"step": 7, "loss": 1.5}, {"step": 1000, "val_loss": 3.25}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    server = Server(run)
    yield server
    assert server.process.poll() is None, "the server died"
    assert server.stop() in (143, -15)


def test_text_is_what_the_model_writes(server: Server) -> None:
    answer = server.ask(prompt="Once upon", max_tokens=12, temperature=0).json()
    ids = TOKENIZER.encode("Once upon")
    expected = list(generate(MODEL, ids, make_sampler(0.0), 12))
    assert answer["choices"][0]["text"] == TOKENIZER.decode(expected)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_the_openai_client_streams_and_asks(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["served"]
    asked: dict[str, Any] = {"model": "served", "prompt": "Once", "max_tokens": 10, "seed": 4}
    whole = client.completions.create(**asked, logprobs=3)
    echoed = client.completions.create(**asked, echo=True)
    usage = {"include_usage": True}
    events = list(client.completions.create(**asked, stream=True, stream_options=usage))
    text = "".join(choice.text for event in events for choice in event.choices)
    assert whole.choices[0].text == text and echoed.choices[0].text == "Once" + text
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    logprobs = whole.choices[0].logprobs
    assert all(len(best) == 3 for best in logprobs.top_logprobs)
    assert all(nats <= 0 for nats in logprobs.token_logprobs)


def test_several_prompts_seeds_and_stops(server: Server) -> None:
    body: dict[str, Any] = {"prompt": ["a", "b"], "n": 2, "max_tokens": 8, "seed": 1}
    choices = server.ask(**body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert server.ask(**body).json()["choices"] == choices
    text = choices[0]["text"]
    stopped = server.ask(prompt="a", max_tokens=8, seed=1, stop=[text[4:7]]).json()["choices"][0]
    assert stopped["text"] == text[: text.index(text[4:7])]
    assert stopped["finish_reason"] == "stop"
    ids = server.ask(prompt=TOKENIZER.encode("a"), max_tokens=8, seed=1).json()["choices"][0]
    assert ids["text"] == text


def test_a_full_context_ends_a_text_like_max_tokens(server: Server) -> None:
    answer = server.ask(prompt="word " * 140, max_tokens=100, temperature=0, stream=False).json()
    used = answer["usage"]
    assert used["total_tokens"] == 160 or answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert server.ask(prompt="a", max_tokens=3.0).status_code == 200


def test_special_tokens_in_a_prompt_are_text(server: Server) -> None:
    usage = server.ask(prompt="<|endoftext|>", max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == len(TOKENIZER.encode("<|endoftext|>")) == 7


BAD: list[dict[str, Any]] = [
    {"n": 10**9}, {"n": 0}, {"max_tokens": 10**9}, {"max_tokens": 0}, {"max_tokens": 1.5},
    {"temperature": -1}, {"temperature": 1e308}, {"temperature": "hot"}, {"top_p": 0},
    {"top_p": 1.1}, {"top_k": -1}, {"top_k": 10**9}, {"min_p": -0.1}, {"min_p": 2},
    {"repetition_penalty": 0}, {"repetition_penalty": 1e9}, {"logprobs": 21}, {"logprobs": -1},
    {"seed": -1}, {"seed": 1 << 64}, {"stop": ["x"] * 100_000}, {"stop": ["x"] * 17},
    {"stop": [""]}, {"stop": "x" * 201}, {"prompt": ["a"] * 33}, {"prompt": []},
    {"prompt": [50_257]}, {"prompt": [-1]}, {"prompt": {}}, {"prompt": "word " * 160},
    {"unknown": 1}, {"stream": "yes"}, {"echo": 1}, {"unknown": None}, {"best_of": 2},
    {"frequency_penalty": 0.5}, {"presence_penalty": -1}, {"logit_bias": {"5": 1}},
    {"suffix": "x"}, {"prompt": ["a"] * 9, "n": 4},
]  # fmt: skip


@pytest.mark.parametrize("field", BAD, ids=lambda field: json.dumps(field)[:40])
def test_every_number_has_a_limit(server: Server, field: dict[str, Any]) -> None:
    began = time.monotonic()
    answer = server.ask(**{"prompt": "a", "max_tokens": 4} | field)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert "/" not in answer.json()["error"]["message"].replace("and/or", "")
    assert time.monotonic() - began < 0.5  # stated as 100 ms; shared machines need more


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 10])
def test_extreme_temperatures_work(server: Server, temperature: float) -> None:
    answer = server.ask(prompt="a", max_tokens=3, temperature=temperature, top_p=1e-300, top_k=1)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"temperature": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'"' + b"x" * (1 << 20), 413),
        (b'{"prompt": "\\ud800", "max_tokens": 1}', 400),
    ],
)
def test_bad_bodies(server: Server, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status, answer.text


def test_errors_name_no_internal_types(server: Server) -> None:
    assert "[" not in (text := server.ask(prompt=3, stop="").text) and "constrained" not in text
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt":', headers=headers)
    assert answer.json()["error"]["message"] == "body: invalid JSON at character 10"
    told = server.ask(prompt="a", suffix="b").json()["error"]["message"]
    assert told.endswith("(only an empty one: the model does not fill in)")


def test_large_bodies_without_a_length_are_refused(server: Server) -> None:
    def blocks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    headers = {"content-type": "application/json"}
    try:
        answer = httpx.post(f"{server.url}/v1/completions", content=blocks(), headers=headers)
        assert answer.status_code == 413
    except httpx.TransportError:
        pass  # closed before all of it was sent, also fine
    assert server.busy() == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.com"}, 421),
        ({"host": "127.0.0.1.evil.com:80"}, 421),
        ({"origin": "http://evil.com"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-encoding": "gzip"}, 415),
    ],
)
def test_other_sites_are_refused(server: Server, headers: dict[str, str], status: int) -> None:
    content = json.dumps({"prompt": "a", "max_tokens": 1})
    given = {"content-type": "application/json"} | headers
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=given)
    assert answer.status_code == status
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_streams_behind_a_proxy_that_changes_the_host(server: Server) -> None:
    """As nginx does by default, which also holds a stream back unless told not to."""
    for said, status in (("same-origin", 200), ("same-site", 403), ("cross-site", 403)):
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "a", "max_tokens": 1, "stream": True},
            headers={"origin": "https://public.example", "sec-fetch-site": said},
        )
        assert answer.status_code == status
        assert answer.headers.get("x-accel-buffering") == ("no" if status == 200 else None)


def test_a_chat_client_is_told_that_there_is_no_chat(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 404
    assert "/v1/completions" in answer.json()["error"]["message"]


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "unsafe" not in policy
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
    assert not re.findall(r"fetch\(.?/|\[\"/", answer.text)  # works under a proxy's prefix, too
    assert "innerHTML" not in answer.text and " on" + "click=" not in answer.text


def test_the_curve_is_that_of_the_run(server: Server) -> None:
    curve = httpx.get(f"{server.url}/curve").json()
    assert curve["validation"] == [[1000, 3.25]]
    assert len(curve["train"]) <= 600 and curve["train"][-1][0] == 2000


def test_a_disconnected_client_frees_its_slot(server: Server) -> None:
    body = {"prompt": ["a", "b"], "n": 4, "max_tokens": 30, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    deadline = time.monotonic() + 2
    while server.busy() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.busy() == 0


def test_fifty_clients_at_once_get_200_or_503(server: Server) -> None:
    def one(number: int) -> tuple[int, str | None]:
        answer = server.ask(prompt=f"client {number}", max_tokens=20, temperature=0)
        return answer.status_code, answer.headers.get("retry-after")

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    codes = {code for code, _ in answers}
    assert codes <= {200, 503} and 200 in codes
    assert all(retry == "5" for code, retry in answers if code == 503)
    assert server.busy() == 0


def test_requests_share_a_batch_and_get_their_own_text(server: Server) -> None:
    prompts = ["One", "Two words", "And three words"]
    alone = [server.ask(prompt=p, max_tokens=15, seed=9).json()["choices"][0] for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda p: server.ask(prompt=p, max_tokens=15, seed=9).json(), prompts)
        assert [answer["choices"][0]["text"] for answer in found] == [c["text"] for c in alone]


@pytest.mark.parametrize("slow", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_slow_sockets_do_not_stop_a_good_request(server: Server, slow: int) -> None:
    idle = min(_seconds(server) for _ in range(3))
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(slow)]
    began = time.monotonic()
    open_ = set(range(slow))
    times = []
    while open_ and time.monotonic() - began < 14:
        for number in list(open_):
            try:
                sockets[number].send(b"POST /v1/completions HTTP/1.1\r\nx"[:1])
                sockets[number].setblocking(False)
                if sockets[number].recv(1) == b"":
                    open_.discard(number)
            except BlockingIOError:
                pass
            except OSError:
                open_.discard(number)
        times.append(_seconds(server))
        time.sleep(0.5)
    assert not open_, f"{len(open_)} sockets are still open"
    assert time.monotonic() - began < 9
    assert sorted(times)[len(times) // 2] <= 3 * idle + 0.1
    for each in sockets:
        each.close()


def test_clients_that_come_together_are_all_answered(server: Server) -> None:
    """More than may be incomplete at a time, and none has sent its request yet."""
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(UNFINISHED + 9)]
    for each in sockets:
        each.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert [each.recv(12) for each in sockets] == [b"HTTP/1.1 200"] * len(sockets)
    for each in sockets:
        each.close()


def _seconds(server: Server) -> float:
    began = time.monotonic()
    assert server.ask(prompt="a", max_tokens=4, temperature=0).status_code == 200
    return time.monotonic() - began


def test_a_disconnect_is_noticed_behind_queued_events() -> None:
    """asyncio warns about each piece written to a client that has disconnected."""
    wanted = Completion(prompt="a", stream=True)

    async def stream() -> list[str]:
        going = _Active(wanted, 1, [0], asyncio.Queue())
        for number in range(20):
            reason = "length" if number == 19 else None
            drawn = Drawn(5, -1.0, [], "a", reason, number, False)
            going.queue.put_nowait((0, drawn))
        engine: Any = SimpleNamespace(cancel=lambda keys: None)
        pieces, told = Completions(MODEL, TOKENIZER, "m", engine)._stream(going), list[str]()
        asyncio.get_running_loop().call_soon(told.append, "left")
        async for piece in pieces:
            told.append(piece)
        return told

    assert asyncio.run(stream()).index("left") == 1


def test_long_headers_are_refused(server: Server) -> None:
    answer = httpx.get(f"{server.url}/healthz", headers={"x": "y" * 20_000})
    assert answer.status_code == 431


def test_fuzzed_requests_find_no_error(server: Server, tmp_path: Path) -> None:
    """All operations and checks of schemathesis, including coverage of all limits."""
    pytest.importorskip("schemathesis")
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json",
        "--checks", "all", "--max-examples", "25", "--seed", "1", "--no-color",
        "--request-timeout", "70", "--max-response-time", "65",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
def test_ten_thousand_fuzzed_requests_leave_no_trace(tmp_path: Path) -> None:
    """Three in ten are valid. They are only drawn; hypothesis' shrinking would take hours here.

    A context of a few tokens keeps answers cheap and makes most valid prompts too long; the check
    that valid requests are accepted is therefore left out.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    model = small_model(dataclasses.replace(FULL, seq_len=8))
    server = Server(write_run(tmp_path / "fuzzed", model))
    process, codes, sizes = psutil.Process(server.process.pid), Counter[int](), []
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")["/v1/completions"][
        "POST"
    ]
    try:
        for mode, count in ((schemathesis.GenerationMode.POSITIVE, 3000),
                            (schemathesis.GenerationMode.NEGATIVE, 7000)):  # fmt: skip

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=count, phases=[Phase.generate], deadline=None, database=None,
                suppress_health_check=list(HealthCheck), derandomize=True,
            )  # fmt: skip
            def ask(case: Any) -> None:
                answer = case.call(timeout=70)
                case.validate_response(answer, excluded_checks=[positive_data_acceptance])
                codes[answer.status_code] += 1
                if sum(codes.values()) % 500 == 1:
                    sizes.append(process.memory_info().rss)
                    print(f"{dict(codes)} {sizes[-1] / 1e6:.0f} MB", flush=True)

            ask()
        assert server.busy() == 0
    finally:
        server.stop()
    assert codes.total() >= 10_000 and not [c for c in codes if c >= 500 and c not in (503, 504)]
    assert max(sizes) - sizes[1] < 30e6, sizes  # the first one is before warm-up
