"""Measures a finished checkpoint with transformers alone, as a user would load it.

In: the checkpoint folder and the data folder of `training.prepare`. Out: eval.json with the loss of each source on
held-out text, capitals answered, trained questions answered again, the load of every expert, and samples.
Run: python -m training.evaluate --model src/flexmoe/assets/builtin --data DATA --output training/results/eval.json
"""

import argparse
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.capitals import HELD_OUT_FORM, PLAIN_FORM, Capital, answer_to
from training.chat import BOS, SPECIAL_TOKENS, USER_END, USER_START

CONTEXT = 1024
STORY_PROMPTS = (
    "Once upon a time there was",
    "The old king looked out of the window and",
    '"Where have you been?" said the girl.',
    "The history of the city begins",
    "In Python, a list is",
)
QUESTIONS = (
    "What is the capital of Norway?",
    "Who was Isaac Newton?",
    "Tell me about Nepal.",
    "What is the climate of Kenya like?",
    'What does "glacier" mean?',
)


class Subject:
    """The checkpoint under test, in fp32 so that the figures do not depend on the machine."""

    def __init__(self, folder: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.device = device
        config = self.model.config
        self.experts, self.top_k = config.num_local_experts, config.num_experts_per_tok
        self.load = torch.zeros(config.num_hidden_layers, self.experts)

    @torch.no_grad()
    def loss(self, documents: Sequence[Tensor], batch: int = 16) -> tuple[float, int]:
        """Sum of nats and number of predicted tokens; of a chat only the answers count. Adds to `load`."""
        windows = [part for document in documents for part in _windows(document)]
        windows.sort(key=len)
        nats, count = 0.0, 0
        for first in range(0, len(windows), batch):
            ids = torch.nn.utils.rnn.pad_sequence(windows[first : first + batch], batch_first=True, padding_value=-1)
            ids = ids.to(self.device)
            targets = _answers_only(ids)[:, 1:]
            inputs = ids[:, :-1].clamp(min=0)
            out = self.model(inputs, output_router_logits=True, use_cache=False)
            lost = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
            nats, count = nats + lost.item(), count + int((targets >= 0).sum())
            self._count_load(out.router_logits, ids[:, :-1] >= 0)
        return nats, count

    def _count_load(self, router_logits: Sequence[Tensor], real: Tensor) -> None:
        for layer, logits in enumerate(router_logits):
            chosen = logits.view(-1, self.experts)[real.flatten()].topk(self.top_k, -1).indices
            self.load[layer] += torch.bincount(chosen.flatten().cpu(), minlength=self.experts)

    def answers(self, questions: Sequence[str], limit: int = 32, batch: int = 64) -> list[str]:
        """Greedy answers to single questions."""
        prompts = [[{"role": "user", "content": question}] for question in questions]
        texts = [self.tokenizer.apply_chat_template(prompt, tokenize=False) for prompt in prompts]
        return self._complete(texts, batch, add_special_tokens=False, max_new_tokens=limit, do_sample=False)

    def stories(self, prompts: Sequence[str]) -> list[str]:
        """Continuations sampled at temperature 0.7, top-p 0.9, seed 0."""
        torch.manual_seed(0)
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
        return self._complete(prompts, 1, add_special_tokens=True, max_new_tokens=120, **sampling)

    @torch.no_grad()
    def _complete(self, texts: Sequence[str], batch: int, *, add_special_tokens: bool, **options: Any) -> list[str]:
        done = []
        for first in range(0, len(texts), batch):
            chunk = list(texts[first : first + batch])
            encoded = self.tokenizer(
                chunk, add_special_tokens=add_special_tokens, padding=True, return_tensors="pt"
            ).to(self.device)
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            out = self.model.generate(**inputs, **options)
            done += self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return done


def _windows(document: Tensor) -> list[Tensor]:
    """Pieces of at most CONTEXT + 1 ids, each but the first beginning with the last id of the one before."""
    return [document[first : first + CONTEXT + 1] for first in range(0, len(document) - 1, CONTEXT)]


def _answers_only(ids: Tensor) -> Tensor:
    """`ids` with everything that is no target set to -1: padding, `<s>`, and what a user says."""
    start, end, bos = (SPECIAL_TOKENS.index(token) for token in (USER_START, USER_END, BOS))
    said = (ids == start).cumsum(1) > (ids == end).cumsum(1)
    return ids.masked_fill(said | (ids == end) | (ids == bos), -1)


def losses_by_source(subject: Subject, data: Path) -> dict[str, dict[str, float]]:
    """Source -> nats a token, perplexity, tokens."""
    table = {}
    for path in sorted(data.glob("validation-*.npy")):
        tokens = torch.from_numpy(np.load(path).astype(np.int64))
        starts = (tokens == SPECIAL_TOKENS.index(BOS)).nonzero().flatten().tolist()
        nats, count = subject.loss(tokens.tensor_split(starts[1:]))
        loss = nats / count
        row = {"loss": round(loss, 4), "perplexity": round(float(np.exp(loss)), 2), "tokens": count}
        table[path.stem.removeprefix("validation-")] = row
    return table


def capitals_answered(subject: Subject, data: Path) -> dict[str, object]:
    """Share of the countries whose capital is named, asked in a trained and in a never trained form."""
    capitals = [Capital(**row) for row in json.loads((data / "capitals.json").read_text())]
    report: dict[str, object] = {"countries": len(capitals)}
    for label, form in (("plain", PLAIN_FORM), ("held_out_form", HELD_OUT_FORM)):
        given = subject.answers([form.format(country=capital.country) for capital in capitals])
        wanted = [answer_to(capital, capital.country) for capital in capitals]
        misses = {c.country: g for c, g, w in zip(capitals, given, wanted, strict=True) if _plain(g) != _plain(w)}
        report[label] = {"form": form, "share": round(1 - len(misses) / len(capitals), 4), "misses": misses}
    return report


def trained_questions(subject: Subject, data: Path) -> dict[str, dict[str, float]]:
    """How well questions of the training data are answered: exact share, and mean F1 of the words."""
    pairs = json.loads((data / "trained_pairs.json").read_text())
    given = subject.answers([pair["question"] for pair in pairs], limit=96)
    scores: dict[str, list[tuple[float, float]]] = {}
    for pair, answer in zip(pairs, given, strict=True):
        score = (float(_plain(answer) == _plain(pair["answer"])), _word_f1(answer, pair["answer"]))
        scores.setdefault(pair["source"], []).append(score)
    return {
        source: {"questions": len(rows), "exact": _mean(exact), "word_f1": _mean(f1)}
        for source, rows in scores.items()
        for exact, f1 in [tuple(zip(*rows, strict=True))]
    }


def expert_load(subject: Subject) -> dict[str, object]:
    """Share of each layer's routing choices that went to each expert, over all held-out text."""
    shares = subject.load / subject.load.sum(1, keepdim=True)
    rows = [[round(share, 4) for share in layer] for layer in shares.tolist()]
    return {"uniform": 1 / subject.experts, "min": min(map(min, rows)), "max": max(map(max, rows)), "layers": rows}


def _plain(text: str) -> str:
    """Without accents, case and white space at the ends."""
    decomposed = unicodedata.normalize("NFKD", text.strip().casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


def _word_f1(given: str, wanted: str) -> float:
    left, right = (Counter(re.findall(r"\w+", _plain(text))) for text in (given, wanted))
    common = (left & right).total()
    return 2 * common / max(1, left.total() + right.total())


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def evaluate(model: Path, data: Path, device: str) -> dict[str, object]:
    """The whole report."""
    subject = Subject(model, device)
    return {
        "losses": losses_by_source(subject, data),
        "expert_load": expert_load(subject),
        "capitals": capitals_answered(subject, data),
        "trained_questions": trained_questions(subject, data),
        "answers": dict(zip(QUESTIONS, subject.answers(QUESTIONS, 96), strict=True)),
        "stories": dict(zip(STORY_PROMPTS, subject.stories(STORY_PROMPTS), strict=True)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the token arrays")
    parser.add_argument("--output", type=Path, required=True, help="eval.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    report = evaluate(args.model, args.data, args.device)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    capitals: Any = report["capitals"]
    load: Any = report["expert_load"]
    print(f"capitals {capitals['plain']['share']:.1%}, other form {capitals['held_out_form']['share']:.1%}")
    print(f"smallest expert load {load['min']:.1%}; trained questions {report['trained_questions']}")


if __name__ == "__main__":
    main()
