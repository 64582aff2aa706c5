"""Hub data sets that are plain files: fetched unchanged and read like a local folder, by the same rules.

`datasets` reads the others: Parquet, and what names its configurations and splits itself. (Of plain files its builders
lose rows: CSV texts that look missing, images with certain words in their names, the second image type of a tar.)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath

from mllm_vision.data.records.readers.files import Found, hidden, kind_of


def not_on_hub(name: str, error: Exception) -> str:
    """The message for a name that is neither a local path nor a readable Hub data set."""
    return (
        f"{name!r} is not a file or folder here (working folder: {Path.cwd()}), and reading it as a Hub data set "
        f"failed: {error}. Check the name; offline (HF_HUB_OFFLINE) only data sets already in the cache load."
    )


def plain_repository(name: str) -> Found | None:
    """The files of a Hub data set, fetched into the usual cache; None where it is one for `datasets`, or out of reach.

    Offline a data set is found that was fetched whole before.
    """
    import datasets
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    key = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
    note = Path(datasets.config.HF_DATASETS_CACHE) / "mllm_vision" / f"hub-{key}.json"
    try:
        info = HfApi().dataset_info(name)
    except HFValidationError:
        return None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return _noted(note)
    files = sorted(sibling.rfilename for sibling in info.siblings or [])
    if (info.card_data is not None and info.card_data.get("configs")) or not _plain(files):
        return None
    files = [file for file in files if kind_of(file) and not any(map(hidden, PurePosixPath(file).parts))]
    folder = snapshot_download(name, repo_type="dataset", revision=info.sha, allow_patterns=files)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"folder": str(folder), "files": files}), encoding="utf-8")
    return Found(Path(folder), files)


def _plain(files: list[str]) -> bool:
    """Whether all data are in files that say nothing of their own: no Parquet, no Arrow, no script."""
    kinds = {kind_of(file) for file in files} - {""}
    return bool(kinds) and not kinds & {"parquet", "arrow"} and not any(file.endswith(".py") for file in files)


def _noted(note: Path) -> Found | None:
    """What was fetched before, if all of it is still there."""
    if not note.is_file():
        return None
    found = json.loads(note.read_text(encoding="utf-8"))
    folder = Path(found["folder"])
    return Found(folder, found["files"]) if all((folder / file).is_file() for file in found["files"]) else None
