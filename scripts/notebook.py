"""The notebook *Do Language Models Use Their Depth Efficiently?*, figure by figure, through hookdepth's Python API.

    python scripts/notebook.py                       # the demo model, figures in out/notebook
    python scripts/notebook.py FOLDER [MODEL]        # elsewhere, or of another model (hub id or folder)

The paper is 2505.13898; the notebook ran it through nnsight on a remote service. Needs `pip install hookdepth[demo]`.
"""

import sys
from pathlib import Path

import matplotlib

import hookdepth
from hookdepth.results import read_log

N_EXAMPLES = 2  # prompts, as in the notebook
PROBE = ("5 + 7 + 5 + 3 + 1 + 7 = ", "28")
FIGURES = {  # figure of the paper → figure of hookdepth
    "2a-relative-contribution": "residual-stats-contribution",
    "2b-cosine-similarity": "residual-stats-cosine",
    "3a-effect-on-later-layers": "skip-current-layer-effect",
    "3a-effect-on-the-output": "skip-current-layer-output",
    "3b-effect-on-future-tokens": "skip-future-layer-effect",
    "3b-effect-on-future-outputs": "skip-future-layer-output",
    "4a-logit-lens-kl": "logit-lens-kl",
    "4b-logit-lens-overlap": "logit-lens-overlap",
    "6a-integrated-gradients": "integrated-gradients-layer-0",
    "6b-residual-erasure": "residual-erasure-0",
}


def main(folder: Path, name: str) -> None:
    model = hookdepth.load(name)
    print(f"{model.name}: {model.n_layers} layers of width {model.d_model}")
    figures: dict[str, matplotlib.figure.Figure] = {}

    # Relative contributions and cosine similarities: what attention, MLP and both add to the residual stream.
    figures |= run(model, folder, "residual-stats")

    # The effect of each layer on later ones, at all tokens and at future tokens only: one run shares the work.
    figures |= run(model, folder, "skip-current", "skip-future")

    # Logit lens: from which layer on is the prediction there, and only refined?
    figures |= run(model, folder, "logit-lens")

    # Residual erasure: until which layer is each token of the sum needed? The uninformative residual is the mean
    # over the first ten prompts.
    figures |= run(model, folder, "residual-erasure", probes=[PROBE])

    # Integrated gradients: the same question, by attribution. `ig_method="riemann"` takes the notebook's 256 steps;
    # the default refines until the attributions add up to what they should.
    figures |= run(model, folder, "integrated-gradients", probes=[PROBE])

    for title, figure in FIGURES.items():
        figures[figure].savefig(folder / f"{title}.png", dpi=200)
        print(folder / f"{title}.png")


def run(model, folder, *analyses, **options):
    """The figures of some analyses. Results are kept, so that a script that was stopped goes on there."""
    results = hookdepth.analyse(model, analyses, limit=N_EXAMPLES, out=folder, **options)
    log = read_log(folder)
    for result in results.values():
        floor = result.metadata.get("null_effect")
        print(
            f"{result.analysis}: {log[result.analysis]['wall_time_s']} s" + (f", noise floor {floor}" if floor else "")
        )
    return {title: figure for result in results.values() for title, figure in hookdepth.plot(result).items()}


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0] if given else "out/notebook"), given[1] if len(given) > 1 else "demo")
