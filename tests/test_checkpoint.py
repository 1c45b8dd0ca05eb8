"""checkpoint.py: layouts read, what was assumed said, exports read back."""
import argparse
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

import checkpoint
import model
from checkpoint import CheckpointError
from conftest import assert_identical

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
    for under, content in (("", prefixed(prefix, state)),
                           ("state_dict.", {"state_dict": prefixed(prefix, state) | beside})):
        source = read_as(content, tmp_path / "x.pt")
        assert_identical(source["state"], state)
        assert f"weights of {under}{prefix[:-1]}" in said(source)
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
                    {"ema": {"module": other}, "net": state},
                    {"encoder": state, "target_encoder": other}):
        source = read_as(content, tmp_path / "x.pt")
        assert_identical(source["state"], state)
        assert "also there: " in said(source) and "(--weights ema)" in said(source)
        assert_identical(checkpoint.read_encoder(source["path"], "ema")["state"], other)
    moco_v2 = prefixed("encoder_k.", other) | prefixed("encoder_q.", state)
    assert_identical(read_as(moco_v2, tmp_path / "x.pt")["state"], state)
    assert_identical(checkpoint.read_encoder(str(tmp_path / "x.pt"), "momentum")["state"], other)
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
    (512, "", 8, "no usual ViT has this width")])
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


def test_heads_that_timm_states_are_taken(tmp_path):
    checkpoint.write_safetensors(vit().state_dict(), open(tmp_path / "model.safetensors", "wb"))
    checkpoint.write_safetensors(dict(x=torch.empty(0, 3)), open(tmp_path / "none", "wb"))
    assert checkpoint.read_safetensors(tmp_path / "none")["x"].shape == (0, 3)
    for args, heads in (("of another kind", 2), (dict(num_heads=4), 4)):
        (tmp_path / "config.json").write_text(json.dumps(dict(model_args=args)))
        assert checkpoint.read_encoder(str(tmp_path))["config"]["heads"] == heads
    with pytest.raises(CheckpointError, match="says 4 heads, not 2"):
        checkpoint.read_encoder(str(tmp_path), heads=2)
    for more, message in ((dict(act_layer="relu"), "another activation"),
                          (dict(img_size=[8, 24]), "images of 8x24 have 2x6 patches")):
        (tmp_path / "config.json").write_text(json.dumps(dict(model_args=args | more)))
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read_encoder(str(tmp_path))
    os.rename(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="it has model.fp16.safetensors: give that file"):
        checkpoint.read_encoder(str(tmp_path))
    for config, heads in ((dict(model_args=args, num_features=128), 4), ([1], 2),
                          (dict(num_attention_heads=4, hidden_size=768), 2)):      # of others
        (tmp_path / "config.json").write_text(json.dumps(config))
        source = checkpoint.read_encoder(str(tmp_path / "model.fp16.safetensors"))
        assert source["config"]["heads"] == heads


def test_a_config_of_others_is_not_taken_for_ours(tmp_path):
    content = checkpoint.encoder_file(vit(), {})
    for lacking in ("heads", "in_chans"):
        config = {k: v for k, v in content["config"].items() if k != lacking}
        source = read_as(content | dict(config=config), tmp_path / "x.pt")
        assert source["layout"] != "ours" and "2 assumed" in said(source)


def test_a_decoder_goes_by_width_and_depth(monkeypatch):
    monkeypatch.setattr(model, "ARCHS", {"a": ((4, 96, 6, 3), (64, 1, 2)),
                                         "b": ((4, 96, 12, 3), (128, 4, 4))})
    found = [model.decoder_of(dict(dim=dim, depth=depth))
             for dim, depth in ((96, 12), (96, 6), (96, 3), (48, 6))]
    assert found == [(128, 4, 4), (64, 1, 2), (64, 1, 2), (512, 8, 16)]


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
    (dict(reg_tokens=4), "register tokens"), (dict(embed_norm_layer=torch.nn.LayerNorm), "unknown"),
    (dict(pre_norm=True), "a norm before the blocks"),
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
    net_here = encoder_of(source)
    pooled = net_here.norm(net_here.intermediate(images(), [2])[0][:, 1:].mean(1))
    expected = net.forward_head(net.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


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


def test_statistics_that_timm_or_transformers_state():
    rgb = dict(in_chans=3)
    half = dict(pretrained_cfg=dict(mean=[0.5] * 3, std=[0.25] * 3))
    assert checkpoint.foreign_meta(half, {}, rgb) == dict(mean=[0.5] * 3, std=[0.25] * 3)
    assert checkpoint.foreign_meta(half, {}, dict(in_chans=1)) == {}    # adapted to grey since
    shown = dict(image_mean=[0.1] * 3, image_std=[0.2] * 3)
    assert checkpoint.foreign_meta(half, shown, rgb) == dict(mean=[0.1] * 3, std=[0.2] * 3)
    plain = checkpoint.foreign_meta({}, shown | dict(do_normalize=False), rgb)
    assert plain == dict(mean=[0.0] * 3, std=[1.0] * 3)
    assert checkpoint.foreign_meta({}, {}, rgb) == dict(mean=None, std=None)


@pytest.mark.parametrize("more, low, high", [
    (dict(do_rescale=False), 0, 255), (dict(rescale_factor=1 / 127.5), 0, 255),
    (dict(rescale_factor=1.0), 0, 255), (dict(rescale_factor=1 / 65535), 0, 65535),
    (dict(rescale_factor=1 / 4, value_range=[-1.0, 3.0]), -1, 3)])
def test_images_are_scaled_as_a_processor_does(more, low, high):
    """(x factor - mean) / std, whatever becomes 0 and 1 here."""
    mean, std, x = [1.5, 2.0, 0.5], [0.5, 3.0, 2.0], torch.linspace(low, high, 9).double()
    shown = dict(image_mean=mean, image_std=std) | more
    meta = checkpoint.foreign_meta({}, shown, dict(in_chans=3))
    start, end = meta.get("range") or (0, 255)
    assert (start, end) == (low, pytest.approx(high))
    factor = more.get("rescale_factor", 1.0)
    for c in range(3):
        ours = ((x - start) / (end - start) - meta["mean"][c]) / meta["std"][c]
        torch.testing.assert_close(ours, (x * factor - mean[c]) / std[c])


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
        path = checkpoint.in_folder(str(tmp_path / folder), "last.pt")
        source = checkpoint.read_encoder(path)
        assert source["config"]["heads"] == 4 and "assumed" not in said(source)
        torch.testing.assert_close(encoder_of(source)(x), expected, rtol=1e-5, atol=1e-5)
        if "decoder_embed.weight" in source["rest"]:
            shape = checkpoint.decoder_config(source)
            assert shape == dict(decoder_dim=24, decoder_depth=2, decoder_heads=3,
                                 norm_pix_loss=True)
            mae = model.MaskedAutoencoder(**shape, **source["config"])
            decoder = {k: v for k, v in source["rest"].items()
                       if k.startswith("decoder_") or k == "mask_token"}
            mae.load_state_dict(source["state"] | decoder, strict=True)
            pred = mae.eval()(x, 0.0, order["noise"])[1]
            torch.testing.assert_close(pred, net(x, **order).logits, rtol=1e-4, atol=1e-5)
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
    said = checkpoint.export(source, "timm", str(tmp_path / "x.safetensors"))
    of_8_bits = source | dict(meta=source["meta"] | dict(bits=8))
    assert checkpoint.hf_settings(of_8_bits)[1]["rescale_factor"] == 1 / 255
    assert "less [0.4, 0.5, 0.6], by [0.2, 0.2, 0.2]; the values -1 and 3 are 0 and 1" in said
    there = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=128, depth=2,
                                          num_heads=2, num_classes=0).eval()
    there.load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"), strict=True)
    torch.testing.assert_close(there(x), features, rtol=1e-4, atol=1e-5)
    checkpoint.export(source, "hf", str(tmp_path / "hf"))
    there = hf.AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    torch.testing.assert_close(there(x).last_hidden_state[:, 0], features, rtol=1e-4, atol=1e-5)
    again = checkpoint.read_encoder(str(tmp_path / "hf"))["meta"]
    assert again["range"] == [-1.0, 3.0] and again["mean"] == pytest.approx([0.4, 0.5, 0.6])
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
    with pytest.raises(ValueError, match="divide by 255"):
        encoder.normalise(torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert not encoder.training and not x.requires_grad and set(encoder.config) == set(net.config)
    assert_identical(encoder.state_dict(), net.state_dict())
    assert checkpoint.digest(encoder) == checkpoint.digest(net)
    part = checkpoint.digest(net, lambda name: "pos" not in name)
    net.pos_embed.data += 1
    assert checkpoint.digest(encoder) != checkpoint.digest(net)
    assert part == checkpoint.digest(net, lambda name: "pos" not in name)
