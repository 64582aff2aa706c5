"""Every flag of TrainingArguments is in force or refused, in every recipe; docs/flags.md is the table of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import tiny
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from mllm_vision.training.callbacks.progress import guard_reporters
from mllm_vision.training.recipe import flags
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.flag_types import default_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
OURS = {field.name: field for field in dataclasses.fields(RecipeArguments)}


def kind(name: str | None) -> type[RecipeArguments]:
    return type("Arguments", (RecipeArguments,), {"recipe_name": name})


def other(name: str) -> object:
    """A value that is not the default."""
    if name in ("report_to", "hub_token", "train_sampling_strategy"):
        return {"train_sampling_strategy": "batch_rebalance"}.get(name, "secret")
    default = default_of(OURS[name])
    if isinstance(default, bool):
        return not default
    return default + 0.25 if isinstance(default, float) else "something"


@pytest.mark.parametrize("recipe", [*flags.RECIPES, None])
def test_each_flag_without_effect_is_refused(recipe, tmp_path):
    """With the flag's name, a reason and a remedy; its default passes, and where it has an effect it is taken."""
    for refusal in flags.REFUSALS:
        for name in set(refusal.flags) & FIELDS.keys():
            given = {name: other(name)}
            if name.startswith("adam_"):
                given["optim"] = "sgd"
            asked = (recipe in refusal.recipes) or (recipe is None and refusal.recipes == flags.RECIPES)
            if not asked or name == "skip_memory_metrics":  # psutil is here, or is not
                continue
            with pytest.raises(ValueError) as refused:
                kind(recipe)(output_dir=str(tmp_path), use_cpu=True, **given)
            assert str(refused.value).startswith(f"--{name} ") and refusal.why in str(refused.value)
            assert "secret" not in str(refused.value) or name == "hub_model_id"
    for refusal in flags.REFUSALS:  # the same as defaults
        defaults = {name: default_of(OURS[name]) for name in refusal.flags if name in OURS}
        kind(recipe)(output_dir=str(tmp_path), use_cpu=True, **defaults)


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ({"push_to_hub": True, "hub_model_id": "me/it", "hub_private_repo": True}, "pretrain"),
        ({"optim": "galore_adamw", "optim_target_modules": ["attn"]}, "instruct"),
        ({"adam_beta2": 0.95, "optim": "lamb"}, "pretrain"),
        ({"label_smoothing_factor": 0.1}, "instruct"),
        ({"train_sampling_strategy": "group_by_length"}, "align"),
        ({"train_sampling_strategy": "sequential"}, "pretrain_images"),
        ({"neftune_noise_alpha": 5.0}, "language_model"),
    ],
)
def test_where_it_has_an_effect_it_is_taken(given, recipe, tmp_path):
    made = kind(recipe)(output_dir=str(tmp_path), use_cpu=True, **given)
    for name, value in given.items():
        assert str(getattr(getattr(made, name), "value", getattr(made, name))) == str(value)


def test_the_accelerators_settings(tmp_path):
    for name in flags.ACCELERATOR_KEYS:
        given = {name: not getattr(RecipeArguments(output_dir=str(tmp_path)).accelerator_config, name)}
        with pytest.raises(ValueError, match=f"--accelerator_config {name}=.*leave it out"):
            RecipeArguments(output_dir=str(tmp_path), accelerator_config=given)
    with pytest.raises(ValueError, match=r"--report_to wandbb: not installed.*metrics.jsonl"):
        RecipeArguments(output_dir=str(tmp_path), report_to="wandbb")


def test_the_page_holds_the_table():
    """Run this file as a program to regenerate it."""
    assert PAGE.read_text(encoding="utf-8") == with_tables(PAGE.read_text(encoding="utf-8"))
    assert not {name for refusal in flags.REFUSALS for name in refusal.flags} - FIELDS.keys()


def flag_table() -> str:
    """Every flag of `TrainingArguments` that a recipe refuses."""
    recipes = flags.RECIPES
    lines = ["| flag | " + " | ".join(recipes) + " | why, and what to do |", "|---" * (len(recipes) + 2) + "|"]
    for refusal in flags.REFUSALS:
        cells = [(refusal.condition or "refused") if name in refusal.recipes else "yes" for name in recipes]
        names = ", ".join(f"`{name}`" for name in refusal.flags)
        lines.append(f"| {names} | " + " | ".join(cells) + f" | {refusal.why} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    in_force = FIELDS.keys() - {name for refusal in flags.REFUSALS for name in refusal.flags}
    rest = ", ".join(f"`{name}`" for name in sorted(in_force))
    for mark, content in (("table", flag_table()), ("rest", rest)):
        block = f"<!-- flags:{mark} -->\n{content}\n<!-- /flags:{mark} -->"
        text = re.sub(rf"<!-- flags:{mark} -->.*<!-- /flags:{mark} -->", lambda _, block=block: block, text, flags=re.S)
    return text


# ---- in force where this toolkit stands between the flag and the Trainer ---------------------------------------


class Rows(torch.utils.data.Dataset):
    lengths = (5, 80, 20, 40) * 16

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        raise AssertionError("no row is read for its length")


def test_group_by_length_reads_no_row(tmp_path):
    args = kind("instruct")(
        output_dir=str(tmp_path), use_cpu=True, train_sampling_strategy="group_by_length", per_device_train_batch_size=4
    )
    torch.manual_seed(0)
    order = list(flags.length_sampler(Rows(), args))
    assert sorted(order) == list(range(64))
    batches = [[Rows.lengths[row] for row in order[at : at + 4]] for at in range(0, 64, 4)]
    assert sum(len(set(batch)) == 1 for batch in batches) >= 4, "by chance it would be 0.25"


def objective():
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.objectives import load_objective

    torch.manual_seed(0)
    method = load_objective("simclr")
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(hidden_dropout_prob=0.1), tiny.tiny_image_processor("vit"))
    return method(encoder, method.Config(head_hidden=32, head_out=16))


class Views(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"views": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(index))}


def losses_with(folder: Path, **given) -> tuple[list[float], int]:
    """Losses of three steps, and how many layers were computed under checkpointing."""
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    args = kind("pretrain_images")(
        output_dir=str(folder), use_cpu=True, max_steps=3, per_device_train_batch_size=8, logging_steps=1,
        learning_rate=0.01, save_strategy="no", disable_tqdm=True, **given,
    )  # fmt: skip
    trainer = ObjectiveTrainer(model=objective(), args=args, train_dataset=Views())
    trainer.train()
    layers = [m for m in trainer.model.modules() if getattr(m, "gradient_checkpointing", False)]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], len(layers)


def test_activation_checkpointing_in_stage_zero(tmp_path):
    """Dropout included: the same losses, in chunks too."""
    plain, none = losses_with(tmp_path / "a")
    again, layers = losses_with(tmp_path / "b", gradient_checkpointing=True)
    assert plain == again and (none, layers > 0) == (0, True)
    chunked, _ = losses_with(tmp_path / "c", embed_batch_size=4)
    both, layers = losses_with(tmp_path / "d", embed_batch_size=4, activation_checkpointing=True)
    assert chunked == both and layers > 0


def test_batch_norm_refuses_it(tmp_path):
    from mllm_vision.encoder.sources import build_encoder
    from mllm_vision.objectives import load_objective

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    method = load_objective("simclr")
    made = method(build_encoder("resnet", image_size=32, overrides=sizes), method.Config(head_hidden=32))
    with pytest.raises(ValueError, match=r"ResNetModel: its BatchNorm would count every batch twice; leave"):
        made.activation_checkpointing_enable()


class Loud(TrainerCallback):
    __module__ = "transformers.integrations.test"
    heard: list[str]

    def __init__(self) -> None:
        self.heard = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        json.loads(model.config.to_json_string())
        self.heard.append("begin")

    def on_log(self, args, state, control, **kwargs):
        self.heard.append("log")
        raise ConnectionError("the server is away")


def test_a_reporter_that_fails_ends_nothing(tmp_path, caplog):
    loud, made = Loud(), objective()
    handler = CallbackHandler([loud], made, None, None, None)
    guard_reporters(handler)
    args = RecipeArguments(output_dir=str(tmp_path), use_cpu=True)
    from transformers import TrainerControl, TrainerState

    with caplog.at_level(logging.WARNING):
        handler.on_train_begin(args, TrainerState(), TrainerControl())
        handler.on_log(args, TrainerState(), TrainerControl(), {})
        handler.on_log(args, TrainerState(), TrainerControl(), {})
    assert loud.heard == ["begin", "log"]
    assert caplog.text.count("reporting to Loud failed in on_log (the server is away)") == 1


@pytest.mark.parametrize(("level", "seen"), [("passive", True), ("warning", False), ("debug", True)])
def test_log_level(level, seen, tmp_path, monkeypatch):
    from mllm_vision.training.recipe.run import Run

    ours = logging.getLogger("mllm_vision")
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    ours.manager._clear_cache()
    given = {} if level == "passive" else {"log_level": level}
    Run("stage_zero", RecipeArguments(output_dir=str(tmp_path / "run"), use_cpu=True, **given), {}).start()
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.INFO)
    ours.manager._clear_cache()
    assert logging.getLogger("mllm_vision.training.recipe.run").isEnabledFor(logging.INFO) is seen
    ours.setLevel(logging.NOTSET)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
