"""Bills, a small world in which a draft shows what its first words should have been.

A prompt has three groups of three items; the answer is the total of each group, and then the running sums that it
comes from. The totals are hard to say at once, and the sums are easy one after the other.
"""

import numpy as np
import torch

from trainers.sgpo.text import improver_prompt

from .worlds import END, word_tokenizer

GROUPS, GROUP, PRICED, LARGEST = 3, 3, 40, 4  # items of a prompt; different ones, and the largest price
LENGTH = GROUPS * (GROUP + 1)  # words of an answer: the totals, and then the running sums that they come from
CUE = "cost"
WORDS = [*improver_prompt(" ", " ").split(), CUE, *(f"item{i}" for i in range(PRICED)),
         *(f"n{i}" for i in range(GROUP * LARGEST + 1))]  # fmt: skip
TOKENIZER = word_tokenizer(list(dict.fromkeys(WORDS)))
CUE_ID, ITEM, NUMBER = TOKENIZER.convert_tokens_to_ids([CUE, "item0", "n0"])


def bills(count: int, prices: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(count, GROUPS * GROUP) token ids of items, and (count, LENGTH) of the right answers."""
    items = random.integers(0, PRICED, (count, GROUPS, GROUP))
    sums = prices[items].cumsum(-1)
    return ITEM + items.reshape(count, -1), NUMBER + np.concatenate([sums[..., -1], sums.reshape(count, -1)], 1)


def as_rows(asked: np.ndarray, answers: np.ndarray) -> list[dict]:
    pairs = zip(TOKENIZER.batch_decode(asked), TOKENIZER.batch_decode(answers), strict=True)
    return [{"prompt": f"{prompt} {CUE} ", "chosen": answer} for prompt, answer in pairs]


def texts(prices: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """What the model is made of: bills, and copies of other answers, as a large model can copy from its prompt."""
    asked, answers = bills(10_000, prices, random)
    told = [row["prompt"] + row["chosen"] for row in as_rows(asked, answers)]
    wrong = as_rows(asked, random.permutation(answers))
    told += [improver_prompt(row["prompt"], row["chosen"]) + row["chosen"] for row in wrong]
    return TOKENIZER([f"{text} {END}" for text in told], padding=True, return_tensors="pt").input_ids
