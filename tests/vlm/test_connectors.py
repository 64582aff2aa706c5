"""The models with a connector of their own, against plain loops and against themselves by another path."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from families import small
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ConvNextConfig, GPT2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_vision.encoder.features import extract_features
from mllm_vision.vlm.connectors import (
    CambrianConfig,
    CambrianForConditionalGeneration,
    ConnectorProcessor,
    JoinedImageProcessor,
    PrismaticConfig,
    PrismaticForConditionalGeneration,
    QwenVLConfig,
    QwenVLForConditionalGeneration,
)
from mllm_vision.vlm.connectors.base import join_pixels, split_pixels
from mllm_vision.vlm.connectors.resampler import Resampler, resize_positions, sincos_positions
from mllm_vision.vlm.connectors.spatial_aggregator import resize_map, windows

IMAGE = 4
SIGLIP, DINO = tiny.tiny_siglip_vision().config, tiny.tiny_dinov2(image_size=64).config
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 24], depths=[1, 1], num_stages=2, image_size=64)  # a map of 8 x 8


def make(kind: str, *, seed: int = 0, llm=None, **fields):
    """A tiny model whose weights are larger than at initialisation, and its number of tokens an image."""
    text = llm or tiny.tiny_llama(num_hidden_layers=4).config
    common = {"vision_config": SIGLIP, "text_config": text, "image_token_index": IMAGE}
    if kind == "qwen_vl":
        config = QwenVLConfig(**{**common, "num_queries": 9, "connector_heads": 2, **fields})
        model_class, tokens = QwenVLForConditionalGeneration, config.num_queries
    elif kind == "prismatic":
        config = PrismaticConfig(**{**common, "more_vision_configs": [tiny.tiny_dinov2().config], **fields})
        model_class, tokens = PrismaticForConditionalGeneration, 16
    else:
        inner = {"inner_layers": 2, "inner_start": 1, "inner_stride": 2} if kind == "cambrian" else {}
        sizes = {"query_side": 4, "vision_sides": [4, 8, 12], "connector_hidden_size": 32, "connector_heads": 2}
        towers = {"more_vision_configs": [DINO, CONVNEXT], "vision_widths": [32, 32, 24]}
        towers["vision_feature_layers"] = [-2, -1, -1]
        config = CambrianConfig(**{**common, **towers, **sizes, **inner, **fields})
        model_class, tokens = CambrianForConditionalGeneration, config.query_side**2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, tokens


KINDS = ["qwen_vl", "prismatic", "cambrian", "cambrian without inner layers"]


def pixels(model, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sides = [config.image_size for config in model.config.vision_configs]
    return join_pixels([torch.randn(n, 3, side, side, generator=generator) for side in sides])


def words(tokens: int, *, images: int = 1, start: int = 10, more: int = 3):
    return torch.tensor([[2, start, *([IMAGE] * tokens + [start + 1]) * images, *range(start + 2, start + 2 + more)]])


def largest(one, other) -> float:
    return float((one - other).abs().max())


# -- the resampler -----------------------------------------------------------------------------------------------


def test_positions_are_sines_of_column_and_row():
    side, dim = 3, 8
    table = sincos_positions(side, dim)
    for row in range(side):
        for column in range(side):
            for axis, place in enumerate((column, row)):
                for index in range(dim // 4):
                    angle = place / 10000 ** (index / (dim // 4))
                    found = table[row * side + column, axis * dim // 2 :]
                    assert float(found[index]) == pytest.approx(math.sin(angle), abs=1e-6)
                    assert float(found[dim // 4 + index]) == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ValueError, match="dim=10 is not divisible by 4"):
        sincos_positions(2, 10)


def test_positions_of_another_grid_are_interpolated():
    table = sincos_positions(4, 8)
    assert resize_positions(table, 4) is table
    larger = resize_positions(table, 8)
    wanted = F.interpolate(table.reshape(1, 4, 4, 8).permute(0, 3, 1, 2), size=(8, 8), mode="bicubic")
    torch.testing.assert_close(larger.reshape(8, 8, 8), wanted[0].permute(1, 2, 0))
    # the column's channels stay the same in every row, and differ from column to column
    grid = larger.reshape(8, 8, 8)
    torch.testing.assert_close(grid[:, :, :4], grid[:1, :, :4].expand(8, -1, -1), atol=1e-5, rtol=0)
    assert float((grid[:, 1:, :4] - grid[:, :-1, :4]).abs().amax(-1).min()) > 0.05


@pytest.mark.parametrize("side", [3, 4])
def test_the_resampler_is_attention_by_loops(side):
    torch.manual_seed(0)
    resampler = Resampler(20, 16, num_queries=9, num_heads=2)
    for parameter in resampler.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randn(2, side * side, 20)
    own = sincos_positions(3, 16)
    other = resize_positions(own, side)
    wanted = torch.zeros(2, 9, 16)
    for image in range(2):
        value_rows = [resampler.ln_kv(resampler.kv_proj.weight @ token) for token in tokens[image]]
        for query in range(9):
            attended = []
            q = resampler.q_proj(resampler.ln_q(resampler.query[query]) + own[query])
            for head in range(2):
                part = slice(8 * head, 8 * head + 8)
                scores = torch.stack(
                    [
                        q[part] @ resampler.k_proj(row + place)[part] / 8**0.5
                        for row, place in zip(value_rows, other, strict=True)
                    ]
                )
                weights = scores.softmax(0)
                attended.append(
                    sum(w * resampler.v_proj(row)[part] for w, row in zip(weights, value_rows, strict=True))
                )
            wanted[image, query] = resampler.ln_post(resampler.out_proj(torch.cat(attended))) @ resampler.proj
    torch.testing.assert_close(resampler([tokens]), wanted, atol=2e-5, rtol=1e-4)


def test_a_tower_as_wide_as_the_language_model_needs_no_projection():
    assert isinstance(Resampler(16, 16, 4, 2).kv_proj, torch.nn.Identity)
    with pytest.raises(ValueError, match="10 tokens are not a square"):
        Resampler(16, 16, 10, 2)
    with pytest.raises(ValueError, match="connector_heads=3 does not divide"):
        Resampler(16, 16, 9, 3)


# -- the aggregator ----------------------------------------------------------------------------------------------


def attend(layer, query, context, keys_of_towers):
    """One query of one layer by loops: `keys_of_towers[t]` are the places of tower t's window."""
    inner = layer.proj_in(torch.cat([query, layer.proj_context(context)]))
    keys, values = [], []
    for tower, places in enumerate(keys_of_towers):
        for number, place in enumerate(places):
            if len(places) > 1:
                place = place + layer.positions[str(tower)][number]
            keys.append(layer.k_proj[tower](layer.norm_k[tower](place)))
            values.append(layer.v_proj[tower](layer.norm_v[tower](place)))
    q = layer.q_proj(layer.norm_q(inner))
    width = len(q) // layer.num_heads
    heads = []
    for head in range(layer.num_heads):
        part = slice(width * head, width * (head + 1))
        weights = torch.stack([q[part] @ key[part] / width**0.5 for key in keys]).softmax(0)
        heads.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
    return query + layer.mlp(layer.norm(inner + layer.o_proj(torch.cat(heads))))


def window_of(tower_map, side: int, row: int, column: int):
    """The places of one window by loops, row by row."""
    whole = round(len(tower_map) ** 0.5)
    factor = whole // side
    return [tower_map[(row * factor + i) * whole + column * factor + j] for i in range(factor) for j in range(factor)]


@torch.no_grad()
def test_the_aggregator_is_windows_by_loops():
    model, _ = make("cambrian")
    features = model.model.tower_features(pixels(model, 2))
    assert [tuple(each.shape[1:]) for each in features] == [(16, 32), (64, 32), (64, 24)]
    aggregator = model.model.multi_modal_projector
    maps = aggregator.maps(features)
    assert [each.shape[1] for each in maps] == [16, 64, 144]
    wanted = torch.zeros(2, 16, 32)
    for image in range(2):
        context = maps[0][image].mean(0)
        for place in range(16):
            parts = [window_of(each[image], 4, place // 4, place % 4) for each in maps]
            query = aggregator.query
            for layer in aggregator.layers:
                query = attend(layer, query, context, parts)
            wanted[image, place] = aggregator.projection(query)
    torch.testing.assert_close(model.model.connect(features)[..., :32], wanted, atol=1e-5, rtol=1e-4)


def test_each_query_sees_its_own_window_only():
    tokens = torch.arange(2 * 36, dtype=torch.float32).reshape(2, 36, 1)
    found = windows(tokens, 3)
    assert found.shape == (18, 4, 1)
    for image in range(2):
        for place in range(9):
            wanted = torch.stack(window_of(tokens[image], 3, place // 3, place % 3))
            assert torch.equal(found[image * 9 + place], wanted)


def test_maps_are_resized_bilinearly():
    tokens = torch.randn(1, 9, 2)
    wanted = F.interpolate(tokens.reshape(1, 3, 3, 2).permute(0, 3, 1, 2), size=(6, 6), mode="bilinear")
    torch.testing.assert_close(resize_map(tokens, 6).reshape(6, 6, 2), wanted[0].permute(1, 2, 0))
    assert resize_map(tokens, 3) is tokens


@torch.no_grad()
def test_inside_the_language_model_the_image_tokens_meet_the_towers_again():
    """The language model layer by layer by hand, with the aggregation after layers 1 and 3."""
    model, tokens = make("cambrian")
    ids = torch.cat([words(tokens), words(tokens, start=20)])
    images = pixels(model, 2)
    inner, text = model.model, model.model.language_model
    found = inner.get_image_features(images)
    maps = inner.multi_modal_projector.maps(inner.tower_features(images))
    hidden = text.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = text.rotary_emb(hidden, positions)
    for row in range(2):
        hidden[row, ids[row] == IMAGE] = found.pooler_output[row][:, :32]
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for number, layer in enumerate(text.layers):
        # the layer's own parts, so that the hook under test does not run
        states = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn(hidden_states=states, position_embeddings=rotary, attention_mask=mask)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if number in (1, 3):
            aggregator = inner.multi_modal_projector.inner_layers[number // 2]
            for row in range(2):
                places = (ids[row] == IMAGE).nonzero().flatten()
                for number_of, at in enumerate(places.tolist()):
                    parts = [window_of(each[row], 4, number_of // 4, number_of % 4) for each in maps]
                    hidden[row, at] = attend(aggregator, hidden[row, at].clone(), maps[0][row].mean(0), parts)
    wanted = model.lm_head(text.norm(hidden))
    torch.testing.assert_close(model(input_ids=ids, pixel_values=images).logits, wanted, atol=2e-4, rtol=1e-3)


def test_a_copy_has_its_own_inner_layers():
    model, tokens = make("cambrian")
    other = copy.deepcopy(model)
    ids, images = words(tokens), pixels(model, 1)
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=images).logits
        for parameter in model.model.multi_modal_projector.inner_layers.parameters():
            parameter.mul_(1.5)
        changed = model(input_ids=ids, pixel_values=images).logits
        assert torch.equal(other(input_ids=ids, pixel_values=images).logits, before)
    assert largest(changed, before) > 1e-3


def test_inner_layers_get_a_gradient_without_images():
    model, _ = make("cambrian")
    model.train()
    ids = torch.tensor([[2, 10, 11, 12]])
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = [parameter.grad for parameter in model.model.multi_modal_projector.inner_layers.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)
    with torch.no_grad():
        assert torch.equal(out.logits, model.eval()(input_ids=ids).logits)


def test_language_models_without_a_place_for_inner_layers_are_refused():
    gpt2 = GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=256, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="GPT2Model has no list of decoder layers.*inner_layers=0"):
        make("cambrian", llm=gpt2)
    with pytest.raises(ValueError, match=r"decoder layers \[1, 4\] do not fit a language model of 4 layers"):
        make("cambrian", inner_stride=3)
    with pytest.raises(ValueError, match=r"vision_sides=\[4, 8, 10\].*multiples of query_side=4"):
        make("cambrian", vision_sides=[4, 8, 10])
    with pytest.raises(ValueError, match="vision_sides=None"):
        make("cambrian", vision_sides=None)
    with pytest.raises(ValueError, match="not divisible by connector_heads=5"):
        make("cambrian", connector_heads=5)


def test_tokens_alone_do_not_suffice_with_inner_layers():
    model, tokens = make("cambrian")
    output = BaseModelOutputWithPooling(pooler_output=[torch.randn(tokens, 32)])
    with pytest.raises(ValueError, match="have 32 channels; with inner_layers=2 they have 512"):
        model(input_ids=words(tokens), mm_encoder_outputs={"image": output})


# -- the fused MLP -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_fused_mlp_joins_the_channels_of_layer_minus_two():
    model, _ = make("prismatic")
    images = pixels(model, 2)
    first, second = split_pixels(images, model.config.vision_configs)
    one = model.model.vision_tower(first, output_hidden_states=True).hidden_states[-2]
    two = model.model.more_vision_towers[0](second, output_hidden_states=True).hidden_states[-2][:, 1:]
    mlp = model.model.multi_modal_projector
    assert (mlp.linear_1.out_features, mlp.linear_2.out_features) == (4 * 64, 32)
    joined = torch.cat([one, two], dim=-1)
    hidden = F.gelu(joined @ mlp.linear_1.weight.T + mlp.linear_1.bias)
    hidden = F.gelu(hidden @ mlp.linear_2.weight.T + mlp.linear_2.bias)
    wanted = hidden @ mlp.linear_3.weight.T + mlp.linear_3.bias
    torch.testing.assert_close(torch.stack(model.get_image_features(images).pooler_output), wanted)


def test_grids_that_differ_are_refused():
    model, _ = make("prismatic", more_vision_configs=[DINO])
    with pytest.raises(ValueError, match=r"\[16, 64\] tokens an image.*one grid"):
        model.get_image_features(pixels(model, 1))


# -- all of them -------------------------------------------------------------------------------------------------


def test_pixels_of_several_towers_travel_as_one_tensor():
    model, _ = make("cambrian")
    images = [torch.randn(2, 3, side, side) for side in (32, 64, 64)]
    joined = join_pixels(images)
    assert joined.shape == (2, 3 * (32 * 32 + 2 * 64 * 64))
    assert all(torch.equal(*pair) for pair in zip(model.model.split_pixels(joined), images, strict=True))
    with torch.no_grad():
        both = [model.get_image_features(each).pooler_output[1] for each in (joined, images)]
    assert torch.equal(*both)
    with pytest.raises(ValueError, match=r"images of \[32, 64, 64\] pixels take \[n, 27648\]"):
        model.get_image_features(joined[:, :-1])
    with pytest.raises(ValueError, match="2 tensors for 3 towers"):
        model.get_image_features(images[:2])
    with pytest.raises(ValueError, match=r"have \[2, 1\] images"):
        join_pixels([images[0], images[1][:1]])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_reloaded_by_the_auto_class(tmp_path, kind):
    model, tokens = make(kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).model_type == model.config.model_type
    ids, images = words(tokens), pixels(model, 1)
    with torch.no_grad():
        assert (
            largest(again(input_ids=ids, pixel_values=images).logits, model(input_ids=ids, pixel_values=images).logits)
            == 0
        )
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_connection_apart_are_the_whole(kind):
    model, tokens = make(kind)
    ids, images = torch.cat([words(tokens), words(tokens, start=20)]), pixels(model, 2)
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=images).logits
        features = [each.clone() for each in model.model.tower_features(images)]
        flat = model.model.connect(features).flatten(0, 1)
        output = BaseModelOutputWithPooling(pooler_output=[flat])
        assert torch.equal(model(input_ids=ids, mm_encoder_outputs={"image": output}).logits, wanted)
        swapped = model(input_ids=ids, pixel_values=images.flip(0)).logits
        assert largest(swapped, wanted) > 1e-3  # the image matters


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_cache_beams_and_padding(kind):
    model, tokens = make(kind)
    images = pixels(model, 3)
    short, long = words(tokens, more=1), words(tokens, images=2, start=20, more=4)
    fixed = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = [
        model.generate(input_ids=ids, pixel_values=images[which], **fixed)[0, ids.shape[1] :]
        for ids, which in ((short, slice(0, 1)), (long, slice(1, 3)))
    ]
    width = long.shape[1]
    padded = torch.cat([F.pad(short, (width - short.shape[1], 0)), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (width - short.shape[1], 0)), torch.ones_like(long)])
    for extra in ({}, {"use_cache": False}):
        together = model.generate(input_ids=padded, attention_mask=mask, pixel_values=images, **fixed, **extra)
        assert torch.equal(together[:, width:], torch.stack(alone))
    beams = model.generate(input_ids=padded, attention_mask=mask, pixel_values=images, num_beams=2, **fixed)
    one = model.generate(input_ids=long, pixel_values=images[1:], num_beams=2, **fixed)
    assert torch.equal(beams[1, width:], one[0, width:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter_of_the_connector(kind, checkpointing):
    model, tokens = make(kind)
    model.train()
    ids, images = words(tokens), pixels(model, 1)
    model(input_ids=ids, pixel_values=images, labels=ids).loss.backward()
    connector = dict(model.model.multi_modal_projector.named_parameters())
    assert not [name for name, each in connector.items() if each.grad is None or not each.grad.any()]
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.any()
    if checkpointing:
        before = {name: each.grad.clone() for name, each in connector.items()}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(input_ids=ids, pixel_values=images, labels=ids).loss.backward()
        for name, each in connector.items():
            torch.testing.assert_close(each.grad, before[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_supervised_positions_only(kind):
    model, tokens = make(kind)
    ids, images = words(tokens, images=2), pixels(model, 2)
    labels = ids.masked_fill(ids == IMAGE, -100)
    whole = model(input_ids=ids, pixel_values=images, labels=labels).loss
    logits = model(input_ids=ids, pixel_values=images).logits
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(whole, by_hand)
    shift = F.pad(labels, (0, 1), value=-100)[:, 1:]
    keep = shift != -100
    kept = model(input_ids=ids, pixel_values=images, labels=labels, shift_labels=shift[keep], logits_to_keep=keep).loss
    torch.testing.assert_close(kept, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_number_of_tokens_or_another_layer_is_refused(kind):
    model, tokens = make(kind)
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=words(tokens - 1), pixel_values=pixels(model, 1))
    with pytest.raises(ValueError, match="vision_feature_layer=0.*leave it out"):
        model(input_ids=words(tokens), pixel_values=pixels(model, 1), vision_feature_layer=0)


def test_each_tower_has_its_own_layer():
    model, _ = make("cambrian", vision_feature_layers=[-1, 1, 1], vision_widths=[32, 32, 8])
    images = model.model.split_pixels(pixels(model, 1))
    found = model.model.tower_features(images)
    for tower, image, layer, tokens in zip(model.model.towers, images, (-1, 1, 1), found, strict=True):
        assert torch.equal(tokens, extract_features(tower, image, select_layer=layer, select_feature="patch").tokens)
    wrong, _ = make("cambrian", vision_feature_layers=[-1, 1, 1])
    with pytest.raises(ValueError, match=r"tokens of \[32, 32, 8\] channels.*vision_widths=\[32, 32, 24\]"):
        wrong.get_image_features(pixels(wrong, 1))
    with pytest.raises(ValueError, match=r"vision_feature_layers=\[-2\] has 1 entries for 3 towers"):
        make("cambrian", vision_feature_layers=[-2])


def test_a_convolutional_tower_under_the_resampler(tmp_path):
    encoder = small("efficientnet", image_size=64, select_layer=-1)
    encoder.config.image_size = 64
    side = round(encoder.num_tokens**0.5)
    model, tokens = make(
        "qwen_vl", vision_config=encoder.config, vision_widths=[encoder.hidden_size], vision_feature_layer=-1
    )
    model.model.vision_tower.load_state_dict(encoder.backbone.state_dict())
    images = pixels(model, 2)
    with torch.no_grad():
        (features,) = model.model.tower_features(images)
        assert features.shape == (2, side * side, encoder.hidden_size)
        found = model.get_image_features(images).pooler_output
    assert found[0].shape == (tokens, 32)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        # the same weights; the convolution's sums depend on where they lie in memory
        torch.testing.assert_close(again.get_image_features(images).pooler_output[1], found[1], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_processor_gives_every_tower_its_own_pixels(tmp_path):
    parts = [tiny.tiny_image_processor("siglip"), tiny.tiny_image_processor("dinov2", 64)]
    tokenizer = tiny.tiny_tokenizer(tmp_path / "words")
    joined = JoinedImageProcessor(parts)
    processor = ConnectorProcessor(joined, tokenizer, num_image_tokens=5, image_prefix="a", image_suffix="b")
    images = [tiny.random_image(3, (40, 50)), tiny.random_image(4, (64, 30))]
    text = ["<image> a red circle", "a blue square <image>"]
    found = processor(images=images, text=text, return_tensors="pt", padding=True)
    for each, part in zip(split_pixels(found["pixel_values"], [SIGLIP, DINO]), parts, strict=True):
        assert torch.equal(each, part(images=images, return_tensors="pt")["pixel_values"])
    assert (found["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [5, 5]
    longer = text[0].replace("<image>", "a" + "<image>" * 5 + "b")
    alone = processor(images=images[:1], text=text[:1], return_tensors="pt")["input_ids"]
    assert torch.equal(alone, tokenizer(longer, return_tensors="pt")["input_ids"])
    assert processor._get_num_multimodal_tokens(image_sizes=[(9, 9)] * 2).num_image_tokens == [5, 5]
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is ConnectorProcessor
    same = again(images=images, text=text, return_tensors="pt", padding=True)
    assert all(torch.equal(same[name], found[name]) for name in found)
