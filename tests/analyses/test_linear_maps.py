"""linear-maps against a loop over pairs in float64, against known maps, and against the authors' way of training."""

import naive
import pytest
import torch
from test_against_naive import results_of
from tiny_models import prompts, tiny_model
from tiny_tokenizer import tiny_tokenizer

import hookdepth
from hookdepth.analyses import Inputs
from hookdepth.analyses.alignment import aligned
from hookdepth.analyses.map_errors import _in_pairs, _Point, _sums
from hookdepth.analyses.ridge import RIDGES, Fit, ridge_map, split_prompts
from hookdepth.analyses.settings import Settings
from hookdepth.analyses.subject import Subject
from hookdepth.errors import HookdepthError

SMALL = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
IDS = prompts(18, (36, 30))


def small(seed=0, **overrides):
    return tiny_model("llama-gqa", seed, **{**SMALL, **overrides})


def maps(source, target=None, ids=IDS, **settings):
    inputs = Inputs(tuple(map(tuple, ids)))
    target = target and hookdepth.wrap(target)
    return results_of(["linear-maps"], hookdepth.wrap(source), inputs, target=target, **settings)["linear-maps"]


def states(hf, numbers, front=1):
    """[point, token, width] in float64, prompt after prompt."""
    streams = [torch.stack([h[0, front:] for h in naive.run_with(hf, IDS[n]).stream()]) for n in numbers]
    return torch.cat(streams, 1).double().detach()


def plain_ridge(x, y):
    """Of (train, valid, test) pairs: the test prediction of the ridge that is best on valid, by solving each."""
    mean, spread = x[0].mean(0), x[0].std(0, unbiased=False)
    x = [(one - mean) / spread for one in x]
    around = y[0].mean(0)
    gram = x[0].T @ x[0]
    unit = torch.linalg.eigvalsh(gram).mean()
    best, chosen = torch.inf, torch.zeros_like(y[2])
    for ridge in RIDGES[:-1]:
        weight = torch.linalg.solve(gram + ridge * unit * torch.eye(len(gram)), x[0].T @ (y[0] - around))
        cost = (y[1] - around - x[1] @ weight).square().sum()
        if cost < best:
            best, chosen = cost, x[2] @ weight
    return around + (0 if (y[1] - around).square().sum() < best else chosen)


@pytest.fixture(scope="module")
def pair():
    return small(), small(1, num_hidden_layers=4, hidden_size=40)


def test_against_a_loop_over_pairs(pair):
    source, target = pair
    ours = maps(source, target)
    parts = split_prompts(len(IDS))
    assert sorted(number for part in parts for number in part) == list(range(len(IDS)))
    x, y = ([states(hf, part) for part in parts] for hf in pair)
    assert ours["r2"].shape == (4, 5)
    for i in range(4):
        for j in range(5):
            true = y[2][j]
            rest = true - plain_ridge([one[i] for one in x], [one[j] for one in y])
            relative = (rest.norm(dim=-1) / true.norm(dim=-1)).mean()
            r2 = 1 - rest.square().sum() / (true - true.mean(0)).square().sum()
            assert ours["relative_error"][i, j].item() == pytest.approx(relative.item(), abs=2e-4)
            assert ours["r2"][i, j].item() == pytest.approx(r2.item(), abs=4e-4)


def test_a_source_is_solved_once_however_many_tiles_there_are(pair, monkeypatch):
    whole, solved = maps(*pair), []
    init = Fit.__init__
    monkeypatch.setattr(Fit, "__init__", lambda fit, *given: (solved.append(1), init(fit, *given))[1])
    monkeypatch.setattr("hookdepth.analyses.map_errors.tiles", lambda count, _: (slice(n, n + 1) for n in range(count)))
    tiled = maps(*pair)
    assert len(solved) == 4
    for name, value in whole.items():
        assert torch.allclose(tiled[name], value, atol=1e-4)


def test_a_model_onto_a_copy_is_as_onto_itself(pair, monkeypatch):
    """Half of the sums are taken of a model onto itself, and all of two models."""
    monkeypatch.setattr("hookdepth.analyses.map_errors.tiles", lambda count, _: iter([slice(0, 3), slice(3, count)]))
    itself, two = maps(pair[0]), maps(pair[0], small())
    for name, value in two.items():
        assert torch.allclose(itself[name], value, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_sums_with_tokens_exchanged(tokens):
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(tokens, width, generator=draw) for width in (3, 4))
    order = torch.randperm(tokens, generator=draw)
    half = tokens // 2
    other = torch.arange(tokens)
    other[order[:half]], other[order[half : 2 * half]] = order[half : 2 * half], order[:half]
    assert (other != torch.arange(tokens)).sum() == 2 * half, "all but one of an odd number change places"
    points = [_Point([_in_pairs(one, order)] * 2, one, one, one) for one in (x, y)]
    plain, exchanged = _sums(*points)
    assert torch.allclose(plain.train.float(), x.T @ y, atol=1e-5)
    assert torch.allclose(exchanged.valid, x.T @ y[other], atol=1e-5)


def test_each_test_prompt_has_its_own(pair):
    ours = maps(*pair)
    _, _, test = split_prompts(len(IDS))
    tokens = torch.tensor([len(IDS[number]) - 1 for number in test], dtype=torch.float64)[:, None, None]
    for name in ("relative_error", "permuted_error"):
        own = ours[f"per_prompt.{name}"].double()
        assert own.shape == (9, 4, 5)
        assert torch.allclose((own * tokens).sum(0) / tokens.sum(), ours[name].double(), atol=1e-6)


def test_a_model_is_a_linear_function_of_itself(pair):
    ours = maps(pair[0])
    assert ours["relative_error"].diag().max() <= 1e-3
    assert ours["r2"].diag().min() > 0.999
    assert ours["permuted_error"].min() > 0.5


def test_a_known_map_between_two_models_is_found():
    """The target's embeddings are a random linear map of the source's; what its layers make of them is not."""
    source, target = small(), small(1, hidden_size=48)
    mixing = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        target.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight @ mixing)
    ours = maps(source, target)
    assert ours["relative_error"][0, 0] < 1e-3
    assert ours["relative_error"][0, 3] > 0.1


@pytest.mark.parametrize("seed", range(6))
def test_the_weights_of_a_known_map(seed):
    """Among ridges that float32 cannot tell apart by their error, one that is too large would spoil them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 12, generator=draw) * torch.logspace(-1, 2, 12)
    truth, offset = torch.randn(12, 7, generator=draw), torch.randn(1, 7, generator=draw)
    y = x @ truth + offset
    weight, bias = ridge_map((x[:300], x[300:]), (y[:300], y[300:]))
    assert torch.allclose(weight, truth, atol=1e-3)
    assert torch.allclose(x @ weight + bias, y, atol=1e-2)


@pytest.mark.parametrize(("width", "different", "tokens"), [(32, 20, 400), (64, 20, 3000), (48, 47, 400)])
def test_features_that_never_vary_on_their_own_predict_nothing_of_new_tokens(width, different, tokens):
    """As of embeddings, where fewer tokens than features differ: what float32 leaves there would be divided by itself.

    The tokens that choose the ridge are among those that train, and so cannot tell.
    """
    draw = torch.Generator().manual_seed(0)
    words, others = torch.randn(different, width, generator=draw), torch.randn(different, 8, generator=draw)
    ids = torch.randint(different, (tokens + 200,), generator=draw)
    x, y = words[ids], others[ids]
    weight, bias = ridge_map((x[:tokens], x[tokens:]), (y[:tokens], y[tokens:]))
    assert torch.allclose(x @ weight + bias, y, atol=1e-2)
    mean, offset = x[:tokens].double().mean(0), y[:tokens].double().mean(0)
    spread = (x[:tokens].double() - mean).norm(dim=0)
    least = torch.linalg.lstsq((x[:tokens] - mean) / spread, y[:tokens] - offset, rcond=1e-6, driver="gelsd").solution
    new = torch.randn(500, width, generator=draw).double()
    expected = (new - mean) / spread @ least
    assert ((new @ weight.double() + bias - offset) - expected).norm() < 0.02 * expected.norm()


def test_a_target_that_nothing_predicts_gets_its_mean():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 12, generator=draw), torch.randn(60, 3, generator=draw) + 5
    weight, bias = ridge_map((x[:48], x[48:]), (y[:48], y[48:]))
    assert not weight.any() or weight.abs().max() < 0.3
    assert torch.allclose(bias, y[:48].mean(0), atol=0.3)


def test_the_authors_training_is_no_better(pair):
    """A linear layer by AdamW on the same tokens, from a point of a model to all of its points."""
    ours, parts = maps(pair[0]), split_prompts(len(IDS))
    x = y = [states(pair[0], part).float() for part in parts]
    layer = torch.nn.Linear(32, 4 * 32)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for _ in range(400):
        loss = (layer(x[0][2]).view(-1, 4, 32) - y[0].transpose(0, 1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        rest = layer(x[2][2]).view(-1, 4, 32).transpose(0, 1) - y[2]
    r2 = 1 - rest.square().sum((1, 2)) / (y[2] - y[2].mean(1, keepdim=True)).square().sum((1, 2))
    assert (ours["r2"][2] >= r2 - 0.02).all()
    assert r2.max() > 0.1, "it has learnt something"


@pytest.mark.parametrize(("ids", "said"), [(IDS[:6], "too few for linear-maps"), (IDS[:2], "cannot be split in three")])
def test_too_little_to_learn_from_is_refused(ids, said):
    with pytest.raises(HookdepthError, match=said):
        maps(small(), ids=ids)


def test_tokens_of_two_tokenizers_meet_where_both_have_read_the_same():
    text = "Anna has 12 apples and a full basket of the town"
    one, other = tiny_tokenizer(), tiny_tokenizer("metaspace", bos=True)
    source, target = hookdepth.wrap(small(), one), hookdepth.wrap(small(1), other)
    ids = tuple(one(text)["input_ids"])
    subject = Subject(source, Inputs((ids,), texts=(text,)), Settings())
    own, places, theirs, their_places = aligned(subject, target, 0, 1)
    assert own == ids
    assert theirs == tuple(other(text)["input_ids"])
    assert len(places) == len(their_places) > 5
    for place, their_place in zip(places, their_places, strict=True):
        read = one.decode(own[: place + 1])
        assert text.startswith(read)
        assert other.decode(theirs[1 : their_place + 1]).strip() == read.strip()
    with pytest.raises(HookdepthError, match="the prompts have no text"):
        aligned(Subject(source, Inputs((ids,)), Settings()), target, 0, 1)
    with pytest.raises(HookdepthError, match="the target has no tokenizer"):
        aligned(subject, hookdepth.wrap(small(1)), 0, 1)


def test_a_run_knows_its_target(tmp_path, pair):
    source, target = (hookdepth.wrap(hf, tiny_tokenizer(), name=name) for hf, name in zip(pair, "ab", strict=True))
    texts = ["Anna has 12 apples and eats 3 of them, so she has 12 - 3 = 9 apples and a full basket."] * 20
    run = {"texts": texts, "out": str(tmp_path / "out")}
    result = hookdepth.analyse(source, "linear-maps", target=target, **run)
    assert result.metadata["settings"]["target"] == "b"
    assert result.metadata["settings"]["target_model"]["n_layers"] == 4
    assert "linear-maps-relative_error" in hookdepth.plot(result)
    with pytest.raises(HookdepthError, match="target"):
        hookdepth.analyse(source, "linear-maps", **run)
