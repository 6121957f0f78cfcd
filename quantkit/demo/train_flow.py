"""Training of the demo pipeline's transformer together with its two text encoders, by flow matching."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, T5EncoderModel

from quantkit.demo.architecture import LATENT_PX, TEXT_WIDTH
from quantkit.demo.dataset import LABEL_SIZES
from quantkit.demo.stepping import adamw, repeatable, set_learning_rate
from quantkit.demo.tokenizers import CAPTION_TOKENS, T5_MAX_TOKENS

_IGNORED = -100  # the label that cross_entropy skips
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowSettings:
    """Hyperparameters of the transformer and the text encoders.

    Most steps use captions padded to ``CAPTION_TOKENS``; every ``long_every``-th one adds a small batch padded to
    the pipeline's default of ``T5_MAX_TOKENS``, because FLUX attends to padding and would draw worse there.
    """

    steps: int = 28_000
    batch_size: int = 256
    long_every: int = 6
    long_batch_size: int = 40
    learning_rate: float = 1e-3
    warm_up_steps: int = 500
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    label_weight: float = 0.1
    ema_decay: float = 0.9995
    max_gradient_norm: float = 1.0
    log_every: int = 1000
    score_every: int = 7000


class TextToFlow(nn.Module):
    """The trained part of the pipeline, with heads that read the caption's attributes from both text encoders.

    The heads are dropped after training: their loss only makes the text encoders learn to read before the
    transformer has learned to draw.
    """

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        """Join the components, which are trained in place."""
        super().__init__()
        self.clip = clip
        self.t5 = t5
        self.transformer = transformer
        side = LATENT_PX // 2
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
        self.register_buffer("image_ids", image_ids)
        self.clip_heads = nn.Linear(TEXT_WIDTH, sum(LABEL_SIZES))
        self.t5_heads = nn.Linear(TEXT_WIDTH, sum(LABEL_SIZES))

    def forward(
        self, noisy: torch.Tensor, timestep: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict the velocity and the caption's attributes.

        Args:
            noisy: packed latents, (batch, 64, 64).
            timestep: (batch,), from 0 (image) to 1 (noise).
            clip_ids: (batch, 48).
            t5_ids: (batch, tokens).

        Returns:
            The velocity, like ``noisy``, and two sets of logits, (batch, sum(LABEL_SIZES)).
        """
        pooled = self.clip(clip_ids).pooler_output
        tokens = self.t5(t5_ids).last_hidden_state
        velocity = self.transformer(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=noisy.device),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        is_word = (t5_ids != self.t5.config.pad_token_id).unsqueeze(-1)
        mean_token = (tokens * is_word).sum(1) / is_word.sum(1)
        return velocity, self.clip_heads(pooled), self.t5_heads(mean_token)

    def kept_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that belong to the pipeline, in a fixed order."""
        return [
            *self.clip.parameters(),
            *self.t5.parameters(),
            *self.transformer.parameters(),
        ]


@dataclass
class FlowData:
    """What a step draws its batch from, all on the training device.

    Attributes:
        latents: bfloat16, (n, 64, 64), packed and standardized.
        clip_ids: int64, (n, 48).
        t5_ids: int64, (n, 48).
        labels: int64, (n, len(LABEL_SIZES)).
        empty_clip_ids, empty_t5_ids: the empty caption, (48,).
    """

    latents: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    labels: torch.Tensor
    empty_clip_ids: torch.Tensor
    empty_t5_ids: torch.Tensor


def _label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    parts = torch.split(logits.float(), list(LABEL_SIZES), dim=1)
    losses = [functional.cross_entropy(part, labels[:, i], ignore_index=_IGNORED) for i, part in enumerate(parts)]
    return torch.stack(losses).mean()


def _timesteps(count: int, device: torch.device) -> torch.Tensor:
    """Draw noise levels: half of them logit-normal, half uniform so that the ends, where layout forms, are seen."""
    normal = torch.sigmoid(torch.randn(count, device=device))
    uniform = torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < 0.5, normal, uniform)


def _as_seen_in_bfloat16(timestep: torch.Tensor) -> torch.Tensor:
    """Round half of the noise levels as the transformer does when the pipeline runs in bfloat16."""
    rounded = (timestep.bfloat16() * 1000).float() / 1000
    return torch.where(torch.rand_like(timestep) < 0.5, rounded, timestep)


def _losses(
    model: TextToFlow, data: FlowData, batch_size: int, tokens: int, caption_dropout: float
) -> torch.Tensor:
    device = data.latents.device
    chosen = torch.randint(len(data.latents), (batch_size,), device=device)
    dropped = torch.rand(batch_size, 1, device=device) < caption_dropout
    clip_ids = torch.where(dropped, data.empty_clip_ids, data.clip_ids[chosen])
    t5_ids = torch.where(dropped, data.empty_t5_ids, data.t5_ids[chosen])
    padding = tokens - t5_ids.shape[1]
    t5_ids = functional.pad(t5_ids, (0, padding), value=model.t5.config.pad_token_id)
    labels = torch.where(dropped, _IGNORED, data.labels[chosen])
    clean = data.latents[chosen].float()
    noise = torch.randn_like(clean)
    sigma = _timesteps(batch_size, device)
    level = sigma[:, None, None]
    noisy = (1 - level) * clean + level * noise
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        velocity, clip_logits, t5_logits = model(noisy, _as_seen_in_bfloat16(sigma), clip_ids, t5_ids)
    flow = functional.mse_loss(velocity.float(), noise - clean)
    return torch.stack([flow, _label_loss(clip_logits, labels), _label_loss(t5_logits, labels)])


def train_flow(
    model: TextToFlow,
    data: FlowData,
    settings: FlowSettings,
    on_score: Callable[[int, TextToFlow], None],
) -> TextToFlow:
    """Train, and return a copy of the model with the moving average of the weights.

    Args:
        model: the untrained model in float32, on the data's device; trained in place.
        data: what batches are drawn from.
        settings: hyperparameters.
        on_score: called every ``score_every`` steps and at the end with the step and the averaged model.
    """
    averaged = copy.deepcopy(model)
    if torch.cuda.is_available():
        model.transformer.compile_repeated_blocks(dynamic=False)
    parameters = list(model.parameters())
    kept, average = model.kept_parameters(), averaged.kept_parameters()
    optimizer = adamw(parameters, settings.weight_decay)
    decay = torch.zeros((), device=data.latents.device)

    def step(long_share: bool) -> torch.Tensor:
        losses = _losses(model, data, settings.batch_size, CAPTION_TOKENS, settings.caption_dropout)
        if long_share:
            extra = _losses(model, data, settings.long_batch_size, T5_MAX_TOKENS, settings.caption_dropout)
            weight = settings.long_batch_size / (settings.batch_size + settings.long_batch_size)
            losses = losses + weight * (extra - losses)
        optimizer.zero_grad(set_to_none=True)
        (losses[0] + settings.label_weight * (losses[1] + losses[2])).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
        optimizer.step()
        with torch.no_grad():
            fresh = 1 - decay
            for mean, value in zip(average, kept, strict=True):
                mean.lerp_(value, fresh)
        return losses.detach()

    set_learning_rate(optimizer, settings.learning_rate, 0, settings.steps, settings.warm_up_steps)
    run_short = repeatable(lambda: step(long_share=False), optimizer)
    run_long = repeatable(lambda: step(long_share=True), optimizer)
    for index in range(settings.steps):
        set_learning_rate(optimizer, settings.learning_rate, index, settings.steps, settings.warm_up_steps)
        # A young average must not remember the random start.
        decay.fill_(min(settings.ema_decay, (index + 1) / (index + 10)))
        losses = run_long() if index % settings.long_every == 0 else run_short()
        done = index + 1
        if done % settings.log_every == 0 or done == settings.steps:
            _logger.info("flow step %d: flow %.4f, labels CLIP %.4f T5 %.4f", done, *losses.tolist())
        if done % settings.score_every == 0 or done == settings.steps:
            on_score(done, averaged)
    return averaged
