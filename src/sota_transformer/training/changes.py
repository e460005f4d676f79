"""What may change between two starts of one run.

model                                    error 65
data, by content                         error 65, unless --data-change says how to continue
seed, batch, schedule, steps, window     error 2, unless --override names the field
micro-batch, ranks, threads, versions    reported; error 2 with --exact
log, eval and save intervals; paths      allowed

Before the first checkpoint every change is allowed and reported; after an import only the model has
to match.
"""

from pathlib import Path

from sota_transformer import durable, schedules
from sota_transformer.config import EXECUTION, HABITS, RunConfig
from sota_transformer.errors import BAD_DATA, USAGE, SotaError
from sota_transformer.training import checkpoint
from sota_transformer.training.runlog import read_config
from sota_transformer.training.trainer import Trainer

# None of these decides which samples are seen or how they are weighted.
_FREE = HABITS | EXECUTION | {"run.resume", "run.exact", "run.override", "run.data_change"}
_WEIGHTLESS = "model.seq_len"  # the only model field that no weight depends on


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
    steps = checkpoint.steps(folder)  # without any, nothing has to match
    fixed = [name for name in changed if name.startswith("model.") and name != _WEIGHTLESS]
    if steps and fixed:
        raise SotaError(
            f"{folder} was trained with a different model: "
            f"{'; '.join(changed[name] for name in fixed)}. Use the same options or another --out",
            BAD_DATA,
        )
    fitting = bool(steps) and not _imported(folder, steps)
    rate = "optim.matrix_rate"
    if fitting and rate in changed and 0 in (before[rate], config.optim.matrix_rate):
        raise SotaError(
            f"{folder} was trained with another optimizer: {changed[rate]}; AdamW and NorMuon "
            "cannot resume from each other's state. Use the same options or another --out",
            BAD_DATA,
        )
    refused = [name for name in changed if name not in config.run.override.split(",")]
    if refused and fitting:
        asked = " ".join(f"--override {name}=VALUE" for name in refused)
        raise SotaError(
            f"{folder} was trained with a different configuration: "
            f"{'; '.join(changed[name] for name in refused)}. Use the same options or another "
            f"--out; to resume with the change: {asked}",
            USAGE,
        )
    return list(changed.values())


def of_rate(folder: Path, config: RunConfig, step: int) -> list[str]:
    """The change in the next step's learning rate, if any: a longer run raises it again."""
    before, now = (schedules.learning_rate(step, each) for each in (read_config(folder), config))
    was, is_ = f"{before:.2e}", f"{now:.2e}"
    return [f"learning rate at step {step} was {was}, is {is_}"] if step and was != is_ else []


def _imported(folder: Path, steps: list[int]) -> bool:
    """Whether these checkpoints come from an import, so that no seed or machine produced them."""
    manifest = checkpoint.path_of(folder, 0) / durable.MANIFEST
    return steps == [0] and not durable.read_manifest(manifest).get("numerics")


def of_data(config: RunConfig, state: checkpoint.State, trainer: Trainer) -> list[str]:
    """Apply --data-change to `state`. SotaError 65 for different data without it."""
    old, new = state.manifest.get("data"), trainer.windows.fingerprint
    # None: imported. Old checkpoints append how the data was cut into windows.
    if old is None or str(old).startswith(new):
        return []
    files = state.manifest.get("data_files", {})
    names = sorted({name for name, _ in files.items() ^ trainer.judge.windows.files.items()})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    change = f"data fingerprint was {str(old)[:12]}, is {new[:12]}"
    change += f" (content differs in {', '.join(names[:3])}{more})" if names else ""
    if config.run.data_change == "refuse":
        raise SotaError(
            f"{config.data.path} is not the data this run was trained on: {change}. Use the old "
            "data or another --out; to resume on the new data: --data-change continue (from the "
            "same position) or restart-epoch (from the start of an epoch)",
            BAD_DATA,
        )
    # Losses on the old data say neither what is an outlier nor what is low on the new.
    state.trainer.setdefault("guard", {})["losses"] = []
    state.trainer.pop("best", None)
    if config.run.data_change == "restart-epoch":
        rows = int(state.trainer.get("rows", state.step * config.train.batch_rows))
        state.trainer["rows"] = rows + -rows % len(trainer.windows)
    return [change]


def of_numerics(state: checkpoint.State, trainer: Trainer) -> list[str]:
    """Differences in what can change a bit of the result, as far as the checkpoint records it."""
    before, now = state.manifest.get("numerics", {}), trainer.numerics()
    differing = {name for name in now if name in before and before[name] != now[name]}
    if "micro_rows" not in differing and trainer.config.train.batch_rows <= 2 * trainer.micro_rows:
        differing.discard("world")  # a sum of two terms does not depend on which rank adds
    said = {"world": "processes"}  # the log's word
    return [f"{said.get(n, n)} was {before[n]}, is {now[n]}" for n in sorted(differing)]
