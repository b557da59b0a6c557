"""Any way of naming tokens of a prompt, for hypothesis."""

from hypothesis import strategies as st

LENGTH = 10


def some_tokens():
    """`@given(some_tokens())`: slices, lists and ranges that lie in a prompt of `LENGTH` tokens."""
    number = st.none() | st.integers(-12, 12)
    slices = st.builds(slice, number, number, st.sampled_from([None, 1, 2, 3, -1, -2]))
    return (
        slices
        | st.lists(st.integers(-LENGTH, LENGTH - 1), max_size=6, unique_by=lambda token: token % LENGTH)
        | st.just(range(2, 7))
    )
