"""The data of a stage: streamed and map-style rows are judged alike; refusals end no run below the limit."""

from __future__ import annotations

import json
import os

import pytest
import tiny

from mllm_vision.data import CHAT_TEMPLATES, StreamArguments, StreamLoader
from mllm_vision.vlm.conversation import label_preview, load_stage_data

BAD = [
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    {"messages": [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "x"}]},
    {"messages": None},
]


def row(number: int) -> dict:
    said = [{"type": "image", "image": f"stars/{number % 3}.png"}, {"type": "text", "text": "what is it?"}]
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": f"star {number}"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Messages that name images beside their file: as JSON texts in Parquet, and as JSON lines."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("stage")
    (folder / "stars").mkdir()
    for number in range(3):
        tiny.random_image(number).save(folder / "stars" / f"{number}.png")
    rows = BAD * 8 + [row(number) for number in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    held = BAD * 20 + [row(number) for number in range(30)]
    (folder / "held.jsonl").write_text("\n".join(map(json.dumps, held)), encoding="utf-8")
    texts = [each["messages"] and json.dumps(each["messages"]) for each in rows]
    Dataset.from_dict({"messages": texts}).to_parquet(folder / "rows.parquet")
    return folder


def test_streamed_and_map_style_rows_are_judged_alike(folder, build, monkeypatch, tmp_path):
    model, processor = build()
    processor.chat_template = CHAT_TEMPLATES["vicuna"]
    for flag in ({"pack_turns": True}, {"max_turns": 2}):
        with pytest.raises(ValueError, match=f"--{next(iter(flag))} is for questions.*whole conversations .messages"):
            load_stage_data(model, processor, os.fspath(folder / "rows.jsonl"), **flag)
    monkeypatch.chdir(tmp_path)  # paths start from the file, not from where one stands
    held = os.fspath(folder / "held.jsonl")
    whole = load_stage_data(model, processor, os.fspath(folder / "rows.jsonl"), held)
    assert len(whole.train) == 60 and whole.train.refused.total() == 24
    with pytest.raises(ValueError, match=r"24 of 84 samples are refused[\s\S]*calls of tools are not supported"):
        whole.check(0.1)
    whole.train.bad_samples.check(0.3)
    with pytest.raises(ValueError, match="of the held-out data, 60 of 90 samples are refused"):
        whole.check(0.3)
    whole.check(0.7)
    streams = StreamArguments(streaming=True, shuffle_buffer=8)
    streamed = load_stage_data(model, processor, os.fspath(folder / "rows.parquet"), held, streams=streams, max_steps=9)
    assert label_preview(streamed, processor) == "", "the first rows are of no use, and end nothing"
    loader = StreamLoader(streamed.train, batch_size=12, collate_fn=streamed.collator)
    learnt = [batch["labels"][batch["labels"] != -100] for batch in loader]
    assert len(learnt) == 7 and streamed.bad_samples.count >= 24
    assert set(streamed.bad_samples.reasons) == set(whole.train.refused)


def test_a_set_without_images_is_refused(folder, build, tmp_path):
    model, processor = build()
    processor.chat_template = CHAT_TEMPLATES["vicuna"]
    rows = [{"instruction": f"say {number}", "input": "", "output": str(number)} for number in range(40)]
    file = tmp_path / "alpaca.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 36 conversations of .*alpaca.jsonl has an image.*image_column"):
        load_stage_data(model, processor, str(file))
