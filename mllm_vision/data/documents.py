"""A small language model from text: a sentencepiece tokenizer, packed blocks, perplexity. For places without a Hub."""

from __future__ import annotations

import glob
import json
import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mllm_vision.errors import nearby

logger = logging.getLogger(__name__)

PAD, UNK, BOS, EOS = 0, 1, 2, 3
IMAGE_TOKEN = "<image>"
_SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": False,
    "add_eos_token": False,
    "legacy": False,
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "additional_special_tokens": [IMAGE_TOKEN],
}


def read_documents(patterns: Sequence[str], *, lower_case: bool = False, max_rows: int | None = None) -> list[str]:
    """The documents of text files, one a line; blank lines are left out, runs of white space become one space.

    Raises:
        FileNotFoundError: a file or pattern matches nothing.
        ValueError: a file is not UTF-8, or there is no text at all.
    """
    documents: list[str] = []
    for pattern in patterns:
        files = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if Path(pattern).is_file() else [])
        if not files:
            raise FileNotFoundError(f"--text_files {pattern}: no such file{nearby(pattern)}")
        for file in files:
            try:
                lines = Path(file).read_text(encoding="utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"--text_files {file} is not UTF-8 text ({error}); convert it first") from error
            documents += [" ".join(line.split()) for line in lines if line.strip()]
    if not documents:
        raise ValueError(f"--text_files {' '.join(patterns)}: no text in them")
    documents = documents[:max_rows]
    return [document.lower() for document in documents] if lower_case else documents


def hold_out(documents: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """(documents to train on, held-out ones): `count` of them, at most a tenth, drawn by the seed.

    Raises:
        ValueError: fewer than ten documents.
    """
    drawn = random.Random(seed).sample(range(len(documents)), min(count, len(documents) // 10))
    if not drawn:
        raise ValueError(f"{len(documents)} documents leave none to hold out; bring ten at least, one a line")
    held = set(drawn)
    train = [document for index, document in enumerate(documents) if index not in held]
    return train, [documents[index] for index in sorted(held)]


def train_tokenizer(
    documents: Sequence[str], folder: Path, *, vocab_size: int, max_length: int, threads: int = 1
) -> Any:
    """Train a sentencepiece BPE tokenizer into `folder` and load it as a `LlamaTokenizer`.

    Ids: pad 0, unk 1, bos 2, eos 3, then `<image>`, then the 256 bytes that any other character falls back to.
    Digits stand alone; with a vocabulary that is large enough every frequent word is one token. No BOS is added.
    BPE and not unigram: transformers rebuilds the tokenizer from merges, and a unigram model would give other ids.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and letters of this text.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a text with fewer words gets a smaller vocabulary
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0 if len({*"".join(documents[:20000])}) < 200 else 0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 16,
            input_sentence_size=1_000_000,
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            user_defined_symbols=[IMAGE_TOKEN],
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"(\d+) <= (\d+)|required_chars=(\d+)|>= (\d+)", str(error))
        raise ValueError(
            f"vocab_size={vocab_size} is too small for this text: it must hold 5 special tokens, 256 bytes and every "
            f"letter; raise --vocab_size (sentencepiece says: {needed.group(0) if needed else error})"
        ) from error
    (folder / "tokenizer.vocab").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**_SETTINGS, "model_max_length": max_length}, indent=2), encoding="utf-8"
    )
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if len(tokenizer) < vocab_size:
        logger.info("the text holds fewer pieces than vocab_size=%d: the vocabulary has %d", vocab_size, len(tokenizer))
    return tokenizer


def check_tokenizer(folder: Path, documents: Sequence[str]) -> None:
    """Check that what transformers loads from `folder` gives sentencepiece's own ids on every document.

    Raises:
        ValueError: it does not; the document and both lists of ids are shown.
    """
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for loader in (LlamaTokenizer, AutoTokenizer):
        tokenizer = loader.from_pretrained(folder)
        for document in documents:
            if IMAGE_TOKEN in document:  # special tokens are cut out before sentencepiece sees the rest
                continue
            found, expected = tokenizer(document).input_ids, reference.encode(document)
            if found != expected:
                raise ValueError(
                    f"{loader.__name__}.from_pretrained({folder}) gives other ids than sentencepiece for {document!r}: "
                    f"{found} instead of {expected}; take that document out, or bring another --tokenizer"
                )


def encode_documents(tokenizer: Any, documents: Sequence[str], eos: int) -> list[list[int]]:
    """Token ids of every document, after BOS where the tokenizer has one and before EOS: as chat templates begin."""
    ids: list[list[int]] = []
    for start in range(0, len(documents), 10_000):
        ids += tokenizer(list(documents[start : start + 10_000]), add_special_tokens=False).input_ids
    start_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*start_ids, *row, eos] for row in ids]


class PackedBlocks(torch.utils.data.Dataset):
    """Documents one after the other, cut into blocks of equal length: one tensor [N, T], a batch is one indexing.

    The tail that fills no block is dropped. `collate` goes with it: the batch is already a tensor.

    Raises:
        ValueError: the documents fill no block.
    """

    def __init__(self, documents: Sequence[Sequence[int]], block_size: int) -> None:
        flat = torch.tensor([token for document in documents for token in document], dtype=torch.long)
        count = len(flat) // block_size
        if count == 0:
            raise ValueError(f"{len(flat)} tokens fill no block of {block_size}; bring more text or lower --block_size")
        self.blocks = flat[: count * block_size].view(count, block_size)
        self.column_names = ["text"]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.blocks[index]

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.blocks[torch.tensor(indices)]

    @staticmethod
    def collate(rows: Any) -> dict[str, torch.Tensor]:
        """`rows` [B, T] (or a list of [T]) as input and labels; the model shifts the labels itself."""
        blocks = rows if isinstance(rows, torch.Tensor) else torch.stack(list(rows))
        return {"input_ids": blocks, "labels": blocks}


class Perplexity:
    """Evaluator: perplexity over held-out blocks, exp of the mean negative log-likelihood per predicted token."""

    primary_metric = "perplexity"

    def __init__(
        self,
        blocks: PackedBlocks,
        *,
        name: str = "heldout",
        batch_size: int = 32,
        baselines: Mapping[str, float] | None = None,
    ) -> None:
        self.blocks, self.name, self.batch_size = blocks.blocks, name, batch_size
        self.baselines = dict(baselines or {})

    @torch.no_grad()
    def __call__(self, model: Any, step: int = 0) -> dict[str, Any]:
        """The loss in nats per token and its exponential, beside the `baselines` (perplexities) it was given."""
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        total, tokens = 0.0, 0
        for start in range(0, len(self.blocks), self.batch_size):
            batch = self.blocks[start : start + self.batch_size].to(device)
            count = batch[:, 1:].numel()
            total += model(input_ids=batch, labels=batch).loss.item() * count
            tokens += count
        model.train(was_training)
        found: dict[str, Any] = {"perplexity": math.exp(min(total / tokens, 700)), "loss": total / tokens}
        return found | ({"baselines": self.baselines} if self.baselines else {})


def unigram_perplexity(train: PackedBlocks, heldout: PackedBlocks, vocab_size: int) -> float:
    """The baseline that knows how often each token occurs and nothing else (counts of training, plus one)."""
    counts = torch.bincount(train.blocks.flatten(), minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(-log_probabilities[heldout.blocks[:, 1:].flatten()].mean().item())


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, documents: Sequence[str], *, words: int = 3, max_new_tokens: int = 24
) -> list:
    """What the model makes of the first words of held-out documents, greedily, beside how they really continue."""
    samples, was_training = [], model.training
    model.eval()
    for document in documents:
        parts = document.split()
        prompt = " ".join(parts[: min(words, max(1, len(parts) - 1))])
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        reference = document[len(prompt) :].strip()[:300]
        samples.append({"prompt": prompt, "continuation": text.strip(), "reference": reference})
    model.train(was_training)
    return samples
