"""Warnings during a training of stage zero: what is going wrong, said once, while there is still time to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

CHANCE_SHARE = 0.98  # a loss above this share of the loss at chance has learnt nothing
CLAMP_SHARE = 0.995  # a mean scale this near to a limit was at it for most of the steps
BIAS_RATIO = 4.0  # pairs called positive against pairs that are, beyond which the bias is wrong
LEAST_SPREAD = 0.1  # of unit vectors; their mean cosine is then 0.99
LEAST_RANK = 1.1  # directions that carry the variance; 1 is a line
LEAST_ENTROPY = 0.1  # of the prototypes that a batch is given to; 0 is one prototype
HOLD = 10  # steps that a state has to last before it is worth a warning
_SEEN = ("z", "query")  # metrics of what is behind the head
EARLIEST = 50  # steps that a training is given in any case: the sigmoid loss passes its chance slowly


class Health(TrainerCallback):
    """Watches the logged loss and metrics of an `Objective` and warns, once each, of

    - `chance`: the loss stays at that of a model that knows nothing, named where it is a known one: ln N (softmax
      over the batch), ln(2N-1) (NT-Xent), ln(K+1) (a queue of K), ln(out_dim) (DINO's prototypes), the margin (pairs
      and triplets, whose distances are then all the same);
    - `scale`: the logit scale came to its clamp in the first half of the training, or fell to the lower one;
    - `bias`: the sigmoid loss calls several times too many or too few pairs positive;
    - `prototypes`: a teacher that gives every image to one prototype, or none to any (DINO and its kin);
    - `collapse`: all embeddings point one way (`*_spread` below 0.1), or vary along one line (`*_rank` below 1.1);
    - `offset`: the encoder's vectors h point one way and what the loss sees, behind the head, does not: they share a
      large offset, which a head takes off and a cosine between vectors does not.

    A state counts when it lasts for 10 steps, and, but for the scale, only after a fifth of the training (at least
    50 steps, at most 1000 after warm-up): every training starts at chance. When it passes again, that is said too.

    Args:
        objective: what is trained; its `chance_loss`, `scale_limits` and `logit_scale` are asked.
        pairs: how many pairs meet in one loss, over all ranks.
        run: a `Run`; its record then gets `health`, a list of `{"step", "name", "message"}`.

    It reads the metrics `logit_scale`, `positives` and `predicted_positives` (positive pairs an image, and how many
    the sigmoid says there are), `prototype_entropy` and `teacher_entropy`, and every metric whose name ends in
    `_spread` or `_rank`; what is not logged is not judged.
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
        # a pair that was trained before comes with its scale at the limit: that is no event of this training
        self._at_limit = scale is not None and limits is not None and _near(scale.detach().exp().item(), limits)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs or state.global_step == self._last:
            return
        present: dict[str, str] = {}
        for name, message in self._judge(args, state, logs):
            present[name] = message
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
                    logger.info("step %d: no longer so: %s", state.global_step, self.found[name].partition(":")[0])
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

    # ---- the judgements ------------------------------------------------------------------------------------

    def _judge(self, args: Any, state: Any, logs: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """(name, message) of all that is wrong in these logs."""
        yield from self._scale(state, logs)
        pairs = self.pairs()
        alone = not hasattr(self.objective, "dual") and hasattr(self.objective, "views")  # images without texts
        causes = [*_bias(logs, pairs), *_collapse(logs, alone), *_prototypes(logs, self.objective)]
        yield from causes
        causes = [cause for cause in causes if cause[0] != "offset"]
        chance = expected_chance(self.objective, pairs, logs.get("positives", 1.0))
        if not chance or not CHANCE_SHARE * chance <= logs["loss"] < math.inf:
            return
        where = "sits at" if logs["loss"] < 1.05 * chance else "is above"
        why = (
            "see the warning of the bias"
            if any(name == "bias" for name, _ in causes)
            else "look at "
            + ("the views (too strong?)" if alone else "the pairs (do image and caption belong together?)")
            + f", the learning rate ({args.learning_rate:g}) and the {'temperature' if alone else 'logit scale'}"
            + "; the embeddings have collapsed too" * bool(causes)
        )
        level = level_name(self.objective, pairs, chance)
        level = f"{level} = {chance:.4f}" if level else f"{chance:.4f}"
        told = f"the loss {logs['loss']:.4f} {where} chance ({level} for {pairs} {'images' if alone else 'pairs'})"
        yield "chance", f"{told}: nothing is learnt; {why}"

    def _limits(self) -> tuple[float, float] | None:
        limits = getattr(self.objective, "scale_limits", None)
        scale = getattr(self.objective, "logit_scale", None)
        return limits if scale is not None and scale.requires_grad else None

    def _scale(self, state: Any, logs: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        limits, scale = self._limits(), logs.get("logit_scale")
        if limits is None or scale is None:
            return
        if not _near(scale, limits):
            self._at_limit &= scale > 0.9 * limits[1] or scale < 1.1 * limits[0]
        elif not self._at_limit and scale < sum(limits) / 2:
            yield (
                "scale",
                f"logit_scale {scale:.4g} is at its lower clamp {limits[0]:g}: the loss gains by making all pairs "
                "alike, as with captions that do not belong to their images or a learning rate that is too high",
            )
        elif not self._at_limit and state.global_step <= state.max_steps / 2:
            yield (
                "scale",
                f"logit_scale {scale:.4g} is at its clamp {limits[1]:g} after {state.global_step} of "
                f"{state.max_steps} steps: the loss would sharpen further and cannot. In a long run on much data that "
                "comes late; this early the data are learnt by heart (look at the evaluation), or the learning rate "
                "of the scale is too high",
            )


def patience(args: Any, max_steps: int) -> int:
    """The step before which no training is judged: a fifth of it, at least 50, at most 1000 steps after warm-up."""
    return max(EARLIEST, min(max_steps // 5, args.get_warmup_steps(max_steps) + 1000))


def expected_chance(objective: Any, pairs: int, positives: float = 1.0) -> float | None:
    """The loss at chance that the objective states, `positives` positive texts an image included; None without one.

    An objective that states none (as `Objective` itself does not) and has a `margin` sits at that: its distances are
    then all the same.
    """
    chance = getattr(objective, "chance_loss", None)
    if pairs < 2:
        return None
    if callable(chance):
        # a method of the user's own need not know of duplicates
        stated = chance(pairs, positives) if positives > 1.0 else chance(pairs)
        if stated is not None:
            return stated
    return _setting(objective, "margin")


def level_name(objective: Any, pairs: int, level: float) -> str:
    """What a loss at chance is known as ("ln(2N-1)", "ln(K+1)"...), or nothing.

    Args:
        objective: asked for its queue (`queue`, `config.queue_size`), `out_dim`, `temperature` and `margin`.
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
    """A number that the objective or its config has under this name."""
    for owner in (objective, getattr(objective, "config", None)):
        value = getattr(owner, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    return None


def _prototypes(logs: Mapping[str, float], objective: Any) -> Iterator[tuple[str, str]]:
    """The two ways in which self-distillation collapses (Caron et al. 2021, section 5.3 and figure 7)."""
    used, sure = logs.get("prototype_entropy", math.nan), logs.get("teacher_entropy", math.nan)
    width = _setting(objective, "out_dim")
    if used < LEAST_ENTROPY:
        yield (
            "prototypes",
            f"collapse: the teacher gives every image to one prototype (prototype_entropy {used:.2g}); the centring is "
            "too weak for the sharpening: raise the teacher's temperature, or lengthen its warm-up",
        )
    elif width and width > 1 and sure >= CHANCE_SHARE * math.log(width):
        yield (
            "prototypes",
            f"collapse: the teacher gives every image to all prototypes alike (teacher_entropy {sure:.4g}, ln(out_dim) "
            f"= {math.log(width):.4g}): lower the teacher's temperature",
        )


def _bias(logs: Mapping[str, float], pairs: int) -> Iterator[tuple[str, str]]:
    said, are = logs.get("predicted_positives"), logs.get("positives")
    if said is None or not are or not math.isfinite(said):
        return
    if not are / BIAS_RATIO <= said <= are * BIAS_RATIO:
        yield (
            "bias",
            f"logit_bias {logs.get('logit_bias', math.nan):.4g} is wrong: of the {pairs} texts of the batch {said:.3g} "
            f"are called positives of an image and {are:.3g} are. {'Lower' if said > are else 'Raise'} "
            "--initial_logit_bias: scripts/doctor.py tells the one that fits these towers and this batch",
        )


def _collapse(logs: Mapping[str, float], alone: bool = False) -> Iterator[tuple[str, str]]:
    told = []
    # what the loss sees, where it keeps its directions apart (a BatchNorm spreads out a line too)
    behind = max(logs.get(f"{side}_spread", 0.0) * (logs.get(f"{side}_rank", 0.0) > LEAST_RANK) for side in _SEEN)
    for side in sorted({name.removesuffix("_spread").removesuffix("_rank") for name in logs}):
        spread, rank = logs.get(f"{side}_spread", math.nan), logs.get(f"{side}_rank", math.nan)
        if side == "h" and spread < LEAST_SPREAD <= behind and not rank < LEAST_RANK:
            yield (
                "offset",
                f"the vectors h of all images share one direction (h_spread {spread:.2g}), and what the loss sees "
                f"does not (spread {behind:.2g}): what they know is left, but their cosines are all near 1. The rate "
                "is high for this encoder, as that of LARS is for a small ViT: try --optim adamw_torch "
                "--learning_rate 1e-3",
            )
        elif spread < LEAST_SPREAD:
            told.append(f"all {side} embeddings point one way ({side}_spread {spread:.2g}; 1 is evenly spread)")
        elif rank < LEAST_RANK:
            told.append(f"the {side} embeddings vary along a line ({side}_rank {rank:.3g} directions)")
    if told:
        yield (
            "collapse",
            f"collapse: {' and '.join(told)}. Lower the learning rate or lengthen the warm-up; see that "
            + ("" if alone else "image and caption belong together, and that ")
            + "images still differ once they are transformed",
        )


def _near(scale: float, limits: tuple[float, float]) -> bool:
    low, high = limits
    return scale >= CLAMP_SHARE * high or scale <= low / CLAMP_SHARE
