"""How many rows go through the model at once: a step's gradient is the sum over micro-batches."""

from sota_transformer.config import RunConfig
from sota_transformer.errors import SotaError
from sota_transformer.model.loss import LONGEST_SUM
from sota_transformer.runtime import Runtime
from sota_transformer.words import counted

_BUSY = {"cpu": 2048, "mps": 8192, "cuda": 32_768}  # tokens that keep each device busy


def micro_rows(config: RunConfig, runtime: Runtime) -> int:
    """Rows of one forward pass: as configured, or the most that keep this device busy.

    Always a divisor of the rows of this rank, so that every micro-batch has one shape. SotaError
    where what is configured is none, or where it is more than this device adds up rightly: the
    gradient of a weight is a sum over tokens.
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
        way = f"take {fewer} or fewer" if fewer else "shorten --model.seq-len"
        raise SotaError(
            f"train.micro_rows {found} of {tokens} tokens: {kind} adds up at most {longest:,} "
            f"tokens rightly (pytorch#195163); {way}"
        )
    return found


def dividing(rows: int, most: int) -> int:
    """The largest divisor of `rows` up to `most`; 0 where that is none."""
    return next((size for size in range(min(rows, most), 0, -1) if rows % size == 0), 0)
