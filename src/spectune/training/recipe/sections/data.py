"""[data]: folders of images, and the options for images, captions and caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from spectune.training.recipe.sections.base import MOST_PX, Positive, Section, Share, is_plain_name
from spectune.training.recipe.sections.captions import CaptionSection

# Limits that keep mistakes from filling the memory, with room for every real use.
MOST_REPEATS = 10_000  # an epoch of one image is then longer than most runs
MOST_VARIANTS = 1000  # of one image in the cache
DEFAULT_STEP_PX = 64

Side = Annotated[int, Field(ge=0, le=MOST_PX)]
MaskSource = Literal["none", "alpha", "file"]


class BucketSection(Section):
    """Aspect buckets: sizes of about `resolution_px`² pixels."""

    enabled: bool | None = Field(
        default=None,
        description="Train each image near its own aspect. Off: crop every image to a square. None: on.",
    )
    min_px: int | None = Field(
        default=None,
        ge=8,
        le=2 * MOST_PX,
        description="Shortest side in pixels. None: half of the resolution.",
    )
    max_px: int | None = Field(
        default=None, ge=8, le=2 * MOST_PX, description="Longest side in pixels. None: twice the resolution."
    )
    step_px: int | None = Field(
        default=None,
        ge=8,
        le=MOST_PX,
        description="Sides are multiples of this number of pixels. None: 64, or less below 1024 px, as far "
        "as the model allows.",
    )
    no_upscale: bool = Field(
        default=False,
        description="Do not enlarge small images: those of at most `resolution_px`² pixels keep their size, "
        "and their sides are cropped to multiples of `step_px`. `min_px` and `max_px` have no effect.",
    )

    def sides(self, resolution: int) -> tuple[int, int]:
        """Return the shortest and the longest side at a resolution, in pixels."""
        # SDXL was trained on 512x2048 to 2048x512 (Podell et al. 2023, arXiv 2307.01952, appendix I)
        return self.min_px or resolution // 2, self.max_px or 2 * resolution


class ImageSetSection(Section):
    """One folder of images with its own settings."""

    path: Path = Field(description="The folder that contains the images.")
    repeats: int = Field(
        default=1, ge=1, le=MOST_REPEATS, description="Number of draws of each image in an epoch."
    )
    caption: str = Field(default="", description="Caption of images that have no caption.")
    loss_weight: Positive = Field(default=1.0, description="Factor of the loss of these images.")
    regularisation: bool = Field(
        default=False,
        description="Regularization images show a class that the model should keep. "
        "Their loss is also multiplied by `data.regularisation_weight`.",
    )


class DataSection(Section):
    """Images, captions and masks, and how they vary between draws."""

    folders: tuple[Path, ...] = Field(
        default=(),
        description="Folders of images, or parents of `N_name` folders, whose images an epoch draws N times.",
    )
    sets: tuple[ImageSetSection, ...] = Field(
        default=(), description="Folders of images with their own settings, each a table [[data.sets]]."
    )
    regularisation_folders: tuple[Path, ...] = Field(
        default=(),
        description="Like `folders`, for regularization images, which show a class that the model must keep.",
    )
    regularisation_weight: Positive = Field(
        default=1.0, description="Factor of the loss of regularization images."
    )
    recursive: bool = Field(
        default=False, description="Use the images in all nested folders too, at any depth."
    )
    resolution_px: int = Field(
        default=1024,
        ge=16,
        le=MOST_PX,
        description="Training resolution: images are scaled to the area of a square with this side. A list "
        "trains every image at each of its resolutions: `[768, 1024]` is 1024 with `smaller_px = [768]`.",
    )
    smaller_px: tuple[Side, ...] = Field(
        default=(),
        description="Smaller resolutions. An epoch trains every image at each of them too.",
    )
    bucket: BucketSection = BucketSection()
    caption: CaptionSection = CaptionSection()
    flip_probability: Share = Field(default=0.0, description="Probability that an image is mirrored.")
    random_crop: bool = Field(default=False, description="Crop at a random position instead of the center.")
    color_probability: Share = Field(
        default=0.0, description="Probability of a small change of hue, saturation and gamma."
    )
    mask: MaskSource = Field(
        default="none",
        description="Source of the masks, which weight the loss. `alpha`: the alpha channel. "
        "`file`: a gray image next to each image.",
    )
    mask_suffix: str = Field(
        default=".mask.png",
        description="Suffix of mask files: `cat.mask.png` is the mask of `cat.webp`. "
        "Such files are never training images.",
    )
    cache_latents: bool | None = Field(
        default=None,
        description="Encode each image once, before the training. "
        "None: on if crops and colors are fixed or `cache_variants` is above 1.",
    )
    cache_variants: int = Field(
        default=1,
        ge=1,
        le=MOST_VARIANTS,
        description="Number of crops and colors of each image and orientation in the cache.",
    )
    cache_folder: Path | None = Field(
        default=None,
        description="Folder that keeps latents between runs, rounded to bfloat16. None: keep them in memory, "
        "or above 4 GB in a folder beside the adapter.",
    )
    cache_text: bool | None = Field(
        default=None,
        description="Encode each caption once, before the training. "
        "None: on if the text encoders are frozen, the captions fixed, and encoded take at most 4 GB.",
    )
    validation_folder: Path | None = Field(
        default=None,
        description="Folder of validation images, which are not trained on: images or `N_name` folders.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Processes that prepare batches. 0: the training process prepares them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _split_resolutions(cls, data: Any) -> Any:
        """Read a list of resolutions as the largest one and the smaller ones."""
        listed = cast("dict[str, Any]", data).get("resolution_px") if isinstance(data, dict) else None
        if not isinstance(listed, list | tuple):
            return data
        sides = cast("Sequence[Any]", listed)
        if not sides or not all(type(side) is int for side in sides):
            raise ValueError("`resolution_px` must be a number of pixels, or a list such as [768, 1024]")
        if "smaller_px" in data:
            raise ValueError("`resolution_px` is a list: remove `smaller_px`")
        *smaller, largest = sorted(sides)
        return {**data, "resolution_px": largest, "smaller_px": smaller}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(not 16 <= side < self.resolution_px for side in self.smaller_px) or len(
            set(self.smaller_px)
        ) < len(self.smaller_px):
            raise ValueError(
                f"`smaller_px` must be different resolutions from 16 to less than {self.resolution_px}, "
                f"got {list(self.smaller_px)}"
            )
        if not self.folders and not self.sets:
            raise ValueError(
                "no images: set `folders` (folders of images or parents of `N_name` folders) "
                "or add [[data.sets]]"
            )
        if not self.mask_suffix:
            raise ValueError("`mask_suffix` is empty: every file would be a mask")
        if not is_plain_name(self.mask_suffix):
            raise ValueError("`mask_suffix` must be the end of a file name, like `.mask.png`")
        self._check_caches()
        self._check_buckets()
        return self

    def _check_caches(self) -> None:
        if self.varies and self.cache_latents and self.cache_variants == 1:
            raise ValueError(
                "`cache_latents` needs fixed crops and colors: turn `random_crop` and "
                "`color_probability` off, raise `cache_variants`, or leave `cache_latents` out"
            )
        if not self.caches_latents and (self.cache_variants > 1 or self.cache_folder is not None):
            raise ValueError(
                "`cache_variants` and `cache_folder` do nothing if latents are not cached: turn "
                "`cache_latents` on, and raise `cache_variants` if crops or colors vary"
            )
        if self.cache_variants > 1 and not self.varies:
            raise ValueError("`cache_variants` does nothing if crops and colors are fixed: remove it")
        if self.cache_text and self.caption.varies:
            raise ValueError(
                "`cache_text` needs fixed captions: turn `caption.shuffle`, `caption.wildcards` and "
                '`caption.tag_dropout_probability` off, and set `caption.lines` to "first" or "all"'
            )

    def _check_buckets(self) -> None:
        bucket = self.bucket
        for resolution in self.resolutions if bucket.enabled else ():
            shortest, longest = bucket.sides(resolution)
            if not bucket.no_upscale and not shortest <= resolution <= longest:
                raise ValueError(
                    f"`resolution_px` {resolution} must be between `bucket.min_px` and `bucket.max_px`, "
                    f"{shortest}..{longest}"
                )
            if (bucket.step_px or 0) > resolution:
                raise ValueError(
                    f"`bucket.step_px` {bucket.step_px} is larger than `resolution_px` {resolution}: "
                    "no bucket fits"
                )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All resolutions of the run in pixels, the largest last."""
        return (*sorted(self.smaller_px), self.resolution_px)

    @property
    def varies(self) -> bool:
        """Whether crops or colors of an image differ between draws."""
        return self.random_crop or self.color_probability > 0

    @property
    def caches_latents(self) -> bool:
        """Whether each image is encoded once, before the training."""
        if self.cache_latents is not None:
            return self.cache_latents
        return not self.varies or self.cache_variants > 1
