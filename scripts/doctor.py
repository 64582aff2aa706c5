"""Examine a stage-zero run before it starts: batch, duplicates, loss at chance, memory, settings.

    python scripts/doctor.py --config recipes/configs/flickr8k/pretrain.yaml --dataset_name pairs.parquet \\
        --tokenizer runs/flickr8k/language_model/model --processes 4
    python scripts/doctor.py plan --model ViT-B/16 --batch_size 32768 65536 --ranks 8 32 --device_memory 80

Accepts the flags and the config of recipes/pretrain.py, and a few more. Counts the memory of a step on fake tensors and
runs two real steps that write nothing (--no_measure skips them). Exits with 1 if it found a problem.
`plan` needs no data: it prints memory and communication of a step on many ranks (docs/scaling.md).
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.training import parse_recipe, peek_recipe, run_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pretrain.py"


@dataclass
class DoctorArguments:
    """The extent of the examination."""

    processes: int = field(default=1, metadata={"help": "Processes of the run."})
    sample: int = field(default=5000, metadata={"help": "Rows whose captions and images are compared."})
    measure: bool = field(default=True, metadata={"help": "Run two real steps to measure time and memory."})
    measure_rows: int = field(default=128, metadata={"help": "Maximum rows of the real steps."})

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("sample", 2), ("measure_rows", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["plan"]:
        from mllm_vision.training.preflight.plan import PlanArguments, plan

        print(plan(*parse_recipe(PlanArguments, argv=given[1:], description=__doc__ or "")))
        return 0
    from mllm_vision.objectives import ImageTextObjective, load_objective

    recipe = load_recipe()
    config = peek_recipe("config", argv=given)
    if config is not None and Path(config).is_file():
        first = Path(config).read_text(encoding="utf-8").partition("\n")[0]
        if first.startswith("# recipe:") and RECIPE.name not in first:
            other = first.removeprefix("# recipe:").split()[0]
            raise ValueError(f"{config} is for recipes/{other}; the doctor examines stage zero ({RECIPE.name}) only")
    name = peek_recipe("objective", "clip", argv=given)
    method = load_objective(name)
    if not issubclass(method, ImageTextObjective):
        raise ValueError(f"objective {name!r} does not train on image-text pairs, which the doctor examines")
    with tempfile.TemporaryDirectory() as folder:
        if peek_recipe("output_dir", argv=given) is None:
            given += ["--output_dir", folder]
        parsed = parse_recipe(
            DoctorArguments, recipe.PretrainArguments, recipe.Arguments, method.Config, StreamArguments,
            argv=given, description=__doc__ or "", defaults=method.defaults_beside(peek_recipe("optim", argv=given)),
        )  # fmt: skip

        from mllm_vision.training.preflight.checks import Finding, report

        findings: list[Finding] = []
        try:
            findings.extend(examine(method, *parsed))
        except (ValueError, OSError) as error:  # refused by the run itself
            findings.append(Finding("problem", "refused", str(error)))
        print(report(findings), flush=True)
    return int(any(finding.level == "problem" for finding in findings))


def examine(method: Any, look: DoctorArguments, own: Any, arguments: Any, config: Any, streams: Any) -> Iterator[Any]:
    """All findings of a run with these flags."""
    from transformers import set_seed

    from mllm_vision.data import ImageTransform, PairCollator, PairDataset, bind_columns
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.encoder.sources import is_model_type
    from mllm_vision.training.preflight import checks
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    rows, embedded = arguments.per_device_train_batch_size, arguments.embed_batch_size
    steps = arguments.gradient_accumulation_steps
    method.check_accumulation(steps, rows, embedded)
    if steps > 1 and method.couples_batch:  # as ObjectiveTrainer: one batch, in chunks
        rows, embedded = rows * steps, min(embedded or rows, rows)
    pairs = rows * look.processes
    records, total = load(own, arguments, streams, look.sample)
    columns = bind_columns(records, ("image", "caption"), own.columns)
    set_seed(arguments.seed)  # the initial towers of the run
    dual = own.build_dual(has_bias=method.has_bias)
    objective = method(dual, config).to(arguments.device)
    transform = ImageTransform(dual.vision.processor, train=True, scale=tuple(own.crop_scale))
    dataset = PairDataset(records, columns, transform=transform, seed=arguments.seed)
    collator = PairCollator(transform, dual.tokenizer, dual.max_text_length)

    sample = checks.sample_pairs(dataset, look.sample, rows=total, seed=arguments.seed)
    length = arguments.max_steps if arguments.max_steps > 0 else 0
    if not length and total:
        length = int(arguments.num_train_epochs * (total // pairs))
    yield from checks.check_batch(pairs, sample, length, queue=getattr(config, "queue_size", 0))
    yield from checks.check_duplicates(sample, pairs, positives=getattr(config, "duplicate_positives", True))
    size = None if is_model_type(own.encoder) else VisionEncoder.from_pretrained(own.encoder).image_size
    yield from checks.check_images(dual.vision, sample, crop_scale=own.crop_scale, trained_size=size)
    yield from checks.check_texts(dual, sample, tower_tokenizer=tower_tokenizer(own))
    if own.eval_dataset_name:
        yield from checks.check_leak(sample, evaluation_images(own))
    batch = collator([dataset[index] for index in range(min(rows, look.measure_rows, len(dataset)))])
    batch = {name: value.to(arguments.device) for name, value in batch.items()}
    yield from checks.check_start(objective, batch, pairs, sample)

    def build(given: Any) -> Any:
        return ObjectiveTrainer(model=objective, args=given, train_dataset=dataset, data_collator=collator)

    real_rows = len(batch["input_ids"]) if look.measure else 0
    yield from checks.check_step(build, arguments, batch, rows, embedded, real_rows=real_rows, steps=length)


def load_recipe() -> Any:
    """recipes/pretrain.py as a module."""
    spec = importlib.util.spec_from_file_location("recipe_pretrain", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load(own: Any, arguments: Any, streams: Any, count: int) -> tuple[Any, int | None]:
    """The records to sample from, and the number of rows; of a stream its first rows."""
    if not streams.streaming:
        records = own.load()
        return records, len(records)
    stream = streams.open(own.dataset_name, **own.where, seed=arguments.seed, max_steps=arguments.max_steps)
    head = stream.head(count)
    return [dict(head[row]) for row in range(len(head))], stream.total


def tower_tokenizer(own: Any) -> Any:
    """The tokenizer saved with a pretrained text tower, where the recipe uses another."""
    from mllm_vision.encoder.text.tokenizers import CLIP_TEXT, SIGLIP_TEXT

    if own.text_tower in (None, CLIP_TEXT, SIGLIP_TEXT) or own.tokenizer in (None, own.text_tower):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(own.text_tower)
    except (ValueError, OSError):  # a tower saved without tokenizer
        return None


def evaluation_images(own: Any) -> list[Any]:
    """The undecoded images of the evaluation set."""
    from mllm_vision.data import bind_columns, load_records
    from mllm_vision.data.records.records import UsualSplit

    split = own.eval_split or UsualSplit("validation", "--eval_split")
    records = load_records(own.eval_dataset_name, split=split, max_rows=own.max_eval_samples, image_root=own.image_root)
    column = own.image_column or bind_columns(records, ("image",))["image"]
    return [row[column] for row in records.select_columns([column])]


if __name__ == "__main__":
    run_recipe(lambda: sys.exit(main()))
