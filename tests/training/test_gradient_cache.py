"""Gradient caching: chunked = whole, for loss, gradients and ten steps; random state, memory, refusals."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cached_objectives as small
import numpy as np
import pytest
import torch
from torch import nn

from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.trainer.gradient_cache import RandomState, cached_backward, count_rows, split_rows
from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer
from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer


def arguments(folder: Path, **settings: Any) -> RecipeArguments:
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 12,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "weight_decay": 0.1, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "data_seed": 1,
    }  # fmt: skip
    return RecipeArguments(**{**defaults, **settings})


def gradients(objective: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in objective.named_parameters() if value.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda note, name=name: f"{name}: {note}")


def train(kind: str, folder: Path, rows: int, dataset: list | None = None, **settings: Any) -> Any:
    torch.manual_seed(7)
    objective = small.build(kind)
    args = arguments(folder, **settings)
    trainer = ObjectiveTrainer(objective, args, train_dataset=dataset or small.rows_of(kind, rows))
    trainer.train()
    return trainer


# ---- the gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 6, 11])
def test_the_gradient_in_chunks_is_that_of_the_whole_batch(kind: str, chunk: int) -> None:
    """In float64, where only a mistake can be seen; 12 rows in chunks that come out even, and that do not."""
    batch = small.batch_of(kind, 12)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    whole, chunked = small.build(kind).double(), small.build(kind).double()
    expected = whole(**batch)
    expected.loss.backward()
    found = cached_backward(chunked, batch, chunk, check=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    assert_close(found.metrics, expected.metrics, rtol=1e-6, atol=1e-7)  # these are in float32
    assert gradients(whole).keys() == dict(whole.named_parameters()).keys()
    assert_close(gradients(chunked), gradients(whole), rtol=1e-9, atol=1e-13)
    assert_close(dict(chunked.named_buffers()), dict(whole.named_buffers()), rtol=1e-12, atol=1e-12)
    assert "forward" not in chunked.__dict__ and not chunked.replaying


@pytest.mark.parametrize("kind", small.KINDS)
def test_a_thousand_rows_in_chunks_of_64_train_as_at_once(kind: str, tmp_path: Path) -> None:
    """B = 1024: the parameters after ten steps through the Trainer, with clipping that bites, to 1e-5 in float32."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1024, "max_steps": 10, "learning_rate": 1e-3, "adam_epsilon": 1e-6,
        "max_grad_norm": 0.5,
    }  # fmt: skip
    rows = small.rows_of(kind, 1100)
    start = {name: value.detach().clone() for name, value in small.build(kind).named_parameters()}
    whole = train(kind, tmp_path / "a", 0, rows, **settings)
    chunked = train(kind, tmp_path / "b", 0, rows, **settings, embed_batch_size=64)
    found, expected = dict(chunked.model.named_parameters()), dict(whole.model.named_parameters())
    assert_close(found, expected, rtol=0, atol=1e-5)
    moved = max((expected[name] - value).abs().max().item() for name, value in start.items())
    assert moved > 5e-3  # hundreds of times what they may differ by
    for mine, theirs in zip(chunked.state.log_history, whole.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        same = ("loss", "grad_norm", "logit_scale", "positive_similarity", "spread", "width")
        for name in set(same) & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("kind", "config"),
    [("clip", {}), ("clip", {"patch_dropout": 0.5}), ("simclr", {})],
    ids=["clip", "patches", "views"],
)
def test_dropout_and_augmentation_are_replayed(kind: str, config: dict) -> None:
    """Against the graph of every chunk at once, with the same draws; the draws that follow are the same too."""
    batch = small.batch_of(kind, 11)
    plain, cached = (small.build(kind, dropout=0.3, augment=True, **config) for _ in range(2))
    _seed(3)
    chunks = [plain.embed(**chunk) for chunk in split_rows(batch, 4)]
    expected = plain.loss({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})
    after = (random.random(), np.random.rand(), torch.rand(3))
    expected.loss.backward()
    _seed(3)
    found = cached_backward(cached, batch, 4, check=True)
    assert torch.equal(found.loss, expected.loss)
    assert_close(gradients(cached), gradients(plain), rtol=1e-5, atol=1e-7)
    assert (random.random(), np.random.rand()) == after[:2] and torch.equal(torch.rand(3), after[2])
    _seed(4)
    assert not torch.equal(cached_backward(cached, batch, 4).loss, expected.loss)  # the draws do matter


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_draws_go_on_from_where_a_state_was_taken() -> None:
    state = RandomState()
    first = (random.random(), np.random.rand(), torch.rand(2).tolist())
    random.random()
    state.restore()
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == first


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_mixed_precision(kind: str, tmp_path: Path) -> None:
    """bf16: what autocast keeps of the weights from the pass without graph must not cut the next one's gradient."""
    found = {}
    for name, size in (("whole", None), ("chunked", 4)):
        seen: dict[str, torch.Tensor] = {}

        class Watch(ObjectiveTrainer):
            def _clip_grad_norm(self, model: Any, seen: dict = seen) -> Any:
                seen |= gradients(self.objective)
                return super()._clip_grad_norm(model)

        args = arguments(tmp_path / name, bf16=True, max_steps=1, embed_batch_size=size)
        trainer = Watch(small.build(kind), args, train_dataset=small.rows_of(kind, 12))
        trainer.train()
        found[name] = (seen, trainer.state.log_history[0]["loss"])
    (chunked, loss), (whole, expected) = found["chunked"], found["whole"]
    assert loss == pytest.approx(expected, rel=2e-3)
    assert chunked.keys() == whole.keys() == dict(small.build(kind).named_parameters()).keys()
    one, other = (torch.cat([value.flatten() for value in each.values()]) for each in (chunked, whole))
    assert (one - other).norm() < 0.02 * other.norm()  # a gradient cut off would show here
    for name in chunked:
        if name.endswith("weight"):
            assert torch.nn.functional.cosine_similarity(chunked[name].flatten(), whole[name].flatten(), dim=0) > 0.98


def test_memory_is_that_of_a_chunk() -> None:
    """What autograd holds at the worst moment, counted: one chunk's activations and the loss."""
    batch = small.batch_of("clip", 128)
    whole = _most_held(lambda: small.build("clip")(**batch).loss.backward())
    chunked = _most_held(lambda: cached_backward(small.build("clip"), batch, 8))
    assert chunked < 0.2 * whole


class _Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _most_held(step: Callable[[], Any]) -> int:
    held, most = 0, 0

    def free(size: int) -> None:
        nonlocal held
        held -= size

    def pack(tensor: torch.Tensor) -> _Held:
        nonlocal held, most
        kept, size = _Held(tensor), tensor.nbytes
        held += size
        most = max(most, held)
        weakref.finalize(kept, free, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        step()
    return most


# ---- the trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "batchnorm"])
def test_accumulation_becomes_one_batch_in_chunks(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = small.rows_of(kind, 30)
    whole = train(kind, tmp_path / "a", 0, rows, optim="sgd")
    with caplog.at_level("INFO"):
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "optim": "sgd"}
        chunked = train(kind, tmp_path / "b", 0, rows, **settings)
    assert "negatives per anchor: 11; effective batch: 12" in caplog.text
    assert "12 rows per step and embeds them in chunks of 4 (gradient_accumulation_steps=3)" in caplog.text
    assert_close(dict(chunked.model.named_parameters()), dict(whole.model.named_parameters()), rtol=0, atol=1e-5)
    assert chunked.state.global_step == whole.state.global_step == 3
    if kind == "batchnorm":
        assert chunked.objective.steps == 3


def test_the_users_arguments_stay_as_they_were_given(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, embed_batch_size=2)
    trainer = ObjectiveTrainer(small.build("clip"), args, train_dataset=small.rows_of("clip", 30))
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.embed_batch_size) == (4, 3, 2)
    assert (trainer.args.per_device_train_batch_size, trainer.embed_batch_size) == (12, 2)
    assert trainer.args.gradient_accumulation_steps == 1 and len(trainer.get_train_dataloader()) == 2


def test_a_loss_per_row_is_accumulated_as_ever(tmp_path: Path) -> None:
    class PerRow(small.TwoViews):
        couples_batch = False

    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=1)
    trainer = ObjectiveTrainer(PerRow(), args, train_dataset=small.rows_of("simclr", 12))
    assert trainer.embed_batch_size is None and trainer.args.gradient_accumulation_steps == 3


def test_inputs_stay_on_the_cpu_until_their_chunk(tmp_path: Path) -> None:
    moved: list[int] = []

    class Watch(ObjectiveTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            moved.append(count_rows(inputs))
            return super()._prepare_inputs(inputs)

    args = arguments(tmp_path, max_steps=1, embed_batch_size=5)
    trainer = Watch(small.build("clip"), args, train_dataset=small.rows_of("clip", 12))
    assert trainer.get_train_dataloader().device is None
    trainer.train()
    assert moved == [5, 5, 2, 5, 5]
    plain = ObjectiveTrainer(small.build("clip"), arguments(tmp_path), train_dataset=small.rows_of("clip", 12))
    assert plain.get_train_dataloader().device is not None


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """With dropout: the random state after a chunked step is part of what is resumed."""
    runs = {}
    for name, steps in (("whole", [4]), ("torn", [2, 4])):
        for stop in steps:
            torch.manual_seed(stop)
            args = arguments(
                tmp_path / name,
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                embed_batch_size=5,
                resume=stop != steps[0],
            )
            objective = small.build("clip", dropout=0.2)
            trainer = ObjectiveTrainer(objective, args, train_dataset=small.rows_of("clip", 30))
            if stop == 2:
                trainer.add_callback(_Stop(2))
            trainer.train()
        runs[name] = dict(trainer.model.named_parameters())
    for name, value in runs["whole"].items():
        assert torch.equal(runs["torn"][name], value), name


def _Stop(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_after_step_waits_for_a_step_that_was_taken() -> None:
    from types import SimpleNamespace

    from mllm_vision.training.callbacks.progress import AfterStep

    objective = small.build("simclr")
    callback, state = AfterStep(objective), SimpleNamespace(global_step=1, max_steps=2)
    callback.on_step_end(None, state, None, optimizer=SimpleNamespace(step_was_skipped=True))
    assert objective.steps == 0
    callback.on_step_end(None, state, None, optimizer=SimpleNamespace(step_was_skipped=False))
    callback.on_step_end(None, state, None)
    assert objective.steps == 2


# ---- an objective's side of the contract -----------------------------------------------------------------------


def test_batchnorm_inside_embed_is_warned_of_and_counts_a_row_once(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(small.TwoViews):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"first": self.norm(self.vision(views[:, 0]).pooled), "second": self.vision(views[:, 1]).pooled}

    objective, batch = Wrong().train(), small.batch_of("simclr", 12)
    cached_backward(objective, batch, 4, check=True)
    assert "1 BatchNorm layers run inside embed (norm): each normalises with the statistics of its chunk" in caplog.text
    assert objective.norm.num_batches_tracked == 3 and objective.norm.track_running_stats


def test_what_breaks_the_contract_is_refused() -> None:
    batch = small.batch_of("simclr", 12)

    class Queue(small.TwoViews):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(16))

        def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            embeddings = super().embed(views)
            self.queue.copy_(embeddings["first"][0].detach())
            return embeddings

    with pytest.raises(ValueError, match="embed of Queue changed the buffer 'queue'.*update buffers in after_step"):
        cached_backward(_head_last(Queue()), batch, 4, check=True)

    class Own(small.TwoViews):
        generator = torch.Generator()

        def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return super().embed(views + torch.randn(views.shape, generator=self.generator))

    with pytest.raises(ValueError, match="different values of 'first' in the second pass.*global random state"):
        cached_backward(Own().train(), batch, 4, check=True)

    class Mean(small.TwoViews):
        def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {name: value.mean(0) for name, value in super().embed(views).items()}

    with pytest.raises(ValueError, match=r"embed gave 'first' as \[8\] for 4 rows"):
        cached_backward(Mean().train(), batch, 4)
    with pytest.raises(ValueError, match="differ in their number of rows .views 12, extra 3.*leave embed_batch_size"):
        cached_backward(small.build("simclr"), {**batch, "extra": torch.zeros(3)}, 4)


def _head_last(objective: small.TwoViews) -> small.TwoViews:
    objective.head[3] = nn.Linear(16, 16)
    return objective.train()


def test_splitting_rows() -> None:
    batch = {"a": torch.arange(10).view(5, 2), "b": list("abcde"), "c": torch.tensor(3.0), "d": None, "e": "text"}
    chunks = split_rows(batch, 2)
    assert [count_rows(chunk) for chunk in chunks] == [2, 2, 1] and count_rows(batch) == 5
    assert torch.equal(torch.cat([chunk["a"] for chunk in chunks]), batch["a"])
    assert [chunk["b"] for chunk in chunks] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(chunk["c"] is batch["c"] and chunk["d"] is None and chunk["e"] == "text" for chunk in chunks)
    assert chunks[0]["a"].data_ptr() == batch["a"].data_ptr()  # no copy


def test_what_no_gradient_reaches_is_not_embedded_again() -> None:
    """A teacher's features have no graph; `replaying` lets `embed` leave them out of the second pass."""

    class Teacher(small.TwoViews):
        passes = 0

        def embed(self, views: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            embeddings = super().embed(views)
            if not self.replaying:
                self.passes += 1
                with torch.no_grad():
                    embeddings["teacher"] = self.vision(views[:, 0]).pooled
            return embeddings

        def loss(self, embeddings: dict[str, torch.Tensor]) -> Any:
            assert not embeddings["teacher"].requires_grad and embeddings["first"].requires_grad
            return super().loss(embeddings)

    teacher, plain, batch = Teacher().train(), small.build("simclr"), small.batch_of("simclr", 12)
    cached_backward(teacher, batch, 4, check=True)
    plain(**batch).loss.backward()
    assert teacher.passes == 3
    assert_close(gradients(teacher), gradients(plain), rtol=1e-4, atol=1e-7)


# ---- refusals before training ----------------------------------------------------------------------------------


class Matching(small.TwoViews):
    chunkable, unchunkable_reason = False, "its matching loss runs the text tower again on hard negatives"


@pytest.mark.parametrize(
    ("objective", "settings", "words"),
    [
        (Matching, {"gradient_accumulation_steps": 3}, "would see only 12 rows .*matching loss.*train_batch_size 36"),
        (Matching, {"embed_batch_size": 4}, "embed_batch_size=4: Matching cannot embed .*hard negatives; leave it out"),
        (small.TwoViews, {"embed_batch_size": 0}, "embed_batch_size=0 must be at least 1"),
        (
            small.TwoViews,
            {"embed_batch_size": 4, "torch_compile": True},
            "torch_compile and embed_batch_size=4 are mutually exclusive",
        ),
        (
            small.TwoViews,
            {"gradient_accumulation_steps": 2, "optim": "lomo"},
            "optim=lomo and embed_batch_size=.* are mutually exclusive",
        ),
        (small.TwoViews, {"auto_find_batch_size": True}, "negatives fewer.*--embed_batch_size"),
        (lambda: nn.Linear(2, 2), {"embed_batch_size": 4}, "Linear has no embed"),
    ],
)
def test_refusals(objective: Any, settings: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveTrainer(objective(), arguments(tmp_path, **settings), train_dataset=small.rows_of("simclr", 40))


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process split each batch.*torchrun --nproc-per-node 2"):
        ObjectiveTrainer(small.build("clip"), args, train_dataset=small.rows_of("clip", 40))


def test_other_stages_refuse_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embed_batch_size=4 is for the objectives of stage zero.*accumulation_steps"):
        RecipeTrainer(nn.Linear(2, 2), arguments(tmp_path, embed_batch_size=4), train_dataset=[{}] * 20)


def test_a_batch_no_larger_than_a_chunk_is_a_plain_step(tmp_path: Path) -> None:
    args = arguments(tmp_path, embed_batch_size=12)
    trainer = ObjectiveTrainer(small.build("clip"), args, train_dataset=small.rows_of("clip", 12))
    assert trainer.embed_batch_size is None
