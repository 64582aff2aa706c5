"""Processes that start warm, and numbered rows: for the tests of resuming and of signals."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fork() -> Iterator[Any]:
    """A fork server that has loaded resume_work.py."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resume_work"])
    with pytest.MonkeyPatch.context() as patch:  # Python's fork server does not pass sys.path on
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        forkserver.ensure_running()
        yield context


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 numbered rows in three shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("numbers")
    for number, (start, stop) in enumerate(((0, 11), (11, 27), (27, 38))):
        table = pa.table({"row": list(range(start, stop))})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=4)
    return folder
