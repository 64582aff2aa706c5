"""Answers of a vision-language model, many at once: greedy, left-padded, every image encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_vision.data.chat.prompts import chat_template_of, prompt_ids
from mllm_vision.data.images.layouts import FixedLayout
from mllm_vision.data.records.sampling import BadRow
from mllm_vision.errors import short
from mllm_vision.evaluation.base import batches, unwrap
from mllm_vision.vlm.measure import check_room, greedy, said
from mllm_vision.vlm.tokens import stop_ids

Dialogue = str | Sequence[Mapping[str, Any]]
Asked = tuple[int | Sequence[int], Dialogue]


class AnswerGenerator:
    """Greedy answers from a system's model and its processor.

    Args:
        model: a `LanguageTask` (or a wrapper of it).
        processor: with ``tokenizer``, ``image_processor`` and a chat template.
        batch_size: questions generated at once.
        max_new_tokens: length limit of an answer.
        blind: feed zeros in place of every image.

    Raises:
        ValueError: no chat template.
    """

    def __init__(
        self, model: Any, processor: Any, *, batch_size: int, max_new_tokens: int, blind: bool = False
    ) -> None:
        self.task, self.processor, self.tokenizer = unwrap(model), processor, processor.tokenizer
        self.model, self.system = self.task.model, self.task.system
        self.batch_size, self.max_new_tokens, self.blind = batch_size, max_new_tokens, blind
        if not chat_template_of(processor):
            raise ValueError("the processor has no chat template; set processor.chat_template (see CHAT_TEMPLATES)")
        self.layout = self.system.layout(self.model, processor)
        self.image_token_id = self.layout.image_token_id
        self.ends = stop_ids(self.model, processor)
        self._prompts: dict[tuple[str, int], np.ndarray] = {}
        # One image of zeros stands for all, where what a model sees of it does not depend on the image's size.
        self._one_blank = blind and isinstance(self.layout, FixedLayout)

    def prompt(self, question: Dialogue, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
        """Token ids of the prompt, each image spelt as its tokens.

        Args:
            question: about the images, or a dialogue in the ``messages`` format that ends with the user's turn.
            sizes: (height, width) of the images in reading order.

        Raises:
            BadRow: the prompt has another number of image tokens (the word <image> in the question), or leaves no room
                for an answer.
        """
        ids, _ = self.layout.expand(self._unspelt(question, len(sizes)), sizes)
        check_room(self.model, len(ids), self.max_new_tokens)
        return ids

    def _unspelt(self, question: Dialogue, images: int) -> np.ndarray:
        """The prompt with one token an image."""
        from mllm_vision.data.chat.messages import from_pairs

        key = (question, images) if isinstance(question, str) else None
        if key in self._prompts:
            return self._prompts[key]
        # Put together as training conversations are, so that no token differs between the two.
        messages = from_pairs([(question, "")], images)[:1] if isinstance(question, str) else question
        ids = np.asarray(prompt_ids(self.processor, messages))
        found = int((ids == self.image_token_id).sum())
        if found != images:
            text = short(self.tokenizer.decode(ids))
            wanted = "one image token" if images == 1 else f"{images} image tokens"
            raise BadRow(f"the prompt holds not {wanted}", f"{found} (id {self.image_token_id}) in {text}")
        if key is not None:
            self._prompts[key] = ids
        return ids

    def image_features(self, images: Sequence[Any]) -> list[Tensor]:
        """The connector's output, one ``[n, D]`` an image."""
        if self._one_blank:
            return self._encode(images[:1]) * len(images)
        return [tokens for chunk in batches(list(images), self.batch_size) for tokens in self._encode(chunk)]

    def _encode(self, images: Sequence[Any]) -> list[Tensor]:
        pixels = {name: value.to(self.task.device) for name, value in self.layout(list(images)).items()}
        if self.blind:
            pixels |= {name: torch.zeros_like(v) for name, v in pixels.items() if name.endswith("pixel_values")}
        spelt = [self.layout.tokens(image.height, image.width) for image in images]
        counts = [int((tokens == self.image_token_id).sum()) for tokens in spelt]
        return list(self.task.image_tokens(pixels).split(counts))

    @torch.inference_mode()
    def answer(self, images: Sequence[Any], questions: Sequence[Asked]) -> list[str]:
        """Answers in the order asked.

        Args:
            images: PIL images; each is encoded once.
            questions: (the image's place among ``images``, or several in reading order; a question, or a dialogue in
                the ``messages`` format that ends with the user's turn).

        Raises:
            BadRow: see `prompt`.
        """
        features = self.image_features(images) if images and questions else []
        places = [[each] if isinstance(each, int) else list(each) for each, _ in questions]
        asked = zip(places, questions, strict=True)
        sizes = [(image.height, image.width) for image in images]
        prompts = [self.prompt(question, [sizes[place] for place in own]) for own, (_, question) in asked]
        same: dict[Any, list[int]] = {}  # without images the prompt alone decides: it is answered once
        for number, ids in enumerate(prompts):
            same.setdefault(ids.tobytes() if self._one_blank else number, []).append(number)
        answers = [""] * len(questions)
        # Prompts of one length share a batch as far as possible: less padding, fewer wasted steps.
        for chunk in batches(sorted(same.values(), key=lambda group: len(prompts[group[0]])), self.batch_size):
            seen = [features[place] for first, *_ in chunk for place in places[first]]
            texts = self._generate([prompts[first] for first, *_ in chunk], torch.cat(seen) if seen else None)
            for group, text in zip(chunk, texts, strict=True):
                for number in group:
                    answers[number] = text
        return answers

    def _generate(self, prompts: Sequence[np.ndarray], image_tokens: Tensor | None) -> list[str]:
        longest = max(map(len, prompts))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(prompts), longest), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.task.device), mask.to(self.task.device)
        config = greedy(self.tokenizer, self.ends, self.max_new_tokens)
        output = self.task.generate(ids, mask, image_tokens, generation_config=config)
        return [said(self.tokenizer, row, self.ends) for row in output[:, longest:].tolist()]
