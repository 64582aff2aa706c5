"""Views: two or more random images made of one, as each method's paper makes them, for a whole batch at once.

An image is decoded once; its views are made of the batch's 8-bit pixels on their device, each row with
parameters of its own, drawn from the row's seed. So they are the same in chunks, in any order and on any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mllm_vision.data.views.draws import View, ViewParameters, draw_view
from mllm_vision.data.views.pixels import RESAMPLES, make_views
from mllm_vision.errors import unknown_name

_TORCHVISION = (0.4, 0.4, 0.4, 0.1)  # the jitter of MoCo v2 and those after it
_BYOL = (0.4, 0.4, 0.2, 0.1)


@dataclass(frozen=True)
class ViewPolicy:
    """The views of a method.

    Attributes:
        views: one distribution a view.
        local: the distribution of the small crops, and how many (`local_views`); `local_share` is their side as a
            share of the views' (96 of 224 pixels in DINO).
        resample: "bilinear" or "bicubic".
        strength: multiplies the jitter's strengths.
        blur_share: the blur's kernel as a share of the views' side (SimCLR and BYOL: a tenth), otherwise three
            deviations.
        paper: whose settings these are.
    """

    views: tuple[View, ...]
    paper: str
    local: View | None = None
    local_views: int = 0
    local_share: float = 96 / 224
    resample: str = "bilinear"
    strength: float = 1.0
    blur_share: float | None = None


_SIMCLR = View(jitter=(0.8, 0.8, 0.8, 0.2), gray=0.2, blur=0.5)
_MOCO_V2 = View(scale=(0.2, 1.0), jitter=_TORCHVISION, gray=0.2, blur=0.5)
_FIRST, _SECOND = (View(jitter=_BYOL, gray=0.2, blur=b, solarize=s) for b, s in ((1.0, 0.0), (0.1, 0.2)))
_MOCO_V1 = View(scale=(0.2, 1.0), jitter=(0.4,) * 4, jitter_probability=1.0, gray=0.2, gray_first=True)


def _multi_crop(paper: str, border: float, lowest: float, share: float) -> ViewPolicy:
    views = tuple(replace(view, scale=(border, 1.0)) for view in (_FIRST, _SECOND))
    local = View(scale=(lowest, border), jitter=_BYOL, gray=0.2, blur=0.5)
    return ViewPolicy(views, paper, local=local, local_views=8, local_share=share, resample="bicubic")


# The operations are Pillow's in all of them, as in SimCLR's appendix; docs/views.md says where the code of SimCLR and
# BYOL (TensorFlow, JAX) has others.
POLICIES = {
    "simclr": ViewPolicy((_SIMCLR,) * 2, "SimCLR (Chen 2020)", resample="bicubic", strength=0.5, blur_share=0.1),
    "moco_v1": ViewPolicy((_MOCO_V1,) * 2, "MoCo (He 2020)"),
    "moco_v2": ViewPolicy((_MOCO_V2,) * 2, "MoCo v2 (Chen 2020)"),
    "moco_v3": ViewPolicy((_FIRST, _SECOND), "MoCo v3 (Chen 2021)"),
    "byol": ViewPolicy((_FIRST, _SECOND), "BYOL (Grill 2020)", resample="bicubic", blur_share=0.1),
    "simsiam": ViewPolicy((_MOCO_V2,) * 2, "SimSiam (Chen and He 2021)"),
    "barlow_twins": ViewPolicy((_FIRST, _SECOND), "Barlow Twins (Zbontar 2021)", resample="bicubic"),
    "vicreg": ViewPolicy((_FIRST, _SECOND), "VICReg (Bardes 2022)", resample="bicubic"),
    "pcl": ViewPolicy((_MOCO_V2,) * 2, "PCL (Li 2021)"),
    "supcon": ViewPolicy((replace(_MOCO_V2, blur=0.0),) * 2, "SupCon (Khosla 2020)"),
    "dino": _multi_crop("DINO (Caron 2021)", 0.4, 0.05, 96 / 224),
    "dinov2": _multi_crop("DINOv2 (Oquab 2023)", 0.32, 0.05, 98 / 224),
    "mae": ViewPolicy((View(scale=(0.2, 1.0)),), "MAE (He 2022)", resample="bicubic"),
    "clip": ViewPolicy((View(scale=(0.9, 1.0), flip=0.0),), "CLIP (Radford 2021)", resample="bicubic"),
}


@dataclass
class ViewArguments:
    """Flags of the views; null means the policy's own value. They apply to every view and to the local crops."""

    views: str | None = field(default=None, metadata={"help": "The view policy; by default the method's own."})
    crop_scale: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest share of the area that a crop keeps (not of local crops)."}
    )
    flip: float | None = field(default=None, metadata={"help": "Probability of a horizontal flip."})
    jitter_strength: float | None = field(
        default=None,
        metadata={"help": "Multiplies the colour jitter (simclr: 0.5; the paper's value for ImageNet is 1.0)."},
    )
    jitter_probability: float | None = field(default=None, metadata={"help": "Probability of the colour jitter."})
    gray: float | None = field(default=None, metadata={"help": "Probability of conversion to greyscale."})
    blur: float | None = field(
        default=None, metadata={"help": "Probability of the blur in every view (0 for 32 px images in the papers)."}
    )
    blur_sigma: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest standard deviation of the blur, in pixels."}
    )
    solarize: float | None = field(default=None, metadata={"help": "Probability of solarising in every view."})
    local_views: int | None = field(default=None, metadata={"help": "Number of local crops per image (dino, dinov2)."})
    local_size: int | None = field(
        default=None,
        metadata={"help": "Side of local crops in pixels; by default 96/224 of the views', a multiple of the patch."},
    )
    local_scale: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest share of the area that a local crop keeps."}
    )

    def apply(self, policy: ViewPolicy) -> ViewPolicy:
        """The policy with these values in place of its own.

        Raises:
            ValueError: a value that is out of its range, or one about local crops where the policy has none.
        """
        if policy.local is None:
            given = [name for name in ("local_views", "local_size", "local_scale") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{', '.join(given)}: {policy.paper} has no local crops; use --views dino or dinov2")
        strength = policy.strength if self.jitter_strength is None else self.jitter_strength
        if strength < 0:
            raise ValueError(f"jitter_strength={strength} must not be negative; 0 turns the jitter off")
        count = policy.local_views if self.local_views is None else self.local_views
        if count < 0:
            raise ValueError(f"local_views={count} must not be negative")
        views = tuple(self._changed(view, strength, self.crop_scale) for view in policy.views)
        local = None if policy.local is None else self._changed(policy.local, strength, self.local_scale)
        return replace(policy, views=views, local=local, local_views=count, strength=1.0)

    def _changed(self, view: View, strength: float, scale: Sequence[float] | None) -> View:
        names = ("flip", "jitter_probability", "gray", "blur", "solarize")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        given["jitter"] = tuple(strength * each for each in view.jitter)
        if scale is not None:
            given["scale"] = tuple(scale)
        if self.blur_sigma is not None:
            given["sigma"] = tuple(self.blur_sigma)
        return replace(view, **given)


class ViewMaker:
    """Makes the views of a batch of images, on their device.

    Args:
        policy: a name of `POLICIES`, or a `ViewPolicy`; `arguments.views` wins over it.
        image_size: of the views: a side, or (height, width).
        mean, std: of pixels in 0..1, three each (an image processor's `image_mean` and `image_std`).
        arguments: flags in place of the policy's own values.
        patch_size: of the encoder, where it has patches: the sides of local crops are multiples of it.

    A call takes the batch of a `ImageCollator` ("pixels" `[B, 3, H, W]` uint8, "sizes" `[B, 2]`, "seeds" `[B]`) and
    returns it with "views" `[B, V, 3, h, w]` float32, and "local_views" `[B, L, 3, s, s]` where the policy has
    local crops, in place of the pixels and sizes. A batch without pixels is returned unchanged.

    Attributes: `policy` (as resolved), `size` (h, w), `local_size` (s, or None), `num_views`, `columns` (what it adds).

    Raises:
        ValueError: an unknown policy, a flag out of its range, a size that is not a multiple of `patch_size`.

    >>> from mllm_vision.data.images.dataset import ImageCollator
    >>> from PIL import Image
    >>> batch = ImageCollator()([{"image": Image.new("RGB", (40, 30), "red"), "key": 1}])
    >>> ViewMaker("byol", 32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(batch)["views"].shape
    torch.Size([1, 2, 3, 32, 32])
    """

    def __init__(
        self,
        policy: str | ViewPolicy,
        image_size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        arguments: ViewArguments | None = None,
        *,
        patch_size: int | None = None,
    ) -> None:
        arguments = ViewArguments() if arguments is None else arguments
        policy = policy if arguments.views is None else arguments.views
        self.name = policy if isinstance(policy, str) else policy.paper
        self.policy = arguments.apply(view_policy(policy))
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.size = (int(height), int(width))
        if min(self.size) < 1:
            raise ValueError(f"image_size={image_size} must be positive")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} must be three numbers each, std above 0")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.local_size = self._local_size(arguments.local_size, patch_size or 1) if self.policy.local_views else None
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}
        # glibc gives large blocks back to the system each time, to get them again page by page, until it has seen one
        # of this size freed (never touched, so it costs nothing): views on a CPU are a third faster afterwards.
        torch.empty(31 << 20, dtype=torch.uint8)

    @classmethod
    def for_encoder(cls, policy: str | ViewPolicy, encoder: Any, arguments: ViewArguments | None = None) -> ViewMaker:
        """Views as a `VisionEncoder` takes them: of its size, normalised as its image processor does."""
        processor = encoder.processor
        given = (encoder.image_size, processor.image_mean, processor.image_std)
        return cls(policy, *given, arguments, patch_size=encoder.patch_size)

    @classmethod
    def for_objective(cls, objective: Any, arguments: ViewArguments | None = None) -> ViewMaker:
        """The views that a method compares, as its encoder takes them.

        Raises:
            ValueError: `arguments.views` names a policy of fewer views than the method compares.
        """
        made = cls.for_encoder(objective.views, objective.encoder, arguments)
        if made.num_views < objective.least_views:
            raise ValueError(
                f"--views {made.name} makes {made.num_views} view of an image, and {type(objective).__name__} "
                f"compares {objective.least_views}; leave --views out, or name a policy of two views (docs/views.md)"
            )
        return made

    def __repr__(self) -> str:
        local = f" + {self.policy.local_views} of {self.local_size} px" if self.local_size else ""
        views = f"{self.num_views} view{'s' * (self.num_views != 1)} of {self.size[0]}x{self.size[1]}"
        return f"ViewMaker({self.name}: {views}{local})"

    @property
    def num_views(self) -> int:
        return len(self.policy.views)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("views", "local_views") if self.local_size else ("views",)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with views in place of its pixels.

        Raises:
            ValueError: pixels that are not `[B, 3, H, W]` uint8, or without sizes or seeds.
        """
        if "pixels" not in batch:
            return batch
        missing = [name for name in ("sizes", "seeds") if name not in batch]
        if missing:
            raise ValueError(f"the batch has pixels but no {' and '.join(missing)}; collate it with ImageCollator")
        pixels = batch["pixels"]
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be [B, 3, H, W] uint8, got {list(pixels.shape)} {pixels.dtype}")
        made = {name: value for name, value in batch.items() if name not in ("pixels", "sizes")}
        made["views"] = self._make(batch, self.policy.views, 0, self.size)
        if self.policy.local is not None and self.local_size:
            local = (self.policy.local,) * self.policy.local_views
            made["local_views"] = self._make(batch, local, self.num_views, (self.local_size,) * 2)
        return made

    @torch.no_grad()
    def _make(self, batch: dict[str, Any], views: Sequence[View], first: int, size: tuple[int, int]) -> Tensor:
        pixels = batch["pixels"]
        drawn = [draw_view(view, first + i, batch["seeds"], batch["sizes"]) for i, view in enumerate(views)]
        multiply, add = self._normalisation(pixels.device)
        share = self.policy.blur_share
        return make_views(
            pixels,
            ViewParameters.interleave(drawn),
            size,
            multiply=multiply,
            add=add,
            resample=self.policy.resample,
            max_sigma=max(view.sigma[1] for view in views),
            blur_radius=None if share is None else int(min(size) * share) // 2,
        )

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Division by 255 and normalising as one product and one sum; copied to a device once."""
        if device not in self._constants:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            self._constants[device] = ((1.0 / (255.0 * std)).to(device), (-mean / std).to(device))
        return self._constants[device]

    def _local_size(self, wanted: int | None, patch_size: int) -> int:
        if wanted is not None:
            if wanted < 1 or wanted % patch_size:
                near = max(patch_size, round(wanted / patch_size) * patch_size)
                raise ValueError(f"local_size={wanted} is not a multiple of patch_size={patch_size}; use {near}")
            if wanted > min(self.size):
                raise ValueError(
                    f"local_size={wanted} is more than the {min(self.size)} px of the views, of which local crops "
                    f"show a part; the policy's own is {self._local_size(None, patch_size)}"
                )
            return wanted
        return max(1, round(min(self.size) * self.policy.local_share / patch_size)) * patch_size


WHOLE = ViewPolicy((View(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),), "the whole image")


def view_policy(policy: str | ViewPolicy) -> ViewPolicy:
    """The policy of that name.

    Raises:
        ValueError: an unknown name (with the nearest known one), no view at all, or an unknown `resample`.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(unknown_name("view policy", policy, POLICIES))
        return POLICIES[policy]
    if not policy.views or policy.resample not in RESAMPLES:
        raise ValueError(f"a policy needs a view and a resample of {', '.join(RESAMPLES)}, got {policy!r}")
    return policy
