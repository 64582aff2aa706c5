"""The doctor: each finding is provoked by what it is about, and stays away from a run that is in order."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from pairs_for_tests import make_dual, make_objective, pair_batches, tokenizer
from torch import nn

from mllm_vision.data import PairDataset
from mllm_vision.functional.image_text import related
from mllm_vision.training.preflight import doctor
from mllm_vision.training.preflight import settings as doctor_settings
from mllm_vision.training.preflight.doctor import Finding, PairSample
from mllm_vision.training.preflight.memory import (
    MeasuredStep,
    StepCost,
    available_memory,
    decoded_bytes,
    estimate_step,
    peak_memory,
    show_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def levels(findings: list[Finding], level: str) -> list[str]:
    return [finding.text for finding in findings if finding.level == level]


def rows(captions: list[Any], images: list[int] | None = None) -> PairDataset:
    """Records with these captions; equal numbers in `images` are equal images."""
    numbers = images or list(range(len(captions)))
    encoded = [tiny.image_bytes(tiny.random_image(number)) for number in numbers]
    return PairDataset([{"image": data, "caption": text} for data, text in zip(encoded, captions)])


def sampled(captions: list[Any], images: list[int] | None = None, **settings: Any) -> PairSample:
    dataset = rows(captions, images)
    return doctor.sample_pairs(dataset, rows=len(dataset), **settings)


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
    few = doctor.sample_pairs(dataset, 2, rows=5)
    assert len(few) + len(few.bad) == 2 and set(few.image_ids) <= set(sample.image_ids)


def test_expected_positives_are_those_of_all_batches() -> None:
    """Against the mean over every batch of three that can be drawn, counted with the relations of the loss."""
    sample = PairSample(6, list("aabcda"), [1, 1, 2, 3, 4, 1], [7, 8, 8, 9, 9, 7])
    ids = torch.tensor([sample.caption_ids, sample.image_ids]).T
    counted = [related(ids[list(b)], ids[list(b)]).sum(1).float().mean() for b in itertools.combinations(range(6), 3)]
    assert sample.positives(3) == pytest.approx(torch.stack(counted).mean().item())
    assert sample.positives(1) == 1.0 and PairSample(1, ["a"], [1], [1]).positives(8) == 1.0


def test_effective_negatives() -> None:
    alone = sampled([f"caption {index}" for index in range(32)])
    (text,) = levels(doctor.check_batch(16, alone, 0)[:1], "ok")
    assert text == "16 pairs meet in a loss: 15 effective negatives per anchor"
    common = sampled(["one", "two"] * 16)
    expected = 15 - 15 * 15 / 31  # of 31 others 15 have the same caption
    assert f"{expected:.6g} effective negatives per anchor (of 15, " in doctor.check_batch(16, common, 0)[0].text
    assert "and 64 of a queue: 79 effective" in doctor.check_batch(16, alone, 0, queue=64)[0].text
    assert levels(doctor.check_batch(1, alone), "problem")
    assert "20 steps take 320 pairs: 10 passes over 32" in doctor.check_batch(16, alone, 20)[1].text


def test_the_batch_for_the_data() -> None:
    """The published points themselves, and no finding where a batch is near them."""
    for data, best in ((3e6, 16_384), (12e6, 32_768), (400e6, 262_144)):
        assert doctor.published_batch(data) == (best, False)
    grown = [doctor.published_batch(data)[0] for data in (1e4, 1e5, 3e6, 6e6, 12e6, 1e8, 4e8, 5e9)]
    assert grown == sorted(grown) and doctor.published_batch(5e9) == (262_144, True)
    assert doctor.published_batch(6e6)[0] == pytest.approx(16_384 * math.sqrt(2), rel=1e-3)
    for data, batch, word in (
        (12_000_000, 1024, "is small"),
        (12_000_000, 32_768, "usual"),
        (30_000, 32_000, "is large"),
    ):
        found = doctor.check_batch(batch, PairSample(data, ["a", "b"], [1, 2], [1, 2]))
        assert word in found[-1].text and found[-1].level == ("ok" if word == "usual" else "advice")
    assert len(doctor.check_batch(64, PairSample(None, ["a", "b"], [1, 2], [1, 2]), 10)) == 1  # a stream without an end


def test_duplicates_are_counted_and_judged() -> None:
    healthy = doctor.check_duplicates(sampled([f"caption {index}" for index in range(40)]), 16)
    assert [finding.level for finding in healthy] == ["ok"] and "of all 40 rows 0 repeat a caption" in healthy[0].text
    common = sampled(["one", "two", *(f"caption {index}" for index in range(38))] * 2, list(range(40)) * 2)
    told = doctor.check_duplicates(common, 64)
    assert "40 repeat a caption (50.00%) and 40 an image (50.00%)" in told[0].text and "'one' 2 times" in told[0].text
    assert any("same images stand in many rows" in text for text in levels(told, "advice"))
    (problem,) = levels(doctor.check_duplicates(common, 64, positives=False), "problem")
    assert "0.8 false negatives per anchor" in problem
    assert any("little is left to tell apart" in text for text in levels(
        doctor.check_duplicates(sampled(["one", "two", "three"] * 8), 16), "advice"))  # fmt: skip
    broken = doctor.check_duplicates(sampled(["", *"abcdefgh"]), 4)
    assert any("11.11% of the rows cannot be used, such as row 0" in text for text in levels(broken, "problem"))
    assert levels(doctor.check_duplicates(sampled(["", ""]), 4), "problem")


def test_images_of_the_evaluation_in_the_training_data() -> None:
    sample = sampled([f"caption {index}" for index in range(10)])
    data = [tiny.image_bytes(tiny.random_image(number)) for number in (3, 11, 12)]
    (found,) = doctor.check_leak(sample, [*data, None])
    assert found.level == "problem" and found.text.startswith("1 of 3 evaluation images")
    assert doctor.check_leak(sample, data[1:])[0].level == "ok"


# ---- loss and bias -------------------------------------------------------------------------------------------


def test_chance_and_the_loss_before_the_first_step() -> None:
    alone = PairSample(64, list("abcd"), [1, 2, 3, 4], [1, 2, 3, 4])
    clip = make_objective("clip")
    (found,) = doctor.check_chance(clip, alone, 128)
    assert found.text == f"at chance the loss is {math.log(128):.4f} for 128 pairs"
    batch = pair_batches(1, 16)[0]
    (start,) = doctor.check_start(clip, batch, 16, alone)
    expected = clip.eval()(**batch).loss.item()
    assert f"it is {expected:.4f} for 16 pairs, and chance for them {math.log(16):.4f}" in start.text
    sharp = make_objective("clip", initial_logit_scale=100.0)
    assert "confident mistakes" in levels(doctor.check_start(sharp, batch, 16, alone), "advice")[0]
    assert not clip.training and doctor.check_chance(nn.Linear(1, 1), alone, 8)[0].text.startswith("Linear states no")


@pytest.mark.parametrize(("bias", "level"), [(12.0, "advice"), (-30.0, "advice"), (None, "ok")])
def test_the_bias_to_start_from(bias: float | None, level: str) -> None:
    """The bias it names makes the sum of the probabilities of the others what it should be."""
    alone = PairSample(64, list("abcd"), [1, 2, 3, 4], [1, 2, 3, 4])
    batch = {name: value for name, value in pair_batches(1, 16)[0].items() if not name.endswith("_ids")}
    batch["input_ids"] = pair_batches(1, 16)[0]["input_ids"]
    objective = make_objective("siglip", initial_logit_bias=20.0)
    told = doctor.check_start(objective, batch, 16, alone)[-1].text
    named = float(told.partition(": ")[2].split()[0])
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
    assert doctor.check_start(objective, batch, 16, alone)[-1].level == level
    objective.config.initial_logit_bias = None  # that of a trained pair stands
    assert "initial_logit_bias" not in doctor.check_start(objective, batch, 16, alone)[-1].text


# ---- settings ------------------------------------------------------------------------------------------------


IMAGES = PairSample(None, images=[tiny.labelled_image(index, 64)[0] for index in range(8)])


def test_image_settings_in_order() -> None:
    found = doctor_settings.check_images(make_dual().vision, IMAGES)
    assert [finding.level for finding in found] == ["ok"] and "32 px; 8 images come out with mean" in found[0].text


@pytest.mark.parametrize(
    ("change", "settings", "level", "word"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {}, "advice", "not those of clip_vision_model"),
        ({"do_rescale": False}, {}, "problem", "do_rescale=false"),
        ({"do_rescale": False}, {}, "problem", "normalisation does not fit"),
        ({"do_normalize": False}, {}, "problem", "do_normalize=false"),
        ({}, {"trained_size": 224}, "advice", "trained on 224 px and gets 32 px"),
        ({}, {"crop_scale": (0.08, 1.0)}, "advice", "crop_scale 0.08"),
    ],
)
def test_image_settings_that_disagree(change: dict, settings: dict, level: str, word: str) -> None:
    vision = make_dual().vision
    for name, value in change.items():
        setattr(vision.processor, name, value)
    found = doctor_settings.check_images(vision, IMAGES, **settings)
    assert any(word in text for text in levels(found, level))


def test_images_that_are_enlarged_or_missing() -> None:
    vision = make_dual().vision
    small = PairSample(None, images=[tiny.random_image(index, (40, 16)) for index in range(4)])
    assert any("100% of the images are smaller" in text for text in levels(
        doctor_settings.check_images(vision, small), "advice"))  # fmt: skip
    assert levels(doctor_settings.check_images(vision, PairSample(None)), "problem")


def test_text_settings() -> None:
    sample = PairSample(None, captions=[f"a {colour} {shape}" for colour in tiny.COLOURS for shape in tiny.SHAPES])
    dual = make_dual()
    found = doctor_settings.check_texts(dual, sample)
    assert [finding.level for finding in found] == ["ok"] and "limit 24" in found[0].text
    long = PairSample(None, captions=[" ".join(["a red circle on the left"] * 12)] * 2)
    (cut,) = levels(doctor_settings.check_texts(dual, long), "problem")
    assert "cuts 100.0% of them: the tower has positions for 77 (--max_text_length)" in cut
    foreign = PairSample(None, captions=["картина красного круга", "синяя звезда справа"])
    assert any("tokens a word" in text for text in levels(doctor_settings.check_texts(dual, foreign), "advice"))
    assert not levels(doctor_settings.check_texts(dual, sample, tower_tokenizer=dual.tokenizer), "problem")


def test_a_tokenizer_that_is_not_the_towers(tmp_path: Path) -> None:
    sample = PairSample(None, captions=["a red circle", "a blue star"])
    dual, other = make_dual(), tiny.tiny_tokenizer(tmp_path, vocab_size=300)
    problems = levels(doctor_settings.check_texts(dual, sample, tower_tokenizer=other), "problem")
    assert any("entries of the vocabulary differ" in text for text in problems)
    with_bos = tokenizer().__class__.from_pretrained(tokenizer().name_or_path)
    with_bos.add_bos_token = True
    problems = levels(doctor_settings.check_texts(dual, sample, tower_tokenizer=with_bos), "problem")
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
    problems = levels(doctor_settings.check_texts(dual, PairSample(None, captions=["a red dog"])), "problem")
    assert any("25.0% of the tokens are unknown" in text for text in problems)
    assert any("attends to its padding, id 9, and the tokenizer pads with 0" in text for text in problems)
    config.pad_token_id = 0
    assert not levels(doctor_settings.check_texts(dual, PairSample(None, captions=["a red star"])), "problem")


# ---- memory --------------------------------------------------------------------------------------------------


def test_parameters_gradients_and_optimizer_are_counted() -> None:
    objective = make_objective("clip").eval()
    objective.dual.text.requires_grad_(False)
    batch = pair_batches(1, 8)[0]
    trained = [value for value in objective.parameters() if value.requires_grad]
    grown = sum(value.numel() for value in trained) * 4
    for optimizer, states in (
        (torch.optim.AdamW(trained), 2),
        (torch.optim.SGD(trained, lr=0.1, momentum=0.9), 1),
        (torch.optim.SGD(trained, lr=0.1), 0),
    ):
        cost = estimate_step(objective, batch, optimizer)
        assert cost.gradients == grown and cost.optimizer == pytest.approx(states * grown, abs=64)
    buffers = sum(value.numel() * value.element_size() for value in objective.buffers())
    assert cost.weights == sum(value.numel() for value in objective.parameters()) * 4 + buffers
    assert all(value.grad is None for value in objective.parameters()) and not objective.training
    assert estimate_step(objective, batch, averaged=True).weights == 2 * cost.weights
    with pytest.raises(ValueError, match="two rows or more, got 1"):
        estimate_step(objective, {name: value[:1] for name, value in batch.items()})


def test_activations_by_hand_and_in_proportion() -> None:
    """A layer and its exponential, counted on paper: two of 4,000 bytes a row, forth and back."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1000, 1000, bias=False)

        def embed(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"image": self.layer(x).exp()}

    cost = estimate_step(Chain(), {"x": torch.randn(16, 1000)})
    # forth layer(x) and its exp, back that exp and the gradient it makes; the weight's gradient does not grow
    assert cost.row_activations == pytest.approx(2 * 4000)
    assert cost.row_batch == 2 * 4000 and cost.fixed_activations <= 4 * 1000 * 1000 * 1.1
    objective = make_objective("clip")
    few, many = (estimate_step(objective, pair_batches(1, size)[0]) for size in (8, 16))
    assert few.row_activations == pytest.approx(many.row_activations, rel=0.02)
    chunked, whole = many.at(64, 16), many.at(64)
    assert chunked.activations == pytest.approx(many.at(16).activations) and chunked.batch == whole.batch
    assert whole.activations > 3 * chunked.activations


def test_the_estimate_against_the_resident_set() -> None:
    """A step that is run takes what was estimated; the allocator of the system may keep up to half more."""
    vision = {"hidden_size": 96, "intermediate_size": 384, "image_size": 64, "patch_size": 8}
    from mllm_vision.encoder.dual import DualEncoder
    from mllm_vision.encoder.encoder import VisionEncoder

    small = make_dual()
    encoder = VisionEncoder.from_backbone(tiny.tiny_clip_vision(**vision), tiny.tiny_image_processor("clip", 64))
    from mllm_vision.objectives import load_objective

    method = load_objective("clip")
    objective = method(DualEncoder(encoder, small.text, small.tokenizer, embed_dim=16), method.Config())
    batch = pair_batches(1, 256)[0]
    batch["pixel_values"] = torch.randn(256, 3, 64, 64)
    optimizer = torch.optim.AdamW(objective.parameters())
    estimate = estimate_step(objective, batch, optimizer).at(256)

    def step(part: dict[str, torch.Tensor]) -> None:
        objective.train()
        objective(**part).loss.backward()
        optimizer.step()

    step({name: value[:4] for name, value in batch.items()})
    with peak_memory() as peak:
        step(batch)
    if peak.bytes is None:
        pytest.skip("this system does not tell a process's peak")
    expected = estimate.activations
    assert 0.7 * expected < peak.bytes < 1.6 * expected, (show_bytes(expected), show_bytes(peak.bytes))


COST = StepCost(
    weights=GIB, gradients=GIB, optimizer=2 * GIB, row_activations=GIB / 16, fixed_activations=0, row_batch=0
)


def test_memory_against_the_machine() -> None:
    measured = MeasuredStep(rows=32, seconds=2.0, peak=6 * GIB)
    found = doctor_settings.check_step(COST, measured, 64, None, 20 * GIB, 100)
    texts = [finding.text for finding in found]
    assert not levels(found, "problem") and "8 GiB (weights 1 GiB" in texts[0]
    assert "a measured step of 32 rows took 6 GiB, 1.00 of its estimate (6 GiB); so expect 8 GiB for 64" in texts[1]
    assert "16 rows a second; 100 steps of 64 would take 6.67 minutes" in texts[-1]
    (problem,) = levels(doctor_settings.check_step(COST, measured, 64, None, 8 * GIB, 100), "problem")
    assert "too little; --embed_batch_size 16 would fit" in problem  # 5.6 GiB: 4 and 25 rows, of powers of two 16
    assert COST.at(64, 16).total <= 0.7 * 8 * GIB < COST.at(64, 32).total
    (problem,) = levels(doctor_settings.check_step(COST, None, 64, None, 4 * GIB, 100), "problem")
    assert "weights and optimizer alone are too much" in problem
    far = doctor_settings.check_step(COST, MeasuredStep(32, 2.0, 18 * GIB), 64, None, None, 100)
    assert "3.00 of its estimate" in levels(far, "advice")[0]
    assert (
        "unchecked"
        in levels(doctor_settings.check_step(COST, MeasuredStep(32, 2.0, None), 64, None, None, 0), "advice")[0]
    )


def test_small_things() -> None:
    assert show_bytes(1536) == "1.5 KiB" and show_bytes(5 * GIB) == "5 GiB" and show_bytes(2**50) == "1.02e+03 TiB"
    assert decoded_bytes([{"image": tiny.random_image(0, (10, 20))}]) == 600
    free = available_memory()
    assert free is None or free > 0
    lines = doctor.report([Finding("ok", "b", "x"), Finding("problem", "a", "y"), Finding("advice", "b", "z")]).split(
        "\n"
    )
    assert [line.split()[1:] for line in lines[:3]] == [["b", "x"], ["b", "z"], ["a", "y"]]
    assert lines[-1] == "problem 1, advice 1, ok 1"
    epochs = SimpleNamespace(max_steps=-1, num_train_epochs=3)
    assert doctor.training_steps(epochs, 100, 30) == 9 and doctor.training_steps(epochs, None, 30) == 0


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
        "estimate for 16 rows a process, 4 embedded at once",
        "of its estimate",
        "40 steps of 16 would take",
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
    assert "initial_logit_bias 15 calls" in printed and "measured" not in printed


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
