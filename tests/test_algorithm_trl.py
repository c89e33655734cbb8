"""GRPO and RLOO against TRL 1.16, which is an independent implementation: advantages, loss and gradient to 1e-5.

TRL's own trainers sample from the tiny model and judge; the same completions then go through this project's `prepare`,
micro-batches and `loss`. Where the definitions differ, both are brought to the common case:

- TRL's GRPO divides by the unbiased standard deviation plus 1e-4, so `scale: unbiased_std`, `std_eps: 1e-4`; the
  default here is the biased one.
- A completion that no judge can score keeps its row in TRL, with advantage 0: it counts in the divisor and pays the KL
  loss. Here it leaves the batch. Advantages of the others agree; losses are compared where all can be scored.
- TRL multiplies its k3 by the ratio rho WITH its gradient (`use_bias_correction_kl`, which is on by default). The value
  is the same on fresh samples, the gradient is not: rho k3 has that of the reverse KL, the paper's plain k3 (Eq 3) that
  of the forward KL. Here the paper's is the default, so the option is off; `kl.loss_estimator: k2` has the reverse one.
  With it off TRL's KL has no importance weight, here it has the token's detached ratio: the two agree where samples are
  fresh, so KL and clipping are compared separately.
- TRL averages the means of gradient-accumulation steps, here the sum is divided once: one step is compared.

Not covered: several processes, vLLM's importance sampling in TRL.
"""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rlhf.algorithms.table import build
from rlhf.config import GrpoConfig, ModelConfig, RlooConfig
from rlhf.experience import Group, Prompt, Sample, Sampling
from rlhf.models.load import load_model, load_tokenizer
from rlhf.models.policy import PolicyModel

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": "say a"}] * 4 + [{"prompt": "what is it"}] * 4
SCORABLE = [1.0, 0.0, 0.0, 0.5, 2.0, 4.0, 1.0, 1.5]
WITH_NONE = [1.0, 0.0, 0.0, 0.5, 2.0, None, 1.0, 1.5]
LIMIT, TEMPERATURE = 8, 0.7


class Judge:
    """A reward function of TRL that says what it is told to say."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.says: Sequence[float | None] = SCORABLE

    def __call__(self, prompts, completions, **columns):
        return list(self.says)


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL's two trainers on the tiny model, and the judge that they ask."""
    from datasets import Dataset
    from trl import GRPOConfig as TrlGrpo
    from trl import GRPOTrainer, RLOOTrainer
    from trl import RLOOConfig as TrlRloo

    judge, tokenizer = Judge(), load_tokenizer("tiny", trust_remote_code=False)
    common = {
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": len(PROMPTS),
        "num_generations": 4,
        "max_completion_length": LIMIT,
        "temperature": TEMPERATURE,
        "seed": 0,
    }

    def trainer(kind, settings):
        made = kind(
            model=load_model(ModelConfig(name="tiny"), "float32"),
            reward_funcs=judge,
            args=settings,
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=tokenizer,
        )
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made

    grpo = trainer(GRPOTrainer, TrlGrpo(beta=0.04, use_bias_correction_kl=False, **common))
    rloo = trainer(RLOOTrainer, TrlRloo(beta=0.05, normalize_advantages=False, **common))
    return judge, grpo, rloo


def sampled(trainer, judge, scores, *, nudged_reference):
    """What TRL sampled, as a dict; its reference is moved a little, or the KL would be 0."""
    judge.says = scores
    torch.manual_seed(1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in trainer.ref_model.parameters() if nudged_reference else ():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return trainer._generate_and_score_completions(copy.deepcopy(PROMPTS))


def groups_of(out, scores, tokens):
    """TRL's samples as two groups, with token columns (B, T) by name."""
    groups = []
    for prompt_id, start in enumerate((0, 4)):
        ids = out["prompt_ids"][start][out["prompt_mask"][start].bool()].numpy().astype(np.int32)
        samples = []
        for index, row in enumerate(range(start, start + 4)):
            kept = out["completion_mask"][row].bool()
            columns = {name: column[row][kept].detach().numpy().astype(np.float32) for name, column in tokens.items()}
            length = int(kept.sum())
            behavior = columns.get("old_logprobs", np.full(length, -1.0, np.float32))
            samples.append(
                Sample(
                    index=index,
                    token_ids=out["completion_ids"][row][kept].numpy().astype(np.int32),
                    loss_mask=np.ones(length, np.bool_),
                    text="",
                    finish_reason="stop",
                    behavior_logprobs=behavior,
                    versions=np.zeros(length, np.int32),
                    sampling=Sampling(TEMPERATURE, 1.0, 0, LIMIT),
                    seed=None,
                    scores={"reward": scores[row]},
                    tokens=columns,
                )
            )
        groups.append(Group(Prompt(prompt_id, prompt_id, 0, "", "", ids, {}), tuple(samples), "policy"))
    return groups


def our_loss_and_gradient(model, algorithm, batch, divided_loss):
    """Log-probabilities from this project's policy model over TRL's weights, one row at a time, then the learner's
    division."""
    policy = PolicyModel(model, 512)
    logprobs = []
    for row in batch.rows:
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
        length = len(row.completion_ids)
        predictors = torch.arange(len(row.prompt_ids) - 1, len(ids) - 1)
        logprobs.append(
            policy(
                ids[None],
                torch.ones(1, len(ids), dtype=torch.int64),
                torch.arange(len(ids))[None],
                predictors,
                ids[-length:],
                torch.full((length,), row.temperature),
            )[0]
        )
    loss, _ = divided_loss(algorithm, batch, logprobs, 40, 1)
    model.zero_grad()
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()}


def trl_loss_and_gradient(trainer, out):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, out)
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def agree(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys()
    assert max(float(g.abs().max()) for g in one[1].values()) > 1e-2, "a gradient of nothing would agree with anything"
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("scores", [SCORABLE, WITH_NONE])
@pytest.mark.parametrize(("scale", "theirs"), [("unbiased_std", "group"), ("none", "none")])
def test_grpo_advantages(trl, scores, scale, theirs):
    """Scaled and not; with a None the advantages of the others are the same, and here its row is gone."""
    judge, trainer, _ = trl
    trainer.scale_rewards = theirs
    out = sampled(trainer, judge, scores, nudged_reference=False)
    algorithm = build(GrpoConfig(name="grpo", scale=scale, kl={"coef": 0.0}))
    batch, _ = algorithm.prepare(groups_of(out, scores, {}), {})
    expected = [a for a, s in zip(out["advantages"].tolist(), scores, strict=True) if s is not None]
    assert [float(row.tokens["advantages"][0]) for row in batch.rows] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scores", [SCORABLE, WITH_NONE])
def test_rloo_advantages(trl, scores):
    """With the KL in the reward, before the baseline, in both. TRL does not hand its reference's log-probs out, so they
    are computed from its reference here."""
    judge, _, trainer = trl
    out = sampled(trainer, judge, scores, nudged_reference=True)
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
    attended = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
    width = out["completion_ids"].shape[1]
    with torch.no_grad():
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        logits = trainer.ref_model(ids, attention_mask=attended, position_ids=positions).logits[:, -width - 1 : -1]
        reference = (logits / TEMPERATURE).log_softmax(-1).gather(2, out["completion_ids"][:, :, None])[:, :, 0]
        logits = trainer.model(ids, attention_mask=attended, position_ids=positions).logits[:, -width - 1 : -1]
        old = (logits / TEMPERATURE).log_softmax(-1).gather(2, out["completion_ids"][:, :, None])[:, :, 0]
    algorithm = build(RlooConfig(name="rloo", kl={"coef": 0.05}))
    batch, _ = algorithm.prepare(groups_of(out, scores, {"ref_logprobs": reference, "old_logprobs": old}), {})
    expected = [a for a, s in zip(out["advantages"].tolist(), scores, strict=True) if s is not None]
    ours = [float(row.tokens["advantages"][0]) for row in batch.rows]
    assert ours == pytest.approx(expected, abs=1e-5)
    plain, _ = build(RlooConfig(name="rloo", kl={"coef": 0.0})).prepare(groups_of(out, scores, {}), {})
    assert ours != pytest.approx([float(row.tokens["advantages"][0]) for row in plain.rows], abs=1e-4)


@pytest.mark.parametrize(
    ("aggregation", "theirs"),
    [("sequence_mean", "grpo"), ("constant", "dr_grpo"), ("token_mean", "bnpo"), ("sequence_sum", "luspo")],
)
def test_grpo_loss_with_kl_on_fresh_samples(trl, divided_loss, aggregation, theirs):
    """Value and the gradient of every parameter; ratio 1, k3 loss with beta .04, four aggregations."""
    judge, trainer, _ = trl
    trainer.scale_rewards, trainer.loss_type, trainer.beta = "group", theirs, 0.04
    out = sampled(trainer, judge, SCORABLE, nudged_reference=True)
    algorithm = build(GrpoConfig(name="grpo", scale="unbiased_std", aggregation=aggregation))
    batch, _ = algorithm.prepare(groups_of(out, SCORABLE, {"ref_logprobs": out["ref_per_token_logps"]}), {})
    expected = trl_loss_and_gradient(trainer, out)
    agree(our_loss_and_gradient(trainer.model, algorithm, batch, divided_loss), expected)


@pytest.mark.parametrize("dual", [None, 1.5])
def test_grpo_loss_with_clipping(trl, divided_loss, dual):
    """Old log-probs half a nat off, both ways: tokens above, below and (dual) far above the band. No KL."""
    judge, trainer, _ = trl
    trainer.scale_rewards, trainer.loss_type, trainer.beta, trainer.args.delta = "group", "grpo", 0.0, dual
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 0.28
    out = sampled(trainer, judge, SCORABLE, nudged_reference=False)
    with torch.no_grad():
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        attended = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        width = out["completion_ids"].shape[1]
        said = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, width)[0]
        old = said + 0.5 * torch.randn(said.shape, generator=torch.Generator().manual_seed(3))
    clip = {"low": 0.2, "high": 0.28, "dual": dual}
    algorithm = build(GrpoConfig(name="grpo", scale="unbiased_std", kl={"coef": 0.0}, clip=clip))
    batch, _ = algorithm.prepare(groups_of(out, SCORABLE, {"old_logprobs": old}), {})
    expected = trl_loss_and_gradient(trainer, {**out, "old_per_token_logps": old})
    agree(our_loss_and_gradient(trainer.model, algorithm, batch, divided_loss), expected)
    trainer.args.delta = None
