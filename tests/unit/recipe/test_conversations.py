"""Reading files of conversations."""

import json

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.conversations import read_conversations
from quantkit.recipe.locate import find_prompts


@pytest.fixture
def file(tmp_path):
    def write(*records, name="talk.jsonl"):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        path = tmp_path / name
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_a_text_is_a_part_and_paths_are_relative_to_the_file(file, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").touch()
    parts = [{"type": "image", "image": "media/a.png"}, {"type": "text", "text": "What is it?"}]
    path = file(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dot."}]},
        "",
        {"messages": [{"role": "user", "content": "Hello."}]},
    )
    first, second = read_conversations(path)
    assert first[0]["content"] == [{"type": "image", "image": str(tmp_path / "media" / "a.png")}, parts[1]]
    assert first[1] == {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]}
    assert second == [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "Hello."), ("a.jsonl", '{"prompt": "Hello."}'), ("a.tsv", "id\tcaption\n1\tHello.")],
)
def test_every_file_of_prompts_is_one_of_conversations(file, name, text):
    assert read_conversations(file(text, name=name)) == [
        [{"role": "user", "content": [{"type": "text", "text": "Hello."}]}]
    ]


SOUND = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", ":2: is not JSON"),
        ({"messages": []}, ":2: messages: is missing or empty"),
        ({"prompt": "a"}, ":2: messages: is missing or empty"),
        ({"messages": [{"role": "boss", "content": "a"}]}, ":2: messages[0]: role: must be one of system, user"),
        ({"messages": [{"role": "user"}]}, ":2: messages[0]: content: must be a text or a list of parts"),
        ({"messages": [{"role": "user", "content": []}]}, ":2: messages[0]: content: must be a text or a list of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
            ":2: messages[0]: content[0]: type: must be one of text, image, audio",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]},
            ":2: messages[0]: content[0]: image: is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "gone.wav"}]}]},
            "gone.wav: no such file",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_line_and_key(file, record, reason):
    with pytest.raises(RecipeError) as caught:
        read_conversations(file(SOUND, record))
    assert reason in str(caught.value)


def test_a_file_that_is_not_there_is_refused_as_for_prompts(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_conversations(tmp_path / "gone.jsonl")


def test_the_shipped_conversations_hold_text_pictures_and_sounds():
    found = read_conversations(find_prompts("omni-calibration.jsonl", None))
    kinds = [part["type"] for talk in found for message in talk for part in message["content"]]
    assert len(found) == 16
    assert {kind: kinds.count(kind) for kind in ("image", "audio")} == {"image": 3, "audio": 2}
