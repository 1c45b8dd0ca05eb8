"""What ends long runs, provoked: kills, signals, full disks, closed folders, numbers that are none,
images that vanish.

    KILLS=20 python -m pytest tests/test_faults.py -k kill_minus -s      # FAULTS.md's count
"""
import contextlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial

import pytest
import torch

import augment
import checkpoint
import data
import mae_pretrain
import model
import run
from conftest import (QUIET, ROOT, STAGES, assert_identical, assert_same_run, corrupt, essence,
                      folder_of, log_of, options, refused, saved, train)

KILLS = int(os.environ.get("KILLS", "2"))


# ------------------------------------------------------------------------ what is done to a process
def after_step(step, action):
    """Do action(job) once a step is noted, from 1; 0: each."""
    record = run.Job.record

    def recorded(self, *more, **log):
        record(self, *more, **log)
        if step in (0, self.step + 1):
            action(self)

    run.Job.record = recorded


def nap(job):
    time.sleep(0.05)


def stuck(job):
    print("stuck", flush=True)
    time.sleep(1000)


slow_steps = partial(after_step, 0, nap)                    # so that a signal meets one


# ------------------------------------------------------------------------------------ kill anywhere
def files_of(folder):
    """Names of what a write leaves behind when it is cut, with their times."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {(e.name, e.stat().st_mtime_ns) for e in entries
                if e.name.endswith(".tmp") or e.name == "fresh.pt"}
    return set()


def kept(out):
    """The step that a run goes on from: between two renames there is no last.pt."""
    names = [name for name in ("last.pt", "previous.pt") if (out / name).exists()]
    return saved(out, names[0])["step"] if names else 0


@pytest.mark.parametrize("stage", STAGES)
def test_kill_minus_nine_anywhere_loses_nothing(start, encoder, tmp_path, stage):
    epochs = str(max(2, KILLS))                             # 6 steps each
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = start(stage, *options(stage, encoder, whole, "--epochs", epochs)).until(" step 1/")
    begun = time.monotonic()
    assert job.codes() == [0], job.said()
    steps = saved(whole)["step"]
    pace = (time.monotonic() - begun) / steps               # seconds for a step and its checkpoint
    chance, landed, writing = random.Random(stage), [], 0
    while len(landed) < KILLS:
        job = start(stage, *options(stage, encoder, parts, "--epochs", epochs))
        before = landed[-1] if landed else 0
        most = max(1, (steps - before) // (KILLS - len(landed) + 1))
        job.until(f" step {before + chance.randint(1, most)}/")
        time.sleep(chance.uniform(0, pace))
        old, aimed, end = files_of(parts), len(landed) % 2 == 1, time.monotonic() + 5
        while aimed and time.monotonic() < end and not files_of(parts) - old:
            pass                                            # every other one during a write
        os.kill(job.jobs[0].pid, signal.SIGKILL)
        assert job.codes() == [-signal.SIGKILL], job.said()
        writing += bool(files_of(parts) - old)
        landed.append(kept(parts))
    job = start(stage, *options(stage, encoder, parts, "--epochs", epochs))
    assert job.codes() == [0], job.said()
    print(f"\n{stage}: {KILLS} kills, at steps {landed} of {steps}, {writing} during a write")
    assert landed == sorted(landed) and landed[-1] < steps and writing >= KILLS // 4
    assert_same_run(parts, whole)
    assert [line["step"] for line in log_of(parts)] == list(range(1, steps + 1))
    if stage == "finetune":
        assert len(run.read_results(parts / "results.jsonl")) == 1


class Cut(Exception):
    pass                                                    # a kill, as far as files can tell


@pytest.mark.parametrize("stage, name", [
    ("mae_pretrain", "encoder.pt"), ("graft_train", "epoch0001.pt"), ("graft_train", "fresh.pt")])
def test_no_file_stays_behind_last_pt(world, encoder, tmp_path, monkeypatch, stage, name):
    """A kill after any of the writes of the last save leaves no file that is older than last.pt."""
    save = checkpoint.save

    def cut(content, path):
        save(content, path)
        step = content.get("step", content.get("meta", {}).get("step"))
        if os.path.basename(path) == name and step == 6:
            raise Cut

    more = ["--epochs", "1", "--every-epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", cut)
        with pytest.raises(Cut):
            train(stage, encoder, tmp_path, *more)
    assert saved(tmp_path)["step"] == 5
    train(stage, encoder, tmp_path, *more)
    steps = saved(tmp_path)["step"], saved(tmp_path, "encoder.pt")["meta"]["step"]
    assert steps == (6, 6) and saved(tmp_path, "epoch0001.pt")["step"] == 6


def test_damaged_files_of_a_run_start_it_over_or_are_mended(world, encoder, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        train("mae_pretrain", encoder, out, "--epochs", "1")
    with open(parts / "log.jsonl", "a") as f:               # a kill has torn its end
        f.write('\0\0\0\n{"step": 3, "lo')
    train("mae_pretrain", encoder, parts, "--epochs", "1")
    assert essence(parts) == essence(whole)
    os.truncate(parts / "last.pt", 1000)
    train("mae_pretrain", encoder, parts, "--epochs", "1")
    assert "step 5 of 6" in capsys.readouterr().out
    assert_same_run(parts, whole)
    corrupt(parts / "last.pt", b"")
    torch.save({"model": 1}, parts / "previous.pt")         # readable, and not of a run
    train("mae_pretrain", encoder, parts, "--epochs", "1")
    assert capsys.readouterr().out.count("trying the checkpoint before it") == 2
    assert_same_run(parts, whole)
    state = saved(parts)
    del state["model"]["norm.bias"]
    torch.save(state, parts / "last.pt")
    with pytest.raises(run.UsageError, match="last.pt is not of this run"):
        train("mae_pretrain", encoder, parts, "--epochs", "1")


def test_a_run_goes_on_where_its_files_lie_elsewhere_but_not_with_others(world, tmp_path, capsys):
    """A scratch folder of another name for each job; a path that is typed otherwise."""
    root = folder_of(tmp_path / "a", [f"{c}/{i}.png" for c in "xy" for i in range(24)], (32, 32))
    (tmp_path / "b").symlink_to(root)
    more = ["--epochs", "1", "--data"]
    train("mae_pretrain", None, tmp_path / "out", *more, root)
    capsys.readouterr()
    train("mae_pretrain", None, tmp_path / "out", *more, f"{tmp_path}/b/")
    said = capsys.readouterr().out
    assert "names of the images and the weights" in said and "resumed" in said
    other = folder_of(tmp_path / "c", [f"x/{i}.png" for i in range(48)], (32, 32))
    with pytest.raises(run.UsageError, match="was written with data"):
        train("mae_pretrain", None, tmp_path / "out", *more, other)
    with pytest.raises(run.UsageError, match="written with network MaskedAutoencoder, now network"):
        train("graft_train", "none", tmp_path / "out", "--arch", "vit_test", *more, root)


def test_a_run_does_not_go_on_with_other_code_unsaid(world, tmp_path, monkeypatch, capsys):
    more = ["--epochs", "1", "--init", "none"]
    train("mae_pretrain", None, tmp_path, *more)
    with monkeypatch.context() as patch:
        patch.setitem(model.ARCHS, "vit_test", ((8, 24, 3, 2), (16, 1, 2)))     # 3 heads before
        with pytest.raises(run.UsageError, match="with config .*'heads': 3.* now config"):
            train("mae_pretrain", None, tmp_path, *more)
    with monkeypatch.context() as patch:
        built = mae_pretrain.param_groups
        patch.setattr(mae_pretrain, "param_groups", lambda *a, **k: [
            g | dict(base_lr=g["base_lr"] / 2) for g in built(*a, **k)])
        with pytest.raises(run.UsageError, match="the rates or decays of its groups"):
            train("mae_pretrain", None, tmp_path, *more)
    monkeypatch.setattr(run, "commit", lambda: "another")
    train("mae_pretrain", None, tmp_path, *more)
    assert "of this code wrote it, now it is another" in capsys.readouterr().out


def test_a_run_that_starts_over_leaves_nothing_of_the_one_before(world, encoder, tmp_path,
                                                                 monkeypatch):
    train("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    (tmp_path / "mine.pt").write_text("not the run's")
    monkeypatch.setattr(run.Job, "record", None)            # ends it before its first save
    with pytest.raises(TypeError):
        train("mae_pretrain", encoder, tmp_path, "--epochs", "1", "--resume", "never")
    assert [path.name for path in tmp_path.glob("*.pt")] == ["mine.pt"] and not log_of(tmp_path)
    place = tmp_path / "begun"
    shutil.copytree(encoder, place)                         # what a run begins with stays
    with pytest.raises(TypeError):
        train("graft_train", place, place, "--epochs", "1", "--resume", "never")
    assert (place / "encoder.pt").exists() and not (place / "last.pt").exists()


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("stage, number", [
    ("mae_pretrain", signal.SIGTERM), ("graft_train", signal.SIGINT), ("finetune", signal.SIGUSR1)])
def test_a_signal_saves_and_ends_with_its_code(start, encoder, tmp_path, stage, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--epochs", "2", "--log-every", "1000", "--save-minutes", "1000"]
    assert start(stage, *options(stage, encoder, whole, *more)).codes() == [0]
    job = start(stage, *options(stage, encoder, parts, *more), prepare=slow_steps).until(" step 6/")
    os.kill(job.jobs[0].pid, number)
    assert job.codes() == [128 + number], job.said()
    assert f"stopped by {number.name}; the same command goes on from here" in job.said()
    stopped = saved(parts)["step"]
    assert 6 <= stopped < 12 and log_of(parts)[-1]["step"] == stopped
    assert start(stage, *options(stage, encoder, parts, *more)).codes() == [0]
    assert_identical(saved(parts)["model"], saved(whole)["model"])


def test_a_signal_during_the_last_save_is_not_lost(world, encoder, tmp_path, monkeypatch):
    """Else reproduce.py would go on with its next system."""
    written = run.Job.written
    monkeypatch.setattr(run.Job, "written", lambda job: [
        written(job), job.on_signal(15, None) if job.step == job.total - 1 else None][0])
    with pytest.raises(run.Stopped):
        train("mae_pretrain", encoder, tmp_path, "--epochs", "1")
    assert saved(tmp_path)["step"] == 6


def test_a_second_ctrl_c_ends_at_once(start, encoder, tmp_path):
    job = start("mae_pretrain", *options("mae_pretrain", encoder, tmp_path, "--epochs", "3"),
                prepare=partial(after_step, 3, stuck))
    job.until("stuck")
    os.kill(job.jobs[0].pid, signal.SIGINT)
    time.sleep(0.3)
    assert job.jobs[0].is_alive()                           # it waits for the end of the step
    os.kill(job.jobs[0].pid, signal.SIGINT)
    assert job.codes() == [128 + signal.SIGINT]
    assert kept(tmp_path) in (1, 2)                         # the second may be half written


@pytest.mark.parametrize("script", ["mae_pretrain.py", "evaluate.py"])
def test_ctrl_c_while_torch_is_imported_ends_in_a_line(tmp_path, script):
    # what a shell puts into the background ignores Ctrl-C, and hands that on
    job = subprocess.Popen([sys.executable, "-X", "importtime", script], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    said = []
    for line in job.stderr:
        said.append(line)
        if len(said) == 300:                                # in the midst of torch
            job.send_signal(signal.SIGINT)
    said = [line for line in said if not line.startswith("import time:")]
    assert job.wait(60) == 130 and said == ["interrupted\n"], said


# -------------------------------------------------------------------------- disks, folders, network
def unprivileged(action):
    """Do something as another user than root, whom no file refuses anything; what it printed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        with open(writing, "w") as f, contextlib.redirect_stdout(f):
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setegid(65534)
                    os.seteuid(65534)
                action()
                code = 0
            except BaseException:
                print(traceback.format_exc())
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


def room_for_part_of_a_checkpoint():
    """No file may grow beyond this: what a full disk does to a write, with another number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def no_room_for_a_line():
    """The log cannot grow: /dev/full says what a full disk says."""
    run.open = lambda path, mode="r", **more: open(
        "/dev/full" if mode == "a" else path, mode, **more)


@pytest.mark.parametrize("stage, prepare, words", [
    ("mae_pretrain", room_for_part_of_a_checkpoint, ".pt: "),
    ("graft_train", no_room_for_a_line, "log.jsonl: No space left")])
def test_a_failed_write_ends_in_a_line_and_harms_nothing(start, encoder, tmp_path, stage, prepare,
                                                         words):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(stage, *options(stage, encoder, whole, "--epochs", "1")).codes() == [0]
    job = start(stage, *options(stage, encoder, parts, "--epochs", "1"), prepare=slow_steps)
    job.until(" step 3/").jobs[0].kill()
    job.codes()
    before, torn = saved(parts), files_of(parts)
    job = start(stage, *options(stage, encoder, parts, "--epochs", "1"), prepare=prepare)
    assert job.codes() == [1], job.said()
    error, = job.errors()
    assert "cannot write" in error and words in error, error
    assert saved(parts)["step"] == before["step"] and files_of(parts) <= torn
    assert_identical(saved(parts)["model"], before["model"])
    assert start(stage, *options(stage, encoder, parts, "--epochs", "1")).codes() == [0]
    assert_same_run(parts, whole)


def test_a_folder_that_cannot_be_written_to(world, encoder, tmp_path):
    for place in ("/proc/nowhere/run", "/dev/full/run"):
        line = refused("mae_pretrain", *options("mae_pretrain", encoder, place))
        assert "cannot write there" in line
    (tmp_path / "closed").mkdir(mode=0o555)
    reachable(tmp_path / "closed")
    # imports what another user may not read
    train("mae_pretrain", encoder, tmp_path / "open", "--epochs", "1")

    def work():
        try:
            train("mae_pretrain", encoder, tmp_path / "closed" / "run")
        except run.UsageError as error:
            print(error)

    assert "cannot write there (Permission denied)" in unprivileged(work)


def test_a_second_run_in_a_folder_names_the_first(start, encoder, tmp_path):
    """And a reading process that outlives a killed run does not lock its folder."""
    more = options("mae_pretrain", encoder, tmp_path / "out", "--epochs", "20")
    first = start("mae_pretrain", *more, prepare=with_a_reader).until(" step 2/")
    second = start("mae_pretrain", *more)
    assert second.codes() == [2]
    owner = f"is in use by process {first.jobs[0].pid} on {socket.gethostname()}"
    assert second.errors()[0].endswith(owner)
    reader = int(first.said().split("reader ")[1].split()[0])
    first.jobs[0].kill()
    try:
        third = start("mae_pretrain", *more).until(" step 4/")
        os.kill(reader, 0)                                  # it is still there
        assert not third.errors()
    finally:
        os.kill(reader, signal.SIGKILL)


def with_a_reader():
    after_step(0, nap)
    after_step(1, fork)


def fork(job):
    reader = os.fork()
    if reader == 0:
        time.sleep(60)
        os._exit(0)
    print(f"reader {reader} of {job.out}", flush=True)


def offline(folder=None):
    """No socket can be made."""
    def refuse(*args, **more):
        raise OSError(101, "Network is unreachable")

    socket.socket = socket.create_connection = socket.getaddrinfo = refuse
    if folder:
        os.chdir(folder)


@pytest.mark.parametrize("stage", [*STAGES, "evaluate"])
def test_no_network_is_needed(start, encoder, tmp_path, stage):
    arguments = ["--mode", "knn", "--checkpoint", encoder, *QUIET, "--out", tmp_path / "out"]
    if stage != "evaluate":
        arguments = options(stage, encoder, tmp_path / "out", "--epochs", "1")
    job = start(stage, *arguments, prepare=offline)
    assert job.codes() == [0], job.said()


def test_a_download_that_fails_ends_in_a_line(start, tmp_path):
    job = start("mae_pretrain", "--data", "cifar10", "--arch", "vit_test", *QUIET, "--out",
                tmp_path / "out", prepare=partial(offline, str(tmp_path)))
    assert job.codes() == [1], job.said()
    error, = job.errors()
    assert "--data cifar10: not in downloads/ and cannot be downloaded" in error


# ------------------------------------------------------------------------------------------ numbers
def broken_gradients(monkeypatch, steps):
    """At these steps (from 1) a gradient is infinite, the loss is not."""
    count, take = iter(range(1, 10 ** 6)), torch.amp.GradScaler.step

    def step(self, optimizer):
        if next(count) in steps:
            optimizer.param_groups[-1]["params"][0].grad.view(-1)[0] = float("inf")
        return take(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)


@pytest.mark.parametrize("stage", STAGES)
def test_infinite_gradients_are_skipped_and_many_end_the_run(world, encoder, tmp_path, monkeypatch,
                                                             capsys, stage):
    with monkeypatch.context() as patch:
        broken_gradients(patch, {3})
        train(stage, encoder, tmp_path / "one", "--epochs", "1")
    said = capsys.readouterr().out
    words = "warning: rank 0: gradient is not finite at step 3, step skipped; images embedded/"
    assert said.count(words) == said.count("warning: rank") == 1
    assert saved(tmp_path / "one")["skipped"] == 1
    assert all(line["loss"] is not None for line in log_of(tmp_path / "one"))
    broken_gradients(monkeypatch, range(5, 100))
    with pytest.raises(run.RunError, match="not finite 6 times, last at step 10;.*last good"):
        train(stage, encoder, tmp_path / "many", "--epochs", "3")
    state = saved(tmp_path / "many")
    assert state["step"] == 9 and all(v.isfinite().all() for v in state["model"].values())


def a_job(tmp_path, dtype=None, **more):
    """A Job of one weight whose steps are noted by hand: (job, optimizer, scaler, log)."""
    net, images = torch.nn.Linear(2, 1), torch.zeros(100, 3, 2, 2, dtype=torch.uint8)
    net.config, optimizer = {}, torch.optim.AdamW(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    loader = data.Loader(data.Dataset(images=images, name="three"), [augment.MAE_VIEW], (2, 2), 1)
    args = mae_pretrain.get_args(["--out", str(tmp_path), "--epochs", "1"])
    env = run.Env(torch.device("cpu"), dtype)
    job = run.Job(args, env, net, optimizer, scaler, loader, {}, **more)
    job.enter()

    def log(step, loss, **found):
        job.step = step - 1
        job.record(torch.tensor(loss), next(loader.epoch(0)), [0.1], **found)
        job.log(step)

    return job, optimizer, scaler, log


def test_a_loss_scale_that_collapses_is_reported_and_ends_the_run(tmp_path, capsys):
    job, optimizer, scaler, log = a_job(tmp_path, torch.float16)
    with pytest.raises(run.RunError, match="loss scale of fp16 has collapsed to .*--amp off"):
        for step in range(1, 100):
            (scaler.scale(job.net.weight.sum()) * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            log(step, 1.0)
    job.leave()
    said = capsys.readouterr().out
    assert said.count("warning: the loss scale of fp16 has fallen below 1") == 1
    assert "gradient is not finite" not in said and job.skipped == 0
    assert [line["scale"] for line in log_of(tmp_path)] == [2.0 ** (16 - n) for n in range(1, 33)]


@pytest.mark.parametrize("loss, more, sign", [
    (2.773, dict(rank=9.0, std=0.06), "the loss is at its chance level, 2.773"),
    (1.0, dict(rank=1.01, std=0.06), "the effective rank of the features is 1.01"),
    (1.0, dict(rank=9.0, std=1e-5), "the spread of the embeddings is 1.0e-05"),
    (3.0, dict(contrastive=2.7, rank=9.0, std=0.06), None), (2.6, dict(rank=9.0, std=0.06), None)])
def test_a_collapse_is_told_once_with_what_to_try(tmp_path, capsys, loss, more, sign):
    job, *_, log = a_job(tmp_path, warmup=4, chance=2.773)
    for step in range(1, 20):
        log(step, loss, **more)
        said = capsys.readouterr().out
        assert ("features may have collapsed" in said) == (step == 7 and sign is not None)
        if sign and step == 7:
            assert sign in said and "Try a lower --lr" in said.replace("\n", " ")
    job.leave()


def test_deterministic_is_asked_of_torch_while_a_run_lasts(world, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = []
    after_step = run.Job.after
    monkeypatch.setattr(run.Job, "after", lambda job, step: (found.append(
        torch.are_deterministic_algorithms_enabled()), after_step(job, step)))
    for more in (["--deterministic"], []):
        train("mae_pretrain", None, tmp_path / str(len(more)), "--epochs", "1", *more)
    assert found == [True] * 6 + [False] * 6
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert_same_run(tmp_path / "0", tmp_path / "1")


# ------------------------------------------------------------------------------------------ images
def test_files_that_vanish_or_are_closed_are_replaced(tmp_path):
    names = [f"{i:03}.png" for i in range(40)]
    root = folder_of(tmp_path / "images", [*names, "other.png"], (24, 36))
    folder_of(tmp_path / "images", ["other.png"], (30, 30))                 # so they stay files
    os.chmod(tmp_path / "images" / "007.png", 0)
    reachable(tmp_path / "images")

    def work():
        dataset = data.load(root, max_bad=0.3)
        loader = data.Loader(dataset, [augment.MAE_VIEW], (16, 16), 10, max_bad=0.3)
        assert len(list(loader.epoch(0))) == 4 and list(dataset.bad) in ([7], [])
        os.remove(tmp_path / "images" / "001.png")
        for epoch in (1, 2, 3):
            assert len(list(loader.epoch(epoch))) == 4
        assert set(dataset.bad) == {1, 7}

    os.chmod(tmp_path / "images", 0o777)
    said = unprivileged(work)
    assert "007.png: PermissionError" in said and "001.png: FileNotFoundError" in said
