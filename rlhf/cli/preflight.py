"""Everything that can be wrong with a run's inputs, found before anything heavy starts.

`check_cheaply` imports neither torch nor ray nor transformers and takes a second or two; `check_prompts` needs the
tokenizer, so the model is fetched or built first. Both raise BadInput."""

import importlib.util
import json
from typing import TYPE_CHECKING

from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.data.conversations import content_of
from rlhf.data.examples import read_examples
from rlhf.data.prompts import PromptSet
from rlhf.data.records import load_rows
from rlhf.errors import BadInput
from rlhf.judges.reward_function import check_reward_function
from rlhf.models.resolve import check_model, resolve
from rlhf.models.score_head import check_reward_model

if TYPE_CHECKING:
    from rlhf.team import Prompts


def check_cheaply(config: RunConfig, cluster: Cluster) -> None:
    """Engines, cluster file against run file, the rows' columns, reward function or model, the model's files."""
    _check_engines(config)
    _check_cluster(config, cluster)
    records = load_rows(config.data)
    if config.records == "prompts":
        for record in records:
            content_of(record, config.data.prompt_column)
    else:
        read_examples(records, config.data, config.records)
    reward = config.reward
    if reward is not None and reward.function is not None:
        check_reward_function(reward.function)
    if reward is not None and reward.model is not None:
        check_reward_model(reward.model, fetch=False)
    check_model(config.model.name)


def check_prompts(config: RunConfig) -> "Prompts":
    """Templates, lengths, the held-out split, and whether prompt and completion fit the model; returns the prompts, or
    the preferences or demonstrations."""
    if config.reward is not None and config.reward.model is not None:
        check_reward_model(config.reward.model, fetch=True)
    if config.records == "prompts":
        prompts: Prompts = PromptSet.load(config)
    else:
        from rlhf.data.offline import OfflineSet

        prompts = OfflineSet.load(config)
    _check_context(config, prompts)
    return prompts


def _check_engines(config: RunConfig) -> None:
    engines: dict[str, str] = {"learner.engine": config.learner.engine}
    if config.generation is not None:
        engines["generation.engine"] = config.generation.engine
    for key, engine in engines.items():
        if importlib.util.find_spec(engine) is None:
            other = "transformers" if engine == "vllm" else "torch"
            raise BadInput(
                f"{key}={engine}: the package {engine} is not installed. Next: make install, or {key}={other}"
            )


def _check_cluster(config: RunConfig, cluster: Cluster) -> None:
    if config.learner.engine == "torch" and cluster.trainer.replicas > 1:
        raise BadInput(
            f"cluster file: trainer.replicas={cluster.trainer.replicas}, but learner.engine=torch trains in one "
            "process; expected 1, or learner.engine=deepspeed"
        )


def _check_context(config: RunConfig, prompts: "Prompts") -> None:
    model = json.loads((resolve(config.model.name) / "config.json").read_text())
    limit = model.get("max_position_embeddings")
    if not isinstance(limit, int):
        return
    if config.generation is None:
        if prompts.longest > limit:
            raise BadInput(
                f"the longest row has {prompts.longest} tokens, but {config.model.name} holds {limit} "
                "(max_position_embeddings). Lower data.max_prompt_tokens or data.max_completion_tokens"
            )
        return
    needed = prompts.longest + config.generation.max_new_tokens
    if needed > limit:
        raise BadInput(
            f"the longest prompt has {prompts.longest} tokens and generation.max_new_tokens is "
            f"{config.generation.max_new_tokens}: {needed} together, but {config.model.name} holds {limit} "
            "(max_position_embeddings). Lower generation.max_new_tokens or data.max_prompt_tokens"
        )
