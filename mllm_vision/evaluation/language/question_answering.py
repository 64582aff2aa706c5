"""Visual question answering: exact match, consensus, by question type, beside what guessing reaches."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_vision.data import bind_conversations
from mllm_vision.data.records.columns import image_counts
from mllm_vision.data.records.forms import Asked, ConversationForm
from mllm_vision.data.records.sampling import BadRow, BadSamples, judge, only_columns
from mllm_vision.evaluation.base import Evaluation, Evaluator, agree_on_error, batches, gather_items, my_share
from mllm_vision.evaluation.images import as_list, check_columns, data_uri, draw_rows, row_image, usable_images
from mllm_vision.evaluation.language.answers import MajorityBaseline, consensus, exact_match
from mllm_vision.evaluation.language.generation import AnswerGenerator

logger = logging.getLogger(__name__)
LONGEST_QUESTION = 200_000  # characters; no language model here has room for more, and tokenising takes memory
IMAGES_AT_ONCE = 256  # projected features of this many images are held in memory together


@dataclass(frozen=True)
class Question:
    """One question about the image of one row; ``answers`` are several annotators' where ``annotated``."""

    row: int
    text: str
    answers: tuple[str, ...]
    kind: str
    annotated: bool = False


def read_questions(
    records: Any,
    columns: dict[str, str],
    by: str | None,
    limit: int | None = None,
    refused: dict[Any, BadRow] | None = None,
) -> list[Question]:
    """Flatten rows into questions, read and judged as in training (`ConversationForm`).

    A row holds one question (str) with one answer or a list of annotators' answers, or a list of questions
    with a list as long of answers (each again one or several). ``by`` names the column of question types, of
    the same form. A row that cannot be used is left out, noted in ``refused`` by its reason, and told.

    Raises:
        ValueError: no row can be used; with the reasons.
    """
    form = ConversationForm(records, {role: name for role, name in columns.items() if role != "image"})
    bad = BadSamples()
    questions: list[Question] = []
    rows = draw_rows(len(records), limit)
    total = len(rows)
    bad.examine(total)
    texts = only_columns(records, [*form.columns.values(), *([by] if by else [])])
    images: Any = image_counts(records, columns["image"]) if columns.get("image") else [0] * len(records)
    for row in rows:
        found = bad.judge_beforehand(f"row {row}", _asked, row, texts[row], form, by, bool(images[row] > 1))
        if isinstance(found, BadRow):
            (refused if refused is not None else {})[row] = found
            continue
        questions += found
    if bad.refused:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.reasons.most_common())
        logger.warning("%d of %d rows are left out of question answering: %s", bad.refused, total, reasons)
    if not questions:
        listed = "\n".join(f"  - {example}" for example in bad.examples)
        raise ValueError(f"no row of {total} holds a question that can be asked:\n{listed}")
    return questions


def _asked(row: int, record: dict[str, Any], form: ConversationForm, by: str | None, several: bool) -> list[Question]:
    if several:
        raise BadRow("the question is about several images", "question answering asks about one")
    if form.value(record, "system") or form.value(record, "history"):
        raise BadRow("the question has a system turn or a history", "question answering asks single questions")
    asked = form.questions(record)
    if longest := _beyond(asked):
        raise BadRow("a question is too long to be asked", f"{longest} characters")
    kinds = as_list(record[by]) if by else ["all"]
    if len(kinds) not in (1, len(asked)):
        raise BadRow("questions and their types differ in number", f"{len(asked)} and {len(kinds)}")
    kinds = kinds * len(asked) if len(kinds) == 1 else kinds
    pairs = zip(asked, kinds, strict=True)
    return [Question(row, each.text, each.answers, str(kind), each.annotated) for each, kind in pairs]


def _beyond(asked: Sequence[Asked]) -> int:
    """The length of the longest question where it is beyond what is worth tokenising; otherwise 0."""
    longest = max(len(each.text) for each in asked)
    return longest if longest > LONGEST_QUESTION else 0


def slug(kind: str) -> str:
    """A question type as part of a metric's name: "yes/no" becomes yes_no."""
    return re.sub(r"\W+", "_", kind.strip().lower()).strip("_") or "other"


class QuestionAnswering(Evaluator):
    """Accuracy of a vision-language model on questions about images.

    Args:
        name: evaluator name.
        records: rows with an image, question(s) and answer(s).
        columns: roles ``image``, ``question``, ``answer`` to column names.
        processor: the model's processor (tokenizer, image processor, chat template).
        by: column of question types (str or a list as long as the questions); used if present, else one type
            "all".
        batch_size: questions generated at once.
        max_new_tokens: length limit of an answer.
        limit: at most this many rows, drawn at random.
        blind: the model sees zeros instead of images.
        no_image_baseline: measure the same model blind as well, as baseline ``no_image``.
        training_answers: (type, answer) pairs, or records with the same columns, from which the majority
            baselines are taken; None takes them from the evaluated set itself, which makes them as strong as
            a constant can be.

    Metrics: ``accuracy`` (normalised exact match), ``accuracy_<type>``, ``consensus`` where answers come from
    several annotators, ``count``. Baselines: ``majority`` (one answer for everything), ``majority_by_type``
    and ``no_image``.

    Raises:
        ValueError: missing columns, an empty set, no row with a question that can be asked, no chat template.
    """

    primary_metric = "accuracy"
    models = ("vlm",)

    @classmethod
    def from_flags(cls, name: str, records: Any, flags: Any, sources: Any) -> QuestionAnswering:
        # As in training: what stands beside an instruction belongs to the question.
        roles = {role: column for role, column in sources.named.items() if role in ("image", "question", "answer")}
        return cls(
            name,
            records,
            bind_conversations(records, roles, forms=[("question", "answer")], report=False),
            sources.processor,
            flags.type_column,
            flags.batch_size,
            flags.max_new_tokens or 16,
            limit=flags.max_samples,
            blind=flags.blind,
            no_image_baseline=flags.no_image_baseline,
            training_answers=sources.training(flags.max_samples),
        )

    def __init__(
        self,
        name: str,
        records: Any,
        columns: dict[str, str] | None = None,
        processor: Any = None,
        by: str | None = "question_types",
        batch_size: int = 64,
        max_new_tokens: int = 12,
        *,
        limit: int | None = None,
        blind: bool = False,
        no_image_baseline: bool = False,
        training_answers: Any = None,
        sample_count: int = 24,
    ) -> None:
        super().__init__(name)
        self.records, self.processor = records, processor
        self.columns = columns or {"image": "image", "question": "questions", "answer": "answers"}
        check_columns(records, self.columns, ("image", "question", "answer"), f"QuestionAnswering {name!r}")
        if processor is None:
            raise ValueError(f"QuestionAnswering {name!r} needs the model's processor")
        found = list(getattr(records, "column_names", None) or records[0].keys())
        candidates = (by, "question_type", "question_types", "answer_type")
        self.by = next((column for column in candidates if column and column in found), None)
        self.batch_size, self.max_new_tokens, self.sample_count = batch_size, max_new_tokens, sample_count
        self.blind, self.no_image_baseline = blind, no_image_baseline
        self.questions = self._chosen(read_questions(records, self.columns, self.by, limit, self.refused))
        self.majority = MajorityBaseline(self._training_pairs(training_answers))

    def _training_pairs(self, given: Any) -> list[tuple[str, str]]:
        self.majority_from = "evaluated set" if given is None else "training set"
        if given is None:
            return [(question.kind, answer) for question in self.questions for answer in question.answers]
        if hasattr(given, "column_names"):
            by = self.by if self.by in given.column_names else None
            questions = self._chosen(read_questions(given, self.columns, by))
            return [(question.kind, answer) for question in questions for answer in question.answers]
        return [(str(kind), str(answer)) for kind, answer in given]

    def _chosen(self, questions: list[Question]) -> list[Question]:
        """Those of the questions that are asked."""
        return questions

    def _right(self, text: str, question: Question) -> bool:
        return bool(exact_match(text, question.answers))

    def evaluate(self, model: Any) -> Evaluation:
        answers = self._answers(model, self.blind)
        asked = [question for question, _ in answers]
        result = self._summary(answers)
        result.baselines |= self._majorities(asked)
        result.tables["question_type"] = self._table(answers)
        if self.no_image_baseline and not self.blind:
            blind = self._answers(model, True)
            result.baselines["no_image"] = self._summary(blind).metrics
            without = {row["name"]: row["accuracy"] for row in self._table(blind)}
            for row in result.tables["question_type"]:
                row["no_image"] = without.get(row["name"])
        result.samples = self._samples(answers)
        return result

    def _answers(self, model: Any, blind: bool) -> list[tuple[Question, str]]:
        """(question, generated answer) of the whole set, on every rank."""
        by_row: dict[int, list[tuple[int, Question]]] = defaultdict(list)
        for number, question in enumerate(self.questions):
            by_row[question.row].append((number, question))
        rows = sorted(by_row)
        pairs: list[tuple[int, tuple[Question, str]]] = []
        error: Exception | None = None
        try:
            generator = AnswerGenerator(
                model,
                self.processor,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                blind=blind,
            )
            for chunk in batches(my_share(len(rows)), IMAGES_AT_ONCE):
                wanted = [rows[place] for place in chunk]
                images, kept = usable_images(self.records, self.columns["image"], wanted, self.refused)
                asked = [(place, *item) for place, row in enumerate(kept) for item in by_row[row]]
                asked = [item for item in asked if self._can_be_asked(generator, item[2], images[item[0]])]
                texts = generator.answer(images, [(place, question.text) for place, _, question in asked])
                pairs += [(number, (question, text)) for (_, number, question), text in zip(asked, texts, strict=True)]
        except Exception as problem:
            error = problem
        agree_on_error(error)
        merged = gather_items(pairs)
        if not merged:
            raise ValueError(f"QuestionAnswering {self.name!r}: none of the images could be read")
        return merged

    @staticmethod
    def _can_be_asked(generator: AnswerGenerator, question: Question, image: Any) -> bool:
        """Whether the question makes a prompt; if not, it is logged and counted among those skipped."""
        found = judge(f"row {question.row}", generator.prompt, question.text, [(image.height, image.width)])
        if isinstance(found, BadRow):
            logger.warning("a question is left out: %s", found)
        return not isinstance(found, BadRow)

    def _summary(self, answers: Sequence[tuple[Question, str]]) -> Evaluation:
        right = [self._right(text, question) for question, text in answers]
        metrics = {"accuracy": sum(right) / len(right), "count": float(len(right))}
        if any(question.annotated for question, _ in answers):
            metrics["consensus"] = sum(consensus(text, question.answers) for question, text in answers) / len(answers)
        by_type: dict[str, list[float]] = defaultdict(list)
        for (question, _), value in zip(answers, right, strict=True):
            by_type[question.kind].append(value)
        if len(by_type) > 1:
            metrics |= {f"accuracy_{slug(kind)}": sum(v) / len(v) for kind, v in sorted(by_type.items())}
        if len(answers) < len(self.questions):
            metrics["skipped"] = float(len(self.questions) - len(answers))
        return Evaluation(self.primary_metric, metrics)

    def _majorities(self, asked: Sequence[Question]) -> dict[str, dict[str, float]]:
        guesses = {
            "majority": [(question, self.majority.guess()) for question in asked],
            "majority_by_type": [(question, self.majority.guess(question.kind)) for question in asked],
        }
        if self.by is None:
            del guesses["majority_by_type"]
        return {name: self._summary(pairs).metrics for name, pairs in guesses.items()}

    def _table(self, answers: Sequence[tuple[Question, str]]) -> list[dict[str, Any]]:
        groups: dict[str, list[tuple[Question, str]]] = defaultdict(list)
        for question, text in answers:
            groups[question.kind].append((question, text))
        rows = []
        for kind, items in sorted(groups.items()):
            guess = self.majority.guess(kind)
            rows.append(
                {
                    "name": kind,
                    "count": len(items),
                    "accuracy": sum(self._right(text, question) for question, text in items) / len(items),
                    "majority": sum(self._right(guess, question) for question, _ in items) / len(items),
                    "majority_answer": guess,
                }
            )
        return rows

    def _samples(self, answers: Sequence[tuple[Question, str]]) -> list[dict[str, Any]]:
        """Right and wrong answers with thumbnails, spread over question types and images."""
        chosen: list[tuple[Question, str, bool]] = []
        for wanted in (True, False):
            groups: dict[str, list[tuple[Question, str]]] = defaultdict(list)
            used: set[int] = set()
            for question, text in answers:
                if self._right(text, question) is wanted and question.row not in used:
                    groups[question.kind].append((question, text))
                    used.add(question.row)
            depth = max((len(items) for items in groups.values()), default=0)
            turns = [items[i] for i in range(depth) for _, items in sorted(groups.items()) if i < len(items)]
            chosen += [(question, text, wanted) for question, text in turns[: self.sample_count // 2]]
        return [
            {
                "image": data_uri(row_image(self.records, self.columns["image"], question.row), 128),
                "question": question.text,
                "answer": question.answers[0],
                "prediction": text,
                "correct": wanted,
                "question_type": question.kind,
            }
            for question, text, wanted in chosen
        ]
