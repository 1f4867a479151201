"""Targets: pictures, and the captions beside them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image, ImageCms

from spectune.training.data.captions.draws import draw_caption
from spectune.training.data.folders import scan_training
from spectune.training.data.pictures.formats import formats
from spectune.training.recipe.sections.captions import CaptionSection
from spectune.training.recipe.sections.data import DataSection
from tests.fuzz.mutation import (
    TEXTS,
    change_bytes,
    change_json,
    change_text,
    mutated,
    odd_values,
    sometimes_grown,
    text_bytes,
)


class Pictures:
    """The bytes of one picture in a folder of training pictures."""

    name = "images"
    is_for_bytes = True

    def seeds(self) -> Sequence[bytes]:
        return _pictures()

    def inputs(self) -> SearchStrategy[bytes]:
        return mutated(self.seeds(), change_bytes, most=6)

    def write(self, folder: Path, data: bytes) -> None:
        (folder / "x.png").write_bytes(data)

    def operate(self, folder: Path) -> None:
        scan_training(DataSection(folders=(folder,)))

    def arguments(self, folder: Path) -> list[str]:
        return ["dataset", "."]


@cache
def _pictures() -> list[bytes]:
    """Return small pictures in all formats that are read, and in several modes."""
    color = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    saved: list[tuple[Image.Image, str, dict[str, object]]] = [
        (color, name, {"exif": exif, "icc_profile": profile} if name in ("JPEG", "PNG", "WEBP") else {})
        for name in formats()
    ]
    saved += [(color.convert(mode), "PNG", {}) for mode in ("P", "LA", "RGBA", "I;16", "1")]
    saved += [(color.convert(mode), "TIFF", {"compression": "tiff_lzw"}) for mode in ("CMYK", "LAB", "I;16")]
    saved += [(color, "PNG", {"save_all": True, "append_images": [color.rotate(90)]})]
    pictures: list[bytes] = []
    for image, name, options in saved:
        file = io.BytesIO()
        image.save(file, name, **options)
        pictures.append(file.getvalue())
    return pictures


class Captions:
    """One caption file beside a picture. The first line is its name."""

    name = "captions"
    is_for_bytes = True

    def seeds(self) -> Sequence[bytes]:
        return [text_bytes(f"{name}\n{content}") for name, content in _CAPTIONS]

    def inputs(self) -> SearchStrategy[bytes]:
        records = [(name, json.loads(content)) for name, content in _CAPTIONS if name.endswith(".json")]

        def as_bytes(name: str, value: object) -> bytes:
            return text_bytes(f"{name}\n{json.dumps(value)}")

        def text_changed(seed: bytes, random: Random) -> bytes:
            name, _, content = seed.partition(b"\n")
            changed = change_text(content.decode(errors="surrogatepass"), random)
            return name + b"\n" + text_bytes(changed)

        def bytes_changed(seed: bytes, random: Random) -> bytes:
            name, _, content = seed.partition(b"\n")
            return name + b"\n" + change_bytes(content, random)

        structured = st.one_of(
            *(
                (mutated([value], change_json) | odd_values).map(lambda new, name=name: as_bytes(name, new))
                for name, value in records
            )
        )
        words = st.lists(st.sampled_from([*TEXTS, "{a|b}", "{{", "}}", "(a:1.2)", "|||", ","]), max_size=6)
        texts = words.map(lambda found: text_bytes(f"x.txt\n{''.join(found)}"))
        seeds = self.seeds()
        common = structured | texts | mutated(seeds, text_changed) | mutated(seeds, bytes_changed)
        return sometimes_grown(common, seeds, 130_000)

    def write(self, folder: Path, data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        if name.decode(errors="replace") not in _NAMES:
            name, content = b"x.txt", data
        (folder / "x.png").write_bytes(_pictures()[0])
        (folder / name.decode()).write_bytes(content)

    def operate(self, folder: Path) -> None:
        for rules in _RULES:
            scan = scan_training(DataSection(folders=(folder,), caption=rules))
            for image in scan.images:
                draw_caption(image.text, rules, Random(0))

    def arguments(self, folder: Path) -> list[str]:
        return ["dataset", "."]


_RULES = (
    CaptionSection(),
    CaptionSection(
        lines="random", wildcards=True, shuffle=True, tag_dropout_probability=0.1, keep_tokens_separator="|||"
    ),
)
_TEXT = "red fox, forest, {day|night}, (soft:1.2)\nsecond line ||| a, b\n"
_CAPTIONS = (
    ("x.txt", _TEXT),
    ("x.caption", "red fox"),
    ("x.json", json.dumps({"caption": "a fox", "tags": ["red", "fox_tail"], "rating": "s"})),
    ("x.json", json.dumps({"tags": {"character": [{"name": "fox"}], "general": "red tail"}})),
    ("metadata.jsonl", '{"file_name": "x.png", "text": "a fox"}\n{"file_name": "y.png", "text": "b"}\n'),
    ("meta_cap.json", json.dumps({"folder/x": {"caption": "a fox", "tags": "red"}, "x.png": {"tags": "a"}})),
)
_NAMES = {name for name, _ in _CAPTIONS}
