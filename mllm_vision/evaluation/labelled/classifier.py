"""A fine-tuned classifier: its accuracy, and saving it as transformers' own model where there is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mllm_vision.evaluation.base import Evaluation, Evaluator, unwrap
from mllm_vision.evaluation.labelled.images import LabelledImages, guessing, predictions_summary


class ClassifierAccuracy(Evaluator):
    """Test accuracy of a model with an encoder and a ``predict(features [N, P]) -> classes [N]``.

    Args:
        name: evaluator name.
        data: the labelled images; only the test set is encoded.

    Metrics: ``accuracy``, ``mean_class_accuracy``, ``count``; ``skipped`` where rows were left out; baselines
    ``chance`` and ``most_frequent_class``; ``tables["class"]``.
    """

    primary_metric = "accuracy"

    def __init__(self, name: str, data: LabelledImages) -> None:
        super().__init__(name)
        self.data, self.records = data, data.test

    def evaluate(self, model: Any) -> Evaluation:
        test = self.data.test_features(model)
        names = self.data.class_names
        accuracy, by_class, table = predictions_summary(unwrap(model).predict(test.features), test.labels, names)
        count = sum(int(row["count"]) for row in table)
        metrics = {"accuracy": accuracy, "mean_class_accuracy": by_class, "count": float(count)}
        if skipped := self.data.skipped(count):
            metrics["skipped"] = skipped
        self.refused |= self.data.refused
        result = Evaluation(self.primary_metric, metrics, guessing(table, len(names)))
        result.tables["class"] = table
        return result


def save_classifier(encoder: Any, head: nn.Linear, class_names: Sequence[str], path: str | Path) -> bool:
    """Write encoder and linear layer, natively where transformers has the same classifier.

    A ViT without pooler becomes a `ViTForImageClassification`, a ResNet with its ImageNet stem a
    `ResNetForImageClassification`: ``pipeline("image-classification", model=path)`` runs them. Other towers pool in
    another way there; for them ``head.safetensors`` and ``head.json`` (class names) go with the encoder's checkpoint.

    Returns:
        Whether transformers has it.
    """
    import transformers
    from safetensors.torch import save_file

    path = Path(path)
    backbone, config = encoder.backbone, encoder.config
    stem = (getattr(config, "mllm_vision", None) or {}).get("stem", "imagenet")
    native = {"vit": getattr(backbone, "pooler", None) is None, "resnet": stem == "imagenet"}.get(
        config.model_type, False
    )
    names = [str(name) for name in class_names]
    if not native:
        encoder.save_pretrained(path)
        save_file(
            {key: value.detach().contiguous() for key, value in head.state_dict().items()}, path / "head.safetensors"
        )
        (path / "head.json").write_text(json.dumps({"classes": names, "feature": "pooled"}), encoding="utf-8")
        return False
    kind = {"vit": "ViTForImageClassification", "resnet": "ResNetForImageClassification"}[config.model_type]
    settings = type(config).from_dict(config.to_dict())
    settings.num_labels = len(names)
    settings.id2label = dict(enumerate(names))
    settings.label2id = {name: index for index, name in enumerate(names)}
    model = getattr(transformers, kind)(settings)
    getattr(model, model.base_model_prefix).load_state_dict(backbone.state_dict())
    linear = model.classifier if isinstance(model.classifier, nn.Linear) else model.classifier[-1]
    linear.load_state_dict(head.state_dict())
    model.to(backbone.dtype).eval().save_pretrained(path)
    encoder.processor.save_pretrained(path)
    return True
