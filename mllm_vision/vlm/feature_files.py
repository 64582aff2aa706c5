"""Features of a frozen tower on disk, found by the content of their images: the files of `feature_cache`.

A cache is a folder: `cache.json` says what the features depend on, and each pair of `<part>.features` (raw rows, read
memory-mapped) and `<part>.npz` (whose images they are) holds some images. Images are found by their content, so that
another data set, order or run with the same images uses the same features. Parts appear whole or not at all: an
interrupted run keeps those it finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mllm_vision.data.images.files import BadImage, describe, image_source

_DESCRIPTION = "cache.json"
_PART_BYTES = 2**30  # of one part: what an interrupted run computes again, at most
_PLAIN = {torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64, torch.bfloat16: np.int16}
_WORDS = {
    "weights": "vision tower, by the hash of its weights",
    "tower": "vision tower or selected layer",
    "system": "system or settings of it",
    "images": "image processor or layout",
    "precision": "precision of the tower",
    "dtype": "type of the features",
}
_LONG = ("tower", "system", "images")  # values that are not shown


def content_key(value: Any) -> bytes:
    """16 bytes that depend on the content of an image cell alone: its encoded bytes, or the pixels of a decoded image.

    Raises:
        BadImage: a missing value, or a file that cannot be read.
    """
    source = image_source(value)
    mark = hashlib.blake2b(digest_size=16)
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except OSError as error:
            raise BadImage(f"{describe(value)} cannot be read: {error}") from error
    if isinstance(source, Image.Image):
        mark.update(repr((source.mode, source.size)).encode())
        source = source.tobytes()
    elif isinstance(source, np.ndarray):
        mark.update(repr((str(source.dtype), source.shape)).encode())
        source = np.ascontiguousarray(source).tobytes()
    mark.update(source)
    return mark.digest()


@dataclass(frozen=True)
class CachedImage:
    """An image whose features are in the cache: its place there, and its size for layouts that need it."""

    place: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as of a PIL image."""
        return self.width, self.height


class FeatureCache:
    """The features in a folder.

    Args:
        folder: of the cache; made if it is missing.
        description: what the features depend on, see `describe_features`.

    Raises:
        ValueError: the folder holds features of other weights or settings, or files of another kind.
    """

    def __init__(self, folder: str | os.PathLike, description: Mapping[str, str]) -> None:
        self.folder, self.description = Path(folder), dict(description)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_description()
        self.dtype: torch.dtype = getattr(torch, self.description["dtype"])
        self._parts: list[tuple[str, np.memmap]] = []
        self._index = _Index()
        self.reload()

    def _check_description(self) -> None:
        file = self.folder / _DESCRIPTION
        if not file.exists():
            others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
            if others:
                raise ValueError(
                    f"{self.folder} is not a feature cache (it holds {', '.join(others[:3])}); name an empty or a new "
                    "folder with --features_dir"
                )
            temporary = file.with_name(f".{uuid.uuid4().hex}.json")
            temporary.write_text(json.dumps(self.description, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, file)
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, words in _WORDS.items():
            if (was := found.get(name)) != (now := self.description[name]):
                values = f" ({str(was)[:40]} there, {str(now)[:40]} here)" if name not in _LONG else ""
                raise ValueError(
                    f"the features in {self.folder} are of another run, which had another {words}{values}; name "
                    "another folder with --features_dir, or delete this one"
                )

    def reload(self) -> None:
        """Finds the parts that this and other processes have finished."""
        self._parts, self._index = [], _Index()
        for file in sorted(self.folder.glob("[!.]*.npz")):
            with np.load(file, allow_pickle=False) as stored:
                columns = {name: stored[name] for name in stored.files}
            shape = (int(columns["rows"][-1]), *columns.pop("row_shape").tolist())
            data = np.memmap(file.with_suffix(".features"), dtype=_PLAIN[self.dtype], mode="r", shape=shape)
            self._index.add(columns, len(self._parts))
            self._parts.append((file.stem, data))
        self._index.sort()

    def __getstate__(self) -> dict[str, Any]:  # a memory map would be copied into every worker process
        return {"folder": self.folder, "description": self.description}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["description"])  # type: ignore[misc]

    def __len__(self) -> int:
        """The number of images."""
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return self._index.find(key) is not None

    def find(self, value: Any) -> CachedImage:
        """The entry of an image cell.

        Raises:
            BadImage: it has none, because the image could not be read when the features were computed.
        """
        place = self._index.find(content_key(value))
        if place is None:
            raise BadImage(f"{describe(value)} has no features in {self.folder}", "the image has no cached features")
        return CachedImage(place, *self._index.sizes[place].tolist())

    def read(self, images: Sequence[CachedImage]) -> dict[str, Tensor]:
        """ "image_features" `[images or tiles, ...]` and the layout's other tensors of some images, in their order."""
        pieces = []
        for image in images:
            part, start, stop = self._index.where(image.place)
            pieces.append(torch.from_numpy(np.array(self._parts[part][1][start:stop])))
        found = {"image_features": torch.cat(pieces)}
        if self.dtype is torch.bfloat16:
            found["image_features"] = found["image_features"].view(torch.bfloat16)
        places = [image.place for image in images]
        return found | {name: torch.from_numpy(column[places]) for name, column in self._index.others.items()}

    def write(self, entries: Iterable[tuple[bytes, Tensor, tuple[int, int], Mapping[str, Tensor]]]) -> None:
        """Adds images in parts; call `reload` afterwards.

        Args:
            entries: key, features `[rows, ...]`, (height, width), and the layout's other tensors, one row each.

        Raises:
            OSError: the folder cannot be written; the parts finished before are kept.
        """
        entries = iter(entries)
        while self._write_part(entries):
            pass

    def _write_part(self, entries: Iterator[tuple[bytes, Tensor, tuple[int, int], Mapping[str, Tensor]]]) -> bool:
        """Writes one part; False when there was nothing left to write."""
        name = uuid.uuid4().hex
        temporary = self.folder / f".{name}.features"
        keys, rows, sizes, others, shape = [], [0], [], [], None
        try:
            # Written as a plain file: a full disk is an error here, but a crash through a memory map.
            with temporary.open("wb") as file:
                for key, features, size, more in entries:
                    features = features.detach().to("cpu", self.dtype).contiguous()
                    shape = features.shape[1:]
                    plain = features.view(torch.int16) if self.dtype is torch.bfloat16 else features
                    plain.numpy().tofile(file)
                    keys.append(key)
                    rows.append(rows[-1] + len(features))
                    sizes.append(size)
                    others.append({name: value.cpu().numpy() for name, value in more.items()})
                    if file.tell() >= _PART_BYTES:
                        break
            if shape is None:
                return False
            columns: dict[str, Any] = {
                f"tensor:{name}": np.concatenate([o[name] for o in others]) for name in others[0]
            }
            columns |= {"keys": np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2), "row_shape": np.array(shape)}
            columns |= {"rows": np.array(rows, np.int64), "sizes": np.array(sizes, np.int32)}
            index = self.folder / f".{name}.npz"
            with index.open("wb") as file:
                np.savez(file, **columns)
            os.replace(temporary, self.folder / f"{name}.features")
            os.replace(index, self.folder / f"{name}.npz")  # last: a part counts from here on
            return True
        except OSError as error:
            raise OSError(
                f"features cannot be written to {self.folder}: {error}; name a folder with room with --features_dir, "
                "or leave --cache_features out"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


class _Index:
    """Content keys to places in parts: 16 bytes an image and a few numbers, searched by bisection."""

    def __init__(self) -> None:
        self._columns: list[dict[str, np.ndarray]] = []
        self._keys = np.zeros((0, 2), np.uint64)
        self._order = np.zeros(0, np.int64)
        self.sizes = np.zeros((0, 2), np.int32)
        self.others: dict[str, np.ndarray] = {}
        self._places = np.zeros((0, 3), np.int64)  # part, first row, row after the last

    def add(self, columns: dict[str, np.ndarray], part: int) -> None:
        rows = columns["rows"]
        columns["places"] = np.stack([np.full(len(rows) - 1, part), rows[:-1], rows[1:]], axis=1)
        self._columns.append(columns)

    def sort(self) -> None:
        if not self._columns:
            return
        joined = {
            name: np.concatenate([each[name] for each in self._columns]) for name in self._columns[0] if name != "rows"
        }
        self._columns = []
        self._order = np.lexsort((joined["keys"][:, 1], joined["keys"][:, 0]))
        self._keys, self.sizes, self._places = joined["keys"][self._order], joined["sizes"], joined["places"]
        self.others = {name[len("tensor:") :]: value for name, value in joined.items() if name.startswith("tensor:")}

    def __len__(self) -> int:
        return len(self._order)

    def find(self, key: bytes) -> int | None:
        first, second = np.frombuffer(key, np.uint64)
        at = int(np.searchsorted(self._keys[:, 0], first))
        while at < len(self._keys) and self._keys[at, 0] == first:
            if self._keys[at, 1] == second:
                return int(self._order[at])
            at += 1
        return None

    def where(self, place: int) -> list[int]:
        return self._places[place].tolist()


class CachedLayout:
    """An `ImageLayout` whose images are cached features: tokens as before, "image_features" in place of pixels.

    It takes the layout's place in a data set and its collator, which then decode no image.
    """

    def __init__(self, layout: Any, cache: FeatureCache) -> None:
        self.layout, self.cache = layout, cache

    def __getattr__(self, name: str) -> Any:
        if name in ("layout", "cache"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.layout, name)

    def load(self, value: Any) -> CachedImage:
        """The image's entry in the cache."""
        return self.cache.find(value)

    def __call__(self, images: Sequence[CachedImage], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        return self.cache.read(images)
