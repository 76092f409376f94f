"""What the command says about mistakes that it can see without a model."""

import commands
import pytest


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "which text is the model to read? give --prompt='...'"),
        (["--prompt=a"], "where is the page to go? give --output=FILE.html"),
        (["--prompt=a", f"--output={__file__}"], "is there already"),
    ],
)
def test_a_mistake_is_a_message(flags, message):
    code, out, err = commands.run("inspect", "--model=nowhere", *flags)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
