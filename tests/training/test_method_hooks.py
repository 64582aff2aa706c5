"""What the trainer does for a method: rates held and frozen, a pass before each epoch, views a chunk at a time, NaN."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from methods_for_tests import BATCH, ROWS, encoder, records, view_makers
from safetensors.torch import load_file, save_file
from torch import nn

from mllm_vision.data.images.dataset import ImageCollator, ImageDataset
from mllm_vision.objectives import ImageObjective, ObjectiveOutput
from mllm_vision.training.callbacks.finite import last_finite_checkpoint
from mllm_vision.training.optim.method_rates import MethodRates
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

STEPS = ROWS // BATCH  # of an epoch


class Watched(ImageObjective):
    """A linear head and a predictor; records what the trainer sets."""

    views = "simclr"

    @dataclass
    class Config:
        wanted: dict | None = None

    def __init__(self, config=None):
        torch.manual_seed(0)
        super().__init__(encoder(), config)
        width = self.encoder.pooled_size
        self.head, self.predictor = nn.Linear(width, 4), nn.Linear(4, 4)
        self.note, self.passes, self.chunks, self.poison = [], [], [], None

    def rates(self):
        return self.config.wanted or {}

    def embed(self, views, index):
        self.chunks.append(len(views))
        return {"h": self.features(self.encoder, views)}

    def loss(self, embeddings):
        z = self.predictor(self.head(embeddings["h"]))
        loss = z.square().mean()
        self.note.append((self.progress, self.epoch))
        return ObjectiveOutput(loss=loss * float("nan") if len(self.note) == self.poison else loss, metrics={})

    def before_epoch(self, features):
        self.passes.append((self.epoch, features))


def trainer_of(made, folder, **changed):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    make, plain = view_makers(made)
    return ObjectiveTrainer(
        made,
        RecipeArguments(**{**settings, **changed}),
        train_dataset=ImageDataset(records()),
        data_collator=ImageCollator(),
        make_views=make,
        make_plain_views=plain,
    )


def test_rates_of_a_method(tmp_path):
    """A factor follows the schedule, a held rate does not, and both are in the log under their prefix's name."""
    made = Watched(Watched.Config({"predictor": "constant", "encoder": 0.5}))
    trainer = trainer_of(made, tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if entry.get("learning_rate")]
    assert len({entry["learning_rate"] for entry in logs}) > 3
    for entry in logs:
        assert entry["learning_rate_predictor"] == pytest.approx(0.1)
        assert entry["learning_rate_encoder"] == pytest.approx(0.5 * entry["learning_rate"])
    groups = {group["group_name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert groups["predictor"] == pytest.approx(0.1) and groups["default"] == pytest.approx(0.0)


def test_a_held_rate_needs_a_schedule_by_group():
    rates = MethodRates(Watched(Watched.Config({"predictor": "constant"})))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)]))
    with pytest.raises(ValueError, match="ReduceLROnPlateau sets one rate .*, and 'predictor' has its own"):
        rates.hold(plateau)


def test_frozen_for_an_epoch(tmp_path):
    """No update, no weight decay and no momentum in the first epoch; then it trains."""
    made = Watched(Watched.Config({"head": "frozen:1"}))
    began = made.head.weight.detach().clone()
    trainer = trainer_of(made, tmp_path, max_steps=STEPS)
    trainer.train()
    assert torch.equal(made.head.weight, began)
    assert not trainer.optimizer.state[made.head.weight]
    made = Watched(Watched.Config({"head": "frozen:1"}))
    trainer_of(made, tmp_path, max_steps=STEPS + 1).train()
    assert not torch.equal(made.head.weight, began)


def test_still_for_an_epoch(tmp_path):
    """No update in the first epoch, but the optimizer has seen the gradients; the schedule continues from there."""
    made = Watched(Watched.Config({"head": "still:1"}))
    began = made.head.weight.detach().clone()
    trainer = trainer_of(made, tmp_path, max_steps=STEPS)
    trainer.train()
    assert torch.equal(made.head.weight, began)
    assert trainer.optimizer.state[made.head.weight]
    made = Watched(Watched.Config({"head": "still:1"}))
    trainer = trainer_of(made, tmp_path, max_steps=STEPS + 1)
    trainer.train()
    assert not torch.equal(made.head.weight, began)
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1


@pytest.mark.parametrize(
    ("rates", "note"),
    [
        ({"preditor": 0.1}, "unknown prefix 'preditor'; the nearest known one is 'predictor'"),
        ({"predictor": "fixed"}, "'predictor' has 'fixed'; use a factor"),
        ({"predictor": -1}, "'predictor' has -1"),
    ],
)
def test_rates_that_make_no_sense(tmp_path, rates, note):
    with pytest.raises(ValueError, match=re.escape(note)):
        trainer_of(Watched(Watched.Config(rates)), tmp_path)


def test_progress_is_told_before_each_step(tmp_path):
    made = Watched()
    trainer_of(made, tmp_path).train()
    assert made.note == [(step / (2 * STEPS), step / STEPS) for step in range(2 * STEPS)]


def test_a_pass_before_each_epoch(tmp_path):
    """Every row's features in the order of the data, of the encoder as it is then; the random state stays."""
    made = Watched()
    made.needs_features = True
    data, (_, plain) = ImageDataset(records()), view_makers(made)
    whole = plain(ImageCollator()([data[row] for row in range(ROWS)]))["views"]
    wanted = made.eval().epoch_features(whole).detach()
    trainer_of(made, tmp_path).train()
    assert [epoch for epoch, _ in made.passes] == [0.0, 1.0]
    torch.testing.assert_close(made.passes[0][1], wanted)
    assert not torch.allclose(made.passes[1][1], wanted)
    losses = [trainer_losses(tmp_path / str(needs), needs) for needs in (False, True)]
    assert losses[0] == losses[1]


def trainer_losses(folder, needs):
    made = Watched()
    made.needs_features = needs
    trainer = trainer_of(made, folder)
    trainer.train()
    return losses_of(trainer)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_views_are_made_a_chunk_at_a_time(tmp_path):
    """The same loss in chunks, and the views of a chunk alone exist at a time."""
    whole, chunked = Watched(), Watched()
    wanted = trainer_of(whole, tmp_path / "whole", max_steps=2)
    wanted.train()
    found = trainer_of(chunked, tmp_path / "chunked", max_steps=2, embed_batch_size=3)
    sizes = []
    make = found.make_views
    found.make_views = lambda batch: sizes.append(len(batch["pixels"])) or make(batch)
    found.train()
    assert set(sizes) == {3, 2} and set(chunked.chunks) == {3, 2}
    assert losses_of(found) == pytest.approx(losses_of(wanted), rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_loss_that_is_no_number_stops_the_training(tmp_path, chunk):
    """Before the step, with the last good checkpoint named and the batch saved as the collator gave it."""
    made = Watched()
    made.poison = 4
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, "embed_batch_size": chunk}
    with pytest.raises(ValueError, match=r"the loss is nan at step 4 .*checkpoint-3; the batch is in") as caught:
        trainer_of(made, tmp_path, **settings).train()
    assert "--resume_from_checkpoint" in str(caught.value)
    saved = load_file(tmp_path / "bad_batch-step4-rank0.safetensors")
    assert saved["pixels"].dtype == torch.uint8 and len(saved["index"]) == BATCH
    good = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert torch.equal(good["head.weight"], made.head.weight)  # the step was not taken


def test_a_checkpoint_with_broken_weights_is_not_called_good(tmp_path):
    for step, value in ((1, 1.0), (2, float("inf"))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        save_file({"weight": torch.tensor([value])}, folder / "model.safetensors")
    assert last_finite_checkpoint(tmp_path).name == "checkpoint-1"
    assert last_finite_checkpoint(tmp_path / "none") is None
