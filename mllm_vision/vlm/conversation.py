"""The data of stages one and two: records as tokenised conversations for one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_vision.data import (
    CHAT_TEMPLATES,
    BadSamples,
    ConversationCollator,
    ConversationDataset,
    PackedConversations,
    PackedSamples,
    StreamArguments,
    StreamDataset,
    TokenWeights,
    bind_conversations,
    load_records,
    preview_labels,
)
from mllm_vision.data.records.columns import image_counts
from mllm_vision.data.records.forms import FORMS
from mllm_vision.data.records.records import UsualSplit
from mllm_vision.data.records.sampling import BadRow, judge
from mllm_vision.errors import unknown_name
from mllm_vision.vlm.packing import check_packing
from mllm_vision.vlm.tokens import settle_ends

logger = logging.getLogger(__name__)
LONGEST = 2048  # the default limit where the language model itself allows more


def chat_template(name_or_path: str) -> str:
    """A chat template by name ("plain", "vicuna", "qa") or from a Jinja file.

    Raises:
        ValueError: neither a known name (the nearest is named) nor a file, or a file without generation marks.
    """
    if name_or_path in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name_or_path]
    file = Path(name_or_path)
    if not file.is_file():
        raise ValueError(f"{unknown_name('chat template', name_or_path, CHAT_TEMPLATES)}; nor is it a file")
    text = file.read_text(encoding="utf-8")
    if "generation" not in text:
        raise ValueError(
            f"{file} has no {{% generation %}} ... {{% endgeneration %}} around the assistant's text, which marks the "
            "tokens to train on"
        )
    return text


def set_chat_template(processor: Any, name_or_path: str, task: Any = None) -> None:
    """Sets the template (see ``chat_template``) on processor and tokenizer; ``task`` learns where its answers end."""
    template = chat_template(name_or_path)
    processor.chat_template = processor.tokenizer.chat_template = template
    if task is not None:
        settle_ends(task.model, processor)


@dataclass
class StageData:
    """Training and held-out conversations of one stage, with their records and columns."""

    train: ConversationDataset | PackedConversations | PackedSamples | StreamDataset
    evaluation: ConversationDataset | PackedConversations
    collator: ConversationCollator
    train_collator: ConversationCollator
    columns: dict[str, str]
    train_records: Any
    eval_records: Any
    eval_columns: dict[str, str]

    @property
    def bad_samples(self) -> BadSamples:
        """The counter of the training set."""
        return self.train.bad_samples

    @property
    def asks_single_questions(self) -> bool:
        """Whether the held-out data are questions on one image without history, as question answering requires."""
        bound = set(self.eval_columns)
        if not {"question", "answer", "image"} <= bound or {"system", "history"} & bound:
            return False
        single = bool((image_counts(self.eval_records, self.eval_columns["image"]) == 1).any())
        if not single:
            logger.warning("answers are not evaluated: no held-out row asks about exactly one image")
        return single

    @property
    def samples(self) -> ConversationDataset:
        """The training conversations themselves, which may be packed.

        Raises:
            ValueError: they are read as a stream.
        """
        found = self.train.samples if isinstance(self.train, PackedConversations | PackedSamples) else self.train
        if isinstance(found, StreamDataset):
            raise ValueError("--cache_features and --streaming are mutually exclusive: a stream's images are read once")
        return found

    def use_layout(self, layout: Any, tokenizer: Any) -> None:
        """Gives the training images another form, as `CachedLayout` does; the held-out images keep theirs."""
        self.samples.layout = layout
        self.train_collator = ConversationCollator(tokenizer, layout, token_weights=self.train_collator.token_weights)

    def check(self, max_bad_fraction: float) -> None:
        """Raises ValueError if too many rows of the training or held-out data were refused."""
        self.train.bad_samples.check(max_bad_fraction)
        try:
            self.evaluation.bad_samples.check(max_bad_fraction)
        except ValueError as error:
            raise ValueError(f"of the held-out data, {error}") from None


def load_stage_data(
    model: Any,
    processor: Any,
    dataset_name: str,
    eval_dataset_name: str | None = None,
    *,
    roles: tuple[str, ...] | None = None,
    overrides: Mapping[str, str | None] | None = None,
    split: str = "train",
    eval_split: str | None = None,
    config_name: str | None = None,
    image_root: str | None = None,
    max_rows: int | None = None,
    eval_rows: int = 200,
    max_length: int | None = None,
    on_truncation: str = "refuse",
    max_turns: int | None = None,
    shuffle_turns: bool = True,
    pack_turns: bool = False,
    packing: bool = False,
    loss_weights: str = "token",
    seed: int = 0,
    streams: StreamArguments | None = None,
    max_steps: int = -1,
) -> StageData:
    """Loads, binds and tokenises the data of a stage, for this model and its processor's chat template.

    Args:
        model, processor: from ``build_vlm`` or ``load_vlm``; they define the tokens of an image, the maximal length
            and the chat template.
        dataset_name: file, pattern, folder or Hub id.
        eval_dataset_name: held-out data; None holds rows of the training data out (at most a tenth).
        roles: the preferred columns of a table, e.g. ("image", "caption"); `conversations` and `messages` are accepted
            too. None: any form of conversation.
        overrides: role -> column name.
        split, config_name, image_root: see ``load_records``.
        eval_split: of the held-out data; None: "validation", or the only one.
        max_rows: of the training data; ``eval_rows``: of the held-out data.
        max_length: in tokens, image tokens included; None: the language model's limit, at most 2048.
        on_truncation, max_turns, shuffle_turns: see ``ConversationDataset``.
        pack_turns: questions on one image are independent samples, packed by ``PackedConversations``.
        packing: training samples of any kind share rows of up to ``max_length`` tokens, by ``PackedSamples``.
        loss_weights: of the training loss, "token", "sample" or "square_root"; see ``TokenWeights``. The held-out loss
            is the mean over tokens.
        seed: determines the held-out rows, the drawn captions and the order of questions.
        streams: with `streaming`, the training data is read as a stream (then in `train_records`); ``max_steps`` limits
            endless streams.

    Raises:
        FileNotFoundError: no such data.
        ValueError: missing columns, an empty set, a length beyond the language model's limit, a language model that
            cannot be trained on packed conversations.
    """
    max_length = _longest(model, max_length)
    streaming = streams is not None and streams.streaming
    packed_by = _packed_by(pack_turns, packing, max_turns, streaming)
    where: dict[str, Any] = {"split": split, "config_name": config_name, "image_root": image_root}
    stream, records = _opened(dataset_name, where, max_rows, seed, streams if streaming else None, max_steps)
    where["split"] = eval_split or UsualSplit("validation", "--eval_split")
    records, held = _held_out(records, eval_dataset_name, where, eval_rows, None if streaming else seed)
    columns, eval_columns = _bound(records, held, roles, overrides)
    layout = model.system.layout(model.model, processor)
    options: dict[str, Any] = {
        "tokenizer": processor.tokenizer,
        "layout": layout,
        "image_token": str(processor.image_token),
        "max_length": max_length,
        "chat_template": processor.chat_template,
        "on_truncation": on_truncation,
        "max_turns": 1 if pack_turns else max_turns,
        "seed": seed,
    }
    shuffle_turns = shuffle_turns and not pack_turns
    train: Any = ConversationDataset(records, columns, shuffle_turns=shuffle_turns, streamed=streaming, **options)
    evaluation: Any = ConversationDataset(held, eval_columns, shuffle_turns=False, **options)
    _check_use(train, dataset_name, streaming, pack_turns, max_turns)
    weights = _weights(loss_weights, train, streaming)
    train = train if stream is None else StreamDataset(stream, train)
    train, evaluation = _packed(model, train, evaluation, packed_by, max_length)
    return StageData(
        *(train, evaluation),
        collator=ConversationCollator(processor.tokenizer, layout),
        train_collator=ConversationCollator(processor.tokenizer, layout, token_weights=weights),
        columns=columns,
        train_records=records if stream is None else stream,
        eval_records=held,
        eval_columns=eval_columns,
    )


def _longest(model: Any, max_length: int | None) -> int:
    """The longest sequence in tokens; ValueError beyond the language model's limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        return min(limit or LONGEST, LONGEST)
    if limit and max_length > limit:
        raise ValueError(
            f"max_length={max_length} is beyond the language model's limit of {limit}; use {limit} or less"
        )
    return max_length


def _opened(
    dataset_name: str,
    where: Mapping[str, Any],
    max_rows: int | None,
    seed: int,
    streams: StreamArguments | None,
    max_steps: int,
) -> tuple[Any, Any]:
    """(the stream, its first rows), or (None, all rows)."""
    if streams is None:
        return None, load_records(dataset_name, **where, max_rows=max_rows)
    stream = streams.open(dataset_name, **where, max_rows=max_rows, seed=seed, max_steps=max_steps)
    return stream, stream.head()


def _bound(
    records: Any, held: Any, roles: tuple[str, ...] | None, overrides: Mapping[str, str | None] | None
) -> list[dict[str, str]]:
    """Role -> column of the training and of the held-out rows."""
    first = tuple(role for role in roles or () if role != "image")
    forms = (first, ("conversations",), ("messages",)) if first else FORMS
    given = dict(overrides or {})
    return [bind_conversations(each, given, forms=forms, report=each is records) for each in (records, held)]


def _packed_by(pack_turns: bool, packing: bool, max_turns: int | None, streaming: bool) -> str | None:
    """The flag of packing that is given, or None; ValueError for others that exclude it."""
    if pack_turns and packing:
        raise ValueError("--pack_turns and --packing are mutually exclusive; leave one of them out")
    if pack_turns and max_turns not in (None, 1):
        raise ValueError(f"pack_turns and max_turns={max_turns} are mutually exclusive: packed questions are separate")
    flag = "pack_turns" if pack_turns else "packing" if packing else None
    if flag is not None and streaming:
        raise ValueError(f"--{flag} and --streaming are mutually exclusive: packing takes lengths known beforehand")
    return flag


def _weights(name: str, samples: ConversationDataset, streaming: bool) -> TokenWeights | None:
    """The weights of the training tokens, None for equal ones; ValueError where they cannot be known."""
    if name != "token" and streaming:
        raise ValueError(
            f"--loss_weights {name} and --streaming are mutually exclusive: the weights take the number of supervised "
            "tokens of every sample, known beforehand; leave one of them out"
        )
    return None if name == "token" else TokenWeights.of(name, samples)


def _packed(
    model: Any, train: ConversationDataset, evaluation: ConversationDataset, flag: str | None, max_length: int
) -> tuple[Any, Any]:
    """The training and the held-out rows, packed as a flag says (None: as they are), after a trial of the model."""
    if flag is None:
        return train, evaluation
    if flag == "pack_turns":
        check_packing(model, int(max(train.lengths.max(), evaluation.lengths.max())), max_length)
        return PackedConversations(train, max_length=max_length), PackedConversations(evaluation, max_length=max_length)
    check_packing(model, int(train.longest_wordings().max()), max_length, flag="packing")
    rows = PackedSamples(train, max_length=max_length)
    logger.info(
        "%d samples in %d rows of at most %d tokens, %.1f %% of them used",
        *(len(train), len(rows), max_length, 100 * rows.filled),
    )
    return rows, evaluation


def _held_out(
    records: Any, eval_dataset_name: str | None, where: Mapping[str, Any], eval_rows: int, seed: int | None
) -> tuple[Any, Any]:
    """(training rows, held-out rows): a separate data set, or at most a tenth of the rows, drawn by the seed.

    A seed of None stands for a stream, which holds no rows out.
    """
    if eval_rows < 2:
        raise ValueError(f"eval_rows={eval_rows} must be at least 2")
    if eval_dataset_name:
        return records, load_records(eval_dataset_name, **where, max_rows=eval_rows)
    if seed is None:
        raise ValueError("--streaming holds no rows out; pass --eval_dataset_name")
    count = min(eval_rows, len(records) // 10)
    if count < 2:
        raise ValueError(f"{len(records)} rows are too few to hold some out; pass --eval_dataset_name or 20 rows")
    parts = records.train_test_split(test_size=count, seed=seed)
    logger.info("no --eval_dataset_name: %d of the training rows are held out", count)
    return parts["train"], parts["test"]


def _check_use(
    samples: ConversationDataset, dataset_name: str, streamed: bool, pack_turns: bool, max_turns: int | None
) -> None:
    """Refuses data without images, and flags of single questions for whole conversations."""
    if not streamed and not samples.has_images:
        raise ValueError(
            f"none of the {len(samples)} conversations of {dataset_name} has an image, so the connector cannot be "
            "trained: name the images with --image_column, or put them into the messages"
        )
    if not samples.form.by_question and (pack_turns or max_turns is not None):
        flag, form = "--pack_turns" if pack_turns else "--max_turns", ", ".join(samples.form.form)
        raise ValueError(
            f"{flag} is for questions that are independent (question and answer columns, or lists of them); "
            f"{dataset_name} has whole conversations ({form}), whose turns stay together: leave it out"
        )


def label_preview(data: StageData, processor: Any) -> str:
    """The first valid training sample, the text that is trained on between « and »; "" without one."""
    if not isinstance(data.train, StreamDataset):
        return preview_labels(data.train_collator([data.train[0]]), processor.tokenizer)
    for number, row in enumerate(data.train.stream.head()):
        first = judge(f"row {number}", data.train.reader.read_record, row, 0, number)
        if not isinstance(first, BadRow):
            return preview_labels(data.collator([first]), processor.tokenizer)
    return ""
