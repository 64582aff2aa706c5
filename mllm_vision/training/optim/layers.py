"""Layer-wise learning rate decay, by the layer that a parameter's name says it belongs to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

from mllm_vision.errors import unknown_name

# A repeated block; the outermost counts, so that a ResNet's or a Swin's stages are its layers.
_BLOCK = re.compile(r"^(?P<stack>(?:.*?\.)?(?:stages?|layers?|blocks?|resblocks|h))\.(?P<index>\d+)\.")
# Before the first block.
_INPUT = re.compile(
    r"(^|[._])(embeddings?|embedder|embed_tokens|patch_embed\w*|pos_embed|cls_token|class_embedding|mask_token"
    r"|register_tokens|pre_layrnorm|pre_layernorm|stem|wte|wpe)([._]|$)"
)
_PATCH = re.compile(r"(^|[._])(patch_embed\w*|embedder\.embedder|embeddings\.convolution)([._]|$)")


def is_patch_embedding(name: str) -> bool:
    """Whether a parameter belongs to the first layer: a ViT's patch embedding, a ResNet's stem."""
    return _PATCH.search(name) is not None


def layer_scales(names: Iterable[str], layer_decay: float | Mapping[str, float]) -> dict[str, float]:
    """The factor on each parameter's learning rate, by its depth.

    In a tower of L blocks with decay d: d^(L+1) for the embeddings, d^(L-i) for block i (from 0), 1 for what comes
    after the last block (norms, heads, projections), and 1 outside of towers.

    Args:
        names: of all parameters, without wrappers' prefixes.
        layer_decay: d for every tower, or part of a tower's name -> d for those named (`{"vision": 0.85}`); the
            other towers keep their rates.

    Returns:
        Name -> factor.

    Raises:
        ValueError: no repeated blocks, or a key that does not name a tower.

    Source: Clark et al., "ELECTRA" (2020), appendix; with the counting of BEiT's official code (Bao et al., 2022).
    """
    names = list(names)
    depths: dict[str, int] = {}
    for name in names:
        if match := _BLOCK.search(name):
            depths[match["stack"]] = max(depths.get(match["stack"], 0), int(match["index"]) + 1)
    if not depths:
        raise ValueError("layer_decay needs repeated layers (layers.0, blocks.0, stages.0, ...), and there are none")
    decays = {stack: _decay_of(stack, layer_decay) for stack in depths}
    if isinstance(layer_decay, Mapping):
        for key in layer_decay:
            if not any(_named(stack, key) for stack in depths):
                towers = {part for stack in depths for part in stack.split(".")[:-1]} or set(depths)
                raise ValueError(f"layer_decay for {unknown_name('tower', key, towers)}")
    scales = {}
    for name in names:
        match = _BLOCK.search(name)
        stack = match["stack"] if match else _tower(name, depths)
        if stack is None:
            scales[name] = 1.0
        else:
            depth = int(match["index"]) + 1 if match else (0 if _INPUT.search(name) else depths[stack] + 1)
            scales[name] = decays[stack] ** (depths[stack] + 1 - depth)
    return scales


def _named(stack: str, key: str) -> bool:
    return f".{key.strip('.')}." in f".{stack}."


def _decay_of(stack: str, layer_decay: float | Mapping[str, float]) -> float:
    if not isinstance(layer_decay, Mapping):
        return layer_decay
    key = max((key for key in layer_decay if _named(stack, key)), key=len, default=None)
    return 1.0 if key is None else layer_decay[key]


def _tower(name: str, stacks: Iterable[str]) -> str | None:
    """The stack of blocks with the longest common path with a parameter, or None."""

    def shared(stack: str) -> int:
        pairs = zip(name.split("."), stack.split("."))
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    stacks = list(stacks)
    best = max(stacks, key=shared)
    return best if shared(best) or len(stacks) == 1 else None
