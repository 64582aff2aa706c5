"""`python -m mllm_vision <verb>`: the same as the command `mllm-vision <verb>`."""

import sys

from mllm_vision.cli import main

if __name__ == "__main__":
    sys.exit(main())
