"""Measure an encoder, an image-text pair or a vision-language model; write one JSON file for the report.

    python scripts/evaluate.py --model runs/q/dual --untrained --output stage_zero.json \\
        --task zero_shot=single_test.parquet unseen/zero_shot=single_unseen.parquet retrieval=test.parquet geometry maps
    python scripts/evaluate.py --model runs/q/instruct --output stage_two.json --task vqa=test.parquet maps=test.parquet

    python scripts/evaluate.py --model runs/simclr/encoder --untrained --raw_pixels --images runs/simclr/images \\
        --task knn=cifar10_test.parquet probe=cifar10_test.parquet board=cifar10_test.parquet \\
        attention=cifar10_test.parquet --training_dataset_name cifar10_train.parquet

A task is [variant/]task[=dataset], by the names of evaluation/registry.py. Without a dataset of its own it takes
--dataset_name. The variant (such as unseen) goes into the result's name. What the model is,
its config.json tells.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mllm_vision.errors import unknown_name
from mllm_vision.evaluation.registry import list_evaluators, load_evaluator
from mllm_vision.training.recipe.parser import parse_recipe, peek_recipe, run_recipe
from mllm_vision.utils import write_whole

DEFAULTS = {"encoder": ["geometry"], "dual": ["retrieval", "geometry", "maps"], "vlm": ["vqa"]}


@dataclass
class EvaluateArguments:
    """What to measure, on what."""

    model: str = field(metadata={"help": "Folder or Hub id of an encoder, an image-text pair or a VLM."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for scripts/report.py; default: only a table."}
    )
    task: list[str] = field(
        default_factory=list,
        metadata={"help": f"[variant/]task[=dataset], several: {' '.join(list_evaluators())}. Default: by model."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data of the tasks that name none."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of folders and Hub data; default: test, or the only one of a folder."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "At most so many rows, drawn at random."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that relative image paths start from."})
    image_column: str | None = field(default=None, metadata={"help": "Where its name does not tell."})
    caption_column: str | None = field(default=None, metadata={"help": "Likewise."})
    label_column: str | None = field(default=None, metadata={"help": "Likewise."})
    question_column: str | None = field(default=None, metadata={"help": "Likewise."})
    answer_column: str | None = field(default=None, metadata={"help": "Likewise; a list is several annotators."})
    type_column: str = field(default="question_types", metadata={"help": "Question types, where there are any."})
    templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={"help": "Zero-shot prompts, {} is the class; ensembled."},
    )
    class_names: list[str] = field(default_factory=list, metadata={"help": "Zero-shot; default: the label column's."})
    ks: list[int] = field(default_factory=lambda: [1, 5, 10], metadata={"help": "The K's of retrieval's R@K."})
    captions_each: int | None = field(default=None, metadata={"help": "Retrieval: captions an image; default all."})
    distinct: bool = field(default=False, metadata={"help": "Retrieval: only images with captions of their own."})
    max_images: int | None = field(default=None, metadata={"help": "Retrieval: at most so many images."})
    feature: str = field(
        default="pooled", metadata={"help": "knn, probe, board, geometry: pooled, tokens or embedding (geometry)."}
    )
    knn_k: list[int] = field(default_factory=lambda: [20], metadata={"help": "Neighbours: 20 (DINO), 200 (MoCo)."})
    knn_temperature: float = field(default=0.07, metadata={"help": "Of their votes: 0.07 (DINO), 0.1 (MoCo)."})
    probe_regularisation: list[float] = field(
        default_factory=list, metadata={"help": "Penalties the probe tries; default: 1e-6 to 1, by tens."}
    )
    max_training_samples: int | None = field(
        default=None, metadata={"help": "knn, probe: training images, at most, drawn at random."}
    )
    raw_pixels: bool = field(default=False, metadata={"help": "knn, probe: the pixels themselves as baseline."})
    images: str | None = field(default=None, metadata={"help": "board, attention: folder for their PNG files."})
    map_count: int = field(default=6, metadata={"help": "Maps, attention: images."})
    map_texts: list[str] = field(default_factory=list, metadata={"help": "Maps: texts; default: what each row says."})
    untrained: bool = field(default=False, metadata={"help": "The same model with fresh random weights as baseline."})
    blind: bool = field(default=False, metadata={"help": "vqa, yes_no, captioning: zeros in place of every image."})
    no_image_baseline: bool = field(default=False, metadata={"help": "Likewise: also the same model without images."})
    training_dataset_name: str | None = field(
        default=None,
        metadata={"help": "knn, probe: what they learn from. vqa: the majority answers' source; default: the test's."},
    )
    training_split: str = field(default="train", metadata={"help": "Its split."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "The length limit of an answer (default: 16) or a caption (default: 40)."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images or questions at once, on each process."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; default: the accelerator where there is one."}
    )
    seed: int = field(default=0, metadata={"help": "Of the untrained weights."})


@dataclass
class Job:
    """One task on one dataset."""

    name: str
    task: str
    dataset: str


def read_tasks(words: list[str], default: str | None) -> list[Job]:
    """`[variant/]task[=dataset]` words as jobs.

    Raises:
        ValueError: an unknown task, a task without data, the same name twice.
    """
    jobs: list[Job] = []
    for word in words:
        name, _, dataset = word.partition("=")
        task = task_of(word)
        if task not in list_evaluators():
            raise ValueError(unknown_name("task", task, list_evaluators()) + "; a task is [variant/]task[=dataset]")
        if not dataset and not default:
            raise ValueError(f"--task {word} has no data; write {name}=file.parquet or pass --dataset_name")
        if name in (job.name for job in jobs):
            raise ValueError(f"--task {name} is given twice; add a variant, such as unseen/{task}")
        jobs.append(Job(name, task, dataset or str(default)))
    return jobs


def task_of(word: str) -> str:
    """The evaluator in `[variant/]task[=dataset]`."""
    return word.partition("=")[0].rpartition("/")[2]


def parse(argv: list[str] | None) -> SimpleNamespace:
    """All flags by name, those included that the evaluators asked for bring along (`Evaluator.Flags`)."""
    words, saved = sys.argv[1:] if argv is None else list(argv), peek_recipe("task", [], argv=argv)
    words += saved if isinstance(saved, list) else []
    tasks = dict.fromkeys(task for word in words if (task := task_of(str(word))) in list_evaluators())
    more = dict.fromkeys(flags for task in tasks if (flags := load_evaluator(task).Flags) is not None)
    parsed = parse_recipe(EvaluateArguments, *more, argv=argv, description=__doc__)
    return SimpleNamespace(**{name: value for each in parsed for name, value in vars(each).items()})


def main(argv: list[str] | None = None) -> None:
    own = parse(argv)
    began = time.monotonic()
    jobs = read_tasks(own.task, own.dataset_name)

    from mllm_vision.distributed import own_device
    from mllm_vision.evaluation.base import examine
    from mllm_vision.evaluation.models import load_model, model_kind, reinitialise
    from mllm_vision.evaluation.sources import Sources

    kind = model_kind(own.model)
    jobs = jobs or read_tasks(DEFAULTS[kind], own.dataset_name)
    for job in jobs:
        if kind not in (models := load_evaluator(job.task).models):
            raise ValueError(f"--task {job.task} needs a {models[0]} model; {own.model} is a {kind}")
    device = own_device(own.device)
    main_process = join_processes(device)
    loaded = load_model(own.model, device)
    sources = Sources(own, kind, loaded.processor)
    evaluators = [
        (job, load_evaluator(job.task).from_flags(job.name, sources.test(job.dataset), own, sources)) for job in jobs
    ]

    record: dict[str, Any] = {"schema": 1, "kind": "evaluation", "model": own.model, "model_kind": kind}
    record |= {"task": [job.name for job in jobs], "evaluations": {}, "samples": [], "arrays": {}}
    record["datasets"] = {job.name: {"path": job.dataset, "rows": len(e.records)} for job, e in evaluators}
    tower = encoder_of(own.model, loaded, device)
    results = {job.name: examine(each, tower if each.of_encoder else loaded.model) for job, each in evaluators}
    compared = [(job, each) for job, each in evaluators if own.untrained and each.has_figures]
    if compared:
        fresh = reinitialise(load_model(own.model, device).model, own.seed)
        tower = fresh if kind != "vlm" else reinitialise(tower, own.seed)
    for job, each in compared:
        results[job.name].add_baseline("untrained", examine(each, tower if each.of_encoder else fresh))
    for job, each in evaluators:
        results[job.name].store(record, job.name)
        record["evaluations"][job.name]["task"] = job.task
        if own.images and main_process and (drawn := each.draw(results[job.name], own.images)):
            record["images"] = [*record.get("images", []), *map(str, drawn)]
    record["seconds"] = round(time.monotonic() - began, 1)
    if main_process:
        record |= provenance(own.model)
        print(end_table(record), flush=True)
        if own.output:
            written = write_whole(own.output, json.dumps(record))
            print(f"written: {written}", file=sys.stderr)


def encoder_of(path: str, loaded: Any, device: Any) -> Any:
    """The model itself, or the vision tower of a VLM, read apart from it."""
    if loaded.kind != "vlm":
        return loaded.model
    from mllm_vision.encoder import VisionEncoder

    return VisionEncoder.from_pretrained(path).to(device).eval()


def join_processes(device: Any) -> bool:
    """Under torchrun, join the others; True on the process that writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, device_id=None if device.type == "cpu" else device)
    atexit.register(dist.destroy_process_group)
    return dist.get_rank() == 0


def provenance(model: str) -> dict[str, Any]:
    """Which weights were measured, by which versions and command."""
    from mllm_vision.hub.lineage import hash_weights
    from mllm_vision.training.recipe.summary import command_line, versions

    known: dict[str, Any] = {"command": command_line(), "versions": versions()}
    if Path(model).is_dir() and any(Path(model).glob("*.safetensors")):
        known["weights_sha256"] = hash_weights(model)
    return known


def end_table(record: dict[str, Any]) -> str:
    """Metrics beside their baselines, as printed."""
    from mllm_vision.training.recipe.summary import left_out, metric_table

    head = f"== {record['model_kind']}: {record['model']} =="
    lines = [*metric_table(record["evaluations"]), *left_out(record), f"time: {record['seconds']} s"]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    run_recipe(main)
