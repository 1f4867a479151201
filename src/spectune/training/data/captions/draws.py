"""Make the caption of one draw: choose a line and the words of wildcards, shuffle and drop tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from spectune.training.recipe.sections.captions import CaptionSection

_WILDCARD = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: they stand for {{ and }}

Choose = Callable[[Sequence[str]], str]


def template_of(lines: Sequence[str], rules: CaptionSection) -> str:
    """Return the text that captions are drawn from: the used lines with prefix and suffix."""
    return "\n".join(" ".join(part for part in (rules.prefix, line, rules.suffix) if part) for line in lines)


def fixed_caption(template: str, rules: CaptionSection) -> str:
    """Return the caption without variation: the first line, with the first word of each wildcard."""
    text = _chosen(template, rules, lambda words: words[0])
    separator = rules.keep_tokens_separator
    if separator and separator in text:
        return ", ".join(tag for tags in _split(text, rules) for tag in tags)
    return text


def draw_caption(template: str, rules: CaptionSection, random: Random) -> str:
    """Return the caption of one draw: with tags dropped and shuffled, or "" if it is dropped."""
    if random.random() < rules.dropout_probability:
        return ""
    if not rules.varies:
        return fixed_caption(template, rules)
    text = _chosen(template, rules, random.choice)
    if not rules.changes_tags and not (rules.keep_tokens_separator and rules.keep_tokens_separator in text):
        return text
    kept, loose, last = _split(text, rules)
    if rules.tag_dropout_probability:
        loose = [tag for tag in loose if random.random() >= rules.tag_dropout_probability]
    if rules.shuffle:
        random.shuffle(loose)
    return ", ".join([*kept, *loose, *last])


def has_wildcard(text: str) -> bool:
    """Return whether a text contains a wildcard with at least two words."""
    return any("|" in words for words in _WILDCARD.findall(_to_last_brace(_escaped(text))))


def _to_last_brace(text: str) -> str:
    """Return the text that can have wildcards: behind it, every `{` would search up to the end."""
    return text[: text.rfind("}") + 1]


def _chosen(template: str, rules: CaptionSection, choose: Choose) -> str:
    """Return one line of the template with its wildcards replaced."""
    lines = template.split("\n") if rules.lines == "random" else [template]
    text = choose(lines) if len(lines) > 1 else lines[0]
    if not rules.wildcards:
        return text
    text = _escaped(text)
    head = _to_last_brace(text)
    drawn = _WILDCARD.sub(lambda match: choose(match[1].split("|")), head) + text[len(head) :]
    return drawn.replace(_OPEN, "{").replace(_CLOSE, "}")


def _escaped(text: str) -> str:
    return text.replace("{{", _OPEN).replace("}}", _CLOSE)


def _split(text: str, rules: CaptionSection) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that stay at the beginning, the loose ones, and those that stay at the end."""
    separator = rules.keep_tokens_separator
    if not separator or separator not in text:
        tags = [tag.strip() for tag in text.split(",")]
        return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []
    first, loose, *last = (
        [tag.strip() for tag in part.split(",") if tag.strip()] for part in text.split(separator)
    )
    return first, loose, [tag for tags in last for tag in tags]
