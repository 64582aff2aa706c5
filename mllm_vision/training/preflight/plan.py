"""Memory and communication of a step on many ranks: towers counted on fake tensors, the rest by arithmetic.

docs/scaling.md explains the columns. Tests compare the arithmetic with the bytes sent by collectives and with the
measured memory of the loss.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mllm_vision.encoder.activations import use_fast_activations
from mllm_vision.errors import unknown_name
from mllm_vision.training.preflight.memory import FakeStep, show_bytes

FP32 = 4
# Peak of the loss on a rank, in copies of its own features [n, D] and of all features [N, D]: features, gradients,
# buffers. Measured (docs/scaling.md) over gloo, which makes one more copy.
OWN_COPIES = {"gather": 8, "ring": 12}
ALL_COPIES = {"gather": 3, "ring": 0}
PLAIN_COPIES = 5  # of the local scores [n, N], in the plain formula
STATE_BYTES = 16  # per parameter, fp32: weight, gradient and AdamW's two moments
# layers, width and patch of the image tower at 224 px; layers and width of the text tower; the shared space
MODELS = {
    "ViT-S/16": (12, 384, 16, 12, 384, 384),
    "ViT-B/32": (12, 768, 32, 12, 512, 512),
    "ViT-B/16": (12, 768, 16, 12, 512, 512),
    "ViT-L/14": (24, 1024, 14, 12, 768, 768),
    "ViT-H/14": (32, 1280, 14, 24, 1024, 1024),
}


@dataclass
class PlanArguments:
    """What to plan for."""

    batch_size: list[int] = field(
        default_factory=lambda: [4096, 32768, 262144], metadata={"help": "N: pairs in a step, over all ranks."}
    )
    ranks: list[int] = field(default_factory=lambda: [8, 64], metadata={"help": "W: numbers of processes (GPUs)."})
    objective: str = field(default="clip", metadata={"help": "clip (softmax) or siglip (sigmoid)."})
    model: str = field(
        default="ViT-B/16", metadata={"help": f"{', '.join(MODELS)}, or the path or Hub id of a CLIP or SigLIP model."}
    )
    dimension: int | None = field(default=None, metadata={"help": "D: width of the shared space; default the model's."})
    chunk: int = field(default=256, metadata={"help": "embed_batch_size of gradient caching."})
    precision: str = field(default="bf16", metadata={"help": "bf16 (autocast) or fp32."})
    tile: int = field(default=4096, metadata={"help": "tile_size of the loss: 4096 on a GPU, 1024 on a CPU."})
    device_memory: float = field(default=80.0, metadata={"help": "GiB of a device."})
    bandwidth: float = field(default=25.0, metadata={"help": "GB/s that a rank sends; 25 is 200 Gbit/s per GPU."})

    def __post_init__(self) -> None:
        for name, known in (("objective", ("clip", "siglip")), ("precision", ("bf16", "fp32"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is not one of {', '.join(known)}")
        for name in ("batch_size", "ranks", "chunk", "tile", "device_memory", "bandwidth"):
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value]) <= 0:
                raise ValueError(f"--{name} {value} must be positive")
        uneven = [(n, w) for n in self.batch_size for w in self.ranks if n % w]
        if uneven:
            raise ValueError(f"--batch_size {uneven[0][0]} is not divisible by --ranks {uneven[0][1]}")


# ---- towers ----------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """A CLIP or SigLIP model of fake tensors, for `FakeStep`.

    Args:
        model: a name of `MODELS`, or the path or Hub id of a model; only its config is read.

    Raises:
        ValueError: an unknown name, or another kind of model.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        if model not in MODELS and not Path(model).exists() and "/" not in model:
            raise ValueError(unknown_name("--model", model, list(MODELS)))
        self.config = clip_config(*MODELS[model]) if model in MODELS else AutoConfig.from_pretrained(model)
        if self.config.model_type not in ("clip", "siglip"):
            raise ValueError(f"--model {model} is a {self.config.model_type!r} model; give a CLIP or SigLIP pair")
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.pair = AutoModel.from_config(self.config)
        use_fast_activations(self)

    def embed(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        image = self.pair.get_image_features(pixel_values=pixel_values).pooler_output
        return {"image": image, "text": self.pair.get_text_features(input_ids=input_ids).pooler_output}

    @property
    def dimension(self) -> int:
        return getattr(self.config, "projection_dim", self.config.vision_config.hidden_size)

    @property
    def parameter_count(self) -> int:
        return sum(value.numel() for value in self.parameters())

    @property
    def largest_unit(self) -> int:
        """Parameters that FSDP gathers at once: a layer, or all outside the layers."""
        units: Counter[str] = Counter()
        for name, value in self.named_parameters():
            layer = re.match(r".*\.layers\.\d+\.", name)
            units[layer[0] if layer else ""] += value.numel()
        return max(units.values())

    def activations(self, precision: str, rows: int) -> tuple[int, int]:
        """Bytes of activations per pair, and constant ones (autocast's copies of weights)."""
        side, length = self.config.vision_config.image_size, self.config.text_config.max_position_embeddings
        like = {"pixel_values": torch.empty(1, 3, side, side), "input_ids": torch.zeros(1, length, dtype=torch.int64)}
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
        step = FakeStep(self, like, autocast=autocast if precision == "bf16" else contextlib.nullcontext)
        few, many = step.embed(rows), step.embed(2 * rows)
        return (many - few) // rows, max(0, 2 * few - many)


def clip_config(layers: int, width: int, patch: int, text_layers: int, text_width: int, dimension: int) -> Any:
    """The `CLIPConfig` of a row of `MODELS`."""
    from transformers import CLIPConfig

    def tower(depth: int, size: int) -> dict[str, int]:
        heads = {"num_hidden_layers": depth, "num_attention_heads": size // 64}
        return {"hidden_size": size, "intermediate_size": 4 * size, **heads}

    vision = {**tower(layers, width), "patch_size": patch, "image_size": 224}
    return CLIPConfig(vision_config=vision, text_config=tower(text_layers, text_width), projection_dim=dimension)


# ---- the arithmetic of ranks -----------------------------------------------------------------------------------


def feature_bytes_sent(objective: str, exchange: str, rows: int, ranks: int, dimension: int) -> float:
    """Bytes that a rank sends in one step for the loss: features, gradients, the softmax's sums over columns.

    Gather: the texts once (each block passes W - 1 times), their gradients back once (reduce-scatter). Ring: the
    softmax meets the texts twice, forward and backward, and its gradients make the whole round; the sigmoid forms
    its gradient in the forward pass and meets them once. The sums are four vectors [N] reduced (a maximum, three
    sums) and one gathered.
    """
    if ranks == 1:
        return 0
    softmax = objective == "clip"
    blocks = 2 * (ranks - 1) if exchange == "gather" else (1 + softmax) * (ranks - 1) + ranks
    sums = softmax * 9 * rows * (ranks - 1)
    return FP32 * (blocks * rows * dimension + sums)


def loss_memory(exchange: str, rows: int, ranks: int, dimension: int, tile: int) -> float:
    """Peak bytes of the tiled loss on one rank, with features and their gradients."""
    total = rows * ranks
    tiles = 2 * min(rows, tile) * min(total if exchange == "gather" else rows, tile)
    features = (OWN_COPIES[exchange] * rows + ALL_COPIES[exchange] * total) * dimension
    return FP32 * (features + tiles + 8 * total)


def plain_memory(rows: int, ranks: int, dimension: int) -> float:
    """Peak bytes of the plain formula, which keeps the scores [n, N] and gathers both features."""
    return FP32 * rows * ranks * (PLAIN_COPIES * rows + 4 * dimension)


def state_memory(parameters: int, unit: int, ranks: int, sharding: str, chunks: int = 1) -> float:
    """Bytes of weights, gradients and AdamW's state on one rank; `sharding` is "ddp" or "fsdp".

    FSDP2 keeps one gathered unit and its gradient; with several chunks all gradients until the last one.
    """
    if sharding == "ddp" or ranks == 1:
        return STATE_BYTES * parameters
    return STATE_BYTES * parameters / ranks + FP32 * (unit + (parameters if chunks > 1 else unit))


def parameter_bytes_sent(parameters: int, ranks: int, sharding: str, precision: str, chunks: int = 1) -> float:
    """Bytes a rank sends for the parameters in one step.

    DDP reduces the gradients once (a ring sends each byte twice). FSDP2 gathers the weights for every forward and
    every backward pass (in bf16 when computing in it), and reduce-scatters the gradients once, in fp32. Of k chunks
    the last is embedded once, the others twice.
    """
    share = (ranks - 1) / ranks * parameters
    passes = 2 * chunks - 1 + chunks
    return share * (2 * FP32 if sharding == "ddp" else passes * (2 if precision == "bf16" else FP32) + FP32)


# ---- the tables ------------------------------------------------------------------------------------------------


def plan(own: PlanArguments) -> str:
    """Two Markdown tables, a row per N and W: the loss, and the whole step."""
    towers = Towers(own.model)
    count, unit, width = towers.parameter_count, towers.largest_unit, own.dimension or towers.dimension
    each, fixed = towers.activations(own.precision, own.chunk)
    cached = f"chunks of {own.chunk}"
    losses = [["N", "W", "gather: memory", "sent", "time", "ring: memory", "sent", "time", "plain: memory"]]
    steps = [
        ["N", "W", "rows a rank", "at once, DDP", f"{cached}, DDP", f"{cached}, FSDP2", "DDP sends", "FSDP2 sends"]
    ]
    for total, ranks in itertools.product(own.batch_size, own.ranks):
        rows, line = total // ranks, [str(total), str(ranks)]
        for exchange in OWN_COPIES:
            sent = feature_bytes_sent(own.objective, exchange, rows, ranks, width)
            seconds = sent / (own.bandwidth * 1e9)
            line += [show_bytes(loss_memory(exchange, rows, ranks, width, own.tile)), show_bytes(sent)]
            line.append(f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms")
        losses.append([*line, show_bytes(plain_memory(rows, ranks, width))])
        loss, chunks = loss_memory("gather", rows, ranks, width, own.tile), -(-rows // own.chunk)
        needs = [
            loss + fixed + each * min(rows, embedded) + state_memory(count, unit, ranks, sharding, chunks)
            for embedded, sharding in ((rows, "ddp"), (own.chunk, "ddp"), (own.chunk, "fsdp"))
        ]
        shown = [show_bytes(need) + " (too much)" * (need > own.device_memory * 2**30) for need in needs]
        sends = [parameter_bytes_sent(count, ranks, how, own.precision, chunks) for how in ("ddp", "fsdp")]
        steps.append([str(total), str(ranks), str(rows), *shown, *map(show_bytes, sends)])
    loss_title = f"The loss: {own.objective}, D = {width}, tiles of {own.tile}; times at {own.bandwidth:g} GB/s a rank"
    step_title = f"The step: {own.model} ({count / 1e6:.0f} M parameters), {own.precision}, {show_bytes(each)} of "
    step_title += f"activations a pair, devices of {own.device_memory:g} GiB"
    return "\n\n".join([loss_title, _markdown(losses), step_title, _markdown(steps)])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
