"""Captions to token ids: the one CLIP vocabulary that both SDXL text encoders share."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
BOS_ID = 49406
EOS_ID = 49407

# OpenAI pads with the end token, OpenCLIP with id 0 ("!" before a word end).
PAD_ID_TE1 = EOS_ID
PAD_ID_TE2 = 0


@dataclass(frozen=True)
class TokenIds:
    """Token ids of a batch of captions, one tensor per encoder, each int64 of shape (batch, context)."""

    te1: Tensor
    te2: Tensor


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """The CLIP byte-pair tokenizer, built from the merges that the package carries."""
    raw = files("spectune.model").joinpath("clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(raw).decode("utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    symbols = _byte_symbols()
    words = symbols + [symbol + "</w>" for symbol in symbols]
    words += [left + right for left, right in merges] + [BOS, EOS]
    # pairs, whatever its annotation says
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=cast("Any", merges))


def tokenize(captions: Sequence[str], context: int = 77) -> TokenIds:
    """Token ids of `captions` for both encoders, cut or padded to `context` tokens.

    Padding is done here and not by the tokenizer: declaring "!" as padding token, as some
    configurations of the second tokenizer do, would also change how a "!" in a caption is read.
    """
    rows = [ids[: context - 1] for ids in clip_tokenizer()(list(captions))["input_ids"]]
    rows = [ids if ids[-1] == EOS_ID else [*ids, EOS_ID] for ids in rows]
    return TokenIds(te1=_padded(rows, context, PAD_ID_TE1), te2=_padded(rows, context, PAD_ID_TE2))


def _padded(rows: Sequence[Sequence[int]], context: int, pad: int) -> Tensor:
    return torch.tensor([[*row, *[pad] * (context - len(row))] for row in rows], dtype=torch.long)


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in vocabulary order (GPT-2's byte-level alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]
