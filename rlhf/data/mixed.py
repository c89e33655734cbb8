"""The prompts of a run that mixes: some are answered by the policy, the others are rows of a second data set."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from rlhf.config import RunConfig
from rlhf.data.offline import OfflineSet
from rlhf.data.prompts import PromptSet, key_of
from rlhf.errors import BadInput
from rlhf.experience import Group, Prompt
from rlhf.mixing import Interleaving


class MixedSet:
    """Prompts to answer and rows that are answered, under one sequence of ids; what is held out are prompts.

    rows, the second data set; interleaving, which ids are its. Immutable; `prompt` is a pure function of the id.
    """

    def __init__(self, prompts: PromptSet, rows: OfflineSet, interleaving: Interleaving) -> None:
        self._prompts, self.rows, self.interleaving = prompts, rows, interleaving

    @classmethod
    def load(cls, config: RunConfig) -> "MixedSet":
        """Both data sets of a run file. Rows whose prompt is held out are left out and counted. Raises BadInput."""
        mix, kind = config.mix, config.mixed_records
        if mix is None or kind is None:
            raise ValueError("the run file has no section mix")
        prompts = PromptSet.load(config)
        heldout = frozenset(key_of(prompt.content) for prompt in prompts.heldout_prompts())
        try:
            rows = OfflineSet.of(config, mix.data, kind, heldout)
        except BadInput as error:
            raise BadInput(f"mix.data: {error}") from error
        return cls(prompts, rows, Interleaving(config.loop.groups_per_step, mix.rows_per_step))

    def __len__(self) -> int:
        """How many prompts to answer there are in one epoch."""
        return len(self._prompts)

    def prompt(self, prompt_id: int) -> Prompt:
        """The prompt with this id; a row's content is that of the second data set."""
        source = self.rows if self.interleaving.is_row(prompt_id) else self._prompts
        return replace(source.prompt(self.interleaving.own_number(prompt_id)), id=prompt_id)

    def group(self, prompt: Prompt) -> Group:
        """The row of this prompt."""
        return self.rows.group(prompt)

    def heldout_prompts(self) -> list[Prompt]:
        return self._prompts.heldout_prompts()

    @property
    def fingerprint(self) -> str:
        """Of both data sets and of which ids are rows."""
        parts = [self._prompts.fingerprint, self.rows.fingerprint, repr(self.interleaving)]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def dropped(self) -> Mapping[str, int]:
        of_rows = {f"mix.data: {reason}": count for reason, count in self.rows.dropped.items()}
        return {**self._prompts.dropped, **of_rows}

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt to answer."""
        return self._prompts.longest

    def describe(self) -> str:
        return f"{self._prompts.describe()}; beside them {self.rows.describe()}"
