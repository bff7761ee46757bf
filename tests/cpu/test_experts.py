"""Every expert backend with every dispatcher, against a loop over tokens and their experts, one product at a time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexmoe.config.plan import ExpertPlacement
from flexmoe.engine import startup
from flexmoe.errors import ConfigError
from flexmoe.kernels.gpu import why_no_triton
from flexmoe.moe.dispatch import LocalDispatcher
from flexmoe.moe.experts import BACKENDS, default_backend, make_experts
from flexmoe.moe.experts.weights import ExpertWeights
from tests.cpu.nearness import assert_near, poisoned, surrounded

CPU = torch.device("cpu")
E, H, F, K = 7, 24, 20, 3
ROWS = [1, 2, 3, 7, 33]
DTYPES = [torch.float32, torch.bfloat16]
PLACEMENTS = {
    "identity": ExpertPlacement.contiguous(E),
    "shuffled": ExpertPlacement(E, ((5, 2, 0, 6, 1, 3, 4),)),
    "replicas": ExpertPlacement(E, ((3, 5, 2, 0, 3, 6, 1, 3, 4, 0),)),
}
# On a CPU the Triton kernels run in their interpreter, whose bf16 is wrong; compiled, tests/kernels has them.
KINDS = [
    (backend, prepack, dtype)
    for backend in BACKENDS
    for prepack in (False, True)
    for dtype in DTYPES
    if (backend == "cpu" or not prepack)
    and (backend != "triton" or (os.environ.get("TRITON_INTERPRET") == "1" and dtype is torch.float32))
]
kinds = pytest.mark.parametrize(("backend", "prepack", "dtype"), KINDS)
# numpy in that interpreter, of a range whose end is known at run time only
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
rows = pytest.mark.parametrize("T", ROWS)


def weights_of(num_experts: int, dtype: torch.dtype, hidden: int = H, width: int = F) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2F, H] and down [E, H, F] of logical experts."""
    gate_up = torch.randn(num_experts, 2 * width, hidden) * hidden**-0.5
    return gate_up.to(dtype), (torch.randn(num_experts, hidden, width) * width**-0.5).to(dtype)


def loaded(backend: str, gate_up: Tensor, down: Tensor, placement: ExpertPlacement, *, prepack: bool) -> ExpertWeights:
    """The backend with its physical slots filled as `placement` says."""
    held = list(placement.local_slots(0))
    experts = make_experts(backend, len(held), *down.shape[1:], dtype=gate_up.dtype, device=CPU)
    experts.gate_up.data.copy_(gate_up[held])
    experts.down.data.copy_(down[held])
    experts.pack(prepack=prepack)
    return experts


def naive(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, expert by expert, in fp64; ids below 0 are left out."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, (experts, scales) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, scale in zip(experts, scales, strict=True):
            if expert >= 0:
                gate, up = (gate_up[expert].double() @ x[t].double()).chunk(2)
                out[t] += scale * (down[expert].double() @ (gate / (1 + (-gate).exp()) * up))
    return out


def spread(tokens: int) -> Tensor:
    return torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])


def one_expert(tokens: int) -> Tensor:
    """Everyone's first choice is expert 4; the experts 5 and 6 stay empty."""
    others = torch.stack([torch.randperm(4)[: K - 1] for _ in range(tokens)])
    return torch.cat((torch.full((tokens, 1), 4), others), 1)


def same_experts(tokens: int) -> Tensor:
    """All tokens on the same K experts, the last one first; all others are empty."""
    return torch.tensor([[6, 0, 2]]).repeat(tokens, 1)


@kinds
@rows
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("choose", [spread, one_expert, same_experts])
def test_every_backend_with_every_dispatcher(
    backend: str, prepack: bool, placement: str, T: int, dtype: torch.dtype, choose: Callable[[int], Tensor]
) -> None:
    gate_up, down = weights_of(E, dtype)
    ids, weights = choose(T), torch.rand(T, K)
    x = surrounded(torch.randn(T, H).to(dtype))
    wanted, before = naive(x, ids, weights, gate_up, down), x.clone()
    # What nobody chose must not be touched, let alone multiplied by 0.
    idle = sorted(set(range(E)) - set(ids.flatten().tolist()))
    gate_up[idle], down[idle] = float("nan"), float("nan")
    experts = loaded(backend, gate_up, down, PLACEMENTS[placement], prepack=prepack)
    dispatcher = LocalDispatcher(PLACEMENTS[placement], CPU)

    def run() -> Tensor:
        routed = dispatcher.dispatch(x, surrounded(ids), surrounded(weights))
        return dispatcher.combine(experts(routed.x, routed.slot_ids, routed.weights), routed)

    with poisoned(), torch.inference_mode():
        out, again = run(), run()
    assert out.dtype is dtype
    assert_near(out, wanted)
    assert torch.equal(out, again)
    assert torch.equal(x, before)


@kinds
@rows
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_experts_that_are_not_here_are_left_out(
    backend: str, prepack: bool, T: int, dtype: torch.dtype, share: float
) -> None:
    """Slot -1 with any weight: another rank computes it. A row without any expert here is 0."""
    gate_up, down = weights_of(E, dtype)
    ids = spread(T).masked_fill(torch.rand(T, K) < share, -1)
    ids[T // 2] = -1
    weights = torch.rand(T, K).masked_fill(ids < 0, float("nan"))
    x = torch.randn(T, H).to(dtype)
    experts = loaded(backend, gate_up, down, PLACEMENTS["identity"], prepack=prepack)
    with poisoned(), torch.inference_mode():
        out = experts(x, ids, weights)
    wanted = naive(x, ids, weights, gate_up, down)
    assert_near(out, wanted)
    assert not out[T // 2].any()


@kinds
@pytest.mark.parametrize(("hidden", "width", "num_experts"), [(1, 1, 1), (33, 5, 2), (17, 40, 3)])
def test_odd_sizes(backend: str, prepack: bool, hidden: int, width: int, num_experts: int, dtype: torch.dtype) -> None:
    gate_up, down = weights_of(num_experts, dtype, hidden, width)
    experts = loaded(backend, gate_up, down, ExpertPlacement.contiguous(num_experts), prepack=prepack)
    for tokens in (1, 5):
        x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 1)
        ids = torch.randint(num_experts, (tokens, 1))
        with torch.inference_mode():
            limit = 3e-2 if hidden == 1 and dtype is torch.bfloat16 else None  # roundings of one number, not of many
            assert_near(experts(x, ids, weights), naive(x, ids, weights, gate_up, down), limit)


@kinds
def test_order_of_the_k_choices_does_not_matter_to_the_sum(backend: str, prepack: bool, dtype: torch.dtype) -> None:
    gate_up, down = weights_of(E, dtype)
    experts = loaded(backend, gate_up, down, PLACEMENTS["identity"], prepack=prepack)
    x, ids, weights = torch.randn(7, H).to(dtype), spread(7), torch.rand(7, K)
    with torch.inference_mode():
        assert_near(experts(x, ids.flip(1), weights.flip(1)), experts(x, ids, weights))


def test_packing_leaves_one_copy_of_the_weights() -> None:
    gate_up, down = weights_of(E, torch.bfloat16)
    packed = loaded("cpu", gate_up, down, PLACEMENTS["identity"], prepack=True)
    assert not list(packed.parameters())
    plain = loaded("cpu", gate_up, down, PLACEMENTS["identity"], prepack=False)
    assert torch.equal(plain.gate_up, gate_up)
    plain.gate_up.data.zero_()
    x, ids = torch.randn(1, H, dtype=torch.bfloat16), torch.tensor([[0]])
    assert not plain(x, ids, torch.ones(1, 1)).any(), "the plain layout is a copy"


def test_the_default_backend_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert default_backend(CPU) == "cpu"
    assert default_backend(gpu) == "triton"
    assert why_no_triton(CPU) == "it needs an NVIDIA GPU"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert default_backend(gpu) == "reference"
    assert why_no_triton(gpu) == "the package triton is not installed (pip install triton)"


def test_no_backend_imports_triton_before_it_is_asked_for() -> None:
    code = "import sys, flexmoe.moe.experts; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("cpu", "cuda:0", "expert_backend='cpu' cannot run on device='cuda:0'; use one of auto, reference."),
        (
            "triton",
            "cpu",
            "expert_backend='triton' cannot run on device='cpu': it needs an NVIDIA GPU; use one of auto, reference.",
        ),
    ],
)
def test_a_backend_that_cannot_run_on_the_device_is_refused(name: str, device: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        startup._choose_backend(name, torch.device(device))
    assert str(error.value) == said


def test_without_triton_a_gpu_gets_the_reference_backend_and_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu = torch.device("cuda")
    assert startup._choose_backend("auto", gpu) == "reference"
    assert "'reference', not on 'triton': the package triton is not installed (pip install triton)." in caplog.text
    with pytest.raises(ConfigError, match="the package triton is not installed"):
        startup._choose_backend("triton", gpu)
    caplog.clear()
    assert startup._choose_backend("auto", CPU) == "cpu"
    assert startup._choose_backend("reference", gpu) == "reference"
    assert not caplog.text
