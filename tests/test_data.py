"""data.py: finding and reading images, labels, order, batches, and `data.py check`."""
import contextlib
import io
import os
import struct
import pickle
import random
import resource
import socket
import sys
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import augment
import data
import segment
from conftest import corrupt, folder_of, images_like, png, png_of_16_bits


def classes_in(root, part="train", classes=("cat", "dog"), each=3):
    return folder_of(os.path.join(root, part), [f"{c}/{c}_{i}.png" for c in classes
                                                for i in range(each)])


def two_classes(dataset):
    dataset.label(["a", "b"], ["a", "b"])
    return dataset


def checked(capsys, *arguments):
    """(exit code, what it printed, its errors) of python data.py check."""
    capsys.readouterr()
    code = data.program(["check", *map(str, arguments)])
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == (code > 0)
    return code, said.out, said.err


# --------------------------------------------------------------------------------- finding images
def test_class_folders(tmp_path):
    classes_in(tmp_path, "train", ("b", "a", "c"))
    classes_in(tmp_path, "test", ("c", "a"), each=2)
    train, test = data.load(str(tmp_path)), data.load(str(tmp_path), train=False)
    assert train.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert [train.file(i) for i in (0, 3)] == ["a/a_0.png", "b/b_0.png"]
    assert test.classes == ["a", "c"] and len(test) == 4
    assert data.same_classes(train, test).labels.tolist() == [0, 0, 2, 2]
    assert test.classes == train.classes
    classes_in(tmp_path, "val", ("z",))                 # one class may be tested; val/ before test/
    with pytest.raises(data.DataError, match="test class z"):
        data.same_classes(train, data.load(str(tmp_path), train=False))


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "validation"),
                                         ("TRAIN_SET", "valid"), ("train", "dev")])
def test_parts_of_any_case_and_common_names(tmp_path, train, test, capsys):
    """Whose classes are compared by what they spell."""
    classes_in(tmp_path, train, [unicodedata.normalize("NFC", "caf\u00e9"), "tea"])
    classes_in(tmp_path, test, [unicodedata.normalize("NFD", "caf\u00e9"), "tea"], each=2)
    folder_of(tmp_path, ["unlabeled/1.png"])
    train, test = data.load(str(tmp_path)), data.load(str(tmp_path), False)
    assert len(train) == 6 and data.same_classes(train, test).labels.tolist() == [0, 0, 1, 1]
    assert "/ is read, not unlabeled\n" in capsys.readouterr().out


@pytest.mark.parametrize("names, train, message", [
    (["train_2020/a/1.png", "test_2020/a/1.png"], True, "look like parts"),
    (["seg_train/a/1.png", "seg_test/a/1.png"], True, "look like parts"),
    (["set/train/a/1.png", "set/val/a/1.png"], True, "set/ in it has parts .*: give .*/set"),
    (["train/a/1.png", "Training/a/1.png"], True, "Training/ or train/ the train part"),
    (["boat/1.png", "bus/1.png", "plane/1.png", "train/1.png"], True,
     "train/, beside boat, bus, plane, a part or a class"),
    (["train/a/1.png"], False, "no val/ or test/"), (["1.png"], False, "no train/ and no val/"),
    (["valid/1.png", "invalid/1.png"], True, "it has valid: one that is a class"),
    (["train/imagesTr/1.png", "train/labelsTr/1.png"], True, "labelsTr/ beside imagesTr/ looks"),
    ([".hidden.png"], True, "no images found")])
def test_parts_that_are_in_doubt_or_missing_are_refused(tmp_path, names, train, message):
    folder_of(tmp_path, names)
    with pytest.raises(data.DataError, match=message):
        data.load(str(tmp_path), train)


def test_masks_beside_their_images_are_passed_over(tmp_path, capsys):
    own = ["a/1.png", "a/2.png", "a/lone_mask.png", "b/1.png"]
    folder_of(tmp_path, [*own, "a/1_mask.png", "a/1_mask_2.png", "b/1-Label.png",
                         "b/1_segmentation.png", "b/1.labelIds.png", "a/2_manual1.png"])
    assert list(data.load(str(tmp_path)).files) == own
    assert "passed over 6 masks beside their images, such as a/1_m" in capsys.readouterr().out
    rows = "file,label\n" + "".join(f"a/{name},{name}\n" for name in ("1.png", "1_mask.png"))
    (tmp_path / "list.csv").write_text(rows)                # what is asked for by name is read
    assert len(data.load(str(tmp_path / "list.csv"))) == 2


@pytest.mark.parametrize("names, why", [
    (["cat/1.png"], "it has one class folder only, cat"), (["1.png"], "it has no class folders"),
    (["images/1.png"], "it has one class folder only, images"),         # beside YOLO's labels/*.txt
    (["cat/1.png", "dog/1.png", "x.png"], "x.png lies beside the class folders")])
def test_a_training_set_without_labels_is_named_and_why(tmp_path, names, why):
    folder_of(tmp_path / "train", names)
    os.makedirs(tmp_path / "train" / "labels")
    (tmp_path / "train/labels/1.txt").write_text("0 .5 .5 1 1")
    if names == ["images/1.png"]:
        folder_of(tmp_path / "other", ["images/1.png", "masks/1.png"])
        os.makedirs(tmp_path / "other/labels")
        with pytest.raises(data.DataError, match="masks/ beside images/"):
            data.load(str(tmp_path / "other"))
    classes_in(tmp_path, "val")
    train, test = data.load(str(tmp_path)), data.load(str(tmp_path), train=False)
    assert len(train) == len(names) and train.labels is None
    for use in (lambda: data.labelled(train), lambda: data.same_classes(train, test)):
        with pytest.raises(data.DataError, match=why):
            use()


def test_images_are_known_by_content_in_folders_flat_and_nested(tmp_path, capsys):
    names = ["x/1.png", "y/deep/2.JPG", "3.webp", ".git/4.png", ".hidden.png", "y/5.jpg", "y/6.png"]
    root = folder_of(tmp_path, names)
    os.rename(tmp_path / "y/5.jpg", tmp_path / "y/5.scan")
    os.rename(tmp_path / "y/6.png", tmp_path / "y/6")
    for name in ("notes.txt", "more.txt", "table.csv"):
        (tmp_path / "x" / name).write_text("no image")
    found = data.load(root)
    assert list(found.files) == ["3.webp", "x/1.png", "y/5.scan", "y/6", "y/deep/2.JPG"]
    assert found.labels is None
    assert "passed over 3 files that are no images: 2 .txt, 1 .csv" in capsys.readouterr().out


def test_every_real_folder_is_visited_once(tmp_path):
    folder_of(tmp_path / "set", ["a/1.png", "b/2.png"])
    folder_of(tmp_path / "far", ["3.png"])
    for link, target in (("a/to_b", "../b"), ("b/to_a", "../a"), ("a/up", ".."), ("0", "a")):
        os.symlink(target, tmp_path / "set" / link)
    os.symlink("../far", tmp_path / "set" / "z")
    os.symlink("nowhere", tmp_path / "set" / "dead")
    assert list(data.list_files(str(tmp_path / "set"))) == ["a/1.png", "b/2.png", "z/3.png"]


def test_names_are_compact_and_change_the_digest(tmp_path):
    names = ["a/b.png", "caf\u00e9/1.png", os.fsdecode(b"bad\xff.png"), "x" * 300]
    kept = data.Names(names)
    assert list(kept) == names and list(kept.select([3, 1])) == [names[3], names[1]]
    more = data.Names(f"{i:07}.png" for i in range(10 ** 5))
    assert len(pickle.dumps(more)) < 29 * 10 ** 5 and more[99999] == "0099999.png"
    root = folder_of(tmp_path, ["1.png", "2.png"])
    before = data.load(root).digest
    assert data.load(root).digest == before
    folder_of(tmp_path, ["3.png"])
    assert data.load(root).digest != before


@pytest.mark.parametrize("name, content, kind", [
    ("x.zip", b"PK\3\4" + bytes(99), "zip archive"), ("x.parquet", b"PAR1abc", "parquet"),
    ("x.npy", b"\x93NUMPY\1\0", "numpy array"), ("x.bin", b"abc\0def", "neither text"),
    ("x.tar.gz", b"\x1f\x8b\x08\0", "gzip"), ("x.jpg", b"\xff\xd8\xff\xe0", "an image"),
    ("x.xlsx", b"PK\3\4" + bytes(99), "save it as CSV"), ("x.json", b'[{"file"', "JSON")])
def test_files_that_are_no_list_are_named(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=kind) as error:
        data.load(str(tmp_path / name))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


# ------------------------------------------------------------------------------- lists and labels
@pytest.mark.parametrize("text", [
    "dog_1.png\ncat_0.png\n", "\ndog_1.png\r\ncat_0.png\r\n\r\n", "dog/dog_1.png\ncat/cat_0.png",
    "train/dog/dog_1.png 1\r\ntrain/cat/cat_0.png 0\r\n", "\ufeffdog_1.png\ncat_0.png",
    "train\\dog\\dog_1.png\ntrain\\cat\\cat_0.png", '"dog_1.png"\n"cat_0.png"',
    "ROOT/train/dog/dog_1.png\nROOT/train/cat/cat_0.png",
    "file,label\ntrain/dog/dog_1.png,dog\ntrain/cat/cat_0.png,cat",
    '\ufeff"label";"Filename"\n"dog";"dog_1.png"\n"cat";"cat_0.png"',
    "dog_1.png\tdog\ncat_0.png\tcat", "lesion_id|image_id|dx\n7|dog_1|dog\n8|cat_0|cat",
    "id,photo,dx\ncat_0,dog_1.png,dog\ndog_1,cat_0.png,cat",
    "\tfile\tlabel\n0\tdog_1.png\tdog\n1\tcat_0.png\tcat",               # with pandas' index
    "sep=;\nid;note;dx\ndog_1;;dog\ncat_0;left;cat",
    "# a comment\nid,dx,mask\ndog_1,dog,dog_1.png\ncat_0,cat,dog_1.png",
    "train/dog/dog_1\ncat_0"])
def test_lists(tmp_path, text, capsys):
    root = os.path.dirname(classes_in(tmp_path))
    kind = "utf-16" if "\t" in text else "utf-8"      # a spreadsheet's "Unicode text"
    (tmp_path / "some.txt").write_bytes(text.replace("ROOT", root).encode(kind))
    listed = data.load(f"{root}/some.txt")
    assert [os.path.basename(name) for name in listed.files] == ["dog_1.png", "cat_0.png"]
    if "1\r" in text or "label" in text or "\t" in text or "dx" in text:
        assert listed.labels.tolist() == [1, 0] and listed.classes == ["cat", "dog"]
    full = data.load(root)
    expected = [list(full.files).index(name) for name in ("dog/dog_1.png", "cat/cat_0.png")]
    assert torch.equal(listed.images, full.images[expected])
    ids, how = data.labelled(full, f"{root}/some.txt")
    assert ids.tolist() == sorted(expected) and how == "list some.txt"
    assert ("labels in it are not used" in capsys.readouterr().out) == (listed.labels is not None)


@pytest.mark.parametrize("text, message", [
    ("cat_9.png", "do not exist, first cat_9"), ("same.png", "several"), ("\n\n", "empty"),
    ("cat_0.png\ncat_1.png", "one class only"), ("../cat_0.png", "leads out"),
    ("/etc/cat_0.png", "leads out"), ("cat/only.png", "do not exist, first cat/only.png"),
    ("dog/same.png\ncat/same.png\na, b.png", None)])
def test_lists_that_cannot_be_followed(tmp_path, text, message):
    root = classes_in(tmp_path)
    folder_of(root, ["cat/same.png", "dog/same.png", "dog/only.png", "a, b.png"])
    full = data.Dataset(data.FileSource(root, data.list_files(root)))
    full.label([name[0] for name in full.files], ["a", "c", "d"])
    (tmp_path / "list.txt").write_text(text)
    if message:
        with pytest.raises(data.DataError, match=message):
            data.labelled(full, f"{tmp_path}/list.txt")
        return
    ids = data.labelled(full, f"{tmp_path}/list.txt")[0]
    assert [full.file(i) for i in ids] == ["a, b.png", "cat/same.png", "dog/same.png"]
    with pytest.raises(data.DataError, match="a list names files"):
        data.labelled(data.embedded(n=16), f"{tmp_path}/list.txt")


def test_labels_of_a_list_are_used_and_said(tmp_path, capsys):
    root = folder_of(tmp_path, [f"{i}.png" for i in range(4)])
    (tmp_path / "l.txt").write_text("3.png 10\n1.png 9\n0.png 9\n")
    listed = data.load(f"{root}/l.txt")
    assert list(listed.files) == ["3.png", "1.png", "0.png"]
    assert listed.classes == ["9", "10"] and listed.labels.tolist() == [1, 0, 0]
    assert "2 classes, 9, 10" in capsys.readouterr().out
    with pytest.raises(data.DataError, match="nothing to evaluate on; --val-share"):
        data.load(f"{root}/l.txt", train=False)
    for text, message in (("0.png 1\n0.png 2\n", "two labels"), ("0.png 1\n1.png\n", "no label")):
        (tmp_path / "l.txt").write_text(text)
        with pytest.raises(data.DataError, match=message):
            data.load(f"{root}/l.txt")


def test_labels_file_with_and_without_a_split(tmp_path, capsys):
    root, table = folder_of(tmp_path / "flat", [f"{i}.png" for i in range(6)]), tmp_path / "l.csv"
    rows = [f"{i}.png,{'ab'[i % 2]},{'train' if i < 4 else 'Test'}\n" for i in range(6)]
    table.write_text("file,label,split\n" + "".join(rows + rows[1:3]))
    train, test = (data.load(root, part, labels_file=str(table)) for part in (True, False))
    assert list(train.files) == ["0.png", "1.png", "2.png", "3.png"]
    assert list(test.files) == ["4.png", "5.png"] and test.labels.tolist() == [0, 1]
    said = capsys.readouterr().out
    assert said.count("2 rows repeat others") == 1 and "split val" not in said
    table.write_text("file,label,split\n" + "".join(rows).replace("4.png,a,Test", "4.png,a,val"))
    assert list(data.load(root, False, labels_file=str(table)).files) == ["4.png"]
    assert "images of split val are tested on, not those of test" in capsys.readouterr().out
    table.write_text("file,label\n" + "".join(row[:8].rstrip(",") + "\n" for row in rows * 2))
    parts = [data.load(root, part, labels_file=str(table), val_share=0.3) for part in (True, False)]
    assert sorted([*parts[0].files, *parts[1].files]) == [f"{i}.png" for i in range(6)]
    table.write_text("file,label,split\n0.png,a,never\n")
    with pytest.raises(data.DataError, match="'never' in the column split"):
        data.load(root, labels_file=str(table))
    for text in ("file,breed\n0.png,a\n", "photo,kind\n0.png,a\n"):
        table.write_text(text)
        with pytest.raises(data.DataError, match="no column of labels"):
            data.load(root, labels_file=str(table))
    with pytest.raises(data.DataError, match="names its columns, file and label"):
        data.load(str(table))
    names = [f"{part}/{c}/1.png" for part in ("train", "val") for c in ("cat", "dog")]
    root = folder_of(tmp_path / "parts", names)
    table.write_text("file,label\n" + "".join(f"{n},{n[6:9]}\n" for n in names[:2]))
    with pytest.raises(data.DataError, match="no row of it names an image of val/"):
        data.load(root, False, labels_file=str(table))
    table.write_text("file,label\n" + "".join(f"{n},new {n.split('/')[1]}\n" for n in names))
    for part in (True, False):
        assert data.load(root, part, labels_file=str(table)).classes == ["new cat", "new dog"]


@pytest.mark.parametrize("rows, message", [
    (["a/1.png,x,train", "a/1.png,x,val"], "1 images are in split train and in another, first a/1"),
    (["label", "x"], "row 2 of the table names no file"),
    (["train/a/1.png,x,train"], "1 of 1 listed images do not exist"),   # val/a/1.png is another
    (["b/a/1.png,x,train", "c/a/1.png,y,train"], "stand for one image, a/1.png"),
    (["a/1.png,x,train", "2.png,left, x,train"], "row 3 has more cells than the first line names"),
    (["a/1.png,nan,train", "2.png,x,train"], r"a/1.png has no label \(so 1 of 2\)"),
    (["a/1.png,nan,train", "2.png,nan,train"], "no column of labels"),
    (["a/1.png,nan,train", "2.png,x,val"], "no image of train has a label in it"),
    (["c/2.png,x,train", "d/2.png,y,train"], "c/2.png and d/2.png stand for one image, 2.png")])
def test_tables_that_would_mislead_are_refused(tmp_path, rows, message):
    names = ["val/a/1.png"] if rows[0].startswith("train") else ["a/1.png", "2.png"]
    root, table = folder_of(tmp_path / "set", names), tmp_path / "l.csv"
    head = "label,file\nx,a/1.png" if rows[0] == "label" else "file,label,split"
    table.write_text("\n".join([head, *rows[rows[0] == "label":]]) + "\n")
    with pytest.raises(data.DataError, match=message):
        data.load(root, labels_file=str(table))


def test_what_a_table_says_goes_before_what_folders_are_called(tmp_path, capsys):
    names, table = ["1/0.png", "2/0.png", "1/-1.png"], tmp_path / "l.csv"
    root = folder_of(tmp_path / "set", names)
    table.write_text("file,label\n1/0.png,2\n2/0.png,1\n")            # grades in folders of sites
    assert data.load(root, labels_file=str(table)).classes == ["1", "2"]
    assert data.load(root, labels_file=str(table)).labels.tolist() == [1, 0]
    table.write_text("file,label\n1/0.png,a\n1/'-1.png,b\n'-1.png,b\n")
    with pytest.raises(data.DataError, match="'-1.png"):
        data.load(root, labels_file=str(table))
    table.write_text("file,label\n1/0.png,a\n'-1.png,b\n")            # as write_csv guards it
    assert data.load(root, labels_file=str(table)).files[1] == "1/-1.png"
    names = ["A/p/1.png", "B/p/1.png", "B/p/2.png"]
    root = folder_of(tmp_path / "more", names)
    table.write_text("file,label\nA/p/1.png,a\nA/p/2.png,b\n")        # of another p
    with pytest.raises(data.DataError, match=r"first A/p/2.png \(there is B/p/2.png\)"):
        data.load(root, labels_file=str(table))
    names = ["Train/c/# 1.png", "Train/c/2.png"]
    root = folder_of(tmp_path / "parts", names)
    (tmp_path / "list.txt").write_text("# 1.png\nold/train/c/2.png\n")
    ids, _ = data.labelled(two_classes(data.load(root)), f"{tmp_path}/list.txt")
    assert ids.tolist() == [0, 1]
    (tmp_path / "more" / "t.csv").write_text("file,grade\nB/p/1.png,1\n")
    capsys.readouterr()
    data.load(f"{tmp_path}/more/t.csv")
    assert "no column of labels in it, of grade" in capsys.readouterr().out


def test_numbers_for_class_folders_are_read_alike_in_both_parts(tmp_path):
    """ImageNet as it is unpacked: validation images in no class folders."""
    names = [f"train/{c}/{i}.png" for c in ("n1", "n2") for i in range(2)]
    flat = ["val/7.png", "val/8.png"]
    root, table = folder_of(tmp_path / "set", names + flat), tmp_path / "l.csv"
    rows = [f"{name},{int('n2' in name)}" for name in names] + ["val/7.png,1", "val/8.png,0"]
    table.write_text("file,label\n" + "\n".join(rows) + "\n")
    train, test = (data.load(root, part, labels_file=str(table)) for part in (True, False))
    assert data.same_classes(train, test).labels.tolist() == [1, 0]


def test_colours_of_16_bits_keep_their_range(tmp_path):
    values, file = np.arange(3 * 8 * 6).reshape(8, 6, 3) * 28, tmp_path / "1.png"   # to 4,004
    expected = np.floor(values / 4095 * 255 + 0.5)
    for orientation in (1, 6):                              # as it is; a quarter clockwise
        file.write_bytes(png_of_16_bits(values, orientation))
        pixels = data.load(str(tmp_path), value_range=(0, 4095)).read(0)
        assert np.array_equal(pixels, np.rot90(expected, -1) if orientation == 6 else expected)
    assert data.load(str(tmp_path)).range == (0, 65535)
    assert data.Encoded(bytearray(file.read_bytes())).extremes() == (0, 4004)


def test_an_output_that_lacks_letters_shows_every_name(monkeypatch):
    for encoding, shown in (("ascii", "\\xb1 \\udce9"), ("utf-8", "\u00b1 \\udce9")):
        output = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", output)
        data.show_all_names()
        print("\u00b1 \udce9", end="", flush=True)
        assert output.buffer.getvalue().decode(encoding) == shown
        monkeypatch.undo()


def test_progress_needs_no_terminal_and_no_stderr(monkeypatch):
    class Logger(list):
        write, flush = list.append, lambda self: None

    for stream in (Logger(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = data.Progress("x", 2)
        progress.due = 0
        progress.step()
        monkeypatch.undo()
        assert stream is None or "x: 1 of 2 images" in "".join(stream)


def test_names_of_classes_need_not_be_text():
    dataset = data.Dataset(images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    digests = set()
    for name in ("caf\udce9", "cafe"):                      # Latin-1, as the file system gives it
        dataset.label([name, "b"], [name, "b"])
        digests.add(dataset.label_digest)
    assert len(digests) == 2


def test_a_share_of_each_class_is_held_out(tmp_path):
    root = folder_of(tmp_path, [f"{c}/{i}.png" for c, n in (("a", 10), ("b", 5), ("c", 1))
                                for i in range(n)])
    train, test = (data.load(root, part, val_share=0.2) for part in (True, False))
    assert test.labels.bincount(minlength=3).tolist() == [2, 1, 0]
    assert sorted([*train.files, *test.files]) == sorted(data.load(root).files)
    assert list(test.files) == list(data.load(root, False, val_share=0.2).files)
    with pytest.raises(data.DataError, match="no class of .* has two images"):
        data.load(folder_of(tmp_path / "few", ["a/1.png", "b/1.png"]), val_share=0.2)
    classes_in(tmp_path / "parts")
    classes_in(tmp_path / "parts", "val")
    with pytest.raises(data.DataError, match="test images of its own"):
        data.load(str(tmp_path / "parts"), val_share=0.2)


def test_label_subsets():
    dataset = data.embedded(n=1600)
    ids, how = data.labelled(dataset)
    assert ids.tolist() == list(range(1600)) and how == "all"
    for spec, each in (("1%", 1), ("10%", 10), ("0.1%", 1), ("7 per class", 7), ("7", 7)):
        ids, how = data.labelled(dataset, spec, seed=5)
        assert dataset.labels[ids].bincount().tolist() == [each] * 16, spec
        assert ids.tolist() == sorted(set(ids.tolist())) and "seed 5" in how
        assert torch.equal(ids, data.labelled(dataset, spec, seed=5)[0])
        assert not torch.equal(ids, data.labelled(dataset, spec, seed=6)[0])
    small = set(data.labelled(dataset, "5%")[0].tolist())
    assert small < set(data.labelled(dataset, "20%")[0].tolist())       # one draw holds the other
    order = augment.shuffled(1600, augment.SUBSET, 3, 2)                # the draw, by a loop
    firsts = [order[dataset.labels[order] == c][:3] for c in range(16)]
    assert torch.equal(data.labelled(dataset, "3", seed=2)[0], torch.cat(firsts).sort().values)
    for spec, message in (("101%", "out of range"), ("-3", "out of range"),
                          ("1.5", "neither a share"), ("/nowhere.txt", "neither a share")):
        with pytest.raises(data.DataError, match=message):
            data.labelled(dataset, spec)


# --------------------------------------------------------------------------------- reading images
def read_back(tmp_path, image, name="image.png", in_chans=3, value_range=None, **options):
    image.save(tmp_path / name, **options)
    dataset = data.Dataset(data.FileSource(str(tmp_path), [name]), in_chans=in_chans)
    dataset.range = data.find_range(dataset, value_range)
    return dataset.read(0).numpy()


def test_kinds_of_images_are_read_right(tmp_path):
    rgb = images_like(1, 10, 14)[0].permute(1, 2, 0).numpy()
    grey = rgb[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    rgba = np.dstack([rgb, np.full((10, 14), 77, np.uint8)])
    palette, bilevel = Image.fromarray(rgb).quantize(16), Image.fromarray(grey > 128)
    ink = np.dstack([255 - rgb, np.zeros((10, 14), np.uint8)])  # CMYK without black: the complement
    for image, expected, options in (
            (rgb, rgb, {}), (grey, three, {}), (grey, grey[..., None], dict(in_chans=1)),
            (rgba, rgb, {}), (rgba, rgba, dict(in_chans=4)),
            (rgb, np.dstack([rgb, np.full((10, 14), 255)]), dict(in_chans=4)),
            (np.dstack([grey, rgba[..., 3]]), three, {}),
            (grey.astype(np.uint16) * 257, three, {}),
            (grey.astype(np.uint16) * 257, grey[..., None], dict(in_chans=1, name="p.tif")),
            (palette, np.asarray(palette.convert("RGB")), {}),
            (palette, np.asarray(palette.convert("RGB")), dict(transparency=3)),
            (palette, np.asarray(palette.convert("RGB")), dict(name="p.gif")),
            (bilevel, np.repeat((grey > 128)[..., None] * 255, 3, 2), {}),
            (Image.fromarray(ink, mode="CMYK"), rgb, dict(name="p.tif"))):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        assert np.array_equal(read_back(tmp_path, image, **options), expected), image.mode
    exif = Image.Exif()
    for exif[0x0112], turned in ((3, rgb[::-1, ::-1]), (6, np.rot90(rgb, -1)), (8, np.rot90(rgb))):
        assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb), exif=exif), turned)
    if "AVIF" in data.FORMATS:
        got = read_back(tmp_path, Image.fromarray(rgb), name="p.avif", quality=100,
                        subsampling="4:4:4")
        assert got.shape == rgb.shape and np.abs(got - rgb.astype(int)).mean() < 4      # lossy


def ramp(low, high, kind):
    """An image of 16 x 16 values that rise from low to high, and what is to be read: 0 to 255."""
    return Image.fromarray(np.linspace(low, high, 256).reshape(16, 16).astype(kind))


@pytest.mark.parametrize("low, high, kind, value_range, expected", [
    (0, 1, np.float32, None, (0, 255)), (-1, 1, np.float32, None, (0, 255)),
    (-1, 1, np.float32, (-1, 3), (0, 128)), (0, 65535, np.uint16, None, (0, 255)),
    (0, 4080, np.uint16, None, (0, 16)), (0, 4080, np.uint16, "auto", (0, 255)),
    (0, 4080, np.uint16, (0, 4080), (0, 255)), (0, 260, np.uint16, (0, 4080), (0, 16)),
    (-1000, 3000, np.int32, None, (0, 255)), (0, 255, np.uint16, (0, 255), (0, 255))])
def test_the_range_is_that_of_the_set(tmp_path, low, high, kind, value_range, expected):
    read = read_back(tmp_path, ramp(low, high, kind), "x.tif", 1, value_range)
    assert (read.min(), read.max()) == expected
    if expected == (0, 255) and high - low > 255 or kind == np.float32 and value_range is None:
        assert len(np.unique(read)) == 256


def test_one_range_for_all_images_of_both_parts(tmp_path, capsys):
    for part, tops in (("train", (1.0, 4.0)), ("val", (2.0, 8.0))):
        for c, top in zip("ab", tops):
            os.makedirs(tmp_path / part / c)
            ramp(0, top, np.float32).save(tmp_path / part / c / "x.tif")
    train, test = (data.load(str(tmp_path), part, 1) for part in (True, False))
    assert train.range == test.range == (0.0, 4.0)
    assert train.images.amax((1, 2, 3)).tolist() == [64, 255]
    assert test.images.amax((1, 2, 3)).tolist() == [128, 255]
    assert "values from 0 to 4, measured on a sample" in capsys.readouterr().out


def test_stacks_are_said_to_be_read_by_their_first_frame(tmp_path, capsys):
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (10, 20, 30)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "plain.png")
    assert data.load(str(tmp_path)).images[1].unique().tolist() == [10]
    assert "1 of 2 images looked at have several frames" in capsys.readouterr().out


def raw_tiff(width, bits, values, photometric, samples=1, sign=1):
    """A TIFF of one row, as bytes."""
    tags = {"width": (256, width), "height": (257, 1), "bits": (258, bits), "compression": (259, 1),
            "photometric": (262, photometric), "offset": (273, 146), "samples": (277, samples),
            "rows": (278, 1), "bytes": (279, len(values)), "sign": (339, sign)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.values())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return header.ljust(146, b"\0") + values


def test_a_tiff_whose_least_value_is_white_is_read_as_its_twin(tmp_path):
    """X-rays from DICOM's MONOCHROME1; pillow turns those of 8 bits alone."""
    values = np.array([0, 1000, 30000, 65535], "<u2")
    for name, photometric, written in (("black", 1, values), ("white", 0, 65535 - values)):
        (tmp_path / f"{name}.tif").write_bytes(raw_tiff(4, 16, written.tobytes(), photometric))
    dataset = data.Dataset(data.FileSource(str(tmp_path), ["black.tif", "white.tif"]), in_chans=1)
    assert dataset.read(0).flatten().tolist() == [0, 4, 117, 255]
    assert torch.equal(dataset.read(1), dataset.read(0))
    dark = np.array([5, 65535], "<u2").tobytes()
    (tmp_path / "white.tif").write_bytes(raw_tiff(2, 16, dark, 0))
    assert dataset.open(1).extremes() == (0, 65530)


def test_a_range_of_8_bits_is_not_used_and_deep_colours_of_a_tiff_are_refused(tmp_path, capsys):
    folder_of(tmp_path, ["1.png", "2.png"])
    dataset = data.load(str(tmp_path), in_chans=4, value_range=(0, 100))
    assert dataset.range == (0, 100) and dataset.bits == 8              # of deep ones among them
    said = capsys.readouterr().out
    assert "none of 2 images looked at has more than 8 bits" in said
    assert "2 of 2 images looked at have no fourth channel" in said
    (tmp_path / "2.png").write_bytes(raw_tiff(2, 16, bytes(range(12)), photometric=2, samples=3))
    dataset = data.Dataset(data.FileSource(str(tmp_path), ["2.png"]))
    with pytest.raises(data.BadFile, match="colours have 16 bits, of which pillow reads 8"):
        dataset.read(0)
    (tmp_path / "2.png").write_bytes(raw_tiff(2, 8, b"\1\xff", 1, sign=2))
    with pytest.raises(data.BadFile, match="8 bits with a sign"):
        dataset.read(0)
    for maxval, values in ((4095, "<u2"), (255, "u1")):
        (tmp_path / "2.png").write_bytes(b"P6 1 1 %d\n" % maxval + np.zeros(3, values).tobytes())
        if maxval > 255:
            with pytest.raises(data.BadFile, match="a PPM whose colours have 12 bits"):
                dataset.read(0)
    assert dataset.read(0).tolist() == [[[0, 0, 0]]]
    folder_of(tmp_path, ["3.jp2"])
    jp2 = bytearray((tmp_path / "3.jp2").read_bytes())
    (tmp_path / "2.png").write_bytes(jp2)
    assert dataset.read(0).shape == (16, 16, 3)
    jp2[jp2.find(b"\xff\x51") + 40] = 11
    (tmp_path / "2.png").write_bytes(jp2)
    with pytest.raises(data.BadFile, match="a JPEG2000 whose colours have 12 bits"):
        dataset.read(0)


def test_nan_and_floats_among_8_bits_are_bad(tmp_path):
    pixels = np.zeros((16, 16), np.float32)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(tmp_path / "nan.tif")
    source = data.FileSource(str(tmp_path), ["nan.tif"])
    for value_range, message in (((0, 1), "NaN"), (None, "give --range")):
        dataset = data.Dataset(source)
        dataset.range = value_range
        with pytest.raises(data.BadFile, match=message):
            dataset.read(0)


def test_a_fourth_band_that_is_not_called_alpha_is_not_left_out(tmp_path):
    pixels = images_like(1, 9, 8)[0].repeat(2, 1, 1)[:4].permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(tmp_path / "alpha.tif")
    content = (tmp_path / "alpha.tif").read_bytes()
    tag = struct.pack("<HHI", 338, 3, 1)                # ExtraSamples: 2, alpha; 0, not specified
    assert content.count(tag + b"\2") == 1
    (tmp_path / "bands.tif").write_bytes(content.replace(tag + b"\2", tag + b"\0"))
    source = data.FileSource(str(tmp_path), ["alpha.tif", "bands.tif"])
    four, three = (data.Dataset(source, in_chans=n) for n in (4, 3))
    assert torch.equal(four.read(0)[..., :3], three.read(1))
    with pytest.raises(data.BadFile, match="TIFF of 4 bands, of which 3 are read"):
        four.read(1)
    # crops of evaluations too take the fourth for a band like the others
    box = (0.5, 0.25, 7.5, 7.0)
    crops = [data.crop(set.read(0), box, (5, 6), augment.TEST_VIEW) for set in (four, three)]
    assert torch.equal(crops[0][:3], crops[1]) and crops[0].shape == (4, 5, 6)
    image = Image.open(tmp_path / "alpha.tif")
    small, plain = (segment.shrunk(one, 6) for one in (image, image.convert("RGB")))
    assert torch.equal(small[:3], plain)
    label = Image.new("L", image.size)
    big, plain = (segment.random_crop(one, label, (9, 9), 9, 0)[0]
                  for one in (image, image.convert("RGB")))
    assert np.array_equal(big[..., :3], plain)


def test_check_says_the_range_and_what_is_lost(tmp_path, capsys):
    for i, top in enumerate((3000, 4080)):
        ramp(0, top, np.uint16).save(tmp_path / f"{i}.png")
    code, out, _ = checked(capsys, tmp_path)
    assert code == 0 and "2 16-bit" in out and "0 to 4080; 0 to 65535 become" in out
    assert "of 256 levels 16 are left; --range 0,4080 keeps all" in out
    code, out, _ = checked(capsys, tmp_path, "--range", "0,3500")
    assert "values outside become black or white; --range 0,4080" in out and "left" not in out
    pixels = np.full((16, 16), np.inf, np.float32)
    Image.fromarray(pixels).save(tmp_path / "2.tif")
    code, out, err = checked(capsys, tmp_path, "--range", "0,4080")
    assert code == 1 and "1 of 3 images are bad: 1 NaN" in err and "warning" not in out


def test_only_regular_files_are_opened(tmp_path, capsys, monkeypatch):
    root = folder_of(tmp_path / "set", [f"{i}.png" for i in range(4)], (24, 136))
    os.mkfifo(tmp_path / "set" / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "set" / "zero.png")
    os.symlink("pipe.jpg", tmp_path / "set" / "link.png")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket.png")
    with open("huge.png", "wb") as f:
        f.truncate(8 << 30)
    Image.new("L", (9, 9)).save("sparse.png")
    os.truncate("sparse.png", 1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, out, err = checked(capsys, root, "--workers", 1)
    assert code == 1 and "6 of 10 images are bad: 4 not a regular file" in err
    assert "1.0 GiB are more than an image of 9 x 9" in out
    dataset = data.load(root, max_bad=1)
    for batch in data.Loader(dataset, [augment.MAE_VIEW], (8, 8), 5, max_bad=1).epoch(0):
        assert batch.view(0).isfinite().all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def encoded(form, mode="RGB", size=(40, 36), **options):
    content = io.BytesIO()
    pixels = images_like(1, *size[::-1])[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).convert(mode).save(content, form, **options)
    return content.getvalue()


def png_that_claims(width, height):
    """A PNG of a few bytes whose header claims this size."""
    return png(width, height, 8, bytes(999))


GOOD_FILES = {
    "animated.gif": encoded("GIF", "P", save_all=True,
                            append_images=[Image.new("P", (40, 36))] * 3),
    "cmyk.jpg": encoded("JPEG", "CMYK"), "a_png_in_truth.jpg": encoded("PNG"),
    "grey.png": encoded("PNG", "L"), "one_bit.tif": encoded("TIFF", "1"),
    "progressive.jpg": encoded("JPEG", progressive=True), "a dot.and blanks.PNG": encoded("PNG"),
    "wide.bmp": encoded("BMP", size=(300, 2)), "one_pixel.png": encoded("PNG", size=(1, 1))}
BAD_FILES = {
    "truncated.jpg": encoded("JPEG")[:600], "truncated.png": encoded("PNG")[:900],
    "truncated.gif": encoded("GIF")[:300], "truncated.webp": encoded("WEBP")[:200],
    "truncated.tif": encoded("TIFF")[:900], "truncated.bmp": encoded("BMP")[:900],
    "empty.jpg": b"", "text.jpg": b"this is text\n" * 9, "short.jpg": b"\xff\xd8\xff",
    "noise.jpg": random.Random(0).randbytes(5000),
    "noise_after_head.jpg": encoded("JPEG")[:20] + bytes(range(256)) * 9,
    "bomb.png": png_that_claims(60000, 60000), "small_bomb.png": png_that_claims(12000, 12000),
    "no_pixels.png": png_that_claims(0, 0),
    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}


def test_check_names_bad_files_by_kind(tmp_path, capsys):
    root, listed, n = tmp_path / "set", tmp_path / "bad.txt", len(BAD_FILES) + 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    root.mkdir()
    for name, content in (GOOD_FILES | BAD_FILES).items():
        (root / name).write_bytes(content)
    (root / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (root / os.fsdecode(b"bad\xff.png")).write_bytes(b"")
    code, out, err = checked(capsys, root, "--out", listed, "--workers", 2)
    kinds = dict(line.split(b"\t")[:2] for line in listed.read_bytes().splitlines())
    assert code == 1 and {os.fsdecode(name) for name in kinds} == {
        *BAD_FILES, "dangling.png", os.fsdecode(b"bad\xff.png")}
    assert kinds[b"empty.jpg"] == kinds[b"bad\xff.png"] == b"empty"
    assert kinds[b"dangling.png"] == b"vanished" and kinds[b"text.jpg"] == b"no image"
    assert kinds[b"bomb.png"] == kinds[b"small_bomb.png"] == b"decompression bomb"
    assert kinds[b"truncated.jpg"] == kinds[b"truncated.png"] == b"truncated"
    assert f"{n} of {n + len(GOOD_FILES)} images are bad" in err and "2 decompression bomb" in err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    for words in ("1 animated", "1 CMYK", "1 another format than its name says"):
        assert words in out, out
    strict = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    with contextlib.redirect_stdout(strict):
        assert data.program(["check", str(root), "--workers", "1"]) == 1
    strict.flush()
    assert b"bad\\udcff.png: empty" in strict.buffer.getvalue()


def test_check_refuses_nonsense(tmp_path, capsys):
    root = folder_of(tmp_path / "p", ["1.png"])
    (tmp_path / "empty").mkdir()
    for arguments in ([tmp_path / "nowhere"], [tmp_path / "empty"], [root, "--workers", "0"],
                      [root, "--out", tmp_path], [], [root, "--range", "3,1"]):
        assert checked(capsys, *arguments)[0] == 2
    assert checked(capsys, root)[0] == 0
    assert data.program(["juggle"]) == data.program([]) == 2


# ----------------------------------------------------------------------------- decoding, the crops
def smooth(h, w, seed=0):
    """An image (h, w, 3) with the edges and the noise of a photograph."""
    x = F.interpolate(images_like(1, 16, 16, seed).float(), size=(h, w), mode="bicubic")
    x = x + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(x[0].clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8))


def as_jpeg(image, orientation=None, **options):
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    content = io.BytesIO()
    image.save(content, "JPEG", **options)
    return bytearray(content.getvalue())


RGB = smooth(101, 150)
JPEGS = {"plain": as_jpeg(RGB), "grey": as_jpeg(RGB.convert("L")), "tail": as_jpeg(RGB) + bytes(99),
         "progressive": as_jpeg(RGB, progressive=True), "4:4:4": as_jpeg(RGB, subsampling=0),
         "restarts": as_jpeg(RGB, restart_marker_rows=1), "CMYK": as_jpeg(RGB.convert("CMYK")),
         "one pixel": as_jpeg(RGB.resize((1, 1))), "turned": as_jpeg(RGB, 6),
         "upside down": as_jpeg(RGB, 3)}


@pytest.mark.parametrize("kind", JPEGS)
def test_pixels_are_pillows(kind, monkeypatch):
    """Pillow's own way, at every reduction, to the bit, with and without torchvision."""
    size = data.Encoded(JPEGS[kind]).size
    for factor in (1, 2, 4, 8) if min(size) >= 8 else (1,):
        theirs = Image.open(io.BytesIO(JPEGS[kind]))
        assert size == (theirs.size if kind == "turned" else theirs.size[::-1])
        theirs.draft(None, [side // factor for side in theirs.size])
        theirs = ImageOps.exif_transpose(theirs)
        for in_chans in (1, 3, 4):
            ours = data.Encoded(JPEGS[kind]).pixels(in_chans, factor)
            expected = np.array(data.to_channels(theirs, in_chans)).reshape(ours.shape)
            assert np.array_equal(ours.numpy(), expected), factor
            with monkeypatch.context() as patch:
                patch.setattr(data, "jpeg_decoder", lambda: None)
                assert torch.equal(data.Encoded(JPEGS[kind]).pixels(in_chans, factor), ours)
    for end in (len(JPEGS[kind]) // 2, 200, 20, 0) if len(JPEGS[kind]) > 2000 else ():
        with pytest.raises(data.BadFile):
            data.Encoded(JPEGS[kind][:end]).pixels(3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEGs and others of many sizes; some on their side, one that cannot be read."""
    root = tmp_path_factory.mktemp("images")
    for i in range(20):
        exif = Image.Exif()
        exif[0x0112] = 6
        more = dict(exif=exif) if i % 5 == 3 or i == 9 else {}
        image = smooth(150 + 37 * i, 900 - 31 * i, i)
        image.save(root / f"{i:02}.{'png' if i % 5 == 4 else 'jpg'}", **more)
    corrupt(root / "07.jpg")
    return str(root)


@pytest.mark.parametrize("views, fast", [(augment.MOCO_VIEWS, True), ([augment.TEST_VIEW], False)],
                         ids=["moco", "evaluation"])
def test_a_reader_crops_what_pillow_would(photographs, views, fast):
    """Each crop against pillow's at the reduction that the crops allow."""
    dataset, size = data.load(photographs), (40, 48)
    loader = data.Loader(dataset, views, size, 20, seed=4)
    shown, bad, crops = data.Reader(loader)[3, list(range(20))]
    assert list(bad) == [7] and [i for i in range(20) if shown[i] != i] == [7]
    reduced = set()
    for row, i in enumerate(shown):
        def boxes(image, i=i):
            sizes = torch.tensor([[image.height, image.width]])
            return [loader.boxes(torch.tensor([i]), sizes, k, 3)[0].tolist()
                    for k in range(len(views))]

        path = os.path.join(photographs, dataset.file(i))
        whole = boxes(ImageOps.exif_transpose(Image.open(path)))
        factor = max(f for f in (1, 2, 4, 8) if f == 1 or path.endswith("jpg") and all(
            box[2] >= f * size[0] and box[3] >= f * size[1] for box in whole))
        reduced.add(factor)
        image = Image.open(path)
        image.draft(None, [side // factor for side in image.size])
        image = ImageOps.exif_transpose(image)
        for k, (view, (top, left, height, width)) in enumerate(zip(views, boxes(image))):
            corners = (left, top, left + width, top + height)
            mode = data.FILTERS[view["mode"]]
            resized = image.crop(corners).resize(size[::-1], mode) if fast else image.resize(
                size[::-1], mode, box=corners)
            off = np.abs(np.array(resized).astype(int) - crops[k][row].permute(1, 2, 0).numpy())
            assert off.mean() < 2 if fast else off.max() == 0, (i, k, factor)
            assert off.max() <= 1 or factor > 1
    assert len(reduced) > 1


# --------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_replaced_in_training_and_marked(tmp_path, capsys, in_memory):
    """The same stand-ins from files and from memory; in evaluations none."""
    root = folder_of(tmp_path, [f"{i:03}.png" for i in range(200)], (16, 16 if in_memory else 136))
    for i in (50, 150):
        corrupt(tmp_path / f"{i:03}.png")
    dataset = data.load(root)
    assert (dataset.images is not None) == in_memory and len(dataset) == 200
    for epoch in range(2):
        loader = data.Loader(dataset, [augment.MAE_VIEW | dict(flip=0)], (16, 16), 40, seed=1)
        batches = list(loader.epoch(epoch))
        ids, shown, readable = (torch.cat([getattr(b, name) for b in batches])
                                for name in ("ids", "shown", "readable"))
        assert sorted(ids[~readable].tolist()) == [50, 150] and len(batches) == 5
        assert torch.equal(shown[readable], ids[readable])
        for i in (50, 150):
            stand_in = shown[ids == i].item()
            assert stand_in == next(j for j in data.stand_ins(dataset, i) if j not in (50, 150))
        assert all(b.view(0).isfinite().all() for b in batches)
    assert sorted(dataset.bad) == [50, 150]
    assert capsys.readouterr().out.count("warning: skipped") == 2
    loader = data.Loader(dataset, [augment.TEST_VIEW], (16, 16), 150, shuffle=False)
    for batch in loader.epoch(0):
        expected = [i not in (50, 150) for i in batch.ids.tolist()]
        assert torch.equal(batch.shown, batch.ids) and batch.readable.tolist() == expected
    part = dataset.select([3, 150])
    assert list(part.bad) == [1] and part.file(1) == "150.png"
    for i in range(0, 200, 10):
        corrupt(tmp_path / f"{i:03}.png")
    with pytest.raises(data.DataError, match=r"of 200 images cannot be read, more than") as error:
        for _ in data.Loader(data.load(root), [augment.MAE_VIEW], (16, 16), 18).epoch(0):
            pass
    assert error.value.exit_code == 1


@pytest.mark.parametrize("n, side, workers", [(3, 136, 0), (30, 136, 2), (3, 16, 0)])
def test_a_set_without_a_readable_image_stops_the_run(tmp_path, n, side, workers):
    root = folder_of(tmp_path, [f"{i}.png" for i in range(n)], (side, side))
    for i in range(n):
        corrupt(tmp_path / f"{i}.png")
    with pytest.raises(data.DataError, match="20 images in a row cannot be read|images cannot be"):
        dataset = data.load(root, max_bad=1)
        next(data.Loader(dataset, [augment.MAE_VIEW], (16, 16), n, workers=workers,
                         max_bad=1).epoch(0))


def test_small_images_of_one_size_are_held_in_memory(tmp_path, monkeypatch):
    small = data.load(folder_of(tmp_path / "small", ["1.png", "2.png"], (16, 24)))
    assert small.images.shape == (2, 3, 16, 24) and small.images.dtype == torch.uint8
    assert torch.equal(small.images[1].permute(1, 2, 0), small.read(1))
    assert data.load(folder_of(tmp_path / "large", ["1.png"], (16, 136))).images is None
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "small" / "1.png").save(tmp_path / "small" / "3.png", exif=exif)
    turned = data.load(str(tmp_path / "small"))
    assert turned.images is None and turned.read(2).shape == (24, 16, 3)


def test_reading_files_gives_the_views_of_memory(tmp_path, monkeypatch):
    root = folder_of(tmp_path, [f"{i}.png" for i in range(8)], (40, 48))
    views = [*augment.MOCO_VIEWS, augment.MAE_VIEW, augment.TEST_VIEW]
    held = data.load(root)
    monkeypatch.setattr(data, "MEMORY_SIDE", 8)
    a, b = (next(data.Loader(dataset, views, (16, 16), 8, seed=3).epoch(2))
            for dataset in (held, data.load(root)))
    assert a.crops is None and b.crops is not None and torch.equal(a.ids, b.ids)
    for k in range(4):
        assert (a.view(k) - b.view(k)).abs().mean() < 0.03, k   # pillow rounds to 8 bits


def loaded(dataset, epochs=(1,), start=0, rank=0, processes=1, batch=12, workers=0, **options):
    """What a process gets of epochs: ids, both views and mask noise of each batch."""
    loader = data.Loader(dataset, augment.MOCO_VIEWS, (16, 16), batch // processes, seed=7,
                         workers=workers, rank=rank, processes=processes, **options)
    return [(b.ids, b.view(0), b.view(1), b.noise(4))
            for epoch in epochs for b in loader.epoch(epoch, start)]


def equal(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(x, y) for a, b in zip(batches, others) for x, y in zip(a, b))


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_do_not_depend_on_processes_workers_or_restarts(tmp_path, in_memory, monkeypatch):
    names = [f"{i:02}.png" for i in range(50)]
    dataset = data.load(folder_of(tmp_path, names, (24, 24 if in_memory else 136)))
    whole = loaded(dataset, (1, 2))
    assert len(whole) == 8                              # the last 2 of 50 fill no batch
    seen = torch.cat([batch[0] for batch in whole[:4]]).tolist()
    assert len(set(seen)) == 48 and seen != torch.cat([batch[0] for batch in whole[4:]]).tolist()
    workers = 0 if in_memory else 2
    ranks = [loaded(dataset, (1, 2), rank=rank, processes=2, workers=workers) for rank in (0, 1)]
    assert equal(whole, [tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)])
    assert equal(whole[2:4], loaded(dataset, start=2, workers=workers))
    monkeypatch.setattr(data, "CHUNK", 5 * 16 * 16)     # a view of a slice is the slice of a view
    monkeypatch.setattr(data.Reader, "TOGETHER", 5)
    assert equal(whole, loaded(dataset, (1, 2)))


def test_reading_goes_on_across_epochs_and_starts_over_elsewhere(tmp_path, monkeypatch):
    dataset = data.load(folder_of(tmp_path, [f"{i:02}.png" for i in range(20)], (24, 136)))
    alone, loader = (data.Loader(dataset, [augment.MAE_VIEW], (16, 16), 8, workers=workers,
                                 max_bad=workers) for workers in (0, 2))
    begun, stream = [], data.Loader.stream
    monkeypatch.setattr(data.Loader, "stream",
                        lambda self, *a: begun.append(self.max_bad) or stream(self, *a))
    for epoch, start, times in ((0, 0, 1), (1, 0, 1), (2, 0, 1), (1, 1, 2), (2, 0, 2), (2, 0, 3)):
        views = [b.view(0) for b in loader.epoch(epoch, start)]
        assert len(views) == 2 - start and begun.count(2) == times
        assert all(map(torch.equal, views, (b.view(0) for b in alone.epoch(epoch, start))))
    first = next(loader.epoch(0)).view(0)               # left in the middle, begun again
    assert torch.equal(next(loader.epoch(0)).view(0), first)


def test_views_are_drawn_in_float32_under_autocast_and_independently():
    n = 2000
    dataset, crop = data.Dataset(images=images_like(n, 8, 8)), dict(scale=(0.2, 1), mode="bilinear")
    for view, expected in ((crop, 0.0), (dict(scale=None, mode="bilinear", flip=0.5), 0.5)):
        loader = data.Loader(dataset, [view, view], (8, 8), n, seed=1)
        first, later = next(loader.epoch(0)), next(loader.epoch(1))
        with torch.autocast("cpu", torch.bfloat16):
            x = first.view(0)
        assert x.dtype == torch.float32 and torch.equal(x, first.view(0))
        for other, batch in ((first.view(1), first), (later.view(0), later)):
            same = x[first.ids.argsort()] == other[batch.ids.argsort()]
            assert abs(same.flatten(1).all(1).float().mean() - expected) < 0.05


def test_functions_of_the_user_get_the_crops(photographs):
    dataset, views = data.load(photographs), [augment.MAE_VIEW]
    plain, noted = (data.Reader(data.Loader(dataset, views, (32, 32), 20))[1, [0, 4]]
                    for views in (views, [augment.MAE_VIEW | dict(pixels=lambda x: 255 - x)]))
    assert torch.equal(noted[2][0], 255 - plain[2][0]) and plain[2][0].dtype == torch.uint8


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    dataset = data.load(folder_of(tmp_path, [f"{i:02}.png" for i in range(20)], (24, 136)))

    def die(pixels):
        os.kill(os.getpid(), 9)

    def no_room(tensor):
        raise RuntimeError("unable to allocate shared memory")

    for view, message in ((dict(pixels=die), "killed by|exited"), ({}, "no shared memory")):
        if not view:
            monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
        loader = data.Loader(dataset, [augment.MAE_VIEW | view], (16, 16), 8, workers=1)
        with pytest.raises(data.DataError, match=message) as error:
            next(loader.epoch(0))
        assert error.value.exit_code == 1
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 100)
    with pytest.raises(data.DataError, match="set TMPDIR"):
        data.Loader(dataset, [augment.MAE_VIEW], (16, 16), 8, workers=1)


def test_statistics_and_the_embedded_set():
    few, many = data.embedded(n=10), data.embedded(n=64)
    assert torch.equal(few.images, many.images[:10]) and torch.equal(few.labels, many.labels[:10])
    assert data.embedded(n=10).digest == few.digest != many.digest
    assert few.images.shape == (10, 3, 32, 32) and many.images.float().std() > 30
    assert data.embedded(n=10, in_chans=1).images.shape == (10, 1, 32, 32)
    assert data.embedded(n=32).labels.bincount().tolist() == [2] * 16
    with pytest.raises(data.DataError, match="--in-chans 4"):
        data.embedded(n=10, in_chans=4)
    mean, std = data.measure_stats(many)
    x = many.images.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(x.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())
    batches = list(data.Loader(many, [augment.TEST_VIEW], (32, 32), 25, shuffle=False).epoch(0))
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(64))
    view = torch.cat([b.view(0) for b in batches])
    for c in range(3):
        expected = (x[:, c] - data.IMAGENET_STATS[0][c]) / data.IMAGENET_STATS[1][c]
        torch.testing.assert_close(view[:, c].double(), expected, rtol=0, atol=1e-5)
