"""What observing costs, and whether the walk's memory depends on the number of layers.

    python benchmarks/calibration.py [--json]

1. Time of a calibration with all light accumulators divided by the time of the plain streamed
   forward over the same tokens, alternating in one process: median of the paired ratios.
2. Peak resident memory of a walk over 4, 8 and 16 layers of the same size, each in a process of its
   own: anonymous memory and mapped checkpoint pages together, less what the imports took, in the
   second walk of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moeprune.core.accumulators import LIGHT
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.walk import Walk
from moeprune.pipeline.inputs import Text, read_calibration
from moeprune.pipeline.measure import peak_memory, reset_peak_memory

REPEATS = 5
SIZES = {
    "tiny experts (192 x 96, 32 of them)": {"hidden": 192, "width": 96, "experts": 32, "layers": 6},
    "OLMoE-1B-7B's layer (2048 x 1024, 64)": {
        "hidden": 2048,
        "width": 1024,
        "experts": 64,
        "layers": 1,
    },
}
MEMORY = {"hidden": 512, "width": 512, "experts": 32}


def build(path: Path, hidden: int, width: int, experts: int, layers: int) -> Path:
    """A random bf16 OLMoE checkpoint in shards of at most 200 MB."""
    config = OlmoeConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, num_experts=experts,
        num_experts_per_tok=4, max_position_embeddings=512, tie_word_embeddings=True,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="200MB")
    return path


def walk_seconds(model: LayeredModel, batches: list, needs: tuple[str, ...]) -> float:
    start = time.perf_counter()
    with Walk(model, batches, chunks=True) as walk:  # as calibrate does
        walk.layers(needs)
    return time.perf_counter() - start


def random_batches(sequences: int, length: int = 512, vocabulary: int = 1000) -> list:
    ids = torch.randint(
        3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0)
    )
    return data.batches([data.Domain("random", ids, 1.0)])


def observing_costs() -> dict[str, dict[str, float]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = {"the embedded model, 61 440 tokens": (Checkpoint.open("demo"), None)}
        for name, size in SIZES.items():
            path = build(Path(folder) / name.split()[0], **size)
            cases[name] = (Checkpoint.open(path), 16 if size["hidden"] > 1000 else 64)
        for name, (checkpoint, sequences) in cases.items():
            model = LayeredModel(checkpoint)
            if sequences is None:
                text = Text(sequences=120, length=512)
                batches = data.batches(read_calibration(checkpoint, text))
            else:
                batches = random_batches(sequences)
            walk_seconds(model, batches[:2], LIGHT)  # warm up
            pairs = [
                (walk_seconds(model, batches, ()), walk_seconds(model, batches, LIGHT))
                for _ in range(REPEATS)
            ]
            found[name] = {
                "plain_seconds": statistics.median(plain for plain, _ in pairs),
                "observed_seconds": statistics.median(observed for _, observed in pairs),
                "ratio": statistics.median(observed / plain for plain, observed in pairs),
            }
    return found


def memory_of(path: str) -> None:
    """Child process: prints the peak of a walk above the level after imports.

    A first walk fills the caches of the matrix libraries, which do not depend on layers.
    """
    before = peak_memory()
    model = LayeredModel(Checkpoint.open(path))
    batches = random_batches(16)
    walk_seconds(model, batches, LIGHT)
    reset_peak_memory()
    walk_seconds(model, batches, LIGHT)
    after = peak_memory()
    assert before is not None and after is not None, "needs /proc"
    print(after - before)


def memory_by_layers() -> dict[str, float]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for layers in (4, 8, 16):
            path = build(Path(folder) / str(layers), layers=layers, **MEMORY)
            command = [sys.executable, __file__, "--memory-of", str(path)]
            runs = [int(subprocess.check_output(command)) for _ in range(3)]
            found[str(layers)] = statistics.median(runs) / 2**20
    return found


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of)
        return
    result = {"observing": observing_costs(), "peak_mib_by_layers": memory_by_layers()}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name, case in result["observing"].items():
        print(
            f"{name:42s} plain {case['plain_seconds']:6.2f} s   "
            f"observed {case['observed_seconds']:6.2f} s   ratio {case['ratio']:.2f}"
        )
    peaks = result["peak_mib_by_layers"]
    for layers, mib in peaks.items():
        print(f"walk over {layers:>2} layers: peak {mib:7.1f} MiB above the start")
    print(f"largest / smallest: {max(peaks.values()) / min(peaks.values()):.3f}")


if __name__ == "__main__":
    main()
