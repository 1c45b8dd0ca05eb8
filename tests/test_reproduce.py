"""Tests of reproduce.py: what distinguishes each system's command, the tables, operations, resuming
and what is called at the end. The stages are stubs."""
import json
import os
import types
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model
import reproduce

SCRIPTS = ("mae_pretrain", "graft_train", "evaluate", "finetune", "segment", "analyze")


def arguments(tmp_path, *options, preset="demo"):
    """Options of a preset; --data where it needs one."""
    needed = [] if preset == "demo" else ["--data", str(tmp_path)]
    return reproduce.get_args(["--preset", preset, "--out", str(tmp_path), *needed, *options])


def command_of(args, name):
    """(stage, argument list) that trains a system."""
    p = reproduce.plan(args)
    stage, options = reproduce.systems(p)[name]
    return stage, reproduce.command(p, 0, options, "--out", reproduce.folder(p, 0, name))


def pairs(options):
    return {o: v for o, v in zip(options, [*options[1:], ""]) if o.startswith("--")}


@pytest.fixture
def stubs(monkeypatch):
    """Mains that note their calls: [(script, argument list)]; top-1 is the number of calls so far.
    Training leaves an encoder.pt."""
    calls = []

    def main_of(name):
        def main(args):
            calls.append((name, args.argv))
            out = pairs(args.argv).get("--out", "")
            if name in SCRIPTS[:2]:
                os.makedirs(out, exist_ok=True)
                open(os.path.join(out, "encoder.pt"), "w").close()
            n = float(len(calls))
            return dict(protocol=name, top1=n, held_out_top1=-n, balanced=n / 2, miou=n + 40)
        return main

    for name in SCRIPTS:
        script = getattr(reproduce, name)
        monkeypatch.setattr(script, "main", main_of(name))
        monkeypatch.setattr(script, "get_args", lambda argv: types.SimpleNamespace(argv=argv))
    return calls


def trained(calls):
    """Folder name -> options of each training run."""
    found = [pairs(argv) for script, argv in calls if script in SCRIPTS[:2]]
    return {os.path.basename(options["--out"]): options for options in found}


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_system_is_its_command(tmp_path, preset):
    args = arguments(tmp_path, preset=preset)
    p, value = reproduce.plan(args), {}
    for name in reproduce.systems(p):
        stage, options = command_of(args, name)
        assert len(pairs(options)) == sum(o.startswith("--") for o in options)      # each once
        value[name] = pairs(options)
        of_mae = name.startswith(("MAE", "tune MAE", "CL -> MIM"))
        assert stage.__name__ == ("mae_pretrain" if of_mae else "graft_train")
    mae, moco, mtl = value["MAE"]["--out"], value["MoCo v3"], value["MTL"]
    assert moco["--init"] == "none" and "," not in moco["--lr"]
    assert mtl == moco | {"--mim-weight": "1", "--every-epochs": mtl["--every-epochs"],
                          "--out": mtl["--out"]}
    assert 0 <= 3 * int(mtl["--every-epochs"]) - int(mtl["--epochs"]) < 3
    assert value["CL -> MIM grafting"]["--init"] == moco["--out"]
    assert value["MIM -> CL grafting"]["--init"] == mae == value["Layer grafted"]["--init"]
    depth = reproduce.depth_of(p)
    for name in ("CL -> MIM grafting", "MIM -> CL grafting"):
        assert int(value[name]["--freeze-blocks"]) == 2 * depth // 3
    rates = [float(rate) for rate in value["Layer grafted"]["--lr"].split(",")]
    assert len(rates) == 3 and rates[0] <= rates[1] < rates[2]
    assert value["VICReg"]["--loss"] == value["Layer grafted VICReg"]["--loss"] == "vicreg"
    assert value["Layer grafted, anchored"]["--anchor-blocks"] == str(depth // 2)
    if preset.startswith("imagenet"):
        assert all(options["--warmup-epochs"] == "40" for options in value.values())
        assert mtl["--every-epochs"] == "100" and value["MAE"]["--epochs"] == "1600"


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_every_command_is_accepted_by_its_stage(tmp_path, preset, monkeypatch):
    monkeypatch.setattr(reproduce.mae_pretrain.run.checkpoint, "there", lambda path: True)
    never = reproduce.PRESETS[preset].get("never", ())
    args = arguments(tmp_path, "--only", ",".join(set(reproduce.TABLES) - set(never)),
                     *["--ade20k", str(tmp_path)] * ("table6" not in never), preset=preset)
    p = reproduce.plan(args)
    (tmp_path / "longtail").mkdir()
    for name in reproduce.systems(p):
        stage, options = command_of(args, name)
        stage.get_args(options)
    for script, options in reproduce.jobs(p, [0]).values():
        start = "--init" if script is reproduce.segment else "--checkpoint"
        script.get_args([*reproduce.command(p, 0, options), start, str(tmp_path)])


def test_every_row_of_a_column_has_the_same_settings(tmp_path):
    """Also the 10 % column, where MAE and CL -> MIM have no projector to start from."""
    for preset in reproduce.PRESETS:
        p = reproduce.plan(arguments(tmp_path, preset=preset))
        for column in ("linear", "few", "many", "fine-tune", "k-NN", "partial"):
            of_row = {}
            for name in reproduce.EVERY:
                jobs = reproduce.protocols(p, column, name)
                of_row[name] = [(title, {k: v for k, v in options.items()
                                         if k != "from_projector"})
                                for title, _, _, options in jobs]
            assert all(row == of_row["MAE"] for row in of_row.values())
            assert column != "many" or "epochs" in of_row["MAE"][0][1]
    large = reproduce.plan(arguments(tmp_path, preset="imagenet-large"))
    (_, _, _, many), = reproduce.protocols(large, "many", "MAE")
    assert (many["epochs"], many["layer_decay"]) == (400, 0.65)
    (_, _, _, fine), = reproduce.protocols(large, "fine-tune", "MAE")
    assert (fine["epochs"], fine["layer_decay"], fine["drop_path"]) == (50, 0.8, 0.2)
    assert reproduce.systems(large)["Layer grafted"][1]["batch_size"] == 2080


def test_no_new_blocks_is_linear_evaluation_and_nothing_runs_twice(tmp_path, stubs):
    reproduce.main(arguments(tmp_path, "--only", "table1,table3,table5,figure5"))
    evaluated = [argv for script, argv in stubs if script in ("evaluate", "finetune")]
    keys = [(e["name"], e["protocol_name"])
            for e in reproduce.run.read_results(tmp_path / "results.jsonl")]
    assert len(set(keys)) == len(keys) == len(evaluated)
    assert {"linear", "block 3 + 0", "block 6 + 1"} <= {k for _, k in keys}
    assert not {"block 6 + 0", "0 blocks fixed"} & {k for _, k in keys}     # they have other names
    probe, = [pairs(argv) for argv in evaluated if "mae/block-3-0" in argv[-1]]
    assert probe["--mode"] == "linear" and probe["--block"] == "3"
    row, = [line for line in open(tmp_path / "results.md") if line.startswith("| MAE |")
            and line.count("|") == 6 and "(" not in line]
    assert all(text.strip() for text in row.split("|")[2:-1])               # Table 5 is full


def test_the_papers_figures_and_ours_with_mean_and_deviation_stand_in_the_tables(tmp_path):
    p = reproduce.plan(arguments(tmp_path, "--only", "table2,table5,figure4", preset="imagenet"))
    results = [dict(name="Layer grafted", protocol_name="linear", top1=top1, seed=seed)
               for seed, top1 in ((0, 99.0), (0, 50.0), (1, 52.0))]        # the last of a seed
    results += [dict(name=f"grid {','.join(rates)}", protocol_name=protocol, top1=top1, seed=0)
                for *rates, protocol, top1 in (("1.5e-5", "1.5e-5", "1.5e-4", "linear", 33.3),
                                               ("1.5e-5", "1.5e-5", "1.5e-4", "fine-tune", 44.4))]
    text = reproduce.markdown(results, p)
    assert "| Layer grafted | 51.0 ± 1.4 (77.7) |" in text
    for protocol, top1 in (("linear", "33.3"), ("fine-tune", "44.4")):
        assert f"| 1.5e-5 |  | {top1} |" in text[text.index(f"| {protocol}, third stage 1.5e-4 |"):]
    table5 = text[text.index("### Table 5"):].split("\n### ")[0]
    assert "(38.9)" in table5 and "(79.2)" in table5 and table5.count("(") == 24
    text = reproduce.markdown([], reproduce.plan(arguments(tmp_path, preset="imagenet-large")))
    assert "| MoCo v3 |  (77.6) |  |  |  |\n" in text
    assert "| Layer grafted |  (80.5) |  (68.9) |  (79.8) |  (85.7) |" in text
    assert "| Layer grafted, anchored |  (81.0) |  (69.3) |  (80.1) |  (85.9) |" in text


def test_segmentation_starts_from_each_system(tmp_path, stubs):
    assert "table6" not in arguments(tmp_path, preset="imagenet").only
    folder = str(tmp_path)
    reproduce.main(arguments(tmp_path, "--only", "table6", "--ade20k", folder, preset="imagenet"))
    found = [pairs(argv) for script, argv in stubs if script == "segment"]
    assert [os.path.basename(options["--init"]) for options in found] == [
        "mae", "moco-v3", "layer-grafted"]
    assert {options["--data"] for options in found} == {folder}
    assert "| Layer grafted | 46.0 (48.7) |" in open(tmp_path / "results.md").read()


# ---------------------------------------------------------------------------------- operations
def test_operations_are_those_that_torch_counts(tmp_path):
    p = reproduce.plan(arguments(tmp_path)) | dict(images=1)
    (patch, dim, depth, heads), decoder = model.ARCHS["vit_mini"]
    config = dict(img_size=32, patch_size=patch, dim=dim, depth=depth, heads=heads)
    x = torch.randn(2, 4, 3, 32, 32)
    mae = model.MaskedAutoencoder(*decoder, **config)
    moco = model.MoCoV3(model.VisionTransformer(**config), 512)
    model.freeze(moco, depth, patch_embed=True)
    vicreg = model.VICReg(model.VisionTransformer(**config), 512, 512)
    model.freeze(vicreg, depth, patch_embed=True)
    for name, loss in (("MAE", lambda: mae(x[0], 0.75)[0]), ("MoCo v3", lambda: moco(*x)[0]),
                       ("VICReg", lambda: vicreg(*x)[0])):
        # the fused kernel of a CPU is not counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss().backward()
        stage, options = reproduce.systems(p)[name]
        ours = 4 * reproduce.flops(p, stage, options | dict(epochs=1))
        assert ours == pytest.approx(counter.get_total_flops(), rel=0.03), name


@pytest.mark.parametrize("preset", reproduce.PRESETS)
def test_rows_of_equal_cost_have_the_operations_of_mae_and_grafting(tmp_path, preset):
    p = reproduce.plan(arguments(tmp_path, preset=preset))
    for name in reproduce.EQUAL:
        whole = reproduce.cost(p, "Layer grafted")
        assert reproduce.cost(p, name) == pytest.approx(whole, rel=0.05)
    assert reproduce.TOTAL not in [name for table in reproduce.PAPERS
                                   for name in reproduce.rows_of(p, table)]


def test_the_estimate_counts_what_was_asked_for(tmp_path, capsys):
    def hours(*options):
        reproduce.main(arguments(tmp_path, "--dry-run", *options, preset="imagenet"))
        return capsys.readouterr().out

    only = hours("--only", "table3")
    assert only.startswith("3 systems to train or resume, 3 evaluations")
    weights = tmp_path / "weights.pth"
    weights.write_text("")
    given = hours("--only", "table3", "--mae", str(weights))
    assert given.startswith("2 systems") and "mae_pretrain.py" not in given
    assert f"--init {weights}" in given and f"--checkpoint {weights}" in given
    p = reproduce.plan(arguments(tmp_path, preset="imagenet"))
    training = sum(reproduce.flops(p, *reproduce.systems(p)[name])
                   for name in reproduce.TABLES["table3"][1])
    assert f"{training:.3g} operations to train" in only and os.listdir(tmp_path) == ["weights.pth"]
    lists = hours("--only", "table2", "--labels-1", str(weights), "--labels-10", str(weights))
    assert lists.count(f"--labels {weights}") == 6


# -------------------------------------------------------------------------------------- running
def test_what_a_system_starts_from_is_trained_before_it_and_once(tmp_path, stubs, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))   # of the stages; the demonstration has its own set
    monkeypatch.setattr(reproduce.mae_pretrain, "get_args", lambda argv: types.SimpleNamespace(
        argv=[*argv, "--data", os.environ["DATA"]] if "DATA" in os.environ else argv))
    reproduce.main(arguments(tmp_path, "--only", "table4,table1"))
    assert not any("--data" in argv for _, argv in stubs)
    order = list(trained(stubs))
    assert [script in SCRIPTS[:2] for script, _ in stubs].count(True) == len(order)
    assert order.index("mae") < order.index("layer-grafted-vicreg")
    assert order.index("moco-v3") < order.index("cl-mim-grafting")


def test_a_second_run_skips_what_is_done_and_a_broken_one_goes_on(tmp_path, stubs):
    def call():
        """How many calls of stages it takes."""
        before = len(stubs)
        reproduce.main(arguments(tmp_path, "--only", "table3", "--seeds", "0,1"))
        return stubs[before:]

    call()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6 and {json.loads(line)["seed"] for line in lines} == {0, 1}
    assert not call()
    with pytest.raises(reproduce.UsageError, match="holds results with data None, now it is"):
        reproduce.main(arguments(tmp_path, "--only", "table3", "--data", str(tmp_path)))
    torn = "\n".join(lines[:5]) + "\n" + lines[5][:40]
    (tmp_path / "results.jsonl").write_text(torn)
    assert [script for script, _ in call()].count("finetune") == 1
    assert not call()                                                   # it was not lost again


def test_a_typing_error_in_common_leaves_nothing_behind(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(arguments(tmp_path, "--only", "table3", "--common", "--nonsense 3"))
    assert stop.value.code == 2 and "--nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reproduce.main(arguments(tmp_path, "--common", "--epochs 2"))
    assert "--epochs is each system's own" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_tuning_and_filled_tables(tmp_path, stubs):
    args = arguments(tmp_path, "--only", "tuning", preset="cifar10-small")
    parts = {name for name in reproduce.systems(reproduce.plan(args)) if name.startswith("tune ")}
    reproduce.main(args)
    with open(tmp_path / "results.md") as f:
        rows = [line for line in f if line.startswith("| tune ")]
    assert {row.split("|")[1].strip() for row in rows} == parts and len(rows) == len(parts) > 2
    assert all("| -" in row for row in rows)                                # held out, not top-1
    tried = [tuple(sorted(options.items() - {("--out", options["--out"])}))
             for options in trained(stubs).values()]
    assert len(set(tried)) == len(tried)                                    # no two runs are alike
    reproduce.main(arguments(tmp_path, "--only", "table3", preset="cifar10-small"))
    text = (tmp_path / "results.md").read_text()
    assert "Tuning" in text and "Table 3" in text and "Table 2" not in text


def test_a_long_tail_is_written_and_trained_on(tmp_path, stubs, monkeypatch):
    drawn = data.embedded
    monkeypatch.setattr(data, "embedded", lambda train, *_: drawn(train, n=1600 if train else 50))
    reproduce.main(arguments(tmp_path, "--only", "longtail"))
    names = (tmp_path / "longtail" / "list.txt").read_text().splitlines()
    counts = Counter(name.split("/")[0] for name in names)
    assert list(counts.values()) == [int(100 * 100 ** (-i / 15)) for i in range(16)]
    assert sum(len(files) for *_, files in os.walk(tmp_path / "longtail" / "test")) == 50
    runs = trained(stubs)
    assert len(runs) == 3
    assert {options["--data"] for options in runs.values()} == {str(tmp_path / "longtail")}
    assert runs["layer-grafted-long-tail"]["--init"].endswith("mae-long-tail")
    evaluated = [pairs(argv) for script, argv in stubs if script == "evaluate"]
    assert ["--data" in options for options in evaluated[:3]] == [False, True, True]
    assert "| 1.0 |" in open(tmp_path / "results.md").read()                # balanced: 2 / 2


def test_the_figures_are_drawn_of_what_is_there(tmp_path, stubs):
    there = [f"mtl/{name}.pt" for name in ("epoch0003", "epoch0006", "last")]
    for name in (*there, "mae/fine-tune/classifier.pt"):
        (tmp_path / "seed0" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "seed0" / name).write_text("")
    reproduce.main(arguments(tmp_path, "--only", "table3,analyses"))
    drawn = {argv[0]: argv[1:] for script, argv in stubs if script == "analyze"}
    assert list(drawn) == ["gradients", "vic", "attention", "tsne", "lr-grid", "partial", "depth"]
    assert all(argv[-1] == str(tmp_path / "figures") for argv in drawn.values())
    assert drawn["gradients"][1:4] == [str(tmp_path / "seed0" / name) for name in there]
    assert drawn["vic"][4].endswith("mae/fine-tune") and len(drawn["attention"]) == 6
    before = len(stubs)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "vic.csv").write_text("")
    reproduce.main(arguments(tmp_path, "--only", "table3,analyses"))
    assert "vic" not in [argv[0] for _, argv in stubs[before:]] and len(stubs) == before + 6


def tiny_preset():
    """In place of the demonstration: an epoch of each, for the small world's network."""
    one = dict(epochs=1, batch_size=16)
    reproduce.PRESETS["demo"] = reproduce.SMALL | dict(
        data=None, images=96, tests=50, common=one | dict(crop_min=0.5), short=1, few="25%",
        many="50%", arch=dict(arch="vit_test", patch_size=8, img_size=32),
        mae=dict(epochs=1, lr="1e-3"), contrastive=dict(epochs=1, lr="1e-3", hidden_dim=8),
        rates="1e-4,1e-4,1e-3", fine=one, few_fine=one, grid=(("1e-4", "1e-3"),) * 3,
        probes=((2,), (0, 1)), table3=("MAE", "MTL"), table5=("MAE",), longtail=("MAE, long tail",))


def test_for_real_in_two_processes(tmp_path, start):
    """Every stage in both processes, the files from the first; a second call has nothing to do."""
    command = ["--out", tmp_path / "out", "--common", "--workers 0", "--only",
               "longtail,table3,table5,analyses"]
    job = start("reproduce", *command, processes=2, prepare=tiny_preset)
    assert job.codes(900) == [0, 0], job.said()
    entries = reproduce.run.read_results(tmp_path / "out" / "results.jsonl")
    keys = [(e["name"], e["protocol_name"]) for e in entries]
    assert len(keys) == len(set(keys)) == 3 + 2 + 2
    assert {"gradients.csv", "vic.csv", "attention.csv", "depth.csv"} <= set(
        os.listdir(tmp_path / "out" / "figures"))
    assert "no lr-grid: " in job.said()
    job = start("reproduce", *command, prepare=tiny_preset)
    assert job.codes(300) == [0]
    assert "0 systems to train or resume, 0 evaluations" in job.said()
