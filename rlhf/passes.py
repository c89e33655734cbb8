"""Which passes of a model a run makes beside those that train, told from its run file alone. Imports no torch."""

from rlhf.config import (
    DpoConfig,
    OffPolicyCorrected,
    OnlineConfig,
    OnlineDpoConfig,
    PpoConfig,
    RsoConfig,
    RunConfig,
)


def needs_old_logprobs(config: RunConfig) -> bool:
    """Whether samples are trained under weights other than those that sampled them: stale, or in several optimizer
    steps, or fresh ones are to be corrected, too. Rows of the data were not sampled by any, and a preference loss has
    no importance ratio: what it does in several steps needs none. PPO prices and clips against its own log-probs
    always."""
    if config.records != "prompts":
        return False
    if isinstance(config.algorithm, PpoConfig):
        return True
    if isinstance(config.algorithm, OffPolicyCorrected) and config.algorithm.off_policy.fresh_too:
        return True
    steps = config.learner.epochs * config.learner.minibatches
    has_ratio = not isinstance(config.algorithm, OnlineDpoConfig | RsoConfig)
    return config.loop.max_staleness > 0 or (steps > 1 and has_ratio)


def needs_reference(config: RunConfig) -> bool:
    """Whether the loss or the reward compares with a frozen model; with LoRA that is the policy without its adapter."""
    algorithm = config.algorithm
    if isinstance(algorithm, OnlineConfig):
        return algorithm.kl.coef > 0
    if isinstance(algorithm, RsoConfig):
        return algorithm.loss.has_reference and algorithm.reference == "frozen"
    return isinstance(algorithm, DpoConfig | OnlineDpoConfig) and algorithm.loss.has_reference
