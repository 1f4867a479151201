"""Convert captions to token ids, with the CLIP vocabulary that both text encoders of SDXL share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from spectune.extras import check_version
from spectune.sdxl.vocabulary import BOS_ID, CHUNK_TOKENS, EOS_ID, MAX_TOKENS, clip_vocabulary

__all__ = ["BOS_ID", "EOS_ID", "TokenIds", "clip_tokenizer", "count_tokens", "has_weights", "tokenize"]

check_version("transformers", "train")  # here, because everything that uses transformers imports this module

_WEIGHT = re.compile(r"\([^()]*:\s*[+-]?(\d(\.\d*)?|\.\d+)\s*\)")

# OpenAI's encoder pads with the end token, OpenCLIP's with id 0 (the token "!").
PAD_ID_TE1 = EOS_ID
PAD_ID_TE2 = 0


@dataclass(frozen=True)
class TokenIds:
    """Token ids of a batch of captions, one tensor per encoder, each int64 of shape (chunks, context).

    `chunks` is the number of rows of each caption. None: one row per caption.
    """

    te1: Tensor
    te2: Tensor
    chunks: tuple[int, ...] | None = None

    @property
    def is_single(self) -> bool:
        """Whether each caption has one row."""
        return self.chunks is None or max(self.chunks) == 1


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Return the CLIP byte-pair tokenizer, built from the merges in the package."""
    vocabulary = clip_vocabulary()
    # Any: the annotation of `merges` is wrong, the tokenizer takes pairs
    merges = cast("Any", list(vocabulary.merges))
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(vocabulary.words)}, merges=merges)


def tokenize(captions: Sequence[str], context: int = 77, *, max_tokens: int = MAX_TOKENS) -> TokenIds:
    """Return the token ids of captions for both encoders, in chunks of `context` tokens.

    Each chunk has its own start and end token. A caption has as many chunks as it needs, at least one, and at
    most `max_tokens` / 75; the tokens beyond are cut. ComfyUI and sd-scripts split captions in the same way,
    except that ComfyUI does not split words.

    The tokenizer does not pad itself: with "!" as its padding token, as in some configurations of the second
    tokenizer, it would tokenize a "!" in a caption differently.
    """
    size = context - 2
    longest = max_tokens // CHUNK_TOKENS * size
    rows: list[list[int]] = []
    chunks: list[int] = []
    for ids in clip_tokenizer()(list(captions))["input_ids"]:
        words = ids[1:-1][:longest]
        starts = range(0, max(len(words), 1), size)
        rows += [[BOS_ID, *words[start : start + size], EOS_ID] for start in starts]
        chunks.append(len(starts))
    return TokenIds(
        te1=_padded(rows, context, PAD_ID_TE1), te2=_padded(rows, context, PAD_ID_TE2), chunks=tuple(chunks)
    )


def count_tokens(captions: Sequence[str]) -> list[int]:
    """Return the number of tokens of each caption, without start and end tokens."""
    return [len(ids) - 2 for ids in clip_tokenizer()(list(captions))["input_ids"]] if captions else []


def has_weights(caption: str) -> bool:
    """Return whether a caption contains a weight such as (word:1.2). spectune uses it as text."""
    return _WEIGHT.search(caption) is not None


def _padded(rows: Sequence[Sequence[int]], context: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (context - len(row))] for row in rows], dtype=torch.long)
