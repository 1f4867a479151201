"""Write the two image sets of the experiments, 64 px, from the archives that demo/pick_images.py uses.

    python experiments/pick_pictures.py --flat fluent_flat.tar --three-d fluent_3d.tar

Each style has 300 training images and 40 validation images with their captions. They are chosen by the
SHA-256 of their names, which is arbitrary but reproducible. Both styles have the same subjects.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tarfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.pick_images import subjects

HERE = Path(__file__).resolve().parent
TRAIN, HELD_OUT, PIXELS = 300, 40, 64


def add(out: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    out.addfile(member, io.BytesIO(data))


def small(data: bytes) -> bytes:
    """Return the image at 64 px, in lossless WebP."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    image.save(target, "WEBP", lossless=True, method=6)
    return target.getvalue()


def read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, name
    return file.read()


def pick(archive: Path, order: list[str], target: Path) -> None:
    with tarfile.open(archive) as tar, tarfile.open(target, "w") as out:
        members = {Path(name).name: name for name in tar.getnames()}
        for number, subject in enumerate(order):
            folder = "train" if number < TRAIN else "held_out"
            picture, caption = (read(tar, members[subject + end]) for end in (".webp", ".txt"))
            add(out, f"{folder}/{subject}.webp", small(picture))
            add(out, f"{folder}/{subject}.txt", caption)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flat", type=Path, required=True)
    parser.add_argument("--three-d", type=Path, required=True)
    args = parser.parse_args()
    shared = subjects(args.flat) & subjects(args.three_d)
    order = sorted(shared, key=lambda name: hashlib.sha256(name.encode()).digest())[: TRAIN + HELD_OUT]
    pick(args.flat, order, HERE / "pictures" / "flat.tar")
    pick(args.three_d, order, HERE / "pictures" / "three_d.tar")


if __name__ == "__main__":
    main()
