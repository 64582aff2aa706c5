"""Positives and excluded pairs, tile by tile: `Runs`, `SparseTargets` and `DenseTargets`.

None stores a number for every pair. No value is read back from a GPU, which would stall its queue, except for a
caller's sparse matrix (the number of entries in each tile).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mllm_vision.distributed import all_gather
from mllm_vision.functional.engine.tiles import Grid, first_row

Relation = Callable[[slice, slice], Tensor]
Relations = Tensor | Relation | None

LISTED_SHARE = 64  # on a CPU, positives are listed instead of compared tile by tile if at most one pair in 64 is one


@dataclass
class TargetSums:
    """Sums over positives, by row and by column: of the weights, and of weight times score."""

    row_weight: Tensor
    row_score: Tensor
    column_weight: Tensor | None
    column_score: Tensor | None


class Runs:
    """Pairs along diagonals, known to the host: row r + k and column c + k for all k < length.

    Args:
        runs: (first row, first column, length) of each; columns count over all ranks. No pair occurs twice.
        grid: the tiles.
    """

    certain = True  # as positives they cover every row and every column of all ranks

    def __init__(self, runs: list[tuple[int, int, int]], grid: Grid) -> None:
        self._runs, self._grid = runs, grid

    def _parts(self, tile: Tensor, row: int, column: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and entries (a view) of each run's part in one tile."""
        down, across = self._grid.rows[row], self._grid.columns[column]
        for first, left, length in self._runs:
            begin = max(first, down.start, first + across.start - left)
            end = min(first + length, down.stop, first + across.stop - left)
            if begin < end:
                columns = slice(begin - first + left, end - first + left)
                a, b = begin - down.start, columns.start - across.start
                yield slice(begin, end), columns, tile.diagonal(b - a)[min(a, b) :][: end - begin]

    def add_sums(self, tile: Tensor, row: int, column: int, sums: TargetSums) -> None:
        """As `SparseTargets.add_sums`."""
        for rows, columns, score in self._parts(tile, row, column):
            sums.row_weight[rows] += 1
            sums.row_score[rows] += score
            if sums.column_weight is not None and sums.column_score is not None:
                sums.column_weight[columns] += 1
                sums.column_score[columns] += score

    def subtract(
        self, tile: Tensor, row: int, column: int, by_row: Tensor | None = None, by_column: Tensor | None = None
    ) -> None:
        """As `SparseTargets.subtract`."""
        for rows, columns, part in self._parts(tile, row, column):
            if by_row is None and by_column is None:
                part -= 1
            if by_row is not None:
                part -= by_row[rows]
            if by_column is not None:
                part -= by_column[columns]

    def total(self, tile: Tensor, row: int, column: int) -> Tensor | float:
        """As `SparseTargets.total`."""
        parts = [part.sum() for _, _, part in self._parts(tile, row, column)]
        return torch.stack(parts).sum() if parts else 0.0

    def fill(self, tile: Tensor, row: int, column: int, value: float) -> None:
        """Writes `value` at the pairs."""
        for _, _, part in self._parts(tile, row, column):
            part.fill_(value)


class SparseTargets:
    """Positives as a list of pairs.

    Args:
        rows: `[P]` local rows.
        columns: `[P]` columns, counted over all ranks. No pair occurs twice.
        weights: `[P]` in [0, 1]; `None` is one for each.
        grid: the tiles.
        certain: whether every row and every column of all ranks has a positive.
    """

    def __init__(
        self, rows: Tensor, columns: Tensor, weights: Tensor | None, grid: Grid, *, certain: bool = False
    ) -> None:
        number = grid.number(rows, columns)
        order = number.argsort(stable=True)
        counts = torch.bincount(number, minlength=len(grid.rows) * len(grid.columns)).tolist()
        self._grid, self.certain = grid, certain
        self._rows, self._columns = rows[order].split(counts), columns[order].split(counts)
        self._weights = None if weights is None else weights[order].split(counts)

    def _part(self, row: int, column: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """Rows, columns, places in the flat tile and weights of the positives in one tile."""
        index = row * len(self._grid.columns) + column
        rows, columns = self._rows[index], self._columns[index]
        if len(rows) == 0:
            return None
        down, across = self._grid.rows[row], self._grid.columns[column]
        place = (rows - down.start) * (across.stop - across.start) + (columns - across.start)
        return rows, columns, place, None if self._weights is None else self._weights[index]

    def add_sums(self, tile: Tensor, row: int, column: int, sums: TargetSums) -> None:
        """Adds the tile's part of the sums."""
        if (part := self._part(row, column)) is None:
            return
        rows, columns, place, weight = part
        score = tile.view(-1)[place]
        weight = torch.ones_like(score) if weight is None else weight
        sums.row_weight.index_add_(0, rows, weight)
        sums.row_score.index_add_(0, rows, weight * score)
        if sums.column_weight is not None and sums.column_score is not None:
            sums.column_weight.index_add_(0, columns, weight)
            sums.column_score.index_add_(0, columns, weight * score)

    def subtract(
        self, tile: Tensor, row: int, column: int, by_row: Tensor | None = None, by_column: Tensor | None = None
    ) -> None:
        """Subtracts weight * (by_row + by_column), or the weight if both are None, at the tile's positives."""
        if (part := self._part(row, column)) is None:
            return
        rows, columns, place, weight = part
        flat = tile.view(-1)
        values = flat[place]
        amounts = [by[index] for by, index in ((by_row, rows), (by_column, columns)) if by is not None]
        for amount in amounts or [torch.ones_like(values)]:
            values -= amount if weight is None else weight * amount
        flat[place] = values

    def total(self, tile: Tensor, row: int, column: int) -> Tensor | float:
        """Sum of weight times score over the tile, in the order of `DenseTargets.total` (bit-equal)."""
        if (part := self._part(row, column)) is None:
            return 0.0
        _, _, place, weight = part
        score = tile.view(-1)[place]
        weighted = torch.zeros_like(tile)
        weighted.view(-1)[place] = score if weight is None else score * weight
        return weighted.sum()


class DenseTargets:
    """Positives given tile by tile.

    Args:
        relation: local rows and columns over all ranks to weights `[r, c]` in [0, 1].
        grid: the tiles.
        certain: whether every row and every column of all ranks has a positive.
    """

    def __init__(self, relation: Relation, grid: Grid, *, certain: bool = False) -> None:
        self._relation, self._grid, self.certain = relation, grid, certain

    def _weights(self, tile: Tensor, row: int, column: int) -> Tensor:
        weights = self._relation(self._grid.rows[row], self._grid.columns[column])
        if weights.shape != tile.shape:
            raise ValueError(
                f"relations returned {list(weights.shape)} for a tile of {list(tile.shape)}; a callable receives the "
                "slices (rows, columns) over the rows of all ranks and must return [rows, columns] weights in [0, 1]"
            )
        return weights.detach().to(device=tile.device, dtype=tile.dtype)

    def add_sums(self, tile: Tensor, row: int, column: int, sums: TargetSums) -> None:
        """As `SparseTargets.add_sums`."""
        weights = self._weights(tile, row, column)
        score = weights * tile
        rows, columns = self._grid.rows[row], self._grid.columns[column]
        sums.row_weight[rows] += weights.sum(1)
        sums.row_score[rows] += score.sum(1)
        if sums.column_weight is not None and sums.column_score is not None:
            sums.column_weight[columns] += weights.sum(0)
            sums.column_score[columns] += score.sum(0)

    def subtract(
        self, tile: Tensor, row: int, column: int, by_row: Tensor | None = None, by_column: Tensor | None = None
    ) -> None:
        """As `SparseTargets.subtract`."""
        weights = self._weights(tile, row, column)
        if by_row is None and by_column is None:
            tile -= weights
        if by_row is not None:
            tile.addcmul_(weights, by_row[self._grid.rows[row], None], value=-1)
        if by_column is not None:
            tile.addcmul_(weights, by_column[None, self._grid.columns[column]], value=-1)

    def total(self, tile: Tensor, row: int, column: int) -> Tensor | float:
        """As `SparseTargets.total`."""
        return (self._weights(tile, row, column) * tile).sum()


Targets = Runs | SparseTargets | DenseTargets


def related(ids: Tensor, others: Tensor) -> Tensor:
    """Which rows share an id.

    Args:
        ids: integer `[N]` or `[N, K]`.
        others: integer `[M]` or `[M, K]`.

    Returns:
        Bool `[N, M]`: true where any of the K ids of row i and row j agree (column by column).
    """
    ids, others = (value.unsqueeze(1) if value.ndim == 1 else value for value in (ids, others))
    result = ids[:, None, 0] == others[None, :, 0]
    for column in range(1, ids.shape[1]):
        result |= ids[:, None, column] == others[None, :, column]
    return result


def diagonal(rows: int, offset: int, grid: Grid) -> Runs:
    """The pairs of row i and column offset + i."""
    return Runs([(0, offset, rows)], grid)


def rolled(rows: int, offset: int, shifts: list[int], grid: Grid) -> Runs:
    """The pairs of row i and column offset + (i - shift) mod rows, for each of the distinct shifts below `rows`."""
    runs = [((0, offset + rows - shift, shift), (shift, offset, rows - shift)) for shift in shifts]
    return Runs([run for pair in runs for run in pair if run[2]], grid)


def find_targets(
    relations: Relations, rows: int, sizes: list[int], grid: Grid, like: Tensor, group: dist.ProcessGroup | None
) -> Targets:
    """The positives of this rank's rows.

    Args:
        relations: as in `clip_loss`.
        rows: number of this rank's rows.
        sizes: rows of every rank.
        grid: the tiles.
        like: device and type of the weights.
        group: process group.

    Raises:
        ValueError: a shape that does not match the rows, or relations that require a gradient.
    """
    start = first_row(sizes, group)
    if relations is None:
        return diagonal(rows, start, grid)
    if not isinstance(relations, Tensor):
        if not callable(relations):
            raise ValueError(f"relations must be a tensor or a callable, got {type(relations).__name__}")
        given = relations
        return DenseTargets(lambda r, c: given(slice(start + r.start, start + r.stop), c), grid)
    if relations.requires_grad:
        raise ValueError("relations receive no gradient here; pass relations.detach()")
    total = sum(sizes)
    matrix = relations.to(like.device)
    is_ids = not (matrix.is_floating_point() or matrix.dtype == torch.bool) and matrix.layout == torch.strided
    expected = matrix.ndim in (1, 2) if is_ids else list(matrix.shape[1:]) == [total]
    if not expected or len(matrix) != rows:
        wanted = f"[{rows}] or [{rows}, K]" if is_ids else f"[{rows}, {total}]"
        raise ValueError(f"relations of dtype {matrix.dtype} must be {wanted}, got {list(matrix.shape)}")
    if matrix.layout != torch.strided:
        listed = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()).coalesce()
        places = listed.indices()
        return SparseTargets(places[0], places[1], listed.values().to(like.dtype), grid)
    if not is_ids:
        return DenseTargets(lambda r, c: matrix[r, c], grid)
    everyone = all_gather(matrix, group, sizes)
    listable = like.device.type == "cpu" and not torch.compiler.is_compiling()  # their number depends on the data
    if listable and (listed := _equal_pairs(matrix, everyone)) is not None:
        return SparseTargets(*listed, None, grid, certain=True)
    pairs = _places(matrix, everyone, like.dtype)

    def equal(r: slice, c: slice) -> Tensor:
        # written as floats directly: converting booleans afterwards takes six times as long on a CPU
        found = [
            torch.eq(own[r, None], of_all[None, c], out=like.new_empty(r.stop - r.start, c.stop - c.start))
            for own, of_all in pairs
        ]
        return functools.reduce(lambda one, other: torch.maximum(one, other, out=one), found)

    return DenseTargets(equal, grid, certain=True)


def _equal_pairs(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of the pairs that share an id, row by row; None if there are too many to list."""
    ids, others = (value.unsqueeze(1) if value.ndim == 1 else value for value in (ids, others))
    total, keys = len(others), []
    for own, of_all in zip(ids.unbind(1), others.unbind(1), strict=True):
        ordered, order = of_all.sort(stable=True)
        own = own.contiguous()
        first = torch.searchsorted(ordered, own)
        counts = torch.searchsorted(ordered, own, right=True) - first
        found = int(counts.sum())
        if found * LISTED_SHARE > len(own) * total:
            return None
        rows = torch.repeat_interleave(torch.arange(len(own)), counts)
        within = torch.arange(found) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        keys.append(rows * total + order[first[rows] + within])
    pairs = torch.cat(keys).unique()
    return pairs // total, pairs % total


def _places(ids: Tensor, others: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Each column of `ids` and of `others` as places among the others, in the type that compares fastest."""
    ids, others = (value.unsqueeze(1) if value.ndim == 1 else value for value in (ids, others))
    kind = dtype if len(others) < 1 << 24 else torch.int64  # fp32 represents smaller integers exactly
    found = []
    for own, of_all in zip(ids.unbind(1), others.unbind(1), strict=True):
        ordered = of_all.sort().values
        first, second = (torch.searchsorted(ordered, part.contiguous()).to(kind) for part in (own, of_all))
        found.append((first, second))
    return found
