"""The trainer of stage zero: any `Objective`, its loss, its metrics, its `after_step`."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from .callbacks import AfterStep
from .recipe_trainer import RecipeTrainer

logger = logging.getLogger(__name__)


class ObjectiveTrainer(RecipeTrainer):
    """Trains an `Objective`: its loss, its metrics (averaged between logs and over ranks), its `after_step`.

    Says at the start how many negatives an anchor meets and what the loss is at chance; warns once when the loss
    still sits there after a fifth of the training.
    """

    # The loss of an objective is the mean of its micro-batch: the Trainer has to divide it.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._warned = False
        self.add_callback(AfterStep(self.objective))

    @property
    def objective(self) -> Any:
        """The objective without the wrappers of DDP or torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def negatives_batch(self) -> int:
        """How many pairs meet in one loss: the batch of all processes, without accumulation."""
        return self._train_batch_size * self.args.world_size

    def _chance(self) -> float | None:
        chance = getattr(self.objective, "chance_loss", None)
        return chance(self.negatives_batch) if callable(chance) else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `RecipeTrainer.train`, after a line on negatives and chance."""
        if self.is_world_process_zero():
            steps, batch, chance = self.args.gradient_accumulation_steps, self.negatives_batch, self._chance()
            told = f"; loss at chance {chance:.4f}" if chance is not None else ""
            logger.info("negatives per anchor: %d; effective batch: %d%s", batch - 1, batch * steps, told)
            if steps > 1:
                logger.warning(
                    "gradient_accumulation_steps=%d adds no negatives: each loss sees %d pairs, not %d",
                    steps, batch, batch * steps,
                )  # fmt: skip
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the objective on one micro-batch; its metrics are kept for the next log."""
        output = model(**inputs)
        if model.training:
            for name, value in (output.metrics or {}).items():
                value = torch.as_tensor(value, dtype=torch.float32).detach().mean()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `RecipeTrainer.log`, with the objective's metrics since the last log."""
        if "loss" in logs:
            for name in sorted(self._sums):  # every rank has the same names, in the same order
                mean = (self._sums[name] / self._counts[name]).to(self.args.device)
                logs.setdefault(name, float(self.accelerator.reduce(mean, reduction="mean")))
            self._sums, self._counts = {}, {}
            self._warn_at_chance(logs["loss"])
        super().log(logs, start_time)

    def _warn_at_chance(self, loss: float) -> None:
        chance = self._chance()
        if self._warned or not chance or self.state.global_step < max(10, self.state.max_steps // 5):
            return
        if math.isfinite(loss) and loss >= 0.98 * chance:
            self._warned = True
            logger.warning(
                "step %d: the loss %.4f sits at chance (%.4f for %d pairs): nothing is learnt. Look at the pairs "
                "(do image and caption belong together?), the learning rate (%g) and the logit scale",
                self.state.global_step, loss, chance, self.negatives_batch, self.args.learning_rate,
            )  # fmt: skip
