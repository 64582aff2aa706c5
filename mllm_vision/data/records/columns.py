"""Which column plays which role: bound by name, then by type where only one fits, never by order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from mllm_vision.data.images.files import images_of
from mllm_vision.data.records.sampling import by_selected_row, only_columns, rows_of

_NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "images", "img", "picture", "photo", "pixel_values", "jpg", "jpeg", "png", "webp"),
        *("image_path", "image_file", "file_name", "filename", "filepath", "path", "image_bytes", "image_url"),
    ),
    "caption": (
        *("caption", "captions", "text", "texts", "txt", "sentence", "sentences", "description", "descriptions"),
        *("raw", "alt_text", "title"),
    ),
    "question": ("question", "questions", "query", "prompt", "instruction"),
    "answer": ("answer", "answers", "response", "output", "completion", "multiple_choice_answer"),
    "messages": ("messages", "chat", "dialogue"),
    "conversations": ("conversations", "conversation"),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "pairs": ("texts", "qa", "qa_pairs", "pairs"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "label": ("label", "labels", "class", "fine_label", "category", "target", "cls"),
}
ROLES = tuple(_NAMES)
ROLE_NAMES = frozenset(name for names in _NAMES.values() for name in names)
IMAGE_NAMES = _NAMES["image"]
TEXT_NAMES = frozenset(
    name for role in ("caption", "question", "answer", "label") for name in _NAMES[role]
)  # values there are texts, even if they end like file names
TURN_NAMES = frozenset(name for role in ("messages", "conversations") for name in _NAMES[role])
_PATH_NAMES = IMAGE_NAMES[IMAGE_NAMES.index("image_path") :]


def bind_columns(dataset: Any, roles: Sequence[str], overrides: dict[str, str] | None = None) -> dict[str, str]:
    """Which column plays which role: by name, then by type where exactly one column fits; never by order.

    Args:
        dataset: a `datasets.Dataset`, or a list of dicts.
        roles: among image, caption, question, answer, messages, conversations, label; "label?" may be missing.
        overrides: role -> column, named by the user; checked for existence and type.

    Returns:
        role -> column; an optional role that was not found is left out.

    Raises:
        ValueError: an empty data set, an unknown role, a missing, ambiguous or wrong column; lists what there is.
    """
    rows_of(dataset)
    features = features_of(dataset)
    found = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    bound: dict[str, str] = {}
    wanted = [role.rstrip("?") for role in roles]
    overrides = {role: name for role, name in (overrides or {}).items() if name}
    for role in [*wanted, *overrides]:
        if role not in _NAMES:
            raise ValueError(f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
    for role in wanted:
        if role in overrides:
            bound[role] = _checked(overrides[role], role, features, found)
    lower = {name.lower(): name for name in reversed(list(features))}
    for role in wanted:
        if role in bound:
            continue
        for candidate in _NAMES[role]:
            if role == "image" and candidate in _PATH_NAMES and _images(features):
                break  # beside a column of images, a column of names is something else
            name = lower.get(candidate)
            if name is not None and name not in bound.values() and _fits(role, features[name]):
                bound[role] = name
                break
    for role in roles:
        wanted_role = role.rstrip("?")
        if wanted_role in bound:
            continue
        fitting = [
            name
            for name, feature in features.items()
            if name not in bound.values() and _by_type(wanted_role, name, feature)
        ]
        if len(fitting) == 1:
            bound[wanted_role] = fitting[0]
        elif not role.endswith("?"):
            why = f"several columns could be it ({', '.join(fitting)})" if fitting else "none fits by name or type"
            raise ValueError(
                f"no column found for {wanted_role}: {why}. The columns are: {found}. "
                f"Name it with --{wanted_role}_column"
            )
    return {role: bound[role] for role in wanted if role in bound}


def _checked(name: str, role: str, features: dict[str, Any], found: str) -> str:
    """The column the user names for a role, if there is one that can serve."""
    if name not in features:
        near = get_close_matches(name, features, n=1)
        raise ValueError(
            f"column {name!r} (for {role}) does not exist"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" The columns are: {found}"
        )
    if not _fits(role, features[name]):
        raise ValueError(
            f"column {name!r} ({_type_name(features[name])}) cannot serve as {role}. The columns are: {found}"
        )
    return name


def features_of(dataset: Any) -> dict[str, Any]:
    """Column -> its `datasets` feature, or the first value that is not null in a list of dicts."""
    if hasattr(dataset, "features") and dataset.features is not None:
        return dict(dataset.features)
    first = dataset[0]
    if not isinstance(first, dict):
        raise ValueError(f"rows must be dicts of columns, got {type(first).__name__}")
    rows = [dataset[i] for i in range(min(len(dataset), 16))]
    return {name: next((row[name] for row in rows if row.get(name) is not None), None) for name in first}


def column_kind(feature: Any) -> str:
    """A column's type as one word, from a `datasets` feature or from a value of a plain list of dicts."""
    from datasets import ClassLabel, Image, LargeList, List, Value

    try:
        from datasets import Json
    except ImportError:  # older releases have no such feature
        Json = type(None)
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, Value):
        plain = {"string": "text", "large_string": "text", "binary": "bytes", "large_binary": "bytes"}
        return plain.get(feature.dtype, "integer" if "int" in feature.dtype else "other")
    if isinstance(feature, Json) and feature is not None:
        return "any"
    if isinstance(feature, List | LargeList):
        return _list_kind(column_kind(feature.feature))
    if isinstance(feature, dict):
        keys = set(feature)
        if keys & {"content", "value", "text"} and keys & {"role", "from"}:
            return "role turn" if "role" in keys else "from turn"
        if any(set(pair) <= keys for pair in PAIRS):
            return "pair turn"
        if keys and keys <= {"bytes", "path", "url"}:
            return "image"
        return "other"
    if feature is None:
        return "any"
    if isinstance(feature, str):
        return "text"
    if isinstance(feature, bytes):
        return "bytes"
    if isinstance(feature, int):
        return "integer"
    if isinstance(feature, list | tuple):
        return _list_kind(column_kind(feature[0]) if feature else "any")
    return "image" if hasattr(feature, "convert") and hasattr(feature, "size") else "other"


def _list_kind(inner: str) -> str:
    return {"text": "texts", "image": "images", "bytes": "images", "any": "any"}.get(inner, f"list of {inner}")


PAIRS = (("user", "assistant"), ("question", "answer"), ("human", "gpt"), ("human", "assistant"))  # asked, answered
_TURNS = ("list of role turn", "list of from turn", "list of pair turn", "role turn", "from turn", "any")
_ALLOWED = {
    "image": ("image", "images", "bytes", "text", "texts", "any"),
    "caption": ("text", "texts", "integer", "list of integer", "any"),
    "question": ("text", "texts", "integer", "class", "other", "list of class", "any"),
    "answer": (
        *("text", "texts", "integer", "class", "other", "any"),
        *("list of other", "list of integer", "list of class", "list of texts", "list of any"),
    ),
    "messages": (*_TURNS, "text"),
    "conversations": (*_TURNS, "text"),
    "prompt": _TURNS,
    "completion": (*_TURNS, "text"),
    "pairs": ("list of pair turn", "pair turn", "any"),
    "input": ("text", "integer", "class", "other", "any"),
    "system": ("text",),
    "history": ("list of texts", "list of pair turn", "list of other", "list of any", "any"),
    "label": ("class", "integer", "text", "any"),
}


def _images(features: dict[str, Any]) -> bool:
    return any(column_kind(feature) in ("image", "images") for feature in features.values())


def _fits(role: str, feature: Any) -> bool:
    if role == "label" and isinstance(feature, float):
        return True
    if role == "label" and re.match(r"bool|float|double|null", str(getattr(feature, "dtype", ""))):
        return True  # whole numbers with gaps, true and false, nothing at all: `label_value` reads each cell
    return column_kind(feature) in _ALLOWED[role]


def _by_type(role: str, name: str, feature: Any) -> bool:
    """Whether the type alone determines the role, for columns with unusual names."""
    kind = column_kind(feature)
    if role == "image":
        return kind in ("image", "images")
    if role == "caption":
        odd = re.search(r"(^|_)(id|url|path|file|name|key|split|question|answer|label)s?($|_)", name.lower())
        return kind in ("text", "texts") and not odd and name.lower() not in TURN_NAMES and not name.startswith("__")
    if role == "label":
        return kind == "class"
    types = {"messages": "role turn", "conversations": "from turn", "pairs": "pair turn"}
    if role in types:
        return kind == f"list of {types[role]}"
    return False


def _type_name(feature: Any) -> str:
    kind = "no type known" if feature is None else column_kind(feature)
    return str(getattr(feature, "dtype", None) or type(feature).__name__) if kind == "other" else kind


def further_images(dataset: Any, column: str | None) -> int:
    """How many images follow the first one in the lists of an image column; of a stream or a plain list: 0."""
    if column is None or not hasattr(dataset, "features") or column not in dataset.column_names:
        return 0
    return int(np.maximum(image_counts(dataset, column) - 1, 0).sum())


def image_counts(records: Any, column: str) -> np.ndarray:
    """How many images each row's image column holds (nulls do not count), `[rows]` int64; images are not read or
    copied where Arrow has the answer."""
    kind = column_kind(records.features[column]) if hasattr(records, "features") else "any"
    if kind == "any":
        return np.asarray([len(images_of(record[column])) for record in only_columns(records, [column])])
    chosen = only_columns(records, [column])
    counts = [_counts(chunk) for chunk in chosen.data.table.column(0).chunks]
    return by_selected_row(chosen, np.concatenate([np.zeros(0, np.int64), *counts]))


def _counts(values: Any) -> np.ndarray:
    """Images in each row of an Arrow array of images, paths, or lists of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return _there(values).astype(np.int64)
    rows = np.asarray(pc.list_parent_indices(values), dtype=np.int64)
    return np.bincount(rows, _there(pc.list_flatten(values)), len(values)).astype(np.int64)


def _there(values: Any) -> np.ndarray:
    """Which values are images: not null, not blank, a struct with any such field."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(values.type):
        fields = [_there(pc.struct_field(values, field.name)) for field in values.type]
        return np.logical_or.reduce(fields) & np.asarray(pc.is_valid(values))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.asarray(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(values), ""), False))
    return np.asarray(pc.is_valid(values))
