"""A reward model as a judge: it reads text, so it need not share the policy's tokenizer or chat template."""

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf.config import RewardSource, RunConfig
from rlhf.data.conversations import Content
from rlhf.errors import RunFailed
from rlhf.experience import REWARD, Columns, Group, Ids
from rlhf.judges.patience import refuse_unscored
from rlhf.judges.scorer import Scorer


class RewardModelJudge:
    """Fills `reward`: the score that `reward.model` gives to prompt and answer as one conversation.

    prompt.content and sample.text go through the reward model's own chat template and tokenizer (plain text, one behind
    the other, where it has no template). The score is read at the last token, found by length. Each group is a batch by
    itself, cut by `learner.tokens_per_microbatch`; neither padding nor batch mates enter a score. None, never a number,
    for a conversation that the model cannot hold (max_position_embeddings) and for a score that is not finite. Raw
    logits: nothing is normalised, and a truncated answer is scored like a finished one.
    """

    def __init__(self, config: RunConfig, reward: RewardSource, key: str) -> None:
        if reward.model is None:
            raise ValueError(f"{key}.model is not set: the run file names something else")
        self._name, self._ends_at_eos = reward.model, reward.read_at == "eos"
        self._scorer = Scorer(config, reward.model, f"{key}.model", reward.dtype)

    def setup(self) -> None:
        """Loads tokenizer and model. Raises BadInput when there is no scalar head or a tensor is missing."""
        self._scorer.setup()

    def judge(self, group: Group) -> Columns:
        """The score of each sample of the group."""
        read = [
            conversation_ids(group.prompt.content, s.text, self._scorer.tokenizer, ends_at_eos=self._ends_at_eos)
            for s in group.samples
        ]
        columns = Columns(group.prompt.id, {REWARD: self._scorer.scores(read)}, {})
        too_long = sum(not self._scorer.fits(ids) for ids in read)
        refuse_unscored(
            group,
            columns,
            f"reward model {self._name} gave a score that is not finite for {len(read) - too_long}, and {too_long} do "
            "not fit in it",
        )
        return columns

    def close(self) -> None:
        """Gives the model's memory back."""
        self._scorer.close()


def conversation_ids(content: Content, answer: str, tokenizer: Tokenizer, *, ends_at_eos: bool) -> Ids:
    """The tokens (T,) int32 that a reward model reads: the prompt and its answer, BOS once at the front.

    With ends_at_eos the last token is the EOS behind the answer, whatever blanks the chat template puts after it:
    that is where a reward model trained here has learnt to be read. Otherwise what the template writes is left as it
    is. Never padded, never cut.
    """
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if tokenizer.chat_template is not None:
        text = str(tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False))
    elif isinstance(content, str):
        text = content + answer
    else:
        raise RunFailed(
            "the prompts are lists of messages, but the tokenizer of reward.model has no chat template to join them"
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][0] == bos:
        ids = [bos, *ids]
    if ends_at_eos:
        last = len(ids) - 1 - ids[::-1].index(eos) if eos in ids else -1
        blank = last >= 0 and not str(tokenizer.decode(ids[last + 1 :])).strip()
        ids = ids[: last + 1] if blank else [*ids, eos]
    return np.array(ids, dtype=np.int32)
