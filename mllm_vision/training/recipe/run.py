"""The run folder: recipe.yaml, metrics.jsonl, run.json, and artifacts that carry their lineage."""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mllm_vision.data.records.columns import further_images
from mllm_vision.hub.lineage import hash_weights, plain, write_json, write_lineage
from mllm_vision.training.checkpoint.changed_flags import changed_flags, notes_before, notes_of, recipe_before
from mllm_vision.training.recipe import summary
from mllm_vision.training.recipe.arguments import RecipeArguments
from mllm_vision.training.recipe.ending import Ending, Failure, attempt
from mllm_vision.training.recipe.folders import check_name, clean, list_checkpoints, remove, whole_folder, write_whole
from mllm_vision.training.recipe.launch import limit_collectives
from mllm_vision.training.recipe.origins import describe_data, describe_parent
from mllm_vision.training.recipe.push import Push

logger = logging.getLogger(__name__)

KINDS = ("language_model", "stage_zero", "stage_one", "stage_two")


class Run:
    """One run in one folder. Only the main process writes; every process may call every method.

    Call `start` before the models are made: it sets the random seeds.

    Args:
        kind: "language_model", "stage_zero", "stage_one" or "stage_two".
        arguments: folder, seed, overwrite and resume.
        recipe: the resolved flags, from `recipe_dict`.

    Raises:
        ValueError: an unknown kind, or an `artifact_name` that is not a folder name.
    """

    def __init__(self, kind: str, arguments: RecipeArguments, recipe: Mapping[str, Any]) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
        if recipe.get("artifact_name") is not None:
            check_name(recipe["artifact_name"], "--artifact_name")
        self.arguments = arguments
        self.folder = Path(str(arguments.output_dir))
        self.is_main = arguments.process_index == 0
        self._started = time.monotonic()
        self.record: dict[str, Any] = {
            "schema": 1,
            "kind": kind,
            "name": arguments.run_name or self.folder.resolve().name,
            "command": summary.command_line(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": summary.machine(arguments.world_size),
            "versions": summary.versions(),
            "recipe": dict(recipe),
            "parents": [],
            "data": {},
            "modules": [],
            "history": [],
            "evaluations": {},
            "samples": [],
            "arrays": {},
            "bad_samples": {"count": 0, "examples": []},
            "verdict": "",
            "artifacts": [],
            "missing": [],
        }
        self.ending = Ending()
        self._begun = False
        self._changed: dict[str, tuple[Any, Any]] = {}  # flags of a resumed run
        self._changes: list[str] = []
        self.push = Push(arguments, self.record["name"])

    def start(self) -> Run:
        """Claim the folder, start logging, check a later push, set the seeds; returns the run.

        Raises:
            FileExistsError: the folder is not empty and neither --overwrite nor --resume was given.
            OSError: see `Push.check`.
        """
        from transformers import set_seed

        start_logging(self.arguments)
        limit_collectives(self.arguments.ddp_timeout)
        if self.is_main:
            self._claim()
            if not (self.folder / "recipe.yaml").is_file():  # an earlier run's stays until this one begins
                self._write_recipe(self.folder)
        self.push.start()
        if self.is_main:
            self.push.check()
        set_seed(self.arguments.seed)
        return self

    # ---- parents and data ----------------------------------------------------------------------------------

    def inherit(self, role: str, path_or_id: str) -> None:
        """Record a parent artifact ("encoder", "language_model", "vlm", "tokenizer") and log it.

        Raises:
            ValueError: the hash of the parent's weights differs from its lineage.
        """
        parent, note = describe_parent(role, path_or_id)
        self.record["parents"].append(parent)
        self._say("inherits %s from %s (%s)", role, path_or_id, note)

    def describe_data(self, role: str, dataset: Any, columns: Mapping[str, str] | None = None, **more: Any) -> None:
        """Record a data set ("train", "validation"...), see `origins.describe_data`; `more` are further facts."""
        entry = describe_data(dataset, columns or {})
        first = (columns or {}).get("image")
        if self.record["kind"] == "stage_zero" and (others := further_images(dataset, first)):
            entry["left_out"]["images behind the first of their row's list"] = others
            logger.warning("%s data: only the first image of a row is used; %d others are ignored", role, others)
        self.record["data"][role] = {**entry, **more}
        unused = entry["unused_columns"]
        note = f"; not used: {', '.join(unused)}"[:200] if unused else ""
        self._say("%s data: %s rows, columns %s%s", role, entry["rows"], entry["columns"] or "unchanged", note)

    def note_change(self, what: str, step: int) -> None:
        """Record a change from the step after `step` on, for the first lines of recipe.yaml."""
        self._changes.append(f"from step {step + 1} on {what}")

    def begin(self, step: int = 0) -> None:
        """Called when the training starts or continues after `step`: only now an overwritten run is removed."""
        if self._begun:
            return
        self._begun = True
        if self.is_main:
            if self.arguments.overwrite:
                self._clear()
            earlier = notes_before(self.folder, step) if self.arguments.resuming else []
            self._changes = [*earlier, *self._changes, *notes_of(self._changed, step)]
            if self._changes:
                self.record["changes"] = self._changes
            self._write_recipe(self.folder)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl and an entry to the history; only numbers are kept.

        A failed write is logged and does not end the training.
        """
        entry: dict[str, Any] = {"step": int(step)}
        for name, value in metrics.items():
            value = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                entry[name] = float(value) if math.isfinite(value) else None
        self.record["history"].append(entry)
        if not self.is_main:
            return
        try:
            self.begin()
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            logger.warning("metrics.jsonl could not be written (%s); the training continues", error)

    def rewind(self, step: int, *, evaluations: bool = False) -> None:
        """Drop the log after `step`, and with `evaluations` the evaluations of that step."""

        def stays(entry: Mapping[str, Any]) -> bool:
            again = evaluations and any(name.startswith("eval_") for name in entry)
            return entry["step"] < step or (entry["step"] == step and not again)

        kept = [entry for entry in self.record["history"] if stays(entry)]
        if len(kept) == len(self.record["history"]):
            return
        self.record["history"] = kept
        if self.is_main:
            lines = [json.dumps(entry) + "\n" for entry in self.record["history"]]
            write_whole(self.folder / "metrics.jsonl", "".join(lines))

    # ---- artifacts -----------------------------------------------------------------------------------------

    def save_artifact(self, save: Callable[[Path], Any], name: str, kind: str) -> Path:
        """Write the artifact `output_dir/name` whole or not at all, with recipe.yaml and lineage.json inside.

        Args:
            save: called with the empty folder to write to, e.g. `encoder.save_pretrained`.
            name: the artifact's folder in the run folder.
            kind: "encoder", "dual", "language_model", "vlm"...

        Raises:
            OSError: the disk is full; an earlier artifact of this name is kept.
        """
        from mllm_vision.training.checkpoint.signals import StopSignals

        final = self.folder / check_name(name, "artifact")
        self.begin()
        with StopSignals(f"{final} is written" if self.is_main else ""):  # a signal must not lose the model
            if self.is_main:
                with self._recorded_if_lost(name), whole_folder(final) as partial:
                    save(partial)
                    self._write_recipe(partial)
                    weights = hash_weights(partial)
                    write_lineage(partial, self._lineage(name, kind, weights))
                entry = {"name": name, "path": str(final), "kind": kind, "weights_sha256": weights}
                self.record["artifacts"] = [old for old in self.record["artifacts"] if old["name"] != name] + [entry]
            if self.arguments.world_size > 1:
                self.arguments.distributed_state.wait_for_everyone()
        return final

    def after_training(
        self,
        step: str,
        work: Callable[..., Any],
        *arguments: Any,
        everywhere: bool = False,
        severe: bool = False,
        remedy: str = "",
    ) -> Any:
        """The result of `work(*arguments)`, a step after the training; None where it fails, and the run continues.

        A failure is logged once, listed in run.json's `missing` and in the end table, and `finish` raises. While a
        step runs, run.json lists it as missing, in case the process is killed. Interrupts pass through.

        Args:
            step: its name in messages, e.g. "evaluation of knn".
            everywhere: the work contains collectives: every process runs it, and it failed if it failed on any.
                Otherwise only the main process runs it.
            severe: the run ends with the step's own error, once everything is written.
            remedy: how to repeat the step later.
        """
        if not (everywhere or self.is_main):
            return None
        if self.is_main and self.record["artifacts"]:
            attempt("run.json", self._write_record, step)
        result, error = attempt(step, work, *arguments, everywhere=everywhere)
        if error is not None:
            self.ending.note(Failure(step, error, remedy, severe))
        return result

    def weights_of(self, artifact: str | None) -> dict[str, Any]:
        """Name and hash of an artifact, for the figures measured on it."""
        known = [entry for entry in self.record["artifacts"] if entry["name"] == artifact]
        return {"artifact": artifact, "weights_sha256": known[0]["weights_sha256"]} if known else {}

    def finish(self, next: str = "", **extra: Any) -> None:
        """Complete the record with `extra`, push if requested, write run.json and lineages, print the end table.

        Args:
            next: the command of the next stage, with `{artifact}` for the first artifact; the last line of the table.

        Raises:
            Exception: the error of a severe step after the training.
            IncompleteRun: another step failed; `run_recipe` exits with 3.
        """
        self.record.update(extra)
        if next and self.record["artifacts"]:
            self.record["next"] = next.format(artifact=shlex.quote(self.record["artifacts"][0]["path"]))
        if self.is_main:
            self.after_training("verdict and lineage", self._close_lineages)
            for position, entry in enumerate(self.record["artifacts"] if self.push.wanted else []):
                target = self.push.target(position, entry)
                later = f"push it with: {self.push.command(entry, target)}"
                step = f"push of {entry['name']} to {target}"
                self.after_training(step, self.push.upload, entry, target, self.record, remedy=later)
            self._write_record()
            print(summary.end_table(self.record), flush=True)
        self.ending.close()

    # ---- inside --------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Create the folder, or refuse one with another run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"--output_dir {self.folder} is not a directory")
        present = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        visible = [name for name in present if not name.startswith(".")]
        if visible == ["recipe.yaml"]:  # of a start that was refused before its first step
            visible = []
        if self.arguments.resuming:
            clean(self.folder)
            before = recipe_before(self.folder, self.arguments.resume_from_checkpoint)
            self._changed = changed_flags(before, self.record["recipe"])
            for name, (old, now) in self._changed.items():
                logger.warning("resumed with another %s: %r, before %r", name, now, old)
        if visible and self.arguments.resuming:
            self._read_history()
        elif visible and not self.arguments.overwrite:
            raise FileExistsError(
                f"--output_dir {self.folder} already holds {', '.join(visible[:4])}{' ...' * (len(visible) > 4)}; "
                "--overwrite replaces that run, --resume continues it, or choose another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def _clear(self) -> None:
        """Remove the files of a run, and nothing else in the folder."""
        clean(self.folder)
        artifacts = [path for path in self.folder.iterdir() if (path / "lineage.json").is_file()]
        files = [self.folder / name for name in ("recipe.yaml", "metrics.jsonl", "run.json")]
        for path in [*list_checkpoints(self.folder), *artifacts, *files]:
            remove(path, self.folder)

    def _read_history(self) -> None:
        file = self.folder / "metrics.jsonl"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        for line in text.splitlines():
            try:
                self.record["history"].append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed process
                continue
        if text and not text.endswith("\n"):  # keep the next line apart from it
            write_whole(file, "".join(json.dumps(entry) + "\n" for entry in self.record["history"]))

    def _write_recipe(self, folder: Path) -> None:
        text = yaml.safe_dump(plain(self.record["recipe"]), sort_keys=False, allow_unicode=True)
        write_whole(folder / "recipe.yaml", "".join(f"# {line}\n" for line in self._changes) + text)

    def _lineage(self, name: str, kind: str, weights: str) -> dict[str, Any]:
        kept = ("started", "command", "versions", "machine", "parents", "data", "evaluations", "modules", "verdict")
        history = self.record["history"]
        return {
            "schema": 1,
            "kind": kind,
            "name": name,
            "stage": self.record["kind"],
            "run": self.record["name"],
            "weights_sha256": weights,
            "seed": self.arguments.seed,
            "steps": history[-1]["step"] if history else 0,
            "seconds": round(time.monotonic() - self._started, 1),
            **{key: self.record[key] for key in (*kept, "artifact_is", "method") if key in self.record},
        }

    @contextmanager
    def _recorded_if_lost(self, name: str) -> Iterator[None]:
        """An artifact that cannot be written ends the run; run.json lists it with the others."""
        try:
            yield
        except Exception as error:
            self.ending.note(Failure(f"artifact {name}", error, severe=True))
            if self.record["artifacts"]:
                attempt("run.json", self._write_record)
            raise

    def _close_lineages(self) -> None:
        self.record["verdict"] = self.record["verdict"] or summary.verdict(self.record["evaluations"])
        for entry in self.record["artifacts"]:
            write_lineage(entry["path"], self._lineage(entry["name"], entry["kind"], entry["weights_sha256"]))

    def _write_record(self, pending: str = "") -> None:
        """Write run.json; a `pending` step counts as missing until it is over."""
        self.record["seconds"] = round(time.monotonic() - self._started, 1)
        missing = [failure.entry() for failure in self.ending.failures]
        self.record["missing"] = missing
        running = [{"step": pending, "cause": "the run ended during this step"}] if pending else []
        write_json(self.folder / "run.json", {**self.record, "missing": [*missing, *running]})

    def _say(self, message: str, *values: Any) -> None:
        if self.is_main:
            logger.info(message, *values)


def start_logging(arguments: RecipeArguments) -> None:
    """Set the level of `--log_level`; existing handlers are kept."""
    from transformers.utils.logging import disable_progress_bar

    passive = arguments.log_level == "passive" and arguments.should_log
    level = logging.INFO if passive else arguments.get_process_log_level()
    if not logging.getLogger().handlers:  # run as a program
        logging.basicConfig(level=level, format="%(message)s")
        for noisy in ("httpx", "httpx2", "httpcore", "filelock", "fsspec", "PIL", "matplotlib", "datasets"):
            logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    if not passive:
        logging.getLogger("mllm_vision").setLevel(level)
    disable_progress_bar()  # one per file that transformers reads or writes
