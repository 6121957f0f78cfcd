"""``quantkit doctor``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.console import gigabytes, new_table, output
from quantkit.cli.progress import Bar

if TYPE_CHECKING:
    from rich.table import Table

    from quantkit_runtime.diagnosis import Choice, Device, Package
    from quantkit_runtime.selftest import Check

_FAIL = 1
_COLOURS = {"PASS": "green", "FAIL": "red", "refused": "dim", "not run": "yellow"}

# Name, module to import to see that it works (None: the version is enough), what for, how to get it.
_PACKAGES = (
    ("torch", "torch", "everything", ""),
    ("triton", None, "kernels on accelerators", "comes with torch for CUDA and XPU"),
    ("safetensors", None, "reading and writing weights", ""),
    ("diffusers", None, "pipelines of images and videos", "pip install 'quantkit-runtime[diffusers]'"),
    ("transformers", None, "text encoders, language models", "pip install 'quantkit-runtime[diffusers]'"),
    ("accelerate", None, "loading pipelines", "pip install 'quantkit-runtime[diffusers]'"),
    ("ftfy", None, "prompts of Wan", "pip install 'quantkit-runtime[diffusers]'"),
    ("auto-round", None, "tuning: quantize with iters > 0", "pip install 'quantkit[quantize]'"),
    ("torchvision", "torchvision", "image processors, LPIPS", "pip install 'quantkit[eval]'"),
    ("scikit-image", None, "PSNR, SSIM: compare", "pip install 'quantkit[eval]'"),
    ("flip-evaluator", None, "FLIP: compare", "pip install 'quantkit[eval]'"),
    ("lpips", None, "LPIPS: compare", "pip install 'quantkit[eval]'"),
)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Measure up to how many rows the fused kernels pay on this card, and keep it."),
    ] = False,
) -> None:
    """Show devices, packages and the kernels used here, and test them for some seconds; exit code 1 on a FAIL."""
    from quantkit_runtime.diagnosis import choose_backends, list_devices, look_up_package

    devices = list_devices()
    if tune:
        if as_json:
            raise typer.BadParameter("prints no JSON; leave --json out", param_hint="--tune")
        _tune(_one_of_a_kind(devices))
        return
    tested = _one_of_a_kind(devices)
    packages = [look_up_package(name, module=module) for name, module, _, _ in _PACKAGES]
    choices = choose_backends(tested)
    checks = _run_checks(tested)
    if as_json:
        _print_json(devices, packages, choices, checks)
    else:
        _print_devices(devices)
        _print_packages(packages)
        _print_choices(choices)
        _print_checks(checks)
    if any(check.outcome == "FAIL" for check in checks):
        raise typer.Exit(_FAIL)


def _one_of_a_kind(devices: list[Device]) -> list[str]:
    """Return the first device of each hardware; others of it would only repeat what it says."""
    return list({device.hardware: device.name for device in reversed(devices)}.values())[::-1]


def _tune(devices: list[str]) -> None:
    """Measure the border between both ways of multiplying on every accelerator, and keep it for this user."""
    import torch

    from quantkit_runtime.config import Scheme
    from quantkit_runtime.errors import BackendUnavailableError
    from quantkit_runtime.kernels import LinearSpec, why_not
    from quantkit_runtime.kernels.crossover import fused_rows, measure, save

    reasons = {}
    for name in devices:
        device = torch.device(name)
        reasons[name] = why_not("linear", "triton", LinearSpec(128, 128, Scheme(), device, torch.bfloat16))
        if reasons[name] is not None:
            continue
        before = fused_rows(device)
        table = new_table("", "rows", "fused, ms", "unpacked, ms")
        rows = measure(device, on_progress=partial(_add_times, table))
        path = save(device, rows)
        output.print(table)
        output.print(f"{name}: fused up to {rows} rows, {before} before; kept in {path}")
    if all(reasons.values()):
        raise BackendUnavailableError(
            f"--tune: no device here runs the Triton kernels ({'; '.join(f'{k}: {v}' for k, v in reasons.items())})"
        )


def _add_times(table: Table, *values: float) -> None:
    table.add_row(*(f"{value:g}" for value in values))


def _run_checks(devices: list[str]) -> list[Check]:
    from quantkit_runtime.selftest import count_checks, run_checks

    total, checks = count_checks(devices), []
    with Bar() as bar:
        for check in run_checks(devices):
            checks.append(check)
            bar("self-test", len(checks), total, f"{check.device} {check.op} {check.backend}")
    return checks


def _print_json(devices: list[Device], packages: list[Package], choices: list[Choice], checks: list[Check]) -> None:
    import json
    from dataclasses import asdict

    data = {
        "versions": _versions(),
        "devices": [asdict(device) for device in devices],
        "packages": [asdict(package) for package in packages],
        "backends": [asdict(choice) for choice in choices],
        "self_test": [asdict(check) for check in checks],
        "passed": not any(check.outcome == "FAIL" for check in checks),
    }
    typer.echo(json.dumps(data, indent=2))


def _versions() -> dict[str, str]:
    import platform

    import quantkit_runtime
    from quantkit import __version__
    from quantkit_runtime.diagnosis import torch_build

    return {
        "quantkit": __version__,
        "quantkit-runtime": quantkit_runtime.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch built for": torch_build(),
    }


def _print_devices(devices: list[Device]) -> None:
    _say(", ".join(f"{name} {version}" for name, version in _versions().items()))
    output.print()
    sizes = ("memory", "free")
    table = new_table("Devices", "device", "hardware", *sizes, "more", right=sizes)
    for device in devices:
        memory, free = (
            "-" if size is None else gigabytes(size) for size in (device.memory_bytes, device.free_bytes)
        )
        more = ", ".join(f"{name} {value}" for name, value in device.details.items())
        _add_row(table, device.name, device.hardware, memory, free, more)
    output.print(table)
    if len(devices) == 1:
        from quantkit_runtime.diagnosis import explain_no_accelerator

        _say(f"no accelerator: {explain_no_accelerator()}")
    output.print()


def _print_packages(packages: list[Package]) -> None:
    from rich.markup import escape

    table = new_table("Packages", "package", "version", "for", "")
    for package, (_, _, purpose, how) in zip(packages, _PACKAGES, strict=True):
        version = escape(package.version) if package.version else "[yellow]missing[/]"
        note = f"[red]{escape(package.problem)}[/]" if package.problem else escape("" if package.version else how)
        table.add_row(package.name, version, purpose, note)
    output.print(table)
    output.print()


def _print_choices(choices: list[Choice]) -> None:
    from rich.markup import escape

    table = new_table(
        "Backends (W4, groups of 128, bf16)", "device", "op", "compute", "takes", "why not the others"
    )
    for number, choice in enumerate(choices):
        if number and choice.device != choices[number - 1].device:
            table.add_section()
        taken = f"[bold green]{choice.backend}[/]" if choice.backend else "[yellow]none[/]"
        others = "\n".join(f"{name}: {reason or 'slower'}" for name, reason in choice.others.items())
        table.add_row(choice.device, choice.op, choice.compute, taken, escape(others))
    output.print(table)
    output.print()


def _print_checks(checks: list[Check]) -> None:
    ran = [check for check in checks if check.outcome != "refused"]
    ran.sort(
        key=lambda check: (check.device == "cpu", check.device, check.op != "linear", check.compute, check.backend)
    )
    numbers = ("error", "bound")
    table = new_table(
        "Self-test (against a float64 product)",
        *("device", "op", "compute", "backend", "weights", *numbers, "", ""),
        right=numbers,
    )
    for check in ran:
        error = "-" if check.error is None else f"{check.error:.1e}"
        row = (check.device, check.op, check.compute, check.backend, check.scheme, error, f"{check.bound:.1e}")
        _add_row(table, *row, f"[bold {_COLOURS[check.outcome]}]{check.outcome}[/]", check.reason)
    output.print(table)
    counts = {name: sum(check.outcome == name for check in checks) for name in _COLOURS}
    told = f"{counts['PASS']} passed, {counts['FAIL']} failed"
    if counts["not run"]:
        told += f", {counts['not run']} not run"
    verdict = "[bold red]FAIL[/]" if counts["FAIL"] else "[bold green]PASS[/]"
    output.print(f"{verdict} {told}", highlight=False)


def _add_row(table: Any, *texts: str) -> None:
    """Add texts as they are; only a cell that starts with a style may hold one."""
    from rich.markup import escape

    table.add_row(*(text if text.startswith("[bold ") else escape(text) for text in texts))


def _say(text: str) -> None:
    output.print(text, markup=False, highlight=False, soft_wrap=True)
