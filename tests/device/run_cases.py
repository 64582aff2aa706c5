"""Runs every case on the CPU and on the stand-in device, in two processes of their own: one line of JSON a case.

cd tests/device
python run_cases.py 1 file:///tmp/meeting simclr & python run_cases.py 0 file:///tmp/meeting simclr
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import recorded  # noqa: E402
import stand_in  # noqa: E402
import torch  # noqa: E402


def run(names: list[str], expected: dict[str, list[float]], kind: str, device: torch.device) -> None:
    """Each case on the device, one line of what it gave beside what was expected of it."""
    import cases

    def move(batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}

    for name in names:
        torch.manual_seed(0)
        cases.READS.clear()
        began, told = time.process_time(), {"kind": kind, "name": name, "expected": expected.get(name)}
        try:
            with stand_in.Machine():
                told["found"] = cases.CASES[name](stand_in.place, move)
            told["reads"] = dict(cases.READS)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if stand_in.is_of_the_package(frame.filename)]
            at = own[-1] if own else frames[-1]
            told["error"] = f"{type(error).__name__}: {str(error)[:300]} at {at.filename}:{at.lineno} {at.line}"
        print(json.dumps(told | {"seconds": round(time.process_time() - began, 2)}), flush=True)
        if kind == "two ranks" and "error" in told:  # the other rank waits for this one
            sys.exit(1)


def main(rank: int, meeting: str, words: list[str]) -> None:
    """Rank 0 of two runs every case alone first; both run those of two ranks together."""
    torch.set_num_threads(1)
    stand_in.without_inference_mode()
    logging.disable(logging.CRITICAL)
    import cases

    names = [name for name in cases.CASES if not words or any(word in name for word in words)]
    expected: dict[str, list[float]] = {}
    if rank == 0:
        for name in names:  # before there is another device
            torch.manual_seed(0)
            expected[name] = cases.CASES[name](lambda module: module, lambda batch: batch)
    device = stand_in.register()
    if rank == 0:
        run(names, expected, "alone", device)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=meeting)
    recorded.record()
    run([name for name in names if name in cases.OF_RANKS], expected, "two ranks", device)
    print(json.dumps({"kind": "end", "collectives": recorded.CALLS}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
