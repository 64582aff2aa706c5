"""Any table is trained on, its bad rows counted with a reason, or it is refused in words: never lost, never a crash.

Each table goes through the loaders (whole and as a stream), every row through the judgement that training and
evaluation share, and what is left through two steps of a tiny model. `pytest -m slow` tries many more.
"""

from __future__ import annotations

import logging
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import odd_tables
import pairs_for_tests
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings

from mllm_vision.data import (
    BadImage,
    ConversationCollator,
    ConversationDataset,
    ImageCollator,
    ImageDataset,
    ImageTransform,
    PairCollator,
    PairDataset,
    Stream,
    StreamDataset,
    StreamLoader,
    bind_columns,
    bind_conversations,
    load_image,
    load_records,
)
from mllm_vision.data.images.decoding import image_size
from mllm_vision.data.images.layouts import FixedLayout
from mllm_vision.data.records.labels import column_labels
from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.evaluation.images import usable_images

EXPECTED = (ValueError, FileNotFoundError)


def profile(examples: int) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def in_words(error: BaseException) -> None:
    """A refusal that a user can act on: of an expected type, in words of ours, and no page of values."""
    text = str(error)
    assert 10 < len(text) < 3000, text
    assert not re.search(r"object at 0x|Ref\(|Traceback|unexpected [A-Z]\w+Error", text), text


def opened(found: tuple[str, list[dict[str, Any]]], folder: Path) -> tuple[Any, Any]:
    """(what was written, its records, none of its rows lost); no records where they are refused in words."""
    source = odd_tables.write(folder, *found)
    if isinstance(source, list):
        return source, source
    try:
        records = load_records(source)
    except EXPECTED as error:
        in_words(error)
        return source, None
    told = sum(getattr(records, "left_out", {}).values())
    assert len(records) == len(found[1]) or told, f"{len(records)} rows of {len(found[1])}, and nothing said"
    return source, records


def judged(dataset: Any) -> list[dict[str, Any]]:
    """The samples of all rows that can be used; every other one gives its reason, and none is replaced or lost."""
    kept, refused = [], []
    for index in range(len(dataset)):
        sample = judge(f"row {index}", dataset._read, index, 7 * index)
        (refused if isinstance(sample, BadRow) else kept).append(sample)
    for bad in refused:
        in_words(bad)
        assert 0 < len(bad.reason) < 70 and not bad.reason.startswith("unexpected"), bad
    assert len(kept) + len(refused) == len(dataset)
    if kept:
        assert all(isinstance(dataset[index], dict) for index in range(len(dataset)))
        assert dataset.bad_samples.seen - dataset.bad_samples.count >= len(dataset)
    else:
        with pytest.raises(ValueError, match="cannot be used"):
            dataset[0]
    return kept


def streamed(source: Any, make: Any, collate: Any) -> None:
    """As many samples of a stream as it has rows, or a refusal in words."""
    try:
        stream = Stream.open(source, seed=1, shuffle_buffer=4)
        dataset = StreamDataset(stream, make(stream.head()))
        loader = StreamLoader(dataset, batch_size=2, collate_fn=collate, drop_last=False)
        rows = sum(len(next(iter(batch.values()))) for batch in loader)
    except EXPECTED as error:
        in_words(error)
        return
    assert rows == stream.total == dataset.bad_samples.seen - dataset.bad_samples.count


def trained(model: Any, batches: list[dict[str, Any]]) -> None:
    """Two steps with finite losses."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    for batch in batches:
        loss = model(**batch).loss
        assert torch.isfinite(loss), loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def pairs_of(samples: list[Any]) -> list[list[Any]]:
    """Two batches of two."""
    return [(samples * 4)[:2], (samples * 4)[2:4]]


# ---- image and caption -------------------------------------------------------------------------------------------


@cache
def clip() -> Any:
    return pairs_for_tests.make_objective("clip").train()


@cache
def pair_collator() -> PairCollator:
    return PairCollator(ImageTransform(clip().encoder.processor, train=True), pairs_for_tests.tokenizer(), 24)


def check_pairs(found: tuple[str, list[dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, records = opened(found, Path(folder))
        if records is None:
            return

        def make(rows: Any) -> PairDataset:
            return PairDataset(rows, bind_columns(rows, ("image", "caption")), transform=pair_collator().transform)

        try:
            dataset = make(records)
        except EXPECTED as error:
            in_words(error)
            return
        if kept := judged(dataset):
            trained(clip(), [pair_collator()(batch) for batch in pairs_of(kept)])
        if not isinstance(source, list):
            streamed(source, make, pair_collator())


@profile(40)
@given(odd_tables.tables("image", "caption"))
def test_pairs(found: tuple[str, list[dict[str, Any]]]) -> None:
    check_pairs(found)


def test_a_first_sample_without_its_image_is_a_bad_row_of_a_stream(tmp_path: Path) -> None:
    rows = [{"caption": "no image"}, *[{"image": odd_tables.GOOD["a.png"], "caption": f"row {i}"} for i in range(5)]]
    stream = Stream.open(odd_tables.write(tmp_path, "tar", rows), seed=1, shuffle_buffer=4)
    dataset = StreamDataset(stream, PairDataset(stream.head(), bind_columns(stream.head(), ("image", "caption"))))
    assert sum(len(batch) for batch in StreamLoader(dataset, 2, collate_fn=list, drop_last=False)) == 6
    assert dataset.bad_samples.reasons == {"the image is missing": 1}


# ---- images alone, and with labels -------------------------------------------------------------------------------


@cache
def simclr() -> Any:
    from mllm_vision.data import ViewMaker
    from mllm_vision.encoder.encoder import VisionEncoder
    from mllm_vision.objectives import load_objective

    method = load_objective("simclr")
    encoder = VisionEncoder.from_backbone(tiny.tiny_vit(), tiny.tiny_image_processor("vit"))
    objective = method(encoder, method.Config()).train()
    return objective, ViewMaker.for_objective(objective)


def check_images(found: tuple[str, list[dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, records = opened(found, Path(folder))
        if records is None:
            return
        objective, make_views = simclr()
        for labelled in (False, True):
            try:
                dataset = ImageDataset(records, decode_size=64, labelled=labelled)
            except EXPECTED as error:
                in_words(error)
                continue
            kept = judged(dataset)
            if "label" in dataset.columns:
                labels = column_labels(records, dataset.columns["label"])
                unlabelled = len(records) - len(labels.labelled) - len(labels.bad)
                assert len(dataset) + (unlabelled if labelled else 0) == len(records)
                for bad in labels.bad.values():
                    in_words(bad)
            if not labelled:  # what training takes, evaluation takes
                refused: dict[int, BadRow] = {}
                _, rows = usable_images(records, dataset.columns["image"], range(len(records)), refused)
                assert rows == [sample["index"] for sample in kept] and len(rows) + len(refused) == len(records)
            if kept and not labelled:
                batches = [make_views(ImageCollator()(batch)) for batch in pairs_of(kept)]
                trained(objective, [{"views": batch["views"]} for batch in batches])
        if not isinstance(source, list):
            streamed(source, lambda rows: ImageDataset(rows, decode_size=64), ImageCollator())


@profile(40)
@given(odd_tables.tables("image", "label"))
def test_images_and_labels(found: tuple[str, list[dict[str, Any]]]) -> None:
    check_images(found)


# ---- conversations -----------------------------------------------------------------------------------------------


@cache
def llava() -> Any:
    from mllm_vision.encoder.encoder import VisionEncoder
    from mllm_vision.vlm import build_vlm
    from mllm_vision.vlm.conversation import set_chat_template

    tokenizer = pairs_for_tests.tokenizer()
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(), tiny.tiny_image_processor("clip"))
    model, processor = build_vlm(encoder, tiny.tiny_llama(len(tokenizer)), "llava", tokenizer)
    set_chat_template(processor, "vicuna")
    return model.train(), processor


def check_conversations(found: tuple[str, list[dict[str, Any]]]) -> None:
    model, processor = llava()
    layout = FixedLayout(model.config.image_token_id, model.config.image_seq_length, processor.image_processor)
    options = {"image_token": processor.image_token, "chat_template": processor.chat_template, "max_length": 512}
    options |= {"layout": layout, "progress": False}
    collate = ConversationCollator(processor.tokenizer, layout)
    with tempfile.TemporaryDirectory() as folder:
        source, records = opened(found, Path(folder))
        if records is None:
            return
        try:
            dataset = ConversationDataset(records, bind_conversations(records), processor.tokenizer, **options)
        except EXPECTED as error:
            in_words(error)
            return
        taken = {dataset.record_of(index) for index in range(len(dataset))}
        bad = dataset.bad_samples
        assert bad.examined == len(records) and len(taken) + bad.refused >= len(records)
        assert not [reason for reason in bad.reasons if reason.startswith("unexpected")], bad.examples
        for example in bad.examples:
            assert example.startswith("row "), example
        if kept := judged(dataset):
            names = ("input_ids", "attention_mask", "position_ids", "labels", "pixel_values")
            batches = [collate(batch) for batch in pairs_of(kept)]
            trained(model, [{name: batch[name] for name in names if name in batch} for batch in batches])
        if not isinstance(source, list):

            def make(rows: Any) -> ConversationDataset:
                return ConversationDataset(
                    rows, bind_conversations(rows), processor.tokenizer, **options, streamed=True
                )

            streamed(source, make, collate)


@profile(40)
@given(odd_tables.tables("image", "messages"))
def test_conversations(found: tuple[str, list[dict[str, Any]]]) -> None:
    check_conversations(found)


@profile(30)
@given(odd_tables.tables("image", "question", "answer"))
def test_questions(found: tuple[str, list[dict[str, Any]]]) -> None:
    check_conversations(found)


# ---- files and bytes ---------------------------------------------------------------------------------------------


@profile(60)
@given(odd_tables.folders)
def test_folders_of_files(files: dict[tuple[str, str], bytes]) -> None:
    """Every file is a row, or counted among what is not read; every row an image, or a refusal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            records = load_records(odd_tables.write_folder(Path(folder), files))
        except EXPECTED as error:
            in_words(error)
            return
        assert len(records) + sum(records.left_out.values()) == len(files), records.left_out
        judged(ImageDataset(records, decode_size=64))


@profile(400)
@given(odd_tables.damaged_images())
def test_damaged_bytes_are_an_image_or_a_refusal(data: bytes) -> None:
    try:
        image = load_image(data, max_bytes=2**22)
    except BadImage as error:
        in_words(error)
    else:
        assert image.mode == "RGB" and image.width * image.height * 4 <= 2**22
        assert image_size(data, max_bytes=2**22) == (image.height, image.width)


# ---- many more ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("roles", "check"),
    [
        (("image", "caption"), check_pairs),
        (("image", "label"), check_images),
        (("image", "messages"), check_conversations),
        (("image", "question", "answer"), check_conversations),
        (("image", "caption"), check_conversations),
    ],
)
def test_many_tables(roles: tuple[str, ...], check: Any) -> None:
    profile(400)(given(odd_tables.tables(*roles))(check))()
