"""The support matrix of the documentation, made from the tests that ran and passed.

A test says what it shows with the fixture ``shows(family, what, ...)``. ``--support-matrix write`` writes the page
after a whole run, ``check`` fails a run that shows something else than the page says.
"""

from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
CAPABILITIES = {
    "plan": "plan at true size",
    "rtn": "rounded",
    "tuned": "tuned",
    "resume": "goes on after a failure",
    "load": "loads, equals the dequantized reference",
    "generate": "generates",
    "compare": "compared with BF16",
    "serve": "served",
    "vllm-omni": "servable: vLLM-Omni",
    "diffusers": "servable: diffusers",
    "transformers": "servable: transformers",
}
HEAD = """# Support matrix

What the tests of this repository have run, with tiny random models of the real classes (in the first column with
the published architectures, without their weights). `make support` makes this page from the tests that pass;
`make test` fails where it says something else. An empty cell means that no test shows it. Served is what an engine
of the [server](serve.md) answers; servable is what the [check](servability.md) says of the exports.

"""


def pytest_addoption(parser):
    parser.addoption("--support-matrix", choices=["write", "check"], help="write or check docs/support.md")


@pytest.fixture
def shows(request):
    """Record that a family can do something, if the test passes: ``shows("flux", "rtn", "load")``."""

    def record(family, *shown):
        unknown = set(shown) - CAPABILITIES.keys()
        assert not unknown, f"{unknown} is none of {', '.join(CAPABILITIES)}"
        request.node.user_properties += [("shows", f"{family} {what}") for what in shown]

    return record


def pytest_sessionfinish(session):
    wanted = session.config.getoption("--support-matrix")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if wanted is None or reporter is None or hasattr(session.config, "workerinput"):
        return
    shown = set()
    for report in reporter.stats.get("passed", []):
        shown |= {value for name, value in report.user_properties if name == "shows"}
    page = render({tuple(entry.split(" ")) for entry in shown})
    if wanted == "write":
        PAGE.write_text(page, encoding="utf-8")
    elif session.exitstatus == 0 and page != PAGE.read_text(encoding="utf-8"):
        reporter.write_line("docs/support.md says something else than these tests show; run make support", red=True)
        session.exitstatus = 1


def render(shown):
    """Return the page for a set of (family, capability)."""
    from quantkit.families.registry import family_names

    unknown = {family for family, _ in shown} - set(family_names())
    assert not unknown, f"no such families: {unknown}"
    rows = [["family", *CAPABILITIES.values()], ["---"] * (len(CAPABILITIES) + 1)]
    rows += [
        [f"`{family}`", *("✓" if (family, what) in shown else " " for what in CAPABILITIES)]
        for family in family_names()
    ]
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)
