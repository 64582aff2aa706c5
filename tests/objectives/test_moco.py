"""MoCo v1, v2 and v3: the algorithm step by step against the oracle, queue, keys, shuffled BatchNorm, fixed input."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from linear_encoder import LinearEncoder, layout, make_method, sgd_steps, tiny_encoder, view_batch
from oracles import moco as oracle
from torch import nn

from mllm_vision.modules.batch_norm import make_batch_norm_global
from mllm_vision.modules.shuffle import in_groups, shuffled


def numpy(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("symmetric", [False, True])
def test_steps_are_those_of_the_papers_algorithm(symmetric):
    """Nine steps of SGD, batches of 4 into a queue of 7: every loss, all weights, the key encoder and the queue."""
    torch.manual_seed(2)
    encoder = LinearEncoder(12, 6).double()
    objective = make_method("moco_v1", encoder, dim=5, queue_size=7, momentum=0.8, temperature=0.3, symmetric=symmetric)
    objective = objective.double().train()
    head = objective.head
    paper = oracle.LinearMoCo(
        *(numpy(value) for value in (encoder.backbone.weight, head.weight, head.bias)),
        momentum=0.8, size=7, temperature=0.3, rate=0.2, symmetric=symmetric,
    )  # fmt: skip
    views = torch.randn(9, 4, 2, 3, 2, 2, dtype=torch.float64)
    expected = [paper.step(*(numpy(batch[:, side].flatten(1)) for side in (0, 1))) for batch in views]
    found = sgd_steps(objective, [{"views": batch} for batch in views], rate=0.2)
    assert found == pytest.approx(expected, rel=1e-9)
    slow = objective.teacher.module
    mine = (encoder.backbone.weight, head.weight, head.bias)
    keys = (slow["encoder"].backbone.weight, slow["head"].weight, slow["head"].bias)
    for parameter, value in zip((*mine, *keys), (*paper.fast, *paper.slow), strict=True):
        np.testing.assert_allclose(numpy(parameter), value, rtol=1e-8, atol=1e-10)
    queue = numpy(objective.queue.rows)
    np.testing.assert_allclose(queue[np.lexsort(queue.T)], np.array(paper.queue)[np.lexsort(np.array(paper.queue).T)])
    assert math.isclose(objective.chance_loss(4), (2 if symmetric else 1) * math.log(8))


def test_what_goes_into_the_queue_and_when():
    objective = make_method("moco_v2", queue_size=6).train()
    batch = view_batch(4)
    assert objective.chance_loss(4) == pytest.approx(math.log(7)) and objective.negatives(4) == 6  # as a run begins
    output = objective(**batch)
    objective(**batch)  # a second look at the batch puts nothing more in
    assert len(objective.queue) == 0 and "information_bound" not in output.metrics
    keys = objective.embed(**batch)["key"]
    assert not keys.requires_grad
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(4, 1))
    objective.after_step(0.1)
    torch.testing.assert_close(objective.queue.rows, keys.flatten(0, 1))
    assert objective.chance_loss(4) == pytest.approx(math.log(5))
    metrics = objective(**view_batch(4, seed=1)).metrics
    assert metrics["queue_rows"] == 4 and metrics["information_bound"] <= math.log(5)
    objective.after_step(0.2)
    kept = objective.queue.rows.clone()
    objective.eval()(**batch)
    objective.after_step(0.3)  # nothing is pending: looking in evaluation mode puts nothing in
    assert torch.equal(objective.queue.rows, kept)


def test_the_queue_is_no_part_of_what_ddp_sends_and_the_key_encoder_takes_no_gradient():
    objective = make_method("moco_v1").train()
    assert set(objective._ddp_params_and_buffers_to_ignore) == {"queue.features", "queue.written"}
    sgd_steps(objective, [view_batch(4), view_batch(4, seed=1)])
    assert all(value.grad is None for value in objective.teacher.parameters())
    assert all(value.grad is not None for name, value in objective.named_parameters() if value.requires_grad)


def test_what_tells_v2_from_v1():
    first, second = make_method("moco_v1"), make_method("moco_v2", head_hidden=None)
    assert isinstance(first.head, nn.Linear)
    assert [type(part).__name__ for part in second.head] == ["Linear", "ReLU", "Linear"]
    assert second.head[0].weight.shape == (32, 32)
    kinds = [type(each) for each in (first, second)]
    assert [kind.Config().temperature for kind in kinds] == [0.07, 0.2]
    assert [kind.views for kind in kinds] == ["moco_v1", "moco_v2"]
    assert [kind.training_defaults["lr_scheduler_type"] for kind in kinds] == ["step", "cosine"]
    for kind in kinds:
        config = kind.Config()
        assert (config.dim, config.queue_size, config.momentum) == (128, 65536, 0.999)


def test_a_constant_key_encoder_stays_and_one_without_momentum_is_the_query_encoder():
    for momentum in (1.0, 0.0):
        objective = make_method("moco_v2", momentum=momentum).train()
        start = copy.deepcopy(objective.student.state_dict())
        sgd_steps(objective, [view_batch(4), view_batch(4, seed=1)])
        expected = start if momentum else objective.student.state_dict()
        found = objective.teacher.module.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert not torch.equal(start["head.0.weight"], objective.student.state_dict()["head.0.weight"])


# ---- shuffled BatchNorm ------------------------------------------------------------------------------------


def test_dealing_anew_and_back():
    """Rows keep their places, groups are those of the keys' order, and nothing depends on how rows are numbered."""
    rows, keys = torch.randn(9, 4), torch.rand(9)
    centred = shuffled(lambda group: group - group.mean(0), rows, keys, groups=3)
    order = keys.argsort()
    for part in order.split(3):
        torch.testing.assert_close(centred[part], rows[part] - rows[part].mean(0))
    again = torch.randperm(9)
    torch.testing.assert_close(shuffled(lambda g: g - g.mean(0), rows[again], keys[again], groups=3), centred[again])
    torch.testing.assert_close(shuffled(lambda group: 2 * group, rows, keys, groups=4), 2 * rows)
    assert [len(part) for part in in_groups(lambda group: group.mean(0, keepdim=True), rows, 4).split(1)] == [1] * 4
    with pytest.raises(ValueError, match="batch_norm_groups=5 of 9 rows: .* use 4 or less"):
        in_groups(lambda group: group, rows, 5)


def test_batch_norm_of_the_key_encoder_sees_other_company_than_the_queries():
    objective = make_method("moco_v1", tiny_encoder("resnet"), batch_norm_groups=2).train()
    batch, seen = view_batch(8), []
    slow = objective.teacher.module["encoder"]
    fast_hook = objective.encoder.register_forward_pre_hook(lambda module, given: seen.append(("query", given[0])))
    slow_hook = slow.register_forward_pre_hook(lambda module, given: seen.append(("key", given[0])))
    embeddings = objective.embed(**batch)
    fast_hook.remove(), slow_hook.remove()
    assert [(kind, len(rows)) for kind, rows in seen] == [("query", 4)] * 2 + [("key", 4)] * 2

    def places(rows, view):
        return {int((batch["views"][:, view] == row).flatten(1).all(1).nonzero()) for row in rows}

    queries = [places(rows, 0) for kind, rows in seen if kind == "query"]
    keys = [places(rows, 1) for kind, rows in seen if kind == "key"]
    assert queries == [set(range(4)), set(range(4, 8))]
    assert set.union(*keys) == set(range(8)) and keys[0] not in queries
    norm = slow.backbone.embedder.embedder.normalization
    assert norm.training and norm.num_batches_tracked == 1  # statistics of its own, moved once by two groups
    for rows in keys:  # each group's keys are those that the key encoder gives it alone
        alone = objective._project(objective.teacher.module, batch["views"][sorted(rows), 1:])
        torch.testing.assert_close(embeddings["key"][sorted(rows)], nn.functional.normalize(alone, dim=-1))
    objective.after_step(0.1)
    assert not torch.equal(norm.running_mean, objective.encoder.backbone.embedder.embedder.normalization.running_mean)


def test_where_dealing_is_left_out_and_what_it_needs():
    batch = view_batch(4)
    vit = make_method("moco_v1", batch_norm_groups=2).train()
    assert len(vit.embed(batch["views"])["key"]) == 4  # no BatchNorm: no groups, no seeds
    encoder = tiny_encoder("resnet")
    make_batch_norm_global(encoder)
    whole = make_method("moco_v1", encoder).train()
    assert len(whole.embed(batch["views"])["key"]) == 4
    split = make_method("moco_v1", tiny_encoder("resnet"), batch_norm_groups=2).train()
    with pytest.raises(ValueError, match="MoCoV1 needs the column 'seeds'"):
        split.embed(batch["views"])


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "byol"])
def test_what_is_refused(name):
    objective = make_method(name)
    with pytest.raises(ValueError, match=r"needs views \[B, V, 3, H, W\] with V >= 2, got \[4, 1, 3, 32, 32\]"):
        objective.embed(view_batch(4)["views"][:, :1])
    with pytest.raises(ValueError, match="momentum=1.5 is not between 0 and 1"):
        make_method(name, momentum=1.5)
    with pytest.raises(ValueError, match="this one has 1; use --per_device_train_batch_size 2"):
        objective.before_training(100, 1)
    if name != "byol":
        with pytest.raises(ValueError, match="temperature=0 must be positive"):
            make_method(name, temperature=0)
    if hasattr(objective.config, "queue_size"):
        with pytest.raises(ValueError, match="queue_size=10 is more than the 9 images"):
            objective.before_training(9, 4)
        objective.before_training(10, 4)
        with pytest.raises(ValueError, match="queue_size=0 and batch_norm_groups=1 must be at least 1"):
            make_method(name, queue_size=0)


# ---- MoCo v3 -----------------------------------------------------------------------------------------------


def test_v3_is_the_symmetric_contrast_of_the_paper():
    """Predictions against the other view's keys, heads view by view, times 2 T; the keys take no gradient."""
    objective = make_method("moco_v3", LinearEncoder(12, 6).double(), temperature=0.3).double().train()
    views = torch.randn(6, 2, 3, 2, 2, dtype=torch.float64)
    seen = {"z": [], "query": [], "key": []}
    heads = {"z": objective.head, "query": objective.predictor, "key": objective.teacher.module["head"]}
    for name, module in heads.items():
        module.register_forward_hook(lambda module, given, out, name=name: seen[name].append(out))
    loss = objective(views=views).loss
    assert [len(values) for values in seen.values()] == [2, 2, 2]
    queries, keys = ([numpy(value) for value in seen[name]] for name in ("query", "key"))
    assert loss.item() == pytest.approx(oracle.symmetric_contrast(queries, keys, 0.3), rel=1e-9)
    assert not any(key.requires_grad for key in seen["key"])
    for value in (*seen["z"], *seen["key"]):  # the last BatchNorm, without affine, normalised each view by itself
        torch.testing.assert_close(value.mean(0), torch.zeros(12, dtype=torch.float64), atol=1e-9, rtol=0)
    assert objective.negatives(5) == 4 and make_method("byol").negatives(5) is None
    same = torch.ones(5, 12)
    collapsed = oracle.symmetric_contrast([same.numpy()] * 2, [same.numpy()] * 2, 0.3)
    assert objective.chance_loss(5) == pytest.approx(collapsed)


def test_v3_has_the_heads_of_the_official_code():
    vit = make_method("moco_v3", head_hidden=4096, head_out=256)
    assert layout(vit.head) == [
        (32, 4096, False), "norm", (4096, 4096, False), "norm", (4096, 256, False), "norm without affine",
    ]  # fmt: skip
    assert layout(vit.predictor) == [(256, 4096, False), "norm", (4096, 256, False), "norm without affine"]
    resnet = make_method("moco_v3", tiny_encoder("resnet"))
    assert layout(resnet.head) == [(16, 24, False), "norm", (24, 12, False), "norm without affine"]
    assert layout(resnet.predictor) == [(12, 24, False), "norm", (24, 12, False)]
    config = type(vit).Config()
    assert (config.momentum, config.head_hidden, config.head_out) == (0.99, 4096, 256)
    assert (vit.config.temperature, resnet.config.temperature) == (0.2, 1.0)
    of_vit, of_resnet = (type(vit).defaults_beside(None, name) for name in ("vit", "resnet"))
    assert (of_vit["optim"], of_vit["base_learning_rate"], of_vit["weight_decay_on"]) == ("adamw_torch", 1.5e-4, "all")
    assert (of_resnet["optim"], of_resnet["base_learning_rate"], of_resnet["weight_decay"]) == ("lars", 0.6, 1e-6)
    assert "optim_args" not in type(vit).defaults_beside("sgd", "resnet")


def test_v3_fixes_what_takes_the_pixels(tmp_path):
    """Patch embedding and positions stay through training, in student and teacher, and are saved as usual."""
    from transformers import AutoModel

    encoder = tiny_encoder("vit")
    before = encoder.backbone.embeddings.patch_embeddings.projection.weight.detach().clone()
    objective = make_method("moco_v3", encoder).train()
    patches = encoder.backbone.embeddings.patch_embeddings.projection
    positions = encoder.backbone.embeddings.position_embeddings
    drawn = patches.weight.detach().clone()
    assert not torch.equal(drawn, before) and not patches.bias.any()
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))  # Xavier's of one patch to one token
    assert 0.98 * bound < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    expected = np.stack([np.zeros(32), *(oracle.sincos(32, row, column) for row in range(4) for column in range(4))])
    np.testing.assert_allclose(numpy(positions[0]), expected, atol=1e-6)
    sgd_steps(objective, [view_batch(4), view_batch(4, seed=1)])
    frozen = {name for name, value in encoder.backbone.named_parameters() if not value.requires_grad}
    assert frozen == {
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias",
        "embeddings.position_embeddings",
    }
    assert torch.equal(patches.weight, drawn) and patches.weight.grad is None
    slow = objective.teacher.module["encoder"].backbone.embeddings
    assert torch.equal(slow.patch_embeddings.projection.weight, drawn)
    assert torch.equal(slow.position_embeddings, positions)
    encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).embeddings
    assert torch.equal(loaded.position_embeddings, positions)
    assert torch.equal(loaded.patch_embeddings.projection.weight, drawn)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "resnet"])
def test_v3_finds_what_to_fix_in_every_family(kind):
    encoder = tiny_encoder(kind)
    make_method("moco_v3", encoder)
    frozen = [name for name, value in encoder.backbone.named_parameters() if not value.requires_grad]
    frozen = [name for name in frozen if "mask_token" not in name]
    kinds = [word for name in frozen for word in ("patch_embed", "position_embed") if word in name]
    assert kinds.count("position_embed") == (kind != "resnet") and ("patch_embed" in kinds) == (kind != "resnet")


def test_v3_leaves_a_trained_encoder_as_it_is(tmp_path):
    from mllm_vision.encoder import VisionEncoder

    tiny_encoder().save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    before = copy.deepcopy(encoder.state_dict())
    make_method("moco_v3", encoder)
    assert encoder.pretrained and not tiny_encoder().pretrained
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.backbone.embeddings.patch_embeddings.projection.weight.requires_grad
    assert encoder.backbone.embeddings.position_embeddings.requires_grad
    flags = ("freeze_patch_embedding", "redraw_patch_embedding", "sincos_positions")
    encoder = tiny_encoder()
    make_method("moco_v3", encoder, **dict.fromkeys(flags, False))
    assert all(value.requires_grad and torch.equal(value, before[name]) for name, value in encoder.named_parameters())


@pytest.mark.parametrize(("name", "start"), [("moco_v3", 0.99), ("byol", 0.996)])
def test_the_momentum_rises_with_every_step(name, start):
    """m = 1 - (1 - m0) (cos(pi k / K) + 1) / 2 at step k of K, and the teacher's weights follow by it."""
    objective = make_method(name, momentum=start).train()
    weight = objective.head[0].weight
    slow = objective.teacher.module["head"][0].weight
    for step in (0, 3, 5, 8, 10):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        tau = 1 - (1 - start) * (math.cos(math.pi * step / 10) + 1) / 2
        expected = tau * slow.double() + (1 - tau) * weight.double()
        # BYOL's code takes the momentum of the step that ends, MoCo v3's that of the step that comes
        objective.progress = step / 10 if name == "byol" else 0.0
        objective.after_step(step / 10 if name == "moco_v3" else 1.0)
        torch.testing.assert_close(slow.double(), expected.detach(), rtol=0, atol=1e-6)
    kept = slow.clone()
    with torch.no_grad():
        weight.zero_()
    objective.after_step(1.0)
    assert torch.equal(slow, kept)
    queued = make_method("moco_v2")
    assert queued.momentum_at(0.0) == queued.momentum_at(1.0) == 0.999
