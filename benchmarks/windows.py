"""Gain and cost of masking between documents and of keeping them whole, on short documents:

    python benchmarks/windows.py --folder /tmp/windows --books ../shared/corpora/books.jsonl.zst
    python benchmarks/windows.py --folder /tmp/windows --preset tiny --seq-len 128 --rows 4 \\
        --steps 100 --eval-tokens 16384 --megabytes 12 --no-cost

Books are cut into documents of about `--document-bytes`. Then `stream` and `best-fit`, each with
and without `data.document_mask`, are trained in turn, once per seed, all on the same number of
targets: best-fit makes up for its padding with more steps. Two losses are reported, in plain nats:

    own     the run's validation: windows of the stream, masked if training was masked
    alone   each validation document by itself, the same for all

each with its difference from `stream` with the same seed. Token counts exclude padding. Seconds are
CPU time, which other work on the machine inflates less than wall time.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from sota_transformer.config import Data, RunConfig
from sota_transformer.data.packing import BestFit
from sota_transformer.data.prepare import prepare
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.inference.perplexity import sequence_sums, summarise
from sota_transformer.options import Prepare
from sota_transformer.plan import step_seconds
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint
from sota_transformer.training.micro_batch import micro_rows
from sota_transformer.training.runlog import read_metrics
from sota_transformer.training.start import train

WAYS = {
    "stream": Data(),
    "stream, masked": Data(document_mask=True),
    "best-fit": Data(windows="best-fit"),
    "best-fit, masked": Data(windows="best-fit", document_mask=True),
}


class Outcome(NamedTuple):
    own: float
    alone: float
    tokens_per_second: float
    cpu_seconds: float


def short_documents(books: Path, folder: Path, size: int, megabytes: int) -> Path:
    """Prepare passages of about `size` bytes, cut between paragraphs."""
    import zstandard

    out = folder / f"data-{size}-{megabytes}"
    source = out.with_suffix(".jsonl")
    if not source.exists():
        left = megabytes * 10**6
        with zstandard.open(books, "rt", encoding="utf-8") as file, source.open("w") as target:
            for line in file:
                piece = ""
                for paragraph in json.loads(line)["text"].split("\n\n"):
                    piece += paragraph + "\n\n"
                    if len(piece) > size:
                        left -= target.write(json.dumps({"text": piece}) + "\n")
                        piece = ""
                if left < 0:
                    break
    prepare(Prepare(inputs=(str(source),), out=out))
    return out


def preset(options: argparse.Namespace) -> RunConfig:
    """The preset, with its context length replaced by `--seq-len` if given."""
    config = PRESETS[options.preset]()
    seq_len = options.seq_len or config.model.seq_len
    return dataclasses.replace(config, model=dataclasses.replace(config.model, seq_len=seq_len))


def run_of(options: argparse.Namespace, data: Path, way: str, seed: int) -> RunConfig:
    """The run for one way and seed; best-fit gets extra steps to offset its padding."""
    config = preset(options)
    section, steps = dataclasses.replace(WAYS[way], path=data), options.steps
    if section.windows == "best-fit":
        steps = round(steps / (1 - BestFit(data, "train", config.model.seq_len).padding))
    out = options.folder / f"{options.preset}-{way.replace(', ', '-')}-{steps}-{seed}"
    return dataclasses.replace(
        config,
        data=section,
        train=dataclasses.replace(
            config.train,
            steps=steps,
            batch_rows=options.rows,
            eval_tokens=options.eval_tokens,
            eval_every=0,
            sample_every=0,
        ),
        run=dataclasses.replace(config.run, out=out, seed=seed, threads=options.threads),
    )


def outcome(config: RunConfig) -> Outcome:
    """Train, and evaluate both losses."""
    began = time.process_time()
    train(config)
    seconds = time.process_time() - began
    metrics = read_metrics(config.run.out)
    own = [line["val_loss"] for line in metrics if "val_loss" in line][-1]
    rates = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    cpu = torch.device("cpu")
    model, _, _ = checkpoint.load_model(config.run.out, cpu, None, print)
    documents = BestFit(config.data.path, "val", config.model.seq_len)
    wanted = max(1, config.train.eval_tokens // config.model.seq_len)
    few = range(0, len(documents), max(1, len(documents) // wanted))
    sizes = Tokenizer().token_bytes
    sums = sequence_sums(model, (documents[i] for i in few), sizes, document_mask=True)
    alone = summarise(sums)
    return Outcome(own, alone.nats, statistics.median(rates[1:] or rates), seconds)


def table(results: dict[str, list[Outcome]]) -> None:
    """Print means over seeds, and each seed's difference from `stream`."""
    base = results["stream"]
    for way, outcomes in results.items():
        cells = [f"{way:<17}"]
        for name in ("own", "alone"):
            values = [getattr(one, name) for one in outcomes]
            pairs = zip(outcomes, base, strict=True)
            apart = ", ".join(f"{getattr(a, name) - getattr(b, name):+.4f}" for a, b in pairs)
            cells.append(f"{name} {statistics.mean(values):.4f} ({apart})")
        cells.append(f"{statistics.median(o.tokens_per_second for o in outcomes):,.0f} tokens/s")
        cells.append(f"{statistics.mean(o.cpu_seconds for o in outcomes):,.1f} CPU s")
        print(" | ".join(cells))


def cost(options: argparse.Namespace) -> None:
    """Step time with and without the mask, in turn; the minimum, as the least disturbed round."""
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.rounds):
        for masked in taken:
            config = dataclasses.replace(preset(options), data=Data(document_mask=masked))
            torch.compiler.reset()
            runtime = Runtime.detect(
                dataclasses.replace(config.run, threads=options.threads),
                config.model.parameter_count,
            )
            rows = min(micro_rows(config, runtime), options.rows)
            taken[masked].append(step_seconds(config, runtime, rows, steps=7)[0])
    plain, masked = (min(values) for values in taken.values())
    print(
        f"step of {options.preset}, {rows} rows: {1e3 * plain:.0f} ms plain, {1e3 * masked:.0f} ms "
        f"masked, {masked / plain:.3f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--books", type=Path, default=Path("../shared/corpora/books.jsonl.zst"))
    parser.add_argument("--preset", default="16m")
    parser.add_argument("--seq-len", type=int, default=0, help="0 keeps the preset's")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--document-bytes", type=int, default=600)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-cost", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not options.no_cost:
        cost(options)
    if not options.steps:
        return
    megabytes, size = options.megabytes, options.document_bytes
    data = short_documents(options.books, options.folder, size, megabytes)
    seq_len = preset(options).model.seq_len
    packed = BestFit(data, "train", seq_len)
    print(
        f"{packed.documents:,} training documents of {packed.tokens / packed.documents:.0f} tokens "
        f"on average, windows of {seq_len}; best-fit padding {packed.padding:.2%}"
    )
    results: dict[str, list[Outcome]] = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way in WAYS:
            results[way].append(outcome(run_of(options, data, way, seed)))
    table(results)


if __name__ == "__main__":
    main()
