"""Checkpoints to break: copies that may be changed, and hand-made language models in auto-round's layout."""

import json
import os
import shutil
from pathlib import Path

import torch

GROUP_SIZE = 128
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration"}


def write_language_model(folder, model_type, prefix, key, blocks=None):
    """Write one block of a mixture-of-experts decoder, as auto-round exports it."""
    from safetensors.torch import save_file

    router = f"{prefix}.0.mlp.gate"
    tensors = {
        "lm_head.weight": torch.zeros(32, 1024, dtype=torch.bfloat16),
        f"{router}.weight": torch.zeros(2, 1024, dtype=torch.bfloat16),
        f"{prefix}.0.input_layernorm.weight": torch.ones(1024, dtype=torch.bfloat16),
        "talker.text_projection.weight": torch.zeros(16, 16, dtype=torch.bfloat16),
    }
    names = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    names += [f"mlp.experts.{expert}.{kind}_proj" for expert in range(2) for kind in ("gate", "up", "down")]
    for name in names:
        tensors |= packed_layer(f"{prefix}.0.{name}", 1024, 64)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]}
    *stages, last = key.split(".")
    inner = config
    for stage in stages:
        inner = inner.setdefault(stage, {})
    inner[last] = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": blocks or prefix,
        "extra_config": {router: {"bits": 16, "data_type": "float"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def packed_layer(name, in_features, out_features, *, bits=4, group_size=GROUP_SIZE):
    """Return the tensors of a packed layer; what they hold does not matter, their shapes may fit no scheme."""
    groups = 1 if group_size == -1 else max(1, in_features // group_size)
    words = -(-out_features * bits // 32)
    return {
        f"{name}.qweight": torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(groups, words, dtype=torch.int32),
        f"{name}.scales": torch.ones(groups, out_features, dtype=torch.float16),
    }


class Breakable:
    """A copy of a sound checkpoint, made of hard links, with the means to change it.

    Attributes:
        folder: Its root.
        block: A listed block.
        layer: A packed layer that is neither fused nor row-parallel in vLLM-Omni.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder, copy_function=os.link)
        self.folder = folder
        self.pipeline = (folder / "model_index.json").is_file()
        self.model = folder / "transformer" if self.pipeline else folder
        self.config_path = self.model / "config.json"
        self.weights = next(self.model.glob("*.safetensors"))
        self.block = self.metadata()["block_name_to_quantize"].split(",")[0]
        self.layer = f"{self.block}.0.norm1.linear" if self.pipeline else f"{self.block}.0.self_attn.o_proj"

    def metadata(self):
        return self._find(json.loads(self.config_path.read_text()))

    @staticmethod
    def _find(config):
        inner = config if "quantization_config" in config else config["thinker_config"]["text_config"]
        return inner["quantization_config"]

    def set(self, **values):
        """Set keys of the metadata; None removes one."""

        def change(config):
            metadata = self._find(config)
            metadata.update(values)
            for key in [key for key, value in metadata.items() if value is None]:
                del metadata[key]

        self.edit_json(self.config_path, change)

    def override(self, **settings):
        """Set ``extra_config`` of single layers, ``__`` for the dots of their names."""
        extra = self.metadata().get("extra_config", {})
        self.set(extra_config={**extra, **settings})

    def edit_json(self, path, change):
        data = json.loads(path.read_text())
        change(data)
        path.unlink()
        path.write_text(json.dumps(data))

    def tensors(self):
        from safetensors.torch import load_file

        return load_file(self.weights)

    def put(self, tensors, *, remove=()):
        """Add or replace tensors; remove those whose name begins or ends with one of the given texts."""
        from safetensors.torch import save_file

        kept = {
            name: tensor
            for name, tensor in self.tensors().items()
            if not any(name.startswith(text) or name.endswith(text) for text in remove)
        }
        self.weights.unlink()
        save_file({name: tensor.clone() for name, tensor in (kept | tensors).items()}, self.weights)
