"""The model against transformers' own LLaVA, which is the oracle for everything computed in a cheaper way."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F


def plain_twin(model):
    """transformers' own class with the same weights."""
    from transformers import LlavaForConditionalGeneration

    twin = LlavaForConditionalGeneration(model.config).eval()
    state = model.model.state_dict()
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
@pytest.mark.parametrize("system", ["llava15", "llava"])
def test_logits_and_words_equal_plain_llava(build, make_batch, kind, system):
    model, _ = build(kind, system)
    twin, batch = plain_twin(model), make_batch(model, rows=2)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, twin(**inputs).logits, atol=1e-5)
    prompt = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:1]}
    words = [m.generate(**prompt, max_new_tokens=6, do_sample=False).tolist() for m in (model, twin)]
    assert words[0] == words[1]


@pytest.mark.parametrize("select_layer", [-1, -2, 0, 1])
def test_every_layer_equals_plain_llava(build, make_batch, select_layer):
    model, _ = build("clip", select_layer=select_layer)
    twin, batch = plain_twin(model), make_batch(model, rows=1)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, twin(**inputs).logits, atol=1e-5)


def test_class_token_is_kept_when_asked_for(build, make_batch):
    model, processor = build("clip", select_feature="cls_patch")
    assert model.config.image_seq_length == 17 and model.config.vision_feature_select_strategy == "full"
    twin, batch = plain_twin(model), make_batch(model, rows=1)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, twin(**inputs).logits, atol=1e-5)
    text = processor(text="<image>", images=tiny.random_image(), return_tensors="pt", add_special_tokens=False)
    assert int((text["input_ids"] == model.config.image_token_id).sum()) == 17


def test_loss_and_gradients_equal_the_full_computation(build, make_batch):
    """Supervised positions only, no padding mask: against plain Llava's whole logits and textbook cross-entropy."""
    model, _ = build()
    twin, batch = plain_twin(model), make_batch(model)
    output = model(**batch, return_logits=True)
    logits = twin(**{name: batch[name] for name in batch if name != "labels"}).logits
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(output.loss, whole, atol=1e-6)
    assert output.logits.shape == (int((batch["labels"] != -100).sum()), logits.shape[-1])
    output.loss.backward()
    whole.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.model.named_parameters():
        other = theirs[name].grad
        if other is None:  # layers above the selected one do not run here, and have no gradient there
            assert parameter.grad is None, name
        else:
            assert torch.allclose(parameter.grad, other, atol=1e-6), name


def test_accumulated_micro_batches_weigh_every_token_alike(build, make_batch):
    model, _ = build()
    batch = make_batch(model)
    total = int((batch["labels"] != -100).sum())
    batch["labels"][0, :-3] = -100  # uneven: the mean of means would be another number
    total = int((batch["labels"] != -100).sum())
    whole = model(**batch).loss
    parts = [
        model(**{name: value[row : row + 1] for name, value in batch.items()}, num_items_in_batch=total).loss
        for row in range(3)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-6)
    means = [model(**{name: value[row : row + 1] for name, value in batch.items()}).loss for row in range(3)]
    assert not torch.allclose(sum(means) / 3, whole, atol=1e-4)


def test_label_smoothing_is_of_the_next_token(build, make_batch):
    """Against the textbook formula over plain Llava's whole logits; in evaluation the loss stays as it is."""
    model, _ = build()
    twin, batch = plain_twin(model), make_batch(model)
    plain = model(**batch).loss
    model.label_smoothing = 0.2
    assert torch.equal(model(**batch).loss, plain)
    logits = twin(**{name: batch[name] for name in batch if name != "labels"}).logits[:, :-1]
    targets, chances = batch["labels"][:, 1:], logits.log_softmax(-1)
    learnt = targets != -100
    smooth = torch.full_like(chances, 0.2 / chances.shape[-1])
    smooth.scatter_(2, targets.clamp(min=0)[..., None], 0.8 + 0.2 / chances.shape[-1])
    expected = -(smooth * chances).sum(-1)[learnt].mean()
    assert torch.allclose(model.train()(**batch).loss, expected, atol=1e-6)


def test_trainer_leaves_smoothing_to_the_model(build, make_batch, tmp_path):
    from transformers import TrainingArguments

    from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer
    from mllm_vision.vlm import freeze

    model, _ = build()
    batch = make_batch(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.3, report_to="none")
    RecipeTrainer(model=model, args=arguments, train_dataset=[{}] * 8)
    model.train()
    expected = model(**batch).loss
    wrapped = freeze(build()[0], ("connector", "language_model=lora"), rank=1)
    trainer = RecipeTrainer(model=wrapped, args=arguments, train_dataset=[{}] * 8)
    wrapped.train()
    assert torch.allclose(trainer.compute_loss(wrapped, dict(batch)), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_frozen_language_model_is_checkpointed_and_computes_as_in_evaluation(build, make_batch, family):
    """OPT's layer has a dropout of its own, which must not wake up: the gradients are those without checkpointing."""
    from transformers import OPTConfig, OPTForCausalLM

    from mllm_vision.vlm import freeze

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.5}
    llm = None
    if family == "opt":
        llm = OPTForCausalLM(OPTConfig(vocab_size=400, word_embed_proj_dim=32, max_position_embeddings=128, **sizes))
    model, _ = build(llm=llm)
    freeze(model, ("connector",)).train()
    batch, weight = make_batch(model), model.model.model.multi_modal_projector.linear_1.weight
    runs = []
    decoder = getattr(model.model.model.language_model, "decoder", model.model.model.language_model)
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    model(**batch).loss.backward()
    expected, once = weight.grad.clone(), len(runs)
    model.zero_grad()
    runs.clear()
    model.activation_checkpointing_enable()
    model.train()
    model(**batch).loss.backward()
    assert len(runs) == 2 * once == 4  # every layer's attention runs again in the backward pass
    assert torch.allclose(weight.grad, expected, atol=1e-6)
    freeze(model, ("connector", "language_model")).train()
    assert all(layer.training for layer in decoder.layers)
    if family == "opt":  # what trains has its dropout
        first, second = (model(**batch).loss.item() for _ in range(2))
        assert first != second
    model.eval()
    assert not any(module.training for module in model.modules())


def test_layers_that_cannot_be_checkpointed_are_told(build):
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, _ = build()
    layers = model.model.model.language_model.layers
    for number, layer in enumerate(layers):  # the same modules under a class that transformers does not checkpoint
        plain = torch.nn.Module()
        plain.parts = torch.nn.ModuleList(layer.children())
        layers[number] = plain
    assert not any(isinstance(module, GradientCheckpointingLayer) for module in layers.modules())
    with pytest.raises(ValueError, match="the layers of LlamaModel cannot be checkpointed"):
        model.activation_checkpointing_enable()


def test_no_layer_above_the_selected_one_runs(build, make_batch):
    model, _ = build(layers=3)
    calls = []
    for index, layer in enumerate(model.model.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    model(**make_batch(model))
    assert calls == [0, 1]  # -2 of three layers


def test_frozen_tower_runs_without_gradient_and_in_evaluation_mode(build, make_batch):
    from mllm_vision.vlm import freeze

    model, _ = build()
    freeze(model, ("connector",)).train()
    seen = []
    model.model.model.vision_tower.encoder.layers[0].register_forward_hook(
        lambda module, _, output: seen.append((torch.is_grad_enabled(), module.training))
    )
    model(**make_batch(model)).loss.backward()
    assert seen == [(False, False)]
    assert not model.model.model.language_model.training and model.model.model.multi_modal_projector.training
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "multi_modal_projector" in name
    }
    freeze(model, ("encoder",)).train()
    model(**make_batch(model)).loss.backward()
    assert seen[-1] == (True, True)


def test_blind_model_ignores_the_image_and_remembers_it(build, make_batch, tmp_path):
    from mllm_vision.vlm import load_vlm, save_vlm

    model, processor = build(blind=True)
    batch = make_batch(model)
    other = {**batch, "pixel_values": torch.randn(3, 3, 32, 32)}
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, model(**other).loss)
        save_vlm(model, processor, tmp_path / "blind")
        again, _ = load_vlm(tmp_path / "blind")
        assert again.blind and torch.equal(again(**other).loss, model(**batch).loss)
        zeros = {**batch, "pixel_values": torch.zeros(3, 3, 32, 32)}
        seeing = model(**zeros).loss
        model.blind = False
        assert torch.equal(model(**zeros).loss, seeing) and not torch.equal(model(**batch).loss, seeing)


def test_text_only_batch_trains_and_reaches_the_projector(build, make_batch):
    """Every rank of a data-parallel run must touch the same parameters, images or not."""
    from mllm_vision.vlm import freeze

    model, _ = build()
    batch = make_batch(model, images=False)
    with torch.no_grad():
        expected = plain_twin(model)(**batch).loss
    freeze(model, ("connector", "language_model")).train()
    loss = model(**batch).loss
    loss.backward()
    assert torch.allclose(loss.detach(), expected, atol=1e-6)
    gradients = [p.grad for p in model.model.model.multi_modal_projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(**batch).loss, expected, atol=1e-6)


def test_more_image_tokens_than_images_and_the_reverse(build, make_batch):
    model, _ = build()
    batch = make_batch(model)
    with pytest.raises(ValueError, match=r"48 image tokens, but no images were given"):
        model(**{name: value for name, value in batch.items() if name != "pixel_values"})
    with pytest.raises(ValueError, match="do not match"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="do not match"):
        model(**{**batch, "pixel_values": torch.cat([batch["pixel_values"]] * 2)})


def test_foreign_llava_layers_and_several_layers_take_transformers_way(build, make_batch):
    """A LLaVA not made here has no `mllm_vision` in its config, and may concatenate several layers."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from mllm_vision.vlm import LanguageTask
    from mllm_vision.vlm.systems import system_of

    model, _ = build()
    config = LlavaConfig.from_dict({**model.config.to_dict(), "vision_feature_layer": [-1, -2]})
    del config.mllm_vision
    foreign = LlavaForConditionalGeneration(config).eval()
    ours = LanguageTask(foreign, system_of(config)).eval()
    batch = make_batch(model, rows=1)
    with torch.no_grad():
        assert torch.allclose(ours(**batch).loss, foreign(**batch).loss, atol=1e-6)
