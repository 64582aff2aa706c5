"""What a data set's rows cost before training: time to the first batch and memory of a process, by number of rows.

    python scripts/benchmark/rows.py --rows 10000 200000

Conversations of about 430 tokens, image-caption pairs and labelled images lie in Parquet files that name one image.
Each case runs in a fresh process, conversations twice: tokenised ("first") and found in the cache ("again"). Memory is
what the process holds for itself when the first batch of 32 is there, beyond what it held after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("conversations", "pairs", "images")


def write(folder: Path, kind: str, rows: int) -> Path:
    """A Parquet file of `rows` rows, ten thousand a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    image = folder / "image.png"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(image)
    draw = random.Random(0)
    words = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ter") for b in ("sun", "ro", "de") for c in ("", "s", "ing")]
    said = [" ".join(draw.choices(words, k=20)) for _ in range(4000)]
    path = folder / f"{kind}-{rows}.parquet"
    writer = None
    for start in range(0, rows, 10_000):
        count = min(10_000, rows - start)
        columns: dict[str, Any] = {"image": [str(image)] * count}
        if kind == "conversations":
            columns["conversations"] = [
                [
                    {"from": ("human", "gpt")[turn % 2], "value": "<image>\n" * (turn == 0) + draw.choice(said)}
                    for turn in range(8)
                ]
                for _ in range(count)
            ]
        elif kind == "pairs":
            columns["caption"] = [f"{draw.choice(said)} {start + row}" for row in range(count)]
        else:
            columns["label"] = [f"class {draw.randrange(1000)}" for _ in range(count)]
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    return path


def tokenizer_of(folder: Path) -> Any:
    """A BPE tokenizer of the words of this benchmark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=["<s>", "</s>", "<image>"], initial_alphabet=alphabet
        )
        made.train_from_iterator(["kasuning losuns miroing terdes karo lode misun terro"] * 10, trainer)
        made.save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", pad_token="</s>")


def held() -> tuple[float, float]:
    """(MiB of this process alone, MiB of mapped files, which processes share)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024, int(lines["RssFile"].split()[0]) / 1024


def measure(kind: str, path: Path) -> dict[str, float]:
    """Seconds to the first batch, and MiB gained."""
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from transformers import CLIPImageProcessorPil

    from mllm_vision.data import (
        ConversationCollator,
        ConversationDataset,
        ImageCollator,
        ImageDataset,
        ImageTransform,
        PairCollator,
        PairDataset,
        load_records,
    )
    from mllm_vision.data.images.layouts import FixedLayout

    tokenizer = tokenizer_of(path.parent)
    tokenizer("warm up")
    transform = ImageTransform(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32))
    layout = FixedLayout(tokenizer.convert_tokens_to_ids("<image>"), 16, transform)
    before, start, worked = held(), time.perf_counter(), sum(os.times()[:4])
    records = load_records(path)
    if kind == "conversations":
        data: Any = ConversationDataset(
            records,
            None,
            tokenizer,
            layout=layout,
            max_length=1024,
            chat_template="vicuna",
            progress=False,
        )
        collate: Any = ConversationCollator(tokenizer, layout)
    elif kind == "pairs":
        data, collate = PairDataset(records, transform=transform), PairCollator(transform, tokenizer, 77)
    else:
        data, collate = ImageDataset(records), ImageCollator()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:32].tolist()
    batch = collate([data[index] for index in order])
    seconds, after, worked = time.perf_counter() - start, held(), sum(os.times()[:4]) - worked
    tokens = float(batch["input_ids"].shape[1]) if kind == "conversations" else 0.0
    return {
        "seconds": seconds,
        "cpu": worked,
        "own": after[0] - before[0],
        "mapped": after[1] - before[1],
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", help="keep the data here instead of in a temporary folder")
    parser.add_argument("--once", action="store_true", help="leave the second run out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], Path(given.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_DATASETS_CACHE": tempfile.mkdtemp(dir=temporary)}
        print(
            "| data | rows | run | first batch [s] | CPU time [s] | own memory [MiB] | mapped files [MiB] |\n"
            "|---|---|---|---|---|---|---|"
        )
        for kind in given.kinds:
            for rows in given.rows:
                path = folder / f"{kind}-{rows}.parquet"
                path = path if path.is_file() else write(folder, kind, rows)
                for run in ("first", "again")[: 1 if given.once else 2]:
                    command = [sys.executable, __file__, "--measure", kind, str(path)]
                    result = subprocess.run(command, capture_output=True, text=True, env=environment)
                    if result.returncode:
                        sys.exit(result.stderr)
                    found = json.loads(result.stdout.splitlines()[-1])
                    cells = f"{found['seconds']:.1f} | {found['cpu']:.1f} | {found['own']:.0f} | {found['mapped']:.0f}"
                    print(f"| {kind} | {rows} | {run} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
