"""Micro-batch size: how many rows go through the model at once."""

from sota_transformer.config import RunConfig
from sota_transformer.errors import SotaError
from sota_transformer.model.loss import LONGEST_SUM
from sota_transformer.runtime import Runtime
from sota_transformer.words import counted

_BUSY = {"cpu": 2048, "mps": 8192, "cuda": 32_768}  # tokens that saturate each device


def micro_rows(config: RunConfig, runtime: Runtime) -> int:
    """Rows of one forward pass: as configured, or as many as saturate this device.

    Always a divisor of this rank's rows, so that every micro-batch has the same shape. SotaError
    if the configured value is not one, or is more than this device sums correctly: the gradient of
    a weight is a sum over tokens.
    """
    rows, world, kind = config.train.batch_rows, runtime.world, runtime.device.type
    if rows % world:
        raise SotaError(f"train.batch_rows {rows} must be divisible by {world} processes")
    mine, tokens = rows // world, config.model.seq_len
    wanted = config.train.micro_rows
    if wanted and mine % wanted:
        raise SotaError(
            f"train.micro_rows {wanted} must divide the {counted(mine, 'row')} of a process"
        )
    most = max(1, _BUSY[kind] // tokens)
    found = wanted or dividing(mine, most)
    longest = LONGEST_SUM.get(kind, found * tokens)
    if found * tokens > longest:
        fewer = longest // tokens
        way = f"use {fewer} or fewer" if fewer else "shorten --model.seq-len"
        raise SotaError(
            f"train.micro_rows {found} of {tokens} tokens: {kind} sums at most {longest:,} "
            f"tokens correctly (pytorch#195163); {way}"
        )
    return found


def dividing(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most`; 0 if there is none."""
    return next((size for size in range(min(rows, most), 0, -1) if rows % size == 0), 0)
