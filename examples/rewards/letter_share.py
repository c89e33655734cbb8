"""A reward that a tiny model learns in seconds: the share of an answer's letters that are one letter."""

LETTER = "e"


def letter_share(prompts: list[object], completions: list[str], **columns: list[object]) -> list[float]:
    """Between 0 and 1: how many of the characters of an answer are the letter `e`. An empty answer gets 0."""
    return [text.lower().count(LETTER) / len(text) if text else 0.0 for text in completions]
