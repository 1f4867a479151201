"""Convert captions to token ids, with the CLIP vocabulary that both text encoders of SDXL share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from spectune.sdxl.vocabulary import BOS_ID, EOS_ID, clip_vocabulary

__all__ = ["BOS_ID", "EOS_ID", "TokenIds", "clip_tokenizer", "tokenize"]

# OpenAI's encoder pads with the end token, OpenCLIP's with id 0 (the token "!").
PAD_ID_TE1 = EOS_ID
PAD_ID_TE2 = 0


@dataclass(frozen=True)
class TokenIds:
    """Token ids of a batch of captions, one tensor per encoder, each int64 of shape (batch, context)."""

    te1: Tensor
    te2: Tensor


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return the CLIP byte-pair tokenizer, built from the merges in the package."""
    vocabulary = clip_vocabulary()
    # Any: the annotation of `merges` is wrong, the tokenizer takes pairs
    merges = cast("Any", list(vocabulary.merges))
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(vocabulary.words)}, merges=merges)


def tokenize(captions: Sequence[str], context: int = 77) -> TokenIds:
    """Return the token ids of captions for both encoders, truncated or padded to `context` tokens.

    The tokenizer does not pad itself: with "!" as its padding token, as in some configurations of the second
    tokenizer, it would tokenize a "!" in a caption differently.
    """
    rows = [ids[: context - 1] for ids in clip_tokenizer()(list(captions))["input_ids"]]
    rows = [ids if ids[-1] == EOS_ID else [*ids, EOS_ID] for ids in rows]
    return TokenIds(te1=_padded(rows, context, PAD_ID_TE1), te2=_padded(rows, context, PAD_ID_TE2))


def _padded(rows: Sequence[Sequence[int]], context: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (context - len(row))] for row in rows], dtype=torch.long)
