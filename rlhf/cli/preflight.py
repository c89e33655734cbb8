"""Everything that can be wrong with a run's inputs, found before anything heavy starts.

`check_cheaply` imports neither torch nor ray nor transformers and takes a second or two; `check_prompts` needs the
tokenizer, so the model is fetched or built first. Both raise BadInput."""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

from rlhf.cli.preflight_rows import check_columns, check_reward, usable_rows
from rlhf.cluster import Cluster
from rlhf.colocation import OFFLOADING_STAGE, no_offload, no_sleep, turn_takers
from rlhf.config import OffPolicyCorrected, PpoConfig, RunConfig
from rlhf.data.examples import read_examples
from rlhf.data.prompts import PromptSet
from rlhf.data.records import load_rows
from rlhf.errors import BadInput
from rlhf.generation.tensor_parallel import check_divisible, check_engine
from rlhf.models.resolve import check_model, is_encoder_decoder, read_config
from rlhf.models.score_head import check_language_model, check_reward_model
from rlhf.passes import needs_old_logprobs
from rlhf.planning.placement import placed_roles
from rlhf.planning.shapes import BUILT_CONFIGS
from rlhf.storage import Storage

if TYPE_CHECKING:
    from rlhf.data.recorded import RecordedSet
    from rlhf.team import Prompts

CRITIC_INIT = "algorithm.critic.init"


def check_cheaply(config: RunConfig, cluster: Cluster) -> None:
    """Engines, cluster file against run file, the rows' columns, reward function or model, the model's files."""
    _check_engines(config)
    _check_kernels(config, cluster)
    _check_sleep(config, cluster)
    _check_environment(config, cluster)
    if cluster.storage.address is not None:
        Storage(cluster.storage.address)  # refuses what it cannot open
    check_model(config.model.name)
    check_settings(config, cluster)


def check_settings(config: RunConfig, cluster: Cluster) -> None:
    """The part that any machine can check, whatever is installed on it: cluster file against run file, the rows'
    columns, reward function or model, the settings against the kind of model. Reads config.json of the model."""
    _check_cluster(config, cluster)
    _check_turns(config, cluster)
    rows = usable_rows(config)
    if config.mix is not None and config.mixed_records is not None:
        try:
            read_examples(load_rows(config.mix.data), config.mix.data, config.mixed_records)
        except BadInput as error:
            raise BadInput(f"mix: {error}") from error
    check_columns(config, rows)
    if config.reward is not None:
        check_reward(config.reward, rows)
    if isinstance(config.algorithm, PpoConfig) and config.algorithm.critic.init != "policy":
        check_reward_model(config.algorithm.critic.init, CRITIC_INIT, fetch=False)
    if config.algorithm.name not in ("reward_model", "pairwise_ranker"):
        check_language_model(config.model.name, "model.name")
    if is_encoder_decoder(config.model.name):
        _check_encoder_decoder(config)
    _check_off_policy(config)
    _check_room_for_prompts(config)
    _check_tensor_parallel(config, cluster)


def check_train_only(config: RunConfig, cluster: Cluster, record: "RecordedSet", sampled_by: RunConfig) -> None:
    """What is left to check where another run has sampled and judged: neither data nor reward nor engine is needed."""
    from rlhf.blueprint import draw  # loads torch
    from rlhf.models.load import load_tokenizer

    place = "--train-only"
    if config.records != "prompts" or config.mix is not None:
        what = "mix" if config.mix is not None else f"algorithm.name={config.algorithm.name}"
        raise BadInput(
            f"{place}: {what} reads rows of data, and no record has them; expected an algorithm that samples"
        )
    _check_installed("learner.engine", config.learner.engine)
    _check_kernels(config, cluster)
    _check_cluster(config, cluster)
    if cluster.storage.address is not None:
        Storage(cluster.storage.address)
    check_model(config.model.name)
    if is_encoder_decoder(config.model.name):
        _check_encoder_decoder(config)
    record.check(config, draw(config).judged)
    scorers = _scorers(config)
    _check_models(config, {key: name for key, name in scorers.items() if key == CRITIC_INIT})
    names, trusted = (config.model.name, sampled_by.model.name), config.model.trust_remote_code
    if names[0] != names[1]:
        ours, theirs = (load_tokenizer(name, trust_remote_code=trusted).get_vocab() for name in names)
        if ours != theirs:
            raise BadInput(
                f"{place}: it was sampled with {names[1]}, whose tokenizer is not that of model.name={names[0]}; "
                "expected a model with the same tokens"
            )


def check_generate_only(config: RunConfig, steps: int) -> None:
    """Whether samples of so many steps ahead could all be trained on."""
    place, allowed = f"--generate-only {steps}", min(config.loop.max_staleness + 1, config.loop.num_steps)
    if config.records != "prompts":
        raise BadInput(f"{place}: algorithm.name={config.algorithm.name} learns from data and samples nothing")
    if not 1 <= steps <= allowed:
        raise BadInput(
            f"{place}: loop.max_staleness={config.loop.max_staleness} and loop.num_steps={config.loop.num_steps} let "
            f"one policy sample for {allowed} steps; expected 1 to {allowed}, or a higher loop.max_staleness"
        )


def check_prompts(config: RunConfig) -> "Prompts":
    """Templates, lengths, the held-out split, and whether prompt and completion fit the model; returns the prompts, or
    the preferences or demonstrations."""
    _check_models(config, _scorers(config))
    if config.mix is not None:
        from rlhf.data.mixed import MixedSet

        prompts: Prompts = MixedSet.load(config)
    elif config.records == "prompts":
        prompts = PromptSet.load(config)
    else:
        from rlhf.data.offline import OfflineSet

        prompts = OfflineSet.load(config)
    _check_context(config, prompts)
    return prompts


def _check_models(config: RunConfig, scorers: Mapping[str, str]) -> None:
    """Fetches the models of a run; the code that they may bring, and their scalar heads."""
    from rlhf.models.own_code import check_own_code, check_readable

    for key, name in scorers.items():
        check_reward_model(name, key, fetch=True)
    for key, name in {"model.name": config.model.name, **scorers}.items():
        check_own_code(name, key, trust_remote_code=config.model.trust_remote_code)
        check_readable(name, key, trust_remote_code=config.model.trust_remote_code)


def _scorers(config: RunConfig) -> dict[str, str]:
    """The models with a scalar head that the run reads, by their keys."""
    found = {}
    for key, source in config.reward.sources().items() if config.reward is not None else ():
        if source.model is not None:
            found[f"{key}.model"] = source.model
        if source.ranker is not None:
            found[f"{key}.ranker.model"] = source.ranker.model
    if isinstance(config.algorithm, PpoConfig) and config.algorithm.critic.init != "policy":
        found[CRITIC_INIT] = config.algorithm.critic.init
    return found


def _check_engines(config: RunConfig) -> None:
    engines: dict[str, str] = {"learner.engine": config.learner.engine}
    if config.generation is not None:
        engines["generation.engine"] = config.generation.engine
    for key, engine in engines.items():
        _check_installed(key, engine)


def _check_installed(key: str, engine: str) -> None:
    if importlib.util.find_spec(engine) is None:
        other = "transformers" if engine == "vllm" else "torch"
        raise BadInput(f"{key}={engine}: the package {engine} is not installed. Next: make install, or {key}={other}")


def _check_kernels(config: RunConfig, cluster: Cluster) -> None:
    """What some settings need and the lock does not have: packages, a GPU."""
    lora = config.model.lora
    if config.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise BadInput(
            "model.attention=flash_attention_2: the package flash_attn, which needs an NVIDIA GPU, is not installed. "
            "Next: install it, or model.attention=sdpa"
        )
    if lora is not None and lora.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(
            "model.lora.base=nf4: the package bitsandbytes, which holds the base in 4 bits, is not installed. "
            "Next: pip install bitsandbytes, or model.lora.base=plain"
        )
    if lora is not None and lora.base == "nf4" and not cluster.trainer.gpus and shutil.which("nvidia-smi") is None:
        raise BadInput(
            "model.lora.base=nf4 needs an NVIDIA GPU: this machine has none (no nvidia-smi), and the cluster file "
            "gives the trainer none (trainer.gpus=0). Expected a cluster file with GPUs, or model.lora.base=plain"
        )


def _check_environment(config: RunConfig, cluster: Cluster) -> None:
    """A variable of vLLM's that would go before the run file without a word."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if config.generation is not None and config.generation.engine == "vllm" and space and not cluster.rollout.gpus:
        raise BadInput(
            f"the environment has VLLM_CPU_KVCACHE_SPACE={space}, which vLLM takes in place of generation.cache_gib="
            f"{config.generation.cache_gib:g}. Next: unset it, and set generation.cache_gib"
        )


def _check_encoder_decoder(config: RunConfig) -> None:
    name = config.model.name
    if config.generation is not None and config.generation.engine == "vllm":
        raise BadInput(
            f"generation.engine=vllm: {name} is an encoder-decoder, which vLLM cannot sample; expected transformers"
        )
    if config.learner.packing:
        raise BadInput(
            f"learner.packing: {name} is an encoder-decoder, whose encoder would see all packed prompts at once; "
            "expected false"
        )
    if config.algorithm.name == "ppo":
        raise BadInput(
            f"algorithm.name=ppo: {name} is an encoder-decoder; the critic would have read the answer in its encoder "
            "before it says what to expect. Expected rloo, or another algorithm without a critic"
        )
    if config.algorithm.name == "pairwise_ranker":
        raise BadInput(
            f"algorithm.name=pairwise_ranker: {name} is an encoder-decoder, and rankers read prompt and answers as one "
            "text; expected a decoder-only model"
        )


def _check_off_policy(config: RunConfig) -> None:
    algorithm = config.algorithm
    if not isinstance(algorithm, OffPolicyCorrected) or needs_old_logprobs(config):
        return
    if algorithm.off_policy.reject != "none":
        raise BadInput(
            f"algorithm.off_policy.reject={algorithm.off_policy.reject} would do nothing: all samples are fresh, with "
            "loop.max_staleness=0 and one optimizer step a step. Expected none, or algorithm.off_policy.fresh_too=true"
        )


def _check_cluster(config: RunConfig, cluster: Cluster) -> None:
    has_critic = isinstance(config.algorithm, PpoConfig)
    trained = {"trainer": cluster.trainer, **({"critic": cluster.critic} if has_critic else {})}
    for name, role in trained.items():
        if config.learner.engine == "torch" and role.replicas > 1:
            raise BadInput(
                f"cluster file: {name}.replicas={role.replicas}, but learner.engine=torch trains in one process; "
                "expected 1, or learner.engine=deepspeed"
            )
    if has_critic and cluster.trainer.gpus and not cluster.critic.gpus:
        raise BadInput(
            f"cluster file: critic.gpus=0 while trainer.gpus={cluster.trainer.gpus:g}: the critic, a model as large as "
            "the policy, would be trained on CPUs. Expected a section critic with GPUs"
        )


def _check_turns(config: RunConfig, cluster: Cluster) -> None:
    """What taking turns on GPUs rules out: work for a later step beside training, and stages of ZeRO."""
    takers = _turn_takers(config, cluster)
    if not takers:
        return
    place = f"cluster file: colocation of {', '.join(sorted(takers))}"
    if config.generation is not None and config.generation.weights_mid_sequence:
        raise BadInput(
            f"generation.weights_mid_sequence=true: {place}: engines that take turns with the trainer have nothing in "
            "flight when weights come; expected false, or a cluster file without colocation"
        )
    if config.loop.max_staleness:
        raise BadInput(
            f"loop.max_staleness={config.loop.max_staleness}: {place}: who takes turns cannot sample for a later step "
            "while this one is trained; expected 0, or a cluster file without colocation"
        )
    if config.learner.engine == "deepspeed" and config.learner.zero_stage != OFFLOADING_STAGE:
        raise BadInput(no_offload(config.learner.zero_stage))


def _check_sleep(config: RunConfig, cluster: Cluster) -> None:
    """vLLM's CPU build has no sleep mode. What is installed here is taken for what is installed on the other nodes."""
    vllm = config.generation is not None and config.generation.engine == "vllm"
    if vllm and "rollout" in _turn_takers(config, cluster) and not list(distributions(name="vllm")):
        raise BadInput(no_sleep("the CPU build of vLLM (vllm-cpu) is installed"))


def _turn_takers(config: RunConfig, cluster: Cluster) -> frozenset[str]:
    return turn_takers(cluster, {placed.role: placed.settings for placed in placed_roles(config, cluster)})


def config_of(name: str) -> Mapping[str, Any]:
    """config.json of a model, also of one that is built on the spot and need not be there yet. Raises BadInput."""
    return BUILT_CONFIGS.get(name) or read_config(name)


def _check_tensor_parallel(config: RunConfig, cluster: Cluster) -> None:
    parts, name = cluster.rollout.tensor_parallel, config.model.name
    if parts == 1 or config.generation is None:
        return
    check_engine(config.generation.engine, parts)
    check_divisible(config_of(name), name, parts)


def _check_room_for_prompts(config: RunConfig) -> None:
    """What is certain before a prompt is counted; `_check_context` knows the longest one."""
    limit = config_of(config.model.name).get("max_position_embeddings")
    if config.generation is None or not isinstance(limit, int):
        return
    if config.generation.max_new_tokens >= limit:
        raise BadInput(
            f"generation.max_new_tokens={config.generation.max_new_tokens} leaves no room for a prompt: "
            f"{config.model.name} holds {limit} tokens in all (max_position_embeddings). Lower it"
        )


def _check_context(config: RunConfig, prompts: "Prompts") -> None:
    limit = config_of(config.model.name).get("max_position_embeddings")
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
