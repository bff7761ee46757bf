"""A LangChain prompt template in front of a model, in FlexFlow Serve's style.

pip install langchain-core
flexmoe run examples/flexflow/langchain_prompt.py "What is the capital of France?"
"""

import argparse
from typing import Any

import flexflow.serve as ff
from langchain_core.language_models.llms import LLM
from langchain_core.prompts import PromptTemplate


class FlexMoELLM(LLM):
    """LangChain's view of a compiled model."""

    served: Any
    max_new_tokens: int = 48

    @property
    def _llm_type(self) -> str:
        return "flexmoe"

    def _call(self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> str:
        request = ff.Request(ff.RequestType.REQ_INFERENCE, prompt=prompt, max_new_tokens=self.max_new_tokens)
        text = self.served.generate(request)[0].output_text.decode("utf-8")
        answer = text.partition(prompt)[2]  # a plain prompt comes back in front of its completion
        return min((answer.split(end)[0] for end in stop or []), key=len, default=answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask through a prompt template.")
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--model", default="builtin", help="a folder, a hub id, or builtin")
    arguments = parser.parse_args()

    ff.init(num_gpus=1, memory_per_gpu=14000, zero_copy_memory_per_node=30000)
    llm = ff.LLM(arguments.model)
    llm.compile(ff.GenerationConfig(do_sample=False), max_seq_length=256)
    llm.start_server()
    chain = PromptTemplate.from_template("Question: {question}\nAnswer:") | FlexMoELLM(served=llm)
    print(chain.invoke({"question": arguments.question}, stop=["\n"]).strip())
    llm.stop_server()


if __name__ == "__main__":
    main()
