"""The base class of all sections of a recipe, the types of their numbers, and a validator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from spectune.errors import did_you_mean

# Limits that keep mistakes from hanging a run or filling the memory, with room for every real use.
MOST_STEPS = 100_000_000  # a year at 3 steps per second
MOST_EPOCHS = 1_000_000
MOST_IMAGES = 100_000  # in one batch, or that are looked at before the training
MOST_RANK = 16_384  # no layer of SDXL has more singular directions
MOST_PX = 8192  # of a side: at 8192x8192 px, a step of SDXL needs more than 500 GB
LARGEST_FACTOR = 1e9  # of a rate, weight or factor: far above every use, and its products stay finite
LARGEST_SEED = 2**63 - 1  # TOML has integers of 64 bits

Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Epochs = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Count = Annotated[int, Field(ge=1, le=MOST_IMAGES)]  # of images or batches
Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
# a tagged union, so that an error is about the member that was meant
RankOrFull = Annotated[
    Annotated[Rank, Tag("rank")] | Annotated[Literal["full"], Tag("full")],
    Discriminator(lambda value: "full" if value == "full" else "rank"),
]
Share = Annotated[float, Field(ge=0, le=1)]  # or a probability
Positive = Annotated[float, Field(gt=0, le=LARGEST_FACTOR)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST_FACTOR)]
Number = Annotated[float, Field(ge=-LARGEST_FACTOR, le=LARGEST_FACTOR)]

LONGEST_NAME = 100  # characters of a part of a file name; file systems allow 255 bytes in all
MOST_LEVELS_UP = 2  # from a folder `3_cat` to the one above its dataset


def is_plain_name(text: str) -> bool:
    """Return whether a text can be a part of a file name, so that a file stays in its folder."""
    return text.isprintable() and len(text) <= LONGEST_NAME and not set(text) & set('/\\:*?"<>|')


def is_nearby(path: str) -> bool:
    """Return whether a path leads into a folder, or from the folders up to MOST_LEVELS_UP above it."""
    names = path.replace("\\", "/").split("/")
    ups = next((index for index, name in enumerate(names) if name != ".."), len(names))
    return ups <= MOST_LEVELS_UP and all(
        is_plain_name(name) and name not in ("", ".", "..") for name in names[ups:]
    )


class Section(BaseModel):
    """A table of a recipe. It is frozen and refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def differs(self, key: str) -> bool:
        """Return whether the value of `key` differs from its default."""
        return getattr(self, key) != type(self).model_fields[key].default


class OneOf:
    """A validator that accepts the names of a registry, for `Annotated[str, AfterValidator(OneOf(...))]`."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __call__(self, name: str) -> str:
        """Return `name`; raise PydanticCustomError with a suggestion if the registry does not contain it."""
        if name not in self.names:
            raise PydanticCustomError(
                "unknown_name",
                "`{name}` is not one of {names}{suggestion}",  # pyright: ignore[reportArgumentType]
                {
                    "name": name,
                    "names": ", ".join(self.names),
                    "suggestion": did_you_mean(name, self.names),
                },
            )
        return name
