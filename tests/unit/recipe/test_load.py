"""Reading a recipe: what is accepted, and that every mistake is named where it was made."""

import json
from itertools import pairwise

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import RecipeError
from quantkit.recipe import load_recipe, recipe_of
from quantkit.recipe.schema import Recipe, Sampling

MINIMAL = "version: 1\nmodel: {id: demo}\nscheme: {iters: 0}\n"

TEN_MISTAKES = """\
version: 2
modle: {}
model:
  id: ""
  famly: flux
scheme:
  bits: 5
  group_size: 0
  sym: "yes"
  iters: 1.5
layers:
  overrides:
    - {match: "*.to_q", bit: 8}
export:
  max_shard_size: 5 apples
compare:
  seeds: []
  thresholds:
    psnr: {mni: 20, min: 3, max: 2}
scheme: {bits: 5}
"""


@pytest.fixture
def write(tmp_path):
    def write_recipe(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [problem.replace(str(path), path.name) for problem in caught.value.problems]


def test_all_mistakes_are_reported_at_once_with_file_line_key_and_reason(write, golden):
    # The second `scheme` replaces the first, as YAML has it, so the first one's mistakes go with it.
    path = write(TEN_MISTAKES.replace("scheme: {bits: 5}\n", "serve: {hight: 3}\nserve: {hight: 3}\n"))
    golden("recipe_mistakes.txt", "\n".join(problems(path)) + "\n")


def test_a_valid_recipe_keeps_its_path_hash_and_overrides(write):
    import hashlib

    path = write(MINIMAL)
    loaded = load_recipe(path, ["scheme.bits=8"])
    assert (loaded.path, loaded.overrides) == (path, ("scheme.bits=8",))
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5E-3", 5e-3), ("2.e-1", 0.2), ("0.01", 0.01)])
def test_scientific_notation_is_a_number(write, text, value):
    assert (
        load_recipe(write(f"version: 1\nmodel: {{id: a}}\nscheme: {{iters: 0, lr: {text}}}")).recipe.scheme.lr
        == value
    )


def test_an_override_replaces_what_the_file_says_and_makes_missing_sections(write):
    loaded = load_recipe(
        write(MINIMAL), ["scheme.bits=8", "layers.exclude=[a, b]", "sampling.guidance_scale=1e0", "model.id='123'"]
    )
    assert loaded.recipe.scheme.bits == 8
    assert loaded.recipe.layers.exclude == ("a", "b")
    assert loaded.recipe.sampling.guidance_scale == 1.0
    assert loaded.recipe.model.id == "123"


def test_a_mistake_in_an_override_names_the_override_not_a_line(write):
    assert problems(write(MINIMAL), ["scheme.bits=5"]) == [
        "--set scheme.bits=5: scheme.bits: 5 is not one of 2, 3, 4 or 8"
    ]


@pytest.mark.parametrize("text", ["scheme.bits", "=4", "scheme..bits=4", ""])
def test_an_override_without_key_and_value_says_how_to_write_one(write, text):
    with pytest.raises(RecipeError, match=r"write key\.path=value"):
        load_recipe(write(MINIMAL), [text])


def test_an_override_below_a_plain_value_is_refused(write):
    with pytest.raises(RecipeError, match="version holds a value, not keys"):
        load_recipe(write(MINIMAL), ["version.minor=4"])


@pytest.mark.parametrize("value", ["[1", "2020-13-45", "!!python/name:os.system"])
def test_an_override_that_is_no_yaml_is_refused(write, value):
    with pytest.raises(RecipeError, match="the value is not valid YAML"):
        load_recipe(write(MINIMAL), [f"scheme.bits={value}"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("scheme={bits: 9}", "--set scheme={bits: 9}: scheme.bits: 9 is not one of 2, 3, 4 or 8"),
        (
            "compare.seeds=[-1]",
            "--set compare.seeds=[-1]: compare.seeds[0]: input should be greater than or equal to 0, not -1",
        ),
        (
            "compare.thresholds.psnr.max=5",
            "recipe.yaml:5, with --set compare.thresholds.psnr.max=5: compare.thresholds.psnr: min is above max",
        ),
        (
            "scheme.iters=9",
            (
                "recipe.yaml:1, with --set scheme.iters=9: tuning (scheme.iters above 0) needs "
                "calibration.prompts or calibration.dataset"
            ),
        ),
    ],
)
def test_a_mistake_of_an_override_is_told_once_and_never_of_the_file_alone(write, text, told):
    recipe = write(
        "version: 1\nmodel: {id: a}\nscheme: {bits: 4, iters: 0}\n"
        "compare:\n  thresholds: {psnr: {min: 30}}\n  seeds: [1]\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [text])
    assert [problem.replace(str(recipe), "recipe.yaml") for problem in caught.value.problems] == [told]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("modl: 1", "recipe.yaml:4: modl: unknown key (did you mean model?)"),
        ("sampling: {heigth: 1}", "recipe.yaml:4: sampling.heigth: unknown key (did you mean height?)"),
        (
            "layers: {overrides: [{match: a, bits: 8}, {match: b, group_sise: 32}]}",
            "recipe.yaml:4: layers.overrides[1].group_sise: unknown key (did you mean group_size?)",
        ),
        (
            "compare: {thresholds: {psnr: {mim: 3}}}",
            "recipe.yaml:4: compare.thresholds.psnr.mim: unknown key (did you mean min?)",
        ),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_known_one(write, text, line):
    assert line in problems(write(MINIMAL + text))


def test_an_unknown_key_like_no_other_is_reported_with_the_known_ones(write):
    assert problems(write(MINIMAL + "eval: {qqqq: 1}")) == ["recipe.yaml:4: eval.qqqq: unknown key (known: suites)"]


def test_a_key_given_twice_is_a_mistake_even_with_the_same_value(write):
    assert problems(write(MINIMAL + "version: 1")) == ["recipe.yaml:4: version: is given twice"]


def test_tuning_without_prompts_is_a_mistake(write):
    assert problems(write("version: 1\nmodel: {id: a}\n")) == [
        "recipe.yaml:1: tuning (scheme.iters above 0) needs calibration.prompts or calibration.dataset"
    ]


@pytest.mark.parametrize("text", ["", "- 1", "just text", "42"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    assert problems(write(text)) == ["recipe.yaml:1: a recipe is a mapping of keys, for example 'version: 1'"]


def test_a_yaml_error_names_the_line(write):
    [problem] = problems(write(MINIMAL + "sampling: {height: 3\n"))
    assert problem.startswith("recipe.yaml:5: is not valid YAML: ")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a [1]\n"
        + "\n".join(f"{key}: &{key} [{','.join([f'*{held}'] * 10)}]" for held, key in pairwise("abcdefg")),
        "[" * 5000,
        "date: 2020-13-45",
        "2020-01-01: a",
        "n: 0x" + "f" * 5000,
        "n: " + "9" * 5000,
        "n: !!int abc",
        "\x00",
        "a: !!python/object/apply:os.system [ls]",
        "? [1]\n: 2",
        '"\\ud800": 1',
        "n: .nan",
    ],
)
def test_hostile_yaml_is_a_recipe_error_of_single_lines(write, text):
    for problem in problems(write(text)):
        assert "\n" not in problem


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"version: 1\nmodel: {id: \xff\xfe}")
    assert len(problems(path)) == 1


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert problems(tmp_path / "recipe.yaml") == ["recipe.yaml: cannot be read: No such file or directory"]
    assert problems(tmp_path)[0].endswith(": cannot be read: Is a directory")


@given(text=st.text(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
def test_arbitrary_text_raises_nothing_but_a_recipe_error(write, text):
    path = write(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
POSITIVE = st.integers(1, 2**40)
FACTOR = st.floats(1e-6, 1e6)
SAMPLING = {
    "height": st.none() | POSITIVE,
    "width": st.none() | POSITIVE,
    "num_inference_steps": st.none() | POSITIVE,
    "guidance_scale": st.none() | FACTOR,
    "negative_prompt": st.none() | PRINTABLE,
}
OVERRIDES = st.one_of(
    st.fixed_dictionaries({"match": PRINTABLE, "keep": st.just(True)}),
    st.fixed_dictionaries(
        {"match": PRINTABLE, "bits": st.sampled_from([2, 3, 4, 8])}, optional={"sym": st.booleans()}
    ),
    st.fixed_dictionaries({"match": PRINTABLE, "group_size": st.just(-1) | POSITIVE}),
)
RECIPES = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "model": st.fixed_dictionaries({"id": PRINTABLE}, optional={"family": PRINTABLE, "revision": PRINTABLE}),
        "scheme": st.fixed_dictionaries(
            {"iters": st.integers(0, 10_000)},
            optional={"lr": FACTOR, "sym": st.booleans(), "seed": st.integers(0, 2**63 - 1)},
        ),
        "calibration": st.fixed_dictionaries({"prompts": PRINTABLE}, optional=SAMPLING),
    },
    optional={
        "layers": st.fixed_dictionaries(
            {}, optional={"include": st.lists(PRINTABLE, max_size=3), "overrides": st.lists(OVERRIDES, max_size=3)}
        ),
        "sampling": st.fixed_dictionaries({}, optional=SAMPLING),
        "export": st.fixed_dictionaries({"max_shard_size": st.sampled_from(["5GB", "512 MiB", "1000"])}),
        "compare": st.fixed_dictionaries(
            {"thresholds": st.dictionaries(PRINTABLE, st.fixed_dictionaries({"min": FACTOR}), max_size=3)}
        ),
    },
)  # fmt: skip


@given(data=RECIPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_a_valid_recipe_written_as_yaml_loads_back_equal(write, data):
    recipe = Recipe.model_validate_json(json.dumps(data))
    # Quoted, because the loader takes 1e-3 for a number, and PyYAML would write such a text without quotes.
    dumped = yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, default_style='"')
    assert load_recipe(write(dumped)).recipe == recipe


def test_the_recipe_of_a_checkpoint_is_read_from_its_manifest(write, tmp_path):
    recipe = load_recipe(write(MINIMAL)).recipe
    assert recipe_of(tmp_path) is None
    recorded = {"effective": recipe.model_dump(mode="json"), "sha256": "abc"}
    manifest = write(json.dumps({"recipe": recorded}), "quantkit.json")
    found = recipe_of(tmp_path)
    assert (found.recipe, found.path, found.sha256) == (recipe, manifest, "abc")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": 3}', '{"recipe": {"effective": {"version": 9}}}'])
def test_a_manifest_without_a_recipe_is_refused(write, tmp_path, text):
    write(text, "quantkit.json")
    with pytest.raises(RecipeError, match=r"quantkit\.json: holds no recipe"):
        recipe_of(tmp_path)


def test_sampling_keys_that_are_given_replace_those_below():
    base = Sampling(height=64, width=64, guidance_scale=2.0)
    assert Sampling(height=32, guidance_scale=0.0).over(base) == Sampling(height=32, width=64, guidance_scale=0.0)
