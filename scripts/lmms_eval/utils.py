"""Functions of the tasks local_vqa and local_yes_no of lmms-eval; they import nothing of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.pope import utils as pope

NORMALISED = EvalAIAnswerProcessor()


def image(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def vqa(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match after the normalisation of the VQA evaluation."""
    return {"accuracy": float(NORMALISED(results[0]) == NORMALISED(doc["answer"]))}


def yes_no(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """lmms-eval's own POPE figures, which take an answer other than "yes" or "no" as wrong, and beside them those of
    POPE's official reading: "no" if the first sentence has No, no or not among its words, otherwise "yes"."""
    words = results[0].partition(".")[0].replace(",", "").split(" ")
    read = "no" if {"No", "no", "not"} & set(words) else "yes"
    official = {"question_id": doc["question_id"], "prediction": read, "ground_truth": doc["answer"].lower()}
    official["score"] = float(official["prediction"] == official["ground_truth"])
    strict = pope.pope_process_results(doc, results)["pope_accuracy"]
    return {
        **{f"strict_{name}": strict for name in ("accuracy", "f1")},
        **dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), official),
    }


accuracy = pope.pope_aggregate_accuracy
precision = pope.pope_aggregate_precision
recall = pope.pope_aggregate_recall
f1 = pope.pope_aggregate_f1_score


def yes_ratio(results: Sequence[dict[str, Any]]) -> float:
    """The share of yes among the answers (lmms-eval's is that of the labels)."""
    return sum(result["prediction"] == "yes" for result in results) / len(results)
