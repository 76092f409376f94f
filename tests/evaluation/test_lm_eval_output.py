"""Records of lm-evaluation-harness: no file is written over, what a kill left is gone on with."""

import pytest

from lm_jax.errors import UserError
from lm_jax.evaluators.lm_eval import _check_output


def test_only_what_a_kill_left_is_gone_on_with(tmp_path):
    records, report = tmp_path / "x.jsonl", tmp_path / "x.report.json"
    requests = [tmp_path / "x.requests.jsonl", tmp_path / "x.requests.report.json"]
    output = str(records)
    _check_output(output)
    report.write_text("mine")
    with pytest.raises(UserError, match=r"x\.report\.json' is there already"):
        _check_output(output)
    report.unlink()
    records.write_text("mine")
    with pytest.raises(UserError, match=r"x\.jsonl' is there already"):
        _check_output(output)
    for path in requests:  # between the two writes
        path.write_text("{}")
    _check_output(output)
    report.write_text("{}")  # all of it is there
    with pytest.raises(UserError, match=r"x\.report\.json' is there already"):
        _check_output(output)
    with pytest.raises(UserError, match="no folder"):
        _check_output(str(tmp_path / "nowhere" / "x.jsonl"))
