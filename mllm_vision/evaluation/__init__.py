"""Evaluators: callables `(model, step) -> dict` that say whether an encoder got better, and against what."""

from mllm_vision.evaluation.registry import evaluator_homes
from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        **{name: home.removeprefix("evaluation.") for name, home in evaluator_homes().items()},
        "Evaluation": "base",
        "Evaluator": "base",
        "LabelledImages": "labelled.images",
        "ClassifierAccuracy": "labelled.classifier",
        "normalize_answer": "language.answers",
        "consensus": "language.answers",
        "load_evaluator": "registry",
        "list_evaluators": "registry",
        "load_model": "models",
        "reinitialise": "models",
    },
)
