"""Build CLIP's vocabulary from the merges in this package, and the files of its tokenizers."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
BOS_ID = 49406
EOS_ID = 49407

CHUNK_TOKENS = 75  # of a caption in one run of an encoder, between the start and the end token
MAX_TOKENS = 225  # of a caption, by default: three chunks, the most that sd-scripts trains
MOST_TOKENS = 750  # the largest limit that may be set


@dataclass(frozen=True)
class ClipVocabulary:
    """The words by token id, and the pairs that byte-pair encoding merges, in their order."""

    words: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]


@cache
def clip_vocabulary() -> ClipVocabulary:
    """Return 49,408 words: 256 byte symbols, the same with `</w>`, merged pairs, and two special tokens."""
    raw = files("spectune").joinpath("sdxl", "clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(raw).decode("utf-8").splitlines()[1:]
    merges = tuple((left, right) for left, right in (line.split() for line in lines if line))
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += [left + right for left, right in merges] + [BOS, EOS]
    return ClipVocabulary(tuple(words), merges)


def tokenizer_files(folder: str, *, pad: str, context: int) -> dict[str, bytes]:
    """Return the files of a CLIP tokenizer for transformers, by path in a diffusers folder.

    `pad` fills captions up to `context` tokens: `<|endoftext|>` for OpenAI's encoder, `!` for OpenCLIP's.
    """
    vocabulary = clip_vocabulary()
    vocab = {word: n for n, word in enumerate(vocabulary.words)}
    merges = ["#version: 0.2", *(f"{left} {right}" for left, right in vocabulary.merges), ""]
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": context,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        f"{folder}/vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        f"{folder}/merges.txt": "\n".join(merges).encode(),
        f"{folder}/special_tokens_map.json": json.dumps(special, indent=2).encode(),
        f"{folder}/tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _byte_symbols() -> list[str]:
    """Return the 256 printable symbols for bytes in vocabulary order (GPT-2's byte-level alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]
