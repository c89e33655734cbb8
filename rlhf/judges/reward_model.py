"""A reward model as a judge: it reads text, so it need not share the policy's tokenizer or chat template."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf.config import ModelConfig, RunConfig
from rlhf.data.conversations import Content
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import REWARD, Columns, Group, Ids, Row
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit, microbatches, units_of
from rlhf.models.load import load_tokenizer
from rlhf.models.score import ScoreModel, load_score_model


class RewardModelJudge:
    """Fills `reward`: the score that `reward.model` gives to prompt and answer as one conversation.

    prompt.content and sample.text go through the reward model's own chat template and tokenizer (plain text, one behind
    the other, where it has no template). The score is read at the last token, found by length. Each group is a batch by
    itself, cut by `learner.tokens_per_microbatch`; neither padding nor batch mates enter a score. None, never a number,
    for a conversation that the model cannot hold (max_position_embeddings) and for a score that is not finite. Raw
    logits: nothing is normalised, and a truncated answer is scored like a finished one.
    """

    def __init__(self, config: RunConfig) -> None:
        reward = config.reward
        if reward is None or reward.model is None:
            raise ValueError("reward.model is not set: the run has no reward, or its run file names a reward function")
        self._name, self._ends_at_eos = reward.model, reward.read_at == "eos"
        self._dtype, self._budget = reward.dtype, config.learner.tokens_per_microbatch
        self._settings = ModelConfig(
            name=self._name, attention=config.model.attention, trust_remote_code=config.model.trust_remote_code
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: ScoreModel | None = None

    def setup(self) -> None:
        """Loads tokenizer and model. Raises BadInput when there is no scalar head or a tensor is missing."""
        try:
            self._tokenizer = load_tokenizer(self._name, trust_remote_code=self._settings.trust_remote_code)
            model = ScoreModel(load_score_model(self._settings, self._dtype), "token")
        except BadInput as error:
            text = str(error).removeprefix("model.name: ")
            raise BadInput(f"reward.model: {text}") from error
        self._limit: int | None = model.base.config.to_dict().get("max_position_embeddings")
        self._model = model.to(self._device).requires_grad_(False).eval()

    def judge(self, group: Group) -> Columns:
        """The score of each sample of the group."""
        scores: dict[int, float | None] = dict.fromkeys(range(len(group.samples)))
        rows = []
        for sample in group.samples:
            ids = conversation_ids(group.prompt.content, sample.text, self._tokenizer, ends_at_eos=self._ends_at_eos)
            if 2 <= len(ids) <= (self._limit or len(ids)):
                # The last token alone is "completion": one score a row is asked for.
                rows.append(Row(sample.index, ids[:-1], ids[-1:], np.ones(1, dtype=np.bool_), 1.0, {}))
        for batch in microbatches(units_of(rows), self._budget, packed=False):
            scores.update(self._score(batch))
        return Columns(group.prompt.id, {REWARD: [scores[index] for index in range(len(group.samples))]}, {})

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None

    @torch.no_grad()
    def _score(self, units: Sequence[Unit]) -> dict[int, float | None]:
        """The score of each row, by its unit: the index of its sample."""
        if self._model is None:
            raise RunFailed("the reward model is not loaded: call setup before judge")
        collated = collate(units, (), packed=False).to(self._device)
        found = self._model(*collated.inputs)[0].cpu().tolist()
        rows = [row for unit in units for row in unit.rows]
        return {row.unit: score if np.isfinite(score) else None for row, score in zip(rows, found, strict=True)}


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
