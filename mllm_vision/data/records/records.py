"""Records: the rows of files, folders, patterns and Hub ids as one map-style data set.

Images are never decoded here: they stay encoded bytes or paths, and are decoded where they are transformed (twenty
times as many rows a second go by undecoded).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_vision.data.records.columns import bind_columns
from mllm_vision.data.records.readers.arrow import undecoded, values_of
from mllm_vision.data.records.readers.files import LeftOut, find, usual_name
from mllm_vision.data.records.readers.folders import Contents, contents, image_table
from mllm_vision.data.records.readers.hub_files import not_on_hub, plain_repository
from mllm_vision.data.records.readers.table_cache import fingerprint, read_tables
from mllm_vision.data.records.readers.tables import ends_whole, filled, may_hold_paths
from mllm_vision.data.records.sampling import draw_rows

__all__ = ["UsualSplit", "bind_columns", "load_records"]

logger = logging.getLogger(__name__)


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
    """A map-style `datasets.Dataset` from a file, a pattern, a folder or a Hub id; images stay undecoded.

    Args:
        name_or_path: a Parquet, JSONL, JSON, CSV/TSV or Arrow file (texts also packed: .gz), an uncompressed
            WebDataset `.tar`; a pattern of such files; a folder of them, of images (in class folders or not), or one
            written by `save_to_disk`; or a Hub data set id. docs/data.md has the rules.
        split: as in `datasets`, slices and sums included ("train[:1000]", "train+validation"). A file or a pattern is
            one split and only takes the slice. A `UsualSplit` gives way to the only split of a folder that has
            another one.
        config_name: the configuration of a Hub data set.
        max_rows: at most so many rows, drawn at random, the same ones every time: the first ones of a sorted set are of
            one class. In the order of the data.
        image_root: what relative image paths start from; otherwise the folder of the file that names them.

    What is left out (other files, links, rows that cannot be parsed) is reported in one line.

    Raises:
        FileNotFoundError: no such path, split file or image; ConnectionError: the Hub is out of reach.
        ValueError: an empty data set, an unknown split or file type, a file that cannot be parsed.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1")
    root = Path(image_root).expanduser() if image_root is not None else None
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"image_root={image_root} is not a directory")
    _count_no_downloads()
    left_out = LeftOut()
    path = Path(str(name_or_path).strip()).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        dataset = _undecoded(_saved(path, split))
    else:
        found = find(name_or_path, left_out)
        if found is None and config_name is None:
            found = plain_repository(str(name_or_path).strip())
        if found is None:
            dataset = _undecoded(_from_hub(str(name_or_path).strip(), config_name, split))
        elif not found.files:
            but = " but for hidden files" if left_out.counts else ""
            raise FileNotFoundError(f"the folder {found.root} is empty{but}")
        else:
            dataset = _from_files(found, split, root, left_out)
    left_out.report(name_or_path)
    if len(dataset) == 0:
        raise ValueError(f"{name_or_path} (split {_name(split)!r}) is empty: it has no rows")
    if max_rows is not None and max_rows < len(dataset):
        dataset = dataset.select(draw_rows(len(dataset), max_rows))
    dataset.left_out = dict(left_out.counts)
    return dataset


def _name(split: str | UsualSplit) -> str:
    return split.name if isinstance(split, UsualSplit) else split


def _count_no_downloads() -> None:
    """`datasets` reports every load, of a local file too, to a counter on the net; we open no connection unasked."""
    import datasets

    if "HF_UPDATE_DOWNLOAD_COUNTS" not in os.environ:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _from_files(found: Any, split: str | UsualSplit, root: Path | None, left_out: LeftOut) -> Any:
    from datasets import concatenate_datasets

    bases = [re.split(r"\[", part, maxsplit=1)[0].strip() for part in _name(split).split("+")]
    there = contents(found, bases[0], left_out)
    if isinstance(split, UsualSplit):
        if "" not in there.splits:
            return _read(there, _usual_split(found.root, there.splits, split), root, left_out)
        if not found.named:
            _usual_split(found.root, ["train"], split)  # warns
        return _read(there, "", root, left_out)
    splits: dict[str, Any] = {}
    for base in dict.fromkeys(bases):
        key = "" if "" in there.splits else usual_name(base)
        if key not in there.splits or (key == "" and not found.named and usual_name(base) != "train"):
            known = [each or "train" for each in there.splits]
            raise ValueError(
                f"{found.root} has no split {base!r}; it has {', '.join(map(repr, known))}. Name it with the flag that "
                "ends in _split."
            )
        splits[base] = _read(there, key, root, left_out)
    if _name(split) in splits:
        return splits[_name(split)]
    from datasets import ReadInstruction

    wanted = ReadInstruction.from_spec(_name(split)).to_absolute({base: len(rows) for base, rows in splits.items()})
    parts = [splits[part.splitname].select(range(part.from_ or 0, part.to or 0)) for part in wanted]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _read(there: Contents, split: str, root: Path | None, left_out: LeftOut) -> Any:
    """The rows of one split."""
    from datasets import Dataset, DatasetInfo

    files = there.splits[split]
    if there.images:
        table, features = image_table(there, split, left_out)
        mark = fingerprint([file.encode() for file in files])
        return Dataset(table, info=DatasetInfo(features=features), fingerprint=mark)
    dataset = read_tables(there.root, files, root, left_out)
    _count_unnamed(there, dataset, left_out)
    return dataset


def _count_unnamed(there: Contents, dataset: Any, left_out: LeftOut) -> None:
    """Counts the images beside the tables that no row names."""
    if not there.loose or len(there.splits) > 1 or len(dataset) > 500_000:
        return
    named: set[str] = set()
    for column in dataset.data.table.columns:
        if may_hold_paths(column.type, "") and not filled(column):
            _gather(values_of(column), named)
    for file in there.loose:
        if os.path.join(os.path.abspath(there.root), file) not in named:
            left_out.add("images that no row names", file)


def _gather(value: Any, found: set[str]) -> None:
    """Every string in a value."""
    if isinstance(value, str):
        found.add(value)
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _gather(each, found)


def _saved(path: Path, split: str | UsualSplit) -> Any:
    """What `save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # whatever its files hold
        raise ValueError(f"{path} cannot be read as a data set: {type(error).__name__}: {error}") from error
    if isinstance(saved, Mapping) and isinstance(split, UsualSplit):
        saved = saved[_usual_split(path, saved, split)]
    elif isinstance(saved, Mapping):
        if split not in saved:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(repr, saved))}")
        saved = saved[split]
    for file in saved.cache_files:
        if not ends_whole(Path(file["filename"])):
            raise ValueError(f"{file['filename']} is cut off: its end has no mark; save the data set again")
    return saved


def _usual_split(path: Path, splits: Collection[str], usual: UsualSplit) -> str:
    """The split of that name, or the only one, which is reported: it may be what was trained on."""
    if usual.name in splits:
        return usual.name
    if len(splits) > 1:
        raise ValueError(
            f"{path} has no split {usual.name!r}; it has {', '.join(map(repr, splits))}: name one with {usual.flag}"
        )
    (only,) = splits
    logger.warning("%s has no split %r; its only split, %r, is used", path, usual.name, only)
    return only


def _from_hub(name: str, config_name: str | None, split: str | UsualSplit) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=_name(split))
    except ValueError:
        raise  # names the configurations or splits there are
    except (FileNotFoundError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(not_on_hub(name, error)) from error


def _undecoded(dataset: Any) -> Any:
    for name, feature in dataset.features.items():
        plain = undecoded(feature)
        if plain != feature:
            dataset = dataset.cast_column(name, plain)
    return dataset
