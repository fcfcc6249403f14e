"""From any preference data to padded batches: read, check, tokenise, collate."""

from .canonical import canonicalize
from .collator import PreferenceCollator
from .drops import Drop, DropReport
from .load import detect_format, load_preferences
from .rows import clean_row, to_canonical
from .tokenization import tokenize_dataset, tokenize_row

__all__ = [
    "Drop",
    "DropReport",
    "PreferenceCollator",
    "canonicalize",
    "clean_row",
    "detect_format",
    "load_preferences",
    "to_canonical",
    "tokenize_dataset",
    "tokenize_row",
]
