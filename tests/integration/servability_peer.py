"""Run by tests in a process of its own, for auto-round patches the libraries that it is imported into.

``python servability_peer.py transformer INPUTS OUT FOLDER ...`` loads FLUX transformers through diffusers and
leaves, for each, its output or the reason why it has none.
``python servability_peer.py language_model MODEL WORK INPUTS OUT`` lets auto-round quantize a language model,
loads the result through transformers and leaves the path and the logits.
"""

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


if __name__ == "__main__":
    {"transformer": transformer, "language_model": language_model}[sys.argv[1]](*sys.argv[2:])
