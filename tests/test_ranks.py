"""What the processes of a run have in common: threads stand for them here, but for one test."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, TCPStore

from sota_transformer import launcher
from sota_transformer.config import Run, RunConfig
from sota_transformer.errors import SotaError
from sota_transformer.runtime import Runtime
from sota_transformer.training import checkpoint, ranks
from sota_transformer.training.checkpoint import State
from sota_transformer.training.start import train
from sota_transformer.training.trainer import Trainer

from .training_runs import MakeRun, change, command, final_hash, losses, train_until


@dataclass(frozen=True, kw_only=True)
class Thread(Runtime):
    """One of two processes; every collective function of `Runtime` goes through `sum_`."""

    sent: list[Tensor | None]
    barrier: threading.Barrier = field(compare=False)

    def sum_(self, tensor: Tensor) -> Tensor:
        self.sent[self.rank] = tensor.clone()
        self.barrier.wait(10)
        first, second = self.sent
        assert first is not None and second is not None and first.shape == second.shape
        tensor.copy_(first + second)
        self.barrier.wait(10)
        return tensor


def together(work: Callable[[Runtime], Any]) -> list[Any]:
    """What `work` returned or raised in each of two processes."""
    plain = vars(Runtime.detect(Run(device="cpu"), 1)) | {"world": 2}
    shared = {"sent": [None, None], "barrier": threading.Barrier(2)}
    results: list[Any] = [AssertionError(), AssertionError()]

    def run(rank: int) -> None:
        try:
            results[rank] = work(Thread(**(plain | {"rank": rank} | shared)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_with_other_options_or_data_are_refused_in_all(make_run: MakeRun) -> None:
    """They trained to the end, on the sum of what belonged to two different models."""
    one = make_run()

    def refused(data: str = "d", **changes: object) -> list[str]:
        other = change(one, path=Path("/elsewhere"), out=Path("/mine"), micro_rows=2, **changes)
        both = [(one, "d"), (other, data)]
        found = together(lambda r: ranks.agree(both[r.rank][0], r, both[r.rank][1]))
        return [str(error) for error in found if error is not None]

    assert refused() == []
    for number, said in enumerate(refused(learning_rate=0.5, seed=7)):
        given = (one.optim.learning_rate, 0.5)[number], (one.run.seed, 7)[number]
        assert f"process {number}: " in said
        assert f"run.seed (here {given[1]})" in said
        assert f"optim.learning_rate (here {given[0]})" in said
    assert [said.count("data fingerprint") for said in refused("e")] == [1, 1]


def test_processes_of_another_precision_are_told_which_to_ask_for(make_run: MakeRun) -> None:
    """Processors with and without bfloat16: the command was the same, and nothing else was said."""
    config, kinds = make_run(), (torch.float32, torch.bfloat16)
    found = together(lambda r: ranks.agree(config, replace(r, dtype=kinds[r.rank]), "d"))
    for kind, error in zip(("float32", "bfloat16"), found, strict=True):
        assert f"differ in dtype (here {kind}); start all with --run.dtype float32" in str(error)


def test_only_the_first_process_needs_the_folder(
    make_run: MakeRun, tmp_path: Path, monkeypatch
) -> None:
    """On a machine where it could not be made, the second process refused the run."""
    file = tmp_path / "file"
    file.touch()
    plain = vars(Runtime.detect(Run(device="cpu"), 1)) | {"rank": 1, "world": 1}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Runtime, "detect", lambda *_: Runtime(**plain))
    # From scratch, not compiled; not complete.
    monkeypatch.setattr(Runtime, "of_first", lambda _, *sent: [-1, 0][-len(sent) :])
    monkeypatch.setattr(Trainer, "fit", lambda trainer: trainer.runtime.rank)
    assert train(change(make_run(), out=file / "run")) == 1


def test_processes_of_other_versions_are_refused(make_run: MakeRun, monkeypatch) -> None:
    config, fields = make_run(), type(make_run()).fields
    second = threading.local()
    monkeypatch.setattr(
        type(config), "fields", lambda c: fields(c) | ({"new": 1} if vars(second) else {})
    )

    def work(runtime: Runtime) -> None:
        if runtime.rank == 1:
            second.yes = True
        ranks.agree(config, runtime, "d")

    assert all(isinstance(e, SotaError) and "differ in version" in str(e) for e in together(work))


def test_the_first_process_sends_the_state_it_has_read(tmp_path: Path) -> None:
    """To the last bit: the others' machines may have no such checkpoint, or another run's."""
    model = {"w": torch.tensor([[1.5, -0.0], [1e-42, 3.0]]), "b": torch.randn(3)}
    optim = {"exp_avg.w": torch.randn(2, 2)}
    trainer = {"updates": 3, "best": None, "rows": 12}
    checkpoint.save(tmp_path / "0", State(step=3, model=model, optim=optim, trainer=trainer))
    other = State(step=3, model={"w": torch.ones(2)}, optim={}, trainer={"updates": 9})
    checkpoint.save(tmp_path / "1", other)
    found = together(lambda r: ranks.load(r, tmp_path / str(r.rank), 3, verified=True))
    first, second = found
    assert isinstance(first, State) and isinstance(second, State)
    for state in (first, second):
        assert {**state.model, **state.optim}.keys() == {**model, **optim}.keys()
        for name, tensor in (model | optim).items():
            mine = (state.model | state.optim)[name]
            assert mine.shape == tensor.shape
            assert np.array_equal(mine.view(torch.int32), tensor.view(torch.int32))
    assert first.trainer == second.trainer and first.manifest == second.manifest


@pytest.mark.parametrize(("steps", "refused"), [((4, 4), 0), ((4, 2), 0), ((4, 6), 2), ((0, 6), 2)])
def test_a_run_does_not_begin_again_beside_its_checkpoints(
    tmp_path: Path, steps: tuple[int, int], refused: int
) -> None:
    """Seen with two machines and a rendezvous: the one without a checkpoint came first."""
    for rank, step in enumerate(steps):
        if step:
            checkpoint.path_of(tmp_path / str(rank), step).mkdir(parents=True)
    found = together(lambda r: ranks._first_has_the_newest(r, tmp_path / str(r.rank)))
    said = [str(error) for error in found if error is not None]
    assert len(said) == refused
    assert not refused or (steps[0] == 0) == ("no checkpoint" in said[0])


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_process_says_that_it_waits_and_ctrl_c_ends_it(monkeypatch, capsys, before: Any) -> None:
    """Variables of a launcher left in a shell: it was silent for ten minutes, deaf to Ctrl-C."""
    monkeypatch.setattr(launcher, "_PATIENCE", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "29500")
    usual = signal.signal(signal.SIGINT, before)
    try:
        with launcher.awaited(2):
            inside = signal.getsignal(signal.SIGINT)
            deadline = time.monotonic() + 20
            said = ""
            while not said and time.monotonic() < deadline:
                time.sleep(0.01)
                said = capsys.readouterr().err
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, usual)
    assert inside == (signal.SIG_IGN if before == signal.SIG_IGN else signal.SIG_DFL)
    assert said.startswith("sota: waiting for all 2 processes at host:29500")


def test_only_training_waits_for_other_processes(monkeypatch) -> None:
    """`sota generate` waited, too, in a shell with a launcher's old variables."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    machine = Runtime.detect(Run(device="cpu"), 1)
    with pytest.raises(SotaError, match="unset WORLD_SIZE"):
        machine.join()


def test_processes_meet_those_of_their_own_time(monkeypatch) -> None:
    """torchrun's store outlives them: one of several machines never resumed after a restart."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    calls = dict[str, str]()

    def meets(name: str, rank: int) -> threading.Thread:
        def work() -> None:
            store = TCPStore("127.0.0.1", kept.port, wait_for_workers=False)
            calls[name] = launcher.called(store, rank, 3, 20)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    for thread in (meets("0", 0), meets("1", 1), meets("2", 2)):
        thread.join(20)
    early = meets("1 again", 1)  # its machine has noticed first
    time.sleep(0.3)
    assert "1 again" not in calls
    for thread in (meets("2 again", 2), meets("0 again", 0), early):
        thread.join(20)
    first, second = ({calls[f"{n}{more}"] for n in range(3)} for more in ("", " again"))
    assert len(first) == len(second) == 1 and first != second
    with pytest.raises(RuntimeError, match="met nobody in 0 s"):  # nobody calls any more
        launcher.called(kept, 1, 3, 0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for addresses")
def test_gloo_takes_the_network_that_leads_to_the_others(monkeypatch) -> None:
    """Debian calls itself 127.0.1.1, which gloo told the other machine to connect to."""
    addresses = {"m1": "127.0.0.1", "10.0.0.2": "10.0.0.1", "127.0.0.5": "127.0.0.1"}
    interfaces = {"127.0.0.1": "lo", "10.0.0.1": "eth7"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("MASTER_ADDR", "m1")
    assert launcher._interface(launcher.own_address("127.0.0.1")) == "lo"
    assert launcher._interface("203.0.113.7") is None
    assert launcher.own_address("nowhere.invalid") == ""
    monkeypatch.setattr(launcher, "own_address", lambda host: addresses.get(host, ""))
    monkeypatch.setattr(launcher, "_interface", interfaces.get)
    store = HashStore()
    for rank, address in {1: "127.0.0.5", 2: "10.0.0.2"}.items():  # the first is on this machine
        store.set(f"address {rank}", address)
    for before, after in (("", "eth7"), ("ib0", "ib0")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
        launcher.choose_network(store, 0, 3)
        assert os.environ["GLOO_SOCKET_IFNAME"] == after


@pytest.mark.slow
def test_machines_without_a_shared_disk_resume_to_the_same_bytes(
    make_run: MakeRun, tmp_path: Path
) -> None:
    """The second process had no checkpoint to read, so such a run could not be resumed."""
    one, two = (make_run(name, micro_rows=2, save_every_steps=5) for name in ("one", "two"))
    train(one)
    train_until(two, 6)
    own = f'[ "$RANK" = 0 ] || set -- "$@" --out {tmp_path / "other"}; exec "$@"'
    done = _torchrun(own, two)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 5" in done.stdout
    assert final_hash(one) == final_hash(two) and losses(one) == losses(two)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_torchrun_restarts_the_processes(make_run: MakeRun) -> None:
    """Those of its second attempt looked for the dead of the first, ten minutes each time."""
    one, two = (make_run(name, micro_rows=2) for name in ("one", "two"))
    train(one)
    once = '[ "$RANK $TORCHELASTIC_RESTART_COUNT" != "1 0" ] || set -- "$@" --run.seed 7; exec "$@"'
    done = _torchrun(once, two, "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    assert "the processes of this run differ in run.seed (here 7)" in done.stderr
    assert final_hash(one) == final_hash(two)


def _torchrun(script: str, config: RunConfig, *more: str) -> "subprocess.CompletedProcess[str]":
    """Two processes, each a shell that runs `script` with the run's command as its arguments."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*torchrun, *more, "--no-python", "sh", "-c", script, "sh", *command(config)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
