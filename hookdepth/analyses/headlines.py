"""What a help text says of our analyses, read off their source: importing them would import torch.

list(questions().values())     # in the order in which analyses run
"""

import re
from pathlib import Path

_LINE = re.compile(r'^    (name|question|order) = "?([^"]+?)"?$')


def questions() -> dict[str, str]:
    """Name → question of each of our analyses, in their order."""
    found: list[dict[str, str]] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith(" ") and line.strip():
                found.append({})  # another class, or what is none
            elif said := _LINE.match(line):
                found[-1].setdefault(said[1], said[2])
    ours = [own for own in found if "name" in own and "question" in own]
    return {own["name"]: own["question"] for own in sorted(ours, key=lambda own: float(own.get("order", 100)))}
