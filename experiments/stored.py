"""Today's names, and the words in which cells and trainings are stored.

A cell is found by a hash of what determines it, written in these words. They stay as they were when the first
cells were measured, so that no renaming in the library orphans a measurement. The table is stored_words.json.
"""

import json
from pathlib import Path
from typing import Any

# the name in today's code -> the word in the cells
STORED_WORDS: dict[str, str] = json.loads(Path(__file__).with_name("stored_words.json").read_text())
TODAYS_NAMES = {word: name for name, word in STORED_WORDS.items()}


def to_stored(value: Any) -> Any:
    """A value with today's names, as keys or as strings, in the words of the cells."""
    return _translate(value, STORED_WORDS)


def from_stored(value: Any) -> Any:
    """The reverse of `to_stored`."""
    return _translate(value, TODAYS_NAMES)


def _translate(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {words.get(key, key): _translate(part, words) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_translate(part, words) for part in value)
    return words.get(value, value) if isinstance(value, str) else value
