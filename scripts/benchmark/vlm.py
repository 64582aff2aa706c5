"""Stages one and two beside transformers' own way: supervised tokens a second and peak memory.

    python scripts/benchmark/vlm.py --data ../shared/data --stage one      # Flickr8k captions
    python scripts/benchmark/vlm.py --data ../shared/data --stage two      # easy-VQA and DAQUAR, mixed
    python scripts/benchmark/vlm.py --data ../shared/data --stage shared   # easy-VQA: many questions on an image

All contenders train the same model (a random CLIP-like tower, a random Llama of 32,000 words, LLaVA-1.5's connector)
for one epoch over the same rows with the stock `Trainer`:

- transformers: `LlavaForConditionalGeneration` itself, one sample a question, batches padded by `LlavaProcessor`;
- ours: `LanguageTask` around the same model, with this package's data;
- ours, cached: the frozen tower's features read from disk: every run but the first of a sweep over connectors;
- ours, first cached: the same, features computed and written within the time: the first run of a sweep;
- ours, packed (`--packing`) and ours, shared (`--pack_turns`): stage two in rows of several samples.

Before anything is timed, transformers and ours must agree on the tokens of every row and on loss and gradients of a
batch. Contenders take turns; speed-ups are taken round by round (timing.py). Data is made in the process itself.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from timing import Timing, header, peak_memory, show_bytes, side_by_side, speedup, table

from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm import build_vlm, freeze
from mllm_vision.vlm.conversation import load_stage_data, set_chat_template
from mllm_vision.vlm.feature_cache import cache_features

WORDS = 32000
TEMPLATES = {"one": "plain", "two": "vicuna", "shared": "vicuna"}
TRAINED = {"one": ["connector"], "two": ["connector", "language_model"], "shared": ["connector", "language_model"]}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of flickr8k, easyvqa and daquar in Parquet")
    parser.add_argument("--stage", choices=list(TEMPLATES), default="one")
    parser.add_argument("--images", type=int, default=192, help="images of the epoch")
    parser.add_argument("--batch_size", type=int, default=16, help="samples of a step")
    parser.add_argument("--row_tokens", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--image_size", type=int, default=160, help="of the tower, patches of 16")
    parser.add_argument("--tower", type=int, nargs=2, default=[384, 12], help="its width and layers")
    parser.add_argument("--llm", type=int, nargs=2, default=[256, 4], help="width and layers of the language model")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=None, help="JSON file for all figures")
    return parser


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the stage: an image with a caption, or with its questions and answers."""
    from pyarrow import parquet

    def read(name: str, count: int) -> list[dict[str, Any]]:
        return parquet.read_table(arguments.data / f"{name}.parquet").slice(0, count).to_pylist()

    if arguments.stage == "one":
        rows = read("flickr8k_train", arguments.images)
        return [{"image": row["image"], "caption": row["captions"][0]} for row in rows]
    names = ["easyvqa_train"] if arguments.stage == "shared" else ["easyvqa_train", "daquar_train"]
    rows = [row for name in names for row in read(name, arguments.images // len(names))]
    return [{"image": row["image"], "question": row["questions"], "answer": row["answers"]} for row in rows]


def tokenizer_of(rows: Sequence[dict[str, Any]]) -> Any:
    """A byte-level BPE of the rows' texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for row in rows for name, value in row.items() if name != "image"
             for text in ([value] if isinstance(value, str) else value)]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def build(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any]:
    """The task of random weights and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    (width, layers), size = arguments.tower, arguments.image_size
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), image_size=size, patch_size=16,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    encoder = VisionEncoder.from_backbone(CLIPVisionModel(config), images, select_layer=-2, select_feature="patch")
    width, layers = arguments.llm
    text = LlamaConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=int(8 / 3 * width) // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    task, processor = build_vlm(encoder, LlamaForCausalLM(text), "llava15", tokenizer)
    set_chat_template(processor, TEMPLATES[arguments.stage], task)
    return freeze(task, TRAINED[arguments.stage]), processor


class Padded:
    """The usual collator: decoded images and texts through the processor, labels padded with -100."""

    def __init__(self, samples: Any, processor: Any, layout: Any) -> None:
        self.processor, self.layout = processor, layout
        self.texts, self.labels, self.images = [], [], []
        for index in range(len(samples)):
            ids, mask = samples.tokens_of(index)
            self.texts.append(processor.tokenizer.decode(ids))
            whole, repeat = layout.expand(ids)
            self.labels.append(torch.from_numpy(np.where(np.repeat(mask, repeat), whole, -100)))
            self.images.append(samples.images_of(index)[0]["bytes"])

    def __call__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        images = [Image.open(io.BytesIO(self.images[row]), formats=["JPEG", "PNG"]).convert("RGB") for row in rows]
        batch = self.processor(
            images=images, text=[self.texts[row] for row in rows], padding=True, padding_side="right",
            add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        labels = torch.full_like(batch["input_ids"], -100)
        for place, row in enumerate(rows):
            labels[place, : len(self.labels[row])] = self.labels[row]
        return {**batch, "labels": labels}


class Counted:
    """A collator that counts the supervised tokens it gives."""

    def __init__(self, collate: Callable[[Any], dict[str, torch.Tensor]]) -> None:
        self.collate, self.tokens = collate, 0

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        self.tokens += int((batch["labels"][:, 1:] != -100).sum())
        return batch


def epoch(model: Any, dataset: Any, collate: Any, batch_size: int, steps: int = -1) -> int:
    """Trains for one epoch (or some steps) with the stock Trainer; the supervised tokens that were trained on."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    counted = Counted(collate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1, max_steps=steps,
            learning_rate=1e-4, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=counted)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return counted.tokens


class Contenders:
    """One stage's model and data, and the runs on them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from datasets import Dataset

        self.arguments, self.folder = arguments, folder
        rows = rows_of(arguments)
        file = folder / "rows.parquet"
        Dataset.from_list(rows).to_parquet(str(file))
        self.tokenizer = tokenizer_of(rows)
        self.task, self.processor = build(arguments, self.tokenizer)
        self.file, self.options = str(file), {"eval_dataset_name": str(file), "eval_rows": 2, "max_length": 1024}
        one = {} if arguments.stage == "one" else {"max_turns": 1, "shuffle_turns": False}
        self.single = load_stage_data(self.task, self.processor, self.file, **one, **self.options)
        self.layout = self.task.system.layout(self.task.model, self.processor)
        self.padded = Padded(self.single.train, self.processor, self.layout)
        self.steps: dict[str, tuple[Any, Any, Any, int]] = {
            "transformers": (self.task.model, list(range(len(self.single.train))), self.padded, arguments.batch_size),
            "ours": (self.task, self.single.train, self.single.train_collator, arguments.batch_size),
        }
        self.check()
        if arguments.stage != "one":
            self.add_rows("ours, packed", packing=True, max_turns=1, shuffle_turns=False)
            self.add_rows("ours, shared", pack_turns=True)

    def add_rows(self, name: str, **how: Any) -> None:
        """A contender with several samples a row, about as many tokens a step."""
        options = {**self.options, "max_length": self.arguments.row_tokens}
        data = load_stage_data(self.task, self.processor, self.file, **how, **options)
        samples = len(self.single.train) / len(data.train)
        self.steps[name] = (
            self.task,
            data.train,
            data.train_collator,
            max(1, round(self.arguments.batch_size / samples)),
        )

    def check(self) -> None:
        """SystemExit unless transformers and ours have the same tokens, loss and gradients."""
        rows = list(range(self.arguments.batch_size))
        plain = self.padded(rows)
        ours = self.single.train_collator([self.single.train[row] for row in rows])
        for name in ("input_ids", "labels"):
            if not torch.equal(plain[name], ours[name]):
                raise SystemExit(f"transformers and ours differ in {name}")
        found = []
        for model, batch in ((self.task.model, plain), (self.task, {**ours, "pixel_values": plain["pixel_values"]})):
            self.task.zero_grad()
            loss = model.train()(**batch).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in self.task.parameters() if p.grad is not None)])
        self.task.zero_grad()
        for theirs, mine in zip(*found, strict=True):
            if not torch.allclose(theirs, mine, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-7):
                raise SystemExit(f"transformers and ours differ by {float((theirs - mine).abs().max())}")

    def runs(self, steps: int = -1) -> dict[str, Callable[[], int]]:
        """Name -> one epoch (or some steps) of a contender."""
        found: dict[str, Callable[[], int]] = {}
        for name, (model, dataset, collate, batch_size) in self.steps.items():
            found[name] = lambda m=model, d=dataset, c=collate, b=batch_size: epoch(m, d, c, b, steps)
        if self.arguments.stage == "one":
            found["ours, cached"] = lambda: self.cached("features", steps)
            found["ours, first cached"] = lambda: self.cached(f"features{time.time_ns()}", steps)
        return found

    def cached(self, name: str, steps: int) -> int:
        """An epoch over cached features, which are computed where they are missing."""
        cells = self.single.samples.image_cells()
        self.single.use_layout(cache_features(self.task, self.layout, cells, folder=self.folder / name), self.tokenizer)
        try:
            return epoch(self.task, self.single.train, self.single.train_collator, self.arguments.batch_size, steps)
        finally:
            self.single.use_layout(self.layout, self.tokenizer)


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    print(header())
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(arguments, Path(folder))
        for run in contenders.runs(steps=1).values():
            run()
        runs = contenders.runs()
        tokens: dict[str, int] = {}
        times = side_by_side(
            {name: lambda name=name, run=run: tokens.__setitem__(name, run()) for name, run in runs.items()},
            rounds=arguments.rounds, warmup=0,
        )  # fmt: skip
        memory = {name: peak_memory(run) for name, run in contenders.runs(steps=2).items()}
    records, rows = [], []
    for name, own in times.items():
        # per token, since a contender may see another number of them in its last batch
        rate = Timing(name, [seconds / tokens[name] for seconds in own.seconds])
        plain = Timing("transformers", [seconds / tokens["transformers"] for seconds in times["transformers"].seconds])
        rows.append([name, tokens[name], own, f"{1 / rate.median:.0f}", speedup(rate, plain), show_bytes(memory[name])])
        records.append({"run": name, "tokens": tokens[name], "seconds": own.seconds, "bytes": memory[name]})
    titles = ["stage " + arguments.stage, "supervised tokens", "epoch (low to high)", "tokens/s", "speed-up", "memory"]
    print(table(titles, rows))
    if arguments.output:
        told = {"machine": header(), "arguments": {**vars(arguments), "data": ""}, "records": records}
        Path(arguments.output).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
