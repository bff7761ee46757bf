"""Incremental decoding in FlexFlow Serve's style: plain prompts in, texts out.

Run it with either of

    flexmoe run examples/flexflow/incremental_decoding.py
    python examples/flexflow/incremental_decoding.py        (after changing the import to `import flexmoe.serve as ff`)
"""

import argparse

import flexflow.serve as ff
from flexflow.core import FFConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete prompts.")
    parser.add_argument("prompts", nargs="*", default=["Once upon a time", "The capital of France"])
    parser.add_argument("--model", default="builtin", help="a folder, a hub id, or builtin")
    parser.add_argument("--full-precision", action="store_true")
    parser.add_argument("--output-file", default="", help="append FlexFlow's record of each request to this file")
    arguments = parser.parse_args()

    ff.init(num_gpus=1, memory_per_gpu=14000, zero_copy_memory_per_node=30000)
    data_type = ff.DataType.DT_FLOAT if arguments.full_precision else ff.DataType.DT_HALF
    llm = ff.LLM(arguments.model, data_type=data_type, output_file=arguments.output_file)
    llm.compile(
        ff.GenerationConfig(do_sample=False),
        max_requests_per_batch=8,
        max_seq_length=256,
        max_tokens_per_batch=128,
    )
    llm.start_server()
    clock = FFConfig()
    start = clock.get_current_time()
    results = llm.generate(arguments.prompts, max_length=64)
    seconds = (clock.get_current_time() - start) / 1e6
    for result in results:
        print(result.output_text.decode("utf-8"))
        print("-" * 40)
    print(f"{sum(len(result.output_tokens) for result in results)} tokens in {seconds:.2f} s")
    llm.stop_server()


if __name__ == "__main__":
    main()
