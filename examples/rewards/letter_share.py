"""A reward that a tiny model learns in a minute: how often one letter stands in the answer."""

import re

LETTER = "e"
ENOUGH = 16
SPECIAL = re.compile(r"<\|[^|]*\|>")  # the name of a special token is no text, whatever letters are in it


def letter_share(prompts: list[object], completions: list[str], **columns: list[object]) -> list[float]:
    """Between 0 and 1: the number of letters `e`, as a share of ENOUGH of them. Saying less gains nothing."""
    return [min(1.0, SPECIAL.sub("", text).lower().count(LETTER) / ENOUGH) for text in completions]
