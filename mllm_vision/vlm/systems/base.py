"""``System``: what a multimodal LLM of the literature consists of, and how its parts run in training."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_vision.data.images.layouts import ImageLayout
from mllm_vision.encoder import VisionEncoder
from mllm_vision.vlm.language_model import JoinedLanguageModel

GROUPS = ("encoder", "connector", "language_model")
IMAGE_TOKEN = "<image>"


class Parts:
    """The module groups of a native model.

    Args:
        encoder, connector, language_model: attribute paths in the native model (of modules or parameters). What no path
            names belongs to the language model.
    """

    def __init__(self, encoder: Sequence[str], connector: Sequence[str], language_model: Sequence[str]) -> None:
        self.paths = dict(zip(GROUPS, (tuple(encoder), tuple(connector), tuple(language_model)), strict=True))

    def group_of(self, name: str) -> str:
        """The module group of a native parameter's name."""
        return self.path_of(name)[0]

    def path_of(self, name: str) -> tuple[str, str]:
        """(group, path) of a native parameter's name; its own name where no path names it."""
        for group, paths in self.paths.items():
            for path in paths:
                if name == path or name.startswith(f"{path}."):
                    return group, path
        return "language_model", name

    def modules(self, model: Any, group: str) -> list[nn.Module]:
        """The native modules of a group, outermost ones only."""
        found = (_at(model, path) for path in self.paths[group])
        return [part for part in found if isinstance(part, nn.Module)]

    def tower(self, model: Any) -> Any:
        """The vision tower (of several, the first)."""
        return self.modules(model, "encoder")[0]


class System(ABC):
    """One multimodal LLM: a class of transformers, how it is built, and how its parts are run.

    A system holds settings only; the weights are in the native model, which every method takes.

    Attributes:
        name: as `load_system` takes it.
        parts: the module groups of the native model.
        tokens: special tokens beside the image's that the tokenizer needs.
        image_token: stands for an image in the output of the chat template.
        softcap: the native class applies the language model's `final_logit_softcapping`.
        bidirectional: the prompt's tokens attend to each other, so that the padding mask is needed in training.
    """

    @dataclasses.dataclass
    class Config:
        """Settings; the fields are flags of recipes/align.py."""

    name: ClassVar[str]
    parts: ClassVar[Parts]
    tokens: ClassVar[tuple[str, ...]] = ()
    image_token: ClassVar[str] = IMAGE_TOKEN
    softcap: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = False

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "name" not in vars(cls):  # of one's own: how `load_system` finds it again
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config() if config is None else config

    # -- settings in config.json -------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, config: Any) -> bool:
        """Whether a checkpoint of another origin, of this system's model type, belongs to this system."""
        return False

    # -- building ----------------------------------------------------------------------------------------------

    @abstractmethod
    def processor(self, encoder: VisionEncoder, tokenizer: Any) -> Any:
        """The native processor around the encoder's image processor and the language model's tokenizer.

        It may add tokens of its own to the tokenizer; embeddings grow afterwards.

        Raises:
            ValueError: an encoder that does not fit the system, with the remedy.
        """

    @abstractmethod
    def build(self, encoder: VisionEncoder, language: JoinedLanguageModel, processor: Any) -> PreTrainedModel:
        """The native model over the given tower and language model (not copied), with a new connector.

        Raises:
            ValueError: an encoder or a language model that does not fit the system, with the remedy.
        """

    @abstractmethod
    def layout(self, model: Any, processor: Any) -> ImageLayout:
        """How images become token ids and tensors, for the native model and its processor."""

    def blank(self, model: Any) -> dict[str, Tensor]:
        """The layout's tensors of one black image, made without its processor."""
        vision = self.parts.tower(model).config
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        weight = next(self.parts.tower(model).parameters())
        return {"pixel_values": weight.new_zeros(1, getattr(vision, "num_channels", 3), height, width)}

    def load_processor(self, model: Any, path: str, **hub: Any) -> Any:
        """The processor of a loaded model, checked or corrected against it.

        Raises:
            ValueError: they do not fit, with the remedy.
            OSError: it cannot be read.
        """
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(path, **hub)

    # -- running -----------------------------------------------------------------------------------------------

    @abstractmethod
    def features(self, model: Any, images: Mapping[str, Tensor]) -> Tensor:
        """The tower's output for the layout's tensors: all that depends on tower and images, and nothing else.

        Shape: ``[images or tiles, N, D]``. This is what a feature cache holds.
        """

    @abstractmethod
    def connect(self, model: Any, features: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """The connector's output for all images in reading order, ``[tokens, D_text]``.

        Args:
            model: the native model.
            features: from ``features``.
            images: the layout's tensors; of these only sizes and counts, not the pixels.
        """

    def image_output(self, tokens: Tensor) -> dict[str, Any]:
        """``mm_encoder_outputs`` of the native forward and of ``generate`` for the connector's output."""
        return {"image": BaseModelOutputWithPooling(pooler_output=[tokens])}  # type: ignore[arg-type]

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        image_tokens: Tensor | None,
        answers: Tensor | None,
    ) -> Tensor:
        """The language model's last hidden states ``[B, T, D]``.

        Args:
            model: the native model.
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, additive ``[B, 1, T, T]``, or None (causal, padded on the right).
            position_ids: ``[B, T]`` or None.
            image_tokens: from ``connect``, or None for text only.
            answers: bool ``[B, T]``, where the supervised tokens are; for systems whose prompts attend in both
                directions.
        """
        images = {} if image_tokens is None else {"mm_encoder_outputs": self.image_output(image_tokens)}
        return model.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **images
        ).last_hidden_state

    def head(self, model: Any) -> tuple[Tensor, Tensor | None, float | None]:
        """(weight ``[V, D]``, bias ``[V]`` or None, softcap or None) of the output layer, for the loss."""
        layer = model.get_output_embeddings()
        return layer.weight, layer.bias, None

    def generate(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, image_tokens: Tensor | None, **options: Any
    ) -> Tensor:
        """Token ids ``[B, T + new]`` by the native ``generate``, of prompts padded on the left."""
        images: dict[str, Any] = {}
        if image_tokens is not None:
            images["mm_encoder_outputs"] = by_row(
                self.image_output(image_tokens), input_ids, model.config.image_token_id
            )
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, **images, **options)


def by_row(outputs: dict[str, Any], input_ids: Tensor, image_token_id: int) -> dict[str, Any]:
    """``image_output`` in entries that end where the rows of ``input_ids`` do.

    ``generate`` of transformers 5.23 assigns the entries to rows by their lengths, and repeats them for beams.
    """
    counts = [count for count in (input_ids == image_token_id).sum(1).tolist() if count]
    for output in outputs.values():
        found = output.pooler_output
        if isinstance(found, list) and len(found) == 1:
            output.pooler_output = list(found[0].split(counts))
        elif isinstance(found, Tensor) and found.ndim == 2:  # entries of one size
            output.pooler_output = found.unflatten(0, (-1, math.gcd(*counts)))
    return outputs


def _at(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model
