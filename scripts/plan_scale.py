"""Plan a contrastive run over many ranks: memory and communication of a step, before anything is started.

    python scripts/plan_scale.py --batch_size 32768 65536 --ranks 8 32 --model ViT-B/16 --device_memory 80

The first table is the loss alone (features exchanged by gather or ring), the second the whole step (all at once, or
embedded in chunks: gradient caching; parameters whole on every rank: DDP, or split: FSDP2). docs/scaling.md explains
the columns; every formula is below, and tests compare them with counted bytes, counted parameters and measured memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mllm_vision.training.recipe.parser import parse_recipe, run_recipe

MIB, GIB = 2**20, 2**30
FP32 = 4
# What a rank holds at the peak of the loss, in copies of its own rows' features [n, D] and of everybody's [N, D]:
# features, their gradients, buffers of the exchange. Measured (docs/scaling.md), over gloo, which copies once more.
OWN_COPIES = {"gather": 8, "ring": 12}
ALL_COPIES = {"gather": 3, "ring": 0}
PLAIN_COPIES = 5  # of the local scores [n, N], in the formula that keeps them
# Bytes that autograd keeps for a token of a layer, per unit of width: layer norms, queries, keys and values, attention
# without its matrix, and four times the width twice. fp32, and bf16 autocast, whose residual stream stays in fp32.
TOKEN_BYTES = {"fp32": 64, "bf16": 40}
STATE_BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # AdamW; bf16 autocast keeps fp32 weights


@dataclass(frozen=True)
class Tower:
    """A transformer: layers, width, tokens of a sample."""

    layers: int
    width: int
    tokens: int

    @property
    def layer_parameters(self) -> int:
        """Of all layers: attention 4 h^2 + 4 h, MLP 8 h^2 + 5 h, two norms 4 h."""
        return self.layers * (12 * self.width**2 + 13 * self.width)

    def activations(self, precision: str) -> int:
        """Bytes kept for the backward pass of one sample."""
        return TOKEN_BYTES[precision] * self.layers * self.tokens * self.width


@dataclass(frozen=True)
class Pair:
    """An image and a text tower with projections to one space, as CLIP has them."""

    vision: Tower
    text: Tower
    patch: int
    dimension: int
    vocabulary: int = 49408

    @property
    def parameters(self) -> int:
        v, t = self.vision, self.text
        image = v.layer_parameters + 3 * self.patch**2 * v.width + v.width * (1 + v.tokens) + 4 * v.width
        text = t.layer_parameters + (self.vocabulary + t.tokens) * t.width + 2 * t.width
        return image + text + (v.width + t.width) * self.dimension + 1

    def activations(self, precision: str) -> int:
        return self.vision.activations(precision) + self.text.activations(precision)

    @property
    def largest_unit(self) -> int:
        """Parameters that FSDP gathers at once: a layer, or what is outside the layers."""
        outside = self.parameters - self.vision.layer_parameters - self.text.layer_parameters
        return max(outside, *(12 * tower.width**2 + 13 * tower.width for tower in (self.vision, self.text)))


MODELS = {
    "ViT-S/16": Pair(Tower(12, 384, 197), Tower(12, 384, 77), 16, 384),
    "ViT-B/32": Pair(Tower(12, 768, 50), Tower(12, 512, 77), 32, 512),
    "ViT-B/16": Pair(Tower(12, 768, 197), Tower(12, 512, 77), 16, 512),
    "ViT-L/14": Pair(Tower(24, 1024, 257), Tower(12, 768, 77), 14, 768),
    "ViT-H/14": Pair(Tower(32, 1280, 257), Tower(24, 1024, 77), 14, 1024),
}


@dataclass
class PlanArguments:
    """What to plan for."""

    batch_size: list[int] = field(
        default_factory=lambda: [4096, 32768, 262144], metadata={"help": "N: pairs of a step, over all ranks."}
    )
    ranks: list[int] = field(default_factory=lambda: [8, 64], metadata={"help": "W: numbers of processes (GPUs)."})
    objective: str = field(default="clip", metadata={"help": "clip (softmax) or siglip (sigmoid)."})
    model: str = field(default="ViT-B/16", metadata={"help": f"One of {', '.join(MODELS)}."})
    dimension: int | None = field(default=None, metadata={"help": "D: width of the shared space; default the model's."})
    chunk: int = field(default=256, metadata={"help": "embed_batch_size of gradient caching."})
    precision: str = field(default="bf16", metadata={"help": "bf16 (autocast) or fp32."})
    tile: int = field(default=4096, metadata={"help": "tile_size of the loss: 4096 on a GPU, 1024 on a CPU."})
    device_memory: float = field(default=80.0, metadata={"help": "GiB of a device."})
    bandwidth: float = field(default=25.0, metadata={"help": "GB/s that a rank sends; 25 is 200 Gbit/s a GPU."})

    def __post_init__(self) -> None:
        for name, known in (("objective", ("clip", "siglip")), ("model", MODELS), ("precision", TOKEN_BYTES)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(known)}")
        for name in ("batch_size", "ranks", "chunk", "tile", "device_memory", "bandwidth"):
            value = getattr(self, name)
            if min(value if isinstance(value, list) else [value]) <= 0:
                raise ValueError(f"--{name} {value} must be positive")
        uneven = [(n, w) for n in self.batch_size for w in self.ranks if n % w]
        if uneven:
            raise ValueError(f"--batch_size {uneven[0][0]} is not divisible by --ranks {uneven[0][1]}")

    @property
    def pair(self) -> Pair:
        return MODELS[self.model]

    @property
    def width(self) -> int:
        return self.dimension or self.pair.dimension


# ---- the loss --------------------------------------------------------------------------------------------------


def feature_bytes_sent(objective: str, exchange: str, rows: int, ranks: int, dimension: int) -> float:
    """Bytes of features and their gradients that a rank sends in one step.

    Gather: the texts once (each block passes W - 1 times), their gradients back once (reduce-scatter). Ring: the
    softmax meets the texts twice, forward and backward, and its gradients make the whole round; the sigmoid forms
    its gradient in the forward pass and meets them once.
    """
    block = rows * dimension * FP32
    if ranks == 1:
        return 0
    if exchange == "gather":
        return 2 * (ranks - 1) * block
    passes = 2 if objective == "clip" else 1
    return (passes * (ranks - 1) + ranks) * block


def sum_bytes_sent(objective: str, rows: int, ranks: int) -> float:
    """Bytes that the softmax sends for its sums over columns: four vectors [N] reduced (a maximum, three sums), one
    gathered.
    """
    if objective == "siglip" or ranks == 1:
        return 0
    vector = rows * ranks * FP32
    return 4 * vector * 2 * (ranks - 1) / ranks + vector * (ranks - 1) / ranks


def loss_memory(exchange: str, rows: int, ranks: int, dimension: int, tile: int) -> float:
    """Bytes at the peak of the tiled loss on one rank, its features and their gradients included."""
    total = rows * ranks
    widest = total if exchange == "gather" else rows
    tiles = 2 * min(rows, tile) * min(widest, tile)
    features = (OWN_COPIES[exchange] * rows + ALL_COPIES[exchange] * total) * dimension
    return FP32 * (features + tiles + 8 * total)


def plain_memory(rows: int, ranks: int, dimension: int) -> float:
    """Bytes of the formula that keeps the scores of its rows with all columns, both features gathered."""
    total = rows * ranks
    return FP32 * (PLAIN_COPIES * rows * total + 4 * total * dimension)


# ---- the step --------------------------------------------------------------------------------------------------


def state_memory(pair: Pair, ranks: int, sharding: str, chunks: int = 1) -> float:
    """Bytes of weights, gradients and AdamW's state on one rank; `sharding` is "ddp" or "fsdp".

    With several chunks FSDP2 keeps whole gradients until the last one, when they are reduced.
    """
    if sharding == "ddp" or ranks == 1:
        return sum(STATE_BYTES.values()) * pair.parameters
    kept = FP32 * pair.parameters if chunks > 1 else FP32 * pair.largest_unit
    return sum(STATE_BYTES.values()) * pair.parameters / ranks + FP32 * pair.largest_unit + kept


def parameter_bytes_sent(pair: Pair, ranks: int, sharding: str, precision: str, chunks: int = 1) -> float:
    """Bytes a rank sends for the parameters in one step.

    DDP reduces the gradients once (a ring sends each byte twice). FSDP2 gathers the weights for every forward and
    every backward pass (in bf16 when computing in it), and reduce-scatters the gradients once, in fp32. Of k chunks
    the last is embedded once, the others twice.
    """
    share = (ranks - 1) / ranks * pair.parameters
    if sharding == "ddp":
        return 2 * share * FP32
    passes = 2 * chunks - 1 + chunks
    return share * (passes * (2 if precision == "bf16" else FP32) + FP32)


def activation_memory(pair: Pair, rows: int, precision: str) -> float:
    """Bytes kept for the backward pass of `rows` samples, and autocast's copies of the weights."""
    copies = 2 * pair.parameters if precision == "bf16" else 0
    return rows * pair.activations(precision) + copies


# ---- the tables ------------------------------------------------------------------------------------------------


def loss_table(own: PlanArguments) -> list[list[str]]:
    """One row for each N and W."""
    titles = ["N", "W", "gather: memory", "sent", "time", "ring: memory", "sent", "time", "plain: memory"]
    lines = [titles]
    for total in own.batch_size:
        for ranks in own.ranks:
            rows = total // ranks
            line = [str(total), str(ranks)]
            for exchange in ("gather", "ring"):
                sent = feature_bytes_sent(own.objective, exchange, rows, ranks, own.width)
                sent += sum_bytes_sent(own.objective, rows, ranks)
                memory = loss_memory(exchange, rows, ranks, own.width, own.tile)
                line += [show(memory), show(sent), show_time(sent, own)]
            lines.append([*line, show(plain_memory(rows, ranks, own.width))])
    return lines


def step_table(own: PlanArguments) -> list[list[str]]:
    """One row for each N and W: what a rank needs in all, whole or cached, and what the parameters send."""
    cached = f"chunks of {own.chunk}"
    titles = ["N", "W", "rows a rank", "at once, DDP", f"{cached}, DDP", f"{cached}, FSDP2", "DDP sends", "FSDP2 sends"]
    lines = [titles]
    for total in own.batch_size:
        for ranks in own.ranks:
            rows = total // ranks
            loss = loss_memory("gather", rows, ranks, own.width, own.tile)
            chunks = -(-rows // own.chunk)
            needs = []
            for embedded, sharding in ((rows, "ddp"), (own.chunk, "ddp"), (own.chunk, "fsdp")):
                need = loss + activation_memory(own.pair, min(rows, embedded), own.precision)
                need += state_memory(own.pair, ranks, sharding, chunks)
                needs.append(show(need) + ("" if need <= own.device_memory * GIB else " (too much)"))
            ddp, fsdp = (
                parameter_bytes_sent(own.pair, ranks, sharding, own.precision, chunks) for sharding in ("ddp", "fsdp")
            )
            lines.append([str(total), str(ranks), str(rows), *needs, show(ddp), show(fsdp)])
    return lines


def show(count: float) -> str:
    for size, unit in ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1024:.3g} KiB"


def show_time(count: float, own: PlanArguments) -> str:
    seconds = count / (own.bandwidth * 1e9)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def report(own: PlanArguments) -> str:
    """Both tables, with what they were made for."""
    pair = own.pair
    loss = f"The loss: {own.objective}, D = {own.width}, tiles of {own.tile}; times at {own.bandwidth:g} GB/s a rank"
    step = (
        f"The step: {own.model} ({pair.parameters / 1e6:.0f} M parameters), {own.precision}, "
        f"{pair.activations(own.precision) / MIB:.0f} MiB of activations a pair, devices of {own.device_memory:g} GiB"
    )
    return f"{loss}\n\n{markdown(loss_table(own))}\n\n{step}\n\n{markdown(step_table(own))}"


def main(argv: list[str] | None = None) -> None:
    (own,) = parse_recipe(PlanArguments, argv=argv, description=__doc__)
    print(report(own))


if __name__ == "__main__":
    run_recipe(main)
