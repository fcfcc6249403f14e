"""nvidia/HelpSteer2: one row per response; rows that follow each other with the same prompt belong together."""

import re
from collections.abc import Iterable, Iterator

from ..drops import Drop
from ..rows import Row
from .fields import assistant, in_runs, user

MARKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
OTHER_MARKS = ("correctness", "coherence", "complexity", "verbosity")


def helpsteer2(rows: Iterable[Row]) -> Iterator[Row | Drop]:
    """`helpfulness` (0 to 4) as the score; the other marks are kept as lists with one number per response.

    Keeps the rows of one prompt. HelpSteer, with up to four responses in a row, has the same layout.
    """
    for run in in_runs(rows, "prompt"):
        try:
            prompt = _turns(run[0]["prompt"] or "")
        except Drop as drop:
            yield drop
            continue
        yield {
            "prompt": prompt,
            "responses": [[assistant(row["response"])] for row in run],
            "scores": [row["helpfulness"] for row in run],
            **{mark: [row.get(mark) for row in run] for mark in OTHER_MARKS},
        }


def _turns(prompt: str) -> list[dict]:
    first, *parts = MARKER.split(prompt)
    if parts[-2:] == ["Assistant", ""]:  # the marker that the response follows
        parts = parts[:-2]
    if any(role != ("Assistant", "User")[i % 2] for i, role in enumerate(parts[::2])) or len(parts) % 4 == 2:
        raise Drop("the turns of the prompt do not alternate, or do not end with the user's")
    texts = [first, *parts[1::2]]
    return [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(texts)]
