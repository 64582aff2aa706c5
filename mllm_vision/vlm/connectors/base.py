"""What the models of this folder share: a LLaVA whose towers and connector are exchanged.

Everything else is transformers' own: the loss, `logits_to_keep`, generation, caches, saving and loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from mllm_vision.encoder.families import _side
from mllm_vision.encoder.features import extract_features


@strict
class TowersConfig(LlavaConfig):
    """A LlavaConfig with any number of vision towers.

    Args:
        more_vision_configs: configs of the towers after `vision_config`, as dicts with `model_type`.
        vision_feature_layers: the hidden state of each tower, an index into its `hidden_states`; None is
            `vision_feature_layer` for all.
        vision_widths: the width of each tower's tokens; None is `hidden_size`, which convolutional configs lack.
    """

    more_vision_configs: list[Any] | None = None
    vision_feature_layers: list[int] | None = None
    vision_widths: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        more = self.more_vision_configs or []
        self.more_vision_configs = [each.to_dict() if isinstance(each, PreTrainedConfig) else each for each in more]
        for name in ("vision_feature_layers", "vision_widths"):
            given = getattr(self, name)
            if given is not None and len(given) != 1 + len(more):
                raise ValueError(
                    f"{name}={given} has {len(given)} entries for {1 + len(more)} towers; give one a tower"
                )

    @property
    def vision_configs(self) -> list[Any]:
        """The configs of all towers."""
        more = self.more_vision_configs or []
        return [self.vision_config, *(CONFIG_MAPPING[each["model_type"]].from_dict(each) for each in more)]

    @property
    def tower_widths(self) -> list[int]:
        """The width of each tower's tokens."""
        return self.vision_widths or [each.hidden_size for each in self.vision_configs]


class ConnectorModel(LlavaModel):
    """`LlavaModel` with the towers and the connector of its config.

    Several towers take several images of different sizes, each from the tower's own image processor. `pixel_values`
    contains them side by side: for each image one row `[sum of 3 * H * W]`, in the order of the towers
    (`join_pixels`). With one tower it is the usual `[n, 3, H, W]`.
    """

    config_class = TowersConfig

    def __init__(self, config: TowersConfig) -> None:
        super(LlavaModel, self).__init__(config)  # LlavaModel's own would build the MLP projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        others = config.vision_configs[1:]
        if others:
            self.more_vision_towers = nn.ModuleList([AutoModel.from_config(each) for each in others])
        self.multi_modal_projector: Any = self.build_connector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that loading initialises as for transformers' own classes (5.23; see `VisionLanguageModel`)."""
        return False

    def build_connector(self, config: Any) -> nn.Module:
        """The connector of this model."""
        raise NotImplementedError

    @property
    def towers(self) -> list[Any]:
        """All vision towers."""
        return [self.vision_tower, *getattr(self, "more_vision_towers", [])]

    def split_pixels(self, pixel_values: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The images of each tower, `[n, 3, H, W]`; see `join_pixels`.

        Raises:
            ValueError: a shape that does not fit the towers.
        """
        return split_pixels(pixel_values, self.config.vision_configs)

    def tower_features(self, pixel_values: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The selected hidden state of each tower as tokens `[n, N, C]`, without class token.

        Feature maps of convolutional networks become tokens row by row. Only the layers that are needed run.
        """
        images = self.split_pixels(pixel_values)
        layers = self.config.vision_feature_layers or [self.config.vision_feature_layer] * len(images)
        found = []
        for tower, pixels, layer in zip(self.towers, images, layers, strict=True):
            tokens = extract_features(tower, pixels, select_layer=layer, select_feature="patch").tokens
            assert tokens is not None
            found.append(tokens)
        widths = [each.shape[-1] for each in found]
        if widths != self.config.tower_widths:
            raise ValueError(
                f"the towers give tokens of {widths} channels at the layers {layers}, but the connector was built for "
                f"vision_widths={self.config.tower_widths}; set vision_widths in the config, or another layer"
            )
        return found

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """The tokens of every image for the language model, `[n, N, D]`.

        Args:
            features: from `tower_features`, or a cache of them.
        """
        return self.multi_modal_projector(features)

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], **kwargs: Any) -> BaseModelOutputWithPooling:
        """`connect(tower_features(pixel_values))` as `pooler_output`, a list with one tensor an image.

        Raises:
            ValueError: another layer or selection than the config's.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if kwargs.get(name) not in (None, getattr(self.config, name)):
                raise ValueError(f"{name}={kwargs[name]!r}: the connector was built for the config's; leave it out")
        tokens = self.connect(self.tower_features(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=list(tokens))  # type: ignore[arg-type]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise_connector(module)


class ConnectorForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` around a `ConnectorModel`."""

    config_class = TowersConfig
    model_class: type[ConnectorModel]

    def __init__(self, config: TowersConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = self.model_class(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """As of `ConnectorModel`."""
        return False

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], **kwargs: Any) -> BaseModelOutputWithPooling:
        """As of `ConnectorModel`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise_connector(module)


def initialise_connector(module: nn.Module) -> None:
    """Initial values of the parameters that transformers does not know: those a module names in `initial_std`."""
    for name, std in getattr(module, "initial_std", {}).items():
        init.trunc_normal_(getattr(module, name), mean=0.0, std=std)


def register(config: type[TowersConfig], model: type, generator: type) -> None:
    """Makes the classes known to AutoConfig, AutoModel and AutoModelForImageTextToText."""
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForImageTextToText.register(config, generator)


def join_pixels(images: Sequence[Tensor]) -> Tensor:
    """The images of several towers, `[n, 3, H, W]` each, as one tensor `[n, sum of 3 * H * W]`.

    One tensor with one row an image is batched, cut, cached and moved like any `pixel_values`, while every tower keeps
    the exact pixels of its own image processor. With one tower its images are returned as they are.

    Raises:
        ValueError: different numbers of images.
    """
    if len({len(each) for each in images}) != 1:
        raise ValueError(
            f"the towers have {[len(each) for each in images]} images; every image is given to every tower"
        )
    return images[0] if len(images) == 1 else torch.cat([each.flatten(1) for each in images], dim=1)


def split_pixels(pixel_values: Tensor | Sequence[Tensor], configs: Sequence[Any]) -> list[Tensor]:
    """The inverse of `join_pixels` for towers of these configs; a list of tensors is taken as it is.

    Raises:
        ValueError: a shape that does not fit the towers.
    """
    if not isinstance(pixel_values, Tensor):
        images = list(pixel_values)
        if len(images) != len(configs):
            raise ValueError(f"pixel_values has {len(images)} tensors for {len(configs)} towers; give one a tower")
        return images
    if len(configs) == 1:
        return [pixel_values]
    shapes = [(getattr(each, "num_channels", 3), image_side(each), image_side(each)) for each in configs]
    sizes = [channels * height * width for channels, height, width in shapes]
    if pixel_values.ndim != 2 or pixel_values.shape[1] != sum(sizes):
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}; {len(configs)} towers with images of "
            f"{[height for _, height, _ in shapes]} pixels take [n, {sum(sizes)}] (see join_pixels)"
        )
    parts = pixel_values.split(sizes, dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def image_side(config: Any) -> int:
    """The side of a tower's square images.

    Convolutional networks take any size; the one they get here is kept in `image_size`, as transformers' configs do.
    """
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(f"the config of the {config.model_type} tower has no image_size; set it to its images' side")
    return _side(size)


def grid_side(tokens: int) -> int:
    """The side of a square grid of tokens; ValueError for a number that is not a square."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens are not a square grid; use square images whose side the patches divide")
    return side
