"""BibTeX for model cards: the methods and architectures that a model stands on."""

from __future__ import annotations

from typing import Any

_ENTRIES = {
    "clip": ("radford2021clip", "Learning Transferable Visual Models From Natural Language Supervision",
             "Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others", "2021", "2103.00020"),
    "siglip": ("zhai2023siglip", "Sigmoid Loss for Language Image Pre-Training",
               "Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas", "2023", "2303.15343"),
    "itc": ("li2021albef", "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation",
            "Li, Junnan and Selvaraju, Ramprasaath R. and Gotmare, Akhilesh Deepak and others", "2021", "2107.07651"),
    "simclr": ("chen2020simclr", "A Simple Framework for Contrastive Learning of Visual Representations",
               "Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey", "2020", "2002.05709"),
    "moco_v1": ("he2019moco", "Momentum Contrast for Unsupervised Visual Representation Learning",
                "He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross", "2019", "1911.05722"),
    "moco_v2": ("chen2020mocov2", "Improved Baselines with Momentum Contrastive Learning",
                "Chen, Xinlei and Fan, Haoqi and Girshick, Ross and He, Kaiming", "2020", "2003.04297"),
    "moco_v3": ("chen2021mocov3", "An Empirical Study of Training Self-Supervised Vision Transformers",
                "Chen, Xinlei and Xie, Saining and He, Kaiming", "2021", "2104.02057"),
    "byol": ("grill2020byol", "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
             "Grill, Jean-Bastien and Strub, Florian and Altch{\\'e}, Florent and others", "2020", "2006.07733"),
    "simsiam": ("chen2020simsiam", "Exploring Simple Siamese Representation Learning",
                "Chen, Xinlei and He, Kaiming", "2020", "2011.10566"),
    "dino": ("caron2021dino", "Emerging Properties in Self-Supervised Vision Transformers",
             "Caron, Mathilde and Touvron, Hugo and Misra, Ishan and others", "2021", "2104.14294"),
    "barlow_twins": ("zbontar2021barlow", "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
                     "Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, St{\\'e}phane", "2021",
                     "2103.03230"),
    "vicreg": ("bardes2021vicreg", "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
               "Bardes, Adrien and Ponce, Jean and LeCun, Yann", "2021", "2105.04906"),
    "pcl": ("li2020pcl", "Prototypical Contrastive Learning of Unsupervised Representations",
            "Li, Junnan and Zhou, Pan and Xiong, Caiming and Hoi, Steven C. H.", "2020", "2005.04966"),
    "supcon": ("khosla2020supcon", "Supervised Contrastive Learning",
               "Khosla, Prannay and Teterwak, Piotr and Wang, Chen and others", "2020", "2004.11362"),
    "mae": ("he2021mae", "Masked Autoencoders Are Scalable Vision Learners",
            "He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross",
            "2021", "2111.06377"),
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
    "efficientnet": ("efficientnet",),
    "llava": ("llava",),
}


def citations(kind: str, config: dict[str, Any], recipe: dict[str, Any]) -> str:
    """A BibTeX block for a model's towers and for the objective it was trained with; empty if none is known."""
    names: list[str] = []
    vision = config if kind == "encoder" else config.get("vision_config") or {}
    for model_type in (config.get("model_type"), vision.get("model_type")):
        names += _OF_TYPE.get(str(model_type), ())
    objective = str(recipe.get("objective", ""))
    names += [objective] if objective in _ENTRIES else []
    blocks = []
    for name in dict.fromkeys(names):
        key, title, author, year, arxiv = _ENTRIES[name]
        blocks.append(
            f"@article{{{key},\n  title = {{{title}}},\n  author = {{{author}}},\n"
            f"  journal = {{arXiv:{arxiv}}},\n  year = {{{year}}}\n}}"
        )
    return "```bibtex\n" + "\n\n".join(blocks) + "\n```" if blocks else ""
