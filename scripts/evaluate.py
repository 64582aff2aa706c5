"""Measure an encoder, an image-text pair or a vision-language model; write one JSON file for the report.

    python scripts/evaluate.py --model runs/q/dual --untrained --output stage_zero.json \\
        --task zero_shot=single_test.parquet unseen/zero_shot=single_unseen.parquet retrieval=test.parquet geometry maps
    python scripts/evaluate.py --model runs/q/instruct --output stage_two.json --task vqa=test.parquet maps=test.parquet

    python scripts/evaluate.py --model runs/simclr/encoder --untrained --raw_pixels --images runs/simclr/images \\
        --task knn=cifar10_test.parquet probe=cifar10_test.parquet board=cifar10_test.parquet \\
        attention=cifar10_test.parquet --training_dataset_name cifar10_train.parquet

A task is [variant/]task[=dataset]: zero_shot, retrieval, geometry, maps, vqa, knn, probe, board, attention. The default
dataset is --dataset_name. The variant (such as unseen) becomes part of the result's name.
The kind of model is that of its config.json.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_vision.training.recipe.parser import parse_recipe, run_recipe
from mllm_vision.utils import write_whole

TASKS = ("zero_shot", "retrieval", "geometry", "maps", "vqa", "knn", "probe", "board", "attention")
DEFAULTS = {"encoder": ["geometry"], "dual": ["retrieval", "geometry", "maps"], "vlm": ["vqa"]}
NEEDED_KIND = {"zero_shot": "dual", "retrieval": "dual", "vqa": "vlm"}
OF_THE_ENCODER = ("geometry", "knn", "probe", "board", "attention")  # of a VLM, its vision tower
NOT_COMPARED = ("maps", "attention")  # no metrics to compare with an untrained model's


@dataclass
class EvaluateArguments:
    """Model, tasks and data."""

    model: str = field(metadata={"help": "Folder or Hub id of an encoder, an image-text pair or a VLM."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file for scripts/report.py; default: print a table only."}
    )
    task: list[str] = field(
        default_factory=list,
        metadata={
            "help": "[variant/]task[=dataset], several: zero_shot retrieval geometry maps vqa knn probe board "
            "attention. Default: by model."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data of the tasks that name none."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of folders and Hub data; default: test, or the only one of a folder."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Maximum rows, drawn at random."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that relative image paths start from."})
    image_column: str | None = field(default=None, metadata={"help": "Where it cannot be inferred from its name."})
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
    distinct: bool = field(default=False, metadata={"help": "Retrieval: only images with unique captions."})
    max_images: int | None = field(default=None, metadata={"help": "Retrieval: maximum images."})
    feature: str = field(
        default="pooled", metadata={"help": "knn, probe, board, geometry: pooled, tokens or embedding (geometry)."}
    )
    knn_k: list[int] = field(default_factory=lambda: [20], metadata={"help": "Neighbours: 20 (DINO), 200 (MoCo)."})
    knn_temperature: float = field(default=0.07, metadata={"help": "Of their votes: 0.07 (DINO), 0.1 (MoCo)."})
    probe_regularisation: list[float] = field(
        default_factory=list, metadata={"help": "Penalties the probe tries; default: 1e-6 to 1, by tens."}
    )
    max_training_samples: int | None = field(
        default=None, metadata={"help": "knn, probe: maximum training images, drawn at random."}
    )
    raw_pixels: bool = field(default=False, metadata={"help": "knn, probe: the pixels themselves as baseline."})
    images: str | None = field(default=None, metadata={"help": "board, attention: folder for their PNG files."})
    map_count: int = field(default=6, metadata={"help": "Maps, attention: images."})
    map_texts: list[str] = field(default_factory=list, metadata={"help": "Maps: texts; default: those of each row."})
    untrained: bool = field(default=False, metadata={"help": "The same model with fresh random weights as baseline."})
    blind: bool = field(default=False, metadata={"help": "vqa: zeros in place of every image."})
    no_image_baseline: bool = field(default=False, metadata={"help": "vqa: also the same model without images."})
    training_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "knn, probe: labelled training images. vqa: source of the majority answers; default: the test data."
        },
    )
    training_split: str = field(default="train", metadata={"help": "Its split."})
    max_new_tokens: int = field(default=16, metadata={"help": "Longest answer."})
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


def read_tasks(given: list[str], default: str | None) -> list[Job]:
    """`[variant/]task[=dataset]` strings as jobs.

    Raises:
        ValueError: an unknown task, a task without data, the same name twice.
    """
    from mllm_vision.errors import unknown_name

    jobs: list[Job] = []
    for text in given:
        name, _, dataset = text.partition("=")
        task = name.rpartition("/")[2]
        if task not in TASKS:
            raise ValueError(unknown_name("task", task, TASKS) + "; a task is [variant/]task[=dataset]")
        if not dataset and not default:
            raise ValueError(f"--task {text} has no data; write {name}=file.parquet or pass --dataset_name")
        if name in (job.name for job in jobs):
            raise ValueError(f"--task {name} is given twice; add a variant, such as unseen/{task}")
        jobs.append(Job(name, task, dataset or str(default)))
    return jobs


def map_texts(row: dict[str, Any], given: list[str], names: list[str] | None, caption: str | None) -> list[str]:
    """Texts for one image: those given, or the objects of a generated scene, its class, its captions."""
    from mllm_vision.data.pairs import captions_of

    if given:
        return given
    if isinstance(row.get("scene"), str):
        objects = json.loads(row["scene"])
        return list(dict.fromkeys(f"a {item['colour']} {item['shape']}" for item in objects))
    label = row.get("label")
    if names and isinstance(label, int) and 0 <= label < len(names):
        return [f"a {names[label]}"]
    return captions_of(row[caption]) if caption else []


class Bench:
    """Loads each data set once and builds the evaluators."""

    def __init__(self, own: EvaluateArguments, kind: str, processor: Any) -> None:
        from mllm_vision.data.records.records import UsualSplit

        self.own, self.kind, self.processor = own, kind, processor
        self.loaded: dict[tuple[str, Any, int | None], Any] = {}
        self.split = own.dataset_split or UsualSplit("test", "--dataset_split")
        self.labelled: dict[str, Any] = {}
        self.named = {
            role: getattr(own, f"{role}_column") for role in ("image", "caption", "label", "question", "answer")
        }

    def _records(self, path: str, split: Any, max_rows: int | None) -> Any:
        from mllm_vision.data import load_records

        key = (path, split, max_rows)
        if key not in self.loaded:
            self.loaded[key] = load_records(path, split=split, max_rows=max_rows, image_root=self.own.image_root)
        return self.loaded[key]

    def _columns(self, records: Any, *roles: str) -> dict[str, str]:
        from mllm_vision.data import bind_columns

        return bind_columns(records, roles, {role: name for role, name in self.named.items() if name})

    def evaluator(self, job: Job) -> Any:
        """The evaluator of a job; raises for bad data before anything is measured."""
        own, records = self.own, self._records(job.dataset, self.split, None)
        return getattr(self, job.task)(job, own, records)

    def zero_shot(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import ZeroShot

        columns = self._columns(records, "image", "label")
        names = own.class_names or None
        return ZeroShot(job.name, records, names, own.templates, columns, own.batch_size, limit=own.max_samples)

    def retrieval(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import Retrieval

        limits = [each for each in (own.max_images, own.max_samples) if each is not None]
        options = {"captions_each": own.captions_each, "distinct": own.distinct, "limit": min(limits, default=None)}
        columns = self._columns(records, "image", "caption")
        return Retrieval(job.name, records, columns, own.ks, own.batch_size, **options)

    def geometry(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import Geometry

        columns = self._columns(records, "image", "caption?")
        return Geometry(job.name, records, columns, own.batch_size, feature=own.feature, limit=own.max_samples)

    def board(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import Geometry

        columns = self._columns(records, "image")
        settings = {"feature": own.feature, "limit": own.max_samples, "views": True, "seed": own.seed}
        return Geometry(job.name, records, columns, own.batch_size, **settings)

    def attention(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import Attention

        return Attention(job.name, records, self._columns(records, "image"), count=own.map_count)

    def knn(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import KnnAccuracy

        settings = {"k": own.knn_k, "temperature": own.knn_temperature, "raw_pixels": own.raw_pixels}
        return KnnAccuracy(job.name, self._labelled_images(job), **settings)

    def probe(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import LinearProbe
        from mllm_vision.evaluation.labelled.linear_probe import SWEEP

        sweep = own.probe_regularisation or SWEEP
        return LinearProbe(
            job.name, self._labelled_images(job), regularisation=sweep, raw_pixels=own.raw_pixels, seed=own.seed
        )

    def _labelled_images(self, job: Job) -> Any:
        """Training and test images, encoded once for all tasks on a test set."""
        from mllm_vision.evaluation import LabelledImages

        own = self.own
        if not own.training_dataset_name:
            raise ValueError(f"--task {job.name} needs labelled training images: set --training_dataset_name")
        if job.dataset not in self.labelled:
            sets = [
                self._records(own.training_dataset_name, own.training_split, None),
                self._records(job.dataset, self.split, None),
            ]
            columns = {role: name for role, name in self.named.items() if name and role in ("image", "label")}
            limits = {"train_limit": own.max_training_samples, "test_limit": own.max_samples, "seed": own.seed}
            settings = {"feature": own.feature, "batch_size": own.batch_size, **limits}
            self.labelled[job.dataset] = LabelledImages(*sets, columns, **settings)
        return self.labelled[job.dataset]

    def maps(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.evaluation import Maps

        if self.kind == "vlm":
            columns = self._columns(records, "image", "question")
            return Maps(job.name, records, columns, self.processor, count=own.map_count)
        columns = self._columns(records, "image", "caption?", "label?")
        names = getattr(records.features.get(columns.get("label", "")), "names", None)

        def texts(row: dict[str, Any]) -> list[str]:
            return map_texts(row, own.map_texts, names, columns.get("caption"))

        return Maps(job.name, records, columns, texts=texts, count=own.map_count)

    def vqa(self, job: Job, own: EvaluateArguments, records: Any) -> Any:
        from mllm_vision.data import bind_conversations
        from mllm_vision.evaluation import QuestionAnswering

        # As in training: the text next to an instruction belongs to the question.
        roles = {role: name for role, name in self.named.items() if role in ("image", "question", "answer")}
        columns = bind_conversations(records, roles, forms=[("question", "answer")], report=False)
        training = None
        if own.training_dataset_name:
            training = self._records(own.training_dataset_name, own.training_split, own.max_samples)
        return QuestionAnswering(
            job.name,
            records,
            columns,
            self.processor,
            own.type_column,
            own.batch_size,
            own.max_new_tokens,
            limit=own.max_samples,
            blind=own.blind,
            no_image_baseline=own.no_image_baseline,
            training_answers=training,
        )


def main(argv: list[str] | None = None) -> None:
    (own,) = parse_recipe(EvaluateArguments, argv=argv, description=__doc__)
    began = time.monotonic()
    jobs = read_tasks(own.task, own.dataset_name)

    from mllm_vision.distributed import own_device
    from mllm_vision.evaluation.base import examine
    from mllm_vision.evaluation.models import load_model, model_kind, reinitialise

    kind = model_kind(own.model)
    jobs = jobs or read_tasks(DEFAULTS[kind], own.dataset_name)
    for job in jobs:
        if kind != NEEDED_KIND.get(job.task, kind):
            raise ValueError(f"--task {job.task} needs a {NEEDED_KIND[job.task]} model; {own.model} is a {kind}")
    device = own_device(own.device)
    main_process = join_processes(device)
    loaded = load_model(own.model, device)
    bench = Bench(own, kind, loaded.processor)
    evaluators = [(job, bench.evaluator(job)) for job in jobs]

    record: dict[str, Any] = {"schema": 1, "kind": "evaluation", "model": own.model, "model_kind": kind}
    record |= {"task": [job.name for job in jobs], "evaluations": {}, "samples": [], "arrays": {}}
    record["datasets"] = {job.name: {"path": job.dataset, "rows": len(e.records)} for job, e in evaluators}
    tower = encoder_of(own.model, loaded, device)
    results = {
        job.name: examine(evaluator, tower if job.task in OF_THE_ENCODER else loaded.model)
        for job, evaluator in evaluators
    }
    compared = [(job, evaluator) for job, evaluator in evaluators if own.untrained and job.task not in NOT_COMPARED]
    if compared:
        fresh = reinitialise(load_model(own.model, device).model, own.seed)
        tower = fresh if kind != "vlm" else reinitialise(tower, own.seed)
    for job, evaluator in compared:
        untrained = examine(evaluator, tower if job.task in OF_THE_ENCODER else fresh)
        results[job.name].add_baseline("untrained", untrained)
    for job, evaluator in evaluators:
        results[job.name].store(record, job.name)
        record["evaluations"][job.name]["task"] = job.task
        if own.images and main_process and job.task in ("board", "attention"):
            drawn = evaluator.draw(results[job.name], own.images)
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
    """Join the other processes under torchrun; True on the process that writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, device_id=None if device.type == "cpu" else device)
    atexit.register(dist.destroy_process_group)
    return dist.get_rank() == 0


def provenance(model: str) -> dict[str, Any]:
    """Hash of the weights, versions and command."""
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
