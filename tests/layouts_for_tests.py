"""Layouts of tiny images beside the native processors they must agree with, for tests of several folders."""

from __future__ import annotations

from typing import Any

from PIL import Image
from tiny import random_image
from transformers import Idefics2Processor, Idefics3Processor, LlavaNextProcessor
from transformers.models.got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next import LlavaNextImageProcessorPil

from mllm_vision.data.images.layouts import AnyResolutionLayout, NativeAspectLayout, SplitLayout, TilesLayout

GRIDS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SQUARE = {"height": 32, "width": 32}
FAKE = "<fake_token_around_image>"


def image_of(height: int, width: int) -> Image.Image:
    return random_image(height * 7 + width, (width, height))


def any_resolution(tokenizer: Any) -> tuple[AnyResolutionLayout, Any]:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=GRIDS)
    native = LlavaNextProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full")
    return AnyResolutionLayout(tokenizer.convert_tokens_to_ids("<image>"), 4, images), native


def tiles_layout(most: int = 6, least: int = 1) -> tuple[TilesLayout, Any]:
    processor = GotOcr2ImageProcessorPil(size=SQUARE, min_patches=least, max_patches=most)
    return TilesLayout(7, 4, processor, start=1, end=2), processor


def native_aspect(tokenizer: Any, splitting: bool = False) -> tuple[NativeAspectLayout, Any]:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 48}, do_image_splitting=splitting)
    native = Idefics2Processor(images, tokenizer, image_seq_len=4)
    around = tokenizer.convert_tokens_to_ids(FAKE)
    return NativeAspectLayout(tokenizer.convert_tokens_to_ids("<image>"), 4, images, around), native


def split_layout(tokenizer: Any, longest: int = 64, splitting: bool = True) -> tuple[SplitLayout, Any]:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": 16}, do_image_splitting=splitting
    )
    native = Idefics3Processor(images, tokenizer, image_seq_len=4)
    return SplitLayout(tokenizer.convert_tokens_to_ids("<image>"), 4, images, tokenizer), native
