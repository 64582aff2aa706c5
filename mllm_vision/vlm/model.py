"""The LLaVA-style model: transformers' parameter layout, with a pluggable projector and cheaper training.

It computes the same numbers as ``LlavaForConditionalGeneration``, but the vision tower runs no layer above the selected
one (and without gradients when frozen), and with labels the logits are computed at supervised positions only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModel
from transformers.utils.generic import can_return_tuple

from mllm_vision.encoder.features import extract_features
from mllm_vision.modules.projectors import build_projector
from mllm_vision.vlm.packing import check_packing


def settings(config: LlavaConfig) -> dict[str, Any]:
    """The extra keys of ``config.json`` (``projector``, ``select_feature``, ``blind``); empty for other LLaVAs."""
    return getattr(config, "mllm_vision", None) or {}


def is_frozen(module: nn.Module) -> bool:
    """True when no parameter of ``module`` requires a gradient."""
    return not any(parameter.requires_grad for parameter in module.parameters())


class _CheckpointedFrozen:
    """The checkpoint function of a frozen layer that passes gradients on.

    transformers checkpoints layers only in training mode, which would apply dropout to a frozen layer. It is therefore
    set to training mode, but computes in evaluation mode.
    """

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(self._evaluated, run, *args)

    def _evaluated(self, run: Callable[..., Any], *args: Any) -> Any:
        training = self.layer.training
        self.layer.training = training and not is_frozen(self.layer)
        try:
            return run(*args)
        finally:
            self.layer.training = training


def _let_checkpoint(part: nn.Module) -> None:
    """Enables checkpointing of the frozen layers of ``part`` if gradient checkpointing is on."""
    layers: list[Any] = [layer for layer in part.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        if layer.gradient_checkpointing:
            layer.training = True
            if not isinstance(layer._gradient_checkpointing_func, _CheckpointedFrozen):
                layer._gradient_checkpointing_func = _CheckpointedFrozen(layer, layer._gradient_checkpointing_func)


def _right_padded(attention_mask: Tensor | None) -> bool:
    """True for a ``[B, T]`` mask whose zeros all come after its ones."""
    if attention_mask is None or attention_mask.dim() != 2:
        return False
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


class VisionLanguageBackbone(LlavaModel):
    """``LlavaModel`` with the projector named in the config, and features from ``extract_features``."""

    def __init__(self, config: LlavaConfig) -> None:
        super(LlavaModel, self).__init__(config)  # LlavaModel's own would build the MLP projector
        kind = settings(config).get("projector", "mlp")
        self.vision_tower = AutoModel.from_config(config.vision_config)
        layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        vision: Any = config.vision_config
        text: Any = config.text_config
        projector: Any = build_projector(kind, vision.hidden_size * layers, text.hidden_size)
        self.multi_modal_projector = projector
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Projected tokens of ``pixel_values [n, 3, H, W]``: ``pooler_output`` is a list of n ``[N, D_text]``.

        Layers or strategies other than the config's, several layers at once and towers with images of varying size use
        transformers' (slower) implementation.
        """
        if settings(self.config).get("blind", False):
            pixel_values = torch.zeros_like(pixel_values)
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        own = layer == self.config.vision_feature_layer and strategy == self.config.vision_feature_select_strategy
        feature = settings(self.config).get("select_feature")
        wants_more = kwargs.get("output_attentions") or kwargs.get("output_hidden_states")
        if feature is None or not own or wants_more or not isinstance(layer, int) or image_sizes is not None:
            return super().get_image_features(
                pixel_values,
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                image_sizes=image_sizes,
                **kwargs,
            )
        with torch.no_grad() if is_frozen(self.vision_tower) else nullcontext():
            tokens = extract_features(
                self.vision_tower, pixel_values, select_layer=layer, select_feature=feature, pooled=False
            ).tokens
        assert tokens is not None
        projected = self.multi_modal_projector(tokens.to(self.multi_modal_projector.linear_1.weight.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=list(projected))  # type: ignore[arg-type]


class VisionLanguageModel(LlavaForConditionalGeneration):
    """A LLaVA model whose checkpoints plain transformers loads; build one with ``build_vlm`` or ``load_vlm``.

    ``config.mllm_vision`` contains settings without a field in Llava's config: ``projector`` ("mlp" or "linear"),
    ``select_feature`` and ``blind`` (images are replaced by zeros, the "no image" ablation; plain transformers ignores
    this key and uses the images).

    Source: LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744).
    """

    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, so accumulation weights every token equally
    # Of the training loss (``--label_smoothing_factor``). The Trainer's smoother needs the logits of every position and
    # assumes shifted labels for unknown classes (transformers 5.23).
    label_smoothing: float = 0.0

    def __init__(self, config: LlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = VisionLanguageBackbone(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # for the Trainer: labels are shifted in forward
        self.post_init()

    packing_checked = False  # whether the language model gives packed conversations the numbers of separate ones

    @property
    def blind(self) -> bool:
        """Whether images are replaced by zeros."""
        return bool(settings(self.config).get("blind", False))

    @blind.setter
    def blind(self, value: bool) -> None:
        self.config.mllm_vision = {**settings(self.config), "blind": bool(value)}

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """As ``nn.Module.train``, but fully frozen parts stay in evaluation mode (without dropout)."""
        super().train(mode)
        for part in (self.model.vision_tower, self.model.multi_modal_projector, self.model.language_model):
            if mode and is_frozen(part):
                part.eval()
        if mode and is_frozen(self.model.language_model):
            _let_checkpoint(self.model.language_model)  # the projector's gradients pass through it
        return self

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; ValueError where the language model's layers cannot be checkpointed."""
        language_model = self.model.language_model
        if not any(isinstance(layer, GradientCheckpointingLayer) for layer in language_model.modules()):
            raise ValueError(
                f"the layers of {type(language_model).__name__} cannot be checkpointed; train without "
                "--gradient_checkpointing, or use another language model"
            )
        super().activation_checkpointing_enable(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that loading initialises and renames as for transformers' own classes.

        For custom code, transformers 5.23 considers modules without weights initialised, which would leave their
        buffers (Falcon-H1's) uninitialised.
        """
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> LlavaCausalLMOutputWithPast:
        """One pass through tower, projector and language model.

        Args:
            input_ids: ``[B, T]``, each image spelt as ``config.image_seq_length`` image tokens.
            pixel_values: ``[n_images, 3, H, W]`` in reading order, or None for text only.
            attention_mask: ``[B, T]``, or ``[B, 1, T, T]`` bool from ``ConversationCollator`` for packed rows.
            labels: ``[B, T]``, -100 for tokens that are not trained on; shifted here. With labels, ``logits`` is
                ``[S, V]``: one row for each of the S supervised tokens, row by row of the batch.
            num_items_in_batch: supervised tokens of the whole accumulated batch; the loss is then the sum
                divided by it, otherwise the mean over S.

        Raises:
            ValueError: image tokens and image features differ in number; packed conversations that this language
                model does not keep apart (``check_packing``).
        """
        if labels is not None:
            use_cache = bool(use_cache)
            if past_key_values is None and _right_padded(attention_mask):
                # With causal attention the mask does not change the result; without it attention is cheaper.
                attention_mask = None
        if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
            if not self.packing_checked:
                row = attention_mask.shape[-1]
                check_packing(self, row if position_ids is None else int(position_ids.max()) + 1, row)
            attention_mask = self._additive(attention_mask)
        extra = {
            name: value
            for name, value in (
                ("use_cache", use_cache),
                ("output_attentions", output_attentions),
                ("output_hidden_states", output_hidden_states),
            )
            if value is not None
        }
        no_images = pixel_values is None and mm_encoder_outputs is None and input_ids is not None
        if labels is not None and no_images and (input_ids == self.config.image_token_id).any():
            raise ValueError(
                f"input_ids contain {int((input_ids == self.config.image_token_id).sum())} image tokens, but "
                "pixel_values is None; pass the images, or leave the image token out of a text-only batch"
            )
        if self.training and no_images:
            # A batch without images still runs tower and projector: other ranks of a sharded or data-parallel run
            # wait for them, and a projector-only run would have no graph.
            inputs_embeds = self.get_input_embeddings()(input_ids) + 0.0 * self.blank_image()
            input_ids = None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            **extra,
        )
        hidden = outputs.last_hidden_state
        loss = None
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        else:
            targets = labels[:, 1:]
            # their number is read back from the device once, not by each selection and its gradient
            supervised = (targets != -100).flatten().nonzero().flatten()
            logits = self.lm_head(hidden[:, :-1].flatten(0, 1).index_select(0, supervised))
            targets = targets.flatten().index_select(0, supervised)
            smoothing = self.label_smoothing if self.training else 0.0
            total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
            loss = total / (max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _additive(self, mask: Tensor) -> Tensor:
        """A boolean ``[B, 1, T, T]`` mask as an additive one for eager and SDPA attention."""
        text: Any = self.config.text_config
        implementation = text._attn_implementation
        if implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                f"packed conversations need a full attention mask, which attn_implementation={implementation!r} does "
                "not support; load the model with attn_implementation='sdpa', or train without --pack_turns"
            )
        table: Any = self.get_input_embeddings().weight
        dtype = table.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def blank_image(self) -> Tensor:
        """The sum of the projected tokens of one black image; a scalar."""
        vision: Any = self.config.vision_config
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        tower = next(self.model.vision_tower.parameters())
        image = tower.new_zeros(1, getattr(vision, "num_channels", 3), height, width)
        return self.model.get_image_features(image).pooler_output[0].sum()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, **kwargs: Any
    ) -> None:
        """As in transformers; ``config.json`` names LlavaForConditionalGeneration, which can load it too."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / "config.json"
        if kwargs.get("is_main_process", True) and file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            config["architectures"] = ["LlavaForConditionalGeneration"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# Checkpoints use llava-hf's names from before transformers 5; the renaming is registered by class name.
register_checkpoint_conversion_mapping(
    VisionLanguageBackbone.__name__, get_checkpoint_conversion_mapping(LlavaModel.__name__), overwrite=True
)
