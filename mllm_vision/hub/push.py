"""Uploading a saved model (an encoder, an image-text pair, a vision-language model) to the Hub, all or nothing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_vision.hub.card import describe, model_card
from mllm_vision.hub.lineage import check_lineage

logger = logging.getLogger(__name__)

# Not part of a model: a training run's own files, and pickles.
LEFT_OUT = ("checkpoint-*", ".*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "run.json", "metrics.jsonl")
# Files of an earlier push that would speak of other weights if they stayed.
STALE = ("lineage.json", "recipe.yaml", "*.safetensors", "*.safetensors.index.json")


def files_to_push(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a saved model that go to the Hub, relative to `path`, sorted.

    Raises:
        FileNotFoundError: `path` is not a saved model; models inside it (a run folder) are named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory")
    if not (folder / "config.json").is_file():
        inside = sorted(str(file.parent) for file in folder.glob("*/config.json") if "checkpoint-" not in str(file))
        hint = f"; models inside it: {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{folder} is not a saved model: it has no config.json{hint}")
    if not list(folder.rglob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has no *.safetensors weights; save the model with save_pretrained")
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if not any(fnmatch(part, skip) for part in name.parts for skip in LEFT_OUT))


def push_directory(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    run: dict[str, Any] | None = None,
) -> str:
    """Upload a saved model in one commit, with a model card where it has no README.md of its own.

    The repository and the branch are created if needed. Weights and lineage of an earlier push that
    this one does not replace are removed in the same commit; any other file on the Hub stays.

    Args:
        path: what `save_pretrained` (of an encoder, a pair, a vision-language model) wrote.
        repo_id: `owner/name`, or `name` for the token's owner.
        token: with the right to write; None uses `HF_TOKEN` or the stored login.
        private: whether a new repository is private; None is the account's default. An existing one keeps its own.
        revision: branch to commit to.
        commit_message: None names the kind of model.
        run: the content of a run.json to draw the model card from; None looks beside and above `path`.

    Returns:
        str: the commit's address.

    Raises:
        FileNotFoundError: `path` is not a saved model.
        ValueError: weights that differ from what lineage.json says, an impossible `repo_id`.
        PermissionError: the Hub refuses the token.
        ConnectionError: the Hub is out of reach, or the upload broke; nothing of it is visible then.
    """
    # Not `upload_folder`: with hf_xet it commits in batches, and a broken upload would leave half a model visible.
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(path)
    names = files_to_push(folder)
    check_lineage(folder)
    api = HfApi(token=token)
    with _clear_errors(repo_id, f"nothing of this upload is visible on {revision or 'main'}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name.as_posix(), path_or_fileobj=folder / name) for name in names
        ]
        if Path("README.md") not in names:
            card = model_card(folder, name=repo_id, run=run)
            operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()))
        new = {operation.path_in_repo for operation in operations}
        for old in api.list_repo_files(repo_id, revision=revision):
            if old not in new and any(fnmatch(PurePosixPath(old).name, stale) for stale in STALE):
                operations.append(CommitOperationDelete(path_in_repo=old))
        message = commit_message or f"Upload {describe(json.loads((folder / 'config.json').read_text()))}"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    logger.info("%s is at %s", folder, commit.commit_url)
    return str(commit.commit_url)


def prepare_repository(
    repo_id: str, *, token: str | None = None, private: bool | None = None, state: str = "nothing was uploaded"
) -> str:
    """Create the repository if needed, with a token that may write to it; returns its full name.

    Args:
        repo_id: `owner/name`, or `name` for the token's owner.
        token, private: as for `push_directory`.
        state: what the error says of the run.

    Raises:
        ValueError: an impossible `repo_id`.
        PermissionError: no token, or one that may not write there.
        ConnectionError: the Hub is out of reach, or `HF_HUB_OFFLINE` is set.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        raise ConnectionError(f"HF_HUB_OFFLINE is set: cannot push to {repo_id}; unset it; {state}")
    api = HfApi(token=token)
    with _clear_errors(repo_id, state, "check of"):
        who = _who(api)
        access = (who.get("auth") or {}).get("accessToken") or {}
        reads_only = access.get("role") == "read"
        full = repo_id if reads_only else str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    if reads_only:
        raise PermissionError(
            f"the Hub token {access.get('displayName', '')!r} may only read: make one that may write to {repo_id} "
            f"(https://huggingface.co/settings/tokens) and set HF_TOKEN; {state}"
        )
    owner = full.partition("/")[0]
    groups = {group.get("name"): group.get("roleInOrg") for group in who.get("orgs") or []}
    classic = access.get("role") == "write"  # a fine-grained token may have been given a repository of others
    if classic and owner != who.get("name") and (owner not in groups or groups[owner] == "read"):
        known = ", ".join(str(name) for name in [who.get("name"), *groups])
        raise PermissionError(f"the Hub token is that of {known}, and may not write to {full}; {state}")
    return full


def _who(api: Any) -> dict[str, Any]:
    """Whose token it is; nothing where the Hub does not say (it limits how often one may ask, and mirrors differ)."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return dict(api.whoami())
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (404, 429):
            return {}
        raise


@contextmanager
def _clear_errors(repo_id: str, state: str, what: str = "upload to") -> Iterator[None]:
    """The Hub client's errors as few kinds, each with what happened to the upload and what to do."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id: {error}") from error
    except hub.LocalTokenNotFoundError as error:
        raise PermissionError(
            f"no Hub token to push to {repo_id} with: set HF_TOKEN, or log in (`hf auth login`); {state}"
        ) from error
    except hub.OfflineModeIsEnabled as error:
        raise ConnectionError(f"HF_HUB_OFFLINE is set: cannot push to {repo_id}; unset it; {state}") from error
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"the Hub refuses the token for {repo_id} ({status}): set HF_TOKEN, or pass token=, to one that may "
                f"write there; {state}"
            ) from error
        raise ConnectionError(f"the {what} {repo_id} failed ({_reason(error)}); {state}; try again") from error
    except Exception as error:
        # The client's transport (httpx in one version, httpx2 in the next) has exceptions of its own.
        transport = type(error).__module__.startswith("http") or isinstance(error, (OSError, RuntimeError))
        if isinstance(error, FileNotFoundError) or not transport:
            raise
        raise ConnectionError(f"the {what} {repo_id} broke off ({_reason(error)}); {state}; try again") from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    # The client wraps what happened to one file of many; the reason is one level below.
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return f"{line.rstrip('.')}: {_reason(cause)}" if cause is not None else line
