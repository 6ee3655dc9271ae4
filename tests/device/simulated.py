"""A second device for torch, ``sim``, that computes on the CPU: it shows on any machine what would fail on a GPU.

- An operation that mixes its tensors with CPU tensors fails, as on CUDA; only 0-d CPU tensors may join.
- Every kernel is the CPU's, so results have the CPU's bytes.
- Transfers and scalar reads are counted: each scalar read makes a program wait for a GPU.

The device lives in torch's Python backend (torch 2.10 or newer). What `register` does to a process cannot be undone:
``torch.accelerator`` then names this device, which changes what other libraries do. Tests therefore use it in a process
of their own (`device_runs.DeviceProcess`).

Differences to CUDA, all harmless here: a tensor's strides look contiguous, so that a view of a transposed tensor
copies where CUDA would refuse; there are no streams, so nothing runs at the same time as the host; and there is no
`torch.Generator` of the device, because the package draws all random numbers on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

NAME = "sim"
DEVICE = f"{NAME}:0"
MINIMUM_TORCH = (2, 10)

#: operations whose result has a size that depends on values: on CUDA the host waits for it
_SIZED_BY_VALUES = ("nonzero", "masked_select", "bincount", "unique", "_unique2", "unique_dim", "unique_consecutive")
#: operations that wait likewise where a mask is among their indices
_SELECTS = ("index", "index_put", "index_put_", "_index_put_impl_")
#: operations that torch's own C++ code composes of others that are registered here
_COMPOSED_IN_CPP = ("_to_copy", "copy", "to", "_copy_from")


@dataclass
class Transfers:
    """What crossed between the host and the device.

    Attributes:
        uploads: Size in bytes of every tensor that was copied to the device, in order.
        downloads: Size in bytes of every tensor of several elements that was copied to the host, in order.
        scalar_reads: How often the host read a single number.
        value_sizes: How often the host waited to learn the size of a result (``nonzero``, selection by a mask).
    """

    uploads: list[int] = field(default_factory=list)
    downloads: list[int] = field(default_factory=list)
    scalar_reads: int = 0
    value_sizes: int = 0


_lock = threading.Lock()
_recorders: list[Transfers] = []


@contextmanager
def recording() -> Iterator[Transfers]:
    """Count the transfers of all threads while the context lasts."""
    transfers = Transfers()
    with _lock:
        _recorders.append(transfers)
    try:
        yield transfers
    finally:
        with _lock:
            _recorders.remove(transfers)


def _record(add: Callable[[Transfers], None]) -> None:
    with _lock:
        for transfers in _recorders:
            add(transfers)


def _add_upload(nbytes: int, transfers: Transfers) -> None:
    transfers.uploads.append(nbytes)


def _add_download(nbytes: int, transfers: Transfers) -> None:
    transfers.downloads.append(nbytes)


def _add_scalar_read(transfers: Transfers) -> None:
    transfers.scalar_reads += 1


def _add_value_size(transfers: Transfers) -> None:
    transfers.value_sizes += 1


class SimulatedTensor(torch.Tensor):
    """A tensor of the device.

    Attributes:
        on_cpu: Its values, a CPU tensor of the same shape.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> SimulatedTensor:
        tensor = torch._C._acc.create_empty_tensor(values.shape, values.dtype)
        tensor.__class__ = cls
        return tensor

    def __init__(self, values: torch.Tensor):
        self.on_cpu = values
        _remember(self)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"SimulatedTensor({self.on_cpu})"


#: by its storage's address, the values of every tensor; see `_values_of`
_by_storage: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
_next_purge = 1 << 10


def _remember(tensor: SimulatedTensor) -> None:
    global _next_purge
    storage = tensor.untyped_storage()
    with _lock:
        _by_storage[storage._cdata] = StorageWeakRef(storage), tensor.on_cpu
        if len(_by_storage) >= _next_purge:
            for address in [a for a, (reference, _) in _by_storage.items() if reference.expired()]:
                del _by_storage[address]
            _next_purge = 2 * len(_by_storage) + (1 << 10)


def _values_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values. Autograd saves results as tensors that share their storage and are no `SimulatedTensor`."""
    return tensor.on_cpu if isinstance(tensor, SimulatedTensor) else _by_storage[tensor.untyped_storage()._cdata][1]


def _is_simulated(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def supported() -> bool:
    """Whether this torch has the Python backend."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return version >= MINIMUM_TORCH and hasattr(torch._C, "_acc")


@cache
def register() -> torch.device:
    """Register the device in this process, once and for good.

    Returns:
        ``sim:0``.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_compute, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name, function in _IMPLEMENTATIONS.items():
        aten.impl(name, function, "PrivateUse1")
    for name, operation in _composed_operations():
        try:
            aten.impl(name, partial(_compute, operation), "PrivateUse1")
        except RuntimeError:  # one that torch does not let a backend replace
            continue
    _libraries.extend((everything, aten))
    return torch.device(DEVICE)


_libraries: list[torch.library.Library] = []  # a registration ends with its library


def _composed_operations() -> Iterator[tuple[str, Any]]:
    """Operations that C++ composes of others and that would give tensors without `SimulatedTensor.on_cpu`."""
    keys = ("CompositeExplicitAutogradNonFunctional", "CompositeExplicitAutograd")
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        base, _, overload = name.partition(".")
        if namespace != "aten" or base in _COMPOSED_IN_CPP or name in _IMPLEMENTATIONS:
            continue
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key) for key in keys):
            continue
        operation = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operation is not None and not any(map(_is_written, operation._schema.arguments)):
            yield name, operation


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _on_cpu(operation: Any, value: Any) -> Any:
    """An argument as the CPU's kernel takes it.

    Raises:
        RuntimeError: a CPU tensor among the device's.
    """
    if _is_simulated(value):
        return _values_of(value)
    if isinstance(value, torch.Tensor) and value.ndim:
        shape = tuple(value.shape)
        raise RuntimeError(f"{operation}: a {value.device} tensor {shape} in an operation of the device {NAME}")
    return torch.device("cpu") if isinstance(value, torch.device) and value.type != "cpu" else value


def _waits_for_a_size(operation: Any, args: Sequence[Any]) -> bool:
    """Whether the host must wait for values, to know how large the result is or which elements a mask selects."""
    name = operation._schema.name.removeprefix("aten::")
    if name not in _SELECTS:
        return name in _SIZED_BY_VALUES
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation, by the CPU's kernel; what it writes to in place stays the same tensor."""
    kwargs.pop("pin_memory", None)
    if _waits_for_a_size(operation, args):
        _record(_add_value_size)
    if operation._schema.name.startswith("aten::bitwise_"):  # the only ones that want their numbers as tensors
        wanted = [str(argument.type) for argument in operation._schema.arguments]
        args = tuple(
            torch.tensor(x) if kind == "Tensor" and isinstance(x, int) else x
            for kind, x in zip(wanted, args, strict=False)
        )
    argument_on_cpu = partial(_on_cpu, operation)
    result = operation(*tree_map(argument_on_cpu, args), **tree_map(argument_on_cpu, kwargs))
    for i, argument in enumerate(operation._schema.arguments):
        target = args[i] if i < len(args) else kwargs.get(argument.name)
        if _is_written(argument) and isinstance(target, SimulatedTensor):
            if target.on_cpu.shape != target.shape:
                raise RuntimeError(f"{operation} resized its output, which the device {NAME} cannot do")
            if isinstance(result, torch.Tensor):
                return target
    return tree_map(lambda x: SimulatedTensor(x) if isinstance(x, torch.Tensor) else x, result)


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Between the host and the device, or within the device. Values are cast first, so the target's size counts."""
    if isinstance(source, SimulatedTensor) and isinstance(target, SimulatedTensor):
        target.on_cpu.copy_(source.on_cpu)
    elif isinstance(source, SimulatedTensor):
        _record(_add_scalar_read if source.numel() == 1 else partial(_add_download, target.nbytes))
        target.copy_(source.on_cpu)
    else:
        assert isinstance(target, SimulatedTensor)
        _record(partial(_add_upload, target.nbytes))
        target.on_cpu.copy_(source)
    return target


def _read_scalar(tensor: SimulatedTensor) -> object:
    _record(_add_scalar_read)
    return tensor.on_cpu.item()


def _reshape(tensor: SimulatedTensor, size: Any, stride: Any = None) -> SimulatedTensor:
    """A view, or a copy of what only looks contiguous."""
    return SimulatedTensor(tensor.on_cpu.reshape(size))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> SimulatedTensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, *, dtype: Any = None, **options: Any) -> SimulatedTensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype))


def _arange(*bounds: Any, dtype: Any = None, **options: Any) -> SimulatedTensor:
    return SimulatedTensor(torch.arange(*bounds, dtype=dtype))


_IMPLEMENTATIONS: dict[str, Callable] = {
    "_copy_from": _copy,
    "_local_scalar_dense": _read_scalar,
    "_reshape_alias": _reshape,
    "view": _reshape,
    "_unsafe_view": _reshape,
    "empty_strided": _empty_strided,
    "empty.memory_format": _empty,
    "arange": _arange,
    "arange.start": _arange,
    "arange.start_step": _arange,
}
