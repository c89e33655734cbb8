"""Reward models: the scalar head, where a score is read, and the judge that reads text.

Not covered: GPUs, hub downloads, families other than Llama and GPT-2, how good a reward model is.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf.config import ModelConfig, RunConfig
from rlhf.config_file import dump, load_run
from rlhf.errors import BadInput
from rlhf.experience import Group, Row
from rlhf.judges.build import build_reward_judge
from rlhf.judges.reward_function import RewardFunctionJudge
from rlhf.judges.reward_model import RewardModelJudge, conversation_ids
from rlhf.learner.collate import collate
from rlhf.learner.plan import units_of
from rlhf.models.load import load_tokenizer
from rlhf.models.policy import ModelInputs
from rlhf.models.resolve import resolve
from rlhf.models.score import ScoreModel, load_score_model, start_score_model
from rlhf.models.score_head import check_reward_model

EOS = 1  # of the tiny model, its padding too


@pytest.fixture(scope="module")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model's trunk under a scalar head large enough to tell answers apart."""
    folder = tmp_path_factory.mktemp("reward")
    model = start_score_model(ModelConfig(name="tiny"), "float32", 0)
    model.score.weight.data.mul_(10)
    model.save_pretrained(folder)
    load_tokenizer("tiny", trust_remote_code=False).save_pretrained(folder)
    return folder


@pytest.fixture
def word_reward(tmp_path: Path) -> Path:
    """A reward model with a tokenizer of words, no chat template, no BOS: nothing in common with the tiny model."""
    words = ["[UNK]", "[EOS]", "tell", "me", "more", "yes", "no", "please"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[EOS]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=1, eos_token_id=1, max_position_embeddings=12,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def run_with(tiny_run: Callable[..., RunConfig]) -> Callable[[Path], RunConfig]:
    def build(folder: Path) -> RunConfig:
        config = tiny_run({}, {}, {}, {})
        return RunConfig.model_validate(config.model_dump() | {"reward": {"model": str(folder)}})

    return build


def at_last_token(ids: Tensor, left: int, right: int) -> ModelInputs:
    """One sequence padded with EOS on both sides, positions counted from its first token."""
    length = ids.shape[0]
    row = torch.full((1, left + length + right), EOS)
    row[0, left : left + length] = ids
    attention, positions = torch.zeros_like(row), torch.zeros_like(row)
    attention[0, left : left + length] = 1
    positions[0, left : left + length] = torch.arange(length)
    before = torch.tensor([left + length - 2])
    return ModelInputs(row, attention, positions, before, torch.zeros(1, dtype=torch.int64), torch.ones(1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_score_does_not_depend_on_padding_or_batch_mates(tiny_reward: Path, family: str) -> None:
    """Trap 2: alone, left- and right-padded by 7, beside a 40-token mate, with the EOS (= padding) inside and at the
    end: 1e-5. The model's own forward pass, which searches for the padding id, reads elsewhere and is the control."""
    if family == "llama":
        model = load_score_model(ModelConfig(name=str(tiny_reward)), "float32")
    else:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=1
        )
        model = GPT2ForSequenceClassification(config).eval()
        model.score.weight.data.mul_(10)
    scores = ScoreModel(model, "token").eval()
    random = np.random.default_rng(0)
    ids = random.integers(5, 320, 12)
    ids[4] = ids[-1] = EOS
    sequence = torch.from_numpy(ids)
    with torch.no_grad():
        alone = scores(*at_last_token(sequence, 0, 0))[0].item()
        for left, right in [(7, 0), (0, 7), (7, 7)]:
            assert scores(*at_last_token(sequence, left, right))[0].item() == pytest.approx(alone, abs=1e-5)
        mate = random.integers(5, 320, 40)
        rows = [
            Row(i, s[:-1].astype(np.int32), s[-1:].astype(np.int32), np.ones(1, np.bool_), 1.0, {})
            for i, s in enumerate([mate, ids])
        ]
        together = scores(*collate(units_of(rows), (), packed=False).inputs)[0]
        assert together[1].item() == pytest.approx(alone, abs=1e-5)
        by_padding_id = model(input_ids=sequence[None]).logits.item()
    assert abs(by_padding_id - alone) > 1e-2


def test_it_is_the_head_on_the_last_state_of_the_plain_model(tiny_reward: Path) -> None:
    """Against transformers alone: a sequence that does not end with the padding id."""
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_reward).eval()
    scores = ScoreModel(load_score_model(ModelConfig(name=str(tiny_reward)), "float32"), "token").eval()
    ids = torch.tensor([5, 9, 200, 7, 31])
    with torch.no_grad():
        mine, theirs = scores(*at_last_token(ids, 3, 2))[0].item(), plain(input_ids=ids[None]).logits.item()
    assert mine == pytest.approx(theirs, abs=1e-5)


def test_a_new_head_is_seeded_and_small() -> None:
    """Same seed, same head; another seed, another; the global generator is left alone; the trunk is the policy's."""
    state = torch.get_rng_state()
    one, other, third = (start_score_model(ModelConfig(name="tiny"), "float32", seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.score.weight, other.score.weight) and not torch.equal(one.score.weight, third.score.weight)
    assert 0.5 < one.score.weight.std().item() * 65**0.5 < 2


def test_the_judge_scores_what_direct_scoring_of_the_text_does(
    word_reward: Path, run_with: Callable[[Path], RunConfig], make_group: Callable[..., Group]
) -> None:
    """Trap 87: the policy has a byte tokenizer and a template, the reward model words and none. The reference is
    transformers alone on the words. Too long for the model: None, and the others are scored all the same."""
    group = make_group(3, [None] * 4, [2, 3, 4, 1], {}, {})
    answers = [" yes please", " no", " more " * 20, ""]
    samples = tuple(replace(s, text=text, scores={}) for s, text in zip(group.samples, answers, strict=True))
    group = replace(group, samples=samples, prompt=replace(group.prompt, content="tell me more"))
    judge = build_reward_judge(run_with(word_reward), {}, Path("unused"))
    judge.setup()
    columns = judge.judge(group)
    judge.close()
    plain = AutoModelForSequenceClassification.from_pretrained(word_reward).eval()
    plain.config.pad_token_id = None  # then it reads the last token of a single sequence
    tokenizer = AutoTokenizer.from_pretrained(word_reward)
    expected = []
    for text in answers:
        ids = tokenizer("tell me more" + text)["input_ids"] + [1]
        with torch.no_grad():
            expected.append(plain(input_ids=torch.tensor([ids])).logits.item() if len(ids) <= 12 else None)
    found = columns.scores["reward"]
    assert found[2] is None and expected[2] is None and len(set(found)) == 4
    assert [found[i] for i in (0, 1, 3)] == pytest.approx([expected[i] for i in (0, 1, 3)], abs=1e-5)
    assert columns.prompt_id == 3 and not columns.tokens


def test_a_conversation_ends_where_training_ends() -> None:
    """With read_at eos, blanks behind the last EOS go and a missing one comes; the BOS stands there once either way."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    trained = tokenizer("<s><|user|>hi</s><|assistant|>yes</s>", add_special_tokens=False)["input_ids"]
    template = tokenizer.chat_template
    for ending in ("", "{{ '\\n' }}"):
        tokenizer.chat_template = template + ending
        ids = conversation_ids("hi", "yes", tokenizer, ends_at_eos=True)
        assert ids.dtype == np.int32 and ids.tolist() == trained
    assert conversation_ids("hi", "yes", tokenizer, ends_at_eos=False).tolist()[:-1] == trained
    no_bos = template.replace("{{ bos_token }}", "")
    tokenizer.chat_template = no_bos
    assert conversation_ids("hi", "yes", tokenizer, ends_at_eos=True).tolist() == trained
    tokenizer.chat_template = None
    plain = conversation_ids("hi", " yes", tokenizer, ends_at_eos=True).tolist()
    assert plain == [*tokenizer("hi yes")["input_ids"], EOS]


def test_a_model_without_a_scalar_head_is_refused_before_the_run(tiny_reward: Path, tmp_path: Path) -> None:
    """A language model, two labels, a head that is not in the weights, no model at all: BadInput with the key and what
    was found. The whole folder passes."""
    check_reward_model(str(tiny_reward), "reward.model", fetch=False)
    with pytest.raises(BadInput, match=r"reward.model: tiny is a language model"):
        check_reward_model("tiny", "reward.model", fetch=False)
    with pytest.raises(BadInput, match=r"reward.model: .*LlamaForCausalLM"):
        check_reward_model(str(resolve("tiny")), "reward.model", fetch=False)
    with pytest.raises(BadInput, match=r"^reward.model: .*neither|^reward.model: .*no folder"):
        check_reward_model(str(tmp_path / "nothing"), "reward.model", fetch=False)
    headless, two = tmp_path / "headless", tmp_path / "two"
    for folder in (headless, two):
        shutil.copytree(resolve("tiny"), folder)
        config = json.loads((folder / "config.json").read_text())
        labels = {"id2label": {"0": "a"}} if folder is headless else {}
        (folder / "config.json").write_text(
            json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]} | labels)
        )
    with pytest.raises(BadInput, match=r"no tensor of shape \(1, hidden size\)"):
        check_reward_model(str(headless), "reward.model", fetch=False)
    with pytest.raises(BadInput, match="2 outputs"):
        check_reward_model(str(two), "reward.model", fetch=False)
    config = json.loads((two / "config.json").read_text())
    for nonsense in ({"id2label": 3}, {"architectures": "Llama"}, {"architectures": [None]}):
        (two / "config.json").write_text(json.dumps(config | nonsense))
        with pytest.raises(BadInput, match=r"reward.model: .*; expected a sequence classifier with one label"):
            check_reward_model(str(two), "reward.model", fetch=False)
    with pytest.raises(BadInput, match="lacks tensors"):
        load_score_model(ModelConfig(name=str(headless)), "float32")


def test_an_empty_weight_file_beside_the_others_is_named(tiny_reward: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_reward, folder)
    (folder / "other.safetensors").touch()
    with pytest.raises(BadInput, match=r"^reward.model: .*other.safetensors is not a whole safetensors file: 0 bytes"):
        check_reward_model(str(folder), "reward.model", fetch=False)


def test_a_run_names_a_function_or_a_model(tiny_reward: Path, run_with: Callable[[Path], RunConfig]) -> None:
    """Neither, both, or a setting that would do nothing is refused; the judge is built for what is named."""
    config = run_with(tiny_reward)
    assert isinstance(build_reward_judge(config, {}, Path("unused")).inner, RewardModelJudge)
    for reward, complaint in [
        ({}, "none is set"),
        ({"function": "a:b", "model": "c"}, "both are set"),
        ({"model": "c", "timeout_s": 5.0}, "timeout_s would do nothing"),
        ({"function": "a:b", "dtype": "bfloat16"}, "dtype would do nothing"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            RunConfig.model_validate(config.model_dump() | {"reward": reward})
    by_function = RunConfig.model_validate(config.model_dump() | {"reward": {"function": "a:b"}})
    assert isinstance(build_reward_judge(by_function, {}, Path("unused")).inner, RewardFunctionJudge)
    assert RunConfig.model_validate(config.model_dump()) == config


def test_a_relative_reward_model_is_found_beside_the_run_file(
    tiny_reward: Path, run_with: Callable[[Path], RunConfig], tmp_path: Path
) -> None:
    """Like model.name: below the current directory, then below the run file's folder."""
    shutil.copytree(tiny_reward, tmp_path / "judge")
    (tmp_path / "run.yaml").write_text(dump(run_with(Path("./judge"))))
    assert load_run(tmp_path / "run.yaml", ["reward.model=./judge"]).reward.model == str(tmp_path / "judge")
