"""Training of the demo pipeline's image autoencoder, and encoding with it."""

import logging
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch.nn import functional

from quantkit.demo.architecture import LATENT_CHANNELS, LATENT_PX
from quantkit.demo.stepping import adamw, repeatable, set_learning_rate

_ENCODE_BATCH = 1000
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutoencoderSettings:
    """Hyperparameters of the autoencoder."""

    steps: int = 3500
    batch_size: int = 128
    learning_rate: float = 2e-3
    warm_up_steps: int = 200
    weight_decay: float = 0.01
    kl_weight: float = 1e-4
    max_gradient_norm: float = 1.0
    log_every: int = 500


def _to_pixels(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def train_autoencoder(model: AutoencoderKL, images: torch.Tensor, settings: AutoencoderSettings) -> None:
    """Train the autoencoder in place, on the device where it and the images are.

    Args:
        model: the untrained autoencoder, in float32.
        images: uint8, (n, 3, 64, 64).
        settings: hyperparameters.
    """
    parameters = list(model.parameters())
    optimizer = adamw(parameters, settings.weight_decay)
    device = images.device

    def step() -> torch.Tensor:
        chosen = torch.randint(len(images), (settings.batch_size,), device=device)
        pixels = _to_pixels(images[chosen])
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            posterior = model.encode(pixels).latent_dist
            decoded = model.decode(posterior.sample()).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        squared = functional.mse_loss(decoded, pixels)
        loss = functional.l1_loss(decoded, pixels) + squared + settings.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
        optimizer.step()
        return torch.stack([squared.detach(), kl.detach()])

    set_learning_rate(optimizer, settings.learning_rate, 0, settings.steps, settings.warm_up_steps)
    run = repeatable(step, optimizer)
    for index in range(settings.steps):
        set_learning_rate(optimizer, settings.learning_rate, index, settings.steps, settings.warm_up_steps)
        result = run()
        if (index + 1) % settings.log_every == 0 or index + 1 == settings.steps:
            squared, kl = result.tolist()
            psnr_db = -10 * torch.log10(torch.tensor(squared / 4)).item()
            _logger.info("autoencoder step %d: PSNR %.1f dB, KL %.2f", index + 1, psnr_db, kl)


@torch.no_grad()
def encode(model: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode images to packed latents and set the autoencoder's scaling and shift so that these are standardized.

    Args:
        model: the trained autoencoder; its ``shift_factor`` and ``scaling_factor`` are replaced.
        images: uint8, (n, 3, 64, 64).

    Returns:
        bfloat16, (n, 64, 64): per image 64 tokens of 64 channels, as the transformer takes them.
    """
    with torch.autocast(images.device.type, torch.bfloat16):
        parts = [model.encode(_to_pixels(part)).latent_dist.mode() for part in torch.split(images, _ENCODE_BATCH)]
    latents = torch.cat(parts).bfloat16()
    sample = latents[:_ENCODE_BATCH].float()
    shift, scaling = sample.mean().item(), 1 / sample.std().item()
    model.register_to_config(shift_factor=shift, scaling_factor=scaling)
    _logger.info("latents: shift %.4f, scaling %.4f", shift, scaling)
    normalized = (latents.float() - shift) * scaling
    packed: torch.Tensor = FluxPipeline._pack_latents(
        normalized, len(images), LATENT_CHANNELS, LATENT_PX, LATENT_PX
    )
    return packed.bfloat16()
