"""The CLIP and T5 tokenizers of the demo pipeline, built from the captions' own vocabulary.

Every word of a caption is one token. Anything else falls back to bytes (CLIP) or characters (T5), so any prompt
tokenizes.
"""

import string
from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from quantkit.demo.captions import vocabulary

CAPTION_TOKENS = 48  # the longest caption has 32
T5_MAX_TOKENS = 512  # FluxPipeline's default

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_WORD_SCORE, _CHARACTER_SCORE = -1.0, -10.0


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one symbol.

    The tokenizers library has a trainer, but it breaks ties differently from run to run.
    """
    spelled = [[*word[:-1], word[-1] + _END_OF_WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spelled):
        counts = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        spelled = [_merge(symbols, merges[-1]) for symbols in spelled]
    return merges


def build_clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer, lower case, in which each caption word is one token."""
    merges = _learn_merges(sorted({word.lower() for word in vocabulary()}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}{_END_OF_WORD}" for letter in alphabet), *map("".join, merges), _BOS, _EOS]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=CAPTION_TOKENS,
    )


def build_t5_tokenizer() -> T5Tokenizer:
    """Build a unigram tokenizer in which each caption word is one token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", _CHARACTER_SCORE)]
    pieces += [(f"▁{word}", _WORD_SCORE) for word in vocabulary()]
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces += [(character, _CHARACTER_SCORE) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_MAX_TOKENS)
