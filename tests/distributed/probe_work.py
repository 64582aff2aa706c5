"""What the ranks of test_probe_ranks.py run."""

from __future__ import annotations

from typing import Any

import tiny


def knn_and_probe(path: str) -> dict[str, Any]:
    """Metrics and tables of both evaluators on the rows of one file."""
    from mllm_vision.data import load_records
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.evaluation import KnnAccuracy, LabelledImages, LinearProbe

    rows = load_records(path)
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))
    data = LabelledImages(rows.select(range(43)), rows.select(range(43, 60)), batch_size=4)
    knn = KnnAccuracy("knn", data, k=[2, 30], temperature=0.5, query_chunk=3)
    probe = LinearProbe("probe", data, regularisation=(1e-2, 1.0), validation=0.2, tolerance=1e-5)
    results = {"knn": knn.examine(encoder), "probe": probe.examine(encoder)}
    found: dict[str, Any] = {name: result.metrics for name, result in results.items()}
    pixels = LabelledImages(data.train, data.test, feature="pixels")  # more dimensions than rows
    found["pixels"] = LinearProbe("pixels", pixels, regularisation=0.1, tolerance=1e-4)(encoder, 0)
    return found | {"classes": results["knn"].tables["class"], "sweep": results["probe"].tables["sweep"]}
