"""What the tests of every image method share: which there are, small ones, batches, and a short training of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tiny
import torch
from families import FAMILIES
from torch.nn.parallel import DistributedDataParallel

from mllm_vision import distributed
from mllm_vision.data.images.dataset import ImageCollator, ImageDataset
from mllm_vision.data.views.draws import View
from mllm_vision.data.views.views import ViewMaker, ViewPolicy
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.objectives import ImageObjective, list_objectives, load_objective
from mllm_vision.training.trainer.gradient_cache import cached_backward

ROWS, BATCH = 32, 8
IMAGE_METHODS = [name for name in list_objectives() if issubclass(load_objective(name), ImageObjective)]


def small_config(method: type[ImageObjective], **changed: Any) -> Any:
    """The method's config with widths that fit a test, and nothing that waits for a later epoch."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(method.Config):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if isinstance(default, list) and default and all(isinstance(each, int) for each in default):
            values[field.name] = [3, 4]
        elif isinstance(default, int) and not isinstance(default, bool) and default > 32:
            values[field.name] = 12 if field.name == "queue_size" else 32
        elif field.name.endswith("warmup_epochs"):
            values[field.name] = 0.0
        elif field.name == "out_dim":
            values[field.name] = 24
    return method.Config(**{**values, **changed})


def encoder(kind: str = "vit", seed: int = 0) -> VisionEncoder:
    """A tiny encoder of a family, as the recipe builds it; a ResNet with the stem for small images.

    "resnet_global" is one with the BatchNorm of all ranks.
    """
    from mllm_vision.encoder.sources import build_encoder
    from mllm_vision.modules.batch_norm import make_batch_norm_global

    if kind == "vit":
        backbone = tiny.tiny_vit(seed)
        backbone.pooler = None
        return VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor("vit"))
    torch.manual_seed(seed)
    model_type = kind.removesuffix("_global")
    stem = {"stem": "cifar"} if model_type == "resnet" else {}
    made = build_encoder(model_type, image_size=32, overrides={**FAMILIES[model_type], **stem}, pooler=False)
    if kind == "resnet_global":
        make_batch_norm_global(made)
    return made


def objective(name: str, kind: str = "vit", **changed: Any) -> Any:
    """A small objective in training mode, told of the data; the same at every call."""
    vision = encoder(kind)
    torch.manual_seed(1)
    method = load_objective(name)
    made = method(vision, small_config(method, **changed)).train()
    made.before_training(ROWS, BATCH)
    return made


def records(rows: int = ROWS) -> list[dict[str, Any]]:
    """Images with labels, as `ImageDataset` takes them."""
    return [{"image": tiny.labelled_image(row)[0], "label": row % 4} for row in range(rows)]


def view_makers(made: Any) -> tuple[ViewMaker, ViewMaker]:
    """The method's views of the encoder's size, and whole images."""
    vision = made.encoder
    given = (vision.image_size, vision.processor.image_mean, vision.processor.image_std)
    whole = ViewPolicy((View(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),), "whole")
    return ViewMaker(made.views, *given, patch_size=vision.patch_size), ViewMaker(whole, *given)


def batches(made: Any, steps: int, rows: int = BATCH) -> list[dict[str, torch.Tensor]]:
    """The first steps of an epoch over `records`, as the trainer hands them to the method."""
    data, collate, (make, _) = ImageDataset(records()), ImageCollator(), view_makers(made)
    starts = [(step * rows) % ROWS for step in range(steps)]
    return [made.select_columns(make(collate([data[start + row] for row in range(rows)]))) for start in starts]


def tell_features(made: Any) -> None:
    """The pass over the data that some methods make before an epoch."""
    if not made.needs_features:
        return
    data, (_, plain) = ImageDataset(records()), view_makers(made)
    images = plain(ImageCollator()([data[row] for row in range(ROWS)]))
    with torch.no_grad():
        made.before_epoch(made.eval().epoch_features(images["views"]))
    made.train()


def trained(
    name: str, world: int = 1, chunk: int | None = None, steps: int = 3, kind: str = "vit"
) -> tuple[list[float], dict]:
    """Losses and state of a method after a few steps of SGD, alone or inside DDP, in chunks or not.

    In float64, so that steps that magnify rounding do not hide what differs.
    """
    made = objective(name, kind).double()
    tell_features(made)
    model = DistributedDataParallel(made) if world > 1 else made
    optimizer = torch.optim.SGD([value for value in made.parameters() if value.requires_grad], lr=0.05)
    losses, share = [], BATCH // world
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for step, batch in enumerate(batches(made, steps)):
        made.progress, made.epoch = step / steps, step * BATCH / ROWS
        batch = {key: _double(value[own]) for key, value in batch.items()}
        optimizer.zero_grad()
        if chunk is None:
            output = model(**batch)
            output.loss.backward()
        else:
            no_sync = model.no_sync if world > 1 else None
            contexts = {} if no_sync is None else {"no_sync": no_sync}
            output = cached_backward(made, batch, chunk, model=model, check=True, **contexts)
        optimizer.step()
        made.after_step((step + 1) / steps)
        loss = output.loss.detach()
        if not made.couples_batch:  # the mean of this rank's rows
            loss = distributed.all_reduce(loss.clone()) / world
        losses.append(float(loss))
    return losses, {key: value.detach().clone() for key, value in made.state_dict().items()}


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def assert_same(found: tuple[list[float], dict], wanted: tuple[list[float], dict], tolerance: float = 1e-9) -> None:
    """Losses and states agree to rounding."""
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for key, value in wanted[1].items():
        torch.testing.assert_close(
            found[1][key], value, rtol=1e-9, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )
