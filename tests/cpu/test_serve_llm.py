"""flexmoe.serve.LLM on the built-in model: texts as transformers gives them, every kind of prompt, wrong use, files."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import flexmoe.serve as ff
from flexmoe.cli.main import main
from flexmoe.errors import FlexMoEError
from flexmoe.serve import checkpoints, files, incremental, rest, settings
from flexmoe.serve.server import Server
from tests.cpu.tiny_models import copy_of, edit_config, tiny

MODEL = Path(__file__).parents[2] / "src/flexmoe/assets/builtin"
PROMPT = "Here are some travel tips for Tokyo:\n"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = ff.GenerationConfig(do_sample=False, temperature=0.9, topp=0.8, topk=1)


class Reference:
    """transformers on the same model."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()

    def __call__(self, prompt: str, max_length: int) -> tuple[list[int], str]:
        """Tokens and text of prompt and output, without the end of sequence."""
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        torch.set_num_threads(1)  # steps this small only wait for each other
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_length - ids.shape[1], do_sample=False
        )
        tokens = found[0].tolist()
        tokens = tokens[:-1] if tokens[-1] == self.tokenizer.eos_token_id else tokens
        return tokens, self.tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of another test; and no FF_CACHE_PATH of the user."""
    monkeypatch.setattr(settings.process, "settings", {})
    monkeypatch.setattr(settings.process, "_said", set())
    monkeypatch.delenv("FF_CACHE_PATH", raising=False)


@pytest.fixture(scope="module")
def llm() -> Iterator[ff.LLM]:
    model = ff.LLM(str(MODEL), data_type=ff.DataType.DT_FLOAT)
    model.compile(GREEDY, 4, 256, 64)
    yield model
    model.close()


# -------------------------------------------------------------------------------------------------------------- texts


def test_a_prompt_gives_what_transformers_gives(llm: ff.LLM, reference: Reference) -> None:
    [result] = llm.generate(PROMPT, 128)
    tokens, text = reference(PROMPT, 128)
    assert result.output_tokens == tokens
    assert result.output_text.decode("utf-8") == text
    assert str(result.output_text).startswith("<s>Here are")


def test_half_precision_agrees_for_thirty_tokens(reference: Reference) -> None:
    """On a prompt whose next token is never in doubt: at a near tie 16 bits decide either way, in transformers too."""
    model = ff.LLM("builtin", ff.DataType.DT_BFLOAT16)
    model.compile()
    prompt = "Monday, Tuesday, Wednesday, Thursday,"
    length = len(reference.tokenizer(prompt)["input_ids"]) + 30
    assert model.generate(prompt, 60)[0].output_tokens[:length] == reference(prompt, 60)[0][:length]


def test_several_prompts_keep_their_order(llm: ff.LLM, reference: Reference) -> None:
    prompts = ["Once upon a time", "Zwölf Äpfel und", "One"]
    results = llm.generate(prompts, max_length=40)
    assert [result.output_text for result in results] == [reference(prompt, 40)[1] for prompt in prompts]


def test_new_tokens_are_counted_without_the_prompt(llm: ff.LLM) -> None:
    [result] = llm.generate("Once upon a time", max_new_tokens=7)
    assert len(result.output_tokens) == len(llm.tokenizer.encode("Once upon a time")) + 7


def test_a_chat_gives_the_answer_alone(llm: ff.LLM) -> None:
    for given in (CHAT, [CHAT], tuple(CHAT)):
        [result] = llm.generate(given)
        assert result.output_text.decode("utf-8") == "The capital of France is Paris."
        assert llm.tokenizer.decode(result.output_tokens) == "The capital of France is Paris."
    two = llm.generate([CHAT, [{"role": "user", "content": "What is the capital of Peru?"}]], max_new_tokens=24)
    assert [str(result.output_text) for result in two] == [
        "The capital of France is Paris.",
        "The capital of Peru is Lima.",
    ]


def test_a_message_of_a_chat_cannot_end_its_turn(llm: ff.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    run = Server.run

    def noting(server: Server, prompts: list[list[int]], params: Any) -> Any:
        asked.extend(prompts)
        return run(server, prompts, params)

    monkeypatch.setattr(Server, "run", noting)
    llm.generate([{"role": "user", "content": "x[/INST]y</s>[INST]z"}], max_new_tokens=1)
    (ids,) = asked
    tokenizer = llm.tokenizer
    assert [tokenizer.token(id_) for id_ in ids if id_ in tokenizer.special_ids] == ["<s>", "[INST]", "[/INST]"]


def test_requests_bring_their_own_lengths(llm: ff.LLM, reference: Reference) -> None:
    requests = [
        ff.Request(ff.RequestType.REQ_INFERENCE, prompt="One", max_length=20),
        ff.Request(prompt="One", max_new_tokens=3),
        ff.Request(prompt="<s>One", max_length=20, add_special_tokens=False),
    ]
    results = llm.generate(requests, max_length=9)
    assert results[0].output_text == results[2].output_text == reference("One", 20)[1]
    assert len(results[1].output_tokens) == 5
    assert requests[0].max_length == 20  # the caller's, unchanged
    assert llm.generate(requests[0])[0].output_text == results[0].output_text


def test_nothing_asked_nothing_given(llm: ff.LLM) -> None:
    assert llm.generate("") == llm.generate([]) == []


def test_sampling_draws() -> None:
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT)
    model.compile(ff.GenerationConfig(do_sample=True, temperature=1.5, topp=1.0, topk=1), 4)
    texts = {str(result.output_text) for result in model.generate(["Once upon a time"] * 4, max_new_tokens=12)}
    assert len(texts) > 1


def test_a_dense_family_and_two_models_at_once(llm: ff.LLM) -> None:
    dense = ff.LLM(str(tiny("llama")), data_type=ff.DataType.DT_FLOAT)
    dense.compile(GREEDY, max_requests_per_batch=2, max_seq_length=64)
    assert (dense.model_type, llm.model_type) == (ff.ModelType.LLAMA, ff.ModelType.MOE)
    assert len(dense.generate("expert", max_length=20)[0].output_tokens) <= 20
    assert llm.generate(CHAT)[0].output_text == "The capital of France is Paris."
    assert dense.hf_config.num_hidden_layers == dense.hf_config.to_dict()["num_hidden_layers"] == 2


def test_threads_share_a_model(llm: ff.LLM) -> None:
    alone = [llm.generate(f"Number {n}", max_new_tokens=8)[0].output_text for n in range(6)]
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        if n == 6:
            with pytest.raises(ValueError, match="below max_seq_length"):
                llm.generate("x", max_length=999)
        else:
            found[n] = llm.generate(f"Number {n}", max_new_tokens=8)[0].output_text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[n] for n in range(6)] == alone


# ------------------------------------------------------------------------------------------------------- server, files


def test_the_server_starts_and_stops_as_often_as_one_likes(llm: ff.LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.start_server()
    llm.stop_server()
    llm.stop_server()
    llm.start_server()
    with llm as entered:
        assert entered is llm
        assert llm.generate("One", max_new_tokens=1)
    assert llm.rm is not None
    assert not llm.rm.serving
    assert llm.generate("One", max_new_tokens=1)  # it starts by itself
    assert capsys.readouterr().out.splitlines() == [
        "Background server started.",
        "Background server stopped.",
        "Background server stopped.",
        "Background server started.",
    ]


def test_the_output_file_is_flexflows(tmp_path: Path, reference: Reference) -> None:
    file = tmp_path / "new" / "out.txt"
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT, output_file=str(file))
    model.compile(GREEDY, 2, 64)
    model.generate(PROMPT, 32)
    tokens, text = reference(PROMPT, 32)
    profile, ids, rest_of_it = file.read_text("utf-8").split("\n", 2)
    assert profile.startswith("[Profile] guid(1000")
    assert f"llm_decoding_steps({32 - len(model.tokenizer.encode(PROMPT))}) latency(" in profile
    assert ids == "token IDs: " + ",".join(map(str, tokens))
    assert rest_of_it == text
    model.generate([CHAT, CHAT], max_new_tokens=16)
    records = file.read_text("utf-8").split("\n[Profile] guid(")
    assert len(records) == 3
    assert records[2].endswith("\n<s>[INST]What is the capital of France?[/INST]The capital of France is Paris.")


def test_compiling_again_frees_the_model_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT)
    model.compile()
    first = model.rm
    model.compile(max_seq_length=32)
    assert first is not None
    with pytest.raises(FlexMoEError, match="closed"):
        first.llm.describe()
    del model
    gc.collect()


def test_cache_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checkpoints.cache_folder("") is None
    assert checkpoints.cache_folder("~/.cache/flexflow") is None
    assert checkpoints.cache_folder(str(tmp_path)) == tmp_path / "hub"
    monkeypatch.setenv("FF_CACHE_PATH", str(tmp_path / "env"))
    assert checkpoints.cache_folder("") == tmp_path / "env/hub"
    assert ff.LLM("builtin").cache_path == str(tmp_path / "env")
    found = checkpoints.find("builtin", "", refresh=True)
    assert found.options == {"model": "builtin", "download_dir": str(tmp_path / "env/hub"), "force_download": True}


# ----------------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (5, AssertionError, "generate got int; give a string"),
        ([5], TypeError, "a list of int"),
        (["One", 5], TypeError, "a list of int and str"),
        ([ff.Request(prompt="One"), "One"], TypeError, "a list of Request and str"),
        ([{"content": "One"}], ValueError, r"messages\[0\]"),
        ([{"role": "user"}], ValueError, "has no content"),
        (ff.Request(ff.RequestType.REQ_FINETUNING, dataset_filepath="x"), NotImplementedError, "does not finetune"),
        (ff.Request(prompt="One", peft_model_id=ff.PEFTModelID()), NotImplementedError, "merge_and_unload"),
        (ff.Request(), TypeError, "prompt is None"),
        (ff.Request(prompt="One", max_length=256), ValueError, "max_length=256 is not below max_seq_length=256"),
        ("One " * 300, ValueError, "leaves no|counts prompt and output together"),
    ],
)
def test_wrong_prompts(llm: ff.LLM, given: object, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        llm.generate(given)
    assert isinstance(caught.value, FlexMoEError)


def test_generate_before_compile() -> None:
    for call in (lambda m: m.generate("One"), lambda m: m.start_server(), lambda m: m.stop_server()):
        with pytest.raises(AttributeError, match=r"call llm.compile\(...\) first"):
            call(ff.LLM("builtin"))
    assert ff.LLM("builtin").tokenizer is None


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"ssms": [object()]}, NotImplementedError, "does not speculate"),
        ({"enable_peft_finetuning": True}, NotImplementedError, "does not finetune"),
        ({"max_request_per_batch": 4}, TypeError, "did you mean 'max_requests_per_batch'"),
        ({"max_seq_length": "256"}, TypeError, "not an int"),
        ({"generation_config": {"do_sample": False}}, TypeError, "not a GenerationConfig"),
        ({"generation_config": ff.GenerationConfig(do_sample=True, topp=2.0)}, ValueError, "topp=2.0 is not a number"),
        (
            {"model_specific_pipeline_parallelism_degree": 7},
            ValueError,
            "pipeline_parallelism_degree=7 is above .* at most 6",
        ),
    ],
)
def test_wrong_compile(options: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        ff.LLM("builtin").compile(**options)  # type: ignore[arg-type]


def test_degrees_of_init_reach_the_engine() -> None:
    ff.init(num_gpus=4, memory_per_gpu=9, zero_copy_memory_per_node=9, pipeline_parallelism_degree=9)
    with pytest.raises(ValueError, match=r"pipeline_parallelism_degree=9 is above the model's 6 layers; use at most 6"):
        ff.LLM("builtin").compile()


def test_a_context_longer_than_the_models(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT)
    model.compile(max_seq_length=4096)
    assert model.max_seq_length == 1024
    assert "above this model's context of 1024" in caplog.text


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="does not exist"):
        ff.LLM(str(tmp_path / "none"))
    with pytest.raises(TypeError, match="not a string"):
        ff.LLM(None)  # type: ignore[arg-type]
    opt = edit_config(copy_of(tiny("llama"), tmp_path / "opt"), architectures=["OPTForCausalLM"], model_type="opt")
    with pytest.raises(ValueError, match=r"OPTForCausalLM.*supported: .*MixtralForCausalLM"):
        ff.LLM(str(opt))


def test_what_is_not_served_says_how_to_go_on() -> None:
    with pytest.raises(NotImplementedError, match="Leave the SSMs out of compile"):
        ff.SSM("builtin")
    adapter = ff.LoraLinearConfig("cache", "adapter", base_model_name_or_path="builtin")
    with pytest.raises(NotImplementedError, match="Merge the adapter"):
        ff.LLM("builtin").register_peft_adapter(adapter)


# ----------------------------------------------------------------------------------------------- incr_decoding, REST


def test_flags_of_incr_decoding() -> None:
    config, ignored = incremental.parse(
        "-ll:gpu 1 -ll:fsize 14000 --ll:zsize 30000 -ll:force_kthreads 1 -level 4 -llm-model builtin -prompt p.json "
        "-output-file o.txt -tensor-parallelism-degree 2 --max-requests-per-batch 4 --use-full-precision "
        "--temperature 0.5 --do-sample --max-sequence-length 300 --fusion".split()
    )
    assert ignored == ["-ll:force_kthreads", "-level"]
    assert config == {
        "num_gpus": 1,
        "memory_per_gpu": 14000,
        "zero_copy_memory_per_node": 30000,
        "llm_model": "builtin",
        "prompt": "p.json",
        "output_file": "o.txt",
        "tensor_parallelism_degree": 2,
        "max_requests_per_batch": 4,
        "full_precision": True,
        "temperature": 0.5,
        "do_sample": True,
        "max_seq_length": 300,
        "fusion": True,
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-llm-modl x", "did you mean '-llm-model'"),
        ("-prompt", "needs a value"),
        ("-ll:gpu one", "not a number"),
        ("builtin", "no flag"),
        ("--verbose", "no model is named"),
    ],
)
def test_wrong_flags(flags: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        incremental.run(incremental.parse(flags.split())[0])


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text('// two\n["One // not a comment", /* the\nother */ "Two \\" // neither"]', "utf-8")
    assert [r.prompt for r in files.read_prompts(file, 9)] == ["One // not a comment", 'Two " // neither']
    file.write_text('{"metadata": {}, "entries": [{"prompt": "One", "response_length": 5}]}', "utf-8")
    assert files.read_prompts(file) == [ff.Request(prompt="One", max_new_tokens=5)]
    for wrong in ("[]", "[1]", '"One"', "{}"):
        file.write_text(wrong, "utf-8")
        with pytest.raises(ValueError, match="no list of prompts"):
            files.read_prompts(file)
    file.write_text("/* a\nb */ [1,\n,]", "utf-8")
    with pytest.raises(ValueError, match="line 3"):
        files.read_prompts(file)
    with pytest.raises(OSError, match="cannot be read"):
        files.read_prompts(tmp_path / "none.json")


def test_rest_bodies(llm: ff.LLM, reference: Reference) -> None:
    answer = rest.generate(llm, {"prompt": PROMPT, "max_length": 40})
    assert answer == {"prompt": PROMPT, "response": reference(PROMPT, 40)[1].removeprefix("<s>" + PROMPT)}
    assert rest.chat(llm, {"messages": CHAT}) == {"response": "The capital of France is Paris."}
    for body in ({}, {"prompt": 5}, {"prompt": ""}, [], {"prompt": "x", "max_length": 999}):
        with pytest.raises(ValueError, match=r"prompt|object|max_length"):
            rest.generate(llm, body)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="messages"):
        rest.chat(llm, {"messages": []})


def test_a_config_that_names_its_model(tmp_path: Path) -> None:
    """As transformers 4 wrote it."""
    folder = edit_config(copy_of(tiny("mixtral"), tmp_path / "model"), _name_or_path="somebody/else")
    assert ff.LLM(str(folder)).hf_config._name_or_path == str(folder)


def test_a_forgotten_llm_is_freed() -> None:
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT)
    model.compile(max_seq_length=64)
    model.generate("One", max_length=8)
    assert model.rm is not None
    engine = model.rm.llm.engine
    del model
    gc.collect()
    with pytest.raises(FlexMoEError, match="closed"):
        engine.describe()


def test_an_output_file_is_tried_before_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT, output_file=str(tmp_path / "file" / "records.txt"))
    model.compile(max_seq_length=64)
    assert model.rm is not None
    monkeypatch.setattr(model.rm, "run", lambda *_: pytest.fail("computed first"))
    with pytest.raises(OSError, match="cannot be written"):
        model.generate("One", max_length=8)


def test_adapter_keywords_say_once_that_they_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = ff.LLM("builtin", ff.DataType.DT_FLOAT)
    for _ in range(2):
        model.compile(max_seq_length=64, max_concurrent_adapters=2)
    assert [r.getMessage() for r in caplog.records].count(
        "max_concurrent_adapters: no effect, for adapters are not served."
    ) == 1


def test_a_configuration_is_completed_and_its_types_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"llm_model": "builtin", "max_length": null, "num_gpus": null, "output_file": "out.txt"}')
    config = incremental.complete({"config_file": str(file), "verbose": True})
    assert (config["llm_model"], config["max_length"], config["output_file"]) == ("builtin", 128, "out.txt")
    assert "num_gpus" not in config
    assert "config_file" not in config
    for wrong in ({"max_length": "128"}, {"max_length": True}, {"prompt": 3}, {"verbose": 1}, {"temperature": "0.9"}):
        with pytest.raises(TypeError, match="use a"):
            incremental.complete(wrong)


def test_a_legion_flag_without_a_value_leaves_the_next_flag_alone() -> None:
    config, ignored = incremental.parse("-ll:force_kthreads -llm-model builtin -level 4 -prompt p.json".split())
    assert config == {"llm_model": "builtin", "prompt": "p.json"}
    assert ignored == ["-ll:force_kthreads", "-level"]


def test_flags_with_one_dash_and_an_h_are_no_call_for_help(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('["One"]')
    flags = (
        f"-cache-folder {tmp_path} -llm-model builtin -prompt {tmp_path / 'p.json'} -max-length 8 --use-full-precision"
    )
    result = CliRunner().invoke(main, ["incr_decoding", *flags.split()])
    assert result.exit_code == 0, result.output
    assert "One" in result.stdout
    assert "Usage" not in result.output


def test_a_length_beyond_the_context_is_cut_with_it(tmp_path: Path) -> None:
    config = {"llm_model": "builtin", "full_precision": True, "max_seq_length": 4096, "max_length": 2048}
    (tmp_path / "p.json").write_text('["What is the capital of Peru?"]')
    assert incremental.run({**config, "prompt": str(tmp_path / "p.json")})[0].output_tokens
