"""Several processes, of which one dies, hangs, fails alone, sees other pictures or gets a signal; torchrun's restarts."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import run
from test_data import folder_of
from test_faults import HERE, QUIET, encoder, log_of, options, saved, server, slow_steps, start     # noqa: F401

torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------- several processes
def die(step=3):
    """This process is gone, without a word, before the gradients of a step are averaged."""
    record = run.Run.record
    run.Run.record = lambda self, number, *more: (record(self, number, *more), number == step and os._exit(9))


def stop_answering(step=3):
    """This process hangs for good after a step, and does not say so."""
    record = run.Run.record
    run.Run.record = lambda self, number, *more: (record(self, number, *more), number == step and os.kill(
        os.getpid(), signal.SIGSTOP))


def fail_alone(step=3):
    """An error that one process has for itself."""
    record = run.Run.record

    def broken(self, number, *more):
        record(self, number, *more)
        if number == step:
            raise data.RunError(f"rank {self.rank}: 20 pictures in a row cannot be read")

    run.Run.record = broken


def fewer_pictures():
    full = data.embedded
    data.embedded = lambda train=True, *more: full(train, *more).select(range(64 if train else 50))


def hang_by_itself(step=3):
    """The same, of its main thread alone: as a read from a disk that does not answer."""
    record = run.Run.record
    run.Run.record = lambda self, number, *more: (record(self, number, *more), number == step and time.sleep(1000))


DISTRIBUTED = ["--epochs", "2", "--timeout-minutes", "0.1", "--batch-size", "15"]


@pytest.mark.parametrize("stage, fault, lost", [("mae_pretrain", die, 1), ("graft_train", stop_answering, 2),
                                                ("finetune", hang_by_itself, 0)])
def test_a_process_that_dies_or_hangs_is_named(start, encoder, tmp_path, stage, fault, lost):
    job = start(stage, *options(stage, encoder, tmp_path / "out", *DISTRIBUTED), processes=3, prepares={lost: fault})
    others = [r for r in range(3) if r != lost]
    for r in others:
        job.jobs[r].join(40)
    job.jobs[lost].kill()
    assert [job.jobs[r].exitcode for r in others] == [1, 1], job.said()
    assert len(job.errors()) == 1 and f"rank {lost} of 3 died or hangs" in job.errors()[0], job.said()
    assert "Traceback" not in job.said()
    assert saved(tmp_path / "out")["step"] >= 2


def test_an_error_of_one_process_is_told_once_and_ends_all(start, encoder, tmp_path):
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path / "out", *DISTRIBUTED), processes=3,
                prepares={1: fail_alone})
    assert job.codes() == [1] * 3, job.said()
    assert [line.split("error: ")[1] for line in job.errors()] == ["rank 1: 20 pictures in a row cannot be read"]
    assert "Traceback" not in job.said()


@pytest.mark.parametrize("stage, what", [("mae_pretrain", "numbers of pictures"), ("graft_train", "numbers of pictures"),
                                         ("finetune", "numbers of pictures")])
def test_processes_that_see_different_pictures_are_named_at_once(start, encoder, tmp_path, stage, what):
    job = start(stage, *options(stage, encoder, tmp_path / "out", *DISTRIBUTED), processes=3, prepares={2: fewer_pictures})
    assert job.codes() == [2, 2, 2], job.said()
    assert len(job.errors()) == 1 and f"different {what}: 96 on ranks 0, 1; 64 on rank 2" in job.errors()[0], job.errors()
    assert not (tmp_path / "out").exists()


def test_processes_with_different_folders_are_named(start, encoder, tmp_path):
    """--out on a disk of its own for each machine: only rank 0 finds the checkpoint."""
    assert start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path / "out", "--epochs", "1")).codes() == [0]
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path / "out", "--epochs", "1"), processes=2,
                prepares={1: no_last_pt})
    assert job.codes() == [2, 2], job.said()
    assert len(job.errors()) == 1 and "6 on rank 0; 0 on rank 1" in job.errors()[0]
    assert len(log_of(tmp_path / "out")) == 6


def no_last_pt():
    run.Run.path = lambda self, name: os.path.join(self.out, "elsewhere", name)


@pytest.mark.parametrize("number, to", [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_process_stops_all_between_lines_of_the_log(start, encoder, tmp_path, number, to):
    more = ["--epochs", "200", "--log-every", "100000", "--save-minutes", "1000"]
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path / "out", *more), processes=2, prepare=slow_steps)
    job.until(" step 6/")
    began = time.monotonic()
    os.kill(job.jobs[to].pid, number)
    assert job.codes(30) == [128 + number] * 2, job.said()
    assert time.monotonic() - began < 10
    assert saved(tmp_path / "out")["step"] == log_of(tmp_path / "out")[-1]["step"] >= 6


def test_the_number_of_processes_may_change(start, encoder, tmp_path):
    more = ["--epochs", "2", "--lr", "0.005"]
    for stage in ("mae_pretrain", "graft_train"):
        whole, parts = tmp_path / f"{stage}1", tmp_path / f"{stage}2"
        assert start(stage, *options(stage, encoder, whole, *more)).codes() == [0]
        job = start(stage, *options(stage, encoder, parts, *more), processes=2, prepare=slow_steps).until(" step 3/")
        os.kill(job.jobs[1].pid, signal.SIGTERM)
        assert job.codes() == [128 + signal.SIGTERM] * 2
        first = saved(parts)["step"]
        job = start(stage, *options(stage, encoder, parts, *more))
        assert job.codes() == [0] and f"at step {first} of 12" in job.said() and 3 <= first < 12
        a, b = log_of(whole), log_of(parts)
        assert [line["step"] for line in a] == [line["step"] for line in b]
        assert [line["loss"] for line in b] == pytest.approx([line["loss"] for line in a], rel=2e-3)


def test_uneven_shares_of_the_test_pictures_are_counted_once_each(start, encoder, tmp_path):
    """50 test pictures on three processes, in batches of 256: 17, 17 and 16 of them."""
    more = ["--epochs", "1", "--batch-size", "15", "--lr", "1e-4"]
    assert start("finetune", *options("finetune", encoder, tmp_path / "one", *more, "--mixup", "0", "--erasing", "0",
                                      "--drop-path", "0")).codes() == [0]
    job = start("finetune", *options("finetune", encoder, tmp_path / "three", *more, "--mixup", "0", "--erasing", "0",
                                     "--drop-path", "0"), processes=3)
    assert job.codes() == [0] * 3, job.said()
    one, three = (run.read_results(tmp_path / name / "results.jsonl") for name in ("one", "three"))
    assert len(one) == len(three) == 1 and three[0]["tested"] == 50
    assert abs(one[0]["top1"] - three[0]["top1"]) <= 2                      # rounding may turn one picture
    job = start("evaluate", "--mode", "knn", "--k", "5", "--checkpoint", encoder, *QUIET, "--out", tmp_path / "one")
    assert job.codes() == [0], job.said()
    job = start("evaluate", "--mode", "knn", "--k", "5", "--checkpoint", encoder, *QUIET, "--out", tmp_path / "three",
                processes=3)
    assert job.codes() == [0] * 3, job.said()
    one, three = (run.read_results(tmp_path / name / "results.jsonl")[-1] for name in ("one", "three"))
    assert one["tested"] == three["tested"] == 50 and abs(one["top1"] - three["top1"]) <= 2


ALONE = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--batch-size", "8", "--lr", "0.01",
         "--log-every", "1", "--save-minutes", "1e-9", *QUIET]


def test_torchrun_brings_a_killed_worker_back(tmp_path):
    root = folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(36)])
    out, more = tmp_path / "out", ["--epochs", "6"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--max-restarts", "2", os.path.join(HERE, "mae_pretrain.py"), "--data", root, "--out", str(out), *ALONE, *more]
    with open(tmp_path / "said.txt", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log)
    killed = 0
    end = time.monotonic() + 120
    while job.poll() is None and time.monotonic() < end:
        said = (tmp_path / "said.txt").read_text()
        if killed < 1 and " step 5/24 " in said:
            pids = [int(p) for p in os.listdir("/proc") if p.isdigit() and is_worker_of(int(p), job.pid)]
            os.kill(max(pids), signal.SIGKILL)
            killed += 1
        time.sleep(0.02)
    said = (tmp_path / "said.txt").read_text()
    assert job.poll() == 0, said[-3000:]
    assert killed == 1 and said.count("resumed ") >= 1
    assert saved(out)["step"] == 24 and [line["step"] for line in log_of(out)] == list(range(1, 25))


def is_worker_of(pid, parent):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return int(f.read().rsplit(")", 1)[1].split()[1]) == parent
    except (OSError, IndexError):
        return False


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback():
    """`... | head -1`: nobody reads any more when the program writes."""
    reading, writing = os.pipe()
    os.close(reading)
    program = "import run; run.program(lambda args: print('epoch 1', flush=True), lambda: None)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=writing, stderr=subprocess.PIPE, text=True,
                           timeout=120)
    os.close(writing)
    assert ended.returncode == 128 + signal.SIGPIPE and not ended.stderr, ended.stderr
