"""What is saved is plain LLaVA: loaded in a process that cannot import this package."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

PLAIN = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

found = {}
for folder in sorted(Path(FOLDER).iterdir()):
    if not folder.is_dir():
        continue
    processor = AutoProcessor.from_pretrained(folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    auto = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(auto) is LlavaForConditionalGeneration, type(auto)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the star?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=Image.open(f"{FOLDER}/image.png"), return_tensors="pt",
                       add_special_tokens=False)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    words = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    # As the folder says it, with nothing set by hand: a batch of unlike lengths answers as each of its rows alone.
    asked = ["what?", "how many red stars are there on the left?", "a star"]
    talks = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in asked]
    prompts = [processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for talk in talks]
    image = Image.open(f"{FOLDER}/image.png")

    def say(texts, **padding):
        given = processor(
            text=texts, images=[image] * len(texts), return_tensors="pt", add_special_tokens=False, **padding
        )
        said = model.generate(**given, max_new_tokens=6)[:, given["input_ids"].shape[1]:]
        return processor.batch_decode(said, skip_special_tokens=True)

    alone = [say([prompt])[0] for prompt in prompts]
    assert say(prompts, padding=True) == alone, (folder.name, alone)
    torch.save({"text": text, "ids": inputs["input_ids"], "logits": logits, "words": words}, folder / "plain.pt")
assert "mllm_vision" not in sys.modules or sys.modules["mllm_vision"] is None
"""


def test_plain_transformers_loads_what_was_trained(build, make_batch, dialogue, tmp_path, run_python):
    """CLIP and SigLIP towers, both projectors, LoRA, GPT-2 and Qwen2: equal logits, equal words."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    from mllm_vision.vlm import freeze, load_vlm, save_vlm

    sizes = {"vocab_size": 300, "bos_token_id": 2, "eos_token_id": 3}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **sizes))
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            **sizes,
        )
    )
    cases = {
        "clip-mlp": {"kind": "clip"},
        "clip-linear-lora": {"kind": "clip", "system": "llava"},
        "siglip-mlp": {"kind": "siglip"},
        "siglip-linear-gpt2": {"kind": "siglip", "system": "llava", "llm": gpt2},
        "clip-qwen2": {"kind": "clip", "llm": qwen},
    }
    dialogue.image.save(tmp_path / "image.png")
    trained = {}
    for name, case in cases.items():
        model, processor = build(**case)
        train = (
            freeze(model, ("connector", "language_model=lora"), rank=2)
            if "lora" in name
            else freeze(model, ("connector", "language_model"))
        )
        optimizer = torch.optim.AdamW([p for p in train.parameters() if p.requires_grad], lr=1e-2)
        train.train()
        train(**make_batch(model)).loss.backward()  # so that what is compared is no initial value
        optimizer.step()
        train.eval()
        text = processor.apply_chat_template(dialogue.messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=dialogue.image, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            logits = train(**inputs).logits
        words = train.generate(**inputs, max_new_tokens=8, do_sample=False)
        save_vlm(train, processor, tmp_path / name)
        trained[name] = (text, inputs["input_ids"], logits, words)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (tmp_path / "clip-linear-lora" / "adapter" / "adapter_model.safetensors").is_file()

    run_python(f"FOLDER = {str(tmp_path)!r}\n" + PLAIN, block_package=True)
    for name, (text, ids, logits, words) in trained.items():
        plain = torch.load(tmp_path / name / "plain.pt")
        assert plain["text"] == text and torch.equal(plain["ids"], ids), name
        assert torch.allclose(plain["logits"], logits, atol=1e-5), name
        assert torch.equal(plain["words"], words), name
        again, processor = load_vlm(tmp_path / name)
        with torch.no_grad():
            inputs = processor(text=text, images=dialogue.image, return_tensors="pt", add_special_tokens=False)
            assert torch.allclose(again(**inputs).logits, logits, atol=1e-5), name


def test_buffers_that_no_file_holds_are_there_after_loading(build, tmp_path):
    """Falcon-H1 computes some while it is initialised; memory as it was found would be in their place."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    from mllm_vision.vlm import load_vlm, save_vlm

    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "ssm_multipliers": [0.5, 2.0, 3.0, 4.0, 5.0]}
    config = FalconH1Config(**sizes, **heads, **mamba)
    model, processor = build(llm=FalconH1ForCausalLM(config).eval())
    save_vlm(model, processor, tmp_path)
    again, _ = load_vlm(tmp_path)
    buffers = dict(again.named_buffers())
    assert any("mup_vector" in name for name in buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_saving_again_gives_the_same_weights(build, tmp_path):
    from mllm_vision.hub.lineage import hash_weights
    from mllm_vision.vlm import load_vlm, save_vlm

    for projector in ("llava15", "llava"):
        model, processor = build(system=projector)
        save_vlm(model, processor, tmp_path / projector)
        again, processor = load_vlm(tmp_path / projector)
        assert type(again.model.model.multi_modal_projector) is type(model.model.model.multi_modal_projector)
        save_vlm(again, processor, tmp_path / f"{projector}-again")
        hashes = {hash_weights(tmp_path / projector), hash_weights(tmp_path / f"{projector}-again")}
        assert len(hashes) == 1 and hash_weights(model.model) in hashes


def test_checkpoint_gives_back_its_tower(build, tmp_path):
    """The encoder of a saved model is an encoder again, the chosen layer and features included."""
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import save_vlm

    model, processor = build("clip", select_layer=-1, select_feature="cls_patch")
    save_vlm(model, processor, tmp_path / "vlm")
    encoder = VisionEncoder.from_pretrained(tmp_path / "vlm")
    assert (encoder.select_layer, encoder.select_feature) == (-1, "cls_patch")
    image = tiny.random_image(5)
    pixels = encoder.processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        projected = model.model.model.multi_modal_projector(encoder(pixels, pooled=False).tokens)[0]
        theirs = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        assert torch.allclose(projected, theirs, atol=1e-6)


def test_loading_something_else_is_a_clear_error(build, tmp_path):
    from mllm_vision.vlm import load_vlm

    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_vlm(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it contains nothing"):
        load_vlm(tmp_path / "empty")
    tiny.tiny_clip_vision().save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="'clip_vision_model' model, not a vision-language model"):
        load_vlm(tmp_path / "tower")


def test_a_foreign_llava_is_corrected_to_what_its_tower_gives(build, make_batch, tmp_path, caplog):
    """An `image_seq_length` that nothing uses, a processor without a patch size; both ways to name the weights."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoProcessor

    from mllm_vision.vlm import load_vlm, save_vlm

    model, processor = build()
    save_vlm(model, processor, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mllm_vision"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_seq_length": 576}))
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings |= {"patch_size": None, "vision_feature_select_strategy": None, "num_additional_image_tokens": 0}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    weights = load_file(tmp_path / "model.safetensors")
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= set(weights)  # llava-hf's
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    (tmp_path / "own").mkdir()
    for file in tmp_path.glob("*.json"):
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    save_file(own, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    for name, weight in load_vlm(tmp_path / "own")[0].state_dict().items():
        assert torch.equal(weight, own[name]), name
    again, read = load_vlm(tmp_path)
    assert again.config.image_seq_length == 16 and "image_seq_length=576 -> 16" in caplog.text
    assert "patch_size=None -> 8" in caplog.text
    batch = make_batch(model)
    with torch.no_grad():
        assert torch.allclose(again(**batch).loss, model(**batch).loss, atol=1e-6)
    text = read(text="<image>", images=tiny.random_image(), return_tensors="pt", add_special_tokens=False)
    assert int((text["input_ids"] == again.config.image_token_id).sum()) == 16
    save_vlm(again, read, tmp_path / "again")
    assert AutoProcessor.from_pretrained(tmp_path / "again").patch_size == 8


def test_a_processor_or_weights_that_do_not_belong_to_the_model(build, tmp_path):
    from safetensors.torch import load_file, save_file

    from mllm_vision.vlm import load_vlm, save_vlm

    model, processor = build()
    save_vlm(model, processor, tmp_path / "size")
    settings = json.loads((tmp_path / "size" / "processor_config.json").read_text())
    settings["image_processor"] |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
    (tmp_path / "size" / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"images of \(40, 40\) pixels, but the vision tower takes 32"):
        load_vlm(tmp_path / "size")
    save_vlm(model, processor, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "linear_2" not in name}
    save_file(kept, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 weights .*linear_2"):
        load_vlm(tmp_path / "part")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapters without their model"):
        load_vlm(tmp_path / "adapters")
    config = {"model_type": "llava", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised \(awq\)"):
        load_vlm(tmp_path / "quantised")


def test_answer_counts_images(build, dialogue):
    from mllm_vision.vlm import answer

    model, processor = build()
    assert isinstance(answer(model, processor, dialogue.messages, [dialogue.image], max_new_tokens=3), str)
    with pytest.raises(ValueError, match=r"contains 1 images .* 2 were given"):
        answer(model, processor, dialogue.messages, [dialogue.image] * 2)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        answer(model, processor, dialogue.messages, [dialogue.image])
