"""Read the captions of the images in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from spectune.files.text import UTF8, Decoded, UnreadableText, decode, read_text
from spectune.training.data.captions.draws import fixed_caption, template_of
from spectune.training.data.captions.findings import CaptionFinding, FindingKind, content_findings
from spectune.training.data.captions.formats import caption_of, parse_json
from spectune.training.data.captions.sidecars import Sidecar, read_sidecar
from spectune.training.data.captions.text import LARGEST_CAPTION, has_more_lines, used_lines
from spectune.training.data.pictures.tar_files import member_of
from spectune.training.recipe.sections.captions import CaptionSection


@dataclass(frozen=True)
class ImageCaption:
    """The caption of an image."""

    fixed: str  # without variation
    template: str  # draws vary this
    source: Path  # the caption file; the image if the caption is from another place
    is_own: bool  # not the caption of the folder
    is_empty: bool
    findings: tuple[CaptionFinding, ...] = ()


@dataclass(frozen=True)
class FolderCaptions:
    """The captions of the images in a folder, in order."""

    captions: tuple[ImageCaption, ...]
    sidecar_findings: tuple[CaptionFinding, ...]
    without_image: tuple[str, ...]  # entries of a sidecar in this folder

    @property
    def findings(self) -> tuple[CaptionFinding, ...]:
        """All findings."""
        own = (finding for caption in self.captions for finding in caption.findings)
        return (*self.sidecar_findings, *own)


def read_captions(
    folder: Path,
    images: Sequence[Path],
    rules: CaptionSection,
    *,
    default: str,
    files: Sequence[Path],
    texts: Mapping[Path, Iterable[Path]] = MappingProxyType({}),
) -> FolderCaptions:
    """Read the captions of `images`; those without one get `default`.

    Args:
        folder: The folder of the images, for sidecars.
        images: Usable images.
        rules: The settings.
        default: The caption of images without one.
        files: All image files in the folder, usable or not.
        texts: The caption files of images in tar files. Those of others are beside them. Files that cannot
            be read are findings.

    Raises:
        InputError: A sidecar is damaged.
    """
    sidecar_findings: list[CaptionFinding] = []
    sidecar = _find_sidecar(folder, rules, sidecar_findings)
    captions = [
        _read(image, rules, sidecar, default, texts[image] if image in texts else _texts_beside(image, rules))
        for image in images
    ]
    contents = [(one.source, (one.fixed, *one.template.split("\n"))) for one in captions]
    found = content_findings(contents, max_tokens=rules.max_tokens, wildcards=rules.wildcards)
    return FolderCaptions(
        tuple(
            replace(one, findings=(*one.findings, *own)) if own else one
            for one, own in zip(captions, found, strict=True)
        ),
        tuple(sidecar_findings),
        _without_image(folder, sidecar, files),
    )


def _read(
    image: Path, rules: CaptionSection, sidecar: Sidecar | None, default: str, texts: Iterable[Path]
) -> ImageCaption:
    findings: list[CaptionFinding] = []
    found = _read_first(texts, findings)
    if found is None and sidecar is not None and (text := sidecar.find(image)) is not None:
        found = text, image
    text, source = (default, image) if found is None else found
    if rules.lines == "first" and has_more_lines(text):
        findings.append(CaptionFinding(FindingKind.MORE_LINES, source))
    lines = used_lines(text, rules.lines)
    template = template_of(lines, rules)
    return ImageCaption(
        fixed=fixed_caption(template, rules),
        template=template,
        source=source,
        is_own=found is not None,
        is_empty=not any(lines),
        findings=tuple(findings),
    )


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


def caption_names(image: str, rules: CaptionSection) -> Iterator[str]:
    """Yield the names that the caption file of an image may have, in the order of their rank."""
    for extension in rules.extensions:
        yield Path(image).with_suffix(extension).name
        yield image + extension


def _texts_beside(image: Path, rules: CaptionSection) -> Iterator[Path]:
    paths = (image.with_name(name) for name in caption_names(image.name, rules))
    return (path for path in paths if path.is_file())


def _read_first(paths: Iterable[Path], findings: list[CaptionFinding]) -> tuple[str, Path] | None:
    """Return the text of the first file that has a caption and its path, or None."""
    for path in paths:
        try:
            decoded = _decoded(path)
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


def _decoded(path: Path) -> Decoded:
    member = member_of(path)
    return read_text(path, largest=LARGEST_CAPTION) if member is None else decode(member.read())


def _without_image(folder: Path, sidecar: Sidecar | None, files: Sequence[Path]) -> tuple[str, ...]:
    """Return the entries of a sidecar in this folder that belong to no image file."""
    if sidecar is None or sidecar.is_shared:
        return ()
    used = {sidecar.key_of(file) for file in files}
    return tuple(sorted(sidecar.captions.keys() - used))
