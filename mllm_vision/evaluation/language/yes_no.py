"""Yes/no questions about images, as POPE asks whether an object is there."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

from mllm_vision.evaluation.base import Evaluation
from mllm_vision.evaluation.language.answers import normalize_answer, says_no, yes_no_scores
from mllm_vision.evaluation.language.question_answering import Question, QuestionAnswering, slug

logger = logging.getLogger(__name__)


def is_yes(question: Question) -> bool | None:
    """The label of a yes/no question: most of its annotators' answers; None if that is neither yes nor no."""
    counts = Counter(normalize_answer(answer) for answer in question.answers)
    top = [answer for answer, count in counts.items() if count == max(counts.values())]
    return {"yes": True, "no": False}.get(top[0]) if len(top) == 1 else None


class YesNo(QuestionAnswering):
    """`QuestionAnswering` on the yes/no questions of a set, with POPE's figures.

    Questions whose answer is neither yes nor no are left aside (their number is logged). Answers are read as by
    `says_no`.

    Metrics: ``f1``, ``accuracy``, ``precision``, ``recall``, ``yes_ratio``, ``neither`` (`yes_no_scores`), ``count``;
    ``f1_<type>`` and ``accuracy_<type>`` where there are several question types (POPE's random, popular, adversarial).
    Baselines: ``always_yes``, ``majority`` (the more frequent label), ``no_image``.

    Raises:
        ValueError: as `QuestionAnswering`; no yes/no question.

    Source: POPE (Li et al. 2023).
    """

    primary_metric = "f1"

    def _chosen(self, questions: list[Question]) -> list[Question]:
        kept = [question for question in questions if is_yes(question) is not None]
        if not kept:
            raise ValueError(
                f"{type(self).__name__} {self.name!r}: no question of {len(questions)} has yes or no as answer"
            )
        if len(kept) < len(questions):
            logger.info("%s: %d of %d questions are yes/no questions", self.name, len(kept), len(questions))
        return kept

    def _right(self, text: str, question: Question) -> bool:
        return (not says_no(text)) == is_yes(question)

    def _figures(self, answers: Sequence[tuple[Question, str]]) -> dict[str, float]:
        return yes_no_scores([text for _, text in answers], [bool(is_yes(question)) for question, _ in answers])

    def _summary(self, answers: Sequence[tuple[Question, str]]) -> Evaluation:
        figures = self._figures(answers)
        metrics = {"f1": figures.pop("f1"), **figures, "count": float(len(answers))}
        by_type: dict[str, list[tuple[Question, str]]] = defaultdict(list)
        for question, text in answers:
            by_type[question.kind].append((question, text))
        if len(by_type) > 1:
            for kind, items in sorted(by_type.items()):
                own = self._figures(items)
                metrics |= {f"{name}_{slug(kind)}": own[name] for name in ("f1", "accuracy")}
        if len(answers) < len(self.questions):
            metrics["skipped"] = float(len(self.questions) - len(answers))
        return Evaluation(self.primary_metric, metrics)

    def _majorities(self, asked: Sequence[Question]) -> dict[str, dict[str, float]]:
        guesses = {"always_yes": "yes", "majority": self.majority.guess()}
        return {name: self._summary([(each, guess) for each in asked]).metrics for name, guess in guesses.items()}
