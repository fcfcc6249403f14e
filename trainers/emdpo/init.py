"""Where EM starts: a first guess of each annotator's type, (N,T) rows that sum to 1.

`agreement` and `kmeans` cluster annotators by what they preferred; the paper's own clustering is not public, so both
are ours. `dirichlet` draws each row at random. A start that is the same for all annotators separates nothing.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
from datasets import Dataset
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.linalg import eigh
from scipy.sparse import csr_matrix

from .annotators import Annotators, Judged
from .tables import TYPE, read_annotators

BUCKETS = 512  # token ids are counted modulo this
DIRECTIONS = 8


def first_guess(args, judged: Judged, restart: int = 0) -> np.ndarray:
    """(N,T) first posterior of a restart, by the option `init`.

    Raises:
        ValueError: the data or `initial_posterior` do not give one.
    """
    annotators, types, kind = judged.annotators, args.num_types, kind_of_guess(args, judged)
    random = np.random.default_rng((args.seed, restart))
    if types == 1:
        return np.ones((len(annotators), 1))
    if kind == "given":
        return given(args.initial_posterior, annotators, types)
    if kind == "dirichlet":
        return random.dirichlet(np.ones(types), len(annotators))  # every mixture of types is equally likely
    return (agreement if kind == "agreement" else kmeans)(judged.rows, annotators, types, random)


def kind_of_guess(args, judged: Judged) -> str:
    """The option `init`, or what `auto` takes: the first of given, agreement and dirichlet that the data allow."""
    if args.init != "auto":
        return args.init
    if args.initial_posterior is not None:
        return "given"
    return "agreement" if _shared(_votes(judged.rows, judged.annotators)).any() else "dirichlet"


def agreement(rows: Dataset, annotators: Annotators, types: int, random: np.random.Generator) -> np.ndarray:
    """One-hot clusters of annotators who vote alike on the pairs of responses that they share.

    Each vote is taken relative to the mean vote on its pair, so that what all agree on separates nobody. The leading
    types - 1 eigenvectors of the agreement matrix (cosine of the shared votes, dense (N,N)) go into k-means.

    Raises:
        ValueError: no two annotators judged the same pair of responses.
    """
    votes = _votes(rows, annotators)
    if not _shared(votes).any():
        raise ValueError(
            "init='agreement' needs prompts and responses that several annotators judged, and there are none: use "
            "init='kmeans' or 'dirichlet'."
        )
    seen = votes.copy()
    seen.data = np.ones_like(seen.data)
    mean = np.asarray(votes.sum(0)).ravel() / np.maximum(np.asarray(seen.sum(0)).ravel(), 1)
    centred = votes.copy()
    centred.data = centred.data - mean[centred.indices]
    squares = centred.multiply(centred)
    # Norms over the shared pairs only: |x_i| where j voted too.
    norm = np.sqrt(np.maximum((squares @ seen.T).toarray() * (seen @ squares.T).toarray(), 1e-12))
    matrix = (centred @ centred.T).toarray() / norm
    size = len(matrix)
    values, vectors = eigh((matrix + matrix.T) / 2, subset_by_index=[size - (types - 1), size - 1])
    return _clusters(vectors * np.sqrt(np.maximum(values, 0)), types, random)


def kmeans(rows: Dataset, annotators: Annotators, types: int, random: np.random.Generator) -> np.ndarray:
    """One-hot clusters by the tokens and the length of what each annotator preferred over what they did not.

    Features: per row, the tokens' frequencies (hashed) and the log-length of each response, times its centred score
    scaled to [-1, 1]; averaged over an annotator's rows, scaled, reduced to the leading directions.
    """
    table = np.zeros((len(annotators), BUCKETS + 1))
    for owner, row in zip(annotators.owner, rows.select_columns(["response_ids", "scores"]), strict=True):
        scores = np.asarray(row["scores"], dtype=float)
        scores = scores - scores.mean()
        scale = np.abs(scores).max()
        if scale == 0:
            continue
        for ids, score in zip(row["response_ids"], scores / scale, strict=True):
            table[owner, :BUCKETS] += score * np.bincount(np.asarray(ids) % BUCKETS, minlength=BUCKETS) / len(ids)
            table[owner, BUCKETS] += score * np.log(len(ids))
    table /= np.maximum(np.bincount(annotators.owner, minlength=len(annotators)), 1)[:, None]
    spread = table.std(0)
    table = (table - table.mean(0)) / np.where(spread > 0, spread, 1)
    left, sizes, _ = np.linalg.svd(table, full_matrices=False)
    return _clusters(left[:, :DIRECTIONS] * sizes[:DIRECTIONS], types, random)


def given(table: dict | str, annotators: Annotators, types: int) -> np.ndarray:
    """Rows of a mapping {annotator: probabilities}, or of a file: JSON, or CSV or parquet with annotator, type_0, ...

    Raises:
        ValueError: an annotator is missing, or a row is no distribution over `types` types.
    """
    known = {str(name): row for name, row in (_read(table) if isinstance(table, str) else table).items()}
    out = np.empty((len(annotators), types))
    for i, name in enumerate(annotators.names):
        if str(name) not in known:
            raise ValueError(f"initial_posterior has no row for annotator {name!r}: give one for each.")
        values = np.asarray(known[str(name)], dtype=np.float64)
        if values.shape != (types,) or (values < 0).any() or not abs(values.sum() - 1) <= 1e-6:
            raise ValueError(
                f"initial_posterior of annotator {name!r} is {values.tolist()}: give {types} probabilities "
                "(num_types) that sum to 1."
            )
        # What a run wrote stays as it is to the last bit; what was rounded is made to sum to 1.
        out[i] = values if abs(values.sum() - 1) < 1e-12 else values / values.sum()
    return out


def _read(path: str) -> dict[str, list[float]]:
    if path.endswith(".json"):
        return json.loads(Path(path).read_text())
    if not path.endswith(".parquet"):
        return dict(zip(*read_annotators(path)[:2], strict=True))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    return {row["annotator"]: [value for name, value in row.items() if name.startswith(TYPE)] for row in rows}


def _votes(rows: Dataset, annotators: Annotators) -> csr_matrix:
    """(N, pairs of responses): +1 or -1 for who won, an explicit 0 for ties; repeated votes are averaged."""
    columns: dict[tuple, int] = {}
    votes = defaultdict(list)
    own = (rows[name][:] for name in ("prompt_ids", "response_ids", "scores"))
    for owner, prompt_ids, response_ids, scores in zip(annotators.owner, *own, strict=True):
        prompt, texts = tuple(prompt_ids), [*map(tuple, response_ids)]
        for a in range(len(texts)):
            for b in range(a + 1, len(texts)):
                first, second = sorted((a, b), key=lambda k: texts[k])
                column = columns.setdefault((prompt, texts[first], texts[second]), len(columns))
                votes[owner, column].append(np.sign(scores[first] - scores[second]))
    index = np.array(list(votes)).reshape(-1, 2).T
    data = [float(np.mean(values)) for values in votes.values()]
    return csr_matrix((data, (index[0], index[1])), shape=(len(annotators), len(columns)))


def _shared(votes: csr_matrix) -> np.ndarray:
    """(pairs,) bool: those that several annotators judged."""
    return np.bincount(votes.indices, minlength=votes.shape[1]) > 1


def _clusters(points: np.ndarray, types: int, random: np.random.Generator) -> np.ndarray:
    """One-hot (N,T) of the best of 20 runs of k-means."""
    best, least = None, np.inf
    for _ in range(20):
        try:
            centres, labels = kmeans2(points, types, minit="++", rng=random, missing="raise")
        except ClusterError:  # a cluster lost all its members
            continue
        error = ((points - centres[labels]) ** 2).sum()
        if error < least:
            best, least = labels, error
    if best is None:
        raise ValueError(f"the annotators do not fall into {types} clusters: use fewer types, or init='dirichlet'.")
    return np.eye(types)[best]
