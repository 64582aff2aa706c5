"""Draw one self-contained page of a chain of runs, and a flat results.json; needs no torch.

    python scripts/report.py --runs runs/q/pretrain runs/q/lm runs/q/align runs/q/instruct \\
        --evaluations stage_zero=runs/q/stage_zero.json stage_two=runs/q/stage_two.json \\
            stage_two/blind=runs/q/blind.json stage_two/untrained_encoder=runs/q/untrained.json \\
        --output runs/q/report.html --results runs/q/results.json

--runs accepts run folders (or run.json files), which name their stage. NAME/VARIANT=folder adds an ablation's
curves. --evaluations accepts NAME=file or NAME/VARIANT=file as scripts/evaluate.py wrote it; NAME is the stage
(stage_zero, stage_two...), VARIANT an ablation (blind, untrained_encoder). Several files of one NAME are merged.

results.json holds stage_zero/zero_shot_accuracy, stage_zero/untrained_zero_shot_accuracy, stage_zero/retrieval_r1,
stage_zero/retrieval_r1_chance, stage_zero/unseen_zero_shot_accuracy, stage_two/accuracy, stage_two/accuracy_<type>,
stage_two/unseen_accuracy, stage_two/majority_accuracy, stage_two/blind_accuracy,
stage_two/untrained_encoder_accuracy, stage_two/yes_no_f1, stage_two/captioning_cider and more of the same form, as far
as the files hold them.

A missing or broken file is reported and left out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from mllm_vision.report import load_chain, write_report, write_results
from mllm_vision.training.recipe.parser import parse_recipe, run_recipe


@dataclass
class ReportArguments:
    """Content and destination of the page."""

    runs: list[str] = field(default_factory=list, metadata={"help": "Run folders or run.json files."})
    evaluations: list[str] = field(default_factory=list, metadata={"help": "NAME[/VARIANT]=file.json, several."})
    output: str | None = field(default="report.html", metadata={"help": "The page."})
    results: str | None = field(default=None, metadata={"help": "The flat results.json."})
    title: str | None = field(default=None, metadata={"help": "The page's title."})


def main(argv: list[str] | None = None) -> None:
    (own,) = parse_recipe(ReportArguments, argv=argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not own.runs and not own.evaluations:
        raise ValueError("nothing to report on: name run folders with --runs, evaluation files with --evaluations")
    chain = load_chain(own.runs, own.evaluations)
    if not chain.stages:
        raise ValueError(f"none of {', '.join([*own.runs, *own.evaluations])} could be read (see the lines above)")
    if own.results:
        results = write_results(chain, own.results)
        print(f"results: {own.results} ({len(results)} figures)")
    if own.output and write_report(chain, own.output, own.title):
        print(f"report: {own.output}")


if __name__ == "__main__":
    run_recipe(main)
