from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from spectune.model.text import clip_tokenizer, tokenize
from spectune.sdxl.vocabulary import BOS, BOS_ID, EOS, EOS_ID, clip_vocabulary, tokenizer_files

CAPTIONS = ["a cat", "Ein Schwälbchen, 3 times: naïve 猫 🙂", "it's  SPACED   out", ""]


def test_the_vocabulary_is_that_of_clip() -> None:
    words = clip_vocabulary().words
    assert (len(words), len(set(words)), len(clip_vocabulary().merges)) == (49408, 49408, 48894)
    assert (words[BOS_ID], words[EOS_ID], words[0]) == (BOS, EOS, "!")
    assert [words.index(word) for word in ("a</w>", "cat</w>")] == [320, 2368]


@pytest.mark.parametrize(("pad", "pad_id"), [(EOS, 49407), ("!", 0)])
def test_transformers_loads_the_tokenizer_files(pad: str, pad_id: int, tmp_path: Path) -> None:
    for path, raw in tokenizer_files("tokenizer", pad=pad, context=77).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(raw)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer.model_max_length, tokenizer.pad_token_id, len(tokenizer)) == (77, pad_id, 49408)
    assert tokenizer(CAPTIONS)["input_ids"] == clip_tokenizer()(CAPTIONS)["input_ids"]
    padded = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77)["input_ids"]
    ours = tokenize(CAPTIONS)
    assert padded == (ours.te1 if pad == EOS else ours.te2).tolist()
    assert tokenizer(["a dog"])["input_ids"] != tokenizer(["a cat"])["input_ids"]
