"""What the run computes on: device, precision, compilation, threads and ranks, chosen once.

Every choice is a value with a reason that is printed and recorded. Only this module chooses a
backend or reads the launcher's environment. Functions over ranks work without a process group;
one process is not a special case.
"""

import ctypes
import getpass
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sota_transformer.config import Run
from sota_transformer.errors import TEMPORARY, SotaError

_COMPILE_FROM_PARAMETERS = 10_000_000  # below, compiling takes longer than it saves
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Of torch.cpu: with either, matrix products in bfloat16 are faster than in float32.
_FAST_BFLOAT16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_NO_KERNELS = "no kernel image", "invalid device function"  # as CUDA and as ROCm says it
_SILENCE = timedelta(minutes=10)  # longer than the first process alone checks, samples or saves


class PeerLostError(SotaError):
    """Another process of this run is gone, or has said nothing for too long."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The resolved machine."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    threads: int
    rank: int
    world: int
    reasons: tuple[str, ...]

    @classmethod
    def detect(cls, run: Run, parameters: int) -> "Runtime":
        """Resolve `auto` for a model of this many parameters. SotaError if it cannot be had."""
        rank, world = _launched("RANK", 0), _launched("WORLD_SIZE", 1)
        try:
            getpass.getuser()
        except (KeyError, OSError):  # docker --user 1234: torch below 2.13 ends for want of a name
            os.environ["USER"] = str(os.getuid())
        device, why_device = _device(run.device)
        if world > 1 and device.type == "mps":
            raise SotaError("MPS trains in one process; start it without torchrun")
        if run.threads:
            torch.set_num_threads(run.threads)
        if device.type == "cpu":
            _keep_freed_memory()
        if device.type == "mps" and "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ:
            # torch's own 1.7 is more than the machine has: a Mac would swap, and never be full.
            torch.mps.set_per_process_memory_fraction(1.0)
        torch.backends.cuda.enable_cudnn_sdp(False)  # where shapes vary: see `optimize`
        if world > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if _launched("LOCAL_WORLD_SIZE", 1) == world:  # all of them on this machine
                # gloo would take the address behind the machine's name, which goes with a network.
                loopback = "lo0" if sys.platform == "darwin" else "lo"
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            if backend == "gloo":
                _check_networks()
            try:
                with _together():
                    dist.init_process_group(backend, timeout=_SILENCE)
            except ValueError as error:
                line = f"WORLD_SIZE is {world}, and the rest of what torchrun sets is missing"
                raise SotaError(f"{line} ({error}); start it with torchrun, or unset it") from error
        dtype, why_dtype = activations(run.dtype, device)
        compiled, why_compile = _compile(run.compile, device, parameters)
        return cls(
            device=device,
            dtype=dtype,
            compile=compiled,
            threads=torch.get_num_threads(),
            rank=rank,
            world=world,
            reasons=(why_device, why_dtype, why_compile),
        )

    def optimize(self, model: Any, masked: bool = False) -> None:
        """Compile both halves of each block, or undo it: two compilations serve all, names stay.

        Compiled as one, the backward pass would compute the stream between them three times. On a
        CPU the backward pass computes anew whatever is no matrix product and no reduction: norms,
        the gate, weights in bfloat16. That costs no time and halves what a block keeps. A GPU also
        gets what stands before and behind the blocks, 40 passes over the stream where few do.
        `masked`: attention will be given a mask.
        """
        parts = [(block, half) for block in model.blocks for half in ("mix", "feed")]
        for block in model.blocks:
            block.attention.compiled_on_cpu = self.compile and self.device.type == "cpu"
        for module, name in (*parts, (model, "begin"), (model, "end")):
            vars(module).pop(name, None)  # what was compiled stands before the method
        # torch prefers cuDNN's attention on Hopper and newer. It is planned anew for each shape,
        # which takes up to 0.4 s (a B200): for training, not for each length of what is generated.
        # With a mask its backward pass has made NaNs (pytorch#196678), with causal alone none.
        torch.backends.cuda.enable_cudnn_sdp(self.compile and not masked)
        if not self.compile:
            return
        if self.device.type == "cpu":
            from torch._functorch import config as partitioner

            partitioner.aggressive_recomputation = True
        else:
            parts += [(model, "begin"), (model, "end")]
        for module, name in parts:
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))

    def without_compiling(self, why: object) -> "Runtime":
        """The same in eager mode, which is slower and as right, and why."""
        return replace(self, compile=False, reasons=(*self.reasons[:2], _not_compiled(why)))

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Compile nothing inside: what has other shapes than training would not pay for it."""
        if not self.compile:
            yield
            return
        planned = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(planned)

    def put(self, array: NDArray[Any]) -> Tensor:
        """An array to the device. A GPU copies it in its turn, and nothing waits for that."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def sum_array(self, array: NDArray[Any]) -> NDArray[Any]:
        """Sum an array, which is on the CPU, over ranks; one rank's does not leave it."""
        if self.world == 1:
            return array
        return self.sum_(torch.from_numpy(array).to(self.device)).cpu().numpy()

    def of_first(self, *values: int) -> list[int]:
        """The first process's values, in every process."""
        mine = values if self.rank == 0 else (0,) * len(values)
        said = torch.tensor(mine, dtype=torch.int64, device=self.device)  # bools are a byte each
        return self.sum_(said).tolist()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum every gradient over ranks; losses are already divided by the global token count."""
        if self.world > 1:
            with _together():
                for parameter in parameters:
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Most bytes in use so far: of the device, or of this process on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def available_memory(self) -> int:
        """Bytes that a new run could take: of the device, or of the machine.

        What this process keeps of memory that it does not use any more is among them.
        """
        if self.device.type == "cuda":
            kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return torch.cuda.mem_get_info()[0] + kept
        if self.device.type == "mps":
            return torch.mps.recommended_max_memory()
        if sys.platform == "linux":
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)
            fields = dict(
                line.split(":") for line in Path("/proc/meminfo").read_text().splitlines()
            )
            return min(int(fields["MemAvailable"].split()[0]) * 1024, _left_by_limit())
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def describe(self) -> dict[str, Any]:
        """What a resume compares: everything that can change a bit of the result."""
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": _device_name(self.device),
            "threads": self.threads,
            "world": self.world,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": self.compile,
        }


def out_of_memory(error: Exception) -> bool:
    """Whether a device could not hold what was asked; not every backend has a type for it."""
    # Metal's limit of one buffer, and cuBLAS where the rest of the memory is taken.
    words = ("out of memory", "can't allocate memory", "Invalid buffer size", "_ALLOC_FAILED")
    words += ("Cannot allocate memory (12)",)  # a file that is mapped (safetensors#528)
    said = str(error)  # a compiler that ran out of it would do so again for fewer rows
    known = any(word in said for word in words) and "C++ compile error" not in said
    return known or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def _together() -> Iterator[None]:
    """Something that all processes do. PeerLostError where one of them does not."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise PeerLostError(
            "another process of this run died, left or was silent for too long; what it said last "
            f"tells why, and the same command goes on ({' '.join(str(error).split())[:120]})",
            TEMPORARY,
        ) from error


def _check_networks() -> None:
    """SotaError for a GLOO_SOCKET_IFNAME that is not here; gloo would not say what is wrong."""
    given, here = os.environ.get("GLOO_SOCKET_IFNAME"), [name for _, name in socket.if_nameindex()]
    if given and not {*given.split(",")} <= {*here}:
        raise SotaError(f"GLOO_SOCKET_IFNAME is {given}, and here are {', '.join(here)}; unset it")


def _left_by_limit() -> int:
    """Bytes that the memory limit of a container or service leaves; sys.maxsize without one."""
    try:
        group = re.search("^0::/(.*)$", _CGROUP.read_text(), re.M)
        folder = _CGROUPS / (group[1] if group else "")
        limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
        cached = re.search("^inactive_file ([0-9]+)$", (folder / "memory.stat").read_text(), re.M)
        return max(0, limit - used + (int(cached[1]) if cached else 0))
    except (OSError, ValueError):  # no such system, or the limit is the word "max"
        return sys.maxsize


def _launched(name: str, least: int) -> int:
    """A number that torchrun sets, `least` without torchrun. SotaError if it is none."""
    value = os.environ.get(name, str(least))
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
        raise SotaError(f"the environment says {name}={value}, as torchrun never does; unset it")
    return int(value)


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return _launched("RANK", 0) == 0


def _device(wanted: str) -> tuple[torch.device, str]:
    """The device and why."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    asked = wanted != "auto"
    if not asked:
        wanted = next((name for name, there in available.items() if there), "cpu")
    elif not available.get(wanted, True):
        raise SotaError(f"no {wanted} device here; leave --device out to take what there is")
    why = ""
    if wanted == "cuda":
        index, there = _launched("LOCAL_RANK", 0), torch.cuda.device_count()
        if index >= there:
            raise SotaError(
                f"process {index} has no GPU of its own: torchrun's --nproc-per-node {there}"
            )
        torch.cuda.set_device(index)
        name = torch.cuda.get_device_name(index)
        if _has_kernels(torch.device("cuda", index)):
            return torch.device("cuda", index), f"device {name}"
        why = f"torch {torch.__version__} has no kernels for the {name}"
        if asked or _launched("WORLD_SIZE", 1) > 1:  # other processes may have other GPUs
            raise SotaError(f"{why}; give --device cpu, or install a build of torch that has")
        wanted, why = "cpu", f": {why}, another build of it may"
    return torch.device(wanted), f"device {_device_name(torch.device(wanted))}{why}"


def _has_kernels(device: torch.device) -> bool:
    """Whether torch was built for this GPU: 2.11's usual build is for none before Turing."""
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_KERNELS):
            return False
        raise
    return True


def _device_name(device: torch.device) -> str:
    """The name people know the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":  # many of its kernels come with the system
        return f"mps ({platform.machine()}, macOS {platform.mac_ver()[0]})"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def activations(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of the activations and why; `auto` is the fastest that the hardware has."""
    if wanted != "auto":
        return getattr(torch, wanted), f"{wanted} as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "bfloat16: this GPU has it in hardware"
        return torch.float16, "float16 with a scaled loss: this GPU has no bfloat16"
    if device.type == "mps":
        return torch.float32, "float32: bfloat16 is emulated on M1 and M2"
    if any(getattr(torch.cpu, name, bool)() for name in _FAST_BFLOAT16):
        return torch.bfloat16, "bfloat16: this processor multiplies it in hardware"
    return torch.float32, "float32: this processor has no bfloat16 arithmetic"


def _compile(wanted: str, device: torch.device, parameters: int) -> tuple[bool, str]:
    """Whether to compile, and why."""
    if wanted == "off":
        return False, "not compiled, as asked"
    if wanted == "auto":
        if device.type == "mps":
            return False, "not compiled: torch.compile on MPS has given wrong results"
        if parameters < _COMPILE_FROM_PARAMETERS:
            return False, "not compiled: too small a model to pay for it"
        compilers = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if device.type == "cpu" and not compilers:
            return False, "not compiled: no C++ compiler here (with g++ it is twice as fast)"
    try:
        probe = torch.compile(lambda x: x.sin() + 1)
        probe(torch.ones(64, device=device))
    except Exception as error:  # any failure of a compiler we do not own means: do without
        return False, _not_compiled(error)
    return True, "compiled"


def _not_compiled(why: object) -> str:
    """A reason, from what a compiler or a check said."""
    return f"not compiled: torch.compile failed here ({in_short(why)})"


def in_short(error: object) -> str:
    """What a compiler said, without its command line and torch's advice."""
    words = re.sub(r" Command: .* Output: | Set TORCHDYNAMO_.*", " ", " ".join(str(error).split()))
    return words.strip()[:200] or type(error).__name__


def stay_awake() -> None:
    """Keep a Mac that nobody touches from going to sleep, as long as this process lives."""
    if sys.platform == "darwin" and (caffeinate := shutil.which("caffeinate")):
        nothing = subprocess.DEVNULL
        command = [caffeinate, "-i", "-s", "-w", str(os.getpid())]
        with suppress(OSError):
            subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)


def _keep_freed_memory() -> None:
    """Let glibc keep and reuse large buffers, which it would unmap and fault in anew each step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
