"""Warnings during a training of stage zero, once each, while there is time to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

CHANCE_SHARE = 0.98  # of the loss at chance, above which nothing was learned
CLAMP_SHARE = 0.995  # of a limit: a mean scale above this was mostly at the limit
BIAS_RATIO = 4.0  # predicted over actual positives, beyond which the bias is wrong
LEAST_SPREAD = 0.1  # of unit vectors; their mean cosine is then 0.99
LEAST_RANK = 1.1  # directions that carry the variance; 1 is a line
LEAST_ENTROPY = 0.1  # of the prototypes that a batch is assigned to; 0 is one prototype
HOLD = 10  # steps that a state lasts before a warning
EARLIEST = 50  # steps without a warning: the sigmoid loss falls slowly at first

Warnings = Iterator[tuple[str, str]]  # (name, message)


class Health(TrainerCallback):
    """Watches the logged loss and metrics of an `Objective` and warns, once each, of

    - `chance`: the loss stays at chance, named where it is known: ln N (softmax over the batch), ln(2N-1) (NT-Xent),
      ln(K+1) (a queue of K), ln(out_dim) (DINO's prototypes), the margin (pairs and triplets with equal distances);
    - `scale`: the logit scale reached its upper clamp in the first half of the training, or its lower one;
    - `bias`: the sigmoid loss predicts several times too many or too few positive pairs;
    - `prototypes`: the teacher assigns every image to one prototype, or to all of them (DINO and related methods);
    - `collapse`: all embeddings point in one direction (`*_spread` below 0.1), or vary along a line (`*_rank` below
      1.1);
    - `offset`: the encoder's vectors h point in one direction and the head's outputs do not: the vectors share a large
      offset, which a head removes and a cosine between vectors does not.

    A state counts when it lasts for 10 steps and, except for the scale, only after a fifth of the training (at least
    50 steps, at most 1000 after warm-up). Its end is logged too.

    Args:
        objective: the trained objective; its `chance_loss`, `scale_limits` and `logit_scale` are read.
        pairs: the number of pairs in one loss, over all ranks.
        run: a `Run`; its record then gets `health`, a list of `{"step", "name", "message"}`.

    It reads the metrics `logit_scale`, `positives` and `predicted_positives` (per image), `prototype_entropy`,
    `teacher_entropy`, `*_spread` and `*_rank`, where they are logged.
    """

    def __init__(self, objective: Any, pairs: Callable[[], int], run: Any = None) -> None:
        self.objective, self.pairs, self.run = objective, pairs, run
        self.found: dict[str, str] = {}  # name -> message, of every warning so far
        self._began: dict[str, int] = {}
        self._active: set[str] = set()
        self._last = 0
        self._at_limit = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = state.global_step
        scale, limits = getattr(self.objective, "logit_scale", None), self._limits()
        # the scale of a pretrained pair may start at the limit
        self._at_limit = scale is not None and limits is not None and _near(scale.detach().exp().item(), limits)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs or state.global_step == self._last:
            return
        present = dict(self._check(args, state, logs))
        for name, message in present.items():
            lasted = state.global_step - self._began.setdefault(name, self._last)
            early = name != "scale" and state.global_step < patience(args, state.max_steps)
            if name not in self._active and lasted >= HOLD and not early:
                self._active.add(name)
                self._report(state, name, message)
        for name in [name for name in self._began if name not in present]:
            del self._began[name]
            if name in self._active:
                self._active.discard(name)
                if state.is_world_process_zero:
                    logger.info("step %d: no longer: %s", state.global_step, self.found[name].partition(":")[0])
        self._last = state.global_step

    def _report(self, state: Any, name: str, message: str) -> None:
        if name in self.found or not state.is_world_process_zero:
            self.found.setdefault(name, message)
            return
        self.found[name] = message
        logger.warning("step %d: %s", state.global_step, message)
        if self.run is not None:
            entry = {"step": state.global_step, "name": name, "message": message}
            self.run.record.setdefault("health", []).append(entry)

    def _check(self, args: Any, state: Any, logs: Mapping[str, float]) -> Warnings:
        """All warnings about these logs."""
        yield from self._scale(state, logs)
        pairs = self.pairs()
        image_only = not hasattr(self.objective, "dual") and hasattr(self.objective, "views")  # images without texts
        causes = [*_bias(logs, pairs), *_collapse(logs, image_only), *_prototypes(logs, self.objective)]
        yield from causes
        chance = expected_chance(self.objective, pairs, logs.get("positives", 1.0))
        if not chance or not CHANCE_SHARE * chance <= logs["loss"] < math.inf:
            return
        names = {name for name, _ in causes} - {"offset"}
        at = "the views (too strong?)" if image_only else "the pairs (do image and caption belong together?)"
        look = (
            "see the warning of the bias"
            if "bias" in names
            else f"look at {at}, the learning rate ({args.learning_rate:g}) and the "
            + ("temperature" if image_only else "logit scale")
            + "; the embeddings have collapsed too" * bool(names)
        )
        where = "sits at" if logs["loss"] < 1.05 * chance else "is above"
        level = level_name(self.objective, pairs, chance)
        level = f"{level} = {chance:.4f}" if level else f"{chance:.4f}"
        of = f"{pairs} {'images' if image_only else 'pairs'}"
        yield "chance", f"the loss {logs['loss']:.4f} {where} chance ({level} for {of}): nothing is learned; {look}"

    def _limits(self) -> tuple[float, float] | None:
        limits = getattr(self.objective, "scale_limits", None)
        scale = getattr(self.objective, "logit_scale", None)
        return limits if scale is not None and scale.requires_grad else None

    def _scale(self, state: Any, logs: Mapping[str, float]) -> Warnings:
        limits, scale = self._limits(), logs.get("logit_scale")
        if limits is None or scale is None:
            return
        if not _near(scale, limits):
            self._at_limit &= scale > 0.9 * limits[1] or scale < 1.1 * limits[0]
        elif not self._at_limit and scale < sum(limits) / 2:
            yield (
                "scale",
                f"logit_scale {scale:.4g} is at its lower clamp {limits[0]:g}: the loss falls by making all pairs "
                "equal, as with captions that do not belong to their images or a learning rate that is too high",
            )
        elif not self._at_limit and state.global_step <= state.max_steps / 2:
            yield (
                "scale",
                f"logit_scale {scale:.4g} is at its clamp {limits[1]:g} after {state.global_step} of "
                f"{state.max_steps} steps. In a long run on many data that happens late; this early the data are "
                "memorised (see the evaluation), or the learning rate of the scale is too high",
            )


def patience(args: Any, max_steps: int) -> int:
    """The first step with warnings: a fifth of the training, at least 50, at most 1000 steps after warm-up."""
    return max(EARLIEST, min(max_steps // 5, args.get_warmup_steps(max_steps) + 1000))


def expected_chance(objective: Any, pairs: int, positives: float = 1.0) -> float | None:
    """The loss at chance that the objective states, or its `margin`, or None.

    Args:
        objective: its `chance_loss(pairs)` may ignore duplicates.
        pairs: over all ranks.
        positives: positive texts per image, duplicates included.
    """
    chance = getattr(objective, "chance_loss", None)
    if pairs < 2:
        return None
    if callable(chance):
        stated = chance(pairs, positives) if positives > 1.0 else chance(pairs)
        if stated is not None:
            return stated
    return _setting(objective, "margin")  # of distances that are all the same


def level_name(objective: Any, pairs: int, level: float) -> str:
    """The formula of a loss at chance ("ln(2N-1)", "ln(K+1)"...), or "".

    Args:
        objective: its queue (`queue`, `config.queue_size`), `out_dim`, `temperature` and `margin` are read.
        pairs: N, the rows of the batch over all ranks.
        level: the loss at chance.
    """
    known = {"ln N": math.log(pairs), "ln(2N-1)": math.log(2 * pairs - 1)}
    held: Any = getattr(objective, "queue", None)
    for queue in (len(held) if hasattr(held, "__len__") else None, _setting(objective, "queue_size")):
        if queue:
            known |= {"ln(K+1)": math.log(queue + 1), "2 ln(K+1)": 2 * math.log(queue + 1)}
            if math.isclose(level, known["ln(K+1)"], rel_tol=1e-6):
                return "ln(K+1)"
    width, margin = _setting(objective, "out_dim"), _setting(objective, "margin")
    if width and width > 0:
        known["ln(out_dim)"] = math.log(width)
    if margin:
        known["the margin"] = margin
    if temperature := _setting(objective, "temperature"):
        known["4 T ln N"] = 4 * temperature * math.log(pairs)
    return next((name for name, value in known.items() if math.isclose(level, value, rel_tol=1e-6)), "")


def _setting(objective: Any, name: str) -> float | None:
    """A number in the objective or its config, or None."""
    for owner in (objective, getattr(objective, "config", None)):
        value = getattr(owner, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    return None


def _prototypes(logs: Mapping[str, float], objective: Any) -> Warnings:
    """The two collapses of self-distillation (Caron et al. 2021, section 5.3 and figure 7)."""
    used, sure = logs.get("prototype_entropy", math.nan), logs.get("teacher_entropy", math.nan)
    width = _setting(objective, "out_dim")
    if used < LEAST_ENTROPY:
        yield (
            "prototypes",
            f"collapse: the teacher assigns every image to one prototype (prototype_entropy {used:.2g}); the centering "
            "is too weak for the sharpening: raise the teacher's temperature, or lengthen its warm-up",
        )
    elif width and width > 1 and sure >= CHANCE_SHARE * math.log(width):
        yield (
            "prototypes",
            f"collapse: the teacher assigns every image to all prototypes equally (teacher_entropy {sure:.4g}, "
            f"ln(out_dim) = {math.log(width):.4g}): lower the teacher's temperature",
        )


def _bias(logs: Mapping[str, float], pairs: int) -> Warnings:
    said, are = logs.get("predicted_positives"), logs.get("positives")
    if said is None or not are or not math.isfinite(said):
        return
    if not are / BIAS_RATIO <= said <= are * BIAS_RATIO:
        yield (
            "bias",
            f"logit_bias {logs.get('logit_bias', math.nan):.4g} is wrong: of the {pairs} texts of the batch {said:.3g} "
            f"are predicted as positives of an image, and {are:.3g} are. {'Lower' if said > are else 'Raise'} "
            "--initial_logit_bias: scripts/doctor.py computes one for these towers and this batch",
        )


def _collapse(logs: Mapping[str, float], image_only: bool = False) -> Warnings:
    collapsed = []
    # a rank of 1 does not count as spread (a BatchNorm spreads out a line too)
    behind = max(logs.get(f"{side}_spread", 0.0) * (logs.get(f"{side}_rank", 0.0) > LEAST_RANK) for side in _HEADS)
    for side in sorted({name.removesuffix("_spread").removesuffix("_rank") for name in logs}):
        spread, rank = logs.get(f"{side}_spread", math.nan), logs.get(f"{side}_rank", math.nan)
        if side == "h" and spread < LEAST_SPREAD <= behind and not rank < LEAST_RANK:
            yield (
                "offset",
                f"the vectors h of all images share one direction (h_spread {spread:.2g}), and the head's outputs do "
                f"not (spread {behind:.2g}): their cosines are all near 1, whatever they encode. The rate is high for "
                "this encoder, as that of LARS is for a small ViT: try --optim adamw_torch --learning_rate 1e-3",
            )
        elif spread < LEAST_SPREAD:
            collapsed.append(
                f"all {side} embeddings point in one direction ({side}_spread {spread:.2g}; 1 is evenly spread)"
            )
        elif rank < LEAST_RANK:
            collapsed.append(f"the {side} embeddings vary along a line ({side}_rank {rank:.3g} directions)")
    if collapsed:
        yield (
            "collapse",
            f"collapse: {' and '.join(collapsed)}. Lower the learning rate or lengthen the warm-up; see that "
            + ("" if image_only else "image and caption belong together, and that ")
            + "images still differ once they are transformed",
        )


_HEADS = ("z", "query")  # outputs of a head


def _near(scale: float, limits: tuple[float, float]) -> bool:
    low, high = limits
    return scale >= CLAMP_SHARE * high or scale <= low / CLAMP_SHARE
