"""Answers of a vision-language model, many at once: greedy, left-padded, every picture encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mllm_vision.evaluation.base import batches, unwrap


def prompt_text(processor: Any, question: str) -> str:
    """The chat prompt of one question about one picture, ready for the answer to begin.

    Put together as training conversations are (``data.messages``), so that no word differs between the two.
    """
    from mllm_vision.data.messages import from_pairs

    messages = from_pairs([(question, "")], 1)[:1]
    renderer = processor if getattr(processor, "chat_template", None) else processor.tokenizer
    return renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


class AnswerGenerator:
    """Greedy answers from a Llava-layout model and its processor.

    Args:
        model: ``LlavaForConditionalGeneration`` or a subclass of it.
        processor: with ``tokenizer``, ``image_processor`` and a chat template.
        batch_size: questions generated at once.
        max_new_tokens: length limit of an answer.
        blind: feed zeros in place of every picture.

    Raises:
        ValueError: no chat template, or a prompt without exactly one image token.
    """

    def __init__(
        self, model: Any, processor: Any, *, batch_size: int, max_new_tokens: int, blind: bool = False
    ) -> None:
        from mllm_vision.data.images import ImageTransform

        self.model, self.processor, self.tokenizer = unwrap(model), processor, processor.tokenizer
        self.batch_size, self.max_new_tokens, self.blind = batch_size, max_new_tokens, blind
        if not (getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError("the processor has no chat template; set processor.chat_template (see CHAT_TEMPLATES)")
        self.transform = ImageTransform(processor.image_processor, train=False)
        self.image_token_id = self.model.config.image_token_id
        bos = self.tokenizer.bos_token_id
        # As in training: a beginning the template leaves out is added where the tokenizer adds one.
        self._adds_bos = bos is not None and bos in self.tokenizer("")["input_ids"]
        self._prompts: dict[str, list[int]] = {}

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt, with one image token."""
        if question not in self._prompts:
            text = prompt_text(self.processor, question)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._adds_bos and not text.startswith(self.tokenizer.bos_token):
                ids = [self.tokenizer.bos_token_id, *ids]
            found = ids.count(self.image_token_id)
            if found != 1:
                raise ValueError(f"the prompt {text!r} holds {found} image tokens (id {self.image_token_id}), not one")
            self._prompts[question] = ids
        return self._prompts[question]

    def image_features(self, pictures: Sequence[Any]) -> list[torch.Tensor]:
        """Projected features, one ``[n, D]`` a picture."""
        features: list[torch.Tensor] = []
        device = self.model.device
        dtype = next(self.model.model.vision_tower.parameters()).dtype
        if self.blind:  # one zero picture stands for all of them
            pixels = torch.zeros_like(self.transform(list(pictures[:1])))
            one = self._encode(pixels.to(device, dtype))[0]
            return [one] * len(pictures)
        for chunk in batches(list(pictures), self.batch_size):
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
        for picture, ids in zip(features, prompts, strict=True):
            place = ids.index(self.image_token_id)
            words = table(torch.tensor(ids, device=table.weight.device))
            rows.append(torch.cat([words[:place], picture.to(words), words[place + 1 :]]))
        longest = max(len(row) for row in rows)
        embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
        for i, row in enumerate(rows):
            embeds[i, longest - len(row) :] = row
            mask[i, longest - len(row) :] = 1
        return embeds, mask

    def answer(self, pictures: Sequence[Any], questions: Sequence[tuple[int, str]]) -> list[str]:
        """Answers to ``(picture's place, question)`` pairs, in the order asked."""
        if not questions:
            return []
        features = self.image_features(pictures)
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
        from transformers import GenerationConfig

        own = getattr(self.model, "generation_config", None)
        stops = getattr(own, "eos_token_id", None)
        ends = {stops} if isinstance(stops, int) else set(stops or [])
        ends.add(self.tokenizer.eos_token_id)
        ends.discard(None)
        padding = self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(ends) or None,
            pad_token_id=padding if padding is not None else (min(ends) if ends else 0),
        )
        output = self.model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]
