"""Stage zero's audit: which parts train, at which rate, and by hash which have moved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mllm_vision.distributed import rank
from mllm_vision.hub.lineage import combined, tensor_digests
from mllm_vision.modules.momentum import MomentumTeacher
from mllm_vision.vlm.freezing import SAMPLE, audit_table

logger = logging.getLogger(__name__)


class ModuleAudit:
    """One row a part of the model: parameters, how many train and at which rate, hashes before and after.

    Stages one and two have their own (`vlm.freezing`), which also proves what must not move.

    Args:
        parts: name -> the part's parameters by name; parts without any are left out.
        rates: name -> learning rate.

    Attributes:
        rows: for `Run.record["modules"]`.

    Example:
        >>> part = nn.Linear(2, 1)
        >>> audit = ModuleAudit({"head": dict(part.named_parameters())}, {"head": 0.1})
        >>> _ = part.weight.data.zero_()
        >>> audit.close()
        >>> [(row["group"], row["trainable"], row["moved"]) for row in audit.rows]
        [('head', 3, True)]
    """

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]], rates: Mapping[str, float]) -> None:
        self._parts = {name: dict(parameters) for name, parameters in parts.items() if parameters}
        self.rows: list[dict[str, Any]] = [
            {
                "group": name,
                "parameters": sum(value.numel() for value in parameters.values()),
                "trainable": sum(value.numel() for value in parameters.values() if value.requires_grad),
                "learning_rate": rates[name],
                "sha256_before": _hash(parameters),
            }
            for name, parameters in self._parts.items()
        ]

    @classmethod
    def of_children(cls, module: nn.Module, rates: Mapping[str, float | None], default: float) -> ModuleAudit:
        """An audit of a module's children, those that `rates` does not name at the `default` rate.

        A momentum teacher has no gradient and moves all the same: its row says that it `follows`.
        """
        children = dict(module.named_children())
        parts = {name: dict(child.named_parameters()) for name, child in children.items()}
        audit = cls(parts, {name: rates.get(name) or default for name in parts})
        for row in audit.rows:
            if isinstance(children[row["group"]], MomentumTeacher):
                row["follows"] = True
        return audit

    def warn_of_heavy(self, name: str) -> None:
        """A warning for each part that trains and has more than ten times the parameters of the part called `name`."""
        sizes = {row["group"]: row["parameters"] for row in self.rows if row["trainable"]}
        for part, size in sizes.items():
            if size > 10 * sizes.get(name, size):
                told = "%s is over ten times as large as the %s: the paper's is for wider ones; --help names its widths"
                logger.warning(told, part, name)

    def close(self) -> None:
        """Adds the hashes of now, and whether each part has moved."""
        for row in self.rows:
            row["sha256_after"] = _hash(self._parts[row["group"]])
            row["moved"] = row["sha256_before"] != row["sha256_after"]

    def __str__(self) -> str:
        return audit_table(self.rows)


def _hash(parameters: Mapping[str, Tensor]) -> str:
    """Of a sample of each tensor, which any step moves, on the first process; nothing is to be proven frozen here."""
    return combined(tensor_digests(parameters.items(), at_most=SAMPLE)) if rank() == 0 else ""
