"""`flexmoe run` and `flexmoe incr_decoding` as users start them: scripts of every generation, our examples, errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src/flexmoe/assets/builtin"
SCRIPTS = Path(__file__).parent / "flexflow_scripts"
EXAMPLES = ROOT / "examples/flexflow"
TOKYO = "Here are some travel tips for Tokyo:\n"
TIMEOUT = 240

# As much of LangChain as the example touches; the real one is used where it is installed.
LANGCHAIN = {
    "language_models/llms": "class LLM:\n    def __init__(self, **fields): self.__dict__.update(fields)\n",
    "prompts": """
class PromptTemplate:
    def __init__(self, template): self.template = template
    from_template = classmethod(lambda cls, template: cls(template))
    def __or__(self, llm): return Chain(self.template, llm)

class Chain:
    def __init__(self, template, llm): self.template, self.llm = template, llm
    def invoke(self, values, stop=None): return self.llm._call(self.template.format(**values), stop=stop)
""",
}


def flexmoe(
    *arguments: str | Path, path: Sequence[Path] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join([*map(str, path), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "flexmoe", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": python_path, "OMP_WAIT_POLICY": "passive"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def answer(*arguments: str | Path, path: Sequence[Path] = ()) -> str:
    result = flexmoe("run", *arguments, path=path)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


class Reference:
    def __init__(self, dtype: torch.dtype) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()

    def __call__(self, prompt: str, max_length: int) -> str:
        torch.set_num_threads(1)
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_length - ids.shape[1], do_sample=False
        )[0].tolist()
        return self.tokenizer.decode(found[:-1] if found[-1] == self.tokenizer.eos_token_id else found)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(torch.float32)


# ------------------------------------------------------------------------------------------------ each generation


def test_of_2023(reference: Reference) -> None:
    assert answer(SCRIPTS / "of_2023.py", MODEL, "full", TOKYO) == reference(TOKYO, 64)


def test_of_2023_in_half_precision() -> None:
    """On prompts whose next token is never in doubt: at a near tie 16 bits decide either way, in transformers too."""
    half = Reference(torch.bfloat16)
    for prompt in ("1, 2, 3, 4, 5, 6, 7,", "Monday, Tuesday, Wednesday, Thursday,"):
        ids = half.tokenizer(answer(SCRIPTS / "of_2023.py", MODEL, "half", prompt), add_special_tokens=False)[
            "input_ids"
        ]
        wanted = half.tokenizer(half(prompt, 64), add_special_tokens=False)["input_ids"]
        length = len(half.tokenizer(prompt)["input_ids"]) + 30
        assert ids[:length] == wanted[:length]


def test_of_2024(reference: Reference) -> None:
    server, *texts, stopped = answer(SCRIPTS / "of_2024.py", MODEL).splitlines()
    assert texts == [repr(reference(prompt, 48)) for prompt in ("Once upon a time", "The capital of France")]
    assert (server, stopped) == ("Background server started.", "Background server stopped.")


def test_of_2025(tmp_path: Path, reference: Reference) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps([TOKYO]), "utf-8")
    config = {
        "num_gpus": 1,
        "memory_per_gpu": 14000,
        "zero_copy_memory_per_node": 40000,
        "tensor_parallelism_degree": 1,
        "pipeline_parallelism_degree": 1,
        "peft_support_mode": "PEFT_DISABLED",
        "fusion": True,
        "llm_model": str(MODEL),
        "cache_path": "",
        "refresh_cache": False,
        "full_precision": True,
        "prompt": str(tmp_path / "prompts.json"),
        "output_file": str(tmp_path / "out.txt"),
        "max_length": 100,
        "max_requests_per_batch": 2,
        "ssms": [],
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    out = answer(SCRIPTS / "of_2025.py", "-config-file", tmp_path / "config.json")
    assert out.splitlines() == [
        "Background server started.",
        "The capital of Peru is Lima.",
        "Background server stopped.",
    ]
    records = (tmp_path / "out.txt").read_text("utf-8").split("\n[Profile]")
    assert records[0].split("\n", 2)[2] == reference(TOKYO, 100)
    assert records[1].endswith("The capital of Peru is Lima.")


def test_incr_decoding(tmp_path: Path, reference: Reference) -> None:
    (tmp_path / "prompts.json").write_text(f"// FlexFlow's C++ reads comments\n[{json.dumps(TOKYO)}]", "utf-8")
    flags = "-ll:gpu 1 -ll:fsize 14000 -ll:zsize 30000 --use-full-precision -llm-model builtin -prompt prompts.json"
    result = flexmoe("incr_decoding", *flags.split(), "-output-file", "out.txt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert (tmp_path / "out.txt").read_text("utf-8").split("\n", 2)[2] == reference(TOKYO, 128)


# ------------------------------------------------------------------------------------------------------------ examples


def test_example_of_incremental_decoding(tmp_path: Path, reference: Reference) -> None:
    out = answer(EXAMPLES / "incremental_decoding.py", "Once upon a time", "--full-precision")
    assert out.startswith("Background server started.\n" + reference("Once upon a time", 64) + "\n---")


def test_example_of_a_chat() -> None:
    out = answer(EXAMPLES / "chat.py", "What is the capital of France?", "What is the capital of Peru?")
    assert out.startswith("> What is the capital of France?\nThe capital of France is Paris.\n\n> What is the capital")


def test_example_of_gradio(tmp_path: Path) -> None:
    """Gradio is large; a stand-in asks as ChatInterface does, with both forms of history."""
    (tmp_path / "gradio.py").write_text(
        """
class ChatInterface:
    def __init__(self, fn, title): self.fn = fn
    def launch(self, server_port):
        question = "What is the capital of Peru?"
        before = ("What is the capital of France?", "The capital of France is Paris.")
        print(self.fn(question, []))
        parts = [{"type": "text", "text": before[0]}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": before[1]}]
        print(self.fn(question, messages) == self.fn(question, [before]))
""",
        "utf-8",
    )
    out = answer(EXAMPLES / "gradio_chat.py", path=[tmp_path]).splitlines()
    assert out[1:3] == ["The capital of Peru is Lima.", "True"]


def test_example_of_langchain(tmp_path: Path) -> None:
    if importlib.util.find_spec("langchain_core") is None:
        for name, source in LANGCHAIN.items():
            file = tmp_path / "langchain_core" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, "utf-8")
    out = answer(EXAMPLES / "langchain_prompt.py", "What is the capital of France?", path=[tmp_path])
    assert len(out.splitlines()) == 3
    assert "Question:" not in out


# ------------------------------------------------------------------------------------------------------------ run


def test_a_script_gets_its_arguments_its_folder_and_its_status(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n", "utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside\nimport flexflow.serve as ff\nfrom flexflow.type import OptimizerType, int_to_enum\n"
        "print(__name__, beside.NAME, sys.argv[1:], ff.__name__, int_to_enum(OptimizerType, 61).name)\nsys.exit(7)\n",
        "utf-8",
    )
    result = flexmoe("run", script, "--help", "-m", "x")
    assert result.returncode == 7, result.stderr
    assert result.stdout == "__main__ beside ['--help', '-m', 'x'] flexflow.serve OPTIMIZER_TYPE_SGD\n"
    module = flexmoe("run", "-m", "script", "one", cwd=tmp_path)
    assert (module.returncode, module.stdout.split(" flexflow")[0]) == (7, "__main__ beside ['one']")


def test_errors_name_the_line_of_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import flexflow.serve as ff\nff.init(num_gpus=1)\n", "utf-8")
    result = flexmoe("run", script)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {script}:2: init lacks memory_per_gpu")
    script.write_text("import flexflow.serve as ff\n\nff.nothing\n", "utf-8")
    result = flexmoe("run", script)
    assert result.returncode == 1
    assert "line 3, in <module>" in result.stderr
    assert "docs/flexflow.md lists what is there" in result.stderr
    assert "runpy" not in result.stderr
    assert flexmoe("run", tmp_path / "none.py").returncode == 2


def test_a_real_flexflow_is_named(tmp_path: Path) -> None:
    (tmp_path / "flexflow").mkdir()
    (tmp_path / "flexflow/__init__.py").write_text("raise ImportError('the real one')\n", "utf-8")
    script = tmp_path / "script.py"
    script.write_text("import flexflow.serve as ff\nprint(ff.LLM.__module__)\n", "utf-8")
    result = flexmoe("run", script, path=[tmp_path])
    assert result.stdout == "flexmoe.serve.llm\n", result.stderr
    assert f"A FlexFlow is installed in {tmp_path / 'flexflow/__init__.py'}; this run uses FlexMoE" in result.stderr
    assert flexmoe("run", "-q", script, path=[tmp_path]).stderr == ""
