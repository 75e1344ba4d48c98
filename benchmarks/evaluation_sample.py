"""What a sample of ``moeprune evaluate`` can show on the embedded model.

python benchmarks/evaluation_sample.py [SEQUENCES [LENGTH]]     prints the table of docs/evaluate.md

Half of the experts become constants (mone); then the original is compared with it on the first
windows of each held-out domain, by default as many as the command takes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moeprune import Budget, Compute, Text, apply, calibrate, plan
from moeprune.evaluation.paired import Paired
from moeprune.evaluation.perplexity import DomainScore, Evaluation
from moeprune.evaluation.summary import paired, summary
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline.evaluating import measure
from moeprune.pipeline.inputs import read_heldout
from moeprune.pipeline.seen import seen_domains

COMPUTE = Compute(dtype="float32")
HEADS = ("domain", "windows", "documents", "loss +", "could show", "skewness", "within documents")


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


def measured(folder: Path, text: Text) -> tuple[Evaluation, Evaluation, frozenset[str] | None]:
    calibrate("demo", folder / "s", Text(sequences=120, length=512), compute=COMPUTE)
    made = plan("demo", "mone", Budget(ratio=0.5), folder / "s", compute=COMPUTE)
    apply("demo", made, folder / "out")
    original = Checkpoint.open("demo")
    models = {
        "original": COMPUTE.open(original),
        "pruned": COMPUTE.open(Checkpoint.open(folder / "out")),
    }
    found = measure(models, read_heldout(original, text), "original", COMPUTE)
    return found["pruned"], found["original"], seen_domains(folder / "out")


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:]]
    text = Text(sequences=numbers[0] if numbers else 64, length=(*numbers, 256, 256)[1])
    with tempfile.TemporaryDirectory() as folder:
        student, teacher, seen = measured(Path(folder), text)
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    pairs = paired(student, teacher)
    for name, pair in pairs.items():
        print(
            "| " + " | ".join(row(name, pair, student.domains[name], teacher.domains[name])) + " |"
        )
    whole = summary(student, teacher, seen, text.sequences)
    for name, group in whole["groups"].items():
        print(f"{name}: {group['against']['verdict']}; {group['against']['smallest']:.4f}")
    for sentence in whole["findings"]:
        print(sentence)


if __name__ == "__main__":
    main()
