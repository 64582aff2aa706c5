"""The lines of use in a model card: what a reader can paste, for each kind of model."""

from __future__ import annotations

from typing import Any

from mllm_vision.encoder.families import FAMILIES

_ENCODER = """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}"{options}).eval()
image = Image.new("RGB", (320, 240), "orange")  # your image: Image.open(...).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"), output_hidden_states=True)
tokens = {tokens}  # [batch, tokens, width], what a language model sees
{vector}```
{limits}
The same through mllm_vision, running no more layers than needed:

```python
from mllm_vision import VisionEncoder

tokens = VisionEncoder.from_pretrained("{name}").encode([image])
```"""

_NO_POOLER = """
This ViT has no pooler. Without `add_pooling_layer=False`, and in a `pipeline`, transformers draws a random one and says
so ("pooler.dense.weight | MISSING"): its `pooler_output` then means nothing, while the tokens stay right.
"""

_DUAL = """```python
from PIL import Image
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{name}")
image = Image.new("RGB", (320, 240), "orange")  # your image
for answer in classify(image, candidate_labels=["a circle", "a square"]):
    print(answer["label"], answer["score"])
```"""

_OWN_DUAL = """```python
from PIL import Image
from mllm_vision import DualEncoder

pair = DualEncoder.from_pretrained("{name}")
image = Image.new("RGB", (320, 240), "orange")  # your image
print(pair.encode_images([image]) @ pair.encode_texts(["a circle", "a square"]).T)
```"""

_VLM = """```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("{name}")
model = LlavaForConditionalGeneration.from_pretrained("{name}").eval()
image = Image.new("RGB", (320, 240), "orange")  # your image
question = [{{"type": "image", "image": image}}, {{"type": "text", "text": "what colour is it?"}}]
options = {{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}}
inputs = processor.apply_chat_template([{{"role": "user", "content": question}}], **options)
answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

_MODEL = """```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}")
```"""


def snippet(kind: str, config: dict[str, Any], name: str, *, pooler: bool = True) -> str:
    """Ten lines of use of a model of a `kind` (`encoder`, `dual`, `vlm`, `model`), loading `name`.

    `pooler=False` is for a ViT whose weights hold no pooler: transformers has to be told, and the image vector is the
    class token.
    """
    if kind == "encoder":
        own = config.get("mllm_vision") or {}
        layer, feature = own.get("select_layer", -1), own.get("select_feature", "patch")
        words = {"options": "", "vector": "", "limits": ""}
        if not pooler:
            words["options"] = ", add_pooling_layer=False"
            words["vector"] = "vector = outputs.last_hidden_state[:, 0]  # [batch, width], the image as a whole\n"
            words["limits"] = _NO_POOLER
        return _ENCODER.format(name=name, tokens=_tokens(config, layer, feature, pooler), **words)
    if config.get("model_type") == "mllm_vision_dual":
        return _OWN_DUAL.format(name=name)
    return {"dual": _DUAL, "vlm": _VLM}.get(kind, _MODEL).format(name=name)


def _tokens(config: dict[str, Any], layer: int, feature: str, pooler: bool) -> str:
    """How plain Python takes the selected tokens out of the model's `outputs`."""
    family = FAMILIES[config["model_type"]]
    registers = int(config.get("num_register_tokens") or 0)
    states = f"outputs.hidden_states[{layer}]"
    if feature == "pooled":
        return "outputs.pooler_output.flatten(1)[:, None]" if pooler else "outputs.last_hidden_state[:, :1]"
    if family.convolutional:
        return f"{states}.flatten(2).transpose(1, 2)"
    if feature == "cls":
        return f"{states}[:, :1]"
    if feature == "cls_patch":
        return f"{states}[:, [0, *range({registers + 1}, {states}.shape[1])]]" if registers else states
    prefix = int(family.has_cls) + registers
    return f"{states}[:, {prefix}:]" if prefix else states
