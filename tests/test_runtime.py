"""What is chosen on machines other than this one: compilers, processors, ranks, memory."""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sota_transformer import launcher, runtime
from sota_transformer.config import Run
from sota_transformer.launcher import is_first_rank
from sota_transformer.presets import PRESETS
from sota_transformer.runtime import Runtime, out_of_memory
from tests.simulated import simulated

CPU = Runtime.detect(Run(device="cpu", compile="off"), 1)


@pytest.mark.parametrize(
    ("device", "preset", "tools", "compiles"),
    [
        ("cpu", "16m", {"g++"}, True),
        ("cpu", "16m", {"clang++"}, True),
        ("cpu", "16m", {"CXX"}, True),
        ("cpu", "16m", set(), False),
        ("cpu", "tiny", {"g++"}, False),
        ("cuda", "16m", set(), True),  # Triton brings its own
        ("mps", "16m", {"clang++"}, False),
    ],
)
def test_what_is_compiled(
    monkeypatch, device: str, preset: str, tools: set[str], compiles: bool
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if "CXX" in tools:
        monkeypatch.setenv("CXX", "icpx")
    monkeypatch.setattr(shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    size = PRESETS[preset]().model.parameter_count
    assert runtime._compile("auto", torch.device(device), size)[0] == compiles


def test_a_compiler_is_tried_before_it_is_used(monkeypatch) -> None:
    """torch.compile itself fails only when what it returned is called."""

    def fails(_: Any) -> None:
        raise RuntimeError("no Python.h")

    monkeypatch.setattr(torch, "compile", lambda _: fails)
    found = runtime._compile("on", torch.device("cpu"), 1)
    told = "no Python.h; install Python's headers, such as python3-dev"
    assert found == (False, f"not compiled: torch.compile failed ({told})")


@pytest.mark.parametrize("has", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", ""])
def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch, has: str) -> None:
    for name in dir(torch.cpu):
        if name.startswith("_is_"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name: has in ("", name) and bool(has))
    found, _ = runtime.activations("auto", torch.device("cpu"))
    assert found == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize(
    ("kind", "platform", "local", "backend", "network"),
    [
        ("cuda", "linux", "2", "nccl", "lo"),
        ("cpu", "linux", "2", "gloo", "lo"),
        ("cpu", "darwin", "2", "gloo", "lo0"),
        ("cpu", "linux", "2", "gloo", "ib0"),  # as it was set
        ("cpu", "linux", "1", "gloo", "eth7"),  # two machines: on the way to the other
    ],
)
def test_how_processes_are_joined(
    monkeypatch, kind: str, platform: str, local: str, backend: str, network: str | None
) -> None:
    """The second of two, as torchrun starts it; on a machine of its own it is LOCAL_RANK 0."""
    index = 1 if local == "2" else 0
    started = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": local}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is restored
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    if network == "ib0":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", network)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(launcher.socket, "if_nameindex", lambda: [*enumerate(("lo", "lo0", "ib0"))])
    monkeypatch.setattr(runtime, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    monkeypatch.setattr(runtime, "called", lambda *_: "call")
    monkeypatch.setattr(runtime, "choose_network", lambda *_: os.environ.setdefault(where, "eth7"))
    where = "GLOO_SOCKET_IFNAME"
    monkeypatch.setattr(dist, "PrefixStore", lambda *_: None)
    chosen: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: chosen.append(name))
    with simulated("cuda"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(runtime, "_has_kernels", lambda _: True)
        found = Runtime.detect(Run(device=kind, compile="off"), 1)  # type: ignore[arg-type]
        found.join()
    assert chosen == ([1, backend] if kind == "cuda" else [backend])
    assert os.environ.get("GLOO_SOCKET_IFNAME") == network
    assert (found.rank, found.world) == (1, 2) and not is_first_rank()


def test_a_network_that_was_chosen_stays_chosen(monkeypatch) -> None:
    monkeypatch.setattr(launcher.socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0")])
    for given in ("ib0", "lo,ib0"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
        launcher.check_networks()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(runtime.SotaError, match="not one of lo, ib0"):
        Runtime.detect(Run(device="cpu", compile="off"), 1).join()


def test_a_full_device_is_no_lost_peer() -> None:
    with pytest.raises(torch.OutOfMemoryError), runtime._collective():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_torchs_own_words_for_too_little_memory_are_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_in_bytes(monkeypatch) -> None:
    """Linux counts the peak in kilobytes, macOS in bytes; there available is what is built in."""
    usage = runtime.resource.struct_rusage((0, 0, 123_456, *[0] * 13))
    monkeypatch.setattr(runtime.resource, "getrusage", lambda _: usage)
    assert CPU.peak_memory() == 123_456 * 1024
    built_in = re.search("MemTotal: *([0-9]+) kB", Path("/proc/meminfo").read_text())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert built_in and CPU.available_memory() == pytest.approx(int(built_in[1]) * 1024, rel=0.02)
    assert CPU.peak_memory() == 123_456
    with simulated("mps"):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 << 30)
        assert Runtime.detect(Run(device="mps"), 1).available_memory() == 48 << 30
