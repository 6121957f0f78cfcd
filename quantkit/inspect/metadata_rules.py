"""Rules about ``quantization_config`` itself and the folder around it. Each docstring states the condition."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.inspect.quantized import KEY, Checkpoint, Layout, QuantizedModel
from quantkit.inspect.rule import Breach, Check, each_model

MOVED_BLOCKS = {"thinker.model.layers": "thinker.model.language_model.layers"}
"""Modules that transformers has moved: the checkpoint's name of a block and the one in newer versions."""
_AGAIN = "quantize the model again"
# The components whose metadata vLLM-Omni is known to read.
_TRANSFORMERS = ("transformer", "transformer_2")


def layout(expected: Layout) -> Check:
    """Return a check that the folder has the layout of a library."""

    def check(checkpoint: Checkpoint) -> Iterator[Breach]:
        """The folder has the layout of the library."""
        if checkpoint.layout != expected:
            what = f"is laid out for {checkpoint.layout}, not for {expected}"
            where = "model_index.json" if checkpoint.layout == "diffusers" else "config.json"
            yield Breach(where, what, f"check it with --servable {checkpoint.layout}")

    return check


def whole(checkpoint: Checkpoint) -> Iterator[Breach]:
    """Every component is there, its index complete, its files whole."""
    for line in checkpoint.damage:
        where, _, rest = line.partition(": ")
        what, _, mend = rest.partition("; ")
        yield Breach(where, what, mend or "copy the checkpoint again")


def known_architecture(checkpoint: Checkpoint) -> Iterator[Breach]:
    """The names that the engine gives to the Linears are known."""
    if checkpoint.engine is None and checkpoint.models:
        yield Breach(
            checkpoint.architecture or "config.json",
            "no family says how the engine names its layers; the checkpoint's names are taken",
            "compare extra_config with the engine's module names yourself",
        )


def supported(checkpoint: Checkpoint) -> Iterator[Breach]:
    """The engine can build quantized models of the architecture."""
    if checkpoint.engine is not None and checkpoint.engine.unsupported is not None:
        yield Breach(
            checkpoint.architecture, checkpoint.engine.unsupported, "serve it with quantkit-runtime or diffusers"
        )


def validated(checkpoint: Checkpoint) -> Iterator[Breach]:
    """Somebody has served quantized models of the architecture with the engine."""
    if checkpoint.engine is not None and checkpoint.engine.unvalidated is not None:
        mend = "compare its outputs with the 16-bit model before relying on it"
        yield Breach(checkpoint.architecture, checkpoint.engine.unvalidated, mend)


def place(checkpoint: Checkpoint) -> Iterator[Breach]:
    """The metadata stands at the top of ``config.json`` or in the ``text_config`` of a stage."""
    for where in checkpoint.misplaced:
        yield Breach(where, "is read by no loader", f"move it to the top of config.json, as {KEY}")


def component(checkpoint: Checkpoint) -> Iterator[Breach]:
    """Of a pipeline only ``transformer`` and ``transformer_2`` are quantized."""
    for model in checkpoint.models:
        if checkpoint.layout == "diffusers" and model.name not in _TRANSFORMERS:
            what = "is quantized; the engine is known to read the metadata of diffusion transformers only"
            yield Breach(str(model.config_path), what, f"keep {model.name} in 16 bit", model.name)


def experts_alike(checkpoint: Checkpoint) -> Iterator[Breach]:
    """Where a pipeline has two transformers, both are quantized by the same method."""
    methods = {model.name: str(model.config.get("quant_method")) for model in checkpoint.models}
    present = [name for name in _TRANSFORMERS if name in checkpoint.components]
    if len({methods.get(name) for name in present}) > 1:
        told = ", ".join(f"{name}: {methods.get(name, 'not quantized')}" for name in present)
        yield Breach("model_index.json", f"its transformers differ ({told})", "quantize both alike")


def quant_method(*accepted: str) -> Check:
    """Return a check that ``quant_method`` is one of those that the loader knows."""

    @each_model
    def check(model: QuantizedModel) -> Iterator[Breach]:
        """``quant_method`` is one that the loader knows."""
        found = model.config.get("quant_method")
        if found not in accepted:
            yield Breach(f"{model.key}.quant_method", f"is {found!r}", f"set it to {' or '.join(accepted)}")

    return check


@each_model
def scheme_types(model: QuantizedModel) -> Iterator[Breach]:
    """``bits`` and ``group_size`` are integers and ``sym`` is true or false, under these very names."""
    for key, kind in (("bits", int), ("group_size", int), ("sym", bool)):
        found = model.config.get(key)
        if type(found) is not kind:
            word = "an integer" if kind is int else "true or false"
            what = f"is {found!r}" if key in model.config else "is missing"
            yield Breach(f"{model.key}.{key}", what, f"write {word} there; aliases are not read")


@each_model
def data_type(model: QuantizedModel) -> Iterator[Breach]:
    """``data_type`` is ``int``, in the overrides too."""
    for where, settings in _settings(model):
        found = settings.get("data_type", "int")
        if found != "int" and not _is_16_bit(settings):
            yield Breach(f"{where}.data_type", f"is {found!r}", f"only int is W4A16; {_AGAIN}")


def packing_format(*accepted: str) -> Check:
    """Return a check that ``packing_format`` is one of those that the engine unpacks."""

    @each_model
    def check(model: QuantizedModel) -> Iterator[Breach]:
        """``packing_format`` is one that the engine unpacks."""
        found = model.config.get("packing_format", "auto_round:auto_gptq")
        if found not in accepted:
            mend = f"export it again as {' or '.join(accepted)}"
            yield Breach(f"{model.key}.packing_format", f"is {found!r}", mend)

    return check


def backend(*accepted: str) -> Check:
    """Return a check that ``backend``, if it is given, is one that the engine has for packed weights."""

    @each_model
    def check(model: QuantizedModel) -> Iterator[Breach]:
        """``backend``, if it is given, is one that the engine has for packed weights."""
        found = model.config.get("backend", "auto")
        if found not in accepted:
            yield Breach(f"{model.key}.backend", f"is {found!r}", "remove the key; the engine chooses by itself")

    return check


@each_model
def backend_override(model: QuantizedModel) -> Iterator[Breach]:
    """Passing ``AutoRoundConfig(backend=...)`` to the loader changes no scheme: it is that class's own default."""
    for key, default in (("bits", 4), ("group_size", 128), ("sym", True)):
        found = model.config.get(key, default)
        if type(found) is type(default) and found != default:
            what = f"is {found}; from_pretrained(quantization_config=AutoRoundConfig(...)) would make it {default}"
            yield Breach(f"{model.key}.{key}", what, "pass no AutoRoundConfig, or one with the same scheme")


@each_model
def features(model: QuantizedModel) -> Iterator[Breach]:
    """Nothing is asked for that the engine drops without a word: quantized activations, rotations and the like."""
    from quantkit_runtime.config import active_features

    for where, settings in _settings(model):
        if where != model.key and _is_16_bit(settings):
            continue
        for key in active_features(settings):
            what = f"is {settings[key]!r}, which the engine drops silently"
            yield Breach(f"{where}.{key}", what, f"{_AGAIN} to weights only")


@each_model
def extra_config(model: QuantizedModel) -> Iterator[Breach]:
    """``extra_config`` maps layer names or regular expressions to settings."""
    from quantkit_runtime.config import QuantizationConfig
    from quantkit_runtime.errors import CheckpointFormatError

    entries = model.config.get("extra_config") or {}
    kept = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
    try:
        if isinstance(entries, dict):
            entries = {
                name: {key: settings[key] for key in ("bits", "group_size", "sym") if key in settings}
                if isinstance(settings, dict)
                else settings
                for name, settings in entries.items()
            }
        QuantizationConfig.from_dict({**kept, "extra_config": entries})
    except CheckpointFormatError as error:
        reason = str(error).removeprefix(f"{KEY}.")
        yield Breach(f"{model.key}.extra_config", f"cannot be read: {reason}", _AGAIN)


@each_model
def block_names(model: QuantizedModel) -> Iterator[Breach]:
    """``block_name_to_quantize`` is present."""
    if not model.config.get("block_name_to_quantize"):
        yield Breach(
            f"{model.key}.block_name_to_quantize",
            "is missing; the loader has to guess which Linears are packed",
            "name the module lists that hold the packed layers, separated by commas",
        )


@each_model
def block_format(model: QuantizedModel) -> Iterator[Breach]:
    """Block names are separated by commas alone; a space would become part of a name."""
    found = model.config.get("block_name_to_quantize")
    names = found.split(",") if isinstance(found, str) else found
    if not found:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield Breach(f"{model.key}.block_name_to_quantize", f"is {found!r}", "write one string of names")
    elif bad := [name for name in names if name != name.strip() or not name]:
        yield Breach(
            f"{model.key}.block_name_to_quantize", f"holds the name {bad[0]!r}", "separate names by commas alone"
        )


@each_model
def moved_blocks(model: QuantizedModel) -> Iterator[Breach]:
    """Block names resolve in older and newer versions of transformers."""
    for older, newer in MOVED_BLOCKS.items():
        listed = [name for name in (older, newer) if name in model.blocks]
        if len(listed) == 1:
            yield Breach(
                f"{model.key}.block_name_to_quantize",
                f"names {listed[0]} only; where the module is called otherwise it stays randomly initialised",
                f"list both: {older},{newer}",
            )


def _settings(model: QuantizedModel) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the metadata itself and every override, with the path to it."""
    yield model.key, dict(model.config)
    extra = model.config.get("extra_config")
    for name, override in extra.items() if isinstance(extra, dict) else ():
        if isinstance(override, dict):
            yield f"{model.key}.extra_config[{name!r}]", override


def _is_16_bit(settings: dict[str, object]) -> bool:
    bits = settings.get("bits")
    return isinstance(bits, int) and bits >= 16
