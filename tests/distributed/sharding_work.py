"""What the ranks do in test_sharding.py: a sharded model beside a plain one."""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Scaled(nn.Module):
    """Layers, a tied matrix and a scalar: what stands in the way of sharding."""

    _no_split_modules = ("Layer", "NotHere")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return (self.tied(self.head(self.layers(x))) * self.scale.exp()).square().mean()

    def score(self, x):
        return self.head(self.layers(x))


class Plugin:
    transformer_cls_names_to_wrap = None
    mixed_precision_policy = None
    ignored_modules = None


class Accelerator:
    """The part of accelerate's that is asked."""

    mixed_precision = "bf16"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.state = type("State", (), {"fsdp_plugin": Plugin()})()


def is_sharded(model) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in model.modules())


def train_sharded():
    """Steps of AdamW on a sharded copy and on a plain model with averaged gradients; then gathered."""
    from torch.distributed.fsdp import fully_shard

    from mllm_vision.training.trainer.sharding import copy_to_shard, gather, gathered, prepare_sharding, release

    torch.manual_seed(0)
    model = Scaled()
    plain = copy.deepcopy(model)
    sharded = copy_to_shard(model)
    rows = torch.randn(2, 4, 6)[dist.get_rank()]
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.1, weight_decay=0.01)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.01)
    accelerator = Accelerator()
    prepare_sharding(accelerator, sharded, optimizer)
    plugin = accelerator.state.fsdp_plugin
    found = {
        "layers": plugin.transformer_cls_names_to_wrap,
        "reduce": plugin.mixed_precision_policy.reduce_dtype,
        "groups": [[tuple(value.shape) for value in group["params"]] for group in optimizer.param_groups],
    }
    ignored = {value for module in plugin.ignored_modules for value in module.parameters()}
    for layer in sharded.layers:
        fully_shard(layer, ignored_params=ignored)
    fully_shard(sharded, ignored_params=ignored)
    names = dict(sharded.named_parameters())
    optimizer.param_groups[0]["params"] = [value for name, value in names.items() if name != "scale"]
    release(model)
    found["released"] = all(value.is_meta for value in model.parameters())

    for _ in range(3):
        optimizer.zero_grad()
        sharded(rows).backward()
        optimizer.step()
        reference.zero_grad()
        plain(rows).backward()
        for value in plain.parameters():
            dist.all_reduce(value.grad)
            value.grad /= dist.get_world_size()
        reference.step()

    # any part, and on one rank alone
    with gathered(model, sharded, torch.device("cpu")), torch.no_grad():
        found["part"] = None
        if dist.get_rank() == 0:
            parts = ((model.layers, plain.layers), (model.head, plain.head), (model.score, plain.score))
            found["part"] = [float((part(rows) - other(rows)).abs().max()) for part, other in parts]
    optimizer.zero_grad()
    sharded(rows).backward()  # and the training continues
    found["kinds"] = (is_sharded(sharded), is_sharded(model), all(value.is_meta for value in model.parameters()))
    gather(model, sharded, torch.device("cpu"))
    found["tied"] = model.tied.weight is model.head.weight
    found["apart"] = max(
        float((value - dict(plain.named_parameters())[name]).abs().max()) for name, value in model.named_parameters()
    )
    found["plain"] = all(type(value) is nn.Parameter for value in model.parameters())
    if dist.get_rank() == 0:  # nothing waits for another rank any more
        found["again"] = float((copy.deepcopy(model)(rows) - plain(rows)).abs())
        found["saved"] = sorted(model.state_dict())
        found["score"] = float((model.score(rows) - plain.score(rows)).abs().max())
    return found


class Uneven:
    """An evaluator that calls a part of the model, and on rank 1 more often than on rank 0."""

    name, primary_metric = "uneven", "sum"

    def __call__(self, model, step=0):
        total = sum(float(model.dual.encode_texts(["a red circle"]).sum()) for _ in range(1 + dist.get_rank()))
        return {"sum": total / (1 + dist.get_rank())}


@contextmanager
def launched(sharded: bool):
    """As torchrun starts a process; `sharded`: accelerate takes the CPU for an accelerator, where alone it shards."""
    import accelerate.state as state

    from mllm_vision.training.recipe import arguments

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    before, check, make = dict(os.environ), arguments.check_launch, state.AcceleratorState.__init__

    def disguised(self, *args, **kwargs):
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_XPU
        make(self, *args, **kwargs)

    os.environ.update(given)
    if sharded:
        state.AcceleratorState.__init__, arguments.check_launch = disguised, lambda arguments: None
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        state.AcceleratorState.__init__, arguments.check_launch = make, check
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


def through_the_trainer(folder, sharded, resume=None, embed_batch_size=None):
    """CLIP for three steps: parameters, what was logged, what kind of model it was in the middle and at the end."""
    from pairs_for_tests import make_objective
    from two_hosts_work import Pairs

    from mllm_vision.training.recipe.arguments import RecipeArguments
    from mllm_vision.training.trainer.objective_trainer import ObjectiveTrainer

    kinds = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kinds.append(is_sharded(model))

    with launched(sharded):
        arguments = RecipeArguments(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=4, max_steps=3, save_steps=2, weight_decay=0.1,
            # a large epsilon: without it AdamW makes whole steps out of the rounding of gradients that are zero
            learning_rate=1e-2, adam_epsilon=1e-3, lr_scheduler_type="constant", disable_tqdm=True, logging_steps=1,
            eval_strategy="steps", eval_steps=2, ddp_find_unused_parameters=False, embed_batch_size=embed_batch_size,
            **({"fsdp": True} if sharded else {}),
        )  # fmt: skip
        objective = make_objective("clip")
        trainer = ObjectiveTrainer(
            objective, arguments, train_dataset=Pairs(), evaluators=[Uneven()], callbacks=[Look()]
        )
        trainer.train(resume)
        names = ("loss", "grad_norm", "eval_uneven_sum")
        logs = [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]
        model = trainer.objective
        assert model is objective  # what a recipe saves
        return {
            "parameters": {name: value.detach().clone() for name, value in model.named_parameters()},
            "logs": logs,
            "kinds": kinds,
            "whole": not is_sharded(model) and all(type(value) is nn.Parameter for value in model.parameters()),
        }
