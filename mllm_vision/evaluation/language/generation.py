"""Answers of a vision-language model, many at once: greedy, left-padded, every image encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mllm_vision.data.chat.prompts import chat_template_of, prompt_ids
from mllm_vision.data.records.sampling import BadRow
from mllm_vision.errors import short
from mllm_vision.evaluation.base import batches, unwrap
from mllm_vision.vlm.measure import check_room, greedy, said
from mllm_vision.vlm.tokens import stop_ids


class AnswerGenerator:
    """Greedy answers from a Llava-layout model and its processor.

    Args:
        model: ``LlavaForConditionalGeneration`` or a subclass of it.
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
        from mllm_vision.data.images.transforms import ImageTransform

        self.model, self.processor, self.tokenizer = unwrap(model), processor, processor.tokenizer
        self.batch_size, self.max_new_tokens, self.blind = batch_size, max_new_tokens, blind
        if not chat_template_of(processor):
            raise ValueError("the processor has no chat template; set processor.chat_template (see CHAT_TEMPLATES)")
        self.transform = ImageTransform(processor.image_processor, train=False)
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
            check_room(self.model, len(ids) - 1 + self.model.config.image_seq_length, self.max_new_tokens)
            self._prompts[question] = ids
        return self._prompts[question]

    def image_features(self, images: Sequence[Any]) -> list[torch.Tensor]:
        """Projected features, one ``[n, D]`` an image."""
        features: list[torch.Tensor] = []
        device = self.model.device
        dtype = next(self.model.model.vision_tower.parameters()).dtype
        if self.blind:  # one zero image stands for all of them
            pixels = torch.zeros_like(self.transform(list(images[:1])))
            one = self._encode(pixels.to(device, dtype))[0]
            return [one] * len(images)
        for chunk in batches(list(images), self.batch_size):
            features.extend(self._encode(self.transform(list(chunk)).to(device, dtype)))
        return features

    def _encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        outputs = self.model.get_image_features(pixel_values=pixels, return_dict=True)
        return list(getattr(outputs, "pooler_output", outputs))

    def embed(
        self, features: Sequence[torch.Tensor], prompts: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded input embeddings ``[B, T, D]`` and their mask ``[B, T]``."""
        table = self.model.get_input_embeddings()
        rows = []
        for image, ids in zip(features, prompts, strict=True):
            place = ids.index(self.image_token_id)
            words = table(torch.tensor(ids, device=table.weight.device))
            rows.append(torch.cat([words[:place], image.to(words), words[place + 1 :]]))
        longest = max(len(row) for row in rows)
        embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
        for i, row in enumerate(rows):
            embeds[i, longest - len(row) :] = row
            mask[i, longest - len(row) :] = 1
        return embeds, mask

    def answer(self, images: Sequence[Any], questions: Sequence[tuple[int, str]]) -> list[str]:
        """Answers to ``(image's place, question)`` pairs, in the order asked."""
        if not questions:
            return []
        features = self.image_features(images)
        prompts = [self.prompt_ids(question) for _, question in questions]
        answers = [""] * len(questions)
        # Prompts of one length share a batch as far as possible: less padding, fewer wasted steps.
        order = sorted(range(len(questions)), key=lambda i: len(prompts[i]) + len(features[questions[i][0]]))
        for chunk in batches(order, self.batch_size):
            embeds, mask = self.embed([features[questions[i][0]] for i in chunk], [prompts[i] for i in chunk])
            for i, text in zip(chunk, self._generate(embeds, mask), strict=True):
                answers[i] = text
        return answers

    def _generate(self, embeds: torch.Tensor, mask: torch.Tensor) -> list[str]:
        config = greedy(self.tokenizer, self.ends, self.max_new_tokens)
        output = self.model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
        return [said(self.tokenizer, row, self.ends) for row in output.tolist()]
