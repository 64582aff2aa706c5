"""Small models, tokenizers, images and data files made on the spot, so that no test needs a download.

Everything is deterministic in its ``seed``. Models are 32 px, patch 8 (16 patches), width 32, two layers by
default; any configuration field may be overridden by keyword.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("left", "right", "top", "bottom")
COLOUR_VALUES = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40)}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'answer: ' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ 'question: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'answer: ' }}{% endif %}"
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def _build(model_class: type, config: Any, seed: int) -> Any:
    """Random weights in evaluation mode; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    return model.eval()


def tiny_clip_vision(seed: int = 0, **overrides: Any) -> Any:
    """A CLIPVisionModel with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return _build(CLIPVisionModel, CLIPVisionConfig(**{**SIZES, **overrides}), seed)


def tiny_siglip_vision(seed: int = 0, **overrides: Any) -> Any:
    """A SiglipVisionModel with random weights."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return _build(SiglipVisionModel, SiglipVisionConfig(**{**SIZES, **overrides}), seed)


def tiny_dinov2(seed: int = 0, **overrides: Any) -> Any:
    """A Dinov2Model with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    return _build(Dinov2Model, Dinov2Config(**{**sizes, "mlp_ratio": 2, **overrides}), seed)


def tiny_vit(seed: int = 0, **overrides: Any) -> Any:
    """A ViTModel with random weights."""
    from transformers import ViTConfig, ViTModel

    return _build(ViTModel, ViTConfig(**{**SIZES, **overrides}), seed)


def tiny_clip(seed: int = 0, *, projection_dim: int = 16, vision: dict | None = None, text: dict | None = None) -> Any:
    """A whole CLIPModel with random weights; `vision` and `text` override the towers' fields."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={**SIZES, "projection_dim": projection_dim, **(vision or {})},
        text_config={**TEXT_SIZES, "projection_dim": projection_dim, **(text or {})},
        projection_dim=projection_dim,
    )
    return _build(CLIPModel, config, seed)


def tiny_siglip(seed: int = 0, *, vision: dict | None = None, text: dict | None = None) -> Any:
    """A whole SiglipModel with random weights; `vision` and `text` override the towers' fields."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(vision_config={**SIZES, **(vision or {})}, text_config={**TEXT_SIZES, **(text or {})})
    return _build(SiglipModel, config, seed)


def tiny_llama(vocab: int = 256, seed: int = 0, **overrides: Any) -> Any:
    """A LlamaForCausalLM with random weights, ids pad=0 bos=2 eos=3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return _build(LlamaForCausalLM, LlamaConfig(**{**sizes, **overrides}), seed)


def tiny_image_processor(kind: str = "clip", size: int = 32) -> Any:
    """The processor that goes with `kind`: "clip", "siglip", "vit" or "dinov2", for `size` px images."""
    import transformers

    square = {"height": size, "width": size}
    classes = {
        "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": size}, "crop_size": square}),
        "siglip": ("SiglipImageProcessor", {"size": square}),
        "vit": ("ViTImageProcessor", {"size": square}),
        "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": size}, "crop_size": square}),
    }
    if kind not in classes:
        raise ValueError(f"kind={kind!r} is none of {sorted(classes)}")
    name, settings = classes[kind]
    return getattr(transformers, name)(**settings)


def tiny_sentences(n: int = 60, seed: int = 0) -> list[str]:
    """`n` short sentences of a closed vocabulary."""
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(n):
        colour, shape, place = rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(PLACES)
        sentences.append(
            str(
                rng.choice(
                    [
                        f"a {colour} {shape}",
                        f"a {colour} {shape} on the {place}",
                        f"question: what colour is the {shape}? answer: {colour}",
                        f"question: how many {shape}s are there? answer: {rng.integers(1, 5)}",
                        f"there is a {colour} {shape} at the {place} of the image",
                    ]
                )
            )
        )
    return sentences


def tiny_tokenizer(path: str | Path, vocab_size: int = 400) -> Any:
    """A sentencepiece LlamaTokenizer trained on tiny sentences, saved in and loaded from the folder `path`.

    Ids are pad=0 unk=1 bos=2 eos=3, then `<image>`, then the bytes; it carries a chat template with
    generation marks. `len(tokenizer)` is what a language model's vocabulary must hold.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_sentences(60)),
        model_prefix=str(path / "tokenizer"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        model_type="bpe",  # LlamaTokenizer rebuilds merges: a unigram model would give other ids
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        user_defined_symbols=["<image>"],
        num_threads=1,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<image>"],
        "model_max_length": 256,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    tokenizer = LlamaTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return tokenizer


def random_image(seed: int = 0, size: int | tuple[int, int] = 32, mode: str = "RGB") -> Image.Image:
    """An image of smooth random colours; `size` is a side or (width, height)."""
    width, height = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    if mode == "I;16":
        grey = np.asarray(image.convert("L"), dtype=np.uint16) * 257
        return Image.fromarray(grey)
    return image if mode == "RGB" else image.convert(mode)


def image_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    """`image` encoded as `kind`."""
    stream = BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def labelled_image(index: int, size: int = 32) -> tuple[Image.Image, str, str]:
    """An image that can be learnt: a flat colour with a darker block whose corner tells the shape."""
    colour, shape = COLOURS[index % 4], SHAPES[(index // 4) % 4]
    pixels = np.empty((size, size, 3), dtype=np.uint8)
    pixels[:] = COLOUR_VALUES[colour]
    half, corner = size // 2, SHAPES.index(shape)
    top, left = (corner // 2) * half, (corner % 2) * half
    pixels[top : top + half, left : left + half] //= 3
    noise = np.random.default_rng(index).integers(0, 12, pixels.shape, dtype=np.uint8)
    return Image.fromarray(np.clip(pixels.astype(np.int64) + noise, 0, 255).astype(np.uint8)), colour, shape


def write_pairs_parquet(path: str | Path, n: int = 16, captions_each: int = 1, size: int = 32) -> Path:
    """`n` image-caption pairs as the toolkit's Parquet.

    Columns: image, captions (list[str]), questions, answers, question_types (lists of str, two each), label
    (ClassLabel "red circle"...), label_name.
    """
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    wordings = ("a {c} {s}", "there is a {c} {s}", "the {s} is {c}", "one {s}, {c}", "an image of a {c} {s}")
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    rows: dict[str, list] = {
        name: [] for name in ("image", "captions", "questions", "answers", "question_types", "label", "label_name")
    }
    for index in range(n):
        image, colour, shape = labelled_image(index, size)
        rows["image"].append({"bytes": image_bytes(image), "path": None})
        rows["captions"].append([wordings[k % len(wordings)].format(c=colour, s=shape) for k in range(captions_each)])
        rows["questions"].append([f"what colour is the {shape}?", "what shape is there?"])
        rows["answers"].append([colour, shape])
        rows["question_types"].append(["colour", "shape"])
        rows["label"].append(names.index(f"{colour} {shape}"))
        rows["label_name"].append(f"{colour} {shape}")
    text = List(Value("string"))
    features = Features(
        {
            "image": ImageFeature(),
            "captions": text,
            "questions": text,
            "answers": text,
            "question_types": text,
            "label": ClassLabel(names=names),
            "label_name": Value("string"),
        }
    )
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def write_conversations_jsonl(path: str | Path, n: int = 16, style: str = "messages", size: int = 32) -> Path:
    """`n` one-image conversations as JSONL beside an `images/` folder; the `image` column holds full paths.

    style "messages": a `messages` column of role/content with image and text parts; style "llava": a
    `conversations` column of from/value with `<image>` in the text.
    """
    if style not in ("messages", "llava"):
        raise ValueError(f"style={style!r} is neither 'messages' nor 'llava'")
    path = Path(path)
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for index in range(n):
            image, colour, shape = labelled_image(index, size)
            file = images / f"{index:04d}.png"
            image.save(file)
            question, answer = f"what colour is the {shape}?", colour
            if style == "messages":
                turns = [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ]
                row: dict[str, Any] = {"image": str(file), "messages": turns}
            else:
                said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                row = {"id": str(index), "image": str(file), "conversations": said}
            stream.write(json.dumps(row) + "\n")
    return path
