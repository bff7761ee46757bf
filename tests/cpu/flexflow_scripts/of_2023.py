"""In the style of 2023: keywords for init, star import, no start_server, max_length by position, old compile words."""

import sys

import flexflow.serve as ff
from flexflow.core import *

model, precision, prompt = sys.argv[1:]
ff.init(num_gpus=1, memory_per_gpu=14000, zero_copy_memory_per_node=30000, legion_utility_processors=4)
llm = ff.LLM(model, data_type=ff.DataType.DT_FLOAT if precision == "full" else ff.DataType.DT_HALF)
config = ff.GenerationConfig(do_sample=False, temperature=0.9, topp=0.8, topk=1)
llm.compile(
    config,
    max_batch_size=1,
    max_seq_length=256,
    max_tokens_per_batch=64,
    model_specific_tensor_parallelism_degree=1,
    model_specific_pipeline_parallelism_degree=1,
)
ffconfig = FFConfig()
start = ffconfig.get_current_time()
result = llm.generate(prompt, 64)
print(result[0].output_text.decode("utf-8"), end="")
assert 0 < ffconfig.get_current_time() - start < 300e6
