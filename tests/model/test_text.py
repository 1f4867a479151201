"""Token ids against values published with CLIP."""

import torch

from spectune.model.text import clip_tokenizer, tokenize
from spectune.sdxl.vocabulary import EOS_ID


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


def test_a_long_caption_is_truncated_before_the_end_token():
    ids = tokenize(["dog " * 200], context=16)
    assert ids.te2.shape == (1, 16)
    assert ids.te2[0, -1].item() == EOS_ID
    assert (ids.te2[0, 1:-1] == ids.te2[0, 1]).all()
