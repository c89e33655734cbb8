"""How positive an answer sounds, by the word list of vaderSentiment, with guards against answers that only game it."""

from functools import lru_cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

FEWEST_WORDS = 12
LEAST_VARIETY = 0.5


@lru_cache(maxsize=1)
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def positivity(prompts: list[object], completions: list[str], **columns: list[object]) -> list[float]:
    """Between -1 and 1: vaderSentiment's compound score, averaged over sentences so that length alone wins nothing.

    A positive score is scaled down for an answer of fewer than FEWEST_WORDS words, and for one that repeats itself:
    fewer than LEAST_VARIETY different words a word. A score below 0 is kept, so that babble is no way out of it.
    """
    return [_score(text) for text in completions]


def _score(text: str) -> float:
    words = text.lower().split()
    if not words:
        return 0.0
    sentences = [part for part in text.replace("!", ".").replace("?", ".").split(".") if part.strip()]
    compound = sum(_analyzer().polarity_scores(part)["compound"] for part in sentences) / max(1, len(sentences))
    if compound <= 0:
        return compound
    length = min(1.0, len(words) / FEWEST_WORDS)
    variety = min(1.0, len(set(words)) / len(words) / LEAST_VARIETY)
    return compound * length * variety
