"""Recording the routing: equal to what a probe sees, on both paths of a CPU; bounded, exclusive; and the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from flexmoe import LLM, SamplingParams
from flexmoe.cli.main import main
from flexmoe.config.model import LayerConfig, ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.routing import LayerLoad, imbalance, read_recording
from flexmoe.errors import ConfigError, EngineError, RequestError
from flexmoe.moe.load import ExpertCounter
from flexmoe.verify.recording import Recording
from tests.cpu.tiny_models import tiny

OPTIONS = {"dtype": "float32", "kv_cache_memory": 2**26, "threads": 1, "enable_prefix_caching": False}
PROMPTS = ["Once upon a time", "The weather", "A"]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_recording_counts_what_a_probe_sees(backend: str, tmp_path: Path) -> None:
    """With the backend "cpu" decodes run in C, if there is a compiler; with the other all is torch."""
    path = tmp_path / "routing.jsonl"
    with LLM(**OPTIONS, expert_backend=backend) as llm:
        llm.engine.local_runner.probe = probe = Recording("topk_ids")
        wanted = llm.generate(PROMPTS, GREEDY)
        llm.engine.local_runner.probe = None
        with llm.record_routing(path) as recorder:
            found = llm.generate(PROMPTS, GREEDY)
            midway = recorder.loads()
        assert llm.engine.local_runner.probe is None
        rows = sum(len(llm.encode(prompt)) + 6 for prompt in PROMPTS)
        experts = llm.config.moe.num_experts  # type: ignore[union-attr]
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    loads = read_recording(path)
    assert loads == recorder.loads() == midway
    assert [load.layer for load in loads] == sorted(layer for _, layer in probe)
    for load in loads:
        chosen = probe["topk_ids", load.layer]
        assert load.counts == tuple(torch.bincount(chosen.flatten(), minlength=experts).tolist())
        assert (load.tokens, sum(load.counts)) == (rows, rows * load.top_k) == (len(chosen), chosen.numel())
        assert load.passes == 7  # the prompts at once, then one for each further token
        passes = probe._tensors["topk_ids", load.layer]
        assert load.active == tuple(sum(e in part for part in passes) for e in range(experts))
        assert load.top_k <= load.mean_active <= experts


def test_without_a_recording_nothing_looks_into_the_steps() -> None:
    with LLM(**OPTIONS) as llm:
        llm.generate("A", GREEDY)
        assert llm.engine.local_runner.probe is None


def test_recordings_exclude_each_other_and_end_with_an_error_within(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    with LLM(**OPTIONS) as llm:
        with llm.record_routing() as recorder:
            with pytest.raises(EngineError, match="looks into the steps already"), llm.record_routing():
                pass
            llm.generate("A", GREEDY)
            assert recorder.loads()[0].tokens > 0
        with pytest.raises(RequestError), llm.record_routing(path):
            llm.generate([[]], GREEDY)
        assert path.read_text() == ""
        with llm.record_routing() as recorder:
            llm.generate("A", GREEDY)
        assert recorder.loads()[0].passes == 7
        with pytest.raises(ConfigError, match="cannot be written: No such file"), llm.record_routing("/no/where"):
            pass
        with pytest.raises(EngineError, match="closed"), llm.record_routing():
            llm.close()


def test_a_model_without_experts_has_nothing_to_record(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    with (
        LLM(tiny("llama-mha-bias"), device="cpu", threads=1) as llm,
        pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"),
        llm.record_routing(path),
    ):
        pass
    assert not path.exists()


def test_layers_without_experts_are_left_out() -> None:
    with LLM(**OPTIONS) as llm:
        config = llm.config
    layers = (config.layers[0], LayerConfig(is_moe=False), *config.layers[2:3])
    counter = ExpertCounter(_with_layers(config, layers), torch.device("cpu"))
    counter.record("moe", 0, torch.zeros(3, 4))
    counter.record("topk_ids", 2, torch.tensor([[1, 2], [2, 0]], dtype=torch.int32))
    counts = (1, 1, 2, *[0] * (config.moe.num_experts - 3))  # type: ignore[union-attr]
    empty = LayerLoad("m", 0, 2, (0,) * len(counts), 0, 0, (0,) * len(counts))
    assert counter.loads("m") == [empty, LayerLoad("m", 2, 2, counts, 1, 2, tuple(min(n, 1) for n in counts))]
    assert empty.mean_active == 0


def _with_layers(config: ModelConfig, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    return replace(config, layers=layers)


def test_the_commands_go_from_prompts_to_a_plan(tmp_path: Path) -> None:
    routing, plan = str(tmp_path / "routing.jsonl"), str(tmp_path / "plan.json")
    flags = ["-t", "0", "--max-tokens", "7", "--dtype", "float32", "--kv-cache-memory", "64MiB", "--threads", "1"]
    result = run("generate", *PROMPTS, "--record-routing", routing, *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout == run("generate", *PROMPTS, *flags).stdout
    loads = read_recording(routing)
    result = run("balance", routing, "--ranks", "2", "--spare-slots", "1", "--out", plan)
    assert result.exit_code == 0, result.output
    assert "ranks before" in " ".join(result.stdout.split())
    found = ParallelPlan.read(plan)
    assert (found.tensor_parallel_size, found.expert_parallel_size) == (2, 2)
    assert sorted(layer for layer in found.placements if layer is not None) == [load.layer for load in loads]
    result = run("balance", routing, "--ranks", "2", "--spare-slots", "1", "--json")
    rows = json.loads(result.stdout)["layers"]
    assert [row["layer"] for row in rows] == [load.layer for load in loads]
    assert [row["experts"] for row in rows] == [imbalance(load.counts) for load in loads]
    assert all(1 <= row["after"] <= row["before"] and row["replicas"] <= 2 for row in rows)


def test_wrong_commands_are_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text("{}\n")
    result = run("balance", str(path), "--ranks", "2")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: the recording {path} is refused, line 1: it is not an object with model")
    path.write_text(json.dumps(LayerLoad("m", 0, 1, (1, 2), 1, 3, (1, 1)).to_json()))
    assert "8 ranks for 2 experts" in run("balance", str(path), "--ranks", "8").stderr
    assert run("balance", str(path), "--ranks", "1").exit_code == 2
