"""Arrow tables as one data set: values of any mixture become columns, tables with other columns or types are united."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mllm_vision.data.records.readers.files import LeftOut

_NOT_ONE_TYPE = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError)
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def table_of(columns: Mapping[str, Sequence[Any]], rows: int) -> pa.Table:
    """A table of Python values; a column of mixed types is kept as JSON, which gives every value back as it was."""
    if not columns:
        return pa.table({"empty": pa.nulls(rows)})
    return pa.table({name: array_of(values) for name, values in columns.items()})


def array_of(values: Sequence[Any], kind: pa.DataType | None = None) -> Any:
    """Values as an Arrow array, of `kind` where it is given and can hold them."""
    if not isinstance(kind, pa.JsonType):
        try:
            return pa.array(values, kind)
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON may hold and no UTF-8 text can
            return array_of([_storable(value) for value in values], kind)
        except _NOT_ONE_TYPE:
            pass
    texts = [None if value is None else json.dumps(_storable(value), default=_plain) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _storable(value: Any) -> Any:
    """The value with what neither UTF-8 nor 64 bits can hold replaced: halves of surrogate pairs by a question mark,
    larger integers and infinities by their text, NaN by nothing."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, list | tuple):
        return [_storable(each) for each in value]
    if isinstance(value, dict):
        return {str(_storable(name)): _storable(each) for name, each in value.items()}
    return value


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def values_of(column: Any) -> list[Any]:
    """A column's Python values, those of a JSON column decoded."""
    values = column.to_pylist()
    if isinstance(column.type, pa.JsonType):
        return [None if value is None else json.loads(value) for value in values]
    return values


def plain_types(table: pa.Table) -> pa.Table:
    """The table without dictionaries (pandas' categories): their values instead."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            kind = field.type.value_type
            table = table.set_column(place, pa.field(field.name, kind), table.column(place).cast(kind))
    return table


def readable(table: pa.Table, bad: Callable[[str, Exception], Any]) -> tuple[pa.Table, dict[str, list[Any]]]:
    """(the table, column -> values) where the values are those of columns with texts that are not UTF-8, by `bad` in
    place of such a text; in the table it is null. Arrow does not look at texts that other programs wrote."""
    odd: dict[str, list[Any]] = {}
    for place, field in enumerate(table.schema):
        if not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
            continue
        column = table.column(place)
        try:
            for chunk in column.chunks:
                chunk.validate(full=True)
        except pa.ArrowInvalid:
            values = column.cast(_bytes_of(field.type)).to_pylist()
            odd[field.name] = [_decoded(data, field.name, bad) for data in values]
            kept = [value if isinstance(value, str) else None for value in odd[field.name]]
            table = table.set_column(place, field, pa.array(kept, field.type))
    return table, odd


def _bytes_of(kind: pa.DataType) -> pa.DataType:
    return pa.binary() if pa.types.is_string(kind) else pa.large_binary()


def _decoded(data: bytes | None, name: str, bad: Callable[[str, Exception], Any]) -> Any:
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        return bad(name, error)


# ---- several tables as one ---------------------------------------------------------------------------------------


def united(tables: Sequence[tuple[str, pa.Table]], left_out: LeftOut) -> tuple[pa.Table, Any]:
    """(the rows of all tables, their `datasets.Features`): columns that some lack are null there, which is reported.

    Args:
        tables: (the file's name, its rows), at least one.
        left_out: collects columns that some files lack, and of types that had to give way.
    """
    filled = [(name, table) for name, table in tables if table.num_rows] or [tables[0]]
    features = [features_of(table) for _, table in filled]
    names = list(dict.fromkeys(column for _, table in filled for column in table.column_names))
    for column in names:
        lacking = [(name, table.num_rows) for name, table in filled if column not in table.column_names]
        if lacking and column != "empty":
            rows = sum(count for _, count in lacking)
            left_out.note(f"{rows} rows have no column {column!r}: {_some([name for name, _ in lacking])} lacks it")
    columns, united_features = {}, {}
    for column in names:
        given = [each[column] for each in features if column in each]
        parts = [(table.column(column) if column in table.column_names else None) for _, table in filled]
        feature, change = _common(column, given, [part for part in parts if part is not None], left_out)
        kind = _storage(feature)
        chunks: list[Any] = []
        for (_, table), part, own in zip(filled, parts, features, strict=True):
            array = pa.nulls(table.num_rows, kind) if part is None else change(part, own[column], kind)
            chunks += array.chunks if isinstance(array, pa.ChunkedArray) else [array]
        columns[column] = pa.chunked_array(chunks, kind)
        united_features[column] = feature
    from datasets import Features

    return pa.table(columns), Features(united_features)


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def features_of(table: pa.Table) -> dict[str, Any]:
    """A table's features, images undecoded: as its file says where that fits its types, otherwise from the types."""
    from datasets import Features

    try:
        said = {name: undecoded(feature) for name, feature in Features.from_arrow_schema(table.schema).items()}
    except (ValueError, TypeError, KeyError):  # written by another release, or by hand
        said = {}
    found = {}
    bare = table.schema.remove_metadata()
    for place, field in enumerate(bare):
        feature = said.get(field.name)
        if feature is None or _storage(feature) != field.type:
            feature = Features.from_arrow_schema(pa.schema([bare.field(place)]))[field.name]
        found[field.name] = feature
    return found


def undecoded(feature: Any) -> Any:
    """The feature with images left as bytes and paths."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List | LargeList):
        return type(feature)(undecoded(feature.feature))
    return feature


def _storage(feature: Any) -> pa.DataType:
    from datasets.features.features import get_nested_type  # the types that `datasets` itself stores (read: 5.2.0)

    return get_nested_type(feature)


Change = Callable[[Any, Any, pa.DataType], Any]


def _common(column: str, features: list[Any], parts: list[Any], left_out: LeftOut) -> tuple[Any, Change]:
    """(the feature that all files' columns become, how a column becomes it)."""
    from datasets import ClassLabel, Features

    def keep(part: Any, own: Any, kind: pa.DataType) -> Any:
        return part if part.type == kind else _cast(part, kind)

    if all(feature == features[0] for feature in features):
        return features[0], keep
    known = [feature for feature in features if _storage(feature) != pa.null()]
    if known and all(feature == known[0] for feature in known):
        return known[0], keep
    if any(isinstance(feature, ClassLabel) for feature in features):
        left_out.note(f"column {column!r} has other classes in some files: its labels are read as text")
        stored = {pa.string() if isinstance(feature, ClassLabel) else _storage(feature) for feature in features}
        kind = _promoted([*stored]) or pa.string()

        def words(part: Any, own: Any, kind: pa.DataType) -> Any:
            if isinstance(own, ClassLabel):
                names = dict(enumerate(own.names))
                values = [names.get(value) for value in part.to_pylist()]
                return pa.array(values, pa.string()).cast(kind)
            return _cast(part, kind)

        return Features.from_arrow_schema(pa.schema([(column, kind)]))[column], words
    kinds = list(dict.fromkeys(part.type for part in parts))
    kind = _promoted(kinds)
    if kind is None:
        left_out.note(
            f"column {column!r} is of several types ({', '.join(map(str, kinds))[:160]}): values are kept unchanged"
        )
        kind = pa.json_()
    elif pa.types.is_string(kind) and not all(map(_textual, kinds)):
        left_out.note(f"column {column!r} holds numbers in some files and text in others: all are read as text")
    return Features.from_arrow_schema(pa.schema([(column, kind)]))[column], keep


def _textual(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _scalar(kind: pa.DataType) -> bool:
    return _textual(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _promoted(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """A type that holds values of all these without loss, or None."""
    if any(isinstance(kind, pa.JsonType) for kind in kinds):
        return pa.json_()
    try:
        fields = [pa.schema([("x", kind)]) for kind in kinds]
        return pa.unify_schemas(fields, promote_options="permissive").field("x").type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        pass
    if all(map(_scalar, kinds)):
        return pa.string()
    if all(map(_image_like, kinds)):
        return _IMAGE
    if any(map(pa.types.is_list, kinds)):
        inner = _promoted([kind.value_type if pa.types.is_list(kind) else kind for kind in kinds])
        return None if inner is None or isinstance(inner, pa.JsonType) else pa.list_(inner)
    return None


def _image_like(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return set(kind.names) <= {"bytes", "path"}
    return _textual(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cast(part: Any, kind: pa.DataType) -> Any:
    if isinstance(kind, pa.JsonType):
        return array_of(values_of(part), kind)
    if kind == _IMAGE and not pa.types.is_struct(part.type) and not pa.types.is_null(part.type):
        name = "path" if _textual(part.type) else "bytes"
        return pa.array([None if value is None else {name: value} for value in part.to_pylist()], kind)
    if pa.types.is_list(kind) and not pa.types.is_list(part.type) and not pa.types.is_null(part.type):
        inner = _cast(part, kind.value_type)
        return pa.array([None if value is None else [value] for value in inner.to_pylist()], kind)
    try:
        return pc.cast(part, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return array_of(part.to_pylist(), kind)
