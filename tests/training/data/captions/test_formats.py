from __future__ import annotations

import pytest

from spectune.files.text import UnreadableText
from spectune.training.data.captions.formats import caption_of, parse_json


@pytest.mark.parametrize(
    ("record", "caption"),
    [
        ({"caption": "a cat", "tags": "red, big_eyes", "train_resolution": [8, 8]}, "a cat, red, big_eyes"),
        ({"tags": "red, round"}, "red, round"),
        ({"caption": ""}, ""),
        ({"text": "a dog"}, "a dog"),
        # gallery-dl and Danbooru
        (
            {
                "category": "danbooru",
                "caption": "<b>an advertisement</b>",
                "tag_string": "1girl ^_^ hatsune_miku highres",
                "tag_string_general": "1girl ^_^ long_hair",
                "tag_string_character": "hatsune_miku",
                "tag_string_copyright": "vocaloid",
                "tag_string_artist": "some_one",
                "tag_string_meta": "highres",
            },
            "hatsune miku, vocaloid, some one, 1girl, ^_^, long hair",
        ),
        (
            {"tags": {"general": ["red_fur"], "species": ["fox"], "artist": ["x"], "meta": ["hi_res"]}},
            "x, fox, red fur",
        ),
        ({"category": "gelbooru", "tags": "red_hair 1girl"}, "red hair, 1girl"),
        ({"category": "pixiv", "tags": [{"name": "初音ミク"}, "猫"]}, "初音ミク, 猫"),
        ({"tags_general": ["a_b_c"], "tags_artist": "x"}, "x, a b c"),
        ({"nodes": [], "version": 0.4}, None),
        (["a"], None),
        ({"caption": 7}, None),
        ({"tags": []}, ""),
    ],
)
def test_records(record: object, caption: str | None) -> None:
    assert caption_of(record) == caption


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"caption": ' + "9" * 5000 + "}"])
def test_damaged_json(text: str) -> None:
    with pytest.raises(UnreadableText, match="is not JSON"):
        parse_json(text)
