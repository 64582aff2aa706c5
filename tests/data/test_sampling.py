"""Rows that cannot be used: one judgement, whatever their values raise, and a count of the reasons."""

import errno
import pickle

import pytest
import torch

from mllm_vision.data import BadImage, BadRow, BadSamples
from mllm_vision.data.chat.messages import BadConversation
from mllm_vision.data.records.sampling import EpochDataset, judge


class Rows(EpochDataset):
    """What each row raises, or its number."""

    def __init__(self, values):
        self.values = values
        super().__init__(0, len(values), None)

    def __len__(self):
        return len(self.values)

    def _read(self, index, key):
        if isinstance(self.values[index], BaseException):
            raise self.values[index]
        return {"row": index}


def test_whatever_a_row_raises_is_a_counted_refusal():
    problems = [
        BadImage("image 'a.png' cannot be decoded"),
        BadConversation("the conversation is empty"),
        BadRow("the caption is empty", "''"),
        ValueError("the 3 views of it: none fits"),
        TypeError("'NoneType' object is not iterable"),
        KeyError("image"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        RecursionError("too deep"),
    ]
    data = Rows([*problems, None])
    assert {data[i]["row"] for i in range(len(data))} == {8}
    bad = data.bad_samples
    assert bad.seen - bad.count == len(data)  # every sample that was asked for came
    assert bad.reasons["the image cannot be decoded"] == 1 and bad.reasons["the conversation is empty"] == 2
    assert bad.reasons["the caption is empty"] == 3 and bad.reasons["the 3 views of it"] == 4
    assert bad.reasons["unexpected KeyError"] == 6 and bad.reasons["unexpected RecursionError"] == 8
    assert sum(bad.reasons.values()) == bad.count
    assert bad.examples[0] == "row 0: image 'a.png' cannot be decoded"


def test_what_is_not_the_rows_doing_is_raised():
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            Rows([error, None])[0]
    assert isinstance(judge("row 0", Rows([FileNotFoundError(errno.ENOENT, "gone")])._read, 0, 0), BadRow)


def test_reasons_are_counted_in_worker_processes_and_more_than_fit_are_counted_together():
    data = Rows([BadRow(f"reason {i % 3}") if i % 2 else None for i in range(12)])
    for _ in torch.utils.data.DataLoader(data, batch_size=None, num_workers=2):
        pass
    assert data.bad_samples.reasons == {"reason 0": 2, "reason 1": 2, "reason 2": 2}
    many = BadSamples(100)
    for number in range(40):
        many.bad("row", f"reason {number}")
    assert sum(many.reasons.values()) == 40 and many.reasons["other reasons"] == 25


def test_a_long_run_of_bad_rows_is_replaced_by_rows_from_all_over():
    data = Rows([BadRow("broken")] * 300 + [None] * 300)
    assert len({data[i]["row"] for i in range(250)}) > 100


def test_refusals_survive_pickling():
    for error in (BadRow("why", "what"), BadImage("image of 3 bytes cannot be decoded", "why"), BadConversation("why")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.reason) == (type(error), str(error), "why")


def test_images_of_a_data_set_that_decodes_them_are_judged_too():
    """`datasets` would open them itself, in any format, and a broken one would be an error of the table."""
    from datasets import Dataset, Features, Image, Value
    from tiny import image_bytes, random_image

    from mllm_vision.data import ImageDataset, PairDataset
    from mllm_vision.evaluation.images import usable_images

    features = Features({"image": Image(), "caption": Value("string")})
    cells = [
        {"bytes": data, "path": None} for data in (image_bytes(random_image(0, 8)), b"broken", b"%!PS-Adobe-3.0 EPSF")
    ]
    data = Dataset.from_dict({"image": cells, "caption": ["a", "b", "c"]}, features=features)
    for dataset in (PairDataset(data), ImageDataset(data)):
        assert {dataset[index]["index"] for index in range(3)} == {0}
        assert dataset.bad_samples.reasons == {"the image cannot be decoded": 3}
    assert usable_images(data, "image", range(3))[1] == [0]
