"""What is wrong with a page is seen."""

import pytest
from browser import Visitor


@pytest.mark.parametrize(
    "body, wrong",
    [
        ("<p>text</p><script>console.log(1)</script>", []),
        ("<script>console.error('no')</script>", ["console: no"]),
        ("<script>throw Error('no')</script>", ["exception: no"]),
        ("<script>alert('no')</script>", ["dialog: no"]),
        ("<script>fetch('http://localhost:1/').catch(() => 0)</script>", ["request: http:", "co"]),
        ("<img src='other.png'>", ["request: file:", "console: Failed"]),
    ],
)
def test_what_is_wrong_is_seen(chromium, tmp_path, body, wrong):
    file = tmp_path / "a page.html"
    file.write_text(body)
    visitor = Visitor(chromium)
    page = visitor.open(file.as_uri() + "#place")
    page.wait_for_timeout(100)
    visitor.close()
    assert len(visitor.wrong) == len(wrong)
    assert all(map(str.startswith, visitor.wrong, wrong)), visitor.wrong
