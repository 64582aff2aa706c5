"""Cached features: the numbers of training without them, shared between runs, and never those of other weights."""

from __future__ import annotations

import pickle
from collections import namedtuple
from io import BytesIO

import pytest
import tiny
import torch

from mllm_vision.data.images.files import BadImage
from mllm_vision.vlm import feature_cache
from mllm_vision.vlm.feature_cache import cache_features
from mllm_vision.vlm.feature_files import content_key
from mllm_vision.vlm.freezing import freeze


def encoded(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def cells():
    """Rows of image cells in several forms; the last row repeats the first, and one cell is broken."""
    images = [encoded(tiny.random_image(seed)) for seed in range(6)]
    rows = [[{"bytes": image, "path": None}] for image in images]
    return [*rows[:4], [images[4], images[5]], [{"bytes": b"no image", "path": None}], [], rows[0]]


@pytest.fixture
def aligned(build):
    """`aligned(**options)` -> (task with a frozen tower, its layout)."""

    def make(**options):
        task, processor = build(**options)
        freeze(task, ["connector"])
        return task, task.system.layout(task.model, processor)

    return make


def counted(task, monkeypatch):
    """The images that the tower has seen."""
    seen, features = [], task.system.features
    monkeypatch.setattr(
        task.system,
        "features",
        lambda model, images: seen.append(len(images["pixel_values"])) or features(model, images),
    )
    return seen


@pytest.mark.parametrize(
    ("kind", "autocast"), [("clip", None), ("siglip", None), ("dinov2", None), ("clip", torch.bfloat16)]
)
def test_loss_and_gradients_equal_those_without_a_cache(aligned, make_batch, cells, tmp_path, kind, autocast):
    task, layout = aligned(kind=kind)
    cached = cache_features(task, layout, cells, folder=tmp_path, batch_size=4, autocast=autocast)
    batch = make_batch(task, rows=3)
    values = [cells[2][0], cells[4][1], cells[2][0]]
    found = {}
    for name, used in {"pixels": layout, "cache": cached}.items():
        images = used([used.load(value) for value in values])
        batch = {key: value for key, value in batch.items() if key not in ("pixel_values", "image_features")} | images
        task.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = task.train()(**batch).loss
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in task.parameters() if p.grad is not None)]
    assert "image_features" in batch and "pixel_values" not in batch
    assert len(found["pixels"]) > 2
    for ours, plain in zip(found["cache"], found["pixels"], strict=True):
        assert torch.equal(ours, plain)


def test_images_are_stored_once_and_a_second_run_computes_nothing(aligned, cells, tmp_path, monkeypatch):
    task, layout = aligned()
    seen = counted(task, monkeypatch)
    cached = cache_features(task, layout, cells, folder=tmp_path)
    assert len(cached.cache) == 6
    del seen[:]
    other, layout = aligned()
    freeze(other, ["connector"])
    torch.nn.init.normal_(other.model.model.multi_modal_projector.linear_1.weight)  # another connector of a sweep
    seen = counted(other, monkeypatch)
    again = cache_features(other, layout, [cells[3], *cells], folder=tmp_path)
    assert sum(seen) == 3 and len(again.cache) == 6  # the trial of the first two images, alone and together
    assert len(list(tmp_path.glob("*.features"))) == 1
    image = again.load(cells[1][0])
    torch.testing.assert_close(again([image])["image_features"], cached([image])["image_features"], rtol=0, atol=0)


def test_new_images_are_added(aligned, cells, tmp_path):
    task, layout = aligned()
    cache_features(task, layout, cells[:2], folder=tmp_path)
    cached = cache_features(task, layout, cells, folder=tmp_path)
    assert len(cached.cache) == 6 and len(list(tmp_path.glob("*.features"))) == 2
    for row in cells[:5]:
        images = [layout.load(value) for value in row]
        expected = task.system.features(task.model, layout(images))
        found = cached([cached.load(value) for value in row])["image_features"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_features_take_half_the_room(aligned, cells, tmp_path, dtype):
    task, layout = aligned()
    whole = cache_features(task, layout, cells, folder=tmp_path / "whole")
    half = cache_features(task, layout, cells, folder=tmp_path / "half", dtype=dtype)
    values = [cells[4][1], cells[0][0]]
    exact = whole([whole.load(value) for value in values])["image_features"]
    rounded = half([half.load(value) for value in values])["image_features"]
    assert rounded.dtype == dtype and torch.equal(rounded, exact.to(dtype))
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.features")) for name in ("whole", "half")]
    assert sizes[0] == 2 * sizes[1]


def test_a_folder_without_name_depends_on_the_weights(aligned, cells, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    task, layout = aligned()
    first = cache_features(task, layout, cells)
    with torch.no_grad():
        task.model.model.vision_tower.post_layernorm.bias.add_(1)
    second = cache_features(task, layout, cells)
    assert first.cache.folder != second.cache.folder and first.cache.folder.is_relative_to(tmp_path)


def test_features_of_another_run_are_refused(aligned, cells, tmp_path):
    task, layout = aligned()
    cache_features(task, layout, cells, folder=tmp_path)
    with pytest.raises(ValueError, match=r"another type of the features \(float32 there, float16 here\)"):
        cache_features(task, layout, cells, folder=tmp_path, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"precision of the tower \(float32 there, float32 under autocast to bfloat16 here\)"
    ):
        cache_features(task, layout, cells, folder=tmp_path, autocast=torch.bfloat16, dtype=torch.float32)
    layered = aligned(select_layer=-1)
    with pytest.raises(ValueError, match="another vision tower or selected layer; name"):
        cache_features(*layered, cells, folder=tmp_path)
    with torch.no_grad():
        task.model.model.vision_tower.post_layernorm.bias.add_(1)
    with pytest.raises(
        ValueError, match=r"hash of its weights \(\w+ there, \w+ here\); name another folder with --features_dir"
    ):
        cache_features(task, layout, cells, folder=tmp_path)


def test_another_image_processor_is_refused(aligned, cells, tmp_path):
    task, layout = aligned()
    cache_features(task, layout, cells, folder=tmp_path)
    layout.processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="another image processor or layout"):
        cache_features(task, layout, cells, folder=tmp_path)


def test_a_folder_of_something_else_is_refused(aligned, cells, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"not a feature cache \(it holds thesis.tex\)"):
        cache_features(*aligned(), cells, folder=tmp_path)


def test_what_trains_or_is_blind_has_no_cache(aligned, cells, tmp_path):
    task, layout = aligned()
    freeze(task, ["connector", "encoder"])
    with pytest.raises(ValueError, match="frozen encoder, but [0-9]+ of its tensors train"):
        cache_features(task, layout, cells, folder=tmp_path)
    task, layout = aligned(blind=True)
    with pytest.raises(ValueError, match="blind"):
        cache_features(task, layout, cells, folder=tmp_path)


def test_too_small_a_disk_is_refused_before_anything_is_computed(aligned, cells, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(ValueError, match=r"features of 7 images take .* MiB free; name a folder on a larger disk"):
        cache_features(*aligned(), cells, folder=tmp_path)
    assert not list(tmp_path.glob("*.features"))


def test_an_interrupted_part_does_not_count(aligned, cells, tmp_path, monkeypatch):
    task, layout = aligned()
    monkeypatch.setattr("mllm_vision.vlm.feature_files._PART_BYTES", 1)  # one image a part
    features, calls = task.system.features, []

    def interrupted(model, images):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return features(model, images)

    monkeypatch.setattr(task.system, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_features(task, layout, cells, folder=tmp_path, batch_size=1)
    monkeypatch.setattr(task.system, "features", features)
    kept = len(list(tmp_path.glob("[!.]*.npz")))
    assert 0 < kept < 6 and not list(tmp_path.glob(".*.features"))
    assert len(cache_features(task, layout, cells, folder=tmp_path).cache) == 6


def test_workers_open_the_files_themselves(aligned, cells, tmp_path):
    task, layout = aligned()
    cached = cache_features(task, layout, cells, folder=tmp_path)
    data = pickle.dumps(cached)
    assert len(data) < 50_000
    copy = pickle.loads(data)
    image = cached.load(cells[3][0])
    assert copy.load(cells[3][0]) == image and image.size == layout.load(cells[3][0]).size
    assert torch.equal(copy([image])["image_features"], cached([image])["image_features"])
    with pytest.raises(BadImage, match="no features"):
        copy.load(encoded(tiny.random_image(99)))


def test_keys_depend_on_content_alone(tmp_path):
    image = tiny.random_image(1)
    data = encoded(image)
    file = tmp_path / "a.png"
    file.write_bytes(data)
    same = {content_key(value) for value in (data, {"bytes": data, "path": "x"}, str(file), file.as_uri(), file)}
    assert len(same) == 1
    assert content_key(image) == content_key(image.copy()) != content_key(tiny.random_image(2))
    assert content_key(image) != content_key(image.convert("L")) != content_key(data)
    with pytest.raises(BadImage, match="cannot be read"):
        content_key(str(tmp_path / "missing.png"))
