"""The layouts of public preference data sets: a dict from the name of a format to its adapter and its columns.

A new layout is one function here and one entry below. Adapters neither check for empty text nor for missing scores,
because every row that they give is checked and cleaned afterwards; texts beside messages become messages there.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..canonical import Adapter
from ..rows import Row, pair_to_row
from .by_group import helpsteer2, oasst1, prism
from .by_row import (
    argilla,
    argilla_cleaned,
    armorm,
    has_markers,
    hh_rlhf,
    list_ultrafeedback,
    nectar,
    numbered,
    rows,
    scored_pairs,
    ultrafeedback,
    ultrafeedback_fine_grained,
)

__all__ = ["FORMATS", "Format", "known_formats", "recognise"]


class Format(NamedTuple):
    """A layout: how it is read, and the columns that `data_format: auto` knows it by.

    `beside` are columns that the data set has as well and the adapter does not read; `looks` is asked about the first
    row where columns alone do not tell. Without `columns` the format must be named.
    """

    adapter: Adapter
    of: str
    columns: str = ""
    beside: str = ""
    looks: Callable[[Row], bool] | None = None


FORMATS = {
    "rows": Format(rows, "canonical rows", "prompt responses scores"),
    "pairs": Format(pair_to_row, "TRL pairs, scores 1 and 0", "chosen rejected"),
    "scored_pairs": Format(scored_pairs, "trl-lib/ultrafeedback_binarized and HuggingFaceH4's",
                           "chosen rejected score_chosen score_rejected"),
    "argilla": Format(argilla, "argilla/ultrafeedback-binarized-preferences",
                      "instruction chosen_response rejected_response chosen_avg_rating rejected_avg_rating"),
    "argilla_cleaned": Format(argilla_cleaned, "argilla/ultrafeedback-binarized-preferences-cleaned",
                              "chosen rejected chosen-rating rejected-rating"),
    "hh_rlhf": Format(hh_rlhf, "Anthropic/hh-rlhf", "chosen rejected", looks=has_markers),
    "ultrafeedback": Format(ultrafeedback, "openbmb/UltraFeedback, overall scores", "instruction completions"),
    "ultrafeedback_fine_grained": Format(ultrafeedback_fine_grained,
                                         "openbmb/UltraFeedback, means of the aspect ratings"),
    "nectar": Format(nectar, "berkeley-nest/Nectar", "prompt answers num_responses"),
    "armorm": Format(armorm, "princeton-nlp/llama3-ultrafeedback-armorm, snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset",
                     "prompt all_generated_responses all_rm_scores", beside="chosen rejected"),
    "list_ultrafeedback": Format(list_ultrafeedback, "OPO-alignment/ListUltraFeedback",
                                 "prompt all_responses overall_scores"),
    "numbered": Format(numbered, "ChenDRAG/ultrafeedback_reward: A0, score_A0, ...", "A0 A1 score_A0 score_A1"),
    "helpsteer2": Format(helpsteer2, "nvidia/HelpSteer2", "prompt response helpfulness correctness"),
    "prism": Format(prism, "HannahRoseKirk/prism-alignment, utterances",
                    "interaction_id conversation_id user_id turn user_prompt model_response score if_chosen"),
    "oasst1": Format(oasst1, "OpenAssistant/oasst1 and oasst2", "message_id parent_id message_tree_id role text rank"),
}  # fmt: skip


def recognise(columns: Iterable[str], first_row: Row) -> str:
    """The one format whose columns are all there; a format that asks for more of them goes before one that asks less.

    Raises:
        ValueError: no format fits, or several do; the message names them.
    """
    columns = set(columns)
    fitting = [
        name
        for name, known in FORMATS.items()
        if known.columns and _read(known) <= columns and (known.looks is None or known.looks(first_row))
    ]
    best = [name for name in fitting if not any(_is_closer(FORMATS[other], FORMATS[name]) for other in fitting)]
    if len(best) == 1:
        return best[0]
    fit = f"several formats: {', '.join(best)}" if best else "no known format"
    raise ValueError(
        f"data_format 'auto': columns {sorted(columns)} fit {fit}. Set data_format to {known_formats(best)}."
    )


def known_formats(names: Iterable[str] = ()) -> str:
    """The named formats or all, for messages."""
    listed = "; ".join(f"{name!r} ({FORMATS[name].of})" for name in names or FORMATS)
    return f"one of: {listed}; or to the import path of your own function"


def _is_closer(one: Format, other: Format) -> bool:
    if one.columns == other.columns:
        return one.looks is not None and other.looks is None
    return _read(other) < _read(one) | set(one.beside.split())


def _read(known: Format) -> set[str]:
    return set(known.columns.split())
