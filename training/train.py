"""Trains the model on one device; stop it any time, start it again and it goes on.

In: the data folder of `training.prepare`. Out, in the run folder: `state.pt` (weights, optimiser, position),
`train_log.jsonl` (one line a report).
Run: python -m training.train --data DATA --run RUN --max-minutes 8
The finishing phase starts from an exported checkpoint: --init-from, --mix finish (see README.md).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches import Sampler, validation_windows
from training.export import read_checkpoint
from training.model import MixtralForTraining, Shape


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides a phase's result, beside the data, the shape and the weights it starts from.

    The defaults are the main phase's. Batch sizes count windows.
    """

    mix: str = "main"
    steps: int = 2600
    max_minutes: float = 60.0
    batch: int = 128
    micro_batch: int = 64
    peak_lr: float = 2e-3
    final_lr_share: float = 0.02
    warmup: int = 150
    weight_decay: float = 0.3
    embedding_decay: float = 0.1
    dropout: float = 0.1
    balance_weight: float = 0.02
    z_weight: float = 1e-4
    report_every: int = 20
    validate_every: int = 250
    save_minutes: float = 2.0
    seed: int = 0


@dataclass(slots=True)
class Losses:
    """Means over a batch: cross-entropy (nats a token), balance loss, load of each expert [L, E]."""

    text: Tensor
    balance: Tensor
    load: Tensor


def losses(model: torch.nn.Module, ids: Tensor, settings: Settings) -> tuple[Tensor, Losses]:
    """The loss to minimise, and its parts, for windows [B, T + 1]."""
    logits, routing = model(ids[:, :-1])
    text = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    total = text + settings.balance_weight * routing.balance + settings.z_weight * routing.z_loss
    return total, Losses(text.detach(), routing.balance.detach(), routing.load.detach())


class Clock:
    """Progress from 0 to 1, by steps or by time, whichever is further.

    The time budget is this call's; a resumed run spreads what is left of its schedule over it, so that the learning
    rate always comes down before the call ends. `start` is called after the first step, which compiles.
    """

    def __init__(self, settings: Settings, progress: float) -> None:
        self.steps, self.before = settings.steps, progress
        self.deadline = time.monotonic() + 60 * settings.max_minutes
        self.started: float | None = None

    def start(self) -> None:
        """Begins to count time."""
        self.started = self.started or time.monotonic()

    def progress(self, step: int) -> float:
        """Share of the schedule that is done."""
        by_time = self.before
        if self.started is not None:
            share = (time.monotonic() - self.started) / max(1e-9, self.deadline - self.started)
            by_time += (1 - self.before) * min(1.0, share)
        return min(1.0, max(step / self.steps, by_time))


class Trainer:
    """Model, optimiser, data and position of one run."""

    def __init__(self, model: MixtralForTraining, settings: Settings, data: Path, run: Path) -> None:
        self.settings, self.run = settings, run
        self.model, self.device = model, model.cos.device
        self.compiled: Callable[..., tuple[Tensor, Losses]] = losses
        if self.device.type == "cuda":
            self.compiled = torch.compile(losses)
        self.optimizer = self._make_optimizer()
        length = model.shape.max_position_embeddings
        self.sampler = Sampler(data, settings.mix, length, self.device, settings.seed)
        self.validation = validation_windows(data, length, self.device)
        self.step, self.saved_progress, self.seconds = 0, 0.0, 0.0
        self._resume()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        embedding = self.model.embed_tokens.weight
        matrices = [p for p in self.model.parameters() if p.dim() >= 2 and p is not embedding]
        norms = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.settings.weight_decay},
            {"params": [embedding], "weight_decay": self.settings.embedding_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.settings.peak_lr, betas=(0.9, 0.95), fused=True)

    def _resume(self) -> None:
        path = self.run / "state.pt"
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.sampler.restore(saved["sampler"].cpu())
        self.step, self.saved_progress, self.seconds = saved["step"], saved["progress"], saved["seconds"]
        print(f"goes on from step {self.step}, progress {self.saved_progress:.3f}", flush=True)

    def save(self, progress: float) -> None:
        """Writes the state beside the old one and then puts it in its place."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state(),
            "shape": self.model.shape.as_dict(),
            "settings": asdict(self.settings),
            "step": self.step,
            "progress": progress,
            "seconds": self.seconds,
        }
        torch.save(state, self.run / "state.pt.new")
        (self.run / "state.pt.new").replace(self.run / "state.pt")

    def train(self) -> None:
        """Runs to the end of the schedule."""
        clock = Clock(self.settings, self.saved_progress)
        progress, reported, saved = clock.progress(self.step), time.monotonic(), time.monotonic()
        while progress < 1:
            parts = self._one_step(progress)
            clock.start()
            self.step += 1
            if self.step % self.settings.report_every == 0 or self.step == 1:
                row = _report(parts)  # waits for the device
                now = time.monotonic()
                self.seconds, reported, span = self.seconds + now - reported, now, now - reported
                self._log({"step": self.step, "progress": round(progress, 4), **row, **self._pace(span)})
            if self.step % self.settings.validate_every == 0:
                self.validate()
            if time.monotonic() - saved > 60 * self.settings.save_minutes:
                self.save(progress)
                saved = time.monotonic()
            progress = clock.progress(self.step)
        self.validate()
        self.save(1.0)

    def _one_step(self, progress: float) -> Losses:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(progress)
        windows = torch.split(self.sampler.draw(settings.batch, progress), settings.micro_batch)
        for ids in windows:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                total, parts = self.compiled(self.model, ids, settings)
            torch.autograd.backward(total / len(windows))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return parts  # of the last micro-batch: enough for a report

    def _learning_rate(self, progress: float) -> float:
        settings = self.settings
        decayed = 1 - (1 - settings.final_lr_share) * progress
        return settings.peak_lr * min((self.step + 1) / settings.warmup, decayed)

    def _pace(self, span: float) -> dict[str, float]:
        steps = 1 if self.step == 1 else self.settings.report_every
        tokens = steps * self.settings.batch * self.sampler.length
        rate = self.optimizer.param_groups[0]["lr"]
        return {"lr": rate, "tokens_per_s": round(tokens / span), "seconds": round(self.seconds, 1)}

    @torch.no_grad()
    def validate(self) -> None:
        """Logs the loss on each group's held-out text."""
        self.model.eval()
        row = {}
        for group, windows in self.validation.items():
            total = 0.0
            for ids in torch.split(windows, 16):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                    total += losses(self.model, ids, self.settings)[1].text.item() * len(ids)
            row[group] = round(total / len(windows), 4)
        self.model.train()
        self._log({"step": self.step, "validation": row})

    def _log(self, row: dict[str, object]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with (self.run / "train_log.jsonl").open("a") as log:
            log.write(line + "\n")


def _report(parts: Losses) -> dict[str, float]:
    return {
        "loss": round(parts.text.item(), 4),
        "balance": round(parts.balance.item(), 4),
        "min_load": round(parts.load.min().item(), 4),
    }


def main() -> None:
    """Command line; every field of `Settings` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the token arrays")
    parser.add_argument("--run", type=Path, required=True, help="folder for state and log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--init-from", type=Path, help="checkpoint folder whose weights the phase starts from")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON: fields of Shape that differ")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    torch.manual_seed(settings.seed)
    model = MixtralForTraining(Shape(**args.shape), settings.dropout)
    if args.init_from:
        model.load_state_dict(read_checkpoint(args.init_from, model.shape))
    Trainer(model.to(args.device), settings, args.data, args.run).train()


if __name__ == "__main__":
    main()
