"""Do the loss curves of two precisions agree? The same run in each, for several seeds:

    python benchmarks/curves.py --data data/books --folder /tmp/curves

The seed determines weights, data order and dropout, so two runs with the same seed differ only by
rounding. For every validation it prints the mean over seeds for each precision, the mean paired
difference with its standard error, and the standard deviation between seeds, which the difference
should stay below. Runs already complete in the folder are reused. Each run uses one thread, to be
less sensitive to other load.
"""

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path

from sota_transformer.training.runlog import read_metrics

KINDS = ("float32", "bfloat16")


def losses(options: argparse.Namespace, kind: str, seed: int) -> dict[int, float]:
    """Train one run; its validation losses (plain nats) by step."""
    out = options.folder / f"{options.preset}-{kind}-{seed}"
    command = [sys.executable, "-m", "sota_transformer", "train", options.preset]
    command += ["--data", str(options.data), "--out", str(out), "--seed", str(seed)]
    command += ["--steps", str(options.steps), "--run.dtype", kind]
    command += ["--model.seq-len", str(options.seq_len), "--train.batch-rows", str(options.rows)]
    command += ["--train.eval-every", str(options.eval_every), "--train.sample-every", "0"]
    command += ["--train.eval-tokens", str(options.eval_tokens), "--threads", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = read_metrics(out)
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="16m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-tokens", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    seeds = range(1, options.seeds + 1)
    curves = {kind: list[dict[int, float]]() for kind in KINDS}
    for seed in seeds:
        for kind in KINDS:
            curves[kind].append(losses(options, kind, seed))
    print("step   float32  bfloat16  difference            between seeds")
    for step in sorted(curves[KINDS[0]][0]):
        plain, low = ([curve[step] for curve in curves[kind]] for kind in KINDS)
        apart = [b - a for a, b in zip(plain, low, strict=True)]
        error = statistics.stdev(apart) / math.sqrt(len(apart))
        print(
            f"{step:>5}  {statistics.mean(plain):.4f}  {statistics.mean(low):.4f}    "
            f"{statistics.mean(apart):+.4f} +- {error:.4f}     {statistics.stdev(plain):.4f}"
        )


if __name__ == "__main__":
    main()
