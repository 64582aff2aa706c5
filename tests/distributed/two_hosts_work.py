"""What each rank of test_two_hosts.py does: train CLIP over both hosts, then wait in a collective for the other."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

STEPS, ROWS = 3, 8
TIMEOUT = 20  # of a collective, in seconds


class Pairs(Dataset):
    """The same rows on every host."""

    def __init__(self) -> None:
        from pairs_for_tests import pair_batches

        batches = pair_batches(STEPS, ROWS)
        self.rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def train(folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """CLIP for three steps of eight pairs, however many ranks share them; the parameters at the end."""
    from pairs_for_tests import make_objective

    from mllm_vision.training.recipe.arguments import RecipeArguments
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    arguments = RecipeArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=batch_size, max_steps=STEPS,
        save_strategy="no", learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        disable_tqdm=True, logging_steps=1, ddp_timeout=TIMEOUT, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = ObjectiveTrainer(model=make_objective("clip"), args=arguments, train_dataset=Pairs())
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.objective.named_parameters()}


def main() -> None:
    from mllm_vision.training.recipe.parser import run_recipe

    folder = Path(sys.argv[1])

    def work() -> None:
        import torch.distributed as dist
        from safetensors.torch import save_file

        world = int(os.environ["WORLD_SIZE"])
        parameters = train(folder / "run", ROWS // world)
        rank = dist.get_rank()
        names: list = [None] * world
        dist.all_gather_object(names, (rank, socket.gethostname()))
        if rank == 0:
            save_file(parameters, folder / "trained.safetensors")
            print("ranks", names, flush=True)
        (folder / f"process-{rank}").write_text(str(os.getpid()))
        dist.barrier()
        if rank == 0:
            (folder / "waiting").touch()
        elif sys.argv[2] == "kill":
            import time

            time.sleep(600)  # stays away from the collective, so that rank 0 really hangs in it
        while True:  # until the wire is cut
            dist.all_reduce(torch.ones(1))

    run_recipe(work)


if __name__ == "__main__":
    main()
