"""Features of all rows before each epoch, for methods that need them."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from mllm_vision.distributed import all_gather

logger = logging.getLogger(__name__)


class FeaturesBeforeEpoch(TrainerCallback):
    """Calls `objective.before_epoch(features)`, `features` `[rows, D]` by row number, before each epoch.

    For an epoch resumed in its middle the result is in the checkpoint.

    Args:
        trainer: the `ObjectiveTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not getattr(self.trainer.objective, "features_due", True):
            return
        begun, _, step = self.trainer._start
        if step and state.global_step == begun:
            return
        began = time.monotonic()
        features = dataset_features(self.trainer)
        self.trainer.objective.before_epoch(features)
        if state.is_world_process_zero:
            seconds = time.monotonic() - began
            logger.info("features of %d rows before the epoch: %.1f s", len(features), seconds)


@torch.no_grad()
def dataset_features(trainer: Any) -> torch.Tensor:
    """`objective.epoch_features` of every row of the training set, in order, on every rank.

    Each rank embeds its share, in evaluation mode; random states are restored.

    Returns:
        `[rows, D]`.
    """
    args, dataset = trainer.args, trainer.train_dataset
    rows, rank, world = len(dataset), args.process_index, args.world_size
    share = range(rows * rank // world, rows * (rank + 1) // world)
    found: list[torch.Tensor] = []
    devices = [args.device] if args.device.type == "cuda" else []
    with trainer.plain_model() as model, torch.random.fork_rng(devices=devices):
        objective = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        loader = DataLoader(
            Subset(dataset, share),
            batch_size=trainer.embed_batch_size or trainer._train_batch_size,
            collate_fn=trainer.data_collator,
            num_workers=args.dataloader_num_workers,
        )
        was_training = objective.training
        objective.eval()
        try:
            for batch in loader:
                with trainer.compute_loss_context_manager():
                    features = objective.epoch_features(trainer.prepare(batch, plain=True)["views"])
                    found.append(features.to(torch.promote_types(features.dtype, torch.float32)))
        finally:
            objective.train(was_training)
    return all_gather(torch.cat(found))  # no rank is without rows: a batch of all ranks needs as many
