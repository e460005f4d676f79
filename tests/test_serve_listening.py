"""Where the server listens, who may use it, and how it stops."""

import concurrent.futures
import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import uvicorn

from sota_transformer.commands.serve import run_serve
from sota_transformer.errors import SotaError
from sota_transformer.options import Serve
from sota_transformer.serve.server import _Server
from tests.inference_models import FULL, small_model, write_run
from tests.serving import Server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "served", small_model(FULL))


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    server = Server(run)
    yield server
    assert server.stop() in (143, -15)


def test_only_loopback_listens(server: Server) -> None:
    found = psutil.Process(server.process.pid).net_connections("inet")
    listening = [c.laddr for c in found if c.status == psutil.CONN_LISTEN]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", server.port)]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_beyond_loopback_needs_a_key(run: Path, host: str) -> None:
    with pytest.raises(SotaError, match="api-key"):
        run_serve(Serve(run=run, host=host, port=0))


def test_a_host_without_a_name_is_refused(run: Path) -> None:
    """A socket takes it for every address, and the line to open in a browser would lack it."""
    with pytest.raises(SotaError, match="--host must name an address"):
        run_serve(Serve(run=run, host="", port=0, api_key="secret"))


def test_a_taken_port_is_an_error(server: Server, run: Path) -> None:
    with pytest.raises(SotaError, match=r"cannot listen .* --host or --port") as caught:
        run_serve(Serve(run=run, port=server.port))
    assert caught.value.code == 75


def test_the_key_is_needed_and_a_signal_lets_open_requests_finish(
    tmp_path: Path,
) -> None:
    long = small_model(dataclasses.replace(FULL, seq_len=8192))
    server = Server(write_run(tmp_path / "long", long), "secret")
    url, body = f"{server.url}/v1/completions", {"prompt": "a", "max_tokens": 1}
    for header in ("", "Bearer wrong", "Bearer", "secret2", "bearer x", "Bearer secret"):
        given = {"authorization": header} if header else {}
        expected = 200 if header == "Bearer secret" else 401
        assert httpx.post(url, json=body, headers=given).status_code == expected
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    body |= {"max_tokens": 8000, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        whole, stream = (pool.submit(server.ask, **body, stream=each) for each in (False, True))
        while server.busy() < 2:
            time.sleep(0.05)
        assert server.stop() in (143, -15)
    assert (whole.result().status_code, "is shutting down" in whole.result().text) == (503, True)
    assert "is shutting down" in stream.result().text
    assert stream.result().text.endswith("data: [DONE]\n\n")


def test_a_ctrl_c_that_the_parent_ignores_stays_ignored(monkeypatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    with _Server(uvicorn.Config("unused"), SimpleNamespace()).capture_signals():  # type: ignore
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
