"""What a sample of ``moeprune evaluate`` can show on the embedded model.

moeprune prune demo --method mone --ratio 0.5 --sequences 120 --length 512 --out smaller
python benchmarks/evaluation_sample.py smaller [SEQUENCES [EVERY]]

Reads the first SEQUENCES windows of 256 tokens of each held-out domain (64, as the command; 0 for
all), of them every EVERY-th.
"""

from __future__ import annotations

from pathlib import Path

import arguments
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moeprune import Compute, Text
from moeprune.evaluation.paired import Paired
from moeprune.evaluation.perplexity import DomainScore, Evaluation
from moeprune.evaluation.summary import paired, summary
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import Domain
from moeprune.pipeline.evaluating import measure
from moeprune.pipeline.inputs import read_heldout
from moeprune.pipeline.seen import seen_domains

COMPUTE = Compute(dtype="float32")
HEADS = ("domain", "windows", "documents", "loss +", "could show", "skewness", "between documents")


def by_document(values_N: NDArray[np.float64], document_N: NDArray[np.int64]) -> list[NDArray]:
    return [values_N[document_N == one] for one in np.unique(document_N)]


def intraclass(groups: list[NDArray]) -> float:
    """Share of the variance of windows that lies between documents (one-way ANOVA)."""
    sizes = np.array([len(group) for group in groups])
    total, count = sizes.sum(), len(groups)
    mean = np.concatenate(groups).mean()
    between = sum(len(g) * (g.mean() - mean) ** 2 for g in groups) / (count - 1)
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (total - count)
    size = (total - np.square(sizes).sum() / total) / (count - 1)
    return float((between - within) / (between + (size - 1) * within))


def row(name: str, pair: Paired, student: DomainScore, teacher: DomainScore) -> list[str]:
    difference_N = (student.sums.nll_N - teacher.sums.nll_N) / student.sums.tokens_N
    assert student.document_N is not None
    groups = by_document(difference_N, student.document_N)
    loss = pair.loss.interval()
    return [
        name, str(pair.windows), str(loss.items),
        f"{loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f})", f"{pair.loss.smallest():.3f}",
        f"{stats.skew([group.mean() for group in groups]):.1f}", f"{intraclass(groups):.2f}",
    ]  # fmt: skip


def measured(student: Path, text: Text, every: int) -> dict[str, Evaluation]:
    original = Checkpoint.open("demo")
    opened = {"original": COMPUTE.open(original), "pruned": COMPUTE.open(Checkpoint.open(student))}
    windows = [
        Domain(d.name, d.ids_NL[::every], d.bytes_per_token, d.document_N[::every])
        for d in read_heldout(original, text)
        if d.document_N is not None
    ]
    return measure(opened, windows, "original", COMPUTE)


def show(student: Evaluation, teacher: Evaluation, seen: frozenset[str] | None) -> None:
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    for name, pair in paired(student, teacher).items():
        cells = row(name, pair, student.domains[name], teacher.domains[name])
        print("| " + " | ".join(cells) + " |")
    whole = summary(student, teacher, seen)
    for name, group in whole["groups"].items():
        print(f"{name}: {group['against']['verdict']}; {group['against']['smallest']:.3f}")
    for sentence in whole["findings"]:
        print(sentence)


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("smaller", type=Path)
    parser.add_argument("sequences", type=int, nargs="?", default=64)
    parser.add_argument("every", type=int, nargs="?", default=1)
    given = parser.parse_args()
    found = measured(given.smaller, Text(sequences=given.sequences, length=256), given.every)
    show(found["pruned"], found["original"], seen_domains(given.smaller))


if __name__ == "__main__":
    main()
