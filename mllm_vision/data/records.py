"""Records: loading tables of pictures and text from anything `datasets` reads, and finding their columns.

Pictures are never decoded here: they stay encoded bytes or paths, and are decoded where they are transformed
(twenty times as many rows a second go by undecoded).
"""

from __future__ import annotations

import glob
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .columns import IMAGE_NAMES, bind_columns, column_kind

__all__ = ["bind_columns", "load_records"]

logger = logging.getLogger(__name__)

_BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class UsualSplit:
    """A split that the user did not name: `name` where there is one, else the only split of local data.

    Attributes:
        name: "test", "validation" ...
        flag: what names another, for the message where there are several and none has this name.
    """

    name: str
    flag: str


def load_records(
    name_or_path: str | Path,
    *,
    split: str | UsualSplit = "train",
    config_name: str | None = None,
    max_rows: int | None = None,
    image_root: str | Path | None = None,
) -> Any:
    """A map-style `datasets.Dataset` from a file, a glob, a folder or a Hub id; pictures stay undecoded.

    Args:
        name_or_path: a Parquet, JSONL, JSON (LLaVA's list too), CSV/TSV or Arrow file, a WebDataset `.tar`; a glob
            of such files; a folder of them, of pictures (class folders, or `metadata.jsonl` with `file_name`), or
            one written by `save_to_disk`; or a Hub data set id.
        split: as in `datasets`, slices included ("train[:1000]"). A file or glob is one split and only takes the
            slice. In a folder `<split>.parquet` (or .jsonl ...) is taken where it exists. A `UsualSplit` gives way to
            the only split of a folder that has another one.
        config_name: the configuration of a Hub data set.
        max_rows: only the first rows.
        image_root: what relative picture paths start from; otherwise the folder of the file that names them.

    Raises:
        FileNotFoundError: no such path, split file or picture; ConnectionError: the Hub is out of reach.
        ValueError: an empty data set, an unknown split or file type, a file that cannot be parsed.
    """
    if not str(name_or_path).strip():
        raise ValueError("no data set was named: pass a file, a folder or a Hub id (--dataset_name)")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1")
    _count_no_downloads()
    usual = split if isinstance(split, UsualSplit) else None
    split = usual.name if usual is not None else split
    base = re.split(r"[\[+]", split, maxsplit=1)[0]
    path = Path(name_or_path).expanduser()
    files = _local_files(path, str(name_or_path), base)
    if files is None:
        dataset = _from_hub(str(name_or_path), config_name, split)
        folder: Path | None = None
    elif not files:
        dataset, folder = _from_folder(path, split, usual), path
    else:
        dataset, folder = _from_files(files, base, split), files[0].parent
    if len(dataset) == 0:
        raise ValueError(f"{name_or_path} (split {split!r}) is empty: it has no rows")
    if max_rows is not None and max_rows < len(dataset):
        dataset = dataset.select(range(max_rows))
    dataset = _hoist_json(dataset)
    dataset = _undecoded(dataset)
    return _resolve_paths(dataset, folder, Path(image_root).expanduser() if image_root is not None else None)


def _count_no_downloads() -> None:
    """`datasets` reports every load, of a local file too, to a counter on the net; we open no connection unasked."""
    import datasets

    if "HF_UPDATE_DOWNLOAD_COUNTS" not in os.environ:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


# -- finding and reading ------------------------------------------------------------------------------------------


def _local_files(path: Path, name: str, base: str) -> list[Path] | None:
    """The data files to read; [] when the folder is for `datasets` to make out; None for a Hub id."""
    if glob.has_magic(name):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if not files:
            raise FileNotFoundError(f"no file matches {name!r} (working folder: {Path.cwd()})")
        return files
    if path.is_file():
        return [path]
    if path.is_dir():
        for word in _SPLITS.get(base, (base,)):
            for suffix in _BUILDERS:
                if (path / f"{word}{suffix}").is_file():
                    return [path / f"{word}{suffix}"]
        tars = sorted(path.glob("*.tar"))

        def of(*words: str) -> list[Path]:
            return [tar for tar in tars if re.search(rf"(^|[^a-z])({'|'.join(words)})", tar.stem)]

        # Shards that are named for other splits are not this one: `datasets` says which there are.
        others = of(*(word for words in _SPLITS.values() for word in words))
        return of(*_SPLITS.get(base, (base,))) or ([] if others else tars)
    looks_local = (
        name.startswith((".", "/", "~", "\\")) or path.suffix in (*_BUILDERS, *_PICTURES) or name.count("/") > 1
    )
    if looks_local:
        raise FileNotFoundError(f"{name!r} does not exist (working folder: {Path.cwd()})")
    return None


def _from_files(files: list[Path], base: str, split: str) -> Any:
    from datasets import load_dataset

    kinds = {file.suffix.lower() for file in files}
    builders = {_BUILDERS.get(kind) for kind in kinds}
    if len(builders) != 1 or None in builders:
        raise ValueError(
            f"{files[0]}: cannot read files of type {', '.join(sorted(kinds))}; "
            f"give one of {', '.join(_BUILDERS)} or a folder of pictures"
        )
    options = {"sep": "\t"} if kinds == {".tsv"} else {}
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty (0 bytes)")
    with _explained(f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")):
        return load_dataset(builders.pop(), data_files={base: [str(f) for f in files]}, split=split, **options)


def _from_folder(path: Path, split: str, usual: UsualSplit | None) -> Any:
    from datasets import load_dataset, load_from_disk

    if not any(path.iterdir()):
        raise FileNotFoundError(f"the folder {path} is empty")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with _explained(str(path)):
            saved = load_from_disk(str(path))
        if hasattr(saved, "column_names") and not isinstance(saved.column_names, dict):
            return saved
        if usual is None and split not in saved:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(repr, saved))}")
        return saved[split] if usual is None else _usual_split(path, saved, usual)
    with _explained(str(path)):
        loaded = load_dataset(str(path), split=None if usual else split)
    return loaded if usual is None else _usual_split(path, loaded, usual)


def _usual_split(path: Path, splits: Any, usual: UsualSplit) -> Any:
    """The split of that name, or the only one, which is told: it may be what was trained on."""
    if usual.name in splits:
        return splits[usual.name]
    if len(splits) > 1:
        raise ValueError(
            f"{path} has no split {usual.name!r}; it has {', '.join(map(repr, splits))}: name one with {usual.flag}"
        )
    (only,) = splits
    logger.warning("%s has no split %r; its only one, %r, is taken", path, usual.name, only)
    return splits[only]


def _from_hub(name: str, config_name: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split)
    except ValueError:
        raise  # names the configurations or splits there are
    except (FileNotFoundError, OSError) as error:
        message = (
            f"{name!r} is no file or folder here (working folder: {Path.cwd()}), and as a Hub data set it could not be "
            f"loaded: {error}. Check the name; offline (HF_HUB_OFFLINE) only data sets already in the cache load."
        )
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(message) from error


class _explained:
    """Turns the errors of `datasets` about a local path into a ValueError that names it."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        if "corresponds to no data" in str(error):
            raise ValueError(f"{self.what} is empty: it has no rows") from error
        cause = error.__cause__ or error
        detail = f"{cause}" if cause is error else f"{error} {cause}"
        remedy = " Name it with the flag that ends in _split." if "unknown split" in detail.lower() else ""
        raise ValueError(f"{self.what} cannot be read as a data set: {detail}{remedy}") from error


# -- pictures stay as they are ------------------------------------------------------------------------------------


def _hoist_json(dataset: Any) -> Any:
    """A WebDataset's `json` column becomes columns of its own, unless the name is taken."""
    if not isinstance(dataset.features.get("json"), dict):
        return dataset
    fields = [name for name in dataset.features["json"] if name not in dataset.column_names]
    column = dataset.select_columns(["json"])["json"]
    for name in fields:
        dataset = dataset.add_column(name, [row[name] if row else None for row in column])
    return dataset.remove_columns("json")


def _undecoded(dataset: Any) -> Any:
    from datasets import Image, List

    for name, feature in dataset.features.items():
        if isinstance(feature, Image) and feature.decode:
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image) and feature.feature.decode:
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def _resolve_paths(dataset: Any, folder: Path | None, image_root: Path | None) -> Any:
    """Relative picture paths in text columns become absolute; the first one must exist."""
    root = image_root or folder
    if root is None:
        return dataset
    if image_root is not None and not image_root.is_dir():
        raise FileNotFoundError(f"image_root={image_root} is no folder")
    for name, feature in dataset.features.items():
        if name.lower() not in IMAGE_NAMES:
            continue
        kind = column_kind(feature)
        if kind not in ("text", "texts"):
            continue
        values = dataset.select_columns([name])[name][:]
        paths = [value if isinstance(value, list) else [value] for value in values]
        first = next((path for row in paths for path in row if path), None)
        if first is None or "://" in first:
            continue
        if not (root / first).is_file():
            if name.lower() not in ("image", "images"):
                continue  # a column of names that mean something else
            raise FileNotFoundError(
                f"column {name!r} names the picture {first!r}, but {root / first} does not exist; "
                "set --image_root to the folder that the paths start from"
            )
        joined = [[str(root / path) if path else path for path in row] for row in paths]
        column = [row if isinstance(value, list) else row[0] for row, value in zip(joined, values, strict=True)]
        order = dataset.column_names
        dataset = dataset.remove_columns(name).add_column(name, column).select_columns(order)
    return dataset
