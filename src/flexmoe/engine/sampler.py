"""Logits to tokens. Enters: logits [N, V] and the sampling state of each row. Leaves: one token a row.

Order, as in transformers: logit_bias, repetition penalty, frequency and presence penalty, grammar, min_tokens; then,
unless greedy, temperature, top_k, top_p (of what top_k left), min_p. Each filter is a threshold on the logits, so
equally likely tokens stay or go together. A row's result depends on its own logits and state only, never on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flexmoe.engine.device import to_device
from flexmoe.engine.outputs import TokenLogprobs, TokenRouting
from flexmoe.engine.sampling_state import SamplingState

__all__ = ["NO_TOKEN", "SampleOutput", "Sampler", "SamplingState"]

Rows = Sequence[SamplingState]
Chooser = Callable[[torch.Tensor, Rows], torch.Tensor]

# In place of a token that could not be chosen. The kernels on a GPU write it, too.
NO_TOKEN = -1

# Sorting the whole vocabulary to find the most likely tokens is slow; this many are looked at first.
_SHORTLIST = 128
# Logits looked at together on a CPU: rows few enough to stay in the cache through all steps.
_CPU_CHUNK = 2**16
# Below this temperature fp32 cannot divide by it; the draw has long been greedy.
_COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """One token a row, or NO_TOKEN; its log-probability for the rows that asked; its experts, if any row asked."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    routing: list[TokenRouting | None] = field(default_factory=list)

    def plus(self, other: SampleOutput) -> SampleOutput:
        """The rows of both, these first."""
        routing = [*self.all_routing(), *other.all_routing()] if self.routing or other.routing else []
        return SampleOutput(self.token_ids + other.token_ids, self.logprobs + other.logprobs, routing)

    def all_routing(self) -> list[TokenRouting | None]:
        """One entry a row."""
        return self.routing or [None] * len(self.token_ids)


class Sampler:
    """Chooses the next token of each row. Holds nothing: all memory is in the rows' SamplingState."""

    def sample(
        self, logits: torch.Tensor, states: Sequence[SamplingState], likeliest: torch.Tensor | None = None
    ) -> SampleOutput:
        """logits: [N, V] of any float type, left unchanged. The caller accepts the tokens into the states.

        likeliest: int64 [N], what a greedy row gets by these logits, if somebody has found it already. A row whose
        logits are not numbers gets NO_TOKEN.
        """
        chosen = self.choose(logits, states, likeliest)
        token_ids: list[int] = chosen.tolist()
        return SampleOutput(token_ids, _logprobs(logits, chosen, token_ids, states))

    def choose(
        self, logits: torch.Tensor, states: Sequence[SamplingState], likeliest: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tokens alone, [N] on the device of the logits. The host waits for nothing if all of them are greedy."""
        if all(state.plain_greedy for state in states):
            return _argmax(logits, states) if likeliest is None else likeliest
        size = max(1, _CPU_CHUNK // logits.shape[1]) if logits.is_cpu else len(states)
        starts = range(0, len(states), size)
        return torch.cat(
            [_by_row(states[i : i + size], _is_plain, logits[i : i + size], _argmax, _choose) for i in starts]
        )


def _by_row(
    states: Rows, test: Callable[[SamplingState], bool], logits: torch.Tensor, yes: Chooser, no: Chooser
) -> torch.Tensor:
    """Tokens [n] of logits [n, V]: of the rows that pass the test by `yes`, of the others by `no`."""
    passed = [test(state) for state in states]
    if all(passed) or not any(passed):
        return (yes if all(passed) else no)(logits, states)
    chosen = torch.empty(len(states), dtype=torch.long, device=logits.device)
    for choose, verdict in ((yes, True), (no, False)):
        rows = [row for row, found in enumerate(passed) if found is verdict]
        index = _tensor(rows, logits)
        chosen[index] = choose(logits[index], [states[row] for row in rows])
    return chosen


def _argmax(logits: torch.Tensor, _: Rows) -> torch.Tensor:
    """The most likely token of each row: [n]. Of equal logits the lower id; -1 if one is NaN, which counts as largest.

    numpy's is ten times quicker on a CPU than torch's, and leaves torch's threads alone.
    """
    if logits.is_cpu:
        values = logits.float().numpy()
        best = values.argmax(-1)
        for row, token in enumerate(best.tolist()):  # for few rows quicker than an index of all
            if math.isnan(values[row, token]):
                best[row] = -1
        return torch.from_numpy(best)
    chosen = torch.argmax(logits, dim=-1)
    return chosen.masked_fill_(logits.gather(1, chosen[:, None])[:, 0].isnan(), -1)


def _largest(work: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` largest entries of each row of work [n, V], falling: [n, size]. numpy for the same reasons."""
    if not work.is_cpu:
        return torch.topk(work, size, dim=-1).values
    best = np.partition(work.numpy(), work.shape[1] - size, axis=-1)[:, work.shape[1] - size :]
    best.sort(axis=-1)
    return torch.from_numpy(best[:, ::-1].copy())


def _choose(logits: torch.Tensor, states: Rows) -> torch.Tensor:
    """Tokens [n] of rows that need more than the argmax of the raw logits [n, V]."""
    return _by_row(states, _is_greedy, adjust(logits.float(), states), _argmax, _draw)


def _is_plain(state: SamplingState) -> bool:
    return state.plain_greedy


def _is_greedy(state: SamplingState) -> bool:
    return state.params.greedy


def adjust(logits: torch.Tensor, states: Rows) -> torch.Tensor:
    """Logits [n, V] in fp32 with biases added, penalties applied and early stops forbidden; a copy if any is."""
    if not any(state.params.changes_logits for state in states):
        return logits
    work = logits.clone()
    biases = [(row, token, bias) for row, s in enumerate(states) for token, bias in s.params.logit_bias.items()]
    if biases:
        row, token, bias = zip(*biases, strict=True)
        place = (_tensor(row, work), _tensor(token, work))
        work[place] += torch.tensor(bias, device=work.device)
    _penalise(work, states)
    _keep_to_grammar(work, states)
    suppressed = [(row, token) for row, s in enumerate(states) for token in s.suppressed_ids]
    if suppressed:
        row, token = zip(*suppressed, strict=True)
        work[_tensor(row, work), _tensor(token, work)] = -math.inf
    return work


def _keep_to_grammar(work: torch.Tensor, states: Rows) -> None:
    """Forbid, in place, what a row's grammar does not allow next."""
    for place, state in enumerate(states):
        bits = state.allowed
        if bits is not None:
            allowed = np.unpackbits(bits.view(np.uint8), count=work.shape[1], bitorder="little")  # [V]
            work[place].masked_fill_(torch.from_numpy(allowed == 0).to(work.device), -math.inf)


def _penalise(work: torch.Tensor, states: Rows) -> None:
    """Lower the logits of tokens already seen, in place; one gather and one scatter for all rows together."""
    sizes = np.array([len(state.seen) for state in states])
    if not sizes.sum():
        return
    params = [(s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty) for s in states]
    per_token = np.repeat(np.array(params, np.float32), sizes, axis=0)  # [U, 3], U = tokens seen in all rows
    repetition, frequency, presence = torch.from_numpy(per_token).to(work.device).unbind(1)
    place = (
        torch.from_numpy(np.repeat(np.arange(len(states)), sizes)).to(work.device),
        torch.from_numpy(np.concatenate([state.seen.ids for state in states])).to(work.device),
    )
    counts = torch.from_numpy(np.concatenate([state.seen.counts for state in states])).to(work.device)
    values = work[place]
    values = torch.where(values > 0, values / repetition, values * repetition)
    work[place] = values - frequency * counts - presence * (counts > 0)


def token_weights(work: torch.Tensor, states: Rows) -> torch.Tensor:
    """What each token's probability is proportional to: [n, V], 0 for those that top_k, top_p and min_p drop.

    Multiplying by a comparison is several times quicker on a CPU than masked_fill, whose branches go astray.
    """
    params = [state.params for state in states]
    work = work - work.amax(dim=-1, keepdim=True)  # 0 for the most likely token, whatever the temperature
    work /= _column([max(p.temperature, _COLDEST) for p in params], work)
    weights = torch.exp(work)
    top_k = [min(p.top_k, work.shape[1]) for p in params]
    cuts_mass = any(p.top_p < 1.0 for p in params)
    size = max(*top_k, min(_SHORTLIST, work.shape[1]) if cuts_mass else 0, 0)
    best = _largest(work, size) if size else work  # [n, size], falling
    if max(top_k) > 0:
        weights *= work >= _kth_largest(best, top_k)
    if cuts_mass:
        total = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
        weights *= work >= _top_p_threshold(work, best, total, [p.top_p for p in params])
    if any(p.min_p > 0.0 for p in params):
        weights *= weights >= _column([p.min_p for p in params], work)  # the most likely token's weight is 1
    return weights


def _kth_largest(best: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Entry k of each row of best [n, size], falling; -inf where k is not positive: [n, 1]."""
    k = _tensor(sizes, best)[:, None]
    return best.gather(1, (k - 1).clamp_(min=0)).masked_fill_(k < 1, -math.inf)


def _top_p_threshold(work: torch.Tensor, best: torch.Tensor, total: torch.Tensor, top_p: list[float]) -> torch.Tensor:
    """The smallest logit of the fewest most likely tokens whose probability reaches top_p: [n, 1].

    best: the largest of work [n, V], falling; more are fetched if they do not reach it. total: the sum of all weights
    [n, 1]. Sums are in fp64, so that they do not depend on how many were fetched.
    """
    wanted = torch.tensor(top_p, device=work.device, dtype=torch.float64)[:, None]
    while True:
        probabilities = torch.exp(best) / total
        reached = probabilities.cumsum(-1)
        if best.shape[1] == work.shape[1] or bool(((reached[:, -1:] >= wanted) | (wanted >= 1.0)).all()):
            break
        best = _largest(work, min(8 * best.shape[1], work.shape[1]))
    # A token stays if those more likely than it do not reach top_p yet; so the first always stays, unless it is NaN.
    num_kept = ((reached - probabilities) < wanted).sum(-1, keepdim=True)
    return best.gather(1, (num_kept - 1).clamp_(min=0)).masked_fill_(wanted >= 1.0, -math.inf)


def _draw(work: torch.Tensor, states: Rows) -> torch.Tensor:
    """One token a row, with probability in proportion to its weight: where the running sum passes a random point. [n]

    One random number a row instead of one a token. Sums are in fp64, so that rounding neither favours a token nor
    depends on the shape of the batch. A row without a finite sum gives -1.
    """
    running = token_weights(work, states).double().cumsum(-1)  # [n, V]
    total = running[:, -1:]
    uniform = to_device(torch.tensor([state.uniform() for state in states], dtype=torch.float64), work.device)
    chosen = torch.searchsorted(running, uniform[:, None] * total, right=True).clamp_(max=work.shape[1] - 1)
    return torch.where(torch.isfinite(total), chosen, -1)[:, 0]


def _logprobs(
    logits: torch.Tensor, chosen: torch.Tensor, token_ids: Sequence[int], states: Rows
) -> list[TokenLogprobs | None]:
    """Log-probabilities under the raw logits, for the rows that asked for them."""
    found: list[TokenLogprobs | None] = [None] * len(states)
    wanted = {row: n for row, s in enumerate(states) if (n := s.params.logprobs) is not None}
    if not wanted:
        return found
    index = torch.tensor(list(wanted), device=logits.device)
    raw = torch.log_softmax(logits[index].float(), dim=-1)  # [n, V]
    own = raw.gather(1, chosen[index][:, None].clamp(min=0))  # [n, 1]
    ranks: list[int] = (1 + (raw > own).sum(-1)).tolist()
    best = _best(raw, list(wanted.values()))
    values: list[float] = own[:, 0].tolist()
    for place, row in enumerate(wanted):
        found[row] = TokenLogprobs(token_ids[row], values[place], ranks[place], best[place])
    return found


def _best(raw: torch.Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The `counts[i]` largest entries of each row i of raw [n, V] with their ids, of equal ones the lower ids."""
    sizes = [min(count, raw.shape[1]) for count in counts]
    best: list[list[tuple[int, float]]] = [[] for _ in sizes]
    if max(sizes) > 0:
        # topk breaks ties as it likes, so take all that reach its last value and break them here.
        candidates = raw >= _kth_largest(_largest(raw, max(sizes)), sizes)
        candidates &= _tensor(sizes, raw)[:, None] > 0
        rows, ids = candidates.nonzero(as_tuple=True)
        for row, token, value in zip(rows.tolist(), ids.tolist(), raw[rows, ids].tolist(), strict=True):
            best[row].append((token, value))
    return [tuple(sorted(b, key=lambda pair: -pair[1])[:size]) for b, size in zip(best, sizes, strict=True)]


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """[n, 1] in the type of `like`."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)[:, None]


def _tensor(values: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values), like.device)
