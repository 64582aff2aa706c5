"""What the systems without a class in transformers share: one or several towers around a model of `vlm.connectors`."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mllm_vision.data.images.layouts import FixedLayout, ImageLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.encoder.features import num_layers
from mllm_vision.encoder.sizes import resize_backbone
from mllm_vision.vlm.connectors.base import image_side
from mllm_vision.vlm.connectors.processing import ConnectorProcessor, JoinedImageProcessor, JoinedLayout
from mllm_vision.vlm.language_model import JoinedLanguageModel
from mllm_vision.vlm.systems.base import Parts, System
from mllm_vision.vlm.tokens import check_image_token


@dataclasses.dataclass
class SeveralTowers:
    """Settings of systems with several towers, the first of which is `--encoder`."""

    more_encoders: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Further encoders: folders or Hub ids."}
    )
    more_image_sizes: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "The sides of their images; by default their own.", "rare": True}
    )
    more_select_layers: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "Their layers; by default their own choice.", "rare": True}
    )

    def load(self) -> list[VisionEncoder]:
        """The further encoders.

        Raises:
            ValueError: sizes or layers for another number of encoders, and see `VisionEncoder.from_pretrained`.
            OSError: one cannot be read.
        """
        count = len(self.more_encoders)
        for name in ("more_image_sizes", "more_select_layers"):
            if (given := getattr(self, name)) and len(given) != count:
                raise ValueError(
                    f"{name}={given} has {len(given)} entries for {count} more_encoders; give one for each"
                )
        unset: list[Any] = [None] * count
        sizes, layers = (each or unset for each in (self.more_image_sizes, self.more_select_layers))
        return [
            VisionEncoder.from_pretrained(path, image_size=size, select_layer=layer)
            for path, size, layer in zip(self.more_encoders, sizes, layers, strict=True)
        ]


class OwnSystem(System):
    """A system whose native class is a `ConnectorForConditionalGeneration`.

    Its checkpoints load through AutoModelForImageTextToText wherever `mllm_vision.vlm.connectors` was imported.

    Attributes:
        model_class: the native class.
        brackets: special tokens before and after an image.
    """

    config: Any
    model_class: ClassVar[type]
    brackets: ClassVar[tuple[str, str]] = ("", "")
    parts: ClassVar[Parts] = Parts(
        encoder=["model.vision_tower", "model.more_vision_towers"],
        connector=["model.multi_modal_projector"],
        language_model=["model.language_model", "lm_head"],
    )

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._others: list[VisionEncoder] | None = None

    @abstractmethod
    def fields(self, encoders: Sequence[VisionEncoder], language: JoinedLanguageModel) -> dict[str, Any]:
        """The fields of the native config beside those of every system of this kind."""

    @abstractmethod
    def num_tokens(self, encoders: Sequence[VisionEncoder]) -> int:
        """Image tokens an image.

        Raises:
            ValueError: encoders that do not fit the system, with the remedy.
        """

    def encoders(self, encoder: VisionEncoder) -> list[VisionEncoder]:
        """All encoders: the given one, and those of `more_encoders`, read once.

        Raises:
            ValueError: one whose tokens are not the patches of a square grid.
        """
        if self._others is None:
            self._others = self.config.load() if isinstance(self.config, SeveralTowers) else []
        found = [encoder, *self._others]
        for each in found:
            if each.select_feature != "patch":
                raise ValueError(
                    f"system={self.name} takes the patches of a {each.config.model_type}, not its "
                    f"select_feature={each.select_feature!r}; use --select_feature patch"
                )
            # What DINOv2 interpolates at every call, and what convolutional configs do not say.
            resize_backbone(each.backbone, each.image_size)
            each.config.image_size = each.image_size
        return found

    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> ConnectorProcessor:
        encoders = self.encoders(encoder)
        parts = [each.processor for each in encoders]
        before, after = self.brackets
        return ConnectorProcessor(
            image_processor=parts[0] if len(parts) == 1 else JoinedImageProcessor(parts),
            tokenizer=tokenizer,
            num_image_tokens=self.num_tokens(encoders),
            image_prefix=before,
            image_suffix=after,
            chat_template=tokenizer.chat_template,
            image_token=self.image_token,
        )

    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        encoders = self.encoders(encoder)
        kind: Any = self.model_class
        config = kind.config_class(
            vision_config=encoder.config,
            more_vision_configs=[each.config.to_dict() for each in encoders[1:]],
            text_config=language.base.config,
            image_token_index=language.image_token_id,
            image_seq_length=self.num_tokens(encoders),
            # 0 (the embeddings) counted from the end, as in Llava
            vision_feature_layers=[each.select_layer or -(num_layers(each.backbone) + 1) for each in encoders],
            vision_widths=[each.hidden_size for each in encoders],
            tie_word_embeddings=language.tied,
            **self.fields(encoders, language),
        )
        with torch.device("meta"):  # every part is replaced below, so nothing is allocated twice
            model: Any = kind(config)
        model.config.vision_config, model.config.text_config = encoder.config, language.base.config
        model.model.vision_tower = encoder.backbone
        for index, each in enumerate(encoders[1:]):
            model.model.more_vision_towers[index] = each.backbone
        model.model.language_model, model.lm_head = language.base, language.head
        model.model.multi_modal_projector = model.model.build_connector(model.config).to(language.head.weight)
        return model

    def layout(self, model: Any, processor: Any) -> ImageLayout:
        tokenizer, images = processor.tokenizer, processor.image_processor
        kind = JoinedLayout if isinstance(images, JoinedImageProcessor) else FixedLayout
        before, after = ([tokenizer.convert_tokens_to_ids(each)] if each else [] for each in self.brackets)
        return kind(model.config.image_token_id, model.config.image_seq_length, images, before, after)

    def blank(self, model: Any) -> dict[str, Tensor]:
        configs = model.config.vision_configs
        if len(configs) == 1:
            return super().blank(model)
        pixels = sum(getattr(each, "num_channels", 3) * image_side(each) ** 2 for each in configs)
        return {"pixel_values": next(self.parts.tower(model).parameters()).new_zeros(1, pixels)}

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        processor = super().load_processor(model, path, **hub)
        if not isinstance(processor, ConnectorProcessor):
            raise ValueError(
                f"{path} has no ConnectorProcessor (found: {type(processor).__name__}); save the model again with "
                "save_vlm"
            )
        check_image_token(model, processor, path)
        if processor.num_image_tokens != model.config.image_seq_length:
            raise ValueError(
                f"{path}: the processor spells an image as {processor.num_image_tokens} tokens, but the model gives "
                f"{model.config.image_seq_length}; correct num_image_tokens in processor_config.json"
            )
        return processor

    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        return torch.cat(model.model.tower_features(images["pixel_values"]), dim=-1)

    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        return model.model.connect([features]).flatten(0, 1)
