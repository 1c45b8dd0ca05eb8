"""Tests of reproduce.py: what distinguishes each system's command, the tables, and resuming. The stages are stubs."""
import json
import os
import types

import pytest

import data
import reproduce


def arguments(tmp_path, *options, preset="demo"):
    return reproduce.get_args(["--preset", preset, "--out", str(tmp_path), *options])


def options_of(args, name, preset="demo"):
    """The training command of a system, parsed by its own stage."""
    stage, options = reproduce.command(args, reproduce.PRESETS[preset], 0, name)
    return stage, options


@pytest.fixture
def stubs(monkeypatch):
    """Stage and protocol mains that note their calls; top-1 is the number of calls so far."""
    calls = []

    def main_of(script):
        def main(args):
            calls.append((script.__name__, args))
            return dict(protocol="stub", top1=float(len(calls)), held_out_top1=-float(len(calls)), seed=0)
        return main

    def train_of(script, seconds):
        """A training main that also leaves the log of a run that took 2 x seconds."""
        evaluated = main_of(script)

        def main(args):
            out = args.argv[args.argv.index("--out") + 1]
            os.makedirs(out, exist_ok=True)
            with open(os.path.join(out, "log.jsonl"), "w") as f:
                f.writelines(json.dumps(dict(step=step, seconds=seconds)) + "\n" for step in (1, 2))
            return evaluated(args)
        return main

    monkeypatch.setattr(reproduce.mae_pretrain, "main", train_of(reproduce.mae_pretrain, 30.0))
    monkeypatch.setattr(reproduce.graft_train, "main", train_of(reproduce.graft_train, 45.0))
    for script in (reproduce.evaluate, reproduce.finetune):
        monkeypatch.setattr(script, "main", main_of(script))
    for script in (reproduce.mae_pretrain, reproduce.graft_train, reproduce.evaluate, reproduce.finetune):
        monkeypatch.setattr(script, "get_args", lambda argv: types.SimpleNamespace(argv=argv))
    return calls


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_system_is_its_command(tmp_path, preset):
    args = arguments(tmp_path, "--data", str(tmp_path), preset=preset)
    value = {}
    for name in reproduce.systems(reproduce.PRESETS[preset]):
        stage, options = options_of(args, name, preset)
        assert sum(option == "--crop-min" for option in options) <= 1
        value[name] = {o: v for o, v in zip(options, options[1:]) if o.startswith("--")}
        assert value[name]["--out"] != value["MAE"]["--out"] or name == "MAE"
        of_mae = name.startswith(("MAE", "tune MAE")) or name == "CL -> MIM grafting"
        assert stage.__name__ == ("mae_pretrain" if of_mae else "graft_train")
    mae, moco = value["MAE"]["--out"], value["MoCo v3"]["--out"]
    assert value["MoCo v3"]["--init"] == "none" and "," not in value["MoCo v3"]["--lr"]
    assert value["MTL"] == value["MoCo v3"] | {"--mim-weight": "1", "--out": value["MTL"]["--out"]}
    assert value["CL -> MIM grafting"]["--init"] == moco and value["MIM -> CL grafting"]["--init"] == mae
    depth = reproduce.PRESETS[preset]["depth"]
    for name in ("CL -> MIM grafting", "MIM -> CL grafting"):
        assert int(value[name]["--freeze-blocks"]) == 2 * depth // 3
    rates = [float(rate) for rate in value["Layer grafted"]["--lr"].split(",")]
    assert value["Layer grafted"]["--init"] == mae and rates[0] <= rates[1] < rates[2]
    assert value["VICReg"]["--loss"] == value["Layer grafted VICReg"]["--loss"] == "vicreg"
    assert float(value["Layer grafted, anchored"]["--anchor-weight"]) > 0
    total = int(value["MAE"]["--epochs"]) + int(value["Layer grafted"]["--epochs"])
    assert int(value[reproduce.TOTAL]["--epochs"]) == total
    assert sum(name.startswith("grid ") for name in value) >= (6 if preset == "cifar10-small" else 9)


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_command_is_accepted_by_its_stage(tmp_path, preset, monkeypatch):
    monkeypatch.setattr(reproduce.graft_train.os.path, "exists", lambda path: True)
    args = arguments(tmp_path, "--data", str(tmp_path), preset=preset)
    p = reproduce.PRESETS[preset]
    for name in reproduce.systems(p):
        stage, options = options_of(args, name, preset)
        stage.get_args(["7" if option == "?" else option for option in options])
    for (_, name, _), (script, options) in reproduce.jobs(args, p).items():
        script.get_args([*options, "--checkpoint", str(tmp_path)])
        assert name


def test_what_a_system_starts_from_is_trained_before_it_and_once(tmp_path, stubs):
    reproduce.main(arguments(tmp_path, "--only", "table4,table1"))
    outs = [call.argv[call.argv.index("--out") + 1] for script, call in stubs if script in ("mae_pretrain", "graft_train")]
    assert len(outs) == len(set(outs))
    order = [out.rsplit("/", 1)[1] for out in outs]
    assert order.index("mae") < order.index("layer-grafted-vicreg") and order.index("mae") < order.index("mim-cl-grafting")
    assert order.index("moco-v3") < order.index("cl-mim-grafting")


def test_a_second_run_skips_what_is_done_and_a_broken_one_goes_on(tmp_path, stubs, monkeypatch):
    reproduce.main(arguments(tmp_path, "--only", "table3"))
    lines = open(tmp_path / "results.jsonl").read().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["MAE", "MoCo v3", "Layer grafted"]
    before = len(stubs)
    reproduce.main(arguments(tmp_path, "--only", "table3"))
    assert len(stubs) == before
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:2]) + "\n")
    reproduce.main(arguments(tmp_path, "--only", "table3"))
    evaluated = [script for script, _ in stubs[before:] if script == "finetune"]
    assert len(evaluated) == 1 and len(open(tmp_path / "results.jsonl").read().splitlines()) == 3


def test_tables_show_mean_deviation_and_the_papers_figure(tmp_path):
    args = arguments(tmp_path, "--only", "table2,figure4")
    p = reproduce.PRESETS["demo"]
    results = [dict(name="Layer grafted", protocol_name="linear", top1=top1) for top1 in (50.0, 52.0)]
    results.append(dict(name="grid 5e-4,5e-4,1.5e-3", protocol_name="linear", top1=33.3))
    text = reproduce.markdown(results, args, p)
    row, = [line for line in text.splitlines() if line.startswith("| Layer grafted |")]
    assert row.startswith("| Layer grafted | 51.0 ± 1.4 (77.7) |")
    heading = text.index("third stage 1.5e-3")
    assert "| 5e-4 | 33.3 |" in text[heading:]


def test_several_seeds_are_trained_apart(tmp_path, stubs):
    reproduce.main(arguments(tmp_path, "--only", "table3", "--seeds", "0,1"))
    seeds = {call.argv[call.argv.index("--seed") + 1] for script, call in stubs if script == "graft_train"}
    assert seeds == {"0", "1"}


def test_equal_seconds_are_those_of_mae_and_grafting(tmp_path, stubs):
    args = arguments(tmp_path, "--only", "main", "--data", str(tmp_path), preset="cifar10-small")
    p = reproduce.PRESETS["cifar10-small"]
    for name in reproduce.EQUAL:                                            # nothing is trained yet
        assert reproduce.equal_epochs(args, p, 0, name) == "?"
    reproduce.main(args)
    epochs = {}
    for script, call in stubs:
        if script in ("mae_pretrain", "graft_train"):
            options = dict(zip(call.argv, call.argv[1:]))
            epochs[os.path.basename(options["--out"])] = int(options["--epochs"])
    # MAE takes 60 s and grafting 90 s, so MAE gets 150 / 60 of its epochs and MoCo v3 150 / 90 of its own
    assert epochs["mae-equal-seconds"] == round(epochs["mae"] * 150 / 60)
    assert epochs["moco-v3-equal-seconds"] == round(epochs["moco-v3"] * 150 / 90)
    cost = {e["name"]: e["train_seconds"] for e in reproduce.run.read_results(tmp_path / "results.jsonl")}
    assert cost["MAE"] == 60 and cost["MoCo v3"] == 90 and cost["Layer grafted"] == 150
    assert cost["MoCo v3, equal seconds"] == 90                             # of the stub; what it started from: nothing
    text = open(tmp_path / "results.md").read()
    assert "| Layer grafted | 150 |" in text and "| MAE | 60 |" in text


def test_tuning_shows_held_out_accuracy_and_tables_that_are_filled_stay(tmp_path, stubs):
    options = ["--data", str(tmp_path)]
    reproduce.main(arguments(tmp_path, "--only", "tuning", *options, preset="cifar10-small"))
    text = open(tmp_path / "results.md").read()
    rows = [line for line in text.splitlines() if line.startswith("| tune ")]
    assert len(rows) == 10 and all("| -" in row for row in rows)
    crops = {call.argv[call.argv.index("--crop-min") + 1] for script, call in stubs if script == "graft_train"}
    assert crops == {"0.08", "0.2", "0.4"}
    reproduce.main(arguments(tmp_path, "--only", "table3", *options, preset="cifar10-small"))
    text = open(tmp_path / "results.md").read()
    assert reproduce.TITLES["tuning"] in text and reproduce.TITLES["table3"] in text
    assert reproduce.TITLES["table2"] not in text


def test_schedules_and_splits(tmp_path, stubs):
    reproduce.main(arguments(tmp_path, "--only", "schedules,splits", "--seeds", "0", "--data", str(tmp_path),
                             preset="cifar10"))
    made = {os.path.basename(dict(zip(call.argv, call.argv[1:]))["--out"]): dict(zip(call.argv, call.argv[1:]))
            for script, call in stubs if script in ("mae_pretrain", "graft_train")}
    stages = {len(options["--lr"].split(",")) for name, options in made.items() if name.startswith("rates-")}
    assert stages == {2, 3, 4, 6, 12}
    assert made["split-50-85"]["--init"].endswith("mae-50-epochs") and made["mae-50-epochs"]["--epochs"] == "50"


def test_pictures_are_read_once(tmp_path, stubs, monkeypatch):
    read, seen = [], []
    monkeypatch.setattr(data, "load_data", lambda *args, **more: read.append(args) or data.Pictures([], name="x"))

    def evaluated(args):
        seen.append(data.load_data("folder", True))
        seen[-1].labels = "changed"
        return dict(protocol="stub", top1=1.0, seed=0)

    monkeypatch.setattr(reproduce.finetune, "main", evaluated)
    before = data.load_data
    reproduce.main(arguments(tmp_path, "--only", "table3"))
    assert len(seen) == 3 and len(read) == 1 and data.load_data is before
    assert seen[0] is not seen[1] and data.load_data("folder", True).labels is None


@pytest.mark.parametrize("options, message", [(["--only", "table9"], "--only table9"), (["--preset", "huge"], "choice"),
                                              (["--only", "splits"], "preset demo has none of it"),
                                              (["--preset", "imagenet"], "needs --data")])
def test_bad_arguments(options, message, capsys, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    with pytest.raises(SystemExit) as stop:
        reproduce.get_args(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_data_folder_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        arguments(tmp_path / "out", "--only", "table3", "--data", str(tmp_path / "nowhere"))
    assert end.value.code == 2 and "no such folder" in capsys.readouterr().err
