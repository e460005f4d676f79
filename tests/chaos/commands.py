"""The real commands, a corpus for them, and the results of undisturbed runs."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

STEPS, SAVE_EVERY = 12, 3
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
}  # fmt: skip
SMALL = "--model.d-model 32 --model.d-ff 64 --model.seq-len 16 --train.batch-rows 4"
SMALL += " --train.eval-tokens 64 --train.eval-every 5 --train.log-every 1"
SMALL += " --train.sample-every 0 --device cpu --threads 1 --run.dtype float32"
TIMEOUT = 120.0


@dataclass
class Finished:
    """How a command ended; `code` as in a shell, None if it timed out and was killed."""

    code: int | None
    output: str

    @property
    def crashed(self) -> bool:
        """Whether the user saw a traceback instead of one line."""
        return "Traceback" in self.output


def train_arguments(data: Path, out: Path, save_every: int = SAVE_EVERY) -> list[str]:
    """A run of about two seconds that saves often."""
    text = f"train tiny --data {data} --out {out} --steps {STEPS} {SMALL}"
    return f"{text} --train.save-every-steps {save_every}".split()


def prepare_arguments(corpus: Path, out: Path, workers: int = 2) -> list[str]:
    """Prepare text, part of it for validation."""
    return f"prepare {corpus} --out {out} --val-fraction 0.1 --workers {workers}".split()


class Zygote:
    """Starts commands without the seconds they spend on imports; see zygote.py."""

    def __init__(self, folder: Path, *modules: str, **environment: str) -> None:
        self.folder = folder
        self._modules, self._environment = modules, ENVIRONMENT | environment
        self._number = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.chaos.zygote", *self._modules]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=self._environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, arguments: list[str], traced: bool = False, where: Path | None = None,
        given: str = os.devnull,
    ) -> int:  # fmt: skip
        """The process id of a new command. `traced` lets it wait for strace, `where` is its working
        directory, with permissions enforced as for a normal user, `given` is its standard input.
        """
        self._number += 1
        self.output = self.folder / f"output-{self._number}"
        folder, output = str(where or self.folder), str(self.output)
        order = {"folder": folder, "output": output, "traced": traced, "bound": where is not None}
        return self._ask(arguments=arguments, given=given, **order)

    def wait(self, pid: int, seconds: float = TIMEOUT) -> Finished | None:
        """How the command ended, or None if it is still running then."""
        code = self._ask(wait=pid, seconds=seconds)
        return None if code is None else Finished(code, self.output.read_text(errors="replace"))

    def run(self, arguments: list[str]) -> Finished:
        """Start and wait; a hang is reported without an exit code."""
        return self.end(self.start(arguments))

    def end(self, pid: int) -> Finished:
        """Wait; kill the command if it hangs."""
        finished = self.wait(pid)
        if finished is None:
            os.killpg(pid, signal.SIGKILL)
            self.wait(pid)
            return Finished(None, self.output.read_text(errors="replace"))
        return finished


def corpus(folder: Path, files: int = 24, paragraphs: int = 60) -> Path:
    """Text in several units of work, so that a kill finds some of them done."""
    source = random.Random(5)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ter", "un") for b in ("ra", "sil", "do", "e")]
    folder.mkdir(parents=True)
    for number in range(files):
        texts = (" ".join(source.choices(words, k=60)) for _ in range(paragraphs))
        lines = (json.dumps({"text": f"{number} {text}"}) for text in texts)
        (folder / f"{number:03d}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def sota(
    arguments: list[str], folder: Path, seconds: float = TIMEOUT, before: Sequence[str] = (),
    *, given: Path = Path(os.devnull), module: str = "sota_transformer",
) -> Finished:  # fmt: skip
    """Run the command in its own process, as a user does; `before` may hold strace, `given` is
    standard input.
    """
    command = [*before, sys.executable, "-m", module, *arguments]
    with given.open("rb") as file:
        try:
            done = subprocess.run(
                command, cwd=folder, env=ENVIRONMENT, timeout=seconds, stdin=file,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return Finished(None, (error.stdout or b"").decode(errors="replace"))
    return Finished(done.returncode, done.stdout.decode(errors="replace"))


@dataclass
class Bench:
    """A corpus, prepared data and a finished run, all undisturbed."""

    root: Path
    corpus: Path
    data: Path
    run: Path

    @property
    def model(self) -> str:
        """SHA-256 of the model that every other run has to end with."""
        return model_of(self.run)


def make_bench(root: Path) -> Bench:
    """Prepare and train once through the commands, each in its own process."""
    root = root.resolve()
    bench = Bench(root, corpus(root / "corpus"), root / "data", root / "reference")
    for arguments in (
        prepare_arguments(bench.corpus, bench.data, workers=1),
        [*train_arguments(bench.data, bench.run), "--train.keep-checkpoints", "9"],
    ):
        done = sota(arguments, root)
        assert done.code == 0, done.output
    return bench


def fresh(bench: Bench, out: Path) -> Path:
    """A run folder holding only the doctor's verdict on this machine, which takes seconds."""
    out.mkdir(parents=True)
    verdict = bench.run / "doctor.json"
    if verdict.exists():
        shutil.copy(verdict, out)
    return out


def model_of(run: Path) -> str:
    """SHA-256 of the last step's model."""
    return sha256(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> digest of every file below a folder, without hidden caches."""
    files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def leftovers(folder: Path) -> list[str]:
    """Files that an interrupted command may leave but a finished one must not."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in names if "/.tmp-" in f"/{name}" or "/.trash-" in f"/{name}"]


def run_at(bench: Bench, out: Path, step: int) -> Path:
    """A copy of the reference run as of `step`, to resume from."""
    shutil.copytree(bench.run, out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return out
