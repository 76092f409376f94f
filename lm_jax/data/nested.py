"""What data sets nest in a field, as templates name it."""

from typing import Any

ANSWERS, STARTS = "answers", "answer_starts"


def holder(field: str) -> str:
    """The field of a record that a field is made of, by `flat`, where it does not stand by itself:
    of `answer_starts`, `answers`."""
    return ANSWERS if field == STARTS else field


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record with lists of objects where there are objects of lists, as TFDS and Arrow have a
    sequence, and with the texts of SQuAD's answers and their places as `answers` and
    `answer_starts`."""
    found = {name: _rows(value) for name, value in record.items()}
    answers = found.get(ANSWERS)
    answers = [answers] if isinstance(answers, dict) else answers
    if isinstance(answers, list) and all(isinstance(x, dict) and "text" in x for x in answers):
        found[ANSWERS] = [x["text"] for x in answers]
        if all("answer_start" in x for x in answers):
            found = {STARTS: [x["answer_start"] for x in answers]} | found
    return found


def _rows(value: Any) -> Any:
    lists = isinstance(value, dict) and all(isinstance(column, list) for column in value.values())
    if not lists or len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row)) for row in zip(*value.values())]
