"""`rlhf chat`: a conversation with a model, or with the policy of a run, on a terminal or through a pipe."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.cli.before_after import printable
from rlhf.cli.exit_codes import BAD_INPUT, DONE
from rlhf.cli.export import newest_policy
from rlhf.cli.run_directory import CONFIG_FILE
from rlhf.config import ModelConfig
from rlhf.config_section import LEAST_TEMPERATURE, MOST_TEMPERATURE
from rlhf.data.conversations import written_by_template
from rlhf.errors import BadInput
from rlhf.models.resolve import check_model, resolve
from rlhf.models.score_head import check_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLACE = "RUN_DIR_OR_MODEL"
HINT = "empty line or Ctrl-D: end; /new: forget the conversation"


class TurnTooLong(Exception):
    """The conversation with this turn has more tokens than the model has positions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_DIR_OR_MODEL", help="run directory, model folder, `smollm2`, or hub name")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling with --temperature above 0")
    parser.add_argument("--system", metavar="TEXT", help="system message")


def run(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    folder = _folder(arguments.model)
    import torch
    from transformers import AutoConfig

    from rlhf.models.load import load_model, load_tokenizer
    from rlhf.models.own_code import check_own_code, check_readable

    check_language_model(str(folder), PLACE)
    check_own_code(str(folder), PLACE, trust_remote_code=False)
    check_readable(str(folder), PLACE, trust_remote_code=False)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    half = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype in (torch.bfloat16, torch.float16)
    model = load_model(ModelConfig(name=str(folder)), "bfloat16" if half else "float32")
    _check_finite(model)
    torch.manual_seed(arguments.seed)  # transformers' generate knows only the global generator
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    conversation = list(opening)
    terminal = sys.stdin.isatty()
    if terminal:
        print(HINT)
    refused = False
    while (line := _next_line(terminal)) is not None:
        if line == "/new":
            conversation = list(opening)
            continue
        conversation.append({"role": "user", "content": line})
        try:
            answer = reply(model, tokenizer, conversation, arguments.max_new_tokens, arguments.temperature)
        except TurnTooLong as error:
            print(f"rlhf: {error}", file=sys.stderr, flush=True)
            conversation.pop()
            refused = True
            continue
        conversation.append({"role": "assistant", "content": answer})
        print(printable(answer), flush=True)
    return BAD_INPUT if refused and not terminal else DONE


def reply(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversation: list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
) -> str:
    """The model's next turn. Without a chat template the turns are put one after the other as plain lines.

    Raises TurnTooLong where the model has no position left for an answer; one that comes to the last position ends."""
    import torch

    if tokenizer.chat_template is None:
        text = "\n".join(turn["content"] for turn in conversation) + "\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        text = written_by_template(conversation, tokenizer, PLACE, opening=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    max_new_tokens = min(max_new_tokens, _room(model, ids.shape[1]))
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, top_p=None, top_k=None, **sampling
        )
    said = output[0] if model.config.is_encoder_decoder else output[0, ids.shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True)).strip()


def _room(model: "PreTrainedModel", tokens: int) -> int:
    """How many tokens an answer to so many may have; behind its last position a model says anything."""
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if not isinstance(limit, int):  # T5 counts distances
        return sys.maxsize
    if tokens >= limit:
        raise TurnTooLong(
            f"this turn is not answered: with it the conversation has {tokens} tokens, and the model has {limit} "
            "positions (max_position_embeddings). Next: a shorter line, or /new to forget the conversation"
        )
    return limit if model.config.is_encoder_decoder else limit - tokens


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {arguments.max_new_tokens}: expected 1 or more")
    if arguments.temperature != 0 and not LEAST_TEMPERATURE <= arguments.temperature <= MOST_TEMPERATURE:  # also NaN
        allowed = f"{LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
        raise BadInput(f"--temperature {arguments.temperature:g}: expected 0 (greedy), or {allowed}")
    if not 0 <= arguments.seed < 2**63:
        raise BadInput(f"--seed {arguments.seed}: expected a whole number from 0 to 2^63 - 1")


def _check_finite(model: "PreTrainedModel") -> None:
    """A model that diverged would answer token 0 for ever, or fail in the middle of a sampled answer."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(f"{PLACE}: the model holds values that are no finite numbers, first in {name}")


def _folder(name: str) -> Path:
    if (Path(name) / CONFIG_FILE).is_file():
        return newest_policy(Path(name))
    check_model(name)
    return resolve(name)


def _next_line(terminal: bool) -> str | None:
    """The next line with something in it; None when there is no more, or a person gives an empty one."""
    while True:
        if terminal:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
            line.encode()  # Python may have read bytes that are no text as halves of characters
        except UnicodeError as error:
            raise BadInput(f"standard input: a line is not text in {sys.stdin.encoding}; expected UTF-8") from error
        if line.strip():
            return line.strip()
        if terminal or not line:
            return None
