"""One self-contained page that shows the whole chain, drawn only from run.json and evaluation files.

Nothing here imports the other rooms of the package; jinja2 fills templates/, Pillow encodes images. What a method wants
shown is data in run.json: `method` holds its `about` (a sentence), `chance_loss` (a number) and `loss_parts` (names of
logged metrics).
"""

from mllm_vision.report.chain import Chain, Stage, load_chain
from mllm_vision.report.page import render, write_report
from mllm_vision.report.results import flat_results, write_results

__all__ = ["Chain", "Stage", "flat_results", "load_chain", "render", "write_report", "write_results"]
