"""The doctor: each finding is provoked by what it is about, and stays away from a run that is in order."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from pairs_for_tests import make_dual, make_objective, pair_batches, tokenizer

from mllm_vision.data import PairDataset
from mllm_vision.functional.image_text import related
from mllm_vision.training.preflight import checks
from mllm_vision.training.preflight.checks import Finding, PairSample
from mllm_vision.training.preflight.memory import (
    FakeStep,
    MeasuredStep,
    PeakCounter,
    StepMemory,
    available_memory,
    show_bytes,
)
from mllm_vision.training.trainer.gradient_cache import cached_backward

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def levels(findings: Iterable[Finding], level: str) -> list[str]:
    return [finding.text for finding in findings if finding.level == level]


def run(check: Callable[..., Iterable[Finding]], *args: Any, **settings: Any) -> list[Finding]:
    return list(check(*args, **settings))


def rows(captions: list[Any], images: list[int] | None = None) -> PairDataset:
    """Records with these captions; equal numbers in `images` are equal images."""
    numbers = images or list(range(len(captions)))
    encoded = [tiny.image_bytes(tiny.random_image(number)) for number in numbers]
    return PairDataset([{"image": data, "caption": text} for data, text in zip(encoded, captions)])


def sampled(captions: list[Any], images: list[int] | None = None, **settings: Any) -> PairSample:
    dataset = rows(captions, images)
    return checks.sample_pairs(dataset, rows=len(dataset), **settings)


# ---- the sample, batch, duplicates ---------------------------------------------------------------------------


def test_the_sample_has_the_ids_of_training() -> None:
    captions = [["a red circle", "one circle"], "a blue star", "a red circle", ["", "  "], "a blue star"]
    sample = sampled(captions, [0, 1, 2, 3, 1])
    dataset = rows(captions, [0, 1, 2, 3, 1])
    trained = [dataset[index] for index in (0, 1, 2, 4)]
    assert sample.captions == [row["caption"] for row in trained]
    assert sample.image_ids == [row["image_id"] for row in trained]
    assert len(sample.bad) == 1 and "row 3: the caption is empty" in sample.bad[0]
    assert len(sample.images) == 4 and sample.rows == 5
    few = checks.sample_pairs(dataset, 2, rows=5)
    assert len(few.captions) + len(few.bad) == 2 and set(few.image_ids) <= set(sample.image_ids)


def test_expected_positives_are_those_of_all_batches() -> None:
    """Against the mean over every batch of three that can be drawn, counted with the relations of the loss."""
    sample = PairSample(6, list("aabcda"), [1, 1, 2, 3, 4, 1], [7, 8, 8, 9, 9, 7])
    ids = torch.tensor([sample.caption_ids, sample.image_ids]).T
    counted = [related(ids[list(b)], ids[list(b)]).sum(1).float().mean() for b in itertools.combinations(range(6), 3)]
    assert sample.positives(3) == pytest.approx(torch.stack(counted).mean().item())
    assert sample.positives(1) == 1.0 and PairSample(1, ["a"], [1], [1]).positives(8) == 1.0


def test_effective_negatives() -> None:
    alone = sampled([f"caption {index}" for index in range(32)])
    (text,) = levels(run(checks.check_batch, 16, alone, 0)[:1], "ok")
    assert text == "16 pairs meet in a loss: 15 effective negatives per anchor"
    common = sampled(["one", "two"] * 16)
    expected = 15 - 15 * 15 / 31  # of 31 others 15 have the same caption
    assert f"{expected:.6g} effective negatives per anchor (of 15, " in run(checks.check_batch, 16, common, 0)[0].text
    assert "and 64 of a queue: 79 effective" in run(checks.check_batch, 16, alone, 0, queue=64)[0].text
    assert levels(run(checks.check_batch, 1, alone), "problem")
    assert "20 steps use 320 pairs: 10 passes over 32" in run(checks.check_batch, 16, alone, 20)[1].text


def test_the_batch_for_the_data() -> None:
    """The published points themselves, and no finding where a batch is near them."""
    for data, best in ((3e6, 16_384), (12e6, 32_768), (400e6, 262_144)):
        assert checks.published_batch(data) == (best, False)
    grown = [checks.published_batch(data)[0] for data in (1e4, 1e5, 3e6, 6e6, 12e6, 1e8, 4e8, 5e9)]
    assert grown == sorted(grown) and checks.published_batch(5e9) == (262_144, True)
    assert checks.published_batch(6e6)[0] == pytest.approx(16_384 * math.sqrt(2), rel=1e-3)
    for data, batch, word in (
        (12_000_000, 1024, "is small"),
        (12_000_000, 32_768, "usual"),
        (30_000, 32_000, "is large"),
    ):
        found = run(checks.check_batch, batch, PairSample(data, ["a", "b"], [1, 2], [1, 2]))
        assert word in found[-1].text and found[-1].level == ("ok" if word == "usual" else "advice")
    assert (
        len(run(checks.check_batch, 64, PairSample(None, ["a", "b"], [1, 2], [1, 2]), 10)) == 1
    )  # a stream without an end


def test_duplicates_are_counted_and_judged() -> None:
    healthy = run(checks.check_duplicates, sampled([f"caption {index}" for index in range(40)]), 16)
    assert [finding.level for finding in healthy] == ["ok"] and "of all 40 rows 0 repeat a caption" in healthy[0].text
    common = sampled(["one", "two", *(f"caption {index}" for index in range(38))] * 2, list(range(40)) * 2)
    seen = run(checks.check_duplicates, common, 64)
    assert "40 repeat a caption (50.00%) and 40 an image (50.00%)" in seen[0].text and "'one' 2 times" in seen[0].text
    assert any("many rows have the same image" in text for text in levels(seen, "advice"))
    (problem,) = levels(run(checks.check_duplicates, common, 64, positives=False), "problem")
    assert "0.8 false negatives per anchor" in problem
    assert any("few negatives remain" in text for text in levels(
        run(checks.check_duplicates, sampled(["one", "two", "three"] * 8), 16), "advice"))  # fmt: skip
    broken = run(checks.check_duplicates, sampled(["", *"abcdefgh"]), 4)
    assert any("11.11% of the rows cannot be used, such as row 0" in text for text in levels(broken, "problem"))
    assert levels(run(checks.check_duplicates, sampled(["", ""]), 4), "problem")


def test_images_of_the_evaluation_in_the_training_data() -> None:
    sample = sampled([f"caption {index}" for index in range(10)])
    data = [tiny.image_bytes(tiny.random_image(number)) for number in (3, 11, 12)]
    (found,) = run(checks.check_leak, sample, [*data, None])
    assert found.level == "problem" and found.text.startswith("1 of 3 evaluation images")
    assert run(checks.check_leak, sample, data[1:])[0].level == "ok"


# ---- loss and bias -------------------------------------------------------------------------------------------


def test_chance_and_the_loss_before_the_first_step() -> None:
    alone = PairSample(64, list("abcd"), [1, 2, 3, 4], [1, 2, 3, 4])
    clip = make_objective("clip")
    batch = pair_batches(1, 16)[0]
    chance, start = run(checks.check_start, clip, batch, 128, alone)
    assert chance.text == f"at chance the loss is {math.log(128):.4f} for 128 pairs"
    expected = clip.eval()(**batch).loss.item()
    assert f"it is {expected:.4f} for 16 pairs, and chance for them {math.log(16):.4f}" in start.text
    sharp = make_objective("clip", initial_logit_scale=100.0)
    assert "confident errors" in levels(run(checks.check_start, sharp, batch, 16, alone), "advice")[0]
    assert not clip.training


@pytest.mark.parametrize(("bias", "level"), [(12.0, "advice"), (-30.0, "advice"), (None, "ok")])
def test_the_bias_to_start_from(bias: float | None, level: str) -> None:
    """The bias it names makes the sum of the probabilities of the others what it should be."""
    alone = PairSample(64, list("abcd"), [1, 2, 3, 4], [1, 2, 3, 4])
    batch = {name: value for name, value in pair_batches(1, 16)[0].items() if not name.endswith("_ids")}
    batch["input_ids"] = pair_batches(1, 16)[0]["input_ids"]
    objective = make_objective("siglip", initial_logit_bias=20.0)
    seen = run(checks.check_start, objective, batch, 16, alone)[-1].text
    named = float(seen.partition(": ")[2].split()[0])
    if bias is None:
        bias = named
    with torch.no_grad():
        objective.dual.logit_bias.fill_(named)
        features = objective.eval().embed(**batch)
        answers = objective.dual.logits(features["image"], features["text"]).sigmoid()
    others = (answers.sum() - answers.diagonal().sum()) / (16 * 15) * 15
    assert others.item() == pytest.approx(1.0, rel=0.02)
    with torch.no_grad():
        objective.dual.logit_bias.fill_(bias)
    assert run(checks.check_start, objective, batch, 16, alone)[-1].level == level
    objective.config.initial_logit_bias = None  # that of a trained pair stands
    assert "initial_logit_bias" not in run(checks.check_start, objective, batch, 16, alone)[-1].text


# ---- settings ------------------------------------------------------------------------------------------------


IMAGES = PairSample(None, images=[tiny.labelled_image(index, 64)[0] for index in range(8)])


def test_image_settings_in_order() -> None:
    found = run(checks.check_images, make_dual().vision, IMAGES)
    assert [finding.level for finding in found] == ["ok"] and "32 px; 8 images have mean" in found[0].text


@pytest.mark.parametrize(
    ("change", "settings", "level", "word"),
    [
        (
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            {"trained_size": 32},
            "advice",
            "not those of clip_vision_model",
        ),
        ({"do_rescale": False}, {}, "problem", "do_rescale=false"),
        ({"do_rescale": False}, {}, "problem", "normalisation does not fit"),
        ({"do_normalize": False}, {}, "problem", "do_normalize=false"),
        ({}, {"trained_size": 224}, "advice", "trained at 224 px and gets 32 px"),
        ({}, {"crop_scale": (0.08, 1.0)}, "advice", "crop_scale 0.08"),
    ],
)
def test_image_settings_that_disagree(change: dict, settings: dict, level: str, word: str) -> None:
    vision = make_dual().vision
    for name, value in change.items():
        setattr(vision.processor, name, value)
    found = run(checks.check_images, vision, IMAGES, **settings)
    assert any(word in text for text in levels(found, level))


def test_images_that_are_enlarged_or_missing() -> None:
    vision = make_dual().vision
    small = PairSample(None, images=[tiny.random_image(index, (40, 16)) for index in range(4)])
    assert any("100% of the images are smaller" in text for text in levels(
        run(checks.check_images, vision, small), "advice"))  # fmt: skip
    assert levels(run(checks.check_images, vision, PairSample(None)), "problem")


def test_text_settings() -> None:
    sample = PairSample(None, captions=[f"a {colour} {shape}" for colour in tiny.COLOURS for shape in tiny.SHAPES])
    dual = make_dual()
    found = run(checks.check_texts, dual, sample)
    assert [finding.level for finding in found] == ["ok"] and "limit 24" in found[0].text
    long = PairSample(None, captions=[" ".join(["a red circle on the left"] * 12)] * 2)
    (cut,) = levels(run(checks.check_texts, dual, long), "problem")
    assert "cuts 100.0% of them: the tower has positions for 77 (--max_text_length)" in cut
    foreign = PairSample(None, captions=["картина красного круга", "синяя звезда справа"])
    assert any("tokens per word" in text for text in levels(run(checks.check_texts, dual, foreign), "advice"))
    assert not levels(run(checks.check_texts, dual, sample, tower_tokenizer=dual.tokenizer), "problem")


def test_a_tokenizer_that_is_not_the_towers(tmp_path: Path) -> None:
    sample = PairSample(None, captions=["a red circle", "a blue star"])
    dual, other = make_dual(), tiny.tiny_tokenizer(tmp_path, vocab_size=300)
    problems = levels(run(checks.check_texts, dual, sample, tower_tokenizer=other), "problem")
    assert any("entries of the vocabulary differ" in text for text in problems)
    with_bos = tokenizer().__class__.from_pretrained(tokenizer().name_or_path)
    with_bos.add_bos_token = True
    problems = levels(run(checks.check_texts, dual, sample, tower_tokenizer=with_bos), "problem")
    assert any("texts begin with id" in text for text in problems)


def test_unknown_words_and_padding() -> None:
    class Words:
        """A tokenizer of three words; everything else is unknown."""

        unk_token_id, eos_token_id, pad_token_id, bos_token_id = 1, 3, 0, None
        model_input_names, model_max_length = ["input_ids"], 8

        def get_vocab(self) -> dict[str, int]:
            return {"a": 5, "red": 6, "star": 7}

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {
                "input_ids": [[{"a": 5, "red": 6, "star": 7}.get(word, 1) for word in t.split()] + [3] for t in texts]
            }

    config = SimpleNamespace(model_type="siglip_text_model", pad_token_id=9, max_position_embeddings=8)
    dual: Any = SimpleNamespace(tokenizer=Words(), max_text_length=8, text=SimpleNamespace(config=config))
    problems = levels(run(checks.check_texts, dual, PairSample(None, captions=["a red dog"])), "problem")
    assert any("25.0% of the tokens are unknown" in text for text in problems)
    assert any("attends to its padding, id 9, and the tokenizer pads with 0" in text for text in problems)
    config.pad_token_id = 0
    assert not levels(run(checks.check_texts, dual, PairSample(None, captions=["a red star"])), "problem")


# ---- memory --------------------------------------------------------------------------------------------------


def peak_of(step: Callable[[], Any]) -> int:
    """The counted peak of real tensors in the second of two calls."""
    with PeakCounter() as count:
        for _ in range(2):
            count.most = count.now
            step()
    return count.most


@pytest.mark.parametrize("kind", ["clip", "itc"])
def test_a_step_on_fake_tensors_counts_what_a_real_one_allocates(kind: str) -> None:
    """Whole and in chunks, against the same count on real tensors (its batch has no padding to leave out)."""
    objective, batch = make_objective(kind).train(), pair_batches(1, 32)[0]
    optimizer = torch.optim.AdamW(objective.parameters())
    fake = FakeStep(objective, batch, optimizer)
    before = [value.clone() for value in objective.parameters()]
    whole, chunked = fake.measure(32), fake.measure(32, 8)
    assert all(torch.equal(*pair) for pair in zip(before, objective.parameters())) and not optimizer.state

    def step(size: int | None) -> None:
        if size is None:
            objective(**batch).loss.backward()
        else:
            cached_backward(objective, batch, size)
        optimizer.step()
        optimizer.zero_grad()

    for size, seen in ((None, whole), (8, chunked)):
        optimizer.state.clear()
        real = peak_of(lambda: step(size))  # noqa: B023
        assert seen.activations + seen.optimizer == pytest.approx(real, rel=0.05)
    assert whole.activations > 2.5 * chunked.activations and whole.batch == chunked.batch
    assert whole.batch == 2 * sum(value.nbytes for value in batch.values())


def test_parameters_and_optimizer_are_counted() -> None:
    objective, batch = make_objective("clip").eval(), pair_batches(1, 8)[0]
    objective.dual.text.requires_grad_(False)
    trained = [value for value in objective.parameters() if value.requires_grad]
    grown = sum(value.nbytes for value in trained)
    weights = sum(value.nbytes for value in [*objective.parameters(), *objective.buffers()])
    for optimizer, states in (
        (torch.optim.AdamW(trained), 2),
        (torch.optim.SGD(trained, lr=0.1, momentum=0.9), 1),
        (torch.optim.SGD(trained, lr=0.1), 0),
    ):
        counted = FakeStep(objective, batch, optimizer).measure(8)
        assert counted.optimizer == pytest.approx(states * grown, abs=4 * len(trained))
        assert counted.weights == weights and not objective.training
    assert FakeStep(objective, batch, optimizer, averaged=True).measure(8).weights == 2 * weights


def test_the_count_against_the_resident_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process takes from the system for a step: the allocator may keep up to half more than is counted."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmark")
    from timing import peak_memory

    from mllm_vision.encoder.dual import DualEncoder
    from mllm_vision.encoder.encoder import VisionEncoder
    from mllm_vision.objectives import load_objective

    vision = {"hidden_size": 96, "intermediate_size": 384, "image_size": 64, "patch_size": 8}
    small = make_dual()
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(**vision), tiny.tiny_image_processor("clip", 64))
    method = load_objective("clip")
    objective = method(DualEncoder(encoder, small.text, small.tokenizer, embed_dim=16), method.Config())
    batch = {**pair_batches(1, 256)[0], "pixel_values": torch.randn(256, 3, 64, 64)}
    optimizer = torch.optim.AdamW(objective.parameters())
    expected = FakeStep(objective, batch, optimizer).measure(256).activations

    def step(part: dict[str, torch.Tensor]) -> None:
        objective.train()
        objective(**part).loss.backward()
        optimizer.step()

    step({name: value[:4] for name, value in batch.items()})
    measured = peak_memory(lambda: step(batch))
    assert 0.7 * expected < measured < 1.6 * expected, (show_bytes(expected), show_bytes(measured))


class Trial:
    """A step of which 16 MiB grow with every embedded row, where 1 GiB is state."""

    def measure(self, rows: int, embedded: int | None = None) -> StepMemory:
        return StepMemory(GIB // 2, GIB // 2, min(rows, embedded or rows) * GIB // 64, 0)


@pytest.mark.parametrize(
    ("free", "peak", "rows", "level", "words"),
    [
        (20, None, 64, "ok", "2 GiB of 20 GiB free"),
        (20, 3 * GIB, 128, "ok", "a real step of 64 rows used 3 GiB, 1.50 of the estimate"),
        (20, 3 * GIB, 128, "ok", "4.5 GiB of 20 GiB free"),
        (20, 5 * GIB, 64, "advice", "2.50 of the estimate"),
        (4, None, 256, "problem", "too little; --embed_batch_size 64 would fit"),
        (1, None, 64, "problem", "weights and optimizer do not fit by themselves"),
        (20, None, 64, "ok", "32 rows a second in a step of 64; 100 steps of 64 would take 3 min 20 s"),
    ],
)
def test_memory_against_the_machine(
    monkeypatch: pytest.MonkeyPatch, free: int, peak: int | None, rows: int, level: str, words: str
) -> None:
    monkeypatch.setattr(checks.FakeStep, "of_run", lambda *_: Trial())
    monkeypatch.setattr(checks, "available_memory", lambda _: free * GIB)
    monkeypatch.setattr(checks, "measure_step", lambda *_: MeasuredStep(64, 32.0, peak))
    found = run(checks.check_step, Trial, SimpleNamespace(device=None), {}, rows, None, real_rows=64, steps=100)
    assert any(words in text for text in levels(found, level))


def test_what_fake_tensors_cannot_follow_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("aten._local_scalar_dense")

    monkeypatch.setattr(checks.FakeStep, "of_run", lambda *_: SimpleNamespace(measure=refuse))
    (found,) = run(checks.check_step, Trial, SimpleNamespace(device=torch.device("cpu")), {}, 8, None)
    assert found.level == "advice" and "cannot be counted on fake tensors" in found.text


def test_small_things() -> None:
    assert show_bytes(1536) == "1.5 KiB" and show_bytes(5 * GIB) == "5 GiB" and show_bytes(2**50) == "1024 TiB"
    assert available_memory(torch.device("cpu")) > 0
    findings = [Finding("ok", "b", "x"), Finding("problem", "a", "y"), Finding("advice", "b", "z")]
    lines = checks.report(findings).split("\n")
    assert [line.split()[1:] for line in lines[:3]] == [["b", "x"], ["b", "z"], ["a", "y"]]
    assert lines[-1] == "problem 1, advice 1, ok 1"


# ---- the script ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("doctor_script", ROOT / "scripts" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny.write_pairs_parquet(folder / "train.parquet", 64, captions_each=3)
    tokenizer().save_pretrained(folder / "tokenizer")
    sizes = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"
    lines = [
        "# recipe: pretrain.py", "encoder: clip_vision_model", f"encoder_overrides: {sizes}, patch_size: 8}}",
        f"text_overrides: {sizes}}}", "image_size: 32", "max_text_length: 24", "max_steps: 40",
        "per_device_train_batch_size: 16", f"dataset_name: {folder / 'train.parquet'}",
        f"tokenizer: {folder / 'tokenizer'}", "use_cpu: true",
    ]  # fmt: skip
    (folder / "pretrain.yaml").write_text("\n".join(lines))
    return folder


def test_a_run_in_order(script: Any, data: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    before = sorted(Path.cwd().iterdir())
    flags = ["--config", str(data / "pretrain.yaml"), "--processes", "2", "--measure_rows", "8"]
    assert script.main([*flags, "--embed_batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "32 pairs meet in a loss",
        f"at chance the loss is {math.log(32):.4f} for 32 pairs",
        "of all 64 rows",
        "16 rows a process, 4 embedded at once",
        "rows a second in a step of 8; 40 steps of 16 would take",
        "problem 0",
    ):
        assert words in printed, printed
    assert sorted(Path.cwd().iterdir()) == before  # the measured steps leave nothing


def test_a_run_with_problems(script: Any, data: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--config", str(data / "pretrain.yaml"), "--no_measure", "--objective", "siglip"]
    flags += ["--duplicate_positives", "false", "--initial_logit_bias", "15", "--gradient_accumulation_steps", "2"]
    assert script.main([*flags, "--eval_dataset_name", str(data), "--eval_split", "train"]) == 1
    printed = capsys.readouterr().out
    assert "32 pairs meet in a loss" in printed and "32 rows a process, 16 embedded at once" in printed
    assert "false negatives per anchor" in printed and "64 of 64 evaluation images are among" in printed
    assert "initial_logit_bias 15 predicts" in printed and "measured" not in printed


def test_what_the_recipe_refuses_is_the_last_finding(script: Any, data: Path, capsys: pytest.CaptureFixture) -> None:
    assert script.main(["--config", str(data / "pretrain.yaml"), "--image_size", "33"]) == 1
    printed = capsys.readouterr().out
    assert "refused" in printed and "image_size=33 is not divisible by patch_size=8" in printed


def test_a_streamed_run(script: Any, data: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--config", str(data / "pretrain.yaml"), "--no_measure", "--streaming", "--sample", "20"]
    assert script.main(flags) == 0
    assert "of a sample of 20 rows" in capsys.readouterr().out


def test_configs_of_other_recipes_and_wrong_flags(script: Any, data: Path) -> None:
    with pytest.raises(ValueError, match=r"align.yaml is for recipes/align.py; the doctor examines stage zero"):
        script.main(["--config", str(ROOT / "recipes" / "configs" / "flickr8k" / "align.yaml")])
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        script.main(["--config", str(data / "pretrain.yaml"), "--processes", "0"])
    with pytest.raises(ValueError, match="unknown flag"):
        script.main(["--config", str(data / "pretrain.yaml"), "--learning_rte", "1"])
