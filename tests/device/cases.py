"""What runs on the CPU and on the stand-in device, and has to give the same numbers on both: name -> function.

A function takes `place` (modules to the device, or nothing) and `move` (a batch's tensors likewise) and returns
numbers. `step_of` cases also say what the host read back in their last step.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import methods_for_tests as methods
import pairs_for_tests as pairs
import stand_in
import tiny
import torch
from torch import nn

from mllm_vision import distributed

Place = Callable[[nn.Module], nn.Module]
Move = Callable[[Any], Any]
STEPS = 2  # the second meets queues that hold something
READS: dict[str, int] = {}  # of the last step of the case at work


def _train(objective: Any, batches: list[dict[str, Any]], place: Place, move: Move, before: Any = None) -> list[float]:
    """Losses, metrics and gradients of some steps of SGD with everything a trainer calls around a step."""
    place(objective.train())
    if before is not None:
        before(objective)
    found: list[float] = []
    metrics: list[float] = []
    learning = [value for value in objective.parameters() if value.requires_grad]
    world, rank = distributed.world_size(), distributed.rank()
    for number, batch in enumerate(batches):
        objective.progress = objective.epoch = number / len(batches)
        rows = len(next(iter(batch.values()))) // world
        batch = move({name: value[rank * rows : (rank + 1) * rows] for name, value in batch.items()})
        with stand_in.counting() if number == len(batches) - 1 else contextlib.nullcontext():
            output = objective(**batch)
            output.loss.backward()
            with torch.no_grad():
                for value in learning:
                    if value.grad is not None:  # the mean over ranks, as DDP's
                        value.sub_(distributed.all_reduce(value.grad) / world, alpha=0.05)
                    value.grad = None
            objective.after_step((number + 1) / len(batches))
        found.append(float(output.loss.detach()))
        if world > 1:  # metrics are those of a rank's rows
            continue
        for value in (output.metrics or {}).values():
            assert value.device == output.loss.device, "a metric is not where the loss is"
        metrics += [float(value) for _, value in sorted((output.metrics or {}).items())]
    READS.update(stand_in.READ_BACK)
    return found + metrics


def image_method(name: str, kind: str = "vit", **changed: Any) -> Callable[[Place, Move], list[float]]:
    def run(place: Place, move: Move) -> list[float]:
        objective = methods.objective(name, kind, **changed)
        return _train(objective, methods.batches(objective, STEPS), place, move, lambda made: _features(made, move))

    return run


def _features(made: Any, move: Move) -> None:
    """The pass over the data that PCL makes before an epoch."""
    if made.needs_features:
        data, (_, plain) = methods.ImageDataset(methods.records()), methods.view_makers(made)
        images = plain(methods.ImageCollator()([data[row] for row in range(methods.ROWS)]))
        with torch.no_grad():
            made.before_epoch(made.eval().epoch_features(move(images)["views"]))
        made.train()


def pair_method(name: str, **changed: Any) -> Callable[[Place, Move], list[float]]:
    def run(place: Place, move: Move) -> list[float]:
        return _train(pairs.make_objective(name, **changed), pairs.pair_batches(STEPS, 8), place, move)

    return run


def views_on_the_device(place: Place, move: Move) -> list[float]:
    """Every policy's views, made of 8-bit images where they lie."""
    from mllm_vision.data.views.views import POLICIES

    found = []
    collated = methods.ImageCollator()([methods.ImageDataset(methods.records())[row] for row in range(4)])
    for name in POLICIES:
        made = methods.ViewMaker(name, 32, [0.5] * 3, [0.5] * 3, patch_size=8)(move(collated))
        found += [float(made[key].float().sum()) for key in ("views", "local_views") if made.get(key) is not None]
    return found


def gradient_cache(place: Place, move: Move) -> list[float]:
    """SimCLR in chunks that are moved when their turn comes."""
    from mllm_vision.training.trainer.gradient_cache import cached_backward

    objective = methods.objective("simclr")
    (batch,) = methods.batches(objective, 1)
    place(objective)
    output = cached_backward(objective, batch, 3, prepare=move, check=True)
    return [float(output.loss), *(float(value.grad.norm()) for value in objective.parameters() if value.requires_grad)]


def losses(place: Place, move: Move) -> list[float]:
    """The losses that no method uses in this form."""
    from mllm_vision.functional import distillation, geometry, image_text, infonce, momentum_contrast
    from mllm_vision.functional import pairs as two

    a, b, c = move({"rows": torch.randn(3, 9, 6)})["rows"].requires_grad_().unbind()
    labels = move({"labels": torch.arange(9) % 4})["labels"]
    learnt = move({"scale": torch.tensor([5.0])})["scale"].requires_grad_()[0]
    each: list[Any] = [
        infonce.dcl(a, b, sigma=0.5, tile_size=4),
        infonce.sup_con(torch.stack([a, b], 1), None),
        infonce.info_nce(a, b, temperature=learnt),
        infonce.info_nce(a, b, torch.stack([a, c], 1)),
        infonce.nt_xent(a, b, temperature=0.001),
        image_text.clip_loss(a, b, learnt, relations=labels, tile_size=5),
        image_text.siglip_loss(a, b, learnt, -3.0, relations=labels[:, None] == labels[None]),
        image_text.clip_loss(a, b, 7.0, relations=lambda r, k: labels[r, None] == labels[None, k]),
        momentum_contrast.momentum_contrast(a, b, c, c, learnt, image_queue=b.detach(), text_queue=c.detach()),
        distillation.koleo(a, tile_size=4),
        *(two.batch_triplet(a, labels, strategy=strategy)[0] for strategy in two.STRATEGIES),
        two.triplet(a, b, c),
        two.contrastive(a, b, labels > 1),
        geometry.uniformity(a),
    ]
    torch.stack([loss.float() for loss in each]).sum().backward()
    return [float(loss) for loss in each] + [float(learnt.detach())]


# ---- stages one and two ----------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="device_cases"))
    tiny.tiny_tokenizer(folder / "tokenizer")
    tiny.write_pairs_parquet(folder / "pairs.parquet", n=24)
    return folder


def _language_model() -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from mllm_vision.data import CHAT_TEMPLATES
    from mllm_vision.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm

    tokenizer = AutoTokenizer.from_pretrained(_folder() / "tokenizer")
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    torch.manual_seed(0)
    llm = tiny.tiny_llama(len(tokenizer))
    return build_vlm(encoder, llm, tokenizer=tokenizer, chat_template=CHAT_TEMPLATES["qa"])


def _conversations(model: Any, rows: int = 4, images: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spelt = model.config.image_seq_length if images else 0
    ids = torch.randint(20, 200, (rows, 9 + spelt), generator=generator)
    ids[:, 1 : 1 + spelt] = model.config.image_token_id
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : spelt + 4] = -100
    mask[1, -2:], labels[1, -2:] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch | ({"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)} if images else {})


def language_stage(*groups: str, images: bool = True) -> Callable[[Place, Move], list[float]]:
    def run(place: Place, move: Move) -> list[float]:
        from mllm_vision.vlm import freeze

        model, _ = _language_model()
        place(freeze(model, groups).train())
        batch = move(_conversations(model, images=images))
        with stand_in.counting():
            loss = model(**batch).loss
            loss.backward()
        READS.update(stand_in.READ_BACK)
        gradients = [value.grad for value in model.parameters() if value.requires_grad]
        assert all(value is not None for value in gradients), "a parameter that trains got no gradient"
        return [float(loss), *(float(value.norm()) for value in gradients)]

    return run


# ---- evaluators ------------------------------------------------------------------------------------------------


def _records() -> Any:
    from mllm_vision.data import load_records

    return load_records(str(_folder() / "pairs.parquet"))


def evaluator(make: Callable[[], tuple[Any, nn.Module]]) -> Callable[[Place, Move], list[float]]:
    def run(place: Place, move: Move) -> list[float]:
        measured, model = make()
        metrics = measured.examine(place(model)).metrics
        return [value for name, value in sorted(metrics.items()) if name not in ("gradient", "iterations")]

    return run


def _labelled(kind: str) -> tuple[Any, nn.Module]:
    from mllm_vision.evaluation import KnnAccuracy, LabelledImages, LinearProbe

    rows = methods.records(40)
    data = LabelledImages(rows[:28], rows[28:], batch_size=8)
    made = KnnAccuracy("knn", data, k=3) if kind == "knn" else LinearProbe("probe", data, regularisation=(0.1, 1.0))
    return made, methods.encoder()


def _with_records(kind: str) -> tuple[Any, nn.Module]:
    from mllm_vision.evaluation import Attention, Geometry, Maps, Retrieval, ZeroShot

    rows, columns = _records(), {"image": "image", "caption": "captions", "label": "label"}
    dual = pairs.make_dual()
    made = {
        "retrieval": lambda: Retrieval("r", rows, columns, batch_size=8),
        "zero_shot": lambda: ZeroShot("z", rows, columns=columns, batch_size=8),
        "geometry": lambda: Geometry("g", rows, columns, batch_size=8, views=True),
        "attention": lambda: Attention("a", rows, {"image": "image"}),
        "maps": lambda: Maps("m", rows, {"image": "image", "caption": "captions"}, count=2, grid=2),
    }[kind]()
    return made, dual


def _answers() -> tuple[Any, nn.Module]:
    from mllm_vision.evaluation import QuestionAnswering

    model, processor = _language_model()
    rows = [
        {"image": tiny.random_image(row), "questions": ["what is this?"], "answers": ["a circle"]} for row in range(3)
    ]
    return QuestionAnswering("q", rows, None, processor, batch_size=2, max_new_tokens=2), model.eval()


def held_out_loss(place: Place, move: Move) -> list[float]:
    from mllm_vision.vlm.measure import supervised_loss

    model, _ = _language_model()
    place(model.eval())
    batches = [_conversations(model) for _ in range(2)]
    return [supervised_loss(model, batches, images) for images in ("own", "shuffled", "blank")]


def next_turn(place: Place, move: Move) -> list[float]:
    from mllm_vision.vlm import answer

    model, processor = _language_model()
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    text = answer(place(model.eval()), processor, question, [tiny.random_image(3)], max_new_tokens=4)
    return [float(ord(letter)) for letter in text]


def perplexity(place: Place, move: Move) -> list[float]:
    from mllm_vision.data.documents import PackedBlocks, Perplexity

    blocks = PackedBlocks([list(range(5, 45))] * 3, 16)
    return list(Perplexity(blocks, batch_size=2)(place(tiny.tiny_llama())).values())


CASES: dict[str, Callable[[Place, Move], list[float]]] = {
    **{f"method {name}": image_method(name) for name in methods.IMAGE_METHODS},
    "method moco_v2 of a ResNet": image_method("moco_v2", "resnet"),
    "method simsiam of a ResNet": image_method("simsiam", "resnet"),
    "method dino, centred": image_method("dino", centring="centre"),
    "method moco_v2, both ways": image_method("moco_v2", symmetric=True),
    "method clip": pair_method("clip"),
    "method clip, patches left out": pair_method("clip", patch_dropout=0.5),
    "method clip, in a ring": pair_method("clip", exchange="ring"),
    "method siglip": pair_method("siglip"),
    "method itc": pair_method("itc", queue_size=20),
    "views": views_on_the_device,
    "gradient cache": gradient_cache,
    "losses": losses,
    "language connector": language_stage("connector"),
    "language connector and model": language_stage("connector", "language_model"),
    "language all": language_stage("encoder", "connector", "language_model"),
    "language without images": language_stage("connector", images=False),
    "evaluator knn": evaluator(lambda: _labelled("knn")),
    "evaluator probe": evaluator(lambda: _labelled("probe")),
    **{
        f"evaluator {kind}": evaluator(lambda kind=kind: _with_records(kind))
        for kind in ("retrieval", "zero_shot", "geometry", "attention", "maps")
    },
    "evaluator answers": evaluator(_answers),
    "evaluator held-out loss": held_out_loss,
    "evaluator perplexity": perplexity,
    "chat": next_turn,
}


# What two ranks compute together with every tensor on its device; a method of the same kind tells nothing new.
OF_RANKS = [
    *(f"method {name}" for name in ("simclr", "supcon", "moco_v2", "dinov2", "vicreg", "pcl", "clip", "siglip", "itc")),
    "method dino, centred",
    "method moco_v2 of a ResNet",
    "method clip, in a ring",
    *(f"evaluator {name}" for name in ("knn", "probe", "retrieval", "zero_shot", "geometry", "answers")),
    "evaluator held-out loss",
]
