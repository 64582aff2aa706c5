"""Answers of a vision-language model, many at once: greedy, left-padded, every image encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_vision.data.chat.prompts import chat_template_of, prompt_ids
from mllm_vision.data.records.sampling import BadRow
from mllm_vision.errors import short
from mllm_vision.evaluation.base import batches, unwrap
from mllm_vision.vlm.measure import check_room, greedy, said
from mllm_vision.vlm.tokens import stop_ids


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
        self.image_token_id = self.model.config.image_token_id
        self.ends = stop_ids(self.model, processor)
        self._prompts: dict[str, list[int]] = {}

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt, with one image token.

        Raises:
            BadRow: it has another number of them (the word <image> in the question), or leaves no room for an answer.
        """
        from mllm_vision.data.chat.messages import from_pairs

        if question not in self._prompts:
            # Put together as training conversations are, so that no token differs between the two.
            ids = prompt_ids(self.processor, from_pairs([(question, "")], 1)[:1])
            found = ids.count(self.image_token_id)
            if found != 1:
                text = short(self.tokenizer.decode(ids))
                raise BadRow("the prompt holds not one image token", f"{found} (id {self.image_token_id}) in {text}")
            check_room(self.model, len(ids) - 1 + self.layout.longest, self.max_new_tokens)
            self._prompts[question] = ids
        return self._prompts[question]

    def spelt(self, question: str, image: Any) -> list[int]:
        """The prompt with the tokens of an image in place of its one token."""
        ids = self.prompt_ids(question)
        place = ids.index(self.image_token_id)
        return [*ids[:place], *image.tolist(), *ids[place + 1 :]]

    def image_features(self, images: Sequence[Any]) -> list[Tensor]:
        """The connector's output, one ``[n, D]`` an image."""
        if self.blind and self.layout.fixed:  # one blank image stands for all of them
            return self._encode(images[:1]) * len(images)
        return [tokens for chunk in batches(list(images), self.batch_size) for tokens in self._encode(chunk)]

    def _encode(self, images: Sequence[Any]) -> list[Tensor]:
        pixels = {name: value.to(self.task.device) for name, value in self.layout(list(images)).items()}
        if self.blind:
            pixels |= {name: torch.zeros_like(v) for name, v in pixels.items() if name.endswith("pixel_values")}
        spelt = [self.layout.tokens(image.height, image.width) for image in images]
        counts = [int((tokens == self.image_token_id).sum()) for tokens in spelt]
        return list(self.task.image_tokens(pixels).split(counts))

    def answer(self, images: Sequence[Any], questions: Sequence[tuple[int, str]]) -> list[str]:
        """Answers to ``(image's place, question)`` pairs, in the order asked."""
        if not questions:
            return []
        features = self.image_features(images)
        spelt = [self.layout.tokens(image.height, image.width) for image in images]
        prompts = [torch.tensor(self.spelt(question, spelt[place])) for place, question in questions]
        answers = [""] * len(questions)
        # Prompts of one length share a batch as far as possible: less padding, fewer wasted steps.
        order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
        for chunk in batches(order, self.batch_size):
            tokens = torch.cat([features[questions[i][0]] for i in chunk])
            for i, text in zip(chunk, self._generate([prompts[i] for i in chunk], tokens), strict=True):
                answers[i] = text
        return answers

    def _generate(self, prompts: Sequence[Tensor], image_tokens: Tensor) -> list[str]:
        longest = max(map(len, prompts))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.full((len(prompts), longest), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.task.device), mask.to(self.task.device)
        config = greedy(self.tokenizer, self.ends, self.max_new_tokens)
        output = self.task.generate(ids, mask, image_tokens, generation_config=config)
        return [said(self.tokenizer, row, self.ends) for row in output[:, longest:].tolist()]
