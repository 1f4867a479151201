from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import spectune
from spectune.training.data.buckets import Size, covering
from spectune.training.data.color import ColorChange
from spectune.training.data.images import (
    alpha_of,
    as_rgb,
    has_alpha,
    load_image,
    open_image,
    read_header,
    render,
)
from spectune.training.data.pictures.formats import UnusableImage, formats


def color(path: Path) -> tuple[int, ...]:
    pixel = open_image(path).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return tuple(int(level) for level in pixel)


def test_modes_become_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "gray.png")
    Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(tmp_path / "print.tif")
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    palette = Image.new("P", (4, 4))
    palette.putpalette([9, 8, 7] + [0] * 765)
    palette.save(tmp_path / "palette.png", transparency=0)

    assert color(tmp_path / "clear.png") == (255, 255, 255)
    assert color(tmp_path / "gray.png") == (7, 7, 7)
    assert color(tmp_path / "print.tif") == (0, 0, 0)
    assert color(tmp_path / "deep.png") == (128, 128, 128)
    assert color(tmp_path / "palette.png") == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


def test_unusable_files_raise_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])

    for name, why in (
        ("text.png", "is not an image that Pillow can read"),
        ("torn.jpg", "is damaged: "),
        ("nowhere.png", "cannot be read: No such file or directory"),
    ):
        with pytest.raises(UnusableImage, match=why):
            open_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "avif"])
def test_the_first_frame_of_an_animation_is_read(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (250, 0)]
    frames[0].save(tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"still.{suffix}")
    assert color(tmp_path / f"film.{suffix}")[0] > 240
    assert read_header(tmp_path / f"film.{suffix}").has_more_frames
    assert not read_header(tmp_path / f"still.{suffix}").has_more_frames


def test_heic_pictures_are_read_and_rotated(tmp_path: Path) -> None:
    formats()  # registers the encoder too
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), (200, 10, 10)).save(tmp_path / "a.heic", exif=exif.tobytes())
    assert open_image(tmp_path / "a.heic").size == (32, 64)
    assert color(tmp_path / "a.heic") == pytest.approx((200, 10, 10), abs=8)


def test_only_documented_formats_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow reads EPS files with Ghostscript, whatever their suffix."""
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    (tmp_path / "cat.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(tmp_path / "cat.png") as dangerous:
        assert dangerous.format == "EPS"
    with pytest.raises(UnusableImage, match="is not an image that Pillow can read"):
        open_image(tmp_path / "cat.png")
    assert started == []
    assert formats() == ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
    for source in Path(spectune.__file__).parent.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert text.count("Image.open(") == len(re.findall(r"Image\.open\([^)]*formats=", text)), source


def test_an_image_with_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + empty)
    with pytest.raises(UnusableImage, match="has 13000x13000 pixels, more than 128 million"):
        open_image(tmp_path / "huge.png")


def test_the_first_frame_of_an_mpo_file_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (250, 0)]
    frames[0].save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "camera.jpg") as camera:
        assert (camera.format, getattr(camera, "n_frames", 1)) == ("MPO", 2)
    assert color(tmp_path / "camera.jpg")[0] > 240


def test_render_range_and_shape() -> None:
    image = Image.new("RGB", (6, 4), (0, 255, 0))
    pixels = render(image, covering(Size(6, 4), Size(4, 4)))
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == torch.float32
    assert [pixels[channel].unique().tolist() for channel in range(3)] == [[-1.0], [1.0], [-1.0]]


def deep_png(path: Path, color_type: int, levels: list[int]) -> None:
    """Write a PNG of one pixel with 16-bit channels. Pillow cannot write these in color."""
    row = b"\0" + struct.pack(f">{len(levels)}H", *levels)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, color_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def test_16_bit_colors(tmp_path: Path) -> None:
    deep_png(tmp_path / "rgb.png", 2, [0x8012, 0xFFFF, 0x0100])
    deep_png(tmp_path / "rgba.png", 6, [0x8012, 0xFFFF, 0x0100, 0])
    deep_png(tmp_path / "la.png", 4, [0x4000, 0xFFFF])
    assert color(tmp_path / "rgb.png") == (128, 255, 1)
    assert color(tmp_path / "rgba.png") == (255, 255, 255)
    assert color(tmp_path / "la.png") == (64, 64, 64)


def test_cmyk_photographs(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = color(tmp_path / "print.jpg")
    assert red > 250
    assert max(green, blue) < 5


def test_alpha(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(tmp_path / "clear.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    palette = Image.new("P", (2, 2))
    palette.putpalette([9, 8, 7] + [0] * 765)
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    turned.putpixel((0, 0), (0, 0, 0, 7))
    turned.save(tmp_path / "turned.png", exif=exif)

    alphas = {}
    for name in ("clear", "palette", "turned"):
        loaded = load_image(tmp_path / f"{name}.png")
        alpha = alpha_of(loaded)
        assert has_alpha(loaded)
        assert alpha is not None
        assert alpha.size == as_rgb(loaded).size
        alphas[name] = np.asarray(alpha).tolist()
    assert alphas["clear"] == [[51, 51], [51, 51]]
    assert alphas["palette"] == [[0, 255], [0, 0]]
    assert alphas["turned"] == [[7], [255]]
    assert alpha_of(load_image(tmp_path / "plain.png")) is None
    assert color(tmp_path / "clear.png") == (255, 204, 204)


def test_an_image_of_one_pixel_fills_its_bucket() -> None:
    pixels = render(Image.new("RGB", (1, 1), (255, 0, 0)), covering(Size(1, 1), Size(64, 32)))
    assert pixels.shape == (3, 32, 64)
    assert pixels.amin((1, 2)).tolist() == [1.0, -1.0, -1.0]


def test_color_changes_apply_to_the_image() -> None:
    placement = covering(Size(4, 4), Size(4, 4))
    image = Image.new("RGB", (4, 4), (51, 255, 0))
    pixels = render(image, placement, ColorChange(hue=0.0, saturation=1.0, gamma=2.0))
    assert pixels[:, 0, 0].tolist() == pytest.approx([2 * 0.04 - 1, 1.0, -1.0], abs=1e-6)
    assert pixels.dtype == torch.float32
