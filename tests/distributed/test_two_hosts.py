"""Two hosts, each a network namespace with its own address and launcher, over gloo: they train as one process does,
and when one of them dies the other ends too, within the timeout of a collective and five seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_hosts_work
from safetensors.torch import load_file

DRIVER = Path(__file__).with_name("two_hosts_driver.py")
# a user that is not root gets the rights for namespaces from a user namespace of its own
NAMESPACES = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
NAMESPACES += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]


def two_hosts(folder: Path, mode: str) -> dict:
    """What the driver reports; skips where this system lets nobody make namespaces."""
    missing = [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"two hosts need {', '.join(missing)}")
    done = subprocess.run(
        [*NAMESPACES, sys.executable, str(DRIVER), str(folder), mode], capture_output=True, text=True, timeout=280
    )
    if done.returncode == 4 or "Operation not permitted" in done.stderr or "unshare failed" in done.stderr:
        pytest.skip(f"this system makes no network namespaces: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_hosts_train_as_one_process_and_end_when_a_rank_is_killed(tmp_path):
    report = two_hosts(tmp_path, "kill")
    logs = {host: entry["log"] for host, entry in report.items()}
    assert "ranks [(0, 'host-a'), (1, 'host-b')]" in logs["a"], logs["a"][-2000:]
    alone = two_hosts_work.train(tmp_path / "alone", two_hosts_work.ROWS)
    together = load_file(tmp_path / "trained.safetensors")
    assert set(together) == set(alone)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")

    for host, entry in report.items():
        assert entry["code"] not in (0, None), logs[host][-2000:]
        assert entry["seconds"] < two_hosts_work.TIMEOUT + 5, (host, entry["seconds"], logs[host][-2000:])
    assert "error: rank 0 lost another rank: it ended, or did not answer within --ddp_timeout" in logs["a"]
    assert "start again with --resume" in logs["a"] and "SIGKILL" in logs["b"]


@pytest.mark.slow
def test_a_cut_wire_ends_both_hosts(tmp_path):
    report = two_hosts(tmp_path, "cut")
    for host, entry in report.items():
        assert entry["code"] not in (0, None), entry["log"][-2000:]
        assert entry["seconds"] < two_hosts_work.TIMEOUT + 5, (host, entry["seconds"], entry["log"][-2000:])
        assert "lost another rank" in entry["log"] and "start again with --resume" in entry["log"]
