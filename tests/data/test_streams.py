"""Streams: the order is global, the state is exact and small, ranks share the rows, bad rows do not disturb."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_vision.data import PairDataset, bind_columns
from mllm_vision.data.streams.flags import StreamArguments
from mllm_vision.data.streams.loader import StreamLoader
from mllm_vision.data.streams.order import Source, StreamOrder, split_among_ranks
from mllm_vision.data.streams.shards import Shard, find_shards
from mllm_vision.data.streams.streams import Stream, StreamDataset

IMAGE = tiny.image_bytes(tiny.random_image(0, 8))


def parquet(path: Path, rows: list[dict], group: int = 4) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def tar(path: Path, rows: list[dict], fields: tuple[str, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for row in rows:
            members = {"png": row["image"]["bytes"], "txt": row["caption"].encode()}
            if fields:
                members["json"] = json.dumps({name: row[name] for name in fields}).encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{row['caption']}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def rows_of(name: str, count: int) -> list[dict]:
    return [{"image": {"bytes": IMAGE, "path": None}, "caption": f"{name}{i}", "score": i} for i in range(count)]


SIZES = (7, 10, 3, 9, 12)  # five shards: no number of ranks but five divides them


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number, size in enumerate(SIZES):
        rows = rows_of("abcde"[number], size)
        parquet(folder / "parquet" / f"part-{number}.parquet", rows)
        tar(folder / "tar" / f"part-{number}.tar", rows, fields=("score",))
    parquet(folder / "other" / "more.parquet", rows_of("z", 20))
    return folder


def stream_of(pattern: Any, **options: Any) -> Stream:
    return Stream.open(pattern, **{"seed": 3, "shuffle_buffer": 12, "readers": 3, **options})


def dataset_of(stream: Stream) -> StreamDataset:
    head = stream.head()
    return StreamDataset(stream, PairDataset(head, bind_columns(head, ("image", "caption")), seed=3))


def loader_of(stream: Stream, batch: int = 4, **options: Any) -> StreamLoader:
    return StreamLoader(dataset_of(stream), batch, collate_fn=names_and_keys, **options)


def names_and_keys(rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["caption"], row["key"]) for row in rows]


def batches(loader: StreamLoader, count: int) -> list[list]:
    """`count` batches, iteration after iteration."""
    found: list[list] = []
    while len(found) < count:
        for batch in loader:
            found.append(batch)
            if len(found) == count:
                break
    return found


# ---- the order, in numbers -----------------------------------------------------------------------------------


class Numbers:
    """Stands for a shard: groups of rows and nothing to read."""

    local, kind = True, "numbers"

    def __init__(self, name: str, groups: list[int]) -> None:
        self.name, self.groups, self.rows = name, groups, sum(groups)


def numbers(groups: list[list[int]]) -> Source:
    return Source([Numbers(f"s{number}", each) for number, each in enumerate(groups)])


LAYOUTS = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=4), min_size=1, max_size=7).filter(
    lambda groups: sum(map(sum, groups)) > 0
)


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.integers(0, 20), st.integers(1, 5), st.integers(0, 9), st.data())
def test_a_pass_shows_every_row_once_and_goes_on_from_any_state(groups, buffer, readers, seed, data) -> None:
    def order() -> StreamOrder:
        return StreamOrder([numbers(groups)], seed=seed, buffer=buffer, readers=readers)

    total = sum(map(sum, groups))
    whole = order()
    first, second = whole.take(total), whole.take(total)
    everything = [(shard, row) for shard, sizes in enumerate(groups) for row in range(sum(sizes))]
    assert sorted(position[1:3] for position in first) == sorted(position[1:3] for position in second) == everything
    assert {position.epoch for position in first} == {0} and {position.epoch for position in second} == {1}

    stop = data.draw(st.integers(0, 2 * total))
    torn = order()
    torn.take(stop)
    again = order()
    again.load_state_dict(torn.state_dict())
    assert again.take(2 * total - stop) == (first + second)[stop:]


def test_shuffling_reaches_across_shards_and_passes_differ() -> None:
    order = StreamOrder([numbers([[50]] * 8)], buffer=100, readers=4)
    first, second = order.take(400), order.take(400)
    assert [position[1:3] for position in first] != [position[1:3] for position in second]
    assert len({position.shard for position in first[:40]}) >= 4
    places = np.array([position.row for position in first[:400]])
    assert np.abs(np.diff(places)).mean() > 5  # neighbours were no neighbours in the file
    unshuffled = StreamOrder([numbers([[3], [2, 1]])], buffer=0, readers=1).take(6)
    assert [position[1:3] for position in unshuffled] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6, 8])
def test_every_rank_gets_as_much_and_its_own_readers_first(world: int) -> None:
    order = StreamOrder([numbers([[200]] * 12)], buffer=60, readers=6)
    for _ in range(5):
        positions = order.take(24 * world)
        taken = split_among_ranks(positions, [6], world)
        assert sorted(place for own in taken for place in own) == list(range(24 * world))
        assert {len(own) for own in taken} == {24}
        if 6 % world == 0:  # no rank reads another's shards
            assert all(positions[place].reader * world // 6 == rank for rank, own in enumerate(taken) for place in own)


# ---- ranks and resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_ranks_share_the_global_order(shards: Path, kind: str) -> None:
    stream = stream_of(shards / kind)
    [alone] = [batches(loader_of(stream, 12), 6)]
    assert [len(batch) for batch in alone] == [12] * 6
    for world in (2, 3, 4):
        ranks = [loader_of(stream, 12 // world, rank=rank, world=world) for rank in range(world)]
        found = [batches(loader, 6) for loader in ranks]
        for step, whole in enumerate(alone):
            parts = [tuple(sample) for rank in found for sample in rank[step]]
            assert Counter(parts) == Counter(map(tuple, whole))  # captions and the keys of their random choices
        assert len({json.dumps(loader.state_dict()) for loader in ranks}) == 1
    assert len(loader_of(stream, 12)) == 41 // 12
    names = [name for batch in alone[:3] for name, _ in batch]
    assert len(set(names)) == 36  # of 41 rows; what is left of a pass comes in another


def test_parquet_and_tar_hold_the_same_rows(shards: Path) -> None:
    found = {}
    for kind in ("parquet", "tar"):
        stream = stream_of(shards / kind, shuffle_buffer=0, readers=1)
        found[kind] = [name for batch in batches(loader_of(stream, 41), 1) for name, _ in batch]
    assert found["parquet"] == found["tar"] == [f"{n}{i}" for n, size in zip("abcde", SIZES) for i in range(size)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"mix": "other"}])
def test_resumed_anywhere_is_uninterrupted(shards: Path, options: dict, workers: int) -> None:
    options = {name: {str(shards / value): 0.5} if name == "mix" else value for name, value in options.items()}
    stream = stream_of(shards / "parquet", **options)
    whole = batches(loader_of(stream, 6), 14)
    for stop in (1, 6, 9):
        torn = loader_of(stream, 6, num_workers=workers)
        assert batches(torn, stop) == whole[:stop]
        state = json.loads(json.dumps(torn.state_dict()))  # as a checkpoint keeps it
        again = loader_of(stream_of(shards / "parquet", **options), 6, num_workers=workers)
        again.load_state_dict(state)
        assert batches(again, 14 - stop) == whole[stop:]
        two = [loader_of(stream, 3, rank=rank, world=2) for rank in range(2)]  # on another number of ranks
        for loader in two:
            loader.load_state_dict(state)
        for ours, theirs, expected in zip(*(batches(loader, 14 - stop) for loader in two), whole[stop:], strict=True):
            assert Counter(ours + theirs) == Counter(expected)


def test_an_iteration_that_was_left_goes_on_where_it_was(shards: Path) -> None:
    stream = stream_of(shards / "parquet")
    whole = batches(loader_of(stream, 5), 12)
    loader = loader_of(stream, 5, num_workers=2)
    found = batches(loader, 2)  # the workers have fetched more by now
    assert found + batches(loader, 10) == whole
    assert (loader.passes_done, loader.batches_done) == (1, 4)


def test_the_state_is_small_and_resuming_reads_little(tmp_path: Path) -> None:
    for number in range(8):
        parquet(tmp_path / f"{number}.parquet", rows_of(f"{number}-", 400), group=20)
    stream = stream_of(tmp_path, shuffle_buffer=200, readers=4)
    loader = loader_of(stream, 40)
    batches(loader, 60)  # of 80
    state = json.dumps(loader.state_dict())
    assert len(state) < 20 * 200  # some digits a row of the buffer, nothing of what was read
    again = loader_of(stream, 40)
    again.load_state_dict(json.loads(state))
    batches(again, 1)
    again.reader.settle()
    assert loader.reader.groups_read >= 120 and again.reader.groups_read <= 45  # buffer and readers, not 120 groups
    held = sum(len(rows) for rows in loader.reader._rows.values())
    assert held <= 200 + 4 * 20


def test_ranks_read_their_own_shards(tmp_path: Path) -> None:
    for number in range(8):
        parquet(tmp_path / f"{number}.parquet", rows_of(f"{number}-", 40), group=10)
    stream = stream_of(tmp_path, shuffle_buffer=40, readers=4)
    ranks = [loader_of(stream, 8, rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        batches(loader, 20)
        loader.reader.settle()
    assert [loader.reader.groups_read for loader in ranks] == [16, 16]  # of 32 groups, each by one rank


# ---- mixing ------------------------------------------------------------------------------------------------


def test_weights_are_the_shares_of_the_sources(shards: Path) -> None:
    stream = stream_of(shards / "parquet", mix={str(shards / "other"): 0.25})
    order = stream.order()
    positions = order.take(4000)
    share = sum(position.source == 1 for position in positions) / 4000
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    own = [position for position in positions if position.source == 1]
    for turn in range(10):  # each source passes over all its rows before it repeats one
        assert sorted(position.row for position in own[20 * turn : 20 * turn + 20]) == list(range(20))
    assert stream.total is None
    with pytest.raises(TypeError, match="no known length"):
        len(loader_of(stream))


# ---- bad rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_replaced_and_disturbs_no_other(tmp_path: Path, workers: int) -> None:
    rows = rows_of("a", 24)
    parquet(tmp_path / "good" / "0.parquet", rows, group=6)
    rows[7] = {**rows[7], "image": {"bytes": b"no image", "path": None}}
    parquet(tmp_path / "bad" / "0.parquet", rows, group=6)
    good, bad = (loader_of(stream_of(tmp_path / name), 6, num_workers=workers) for name in ("good", "bad"))
    found = [name for batch in batches(bad, 4) for name, _ in batch]
    assert found == ["a8" if name == "a7" else name for batch in batches(good, 4) for name, _ in batch]
    counted = bad.dataset.bad_samples
    assert (counted.count, good.dataset.bad_samples.count) == (1, 0)
    assert "0.parquet row 7: " in counted.examples[0]


def test_a_shard_is_read_by_several_threads(tmp_path: Path) -> None:
    """The thread that reads ahead and the filter's reading meet in one file."""
    rows = rows_of("a", 400)
    files = {"caption": parquet(tmp_path / "0.parquet", rows, group=10), "txt": tar(tmp_path / "0.tar", rows)}
    for column, file in files.items():

        def read(turn: int, column: str = column, shard: Shard = Shard(file)) -> bool:  # noqa: B008 (shared)
            groups = len(shard.groups)
            found = [row for group in range(groups) for row in shard.read((group + turn) % groups, [column])]
            return Counter(row[column] for row in found) == Counter(row["caption"] for row in rows)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(40)))


# ---- finding shards, and what is refused ---------------------------------------------------------------------


def test_shards_are_found(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        parquet(tmp_path / "data" / f"{name}.parquet", rows_of("a", 2))
    for number in range(3):
        tar(tmp_path / f"{number:03d}.tar", rows_of("a", 2))

    def names(*arguments: Any) -> list[str]:
        return [Path(shard.path).stem for shard in find_shards(*arguments)]

    assert names(tmp_path / "data") == ["train-00000-of-00002", "train-00001-of-00002"]
    assert names(tmp_path / "data", "validation") == ["validation-00000-of-00001"]
    assert names(tmp_path / "{000..002}.tar") == ["000", "001", "002"] == names(str(tmp_path / "*.tar"))
    assert names(tmp_path / "{000,002}.tar") == ["000", "002"] and names(tmp_path / "001.tar") == ["001"]
    with pytest.raises(ValueError, match=r"no file of the split 'test'; its files name train, validation"):
        find_shards(tmp_path / "data", "test")


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda p: find_shards(p / "none.parquet"), FileNotFoundError, "does not exist"),
        (lambda p: find_shards(p / "*.nothing"), FileNotFoundError, "no file matches"),
        (lambda p: find_shards(p / "empty"), FileNotFoundError, "contains no .parquet or .tar file"),
        (lambda p: find_shards(p / "rows.jsonl"), ValueError, "only Parquet files and uncompressed WebDataset tars"),
        (lambda p: find_shards(p / "text.parquet", "train[:10]"), ValueError, "a stream takes whole splits"),
        (lambda p: stream_of(p / "text.parquet").head(), ValueError, "cannot be read as Parquet"),
        (lambda p: Shard(p / "torn.tar").groups, ValueError, r"torn\.tar (is cut off|cannot be read)"),
        (lambda p: Shard(p / "text.tar").groups, ValueError, "cannot be read as a tar"),
        (lambda p: stream_of(p / "good.parquet", shuffle_buffer=-1), ValueError, "shuffle_buffer=-1 must not be"),
        (lambda p: stream_of(p / "good.parquet", mix={str(p / "good.tar"): 0}), ValueError, "weight=0.0 of .*positive"),
        (lambda p: loader_of(stream_of(p / "good.parquet"), 9), ValueError, "8 rows, fewer than one batch of 9"),
        (
            lambda p: loader_of(stream_of(p / "good.parquet"), 2, world=2, drop_last=False),
            ValueError,
            "dataloader_drop_last=False cannot give 2 processes equal parts",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path: Path, act: Any, kind: type, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("rows.jsonl", "text.parquet", "text.tar"):
        (tmp_path / name).write_text("not what its name says " * 99)
    parquet(tmp_path / "good.parquet", rows_of("a", 8))
    tar(tmp_path / "good.tar", rows_of("a", 8))
    (tmp_path / "torn.tar").write_bytes((tmp_path / "good.tar").read_bytes()[: 7 * 1024 + 100])
    with pytest.raises(kind, match=message):
        act(tmp_path)


def test_a_state_of_another_stream_is_refused(shards: Path) -> None:
    state = loader_of(stream_of(shards / "parquet")).state_dict()
    for change, message in (
        ({"seed": 4}, "another seed: 3, now 4"),
        ({"shuffle_buffer": 13}, "another shuffle_buffer: 12, now 13"),
        ({"readers": 2}, "another stream_lanes: 3, now 2"),
    ):
        with pytest.raises(ValueError, match=message):
            loader_of(stream_of(shards / "parquet", **change)).load_state_dict(state)
    with pytest.raises(ValueError, match="another shards"):
        loader_of(stream_of(shards / "tar")).load_state_dict(state)


def test_the_fingerprint_tells_a_shard_that_was_changed(tmp_path: Path) -> None:
    parquet(tmp_path / "a" / "0.parquet", rows_of("a", 8))
    before = stream_of(tmp_path / "a" / "0.parquet")._fingerprint
    assert stream_of(tmp_path / "a" / "0.parquet")._fingerprint == before
    assert stream_of(tmp_path / "a" / "0.parquet", seed=4)._fingerprint != before
    parquet(tmp_path / "a" / "0.parquet", rows_of("b", 8))
    assert stream_of(tmp_path / "a" / "0.parquet")._fingerprint != before


def test_the_last_batch_is_given_where_asked_for(shards: Path) -> None:
    loader = loader_of(stream_of(shards / "parquet"), 12, drop_last=False)
    assert [len(batch) for batch in loader] == [12, 12, 12, 5] and len(loader) == 4
    assert len({name for batch in loader for name, _ in batch}) == 41


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mix_datasets": {"a.tar": 1.0}}, "--mix_datasets is for streams: add --streaming"),
        ({"streaming": True, "mix_datasets": {"a.tar": "much"}}, "--mix_datasets a.tar='much': a weight is a positive"),
        ({"streaming": True, "stream_lanes": 0}, "stream_readers=0 at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamArguments(**flags)


def test_flags_open_a_stream(shards: Path) -> None:
    more = {str(shards / "other"): 0.5}
    flags = StreamArguments(streaming=True, mix_datasets=more, shuffle_buffer=5)
    stream = flags.open(str(shards / "parquet"), seed=7, max_steps=10)
    assert [source.weight for source in stream.sources] == [1.0, 0.5]
    assert stream.settings == {"seed": 7, "buffer": 5, "readers": 8}
    with pytest.raises(ValueError, match=r"no known length .* say how long to train with --max_steps"):
        flags.open(str(shards / "parquet"))
    assert StreamArguments(streaming=True).open(str(shards / "parquet")).total == 41  # epochs are known
    for wrong, message in (({"max_rows": 5}, "max_train_samples=5 needs"), ({"config_name": "x"}, "name them")):
        with pytest.raises(ValueError, match=message):
            flags.open(str(shards / "parquet"), **wrong)


def test_shards_of_a_hub_data_set(shards: Path, tmp_path: Path, run_python) -> None:
    """Through the Hub's own client against a server that speaks its protocol; a shard is fetched when it is reached."""
    from hub_server import HubServer, Repository, _Handler

    class Datasets(HubServer):
        def __init__(self) -> None:
            super().__init__()
            get = _Handler._get

            def translated(handler: Any) -> None:
                handler.path = handler.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
                get(handler)

            self._server.RequestHandlerClass._get = translated

    with Datasets() as hub:
        repository = hub.repositories["somebody/pairs"] = Repository()
        files = {f"data/train-{n}.parquet": (shards / "parquet" / f"part-{n}.parquet").read_bytes() for n in range(3)}
        repository.commit("main", {**files, "README.md": b"# Pairs"}, "pairs")
        words = {"train.csv": b"image,label\ni/0.png,NA\ni/1.png,None\n", "i/0.png": IMAGE, "i/1.png": IMAGE}
        hub.repositories["somebody/words"] = Repository()
        hub.repositories["somebody/words"].commit("main", {**words, ".gitattributes": b"", "README.md": b""}, "words")
        code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from mllm_vision.data.streams.order import Source, StreamOrder
from mllm_vision.data.streams.shards import find_shards
source = Source(find_shards("somebody/pairs"))
assert not source.known
order = StreamOrder([source], buffer=0, readers=1)
positions = order.take(18)
read = [source.shards[r.shard].read(source.group_of(r.shard, r.row))[0] is not None for r in positions]
print([len(source.shards), read])
assert source.shards[0].read(1, ["caption"])[0] == {{"caption": "a4"}}
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from mllm_vision.data import load_image, load_records
def offline(*_, **__):
    raise OfflineModeIsEnabled("offline")
for _ in range(2):  # plain files go by our rules, and are found again offline
    rows = load_records("somebody/words")
    assert rows["label"][:] == ["NA", "None"], rows["label"][:]
    assert load_image(rows[1]["image"]).size == (8, 8)
    HfApi.dataset_info = offline
"""
        printed = run_python(code, **hub.environment(str(tmp_path)))
        asked = [call for call in hub.calls if call.startswith("GET") and "resolve" in call]
    assert json.loads(printed.replace("True", "true")) == [3, [True] * 18]
    assert sum("pairs" in call for call in asked) == 3  # each shard once
