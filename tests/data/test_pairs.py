"""Pairs: which caption is drawn, what happens to bad rows, exact ids, exact resumption, worker processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny import image_bytes, labelled_image, random_image, tiny_image_processor, tiny_tokenizer, write_pairs_parquet
from torch.utils.data import DataLoader

from mllm_vision.data import BadSamples, ImageTransform, PairCollator, PairDataset, load_records
from mllm_vision.data.records.sampling import bytes_id, draw_key, text_id

COLUMNS = {"image": "image", "caption": "captions"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows(n: int, captions: int = 3) -> list[dict]:
    return [
        {"image": image_bytes(random_image(i)), "captions": [f"caption {k} of {i}" for k in range(captions)]}
        for i in range(n)
    ]


def test_the_caption_depends_on_seed_epoch_and_index_alone():
    data = rows(40)

    def epoch(seed, number):
        dataset = PairDataset(data, COLUMNS, seed=seed)
        dataset.set_epoch(number)
        return [dataset[i]["caption"] for i in range(40)]

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1) and epoch(1, 0) != epoch(2, 0)
    dataset = PairDataset(data, COLUMNS, seed=1)
    assert [dataset[i]["caption"] for i in reversed(range(40))] == epoch(1, 0)[::-1], "not on the order of reading"


def test_every_caption_is_drawn_alike():
    dataset = PairDataset(rows(1, captions=5), COLUMNS)
    drawn: Counter = Counter()
    for number in range(1000):
        dataset.set_epoch(number)
        drawn[dataset[0]["caption"]] += 1
    assert len(drawn) == 5 and min(drawn.values()) > 150


def test_keys_spread_evenly():
    keys = np.asarray([draw_key(7, epoch, index) for epoch in range(20) for index in range(500)])
    assert len(set(keys.tolist())) == 10_000 and keys.min() >= 0
    for modulus in (2, 3, 5, 7):
        counts = np.bincount(keys % modulus, minlength=modulus)
        assert abs(counts / 10_000 * modulus - 1).max() < 0.08


def test_bad_rows_are_replaced_by_the_next_good_one_and_counted():
    data = rows(6)
    data[1]["image"] = data[1]["image"][:50]  # truncated
    data[2]["captions"] = ["", "   "]  # no words
    data[3]["captions"] = ["", "the only one"]
    dataset = PairDataset(data, COLUMNS)
    samples = [dataset[i] for i in range(6)]
    assert [sample["index"] for sample in samples] == [0, 3, 3, 3, 4, 5]
    assert samples[1]["caption"] == "the only one"
    bad = dataset.bad_samples
    assert bad.count == 3 and bad.seen == 9
    assert any("row 1" in text and "cannot be decoded" in text for text in bad.examples)
    assert any("row 2" in text and "the caption is empty" in text for text in bad.examples)
    with pytest.raises(ValueError, match=r"3 of 9 samples are unusable \(33.3%\).*max_bad_fraction=0.01[\s\S]*row 1"):
        bad.check(0.01)
    bad.check(0.5)


def test_nothing_but_bad_rows():
    data = rows(4)
    for row in data:
        row["image"] = b"broken"
    with pytest.raises(ValueError, match="4 samples from 2 on cannot be used"):
        PairDataset(data, COLUMNS)[2]


def test_one_bad_sample_at_the_start_of_a_large_set_is_no_failure():
    bad = BadSamples(total=5000)
    bad.bad("row 0: corrupt")
    bad.check(0.01)
    for _ in range(10):
        bad.bad("row x: corrupt")
    with pytest.raises(ValueError, match=r"11 of 1000 samples"):
        bad.check(0.01)


def test_worker_processes_count_and_follow_the_epoch():
    data = rows(24)
    for index in (3, 4, 11):
        data[index]["image"] = b"broken"
    dataset = PairDataset(data, COLUMNS, seed=3)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list, persistent_workers=True)
    expected = []
    for number in range(2):
        dataset.set_epoch(number)
        expected.append([dataset[i]["caption"] for i in range(24)])
    before = dataset.bad_samples.count
    for number in range(2):
        dataset.set_epoch(number)  # the workers live on from the first epoch
        assert [row["caption"] for batch in loader for row in batch] == expected[number]
    assert dataset.bad_samples.count - before == before == 8  # 3 broken rows, met again from the one before: 4 an epoch
    assert dataset.bad_samples.examples


def test_wrong_records_and_columns(tmp_path):
    with pytest.raises(ValueError, match="0 rows"):
        PairDataset([], COLUMNS)
    with pytest.raises(ValueError, match="column 'captions'"):
        PairDataset([{"image": b"", "text": "a"}], COLUMNS)
    with pytest.raises(ValueError, match="has no length"):
        PairDataset((row for row in rows(2)), COLUMNS)
    records = load_records(write_pairs_parquet(tmp_path / "pairs.parquet", 4))
    assert PairDataset(records).columns == {"image": "image", "caption": "captions"}
    with pytest.raises(IndexError):
        PairDataset(records)[4]


def test_batches_and_exact_ids(tokenizer):
    data = rows(4, captions=1)
    data[2]["captions"] = data[0]["captions"]  # the same caption
    data[3]["image"] = data[1]["image"]  # the same image
    dataset = PairDataset(data, COLUMNS)
    batch = PairCollator(ImageTransform(tiny_image_processor()), tokenizer, 16)([dataset[i] for i in range(4)])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "caption_ids", "image_ids"}
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    captions, images = batch["caption_ids"], batch["image_ids"]
    assert captions.dtype == images.dtype == torch.int64
    assert captions[0] == captions[2] and len(set(captions.tolist())) == 3
    assert images[1] == images[3] and len(set(images.tolist())) == 3
    assert captions[0] == text_id(data[0]["captions"][0]) and images[0] == bytes_id(data[0]["image"])
    # Stable over releases: they may be written down.
    assert text_id("a red circle") == 1934406655020654534


def test_ids_of_paths_and_images(tmp_path, tokenizer):
    image, _, _ = labelled_image(0)
    for name in ("a.png", "copy.png"):
        image.save(tmp_path / name)
    data = [{"image": str(tmp_path / name), "captions": "x"} for name in ("a.png", "copy.png")]
    data += [{"image": image, "captions": "y"}, {"image": image.copy(), "captions": "y"}]
    dataset = PairDataset(data, COLUMNS)
    ids = [dataset[i]["image_id"] for i in range(4)]
    assert ids[0] == ids[1] and ids[2] == ids[3]


def test_long_captions_are_cut_and_odd_settings_refused(tokenizer):
    transform = ImageTransform(tiny_image_processor())
    row = {"image": random_image(), "caption": "a red circle on the left " * 2000}
    batch = PairCollator(transform, tokenizer, 12)([row, {"image": random_image(1), "caption": "a star"}])
    assert batch["input_ids"].shape == (2, 12) and batch["attention_mask"][1].sum() < 12
    padded = PairCollator(transform, tokenizer, 12, padding="max_length")([{"image": random_image(), "caption": "a"}])
    assert padded["input_ids"].shape == (1, 12)
    with pytest.raises(ValueError, match="max_length=1"):
        PairCollator(transform, tokenizer, 1)
    with pytest.raises(ValueError, match="padding='left'"):
        PairCollator(transform, tokenizer, 12, padding="left")

    class NoPadding:
        pad_token_id = None

    with pytest.raises(ValueError, match="has no padding token"):
        PairCollator(transform, NoPadding(), 12)


def test_training_batches_do_not_depend_on_workers(tokenizer):
    dataset = PairDataset(rows(12), COLUMNS, seed=5)
    collate = PairCollator(ImageTransform(tiny_image_processor(), train=True, scale=(0.4, 0.8)), tokenizer, 16)
    alone = list(DataLoader(dataset, batch_size=4, collate_fn=collate))
    workers = list(DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=2))
    for one, other in zip(alone, workers, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(tmp_path, tokenizer):
    """Through the Trainer: captions and crops of the second epoch are the same after a restart inside it."""
    from transformers import Trainer, TrainingArguments

    from mllm_vision.data.records.sampling import EpochCallback

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.met: list[tuple] = []

        def forward(self, pixel_values, input_ids, attention_mask, caption_ids, image_ids):
            if self.training:
                self.met.append((caption_ids.tolist(), float(pixel_values.double().sum())))
            return {"loss": (self.weight - pixel_values.mean()).square().sum()}

    def train(folder, resume=None):
        model = Model()
        arguments = TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=4, num_train_epochs=3, save_steps=5, report_to="none",
            remove_unused_columns=False, seed=1, use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=PairDataset(rows(16), COLUMNS, seed=2),
            data_collator=PairCollator(
                ImageTransform(tiny_image_processor(), train=True, scale=(0.4, 0.8)), tokenizer, 16
            ),
            callbacks=[EpochCallback()],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.met

    whole = train("whole")
    assert len(whole) == 12 and len({str(met) for met in whole}) == 12
    resumed = train("resumed", resume=str(tmp_path / "whole" / "checkpoint-5"))  # four steps an epoch
    assert resumed == whole[5:]


def test_real_pairs(data_dir, tokenizer):
    records = load_records(data_dir / "flickr8k_val.parquet", max_rows=64)
    dataset = PairDataset(records)
    batch = PairCollator(ImageTransform(tiny_image_processor("siglip", 64)), tokenizer, 64)(
        [dataset[i] for i in range(64)]
    )
    assert batch["pixel_values"].shape == (64, 3, 64, 64)
    assert dataset.bad_samples.count == 0
    assert len(dataset.captions(0)) == 5 and dataset[0]["caption"] in dataset.captions(0)
