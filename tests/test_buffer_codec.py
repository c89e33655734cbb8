"""Groups and columns as bytes and back."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.buffer.codec import decode_column, decode_group, encode_column, encode_group
from rlhf.experience import Columns, Group, Prompt, Sample, Sampling

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def groups(draw) -> Group:
    token_names = draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=2))
    score_names = draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=2))
    samples = []
    for index in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, 4))
        column = st.lists(floats32, min_size=length, max_size=length).map(lambda v: np.array(v, np.float32))
        ids = st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length).map(lambda v: np.array(v, np.int32))
        mask = st.lists(st.booleans(), min_size=length, max_size=length).map(lambda v: np.array(v, np.bool_))
        sampled = draw(st.booleans())
        samples.append(
            Sample(
                index=index,
                token_ids=draw(ids),
                loss_mask=draw(mask),
                text=draw(st.text()),
                finish_reason=draw(st.sampled_from(["stop", "length", "given"])),
                behavior_logprobs=draw(column) if sampled else None,
                versions=draw(ids) if sampled else None,
                sampling=draw(st.none() | st.just(Sampling(0.3, 0.9, 5, 7))),
                seed=draw(st.none() | st.integers(0, 2**63 - 1)),
                scores={n: draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)) for n in score_names},
                tokens={name: draw(column) for name in token_names},
            )
        )
    content = draw(st.text() | st.lists(st.dictionaries(st.text(), json_values, max_size=2), max_size=2))
    prompt_ids = np.array(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)), np.int32)
    columns = draw(st.dictionaries(st.text(), json_values, max_size=3))
    prompt = Prompt(draw(st.integers(0, 2**40)), 1, 2, content, draw(st.text()), prompt_ids, columns)
    return Group(prompt, tuple(samples), draw(st.sampled_from(["policy", "dataset"])))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(group=groups())
def test_a_group_comes_back_bit_for_bit(plain, group: Group):
    """Any names, texts, floats, lengths (0 too), None. Not covered: payloads of many megabytes."""
    back = decode_group(encode_group(group))
    assert plain(back) == plain(group)
    assert [list(s.tokens) for s in back.samples] == [list(s.tokens) for s in group.samples]


def test_columns_come_back_with_none_numpy_floats_and_strided_arrays():
    """A judge may answer with numpy scalars and with views into a larger array."""
    wide = np.arange(12, dtype=np.float32).reshape(6, 2)
    columns = Columns(3, {"reward": [None, 0.1, np.float32(0.1)]}, {"values": [wide[:, 0], wide[:0, 1], wide[::2, 1]]})
    scores = decode_column(3, "reward", encode_column(columns, "reward")).scores["reward"]
    assert scores == [None, 0.1, float(np.float32(0.1))]
    for back, given_ in zip(
        decode_column(3, "values", encode_column(columns, "values")).tokens["values"],
        columns.tokens["values"],
        strict=True,
    ):
        assert back.dtype == np.float32 and np.array_equal(back, given_)
