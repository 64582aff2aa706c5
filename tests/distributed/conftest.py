"""The pool of gloo workers, one for the whole session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def gloo():
    from gloo_pool import GlooPool

    pool = GlooPool()
    yield pool
    pool.close()
