"""The flags of encoders and pairs of towers, shared by the recipes; torch is imported when they are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class EncoderArguments:
    """The vision encoder to train."""

    encoder: str = field(
        default="vit",
        metadata={
            "help": "A path, a Hub id, or a name to build: vit_small, clip_vit_base, resnet50 (docs/encoder.md).",
            "aliases": ["model_name_or_path"],
        },
    )
    encoder_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Config fields of a tower that is built: hidden_size=192."}
    )
    image_size: int | None = field(default=None, metadata={"help": "The side of the square images in pixels."})
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "The learning rate of that part."})

    @property
    def is_built(self) -> bool:
        """Whether the encoder starts with random weights."""
        from mllm_vision.encoder.sources import is_model_type

        return is_model_type(self.encoder)

    def build_encoder(self) -> Any:
        """The `VisionEncoder`, loaded or built; a built ViT has no BERT-style pooling layer.

        Raises:
            ValueError: see `encoder.sources.build_encoder`.
        """
        from mllm_vision.encoder.sources import build_encoder

        return build_encoder(self.encoder, image_size=self.image_size, overrides=self.encoder_overrides, pooler=False)


@dataclass(kw_only=True)
class DualArguments(EncoderArguments):
    """The image tower and the text tower to train."""

    encoder: str = field(
        default="clip_vision_model",
        metadata={
            "help": "A path, a Hub id, or a name to build: vit_small, clip_vit_base, resnet50 (docs/encoder.md).",
            "aliases": ["model_name_or_path"],
        },
    )
    text_learning_rate: float | None = field(default=None, metadata={"help": "The learning rate of that part."})
    text_tower: str | None = field(
        default=None, metadata={"help": "A path or Hub id, clip_text_model or siglip_text_model."}
    )
    text_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Config fields of a tower that is built: hidden_size=192."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "A path or Hub id; by default the text tower's."})
    embed_dim: int | None = field(
        default=None, metadata={"help": "The width of the shared space; by default the narrower tower's."}
    )
    max_text_length: int | None = field(
        default=None, metadata={"help": "Tokens of a text; by default 77 (CLIP) or 64 (SigLIP)."}
    )

    def build_dual(self, *, has_bias: bool = False) -> Any:
        """The `DualEncoder`, its towers loaded or built.

        Args:
            has_bias: whether the objective trains a logit bias (and sets its initial value).

        Raises:
            ValueError: see `encoder.dual.build_dual`.
        """
        from mllm_vision.encoder.dual import build_dual

        return build_dual(
            self.encoder,
            text_tower=self.text_tower,
            tokenizer=self.tokenizer,
            encoder_overrides=self.encoder_overrides,
            text_overrides=self.text_overrides,
            image_size=self.image_size,
            embed_dim=self.embed_dim,
            max_text_length=self.max_text_length,
            logit_bias=0.0 if has_bias else None,
        )

    @property
    def parents(self) -> dict[str, str]:
        """Role -> path or Hub id of inherited weights or vocabularies; model types have none."""
        from mllm_vision.encoder.sources import is_model_type
        from mllm_vision.encoder.text.tokenizers import CLIP_TEXT, SIGLIP_TEXT

        named = {"encoder": self.encoder, "text_tower": self.text_tower, "tokenizer": self.tokenizer}
        built = (None, "", CLIP_TEXT, SIGLIP_TEXT)
        return {role: source for role, source in named.items() if source not in built and not is_model_type(source)}
