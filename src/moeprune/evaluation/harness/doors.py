"""Two ways for the harness to ask a model, with the same answers: as a whole, or streamed.

``whole`` is the harness's own class around a model in memory. ``streamed`` inherits its handling of
text (tokens, beginning of sequence, longest context) and computes log-likelihoods by the walk, for
all models at once, so that teacher and student see the same requests in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeprune.errors import DataError, UnsupportedModelError
from moeprune.evaluation.harness.catalogue import quiet
from moeprune.evaluation.likelihood import BATCH_SIZE, Answer, Pair, likelihoods
from moeprune.models.loading import LayeredModel

DOORS = ("streamed", "whole")


@dataclass
class Shared:
    """Answers of several models to the same requests; the first to ask has all of them computed.

    Args:
        models: by name.
        batch_size, workers: as in ``likelihoods``.
        progress: told (steps done, steps in all) of every pass.
    """

    models: Mapping[str, LayeredModel]
    batch_size: int = BATCH_SIZE
    workers: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None
    _kept: dict[Any, dict[str, list[Answer]]] = field(default_factory=dict)
    _before: int = 0

    def answers(self, name: str, groups: Sequence[Sequence[Pair]], limit: int) -> list[Answer]:
        """One model's answers; ``limit`` is how many tokens it reads."""
        key = (limit, tuple(tuple(pairs) for pairs in groups))
        if key not in self._kept:
            last = 0

            def tell(done: int, total: int) -> None:
                nonlocal last
                last = total
                self.progress(self._before + done, self._before + total)

            self._kept[key] = likelihoods(
                self.models, groups, limit, self.batch_size, self.workers, tell
            )
            self._before += last
        return self._kept[key][name]


class _Streamed:
    """Put in front of the harness's class: what computes is replaced, what reads text is not."""

    shared: Shared
    name: str
    max_length: int
    prefix_token_id: int
    tok_encode: Callable[[str], list[int]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(context), tuple(follows)) for _, context, follows in requests]
        if any(not pair.continuation for pair in pairs):
            raise DataError("an answer of this task is empty: it has no likelihood")
        longest = max((len(pair.continuation) for pair in pairs), default=0)
        if longest > self.max_length:
            raise DataError(f"an answer has {longest} tokens, the model reads {self.max_length}")
        found = self.shared.answers(self.name, [pairs], self.max_length)
        return [(answer.loglikelihood, answer.greedy) for answer in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p of whole texts, in windows as long as the model reads."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Pair] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [make_disjoint_window(window) for window in rolling]
            windows += [Pair(tuple(context), tuple(follows)) for context, follows in own]
            counts.append(len(own))
        size = self.shared.batch_size  # the harness makes batches of windows in their order
        groups = [windows[at : at + size] for at in range(0, len(windows), size)]
        found = iter(self.shared.answers(self.name, groups, self.max_length))
        return [sum(next(found).loglikelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Refused: every token would be a walk through all layers."""
        raise refuse_generation(requests[0].task_name)


def refuse_generation(task: str | None) -> UnsupportedModelError:
    """A task that generates, at the streamed door."""
    return UnsupportedModelError(
        f"task {task!r} generates text; the streamed door only measures likelihoods",
        "add --door whole, which holds the model in memory",
    )


class _Counted:
    """Put in front of the harness's class: says how far it is."""

    batch_size: int
    progress: Callable[[int, int], None]
    done = 0
    total = 0

    def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> Any:
        rows = {(*context, *follows[:-1]) for _, context, follows in requests}
        self.total += -(-len(rows) // self.batch_size)
        return super()._loglikelihood_tokens(requests, **more)  # type: ignore[misc]

    def _model_call(self, *inputs: Any, **more: Any) -> Any:
        self.done += 1
        self.progress(self.done, max(self.done, self.total))
        return super()._model_call(*inputs, **more)  # type: ignore[misc]


def streamed(shared: Shared, name: str, tokenizer: Any) -> Any:
    """The model ``name`` of ``shared``, as the harness wants one."""
    model = shared.models[name]
    model.load_resident()
    given = {"shared": shared, "name": name}
    return _made(_Streamed, given, model.model, tokenizer, shared.batch_size)


def whole(
    model: Any,
    tokenizer: Any,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """A transformers model in memory, as the harness wants one."""
    given = {"progress": staticmethod(progress)}
    return _made(_Counted, given, model, tokenizer, batch_size)


def _made(front: type, given: dict[str, Any], model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    kind: Any = type(front.__name__.strip("_"), (front, HFLM), given)
    with quiet():
        return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
