"""DINOv2: the masks, what student and teacher see of a patch, iBOT over the masked ones, KoLeo before the head."""

from __future__ import annotations

import pytest
import torch
from linear_encoder import make_method, sgd_steps, tiny_encoder, view_batch
from oracles import distillation as oracle

from mllm_vision.objectives.dinov2 import DINOv2

SMALL = {"out_dim": 16, "head_hidden": 12, "head_bottleneck": 6}
KEYS = torch.arange(400) * 1_000_003


def dinov2(kind="vit", **config):
    return make_method("dinov2", tiny_encoder(kind), **{**SMALL, **config}).train()


@pytest.mark.parametrize("shape", ["block", "random"])
def test_masks_are_as_many_and_as_large_as_the_paper_says(shape):
    objective = dinov2(mask_shape=shape)
    masks = objective.masks(KEYS, 2)
    assert masks.shape == (400, 2, 16)  # 4 x 4 patches
    counts = masks.sum(-1)
    assert (counts > 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    hidden = counts[counts > 0]
    assert hidden.min() == 1 and hidden.max() == 7  # a tenth of 16 to just under a half, in whole patches
    assert not torch.equal(masks[:, 0], masks[:, 1])
    assert torch.equal(objective.masks(KEYS[30:37], 2), masks[30:37])  # a row's masks are its own
    always = dinov2(mask_shape=shape, mask_probability=1.0, mask_ratio_min=0.5, mask_ratio_max=0.5)
    assert (always.masks(KEYS, 2).sum(-1) == 8).all()


def test_without_masks_student_and_teacher_see_the_same():
    objective = dinov2(mask_probability=0.0)
    found = objective.embed(**view_batch(3))
    torch.testing.assert_close(found["student"], found["teacher"])
    torch.testing.assert_close(found["student_patches"], found["teacher_patches"])
    assert not found["masked"].any()
    output = objective.loss(found)
    assert output.metrics["ibot"] == 0
    output.loss.backward()  # and every parameter still takes part, as DDP wants
    assert all(value.grad is not None for value in objective.parameters() if value.requires_grad)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip", "siglip"])
def test_the_student_cannot_see_what_is_masked(kind):
    objective = dinov2(kind, mask_probability=1.0)
    batch = view_batch(3)
    found = objective.embed(**batch)
    mask = objective.masks(batch["seeds"], 2)
    hidden = mask.view(3, 2, 1, 4, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)
    other = objective.embed(torch.where(hidden, batch["views"] + 3.0, batch["views"]), batch["seeds"])
    torch.testing.assert_close(other["student"], found["student"])
    torch.testing.assert_close(other["student_patches"], found["student_patches"])
    assert not torch.allclose(other["teacher_patches"], found["teacher_patches"], atol=1e-2)
    shown = objective.embed(torch.where(hidden, batch["views"], batch["views"] + 3.0), batch["seeds"])
    assert not torch.allclose(shown["student"], found["student"], atol=1e-3)
    objective.loss(found).loss.backward()
    token = next(value for name, value in objective.named_parameters() if name.endswith("mask_token"))
    assert token.grad.abs().sum() > 0  # the backbone's own, or the method's


def test_masked_patches_come_in_their_order():
    objective = dinov2()
    batch = view_batch(6)
    found = objective.embed(**batch)
    mask = objective.masks(batch["seeds"], 2)
    assert torch.equal(found["masked"].sum(-1), mask.sum(-1))
    with torch.no_grad():
        pixels = batch["views"].flatten(0, 1)
        encoder = objective.teacher.module["encoder"]
        tokens = encoder.backbone(pixels).last_hidden_state[:, 1:].unflatten(0, (6, 2))
    torch.testing.assert_close(found["teacher_patches"][found["masked"]], tokens[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_the_loss_is_the_sum_of_the_three(separate):
    objective = dinov2(separate_patch_head=separate, ibot_weight=0.7, koleo_weight=0.3)
    batch = view_batch(5)
    batch["local_views"] = batch["views"][:, :, :, :16, :16]
    found = objective.embed(**batch)
    output = objective.loss(found)
    head, slow = objective.head, objective.teacher.module["head"]
    patch_head, patch_slow = (
        (objective.patch_head, objective.teacher.module["patch_head"]) if separate else (head, slow)
    )
    with torch.no_grad():
        vectors, taught = head(found["student"]).double().numpy(), slow(found["teacher"]).double().numpy()
        masked = found["masked"].flatten(0, 1)
        logits = patch_slow(found["teacher_patches"]).flatten(0, 1)
        said = patch_head(found["student_patches"]).flatten(0, 1).double().numpy()
    targets = oracle.sinkhorn(taught.reshape(10, 16), 0.04, 3).reshape(5, 2, 16)  # both crops' rows together
    patches = torch.zeros(logits.shape, dtype=torch.float64)
    patches[masked] = torch.tensor(oracle.sinkhorn(logits[masked].double().numpy(), 0.04, 3))
    dino = oracle.dino(vectors, targets, 0.1)
    ibot = oracle.ibot(said, patches.numpy(), masked.numpy(), 0.1)
    # before the head, each global crop by itself: crops of one image are no neighbours; local crops take no part
    koleo = sum(oracle.koleo(found["student"][:, crop].detach().double().numpy()) for crop in (0, 1))
    for name, value in (("dino", dino), ("ibot", ibot), ("koleo", koleo)):
        assert output.metrics[name].item() == pytest.approx(value, rel=1e-4), name
    assert output.loss.item() == pytest.approx(dino + 0.7 * ibot + 0.3 * koleo, rel=1e-4)


def test_two_centres_move_where_there_is_no_sinkhorn():
    objective = dinov2(centring="centre")
    objective(**view_batch(4))
    objective.after_step(0.5)
    assert objective.centring.centre.any() and objective.patch_centring.centre.any()
    assert not torch.equal(objective.centring.centre, objective.patch_centring.centre)


def test_the_second_pass_of_gradient_caching_leaves_the_teacher_out():
    objective = dinov2()
    batch = view_batch(4)
    whole = objective.embed(**batch)
    objective.replaying = True
    again = objective.embed(**batch)
    assert set(again) == {"student", "student_patches"}
    torch.testing.assert_close(again["student_patches"], whole["student_patches"])


def test_the_papers_settings():
    objective = dinov2(separate_patch_head=True)
    assert objective.rates() == {"head.last_layer": "still:1", "patch_head.last_layer": "still:1"}
    config, defaults = DINOv2.Config(), DINOv2.training_defaults
    assert (config.momentum, config.koleo_weight, config.mask_probability) == (0.992, 0.1, 0.5)
    assert (config.mask_ratio_min, config.mask_ratio_max, config.centring) == (0.1, 0.5, "sinkhorn")
    assert (defaults["layer_decay"], defaults["patch_embedding_lr_scale"]) == (0.9, 0.2)
    assert (defaults["weight_decay"], defaults["weight_decay_end"]) == (0.04, 0.4)
    objective.config.out_dim = None
    objective.before_training(300, 8)
    for head in (objective.head, objective.patch_head, *(objective.teacher.module[n] for n in ("head", "patch_head"))):
        assert len(head.last_layer.weight) == 1024
    sgd_steps(objective, [view_batch(4)])


def test_what_is_refused():
    with pytest.raises(ValueError, match="resnet has no patches to mask"):
        dinov2("resnet")
    for config, told in (
        ({"mask_ratio_min": 0.6}, "mask_ratio_min=0.6 and mask_ratio_max=0.5"),
        ({"mask_probability": 1.5}, "mask_probability=1.5"),
        ({"mask_shape": "round"}, "mask_shape='round'"),
        ({"koleo_weight": -1.0}, "koleo_weight=-1.0"),
    ):
        with pytest.raises(ValueError, match=told):
            dinov2(**config)
    with pytest.raises(ValueError, match="needs views"):
        dinov2()(views=torch.randn(2, 2, 3, 24, 24), seeds=KEYS[:2])
    with pytest.raises(ValueError, match="'seeds'"):
        dinov2()(views=torch.randn(2, 2, 3, 32, 32))
