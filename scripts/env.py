"""Print versions, machine and environment for a bug report.

python scripts/env.py
"""

from __future__ import annotations

import importlib.util
import os

from mllm_vision.training.recipe.summary import machine, versions


def main() -> None:
    facts: dict[str, object] = {**versions(), **machine()}
    facts["torchvision"] = "present" if importlib.util.find_spec("torchvision") else "absent (not needed)"
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            facts[name] = os.environ[name]
    facts["HF_TOKEN"] = "set" if os.environ.get("HF_TOKEN") else "not set"
    width = max(map(len, facts))
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
