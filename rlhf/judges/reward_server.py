"""A server as a judge: POST JSON {prompts, completions, columns}, answered with {"rewards": [number or null, ...]}.

prompts, completions and each of the columns hold one entry a sample, as a reward function gets them.
"""

import json

from rlhf.config import RewardSource
from rlhf.errors import JudgeFailed
from rlhf.experience import REWARD, Columns, Group
from rlhf.judges.patience import refuse_unscored
from rlhf.judges.post import ServerFailed, check_address, hidden, post_json, read_token
from rlhf.judges.worker import WrongAnswer, checked


class RewardServerJudge:
    """Fills `reward` with what a server says; one request a group, one at a time.

    Raises JudgeFailed, naming address, status and prompt, for any answer but one finite number or null a sample, and
    for none within the time limit.
    """

    def __init__(self, source: RewardSource, key: str) -> None:
        if source.server is None:
            raise ValueError(f"{key}.server is not set")
        self._address, self._timeout_s = source.server, source.timeout_s
        self._variable, self._key = source.token_env, key

    def setup(self) -> None:
        """Reads the token. Raises BadInput when its variable is not set, or the address is none. Whether the server is
        up is seen later."""
        check_address(self._address, f"{self._key}.server")
        self._token = read_token(self._variable, f"{self._key}.token_env")

    def judge(self, group: Group) -> Columns:
        """The reward of each sample of the group."""
        count = len(group.samples)
        body = {
            "prompts": [group.prompt.content] * count,
            "completions": [sample.text for sample in group.samples],
            "columns": {name: [value] * count for name, value in group.prompt.columns.items()},
        }
        try:
            json.dumps(body)
        except TypeError as error:
            raise self._failed(group, f"a column of the data cannot be sent as JSON: {error}", again=False) from error
        try:
            answer = post_json(self._address, body, self._token, self._timeout_s)
        except ServerFailed as error:
            raise self._failed(group, str(error), again=error.again) from error
        if not isinstance(answer, dict) or "rewards" not in answer:
            found = f"the keys {sorted(answer)}" if isinstance(answer, dict) else f"a {type(answer).__name__}"
            raise self._failed(group, f"{self._address} answered with {found}; expected rewards", again=True)
        try:
            columns = Columns(group.prompt.id, {REWARD: checked(answer["rewards"], count)}, {})
        except WrongAnswer as error:
            raise self._failed(group, f"{self._address} gave a wrong answer: {error}", again=True) from error
        refuse_unscored(group, columns, f"{self._address} answered null for each")
        return columns

    def close(self) -> None:
        """Nothing to end: each request has a connection of its own."""

    def _failed(self, group: Group, what: str, *, again: bool) -> JudgeFailed:
        what, where = hidden(what, self._token), f"prompt {group.prompt.id} (row {group.prompt.row})"
        return JudgeFailed(f"reward server: {what}\n{where}", f"reward server: {what}", again=again)
