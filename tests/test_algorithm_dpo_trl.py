"""DPO and its variants against TRL 1.16 on the same tiny model and one batch of pairs: value and every gradient.

Here the whole way from completions to the loss: prompts and completions of different lengths, the model's own
log-probs, a reference that is another model. On tensors alone, and orpo, conservative and NLL: test_ops_preferences.

TRL's DPOTrainer and experimental CPOTrainer are built without their data loaders; the models are patched by TRL itself.
Both sides are in float32 and agree to 1e-5 of the largest gradient. Where the names or definitions differ:

- `sigmoid_length_norm` here is TRL's `sigmoid_norm`; `hinge` is its `hinge`, which has a reference; `slic_hinge` is the
  `hinge` of its CPOTrainer, which has none, without that trainer's added likelihood (`cpo_alpha` 0).
- `simpo`: TRL takes gamma / beta off the difference before it scales it by beta; the product is the same gamma.
- The learner divides the sum by the number of pairs, TRL takes the mean: the same on one process.

Not covered: TRL's trainers around the loss, precision below float32.
"""

import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.algorithms.table import build
from rlhf.buffer.offline import Completion, dataset_group
from rlhf.config import DpoConfig, ModelConfig
from rlhf.experience import Columns, Group, Prompt, fill_in
from rlhf.learner.collate import collate
from rlhf.learner.plan import units_of
from rlhf.models.load import load_model
from rlhf.models.policy import PolicyModel

trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer")
trl_cpo = pytest.importorskip("trl.experimental.cpo")
trl_utils = pytest.importorskip("trl.trainer.utils")

PAIRS = 4
NOISE, MARGIN = 0.2, 0.5
ALONE = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)

# ours: (beta, further keys, TRL's name); without a reference it is CPOTrainer's.
VARIANTS: dict[str, tuple[float, dict[str, float], str]] = {
    "sigmoid": (0.1, {}, "sigmoid"),
    "hinge": (0.1, {}, "hinge"),
    "ipo": (0.1, {}, "ipo"),
    "robust": (0.1, {"label_noise": NOISE}, "robust"),
    "sigmoid_length_norm": (0.1, {}, "sigmoid_norm"),
    "sppo_hard": (0.1, {}, "sppo_hard"),
    "slic_hinge": (0.05, {}, "hinge"),
    "simpo": (2.0, {"target_margin": MARGIN}, "simpo"),
}


def pairs() -> list[Group]:
    """Prompts of 2 to 9 tokens; chosen and rejected completions of 1 to 12, the chosen one stored second in one."""
    random = np.random.default_rng(1)
    groups = []
    for number in range(PAIRS):
        ids = random.integers(5, 320, random.integers(2, 10)).astype(np.int32)
        lengths = random.choice(np.arange(1, 13), 2, replace=False)
        answers = [random.integers(5, 320, length).astype(np.int32) for length in lengths]
        ranks = (1.0, 0.0) if number == 1 else (0.0, 1.0)
        completions = [
            Completion(answer, np.ones(len(answer), np.bool_), f"answer {i}", rank)
            for i, (answer, rank) in enumerate(zip(answers, ranks, strict=True))
        ]
        groups.append(dataset_group(Prompt(number, number, 0, "q", "q", ids, {}), completions))
    return groups


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The tiny model, and a reference that is not it."""
    policy = load_model(ModelConfig(name="tiny"), "float32")
    reference, random = copy.deepcopy(policy), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    return policy, reference


def by_us(name: str, policy: PreTrainedModel, reference: PreTrainedModel) -> Tensor:
    """The reference's column, the pairs, the policy's log-probs and the loss, divided as the learner does."""
    beta, keys, _ = VARIANTS[name]
    algorithm = build(DpoConfig.model_validate({"name": "dpo", "loss": {"name": name, "beta": beta, **keys}}))
    groups, frozen = pairs(), PolicyModel(reference, 512)
    groups = fill_in(groups, [column(frozen, group) for group in groups])
    batch, _ = algorithm.prepare(groups, {})
    collated = collate(units_of(batch.rows), sorted(batch.rows[0].tokens), packed=False)
    outputs = collated.outputs(*PolicyModel(policy, 512)(*collated.inputs))
    return algorithm.loss(outputs, collated.batch).loss / PAIRS


@torch.no_grad()
def column(frozen: PolicyModel, group: Group) -> Columns:
    """ref_logprobs of a group's samples, one sequence at a time."""
    said = []
    for sample in group.samples:
        ids = torch.from_numpy(np.append(group.prompt.token_ids, sample.token_ids).astype(np.int64))
        length = len(sample.token_ids)
        predictors = torch.arange(len(ids) - length - 1, len(ids) - 1)
        said.append(
            frozen(
                ids[None], torch.ones(1, len(ids), dtype=torch.int64), torch.arange(len(ids))[None], predictors,
                ids[-length:], torch.ones(length),
            )[0].numpy()
        )  # fmt: skip
    return Columns(group.prompt.id, {}, {"ref_logprobs": said})


def padded() -> dict[str, Tensor]:
    """The same pairs as TRL's collator lays them out: chosen rows, then rejected ones, padded on the right."""
    rows = [
        (group.prompt.token_ids, sample.token_ids)
        for rank in (0.0, 1.0)
        for group in pairs()
        for sample in group.samples
        if sample.scores["rank"] == rank
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, attended, completion = (torch.zeros(2 * PAIRS, width, dtype=torch.int64) for _ in range(3))
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.from_numpy(np.append(prompt, answer).astype(np.int64))
        attended[i, :end] = 1
        completion[i, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": attended, "completion_mask": completion}


def trainer_of(kind: type, settings: dict[str, Any]) -> Any:
    """A trainer of TRL without data, optimizer and process group."""
    made = object.__new__(kind)
    made.__dict__.update(settings)
    return made


def by_trl(name: str, policy: PreTrainedModel, reference: PreTrainedModel) -> Tensor:
    beta, _, theirs = VARIANTS[name]
    batch = padded()
    if name in ("slic_hinge", "simpo"):
        cpo = trainer_of(
            trl_cpo.CPOTrainer,
            {
                "loss_type": theirs, "beta": beta, "simpo_gamma": MARGIN, "label_smoothing": 0.0, "alpha": 0.0,
                "cpo_alpha": 0.0, "is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": 0,
                "accelerator": ALONE,
            },
        )  # fmt: skip
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        given = {}
        for side, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, None))):
            given[f"{side}_input_ids"] = batch["input_ids"][rows]
            given[f"{side}_attention_mask"] = batch["attention_mask"][rows]
            given[f"{side}_labels"] = labels[rows]
        loss: Tensor = cpo.get_batch_loss_metrics(policy, given)[0]
        return loss
    trl_utils.add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trl_utils.add_fused_lm_head(reference)
    dpo = trainer_of(
        trl_dpo.DPOTrainer,
        {
            "model": policy, "ref_model": reference, "accelerator": ALONE, "aux_loss_enabled": False, "ld_alpha": None,
            "precompute_ref_logps": False, "f_divergence_type": "reverse_kl", "loss_types": [theirs],
            "loss_weights": [1.0], "beta": beta, "label_smoothing": NOISE, "use_weighting": False, "_tp_size": 1,
            "_total_train_tokens": 0, "_metrics": defaultdict(lambda: defaultdict(list)),
            "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        },
    )  # fmt: skip
    loss = dpo._compute_loss(policy, batch, False)
    return loss


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_every_gradient_are_those_of_trl(name: str) -> None:
    """Four pairs, one of them stored with the rejected completion first; gradients of nothing would agree, too."""
    ours, reference = models()
    theirs, their_reference = copy.deepcopy(ours), copy.deepcopy(reference)
    mine, expected = by_us(name, ours, reference), by_trl(name, theirs, their_reference)
    assert mine.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    mine.backward()
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    assert largest > 1e-3
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None and gradients[key] is not None, key
        assert torch.allclose(parameter.grad, gradients[key], atol=1e-5 * max(1.0, largest)), key
