"""Everything that can be wrong with a run's inputs, found before anything heavy starts.

`check_cheaply` imports neither torch nor ray nor transformers and takes a second or two; `check_prompts` needs the
tokenizer, so the model is fetched or built first. Both raise BadInput."""

import importlib.util
import json

from rlhf.cluster import Cluster
from rlhf.config import RewardModelConfig, RunConfig
from rlhf.data.conversations import content_of
from rlhf.data.prompts import PromptSet
from rlhf.data.records import load_rows
from rlhf.errors import BadInput
from rlhf.judges.reward_function import check_reward_function
from rlhf.models.resolve import check_model, resolve
from rlhf.models.score_head import check_reward_model


def check_cheaply(config: RunConfig, cluster: Cluster) -> None:
    """Engines, cluster file against run file, the rows' prompt column, reward function or model, the model's files."""
    if isinstance(config.algorithm, RewardModelConfig):
        raise BadInput(
            "algorithm.name=reward_model trains on ranked answers, and a run has no source for data sets of them yet; "
            "docs/algorithms/reward_model.md shows how to train one from Python"
        )
    _check_engines(config)
    _check_cluster(config, cluster)
    for record in load_rows(config.data):
        content_of(record, config.data.prompt_column)
    if config.reward.function is not None:
        check_reward_function(config.reward.function)
    if config.reward.model is not None:
        check_reward_model(config.reward.model, fetch=False)
    check_model(config.model.name)


def check_prompts(config: RunConfig) -> PromptSet:
    """Templates, lengths, the held-out split, and whether prompt and completion fit the model; returns the prompts."""
    if config.reward.model is not None:
        check_reward_model(config.reward.model, fetch=True)
    prompts = PromptSet.load(config)
    _check_context(config, prompts)
    return prompts


def _check_engines(config: RunConfig) -> None:
    engines = {"generation.engine": config.generation.engine, "learner.engine": config.learner.engine}
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


def _check_context(config: RunConfig, prompts: PromptSet) -> None:
    model = json.loads((resolve(config.model.name) / "config.json").read_text())
    limit = model.get("max_position_embeddings")
    needed = prompts.longest + config.generation.max_new_tokens
    if isinstance(limit, int) and needed > limit:
        raise BadInput(
            f"the longest prompt has {prompts.longest} tokens and generation.max_new_tokens is "
            f"{config.generation.max_new_tokens}: {needed} together, but {config.model.name} holds {limit} "
            "(max_position_embeddings). Lower generation.max_new_tokens or data.max_prompt_tokens"
        )
