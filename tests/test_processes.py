"""Several processes, of which one dies, hangs, fails alone, sees other images or gets a signal;
torchrun's restarts, on one machine and on two; reading processes that die."""
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import checkpoint
import data
import run
from conftest import QUIET, ROOT, folder_of, log_of, options, saved
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


def fewer_images():
    drawn = data.embedded
    data.embedded = lambda train=True, *more: drawn(train, *more).select(range(64 if train else 50))


def no_last_pt():
    run.Job.path = lambda self, name: os.path.join(self.out, "elsewhere", name)


DISTRIBUTED = ["--epochs", "2", "--timeout-minutes", "0.1", "--batch-size", "15"]


@pytest.mark.parametrize("stage, fault, lost", [("mae_pretrain", die, 1), ("graft_train", stop, 2),
                                                ("finetune", hang, 0)])
def test_a_process_that_dies_or_hangs_is_named(start, encoder, tmp_path, stage, fault, lost):
    job = start(stage, *options(stage, encoder, tmp_path / "out", *DISTRIBUTED), processes=3,
                prepare={lost: partial(after_step, 3, fault)})
    others = [r for r in range(3) if r != lost]
    for r in others:
        job.jobs[r].join(60)
    job.jobs[lost].kill()
    assert [job.jobs[r].exitcode for r in others] == [1, 1], job.said()
    error, = job.errors()
    assert f"rank {lost} of 3 died or hangs" in error
    assert saved(tmp_path / "out")["step"] >= 1


def test_an_error_of_one_process_is_told_once_and_ends_all(start, encoder, tmp_path):
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path, *DISTRIBUTED),
                processes=3, prepare={1: partial(after_step, 3, fail)})
    assert job.codes() == [1] * 3, job.said()
    error, = job.errors()
    assert error.endswith("error: rank 1: 20 images in a row cannot be read")


@pytest.mark.parametrize("stage", ["mae_pretrain", "finetune"])
def test_processes_that_see_different_images_are_named_at_once(start, encoder, tmp_path, stage):
    job = start(stage, *options(stage, encoder, tmp_path / "out", *DISTRIBUTED), processes=3,
                prepare={2: fewer_images})
    assert job.codes() == [2, 2, 2], job.said()
    error, = job.errors()
    assert "different numbers of images: 96 on ranks 0, 1; 64 on rank 2" in error
    assert not (tmp_path / "out").exists()


def test_processes_with_different_folders_are_named(start, encoder, tmp_path):
    """--out on a disk of its own for each machine: only rank 0 finds the checkpoint."""
    more = options("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    assert start("mae_pretrain", *more).codes() == [0]
    job = start("mae_pretrain", *more, processes=2, prepare={1: no_last_pt})
    assert job.codes() == [2, 2], job.said()
    error, = job.errors()
    assert "6 on rank 0; 0 on rank 1" in error and len(log_of(tmp_path)) == 6


def test_a_signal_to_one_stops_all_and_one_process_can_go_on(start, encoder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--epochs", "10", "--lr", "0.005", "--log-every", "100000", "--save-minutes", "1000"]
    assert start("graft_train", *options("graft_train", encoder, whole, *more)).codes() == [0]
    job = start("graft_train", *options("graft_train", encoder, parts, *more), processes=2,
                prepare=slow_steps)
    job.until(" step 6/")
    os.kill(job.jobs[1].pid, signal.SIGTERM)
    assert job.codes(30) == [128 + signal.SIGTERM] * 2, job.said()
    first = saved(parts)["step"]
    assert 6 <= first < 60 and log_of(parts)[-1]["step"] == first
    job = start("graft_train", *options("graft_train", encoder, parts, *more))
    assert job.codes() == [0] and f"at step {first} of 60" in job.said()
    name = "base_encoder.blocks.2.mlp.fc1.weight"
    one, two = (saved(out)["model"][name] for out in (whole, parts))
    way = one - saved(encoder, "encoder.pt")["model"][name.removeprefix("base_encoder.")]
    assert (two - one).norm() < 0.02 * way.norm()


def test_uneven_shares_of_the_test_images_are_counted_once_each(start, encoder, tmp_path):
    """50 test images on three processes: 17, 17 and 16 of them."""
    found, plain = {}, ["--mixup", "0", "--erasing", "0", "--drop-path", "0", "--lr", "1e-4"]
    for n in (1, 3):
        out = tmp_path / str(n)
        tune = options("finetune", encoder, out, "--epochs", "1", "--batch-size", "15", *plain)
        nearest = ["--mode", "knn", "--k", "5", "--checkpoint", encoder, *QUIET, "--out", out]
        for stage, more in (("finetune", tune), ("evaluate", nearest)):
            job = start(stage, *more, processes=n)
            assert job.codes() == [0] * n, job.said()
        found[n] = run.read_results(out / "results.jsonl")
    for one, three in zip(found[1], found[3]):
        assert one["tested"] == three["tested"] == 50
        assert abs(one["top1"] - three["top1"]) <= 2        # rounding may turn one image


# --------------------------------------------------------------------------------- torchrun itself
ALONE = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--batch-size", "8", "--lr",
         "0.01", "--log-every", "1", "--save-minutes", "1e-9", "--warmup-epochs", "0", *QUIET]


@pytest.fixture
def images(tmp_path):
    return folder_of(tmp_path / "images", [f"{i}.png" for i in range(36)])


def torchrun(log, *arguments):
    with open(log, "a") as f:
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
        return subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True, cwd=ROOT)


def until(logs, words, job, seconds=120):
    end = time.monotonic() + seconds
    while words not in "".join(log.read_text() for log in logs):
        assert time.monotonic() < end and job.poll() is None, logs[0].read_text()[-3000:]
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


def test_torchrun_brings_a_killed_process_back(images, tmp_path):
    log, out = tmp_path / "said.txt", tmp_path / "out"
    job = torchrun(log, "--standalone", "--nproc_per_node", 2, "--max-restarts", 2,
                   "mae_pretrain.py", "--data", images, "--out", out, *ALONE, "--epochs", 3)
    until([log], " step 5/12 ", job)
    os.kill(max(workers_of(job.pid)), signal.SIGKILL)
    assert job.wait(180) == 0, log.read_text()[-3000:]
    assert "resumed " in log.read_text()
    assert saved(out)["step"] == 12 and [line["step"] for line in log_of(out)] == [*range(1, 13)]


def test_two_machines_go_on_after_one_was_lost(start, images, tmp_path):
    """Two agents of torchrun meet on the loopback; one is killed, then both are started again."""
    out = {name: tmp_path / name for name in ("one", "two")}
    more = ["--data", images, *ALONE, "--epochs", 5]
    assert start("mae_pretrain", *more, "--out", out["one"]).codes() == [0]
    port = 20_000 + os.getpid() % 30_000

    def agents(attempt):
        return [torchrun(tmp_path / f"node{node}.txt", "--nnodes", 2, "--nproc_per_node", 1,
                         "--node_rank", node, "--max-restarts", 0, "--rdzv_backend", "c10d",
                         "--rdzv_id", attempt, "--rdzv_endpoint", f"127.0.0.1:{port + attempt}",
                         "mae_pretrain.py", *more, "--out", out["two"], "--timeout-minutes", "0.1")
                for node in range(2)]

    first, second = agents(0)
    said = tmp_path / "node0.txt", tmp_path / "node1.txt"
    until(said, " step 7/20 ", first)
    for pid in [second.pid, *workers_of(second.pid)]:       # the power is off
        os.kill(pid, signal.SIGKILL)
    assert first.wait(90) != 0 and second.wait() == -signal.SIGKILL
    assert 7 <= saved(out["two"])["step"] < 20
    again = agents(1)
    assert [job.wait(120) for job in again] == [0, 0], said[0].read_text() + said[1].read_text()
    assert "resumed " in said[0].read_text() + said[1].read_text()
    one, two = (saved(place)["model"] for place in out.values())
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)
    assert [line["step"] for line in log_of(out["two"])] == list(range(1, 21))


# --------------------------------------------------------------------- reading processes, pipes
def reading(tmp_path, *command, kill=False):
    """(exit code, errors) of a run that reads files in two processes; kill: one of them."""
    root = folder_of(tmp_path / "images", [f"{i}.jpg" for i in range(40)], (80, 90))
    folder_of(tmp_path / "images", ["other.jpg"], (50, 90))                 # they stay files
    script = [sys.executable, "mae_pretrain.py", "--data", root, "--out", str(tmp_path / "out"),
              *ALONE, "--img-size", "64", "--workers", "2", "--epochs", "99", "--save-minutes", "9"]
    job = subprocess.Popen([*command, *script], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    for line in job.stdout if kill else ():
        if " step 3/" in line:
            os.kill(workers_of(job.pid)[-1], signal.SIGKILL)
            break
    errors = job.communicate(timeout=120)[1]
    return job.returncode, errors.splitlines()


def test_a_reading_process_that_is_killed_ends_the_run_in_a_line(tmp_path):
    code, errors = reading(tmp_path, kill=True)
    assert code == 1 and len(errors) == 1 and "DataLoader worker" in errors[0], errors


def test_a_tiny_shared_memory_ends_in_a_line(tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec \"$@\""
    code, errors = reading(tmp_path, "unshare", "-m", "sh", "-c", small, "sh")
    assert code == 1 and len(errors) == 1 and "/dev/shm" in errors[0], errors


def test_a_reader_of_the_output_that_has_seen_enough_ends_it_without_a_traceback():
    """`... | head -1`: nobody reads any more when the program writes."""
    pipe = os.pipe()
    os.close(pipe[0])
    program = "import run; run.program(lambda args: print('epoch 1', flush=True), lambda: None)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=pipe[1],
                           stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(pipe[1])
    assert ended.returncode == 128 + signal.SIGPIPE and not ended.stderr, ended.stderr


def only_the_first_reads():
    """Two processes of one machine, of which the second has no disk."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
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
        for _ in range(2):                                  # the second goes on from the end
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
