"""A critic that is a learner of its own learns what one would that takes turns with the policy, minibatch by minibatch.

In one process, torch. Its ranks in processes of their own: test_learner_deepspeed.py; on Ray, bitwise, and what follows
when one of them dies: test_run_end_to_end.py and test_recovery.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from actors import placement
from rlhf.algorithms.table import build
from rlhf.chaos.plan import Role
from rlhf.chaos.points import ROLE_VARIABLE
from rlhf.cli.preflight import check_cheaply
from rlhf.cluster import Cluster
from rlhf.config import RunConfig
from rlhf.errors import BadInput
from rlhf.experience import Group, TrainBatch, fill_in
from rlhf.learner.critic import CriticLearner
from rlhf.learner.learner import _Drawn
from rlhf.learner.paired import PairedLearner
from rlhf.learner.plan import units_of
from rlhf.metrics import Metrics, merge
from rlhf.ops.microbatch import LossSums
from rlhf.seeding import seed_for

EPOCHS, MINIBATCHES, STEPS = 2, 3, 3


@pytest.fixture
def make(tiny_run: Callable[..., RunConfig]) -> Callable[..., PairedLearner]:
    """A policy and its critic, with a factor to the policy's loss and one to the critic's."""

    def build_one(policy: Sequence[float], critic: Sequence[float]) -> PairedLearner:
        learner = {"epochs": EPOCHS, "minibatches": MINIBATCHES, "schedule": "linear"}
        ppo = {"name": "ppo", "samples_per_prompt": 4, "kl": {"coef": 0.0}, "critic": {"lr": 0.01}}
        plain = tiny_run({}, learner, {"num_steps": STEPS}, {})
        config = RunConfig.model_validate({**plain.model_dump(exclude_unset=True), "algorithm": ppo})
        algorithm = build(config.algorithm)
        made = algorithm._replace(loss=scaled(algorithm.loss, policy), value_loss=scaled(algorithm.value_loss, critic))
        learners = PairedLearner(config, made, 0, 1, None)
        learners.setup()
        return learners

    return build_one


def scaled(loss: Callable[..., LossSums], factors: Sequence[float]) -> Callable[..., LossSums]:
    """A loss that is multiplied by a factor of its own at each call."""
    left = iter(factors)

    def build_sums(outputs: Any, batch: Any) -> LossSums:
        sums = loss(outputs, batch)
        return sums._replace(loss=sums.loss * next(left))

    return build_sums


def ones() -> Iterator[float]:
    return itertools.repeat(1.0)


@pytest.fixture
def steps(sampled_groups: Callable[..., list[Group]]) -> list[list[Group]]:
    return [sampled_groups(step, 3, 4, step, 1.0) for step in range(STEPS)]


def prepared(learner: PairedLearner, groups: list[Group]) -> TrainBatch:
    return learner.prepare(fill_in(groups, learner.annotate_share(groups)))


def parameters(learner: PairedLearner) -> dict[str, Tensor]:
    assert learner.critic is not None
    engines = {"policy": learner.policy._engine, "critic": learner.critic._engine}
    return {
        f"{owner} {name}": parameter.detach().clone()
        for owner, engine in engines.items()
        for name, parameter in engine.policy.named_parameters()
    }


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Whose parameters differ: policy, critic."""
    return {name.split()[0] for name in one if not torch.equal(one[name], other[name])}


def turn_by_turn(learner: PairedLearner, batch: TrainBatch, step: int) -> Metrics:
    """An optimizer step of the policy, then one of the critic, for each minibatch: its units drawn and its step counted
    here, from the definition."""
    assert learner.critic is not None
    units, parts = units_of(batch.rows), [batch.metrics]
    for epoch in range(EPOCHS):
        order = np.random.Generator(np.random.PCG64(seed_for(1, "minibatch", step, epoch))).permutation(len(units))
        for number, members in enumerate(np.array_split(order, MINIBATCHES)):
            own = [units[i] for i in sorted(members)]
            done = step * EPOCHS * MINIBATCHES + epoch * MINIBATCHES + number
            parts.append(learner.policy._optimize([_Drawn(own, batch, learner.policy._loss, 1.0)], done))
            parts.append(learner.critic._optimize(own, batch, done))
    return merge(parts)


@pytest.mark.parametrize("order", ["policy first", "critic first"])
def test_the_order_in_which_policy_and_critic_learn_changes_no_bit(
    make: Callable[..., PairedLearner], steps: list[list[Group]], order: str
) -> None:
    """Against taking turns: parameters of both, advantages of all steps, metrics. Control: one step fewer."""
    apart, together = make(ones(), ones()), make(ones(), ones())
    assert apart.critic is not None
    seen = []
    for step, groups in enumerate(steps):
        batches = [prepared(learner, groups) for learner in (apart, together)]
        for mine, theirs in zip(batches[0].rows, batches[1].rows, strict=True):
            assert all(np.array_equal(mine.tokens[name], theirs.tokens[name]) for name in mine.tokens)
        both = [apart.policy, apart.critic]
        measured = merge(part.update(batches[0]) for part in (both if order == "policy first" else both[::-1]))
        expected = turn_by_turn(together, batches[1], step)
        together.policy._version = together.critic._version = step + 1
        assert {name: measured[name] for name in expected} == expected
        assert measured["value/lr"].value != 0.01 * (step + 1), "the schedule moves"
        seen.append(parameters(apart))
        assert not differing(seen[-1], parameters(together))
    assert apart.version == apart.critic.version == STEPS
    assert differing(seen[0], seen[1]) == {"policy", "critic"}


@pytest.mark.parametrize("struck", ["policy", "critic"])
def test_a_step_that_one_of_them_skips_is_not_skipped_by_the_other(
    make: Callable[..., PairedLearner], steps: list[list[Group]], struck: str
) -> None:
    """A gradient that is not finite in one minibatch: counted once, and the other learns as if nothing had happened.
    Their versions stay the same."""
    poison = itertools.chain([math.nan], ones())
    whole, hurt = make(ones(), ones()), make(*((poison, ones()) if struck == "policy" else (ones(), poison)))
    assert hurt.critic is not None
    batch = prepared(whole, steps[0])
    whole.update(batch)
    assert hurt.update(batch)["faults/nonfinite_step"].value == 1
    assert differing(parameters(whole), parameters(hurt)) == {struck}
    assert hurt.policy.version == hurt.critic.version == 1


def test_a_step_without_tokens_counts_for_both_and_moves_neither(
    make: Callable[..., PairedLearner], make_group: Callable[..., Group]
) -> None:
    learner = make(ones(), ones())
    assert learner.critic is not None
    before = parameters(learner)
    for rewards, length in (([None], 2), ([1.0, 1.0], 0)):  # no rows; rows without a token
        tokens = {"values": [[0.0] * length] * len(rewards), "old_logprobs": [[-1.0] * length] * len(rewards)}
        batch = learner.prepare([make_group(0, rewards, [length] * len(rewards), tokens, {})])
        assert learner.update(batch)["faults/empty_minibatch"].value
    assert not differing(before, parameters(learner))
    assert learner.policy.version == learner.critic.version == 2


def test_only_an_algorithm_with_a_critic_has_one(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """And a checkpoint of one without says so to a critic."""
    config = tiny_run({}, {}, {}, {})
    plain = PairedLearner(config, build(config.algorithm), 0, 1, None)
    assert plain.critic is None
    with pytest.raises(TypeError, match=r"algorithm\.name=rloo has no critic"):
        CriticLearner(config, build(config.algorithm), 0, 1, None)
    plain.setup()
    plain.save(tmp_path)
    assert not (tmp_path / "trainer" / "critic").exists()
    ppo = RunConfig.model_validate({**config.model_dump(exclude_unset=True), "algorithm": {"name": "ppo"}})
    critic = CriticLearner(ppo, build(ppo.algorithm), 0, 1, None)
    critic.setup()
    with pytest.raises(BadInput, match="was saved by another algorithm: it has no critic/"):
        critic.load(tmp_path)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"critic": {"replicas": 2}}, r"critic\.replicas=2, but learner\.engine=torch trains in one process"),
        ({"trainer": {"gpus": 0.5}}, r"critic\.gpus=0 while trainer\.gpus=0\.5"),
    ],
)
def test_a_cluster_file_that_does_not_fit_a_critic_is_refused_where_there_is_one(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, cluster: dict[str, Any], message: str
) -> None:
    """Before anything starts; a run without a critic takes the same file."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "reward.py").write_text("def one(prompts, completions, **columns):\n    return [1.0]\n")
    plain = tiny_run({}, {}, {}, {}).model_dump(exclude_unset=True)
    plain["data"] = {"path": str(tmp_path / "rows.jsonl")}
    plain["reward"] = {"function": f"{tmp_path / 'reward.py'}:one"}
    check_cheaply(RunConfig.model_validate(plain), Cluster.model_validate(cluster))
    ppo = RunConfig.model_validate({**plain, "algorithm": {"name": "ppo"}})
    check_cheaply(ppo, Cluster())
    with pytest.raises(BadInput, match=message):
        check_cheaply(ppo, Cluster.model_validate(cluster))


def test_the_processes_of_each_role_can_be_told_apart() -> None:
    """By the name in their environment, which a chaos file uses."""
    cluster = Cluster()
    roles = cluster.roles
    assert {"driver", *roles} == set(get_args(Role)) and "critic" in roles
    for name, role in roles.items():
        assert placement.options(cluster, name, role)["runtime_env"]["env_vars"][ROLE_VARIABLE] == name
