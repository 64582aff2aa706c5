"""Data and optimizer of a checkpoint against those of this start: what takes effect, what is refused."""

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

ROWS = 512  # of a large data set, compared, evenly spread
_KNOWN = ("initial_lr", "weight_decay", "betas", "eps", "momentum")  # compared where a checkpoint has no settings


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
        except Exception as error:  # counted when it is trained on
            total.update(type(error).__name__.encode())
    _add(total, getattr(dataset, "labels", None))
    return {"rows": rows, "sha256": total.hexdigest()[:16]}


def _add(total: Any, value: Any) -> None:
    """Add a value of a row to the hash; a file by its name and size, so that a copy counts as the same."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            if key == "path" and value.get("bytes") is not None:
                continue  # the former path of an embedded image
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
    """The difference to the rows that the run was trained on, or None.

    Raises:
        ValueError: they differ, and `accept` is false.
    """
    if not before or {key: before.get(key) for key in now} == dict(now):
        return None
    difference = f"{before.get('rows')} rows then, {now.get('rows')} now"
    if before.get("rows") == now.get("rows"):
        difference = f"{now.get('rows')} rows as before, with other contents"
    if not accept:
        raise ValueError(
            f"--resume: the training data differ from those the run was trained on ({difference}). Restore them, "
            "continue with these by --accept_changed_data (at the same row of the epoch), or start from scratch in "
            "another --output_dir"
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
    """Compare the optimizer with the one whose state a checkpoint contains.

    Raises:
        ValueError: another optimizer or schedule, other parameters or groups.
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
            f"learning rate or weight decay of one part): {remedy}"
        )


def apply_settings(optimizer: Any, scheduler: Any, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """After loading a checkpoint: apply the settings that were changed, and no others.

    Args:
        optimizer: with the checkpoint's state and settings.
        scheduler: likewise.
        before: the settings the run was started with, where the checkpoint contains them.
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
                f"--resume with another learning rate: {type(scheduler).__name__} keeps its rate in the "
                "checkpoint; leave the rate unchanged, or start from scratch in another --output_dir"
            )
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for number, group in enumerate(optimizer.param_groups):  # bit-equal where nothing changed
        group["lr"] = scheduler.base_lrs[number] * scheduler.lr_lambdas[number](scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
