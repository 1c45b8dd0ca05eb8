"""Tests of analyze.py and figures/: each analysis on a case with a known answer; bad input."""


import contextlib
import importlib.util
import itertools
import json
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import augment
import checkpoint
import data
import graft_train
import mae_pretrain
import model
from conftest import folder_of, refused, rows_of
from figures import plots, sheets

DEPTH, DIM, HEADS, SIZE, PATCH = 3, 24, 3, 16, 4
GRID = SIZE // PATCH
QUIET = ["--device", "cpu", "--workers", "0"]
SHAPE = dict(img_size=SIZE, patch_size=PATCH, dim=DIM, depth=DEPTH, heads=HEADS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of 3 classes: 16 each to train, 4 to test."""
    names = [f"{part}/class{c}/{i:02}.png" for part, n in (("train", 16), ("test", 4))
             for c in range(3) for i in range(n)]
    return folder_of(tmp_path_factory.mktemp("images"), names, (SIZE, SIZE))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """Folders of a MAE, a grafted and an MTL run of two epochs, made by our own scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ARCHS, "vit_test", ((PATCH, DIM, DEPTH, HEADS), (16, 1, 2)))
        root = tmp_path_factory.mktemp("runs")
        mae, graft, mtl = (str(root / name) for name in ("mae", "graft", "mtl"))
        short = [*QUIET, "--amp", "off", "--data", folder, "--epochs", "2", "--batch-size", "24",
                 "--log-every", "1", "--crop-min", "0.2"]
        sizes = ["--arch", "vit_test", "--img-size", str(SIZE)]
        heads = ["--hidden-dim", "20"]
        mae_pretrain.main(mae_pretrain.get_args([*short, *sizes, "--out", mae]))
        graft_train.main(graft_train.get_args([*short, *heads, "--init", mae, "--out", graft]))
        graft_train.main(graft_train.get_args([
            *short, *heads, *sizes, "--init", "none", "--mim-weight", "1", "--every-epochs", "1",
            "--out", mtl]))
    return dict(mae=mae, graft=graft, mtl=mtl)


def call(*options):
    """An analysis as from the command line, in this process."""
    return analyze.main(analyze.get_args([str(option) for option in options]))


def table(path):
    """A CSV as a list of dicts, numbers as floats."""
    rows = rows_of(path)
    for row in rows:
        for key, text in row.items():
            with contextlib.suppress(ValueError):
                row[key] = float(text)
    return rows


def fails(*options):
    return refused("analyze", *options)


def looks_drawn(path):
    """A PNG that is not blank; where matplotlib is missing, none."""
    if importlib.util.find_spec("matplotlib") is None:
        assert not os.path.exists(path)
        return
    with Image.open(path) as image:
        assert np.asarray(image.convert("L")).std() > 5


# ------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("sign", [1.0, 3.0, -0.1])
def test_equal_losses_agree_and_opposite_ones_conflict(folder, sign, monkeypatch):
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        """A contrastive loss of which the MAE loss is `sign` times."""
        def __init__(self):
            super().__init__()
            self.base_encoder = model.VisionTransformer(**SHAPE)

        def forward(self, x1, x2, micro_batch):
            return (self.base_encoder(x1) ** 3).mean(), {}

    monkeypatch.setattr(analyze, "mae_loss", lambda encoder, x, *_: sign * (encoder(x) ** 3).mean())
    # centre crops: the three views of an image are the same
    loader = data.Loader(data.load(folder), [augment.TEST_VIEW] * 3, (SIZE, SIZE), 8)
    rows = analyze.gradient_rows(Net(), dict(mask_ratio=0.75), loader, 2, 8)
    assert [(r["batch"], r["block"]) for r in rows] == [
        (b, k) for b in range(2) for k in range(1, DEPTH + 1)]
    for r in rows:
        assert r["cosine"] == pytest.approx(math.copysign(1, sign), abs=1e-5)
        assert r["mae_norm"] == pytest.approx(abs(sign) * r["contrastive_norm"], rel=1e-4)
    summary = analyze.gradient_summary([dict(system="x") | r for r in rows])
    assert {s["negative_share"] for s in summary} == {float(sign < 0)}


def test_negative_share_and_regression_line():
    cosines = {1: [0.3, 0.1, 0.2, 0.4], 2: [0.1, -0.1, 0.2, 0.0], 3: [-0.3, -0.1, -0.2, 0.1]}
    rows = [dict(system="x", block=block, cosine=c) for block, own in cosines.items() for c in own]
    summary = analyze.gradient_summary(rows)
    assert [s["negative_share"] for s in summary] == [0, 0.25, 0.75]
    for k in ("median", "line"):                                        # these lie on a line
        assert [s[k] for s in summary] == pytest.approx([0.25, 0.05, -0.15])
    assert summary[0]["slope"] == pytest.approx(-0.2)


def gradients_by_backward(path, folder, size):
    """Cosine per block of the first batch, by two plain backward passes over the run's model."""
    net, content = analyze.load_two_losses(path)
    scale = dict(scale=(content["settings"]["crop_min"], 1.0))
    views = [view | scale for view in augment.MOCO_VIEWS] + [augment.MAE_VIEW]
    batch = next(iter(data.Loader(data.load(folder), views, (SIZE, SIZE), size).epoch(0)))
    found, encoder = [], net.train().base_encoder
    for loss in (lambda: net(batch.view(0), batch.view(1))[0],
                 lambda: encoder(batch.view(2), 0.75, batch.noise(GRID ** 2))[0]):
        net.zero_grad()
        loss().backward()
        found.append([torch.cat([p.grad.flatten().clone() for p in block.parameters()])
                      for block in encoder.blocks])
    return [float(a @ b / a.norm() / b.norm()) for a, b in zip(*found)]


def test_gradients_of_an_mtl_run_and_its_kept_epochs(made, folder, tmp_path):
    kept = [os.path.join(made["mtl"], f"epoch{epoch:04}.pt") for epoch in (1, 2)]
    call("gradients", *QUIET, "--data", folder, "--batches", 3, "--out", tmp_path,
         "--checkpoint", *kept)
    rows = table(tmp_path / "gradients.csv")
    systems = [f"MTL (MAE + MoCo v3), epoch {epoch}" for epoch in (1, 2)]
    assert [(r["system"], r["epoch"], r["batch"], r["block"]) for r in rows] == [
        (system, epoch, batch, block) for system, epoch in zip(systems, (1, 2))
        for batch in range(3) for block in range(1, DEPTH + 1)]
    for path, own in zip(kept, (rows[:DEPTH], rows[3 * DEPTH:4 * DEPTH])):  # batch 24, as trained
        expected = gradients_by_backward(path, folder, 24)
        assert [r["cosine"] for r in own] == pytest.approx(expected, abs=1e-4)
    assert len({round(r["cosine"], 6) for r in rows}) == len(rows)
    assert len(table(tmp_path / "gradients-summary.csv")) == 2 * DEPTH
    looks_drawn(tmp_path / "gradients.png")


@pytest.mark.parametrize("kind", [model.VICReg, model.SimCLR])
def test_an_mtl_run_with_another_contrastive_loss(kind, tmp_path):
    encoder = model.MaskedAutoencoder(32, 1, 2, **SHAPE)
    net, x = kind(encoder, 20, 12), torch.randn(2, 6, 3, SIZE, SIZE)
    content = dict(model=net.state_dict(), config=encoder.config,
                   settings=dict(loss=kind.__name__.lower(), temperature=0.3),
                   meta=dict(mean=None, std=None, decoder=encoder.decoder_config))
    checkpoint.save(content, tmp_path / "last.pt")
    again, _ = analyze.load_two_losses(str(tmp_path))
    net.temperature = 0.3
    assert again.base_encoder.decoder_config == encoder.decoder_config
    assert torch.equal(again(*x)[0], net(*x)[0])


def test_gradients_say_what_they_need(made, folder):
    for path, lacking in ((made["mae"], "no contrastive head"), (made["graft"], "no MAE decoder"),
                          (os.path.join(made["mtl"], "encoder.pt"), "no MAE decoder")):
        error = fails("gradients", "--checkpoint", path, "--data", folder)
        assert lacking in error and "--mim-weight 1" in error
    error = fails("gradients", "--checkpoint", made["mtl"], "--data", folder,
                  "--batch-size", 49, *QUIET)
    assert "--batch-size 49 is more than the 48 images" in error


# ------------------------------------------------------------------------------------------- vic
def test_vic_terms_equal_numpy():
    x, y = np.random.default_rng(1).normal(1, 1, (2, 40, 5))

    def unit(z):
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    x, y = unit(x), unit(y)
    invariance = ((x - y) ** 2).mean()
    variance, covariance = [], []
    for z in (unit(x - x.mean(0)), unit(y - y.mean(0))):
        matrix = np.cov(z.T)
        variance.append(np.sqrt(np.diag(matrix) + 1e-4).mean())
        covariance.append((matrix ** 2).sum() - (np.diag(matrix) ** 2).sum())
    expected = np.mean(variance), invariance, np.mean(covariance)
    assert analyze.vic_terms(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


def test_vic_of_several_models_with_a_fine_tuned_one(made, folder, tmp_path):
    source = checkpoint.read(os.path.join(made["graft"], "encoder.pt"))
    state = {k: v for k, v in source["model"].items() if not k.startswith("head.")}
    state |= {"head.weight": torch.ones(3, DIM), "head.bias": torch.ones(3)}
    meta = source["meta"] | dict(system="Layer grafted, fine-tune")
    content = dict(model=state, config=source["config"], head=dict(kind="linear"), meta=meta,
                   classes=["a", "b", "c"], mean=meta["mean"], std=meta["std"])
    checkpoint.save(content, tmp_path / "classifier.pt")
    options = ["vic", *QUIET, "--data", folder, "--images", 30, "--checkpoint", made["mae"]]
    call(*options, made["graft"], tmp_path / "classifier.pt", "--batch-size", 7, "--out", tmp_path)
    rows = table(tmp_path / "vic.csv")
    names = plots.unique(r["system"] for r in rows)
    assert names[1:] == ["Layer grafted", "Layer grafted, fine-tune"] and len(rows) == 3 * DEPTH
    graft, fine = ([{k: r[k] for k in r if k != "system"} for r in rows if r["system"] == name]
                   for name in names[1:])
    assert graft == fine                                                    # the same encoder
    terms = ("variance", "invariance", "covariance")
    assert all(0 < r[term] < 1 for r in rows for term in terms)
    looks_drawn(tmp_path / "vic.png")
    # the numbers do not depend on how many images are taken at once
    call(*options, "--batch-size", 30, "--out", tmp_path / "b")
    for r, again in zip(rows, table(tmp_path / "b" / "vic.csv")):
        assert [r[k] for k in terms] == pytest.approx([again[k] for k in terms], rel=1e-3)
    grey = model.VisionTransformer(in_chans=1, **SHAPE)
    checkpoint.save(dict(model=grey.state_dict(), config=grey.config, meta={}), tmp_path / "g.pt")
    assert "numbers of channels" in fails(*options, tmp_path / "g.pt")
    assert "its heads is" in fails(*options, "--heads", 7)
    assert "holds no momentum encoder" in fails(*options, "--weights", "momentum")


# ------------------------------------------------------------------------------------- attention
def mean_patch_distance(height, width, patch_size):
    """By loops, with Python's own arithmetic."""
    places = [(y, x) for y in range(height) for x in range(width)]
    total = sum(patch_size * math.dist(a, b) for a in places for b in places)
    return total / len(places) ** 2


def test_attention_distances_of_a_known_map():
    """A model that cannot tell its tokens apart follows."""
    weights = torch.zeros(1, 1, 5, 5)
    weights[..., 1:, 2], weights[..., 1:, 0] = 0.25, 0.75   # of four patches the upper right
    distance = analyze.patch_distances((2, 2), 4)
    raw, renormalised, share = analyze.attention_distances(weights, distance)[0, 0].tolist()
    assert renormalised == pytest.approx((4 + 0 + 4 * math.sqrt(2) + 4) / 4)
    assert raw == pytest.approx(renormalised / 4) and share == pytest.approx(0.75)


def test_attention_of_a_model_that_cannot_tell_its_tokens_apart(folder, tmp_path):
    encoder = model.VisionTransformer(**SHAPE)
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    places = [tmp_path / name for name in ("first", "second")]
    for place in places:
        place.mkdir()
        content = dict(model=encoder.state_dict(), config=encoder.config, meta=dict(system="same"))
        checkpoint.save(content, place / "encoder.pt")
    call("attention", *QUIET, "--data", folder, "--images", 9, "--batch-size", 4, "--show", 2,
         "--out", tmp_path, "--checkpoint", *places)
    rows = table(tmp_path / "attention.csv")
    assert [(r["system"], r["block"], r["head"]) for r in rows] == [
        (f"same ({name})", b, h) for name in ("first", "second") for b in range(1, DEPTH + 1)
        for h in range(1, HEADS + 1)]
    expected, length = mean_patch_distance(GRID, GRID, PATCH), GRID ** 2
    for r in rows:
        assert r["renormalised"] == pytest.approx(expected, rel=1e-5) == r["uniform"]
        assert r["raw"] == pytest.approx(expected * length / (1 + length), rel=1e-5)
    looks_drawn(tmp_path / "attention.png")
    looks_drawn(tmp_path / "attention-maps-same-first.png")
    with np.load(tmp_path / "attention-maps-same-second.npz") as found:
        expected = np.full((2, HEADS, GRID, GRID), 1 / (1 + length))
        np.testing.assert_allclose(found["maps"], expected, rtol=1e-5)
        assert found["block"] == DEPTH and found["images"].shape == (2, SIZE, SIZE, 3)


def test_attention_maps_of_given_images(made, folder, tmp_path):
    given = [os.path.join(folder, "test", "class1", "00.png"),
             os.path.join(folder, "test", "class2")]
    options = ["attention", *QUIET, "--data", folder, "--images", 4, "--out", tmp_path,
               "--checkpoint", made["graft"]]
    call(*options, "--files", *given, "--block", 2)
    with np.load(tmp_path / "attention-maps-layer-grafted.npz") as found:
        assert found["files"].tolist() == [given[0], *(os.path.join(given[1], f"{i:02}.png")
                                                       for i in range(4))]
        with Image.open(given[0]) as image:
            np.testing.assert_array_equal(found["images"][0], np.asarray(image))
        assert found["maps"].shape == (5, HEADS, GRID, GRID) and found["block"] == 2
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert "not an image that can be read" in fails(*options, "--files", broken)
    assert "no images found" in fails(*options, "--files", made["mae"])
    assert "--block 9: the encoder has 3 blocks" in fails(*options, "--block", 9)


# ------------------------------------------------------------------------------------------ tsne
def test_tsne_shows_the_same_images_for_each_model(made, folder, tmp_path):
    pytest.importorskip("sklearn")
    rows = call("tsne", *QUIET, "--data", folder, "--split", "test", "--classes", 2,
                "--per-class", 3, "--checkpoint", made["mae"], made["graft"], "--out", tmp_path)
    assert [r["file"] for r in table(tmp_path / "tsne.csv")] == [r["file"] for r in rows]
    names = plots.unique(r["system"] for r in rows)
    mae, graft = ([(r["file"], r["class"]) for r in rows if r["system"] == name] for name in names)
    assert mae == graft and len(mae) == 6
    assert all(c in file for file, c in mae) and {c for _, c in mae} == {"class0", "class1"}
    with np.load(tmp_path / "tsne-layer-grafted.npz") as found:
        assert found["features"].shape == (6, DIM)
        assert found["classes"][found["labels"]].tolist() == [c for _, c in graft]
    looks_drawn(tmp_path / "tsne.png")
    flat = os.path.join(folder, "train", "class0")
    assert "no labels" in fails("tsne", *QUIET, "--data", flat, "--checkpoint", made["mae"])
    names = [f"a rather long class name {i:02}" for i in range(40)]
    with warnings.catch_warnings(action="error"):           # the legend has place, the panels too
        points = [("MAE", np.random.rand(40, 2), np.arange(40))]
        plots.draw_tsne(tmp_path / "many.png", points, names)


@pytest.mark.parametrize("missing, analysis, kept", [
    ("sklearn", "tsne", ["tsne-mae.npz"]), ("matplotlib", "vic", ["vic.csv"]),
    ("matplotlib", "attention", ["attention-maps-mae.npz", "attention.csv"]),
    ("matplotlib", "reconstruct", ["reconstruct-mae.npz"])])
def test_without_optional_packages_the_numbers_are_written(made, folder, tmp_path, monkeypatch,
                                                           capsys, missing, analysis, kept):
    for name in [name for name in sys.modules if name.split(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    few = {"tsne": ["--per-class", 4, *QUIET], "vic": ["--images", 8, *QUIET],
           "attention": ["--images", 4, *QUIET], "reconstruct": ["--show", 2]}[analysis]
    call(analysis, "--data", folder, *few, "--out", tmp_path, "--checkpoint", made["mae"])
    assert sorted(os.listdir(tmp_path)) == kept
    assert "pip install" in capsys.readouterr().out


# -------------------------------------------------------------------------- reconstruct, augment
class Perfect(model.MaskedAutoencoder):
    """An autoencoder whose decoder always finds its target."""

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        _, _, mask = super().forward(imgs, mask_ratio, noise)
        return torch.zeros(()), self.target(imgs), mask


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_decoder_returns_the_image_and_visible_patches_are_untouched(norm_pix_loss):
    shape = SHAPE | dict(img_size=(8, 12), depth=1)
    images, noise = torch.randn(3, 3, 8, 12), torch.rand(3, 6)
    found = sheets.filled_in(Perfect(16, 1, 2, norm_pix_loss, **shape), images, 0.5, noise)
    torch.testing.assert_close(found["reconstruction"], images)
    removed = model.unpatchify(found["mask"][..., None].expand(-1, -1, 48), 4, (2, 3)) == 1
    assert removed.float().mean() == 0.5
    assert torch.equal(found["masked"], images.masked_fill(removed, 0.0))
    net = model.MaskedAutoencoder(16, 1, 2, norm_pix_loss, **shape)
    found = sheets.filled_in(net, images, 0.5, noise)
    assert torch.equal(found["pasted"][~removed], images[~removed])
    assert torch.equal(found["pasted"][removed], found["reconstruction"][removed])
    assert (found["reconstruction"] - images)[~removed].abs().mean() > 0.1


def test_reconstructions_of_our_runs(made, folder, tmp_path):
    call("reconstruct", "--data", folder, "--show", 3, "--seed", 1, "--out", tmp_path,
         "--checkpoint", made["mae"], os.path.join(made["mtl"], "epoch0002.pt"))
    for name in ("mae", "mtl-mae-moco-v3"):
        looks_drawn(tmp_path / f"reconstruct-{name}.png")
        with np.load(tmp_path / f"reconstruct-{name}.npz") as found:
            visible = found["mask"].reshape(3, GRID, GRID).repeat(PATCH, 1).repeat(PATCH, 2) == 0
            assert visible.mean() == 0.25
            for k in ("masked", "pasted"):
                np.testing.assert_array_equal(found[k][visible], found["original"][visible])
            assert len(np.unique(found["masked"][~visible], axis=0)) == 1
            with Image.open(os.path.join(folder, "train", found["files"][0])) as image:
                np.testing.assert_array_equal(found["original"][0], np.asarray(image))
    for path in (os.path.join(made["mae"], "encoder.pt"), made["graft"]):
        error = fails("reconstruct", "--data", folder, "--checkpoint", path)
        assert "no MAE decoder in it" in error


def test_reconstruction_from_the_official_layout(folder, tmp_path, capsys):
    """{"model": ...} with decoder_*, sizes from the shapes: heads 64 wide, in the decoder 32."""
    shape = SHAPE | dict(dim=128, depth=2, heads=2)
    net = model.MaskedAutoencoder(96, 2, 3, False, **shape)
    path = tmp_path / "mae_visualize_vit_test.pth"
    torch.save({"model": net.state_dict()}, path)
    again, _ = sheets.load_autoencoder(str(path))
    images, noise = torch.randn(2, 3, SIZE, SIZE), torch.rand(2, GRID ** 2)
    with torch.no_grad():
        torch.testing.assert_close(again(images, 0.75, noise)[1], net(images, 0.75, noise)[1])
    options = ["reconstruct", "--data", folder, "--out", tmp_path, "--checkpoint", path]
    call(*options)
    assert "taken as trained on plain pixels" in capsys.readouterr().out
    state = net.state_dict()
    del state["decoder_norm.weight"]
    torch.save({"model": state}, path)
    assert "decoder_norm.weight" in fails(*options)


def test_the_sheet_shows_the_views_of_the_training(folder, tmp_path):
    given = os.path.join(folder, "test", "class0")
    call("augment", "--files", given, "--img-size", SIZE, "--crop-min", 0.3, "--seed", 5,
         "--out", tmp_path)
    views = [view | dict(scale=(0.3, 1.0)) for view in augment.MOCO_VIEWS]
    files = [os.path.join(given, f"{i:02}.png") for i in range(4)]
    dataset = data.Dataset(data.FileSource("", files))
    loader = data.Loader(dataset, views, (SIZE, SIZE), 4, seed=5, shuffle=False)
    with np.load(tmp_path / "augment.npz") as found:
        for epoch in (0, 1):
            batch = next(iter(loader.epoch(epoch)))
            for k in (0, 1):
                x = (batch.view(k) * loader.std + loader.mean).permute(0, 2, 3, 1).numpy() * 255
                np.testing.assert_allclose(found[f"view{k + 1}_{epoch}"], x, atol=0.51)
        assert found["mae"].shape == (4, SIZE, SIZE, 3) and (found["mae"] != found["image"]).any()
        assert (found["view1_0"] != found["view1_1"]).any()
    looks_drawn(tmp_path / "augment.png")
    call("augment", "--data", folder, "--split", "test", "--in-chans", 1, "--img-size", "8x16",
         "--show", 2, "--out", tmp_path)
    with np.load(tmp_path / "augment.npz") as found:
        assert found["view1_0"].shape == (2, 8, 16, 1)
    deep = tmp_path / "deep.png"                                        # 12 bits in 16
    Image.fromarray(np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)).save(deep)
    for limits, brightest in (("0,65535", 16), ("auto", 255)):
        call("augment", "--files", deep, "--range", limits, "--img-size", 16, "--out", tmp_path)
        with np.load(tmp_path / "augment.npz") as found:
            assert found["image"].max() == pytest.approx(brightest, abs=1)


# ---------------------------------------------------------------------------------- result files
def write_results(folder, entries):
    folder.mkdir(exist_ok=True)
    with open(folder / "results.jsonl", "w") as f:
        f.writelines(json.dumps(dict(seed=0) | entry) + "\n" for entry in entries)
    return folder


def test_lr_grid_has_a_heat_map_for_each_third_rate_and_protocol(tmp_path, monkeypatch):
    rates = (1.5e-6, 1.5e-5, 1.5e-4)
    entries = [dict(protocol=protocol, lr=lr, seed=seed, top1=50.0 + seed)
               for protocol in ("linear", "fine-tune") for lr in itertools.product(rates, repeat=3)
               for seed in (0, 1) if (*lr[:2], protocol) != (rates[2], rates[0], "linear")]
    entries[0]["top1"] = 60.0
    others = [dict(protocol="linear", lr=lr, top1=99.0) for lr in (0.1, [1, 2])]
    drawn, figure = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda rows, columns, *more, **also: drawn.append(
        (rows, columns)) or figure(rows, columns, *more, **also))
    call("lr-grid", "--results", write_results(tmp_path / "in", others + entries),
         "--out", tmp_path)
    found = table(tmp_path / "lr-grid.csv")
    assert len(found) == 27 - 3 + 27 and drawn == [(2, 3)]                  # Figure 4 a to f
    assert sorted(r["top1"] for r in found) == [50.5] * 50 + [55.5]
    assert {r["seeds"] for r in found} == {2}
    assert [r["lr_3"] for r in found[:8]] == [1.5e-4] * 8 and found[0]["protocol"] == "linear"
    looks_drawn(tmp_path / "lr-grid.png")


def test_partial_fine_tuning_and_depth_probes(tmp_path):
    protocols = {0: "fine-tune", 2: "partial fine-tune 2"}
    entries = [dict(system=system, protocol=protocols[k], top1=80.0 - k + seed, seed=0,
                    pretraining=dict(seed=seed))
               for system in ("Layer grafted", "mae") for k in protocols for seed in (0, 2)]
    entries[4:] = [e | dict(name="MAE") for e in entries[4:]]       # as reproduce.py calls it
    # repeated with one seed: the last one counts
    entries += [dict(system="Layer grafted", protocol="x", freeze_blocks=6, top1=v)
                for v in (50.0, 60.0)]
    # not of the kind, and a system that was only fine-tuned as a whole
    entries += [dict(system="Layer grafted", protocol="10% fine-tune", top1=1.0),
                dict(system="MoCo v3", protocol="fine-tune", top1=70.0)]
    entries += [dict(system=system, protocol=f"probe block {k} + {n} blocks", top1=10 * k + n)
                for system in ("MAE", "MoCo v3") for k in (6, 12) for n in (1, 4)]
    # without new blocks: linear evaluation, as reproduce.py files it
    entries += [dict(system="MAE", protocol="linear", probe_block=12, blocks=0, top1=50.0)]
    place = write_results(tmp_path / "in", entries)
    call("partial", "--results", place / "results.jsonl", "--out", tmp_path)
    found = [(r["system"][0], r["freeze_blocks"], r["top1"], r["seeds"])
             for r in table(tmp_path / "partial.csv")]
    assert found == [("L", 0, 81, 2), ("L", 2, 79, 2), ("L", 6, 60, 1), ("M", 0, 81, 2),
                     ("M", 2, 79, 2)]
    call("depth", "--results", place, "--out", tmp_path)
    found = {(r["system"], r["probe_block"], r["blocks"]): r["top1"]
             for r in table(tmp_path / "depth.csv")}
    assert len(found) == 9 and found["MAE", 12, 4] == 124 and found["MAE", 12, 0] == 50
    looks_drawn(tmp_path / "partial.png")
    looks_drawn(tmp_path / "depth.png")


def test_results_that_hold_nothing_of_the_kind(tmp_path):
    place = write_results(tmp_path / "in", [dict(protocol="fine-tune", top1=80.0, lr=0.1)])
    for analysis, lacking in (("lr-grid", "rates of three stages"), ("partial", "--freeze-blocks"),
                              ("depth", "--probe-block")):
        assert lacking in fails(analysis, "--results", place)
    two = write_results(tmp_path / "two", [
        dict(protocol="probe block 3 + 1 blocks", top1=1.0, data=name) for name in ("a", "b")])
    assert "several datasets (a, b)" in fails("depth", "--results", two)
    assert "reproduce.py" in fails("lr-grid", "--results", tmp_path / "none")


def test_curves(made, tmp_path):
    log = tmp_path / "other" / "log.jsonl"
    log.parent.mkdir()
    lines = [dict(step=i, epoch=i / 2, loss=100.0 / i, lr=[1e-6, 0.0, 1e-3], knn=5.0 * i)
             for i in range(1, 5)]
    text = "".join(json.dumps(e) + "\n" for e in lines)
    log.write_text(text + '{"step": 5, "ep')                                # being written
    call("curves", "--checkpoint", made["graft"], log, "--out", tmp_path)
    rows = table(tmp_path / "curves.csv")
    ours, own = ([r for r in rows if r["run"] == name] for name in ("graft", "other"))
    assert [(r["step"], r["loss"], r["knn"], r["lr_1"], r["lr_3"], r["rank"]) for r in own] == [
        (i, 100 / i, 5 * i, 1e-6, 1e-3, "") for i in range(1, 5)]
    assert [r["step"] for r in ours] == [1, 2, 3, 4]
    assert all(r["knn"] == "" and r["rank"] > 1 for r in ours)
    looks_drawn(tmp_path / "curves.png")
    log.write_text("")
    assert "nothing in it yet" in fails("curves", "--checkpoint", log.parent)
