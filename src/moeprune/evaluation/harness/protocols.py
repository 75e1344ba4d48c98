"""What the founding papers measured: tasks, shots and metric of each, never mixed in one table.

The sources differ in shots, in acc against acc_norm and in base against chat models, so that equal
names of tasks do not make equal figures.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Tasks that one source averages over.

    Attributes:
        name: as ``--tasks`` takes it.
        source: where it stands.
        shots: labelled examples in front of every question.
        metrics: which metric of which task, in the source's order.
        remark: what has to be known to compare with the source's figures.
    """

    name: str
    source: str
    shots: int
    metrics: dict[str, str]
    remark: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "moe-pruner",
            "MoE-Pruner, arXiv 2410.12013",
            0,
            {
                "arc_challenge": "acc",
                "arc_easy": "acc",
                "boolq": "acc",
                "hellaswag": "acc",
                "mmlu": "acc",
                "openbookqa": "acc",
                "piqa": "acc",
                "rte": "acc",
                "winogrande": "acc",
            },
            "acc throughout: its figure for the unpruned Mixtral on HellaSwag can be no acc_norm",
        ),
        Protocol(
            "mone",
            "MoNE, arXiv 2507.00390",
            0,
            {
                "arc_challenge": "acc_norm",
                "arc_easy": "acc_norm",
                "boolq": "acc",
                "copa": "acc",
                "mmlu": "acc",
                "openbookqa": "acc_norm",
                "piqa": "acc_norm",
                "rte": "acc",
                "winogrande": "acc",
            },
            "acc_norm for ARC, OpenBookQA and PIQA, acc for the others",
        ),
        Protocol(
            "moeits",
            "MoEITS, arXiv 2604.10603",
            15,
            {
                "boolq": "acc",
                "arc_easy": "acc_norm",
                "arc_challenge": "acc_norm",
                "hellaswag": "acc_norm",
                "winogrande": "acc",
            },
            "chat models after fine-tuning; the source does not say which metric, acc_norm where "
            "the harness has it is an inference from its figure on HellaSwag",
        ),
    )
}
