"""Run by tests in a process of its own: auto-round quantizes and saves by itself, or loads what quantkit saved.

``python autoround_peer.py save JOB OUT`` runs auto-round's whole flow with the settings of a quantkit job file.
``python autoround_peer.py rtn MODEL OUT BITS GROUP_SIZE`` rounds to nearest by auto-round's regular route.
``python autoround_peer.py load CHECKPOINT OUT`` loads through diffusers and leaves the latents of one image.
"""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)


def save(job_path, output):
    import auto_round

    from quantkit.quantize import autoround
    from quantkit.quantize.resume import TunedBlocks
    from quantkit.quantize.tuning import Job

    real = auto_round.AutoRound

    def make(*args, **kwargs):
        tuner = real(*args, **kwargs)
        tune = tuner.quantize

        def save_and_stop():
            tuner.quantize = tune
            tuner.quantize_and_save(output, format="auto_round")
            sys.exit()  # before quantkit's own packing

        tuner.quantize = save_and_stop
        return tuner

    auto_round.AutoRound = make
    # Its own tuning, not ours that keeps blocks.
    autoround._keep_blocks = lambda *_: None
    autoround._run(Job.read(Path(job_path)), TunedBlocks(output), lambda *_, **__: None, autoround.Follower())


def rtn(model, output, bits, group_size):
    from auto_round import AutoRound

    AutoRound(
        model,
        scheme={"bits": int(bits), "group_size": int(group_size), "sym": True, "data_type": "int"},
        low_cpu_mem_usage=False,
        seed=42,
        iters=0,
        disable_opt_rtn=True,
        disable_model_free=True,
    ).quantize_and_save(output, format="auto_round")


def load(checkpoint, output):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    for name, tensor in [*pipeline.transformer.named_parameters(), *pipeline.transformer.named_buffers()]:
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    torch.save(latents, output)


if __name__ == "__main__":
    {"save": save, "rtn": rtn, "load": load}[sys.argv[1]](*sys.argv[2:])
