"""Random events around a running `sota serve`, with `sota doctor` among them.

A scene has some runs and exports, and servers for them. Runs are trained further, moved, deleted,
overwritten and damaged while being served; their servers keep answering from what they loaded.
Servers end by Ctrl-C, SIGTERM and kill -9, during requests and with hanging clients, and leave
nothing behind.
"""

import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from sota_transformer.presets import flag

from .commands import Zygote, corpus, leftovers, prepare_arguments, sha256
from .journey import DONE, ENDS, REFUSED
from .journeys import BASE, CPU
from .launches import Result

LONG = {"model.seq_len": 512, "train.batch_rows": 1, "train.steps": 2}  # a text takes a second
LEAVE_SECONDS = 20.0  # three for open requests, ten for hanging ones, the rest for a busy machine
PROMPTS = ["kara misil", "Once upon a time", "terdo"]
SEED = 7


@dataclass
class Server:
    """A running `sota serve` and the weights it has loaded, if known."""

    pid: int
    port: int
    weights: str
    output: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, prompt: str, tokens: int = 6, timeout: float = 60, **more: object
    ) -> httpx.Response:
        """A completion that other weights would hardly produce."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 1, "seed": SEED} | more
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout)

    def busy(self) -> int:
        return httpx.get(f"{self.url}/healthz", timeout=60).json()["busy"]


class Scene:
    """One folder, its contents, the commands given there and the running servers."""

    def __init__(self, root: Path, zygote: Zygote, source: random.Random, result: Result) -> None:
        self.place, self.temporary = root / "work", root / "tmp"
        self.zygote, self.source, self.result = zygote, source, result
        self.models, self.broken = set[Path](), set[Path]()
        self.servers = list[Server]()
        self.clients = list[socket.socket]()  # hanging ones
        self.known = dict[tuple[str, str, int], str]()  # weights, prompt, tokens -> text
        self.told = list[str]()
        self.number, self._wrong = 0, len(result.wrong)

    def wrong(self) -> list[str]:
        return self.result.wrong[self._wrong :]

    def say(self, what: str) -> None:
        """Record a broken promise and what led to it."""
        self.result.wrong.append(f"{what}\n    after: " + "\n    ".join(self.told))

    def new(self) -> Path:
        """A free path, sometimes an unusual one."""
        self.number += 1
        name = self.source.choice(["m", "a b", "neu\nzeile", "ü", "-x"])
        return self.place / f"{name}{self.number}"

    def weights(self, model: Path, step: int | None = None) -> str:
        """SHA-256 of what a server of this folder loads."""
        steps = sorted(model.glob("checkpoints/step-????????"))
        if step is not None:
            return sha256(model / f"checkpoints/step-{step:08d}/model.safetensors")
        return sha256((steps[-1] if steps else model) / "model.safetensors")

    def give(self, words: list[str], expected: frozenset[int]) -> str:
        """Give a command and wait for it; return its output."""
        self.told.append(f"{words}   # {sorted(expected)}")
        done = self.zygote.end(self.zygote.start(words, where=self.place))
        self.result.done[words[0]] += 1
        self.judge(done.code, done.output, expected)
        return done.output

    def judge(self, code: int | None, said: str, expected: frozenset[int]) -> None:
        """Check the exit code, that a failure prints one line, and that nothing is left."""
        self.told.append(f"  {code}: {said[-150:].strip()}")
        if "Traceback" in said or code not in expected:
            self.say(f"exit {code}, not {sorted(expected)}: {said[-1500:]}")
        elif code in REFUSED | {75} and len(re.findall("^sota: (?!step .* rej)", said, re.M)) != 1:
            self.say(f"prints too much or too little: {said[-900:]}")
        if left := [*self.temporary.rglob("*"), *leftovers(self.place)]:
            self.say(f"exit {code} and left {left[:5]}")

    # ---- servers

    def serve(self, model: Path, port: int, expected: frozenset[int], *more: str) -> Server | None:
        """Start a server; new weights are compared with `sota generate`."""
        words = ["serve", str(model), f"--port={port}", *CPU, *more]
        self.told.append(f"{words}   # {sorted(expected)}")
        self.result.done["serve"] += 1
        pid = self.zygote.start(words, where=self.place)
        output, deadline = self.zygote.output, time.monotonic() + 120
        while not (found := re.search(r" on http://127.0.0.1:(\d+)$", heard_from(output), re.M)):
            done = self.zygote.wait(pid, 0.05)
            if done is not None:
                self.judge(done.code, done.output, expected)
                return None
            assert time.monotonic() < deadline, "the server prints nothing"
        if 0 not in expected:
            self.say(f"serves {model.name}, which is impossible")
        step = int(more[1]) if more[:1] == ("--step",) else None
        weights = "" if model in self.broken else self.weights(model, step)
        server = Server(pid, int(found[1]), weights, output)
        self.servers.append(server)
        if weights and (weights, PROMPTS[0], 6) not in self.known:
            words = ["generate", str(model), "--prompt", PROMPTS[0], "--max-tokens=6", *CPU]
            said = self.give(
                [*words, f"--seed={SEED}", "--temperature=1", "--top-p=1", "--json", *more], DONE
            )
            if "{" in said:
                text = json.loads(said[said.index("{") :])["text"]
                self.known[weights, PROMPTS[0], 6] = text
        self.check(server)
        return server

    def check(self, server: Server, prompt: str = PROMPTS[0]) -> None:
        """It answers from what it has loaded."""
        self.result.done["answers"] += 1
        try:
            answer = server.ask(prompt)
        except httpx.TransportError as error:
            self.say(f"no answer: {error!r}; it printed {heard_from(server.output)[-900:]}")
            return
        if answer.status_code != 200:
            self.say(f"answer {answer.status_code}: {answer.text[:300]}")
        elif server.weights:
            self.heard(server, prompt, 6, answer.json()["choices"][0]["text"])

    def heard(self, server: Server, prompt: str, tokens: int, text: str) -> None:
        """The same weights give the same text each time."""
        first = self.known.setdefault((server.weights, prompt, tokens), text)
        if first != text:
            self.say(f"{prompt!r}: {text!r}, not {first!r}")

    def end(self, server: Server, sign: signal.Signals, again: bool) -> None:
        """Send a signal and check the end; `again`: another server takes the port at once."""
        self.told.append(f"{sign.name} to the server on {server.port}")
        self.result.done[sign.name] += 1
        self.servers.remove(server)
        os.kill(server.pid, sign)
        done = self.zygote.wait(server.pid, LEAVE_SECONDS)
        if done is None:
            self.say(f"still there {LEAVE_SECONDS:.0f} s after {sign.name}")
            os.killpg(server.pid, signal.SIGKILL)
            self.zygote.wait(server.pid)
            return
        said = heard_from(server.output)
        self.judge(done.code, said, frozenset({ENDS[sign]}))
        if len(re.sub(r".* on http://\S+\s", "", said, flags=re.DOTALL).splitlines()) > 1:
            self.say(f"says too much: {said[-900:]}")
        with suppress(ProcessLookupError):
            os.killpg(server.pid, 0)
            self.say("left a process")
        if again and (models := sorted(self.models - self.broken)):
            self.serve(models[0], server.port, DONE)


def heard_from(path: Path) -> str:
    """What a command has printed so far."""
    return path.read_text(errors="replace") if path.exists() else ""


# ---- events in a scene


def start(s: Scene) -> None:
    """Start a server: for a good model, for a bad one, or on a port in use."""
    bad = [s.place / "data", s.place / "texts", s.place / "nowhere", s.place, *s.broken]
    way = s.source.random()
    if way < 0.25:
        model = s.source.choice(bad)
        s.serve(model, 0, REFUSED | DONE if model in s.broken else REFUSED)
    elif models := sorted(s.models - s.broken):
        model, more = s.source.choice(models), list[str]()
        taken = s.source.choice(s.servers).port if s.servers and way < 0.45 else 0
        steps = sorted(int(p.name[5:]) for p in model.glob("checkpoints/step-????????"))
        if steps and s.source.random() < 0.3:
            more = ["--step", str(s.source.choice(steps))]
        if len(s.servers) < 3 or taken:
            s.serve(model, taken, frozenset({75}) if taken else DONE, *more)


def train_on(s: Scene) -> None:
    """Train two more steps in a run that may be served."""
    if runs := [m for m in sorted(s.models - s.broken) if (m / "run.json").exists()]:
        run = s.source.choice(runs)
        told = json.loads((run / "config.json").read_text())
        steps = told["train"]["steps"] + 2
        words = ["train", "tiny", f"--data={s.place / 'data'}", f"--out={run}"]
        own = {f: told[f.split(".")[0]][f.split(".")[1]] for f in BASE if f != "train.steps"}
        own["train.save_every_steps"] = 1
        words += [flag(*each) for each in own.items()] + ["--override", f"train.steps={steps}"]
        s.give(words, DONE)


def use(s: Scene) -> None:
    """Run another command on what may be served."""
    if not (models := sorted(s.models - s.broken)):
        return
    model, way = s.source.choice(models), s.source.choice(["report", "evaluate", "export"])
    if way == "evaluate":
        s.give([way, str(model), "--text", str(s.place / "texts/000.jsonl"), *CPU], DONE)
    elif way == "export":
        s.give([way, str(model), f"--out={(out := s.new())}", "--dtype=float32"], DONE)
        s.models.add(out)
    elif (model / "run.json").exists():
        s.give([way, str(model)], DONE)


def harm(s: Scene) -> None:
    """Move, delete, overwrite or damage in place what may be served."""
    whole = sorted(s.models - s.broken)
    if len(whole) < 2:
        return
    model, way = s.source.choice(whole), s.source.choice(["mv", "rm", "over", "flip", "cut"])
    s.told.append(f"{way} {model}")
    if way == "mv":
        s.models.add(model.rename(s.new()))
    elif way in ("rm", "over"):
        shutil.rmtree(model)
        if way == "over":
            shutil.copytree(s.source.choice([w for w in whole if w != model]), model)
    if way in ("mv", "rm"):
        s.models.remove(model)
    elif way in ("flip", "cut"):
        s.broken.add(model)
        for path in model.rglob("*.safetensors"):
            data = path.read_bytes()
            with path.open("r+b") as file:  # the same file that was loaded
                file.write(bytes(255 - byte for byte in data[: 1 << 18]))
                file.truncate(len(data) if way == "flip" else len(data) // 2)


def crowd(s: Scene) -> None:
    """More simultaneous requests than there is room for, some from clients that disconnect."""
    if not s.servers:
        return
    server = s.source.choice(s.servers)
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda n: server.ask(PROMPTS[n % 3]), range(30)))
    for number, answer in enumerate(answers):
        if answer.status_code == 200 and server.weights:
            s.heard(server, PROMPTS[number % 3], 6, answer.json()["choices"][0]["text"])
        elif answer.status_code not in (200, 503):
            s.say(f"answer {answer.status_code} to one of many requests: {answer.text[:300]}")
    for _ in range(4):
        with suppress(httpx.TimeoutException):
            server.ask("a", 400, n=4, stream=True, timeout=0.05)
    deadline = time.monotonic() + 20
    while (busy := server.busy()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if busy:
        s.say(f"{busy} slots are held by disconnected clients")


def hang(s: Scene) -> None:
    """A client that sends half a request, or does not read its answer."""
    if s.servers:
        client = socket.create_connection(("127.0.0.1", s.source.choice(s.servers).port))
        body = json.dumps({"prompt": "a", "max_tokens": 400, "stream": True, "logprobs": 20})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        whole = f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        client.send(whole[: s.source.choice([0, 9, len(whole) - 5, len(whole)])])
        s.clients.append(client)


def stop(s: Scene) -> None:
    """Stop a server, mostly during requests: each one started is answered."""
    if not s.servers:
        return
    server, sign = s.source.choice(s.servers), s.source.choice(list(ENDS))
    count = s.source.choice([0, 1, 5, 12])
    with concurrent.futures.ThreadPoolExecutor(count or 1) as pool:
        begun = [pool.submit(server.ask, "kara", 400, stream=bool(n % 2)) for n in range(count)]
        inside = False
        while not (inside or any(f.done() for f in begun)):
            inside = server.busy() >= count
        s.end(server, sign, again=s.source.random() < 0.5)
    for number, future in enumerate(begun):
        try:
            answer = future.result()
        except httpx.TransportError as error:
            if sign != signal.SIGKILL and inside:
                s.say(f"a request was cut off at {sign.name}: {error!r}")
            continue
        s.result.done[f"answered {answer.status_code} at the end"] += 1
        if (
            number % 2
            and answer.status_code == 200
            and not answer.text.endswith("data: [DONE]\n\n")
        ):
            s.say(f"a stream lacks its last event: {answer.text[-300:]}")
        if answer.status_code == 503 and "shutting down" not in answer.text:
            s.say(f"503 at the end, and why: {answer.text[:300]}")
        elif answer.status_code == 200 and not number % 2 and server.weights:
            s.heard(server, "kara", 400, answer.json()["choices"][0]["text"][:100])


def doctor(s: Scene) -> None:
    """Run the doctor where runs could or could not live; interrupt it somewhere."""
    folder = s.source.choice([s.place, s.place, s.place / "nowhere", s.place / "texts/000.jsonl"])
    s.told.append(f"{(words := ['doctor', f'--folder={folder}', *CPU])}")
    s.result.done["doctor"] += 1
    pid, sign, done = s.zygote.start(words, where=s.place), 0, None
    output = s.zygote.output
    if folder == s.place and s.source.random() < 0.8:
        while done is None and not list(s.place.glob(".sota-doctor-*")):
            done = s.zygote.wait(pid, 0.002)
        if done is None:
            sign = s.source.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
            os.kill(pid, sign)
    done = done or s.zygote.end(pid)
    code = 128 + sign if sign else 0 if folder == s.place else 70
    s.judge(done.code, heard_from(output), frozenset({code}))
    if left := list(s.place.glob(".sota-doctor-*")):
        s.say(f"doctor left {left}")


EVENTS: list[tuple[Callable[[Scene], None], int]] = [
    (start, 6), (train_on, 3), (use, 3), (harm, 3), (crowd, 1), (hang, 2), (stop, 5), (doctor, 1),
]  # fmt: skip


def scene(s: Scene) -> None:
    """Three models, then 10 to 20 events; after each, every server is asked."""
    corpus(s.place / "texts", 2, 60)
    s.give(prepare_arguments(s.place / "texts", s.place / "data", 1), DONE)
    for more in ({}, LONG):
        run = s.new()
        words = ["train", "tiny", f"--data={s.place / 'data'}", f"--out={run}"]
        s.give([*words, *(flag(*each) for each in (BASE | more).items())], DONE)
        s.models.add(run)
    events, weights = zip(*EVENTS, strict=True)
    s.serve(min(s.models), 0, DONE)
    for _ in range(s.source.randint(10, 20)):
        s.source.choices(events, weights)[0](s)
        for server in s.servers:
            s.check(server, s.source.choice(PROMPTS))
        if s.wrong():
            break
    for server in list(s.servers):
        s.end(server, s.source.choice(list(ENDS)), again=False)
    for client in s.clients:
        client.close()


def servings(root: Path, count: int, seed: int = 0) -> Result:
    """`count` scenes."""
    result, temporary = Result(), root / "tmp"
    temporary.mkdir()
    preload = ["sota_transformer.serve.server", "transformers.models.llama.modeling_llama"]
    places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(root / "compiled")}
    places["CXX"] = "false"  # keeps `sota doctor` from compiling, for a minute
    with Zygote(root, *preload, **places) as zygote:
        for number in range(count):
            (root / "work").mkdir()
            s = Scene(root, zygote, random.Random(f"{seed} {number} scene"), result)
            try:
                scene(s)
            finally:
                for server in s.servers:
                    os.killpg(server.pid, signal.SIGKILL)
            result.scenes += 1
            if s.wrong():
                print(f"WRONG: seed {seed} scene {number}: {s.wrong()[0]}", flush=True)
            shutil.rmtree(root / "work")
    return result
