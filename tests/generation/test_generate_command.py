"""What the command says about mistakes that it can see without a checkpoint."""

import commands
import pytest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir"),
        (["--workdir=w", "--temprature=1"], "did you mean '--temperature'"),
        (["--workdir=w", "--max_tokens=0"], "--max_tokens=0"),
        (["--workdir=w", "--top_p=7"], "top_p: must be above 0 and at most 1"),
        (["--workdir=w", "--prompt_file=nowhere.txt"], "nowhere.txt"),
        (["--workdir=w", "--prompt=a", "--prompt=b", "--stream"], "--stream"),
        (["--workdir=w", f"--output={__file__}"], "is there already"),
        (["--workdir=w", "--output=nowhere/o.jsonl"], "no folder 'nowhere'"),
        (
            ["--workdir=w", "--beams=4", "--temperature=1"],
            "--temperature does not go with --beams=4",
        ),
        (["--workdir=w", "--beams=4", "--seed=0"], "a search draws nothing"),
        (["--workdir=w", "--beams=4", "--stop=a"], "knows no stop strings"),
        (["--workdir=w", "--beams=4", "--stream"], "--stream does not go with --beams=4"),
        (["--workdir=w", "--chat"], "what does the user say?"),
        (["--workdir=w", "--beams=0"], "--beams=0"),
        (["--workdir=w", "--beams=2", "--length_penalty=50"], "length_penalty: must be from -10"),
        (["--workdir=w", "--length_penalty=2"], "give --beams too"),
        (["w"], "unexpected argument 'w'"),
    ],
)
def test_a_mistake_is_a_message(flags, message):
    code, _, err = commands.run("generate", *flags)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
