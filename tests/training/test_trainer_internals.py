"""What our trainers override or call of the Trainer's private methods, as it was read in transformers 5.23.

A failure here says that another release changed what our overrides were written against: read the method again, adapt
the override (its docstring names the release), then update the table and the bounds in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import inspect

import pytest
import transformers
from transformers import Trainer

from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

READ_IN = "5.23"
EPOCH = (
    "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
    "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
)
OVERRIDDEN = {  # name -> (parameters, beginning of the sha256 of its source)
    "_clip_grad_norm": ("model", "ebfa9dc91d30"),
    "_get_dataloader": ("dataset description batch_size sampler_fn is_training dataloader_key", "d1296dbd4dcb"),
    "_get_output_dir": ("trial", "97172085342a"),
    "_init_training_state": (
        "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        "8fbd17ebb7d3",
    ),
    "_issue_warnings_after_load": ("load_result", "7ccdd73aac16"),
    "_load_best_model": ("", "0e183d55a9db"),
    "_run_epoch": (EPOCH, "31aff00f34c3"),
    "_save_checkpoint": ("model trial", "a9111e30faa9"),
}
CALLED = {  # called, or what the order of callbacks and of `create_scheduler` is relied on in
    "_determine_best_metric": ("metrics trial", "7aa77355a0c3"),
    "_evaluate": ("trial ignore_keys_for_eval skip_scheduler", "64dfb995ce20"),
    "_load_rng_state": ("checkpoint", "d5ebdfc0a088"),
    "_prepare_inputs": ("inputs", "8f8c4e430d2f"),
    "_inner_training_loop": (None, "20ec4276e99f"),
    "_prepare_for_training": (None, "f55950593d7e"),
    "_maybe_log_save_evaluate": (None, "af101534f0f7"),
}


def test_the_table_holds_every_private_method_that_is_overridden() -> None:
    ours = {name for cls in ObjectiveTrainer.__mro__ if cls.__module__.startswith("mllm_vision") for name in vars(cls)}
    private = {name for name in ours if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}
    assert private == set(OVERRIDDEN)


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_the_trainer_is_what_it_was_when_it_was_read(name: str) -> None:
    parameters, digest = {**OVERRIDDEN, **CALLED}[name]
    method = getattr(Trainer, name, None)
    where = f"transformers {transformers.__version__}: Trainer.{name}, which was read in {READ_IN},"
    assert method is not None, f"{where} is gone; see the head of this file"
    found = " ".join(inspect.signature(method).parameters).removeprefix("self").strip()
    assert parameters in (None, found), f"{where} takes other parameters ({found}); see the head of this file"
    if transformers.__version__.startswith(f"{READ_IN}."):
        source = hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:12]
        assert source == digest, f"{where} has another source ({source}); see the head of this file"
