"""How figures are drawn, with matplotlib: imported only when something is drawn."""

import os
import sys
from contextlib import suppress


def _import_matplotlib() -> None:
    """Import matplotlib in a way that a backend that is not there does not stop: figures here need none.

    It takes MPLBACKEND as its last step and fails where it does not know the name. Left out and handed over
    afterwards, a good one means what it always does.
    """
    if "matplotlib" in sys.modules:
        return
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = wanted


_import_matplotlib()
