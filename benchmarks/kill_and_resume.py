"""A data set measured in one piece, killed and resumed, and by two processes: are the tensors the same, byte by byte?

    python benchmarks/kill_and_resume.py --prompts 200 --out FOLDER

Three runs of `hookdepth run` on the demo data, repeated as needed: undisturbed; killed by SIGKILL three times
at random and resumed with the same command; and with two processes under `accelerate launch`, one of which is
killed once. Prints the resident memory of the first over time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hookdepth.data import load_examples
from hookdepth.runs.contract import load_folder

UNITS = "*.safetensors"
ALONE = [sys.executable, "-m", "hookdepth"]
# --multi_gpu is the launcher's word for several processes; without GPUs they run on the CPU.
TEAM = [*(sys.executable, "-m", "accelerate.commands.launch"), "--multi_gpu", "--num_processes", "2", "-m", "hookdepth"]


def main() -> None:
    """Run the three, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--words", type=int, help="only so many words of each prompt")
    parser.add_argument("--analyses", default="residual-stats,logit-lens,skip-current")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = write_prompts(options.out / "prompts.jsonl", options.prompts, options.words)
    common = ["--dataset", str(data), "--limit", str(options.prompts), "--analyses", options.analyses]
    dice = random.Random(options.seed)

    whole = run([*ALONE, "run", *common, "--out", str(options.out / "whole")])
    assert whole["status"] == 0, whole
    print(f"whole: {whole['seconds']:.0f} s, resident {whole['resident']} MiB over time, peak {whole['peak']} MiB")

    command = [*ALONE, "run", *common, "--out", str(options.out / "killed")]
    deaths = []
    for _ in range(3):
        dead = run(command, kill_after=whole["seconds"] * dice.uniform(0.1, 0.35))
        assert dead["status"] == -signal.SIGKILL, "it was done before it could be killed"
        deaths.append({"after_s": dead["seconds"], "kept": kept(options.out / "killed")})
        print(f"killed after {dead['seconds']:.1f} s; {deaths[-1]['kept']} files kept")
    resumed = run(command)
    assert resumed["status"] == 0, resumed

    command = [*TEAM, "run", *common, "--out", str(options.out / "workers")]
    died = run(command, kill_one_after=whole["seconds"] * dice.uniform(0.1, 0.3))
    assert died["status"] not in (0, None), "the launcher must fail where one of its processes dies"
    print(f"one of two killed: launcher ended {died['until_end']:.1f} s later with status {died['status']}")
    workers = run(command)
    assert workers["status"] == 0, workers

    expected = tensors(options.out / "whole")
    same = {name: tensors(options.out / name) == expected for name in ("killed", "workers")}
    print(f"byte-identical: {same}")
    summary = {
        "prompts": options.prompts,
        "words": options.words,
        "analyses": options.analyses,
        "whole": whole,
        "deaths": deaths,
        "resumed_s": resumed["seconds"],
        "workers": {"died": died, "resumed_s": workers["seconds"]},
        "byte_identical": same,
    }
    print(json.dumps(summary))
    if not all(same.values()):
        raise SystemExit("tensors differ")


def write_prompts(path: Path, count: int, words: int | None) -> Path:
    """The demo data set, repeated as needed, perhaps cut short."""
    examples = load_examples("demo").examples
    texts = [examples[number % len(examples)].text for number in range(count)]
    # After the words that the template puts in front of every problem.
    cut = [text if words is None else " ".join(text.split("Problem:", 1)[1].split()[:words]) for text in texts]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in cut), encoding="utf-8")
    return path


def run(command: list[str], kill_after: float | None = None, kill_one_after: float | None = None) -> dict[str, Any]:
    """Run a command to its end, or kill it, or the last of its workers; how long it took and what it held."""
    begin = time.monotonic()
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command, stdout=nowhere, start_new_session=True)
    resident: list[float] = []
    killed_one: float | None = None
    while process.poll() is None:
        time.sleep(0.25)
        seconds = time.monotonic() - begin
        if kill_after is not None and seconds > kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        try:
            children = psutil.Process(process.pid).children()
            resident += [rss / 2**20] if (rss := psutil.Process(process.pid).memory_info().rss) else []
            if kill_one_after is not None and killed_one is None and seconds > kill_one_after and children:
                children[-1].kill()
                killed_one = seconds
        except psutil.NoSuchProcess:
            continue
    seconds = time.monotonic() - begin
    tenths = [round(resident[min(len(resident) - 1, len(resident) * n // 10)]) for n in range(1, 11)]
    return {
        "status": process.returncode,
        "seconds": round(seconds, 1),
        "resident": tenths,
        "peak": round(max(resident)),
        "until_end": None if killed_one is None else round(seconds - killed_one, 1),
    }


def kept(folder: Path) -> int:
    """Chunks and results that a killed run has left."""
    return len([*folder.glob(UNITS), *(folder / ".chunks").glob(UNITS)])


def tensors(folder: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor of a folder's results, as bytes."""
    return {
        (analysis, name): value.numpy().tobytes()
        for analysis, result in load_folder(folder).items()
        for name, value in result.tensors.items()
    }


if __name__ == "__main__":
    main()
