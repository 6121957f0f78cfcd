"""Running one training step again and again: as a CUDA graph where there is a GPU, plainly elsewhere."""

import logging
import math
from collections.abc import Callable

import torch

_WARM_UP_STEPS = 3
_logger = logging.getLogger(__name__)


def repeatable(step: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
    """Return a function that runs ``step`` once and returns what it returns.

    On a GPU the step is captured in a CUDA graph after a few warm-up runs (which train, too): the model is so
    small that launching its kernels one by one takes several times longer than running them.

    Args:
        step: draws its own batch, calls backward, steps the optimizer; all on the current device, without
            synchronizing. Returns a tensor.
        optimizer: the optimizer that ``step`` steps; on a GPU it must be capturable.
    """
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_STEPS):
            optimizer.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        result = step()
    _logger.info("captured a training step")

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def adamw(parameters: list[torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """Return an AdamW whose learning rate is a tensor, so that it can change under a CUDA graph."""
    on_gpu = torch.cuda.is_available()
    device = parameters[0].device
    return torch.optim.AdamW(
        parameters,
        lr=torch.zeros((), device=device),
        betas=(0.9, 0.99),
        weight_decay=weight_decay,
        fused=on_gpu,
        capturable=on_gpu,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warm_up: int) -> None:
    """Set the rate of ``step`` on a linear warm-up followed by half a cosine to zero."""
    progress = min(max(step - warm_up, 0) / max(steps - warm_up, 1), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"].fill_(peak * min((step + 1) / warm_up, 1.0) * cosine)
