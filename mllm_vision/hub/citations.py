"""BibTeX for model cards: the architectures that a model stands on, and its method."""

from __future__ import annotations

from typing import Any

_ENTRIES = {
    "clip": ("radford2021clip", "Learning Transferable Visual Models From Natural Language Supervision",
             "Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others", "2021", "2103.00020"),
    "siglip": ("zhai2023siglip", "Sigmoid Loss for Language Image Pre-Training",
               "Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas", "2023", "2303.15343"),
    "llava": ("liu2023llava", "Visual Instruction Tuning",
              "Liu, Haotian and Li, Chunyuan and Wu, Qingyang and Lee, Yong Jae", "2023", "2304.08485"),
    "vit": ("dosovitskiy2020vit", "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
            "Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and others", "2020", "2010.11929"),
    "dinov2": ("oquab2023dinov2", "DINOv2: Learning Robust Visual Features without Supervision",
               "Oquab, Maxime and Darcet, Timoth{\\'e}e and Moutakanni, Th{\\'e}o and others", "2023", "2304.07193"),
    "registers": ("darcet2023registers", "Vision Transformers Need Registers",
                  "Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and others", "2023", "2309.16588"),
    "dinov3": ("simeoni2025dinov3", "DINOv3",
               "Sim{\\'e}oni, Oriane and Vo, Huy V. and Seitzer, Maximilian and others", "2025", "2508.10104"),
    "resnet": ("he2015resnet", "Deep Residual Learning for Image Recognition",
               "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian", "2015", "1512.03385"),
    "convnext": ("liu2022convnext", "A ConvNet for the 2020s",
                 "Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and others", "2022", "2201.03545"),
    "convnextv2": ("woo2023convnextv2", "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders",
                   "Woo, Sanghyun and Debnath, Shoubhik and Hu, Ronghang and others", "2023", "2301.00808"),
    "efficientnet": ("tan2019efficientnet", "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
                     "Tan, Mingxing and Le, Quoc V.", "2019", "1905.11946"),
}  # fmt: skip

_OF_TYPE = {
    "clip_vision_model": ("clip",),
    "clip": ("clip",),
    "siglip_vision_model": ("siglip",),
    "siglip": ("siglip",),
    "vit": ("vit",),
    "dinov2": ("dinov2",),
    "dinov2_with_registers": ("dinov2", "registers"),
    "dinov3_vit": ("dinov3",),
    "resnet": ("resnet",),
    "convnext": ("convnext",),
    "convnextv2": ("convnextv2",),
    "efficientnet": ("efficientnet",),
    "llava": ("llava",),
}


def bibtex(key: str, title: str, author: str, year: str, arxiv: str) -> str:
    """The BibTeX entry of a paper on arXiv."""
    fields = {"title": title, "author": author, "journal": f"arXiv:{arxiv}", "year": year}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@article{{{key},\n{lines}\n}}"


def citations(kind: str, config: dict[str, Any], method: str = "") -> str:
    """A BibTeX block for a model's towers and the method it was trained with; empty if none is known.

    Args:
        kind: `"encoder"` where `config` is the tower's own.
        config: of the model.
        method: the entry that the method's class states (`Objective.citation`).
    """
    vision = config if kind == "encoder" else config.get("vision_config") or {}
    names = [name for part in (config, vision) for name in _OF_TYPE.get(str(part.get("model_type")), ())]
    found = dict.fromkeys([*(bibtex(*_ENTRIES[name]) for name in names), *([method] if method else [])])
    return "```bibtex\n" + "\n\n".join(found) + "\n```" if found else ""
