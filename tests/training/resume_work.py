"""What the processes of test_exact_resume.py do. A fork server loads this module once, and each run starts warm."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from mllm_vision.data.records.sampling import EpochDataset  # noqa: E402
from mllm_vision.data.streams.streams import Stream, StreamDataset  # noqa: E402
from mllm_vision.training.recipe.arguments import RecipeArguments  # noqa: E402
from mllm_vision.training.trainer.recipe_trainer import RecipeTrainer  # noqa: E402

for module in (  # what the recipes load later, loaded before the fork; none of it computes anything yet
    *("datasets", "PIL.Image", "sentencepiece", "transformers.models.clip.modeling_clip"),
    *("transformers.models.llava.modeling_llava", "transformers.models.llama.modeling_llama"),
    *(
        "transformers.models.llama.tokenization_llama",
        "mllm_vision.objectives.clip",
        "mllm_vision.training.trainer.objective_trainer",
    ),
    *("mllm_vision.objectives.pcl", "mllm_vision.objectives.dinov2", "mllm_vision.data.views.views"),
    *(
        "mllm_vision.vlm.conversation",
        "mllm_vision.evaluation.language.question_answering",
        "mllm_vision.data.streams.loader",
    ),
):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)


def _recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"resumed_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RECIPES = {name: _recipe(name) for name in ("pretrain", "pretrain_images", "align", "instruct")}


def _environment(rank: int, world: int, port: int) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of its data workers; it inherited the fork server's
    if world > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)


def run(recipe: str, words: list[str], rank: int, world: int, port: int, log: str) -> None:
    """One process of a recipe, as torchrun would start it."""
    with open(log, "ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    _environment(rank, world, port)
    RECIPES[recipe].main(words)


class Seen(torch.nn.Module):
    """Learns nothing that matters, and remembers which rows it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []

    def forward(self, row: Any) -> dict[str, Any]:
        self.rows.append(row.tolist())
        return {"loss": (self.weight * row.float() / 100 - 1).square().mean()}


class Rows(EpochDataset):
    """Numbered rows, as a list or, through `read_record`, as the rows of a stream."""

    columns = {"row": "row"}

    def __init__(self, count: int = 38) -> None:
        super().__init__(0, count, None)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def _read(self, index: int, key: int) -> dict[str, Any]:
        return self.read_record({"row": index}, key, index)

    def read_record(self, record: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        return {"row": record["row"]}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def seen(output: Path, shards: Path | None, stop: int | None = None, **settings: Any) -> list[list[int]]:
    """The rows of each batch, until the training ends or stops dead."""
    trainer = trainer_of(output, shards, stop, **settings)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    return trainer.model.rows


def trainer_of(
    output: Path, shards: Path | None, stop: int | None = None, evaluators: Any = (), **settings: Any
) -> Any:
    """A trainer over numbered rows, of a list or of shards; it stops dead after step `stop`."""
    data: Any = Rows()
    if shards is not None:
        data = StreamDataset(Stream.open(shards, seed=5, shuffle_buffer=12, readers=2), data)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    defaults = {"use_cpu": True, "disable_tqdm": True, "save_steps": 2, "logging_steps": 100, "seed": 5}
    arguments = RecipeArguments(output_dir=str(output), **{**defaults, **settings})
    return RecipeTrainer(Seen(), arguments, train_dataset=data, callbacks=[Stop()], evaluators=evaluators)


def train_on_rows(
    output: Path, shards: Path | None, stop: int, settings: dict[str, Any], rank: int, world: int, port: int
) -> None:
    """`trainer_of` on one of several processes, which writes down what it saw."""
    _environment(rank, world, port)
    trainer = trainer_of(output, shards, stop, **settings)
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    (output.parent / f"seen-{rank}.json").write_text(json.dumps(trainer.model.rows))
    torch.distributed.barrier()


def train_until_signalled(
    output: Path, shards: Path | None, pace: float, settings: dict[str, Any], rank: int, world: int, port: int
) -> None:
    """`trainer_of` with steps of `pace` seconds, which writes down what it saw however it ends."""
    _environment(rank, world, port)
    trainer = trainer_of(output, shards, **settings)

    class Pace(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (output.parent / f"begun-{rank}").touch()
            time.sleep(pace)

    trainer.add_callback(Pace())
    try:
        trainer.train()
    finally:
        (output.parent / f"seen-{rank}.json").write_text(json.dumps(trainer.model.rows))
