"""In the style of 2024: the model in a `with`, a class around it, several prompts in a batch."""

import sys

import flexflow.serve as ff


class FlexFlowLLM:
    def __init__(self, config):
        ff.init(config)
        self.llm = ff.LLM(config["llm_model"], data_type=ff.DataType.DT_FLOAT, cache_path=config["cache_path"])

    def compile_and_start(self):
        config = ff.GenerationConfig(do_sample=False, temperature=0.9, topp=0.8, topk=1)
        self.llm.compile(config, 4, 256, 64, max_concurrent_adapters=1, ssms=[])
        self.llm.start_server()

    def generate(self, prompts):
        with self.llm:
            return [result.output_text.decode("utf-8") for result in self.llm.generate(prompts, max_length=48)]

    def stop_server(self):
        self.llm.stop_server()


served = FlexFlowLLM(
    {
        "num_gpus": 1,
        "memory_per_gpu": 14000,
        "zero_copy_memory_per_node": 30000,
        "llm_model": sys.argv[1],
        "cache_path": "",
    }
)
served.compile_and_start()
for text in served.generate(["Once upon a time", "The capital of France"]):
    print(repr(text))
served.stop_server()
