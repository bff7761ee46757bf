"""Greedy tokens under every condition the engine can be in. Enters: the reference's answers. Leaves: checks.

The weights are loaded once: each scenario gives the engine a scheduler of its own, and the scheduler counts whether
what the scenario is there to provoke really happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.outputs import RequestOutput
from flexmoe.llm import LLM
from flexmoe.scheduling.block_manager import BlockManager
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.scheduler import Scheduler
from flexmoe.scheduling.step import Step
from flexmoe.verify.reference import Answer
from flexmoe.verify.report import Check
from flexmoe.verify.tolerance import Tolerance

_CHUNK = 7  # tokens a step in the chunked scenario: odd, so that chunks end within blocks
_MANY = 20  # requests of the largest batch
Tokens = tuple[int, ...]


class WatchedScheduler(Scheduler):
    """A scheduler that counts. together: most requests in a step; split: prefill chunks that were not the last."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        super().__init__(config, blocks)
        self.together = self.split = self.preemptions = 0

    def schedule(self) -> Step:
        step = super().schedule()
        self.together = max(self.together, len(step.chunks))
        self.split += sum(not chunk.samples for chunk in step.chunks)
        self.preemptions += len(step.preempted)
        return step


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an answer leaves the reference's. got: None if it ended early. gap: how much better `expected` was."""

    prompt: int
    position: int
    expected: int
    got: int | None
    gap: float

    def __str__(self) -> str:
        got = "nothing" if self.got is None else f"token {self.got}"
        return (
            f"prompt {self.prompt}, new token {self.position}: {got} instead of {self.expected}, "
            f"whose logit is {self.gap:.2g} higher"
        )


def blocks_for(tokens: int, block_size: int) -> int:
    """Cache blocks that hold so many tokens."""
    return -(-tokens // block_size)


def use_scheduler(
    llm: LLM,
    prompts: Sequence[Tokens],
    *,
    max_tokens: int,
    step_tokens: int | None = None,
    num_blocks: int | None = None,
    prefix_caching: bool = False,
) -> WatchedScheduler:
    """Give the engine an empty cache and a new scheduler.

    step_tokens: at most so many a step (default: as many as there are). num_blocks: default is enough for all, or
    all there are.
    """
    size = llm.engine.options.cache.block_size
    if num_blocks is None:
        wanted = sum(blocks_for(len(ids) + max_tokens, size) for ids in prompts) + len(prompts)
        num_blocks = min(wanted, llm.describe()["kv_cache_blocks"])
    if step_tokens is None:
        step_tokens = sum(len(ids) for ids in prompts)
    config = SchedulerConfig(max_num_seqs=len(prompts), max_num_batched_tokens=step_tokens)
    scheduler = WatchedScheduler(config, BlockManager(num_blocks, size, prefix_caching))
    llm.engine.scheduler = scheduler
    return scheduler


def generate(llm: LLM, prompts: Sequence[Tokens], max_tokens: int) -> list[RequestOutput]:
    """Greedy, and past every end-of-sequence token: exactly `max_tokens` each."""
    outputs = llm.generate(list(prompts), _greedy(max_tokens))
    llm.engine.scheduler.check_integrity()
    return outputs


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def first_difference(number: int, answer: Answer, tokens: Sequence[int]) -> Difference | None:
    """Where the tokens of prompt `number` first differ from the reference's."""
    for position, expected in enumerate(answer.tokens):
        got = tokens[position] if position < len(tokens) else None
        if got != expected:
            logits = answer.logits[position]
            gap = float("inf") if got is None else float(logits[expected] - logits[got])
            return Difference(number, position, expected, got, gap)
    return None


class Scenarios:
    """The runs over one set of answers."""

    def __init__(self, llm: LLM, answers: Sequence[Answer], tolerance: Tolerance) -> None:
        self.llm, self.answers, self.tolerance = llm, answers, tolerance
        self.prompts = [answer.prompt for answer in answers]
        self.max_tokens = len(answers[0].tokens)

    def run(self) -> list[Check]:
        """All checks, the simplest condition first."""
        return [
            self.alone(),
            self.batched(self._several()),
            self.batched(self._many()),
            self.chunked(),
            self.prefix_hit(),
            self.preempted(prefix_caching=False),
            self.preempted(prefix_caching=True),
        ]

    def alone(self) -> Check:
        """One request at a time."""
        outputs = []
        for answer in self.answers:
            use_scheduler(self.llm, [answer.prompt], max_tokens=self.max_tokens)
            outputs += generate(self.llm, [answer.prompt], self.max_tokens)
        return self._compare("tokens: alone", outputs)

    def batched(self, prompts: Sequence[Tokens]) -> Check:
        """Several requests in every step."""
        watched = use_scheduler(self.llm, prompts, max_tokens=self.max_tokens)
        outputs = generate(self.llm, prompts, self.max_tokens)
        return self._compare(f"tokens: {watched.together} together", outputs, happened=watched.together > 1)

    def chunked(self) -> Check:
        """Prompts computed a few tokens at a time, beside the decode steps of others."""
        longest = max(len(ids) for ids in self.prompts)
        name = "tokens: chunked prefill"
        if longest < 2:
            return _skipped(name, "no prompt has 2 tokens")
        step_tokens = min(_CHUNK, max(1, longest // 2))
        watched = use_scheduler(self.llm, self.prompts, max_tokens=self.max_tokens, step_tokens=step_tokens)
        outputs = generate(self.llm, self.prompts, self.max_tokens)
        note = f"{watched.split} partial chunks"
        return self._compare(name, outputs, happened=watched.split > 0, note=note)

    def prefix_hit(self) -> Check:
        """Every prompt a second time, when the cache holds its beginning."""
        name, size = "tokens: prefix hit", self.llm.engine.options.cache.block_size
        long = [len(ids) > size for ids in self.prompts]
        if not any(long):
            return _skipped(name, f"no prompt is longer than a block of {size} tokens")
        use_scheduler(self.llm, self.prompts, max_tokens=self.max_tokens, prefix_caching=True)
        generate(self.llm, self.prompts, 1)
        outputs = generate(self.llm, self.prompts, self.max_tokens)
        cached = [output.metrics.num_cached_tokens for output in outputs]
        happened = all(count > 0 for count, is_long in zip(cached, long, strict=True) if is_long)
        return self._compare(name, outputs, happened=happened, note=f"{sum(cached)} tokens cached")

    def preempted(self, *, prefix_caching: bool) -> Check:
        """So few cache blocks that requests lose theirs while they decode, and are computed again."""
        name = "tokens: preempted" + (", cached" if prefix_caching else "")
        prompts = self._several()
        num_blocks = self._scarce_blocks(prompts, prefix_caching)
        if num_blocks is None:
            return _skipped(name, "these prompts are too short to run out of blocks")
        watched = use_scheduler(
            self.llm, prompts, max_tokens=self.max_tokens, num_blocks=num_blocks, prefix_caching=prefix_caching
        )
        outputs = generate(self.llm, prompts, self.max_tokens)
        note = f"{watched.preemptions} preemptions"
        return self._compare(name, outputs, happened=watched.preemptions > 0, note=note)

    def _several(self) -> list[Tokens]:
        """All prompts; a single one is doubled."""
        return self.prompts if len(self.prompts) > 1 else self.prompts * 2

    def _many(self) -> list[Tokens]:
        """The prompts again and again: an engine has other ways for a few rows than for many."""
        return self.prompts * -(-_MANY // len(self.prompts))

    def _scarce_blocks(self, prompts: Sequence[Tokens], prefix_caching: bool) -> int | None:
        """The fewest blocks with which a rehearsal, the scheduler without a model, comes to preempt."""
        needed = [blocks_for(len(ids) + self.max_tokens, self.llm.engine.options.cache.block_size) for ids in prompts]
        for num_blocks in range(max(needed), sum(needed)):
            watched = use_scheduler(
                self.llm, prompts, max_tokens=self.max_tokens, num_blocks=num_blocks, prefix_caching=prefix_caching
            )
            _rehearse(watched, prompts, self.max_tokens)
            if watched.preemptions:
                return num_blocks
        return None

    def _compare(self, name: str, outputs: Sequence[RequestOutput], *, happened: bool = True, note: str = "") -> Check:
        """outputs: in the order of the answers, repeated as often as it takes."""
        found = [
            first_difference(i % len(self.answers), self.answers[i % len(self.answers)], output.token_ids)
            for i, output in enumerate(outputs)
        ]
        differences = [difference for difference in found if difference is not None]
        total = len(outputs) * self.max_tokens
        same = total - sum(self.max_tokens - difference.position for difference in differences)
        figure = f"{same} of {total}" + (f"; {note}" if note else "")
        limit = f"all; tie {self.tolerance.choice:g}"
        if not happened:
            return Check(name, "fail", figure, limit, "what this check is about did not happen")
        worst = max(differences, key=lambda difference: difference.gap, default=None)
        if worst is None:
            return Check(name, "pass", figure, limit)
        if not self.tolerance.judge_decoding:
            return Check(name, "info", figure, "not judged", str(worst))
        return Check(name, "fail" if worst.gap > self.tolerance.choice else "tie", figure, limit, str(worst))


def _rehearse(scheduler: Scheduler, prompts: Sequence[Tokens], max_tokens: int) -> None:
    """Run requests to their end with tokens that no model chose."""
    for number, ids in enumerate(prompts):
        request = Request(
            str(number), ids, _greedy(max_tokens), eos_token_ids=(), max_total_tokens=len(ids) + max_tokens
        )
        scheduler.add(request)
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        # A token for each request alone: the prefix cache would share blocks of equal ones.
        scheduler.update(step, [-1 - int(chunk.request.request_id) for chunk in step.chunks if chunk.samples])


def _skipped(name: str, why: str) -> Check:
    return Check(name, "skipped", "", "", why)
