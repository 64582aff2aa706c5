"""What the ranks of test_evaluators.py run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset


class NumberDual:
    """An image's embedding comes from its mean colour, a text's from its letters; not collapsed, nothing learnt."""

    def encode_images(self, images: list[Any]) -> torch.Tensor:
        pixels = torch.tensor([list(image.resize((2, 2)).tobytes()) for image in images], dtype=torch.float32)
        return torch.nn.functional.normalize(pixels - 100, dim=-1)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        rows = [torch.tensor([float(text.count(letter)) for letter in "abcdeilnoqrst"[:12]]) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows) - 1, dim=-1)


class FailsOnRankOne(NumberDual):
    """One rank cannot go on: the others must not wait for it."""

    def encode_images(self, images: list[Any]) -> torch.Tensor:
        import torch.distributed as dist

        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        return super().encode_images(images)


def load(path: str) -> Dataset:
    from mllm_vision.data import load_records

    return load_records(path)


def retrieve_and_classify(path: str) -> dict[str, Any]:
    """Metrics of retrieval and zero-shot, and the order of the samples."""
    from mllm_vision.evaluation import Retrieval, ZeroShot

    records = load(path)
    columns = {"image": "image", "caption": "captions", "label": "label"}
    retrieval = Retrieval("r", records, columns, batch_size=2)
    zero_shot = ZeroShot("z", records, templates=("a {}", "one {}"), columns=columns, batch_size=2)
    results = {"retrieval": retrieval.examine(NumberDual()), "zero_shot": zero_shot.examine(NumberDual())}
    found: dict[str, Any] = {name: result.metrics for name, result in results.items()}
    found["matrix"] = results["retrieval"].arrays["similarity"]["matrix"]
    found["table"] = results["zero_shot"].tables["class"]
    return found


def answer(path: str, folder: str) -> dict[str, Any]:
    """Metrics and samples of a tiny vision-language model that says something about each image."""
    import tiny
    from transformers import AutoTokenizer

    from mllm_vision.data import CHAT_TEMPLATES
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.evaluation import QuestionAnswering
    from mllm_vision.vlm import build_vlm

    tokenizer = AutoTokenizer.from_pretrained(Path(folder))
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    torch.manual_seed(0)
    model, processor = build_vlm(
        encoder, tiny.tiny_llama(len(tokenizer)), tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["qa"]
    )
    columns = {"image": "image", "question": "questions", "answer": "answers"}
    evaluator = QuestionAnswering("q", load(path), columns, processor, batch_size=2, max_new_tokens=3)
    result = evaluator.examine(model)
    return {"metrics": result.metrics, "samples": [(s["question"], s["prediction"]) for s in result.samples]}


def fail(path: str) -> str:
    """The message that each rank sees when one of them fails."""
    from mllm_vision.evaluation import Retrieval

    evaluator = Retrieval("r", load(path), {"image": "image", "caption": "captions"}, batch_size=2)
    try:
        evaluator(FailsOnRankOne(), 0)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
