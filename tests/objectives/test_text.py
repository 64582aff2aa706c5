"""Tokenizers end their texts, stay themselves when saved, and fit their tower; pooling against a second path."""

from __future__ import annotations

import pytest
import torch
from pairs_for_tests import TEXT_SIZES, make_dual, tokenizer
from tiny import tiny_clip, tiny_llama

from mllm_vision.encoder.text.pooling import default_pooling, pool_text
from mllm_vision.encoder.text.tokenizers import prepare_tokenizer
from mllm_vision.encoder.text.towers import build_text_tower

LONG = "there is a red circle at the left of the image and a blue square on the right of it"


@pytest.mark.parametrize("kind", ["clip_text_model", "siglip_text_model"])
def test_every_text_ends_with_the_end_token_also_when_cut_and_when_loaded_plainly(kind, tmp_path):
    from transformers import AutoTokenizer

    before = tokenizer()(LONG)["input_ids"]
    prepared = prepare_tokenizer(tokenizer(), kind, 8)
    assert tokenizer()(LONG)["input_ids"] == before and tokenizer().padding_side == "left"  # not changed
    prepared.save_pretrained(tmp_path)
    for one in (prepared, AutoTokenizer.from_pretrained(tmp_path)):
        assert one(LONG)["input_ids"] == [*before, 3]
        rows = one(["a red circle", LONG], padding=True, truncation=True, return_tensors="pt")["input_ids"]
        assert rows.shape == (2, 8) and rows[1, -1] == 3
        assert rows[0].tolist() == one("a red circle")["input_ids"] + [0] * (8 - len(one("a red circle")["input_ids"]))
        assert "attention_mask" in one("a")


def relabelled(path, **special):
    """A small tokenizer of another kind: whole words, special tokens as told."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[END]", "[CLS]", "a", "red", "circle", "on", "the", "left", "of", "blue", "square"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special.pop("bert", False):
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [END]", special_tokens=[("[CLS]", 3), ("[END]", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def test_end_id_two_would_be_pooled_wrongly_so_it_gets_a_new_end_token():
    """transformers' CLIP takes eos_token_id=2 for a legacy config and pools at the highest id of the text."""
    text, prepared = build_text_tower(
        "clip_text_model",
        relabelled(None, pad_token="[PAD]", eos_token="[END]"),
        overrides=TEXT_SIZES,
        max_length=12,
    )
    assert prepared.eos_token_id == 13 and text.config.eos_token_id == 13 and text.config.vocab_size == 14
    batch = prepared(["a red circle", "a blue square on the left"], padding=True, return_tensors="pt")
    pooled = pool_text(text, batch["input_ids"])
    states = text(**batch).last_hidden_state
    ends = (batch["input_ids"] == 13).int().argmax(1)
    torch.testing.assert_close(pooled, states[torch.arange(2), ends])


def test_a_bert_tokenizer_ends_with_its_separator():
    bert = relabelled(None, pad_token="[PAD]", sep_token="[END]", cls_token="[CLS]", bert=True)
    prepared = prepare_tokenizer(bert, "siglip_text_model", 12)
    assert prepared("a red circle")["input_ids"] == [3, 4, 5, 6, 2] and prepared.eos_token_id == 2
    added = prepare_tokenizer(bert, "clip_text_model", 12)
    assert added("a red circle")["input_ids"][-1] == added.eos_token_id == 13


def test_no_tokenizer_is_left_without_padding():
    prepared = prepare_tokenizer(relabelled(None, eos_token="[END]"), "bert", 12)
    assert prepared.pad_token_id == 2


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_short_batches_give_what_the_native_model_gives_at_full_length(kind, mask):
    """SigLIP, masked (our towers) and unmasked (the published ones), and CLIP, which is the same either way."""
    dual = make_dual(kind, bias=-10.0 if kind == "siglip" else None)
    if not mask:
        dual.tokenizer.model_input_names = ["input_ids"]
    texts = ["a red circle", "there is a red circle at the left"]
    full = dual.tokenizer(texts, padding="max_length", max_length=77 if kind == "clip" else 64, return_tensors="pt")
    assert ("attention_mask" in full) == mask
    expected = torch.nn.functional.normalize(dual.text_projection(dual.text(**full).pooler_output), dim=-1)
    for some, rows in ((texts, expected), (texts[:1], expected[:1])):
        torch.testing.assert_close(dual.encode_texts(some), rows, rtol=1e-5, atol=1e-6)
    features = dual.text_features(full["input_ids"], full.get("attention_mask"))  # nothing left to shorten
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), expected, rtol=1e-5, atol=1e-6)


def test_pooling_of_towers_without_a_pooler(tmp_path):
    model = tiny_llama().model
    assert default_pooling(model) == "last" and default_pooling(tiny_clip().text_model) == "pooler"
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids != 0).long()
    last = pool_text(model, ids, mask, pooling="last")
    mean = pool_text(model, ids, mask, pooling="mean")
    short = model(input_ids=ids[1:, :2]).last_hidden_state[0]
    torch.testing.assert_close(last[1], short[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean[1], short.mean(0), rtol=1e-4, atol=1e-5)


def test_a_whole_clip_model_gives_its_text_tower(tmp_path):
    model = tiny_clip(text={"vocab_size": 400})
    model.save_pretrained(tmp_path)
    text, prepared = build_text_tower(str(tmp_path), tokenizer())
    assert prepared.model_max_length == 32 and text.config.model_type == "clip_text_model"
    ids = torch.tensor([[5, 6, 3]])
    torch.testing.assert_close(pool_text(text, ids), model.text_model(input_ids=ids).pooler_output)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": 1}, "no room"),
        ({"overrides": {"hiden_size": 8}}, "nearest known one is 'hidden_size'"),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(ValueError, match=words):
        build_text_tower("clip_text_model", tokenizer(), **settings)


def test_a_shorter_length_leaves_the_positions_that_pipelines_ask_for():
    """The pipeline cuts no CLIP prompt, and pads every SigLIP prompt to 64, whatever the tokenizer says."""
    for kind, positions in (("clip_text_model", 77), ("siglip_text_model", 64)):
        text, prepared = build_text_tower(kind, tokenizer(), overrides=TEXT_SIZES, max_length=12)
        assert (text.config.max_position_embeddings, prepared.model_max_length) == (positions, 12)
    with pytest.raises(ValueError, match="use 64 or less"):
        build_text_tower("siglip_text_model", tokenizer(), max_length=65)


def test_refusals_of_pretrained_towers(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "small_vocabulary")
    tiny_clip(text={"vocab_size": 400, "eos_token_id": 7}).save_pretrained(tmp_path / "other_end")
    with pytest.raises(ValueError, match="ids up to 399 but the text tower's vocab_size is 256"):
        build_text_tower(str(tmp_path / "small_vocabulary"), tokenizer())
    with pytest.raises(ValueError, match="pools at eos_token_id=7"):
        build_text_tower(str(tmp_path / "other_end"), tokenizer())
    with pytest.raises(ValueError, match="max_length=40 but"):
        build_text_tower(str(tmp_path / "other_end"), tokenizer(), max_length=40)
    with pytest.raises(ValueError, match="only apply to a tower built here"):
        build_text_tower(str(tmp_path / "other_end"), tokenizer(), overrides={"hidden_size": 8})
