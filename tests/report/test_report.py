"""The page and the flat results from made-up files: complete, partial, broken and hostile."""

from __future__ import annotations

import json
import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import fakes

from mllm_vision.report import Chain, flat_results, load_chain, render, write_report, write_results
from mllm_vision.report.chain import Stage, split_name
from mllm_vision.report.charts import Line, line_chart, pair_grid, smooth, ticks
from mllm_vision.report.format import compact, duration, embedded, label, number, percent, shown, veil
from mllm_vision.report.images import sample_cards
from mllm_vision.report.lineage import edges
from mllm_vision.report.page import draw
from mllm_vision.report.sections import curves, evaluations, intro

VOID = {"meta", "img", "br", "path", "rect", "line", "circle", "polyline", "image"}


class Checker(HTMLParser):
    """Every tag closed in order, and every address that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def _note(self, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert all(address.startswith("data:image/") for address in checker.addresses)
    assert "url(http" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    assert "NaN" not in page and "None" not in "".join(checker.text)
    return checker


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    runs, evaluations = fakes.write_chain(tmp_path_factory.mktemp("chain"))
    return load_chain(runs, evaluations)


def test_the_whole_page(chain) -> None:
    page = render(chain)
    text = "".join(check(page).text)
    for words in (
        "Stage zero",
        "Language model",
        "Stage one",
        "Stage two",
        "The chain",
        "What it looks at",
        "trained blind",
        "By type of question",
        "Wrong answers",
        "What was trained",
        "did not move",
        "unseen pairs",
        "12\u202fmin",
        "effective rank 31.4",
        "chance 4.85",
        "Measured on test data",
        "Validation, while training",
        "of single_test.parquet",
        "15 of 16",
        "truncated PNG",
        "torch 2.13.0",
    ):
        assert words in text, words
    assert fakes.digest("e")[:8] in text
    assert len(page) < 600_000
    assert page.count("<style>") == 1 and "prefers-color-scheme: dark" in page and "@media print" in page
    used = set(re.findall(r"(?:tint|frame)-[a-z]+", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))
    assert used and all(f".{name} " in page for name in used)  # each colour class is in the style sheet


def test_a_page_of_images_alone() -> None:
    """Its views, the curves that show a collapse and the parts of the loss; nothing of texts."""
    red, blue = (fakes.data_uri(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
    history = fakes.loss_history(40, 7.0, 5.0)
    for entry in history:
        entry |= {"h_spread": 0.9, "z_spread": 0.8, "h_rank": 7.5, "dino": 5.0, "ibot": 6.0, "teacher_entropy": 2.0}
    data = {"train": {"rows": 50000, "columns": {"image": "image", "label": "label"}, "samples": []}}
    arrays = {"views": [{"image": red, "views": [blue, "http://elsewhere/pixel.png"]}, {"image": "x", "views": []}]}
    record = fakes.run("stage_zero", history=history, data=data, arrays=arrays)
    hashes = {"sha256_before": "a" * 64, "sha256_after": "b" * 64, "moved": True}
    record["modules"] = [{"group": "teacher", "parameters": 8, "trainable": 0, "follows": True, **hashes}]
    record["artifact_is"] = "the teacher's encoder"
    record["method"] = {"chance_loss": 6.9, "loss_parts": ["dino", "ibot"], "citation": "", "about": "It learns alone."}
    record["evaluations"] = {"knn": {"accuracy": 0.4, "primary_metric": "accuracy", "baselines": {"chance": 0.1}}}
    for entry in history[::2]:
        entry["eval_knn_accuracy"] = 0.3
    record["health"] = [{"step": 50, "name": "collapse", "message": "collapse: all h <embeddings> point one way"}]
    page = render(Chain([Stage("stage_zero", run=record)]))
    assert "<h1>Stage zero" in page and "From images to answers" not in page
    text = "".join(check(page).text)
    for words in ("It learns alone.", "Views", "view 1", "Spread of the embeddings", "Effective rank", "dimensions"):
        assert words in text, words
    for words in ("chance 6.9", "chance 10.0\u202f%", "Measured on validation data", "per cent"):
        assert words in text, words
    assert '<span class="right">moved</span>' in page and "follows" in text  # a teacher is meant to move
    assert "Saved and measured: the teacher's encoder." in text
    assert "step 50: collapse: all h <embeddings> point one way" in text
    assert "Parts of the loss" in text and "Entropy of the teacher" in text
    assert page.count(red) == page.count(blue) == 1 and "elsewhere" not in page
    assert "their texts" not in text and "The chain" not in text
    paired = fakes.run("stage_zero", history=history)  # with captions
    assert "Spread of the embeddings" not in render(Chain([Stage("stage_zero", run=paired)]))


def test_lineage_follows_the_weight_hashes(chain) -> None:
    assert edges(chain) == [
        ("stage_zero", "stage_one", "encoder"),
        ("language_model", "stage_one", "language model"),
        ("stage_one", "stage_two", "vlm"),
    ]


def test_flat_results(chain, tmp_path) -> None:
    results = write_results(chain, tmp_path / "r" / "results.json")
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == results == flat_results(chain)
    expected = {
        "stage_zero/zero_shot_accuracy": 0.978,
        "stage_zero/untrained_zero_shot_accuracy": 0.071,
        "stage_zero/unseen_zero_shot_accuracy": 0.891,
        "stage_zero/zero_shot_accuracy_chance": 0.066667,
        "stage_zero/retrieval_r1": 0.79,
        "stage_zero/retrieval_r1_chance": 0.005,
        "stage_zero/untrained_retrieval_r1": 0.01,
        "stage_two/accuracy": 0.9,
        "stage_two/accuracy_colour": 0.99,
        "stage_two/unseen_accuracy": 0.83,
        "stage_two/majority_accuracy": 0.21,
        "stage_two/majority_by_type_accuracy": 0.36,
        "stage_two/blind_accuracy": 0.37,
        "stage_two/untrained_encoder_accuracy": 0.62,
        "stage_one/captions_loss": 0.91,  # no evaluation file: what the run measured itself
        "stage_one/blank_captions_loss": 2.2,
    }
    assert {key: results[key] for key in expected} == pytest.approx(expected)
    assert all(isinstance(value, float) for value in results.values())
    assert not any("count" in key.rpartition("/")[2].split("_")[-1] for key in results if "accuracy" not in key)


def test_several_files_of_one_stage_are_merged(tmp_path) -> None:
    parts = {"zero_shot": {"accuracy": 0.5, "task": "zero_shot"}, "retrieval": {"r1": 0.25, "task": "retrieval"}}
    names = []
    for name, entry in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": "evaluation", "evaluations": {name: entry}}))
        names.append(f"stage_zero={tmp_path / name}.json")
    results = flat_results(load_chain([], names))
    assert results == {"stage_zero/zero_shot_accuracy": 0.5, "stage_zero/retrieval_r1": 0.25}


@pytest.mark.parametrize(
    "missing", ["history", "evaluations", "modules", "parents", "artifacts", "data", "machine", "recipe"]
)
def test_a_missing_part_leaves_no_hole(missing, caplog) -> None:
    record = fakes.stage_two()
    del record[missing]
    chain = Chain()
    chain.stages = [Stage("stage_two", run=record)]
    with caplog.at_level(logging.WARNING):
        page = render(chain)
    check(page)
    assert not caplog.records and "Stage two" in page
    assert not re.search(r"<(h3|h4|figure|ul|table)[^>]*>\s*</", page)


def test_broken_parts_are_left_out_and_the_page_is_drawn(caplog) -> None:
    """Wrong types in every place a file could have them."""

    record = fakes.stage_zero()
    record |= {
        "history": [{"step": 1, "loss": None}, "x", {"step": 2, "loss": float("nan")}],
        "modules": ["?", {"group": 3}],
    }
    record |= {"data": {"train": 7}, "parents": [3], "verdict": None, "machine": "a computer", "seconds": "long"}
    evaluation = fakes.stage_zero_evaluation()
    evaluation["arrays"] |= {
        "retrieval/similarity": {"matrix": [[1]], "captions": None},
        "maps/maps": [{"image": 5}, 7],
    }
    evaluation["arrays"]["zero_shot/confusion"] = {"classes": ["a", "b"], "counts": [["x"], 3]}
    evaluation["evaluations"]["retrieval"] = "gone"
    with caplog.at_level(logging.WARNING):
        page = render(Chain([Stage("stage_zero", run=record, files={"": evaluation})]))
    check(page)
    assert ("97.8" in page and "Spectrum of the embeddings" in page) or caplog.records


def test_hostile_text_is_escaped() -> None:

    evil = "<script>alert(1)</script>\"'"
    record = fakes.stage_two()
    record |= {"name": evil, "command": evil, "verdict": f"{evil}: better", "recipe": {evil: evil}}
    record["modules"][0]["group"] = evil
    record["artifacts"][0]["name"] = evil
    evaluation = fakes.stage_two_evaluation()
    evaluation["samples"][0] |= {"question": evil, "prediction": evil, "image": "https://example.com/spy.png"}
    evaluation["evaluations"]["vqa"]["details"]["tables"]["question_type"][0] |= {"name": evil, "majority_answer": evil}
    evaluation["evaluations"][evil] = {evil: 0.5, "baselines": {evil: {evil: 0.25}}, "task": evil}
    record["history"][-1] |= {f"eval_{evil}_accuracy": 0.5, f"learning_rate{evil}": 1.0}
    record["health"] = [{"step": 1, "message": evil}]
    record["versions"] = record["machine"] = {evil: evil}
    name = 'stage_two"><script>'
    page = render(Chain([Stage(name, run=record, files={"": evaluation})]), title=evil)
    checker = check(page)  # no <script>, no foreign address
    assert "alert(1)" in "".join(checker.text)
    assert not embedded("data:image/svg+xml;base64,AAAA") and not embedded('data:image/png;base64,AA" onload="x')
    assert embedded("data:image/png;base64,AA==")


def test_unreadable_files_are_named_and_left_out(tmp_path, caplog) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        chain = load_chain([tmp_path / "nothing", tmp_path / "list.json"], [f"stage_two={tmp_path / 'broken.json'}"])
    assert chain.stages == [] and len(caplog.records) == 3
    assert "broken.json" in caplog.text and "nothing" in caplog.text
    check(render(chain))


def test_a_report_that_cannot_be_written_ends_nothing(chain, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    assert write_report(chain, tmp_path / "file" / "report.html") is False
    assert "could not be written" in caplog.text
    assert write_report(chain, tmp_path / "new" / "report.html") is True
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html"]


def test_samples_of_text_and_captions() -> None:
    samples = [
        {"prompt": "a large", "continuation": "red circle", "reference": "blue square"},
        {"image": "https://example.com/a.png", "question": "", "prediction": "word " * 100, "answer": "a ring"},
        {"question": "what?", "prediction": "", "answer": "red", "correct": False},
        {"prediction": "a dog", "answer": "one hound", "references": ["one hound", "two hounds"]},
    ]
    page = draw("parts.samples", sample_cards, samples)
    assert "reference: one hound / two hounds" in page
    text = "".join(check(page).text)
    assert "Outputs" in text and "red circle" in text and "reference: blue square" in text
    assert "(nothing)" in text and "correct: red" in text and "example.com" not in page
    assert text.count("word") < 40


def test_pair_grid_frames_the_unseen_pairs() -> None:
    cells = {(a, b): (0.5, 10, False) for a in ("red", "blue") for b in ("ring", "square")}
    assert "frame-" not in draw("charts.heat_map", pair_grid, cells)
    cells["red", "square"] = (0.25, 4, True)
    svg = draw("charts.heat_map", pair_grid, cells)
    assert svg.count("frame-unseen") == 1 and "never occur in training" in svg and ">25%<" in svg
    assert pair_grid({("red", "ring"): (1.0, 3, False)}) is None


def test_the_untrained_column_stands_beside_the_model(chain) -> None:
    """Narrow screens cut a table on its right, so what matters most comes first; header cells may break."""
    entry = {
        "accuracy": 0.5,
        "baselines": {"chance": 0.1, "most_frequent_class": 0.2, "raw_pixels": 0.4, "untrained": 0.3},
    }
    found = evaluations(Stage("stage_zero", run={"evaluations": {"knn": entry}}))
    assert found["split"] == "validation" and found["tables"][0]["columns"][:2] == ["model", "untrained"]
    assert found["tables"][0]["columns"][-1] == "chance"


def test_what_a_method_names_is_drawn() -> None:
    """The parts of its loss and its sentence come from run.json alone."""
    record = fakes.run("stage_zero", history=[{"step": n, "pull": 1.0, "push": 2.0, "loss": 3.0} for n in (1, 2)])
    assert not curves(Stage("stage_zero", run=record))["folded"]
    record["method"] = {"loss_parts": ["pull", "push", "never_logged"], "about": "Pulls and pushes."}
    (chart,) = curves(Stage("stage_zero", run=record))["folded"]
    assert [line.name for line in chart.lines] == ["pull", "push"]
    assert "Pulls and pushes." in draw("parts.intro", intro, Stage("stage_zero", run=record))


def test_names() -> None:
    assert split_name("stage_two/blind=a/b.json") == ("stage_two", "blind", "a/b.json")
    assert split_name("runs/x=3/run.json") == ("runs", "x", "3/run.json")  # say ./runs/x=3 for such a path
    assert split_name("./runs/x=3/run.json") == ("", "", "./runs/x=3/run.json")
    assert split_name("runs/a") == ("", "", "runs/a")


def test_numbers_as_people_read_them() -> None:
    assert percent(0.9563) == "95.6\u202f%" and number(24000) == "24,000" and number(0.5) == "0.500"
    assert duration(95) == "1\u202fmin 35\u202fs" and duration(3720) == "1\u202fh 2\u202fmin"
    assert compact(1_630_000) == "1.63\u202fM" and compact(12) == "12"
    assert shown("retrieval_r1", 0.5) == "50.0\u202f%" and shown("effective_rank", 31.44) == "31.4"
    assert label("image_to_text_r5") == "R@5, image to text" and label("r1") == "R@1" and label("a_b") == "a b"


def test_axes() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(3, 3) == [3] and ticks(-2.9, -0.1) == [-2, -1]
    assert ticks(1e-6, 1.2, log=True) == pytest.approx([1e-6, 1e-4, 1e-2, 1])
    line = [(i, 2.0 * i) for i in range(200)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    assert line_chart("t", [Line("a", [(1, float("nan")), (2, 3.0)], "model")]) is None
    assert "polyline" in draw("charts.chart", line_chart, "t", [Line("a", [(1, 1.0), (2, 1.0)], "model")])


def test_veil_is_clear_where_the_map_is_strong() -> None:
    import base64
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(veil([[0.0, 1.0], [-5.0, 0.5]]).partition(",")[2])))
    assert image.size == (2, 2) and image.mode == "LA"
    alpha = [image.getpixel((x, y))[1] for y in range(2) for x in range(2)]
    assert alpha[1] == 0 and alpha[0] == alpha[2] == 228 and 0 < alpha[3] < 100


def test_what_a_run_could_not_do_stands_with_its_verdict() -> None:
    run = {"missing": [{"step": "evaluation of <knn>", "cause": "KeyError: 3"}], "verdict": "knn accuracy: better"}
    page = draw("parts.intro", intro, Stage("stage_zero", run=run))
    assert '<li class="bad">missing: evaluation of &lt;knn&gt; (KeyError: 3)</li>' in page
    assert '<li class="title">validation</li>' in page and '<li class="good">knn accuracy: better</li>' in page
