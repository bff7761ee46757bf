"""From an EngineConfig to a model ready to run. Enters: options. Leaves: a filled Decoder, its cache, its tokenizer."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexmoe.config.engine import CacheConfig, EngineConfig
from flexmoe.config.model import ModelConfig
from flexmoe.config.shard import check
from flexmoe.engine.cuda_graph import GraphedDecoder, rows_for
from flexmoe.engine.device import choose_device, choose_dtype, computing_on, set_threads, tell_of_slow_dtype, tokens_on
from flexmoe.engine.prompt_graphs import GraphedPrompts
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import ConfigError
from flexmoe.kernels.cpu import library
from flexmoe.kernels.gpu import why_no_triton
from flexmoe.layers.kv_cache import KVCache, block_bytes
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import why_not_fused
from flexmoe.models.hopper import hopper_kernels
from flexmoe.models.hub import ModelSource, open_model
from flexmoe.models.loader import fill_dummy, load_weights
from flexmoe.models.native import takes_prompts, why_not_native
from flexmoe.models.quantized import weight_bytes
from flexmoe.moe.experts import BACKENDS, default_backend
from flexmoe.parallel.mesh import Mesh
from flexmoe.scheduling.prompt_forms import graphed_by, most_graphed

_log = logging.getLogger(__name__)

# Of the memory that is free once the weights are in: a CPU's is shared with other programs, a GPU's is ours.
_CPU_CACHE_SHARE, _GPU_CACHE_SHARE = 0.25, 0.9
_GPU_RESERVE = 2**30
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Started:
    """Everything the engine runs with. tokenizer is None for a model without one (dummy presets)."""

    source: ModelSource
    model: Decoder
    cache: KVCache
    graphed: GraphedDecoder | None  # on a GPU, unless the Triton kernels cannot decode this model
    prompts: GraphedPrompts | None  # there, too
    num_blocks: int
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype
    quantization: str | None
    threads: int
    backend: str
    decode_kernels: str  # "C (avx2)", "Triton", or why torch decodes
    prompt_kernels: str  # "C (avx2)", "Triton", "Triton, CUDA for Hopper (attention, experts)", "torch"
    max_model_len: int

    @property
    def config(self) -> ModelConfig:
        return self.source.config


def start(options: EngineConfig, mesh: Mesh | None = None) -> Started:
    """Load the model and allocate the KV cache. Every problem is raised before the cache is allocated.

    mesh: this rank's place among several, which all start together. Such a rank loads no tokenizer.
    """
    device = _indexed(choose_device(options.device.device))
    with computing_on(device):
        return _start(options, mesh or Mesh(options.parallel), device)


def _indexed(device: torch.device) -> torch.device:
    """With "cuda" the current GPU is meant, of the thread that starts the engine; others may have another."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _start(options: EngineConfig, mesh: Mesh, device: torch.device) -> Started:
    source = open_model(options.load)
    config = source.config
    check(options.parallel, config)
    max_model_len = _max_model_len(options, config)
    backend = _choose_backend(options.device.expert_backend, device)
    threads = set_threads(options.device.threads)
    options = with_quantization(options, source)
    _check_quantization(options, device, backend)
    alone = mesh.world.size == 1
    isa = options.device.isa
    in_c = alone and not why_not_native(config, torch.bfloat16, device, backend, isa)
    quantized = options.device.quantization is not None
    prompts_in_c = in_c and takes_prompts(torch.bfloat16, isa, quantized=quantized)
    dtype = choose_dtype(options.device.dtype, config, device, few_rows_in_c=in_c, prompts_in_c=prompts_in_c)
    if alone:
        tell_of_slow_dtype(options.device.dtype, device)
    # The KV cache is checked before the weights are read: a refusal should not cost minutes.
    num_blocks = mesh.world.minimum(_num_blocks(options, mesh, config, max_model_len, dtype, device), device)
    tokenizer = load_tokenizer(options, source) if alone else None
    native_reason = why_not_native(config, dtype, device, backend, isa) if alone else "several ranks"
    model = _build(options, mesh, source, max_model_len, backend, dtype, device, in_c=not native_reason)
    model.pack(None if native_reason else threads, isa=isa, in_place=device.type == "cuda")
    cache = KVCache(mesh.shard(config).local, num_blocks, options.cache.block_size, dtype, device)
    if native_reason and options.device.quantization is not None:
        _log.warning("torch decodes, and widens all quantized weights in each step: %s", native_reason)
    decode_kernels = f"torch ({native_reason})" if native_reason else f"C ({library.choose(isa).name})"
    graphed, prompts = None, None
    if device.type == "cuda":
        rows = rows_for(options.scheduler.on(device.type).seats)
        graphed, prompts, decode_kernels = _in_triton(model, cache, max_model_len, device, backend, rows)
    prompt_kernels = decode_kernels if model.native is not None and model.native.prompts else "torch"
    return Started(
        source, model, cache, graphed, prompts, num_blocks, tokenizer, device, dtype, options.device.quantization,
        threads, backend, decode_kernels, prompt_kernels if prompts is None else prompts.hopper.words, max_model_len,
    )  # fmt: skip


def _in_triton(
    model: Decoder, cache: KVCache, max_model_len: int, device: torch.device, backend: str, rows: int
) -> tuple[GraphedDecoder | None, GraphedPrompts | None, str]:
    """Who computes decode steps and prompts on a GPU, and what to call the former's kernels. None: prompts, torch.

    rows: of a decode step, at most.
    """
    mesh = model.mesh
    reason = why_not_fused(model.config, device, backend, cache.block_size)
    reason = reason or "several stages" * (mesh.plan.pipeline_parallel_size > 1)
    # All ranks take the same way, or they would wait for each other for ever.
    if not mesh.world.minimum(int(not reason), device):
        reason = reason or "another rank cannot decode in Triton"
    if reason:
        return None, None, f"torch ({reason})"
    # They import triton, which a start on a CPU need not wait for.
    from flexmoe.models.fused import FusedDecoder
    from flexmoe.models.fused_prompts import PromptDecoder

    dtype = model.norm.weight.dtype
    hopper = hopper_kernels(device, mesh.shard(model.config).local, dtype)
    prompts = PromptDecoder(model, max_model_len, device, hopper=hopper)
    # None where tokens travel: ranks take different numbers of rows, and all-to-all waits for the host.
    launched = GraphedPrompts(prompts, cache, device, mesh.traffic, most_graphed=graphed_by(mesh.plan))
    if mesh.plan.uses_all_to_all:
        return None, launched, "those of prompts, without graphs (all-to-all waits for the host in every layer)"
    most_blocks = -(-max_model_len // cache.block_size)
    fused = FusedDecoder(model, max_model_len, device, max_rows=rows, hopper=hopper.for_decodes())
    return GraphedDecoder(fused, cache, most_blocks, device, mesh.traffic), launched, fused.kernels


def load_tokenizer(options: EngineConfig, source: ModelSource) -> Tokenizer | None:
    """The model's tokenizer; None for a preset, and for dummy weights whose folder has none."""
    if source.folder is None:
        return None
    if options.load.load_format == "dummy" and not (source.folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_folder(source.folder)


def _build(
    options: EngineConfig,
    mesh: Mesh,
    source: ModelSource,
    max_model_len: int,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_c: bool,
) -> Decoder:
    config = source.config
    model = Decoder(config, mesh.plan, backend, max_model_len, dtype=dtype, device=device, mesh=mesh).eval()
    if options.device.quantization is not None:
        model.quantize(options.device.quantization)
    if in_c:
        model.move_to_large_pages()
    params = model.weights()
    if options.load.load_format == "dummy":
        fill_dummy(params, options.seed, getattr(torch, config.checkpoint_dtype), mesh.shard(config))
    else:
        load_weights(source, params, mesh.shard(config), progress=options.load.progress)
    return model


def _choose_backend(name: str, device: torch.device) -> str:
    backend = default_backend(device) if name == "auto" else name
    if backend not in BACKENDS:
        raise ConfigError(f"expert_backend={backend!r} is not one of {', '.join(BACKENDS)}.")
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"expert_backend='cpu' cannot run on device={str(device)!r}; use one of auto, reference.")
    reason = why_no_triton(device)
    if backend == "triton" and reason:
        raise ConfigError(
            f"expert_backend='triton' cannot run on device={str(device)!r}: {reason}; use one of auto, reference."
        )
    if name == "auto" and device.type == "cuda" and reason:
        _log.warning("Experts run on the slow backend 'reference', not on 'triton': %s.", reason)
    return backend


def with_quantization(options: EngineConfig, source: ModelSource) -> EngineConfig:
    """The options with the checkpoint's own quantization. Raises ConfigError if they ask for another, or for ranks."""
    asked = options.device.quantization
    held = None if source.packing is None else source.packing.quantization
    if held and asked not in (None, held):
        raise ConfigError(
            f"quantization={asked!r}, but {source.name} holds {held} weights already; leave it out, or give the full "
            "model."
        )
    quantization, ranks = asked or held, options.parallel.num_ranks
    if quantization and ranks > 1:
        raise ConfigError(
            f"quantization={quantization!r} needs one process, not {ranks} ranks; use one, or full weights."
        )
    return replace(options, device=replace(options.device, quantization=quantization))


def _check_quantization(options: EngineConfig, device: torch.device, backend: str) -> None:
    """Quantized weights are read by the C kernels and by the torch of one process on a CPU, by nothing else."""
    asked = options.device.quantization
    if asked is None:
        return
    if device.type != "cpu":
        raise ConfigError(f"quantization={asked!r} works on a CPU only, not on device={str(device)!r}; use device=cpu.")
    if backend != "cpu":
        raise ConfigError(f"quantization={asked!r} does not work with expert_backend={backend!r}; use cpu.")


def _max_model_len(options: EngineConfig, config: ModelConfig) -> int:
    asked = options.scheduler.max_model_len
    if asked is not None and asked > config.max_position:
        raise ConfigError(
            f"max_model_len={asked} is above the model's context of {config.max_position} tokens; "
            f"use at most {config.max_position}."
        )
    return asked or config.max_position


def _num_blocks(
    options: EngineConfig,
    mesh: Mesh,
    config: ModelConfig,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Blocks of the KV cache: as given, else for some full contexts, within a share of the free memory."""
    free = _free_beside_weights(mesh, config, dtype, device, options)
    if device.type == "cuda":
        tokens = tokens_on(device, config, dtype).asked(options.scheduler.max_num_batched_tokens).widest
        # Twice for what may be a graph: such steps have memory of their own. Experts may have all data ranks' rows.
        rows = mesh.dp.size * (tokens + min(tokens, most_graphed(mesh.world.size)))
        free = max(0, free - _activation_bytes(config, rows, dtype))
    per_context = -(-max_model_len // options.cache.block_size)
    size = block_bytes(mesh.shard(config).local, options.cache.block_size, dtype)
    blocks = _given_blocks(options.cache, size, per_context * size)
    if blocks is not None:
        if blocks * size > free:
            raise ConfigError(
                f"the KV cache would take {_gib(blocks * size)}, but beside the weights only {_gib(free)} of memory "
                "are free; lower kv_cache_memory or max_num_batched_tokens."
            )
        return blocks
    share = _CPU_CACHE_SHARE if device.type == "cpu" else _GPU_CACHE_SHARE
    blocks = min(options.scheduler.seats * per_context, int(free * share) // size)
    if blocks < per_context:
        raise ConfigError(
            f"a context of max_model_len={max_model_len} tokens needs {_gib(per_context * size)} of KV cache, but only "
            f"{_gib(int(free * share))} of memory are free for it; lower max_model_len, or block_size if it is larger."
        )
    return blocks


def _activation_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """What a step of so many tokens needs for the widest part of a layer, roughly: rows of experts, projections."""
    moe, hidden = config.moe, config.hidden_size
    experts = moe.top_k * (2 * hidden + 3 * moe.expert_width) if moe else 3 * config.dense_width
    return tokens * dtype.itemsize * (experts + 4 * (config.qkv_size + hidden))


def _given_blocks(cache: CacheConfig, block_size: int, context_size: int) -> int | None:
    """The number of blocks that the options ask for, None if they leave it open. Sizes in bytes."""
    if cache.kv_cache_memory is None:
        return cache.num_blocks
    if cache.num_blocks is not None:
        raise ConfigError(
            f"num_blocks={cache.num_blocks} and kv_cache_memory={cache.kv_cache_memory} both set the size of the KV "
            "cache; give one of them."
        )
    blocks = cache.kv_cache_memory // block_size
    if blocks < 1:
        raise ConfigError(
            f"kv_cache_memory={cache.kv_cache_memory} bytes holds no block; one takes {block_size} bytes, "
            f"a full context {context_size}."
        )
    return blocks


def _free_beside_weights(
    mesh: Mesh, config: ModelConfig, dtype: torch.dtype, device: torch.device, options: EngineConfig
) -> int:
    """Bytes that are free once the weights are loaded. Raises ConfigError if there is no room for them."""
    if device.type == "cpu":
        free = _available_memory() // mesh.machine_size
    else:
        free = _free_on_gpu(mesh, config, device, rows_for(options.scheduler.on(device.type).seats))
    weights = weight_bytes(mesh.shard(config), dtype.itemsize, options.device.quantization)
    if weights > free:
        share = f" of rank {mesh.rank}" if mesh.world.size > 1 else ""
        raise ConfigError(
            f"the weights{share} take {_gib(weights)} in {str(dtype).removeprefix('torch.')}, but only {_gib(free)} of "
            f"memory are free on device {str(device)!r}; use a smaller model"
            f"{' or a 16-bit dtype' * (dtype.itemsize > 2)}."
        )
    return free - weights


def _free_on_gpu(mesh: Mesh, config: ModelConfig, device: torch.device, rows: int) -> int:
    """Bytes free on a GPU, less what decodes of so many rows need beside weights and cache: buffers, graphs."""
    gc.collect()
    torch.cuda.empty_cache()  # what earlier engines of this process held counts as taken until then
    logits = 4 * rows * config.vocab_size * (1 if mesh.tp.size == 1 else 3)  # own, of all ranks, and in order
    return max(0, torch.cuda.mem_get_info(device)[0] - _GPU_RESERVE - logits)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _available_memory() -> int:
    """Bytes of main memory that this process can take: of the machine, or of its container if that has less."""
    return min([_machine_memory(), *_container_memory()])


def _container_memory() -> list[int]:
    """Bytes left to this control group, for each version of control groups that sets a limit.

    Files that were read and are not in use count as left, though the group's usage includes them.
    """
    left = []
    for folder, limit, used, idle in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = _CGROUP / folder
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such version; "max": no limit
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            left.append(int((group / limit).read_text()) - int((group / used).read_text()) + int(stat[idle]))
    return left


def _machine_memory() -> int:
    """Bytes that Linux estimates a new program can take; elsewhere half of the memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - no Path needed for /proc
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
