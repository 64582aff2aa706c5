"""Language models of many families: joined exactly, or refused in one line before anything is trained."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from causal_lms import tiny_causal_lm

FAMILIES = ["bloom", "cohere", "falcon", "gemma", "gemma3_text", "gpt_neox", "granite", "mpt", "olmo", "opt", "phi3"]


def own_logits(model, ids):
    with torch.no_grad():
        plain = model.model if hasattr(model, "system") else model
        return plain(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_joined_model_computes_and_generates_what_the_language_model_did(family, build, tmp_path):
    """Own logits beforehand are the oracle; a left-padded batch answers as each row alone, also after loading."""
    from transformers import LlavaForConditionalGeneration

    from mllm_vision.vlm import save_vlm

    llm = tiny_causal_lm(family, initializer_range=0.3) if family != "mpt" else tiny_causal_lm(family)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(20, 300, (2, 12), generator=generator)
    expected = own_logits(llm, ids)
    model, processor = build(llm=llm)
    save_vlm(model, processor, tmp_path)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    short = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[1:, :7]], dim=1)
    padded, mask = torch.cat([ids[:1], short]), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    few = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for each in (model, plain):
        joined = own_logits(each, ids)[..., : expected.shape[-1]]
        assert torch.allclose(joined, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6)
        together = each.generate(input_ids=padded, attention_mask=mask, **few)[:, 12:]
        alone = [each.generate(input_ids=row, attention_mask=torch.ones_like(row), **few)[0, row.shape[1] :]
                 for row in (ids[:1], ids[1:, :7])]  # fmt: skip
        assert torch.equal(together, torch.stack(alone))


def test_a_factor_is_folded_into_an_output_layer_of_its_own():
    """Granite divides by logits_scaling; its head was tied, and its embeddings stay as they are."""
    from mllm_vision.vlm.language_model import decoder_of, fold_factor, logit_factor

    llm = tiny_causal_lm("granite", logits_scaling=6.0, embedding_multiplier=3.0, tie_word_embeddings=True)
    table = llm.get_input_embeddings().weight
    before = table.clone()
    assert llm.lm_head.weight is table
    factor = logit_factor(llm, decoder_of(llm))
    assert factor == 1 / 6.0  # the configuration's own number, not a measured one
    fold_factor(llm, factor)
    assert torch.equal(table, before) and torch.equal(llm.lm_head.weight, before * factor)
    half = tiny_causal_lm("cohere", logit_scale=0.25).to(torch.bfloat16)
    assert logit_factor(half, decoder_of(half)) == 0.25
    for exact in (tiny_causal_lm("llama"), tiny_causal_lm("qwen2").to(torch.bfloat16)):
        assert logit_factor(exact, decoder_of(exact)) == 1.0


REFUSED = {
    "a cap, though the untrained logits are far below it": (
        "gemma2",
        {"final_logit_softcapping": 30.0},
        r"bends its logits .*final_logit_softcapping=30.0",
    ),
    "embeddings multiplied on the way from token ids only": (
        "falcon_h1",
        {"embedding_multiplier": 5.0},
        "something else from embeddings than from token ids",
    ),
    "attention in both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "see the ones after it"),
    "no attention": ("mamba", {}, "no key-value attention"),
    "nor here": ("rwkv", {}, "no key-value attention"),
    "a decoder out of an encoder-decoder": ("mbart", {}, "which transformers does not load by itself"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "_"))
def test_what_does_not_fit_is_refused_in_words(case, build):
    family, fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        build(llm=tiny_causal_lm(family, **fields))
    assert "--llm" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cap_that_is_off_is_no_cap(build):
    build(llm=tiny_causal_lm("gemma2", final_logit_softcapping=None))


def folder_of(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_folders_that_hold_something_else(build, tmp_path, tokenizer_folder):
    from transformers import LlamaForSequenceClassification, LlamaModel

    from mllm_vision.vlm.language_model import load_language_model

    llama = tiny.tiny_llama(300)
    quantised = {**llama.config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    cases = {
        folder_of(tmp_path / "t5", model_type="t5"): r"encoder-decoder \(t5\)",
        folder_of(tmp_path / "vlm", model_type="qwen2_vl"): r"vision-language model already \(qwen2_vl\)",
        folder_of(tmp_path / "tower", model_type="clip_vision_model"): "not a causal language model",
        folder_of(tmp_path / "quantised", **quantised): r"quantised \(gptq\)",
    }
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    cases[tmp_path / "adapters"] = "merge_and_unload"
    LlamaModel(llama.config).save_pretrained(tmp_path / "headless")
    cases[tmp_path / "headless"] = r"lacks 1 weights .*lm_head\.weight"
    LlamaForSequenceClassification(llama.config).save_pretrained(tmp_path / "classifier")
    cases[tmp_path / "classifier"] = r"lacks 1 weights .*lm_head\.weight"
    for folder, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_language_model(str(folder), torch.float32)
    llama.save_pretrained(tmp_path / "llama")
    assert type(load_language_model(str(tmp_path / "llama"), torch.float32)) is type(llama)


def test_tokenizers_that_are_missing_or_of_another_model(build, tmp_path, caplog):
    """Of a GPT-2 folder without its files transformers makes an empty tokenizer; of others none."""
    from mllm_vision.vlm.tokens import load_tokenizer

    for family, message in (("gpt2", "has no vocabulary"), ("bloom", "no tokenizer that can be read")):
        tiny_causal_lm(family).save_pretrained(tmp_path / family)
        with pytest.raises(ValueError, match=rf"{message}.*--tokenizer") as caught:
            load_tokenizer(str(tmp_path / family))
        assert "\n" not in str(caught.value)
    build(llm=tiny.tiny_llama(100))
    assert "embeddings for only 100" in caplog.text


def test_lora_leaves_routers_alone(build, make_batch):
    """A router is a linear layer with several outputs: the mixture trains, and its router keeps to itself."""
    from mllm_vision.vlm import freeze

    for family in ("phimoe", "granitemoe"):
        model, _ = build(llm=tiny_causal_lm(family))
        wrapped = freeze(model, ("connector", "language_model=lora"), rank=2).train()
        wrapped(**make_batch(model)).loss.backward()
        learnt = {name for name, weight in wrapped.named_parameters() if "lora_B" in name and weight.grad is not None}
        assert any("q_proj" in name for name in learnt) and not any("router" in name for name in learnt)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_and_padded_vocabularies_survive_saving(tied, build, make_batch, dialogue, tmp_path):
    """The vocabulary is padded to a multiple of 64 beyond the tokenizer's; adapters are merged on saving."""
    from mllm_vision.vlm import answer, freeze, load_vlm, save_vlm

    llm = tiny.tiny_llama(448, tie_word_embeddings=tied, initializer_range=0.3)
    model, processor = build(llm=llm)
    assert model.model.lm_head.weight.shape[0] == 448 > len(processor.tokenizer)
    wrapped = freeze(model, ("connector", "language_model=lora"), rank=4).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's B is zero at first: after two steps both of its matrices have moved
        optimizer.zero_grad()
        wrapped(**make_batch(model)).loss.backward()
        optimizer.step()
    wrapped.eval()
    batch = make_batch(model, rows=1)
    inputs = {"input_ids": batch["input_ids"][:, :-4], "pixel_values": batch["pixel_values"]}
    few = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits, words = wrapped(**inputs).logits, wrapped.generate(**inputs, **few)
    save_vlm(wrapped, processor, tmp_path)
    again, processor = load_vlm(tmp_path)
    assert (again.model.lm_head.weight is again.model.get_input_embeddings().weight) is tied
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, logits, atol=1e-4)
    assert torch.equal(again.generate(**inputs, **few), words)
    assert isinstance(answer(again, processor, dialogue.messages, [dialogue.image], max_new_tokens=3), str)


# Configurations of composite models, whose parts have sizes of their own, and two that are large by their nature.
COMPOSITE = (
    "gemma3 gemma3n gemma4 gemma4_unified llama4 mllama phi4_multimodal qwen3_5 qwen3_5_moe emu3 fuyu git got_ocr2"
)
LARGE = "blt dots3_note kimi_linear moss_transcribe_diarize roc_bert"


@pytest.mark.slow
def test_every_family_is_exact_or_refused_in_a_line(build, make_batch, tmp_path):
    """All that transformers knows: own logits, export, padding on the left and a checkpointed step; or a ValueError."""
    from transformers import LlavaForConditionalGeneration
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from mllm_vision.vlm import freeze, save_vlm

    ids = torch.randint(20, 300, (1, 10), generator=torch.Generator().manual_seed(0))
    exact, refused = [], {}
    for family in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {*COMPOSITE.split(), *LARGE.split()}):
        try:
            llm = tiny_causal_lm(family)
            expected = own_logits(llm, ids)
        except Exception:  # sizes that this configuration does not take: nothing of ours has run
            continue
        try:
            model, processor = build(llm=llm)
        except ValueError as error:
            assert "--llm" in str(error) and "\n" not in str(error), family
            refused[family] = str(error)
            continue
        folder = tmp_path / family
        save_vlm(model, processor, folder)
        plain = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        for each in (model, plain):
            difference = (own_logits(each, ids)[..., : expected.shape[-1]] - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max(), family
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:, :6]], dim=1)
        mask = torch.tensor([[0] * 4 + [1] * 6])
        few = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        alone = plain.generate(input_ids=ids[:, :6], attention_mask=torch.ones(1, 6, dtype=torch.long), **few)
        assert torch.equal(plain.generate(input_ids=padded, attention_mask=mask, **few)[0, 10:], alone[0, 6:]), family
        freeze(model, ("connector",))
        try:
            model.activation_checkpointing_enable()
        except ValueError as error:
            assert "cannot be checkpointed" in str(error), family
        model.train()(**make_batch(model, rows=2)).loss.backward()
        exact.append(family)
    print(f"exact: {len(exact)} ({', '.join(exact)}); refused: {len(refused)} ({', '.join(refused)})")
    assert len(exact) >= 100, exact
    assert {"gemma2", "mamba", "rwkv", "bart", "recurrent_gemma", "nanochat"} <= set(refused)
