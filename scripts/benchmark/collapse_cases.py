"""The cases of collapse.py: methods as they are and with one part taken out, and the short training that tells.

A case trains a small ViT from scratch on images that are decoded once, in plain PyTorch, with views made as in any
training. What a batch's outputs look like is recorded as it goes: `spread` (1 for vectors evenly on the sphere, 0 when
all are one) and the number of directions they use. At the end kNN says what the encoder's vector h is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllm_vision.data.images.dataset import ImageCollator, ImageDataset
from mllm_vision.data.records.records import load_records
from mllm_vision.data.views.views import ViewArguments, ViewMaker
from mllm_vision.encoder.sources import build_encoder
from mllm_vision.evaluation.labelled.knn import knn_predict
from mllm_vision.evaluation.labelled.linear_probe import fit_linear, principal_axes
from mllm_vision.objectives.base import ImageObjective
from mllm_vision.objectives.registry import load_objective

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128, "patch_size": 8}
WIDE = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 384}
HEAD = {"head_hidden": 256, "head_out": 64}


@dataclass(frozen=True)
class Case:
    """A method, and what is changed in it.

    Attributes:
        claim: what it belongs to. variant: what was done, in words. intact: whether that is nothing.
        config: fields of the method's `Config`. views: fields of `ViewArguments`. sizes: of the encoder.
        change: takes parts out of the objective.
        momentum: of the teacher in every step, in place of its schedule.
        learning_rate: of AdamW. encoder_share: of it, what the encoder gets. warm_up: share of the steps in which
            both rise to that.
    """

    claim: str
    variant: str
    method: str
    intact: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None
    momentum: float | None = None
    learning_rate: float = 1e-3
    encoder_share: float = 1.0
    warm_up: float = 0.0


class Images(NamedTuple):
    """Decoded images `[N, 3, H, W]` uint8, their sizes `[N, 2]` and labels `[N]`."""

    pixels: Tensor
    sizes: Tensor
    labels: Tensor


class Data(NamedTuple):
    """What a case learns from, and what is held out for kNN and probes."""

    train: Images
    test: Images


def no_predictor(objective: Any) -> None:
    objective.predictor = nn.Identity()


def no_stop_gradient(objective: Any) -> None:
    objective.stop_gradient = False


SIAMESE = [("as published", True, None), ("without predictor", False, no_predictor),
           ("without stop-gradient", False, no_stop_gradient)]  # fmt: skip
DINO = {"out_dim": 256, "head_hidden": 256, "head_bottleneck": 64, "student_temperature": 0.1,
        "teacher_temperature_start": 0.04, "teacher_temperature": 0.04, "freeze_last_layer_epochs": 0.0}  # fmt: skip
# for those whose intact run a larger rate upsets
GENTLE: dict[str, Any] = {"learning_rate": 3e-4, "warm_up": 0.2}
SLOW_ENCODER: dict[str, Any] = {"learning_rate": 3e-3, "encoder_share": 0.1, "warm_up": 0.1}
NO_BLUR = {"blur": 0.0}  # at 32 pixels, as in the papers


def cases() -> list[Case]:
    """All that train, claim by claim; the intact one first."""
    found = []
    for variant, intact, change in SIAMESE:
        # a teacher that follows in tens of steps, so that what takes the paper's thousands is seen in hundreds
        found.append(Case("BYOL", variant, "byol", intact, HEAD, change=change, momentum=0.9))
    for variant, intact, change in SIAMESE:
        found.append(
            Case("SimSiam", variant, "simsiam", intact, HEAD | {"predictor_hidden": 64}, change=change, **SLOW_ENCODER)
        )
    for variant, changed in (
        ("as published", {}),
        ("without centring", {"centring": "none"}),
        ("without sharpening", {"teacher_temperature_start": 1.0, "teacher_temperature": 1.0}),
    ):
        config, views = DINO | changed, {"local_views": 2}
        found.append(Case("DINO", variant, "dino", not changed, config, views, momentum=0.99, **GENTLE))
    for variant, changed in (("as published", {}), ("without variance", {"variance": 0.0})):
        found.append(Case("VICReg", variant, "vicreg", not changed, HEAD | changed))
    for variant, momentum in (("m = 0.99", 0.99), ("m = 0", 0.0)):
        config = {"queue_size": 1024, "temperature": 0.07, "momentum": momentum}
        found.append(Case("MoCo", variant, "moco_v2", momentum > 0, config))
    for variant, views in (
        ("crop and colour", {}),
        ("crop alone", {"jitter_strength": 0.0, "gray": 0.0}),
        ("colour alone", {"crop_scale": [1.0, 1.0]}),
    ):
        found.append(Case("Views", variant, "simclr", not views, {"head_out": 64}, views))
    found.append(Case("Head", "three times as wide as z", "simclr", True, {"head_out": 64}, sizes=WIDE))
    return found


def build(case: Case, image_size: int, seed: int = 0, **sizes: Any) -> ImageObjective:
    """The objective of a case, with the encoder's weights from `seed`."""
    torch.manual_seed(seed)
    method = load_objective(case.method)
    encoder = build_encoder("vit", image_size=image_size, overrides=SIZES | case.sizes | sizes)
    objective: ImageObjective = method(encoder, method.Config(**case.config))  # type: ignore[assignment, call-arg]
    if case.change is not None:
        case.change(objective)
    if case.momentum is not None:
        objective.momentum_at = lambda progress: case.momentum  # type: ignore[attr-defined]
    return objective


def train(
    case: Case,
    data: Data,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float | None = None,
    seed: int = 0,
    **sizes: Any,
) -> tuple[ImageObjective, list[dict[str, float]]]:
    """Trains a case, at its own rate unless told: the objective, and loss and metrics of every step."""
    image_size = data.train.pixels.shape[-1]
    objective = build(case, image_size, seed, **sizes).train()
    views = NO_BLUR | case.views
    maker = ViewMaker(objective.views, image_size, (0.5,) * 3, (0.25,) * 3, ViewArguments(**views),
                      patch_size=objective.encoder.patch_size)  # fmt: skip
    rate = learning_rate or case.learning_rate
    trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name.startswith("encoder.")], "lr": rate * case.encoder_share},
        {"params": [p for name, p in trained.items() if not name.startswith("encoder.")], "lr": rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1.0, steps * case.warm_up))
    )
    generator = torch.Generator().manual_seed(seed)
    history = []
    for step in range(steps):
        rows = torch.randint(len(data.train.pixels), (batch_size,), generator=generator)
        seeds = torch.randint(2**62, (batch_size,), generator=generator)
        batch = maker({"pixels": data.train.pixels[rows], "sizes": data.train.sizes[rows], "seeds": seeds})
        objective.progress, objective.epoch = step / steps, step * batch_size / len(data.train.pixels)
        output = objective(**{name: value for name, value in batch.items() if name in objective.columns()})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        warm_up.step()
        objective.after_step((step + 1) / steps)
        record = {name: float(value) for name, value in output.metrics.items()}
        if "prototype_entropy" in record:  # what a teacher's answer says of the image: 0 in either kind of collapse
            record["information"] = record["prototype_entropy"] - record["teacher_entropy"]
        history.append({"step": step + 1, "loss": float(output.loss.detach())} | record)
    return objective.eval(), history


@torch.no_grad()
def features(objective: ImageObjective, images: Images) -> Tensor:
    """`[N, P]`: h of images as they are."""
    pixels = (images.pixels.float() / 255 - 0.5) / 0.25
    return torch.cat([objective.epoch_features(part[:, None]) for part in pixels.split(256)])


def knn(objective: ImageObjective, data: Data) -> float:
    """Accuracy of weighted kNN (k = 20) on h, from the training images to the test images."""
    return knn_of(features(objective, data.train), features(objective, data.test), data)


def knn_of(bank: Tensor, queries: Tensor, data: Data) -> float:
    classes = int(data.train.labels.max()) + 1
    found = knn_predict(queries, bank, data.train.labels, classes, k=min(20, len(bank)))
    return float((found == data.test.labels).float().mean())


def probe(bank: Tensor, queries: Tensor, data: Data, regularisation: float = 1e-2) -> float:
    """Accuracy of a linear probe on standardised features."""
    axes = principal_axes(bank)
    classes = int(data.train.labels.max()) + 1
    fit = fit_linear(axes.apply(bank), data.train.labels, classes, regularisation, axes.variances)
    return float((fit.predict(axes.apply(queries)) == data.test.labels).float().mean())


def load(train: Path, test: Path, train_rows: int, test_rows: int) -> Data:
    """The first rows of two labelled data sets."""
    return Data(*(_read(path, rows) for path, rows in ((train, train_rows), (test, test_rows))))


def _read(path: Path, rows: int) -> Images:
    dataset = ImageDataset(load_records(path, max_rows=rows))
    if dataset.labels is None:
        raise ValueError(f"{path} has no label column, which kNN and the probe need")
    batch = ImageCollator()([dataset[row] for row in range(len(dataset))])
    return Images(batch["pixels"], batch["sizes"], batch["labels"])
