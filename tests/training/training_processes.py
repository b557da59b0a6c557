"""One of two processes that train together over gloo: `python training_processes.py RANK FOLDER`.

Everything is checked here, by assertion; the process that started it looks at the exit status. Tests that need two
processes are in test_processes.py, which starts them once.
"""

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_runs import assert_close, assert_same, expected_stats, fresh_model, make_batches, n_hooks, train

from hookdepth.data import Probe
from hookdepth.errors import HookdepthError
from hookdepth.training import DepthMonitor, load_history
from hookdepth.training.probing import Probes
from hookdepth.training.wrapping import unwrap

IDS = list(range(3, 20))
PROBES = ["logit-lens", "skip-current", "residual-erasure"]
PROMPTS = [Probe("a", "b", tuple(IDS[:8]), tuple("abcdefgh"), (6, 7)), IDS]


def batches_of(rank, n=3):
    """Each rank has its own, with other padding, so that means over ranks must be weighted by tokens."""
    return make_batches(n, padding=((0, 1), (4, 7))[rank], seed=rank)


def watch(call, folder, rank, **options):
    """Every rank names its own folder; rank 0 alone may write to it."""
    return DepthMonitor(call, 1, probes=PROBES, prompts=PROMPTS, out=folder / f"rank{rank}", strict=True, **options)


def check_written(folder, rank, start_of_first_step):
    """Rank 0 alone wrote; its numbers are those of all ranks' tokens, its probes those of a plain model."""
    distributed.barrier()
    if rank:
        assert not (folder / "rank1").exists()
        return
    history = load_history(folder / "rank0")
    assert list(history["residual-stats"]) == [0, 1, 2]
    everyone = batches_of(0, 1) + batches_of(1, 1)
    assert_close(history["residual-stats"][0], expected_stats(start_of_first_step, everyone))
    for name, found in Probes(PROBES, PROMPTS).run(unwrap(start_of_first_step)).items():
        assert_close(history[name][0], found["tensors"], 1e-4)


def check_refused(call):
    """A probe beyond the embedding, of which this process may hold a part only: no rank waits for another."""
    DepthMonitor(call, 1, probes=["logit-lens"], prompts=[[299]])
    with pytest.raises(HookdepthError, match="embeds 0 to 299"):
        DepthMonitor(call, 1, probes=["logit-lens"], prompts=[[300]])


def ddp(rank, folder):
    """Weights, optimiser and random state as without the monitor; statistics over both ranks' tokens."""

    def run(monitored):
        model = fresh_model(attention_dropout=0.0)
        call = DistributedDataParallel(model)
        check_refused(call)
        monitor = watch(call, folder / "ddp", rank) if monitored else None
        return train(model, batches_of(rank), monitor, call=call)

    assert_same(run(False), run(True))
    check_written(folder / "ddp", rank, fresh_model(attention_dropout=0.0))


def ddp_with_an_error_on_one_rank(rank, _folder):
    """The rank that fails must not leave the other waiting; both end the diagnostic, neither the training."""

    def broken(inputs):
        if rank == 1:
            raise RuntimeError("only here")

    lines = Lines()
    logging.getLogger("hookdepth.training").addHandler(lines)
    model = fresh_model()
    call = DistributedDataParallel(model)
    monitor = DepthMonitor(call, 1, mask=broken)
    watched = train(model, batches_of(rank), monitor, call=call)
    plain = fresh_model()
    assert_same(train(plain, batches_of(rank), call=DistributedDataParallel(plain)), watched)
    assert len(lines.said) == 1, lines.said
    assert ("only here" if rank == 1 else "another rank") in lines.said[0]
    assert n_hooks(model) == 0


class Lines(logging.Handler):
    """Keeps what was logged."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def sharded():
    """A model cut up over both processes: each layer, and the rest."""
    model = fresh_model(attention_dropout=0.0)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2(rank, folder):
    """As `ddp`; hooks that FSDP2 itself has registered stay, ours go."""

    def run(monitored):
        model = sharded()
        check_refused(model)
        monitor = watch(model, folder / "fsdp2", rank) if monitored else None
        found = train(model, batches_of(rank), monitor)
        found["weights"] = {name: value.full_tensor() for name, value in found["weights"].items()}
        found["optimiser"] = [
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in found["optimiser"]
        ]
        return found

    assert_same(run(False), run(True))
    check_written(folder / "fsdp2", rank, fresh_model(attention_dropout=0.0))


def main(rank, folder):
    """Join the other process, run every check."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for check in (ddp, ddp_with_an_error_on_one_rank, fsdp2):
        check(rank, folder)
        distributed.barrier()
        (folder / f"{check.__name__}.{rank}").touch()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
