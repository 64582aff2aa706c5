"""recipes/language_model.py: the tokenizer, the packing, and a whole small run."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mllm_vision.data import documents as language
from mllm_vision.hub.lineage import check_lineage, hash_weights

ROOT = Path(__file__).resolve().parents[2]


def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("language_model_recipe", ROOT / "recipes" / "language_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(tiny.tiny_sentences(400)) + "\n\n", encoding="utf-8")
    return path


def flags(text: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--text_files", str(text), "--output_dir", str(folder), "--vocab_size", "500", "--block_size", "16",
        "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--validation_lines", "30",
        "--max_steps", "30", "--per_device_train_batch_size", "16", "--use_cpu", "--disable_tqdm", "--save_steps", "10",
        "--learning_rate", "1e-2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "lm"
    recipe().main(flags(text, folder))
    return folder


# ---- the whole run -------------------------------------------------------------------------------------------


def test_it_learns_and_says_how_well(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    heldout = record["evaluations"]["heldout"]
    assert heldout["perplexity"] < 0.7 * heldout["baselines"]["unigram"] < heldout["baselines"]["untrained"]
    assert "against unigram" in record["verdict"] and "better" in record["verdict"]
    assert {"prompt", "continuation", "reference"} <= set(record["samples"][0])
    assert record["data"]["train"]["rows"] == 370 and record["data"]["validation"]["rows"] == 30
    assert check_lineage(trained / "model")["kind"] == "language_model"
    assert [entry["step"] for entry in record["history"] if "loss" in entry] == [10, 20, 30]


def test_plain_transformers_loads_it(trained: Path) -> None:
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

    path = trained / "model"
    model = AutoModelForCausalLM.from_pretrained(path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    for loader in (AutoTokenizer, LlamaTokenizer):
        tokenizer = loader.from_pretrained(path)
        assert len(tokenizer) == model.config.vocab_size
        for sentence in tiny.tiny_sentences(50, seed=9):
            ids = tokenizer(sentence).input_ids
            assert ids == reference.encode(sentence)
            assert tokenizer.decode(ids) == sentence
        assert [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<unk>", "<s>", "</s>", "<image>")] == [
            0,
            1,
            2,
            3,
            4,
        ]
        assert tokenizer("a <image> red").input_ids.count(4) == 1
    config = model.generation_config
    assert (config.eos_token_id, config.pad_token_id) == (3, 0)


def test_words_are_tokens_and_digits_stand_alone(trained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    for word in ("red", "circle", "question", "image", "colour"):
        assert len(tokenizer.tokenize(f"a {word}")) == 2, tokenizer.tokenize(f"a {word}")
    assert tokenizer.tokenize("12")[-2:] == ["1", "2"]
    assert "<unk>" not in tokenizer.tokenize("Grüße aus 東京")  # bytes


def test_the_saved_recipe_reproduces_the_weights(trained: Path, tmp_path: Path) -> None:
    recipe().main(["--config", str(trained / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    assert hash_weights(tmp_path / "again" / "model") == hash_weights(trained / "model")


def test_an_interrupted_run_goes_on(trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the recipe itself: stopped after step 24, resumed from step 20, the weights of the whole run."""
    from transformers import TrainerCallback

    from mllm_vision.training.trainer import objective_trainer as trainer_module

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 24:
                raise KeyboardInterrupt

    original = trainer_module.RecipeTrainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Stop())
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.RecipeTrainer, "train", train)
        with pytest.raises(KeyboardInterrupt):
            recipe().main(flags(text, tmp_path / "lm"))
    with pytest.raises(FileExistsError, match="--overwrite .* --resume"):
        recipe().main(flags(text, tmp_path / "lm"))
    recipe().main(flags(text, tmp_path / "lm", "--resume"))
    assert hash_weights(tmp_path / "lm" / "model") == hash_weights(trained / "model")


def test_an_existing_tokenizer_is_used(trained: Path, text: Path, tmp_path: Path) -> None:
    more = ("--tokenizer", str(trained / "model"), "--max_steps", "2", "--save_strategy", "no")
    recipe().main(flags(text, tmp_path / "lm", *more))
    record = json.loads((tmp_path / "lm" / "run.json").read_text())
    assert record["parents"][0]["role"] == "tokenizer"
    assert record["parents"][0]["weights_sha256"] == hash_weights(trained / "model")


# ---- pieces --------------------------------------------------------------------------------------------------


def test_blocks_hold_every_token_once_in_order() -> None:
    documents = [[5, 6, 7, 3], [8, 3], [9, 10, 11, 12, 3]]
    blocks = language.PackedBlocks(documents, 4)
    flat = [token for document in documents for token in document]
    assert blocks.blocks.flatten().tolist() == flat[:8] and len(blocks) == 2
    batch = blocks.collate(blocks.__getitems__([1, 0]))
    assert batch["input_ids"].tolist() == [flat[4:8], flat[:4]] and torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(blocks.collate([blocks[0], blocks[1]])["labels"], blocks.blocks)
    with pytest.raises(ValueError, match="11 tokens fill no block of 12"):
        language.PackedBlocks(documents, 12)


def test_perplexity_is_that_of_the_probabilities() -> None:
    model = tiny.tiny_llama(64)
    blocks = language.PackedBlocks([torch.randint(4, 64, (60,)).tolist()], 10)
    found = language.Perplexity(blocks, batch_size=4)(model)["perplexity"]
    with torch.no_grad():
        probabilities = model(input_ids=blocks.blocks).logits[:, :-1].double().softmax(-1)
    picked = probabilities.gather(-1, blocks.blocks[:, 1:, None])
    assert found == pytest.approx(math.exp(-picked.log().mean().item()), rel=1e-5)


def test_unigram_perplexity_of_a_uniform_text_is_its_vocabulary() -> None:
    blocks = language.PackedBlocks([list(range(8)) * 4000], 8)
    assert language.unigram_perplexity(blocks, blocks, 8) == pytest.approx(8, rel=1e-6)


def test_documents_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One  Line\n\n  two\tlines \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three\n", encoding="utf-8")
    pattern = str(tmp_path / "*.txt")
    assert language.read_documents([pattern]) == ["One Line", "two lines", "three"]
    assert language.read_documents([pattern], lower_case=True, max_rows=1) == ["one line"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "no such file"),
        (b"\n\n", ValueError, "no text in them"),
        (b"\xff\xfe\x00", ValueError, "is not UTF-8 text"),
        (b"one line only\n", ValueError, "leave none to hold out"),
    ],
)
def test_what_text_is_refused(content: bytes | None, error: type, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=message):
        recipe().main(flags(file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_too_small_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=100 is too small for this text"):
        language.train_tokenizer(text.read_text().splitlines(), tmp_path, vocab_size=100, max_length=64)


def test_a_vocabulary_that_is_too_large_is_lowered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        tokenizer = language.train_tokenizer(["a red circle"] * 20, tmp_path, vocab_size=5000, max_length=64)
    assert len(tokenizer) < 400 and "the vocabulary has" in caplog.text
    language.check_tokenizer(tmp_path, ["a red circle", "two  spaces", "Grüße 12"])


def test_a_tokenizer_that_does_not_survive_is_refused(tmp_path: Path) -> None:
    """A unigram model is what the check is for: transformers rebuilds it from merges and gets other ids."""
    import sentencepiece

    sentences = tiny.tiny_sentences(200)
    language.train_tokenizer(sentences, tmp_path, vocab_size=400, max_length=64)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram",
        vocab_size=400, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="gives other ids than sentencepiece"):
        language.check_tokenizer(tmp_path, sentences)
