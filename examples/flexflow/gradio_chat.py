"""A chat in the browser with Gradio, in FlexFlow Serve's style.

pip install gradio
flexmoe run examples/flexflow/gradio_chat.py --model builtin
"""

import argparse
from typing import Any

import flexflow.serve as ff


class Chatbot:
    """Answers what Gradio's ChatInterface asks: the new message, and the messages before it."""

    def __init__(self, model: str, max_new_tokens: int = 64) -> None:
        ff.init(num_gpus=1, memory_per_gpu=14000, zero_copy_memory_per_node=30000)
        self.max_new_tokens = max_new_tokens
        self.llm = ff.LLM(model)
        # Several people may ask at once: their requests share a batch.
        self.llm.compile(ff.GenerationConfig(do_sample=False), max_requests_per_batch=8, max_seq_length=1024)
        self.llm.start_server()

    def __call__(self, message: str, history: list[Any]) -> str:
        messages = [*as_messages(history), {"role": "user", "content": message}]
        result = self.llm.generate(messages, max_new_tokens=self.max_new_tokens)
        return result[0].output_text.decode("utf-8")


def as_messages(history: list[Any]) -> list[dict[str, str]]:
    """Gradio's history in either of its forms: messages, or older, pairs of question and answer."""
    messages = []
    for entry in history:
        if isinstance(entry, dict):
            messages.append({"role": entry["role"], "content": as_text(entry["content"])})
        else:
            messages += [{"role": "user", "content": entry[0]}, {"role": "assistant", "content": entry[1]}]
    return messages


def as_text(content: Any) -> str:
    """Gradio 6 gives a list of parts where Gradio 5 gives a string."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if "text" in part)


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat in the browser.")
    parser.add_argument("--model", default="builtin", help="a folder, a hub id, or builtin; it needs a chat template")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()

    import gradio

    bot = Chatbot(arguments.model)
    gradio.ChatInterface(bot.__call__, title="FlexMoE").launch(server_port=arguments.port)
    bot.llm.stop_server()


if __name__ == "__main__":
    main()
