"""What a stream's exact state costs: walking the order, saving the state, and going on near the end of a pass.

    python scripts/benchmark/streams.py

Rows of ten kilobytes lie in Parquet shards. Going on is timed from nothing to the first batch, beside reading the
stream up to there and throwing it away, which is what the stock Trainer does with a `datasets` stream (timed as well,
with the same shuffle buffer), and which loses what that stream's buffer held.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from timing import side_by_side

from mllm_vision.data.records.sampling import BadSamples
from mllm_vision.data.streams.loader import StreamLoader
from mllm_vision.data.streams.streams import Stream, StreamDataset


class Raw:
    """Rows as they are: decoding is another benchmark's matter."""

    columns = {"image": "image", "caption": "caption"}

    def __init__(self) -> None:
        self.bad_samples = BadSamples()

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        return record


def write_shards(folder: Path, shards: int, rows: int) -> None:
    """Parquet files of `rows` rows, a hundred a group, with ten kilobytes of noise in each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = np.random.default_rng(0)
    for number in range(shards):
        images = [{"bytes": noise.bytes(10_000), "path": None} for _ in range(rows)]
        table = pa.table({"image": images, "caption": [f"{number}-{row}" for row in range(rows)]})
        pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1000, help="rows in a shard")
    parser.add_argument("--buffer", type=int, default=2000, help="rows in the shuffle buffer")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, given.shards, given.rows)

        def loader() -> StreamLoader:
            stream = Stream.open(folder, seed=0, shuffle_buffer=given.buffer)
            return StreamLoader(StreamDataset(stream, Raw()), given.batch_size, collate_fn=list)

        first = loader()
        far = 9 * len(first) // 10
        began = time.perf_counter()
        for _ in islice(first, far):
            pass
        reading = (time.perf_counter() - began) / (far * given.batch_size)
        saved = json.dumps(first.state_dict())

        order = first.dataset.stream.order()
        began = time.perf_counter()
        order.take(50_000)
        walking = (time.perf_counter() - began) / 50_000

        def going_on() -> None:
            again = loader()
            again.load_state_dict(json.loads(saved))
            next(iter(again))

        def skipping() -> None:
            for _ in islice(loader(), far + 1):
                pass

        def stock() -> None:
            from datasets import load_dataset

            rows = load_dataset(
                "parquet", data_files=sorted(map(str, folder.glob("*.parquet"))), split="train", streaming=True
            )
            for _ in islice(rows.shuffle(seed=0, buffer_size=given.buffer).batch(given.batch_size), far + 1):
                pass

        contenders = {"going on from the state": going_on, "our stream, skipped to there": skipping}
        contenders["stock stream, skipped to there"] = stock
        times = side_by_side(contenders, rounds=given.rounds)
        saving = side_by_side({"save": lambda: json.dumps(first.state_dict())}, rounds=20)["save"]

    total = given.shards * given.rows
    lines = [
        f"{total} rows of 10 kB in {given.shards} shards, buffer {given.buffer}, batch {given.batch_size}",
        f"walking the order: {1 / walking:,.0f} rows a second; reading undecoded: {1 / reading:,.0f} rows a second",
        f"the state: {len(saved) / 1000:.1f} kB, {saving} to make",
        *(f"first batch at {far / len(first):.0%} of a pass, {name}: {timing}" for name, timing in times.items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
