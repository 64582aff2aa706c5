"""Ask a vision-language model about an image, once or in a dialogue.

    python scripts/chat.py --model runs/quickstart/instruct --image image.png --question "what colour is the circle?"

Several questions are asked one after the other, as one dialogue. Without --question it reads them from the
terminal; an empty line, "exit" or Ctrl-D ends it. --model accepts any LLaVA checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mllm_vision.errors import nearby
from mllm_vision.training import parse_recipe, run_recipe


@dataclass
class ChatArguments:
    """Model, image and questions."""

    model: str = field(metadata={"help": "Folder (or Hub id) of a LLaVA checkpoint."})
    image: str = field(metadata={"help": "File of the image."})
    question: list[str] | None = field(
        default=None, metadata={"help": "One or more questions; without it, a dialogue."}
    )
    max_new_tokens: int = field(default=60, metadata={"help": "Length limit of an answer, in tokens."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, ...; default: the accelerator where there is one."}
    )


def typed_questions() -> Iterator[str]:
    """Lines of the terminal until an empty one, "exit" or the end."""
    prompt = "you: " if sys.stdin.isatty() else ""
    print(prompt, end="", flush=True)
    for line in sys.stdin:
        question = line.strip()
        if not question or question.lower() in ("exit", "quit"):
            return
        yield question
        print(prompt, end="", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_recipe(ChatArguments, argv=argv, description=__doc__)
    if not Path(options.image).is_file():
        raise FileNotFoundError(f"--image {options.image}: no such file{nearby(options.image)}")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {options.max_new_tokens} must be at least 1")

    from mllm_vision.data.images.transforms import load_image
    from mllm_vision.distributed import own_device
    from mllm_vision.vlm import answer, load_vlm

    image = load_image(options.image)
    model, processor = load_vlm(options.model)
    model.to(own_device(options.device))
    messages: list[dict] = []
    for question in options.question or typed_questions():
        # The image goes before the first question only, in the form of training (``data.chat.messages.from_pairs``).
        content = question if messages else [{"type": "image"}, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        reply = answer(model, processor, messages, [image], max_new_tokens=options.max_new_tokens)
        messages.append({"role": "assistant", "content": reply})
        print(reply, flush=True)


if __name__ == "__main__":
    run_recipe(main)
