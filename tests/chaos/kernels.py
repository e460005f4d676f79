"""Silent faults of device kernels, each applicable to any operation that it fits.

Backends have shipped such faults: pytorch#109457 (rows from the eighth on), #161640 and #181133
(strided inputs), #182285 (masks), #193385 (a lost write), #195163 (the end of a long sum).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_MAKE_NOTHING = {"_unsafe_view", "_local_scalar_dense", "empty", "empty_like", "new_empty"}
_BLOCKS = 16  # into which an operation's work is split
_SUMS: dict[str, int | None] = {  # summing operations: the argument with the dimensions
    "sum": 1, "mean": 1, "logsumexp": 1, "linalg_vector_norm": 2, "_softmax": 1, "_log_softmax": 1,
    "max": 1, "amax": 1, "mm": None, "bmm": None, "_foreach_norm": None, "dot": None,
}  # fmt: skip
_LOOKS_UP = ("embedding", "index", "gather", "scatter")


def name_of(func: Any) -> str:
    """An operation's name without its overload."""
    return func._schema.name.removeprefix("aten::")


def computes(func: Any) -> bool:
    """Whether an operation creates or writes numbers and is not a view."""
    schema = func._schema
    made = any(value.alias_info is None for value in schema.returns)
    return name_of(func) not in _MAKE_NOTHING and (made or bool(_written_to(func)))


def _written_to(func: Any) -> list[int]:
    arguments = enumerate(func._schema.arguments)
    return [i for i, each in arguments if each.alias_info is not None and each.alias_info.is_write]


@dataclass
class Call:
    """One completed call of an operation: its inputs and what it wrote."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None

    def make(self) -> "Call":
        """Compute, keeping the previous contents."""
        names = [each.name for each in self.func._schema.arguments]
        places = _written_to(self.func)
        given = [self.args[i] if i < len(self.args) else self.kwargs.get(names[i]) for i in places]
        self.parts = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        self.before = [x.clone() for x in self.parts]
        self.result = self.func(*self.args, **self.kwargs)
        fresh = [] if self.parts else self.result
        self.written = [*self.parts, *(x for x in tree_leaves(fresh) if isinstance(x, Tensor))]
        self.inputs = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]
        return self

    def again(self, change: Callable[[Tensor], Tensor], only: int | None = None) -> None:
        """Recompute with changed inputs, all of them or only one argument."""
        for part, before in zip(self.parts, self.before, strict=True):
            part.copy_(before)

        def changed(x: Any) -> Any:
            ours = isinstance(x, Tensor) and not any(x is part for part in self.parts)
            return change(x) if ours else x

        args = [tree_map(changed, x) if only in (None, i) else x for i, x in enumerate(self.args)]
        self.replace(args, self.kwargs if only is not None else tree_map(changed, self.kwargs))

    def replace(self, args: Any, kwargs: Any) -> None:
        """Replace the result with that of other arguments."""
        made = self.func(*args, **kwargs)
        if not self.parts:
            others = (x for x in tree_leaves(made) if isinstance(x, Tensor))
            for ours, other in zip(self.written, others, strict=True):
                ours.copy_(other)


@dataclass(frozen=True)
class Fault:
    """When a kernel is wrong, and what it then does."""

    name: str
    when: Callable[[Call], bool]
    harm: Callable[[Call], None]


def _floats(call: Call) -> list[Tensor]:
    return [x for x in call.written if x.is_floating_point() and x.numel()]


def _flat(change: Callable[[Tensor], Any], tensors: Callable[[Call], list[Tensor]]) -> Any:
    """Change tensors as if they were one-dimensional."""

    def harm(call: Call) -> None:
        for x in tensors(call):
            flat = x.flatten().clone()
            change(flat)
            x.copy_(flat.view(x.shape))

    return harm


def _of_size(least: int) -> Callable[[Call], list[Tensor]]:
    return lambda call: [x for x in call.written if x.numel() >= least]


def _from(start: int) -> Fault:
    def zero(flat: Tensor) -> None:
        flat[start:] = 0

    large = _of_size(start + 1)
    return Fault(f"nothing from element {start:,} on", lambda c: bool(large(c)), _flat(zero, large))


def _scattered(flat: Tensor) -> None:
    flat[::64] *= 1.03


def _last_zero(flat: Tensor) -> None:
    flat[-(len(flat) // _BLOCKS) :] = 0


def _last_stale(flat: Tensor) -> None:
    size = len(flat) // _BLOCKS
    flat[-size:] = flat[:size].clone()


def _no_number(flat: Tensor) -> None:
    flat[len(flat) // 2] = torch.nan


def _of_type(dtype: torch.dtype) -> Fault:
    def ours(call: Call) -> list[Tensor]:
        return [x for x in _floats(call) if x.dtype == dtype]

    def harm(flat: Tensor) -> None:
        flat *= 1.1

    name = f"{str(dtype).removeprefix('torch.')} is 10% off"
    return Fault(name, lambda call: bool(ours(call)), _flat(harm, ours))


def _few_rows(call: Call) -> list[Tensor]:
    return [x for x in _floats(call) if x.ndim >= 2 and x.shape[-2] <= 8 < x.shape[-1]]


def _ten_percent(flat: Tensor) -> None:
    flat *= 1.1


def _many_rows(call: Call) -> list[Tensor]:
    return [x for x in call.written if x.ndim >= 2 and x.shape[0] > 8]


def _drop_rows(call: Call) -> None:
    for x in _many_rows(call):
        x[8:] = 0


def _lose(call: Call, last: int = 0) -> None:
    for part, before in list(zip(call.parts, call.before, strict=True))[-last:]:
        part.copy_(before)


def _cut_sum(call: Call) -> None:
    """Leave out the last block of a sum by zeroing it in one input."""
    where = _SUMS[name_of(call.func)]
    given = call.args[where] if where is not None and len(call.args) > where else None
    dims = [given] if isinstance(given, int) else given or [-1]

    def cut(x: Tensor) -> Tensor:
        x = x.clone()
        for dim in dims if x.ndim else ():
            size = -(-x.shape[dim] // _BLOCKS)
            x.narrow(dim, x.shape[dim] - size, size).zero_()
        return x

    call.again(cut, only=0)


def _masks(call: Call) -> bool:
    return any(x.dtype == torch.bool for x in call.inputs)


def _is_attention(call: Call) -> bool:
    return "attention" in name_of(call.func)


def _unmask(call: Call) -> None:
    """Attention that is not causal and ignores its mask; lower triangles that are not cut."""
    if name_of(call.func).startswith(("tril", "triu")):
        call.written[0].copy_(call.args[0])
        return
    args = [False if x is True else x for x in call.args]
    given = call.kwargs.items()
    call.replace(args, {k: torch.zeros_like(x) if isinstance(x, Tensor) else x for k, x in given})


def _whole(call: Call) -> bool:
    return _is_attention(call) or name_of(call.func).startswith(("tril", "triu"))


def _wide_ids(x: Tensor) -> bool:
    return x.dtype == torch.int64 and bool(x.numel()) and int(x.max()) >= 1 << 15


def _wraps(call: Call) -> bool:
    looks_up = any(word in name_of(call.func) for word in _LOOKS_UP)
    return looks_up and any(map(_wide_ids, call.inputs))


def _wrap(call: Call) -> None:
    call.again(lambda x: x % (1 << 15) if _wide_ids(x) else x)


def _saturates(call: Call) -> bool:
    return name_of(call.func) in ("mul", "add") and call.written[0].dtype == torch.int32


def _saturate(call: Call) -> None:
    wide = call.func(*(x.long() if isinstance(x, Tensor) else x for x in call.args))
    call.written[0].copy_(wide.clamp(-(1 << 31), (1 << 31) - 1))


def _rows_of(x: Tensor) -> Tensor | None:
    """A strided tensor read as if contiguous, if there is enough memory."""
    size = x.untyped_storage().nbytes() // x.itemsize
    if x.is_contiguous() or x.storage_offset() + x.numel() > size:
        return None
    return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride())


def _misread(call: Call) -> None:
    def misread(x: Tensor) -> Tensor:
        found = _rows_of(x)
        return x if found is None else found

    call.again(misread)


FAULTS = [
    Fault("one element in 64 is 3% off", lambda c: bool(_floats(c)), _flat(_scattered, _floats)),
    Fault(
        "the last block is zero",
        lambda c: bool(_of_size(_BLOCKS)(c)),
        _flat(_last_zero, _of_size(_BLOCKS)),
    ),
    Fault(
        "the last block is stale",
        lambda c: bool(_of_size(_BLOCKS)(c)),
        _flat(_last_stale, _of_size(_BLOCKS)),
    ),
    Fault("one element is NaN", lambda c: bool(_floats(c)), _flat(_no_number, _floats)),
    _of_type(torch.float32),
    _of_type(torch.bfloat16),
    _from(1 << 16),
    _from(1 << 20),
    Fault("nothing from row 8 on", lambda c: bool(_many_rows(c)), _drop_rows),
    Fault("few rows are 10% off", lambda c: bool(_few_rows(c)), _flat(_ten_percent, _few_rows)),
    Fault("the write is lost", lambda c: bool(c.parts), _lose),
    Fault("the last of several outputs is lost", lambda c: len(c.parts) > 1, lambda c: _lose(c, 1)),
    Fault("sums lack their last block", lambda c: name_of(c.func) in _SUMS, _cut_sum),
    Fault(
        "booleans are inverted",
        _masks,
        lambda c: c.again(lambda x: ~x if x.dtype == torch.bool else x),
    ),
    Fault("masks are ignored", _whole, _unmask),
    Fault("ids from 32,768 on wrap", _wraps, _wrap),
    Fault("integers saturate", _saturates, _saturate),
    Fault(
        "strided inputs are read as contiguous",
        lambda c: any(_rows_of(x) is not None for x in c.inputs if x.numel()),
        _misread,
    ),
]
