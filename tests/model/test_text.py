"""Token ids against values published with CLIP."""

import pytest
import torch

from spectune.model.text import clip_tokenizer, count_tokens, tokenize
from spectune.sdxl.vocabulary import BOS_ID, EOS_ID


def test_vocabulary_size_and_ids_of_a_cat():
    assert len(clip_tokenizer()) == 49408
    ids = tokenize(["a cat"])
    assert ids.te1.shape == ids.te2.shape == (1, 77)
    assert ids.te1[0, :5].tolist() == [49406, 320, 2368, 49407, 49407]
    assert ids.te2[0, :5].tolist() == [49406, 320, 2368, 49407, 0]


def test_an_exclamation_mark_is_a_word_not_padding():
    assert tokenize(["cat!"]).te2[0, :4].tolist() == [49406, 2368, 256, 49407]


def test_an_empty_caption_and_case_and_spaces():
    assert tokenize([""]).te1[0, :2].tolist() == [49406, 49407]
    first, second = tokenize(["A  Cat"]), tokenize(["a cat"])
    assert torch.equal(first.te1, second.te1)


def test_a_long_caption_has_chunks_with_their_own_start_and_end_tokens():
    ids = tokenize(["dog " * 20, "a cat", "dog " * 14], context=16)
    assert ids.chunks == (2, 1, 1)
    assert ids.te2.shape == (4, 16)
    dog = ids.te2[0, 1].item()
    assert ids.te2[0].tolist() == [BOS_ID, *[dog] * 14, EOS_ID]
    assert ids.te2[1].tolist() == [BOS_ID, *[dog] * 6, EOS_ID, *[0] * 8]
    assert ids.te1[1].tolist() == [BOS_ID, *[dog] * 6, EOS_ID, *[EOS_ID] * 8]
    assert torch.equal(ids.te1[3], ids.te1[0])


@pytest.mark.parametrize(("max_tokens", "chunks"), [(75, 1), (150, 2), (225, 3), (300, 3)])
def test_tokens_beyond_the_limit_are_cut(max_tokens, chunks):
    ids = tokenize(["dog " * 220], max_tokens=max_tokens)
    assert ids.te1.shape == (chunks, 77)
    assert count_tokens(["dog " * 220, "", "cat!"]) == [220, 0, 2]
    assert count_tokens([]) == []
