"""`python -m lm_jax.tokenize`, as a user runs it."""

import subprocess

import commands
import pytest

from lm_jax.data.encoded import Tokens
from lm_jax.data.tokenizer import load_tokenizer

TEXT = "One fish two fish, red fish blue fish.\n    Black fish, blue fish, old fish, new fish!\n"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [*commands.python(), "-m", "lm_jax.tokenize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXT.replace("two", str(n)) for n in range(200)), encoding="utf-8")
    (tmp_path / "records.jsonl").write_text('{"content": "x"}\n')
    return path


def test_train_then_inspect(corpus, tmp_path):
    output = tmp_path / "tokenizer"
    done = run(f"--source={corpus}", f"--output={output}", "--vocab_size=310")
    assert (done.returncode, done.stderr) == (0, "")
    assert "310 ids" in done.stdout and "bytes per token" in done.stdout

    shown = run(f"--tokenizer={output}", "--text=red fish\n\u2581 \u00e9")
    assert (shown.returncode, shown.stderr) == (0, "")
    header, *rows, total, verdict = shown.stdout.splitlines()
    assert header.split() == ["id", "bytes", "piece"]
    size = len("red fish\n\u2581 \u00e9".encode())
    assert sum(int(row.split()[1]) for row in rows) == size
    assert total.startswith(f"{len(rows)} tokens, {size} bytes")
    assert verdict == "the text comes back exactly"

    again = run(f"--source={corpus}", f"--output={output}", "--vocab_size=310")
    assert again.returncode == 1 and "exists already" in again.stderr


def test_characters_learn_the_held_out_text_too(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a" * 1000 + "z")
    done = run(f"--source={corpus}", f"--output={tmp_path / 'out'}", "--kind=characters")
    assert done.returncode == 0 and "2 ids" in done.stdout


def test_tokens_of_a_corpus(corpus, tmp_path):
    done = run(f"--source={corpus}", f"--output={tmp_path / 'bytes'}", "--kind=bytes")
    assert done.returncode == 0, done.stderr
    more = ["--document=line", "--workers=2"]
    output = tmp_path / "tokens"
    made = run(
        f"--tokenizer={tmp_path / 'bytes'}", f"--source={corpus}", f"--output={output}", *more
    )
    assert (made.returncode, made.stderr) == (0, "")
    lines = [line for line in corpus.read_text(encoding="utf-8").splitlines() if line]
    size = sum(len(line.encode()) for line in lines)
    assert f"{len(lines)} documents, {size:,} tokens of 1.000 bytes" in made.stdout
    assert f"--config.data.sources=tokens:{output}" in made.stdout
    assert [len(x) for x in Tokens(str(output))] == [len(line.encode()) for line in lines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --source=... and --output=DIR"),
        (["--output={tmp}/out"], "--source"),
        (["--source={tmp}/nothing.txt", "--output={tmp}/out"], "nothing.txt"),
        (["--source={tmp}/corpus.txt", "--output={tmp}/out"], "tokenizer.vocab_size = 8192"),
        (["--source={tmp}/records.jsonl", "--output={tmp}/out"], "Set --text_key"),
        (["--source={tmp}/corpus.txt", "--output={tmp}/out", "--vocab_size=0"], "vocab_size"),
        (["--source={tmp}/corpus.txt", "--output={tmp}/corpus.txt"], "exists already"),
        (["--tokenizer={tmp}/nowhere", "--text=x"], "nowhere"),
        (["--tokenizer={tmp}"], "--text"),
        (["--tokenizer={tmp}", "--output={tmp}/out"], "--source"),
        (["--tokenizer={tmp}", "--output={tmp}/out", "--text=x"], "give --source=... and"),
        (["--source={tmp}/corpus.txt", "--output={tmp}/out", "--workers=2"], "--workers"),
        (
            ["--source={tmp}", "--tokenizer={tmp}", "--output={tmp}/out", "--kind=bytes"],
            "--kind: nothing is learned",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(corpus, tmp_path, arguments, message):
    done = run(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mask_token_is_reserved_on_request(corpus, tmp_path):
    for name, flags in (("plain", []), ("masked", ["--mask"])):
        done = run(f"--source={corpus}", f"--output={tmp_path / name}", "--kind=bytes", *flags)
        assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "plain").mask_id is None
    assert load_tokenizer(tmp_path / "masked").mask_id == 258
