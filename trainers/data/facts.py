"""What a data set is, in numbers: of its scores, lengths, texts, annotators and tokens.

The numbers are for a dry run and `polypo inspect`, which have the words. Nothing here needs a model.
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import Truncation
from .budget import Lengths, packed_tokens
from .json_rows import digest
from .rows import Row, trained_tokens

PERCENTILES = (50, 90, 95, 99, 100)
END = 8  # tokens at the end of a response among which the one is that ends it: templates write a line break after it
KANA = "CJK and kana"
OF_SCRIPT = {"CJK": KANA, "HIRAGANA": KANA, "KATAKANA": KANA}  # that one language mixes
LETTERS = 2000  # characters of a text that are looked at for its script


def percentiles(values: Sequence[float] | np.ndarray, of: Sequence[float] = PERCENTILES) -> list[float]:
    """Values that occur, not ones between two."""
    return np.percentile(values, of, method="inverted_cdf").tolist()


def responses_per_row(lengths: Iterable[Sequence]) -> dict[int, int]:
    """{K: rows that have K}, from lists with one item for each response."""
    return dict(sorted(Counter(map(len, lengths)).items()))


def parts_of(lengths: Sequence[Lengths]) -> dict[str, list[int]]:
    """The lengths of what a row is made of."""
    return {
        "prompt": [p for p, _ in lengths],
        "response": [r for _, responses in lengths for r in responses],
        "prompt + response": [p + r for p, responses in lengths for r in responses],
        "prompt once + all responses": [packed_tokens(row) for row in lengths],
    }


def too_long(lengths: Iterable[Lengths], limits: Truncation) -> int:
    """Responses that do not fit into `max_length` beside their prompt, as it is cut; dropped prompts do not count."""
    longest, cut = limits.max_length, limits.max_prompt_length
    if longest is None:
        return 0
    kept = [row for row in lengths if cut is None or row[0] <= cut or limits.truncate_prompts == "left"]
    return sum((p if cut is None else min(p, cut)) + r > longest for p, responses in kept for r in responses)


def as_read(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """A tokenised row as the model reads it, special tokens included: (name, text) of the prompt and each response.

    A response of which not all is trained on is followed by what is.
    """
    texts = [("prompt", row["prompt_ids"])]
    for score, ids, mask in zip(row["scores"], row["response_ids"], trained_tokens(row), strict=True):
        texts += [(f"scored {score:g}", ids)]
        texts += [] if all(mask) else [("  of it trained on", list(compress(ids, mask)))]
    return [(name, str(tokenizer.decode(ids))) for name, ids in texts]


# Scores.


def score_facts(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Of rows of K scores: their range, how far they lie apart inside a row, and where they tie.

    A row whose scores all tie says nothing; one whose best scores tie does not say which is best.
    """
    flat, spread = np.concatenate([*map(np.asarray, scores)]), np.array([max(row) - min(row) for row in scores])
    counts = [np.unique(row, return_counts=True)[1] for row in scores]
    pairs = sum(len(row) * (len(row) - 1) // 2 for row in scores)
    return {
        "percentiles": dict(zip((0, 25, 50, 75, 100), percentiles(flat, (0, 25, 50, 75, 100)), strict=True)),
        "distinct": len(np.unique(flat)),
        "spread": dict(zip((0, 25, 50, 75, 100), percentiles(spread, (0, 25, 50, 75, 100)), strict=True)),
        "rows_all_tied": int((spread == 0).sum()),
        "rows_best_tied": sum(len(row) > 1 and bool(row[-1] > 1) for row in counts),
        "pairs": pairs,
        "pairs_tied": sum(int((row * (row - 1) // 2).sum()) for row in counts),
    }


def length_facts(lengths: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Whether length alone tells the better response.

    `longer_is_better` is a share of the `pairs` inside a row that differ in both, and `gamma` the rank correlation of
    Goodman and Kruskal over them; `longest_is_best` is a share of the rows whose scores do not all tie. None where
    there is no such pair or row.
    """
    agree = differ = best = 0
    longest = expected = 0.0
    for row, given in zip(lengths, scores, strict=True):
        size, score = np.asarray(row, float), np.asarray(given, float)
        order = np.sign(size[:, None] - size) * np.sign(score[:, None] - score)
        agree, differ = agree + int((order > 0).sum()) // 2, differ + int((order != 0).sum()) // 2
        top = score == score.max()
        if not top.all():
            best, expected = best + 1, expected + float(top.mean())
            longest += float(top[size == size.max()].mean())
    return {
        "pairs": differ,
        "longer_is_better": agree / differ if differ else None,
        "gamma": 2 * agree / differ - 1 if differ else None,
        "longest_is_best": longest / best if best else None,
        "longest_is_best_by_chance": expected / best if best else None,
    }


def lead_of_best(lengths: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> list[int]:
    """How much longer the first best response of each row is than its first worst; rows that all tie are left out."""
    pairs = [(row, given) for row, given in zip(lengths, scores, strict=True) if max(given) > min(given)]
    return [row[int(np.argmax(given))] - row[int(np.argmin(given))] for row, given in pairs]


# Texts.


@dataclass
class Texts:
    """What the texts of canonical rows show; lengths are in characters."""

    lengths: list[Lengths] = field(default_factory=list)
    prompts: Counter = field(default_factory=Counter)  # digest -> rows
    rows: Counter = field(default_factory=Counter)  # the same of the whole row
    equal_responses: int = 0  # rows
    empty_turns: int = 0  # rows with an assistant's turn that says and calls nothing
    scripts: Counter = field(default_factory=Counter)  # of prompts
    other_script: int = 0  # responses in another script than their prompt

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Texts":
        texts = cls()
        for row in rows:
            texts.add(row)
        return texts

    def add(self, row: Row) -> None:
        prompt, responses = plain(row["prompt"]), [*map(plain, row["responses"])]
        self.lengths.append((len(prompt), [*map(len, responses)]))
        self.prompts[digest(row["prompt"])] += 1
        self.rows[digest([row["prompt"], row["responses"], row["scores"], row.get("annotator")])] += 1
        self.equal_responses += len({digest(response) for response in row["responses"]}) < len(responses)
        turns = [m for text in (row["prompt"], *row["responses"]) if isinstance(text, list) for m in text]
        self.empty_turns += any(is_empty(message) for message in turns)
        script, others = script_of(prompt), [*map(script_of, responses)]
        self.scripts[script or "no letters"] += 1
        self.other_script += sum(script is not None and other not in (None, script) for other in others)

    def duplicates(self) -> dict[str, int]:
        """Rows that are not the first with their prompt, or as a whole."""
        return {
            "distinct_prompts": len(self.prompts),
            "rows_with_an_earlier_prompt": self.prompts.total() - len(self.prompts),
            "rows_like_an_earlier_one": self.rows.total() - len(self.rows),
            "rows_with_equal_responses": self.equal_responses,
        }

    def shared_with(self, other: "Texts") -> int:
        """Rows whose prompt `other` has too."""
        return sum(count for prompt, count in self.prompts.items() if prompt in other.prompts)


def plain(text: str | list[dict]) -> str:
    """The text of messages without their roles."""
    return text if isinstance(text, str) else "\n".join(message["content"] or "" for message in text)


def is_empty(message: dict) -> bool:
    """Whether it is an assistant's turn that says and calls nothing."""
    return message["role"] == "assistant" and not (message["content"] or "").strip() and not message.get("tool_calls")


def script_of(text: str) -> str | None:
    """The script of most of its letters at the beginning, by the names of the Unicode characters; None without any."""
    text = text[:LETTERS]
    if text.isascii():
        return "LATIN" if any(map(str.isalpha, text)) else None
    counts: Counter = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += count
    return counts.most_common(1)[0][0] if counts else None


@cache
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "unnamed").split()[0]
    return OF_SCRIPT.get(name, name)


# Annotators.


def annotator_facts(annotators: Iterable[str | int | None]) -> dict[str, int]:
    """Who judged how much; a row of nobody is counted apart."""
    counts = Counter(annotators)
    nobody = counts.pop(None, 0)
    judged = [*counts.values()] or [0]
    return {
        "annotators": len(counts),
        "rows_of_nobody": nobody,
        "median_rows": int(np.median(judged)),
        "most_rows": max(judged),
        "annotators_with_one_row": judged.count(1),
    }


# Tokens.


def token_facts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> dict[str, int]:
    """Of tokenised rows: responses without a token that ends them, and those of which only special tokens are left."""
    endless = empty = 0
    for table in rows.select_columns(["response_ids"]).with_format("arrow").iter(1000):
        responses = pc.list_flatten(table["response_ids"])
        responses = responses.combine_chunks() if isinstance(responses, pa.ChunkedArray) else responses
        values = responses.flatten().to_numpy(zero_copy_only=False)
        bounds = np.cumsum([0, *pc.list_value_length(responses).to_pylist()])
        seen = np.cumsum([0, *np.isin(values, [*ends])])
        endless += int((seen[bounds[1:]] == seen[np.maximum(bounds[:-1], bounds[1:] - END)]).sum())
        short = [values[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b - a <= END]
        empty += sum(not str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in short)
    return {"responses_without_end": endless, "responses_without_text": empty}
