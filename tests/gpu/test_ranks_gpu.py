"""Ranks on GPUs over NCCL: the tokens of one GPU, graphs or not, ahead or not; counts; and a rank that is killed."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.config.plan import ExpertPlacement
from flexmoe.engine.cuda_graph import GraphedDecoder
from flexmoe.engine.ranks import RankedRunner
from flexmoe.errors import RankError
from flexmoe.models import fused_data_ranks
from flexmoe.parallel.peers import why_not_shared
from tests.cpu.tiny_models import tiny
from tests.multi.pool import Pool
from tests.multi.test_supervisor import Nothing
from tests.multi.worker import PoolWorker

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "device": "cuda", "num_blocks": 200, "enable_prefix_caching": False,
}  # fmt: skip
TENSOR: dict[str, Any] = {"tensor_parallel_size": 2}
EXPERT: dict[str, Any] = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
DATA: dict[str, Any] = {"data_parallel_size": 2, "expert_parallel_size": 2}
DATA_SLICED: dict[str, Any] = {"data_parallel_size": 2}
TO_ALL: dict[str, Any] = {"moe_dispatch": "all_to_all"}
CASES = [
    ("mixtral", "tensor"), ("mixtral", "expert"), ("mixtral", "replicas"), ("olmoe", "tensor"),
    ("qwen2_moe", "expert"), ("qwen2_moe", "replicas"), ("qwen3_moe", "tensor"),
]  # fmt: skip
PROMPTS = [[5, 17, 230, 9, 44], [11] * 3, list(range(3, 40)), [7, 8]]
CROWD = [[11 + i, 7, 5] for i in range(41)]  # rows grouped by expert, and padded ones
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, seed=3, max_tokens=16, ignore_eos=True)
ON_HOST = SamplingParams(temperature=0, max_tokens=8, logprobs=2, repetition_penalty=1.3, ignore_eos=True)

Tokens = list[tuple[int, ...]]


def plan_of(name: str, num_experts: int) -> dict[str, Any]:
    """Options; "replicas": uneven, the first expert three times, the last ones out of order."""
    if name != "replicas":
        return {"tensor": TENSOR, "expert": EXPERT}[name]
    first, last = (*range(num_experts - 1), 0), tuple(range(num_experts - 1, num_experts // 2, -1))
    return EXPERT | {"placements": {None: ExpertPlacement(num_experts, (first, (0, *last)))}}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def answers(llm: LLM, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> Tokens:
    return [output.token_ids for output in llm.generate(prompts, params)]


def all_answers(llm: LLM) -> list[Tokens]:
    return [answers(llm, GREEDY), answers(llm, GREEDY, CROWD), answers(llm, DRAWN), answers(llm, ON_HOST)]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_fp32_tokens_are_those_of_one_gpu(pool: Pool, name: str, plan: str) -> None:
    with LLM(tiny(name), **OPTIONS) as one:
        expected, moe = all_answers(one), one.config.moe
    assert moe is not None
    with pool.llm(tiny(name), **OPTIONS, **plan_of(plan, moe.num_experts)) as llm:
        assert llm.describe()["decode_kernels"] == "Triton, sums over ranks by one launch"
        assert all_answers(llm) == expected
        assert all(count > 3 for count in pool.call(num_graphs))


def num_graphs(worker: PoolWorker) -> int:
    assert worker.runner is not None
    assert worker.runner._graphed is not None
    return len(worker.runner._graphed._graphs)


def replayed_prompts(worker: PoolWorker) -> int:
    """Forms of prompts that are graphs."""
    assert worker.runner is not None
    assert worker.runner._prompts is not None
    return sum(graph is not None for graph in worker.runner._prompts._graphs.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", [TENSOR, EXPERT], ids=["tensor", "expert"])
def test_prompts_are_graphs_and_their_tokens_do_not_change(pool: Pool, plan: dict[str, Any], dtype: str) -> None:
    options = OPTIONS | {"dtype": dtype}
    with LLM(tiny("qwen3_moe"), **options) as one:
        expected = answers(one, GREEDY)
    with pool.llm(tiny("qwen3_moe"), **options, **plan) as llm:
        found = [answers(llm, GREEDY) for _ in range(4)]
        assert all(count >= 1 for count in pool.call(replayed_prompts))
        assert found[1:] == found[:-1]
        if dtype == "float32":
            assert found[0] == expected
        llm.engine.runner.traffic()  # type: ignore[union-attr]
        sent = []
        for _ in range(2):
            answers(llm, GREEDY)
            sent.append(llm.engine.runner.traffic())  # type: ignore[union-attr]
        assert sent[0] == sent[1]


def leave_graphs_out(worker: PoolWorker) -> None:
    """For the model that this rank has now."""

    def run(form: Any, packed: Any, probe: Any) -> None:
        graphed._step(form, packed, probe)

    assert worker.runner is not None
    assert worker.runner._graphed is not None
    graphed: GraphedDecoder = worker.runner._graphed
    graphed._run = run  # type: ignore[method-assign]


_SEEN: Counter[bool] = Counter()  # steps of the rank's model by whether they were replays


def watch_steps(worker: PoolWorker) -> None:
    """Of the model that this rank has now."""
    assert worker.runner is not None
    assert worker.runner._graphed is not None
    graphed: GraphedDecoder = worker.runner._graphed
    original = graphed._run
    _SEEN.clear()

    def run(form: Any, packed: Any, probe: Any) -> None:
        _SEEN[probe is None and form in graphed._graphs] += 1
        original(form, packed, probe)

    graphed._run = run  # type: ignore[method-assign]


def steps_seen(worker: PoolWorker) -> tuple[int, int]:
    """How many decode steps were replays since the last call, and how many were launched kernel by kernel."""
    found = _SEEN[True], _SEEN[False]
    _SEEN.clear()
    return found


def share_memory(worker: PoolWorker, on: bool) -> None:
    """Whether data ranks of models to come may read each other's memory."""
    fused_data_ranks.why_not_shared = why_not_shared if on else lambda *_, **__: "left out"


@pytest.fixture(params=["one launch", "all-gather: left out"], ids=["one-launch", "nccl"])
def gathered_by(request: pytest.FixtureRequest, pool: Pool) -> Iterator[str]:
    pool.call(share_memory, on=request.param == "one launch")
    yield request.param
    pool.call(share_memory, on=True)


@pytest.mark.parametrize("plan", [DATA, DATA_SLICED], ids=["spread", "sliced"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_decode_steps_of_data_ranks_are_replays(pool: Pool, gathered_by: str, name: str, plan: dict[str, Any]) -> None:
    """All take the same graphs, also where one has more rows, draws, is sampled on the host, or has nothing to do."""
    mixed = [GREEDY, DRAWN, GREEDY, GREEDY]  # who draws is on the second data rank
    with LLM(tiny(name), **OPTIONS) as one:
        expected = all_answers(one)
        expected_mixed = [output.token_ids for output in one.generate(PROMPTS, mixed)]
    with pool.llm(tiny(name), **OPTIONS, **plan) as llm:
        assert llm.describe()["decode_kernels"] == f"Triton, rows of data ranks by {gathered_by}"
        pool.call(watch_steps)
        assert all_answers(llm) == expected
        assert [output.token_ids for output in llm.generate(PROMPTS, mixed)] == expected_mixed
        assert answers(llm, GREEDY, PROMPTS[:1]) == expected[0][:1]
        first, second = pool.call(steps_seen)
        assert first == second
        assert first[0] > 40
        graphs = pool.call(num_graphs)
        assert graphs == [first[1], first[1]]  # each form was launched once, to capture it
        assert all_answers(llm) == expected
        assert answers(llm, GREEDY, PROMPTS[:1]) == expected[0][:1]
        assert all(replays > 40 and launched == 0 for replays, launched in pool.call(steps_seen))
        assert pool.call(num_graphs) == graphs


def test_data_ranks_whose_requests_come_one_by_one(pool: Pool) -> None:
    """One idles, decodes or has a prompt while the other decodes: graphs and passes of prompts take turns."""
    with LLM(tiny("mixtral"), **OPTIONS) as one:
        expected = answers(one, GREEDY)
    with pool.llm(tiny("mixtral"), **OPTIONS, **DATA) as llm:
        engine, names, found = llm.engine, list[str](), dict[str, tuple[int, ...]]()
        pool.call(watch_steps)
        for number in itertools.count():
            if number % 5 == 0 and len(names) < len(PROMPTS):
                names.append(engine.add_request(PROMPTS[len(names)], GREEDY))
            found |= {output.request_id: output.token_ids for output in engine.step()}
            if len(found) == len(PROMPTS):
                break
        assert [found[name] for name in names] == expected
        first, second = pool.call(steps_seen)
        assert first == second
        assert first[0] > 10


@pytest.mark.parametrize("plan", [TENSOR, EXPERT, DATA], ids=["tensor", "expert", "data"])
def test_graphs_compute_what_eager_kernels_do_in_bf16(pool: Pool, plan: dict[str, Any]) -> None:
    options = OPTIONS | {"dtype": "bfloat16"}
    with pool.llm(tiny("qwen3_moe"), **options, **plan) as llm:
        captured = all_answers(llm)
        assert all_answers(llm) == captured
    with pool.llm(tiny("qwen3_moe"), **options, **plan) as llm:
        pool.call(leave_graphs_out)
        assert all_answers(llm) == captured
        assert pool.call(num_graphs) == [0, 0]


@pytest.mark.parametrize("plan", [EXPERT, DATA], ids=["expert", "data"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_running_ahead_changes_no_token(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, params: SamplingParams, plan: dict[str, Any]
) -> None:
    ahead = 0
    with pool.llm(tiny("mixtral"), **OPTIONS, **plan) as llm:
        launch = RankedRunner.launch

        def counted(runner: RankedRunner, *args: Any, after: Any = None) -> Any:
            nonlocal ahead
            ahead += after is not None
            return launch(runner, *args, after=after)

        monkeypatch.setattr(RankedRunner, "launch", counted)
        found = answers(llm, params)
        assert ahead > 10
        monkeypatch.setattr(RankedRunner, "can_run_ahead", lambda *_: False)
        ahead = 0
        assert answers(llm, params) == found
        assert ahead == 0


@pytest.mark.parametrize("plan", [EXPERT | TO_ALL, DATA | TO_ALL], ids=["to-all", "data-to-all"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_all_to_all_takes_no_graphs_and_changes_nothing(pool: Pool, name: str, plan: dict[str, Any]) -> None:
    with LLM(tiny(name), **OPTIONS) as one:
        expected = all_answers(one)
    with pool.llm(tiny(name), **OPTIONS, **plan) as llm:
        assert "without graphs" in llm.describe()["decode_kernels"]
        assert all_answers(llm) == expected
        assert answers(llm, GREEDY, PROMPTS[:1]) == expected[0][:1]  # of two data ranks one has nothing to do


@pytest.mark.parametrize("plan", ["tensor", "expert", "replicas"])
def test_counts_are_those_of_the_cpu(pool: Pool, plan: str) -> None:
    with LLM(tiny("qwen2_moe"), **OPTIONS | {"device": "cpu", "expert_backend": "reference"}) as cpu:
        with cpu.record_routing() as recorder:
            answers(cpu, GREEDY)
        expected = recorder.loads()
    with pool.llm(tiny("qwen2_moe"), **OPTIONS, **plan_of(plan, 6)) as llm:
        for _ in range(2):  # the second time with graphs from the start
            with llm.record_routing() as recorder:
                answers(llm, GREEDY)
            assert recorder.loads() == expected


def test_data_ranks_count_each_row_once(pool: Pool) -> None:
    """In passes of their own."""
    with LLM(tiny("qwen2_moe"), **OPTIONS) as one, one.record_routing() as alone:
        answers(one, GREEDY)
    with pool.llm(tiny("qwen2_moe"), **OPTIONS, **DATA) as llm:
        for _ in range(2):
            with llm.record_routing() as ranks:
                answers(llm, GREEDY)
            found = [(load.layer, load.counts, load.tokens) for load in ranks.loads()]
            assert found == [(load.layer, load.counts, load.tokens) for load in alone.loads()]


@pytest.mark.parametrize("plan", [EXPERT, DATA], ids=["expert", "data"])
def test_bytes_are_counted_in_graphs_as_without(pool: Pool, plan: dict[str, Any]) -> None:
    found = []
    for without in (False, True):
        with pool.llm(tiny("mixtral"), **OPTIONS, **plan) as llm:
            if without:
                pool.call(leave_graphs_out)
            answers(llm, GREEDY)
            llm.engine.runner.traffic()  # type: ignore[union-attr]
            answers(llm, GREEDY)
            found.append(llm.engine.runner.traffic())  # type: ignore[union-attr]
    assert found[0] == found[1]


def test_every_child_keeps_from_multicast(pool: Pool) -> None:
    for said in pool.call(environment):
        assert said == {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def environment(worker: PoolWorker) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "NVLS" in name or "MULTICAST" in name}


def test_a_rank_that_is_killed_while_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nothing = Nothing()
    llm = LLM(tiny("mixtral"), **OPTIONS, **EXPERT)
    runner = llm.engine.runner
    assert isinstance(runner, RankedRunner)
    process = runner.ranks.members[1].process
    assert process is not None
    answers(llm, GREEDY)
    died = []

    def kill() -> None:
        died.append(time.monotonic())
        os.kill(process.pid, signal.SIGKILL)

    threading.Timer(1.5, kill).start()
    with pytest.raises(RankError, match=r"rank 1 of 2 .* died with exit code -9"):
        answers(llm, GREEDY, CROWD * 500)
    assert time.monotonic() - died[0] < 5
    llm.close()
    assert nothing.is_left()
