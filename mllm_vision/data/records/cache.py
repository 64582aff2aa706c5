"""Files in the cache of `datasets` that one process of a machine writes and all others map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def cached(name: str, use: Callable[[Path], _T], what: str) -> _T:
    """What `use(path)` returns, in one process at a time: the first writes files that begin with `path`, others find
    them.

    Args:
        name: holds a hash of everything the files depend on.
        use: writes the files unless they are there whole, and opens them.
        what: is written, for the error.

    Raises:
        OSError: the cache cannot be written.
    """
    import datasets
    from filelock import FileLock

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mllm_vision"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return use(folder / name)
    except FileNotFoundError:
        raise  # an image of the data, not the cache
    except OSError as error:
        raise OSError(
            f"{what} cannot be written to {folder}: {error}; set HF_DATASETS_CACHE to a folder with room"
        ) from error
