"""An accelerator for machines without one: tensors that say they lie on a device of another name than the CPU.

Each holds a plain tensor with its values, on which every operation is really done, so whole trainings and evaluations
run and give the CPU's numbers. What would go wrong on a GPU goes wrong here: a tensor left on the CPU that meets one of
the device is an error, and whatever the host reads back (a value, a number of rows that depends on values, a copy to
the CPU) is counted with its place in the code. Autocast has no kernels here: precision is for the suite on GPUs.

Registering the device changes torch for the whole process, so this is for a process of its own (`run_cases.py`).
Private names of torch, read in 2.13: `_setup_privateuseone_for_python_backend`, `_make_wrapper_subclass`.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "standin"
aten = torch.ops.aten
# results whose shape or value the host must know before it goes on
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal,
    aten.bincount, aten.unique_consecutive, aten.is_nonzero,
}  # fmt: skip
MOVES = {aten._to_copy, aten.copy_, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
READ_BACK: collections.Counter[str] = collections.Counter()  # place in the code -> how often, while counting
_counting = [False]


def register() -> torch.device:
    """Gives torch the device; once a process."""
    module = types.SimpleNamespace(
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16, torch.float32],
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        is_autocast_enabled=lambda: False,
        set_autocast_enabled=lambda on: None,
        get_autocast_dtype=lambda: torch.bfloat16,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    # These make a tensor in C++ and copy it to the device below where a mode could see it.
    plain, plain_as, plain_new = torch.tensor, torch.as_tensor, torch.Tensor.new_tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **more: Any) -> Any:
        made = plain(data, dtype=dtype)
        return (made if device is None else made.to(device)).requires_grad_(requires_grad)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Any:
        made = data if torch.is_tensor(data) else plain_as(data)
        return made.to(device=made.device if device is None else device, dtype=made.dtype if dtype is None else dtype)

    def new_tensor(self: Any, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        if torch.is_tensor(data):
            return plain_new(self, data, dtype=dtype, device=device, requires_grad=requires_grad)
        where = self.device if device is None else device
        return tensor(data, dtype=dtype or self.dtype, device=where, requires_grad=requires_grad)

    torch.tensor, torch.as_tensor, torch.Tensor.new_tensor = tensor, as_tensor, new_tensor
    torch.autograd.set_multithreading_enabled(False)  # a backward pass in a thread of its own would be in no mode
    return torch.device(NAME, 0)


def without_inference_mode() -> None:
    """Makes `torch.inference_mode` the same as `no_grad`, before anybody imports it: it hides tensors from modes."""
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode is True else torch.no_grad()(mode)


class OnDevice(torch.Tensor):
    """A tensor of the stand-in device; `raw` has its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnDevice:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=f"{NAME}:0", **layout)
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.raw!r})"

    def tolist(self) -> Any:
        """As of any tensor; torch refuses it to subclasses."""
        return self.cpu().tolist()


class Machine(TorchDispatchMode):
    """While it is entered, tensors can be made on the device and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter[str]]:
    """Counts what the host reads back inside."""
    READ_BACK.clear()
    _counting[0] = True
    try:
        yield READ_BACK
    finally:
        _counting[0] = False


def place(module: torch.nn.Module) -> torch.nn.Module:
    """The module's parameters and buffers on the device, as `Module.to` would have it; tied ones stay tied."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value.data, OnDevice):
                new = torch.nn.Parameter(OnDevice(value.detach()), requires_grad=value.requires_grad)
                part._parameters[name] = moved.setdefault(id(value), new)
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, OnDevice):
                part._buffers[name] = moved.setdefault(id(value), OnDevice(value))
    return module


def _is_ours(value: Any) -> bool:
    return isinstance(value, OnDevice)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if _is_ours(leaf)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted).type
    if not ours and wanted != NAME:
        return func(*args, **kwargs)
    packet = func.overloadpacket
    if ours:
        _look_for_reads(func, packet, args, wanted)
        if packet not in MOVES:
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor) and not _is_ours(leaf) and leaf.ndim > 0:
                    raise RuntimeError(
                        f"{func} met a tensor {list(leaf.shape)} on the {leaf.device} beside one on the {NAME}"
                    )
    known = {id(leaf.raw): leaf for leaf in ours}
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    bare_args, bare_kwargs = pytree.tree_map_only(OnDevice, lambda leaf: leaf.raw, (args, kwargs))
    found = func(*bare_args, **bare_kwargs)
    if packet is aten.copy_ and not _is_ours(args[0]):
        return args[0]
    stays = wanted in (None, NAME)

    def wrap(raw: torch.Tensor) -> torch.Tensor:
        if id(raw) in known:
            return known[id(raw)]
        return OnDevice(raw) if stays else raw

    return pytree.tree_map_only(torch.Tensor, wrap, found)


def _look_for_reads(func: Any, packet: Any, args: Any, wanted: str | None) -> None:
    read = packet in READS
    read |= packet is aten._to_copy and wanted == "cpu"
    read |= packet is aten.copy_ and not _is_ours(args[0])
    read |= packet is aten.repeat_interleave and len(args) == 1  # without the size of its output
    if packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
        read |= any(_is_ours(part) and part.dtype in (torch.bool, torch.uint8) for part in args[1] if part is not None)
    if read and _counting[0]:
        READ_BACK[f"{_whose()} {func}"] += 1


def is_of_the_package(file: str) -> bool:
    """Whether a source file is the toolkit's own."""
    return "/mllm_vision/" in file and "/site-packages/" not in file


def _whose() -> str:
    for frame in reversed(traceback.extract_stack()):
        if is_of_the_package(frame.filename):
            return f"{frame.filename.rpartition('/mllm_vision/')[2]}:{frame.lineno}"
    return "elsewhere"
