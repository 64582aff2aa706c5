"""What the ranks do in test_saving.py."""

from __future__ import annotations

from types import SimpleNamespace

from mllm_vision import distributed
from mllm_vision.training.callbacks.progress import SaveByMinutes


def saved_steps(clocks):
    """Steps after which this rank saves, when the ranks' clocks run as `clocks` says (seconds at every step)."""
    now, saved = [0.0], []
    callback = SaveByMinutes(1.0, clock=lambda: now[0])
    callback.on_train_begin(None, None, None)
    for step, now[0] in enumerate(clocks[distributed.rank()], start=1):
        control = SimpleNamespace(should_save=False)
        callback.on_step_end(None, None, control)
        if control.should_save:
            saved.append(step)
            callback.on_save(None, None, control)
    return saved
