"""What bodies take for a number, field by field."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit_runtime.server.chat_schemas import ChatBody, SpeechBody
from quantkit_runtime.server.schemas import ImageRequestBody

BODIES = {
    ImageRequestBody: {"prompt": "a cat"},
    ChatBody: {"messages": [{"role": "user", "content": "a cat"}]},
    SpeechBody: {"input": "a cat"},
}


def integers(model):
    """Yield the integer fields of a body with the least and the greatest value that its JSON schema allows."""
    for name, field in model.model_json_schema()["properties"].items():
        for option in field.get("anyOf", [field]):
            if option.get("type") == "integer":
                yield name, option["minimum"], option.get("maximum", 2**60)


FIELDS = [(model, *field) for model in BODIES for field in integers(model)]


def read(model, name, number):
    """Return what a body makes of a number as JSON writes it."""
    return getattr(model.model_validate({**BODIES[model], name: json.loads(number)}), name)


def test_the_integer_fields_are_found():
    assert {name for _, name, *_ in FIELDS} == {
        *("width", "height", "num_inference_steps", "max_sequence_length", "seed", "n", "output_compression"),
        *("max_tokens", "max_completion_tokens", "top_k"),
    }


@pytest.mark.parametrize(("model", "name", "least", "most"), FIELDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_a_whole_number_is_an_integer_however_it_is_written(model, name, least, most, data):
    number = data.draw(st.integers(least, most).filter(lambda value: int(float(value)) == value))
    for text in (f"{number}", f"{number}.0", f"{number}.000", f"{number}e0"):
        found = read(model, name, text)
        assert (found, type(found)) == (number, int)
    for text in (f"{least - 1}.0", f"{number % 2**40}.5", f'"{number}"', f'"{number}.0"', "true", "1e999", "NaN"):
        with pytest.raises(ValidationError):
            read(model, name, text)


def test_a_number_that_need_not_be_whole_stays_one():
    found = read(ImageRequestBody, "guidance_scale", "4.0")
    assert (found, type(found)) == (4.0, float)
