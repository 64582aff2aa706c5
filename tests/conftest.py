"""What every test shares: one thread, fixed seeds, no network, the shared data, fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):  # `import tiny` and `import recipes...` from any test
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every test, whatever ran before; torch only where a test loaded it."""
    import random

    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: MLLM_VISION_DATA, or shared/data beside the repository."""
    named = os.environ.get("MLLM_VISION_DATA")
    path = Path(named) if named else ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set MLLM_VISION_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def run_python():
    """`run_python(code, **env)`: run code in a fresh process in a folder without our package.

    Returns what it printed. `mllm_vision` cannot be imported there unless PYTHONPATH says so or it is
    installed; pass `block_package=True` to make importing it an error. A non-zero exit fails the test.
    """
    import tempfile

    def run(code: str, *, block_package: bool = False, timeout: float = 180, **env: str) -> str:
        if block_package:
            code = "import sys; sys.modules['mllm_vision'] = None\n" + code
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                cwd=folder,
                timeout=timeout,
                env={**os.environ, **{name: str(value) for name, value in env.items()}},
            )
        if done.returncode:
            pytest.fail(f"the fresh process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; left out unless asked for with -m slow (make test-slow)")
    config.addinivalue_line("markers", "gpu: needs one or two GPUs; left out unless asked for with -m gpu")
