"""Many processes: what is refused before they start, and how they all end when one of them dies.

A collective waits for every rank. When a rank is killed, or its host goes, the others would wait for the collective's
timeout (half an hour by default) and then end with an error that names no cause. `RankWatch` lets every rank leave a
sign of life in the store that the launcher already keeps; within `PATIENCE` seconds of silence all ranks end, each
with one line that says which rank was lost. torch is imported only where it is needed: recipes import this file.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds without a sign of life after which a rank counts as dead
INTERVAL = 2.0  # seconds between two signs of life
EXIT_CODE = 75  # of a rank that ends because another one died ("temporary failure": start again with --resume)
SWITCH = "MLLM_VISION_RANK_TIMEOUT"  # PATIENCE in seconds, 0 turns the watch off
_watch: RankWatch | None = None


# ---- before the start ----------------------------------------------------------------------------------------


def check_launch(arguments: Any) -> None:
    """Refuses ways to start that would quietly do something else.

    Args:
        arguments: the `TrainingArguments` as given; `fsdp`, `fsdp_config` and `use_cpu` are read, and what
            `accelerate launch` put into the environment.

    Raises:
        ValueError: FSDP on a CPU (accelerate would train with DDP, every rank holding the whole model), FSDP
            version 1, sharded checkpoints.
    """
    word = str(arguments.fsdp or False).lower()
    if word in ("true", "false"):  # on a command line a switch is a word, which the Trainer takes for an old option
        arguments.fsdp = word == "true" or None
    by_flag = bool(arguments.fsdp)
    by_launcher = _is_true("ACCELERATE_USE_FSDP")
    if not by_flag and not by_launcher:
        return
    asked = f"--fsdp {arguments.fsdp}" if by_flag else "the accelerate config (distributed_type: FSDP)"
    if arguments.use_cpu or _is_true("ACCELERATE_USE_CPU") or not _has_accelerator():
        why = "--use_cpu is set" if arguments.use_cpu else "this process has no accelerator"
        raise ValueError(
            f"{asked} asks for FSDP, but {why}: on a CPU it would silently be DDP, the whole model on every process. "
            "Leave FSDP out (torchrun alone gives DDP), or start on GPUs"
        )
    given = arguments.fsdp_config or {}
    if isinstance(given, str):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    version = given.get("fsdp_version", given.get("version", os.environ.get("FSDP_VERSION", 2)))
    if int(version) != 2:
        raise ValueError(
            f"{asked}: fsdp_version {version} flattens the parameters, which breaks learning rates and weight decay "
            "per module; use fsdp_version 2"
        )
    usual = "FULL_STATE_DICT" if by_flag else os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if given.get("fsdp_state_dict_type", given.get("state_dict_type", usual)).upper() == "SHARDED_STATE_DICT":
        raise ValueError(f"{asked}: checkpoints here are whole files; set fsdp_state_dict_type: FULL_STATE_DICT")


def check_joined(arguments: Any) -> None:
    """Refuses a job whose processes would not know of each other.

    Args:
        arguments: the `TrainingArguments` as constructed.

    Raises:
        ValueError: the launcher started several processes and this one takes itself for the only one. On a machine
            without accelerator that is what happens without `--use_cpu`: every process would train, and write, alone.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and arguments.world_size == 1:
        raise ValueError(
            f"the launcher started {started} processes, but each would train by itself: no accelerator was found; "
            "add --use_cpu to train them together on the CPU"
        )


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _has_accelerator() -> bool:
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return kind is not None and kind.type not in ("cpu", "mps")


# ---- while it runs -------------------------------------------------------------------------------------------


def watch_ranks(collective_timeout: float | None = None) -> RankWatch | None:
    """Starts this process's `RankWatch` when it is one of several; a second call changes nothing.

    To be called after the process group is there, on every rank. On an error that nobody catches the other ranks
    are told what it was.

    Args:
        collective_timeout: seconds that gloo waits in a collective. The Trainer hands `ddp_timeout` to NCCL only.

    Returns:
        The watch, or None: one process, no store to meet at (`MASTER_ADDR`), or `MLLM_VISION_RANK_TIMEOUT=0`.

    Raises:
        ValueError: `MLLM_VISION_RANK_TIMEOUT` is no number, or below 3 intervals.
    """
    global _watch
    patience = _patience()
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    if collective_timeout is not None and dist.get_backend() == "gloo":
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=collective_timeout))
    if _watch is not None and _watch.process == os.getpid():
        return _watch
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if patience == 0 or not address or not port:
        return None
    client = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=patience))
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(f"mllm_vision/watch/{start}", client)
    _watch = RankWatch(store, dist.get_rank(), dist.get_world_size(), patience=patience, place=f"{address}:{port}")
    _watch.keeps_store = dist.get_rank() == 0 and not _is_true("TORCHELASTIC_USE_AGENT_STORE")
    _watch.start()
    atexit.register(_watch.leave)
    usual = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        usual(kind, error, trace)
        tell_failure(error)

    sys.excepthook = told
    return _watch


def tell_failure(error: BaseException) -> None:
    """Tells the other ranks why this one ends; does nothing where no watch runs.

    An error of a collective is only what a death looks like from here: then this waits for the watch to say whose.
    """
    if _watch is None or _watch.process != os.getpid() or isinstance(error, KeyboardInterrupt):
        return
    if is_collective_error(error):
        print("a collective failed; waiting to learn which rank is lost ...", file=sys.stderr, flush=True)
        _watch.wait_for_verdict()
    first = (str(error).strip().splitlines() or [""])[0]
    _watch.fail(f"{type(error).__name__}: {first[:300]}")


def is_collective_error(error: BaseException) -> bool:
    """Whether an error says that the connection to another rank broke."""
    names = {base.__name__ for base in type(error).__mro__}
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "gloo", "nccl", "socket", "broken pipe")
    return "DistError" in names or ("RuntimeError" in names and any(sign in text for sign in signs))


def _patience() -> float:
    text = os.environ.get(SWITCH, "").strip()
    try:
        patience = float(text) if text else PATIENCE
    except ValueError:
        raise ValueError(f"{SWITCH}={text!r} is no number of seconds") from None
    if patience and patience < 3 * INTERVAL:
        least = 3 * INTERVAL
        raise ValueError(f"{SWITCH}={text} is below {least:g} s: a busy rank would count as dead; 0 turns it off")
    return patience


class RankWatch:
    """Signs of life of all ranks in one store, and the end of this rank when another one is lost.

    Every rank writes its sign every `interval` seconds. Rank 0 reads all of them, the others read rank 0's and the
    verdict, so that the traffic grows with the number of ranks, not with its square. A rank's sign says "alive",
    "done" (it left in good order) or "failed" with the reason.

    Args:
        store: a `torch.distributed` store of its own (the operations of a shared one may block behind each other).
        rank: of this process.
        world_size: number of ranks.
        patience: seconds of silence after which a rank, or the store, counts as lost.
        interval: seconds between two signs.
        end: called once with the message when a rank is lost; by default it is printed and the process ends with
            `EXIT_CODE`, also where the main thread hangs in a collective.
        place: where the store is, for messages.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        patience: float = PATIENCE,
        interval: float = INTERVAL,
        end: Callable[[str], None] | None = None,
        place: str = "the launcher's address",
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.patience, self.interval, self.place = patience, interval, place
        self.end = end or _end_process
        self.process = os.getpid()
        self.keeps_store = False
        self.verdict: str | None = None
        self._state, self._why, self._count = "alive", "", 0
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._contact = time.monotonic()
        self._wake, self._stopped, self._said = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Leaves the first sign and starts the two threads: one talks to the store, one watches that it can."""
        self._leave_sign()
        self._contact = time.monotonic()
        for work in (self._talk, self._guard):
            threading.Thread(target=work, daemon=True, name=f"rank-watch-{work.__name__}").start()

    def fail(self, why: str) -> None:
        """Tells the others that this rank ends with an error."""
        self._close("failed", why)

    def leave(self) -> None:
        """Tells the others that this rank ends in good order. The keeper of the store waits until they know."""
        if os.getpid() != self.process or self._state != "alive":
            return
        self._close("done", "")
        limit = time.monotonic() + 2.5 * self.interval
        while self.keeps_store and time.monotonic() < limit and not self._all_gone():
            time.sleep(self.interval / 10)

    def wait_for_verdict(self) -> str | None:
        """Blocks until a rank is known to be lost, at most as long as that can take."""
        self._said.wait(self.patience + 3 * self.interval)
        return self.verdict

    # ---- inside --------------------------------------------------------------------------------------------

    def _close(self, state: str, why: str) -> None:
        if self._state != "alive":
            return
        self._state, self._why = state, why
        self._wake.set()
        self._stopped.wait(min(self.patience, 3.0))

    def _talk(self) -> None:
        try:
            while True:
                state = self._state
                self._leave_sign()
                if state == "alive":
                    self._look_around()
                self._contact = time.monotonic()
                if state != "alive" or self.verdict is not None:
                    return
                self._wake.wait(self.interval)
        except Exception as error:  # whatever the store raises when its host has gone
            # the keeper of the store left in good order: what is still to do here needs no other rank
            if self._state == "alive" and self._known(0).get("state") != "done":
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._judge(f"the store at {self.place} has gone ({first[:120]}): the host or launcher of rank 0 died")
        finally:
            self._stopped.set()

    def _guard(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self.interval / 2):
            now = time.monotonic()
            if now - last > max(3 * self.interval, self.patience / 2):  # we slept ourselves: nobody else is to blame
                self._contact = now
                self._seen = {rank: (sign, now) for rank, (sign, _) in self._seen.items()}
            last = now
            if self._state == "alive" and now - self._contact > self.patience:
                self._judge(
                    f"the store at {self.place} has not answered for {self.patience:g} s: "
                    "the host of rank 0 is off, or the network between is cut"
                )
                return

    def _leave_sign(self) -> None:
        self._count += 1
        sign = {"count": self._count, "state": self._state, "why": self._why}
        sign |= {"host": socket.gethostname(), "process": self.process}
        self.store.set(f"sign/{self.rank}", json.dumps(sign))

    def _look_around(self) -> None:
        ranks = [rank for rank in range(self.world_size) if rank != self.rank] if self.rank == 0 else [0]
        for rank, sign in self._read(ranks).items():
            before, since = self._seen.get(rank, ({}, time.monotonic()))
            fresh = sign.get("count") != before.get("count")
            self._seen[rank] = (sign, time.monotonic() if fresh else since)
            if sign.get("state") == "failed":
                self._judge(f"{self._name(rank)} ended with an error: {sign['why']}", tell=True)
            elif sign.get("state") != "done" and time.monotonic() - self._seen[rank][1] > self.patience:
                self._judge(
                    f"{self._name(rank)} has shown no sign of life for {self.patience:g} s: it was killed, "
                    "or its host is off or cut off",
                    tell=True,
                )
        if self.rank and self.store.check(["verdict"]):
            self._judge(self.store.get("verdict").decode())

    def _read(self, ranks: list[int]) -> dict[int, dict[str, Any]]:
        """The signs of `ranks`; a rank that left none yet has an empty one."""
        keys = {rank: f"sign/{rank}" for rank in ranks}
        if not all(rank in self._seen and self._seen[rank][0] for rank in ranks):  # asking for a missing key blocks
            present = [rank for rank in ranks if self.store.check([keys[rank]])]
        else:
            present = ranks
        found = dict(zip(present, self.store.multi_get([keys[rank] for rank in present]) if present else []))
        return {rank: json.loads(found[rank]) if rank in found else {} for rank in ranks}

    def _known(self, rank: int) -> dict[str, Any]:
        return self._seen.get(rank, ({}, 0.0))[0]

    def _name(self, rank: int) -> str:
        sign = self._known(rank)
        where = f" (host {sign['host']}, process {sign['process']})" if sign else ""
        return f"rank {rank} of {self.world_size}{where}"

    def _all_gone(self) -> bool:
        try:
            others = self._read([rank for rank in range(self.world_size) if rank != self.rank])
        except Exception:  # nobody left to ask
            return True
        return all(sign.get("state", "alive") != "alive" for sign in others.values())

    def _judge(self, message: str, *, tell: bool = False) -> None:
        with self._lock:
            if self.verdict is not None or self._state != "alive":
                return
            self.verdict = message
        if tell:
            try:
                self.store.set("verdict", message)
                time.sleep(min(self.interval, 0.5))  # the store may live in this very process: let the others read
            except Exception:  # the others find out for themselves
                logger.debug("the verdict could not be left in the store", exc_info=True)
        self._said.set()
        self.end(
            f"error: {message}. Rank {self.rank} (host {socket.gethostname()}) ends too; what was saved stays: "
            "start again with --resume"
        )


def _end_process(message: str) -> None:
    # the main thread may hang in a collective and hold every lock: neither print nor sys.exit would get through
    os.write(2, (message + "\n").encode())
    os._exit(EXIT_CODE)
