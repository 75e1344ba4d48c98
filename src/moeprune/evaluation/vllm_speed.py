"""Speed under vLLM: one process for each model, all of them alive, asked in turns."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from moeprune.errors import UnsupportedModelError
from moeprune.evaluation.speed import Sample

_SCRIPT = Path(__file__).with_name("vllm_turn.py")
_REMEMBERED = 1 << 16  # bytes of what an engine said last
_START, _TURN, _LAST_WORDS = 1800.0, 600.0, 10.0  # seconds to wait


def has_vllm() -> bool:
    """Whether this interpreter could import vLLM."""
    return find_spec("vllm") is not None


def vllm_turns(
    models: Mapping[str, Path],
    prompts: Sequence[Tensor],
    new_tokens: int,
    warm_up: int,
    dtype: str,
    python: str = sys.executable,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, list[Sample]], str]:
    """A B A B ..., as ``take_turns``; prefill is an answer of one token, decode what others add.

    Caching of prefixes is off, and each engine gets its share of a GPU's memory.

    Returns:
        samples by name, and vLLM's version.

    Raises:
        UnsupportedModelError: vLLM refuses a model, or its process dies; with its last words.
    """
    longest = max(prompt.shape[1] for prompt in prompts) + new_tokens
    turns = [prompts[0]] * warm_up + list(prompts)
    found: dict[str, list[Sample]] = {name: [] for name in models}
    with ExitStack() as stack:
        engines = {}
        for name, path in models.items():
            options = {
                "model": str(path), "dtype": dtype, "seed": 0, "enable_prefix_caching": False,
                "max_model_len": longest, "gpu_memory_utilization": 0.85 / len(models),
            }  # fmt: skip
            engines[name] = stack.enter_context(_Engine(name, options, python))
        for number, ids_BL in enumerate(turns):
            for place, (name, engine) in enumerate(engines.items()):
                told = engine.ask({"ids": ids_BL.tolist(), "new_tokens": new_tokens})
                if number >= warm_up:
                    found[name].append(Sample(told["prefill"], told["decode"], None, None))
                progress(number * len(engines) + place + 1, len(turns) * len(engines))
    return found, next(iter(engines.values())).version


class _Engine:
    """One model in a process of its own."""

    def __init__(self, name: str, options: Mapping[str, Any], python: str) -> None:
        self._name, self._options, self._python = name, options, python

    def __enter__(self) -> _Engine:
        answers, write = os.pipe()
        self._words = b""
        try:
            self._process = subprocess.Popen(
                [self._python, str(_SCRIPT), str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
            )
        except OSError:
            os.close(answers)
            raise
        finally:
            os.close(write)
        self._answers = answers
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._answers, selectors.EVENT_READ, "answer")
        self._selector.register(self._process.stdout, selectors.EVENT_READ, "words")
        self._buffer = b""
        try:
            self.version = str(self.ask(self._options, _START))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, message: Mapping[str, Any], patience: float = _TURN) -> Any:
        """Send a line and wait for the answer, listening to what the engine says meanwhile."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        end = time.monotonic() + patience
        while b"\n" not in self._buffer:
            events = self._selector.select(max(0.0, end - time.monotonic()))
            if not events:
                raise self._died(f"did not answer within {patience:.0f} s")
            for key, _ in events:
                if key.data == "words":
                    self._listen()
                    continue
                got = os.read(self._answers, 1 << 16)
                if not got:
                    raise self._died("ended")
                self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        got = os.read(self._process.stdout.fileno(), 1 << 16)
        if not got:
            self._selector.unregister(self._process.stdout)
        self._words = (self._words + got)[-_REMEMBERED:]

    def _died(self, how: str) -> UnsupportedModelError:
        end = time.monotonic() + _LAST_WORDS
        with suppress(OSError, ValueError):
            self._selector.unregister(self._answers)
            while self._selector.get_map() and time.monotonic() < end:
                if self._selector.select(0.1):
                    self._listen()
        lines = self._words.decode("utf-8", errors="replace").splitlines()
        words = [line.strip() for line in lines if line.strip()] or ["it said nothing"]
        said = ([line for line in words if "Error" in line] or words)[-1]
        return UnsupportedModelError(f"vLLM {how} with {self._name}: {said[-200:]}")

    def close(self) -> None:
        """End the process; nothing of it stays behind."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._selector.close()
        self._process.stdout.close()
        os.close(self._answers)
