"""Where an artifact came from: hashes of weights, and the `lineage.json` beside them.

A leaf (floor 0): the standard library and safetensors; torch only inside the functions that are handed tensors.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mllm_vision.utils import write_whole

LINEAGE_FILE = "lineage.json"

# safetensors' names of types -> the names torch uses, so that a file and a module give the same hash
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def _digest(entries: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> str:
    """One sha256 over (name, type, shape, bytes); the entries come in the order of the names."""
    total = hashlib.sha256()
    for name, kind, shape, data in entries:
        total.update(f"{name}|{kind}|{list(shape)}|".encode())
        total.update(data)
    return total.hexdigest()


def _file_entries(path: Path) -> Iterable[tuple[str, str, tuple[int, ...], memoryview]]:
    """The tensors of one safetensors file, read through a memory map in the published format."""
    import mmap
    import struct

    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack("<Q", mapped[:8])
        header = json.loads(mapped[8 : 8 + length])
        view = memoryview(mapped)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            kind = _TYPES.get(entry["dtype"], entry["dtype"])
            yield name, kind, tuple(entry["shape"]), view[8 + length + start : 8 + length + end]


def _tensor_bytes(tensor: Any) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def hash_parameters(named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> str:
    """sha256 over sorted (name, dtype, shape, bytes) of tensors, e.g. `module.named_parameters()`.

    The same tensors under the same names give the same hash, on whatever device they are.
    """
    pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return _digest(  # tensor by tensor: a large model on an accelerator never lies whole in memory here
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _tensor_bytes(tensor))
        for name, tensor in sorted(pairs, key=lambda pair: pair[0])
    )


def tensor_digests(named_tensors: Iterable[tuple[str, Any]], *, at_most: int | None = None) -> dict[str, str]:
    """sha256 of each tensor by itself, several at once; `combined` makes one of them.

    Args:
        named_tensors: (name, tensor); each is hashed once, however many hashes it becomes a part of.
        at_most: values of a tensor that are looked at, evenly spread. None: all. Enough to see whether it moved.
    """
    pairs = sorted(named_tensors, key=lambda pair: pair[0])

    def digest(pair: tuple[str, Any]) -> str:
        name, tensor = pair
        kind, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if at_most is not None and tensor.numel() > at_most:
            tensor = tensor.detach().reshape(-1)[:: -(-tensor.numel() // at_most)]
        return _digest([(name, kind, shape, _tensor_bytes(tensor))])

    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter to the others
        return dict(zip((name for name, _ in pairs), pool.map(digest, pairs), strict=True))


def combined(digests: Mapping[str, str]) -> str:
    """One sha256 of the digests of many tensors."""
    return hashlib.sha256("".join(f"{name}|{digests[name]}|" for name in sorted(digests)).encode()).hexdigest()


def _as_saved(module: Any) -> Mapping[str, Any]:
    """The state of `module` under the names that `save_pretrained` would write.

    transformers writes some models (Llava, ViT, DINOv2) under the names of their older releases, and leaves
    tied copies out; a hash of a module must see what a hash of its directory sees.
    """
    state = module.state_dict()
    if hasattr(module, "save_pretrained") and hasattr(module, "all_tied_weights_keys"):
        from transformers import modeling_utils

        state = modeling_utils.remove_tied_weights_from_state_dict(state, module)
        return modeling_utils.revert_weight_conversion(module, state)
    kept: dict[str, Any] = {}
    seen: set[tuple] = set()
    for name in sorted(state):  # one name per storage, the first: as safetensors' save_model keeps them
        tensor = state[name]
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        if key not in seen:
            seen.add(key)
            kept[name] = tensor
    return kept


def hash_weights(path_or_module: str | os.PathLike | Any) -> str:
    """sha256 of the weights of a directory (all its safetensors files), of one file, or of a module.

    The same tensors give the same hash either way, however the files are sharded.

    Raises:
        FileNotFoundError: the path does not exist or holds no safetensors file.
    """
    if hasattr(path_or_module, "state_dict"):
        return hash_parameters(_as_saved(path_or_module))
    path = Path(path_or_module)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{path} holds no *.safetensors file to hash; save the model with save_pretrained, which writes them"
        )
    return _digest(sorted((entry for file in files for entry in _file_entries(file)), key=lambda entry: entry[0]))


def read_lineage(path: str | os.PathLike) -> dict[str, Any] | None:
    """The lineage of the artifact in the directory `path`, or None where it carries none.

    Raises:
        ValueError: the file is there and is not valid JSON.
    """
    file = Path(path) / LINEAGE_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it, or delete it to do without") from error


def write_lineage(path: str | os.PathLike, lineage: Mapping[str, Any]) -> None:
    """Write `lineage.json` into the directory `path`, whole or not at all."""
    write_json(Path(path) / LINEAGE_FILE, lineage)


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON, whole or not at all.

    Numbers that JSON does not know (NaN, infinity) become null: browsers read these files.
    """
    write_whole(file, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` as what JSON holds: tensors and arrays become numbers and lists, anything else its text."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None  # inf - inf and nan - nan are nan
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return [plain(entry) for entry in sorted(value, key=str)]
    if hasattr(value, "tolist"):  # torch and numpy
        return plain(value.tolist())
    return str(value)


def check_lineage(path: str | os.PathLike) -> dict[str, Any] | None:
    """The lineage of the artifact in `path` after its weights were hashed again, or None where it carries none.

    Raises:
        ValueError: the weights are not those the lineage was written for; both hashes are named.
        FileNotFoundError: there is a lineage and no weights.
    """
    lineage = read_lineage(path)
    if lineage is None or not lineage.get("weights_sha256"):
        return lineage
    found = hash_weights(path)
    if found != lineage["weights_sha256"]:
        raise ValueError(
            f"the weights in {path} are not those its {LINEAGE_FILE} was written for: "
            f"lineage says {lineage['weights_sha256']}, the files give {found}. Restore the artifact from where it "
            f"was made; if the change was meant, delete {Path(path) / LINEAGE_FILE}"
        )
    return lineage
