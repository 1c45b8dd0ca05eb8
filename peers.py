"""The processes of one run: they meet, see that they agree, vote, and name the one that fails the others.

All through the store in which torchrun's processes meet, never through the GPU: nothing here waits for a device.
"""
import json
import os
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from data import RunError, UsageError

GLANCE_SECONDS = 1.0        # between looks at whether another process met a failure
SIGN_IN_SECONDS = 3 * GLANCE_SECONDS                                        # that a living process gets to say so then

store = None                # of this process, once connected; None where a run is one process
rank, processes, minutes = 0, 1, 10.0
asked = 0                   # questions so far, the same number on every process
gone = set()                # the ranks that did not answer
listener = None             # the thread of `listen`
over = threading.Event()    # this process is done with the others


def connect(backend, timeout_minutes):
    """Join the other processes, whom torchrun's environment names; who stays silent longer than this is given up."""
    global store, rank, processes, minutes, listener
    limit = timedelta(minutes=timeout_minutes)
    rank, processes, minutes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_minutes
    try:
        store, _, _ = next(rendezvous("env://", timeout=limit))
        # torchrun's agent keeps its store when it starts the processes again, and with it what the dead ones wrote
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # NCCL's own watchdog aborts the process without a word on who is missing, so it gets more time than a vote
        dist.init_process_group(backend, store=dist.PrefixStore("default", store), rank=rank, world_size=processes,
                                timeout=limit * (2 if backend == "nccl" else 1))
        over.clear()
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank}: the {processes} processes did not meet within {timeout_minutes:g} minutes "
                       f"({str(error).splitlines()[0]})") from None


def ask(question, value):
    """What every process answers to the same question, by rank: JSON values. A RunError names those that do not."""
    global asked
    asked += 1
    keys = [f"{asked}/{r}" for r in range(processes)]
    end = time.monotonic() + 60 * minutes
    try:
        store.set(keys[rank], json.dumps(value))
        while not arrived(keys, GLANCE_SECONDS):
            if time.monotonic() > end or store.check(["failure"]):
                raise roll_call() or RunError(f"the processes lost each other while they compared {question}")
        answers = [json.loads(store.get(key)) for key in keys]
        if asked > 2:
            store.delete_key(f"{asked - 2}/{rank}")                         # everyone has read what is that old
        return answers
    except dist.DistError:
        raise RunError("rank 0 died or hangs: the store in which the processes meet does not answer") from None


def arrived(keys, seconds):
    """Whether all these keys are in the store, after waiting for them at most so long. Asks again and again:
    the store's own waiting writes lines to the screen when its time is over."""
    end, pause = time.monotonic() + seconds, 0.0005
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def listen():
    """Sign in when another process calls, even while this one is stuck in a collective; then end with the others."""
    try:
        while not store.check(["failure"]):
            if over.wait(GLANCE_SECONDS):
                return
        store.set(f"alive/{rank}", "")
        time.sleep(4 * SIGN_IN_SECONDS)
    except RuntimeError:                                                    # the store has gone with rank 0
        return
    os._exit(1)


def roll_call():
    """A RunError that names the processes that do not answer any more, or None if all do.

    A process that has died or was stopped does not sign in at all. One that hangs by itself is alive and does not
    wait for the others, as they do.
    """
    store.set("failure", "")
    for word in ("alive", "waiting"):
        store.set(f"{word}/{rank}", "")
    arrived([f"waiting/{r}" for r in range(processes)], SIGN_IN_SECONDS)
    for word in ("alive", "waiting"):
        lost = [r for r in range(processes) if not store.check([f"{word}/{r}"])]
        if lost:
            gone.update(lost)
            return RunError(f"{named(lost)} of {processes} died or hangs, the others went on waiting for it. "
                            "What was saved is intact; the same command goes on from it")
    return None


def named(ranks):
    """rank 3, or ranks 1, 2."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def same(what, value):
    """Every process must see the same value; a UsageError names those that do not."""
    if store is None:
        return
    seen = {}
    for r, answer in enumerate(ask(what, value)):
        seen.setdefault(answer, []).append(r)
    if len(seen) > 1:
        found = "; ".join(f"{answer} on {named(ranks)}" for answer, ranks in seen.items())
        raise UsageError(f"the processes see different {what}: {found}. Give all of them the same files")


def blame(error):
    """After a RuntimeError: a RunError that names the processes that do not answer any more, or None if all do."""
    said = str(error).lower()
    if store is None or not (isinstance(error, dist.DistError) or "gloo" in said or "nccl" in said):
        return None
    try:
        if store.check(["errors"]):                                         # one of them has said what is wrong
            return RunError("another process has failed")
        return roll_call()
    except RuntimeError:
        return RunError("rank 0 died or hangs: the store in which the processes meet does not answer")


def part():
    """The run is done: stop listening, for a thread that asks the store while Python shuts down aborts the process."""
    over.set()
    listener.join()
    dist.destroy_process_group()


def leave():
    """Before this process ends with an error: rank 0, in whom the store may be, lets the others end before it."""
    try:
        store.set(f"left/{rank}", "")
        if rank == 0:
            arrived([f"left/{r}" for r in range(processes) if r not in gone], SIGN_IN_SECONDS)
    except RuntimeError:
        return


def speaks():
    """Whether this process is the one to print an error that several may have: the first to come."""
    if store is None:
        return int(os.environ.get("RANK", 0)) == 0
    try:
        return store.add("errors", 1) == 1
    except RuntimeError:
        return True
