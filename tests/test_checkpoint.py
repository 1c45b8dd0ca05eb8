"""checkpoint.py: every layout read, positions and channels fitted, damage refused, writes that fail."""
import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as tv

import checkpoint
import model
from checkpoint import CheckpointError
from test_data import corrupt
from test_model import assert_identical, mae, rand, randomise, vit_names

torch.set_num_threads(1)



# -------------------------------------------------------------------------------------------- checkpoints
WIDE = dict(img_size=16, patch_size=4, dim=128, depth=2, heads=2)           # the heads follow from the width


def wide_vit():
    torch.manual_seed(0)
    return randomise(model.VisionTransformer(**WIDE))


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def layouts():
    """name: (content of the file, layout reported, encoder in it, what is left out)."""
    net = wide_vit()
    state = net.state_dict()
    torch.manual_seed(1)
    full = model.MaskedAutoencoder(32, 1, 1, **WIDE)
    full.load_state_dict(state, strict=False)
    moco = randomise(model.MoCoV3(wide_vit(), 32, 16), seed=2)
    base = {k: v for k, v in moco.base_encoder.state_dict().items() if not k.startswith("head.")}
    momentum = {k: v for k, v in moco.momentum_encoder.state_dict().items() if not k.startswith("head.")}
    official = {"state_dict": prefixed("module.", moco.state_dict()), "epoch": 300, "arch": "vit_base", "optimizer": {},
                "scaler": {}}
    dino_head = {"head.mlp.0.weight": torch.zeros(4, 128), "head.last_layer.weight_v": torch.zeros(8, 4)}
    classifier = {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    return {
        "ours": (checkpoint.encoder_file(net, {"system": "mae"}), "ours", state, ""),
        "ours, to resume": ({"model": moco.state_dict(), "config": net.config, "meta": {}}, "ours", base, "predictor"),
        "MAE": ({"model": state}, "MAE", state, ""),
        "MAE, full": ({"model": full.state_dict()}, "MAE", state, "decoder_blocks"),
        "MAE, with its options": ({"model": state, "args": argparse.Namespace(lr=0.1)}, "MAE", state, ""),
        "MoCo v3": (official, "MoCo v3", base, "predictor"),
        "MoCo v3, momentum": (official, "MoCo v3", momentum, "base_encoder"),
        "MoCo v3, unwrapped": (moco.state_dict(), "MoCo v3", base, "momentum_encoder"),
        "DINO": ({"student": prefixed("module.backbone.", full.state_dict()), "epoch": 1,
                  "teacher": prefixed("backbone.", state) | dino_head}, "DINO", state, "head"),
        "DINO, encoder only": (state, "timm", state, ""),
        "timm": (state | classifier, "timm", state, "head"),
        "timm, wrapped": ({"state_dict": state | classifier, "arch": "vit"}, "timm", state, "head"),
    }


@pytest.mark.parametrize("name", ["ours", "ours, to resume", "MAE", "MAE, full", "MAE, with its options", "MoCo v3",
                                  "MoCo v3, momentum", "MoCo v3, unwrapped", "DINO", "DINO, encoder only", "timm",
                                  "timm, wrapped"])
def test_every_layout_is_read_and_reported(tmp_path, name):
    content, layout, expected, left_out = layouts()[name]
    path = str(tmp_path / "encoder.pt")
    torch.save(content, path)
    for given in (path, str(tmp_path)):                                     # a folder stands for its encoder.pt
        source = checkpoint.read_encoder(given, "momentum" if name.endswith("momentum") else "base")
        assert_identical(source["state"], expected)
        assert source["layout"] == layout
    net = model.VisionTransformer(**source["config"])
    net.load_state_dict(source["state"], strict=True)
    x, reference = rand(2, 3, 16, 16, dtype=torch.float32), wide_vit()
    reference.load_state_dict(expected)
    assert torch.equal(net(x), reference(x))
    report = "\n".join(checkpoint.report(source))
    for fact in (f"{layout} layout", "width 128", "2 blocks", "2 heads", "16x16", f"{len(expected)} encoder tensors"):
        assert fact in report, fact
    assert ("left out" in report) == bool(left_out) and left_out in report


def test_official_mae_and_moco_states_load_strictly():
    contents = layouts()
    model.MaskedAutoencoder(32, 1, 1, **WIDE).load_state_dict(contents["MAE, full"][0]["model"], strict=True)
    expected = vit_names(3) | {"mask_token", "decoder_pos_embed"}
    expected |= {f"decoder_{name}" for name in vit_names(2) if name.startswith(("blocks.", "norm."))}
    expected |= {f"decoder_{part}.{kind}" for part in ("embed", "pred") for kind in ("weight", "bias")}
    assert set(mae().state_dict()) == expected
    state = {k.removeprefix("module."): v for k, v in contents["MoCo v3"][0]["state_dict"].items()}
    model.MoCoV3(wide_vit(), 32, 16).load_state_dict(state, strict=True)


@pytest.mark.parametrize("dim, layout, heads", [
    (192, "timm", 3), (384, "timm", 6), (384, "DINO", 6), (384, "MoCo v3", 12), (768, "MAE", 12), (1024, "MAE", 16),
    (1280, "MAE", 16)])
def test_the_number_of_heads_of_the_published_models(dim, layout, heads):
    if True:
        state = model.VisionTransformer(32, 16, dim=dim, depth=1, heads=1).state_dict()
    config = checkpoint.config_of(state, layout, "file")
    assert config["heads"] == heads and config["mlp_ratio"] == 4


class Payload:
    """A pickled object that would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def damaged(kind, path):
    """Write a checkpoint that must be refused."""
    state = wide_vit().state_dict()
    if kind == "missing":
        del state["blocks.1.norm1.bias"]
    elif kind == "shape":
        state["blocks.1.attn.qkv.weight"] = torch.zeros(128, 128)
    elif kind == "unknown":
        state["blocks.0.ls1.gamma"] = torch.zeros(128)
    elif kind == "no ViT":
        state = {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}
    elif kind == "code":
        state = {"model": state, "extra": Payload()}
    elif kind == "whole model":
        state = wide_vit()
    elif kind == "grid":
        state["pos_embed"] = torch.zeros(1, 1 + 15, 128)
    elif kind == "list":
        state = [1, 2]
    torch.save(state, path)
    if kind == "truncated":
        corrupt(path)
    raw = {"empty": b"", "text": b"hello, this is text\n", "picture": b"\xff\xd8\xff\xe0" + bytes(range(256)),
           "pickle": pickle.dumps({"model": Payload()}, protocol=2)}
    if kind in raw:
        path.write_bytes(raw[kind])


@pytest.mark.parametrize("kind, message", [
    ("missing", "1 encoder tensors missing.*blocks.1.norm1.bias"), ("shape", "1 of another shape.*blocks.1.attn.qkv"),
    ("unknown", "1 unknown.*blocks.0.ls1.gamma"), ("no ViT", "no ViT in it.*conv1.weight"),
    ("code", "refused, it holds more than tensors"), ("whole model", "refused, it holds more than tensors"),
    ("pickle", "refused|not a readable"), ("grid", "15 positions are no square grid"), ("list", "holds a list"),
    ("truncated", "not a readable"), ("empty", "not a readable"), ("text", "not a readable"),
    ("picture", "not a readable")])
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    damaged(kind, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read_encoder(str(tmp_path / "file.pt"))
    assert "\n" not in str(error.value) and str(tmp_path / "file.pt") in str(error.value)
    assert not os.path.exists("payload-was-run")


def source_of(net):
    return dict(state=net.state_dict(), config=net.config)


def test_positions_are_carried_and_resampled_for_another_grid():
    net = wide_vit()
    same, config = checkpoint.fit(source_of(net), [16, 16])
    assert_identical(same, net.state_dict())
    state, config = checkpoint.fit(source_of(net), [8, 24])
    wider = model.VisionTransformer(**config)
    wider.load_state_dict(state, strict=True)
    assert wider.grid == (2, 6) and wider(rand(1, 3, 8, 24, dtype=torch.float32)).shape == (1, 128)
    assert torch.equal(state["pos_embed"][:, 0], net.pos_embed[:, 0])
    grid = net.pos_embed[0, 1:].T.reshape(128, 4, 4)
    expected = tv.resize(grid, [2, 6], tv.InterpolationMode.BICUBIC, antialias=False).flatten(1).T
    torch.testing.assert_close(state["pos_embed"][0, 1:], expected)
    back, _ = checkpoint.fit(dict(state=state, config=config), [8, 24])
    assert_identical(back, state)


def test_input_channels_are_summed_or_repeated():
    net, x = wide_vit(), rand(2, 1, 16, 16, dtype=torch.float32)
    state, config = checkpoint.fit(source_of(net), in_chans=1)
    one = model.VisionTransformer(**config)
    one.load_state_dict(state, strict=True)
    torch.testing.assert_close(one(x), net(x.expand(-1, 3, -1, -1)))        # grey in three channels is grey in one
    state, config = checkpoint.fit(source_of(net), in_chans=4)
    model.VisionTransformer(**config).load_state_dict(state, strict=True)
    old, new = net.patch_embed.proj.weight, state["patch_embed.proj.weight"]
    for c in range(4):
        torch.testing.assert_close(new[:, c], old[:, c % 3] * 0.75)


@pytest.mark.parametrize("error, message", [(OSError(28, "No space left on device"), "the disk is full"),
                                            (RuntimeError("unexpected pos 64 vs 0: file write failed"), "disk is full"),
                                            (OSError(5, "Input/output error"), "Input/output error")])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, error, message):
    path = str(tmp_path / "last.pt")
    checkpoint.save({"step": 1}, path)
    assert os.listdir(tmp_path) == ["last.pt"]

    def fail(obj, f):
        f.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=f"{message}.*the one before is intact"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.read(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]
