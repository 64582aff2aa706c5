"""Packed training is refused where a trial shows that the language model does not keep conversations apart."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import (
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
)

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
    assert model.packing_checked is exact and model.training and model.model.model.language_model.training
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
