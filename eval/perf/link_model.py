"""What parallel guidance should gain on given devices and links, from counts alone.

A step of guided sampling runs the denoiser twice. The same devices can run both branches one after the other, with
the weights shared by all (tensor parallelism), or both at once, with the weights shared by half of them::

    python eval/perf/link_model.py

    forward(ranks) = FLOP / (ranks * rate) + sums * latency + 2 (ranks - 1) / ranks * bytes summed / bandwidth
    sequential     = 2 * forward(ranks)
    CFG-parallel   = slowdown of 4 bit * forward(ranks / 2) + 2 * (latency + bytes of a prediction / bandwidth)

The products of a denoiser are counted from its published configuration; text encoder, VAE, scheduler and the
layers that every rank computes alike (embedders, modulation) are left out. Rates are what products and attention
reach together, not peaks. It is a model: nothing here was measured on the devices that it names, but the rate of
the H200.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).resolve().parents[2] / "quantkit" / "families" / "published"
BYTES = 2  # of a bf16 activation


@dataclass(frozen=True)
class Work:
    """One forward pass of a denoiser, batch 1.

    Attributes:
        name: Model and size of what is generated.
        flop: Of all products and attention.
        sums: All-reduces under tensor parallelism.
        summed_bytes: Of the tensors that are summed, all together.
        prediction_bytes: Of the denoiser's result, which CFG-parallel exchanges.
    """

    name: str
    flop: float
    sums: int
    summed_bytes: float
    prediction_bytes: float


@dataclass(frozen=True)
class Machine:
    """Devices of one kind and the link between them.

    Attributes:
        name: For the table.
        rate: FLOP/s that a denoiser reaches on one device.
        bandwidth: Bytes/s that a collective reaches, in one direction.
        latency_s: Of one collective.
        w4_slowdown: Time of W4A16 over BF16 on the same device.
    """

    name: str
    rate: float
    bandwidth: float
    latency_s: float
    w4_slowdown: float


MACHINES = (
    # 98 TFLOP/s peak (half of 197 int8 TOPS), of which half is assumed.
    Machine("B60, PCIe 5.0 x8, peer to peer", 50e12, 25e9, 30e-6, 1.05),
    Machine("B60, PCIe, through the host", 50e12, 6e9, 60e-6, 1.05),
    # FLUX at 1024 x 1024 takes 132 ms compiled, in 4 bit 139 ms (measured): 560 TFLOP/s.
    Machine("H200, NVLink", 560e12, 315e9, 12e-6, 1.05),
)


def flux(height: int, width: int, text: int = 512) -> Work:
    """Count FLUX.1-dev: double blocks sum four tensors over the ranks, image and text apart, single ones one.

    So do their modulations, two and one, which are small.
    """
    config = _config("black-forest-labs/FLUX.1-dev")
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    image = (height // 16) * (width // 16)
    tokens = image + text
    double, single = config["num_layers"], config["num_single_layers"]
    blocks = double + single  # both kinds: 12 hidden^2 weights for every token
    return Work(
        f"FLUX.1-dev {width} x {height}",
        flop=blocks * (2 * 12 * hidden**2 * tokens + 4 * tokens**2 * hidden),
        sums=6 * double + 2 * single,
        summed_bytes=(2 * double + single) * tokens * hidden * BYTES,
        prediction_bytes=image * config["in_channels"] * BYTES,
    )


def wan(height: int, width: int, frames: int = 81, text: int = 512) -> Work:
    """Count one expert of Wan2.2 A14B: three sums a block, and four small ones for norms over all heads."""
    config = _config("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    hidden, wide = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    grid = ((frames - 1) // 4 + 1, height // 16, width // 16)
    tokens = grid[0] * grid[1] * grid[2]
    blocks = config["num_layers"]
    products = 2 * tokens * (6 * hidden**2 + 2 * hidden * wide) + 2 * text * 2 * hidden**2
    attention = 4 * tokens * (tokens + text) * hidden
    return Work(
        f"Wan2.2 A14B {width} x {height} x {frames}",
        flop=blocks * (products + attention),
        sums=7 * blocks,
        summed_bytes=blocks * tokens * (3 * hidden * BYTES + 4 * 4),
        prediction_bytes=4 * tokens * config["in_channels"] * BYTES,
    )


def _config(model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / model / "transformer" / "config.json").read_text("utf-8"))
    return config


def forward_s(work: Work, machine: Machine, ranks: int) -> tuple[float, float]:
    """Return the seconds that a forward pass computes and those that it communicates."""
    compute = work.flop / (ranks * machine.rate)
    if ranks == 1:
        return compute, 0.0
    share = 2 * (ranks - 1) / ranks
    return compute, work.sums * machine.latency_s + share * work.summed_bytes / machine.bandwidth


def sequential_s(work: Work, machine: Machine, ranks: int) -> tuple[float, float]:
    """Return seconds and, of them, communication of a BF16 step with both branches one after the other."""
    compute, sums = forward_s(work, machine, ranks)
    return 2 * (compute + sums), 2 * sums


def parallel_s(work: Work, machine: Machine, ranks: int) -> tuple[float, float]:
    """Return seconds and, of them, communication of a W4A16 step, a branch on each half of the ranks."""
    compute, sums = forward_s(work, machine, ranks // 2)
    exchange = 2 * (machine.latency_s + work.prediction_bytes / machine.bandwidth)
    return machine.w4_slowdown * compute + sums + exchange, sums + exchange


def table(works: Sequence[Work], machines: Sequence[Machine], ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for every combination."""
    rows = []
    for machine in machines:
        for work in works:
            for count in ranks:
                before, before_links = sequential_s(work, machine, count)
                after, after_links = parallel_s(work, machine, count)
                rows.append(
                    {
                        "machine": machine.name,
                        "work": work.name,
                        "ranks": count,
                        "sequential_ms": before * 1e3,
                        "sequential_links": before_links / before,
                        "parallel_ms": after * 1e3,
                        "parallel_links": after_links / after,
                        "speedup": before / after,
                    }
                )
    return rows


def print_tables() -> None:
    """Print the inputs, then what follows from them."""
    works = (flux(1024, 1024), wan(480, 832), wan(720, 1280))
    print(f"{'forward pass':32}{'TFLOP':>8}{'sums':>6}{'MB summed':>11}{'MB predicted':>14}")
    for work in works:
        print(
            f"{work.name:32}{work.flop / 1e12:8.0f}{work.sums:6}{work.summed_bytes / 1e6:11.0f}"
            f"{work.prediction_bytes / 1e6:14.2f}"
        )
    print(f"\n{'machine':32}{'TFLOP/s':>8}{'GB/s':>6}{'latency, us':>13}{'W4 over BF16':>14}")
    for machine in MACHINES:
        print(
            f"{machine.name:32}{machine.rate / 1e12:8.0f}{machine.bandwidth / 1e9:6.0f}"
            f"{machine.latency_s * 1e6:13.0f}{machine.w4_slowdown:14.2f}"
        )
    print(f"\n{'':65}{'BF16, sequential':^22}{'W4A16, CFG = 2':^22}")
    print(
        f"{'machine':32}{'step of':28}{'ranks':>5}{'ms':>12}{'links':>8}{'ms':>14}{'links':>8}{'times faster':>14}"
    )
    for row in table(works, MACHINES, (2, 4)):
        print(
            f"{row['machine']:32}{row['work']:28}{row['ranks']:5}{row['sequential_ms']:12.0f}"
            f"{row['sequential_links']:8.0%}{row['parallel_ms']:14.0f}{row['parallel_links']:8.0%}"
            f"{row['speedup']:14.2f}"
        )


if __name__ == "__main__":
    print_tables()
