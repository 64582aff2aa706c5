"""What fails after the training fails on all ranks together, and none waits for another for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ending_work as work
import pytest
import tiny_runs

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_that_fails_on_one_rank_fails_on_all(gloo):
    first, second = gloo.run(2, work.agreed)
    assert first == [None, "rank 1: RuntimeError: no image here", 2.0, None]
    assert second == [None, "no image here", 2.0, None]


def test_a_rank_that_fails_inside_a_collective_frees_the_others(gloo):
    first, second = gloo.run(2, work.stuck, timeout=60)
    assert second["error"].startswith("ConnectionError: lonely failed on rank 1 (RuntimeError: no image here) and not")
    assert first["error"] != "NoneType: None" and first["seconds"] < 20


def test_a_row_that_one_rank_cannot_read_fails_the_evaluation_on_all(gloo):
    first, second = gloo.run(2, work.held_out)
    assert "rank 1: OSError: row 3 is gone" in first[0] and second[0] == "row 3 is gone"
    assert first[1] == second[1] > 0


@pytest.mark.slow
def test_a_run_of_two_ranks_ends_with_its_artifact(tmp_path):
    """By torchrun: the held-out rows of rank 1 are its own, and their image is gone when they are measured."""
    data = tiny_runs.write_data(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import os\nfrom recipes import align\nfrom mllm_vision.training.recipe import parser\n"
        "from mllm_vision.training.trainer import evaluating\n"
        "plain = evaluating.examine\n"
        "def examine(evaluator, model, step=0):\n"
        "    if step and os.environ['RANK'] == '1': raise OSError('the row is gone')\n"
        "    return plain(evaluator, model, step)\n"
        "evaluating.examine = examine\n"
        "from mllm_vision.training.recipe import ending\nending.PATIENCE = 3.0\n"
        "parser.run_recipe(align.main)\n"
    )
    words = tiny_runs.words("align", data, tmp_path / "run", per_device_train_batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode != 0 and "the row is gone" in done.stderr
    assert (tmp_path / "run" / "model" / "lineage.json").is_file()
    (missing, *_) = json.loads((tmp_path / "run" / "run.json").read_text())["missing"]
    assert missing["step"] == "evaluation of captions"
