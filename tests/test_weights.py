"""Publishing and verifying weights: what arrived, under which names, in which order. Engines are tested elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.errors import WeightMismatch
from rlhf.weights import (
    PackedTensor,
    Probe,
    Weights,
    pack,
    probe_ids,
    state_once,
    state_shapes,
    verify_arrival,
    verify_names,
    verify_order,
    verify_probe,
)

PROBE = Probe(np.array([3, 1, 2], dtype=np.int32), np.array([-1.0, -2.0], dtype=np.float32))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator).bfloat16(),
        "scale": torch.tensor(2.5),
        "steps": torch.tensor([1, -2, 2**40]),
    }


def published(version: int = 1) -> Weights:
    return pack(version, tensors().items(), PROBE)


def with_tensor(weights: Weights, name: str, tensor: PackedTensor) -> Weights:
    return replace(weights, tensors={**weights.tensors, name: tensor})


def test_tensors_come_back_bit_for_bit() -> None:
    """Every dtype and rank, also a scalar, from memory that may not be written to (as Ray hands it over)."""
    for name, tensor in published().tensors.items():
        tensor.data.flags.writeable = False
        original = tensors()[name]
        unpacked = tensor.unpack()
        assert unpacked.dtype == original.dtype
        assert unpacked.shape == original.shape
        assert torch.equal(unpacked, original)


def test_published_tensors_do_not_follow_the_model() -> None:
    source = tensors()
    weights = pack(1, source.items(), PROBE)
    source["embed.weight"].zero_()
    assert weights.tensors["embed.weight"].unpack().abs().sum() > 0


def test_fingerprint_depends_on_content_and_not_on_order() -> None:
    same = pack(9, reversed(tensors().items()), PROBE)
    other = tensors()
    other["norm.weight"][0] += 1
    assert same.fingerprint == published().fingerprint
    assert pack(1, other.items(), PROBE).fingerprint != published().fingerprint


def test_intact_weights_are_accepted() -> None:
    weights = published()
    verify_arrival(weights, "engine")
    verify_names(weights, {name: tuple(tensor.shape) for name, tensor in tensors().items()}, "engine")


def test_one_flipped_bit_is_found_and_named() -> None:
    weights = published()
    tensor = weights.tensors["norm.weight"]
    data = tensor.data.copy()
    data[3] ^= 1
    with pytest.raises(WeightMismatch, match=r"rollout-1, version 1.*norm\.weight"):
        verify_arrival(with_tensor(weights, "norm.weight", replace(tensor, data=data)), "rollout-1")


def test_a_tensor_swapped_for_an_intact_other_one_is_found() -> None:
    """Its own digest is right; only the fingerprint over the list shows that it is not the published one."""
    weights = published()
    foreign = pack(1, {"norm.weight": torch.ones(4, dtype=torch.bfloat16)}.items(), PROBE).tensors["norm.weight"]
    with pytest.raises(WeightMismatch, match="not the published"):
        verify_arrival(with_tensor(weights, "norm.weight", foreign), "rollout-1")


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    with pytest.raises(WeightMismatch, match=r"missing tensors \['head.weight'\]"):
        verify_names(published(), {**shapes, "head.weight": (7, 4)}, "engine")
    with pytest.raises(WeightMismatch, match=r"unexpected tensors \['scale'\]"):
        verify_names(published(), {name: shape for name, shape in shapes.items() if name != "scale"}, "engine")
    with pytest.raises(WeightMismatch, match=r"embed\.weight has shape \(7, 4\).*\(8, 4\)"):
        verify_names(published(), {**shapes, "embed.weight": (8, 4)}, "engine")


def test_versions_go_forward_and_a_number_means_one_thing() -> None:
    weights = published(3)
    verify_order(weights, 0, None, None, "engine")
    verify_order(weights, 0, 1, "another", "engine")
    verify_order(weights, 0, 3, weights.fingerprint, "engine")
    with pytest.raises(WeightMismatch, match="holds version 4 and was given the older version 3"):
        verify_order(weights, 0, 4, "another", "engine")
    with pytest.raises(WeightMismatch, match="only one learner"):
        verify_order(weights, 0, 3, "another", "engine")


def test_probe_reports_the_largest_difference_and_refuses_more() -> None:
    seen = verify_probe(published(), np.array([-1.25, -2.5], dtype=np.float32), 0.6, "engine")
    assert seen == 0.5
    with pytest.raises(WeightMismatch, match=r"probe token 2 is -2\.5.*learner's -2\.0"):
        verify_probe(published(), np.array([-1.25, -2.5], dtype=np.float32), 0.4, "engine")
    with pytest.raises(WeightMismatch, match="nan"):
        verify_probe(published(), np.array([np.nan, -2.0], dtype=np.float32), 0.4, "engine")
    with pytest.raises(WeightMismatch, match="expected"):
        verify_probe(published(), np.array([-1.0], dtype=np.float32), 0.4, "engine")


def test_probe_tokens_are_the_same_everywhere_and_inside_the_vocabulary() -> None:
    assert probe_ids(320).tolist() == probe_ids(320).tolist()
    assert probe_ids(5).max() < 5
    assert len(set(probe_ids(49152).tolist())) > 20


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0))


def test_a_tied_tensor_is_listed_once_and_a_buffer_is_not_forgotten() -> None:
    assert state_shapes(Tied()) == {"embed.weight": (5, 3), "table": (4,)}
    model = Tied()
    with torch.no_grad():
        state_once(model)["embed.weight"].zero_()
    assert model.head.weight.abs().sum() == 0
