"""What ends long runs, provoked: kills, signals, full disks, folders, gradients, collapse. See also test_faults_*.py.

    python -m pytest test_faults*.py                            # with those for files, options and several processes
    KILLS=20 python -m pytest test_faults.py -k kill_minus -s   # twenty kills of each stage, with figures

Runs are processes of their own, forked from a server that has imported torch: they start in a tenth of a second.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import contextlib
import json
import multiprocessing
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import analyze
import augment
import checkpoint
import data
import evaluate
import finetune
import graft_train
import mae_pretrain
import model
import reproduce
import run
from test_model import assert_identical

torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))
KILLS = int(os.environ.get("KILLS", "4"))
PROGRAMS = {"mae_pretrain": mae_pretrain, "graft_train": graft_train, "finetune": finetune, "evaluate": evaluate,
            "analyze": analyze, "reproduce": reproduce}
SMALL_SET = 96                                                              # embedded pictures in all runs here


# ------------------------------------------------------------------------------------------- runs as processes
def small_world():
    """A tiny vit_test, and few embedded pictures, kept from one call to the next."""
    model.ARCHS["vit_test"] = ((8, 24, 3, 3), (16, 1, 2))
    drawn = {}

    def few(train=True, in_chans=3):
        if (train, in_chans) not in drawn:
            drawn[train, in_chans] = embedded(train, in_chans, n=SMALL_SET if train else 50)
        return drawn[train, in_chans].select(torch.arange(len(drawn[train, in_chans])))

    embedded, data.embedded = data.embedded, few
    torch.set_num_threads(1)


def child(program, arguments, log, environment, prepare):
    """The body of a process: a script as from the command line, what it says in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    os.environ.update(environment)
    small_world()
    sys.argv = [f"{program}.py", *arguments]
    if prepare is not None:
        prepare()
    run.program(PROGRAMS[program].main, PROGRAMS[program].get_args)


@pytest.fixture(scope="session")
def server():
    """Where processes are forked from: it has imported everything, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    return context


class Started:
    """A script that runs, or several processes of it."""

    def __init__(self, server, log, program, *arguments, processes=1, environment=None, prepare=None, prepares=None):
        self.log = str(log)
        environments = [environment or {}]
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = str(s.getsockname()[1])
            environments = [dict(environment or {}, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(processes),
                                 MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for r in range(processes)]
        arguments = [str(a) for a in arguments]
        prepares = prepares or {}
        self.jobs = [server.Process(target=child, args=(program, arguments, self.log, e, prepares.get(r, prepare)))
                     for r, e in enumerate(environments)]
        for job in self.jobs:
            job.start()

    def said(self):
        if not os.path.exists(self.log):
            return ""
        with open(self.log) as f:
            return f.read()

    def until(self, words, seconds=30):
        end = time.monotonic() + seconds
        while words not in self.said():
            assert time.monotonic() < end and any(job.is_alive() for job in self.jobs), self.said()
            time.sleep(0.005)
        return self

    def codes(self, seconds=60):
        """The exit codes, when all have ended."""
        for job in self.jobs:
            job.join(seconds)
            if job.exitcode is None:
                for other in self.jobs:
                    other.kill()
            assert job.exitcode is not None, f"still running after {seconds} s: {self.said()}"
        return [job.exitcode for job in self.jobs]

    def errors(self):
        return [line for line in self.said().splitlines() if ": error: " in line]


@pytest.fixture
def start(server, tmp_path):
    count = iter(range(1000))
    started = []

    def begin(program, *arguments, **more):
        job = Started(server, tmp_path / f"said{next(count)}.txt", program, *arguments, **more)
        started.append(job)
        return job

    yield begin
    for job in started:
        for process in job.jobs:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def encoder(server, tmp_path_factory):
    """An encoder.pt to graft onto and to fine-tune, with a projector."""
    place = tmp_path_factory.mktemp("encoder")
    graft = ["--init", place / "mae", "--hidden-dim", "32", "--out", place / "graft"]
    for program, arguments in (("mae_pretrain", ["--arch", "vit_test", "--out", place / "mae"]), ("graft_train", graft)):
        job = Started(server, place / "said.txt", program, "--epochs", 1, "--batch-size", 32, *QUIET, *arguments)
        assert job.codes() == [0], job.said()
    return place / "graft"


QUIET = ["--amp", "off", "--device", "cpu", "--workers", "0"]
STAGES = ("mae_pretrain", "graft_train", "finetune")


def options(stage, encoder, out, *more):
    """Every step logged and saved."""
    own = {"mae_pretrain": ["--arch", "vit_test", "--lr", "0.02"],
           "graft_train": ["--init", encoder, "--hidden-dim", "32", "--lr", "0.02"],
           "finetune": ["--checkpoint", encoder, "--lr", "0.02", "--mixup", "0.8", "--drop-path", "0.3", "--erasing",
                        "0.5"]}
    return [*own[stage], "--batch-size", "16", "--log-every", "1", "--save-minutes", "1e-9", *QUIET, "--out", out, *more]


def saved(out, name="last.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in f]


def essence(out):
    """What a run's log says, without how fast it was."""
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait", "seconds")}
            for line in log_of(out)]


def assert_same_run(ours, expected):
    a, b = saved(ours), saved(expected)
    assert a["step"] == b["step"]
    assert_identical(a["model"], b["model"])
    for key in a["optimizer"]["state"]:
        assert_identical(a["optimizer"]["state"][key], b["optimizer"]["state"][key])
    for name in ("encoder.pt", "classifier.pt"):
        assert os.path.exists(os.path.join(ours, name)) == os.path.exists(os.path.join(expected, name))
        if os.path.exists(os.path.join(ours, name)):
            assert_identical(saved(ours, name)["model"], saved(expected, name)["model"])
    assert essence(ours) == essence(expected)


# ----------------------------------------------------------------------------------------------- kill anywhere
def files_of(folder):
    """Names of what a write leaves behind when it is cut, with their times."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries, contextlib.suppress(FileNotFoundError):
        return {(e.name, e.stat().st_mtime_ns) for e in entries if e.name.endswith(".tmp") or e.name == "fresh.pt"}
    return set()


def kept(out):
    """The step that a run goes on from: between two renames there is no last.pt."""
    return next((saved(out, name)["step"] for name in ("last.pt", "previous.pt") if (out / name).exists()), 0)


@pytest.mark.parametrize("stage", STAGES)
def test_kill_minus_nine_anywhere_loses_nothing(start, encoder, tmp_path, stage):
    epochs = str(max(4, KILLS))                                             # 6 steps each
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = start(stage, *options(stage, encoder, whole, "--epochs", epochs)).until(" step 1/")
    begun = time.monotonic()
    assert job.codes() == [0], job.said()
    steps = saved(whole)["step"]
    pace = (time.monotonic() - begun) / steps                               # seconds for a step and its checkpoint
    chance, landed, writing = random.Random(stage), [], 0
    while len(landed) < KILLS:
        job = start(stage, *options(stage, encoder, parts, "--epochs", epochs))
        before = landed[-1] if landed else 0
        job.until(f" step {before + chance.randint(1, max(1, (steps - before) // (KILLS - len(landed) + 1)))}/")
        time.sleep(chance.uniform(0, pace))
        old, aimed, end = files_of(parts), len(landed) % 2 == 1, time.monotonic() + 5
        while aimed and time.monotonic() < end and not files_of(parts) - old:
            pass                                                            # every other one while a file is written
        os.kill(job.jobs[0].pid, signal.SIGKILL)
        assert job.codes() == [-signal.SIGKILL], job.said()
        writing += bool(files_of(parts) - old)
        landed.append(kept(parts))
    job = start(stage, *options(stage, encoder, parts, "--epochs", epochs))
    assert job.codes() == [0], job.said()
    print(f"\n{stage}: {KILLS} kills, at steps {landed} of {steps}, {writing} of them while a file was written")
    assert landed == sorted(landed) and len(set(landed)) > KILLS / 2 and landed[-1] < steps and writing >= KILLS / 4
    assert_same_run(parts, whole)
    assert [line["step"] for line in log_of(parts)] == list(range(1, steps + 1))
    if stage == "finetune":
        assert len(run.read_results(parts / "results.jsonl")) == 1


def one_process(monkeypatch):
    """A tiny world for a run inside the process of the test."""
    monkeypatch.setitem(model.ARCHS, "vit_test", ((8, 24, 3, 3), (16, 1, 2)))
    drawn = data.embedded
    monkeypatch.setattr(data, "embedded", lambda train=True, in_chans=3: drawn(train, in_chans,
                                                                               n=SMALL_SET if train else 50))


def train(stage, encoder, out, *more):
    arguments = [str(a) for a in options(stage, encoder, out, *more)]
    return PROGRAMS[stage].main(PROGRAMS[stage].get_args(arguments))


class Cut(Exception):
    """A kill, as far as files can tell."""


@pytest.mark.parametrize("stage, name", [("mae_pretrain", "encoder.pt"), ("mae_pretrain", "fresh.pt"),
                                         ("graft_train", "encoder.pt"), ("graft_train", "epoch0001.pt"),
                                         ("graft_train", "fresh.pt")])
def test_no_file_stays_behind_last_pt(encoder, tmp_path, monkeypatch, stage, name):
    """A kill after any of the writes of the last save leaves no file that is older than last.pt."""
    more = ["--epochs", "1"] + (["--every-epochs", "1"] if stage == "graft_train" else [])
    one_process(monkeypatch)
    save = checkpoint.save

    def cut(obj, path):
        save(obj, path)
        steps = obj.get("step", obj.get("meta", {}).get("step"))
        if os.path.basename(path) == name and steps == 6:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", cut)
        with pytest.raises(Cut):
            train(stage, encoder, tmp_path, *more)
    assert saved(tmp_path)["step"] == 5
    train(stage, encoder, tmp_path, *more)
    assert saved(tmp_path)["step"] == saved(tmp_path, "encoder.pt")["meta"]["step"] == 6
    if stage == "graft_train":
        assert saved(tmp_path, "epoch0001.pt")["step"] == 6


def test_both_checkpoints_damaged_start_over_and_say_so(encoder, tmp_path, monkeypatch, capsys):
    one_process(monkeypatch)
    train("mae_pretrain", encoder, tmp_path / "whole", "--epochs", "1")
    train("mae_pretrain", encoder, tmp_path / "parts", "--epochs", "1")
    (tmp_path / "parts" / "last.pt").write_bytes(b"")
    torch.save({"model": 1}, tmp_path / "parts" / "previous.pt")            # readable, and not of a run
    train("mae_pretrain", encoder, tmp_path / "parts", "--epochs", "1")
    said = capsys.readouterr().out
    assert said.count("trying the checkpoint before it") == 2 and "not a checkpoint to resume from" in said
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_of_another_network_is_refused(encoder, tmp_path, monkeypatch):
    one_process(monkeypatch)
    train("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    state = saved(tmp_path)
    del state["model"]["norm.bias"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(data.UsageError, match="last.pt is not of this run"):
        train("mae_pretrain", encoder, tmp_path, "--epochs", "1")


def test_lines_that_are_torn_are_cut_from_the_log(encoder, tmp_path, monkeypatch):
    one_process(monkeypatch)
    train("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    before = essence(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('\0\0\0\n{"step": 3, "lo')
    train("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    assert essence(tmp_path) == before


def test_a_finished_fine_tuning_gives_its_result_once(encoder, tmp_path, monkeypatch):
    one_process(monkeypatch)
    first = train("finetune", encoder, tmp_path, "--epochs", "1")
    again = train("finetune", encoder, tmp_path, "--epochs", "1")
    assert first["top1"] == again["top1"] and len(run.read_results(tmp_path / "results.jsonl")) == 1
    train("finetune", encoder, tmp_path, "--epochs", "1", "--seed", "1", "--resume", "never")
    assert len(run.read_results(tmp_path / "results.jsonl")) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_minutes_between_saves_count_between_lines_of_the_log(encoder, tmp_path, monkeypatch, stage):
    one_process(monkeypatch)
    steps, save, now = [], run.Run.save, run.time.perf_counter()
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(run.time, "perf_counter", lambda: now + next(ticks))    # each look at the clock: a second later
    monkeypatch.setattr(run.Run, "save", lambda self, state, **more: (steps.append(state["step"]),
                                                                      save(self, state, **more)))
    train(stage, encoder, tmp_path, "--epochs", "2", "--log-every", "1000", "--save-minutes", str(2.5 / 60))
    assert steps == [3, 6, 9, 12]
    assert [line["step"] for line in log_of(tmp_path)] == steps             # no step in two lines, none in no line


# ----------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("stage, number", [("mae_pretrain", signal.SIGTERM), ("graft_train", signal.SIGINT),
                                           ("finetune", signal.SIGUSR1)])
def test_a_signal_saves_and_ends_with_its_code(start, encoder, tmp_path, stage, number):
    more = ["--epochs", "3", "--log-every", "1000", "--save-minutes", "1000"]
    assert start(stage, *options(stage, encoder, tmp_path / "whole", *more)).codes() == [0]
    job = start(stage, *options(stage, encoder, tmp_path / "parts", *more), prepare=slow_steps).until(" step 6/")
    os.kill(job.jobs[0].pid, number)
    assert job.codes() == [128 + number], job.said()
    assert f"stopped by {number.name}; the same command goes on from here" in job.said()
    stopped = saved(tmp_path / "parts")["step"]
    assert 6 <= stopped < 18 and log_of(tmp_path / "parts")[-1]["step"] == stopped
    assert start(stage, *options(stage, encoder, tmp_path / "parts", *more)).codes() == [0]
    assert_identical(saved(tmp_path / "parts")["model"], saved(tmp_path / "whole")["model"])


def slow_steps(seconds=0.05):
    """Each step takes longer, so that a signal meets one."""
    record = run.Run.record
    run.Run.record = lambda self, *more: (time.sleep(seconds), record(self, *more))


def stuck_in_a_step():
    """The second step never ends; it can be interrupted by signals alone."""
    record = run.Run.record
    run.Run.record = lambda self, step, *more: (record(self, step, *more), step == 2 and print("stuck", flush=True),
                                                time.sleep(1000 if step == 2 else 0))


def test_a_second_ctrl_c_ends_at_once(start, encoder, tmp_path):
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path, "--epochs", "3"), prepare=stuck_in_a_step)
    job.until("stuck")
    os.kill(job.jobs[0].pid, signal.SIGINT)
    time.sleep(0.2)
    assert job.jobs[0].is_alive()                                           # it waits for the end of the step
    os.kill(job.jobs[0].pid, signal.SIGINT)
    assert job.codes(5) == [128 + signal.SIGINT]
    assert saved(tmp_path)["step"] == 1


# ------------------------------------------------------------------------------------- disks, folders, the network
def unprivileged(action):
    """Do something in a process that is not root, whom no file refuses anything; returns what it printed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        with contextlib.suppress(BaseException), open(writing, "w") as f, contextlib.redirect_stdout(f):
            if os.geteuid() == 0:
                os.setgroups([])
                os.setegid(65534)
                os.seteuid(65534)
            action()
            code = 0
        os._exit(code)
    os.close(writing)
    with open(reading) as f:
        said = f.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    return said


def reachable(folder):
    """pytest's folders are closed to other users."""
    while folder != folder.parent:
        with contextlib.suppress(PermissionError):
            folder.chmod(folder.stat().st_mode | 0o755)
        folder = folder.parent


def state_of(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name.endswith(".pt")}


def room_for(n):
    """No file may grow beyond n bytes: what a full disk does to a write, with another number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def room_for_part_of_a_checkpoint():
    room_for(150_000)


def no_room_for_a_line():
    """The log cannot grow: /dev/full says what a full disk says."""
    run.open = lambda path, mode="r": open("/dev/full" if mode == "a" else path, mode)


@pytest.mark.parametrize("stage, prepare", [("mae_pretrain", room_for_part_of_a_checkpoint),
                                            ("graft_train", no_room_for_a_line),
                                            ("finetune", room_for_part_of_a_checkpoint)])
def test_a_write_that_fails_half_way_ends_in_a_line_and_harms_nothing(start, encoder, tmp_path, stage, prepare):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--epochs", "2"]
    assert start(stage, *options(stage, encoder, whole, *more)).codes() == [0]
    job = start(stage, *options(stage, encoder, parts, *more), prepare=slow_steps).until(" step 3/")
    job.jobs[0].kill()
    job.codes()
    before, torn = state_of(parts), files_of(parts)
    job = start(stage, *options(stage, encoder, parts, *more), prepare=prepare)
    assert job.codes() == [1], job.said()
    assert len(job.errors()) == 1 and "Traceback" not in job.said(), job.said()
    expected = [".pt: the write fails", ".pt: File too large"]
    if prepare is no_room_for_a_line:
        expected = ["log.jsonl: No space left"]
    assert "cannot write" in job.errors()[0] and any(words in job.errors()[0] for words in expected), job.errors()
    after = state_of(parts)
    assert after["last.pt"] == before["last.pt"] and after.get("previous.pt") == before.get("previous.pt")
    assert files_of(parts) <= torn
    assert start(stage, *options(stage, encoder, parts, *more)).codes() == [0]
    assert_same_run(parts, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 700 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full_keeps_what_is_on_it(start, encoder, small_disk):
    more = options("mae_pretrain", encoder, small_disk / "run", "--epochs", "1")
    job = start("mae_pretrain", *more)
    assert job.codes() == [1], job.said()
    assert len(job.errors()) == 1 and "the disk is full" in job.errors()[0] and "Traceback" not in job.said()
    step = saved(small_disk / "run")["step"] if (small_disk / "run" / "last.pt").exists() else 0
    assert not any(name.endswith(".tmp") for name in os.listdir(small_disk / "run"))
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    job = start("mae_pretrain", *more)
    assert job.codes() == [0] and (f"at step {step} of 6" in job.said() or step == 0)
    assert saved(small_disk / "run")["step"] == 6


def test_a_folder_that_cannot_be_written_to(encoder, tmp_path, monkeypatch, capsys):
    one_process(monkeypatch)
    for place in ("/proc/nowhere/run", "/dev/full/run"):
        monkeypatch.setattr(sys, "argv", ["mae_pretrain.py", *map(str, options("mae_pretrain", encoder, place))])
        with pytest.raises(SystemExit) as end:
            run.program(mae_pretrain.main, mae_pretrain.get_args)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and "cannot write there" in lines[0]
    (tmp_path / "closed").mkdir(mode=0o555)
    reachable(tmp_path / "closed")

    def work():
        try:
            train("mae_pretrain", encoder, tmp_path / "closed" / "run")
        except data.UsageError as error:
            print(error)

    said = unprivileged(work)
    assert "cannot write there (Permission denied)" in said and not os.listdir(tmp_path / "closed")


def test_two_runs_in_one_folder(start, encoder, tmp_path):
    first = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path / "out", "--epochs", "3"), prepare=slow_steps)
    first.until(" step 2/")
    second = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path / "out", "--epochs", "3"))
    assert second.codes() == [2]
    assert second.errors()[0].endswith(f"is in use by process {first.jobs[0].pid} on {socket.gethostname()}")
    assert first.codes() == [0] and saved(tmp_path / "out")["step"] == 18
    assert [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, 19))


def test_readers_that_outlive_a_killed_run_do_not_lock_its_folder(tmp_path):
    """Workers that read pictures are forked from a run, and notice only after seconds that it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with a_job(tmp_path):
            reader = os.fork()
            if reader == 0:
                time.sleep(60)
                os._exit(0)
            time.sleep(0.2)                                                 # until the reader is about its work
            os.write(writing, str(reader).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    reader = int(os.read(reading, 20))
    try:
        os.kill(reader, 0)                                                  # it is still there
        with a_job(tmp_path) as job:
            assert job.lock is not None
    finally:
        os.kill(reader, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def offline():
    """No socket can be made."""
    def refuse(*args, **more):
        raise OSError(101, "Network is unreachable")

    socket.socket = socket.create_connection = refuse
    socket.getaddrinfo = refuse


@pytest.mark.parametrize("program, arguments", [
    ("mae_pretrain", ["--arch", "vit_test"]), ("graft_train", ["--init", "{encoder}", "--hidden-dim", "32"]),
    ("finetune", ["--checkpoint", "{encoder}"]), ("evaluate", ["--mode", "knn", "--checkpoint", "{encoder}", "--k", "5"])])
def test_no_network_is_needed(start, encoder, tmp_path, program, arguments):
    arguments = [a.replace("{encoder}", str(encoder)) for a in arguments]
    epochs = [] if program == "evaluate" else ["--epochs", "1", "--batch-size", "32"]
    job = start(program, *arguments, *epochs, *QUIET, "--out", tmp_path / "out", prepare=offline)
    assert job.codes() == [0], job.said()


def test_a_download_that_fails_ends_in_a_line(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = start("mae_pretrain", "--data", "cifar10", "--arch", "vit_test", *QUIET, "--out", tmp_path / "out",
                prepare=Offline(str(tmp_path)))
    assert job.codes() == [1], job.said()
    assert len(job.errors()) == 1 and "--data cifar10: not in downloads/ and cannot be downloaded" in job.errors()[0]


class Offline:
    """As offline(), in another folder."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        os.chdir(self.folder)
        offline()


# ------------------------------------------------------------------------------------------------------ numbers
def broken_gradients(monkeypatch, steps):
    """At these steps (from 1) a gradient is infinite, the loss is not."""
    state = {"step": 0}
    scale = torch.amp.GradScaler.step

    def step(self, optimizer):
        state["step"] += 1
        if state["step"] in steps:
            optimizer.param_groups[-1]["params"][0].grad.view(-1)[0] = float("inf")
        return scale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_named_and_skipped(encoder, tmp_path, monkeypatch, capsys, stage):
    one_process(monkeypatch)
    broken_gradients(monkeypatch, {3})
    after, save = {}, run.Run.save
    monkeypatch.setattr(run.Run, "save", lambda self, state, **more: (save(self, state, **more), after.update(
        {state["step"]: {k: v.clone() for k, v in state["model"].items()}})))
    train(stage, encoder, tmp_path, "--epochs", "1")
    said = capsys.readouterr().out
    assert said.count("warning: rank 0: gradient is not finite at step 3, step skipped; pictures embedded/") == 1
    assert said.count("warning: rank") == 1 and saved(tmp_path)["skipped"] == 1
    trained = [k for k in after[3] if not k.startswith("momentum_encoder.") and "running_" not in k and "num_b" not in k]
    assert all(torch.equal(after[3][k], after[2][k]) for k in trained)
    assert any(not torch.equal(after[4][k], after[3][k]) for k in trained)
    assert all(line["loss"] is not None for line in log_of(tmp_path))


@pytest.mark.parametrize("stage", STAGES)
def test_many_gradients_that_are_not_finite_stop_the_run(encoder, tmp_path, monkeypatch, stage):
    one_process(monkeypatch)
    broken_gradients(monkeypatch, set(range(5, 100)))
    with pytest.raises(data.RunError, match="loss or gradient was not finite 6 times, last at step 10;.*last good"):
        train(stage, encoder, tmp_path, "--epochs", "3")
    assert all(v.isfinite().all() for v in saved(tmp_path)["model"].values()) and saved(tmp_path)["step"] == 9


def a_job(tmp_path, **more):
    return run.Run(str(tmp_path), 0, 1, torch.device("cpu"), 1, 100, 8, **more)


class Pictures3:
    """As much of a loader as the log asks for."""
    waited = 0.0
    pictures = data.Pictures(images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8), name="three")


def test_a_loss_scale_that_collapses_is_reported_and_ends_the_run(tmp_path, capsys):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = torch.amp.GradScaler("cpu")
    with a_job(tmp_path) as job:
        job.watch(optimizer, scaler, torch.float16)
        with pytest.raises(data.RunError, match="the loss scale of fp16 has collapsed to .*--amp off"):
            for step in range(1, 100):
                (scaler.scale(weight.sum()) * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                job.record(step, torch.tensor(1.0), torch.tensor([0]))
                job.log(step, 0.0, [0.1], Pictures3)
    said = capsys.readouterr().out
    assert said.count("warning: the loss scale of fp16 has fallen below 1") == 1 and "gradient is not finite" not in said
    lines = log_of(tmp_path)
    assert [line["scale"] for line in lines[:3]] == [2.0 ** 15, 2.0 ** 14, 2.0 ** 13] and len(lines) == step - 1 == 32
    assert torch.equal(weight.detach(), torch.ones(2)) and job.skipped == 0


@pytest.mark.parametrize("loss, more, sign", [
    (2.773, dict(rank=9.0, std=0.06), "the loss is at its chance level, 2.773"),
    (1.0, dict(rank=1.01, std=0.06), "the effective rank of the features is 1.01"),
    (1.0, dict(rank=9.0, std=1e-5), "the spread of the embeddings is 1.0e-05"),
    (3.0, dict(contrastive=2.7, rank=9.0, std=0.06), None), (2.6, dict(rank=9.0, std=0.06), None)])
def test_a_collapse_is_told_once_with_what_to_try(tmp_path, capsys, loss, more, sign):
    with a_job(tmp_path) as job:
        job.watch(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]), None, None, warmup=4, chance=2.773)
        for step in range(1, 20):
            job.record(step, torch.tensor(loss), torch.tensor([0]))
            job.log(step, 0.0, [0.1], Pictures3, **more)
            said = capsys.readouterr().out
            assert (("features may have collapsed" in said) == (step == 7)) if sign else "collapsed" not in said
            if sign and step == 7:
                assert sign in said and "Try a lower --lr" in said and "--batch-size" in said


def test_features_that_collapse_in_training_are_told(encoder, tmp_path, monkeypatch, capsys):
    """Equal pictures leave nothing to tell apart: the loss stays at its chance level."""
    one_process(monkeypatch)
    blank = data.Pictures(images=torch.full((96, 3, 32, 32), 128, dtype=torch.uint8), name="blank")
    monkeypatch.setattr(data, "embedded", lambda *more: blank)
    monkeypatch.setattr(augment, "MOCO_VIEWS", (dict(scale=(0.2, 1.0), mode="bilinear"),) * 2)
    train("graft_train", encoder, tmp_path, "--epochs", "2", "--lr", "0.001")
    said = capsys.readouterr().out
    assert said.count("warning: the features may have collapsed") == 1 and "chance level" in said


# ------------------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("stage", STAGES)
def test_deterministic_runs_are_equal_to_the_bit(encoder, tmp_path, monkeypatch, stage):
    one_process(monkeypatch)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = []
    record = run.Run.record
    monkeypatch.setattr(run.Run, "record", lambda self, *more: (asked.append((
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"))), record(self, *more)))
    try:
        for name in ("a", "b"):
            train(stage, encoder, tmp_path / name, "--epochs", "1", "--deterministic")
        assert set(asked) == {(True, True, ":4096:8")}
        assert_same_run(tmp_path / "a", tmp_path / "b")
        asked.clear()
        train(stage, encoder, tmp_path / "a", "--epochs", "1", "--resume", "never")
        assert {found[:2] for found in asked} == {(False, False)}
        assert_identical(saved(tmp_path / "a")["model"], saved(tmp_path / "b")["model"])
    finally:
        torch.use_deterministic_algorithms(False)
