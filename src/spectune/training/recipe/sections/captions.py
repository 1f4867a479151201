"""[data.caption]: where captions are read from, and how they vary between draws."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from spectune.sdxl.vocabulary import CHUNK_TOKENS, MAX_TOKENS, MOST_TOKENS
from spectune.training.recipe.sections.base import MOST_LEVELS_UP, Section, Share, is_nearby, is_plain_name

Lines = Literal["first", "all", "random"]


class CaptionSection(Section):
    """Where captions are read from, and how they vary between draws."""

    extensions: tuple[str, ...] = Field(
        default=(".txt", ".caption", ".json"),
        description="Extensions of caption files: `cat.txt` or `cat.png.txt` for `cat.png`. The first such "
        "file is used.",
    )
    sidecar: str | tuple[str, ...] = Field(
        default=("metadata.jsonl", "meta_lat.json", "meta_cap.json"),
        description="Files with the captions of many images, in the folder of images or up to two folders "
        "above it (`../meta_cap.json`): JSONL with "
        '`{"file_name": ..., "text": ...}` on each line, or metadata of sd-scripts. The first that exists is '
        "used. Empty: none.",
    )
    lines: Lines = Field(
        default="first",
        description="What is used of a caption with several lines: the first line with text, all lines "
        "joined, or a random line in each draw.",
    )
    max_tokens: int = Field(
        default=MAX_TOKENS,
        ge=CHUNK_TOKENS,
        le=MOST_TOKENS,
        multiple_of=CHUNK_TOKENS,
        description="Tokens of a caption that are used, in chunks of 75; the others are cut. A caption has "
        "as many chunks as it needs.",
    )
    prefix: str = Field(default="", description="Text before each caption, separated by a space.")
    suffix: str = Field(default="", description="Text after each caption, separated by a space.")
    shuffle: bool = Field(default=False, description="Shuffle the comma-separated tags.")
    keep_tokens: int = Field(
        default=0, ge=0, le=10_000, description="Number of leading tags that are never shuffled or dropped."
    )
    keep_tokens_separator: str = Field(
        default="",
        description="Text such as `|||` in captions. Tags before the first one, and tags after a second one, "
        "are never shuffled or dropped. The separators are removed. Captions with it ignore `keep_tokens`.",
    )
    wildcards: bool = Field(
        default=False,
        description="Draw one of the words of `{a|b}` in each draw. `{{` and `}}` are braces.",
    )
    dropout_probability: Share = Field(
        default=0.0, description="Probability that the caption is replaced with an empty one."
    )
    tag_dropout_probability: Share = Field(
        default=0.0, description="Probability that a tag is dropped, for each tag separately."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for extension in self.extensions:
            if not extension.startswith(".") or extension == ".":
                raise ValueError(f"`extensions` must begin with a dot, like `.txt`; got `{extension}`")
            if not is_plain_name(extension):
                raise ValueError("`extensions` must be ends of file names, like `.txt`")
        wrong = [one for one in self.sidecars if not one.lower().endswith((".json", ".jsonl"))]
        if wrong or not all(map(is_nearby, self.sidecars)):
            raise ValueError(
                "`sidecar` must name .json or .jsonl files in the folder of the images, or up to "
                f"{MOST_LEVELS_UP} folders above it, such as `../meta_cap.json`"
            )
        if self.keep_tokens and not self.changes_tags:
            raise ValueError(
                "`keep_tokens` does nothing without `shuffle` or `tag_dropout_probability`: "
                "turn one of them on, or remove `keep_tokens`"
            )
        if (
            "," in self.keep_tokens_separator
            or self.keep_tokens_separator != self.keep_tokens_separator.strip()
        ):
            raise ValueError("`keep_tokens_separator` must not contain commas or surrounding spaces")
        return self

    @property
    def sidecars(self) -> tuple[str, ...]:
        """The names of the sidecars, without empty ones."""
        names = (self.sidecar,) if isinstance(self.sidecar, str) else self.sidecar
        return tuple(name for name in names if name)

    @property
    def changes_tags(self) -> bool:
        """Whether tags are shuffled or dropped."""
        return self.shuffle or self.tag_dropout_probability > 0

    @property
    def varies(self) -> bool:
        """Whether the text of a caption differs between draws, so that captions cannot be cached."""
        return self.changes_tags or self.wildcards or self.lines == "random"
