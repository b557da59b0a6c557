"""Writes the data set `demo-levels`: sums that are worked out, and chains of facts, of one to five steps.

python scripts/demo_levels.py > hookdepth/data/demo-levels.jsonl

tests/data/test_levels.py solves every line by itself, and checks that the file is what this writes.
"""

import json
import random
from collections.abc import Iterator

LEVELS = range(1, 6)
PER_LEVEL = 24
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Liam")
RELATIONS = ("teacher", "neighbour", "cousin", "doctor", "coach")


def worked_sum(steps: int, source: random.Random) -> tuple[str, str]:
    """A sum of so many additions and subtractions, and its steps one by one."""
    total = source.randint(2, 20)
    terms, lines = [str(total)], []
    for _ in range(steps):
        sign = source.choice("+-") if total > 2 else "+"
        other = source.randint(1, 9) if sign == "+" else source.randint(1, min(9, total - 1))
        result = total + other if sign == "+" else total - other
        terms += [sign, str(other)]
        lines.append(f"{total} {sign} {other} = {result}")
        total = result
    return f"Problem: Work out {' '.join(terms)} step by step.\nAnswer:", f" {', '.join(lines)}. The result is {total}."


def chain(steps: int, source: random.Random) -> tuple[str, str]:
    """Who is the … of the … of a person, so many relations long, after five facts in any order."""
    people = source.sample(NAMES, len(LEVELS) + 1)
    relations = [source.choice(RELATIONS) for _ in LEVELS]
    facts = [f"The {r} of {a} is {b}." for r, a, b in zip(relations, people, people[1:], strict=False)]
    source.shuffle(facts)
    asked = " of ".join(f"the {relation}" for relation in reversed(relations[:steps]))
    return f"Facts: {' '.join(facts)}\nQuestion: Who is {asked} of {people[0]}?\nAnswer:", f" {people[steps]}"


def rows() -> Iterator[dict[str, object]]:
    """All lines, levels in rising order, both kinds in turn, none twice."""
    source, seen = random.Random(20250101), set()
    for level in LEVELS:
        for number in range(PER_LEVEL):
            kind = worked_sum if number % 2 == 0 else chain
            prompt, answer = kind(level, source)
            while prompt in seen:
                prompt, answer = kind(level, source)
            seen.add(prompt)
            yield {"prompt": prompt, "answer": answer, "level": level}


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
