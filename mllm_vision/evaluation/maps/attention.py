"""Where an encoder looks, head by head, and what its patches tell apart: attention of the class token (or of SigLIP's
pooling head) and the principal components of the patch features.

Source: Caron et al. 2021 (DINO), figure 1 and section 4.2.2, https://arxiv.org/abs/2104.14294, for the heads; Oquab et
    al. 2023 (DINOv2), section 7.5, https://arxiv.org/abs/2304.07193, for the components; Darcet et al. 2023,
    https://arxiv.org/abs/2309.16588, for registers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_vision.evaluation.base import Evaluation, Evaluator, image_model
from mllm_vision.evaluation.images import check_columns, data_uri, displayed, draw_rows, rounded, usable_images
from mllm_vision.functional.precision import wide_dtype

logger = logging.getLogger(__name__)


def attention_heads(encoder: Any, pixel_values: Tensor, layer: int = -1) -> Tensor | None:
    """Where the pooled vector looks, head by head: ``[B, heads, h, w]``, each map summing to one at most.

    The class token's attention in ``layer`` (CLIP, ViT, DINO), to the patches alone: what goes to the class token
    itself and to registers is left out, so that a map sums to less than one. For SigLIP the attention of its pooling
    head (there is one, ``layer`` does not count; its maps sum to one). None for backbones with neither.

    Args:
        encoder: a `VisionEncoder`.
        pixel_values: ``[B, 3, H, W]``, preprocessed.
        layer: of the class token's attention; -1 is the last one.

    Raises:
        ValueError: no such layer.
    """
    backbone = encoder.backbone
    patch = encoder.patch_size
    height, width = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    pooling = getattr(getattr(backbone, "head", None), "attention", None)
    if isinstance(pooling, nn.MultiheadAttention):
        weights = _pooling_weights(encoder, pooling, pixel_values)  # [B, heads, 1, N]
        return weights[:, :, 0].unflatten(-1, (height, width))
    prefix = encoder.num_prefix_tokens
    if not prefix or not hasattr(backbone, "set_attn_implementation"):
        return None
    with _eager_attention(backbone):
        layers = backbone(pixel_values, output_attentions=True).attentions
    if not layers:
        return None
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"layer={layer} does not exist; this encoder has {len(layers)}: use 0..{len(layers) - 1}, or -1"
        )
    return layers[layer][:, :, 0, prefix:].unflatten(-1, (height, width))


def attention_map(encoder: Any, pixel_values: Tensor) -> Tensor | None:
    """Where the pooled vector looks in the last layer, mean over heads: ``[B, h, w]``; see `attention_heads`."""
    heads = attention_heads(encoder, pixel_values)
    return None if heads is None else heads.mean(dim=1)


def patch_components(encoder: Any, pixel_values: Tensor, components: int = 3) -> Tensor:
    """The first principal components of the patch features of all images together: ``[B, h, w, components]`` in 0..1.

    Read as red, green and blue: patches of one colour are similar to the encoder, across images too. Each component is
    stretched from its 2nd to its 98th percentile; its sign is the one that makes its skewness positive, so that a
    image does not turn to its negative from one run to the next.

    Raises:
        ValueError: fewer patches than components + 1.
    """
    from mllm_vision.encoder.features import extract_features

    tokens = extract_features(encoder.backbone, pixel_values, select_layer=-1, select_feature="patch").tokens
    assert tokens is not None  # asked for
    batch, count, _ = tokens.shape
    height = math.isqrt(count)  # an encoder's images are square
    rows = tokens.flatten(0, 1).to(wide_dtype(tokens))
    if len(rows) <= components:
        raise ValueError(f"{len(rows)} patches are too few for {components} components; give more images")
    rows = rows - rows.mean(dim=0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    scores = torch.zeros(len(rows), components, dtype=rows.dtype, device=rows.device)
    scores[:, : len(axes)] = rows @ axes[:components].T
    scores = scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = scores.quantile(0.02, dim=0), scores.quantile(0.98, dim=0)
    scores = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return scores.float().view(batch, height, count // height, components)


class Attention(Evaluator):
    """Attention maps of every head and patch components of a few images; figures of how sharply the heads look.

    Args:
        name: evaluator name.
        records: rows with an image.
        columns: role ``image``.
        count: images, taken at equal distances over the data.
        layer: of the class token's attention; -1 is the last one.

    Metrics: ``entropy`` (mean over heads and images of the entropy of a map over its patches, over its greatest
    value: 1 is uniform attention, 0 a single patch), ``head_similarity`` (mean cosine of two heads' maps, both
    less their mean: 1 when all heads look at the same), ``on_patches`` (share of the attention that goes to patches and
    not to class token and registers); ``count``. Encoders without such attention (ResNet) have components alone, and
    say so.

    ``arrays["maps"]`` holds the maps for the report; `draw` writes them as images.

    Raises:
        ValueError: missing columns, not one readable image.
    """

    primary_metric = "count"
    of_encoder, has_figures = True, False

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> Attention:
        return cls(name, records, sources.columns(records, "image"), count=flags.map_count)

    def __init__(
        self, name: str, records: Any, columns: dict[str, str] | None = None, *, count: int = 6, layer: int = -1
    ) -> None:
        super().__init__(name)
        if count < 1:
            raise ValueError(f"count={count} images; use 1 or more")
        self.records, self.count, self.layer = records, count, layer
        self.columns = columns or {"image": "image"}
        check_columns(records, self.columns, ("image",), f"Attention {name!r}")

    def evaluate(self, model: Any) -> Evaluation:
        from mllm_vision.data.images.transforms import ImageTransform

        encoder = image_model(model)
        wanted = draw_rows(len(self.records), self.count)
        images, kept = usable_images(self.records, self.columns["image"], wanted, self.refused)
        if not images:
            raise ValueError(f"none of the {len(wanted)} images of {self.name!r} could be read")
        pixels = ImageTransform(encoder.processor, train=False)(images)
        shown = [displayed(each, encoder.processor) for each in pixels]
        pixels = pixels.to(next(encoder.parameters()).device)
        heads = attention_heads(encoder, pixels, self.layer)
        heads = None if heads is None else heads.float().cpu()
        if heads is None:
            kind = encoder.backbone.config.model_type
            logger.warning(
                "%s has no class token or pooling head whose attention could be shown: components only", kind
            )
        components = patch_components(encoder, pixels).cpu()
        metrics = {"count": float(len(kept))} | ({} if heads is None else head_figures(heads))
        maps = []
        for place, image in enumerate(shown):
            items = []
            if heads is not None:
                grids = {f"head {index + 1}": grid for index, grid in enumerate(heads[place])}
                grids = {"mean of the heads": heads[place].mean(dim=0), **grids}
                items = [{"kind": "attention", "text": key, "grid": rounded(grid)} for key, grid in grids.items()]
            maps.append({"image": data_uri(image, 224), "items": items})
        parts = {"images": shown, "heads": heads, "components": components}
        return Evaluation(self.primary_metric, metrics, arrays={"maps": maps} if heads is not None else {}, parts=parts)

    def draw(self, result: Evaluation, folder: str | Path) -> list[Path]:
        """Write what a result saw: ``<name>_heads.png`` (where there is attention) and ``<name>_patches.png``."""
        from mllm_vision.evaluation.maps.drawing import draw_heads, draw_patches

        base, parts = Path(folder) / self.name.replace("/", "_"), result.parts
        written = [draw_patches(parts["images"], parts["components"], base.with_name(f"{base.name}_patches.png"))]
        if parts["heads"] is not None:
            written.append(draw_heads(parts["images"], parts["heads"], base.with_name(f"{base.name}_heads.png")))
        return written


def head_figures(heads: Tensor) -> dict[str, float]:
    """``entropy``, ``head_similarity`` (two heads or more) and ``on_patches`` of maps ``[B, heads, h, w]``."""
    flat = heads.to(wide_dtype(heads)).flatten(2)  # [B, heads, N]
    mass = flat.sum(dim=2, keepdim=True)
    shares = flat / mass.clamp_min(1e-12)
    figures = {
        "entropy": (torch.special.entr(shares).sum(dim=2) / math.log(max(2, flat.shape[2]))).mean().item(),
        "on_patches": mass.mean().item(),
    }
    count = flat.shape[1]
    if count > 1:
        unit = nn.functional.normalize(shares - shares.mean(dim=2, keepdim=True), dim=2)
        cosines = unit @ unit.transpose(1, 2)
        others = cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
        figures["head_similarity"] = (others / (count * (count - 1))).mean().item()
    return figures


def _pooling_weights(encoder: Any, pooling: nn.MultiheadAttention, pixel_values: Tensor) -> Tensor:
    """Attention of SigLIP's pooling head ``[B, heads, 1, N]``, which its own call averages over heads."""
    seen: list[Tensor] = []

    def ask(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return inputs, {**named, "need_weights": True, "average_attn_weights": False}

    hooks = [
        pooling.register_forward_pre_hook(ask, with_kwargs=True),
        pooling.register_forward_hook(lambda module, inputs, output: seen.append(output[1])),
    ]
    try:
        encoder(pixel_values, tokens=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


@contextmanager
def _eager_attention(backbone: Any) -> Iterator[None]:
    """Fused attention returns no weights; switch to the plain one for a moment."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)
