"""The transformers engine on the tiny model, against forward passes without a cache. T5 and GPUs are not covered."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import BadInput, RunFailed, WeightMismatch
from rlhf.experience import Group, Prompt, Sampling
from rlhf.generation.engine import EngineSpec
from rlhf.generation.transformers_engine import TransformersGenerator
from rlhf.models.resolve import resolve
from rlhf.weights import Probe, Weights, pack, probe_ids, state_once

EXTRA_STOPS = list(range(100, 130))


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with so many stop ids that about every second completion ends by one."""
    copy = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(resolve(request.param), copy)
    listed = json.loads((copy / "generation_config.json").read_text())
    eos = listed["eos_token_id"]
    listed["eos_token_id"] = [*(eos if isinstance(eos, list) else [eos]), *EXTRA_STOPS]
    (copy / "generation_config.json").write_text(json.dumps(listed))
    return copy


@pytest.fixture
def model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine_for(folder: Path, run_seed: int = 3, mid_sequence: bool = False) -> TransformersGenerator:
    engine = TransformersGenerator(
        EngineSpec(
            name="rollout-0",
            model=folder,
            dtype="float32",
            attention="sdpa",
            trust_remote_code=False,
            run_seed=run_seed,
            max_sequence_tokens=128,
            max_sequences=16,
            cache_gib=0.1,
            gpu_memory_fraction=0.5,
            probe_tolerance=1e-3,
            mid_sequence=mid_sequence,
            sleeps=False,
            tensor_parallel=1,
        )
    )
    engine.setup()
    return engine


@pytest.fixture
def engine(folder: Path, model: torch.nn.Module) -> Iterator[TransformersGenerator]:
    engine = engine_for(folder)
    engine.load(publish(model, 1))
    yield engine
    engine.close()


@torch.no_grad()
def token_logprobs(model: torch.nn.Module, ids: Sequence[int], temperature: float) -> torch.Tensor:
    """Of tokens 1.. by a whole forward pass."""
    tokens = torch.tensor(list(ids))
    logits = model(input_ids=tokens[None]).logits[0, :-1].double() / temperature
    return logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)


def publish(model: torch.nn.Module, version: int) -> Weights:
    ids = probe_ids(model.config.vocab_size)
    probe = Probe(ids, token_logprobs(model, ids.tolist(), 1.0).float().numpy())
    return pack(version, state_once(model).items(), probe)


def prompts(count: int) -> list[Prompt]:
    random = np.random.default_rng(8)
    lengths = [3 + 5 * i for i in range(count)]
    return [
        Prompt(i, i, 0, "?", "?", random.integers(5, 320, length, dtype=np.int32), {})
        for i, length in enumerate(lengths)
    ]


def sampling(temperature: float = 1.0, max_new_tokens: int = 12) -> Sampling:
    return Sampling(temperature, 1.0, 0, max_new_tokens)


def by_prompt(groups: Iterator[Group]) -> dict[int, Group]:
    return {group.prompt.id: group for group in groups}


def same(left: Group, right: Group) -> bool:
    """Same ids and the same bits of log-probability."""
    return all(
        np.array_equal(a.token_ids, b.token_ids) and a.behavior_logprobs.tobytes() == b.behavior_logprobs.tobytes()
        for a, b in zip(left.samples, right.samples, strict=True)
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_a_forward_pass(
    engine: TransformersGenerator, model: torch.nn.Module, temperature: float
) -> None:
    """At every token, also after five updates, the first token and the one that ends the completion included."""
    for version in range(1, 7):
        if version > 1:
            perturb(model, version)
            engine.load(publish(model, version))
        for group in engine.generate(prompts(4), sampling(temperature), 4, "sample"):
            for sample in group.samples:
                whole = [*group.prompt.token_ids.tolist(), *sample.token_ids.tolist()]
                expected = token_logprobs(model, whole, temperature)[len(group.prompt.token_ids) - 1 :]
                assert np.abs(sample.behavior_logprobs - expected.numpy()).max() <= 1e-5
                assert set(sample.versions.tolist()) == {version}


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_same_bits_again_and_in_any_order(folder: Path, engine: TransformersGenerator, model: torch.nn.Module) -> None:
    """Another engine, prompts reversed, one prompt alone: a group depends on nothing but its own address."""
    first = by_prompt(engine.generate(prompts(4), sampling(), 8, "sample"))
    other = engine_for(folder)
    other.load(publish(model, 7))
    again = by_prompt(other.generate(prompts(4)[::-1], sampling(), 8, "sample"))
    alone = by_prompt(other.generate(prompts(4)[2:3], sampling(), 8, "sample"))
    assert all(same(first[i], again[i]) for i in range(4))
    assert same(first[2], alone[2])


def test_samples_differ_from_each_other_and_between_addresses(folder: Path, engine: TransformersGenerator) -> None:
    """Control of the test above: purpose, prompt id and sample index matter; the global generator does not."""
    prompt = prompts(1)[0]
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    group = next(engine.generate([prompt], sampling(), 8, "sample"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({tuple(sample.token_ids.tolist()) for sample in group.samples}) == 8
    renamed = Prompt(77, 0, 0, "?", "?", prompt.token_ids, {})
    assert not same(group, next(engine.generate([renamed], sampling(), 8, "sample")))
    assert not same(group, next(engine.generate([prompt], sampling(), 8, "evaluate")))
    assert len({sample.seed for sample in group.samples}) == 8


def test_completions_end_at_every_listed_stop_id_and_keep_it(engine: TransformersGenerator, folder: Path) -> None:
    """A stop id is the last token, counted and trained, and not in the text; without one the reason is the length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = {tokenizer.eos_token_id, *EXTRA_STOPS}
    reasons = set()
    for group in engine.generate(prompts(4), sampling(), 8, "sample"):
        for sample in group.samples:
            ids = sample.token_ids.tolist()
            reasons.add(sample.finish_reason)
            assert (ids[-1] in stops) == (sample.finish_reason == "stop")
            assert sample.finish_reason == "stop" or len(ids) == 12
            assert not stops & set(ids[:-1])
            assert sample.loss_mask.all()
            body = ids[:-1] if sample.finish_reason == "stop" else ids
            assert sample.text == tokenizer.decode(body, skip_special_tokens=True)
    assert reasons == {"stop", "length"}


def test_greedy_follows_the_largest_logit(engine: TransformersGenerator, model: torch.nn.Module) -> None:
    """Against a loop that feeds the whole prefix each time; the log-probs are those at temperature 1."""
    group = next(engine.generate(prompts(3)[2:], sampling(0.0, max_new_tokens=6), 1, "evaluate"))
    ids = group.prompt.token_ids.tolist()
    for token, logprob in zip(group.samples[0].token_ids, group.samples[0].behavior_logprobs, strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token == logprobs.argmax()
        assert logprob == pytest.approx(logprobs.max().item(), abs=1e-5)
        ids.append(int(token))


def test_an_engine_without_a_verified_version_refuses_to_sample(folder: Path, model: torch.nn.Module) -> None:
    """Fresh, and after weights that arrived whole but are not what the learner computes with."""
    engine = engine_for(folder)
    with pytest.raises(RunFailed, match="rollout-0 holds no verified version"):
        engine.generate(prompts(1), sampling(), 1, "sample")
    honest = publish(model, 1)
    engine.load(honest)
    shifted = Probe(honest.probe.token_ids, honest.probe.logprobs + np.float32(0.01))
    with pytest.raises(WeightMismatch, match="does not compute with them"):
        engine.load(pack(2, state_once(model).items(), shifted))
    with pytest.raises(RunFailed, match="holds no verified version"):
        engine.generate(prompts(1), sampling(), 1, "sample")


def test_a_version_that_does_not_arrive_leaves_the_former_one_in_use(
    engine: TransformersGenerator, model: torch.nn.Module
) -> None:
    before = next(engine.generate(prompts(1), sampling(), 4, "sample"))
    perturb(model, 1)
    state = state_once(model)
    state.pop("model.norm.weight")
    incomplete = pack(2, state.items(), publish(model, 2).probe)
    with pytest.raises(WeightMismatch, match=r"missing tensors \['model\.norm\.weight'\]"):
        engine.load(incomplete)
    after = next(engine.generate(prompts(1), sampling(), 4, "sample"))
    assert same(before, after)
    assert after.policy_version == 1


def test_weights_do_not_change_under_samples_in_flight(engine: TransformersGenerator, model: torch.nn.Module) -> None:
    """Nor are two calls interleaved. Once the iterator is closed, both are welcome."""
    groups = engine.generate(prompts(2), sampling(), 1, "sample")
    next(groups)
    with pytest.raises(RunFailed, match="in flight"):
        engine.load(publish(model, 2))
    with pytest.raises(RunFailed, match="called again"):
        next(engine.generate(prompts(1), sampling(), 1, "sample"))
    groups.close()
    engine.load(publish(model, 2))
    assert next(engine.generate(prompts(1), sampling(), 1, "sample")).policy_version == 2


def test_a_prompt_that_does_not_fit_is_refused_with_its_row(engine: TransformersGenerator) -> None:
    long = Prompt(4, 17, 0, "?", "?", np.full(120, 50, dtype=np.int32), {})
    with pytest.raises(BadInput, match=r"prompt 4 \(row 17\) has 120 tokens"):
        engine.generate([long], sampling(), 1, "sample")


def test_an_engine_shows_that_it_advances_between_groups(engine: TransformersGenerator) -> None:
    """One sign a decoding step, so that a long answer is told from a dead engine; the groups are those of generate."""
    items = list(engine.steps(prompts(3), sampling(max_new_tokens=6), 2, "sample"))
    steps = sum(max(len(s.token_ids) for s in group.samples) - 1 for group in items if group is not None)
    assert items.count(None) == steps > 3
    again = list(engine.generate(prompts(3), sampling(max_new_tokens=6), 2, "sample"))
    assert all(same(left, right) for left, right in zip(filter(None, items), again, strict=True))


def test_new_weights_between_two_tokens_keep_the_cache_and_every_token_says_its_version(
    folder: Path, model: torch.nn.Module, mixed_logprobs: Callable[..., torch.Tensor]
) -> None:
    """Two updates inside a sequence: log-probs are those of the weights that sampled each token, on the cache that the
    former weights left; the versions say where. Control: under the newest weights alone they would be others."""
    models = [copy.deepcopy(model)]
    for version in (2, 3):
        perturb(model, version)
        models.append(copy.deepcopy(model))
    engine = engine_for(folder, mid_sequence=True)
    engine.load(publish(models[0], 1))
    steps = engine.steps(prompts(2)[1:], sampling(max_new_tokens=40), 12, "sample")
    items = [next(steps) for _ in range(4)]
    receipt = engine.load(publish(models[1], 2))
    assert receipt.version == 2 and receipt.probe_abs_max < 1e-3
    items += [next(steps) for _ in range(3)]
    engine.load(publish(models[2], 3))
    (group,) = filter(None, [*items, *steps])
    for sample in group.samples:
        assert sample.versions.tolist() == ([1] * 5 + [2] * 3 + [3] * 40)[: len(sample.token_ids)]
    assert {len(set(sample.versions.tolist())) for sample in group.samples} >= {1, 3}
    worst, apart = 0.0, 0.0
    for sample in group.samples:
        used = models[: int(sample.versions.max())]
        expected = mixed_logprobs(used, group.prompt.token_ids.tolist(), sample).numpy()
        worst = max(worst, float(np.abs(sample.behavior_logprobs - expected).max()))
        ids = [*group.prompt.token_ids.tolist(), *sample.token_ids.tolist()]
        newest = token_logprobs(models[2], ids, 1.0)[len(group.prompt.token_ids) - 1 :].numpy()
        apart = max(apart, float(np.abs(sample.behavior_logprobs - newest).max()))
    assert worst < 1e-4 and apart > 1e-2, (worst, apart)
    assert group.policy_version == 1
    engine.close()


def test_a_version_that_fails_in_the_middle_ends_what_is_in_flight(folder: Path, model: torch.nn.Module) -> None:
    """No token may come out of weights that were not verified."""
    engine = engine_for(folder, mid_sequence=True)
    engine.load(publish(model, 1))
    steps = engine.steps(prompts(1), sampling(), 2, "sample")
    next(steps)
    weights = publish(model, 2)
    with pytest.raises(WeightMismatch, match="does not compute with them"):
        engine.load(replace(weights, probe=Probe(weights.probe.token_ids, weights.probe.logprobs - 1)))
    with pytest.raises(RunFailed, match="could not be verified"):
        next(steps)
    engine.close()
