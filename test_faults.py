"""What happens to long runs, provoked: kills, signals, full disks, hostile and broken files, bad options, lost processes.

    python -m pytest test_faults.py                     # about two minutes on two cores
    KILLS=20 python -m pytest test_faults.py -k kill -s # twenty kills of each stage, with figures

Runs are processes of their own, forked from a server that has imported torch: they start in a tenth of a second.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import contextlib
import io
import json
import multiprocessing
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import augment
import check
import checkpoint
import data
import evaluate
import finetune
import graft_train
import mae_pretrain
import model
import reproduce
import run
from test_data import folder_of
from test_model import assert_identical

torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))
KILLS = int(os.environ.get("KILLS", "6"))
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
        self.jobs = [server.Process(target=child, args=(program, arguments, self.log, e, (prepares or {}).get(r, prepare)))
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
    for program, arguments in (("mae_pretrain", ["--arch", "vit_test", "--out", place / "mae"]),
                               ("graft_train", ["--init", place / "mae", "--hidden-dim", "32", "--out", place / "graft"])):
        job = Started(server, place / "said.txt", program, "--epochs", 1, "--batch-size", 32, *QUIET, *arguments)
        assert job.codes() == [0], job.said()
    return place / "graft"


QUIET = ["--amp", "off", "--device", "cpu", "--workers", "0"]
STAGES = ("mae_pretrain", "graft_train", "finetune")


def options(stage, encoder, out, *more):
    """Every step logged and saved."""
    own = {"mae_pretrain": ["--arch", "vit_test", "--lr", "0.02"],
           "graft_train": ["--init", encoder, "--hidden-dim", "32", "--lr", "0.02"],
           "finetune": ["--checkpoint", encoder, "--lr", "0.02", "--mixup", "0.8", "--drop-path", "0.3", "--erasing", "0.5"]}
    return [*own[stage], "--batch-size", "16", "--log-every", "1", "--save-minutes", "1e-9", *QUIET, "--out", out, *more]


def saved(out, name="last.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in f]


def essence(out):
    """What a run's log says, without how fast it was."""
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in log_of(out)]


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


@pytest.mark.parametrize("stage", STAGES)
def test_kill_minus_nine_anywhere_loses_nothing(start, encoder, tmp_path, stage):
    epochs = str(max(4, KILLS))                                             # 6 steps each
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = start(stage, *options(stage, encoder, whole, "--epochs", epochs)).until(" step 1/")
    begun = time.monotonic()
    assert job.codes() == [0], job.said()
    steps = saved(whole)["step"]
    pace = (time.monotonic() - begun) / steps
    chance, landed, writing = random.Random(stage), [], 0
    while len(landed) < KILLS:
        job = start(stage, *options(stage, encoder, parts, "--epochs", epochs))
        before = landed[-1] if landed else 0
        job.until(f" step {before + 1}/")
        time.sleep(chance.uniform(0, pace * (steps - before) / (KILLS - len(landed) + 1)))
        old, aimed, end = files_of(parts), len(landed) % 2 == 1, time.monotonic() + 5
        while aimed and time.monotonic() < end and not files_of(parts) - old:
            pass                                                            # every other one while a file is written
        os.kill(job.jobs[0].pid, signal.SIGKILL)
        assert job.codes() == [-signal.SIGKILL], job.said()
        writing += bool(files_of(parts) - old)
        landed.append(saved(parts)["step"] if (parts / "last.pt").exists() else 0)
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
    monkeypatch.setattr(data, "embedded", lambda train=True, in_chans=3: drawn(train, in_chans, n=SMALL_SET if train else 50))


def train(stage, encoder, out, *more):
    arguments = [str(a) for a in options(stage, encoder, out, *more)]
    return PROGRAMS[stage].main(PROGRAMS[stage].get_args(arguments))


class Cut(Exception):
    """A kill, as far as files can tell."""


@pytest.mark.parametrize("stage", ["mae_pretrain", "graft_train"])
@pytest.mark.parametrize("name", ["encoder.pt", "epoch0001.pt", "fresh.pt"])
def test_no_file_stays_behind_last_pt(encoder, tmp_path, monkeypatch, stage, name):
    """A kill after any of the writes of the last save leaves no file that is older than last.pt."""
    more = ["--epochs", "1"] + (["--every-epochs", "1"] if stage == "graft_train" else [])
    if name == "epoch0001.pt" and stage == "mae_pretrain":
        pytest.skip("MAE keeps no weights of epochs")
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
    monkeypatch.setattr(run.Run, "save", lambda self, state, **more: (steps.append(state["step"]), save(self, state, **more)))
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


# ------------------------------------------------------------------------------------------------ bad arguments
class Captured(Exception):
    pass


def parsers():
    """(script, sub-command words, parser) of every script, its sub-commands one by one."""
    found = []
    for name, program in PROGRAMS.items():
        def catch(self, *_):
            raise Captured(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Parser, "parse_args", catch)
            with pytest.raises(Captured) as caught:
                program.get_args([])
        parser = caught.value.args[0]
        subs = [a for a in parser._actions if isinstance(a, run.argparse._SubParsersAction)]
        found += [(name, [word], sub) for a in subs for word, sub in a.choices.items()] or [(name, [], parser)]
    return found


# options to which 0 is a valid value; all others refuse it
ZERO_IS_VALID = {
    "--workers", "--max-bad", "--freeze-blocks", "--accum", "--lr", "--weight-decay", "--warmup-epochs", "--seed",
    "--seeds", "--knn-every", "--every-epochs", "--eval-every", "--momentum", "--mim-weight", "--anchor-weight",
    "--anchor-blocks", "--rand-augment", "--mixup", "--cutmix", "--erasing", "--label-smoothing", "--min-lr", "--drop-path",
    "--blocks"}
ZERO_IS_REFUSED = {("finetune", "--lr"), ("evaluate", "--lr")}
REQUIRED = {"finetune": ["--checkpoint", "{encoder}"], "evaluate": ["--checkpoint", "{encoder}"],
            "graft_train": ["--init", "none"]}
BAD_NUMBERS = ("-1", "-0.5", "nan", "inf", "-inf", "1e30", "1" + "0" * 30, "0x10", "word", "", " ", "1,,2", "5%")


def zero_is_valid(name, option):
    return option in ZERO_IS_VALID and (name, option) not in ZERO_IS_REFUSED


def is_number(action):
    return action.type is not None and action.choices is None and action.dest != "img_size"


def bad_values(name, action):
    """What an option must refuse."""
    if action.choices is not None:
        first = list(action.choices)[0]
        return ["misspelt", "", f"{first}x", "2" if isinstance(first, int) else first.upper()]
    if action.dest == "img_size":
        return [*BAD_NUMBERS, "0", "16x0", "x", "16x16x16", "16.5"]
    if not is_number(action):
        return [""]                                                         # names of files and the like
    option, bad = action.option_strings[-1], list(BAD_NUMBERS)
    if not zero_is_valid(name, option):
        bad.append("0")
    with contextlib.suppress(run.argparse.ArgumentTypeError):               # whole, or not within its bounds at all
        value = action.type("2.5")
        assert isinstance(value[0] if isinstance(value, list) else value, float), option
        return bad
    return [*bad, "2.5"]


def base_of(name, words, encoder):
    """Arguments to which one more option is added."""
    more = REQUIRED.get(name, [])
    if name == "analyze" and words[0] in ("gradients", "vic", "attention", "tsne", "reconstruct"):
        more = ["--checkpoint", "{encoder}"]
    return [*words, *(a.replace("{encoder}", str(encoder)) for a in more)]


def attempt(name, arguments, monkeypatch):
    """(exit code or None if the arguments were taken, lines of stderr, the options) of a script whose work is left out."""
    reached, said = [], io.StringIO()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        run.program(reached.append, PROGRAMS[name].get_args)
    return (None if reached else end.value.code), said.getvalue().splitlines(), reached


@pytest.mark.parametrize("name, words, parser", parsers(), ids=lambda v: v if isinstance(v, str) else "".join(
    v) if isinstance(v, list) else "")
def test_every_option_of_every_script_with_every_bad_value(encoder, tmp_path, monkeypatch, name, words, parser):
    monkeypatch.chdir(tmp_path)
    base, tried = base_of(name, words, encoder), 0
    code, lines, _ = attempt(name, base, monkeypatch)
    assert code is None, lines                                              # what is refused below is refused for itself
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0 or action.dest in ("help", "common"):
            continue                                                        # --common holds options of other scripts
        option = action.option_strings[-1]
        for value in bad_values(name, action):
            arguments = [*base, f"{option}={value}"] if action.nargs != 2 else [*base, option, value, "file"]
            code, lines, reached = attempt(name, arguments, monkeypatch)
            tried += 1
            assert code == 2 and len(lines) == 1 and ": error: " in lines[0], (arguments, code, lines, reached)
        if is_number(action) and zero_is_valid(name, option):
            more = ["--probe-block", "1"] if option == "--blocks" else []
            code, lines, reached = attempt(name, [*base, *more, option, "0"], monkeypatch)
            assert code is None, (option, lines)
            assert getattr(reached[0], action.dest) in (0, [0]), option
    assert not os.listdir(tmp_path)                                         # nothing was written
    assert tried
    print(f"{name} {' '.join(words)}: {tried} bad values refused")


CONTRADICTIONS = [
    ("mae_pretrain", ["--init", "{encoder}", "--arch", "vit_base"], "go without --init"),
    ("mae_pretrain", ["--init", "{encoder}", "--patch-size", "4"], "go without --init"),
    ("mae_pretrain", ["--epochs", "3", "--warmup-epochs", "4"], "--warmup-epochs 4 is more than --epochs 3"),
    ("mae_pretrain", ["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    ("mae_pretrain", ["--data", "{tmp}/nowhere"], "no such folder"),
    ("mae_pretrain", ["--out", "{file}"], "cannot write there"),
    ("mae_pretrain", ["--out", "{file}/below/it"], "cannot write there"),
    ("mae_pretrain", ["--epo", "3"], "unrecognized arguments"),
    ("mae_pretrain", ["3"], "unrecognized arguments"),
    ("mae_pretrain", ["--seed"], "expected one argument"),
    ("graft_train", ["--init", "{encoder}", "--arch", "vit_base"], "go with --init none"),
    ("graft_train", ["--init", "none", "--anchor-weight", "1"], "it cannot go with --init none"),
    ("graft_train", ["--init", "{tmp}/nowhere"], "no checkpoint"),
    ("graft_train", ["--init", "none", "--epochs", "3", "--warmup-epochs", "4"], "is more than --epochs 3"),
    ("graft_train", ["--init", "none", "--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    ("graft_train", ["--init", "none", "--out", "{file}"], "cannot write there"),
    ("finetune", ["--checkpoint", "{encoder}", "--from-projector", "--freeze-blocks", "1"], "not allowed with"),
    ("finetune", ["--checkpoint", "{encoder}", "--probe-block", "1", "--freeze-blocks", "1"], "not allowed with"),
    ("finetune", ["--checkpoint", "{encoder}", "--blocks", "1"], "--blocks goes with --probe-block"),
    ("finetune", ["--checkpoint", "{encoder}", "--epochs", "3", "--warmup-epochs", "4"], "is more than --epochs 3"),
    ("finetune", ["--checkpoint", "{encoder}", "--results", "{file}"], "cannot write there"),
    ("finetune", ["--checkpoint", "{tmp}/nowhere"], "no checkpoint"),
    ("evaluate", ["--checkpoint", "{tmp}/nowhere"], "no checkpoint"),
    ("evaluate", ["--mode", "predict"], "--mode predict needs"),
    ("evaluate", ["--mode", "predict", "--classifier", "{file}"], "--mode predict needs"),
    ("evaluate", ["--export", "onnx", "file"], "it must be timm or hf"),
    ("evaluate", ["--mode", "finetune", "--blocks", "1", "--checkpoint", "{encoder}"], "--blocks goes with"),
    ("evaluate", ["--checkpoint", "{encoder}", "--block", "2"], "--block goes with --mode features"),
    ("evaluate", ["--checkpoint", "{encoder}", "--classifier", "{file}"], "--classifier goes with --mode predict"),
    ("evaluate", ["--checkpoint", "{encoder}", "--input", "{tmp}"], "--input goes with --mode"),
    ("evaluate", ["--export", "timm", "file", "--table"], "--export and --table"),
    ("analyze", [], "required"),
    ("analyze", ["everything"], "invalid choice"),
    ("analyze", ["vic", "--checkpoint", "{tmp}/nowhere"], "no such file or folder"),
    ("analyze", ["augment", "--out", "{file}"], "cannot write there"),
    ("reproduce", ["--only", "table9"], "--only table9"),
    ("reproduce", ["--preset", "imagenet"], "needs --data FOLDER"),
    ("reproduce", ["--data", "{tmp}/nowhere"], "no such folder"),
    ("reproduce", ["--out", "{file}"], "cannot write there"),
]


@pytest.mark.parametrize("name, arguments, message", CONTRADICTIONS, ids=str)
def test_options_that_contradict_each_other_end_before_anything_is_made(encoder, tmp_path, monkeypatch, name, arguments,
                                                                        message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    places = {"{encoder}": encoder, "{tmp}": tmp_path, "{file}": tmp_path / "file"}
    for word, place in places.items():
        arguments = [a.replace(word, str(place)) for a in arguments]
    code, lines, _ = attempt(name, arguments, monkeypatch)
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("stage, arguments", [
    ("mae_pretrain", ["--arch", "vit_test", "--img-size", "20"]), ("mae_pretrain", ["--arch", "vit_test", "--lr", "1,1"]),
    ("mae_pretrain", ["--arch", "vit_test", "--batch-size", "1000"]), ("mae_pretrain", ["--init", "{tmp}/nowhere.pt"]),
    ("graft_train", ["--init", "none", "--arch", "vit_test", "--freeze-blocks", "9"]),
    ("graft_train", ["--init", "{encoder}", "--lr", "0"]), ("finetune", ["--checkpoint", "{encoder}", "--freeze-blocks", "9"]),
    ("finetune", ["--checkpoint", "{encoder}", "--probe-block", "9"]),
    ("finetune", ["--checkpoint", "{encoder}", "--labels", "0%"]),
    ("evaluate", ["--checkpoint", "{encoder}", "--labels", "nan%", "--mode", "fewshot"]),
    ("evaluate", ["--checkpoint", "{encoder}", "--mode", "features", "--block", "9"])], ids=str)
def test_what_only_data_or_weights_can_tell_ends_before_a_file_is_written(encoder, tmp_path, monkeypatch, stage, arguments):
    one_process(monkeypatch)
    arguments = [a.replace("{encoder}", str(encoder)).replace("{tmp}", str(tmp_path)) for a in arguments]
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        run.program(PROGRAMS[stage].main, PROGRAMS[stage].get_args)
    assert end.value.code == 2 and len(said.getvalue().splitlines()) == 1, said.getvalue()
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") in ([], ["lock"])


# ------------------------------------------------------------------------------------------------ hostile files
class Payload:
    """A pickled object that would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def rezipped(path, change, compression=zipfile.ZIP_STORED):
    """Write a checkpoint's archive again with other parts: change(name, bytes) -> bytes."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts:
            archive.writestr(name, change(name, content))


def many_keys(path, legacy):
    """A file of 20 MB that torch would take half a minute over."""
    torch.save({}, path, _use_new_zipfile_serialization=not legacy)
    listed = pickle.dumps({"model": dict.fromkeys((f"blocks.{i}.weight" for i in range(1_000_000)), 0)}, 2)
    if legacy:                                                              # the fourth of five pickles
        path.write_bytes(path.read_bytes().replace(pickle.dumps({}, 2), listed, 1))
    else:
        rezipped(path, lambda name, content: listed if name.endswith("data.pkl") else content)


def claims(path, encoder, **config):
    """Our own layout, whose description of the encoder lies."""
    content = saved(encoder, "encoder.pt")
    content["config"] = content["config"] | config
    torch.save(content, path)


def with_tensor(path, encoder, tensor, name="norm.weight"):
    content = saved(encoder, "encoder.pt")
    content["model"][name] = tensor
    torch.save(content, path)


def with_meta(path, encoder, **meta):
    content = saved(encoder, "encoder.pt")
    content["meta"] |= meta
    torch.save(content, path)


def short_storage(path, encoder):
    """Every tensor's bytes cut to four, its size in the list of contents left as it was."""
    shutil.copy(encoder / "encoder.pt", path)
    rezipped(path, lambda name, content: content[:4] if "/data/" in name else content)


def padded_storage(path, encoder):
    """The same, and as many bytes as the file had in a part that no tensor uses."""
    short_storage(path, encoder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/padding", bytes(1 << 20))


def bomb(path, encoder):
    """A quarter of a gigabyte of zeros, deflated to a megabyte."""
    shutil.copy(encoder / "encoder.pt", path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/zeros", bytes(1 << 28))


def petabytes(path, encoder):
    """A tensor whose rebuilding asks for 10^15 elements of a storage of four bytes."""
    with_tensor(path, encoder, torch.zeros(7777))
    # 7777 as a pickled BININT2 stands for the size, and for the number of elements in the storage
    rezipped(path, lambda name, content: content.replace(b"M" + (7777).to_bytes(2, "little"),
                                                         b"\x8a\x08" + (10 ** 15).to_bytes(8, "little"))
             if name.endswith("data.pkl") else content)


def nested(path, depth=200_000):
    torch.save({}, path)
    listed = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."
    rezipped(path, lambda name, content: listed if name.endswith("data.pkl") else content)


HOSTILE = {
    "code": lambda path, encoder: torch.save({"model": Payload()}, path),
    "code in the old format": lambda path, encoder: torch.save({"model": Payload()}, path,
                                                               _use_new_zipfile_serialization=False),
    "code in a bare pickle": lambda path, encoder: path.write_bytes(pickle.dumps({"model": Payload()}, 2)),
    "code as a key": lambda path, encoder: torch.save({"model": {}, "meta": {"x": [Payload()]}}, path),
    "a whole model": lambda path, encoder: torch.save(model.VisionTransformer(16, 8, dim=24, depth=1, heads=1), path),
    "a function": lambda path, encoder: path.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "a million keys": lambda path, encoder: many_keys(path, False),
    "a million keys in the old format": lambda path, encoder: many_keys(path, True),
    "deep nesting": lambda path, encoder: nested(path),
    "a petabyte by expand": lambda path, encoder: with_tensor(path, encoder, torch.zeros(1).expand(10 ** 7, 10 ** 8)),
    "a width by expand": lambda path, encoder: with_tensor(path, encoder, torch.zeros(1).expand(24)),
    "a petabyte by its size": lambda path, encoder: petabytes(path, encoder),
    "bytes that are not there": lambda path, encoder: short_storage(path, encoder),
    "bytes that are not there, padded": lambda path, encoder: padded_storage(path, encoder),
    "a zip bomb": lambda path, encoder: bomb(path, encoder),
    "no tensors": lambda path, encoder: torch.save({"model": {"pos_embed": 3, "patch_embed.proj.weight": "x"}}, path),
    "keys that are no names": lambda path, encoder: torch.save({"model": {1: torch.zeros(2), (2,): torch.zeros(2)}}, path),
    "a sparse tensor": lambda path, encoder: with_tensor(path, encoder, torch.sparse_coo_tensor([[0]], [1.0], (10 ** 12,))),
    "a tensor on no device": lambda path, encoder: with_tensor(path, encoder, torch.empty(10 ** 9, 10 ** 6, device="meta")),
    "no dimensions": lambda path, encoder: with_tensor(path, encoder, torch.tensor(1.0), "patch_embed.proj.weight"),
    "whole numbers": lambda path, encoder: with_tensor(path, encoder, torch.zeros(24, dtype=torch.int64)),
    "no number": lambda path, encoder: with_tensor(path, encoder, torch.full((24,), float("nan"))),
    "infinite": lambda path, encoder: with_tensor(path, encoder, torch.full((24,), float("inf"))),
    "a width of 10^9": lambda path, encoder: claims(path, encoder, dim=10 ** 9),
    "a width of 4096": lambda path, encoder: claims(path, encoder, dim=4096, heads=1),
    "a million blocks": lambda path, encoder: claims(path, encoder, depth=10 ** 6),
    "two hundred blocks": lambda path, encoder: claims(path, encoder, depth=200),
    "no heads": lambda path, encoder: claims(path, encoder, heads=0),
    "pictures of a gigapixel": lambda path, encoder: claims(path, encoder, img_size=[10 ** 6, 10 ** 6]),
    "pictures of 16384": lambda path, encoder: claims(path, encoder, img_size=[16384, 16384]),
    "pictures of three sides": lambda path, encoder: claims(path, encoder, img_size=[32, 32, 32]),
    "a picture that is a word": lambda path, encoder: claims(path, encoder, img_size="32"),
    "patches of nothing": lambda path, encoder: claims(path, encoder, patch_size=0),
    "an infinite mlp": lambda path, encoder: claims(path, encoder, mlp_ratio=float("inf")),
    "an mlp that is a word": lambda path, encoder: claims(path, encoder, mlp_ratio="wide"),
    "a negative width": lambda path, encoder: claims(path, encoder, dim=-24),
    "an unknown setting": lambda path, encoder: claims(path, encoder, backdoor=True),
    "a mean that is a word": lambda path, encoder: with_meta(path, encoder, mean="0.5"),
    "a mean for one channel": lambda path, encoder: with_meta(path, encoder, mean=[0.5]),
    "a std of zero": lambda path, encoder: with_meta(path, encoder, std=[0.0, 0.2, 0.2]),
    "a mean that is no number": lambda path, encoder: with_meta(path, encoder, mean=[float("nan")] * 3),
    "a system that is a list": lambda path, encoder: with_meta(path, encoder, system=["a"] * 3),
    "nothing": lambda path, encoder: path.write_bytes(b""),
    "noise": lambda path, encoder: path.write_bytes(random.Random(0).randbytes(100_000)),
    "half a file": lambda path, encoder: path.write_bytes((encoder / "encoder.pt").read_bytes()[:5000]),
    "a flipped archive": lambda path, encoder: path.write_bytes((encoder / "encoder.pt").read_bytes()[::-1]),
    "a picture": lambda path, encoder: Image.new("RGB", (9, 9)).save(path, "PNG"),
    "a folder": lambda path, encoder: path.mkdir(),
    "a named pipe": lambda path, encoder: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoints_are_refused_in_a_line_and_at_once(encoder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    HOSTILE[kind](path, encoder)
    limit, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open("/proc/self/statm") as f:                                 # it may take one gigabyte more
            pages = int(f.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limit[1]))
        with pytest.raises(data.UsageError) as error:
            checkpoint.read_encoder(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10      # in KiB
    assert "\n" not in str(error.value) and "hostile.pt" in str(error.value) and len(str(error.value)) < 400
    assert not os.path.exists("payload-was-run")


def test_a_tensor_larger_than_its_part_of_the_archive_is_refused_by_us_too():
    """Newer versions of torch look for themselves; the older ones read on into other memory."""
    content = {"a": torch.zeros(100), "b": [torch.zeros(3, dtype=torch.int64)]}
    checkpoint.measure(content, 1000, Counter([400, 24, 8]), "file")
    with pytest.raises(data.UsageError, match="file: refused, its tensors claim 424 bytes"):
        checkpoint.measure(content, 1000, Counter([40, 24]), "file")
    with pytest.raises(data.UsageError, match="file: refused, its tensors claim 424 bytes"):
        checkpoint.measure(content, 423, None, "file")


LINES = ["../secret.png", "../../etc/passwd", "/etc/passwd", "cat/../../secret.png", "..", "cat\\..\\..\\secret.png",
         "~/secret.png", "file:///etc/passwd", "http://example.org/a.png", "cat/nothing.png 3", "\x00", "cat/", "%2e%2e/secret.png"]


@pytest.mark.parametrize("line", LINES)
def test_list_files_lead_to_no_file_outside_the_data(tmp_path, line):
    root = folder_of(tmp_path / "data", ["cat/1.png", "dog/2.png"])
    folder_of(tmp_path, ["secret.png"])
    (tmp_path / "data" / "list.txt").write_text(f"cat/1.png\n{line}\n")
    with pytest.raises(data.UsageError) as error:
        data.load_data(f"{root}/list.txt")
    assert "\n" not in str(error.value) and "list.txt" in str(error.value)


def test_names_in_lists_may_have_blanks(tmp_path):
    names = ["a cat/name with spaces.jpg", "a cat/2 3.png", "a cat/7", "dogs/1.png"]
    root = folder_of(tmp_path, [n if "." in n else n + ".png" for n in names])
    for text, expected in (("a cat/name with spaces.jpg 12\na cat/2 3.png\t4\ndogs/1.png",
                            ["a cat/name with spaces.jpg", "a cat/2 3.png", "dogs/1.png"]),
                           ("a cat/name with spaces.jpg cat\n", ["a cat/name with spaces.jpg"]),
                           ("  name with spaces.jpg  \r\n2 3.png 0\r\n", ["a cat/name with spaces.jpg", "a cat/2 3.png"])):
        (tmp_path / "list.txt").write_text(text)
        assert data.load_data(f"{root}/list.txt").files == expected


def test_a_link_to_a_folder_above_is_followed_no_further(tmp_path):
    folder_of(tmp_path / "data", ["cat/1.png", "dog/2.png"])
    folder_of(tmp_path / "elsewhere", ["3.png"])
    os.symlink(tmp_path / "data", tmp_path / "data" / "cat" / "again")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "bird")          # other links are: sets are put together so
    assert data.list_files(str(tmp_path / "data")) == ["bird/3.png", "cat/1.png", "dog/2.png"]


CLASSIFIERS = {
    "no head": dict(head=3), "a width of 10^9": dict(head=dict(kind="projector", width=10 ** 9, bias=True)),
    "a million blocks": dict(head=dict(kind="probe", block=1, blocks=10 ** 6)), "a word": dict(classes="cat"),
    "too many classes": dict(classes=["c"] * 100), "another kind": dict(head=dict(kind="probe", block=-1, blocks=0)),
    "no mean": dict(mean=None, std=[0.0] * 3), "a huge encoder": dict(config=dict(dim=10 ** 9, depth=3)),
    "no weights": dict(model={}), "weights that are words": dict(model={"a": "b"})}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_hostile_classifiers_are_refused(encoder, tmp_path, kind):
    net = finetune.make(saved(encoder, "encoder.pt")["config"], dict(kind="linear"), 4)
    good = dict(model=net.state_dict(), config=net.config, classes=list("abcd"), head=dict(kind="linear"), mean=[0.5] * 3,
                std=[0.5] * 3)
    torch.save(good, tmp_path / "classifier.pt")
    assert len(finetune.load_classifier(str(tmp_path))[1]["classes"]) == 4
    torch.save(good | CLASSIFIERS[kind], tmp_path / "classifier.pt")
    began = time.monotonic()
    with pytest.raises(data.UsageError) as error:
        finetune.load_classifier(str(tmp_path))
    assert "\n" not in str(error.value) and time.monotonic() - began < 2


@pytest.mark.parametrize("change", [dict(classifier=3), dict(classifier={}), dict(classes=["a"]), dict(mean="x"),
                                    dict(checkpoint=3), dict(std=[0.0] * 3)], ids=str)
def test_hostile_linear_classifiers_are_refused(tmp_path, change):
    good = dict(classifier=dict(weight=torch.zeros(4, 24), bias=torch.zeros(4), normalise=False), classes=list("abcd"),
                checkpoint="x", encoder_digest="x", mean=[0.5] * 3, std=[0.5] * 3)
    checkpoint.check_linear(good, "file")
    with pytest.raises(data.UsageError, match="^file: "):
        checkpoint.check_linear(good | change, "file")


# ------------------------------------------------------------------------------------------- broken picture files
def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_that_claims(width, height):
    """A PNG of a hundred bytes that says it has so many pixels."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def encoded(form, mode="RGB", size=(40, 36), **more):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode)
    into = io.BytesIO()
    picture.save(into, form, **more)
    return into.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


GOOD_FILES = {
    "animated.gif": encoded("GIF", "P", save_all=True, append_images=[Image.new("P", (40, 36))] * 3),
    "cmyk.jpg": encoded("JPEG", "CMYK"), "sixteen.png": encoded("PNG", "I;16"), "turned.jpg": turned(),
    "a_png_in_truth.jpg": encoded("PNG"), "grey.png": encoded("PNG", "L"), "alpha.png": encoded("PNG", "RGBA"),
    "palette.png": encoded("PNG", "P"), "one_bit.tif": encoded("TIFF", "1"), "progressive.jpg": encoded("JPEG", progressive=True),
    "a dot.and spaces.PNG": encoded("PNG"), "wide.bmp": encoded("BMP", size=(300, 2)), "one_pixel.png": encoded("PNG", size=(1, 1)),
    "animated.webp": encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (40, 36))] * 3)}
BAD_FILES = {
    "truncated.jpg": encoded("JPEG")[:600], "truncated.png": encoded("PNG")[:900], "truncated.gif": encoded("GIF")[:300],
    "truncated.webp": encoded("WEBP")[:200], "truncated.tif": encoded("TIFF")[:900], "truncated.bmp": encoded("BMP")[:900],
    "header_only.png": encoded("PNG")[:8], "empty.jpg": b"", "text.jpg": b"this is text\n" * 9, "html.png": b"<!DOCTYPE html>",
    "noise.jpg": random.Random(0).randbytes(5000), "noise_after_head.jpg": encoded("JPEG")[:20] + bytes(range(256)) * 9,
    "flipped.png": encoded("PNG")[:200] + bytes(64) + encoded("PNG")[264:], "bomb.png": png_that_claims(60000, 60000),
    "small_bomb.png": png_that_claims(12000, 12000), "vast.png": png_that_claims(2 ** 31 - 1, 2 ** 31 - 1),
    "no_pixels.png": png_that_claims(0, 0), "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pickle.png": pickle.dumps({"a": Payload()}, 2), "short.jpg": b"\xff\xd8\xff"}


@pytest.fixture
def mixed(tmp_path):
    """A folder of 100 good pictures and every bad and unusual one."""
    root = tmp_path / "pictures"
    folder_of(root, [f"good/{i:03}.png" for i in range(100)], (24, 136))
    for name, content in (GOOD_FILES | BAD_FILES).items():
        (root / name).write_bytes(content)
    (root / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    return root


ALL_BAD = {*BAD_FILES, "dangling.png"}


@pytest.mark.parametrize("name", [*BAD_FILES, *GOOD_FILES])
def test_each_kind_of_file_is_read_or_refused_without_its_memory(tmp_path, name):
    (tmp_path / name).write_bytes((BAD_FILES | GOOD_FILES)[name])
    pictures, before = data.Pictures([name], str(tmp_path)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name in BAD_FILES:
        with pytest.raises(data.BadFile):
            pictures.read(0)
    else:
        assert pictures.read(0).mode == "RGB"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    if name == "turned.jpg":
        assert pictures.read(0).size == (36, 40)
    if name == "animated.gif":
        assert np.abs(np.asarray(pictures.read(0)).astype(int)).std() > 20  # the first picture, not a blank later one


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_kill_no_run_and_are_named_once(mixed, capsys, workers):
    pictures = data.load_data(str(mixed), max_bad=0.5)
    loader = data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 10, workers=workers, max_bad=0.5)
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert len(batches) == len(pictures) // 10 and all(b.views[0][:].isfinite().all() for b in batches)
    said = capsys.readouterr().out
    assert {pictures.file(i) for i in pictures.bad} <= ALL_BAD and len(pictures.bad) >= len(ALL_BAD) - 2
    for i in pictures.bad:
        assert said.count(f"warning: skipped {mixed / pictures.file(i)}: ") == 1
    with pytest.raises(data.RunError, match=r"pictures cannot be read, more than --max-bad 0.05 allows; first"):
        for _ in data.Loader(data.load_data(str(mixed), max_bad=0.05), [augment.MAE_VIEW], (16, 16), 10, max_bad=0.05).epoch(0):
            pass


def test_files_that_vanish_while_training_are_replaced(tmp_path, capsys):
    names = [f"{i:03}.png" for i in range(40)]
    pictures = data.load_data(folder_of(tmp_path, names, (24, 136)))
    loader = data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 10, max_bad=0.3)
    assert len(list(loader.epoch(0))) == 4
    for name in names[:5]:
        os.remove(tmp_path / name)
    for epoch in (1, 2):
        assert len(list(loader.epoch(epoch))) == 4
    assert sorted(pictures.bad) == list(range(5))
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 5 and said.count("FileNotFoundError") == 5


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


def test_files_without_permission_are_replaced(tmp_path):
    names = [f"{i:03}.png" for i in range(40)]
    root = folder_of(tmp_path / "pictures", names, (24, 136))
    os.chmod(tmp_path / "pictures" / "007.png", 0)
    reachable(tmp_path / "pictures")

    def work():
        pictures = data.load_data(root)
        assert len(list(data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 10, max_bad=0.1).epoch(0))) == 4
        assert list(pictures.bad) == [7]

    assert "007.png: PermissionError" in unprivileged(work)


def checked(arguments, monkeypatch, capsys):
    """(exit code, what it printed, its errors) of python data.py check."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run.program(check.main, check.get_args)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_check_reports_what_a_run_would_meet(mixed, tmp_path, monkeypatch, capsys):
    code, out, err = checked([mixed, "--out", tmp_path / "bad.txt", "--workers", 2], monkeypatch, capsys)
    assert code == 1 and len(err.strip().splitlines()) == 1
    listed = dict(line.split("\t")[:2] for line in (tmp_path / "bad.txt").read_text().splitlines())
    assert set(listed) == ALL_BAD
    assert listed["empty.jpg"] == "empty" and listed["dangling.png"] == "vanished" and listed["text.jpg"] == "no picture"
    assert {listed[n] for n in ("bomb.png", "small_bomb.png", "vast.png")} == {"decompression bomb"}
    assert {listed[n] for n in ("truncated.jpg", "truncated.png")} == {"truncated"}
    assert f"{len(ALL_BAD)} of {100 + len(GOOD_FILES) + len(ALL_BAD)} pictures are bad" in err and "3 decompression bomb" in err
    assert f"{100 + len(GOOD_FILES)} of {100 + len(GOOD_FILES) + len(ALL_BAD)} pictures are good" in out
    for words in ("2 animated", "1 CMYK", "1 16-bit", "1 turned by EXIF", "1 another format than its name says"):
        assert words in out, out
    shutil.rmtree(mixed / "good")
    for name in ALL_BAD:
        os.remove(mixed / name)
    code, out, err = checked([mixed], monkeypatch, capsys)
    assert code == 0 and not err and f"{len(GOOD_FILES)} of {len(GOOD_FILES)} pictures are good" in out


def test_check_shows_its_progress_and_refuses_nonsense(tmp_path, monkeypatch, capsys):
    root = folder_of(tmp_path / "p", [f"{i}.png" for i in range(40)])
    clock = iter(range(0, 10 ** 6, 10))
    with monkeypatch.context() as patch:
        patch.setattr(check.time, "perf_counter", lambda: float(next(clock)))
        code, out, err = checked([root, "--workers", "1"], patch, capsys)
    assert code == 0 and len(err.splitlines()) > 10 and "20/40 read, 0 bad, left " in err
    (tmp_path / "empty").mkdir()
    for arguments in ([tmp_path / "nowhere"], [tmp_path / "empty"], [root, "--workers", "0"], [root, "--out", tmp_path], []):
        code, out, err = checked(arguments, monkeypatch, capsys)
        assert code == 2 and len(err.strip().splitlines()) == 1, err


def test_data_py_hands_over_to_its_commands(tmp_path):
    root = folder_of(tmp_path, ["1.png", "2.png"])
    (tmp_path / "3.png").write_bytes(b"")
    done = subprocess.run([sys.executable, os.path.join(HERE, "data.py"), "check", root], capture_output=True, text=True)
    assert done.returncode == 1 and "1 of 3 pictures are bad: 1 empty" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, os.path.join(HERE, "data.py"), "juggle"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "usage: python data.py check DIR\n"


# ------------------------------------------------------------------------------------- disks, folders, the network
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


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("prepare", [room_for_part_of_a_checkpoint, no_room_for_a_line])
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
    expected = ("log.jsonl: No space left",) if prepare is no_room_for_a_line else (".pt: the write fails", ".pt: File too large")
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


def test_readers_that_outlive_a_killed_run_do_not_lock_its_folder(start, encoder, tmp_path):
    root = folder_of(tmp_path / "pictures", [f"{i:03}.png" for i in range(96)], (24, 136))
    more = options("mae_pretrain", encoder, tmp_path / "out", "--data", root, "--epochs", "2", "--img-size", "16", "--workers", "2")
    job = start("mae_pretrain", *more, prepare=slow_steps).until(" step 3/")
    job.jobs[0].kill()
    while os.path.exists(f"/proc/{job.jobs[0].pid}"):
        time.sleep(0.001)
    job = start("mae_pretrain", *more)
    assert job.codes() == [0], job.said()
    assert "resumed" in job.said() and saved(tmp_path / "out")["step"] == 12


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
    with pytest.raises(data.RunError, match="loss or gradient was not finite 6 times, last at step 10;.*last good checkpoint is"):
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
    data.embedded = lambda *more: full(*more).select(range(64))


def hang_by_itself(step=3):
    """The same, of its main thread alone: as a read from a disk that does not answer."""
    record = run.Run.record
    run.Run.record = lambda self, number, *more: (record(self, number, *more), number == step and time.sleep(1000))


DISTRIBUTED = ["--epochs", "2", "--timeout-minutes", "0.1", "--batch-size", "15"]


@pytest.mark.parametrize("stage, fault, lost", [("mae_pretrain", die, 1), ("graft_train", stop_answering, 1),
                                                ("finetune", hang_by_itself, 2), ("graft_train", hang_by_itself, 0)])
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


ALONE = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--batch-size", "8", "--lr", "0.01", "--log-every", "1",
         "--save-minutes", "1e-9", *QUIET]


def test_torchrun_brings_a_killed_worker_back(tmp_path):
    root = folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(36)])
    out, more = tmp_path / "out", ["--epochs", "6"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2",
               os.path.join(HERE, "mae_pretrain.py"), "--data", root, "--out", str(out), *ALONE, *more]
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
