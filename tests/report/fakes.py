"""Made-up run.json and evaluation files of a whole chain, as the recipes and scripts/evaluate.py write them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": "#e5484d", "green": "#46a758", "blue": "#3e63dd", "yellow": "#ffe629", "purple": "#8e4ec6"}
SHAPES = ("circle", "square", "triangle")
TYPES = ("colour", "count", "place", "relation", "shape", "size", "yes/no")


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def scene(seed: int, size: int = 48, count: int = 2) -> tuple[str, list[str], list[tuple[int, int]]]:
    """A thumbnail, the names of its objects, their cells on a 6 x 6 grid."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), "#23262b")
    draw = ImageDraw.Draw(image)
    names, cells = [], rng.sample([(r, c) for r in (1, 4) for c in (1, 4)], count)
    for row, column in cells:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        x, y, half = (column + 0.5) * size / 6, (row + 0.5) * size / 6, size / 8
        box = (x - half, y - half, x + half, y + half)
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=COLOURS[colour])
        names.append(f"{colour} {shape}")
    return data_uri(image), names, cells


def digest(seed: str) -> str:
    return hashlib.sha256(seed.encode()).hexdigest()


def loss_history(steps: int, start: float, end: float, every: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    history = []
    for step in range(every, steps + 1, every):
        share = step / steps
        mean = end + (start - end) * math.exp(-5 * share)
        history.append(
            {
                "step": step,
                "loss": mean * (1 + 0.08 * rng.gauss(0, 1)),
                "learning_rate": 1e-3 * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share)),
                "grad_norm": 0.5 + abs(rng.gauss(0, 0.3)),
                "samples_per_second": 480 + rng.gauss(0, 15),
            }
        )
    return history


def run(kind: str, **extra: Any) -> dict[str, Any]:
    record = {
        "schema": 1,
        "kind": kind,
        "name": kind,
        "command": f"python recipes/{kind}.py --config recipes/configs/quickstart/{kind}.yaml --output_dir runs/{kind}",
        "started": "2026-11-23T20:53:00+00:00",
        "seconds": 240.0,
        "machine": {"platform": "Linux x86_64", "cpu_cores": 2, "processes": 1, "memory_gib": 15.6, "accelerators": []},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "mllm_vision": "0.1.0"},
        "recipe": {
            "learning_rate": 1e-3,
            "max_steps": 1200,
            "per_device_train_batch_size": 128,
            "seed": 42,
            "bf16": False,
        },
        "parents": [],
        "data": {
            "train": {
                "fingerprint": "abc",
                "rows": 24000,
                "columns": {"image": "image", "caption": "captions"},
                "samples": [{"captions": "a red circle left of a blue square"}],
            }
        },
        "modules": [],
        "history": loss_history(1200, 4.8, 0.35),
        "evaluations": {},
        "samples": [],
        "arrays": {},
        "bad_samples": {"count": 0, "examples": []},
        "verdict": "",
        "artifacts": [],
    }
    record.update(extra)
    return record


def module(group: str, parameters: int, before: str, after: str, rate: float | None = None) -> dict[str, Any]:
    """An entry of the freeze audit; trained where it has a rate."""
    hashes = {"sha256_before": digest(before), "sha256_after": digest(after), "moved": before != after}
    return {"group": group, "parameters": parameters, "trainable": rate is not None, "learning_rate": rate, **hashes}


def stage_zero() -> dict[str, Any]:
    history = loss_history(1200, 4.85, 0.35)
    for place, entry in enumerate(history):
        share = (place + 1) / len(history)
        entry |= {"logit_scale": 14.3 * math.exp(0.8 * share), "positive_similarity": share}
        if place % 10 == 9:
            entry["eval_zero_shot_accuracy"] = 1 - math.exp(-4.2 * share)
            entry["eval_zero_shot_mean_class_accuracy"] = 1 - math.exp(-4.1 * share)
            entry["eval_retrieval_r1"] = 0.8 * (1 - math.exp(-3 * share))
            entry["eval_retrieval_r5"] = 0.95 * (1 - math.exp(-4 * share))
            entry["eval_retrieval_image_to_text_r1"] = 0.7 * share
            entry["eval_retrieval_count"] = 200.0
    return run(
        "stage_zero",
        history=history,
        method={"chance_loss": math.log(128), "loss_parts": [], "citation": ""},
        recipe={
            "objective": "clip",
            "per_device_train_batch_size": 128,
            "learning_rate": 1e-3,
            "seed": 42,
            "encoder_overrides": "hidden_size=128,num_hidden_layers=4",
        },
        artifacts=[
            {"name": "encoder", "path": "runs/q/pretrain/encoder", "kind": "encoder", "weights_sha256": digest("e")},
            {"name": "dual", "path": "runs/q/pretrain/dual", "kind": "dual", "weights_sha256": digest("d")},
        ],
        modules=[
            module("vision", 812416, "a", "e", 1e-3),
            module("text", 412416, "t", "u", 1e-3),
        ],
        verdict="zero_shot accuracy 0.978 against chance 0.0417: better\n"
        "retrieval r1 0.8 against chance 0.005: better\nrank 12 against untrained 12.1: within noise",
        bad_samples={"count": 2, "examples": ["row 17: truncated PNG", "row 91: <empty caption>"]},
    )


def language_model() -> dict[str, Any]:
    history = loss_history(400, 5.5, 1.1, seed=3)
    for entry in history[::8]:
        entry["eval_perplexity"] = math.exp(entry["loss"])
    return run(
        "language_model",
        history=history,
        seconds=95.0,
        artifacts=[{"name": "model", "kind": "language_model", "path": "x", "weights_sha256": digest("l")}],
        modules=[{"group": "language_model", "parameters": 1630000, "trainable": True, "learning_rate": 3e-3}],
        data={"train": {"rows": 30000, "columns": {}, "samples": [{"text": "a red circle"}]}},
    )


def stage_one() -> dict[str, Any]:
    return run(
        "stage_one",
        seconds=75.0,
        history=loss_history(300, 3.2, 0.9, seed=5),
        parents=[
            {"role": "encoder", "path": "runs/q/encoder", "kind": "encoder", "weights_sha256": digest("e")},
            {"role": "language_model", "path": "runs/q/lm", "kind": "language_model", "weights_sha256": digest("l")},
        ],
        artifacts=[{"name": "model", "kind": "vlm", "path": "x", "weights_sha256": digest("al")}],
        modules=[
            module("encoder", 812416, "e", "e"),
            module("projector", 41216, "p", "q", 2e-3),
            module("language_model", 1630000, "l", "l"),
        ],
        evaluations={
            "captions": {"loss": 0.91, "loss_shuffled": 2.4, "primary_metric": "loss", "baselines": {"blank": 2.2}}
        },
    )


def stage_two() -> dict[str, Any]:
    history = loss_history(900, 2.4, 0.2, seed=7)
    for place, entry in enumerate(history):
        if place % 9 == 8:
            entry["eval_vqa_accuracy"] = 0.35 + 0.55 * (1 - math.exp(-3 * place / len(history)))
            for offset, kind in enumerate(TYPES):
                entry[f"eval_vqa_accuracy_{kind.replace('/', '_')}"] = entry["eval_vqa_accuracy"] - 0.02 * offset
    return run(
        "stage_two",
        history=history,
        seconds=310.0,
        parents=[{"role": "vlm", "path": "runs/q/align", "kind": "vlm", "weights_sha256": digest("al")}],
        artifacts=[{"name": "model", "kind": "vlm", "path": "x", "weights_sha256": digest("in")}],
        modules=[
            module("encoder", 812416, "e", "e"),
            module("projector", 41216, "q", "r", 1e-3),
            module("language_model", 1630000, "l", "m", 5e-4),
        ],
    )


def stage_zero_evaluation() -> dict[str, Any]:
    rng = random.Random(1)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    count = 16
    scenes = [scene(seed) for seed in range(count)]
    matrix = [
        [0.75 + 0.1 * rng.random() if a == b else 0.55 * rng.random() for b in range(count)] for a in range(count)
    ]
    matrix[3][5], matrix[5][5] = 0.8, 0.6
    maps = []
    for seed in range(6):
        image, objects, cells = scene(100 + seed, 48)
        items = [
            {
                "kind": "attention",
                "text": "attention",
                "grid": [
                    [rng.random() * 0.02 + sum(0.1 for c in cells if c == (r, q)) for q in range(6)] for r in range(6)
                ],
            }
        ]
        for name, (row, column) in zip(objects, cells):
            grid = [
                [0.3 * math.exp(-((r - row) ** 2 + (c - column) ** 2) / 1.2) - 0.01 for c in range(6)] for r in range(6)
            ]
            items.append({"kind": "occlusion", "text": f"a {name}", "score": 0.6, "grid": grid})
        maps.append({"image": image, "items": items})
    confusion = [[17 if a == b else (1 if (a + 3 * b) % 11 == 0 else 0) for b in range(15)] for a in range(15)]
    return {
        "schema": 1,
        "kind": "evaluation",
        "task": ["zero_shot", "retrieval", "geometry", "maps"],
        "datasets": {"zero_shot": {"path": "runs/quickstart/data/single_test.parquet", "rows": 400}},
        "model": "runs/quickstart/dual",
        "model_kind": "dual",
        "seconds": 21.0,
        "evaluations": {
            "zero_shot": {
                "task": "zero_shot",
                "accuracy": 0.978,
                "mean_class_accuracy": 0.977,
                "top5_accuracy": 1.0,
                "count": 400.0,
                "primary_metric": "accuracy",
                "baselines": {"chance": 1 / 15, "untrained": 0.071},
                "details": {
                    "baselines": {
                        "chance": {"accuracy": 1 / 15, "top5_accuracy": 1 / 3},
                        "untrained": {"accuracy": 0.071, "top5_accuracy": 0.35},
                    },
                    "tables": {"class": [{"name": n, "count": 20, "accuracy": 0.95} for n in names]},
                },
            },
            "unseen/zero_shot": {
                "task": "zero_shot",
                "accuracy": 0.891,
                "count": 160.0,
                "primary_metric": "accuracy",
                "baselines": {"chance": 1 / 15},
                "details": {},
            },
            "retrieval": {
                "task": "retrieval",
                "r1": 0.79,
                "r5": 0.96,
                "r10": 0.99,
                "image_to_text_r1": 0.8,
                "text_to_image_r1": 0.78,
                "image_to_text_median_rank": 1.0,
                "images": 200.0,
                "texts": 200.0,
                "count": 200.0,
                "primary_metric": "r1",
                "baselines": {"chance": 0.005, "untrained": 0.01},
                "details": {
                    "baselines": {
                        "chance": {
                            "r1": 0.005,
                            "r5": 0.025,
                            "r10": 0.05,
                            "image_to_text_r1": 0.005,
                            "text_to_image_r1": 0.005,
                        },
                        "untrained": {"r1": 0.01, "r5": 0.04, "r10": 0.07},
                    }
                },
            },
            "geometry": {
                "task": "geometry",
                "effective_rank": 31.4,
                "rankme": 29.8,
                "uniformity": -2.9,
                "std": 0.93,
                "alpha_req": 1.31,
                "dead_dimensions": 0.0,
                "count": 500.0,
                "dimensions": 128.0,
                "primary_metric": "effective_rank",
                "baselines": {"untrained": 6.2},
                "details": {"baselines": {"untrained": {"effective_rank": 6.2, "rankme": 5.1, "uniformity": -0.1}}},
            },
        },
        "samples": [
            {
                "evaluation": "zero_shot",
                "image": s[0],
                "answer": s[1][0],
                "prediction": s[1][0] if i % 6 else "red star",
                "correct": bool(i % 6),
            }
            for i, s in enumerate(scenes[:12])
        ],
        "arrays": {
            "retrieval/similarity": {
                "matrix": matrix,
                "images": [s[0] for s in scenes],
                "captions": [f"a {s[1][0]} and a {s[1][1]}, nothing else" for s in scenes],
            },
            "geometry/spectrum": {
                "values": [0.2 * (i + 1) ** -1.3 for i in range(128)],
                "dimensions": 128,
                "count": 500,
                "untrained": [0.6 * (i + 1) ** -2.9 for i in range(128)],
            },
            "zero_shot/confusion": {"classes": names, "counts": confusion},
            "maps/maps": maps,
        },
    }


def stage_two_evaluation(base: float = 0.9, baselines: bool = True) -> dict[str, Any]:
    rng = random.Random(5)
    accuracy = {kind: min(1.0, base + 0.09 - 0.03 * place) for place, kind in enumerate(TYPES)}
    entry: dict[str, Any] = {"task": "vqa", "accuracy": base, "count": 2400.0, "primary_metric": "accuracy"}
    entry |= {f"accuracy_{kind.replace('/', '_')}": value for kind, value in accuracy.items()}
    entry["baselines"] = {"majority": 0.21, "majority_by_type": 0.36} if baselines else {}
    entry["details"] = {
        "baselines": {"majority": {"accuracy": 0.21}, "majority_by_type": {"accuracy": 0.36}} if baselines else {},
        "tables": {
            "question_type": [
                {
                    "name": kind,
                    "count": 340,
                    "accuracy": accuracy[kind],
                    "majority": 0.5 if "/" in kind else 0.2,
                    "majority_answer": "yes" if "/" in kind else "red",
                }
                for kind in TYPES
            ]
        },
    }
    samples = []
    for place in range(24):
        image, objects, _ = scene(300 + place)
        right = place % 2 == 0
        samples.append(
            {
                "evaluation": "vqa",
                "image": image,
                "question": f"what colour is the {objects[0].split()[1]}?",
                "answer": objects[0].split()[0],
                "prediction": objects[0].split()[0] if right else "green",
                "correct": right,
                "question_type": rng.choice(TYPES),
            }
        )
    return {
        "schema": 1,
        "kind": "evaluation",
        "task": ["vqa"],
        "evaluations": {"vqa": entry, "unseen/vqa": {**entry, "accuracy": base - 0.07, "details": {}}},
        "samples": samples,
        "arrays": {},
    }


def write_chain(folder: Path) -> tuple[list[str], list[str]]:
    """The files of a whole chain; returns what to give to `--runs` and `--evaluations`."""
    runs = []
    for record in (stage_zero(), language_model(), stage_one(), stage_two()):
        (folder / record["kind"]).mkdir(parents=True, exist_ok=True)
        (folder / record["kind"] / "run.json").write_text(json.dumps(record))
        runs.append(str(folder / record["kind"]))
    files = {
        "stage_zero": stage_zero_evaluation(),
        "stage_two": stage_two_evaluation(),
        "stage_two/blind": stage_two_evaluation(0.37, False),
        "stage_two/untrained_encoder": stage_two_evaluation(0.62, False),
    }
    evaluations = []
    for name, content in files.items():
        path = folder / f"{name.replace('/', '_')}.json"
        path.write_text(json.dumps(content))
        evaluations.append(f"{name}={path}")
    return runs, evaluations
