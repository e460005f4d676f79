"""What may change between two starts of one run.

another model                            error 65
other data, by content                   error 65, unless --data-change says how to go on
seed, batch, schedule, steps, window     error 2, unless --override names the field
micro-batch, ranks, threads, versions    said; error 2 with --exact
how often to log, judge, save; paths     free

Before the first checkpoint all of it is free, and said; of an imported one the model alone has to
fit.
"""

from pathlib import Path

from sota_transformer import durable, schedules
from sota_transformer.config import HABITS, RunConfig
from sota_transformer.errors import BAD_DATA, USAGE, SotaError
from sota_transformer.training import checkpoint
from sota_transformer.training.runlog import read_config
from sota_transformer.training.trainer import Trainer

# None of it decides which samples are seen or what they count.
_FREE = HABITS | {
    "train.micro_rows", "train.gradient_checkpointing", "run.resume", "run.exact", "run.override",
    "run.data_change", "run.device", "run.dtype", "run.compile", "run.threads",
}  # fmt: skip
_WEIGHTLESS = "model.seq_len"  # the one field of the model that no weight depends on


def of_configuration(folder: Path, config: RunConfig) -> list[str]:
    """What --override changes in the run of `folder`. SotaError 65 or 2 for what may not change."""
    if not (folder / "config.json").exists():
        return []
    before = read_config(folder).fields()
    changed = {
        name: f"{name} was {before[name]}, is {value}"
        for name, value in config.fields().items()
        if name not in _FREE and before[name] != value
    }
    steps = checkpoint.steps(folder)  # without any there is nothing yet that has to fit
    fixed = [name for name in changed if name.startswith("model.") and name != _WEIGHTLESS]
    if steps and fixed:
        raise SotaError(
            f"{folder} holds another model: {'; '.join(changed[name] for name in fixed)}. "
            "Give the same options, or another --out",
            BAD_DATA,
        )
    fitting = bool(steps) and not _imported(folder, steps)
    rate = "optim.matrix_rate"
    if fitting and rate in changed and 0 in (before[rate], config.optim.matrix_rate):
        raise SotaError(
            f"{folder} holds a run with another optimizer: {changed[rate]}; AdamW and NorMuon do "
            "not go on from each other. Give the same options, or another --out",
            BAD_DATA,
        )
    refused = [name for name in changed if name not in config.run.override.split(",")]
    if refused and fitting:
        asked = " ".join(f"--override {name}=VALUE" for name in refused)
        raise SotaError(
            f"{folder} holds a run with another configuration: "
            f"{'; '.join(changed[name] for name in refused)}. Give the same options, or another "
            f"--out; to go on all the same: {asked}",
            USAGE,
        )
    return list(changed.values())


def of_rate(folder: Path, config: RunConfig, step: int) -> list[str]:
    """What the changes of a run make of the rate of its next step: longer, it leaps up again."""
    before, now = (schedules.learning_rate(step, each) for each in (read_config(folder), config))
    was, is_ = f"{before:.2e}", f"{now:.2e}"
    return [f"learning rate at step {step} was {was}, is {is_}"] if step and was != is_ else []


def _imported(folder: Path, steps: list[int]) -> bool:
    """Whether nothing but an import made these checkpoints: no seed and no machine led to it."""
    manifest = checkpoint.path_of(folder, 0) / durable.MANIFEST
    return steps == [0] and not durable.read_manifest(manifest).get("numerics")


def of_data(config: RunConfig, state: checkpoint.State, trainer: Trainer) -> list[str]:
    """What --data-change admits, applied to `state`. SotaError 65 for other data without it."""
    old, new = state.manifest.get("data"), trainer.windows.fingerprint
    # None: imported. Behind it stood once how it was cut.
    if old is None or str(old).startswith(new):
        return []
    files = state.manifest.get("data_files", {})
    names = sorted({name for name, _ in files.items() ^ trainer.judge.windows.files.items()})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    change = f"data fingerprint was {str(old)[:12]}, is {new[:12]}"
    change += f" (other content in {', '.join(names[:3])}{more})" if names else ""
    if config.run.data_change == "refuse":
        raise SotaError(
            f"{config.data.path} is not the data this run was trained on: {change}. Use the old "
            "data, or another --out; to go on all the same: --data-change continue (from the same "
            "place) or restart-epoch (from the beginning of an epoch)",
            BAD_DATA,
        )
    # Losses on the old data do not say which ones on the new stand out, or are low.
    state.trainer.setdefault("guard", {})["losses"] = []
    state.trainer.pop("best", None)
    if config.run.data_change == "restart-epoch":
        rows = int(state.trainer.get("rows", state.step * config.train.batch_rows))
        state.trainer["rows"] = rows + -rows % len(trainer.windows)
    return [change]


def of_numerics(state: checkpoint.State, trainer: Trainer) -> list[str]:
    """What differs of all that can change a bit of the result; a checkpoint may not say."""
    before, now = state.manifest.get("numerics", {}), trainer.numerics()
    differing = {name for name in now if name in before and before[name] != now[name]}
    if "micro_rows" not in differing and trainer.config.train.batch_rows <= 2 * trainer.micro_rows:
        differing.discard("world")  # a sum of two does not depend on who adds
    return [f"{name} was {before[name]}, is {now[name]}" for name in sorted(differing)]
