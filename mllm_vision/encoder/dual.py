"""The image-text model of stage zero: an image tower, a text tower and a shared embedding space."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_vision.data.text_length import cut_text
from mllm_vision.encoder.activations import use_fast_activations
from mllm_vision.encoder.encoder import VisionEncoder
from mllm_vision.encoder.families import family_of
from mllm_vision.encoder.files import Source, read_json
from mllm_vision.encoder.text.pooling import POOLINGS, default_pooling, pool_text
from mllm_vision.encoder.text.tokenizers import CLIP_TEXT, SIGLIP_TEXT, check_tokenizer, prepare_tokenizer
from mllm_vision.encoder.text.towers import build_text_tower, text_positions, text_sizes
from mllm_vision.errors import reading
from mllm_vision.hub.lineage import check_lineage, hash_weights

COMPOSITE = "mllm_vision_dual"
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


class DualEncoder(nn.Module):
    """An image tower and a text tower that embed into one space.

    Saved as a plain transformers checkpoint: a `CLIPModel` (CLIP towers), a `SiglipModel` (SigLIP towers) or a
    `VisionTextDualEncoderModel` (other towers with poolers), each with tokenizer and image processor. Any other
    combination is saved as a folder of native towers, which only `DualEncoder.from_pretrained` loads.

    Args:
        vision: the image tower; its pooled vector is projected.
        text: a transformers text model (see `encoder.text.towers.build_text_tower`).
        tokenizer: the tokenizer prepared for it (see `encoder.text.tokenizers.prepare_tokenizer`).
        embed_dim: width E of the shared space; two SigLIP towers use the image tower's width without projections.
        pooling: "pooler", "mean" or "last" (`encoder.text.pooling.pool_text`); by default chosen by the tower.
        logit_scale: initial value of the log scale, a 0-d parameter.
        logit_bias: initial bias of the sigmoid loss, a 0-d parameter; `None` for the softmax loss.

    Raises:
        ValueError: incompatible widths, vocabulary, end token or pooling.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        text: Any,
        tokenizer: Any,
        *,
        embed_dim: int | None = None,
        pooling: str | None = None,
        logit_scale: float = INITIAL_LOGIT_SCALE,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.tokenizer = vision, tokenizer
        self.text: Any = text
        self.pooling = pooling or default_pooling(text)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; use one of {', '.join(POOLINGS)}")
        check_tokenizer(text, tokenizer)
        image_width, text_width = vision.pooled_size, self._text_width()
        if self._siglip_towers:
            if text_width != image_width or embed_dim not in (None, image_width):
                raise ValueError(
                    f"two SigLIP towers share a space without projections: image width {image_width}, text width "
                    f"{text_width} and embed_dim={embed_dim} must be equal; build the text tower with "
                    f"projection_size={image_width} and leave embed_dim out"
                )
            self.embed_dim = image_width
            self.visual_projection: Any = nn.Identity()
            self.text_projection: Any = nn.Identity()
        else:
            self.embed_dim = embed_dim or min(image_width, text_width)
            self.visual_projection = _projection(image_width, self.embed_dim)
            self.text_projection = _projection(text_width, self.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))
        use_fast_activations(self)
        # Unused parameters make DistributedDataParallel fail: DINOv2's mask token, an unused pooler.
        idle = [value for name, value in vision.backbone.named_parameters() if name.endswith("mask_token")]
        if self.pooling != "pooler" and getattr(text, "pooler", None) is not None:
            idle += text.pooler.parameters()
        for parameter in idle:
            parameter.requires_grad_(False)

    @property
    def kind(self) -> str:
        """The loss of the pair: "siglip" with a logit bias, else "clip"."""
        return "clip" if self.logit_bias is None else "siglip"

    @property
    def max_text_length(self) -> int:
        """Longest text in tokens, the end token included."""
        return self.tokenizer.model_max_length

    @property
    def _siglip_towers(self) -> bool:
        backbone = self.vision.backbone.config
        return (
            backbone.model_type == "siglip_vision_model"
            and getattr(backbone, "vision_use_head", True)
            and self.text.config.model_type == SIGLIP_TEXT
        )

    def _text_width(self) -> int:
        if self.text.config.model_type == SIGLIP_TEXT:
            return self.text.config.projection_size
        return self.text.config.hidden_size

    def image_features(self, pixel_values: Tensor, *, patch_dropout: float = 0.0) -> Tensor:
        """Projected image vectors `[B, E]`, not normalised, of preprocessed images `[B, 3, H, W]`.

        In training mode the fraction `patch_dropout` of the patches is dropped (`VisionEncoder.forward`).
        """
        features = self.vision(pixel_values, pooled=True, tokens=False, patch_dropout=patch_dropout)
        return self.visual_projection(features.pooled)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text vectors `[B, E]`, not normalised, of tokens `[B, T]` padded on the right."""
        if "attention_mask" not in self.tokenizer.model_input_names:
            attention_mask = None  # published SigLIP towers attend to padding
        return self.text_projection(pool_text(self.text, input_ids, attention_mask, pooling=self.pooling))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Scaled similarities `[N, M]` of image features `[N, E]` and text features `[M, E]`, in fp32."""
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        scores = self.logit_scale.exp() * (image @ text.T)
        return scores if self.logit_bias is None else scores + self.logit_bias

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` `[B, T]` on this model's device, cut to `max_text_length`.

        Texts are padded to the longest; `text_features` pads further for SigLIP towers.
        """
        texts = [cut_text(text, self.tokenizer, self.max_text_length) for text in texts]
        encoded = self.tokenizer(texts, padding=True, truncation=True, return_attention_mask=True, return_tensors="pt")
        device = self.logit_scale.device
        return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any], *, batch_size: int = 64) -> Tensor:
        """Normalised image embeddings `[N, E]` of PIL images, paths or bytes; no gradient."""
        with _evaluating(self):
            pooled = self.vision.encode(images, batch_size=batch_size, feature="pooled").to(self.logit_scale.device)
            return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Normalised text embeddings `[N, E]`; no gradient."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        parts = [torch.empty(0, self.embed_dim, device=self.logit_scale.device)]
        with _evaluating(self):
            for start in range(0, len(texts), batch_size):
                parts.append(self.text_features(**self.tokenize(texts[start : start + batch_size])).float())
        return F.normalize(torch.cat(parts), dim=-1)

    # ---------------------------------------------------------------- saving and loading

    @property
    def layout(self) -> str:
        """What `save_pretrained` writes: "clip", "siglip", "vision-text-dual-encoder" or "mllm_vision_dual"."""
        image_type, text_type = self.vision.backbone.config.model_type, self.text.config.model_type
        if image_type == "clip_vision_model" and text_type == CLIP_TEXT:
            return "clip"
        if self._siglip_towers:
            return "siglip"
        # transformers' generic model projects the towers' pooler outputs and has no bias
        pools = getattr(self.vision.backbone.config, "vision_use_head", True) and (
            getattr(self.vision.backbone, "pooler", True) is not None
        )
        flat = not family_of(self.vision.backbone).convolutional
        if pools and flat and self.pooling == "pooler" and self.logit_bias is None:
            return "vision-text-dual-encoder"
        return COMPOSITE

    def native_model(self) -> Any:
        """The pair as the transformers model named by `layout`; tensors are shared.

        Raises:
            ValueError: no transformers class fits the towers (`layout` is "mllm_vision_dual").
        """
        import transformers

        if self.layout == COMPOSITE:
            towers = f"{self.vision.config.model_type!r} image tower with a {self.text.config.model_type!r} text tower"
            raise ValueError(f"no transformers class supports a {towers} and this loss; use two CLIP or SigLIP towers")
        names = {"clip": "CLIP", "siglip": "Siglip", "vision-text-dual-encoder": "VisionTextDualEncoder"}
        name = names[self.layout]
        configs = {"vision_config": self.vision.backbone.config, "text_config": self.text.config}
        fields: dict[str, Any] = {key: config.to_dict() for key, config in configs.items()}
        extras = {"select_layer": self.vision.select_layer, "select_feature": self.vision.select_feature}
        if self.layout != "siglip":
            fields |= {"projection_dim": self.embed_dim, "logit_scale_init_value": self.logit_scale.item()}
            if self.layout == "clip":
                fields["vision_config"]["projection_dim"] = fields["text_config"]["projection_dim"] = self.embed_dim
                if self.logit_bias is not None:
                    # CLIPModel has no bias (softmax ignores it), but from_pretrained restores it
                    extras["logit_bias"] = self.logit_bias.item()
        config = getattr(transformers, f"{name}Config")(**fields, mllm_vision=extras)
        state = {f"vision_model.{key}": value for key, value in self.vision.backbone.state_dict().items()}
        state |= {f"text_model.{key}": value for key, value in self.text.state_dict().items()}
        if self.layout == "siglip":
            bias = torch.zeros_like(self.logit_scale) if self.logit_bias is None else self.logit_bias.detach()
            state |= {"logit_scale": self.logit_scale.detach().reshape(1), "logit_bias": bias.reshape(1)}
        else:
            state |= {
                "logit_scale": self.logit_scale.detach(),
                "visual_projection.weight": self.visual_projection.weight.detach(),
                "text_projection.weight": self.text_projection.weight.detach(),
            }
        with torch.device("meta"):
            model = getattr(transformers, f"{name}Model")(config)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes the pair, its tokenizer and its image processor into the folder `path` (see the class)."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self.layout != COMPOSITE:
            self.native_model().save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            self.vision.processor.save_pretrained(path)
            return path
        from safetensors.torch import save_file

        self.vision.save_pretrained(path / "vision_model")
        self.text.save_pretrained(path / "text_model")
        self.tokenizer.save_pretrained(path / "text_model")
        heads = {"visual_projection": self.visual_projection, "text_projection": self.text_projection}
        state = {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}
        state["logit_scale"] = self.logit_scale.detach()
        if self.logit_bias is not None:
            state["logit_bias"] = self.logit_bias.detach()
        state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(state, path / "heads.safetensors", metadata={"format": "pt"})
        config: dict[str, Any] = {"model_type": COMPOSITE, "embed_dim": self.embed_dim, "pooling": self.pooling}
        config["weights_sha256"] = {name: hash_weights(path / name) for name in ("vision_model", "text_model")}
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> DualEncoder:
        """Loads what `save_pretrained` wrote, or any CLIP, SigLIP or VisionTextDualEncoder model.

        Args:
            path_or_id: a folder or a Hub id.
            revision: Hub revision.
            token: Hub token.

        Raises:
            FileNotFoundError: no such folder or repository, or one without `config.json`.
            ValueError: a model that is not an image-text pair, or weights that differ from its lineage.
        """
        source = Source(path_or_id, revision=revision, token=token)
        config = read_json(source.file("config.json"))
        folder = source.directory if source.local else None
        if folder is None:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(path_or_id), revision=revision, token=token))
        with reading(folder):
            check_lineage(folder)
            if config.get("model_type") == COMPOSITE:
                return cls._from_composite(folder, config)
            return cls._from_native(folder, config.get("model_type"))

    @classmethod
    def _from_composite(cls, folder: Path, config: dict[str, Any]) -> DualEncoder:
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoTokenizer

        for name, stated in config["weights_sha256"].items():
            if (found := hash_weights(folder / name)) != stated:
                raise ValueError(f"{folder / name} has weights {found}, but the pair was saved with {stated}")
        state = load_file(folder / "heads.safetensors")
        dual = cls(
            VisionEncoder.from_pretrained(folder / "vision_model"),
            AutoModel.from_pretrained(folder / "text_model", use_safetensors=True),
            AutoTokenizer.from_pretrained(folder / "text_model"),
            embed_dim=config["embed_dim"],
            pooling=config["pooling"],
            logit_bias=0.0 if "logit_bias" in state else None,
        )
        missing, unexpected = dual.load_state_dict(state, strict=False)
        assert not unexpected and all(key.startswith(("vision.", "text.")) for key in missing)
        return dual

    @classmethod
    def _from_native(cls, folder: Path, model_type: str | None) -> DualEncoder:
        import transformers

        names = {"clip": "CLIPModel", "siglip": "SiglipModel", "vision-text-dual-encoder": "VisionTextDualEncoderModel"}
        if model_type not in names:
            raise ValueError(
                f"{folder} contains a {model_type!r} model, not an image-text pair; expected one of "
                f"{', '.join(names)} or a folder written by DualEncoder.save_pretrained"
            )
        model = getattr(transformers, names[model_type]).from_pretrained(folder, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        length = min(tokenizer.model_max_length, text_positions(model.text_model) or 512)
        tokenizer = prepare_tokenizer(tokenizer, model.text_model.config.model_type, length, adapt_end=False)
        extras = getattr(model.config, "mllm_vision", None) or {}
        vision = VisionEncoder.from_backbone(
            model.vision_model,
            transformers.AutoImageProcessor.from_pretrained(folder),
            select_layer=extras.get("select_layer"),
            select_feature=extras.get("select_feature"),
        )
        bias = model.logit_bias.item() if model_type == "siglip" else extras.get("logit_bias")
        embed_dim = None if model_type == "siglip" else model.config.projection_dim
        dual = cls(vision, model.text_model, tokenizer, embed_dim=embed_dim, logit_bias=bias)
        with torch.no_grad():
            dual.logit_scale.copy_(model.logit_scale.reshape(()))
        if model_type != "siglip":
            dual.visual_projection, dual.text_projection = model.visual_projection, model.text_projection
        return dual


def build_dual(
    encoder: str,
    *,
    text_tower: str | None = None,
    tokenizer: str | None = None,
    encoder_overrides: dict[str, Any] | None = None,
    text_overrides: dict[str, Any] | None = None,
    image_size: int | None = None,
    embed_dim: int | None = None,
    max_text_length: int | None = None,
    logit_bias: float | None = None,
) -> DualEncoder:
    """A pair by name: a path or Hub id is loaded, a model type is built with random weights.

    Args:
        encoder: path or Hub id of an encoder, or a name of `list_encoders()` such as `"clip_vit_base"`.
        text_tower: path or Hub id, `"clip_text_model"` or `"siglip_text_model"`; by default SigLIP's for a SigLIP
            image tower and CLIP's for any other.
        tokenizer: path or Hub id; by default the text tower's.
        encoder_overrides, text_overrides: config fields of towers built here; by default a text tower is sized by the
            image tower (`encoder.text.towers.text_sizes`).
        image_size: side of the square image.
        embed_dim, max_text_length, logit_bias: see `DualEncoder` and `encoder.text.towers.build_text_tower`.

    Raises:
        ValueError: no tokenizer, overrides for a checkpoint, or incompatible parts.
        FileNotFoundError: a path or Hub id that does not exist.
    """
    from transformers import AutoTokenizer

    from mllm_vision.encoder.sources import build_encoder

    vision = build_encoder(encoder, image_size=image_size, overrides=encoder_overrides)
    siglip = vision.config.model_type == "siglip_vision_model"
    text_tower = text_tower or (SIGLIP_TEXT if siglip else CLIP_TEXT)
    source = tokenizer or text_tower
    if source in (CLIP_TEXT, SIGLIP_TEXT):
        raise ValueError("a text tower built here needs --tokenizer: a path or Hub id, e.g. a language model's folder")
    with reading(source):
        words = AutoTokenizer.from_pretrained(source)
    if text_tower in (CLIP_TEXT, SIGLIP_TEXT):
        sizes = text_sizes(vision.config)
        if "hidden_size" in (text_overrides or {}):  # fields that depend on the width follow the override
            sizes = {"num_hidden_layers": sizes["num_hidden_layers"]} if sizes else {}
        text_overrides = sizes | (text_overrides or {})
    text, prepared = build_text_tower(
        text_tower,
        words,
        overrides=text_overrides,
        max_length=max_text_length,
        projection_size=vision.pooled_size if siglip else None,
    )
    return DualEncoder(vision, text, prepared, embed_dim=embed_dim, logit_bias=logit_bias)


def _projection(width: int, embed_dim: int) -> nn.Linear:
    """Without bias, initialised with standard deviation width ** -0.5 as in CLIP."""
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
