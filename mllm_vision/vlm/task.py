"""``LanguageTask``: the training loss around a native model of transformers.

It computes the same numbers as the native forward, but the vision tower runs no layer above the selected one (and
without gradients when frozen), and the logits are computed at supervised positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from mllm_vision.functional.engine.linear_cross_entropy import linear_cross_entropy
from mllm_vision.vlm.packing import check_packing
from mllm_vision.vlm.systems import System
from mllm_vision.vlm.systems.base import GROUPS

IMAGE_INPUTS = ("pixel_values", "more_pixel_values", "image_sizes", "pixel_attention_mask", "tiles")


@dataclass
class TaskOutput(ModelOutput):
    """Output of a `LanguageTask`.

    Attributes:
        loss: mean cross-entropy of the supervised tokens, or None without labels.
        logits: ``[B, T, V]`` without labels; with them, where they are asked for, ``[S, V]`` at the S supervised
            positions, row by row of the batch.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class LanguageTask(nn.Module):
    """The next-token loss of a system at the supervised tokens; what the Trainer sees.

    Args:
        model: the native model (``task.model``), which is the artifact: `save_vlm` writes it as it is.
        system: says how its parts run.

    Attributes:
        label_smoothing: of the training loss (``--label_smoothing_factor``).
        packing_checked: the forms of packing ("pack_turns", "packing") in which the language model gives conversations
            the numbers of separate ones.
        adapters: peft's model around `model`, while adapters are trained.

    Source: LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744).
    """

    adapters: Any
    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, so accumulation weights every token equally
    label_smoothing: float = 0.0
    packing_checked: frozenset[str] = frozenset()

    def __init__(self, model: PreTrainedModel, system: System) -> None:
        super().__init__()
        self.model: Any = model
        self.system = system
        self.model.config.mllm_vision = self._settings(self.blind)
        object.__setattr__(self, "adapters", None)  # not a submodule: it holds `model`

    # -- settings ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The native model's config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def blind(self) -> bool:
        """Whether images are replaced by zeros (stored in ``config.json``; plain transformers uses the images)."""
        return bool((getattr(self.config, "mllm_vision", None) or {}).get("blind", False))

    @blind.setter
    def blind(self, value: bool) -> None:
        self.config.mllm_vision = self._settings(value)

    def _settings(self, blind: bool) -> dict[str, Any]:
        kept = getattr(self.config, "mllm_vision", None) or {}
        return {**kept, "system": self.system.name, **vars(self.system.config), "blind": bool(blind)}

    # -- training mode -----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LanguageTask:
        """As ``nn.Module.train``, but fully frozen parts stay in evaluation mode (without dropout)."""
        super().train(mode)
        if mode:
            for group in GROUPS:
                for part in self.system.parts.modules(self.model, group):
                    if is_frozen(part):
                        part.eval()
            for part in self.system.parts.modules(self.model, "language_model"):
                if is_frozen(part):
                    _let_checkpoint(part)  # the connector's gradients pass through it
        return self

    def in_checkpoints(self) -> set[str]:
        """Names of the weights that a checkpoint of the training holds: what trains, and buffers.

        What is frozen comes from the run's parents, whose hashes a resumed run compares.
        """
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return self.state_dict().keys() - frozen

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; ValueError where the language model's layers cannot be checkpointed."""
        parts = self.system.parts.modules(self.model, "language_model")
        if not any(isinstance(layer, GradientCheckpointingLayer) for part in parts for layer in part.modules()):
            raise ValueError(
                f"the layers of {type(parts[0]).__name__} cannot be checkpointed; train without "
                "--gradient_checkpointing, or use another language model"
            )
        self.model.activation_checkpointing_enable(*args, **kwargs)

    # -- images ------------------------------------------------------------------------------------------------

    def image_tokens(self, images: Mapping[str, Tensor], features: Tensor | None = None) -> Tensor:
        """What the connector gives for all images in reading order, ``[tokens, D_text]``.

        Args:
            images: the tensors of the system's layout.
            features: the tower's output where it was computed before.
        """
        if features is None:
            frozen = all(is_frozen(part) for part in self.system.parts.modules(self.model, "encoder"))
            with torch.no_grad() if frozen else nullcontext():
                features = self.system.features(self.model, self.seen(images))
        return self.system.connect(self.model, features, images)

    def seen(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the images, zeros in place of their pixels if the model is blind."""
        if not self.blind:
            return dict(images)
        return {
            name: torch.zeros_like(value) if name.endswith("pixel_values") else value for name, value in images.items()
        }

    def blank_image(self) -> Tensor:
        """The sum of the connector's output for one blank image; a scalar."""
        blank = {name: value.to(self.device) for name, value in self.system.blank(self.model).items()}
        return self.image_tokens(blank).sum()

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Token ids ``[B, T + new]`` by the native ``generate``, padded prompts on the left.

        Args:
            input_ids: ``[B, T]``, each image spelt as its tokens.
            attention_mask: ``[B, T]``.
            image_tokens: from `image_tokens`; or the layout's tensors (`pixel_values`, ...) among the options.
            options: of ``generate``.
        """
        images = {name: options.pop(name) for name in IMAGE_INPUTS if name in options}
        if image_tokens is None and images:
            image_tokens = self.image_tokens(images)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.system.generate(self.model, input_ids, attention_mask, image_tokens, **options)

    # -- the loss ----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        more_pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        tiles: Tensor | None = None,
        image_features: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
    ) -> TaskOutput:
        """One pass through tower, connector and language model.

        Args:
            input_ids: ``[B, T]``, each image spelt as its tokens.
            labels: ``[B, T]``, -100 for tokens that are not trained on; shifted here.
            attention_mask: ``[B, T]``, or ``[B, 1, T, T]`` bool from ``ConversationCollator`` for packed rows.
            position_ids: ``[B, T]``, starting again at every conversation of a packed row.
            pixel_values, more_pixel_values, image_sizes, pixel_attention_mask, tiles: the tensors of the system's
                `ImageLayout` for all images of the batch in reading order, or None for text only.
            image_features: the tower's output in place of its pixels (a cache).
            token_weights: ``[B, T]`` float, the weight of each label's loss; None: 1.
            num_items_in_batch: supervised tokens of the whole accumulated batch; the loss is then the (weighted) sum
                divided by it, otherwise by the supervised tokens here.
            return_logits: also give the logits ``[S, V]`` of the supervised positions.

        Raises:
            ValueError: image tokens and image features differ in number; packed conversations that this language
                model does not keep apart (``check_packing``).
        """
        given = (pixel_values, more_pixel_values, image_sizes, pixel_attention_mask, tiles)
        images = {name: value for name, value in zip(IMAGE_INPUTS, given, strict=True) if value is not None}
        tokens, blank = None, None
        if images or image_features is not None:
            tokens = self.image_tokens(images, image_features)
        elif (input_ids == self.config.image_token_id).any():
            raise ValueError(
                f"input_ids contain {int((input_ids == self.config.image_token_id).sum())} image tokens, but no images "
                "were given; pass the images, or leave the image token out of a text-only batch"
            )
        elif self.training:
            # A batch without images still runs tower and connector: other ranks of a sharded or data-parallel run
            # wait for them, and a run of the connector alone would have no graph.
            blank = 0.0 * self.blank_image()
        answers = None if labels is None else labels != -100
        mask = self._mask(attention_mask, position_ids, labels is not None)
        hidden = self.system.decode(self.model, input_ids, mask, position_ids, tokens, answers)
        if labels is None:
            weight, bias, softcap = self.system.head(self.model)
            return TaskOutput(logits=_capped(F.linear(hidden, weight, bias), softcap))
        return self._loss(hidden, labels, token_weights, num_items_in_batch, blank, return_logits)

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        token_weights: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        blank: Tensor | None,
        return_logits: bool,
    ) -> TaskOutput:
        """The loss of the tokens that follow ``hidden [B, T, D]``."""
        targets = labels[:, 1:].flatten()
        # their number is read back from the device once, not by each selection and its gradient
        supervised = (targets != -100).nonzero().flatten()
        rows = hidden[:, :-1].flatten(0, 1).index_select(0, supervised)
        targets = targets.index_select(0, supervised)
        weight, bias, softcap = self.system.head(self.model)
        settings: dict[str, Any] = {
            "label_smoothing": self.label_smoothing if self.training else 0.0,
            "softcap": softcap,
            "bias": bias,
        }
        if token_weights is not None:
            settings["token_weights"] = token_weights[:, 1:].flatten().index_select(0, supervised)
        total = linear_cross_entropy(rows, weight, targets, **settings)
        if blank is not None:
            total = total + blank
        count = max(targets.numel(), 1) if num_items_in_batch is None else num_items_in_batch
        logits = _capped(F.linear(rows, weight, bias), softcap) if return_logits else None
        return TaskOutput(loss=total / count, logits=logits)

    def _mask(self, attention_mask: Tensor | None, position_ids: Tensor | None, training: bool) -> Tensor | None:
        """The attention mask as the native model takes it."""
        if attention_mask is None:
            if position_ids is not None and training and "packing" not in self.packing_checked:
                check_packing(self, int(position_ids.max()) + 1, position_ids.shape[1], flag="packing")
            return None
        if attention_mask.dim() == 2:
            # With causal attention the padding on the right changes nothing, and without a mask attention is cheaper.
            right_padded = training and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
            return None if right_padded and not self.system.bidirectional else attention_mask
        if attention_mask.dtype != torch.bool:
            return attention_mask
        if "pack_turns" not in self.packing_checked:
            row = attention_mask.shape[-1]
            check_packing(self, row if position_ids is None else int(position_ids.max()) + 1, row)
        return self._additive(attention_mask)

    def _additive(self, mask: Tensor) -> Tensor:
        """A boolean ``[B, 1, T, T]`` mask as an additive one for eager and SDPA attention."""
        implementation = self.config.get_text_config()._attn_implementation
        if implementation not in (None, "sdpa", "eager"):
            raise ValueError(
                f"packed conversations need a full attention mask, which attn_implementation={implementation!r} does "
                "not support; load the model with attn_implementation='sdpa', or train without --pack_turns"
            )
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
