"""Everything on a device that is not the CPU, without one: the CPU's numbers, nothing left behind, nothing read back.

`stand_in.py` is the device, `recorded.py` the collectives that look at what they get, `cases.py` what runs. They change
torch for a whole process, so two processes are started, which are also the two ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What both processes told of each case."""
    folder = tmp_path_factory.mktemp("device")
    meeting = f"file://{folder / 'meeting'}"
    command = [sys.executable, str(HERE / "run_cases.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (folder / "other.txt").open("w") as heard:
        other = subprocess.Popen([*command, "1", meeting], env=env, stdout=heard, stderr=subprocess.STDOUT)
        try:
            done = subprocess.run([*command, "0", meeting], env=env, capture_output=True, text=True, timeout=500)
        finally:
            if other.poll() is None and "done" not in locals():
                other.kill()
            other.wait(timeout=120)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    beside = [json.loads(line) for line in (folder / "other.txt").read_text().splitlines() if line.startswith("{")]
    told = [f"{line['kind']}, {line['name']}: {line['error']}" for line in found + beside if "error" in line]
    assert not told, "\n".join(told)
    assert done.returncode == other.returncode == 0, done.stderr[-3000:] + (folder / "other.txt").read_text()[-3000:]
    return found


def test_every_case_gives_the_numbers_of_the_cpu(lines):
    alone = [line for line in lines if line["kind"] == "alone"]
    assert len(alone) > 35
    for line in alone:
        assert line["found"] == pytest.approx(line["expected"], rel=2e-3, abs=1e-4), line["name"]


def test_two_ranks_give_the_numbers_of_one_with_every_tensor_on_its_device(lines):
    together = [line for line in lines if line["kind"] == "two ranks"]
    assert len(together) > 15
    for line in together:
        if line["name"] == "method moco_v2 of a ResNet":  # each rank's BatchNorm sees its own rows: other numbers
            continue
        expected = line["expected"][: len(line["found"])]
        assert line["found"] == pytest.approx(expected, rel=2e-3, abs=1e-4), line["name"]
    assert lines[-1]["collectives"]["all_reduce"] > 50


def test_a_step_of_a_method_reads_back_one_value_at_most(lines):
    for line in lines:
        if line.get("name", "").startswith(("method", "gradient cache")):
            assert sum(line["reads"].values()) <= 1, (line["kind"], line["name"], line["reads"])


def test_the_counter_counts_and_the_device_refuses(lines):
    """Where a value is known to be read it is seen: the padding of texts, and the language stage's own questions."""
    reads = {line["name"]: line["reads"] for line in lines if line.get("kind") == "alone"}
    assert sum(reads["method clip"].values()) == 1 and sum(reads["language connector"].values()) >= 2
    code = (
        "import torch, stand_in; device = stand_in.register()\n"
        "with stand_in.Machine():\n"
        "    try: torch.ones(2, device=device) + torch.ones(2)\n"
        "    except RuntimeError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert "refused" in done.stdout and "cpu" in done.stdout, done.stderr
