"""The SigLIP tower with which BAGEL sees: patches cut beforehand, features of the layer before the last.

Shapes: B images, T patches, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from quantkit_runtime.models.bagel_config import VisionConfig


class VisionAttention(nn.Module):
    """Attention of all patches of an image to each other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        query, key, value = (
            project(x).view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result


class TwoLayerMLP(nn.Module):
    """Two Linears with a GELU between them: the MLP of the tower, and the connector behind it."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return result


class VisionLayer(nn.Module):
    """One layer of the tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = TwoLayerMLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        result: Tensor = x + self.mlp(self.layer_norm2(x))
        return result


class VisionTransformer(nn.Module):
    """SigLIP without its last layer and its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch_dim = config.num_channels * config.patch_size**2
        positions = (config.image_size // config.patch_size) ** 2
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(patch_dim, config.hidden_size),
                "position_embedding": nn.Embedding(positions, config.hidden_size),
            }
        )
        layers = (VisionLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            patches: (B, T, pixels of a patch), rows and columns of pixels first, channels last.
            positions: Int64 (B, T): row * (image_size // patch_size) + column of each patch.

        Returns:
            (B, T, C).
        """
        embedded = self.embeddings["patch_embedding"](patches) + self.embeddings["position_embedding"](positions)
        result: Tensor = self.post_layernorm(self.encoder["layers"](embedded))
        return result
