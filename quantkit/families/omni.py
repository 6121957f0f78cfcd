"""What the Qwen omni families share: a thinker that reads text, images and audio, calibrated on conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Component
from quantkit.errors import CheckpointError, MissingExtraError, RecipeError
from quantkit.families.base import read_image
from quantkit.families.language import LanguageFamily, bare_model
from quantkit.recipe.conversations import Conversation, read_conversations, user_message
from quantkit.recipe.prompts import Prompt

if TYPE_CHECKING:
    import numpy
    import torch

THINKER_BLOCKS = "thinker.model.layers"
# transformers 5.21 put the language model into a module of its own; checkpoints keep the old name.
THINKER_ALIASES = {THINKER_BLOCKS: "thinker.model.language_model.layers"}
THINKER_SECTION = "thinker_config.text_config"


@dataclass(frozen=True)
class OmniFamily(LanguageFamily):
    """A family of a thinker, which is quantized, and a talker, which is not."""

    def text_config(self, component: Component) -> Mapping[str, Any]:
        """Return the thinker's, see `LanguageFamily.text_config`."""
        found: Mapping[str, Any] = component.config.get("thinker_config", {}).get("text_config", {})
        return found

    def text_model(self, model: Any) -> torch.nn.Module:
        """Return the thinker, see `LanguageFamily.text_model`."""
        return _thinker(model)

    def read_calibration(self, path: Path) -> list[Conversation]:
        """Read conversations, see `Family.read_calibration`."""
        return read_conversations(path)

    def load_processor(self, folder: Path) -> Any:
        """Load the processor of all modalities, see `LanguageFamily.load_processor`."""
        try:
            from transformers import AutoProcessor
        except ImportError as error:
            raise MissingExtraError("transformers", "quantize") from error
        try:
            return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder}: its processor cannot be loaded: {reason}") from error

    def tokenize(self, processor: Any, sample: Conversation, max_tokens: int) -> dict[str, torch.Tensor]:
        """Return what the thinker reads of one conversation, see `LanguageFamily.tokenize`.

        Raises:
            RecipeError: If a file cannot be read, or images and audio make it longer than ``max_tokens``.
        """
        import torch

        inputs, media = _read(processor, sample, answer=False)
        tokens = inputs["input_ids"].shape[1]
        if tokens > max_tokens:
            if media:  # a cut would part their marks from what they stand for
                raise RecipeError(
                    f"calibration.prompts: the conversation with {', '.join(media)} has {tokens} tokens; raise "
                    f"scheme.seqlen above its {max_tokens} or shorten it"
                )
            inputs = {name: tensor[:, :max_tokens] for name, tensor in inputs.items()}
        return {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in inputs.items()
        }

    def ask(self, processor: Any, prompt: Prompt) -> Any:
        """Put text and picture into one message of the user's, see `LanguageFamily.ask`."""
        return _read(processor, [user_message(prompt)], answer=True)[0]


def _read(processor: Any, conversation: Conversation, *, answer: bool) -> tuple[Any, list[str]]:
    """Return the thinker's inputs for a conversation and the files in it.

    Args:
        processor: Of the model.
        conversation: Its messages.
        answer: Whether the model is to go on.

    Raises:
        RecipeError: If a file cannot be read.
    """
    parts = [part for message in conversation for part in message["content"]]
    images = [read_image(part["image"]) for part in parts if part["type"] == "image"]
    rate = processor.feature_extractor.sampling_rate
    audio = [_read_audio(part["audio"], rate) for part in parts if part["type"] == "audio"]
    inputs = processor(
        text=processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer),
        images=images or None,
        audio=audio or None,
        return_tensors="pt",
    )
    return inputs, [part[part["type"]] for part in parts if part["type"] != "text"]


def _thinker(model: Any) -> torch.nn.Module:
    """Return the thinker alone; auto-round would look for its blocks where transformers had them before 5.21."""
    for module in list(model.thinker.modules()):
        if hasattr(getattr(module, "experts", None), "gate_up_proj"):
            module.experts = _separate(module.experts)
    return bare_model("thinker", model.thinker, lambda inputs: model.thinker(**{**inputs, "use_cache": False}))


def _separate(fused: Any) -> torch.nn.Module:
    """Make a Linear of every expert's projection, over the same memory; auto-round tunes nothing else."""
    import torch

    activation = fused.act_fn

    class Experts(torch.nn.ModuleList):
        """Computes what transformers' fused experts do, in the same order."""

        def forward(
            self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            out = torch.zeros_like(hidden_states)
            experts: list[Any] = list(self)
            for index, expert in enumerate(experts):
                token, slot = torch.where(top_k_index == index)
                if token.numel() == 0:
                    continue
                x = hidden_states[token]
                y = expert.down_proj(activation(expert.gate_proj(x)) * expert.up_proj(x))
                out = out.index_add(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
            return out

    def linear(weight: torch.Tensor) -> torch.nn.Linear:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer

    experts = Experts()
    for gate_up, down in zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True):
        gate, up = gate_up.chunk(2)
        expert = torch.nn.Module()
        expert.gate_proj, expert.up_proj, expert.down_proj = linear(gate), linear(up), linear(down)
        experts.append(expert)
    return experts


def _read_audio(path: str, rate: int) -> numpy.ndarray[Any, Any]:
    """Read a mono or stereo WAV file of 16-bit samples as float32 in [-1, 1]."""
    import wave

    import numpy as np

    try:
        with wave.open(path, "rb") as file:
            layout = (file.getframerate(), file.getsampwidth())
            channels = file.getnchannels()
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2" if layout[1] == 2 else "u1")
    except (OSError, EOFError, wave.Error) as error:
        raise RecipeError(f"{path}: is no WAV file that can be read: {error}") from error
    if layout != (rate, 2):
        raise RecipeError(
            f"{path}: has {layout[0]} samples a second of {8 * layout[1]} bits; convert it to "
            f"{rate} of 16 bits (ffmpeg -i IN -ar {rate} -c:a pcm_s16le OUT.wav)"
        )
    mono: numpy.ndarray[Any, Any] = samples.reshape(-1, channels).mean(axis=1, dtype=np.float32) / 32768
    return mono
