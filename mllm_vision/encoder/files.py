"""Files of a model, in a local directory or on the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mllm_vision.errors import nearby


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a config (a JSON object), but contains a {type(value).__name__}")
    return value


class Source:
    """A directory or a Hub repository; files are downloaded one by one, as needed.

    Raises:
        FileNotFoundError: no such path or, on the first file, no such repository or revision.
    """

    def __init__(
        self, path_or_id: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> None:
        self.name = os.path.expanduser(os.fspath(path_or_id))
        self.revision, self.token = revision, token
        self.local = os.path.exists(self.name)
        self.directory: Path | None = Path(self.name) if self.local else None
        if self.local and not os.path.isdir(self.name):
            raise FileNotFoundError(f"{self.name} is a file; use the directory that contains config.json")
        if not self.local and (
            isinstance(path_or_id, os.PathLike) or self.name.startswith((".", "/")) or self.name.count("/") > 1
        ):
            hint = nearby(self.name)
            raise FileNotFoundError(f"{self.name} does not exist (and is not a Hub id of the form owner/name){hint}")

    def __str__(self) -> str:
        return self.name if self.revision is None or self.local else f"{self.name}@{self.revision}"

    def file(self, name: str, *, optional: bool = False) -> Any:
        """Local path of one file; None if it is `optional` and missing."""
        if self.directory is not None and self.local:
            path = self.directory / name
            if path.is_file():
                return path
            if optional:
                return None
            found = sorted(entry.name for entry in self.directory.iterdir())[:8]
            hint = ": a LoRA adapter, merge it into its base model first" if "adapter_config.json" in found else ""
            raise FileNotFoundError(
                f"{self.name} is not a transformers model directory: it has no {name}{hint} "
                f"(found {', '.join(found) or 'nothing'})"
            )
        return self._from_hub(name, optional)

    def folder(self, name: str) -> Path:
        """Local path of a whole folder inside."""
        if self.local or self.directory is None:
            return Path(self.name) / name
        from huggingface_hub import snapshot_download

        wanted = f"{name}/*"
        found = snapshot_download(self.name, revision=self.revision, token=self.token, allow_patterns=wanted)
        return Path(str(found)) / name

    def lineage(self) -> dict[str, Any] | None:
        """Content of lineage.json, its weight hash checked against the weights; None without one."""
        from mllm_vision.hub.lineage import check_lineage

        if self.file("lineage.json", optional=True) is None or self.directory is None:
            return None
        self.file("recipe.yaml", optional=True)
        return check_lineage(self.directory)

    def _from_hub(self, name: str, optional: bool) -> Path | None:
        import huggingface_hub.errors as hub
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(self.name, name, revision=self.revision, token=self.token))
        except hub.RemoteEntryNotFoundError:
            if optional:
                return None
            raise FileNotFoundError(f"{self} is not a transformers model repository: it has no {name}") from None
        except hub.LocalEntryNotFoundError as error:
            if optional:
                return None
            raise FileNotFoundError(
                f"{self} is neither a local directory nor in the local cache, and {name} cannot be downloaded from the "
                f"Hub (no connection, or HF_HUB_OFFLINE is set): {error}"
            ) from error
        except hub.GatedRepoError as error:
            raise PermissionError(
                f"{self} is gated: accept its terms on the Hub, then set HF_TOKEN or token="
            ) from error
        except hub.RevisionNotFoundError as error:
            raise FileNotFoundError(f"{self.name} has no revision {self.revision!r}") from error
        except hub.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self} is neither a local directory nor a repository this token may read; check the name, or set "
                "HF_TOKEN or pass token= if it is private"
            ) from error
        except hub.HFValidationError as error:
            raise FileNotFoundError(f"{self} is neither a local directory nor a Hub id: {error}") from error
        except hub.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise PermissionError(
                    f"the Hub refuses the token for {self} ({status}); set HF_TOKEN or token="
                ) from error
            raise ConnectionError(f"the Hub failed on {name} of {self}: {error}") from error
        if name == "config.json":
            # All files must come from one commit, even if the branch moves meanwhile.
            self.directory = path.parent
            self.revision = path.parent.name
        return path
