"""checkpoint.py: every layout read, what was assumed said, what harms refused, exports read back."""
import argparse
import collections
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

import checkpoint
import model
from checkpoint import CheckpointError

torch.set_num_threads(1)

# two heads of 64
WIDE = dict(img_size=16, patch_size=4, dim=128, depth=2, heads=2)


def randomise(net, seed=0, scale=0.1):
    """Move every weight, so that no zero bias hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return net.eval()


def vit(**changes):
    torch.manual_seed(0)
    return randomise(model.VisionTransformer(**WIDE | changes))


def images(n=2, channels=3, height=16, width=16):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_identical(a, b):
    assert set(a) == set(b)
    assert not [key for key in a if not torch.equal(a[key], b[key])]


def encoder_of(source):
    net = model.VisionTransformer(**source["config"])
    net.load_state_dict(source["state"], strict=True)
    return net.eval()


def read_as(content, path, **more):
    torch.save(content, path)
    return checkpoint.read_encoder(str(path), **more)


def said(source):
    return "\n".join(checkpoint.report(source))


# ------------------------------------------------------------------------------------ layouts
def layouts():
    """name: (content of the file, layout reported, encoder in it, what is left out)."""
    net = vit()
    state = net.state_dict()
    full = model.MaskedAutoencoder(32, 1, 1, **WIDE)
    full.load_state_dict(state, strict=False)
    moco = randomise(model.MoCoV3(vit(), 32, 16), seed=2)
    base, momentum = ({k: v for k, v in net.state_dict().items() if not k.startswith("head.")}
                      for net in (moco.base_encoder, moco.momentum_encoder))
    official = {"state_dict": prefixed("module.", moco.state_dict()), "epoch": 300,
                "arch": "vit_base", "optimizer": {}, "scaler": {}}
    dino_head = {"head.mlp.0.weight": torch.zeros(4, 128)}
    classifier = {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    resume = {"model": moco.state_dict(), "config": net.config, "meta": {}}
    dino = {"student": prefixed("module.backbone.", full.state_dict()), "epoch": 1,
            "teacher": prefixed("backbone.", state) | dino_head}
    options = argparse.Namespace(lr=0.1)
    return {
        "ours": (checkpoint.encoder_file(net, {"system": "mae"}), "ours", state, ""),
        "ours, to resume": (resume, "ours", base, "predictor"),
        "MAE": ({"model": state}, "MAE", state, ""),
        "MAE, full": ({"model": full.state_dict()}, "MAE", state, "decoder_blocks"),
        "MAE, with its options": ({"model": state, "args": options}, "MAE", state, ""),
        "MoCo v3": (official, "MoCo v3", base, "predictor"),
        "MoCo v3, momentum": (official, "MoCo v3", momentum, "base_encoder"),
        "MoCo v3, unwrapped": (moco.state_dict(), "MoCo v3", base, "momentum_encoder"),
        "DINO": (dino, "DINO", state, "head"),
        "DINO, encoder only": (state, "timm", state, ""),
        "timm": (state | classifier, "timm", state, "head"),
        "timm, wrapped": ({"state_dict": state | classifier, "arch": "vit"}, "timm", state, "head"),
    }


def test_every_layout_is_read_and_reported(tmp_path):
    for name, (content, layout, expected, left_out) in layouts().items():
        path = str(tmp_path / "encoder.pt")
        torch.save(content, path)
        for given in (path, str(tmp_path)):             # a folder stands for its encoder.pt
            weights = "momentum" if name.endswith("momentum") else "base"
            source = checkpoint.read_encoder(given, weights)
            assert_identical(source["state"], expected)
            assert source["layout"] == layout, name
        reference = vit()
        reference.load_state_dict(expected)
        assert torch.equal(encoder_of(source)(images()), reference(images()))
        report = said(source)
        for fact in (f"{layout} layout", "width 128", "2 blocks", "2 heads", "16x16",
                     f"{len(expected)} encoder tensors"):
            assert fact in report, fact
        assert ("heads: 2 assumed (64 wide" in report) == (layout != "ours")
        assert ("left out" in report) == bool(left_out) and left_out in report


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "module._orig_mod.", "model.", "encoder.", "backbone.", "net.", "vit.",
    "student.backbone.", "student_backbone.", "lightning.model.encoder.vit."])
def test_any_prefix_is_taken_off_and_said(tmp_path, prefix):
    state = vit().state_dict()
    beside = {"norm.weight": torch.zeros(5), "classifier.weight": torch.zeros(2, 2)}
    for content in ({"state_dict": prefixed(prefix, state) | beside}, prefixed(prefix, state)):
        source = read_as(content, tmp_path / "x.pt")
        assert_identical(source["state"], state)
        assert f"weights of {'state_dict.' * ('state_dict' in content)}{prefix[:-1]}" in said(source)
    inner = {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in state.items()}
    assert_identical(read_as(inner, tmp_path / "x.pt")["state"], state)


def test_weights_under_any_key_and_averages_beside_them(tmp_path):
    state, other = vit().state_dict(), randomise(vit(), 1).state_dict()
    for key in ("net", "ema", "student", "params"):
        source = read_as({key: state, "epoch": 3}, tmp_path / "x.pt")
        assert_identical(source["state"], state)
        assert f"weights of {key}" in said(source)
    for content in ({"state_dict": state, "state_dict_ema": other},
                    {"model_ema": prefixed("module.", other), "model": state},
                    {"ema": {"module": other}, "net": state}):
        source = read_as(content, tmp_path / "x.pt")
        assert_identical(source["state"], state)
        assert "also there: " in said(source) and "(--weights ema)" in said(source)
        assert_identical(checkpoint.read_encoder(source["path"], "ema")["state"], other)
    torch.save(state, tmp_path / "x.pt")
    for weights in ("ema", "momentum"):
        with pytest.raises(CheckpointError, match="x.pt: holds no (averaged|momentum)"):
            checkpoint.read_encoder(str(tmp_path / "x.pt"), weights)


# ------------------------------------------------------------------------------ heads and grids
def tiny_state(dim, prefix="", **more):
    config = dict(img_size=32, patch_size=16, dim=dim, depth=1, heads=1) | more
    return prefixed(prefix, model.VisionTransformer(**config).state_dict())


@pytest.mark.parametrize("dim, prefix, heads, words", [
    (192, "", 3, "3 assumed (64 wide)"), (384, "", 6, "a ViT-S has 6, that of MoCo v3 12"),
    (384, "module.", 6, "--heads says"), (384, "module.base_encoder.", 12, "12 assumed (32 wide"),
    (768, "", 12, "12 assumed"), (1280, "", 16, "16 assumed (80 wide)"),
    (512, "", 8, "no published ViT has this width")])
def test_heads_are_a_guess_that_is_said(tmp_path, dim, prefix, heads, words):
    source = read_as(tiny_state(dim, prefix), tmp_path / "x.pt")
    assert source["config"]["heads"] == heads and source["config"]["mlp_ratio"] == 4
    assert words in said(source)
    source = checkpoint.read_encoder(str(tmp_path / "x.pt"), heads=4)
    assert source["config"]["heads"] == 4 and "assumed" not in said(source)


def test_heads_and_size_that_a_file_states_are_not_overruled(tmp_path):
    content = checkpoint.encoder_file(vit(), {})
    read_as(content, tmp_path / "x.pt", heads=2, size=(16, 16))
    for more in (dict(heads=4), dict(size=(8, 32))):
        with pytest.raises(CheckpointError, match="x.pt: its (heads|size) is"):
            read_as(content, tmp_path / "x.pt", **more)
    with pytest.raises(CheckpointError, match="not divisible by 5 heads"):
        read_as(vit().state_dict(), tmp_path / "x.pt", heads=5)


def test_positions_of_another_grid_are_never_scrambled(tmp_path):
    path = tmp_path / "x.pt"
    for h, w in ((16, 64), (64, 16)):                   # 4x16 patches: a square number
        state = vit(img_size=(h, w)).state_dict()
        with pytest.raises(CheckpointError, match=f"look like {h // 4}x{w // 4} patches, not 8x8"):
            read_as(state, path)
        source = read_as(state, path, size=(h, w))
        assert source["config"]["img_size"] == [h, w]
        assert checkpoint.fit(source, [h, w])[0]["pos_embed"] is source["state"]["pos_embed"]
    with pytest.raises(CheckpointError, match="have 4x8 patches of 4, and it has 64 positions"):
        read_as(state, path, size=(16, 32))
    with pytest.raises(CheckpointError, match="8 positions are no square grid.*--init-size"):
        read_as(vit(img_size=(8, 16)).state_dict(), path)
    source["config"]["img_size"] = [16, 16]
    with pytest.raises(CheckpointError, match="64 positions are no grid of 4x4"):
        checkpoint.fit(source, [32, 32])


def test_positions_are_carried_and_resampled_for_another_grid():
    net = vit()
    source = dict(state=net.state_dict(), config=net.config)
    assert_identical(checkpoint.fit(source, [16, 16])[0], net.state_dict())
    state, config = checkpoint.fit(source, [8, 24])
    wider = encoder_of(dict(state=state, config=config))
    assert wider.grid == (2, 6) and wider(images(1, 3, 8, 24)).shape == (1, 128)
    assert torch.equal(state["pos_embed"][:, 0], net.pos_embed[:, 0])
    grid = net.pos_embed[0, 1:].T.reshape(128, 4, 4)
    expected = tv.resize(grid, [2, 6], tv.InterpolationMode.BICUBIC, antialias=False).flatten(1).T
    torch.testing.assert_close(state["pos_embed"][0, 1:], expected)


def test_input_channels_are_summed_or_repeated():
    net, x = vit(), images(channels=1)
    source = dict(state=net.state_dict(), config=net.config)
    state, config = checkpoint.fit(source, in_chans=1)
    # grey in three channels is grey in one
    grey = encoder_of(dict(state=state, config=config))
    torch.testing.assert_close(grey(x), net(x.expand(-1, 3, -1, -1)))
    state, config = checkpoint.fit(source, in_chans=4)
    new = encoder_of(dict(state=state, config=config)).patch_embed.proj.weight
    for c in range(4):
        torch.testing.assert_close(new[:, c], net.patch_embed.proj.weight[:, c % 3] * 0.75)


# --------------------------------------------------------------------- files of other libraries
@pytest.mark.parametrize("options, words", [
    (dict(init_values=0.1), "layer scale"), (dict(qk_norm=True), "qk-norm"),
    (dict(reg_tokens=4), "register tokens"), (dict(pre_norm=True), "a norm before the blocks"),
    (dict(class_token=False, global_pool="avg"), "no class token"), (dict(fc_norm=True), None),
    (dict(qkv_bias=False), "encoder tensors missing")])
def test_timm_models_are_read_or_refused_by_what_differs(tmp_path, options, words):
    timm = pytest.importorskip("timm")
    size = dict(img_size=16, patch_size=4, embed_dim=128, depth=2, num_heads=2, num_classes=3)
    net = randomise(timm.models.VisionTransformer(**size, **options))
    if words:
        with pytest.raises(CheckpointError, match=words) as error:
            read_as(net.state_dict(), tmp_path / "x.pt")
        assert "\n" not in str(error.value)
        return
    net = randomise(timm.models.VisionTransformer(**size, global_pool="avg"))
    source = read_as({"model": net.state_dict()}, tmp_path / "x.pt")
    assert "fc_norm taken as the final norm" in said(source)
    mean = encoder_of(source).tokens(images())          # of each token what timm gives of their mean
    blocks = encoder_of(source).intermediate(images(), [2])[0][:, 1:].mean(1)
    torch.testing.assert_close(encoder_of(source).norm(blocks), net.forward_head(
        net.forward_features(images()), pre_logits=True), rtol=1e-4, atol=1e-5)
    assert mean.isfinite().all()


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit3_small_patch16_224"])
def test_a_small_vit_of_timm_saved_from_ddp(tmp_path, name):
    timm = pytest.importorskip("timm")
    net = randomise(timm.create_model(name, img_size=32, depth=2), scale=0.02)
    path = tmp_path / "x.pt"
    torch.save({"state_dict": prefixed("module.", net.state_dict())}, path)
    if name.startswith("deit3"):
        with pytest.raises(CheckpointError, match="layer scale"):
            checkpoint.read_encoder(str(path))
        return
    source = checkpoint.read_encoder(str(path))
    x = images(1, 3, 32, 32)
    torch.testing.assert_close(encoder_of(source)(x), net.forward_features(x)[:, 0],
                               rtol=1e-4, atol=1e-5)


def test_torchvision_models(tmp_path):
    from torchvision.models import VisionTransformer
    net = randomise(VisionTransformer(16, 4, 2, 2, 128, 512, num_classes=3))
    x = images()
    tokens = torch.cat([net.class_token.expand(2, -1, -1), net._process_input(x)], 1)
    source = read_as(net.state_dict(), tmp_path / "x.pt")
    torch.testing.assert_close(encoder_of(source)(x), net.encoder(tokens)[:, 0],
                               rtol=1e-4, atol=1e-5)
    assert "torchvision layout" in said(source) and "left out: 2" in said(source)
    # the names of its files before version 0.13
    old = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
           for k, v in net.state_dict().items()}
    assert_identical(read_as(old, tmp_path / "x.pt")["state"], source["state"])


HF = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
          image_size=16, patch_size=4, layer_norm_eps=1e-6)
DECODER = dict(decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
               decoder_intermediate_size=96, mask_ratio=0.0, norm_pix_loss=True)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEModel",
                                  "ViTMAEForPreTraining"])
def test_transformers_folders(tmp_path, kind):
    hf = pytest.importorskip("transformers")
    config = hf.ViTMAEConfig(**HF, **DECODER) if "MAE" in kind else hf.ViTConfig(**HF)
    net = randomise(getattr(hf, kind)(config))
    net.save_pretrained(tmp_path / "new")
    x, order = images(), dict(noise=torch.arange(16.0).expand(2, -1)) if "MAE" in kind else {}
    inner = getattr(net, "vit", net)
    expected = inner(x, **order).last_hidden_state[:, 0]
    os.makedirs(tmp_path / "memory")                    # the names it has in memory, as a pickle
    torch.save(net.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "memory")
    for folder in ("new", "memory"):
        source = checkpoint.read_encoder(str(tmp_path / folder))
        assert source["config"]["heads"] == 4 and "assumed" not in said(source)
        torch.testing.assert_close(encoder_of(source)(x), expected, rtol=1e-5, atol=1e-5)
        if "decoder_embed.weight" in source["rest"]:
            shape = checkpoint.decoder_config(source)
            assert shape == dict(decoder_dim=24, decoder_depth=2, decoder_heads=3, norm_pix_loss=True)
            mae = model.MaskedAutoencoder(**shape, **source["config"])
            decoder = {k: v for k, v in source["rest"].items()
                       if k.startswith("decoder_") or k == "mask_token"}
            mae.load_state_dict(source["state"] | decoder, strict=True)
    assert ("decoder_embed.weight" in source["rest"]) == (kind == "ViTMAEForPreTraining")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="says 4 heads, not 2"):
        checkpoint.read_encoder(str(tmp_path / "new"), heads=2)
    for change, words in ((dict(hidden_act="quick_gelu"), "'quick_gelu'"),
                          (dict(image_size="16"), "its image_size is '16'")):
        (tmp_path / "new" / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointError, match=words):
            checkpoint.read_encoder(str(tmp_path / "new"))


def test_names_on_the_hub_are_looked_up_in_the_local_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(CheckpointError, match="hf download facebook/vit-mae-base"):
        checkpoint.read_encoder("facebook/vit-mae-base")
    net = vit()
    place = tmp_path / "hub" / "models--facebook--vit-mae-base" / "snapshots" / "0a1b"
    source = dict(state=net.state_dict(), config=net.config, meta={})
    checkpoint.export(source, "hf", str(place))
    assert_identical(checkpoint.read_encoder("facebook/vit-mae-base")["state"], net.state_dict())
    assert checkpoint.there("facebook/vit-mae-base")
    assert not checkpoint.there("out/mae") and not checkpoint.there("some/file.pt")


# ------------------------------------------------------------------------------- use and export
def exported(tmp_path, meta=(), **changes):
    net = vit(**changes)
    torch.save(checkpoint.encoder_file(net, dict(meta)), tmp_path / "encoder.pt")
    return net, checkpoint.read_encoder(str(tmp_path / "encoder.pt"))


@pytest.mark.parametrize("changes", [{}, dict(img_size=(8, 16)), dict(in_chans=1, heads=4)])
def test_exports_come_back_with_equal_features(tmp_path, changes):
    net, source = exported(tmp_path, dict(mean=[0.4] * changes.get("in_chans", 3),
                                          std=[0.2] * changes.get("in_chans", 3)), **changes)
    more = dict(heads=net.config["heads"], size=net.config["img_size"])
    for kind, name in (("timm", "x.pth"), ("timm", "x.safetensors"), ("hf", "folder")):
        path = str(tmp_path / name)
        assert f"wrote {path}" in checkpoint.export(source, kind, path)
        again = checkpoint.read_encoder(path, **more)
        assert_identical(again["state"], net.state_dict())
        assert again["config"] == source["config"]
    assert again["meta"] == dict(mean=source["meta"]["mean"], std=source["meta"]["std"])
    with pytest.raises(CheckpointError, match="onnxscript") as error:
        checkpoint.export(source, "onnx", str(tmp_path / "x.onnx"))
    assert "\n" not in str(error.value)


def test_exports_load_in_their_libraries(tmp_path):
    timm, hf = pytest.importorskip("timm"), pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    net, source = exported(tmp_path, dict(mean=[0.4, 0.5, 0.6], std=[0.2] * 3, range=[-1.0, 3.0]))
    x, features = images(), net(images())
    checkpoint.export(source, "timm", str(tmp_path / "x.safetensors"))
    there = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=2,
                                          num_heads=2, num_classes=0).eval()
    there.load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"), strict=True)
    torch.testing.assert_close(there(x), features, rtol=1e-4, atol=1e-5)
    checkpoint.export(source, "hf", str(tmp_path / "hf"))
    there = hf.AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    torch.testing.assert_close(there(x).last_hidden_state[:, 0], features, rtol=1e-4, atol=1e-5)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    raw = np.linspace(-1, 3, 768).reshape(3, 16, 16).astype(np.float32)
    shown = processor(raw, return_tensors="pt", input_data_format="channels_first",
                      do_resize=False)["pixel_values"][0]
    encoder = checkpoint.load(str(tmp_path))
    torch.testing.assert_close(shown.float(), encoder.normalise(torch.tensor((raw + 1) / 4)),
                               rtol=1e-4, atol=1e-4)


def test_three_lines_give_features(tmp_path):
    net, _ = exported(tmp_path, dict(mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.3]))
    encoder = checkpoint.load(str(tmp_path))
    x = encoder.forward_features(encoder.normalise(torch.full((2, 3, 16, 16), 0.8)))
    by_hand = torch.tensor([4.0, 1.5, 2 / 3])[:, None, None].expand(2, 3, 16, 16)
    torch.testing.assert_close(x, net(by_hand))
    assert not encoder.training and not x.requires_grad and set(encoder.config) == set(net.config)
    assert_identical(encoder.state_dict(), net.state_dict())
    assert checkpoint.digest(encoder) == checkpoint.digest(net)
    part = checkpoint.digest(net, lambda name: "pos" not in name)
    net.pos_embed.data += 1
    assert checkpoint.digest(encoder) != checkpoint.digest(net)
    assert part == checkpoint.digest(net, lambda name: "pos" not in name)


# ---------------------------------------------------------------------- damaged, hostile, full
class Payload:
    """A pickled object that would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def rezipped(path, change):
    """Write a checkpoint's archive again with other parts: change(name, bytes) -> bytes."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts:
            archive.writestr(name, change(name, content))


def listed(path, content, pickled):
    """A file whose list of contents is this pickle."""
    torch.save(content, path)
    rezipped(path, lambda name, old: pickled if name.endswith("data.pkl") else old)


def many_keys(path, legacy):
    """A file of 20 MB that torch would take half a minute over."""
    keys = dict.fromkeys((f"blocks.{i}.weight" for i in range(1_000_000)), 0)
    pickled = pickle.dumps({"model": keys}, 2)
    if not legacy:
        return listed(path, {}, pickled)
    torch.save({}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(pickle.dumps({}, 2), pickled, 1))


def ours(path, change):
    """Our own layout, changed in place: change(content)."""
    content = checkpoint.encoder_file(vit(), dict(system="MAE", mean=[0.5] * 3, std=[0.2] * 3))
    change(content)
    torch.save(content, path)


def claims(**config):
    return lambda path: ours(path, lambda content: content.update(
        config=content["config"] | config))


def with_meta(**meta):
    return lambda path: ours(path, lambda content: content["meta"].update(meta))


def tensor(value, name="norm.weight"):
    return lambda path: ours(path, lambda content: content["model"].update({name: value}))


def foreign(change):
    def write(path):
        state = vit().state_dict()
        torch.save(change(state) or state, path)
    return write


def short(path, padding=0):
    """Every tensor's bytes cut to four, its size in the list of contents left as it was."""
    ours(path, lambda content: None)
    rezipped(path, lambda name, content: content[:4] if "/data/" in name else content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/padding", bytes(padding))


def bomb(path):
    """A quarter of a gigabyte of zeros, deflated to a megabyte."""
    ours(path, lambda content: None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/zeros", bytes(1 << 28))


def safe(header, content=b""):
    text = json.dumps(header).encode()
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def cut(path):
    ours(path, lambda content: None)
    path.write_bytes(path.read_bytes()[:5000])


PIECE = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
HOSTILE = {
    "code": (lambda p: torch.save({"model": Payload()}, p), "more than tensors.*mkdir"),
    "old code": (lambda p: torch.save({"model": Payload()}, p,
                                      _use_new_zipfile_serialization=False), "more than tensors"),
    "bare code": (lambda p: p.write_bytes(pickle.dumps({"model": Payload()}, 2)), "refused|not a"),
    "a whole model": (lambda p: torch.save(vit(), p), r"model\.VisionTransformer.*weights_only"),
    "a path": (lambda p: torch.save({"a": pathlib.Path("x")}, p), r"pathlib\.\w*Path.*torch\.save"),
    "a defaultdict": (lambda p: torch.save(collections.defaultdict(list), p), "defaultdict"),
    "many keys": (lambda p: many_keys(p, False), "longer than that of any model"),
    "many old keys": (lambda p: many_keys(p, True), "longer than that of any model"),
    "nesting": (lambda p: listed(p, {}, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
                "holds a list"),
    "expanded": (tensor(torch.zeros(1).expand(10 ** 7, 10 ** 8)), "has only 4 bytes"),
    "missing bytes": (short, "not a readable|claim"),
    "missing bytes, padded": (lambda p: short(p, 1 << 20), "not a readable|claim"),
    "a zip bomb": (bomb, "claim more bytes than the file has"),
    "no names": (lambda p: torch.save({"model": {1: torch.zeros(2)}}, p), "no ViT in it"),
    "sparse": (tensor(torch.sparse_coo_tensor([[0]], [1.0], (10 ** 12,))), "not dense"),
    "no device": (tensor(torch.empty(10 ** 9, 10 ** 6, device="meta")), "not dense or not stored"),
    "no dimensions": (tensor(torch.tensor(1.0), "patch_embed.proj.weight"), "another shape"),
    "whole numbers": (tensor(torch.zeros(128, dtype=torch.int64)), "not a finite number"),
    "NaN": (tensor(torch.full((128,), float("nan"))), "norm.weight holds what is not"),
    "infinite": (tensor(torch.full((128,), float("inf"))), "norm.weight holds what is not"),
    "1e300": (tensor(torch.full((128,), 1e300, dtype=torch.float64)), "norm.weight holds"),
    "a width of 10^9": (claims(dim=10 ** 9), "dim 1000000000"),
    "another width": (claims(dim=4096, heads=1), "width of 4096 and has 128"),
    "a million blocks": (claims(depth=10 ** 6), "depth 1000000"),
    "more blocks": (claims(depth=200), "200 blocks and has 2"),
    "no heads": (claims(heads=0), "heads 0"),
    "a gigapixel": (claims(img_size=[10 ** 6, 10 ** 6]), "img_size 1000000"),
    "another size": (claims(img_size=[16384, 16384]), "1 of another shape.*pos_embed"),
    "three sides": (claims(img_size=[32, 32, 32]), "img_size"),
    "a size in words": (claims(img_size="32"), "img_size '32'"),
    "an infinite MLP": (claims(mlp_ratio=float("inf")), "mlp_ratio inf"),
    "an unknown setting": (claims(backdoor=True), "not a ViT that can be rebuilt"),
    "a mean in words": (with_meta(mean="0.5"), "its mean"),
    "a mean of one": (with_meta(mean=[0.5]), "its mean"),
    "a mean of NaN": (with_meta(mean=[float("nan")] * 3), "its mean"),
    "a std of zero": (with_meta(std=[0.0, 0.2, 0.2]), "its std"),
    "a std of 1e-300": (with_meta(std=[1e-300] * 3), "its std"),
    "a range of nothing": (with_meta(range=[1.0, 1.0]), "its range"),
    "a range in words": (with_meta(range=["a", "b"]), "its range"),
    "a system of lists": (with_meta(system=["a"]), "its system"),
    "missing": (foreign(lambda s: {k: v for k, v in s.items() if k != "blocks.1.norm1.bias"}),
                "1 encoder tensors missing.*blocks.1.norm1.bias"),
    "a shape": (foreign(lambda s: s.update({"blocks.1.attn.qkv.weight": torch.zeros(128, 128)})),
                "1 of another shape.*blocks.1.attn.qkv"),
    "unknown": (foreign(lambda s: s.update({"blocks.0.new": torch.zeros(1)})), "1 unknown.*0.new"),
    "another network": (lambda p: torch.save({"conv1.weight": torch.zeros(3)}, p), "conv1.weight"),
    "no positions": (foreign(lambda s: {k: v for k, v in s.items() if k != "pos_embed"}),
                     "are not those of a ViT"),
    "a list": (lambda p: torch.save([1, 2], p), "holds a list"),
    "nothing": (lambda p: p.write_bytes(b""), "not a readable"),
    "noise": (lambda p: p.write_bytes(random.Random(0).randbytes(100_000)), "not a readable"),
    "half a file": (cut, "not a readable"),
    "a folder": (lambda p: p.mkdir(), "no such checkpoint"),
    "a named pipe": (os.mkfifo, "no such checkpoint"),
    "safe, long": (safe(PIECE | {"x": "y" * (1 << 23)}), "not a readable safetensors.*header"),
    "safe, short": (safe({"a": PIECE}, bytes(7)), "a claims bytes that are not there"),
    "safe, shared": (safe({str(i): PIECE for i in range(9)}, bytes(8)), "claims bytes that are not"),
    "safe, shape": (safe({"a": PIECE | dict(shape=[3])}, bytes(8)), "claims bytes"),
    "safe, signs": (safe({"a": PIECE | dict(shape=[-1, -2])}, bytes(8)), "not a readable safe"),
    "safe, words": (safe({"a": 3}, bytes(8)), "not a readable safetensors"),
    "safe, no ViT": (safe({"a": PIECE}, bytes(8)), "no ViT in it.*first keys are a"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_harms_is_refused_in_a_line_and_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write, message = HOSTILE[kind]
    write(tmp_path / "hostile.pt")
    limit, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open("/proc/self/statm") as f:             # it may take one gigabyte more
            pages = int(f.read().split()[0])
        most = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (most, limit[1]))
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.read_encoder(str(tmp_path / "hostile.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10      # in KiB
    said = str(error.value)
    assert "\n" not in said and "hostile.pt" in said and len(said) < 500
    assert error.value.exit_code == 2 and not os.path.exists("payload-was-run")


def test_numbers_of_numpy_are_read_as_plain_ones(tmp_path):
    numbers = [np.float64(0.25), np.float32(-2), np.int64(7), np.uint8(255), np.bool_(True)]
    torch.save({"state_dict": vit().state_dict(), "scores": numbers}, tmp_path / "x.pt")
    content = checkpoint.read(str(tmp_path / "x.pt"))
    assert content["scores"] == [0.25, -2.0, 7, 255, True]
    assert {type(value) for value in content["scores"]} == {float, int, bool}
    checkpoint.read_encoder(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("change", [
    dict(classifier=3), dict(classifier={}), dict(classes=["a"]), dict(classes=list("abc") + [4]),
    dict(mean="x"), dict(checkpoint=3), dict(std=[0.0] * 3), dict(std=[float("nan")] * 3),
    dict(classifier=dict(bias=torch.zeros(3))), dict(classifier=dict(normalise="no")),
    dict(classifier=dict(weight=torch.full((4, 24), float("nan")))),
    dict(classifier=dict(weight=torch.zeros(4, 24, dtype=torch.int64))),
    dict(classifier=dict(weight=torch.zeros(4, 25)))], ids=str)
def test_hostile_linear_classifiers_are_refused(change):
    head = dict(weight=torch.zeros(4, 24), bias=torch.zeros(4), normalise=False)
    good = dict(classifier=head, classes=list("abcd"), checkpoint="x", encoder_digest="x",
                mean=[0.5] * 3, std=[0.5] * 3)
    checkpoint.check_linear(good, "file", 24)
    if change.get("classifier") and isinstance(change["classifier"], dict):
        change = dict(classifier=head | change["classifier"])
    with pytest.raises(CheckpointError, match="^file: "):
        checkpoint.check_linear(good | change, "file", 24)


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "the disk is full"),
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
    with pytest.raises(CheckpointError, match=f"{message}.*the one before is intact") as raised:
        checkpoint.save({"step": 2}, path)
    assert raised.value.exit_code == 1
    assert checkpoint.read(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]
