"""The strategies of spreading a model over ranks, side by side on one machine: speed, bytes sent, imbalance.

    python benchmarks/strategies.py [MODEL] [--ranks 2,4] [--batch 1,8] [--device cuda] [--hf] [--out rows.jsonl]

On a CPU one process decodes in torch, as ranks do there, and as it comes; on GPUs as it comes, which is how ranks do
it, if one GPU holds the model. Then each strategy on each number of ranks. All get the same prompts, greedily, exactly
so many tokens; in fp32 their answers must be the same. A sample is (time for N + 1 tokens - time for 1) / N. Bytes are
those that all ranks together send for a token of a decode step, beside what the formulas of docs/parallel.md give for
the experts that one process was seen to choose. A row is one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe import LLM, SamplingParams
from flexmoe.bench.engines import TimedEngine
from flexmoe.bench.hugging_face import HuggingFace
from flexmoe.bench.latency import first_difference
from flexmoe.bench.record import append, facts, summary
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.workload import make_prompts
from flexmoe.config.layout import RankLayout
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import block_share
from flexmoe.engine import startup
from flexmoe.engine.ranks import RankedRunner
from flexmoe.errors import ConfigError

Row = dict[str, Any]
Bytes = dict[str, float]

_COUNT_BYTES, _BEST_BYTES, _ROUTING_BYTES = 8, 8, 4  # int64s, and each slot and weight of a token sent
_SQUARES_BYTES = 8  # of a row's queries and of its keys, fp32
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run the model. torch_path: one process without its kernels in C, to compare ranks with."""

    name: str
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    torch_path: bool = False


TORCH, AS_IT_COMES = Setup("one process, torch", torch_path=True), Setup("one process, as it comes")


def setups(ranks: int) -> list[Setup]:
    """The strategies on so many ranks; a hybrid needs four or more, of an even number."""
    found = [
        Setup("tensor", ParallelPlan(ranks)),
        Setup("expert, all-reduce", ParallelPlan(ranks, ranks)),
        Setup("expert, all-to-all", ParallelPlan(ranks, ranks, moe_dispatch="all_to_all")),
    ]
    if ranks >= 4 and ranks % 2 == 0:
        found.append(Setup("hybrid, all-reduce", ParallelPlan(ranks, ranks // 2)))
        found.append(Setup("hybrid, all-to-all", ParallelPlan(ranks, ranks // 2, moe_dispatch="all_to_all")))
    return found


class Choices:
    """A probe that keeps the experts which each MoE layer chose in decode steps of `rows` rows: [rows, K] each."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.by_layer: dict[int, list[Tensor]] = {}

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if stage == "topk_ids" and len(tensor) == self._rows:
            self.by_layer.setdefault(layer, []).append(tensor.to("cpu", torch.int64, copy=True))


def formula(
    config: ModelConfig, plan: ParallelPlan, batch: int, itemsize: int, choices: Choices, *, fused: bool = False,
    one_shot: bool = False,
) -> Bytes:  # fmt: skip
    """Bytes by label that all ranks send for a token of a decode step, if experts are chosen like that.

    fused: each rank sends the others the best of its words, and not the first one all. one_shot: each sends the others
    its whole part of a sum.
    """
    P, H = plan.num_ranks, config.hidden_size
    moe_layers = sum(layer.is_moe for layer in config.layers)
    all_reduce = (P if one_shot else 2) * (P - 1) * H * itemsize
    sent: Bytes = {
        "embedding": all_reduce,
        "linear": (2 * config.num_layers - moe_layers) * all_reduce,  # attention, and dense feed-forwards
        "logits": P * (P - 1) * _BEST_BYTES if fused else (P - 1) * -(-config.vocab_size // P) * itemsize,
    }
    if config.attention.qk_norm == "full":
        sent["qk_norm"] = config.num_layers * (P if one_shot else 2) * (P - 1) * _SQUARES_BYTES
    if not plan.uses_all_to_all:
        return sent | {"combine": moe_layers * all_reduce}
    assert config.moe is not None
    ep, etp, row = plan.expert_parallel_size, plan.expert_tensor_size, H * itemsize
    away, copies = _copies(config, plan, choices)
    routing = 2 * config.moe.top_k * _ROUTING_BYTES
    sent |= {
        "counts": moe_layers * P * (ep - 1 + etp - 1) * _COUNT_BYTES / batch,
        "dispatch": away * row,
        "combine": away * row,
        "routing": (away + copies * (etp - 1)) * routing,
        "rows": moe_layers * P * (P - 1) * -(-batch // P) * row / batch,
    }
    if etp > 1:
        sent |= {"slice_dispatch": copies * (etp - 1) * row, "slice_combine": copies * (etp - 1) * row}
    return sent


def _copies(config: ModelConfig, plan: ParallelPlan, choices: Choices) -> tuple[float, float]:
    """Of a token, summed over layers: copies that go to other ep ranks, and all that an ep rank computes (D)."""
    layout, away, total, tokens = RankLayout(plan), 0, 0, 0
    for layer, steps in choices.by_layer.items():
        for chosen in steps:
            goes = _targets(config, plan, layer, chosen)  # [T, ep]
            owners = torch.zeros(len(chosen), dtype=torch.int64)
            for rank in range(plan.num_ranks):
                share = block_share(len(chosen), plan.num_ranks, rank)
                owners[share.start : share.stop] = layout.coordinates(rank).ep
            total += int(goes.sum())
            away += int(goes.sum()) - int(goes.gather(1, owners[:, None]).sum())
            tokens += len(chosen)
    rows = max(1, tokens) / max(1, len(choices.by_layer))
    return away / rows, total / rows


def _rank_of(config: ModelConfig, plan: ParallelPlan, layer: int) -> Tensor:
    """[E] the ep rank of each expert; placements without replicas only."""
    assert config.moe is not None
    placement = plan.placement(config.moe.num_experts, layer)
    return torch.tensor([placement.replicas(expert)[0][0] for expert in range(config.moe.num_experts)])


def _targets(config: ModelConfig, plan: ParallelPlan, layer: int, chosen: Tensor) -> Tensor:
    """chosen [T, K] -> [T, ep]: which ranks hold some expert of each row."""
    return (_rank_of(config, plan, layer)[chosen][..., None] == torch.arange(plan.expert_parallel_size)).any(1)


def imbalance(config: ModelConfig, plan: ParallelPlan, choices: Choices) -> Row:
    """Most loaded ep rank over the mean, averaged over layers: of the choices of all steps, and of each step."""
    if not choices.by_layer:
        return {"run": 1.0, "step": 1.0}
    runs, steps = [], []
    for layer, seen in choices.by_layer.items():
        ranks = _rank_of(config, plan, layer)
        loads = torch.stack([torch.bincount(ranks[c].flatten(), minlength=plan.expert_parallel_size) for c in seen])
        runs.append(_over_mean(loads.sum(0)))
        steps += [_over_mean(load) for load in loads]
    return {"run": round(sum(runs) / len(runs), 3), "step": round(sum(steps) / len(steps), 3)}


def _over_mean(load: Tensor) -> float:
    return float(load.max() / load.double().mean())


class Ours:
    """FlexMoE in one setup."""

    def __init__(self, subject: Subject, setup: Setup, options: Row) -> None:
        self._name = subject.name
        left_out = _without_c() if setup.torch_path else contextlib.nullcontext()
        with left_out:
            self.llm = LLM(
                str(subject.folder), load_format=subject.load_format, enable_prefix_caching=False,
                plan=setup.plan, **options,
            )  # fmt: skip

    @property
    def fused(self) -> bool:
        """Whether decode steps run in Triton kernels."""
        return str(self.llm.describe()["decode_kernels"]).startswith("Triton")

    @property
    def one_shot(self) -> bool:
        """Whether ranks read each other's parts of a sum."""
        return str(self.llm.describe()["decode_kernels"]).endswith("one launch")

    def about(self) -> Row:
        return self.llm.describe() | {"model": self._name}

    def generate(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [list(output.token_ids) for output in self.llm.generate(list(prompts), params)]

    def choices(self, prompts: Sequence[list[int]], count: int) -> Choices:
        """Of one process."""
        seen = Choices(len(prompts))
        self.llm.engine.local_runner.probe = seen
        self.generate(prompts, count)
        self.llm.engine.local_runner.probe = None
        return seen

    def sent(self, prompts: Sequence[list[int]], count: int) -> Bytes:
        """Bytes by label that all ranks send for a token of a decode step."""
        runner = self.llm.engine.runner
        assert isinstance(runner, RankedRunner)
        found: list[Bytes] = []
        for tokens in (1, count):  # with the prompts and their first tokens, and with the decode steps as well
            runner.traffic()
            self.generate(prompts, tokens)
            ranks = runner.traffic()
            found.append({label: sum(rank.get(label, 0) for rank in ranks) for label in ranks[-1]})
        share = len(prompts) * (count - 1)
        return {label: (total - found[0].get(label, 0)) / share for label, total in found[1].items()}


def _release_memory(device: str) -> None:
    """What a model of this process held, for the ranks, which are others."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _without_c() -> Iterator[None]:
    """Models loaded inside decode in torch, with weights packed for it."""
    original = startup.why_not_native
    startup.why_not_native = lambda *_: "left out"  # type: ignore[assignment]
    try:
        yield
    finally:
        startup.why_not_native = original


class Bench:
    """One run: what all rows have in common, and what one process answered."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args
        self.facts = facts(torch.device(args.device))
        vocab = subject.config.vocab_size
        self.prompts = {batch: make_prompts(vocab, batch, args.prompt_len, args.seed) for batch in args.batch}
        self.answers: dict[int, list[list[int]]] = {}
        self.choices: dict[int, Choices] = {}

    def rows(self) -> Iterator[Row]:
        """Of one process first: the others are compared with it."""
        first = AS_IT_COMES if self.args.device == "cuda" else TORCH
        others = (AS_IT_COMES, *(setup for ranks in self.args.ranks for setup in setups(ranks)))
        chosen = [setup for setup in others if any(only in setup.name for only in self.args.only.split(","))]
        for setup in (first, *(setup for setup in chosen if setup != first)):
            _release_memory(self.args.device)
            try:
                engine = Ours(self.subject, setup, self._options())
            except ConfigError as error:
                yield self._row("flexmoe", {"strategy": setup.name}, {}, {"error": str(error)})
                continue
            with engine.llm:
                yield from self._measure(engine, setup)

    def _options(self) -> Row:
        args, most = self.args, max(self.args.batch)
        # All prompts in one step, so that all rows decode together.
        length = args.prompt_len + args.output_len + 1
        return {
            "dtype": args.dtype, "device": args.device, "max_num_seqs": most, "max_model_len": length,
            "max_num_batched_tokens": most * args.prompt_len,
        } | ({} if args.device == "cuda" else {"kv_cache_memory": args.kv_cache_memory})  # fmt: skip

    def _measure(self, engine: Ours, setup: Setup) -> Iterator[Row]:
        plan = setup.plan
        config = {"strategy": setup.name, "ranks": plan.num_ranks, "plan": plan.to_json()} | engine.about()
        count = self.args.output_len + 1
        for batch, prompts in self.prompts.items():
            result = self._timed(engine, batch)
            if plan.num_ranks > 1:
                result |= self._spread(engine, plan, batch)
            elif batch not in self.choices:
                self.choices[batch] = engine.choices(prompts, count)
            yield self._row("flexmoe", config, {"batch": batch}, result)
        if setup == AS_IT_COMES and self.args.hf:
            yield from self._hugging_face(engine)

    def _spread(self, engine: Ours, plan: ParallelPlan, batch: int) -> Row:
        """What travels, beside the formulas, and how unevenly the work falls: if choices of experts are known."""
        config, choices = self.subject.config, self.choices.get(batch)
        sent = engine.sent(self.prompts[batch], self.args.output_len + 1)
        found: Row = {"sent_bytes_per_token": _rounded(sent), "sent_in_all": round(sum(sent.values()), 1)}
        if choices is not None:
            itemsize = getattr(torch, self.args.dtype).itemsize
            expected = formula(
                config, plan, batch, itemsize, choices, fused=engine.fused, one_shot=engine.one_shot
            )  # fmt: skip
            found |= {
                "formula_bytes_per_token": _rounded(expected), "imbalance": imbalance(config, plan, choices),
            }  # fmt: skip
        return found

    def _hugging_face(self, ours: Ours) -> Iterator[Row]:
        """As it comes, on the weights of one process."""
        weights = {name: param.data for name, param in ours.llm.engine.local_runner.model.named_parameters()}
        theirs = HuggingFace(self.subject.folder, self.subject.config, weights)
        for batch in self.prompts:
            yield self._row("hf-default", {"strategy": "one process"} | theirs.about(), {"batch": batch},
                            self._timed(theirs, batch))  # fmt: skip

    def _timed(self, engine: TimedEngine, batch: int) -> Row:
        prompts, count = self.prompts[batch], self.args.output_len
        engine.generate(prompts, count + 1)
        steps, firsts, tokens = [], [], []
        for _ in range(_REPEATS):
            first, _ = _clock(engine, prompts, 1)
            total, tokens = _clock(engine, prompts, count + 1)
            steps.append((total - first) / count)
            firsts.append(first)
        reference = self.answers.setdefault(batch, tokens)
        places = [first_difference(*pair) for pair in zip(reference, tokens, strict=True)]
        step = summary([1e3 * step for step in steps])
        return {
            "step_ms": step,
            "tokens_per_s": round(1e3 * batch / step["median"], 1),
            "first_token_ms": summary([1e3 * first for first in firsts]),
            "samples": _REPEATS,
            "equal_answers": places.count(None),
            "first_difference": min((place for place in places if place is not None), default=None),
        }

    def _row(self, engine: str, config: Row, params: Row, result: Row) -> Row:
        args = self.args
        asked = {"prompt_len": args.prompt_len, "output_len": args.output_len, "dtype": args.dtype, "seed": args.seed}
        row = {"benchmark": "strategies", "engine": engine, "model": self.subject.facts(), "params": params | asked}
        note = {"note": args.note} if args.note else {}
        return row | {"config": config, "result": result} | note | self.facts


def _clock(engine: TimedEngine, prompts: Sequence[list[int]], count: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = engine.generate(prompts, count)
    return time.perf_counter() - start, tokens


def _rounded(figures: Bytes) -> Bytes:
    return {name: round(value, 2) for name, value in sorted(figures.items())}


def _line(row: Row) -> str:
    config, result = row["config"], row["result"]
    name = f"{row['engine']}, {config['strategy']}, {config.get('ranks', 1)} ranks"
    if "error" in result:
        return f"{name}: {result['error']}"
    same = result.get("formula_bytes_per_token") in (None, result.get("sent_bytes_per_token"))
    sent = f", {result['sent_in_all']:.0f} bytes a token" if "sent_in_all" in result else ""
    return (
        f"{name}, batch {row['params']['batch']}: {result['step_ms']['median']:.2f} ms a step, "
        f"{result['tokens_per_s']} tokens/s, equal answers {result['equal_answers']}{sent}"
        + ("" if same else " (NOT the formula's)")
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="a folder, a preset or a name on the Hub; none: the built-in model")
    parser.add_argument("--ranks", type=_numbers, default=[2], help="numbers of ranks, e.g. 2,4")
    parser.add_argument("--only", default="", help="strategies with one of these in their name, e.g. tensor,all-reduce")
    parser.add_argument("--layers", type=int, help="of a preset: only so many")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=_numbers, default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--kv-cache-memory", type=int, default=2**26, help="bytes of each process on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hf", action="store_true", help="Hugging Face transformers beside it")
    parser.add_argument("--note", help="goes into every row: what else the machine was doing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and append rows."""
    args = arguments(words)
    with open_subject(args.model, changes=Changes(layers=args.layers)) as subject:
        for row in Bench(subject, args).rows():
            print(_line(row), flush=True)
            if args.out:
                append(args.out, row)


if __name__ == "__main__":
    main()
