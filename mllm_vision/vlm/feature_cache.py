"""A frozen tower's features of every training image, computed once and kept on disk for all ranks and runs.

Stage one runs a frozen tower on the same images in every epoch, and again in every run of a sweep over connectors.
`cache_features` writes its output for each image once; training then reads it in place of decoding the image and
running the tower. The values are those the tower gives, in its own type unless another is asked for.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.distributed import agree_on_error, all_reduce, communication_device, rank, world_size
from mllm_vision.hub.lineage import hash_parameters
from mllm_vision.vlm.feature_files import CachedLayout, FeatureCache, content_key

logger = logging.getLogger(__name__)

Values = Sequence[Sequence[Any]]  # row -> its image cells


def cache_features(
    task: Any,
    layout: Any,
    images: Values,
    *,
    folder: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    batch_size: int = 32,
) -> CachedLayout:
    """Computes the features of all images that the cache lacks, on all ranks, and gives the layout that reads them.

    Args:
        task: a `LanguageTask` whose encoder is frozen, on the device that computes.
        layout: its system's image layout.
        images: row -> the image cells of that row, for every row of the training data.
        folder: of the cache; by default one for these weights and settings in the cache of `datasets`.
        dtype: of the stored features; by default that of the tower's output, so that nothing is rounded.
        autocast: the type that training runs the tower in, if it uses autocast.
        batch_size: images at a time.

    Raises:
        ValueError: an encoder that trains, a blind model, features that cannot be stored image by image, a folder of
            other weights, or too little room on the disk.
        OSError: the folder cannot be written.
    """
    tower = _Tower(task, layout, autocast)
    cache, error = None, None
    try:
        tower.check()
        first = tower.first(images)
        dtype = dtype or first.dtype
        description = describe_features(task, layout, dtype, autocast)
        cache = FeatureCache(default_folder(description) if folder is None else folder, description)
        missing = _missing(cache, images)
        _check_room(cache, len(missing), first.numel() * dtype.itemsize)
    except Exception as problem:
        error = problem
    agree_on_error(error)
    assert cache is not None
    number, count = _share(cache.folder)
    try:
        cache.write(tower.entries(images, missing[number::count], batch_size))
    except Exception as problem:
        error = problem
    agree_on_error(error)
    cache.reload()
    return CachedLayout(layout, cache)


def describe_features(task: Any, layout: Any, dtype: torch.dtype, autocast: torch.dtype | None) -> dict[str, str]:
    """What the cached features depend on, as texts that are compared with those of a cache.

    Args:
        task: the `LanguageTask`.
        layout: its image layout.
        dtype: of the stored features.
        autocast: the type that autocast runs the tower in, or None.
    """
    model, system = task.model, task.system
    weights = {name: value for name, value in model.state_dict().items() if system.parts.group_of(name) == "encoder"}
    ignored = ("_", "transformers_version", "dtype", "torch_dtype")
    settings: dict[str, Any] = {}
    for number, part in enumerate(system.parts.modules(model, "encoder")):
        config = part.config.to_dict() if hasattr(part, "config") else {}
        settings |= {f"{number}.{name}": value for name, value in config.items() if not name.startswith(ignored)}
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        settings[name] = getattr(model.config, name, None)
    precision = _name(next(iter(weights.values())).dtype) + (
        f" under autocast to {_name(autocast)}" if autocast else ""
    )
    return {
        "weights": hash_parameters(weights),
        "tower": repr(sorted(settings.items())),
        "system": repr((system.name, vars(system.config))),
        "images": layout.identity(),
        "precision": precision,
        "dtype": _name(dtype),
    }


def default_folder(description: Mapping[str, str]) -> Path:
    """The folder of features with this description in the cache of `datasets`."""
    import hashlib

    import datasets

    mark = hashlib.blake2b(repr(sorted(description.items())).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "mllm_vision" / f"features-{mark}"


class _Tower:
    """The frozen tower of a task, as it runs in training."""

    def __init__(self, task: Any, layout: Any, autocast: torch.dtype | None) -> None:
        self.task, self.layout, self.autocast = task, layout, autocast

    def check(self) -> None:
        """Raises ValueError for a task whose features change in training, or are not used."""
        model, system = self.task.model, self.task.system
        trained = [
            name
            for name, value in model.named_parameters()
            if value.requires_grad and system.parts.group_of(name) == "encoder"
        ]
        if trained:
            raise ValueError(
                f"--cache_features keeps the output of a frozen encoder, but {len(trained)} of its tensors train "
                f"({trained[0]}, ...); leave encoder out of --train, or leave --cache_features out"
            )
        if self.task.blind:
            raise ValueError("--cache_features and a blind model are mutually exclusive: it sees no image")

    @torch.no_grad()
    def __call__(self, pixels: Mapping[str, Tensor]) -> Tensor:
        device = self.task.device
        inputs = {name: value.to(device, non_blocking=True) for name, value in pixels.items()}
        was_training = self.task.training
        self.task.eval()  # as in training, where frozen parts have no dropout
        try:
            with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
                return self.task.system.features(self.task.model, inputs)
        finally:
            self.task.train(was_training)

    def first(self, images: Values) -> Tensor:
        """The features of the first readable image.

        Raises:
            ValueError: there is none, or features depend on the other images of a batch.
        """
        found: list[Any] = []
        for row in range(len(images)):
            loaded = (judge(f"row {row}", self.layout.load, value) for value in images[row])
            found += [image for image in loaded if not isinstance(image, BadRow)]
            if len(found) > 1:
                break
        if not found:
            raise ValueError("none of the images can be read, so there are no features to cache")
        alone = self._split(found[:1])[0][0]
        together = self._split(found[:2])[0]
        if together[0].shape != alone.shape:
            name = type(self.layout).__name__
            raise ValueError(
                f"--cache_features: the features of an image depend on the others in its batch ({name} gives "
                f"{list(alone.shape)} alone and {list(together[0].shape)} beside another); leave it out"
            )
        return alone

    def _split(self, images: Sequence[Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """(features, the layout's tensors beside the pixels) of each image."""
        tensors = self.layout(images)
        if len(images) > 1 and "tiles" not in tensors and not self.layout.fixed:
            return [found for image in images for found in self._split([image])]  # as many tiles as its size asks for
        if "pixel_attention_mask" in tensors:
            raise ValueError(
                f"--cache_features: {type(self.layout).__name__} pads images of their own aspect, whose features "
                "depend on the batch; leave it out"
            )
        features = self(tensors)
        counts = tensors["tiles"].tolist() if "tiles" in tensors else [len(features) // len(images)] * len(images)
        if sum(counts) != len(features):
            raise ValueError(
                f"--cache_features: {len(features)} features of {len(images)} images of {type(self.layout).__name__} "
                "cannot be told apart; leave it out"
            )
        others = {name: value for name, value in tensors.items() if not name.endswith("pixel_values")}
        return [
            (part, {name: value[place : place + 1] for name, value in others.items()})
            for place, part in enumerate(features.split(counts))
        ]

    def entries(self, images: Values, places: np.ndarray, batch_size: int) -> Iterator[Any]:
        """What `FeatureCache.write` takes, for the images at (row, number) `places [n, 2]`."""
        total, done = len(places), 0
        for start in range(0, total, batch_size):
            values = [images[int(row)][int(number)] for row, number in places[start : start + batch_size]]
            loaded = [(value, judge("", self.layout.load, value)) for value in values]
            good = [(value, image) for value, image in loaded if not isinstance(image, BadRow)]
            if good:
                found = self._split([image for _, image in good])
                for (value, image), (features, others) in zip(good, found, strict=True):
                    yield content_key(value), features, (image.height, image.width), others
            done += len(values)
            if (done // batch_size) % 100 == 0:
                logger.info("features of %d of %d images", done, total)


def _missing(cache: FeatureCache, images: Values) -> np.ndarray:
    """(row, number) of every distinct image that the cache lacks, int64 `[n, 2]`."""
    seen: set[bytes] = set()
    found: list[tuple[int, int]] = []
    for row in range(len(images)):
        for number, value in enumerate(images[row]):
            key = judge(f"row {row}", content_key, value)
            if isinstance(key, bytes) and key not in seen and key not in cache:
                seen.add(key)
                found.append((row, number))
    return np.array(found, np.int64).reshape(-1, 2)


def _check_room(cache: FeatureCache, count: int, size: int) -> None:
    """Logs what the missing features take; ValueError if the disk has not that much room."""
    needed, free = count * size, shutil.disk_usage(cache.folder).free
    if rank() == 0:
        logger.info(
            "features in %s: %d images are there, %d are computed now (%s of %s free)",
            *(cache.folder, len(cache), count, _size(needed), _size(free)),
        )
    if needed > 0.95 * free:
        raise ValueError(
            f"the features of {count} images take {_size(needed)}, but {cache.folder} has {_size(free)} free; name a "
            "folder on a larger disk with --features_dir, store them rounded with --features_dtype bfloat16, or leave "
            "--cache_features out"
        )


def _share(folder: Path) -> tuple[int, int]:
    """(number, count) of this rank among those that write to this folder: all, or those of its machine."""
    if world_size() == 1:
        return 0, 1
    mark = folder / ".shared"
    if rank() == 0:
        mark.touch()
    agree_on_error(None)  # a barrier
    seen = torch.tensor(float(mark.exists()), device=communication_device())
    everywhere = bool(all_reduce(seen).item() == world_size())
    if rank() == 0:
        mark.unlink(missing_ok=True)
    if everywhere:
        return rank(), world_size()
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
