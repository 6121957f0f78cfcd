"""Images per minute and peak memory of a full-size FLUX.1-dev with random weights, and how many fit into a card.

Runs on one accelerator; nothing is downloaded. Needed: quantkit_runtime, torch, diffusers (and transformers, which
its FLUX pipeline needs)::

    python eval/perf/full_flux.py --output full-flux.json

Every replica is a process of its own with the whole pipeline: transformer, both text encoders, VAE. First each
variant runs alone; then as many replicas as fit into ``--card-gb`` run at the same time on this device, so that
the throughput at equal memory is measured and not computed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VARIANTS = ("bf16", "w4a16", "fp8")
CARDS = {"24 GB": 24 * 2**30, "48 GB": 48 * 2**30, "80 GB": 80 * 2**30, "141 GB": 141 * 10**9}
USABLE = 0.97  # the driver and other processes take some
_CONFIGS = Path(__file__).parents[2] / "quantkit/families/published/black-forest-labs/FLUX.1-dev"
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_TEXT_TOKENS = 512


def main(arguments: list[str] | None = None) -> None:
    """Measure every variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--size", type=int, default=1024, help="width and height (default 1024)")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (default 28)")
    parser.add_argument("--images", type=int, default=4, help="per replica, one more to warm up (default 4)")
    parser.add_argument("--card-gb", type=float, default=80.0, help="memory to fill with replicas (default 80)")
    parser.add_argument("--most", type=int, default=4, help="replicas to run at once (default 4)")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        work(given)
        return
    rows = []
    for variant in given.variants:
        alone = together(given, variant, 1)
        if "unavailable" in alone:
            rows.append(alone)
            continue
        count = min(int(given.card_gb * 2**30 * USABLE / alone["peak_bytes"]), given.most)
        filled = together(given, variant, count) if count > 1 else alone
        fit = {name: int(size * USABLE / alone["peak_bytes"]) for name, size in CARDS.items()}
        rows.append(alone | {"fit": fit, "filled": {"replicas": count, "per_minute": filled.get("per_minute")}})
    result = {"date": time.strftime("%Y-%m-%d"), "settings": {**vars(given), "output": None}, "rows": rows}
    result |= _machine()
    print_table(result)
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


def together(given: argparse.Namespace, variant: str, count: int) -> dict[str, Any]:
    """Run so many replicas at the same time; return their joint throughput and the peak memory of one."""
    options = ["--size", str(given.size), "--steps", str(given.steps), "--images", str(given.images)]
    options += ["--compile"] if given.compile else []
    command = [sys.executable, str(Path(__file__)), "--worker", variant, *options]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for worker in workers:
            ready = _read(worker)
            if "unavailable" in ready:
                return {"variant": variant} | ready
        begin = time.perf_counter()
        for worker in workers:  # loaded and warm: now all at once
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        results = [_read(worker) for worker in workers]
        seconds = time.perf_counter() - begin
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for result in results:
        if "unavailable" in result:
            return {"variant": variant} | result
    return results[0] | {
        "variant": variant,
        "replicas": count,
        "per_minute": 60 * count * given.images / seconds,
        "peak_bytes": max(result["peak_bytes"] for result in results),
    }


def _read(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {"unavailable": f"the process ended with {worker.wait()}; its errors are above"}


def work(given: argparse.Namespace) -> None:
    """Be one replica: load, warm up, say so, wait, draw, tell the times."""
    import torch

    from quantkit_runtime.errors import QuantkitRuntimeError

    if not torch.accelerator.is_available():
        _tell(unavailable="no accelerator")
        return
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    try:
        draw, parts = build(given.worker, device, given.size, given.compile)
        draw(2)
        draw(given.steps)
        torch.accelerator.synchronize()
        # What this process really takes of the card: tensors, the allocator's slack, the driver's context.
        _tell(ready=True)
        sys.stdin.readline()
        torch.accelerator.reset_peak_memory_stats()
        times = []
        for _ in range(given.images):
            begin = time.perf_counter()
            draw(given.steps)
            torch.accelerator.synchronize()
            times.append(time.perf_counter() - begin)
        peak = int(torch.accelerator.max_memory_reserved()) + _context_bytes()
        _tell(image_s=sorted(times)[len(times) // 2], peak_bytes=peak, weights_bytes=parts)
    except (QuantkitRuntimeError, torch.OutOfMemoryError) as error:
        _tell(unavailable=str(error).splitlines()[0])


def _context_bytes() -> int:
    """Memory of the driver's context: half a gigabyte is what CUDA takes for a process with these kernels."""
    return 512 * 2**20


def build(variant: str, device: Any, size: int, compiles: bool) -> tuple[Any, dict[str, int]]:
    """Return what draws one image, and the bytes of each component's weights."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    import random_weights

    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(_config("transformer"))
        reader = T5EncoderModel(T5Config(**_config("text_encoder_2")))

    def replace(name: str, module: torch.nn.Module) -> Any:
        if variant == "bf16" or not isinstance(module, torch.nn.Linear) or not name.startswith(_BLOCKS):
            return None
        compute = "fp8" if variant == "fp8" else "16bit"
        return random_weights.packed_linear(
            module, device=device, dtype=torch.bfloat16, generator=generator, compute=compute, backend="auto"
        )

    random_weights.fill(transformer, device=device, dtype=torch.bfloat16, generator=generator, replace=replace)
    random_weights.fill(reader, device=device, dtype=torch.bfloat16, generator=generator)
    pooler = CLIPTextModel(CLIPTextConfig(**_config("text_encoder"))).to(device, torch.bfloat16)
    vae = AutoencoderKL.from_config({**_config("vae"), "scaling_factor": 0.3611, "shift_factor": 0.1159}).to(
        device, torch.bfloat16
    )
    for module in (transformer, reader, pooler, vae):
        module.eval().requires_grad_(False)
    if compiles:
        transformer.compile_repeated_blocks()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int) -> None:
        tokens = torch.randint(1, 32000, (1, _TEXT_TOKENS), device=device)
        with torch.inference_mode():
            pipe(
                prompt_embeds=reader(tokens).last_hidden_state,
                pooled_prompt_embeds=pooler(tokens[:, :77]).pooler_output,
                height=size, width=size, num_inference_steps=steps, guidance_scale=3.5, output_type="pt",
            )  # fmt: skip

    parts = {"transformer": transformer, "text_encoder_2": reader, "text_encoder": pooler, "vae": vae}
    return draw, {name: random_weights.stored_bytes(module) for name, module in parts.items()}


def _config(component: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_CONFIGS / component / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in ("architectures", "model_type", "torch_dtype")}


def _machine() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return {"device": name, "versions": {"torch": torch.__version__}}


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def print_table(result: dict[str, Any]) -> None:
    """Print one line per variant, as Markdown."""
    cards = " | ".join(f"fit into {name}" for name in CARDS)
    print(f"{result['device']}; {result['settings']['size']} px, {result['settings']['steps']} steps")
    print(f"| | s per image | images/min | peak, GB | {cards} | images/min, card filled |")
    print("|---" * (5 + len(CARDS)) + "|")
    for row in result["rows"]:
        if "unavailable" in row:
            print(f"| {row['variant']} | {row['unavailable']} |" + " |" * (3 + len(CARDS)))
            continue
        fit = " | ".join(str(count) for count in row["fit"].values())
        filled = row["filled"]
        joint = f"{filled['per_minute']:.1f} by {filled['replicas']}" if filled["per_minute"] else "failed"
        numbers = f"{row['image_s']:.2f} | {row['per_minute']:.1f} | {row['peak_bytes'] / 1e9:.1f}"
        print(f"| {row['variant']} | {numbers} | {fit} | {joint} |")


if __name__ == "__main__":
    main()
