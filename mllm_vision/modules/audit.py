"""Which parts of a model train, at which rate, and by hash which have moved."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mllm_vision.distributed import rank
from mllm_vision.hub.lineage import combined, tensor_digests
from mllm_vision.modules.momentum import MomentumTeacher

logger = logging.getLogger(__name__)

SAMPLE = 65_536  # values of a tensor that trains: any step moves some of so many
Parts = Mapping[str, Mapping[str, Tensor]]  # part -> its tensors by name


class ModuleAudit:
    """One row a part of the model: parameters, how many train and at which rate, hashes before and after.

    The first process alone hashes. A sample of a tensor that trains is enough to see that it moved.

    Args:
        parts: name -> the part's parameters by name; parts without any are left out.
        rates: name -> learning rate.
        rows: in place of those made of `rates`.
        prove: hash every byte of what is frozen, so that `problems` tells what moved and must not, and what did not
            move and should. At 0.15 to 2 GB/s a core and four tensors at a time.

    Attributes:
        rows: for `Run.record["modules"]`.
        problems: what does not hold, after `close`.

    Example:
        >>> part = nn.Linear(2, 1)
        >>> audit = ModuleAudit({"head": dict(part.named_parameters())}, {"head": 0.1})
        >>> _ = part.weight.data.zero_()
        >>> rows = audit.close()
        >>> [(row["group"], row["trainable"], row["moved"]) for row in rows]
        [('head', 3, True)]
    """

    def __init__(
        self,
        parts: Parts,
        rates: Mapping[str, float] | None = None,
        rows: Iterable[Mapping[str, Any]] | None = None,
        *,
        prove: bool = False,
    ) -> None:
        self._parts = {name: dict(tensors) for name, tensors in parts.items() if tensors}
        self.rows = [dict(row) for row in rows] if rows is not None else _rows(self._parts, rates or {})
        self.problems: list[str] = []
        self._prove = prove
        self._before = self._hashes(self._parts)
        self._zero = {name for name, tensors in self._parts.items() if any(map(_starts_at_zero, tensors.values()))}

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
                message = "%s is over ten times as large as the %s: the paper's is for wider ones; see --help all"
                logger.warning(message, part, name)

    def close(self, parts: Parts | None = None, steps: Any = None) -> list[dict[str, Any]]:
        """The rows with `sha256_before`, `sha256_after` and `moved`; on other processes than the first as they are.

        What trains has to move wherever it could: a run of a single step may have had a rate of 0 (a warm-up), or
        nothing but zeros in front of a part (LoRA's B, a last layer that starts at zero).

        Args:
            parts: as trained, where the tensors are not the same objects any more.
            steps: the trainer's `MovingSteps`, which says whether anything could move; without it everything could.
        """
        if rank() != 0:
            return self.rows
        after, self.problems = self._hashes(self._parts if parts is None else parts), []
        for row in self.rows:
            before, now = self._before[row["group"]], after[row["group"]]
            row["sha256_before"], row["sha256_after"] = before["all"], now["all"]
            row["moved"] = before["all"] != now["all"]
            if self._prove:
                self._judge(row, before, now, steps)
        return self.rows

    def check(self) -> None:
        """Raises ValueError if what was frozen moved or what should train did not. Call after saving."""
        if self.problems:
            raise ValueError("the freeze audit does not hold: " + "; ".join(self.problems))

    def __str__(self) -> str:
        return audit_table(self.rows)

    def _judge(self, row: dict[str, Any], before: Mapping[str, str], now: Mapping[str, str], steps: Any) -> None:
        if before["frozen"] != now["frozen"]:
            moved = f"{before['frozen'][:12]} -> {now['frozen'][:12]}"
            self.problems.append(f"{row['group']}: frozen weights moved ({moved})")
        if not row["trainable"] or before["trained"] != now["trained"]:
            return
        if why := self._could_not_move(row, steps):
            row["still"] = why
            logger.warning("%s did not move: %s", row["group"], why)
        else:
            self.problems.append(
                f"{row['group']}: {row['trainable']:,} trainable parameters did not move "
                f"(learning rate {row['learning_rate']:.3g}; a warm-up that never left zero does this too)"
            )

    def _could_not_move(self, row: Mapping[str, Any], steps: Any) -> str:
        """Why a part that trains had no way to move in so few steps; empty where it had one."""
        if steps is None or not row["learning_rate"] or steps.taken > 1:
            return ""
        if steps.moving == 0:
            return "the only step had a learning rate of 0, as a warm-up begins with"
        if self._zero - {row["group"]}:
            return "in its first step no gradient comes through weights that start at zero"
        return ""

    def _hashes(self, parts: Parts) -> dict[str, dict[str, str]]:
        """Part -> hashes of what is frozen, of what trains and of all of it."""
        if rank() != 0:
            return {}
        found, began, size = {}, time.monotonic(), 0
        for name, tensors in parts.items():
            trained = [(key, tensor) for key, tensor in tensors.items() if tensor.requires_grad]
            frozen = [(key, tensor) for key, tensor in tensors.items() if not tensor.requires_grad]
            size += sum(tensor.nbytes for _, tensor in frozen)
            digests = {
                "frozen": tensor_digests(frozen, at_most=None if self._prove else SAMPLE),
                "trained": tensor_digests(trained, at_most=SAMPLE),
            }
            digests["all"] = digests["frozen"] | digests["trained"]
            found[name] = {kind: combined(part) for kind, part in digests.items()}
        if self._prove:
            message = "freeze audit: %.2f GB of frozen weights hashed in %.1f s"
            logger.info(message, size / 1e9, time.monotonic() - began)
        return found


def audit_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The audit as a table for people; after `close` it says what moved."""
    rows = list(rows)
    decays = any("weight_decay" in row for row in rows)
    lines = [f"{'module':<16}{'parameters':>14}{'trainable':>14}{'learning rate':>15}" + f"{'decay':>9}" * decays]
    for row in rows:
        still = "follows" if row.get("follows") else "frozen"  # a teacher is moved by its student, not by a rate
        rate = f"{row['learning_rate']:.3g}" if row["trainable"] else still
        line = f"{row['group']:<16}{row['parameters']:>14,}{row['trainable']:>14,}{rate:>15}"
        if decays:
            line += f"{row['weight_decay']:>9.3g}" if row["trainable"] else f"{'':>9}"
        if "moved" in row:
            moved = "moved" if row["moved"] else "equal"
            line += f"   {row['sha256_before'][:12]} -> {row['sha256_after'][:12]} {moved}"
        lines.append(line)
    return "\n".join(lines)


def _rows(parts: Parts, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "group": name,
            "parameters": sum(value.numel() for value in tensors.values()),
            "trainable": sum(value.numel() for value in tensors.values() if value.requires_grad),
            "learning_rate": rates[name],
        }
        for name, tensors in parts.items()
    ]


def _starts_at_zero(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.ndim > 1 and not tensor.detach().any()
