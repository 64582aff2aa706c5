"""Questions about images as lmms-eval reads them: one row a question, with the tasks beside them.

    python scripts/lmms_eval/rows.py --dataset_name easyvqa_test.parquet --max_samples 100 --output_dir runs/lmms

Writes questions.parquet and yes_no.parquet (the questions answered by yes or no, where there are any), for each the
task local_vqa or local_yes_no, and utils.py. Rows are read and refused as in evaluation; docs/lmms_eval.md says how
lmms-eval runs on them.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from mllm_vision.data import bind_conversations, load_records
from mllm_vision.data.images.files import first_image
from mllm_vision.evaluation.language.question_answering import Question, read_questions
from mllm_vision.evaluation.language.yes_no import is_yes

HERE = Path(__file__).parent
TEXT = Value("string")
FEATURES = Features(
    {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "answers": List(TEXT), "category": TEXT}
)


def rows_of(records: Any, column: str, questions: list[Question]) -> Dataset:
    """One row a question, the images undecoded."""
    encoded = {row: first_image(records[row].get(column)) for row in {question.row for question in questions}}
    rows = [
        {
            "question_id": f"{question.row}-{number}",
            "image": encoded[question.row],
            "question": question.text,
            "answer": Counter(question.answers).most_common(1)[0][0],
            "answers": list(question.answers),
            "category": question.kind,
        }
        for number, question in enumerate(questions)
    ]
    return Dataset.from_list(rows, features=FEATURES)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="file, folder or Hub id")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--image_root", default=None, help="folder that relative image paths start from")
    parser.add_argument("--type_column", default=None, help="question types")
    parser.add_argument("--max_samples", type=int, default=None, help="at most so many rows, drawn at random")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    records = load_records(args.dataset_name, split=args.dataset_split, image_root=args.image_root)
    columns = bind_conversations(records, forms=[("question", "answer")], report=False)
    questions = read_questions(records, columns, args.type_column, args.max_samples)
    asked = {"vqa": questions, "yes_no": [question for question in questions if is_yes(question) is not None]}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "utils.py", args.output_dir)
    for name, chosen in asked.items():
        if chosen:
            file = (args.output_dir / f"{name}.parquet").resolve()
            rows_of(records, columns["image"], chosen).to_parquet(str(file))
            task = (HERE / f"local_{name}.yaml").read_text(encoding="utf-8").replace("ROWS", str(file))
            (args.output_dir / f"local_{name}.yaml").write_text(task, encoding="utf-8")
        print(f"local_{name}: {len(chosen)} questions")


if __name__ == "__main__":
    main()
