"""In the style of 2025: one merged configuration from a JSON file, start_server and stop_server, an output file."""

import argparse
import json
from types import SimpleNamespace

import flexflow.serve as ff


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-config-file", type=str, default="")
    with open(parser.parse_args().config_file) as file:
        configs_dict = json.load(file)
    configs_dict["peft_support_mode"] = ff.PeftSupportMode[configs_dict["peft_support_mode"]]
    configs = SimpleNamespace(**configs_dict)
    ff.init(configs_dict)
    llm = ff.LLM(
        configs.llm_model,
        data_type=ff.DataType.DT_FLOAT if configs.full_precision else ff.DataType.DT_HALF,
        cache_path=configs.cache_path,
        refresh_cache=configs.refresh_cache,
        output_file=configs.output_file,
    )
    llm.compile(
        ff.GenerationConfig(do_sample=False, temperature=0.9, topp=0.8, topk=1),
        max_requests_per_batch=configs_dict.get("max_requests_per_batch", 4),
        max_seq_length=configs_dict.get("max_seq_length", 256),
        max_tokens_per_batch=configs_dict.get("max_tokens_per_batch", 64),
        num_kv_cache_slots=configs_dict.get("num_kv_cache_slots", -1),
    )
    llm.start_server()
    with open(configs.prompt) as file:
        prompts = list(json.load(file))
    llm.generate(prompts, max_length=configs.max_length)
    messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    print(llm.generate(messages, max_new_tokens=24)[0].output_text.decode("utf-8"))
    llm.stop_server()


if __name__ == "__main__":
    main()
