"""Packed training is refused where a trial shows that the language model does not keep conversations apart."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mllm_vision.data import ConversationCollator
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import build_vlm
from mllm_vision.vlm.packing import check_packing

SIZES = {
    "vocab_size": 420, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=420, n_embd=32, n_layer=2, n_head=2, n_positions=512)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=40)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=100)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=420,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["local"], 2]],
            window_size=100,
            max_position_embeddings=512,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=420,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=420, hidden_size=32, n_layer=2, n_head=2)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def built(name, tokenizer):
    torch.manual_seed(0)
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    return build_vlm(encoder, MODELS[name](), tokenizer=tokenizer)[0]


@pytest.mark.parametrize(
    "name, longest, exact",
    [("llama", 200, True), ("gpt2", 200, True), ("mistral", 40, True), ("mistral", 48, False),
     ("gemma3", 100, True), ("gemma3", 140, False), ("bloom", 20, False),
     ("gpt_neo", (46, 90), True), ("gpt_neo", (46, 214), False)],
)  # fmt: skip
def test_the_trial_finds_what_is_not_exact(tokenizer, name, longest, exact) -> None:
    model = built(name, tokenizer)
    model.train()
    longest, row = longest if isinstance(longest, tuple) else (longest, None)
    before = torch.get_rng_state()
    if exact:
        check_packing(model, longest, row)
    else:
        with pytest.raises(ValueError, match=f"pack_turns.*{name}.*train without --pack_turns"):
            check_packing(model, longest, row)
    assert (
        ("pack_turns" in model.packing_checked) is exact
        and model.training
        and model.model.model.language_model.training
    )
    assert torch.equal(before, torch.get_rng_state()), "the run's random numbers stay its own"


def test_a_packed_batch_is_tried_before_it_is_learnt(tokenizer) -> None:
    model = built("bloom", tokenizer)
    ids = torch.arange(20, 40)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()}
    with pytest.raises(ValueError, match="pack_turns"):
        model(**batch, position_ids=ids)


def test_a_cache_that_is_kept_is_found(tokenizer, monkeypatch) -> None:
    """The Trainer sets `config.use_cache`, the language model reads `text_config.use_cache`."""
    model = built("llama", tokenizer)
    forward = model.model.model.language_model.forward

    def leaking(*args, attention_mask=None, **kwargs):
        return forward(*args, attention_mask=None, **kwargs)  # what a cache does to a packed row

    monkeypatch.setattr(model.model.model.language_model, "forward", leaking)
    with pytest.raises(ValueError, match="the logits differ by up to"):
        check_packing(model, 60)


def without_dropout(config):
    return {name: 0.0 for name, value in vars(config).items() if name.endswith(("dropout", "pdrop")) and value}


FAMILIES = (
    "llama",
    "gpt2",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "phi3",
    "olmo2",
    "gpt_neox",
    "smollm3",
    "stablelm",
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*FAMILIES])
def test_rows_of_several_samples_have_the_loss_and_gradients_of_separate_ones(tokenizer, name, attention) -> None:
    """Positions that begin again and no mask, in two rows of which one is padded."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name)
    for key, value in {**SIZES, **without_dropout(config), "head_dim": 8, "sliding_window": None}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    config.n_embd = config.word_embed_proj_dim = config.hidden_size = 32
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 2, 3
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * 2
    llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    model = build_vlm(encoder, llm, tokenizer=tokenizer)[0].train()
    sizes = [[30, 23, 41], [27, 35]]
    rows, found = [], {}
    for row in sizes:
        parts = [torch.randint(20, 200, (size,), generator=torch.Generator().manual_seed(size)) for size in row]
        for part in parts:
            part[1 : 1 + model.config.image_seq_length] = model.config.image_token_id
        labels = [torch.where(torch.arange(len(part)) > 20, part, -100) for part in parts]
        pixels = [torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(size)) for size in row]
        rows.append((parts, labels, pixels))
    segments = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in sizes]
    packed = ConversationCollator.pad(
        [
            {"input_ids": torch.cat(parts), "labels": torch.cat(labels), "segments": own}
            for (parts, labels, _), own in zip(rows, segments, strict=True)
        ],
        max(map(sum, sizes)),
        pad_id=0,
    )
    assert "attention_mask" not in packed
    count = torch.tensor(sum(int((labels != -100).sum()) for _, each, _ in rows for labels in each))
    packed["pixel_values"] = torch.cat([image for _, _, pixels in rows for image in pixels])
    alone = [
        {"input_ids": ids[None], "labels": labels[None], "pixel_values": image}
        for row in rows
        for ids, labels, image in zip(*row, strict=True)
    ]
    for kind, batches in {"packed": [packed], "alone": alone}.items():
        model.zero_grad()
        losses = [model(**batch, num_items_in_batch=count).loss for batch in batches]
        sum(losses).backward()
        found[kind] = (
            sum(losses).item(),
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        )
    assert found["packed"][0] == pytest.approx(found["alone"][0], rel=1e-5)
    for key, gradient in found["alone"][1].items():
        torch.testing.assert_close(found["packed"][1][key], gradient, atol=1e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize(
    "name, longest, row, exact",
    [("llama", 200, 400, True), ("gpt2", 100, 400, True), ("mistral", 40, 400, True), ("gemma3", 90, 400, True),
     ("gpt_neo", 46, 90, True), ("bloom", 20, 60, False), ("opt", 60, 90, False)],
)  # fmt: skip
def test_the_trial_of_rows_finds_what_is_not_exact(tokenizer, name, longest, row, exact) -> None:
    model = built(name, tokenizer)
    if exact:
        check_packing(model, longest, row, flag="packing")
    else:
        with pytest.raises(ValueError, match=f"packing.*{name}.*train without --packing"):
            check_packing(model, longest, row, flag="packing")
    assert ("packing" in model.packing_checked) is exact


def test_a_cache_that_is_kept_is_found_in_rows(tokenizer, monkeypatch) -> None:
    """With a cache, transformers 5.23 does not look for positions that begin again."""
    model = built("llama", tokenizer)
    decode = model.system.decode

    def caching(native, input_ids, attention_mask, position_ids, *others):
        return native.model(input_ids=input_ids, position_ids=position_ids, use_cache=True).last_hidden_state

    check_packing(model, 60, flag="packing")
    monkeypatch.setattr(model.system, "decode", caching)
    with pytest.raises(ValueError, match="packing: .* the logits differ by up to"):
        check_packing(model, 60, flag="packing")
    assert decode is not model.system.decode and "packing" not in model.packing_checked


def test_positions_without_a_mask_are_tried_before_they_are_learnt(tokenizer) -> None:
    model = built("bloom", tokenizer)
    ids = torch.arange(20, 40)[None]
    with pytest.raises(ValueError, match="--packing"):
        model(input_ids=ids, labels=ids, position_ids=torch.arange(10).repeat(2)[None])
