"""Read the captions of the images in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.files.text import UTF8, UnreadableText, read_text
from spectune.training.data.captions.draws import fixed_caption, template_of
from spectune.training.data.captions.findings import CaptionFinding, FindingKind, content_findings
from spectune.training.data.captions.formats import caption_of, parse_json
from spectune.training.data.captions.sidecars import Sidecar, read_sidecar
from spectune.training.data.captions.text import LARGEST_CAPTION, has_more_lines, used_lines
from spectune.training.recipe.sections.captions import CaptionSection


@dataclass(frozen=True)
class ImageCaption:
    """The caption of an image."""

    fixed: str  # without variation
    template: str  # draws vary this
    source: Path  # the caption file; the image if the caption is from another place
    is_own: bool  # not the caption of the folder
    is_empty: bool


@dataclass(frozen=True)
class FolderCaptions:
    """The captions of the images in a folder, in order, and the findings."""

    captions: tuple[ImageCaption, ...]
    findings: tuple[CaptionFinding, ...]
    without_image: tuple[str, ...]  # entries of a sidecar in this folder


def read_captions(
    folder: Path, images: Sequence[Path], rules: CaptionSection, *, default: str, files: Sequence[Path]
) -> FolderCaptions:
    """Read the captions of `images`; those without one get `default`.

    `files` are all image files in the folder, usable or not. Files that cannot be read are findings.

    Raises:
        InputError: A sidecar is damaged.
    """
    findings: list[CaptionFinding] = []
    sidecar = _find_sidecar(folder, rules, findings)
    captions: list[ImageCaption] = []
    for image in images:
        found = _read_file(image, rules, findings)
        if found is None and sidecar is not None and (text := sidecar.find(image)) is not None:
            found = text, image
        text, source = (default, image) if found is None else found
        if rules.lines == "first" and has_more_lines(text):
            findings.append(CaptionFinding(FindingKind.MORE_LINES, source))
        lines = used_lines(text, rules.lines)
        template = template_of(lines, rules)
        captions.append(
            ImageCaption(
                fixed=fixed_caption(template, rules),
                template=template,
                source=source,
                is_own=found is not None,
                is_empty=not any(lines),
            )
        )
    texts = [(one.source, (one.fixed, *one.template.split("\n"))) for one in captions]
    findings += content_findings(texts, max_tokens=rules.max_tokens, wildcards=rules.wildcards)
    return FolderCaptions(tuple(captions), tuple(findings), _without_image(folder, sidecar, files))


def _find_sidecar(folder: Path, rules: CaptionSection, findings: list[CaptionFinding]) -> Sidecar | None:
    path = next((folder / name for name in rules.sidecars if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        sidecar = read_sidecar(path, is_shared=path.resolve().parent != folder.resolve())
    except UnreadableText as error:
        findings.append(CaptionFinding(FindingKind.UNREADABLE, path, str(error)))
        return None
    if sidecar.encoding != UTF8:
        findings.append(CaptionFinding(FindingKind.ENCODING, path, sidecar.encoding))
    return sidecar


def _read_file(image: Path, rules: CaptionSection, findings: list[CaptionFinding]) -> tuple[str, Path] | None:
    """Return the text of the caption file of an image and its path, or None if there is no such file."""
    for extension in rules.extensions:
        for path in (image.with_suffix(extension), image.with_name(image.name + extension)):
            if not path.is_file():
                continue
            try:
                decoded = read_text(path, largest=LARGEST_CAPTION)
                text = decoded.text
                if path.suffix.lower() == ".json":
                    text = caption_of(parse_json(text))
            except UnreadableText as error:
                findings.append(CaptionFinding(FindingKind.UNREADABLE, path, str(error)))
                continue
            if text is None:
                findings.append(CaptionFinding(FindingKind.NO_CAPTION, path))
                continue
            if decoded.encoding != UTF8:
                findings.append(CaptionFinding(FindingKind.ENCODING, path, decoded.encoding))
            return text, path
    return None


def _without_image(folder: Path, sidecar: Sidecar | None, files: Sequence[Path]) -> tuple[str, ...]:
    """Return the entries of a sidecar in this folder that belong to no image file."""
    if sidecar is None or sidecar.is_shared:
        return ()
    used = {sidecar.key_of(file) for file in files}
    return tuple(sorted(sidecar.captions.keys() - used))
