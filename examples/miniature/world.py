"""A small language world with a known true reward: its words, its prompts, its model, and the data of one seed.

A prompt asks for a topic, a mood and a length: `write a sad short note about the sea`. With D the different words of an
answer of n words, the true reward is the sum of five parts, and no answer is worth more than BEST:

    topic     min(words of D that belong to the topic, 4) / 4                            0 to 1
    mood      clip((words of D of the mood asked for - all words of other moods) / 3)    -1 to 1
    content   words that are no fillers / n                                              0 to 1
    length    -min(1, |n - asked| / asked)                                               -1 to 0
    variety   -(n - |D|) / n                                                             -1 to 0

People do not see it: their preference between two answers follows Bradley-Terry, P(a > b) = sigmoid(SHARPNESS (r_a -
r_b)), and a reward model learns from such pairs.
"""

import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.seeding import seed_for

TOPICS = {
    "sea": ["wave", "salt", "ship", "gull", "tide"],
    "forest": ["tree", "moss", "fox", "path", "leaf"],
    "city": ["street", "tram", "crowd", "shop", "tower"],
    "kitchen": ["bread", "soup", "oven", "spoon", "table"],
}
MOODS = {
    "happy": ["bright", "sweet", "merry", "warm", "golden"],
    "sad": ["grey", "lost", "lonely", "tired", "broken"],
    "angry": ["bitter", "loud", "cruel", "burning", "sharp"],
}
LENGTHS = {"short": 8, "medium": 12, "long": 16}
FILLERS = ["the", "a", "is", "and", "so", "it", "was", "there", "then", "very"]
ASKED = ["write", "note", "about"]
MAX_NEW_TOKENS = 20
BEST = 3.0
SHARPNESS = 3.0

TRAIN_PROMPTS, HELDOUT_PROMPTS = 24, 12
DEMONSTRATIONS, PAIRS, JUDGED_PAIRS = 40, 170, 16  # a prompt: shown to SFT; labelled for training; held out to judge by

_SPECIAL = ["<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def true_reward(prompt: str, answer: str) -> float:
    """What an answer is worth: the formula above; an empty answer has length -1 and no other part."""
    mood, length, topic = _read(prompt)
    words = answer.split()
    if not words:
        return -1.0
    different = set(words)
    on_topic = min(len(different & set(TOPICS[topic])), 4) / 4
    wrong = sum(word in other for name, other in MOODS.items() if name != mood for word in words)
    felt = max(-1.0, min(1.0, (len(different & set(MOODS[mood])) - wrong) / 3))
    asked = LENGTHS[length]
    too_far = min(1.0, abs(len(words) - asked) / asked)
    content = sum(word not in FILLERS for word in words) / len(words)
    return on_topic + felt + content - too_far - (len(words) - len(different)) / len(words)


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """The prompts to train on and those held out; every combination is on one side."""
    combined = [
        f"write a {mood} {length} note about the {topic}"
        for mood, length, topic in itertools.product(MOODS, LENGTHS, TOPICS)
    ]
    random.Random(seed_for(seed, "prompts", 0)).shuffle(combined)
    return combined[:TRAIN_PROMPTS], combined[TRAIN_PROMPTS : TRAIN_PROMPTS + HELDOUT_PROMPTS]


def demonstration(prompt: str, source: random.Random) -> str:
    """An answer of a careless writer: now and then about another topic, in another mood, too short or too long."""
    mood, length, topic = _read(prompt)
    words = []
    for _ in range(max(2, min(MAX_NEW_TOKENS - 1, LENGTHS[length] + source.randint(-4, 4)))):
        kind = source.random()
        if kind < 0.3:
            words.append(source.choice(TOPICS[topic if source.random() < 0.7 else source.choice(list(TOPICS))]))
        elif kind < 0.55:
            words.append(source.choice(MOODS[mood if source.random() < 0.6 else source.choice(list(MOODS))]))
        else:
            words.append(source.choice(FILLERS))
    return " ".join(words)


def preferred(prompt: str, first: str, second: str, source: random.Random) -> tuple[str, str]:
    """The two answers, the one that a noisy reader prefers first."""
    gap = true_reward(prompt, first) - true_reward(prompt, second)
    return (first, second) if source.random() < 1 / (1 + math.exp(-SHARPNESS * gap)) else (second, first)


def write_rows(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """JSONL, one object a row."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_prompts_and_demonstrations(folder: Path, seed: int) -> None:
    """train.jsonl, heldout.jsonl and demonstrations.jsonl of a seed."""
    train, heldout = prompts(seed)
    source = random.Random(seed_for(seed, "demonstrations", 0))
    write_rows(folder / "train.jsonl", ({"prompt": prompt} for prompt in train))
    write_rows(folder / "heldout.jsonl", ({"prompt": prompt} for prompt in heldout))
    write_rows(
        folder / "demonstrations.jsonl",
        (
            {"prompt": prompt, "completion": demonstration(prompt, source)}
            for _ in range(DEMONSTRATIONS)
            for prompt in train
        ),
    )


def pairs(answers: Mapping[str, Sequence[str]], seed: int, purpose: str) -> list[dict[str, str]]:
    """Labelled pairs of each prompt's answers, taken two by two; equal or empty answers make none."""
    source = random.Random(seed_for(seed, purpose, 0))
    rows = []
    for prompt, given in answers.items():
        for first, second in zip(given[::2], given[1::2], strict=True):
            if first and second and first != second:
                chosen, rejected = preferred(prompt, first, second, source)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    source.shuffle(rows)
    return rows


def build_model(folder: Path, seed: int) -> None:
    """A Llama of two layers over whole words, with random weights, and its tokenizer."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.1, dtype="float32",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        torch.manual_seed(seed_for(seed, "weights", 0) % 2**63)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*ASKED, *FILLERS, *TOPICS, *MOODS, *LENGTHS, *itertools.chain(*TOPICS.values(), *MOODS.values())]
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    if len(vocabulary) < len(_SPECIAL) + len(words):
        raise ValueError("a word stands in two lists, so the true reward would count it twice")
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
        chat_template=_TEMPLATE, extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], model_max_length=128,
    )  # fmt: skip


def _read(prompt: str) -> tuple[str, str, str]:
    """Mood, length and topic that a prompt asks for."""
    _, _, mood, length, _, _, _, topic = prompt.split()
    return mood, length, topic
