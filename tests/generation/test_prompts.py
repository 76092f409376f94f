import pytest

from lm_jax.errors import UserError
from lm_jax.generation.prompts import read_prompts


def test_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfOne \r\n\n \xc3\xa9\x0cx\n{2}")
    assert read_prompts(str(path)) == ["One ", " \u00e9\x0cx", "{2}"]


def test_json_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": ""}\n')
    assert read_prompts(str(path)) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt"}\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n', r"a\.jsonl:1: .*'prompt'"),
        ("a.jsonl", b'"x"\n', r"a\.jsonl:1: .*'prompt'"),
        ("a.jsonl", b'{"prompt": 3}\n', r"a\.jsonl:1: 'prompt' must be text, not int"),
        ("a.txt", b"x\ny\xff\n", r"a\.txt:2: not UTF-8, at byte 2"),
        ("a.txt", b"\n", "there is no text in"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(tmp_path / name))


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_prompts(str(path))
