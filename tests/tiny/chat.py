"""A causal language model of text alone, for what all chat families share."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.families.language import LanguageFamily
from quantkit.recipe.schema import Sampling
from rounding import round_component
from tiny.tokenizers import WORDS, chat_tokenizer

FAMILY = LanguageFamily(
    name="tiny-chat", task="chat", blocks={"model": ("model.layers",)}, sampling=Sampling(max_new_tokens=64)
)

_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_chat(folder: Path, *, seed: int = 0, template: bool = True) -> Path:
    """Save a random Llama of two layers, 128 wide, that writes varied text; return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = chat_tokenizer(["<|user|>", "<|assistant|>"], **({"chat_template": _TEMPLATE} if template else {}))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        # It neither pads nor names roles, and ends sometimes: words and digits are what it writes.
        model.lm_head.weight[: len(tokenizer) - len(WORDS) - 10] *= 0.1
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def round_chat(source: Path, target: Path, *, bits: int = 4, group_size: int = 64) -> Path:
    """Copy a model with the Linears of its layers rounded to nearest and packed; return its folder."""
    return round_component(source, target, ("model.layers",), bits=bits, group_size=group_size)
