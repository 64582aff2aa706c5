"""Freezing, its audit, and a proof that must fail when it should."""

from __future__ import annotations

import pytest
import torch


def train_steps(model, batch, steps=2, rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("train", [("connector",), ("connector", "language_model"), ("encoder", "connector")])
def test_only_what_was_named_moves(build, make_batch, train):
    from mllm_vision.vlm import FreezeProof, audit, freeze

    model, _ = build()
    freeze(model, train)
    rows = audit(model, 1e-3, {"language_model": 1e-4})
    by_group = {row["group"]: row for row in rows}
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert all((by_group[g]["trainable"] > 0) == (g in train) for g in by_group)
    assert all(by_group[g]["trainable"] == by_group[g]["parameters"] for g in train if g != "encoder")
    assert by_group["language_model"]["learning_rate"] == (1e-4 if "language_model" in train else 0.0)
    proof = FreezeProof(model, rows)
    train_steps(model, make_batch(model))
    after = {row["group"]: row for row in proof.close(model)}
    proof.check()
    for group, row in after.items():
        assert row["moved"] == (group in train) == (row["sha256_before"] != row["sha256_after"])


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_every_trainable_parameter_gets_a_gradient(build, make_batch, kind):
    """Layers above the selected one and pooling heads must not pose as trained (and would stall DDP)."""
    from mllm_vision.vlm import freeze

    for lora in (False, True):
        model, _ = build(kind, select_layer=-2)
        wrapped = (
            freeze(model, ("encoder", "connector", "language_model=lora"), rank=2)
            if lora
            else freeze(model, ("encoder", "connector"))
        )
        wrapped.train()
        wrapped(**make_batch(model)).loss.backward()
        without = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        trained = {
            n.split("vision_tower.")[1]
            for n, p in wrapped.named_parameters()
            if "vision_tower." in n and p.requires_grad
        }
        assert any("layer" in name for name in trained) and not any(".2." in name for name in trained)


def test_proof_fails_when_frozen_weights_move(build, make_batch):
    from mllm_vision.vlm import FreezeProof, audit, freeze

    model, _ = build()
    freeze(model)
    proof = FreezeProof(model, audit(model, 1e-3))
    train_steps(model, make_batch(model))
    with torch.no_grad():
        next(model.model.model.vision_tower.parameters())[0] += 1e-6
    proof.close(model)
    with pytest.raises(ValueError, match="encoder: frozen weights moved"):
        proof.check()


def test_proof_fails_when_nothing_was_learnt(build):
    from mllm_vision.vlm import FreezeProof, audit, freeze

    model, _ = build()
    freeze(model)
    proof = FreezeProof(model, audit(model, 0.0))
    proof.close(model)
    with pytest.raises(ValueError, match=r"connector: 2,112 trainable parameters did not move"):
        proof.check()


class Steps:
    """What `MovingSteps` counts."""

    def __init__(self, taken, moving):
        self.taken, self.moving = taken, moving


def test_a_single_step_proves_what_it_could_move(build, make_batch):
    """A warm-up's first step has a rate of 0; behind zeros no gradient arrives in the first step; else it is strict."""
    from mllm_vision.vlm import FreezeProof, audit, freeze

    model, _ = build()
    freeze(model, ("encoder", "connector"))
    proof = FreezeProof(model, audit(model, 1e-3))
    rows = {row["group"]: row for row in proof.close(model, Steps(1, 0))}
    proof.check()
    assert "learning rate of 0" in rows["connector"]["still"] and not rows["connector"]["moved"]
    for steps in (None, Steps(1, 1), Steps(2, 0), Steps(2, 1)):  # it could move, or never left the warm-up
        proof.close(model, steps)
        with pytest.raises(ValueError, match="connector: .* did not move"):
            proof.check()

    with torch.no_grad():  # a projector whose last layer starts at zero
        model.model.model.multi_modal_projector.linear_2.weight.zero_()
    proof = FreezeProof(model, audit(model, 1e-3))
    model.train()(**make_batch(model)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    rows = {row["group"]: row for row in proof.close(model, Steps(1, 1))}
    proof.check()
    assert rows["connector"]["moved"] and not rows["encoder"]["moved"] and "start at zero" in rows["encoder"]["still"]
    proof.close(model, Steps(2, 2))  # a second step would have reached it
    with pytest.raises(ValueError, match="encoder: .* did not move"):
        proof.check()


def test_proof_notices_frozen_base_weights_under_lora(build, make_batch):
    from mllm_vision.vlm import FreezeProof, audit, freeze

    model, _ = build()
    lora = freeze(model, ("connector", "language_model=lora"), rank=2)
    proof = FreezeProof(lora, audit(lora, 1e-3))
    train_steps(lora, make_batch(model))
    rows = {row["group"]: row for row in proof.close(lora)}
    proof.check()
    assert rows["language_model"]["moved"] and rows["connector"]["moved"] and not rows["encoder"]["moved"]
    with torch.no_grad():
        next(p for n, p in lora.named_parameters() if "q_proj.base_layer.weight" in n)[0] += 1e-6
    proof.close(lora)
    with pytest.raises(ValueError, match="language_model: frozen weights moved"):
        proof.check()


def test_lora_reaches_the_language_model_only_and_the_projector_trains_in_full(build):
    from mllm_vision.vlm import audit, freeze

    model, _ = build()
    plain = {row["group"]: row["parameters"] for row in audit(model, 1e-3)}
    lora = freeze(model, ("connector", "language_model=lora"), rank=2)
    trained = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert trained and all(("lora_" in n and "language_model" in n) or "multi_modal_projector" in n for n in trained)
    assert not any("vision_tower" in n for n in trained)
    assert sum("lora_A" in n for n in trained) == 2 * 7  # two layers of q, k, v, o, gate, up, down
    rows = {row["group"]: row for row in audit(lora, 1e-3)}
    assert rows["connector"]["trainable"] == rows["connector"]["parameters"] == plain["connector"]
    assert rows["encoder"]["parameters"] == plain["encoder"] and rows["encoder"]["trainable"] == 0


def test_rates_and_weight_decays_by_part_fit_the_trainers_groups(build):
    from mllm_vision.modules.audit import audit_table
    from mllm_vision.training import parameter_groups
    from mllm_vision.vlm import audit, by_prefix, freeze

    rates = {"encoder": 1e-5, "connector": 1e-3, "language_model": 1e-4}
    decays = {"encoder": 0.9, "connector": None, "language_model": 0.3}
    model, _ = build()
    for wrapped in (
        freeze(model, ("connector", "language_model")),
        freeze(model, ("connector", "language_model=lora"), rank=2),
    ):
        given = {"learning_rates": by_prefix(wrapped, rates), "weight_decays": by_prefix(wrapped, decays)}
        groups = parameter_groups(wrapped, weight_decay=0.1, learning_rate=1.0, **given)
        group_of = {id(p): group for group in groups for p in group["params"]}
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                assert id(parameter) not in group_of
                continue
            rate, decay = (1e-3, 0.1) if "multi_modal_projector" in name else (1e-4, 0.3)
            assert group_of[id(parameter)]["lr"] == rate, name
            assert group_of[id(parameter)]["weight_decay"] == (decay if parameter.ndim > 1 else 0.0), name
    rows = {row["group"]: row for row in audit(wrapped, 1.0, rates, 0.1, decays)}
    assert [rows[group]["weight_decay"] for group in rates] == [0.0, 0.1, 0.3], "the encoder is frozen"
    table = audit_table(rows.values()).splitlines()
    assert table[0].endswith("decay") and table[2].endswith("0.1") and table[3].endswith("0.3")


@pytest.mark.parametrize("train", [(), ("projektor",)])
def test_unknown_groups_are_refused(build, train):
    from mllm_vision.vlm import freeze

    with pytest.raises(ValueError, match="encoder, connector, language_model"):
        freeze(build()[0], train)


def test_rank_below_one_is_refused(build):
    from mllm_vision.vlm import freeze

    with pytest.raises(ValueError, match="lora_rank=0"):
        freeze(build()[0], ("connector", "language_model=lora"), rank=0)
