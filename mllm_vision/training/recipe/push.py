"""`--push_to_hub`: checks before the training, the upload after it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from typing import Any

from mllm_vision.training.recipe.arguments import RecipeArguments

logger = logging.getLogger(__name__)


class Push:
    """Repositories of a run's artifacts on the Hub.

    Args:
        arguments: whether and where to push.
        name: of the run; the default of `--hub_model_id`.
    """

    def __init__(self, arguments: RecipeArguments, name: str) -> None:
        self.wanted = bool(arguments.push_to_hub)
        self.base = arguments.hub_model_id or name
        self.settings: dict[str, Any] = {
            "token": arguments.hub_token,
            "private": arguments.hub_private_repo,
            "revision": arguments.hub_revision,
        }
        self._arguments = arguments

    def start(self) -> None:
        """Clear the flags: the Trainer would push each checkpoint and write the token into it."""
        self._arguments.push_to_hub, self._arguments.hub_token = False, None

    def check(self) -> None:
        """Create the repository, so that a token without permission fails before the training.

        Raises:
            PermissionError: no token, or one without write access.
            ConnectionError: the Hub cannot be reached, or `HF_HUB_OFFLINE` is set.
            ValueError: an invalid name.
        """
        if not self.wanted:
            return
        from mllm_vision.hub.push import prepare_repository

        state = "nothing was trained; leave --push_to_hub out and push later with scripts/push_to_hub.py"
        settings = {key: value for key, value in self.settings.items() if key != "revision"}
        self.base = prepare_repository(self.base, state=state, **settings)

    def target(self, position: int, artifact: Mapping[str, Any]) -> str:
        """Repository of an artifact: the base name, with the artifact's name appended from the second one on."""
        return self.base if position == 0 else f"{self.base}-{artifact['name']}"

    def command(self, artifact: Mapping[str, Any], target: str) -> str:
        """The command that pushes the artifact later."""
        command = ["python", "scripts/push_to_hub.py", "--model", str(artifact["path"]), "--repo_id", target]
        if self.settings["private"] is not None:
            command += ["--private", str(self.settings["private"]).lower()]
        if self.settings["revision"]:
            command += ["--revision", str(self.settings["revision"])]
        return shlex.join(command)

    def upload(self, artifact: Mapping[str, Any], target: str, record: Mapping[str, Any]) -> None:
        """Push one artifact with a card made from the run's record."""
        from mllm_vision.hub.push import push_directory

        push_directory(artifact["path"], target, run=dict(record), **self.settings)
        logger.info("pushed %s to %s", artifact["path"], target)
