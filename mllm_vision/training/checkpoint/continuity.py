"""The data and the optimizer of a checkpoint against those of this start: what takes effect, what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import has_length

from mllm_vision.data.streams.streams import StreamDataset
from mllm_vision.training.optim.optimizers import plain_name

logger = logging.getLogger(__name__)

ROWS = 512  # of a large data set, that many rows are compared, evenly spread
_KNOWN = ("initial_lr", "weight_decay", "betas", "eps", "momentum")  # in checkpoints without that file


# ---- data ----------------------------------------------------------------------------------------------------


def data_identity(dataset: Any) -> dict[str, Any]:
    """Number of rows, and a hash of the rows themselves, wherever they are stored.

    At most `ROWS` rows are read, evenly spread; of an image in a file of its own, name and size; of a stream, the
    names and sizes of its shards.
    """
    rows = len(dataset) if has_length(dataset) else None
    total = hashlib.sha256()
    if isinstance(dataset, StreamDataset):
        for shard in (shard for source in dataset.stream.sources for shard in source.shards):
            size = Path(shard.path).stat().st_size if shard.local and Path(shard.path).is_file() else None
            total.update(f"{shard.name} {size}\n".encode())
        return {"rows": rows, "sha256": total.hexdigest()[:16]}
    records: Any = getattr(dataset, "records", getattr(dataset, "blocks", None))
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        return {"rows": rows}
    count = len(records)
    for index in sorted({number * count // ROWS for number in range(ROWS)} if count > ROWS else range(count)):
        try:
            _add(total, records[index])
        except Exception as error:  # a row that cannot be read is counted when it is trained on
            total.update(type(error).__name__.encode())
    _add(total, getattr(dataset, "labels", None))
    return {"rows": rows, "sha256": total.hexdigest()[:16]}


def _add(total: Any, value: Any) -> None:
    """Add a value of a row to the hash; a file by its name and size, so that a copy elsewhere is the same."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            if key == "path" and value.get("bytes") is not None:
                continue  # where an image that is here in full once was
            total.update(f"{key}:".encode())
            _add(total, value[key])
    elif isinstance(value, (list, tuple)):
        total.update(f"[{len(value)}".encode())
        for each in value:
            _add(total, each)
    elif isinstance(value, bytes):
        total.update(value)
    elif isinstance(value, str) and value.startswith("/") and Path(value).is_file():
        total.update(f"{Path(value).name} {Path(value).stat().st_size}".encode())
    elif isinstance(value, torch.Tensor):
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # arrays, images
        total.update(value.tobytes())
    elif value is None or isinstance(value, (str, int, float)):
        total.update(f"{value!r};".encode())
    else:
        total.update(type(value).__name__.encode())


def check_data(before: Mapping[str, Any] | None, now: Mapping[str, Any], accept: bool) -> str | None:
    """What differs from the rows that the run was trained on, or None.

    Raises:
        ValueError: they differ, and `accept` is false.
    """
    if not before or {key: before.get(key) for key in now} == dict(now):
        return None
    difference = f"{before.get('rows')} rows then, {now.get('rows')} now"
    if before.get("rows") == now.get("rows"):
        difference = f"{now.get('rows')} rows as before, of other contents"
    if not accept:
        raise ValueError(
            f"--resume: the training data are not those the run was trained on ({difference}). Restore them; or "
            "continue with these by --accept_changed_data, at the same number of rows into the epoch; or start from "
            "scratch in another --output_dir"
        )
    logger.warning("resumed with other training data (%s), as accepted", difference)
    return f"training data: {difference}"


# ---- optimizer and schedule ----------------------------------------------------------------------------------


def settings_of(optimizer: Any, scheduler: Any, model: Any) -> dict[str, Any]:
    """Kind, groups and order of parameters of an optimizer, and its schedule's peaks, for JSON."""
    inner = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    order = [[names.get(id(parameter), "?") for parameter in group["params"]] for group in optimizer.param_groups]
    groups = [
        {"initial_lr": group["lr"], **{key: value for key, value in group.items() if key not in ("params", "lr")}}
        for group in optimizer.param_groups
    ]
    described = {
        "optimizer": type(inner).__name__,
        "scheduler": type(scheduler).__name__,
        "parameters": hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16],
        "groups": groups,
    }
    return _json(described)


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """Compare with what a checkpoint holds the state of.

    Raises:
        ValueError: another kind of optimizer, other parameters or groups, or another schedule that keeps a state.
    """
    remedy = "resume with the flags of the run's recipe.yaml, or start from scratch in another --output_dir"
    for name, what in (("optimizer", "--optim"), ("scheduler", "--lr_scheduler_type")):
        if before[name] != now[name]:
            raise ValueError(
                f"{checkpoint} holds the state of {before[name]}, and {what} asks for {now[name]}: {remedy}"
            )
    if before["parameters"] != now["parameters"]:
        raise ValueError(
            f"the parameters that train, or the groups they are in, are not those of {checkpoint} "
            f"({len(before['groups'])} groups there, {len(now['groups'])} here: what is frozen, layer_decay, or a "
            f"learning rate of one part): {remedy}"
        )


def apply_settings(optimizer: Any, scheduler: Any, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """After a checkpoint was loaded: what was given another value takes effect, the rest stays untouched.

    Args:
        optimizer: with the checkpoint's state; its groups have the rates and settings it was saved with.
        scheduler: likewise.
        before: the settings the run was started with; None where the checkpoint does not say.
        now: those of this start.

    Raises:
        ValueError: another learning rate for a schedule that keeps the rate in its state.
    """
    rates = False
    for number, (group, given) in enumerate(zip(optimizer.param_groups, now["groups"], strict=True)):
        old = before["groups"][number] if before else {key: _json(group[key]) for key in _KNOWN if key in group}
        for key, value in given.items():
            if key in old and old[key] != value:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
                rates = rates or key == "initial_lr"
    if not isinstance(scheduler, LambdaLR):
        if rates:
            raise ValueError(
                f"--resume with another learning rate: {type(scheduler).__name__} keeps the rate it has come to in the "
                "checkpoint; leave the rate as it was, or start from scratch in another --output_dir"
            )
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for number, group in enumerate(optimizer.param_groups):  # the same bits where nothing was changed
        group["lr"] = scheduler.base_lrs[number] * scheduler.lr_lambdas[number](scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
