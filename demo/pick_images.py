"""Copy the 3D images of the demo: 120 for training and 40 for validation, with captions, in kohya layout.

    python demo/pick_images.py --flat fluent_flat.tar --three-d fluent_3d.tar

Both archives contain 128 px WebP images on white, rasterized from the npm packages fluentui-emoji 1.3.0 and
@lobehub/fluent-emoji-3d 1.1.0 (MIT, Copyright (c) Microsoft Corporation). Only subjects that exist in both
styles are used, ordered by the SHA-256 of their names. The choice is arbitrary but reproducible.
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
from pathlib import Path

TRAIN, HELD_OUT = 120, 40
HERE = Path(__file__).parent


def subjects(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {Path(name).stem for name in tar.getnames() if name.endswith(".webp")}


def copy(tar: tarfile.TarFile, names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for member in tar.getmembers():
        path = Path(member.name)
        if path.stem in names and path.suffix in (".webp", ".txt"):
            (folder / path.name).write_bytes(tar.extractfile(member).read())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flat", type=Path, required=True)
    parser.add_argument("--three-d", type=Path, required=True)
    args = parser.parse_args()
    shared = subjects(args.flat) & subjects(args.three_d)
    order = sorted(shared, key=lambda name: hashlib.sha256(name.encode()).digest())
    with tarfile.open(args.three_d) as tar:
        copy(tar, order[:TRAIN], HERE / "images" / "10_emoji3d")
        copy(tar, order[TRAIN : TRAIN + HELD_OUT], HERE / "validation" / "1_emoji3d")


if __name__ == "__main__":
    main()
