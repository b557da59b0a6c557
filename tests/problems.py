"""Problems for the planner, drawn at random: `@given(problems())`."""

from types import SimpleNamespace

from hypothesis import strategies as st

from hookdepth.engine.branches import Branch
from hookdepth.engine.interventions import Identity
from hookdepth.engine.machines import PassCost
from hookdepth.model.sites import SITES


def shapes(n_layers, width=4):
    """What a check asks of a model."""
    return SimpleNamespace(n_layers=n_layers, shape_of=lambda site, layer: (2, width // 2) if site == "z" else (width,))


@st.composite
def problems(draw):
    """Branches of every shape, of prompts of several lengths."""
    n_layers = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(2, 24), min_size=1, max_size=4))
    shared = []  # (prompt, interventions): branches of one family draw from here
    branches = []
    for _ in range(draw(st.integers(1, 24))):
        if shared and draw(st.booleans()):
            prompt, interventions = draw(st.sampled_from(shared))
        else:
            prompt = draw(st.integers(0, len(lengths) - 1))
            interventions = tuple(
                Identity(
                    draw(st.sampled_from(SITES)),
                    draw(st.integers(0, n_layers - 1)),
                    draw(
                        st.one_of(
                            st.just(slice(None)),
                            st.integers(0, lengths[prompt] - 1).map(lambda t: slice(t, None)),
                            st.lists(
                                st.integers(-lengths[prompt], lengths[prompt] - 1),
                                max_size=3,
                                unique_by=lambda t, n=lengths[prompt]: t % n,
                            ),
                        )
                    ),
                )
                for _ in range(draw(st.integers(1, 3)))
            )
            shared.append((prompt, interventions))
        length = lengths[prompt]
        cut = draw(st.none() | st.integers(1, length - 1))
        last = max(i.layer for i in interventions)
        until = draw(st.none() | st.integers(last, n_layers - 1))
        measured = draw(st.none() | st.lists(st.integers(cut or 0, length - 1), min_size=1, max_size=3, unique=True))
        branch = Branch(interventions, prompt, cut, until, measured)
        branch.check(shapes(n_layers), length)
        branches.append(branch)
    limits = {
        "max_row_tokens": draw(st.integers(1, 1200)),
        "max_rows": draw(st.none() | st.integers(3, 30)),
        "cost": PassCost(
            draw(st.sampled_from([0, 1, 8, 64])),
            draw(st.sampled_from([0, 0, 40, 1000])),
            draw(st.sampled_from([0, 200, 4096])),
        ),
        "changes_only": draw(st.booleans()),
        "max_kept_tokens": draw(st.none() | st.integers(1, 2000)),
    }
    only = draw(st.none() | st.sets(st.sampled_from(range(len(branches))), min_size=1))
    return branches, lengths, n_layers, limits, only
