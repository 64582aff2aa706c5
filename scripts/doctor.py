"""Examine a stage-zero run before it starts: batch, duplicates, loss at chance, memory, settings.

    python scripts/doctor.py --config recipes/configs/flickr8k/pretrain.yaml --dataset_name pairs.parquet \\
        --tokenizer runs/flickr8k/language_model/model --processes 4

Takes the flags and the config of recipes/pretrain.py, and a few of its own. Trains two steps that leave nothing behind,
to hold the memory estimate against (--no_measure leaves them out). Ends with 1 when it found a problem.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.training import parse_recipe, peek_recipe, run_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pretrain.py"


@dataclass
class DoctorArguments:
    """How closely to look."""

    processes: int = field(default=1, metadata={"help": "How many processes the run will have."})
    sample: int = field(default=5000, metadata={"help": "Rows whose captions and images are compared."})
    measure: bool = field(default=True, metadata={"help": "Run two steps and hold the memory estimate against them."})
    measure_rows: int = field(default=128, metadata={"help": "Rows of the measured steps, at most."})

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("sample", 2), ("measure_rows", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def main(argv: Sequence[str] | None = None) -> int:
    from mllm_vision.objectives import ImageTextObjective, load_objective

    recipe = load_recipe()
    words = list(sys.argv[1:] if argv is None else argv)
    check_config(peek_recipe("config", argv=words))
    name = peek_recipe("objective", "clip", argv=words)
    method = load_objective(name)
    if not issubclass(method, ImageTextObjective):
        raise ValueError(f"objective {name!r} takes no image-text pairs: there is nothing to examine here")
    with tempfile.TemporaryDirectory() as folder:
        if peek_recipe("output_dir", argv=words) is None:
            words += ["--output_dir", folder]
        look, own, arguments, config, streams = parse_recipe(
            DoctorArguments, recipe.PretrainArguments, recipe.Arguments, method.Config, StreamArguments,
            argv=words, description=__doc__ or "", defaults=method.defaults_beside(peek_recipe("optim", argv=words)),
        )  # fmt: skip

        from mllm_vision.training.preflight.doctor import report

        findings = examine(recipe, method, look, own, arguments, config, streams)
        print(report(findings), flush=True)
    return int(any(finding.level == "problem" for finding in findings))


def examine(
    recipe: Any, method: Any, look: DoctorArguments, own: Any, arguments: Any, config: Any, streams: Any
) -> list[Any]:
    """All findings; where the towers, the data or the flags are refused, that is the last one."""
    from transformers import set_seed

    from mllm_vision.data import ImageTransform, PairCollator, PairDataset, bind_columns
    from mllm_vision.training.preflight import doctor, memory
    from mllm_vision.training.preflight import settings as doctor_settings
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    steps, rows = arguments.gradient_accumulation_steps, arguments.per_device_train_batch_size
    embedded = arguments.embed_batch_size
    if steps > 1 and method.couples_batch:  # as ObjectiveTrainer does: the whole batch at once, in chunks
        rows, embedded = rows * steps, min(embedded or rows, rows)
    pairs, findings = rows * look.processes, []
    try:
        method.check_accumulation(steps, arguments.per_device_train_batch_size, arguments.embed_batch_size)
        records, total = load(own, arguments, streams, look.sample)
        named = {"image": own.image_column, "caption": own.caption_column}
        columns = bind_columns(records, ("image", "caption"), {role: name for role, name in named.items() if name})
        set_seed(arguments.seed)  # the towers are those that the run will start with
        dual = own.build_dual(has_bias=method.has_bias)
        objective = method(dual, config)
    except (ValueError, OSError) as error:
        return [doctor.Finding("problem", "refused", str(error))]
    transform = ImageTransform(dual.vision.processor, train=True, scale=tuple(own.crop_scale))
    dataset = PairDataset(records, columns, transform=transform, seed=arguments.seed)
    sample = doctor.sample_pairs(dataset, look.sample, rows=total, seed=arguments.seed)
    length = doctor.training_steps(arguments, total, pairs)
    findings += doctor.check_batch(pairs, sample, length, queue=getattr(config, "queue_size", 0))
    findings += doctor.check_duplicates(sample, pairs, positives=getattr(config, "duplicate_positives", True))
    if total is not None and total < pairs:
        findings.append(doctor.Finding("problem", "batch", f"{total:,} rows are fewer than one batch of {pairs:,}"))
    findings += doctor_settings.check_images(
        dual.vision,
        sample,
        crop_scale=tuple(own.crop_scale),
        trained_size=trained_size(own.encoder),
        built=not trained(own.encoder),
    )
    findings += doctor_settings.check_texts(dual, sample, tower_tokenizer=tower_tokenizer(own))
    if own.eval_dataset_name:
        findings += leak(own, sample, doctor)

    measured_rows = min(rows, look.measure_rows, len(dataset))
    collator, device = PairCollator(transform, dual.tokenizer, dual.max_text_length), arguments.device
    usable = [dataset[index] for index in range(measured_rows)]
    batch = {name: value.to(device) for name, value in collator(usable).items()}
    objective.to(device)
    findings += doctor.check_chance(objective, sample, pairs)
    findings += doctor.check_start(objective, batch, pairs, sample)

    def build(given: Any) -> Any:
        return ObjectiveTrainer(model=objective, args=given, train_dataset=dataset, data_collator=collator)

    with tempfile.TemporaryDirectory() as folder:
        optimizer = build(memory.trial_arguments(arguments, folder, 2)).create_optimizer()
    cost = memory.estimate_step(
        objective,
        batch,
        optimizer,
        image_bytes=memory.decoded_bytes(usable) if not arguments.dataloader_num_workers else 0.0,
        autocast=memory.autocast(device, bf16=arguments.bf16, fp16=arguments.fp16),
        averaged=getattr(arguments, "ema_decay", None) is not None,
    )
    del usable, batch, optimizer
    limit = memory.available_memory(device)
    measured = None
    if look.measure and (limit is None or cost.at(measured_rows, embedded).total < 0.5 * limit):
        measured = memory.measure_step(build, arguments, measured_rows, embedded)
    return findings + doctor_settings.check_step(cost, measured, rows, embedded, limit, length)


def load_recipe() -> Any:
    """recipes/pretrain.py as a module: its flags and the way it builds the pair are examined, not copied."""
    spec = importlib.util.spec_from_file_location("recipe_pretrain", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_config(path: str | None) -> None:
    """A config of another recipe is refused by name."""
    if path is None or not Path(path).is_file():
        return
    first = Path(path).read_text(encoding="utf-8").partition("\n")[0]
    match = re.match(r"#\s*recipe:\s*(\w+\.py)\b", first)
    if match and match.group(1) != RECIPE.name:
        raise ValueError(
            f"{path} is for recipes/{match.group(1)}; the doctor examines stage zero ({RECIPE.name}) alone"
        )


def load(own: Any, arguments: Any, streams: Any, count: int) -> tuple[Any, int | None]:
    """The records to sample from, and how many rows the data has; of a stream the first rows of its first shard."""
    from mllm_vision.data import load_records

    where = {"split": own.dataset_split, "config_name": own.dataset_config_name, "max_rows": own.max_train_samples}
    where["image_root"] = own.image_root
    if not streams.streaming:
        records = load_records(own.dataset_name, **where)
        return records, len(records)
    stream = streams.open(own.dataset_name, **where, seed=arguments.seed, max_steps=arguments.max_steps)
    head = stream.head(count)
    return [dict(head[row]) for row in range(len(head))], stream.total


def trained(encoder: str) -> bool:
    """Whether the image tower comes with weights, and is not a model type to be built."""
    from mllm_vision.encoder.sources import is_model_type

    return not is_model_type(encoder)


def trained_size(encoder: str) -> int | None:
    """The side of the images that a tower with weights was trained on."""
    from mllm_vision.encoder import VisionEncoder

    return VisionEncoder.from_pretrained(encoder).image_size if trained(encoder) else None


def tower_tokenizer(own: Any) -> Any:
    """The tokenizer saved with a pretrained text tower, where the recipe was told to use another."""
    from mllm_vision.encoder.text.towers import CLIP_TEXT, SIGLIP_TEXT

    if own.text_tower in (None, CLIP_TEXT, SIGLIP_TEXT) or own.tokenizer in (None, own.text_tower):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(own.text_tower)
    except (ValueError, OSError):  # a tower that was saved alone
        return None


def leak(own: Any, sample: Any, doctor: Any) -> list:
    """Whether images of the evaluation are among those of the training."""
    from mllm_vision.data import bind_columns, load_records
    from mllm_vision.data.records.records import UsualSplit

    try:
        split = own.eval_split or UsualSplit("validation", "--eval_split")
        records = load_records(
            own.eval_dataset_name, split=split, max_rows=own.max_eval_samples, image_root=own.image_root
        )
        column = own.image_column or bind_columns(records, ("image",))["image"]
    except (ValueError, OSError) as error:
        return [doctor.Finding("problem", "evaluation", str(error))]
    return doctor.check_leak(sample, [row[column] for row in records.select_columns([column])])


if __name__ == "__main__":
    run_recipe(lambda: sys.exit(main()))
