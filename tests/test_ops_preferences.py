"""Preference losses: golden numbers, invariances, and TRL 1.16's trainers on the same tensors.

Where TRL defines something else:
- its `hinge` is ours (with reference); SLiC's has none;
- `ipo` and `sigmoid_norm` count the mask before the shift: the same behind a prompt;
- `label_smoothing` does not apply to its `sigmoid`: cDPO is compared through `aot` on one pair, where sorting does
  nothing;
- its `sft` term is the mean over all chosen tokens of a batch, ours of each completion first: equal on one pair;
- its experimental ORPO adds the ratio term to a loss of the whole prompt: only the ratio term is compared.
Not covered: how log-probabilities are made (test_ops_logprobs).
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from rlhf.ops import preferences as p

# G-PREF
L_W, L_L, A, B, N_W, N_L = (torch.tensor([x], dtype=torch.float64) for x in (-10.0, -15.0, 2.0, -1.0, 4.0, 5.0))
ZERO = torch.zeros(1, dtype=torch.float64)

LOSSES = {
    "sigmoid": lambda a, b, n, m: p.sigmoid(a, b, 0.1),
    "hinge": lambda a, b, n, m: p.hinge(a, b, 0.1),
    "ipo": lambda a, b, n, m: p.ipo(a, b, n, m, 0.1),
    "conservative": lambda a, b, n, m: p.conservative(a, b, 0.1, 0.1),
    "robust": lambda a, b, n, m: p.robust(a, b, 0.1, 0.1),
    "sppo_hard": lambda a, b, n, m: p.sppo_hard(a, b, 0.1),
    "sigmoid_length_norm": lambda a, b, n, m: p.sigmoid_length_norm(a, b, n, m, 0.1),
}
FREE = {
    "slic_hinge": lambda a, b, n, m: p.slic_hinge(a, b, 1.0),
    "simpo": lambda a, b, n, m: p.simpo(a, b, n, m, 2.0, 0.5),
    "orpo": lambda a, b, n, m: p.orpo(a, b, n, m, 0.1),
}


@pytest.mark.parametrize(
    ("name", "golden", "at_reference"),
    [
        ("sigmoid", 0.55436, math.log(2)),
        ("hinge", 0.7, 1.0),
        ("ipo", 18.49, 25.0),
        ("conservative", 0.58436, math.log(2)),
        ("robust", 0.51686, math.log(2)),
        ("sppo_hard", 25.0, 50.0),
        ("sigmoid_length_norm", 0.65876, math.log(2)),
    ],
)
def test_golden_numbers_and_the_value_at_the_reference(name: str, golden: float, at_reference: float) -> None:
    """G-PREF (trap 31: IPO of sums would be 4.0), and what each loss is while policy and reference are the same."""
    assert LOSSES[name](A, B, N_W, N_L).item() == pytest.approx(golden, abs=1e-5)
    assert LOSSES[name](ZERO, ZERO, N_W, N_L).item() == pytest.approx(at_reference, abs=1e-12)


def test_golden_numbers_without_a_reference() -> None:
    """G-PREF for SLiC (L_l = -10.5), SimPO and ORPO."""
    assert FREE["slic_hinge"](L_W, torch.tensor([-10.5]).double(), N_W, N_L).item() == pytest.approx(0.5)
    assert FREE["simpo"](L_W, L_L, N_W, N_L).item() == pytest.approx(0.47408, abs=1e-5)
    assert FREE["orpo"](L_W, L_L, N_W, N_L).item() == pytest.approx(2.54612, abs=1e-5)


def test_slic_hinge_is_its_papers_margin_form_in_units_of_the_margin() -> None:
    """max(0, delta - L_w + L_l) = delta max(0, 1 - (L_w - L_l) / delta), on both sides of the kink."""
    chosen, rejected, delta = torch.tensor([-10.0, -10.0]), torch.tensor([-11.5, -13.0]), 2.0
    assert (delta * p.slic_hinge(chosen, rejected, 1 / delta)).tolist() == pytest.approx([0.5, 0.0])


def test_dpo_gradient_weight() -> None:
    """-beta sigma(-beta h) in a and its negative in b: .04256 at G-PREF."""
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    p.sigmoid(a, b, 0.1).sum().backward()
    assert (a.grad.item(), b.grad.item()) == (pytest.approx(-0.04256, abs=1e-5), pytest.approx(0.04256, abs=1e-5))


def test_swapping_a_pair_flips_h() -> None:
    """Losses of h alone: l(h) - l(-h) = -beta h where the loss is -log sigma, twice -beta h at the hinge's slope."""
    forth, back = p.sigmoid(A, B, 0.1), p.sigmoid(B, A, 0.1)
    assert (forth - back).item() == pytest.approx(-0.3)
    assert (p.hinge(A, B, 0.1) - p.hinge(B, A, 0.1)).item() == pytest.approx(-0.6)
    assert (p.robust(A, B, 0.1, 0.2) - p.robust(B, A, 0.1, 0.2)).item() == pytest.approx(-0.3 / 0.6)
    assert (p.conservative(A, B, 0.1, 0.2) - p.conservative(B, A, 0.1, 0.2)).item() == pytest.approx(-0.3 * 0.6)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_robust_loss_averaged_over_flipped_labels_is_the_clean_loss(noise: float) -> None:
    """By enumeration over the two labels, for several h; the conservative loss is not, which is the control."""
    a, b = torch.linspace(-30, 30, 7, dtype=torch.float64), torch.linspace(8, -3, 7, dtype=torch.float64)
    clean = p.sigmoid(a, b, 0.3)
    for loss, holds in ((p.robust, True), (p.conservative, noise == 0)):
        average = (1 - noise) * loss(a, b, 0.3, noise) + noise * loss(b, a, 0.3, noise)
        assert torch.allclose(average, clean, atol=1e-9) == holds


def test_robust_refuses_labels_that_say_nothing() -> None:
    """At one half the denominator is 0."""
    with pytest.raises(ValueError, match=r"label_noise is 0\.5"):
        p.robust(A, B, 0.1, 0.5)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_length_norm", "simpo", "orpo"])
def test_doubled_lengths_at_the_same_means_change_nothing(name: str) -> None:
    """Traps 31 and 45. The plain sigmoid does change: the control."""
    loss = {**LOSSES, **FREE}[name]
    assert torch.equal(loss(-A.abs(), B, N_W, N_L), loss(-2 * A.abs(), 2 * B, 2 * N_W, 2 * N_L))
    assert p.sigmoid(A, B, 0.1) != p.sigmoid(2 * A, 2 * B, 0.1)


@pytest.mark.parametrize("name", [*LOSSES, *FREE])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_long_completions_stay_finite(name: str, sign: float) -> None:
    """Trap 32: 4096 tokens that left the reference by 10 nats each, in float32: loss and gradient finite."""
    a = torch.tensor([-40960.0 * (1 if name in FREE else sign)], requires_grad=True)
    b = torch.tensor([-1.0 if name in FREE else 40960.0 * sign], requires_grad=True)
    n = torch.tensor([4096.0])
    loss = {**LOSSES, **FREE}[name](a, b, n, n)
    loss.sum().backward()
    assert all(bool(torch.isfinite(x).all()) for x in (loss, a.grad, b.grad))


def test_empty_completions_and_certain_ones_stay_finite() -> None:
    """Length 0, and a mean log-probability of exactly 0, whose odds are infinite."""
    for loss in (*LOSSES.values(), *FREE.values()):
        a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        loss(a, b, torch.zeros(1), torch.zeros(1)).sum().backward()
        assert bool(torch.isfinite(a.grad).all()) and bool(torch.isfinite(b.grad).all())


# --- TRL


def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs (2 count, 9) of policy and reference, chosen rows first, and masks of uneven lengths."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(9) < torch.randint(1, 10, (2 * count, 1), generator=generator)
    policy, reference = (-3 * torch.rand(2 * count, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    return policy * mask, reference * mask, mask


def by_trl(name: str, policy: Tensor, reference: Tensor, mask: Tensor, noise: float) -> Tensor:
    """DPOTrainer's own `_compute_loss` on these log-probs: a trainer without a model, whose model returns them."""
    trainer = object.__new__(DPOTrainer)
    zeros = torch.zeros_like(policy.detach())
    outputs = SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=mask & False)
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    settings = dict(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None, _tp_size=1,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=0.1,
        label_smoothing=noise, use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )  # fmt: skip
    trainer.__dict__.update(settings)
    first = torch.zeros(len(mask), 1, dtype=torch.long)  # the position that the shift takes away
    reference_sums = reference.sum(dim=1).chunk(2)
    inputs = {
        "input_ids": torch.cat([first, torch.zeros_like(mask, dtype=torch.long)], dim=1),
        "completion_mask": torch.cat([first, mask.long()], dim=1),
        "attention_mask": torch.ones(len(mask), 10, dtype=torch.long),
        "ref_chosen_logps": reference_sums[0],
        "ref_rejected_logps": reference_sums[1],
    }
    return trainer._compute_loss(lambda **_: outputs, inputs, False)


def by_us(name: str, policy: Tensor, reference: Tensor, mask: Tensor, noise: float) -> Tensor:
    a, b = (policy - reference).sum(dim=1).chunk(2)
    n, m = mask.sum(dim=1).chunk(2)
    if name == "conservative":
        return p.conservative(a, b, 0.1, noise).mean()
    if name == "robust":
        return p.robust(a, b, 0.1, noise).mean()
    if name == "nll":
        return -p.per_token(policy.sum(dim=1).chunk(2)[0], n).mean()
    return LOSSES[name](a, b, n, m).mean()


@pytest.mark.parametrize(
    ("ours", "theirs", "count"),
    [
        ("sigmoid", "sigmoid", 6),
        ("hinge", "hinge", 6),
        ("ipo", "ipo", 6),
        ("robust", "robust", 6),
        ("sppo_hard", "sppo_hard", 6),
        ("sigmoid_length_norm", "sigmoid_norm", 6),
        ("conservative", "aot", 1),
        ("nll", "sft", 1),
    ],
)
def test_values_and_gradients_are_those_of_trl(ours: str, theirs: str, count: int) -> None:
    """To 1e-5, beta .1 and label noise .2, tokens of uneven completions."""
    policy, reference, mask = pairs(count)
    results = []
    for loss, name in ((by_us, ours), (by_trl, theirs)):
        leaf = policy.clone().requires_grad_()
        value = loss(name, leaf, reference, mask, 0.2)
        value.backward()
        results.append((value.detach(), leaf.grad * mask))
    assert torch.allclose(results[0][0].double(), results[1][0].double(), atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert float(results[0][1].abs().max()) > 1e-4


def test_simpo_and_orpo_are_those_of_trl() -> None:
    """CPOTrainer's simpo, and the odds-ratio term of ORPOTrainer, which takes means."""
    policy, _, mask = pairs(6)
    sums, (n, m) = policy.sum(dim=1).chunk(2), mask.sum(dim=1).chunk(2)
    means = (sums[0] / n, sums[1] / m)
    settings = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, _, _ = CPOTrainer.cpo_loss(settings, *means)
    assert torch.allclose(p.simpo(*sums, n, m, 2.0, 0.5), theirs, atol=1e-5)
    settings.beta = 0.1
    ratio_term = ORPOTrainer.odds_ratio_loss(settings, *means)[0]  # lambda log sigma(...), subtracted from the NLL
    assert torch.allclose(p.orpo(*sums, n, m, 0.1), -means[0] - ratio_term, atol=1e-5)


def test_the_comparison_can_fail() -> None:
    """A control: another beta is noticed."""
    policy, reference, mask = pairs(6)
    a, b = (policy - reference).sum(dim=1).chunk(2)
    assert not torch.allclose(-logsigmoid(0.2 * (a - b)).mean(), by_trl("sigmoid", policy, reference, mask, 0.0))
