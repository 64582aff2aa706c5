"""What the ranks do in the tests of gradient caching; importable, because workers unpickle by name."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import cached_objectives as small
import torch
import torch.distributed as dist
from work import share

from mllm_vision import distributed
from mllm_vision.training.trainer.gradient_cache import cached_backward


def steps(kind, chunk, sizes, find_unused=False, count=3):
    """Three steps of SGD, in chunks or (None) at once: losses, metrics, parameters, gradient reductions a step."""
    from torch.nn.parallel import DistributedDataParallel

    objective = small.build(kind)
    model, reductions = objective, []
    if distributed.world_size() > 1:
        model = DistributedDataParallel(objective, find_unused_parameters=find_unused)

        def reduce(state, bucket):
            reductions.append(bucket.index())
            return dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future().then(
                lambda done: done.value()[0]
            )  # fmt: skip

        model.register_comm_hook(None, reduce)
    no_sync = model.no_sync if model is not objective else contextlib.nullcontext
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for step in range(count):
        batch = {name: share(value, sizes) for name, value in small.batch_of(kind, sum(sizes), seed=step).items()}
        if chunk is None:
            output = model(**batch)
            output.loss.backward()
        else:
            output = cached_backward(objective, batch, chunk, model=model, no_sync=no_sync, check=True)
        optimizer.step()
        optimizer.zero_grad()
        metrics = distributed.mean_over_ranks(output.metrics)
        seen.append((output.loss.item(), {name: value.item() for name, value in metrics.items()}))
    parameters = {name: value.detach().clone() for name, value in objective.named_parameters()}
    return seen, parameters, len(reductions) / count


def trained(kind, world, settings):
    """The same through the Trainer: the history it logged, the parameters, how often after_step ran."""
    from accelerate.state import AcceleratorState, GradientState

    from mllm_vision.training.recipe.arguments import RecipeArguments
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    rank = str(distributed.rank())
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    before = dict(os.environ)
    os.environ.update(launched if world > 1 else {})
    try:
        with tempfile.TemporaryDirectory() as folder:
            args = RecipeArguments(
                output_dir=str(Path(folder) / "run"), use_cpu=True, max_steps=3, save_strategy="no", logging_steps=1,
                learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", disable_tqdm=True, data_seed=1,
                max_grad_norm=0.5, **settings,
            )  # fmt: skip
            trainer = ObjectiveTrainer(small.build(kind), args, train_dataset=small.rows_of(kind, 36))
            assert trainer.args.world_size == world
            trainer.train()
            history = [entry for entry in trainer.state.log_history if "loss" in entry]
            parameters = {name: value.detach().clone() for name, value in trainer.objective.named_parameters()}
            return history, parameters, trainer.negatives_batch
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
