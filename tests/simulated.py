"""A simulated device: tensors that claim to be on `cuda:0` or `mps:0`, computed by the CPU.

It rejects what a GPU or a Mac would reject: tensors of two devices in one operation, float64 on
MPS, NumPy on a device tensor. Everything else is computed, so whole runs can be compared with the
CPU's. It tells nothing about a device's own kernels, memory or speed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from sota_transformer.config import Model
from sota_transformer.model.transformer import Transformer

SHAPE = Model(layers=2, d_model=128, heads=2, kv_heads=1, d_ff=64, seq_len=24, vocab_size=300)
aten = torch.ops.aten
_CROSSING = (aten.copy_.default, aten._to_copy.default, aten._copy_from.default)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_PRODUCTS = [getattr(aten, name).default for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")]
_PRODUCTS.append(aten.mm.out)
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


def small() -> Transformer:
    model = Transformer(dataclasses.replace(SHAPE, qk_norm=True))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


class DeviceTensor(Tensor):
    """A tensor on the device; `here` holds its values."""

    here: Tensor
    kind = "cuda"  # the simulated device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "DeviceTensor":
        if cls.kind == "mps" and here.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        self = Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device="cpu",
        )  # fmt: skip
        self.here = here
        return self

    @property
    def device(self) -> torch.device:
        """The claimed device; with an index, as on real devices."""
        return torch.device(self.kind, 0)

    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: self.kind == "cuda")
    is_mps = property(lambda self: self.kind == "mps")

    def __repr__(self) -> str:
        return f"DeviceTensor({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        refuse_mixture(func, args, kwargs)
        if cls.kind == "mps" and func in _PRODUCTS:
            refuse_long_sum(args)
            refuse_part(kwargs.get("out", args[0] if func is aten.addmm_.default else None))
        SimulatedDevice.now.seen.add(func)
        if kwargs.get("device") is not None:  # from autograd, which only knows the CPU
            kwargs["device"] = "cpu"
        inner = tree_map(lambda x: x.here if isinstance(x, DeviceTensor) else x, (args, kwargs))
        result = SimulatedDevice.now.compute(func, *inner)
        if func is aten._local_scalar_dense.default:
            SimulatedDevice.now.waits.append("item")
        result = tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, result)
        return return_and_correct_aliasing(func, args, kwargs, result)


def refuse_mixture(func: Any, args: Any, kwargs: Any) -> None:
    """Reject what a device rejects; CPU scalars, indices and copies may cross over."""
    if func in _CROSSING:
        return
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if func in _INDEXING:
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
    least = 0 if func is aten._fused_adamw_.default else 1  # fewest dimensions that may not cross
    strangers = [x for x in tensors if not isinstance(x, DeviceTensor) and x.ndim >= least]
    if strangers:
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two "
            f"devices, {DeviceTensor.kind}:0 and cpu!"
        )


def refuse_long_sum(args: Any) -> None:
    """M1 and M2 also sum memory beyond the operands (pytorch#195163)."""
    a, b = args[-2:]
    if a.shape[-1] >= 32_767 and min(a.shape[-2], b.shape[-1]) >= 16:
        raise AssertionError(f"a product that sums {a.shape[-1]:,} terms")


def refuse_part(out: Tensor | None) -> None:
    """On macOS 14 a product written into part of a tensor is lost (pytorch#193385)."""
    if out is not None and (out.storage_offset() or not out.is_contiguous()):
        raise AssertionError("a product written into part of a tensor")


class SimulatedDevice(TorchFunctionMode):
    """Redirects creation on the device and transfers to and from it to `DeviceTensor`."""

    now: "SimulatedDevice"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.seen: set[Any] = set()  # operations executed
        self.waits: list[str] = []  # what would have blocked on the device
        # The device's kernels; `tests.chaos.broken` replaces them.
        self.compute: Callable[..., Any] = lambda func, args, kwargs: func(*args, **kwargs)

    def _ours(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == self.kind

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.cpu and isinstance(args[0], DeviceTensor):
            return self._to(args[0], "cpu")
        if func is Tensor.tolist and isinstance(args[0], DeviceTensor):
            self.waits.append("tolist")
            return args[0].here.tolist()
        if func is Tensor.numpy and isinstance(args[0], DeviceTensor):
            raise TypeError(f"can't convert {self.kind}:0 device type tensor to numpy")
        if func is Tensor.backward:  # activation checkpoints recompute inside it
            loss, one = args[:1], (torch.ones_like(args[0]),)
            with self:
                return _engine_run_backward(
                    loss, one, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func is F.linear and self.kind == "mps" and args[0].dtype != torch.float32:
            assert args[0].ndim == 2, "wrong on an M5"  # pytorch#180776
        sdpa = func is F.scaled_dot_product_attention and isinstance(args[0], DeviceTensor)
        if sdpa and self.kind == "mps":
            leaks = kwargs.get("is_causal") and args[0].dtype != torch.float32  # pytorch#195910
            assert not leaks, "three of four queries would see later tokens"
            assert not kwargs.get("enable_gqa"), "the process would crash"  # pytorch#149132
        if func is Tensor.pin_memory:
            if self.kind != "cuda":
                raise AssertionError("pinned memory without CUDA")
            copy = args[0].clone()
            copy.pinned = True  # type: ignore[attr-defined]
            return copy
        if func == _SET_DATA and isinstance(args[0], DeviceTensor):
            args[0].here = args[1].here
        if self._ours(kwargs.get("device")):
            made = func(*args, **(kwargs | {"device": "cpu"}))
            return made if isinstance(made, DeviceTensor) else DeviceTensor(made)
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        dtype = dtype or tensor.dtype
        away = isinstance(tensor, DeviceTensor)
        if device is None or self._ours(device) == away:
            same = dtype == tensor.dtype and not copy
            return tensor if same else aten._to_copy(tensor, dtype=dtype)
        if not self._ours(device):
            self.waits.append("copy from the device")
            return tensor.detach().here.to(dtype, copy=True)
        if not (non_blocking and getattr(tensor, "pinned", False)):
            self.waits.append("copy to the device")
        made = DeviceTensor(tensor.detach().to(dtype, copy=True))
        return made.requires_grad_(tensor.requires_grad)


@contextmanager
def simulated(kind: str, capability: tuple[int, int] = (8, 0)) -> Iterator[SimulatedDevice]:
    """A machine with one device of this kind, and without compilation."""
    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: kind == "cuda",
        "torch.backends.mps.is_available": lambda: kind == "mps",
        "torch.cuda.device_count": lambda: int(kind == "cuda"),
        "torch.cuda.set_device": lambda *_: None,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.is_current_stream_capturing": lambda: False,  # a CUDA build would query it
        "torch.accelerator.current_accelerator": lambda *_, **__: None,  # so would its optimizer
        "torch.mps.synchronize": lambda *_: None,
        "torch.cuda.get_device_name": lambda *_: "simulated",
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.max_memory_allocated": lambda *_: 64 << 30,
        "torch.cuda.mem_get_info": lambda *_: (64 << 30, 64 << 30),
        "torch.mps.set_per_process_memory_fraction": lambda _: None,
        "torch.mps.driver_allocated_memory": lambda *_: 64 << 30,
        "torch.mps.recommended_max_memory": lambda *_: 64 << 30,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(mock.patch.object(DeviceTensor, "kind", kind))
        for name in ("__enter__", "__exit__"):  # a wrapper cannot be an inference tensor
            method = getattr(torch.no_grad, name)
            stack.enter_context(mock.patch.object(torch.inference_mode, name, method))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        SimulatedDevice.now = stack.enter_context(SimulatedDevice(kind))
        yield SimulatedDevice.now
