"""Upload a saved encoder, image-text pair or vision-language model to the Hugging Face Hub.

    python scripts/push_to_hub.py --model runs/quickstart/encoder --repo_id owner/name --private

The token comes from HF_TOKEN or the stored login (`hf auth login`). A model card is made from the run's
records, unless the directory has a README.md. --dry_run lists what would be uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mllm_vision.training import parse_recipe, run_recipe


@dataclass
class PushArguments:
    """Model and repository."""

    model: str = field(metadata={"help": "Folder of the saved model (the one that holds config.json)."})
    repo_id: str = field(metadata={"help": "owner/name on the Hub; created if missing."})
    private: bool | None = field(default=None, metadata={"help": "Create the repository as private (or public)."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; created if missing."})
    commit_message: str | None = field(default=None, metadata={"help": "By default the kind of model."})
    dry_run: bool = field(default=False, metadata={"help": "List the files and print the card; upload nothing."})


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_recipe(PushArguments, argv=argv, description=__doc__)

    from mllm_vision.hub.card import model_card
    from mllm_vision.hub.push import files_to_push, push_directory

    if options.dry_run:
        print(f"would upload to {options.repo_id}:")
        names = files_to_push(options.model)
        for name in names:
            print(f"  {name}  {(Path(options.model) / name).stat().st_size:,} bytes")
        if Path("README.md") not in names:
            print("  README.md, as follows\n\n" + model_card(options.model, name=options.repo_id))
        return
    address = push_directory(
        options.model,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        commit_message=options.commit_message,
    )
    print(address)


if __name__ == "__main__":
    run_recipe(main)
