"""The ``quantization_config`` block that AutoRound writes into a component's ``config.json``.

This module needs no torch, so tools that only read metadata stay fast. The tensors that the metadata
describes are defined in :mod:`quantkit_runtime.format`.

Source of the format: auto-round 0.16, ``export/export_to_autoround/export.py`` (what is written) and
``inference/convert_model.py`` (how the layer list is derived from it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit_runtime.errors import CheckpointFormatError

QUANT_METHODS = ("auto-round", "auto_round", "inc")
PACKING_FORMATS = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round")
SUPPORTED_BITS = (2, 3, 4, 8)
UNQUANTIZED_BITS = 16

_SCHEME_KEYS = ("bits", "group_size", "sym", "data_type")
# Keys that would change the arithmetic of the forward pass. They are accepted only with the value that
# means "not used".
_INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "act_bits": (None, 16, 32),
    "super_bits": (None,),
    "super_group_size": (None,),
    "rotation_config": (None, {}),
    "transform_config": (None, {}),
    "hadamard_config": (None, {}),
    "static_kv_dtype": (None,),
    "static_attention_dtype": (None,),
    "desc_act": (None, False),
    "dynamic": (None, {}),
    "modules_to_not_convert": (None, []),
    "modules_in_block_to_quantize": (None, []),
}
_PATTERN_CHARACTERS = frozenset("*+?^$|()[]{}\\")


@dataclass(frozen=True)
class Scheme:
    """How the weight of one Linear layer is stored.

    Attributes:
        bits: Width of a stored code; one of 2, 3, 4, 8.
        group_size: Input features that share one scale and one zero point; -1 is one group per output
            channel.
        sym: Symmetric: every zero point is ``2 ** (bits - 1)``.
        data_type: Always ``"int"``.
        packing_format: Bit layout; one of :data:`PACKING_FORMATS`, see :mod:`quantkit_runtime.format`.

    Raises:
        CheckpointFormatError: A value is outside what this runtime can read.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    packing_format: str = "auto_round:auto_gptq"

    def __post_init__(self) -> None:
        """Reject a scheme that this runtime cannot read."""
        if type(self.bits) is not int or self.bits not in SUPPORTED_BITS:
            raise CheckpointFormatError(f"bits: {self.bits!r} is not supported; use one of {SUPPORTED_BITS}")
        if type(self.group_size) is not int or (self.group_size < 1 and self.group_size != -1):
            raise CheckpointFormatError(
                f"group_size: {self.group_size!r} is not supported; use a positive integer, or -1 for one group "
                "per output channel"
            )
        if type(self.sym) is not bool:
            raise CheckpointFormatError(f"sym: {self.sym!r} must be true or false")
        if self.data_type != "int":
            raise CheckpointFormatError(f"data_type: {self.data_type!r} is not supported; only 'int' is")
        if self.packing_format not in PACKING_FORMATS:
            raise CheckpointFormatError(
                f"packing_format: {self.packing_format!r} is not supported; use one of {PACKING_FORMATS}"
            )
        if self.packing_format == "auto_round:auto_awq" and self.bits != 4:
            raise CheckpointFormatError(f"bits: {self.bits} cannot be stored as auto_round:auto_awq; only 4 can")

    @property
    def midpoint(self) -> int:
        """Code that stands for zero in a symmetric scheme."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def group_length(self, in_features: int) -> int:
        """Input features per group in a layer of this many input features."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class QuantizationConfig:
    """A parsed ``quantization_config``: the default scheme and the layers that it applies to.

    Attributes:
        scheme: Scheme of every layer in ``blocks`` without an override.
        blocks: Name prefixes whose Linear layers are packed; None when the config names none, in which case
            only the checkpoint's tensors can tell.
        exact: Overrides by full layer name.
        patterns: Overrides by regular expression, in file order.
    """

    scheme: Scheme
    blocks: tuple[str, ...] | None
    exact: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    patterns: tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...] = ()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> QuantizationConfig:
        """Parse the ``quantization_config`` mapping of a ``config.json``.

        Args:
            config: The mapping as read from JSON.

        Raises:
            CheckpointFormatError: Unknown ``quant_method`` or packing, a missing or malformed key, or a setting
                (activation quantization, rotation ...) that this runtime does not implement.
        """
        method = config.get("quant_method")
        if method not in QUANT_METHODS:
            raise CheckpointFormatError(
                f"quantization_config.quant_method: {method!r} is not supported; this runtime reads {QUANT_METHODS}"
            )
        for key in ("bits", "group_size", "sym"):
            if key not in config:
                raise CheckpointFormatError(f"quantization_config.{key}: missing; quantize the model again")
        _reject_active_features(config, "quantization_config")
        packing_format = config.get("packing_format", "auto_round:auto_gptq")
        try:
            scheme = Scheme(
                bits=config["bits"],
                group_size=config["group_size"],
                sym=config["sym"],
                data_type=config.get("data_type", "int"),
                packing_format=packing_format,
            )
        except CheckpointFormatError as error:
            raise CheckpointFormatError(f"quantization_config.{error}") from None
        exact, patterns = _read_overrides(config.get("extra_config") or {})
        parsed = cls(scheme, _read_blocks(config.get("block_name_to_quantize")), exact, patterns)
        for name, override in [*exact.items(), *((pattern.pattern, value) for pattern, value in patterns)]:
            try:
                parsed._apply_override(override)
            except CheckpointFormatError as error:
                raise CheckpointFormatError(f"quantization_config.extra_config[{name!r}].{error}") from None
        return parsed

    def scheme_for(self, layer_name: str) -> Scheme | None:
        """Scheme of the Linear layer ``layer_name``, or None when it stays unquantized.

        ``blocks`` are plain string prefixes, as in auto-round's own loader: it writes the common prefix of the
        tuned blocks, so ``layers.1`` legitimately stands for ``layers.10`` and ``layers.11``. An exact name wins
        over a pattern, the first matching pattern over later ones. An exact name also applies outside the blocks
        (a quantized ``lm_head`` is recorded that way), a pattern does not.
        """
        if layer_name in self.exact:
            return self._apply_override(self.exact[layer_name])
        if self.blocks is not None and not layer_name.startswith(self.blocks):
            return None
        for pattern, override in self.patterns:
            if pattern.search(layer_name):
                return self._apply_override(override)
        return self.scheme

    def _apply_override(self, override: Mapping[str, Any]) -> Scheme | None:
        values = {key: override[key] for key in _SCHEME_KEYS if override.get(key) is not None}
        if type(values.get("bits")) is int and values["bits"] >= UNQUANTIZED_BITS:
            return None
        return replace(self.scheme, **values)


def find_quantization(config: Mapping[str, Any]) -> Any:
    """Return the ``quantization_config`` of a ``config.json``, None if there is none.

    A model of several stages may hold it in a stage's section instead of, or as well as, at the top level.

    Args:
        config: Content of the file.

    Raises:
        CheckpointFormatError: Two of them differ.
    """
    found: list[tuple[str, Any]] = []
    _collect_quantization(config, "", found)
    for where, other in found[1:]:
        if other != found[0][1]:
            raise CheckpointFormatError(
                f"{where}: differs from {found[0][0]}; quantize the model again or make them equal"
            )
    return found[0][1] if found else None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a ``config.json``'s content without any ``quantization_config``."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _collect_quantization(section: Mapping[str, Any], prefix: str, found: list[tuple[str, Any]]) -> None:
    if section.get("quantization_config") is not None:
        found.append((f"{prefix}quantization_config", section["quantization_config"]))
    for key, value in section.items():
        if key != "quantization_config" and isinstance(value, Mapping):
            _collect_quantization(value, f"{prefix}{key}.", found)


def quantization_of(config: Mapping[str, Any], path: Path) -> QuantizationConfig | None:
    """Parse the ``quantization_config`` of a ``config.json``, None if there is none.

    Args:
        config: Content of the file.
        path: The file, for messages.

    Raises:
        CheckpointFormatError: It is not one that this runtime reads.
    """
    try:
        found = find_quantization(config)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise CheckpointFormatError(f"quantization_config: must be a mapping, not {found!r}")
        return QuantizationConfig.from_dict(found)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def _read_blocks(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise CheckpointFormatError(
            f"quantization_config.block_name_to_quantize: {value!r} must be a comma-separated string or a list of "
            "layer name prefixes"
        )
    return tuple(name.strip() for name in names)


def _read_overrides(
    extra_config: Any,
) -> tuple[dict[str, Mapping[str, Any]], tuple[tuple[re.Pattern[str], Mapping[str, Any]], ...]]:
    if not isinstance(extra_config, Mapping):
        raise CheckpointFormatError("quantization_config.extra_config: must map layer names to settings")
    exact: dict[str, Mapping[str, Any]] = {}
    patterns: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
    for name, override in extra_config.items():
        where = f"quantization_config.extra_config[{name!r}]"
        if not isinstance(override, Mapping):
            raise CheckpointFormatError(f"{where}: {override!r} must be a mapping of scheme settings")
        bits = override.get("bits")
        if not (type(bits) is int and bits >= UNQUANTIZED_BITS):
            _reject_active_features(override, where)
        if _PATTERN_CHARACTERS.isdisjoint(name):
            exact[name] = override
            continue
        try:
            patterns.append((re.compile(name), override))
        except re.error as error:
            raise CheckpointFormatError(f"{where}: not a valid regular expression ({error})") from None
    return exact, tuple(patterns)


def _reject_active_features(settings: Mapping[str, Any], where: str) -> None:
    for key, inert in _INERT_VALUES.items():
        if key in settings and settings[key] not in inert:
            raise CheckpointFormatError(
                f"{where}.{key}: {settings[key]!r} is not supported; this runtime computes with 16-bit activations "
                "and plain integer weights"
            )
