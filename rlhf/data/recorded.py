"""What another run sampled and had judged, as the data of a run that trains only.

The n-th prompt id names the n-th group that the record trained on, or could have: step for step the same groups in the
same order. They enter the new run's buffer through the same door as fresh ones; the record is only read.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.experience import Group, Prompt


class RecordedSet:
    """The groups of a record, without what its learner filled in. A stand-in for a run's prompts; nothing is held out.

    fingerprint, a hash of all groups and their order: a run does not go on with a record that has changed.
    """

    dropped: Mapping[str, int] = {}

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._view = run_dir, ExperienceView(run_dir / FILE_NAME)
        self._stored = self._view.in_training_order()
        listed = " ".join(f"{stored.prompt_id}:{stored.checksum}" for stored in self._stored)
        self.fingerprint = "record " + hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()

    def check(self, config: RunConfig, columns: frozenset[str]) -> None:
        """Raises BadInput unless a run of this config, which needs these columns from judges, can train on the record:
        enough groups, of the right size, with these columns, and none older than loop.max_staleness allows."""
        where, loop = f"--train-only {self._run_dir}", config.loop
        there = frozenset(self._view.overview().pinned.get("required columns", "").split())
        if lacking := columns - there:
            raise BadInput(
                f"{where}: its groups have {', '.join(sorted(there))}, but {config.algorithm.name} needs "
                f"{', '.join(sorted(lacking))}, too; expected the record of a run with the same judges"
            )
        needed = loop.num_steps * loop.groups_per_step
        if len(self._stored) < needed:
            raise BadInput(
                f"{where}: holds {len(self._stored)} judged groups, but loop.num_steps={loop.num_steps} with "
                f"loop.groups_per_step={loop.groups_per_step} trains on {needed}; expected loop.num_steps="
                f"{len(self._stored) // loop.groups_per_step} or fewer"
            )
        for number, stored in enumerate(self._stored[:needed]):
            if stored.samples != config.algorithm.samples_per_prompt:
                raise BadInput(
                    f"{where}: the group of prompt {stored.prompt_id} has {stored.samples} samples; expected "
                    f"algorithm.samples_per_prompt={stored.samples}, found {config.algorithm.samples_per_prompt}"
                )
            step = number // loop.groups_per_step
            if stored.policy_version is not None and step - stored.policy_version > loop.max_staleness:
                raise BadInput(
                    f"{where}: step {step} would train on samples of version {stored.policy_version}; expected "
                    f"loop.max_staleness={step - stored.policy_version} or more, found {loop.max_staleness}"
                )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest completion. Reads every group."""
        groups = (self._group(number) for number in range(len(self)))
        return max(len(g.prompt.token_ids) + max(len(sample.token_ids) for sample in g.samples) for g in groups)

    def __len__(self) -> int:
        return len(self._stored)

    def prompt(self, prompt_id: int) -> Prompt:
        return self._group(prompt_id).prompt

    def heldout_prompts(self) -> list[Prompt]:
        """None: there is no engine to answer them."""
        return []

    def describe(self) -> str:
        return f"{len(self)} groups that {self._run_dir} sampled and judged; nothing is sampled or judged here"

    def group(self, prompt: Prompt) -> Group:
        return self._group(prompt.id)

    def _group(self, number: int) -> Group:
        group = self._view.judged_group(self._stored[number].prompt_id)
        return replace(group, prompt=replace(group.prompt, id=number))
