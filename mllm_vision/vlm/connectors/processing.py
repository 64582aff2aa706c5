"""The processor of the models of this folder: several image processors at once, a fixed number of tokens an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BatchFeature, LlavaProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import MultiModalData

from mllm_vision.data.images.decoding import load_image
from mllm_vision.data.images.layouts import FixedLayout
from mllm_vision.data.images.transforms import ImageTransform
from mllm_vision.encoder.loading import processor_of
from mllm_vision.vlm.connectors.base import join_pixels
from mllm_vision.vlm.connectors.fused import PrismaticConfig
from mllm_vision.vlm.connectors.resampler import QwenVLConfig
from mllm_vision.vlm.connectors.spatial_aggregator import CambrianConfig


class JoinedImageProcessor(BaseImageProcessor):
    """The image processors of several towers as one: every tower gets the pixels of its own.

    Args:
        processors: image processors, or their dicts as in `preprocessor_config.json`.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, processors: Sequence[Any] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.processors = [each if isinstance(each, dict) else each.to_dict() for each in processors]

    @property
    def parts(self) -> list[Any]:
        """The image processors themselves."""
        return [processor_of(settings) for settings in self.processors]

    def __call__(  # type: ignore[override]  # the parts have settings of their own
        self, images: Any, *args: Any, **kwargs: Any
    ) -> BatchFeature:
        """`pixel_values` `[n, sum of 3 * H * W]`, see `join_pixels`."""
        return_tensors = kwargs.pop("return_tensors", None)
        found = [part(images=images, return_tensors="pt", **kwargs)["pixel_values"] for part in self.parts]
        return BatchFeature({"pixel_values": join_pixels(found)}, tensor_type=return_tensors)


class ConnectorProcessor(LlavaProcessor):
    """`LlavaProcessor` with a fixed number of tokens an image, and words around them.

    Args:
        image_processor: the tower's, or a `JoinedImageProcessor`.
        tokenizer: with the image token in its vocabulary.
        num_image_tokens: tokens an image.
        image_prefix, image_suffix: text around an image's tokens, such as Qwen-VL's `<img>` and `</img>`.
        chat_template: None is the tokenizer's.
        image_token: the token that stands for an image.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 576,
        image_prefix: str = "",
        image_suffix: str = "",
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens, self.image_prefix, self.image_suffix = num_image_tokens, image_prefix, image_suffix
        super().__init__(image_processor, tokenizer, chat_template=chat_template, image_token=image_token, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_prefix + self.image_token * self.num_image_tokens + self.image_suffix

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        number = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * number, num_image_patches=[1] * number)


class JoinedLayout(FixedLayout):
    """As `FixedLayout`, for the pixels of several towers.

    Args:
        image_processor: a `JoinedImageProcessor`.

    Gives "pixel_values" `[images, sum of 3 * H * W]`.
    """

    def __init__(
        self,
        image_token_id: int,
        num_tokens: int,
        image_processor: Any,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        first, *others = image_processor.parts
        super().__init__(image_token_id, num_tokens, first, before, after)
        self.processor = image_processor
        self.transforms = [self.transform, *(ImageTransform(each, train=False) for each in others)]

    def load(self, value: Any) -> Image.Image:
        return load_image(value)  # in full: the towers' sizes differ

    def __call__(self, images: Sequence[Image.Image], keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        return {"pixel_values": join_pixels([transform(images, keys=keys) for transform in self.transforms])}

    def blank(self) -> dict[str, Tensor]:
        return {"pixel_values": join_pixels([torch.zeros(1, 3, *each.size) for each in self.transforms])}


class _JoinedImages:
    """The key of `JoinedImageProcessor`, which belongs to no model type of its own."""


AutoImageProcessor.register(_JoinedImages, slow_image_processor_class=JoinedImageProcessor)
for _config in (CambrianConfig, PrismaticConfig, QwenVLConfig):
    AutoProcessor.register(_config, ConnectorProcessor)
