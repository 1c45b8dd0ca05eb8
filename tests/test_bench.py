"""bench/: every case runs, what it counts is right, the references compute what ours do. No speed
is asserted. And torch.compile as the stages use it: how many graphs it makes."""
import multiprocessing
from functools import partial

import pytest
import torch

import data
import graft_train
import mae_pretrain
import model
import run
import segment
from bench import bench, references
from conftest import folder_of

TINY = dict(img_size=[16, 16], patch_size=4, in_chans=3, dim=24, depth=3, heads=3, mlp_ratio=4.0)
VIT_B = dict(img_size=[224, 224], patch_size=16, dim=768, depth=12, heads=12)
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Tiny sizes for all that is not an option, and every turn in this process."""
    monkeypatch.setattr(bench, "alone", bench.turn)
    monkeypatch.setattr(bench, "LEAST", 0.0)
    monkeypatch.setattr(bench, "HEADS", (64, 16))
    monkeypatch.setattr(bench, "EPOCHS", dict(linear=2, loop=2))
    monkeypatch.setattr(bench, "SEGMENT", 64)
    monkeypatch.setattr(bench, "SCALE", dict(classes=2, files=3, labels=5000, voters=3, images=64,
                                            copies=1, side=130))      # too large to be held
    monkeypatch.setitem(model.ARCHS, "vit_mini", ((8, 24, 3, 3), (16, 1, 2)))
    monkeypatch.setitem(bench.MATRIX, "cpu", 64)
    monkeypatch.setitem(bench.FEWSHOT, "cpu", (60, 5))
    drawn = data.embedded(n=32)
    monkeypatch.setattr(data, "embedded", lambda *_: drawn)
    for stage in (mae_pretrain, graft_train):
        monkeypatch.setitem(stage.SMALL, "batch_size", 16)


def options(*more):
    return bench.get_args(["--arch", "vit_mini", "--batch-size", "4", "--repeats", "1", "--device",
                           "cpu", "--amp", "off", *map(str, more)])


# ------------------------------------------------------------------------------------- the cases
OURS = {"mae": {"ours"}, "graft": {"ours", "undivided"}, "augment": {"ours"}, "segment": {"ours"},
        "reading": {"ours, worker", "ours, worker and device", "decoding alone, pillow"},
        "linear": {"35 rates", "1 rate"}, "fewshot": {"ours"},
        "loop": {"ours, training loop", "bare steps"},
        "scale": {"ours", "one stable sort", "a request for each", "first batch", "the others",
                  "ours, training stands still", "until it is on the disk and read back"}}
PACKAGES = {"mae": ("timm", "transformers"), "graft": ("timm",), "segment": ("transformers",),
            "augment": ("torchvision",), "reading": ("torchvision",), "fewshot": ("sklearn",),
            "scale": ("torchvision",)}


@pytest.mark.parametrize("name", bench.CASES)
def test_every_case_gives_its_rows_beside_every_reference(quick, tmp_path, capsys, name,
                                                          monkeypatch):
    if name == "segment":                                   # whose four taps are different blocks
        monkeypatch.setitem(model.ARCHS, "vit_mini", ((8, 24, 6, 3), (16, 1, 2)))
    folder_of(tmp_path, ["1.jpg", "2.jpg"], (60, 50))
    folder_of(tmp_path, ["3.jpg"], (60, 51))                # of several sizes: read anew each time
    rows = bench.main(options("--only", name, "--data", tmp_path, "--against"))
    said = capsys.readouterr().out
    missing = {p for p in PACKAGES.get(name, ()) if f"{p} is not installed: left out" in said}
    codes = {row["code"] for row in rows} - {"its head on our encoder"}
    assert codes == OURS[name] | set(PACKAGES.get(name, ())) - missing
    first = {row["case"]: row for row in reversed(rows)}
    for row in rows:
        assert row["ms"] > 0 and row["peak_mib"] > 0 and f"\n{row['case']}  " in said
        assert (row["floor_ms"] is None) == (name not in ("mae", "graft", "linear"))
        assert (row["data_wait"] is None) == (row["code"] != "ours, training loop")
        assert row["ours_faster"] == pytest.approx(row["ms"] / first[row["case"]]["ms"])


def test_codes_take_turns_and_the_median_counts(monkeypatch, capsys):
    seconds = {"a": iter((0.3, 0.1, 0.2)), "b": iter((0.6, 0.5, 7.0))}
    order = []

    def alone(args, name, number, code):
        order.append(code)
        return bench.Measured(next(seconds[code]), 0.1, None, 2 ** 20)

    case = bench.Case("two", 10, None, {code: bench.Code(print) for code in seconds})
    monkeypatch.setattr(bench, "CASES", {"two": lambda b: [case]})
    monkeypatch.setattr(bench, "alone", alone)
    rows = bench.main(options("--only", "two", "--repeats", "3", "--json"))
    assert "".join(order) == "ababab" and [row["ms"] for row in rows] == [200, 600]
    assert [row["ours_faster"] for row in rows] == [1, pytest.approx(3)]
    assert [bench.json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def test_a_code_that_is_killed_for_want_of_memory_ends_in_a_line(monkeypatch):
    forked = multiprocessing.get_context("forkserver")      # which need not import torch anew
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: forked)
    assert bench.alone(options(), "fewshot", 0, "ours").peak > 100 << 20    # a process of its own

    def killed(*_):
        raise bench.BrokenProcessPool

    monkeypatch.setattr(bench, "ProcessPoolExecutor", killed)
    with pytest.raises(run.RunError, match="fewshot: the process of ours was killed"):
        bench.alone(options(), "fewshot", 0, "ours")


# ------------------------------------------------------------------------------ what is counted
def test_flops_of_vit_b_are_the_published_ones():
    """17.56 G multiply-adds, less what only the class token needs of the last block."""
    tokens, width = 197, 768
    linear = tokens * width * (3 * width + width + 4 * width + 4 * width)
    by_hand = 196 * 3 * 16 * 16 * width + 12 * (linear + 2 * tokens * tokens * width)
    assert by_hand == pytest.approx(17.56e9, rel=1e-3)
    spared = 196 * (2 * tokens * width + 9 * width ** 2)
    assert bench.forward_flops(VIT_B) == 2 * (by_hand - spared)


# ------------------------------------------------------------------------------- the references
def test_timm_blocks_compute_what_ours_do():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    x1, x2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(6, 16)
    mae = model.MaskedAutoencoder(16, 2, 2, **TINY).double()
    moco = model.MoCoV3(model.VisionTransformer(**TINY), 32, 16).double()
    expected = mae(x1, 0.75, noise)[0], moco(x1, x2)[0]
    mae, moco = (references.with_timm_blocks(net).double() for net in (mae, moco))
    assert not any(isinstance(m, model.Block) for net in (mae, moco) for m in net.modules())
    assert not any(p.requires_grad for p in moco.momentum_encoder.parameters())
    found = mae(x1, 0.75, noise)[0], moco(x1, x2)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_transformers_upernet_is_as_large_as_ours():
    pytest.importorskip("transformers")
    config = TINY | dict(img_size=[64, 64], depth=6)
    head = segment.describe("upernet", config["depth"], 7, 16)
    ours = segment.Segmenter(config, head)
    whole = references.transformers_upernet(config, 16, 7)
    assert whole(pixel_values=torch.randn(2, 3, 64, 64)).logits.shape == (2, 7, 64, 64)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, whole)]
    assert sizes[0] - sizes[1] == config["depth"] * config["dim"]       # BEiT's keys have no bias


# --------------------------------------------------------------------------------- torch.compile
@pytest.fixture
def graphs(monkeypatch):
    """The input sizes of every graph that torch.compile makes; they then run as they are."""
    found = []

    def backend(module, inputs):
        found.append([tuple(x.shape) if torch.is_tensor(x) else x for x in inputs])
        return module.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run.compile_blocks(torch.nn.Identity(), "on", CPU)      # what it tries is no block's
    found.clear()
    yield found
    torch._dynamo.reset()


def test_mae_compiles_one_graph_an_encoder_and_one_a_decoder(graphs):
    net = model.MaskedAutoencoder(16, 4, 2, **TINY)
    run.compile_blocks(net, "on", CPU, dynamic=False)
    run.micro_batch(0, lambda n: net(torch.randn(n, 3, 16, 16))[0].backward(), 6, run.Env(CPU))
    assert not graphs                                       # to measure memory is no training step
    for _ in range(2):
        net(torch.randn(6, 3, 16, 16))[0].backward()
    assert len(graphs) == 2


def test_a_grafting_run_keeps_all_its_graphs(graphs):
    """Frozen and trained blocks, both encoders, the class token alone, a shorter last micro-batch:
    more than torch's own limit of 8."""
    net = model.MoCoV3(model.VisionTransformer(**TINY), 16, 8)
    model.freeze(net, 3, [0.0, 1.0, 1.0], patch_embed=True)
    run.compile_blocks(net, "on", CPU, dynamic=False)
    x = torch.randn(8, 3, 16, 16)
    net(x, x, 3)[0].backward()
    made = len(graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        net(x, x, 3)[0].backward()
    assert made > 8 and len(graphs) == made


def test_without_a_compiler_auto_goes_on_and_on_says_why(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    block = model.Block(24, 3)
    with pytest.raises(run.RunError, match=r"--compile on: .*C\+\+ compiler found\); go without"):
        run.compile_blocks(block, "on", CPU)
    monkeypatch.setattr(torch, "ones", lambda *args, device: None)          # as if there were a GPU
    run.compile_blocks(block, "auto", torch.device("cuda"))
    assert "warning: torch.compile does not work here" in capsys.readouterr().out
    assert block._compiled_call_impl is None
