"""What petals_min costs, measured: one command a question. Each prints the ceiling first, where there is one,
then what was measured, and ends with one line of JSON.

    python bench.py chaos [--generations 100]   what a user notices of servers that crash, freeze or are cut
    off python bench.py soak [--minutes 30]         whether anything goes wrong, hangs, grows or leaks under
    faults python bench.py chain [--tokens 60]         a token over three servers, 50 ms from the client, 1 ms
    apart

Servers run one thread each. Slow links and cuts need root, network namespaces and /dev/net/tun (see the
tests).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

import petals_min as pm
from test_petals_min import (
    CHAOS_SPANS,
    MODES,
    NEW,
    SEEDS,
    Clock,
    Faults,
    disturbed,
    make_model,
    prompt,
    save,
    undisturbed,
    until,
)

pm.logger.setLevel(os.environ.get("LOG", "ERROR"))


def report(**figures) -> None:
    print(json.dumps(figures), flush=True)


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
            after = chance.randrange(NEW // 3)
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


def memory(pid: int) -> float:
    """MiB that a process has for itself, shared pages in parts (PSS)."""
    with contextlib.suppress(ProcessLookupError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return math.nan  # it was ending


class Soak:
    """Clients that generate all the time, each in a thread with its own peer, and what came of it."""

    def __init__(self, faults: Faults, reference, clients: int):
        modes = [mode for mode in MODES if mode != "assistant"]  # one draft model cannot serve eight threads
        self.expected = {mode: undisturbed(reference, mode) for mode in modes}
        self.models = [faults.client() for _ in range(clients)]
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
                ids = self.models[index].generate(**prompt(mode, seed)).tolist()
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


def leaked(faults: Faults, swarm: pm.Swarm) -> int:
    """Cache tokens that are not free on the servers although nobody uses them."""
    spans = {host: span.split("@")[0].split(":") for host, span in faults.hosts.items()}
    full = {host: 8192 * (int(last) - int(first)) for host, (first, last) in spans.items()}
    with contextlib.suppress(AssertionError):
        until(lambda: faults.free_tokens(swarm) == full, 60)
    return sum(full.values()) - sum(faults.free_tokens(swarm).values())


def endure(faults: Faults, reference, minutes: float, clients: int = 8, period: float = 10) -> dict:
    """A fault every `period` seconds, undone half a period later; the figures."""
    chance, samples, count = random.Random(1), [], dict.fromkeys(["crash", "freeze", "cut"], 0)
    soak, start = Soak(faults, reference, clients), time.monotonic()
    while (now := time.monotonic()) - start < 60 * minutes:
        verb = chance.choice(["crash", "freeze"] + ["cut"] * (faults.net is not None))
        getattr(faults, verb)(chance.choice(list(faults.hosts)), chance.random() < 0.5)
        count[verb] += 1
        time.sleep(period / 2)
        faults.mend()
        time.sleep(max(0.0, now + period - time.monotonic()))
        pids = {host: faults.processes[host].popen.pid for host in faults.host_of.values()}
        servers = {host: (pid, memory(pid)) for host, pid in pids.items()}
        samples.append((time.monotonic() - start, memory(os.getpid()), servers))
        mean = statistics.mean(mib for _, mib in servers.values())
        print(f"{samples[-1][0]:6.0f} s: {sum(soak.done)} generations, client {samples[-1][1]:.0f} MiB, "
              f"servers {mean:.0f} MiB, {verb}", flush=True)  # fmt: skip
    faults.mend()
    hung = soak.end()
    settled = [sample for sample in samples if sample[0] > min(300, 30 * minutes)]
    first, last = settled[0][2], settled[-1][2]
    grown = [round(last[h][1] - mib, 1) for h, (pid, mib) in first.items() if last.get(h, [0])[0] == pid]
    return {"minutes": minutes, "generations": sum(soak.done), "faults": count, "wrong": len(soak.wrong),
            "errors": soak.errors[:5], "hung": hung, "slowest_generation_s": round(max(soak.slowest), 1),
            "client_mib": [round(settled[0][1]), round(settled[-1][1])], "server_growth_mib": grown,
            "leaked_tokens": leaked(faults, soak.models[0].remote.router.swarm)}  # fmt: skip


def soak(minutes: float = 30) -> None:
    """Question: does anything go wrong, hang, grow or leak when servers fail for half an hour?"""
    reference = make_model("llama")
    with faulty_swarm(reference, CHAOS_SPANS) as faults:
        report(bench="soak", **endure(faults, reference, minutes))


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


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("chaos").add_argument("--generations", type=int, default=100)
    commands.add_parser("soak").add_argument("--minutes", type=float, default=30)
    commands.add_parser("chain").add_argument("--tokens", type=int, default=60)
    options = vars(parser.parse_args())
    globals()[options.pop("command")](**options)


if __name__ == "__main__":
    main()
