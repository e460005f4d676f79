"""A server of a run in its own process, and how to query it."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

START = (  # with shorter timeouts, which tests wait for
    "import sys; from pathlib import Path; from sota_transformer.options import Serve; "
    "from sota_transformer.serve import guard; guard.RECEIVE_SECONDS = 4; "
    "from sota_transformer.commands.serve import run_serve; "
    "run_serve(Serve(run=Path(sys.argv[1]), port=0, api_key=sys.argv[2], rows=2, device='cpu'))"
)


class Server:
    """A running `sota serve` and how to query it."""

    def __init__(self, run: Path, key: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(run), key], stdout=subprocess.PIPE, text=True
        )
        self.key = key
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = re.findall(r"http://\S+", line)[0]
        self.port = int(self.url.rpartition(":")[2])

    def ask(self, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        url = f"{self.url}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60)

    def busy(self) -> int:
        return httpx.get(f"{self.url}/healthz").json()["busy"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)
