"""Several processes, of which one dies, hangs, fails alone, sees other images or gets a signal;
torchrun's restarts, on one machine and on two; reading processes that die."""
import ctypes
import os
import signal
import subprocess
import time
from functools import partial

import pytest
import torch
import torch.distributed.run as torchrun

import checkpoint
import data
import run
from conftest import QUIET, STAGES, Started, child, folder_of, log_of, options, saved
from test_faults import after_step, slow_steps


# --------------------------------------------------------------------------------- what one does
def die(job):
    """Gone without a word, before the gradients of a step are averaged."""
    os._exit(9)


def stop(job):
    """Hangs for good, with all its threads."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(job):
    """The main thread alone does: as in a read from a disk that does not answer."""
    time.sleep(1000)


def fail(job):
    raise run.RunError(f"rank {job.env.rank}: 20 images in a row cannot be read")


def machine_of_its_own():
    os.environ["LOCAL_WORLD_SIZE"] = "1"


def fewer_images():
    machine_of_its_own()
    drawn = data.embedded
    data.embedded = lambda train=True, *more: drawn(train, *more).select(range(64 if train else 50))


def no_last_pt():
    machine_of_its_own()
    run.Job.path = lambda self, name: os.path.join(self.out, "elsewhere", name)


DISTRIBUTED = ["--epochs", "2", "--timeout-minutes", "0.1", "--batch-size", "15"]


# the last is over at once, the others when their time is
FAULTS = {"graft_train": (2, stop), "finetune": (0, hang), "mae_pretrain": (1, die)}


@pytest.fixture(scope="module")
def faulty(server, encoder, tmp_path_factory):
    """Runs of three processes; each is begun when the one before has met, since most of their
    time is waiting."""
    jobs, place = {}, tmp_path_factory.mktemp("faulty")
    for stage, (lost, fault) in FAULTS.items():
        more = options(stage, encoder, place / stage, *DISTRIBUTED)
        job = Started(server, place / f"{stage}.txt", stage, *more, processes=3,
                      prepare={lost: partial(after_step, 3, fault)})
        jobs[stage] = job.until(" step 2/")
    yield place, jobs
    for job in jobs.values():
        for process in job.jobs:
            process.kill()
            process.join()


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_dies_or_hangs_is_named(faulty, stage):
    (place, jobs), lost = faulty, FAULTS[stage][0]
    job, others = jobs[stage], [r for r in range(3) if r != lost]
    for r in others:
        job.jobs[r].join(120)
    assert [job.jobs[r].exitcode for r in others] == [1, 1], job.said()
    error, = job.errors()
    assert f"rank {lost} of 3 died or hangs" in error
    assert saved(place / stage)["step"] >= 1


def impatient(then=None):
    """The others end 12 seconds after an error, which a test need not wait for."""
    run.SIGN_IN_SECONDS = 1.0
    if then:
        then()


def test_an_error_of_one_process_is_told_once_and_ends_all(start, encoder, tmp_path):
    ends = partial(impatient, partial(after_step, 3, fail))
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path, *DISTRIBUTED),
                processes=3, prepare={0: impatient, 1: ends, 2: impatient})
    assert job.codes() == [1] * 3, job.said()
    error, = job.errors()
    assert error.endswith("error: rank 1: 20 images in a row cannot be read")


def test_processes_that_see_different_images_are_named_at_once(start, encoder, tmp_path):
    job = start("finetune", *options("finetune", encoder, tmp_path / "out", *DISTRIBUTED),
                processes=3,
                prepare={0: machine_of_its_own, 1: machine_of_its_own, 2: fewer_images})
    assert job.codes() == [2, 2, 2], job.said()
    error, = job.errors()
    assert "different numbers of images: 96 on ranks 0, 1; 64 on rank 2" in error
    assert not (tmp_path / "out").exists()


def test_processes_with_different_folders_are_named(start, encoder, tmp_path):
    """--out on a disk of its own for each machine: only rank 0 finds the checkpoint."""
    more = options("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    assert start("mae_pretrain", *more).codes() == [0]
    job = start("mae_pretrain", *more, processes=2,
                prepare={0: machine_of_its_own, 1: no_last_pt})
    assert job.codes() == [2, 2], job.said()
    error, = job.errors()
    assert "6 on rank 0; 0 on rank 1" in error and len(log_of(tmp_path)) == 6


def test_a_signal_to_one_stops_all_and_one_process_can_go_on(start, encoder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--epochs", "5", "--lr", "0.005", "--log-every", "100000", "--save-minutes", "1000"]
    assert start("graft_train", *options("graft_train", encoder, whole, *more)).codes() == [0]
    job = start("graft_train", *options("graft_train", encoder, parts, *more), processes=2,
                prepare=slow_steps)
    job.until(" step 6/")
    os.kill(job.jobs[1].pid, signal.SIGTERM)
    assert job.codes() == [128 + signal.SIGTERM] * 2, job.said()
    first = saved(parts)["step"]
    assert 6 <= first < 30 and log_of(parts)[-1]["step"] == first
    job = start("graft_train", *options("graft_train", encoder, parts, *more))
    assert job.codes() == [0] and f"at step {first} of 30" in job.said()
    name = "base_encoder.blocks.2.mlp.fc1.weight"
    one, two = (saved(out)["model"][name] for out in (whole, parts))
    way = one - saved(encoder, "encoder.pt")["model"][name.removeprefix("base_encoder.")]
    assert (two - one).norm() < 0.02 * way.norm()


# --------------------------------------------------------------------------------- torchrun itself
ALONE = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--batch-size", "8", "--lr",
         "0.01", "--log-every", "1", "--save-minutes", "1e-9", "--warmup-epochs", "0", *QUIET]


@pytest.fixture
def images(tmp_path):
    return folder_of(tmp_path / "images", [f"{i}.png" for i in range(36)])


def until(logs, words, alive, seconds=120):
    end = time.monotonic() + seconds
    while words not in "".join(log.read_text() for log in logs if log.exists()):
        assert time.monotonic() < end and alive(), [log.read_text()[-3000:] for log in logs]
        time.sleep(0.02)


def workers_of(parent):
    """Processes whose parent this is."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                if int(f.read().rsplit(")", 1)[1].split()[1]) == parent:
                    found.append(int(pid))
        except (OSError, IndexError):
            continue
    return found


def agent(*words):
    """torchrun as a process of ours: the same agent, and its processes are forked."""
    args = torchrun.parse_args([*map(str, words[:-2]), "mae_pretrain.py"])
    config = torchrun.config_from_args(args)[0]
    config.start_method = "fork"
    torchrun.elastic_launch(config, worker)("mae_pretrain", *words[-2:], {}, None)


def worker(*what):
    try:
        child(*what)
    except SystemExit as end:
        if end.code:
            raise


def test_torchrun_brings_a_killed_process_back(server, images, tmp_path):
    log, out = tmp_path / "said.txt", tmp_path / "out"
    what = ["--data", images, *ALONE, "--epochs", "3", "--out", str(out)]
    meet = ["--nproc_per_node", 2, "--max-restarts", 2, "--rdzv_backend", "c10d",
            "--rdzv_endpoint", "localhost:0"]               # --standalone's
    job = server.Process(target=agent, args=(*meet, what, str(log)))
    job.start()
    until([log], " step 5/12 ", job.is_alive)
    os.kill(max(workers_of(job.pid)), signal.SIGKILL)
    job.join(180)
    assert job.exitcode == 0, log.read_text()[-3000:]
    assert "resumed " in log.read_text()
    assert saved(out)["step"] == 12 and [line["step"] for line in log_of(out)] == [*range(1, 13)]


def test_two_machines_go_on_after_one_was_lost(start, server, images, tmp_path):
    """Two agents of torchrun meet on the loopback; one is killed, then both are started again."""
    out = {name: tmp_path / name for name in ("one", "two")}
    more = ["--data", images, *ALONE, "--epochs", "5"]
    assert start("mae_pretrain", *more, "--out", out["one"]).codes() == [0]
    port, said = 20_000 + os.getpid() % 30_000, [tmp_path / f"node{node}.txt" for node in (0, 1)]

    def agents(attempt):
        found = []
        for node in range(2):
            meet = ["--nnodes", 2, "--nproc_per_node", 1, "--node_rank", node, "--max-restarts", 0,
                    "--rdzv_backend", "c10d", "--rdzv_id", attempt, "--rdzv_endpoint",
                    f"127.0.0.1:{port + attempt}", "--local_addr", "127.0.0.1"]
            run_of = [*more, "--out", str(out["two"]), "--timeout-minutes", "0.1"]
            found.append(server.Process(target=agent, args=(*meet, run_of, str(said[node]))))
            found[-1].start()
        return found

    first, second = agents(0)
    until(said, " step 7/20 ", first.is_alive)
    for pid in [second.pid, *workers_of(second.pid)]:       # the power is off
        os.kill(pid, signal.SIGKILL)
    first.join(90)
    second.join()
    assert first.exitcode == 1 and second.exitcode == -signal.SIGKILL
    assert 7 <= saved(out["two"])["step"] < 20
    again = agents(1)
    for job in again:
        job.join(120)
    words = said[0].read_text() + said[1].read_text()
    assert [job.exitcode for job in again] == [0, 0] and "resumed " in words, words
    one, two = (saved(place)["model"] for place in out.values())
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)
    assert [line["step"] for line in log_of(out["two"])] == list(range(1, 21))


# --------------------------------------------------------------------- reading processes, pipes
def reading(start, tmp_path, prepare=None):
    """A run that reads files in two processes."""
    root = folder_of(tmp_path / "images", [f"{i}.jpg" for i in range(40)], (80, 90))
    folder_of(tmp_path / "images", ["other.jpg"], (50, 90))                 # they stay files
    return start("mae_pretrain", "--data", root, "--out", tmp_path / "out", *ALONE, "--img-size",
                 "64", "--workers", "2", "--epochs", "99", "--save-minutes", "9", prepare=prepare)


def test_a_reading_process_that_is_killed_ends_the_run_in_a_line(start, tmp_path):
    job = reading(start, tmp_path).until(" step 3/")
    os.kill(workers_of(job.jobs[0].pid)[-1], signal.SIGKILL)
    assert job.codes() == [1], job.said()
    error, = job.errors()
    assert "DataLoader worker" in error


def test_a_stop_of_the_whole_group_leaves_the_readers_to_the_run(start, tmp_path):
    """torchrun, Slurm, timeout and a Ctrl-C signal all processes of a group, readers too."""
    job = reading(start, tmp_path, os.setpgrp).until(" step 3/")
    os.killpg(job.jobs[0].pid, signal.SIGTERM)
    assert job.codes() == [128 + signal.SIGTERM], job.said()
    assert "stopped by SIGTERM" in job.said() and saved(tmp_path / "out")["step"] >= 3


def little_shared_memory():
    ctypes.CDLL(None).unshare(0x20000)                      # CLONE_NEWNS: mounts of its own
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)


def test_a_tiny_shared_memory_ends_in_a_line(start, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    job = reading(start, tmp_path, little_shared_memory)
    assert job.codes() == [1], job.said()
    error, = job.errors()
    assert "/dev/shm" in error


def nobody_reads():
    pipe = os.pipe()
    os.close(pipe[0])
    os.dup2(pipe[1], 1)


def test_a_reader_of_the_output_that_has_seen_enough_ends_it_without_a_traceback(start, tmp_path):
    """`... | head -1`: nobody reads any more when the program writes."""
    job = start("mae_pretrain", *options("mae_pretrain", None, tmp_path), prepare=nobody_reads)
    assert job.codes() == [128 + signal.SIGPIPE] and not job.said()


def nowhere_to_write():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_a_full_disk_under_the_output_ends_in_a_line(start, tmp_path):
    job = start("mae_pretrain", *options("mae_pretrain", None, tmp_path), prepare=nowhere_to_write)
    assert job.codes() == [1], job.said()
    error, = job.errors()
    assert "what it prints: No space left on device" in error


def only_the_first_reads():
    """Two processes of one machine, of which the second has no disk."""
    if os.environ["RANK"] == "1":
        def nothing(*args, **options):
            raise OSError("the second process reads")

        data.load = checkpoint.read = checkpoint.read_encoder = nothing


@pytest.mark.parametrize("program, more", [("graft_train", []), ("finetune", []),
                                           ("evaluate", ["--mode", "knn", "--k", "5,100"])])
def test_one_process_of_a_machine_reads_for_all(start, encoder, tmp_path, program, more):
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--checkpoint", encoder, *QUIET, *more]
    for out, n in ((one, 1), (two, 2)):
        command = [*common, "--out", out] if program == "evaluate" else options(
            program, encoder, out, "--epochs", "1")
        for _ in range(n):                                  # the second goes on from the end
            job = start(program, *command, processes=n, prepare=n == 2 and only_the_first_reads)
            assert job.codes() == [0] * n, job.said()
    if program == "evaluate":                               # each had half of the bank
        results = [run.read_results(out / "results.jsonl")[-1]["by_k"] for out in (one, two)]
        assert results[0] == results[1]
    else:
        first, same = (log_of(out)[0]["loss"] for out in (one, two))
        assert first == pytest.approx(same, rel=1e-5) and "resumed" in job.said()


def test_what_the_reading_process_meets_is_told_once(start, encoder, tmp_path):
    command = options("mae_pretrain", encoder, tmp_path / "out", "--data", tmp_path / "none")
    job = start("mae_pretrain", *command, processes=2, prepare=only_the_first_reads)
    assert job.codes() == [2, 2], job.said()
    error, = job.errors()
    assert "none" in error
