"""The model card ``README.md`` of an exported checkpoint, with the metadata block that model hubs read."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

import yaml

from quantkit.checkpoint import SINGLE_MODEL

_PIPELINE_TAGS = {"t2i": "text-to-image", "t2v": "text-to-video", "i2v": "image-to-video", "chat": "any-to-any"}


def render_card(manifest: dict[str, Any]) -> str:
    """Return the card of the checkpoint that a manifest describes."""
    recipe, source, sizes = manifest["recipe"]["effective"], manifest["source"], manifest["sizes"]
    scheme = recipe["scheme"]
    single = SINGLE_MODEL in manifest["plan"]
    schemes = Counter(
        (layer["bits"], layer["group_size"], layer["sym"])
        for entry in manifest["plan"].values()
        for layer in entry["layers"].values()
    )
    names = [f"W{bits}A16" for bits in sorted({bits for bits, _, _ in schemes})]
    # Hubs take base_model for one of their own ids; a local folder's name would be a broken link.
    base = {"base_model": source["id"], "base_model_relation": "quantized"} if "/" in source["id"] else {}
    metadata = {
        **base,
        **_library(manifest["family"], single),
        "pipeline_tag": _PIPELINE_TAGS[recipe["model"]["task"]],
        "tags": ["auto-round", *map(str.lower, names), "quantkit"],
    }
    how = (
        f"AutoRound, {scheme['iters']} iterations of signed gradient descent per block, {manifest['samples']} "
        "calibration samples"
        if scheme["iters"]
        else "round to nearest (AutoRound's RTN)"
    )
    overrides = manifest["recipe"]["overrides"]
    changed = f" with {', '.join(f'`{text}`' for text in overrides)}" if overrides else ""
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {source['id']}, {' and '.join(names)}",
        "",
        f"{source['id']} with {_weights(schemes)}; activations stay in 16 bit. Quantized by {how}.",
        "",
        "| component | layers quantized | before, MB | after, MB | ratio |",
        "|---|---|---|---|---|",
        *(_row(component, entry) for component, entry in manifest["plan"].items()),
        (
            f"| whole checkpoint | | {sizes['before'] / 1e6:.1f} | {sizes['after'] / 1e6:.1f} "
            f"| {sizes['after'] / sizes['before']:.2f} |"
        ),
        "",
        f"Every other {'tensor' if single else 'component'} is bit-equal to the source.",
        "",
        "## Use",
        "",
        "```python",
        *_use(single),
        "",
        "| serving engine | can load it | limits |",
        "|---|---|---|",
        *(_engine_row(engine, findings) for engine, findings in manifest["servability"].items()),
        "",
        "## Error of the weights",
        "",
        "Relative L2 distance of a dequantized layer from its source weight:",
        "",
        "| component | median | worst layer | |",
        "|---|---|---|---|",
        *(_error_row(component, entry["layers"]) for component, entry in manifest["plan"].items()),
        "",
        "## Provenance",
        "",
        (
            f"Made on {manifest['created']} by quantkit {manifest['versions'].get('quantkit', '?')} from recipe "
            f"`{manifest['recipe']['name']}` (sha256 `{manifest['recipe']['sha256']}`){changed}, "
            f"seed {scheme['seed']}. `quantkit.json` holds the plan, the error of every layer, library versions "
            "and the sha256 of every file; `quantkit verify` checks them."
        ),
        "",
    ]
    return "\n".join(lines)


def _weights(schemes: Counter[tuple[int, int, bool]]) -> str:
    """Return the schemes of the packed layers in words, with how many layers each has if there are several."""
    return " and ".join(
        f"{bits}-bit weights, group size {group_size}, {'symmetric' if sym else 'asymmetric'}"
        + (f" ({count} layers)" if len(schemes) > 1 else "")
        for (bits, group_size, sym), count in schemes.most_common()
    )


def _engine_row(engine: str, findings: list[dict[str, Any]]) -> str:
    errors, warnings = (
        [
            f"`{finding['where']}`{_more(finding['count'])} {finding['what']}"
            for finding in findings
            if finding["severity"] == severity
        ]
        for severity in ("error", "warning")
    )
    verdict = f"no: {'; '.join(errors)}" if errors else "yes"
    return f"| {engine} | {verdict} | {'; '.join(warnings) or 'none known'} |"


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _library(family: str, single: bool) -> dict[str, str]:
    """Return the metadata of the library that loads the model; hubs know none for BAGEL."""
    if family == "bagel":
        return {}
    return {"library_name": "transformers" if single else "diffusers"}


def _use(single: bool) -> list[str]:
    if single:
        return [
            "from quantkit_runtime import load_model",
            "",
            'model = load_model("PATH_OF_THIS_FOLDER", device="cuda")',
            "```",
        ]
    return [
        "from quantkit_runtime import load_pipeline",
        "",
        'pipe = load_pipeline("PATH_OF_THIS_FOLDER", device="cuda")',
        "```",
        "",
        "diffusers loads it too, with auto-round installed: `DiffusionPipeline.from_pretrained(...)`.",
    ]


def _row(component: str, entry: dict[str, Any]) -> str:
    before, after = entry["bytes_before"], entry["bytes_after"]
    total = len(entry["layers"]) + len(entry["kept"])
    layers = f"{len(entry['layers'])} of {total}"
    return f"| {component} | {layers} | {before / 1e6:.1f} | {after / 1e6:.1f} | {after / before:.2f} |"


def _error_row(component: str, layers: dict[str, dict[str, Any]]) -> str:
    errors = {name: layer["relative_l2"] for name, layer in layers.items()}
    worst = max(errors, key=errors.__getitem__)
    return f"| {component} | {median(errors.values()):.4f} | {errors[worst]:.4f} | `{worst}` |"
