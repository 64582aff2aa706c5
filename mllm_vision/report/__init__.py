"""One self-contained page that shows the whole chain, drawn only from run.json and evaluation files.

Nothing here imports the other rooms of the package, nor anything outside the standard library.
"""

from mllm_vision.report.chain import Chain, Stage, load_chain
from mllm_vision.report.page import render, write_report
from mllm_vision.report.results import flat_results, write_results

__all__ = ["Chain", "Stage", "flat_results", "load_chain", "render", "write_report", "write_results"]
