"""Every case of this folder on a real GPU: the CPU's numbers, the stalls as CUDA counts them, BatchNorm of two.

python -m pytest -m gpu tests/device
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cases

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", cases.CASES)
def test_a_case_gives_the_numbers_of_the_cpu_and_a_step_stalls_the_queue_once_at_most(name):
    assert torch.cuda.is_available(), "no GPU is visible to torch"
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # convolutions as on the CPU
    try:
        torch.manual_seed(0)
        expected = cases.CASES[name](lambda module: module, lambda batch: batch)
        torch.manual_seed(0)
        found = cases.CASES[name](
            lambda module: module.to("cuda"),
            lambda batch: {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in batch.items()},
        )
    finally:
        torch.backends.cudnn.allow_tf32 = before
    if "patches left out" not in name:  # the devices' generators draw other patches
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("method ")])
def test_cuda_itself_counts_one_stall_a_step(name, monkeypatch):
    """`set_sync_debug_mode` warns of every wait for the device: in the last step of a method there is one at most."""
    stalls: list[str] = []

    class Counting:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
            self.caught = warnings.catch_warnings(record=True)
            self.seen = self.caught.__enter__()
            warnings.simplefilter("always")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")
            stalls.extend(str(each.message) for each in self.seen if "synchroniz" in str(each.message))
            self.caught.__exit__(*error)

    monkeypatch.setattr(cases.stand_in, "counting", Counting)
    cases.CASES[name](
        lambda module: module.to("cuda"),
        lambda batch: {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in batch.items()},
    )
    assert len(stalls) <= 1, stalls


BATCH_NORM = """
import os, torch, torch.distributed as dist
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
from mllm_vision.modules.batch_norm import GlobalBatchNorm2d
torch.manual_seed(0)
whole = torch.randn(6, 4, 3, 3, device="cuda")
for norm in (GlobalBatchNorm2d(4), GlobalBatchNorm2d(4, affine=False)):
    plain = torch.nn.BatchNorm2d(4, affine=norm.affine).cuda()
    norm.cuda()
    x, y = whole.clone().requires_grad_(), whole.clone()[rank * 3 : rank * 3 + 3].requires_grad_()
    one, two = plain(x), norm(y)
    weights = torch.randn(6, 4, 3, 3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    (one * weights).sum().backward()
    (two * weights[rank * 3 : rank * 3 + 3]).sum().backward()
    torch.testing.assert_close(two, one[rank * 3 : rank * 3 + 3])
    torch.testing.assert_close(y.grad, x.grad[rank * 3 : rank * 3 + 3])
    torch.testing.assert_close(norm.running_var, plain.running_var)
dist.destroy_process_group()
print("equal")
"""


def test_batch_norm_of_two_gpus_is_that_of_one(tmp_path):
    script = tmp_path / "norms.py"
    script.write_text(BATCH_NORM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("equal") == 2, done.stderr[-3000:]
