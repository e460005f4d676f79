"""All data preparation benchmarks in one command:

    python benchmarks/prepare.py --folder /tmp/bench --megabytes 104 --runs 5
    python benchmarks/prepare.py --folder /tmp/bench --megabytes 1100 --runs 3 --no-origin

It builds mixed text from files on this machine (see `corpus.py`: about 300 MB of Python and books,
then other programs and documents, each document once; only when all of it is used up do documents
repeat, with their lines shuffled) and writes it as JSON lines, zstandard and parquet. Then it runs
this project and its peers in turn, each as a whole process, and prints medians, rates, ratios and
the peak memory of the process tree (proportional set size, Linux only). The peers, each with as
many processes as there are cores:

    tiktoken   a pool of processes, tiktoken, uint16 ids appended to a file (modded-nanogpt's way)
    origin     a pool of processes, GPT2TokenizerFast of transformers, document by document
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from corpus import sources

REPEATS = 0.03  # share of documents that appear twice


def build(folder: Path, megabytes: int, books: Path | None) -> Path:
    """Write `mix-N.jsonl`, also as .zst and .parquet; shuffle lines once the text runs out."""
    path = folder / f"mix-{megabytes}.jsonl"
    if path.exists():
        return path
    rng, size, turn = random.Random(1), 0, 0
    with path.with_suffix(".tmp").open("w") as file:
        while size < megabytes * 10**6:
            for text in sources(books):
                if turn:
                    lines = text.split("\n")
                    rng.shuffle(lines)
                    text = "\n".join(lines)
                copies = 2 if rng.random() < REPEATS else 1
                file.write((json.dumps({"text": text}) + "\n") * copies)
                size += copies * len(text.encode())
                if size >= megabytes * 10**6:
                    break
            print(f"{size / 1e6:,.0f} MB after {turn + 1} passes over this machine's text")
            turn += 1
    path.with_suffix(".tmp").rename(path)
    subprocess.run(["zstd", "-q", "-3", "-k", str(path)], check=False)
    if not path.with_suffix(".jsonl.zst").exists():
        import zstandard

        with path.open("rb") as raw, path.with_suffix(".jsonl.zst").open("wb") as packed:
            zstandard.ZstdCompressor(level=3).copy_stream(raw, packed)
    write_parquet(path)
    return path


def write_parquet(path: Path) -> None:
    """Write the same records as parquet: zstandard, 10,000 rows per group."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("text", pa.string())])
    target = path.with_suffix(".parquet")
    with parquet.ParquetWriter(target, schema, compression="zstd") as writer, path.open() as file:
        while rows := [
            json.loads(line)["text"] for _, line in zip(range(10_000), file, strict=False)
        ]:
            writer.write_table(pa.table({"text": rows}, schema), row_group_size=10_000)


def peer_texts(path: Path) -> Iterator[str]:
    """The input of both peers: one JSON line after another."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


_state: dict[str, Any] = {}


def begin_tiktoken() -> None:
    """Set up a pool worker with tiktoken, from our table, so that no network is needed."""
    import tiktoken

    from sota_transformer.data.tokenizer import _PATTERN, _token_table

    ranks = {token: rank for rank, token in enumerate(_token_table())}
    core = tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})
    _state["encode"] = core.encode_ordinary


def begin_origin(folder: str) -> None:
    """Set up a pool worker with the fast GPT-2 tokenizer of transformers."""
    from transformers import GPT2TokenizerFast

    made = GPT2TokenizerFast(vocab=f"{folder}/vocab.json", merges=f"{folder}/merges.txt")
    _state["encode"] = lambda text: made(text)["input_ids"]


def encode_one(text: str) -> np.ndarray:
    """Ids of a document, with end-of-text."""
    return np.array([*_state["encode"](text), 50256], np.uint16)


def peer(kind: str, path: Path, out: Path) -> None:
    """Prepare `path` as a peer does."""
    begin: Callable[..., None] = begin_tiktoken
    arguments: tuple[str, ...] = ()
    if kind == "origin":
        begin, arguments = begin_origin, (str(vocabulary(out.parent)),)
    with (
        get_context("fork").Pool(os.cpu_count(), begin, arguments) as pool,
        out.open("wb") as file,
    ):
        for ids in pool.imap(encode_one, peer_texts(path), chunksize=16):
            file.write(ids.tobytes())


def vocabulary(folder: Path) -> Path:
    """GPT-2's vocab.json and merges.txt, written from our table."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from sota_transformer.data.tokenizer import _TABLE, _token_table

    target = folder / "gpt2-files"
    if not (target / "merges.txt").exists():
        target.mkdir(exist_ok=True)
        letters = bytes_to_unicode()
        spelled = ["".join(letters[byte] for byte in token) for token in _token_table()]
        with np.load(_TABLE) as table:
            pairs = zip(table["left"].tolist(), table["right"].tolist(), strict=True)
            merges = [f"{spelled[a]} {spelled[b]}" for a, b in pairs]
        ids = {token: rank for rank, token in enumerate(spelled)} | {"<|endoftext|>": 50256}
        (target / "vocab.json").write_text(json.dumps(ids))
        (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return target


class Watch(threading.Thread):
    """Samples the peak memory (proportional set size) and CPU time of a process tree."""

    def __init__(self, pid: int, memory: bool) -> None:
        super().__init__(daemon=True)
        self.pid, self.memory, self.peak, self.stop = pid, memory, 0, False
        self._seconds: dict[int, float] = {}

    def run(self) -> None:
        while not self.stop:
            pids = tree(self.pid)
            self._seconds |= {pid: cpu(pid) for pid in pids}
            if self.memory:
                self.peak = max(self.peak, sum(map(pss, pids)))
            time.sleep(0.02)

    @property
    def seconds(self) -> float:
        """CPU seconds of all processes, up to the last sample."""
        return sum(self._seconds.values())


def cpu(pid: int) -> float:
    """CPU seconds used by one process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            for child in (task / "children").read_text().split():
                found += tree(int(child))
        except OSError:
            continue
    return found


def pss(pid: int) -> int:
    """Bytes of one process, with shared pages divided among the processes sharing them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def run(command: list[str], *, memory: bool) -> tuple[float, float, float]:
    """Run a command; (wall seconds, CPU seconds, peak MB)."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watch = Watch(process.pid, memory)
    watch.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watch.stop = True
    if process.returncode:
        sys.exit(f"{command} failed:\n{output.decode()}")
    return seconds, watch.seconds, watch.peak / 1e6


def contenders(path: Path, scratch: Path, origin: bool) -> dict[str, list[str]]:
    """The commands to time."""
    ours = [sys.executable, "-m", "sota_transformer", "prepare"]
    tail = ["--out", str(scratch / "out"), "--val-fraction", "0.01"]
    itself = [sys.executable, __file__, "--peer-out", str(scratch / "peer.bin"), "--peer"]
    found = {
        "ours, jsonl": [*ours, str(path), *tail],
        "ours, zst": [*ours, str(path.with_suffix(".jsonl.zst")), *tail],
        "ours, parquet": [*ours, str(path.with_suffix(".parquet")), *tail],
        "ours, near-dedup": [*ours, str(path), *tail, "--near-dedup", "0.8"],
        "tiktoken pool": [*itself, "tiktoken", "--peer-input", str(path)],
    }
    if origin:
        found["transformers pool"] = [*itself, "origin", "--peer-input", str(path)]
    return found


def measure(path: Path, runs: int, origin: bool, only: str) -> None:
    """Run all contenders in turn and print a table."""
    size = sum(len(text.encode()) for text in peer_texts(path)) / 1e6
    count = sum(1 for _ in path.open())
    print(f"{path.name}: {size:,.1f} MB of text, {count:,} documents, {os.cpu_count()} cores")
    times: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        scratch = Path(name)
        commands = contenders(path, scratch, origin)
        commands = {key: value for key, value in commands.items() if only in key}
        for turn in range(runs + 1):  # the first run only measures memory
            for key, command in commands.items():
                if turn > 1 and key == "transformers pool":
                    continue
                shutil.rmtree(scratch / "out", ignore_errors=True)
                times.setdefault(key, []).append(run(command, memory=turn == 0))
    base = statistics.median(row[0] for row in next(iter(times.values()))[1:])
    print(
        f"{'':<18} {'wall s':>8} {'min-max':>13} {'docs/s':>8} {'MB/s':>7} {'CPU s':>7} "
        f"{'peak MB':>8} {'wall x':>7}"
    )
    for key, rows in times.items():
        wall = [row[0] for row in rows[1:]]
        middle = statistics.median(wall)
        span = f"{min(wall):.2f}-{max(wall):.2f}"
        cpu = statistics.median(row[1] for row in rows[1:])
        print(
            f"{key:<18} {middle:>8.2f} {span:>13} {count / middle:>8,.0f} {size / middle:>7.1f} "
            f"{cpu:>7.2f} {rows[0][2]:>8.0f} {middle / base:>7.2f}"
        )


def main() -> None:
    """Build and measure, or run as one of the peers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sota-bench"))
    parser.add_argument("--books", type=Path, help="books.jsonl.zst, to add books to the text")
    parser.add_argument("--megabytes", type=int, default=104)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="run contenders whose name contains this")
    parser.add_argument("--no-origin", action="store_true", help="skip the slowest peer")
    parser.add_argument("--peer", choices=["tiktoken", "origin"], help=argparse.SUPPRESS)
    parser.add_argument("--peer-input", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer-out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.peer_input, options.peer_out)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    path = build(options.folder, options.megabytes, options.books)
    measure(path, options.runs, not options.no_origin, options.only)


if __name__ == "__main__":
    main()
