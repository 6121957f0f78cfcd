"""Whether a serving engine can load a checkpoint, told without the engine and without loading a weight.

`RULES` is the checklist: what vLLM-Omni and the loaders of diffusers and transformers ask of a checkpoint, read in
their sources and seen in practice. Headers and metadata decide; of the weights only ``g_idx`` is read. NaN and
infinities are the business of `quantkit.quantize.verify`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.inspect import layer_rules as layers
from quantkit.inspect import metadata_rules as metadata
from quantkit.inspect.quantized import Checkpoint, open_checkpoint
from quantkit.inspect.rule import TARGETS, Breach, Rule, Severity, Target

_ALL = TARGETS
_OMNI: tuple[Target, ...] = ("vllm-omni",)
_DIFFUSERS: tuple[Target, ...] = ("diffusers",)
_TRANSFORMERS: tuple[Target, ...] = ("transformers",)
_LOADERS: tuple[Target, ...] = ("diffusers", "transformers")
_GPTQ, _AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"

RULES: tuple[Rule, ...] = (
    Rule("layout", "error", _DIFFUSERS, metadata.layout("diffusers")),
    Rule("layout", "error", _TRANSFORMERS, metadata.layout("transformers")),
    Rule("files", "error", _ALL, metadata.whole),
    Rule("architecture-unsupported", "error", _OMNI, metadata.supported),
    Rule("architecture-unvalidated", "warning", _OMNI, metadata.validated),
    Rule("architecture-unknown", "warning", _OMNI, metadata.known_architecture),
    Rule("config-place", "error", ("vllm-omni", "transformers"), metadata.place),
    Rule("component", "warning", _OMNI, metadata.component),
    Rule("transformers-differ", "error", _OMNI, metadata.experts_alike),
    Rule("quant-method", "error", _OMNI, metadata.quant_method("auto-round", "auto_round", "inc")),
    Rule("quant-method", "error", _LOADERS, metadata.quant_method("auto-round")),
    Rule("scheme-types", "error", _ALL, metadata.scheme_types),
    Rule("data-type", "error", _ALL, metadata.data_type),
    Rule("packing-format", "error", _OMNI, metadata.packing_format(_GPTQ, _AWQ)),
    Rule("packing-format", "error", _LOADERS, metadata.packing_format(_GPTQ, _AWQ, "auto_round")),
    Rule("backend", "error", _OMNI, metadata.backend("auto", "marlin", "gptq:marlin", "awq:marlin")),
    Rule("backend", "error", _DIFFUSERS, metadata.backend("auto", "torch", "tritonv2", "exllamav2", "marlin")),
    Rule("backend-override", "info", _LOADERS, metadata.backend_override),
    Rule("dropped-features", "error", _OMNI, metadata.features),
    Rule("extra-config", "error", _ALL, metadata.extra_config),
    Rule("block-names", "error", _OMNI, metadata.block_names),
    Rule("block-names", "warning", _LOADERS, metadata.block_names),
    Rule("block-format", "error", _ALL, metadata.block_format),
    Rule("block-moved", "error", _TRANSFORMERS, metadata.moved_blocks),
    Rule("nothing-packed", "error", _ALL, layers.packed),
    Rule("block-unmatched", "info", _ALL, layers.block_matches),
    Rule("block-prefix-collision", "error", _ALL, layers.block_prefixes),
    Rule("packed-unlisted", "error", _ALL, layers.packed_is_listed),
    Rule("listed-unpacked", "error", _ALL, layers.listed_is_packed),
    Rule("runtime-key", "error", _OMNI, layers.runtime_keys),
    Rule("fused-scheme", "error", _OMNI, layers.fused_schemes),
    Rule("layer-incomplete", "error", _ALL, layers.complete),
    Rule("alignment", "error", _ALL, layers.aligned),
    Rule("tensor-layout", "error", _ALL, layers.tensor_layout),
    Rule("g-idx", "error", _ALL, layers.trivial_g_idx),
    Rule("stale-weight", "error", _ALL, layers.one_weight),
    Rule("cuda-scheme", "error", _OMNI, layers.cuda_scheme),
    Rule("group-size", "error", _OMNI, layers.group_size),
    Rule("xpu", "warning", _OMNI, layers.xpu),
    Rule("tensor-parallel", "warning", _OMNI, layers.tensor_parallel),
    Rule("weight-names", "error", _LOADERS, layers.weight_names),
    Rule("float32-modules", "warning", _DIFFUSERS, layers.float32_modules),
    Rule("experts-lost", "error", _TRANSFORMERS, layers.fused_experts),
)


@dataclass(frozen=True)
class Finding:
    """A broken rule, all its equal breaches in one.

    Attributes:
        rule: Id of the rule.
        severity: ``error``, ``warning`` or ``info``, see `Rule`.
        model: The component or stage; empty if it is about the whole checkpoint.
        where: The first tensor, layer, key or file at fault; files relative to the checkpoint.
        count: How many are at fault in the same way.
        what: What is wrong.
        mend: What to do about it.
    """

    rule: str
    severity: Severity
    model: str
    where: str
    count: int
    what: str
    mend: str

    @property
    def place(self) -> str:
        """``where``, and how many more."""
        return self.where if self.count == 1 else f"{self.where} and {self.count - 1} more"


def check_servability(folder: Path, target: Target) -> list[Finding]:
    """Check a checkpoint against the conditions of a serving engine.

    Args:
        folder: A pipeline or a model, quantized by AutoRound or quantkit.
        target: The engine.

    Returns:
        What was found, in the order of `RULES`; empty if the engine can serve it without limits.

    Raises:
        CheckpointError: If the folder is no model at all, or nothing in it is quantized.
    """
    checkpoint = open_checkpoint(folder)
    return [finding for rule in RULES if target in rule.targets for finding in _apply(rule, checkpoint)]


def check_natural_targets(folder: Path) -> dict[Target, list[Finding]]:
    """Check a checkpoint for every engine that takes its layout; see `check_servability`."""
    own: Target = "diffusers" if (folder / "model_index.json").is_file() else "transformers"
    targets: tuple[Target, ...] = ("vllm-omni", own)
    return {target: check_servability(folder, target) for target in targets}


def _apply(rule: Rule, checkpoint: Checkpoint) -> Sequence[Finding]:
    findings: dict[Breach, Finding] = {}
    for breach in rule.check(checkpoint):
        # The same layer of other blocks, with the same trouble, is the same finding.
        kind = Breach("", _without_numbers(breach.what), _without_numbers(breach.mend), breach.model)
        if kind in findings:
            findings[kind] = replace(findings[kind], count=findings[kind].count + 1)
        else:
            where = breach.where.removeprefix(str(checkpoint.folder)).removeprefix("/") or "."
            findings[kind] = Finding(rule.id, rule.severity, breach.model, where, 1, breach.what, breach.mend)
    return list(findings.values())


def _without_numbers(text: str) -> str:
    """Replace the indices of blocks, which stand between dots."""
    return re.sub(r"\.\d+(?=\.)", ".*", text)
