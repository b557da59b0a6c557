"""Everything that can be chosen for a run, each option once: the command line, Python and metadata are made from it.

Nothing here needs torch, so that `hookdepth run --help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hookdepth.analyses.settings import Settings
from hookdepth.engine.machines import MACHINES
from hookdepth.errors import HookdepthError
from hookdepth.model.choices import ALSO_BITS, ALSO_DTYPE, DTYPES, KERNELS, QUANTIZATIONS
from hookdepth.options import one_of, option, pairs, switch, text, whole


def _anything(given: Any) -> Any:
    return given


@dataclass(frozen=True)
class Config(Settings):
    """A run: Config(limit=2, out="out/first"). `hookdepth run --help` explains every option."""

    model: Any = option("demo", "demo, a hub id or a folder", _anything, "demo|HUB_ID|FOLDER")
    dataset: str = option("demo", "a data set, a JSONL or a text file", text, "NAME|FILE")
    limit: int | None = option(None, "first N prompts (default: 10)", whole(1), "N")
    analyses: Any = option(
        "all", "all (the paper's eight), every, some of those below, or FILE.py:CLASS", _anything, "A,B,…"
    )
    probes: tuple[tuple[str, str], ...] | None = option(
        None,
        "repeatable; default: the data set's answers, or the paper's two",
        pairs,
        flag="--probe",
        metavar=("PROMPT", "ANSWER"),
        nargs=2,
        action="append",
    )
    seed: int = option(123, "of the cuts", whole(), "N")
    dtype: str = option(
        "auto", "auto, float32, bfloat16 or float16", one_of("dtype", *DTYPES, also=ALSO_DTYPE), "TYPE", group="how"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", text, "NAME", group="how")
    device_map: Any = option(None, "spread a large model, as accelerate does", _anything, "auto|FILE.json", group="how")
    quantize: str = option(
        "none",
        "none, 8bit or 4bit (bitsandbytes)",
        one_of("quantisation", *QUANTIZATIONS, also=ALSO_BITS),
        "BITS",
        group="how",
    )
    attn_implementation: str | None = option(
        None, "sdpa, eager, … (default: transformers' choice)", text, "NAME", group="how"
    )
    kernels: str = option(
        "plain", "plain, or fused (a GPU, hookdepth[gpu])", one_of("kernels", *KERNELS), "NAME", group="how"
    )
    revision: str | None = option(None, "of a hub id", text, "NAME", group="how")
    out: str | None = option(None, "folder for results, figures and report.html", text, "DIR", group="where")
    overwrite: bool = option(False, "replace results of other settings", switch, group="where", action="store_true")
    strict: bool = option(False, "fail where the noise floor is not 0", switch, group="where", action="store_true")
    dry_run: bool = option(
        False, "print work, memory and time, load no weights, and stop", switch, group="where", action="store_true"
    )
    on: str | None = option(
        None,
        f"with --dry-run: a machine that need not be there ({', '.join(MACHINES)}), or all",
        one_of("machine", *MACHINES, "all"),
        "MACHINE",
        group="where",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on and not self.dry_run:
            raise HookdepthError(f"--on {self.on} plans for a machine that need not be there", "add --dry-run")
        if self.on and self.device != "auto":
            raise HookdepthError(f"--on {self.on} and --device {self.device}", "give one of them")

    @property
    def settings(self) -> Settings:
        """Those that the analyses read."""
        return Settings(**{one.name: getattr(self, one.name) for one in fields(Settings)})

    @property
    def of_model(self) -> dict[str, Any]:
        """Those that say how a model is loaded."""
        names = ("dtype", "device", "device_map", "quantize", "attn_implementation", "revision", "kernels")
        return {name: getattr(self, name) for name in names}
