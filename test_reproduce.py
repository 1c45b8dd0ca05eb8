"""Tests of reproduce.py: what distinguishes each system's command, the tables, and resuming. The stages are stubs."""
import json
import types

import pytest

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
            return dict(protocol="stub", top1=float(len(calls)), seed=0)
        return main

    for script in (reproduce.mae_pretrain, reproduce.graft_train, reproduce.evaluate, reproduce.finetune):
        monkeypatch.setattr(script, "main", main_of(script))
        monkeypatch.setattr(script, "get_args", lambda argv: types.SimpleNamespace(argv=argv))
    return calls


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_system_is_its_command(tmp_path, preset):
    args = arguments(tmp_path, "--data", str(tmp_path), preset=preset)
    value = {}
    for name in reproduce.systems(reproduce.PRESETS[preset]):
        stage, options = options_of(args, name, preset)
        value[name] = {o: v for o, v in zip(options, options[1:]) if o.startswith("--")}
        assert value[name]["--out"] != value["MAE"]["--out"] or name == "MAE"
        assert stage.__name__ == ("mae_pretrain" if name in ("MAE", "CL -> MIM grafting") else "graft_train")
    mae, moco = value["MAE"]["--out"], value["MoCo v3"]["--out"]
    assert value["MoCo v3"]["--init"] == "none" and "," not in value["MoCo v3"]["--lr"]
    assert value["MTL"] == value["MoCo v3"] | {"--mim-weight": "1", "--out": value["MTL"]["--out"]}
    assert value["CL -> MIM grafting"]["--init"] == moco and value["MIM -> CL grafting"]["--init"] == mae
    depth = reproduce.PRESETS[preset]["depth"]
    for name in ("CL -> MIM grafting", "MIM -> CL grafting"):
        assert int(value[name]["--freeze-blocks"]) == 2 * depth // 3
    rates = [float(rate) for rate in value["Layer grafted"]["--lr"].split(",")]
    assert value["Layer grafted"]["--init"] == mae and rates[0] == rates[1] < rates[2]
    assert value["VICReg"]["--loss"] == value["Layer grafted VICReg"]["--loss"] == "vicreg"
    assert float(value["Layer grafted, anchored"]["--anchor-weight"]) > 0
    total = int(value["MAE"]["--epochs"]) + int(value["Layer grafted"]["--epochs"])
    assert int(value[reproduce.TOTAL]["--epochs"]) == total
    assert sum(name.startswith("grid ") for name in value) >= 9


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_command_is_accepted_by_its_stage(tmp_path, preset, monkeypatch):
    monkeypatch.setattr(reproduce.graft_train.os.path, "exists", lambda path: True)
    args = arguments(tmp_path, "--data", str(tmp_path), preset=preset)
    p = reproduce.PRESETS[preset]
    for name in reproduce.systems(p):
        stage, options = options_of(args, name, preset)
        stage.get_args(options)
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


@pytest.mark.parametrize("options, message", [(["--only", "table9"], "--only table9"), (["--preset", "huge"], "choice"),
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
