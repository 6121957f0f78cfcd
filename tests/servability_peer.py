"""Run by tests in a process of its own, for auto-round patches the libraries that it is imported into.

``python servability_peer.py JOB ...``, where JOB is

- ``transformer INPUTS OUT FOLDER ...``: load FLUX transformers through diffusers and leave, for each, its output or
  the reason why it has none;
- ``pipelines JOBS OUT``: load whole pipelines through diffusers and leave the latents that each draws;
- ``thinker FOLDER INPUTS OUT``: load an omni model through transformers and leave its logits;
- ``language_model MODEL WORK INPUTS OUT``: let auto-round quantize a language model, load the result through
  transformers and leave the path and the logits.
"""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)


def on_meta(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device.type == "meta"]


def transformer(inputs_path, output, *folders):
    import auto_round  # noqa: F401  (diffusers' loader needs it)
    from diffusers import FluxTransformer2DModel

    inputs = torch.load(inputs_path)
    results = []
    for folder in folders:
        try:
            model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
            left = on_meta(model)
            if left:
                results.append(f"{left[0]} has no value")
                continue
            with torch.no_grad():
                results.append(model(**inputs).sample)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is the result)
            results.append(f"{type(error).__name__}: {error}")
    torch.save(results, output)


def language_model(model, work, inputs_path, output):
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    AutoRound(
        model, scheme="W4A16", group_size=32, seed=1, iters=0, disable_opt_rtn=True, disable_model_free=True
    ).quantize_and_save(work, format="auto_round")
    [config] = Path(work).rglob("config.json")
    loaded = AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.bfloat16, device_map="cpu")
    assert not on_meta(loaded)
    with torch.no_grad():
        torch.save((str(config.parent), loaded(torch.load(inputs_path)).logits), output)


def pipelines(jobs_path, output):
    import auto_round  # noqa: F401  (diffusers' loader needs it)
    import diffusers

    results = {}
    for name, (folder, arguments) in json.loads(Path(jobs_path).read_text()).items():
        class_name = json.loads(Path(folder, "model_index.json").read_text())["_class_name"]
        pipe = getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=torch.bfloat16)
        for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            assert part is None or not on_meta(part)
        results[name] = draw(pipe, arguments)
    torch.save(results, output)


def draw(pipe, arguments):
    """Return the latents of a pipeline for a seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipe(**arguments, generator=generator, output_type="latent")
    return made.images if hasattr(made, "images") else made.frames


def thinker(folder, inputs_path, output):
    import transformers

    model_class = getattr(transformers, Path(inputs_path).stem)
    loaded = model_class.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert not on_meta(loaded.thinker)
    with torch.no_grad():
        torch.save(loaded.thinker(**torch.load(inputs_path)).logits, output)


if __name__ == "__main__":
    jobs = {function.__name__: function for function in (transformer, pipelines, thinker, language_model)}
    jobs[sys.argv[1]](*sys.argv[2:])
