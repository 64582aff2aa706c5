"""VisionEncoder: any transformers vision backbone, with the layer and tokens for a language model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mllm_vision.encoder.families import _side, family_of
from mllm_vision.encoder.features import (
    VisionFeatures,
    check_feature,
    default_selection,
    extract_features,
    num_layers,
    resolve_layer,
)
from mllm_vision.encoder.loading import carry_lineage, load_tower
from mllm_vision.encoder.sizes import processor_size, resize_backbone, resize_processor


class VisionEncoder(nn.Module):
    """A vision backbone, its image processor and the selection of its output tokens.

    Create one with `from_pretrained` or `from_backbone`.

    Attributes:
        backbone: the plain transformers model; its `config` is the encoder's.
        processor: the plain transformers image processor.
        select_layer: index into `hidden_states` (negative from the end; -1 is before the final norm).
        select_feature: `patch`, `cls_patch`, `cls` or `pooled`.
        lineage: content of lineage.json in the directory it was loaded from, or None.
        pretrained: whether its weights were loaded, not drawn at random.
    """

    def __init__(self, backbone: PreTrainedModel, processor: Any, *, select_layer: int, select_feature: str) -> None:
        super().__init__()
        family = family_of(backbone)
        check_feature(select_feature, family)
        resolve_layer(select_layer, num_layers(backbone), family.model_type)
        size = _agreed_size(backbone, processor)
        self.backbone = backbone
        self.processor = processor
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.lineage: dict[str, Any] | None = None
        self.pretrained = bool(backbone.name_or_path)  # set by transformers' from_pretrained
        self._source: Path | None = None
        self._image_size = size
        self._probed: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._remember_selection()

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel,
        processor: Any,
        *,
        select_layer: int | None = None,
        select_feature: str | None = None,
        image_size: int | None = None,
    ) -> VisionEncoder:
        """An encoder around a model in memory (not copied).

        Args:
            backbone: a transformers vision model of an accepted family.
            processor: its image processor.
            select_layer: None is the value stored in `backbone.config`, else -2 for CLIP and SigLIP, -1 for others.
            select_feature: None is the value stored in the config, else `patch`.
            image_size: resize backbone (in place) and processor.

        Raises:
            ValueError: a model that is not a vision backbone, an invalid layer, feature or size, or different image
                sizes of processor and backbone.
        """
        if processor is None:
            raise ValueError("processor=None: an encoder needs its image processor (see encoder.build_processor)")
        family_of(backbone)
        if image_size is not None:
            resize_backbone(backbone, image_size)
            processor = resize_processor(processor, image_size)
        layer, feature = default_selection(backbone)
        return cls(
            backbone,
            processor,
            select_layer=layer if select_layer is None else select_layer,
            select_feature=feature if select_feature is None else select_feature,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        select_layer: int | None = None,
        select_feature: str | None = None,
        image_size: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        processor: Any = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> VisionEncoder:
        """An encoder from a local directory or a Hub id.

        Accepts a checkpoint of this package, a plain transformers vision model (CLIP, SigLIP, SigLIP 2 of fixed size,
        DINOv2, DINOv3 ViT, ViT, ResNet, ConvNeXt, EfficientNet), a CLIP or SigLIP dual model (its image tower), or a
        vision-language checkpoint (LLaVA, LLaVA-NeXT, LLaVA-OneVision, AyaVision, PaliGemma, InternVL, Idefics2,
        Idefics3, SmolVLM, BLIP-2: its vision tower; the language model is not read). A tower type of one system is
        converted to a plain one (`encoder.convert.plain_tower`).

        Args:
            path_or_id: directory, or `owner/name` on the Hub.
            select_layer: None is the checkpoint's value, else -2 for CLIP and SigLIP, -1 for others.
            select_feature: None is the checkpoint's value, else `patch`.
            image_size: another square size; learned positions are interpolated once, so that saving gives an ordinary
                checkpoint of that size.
            revision: branch, tag or commit on the Hub.
            token: a Hub token; None uses `HF_TOKEN` or the stored login.
            processor: an image processor, for checkpoints without one.
            dtype: of the weights; "auto" keeps the stored one.

        Raises:
            FileNotFoundError: no such directory or repository, or no processor in it.
            PermissionError: the Hub refuses the token, or the repository is gated.
            ValueError: not a vision model, incomplete weights, weights that differ from lineage.json, an invalid
                layer, feature or size.
        """
        tower = load_tower(path_or_id, revision=revision, token=token, processor=processor, dtype=dtype)
        encoder = cls.from_backbone(
            tower.backbone,
            tower.processor,
            select_layer=tower.select_layer if select_layer is None else select_layer,
            select_feature=tower.select_feature if select_feature is None else select_feature,
            image_size=image_size,
        )
        encoder.lineage, encoder._source, encoder.pretrained = tower.lineage, tower.directory, True
        return encoder

    @property
    def config(self) -> Any:
        """The backbone's config."""
        return self.backbone.config

    @property
    def image_size(self) -> int:
        """Side of the processor's square images, in pixels."""
        return self._image_size

    @property
    def patch_size(self) -> int:
        """Side of a token's square of pixels (the total stride of convolutional networks)."""
        if family_of(self.backbone).convolutional:
            return -(-self.image_size // round(self._probe()[0] ** 0.5))
        return _side(self.config.patch_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image of `image_size`: N of `[B, N, D]`."""
        if self.select_feature in ("cls", "pooled"):
            return 1
        if family_of(self.backbone).convolutional:
            return self._probe()[0]
        return (self.image_size // self.patch_size) ** 2 + int(self.select_feature == "cls_patch")

    @property
    def hidden_size(self) -> int:
        """Width of the tokens: D of `[B, N, D]`."""
        if self.select_feature == "pooled":
            return self.pooled_size
        return self._probe()[1] if family_of(self.backbone).convolutional else self.config.hidden_size

    @property
    def pooled_size(self) -> int:
        """Width of the pooled vector: P of `[B, P]` (differs from `hidden_size` in convolutional networks)."""
        config = self.config
        if config.model_type in ("resnet", "convnext", "convnextv2"):
            return config.hidden_sizes[-1]
        if config.model_type == "efficientnet":
            return config.hidden_dim
        if config.model_type == "vit" and self.backbone.pooler is not None:
            return config.pooler_output_size or config.hidden_size
        return config.hidden_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in `hidden_states`: the class token and registers."""
        return family_of(self.backbone).num_prefix_tokens(self.config)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def forward(
        self, pixel_values: Tensor, *, pooled: bool = True, tokens: bool = True, patch_dropout: float = 0.0
    ) -> VisionFeatures:
        """Features of preprocessed images.

        Args:
            pixel_values: `[B, 3, H, W]` from the processor; positions are interpolated for other sizes.
            pooled: False runs only the layers that `select_layer` needs, and returns `pooled=None`.
            tokens: False skips work that only the tokens need, and returns `tokens=None`.
            patch_dropout: fraction of each image's patches dropped at random in training mode (FLIP,
                `features.drop_patches`).

        Returns:
            VisionFeatures: tokens `[B, N, D]` or None, pooled `[B, P]` or None.

        Raises:
            ValueError: `patch_dropout` outside [0, 1), or of a convolutional network.
        """
        return extract_features(
            self.backbone,
            pixel_values,
            select_layer=self.select_layer,
            select_feature=self.select_feature,
            pooled=pooled,
            tokens=tokens,
            patch_dropout=patch_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def encode(self, images: Any, *, batch_size: int = 64, feature: str = "tokens", progress: bool = False) -> Tensor:
        """Encodes images in batches, without gradient and in evaluation mode.

        Args:
            images: one or a sequence of PIL images, paths, bytes of image files or arrays [H, W, C] (see `load_image`),
                or an array [N, H, W, C].
            batch_size: images at a time.
            feature: `tokens` for `[N, T, D]`, `pooled` for `[N, P]`.
            progress: show a progress bar.

        Returns:
            Tensor: on the CPU, in the order of `images`.

        Raises:
            ValueError: unknown `feature`, or an image that cannot be decoded (`BadImage`).
        """
        from mllm_vision.data.images.decoding import in_threads, load_image

        if feature not in ("tokens", "pooled"):
            raise ValueError(f"feature={feature!r} is unknown; use 'tokens' or 'pooled'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        one = isinstance(images, (str, bytes, os.PathLike, dict)) or hasattr(images, "convert")
        one = one or 0 < getattr(images, "ndim", 4) < 4  # an array [H, W] or [H, W, C] is one image, [N, H, W, C] are N
        images = [images] if one else list(images)
        was_training = self.training
        self.eval()
        try:
            rows = []
            for start in tqdm(range(0, len(images), batch_size), desc="encode", disable=not progress):
                batch = in_threads(load_image, images[start : start + batch_size])
                pixel_values = self.processor(images=batch, return_tensors="pt")["pixel_values"]
                wanted = feature == "pooled"
                features = self(pixel_values.to(self.device), pooled=wanted, tokens=not wanted)
                rows.append((features.pooled if feature == "pooled" else features.tokens).cpu())
        finally:
            self.train(was_training)
        if rows:
            return torch.cat(rows)
        shape = (0, self.pooled_size) if feature == "pooled" else (0, self.num_tokens, self.hidden_size)
        return torch.empty(shape, dtype=self.dtype)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes a plain transformers checkpoint and its image processor.

        `AutoModel.from_pretrained(path)` and `AutoImageProcessor.from_pretrained(path)` read it without this package;
        they ignore the extra config key with `select_layer` and `select_feature`. lineage.json and recipe.yaml are
        copied if the weights are unchanged since loading. Files are written to a temporary folder first, so a full
        disk leaves the previous ones intact.

        Raises:
            FileExistsError: `path` is a file.
        """
        self._remember_selection()
        target = Path(path)
        if target.exists() and not target.is_dir():
            raise FileExistsError(f"{target} is a file; an encoder is saved as a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        where: Any = {"prefix": f".{target.name}.", "suffix": ".partial", "dir": target.parent}
        with tempfile.TemporaryDirectory(**where, ignore_cleanup_errors=True) as folder:
            aside = Path(folder)
            self.backbone.save_pretrained(aside)
            self.processor.save_pretrained(aside)
            carry_lineage(self.lineage, self._source, aside)
            target.mkdir(exist_ok=True)
            # Files of the previous model do not describe the new one.
            written = {file.name for file in aside.iterdir()}
            old = ("lineage.json", "recipe.yaml", "model.safetensors*", "model-*-of-*.safetensors")
            for stale in [file for pattern in old for file in target.glob(pattern) if file.name not in written]:
                stale.unlink()
            for file in sorted(aside.iterdir()):
                os.replace(file, target / file.name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Uploads the files of `save_pretrained` and a model card made from the lineage, in one commit.

        Args:
            repo_id: `owner/name`; created if missing.
            token: a token with write access; None uses `HF_TOKEN` or the stored login.
            private: whether a new repository is private; None is the account's default.
            revision: branch to commit to; created if missing.
            commit_message: None writes a default message.

        Returns:
            str: URL of the commit.

        Raises:
            PermissionError: the Hub refuses the token.
            ConnectionError: the Hub cannot be reached, or the upload failed; nothing was committed.
        """
        from mllm_vision.hub.card import find_run
        from mllm_vision.hub.push import push_directory

        run = find_run(self._source, self.lineage or {}) if self._source is not None else {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / repo_id.split("/")[-1]
            self.save_pretrained(path)
            run = run if (path / "lineage.json").is_file() else {}  # trained further: not the run's weights
            arguments: dict[str, Any] = {"token": token, "private": private, "revision": revision}
            return push_directory(path, repo_id, commit_message=commit_message, run=run, **arguments)

    def extra_repr(self) -> str:
        return f"select_layer={self.select_layer}, select_feature={self.select_feature!r}, image_size={self.image_size}"

    def _remember_selection(self) -> None:
        # In the config at once, not only on saving: a dual model or a VLM may save the backbone.
        kept = getattr(self.backbone.config, "mllm_vision", None) or {}  # the stem of a ResNet
        chosen = {"select_layer": self.select_layer, "select_feature": self.select_feature}
        self.backbone.config.mllm_vision = {**kept, **chosen}

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """(tokens, width) of a convolutional network, measured by a forward pass."""
        key = (self.image_size, self.select_layer)
        if self._probed is None or self._probed[0] != key:
            was_training = self.training
            self.eval()
            image = torch.zeros(1, getattr(self.config, "num_channels", 3), *(self.image_size,) * 2)
            tokens = extract_features(
                self.backbone, image.to(self.device), select_layer=self.select_layer, select_feature="patch"
            ).tokens
            assert tokens is not None
            self.train(was_training)
            self._probed = (key, (tokens.shape[1], tokens.shape[2]))
        return self._probed[1]


def _agreed_size(backbone: PreTrainedModel, processor: Any) -> int:
    """The common image size of processor and backbone; ValueError if they differ or patches are not square."""
    family = family_of(backbone)
    if not family.convolutional:
        _side(backbone.config.patch_size)
    size = processor_size(processor)
    if size is None:
        raise ValueError(
            f"{type(processor).__name__} does not make square images of one size (size={processor.size}, "
            f"crop_size={getattr(processor, 'crop_size', None)}); set both, or pass image_size="
        )
    fixed = family.positions is not None and not family.model_type.startswith("dinov2")
    if fixed and size != _side(backbone.config.image_size):
        own = _side(backbone.config.image_size)
        raise ValueError(
            f"the image processor makes images of {size}, but the {family.model_type} takes image_size={own}; "
            f"pass image_size={own} or image_size={size} to make both agree"
        )
    return size
