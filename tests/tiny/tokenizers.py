"""Local tokenizers with a handful of tokens, of the classes that the real pipelines use."""

from __future__ import annotations

import json
import string
from pathlib import Path

WORDS = ["a", "red", "blue", "circle", "square", "on", "the", "left", "right", "white", "black"]


def clip_tokenizer(folder: Path):
    """Save and return a tokenizer of single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    tokenizer.save_pretrained(folder)
    return tokenizer


def t5_tokenizer():
    """Return a tokenizer of whole words that ends every text with ``</s>``."""
    from tokenizers import processors

    return _word_tokenizer(
        ["<pad>", "</s>", "<unk>"],
        eos_token="</s>",
        post_processor=processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
    )


def chat_tokenizer(specials: list[str], **kwargs):
    """Return a tokenizer of whole words with special tokens and, if given, a chat template."""
    return _word_tokenizer(
        ["<pad>", "<|endoftext|>", "<unk>", *specials, *string.digits], eos_token="<|endoftext|>", **kwargs
    )


def _word_tokenizer(specials: list[str], *, eos_token: str, post_processor=None, **kwargs):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor is not None:
        backend.post_processor = post_processor
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token=eos_token,
        unk_token="<unk>",
        additional_special_tokens=[token for token in specials[3:] if len(token) > 1],
        model_max_length=512,
        **kwargs,
    )
