"""vLLM against plain transformers forward passes, at every token, before and after updates. CPU, float32, tiny models.

One engine for the tied and one for the untied model. Not covered: GPUs, bfloat16 and the learner's own log-prob code,
which has its own tests against the same kind of forward pass.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import RunFailed, WeightMismatch
from rlhf.experience import Group, Prompt, Sampling
from rlhf.generation import vllm_weights
from rlhf.generation.engine import EngineSpec
from rlhf.generation.vllm_engine import VllmGenerator
from rlhf.models.resolve import resolve
from rlhf.weights import Probe, Weights, pack, probe_ids, state_once

pytestmark = pytest.mark.vllm

EXTRA_STOPS = list(range(100, 130))
TOLERANCE = 1e-4  # nats, at every token


class Setting:
    """An engine with the model that it should agree with, and the next version's number."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self.tied = tied
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.version = 0
        self.engine = VllmGenerator(
            EngineSpec(
                name="rollout-0",
                model=folder,
                dtype="float32",
                attention="sdpa",
                trust_remote_code=False,
                run_seed=3,
                max_sequence_tokens=400,
                max_sequences=64,
                cache_gib=0.1,
                gpu_memory_fraction=0.5,
                probe_tolerance=1e-3,
                mid_sequence=True,
                sleeps=False,
                tensor_parallel=1,
            )
        )

    @torch.no_grad()
    def token_logprobs(self, ids: Sequence[int], temperature: float) -> torch.Tensor:
        """Of tokens 1.. by a whole forward pass."""
        tokens = torch.tensor(list(ids))
        logits = self.model(input_ids=tokens[None]).logits[0, :-1].double() / temperature
        return logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)

    @torch.no_grad()
    def perturb(self) -> None:
        """A random step on every tensor."""
        generator = torch.Generator().manual_seed(self.version)
        for parameter in self.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def publish(self) -> Weights:
        self.version += 1
        ids = probe_ids(self.model.config.vocab_size)
        probe = Probe(ids, self.token_logprobs(ids.tolist(), 1.0).float().numpy())
        return pack(self.version, state_once(self.model).items(), probe)

    def difference(self, groups: Iterator[Group], temperature: float) -> float:
        """The largest |engine - forward pass| over all tokens of all samples."""
        worst = 0.0
        for group in groups:
            prompt = group.prompt.token_ids.tolist()
            for sample in group.samples:
                expected = self.token_logprobs([*prompt, *sample.token_ids.tolist()], temperature)[len(prompt) - 1 :]
                worst = max(worst, float(np.abs(sample.behavior_logprobs - expected.numpy()).max()))
        return worst


@pytest.fixture(scope="module", params=["tiny", "tiny-untied"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """An engine that holds no version yet. At the end nothing that it started may live on."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(resolve(request.param), folder)
    listed = json.loads((folder / "generation_config.json").read_text())
    listed["eos_token_id"] = [*listed["eos_token_id"], *EXTRA_STOPS]
    (folder / "generation_config.json").write_text(json.dumps(listed))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    set_num_threads = torch.set_num_threads
    setting = Setting(folder, tied=request.param == "tiny")
    setting.engine.setup()
    assert torch.set_num_threads is set_num_threads
    with pytest.raises(RunFailed, match="rollout-0 holds no verified version"):
        setting.engine.generate(prompts(1), sampling(), 1, "sample")
    yield setting
    setting.engine.close()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.fixture
def setting(running: Setting) -> Setting:
    """The engine with a freshly published version of the model as it now is."""
    running.engine.load(running.publish())
    return running


def prompts(count: int) -> list[Prompt]:
    """Ids that no tokenizer would give back; the last prompt is longer than a block of the prefix cache."""
    random = np.random.default_rng(8)
    lengths = [3 + 5 * i for i in range(count - 1)] + [300]
    return [
        Prompt(i, i, 0, "?", "?", random.integers(5, 320, length, dtype=np.int32), {})
        for i, length in enumerate(lengths)
    ]


def sampling(temperature: float = 1.0, max_new_tokens: int = 12) -> Sampling:
    return Sampling(temperature, 1.0, 0, max_new_tokens)


def ids_of(groups: Iterator[Group]) -> dict[int, list[list[int]]]:
    return {group.prompt.id: [sample.token_ids.tolist() for sample in group.samples] for group in groups}


def test_log_probs_agree_at_every_token_before_and_after_five_updates(setting: Setting) -> None:
    """Temperature 0.7 and 1.0. The wrong temperature is a control: it differs a thousand times more."""
    for update in range(6):
        if update:
            setting.perturb()
            receipt = setting.engine.load(setting.publish())
            assert (receipt.engine, receipt.version) == ("rollout-0", setting.version)
            assert receipt.probe_abs_max <= TOLERANCE
        for temperature in (0.7, 1.0):
            groups = list(setting.engine.generate(prompts(5), sampling(temperature), 4, "sample"))
            assert setting.difference(iter(groups), temperature) <= TOLERANCE
            assert setting.difference(iter(groups), 1.7 - temperature) > 0.1
            assert {int(v) for group in groups for s in group.samples for v in s.versions} == {setting.version}


def test_a_tied_head_that_is_not_packed_again_is_caught(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: without the refresh the probe refuses the tied model, and only that."""
    setting.perturb()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_weights, "refresh_output_heads", lambda model: None)
        if not setting.tied:
            setting.engine.load(setting.publish())
            return
        with pytest.raises(WeightMismatch, match=r"lm_head\.weight"):
            setting.engine.load(setting.publish())
        with pytest.raises(RunFailed, match="holds no verified version"):
            setting.engine.generate(prompts(1), sampling(), 1, "sample")
        patch.setattr(setting.engine, "_spec", replace(setting.engine._spec, probe_tolerance=100.0))
        setting.engine.load(setting.publish())
        assert setting.difference(setting.engine.generate(prompts(3), sampling(), 4, "sample"), 1.0) > 0.01
    setting.engine.load(setting.publish())
    assert setting.difference(setting.engine.generate(prompts(3), sampling(), 4, "sample"), 1.0) <= TOLERANCE


def test_no_answer_comes_from_the_prefix_cache_of_former_weights(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 300 tokens, seen before the update. The reset sees to it, and so does the salt alone, for updates in
    the middle of sequences; with both left out the same comparison fails."""
    from vllm.inputs.engine import tokens_input

    long = prompts(5)[-1:]
    list(setting.engine.generate(long, sampling(), 4, "sample"))
    for reset, salted in ((True, False), (False, True), (False, False)):
        wrong = not reset and not salted
        setting.perturb()
        with monkeypatch.context() as patch:
            if not reset:
                patch.setattr(setting.engine._engine, "reset_prefix_cache", lambda: True)
            if not salted:
                patch.setattr("vllm.inputs.engine.tokens_input", lambda ids, cache_salt: tokens_input(ids))
            setting.engine.load(setting.publish())
            difference = setting.difference(setting.engine.generate(long, sampling(), 4, "sample"), 1.0)
        assert (difference > 0.01) == wrong and (wrong or difference <= TOLERANCE), (reset, salted, difference)


def test_greedy_answers_follow_the_head(setting: Setting) -> None:
    """The output head negated: another answer, and each time the one of a loop over whole prefixes."""
    answers = []
    for _ in range(2):
        (group,) = setting.engine.generate(prompts(3)[1:2], sampling(0.0, max_new_tokens=5), 1, "evaluate")
        ids = group.prompt.token_ids.tolist()
        for token in group.samples[0].token_ids.tolist():
            with torch.no_grad():
                assert token == setting.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
        answers.append(group.samples[0].token_ids.tolist())
        assert setting.difference(iter([group]), 1.0) <= TOLERANCE
        with torch.no_grad():
            setting.model.get_output_embeddings().weight.neg_()
        setting.engine.load(setting.publish())
    assert answers[0] != answers[1]


def test_broken_deliveries_are_refused_by_name_and_change_nothing(setting: Setting) -> None:
    """A lost tensor, a flipped bit, an older version: the former version stays in use and is stamped on samples."""
    before = ids_of(setting.engine.generate(prompts(3), sampling(), 2, "sample"))
    held = setting.version
    older = replace(setting.publish(), version=held - 1)
    with pytest.raises(WeightMismatch, match=f"holds version {held} and was given the older version {held - 1}"):
        setting.engine.load(older)
    setting.perturb()
    whole = setting.publish()
    name = "model.layers.1.mlp.down_proj.weight"
    rest = {key: tensor for key, tensor in state_once(setting.model).items() if key != name}
    with pytest.raises(WeightMismatch, match=rf"missing tensors \['{name}'\]"):
        setting.engine.load(pack(whole.version, rest.items(), whole.probe))
    data = whole.tensors[name].data.copy()
    data[100] ^= 16
    flipped = {**whole.tensors, name: replace(whole.tensors[name], data=data)}
    with pytest.raises(WeightMismatch, match=name):
        setting.engine.load(replace(whole, tensors=flipped))
    groups = list(setting.engine.generate(prompts(3), sampling(), 2, "sample"))
    assert ids_of(iter(groups)) == before
    assert {group.policy_version for group in groups} == {held}


def test_samples_depend_on_their_address_and_not_on_their_company(setting: Setting) -> None:
    """Again, in reverse and alone, 32 requests through 16 slots: the same tokens. A prompt's samples differ."""
    first = ids_of(setting.engine.generate(prompts(4), sampling(), 8, "sample"))
    again = ids_of(setting.engine.generate(prompts(4)[::-1], sampling(), 8, "sample"))
    alone = ids_of(setting.engine.generate(prompts(4)[2:3], sampling(), 8, "sample"))
    assert first == again
    assert alone[2] == first[2]
    assert all(len({tuple(ids) for ids in samples}) > 4 for samples in first.values())
    assert ids_of(setting.engine.generate(prompts(4), sampling(), 8, "evaluate")) != first


def test_completions_end_at_every_listed_stop_id_and_ids_are_never_text(setting: Setting) -> None:
    """Stop ids are kept and trained. The ids would not survive a round trip through text, yet they all agree."""
    stops = {setting.tokenizer.eos_token_id, *EXTRA_STOPS}
    reasons, survive = set(), 0
    for group in setting.engine.generate(prompts(5), sampling(), 8, "sample"):
        prompt = group.prompt.token_ids.tolist()
        for sample in group.samples:
            ids = sample.token_ids.tolist()
            reasons.add(sample.finish_reason)
            assert (ids[-1] in stops) == (sample.finish_reason == "stop")
            assert not stops & set(ids[:-1])
            assert sample.loss_mask.all()
            whole = [*prompt, *ids]
            survive += setting.tokenizer.encode(setting.tokenizer.decode(whole), add_special_tokens=False) == whole
            expected = setting.token_logprobs(whole, 1.0)[len(prompt) - 1 :].numpy()
            assert np.abs(sample.behavior_logprobs - expected).max() <= TOLERANCE
    assert reasons == {"stop", "length"}
    assert survive < 20


def test_a_consumer_that_stops_early_leaves_nothing_in_flight(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing drops the rest, and the next call answers as ever. Until then weights may not change, but for engines
    that are built for that."""
    monkeypatch.setattr(setting.engine, "_spec", replace(setting.engine._spec, mid_sequence=False))
    complete = ids_of(setting.engine.generate(prompts(4), sampling(), 4, "sample"))
    groups = setting.engine.generate(prompts(4), sampling(), 4, "sample")
    next(groups)
    with pytest.raises(RunFailed, match="in flight"):
        setting.engine.load(setting.publish())
    groups.close()
    setting.engine.load(setting.publish())
    assert ids_of(setting.engine.generate(prompts(4), sampling(), 4, "sample")) == complete


def test_vllm_shows_that_it_advances_between_groups(setting: Setting) -> None:
    """A sign a step of the engine: at least as many as the longest answer has tokens."""
    items = list(setting.engine.steps(prompts(3), sampling(), 2, "sample"))
    groups = [group for group in items if group is not None]
    assert items.count(None) >= max(len(s.token_ids) for group in groups for s in group.samples) > 3
    assert ids_of(groups) == ids_of(setting.engine.generate(prompts(3), sampling(), 2, "sample"))


def test_new_weights_between_two_tokens_keep_the_cache_and_every_token_says_its_version(
    setting: Setting, mixed_logprobs: Callable[..., torch.Tensor]
) -> None:
    """More sequences than the engine holds at a time, so that some are begun, some running and some waiting when the
    weights come; see the test of the same name for transformers. A prompt that is asked for again under the new weights
    finds nothing of the old ones in the prefix cache."""
    old, first = copy.deepcopy(setting.model), setting.version
    setting.perturb()
    steps = setting.engine.steps(prompts(3), sampling(max_new_tokens=24), 30, "sample")
    items = [next(steps) for _ in range(4)]
    setting.engine.load(setting.publish())
    groups = [group for group in [*items, *steps] if group is not None]
    samples = [(group.prompt.token_ids.tolist(), sample) for group in groups for sample in group.samples]
    kinds = {tuple(sorted(set(sample.versions.tolist()))) for _, sample in samples}
    assert kinds >= {(first, first + 1), (first + 1,)} and len(samples) == 90
    worst, apart = 0.0, 0.0
    for prompt, sample in samples:
        used = [model for version, model in ((first, old), (first + 1, setting.model)) if version in sample.versions]
        expected = mixed_logprobs(used, prompt, sample).numpy()
        worst = max(worst, float(np.abs(sample.behavior_logprobs - expected).max()))
        newest = setting.token_logprobs([*prompt, *sample.token_ids.tolist()], 1.0)[len(prompt) - 1 :].numpy()
        apart = max(apart, float(np.abs(sample.behavior_logprobs - newest).max()))
    assert worst <= TOLERANCE and apart > 1e-2, (worst, apart)
    assert setting.difference(setting.engine.generate(prompts(3), sampling(), 2, "sample"), 1.0) <= TOLERANCE


def test_prompts_that_do_not_fit_into_one_step_of_the_engine_are_answered_as_alone(setting: Setting) -> None:
    """9,600 tokens of prompts: read in parts, they would make vLLM wind back generators, which fails on a CPU."""
    random = np.random.default_rng(5)
    many = [Prompt(n, n, 0, "p", "p", random.integers(5, 300, 150).astype(np.int32), {}) for n in range(64)]
    together = {group.prompt.id: group for group in setting.engine.generate(many, sampling(), 1, "sample")}
    assert sorted(together) == list(range(64))
    (alone,) = setting.engine.generate(many[50:51], sampling(), 1, "sample")
    assert alone.samples[0].token_ids.tolist() == together[50].samples[0].token_ids.tolist()
