"""MAE against transformers' own, its masks, what it learns, and what it leaves in the encoder."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModel, ViTMAEConfig, ViTMAEForPreTraining
from views_for_tests import SIZES as KINDS
from views_for_tests import make_encoder, make_method, view_batch

from mllm_vision.encoder import VisionEncoder
from mllm_vision.functional.random import uniform
from mllm_vision.objectives.mae import MAE, MASKS

SMALL = {"decoder_width": 16, "decoder_layers": 2, "decoder_heads": 2}
SEEDS = torch.arange(100, 106)


def make(kind: str = "vit", **config) -> MAE:
    return make_method(MAE, kind, **{**SMALL, **config})


def images(count: int = 6, views: int = 1) -> torch.Tensor:
    return view_batch(count, views)


def transformers_mae(objective: MAE) -> ViTMAEForPreTraining:
    """transformers' MAE with the objective's weights."""
    backbone, decoder = objective.encoder.backbone, objective.decoder
    config = ViTMAEConfig(
        **tiny.SIZES, mask_ratio=0.75, norm_pix_loss=True, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    state = {f"vit.{name}": value for name, value in backbone.state_dict().items()}
    state["decoder.mask_token"] = decoder.mask_token
    state["decoder.decoder_pos_embed"] = decoder.positions[None]
    for mine, theirs in (("embed", "embed"), ("norm", "norm"), ("predict", "pred")):
        for kind in ("weight", "bias"):
            state[f"decoder.decoder_{theirs}.{kind}"] = getattr(getattr(decoder, mine), kind)
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "self_attn.out_proj": "attention.o_proj",
    }
    for number, block in enumerate(decoder.blocks):
        to = f"decoder.decoder_layers.{number}"
        for kind in ("weight", "bias"):
            for mine, theirs in names.items():
                state[f"{to}.{theirs}.{kind}"] = getattr(block.get_submodule(mine), kind)
            parts = getattr(block.self_attn, f"in_proj_{kind}").chunk(3)
            state |= {f"{to}.attention.{q}_proj.{kind}": part for q, part in zip("qkv", parts, strict=True)}
    model.load_state_dict(state)
    return model


def test_loss_and_gradients_are_those_of_transformers_mae():
    objective = make()
    for norm in objective.modules():
        if isinstance(norm, torch.nn.LayerNorm):
            norm.eps = 1e-6  # transformers' MAE has one for encoder and decoder
    views = images()
    theirs = transformers_mae(objective)
    expected = theirs(views[:, 0], noise=uniform(SEEDS, MASKS, 16).float()).loss
    loss = objective(views=views, seeds=SEEDS).loss
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    known = dict(theirs.vit.named_parameters())
    for name, parameter in objective.encoder.backbone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, known[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_masks_come_from_the_seeds_alone():
    objective = make().eval()
    views = images(views=2)
    _, _, visible = objective.reconstruct(views, SEEDS)
    assert visible.shape == (12, 4)
    assert all(row.unique().numel() == 4 for row in visible)
    assert len(visible.sort(dim=1).values.unique(dim=0)) > 6  # another mask for each image and view
    torch.manual_seed(99)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    _, _, again = objective.reconstruct(views[order], SEEDS[order])
    assert torch.equal(again.view(6, 2, 4), visible.view(6, 2, 4)[order])
    errors = objective.embed(views, SEEDS)["error"]
    parts = [objective.embed(views[i : i + 1], SEEDS[i : i + 1])["error"] for i in range(6)]
    torch.testing.assert_close(torch.cat(parts), errors)


def test_hidden_patches_do_not_reach_the_encoder():
    """Pixels under the mask change the target and nothing else."""
    objective = make(normalize_pixels=False).eval()
    views = images()
    predicted, target, visible = objective.reconstruct(views, SEEDS)
    hidden = torch.ones(6, 16, dtype=torch.bool).scatter(1, visible, False)
    pixels = hidden.view(6, 1, 4, 1, 4, 1).expand(-1, 3, -1, 8, -1, 8).reshape(6, 1, 3, 32, 32)
    again, other, _ = objective.reconstruct(torch.where(pixels, views + 5, views), SEEDS)
    assert torch.equal(again, predicted)
    assert not torch.equal(other, target)


def test_the_mask_ratio_says_how_many_patches_the_encoder_sees():
    for ratio, visible in ((0.75, 4), (0.5, 8), (0.9, 1)):
        assert make(mask_ratio=ratio).eval().reconstruct(images(), SEEDS)[2].shape[1] == visible
    for ratio in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match=f"mask_ratio={ratio}"):
            make(mask_ratio=ratio)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "resnet"])
def test_every_parameter_that_learns_gets_a_gradient_and_the_artifact_is_native(kind, tmp_path):
    objective = make(kind)
    objective(views=images(), seeds=SEEDS).loss.backward()
    idle = [name for name, value in objective.named_parameters() if value.requires_grad and value.grad is None]
    assert idle == []  # DistributedDataParallel would wait for them
    positions = [value for name, value in objective.encoder.named_parameters() if "position_embedding" in name]
    assert bool(positions) is (kind != "dinov3")  # rotary positions are fixed anyway
    assert not any(value.requires_grad for value in positions)

    objective.eval()
    h = objective.features(objective.encoder, images())[:, 0]
    objective.encoder.save_pretrained(tmp_path)
    again = VisionEncoder.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images()[:, 0]).pooled, h)  # no random pooler comes in its place
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    expected = loaded(images()[:, 0]).last_hidden_state
    norm = loaded.post_layernorm if kind == "clip" else torch.nn.Identity()  # CLIP's pooled token has one more
    vector = expected.mean(1) if kind == "siglip" else norm(expected[:, 0])
    torch.testing.assert_close(h, vector)


def test_learnt_positions_stay_where_they_are_asked_for():
    before = make_encoder().backbone.embeddings.position_embeddings
    objective = make(sincos_positions=False)
    table = objective.encoder.backbone.embeddings.position_embeddings
    assert table.requires_grad and torch.equal(table, before)


def test_a_loaded_encoder_keeps_its_positions(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    before = encoder.backbone.embeddings.position_embeddings.detach().clone()
    MAE(encoder, MAE.Config(**SMALL))
    table = encoder.backbone.embeddings.position_embeddings
    assert table.requires_grad and torch.equal(table, before)


def test_the_decoder_starts_as_in_the_official_code():
    """Xavier for every matrix, the three projections of attention as the one that they are there."""
    block = make(decoder_width=64, decoder_heads=4).decoder.blocks[0]
    for weight, fan in ((block.self_attn.in_proj_weight, 3 * 64 + 64), (block.linear1.weight, 4 * 64 + 64)):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not block.self_attn.in_proj_bias.any() and not block.linear1.bias.any()


def test_it_learns_to_predict():
    """Images of one patch repeated: what is visible tells what is hidden."""
    torch.manual_seed(0)
    views = torch.randn(24, 1, 3, 8, 8).repeat(1, 1, 1, 4, 4)
    objective = make()
    optimizer = torch.optim.AdamW([value for value in objective.parameters() if value.requires_grad], lr=3e-3)
    losses = []
    for step in range(60):
        output = objective(views=views, seeds=torch.arange(24) + 1000 * step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[0] > 0.95 * objective.chance_loss(24)
    assert losses[-1] < 0.8 * losses[0], losses[::10]


def test_accumulation_is_allowed_and_needs_no_chunks():
    MAE.check_accumulation(4, 8)
    assert not MAE.couples_batch and MAE.chunkable
    make().before_training(10, 1)  # a batch of one is enough


def test_what_mae_refuses():
    with pytest.raises(ValueError, match="resnet is convolutional; use a transformer"):
        MAE(make_encoder("resnet"))
    with pytest.raises(ValueError, match="decoder_width=16 is not divisible by decoder_heads=3"):
        make(decoder_heads=3)
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        make(decoder_width=18)
    with pytest.raises(ValueError, match="decoder_layers=0"):
        make(decoder_layers=0)
    with pytest.raises(ValueError, match="make them 32 x 32"):
        make()(views=torch.zeros(2, 1, 3, 64, 64), seeds=SEEDS[:2])
    with pytest.raises(ValueError, match="needs the column 'seeds'"):
        make()(views=images())
