"""Rows of tables as conversations: which columns form one, and how a row of each form is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mllm_vision.data.chat.messages import (
    BadConversation,
    from_caption,
    from_pairs,
    from_turns,
    image_parts,
    place_images,
    without_sources,
    words,
)
from mllm_vision.data.chat.prompts import parts_of
from mllm_vision.data.images.files import images_of
from mllm_vision.data.records.columns import PAIRS, bind_columns, column_kind, features_of, image_counts
from mllm_vision.data.records.sampling import only_columns, rows_of
from mllm_vision.errors import short

logger = logging.getLogger(__name__)

# role(s) of each form, in the order in which a table is asked for them
FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("pairs",),
    ("caption",),
)
_BESIDE = ("image?", "system?", "history?", "input?")
_INSTRUCTIONS = ("instruction", "prompt")  # beside a question column of these names, `input` belongs to the question
_QUIET = (  # names and categories of rows, without content
    *("id", "ids", "idx", "index", "image_id", "question_id", "source", "url", "split", "__key__", "__url__"),
    *("question_type", "question_types", "answer_type"),
)


def bind_conversations(
    records: Any,
    overrides: dict[str, str] | None = None,
    *,
    forms: Sequence[tuple[str, ...]] = FORMS,
    report: bool = True,
) -> dict[str, str]:
    """The columns of a conversation: role -> column, of the first of `forms` whose columns are there.

    The forms are `messages`, `conversations`, TRL's `prompt` with `completion` (lists of messages), `question` with
    `answer` (Alpaca's `instruction` with `output` too), lists of question-answer pairs (the Cauldron's `texts`), and
    `caption`. An image column is bound where there is one, and Alpaca's `input`, `system` and `history`. What
    `overrides` names is preferred. Unused columns with content are reported in one warning (`report`).

    Raises:
        ValueError: none of these is there; lists the columns, and as remedy the flags of the roles in `overrides`.
    """
    rows_of(records)
    flags = [f"--{role}_column" for role in overrides or {} if role != "image"]
    overrides = {role: name for role, name in (overrides or {}).items() if name}
    for form in sorted(forms, key=lambda form: not any(role in overrides for role in form)):
        bound = bind_columns(records, [*(f"{role}?" for role in form), *_BESIDE], overrides)
        if all(role in bound for role in form) and _readable(records, bound, form, overrides):
            bound = _fitting(bound, form, overrides)
            return _warn_of_unused(records, bound) if report else bound
    why = "its texts are not JSON"
    try:
        bind_columns(records, forms[0], overrides)
    except ValueError as error:
        why = str(error).partition(". The columns")[0]
    found = ", ".join(f"{name} ({column_kind(feature)})" for name, feature in features_of(records).items())
    remedy = f"Name it with {', '.join(flags)}" if flags else "Name it: columns={'messages': ...}"
    raise ValueError(
        f"no conversation found: neither {', '.join(' with '.join(form) for form in forms if form != ('pairs',))} "
        f"({why}). "
        f"The columns are: {found}. {remedy}"
    )


def _fitting(bound: dict[str, str], form: tuple[str, ...], overrides: dict[str, str]) -> dict[str, str]:
    """Without the roles that belong to other forms: `input` beside an instruction, `history` beside questions."""
    drop = {"history", "input"}
    if form == ("question", "answer"):
        drop = {"input"} if bound["question"].lower() not in _INSTRUCTIONS else set()
    return {role: name for role, name in bound.items() if role not in drop or role in overrides}


def _readable(records: Any, bound: dict[str, str], form: tuple[str, ...], overrides: dict[str, str]) -> bool:
    """Whether a column of texts bound as turns holds JSON, judging by the first rows."""
    if form[0] not in ("messages", "conversations") or form[0] in overrides:
        return True
    turns = only_columns(records, [bound[form[0]]])
    rows = (turns[place][bound[form[0]]] for place in range(min(len(records), 16)))
    texts = [value for value in rows if value]
    return not texts or any(not isinstance(text, str) or text.lstrip()[:1] in ("[", "{") for text in texts)


def _warn_of_unused(records: Any, bound: dict[str, str]) -> dict[str, str]:
    names = list(getattr(records, "column_names", None) or records[0])
    unused = [name for name in names if name not in bound.values() and name.lower() not in _QUIET]
    if unused:
        used = ", ".join(f"{name} ({role})" for role, name in bound.items())
        logger.warning("columns that are not used: %s; used are %s", short(", ".join(unused)), used)
    return bound


class Asked(NamedTuple):
    """One question with the answers it was given; `annotated` where they are several annotators'."""

    text: str
    answers: tuple[str, ...]
    annotated: bool


@dataclass
class Dialogue:
    """The content of a row, its images undecoded.

    Attributes:
        images: in the order of the image parts.
        messages: one conversation, in this order; or
        pairs: questions with their answers, asked about the same images independently of each other; or
        captions: alternatives.
        system, history: prepended to `pairs`.
        left: images of the row that no part refers to.
    """

    images: list[Any]
    messages: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    system: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    left: int = 0

    @property
    def free(self) -> bool:
        """Whether the questions may come in any order."""
        return len(self.pairs) > 1 and not self.system and not self.history

    def asking(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """These of the questions as one conversation."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return before + from_pairs([*self.history, *pairs], len(self.images))

    def samples(self, max_turns: int | None = None) -> list[list[list[dict[str, Any]]]]:
        """The samples of the row, each a list of alternative conversations (captions to draw from)."""
        if self.captions:
            return [[from_caption(caption, len(self.images)) for caption in self.captions]]
        if self.pairs:
            step = max_turns or len(self.pairs)
            return [[self.asking(self.pairs[at : at + step])] for at in range(0, len(self.pairs), step)]
        return [[self.messages]]


class ConversationForm:
    """Reads rows of one table: `form(record)` is its `Dialogue`.

    Args:
        records: the table, or some of its rows; its features give the names of classes (an answer that is a
            `ClassLabel` is rendered by its name).
        columns: role -> column, see `bind_conversations`; None binds by name and type.
    """

    def __init__(self, records: Any, columns: dict[str, str] | None = None) -> None:
        self.columns = dict(columns) if columns else bind_conversations(records)
        bound = set(self.columns)
        found = next((form for form in FORMS if bound.issuperset(form)), None)
        if found is None:
            raise ValueError(
                f"columns={self.columns} name no conversation: bind 'messages', 'conversations', 'question' and "
                "'answer', or 'caption'"
            )
        self.form = found
        features = getattr(records, "features", None) or {}
        names = {name: _names(features[name]) for name in self.columns.values() if name in features}
        self._names = {name: convert for name, convert in names.items() if convert is not None}
        self.by_question = self.form in (("question", "answer"), ("pairs",))

    def value(self, record: dict[str, Any], role: str) -> Any:
        """The row's value for a role, classes by name; None if the role is not bound."""
        name = self.columns.get(role)
        if name is None:
            return None
        value = record.get(name)
        return self._names[name](value) if name in self._names and value is not None else value

    def images(self, record: dict[str, Any]) -> list[Any]:
        """The images of the row's image column, undecoded: one, several or none; nulls among them do not count."""
        return images_of(record.get(self.columns["image"]) if "image" in self.columns else None)

    def __call__(self, record: dict[str, Any]) -> Dialogue:
        """The content of the row.

        Raises:
            BadConversation: empty, malformed or unpaired; images and image marks that differ in number.
        """
        images = self.images(record)
        if self.form == ("caption",):
            if not images:
                raise BadConversation("the caption has no image", short(self.value(record, "caption"), 80))
            return Dialogue(images, captions=self.captions(record))
        if self.by_question:
            system = words(self.value(record, "system"))
            pairs = [(asked.text, _consensus(asked.answers)) for asked in self.questions(record)]
            return Dialogue(images, pairs=pairs, system=system, history=self._history(record))
        messages, placed, left = place_images(self.turns(record), images)
        return Dialogue(placed, messages=messages, left=left)

    def turns(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of a row of turns, image parts with what they name."""
        messages = self._completed(record) if "prompt" in self.form else from_turns(self.value(record, self.form[0]))
        system = words(self.value(record, "system"))
        if system and messages[0]["role"] != "system":
            return [{"role": "system", "content": system}, *messages]
        return messages

    def captions(self, record: dict[str, Any]) -> list[str]:
        """The non-empty captions."""
        value = self.value(record, "caption")
        captions = [text for each in _listed(value) if (text := words(each))]
        if not captions:
            raise BadConversation("the caption is empty")
        return captions

    def questions(self, record: dict[str, Any]) -> list[Asked]:
        """The questions of a row with all answers that were given to each."""
        if self.form == ("pairs",):
            pairs = [_both(each) for each in _listed(self.value(record, "pairs"))]
            questions, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        else:
            questions, answers = self.value(record, "question"), self.value(record, "answer")
            several = isinstance(questions, list | tuple)
            questions, answers = (list(questions), _listed(answers)) if several else ([questions], [answers])
            if len(questions) != len(answers):
                raise BadConversation("questions and answers differ in number", f"{len(questions)} and {len(answers)}")
        if not questions:
            raise BadConversation("the conversation is empty")
        more = words(self.value(record, "input"))
        asked = []
        for question, answer in zip(questions, answers, strict=True):
            given = tuple(text for each in _listed(answer) if (text := words(each)))
            text = "\n".join(each for each in (words(question), more) if each)
            if not text or not given:
                raise BadConversation("a question or an answer is empty", f"{short(question)} -> {short(answer)}")
            asked.append(Asked(text, given, isinstance(answer, list | tuple)))
        return asked

    def _history(self, record: dict[str, Any]) -> list[tuple[str, str]]:
        """Alpaca's earlier turns: a list of [question, answer]."""
        pairs = []
        for each in _listed(self.value(record, "history")):
            question, answer = each if isinstance(each, list | tuple) and len(each) == 2 else _both(each)
            pairs.append((words(question), words(answer)))
            if not all(pairs[-1]):
                raise BadConversation("a turn of the history is empty", short(each))
        return pairs

    def _completed(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """TRL's prompt, which is read, and its completion, which is supervised; texts or messages."""
        prompt, completion = self.value(record, "prompt"), self.value(record, "completion")
        before = from_turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        after = completion if not isinstance(completion, str) else [{"role": "assistant", "content": completion}]
        after, images = from_turns(after), self.images(record)
        before = [turn | {"supervised": False} if turn["role"] == "assistant" else turn for turn in before]
        if images and not image_parts(before):  # as TRL does: images that no turn refers to go before the first
            first = next((turn for turn in before if turn["role"] == "user"), None)
            if first is not None:
                first["content"] = [{"type": "image"}] * len(images) + parts_of(first["content"])
        return before + after


def to_messages(record: dict[str, Any], columns: dict[str, str], *, choice: int = 0) -> list[dict[str, Any]]:
    """A record as `messages`: [{"role", "content"}], content a string or a list of image and text parts.

    Args:
        record: one row.
        columns: role -> column, see `bind_conversations`. Several questions on one image become one dialogue; several
            answers to one question give the most frequent one.
        choice: which of several captions, modulo their number.

    Raises:
        BadConversation: (a ValueError) for an empty, malformed or unpaired conversation.
    """
    form = ConversationForm([record], columns)
    if not form.by_question and form.form != ("caption",):
        return without_sources(form.turns(record))
    [alternatives] = form(record).samples()
    return alternatives[choice % len(alternatives)]


def warn_of_further_images(records: Any, column: str) -> int:
    """How many images are left out where one a row is taken and the column holds lists (reported); in a list of rows,
    of its first thousand."""
    rows = records if hasattr(records, "features") else [records[row] for row in range(min(len(records), 1000))]
    more = int(np.maximum(image_counts(rows, column) - 1, 0).sum())
    if more:
        message = "column %r holds lists of images: the first one of each row is used, %d others are left out"
        logger.warning(message, column, more)
    return more


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _both(pair: Any) -> tuple[Any, Any]:
    """Question and answer of {"user", "assistant"} and the like."""
    for names in PAIRS:
        if isinstance(pair, dict) and all(name in pair for name in names):
            return pair[names[0]], pair[names[1]]
    raise BadConversation("the conversation is malformed", f"no question with its answer: {short(pair)}")


def _consensus(answers: Sequence[str]) -> str:
    """The most frequent of several answers (VQA has ten a question); the first one on a tie."""
    return Counter(answers).most_common(1)[0][0]


def _names(feature: Any) -> Callable[[Any], Any] | None:
    """A function from the class numbers in a column's values to names; None without classes."""
    from datasets import ClassLabel, LargeList, List

    if isinstance(feature, ClassLabel):
        names = list(feature.names or [])
        return lambda value: _name(value, names)
    if isinstance(feature, list):
        feature = List(feature[0])
    if isinstance(feature, List | LargeList):
        inner = _names(feature.feature)
        return inner and (lambda values: values and [each if each is None else inner(each) for each in values])
    if isinstance(feature, dict):
        fields = {name: found for name, each in feature.items() if (found := _names(each)) is not None}
        return (lambda value: _with_names(value, fields)) if fields else None
    return None


def _with_names(value: Any, fields: dict[str, Callable[[Any], Any]]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: fields[name](each) if name in fields and each is not None else each for name, each in value.items()}


def _name(value: Any, names: Sequence[str]) -> Any:
    if not isinstance(value, int):
        return value
    if value == -1:
        return None  # `datasets`' own mark of a row without a class
    if not 0 <= value < len(names):
        raise BadConversation("a class has no name", f"number {value} of {len(names)} classes")
    return names[value]
