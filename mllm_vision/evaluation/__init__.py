"""Evaluators: callables `(model, step) -> dict` that say whether an encoder got better, and against what."""

from mllm_vision.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Evaluation": "base",
        "Evaluator": "base",
        "ZeroShot": "zero_shot",
        "Retrieval": "retrieval",
        "QuestionAnswering": "language.question_answering",
        "LabelledImages": "labelled.images",
        "KnnAccuracy": "labelled.knn",
        "LinearProbe": "labelled.linear_probe",
        "ClassifierAccuracy": "labelled.classifier",
        "Geometry": "geometry",
        "Board": "geometry",
        "Maps": "maps.maps",
        "Attention": "maps.attention",
        "normalize_answer": "language.answers",
        "consensus": "language.answers",
        "load_evaluator": "registry",
        "list_evaluators": "registry",
        "load_model": "models",
        "reinitialise": "models",
    },
)
