"""The engine on an NVIDIA GPU, decoding in Triton kernels: the tokens of the CPU, and of transformers."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.engine.cuda_graph import bucket_of
from tests.cpu.tiny_models import CASES, tiny

PROMPTS = [[5, 17, 230, 9, 44], [11] * 3, list(range(3, 40))]


def _room(name: str) -> int:
    """New tokens that fit the case's context beside the longest prompt (llama-dynamic has 16 positions)."""
    return 24 if name != "llama-dynamic" else 6


def _prompts(name: str) -> list[list[int]]:
    return [prompt[:8] for prompt in PROMPTS] if name == "llama-dynamic" else PROMPTS


def _greedy(llm: LLM, name: str) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0, max_tokens=_room(name), ignore_eos=True)
    return [output.token_ids for output in llm.generate(_prompts(name), params)]


@pytest.mark.parametrize("case", sorted(CASES))
def test_fp32_tokens_are_those_of_the_cpu(case: str) -> None:
    with LLM(str(tiny(case)), dtype="float32", device="cpu", expert_backend="reference") as cpu:
        expected = _greedy(cpu, case)
    with LLM(str(tiny(case)), dtype="float32", device="cuda", num_blocks=64) as gpu:
        assert gpu.describe()["device"].startswith("cuda")
        assert _greedy(gpu, case) == expected


@pytest.mark.parametrize("case", sorted(CASES))
def test_fp32_tokens_are_those_of_transformers(case: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(case), dtype=torch.float32).to("cuda").eval()
    prompt, new = _prompts(case)[0], _room(case)
    model.generation_config.eos_token_id = None  # as ignore_eos; min_new_tokens would forbid the token instead
    ids = torch.tensor([prompt], device="cuda")
    expected = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=2)
    with LLM(str(tiny(case)), dtype="float32", device="cuda", num_blocks=64) as llm:
        assert list(_greedy(llm, case)[0]) == expected[0, len(prompt) :].tolist()


def test_chunked_prefill_and_preemption_keep_the_tokens() -> None:
    folder = str(tiny("qwen2_moe"))
    with LLM(folder, dtype="float32", device="cuda", num_blocks=64) as plain:
        expected = _greedy(plain, "qwen2_moe")
    with LLM(folder, dtype="float32", device="cuda", num_blocks=7, max_num_batched_tokens=16) as tight:
        assert _greedy(tight, "qwen2_moe") == expected


def test_a_seed_gives_the_same_samples_as_on_the_cpu() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=7, max_tokens=20, ignore_eos=True)
    tokens = []
    for device in ("cpu", "cuda"):
        with LLM(str(tiny("mixtral")), dtype="float32", device=device, num_blocks=64) as llm:
            tokens.append(llm.generate(PROMPTS[0], params)[0].token_ids)
    assert tokens[0] == tokens[1]


def test_hundreds_of_rows_decode_as_few_do() -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[5 + n % 40, 17, 9 + n // 40] for n in range(330)]
    tokens = []
    for seats in (330, 40):
        with LLM(str(tiny("olmoe")), dtype="float32", device="cuda", num_blocks=700, max_num_seqs=seats) as llm:
            assert llm.engine.runner._graphed.max_rows == {330: 384, 40: 40}[seats]  # type: ignore[union-attr]
            tokens.append([output.token_ids for output in llm.generate(prompts, params)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_alike_twice(dtype: str) -> None:
    runs = []
    for _ in range(2):
        with LLM(str(tiny("olmoe")), dtype=dtype, device="cuda", num_blocks=64) as llm:
            runs.append(_greedy(llm, "olmoe"))
    assert runs[0] == runs[1]


def test_dummy_weights_are_made_on_the_device_and_depend_on_the_seed_alone() -> None:
    outputs = []
    for seed in (0, 0, 1):
        with LLM("tinymistral-6x248m", load_format="dummy", dtype="bfloat16", device="cuda", seed=seed,
                 max_model_len=256, max_num_seqs=4) as llm:  # fmt: skip
            outputs.append(llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8))[0].token_ids)
    assert outputs[0] == outputs[1] != outputs[2]


def test_closing_gives_the_memory_back() -> None:
    before = torch.cuda.memory_allocated()
    with LLM(str(tiny("mixtral")), device="cuda", num_blocks=64) as llm:
        _greedy(llm, "mixtral")
        assert torch.cuda.memory_allocated() > before
    del llm
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_experts_behind_tokens_are_those_of_the_cpu() -> None:
    """Told of the first six tokens, whose steps run without graphs; the rest is decoded in graphs, and is the same."""
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, routing=6)
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(str(tiny("mixtral")), dtype="float32", device=device, num_blocks=64) as llm:
            plain = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
            told = llm.generate(PROMPTS, params)
        assert [output.token_ids for output in told] == [output.token_ids for output in plain]
        routings = [output.outputs[0].routing or () for output in told]
        assert [len(routing) for routing in routings] == [6] * len(PROMPTS)
        found[device] = [[token.experts for token in routing] for routing in routings]
    assert found["cuda"] == found["cpu"]


def _generate_until(seconds: float, llm: LLM, params: SamplingParams) -> None:
    """Over and over; Ctrl-C comes then."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        llm.generate(PROMPTS, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ctrl_c_at_any_moment_leaves_an_engine_that_answers_as_before(dtype: str) -> None:
    """Between steps, within launches, while the device computes: of 40 moments within the first 80 ms of generating."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(tiny("olmoe")), dtype=dtype, device="cuda", num_blocks=64) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
        for moment in range(40):
            with pytest.raises(KeyboardInterrupt):
                _generate_until(moment * 2e-3, llm, params)
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected, moment


def test_steps_that_are_looked_into_keep_no_inputs() -> None:
    """These have just their rows, any number of them, and would add up to gigabytes; those of graphs are few."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, routing=4)
    with LLM(str(tiny("mixtral")), device="cuda", num_blocks=64) as llm:
        llm.generate([[5, 6, 7]] * 9, params)
        runner = llm.engine.local_runner
        assert runner._graphed is not None
        assert set(runner._graphed._packed) == {bucket_of(9)}
