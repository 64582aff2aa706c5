"""Every image method there is, found by the registry: gradients, columns, resuming, chunks, bad input."""

from __future__ import annotations

import inspect
import shutil

import pytest
import torch
from families import CONVOLUTIONAL, FAMILIES
from methods_for_tests import (
    BATCH,
    IMAGE_METHODS,
    ROWS,
    assert_same,
    batches,
    objective,
    records,
    small_config,
    tell_features,
    trained,
    view_makers,
)
from torch import nn

from mllm_vision.data.images.dataset import ImageCollator, ImageDataset
from mllm_vision.data.views.views import POLICIES
from mllm_vision.objectives import ImageObjective, load_objective
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

every_method = pytest.mark.parametrize("name", IMAGE_METHODS)


def build(name, kind):
    """The objective, or a skip where the method says that it takes no convolutional network."""
    try:
        return objective(name, kind)
    except ValueError as refused:
        assert kind == "resnet" and "convolutional" in str(refused) and "use" in str(refused), refused
        pytest.skip(str(refused))


def test_they_are_found():
    assert {"simclr", "byol", "dino", "mae"} <= set(IMAGE_METHODS)
    assert "clip" not in IMAGE_METHODS


@every_method
@pytest.mark.parametrize("kind", FAMILIES)
def test_forward_and_backward(name, kind):
    """A finite loss, and a gradient for whatever trains: DDP would wait for one that never comes."""
    if name in ("mae", "dinov2") and kind in CONVOLUTIONAL:
        with pytest.raises(ValueError, match=r"(?i)resnet|patch|convolutional"):
            objective(name, kind)
        return
    made = objective(name, kind)
    tell_features(made)
    output = made(**batches(made, 1)[0])
    output.loss.backward()
    assert output.loss.ndim == 0 and torch.isfinite(output.loss)
    for key, parameter in made.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
    before = [value.clone() for value in made.buffers()]
    made.after_step(0.5)
    assert len(before) == len(list(made.buffers()))


@every_method
def test_columns_match_the_views(name):
    """What `embed` asks for, policy and collator give; `forward` takes it by name."""
    method = load_objective(name)
    assert method.views in POLICIES
    made = objective(name)
    given = set(view_makers(made)[0].columns) | {"seeds", "index", "labels"}
    parameters = inspect.signature(method.embed).parameters
    assert {key for key in parameters if key != "self"} <= given
    taken = inspect.signature(method.forward).parameters
    assert set(method.columns()) <= set(taken)
    assert not any(each.kind is each.VAR_KEYWORD for each in taken.values())
    assert batches(made, 1)[0].keys() <= set(method.columns())


@every_method
def test_chunked_is_whole(name):
    made = objective(name)
    if not made.chunkable:
        assert made.unchunkable_reason
        with pytest.raises(ValueError, match="cannot embed its batch in chunks"):
            made.check_accumulation(1, BATCH, 2)
        return
    assert_same(trained(name, chunk=3), trained(name))


@every_method
def test_resumed_is_uninterrupted(name, tmp_path):
    """Teacher, centre, queue and prototypes go on bit by bit; the paper's training settings are accepted."""
    whole = train(name, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = train(name, tmp_path / "resumed", resume=True)
    for (key, wanted), value in zip(whole.items(), resumed.values(), strict=True):
        assert torch.equal(value, wanted), key


def train(name, folder, resume=False, **changed):
    """State after six steps, with a checkpoint in the middle of the first epoch."""
    made = objective(name)
    settings = {
        **made.training_defaults,
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "warmup_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_total_limit": None,
        "resume": resume,
    }
    make, plain = view_makers(made)
    trainer = ObjectiveTrainer(
        made,
        RecipeArguments(**{**settings, **changed}),
        train_dataset=ImageDataset(records()),
        data_collator=ImageCollator(),
        make_views=make,
        make_plain_views=plain,
    )
    trainer.train()
    return {key: value.clone() for key, value in made.state_dict().items()}


@every_method
def test_an_encoder_with_batch_norm_is_not_chunked(name):
    if name in ("mae", "dinov2"):
        pytest.skip("takes no convolutional encoder")
    made = objective(name, "resnet")
    if not made.chunkable:
        pytest.skip("refused for any encoder")
    with pytest.raises(ValueError, match="BatchNorm layers of the encoder.*--sync_batch_norm"):
        made.check_chunks(4)
    assert objective(name).check_chunks(4) is None


@every_method
def test_bad_batches(name):
    """One view, images instead of views, a missing column, a batch of one: told with the remedy."""
    made = objective(name)
    batch = batches(made, 1)[0]
    with pytest.raises(ValueError, match=r"needs views \[B, V, 3, \w+, \w+\]"):
        made(**{**batch, "views": batch["views"][:, 0]})
    if made.least_views > 1:
        with pytest.raises(ValueError, match="V >= 2"):
            made(**{**batch, "views": batch["views"][:, :1]})
    for column in made.columns():
        if inspect.signature(made.embed).parameters[column].default is inspect.Parameter.empty:
            with pytest.raises(ValueError, match=f"needs the column '{column}'"):
                made.select_columns({key: value for key, value in batch.items() if key != column})
    if made.couples_batch:
        with pytest.raises(ValueError, match="per_device_train_batch_size 2"):
            made.before_training(ROWS, 1)
    if hasattr(made.config, "queue_size"):
        with pytest.raises(ValueError, match="queue_size=12 is more than the 11 images"):
            made.before_training(11, BATCH)


def test_what_embed_returns_is_told():
    made = objective("simclr")
    made.embed = lambda views: made.features(made.encoder, views)
    with pytest.raises(ValueError, match=r"SimCLR.embed returned Tensor; it returns a dict of tensors \[B, ...\]"):
        made(views=torch.zeros(2, 2, 3, 32, 32))


def test_a_missing_mean_of_the_objective_is_told():
    class Nothing(ImageObjective):
        class Config:
            pass

        def embed(self, views, labels):
            return {"h": self.features(self.encoder, views)}

        def loss(self, embeddings):
            raise AssertionError("not reached")

    from methods_for_tests import encoder

    made = Nothing(encoder())
    assert made.columns() == ["views", "labels"]
    with pytest.raises(ValueError, match=r"needs the column 'labels', and the batch has views; name the label column"):
        made(views=torch.zeros(2, 2, 3, 32, 32))


def test_small_configs_are_small():
    for name in IMAGE_METHODS:
        made = objective(name)
        assert sum(value.numel() for value in made.parameters()) < 200_000, name
        assert isinstance(made, nn.Module) and isinstance(made.config, type(small_config(type(made))))
