"""A chat in FlexFlow Serve's style: the model remembers what was said.

flexmoe run examples/flexflow/chat.py "What is the capital of France?" "And of Peru?"
"""

import argparse

import flexflow.serve as ff


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask one question after the other.")
    parser.add_argument("questions", nargs="*", default=["What is the capital of France?"])
    parser.add_argument("--model", default="builtin", help="a folder, a hub id, or builtin; it needs a chat template")
    arguments = parser.parse_args()

    ff.init({"num_gpus": 1, "memory_per_gpu": 14000, "zero_copy_memory_per_node": 30000, "llm_model": arguments.model})
    llm = ff.LLM(arguments.model)
    llm.compile(ff.GenerationConfig(do_sample=False), max_requests_per_batch=1, max_seq_length=512)
    messages: list[dict[str, str]] = []
    with llm:
        for question in arguments.questions:
            messages.append({"role": "user", "content": question})
            answer = llm.generate(messages, max_new_tokens=64)[0].output_text.decode("utf-8")
            messages.append({"role": "assistant", "content": answer})
            print(f"> {question}\n{answer}\n")


if __name__ == "__main__":
    main()
