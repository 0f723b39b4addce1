"""petals_min: all of Petals in one module.

Petals (Borzunov et al., 2022, 2023) runs large language models BitTorrent-style: a client holds the embeddings and the
head of a model, the transformer blocks live on other people's machines, found through a distributed hash table. This
module is both ends of it, over Petals' own wire protocol, for transformers 5.

The trip of one token
    1. `model.generate(...)` is transformers' own `generate`; a thin wrapper opens and closes an inference session.
    2. `DistributedLlamaForCausalLM` and its like are transformers' own classes whose block list is a
       `RemoteSequential`. Embeddings, final norm and head run here; the hidden states leave.
    3. `InferenceSession` is a transformers `Cache` whose layers live on other machines. It sends the step to the first
       server of its route; each server pushes its output to the next one and also answers the client, which keeps the
       middle answers as the history from which a lost server's cache can be rebuilt.
    4. On a server the handler (asyncio) checks the request and gives it to the executor (a thread), which lays the
       tokens of all waiting sessions end to end and runs them through the blocks in one pass.
    5. `Block` reads and writes the paged attention cache; the last server's answer goes through norm and head.

Sections: 1 basics, 2 families, 3 checkpoints, 4 wire, 5 directory, 6 routing, 7 sessions, 8 RemoteSequential,
9 auto classes, 10 blocks, 11 paged cache, 12 executor, 13 request handler, 14 server, 15 command line.

Threads: which one owns what
    wire thread      one per process: an asyncio loop that owns every socket, the libp2p host, the DHT node, the routes,
                     the client's sessions and the server's request handlers. It never runs a model. Payloads of more
                     than 256 KiB are serialized in a helper thread, so that the loop keeps answering.
    executor thread  one per server: owns the model, the pages of the cache and every tensor on the device.
    user threads     call `generate`, `forward`, `session.step`; they hand a coroutine to the wire thread and wait.
    A function is for the wire thread if it is `async` or says so; whatever any thread may call says so.

Whom one trusts
    A server sees the hidden states of its users and could compute their text from them; it may answer nonsense. A
    client therefore chooses its servers (`allowed_servers`), and a server in one's path is trusted for its content. A
    stranger is trusted for nothing: a session takes pushes only from the peer that its client named (`push_from`,
    compared with the authenticated peer id; clients that name nobody, such as original Petals, have the session id as
    capability), a push can neither rewind a session nor run twice, and sizes, queues and times are bounded. Records of
    the directory are parsed as hostile input. Nothing received is ever unpickled or evaluated.

Glossary, with examples
    block      one transformer layer, by its index: 3
    uid        a block's name in the directory: "SmolLM2-135M-Instruct-hf.3"; a request names several: "m-hf.3 m-hf.4"
    span       consecutive blocks on one server: blocks 0:15 of peer 12D3KooW...
    route      spans that together cover what is asked for, in order
    session    the attention caches of one batch of sequences on all servers of a route; on each server it has an id
    step       one forward pass of a session: new tokens for every row, from a position on; step_id names it everywhere
    row        one sequence of a batch
    position   how many tokens of a session are in the caches: 17
    page       16 consecutive tokens of one row in a server's cache, for all blocks of that server
Shapes: B rows, T tokens, H hidden size, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, AsyncIterator, Optional  # noqa: UP035 - hivemind reads typing's AsyncIterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_start_method = multiprocessing.get_start_method(allow_none=True)
import hivemind  # noqa: E402
import hivemind.utils.tensor_descr as tensor_descr  # noqa: E402
import transformers  # noqa: E402
import uvloop  # noqa: E402
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor  # noqa: E402
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase  # noqa: E402
from hivemind.proto import dht_pb2, runtime_pb2  # noqa: E402
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID  # noqa: E402
from hivemind.utils import MSGPackSerializer, get_dht_time  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from transformers import AutoConfig, PretrainedConfig  # noqa: E402

from kernels import attention, norm  # noqa: E402

multiprocessing.set_start_method(
    _start_method, force=True
)  # hivemind's import sets it; importing us must not

__version__ = "0.1.0"
logger = logging.getLogger("petals_min")

# ======================================================================================================================
# 1  Basics: constants, errors, the wire thread
# ======================================================================================================================

PAGE = 16  # tokens per page of the attention cache
MAX_UNARY_BYTES = (
    4 * 2**20 - 2**18
)  # hivemind's unary calls fail above 4 MiB (PROTOCOL.md); leave room for headers
STREAM_BYTES = (
    2**20
)  # tensors of more than this together go by stream (Petals: half of MAX_UNARY_PAYLOAD_SIZE)
PART_BYTES = (
    4 * 2**20
)  # a tensor is cut into parts of this size in a stream (hivemind's DEFAULT_MAX_MSG_SIZE)
OFFLOAD_BYTES = 2**18  # larger payloads are (de)serialized outside the wire thread's loop
STEP_TIMEOUT, SESSION_TIMEOUT = (
    5 * 60.0,
    30 * 60.0,
)  # seconds, as in Petals: between steps, a session's whole life
PUBLIC_INITIAL_PEERS = (
    "/dns/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/dns6/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns6/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/ip4/159.89.214.152/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/ip4/159.203.156.48/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
)
FEATURES = (
    "left_pad",
    "push_from",
    "step_tensors",
)  # what this version adds to the wire (PROTOCOL.md, last sections)


class PetalsError(Exception):
    """Anything that went wrong in or with the swarm."""


class UserError(PetalsError, ValueError):
    """What was asked for cannot be done; the message says what came, what was expected, what to do."""


class MissingBlocksError(PetalsError):
    """No reachable server holds some blocks."""

    def __init__(self, prefix: str, blocks: Sequence[int], detail: str = ""):
        self.blocks = list(blocks)
        names = f"{blocks[0]}" if len(blocks) == 1 else f"{blocks[0]}..{blocks[-1]}"
        super().__init__(
            f"no server online holds block{'s' * (len(blocks) > 1)} {names} of {prefix!r}{detail}; start one with "
            f"`petals-min serve MODEL --block_indices {blocks[0]}:{blocks[-1] + 1}`, or check --initial_peers"
        )


class PeerError(PetalsError):
    """A server failed, lied or fell silent: its fault, not the user's. Another one is tried."""

    def __init__(self, message: str, peer: Optional[PeerID] = None):
        super().__init__(message)
        self.peer = peer


class AllocationFailed(PetalsError):
    """A server has no room in its attention cache."""


def _die_with_parent() -> None:
    """Runs in a child between fork and exec: Linux kills it with SIGKILL when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Loop(uvloop.Loop):
    """An event loop whose subprocesses (libp2p's daemon) die with this process, however it ends."""

    async def subprocess_exec(self, *args, **kwargs):
        return await super().subprocess_exec(*args, preexec_fn=_die_with_parent, **kwargs)


class Wire(threading.Thread):
    """The one network thread of a process. Everything `async` in this module runs in its loop."""

    def __init__(self):
        super().__init__(name="petals-wire", daemon=True)
        self.pid, self.loop = os.getpid(), _Loop()
        self.swarms: weakref.WeakValueDictionary[tuple, Swarm] = (
            weakref.WeakValueDictionary()
        )  # by initial peers
        self.helpers = ThreadPoolExecutor(4, thread_name_prefix="petals-serializer")

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, coroutine, timeout: Optional[float] = None):
        """Run the coroutine in the wire thread and wait for its result; any thread but the wire thread itself."""
        if threading.current_thread() is self:
            coroutine.close()
            raise RuntimeError("the wire thread must not wait for itself")
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        except BaseException:  # an interrupt (Ctrl-C) here must end the work there
            future.cancel()
            raise

    def soon(self, function: Callable, *args) -> None:
        """Call `function` in the wire thread without waiting; any thread, also from a finalizer."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(function, *args)


_wire: Optional[Wire] = None
_wire_lock = threading.Lock()


def wire() -> Wire:
    """The process's wire thread, started by the first call; any thread. A forked child gets its own."""
    global _wire
    with _wire_lock:
        if _wire is None or _wire.pid != os.getpid():
            _wire = Wire()
            _wire.start()
            atexit.register(_leave_all_swarms, _wire)
        return _wire


def _leave_all_swarms(thread: Wire) -> None:
    if thread.pid == os.getpid():
        with contextlib.suppress(Exception):
            thread.call(
                _gather_quietly(*(swarm.leave() for swarm in list(thread.swarms.values()))), timeout=3
            )


async def _gather_quietly(*coroutines) -> list:
    return await asyncio.gather(*coroutines, return_exceptions=True)


_background: set[asyncio.Task] = set()  # asyncio keeps only weak references to tasks


def _spawn(coroutine) -> asyncio.Task:
    """Run a coroutine in the background; its failure is logged, never lost. Wire thread."""

    def finished(task: asyncio.Task) -> None:
        _background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("background task failed", exc_info=task.exception())

    task = asyncio.get_running_loop().create_task(coroutine)
    _background.add(task)
    task.add_done_callback(finished)
    return task


async def _off_loop(size: int, function: Callable, *args):
    """Call a function here, or in a helper thread if its payload is large (bytes)."""
    if size <= OFFLOAD_BYTES:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(wire().helpers, function, *args)


# ======================================================================================================================
# 2  Families: what differs from one model type to the next
# ======================================================================================================================


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block, as numbers and switches. What is None or False is absent."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str = "silu"
    rms_norm: bool = True  # else LayerNorm
    rotary: bool = True
    alibi: Optional[str] = None  # "bloom" or "falcon": the latter rounds to bfloat16, as transformers does
    fused_qkv: bool = (
        False  # the checkpoint has one matrix, per key head: its query heads, the key, the value
    )
    gated: bool = True  # MLP: down(act(gate(x)) * up(x)); else down(act(up(x)))
    parallel: bool = False  # attention and MLP read the same input and are added together
    norm_residual: bool = False  # Bloom's apply_residual_connection_post_layernorm
    window: Optional[int] = None  # sliding attention: a token sees this many tokens, itself included
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class Family:
    """A model type. `names` maps our weights to the checkpoint's, relative to a block; several are laid end to end."""

    title: str  # transformers' class prefix: "Llama" of LlamaForCausalLM
    spec: Callable[[PretrainedConfig, int], BlockSpec]  # config, block index -> spec
    names: dict[str, tuple[str, ...]]
    prefix_rule: Callable[[str], str] = lambda name: name.split("/")[-1]  # repository -> default dht_prefix
    layers: str = "layers"  # the block list's name in the base model and in checkpoints
    aliases: dict[str, str] = field(
        default_factory=lambda: {"h": "layers", "word_embeddings": "embed_tokens", "ln_f": "norm"}
    )


def _llama_spec(config, index: int, **more) -> BlockSpec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return BlockSpec(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        act=config.hidden_act,
        window=window if kinds is None or kinds[index] == "sliding_attention" else None,
        **more,
    )


def _mixtral_spec(config, index: int) -> BlockSpec:
    return _llama_spec(config, index, experts=config.num_local_experts, top_k=config.num_experts_per_tok)


def _bloom_spec(config, index: int) -> BlockSpec:
    return BlockSpec(
        hidden=config.hidden_size,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.hidden_size // config.n_head,
        eps=config.layer_norm_epsilon,
        act="gelu_pytorch_tanh",
        rms_norm=False,
        rotary=False,
        alibi="bloom",
        fused_qkv=True,
        gated=False,
        norm_residual=config.apply_residual_connection_post_layernorm,
    )


def _falcon_spec(config, index: int) -> BlockSpec:
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    else:
        kv_heads = 1 if config.multi_query else config.num_attention_heads
    return BlockSpec(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        eps=config.layer_norm_epsilon,
        act=config.activation,
        rms_norm=False,
        rotary=not config.alibi,
        alibi="falcon" if config.alibi else None,
        fused_qkv=True,
        gated=False,
        parallel=config.new_decoder_architecture or config.parallel_attn,
    )


_ATTENTION_NAMES = {
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
_LLAMA_NAMES = _ATTENTION_NAMES | {"up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}
_MIXTRAL_NAMES = _ATTENTION_NAMES | {
    "router": ("block_sparse_moe.gate",),
    "experts_up": ("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    "experts_down": ("block_sparse_moe.experts.{expert}.w2",),
}
_BLOOM_NAMES = {
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
    "qkv": ("self_attention.query_key_value",),
    "out": ("self_attention.dense",),
    "up": ("mlp.dense_h_to_4h",),
    "down": ("mlp.dense_4h_to_h",),
}
_BLOOM_ALIASES = {"layers": "h"}

# Default directory prefixes are PROTOCOL.md's ("Names"); families that Petals does not have take the last path part.
FAMILIES = {
    "llama": Family(
        "Llama", _llama_spec, _LLAMA_NAMES, lambda n: re.sub("(-hf)?$", "-hf", n.split("/")[-1], count=1)
    ),
    "bloom": Family("Bloom", _bloom_spec, _BLOOM_NAMES, lambda n: n + "-petals", "h", _BLOOM_ALIASES),
    "falcon": Family(
        "Falcon",
        _falcon_spec,
        _BLOOM_NAMES | {"norm1": ("input_layernorm|ln_attn",), "norm2": ("post_attention_layernorm|ln_mlp",)},
        layers="h",
        aliases=_BLOOM_ALIASES,
    ),
    "mixtral": Family("Mixtral", _mixtral_spec, _MIXTRAL_NAMES, lambda n: n),
    "mistral": Family("Mistral", _llama_spec, _LLAMA_NAMES),
    "qwen2": Family("Qwen2", _llama_spec, _LLAMA_NAMES),
    "qwen3": Family("Qwen3", _llama_spec, _LLAMA_NAMES),
}


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model type {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]


def default_prefix(config: PretrainedConfig, model_name: str) -> str:
    """The directory prefix of a hub repository, or of a local directory by its own name (PROTOCOL.md, "Names")."""
    name = Path(model_name).resolve().name if os.path.isdir(model_name) else str(model_name)
    return re.sub(r"[.\s]", "-", family_of(config).prefix_rule(name))


@dataclass
class ClientConfig:
    """What a user may set per model, as keywords of `from_pretrained`; lives on `model.config`. Times in seconds."""

    initial_peers: Sequence[str] = PUBLIC_INITIAL_PEERS
    dht_prefix: Optional[str] = None
    allowed_servers: Optional[Sequence[str]] = None  # peer ids or public names; nobody else is used
    blocked_servers: Optional[Sequence[str]] = None
    use_server_to_server: bool = True  # let servers push their outputs to each other
    show_route: bool | str = (
        "inference"  # log the route of: "inference" sessions, True everything, False nothing
    )
    connect_timeout: float = 5
    request_timeout: float = 3 * 60
    alloc_timeout: float = 60  # how long a server may queue us for room in its cache
    update_period: float = 60  # between readings of the directory
    max_retries: Optional[int] = None  # of one request, before the error reaches the user; None: without end
    min_backoff: float = 1
    max_backoff: float = 60
    ban_timeout: float = 15  # a failing server is left alone this long, doubling while it goes on failing
    max_history_bytes: int = (
        2**30
    )  # of middle activations kept per session; beyond it a repair starts from embeddings
    active_adapter: Optional[str] = None
    pre_seq_len: int = 0
    tuning_mode: Optional[str] = None

    def attach_to(self, config: PretrainedConfig, kwargs: dict) -> PretrainedConfig:
        """Set every field on a transformers config: from `kwargs` (taken out), else from the config, else ours."""
        for entry in dataclasses.fields(self):
            value = getattr(config, entry.name, getattr(self, entry.name))
            setattr(config, entry.name, kwargs.pop(entry.name, value))
        return config


# ======================================================================================================================
# 3  Checkpoints: only the tensors one needs, from only the files that hold them
# ======================================================================================================================


class Checkpoint:
    """A local directory or hub repository of safetensors files, read tensor by tensor. Any thread, one at a time."""

    def __init__(self, name: str, **hub: Any):
        """`hub`: token, revision, cache_dir, as huggingface_hub takes them."""
        self.name, self.hub = str(name), {key: value for key, value in hub.items() if value is not None}
        index = self._fetch("model.safetensors.index.json")
        if index is not None:
            self.files: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]  # tensor -> file
        else:
            single = self._fetch("model.safetensors")
            if single is None:
                raise UserError(
                    f"{self.name!r} has no model.safetensors (nor an index of one): petals_min never loads pickles "
                    "(pytorch_model.bin); choose a repository or revision with safetensors, or convert it"
                )
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def _fetch(self, file: str) -> Optional[str]:
        """The local path of a file, downloaded if need be; None where the repository has no such file."""
        try:
            return transformers.utils.cached_file(
                self.name, file, _raise_exceptions_for_missing_entries=False, **self.hub
            )
        except OSError as error:
            raise UserError(f"cannot read {file} of {self.name!r}: {_first_line(error)}") from error

    @functools.cache  # noqa: B019 - a checkpoint lives as long as its open files are wanted
    def _open(self, file: str):
        from safetensors import safe_open

        path = self._fetch(file)
        if path is None:
            raise UserError(f"{self.name!r} has no file {file}, which its index names")
        return safe_open(path, framework="pt")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor as stored: a view of the mapped file, not a copy, where safetensors can."""
        return self._open(self.files[name]).get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor: what dtype="auto" means where the config does not say."""
        for name in self.files:
            tensor = self._open(self.files[name]).get_slice(name)[:1]
            if tensor.is_floating_point():
                return tensor.dtype
        raise UserError(f"{self.name!r} holds no floating-point tensor")

    def select(self, wanted: Iterable[str], base_prefix: str) -> dict[str, Tensor]:
        """Tensors by their names in a model; the checkpoint's names may have or lack `base_prefix` ("transformer.")."""
        found = {}
        for name in wanted:
            bare = name.removeprefix(base_prefix)
            for candidate in (name, bare, base_prefix + bare):
                if candidate in self.files:
                    found[name] = self.read(candidate)
                    break
        return found


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_config(name: str, kwargs: dict) -> PretrainedConfig:
    """The model's config with the client's fields attached; hub options and fields are taken from `kwargs`."""
    hub = {key: kwargs[key] for key in ("token", "revision", "cache_dir") if kwargs.get(key) is not None}
    config = kwargs.pop("config", None)
    if config is None:
        try:
            config = AutoConfig.from_pretrained(name, **hub)
        except (OSError, ValueError) as error:
            kind = re.search(r"model type `(.+?)`", str(error))
            if kind:
                raise UserError(
                    f"model type {kind[1]!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
                ) from error
            raise UserError(
                f"no model at {name!r}: {_first_line(error)} (expected a directory with config.json, or a hub "
                "repository that this machine reaches)"
            ) from error
    family_of(config)
    ClientConfig().attach_to(config, kwargs)
    if config.dht_prefix is None:
        config.dht_prefix = default_prefix(config, name)
    if re.search(r"[.\s]", config.dht_prefix):
        raise UserError(
            f"dht_prefix {config.dht_prefix!r} must not contain dots or spaces (they separate block names)"
        )
    return config


def num_blocks(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def parse_dtype(dtype: Any) -> Optional[torch.dtype]:
    """A torch dtype from itself or its name; None for None and "auto". ValueError for what is no floating type."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    return found


# ======================================================================================================================
# 4  Wire: tensors, requests and calls, as PROTOCOL.md has them
# ======================================================================================================================

NOTHING = torch.empty(0)  # on the wire an absent tensor is an empty one
NO_IDS = torch.empty(0, dtype=torch.int64)
HANDLER = "TransformerConnectionHandler"  # the name that every Petals peer calls
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


def pack(tensor: Tensor, compression: int = runtime_pb2.NONE) -> runtime_pb2.Tensor:
    """A CPU tensor as hivemind's message. bfloat16 goes as two bytes per value (PROTOCOL.md, RPCs), which hivemind's
    own encoder does only after a global switch; the lossy forms are hivemind's."""
    tensor = tensor.detach()
    if compression != runtime_pb2.NONE and tensor.numel():
        return serialize_torch_tensor(tensor.float(), compression)
    raw = tensor.contiguous()
    raw = raw.view(torch.int16) if raw.dtype == torch.bfloat16 else raw
    return runtime_pb2.Tensor(
        compression=compression,
        buffer=raw.numpy().tobytes(),
        size=tensor.shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        requires_grad=False,
    )


def unpack(message: runtime_pb2.Tensor) -> Tensor:
    """The tensor of a message; ValueError where its bytes do not fit its shape and dtype."""
    if message.compression != runtime_pb2.NONE:
        return deserialize_torch_tensor(message).detach()
    if message.dtype not in _DTYPES:
        raise ValueError(f"a tensor of dtype {message.dtype!r} came; expected one of {', '.join(_DTYPES)}")
    dtype, size, data = _DTYPES[message.dtype], tuple(message.size), message.buffer
    count = math.prod(size)
    if any(n < 0 for n in size):
        raise ValueError(f"a tensor of shape {size} came")
    if count == 0:
        return torch.empty(size, dtype=dtype)
    if dtype == torch.bfloat16 and len(data) == 4 * count:  # plain hivemind sends float32 under this name
        return torch.frombuffer(bytearray(data), dtype=torch.float32).to(dtype).view(size)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {size}, {message.dtype} came with {len(data)} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(size)


def _size(message) -> int:
    return sum(len(tensor.buffer) for tensor in message.tensors)


def pack_request(uid: str, tensors: Sequence[Tensor], metadata: dict) -> ExpertRequest:
    """A request of the given tensors, in order; `args_structure` says that order, as Petals' clients do."""
    metadata = metadata | {"args_structure": (tuple(f"__T{i}".encode() for i in range(len(tensors))), {})}
    return ExpertRequest(uid=uid, tensors=map(pack, tensors), metadata=MSGPackSerializer.dumps(metadata))


def unpack_request(request: ExpertRequest, metadata: dict) -> list[Tensor]:
    """A request's tensors in the order of its `args_structure` (the order they came in, where there is none)."""
    tensors = [unpack(tensor) for tensor in request.tensors]
    structure = metadata.get("args_structure")
    if structure is None:
        return tensors
    try:
        args, kwargs = structure
        return [tensors[int(bytes(mark).removeprefix(b"__T"))] for mark in (*args, *kwargs.values())]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"args_structure {structure!r} does not fit {len(tensors)} tensors") from error


def unpack_metadata(message) -> dict:
    try:
        metadata = MSGPackSerializer.loads(message.metadata) if message.metadata else {}
    except Exception as error:  # msgpack raises many kinds
        raise ValueError(f"metadata is not msgpack: {_first_line(error)}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be a dict, {type(metadata).__name__} came")
    return metadata


def split_message(message) -> Iterable[Any]:
    """Cut a large request or response into a stream's messages: one tensor part each, uid and metadata repeated."""
    head = {"uid": message.uid} if isinstance(message, ExpertRequest) else {}
    for tensor in message.tensors:
        for part in (
            hivemind.utils.streaming.split_for_streaming(tensor, PART_BYTES) if tensor.buffer else [tensor]
        ):
            yield type(message)(tensors=[part], metadata=message.metadata, **head)


async def join_messages(messages: AsyncIterator[Any], limit: int = 2**31) -> Any:
    """The inverse of `split_message`; at most `limit` bytes in all."""
    first, parts, total = None, [], 0
    async for message in messages:
        first = first or message
        total += _size(message)
        if total > limit:
            raise ValueError(f"a stream of more than {limit} bytes came")
        for part in message.tensors:
            if part.dtype or not parts:  # a part that continues has neither dtype nor size
                parts.append([])
            parts[-1].append(part)
    if first is None:
        raise ValueError("an empty stream came; expected a request")
    whole = type(first)()
    whole.CopyFrom(first)
    del whole.tensors[:]
    whole.tensors.extend(map(hivemind.utils.streaming.combine_from_streaming, parts))
    return whole


class Stream:
    """A raw two-way stream to a peer's handler. Unlike hivemind's stub streams it fails at once when the other side
    dies (PROTOCOL.md, "hivemind 1.1.12, as it behaves"). Wire thread."""

    def __init__(self, peer: PeerID, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.peer, self.reader, self.writer = peer, reader, writer

    @classmethod
    async def open(cls, p2p: P2P, peer: PeerID, rpc: str, timeout: float) -> Stream:
        try:
            opening = p2p.call_binary_stream_handler(peer, f"{HANDLER}.{rpc}")
            return cls(peer, *(await asyncio.wait_for(opening, timeout))[1:])
        except Exception as error:
            raise PeerError(f"cannot reach it: {_first_line(error)}", peer) from error

    async def send(self, message) -> None:
        try:
            await P2P.send_protobuf(message, self.writer)
        except (OSError, RuntimeError) as error:
            raise PeerError(f"the connection broke: {_first_line(error)}", self.peer) from error

    async def receive(self, kind: type) -> Any:
        """The next message; PeerError if the peer reports an error or the stream ends."""
        try:
            message, error = await P2P.receive_protobuf(kind, self.reader)
        except Exception as broken:  # end of file, reset, or bytes that are no message
            raise PeerError(f"the connection broke: {_first_line(broken)}", self.peer) from broken
        if error is not None:
            raise PeerError(error.message, self.peer)
        return message

    def close(self) -> None:
        self.writer.close()


async def call(p2p: P2P, peer: PeerID, rpc: str, request, answer: type, timeout: float):
    """One unary call; PeerError however it fails."""
    try:
        return await asyncio.wait_for(
            p2p.call_protobuf_handler(peer, f"{HANDLER}.{rpc}", request, answer), timeout
        )
    except Exception as error:
        text = (
            f"no answer in {timeout:g} s" if isinstance(error, asyncio.TimeoutError) else _first_line(error)
        )
        raise PeerError(text, peer) from error


async def call_large(
    p2p: P2P, peer: PeerID, rpc: str, request: ExpertRequest, timeout: float
) -> ExpertResponse:
    """rpc_forward or rpc_backward, by stream when the request is large."""
    if _size(request) <= STREAM_BYTES:
        return await call(p2p, peer, rpc, request, ExpertResponse, timeout)
    stream = await Stream.open(p2p, peer, f"{rpc}_stream", timeout)

    async def answers() -> AsyncIterator[ExpertResponse]:
        while True:
            try:
                yield await stream.receive(ExpertResponse)
            except PeerError as error:
                if isinstance(error.__cause__, asyncio.IncompleteReadError) and not error.__cause__.partial:
                    return  # the end of a stream is its end of file
                raise

    async def converse() -> ExpertResponse:
        for message in split_message(request):
            await stream.send(message)
        await stream.send(P2P.END_OF_STREAM)
        return await join_messages(answers())

    try:
        return await asyncio.wait_for(converse(), timeout)
    except asyncio.TimeoutError as error:
        raise PeerError(f"no whole answer in {timeout:g} s", peer) from error
    except ValueError as error:
        raise PeerError(str(error), peer) from error
    finally:
        stream.close()


class Swarm:
    """This process's place in one swarm: a libp2p host (hivemind's p2pd, a child process) and a DHT node that runs in
    the wire thread. With a running `hivemind.DHT` given, that one's host and node are used instead."""

    def __init__(self, p2p: P2P, node: Optional[DHTNode] = None, dht: Optional[hivemind.DHT] = None):
        self.p2p, self.node, self.dht = p2p, node, dht
        weakref.finalize(self, Swarm._dropped, node)

    @classmethod
    async def join(cls, initial_peers: Sequence[str], **options: Any) -> Swarm:
        """Start a host and a node. UserError if none of the initial peers (multiaddrs ending in /p2p/ID) answers."""
        for address in initial_peers:
            check_multiaddr(address, "--initial_peers", peer=True)
        try:
            node = await DHTNode.create(
                initial_peers=list(initial_peers), num_workers=32, startup_timeout=30, **options
            )
        except Exception as error:
            raise _explain_join(error, initial_peers, options) from error
        return cls(node.p2p, node)

    @classmethod
    async def borrow(cls, dht: hivemind.DHT) -> Swarm:
        address = await asyncio.wrap_future(
            dht.run_coroutine(hivemind.DHT._get_p2p_daemon_listen_maddr, return_future=True)
        )
        return cls(await P2P.replicate(address), dht=dht)

    @staticmethod
    def of(config: ClientConfig | PretrainedConfig, dht: Any = None) -> Swarm:
        """The client's swarm: of the given hivemind.DHT, else one per process and set of initial peers. Any thread."""
        if isinstance(dht, Swarm):
            return dht
        thread = wire()
        key = ("dht", id(dht)) if dht is not None else ("peers", *config.initial_peers)
        swarm = thread.swarms.get(key)
        if swarm is None:
            start = (
                Swarm.borrow(dht) if dht is not None else Swarm.join(config.initial_peers, client_mode=True)
            )
            swarm = thread.swarms[key] = thread.call(start)
        return swarm

    @property
    def peer_id(self) -> PeerID:
        return self.p2p.peer_id

    async def addresses(self) -> list[str]:
        return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]

    async def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """Values by key: for a key with subkeys a dict of subkey -> (value, expiration), else the value, else None."""
        if self.node is not None:
            found = await self.node.get_many(keys, sufficient_expiration_time=math.inf)
        else:
            futures = [
                asyncio.wrap_future(self.dht.get(key, latest=True, return_future=True)) for key in keys
            ]
            found = dict(zip(keys, await asyncio.gather(*futures), strict=True))
        return {key: entry.value if entry is not None else None for key, entry in found.items()}

    async def store(
        self, keys: Sequence[str], values: Sequence[Any], subkeys: Sequence[str], seconds: float
    ) -> int:
        """Publish for so many seconds; how many keys were taken by at least one peer."""
        done = await self.node.store_many(list(keys), list(values), get_dht_time() + seconds, list(subkeys))
        return sum(map(bool, done.values()))

    async def ping(self, peer: PeerID, timeout: float = 2) -> float:
        """Round trip in seconds by the DHT's own ping; infinity without an answer. A peer behind a relay that runs
        no DHT server refuses the protocol: that is an answer too (PROTOCOL.md, Directory)."""
        start = time.perf_counter()
        try:
            answer = self.p2p.call_protobuf_handler(
                peer, "DHTProtocol.rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse
            )
            await asyncio.wait_for(answer, timeout)
        except Exception as error:
            if "not supported" not in str(error).lower():
                return math.inf
        return time.perf_counter() - start

    async def leave(self) -> None:
        if self.node is not None and self.node.is_alive:
            await self.node.shutdown()

    @staticmethod
    def _dropped(node: Optional[DHTNode]) -> None:
        if node is not None and _wire is not None and _wire.pid == os.getpid():
            _wire.soon(lambda: _spawn(node.shutdown()) if node.is_alive else None)


def check_multiaddr(address: str, flag: str, peer: bool = False) -> None:
    try:
        parsed = Multiaddr(address)
        if peer:
            PeerID.from_base58(parsed["p2p"])
    except Exception as error:
        wanted = "/ip4/HOST/tcp/PORT/p2p/PEER_ID" if peer else "/ip4/0.0.0.0/tcp/31330"
        raise UserError(
            f"{flag}: {address!r} is not a multiaddr like {wanted} ({_first_line(error)})"
        ) from error


def _explain_join(error: Exception, initial_peers: Sequence[str], options: dict) -> PetalsError:
    text = _first_line(error)
    if "bootstrap" in text.lower() or "ping" in text.lower():
        return UserError(
            f"none of the initial peers answers ({', '.join(initial_peers)}): check the addresses, and that the peer "
            "runs and is reachable from here"
        )
    if "address already in use" in text or "failed to listen" in text:
        return UserError(
            f"cannot listen on {', '.join(options.get('host_maddrs', []))}: {text}; choose another --port"
        )
    if "already taken" in text:
        return UserError(f"{text}; stop that peer or give another --identity_path")
    return PetalsError(f"libp2p did not start: {text}")


# ======================================================================================================================
# 5  Directory: who serves what
# ======================================================================================================================

OFFLINE, JOINING, ONLINE = 0, 1, 2


def _number(value: Any, low: float = 0) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < math.inf


def _strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _pings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _number(v) for k, v in value.items())


@dataclass
class ServerInfo:
    """What a server says of itself in the directory (PROTOCOL.md, Directory). Rates are tokens/s for one block."""

    state: int
    throughput: float
    start_block: Optional[int] = None
    end_block: Optional[int] = None
    public_name: Optional[str] = None
    version: Optional[str] = None
    network_rps: Optional[float] = None
    forward_rps: Optional[float] = None
    inference_rps: Optional[float] = None
    adapters: Sequence[str] = ()
    torch_dtype: Optional[str] = None
    quant_type: Optional[str] = None
    using_relay: Optional[bool] = None
    cache_tokens_left: Optional[int] = None  # keys and values counted apart, over all its blocks
    next_pings: Optional[dict[str, float]] = None  # base58 peer id -> round trip in seconds
    features: Sequence[str] = ()  # ours: what of FEATURES it can do
    max_length: Optional[int] = None  # ours: the longest session it takes, in tokens

    _CHECKS = {  # field -> what a value must be
        **dict.fromkeys(
            ("start_block", "end_block", "cache_tokens_left", "max_length"),
            lambda v: type(v) is int and v >= 0,
        ),
        **dict.fromkeys(
            ("public_name", "version", "torch_dtype", "quant_type"), lambda v: isinstance(v, str)
        ),
        **dict.fromkeys(("network_rps", "forward_rps", "inference_rps"), _number),
        **dict.fromkeys(("adapters", "features"), _strings),
        "using_relay": lambda v: isinstance(v, bool),
        "next_pings": _pings,
    }

    def to_record(self) -> tuple[int, float, dict]:
        extra = dataclasses.asdict(self)
        return extra.pop("state"), float(extra.pop("throughput")), extra | {"adapters": tuple(self.adapters)}

    @classmethod
    def from_record(cls, record: Any) -> ServerInfo:
        """ValueError says what is wrong with a record from the directory; unknown keys are ignored."""
        if not isinstance(record, (list, tuple)) or len(record) < 2:
            raise ValueError("not (state, throughput, extra)")
        state, throughput, extra = (*record, {})[:3]
        if type(state) is not int or state not in (OFFLINE, JOINING, ONLINE):
            raise ValueError(f"state {state!r}")
        if not _number(throughput):
            raise ValueError(f"throughput {throughput!r}")
        if not isinstance(extra, dict):
            raise ValueError(f"extra is a {type(extra).__name__}")
        known = {key: extra[key] for key in cls._CHECKS if extra.get(key) is not None}
        for key, value in known.items():
            if not cls._CHECKS[key](value):
                raise ValueError(f"{key} {str(value)[:50]!r}")
        return cls(state, float(throughput), **known)


@dataclass(frozen=True)
class Span:
    """Consecutive blocks start..end-1 on one server."""

    peer: PeerID
    start: int
    end: int
    info: ServerInfo = field(compare=False, hash=False, repr=False)

    def __str__(self) -> str:
        return f"{self.start}:{self.end} via …{str(self.peer)[-6:]}"

    @functools.cached_property
    def name(self) -> str:
        return self.peer.to_base58()

    def cut(self, start: int, end: int) -> Span:
        return Span(self.peer, start, end, self.info)


def block_uids(prefix: str, start: int, end: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(start, end)]


async def announce(swarm: Swarm, prefix: str, blocks: range, info: ServerInfo, seconds: float) -> int:
    """Publish one server's record under each of its blocks; on how many blocks the directory took it."""
    uids = block_uids(prefix, blocks.start, blocks.stop)
    me = swarm.peer_id.to_base58()
    return await swarm.store(uids, [info.to_record()] * len(uids), [me] * len(uids), seconds)


async def read_directory(swarm: Swarm, prefix: str, count: int) -> list[dict[PeerID, ServerInfo]]:
    """For each block the servers that have a record there, of any state. A malformed record costs only itself."""
    uids = block_uids(prefix, 0, count)
    found = await swarm.get(uids)
    table: list[dict[PeerID, ServerInfo]] = []
    for uid in uids:
        servers, entries = {}, found.get(uid)
        for subkey, entry in entries.items() if isinstance(entries, dict) else ():
            try:
                servers[PeerID.from_base58(subkey)] = ServerInfo.from_record(entry.value)
            except Exception as error:
                logger.info("skipping a malformed record of %s by %.60r: %s", uid, subkey, _first_line(error))
        table.append(servers)
    return table


def spans_of(table: list[dict[PeerID, ServerInfo]], state: int = ONLINE) -> list[Span]:
    """Maximal spans of each server in that state, by start."""
    spans, running = [], {}
    for index, servers in enumerate([*table, {}]):
        here = {peer: info for peer, info in servers.items() if info.state == state}
        for peer in [peer for peer in running if peer not in here]:
            start, info = running.pop(peer)
            spans.append(Span(peer, start, index, info))
        for peer, info in here.items():
            running[peer] = (running.get(peer, (index, None))[0], info)
    return sorted(spans, key=lambda span: (span.start, str(span.peer)))


def worst_blocks(table: list[dict[PeerID, ServerInfo]], count: int) -> range:
    """The `count` consecutive blocks that the swarm serves worst: the window whose throughputs, sorted upwards, come
    first (Petals' rule: the weakest block counts most, then the next)."""
    power = [sum(info.throughput for info in servers.values() if info.state != OFFLINE) for servers in table]
    starts = range(len(table) - count + 1)
    start = min(starts, key=lambda s: (sorted(power[s : s + count]), s))
    return range(start, start + count)


# ======================================================================================================================
# 6  Routing: which servers to use
# ======================================================================================================================

DEFAULT_RPS = 300.0  # tokens/s per block where a server does not say (Petals' default_inference_rps)
DEFAULT_PING = 0.05  # seconds of round trip where nobody has measured one
HOP_SECONDS = 0.002  # what one more server costs besides the network: two hand-offs and the (de)serialization
CACHE_PENALTY = 10.0  # seconds added for a server whose cache does not hold the session (Petals' alloc_delay)


class Router:
    """What one client knows of a model's servers: the directory, round trips and bans. Wire thread."""

    def __init__(self, swarm: Swarm, config: PretrainedConfig):
        self.swarm, self.config, self.prefix = swarm, config, config.dht_prefix
        self.spans: list[Span] = []
        self.updated = -math.inf  # time.monotonic() of the last reading
        self.pings: dict[PeerID, float] = {}  # smoothed round trips, seconds
        self.bans: dict[PeerID, tuple[float, int]] = {}  # until when (monotonic), failures in a row
        self.reasons: dict[PeerID, str] = {}  # the last failure of each, for the error message
        self._reading: Optional[asyncio.Task] = None

    async def refresh(self, max_age: float = 0.0) -> None:
        """Read the directory unless it was read within `max_age` seconds; concurrent callers share one reading."""
        if time.monotonic() - self.updated <= max_age:
            return
        if self._reading is None or self._reading.done():
            self._reading = _spawn(self._read())
        await asyncio.shield(self._reading)

    async def _read(self) -> None:
        count = num_blocks(self.config)
        spans = spans_of(await read_directory(self.swarm, self.prefix, count))
        self.spans = [span for span in spans if self._allowed(span)]
        self.updated = time.monotonic()
        unknown = {span.peer for span in self.spans} - self.pings.keys()
        if unknown:
            await asyncio.gather(*(self._measure(peer) for peer in itertools.islice(unknown, 32)))

    async def _measure(self, peer: PeerID) -> None:
        seconds = await self.swarm.ping(peer)
        old = self.pings.get(peer)
        if seconds < math.inf:
            self.pings[peer] = seconds if old is None else 0.8 * old + 0.2 * seconds

    def _allowed(self, span: Span) -> bool:
        names = {str(span.peer), span.info.public_name}
        allowed, blocked = self.config.allowed_servers, self.config.blocked_servers
        adapter = self.config.active_adapter
        return (
            (allowed is None or bool(names & set(allowed)))
            and not (blocked and names & set(blocked))
            and (adapter is None or adapter in span.info.adapters)
        )

    def failed(self, peer: PeerID, reason: str) -> None:
        """Leave this peer alone for a while, twice as long at each failure in a row."""
        streak = self.bans.get(peer, (0.0, 0))[1] + 1
        seconds = self.config.ban_timeout * 2 ** min(streak - 1, 10)
        self.bans[peer] = (time.monotonic() + seconds, streak)
        self.reasons[peer] = reason
        logger.info("peer %s failed (%s): banned for %.0f s", peer, reason, seconds)

    def succeeded(self, peer: PeerID) -> None:
        if self.bans:
            self.bans.pop(peer, None)

    def _usable(self, start: int, end: int, needs: Callable[[Span], bool]) -> list[list[Span]]:
        """For each block start..end-1 the spans that hold it; banned ones only where there is nobody else."""
        now, table = time.monotonic(), [[] for _ in range(start, end)]
        for span in self.spans:
            if needs(span):
                for index in range(max(start, span.start), min(end, span.end)):
                    table[index - start].append(span)
        missing = [start + i for i, spans in enumerate(table) if not spans]
        if missing:
            known = "".join(f"; …{str(p)[-6:]}: {r}" for p, r in list(self.reasons.items())[-3:])
            raise MissingBlocksError(self.prefix, missing, known)
        return [[s for s in spans if self.bans.get(s.peer, (0.0, 0))[0] < now] or spans for spans in table]

    def fastest(
        self, start: int, end: int, tokens: int = 0, needs: Callable[[Span], bool] = lambda s: True
    ) -> list[Span]:
        """The route of least time per token for a session of `tokens` cache tokens: half a round trip for each leg,
        the blocks' compute, a penalty where the cache is short. MissingBlocksError where a block has no server.

        A shortest path, block by block. A leg between two servers costs what the first announced (`next_pings`), else
        the way past us, which splits into a part of each server, so that one minimum serves all pairs of them.
        """
        best: dict[Optional[Span], tuple[float, tuple]] = {
            None: (0.0, ())
        }  # last server -> seconds, ((span, from), …)
        for index, spans in enumerate(self._usable(start, end, needs), start):
            by_name = {span.name: span for span in spans}
            base, base_path = min(
                ((cost + self._half(last), path) for last, (cost, path) in best.items()), key=_first
            )
            reached = {
                span: (base + self._half(span) + self._toll(span, tokens), base_path) for span in spans
            }
            for last, (cost, path) in best.items():
                for name, ping in (last.info.next_pings or {}).items() if last else ():
                    span = by_name.get(name)
                    if span is not None and span is not last:
                        way = (cost + ping / 2 + self._toll(span, tokens), path)
                        reached[span] = min(reached[span], way, key=_first)
            best_now = {span: (cost, (*path, (span, index))) for span, (cost, path) in reached.items()}
            for span in spans:
                if span in best and best[span][0] <= best_now[span][0]:
                    best_now[span] = best[span]  # it holds this block too: no further leg
                rate = span.info.inference_rps or span.info.throughput or DEFAULT_RPS
                best_now[span] = (best_now[span][0] + 1 / rate, best_now[span][1])
            best = best_now
        _, path = min(((cost + self._half(last), path) for last, (cost, path) in best.items()), key=_first)
        ends = [first for _, first in path[1:]] + [end]
        return [span.cut(first, stop) for (span, first), stop in zip(path, ends, strict=True)]

    def _half(self, span: Optional[Span]) -> float:
        return 0.0 if span is None else self.pings.get(span.peer, DEFAULT_PING) / 2

    def _toll(self, span: Span, tokens: int) -> float:
        left = span.info.cache_tokens_left  # keys and values counted apart, over all its blocks
        blocks = (span.info.end_block or span.end) - (span.info.start_block or span.start)
        short = left is not None and left < 2 * tokens * max(1, blocks)
        return HOP_SECONDS + (CACHE_PENALTY if short else 0.0)

    def spread(self, start: int, end: int) -> list[Span]:
        """A route for one forward or backward request: servers drawn with a chance in proportion to throughput."""
        route, table, first = [], self._usable(start, end, lambda span: True), start
        while start < end:
            spans = table[start - first]
            span = random.choices(spans, [max(s.info.throughput, 1e-3) for s in spans])[0]
            route.append(span.cut(start, min(span.end, end)))
            start = route[-1].end
        return route

    async def before_retry(self, attempt: int, error: Exception, what: str) -> None:
        """Wait before attempt number `attempt` >= 1, or raise the error when `max_retries` are spent. The directory is
        read meanwhile, so that a server that comes online is found within a second or two."""
        config = self.config
        if config.max_retries is not None and attempt > config.max_retries:
            raise error
        delay = (
            0.0 if attempt == 1 else min(config.min_backoff * 2 ** min(attempt - 2, 20), config.max_backoff)
        )
        logger.warning("%s: %s; retrying in %.1f s", what, error, delay)
        deadline = time.monotonic() + delay
        while True:
            await self.refresh(max_age=0.5)
            left = deadline - time.monotonic()
            if left <= 0 or (isinstance(error, MissingBlocksError) and self._covers(error.blocks)):
                return
            await asyncio.sleep(min(1.0, left))

    def _covers(self, blocks: Sequence[int]) -> bool:
        return all(any(span.start <= block < span.end for span in self.spans) for block in blocks)


def _first(entry: tuple) -> Any:
    return entry[0]


# ======================================================================================================================
# 7  Sessions: a transformers cache whose layers live on other machines
# ======================================================================================================================

PROBE_SECONDS = 0.2  # silence after which a server at work is asked whether it lives, and again after as long
PUSH_SECONDS = 1.0  # silence after which a push counts as late and the client sends the step itself


@dataclass(eq=False)
class Step:
    """One piece of work for every server of a session."""

    start: int  # the position of its first token
    hidden: Tensor  # [B, T, H], CPU: the input of the session's first block
    prompts: Optional[Tensor] = (
        None  # [blocks of the session, B or 1, P, H]: added to the first P tokens, per block
    )
    hypo_ids: Optional[Tensor] = None  # [B] int64: the cache rows are reordered so before the step
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def end(self) -> int:
        return self.start + self.hidden.shape[1]


class History:
    """What one server was given, enough to rebuild its cache: chunks of inputs, each a tensor [B, T, H] or the future
    of one (the answer of the server before), and between them the reorders of rows. Wire thread."""

    def __init__(self):
        self.log: list[tuple[int, int, Any] | Tensor] = []  # (start, end, tensor or future) | row ids [B]
        self.bytes = 0

    def add(self, step: Step, source: Tensor | asyncio.Future) -> None:
        """Take note of a finished step; what stood at or after its start is forgotten."""
        kept = []
        for entry in self.log:
            if isinstance(entry, Tensor):
                kept.append(entry)
            elif entry[0] < step.start:
                kept.append((entry[0], min(entry[1], step.start), entry[2]))
        self.log = kept if step.start else []
        if step.hypo_ids is not None and step.start:
            self.log.append(step.hypo_ids)
        if step.end > step.start:
            self.log.append((step.start, step.end, source))
            self.bytes += step.hidden.numel() * step.hidden.element_size()

    def forget(self) -> None:
        """Give the memory back; a repair must then begin further up the route."""
        self.log, self.bytes = [], 0

    async def read(self, length: int, timeout: float) -> Optional[Tensor]:
        """The inputs [B, length, H] of the cache's rows as they stand now; None if some are lost or do not come."""
        order, pieces, have = None, [], 0
        for entry in reversed(self.log):
            if isinstance(entry, Tensor):
                order = entry if order is None else entry[order]
                continue
            start, end, source = entry
            if start >= length:
                continue
            if isinstance(source, asyncio.Future):
                await asyncio.wait([source], timeout=timeout)
                if not source.done() or source.cancelled() or source.exception() is not None:
                    return None
                source = source.result()
            rows = source[:, : min(end, length) - start]
            pieces.append(rows if order is None else rows[order])
            have += rows.shape[1]
        return torch.cat(pieces[::-1], dim=1) if have == length else None


class Hop:
    """One server's part of a session: a stream of steps there and answers back, in the same order. Wire thread."""

    def __init__(self, start: int, end: int, span: Optional[Span] = None):
        self.start, self.end, self.span = (
            start,
            end,
            span,
        )  # no span: nobody has been found for these blocks yet
        self.session_id = str(uuid.uuid4())
        self.history = History()
        self.position = 0  # tokens in its cache after the steps that were sent
        self.stream: Optional[Stream] = None
        self.reader: Optional[asyncio.Task] = None
        self.lost = False
        self.waiting: OrderedDict[str, asyncio.Future] = (
            OrderedDict()
        )  # step id -> its answer, in the order of answers
        self.answers: dict[str, asyncio.Future] = {}  # of the step at work and its earlier attempts
        self.uid = ""

    @property
    def alive(self) -> bool:
        return self.reader is not None and not self.lost

    @property
    def ours(self) -> bool:
        """Whether a petals_min server is there; an original Petals server pushes less than it should (PROTOCOL.md)."""
        return self.span is not None and "step_tensors" in self.span.info.features

    async def open(self, router: Router, batch: int, hidden: int, first: dict) -> None:
        """Connect, and send a step of no tokens with the session's terms: when it is answered, room is granted."""
        config = router.config
        self.uid = " ".join(block_uids(router.prefix, self.start, self.end))
        self.stream = await Stream.open(
            router.swarm.p2p, self.span.peer, "rpc_inference", config.connect_timeout
        )
        self.reader = _spawn(self._read())
        step = Step(0, torch.empty(batch, 0, hidden))
        answer = self.expect(step)
        await self.send(step, step.hidden, **first)
        done, _ = await asyncio.wait([answer], timeout=config.alloc_timeout + config.request_timeout)
        if not done:
            self.close()
            raise PeerError("the session was not opened in time", self.span.peer)
        self.answers.clear()
        answer.result()

    def expect(self, step: Step) -> asyncio.Future:
        """The future of this server's answer to a step; the same one at every attempt."""
        if step.id not in self.answers:
            answer = asyncio.get_running_loop().create_future()
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may go unread
            self.answers[step.id] = self.waiting[step.id] = answer
        return self.answers[step.id]

    async def send(
        self, step: Step, hidden: Tensor, prompts: Optional[Tensor] = None, **metadata: Any
    ) -> None:
        """Send a step with its input at this server; a server runs a step that it has seen before only once."""
        metadata = {
            "session_id": self.session_id,
            "step_id": step.id,
            "start_from_position": step.start,
            **metadata,
        }
        ids = NO_IDS if step.hypo_ids is None else step.hypo_ids
        tensors = [hidden, NOTHING if prompts is None else prompts, ids]
        request = await _off_loop(
            hidden.numel() * hidden.element_size(), pack_request, self.uid, tensors, metadata
        )
        await self.stream.send(request)
        self.position = step.end

    async def _read(self) -> None:
        """Hand each answer to the oldest step that waits; when the stream breaks all of them fail."""
        try:
            while True:
                response = await self.stream.receive(ExpertResponse)
                if not self.waiting or not response.tensors:
                    raise PeerError("an answer came that nobody asked for", self.span.peer)
                tensor = await _off_loop(_size(response), unpack, response.tensors[0])
                _, answer = self.waiting.popitem(last=False)
                if not answer.done():
                    answer.set_result(tensor)
        except asyncio.CancelledError:
            self._fail(PeerError("the session was closed", self.span.peer))
        except Exception as error:
            self._fail(
                error if isinstance(error, PeerError) else PeerError(_first_line(error), self.span.peer)
            )
        finally:
            self.stream.close()

    def _fail(self, error: PeerError) -> None:
        self.lost = True
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(error)
        self.waiting.clear()

    def close(self, politely: bool = False) -> None:
        """End the stream; politely: with the empty request by which a session ends (PROTOCOL.md, RPCs)."""
        if not self.alive:
            return
        self.lost = True
        if politely:
            _spawn(self._farewell())
        else:
            self.reader.cancel()

    async def _farewell(self) -> None:
        with contextlib.suppress(PeerError):
            await self.stream.send(ExpertRequest())
            await self.stream.send(P2P.END_OF_STREAM)
        self.reader.cancel()


class InferenceSession(transformers.Cache):
    """The attention caches of one batch of sequences on the servers that hold blocks start..end-1.

    To transformers it is a cache: `get_seq_length`, `crop`, `reorder_cache`. To its user it is Petals' session:
    `step`, `position`, `max_length`, `close`, a context manager. Public methods may be called from any thread, one at
    a time. Nothing is opened before the first step; the batch size is the first step's.

    max_length: tokens per row that the servers reserve room for. left_pad: for each row, how many of the first tokens
    are padding, which no server computes (PROTOCOL.md, "What petals_min adds").
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self, layers: RemoteSequential, max_length: Optional[int] = None, left_pad: Sequence[int] = ()
    ):
        super().__init__(layers=[])
        # fixed when opened
        self.router, self.config = layers.router, layers.config
        self.start, self.end = layers.start, layers.end
        self.max_length, self.left_pad = max_length, list(left_pad)
        self.batch_size_: Optional[int] = None
        # between steps
        self._position = 0
        self._reorder: Optional[Tensor] = None  # rows to take at the next step: composed beam_idx
        self.reordered = (
            False  # since position 0: the rows may then differ from the text that `generate` returned
        )
        self.output_ids: Optional[Tensor] = None  # [B, tokens] of the `generate` calls so far
        self.output_pad: list[int] = []  # of these rows
        self.closed = False
        # owned by the wire thread
        self._lock = asyncio.Lock()
        self._hops: list[Hop] = [Hop(self.start, self.end)]
        self._prompts: list[tuple[int, Tensor]] = []  # (start, deep prompts) of the steps that had some
        self._parts: list[
            tuple[list[int], int, InferenceSession]
        ] = []  # rows, their padding, their own session
        self._tokens: list[contextvars.Token] = []
        self._layers = weakref.ref(layers)
        weakref.finalize(self, InferenceSession._dropped, wire(), self._hops)

    # ---- a transformers cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._position

    def get_max_length(self, layer_idx: Optional[int] = None) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._position + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -n tokens off. A positive n is what this release of transformers makes of it: a new length up
        to 5.17, an error from 5.18 on."""
        count = int(tokens_to_remove)
        if count > 0:
            if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18):
                raise ValueError(f"crop({count}): give a negative number, of tokens to remove")
            count = min(0, count - self._position)
        self.position = max(0, self._position + count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        beam_idx = beam_idx.detach().to("cpu", torch.int64)
        self._reorder = beam_idx if self._reorder is None else self._reorder[beam_idx]
        self.reordered = True

    def reset(self) -> None:
        self.position = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UserError(
            "a session's batch size cannot change while it holds tokens; repeat the inputs instead"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UserError("a session's batch size cannot change while it holds tokens; use reorder_cache")

    def __len__(self) -> int:
        return self.end - self.start

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        route = ", ".join(str(hop.span) for hop in self._hops if hop.span) or "not opened"
        return f"InferenceSession({self._position} of {self.max_length} tokens, blocks {self.start}:{self.end}: {route})"

    # ---- Petals' session

    @property
    def position(self) -> int:
        """Tokens in the caches. Setting a smaller number rewinds: the next step goes on from there."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise UserError(
                f"position {position}: a session of {self._position} tokens can only go back, to 0 or more"
            )
        if position != self._position:
            self._position = position
            if position == 0:
                self._reorder, self.reordered = None, False
            if self.output_ids is not None:
                self.output_ids = self.output_ids[:, :position] if position else None

    def set_left_pad(self, left_pad: Sequence[int]) -> None:
        """Say how many of each row's first tokens are padding: before the first of them is sent."""
        left_pad = list(left_pad) if any(left_pad) else []
        if left_pad != self.left_pad:
            if self._position:
                raise UserError(
                    f"the padding of a session's rows is fixed: {self.left_pad} so far, now {left_pad}"
                )
            wire().call(self._abandon())
            self.left_pad = left_pad

    @property
    def route(self) -> list[Span]:
        """The servers in use, in order; empty before the first step."""
        hops = [hop for _, _, part in self._parts for hop in part._hops] or self._hops
        return [hop.span for hop in hops if hop.span is not None]

    def step(
        self, hidden: Tensor, prompts: Optional[Tensor] = None, hypo_ids: Optional[Tensor] = None
    ) -> Tensor:
        """Run [B, T, H] new tokens (T may be 0) through the blocks; returns [B, T, H] of the same dtype and device.

        prompts: [blocks, B or 1, P, H] added to the first P of these tokens before each block. hypo_ids: [B], the
        cache rows to go on from. UserError on wrong shapes or beyond `max_length`, before anything is sent; PeerError
        or MissingBlocksError when `max_retries` are spent.
        """
        size = self.config.hidden_size
        if hidden.ndim != 3 or hidden.shape[2] != size or not hidden.is_floating_point():
            raise UserError(
                f"expected hidden states [batch, tokens, {size}], {tuple(hidden.shape)} {hidden.dtype} came"
            )
        if self.closed:
            raise UserError(
                "this session is closed; open another with model.inference_session(max_length=...)"
            )
        if self.batch_size_ not in (None, hidden.shape[0]):
            if self._position:
                raise UserError(
                    f"this session has {self.batch_size_} rows, {hidden.shape[0]} came; reset() starts over"
                )
            wire().call(self._abandon())
        if self.max_length is None:
            self.max_length = min(2048, getattr(self.config, "max_position_embeddings", 2048))
        if self._position + hidden.shape[1] > self.max_length:
            raise UserError(
                f"Maximum length exceeded: prefix {self._position} + current {hidden.shape[1]} exceeds pre-allocated "
                f"maximum {self.max_length}"
            )
        if prompts is not None and prompts.shape[2] > hidden.shape[1]:
            raise UserError(f"deep prompts of {prompts.shape[2]} tokens for a step of {hidden.shape[1]}")
        self.batch_size_ = hidden.shape[0]
        order = self._reorder
        if hypo_ids is not None:
            hypo_ids = hypo_ids.detach().to("cpu", torch.int64)
            order = hypo_ids if order is None else order[hypo_ids]
        if order is not None and torch.equal(order, torch.arange(len(order))):
            order = None
        local = hidden.detach().to("cpu")
        prompts = None if prompts is None else prompts.detach().to("cpu", local.dtype)
        output = wire().call(self._step(Step(self._position, local, prompts, order)))
        self._reorder = None
        self._position += hidden.shape[1]
        return output.to(hidden.device, hidden.dtype)

    def close(self) -> None:
        """Free the servers' caches. Any thread; never waits."""
        if not self.closed:
            self.closed = True
            wire().soon(InferenceSession._close_hops, self._hops)
            for _, _, part in self._parts:
                part.close()

    def __enter__(self) -> InferenceSession:
        layers = self._layers()
        if layers is not None:
            self._tokens.append(layers.active_session.set(self))
        return self

    def __exit__(self, *_: Any) -> None:
        layers = self._layers()
        if layers is not None and self._tokens:
            layers.active_session.reset(self._tokens.pop())
        self.close()

    @staticmethod
    def _dropped(thread: Wire, hops: list[Hop]) -> None:
        thread.soon(InferenceSession._close_hops, hops)

    @staticmethod
    def _close_hops(hops: list[Hop]) -> None:
        for hop in reversed(hops):  # the last server first, as Petals does
            hop.close(politely=True)

    # ---- in the wire thread

    async def _step(self, step: Step) -> Tensor:
        async with self._lock:
            if any(self.left_pad) and not self._parts and not self._hops[0].span:
                await self._split_padded(step)
            if self._parts:
                return await self._step_parts(step)
            try:
                pieces = [await self._piece(piece) for piece in self._pieces(step)]
            except (
                BaseException
            ):  # cancelled, or out of retries: what the servers did of this step is unknown
                await self._abandon()
                raise
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _pieces(self, step: Step) -> list[Step]:
        """A step in pieces that one push can carry. Deep prompts stay whole; reorders come with the first piece."""
        B, T, H = step.hidden.shape
        most = max(1, MAX_UNARY_BYTES // max(1, B * H * 4))  # a server may answer float32 to bfloat16
        if T <= most or step.prompts is not None:
            return [step]
        first, *rest = step.hidden.split(most, dim=1)
        starts = range(step.start + most, step.end, most)
        return [Step(step.start, first, None, step.hypo_ids), *map(Step, starts, rest)]

    async def _piece(self, step: Step) -> Tensor:
        """Run one step on all servers, however often it takes."""
        for attempt in itertools.count(1):
            try:
                await self._fill_gaps(step)
                output = await self._run(step, chained=attempt == 1)
                self._commit(step)
                return output
            except (PeerError, MissingBlocksError) as error:
                peer = getattr(error, "peer", None)
                if peer is not None:
                    self.router.failed(peer, str(error))
                    for hop in self._hops:
                        if hop.span is not None and hop.span.peer == peer:
                            hop.close()
                    error = PeerError(f"server …{str(peer)[-6:]}: {error}", peer)
                await self.router.before_retry(attempt, error, f"blocks {self.start}:{self.end}")
        raise AssertionError("unreachable")

    async def _run(self, step: Step, chained: bool) -> Tensor:
        """One attempt. Chained: the first server gets the step, each pushes to the next, we wait for the last one's
        answer. Else we carry it from server to server, past those that have already answered it."""
        hops = self._hops
        if chained and self._chainable(step):
            for hop in hops[1:]:
                if hop.position != step.start:  # a rewind is the client's word alone, never a push's
                    back = Step(step.start, step.hidden[:, :0])
                    hop.expect(back)
                    await hop.send(back, back.hidden)
            answers = [hop.expect(step) for hop in hops]
            chain = [(hop.span.name, hop.session_id, hop.start, hop.end) for hop in hops[1:]]
            await hops[0].send(step, step.hidden, next_servers=chain)
            for hop in hops[1:]:
                hop.position = step.end
            await self._watch(step, hops, answers)
            return self._checked(hops[-1], answers[-1], step)
        answers = [hop.expect(step) for hop in hops]
        value = step.hidden
        for index, (hop, answer) in enumerate(zip(hops, answers, strict=True)):
            if not answer.done():
                prompts = None if step.prompts is None else self._slice_prompts(step.prompts, hop)
                before = {"push_from": hops[index - 1].span.name} if index and hop.ours else {}
                await hop.send(step, value, prompts, **before)
                await self._watch(step, [hop], [answer])
            value = self._checked(hop, answer, step)
        return value

    def _chainable(self, step: Step) -> bool:
        """PROTOCOL.md, "Where Petals does not work": its servers push the first step's prompts and hypo_ids."""
        hops = self._hops
        rewinds = any(hop.position != step.start for hop in hops[1:])
        plain = step.hypo_ids is None and not rewinds
        size = step.hidden.numel() * 4
        return (
            len(hops) > 1
            and self.config.use_server_to_server
            and step.prompts is None
            and (plain or all(hop.ours for hop in hops))
            and size <= MAX_UNARY_BYTES
        )

    def _slice_prompts(self, prompts: Tensor, hop: Hop) -> Tensor:
        return prompts[hop.start - self.start : hop.end - self.start]

    @staticmethod
    def _checked(hop: Hop, answer: asyncio.Future, step: Step) -> Tensor:
        output = answer.result()
        if output.shape != step.hidden.shape or not output.is_floating_point():
            hop.close()
            wanted, came = list(step.hidden.shape), list(output.shape)
            raise PeerError(f"answered {came} {output.dtype} where {wanted} was due", hop.span.peer)
        return output

    async def _watch(self, step: Step, hops: Sequence[Hop], answers: Sequence[asyncio.Future]) -> None:
        """Wait for the last answer; PeerError as soon as a server on the way is known to have failed.

        The rule: a broken stream fails at once. After PROBE_SECONDS of silence the server whose turn it is is asked
        for `rpc_info` by its own handler: an error, or two answers missed in a row, fails it. A slow but honest server
        passes, because its handler answers from the wire thread while its executor computes. A step whose push is late
        is sent again by us.
        """
        began, sent, missed, probe = time.monotonic(), set(), 0, None
        quiet = began
        while not answers[-1].done():
            waiting = {answer for answer in answers if not answer.done()} | ({probe} if probe else set())
            done, _ = await asyncio.wait(waiting, timeout=PROBE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for answer in answers:
                if answer.done() and answer.exception() is not None:
                    raise answer.exception()
            now, turn = time.monotonic(), next((i for i, a in enumerate(answers) if not a.done()), None)
            if turn is None:
                return
            hop = hops[turn]
            if done - {probe}:
                quiet, missed = now, 0
            if probe is not None and probe.done():
                missed = missed + 1 if probe.result() else 0
                if probe.result() is not None and (missed >= 2 or not probe.result().startswith("no answer")):
                    hop.close()
                    raise PeerError(f"it fell silent ({probe.result()})", hop.span.peer)
                probe = None
            elif probe is None and now - quiet >= PROBE_SECONDS:
                probe = _spawn(self._probe(hop.span.peer))
            if turn and turn not in sent and now - quiet >= PUSH_SECONDS:
                sent.add(turn)
                await hop.send(step, self._checked(hops[turn - 1], answers[turn - 1], step))
            if now - began > self.config.request_timeout:
                hop.close()
                raise PeerError(f"no answer in {self.config.request_timeout:g} s", hop.span.peer)

    async def _probe(self, peer: PeerID) -> Optional[str]:
        """What is wrong with a peer's handler; None if it answers."""
        patience = max(1.0, 4 * self.router.pings.get(peer, 0.0))
        try:
            await call(self.router.swarm.p2p, peer, "rpc_info", ExpertUID(uid=""), ExpertInfo, patience)
            return None
        except PeerError as error:
            return str(error)

    def _commit(self, step: Step) -> None:
        """The step is done everywhere: it becomes history. Middle inputs are futures that may still be on their way."""
        source: Any = step.hidden
        for hop in self._hops:
            hop.history.add(step, source)
            source = hop.answers.pop(step.id)
            hop.answers.clear()
            self.router.succeeded(hop.span.peer)
        kept = [(start, prompts) for start, prompts in self._prompts if start < step.start]
        if step.hypo_ids is not None:
            kept = [(start, p if p.shape[1] == 1 else p[:, step.hypo_ids]) for start, p in kept]
        self._prompts[:] = kept + ([(step.start, step.prompts)] if step.prompts is not None else [])
        if sum(hop.history.bytes for hop in self._hops[1:]) > self.config.max_history_bytes:
            for hop in self._hops[1:]:
                hop.history.forget()

    async def _abandon(self) -> None:
        """Give up what is open; the next step opens it anew and replays the history."""
        for hop in self._hops:
            hop.close()
            hop.answers.clear()
        if not self._position:
            self._hops[:] = [Hop(self.start, self.end)]
            self._prompts.clear()
            self._parts.clear()

    async def _fill_gaps(self, step: Step) -> None:
        """Find servers for the blocks that have none, and bring their caches to the step's start."""
        index = 0
        while index < len(self._hops):
            hop = self._hops[index]
            if hop.alive:
                index += 1
                continue
            stop = index + 1
            while stop < len(self._hops) and not self._hops[stop].alive:
                stop += 1
            inputs = None
            if step.start:
                inputs = await hop.history.read(step.start, timeout=5.0)
                if inputs is None:  # the inputs were lost too: begin with the server before
                    if index == 0:
                        raise AssertionError("the first server's inputs are always kept")
                    index -= 1
                    self._hops[index].close()
                    continue
            fresh = await self._open_route(hop.start, self._hops[stop - 1].end, step, inputs)
            self._hops[index:stop] = fresh
            index += len(fresh)

    async def _open_route(self, start: int, end: int, step: Step, inputs: Optional[Tensor]) -> list[Hop]:
        B, _, H = step.hidden.shape
        await self.router.refresh(max_age=self.config.update_period)
        spans = self.router.fastest(start, end, tokens=B * self.max_length, needs=self._fits)
        if self.config.show_route:
            logger.info("route found: %s", " => ".join(map(str, spans)))
        hops = [Hop(span.start, span.end, span) for span in spans]
        terms = {"max_length": self.max_length, "points": 0.0, "active_adapter": self.config.active_adapter}
        try:
            openings = []
            for index, hop in enumerate(hops):
                first = terms | ({"alloc_timeout": self.config.alloc_timeout} if hop.ours else {})
                if any(self.left_pad):
                    first["left_pad"] = self.left_pad
                if hop.ours:
                    first["push_from"] = self._before(hops, index)
                openings.append(hop.open(self.router, B, H, first))
            for result in await asyncio.gather(*openings, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
            if inputs is not None:
                await self._replay(hops, inputs)
        except BaseException:
            for hop in hops:
                hop.close()
            raise
        return hops

    def _before(self, hops: list[Hop], index: int) -> str:
        """The name of the peer that pushes to hops[index]; "" if nobody may."""
        if index:
            return hops[index - 1].span.name
        before = [hop for hop in self._hops if hop.end == hops[0].start and hop.span is not None]
        return before[0].span.name if before else ""

    async def _replay(self, hops: list[Hop], inputs: Tensor) -> None:
        """Rebuild fresh servers' caches from the input history of the first of them, in pieces."""
        prompts = dict(self._prompts)
        cuts = sorted({0, *(start for start in prompts if start < inputs.shape[1])})
        for start, stop in zip(cuts, [*cuts[1:], inputs.shape[1]], strict=True):
            for step in self._pieces(Step(start, inputs[:, start:stop].contiguous(), prompts.get(start))):
                value = step.hidden
                for hop in hops:
                    answer = hop.expect(step)
                    part = None if step.prompts is None else self._slice_prompts(step.prompts, hop)
                    await hop.send(step, value, part)
                    await self._watch(step, [hop], [answer])
                    hop.history.add(dataclasses.replace(step, hypo_ids=None), value)
                    value = self._checked(hop, answer, step)
                    hop.answers.clear()

    def _fits(self, span: Span) -> bool:
        info = span.info
        return (info.max_length is None or info.max_length >= self.max_length) and (
            not any(self.left_pad) or "left_pad" in info.features
        )

    async def _split_padded(self, step: Step) -> None:
        """Where some block has only servers that know no `left_pad` (original Petals), rows of equal padding get an
        unpadded session of their own."""
        await self.router.refresh(max_age=self.config.update_period)
        try:
            self.router.fastest(self.start, self.end, needs=self._fits)
        except MissingBlocksError:
            for pad in sorted(set(self.left_pad)):
                rows = [row for row, its in enumerate(self.left_pad) if its == pad]
                part = InferenceSession(self._layers(), self.max_length - pad)
                self._parts.append((rows, pad, part))

    async def _step_parts(self, step: Step) -> Tensor:
        output, jobs = torch.zeros_like(step.hidden), []
        for rows, pad, part in self._parts:
            skip = max(0, pad - step.start)
            hypo_ids = None
            if step.hypo_ids is not None:
                if not set(step.hypo_ids[rows].tolist()) <= set(rows):
                    raise UserError(
                        "original Petals servers cannot reorder rows of different padding into each other"
                    )
                hypo_ids = torch.tensor([rows.index(i) for i in step.hypo_ids[rows].tolist()])
            part._position = max(0, step.start - pad)
            hidden = step.hidden[rows, skip:]
            prompts = (
                step.prompts if step.prompts is None or step.prompts.shape[1] == 1 else step.prompts[:, rows]
            )
            jobs.append((rows, skip, part._step(Step(part._position, hidden, prompts, hypo_ids))))
        for (rows, skip, _), result in zip(
            jobs, await asyncio.gather(*(job for *_, job in jobs)), strict=True
        ):
            output[rows, skip:] = result.to(output.dtype)
        for rows, pad, part in self._parts:
            part._position = max(0, step.end - pad)
        return output


# ======================================================================================================================
# 8  RemoteSequential: blocks of other machines as a PyTorch module
# ======================================================================================================================

MAX_BATCH_TOKENS = 1024  # tokens in one forward or backward request


class RemoteSequential(nn.Module):
    """Blocks start..end-1 of a model, on the swarm's servers. It has no parameters.

    In a session (`inference_session`) a call runs the session's next step; outside of one it is a differentiable
    forward pass: [B, T, H] -> [B, T, H]. `layers[3:5]` is a RemoteSequential too; iterating gives single blocks.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        dht: Any = None,
        start: int = 0,
        end: Optional[int] = None,
        parent: Optional[RemoteSequential] = None,
    ):
        super().__init__()
        self.config, self.start = config, start
        self.end = num_blocks(config) if end is None else end
        self._dht = dht
        self._parent = [parent]  # in a list, so that it is no submodule
        self._router: Optional[Router] = None
        self._opening = threading.Lock()
        self.active_session: contextvars.ContextVar = (
            contextvars.ContextVar("active_session", default=None)
            if parent is None
            else parent.active_session
        )

    @property
    def router(self) -> Router:
        """Joins the swarm at the first use; any thread."""
        if self._parent[0] is not None:
            return self._parent[0].router
        with self._opening:
            if self._router is None:
                self._router = Router(Swarm.of(self.config, self._dht), self.config)
            return self._router

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, key: int | slice) -> RemoteSequential:
        if isinstance(key, slice):
            first, last, stride = key.indices(len(self))
            if stride != 1 or last <= first:
                raise UserError(
                    f"blocks [{key.start}:{key.stop}:{key.step}]: expected a non-empty run of consecutive blocks"
                )
        else:
            if not -len(self) <= key < len(self):
                raise IndexError(f"block {key} of {len(self)}")
            first = key % len(self)
            last = first + 1
        root = self._parent[0] or self
        return RemoteSequential(self.config, start=self.start + first, end=self.start + last, parent=root)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        return (
            f"{self.config.dht_prefix}, blocks {self.start}:{self.end} of {num_blocks(self.config)}, remote"
        )

    def inference_session(self, max_length: Optional[int] = None, **kwargs: Any) -> InferenceSession:
        """A session over these blocks for at most `max_length` tokens per row."""
        return InferenceSession(self, max_length, **kwargs)

    def forward(
        self, hidden: Tensor, prompts: Optional[Tensor] = None, left_pad: Sequence[int] = ()
    ) -> Tensor:
        """[B, T, H] -> [B, T, H]. prompts: [blocks, B or 1, P, H], added to the first P positions of each block's
        input. left_pad: per row, how many tokens at the left are padding; they come back as zeros."""
        session = self.active_session.get()
        if session is not None and (session.start, session.end) == (self.start, self.end):
            return session.step(hidden, prompts)
        if not any(left_pad):
            return _RemoteForward.apply(self, hidden, prompts)
        output = torch.zeros_like(hidden)
        for pad in sorted(set(left_pad)):  # causal: without its padding a row needs no mask
            rows = [row for row, its in enumerate(left_pad) if its == pad]
            part = prompts if prompts is None or prompts.shape[1] == 1 else prompts[:, rows]
            whole = F.pad(_RemoteForward.apply(self, hidden[rows, pad:], part), (0, 0, pad, 0))
            output = output.index_put((torch.tensor(rows, device=hidden.device),), whole)
        return output


class _RemoteForward(torch.autograd.Function):
    """Blocks of the swarm as one differentiable operation. The batch goes in parts of at most MAX_BATCH_TOKENS tokens,
    all under way at once, each over its own route."""

    @staticmethod
    def forward(ctx, layers: RemoteSequential, hidden: Tensor, prompts: Optional[Tensor]) -> Tensor:
        local = hidden.detach().to("cpu")
        given = None if prompts is None else prompts.detach().to("cpu", local.dtype)
        rows = max(1, MAX_BATCH_TOKENS // max(1, hidden.shape[1]))
        parts = []
        for first in range(0, len(local), rows):
            part = given if given is None or given.shape[1] == 1 else given[:, first : first + rows]
            parts.append((local[first : first + rows], part))
        router = layers.router
        done = wire().call(_all([remote_forward(router, *part, layers.start, layers.end) for part in parts]))
        ctx.layers, ctx.parts, ctx.trails = layers, parts, [trail for _, trail in done]
        ctx.broadcast = prompts is not None and prompts.shape[1] == 1
        return torch.cat([output for output, _ in done]).to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        layers, grads, prompt_grads = ctx.layers, [], []
        local, jobs, first = grad.detach().to("cpu"), [], 0
        for (inputs, prompts), trail in zip(ctx.parts, ctx.trails, strict=True):
            piece = local[first : first + len(inputs)]
            jobs.append(remote_backward(layers.router, trail, piece, prompts, layers.start))
            first += len(inputs)
        for inputs, prompts in wire().call(_all(jobs)):
            grads.append(inputs)
            prompt_grads.append(prompts)
        for_prompts = None
        if ctx.needs_input_grad[2]:  # servers answer a gradient per row, also for prompts that all rows share
            for_prompts = torch.cat(prompt_grads, dim=1).to(grad.device)
            for_prompts = for_prompts.sum(1, keepdim=True) if ctx.broadcast else for_prompts
        return None, torch.cat(grads).to(grad.device, grad.dtype), for_prompts


async def _all(coroutines: Iterable) -> list:
    return await asyncio.gather(*coroutines)


async def remote_forward(
    router: Router, hidden: Tensor, prompts: Optional[Tensor], start: int, end: int
) -> tuple[Tensor, list[tuple[Span, Tensor]]]:
    """Carry [B, T, H] through blocks start..end-1; returns the output and, for each server, its span and input."""
    trail, at, value, attempt = [], start, hidden, 0
    while at < end:
        span = None
        try:
            await router.refresh(max_age=router.config.update_period)
            span = router.spread(at, end)[0]
            part = NOTHING if prompts is None else prompts[at - start : span.end - start]
            output, *_ = await _request(router, span, "rpc_forward", [value, part])
            if output.shape != hidden.shape:
                raise PeerError(
                    f"answered {list(output.shape)} where {list(hidden.shape)} was due", span.peer
                )
            router.succeeded(span.peer)
            trail.append((span, value))
            value, at, attempt = output, span.end, 0
        except (PeerError, MissingBlocksError) as error:
            attempt += 1
            await _next_try(router, span, attempt, error, f"forward of blocks {at}:{end}")
    return value, trail


async def remote_backward(
    router: Router, trail: list[tuple[Span, Tensor]], grad: Tensor, prompts: Optional[Tensor], first: int
) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of the inputs [B, T, H] and of the prompts [blocks, B, P, H]. Where a server of the trail is lost, its
    part is computed forward again elsewhere."""
    trail, attempt, prompt_grads = list(trail), 0, []
    while trail:
        span, value = trail.pop()
        part = None if prompts is None else prompts[span.start - first : span.end - first]
        try:
            tensors = [value, grad, NOTHING if part is None else part]
            answer = await _request(router, span, "rpc_backward", tensors)
            if answer[0].shape != value.shape or (part is not None and len(answer) < 2):
                raise PeerError(f"answered {[list(t.shape) for t in answer]} for gradients", span.peer)
            router.succeeded(span.peer)
            grad, attempt = answer[0], 0
            prompt_grads.extend(answer[1:2])
        except PeerError as error:
            attempt += 1
            await _next_try(router, span, attempt, error, f"backward of {span}")
            _, again = await remote_forward(router, value, part, span.start, span.end)
            trail.extend(again)
    return grad, torch.cat(prompt_grads[::-1]) if prompt_grads else None


async def _next_try(router: Router, span: Optional[Span], attempt: int, error: Exception, what: str) -> None:
    if isinstance(error, PeerError) and span is not None:
        router.failed(span.peer, str(error))
        error = PeerError(f"server …{span.name[-6:]}: {error}", span.peer)
    await router.before_retry(attempt, error, what)


async def _request(router: Router, span: Span, rpc: str, tensors: list[Tensor]) -> list[Tensor]:
    uid = " ".join(block_uids(router.prefix, span.start, span.end))
    metadata = {"points": 0.0, "active_adapter": router.config.active_adapter}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    request = await _off_loop(size, pack_request, uid, tensors, metadata)
    response = await call_large(router.swarm.p2p, span.peer, rpc, request, router.config.request_timeout)
    try:
        answer = await _off_loop(_size(response), lambda: [unpack(tensor) for tensor in response.tensors])
    except ValueError as error:
        raise PeerError(str(error), span.peer) from error
    if not answer:
        raise PeerError("answered no tensor", span.peer)
    return answer


# ======================================================================================================================
# 9  Auto classes: transformers' models whose blocks are remote
# ======================================================================================================================


class _Distributed:
    """What all distributed models share: loading, aliases, sessions. Mixed in before a transformers class."""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load the embeddings, final norm and head of a model; its blocks stay on the swarm.

        dtype (or torch_dtype): "auto" (the checkpoint's), a torch dtype or its name. token, revision, cache_dir: as
        huggingface_hub has them. dht: a running `hivemind.DHT`; else one is joined through `initial_peers`. Every
        field of `ClientConfig` may be given. low_cpu_mem_usage is accepted and always on. UserError (a ValueError)
        for a model that does not exist, is of no supported type, or has no safetensors.
        """
        name = os.fspath(model_name_or_path)
        kwargs.pop("low_cpu_mem_usage", None)
        dtype = kwargs.pop("torch_dtype", None)
        dtype = parse_dtype(kwargs.pop("dtype", dtype))
        config = load_config(name, kwargs)
        hub = {key: kwargs.pop(key, None) for key in ("token", "revision", "cache_dir")}
        checkpoint = Checkpoint(name, **hub)
        with torch.device("meta"):
            wanted = cls(config).state_dict()
        tensors = checkpoint.select(wanted, f"{cls.base_model_prefix}.")
        if not tensors:
            raise UserError(
                f"{name!r} holds none of {cls.__name__}'s own tensors ({', '.join(list(wanted)[:3])}, …)"
            )
        dtype = dtype or parse_dtype(config.dtype) or checkpoint.dtype()
        model = super().from_pretrained(None, *args, config=config, state_dict=tensors, dtype=dtype, **kwargs)
        if getattr(model, "generation_config", None) is not None:
            with contextlib.suppress(OSError):  # many models have no generation_config.json
                model.generation_config = transformers.GenerationConfig.from_pretrained(name, **hub)
        return model

    def __getattr__(self, name: str) -> Any:
        """Petals' names on every family: `transformer` on a head, `h`, `word_embeddings`, … on a base model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "transformer" and isinstance(self, _Head):
                return getattr(self, self.base_model_prefix)
            alias = FAMILIES[self.config.model_type].aliases.get(name) if name != "config" else None
            if alias is not None and not isinstance(self, _Head):
                return super().__getattr__(alias)
            if name == "word_embeddings_layernorm" and not isinstance(self, _Head):
                return nn.Identity()
            raise

    @property
    def remote(self) -> RemoteSequential:
        """The model's remote blocks."""
        base = getattr(self, self.base_model_prefix) if isinstance(self, _Head) else self
        return getattr(base, FAMILIES[self.config.model_type].layers)

    def inference_session(self, max_length: Optional[int] = None, **kwargs: Any) -> InferenceSession:
        """A session for several `generate` or `forward` calls: `with model.inference_session(max_length=512): …`"""
        return self.remote.inference_session(max_length, **kwargs)


def _without_blocks(config: PretrainedConfig) -> PretrainedConfig:
    """A copy from which transformers builds everything but the blocks."""
    config = copy.copy(config)
    config.num_hidden_layers = 0
    return config


class _Base(_Distributed):
    """A base model: embeddings, remote blocks, final norm."""

    def __init__(self, config: PretrainedConfig, *args: Any, dht: Any = None, **kwargs: Any):
        super().__init__(_without_blocks(config), *args, **kwargs)
        self.config = config
        setattr(self, family_of(config).layers, RemoteSequential(config, dht=dht))

    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[InferenceSession] = None,
        inputs_embeds: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **kwargs: Any,
    ):
        """transformers' forward, for all families: ids [B, T] or embeddings [B, T, H] to last hidden state [B, T, H].

        With `past_key_values` (a session), within an active session, or with use_cache=True the step goes through a
        session, which is returned as `past_key_values`; else through a differentiable forward pass.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        if output_attentions or output_hidden_states or kwargs.get("output_router_logits"):
            raise UserError(
                "attentions, router logits and hidden states of remote blocks stay on their servers; supported is the "
                "last hidden state (last_hidden_state of the base model), or layers[:k] for the state after block k"
            )
        if past_key_values is not None and not isinstance(past_key_values, InferenceSession):
            kind = type(past_key_values).__name__
            raise UserError(
                f"past_key_values is a {kind}: expected a session of model.inference_session(), or nothing"
            )
        layers = self.remote
        session = past_key_values if past_key_values is not None else layers.active_session.get()
        if session is None and use_cache:
            session = layers.inference_session()
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.word_embeddings_layernorm(hidden)
        past = 0 if session is None else session.position
        left_pad = _left_pad(attention_mask, *hidden.shape[:2], past)
        _check_positions(position_ids, left_pad, past, hidden.shape[1])
        if session is None:
            hidden = layers(hidden, left_pad=left_pad)
        else:
            if attention_mask is not None or not past:
                session.set_left_pad(left_pad)
            hidden = session.step(hidden)
        hidden = self.ln_f(hidden)
        if return_dict is False:
            return (hidden,) if session is None else (hidden, session)
        output = transformers.modeling_outputs.BaseModelOutputWithPast
        if self.config.model_type == "mixtral":  # its head reads router_logits
            output = transformers.modeling_outputs.MoeModelOutputWithPast
        return output(last_hidden_state=hidden, past_key_values=session)


def _left_pad(mask: Optional[Tensor], batch: int, tokens: int, past: int) -> list[int]:
    """How many tokens each row of a 0/1 mask [B, past + T] has before its first 1. Zeros at the right end need nothing
    (attention is causal); UserError for zeros inside a row and for masks of another shape."""
    if mask is None:
        return []
    if (
        mask.ndim != 2
        or mask.shape[0] != batch
        or mask.shape[1] not in (past + tokens, tokens if not past else -1)
    ):
        raise UserError(
            f"attention_mask is {tuple(mask.shape)}, expected [{batch}, {past + tokens}] of zeros and ones"
        )
    if bool((mask == 1).all()):
        return []
    ones = mask.to("cpu").bool()
    count = ones.sum(1)
    first = ones.int().argmax(1)
    last = ones.shape[1] - 1 - ones.flip(1).int().argmax(1)
    if bool((last - first + 1 != count).any()) or (
        past + tokens == mask.shape[1] and bool((count == 0).any())
    ):
        raise UserError(
            "attention_mask: supported are rows of zeros, then ones, then zeros (left and right padding)"
        )
    return first.tolist()


def _check_positions(position_ids: Optional[Tensor], left_pad: list[int], past: int, tokens: int) -> None:
    if position_ids is None:
        return
    plain = torch.arange(past, past + tokens)
    given = position_ids.to("cpu")
    padded = (plain - torch.tensor(left_pad or [0])[:, None]).clamp(min=0)
    for expected in (plain, padded):
        if given.shape[-1] == tokens and bool((given == expected).all()):
            return
    raise UserError(
        "custom position_ids are not supported: tokens stand one after the other, padding not counted"
    )


class _Head(_Distributed):
    """A head over a base model: language modelling or classification."""

    def __init__(self, config: PretrainedConfig, *args: Any, dht: Any = None, **kwargs: Any):
        super().__init__(_without_blocks(config), *args, **kwargs)
        self.config = config
        setattr(self, self.base_model_prefix, distributed_class(config.model_type, "Model")(config, dht=dht))
        self.post_init()


class _CausalLM(_Head):
    """Text generation: transformers' own `generate`, with a session for its cache."""

    def generate(
        self,
        inputs: Optional[Tensor] = None,
        *args: Any,
        session: Optional[InferenceSession] = None,
        **kwargs: Any,
    ):
        """transformers' `generate` over the swarm. A session given as `session=`, as `past_key_values=`, or active
        (`with model.inference_session(...)`) goes on: its text so far stands before `inputs` (None: nothing new),
        and only what this call adds is returned. Else a session is opened for this call and closed after it."""
        if "input_ids" in kwargs:
            inputs = kwargs.pop("input_ids")
        cache = kwargs.pop("past_key_values", None)
        if cache is not None and not isinstance(cache, InferenceSession):
            raise UserError(
                f"past_key_values is a {type(cache).__name__}: expected a session of model.inference_session()"
            )
        if kwargs.get("cache_implementation") is not None:
            raise UserError("cache_implementation: the cache is on the servers; leave it out")
        if kwargs.get("use_cache") is False:
            return super().generate(inputs, *args, **kwargs)
        given = session if session is not None else self.remote.active_session.get()
        ours = cache is None and given is None
        session = self.inference_session() if ours else (cache if cache is not None else given)
        seen = 0
        if cache is None and given is not None:
            inputs, seen = self._resume(session, inputs, kwargs)
        try:
            result = super().generate(inputs, *args, past_key_values=session, **kwargs)
        finally:
            if ours:
                session.close()
        sequences = result if isinstance(result, Tensor) else result.sequences
        if not ours:
            self._remember(session, inputs, sequences)
        if seen and isinstance(result, Tensor):
            return result[:, seen:]
        if seen:
            result.sequences = sequences[:, seen:]
        return result

    def _resume(
        self, session: InferenceSession, inputs: Optional[Tensor], kwargs: dict
    ) -> tuple[Optional[Tensor], int]:
        """Put the session's text so far before the inputs, and its mask before theirs; returns also its length."""
        past = session.output_ids
        if past is not None and inputs is not None and len(inputs) != len(past):
            session.reset()  # another batch: nothing to go on from
            past = None
        elif past is None and session.position:  # tokens came as embeddings: stand-ins for their ids
            past = torch.zeros(session.batch_size_, session.position, dtype=torch.int64, device=self.device)
            session.output_pad = session.left_pad
        if past is None:
            return inputs, 0
        whole = past if inputs is None else torch.cat([past, inputs.to(past.device)], dim=1)
        mask, given = torch.ones_like(whole), kwargs.get("attention_mask")
        for row, pad in enumerate(session.output_pad):
            mask[row, :pad] = 0
        if given is not None:
            mask[:, -given.shape[1] :] = given
        kwargs["attention_mask"] = mask
        session.position = min(session.position, whole.shape[1] - 1)  # something must be left to compute
        return whole, past.shape[1]

    @staticmethod
    def _remember(session: InferenceSession, inputs: Optional[Tensor], sequences: Tensor) -> None:
        """Keep the text for the next call. After a beam search the caches hold other beams: they start over."""
        rows, items = len(sequences), 1 if inputs is None else len(inputs)
        pads = session.left_pad
        stale = rows != session.batch_size_ or session.reordered
        if pads:
            per_item = len(pads) // items
            pads = [pads[row * items // rows * per_item] for row in range(rows)]
        if stale:
            session.reset()
        session.output_ids, session.output_pad = sequences, pads

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
    ):
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
        )
        session = model_kwargs.get("past_key_values")
        if isinstance(session, InferenceSession) and session.max_length is None:
            lookahead = generation_config.prompt_lookup_num_tokens or 0  # its candidates may pass the end
            session.max_length = max_cache_length + 1 + lookahead


_KINDS = {"Model": _Base, "ForCausalLM": _CausalLM, "ForSequenceClassification": _Head}


@functools.cache
def distributed_class(model_type: str, kind: str) -> type:
    """The distributed class of a model type; kind is "Model", "ForCausalLM" or "ForSequenceClassification"."""
    name = FAMILIES[model_type].title + kind
    base = getattr(transformers, name)
    doc = f"transformers' {name} whose blocks are on the swarm."
    return type(f"Distributed{name}", (_KINDS[kind], base), {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> Any:
    """`petals_min.DistributedLlamaForCausalLM` and its like, made when first asked for."""
    for model_type, family in FAMILIES.items():
        for kind in _KINDS:
            if name == f"Distributed{family.title}{kind}":
                return distributed_class(model_type, kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AutoDistributedConfig:
    @staticmethod
    def from_pretrained(model_name_or_path: str | os.PathLike, **kwargs: Any) -> PretrainedConfig:
        """transformers' config of a supported model with the fields of `ClientConfig` on it."""
        return load_config(os.fspath(model_name_or_path), kwargs)


class _Auto:
    _kind = ""

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Read the config, look its model type up and load that class (see `_Distributed.from_pretrained`)."""
        config = load_config(os.fspath(model_name_or_path), kwargs)
        model_class = distributed_class(config.model_type, cls._kind)
        return model_class.from_pretrained(model_name_or_path, *args, config=config, **kwargs)


class AutoDistributedModel(_Auto):
    _kind = "Model"


class AutoDistributedModelForCausalLM(_Auto):
    _kind = "ForCausalLM"


class AutoDistributedModelForSequenceClassification(_Auto):
    _kind = "ForSequenceClassification"


# ======================================================================================================================
# 10  Blocks: one transformer layer, for all families
# ======================================================================================================================


class Rotary:
    """Rotary embeddings of every variant that transformers knows. Some depend on how long a row is (dynamic NTK,
    LongRoPE): each row gets its own frequencies, as it would have alone. Executor thread."""

    def __init__(self, config: PretrainedConfig, spec: BlockSpec, device: torch.device):
        self.config, self.spec, self.device = config, spec, device
        rope = getattr(config, "rope_parameters", None) or {}
        self.kind, self.theta = rope.get("rope_type", "default"), rope.get("rope_theta", 1e4)
        self.limit = rope.get("original_max_position_embeddings") if self.kind == "longrope" else None
        self.limit = self.limit or getattr(config, "max_position_embeddings", 0)
        self._frequencies = functools.lru_cache(maxsize=64)(self._compute)

    def _compute(self, length: Optional[int]) -> tuple[Tensor, float]:
        """Radians per token [D / 2], and what cos and sin are multiplied by."""
        if self.kind == "default":
            size = self.spec.head_dim
            return self.theta ** -(torch.arange(0, size, 2, device=self.device).float() / size), 1.0
        rule = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[self.kind]
        frequencies, scale = rule(self.config, self.device, seq_len=length)
        return frequencies.float(), scale

    def _of(self, length: int) -> tuple[Tensor, float]:
        """The frequencies for a row of this length: the plain ones up to the variant's limit."""
        stretched = self.kind in ("dynamic", "longrope") and length > self.limit
        return self._frequencies(
            (self.limit + 1 if self.kind == "longrope" else length) if stretched else None
        )

    def __call__(self, positions: Tensor, rows: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple:
        """cos and sin [tokens, D] at `positions` [tokens]; `rows`: (tokens, final length) of each row, in order.
        (None, None) for a family without rotary embeddings."""
        if not self.spec.rotary:
            return None, None
        found = [self._of(length) for _, length in rows]
        frequencies, scale = found[0]
        if any(entry is not found[0] for entry in found):
            counts = torch.tensor([tokens for tokens, _ in rows], device=self.device)
            frequencies = torch.stack([f for f, _ in found]).repeat_interleave(counts, dim=0)
            scale = torch.tensor([s for _, s in found], device=self.device).repeat_interleave(counts)[:, None]
        angles = (positions[:, None] * frequencies).repeat(1, 2)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def alibi_slopes(spec: BlockSpec) -> Tensor:
    """ALiBi's slope of each head (Press et al., 2021, and its authors' rule where the heads are no power of two).
    transformers' Falcon rounds slopes and biases to bfloat16 and divides both by sqrt(D), like the scores."""
    power = 2 ** math.floor(math.log2(spec.heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(spec.heads - power)]
    falcon = spec.alibi == "falcon"
    return torch.tensor(slopes).bfloat16() / math.sqrt(spec.head_dim) if falcon else torch.tensor(slopes)


class Block:
    """One transformer block of any family, driven by its spec. Executor thread.

    `weights` by our names: norm1, norm2, qkv, out, up (gate above up where gated), down, q_norm, k_norm, router,
    experts_up [experts, 2 * I, H], experts_down [experts, H, I]; each ".weight" and perhaps ".bias".
    """

    def __init__(self, spec: BlockSpec, weights: dict[str, Tensor]):
        self.spec, self.weights = spec, weights
        self.act = transformers.activations.ACT2FN[spec.act]
        self.device = weights["norm1.weight"].device
        slopes = alibi_slopes(spec).to(self.device) if spec.alibi else None
        self.attention = {"scale": spec.head_dim**-0.5, "slopes": slopes, "window": spec.window}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _norm(self, name: str, x: Tensor, residual: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm."""
        weight, bias = self.weights[name + ".weight"], self.weights.get(name + ".bias")
        kind = "rms" if self.spec.rms_norm else "layer"
        return norm.add_norm(x, residual, weight, bias, eps=self.spec.eps, kind=kind)

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return norm.silu_mul(gate, up) if self.spec.act == "silu" else self.act(gate) * up

    def _experts(self, x: Tensor) -> Tensor:
        """Mixture of experts: each token goes through its top_k experts, weighted by the router's renormalized odds."""
        chances, chosen = self._linear("router", x).float().softmax(-1).topk(self.spec.top_k, dim=-1)
        chances = (chances / chances.sum(-1, keepdim=True)).to(x.dtype)
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            inner = self._gated(F.linear(x[token], self.weights["experts_up.weight"][expert]))
            result = F.linear(inner, self.weights["experts_down.weight"][expert])
            output = output.index_add(0, token, result * chances[token, place, None])
        return output

    def _mlp(self, x: Tensor) -> Tensor:
        if self.spec.experts:
            return self._experts(x)
        up = self._linear("up", x)
        return self._linear("down", self._gated(up) if self.spec.gated else self.act(up))

    def __call__(self, x: Tensor, attend: Callable[[Block, Tensor], Tensor]) -> Tensor:
        """[tokens, H] -> [tokens, H]. `attend(block, qkv)` turns [tokens, N + 2 * K, D] into [tokens, N, D]: rotary
        embeddings, cache and attention."""
        N, K, D = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        _, normed = self._norm("norm1", x)
        qkv = self._linear("qkv", normed).view(-1, N + 2 * K, D)
        if "q_norm.weight" in self.weights:
            q, k, v = qkv.split([N, K, K], dim=1)
            qkv = torch.cat([self._norm("q_norm", q)[1], self._norm("k_norm", k)[1], v], dim=1)
        attended = self._linear("out", attend(self, qkv).reshape(-1, N * D))
        if self.spec.parallel:
            other = self._norm("norm2", x)[1] if "norm2.weight" in self.weights else normed
            return x + (self._mlp(other) + attended)
        x, after = self._norm("norm2", attended, normed if self.spec.norm_residual else x)
        return (after if self.spec.norm_residual else x) + self._mlp(after)


def load_block(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    index: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Block:
    """Read one block's weights, each straight into its place on the device in the target dtype. UserError where the
    checkpoint lacks a weight or has another shape than the config says."""
    family, weights = family_of(config), {}
    spec = family.spec(config, index)
    layer = f"{family.layers}.{index}."
    marks = (layer, f"model.{layer}", f"transformer.{layer}")
    mark = next((m for m in marks if any(name.startswith(m) for name in checkpoint.files)), None)
    if mark is None:
        raise UserError(f"{checkpoint.name!r} holds no block {index} (no tensor named {layer}…)")
    for ours, kind in itertools.product(family.names, (".weight", ".bias")):
        copies = range(spec.experts) if ours.startswith("experts") else (0,)
        theirs = [
            [mark + other + kind for other in name.replace("{expert}", str(copy_)).split("|")]
            for copy_, name in itertools.product(copies, family.names[ours])
        ]
        names = [next((name for name in some if name in checkpoint.files), None) for some in theirs]
        if None in names:
            if kind == ".weight" and ours not in ("norm2", "q_norm", "k_norm"):  # those that some models lack
                raise UserError(f"{checkpoint.name!r} lacks {theirs[names.index(None)][0]}")
            continue
        shapes = [checkpoint.shape(name) for name in names]
        rows = [shape[0] for shape in shapes]
        whole = torch.empty((sum(rows), *shapes[0][1:]), dtype=dtype, device=device)
        for name, part in zip(names, whole.split(rows), strict=True):
            part.copy_(checkpoint.read(name))
        if (
            ours == "qkv" and spec.fused_qkv
        ):  # per key head its query heads, the key, the value -> all q, all k, all v
            group = whole.view(spec.kv_heads, -1, spec.head_dim, *whole.shape[1:])
            whole = torch.cat(
                [part.flatten(0, 2) for part in (group[:, :-2], group[:, -2:-1], group[:, -1:])]
            )
        weights[ours + kind] = whole.view(len(copies), -1, whole.shape[-1]) if len(copies) > 1 else whole
    came, wanted = (
        weights["qkv.weight"].shape,
        ((spec.heads + 2 * spec.kv_heads) * spec.head_dim, spec.hidden),
    )
    if tuple(came) != wanted:
        raise UserError(
            f"{checkpoint.name!r}, block {index}: q, k, v are {list(came)}, the config says {list(wanted)}"
        )
    return Block(spec, weights)


# ======================================================================================================================
# 11  Paged cache: keys and values of all sessions of a server
# ======================================================================================================================


class PagePool:
    """Pages of PAGE tokens. A page id means the same slot in every block's tensors. Admission is the wire thread's:
    an admitted session owns as many pages as it can ever need, so it never fails for space; the tensors and the tables
    are the executor's. On a CPU untouched pages cost no memory."""

    def __init__(
        self, specs: dict[int, BlockSpec], tokens: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.count = max(1, tokens // PAGE)
        self.k, self.v = (
            {
                index: torch.zeros(self.count, PAGE, spec.kv_heads, spec.head_dim, dtype=dtype, device=device)
                for index, spec in specs.items()
            }
            for _ in range(2)
        )
        self.free = bytearray(b"\1" * self.count)  # per page, 1: free
        self.waiting: deque[tuple[int, asyncio.Future]] = (
            deque()
        )  # pages wanted, in the order they were asked for

    @property
    def tokens_left(self) -> int:
        return self.free.count(1) * PAGE

    async def take(self, rows: int, tokens: int, timeout: float) -> list[list[int]]:
        """Pages for so many rows of so many tokens; waits its turn for at most `timeout` seconds. AllocationFailed with
        the numbers if there will not be room. Rows get runs of consecutive pages where there are such."""
        each = -(-tokens // PAGE)
        need, total = rows * each, self.count * PAGE
        wanted = f"{need * PAGE} cache tokens ({rows} rows of {tokens})"
        if need > self.count:
            raise AllocationFailed(f"the session needs {wanted}, this server has only {total} in all")
        if self.waiting or need > self.free.count(1):
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append((need, turn))
            try:
                await asyncio.wait_for(turn, timeout)
            except asyncio.TimeoutError:
                raise AllocationFailed(
                    f"no room for {wanted} within {timeout:g} s: {self.tokens_left} of {total} are free, "
                    f"{len(self.waiting) - 1} other sessions wait"
                ) from None
            finally:
                self.waiting.remove((need, turn))
                claimed = self._claim(rows, each) if turn.done() and not turn.cancelled() else []
                self._wake()
            return claimed
        return self._claim(rows, each)

    def _claim(self, rows: int, each: int) -> list[list[int]]:
        """Mark pages as taken: best one run for all rows, else one per row, else whatever is free."""
        run, result = self.free.find(b"\1" * (rows * each)), []
        for row in range(rows):
            start = run + row * each if run >= 0 else self.free.find(b"\1" * each)
            scattered = (page for page, free in enumerate(self.free) if free)
            pages = list(range(start, start + each) if start >= 0 else itertools.islice(scattered, each))
            for page in pages:
                self.free[page] = 0
            result.append(pages)
        return result

    def give_back(self, rows: list[list[int]]) -> None:
        for page in itertools.chain.from_iterable(rows):
            self.free[page] = 1
        self._wake()

    def _wake(self) -> None:
        """Let those in that fit, strictly in order: a large session is not starved by small ones."""
        left = self.free.count(1)
        for need, turn in self.waiting:
            left -= need
            if left < 0:
                return
            if not turn.done():
                turn.set_result(None)


class RowTables:
    """Which pages hold which row of one session. Rows may share pages after a reorder; a page that more than one row
    has is copied before one of them writes into it. Executor thread."""

    def __init__(self, pool: PagePool, own: list[list[int]], left_pad: Sequence[int]):
        self.pool, self.own = pool, own
        self.spare = set(itertools.chain.from_iterable(own))
        self.tables: list[list[int]] = [[] for _ in own]
        self.users: dict[int, int] = {}  # page -> rows that have it
        self.pads = list(left_pad) or [0] * len(own)

    def truncate(self, position: int) -> None:
        """Forget all tokens from this position of the session on."""
        for table, pad in zip(self.tables, self.pads, strict=True):
            while len(table) > -(-max(0, position - pad) // PAGE):
                self._drop(table.pop())

    def _drop(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page]:
            del self.users[page]
            self.spare.add(page)

    def reorder(self, ids: Sequence[int]) -> None:
        """Row i becomes what row ids[i] was."""
        old, self.tables = self.tables, [list(self.tables[i]) for i in ids]
        self.pads = [self.pads[i] for i in ids]
        for page in itertools.chain.from_iterable(self.tables):
            self.users[page] += 1
        for page in itertools.chain.from_iterable(old):
            self._drop(page)

    def prepare(self, row: int, start: int, end: int) -> list[int]:
        """The row's table, ready for tokens start..end-1 (its own, without padding) to be written."""
        table, first = self.tables[row], start // PAGE
        if first < len(table) and self.users[table[first]] > 1:
            shared, table[first] = table[first], self._fresh(row, first)
            for tensor in (*self.pool.k.values(), *self.pool.v.values()):
                tensor[table[first]] = tensor[shared]
            self._drop(shared)
        while len(table) * PAGE < end:
            table.append(self._fresh(row, len(table)))
        return table

    def _fresh(self, row: int, place: int) -> int:
        own = self.own[row]
        page = own[place] if place < len(own) and own[place] in self.spare else next(iter(self.spare))
        self.spare.remove(page)
        self.users[page] = 1
        return page


# ======================================================================================================================
# 12  Executor: the thread that owns the model
# ======================================================================================================================

TURN_TOKENS = 256  # tokens of one pass when several sessions wait: a long prompt goes in such pieces
ALONE_TOKENS = 1024  # and when one is alone


@dataclass(eq=False)
class Work:
    """One request for the executor: a session's step (`tables` given), a forward or a backward pass."""

    first: int
    last: int
    hidden: Tensor  # [B, T, H], any floating dtype, CPU
    prompts: Optional[Tensor] = None  # [last - first, B or 1, P, H]
    hypo_ids: Optional[list[int]] = None
    tables: Optional[RowTables] = None
    start: int = 0
    left_pad: Sequence[int] = ()
    grad: Optional[Tensor] = None  # [B, T, H]: of the output, for a backward pass
    # the executor's own
    future: Optional[asyncio.Future] = None
    done: int = 0  # tokens of each row already computed
    outputs: list[Tensor] = field(default_factory=list)  # [B, portion, H] each

    @property
    def left(self) -> int:
        return self.hidden.shape[1] - self.done


class Executor(threading.Thread):
    """Runs whatever waits, in passes. Each pass takes the next tokens of all sessions that have some, lays them end to
    end and runs them through the blocks once; sessions of other spans join and leave on the way. Between passes one
    block of a forward or backward request is computed, so that these go on without holding a token up for long."""

    def __init__(
        self, blocks: dict[int, Block], config: PretrainedConfig, pool: PagePool, dtype: torch.dtype
    ):
        super().__init__(name="petals-executor", daemon=True)
        any_block = next(iter(blocks.values()))
        self.blocks, self.pool, self.dtype, self.device = blocks, pool, dtype, any_block.device
        self.rotary = Rotary(config, any_block.spec, self.device)
        self.hidden_size = config.hidden_size
        self.passes = self.steps = self.rows = (
            0  # for status and tests: passes, finished steps, rows in all passes
        )
        self._inbox: deque[Work] = deque()
        self._news = threading.Condition()
        self._stopping = False

    def submit(self, work: Work) -> asyncio.Future:
        """The future of the work's result, or of what the model raised on it. Wire thread."""
        work.future = asyncio.get_running_loop().create_future()
        with self._news:
            if self._stopping:
                raise PetalsError("the server is shutting down")
            self._inbox.append(work)
            self._news.notify()
        return work.future

    def stop(self) -> None:
        """What still waits fails. Any thread."""
        with self._news:
            self._stopping = True
            self._news.notify()

    # ---- executor thread

    def run(self) -> None:
        steps: list[Work] = []
        slow: deque[tuple[Work, Any]] = deque()  # forward and backward passes under way, as generators
        while True:
            with self._news:
                while not (self._inbox or steps or slow or self._stopping):
                    self._news.wait()
                fresh, self._inbox = list(self._inbox), deque()
            if self._stopping:
                lost = PetalsError("the server is shutting down")
                return self._settle([(work, lost) for work in (*fresh, *steps, *(work for work, _ in slow))])
            steps += [work for work in fresh if work.tables is not None]
            slow += [(work, self._pass_through(work)) for work in fresh if work.tables is None]
            if steps:
                steps = self._turn(steps)
            if slow:
                self._advance(slow)

    def _settle(self, results: list[tuple[Work, Any]]) -> None:
        """Hand results or exceptions to those who wait in the wire thread."""

        def settle() -> None:
            for work, result in results:
                if not work.future.done():
                    failed = isinstance(result, BaseException)
                    (work.future.set_exception if failed else work.future.set_result)(result)

        if results:
            wire().soon(settle)

    def _turn(self, steps: list[Work]) -> list[Work]:
        """One pass; returns the steps that are not finished."""
        try:
            with torch.inference_mode():
                self._run_pass(steps)
        except Exception as error:
            if len(steps) > 1:  # find out whose fault it is: each alone
                return [work for step in steps for work in self._turn([step])]
            logger.warning("a step failed", exc_info=True)
            self._settle([(steps[0], error)])
            return []
        finished = [work for work in steps if not work.left]
        self.steps += len(finished)
        self._settle(
            [(w, w.outputs[0] if len(w.outputs) == 1 else torch.cat(w.outputs, 1)) for w in finished]
        )
        return [work for work in steps if work.left]

    def _portions(self, steps: list[Work]) -> dict[Work, int]:
        """How many tokens of each row every step gets in this pass: small steps all they need, large ones the rest."""
        budget, portions = ALONE_TOKENS if len(steps) == 1 else TURN_TOKENS, {}
        for work in sorted(steps, key=lambda step: step.left * len(step.hidden)):
            least = 1 if work.prompts is None or work.done else work.prompts.shape[2]
            portions[work] = min(work.left, max(least, budget // len(work.hidden)))
            budget -= portions[work] * len(work.hidden)
        return portions

    def _run_pass(self, steps: list[Work]) -> None:
        for work in steps:
            if not work.done:
                work.tables.truncate(work.start)
                if work.hypo_ids is not None:
                    work.tables.reorder(work.hypo_ids)
        parts = [_Part(work, portion, self) for work, portion in self._portions(steps).items()]
        busy = [part for part in parts if part.queries]
        self.passes += bool(busy)
        edges = sorted({edge for part in busy for edge in (part.work.first, part.work.last)})
        for low, high in itertools.pairwise(edges):
            here = [part for part in busy if part.work.first <= low and high <= part.work.last]
            if here:
                self._run_blocks(here, low, high)
        for part in parts:
            part.finish()
            self.rows += len(part.queries)

    def _run_blocks(self, parts: list[_Part], low: int, high: int) -> None:
        """Blocks low..high-1 for the tokens of all these parts at once."""
        tables, queries, lengths, finals = (
            [item for part in parts for item in getattr(part, name)]
            for name in ("tables", "queries", "lengths", "finals")
        )
        plan = attention.plan(tables, queries, lengths, PAGE, self.device)
        places = [torch.arange(length - new, length) for new, length in zip(queries, lengths, strict=True)]
        positions = torch.cat(places).to(self.device)
        cos, sin = self.rotary(positions, list(zip(queries, finals, strict=True)), self.dtype)
        sizes = [len(part.x) for part in parts]
        x = parts[0].x if len(parts) == 1 else torch.cat([part.x for part in parts])
        for index in range(low, high):
            pages = self.pool.k[index], self.pool.v[index]
            for part, before in zip(parts, itertools.accumulate(sizes, initial=0)):  # noqa: B905 - one more sum
                if part.prompted is not None:
                    x = x.index_add(0, part.prompted + before, part.prompts(index))

            def attend(block: Block, qkv: Tensor, pages: tuple = pages) -> Tensor:
                q = attention.rope_append(qkv, cos, sin, *pages, plan)
                return attention.attend(q, *pages, plan, **block.attention)

            x = self.blocks[index](x, attend)
        for part, rows in zip(parts, x.split(sizes), strict=True):
            part.x = rows

    def _advance(self, slow: deque) -> None:
        """One block of the oldest forward or backward request."""
        work, generator = slow[0]
        try:
            with torch.no_grad():
                next(generator)
            return
        except StopIteration as end:
            result = end.value
        except Exception as error:
            logger.warning("a request failed", exc_info=True)
            result = error
        slow.popleft()
        self._settle([(work, result)])

    def without_cache(
        self, rows: int, tokens: int, left_pad: Sequence[int] = ()
    ) -> Callable[[int, Tensor], Tensor]:
        """A function (block index, [B, T, H]) -> [B, T, H] for a batch that is in no session."""
        pads = torch.tensor(list(left_pad) or [0] * rows)
        positions = (torch.arange(tokens) - pads[:, None]).clamp(min=0).flatten().to(self.device)
        cos, sin = self.rotary(positions, [(tokens, tokens - pad) for pad in pads.tolist()], self.dtype)

        def attend(block: Block, qkv: Tensor) -> Tensor:
            N, K = block.spec.heads, block.spec.kv_heads
            qk, v = qkv.split([N + K, K], dim=1)
            qk = qk if cos is None else attention.rotate(qk, cos, sin)
            q, k, v = (t.unflatten(0, (rows, tokens)) for t in (qk[:, :N], qk[:, N:], v))
            return attention.fresh(q, k, v, list(left_pad) or None, **block.attention)

        return lambda index, x: self.blocks[index](x.reshape(rows * tokens, -1), attend).view(x.shape)

    def _pass_through(self, work: Work):
        """A forward pass without cache, a backward pass if the work has a gradient; yields after every block. Returns
        [output], or [gradient of the input] and, with prompts, theirs [blocks, B, P, H]."""
        x, inputs = work.hidden.to(self.device, self.dtype), []
        run = self.without_cache(*x.shape[:2], work.left_pad)
        prompts = None if work.prompts is None else work.prompts.to(x)
        length = 0 if prompts is None else prompts.shape[2]
        for index in range(work.first, work.last):
            if length:
                x = torch.cat([x[:, :length] + prompts[index - work.first], x[:, length:]], dim=1)
            if work.grad is not None:
                inputs.append(x)
            x = run(index, x)
            yield
        if work.grad is None:
            return [x.to("cpu")]
        grad, prompt_grads = work.grad.to(x), []
        for index in reversed(range(work.first, work.last)):
            with torch.enable_grad():
                leaf = inputs.pop().detach().requires_grad_()
                output = run(index, leaf)
            (grad,) = torch.autograd.grad(output, leaf, grad)
            prompt_grads.append(grad[:, :length])
            yield
        return [grad.to("cpu")] + ([torch.stack(prompt_grads[::-1]).to("cpu")] if length else [])


class _Part:
    """What one step contributes to a pass: the next `portion` tokens of its rows, without padding. Executor thread."""

    def __init__(self, work: Work, portion: int, executor: Executor):
        self.work, self.portion, self.executor = work, portion, executor
        low = work.start + work.done  # positions of the session; a row's own are less by its padding
        pads, high, end = work.tables.pads, low + portion, work.start + work.hidden.shape[1]
        rows = [row for row, pad in enumerate(pads) if pad < high and portion]
        starts = [max(low, pads[row]) - pads[row] for row in rows]
        self.lengths = [high - pads[row] for row in rows]  # in the cache after this pass
        self.finals = [end - pads[row] for row in rows]  # and after the whole step
        self.queries = [length - start for start, length in zip(starts, self.lengths, strict=True)]
        spots = zip(rows, starts, self.lengths, strict=True)
        self.tables = [work.tables.prepare(row, start, length) for row, start, length in spots]
        self.real = None  # [B, portion] bool: which tokens are no padding; None: all
        if max(pads) > low:
            self.real = torch.arange(low, high) >= torch.tensor(pads)[:, None]
        hidden = work.hidden[:, work.done : work.done + portion]
        self.x = (hidden.flatten(0, 1) if self.real is None else hidden[self.real]).to(
            executor.device, executor.dtype
        )
        self.prompted: Optional[Tensor] = None  # which of its tokens get deep prompts added
        if work.prompts is not None and not work.done:
            first = (torch.arange(portion) < work.prompts.shape[2]).expand(len(pads), -1)
            first = first.flatten() if self.real is None else first[self.real]
            self.prompted = first.nonzero().flatten().to(executor.device)

    def prompts(self, index: int) -> Tensor:
        """What to add to the tokens at `prompted` before this block."""
        rows = self.work.prompts[index - self.work.first].expand(len(self.work.hidden), -1, -1)
        rows = rows.flatten(0, 1) if self.real is None else rows[self.real[:, : rows.shape[1]]]
        return rows.to(self.executor.device, self.executor.dtype)

    def finish(self) -> None:
        """Give the step its output [B, portion, H], on the CPU, zeros where there was padding."""
        output, (rows, _, size) = self.x.to("cpu"), self.work.hidden.shape
        if self.real is not None:
            packed, output = output, output.new_zeros(rows, self.portion, size)
            output[self.real] = packed
        self.work.outputs.append(output.view(rows, self.portion, size))
        self.work.done += self.portion
# ======================================================================================================================
# 13  Request handler: what a server answers
# ======================================================================================================================

MAX_PUSHES, MAX_PUSH_BYTES = 64, 64 * 2**20  # per session, held until their turn
MAX_SEEN = 1024  # step ids that a session remembers
MAX_REQUEST_TOKENS = 2**16  # of a forward or backward request


class ServerSession:
    """One client's session on this server. Wire thread, but for `tables`."""

    def __init__(
        self, requests: AsyncIterator[ExpertRequest], first: int, last: int, rows: int, metadata: dict
    ):
        # fixed at open
        self.id = str(metadata.get("session_id") or uuid.uuid4())
        self.first, self.last, self.rows = first, last, rows
        self.max_length: int = metadata["max_length"]
        self.deadline = time.monotonic() + SESSION_TIMEOUT
        self.pages: list[list[int]] = []
        self.tables: Optional[RowTables] = None
        # per step
        self.position = 0
        self.push_from: Optional[str] = metadata.get(
            "push_from"
        )  # base58; "": nobody; None: the client names none
        self.seen: OrderedDict[str, None] = OrderedDict()  # ids of the steps that were run
        self.pushes: dict[
            int, tuple[ExpertRequest, dict]
        ] = {}  # start position -> a step pushed by the server before
        self.busy: Optional[asyncio.Future] = None  # the executor's work for this session
        self._requests = requests
        self._reading: Optional[asyncio.Task] = None
        self._bell: Optional[asyncio.Future] = None

    def push(self, request: ExpertRequest, metadata: dict, sender: PeerID) -> None:
        """Hold a pushed step until the session stands where it starts. What does not come from the named peer, was run
        before, or is more than can wait has no effect; a push never rewinds."""
        start, step_id = metadata.get("start_from_position", self.position), metadata.get("step_id")
        held = sum(_size(waiting) for waiting, _ in self.pushes.values())
        if self.push_from is not None and self.push_from != sender.to_base58():
            logger.info(
                "session %s: dropped a push by %s, which its client did not name", self.id[:8], sender
            )
        elif type(start) is not int or step_id in self.seen or start in self.pushes:
            logger.debug("session %s: dropped a push that was here before", self.id[:8])
        elif len(self.pushes) >= MAX_PUSHES or held + _size(request) > MAX_PUSH_BYTES:
            logger.info("session %s: dropped a push, %d are waiting", self.id[:8], len(self.pushes))
        else:
            self.pushes[start] = (request, metadata)
            if self._bell is not None and not self._bell.done():
                self._bell.set_result(None)

    async def next(self) -> Optional[tuple[ExpertRequest, dict]]:
        """The next step to look at, from the client's stream or from a push whose turn it is; None at the end."""
        while True:
            if self._reading is None:
                self._reading = asyncio.ensure_future(anext(self._requests, None))
            if self._reading.done():
                request = self._reading.result()
                self._reading = None
                return (
                    (request, unpack_metadata(request)) if request is not None and request.tensors else None
                )
            if self.position in self.pushes:
                return self.pushes.pop(self.position)
            self._bell = asyncio.get_running_loop().create_future()
            patience = min(STEP_TIMEOUT, self.deadline - time.monotonic())
            await asyncio.wait(
                {self._reading, self._bell}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
            )
            if not self._reading.done() and not self._bell.done():
                raise ValueError(
                    f"the session ended: no step in {STEP_TIMEOUT:g} s, or older than {SESSION_TIMEOUT:g} s"
                )

    def remember(self, step_id: Optional[str]) -> None:
        if step_id is not None:
            self.seen[step_id] = None
            if len(self.seen) > MAX_SEEN:
                self.seen.popitem(last=False)

    def stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()


class TransformerConnectionHandler(ServicerBase):
    """The RPCs of a block server (PROTOCOL.md, RPCs). The class name is part of the wire protocol. Wire thread."""

    def __init__(self, server: Server):
        self.server, self.executor, self.pool = server, server.executor, server.pool
        self.sessions: dict[str, ServerSession] = {}

    # ---- checks: everything a stranger sends passes here

    def _blocks(self, uid: str) -> tuple[int, int]:
        """(first, last + 1) of a request's blocks."""
        uids = uid.split(" ")
        indices = [self.server.uids.get(name) for name in uids]
        if None in indices:
            raise RuntimeError(f"Remote peer does not serve {uids[indices.index(None)]}")
        if indices != list(range(indices[0], indices[0] + len(indices))):
            raise ValueError(f"blocks must follow one another, got {uid!r}")
        return indices[0], indices[-1] + 1

    def _hidden(self, tensor: Tensor, rows: Optional[int] = None) -> Tensor:
        size = self.executor.hidden_size
        if (
            tensor.ndim != 3
            or tensor.shape[2] != size
            or not tensor.is_floating_point()
            or not tensor.shape[0]
        ):
            raise ValueError(
                f"hidden states must be floats [batch, tokens, {size}], got {list(tensor.shape)}, {tensor.dtype}"
            )
        if rows is not None and tensor.shape[0] != rows:
            raise ValueError(f"the session has {rows} rows, hidden states of {tensor.shape[0]} came")
        return tensor

    @staticmethod
    def _prompts(tensor: Tensor, blocks: int, hidden: Tensor) -> Optional[Tensor]:
        if not tensor.numel():
            return None
        B, T, H = hidden.shape
        fits = (
            tensor.ndim == 4
            and tensor.shape[0] == blocks
            and tensor.shape[1] in (1, B)
            and tensor.shape[3] == H
        )
        if not fits or tensor.shape[2] > T or not tensor.is_floating_point():
            raise ValueError(
                f"prompts must be [{blocks}, 1 or {B}, at most {T}, {H}], got {list(tensor.shape)}"
            )
        return tensor

    @staticmethod
    def _points(metadata: dict, rpc: str) -> None:
        points = metadata.get("points")
        if points is not None and (isinstance(points, bool) or not isinstance(points, (int, float))):
            raise ValueError(f"{rpc} should have number of points as number or None, got {points}")
        adapter = metadata.get("active_adapter")
        if adapter:
            raise KeyError(f"adapter {adapter} not found")

    @staticmethod
    def _compressions(metadata: dict, count: int) -> Sequence[int]:
        kinds = metadata.get("output_compression", (runtime_pb2.NONE,) * count)
        known = runtime_pb2.CompressionType.values()
        if (
            not isinstance(kinds, (list, tuple))
            or len(kinds) != count
            or any(kind not in known for kind in kinds)
        ):
            raise ValueError(
                f"output_compression tuple should have {count} element{'s' * (count > 1)}, got {kinds!r}"
            )
        return kinds

    # ---- RPCs

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        blocks = len(self.server.blocks)
        info: dict[str, Any] = {
            "version": __version__,
            "dht_client_mode": False,
            "cache_tokens_available": self.pool.tokens_left * blocks,
            "features": list(self.server.features),
            "executor_passes": self.executor.passes,
            "executor_steps": self.executor.steps,
        }
        if request.uid:
            if request.uid not in self.server.uids:
                raise KeyError(request.uid)
            describe = tensor_descr.BatchTensorDescriptor
            hidden = describe(
                1, 2048, self.executor.hidden_size, dtype=self.server.dtype, compression=runtime_pb2.NONE
            )
            rest = describe(dtype=torch.float32, compression=0), describe(dtype=torch.int64, compression=0)
            info |= {"forward_schema": ((hidden,), {}), "outputs_schema": (hidden,), "keyword_names": ()}
            info["inference_schema"] = ((hidden, *rest), {})
        return ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        return await self._pass_through(request, "rpc_forward", 1)

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        return await self._pass_through(request, "rpc_backward", 2)

    async def rpc_forward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        for part in split_message(await self._pass_through(await join_messages(requests), "rpc_forward", 1)):
            yield part

    async def rpc_backward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        for part in split_message(await self._pass_through(await join_messages(requests), "rpc_backward", 2)):
            yield part

    async def _pass_through(self, request: ExpertRequest, rpc: str, needed: int) -> ExpertResponse:
        first, last = self._blocks(request.uid)
        metadata = unpack_metadata(request)
        self._points(metadata, rpc)
        tensors = await _off_loop(_size(request), unpack_request, request, metadata)
        if len(tensors) < needed:
            raise ValueError(f"{rpc} takes {needed} tensors or more, {len(tensors)} came")
        hidden = self._hidden(tensors[0])
        if hidden.shape[0] * hidden.shape[1] > MAX_REQUEST_TOKENS or not hidden.numel():
            raise ValueError(f"{rpc} takes 1 to {MAX_REQUEST_TOKENS} tokens, {list(hidden.shape)} came")
        grad = self._hidden(tensors[1], hidden.shape[0]) if needed == 2 else None
        if grad is not None and grad.shape != hidden.shape:
            raise ValueError(f"the gradient {list(grad.shape)} does not fit the input {list(hidden.shape)}")
        prompts = self._prompts(tensors[needed] if len(tensors) > needed else NOTHING, last - first, hidden)
        kinds = self._compressions(metadata, 1 if needed == 1 or prompts is None else 2)
        left_pad = self._checked_pads(metadata, len(hidden))
        work = Work(first, last, hidden, prompts, left_pad=left_pad, grad=grad)
        outputs = await self.executor.submit(work)
        size = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        return await _off_loop(size, lambda: ExpertResponse(tensors=map(pack, outputs, kinds)))

    @staticmethod
    def _checked_pads(metadata: dict, rows: int) -> list[int]:
        pads = metadata.get("left_pad") or []
        if pads and (
            not isinstance(pads, (list, tuple))
            or len(pads) != rows
            or any(type(p) is not int or p < 0 for p in pads)
        ):
            raise ValueError(f"left_pad must have one number of tokens per row, {rows} in all, got {pads!r}")
        return list(pads)

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self._blocks(request.uid)
        metadata = unpack_metadata(request)
        session = self.sessions.get(str(metadata.get("session_id")))
        if session is not None:
            session.push(request, metadata | {"pushed": True}, context.remote_id)
        return ExpertResponse()

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        request = await asyncio.wait_for(anext(requests, None), STEP_TIMEOUT)
        if request is None or not request.tensors:
            return
        metadata = unpack_metadata(request)
        session = await self._admit(requests, request, metadata)
        try:
            coming: Optional[tuple[ExpertRequest, dict]] = (request, metadata)
            while coming is not None:
                response = await self._infer(session, *coming)
                if response is not None:
                    yield response
                coming = await session.next()
        finally:
            session.stop_reading()
            if self.sessions.get(session.id) is session:
                del self.sessions[session.id]
            _spawn(self._release(session))

    async def _admit(self, requests: AsyncIterator, request: ExpertRequest, metadata: dict) -> ServerSession:
        """Grant a session its room in the cache, waiting up to the client's `alloc_timeout`; or refuse it."""
        first, last = self._blocks(request.uid)
        self._points(metadata, "rpc_inference")
        length, timeout = metadata.get("max_length"), metadata.get("alloc_timeout", 0.0)
        if type(length) is not int or length < 0:
            raise ValueError(f"rpc_inference metadata must contain int max_length, got {length!r}")
        if length > self.server.max_length:
            raise ValueError(f"Cannot allocate KV cache for {length} tokens, max = {self.server.max_length}")
        if not _number(timeout):
            raise ValueError(f"alloc_timeout must be a number of seconds, got {timeout!r}")
        hidden = self._hidden(unpack_request(request, metadata)[0])
        pads = self._checked_pads(metadata, hidden.shape[0])
        session = ServerSession(requests, first, last, hidden.shape[0], metadata)
        if session.id in self.sessions:
            raise ValueError(f"a session {session.id} is open already")
        session.pages = await self.pool.take(session.rows, length, min(float(timeout), STEP_TIMEOUT))
        session.tables = RowTables(self.pool, session.pages, pads)
        self.sessions[session.id] = session
        return session

    async def _release(self, session: ServerSession) -> None:
        """Give the pages back, once the executor is through with them."""
        if session.busy is not None:
            await asyncio.wait([session.busy])
        self.pool.give_back(session.pages)

    async def _infer(
        self, session: ServerSession, request: ExpertRequest, metadata: dict
    ) -> Optional[ExpertResponse]:
        """Run one step; None if it was run before. It runs only where the session stands, or where its client rewinds
        it to."""
        step_id, pushed = metadata.get("step_id"), bool(metadata.get("pushed"))
        if step_id in session.seen:
            return None
        if not pushed and "push_from" in metadata:
            session.push_from = metadata["push_from"]
        if request.uid and self._blocks(request.uid) != (session.first, session.last):
            raise ValueError(
                f"the session is for blocks {session.first}:{session.last}, a step for {request.uid!r} came"
            )
        tensors = await _off_loop(_size(request), unpack_request, request, metadata)
        hidden, prompts, hypo_ids = (*tensors, NOTHING, NO_IDS)[:3] if len(tensors) < 3 else tensors[:3]
        hidden = self._hidden(hidden, session.rows)
        prompts = self._prompts(prompts, session.last - session.first, hidden)
        order = hypo_ids.long().tolist() if hypo_ids.numel() else None
        if order is not None and (
            len(order) != session.rows or any(not 0 <= i < session.rows for i in order)
        ):
            raise ValueError(f"hypo_ids must be {session.rows} rows of 0..{session.rows - 1}, got {order}")
        kinds = self._compressions(metadata, 1)
        tokens, start = hidden.shape[1], metadata.get("start_from_position", session.position)
        if type(start) is not int or not 0 <= start <= session.position:
            raise ValueError(f"start_from_position {start!r}: the session stands at {session.position}")
        if start + tokens > session.max_length:
            raise ValueError(
                f"Maximum length exceeded: prefix {start} + current {tokens} exceeds pre-allocated maximum "
                f"{session.max_length}"
            )
        work = Work(session.first, session.last, hidden, prompts, order, session.tables, start)
        session.busy = self.executor.submit(work)
        output = await asyncio.shield(session.busy)
        session.position = start + tokens
        session.remember(step_id)
        size = output.numel() * output.element_size()
        response = await _off_loop(size, lambda: ExpertResponse(tensors=[pack(output, kinds[0])]))
        targets = metadata.get("next_servers")
        if targets:
            push = self._push(response.tensors[0], hypo_ids, targets, metadata, request.uid)
            if size > OFFLOAD_BYTES:  # a large output goes on down the chain before it goes to the client
                await push
            else:
                _spawn(push)
        return response

    async def _push(
        self, output: runtime_pb2.Tensor, hypo_ids: Tensor, targets: Any, metadata: dict, uid: str
    ) -> None:
        """Hand a step's output to the next server of its session. Should that fail, the client sends it itself."""
        try:
            (name, session_id, start, end), *rest = targets
            peer = PeerID.from_base58(name)
            count = num_blocks(self.server.config)
            if len(rest) >= count or not 0 <= int(start) < int(end) <= count:
                raise ValueError(f"next_servers {str(targets)[:100]}")
            dropped = ("push_from", "output_compression", "max_length", "alloc_timeout", "left_pad")
            passed = {key: value for key, value in metadata.items() if key not in dropped}
            passed |= {"session_id": session_id, "next_servers": rest, "pushed": True}
            request = pack_request(
                " ".join(block_uids(self.server.prefix, start, end)), [NOTHING, NOTHING, hypo_ids], passed
            )
            request.tensors[0].CopyFrom(output)
            await call(self.server.swarm.p2p, peer, "rpc_push", request, ExpertResponse, 30)
        except Exception as error:
            logger.info("a push to the next server failed: %s", _first_line(error))


# ======================================================================================================================
# 14  Server: a process's offer to the swarm
# ======================================================================================================================

ASSUMED_BITS_PER_SECOND = 100e6  # of the network, for the announced throughput; nobody measures it here


class Server:
    """Hosts blocks of one model. `start` returns when they are online; `stop` takes them off again. Any thread.

    model: directory or repository. initial_peers: multiaddrs of the swarm to join; none for a new one. block_indices:
    (first, last + 1); else num_blocks, taken where the swarm serves worst; else all. max_length: tokens per row that a
    session may ask for. attn_cache_tokens: what the cache holds for each block. throughput: tokens/s to announce, or
    "auto" to measure. UserError for what cannot be.
    """

    def __init__(
        self,
        model: str,
        *,
        initial_peers: Sequence[str] = (),
        block_indices: Optional[tuple[int, int]] = None,
        num_blocks: Optional[int] = None,
        dht_prefix: Optional[str] = None,
        device: str = "auto",
        torch_dtype: Any = "auto",
        attn_cache_tokens: int = 16384,
        inference_max_length: Optional[int] = None,
        throughput: float | str = "auto",
        update_period: float = 120.0,
        public_name: Optional[str] = None,
        features: Sequence[str] = FEATURES,
        hub: Optional[dict] = None,
        **p2p_options: Any,
    ):
        self.model, self.initial_peers, self.p2p_options = str(model), list(initial_peers), p2p_options
        hub = hub or {}
        self.config = load_config(self.model, {"dht_prefix": dht_prefix, **hub} if dht_prefix else dict(hub))
        self.prefix = self.config.dht_prefix
        self.total = self.config.num_hidden_layers
        if block_indices is not None and not 0 <= block_indices[0] < block_indices[1] <= self.total:
            first, last = block_indices
            raise UserError(f"block_indices {first}:{last}: {self.model!r} has blocks 0:{self.total}")
        if num_blocks is not None and not 1 <= num_blocks <= self.total:
            raise UserError(f"num_blocks {num_blocks}: {self.model!r} has {self.total} blocks")
        self.block_indices, self.num_blocks = block_indices, num_blocks
        self.checkpoint = Checkpoint(self.model, **hub)
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.dtype = self._dtype(parse_dtype(torch_dtype))
        spec = family_of(self.config).spec(self.config, 0)
        default_length = 8192 if spec.kv_heads < spec.heads else 2048  # Petals' rule
        self.max_length = inference_max_length or min(default_length, attn_cache_tokens)
        self.attn_cache_tokens, self.update_period = attn_cache_tokens, update_period
        self.given_throughput, self.public_name, self.features = throughput, public_name, tuple(features)
        self.swarm: Optional[Swarm] = None
        self.blocks: dict[int, Block] = {}
        self.uids: dict[str, int] = {}
        self._announcing: Optional[asyncio.Task] = None

    def _dtype(self, asked: Optional[torch.dtype]) -> torch.dtype:
        """The dtype to compute in. A CPU without AVX-512 is slower in 16 bits than in 32 (KERNELS.md, CPU)."""
        stored = parse_dtype(self.config.dtype) or self.checkpoint.dtype()
        slow = self.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
        return asked or (torch.float32 if slow else stored)

    def start(self, progress: Callable[[Iterable], Iterable] = lambda blocks: blocks) -> None:
        self.swarm = wire().call(Swarm.join(self.initial_peers, **self.p2p_options))
        try:
            first, last = self.block_indices or wire().call(self._choose())
            self.span = range(first, last)
            self.info = ServerInfo(JOINING, 0.0, first, last, self.public_name, __version__)
            self.info.torch_dtype, self.info.quant_type = str(self.dtype).removeprefix("torch."), "none"
            self.info.using_relay, self.info.features, self.info.max_length = (
                False,
                self.features,
                self.max_length,
            )
            wire().call(self._announce())
            for index in progress(self.span):
                self.blocks[index] = load_block(self.checkpoint, self.config, index, self.dtype, self.device)
            specs = {index: block.spec for index, block in self.blocks.items()}
            self.pool = PagePool(specs, self.attn_cache_tokens, self.dtype, self.device)
            self.executor = Executor(self.blocks, self.config, self.pool, self.dtype)
            self._measure()
            self.executor.start()
            self.uids = {
                uid: i for uid, i in zip(block_uids(self.prefix, first, last), self.span, strict=True)
            }
            self.info.state = ONLINE
            wire().call(self._go_online())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Announce offline, end what is under way, leave the swarm. May be called twice."""
        swarm, self.swarm = self.swarm, None
        if swarm is not None:
            wire().call(self._go_offline(swarm))

    async def _choose(self) -> tuple[int, int]:
        if self.num_blocks is None:
            return 0, self.total
        chosen = worst_blocks(await read_directory(self.swarm, self.prefix, self.total), self.num_blocks)
        return chosen.start, chosen.stop

    def _measure(self) -> None:
        """Fill in the rates of the directory record, in tokens/s for one block: given, or timed on the first block."""
        if self.given_throughput != "auto":
            self.info.throughput = float(self.given_throughput)
            return
        rates = []
        for tokens in (1, 128):
            x = torch.randn(1, tokens, self.config.hidden_size).to(self.device, self.dtype)
            run = self.executor.without_cache(1, tokens)
            with torch.inference_mode():
                run(self.span.start, x)
                began, count = time.perf_counter(), 0
                while time.perf_counter() - began < 0.1:
                    run(self.span.start, x).sum().item()  # waits for the device
                    count += 1
            rates.append(tokens * count / (time.perf_counter() - began))
        self.info.inference_rps, self.info.forward_rps = rates
        self.info.network_rps = ASSUMED_BITS_PER_SECOND / (16 * self.config.hidden_size)
        average_span = (len(self.span) + 1) / 2  # Petals' rule: what a request uses of a server
        self.info.throughput = min(self.info.forward_rps / average_span, self.info.network_rps)

    async def _announce(self) -> None:
        if self.info.state == ONLINE:
            self.info.cache_tokens_left = 2 * self.pool.tokens_left * len(self.span)
        seconds = max(2 * self.update_period, 3.0)
        taken = await announce(self.swarm, self.prefix, self.span, self.info, seconds)
        if taken < len(self.span):
            logger.warning("the directory took %d of %d records", taken, len(self.span))

    async def _go_online(self) -> None:
        self.handler = TransformerConnectionHandler(self)
        await self.handler.add_p2p_handlers(self.swarm.p2p)
        await self._announce()
        if not self.prefix.startswith("_"):
            repository = None if os.path.isdir(self.model) else f"https://huggingface.co/{self.model}"
            record = {"num_blocks": self.total, "repository": repository}
            await self.swarm.store(
                ["_petals.models"], [record], [self.prefix], max(2 * self.update_period, 3.0)
            )
        self._announcing = _spawn(self._keep_announcing())

    async def _keep_announcing(self) -> None:
        while True:
            await asyncio.sleep(self.update_period)
            try:
                self.info.next_pings = await self._ping_next()
                await self._announce()
            except Exception:
                logger.warning(
                    "announcing failed; the next try is in %g s", self.update_period, exc_info=True
                )

    async def _ping_next(self) -> dict[str, float]:
        """Round trips to servers that could follow this one in a chain."""
        table = await read_directory(self.swarm, self.prefix, self.total)
        after = (
            [p for p, i in table[self.span.stop].items() if i.state == ONLINE]
            if self.span.stop < self.total
            else []
        )
        some = random.sample(after, min(3, len(after)))
        times = await asyncio.gather(*map(self.swarm.ping, some))
        return {
            peer.to_base58(): seconds for peer, seconds in zip(some, times, strict=True) if seconds < math.inf
        }

    async def _go_offline(self, swarm: Swarm) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
        if hasattr(self, "info"):
            self.info.state, self.info.next_pings = OFFLINE, None
            with contextlib.suppress(Exception):
                offline = announce(swarm, self.prefix, self.span, self.info, max(2 * self.update_period, 3.0))
                await asyncio.wait_for(offline, 3)
        if hasattr(self, "executor"):
            self.executor.stop()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(swarm.leave(), 2)


# ======================================================================================================================
# 15  Command line
# ======================================================================================================================

DEMO_PROMPT = "What is the capital of France? Tell me one interesting fact about it."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(**fields: Any) -> None:
    """The line for programs, on stdout."""
    print(json.dumps(fields), flush=True)


def _p2p_options(args: argparse.Namespace) -> dict[str, Any]:
    """hivemind's options from Petals' flags. A port in use is found here, where it can be said clearly."""
    port = args.port or 0
    host = args.host_maddrs or [f"/ip4/0.0.0.0/tcp/{port}"]
    announced = args.announce_maddrs or ([f"/ip4/{args.public_ip}/tcp/{port}"] if args.public_ip else None)
    if args.public_ip and not (args.port or args.announce_maddrs):
        raise UserError("--public_ip needs --port: the port under which others reach this machine")
    for flag, addresses in (("--host_maddrs", host), ("--announce_maddrs", announced or [])):
        for address in addresses:
            check_multiaddr(address, flag)
    for address in host:
        _check_port(Multiaddr(address))
    if args.identity_path and not Path(args.identity_path).resolve().parent.is_dir():
        raise UserError(f"--identity_path {args.identity_path!r}: there is no directory to keep it in")
    return {"host_maddrs": host, "announce_maddrs": announced, "identity_path": args.identity_path}


def _check_port(address: Multiaddr) -> None:
    import socket

    with contextlib.suppress(KeyError, LookupError):
        host, port = address["ip4"], int(address["tcp"])
        if port:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise UserError(
                        f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
                    ) from error


class _Terminated(BaseException):
    """SIGINT or SIGTERM came."""


def _until_signal() -> Callable[[], None]:
    """From now on SIGINT and SIGTERM raise _Terminated in the main thread; returns a function that waits for them."""

    def handle(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # one is enough: let the farewell finish
        raise _Terminated

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)

    def wait() -> None:
        while True:
            time.sleep(3600)

    return wait


def _indices(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise UserError(f"--block_indices {text!r}: expected FIRST:END, such as 0:15 for blocks 0 to 14")
    return int(match[1]), int(match[2])


def run_serve(args: argparse.Namespace) -> None:
    wait = _until_signal()
    if args.new_swarm and args.initial_peers:
        raise UserError("give either --new_swarm or --initial_peers")
    peers = () if args.new_swarm else (args.initial_peers or PUBLIC_INITIAL_PEERS)
    throughput = args.throughput
    if throughput != "auto":
        try:
            throughput = float(throughput)
        except ValueError:
            raise UserError(
                f"--throughput {args.throughput!r}: expected auto or a number of tokens/s"
            ) from None
        if not _number(throughput):
            raise UserError(f"--throughput {args.throughput!r}: expected a finite number, 0 or more")
    server = Server(
        args.model,
        initial_peers=peers,
        block_indices=_indices(args.block_indices) if args.block_indices else None,
        num_blocks=args.num_blocks,
        dht_prefix=args.dht_prefix,
        device=args.device,
        torch_dtype=args.torch_dtype,
        attn_cache_tokens=args.attn_cache_tokens,
        inference_max_length=args.inference_max_length,
        throughput=throughput,
        update_period=args.update_period,
        public_name=args.public_name,
        hub=_hub(args),
        **_p2p_options(args),
    )
    try:
        server.start(_progress)
        addresses = wire().call(server.swarm.addresses())
        _say(
            f"online: blocks {server.span.start}:{server.span.stop} of {server.model} ({server.info.torch_dtype}, "
            f"{server.device}), {server.info.throughput:.0f} tokens/s\na second machine joins with:\n"
            f"    {_command()} serve {args.model} --initial_peers {' '.join(addresses)}"
        )
        _report(
            state="online",
            model=server.model,
            dht_prefix=server.prefix,
            blocks=[server.span.start, server.span.stop],
            peer_id=server.swarm.peer_id.to_base58(),
            initial_peers=addresses,
        )
        wait()
    except _Terminated:
        _say("going offline")
    finally:
        server.stop()


def _command() -> str:
    return f"python {Path(sys.argv[0]).name}" if sys.argv[0].endswith(".py") else "petals-min"


def _progress(blocks: range) -> Iterable[int]:
    from tqdm.auto import tqdm

    return tqdm(blocks, desc=f"loading blocks {blocks.start}:{blocks.stop}", unit="block", file=sys.stderr)


def _hub(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in ("token", "revision", "cache_dir")}


def run_dht(args: argparse.Namespace) -> None:
    wait = _until_signal()
    swarm = wire().call(Swarm.join(args.initial_peers or (), **_p2p_options(args)))
    try:
        addresses = wire().call(swarm.addresses())
        _say("online; others join with:\n    --initial_peers " + " ".join(addresses))
        _report(state="online", peer_id=swarm.peer_id.to_base58(), initial_peers=addresses)
        wait()
    except _Terminated:
        _say("leaving")
    finally:
        wire().call(_gather_quietly(swarm.leave()))


def _load_client(args: argparse.Namespace):
    """The model and its tokenizer, for commands that generate."""
    options = {
        key: getattr(args, key)
        for key in ("dht_prefix", "token", "revision", "cache_dir")
        if getattr(args, key)
    }
    if args.initial_peers:
        options["initial_peers"] = args.initial_peers
        for address in args.initial_peers:
            check_multiaddr(address, "--initial_peers", peer=True)
    model = AutoDistributedModelForCausalLM.from_pretrained(args.model, max_retries=2, **options)
    hub = {key: value for key, value in _hub(args).items() if value is not None}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, **hub)
    except (OSError, ValueError) as error:
        raise UserError(f"{args.model!r} has no tokenizer: {_first_line(error)}") from error
    return model, tokenizer


def _choices(args: argparse.Namespace) -> dict[str, Any]:
    """`generate`'s keywords from the command line's flags."""
    if args.seed is not None:
        torch.manual_seed(args.seed)
    choices: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": not args.greedy}
    if not args.greedy:
        choices |= {"temperature": args.temperature, "top_p": args.top_p}
    return choices


def run_generate(args: argparse.Namespace) -> None:
    model, tokenizer = _load_client(args)
    ids = tokenizer(args.prompt, return_tensors="pt")
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    print(args.prompt, end="", flush=True)
    model.generate(**ids, streamer=streamer, **_choices(args))


def run_chat(args: argparse.Namespace) -> None:
    model, tokenizer = _load_client(args)
    if tokenizer.chat_template is None:
        raise UserError(f"{args.model!r} has no chat template; use `generate`")
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    _say("type a message; an empty line or Ctrl-D ends the chat")
    with model.inference_session(max_length=args.max_length) as session:
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if not text:
                return
            messages.append({"role": "user", "content": text})
            whole = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            new = _unseen(whole["input_ids"], session)
            answer = model.generate(
                new, attention_mask=torch.ones_like(new), streamer=streamer, **_choices(args)
            )
            said = tokenizer.decode(answer[0, new.shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})


def _unseen(ids: Tensor, session: InferenceSession) -> Tensor:
    """What of a conversation [1, tokens] the session has not seen; it goes back to where they part."""
    seen = session.output_ids
    if seen is None:
        return ids
    length = min(seen.shape[1], ids.shape[1] - 1)
    same = int((seen[0, :length] == ids[0, :length]).long().cumprod(0).sum())
    session.position = min(session.position, same)
    session.output_ids = ids[:, :same] if same else None
    return ids[:, same:]


def run_status(args: argparse.Namespace) -> None:
    config = load_config(
        args.model, _hub(args) | ({"dht_prefix": args.dht_prefix} if args.dht_prefix else {})
    )
    count = config.num_hidden_layers
    peers = args.initial_peers or PUBLIC_INITIAL_PEERS
    swarm = wire().call(Swarm.join(peers, client_mode=True))
    table = wire().call(read_directory(swarm, config.dht_prefix, count))
    spans = [(state, span) for state in (ONLINE, JOINING, OFFLINE) for span in spans_of(table, state)]
    holes = [i for i, servers in enumerate(table) if all(info.state != ONLINE for info in servers.values())]
    names = {ONLINE: "online", JOINING: "joining", OFFLINE: "offline"}
    if args.json:
        servers = []
        for state, span in spans:
            info = dataclasses.asdict(span.info) | {"state": names[state]}
            servers.append({"peer_id": span.name, "blocks": [span.start, span.end], **info})
        _report(
            model=args.model, dht_prefix=config.dht_prefix, num_blocks=count, holes=holes, servers=servers
        )
        return
    print(f"{config.dht_prefix}: {count} blocks, {sum(state == ONLINE for state, _ in spans)} servers online")
    for state, span in spans:
        bar = "".join("#" if span.start <= i < span.end else "." for i in range(count))
        rate, name = f"{span.info.throughput:.0f} tokens/s", span.info.public_name or ""
        print(
            f"  …{span.name[-6:]}  {span.start:>3}:{span.end:<3}  {bar}  {names[state]:<7} {rate} {name}".rstrip()
        )
    print(f"holes: {', '.join(map(str, holes))}" if holes else "holes: none")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="petals-min", description="Run large language models BitTorrent-style."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable, text: str, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        if model:
            sub.add_argument("model", help="a directory, or a repository on the hub")
            sub.add_argument(
                "--dht_prefix", help="the model's name in the directory (default: from its name)"
            )
            for flag in ("--token", "--revision", "--cache_dir"):
                sub.add_argument(flag, help="as for huggingface_hub")
        return sub

    def network(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--initial_peers", nargs="*", default=[], metavar="MULTIADDR", help="peers to join through"
        )
        sub.add_argument("--host_maddrs", nargs="*", metavar="MULTIADDR", help="addresses to listen on")
        sub.add_argument("--announce_maddrs", nargs="*", metavar="MULTIADDR", help="addresses to tell others")
        sub.add_argument("--port", type=int, help="listen on this TCP port on all interfaces")
        sub.add_argument("--public_ip", help="the address under which others reach --port")
        sub.add_argument("--identity_path", help="file of the peer's key, made if missing: keeps the peer id")

    serve = command("serve", run_serve, "host blocks of a model")
    network(serve)
    serve.add_argument("--new_swarm", action="store_true", help="start a swarm instead of joining one")
    serve.add_argument("--block_indices", metavar="FIRST:END", help="which blocks, such as 0:15 for 0 to 14")
    serve.add_argument("--num_blocks", type=int, help="how many blocks; they go where the swarm serves worst")
    serve.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …")
    serve.add_argument("--torch_dtype", default="auto", help="auto, float32, float16 or bfloat16")
    serve.add_argument(
        "--attn_cache_tokens", type=int, default=16384, help="tokens that the cache holds per block"
    )
    serve.add_argument("--inference_max_length", type=int, help="longest session, in tokens")
    serve.add_argument("--throughput", default="auto", help="tokens/s to announce; auto measures")
    serve.add_argument("--update_period", type=float, default=120.0, help="seconds between announcements")
    serve.add_argument("--public_name", help="a name to show to others")
    network(command("dht", run_dht, "start a bootstrap peer of a swarm", model=False))

    def generation(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--initial_peers", nargs="*", default=[], metavar="MULTIADDR", help="peers to join through"
        )
        sub.add_argument("--max_new_tokens", type=int, default=128)
        sub.add_argument("--temperature", type=float, default=0.7)
        sub.add_argument("--top_p", type=float, default=0.9)
        sub.add_argument("--seed", type=int)
        sub.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")

    generate = command("generate", run_generate, "continue a text")
    generation(generate)
    generate.add_argument("--prompt", required=True)
    chat = command("chat", run_chat, "talk to a chat model")
    generation(chat)
    chat.add_argument("--max_length", type=int, default=2048, help="tokens of the whole conversation")
    status = command("status", run_status, "show who serves which blocks")
    status.add_argument(
        "--initial_peers", nargs="*", default=[], metavar="MULTIADDR", help="peers to join through"
    )
    status.add_argument("--json", action="store_true", help="one line for programs")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line that says what was wrong and what to do."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    try:
        args.function(args)
    except PetalsError as error:
        _say(f"petals-min: {error}")
        return 2
    except (KeyboardInterrupt, _Terminated):
        return 0 if args.command in ("serve", "dht", "demo") else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
