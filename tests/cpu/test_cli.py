"""The command line on the built-in model: output, errors in one line, exit statuses, and how quickly it starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import flexmoe
from flexmoe import LLM, SamplingParams, __version__
from flexmoe.cli.main import main

COMMAND = [sys.executable, "-m", "flexmoe"]
FP32 = ["--dtype", "float32", "--kv-cache-memory", "64MiB", "--threads", "1"]


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=text)


def shell(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", kv_cache_memory=2**26, threads=1)


def greedy(llm: LLM, prompt: str, tokens: int = 12) -> str:
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens))[0].text


# ----------------------------------------------------------------------------------------------------------- generate


def test_one_prompt(llm: LLM) -> None:
    result = run("generate", "Once upon a time", "-t", "0", "--max-tokens", "12", *FP32)
    assert result.exit_code == 0, result.output
    assert result.stdout == greedy(llm, "Once upon a time") + "\n"
    model, machine, speed = result.stderr.splitlines()
    assert model.startswith("builtin: MixtralForCausalLM, 18.4M parameters")
    assert machine.startswith("cpu float32, 1 thread, experts: cpu, decode: ")
    assert speed.startswith("5 + 12 tokens, first after ")
    assert speed.endswith(" tok/s")


def test_several_prompts(llm: LLM) -> None:
    result = run("generate", "One", "Two", "-t", "0", "--max-tokens", "12", *FP32)
    assert result.stdout == f"[1] One\n{greedy(llm, 'One')}\n\n[2] Two\n{greedy(llm, 'Two')}\n"
    assert result.stderr.splitlines()[-1].startswith("2 prompts, ")


def test_json(llm: LLM) -> None:
    result = run("generate", "One", "--json", "-q", "-t", "0", "--max-tokens", "12", *FP32)
    assert result.stderr == ""
    record = json.loads(result.stdout)
    assert (record["prompt"], record["text"], record["finish_reason"]) == ("One", greedy(llm, "One"), "length")
    assert len(record["token_ids"]) == 12
    assert 0 < record["seconds_per_token"] < 10


@pytest.mark.parametrize("text", ['["One", "Two"]', "\n[[1, 5], [1, 6, 7]]\n"])
def test_prompts_from_standard_input(llm: LLM, text: str) -> None:
    result = run("generate", "--json", "-q", "-t", "0", "--max-tokens", "4", *FP32, text=text)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    prompts = json.loads(text)
    expected = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4))
    assert [(r["prompt"], r["text"]) for r in records] == [(p, e.text) for p, e in zip(prompts, expected, strict=True)]


def test_plain_text_from_standard_input(llm: LLM) -> None:
    for text in ("One line\nand another", "[1] is no JSON"):
        result = run("generate", "-q", "-t", "0", "--max-tokens", "12", *FP32, text=text + "\n")
        assert result.stdout == greedy(llm, text) + "\n"


def test_prompts_from_a_file(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('["One"]', encoding="utf-8")
    assert run("generate", "-f", str(file), "-q", "-t", "0", "--max-tokens", "12", *FP32).stdout.startswith(
        greedy(llm, "One")
    )
    file.write_text('{"a": 1}', encoding="utf-8")
    result = run("generate", "-f", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not a JSON array of prompts" in result.stderr


def test_stop_and_seed() -> None:
    options = ["generate", "Once upon a time", "-q", "--max-tokens", "24", *FP32]
    first, again, other = (run(*options, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
    stop = first.split()[5]
    cut = run(*options, "--seed", "1", "--stop", stop).stdout
    assert cut == first[: first.index(stop)] + "\n"


def test_a_question(llm: LLM) -> None:
    result = run("generate", "--chat", "-q", "-t", "0", "--max-tokens", "12", "What is the capital of France?", *FP32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))[0].text
    assert result.stdout == expected + "\n"
    assert "Paris" in expected


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(Path(flexmoe.__file__).parent / "assets/builtin/config.json", folder)
    shape = ["--model", str(folder), "--load-format", "dummy"]
    result = run("generate", "Hello", *shape)
    assert result.exit_code == 1
    assert "Error: this model has no tokenizer; give prompts as lists of token ids." in result.stderr
    result = run("generate", "-q", "--max-tokens", "3", *shape, *FP32, text="[[1, 2, 3]]")
    assert len(result.stdout.split()) == 3


# ------------------------------------------------------------------------------------------------------------- models


def test_models() -> None:
    result = run("models")
    assert result.exit_code == 0
    for word in ("mixtral-8x7b", "46.7B", "8 of 128", "allenai/OLMoE-1B-7B-0924", "Qwen3MoeForCausalLM"):
        assert word in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    catalogue = json.loads(run("models", "--json").stdout)
    assert catalogue["builtin"]["context"] == 1024
    assert {"name", "hub_id", "parameters", "experts"} <= catalogue["presets"][0].keys()
    assert {"model_type": "olmoe", "architecture": "OlmoeForCausalLM"} in catalogue["families"]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "-m", "no/such/folder"], "the folder no/such/folder does not exist"),
        (["generate", "x", "-t", "-1"], "temperature=-1.0 is not a number from 0 to 100."),
        (["generate", "x", "--device", "tpu"], "device='tpu'"),
        (["generate", "x " * 2000], "max_model_len=1024"),
        (["generate", ""], "the prompt is an empty string"),
        (["generate", "x", "--max-model-len", "9999999"], "above the model's context of 1024 tokens"),
        (["chat", "-m", "mixtral-8x7b"], "is a preset: a configuration without weights"),
    ],
)
def test_our_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("place", [0, 2, 4])
def test_debug_prints_the_traceback(place: int) -> None:
    arguments = ["generate", "x", "-t", "-1"]
    arguments.insert(place, "--debug")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: temperature=-1.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "No such command 'genrate'. Did you mean 'generate'?"),
        (["zzz"], "No such command 'zzz'."),
        (["generate", "--max-token", "3"], "--max-tokens"),
        (["generate", "x", "--dtype", "int3"], "'int3' is not one of"),
        (["generate", "x", "--threads", "0"], "0 is not in the range x>=1"),
        (["generate", "x", "--kv-cache-memory", "2 lots"], "'2 lots' is not a number of bytes; use 1073741824, 1GiB"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


# -------------------------------------------------------------------------------------------------- as a real process


def test_version_and_help_start_quickly() -> None:
    assert shell("--version").stdout == f"flexmoe {__version__}\n"
    seconds = []  # of the processor: waiting for another program does not count
    for _ in range(3):
        before = os.times()
        text = shell("--help").stdout
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert all(name in text for name in ("generate", "chat", "models"))
    assert min(seconds) < 0.3


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom flexmoe.cli.main import main\nmain(['--help'], standalone_mode=False)\n"
        "print({'torch', 'transformers', 'numpy', 'rich', 'tokenizers', 'jinja2'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("when", "lines", "statuses"),
    [
        ("importing", 0, (130,)),
        ("computing", 2, (130,)),
        ("on its way out", 3, (130, 0, -signal.SIGINT)),  # where Python may die of it
    ],
)
def test_interrupt_is_quiet(when: str, lines: int, statuses: tuple[int, ...]) -> None:
    """Ctrl-C at any time; lines: of stderr by which it is known to have come."""
    command = [*COMMAND, "generate", "Once upon a time", "--max-tokens", "1000", *FP32]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while when == "importing" and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        before = "".join(process.stderr.readline() for _ in range(lines))
        process.send_signal(signal.SIGINT)
        _, after = process.communicate(timeout=60)
    assert process.returncode in statuses, before + after
    assert len(before.splitlines()) == lines
    assert after == ""


def test_a_closed_pipe_is_quiet() -> None:
    command = " ".join([*COMMAND, "generate", "-q", "One", "Two", "--max-tokens", "4", *FP32, "| head -c 1"])
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert (result.stdout, result.stderr) == ("[", "")


# --------------------------------------------------------------------------------------------------------------- chat


def test_chat_reads_a_pipe(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = ["What is the capital of France?", "", "/retry", f"/save {file}", "/exit", "never read"]
    result = run("chat", "-t", "0", "--max-tokens", "12", *FP32, text="\n".join(lines) + "\n")
    messages = [{"role": "user", "content": lines[0]}]
    answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))[0].text
    assert result.stdout == f"{answer}\n{answer}\n"
    assert result.exit_code == 0
    assert json.loads(file.read_text(encoding="utf-8")) == [*messages, {"role": "assistant", "content": answer}]


def test_chat_commands() -> None:
    lines = ["/help", "/system", "/system Be brief.", "/system -", "/reset", "/sav x", "/retry", "/save", "/"]
    result = run("chat", *FP32, text="\n".join(lines) + "\n")
    assert result.exit_code == 1  # some were refused
    assert result.stdout == ""
    for text in (
        "/system TEXT",
        "Instructions: none\nInstructions: Be brief.\nInstructions: none\n",
        "The conversation starts anew.",
        "Error: there is no command /sav; did you mean /save?",
        "Error: there is no message to answer yet.",
        "Error: /save needs the name of a file.",
        "Error: there is no command /; /help lists them.",
    ):
        assert text in result.stderr


def test_chat_goes_on_after_a_message_that_is_refused(llm: LLM) -> None:
    text = "word " * 2000 + "\nWhat is the capital of France?\n"
    result = run("chat", "-t", "0", "--max-tokens", "12", *FP32, text=text)
    assert "which fills the context of 1024; shorten it" in result.stderr
    assert "Paris" in result.stdout
    assert result.exit_code == 1


def test_chat_drops_the_oldest_turns() -> None:
    lines = ["What is the capital of France?"] * 6
    result = run("chat", "-t", "0", "--max-tokens", "12", "--max-model-len", "64", *FP32, text="\n".join(lines))
    assert result.stdout.count("\n") == 6
    assert "The context is full: the oldest 1 turns are forgotten." in result.stderr


def test_chat_with_instructions_and_long_lines(llm: LLM) -> None:
    text = "What is the capital\\\nof France?\n//x\n"
    result = run("chat", "--system", "Be brief.", "-t", "0", "--max-tokens", "8", *FP32, text=text)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital\nof France?"},
    ]
    params = SamplingParams(temperature=0, max_tokens=8)
    first = llm.chat(messages, params)[0].text.strip()
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "/x"}]
    second = llm.chat(messages, params)[0].text.strip()
    assert result.stdout == f"{first}\n{second}\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
class TestTerminal:
    """`flexmoe chat` at a pseudo-terminal."""

    def test_stop_an_answer_and_leave(self) -> None:
        from tests.terminal import Terminal

        ready = ">\x1b[0m "
        with Terminal([*COMMAND, "chat", "-t", "0", *FP32]) as terminal:
            terminal.wait_for("Ctrl-D leaves.", ready)
            terminal.type("What is the capital of France?\n")
            assert "Paris" in terminal.wait_for("tok/s", ready)
            terminal.type("Write a very long story about a bird.\n")
            terminal.wait_for_more()
            terminal.interrupt()
            assert "[stopped]" in terminal.wait_for("tokens", ready)
            terminal.wait_until_idle()  # readline does not see a Ctrl-C that comes before it has begun to wait
            terminal.interrupt()
            terminal.wait_for("Ctrl-D or /exit leaves.", ready)
            terminal.type("What is the capital of Italy?\n")
            assert "Rome" in terminal.wait_for("tok/s", ready)
            terminal.type("\x04")
            assert terminal.exit_status() == 0

    def test_generate_echoes_the_prompt_and_no_control_characters(self) -> None:
        from tests.terminal import Terminal

        with Terminal([*COMMAND, "generate", "Once upon", "--max-tokens", "4", *FP32]) as terminal:
            text = terminal.wait_for("tok/s")
            assert "\x1b[1mOnce upon\x1b[0m" in text
            assert terminal.exit_status() == 0
