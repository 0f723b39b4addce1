"""What petals_min costs, measured: one command a question. Each prints the ceiling first, where there is one,
then what was measured, and ends with one line of JSON.

    python bench.py [--plot FILE.png]          a short form of what compares; the README's table
Beside transformers alone, on the same cores and from the same checkpoint, in turn in one run:
    python bench.py overhead                   a token's time where the model is nothing, by stages
    python bench.py decode                     one client's text
    python bench.py clients                    four clients at once; 1 to 16 that only step
    python bench.py prefill                    a text beside another client's long prompt
    python bench.py forward                    a forward pass of a batch
    python bench.py startup                    seconds, processes and memory of a server
    python bench.py wan                        a token, a prompt, a forward pass over slow links
    python bench.py scale                      with the context, the sessions, the swarm
    python bench.py speculate                  prompt lookup over a slow link
Others:
    python bench.py chaos [--generations 100]  what one notices of servers that crash, freeze or are cut off
    python bench.py soak [--minutes 30]        whether anything goes wrong, hangs, grows or leaks under faults
    python bench.py chain [--tokens 60]        a token over three servers, 50 ms from the client, 1 ms apart
    python bench.py kernels                    how near the kernels come to what the chip can do
    python bench.py quality [--model PATH]     what smaller weights cost in perplexity
    python bench.py decode --weights           what smaller weights bring in speed, one row on this CPU
    python bench.py backward [--repeats 5]     one forward and backward pass beside transformers alone
    python bench.py train [--steps 40]         what soft prompts learn through two servers, and a step's time

Servers run one thread each, but for those of `quality`, `decode --weights` and `train`. Models are made here
with a fixed seed: "tiny" (8 layers of 64) and "mid" (16 of 1,024, 254M weights), float32. Slow links and cuts
need root, network namespaces and /dev/net/tun (see the tests).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import pydoc_data.topics
import random
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import petals_min as pm
from kernels import attention, matmul, norm, rotary
from test_petals_min import (
    CHAOS_SPANS,
    MODES,
    QUIET,
    SEEDS,
    SMALLER,
    STALL,
    Clock,
    Faults,
    Process,
    available,
    disturbed,
    draft_model,
    make_model,
    prompt,
    save,
    steps_of,
    undisturbed,
    until,
)

pm.logger.setLevel(os.environ.get("LOG", "ERROR"))


def report(**figures) -> None:
    print(json.dumps(figures), flush=True)


# ============================================================================================================
# Shared by the commands that compare with transformers alone: models, servers, turns, rows of the table
# ============================================================================================================

MODELS = {
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=8,
                 num_attention_heads=4, num_key_value_heads=2),
    "mid": dict(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16,
                num_attention_heads=16, num_key_value_heads=8),
}  # fmt: skip
NO_END = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)  # a text ends by its length alone


class Unavailable(Exception):
    """What a command needs is not on this machine."""


@functools.cache
def workplace() -> Path:
    """This run's folder for models and logs."""
    folder = tempfile.TemporaryDirectory(prefix="petals-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def alone(name: str) -> transformers.PreTrainedModel:
    """transformers alone: a Llama of random float32 weights, of a fixed seed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=16384, **MODELS[name], **NO_END)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@functools.cache
def checkpoint(name: str) -> Path:
    return save(alone(name), workplace() / name)


def ids_of(name: str, *shape: int) -> torch.Tensor:
    return torch.randint(1, MODELS[name]["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def threads_of(pid: int) -> str:
    """How many threads a process computes with, and how many it has in all."""
    setting = re.search(rb"OMP_NUM_THREADS=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
    return f"computes with {int(setting[1])} thread, has {len(os.listdir(f'/proc/{pid}/task'))}"


@contextlib.contextmanager
def servers(model: str | Path, count: int, *options: object, slow: bool = False, **link) -> Iterator[Faults]:
    """`count` server processes of one thread each that halve (third, …) the blocks of "tiny", "mid" or a
    checkpoint, on loopback or behind slow links; says what runs."""
    if slow and available() is not None:
        raise Unavailable(available())
    path = checkpoint(model) if model in MODELS else Path(model)
    blocks = AutoConfig.from_pretrained(path).num_hidden_layers
    spans = [f"{blocks * i // count}:{blocks * (i + 1) // count}" for i in range(count)]
    folder = Path(tempfile.mkdtemp(dir=workplace()))
    options = ("--update_period", 60, "--attn_cache_tokens", 16384, *options)
    with Faults(folder, path, spans, *options, slow=slow, **link) as swarm:
        for host, span in swarm.hosts.items():
            print(f"{host}: blocks {span} of {path.name}, {threads_of(swarm.processes[host].popen.pid)}")
        yield swarm


def seconds(work: Callable, *args, **options) -> float:
    began = time.perf_counter()
    work(*args, **options)
    return time.perf_counter() - began


def in_turn(repeats: int, **runs: Callable[[], float]) -> dict[str, list[float]]:
    """What each run measured, `repeats` times, one after the other in turn; the first turn warms up."""
    turns = [{name: run() for name, run in runs.items()} for _ in range(repeats + 1)][1:]
    return {name: [turn[name] for turn in turns] for name in runs}


def quotients(over: list[float], under: list[float]) -> list[float]:
    """Of what was measured in the same turn."""
    return [a / b for a, b in zip(over, under, strict=True)]


def per_token(model, ids: torch.Tensor, new: int, **options) -> float:
    """Seconds per token of a whole call of `generate`."""
    return seconds(model.generate, ids, max_new_tokens=new, do_sample=False, **options) / new


def together(count: int, use: Callable[[int], Any]) -> float:
    """Seconds that so many threads take that call use(0), use(1), … at once; raises what they raise."""
    with ThreadPoolExecutor(count) as pool:
        return seconds(lambda: list(pool.map(use, range(count))))


@dataclasses.dataclass
class Row:
    """An answer, as the table shows it: repeats of one figure beside what is wanted and what Petals
    needed."""

    question: str
    values: list[float]
    wanted: float | None = None
    petals: float | None = None
    unit: str = ""
    more: bool = False  # is better

    @property
    def summary(self) -> dict[str, Any]:
        some = {"median": statistics.median(self.values), "min": min(self.values), "max": max(self.values)}
        return {key: float(f"{value:.4g}") for key, value in some.items()}

    @property
    def goal(self) -> str:
        return "" if self.wanted is None else f"{'≥' if self.more else '≤'} {self.wanted:g}{self.unit}"

    def __str__(self) -> str:
        median, low, high = (f"{value:.3g}" for value in self.summary.values())
        return f"{median}{self.unit}" + (f" ({low} to {high})" if len(self.values) > 1 else "")

    def cells(self) -> tuple[str, ...]:
        petals = "" if self.petals is None else f"{self.petals:g}{self.unit}"
        return self.question, str(self), self.goal, petals


def conclude(bench: str, *rows: Row, **details: Any) -> list[Row]:
    """Print a command's rows, and the line of JSON; returns the rows."""
    for row in rows:
        print(f"{row.question}: {row}" + f"; wanted {row.goal}" * bool(row.goal))
    figures = [{"question": row.question, **row.summary, "wanted": row.goal} for row in rows]
    report(bench=bench, load=os.getloadavg()[0], figures=figures, **details)
    return list(rows)


# ============================================================================================================
# Beside transformers alone
# ============================================================================================================


def stages(model, ids: torch.Tensor, new: int) -> dict[str, float]:
    """Where the time of a decoded token goes: mean milliseconds by stage, from the session's trace."""
    clock, model.config.trace = Clock(), True
    with model.inference_session(max_length=ids.shape[1] + new) as session:
        options = {"max_new_tokens": new, "do_sample": False, "stopping_criteria": [clock]}
        model.generate(ids, session=session, **options)
    model.config.trace = False
    steps, hops = session.trace  # of servers also the opening; the prompt's come next
    means = {"token": (clock.times[-1] - clock.times[1]) / (new - 1), "step": statistics.mean(steps[1:])}
    for number, traces in enumerate(hops, 1):
        for stage in ("queue", "compute"):
            means[f"{stage} {number}"] = statistics.mean(trace[stage] for trace in traces[2:])
    token, step, *servers_ = means.values()
    means |= {"client": token - step, "wire": step - sum(servers_)}
    return {stage: 1e3 * value for stage, value in means.items() if stage != "step"}


@torch.inference_mode()
def overhead(repeats: int = 9, tokens: int = 64) -> list[Row]:
    """Question: how much longer does a token take than with transformers alone, where the model is nothing
    (tiny, two servers); and where does the time go?"""
    ids = ids_of("tiny", 1, 16)
    with servers("tiny", 2) as swarm:
        model = swarm.client()
        found: list[dict[str, float]] = []
        took = in_turn(
            repeats,
            alone=lambda: per_token(alone("tiny"), ids, tokens),
            swarm=lambda: per_token(model, ids, tokens),
            traced=lambda: found.append(stages(model, ids, tokens)) or 0.0,
        )
    print(f"transformers alone: {1e3 * statistics.median(took['alone']):.2f} ms per token")
    parts = {stage: round(statistics.median(turn[stage] for turn in found[1:]), 3) for stage in found[0]}
    print("swarm, ms per decoded token: " + ", ".join(f"{stage} {ms:.2f}" for stage, ms in parts.items()))
    ratio = quotients(took["swarm"], took["alone"])
    row = Row("tiny, one client: time per token over transformers alone", ratio, 1.2, 4.8)
    return conclude("overhead", row, stages_ms=parts)


def memory_speed() -> float:
    """Bytes per second at which one thread reads memory, at best."""
    much = torch.ones(2**26)
    return much.nbytes / min(seconds(much.sum) for _ in range(9))


@torch.inference_mode()
def decode(repeats: int = 5, tokens: int = 64, weights: bool = False) -> list[Row]:
    """Question: how fast is one client's text, beside transformers alone with one thread (mid, two servers)?
    With --weights: what do smaller weights bring?"""
    if weights:
        return smaller_weights()
    ids, reference = ids_of("mid", 1, 16), alone("mid")
    read = sum(weight.nbytes for weight in reference.parameters())
    read -= reference.model.embed_tokens.weight.nbytes  # but for a row
    best = memory_speed() / read
    print(f"ceiling: {best:.2f} tokens/s, each weight read once from memory ({read / 1e6:.0f} MB a token)")
    with servers("mid", 2) as swarm:
        model = swarm.client()
        took = in_turn(
            repeats,
            alone=lambda: per_token(reference, ids, tokens),
            swarm=lambda: per_token(model, ids, tokens),
        )
    speed = {name: 1 / statistics.median(some) for name, some in took.items()}
    print(", ".join(f"{name} {value:.2f} tokens/s" for name, value in speed.items()))
    row = Row("mid, one client: tokens/s over transformers alone, one thread",
              quotients(took["alone"], took["swarm"]), 1.0, 0.81, more=True)  # fmt: skip
    return conclude("decode", row, tokens_per_s=speed, ceiling=best)


def info_of(model, peer: str) -> dict:
    """What a server says of itself by rpc_info."""
    p2p, request = model.remote.router.swarm.p2p, pm.ExpertUID(uid="")
    asking = pm.call(p2p, pm.PeerID.from_base58(peer), "rpc_info", request, pm.ExpertInfo, 30)
    return pm.MSGPackSerializer.loads(pm.wire().call(asking).serialized_info)


def stepping(model, peer: str, count: int, steps: int) -> tuple[float, float]:
    """`count` clients that do nothing but `session.step` with one row of one token, at once: (their steps per
    second together, rows per pass of the executor)."""
    x, open_one = torch.randn(1, 1, model.config.hidden_size), model.remote.inference_session
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_one(max_length=steps + 2)) for _ in range(count)]
        together(count, lambda index: opened[index].step(x))
        before = info_of(model, peer)
        took = together(count, lambda index: [opened[index].step(x) for _ in range(steps)])
        after = info_of(model, peer)
    passes, rows = (after[f"executor_{what}"] - before[f"executor_{what}"] for what in ("passes", "steps"))
    return count * steps / took, rows / passes


LIGHT = (1, 2, 4, 8, 16)


@torch.inference_mode()
def light_clients(repeats: int, steps: int) -> tuple[Row, dict]:
    """What one server brings to clients that only step, by their number."""
    with servers("mid", 1, "--torch_dtype", "float16") as swarm:
        model, (peer,) = swarm.client(), swarm.host_of
        found = [{n: stepping(model, peer, n, steps) for n in LIGHT} for _ in range(repeats + 1)][1:]
    speeds = {n: statistics.median(turn[n][0] for turn in found) for n in LIGHT}
    rows = {n: statistics.median(turn[n][1] for turn in found) for n in LIGHT}
    for n in LIGHT:
        print(f"{n:2} light clients: {speeds[n]:.1f} steps/s together, {rows[n]:.2f} rows per pass")
    gain = [turn[8][0] / turn[1][0] for turn in found]
    row = Row("mid, float16, 8 clients that only step: steps/s over those of one", gain, 3, more=True)
    return row, {"light_steps_per_s": speeds, "rows_per_pass": rows}


@torch.inference_mode()
def clients(repeats: int = 3, tokens: int = 32, steps: int = 20) -> list[Row]:
    """Question: what do four clients at once get together, over one transformers alone with one thread (mid,
    two servers)? The clients are threads of this process. And what does one server bring to 1 to 16 clients
    that only step?"""
    ids, reference = ids_of("mid", 1, 16), alone("mid")
    with contextlib.ExitStack() as stack:
        kinds = {}
        for kind in ("float32", "float16"):
            swarm = stack.enter_context(servers("mid", 2, "--torch_dtype", kind))
            kinds[kind] = swarm.client()

        def four(model) -> float:
            """Seconds per token of all four together."""
            return together(4, lambda _: per_token(model, ids, tokens)) / (4 * tokens)

        took = in_turn(
            repeats,
            alone=lambda: per_token(reference, ids, tokens),
            **{kind: functools.partial(four, model) for kind, model in kinds.items()},
        )
    speed = {name: 1 / statistics.median(some) for name, some in took.items()}
    print(", ".join(f"{name} {value:.2f} tokens/s" for name, value in speed.items()))
    what = "tokens/s together over transformers alone, one thread"
    rows = [
        Row(f"mid, {kind}, four clients at once: {what}", quotients(took["alone"], took[kind]), wanted, 1.3,
            more=True)
        for kind, wanted in (("float32", 2.0), ("float16", 3.5))
    ]  # fmt: skip
    row, light = light_clients(repeats, steps)
    return conclude("clients", *rows, row, tokens_per_s=speed, **light)


class Decoding(Clock):
    """A text that goes on in a thread of its own until `stop`."""

    def __init__(self, model, ids: torch.Tensor):
        super().__init__()
        self.over, options = threading.Event(), {"max_new_tokens": 2000, "do_sample": False}
        self.thread = threading.Thread(
            target=lambda: model.generate(ids, stopping_criteria=[self], **options), daemon=True
        )
        self.thread.start()
        until(lambda: len(self.times) > 4, what="a text's first tokens")

    def __call__(self, ids, scores, **_) -> torch.Tensor:
        super().__call__(ids, scores)
        return torch.full((len(ids),), self.over.is_set())

    def stop(self) -> None:
        self.over.set()
        self.thread.join()

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds of the tokens under way between two moments."""
        return [b - a for a, b in itertools.pairwise(self.times) if b > start and a < end]


@torch.inference_mode()
def prefill(repeats: int = 3, tokens: int = 2000) -> list[Row]:
    """Question: what do a text and a long prompt of another client do to each other (mid, two servers)? A
    token's time is the mean of those under way while the prompt is."""
    x, ids = torch.randn(1, tokens, 1024), ids_of("mid", 1, 16)
    found: dict[str, list[float]] = {"decode": [], "prompt": [], "worst": []}
    with servers("mid", 2) as swarm:
        model = swarm.client()

        def prompt_seconds() -> float:
            with model.remote.inference_session(max_length=tokens) as session:
                session.step(x[:, :0])
                return seconds(session.step, x)

        for _ in range(repeats):
            own, text = prompt_seconds(), Decoding(model, ids)
            time.sleep(3)  # of a text that nobody disturbs
            start = time.monotonic()
            disturbed_prompt, end = prompt_seconds(), time.monotonic()
            text.stop()
            before, during = text.gaps(text.times[4], start), text.gaps(start, end)
            usual, loaded = statistics.mean(before[:-1]), statistics.mean(during)
            print(f"prompt {own:.2f} s alone, {disturbed_prompt:.2f} s beside a text; "
                  f"a token {1e3 * usual:.0f} ms, {1e3 * loaded:.0f} ms beside a prompt, "
                  f"at worst {1e3 * max(during):.0f} ms", flush=True)  # fmt: skip
            for name, value in zip(found, (loaded / usual, disturbed_prompt / own, max(during)), strict=True):
                found[name].append(value)
    rows = [
        Row(f"mid, a prompt of {tokens} tokens arrives: another client's time per token over usual",
            found["decode"], 2.0),
        Row("that prompt's time over its time alone", found["prompt"], 1.3),
    ]  # fmt: skip
    return conclude("prefill", *rows, worst_token_s=found["worst"])


@torch.inference_mode()
def forward(repeats: int = 3, tokens: int = 128) -> list[Row]:
    """Question: how fast is a forward pass of a batch through two servers, beside transformers alone with two
    threads (mid; ids to last hidden states)?"""
    reference, rows, speeds = alone("mid"), [], {}
    with servers("mid", 2) as swarm:
        model = swarm.client()

        def by_transformers(ids: torch.Tensor) -> float:
            torch.set_num_threads(2)
            took = seconds(reference.model, ids, use_cache=False)
            torch.set_num_threads(1)
            return took

        for batch, wanted, petals in ((8, 0.75, 0.48), (32, 0.9, None)):
            ids = ids_of("mid", batch, tokens)
            took = in_turn(
                repeats,
                alone=lambda ids=ids: by_transformers(ids),
                swarm=lambda ids=ids: seconds(model.model, ids),
            )
            speed = {name: ids.numel() / statistics.median(some) for name, some in took.items()}
            said = ", ".join(f"{name} {value:.0f} tokens/s" for name, value in speed.items())
            print(f"[{batch}, {tokens}]: {said}")
            speeds[batch] = speed
            what = f"mid, forward of [{batch}, {tokens}]: tokens/s over transformers alone, two threads"
            rows.append(Row(what, quotients(took["alone"], took["swarm"]), wanted, petals, more=True))
    return conclude("forward", *rows, tokens_per_s=speeds)


def beginning() -> float:
    """Seconds from exec to online of a server of "tiny"."""
    options = ["--new_swarm", "--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--throughput", 1]
    began = time.perf_counter()
    with Process(workplace(), "serve", checkpoint("tiny"), *options) as server:
        server.hello()
        return time.perf_counter() - began


def startup(repeats: int = 5) -> list[Row]:
    """Question: how long until a server is online (tiny), over the bare time of importing torch, transformers
    and hivemind; how many processes is it, and how much memory beyond its weights (mid, half of the blocks,
    after a text)?"""
    bare = [sys.executable, "-c", "import torch, transformers, hivemind"]
    took = in_turn(
        repeats,
        imports=lambda: seconds(subprocess.run, bare, check=True, env=os.environ | QUIET),
        online=beginning,
    )
    print(f"the imports alone: {statistics.median(took['imports']):.2f} s")
    beyond = [online - imports for online, imports in zip(took["online"], took["imports"], strict=True)]
    held = sum(weight.nbytes for weight in alone("mid").model.layers.parameters()) / 2 / 2**20
    with servers("mid", 2) as swarm:
        swarm.client().generate(ids_of("mid", 1, 16), max_new_tokens=4, do_sample=False)
        families = [swarm.processes[host].family() for host in swarm.hosts]
        memories = [sum(map(memory, family)) - held for family in families]
    return conclude(
        "startup",
        Row("tiny, exec to online, beyond importing torch, transformers, hivemind", beyond, 1, unit=" s"),
        Row("processes of a server", [len(family) for family in families], 4, 13),
        Row("mid, memory (PSS) of a server beyond its weights", memories, 450, 1000, " MiB"),
        **{f"{name}_s": some for name, some in took.items()},
    )


# ============================================================================================================
# Over slow links
# ============================================================================================================


def set_links(swarm: Faults, client_ms: float, server_ms: float, client_mbit: float | None) -> None:
    for a, b in itertools.combinations(swarm.net.hosts, 2):
        swarm.net.set_delay(a, b, client_ms if "client" in (a, b) else server_ms)
    swarm.net.set_rate("client", client_mbit)


def client_bytes(swarm: Faults) -> int:
    """Bytes that passed the client's link so far, both ways, headers included."""
    with swarm.net.enter("client"):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    words = next(line for line in lines if "tun0:" in line).split(":")[1].split()
    return int(words[0]) + int(words[8])  # received, sent


def token_ms(model, tokens: int) -> float:
    """Median milliseconds of a decoded token."""
    clock, ids = Clock(), torch.ones(1, 16, dtype=torch.int64)
    model.generate(ids, max_new_tokens=tokens, do_sample=False, stopping_criteria=[clock])
    return 1e3 * statistics.median([b - a for a, b in itertools.pairwise(clock.times)][3:])


def large_requests(swarm: Faults, model, prompt: int) -> dict[str, float]:
    """Seconds and bytes on the client's link of a prompt and of a forward pass."""
    hidden, found = model.config.hidden_size, {}
    # closing: within the session's own context a forward pass would be its next step
    with contextlib.closing(model.remote.inference_session(max_length=prompt)) as session:
        session.step(torch.empty(1, 0, hidden))
        for name, run in (
            (f"prompt [1, {prompt}]", lambda: session.step(torch.randn(1, prompt, hidden))),
            ("forward [8, 128]", lambda: model.remote(torch.randn(8, 128, hidden))),
        ):
            before = client_bytes(swarm)
            found[f"{name} s"] = round(seconds(run), 3)
            found[f"{name} MB"] = round((client_bytes(swarm) - before) / 1e6, 2)
    return found


@torch.inference_mode()
def wan(tokens: int = 32, most: int = 4, prompt: int = 1024) -> list[Row]:
    """Question: what does a token cost over slow links (mid; 5, 50 and 100 ms one way and 100 Mbit/s on the
    client's link, 1 ms between servers; 1, 2, 4 servers)? The floor: one trip around the chain, and what the
    same servers take on links without delay. And a prompt, and a forward pass: seconds, bytes."""
    rows, details = [], {}
    for count in [count for count in (1, 2, 4) if count <= most]:
        with servers("mid", count, slow=True, client_ms=0, server_ms=0) as swarm:
            compute = token_ms(swarm.client(), tokens)
            large = {0: large_requests(swarm, swarm.client(), prompt)}
            over = []
            for ms in (5, 50, 100):
                set_links(swarm, ms, 1, 100)
                model, floor = swarm.client(), 2 * ms + (count - 1) + compute
                took = token_ms(model, tokens)
                large[ms] = large_requests(swarm, model, prompt)
                packed = large_requests(swarm, swarm.client(compression="float16"), prompt)
                large[ms] |= {f"{what}, 16 bits": figure for what, figure in packed.items()}
                over.append(took / floor)
                print(f"{count} servers, {ms} ms: floor {floor:.1f} ms, {took:.1f} ms a token", flush=True)
            for ms, found in large.items():
                print(f"{count} servers, {ms} ms: " + ", ".join(f"{k} {v}" for k, v in found.items()))
        what = f"mid, servers: {count}, 5, 50, 100 ms away: a token's time over one trip + compute"
        rows.append(Row(what, over, 1.15))
        details[count] = {"compute_ms": compute, "large": large}
    return conclude("wan", *rows, servers=details)


@torch.inference_mode()
def speculate(model: str | None = None, repeats: int = 3, tokens: int = 64) -> list[Row]:
    """Question: what does prompt lookup bring over a link of 50 ms, where the text repeats (SmolLM2, two
    servers)?"""
    path = Path(model or pm._demo_checkpoint())
    text = "The quick brown fox jumps over the lazy dog and runs away into the dark forest. " * 6
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    with servers(path, 2, slow=True, client_ms=50, server_ms=1) as swarm:
        swarm_model = swarm.client()
        swarm_model.generation_config.eos_token_id = None
        took = in_turn(
            repeats,
            plain=lambda: per_token(swarm_model, ids, tokens),
            lookup=lambda: per_token(swarm_model, ids, tokens, prompt_lookup_num_tokens=10),
        )
    speed = {name: 1 / statistics.median(some) for name, some in took.items()}
    print(f"one trip, 101 ms: at most 9.90 tokens/s if each token is one; plain {speed['plain']:.2f}, "
          f"prompt lookup {speed['lookup']:.2f}")  # fmt: skip
    gain = quotients(took["plain"], took["lookup"])
    row = Row("SmolLM2, 50 ms away, prompt lookup over plain: tokens/s", gain, 2, more=True)
    return conclude("speculate", row, tokens_per_s=speed)


# ============================================================================================================
# With size
# ============================================================================================================


def growth_with_context(name: str, longest: int, steps: int = 12, repeats: int = 7) -> Row:
    """How the time of a step grows with the context, over how the bytes that it reads grow: weights, keys and
    values. The shortest and the longest context in turn."""
    reference, shortest = alone(name), 128
    config, weights = reference.config, sum(w.nbytes for w in reference.model.layers.parameters())
    cached = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # per token

    def token(session: pm.InferenceSession, length: int) -> float:
        """Seconds of a step after `length` tokens."""
        while session.position < length:
            more = min(512, length - session.position)
            session.step(torch.randn(1, more, config.hidden_size))
        x = torch.randn(1, 1, config.hidden_size)
        took = statistics.median(seconds(session.step, x) for _ in range(steps))
        session.position = length
        return took

    with servers(name, 2, "--inference_max_length", 16384) as swarm:
        session = swarm.client().remote.inference_session
        with session(max_length=shortest + steps) as short, session(max_length=longest + steps) as long:
            for length in [shortest << i for i in range(20) if shortest << i <= longest]:
                print(f"context {length:5}: {1e3 * token(long, length):.2f} ms a token, "
                      f"{(weights + cached * length) / 1e6:.0f} MB read", flush=True)  # fmt: skip
            took = in_turn(repeats, short=lambda: token(short, shortest), long=lambda: token(long, longest))
    read = (weights + cached * longest) / (weights + cached * shortest)
    grown = [growth / read for growth in quotients(took["long"], took["short"])]
    what = f"{name}, context {shortest} to {longest}: growth of a token's time over that of the bytes read"
    return Row(what, grown, 1.0)


def growth_with_sessions(steps: int = 20) -> tuple[Row, dict]:
    """A step's time and the server's memory, with 1 to 64 sessions that step at once."""
    figures = {}
    with servers("tiny", 1) as swarm:
        model, (peer,) = swarm.client(), swarm.host_of
        for count in (1, 4, 16, 64):
            speed, rows = stepping(model, peer, count, steps)
            ms, mib = 1e3 * count / speed, sum(map(memory, swarm.processes["server1"].family()))
            print(
                f"{count:2} sessions: {ms:.2f} ms a step, {rows:.1f} rows per pass, {mib:.0f} MiB", flush=True
            )
            figures[count] = {"ms": round(ms, 3), "rows_per_pass": round(rows, 2), "mib": round(mib)}
    gain = 64 * figures[1]["ms"] / figures[64]["ms"]
    row = Row("tiny, 64 clients that only step: steps/s over those of one", [gain], more=True)
    return row, figures


class Archive:
    """Stands for a directory of 1,000 servers: answers as `Swarm.get` does, with records as hivemind hands
    them over, which are read and checked as those of strangers are."""

    peer_id = None

    def __init__(self, count: int, blocks: int):
        chance, self.entries = random.Random(0), {}
        for number in range(count):
            name = pm.PeerID(b"\x12\x20" + number.to_bytes(32, "big")).to_base58()
            first = chance.randrange(blocks - 8)
            last = first + chance.randint(4, min(16, blocks - first))
            info = pm.ServerInfo(pm.ONLINE, 10 + chance.random(), first, last)
            info.inference_rps = 100 + chance.random()
            for uid in pm.block_uids("m-hf", first, last):
                value = pm.MSGPackSerializer.dumps(info.to_record())
                self.entries.setdefault(uid, {})[name] = value

    async def get(self, keys: list[str]) -> dict[str, dict]:
        def read(value: bytes) -> SimpleNamespace:
            return SimpleNamespace(value=pm.RecordSerializer.loads(value), expiration_time=1e9)

        return {key: {name: read(value) for name, value in self.entries[key].items()} for key in keys}


def routing(count: int = 1000, blocks: int = 80, repeats: int = 9) -> list[Row]:
    """A reading of the directory and a choice of route, in a swarm that is simulated."""
    config = AutoConfig.for_model("llama", num_hidden_layers=blocks)
    config = pm.ClientConfig(dht_prefix="m-hf").attach_to(config, {"show_route": False})
    config.dht_prefix = "m-hf"
    archive = Archive(count, blocks)
    router, chance = pm.Router(archive, config), random.Random(0)

    async def refresh() -> None:
        router.spans = pm.spans_of(await pm.read_directory(archive, "m-hf", blocks))

    refreshed = [seconds(pm.wire().call, refresh()) for _ in range(repeats)]
    router.pings = {span.peer: chance.uniform(0.01, 0.3) for span in router.spans}
    chosen = [1e3 * seconds(router.fastest, 0, blocks, 1000) for _ in range(repeats)]
    what = f"{count} servers, {blocks} blocks"
    return [
        Row(f"{what}: a route", chosen, 50, unit=" ms"),
        Row(f"{what}: a reading of the directory, network apart", [1e3 * s for s in refreshed], unit=" ms"),
    ]


@torch.inference_mode()
def scale(model: str = "mid", longest: int = 8192) -> list[Row]:
    """Question: how does it grow: a token's time with the context (mid, two servers), a step's time and
    memory with the number of sessions (tiny), a route with the number of servers?"""
    rows = routing()
    sessions, figures = growth_with_sessions()
    return conclude("scale", growth_with_context(model, longest), sessions, *rows, sessions=figures)


# ============================================================================================================
# Under faults
# ============================================================================================================


@contextlib.contextmanager
def faulty_swarm(reference, spans: list[str], **link):
    with tempfile.TemporaryDirectory() as folder:
        path = save(reference, Path(folder) / "tiny-llama")
        with Faults(Path(folder), path, spans, **link) as faults:
            yield faults


def chaos(generations: int = 100, seed: int = 0) -> None:
    """Question: what does a user notice of a crash, a freeze or a cut in the middle of a text?"""
    chance, reference, stalls, wrong = random.Random(seed), make_model("llama"), {}, 0
    with faulty_swarm(reference, CHAOS_SPANS) as faults:
        model = faults.client()
        for number, mode in zip(range(generations), itertools.cycle(MODES), strict=False):
            verb = chance.choice(["crash", "freeze"] + ["cut"] * (faults.net is not None))
            alone, place = chance.random() < 0.5, chance.randrange(4)
            after = chance.randrange(steps_of(mode) - 1)
            faults.settle(model)
            ids, stall = disturbed(faults, model, mode, place, verb, alone, after)
            stalls.setdefault(verb, []).append(stall)
            right = ids == undisturbed(reference, mode)
            wrong += not right
            print(f"{number:3} {mode:9} {verb:6} {'alone' if alone else 'group'} at {place} after {after}: "
                  f"{stall:.2f} s{'' if right else ' WRONG'}", flush=True)  # fmt: skip
    figures = {
        verb: {
            "count": len(some),
            "median_s": round(statistics.median(some), 3),
            "worst_s": round(max(some), 3),
        }
        for verb, some in stalls.items()
    }
    report(bench="chaos", generations=generations, wrong=wrong, **figures)
    slow = {verb: its for verb, its in figures.items() if its["worst_s"] > STALL[verb]}
    slow |= {verb: its for verb, its in figures.items() if verb == "crash" and its["median_s"] > 1}
    sys.exit(f"{wrong} texts were wrong; too slow: {slow}" if wrong or slow else 0)


def memory(pid: int) -> float:
    """MiB that a process has for itself, shared pages in parts (PSS)."""
    with contextlib.suppress(ProcessLookupError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return math.nan  # it was ending


class Soak:
    """Clients that generate all the time, each in a thread with its own peer, and what came of it."""

    def __init__(self, faults: Faults, reference, clients: int):
        self.expected = {mode: undisturbed(reference, mode) for mode in MODES}
        self.models = [faults.client() for _ in range(clients)]
        self.drafts = [copy.deepcopy(draft_model()) for _ in range(clients)]
        self.done, self.slowest, self.wrong, self.errors = [0] * clients, [0.0] * clients, [], []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.use, args=(i,), daemon=True) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def use(self, index: int) -> None:
        # torch's generator is the process's own: only one of them may sample
        for mode in itertools.cycle(mode for mode in self.expected if mode != "sampling" or index == 0):
            if self.over.is_set():
                return
            began, seed = time.monotonic(), SEEDS["llama"][mode]
            try:
                torch.manual_seed(seed) if mode == "sampling" else None
                draft = {"assistant_model": self.drafts[index]} if mode == "assistant" else {}
                ids = self.models[index].generate(**prompt(mode, seed), **draft).tolist()
            except Exception as error:
                self.errors.append(f"client {index}, {mode}: {error!r}")
                continue
            self.slowest[index] = max(self.slowest[index], time.monotonic() - began)
            self.done[index] += 1
            if ids != self.expected[mode]:
                self.wrong.append((index, mode))
                at = [
                    n
                    for n, pair in enumerate(zip(ids, self.expected[mode], strict=False))
                    if pair[0] != pair[1]
                ]
                print(
                    f"WRONG client {index} {mode} rows {at}, {ids}, {time.monotonic() - began:.1f} s",
                    flush=True,
                )

    def end(self, patience: float = 60) -> int:
        """How many clients hang: did not end their last generation in so many seconds."""
        self.over.set()
        deadline = time.monotonic() + patience
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self.threads)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def leaked(faults: Faults, swarm: pm.Swarm) -> int:
    """Cache tokens that are not free on the servers although nobody uses them."""
    spans = {host: span.split("@")[0].split(":") for host, span in faults.hosts.items()}
    full = {host: 8192 * (int(last) - int(first)) for host, (first, last) in spans.items()}
    with contextlib.suppress(AssertionError):
        until(lambda: faults.free_tokens(swarm) == full, 60)
    return sum(full.values()) - sum(faults.free_tokens(swarm).values())


def endure(faults: Faults, reference, minutes: float, clients: int = 8, period: float = 10) -> dict:
    """A fault every `period` seconds, undone half a period later; the figures. One server is never killed, so
    that one sees whether it grows."""
    chance, samples, count = random.Random(1), [], dict.fromkeys(["crash", "freeze", "cut"], 0)
    soak, start, spared = Soak(faults, reference, clients), time.monotonic(), next(iter(faults.hosts))
    pids = [os.getpid(), faults.processes[spared].popen.pid]
    while (now := time.monotonic()) - start < 60 * minutes:
        verb = chance.choice(["crash", "freeze"] + ["cut"] * (faults.net is not None))
        host, alone = chance.choice(list(faults.hosts)), chance.random() < 0.5
        verb = "freeze" if host == spared and verb == "crash" else verb
        getattr(faults, verb)(host, alone)
        count[verb] += 1
        time.sleep(period / 2)
        faults.mend()
        time.sleep(max(0.0, now + period - time.monotonic()))
        samples.append((time.monotonic() - start, *map(memory, pids), *map(open_files, pids)))
        at, client, server, *files = samples[-1]
        print(f"{at:6.0f} s: {sum(soak.done)} generations, client {client:.0f} MiB, server {server:.0f} MiB, "
              f"open files {files}, {verb}", flush=True)  # fmt: skip
    faults.mend()
    hung = soak.end()
    settled = [sample[1:] for sample in samples if sample[0] > min(300, 30 * minutes)]
    some = max(1, min(10, len(settled) // 2))
    began, ended = (
        [round(statistics.median(each)) for each in zip(*part, strict=True)]
        for part in (settled[:some], settled[-some:])
    )
    names = "client_mib", "server_mib", "client_files", "server_files"
    return {"minutes": minutes, "generations": sum(soak.done), "faults": count, "wrong": len(soak.wrong),
            "errors": soak.errors[:5], "hung": hung, "slowest_generation_s": round(max(soak.slowest), 1),
            **{name: list(pair) for name, *pair in zip(names, began, ended, strict=True)},
            "leaked_tokens": leaked(faults, soak.models[0].remote.router.swarm)}  # fmt: skip


def soak(minutes: float = 30) -> None:
    """Question: does anything go wrong, hang, grow or leak when servers fail for half an hour?"""
    reference = make_model("llama")
    with faulty_swarm(reference, CHAOS_SPANS) as faults:
        figures = endure(faults, reference, minutes)
    report(bench="soak", **figures)
    bad = {name: figures[name] for name in ("wrong", "errors", "hung", "leaked_tokens") if figures[name]}
    used = {name: its for name, its in figures.items() if name.endswith(("_mib", "_files"))}
    bad |= {name: its for name, its in used.items() if its[1] > 1.05 * its[0] + 10}  # it should be flat
    sys.exit(f"not as it should be: {bad}" if bad else 0)


def chain(tokens: int = 60, client_ms: float = 50, server_ms: float = 1) -> None:
    """What does a token cost over three servers, 50 ms from the client and 1 ms from each other? The
    floor is one trip around the chain, 50 + 1 + 1 + 50 = 102 ms, plus compute; in turn: 300 ms."""
    reference = make_model("llama")
    ids, figures = torch.ones(1, 16, dtype=torch.int64), {}
    with faulty_swarm(reference, ["0:1", "1:3", "3:5"], client_ms=0, server_ms=0) as faults:
        for name, delays, options in [
            ("compute", (0, 0), {}),
            ("chain", (client_ms, server_ms), {}),
            ("in_turn", (client_ms, server_ms), {"use_server_to_server": False}),
        ]:
            for a, b in itertools.combinations(faults.net.hosts, 2):
                faults.net.set_delay(a, b, delays["client" not in (a, b)])
            model, clock = faults.client(**options), Clock()
            greedy = {"max_new_tokens": tokens, "do_sample": False, "stopping_criteria": [clock]}
            with model.inference_session(max_length=ids.shape[1] + tokens + 1) as session:
                model.generate(ids, session=session, **greedy)
            gaps = [b - a for a, b in itertools.pairwise(clock.times)][5:]
            figures[name] = 1e3 * statistics.median(gaps)
            print(
                f"{name:8} {figures[name]:.1f} ms per token (median; worst {1e3 * max(gaps):.1f})", flush=True
            )
    trip = 2 * client_ms + 2 * server_ms
    floor = trip + figures["compute"]
    print(f"one trip around the chain {trip:.0f} ms + compute {figures['compute']:.1f} ms = {floor:.1f} ms; "
          f"three round trips of the client {6 * client_ms:.0f} ms")  # fmt: skip
    report(bench="chain", **{f"{name}_ms": round(value, 1) for name, value in figures.items()}, trip_ms=trip,
           over_floor=round(figures["chain"] / floor - 1, 3), three_round_trips_ms=6 * client_ms)  # fmt: skip
    sys.exit("more than 15 % over the floor" if figures["chain"] > 1.15 * floor else 0)


PAGE = 16
COLD = 400 << 20  # bytes that the rounds of one measurement touch together: 8 times an H100's L2


def timed(round_, bytes_a_round: int, most: int = 64) -> float:
    """Median seconds of round_(i), i = which set of buffers: captured once per set in a CUDA graph, replayed
    15 times."""
    sets = max(1, min(most, COLD // max(1, bytes_a_round)))
    calls = [round_(i) for i in range(sets)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets cuBLAS choose
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for turn in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / 1000 / sets)
    return sorted(times)[len(times) // 2]


def ceilings() -> tuple[float, float]:
    """(bytes a second of a large copy, reads and writes; bfloat16 flops a second of an 8192^3 product)."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() / timed(lambda i: lambda: b.copy_(a), 2 * a.numel())
    x, y = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    return bandwidth, 2 * 8192**3 / timed(lambda i: lambda: x @ y, COLD)


class Lines:
    """Prints one line a measurement and keeps it for the JSON line."""

    def __init__(self, bandwidth: float, peak: float):
        self.bandwidth, self.peak, self.rows = bandwidth, peak, {}

    def line(self, name: str, seconds: float, beside: float | None, size: float = 0, flops: float = 0):
        """`size` bytes or `flops`: which of them binds is the caller's to say."""
        share = size / seconds / self.bandwidth if size else flops / seconds / self.peak
        what = f"{size / 1e6:9.1f} MB" if size else f"{flops / 1e9:9.1f} GFLOP"
        rate = "" if size else f" {flops / seconds / 1e12:4.0f} TFLOPS"
        other = "" if beside is None else f"   PyTorch {beside * 1e6:9.1f} us"
        print(f"{name:44} {seconds * 1e6:9.1f} us {what} {share:5.0%}{rate}{other}", flush=True)
        row = {"us": seconds * 1e6, "share": share, "pytorch_us": beside and beside * 1e6}
        self.rows[name] = {key: round(value, 4) for key, value in row.items() if value is not None}


def bench_attention(report: Lines):
    """Llama-3-8B's heads: decode at 8,192 keys, prefill of 8,192 tokens; bfloat16; scattered pages."""
    N, K, D = 32, 8, 128
    for rows, S in ((1, 8192), (8, 8192), (32, 8192), (1, 1024), (32, 1024)):
        size = 2 * rows * S * K * D * 2
        pages = torch.randperm(rows * S // PAGE).view(rows, -1).tolist()
        plan = attention.plan(pages, [1] * rows, [S] * rows, PAGE, "cuda")
        q = torch.randn(rows, N, D, dtype=torch.bfloat16, device="cuda")

        def ours(i, rows=rows, S=S, plan=plan, q=q):
            k, v = torch.randn(2, rows * S // PAGE, PAGE, K, D, device="cuda", dtype=torch.bfloat16)
            return lambda: attention.attend(q, k, v, plan, scale=D**-0.5)

        def theirs(i, rows=rows, S=S, q=q):
            k, v = torch.randn(2, rows, K, S, D, device="cuda", dtype=torch.bfloat16)
            wide = q.view(rows, N, 1, D)
            return lambda: F.scaled_dot_product_attention(wide, k, v, enable_gqa=True)

        report.line(f"decode attention, {rows} rows x {S}", timed(ours, size), timed(theirs, size), size=size)
    for S in (1024, 8192):
        plan = attention.plan([torch.randperm(S // PAGE).tolist()], [S], [S], PAGE, "cuda")
        q = torch.randn(S, N, D, dtype=torch.bfloat16, device="cuda")
        k, v = torch.randn(2, S // PAGE, PAGE, K, D, device="cuda", dtype=torch.bfloat16)
        heads = [x.view(1, S, -1, D).transpose(1, 2) for x in (q, k, v)]

        def ours(i, plan=plan, q=q, k=k, v=v):
            return lambda: attention.attend(q, k, v, plan, scale=D**-0.5)

        def theirs(i, heads=heads):
            return lambda: F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

        report.line(
            f"prefill attention, {S} tokens", timed(ours, COLD), timed(theirs, COLD), flops=2 * N * D * S * S
        )


def bench_matmul(report: Lines):
    """Llama-3-8B's matrices, and Mixtral's experts."""
    for N, K in ((6144, 4096), (28672, 4096), (4096, 14336)):
        dense = torch.randn(N, K, dtype=torch.bfloat16, device="cuda")
        for kind in ("int8", "int4"):
            w = matmul.quantize(dense, kind)
            for M in (1, 4, 16, 64, 256):
                x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")

                def ours(i, w=w, x=x):
                    copy = matmul.Weight(w.kind, w.shape, w.data.clone(), w.scale.clone())
                    return lambda: matmul.quantized(x, copy)

                def theirs(i, dense=dense, x=x):
                    copy = dense.clone()
                    return lambda: F.linear(x, copy)

                seconds, beside = timed(ours, w.nbytes), timed(theirs, 2 * N * K)
                report.line(f"{kind} {K} -> {N}, {M} rows", seconds, beside, size=w.nbytes)
    E, N, K = 8, 28672, 4096
    dense = torch.randn(E, N, K, dtype=torch.bfloat16, device="cuda")
    starts = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2], dtype=torch.int32, device="cuda")
    x = torch.randn(2, K, dtype=torch.bfloat16, device="cuda")
    beside = timed(lambda i: lambda: (F.linear(x[:1], dense[1]), F.linear(x[1:], dense[4])), COLD)
    for kind, w in (
        ("bf16", dense),
        ("int8", matmul.quantize(dense, "int8")),
        ("int4", matmul.quantize(dense, "int4")),
    ):
        size = 2 * N * K * {"bf16": 2, "int8": 1, "int4": 0.5625}[kind]
        seconds = timed(lambda i, w=w: lambda: matmul.routed(x, w, starts), COLD)
        report.line(f"experts {kind}, 2 of 8, {K} -> {N}", seconds, beside, size=size)


def bench_fusions(report: Lines):
    """The small ones, at 1, 32 and 8,192 tokens, against the same work in PyTorch's own operators."""
    H, inner, N, K, D = 4096, 14336, 32, 8, 128
    weight = torch.randn(H, dtype=torch.bfloat16, device="cuda")
    for T in (1, 32, 8192):
        x, residual = torch.randn(2, T, H, dtype=torch.bfloat16, device="cuda")
        gate, up = torch.randn(T, 2 * inner, dtype=torch.bfloat16, device="cuda").chunk(2, -1)
        qkv = torch.randn(T, N + 2 * K, D, dtype=torch.bfloat16, device="cuda")
        cos, sin = torch.randn(2, T, 1, D, dtype=torch.bfloat16, device="cuda")
        k, v = torch.zeros(2, T // PAGE + 1, PAGE, K, D, dtype=torch.bfloat16, device="cuda")
        plan = attention.plan([list(range(T // PAGE + 1))], [T], [T], PAGE, "cuda")

        def plain_norm(x=x, residual=residual):
            total = x + residual
            return total, F.rms_norm(total, (H,), weight, 1e-5)

        def plain_rope(qkv=qkv, cos=cos, sin=sin, k=k, v=v, plan=plan):
            turned = rotary.rotate(qkv[:, : N + K], cos, sin)
            attention.append(turned[:, N:], qkv[:, N + K :], k, v, plan)

        cases = (
            (f"add + RMSNorm, {T} tokens", lambda x=x, r=residual: norm.add_norm(x, r, weight, eps=1e-5),
             plain_norm, 8 * T * H),
            (f"silu_mul, {T} tokens", lambda g=gate, u=up: norm.silu_mul(g, u),
             lambda g=gate, u=up: F.silu(g) * u, 6 * T * inner),
            (f"rope_append, {T} tokens", lambda a=(qkv, cos, sin, k, v, plan): attention.rope_append(*a),
             plain_rope, 4 * T * (N + 2 * K) * D),
        )  # fmt: skip
        for name, ours, theirs, size in cases:
            seconds, beside = (timed(lambda i, f=f: f, COLD // 8) for f in (ours, theirs))
            report.line(name, seconds, beside, size=size)


def bench_block(report: Lines, device: str = "cuda", blocks: int = 16, steps: int = 200, **sizes: int):
    """One row's step through the server's executor, a Llama-3-8B block's share of it: the wall time, so with
    what the host does (plan, copies, one CUDA graph for all blocks)."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, **sizes}
    config = AutoConfig.for_model("llama", num_hidden_layers=blocks, num_attention_heads=32, **shape)
    H, inner = config.hidden_size, config.intermediate_size
    spec, dtype = pm.family_of(config).spec(config, 0), torch.bfloat16
    wide = {
        "qkv": ((spec.heads + 2 * spec.kv_heads) * spec.head_dim, H),
        "out": (H, H),
        "up": (2 * inner, H),
        "down": (H, inner),
    }
    for kind in pm.QUANT_TYPES:
        made = {}
        for index in range(blocks):
            weights = {f"norm{n}.weight": torch.ones(H, device=device, dtype=dtype) for n in (1, 2)}
            for name, (N, K) in wide.items():
                dense = torch.randn(N, K, device=device, dtype=dtype) / K**0.5
                weights[f"{name}.weight"] = dense if kind == "none" else matmul.quantize(dense, kind)
            made[index] = pm.Block(spec, weights)
        pool = pm.PagePool(dict.fromkeys(made, spec), 1024, dtype, device)
        executor = pm.Executor(made, config, pool)
        executor.start()
        tables, x = pm.RowTables(pool, [list(range(32))], []), torch.randn(1, 1, H)

        async def step(at: int, executor=executor, tables=tables, x=x):
            work = pm.Work(
                range(blocks), x, torch.zeros(blocks, 1, 0, H), tables=tables, start=at, whole=at + 1
            )
            began = time.perf_counter()
            await executor.submit(work)
            return time.perf_counter() - began

        times = sorted(pm.wire().call(step(at)) for at in range(steps))
        executor.stop()
        executor.join()
        size = blocks * sum(N * K for N, K in wide.values()) * (matmul.BYTES[kind] if kind != "none" else 2)
        report.line(
            f"step of one row, a block's share, {kind}", times[steps // 2] / blocks, None, size=size / blocks
        )


def packed_on_the_cpu() -> dict[str, dict[str, float]]:
    """Milliseconds of a product with 4096 x 1024 weights on this CPU, per format and number of rows; weights
    in turn from more sets than its caches hold."""
    dense = [torch.randn(4096, 1024) / 32 for _ in range(24)]
    figures = {}
    for kind in ("float32", "bfloat16", *matmul.KINDS):
        if kind in matmul.KINDS:
            weights = [matmul.pack(matmul.quantize(weight, kind)) for weight in dense]
        else:
            weights = [weight.to(getattr(torch, kind)) for weight in dense]
        for M in (1, 4, 16, 64, 256):
            x, times = torch.randn(M, 1024).to(torch.bfloat16 if kind == "bfloat16" else torch.float32), []
            for weight in (*weights[:3], *weights):
                began = time.perf_counter()
                matmul.linear(x, weight)
                times.append(time.perf_counter() - began)
            figures.setdefault(kind, {})[M] = round(1e3 * statistics.median(times[3:]), 3)
    rows = "".join(f"{M:>9}" for M in figures["float32"])
    print(f"     rows{rows}   ms ({torch.get_num_threads()} threads)")
    for kind, row in figures.items():
        print(f"{kind:>9}{''.join(f'{figure:9.3f}' for figure in row.values())}")
    return figures


@torch.inference_mode()
def kernels() -> None:
    """Question: how near do the kernels come to what the chip can do, and how near does PyTorch come? On a
    GPU the ceilings come first (bandwidth of a large copy, bfloat16 cuBLAS), then a line a kernel and size:
    its time, bytes or flops, share of the ceiling that binds it, and PyTorch's or cuBLAS's time for the same
    work. Times are medians of CUDA graph replays (no launch costs), over enough different buffers that
    nothing is read from L2. On a CPU, the packed formats beside float32."""
    torch.set_num_threads(os.cpu_count() or 1)
    if not torch.cuda.is_available() or attention.triton is None:
        print("no CUDA GPU (or no triton): no kernel was measured; this CPU's packed formats:")
        return report(bench="kernels", device=torch.backends.cpu.get_cpu_capability(), ms=packed_on_the_cpu())
    bandwidth, peak = ceilings()
    name = torch.cuda.get_device_name()
    print(f"{name}: copies {bandwidth / 1e12:.2f} TB/s, cuBLAS bfloat16 {peak / 1e12:.0f} TFLOPS (measured)")
    lines = Lines(bandwidth, peak)
    for measure in (bench_attention, bench_matmul, bench_fusions, bench_block):
        measure(lines)
    ceiling = {"bandwidth_TB_s": round(bandwidth / 1e12, 3), "bf16_TFLOPS": round(peak / 1e12, 1)}
    return report(bench="kernels", device=name, **ceiling, rows=lines.rows)


FORMATS = {"float32": [], **SMALLER}  # what a server is told, after --torch_dtype float32


@contextlib.contextmanager
def one_server(path: Path, kind: str, folder: Path):
    """A process on all cores that serves all blocks in this format, and its client's blocks' model."""
    options = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--throughput", 1.0]
    options += ["--torch_dtype", "float32", *FORMATS[kind]]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "XDG_CACHE_HOME": str(folder)}
    with Process(folder, "serve", path, "--new_swarm", *options, **threads) as server:
        hello = server.hello()
        where = {key: hello[key] for key in ("initial_peers", "dht_prefix")}
        yield pm.AutoDistributedModelForCausalLM.from_pretrained(path, dtype="float32", **where)


@torch.no_grad()
def quality(model: str | None = None, rows: int = 4, tokens: int = 512) -> None:
    """Question: what do smaller weights cost in quality? The perplexity of SmolLM2 (the demo's), its blocks
    on a server of each format, on the text of Python's own pydoc_data.topics."""
    path, losses, sizes = Path(model or pm._demo_checkpoint()), {}, {}
    torch.set_num_threads(os.cpu_count() or 1)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = transformers.AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    ids = ids[:, : rows * tokens].view(rows, tokens)
    checkpoint, config = pm.Checkpoint(path), pm.load_config(str(path), {})
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            held = kind.replace("float32", "none")
            block = pm.load_block(checkpoint, config, 0, torch.float32, "cpu", held)
            sizes[kind] = sum(weight.nbytes for weight in block.weights.values())
            with one_server(path, kind, Path(folder)) as client:
                losses[kind] = statistics.mean(
                    F.cross_entropy(client(row[None]).logits[0, :-1], row[1:]).item() for row in ids
                )
            more = 100 * math.expm1(losses[kind] - losses["float32"])
            print(f"{kind:8} perplexity {math.exp(losses[kind]):8.4f} ({more:+.3f} %), "
                  f"{sizes[kind] / 1e6:.2f} MB a block", flush=True)  # fmt: skip
    perplexity = {kind: round(math.exp(loss), 4) for kind, loss in losses.items()}
    report(bench="quality", text=f"{rows} x {tokens} tokens", perplexity=perplexity, block_bytes=sizes)


@torch.no_grad()
def smaller_weights(tokens: int = 60) -> None:
    """Question: what do smaller weights bring in speed? Steps of one row through a server of a Llama of 252M
    weights (15 blocks) on this CPU, all formats in turn. The ceiling is the weights' bytes at the speed of
    memory."""
    torch.set_num_threads(os.cpu_count() or 1)
    much = torch.ones(2**26)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        much.sum()
        seconds.append(time.perf_counter() - began)
    speed, times = much.nbytes / min(seconds), {kind: [] for kind in FORMATS}
    del much
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 15, "head_dim": 64}
    reference = make_model("llama", **shape, num_attention_heads=16, num_key_value_heads=16)
    count = sum(parameter.numel() for parameter in reference.model.layers.parameters())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path, sessions, x = save(reference, Path(folder) / "m"), {}, torch.randn(1, 1, 1024)
        del reference
        for kind in FORMATS:
            model = stack.enter_context(one_server(path, kind, Path(folder)))
            sessions[kind] = stack.enter_context(model.transformer.h.inference_session(max_length=2 * tokens))
        for _ in range(tokens // 10):
            for kind, session in sessions.items():
                for step in range(12):
                    began = time.perf_counter()
                    session.step(x)
                    times[kind] += [time.perf_counter() - began] * (step > 1)  # two to warm up
    print(f"memory is read at {speed / 1e9:.1f} GB/s; {count / 1e6:.0f} M weights")
    figures = {}
    for kind in FORMATS:
        took, floor = statistics.median(times[kind]), count * matmul.BYTES.get(kind, 4) / speed
        values = 1e3 * took, statistics.median(times["float32"]) / took, 1e3 * floor
        print("{:8} {:6.1f} ms a step, {:.2f} of float32's speed (memory: {:.1f} ms)".format(kind, *values))
        figures[kind] = dict(zip(("ms", "speed", "floor_ms"), (round(v, 2) for v in values), strict=True))
    report(bench="decode", weights=count, memory_GB_s=round(speed / 1e9, 1), **figures)


def movie_reviews(rated: float) -> list[tuple[str, int]]:
    """Sentences of film reviews in a fixed random order, with 1 for positive ones, else 0: those of 10,605
    whose ratings by 20 people, from -4 to 4, are on average at least `rated` from neutral. They are inside
    the source distribution of PyPI's vaderSentiment (MIT)."""
    with tempfile.TemporaryDirectory() as folder:
        pip = "-m pip --disable-pip-version-check download --no-deps --no-binary=:all: --dest"
        subprocess.run([sys.executable, *pip.split(), folder, "vaderSentiment==3.3.2"], check=True, stdout=2)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as archive:
                name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
                lines = archive.extractfile(name).read().decode().strip().split("\r\n")
    rows = [line.split("\t", 2) for line in lines]  # number, mean rating, sentence
    random.Random(0).shuffle(rows)
    return [(text.strip(), int(float(mean) > 0)) for _, mean, text in rows if abs(float(mean)) >= rated]


def train(
    steps: int = 40, batch: int = 16, rate: float = 0.01, held_out: int = 200, rated: float = 1.0
) -> None:
    """Question: what do 16 soft prompts learn of film reviews, in 40 steps through two servers whose blocks
    are frozen; and what does a step take beside transformers alone, frozen too, on the same cores? Both
    compute in the checkpoint's dtype; the servers keep the forward passes for the backward ones. The reviews
    are those rated at least 1 ("slightly" on the raters' scale) from neutral; --rated 0: all."""
    path, reviews = str(pm._demo_checkpoint()), movie_reviews(rated)
    tokenizer = AutoTokenizer.from_pretrained(path)
    words = [tokenizer(word).input_ids[0] for word in VERDICTS]
    swarm = pm.wire().call(pm.Swarm.join([], host_maddrs=["/ip4/127.0.0.1/tcp/0"]))
    peers = pm.wire().call(swarm.addresses())
    options = {"initial_peers": peers, "tuning_mode": "ptune", "pre_seq_len": 16}
    model = pm.AutoDistributedModelForCausalLM.from_pretrained(path, **options)
    base, start = model.transformer, tokenizer(INSTRUCTION).input_ids
    base.prompt_embeddings.weight.data.copy_(base.word_embeddings.weight[start[:16]])  # better than noise
    alone = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).requires_grad_(False).model

    def through_swarm(ids: torch.Tensor) -> torch.Tensor:
        return base(ids).last_hidden_state

    def by_transformers(ids: torch.Tensor) -> torch.Tensor:
        soft = base.prompt_embeddings.weight.to(model.dtype).expand(len(ids), -1, -1)
        embeds = torch.cat([soft, alone.embed_tokens(ids)], dim=1)
        return alone(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, 16:]

    def zero_shot(ids: torch.Tensor) -> torch.Tensor:
        return alone(ids, use_cache=False).last_hidden_state

    def judge(how, some: list[tuple[str, int]]) -> torch.Tensor:
        """[B, 2]: logits of the two verdicts as the word after the question."""
        rows = [torch.tensor(tokenizer(QUESTION.format(text)).input_ids) for text, _ in some]
        hidden = how(pad_sequence(rows, batch_first=True))  # causal: padding at the right needs no mask
        last = hidden[torch.arange(len(rows)), [len(row) - 1 for row in rows]]
        return (last @ model.lm_head.weight[words].T).float()

    @torch.no_grad()
    def accuracy(how) -> float:
        some = sorted(reviews[:held_out], key=lambda review: len(review[0]))
        parts = [some[at : at + 20] for at in range(0, len(some), 20)]
        verdicts = torch.cat([judge(how, part).argmax(1) for part in parts])
        return (verdicts == torch.tensor([label for _, label in some])).float().mean().item()

    optimizer = torch.optim.Adam([base.prompt_embeddings.weight], lr=rate)

    def step(how, number: int) -> tuple[float, float]:
        began, low = time.monotonic(), held_out + number * batch
        some = reviews[low : low + batch]
        loss = F.cross_entropy(judge(how, some), torch.tensor([label for _, label in some]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), time.monotonic() - began

    with pm._local_servers(path, model.config.num_hidden_layers, 2, peers):
        plain, before = accuracy(zero_shot), accuracy(through_swarm)
        print(
            f"{len(reviews)} sentences; accuracy on {held_out} of them: zero-shot {plain:.3f}, "
            f"with the instruction {before:.3f}"
        )
        seconds = []
        for number in range(steps):
            loss, took = step(through_swarm, number)
            seconds.append(took)
            print(f"step {number + 1}: loss {loss:.3f}, {took:.2f} s", flush=True)
        after = accuracy(through_swarm)
        torch.set_num_threads(os.cpu_count() or 1)  # the servers are idle from here on
        theirs = [step(by_transformers, number)[1] for number in range(8)]
    accuracies = {"zero_shot": round(plain, 3), "before": round(before, 3), "after": round(after, 3)}
    ours, theirs = (statistics.median(times[:8]) for times in (seconds, theirs))  # the same batches
    report(bench="train", steps=steps, rated=rated, **accuracies, step_s=round(ours, 2),
           transformers_step_s=round(theirs, 2), ratio=round(ours / theirs, 2))  # fmt: skip


QUESTION, VERDICTS = "Sentence: {}\nThe sentiment of this sentence is", (" negative", " positive")
INSTRUCTION = (
    "Read the following sentence from a movie review and decide whether the critic liked the film or not."
)


def backward(rows: int = 8, tokens: int = 128, repeats: int = 5) -> None:
    """Question: what do a forward and a backward pass of a frozen 250M-parameter Llama cost over two servers
    of one thread each, beside transformers alone, frozen too, with two threads? The gradient goes to the
    input embeddings. The servers keep the forward pass for the backward one, so that the floor is 1."""
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16)
    sizes |= dict(num_key_value_heads=16, vocab_size=24000, initializer_range=0.02)
    reference = make_model("llama", **sizes, head_dim=64).requires_grad_(False)
    swarm = pm.wire().call(pm.Swarm.join([], host_maddrs=["/ip4/127.0.0.1/tcp/0"]))
    options = {"initial_peers": pm.wire().call(swarm.addresses())}
    inputs = torch.randn(rows, tokens, 1024, requires_grad=True)

    def seconds(base) -> float:
        times = []
        for _ in range(repeats + 1):
            began = time.monotonic()
            base(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()
            times.append(time.monotonic() - began)
        return statistics.median(times[1:])

    with tempfile.TemporaryDirectory() as folder:
        path = str(save(reference, Path(folder) / "llama-250m"))
        with pm._local_servers(path, 16, 2, options["initial_peers"]):
            model = pm.AutoDistributedModelForCausalLM.from_pretrained(path, **options)
            ours = seconds(model.transformer)
            torch.set_num_threads(2)
            theirs = seconds(reference.model)
    count = round(sum(p.numel() for p in reference.parameters()) / 1e6)
    report(bench="backward", parameters_m=count, batch=[rows, tokens], swarm_s=round(ours, 2),
           transformers_s=round(theirs, 2), ratio=round(ours / theirs, 2))  # fmt: skip


# ============================================================================================================
# All of it, and the command line
# ============================================================================================================

# What is compared with transformers alone, or with a floor; and how little of it makes the short form.
SHORT = {
    overhead: dict(repeats=5, tokens=32),
    decode: dict(repeats=3, tokens=16),
    clients: dict(repeats=1, tokens=16, steps=10),
    prefill: dict(repeats=1),
    forward: dict(repeats=1),
    startup: dict(repeats=2),
    wan: dict(tokens=12, most=2, prompt=256),
    scale: dict(model="tiny", longest=2048),
    speculate: dict(repeats=1),
}
COMMANDS = [*SHORT, chaos, soak, chain, kernels, quality, backward, train]


def everything(plot: str = "") -> None:
    """A short form of all of it, then the README's table, and a picture of it in the file `plot`."""
    if plot:
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise Unavailable("--plot needs matplotlib: pip install 'petals-min[bench]'") from None
    table: dict[str, list[Row]] = {}
    for command, options in SHORT.items():
        print(f"\n--- {command.__name__} {options}", flush=True)
        try:
            table[command.__name__] = command(**options)
        except (Unavailable, pm.PetalsError) as error:
            print(f"not measured: {error}")
    print("\n| command | question | measured: median (min to max) | wanted | Petals |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in table.items():
        for row in rows:
            print(f"| `{name}` | {' | '.join(row.cells())} |")
    if plot:
        draw(plt, table, plot)
    figures = {name: [row.summary for row in rows] for name, rows in table.items()}
    report(bench="all", short=True, cores=os.cpu_count(), load=os.getloadavg()[0], figures=figures)


def draw(plt, table: dict[str, list[Row]], file: str) -> None:
    """Each figure by how many times better than wanted it is; dots: Petals."""
    rows = [(name, row) for name, rows in table.items() for row in rows if row.wanted is not None]
    figure, axes = plt.subplots(figsize=(11, 1 + 0.4 * len(rows)), layout="constrained")

    def better(row: Row, value: float) -> float:
        return value / row.wanted if row.more else row.wanted / value

    for place, (_, row) in enumerate(rows):
        low, middle, high = sorted(better(row, row.summary[key]) for key in ("min", "median", "max"))
        axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color="C0" if middle >= 1 else "C1")
        if row.petals is not None:
            axes.plot(better(row, row.petals), place, "ko")
    axes.axvline(1, color="black")
    axes.set(xscale="log", xlabel="times better than wanted (black dot: Petals)")
    axes.set_yticks(range(len(rows)), [f"{name}: {row.question}"[:90] for name, row in rows], fontsize=8)
    axes.invert_yaxis()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Without a command: a short form of all, and a table.")
    parser.add_argument("--plot", default="", metavar="FILE.png", help="draw that table, too")
    commands = parser.add_subparsers(dest="command")
    for function in COMMANDS:
        command = commands.add_parser(function.__name__, description=function.__doc__)
        for name, default in inspect.signature(function).parameters.items():
            kind = str if default.default is None else type(default.default)
            how = {"action": "store_true"} if kind is bool else {"type": kind, "default": default.default}
            command.add_argument(f"--{name}", **how)
    options = vars(parser.parse_args())
    name = options.pop("command")
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end with us
    try:
        if name is None:
            everything(**options)
        else:
            del options["plot"]
            globals()[name](**options)
    except Unavailable as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    main()
