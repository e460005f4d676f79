"""What the run computes on: device, precision, compilation, threads and ranks, chosen once.

Every choice has a reason, which is printed and recorded. Only this module chooses a backend and
only `launcher` reads the launcher's environment. Collective functions also work without a process
group, so a single process is no special case.
"""

import ctypes
import getpass
import os
import platform
import re
import resource
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from sota_transformer.config import Run
from sota_transformer.errors import TEMPORARY, SotaError
from sota_transformer.launcher import awaited, called, check_networks, choose_network, launched

_COMPILE_FROM_PARAMETERS = 10_000_000  # below, compiling costs more time than it saves
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Functions of torch.cpu: with either, bfloat16 matrix products are faster than float32 ones.
_FAST_BFLOAT16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_NO_KERNELS = "no kernel image", "invalid device function"  # the messages of CUDA and ROCm
_SILENCE = timedelta(minutes=10)  # longer than the first rank takes to check, sample or save


class PeerLostError(SotaError):
    """Another process of this run has exited or timed out."""


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
        """Resolve `auto` for a model of this size. SotaError for what is not available."""
        rank, world = launched("RANK", 0), launched("WORLD_SIZE", 1)
        try:
            getpass.getuser()
        except (KeyError, OSError):  # docker --user 1234: torch before 2.13 needs a user name
            os.environ["USER"] = str(os.getuid())
        device, why_device = _device(run.device)
        if world > 1 and device.type == "mps":
            raise SotaError("MPS supports one process only; start it without torchrun")
        if run.threads:
            torch.set_num_threads(run.threads)
        if device.type == "cpu":
            _keep_freed_memory()
        if device.type == "mps" and "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in os.environ:
            # torch's own 1.7 exceeds the machine's memory: a Mac would swap and never run out.
            torch.mps.set_per_process_memory_fraction(1.0)
        if device.type == "cuda" and "microsoft" in platform.release():
            # WSL lends the machine's memory instead of running out: at a snail's pace (WSL#10452).
            free, total = torch.cuda.mem_get_info(device)
            most = min(1.0, (free + torch.cuda.memory_reserved(device)) / total)
            torch.cuda.set_per_process_memory_fraction(most, device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # slow for varying shapes: see `optimize`
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

    def join(self) -> None:
        """Meet the other processes of a training run; other commands compute alone."""
        if self.world == 1 or dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if launched("LOCAL_WORLD_SIZE", 1) == self.world:  # all ranks on this machine
            # gloo would resolve the host name, whose address disappears with the network.
            loopback = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        if backend == "gloo":
            check_networks()
        try:
            with _collective(), awaited(self.world):
                store, rank, world = next(rendezvous("env://", timeout=_SILENCE))
                call = called(store, rank, world, _SILENCE.total_seconds())
                choose_network(store, rank, world)
                mine = dist.PrefixStore(call, store)
                dist.init_process_group(
                    backend, timeout=_SILENCE, store=mine, rank=rank, world_size=world
                )
        except ValueError as error:
            line = f"WORLD_SIZE is {self.world}, but torchrun's other variables are missing"
            raise SotaError(f"{line} ({error}); use torchrun, or unset WORLD_SIZE") from error

    def optimize(self, model: Any, masked: bool = False) -> None:
        """Compile both halves of each block, or undo it; all blocks share the two compilations.

        Compiled as one, the backward pass would compute the stream between them three times. On a
        CPU the backward pass recomputes whatever is neither a matrix product nor a reduction:
        norms, the gate, bfloat16 weights. That costs no time and halves what a block keeps. A GPU
        also compiles what precedes and follows the blocks: 40 passes over the stream become few.
        `masked`: attention will get a mask. Parameter names do not change.
        """
        parts = [(block, half) for block in model.blocks for half in ("mix", "feed")]
        for block in model.blocks:
            block.attention.compiled_on_cpu = self.compile and self.device.type == "cpu"
        for module, name in (*parts, (model, "begin"), (model, "end")):
            vars(module).pop(name, None)  # the compiled attribute shadows the method
        # torch prefers cuDNN's attention on Hopper and newer. It makes a plan for each shape, which
        # takes up to 0.4 s (on a B200): fine for training, not for every length in generation.
        # With a mask, not with causal alone, its backward pass has given NaN (pytorch#196678).
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
        """The same in eager mode, which is slower but equally correct, with the reason `why`."""
        return replace(self, compile=False, reasons=(*self.reasons[:2], _not_compiled(why)))

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run the body in eager mode: compiling for shapes other than training's does not pay."""
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
        """Copy an array to the device; to a GPU asynchronously."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            with _collective():
                dist.all_reduce(tensor)
        return tensor

    def sum_array(self, array: NDArray[Any]) -> NDArray[Any]:
        """Sum a CPU array over ranks; with one rank it does not visit the device."""
        if self.world == 1:
            return array
        return self.sum_(torch.from_numpy(array).to(self.device)).cpu().numpy()

    def of_first(self, *values: int) -> list[int]:
        """The first rank's values, on every rank."""
        mine = values if self.rank == 0 else (0,) * len(values)
        sent = torch.tensor(mine, dtype=torch.int64, device=self.device)  # bools are a byte each
        return self.sum_(sent).tolist()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum every gradient over ranks; losses are already divided by the global token count."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.sum_(parameter.grad)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        torch.get_device_module(self.device).synchronize()

    def peak_memory(self) -> int:
        """Peak memory in bytes: of the device, or of this process on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def available_memory(self) -> int:
        """Bytes available to a new run, of the device or of the machine.

        They include what this process has freed but still holds in its caches.
        """
        if self.device.type == "cuda":
            kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return torch.cuda.mem_get_info()[0] + kept
        if self.device.type == "mps":
            return torch.mps.recommended_max_memory()
        if sys.platform == "linux":
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)
            left = int(re.findall("MemAvailable: *([0-9]+)", Path("/proc/meminfo").read_text())[0])
            return min(left * 1024, _cgroup_memory_left())
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
    """Whether `error` is an allocation failure; not every backend has a type for it."""
    # Metal's limit on a single buffer, and cuBLAS when the rest of the memory is in use.
    words = ("out of memory", "can't allocate memory", "Invalid buffer size", "_ALLOC_FAILED")
    words += ("Cannot allocate memory (12)",)  # mapping a file (safetensors#528)
    said = str(error)  # a compiler would run out of it again with fewer rows
    known = any(word in said for word in words) and "C++ compile error" not in said
    return known or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def _collective() -> Iterator[None]:
    """Wrap a collective operation. PeerLostError if another process does not take part."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise PeerLostError(
            "another process of this run died, exited or timed out; see its last output for the "
            f"cause; the same command resumes the run ({' '.join(str(error).split())[:120]})",
            TEMPORARY,
        ) from error


def _cgroup_memory_left() -> int:
    """Bytes left under the memory limit of a container or service; sys.maxsize without one."""
    try:
        group = re.search("^0::/(.*)$", _CGROUP.read_text(), re.M)
        folder = _CGROUPS / (group[1] if group else "")
        limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
        cached = re.search("^inactive_file ([0-9]+)$", (folder / "memory.stat").read_text(), re.M)
        return max(0, limit - used + (int(cached[1]) if cached else 0))
    except (OSError, ValueError):  # no cgroup v2, or the limit is "max"
        return sys.maxsize


def _device(wanted: str) -> tuple[torch.device, str]:
    """The device and why."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    asked = wanted != "auto"
    if not asked:
        wanted = next((name for name, there in available.items() if there), "cpu")
    elif not available.get(wanted, True):
        raise SotaError(f"no {wanted} device found; leave out --device to use what is available")
    why = ""
    if wanted == "cuda":
        index, there = launched("LOCAL_RANK", 0), torch.cuda.device_count()
        if index >= there:
            raise SotaError(
                f"process {index} has no GPU of its own; use torchrun --nproc-per-node {there}"
            )
        torch.cuda.set_device(index)
        name = torch.cuda.get_device_name(index)
        if _has_kernels(torch.device("cuda", index)):
            return torch.device("cuda", index), f"device {name}"
        why = f"torch {torch.__version__} has no kernels for the {name}"
        if asked or launched("WORLD_SIZE", 1) > 1:  # other processes may have other GPUs
            raise SotaError(f"{why}; use --device cpu, or install a torch build that has them")
        wanted, why = "cpu", f": {why}; another torch build may have them"
    return torch.device(wanted), f"device {_device_name(torch.device(wanted))}{why}"


def _has_kernels(device: torch.device) -> bool:
    """Whether torch was built for this GPU; the default 2.11 build drops those before Turing."""
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
    if device.type == "mps":  # macOS provides many of its kernels
        return f"mps ({platform.machine()}, macOS {platform.mac_ver()[0]})"
    return f"{device.type} ({platform.processor() or platform.machine()})"


def activations(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of the activations and why; `auto` is the fastest in hardware."""
    if wanted != "auto":
        return getattr(torch, wanted), f"{wanted} as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "bfloat16: this GPU has it in hardware"
        return torch.float16, "float16 with loss scaling: this GPU has no bfloat16"
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
            return False, "not compiled: torch.compile has given wrong results on MPS"
        if parameters < _COMPILE_FROM_PARAMETERS:
            return False, "not compiled: the model is too small to benefit"
        compilers = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if device.type == "cpu" and not compilers:
            return False, "not compiled: no C++ compiler found (g++ doubles the speed)"
    try:
        link_from_any_folder()
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # whatever fails, do without
        return False, _not_compiled(error)
    return True, "compiled"


@cache
def link_from_any_folder() -> None:
    """Let torch.compile work where the path of torch or Python has a space, as a clone in "my
    project" has: torch up to 2.13 quotes the folders of headers, not of libraries (pytorch#191010).
    """
    from torch._inductor.cpp_builder import BuildOptionsBase

    folders = BuildOptionsBase.get_libraries_dirs
    quoted = lambda self: [shlex.quote(folder) for folder in folders(self)]  # noqa: E731
    setattr(BuildOptionsBase, folders.__name__, quoted)


def _not_compiled(why: object) -> str:
    """The reason, from the message of a compiler or a check."""
    headers = "; install Python's headers, such as python3-dev" * ("Python.h" in str(why))
    return f"not compiled: torch.compile failed ({in_short(why)}{headers})"


def in_short(error: object) -> str:
    """A compiler's message, without its command line and torch's advice."""
    words = re.sub(r" Command: .* Output: | Set TORCHDYNAMO_.*", " ", " ".join(str(error).split()))
    return words.strip()[:200] or type(error).__name__


def _keep_freed_memory() -> None:
    """Let glibc reuse large buffers, instead of unmapping them and faulting them in each step."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
