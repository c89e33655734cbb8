"""The frozen reference model as a judge: the log-probabilities of a group's tokens under the weights the run started
from.

With LoRA there is no such judge: the learner computes the same column with the adapter off.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.chaos.points import point
from rlhf.config import RunConfig
from rlhf.errors import RunFailed
from rlhf.experience import REF_LOGPROBS, Columns, Floats, Group, Row
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit, microbatches, units_of
from rlhf.models.load import load_model
from rlhf.models.offload import Offloaded, tensors_of
from rlhf.models.policy import PolicyModel


class ReferenceJudge:
    """Fills `ref_logprobs`, a (T,) column of each sample: at the sample's own temperature, masked tokens included.

    The model is `model.name` as it was loaded, in the dtype, with the attention implementation and through the code
    of the learner's passes, so that it equals the policy as long as that has not been trained. Each group is a batch
    by itself, cut only by `learner.tokens_per_microbatch`: its numbers do not depend on what else is judged. Never
    trained, never updated.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._model: PolicyModel | None = None
        self._offloaded: Offloaded | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def setup(self) -> None:
        """Loads the model and freezes it. Raises BadInput when it cannot be had."""
        model = PolicyModel(
            load_model(self._config.model, self._config.learner.dtype), self._config.learner.logit_chunk
        )
        self._model = model.to(self._device).requires_grad_(False).eval()

    def judge(self, group: Group) -> Columns:
        """The column of every sample of the group; an empty completion has an empty one."""
        units = units_of([_row(group, index) for index in range(len(group.samples))])
        found: dict[int, Floats] = {}
        for batch in microbatches(units, self._config.learner.tokens_per_microbatch, packed=False):
            found.update(self._score(batch))
        point("reference: scored", group.prompt.id)
        return Columns(group.prompt.id, {}, {REF_LOGPROBS: [found[index] for index in range(len(group.samples))]})

    def sleep(self) -> None:
        """Gives the GPU up: until `wake` the model is in the host's memory, and the judge judges nothing."""
        if self._model is not None and self._offloaded is None:
            self._offloaded = Offloaded(tensors_of(self._model))

    def wake(self) -> None:
        if self._offloaded is not None:
            self._offloaded.restore()
            self._offloaded = None

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None

    @torch.no_grad()
    def _score(self, units: Sequence[Unit]) -> dict[int, Floats]:
        """The log-probabilities (T,) of each row's completion, by its unit: the index of its sample."""
        if self._model is None:
            raise RunFailed("the reference model is not loaded: call setup before judge")
        if self._offloaded is not None:
            raise RunFailed("the reference model sleeps: call wake before judge")
        collated = collate(units, (), packed=False).to(self._device)
        logprobs = collated.outputs(*self._model(*collated.inputs)).logprobs.float().cpu().numpy()
        rows = [row for unit in units for row in unit.rows]
        return {
            row.unit: np.ascontiguousarray(own[: len(row.completion_ids)], dtype=np.float32)
            for row, own in zip(rows, logprobs, strict=True)
        }


def _row(group: Group, index: int) -> Row:
    sample = group.samples[index]
    # A completion of a data set was not sampled at any temperature: its log-probabilities are those of the plain model.
    temperature = 1.0 if sample.sampling is None else sample.sampling.temperature
    return Row(index, group.prompt.token_ids, sample.token_ids, sample.loss_mask, temperature, {})
