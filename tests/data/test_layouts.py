"""Image layouts: tokens counted from sizes are those of the native processors, and tensors are theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts_for_tests import FAKE, GRIDS, SQUARE, any_resolution, image_of, native_aspect, split_layout, tiles_layout
from PIL import Image
from tiny import random_image, tiny_image_processor, tiny_tokenizer
from transformers import LlavaNextConfig, LlavaProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava import LlavaImageProcessorPil
from transformers.models.llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mllm_vision.data.images.layouts import AnyResolutionLayout, FixedLayout, PaddedLayout
from mllm_vision.data.images.transforms import ImageTransform

ODD = [(1, 1), (1, 90), (90, 1), (3, 50), (50, 3), (32, 32), (31, 33), (64, 64), (45, 200), (200, 45), (5, 400)]
SIDES = st.integers(1, 160)
SIZES = st.tuples(st.one_of(SIDES, st.integers(1, 6000)), st.one_of(SIDES, st.integers(1, 6000)))
FEW = settings(max_examples=25, deadline=None)
MANY = settings(max_examples=400, deadline=None)


@pytest.fixture
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def shared_tokenizer(tmp_path_factory):
    """One for the properties; the processors add their marks to it."""
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    marks = ["<global-img>", FAKE, *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]
    tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    return tokenizer


def expanded(layout, tokenizer, text, images):
    """A text through our path: its unexpanded ids, then the layout's tokens in place of the image tokens."""
    ids = np.asarray(tokenizer(text)["input_ids"])
    sizes = [(image.height, image.width) for image in images]
    found, repeat = layout.expand(ids, sizes)
    assert repeat.sum() == len(found)
    for height, width in sizes:
        assert len(layout.tokens(height, width)) <= layout.longest
    return found.tolist()


# -- fixed and padded squares -----------------------------------------------------------------------------------------


def test_a_fixed_layout_counts_as_its_processor(shared_tokenizer):
    for strategy, additional, count in (("full", 0, 16), ("default", 1, 16), ("full", 1, 17)):
        native = LlavaProcessor(tiny_image_processor(), shared_tokenizer, 8, strategy, None, "<image>", additional)
        assert native._get_num_multimodal_tokens([(50, 40)])["num_image_tokens"] == [count]
        text, images = "a <image> star <image>", [image_of(50, 40), image_of(3, 9)]
        layout = FixedLayout(native.image_token_id, count, native)
        given = native(text=text, images=images, return_tensors="pt")
        assert expanded(layout, shared_tokenizer, text, images) == given["input_ids"][0].tolist()
        assert torch.allclose(layout(images)["pixel_values"], given["pixel_values"], atol=1.01 / 255 / 0.26)


def test_a_fixed_layout_repeats_the_image_token_between_its_marks():
    layout = FixedLayout(7, 3, tiny_image_processor(), before=(1, 2), after=(9,))
    assert layout.fixed and layout.longest == 6 and layout.tokens(5, 900).tolist() == [1, 2, 7, 7, 7, 9]
    ids, repeat = layout.expand(np.asarray([4, 7, 5, 7]))
    assert ids.tolist() == [4, 1, 2, 7, 7, 7, 9, 5, 1, 2, 7, 7, 7, 9] and ids.dtype == np.int64
    assert repeat.tolist() == [1, 6, 1, 6]
    assert layout.expand(np.asarray([4, 5]))[0].tolist() == [4, 5]
    images = [random_image(1, (50, 40)), random_image(2)]
    assert torch.equal(layout(images)["pixel_values"], ImageTransform(tiny_image_processor())(images))
    assert layout.blank()["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        FixedLayout(7, 0, tiny_image_processor())
    with pytest.raises(ValueError, match="image_processor=None is not one"):
        FixedLayout(7, 1, None)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (33, 33), (1, 20), (20, 3)])
def test_padded_images_are_those_of_the_native_processor(size):
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE)
    layout = PaddedLayout(7, 16, processor)
    image = image_of(*size)
    native = processor(images=[image], return_tensors="pt")["pixel_values"]
    ours = layout([image])["pixel_values"]
    assert layout.fixed and layout.longest == 16 and ours.shape == (1, 3, 32, 32)
    grey_level = 1 / 255 / min(processor.image_std)
    assert (ours - native).abs().max() <= 1.01 * grey_level, "one grey level"
    assert (ours - native).abs().mean() < 0.05 * grey_level


def test_a_processor_that_does_not_pad_is_refused():
    for processor in (tiny_image_processor(), LlavaImageProcessorPil(do_pad=False)):
        with pytest.raises(ValueError, match=r"does not pad images to squares.*LlavaImageProcessor\(do_pad=True\)"):
            PaddedLayout(7, 16, processor)


# -- LLaVA-NeXT -------------------------------------------------------------------------------------------------------


def test_any_resolution_by_hand(shared_tokenizer):
    """Tiles of 4 x 4 tokens. A square: base 16, grid 8 x 8 with 8 newlines. 64 x 32: grid 8 x 4 with 8 newlines.

    40 x 64 in a grid of 32 x 64 would lose a third; in 64 x 64 it has 40 of 64 rows: 5 of 8, after rounding to even
    padding 6: 6 x 8 with 6 newlines.
    """
    layout, _ = any_resolution(shared_tokenizer)
    assert len(layout.tokens(64, 64)) == 16 + 64 + 8 == layout.longest
    assert len(layout.tokens(64, 32)) == 16 + 32 + 8
    assert len(layout.tokens(40, 64)) == 16 + 48 + 6
    assert not layout.fixed and set(layout.tokens(9, 9).tolist()) == {layout.image_token_id}
    with pytest.raises(ValueError, match=r"multiples of the tile of 32 pixels.*\(48, 32\)"):
        AnyResolutionLayout(
            1, 4, LlavaNextImageProcessorPil(size={"shortest_edge": 32}, image_grid_pinpoints=[[48, 32]])
        )


@MANY
@given(size=SIZES)
def test_any_resolution_counts_as_processor_and_model(shared_tokenizer, size):
    layout, native = any_resolution(shared_tokenizer)
    count = len(layout.tokens(*size))
    assert count == native._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"][0] <= layout.longest
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}, image_grid_pinpoints=GRIDS
    )
    holder = type("Model", (), {"config": config})()
    height, width = select_best_resolution(size, GRIDS)
    tiles = height * width // 32**2 + 1
    [packed], lengths = LlavaNextModel.pack_image_features(
        holder, [torch.zeros(tiles, 16, 2)], torch.tensor([size]), "full", torch.zeros(2)
    )
    assert len(packed) == int(lengths[0]) == count


@pytest.mark.parametrize("sizes", [ODD[:4], ODD[4:8], ODD[8:]])
def test_any_resolution_texts_and_tensors_are_the_processors(shared_tokenizer, sizes):
    layout, native = any_resolution(shared_tokenizer)
    images = [image_of(*size) for size in sizes]
    text = "a red " + " star <image>".join(map(str, range(len(sizes) + 1)))
    given = native(text=text, images=images, return_tensors="pt")
    assert expanded(layout, shared_tokenizer, text, images) == given["input_ids"][0].tolist()
    ours = layout(images)
    assert set(ours) == {"pixel_values", "image_sizes", "tiles"}
    tiles = [pixels[:count] for pixels, count in zip(given["pixel_values"], ours["tiles"].tolist(), strict=True)]
    assert torch.equal(ours["pixel_values"], torch.cat(tiles))
    padding = [pixels[count:] for pixels, count in zip(given["pixel_values"], ours["tiles"].tolist(), strict=True)]
    assert not any(each.any() for each in padding), "all others are the processor's padding"
    assert torch.equal(ours["image_sizes"], given["image_sizes"])
    blank = layout.blank()
    assert blank["pixel_values"].shape[0] == int(blank["tiles"]) and blank["image_sizes"].shape == (1, 2)


# -- InternVL ---------------------------------------------------------------------------------------------------------


def test_tiles_by_hand():
    layout, _ = tiles_layout()
    image = [7] * 4
    assert layout.tokens(32, 32).tolist() == [1, *image, 2], "one tile, and no thumbnail"
    assert layout.tokens(32, 64).tolist() == [1, *image * 3, 2], "1 x 2 tiles and the thumbnail"
    assert len(layout.tokens(64, 96)) == 2 + 4 * 7 == layout.longest
    assert tiles_layout(most=1)[0].longest == 2 + 4


@FEW
@given(size=st.tuples(SIDES, SIDES))
def test_tiles_are_as_many_as_the_processor_gives(size):
    layout, processor = tiles_layout()
    image = image_of(*size)
    native = processor(images=[image], crop_to_patches=True, return_tensors="pt")
    ours = layout([image, image])
    assert (layout.tokens(*size) == 7).sum() == 4 * int(native["num_patches"][0])
    assert ours["tiles"].tolist() == [int(native["num_patches"][0])] * 2
    assert torch.equal(ours["pixel_values"], torch.cat([native["pixel_values"]] * 2))


@pytest.mark.parametrize("most, least", [(6, 1), (12, 1), (1, 1), (4, 3)])
def test_tiles_of_odd_images(most, least):
    layout, processor = tiles_layout(most, least)
    images = [image_of(*size) for size in ODD]
    native = processor(images=images, crop_to_patches=True, return_tensors="pt")
    ours = layout(images)
    assert torch.equal(ours["pixel_values"], native["pixel_values"])
    assert torch.equal(ours["tiles"], native["num_patches"])
    assert [len(layout.tokens(*size)) - 2 for size in ODD] == (4 * native["num_patches"]).tolist()
    assert all(len(layout.tokens(*size)) <= layout.longest for size in ODD)


# -- Idefics2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize(
    "text", ["<image><image> a star <image>", "a <image>\n<image>", "<image><image><image> b", "two <image> <image>"]
)
def test_native_aspect_texts_and_tensors_are_the_processors(tokenizer, splitting, text):
    layout, native = native_aspect(tokenizer, splitting)
    sizes = [(40, 90), (17, 23), (60, 20)][: text.count("<image>")]
    images = [image_of(*size) for size in sizes]
    given = native(text=text, images=images, return_tensors="pt")
    assert expanded(layout, tokenizer, text, images) == given["input_ids"][0].tolist()
    ours = layout(images)
    assert torch.equal(ours["pixel_values"], given["pixel_values"][0])
    assert torch.equal(ours["pixel_attention_mask"], given["pixel_attention_mask"][0])
    assert layout.fixed and layout.longest == (1 + 5 * 5 if splitting else 6)


def test_native_aspect_by_hand(tokenizer):
    layout, _ = native_aspect(tokenizer)
    fake, image = layout.shared, layout.image_token_id
    assert layout.tokens(1, 1).tolist() == [fake, image, image, image, image, fake]
    ids, repeat = layout.expand(np.asarray([5, image, image, 6, image]))
    assert ids.tolist() == [5, fake, *[image] * 4, fake, *[image] * 4, fake, 6, fake, *[image] * 4, fake]
    assert repeat.tolist() == [1, 6, 5, 1, 6], "the second image begins with the first one's last mark"
    blank = layout.blank()
    assert (blank["pixel_values"] != 0).all(), "Idefics2 drops images of zeros"
    assert blank["pixel_attention_mask"].all()


# -- Idefics3 ---------------------------------------------------------------------------------------------------------


def test_split_by_hand(shared_tokenizer):
    layout, _ = split_layout(shared_tokenizer)
    read = shared_tokenizer.convert_tokens_to_ids
    image, fake = [read("<image>")] * 4, read(FAKE)
    assert layout.grid(10, 60) == (1, 4) and layout.grid(1, 1) == (4, 4)
    found = layout.tokens(10, 60).tolist()
    for column in range(4):
        start = 6 * column
        assert found[start : start + 6] == [fake, read(f"<row_1_col_{column + 1}>"), *image]
    assert found[-7:] == [fake, read("<global-img>"), *image, fake]
    small, _ = split_layout(shared_tokenizer, longest=16)
    assert small.tokens(50, 50).tolist() == [fake, read("<global-img>"), *image, fake] and small.grid(9, 9) == (0, 0)


@pytest.mark.parametrize("splitting, longest", [(True, 64), (True, 50), (False, 64), (True, 16)])
def test_split_texts_and_tensors_are_the_processors(shared_tokenizer, splitting, longest):
    layout, native = split_layout(shared_tokenizer, longest, splitting)
    images = [image_of(*size) for size in ODD]
    text = "a red " + " star <image>".join(map(str, range(len(ODD) + 1)))
    given = native(text=text, images=[images], return_tensors="pt")
    assert expanded(layout, shared_tokenizer, text, images) == given["input_ids"][0].tolist()
    ours = layout(images)
    assert torch.equal(ours["pixel_values"], given["pixel_values"][0]) and given["pixel_attention_mask"].all()
    assert int(ours["tiles"].sum()) == given["pixel_values"].shape[1]
    assert (layout.blank()["pixel_values"] != 0).all()


@MANY
@given(size=SIZES, longest=st.sampled_from([32, 50, 64, 70, 96]))
def test_split_grids_are_those_that_the_processor_cuts(shared_tokenizer, size, longest):
    """Against the processor's own cutting, of arrays without memory; its count from sizes leaves a rounding out."""
    layout, native = split_layout(shared_tokenizer, longest)
    processor = native.image_processor
    processor.resize = lambda image, size, **options: blank_of(image, size)
    image = processor.resize(np.broadcast_to(np.float32(0), (3, *size)), processor.size)
    image = processor.resize_for_vision_encoder(image, 16)
    _, rows, columns = processor.split_images(image, processor.max_image_size)
    assert layout.grid(*size) == (rows, columns)
    assert len(layout.tokens(*size)) <= layout.longest
    if longest % 16 == 0:
        alone = len(shared_tokenizer("\n", add_special_tokens=False)["input_ids"]) - 1  # a prefix, not inside a text
        count = native._get_num_multimodal_tokens([size])["num_image_tokens"][0]
        assert len(layout.tokens(*size)) == count - alone * (rows > 0)


def blank_of(image, size):
    from transformers.image_utils import SizeDict
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    size = SizeDict(**dict(size)) if not hasattr(size, "longest_edge") else size
    shape = get_resize_output_image_size(image, size.longest_edge) if size.longest_edge else (size.height, size.width)
    return np.broadcast_to(np.float32(0), (3, *shape))


# -- every layout -----------------------------------------------------------------------------------------------------


def every(tokenizer):
    padded = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE)
    yield FixedLayout(4, 3, tiny_image_processor())
    yield PaddedLayout(4, 3, padded)
    yield any_resolution(tokenizer)[0]
    yield tiles_layout()[0]
    yield native_aspect(tokenizer)[0]
    yield split_layout(tokenizer)[0]


def test_what_all_layouts_have(shared_tokenizer):
    identities = set()
    for layout in every(shared_tokenizer):
        assert isinstance(layout.load(np.zeros((5, 6, 3), np.uint8)), Image.Image)
        if not layout.fixed:
            with pytest.raises(AssertionError, match="have sizes"):
                layout.expand(np.asarray([layout.image_token_id]))
        tensors = layout.blank()
        assert "pixel_values" in tensors and all(isinstance(each, torch.Tensor) for each in tensors.values())
        assert not layout.identity().count("0x"), "no addresses: it names caches of other processes"
        identities.add(layout.identity())
    assert len(identities) == 6
    assert tiles_layout(5)[0].identity() != tiles_layout(6)[0].identity()
