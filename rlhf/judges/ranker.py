"""A pairwise ranker as a judge: how an answer stands against others to the same prompt, in nats.

    r(y) = mean over y' of l(y, y'),     l(y, y') = 1/2 [s(x, y, y') - s(x, y', y)]

s is the logit of "the first is better"; reading both orders makes l(y, y') = -l(y', y), whatever place the ranker
prefers. `against: others` takes all other answers of the group, `one` a single one drawn by the sample's seed: RSO's
reward, the logit against one random answer of the policy (arXiv 2309.06657, section 3.2).
"""

from collections.abc import Mapping, Sequence

from rlhf.config import RewardSource, RunConfig
from rlhf.data.comparisons import comparison_ids
from rlhf.data.turns import spoken_text
from rlhf.errors import JudgeFailed
from rlhf.experience import REWARD, Columns, Group
from rlhf.judges.patience import refuse_unscored
from rlhf.judges.scorer import Scorer
from rlhf.seeding import seed_for


class RankerJudge:
    """Fills `reward`, and `reward/inconsistent`: the share of an answer's comparisons whose winner follows the order.

    None for an answer none of whose comparisons fits into the model. Equal texts are a tie, without being read.
    """

    def __init__(self, config: RunConfig, source: RewardSource, key: str) -> None:
        if source.ranker is None:
            raise ValueError(f"{key}.ranker is not set")
        self._settings, self._key = source.ranker, key
        self._scorer = Scorer(config, source.ranker.model, f"{key}.ranker.model", source.dtype)

    def setup(self) -> None:
        """Loads tokenizer and model. Raises BadInput when there is no scalar head or a tensor is missing."""
        self._scorer.setup()

    def judge(self, group: Group) -> Columns:
        """The reward of each sample of the group."""
        texts = [sample.text for sample in group.samples]
        opponents = self._opponents(group, texts)
        wanted = list(dict.fromkeys((a, b) for own, others in opponents for a, b in _orders(own, others)))
        sequences = [
            comparison_ids(group.prompt.content, a, b, self._scorer.tokenizer, self._scorer.stop_ids) for a, b in wanted
        ]
        logits = dict(zip(wanted, self._scorer.scores(sequences), strict=True))
        found = [standing(own, others, logits) for own, others in opponents]
        columns = Columns(
            group.prompt.id,
            {REWARD: [reward for reward, _ in found], f"{REWARD}/inconsistent": [share for _, share in found]},
            {},
        )
        refuse_unscored(group, columns, f"{self._key}.ranker could read none of its comparisons")
        return columns

    def close(self) -> None:
        """Gives the model's memory back."""
        self._scorer.close()

    def _opponents(self, group: Group, texts: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
        """Each answer with those that it is compared with."""
        column = self._settings.against_column
        if column is not None:
            other = group.prompt.columns.get(column)
            if not isinstance(other, str | list):
                what = f"{self._key}.ranker: column {column!r} (against_column) is {other!r}; expected an answer"
                raise JudgeFailed(f"{what}\nprompt {group.prompt.id} (row {group.prompt.row})", what, again=False)
            return [(text, [spoken_text(other)]) for text in texts]
        if self._settings.against == "one":
            one = texts[seed_for(group.samples[0].seed or 0, "ranker", group.prompt.id) % len(texts)]
            return [(text, [one]) for text in texts]
        return [(text, [*texts[:i], *texts[i + 1 :]]) for i, text in enumerate(texts)]


def standing(
    own: str, others: Sequence[str], logits: Mapping[tuple[str, str], float | None]
) -> tuple[float | None, float | None]:
    """The mean logit against the others, and in which share of the comparisons that were read the orders disagree."""
    worths, disagreements = [], []
    for other in others:
        if own == other:
            worths.append(0.0)
            continue
        first, second = logits[own, other], logits[other, own]
        if first is not None and second is not None:
            worths.append((first - second) / 2)
            disagreements.append(float((first > 0) == (second > 0)))
    reward = sum(worths) / len(worths) if worths else None
    return reward, sum(disagreements) / len(disagreements) if disagreements else None


def _orders(own: str, others: Sequence[str]) -> list[tuple[str, str]]:
    return [order for other in others if other != own for order in ((own, other), (other, own))]
