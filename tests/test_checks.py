"""`verify` finds what is planted: ten faults of engine and adapter, each of which must be called wrong."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

import hookdepth
from hookdepth import checks
from hookdepth.checks import verify
from hookdepth.cli import main
from hookdepth.engine import forward
from hookdepth.engine.measured import MeasuredTokens
from hookdepth.engine.rows import RowTable
from hookdepth.errors import HookdepthError
from hookdepth.model import sites
from hookdepth.model.kv_cache import PrefixCache
from hookdepth.model.sites import Sites


@pytest.fixture
def plant(monkeypatch):
    """Faults come after the self-check: it is `verify`'s own comparison that must see them."""
    monkeypatch.setattr(checks, "check", lambda model: None)
    return monkeypatch.setattr


def kinds(model):
    return {one.kind for one in verify(model, n=4).verdicts if one.verdict == "wrong"}


def model_of(name="llama-gqa"):
    return hookdepth.wrap(tiny_model(name, num_hidden_layers=3))


def test_a_sound_model_is_right():
    found = verify(model_of(), n=4)
    assert found.ok, f"\n{found}"
    assert {one.kind for one in found.verdicts} == set(checks.KINDS)
    assert all(one.effect > 0 for one in found.verdicts), f"\n{found}"
    assert json.loads(found.json())["ok"] is True


def test_16_bits_are_rounding():
    model = hookdepth.wrap(tiny_model("llama-gqa", num_hidden_layers=3).bfloat16())
    assert verify(model, n=2).ok


def test_1_a_hook_edits_the_wrong_row(plant):
    right = forward._Pass._edit_rows
    plant(forward._Pass, "_edit_rows", lambda self, *a: torch.roll(right(self, *a), 1, 0))
    assert "several" in kinds(model_of())


def test_2_a_mask_off_by_one(plant):
    model = model_of()  # before the fault: the self-check would do without prefixes
    plant(
        PrefixCache, "get_mask_sizes", lambda self, query, layer_idx=0: (self.start + int(query), int(self.start > 0))
    )
    assert "cuts" in kinds(model)


def test_3_keys_of_another_branch(plant):
    right = RowTable.prefix_rows
    plant(RowTable, "prefix_rows", lambda self, layer, recorded: right(self, layer, recorded)[::-1])
    assert "cuts" in kinds(model_of())


def test_4_a_scale_left_out(plant):
    model = model_of("granite")
    plant(forward, "rescaled", lambda change, raw, scale: change(raw))
    assert kinds(model) & {"sites", "several"}


def test_5_rotary_positions_off_by_the_prefix(plant):
    model = model_of()  # before the fault: the self-check would do without prefixes
    plant(PrefixCache, "get_seq_length", lambda self, layer_idx=0: 0)
    assert "cuts" in kinds(model)


def test_6_a_sublayers_output_taken_before_its_norm(plant):
    model = model_of("gemma2")
    right = Sites.on

    def before_the_norm(self, site, layer, edit, raw=False):
        if site == "mlp_out":
            return self._rows_apart(layer, own := self.found.contributions[layer]["mlp"], edit, own.reads, hook)
        return right(self, site, layer, edit, raw)

    from hookdepth.model.hooks import output_hook as hook

    plant(Sites, "on", before_the_norm)
    assert kinds(model) & {"sites", "several", "tokens"}


def test_7_a_head_index_off_by_one(plant):
    right = sites.by_head

    def shifted(edit, heads):
        return right(lambda z: None if (new := edit(z.roll(1, -2))) is None else new.roll(-1, -2), heads)

    plant(sites, "by_head", shifted)
    assert "heads" in kinds(model_of())


def test_8_a_cuts_prefix_from_the_clean_run(plant):
    def clean(self, layer, recorded):
        place = {recorded.keys[id_]: n for n, id_ in enumerate(recorded.layers[layer].attending)}
        return [place[self.keys[self.clean_id(id_)]] for id_ in self.layers[layer].attending]

    plant(RowTable, "prefix_rows", clean)
    assert "cuts" in kinds(model_of())


def test_9_padding_is_seen(plant):
    right = forward._Pass.__init__

    def padded(self, model, table, branches, lengths, *more):
        right(self, model, table, branches, lengths, *more)
        self.lengths = [max(lengths)] * len(lengths)

    plant(forward._Pass, "__init__", padded)
    assert "lengths" in kinds(model_of())


def test_10_a_reduction_over_tokens_that_are_not_measured(plant):
    right = MeasuredTokens.reduce

    def whole(self, *given):
        return right(replace(self, mask=torch.ones_like(self.mask)), *given)

    plant(MeasuredTokens, "reduce", whole)
    assert kinds(model_of())


def test_what_is_no_model_is_refused():
    with pytest.raises(HookdepthError, match="give what load or wrap gave"):
        verify("demo")
    with pytest.raises(HookdepthError, match="number of branches"):
        verify(model_of(), n=0)


def test_the_command_line(tmp_path, capsys):
    hf = tiny_model("llama-gqa", num_hidden_layers=2)
    hf.save_pretrained(tmp_path / "model")
    assert main(["families"]) == 0
    assert "gpt_neox" in capsys.readouterr().out
