"""Building from any tower and any language model: tokens added, embeddings grown, impossible pairs refused."""

from __future__ import annotations

import pytest
import tiny
import torch


def encoder(kind="clip", backbone=None, **options):
    from mllm_vision.encoder import VisionEncoder

    backbone = backbone or {"clip": tiny.tiny_clip_vision, "siglip": tiny.tiny_siglip_vision}[kind]()
    return VisionEncoder.from_backbone(backbone, tiny.tiny_image_processor(kind), **options)


@pytest.fixture
def gpt2_folder(tmp_path):
    """A GPT-2 with a tokenizer of its own kind: one special token, no padding, no image token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: i for i, sign in enumerate([*alphabet, "<|endoftext|>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=256, eos_token_id=256, **sizes))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_missing_tokens_are_added_and_their_embeddings_are_the_mean(gpt2_folder):
    from transformers import AutoModelForCausalLM

    from mllm_vision.vlm import build_vlm

    old = AutoModelForCausalLM.from_pretrained(gpt2_folder).get_input_embeddings().weight
    model, processor = build_vlm(encoder(), gpt2_folder)
    tokenizer = processor.tokenizer
    assert len(tokenizer) == len(old) + 2 and model.config.text_config.vocab_size == len(tokenizer)
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.encode("a <image> b").count(model.config.image_token_id) == 1
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    for layer in (model.model.get_input_embeddings(), model.model.lm_head):
        assert layer.weight.shape[0] == len(tokenizer)
        assert torch.equal(layer.weight[: len(old)], old)
        assert torch.allclose(layer.weight[len(old) :], old.mean(0).expand(2, -1), atol=1e-7)


def test_language_model_computes_what_it_did_before(gpt2_folder):
    """On text alone the connected model is the language model it was given."""
    from transformers import AutoModelForCausalLM

    from mllm_vision.vlm import build_vlm

    ids = torch.randint(0, 256, (2, 11))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(gpt2_folder)(ids).logits
        model, _ = build_vlm(encoder(), gpt2_folder)
        assert torch.allclose(model(input_ids=ids).logits[..., : before.shape[-1]], before, atol=1e-5)


def test_image_word_in_the_vocabulary_keeps_its_id_and_nothing_grows(tokenizer_folder):
    from transformers import AutoTokenizer

    from mllm_vision.vlm import build_vlm

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    known, size = tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer)
    model, processor = build_vlm(encoder(), tiny.tiny_llama(size), tokenizer=tokenizer)
    assert model.config.image_token_id == processor.image_token_id == known
    assert len(tokenizer) == size == model.model.lm_head.weight.shape[0]
    assert tokenizer.encode("a<image><image>star", add_special_tokens=False).count(known) == 2


def test_tied_embeddings_stay_tied_in_llama(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    from mllm_vision.vlm import build_vlm, load_vlm, save_vlm

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    llm = tiny.tiny_llama(len(tokenizer), tie_word_embeddings=True)
    model, processor = build_vlm(encoder(), llm, tokenizer=tokenizer)
    assert model.model.lm_head.weight is model.model.get_input_embeddings().weight
    save_vlm(model, processor, tmp_path / "tied")
    again, _ = load_vlm(tmp_path / "tied")
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight
    assert torch.equal(again.model.lm_head.weight, model.model.lm_head.weight)


def test_real_pretrained_llama(data_dir):
    """stories260K: padding shares an id with <unk>, no image token, 512 words."""
    from mllm_vision.vlm import build_vlm

    model, processor = build_vlm(encoder("siglip"), data_dir / "stories260K_hf")
    assert model.config.image_token_id == 512 == processor.image_token_id
    assert model.model.lm_head.weight.shape[0] == len(processor.tokenizer) == 513
    ids = processor.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    words = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False)
    assert "there was a" in processor.tokenizer.decode(words[0])


@pytest.mark.parametrize("feature", ["cls", "pooled"])
def test_one_vector_a_image_is_refused(feature, tokenizer_folder):
    from mllm_vision.vlm import build_vlm

    with pytest.raises(ValueError, match=rf"select_feature='{feature}'.*select_feature='patch'"):
        build_vlm(encoder(select_feature=feature), tiny.tiny_llama(400), tokenizer=tokenizer_folder)


def test_feature_maps_are_refused(tokenizer_folder):
    from transformers import ResNetConfig, ResNetModel

    from mllm_vision.vlm import build_vlm

    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    with pytest.raises(ValueError, match="resnet gives feature maps"):
        build_vlm(encoder("clip", backbone=resnet), tiny.tiny_llama(400), tokenizer=tokenizer_folder)


def test_register_tokens_are_kept_or_refused(tokenizer_folder):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, LlavaForConditionalGeneration

    from mllm_vision.vlm import build_vlm

    def tower():
        config = Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            mlp_ratio=2,
            num_register_tokens=3,
        )
        return Dinov2WithRegistersModel(config).eval()

    with pytest.raises(ValueError, match="puts 4 tokens before its patches"):
        build_vlm(encoder(backbone=tower()), tiny.tiny_llama(400), tokenizer=tokenizer_folder)
    model, processor = build_vlm(
        encoder(backbone=tower(), select_feature="cls_patch"), tiny.tiny_llama(400), tokenizer=tokenizer_folder
    )
    inputs = processor(text="<image>", images=tiny.random_image(), return_tensors="pt", add_special_tokens=False)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16 + 4
    twin = LlavaForConditionalGeneration(model.config).eval()
    twin.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, twin(**inputs).logits, atol=1e-5)


def test_impossible_language_models_are_refused(tokenizer_folder, tmp_path):
    from transformers import GPTJConfig, GPTJForCausalLM

    from mllm_vision.vlm import build_vlm

    biased = GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=4, vocab_size=400))
    with pytest.raises(ValueError, match="output layer with a bias"):
        build_vlm(encoder(), biased, tokenizer=tokenizer_folder)
    with pytest.raises(ValueError, match="carries no tokenizer"):
        build_vlm(encoder(), tiny.tiny_llama(400))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        build_vlm(encoder(), tmp_path)
    with pytest.raises(ValueError, match="unknown system 'resample'"):
        build_vlm(encoder(), tiny.tiny_llama(400), "resample", tokenizer_folder)
