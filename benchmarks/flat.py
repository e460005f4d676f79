"""Do speed and memory stay flat over a long run? 100,000 steps of a minuscule model:

    python benchmarks/flat.py --data data/books --folder /tmp/flat

The model is so small that everything around it dominates: random access to the data, logging,
validation, samples, checkpoints, the guard. Prints tokens/s (median of the nearby log lines) and
peak memory at 1,000 to 100,000 steps. It uses one thread, to be less sensitive to other load.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from sota_transformer.training.runlog import read_metrics

_SHAPE = "--model.layers 1 --model.d-model 16 --model.heads 1 --model.kv-heads 1 --model.d-ff 32"
MINUTE = f"{_SHAPE} --model.seq-len 16 --train.batch-rows 1".split()


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    out = options.folder / f"minute-{options.steps}"
    command = [sys.executable, "-m", "sota_transformer", "train", "tiny", *MINUTE]
    command += ["--data", str(options.data), "--out", str(out), "--threads", "1"]
    command += ["--steps", str(options.steps), "--train.log-every", "100"]
    command += ["--train.eval-every", str(options.steps // 20), "--train.eval-tokens", "4096"]
    command += ["--train.sample-every", str(options.steps // 20)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [line for line in read_metrics(out) if "tokens_per_second" in line]
    print("    step   tokens/s   peak GB")
    for share in (100, 20, 10, 5, 2, 1):
        step = options.steps // share
        near = [
            line for line in lines if abs(line["step"] - step) <= max(200, options.steps // 200)
        ]
        rate = statistics.median(line["tokens_per_second"] for line in near)
        print(f"{step:>8,} {rate:>10,.0f} {near[-1]['memory'] / 1e9:>9.3f}", flush=True)


if __name__ == "__main__":
    main()
