"""A model with a scalar head that judges share: token ids in, one score at the last token out."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf.config import Dtype, ModelConfig, RunConfig
from rlhf.errors import BadInput, RunFailed
from rlhf.experience import Ids, Row
from rlhf.learner.collate import collate
from rlhf.learner.plan import Unit, microbatches, units_of
from rlhf.models.load import Tokenizer, load_tokenizer, stop_ids
from rlhf.models.resolve import resolve
from rlhf.models.score import ScoreModel, load_score_model


class Scorer:
    """The frozen model `name`, which the run file has under `key`; cut into batches by learner.tokens_per_microbatch.

    Neither padding nor batch mates enter a score.
    """

    def __init__(self, config: RunConfig, name: str, key: str, dtype: Dtype) -> None:
        self._name, self._key, self._dtype = name, key, dtype
        self._budget = config.learner.tokens_per_microbatch
        self._settings = ModelConfig(
            name=name, attention=config.model.attention, trust_remote_code=config.model.trust_remote_code
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: ScoreModel | None = None

    def setup(self) -> None:
        """Loads tokenizer and model. Raises BadInput when there is no scalar head or a tensor is missing."""
        try:
            self.tokenizer: Tokenizer = load_tokenizer(self._name, trust_remote_code=self._settings.trust_remote_code)
            self.stop_ids = stop_ids(resolve(self._name), self.tokenizer)
            model = ScoreModel(load_score_model(self._settings, self._dtype), "token")
        except BadInput as error:
            text = str(error).removeprefix("model.name: ")
            raise BadInput(f"{self._key}: {text}") from error
        self._limit: int | None = model.base.config.to_dict().get("max_position_embeddings")
        self._model = model.to(self._device).requires_grad_(False).eval()

    def scores(self, sequences: Sequence[Ids]) -> list[float | None]:
        """The score of each sequence; None for one that the model cannot hold (max_position_embeddings), for one of
        fewer than two tokens, and for a score that is not finite."""
        found: dict[int, float | None] = {}
        # The last token alone is "completion": one score a row is asked for.
        rows = [
            Row(number, ids[:-1], ids[-1:], np.ones(1, dtype=np.bool_), 1.0, {})
            for number, ids in enumerate(sequences)
            if 2 <= len(ids) <= (self._limit or len(ids))
        ]
        for batch in microbatches(units_of(rows), self._budget, packed=False):
            found.update(self._score(batch))
        return [found.get(number) for number in range(len(sequences))]

    def fits(self, ids: Ids) -> bool:
        return self._limit is None or len(ids) <= self._limit

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None

    @torch.no_grad()
    def _score(self, units: Sequence[Unit]) -> Mapping[int, float | None]:
        """The score of each row, by its unit."""
        if self._model is None:
            raise RunFailed(f"{self._key} is not loaded: call setup before judge")
        collated = collate(units, (), packed=False).to(self._device)
        found = self._model(*collated.inputs)[0].cpu().tolist()
        rows = [row for unit in units for row in unit.rows]
        return {row.unit: score if np.isfinite(score) else None for row, score in zip(rows, found, strict=True)}
