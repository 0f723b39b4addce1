"""What petals_min costs, measured: one command a question. Each prints the ceiling first, where there is one,
then what was measured, and ends with one line of JSON.

    python bench.py chaos [--generations 100]  what a user notices of servers that crash, freeze or are cut
    python bench.py soak [--minutes 30]        whether anything goes wrong, hangs, grows or leaks under faults
    python bench.py chain [--tokens 60]        a token over three servers, 50 ms from the client, 1 ms apart
    python bench.py backward [--repeats 5]     one forward and backward pass beside transformers alone
    python bench.py train [--steps 40]         what soft prompts learn through two servers, and a step's time

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
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import petals_min as pm
from test_petals_min import (
    CHAOS_SPANS,
    MODES,
    NEW,
    SEEDS,
    Clock,
    Faults,
    disturbed,
    generate,
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


def soak(minutes: float = 30, clients: int = 8, period: float = 10) -> None:
    """Question: does anything go wrong, hang, grow or leak when servers fail for half an hour?"""
    chance, reference, over = random.Random(1), make_model("llama"), threading.Event()
    modes = [mode for mode in MODES if mode != "assistant"]  # one draft model cannot serve eight threads
    expected = {mode: undisturbed(reference, mode) for mode in modes}
    done, wrong, errors, slowest = [0] * clients, [], [], [0.0] * clients
    with faulty_swarm(reference, CHAOS_SPANS) as faults:
        models = [faults.client() for _ in range(clients)]
        sampling = threading.Lock()

        def use(index: int) -> None:
            for mode in itertools.cycle(modes):
                if over.is_set():
                    return
                began = time.monotonic()
                try:
                    if mode == "sampling":  # torch's generator is the process's own
                        with sampling:
                            ids = generate(models[index], mode, SEEDS["llama"][mode]).tolist()
                    else:
                        ids = models[index].generate(**prompt(mode, SEEDS["llama"][mode])).tolist()
                except Exception as error:
                    errors.append(f"client {index}, {mode}: {error!r}")
                    continue
                slowest[index] = max(slowest[index], time.monotonic() - began)
                done[index] += 1
                if ids != expected[mode]:
                    wrong.append((index, mode))

        threads = [threading.Thread(target=use, args=(index,), daemon=True) for index in range(clients)]
        for thread in threads:
            thread.start()
        start, samples, faults_done = time.monotonic(), [], {"crash": 0, "freeze": 0, "cut": 0}
        while (now := time.monotonic()) - start < 60 * minutes:
            verb = chance.choice(["crash", "freeze"] + ["cut"] * (faults.net is not None))
            getattr(faults, verb)(chance.choice(list(faults.hosts)), chance.random() < 0.5)
            faults_done[verb] += 1
            time.sleep(period / 2)
            faults.mend()
            time.sleep(max(0.0, now + period - time.monotonic()))
            client = memory(os.getpid())
            pids = {host: faults.processes[host].popen.pid for host in faults.host_of.values()}
            servers = {host: (pid, memory(pid)) for host, pid in pids.items()}
            samples.append((time.monotonic() - start, client, servers))
            mean = statistics.mean(mib for _, mib in servers.values())
            figures = f"{sum(done)} generations, client {client:.0f} MiB, servers {mean:.0f} MiB"
            print(f"{samples[-1][0]:6.0f} s: {figures}, {verb}", flush=True)
        over.set()
        faults.mend()
        patience = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.0, patience - time.monotonic()))
        hung = sum(thread.is_alive() for thread in threads)
        swarm = models[0].remote.router.swarm
        spans = {host: span.split("@")[0].split(":") for host, span in faults.hosts.items()}
        full = {host: 8192 * (int(last) - int(first)) for host, (first, last) in spans.items()}
        with contextlib.suppress(AssertionError):
            until(lambda: faults.free_tokens(swarm) == full, 60)
        leaked = {host: full[host] - free for host, free in faults.free_tokens(swarm).items()}
    settled = [sample for sample in samples if sample[0] > min(300, 30 * minutes)]
    grown = []  # of the servers' processes that lived from then to the end
    for host, (pid, mib) in settled[0][2].items():
        last_pid, last_mib = settled[-1][2].get(host, (0, 0.0))
        if pid == last_pid:
            grown.append(last_mib - mib)
    report(bench="soak", minutes=minutes, generations=sum(done), faults=faults_done, wrong=len(wrong),
           errors=errors[:5], hung=hung, slowest_generation_s=round(max(slowest), 1),
           client_mib=[round(settled[0][1]), round(settled[-1][1])],
           server_growth_mib=[round(g, 1) for g in grown], leaked_tokens=sum(leaked.values()))  # fmt: skip


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


def movie_reviews() -> list[tuple[str, int]]:
    """About 10,600 sentences of film reviews in a fixed random order, with 1 for those that 20 people found
    rather positive, else 0. They are inside the source distribution of PyPI's vaderSentiment (MIT)."""
    with tempfile.TemporaryDirectory() as folder:
        pip = "-m pip --disable-pip-version-check download --no-deps --no-binary=:all: --dest"
        subprocess.run([sys.executable, *pip.split(), folder, "vaderSentiment==3.3.2"], check=True, stdout=2)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=inner) as archive:
                name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
                lines = archive.extractfile(name).read().decode().strip().split("\r\n")
    rated = [line.split("\t", 2) for line in lines]  # number, mean rating from -4 to 4, sentence
    reviews = [(sentence.strip(), int(float(rating) > 0)) for _, rating, sentence in rated]
    random.Random(0).shuffle(reviews)
    return reviews


def train(steps: int = 40, batch: int = 16, rate: float = 0.01, held_out: int = 200) -> None:
    """Question: what do 16 soft prompts learn of film reviews, in 40 steps through two servers whose blocks
    are frozen; and what does a step take beside transformers alone, frozen too, on the same cores? Both
    compute in the checkpoint's dtype; the servers compute each block's forward pass a second time."""
    path, reviews = str(pm._demo_checkpoint()), movie_reviews()
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
        print(f"accuracy on {held_out} sentences: zero-shot {plain:.3f}, with the instruction {before:.3f}")
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
    report(bench="train", steps=steps, **accuracies, step_s=round(ours, 2),
           transformers_step_s=round(theirs, 2), ratio=round(ours / theirs, 2))  # fmt: skip


QUESTION, VERDICTS = "Review: {}\nSentiment:", (" negative", " positive")
INSTRUCTION = (
    "Read the following sentence from a movie review and decide whether the critic liked the film or not."
)


def backward(rows: int = 8, tokens: int = 128, repeats: int = 5) -> None:
    """Question: what do a forward and a backward pass of a frozen 250M-parameter Llama cost over two servers
    of one thread each, beside transformers alone, frozen too, with two threads? The gradient goes to the
    input embeddings. Each block's forward pass is computed twice, so that the floor is 1.5."""
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


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("chaos").add_argument("--generations", type=int, default=100)
    commands.add_parser("soak").add_argument("--minutes", type=float, default=30)
    commands.add_parser("chain").add_argument("--tokens", type=int, default=60)
    commands.add_parser("backward").add_argument("--repeats", type=int, default=5)
    commands.add_parser("train").add_argument("--steps", type=int, default=40)
    options = vars(parser.parse_args())
    globals()[options.pop("command")](**options)


if __name__ == "__main__":
    main()
