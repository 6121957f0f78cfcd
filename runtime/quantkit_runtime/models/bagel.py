"""BAGEL: one decoder with two experts in every layer, a SigLIP tower to see with and flow matching to draw with.

A Mixture of Transformers: tokens of both kinds attend to each other, but each kind has its own projections, norms
and MLPs. Text and images to be understood go through the plain modules, latents to be generated through those whose
names end in ``_moe_gen``. Modules are named as the tensors of ``ema.safetensors``; the VAE lies apart from them in
``ae.safetensors`` and is not part of this class.

Shapes: B batch, T tokens, C channels, H heads, D channels of one head, S tokens in the cache after the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit_runtime.models.bagel_config import BagelConfig, TextConfig
from quantkit_runtime.models.bagel_vision import TwoLayerMLP, VisionTransformer
from quantkit_runtime.models.bagel_writer import BagelWriter

_TIMESTEP_FREQUENCIES = 256
_MAX_TIMESTEP_PERIOD = 10_000


class Cache(Protocol):
    """Keys and values of what was read before; transformers' own caches are such."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take those of new tokens, (B, H, T, D), and return those to attend to, (B, H, S, D)."""
        ...


class Rows(NamedTuple):
    """Which tokens of a batch go to which expert: rows of (B * T, ...), int64."""

    und: Tensor
    gen: Tensor

    @classmethod
    def of(cls, latent: Tensor) -> Rows:
        """Return those of a mask (B, T), True for the generation expert; waits for the device."""
        flat = latent.flatten()
        return cls((~flat).nonzero()[:, 0], flat.nonzero()[:, 0])


def _route(
    und: Callable[[Tensor], Tensor], gen: Callable[[Tensor], Tensor], x: Tensor, rows: Rows | None
) -> Tensor:
    """Send every token to its expert.

    Args:
        und: Understanding expert.
        gen: Generation expert.
        x: (B, T, ...).
        rows: Of each expert; None if all are the first one's.
    """
    if rows is None:
        return und(x)
    flat = x.flatten(0, 1)
    understood, drawn = und(flat[rows.und]), gen(flat[rows.gen])
    result = drawn.new_empty(flat.shape[0], *drawn.shape[1:])
    result[rows.und], result[rows.gen] = understood, drawn
    return result.view(*x.shape[:2], *drawn.shape[1:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (B, H, T, D) to their positions; cos and sin are (B or 1, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Attend with several query heads to each head of keys and values; arguments as in `Attention`.

    With a mask, torch's kernels that hold no scores in memory want as many heads of each.
    """
    attend = functional.scaled_dot_product_attention
    if mask is None:
        return attend(query, key, value, is_causal=is_causal, enable_gqa=True)
    group = query.shape[1] // key.shape[1]
    if query.shape[2] == 1:  # the heads of a group are rows that see the same: nothing is repeated
        rows = query.reshape(query.shape[0], key.shape[1], group, -1)
        return attend(rows, key, value, attn_mask=mask).reshape(query.shape)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    return attend(query, key, value, attn_mask=mask)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalized per head before they are rotated."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries)
        self.k_proj = nn.Linear(config.hidden_size, keys)
        self.v_proj = nn.Linear(config.hidden_size, keys)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.q_proj_moe_gen = nn.Linear(config.hidden_size, queries)
        self.k_proj_moe_gen = nn.Linear(config.hidden_size, keys)
        self.v_proj_moe_gen = nn.Linear(config.hidden_size, keys)
        self.o_proj_moe_gen = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm_moe_gen = nn.RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm_moe_gen = nn.RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        is_causal: bool,
        rows: Rows | None,
        cache: Cache | None,
    ) -> Tensor:
        """See `DecoderLayer.forward`."""
        query = self._split(_route(self.q_proj, self.q_proj_moe_gen, hidden_states, rows))
        key = self._split(_route(self.k_proj, self.k_proj_moe_gen, hidden_states, rows))
        value = self._split(_route(self.v_proj, self.v_proj_moe_gen, hidden_states, rows)).transpose(1, 2)
        query = _route(self.q_norm, self.q_norm_moe_gen, query, rows).transpose(1, 2)
        key = _route(self.k_norm, self.k_norm_moe_gen, key, rows).transpose(1, 2)
        query, key = _rotate(query, *position_embeddings), _rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        attended = _attend(query, key, value, attention_mask, is_causal=is_causal)
        return _route(self.o_proj, self.o_proj_moe_gen, attended.transpose(1, 2).flatten(2), rows)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, H * D) to (B, T, H, D)."""
        return x.view(*x.shape[:-1], -1, self.head_dim)


class MLP(nn.Module):
    """Gated MLP of one expert."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class DecoderLayer(nn.Module):
    """One layer with both experts."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.mlp_moe_gen = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_moe_gen = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_moe_gen = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        rows: Rows | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (B, T, C).
            position_embeddings: Cosine and sine of the rotary angles, each (B or 1, T, D).
            attention_mask: Bool (B or 1, 1, T, S), True where a query may look; None is everywhere.
            is_causal: Whether no token looks ahead; without a mask and what was read before.
            rows: Of each expert; None if all are the understanding one's.
            cache: What was read before, and takes these tokens, too.

        Returns:
            (B, T, C).
        """
        normed = _route(self.input_layernorm, self.input_layernorm_moe_gen, hidden_states, rows)
        hidden_states = hidden_states + self.self_attn(
            normed, position_embeddings, attention_mask, is_causal, rows, cache
        )
        normed = _route(self.post_attention_layernorm, self.post_attention_layernorm_moe_gen, hidden_states, rows)
        return hidden_states + _route(self.mlp, self.mlp_moe_gen, normed, rows)


class Decoder(nn.Module):
    """The layers, from embedded tokens to normed hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        is_causal: bool = True,
        latent: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            hidden_states: Embedded tokens (B, T, C).
            positions: Int64 (B or 1, T); None is 0 to T - 1. All tokens of a picture have one.
            attention_mask: See `DecoderLayer.forward`; it takes the place of ``is_causal``.
            is_causal: See `DecoderLayer.forward`.
            latent: Bool (B, T), True for tokens of the generation expert; None if there are none.
            cache: See `DecoderLayer.forward`.

        Returns:
            (B, T, C), normed.
        """
        if positions is None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        position_embeddings = self._rotary_angles(positions, hidden_states.dtype)
        rows = None if latent is None else Rows.of(latent)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                is_causal=is_causal and attention_mask is None,
                rows=rows,
                cache=cache,
            )
        return _route(self.norm, self.norm_moe_gen, hidden_states, rows)

    def _rotary_angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device).float() / self.head_dim
        angles = positions.float()[..., None] / self.rope_theta**exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class LanguageModel(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """See `Bagel.forward`."""
        logits: Tensor = self.lm_head(self.model(self.model.embed_tokens(input_ids)))
        return logits


class PositionTable(nn.Module):
    """Fixed position embeddings of a square grid, as stored in the checkpoint."""

    def __init__(self, positions: int, hidden_size: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(positions, hidden_size), requires_grad=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Look up int64 positions of any shape; one row of channels for each."""
        return self.pos_embed[positions]


class TimestepEmbedder(nn.Module):
    """Embeds the time of flow matching."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(_TIMESTEP_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map timesteps (N,) in [0, 1] to (N, C)."""
        half = _TIMESTEP_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(_MAX_TIMESTEP_PERIOD) / half * steps)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        result: Tensor = self.mlp(waves.to(self.mlp.get_parameter("0.weight").dtype))
        return result


class Bagel(nn.Module):
    """A whole BAGEL model but for its VAE.

    Calling it reads text: token ids to logits.
    """

    # The VAE's, which lie beside the model's own.
    _keys_to_ignore_on_load_unexpected = (r"^(encoder|decoder)\.",)

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        hidden_size = config.text.hidden_size
        self.config = config
        self.language_model = LanguageModel(config.text)
        self.vit_model = nn.ModuleDict({"vision_model": VisionTransformer(config.vision)})
        self.connector = TwoLayerMLP(config.vision.hidden_size, hidden_size, hidden_size)
        self.vit_pos_embed = PositionTable(config.image_positions, hidden_size)
        self.time_embedder = TimestepEmbedder(hidden_size)
        self.latent_pos_embed = PositionTable(config.latent_positions, hidden_size)
        self.vae2llm = nn.Linear(config.latent_dim, hidden_size)
        self.llm2vae = nn.Linear(hidden_size, config.latent_dim)

    @classmethod
    def from_folder(cls, folder: Path) -> Bagel:
        """Build the model that the configuration files of a folder describe, without loading its weights.

        Raises:
            CheckpointFormatError: See `BagelConfig.read`.
        """
        return cls(BagelConfig.read(folder))

    def make_writer(self, tokenizer: Any) -> BagelWriter:
        """Return what writes text with this model, see `quantkit_runtime.generation.writer.writer_of`."""
        return BagelWriter(self, tokenizer)

    def embed_picture(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return a picture as the decoder's understanding expert reads it.

        Args:
            patches: (T, pixels of a patch), see `VisionTransformer.forward`.
            positions: Int64 (T,), likewise.

        Returns:
            (T, C).
        """
        seen = self.vit_model["vision_model"](patches[None].to(self.connector.fc1.weight.dtype), positions[None])
        embedded: Tensor = self.connector(seen)[0] + self.vit_pos_embed(positions)
        return embedded

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the next token after each token of a text.

        Args:
            input_ids: Int64 (B, T). Texts of a batch may be padded at their ends: no token looks ahead.

        Returns:
            (B, T, vocabulary), in the model's dtype.
        """
        logits: Tensor = self.language_model(input_ids)
        return logits
