"""Labels of any common form as class numbers: integers, strings, whole floats, booleans, missing or mixed ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mllm_vision.data.records.sampling import BadRow, by_selected_row, column_values, only_columns

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """A label column as class numbers.

    Attributes:
        numbers: `[rows]` int64, -1 where there is no label or none could be read.
        names: names by number; None for integers, which name themselves.
        bad: row -> why its label cannot be read.
    """

    numbers: Tensor
    names: list[str] | None
    bad: dict[int, BadRow]

    @property
    def labelled(self) -> list[int]:
        """The rows that have a label."""
        return (self.numbers >= 0).nonzero().flatten().tolist()

    def numbered(self) -> Labels:
        """With names: integers become places in the ascending list of those that are found (0, 1, 2 stay so)."""
        if self.names is not None:
            return self
        found, places = self.numbers.unique(return_inverse=True)
        missing = int((found < 0).sum())  # -1 alone, and first
        return Labels(places - missing, [str(value) for value in found[missing:].tolist()], self.bad)

    def refusals(self, consequence: str) -> dict[Any, BadRow]:
        """row -> why it has no label, for an evaluation that needs one; their number is reported."""
        missing = [row for row in (self.numbers < 0).nonzero().flatten().tolist() if row not in self.bad]
        if missing:
            message = "%d of %d rows have no label (the first is row %d): %s"
            logger.warning(message, len(missing), len(self.numbers), missing[0], consequence)
        self.report("these rows")
        return self.bad | dict.fromkeys(missing, BadRow("the row has no label"))

    def report(self, what: str) -> None:
        """Log how many labels cannot be read, and why the first one cannot."""
        if self.bad:
            row, why = next(iter(self.bad.items()))
            logger.warning("%d labels of %s cannot be read (row %d: %s)", len(self.bad), what, row, why)


def label_value(value: Any) -> int | str | None:
    """A cell of a label column: a number not below 0, a word without blanks around it, or None where it is empty.

    Empty are None, NaN, -1, and text of nothing but blanks. True and False are 1 and 0.

    Raises:
        BadRow: not a class: 0.5, -3, bytes that are not text, a list of several, a dict.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRow("the label is not text", f"{value[:40]!r}") from None
    if isinstance(value, str):
        return value.strip() or None
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise BadRow("the label is not a class", f"{str(value)[:80]!r} of type {type(value).__name__}")
    if value != value:
        return None
    if value in (float("inf"), float("-inf")) or value != int(value):
        raise BadRow("the label is not an integer", f"{value}")
    if value == -1:
        return None
    if not 0 <= value < 2**62:
        raise BadRow("the label is negative" if value < 0 else "the label is too large a number", f"{value}")
    return int(value)


def read_labels(values: Sequence[Any], names: Sequence[str] | None = None, places: np.ndarray | None = None) -> Labels:
    """The labels of rows.

    Args:
        values: the cells of the label column; with `places` its distinct cells.
        names: class names by number, of a ClassLabel column or as the user gave them. None: strings are numbered in
            alphabetical order (numbers among strings count as strings), integers stay.
        places: which of `values` each row has, `[rows]`; None: one each.

    A text that is not one of `names`, or a number beyond them, cannot be read.
    """
    found: list[int | str | None] = []
    bad: dict[int, BadRow] = {}
    for row, value in enumerate(values):
        try:
            found.append(label_value(value))
        except BadRow as error:
            bad[row] = error
            found.append(None)
    if names is None and any(isinstance(value, str) for value in found):
        names = sorted({str(value) for value in found if value is not None})
        found = [None if value is None else str(value) for value in found]
    if names is not None:
        known = {name: number for number, name in enumerate(names)}
        for row, value in enumerate(found):
            number = known.get(value, -1) if isinstance(value, str) else value
            if number is not None and not 0 <= number < len(known):
                bad[row] = BadRow("the label is not one of the classes", f"{value!r}; they are {', '.join(names[:8])}")
                number = None
            found[row] = number
    filled = torch.tensor([-1 if value is None else value for value in found], dtype=torch.int64)
    if places is not None:
        filled = filled[torch.from_numpy(places)]
        bad = {row: bad[places[row]] for row in np.flatnonzero(np.isin(places, list(bad))).tolist()}
    return Labels(filled, None if names is None else list(names), bad)


def column_labels(records: Any, column: str) -> Labels:
    """The labels of a column of records, with the class names of a ClassLabel column."""
    feature = (getattr(records, "features", None) or {}).get(column)
    values, places = _distinct(records, column) or (column_values(records, column), None)
    return read_labels(values, getattr(feature, "names", None), places)


def _distinct(records: Any, column: str) -> tuple[list[Any], np.ndarray] | None:
    """(the distinct cells, which of them each row has) of a column of strings or numbers in Arrow."""
    import pyarrow as pa

    if not hasattr(records, "column_names"):
        return None
    chosen = only_columns(records, [column])
    cells = chosen.data.table.column(0)
    if not (pa.types.is_string(cells.type) or pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type)):
        return None
    encoded = cells.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    values = [*encoded.dictionary.to_pylist(), None]
    places = np.asarray(encoded.indices.fill_null(len(values) - 1), dtype=np.int64)
    return values, by_selected_row(chosen, places)
