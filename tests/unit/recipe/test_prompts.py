"""Reading prompt files of every kind."""

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe import Prompt, read_prompts


@pytest.fixture
def write(tmp_path):
    def write_prompts(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_prompts


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "# a comment\n\n  one \r\ntwo\u2028still two\n", ["one", "two\u2028still two"]),
        ("a.txt", b"\xef\xbb\xbfone\n", ["one"]),
        ("a.tsv", "id\tcaption\n1\tone\n2\ttwo, too\n3\t\n", ["one", "two, too"]),
        (
            "a.csv",
            'caption,id\n"one, with ""comma""",1\n"over\ntwo lines",2\n',
            ['one, with "comma"', "over\ntwo lines"],
        ),
        ("a.csv", b"\xef\xbb\xbfcaption\r\none\r\n", ["one"]),
        ("a.jsonl", '{"caption": "one"}\n\n{"prompt": "two\u2028lines"}\n', ["one", "two\u2028lines"]),
    ],
)
def test_prompts_are_read_in_their_order(write, name, text, prompts):
    assert [prompt.text for prompt in read_prompts(write(name, text))] == prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "caption\timage\none\tpictures/a.png\ntwo\t\n"),
        ("a.csv", "image,caption\npictures/a.png,one\n,two\n"),
        ("a.jsonl", '{"prompt": "one", "image": "pictures/a.png"}\n{"prompt": "two", "image": null}\n'),
    ],
)
def test_pictures_are_found_from_the_files_folder(write, tmp_path, name, text):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    assert read_prompts(write(name, text)) == [Prompt("one", str(tmp_path / "pictures" / "a.png")), Prompt("two")]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", "", "a.txt: holds no prompt"),
        ("a.txt", "# only a comment\n \n", "a.txt: holds no prompt"),
        ("a.tsv", "caption\n", "a.tsv: holds no prompt"),
        ("a.tsv", "id\ttext\n1\tone\n", "a.tsv:1: has no column 'caption'"),
        ("a.csv", "", "a.csv:1: has no column 'caption'"),
        ("a.csv", "caption\n" + "x" * 200_000, "a.csv: is no table: "),
        ("a.jsonl", '{"caption": "one"}\n{', "a.jsonl:2: is not JSON: "),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: is not JSON: "),
        ("a.jsonl", '{"text": "one"}', "a.jsonl:1: has no text under 'caption' or 'prompt'"),
        ("a.jsonl", '{"caption": 3}', "a.jsonl:1: has no text under 'caption' or 'prompt'"),
        ("a.jsonl", "3", "a.jsonl:1: has no text under 'caption' or 'prompt'"),
        ("a.jsonl", '{"caption": "one", "image": 3}', "a.jsonl:1: image: must be a path, not 3"),
        ("a.tsv", "caption\timage\none\tb.png\n", "a.tsv:2: image: no file "),
        ("a.md", "one", "a.md: unknown kind of prompt file; use one of .txt, .tsv, .csv, .jsonl"),
        ("a.txt", b"\xff\xfeone", "a.txt: is not UTF-8 text"),
    ],
)
def test_a_file_without_prompts_is_refused_with_file_and_reason(write, name, text, reason):
    path = write(name, text)
    with pytest.raises(RecipeError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path.parent}/{reason}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"a\.txt: cannot be read: No such file"):
        read_prompts(tmp_path / "a.txt")
