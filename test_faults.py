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

import numpy as np
import pytest
import torch
from PIL import Image

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
