"""The pair saves as what plain transformers runs, and comes back as it was."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from pairs_for_tests import make_dual
from tiny import random_image, tiny_clip, tiny_image_processor, tiny_llama

from mllm_vision.encoder.dual import DualEncoder

LABELS = ["a red circle", "there is a blue square at the left of the image", "star"]
PAIRS = [
    ("clip", None, "clip"),
    ("clip", -3.0, "clip"),
    ("siglip", -10.0, "siglip"),
    ("siglip", None, "siglip"),
    ("dinov2", None, "vision-text-dual-encoder"),
    ("vit", None, "vision-text-dual-encoder"),
    ("vit", -3.0, "mllm_vision_dual"),
]


def stirred(towers, bias):
    """A pair whose every parameter differs from its initial value, so that nothing is saved by luck."""
    dual = make_dual(towers, bias=bias)
    with torch.no_grad():
        for parameter in dual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dual


def scores(dual, images):
    return dual.logits(dual.encode_images(images), dual.encode_texts(LABELS))


@pytest.mark.parametrize(("towers", "bias", "layout"), PAIRS)
def test_saved_and_loaded_is_the_same(towers, bias, layout, tmp_path):
    dual = stirred(towers, bias)
    images = [random_image(i, 40) for i in range(3)]
    assert dual.layout == layout
    dual.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == layout
    loaded = DualEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(scores(loaded, images), scores(dual, images), rtol=1e-5, atol=1e-5)
    assert loaded.kind == ("siglip" if towers == "siglip" else dual.kind)
    assert loaded.max_text_length == dual.max_text_length
    assert loaded.vision.select_layer == dual.vision.select_layer
    loaded.save_pretrained(tmp_path / "again")
    again = DualEncoder.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(scores(again, images), scores(dual, images), rtol=1e-5, atol=1e-5)


def test_transformers_alone_gives_the_same_probabilities(tmp_path, run_python):
    """In a process that cannot import our package: the zero-shot pipeline, and the generic pair by hand."""
    expected = {}
    random_image(0, 40).save(tmp_path / "image.png")
    for towers, bias in (("clip", None), ("siglip", -10.0), ("dinov2", None)):
        dual = stirred(towers, bias)
        dual.save_pretrained(tmp_path / towers)
        row = scores(dual, [tmp_path / "image.png"])[0]
        expected[towers] = (row.sigmoid() if towers == "siglip" else row.softmax(-1)).tolist()
    code = f"""
import json, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, pipeline
folder, labels = {str(tmp_path)!r}, {LABELS!r}
found = {{}}
image = Image.open(folder + "/image.png")
for kind in ("clip", "siglip"):
    run = pipeline("zero-shot-image-classification", model=folder + "/" + kind)
    result = {{row["label"]: row["score"] for row in run(image, candidate_labels=labels, hypothesis_template="{{}}")}}
    found[kind] = [result[label] for label in labels]
model = AutoModel.from_pretrained(folder + "/dinov2").eval()
words = AutoTokenizer.from_pretrained(folder + "/dinov2")(labels, padding=True, return_tensors="pt")
pixels = AutoImageProcessor.from_pretrained(folder + "/dinov2")(image, return_tensors="pt")
words = {{key: words[key] for key in ("input_ids", "attention_mask")}}
with torch.no_grad():
    found["dinov2"] = model(**words, **pixels).logits_per_image.softmax(-1)[0].tolist()
print("RESULT" + json.dumps(found))
"""
    found = json.loads(run_python(code, block_package=True).split("RESULT")[1])
    for towers, values in expected.items():
        assert found[towers] == pytest.approx(values, rel=1e-4, abs=1e-8), towers


def test_a_native_clip_model_becomes_a_pair_with_equal_logits(tmp_path):
    from pairs_for_tests import tokenizer

    model = tiny_clip(text={"vocab_size": 400})
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    tiny_image_processor("clip").save_pretrained(tmp_path)
    dual = DualEncoder.from_pretrained(tmp_path)
    pixels, ids = torch.randn(3, 3, 32, 32), torch.tensor([[5, 6, 3], [7, 3, 0]])
    with torch.no_grad():
        native = model(input_ids=ids, pixel_values=pixels, attention_mask=(ids != 0).long())
        ours = dual.logits(dual.image_features(pixels), dual.text_features(ids))
    torch.testing.assert_close(ours, native.logits_per_image, rtol=1e-5, atol=1e-5)
    # this tokenizer, as a checkpoint of its own, ends no text by itself: loading has to see to it
    assert dual.tokenizer("a red circle")["input_ids"][-1] == 3


def test_embeddings_are_unit_rows_without_gradient_and_modes_come_back():
    dual = make_dual("clip").train()
    dual.vision.backbone.eval()
    images, texts = dual.encode_images([random_image(0), random_image(1)]), dual.encode_texts("a red circle")
    for rows in (images, texts):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
        assert not rows.requires_grad
    assert dual.training and dual.text.training and not dual.vision.backbone.training
    assert dual.encode_images([]).shape == (0, 16) and dual.encode_texts([]).shape == (0, 16)
    pixels = dual.vision.processor(images=[random_image(0)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(images[:1], F.normalize(dual.image_features(pixels), dim=-1), rtol=1e-4, atol=1e-5)


def test_a_decoder_as_text_tower(tmp_path):
    from pairs_for_tests import tokenizer

    from mllm_vision.encoder.text.towers import build_text_tower

    tiny_llama(400).save_pretrained(tmp_path / "llama")
    text, prepared = build_text_tower(str(tmp_path / "llama"), tokenizer())
    dual = DualEncoder(make_dual("clip").vision, text, prepared, embed_dim=16).eval()
    assert dual.layout == "mllm_vision_dual" and dual.pooling == "last"
    with pytest.raises(ValueError, match="no transformers class"):
        dual.native_model()
    images = [random_image(i) for i in range(2)]
    dual.save_pretrained(tmp_path / "dual")
    torch.testing.assert_close(scores(DualEncoder.from_pretrained(tmp_path / "dual"), images), scores(dual, images))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="embed_dim=16 must be equal"):
        make_dual("siglip", bias=-10.0, embed_dim=16)
    with pytest.raises(ValueError, match="pooling='max' is unknown"):
        make_dual("clip", pooling="max")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        DualEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DualEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' model, not an image-text pair"):
        DualEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(("towers", "bias"), [("clip", None), ("vit", -3.0)])
def test_exchanged_weights_are_noticed(towers, bias, tmp_path):
    from mllm_vision.hub.lineage import hash_weights, write_lineage

    dual = make_dual(towers, bias=bias)
    dual.save_pretrained(tmp_path)
    write_lineage(tmp_path, {"weights_sha256": hash_weights(tmp_path)})
    DualEncoder.from_pretrained(tmp_path)
    if towers == "clip":
        stirred(towers, bias).native_model().save_pretrained(tmp_path)
    else:
        stirred(towers, bias).vision.save_pretrained(tmp_path / "vision_model")
    with pytest.raises(ValueError, match="(?s)weights.*[0-9a-f]{64}.*[0-9a-f]{64}"):
        DualEncoder.from_pretrained(tmp_path)
