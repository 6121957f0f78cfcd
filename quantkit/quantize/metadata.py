"""The ``quantization_config`` of a component: what loaders and serving engines read of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.errors import QuantizationError
from quantkit.families.serving import VllmOmni
from quantkit.quantize.plan import PACKING_FORMAT, ComponentPlan


def quantization_config(
    part: ComponentPlan, *, iters: int, autoround_version: str, engine: VllmOmni | None = None
) -> dict[str, Any]:
    """Return the ``quantization_config`` that tells loaders what the plan made of a component.

    The keys are those auto-round itself writes; a layer that differs from the default scheme, or a Linear
    inside the blocks that stays in 16 bit, is named in ``extra_config``: as in the checkpoint, by its alias if it
    has one, and as the serving engine calls it if that is something else. Loaders ignore names that their model
    does not have.

    Args:
        part: The component.
        iters: Of the tuning, for the record.
        autoround_version: For the record.
        engine: The names that vLLM-Omni gives to the family's Linears.
    """
    default = part.default
    extra: dict[str, dict[str, Any]] = {}
    for layer in part.layers:
        if layer.scheme != default:
            scheme = layer.scheme
            extra[layer.name] = {
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": scheme.sym,
                "data_type": scheme.data_type,
            }
    extra |= {name: {"bits": 16, "data_type": "float"} for name in part.kept_in_blocks}
    if engine is not None and not engine.member_keys:
        extra |= _runtime_keys(part, extra, engine)
    blocks = [block for block in part.blocks if any(layer.name.startswith(f"{block}.") for layer in part.layers)]
    if not blocks:
        raise QuantizationError(f"{part.component.name}: no layer inside its blocks is quantized")
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "data_type": default.data_type,
        "packing_format": PACKING_FORMAT,
        "block_name_to_quantize": ",".join(name for block in blocks for name in _names(block, part)),
        "iters": iters,
        "autoround_version": autoround_version,
    }
    if extra:
        config["extra_config"] = {name: entry for layer, entry in extra.items() for name in _names(layer, part)}
    return config


def _names(name: str, part: ComponentPlan) -> Iterator[str]:
    """Yield the names of a block or of a layer in one: the checkpoint's, then its alias."""
    yield name
    for block, alias in part.aliases.items():
        if name == block or name.startswith(f"{block}."):
            yield alias + name.removeprefix(block)


def _runtime_keys(
    part: ComponentPlan, extra: Mapping[str, dict[str, Any]], engine: VllmOmni
) -> dict[str, dict[str, Any]]:
    """Repeat the settings of layers under the names that a serving engine gives them.

    Layers that it fuses share one name. If their settings differ no key can help; the servability check says so.
    """
    members: dict[str, list[str]] = {}
    for name in [layer.name for layer in part.layers] + part.kept_in_blocks:
        members.setdefault(engine.name_of(name), []).append(name)
    keys = {}
    for runtime_name, names in members.items():
        settings = extra.get(names[0])
        if settings is not None and all(extra.get(name) == settings for name in names):
            keys[runtime_name] = settings
    return keys
