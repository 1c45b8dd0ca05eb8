"""bench.py: every case runs, what it counts is right, the references are the same networks. No speed is asserted."""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import augment
import bench
import bench_against
import bench_cases
import data
import features
import graft_train
import mae_pretrain
import model
import run

torch.set_num_threads(1)

VIT_B = dict(img_size=[224, 224], patch_size=16, in_chans=3, dim=768, depth=12, heads=12, mlp_ratio=4.0)
TINY = dict(img_size=[16, 16], patch_size=4, in_chans=3, dim=24, depth=3, heads=3, mlp_ratio=4.0)
FIELDS = {"case", "code", "device", "torch", "precision", "arch", "batch", "images_per_second", "ms", "cpu_ms",
          "peak_mib", "flops_per_image", "peak_share", "data_wait", "ours_faster"}


@pytest.fixture
def quick(monkeypatch):
    """Tiny sizes for all that is not an option."""
    monkeypatch.setattr(bench, "MATRIX", {"cpu": 128})
    monkeypatch.setattr(bench, "COPY", {"cpu": 1 << 20})
    monkeypatch.setattr(bench, "LEAST", 0.0)
    monkeypatch.setattr(bench_cases, "HIDDEN", 64)
    monkeypatch.setattr(bench_cases, "FEWSHOT", {"cpu": (60, 5)})
    monkeypatch.setattr(bench_cases, "JPEG", dict(pictures=3, size=(160, 120), quality=90))
    monkeypatch.setattr(bench_cases, "LOOP_EPOCHS", 2)
    monkeypatch.setattr(bench_cases, "LINEAR_EPOCHS", 2)
    drawn = data.embedded
    monkeypatch.setattr(data, "embedded", lambda train=True, in_chans=3, n=32: drawn(train, in_chans, n))
    for stage in (mae_pretrain, graft_train):
        monkeypatch.setitem(stage.SMALL, "batch_size", 16)


def options(*more):
    return bench.get_args(["--arch", "vit_mini", "--batch-size", "4", "--repeats", "1", "--device", "cpu",
                           "--amp", "off", *more])


# ------------------------------------------------------------------------------------------------- the cases
OURS = {"mae": {"ours"}, "graft": {"ours", "ours, undivided"}, "augment": {"ours"},
        "reading": {"ours, worker", "ours, worker and device work", "decoding alone, pillow"}, "features": {"ours"},
        "linear": {"35 rates", "1 rate"}, "fewshot": {"ours"},
        "save": {"ours", "torch.save, not flushed", "the bytes alone, flushed"},
        "loop": {"ours, training loop", "bare steps"}}


@pytest.mark.parametrize("name", bench_cases.CASES)
def test_every_case_prints_its_floor_and_writes_its_rows(quick, tmp_path, capsys, name):
    out = tmp_path / "rows.jsonl"
    found = bench.main(options("--only", name, "--out", str(out)))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == found and {row["code"] for row in rows} == OURS[name]
    said = capsys.readouterr().out
    for row in rows:
        assert set(row) == FIELDS
        assert row["precision"] == "float32" and row["torch"] == torch.__version__ and row["arch"] == "vit_mini"
        assert row["ms"] > 0 and f"\n{row['case']}: " in said
        if name == "save":
            assert row["batch"] is None and row["images_per_second"] is None
        else:
            assert row["images_per_second"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert (row["flops_per_image"] is None) == (name in ("augment", "reading", "save", "loop"))
        assert (row["peak_share"] is None) == (row["flops_per_image"] is None)
        assert (row["data_wait"] is None) == (row["code"] != "ours, training loop")
    assert "floor" in said
    first = {row["case"]: row for row in reversed(rows)}
    for row in rows:
        assert row["ours_faster"] == pytest.approx(row["ms"] / first[row["case"]]["ms"])


@pytest.mark.parametrize("name, package, code", [
    ("mae", "timm", "timm's blocks, fp32"), ("mae", "transformers", "transformers, fp32"),
    ("graft", "timm", "timm's blocks, fp32"),
    ("augment", "torchvision", "torchvision on pillow"), ("reading", "torchvision", "torchvision on pillow"),
    ("features", "timm", "timm"), ("fewshot", "sklearn", "scikit-learn")])
def test_references_take_turns_with_ours(quick, monkeypatch, capsys, name, package, code):
    pytest.importorskip(package)
    monkeypatch.setattr(bench, "importable", package.__eq__)
    rows = bench.main(options("--only", name, "--against"))
    cases = {row["case"] for row in rows if "micro" not in row["case"]}
    assert {row["case"] for row in rows if row["code"] == code} == cases
    assert set(row["code"] for row in rows) == OURS[name] | {code}
    if name == "mae":
        other = {"timm": "transformers", "transformers": "timm"}[package]
        assert f"{other} is not installed: left out" in capsys.readouterr().out


def test_each_code_has_its_turn_and_the_median_counts(monkeypatch):
    monkeypatch.setattr(bench, "LEAST", 0.0)
    order = []

    def code(name, seconds):
        times = iter(seconds)

        def call():
            order.append(name)
            return bench_cases.Timed(next(times), 0.25)
        return bench_cases.Code(name, lambda: call, None)

    measured = bench.turns([code("a", (9, 3, 1, 2)), code("b", (9, 6, 5, 70))], 3, torch.device("cpu"))
    assert "".join(order) == "ab" + "ababab"                                # a warm-up each, then turn by turn
    assert [m.seconds for m in measured] == [2, 6] and [m.waited for m in measured] == [0.25, 0.25]


def test_codes_apart_take_turns_too(monkeypatch):
    """Each in a process of its own, which says what it measured; one that fails ends the benchmark."""
    args = bench.get_args(["--only", "save", "--arch", "vit_mini", "--repeats", "2", "--device", "cpu", "--apart"])
    rows = bench.main(args)
    assert {row["code"] for row in rows} == OURS["save"] and all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(data.RunError, match="save: .* failed in its process"):
        bench.main(args)


@pytest.mark.parametrize("apart", [[], ["--apart"]])
def test_memory_is_kept_for_references_only_where_it_is_said(apart):
    """As they come: in a process of its own a reference has glibc's defaults, or ours under its own name."""
    codes = bench_cases.in_both(bench.Bench(options(*apart)), "timm's blocks", print)
    assert [(code.name, code.keeps) for code in codes] == (
        [("timm's blocks, fp32", False)] + [("timm's blocks, memory kept", True)] * len(apart))


def test_short_calls_are_repeated_and_timed_each(monkeypatch):
    monkeypatch.setattr(bench, "LEAST", 0.05)
    times = []

    def call():
        times.append(1)
        bench.time.sleep(0.005)

    measured, = bench.turns([bench_cases.Code("a", lambda: call, None)], 1, torch.device("cpu"))
    assert len(times) > 4 and 0.005 <= measured.seconds < 0.05
    assert measured.cpu < 0.005                                             # asleep: no CPU time


def test_peak_memory_is_what_a_code_takes_besides_what_was_there():
    if bench.status("VmHWM:") is None:
        pytest.skip("no /proc/self/status here")
    kept = torch.ones(100 << 20)                                            # 400 MiB that are not the code's

    def call():
        torch.ones(20 << 20)

    codes = [bench_cases.Code(name, lambda: call, None) for name in "ab"]   # the second must not hide in the first's
    for measured in bench.turns(codes, 1, torch.device("cpu")):
        assert 70 < measured.peak / 2 ** 20 < 200                           # 80, and what malloc takes besides
    del kept


def test_a_loop_is_timed_by_its_log(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [dict(step=20, images_per_second=1.0, data_wait=0.9), dict(step=30, images_per_second=100.0, data_wait=0.1),
             dict(step=40, images_per_second=50.0, data_wait=0.4)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds, waited = bench_cases.loop_times(log, 50)                       # 10 steps of 0.5 s, 10 of 1 s
    assert seconds == pytest.approx(0.75) and waited == pytest.approx((5 * 0.1 + 10 * 0.4) / 15)
    log.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(data.RunError, match="too few"):
        bench_cases.loop_times(log, 50)


# --------------------------------------------------------------------------------------------- what is counted
def test_flops_of_vit_b_by_hand():
    """The published figure: 17.56 G multiply-adds."""
    tokens, width = 197, 768
    linear = tokens * width * (3 * width + width + 4 * width + 4 * width)
    attention = 2 * tokens * tokens * width
    by_hand = 196 * 3 * 16 * 16 * width + 12 * (linear + attention)
    assert by_hand == pytest.approx(17.56e9, rel=1e-3)
    assert bench_cases.vit_flops(VIT_B, class_only=False) == 2 * by_hand
    # of the last block's tokens, only the class token's query is used, projected and passed through the MLP
    spared = 196 * (2 * tokens * width + 9 * width ** 2)
    assert bench_cases.vit_flops(VIT_B) == 2 * (by_hand - spared)


def counted(call):
    """FLOPs per call by torch's own counter, in bf16, where attention is plain products on a CPU."""
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        result = call()
        if result.requires_grad:
            result.backward()
    return counter.get_total_flops()


def test_flops_equal_what_torch_counts(monkeypatch):
    monkeypatch.setattr(bench_cases, "HIDDEN", 32)
    monkeypatch.setattr(bench_cases, "OUT", 16)
    n, x = 4, torch.randn(4, 3, 16, 16)
    vit = model.VisionTransformer(**TINY)
    with torch.no_grad():
        assert counted(lambda: vit(x)) == n * bench_cases.vit_flops(TINY)
        assert counted(lambda: vit.tokens(x)) == n * bench_cases.vit_flops(TINY, class_only=False)
    decoder = (16, 2, 2)
    mae = model.MaskedAutoencoder(*decoder, **TINY)
    assert counted(lambda: mae(x, 0.75)[0]) == n * bench_cases.mae_flops(TINY, decoder)
    moco = model.MoCoV3(vit, 32, 16)
    model.freeze(moco, TINY["depth"], patch_embed=True)
    logits = 2 * 2 * (2 * n * n * 16)                                       # both views, forward and backward to q
    assert counted(lambda: moco(x, x)) == n * bench_cases.graft_flops(TINY) + logits
    assert counted(lambda: moco(x, x, 2)) == n * bench_cases.graft_flops(TINY, again=1) + logits


def test_the_rates_are_of_what_is_done(monkeypatch):
    monkeypatch.setattr(bench, "best_of", lambda call, device: call() is None or 0.5)
    b = bench.Bench(options())
    monkeypatch.setattr(bench, "MATRIX", {"cpu": 100})
    monkeypatch.setattr(bench, "COPY", {"cpu": 1000})
    assert b.rate(None) == 2 * 100 ** 3 / 0.5 and b.bandwidth() == 2 * 1000 / 0.5


# ---------------------------------------------------------------------------------------- what makes it fast
FAULTS = """
import resource, sys, torch, run
run.keep_memory()
if sys.argv[1] == "returned":
    run.keep_memory(False)
torch.ones(40 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(25 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_is_kept_between_steps():
    """160 MiB freed, 100 taken again: 25,600 pages to map anew, or next to none."""
    here = os.path.dirname(os.path.abspath(bench.__file__))
    returned, kept = (int(subprocess.run([sys.executable, "-c", FAULTS, how], cwd=here, capture_output=True, text=True,
                                         check=True).stdout) for how in ("returned", "kept"))
    assert kept < returned / 10 or returned < 100              # few where pages are huge anyway


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["mae", "graft"])
def test_nothing_in_a_step_waits_for_the_gpu(stage):
    """Views, noise and step, with torch told to fail on what synchronises."""
    b = bench.Bench(bench.get_args(["--arch", "vit_mini", "--compile", "off"]))
    views = [augment.MAE_VIEW] if stage == "mae" else list(augment.MOCO_VIEWS)
    batch = next(data.Loader(b.pictures(40, 8), views, (32, 32), 8, device=b.device).epoch(0))
    if stage == "mae":
        net = b.prepare(model.MaskedAutoencoder(*b.decoder, **b.config))
        step = bench_cases.our_step(b, net, lambda: net(batch.views[0][:], 0.75, batch.noise(64))[0])
    else:
        net = b.prepare(model.MoCoV3(model.VisionTransformer(**b.config), 64, 16))
        step = bench_cases.our_step(b, net, lambda: net(*(view[:] for view in batch.views)),
                                    before=lambda: net.update_momentum(0.99))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -------------------------------------------------------------------------------------------- the references
def renamed(state, names):
    """A state dict under other names: the first prefix that fits is replaced."""
    result = {}
    for key, value in state.items():
        old = next(prefix for prefix in names if key.startswith(prefix))
        result[names[old] + key.removeprefix(old)] = value
    return result


def test_timm_mae_is_our_mae():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = model.MaskedAutoencoder(16, 2, 2, **TINY).double()
    theirs = bench_against.TimmMAE(TINY, (16, 2, 2)).double()
    names = {"decoder_embed": "to_decoder", "decoder_blocks": "decoder", "decoder_pred": "to_pixels",
             "patch_embed": "embed", "blocks": "encoder", "norm": "encoder_norm", "cls_token": "cls_token",
             "pos_embed": "pos_embed", "mask_token": "mask_token", "decoder_pos_embed": "decoder_pos_embed",
             "decoder_norm": "decoder_norm"}
    theirs.load_state_dict(renamed(ours.state_dict(), names), strict=True)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    noise = torch.rand(3, 16)                                               # what it drew
    torch.testing.assert_close(ours(x, 0.75, noise)[0], expected, rtol=1e-10, atol=0)


def test_timm_moco_is_our_moco():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    ours = model.MoCoV3(model.VisionTransformer(**TINY), 32, 16).double()
    with torch.no_grad():
        for p in ours.momentum_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = bench_against.TimmMoCo(TINY, 32, 16).double()
    names = {"base_encoder.head": "base.1", "momentum_encoder.head": "slow.1", "base_encoder": "base.0",
             "momentum_encoder": "slow.0", "predictor": "predict"}
    theirs.load_state_dict(renamed(ours.state_dict(), names), strict=True)
    x1, x2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    ours.update_momentum(0.99)
    torch.testing.assert_close(ours(x1, x2), theirs(x1, x2), rtol=1e-10, atol=0)


def test_transformers_mae_has_our_weights():
    pytest.importorskip("transformers")
    ours, theirs = model.MaskedAutoencoder(16, 2, 2, **TINY), bench_against.TransformersMAE(TINY, (16, 2, 2))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


# ------------------------------------------------------------------------------------------------ bad options
@pytest.mark.parametrize("argv, message", [
    (["--only", "mae,nothing"], "--only nothing: it must be one of mae, graft"), (["--batch-size", "0"], "at least 1"),
    (["--arch", "resnet"], "invalid choice"), (["--repeats", "x"], "not a whole number")])
def test_bad_options_end_in_one_line_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.get_args(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and message in said


def test_what_cannot_be_measured_is_said(quick, tmp_path, monkeypatch):
    with pytest.raises(data.RunError, match="cannot write there"):
        bench.main(options("--only", "mae", "--out", str(tmp_path / "no" / "rows.jsonl")))
    with pytest.raises(data.UsageError, match="no such folder"):
        bench.main(options("--only", "reading", "--data", str(tmp_path / "none")))
    with pytest.raises(data.UsageError, match="fit into memory"):
        bench_cases.Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
        bench.main(options("--only", "reading", "--data", str(tmp_path)))
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(bench, "turns", too_large)
        with pytest.raises(data.RunError, match="smaller --batch-size"):
            bench.main(options("--only", "mae"))
    monkeypatch.setattr(bench.run, "setup", lambda device: (torch.device("cpu"), 0, 2))
    with pytest.raises(data.UsageError, match="without torchrun"):
        bench.main(options("--only", "mae"))


# ------------------------------------------------------------------------------------------- torch.compile
COMPILED = dict(img_size=[16, 16], patch_size=4, in_chans=3, dim=24, depth=3, heads=3)


@pytest.fixture
def graphs(monkeypatch):
    """The input sizes of every graph that torch.compile makes; they then run as they are."""
    found = []

    def backend(module, inputs):
        found.append([tuple(x.shape) if torch.is_tensor(x) else x for x in inputs])
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run.compile_blocks([], "on", torch.device("cpu"))                       # what it tries is no block's
    found.clear()
    yield found
    torch._dynamo.reset()


def any_size(graph):
    return any(isinstance(n, torch.SymInt) for x in graph for n in (x if isinstance(x, tuple) else [x]))


def test_mae_compiles_one_graph_an_encoder_and_one_a_decoder(graphs):
    net = model.MaskedAutoencoder(16, 4, 2, **COMPILED)
    run.compile_blocks([*net.blocks, *net.decoder_blocks], "on", torch.device("cpu"), dynamic=False)
    run.micro_batch(0, lambda n: net(torch.randn(n, 3, 16, 16))[0].backward(), 6, torch.device("cpu"), 1, ())
    assert not graphs                                                       # to measure memory is no training step
    for _ in range(2):
        net(torch.randn(6, 3, 16, 16))[0].backward()
    assert len(graphs) == 2 and not any(any_size(graph) for graph in graphs)


def test_a_grafting_run_keeps_all_its_graphs(graphs):
    """Frozen and trained blocks, both encoders, the class token alone, a shorter last micro-batch: more than torch's 8."""
    net = model.MoCoV3(model.VisionTransformer(**COMPILED), 16, 8)
    model.freeze(net, 3, [0.0, 1.0, 1.0], patch_embed=True)
    run.compile_blocks([m for m in net.modules() if isinstance(m, model.Block)], "on", torch.device("cpu"), dynamic=False)
    x = torch.randn(8, 3, 16, 16)
    net(x, x, 3).backward()
    made = len(graphs)
    assert made > 8 and not any(any_size(graph) for graph in graphs)
    pictures = data.Pictures(images=data.draw(torch.arange(40), 16), labels=torch.arange(40) % 2, classes=["a", "b"])
    with torch._dynamo.config.patch(error_on_recompile=True):               # nor does k-NN accuracy add one
        net(x, x, 3).backward()
        features.online_knn(net.base_encoder, pictures, torch.device("cpu"), None, 0)
    assert len(graphs) == made


def test_dropping_paths_needs_no_graph_a_rate(graphs):
    net = model.VisionTransformer(**COMPILED | dict(depth=12), drop_path=0.1)
    run.compile_blocks(list(net.blocks), "on", torch.device("cpu"))
    for _ in range(2):
        net(torch.randn(4, 3, 16, 16)).sum().backward()
    assert len(graphs) == 3                                                 # rate 0, any other, the class token alone


def test_without_a_compiler_auto_goes_on_and_on_says_why(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    block = model.Block(24, 3)
    with pytest.raises(data.RunError, match=r"--compile on: .*No working C\+\+ compiler found\); go without"):
        run.compile_blocks([block], "on", torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", lambda *args, device: None)          # as if there were a GPU to try it on
    run.compile_blocks([block], "auto", torch.device("cuda"))
    assert "warning: torch.compile does not work here" in capsys.readouterr().out
    assert block._compiled_call_impl is None
