"""Code of a page or of the README, run as a script in this process: imports that are done already cost nothing.

run_script('import hookdepth\\nprint(hookdepth.__version__)', tmp_path, monkeypatch)
"""

import runpy

import torch

from hookdepth.analyses import registry


def run_script(code, folder, monkeypatch):
    """Run it in `folder`, with no name but its own, as a process that has not met the classes of others."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_SEEN", {})
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")
    script.unlink()
