"""ImageNet in each layout in which it is published or stored, with unusual and damaged files."""

import tarfile

import pytest
from file_contents import read_tree
from oddities import oddities
from published import VAL_IDS, WNIDS, WORDS, csv_of, devkit, link, tar_of, write_tree
from shard_contents import class_of, quarantine, samples

from data_prep.shard_set import read_manifest
from data_prep.sources.imagenet import DEVKIT


@pytest.fixture
def images(photographs) -> dict[str, dict[str, bytes]]:
    """Map wnid -> file name -> content."""
    return {
        wnid: {f"{wnid}_{number}.JPEG": photographs[10 * i + number] for number in range(4)}
        for i, wnid in enumerate(WNIDS)
    }


def _by_key(images) -> dict[str, bytes]:
    return {name.removesuffix(".JPEG"): data for files in images.values() for name, data in files.items()}


def _tree(images) -> dict[str, bytes]:
    return {f"{wnid}/{name}": data for wnid, files in images.items() for name, data in files.items()}


def _train_archive(images) -> bytes:
    # In reverse order, because the archive's order must not matter.
    return tar_of({f"{wnid}.tar": tar_of(images[wnid]) for wnid in sorted(images, reverse=True)})


def test_train_archive(images, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", {"ILSVRC2012_img_train.tar": _train_archive(images)})
    (source / DEVKIT).write_bytes(devkit([1]))
    done = data_prep("imagenet", source, tmp_path / "out", "--shard-size", 5)
    assert done.returncode == 0 and "imagenet (archives): 12 inputs, 3 classes" in done.stdout, done.stderr
    assert "as published has 1,281,167 images" in done.stdout
    assert samples(tmp_path / "out") == _by_key(images)
    assert all(key.startswith(wnid) for key, wnid in class_of(tmp_path / "out").items())
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.classes, manifest.class_names) == (WNIDS, WORDS)
    assert manifest.shards[0].name == "imagenet-train-000000"
    assert len(list(source.iterdir())) == 2, "nothing is written to SRC"


def test_validation_labels_are_wnids_not_devkit_ids(photographs, tmp_path, data_prep):
    truth = [1, 2, 3, 3, 2, 1]
    files = {f"ILSVRC2012_val_{i:08d}.JPEG": photographs[i] for i in range(1, 7)}
    source = write_tree(tmp_path / "src", {"ILSVRC2012_img_val.tar": tar_of(files), DEVKIT: devkit(truth)})
    assert data_prep("imagenet", source, tmp_path / "out", "--split", "val").returncode == 0
    wnid_of_id = dict(zip(VAL_IDS, WNIDS, strict=True))
    expected = {f"ILSVRC2012_val_{i:08d}": wnid_of_id[number] for i, number in enumerate(truth, 1)}
    assert class_of(tmp_path / "out") == expected
    assert read_manifest(tmp_path / "out").class_names == WORDS
    (source / DEVKIT).unlink()
    done = data_prep("imagenet", source, tmp_path / "other", "--split", "val")
    assert done.returncode == 2 and DEVKIT in done.stderr


def test_class_folders(images, tmp_path, data_prep):
    tree = _tree(images)
    write_tree(tmp_path / "src" / "val", tree)
    write_tree(tmp_path / "bare", tree)
    for source in (tmp_path / "src", tmp_path / "bare"):
        out = tmp_path / f"out_{source.name}"
        done = data_prep("imagenet", source, out, "--split", "val")
        assert done.returncode == 0 and "imagenet (folders): 12 inputs" in done.stdout, done.stderr
        assert samples(out) == _by_key(images)
        assert read_manifest(out).classes == WNIDS


def test_kaggle_tree(images, photographs, tmp_path, data_prep):
    top = "ILSVRC/Data/CLS-LOC"
    solution = [(f"ILSVRC2012_val_{i:08d}", f"{WNIDS[i % 3]} 10 20 30 40 ") for i in range(1, 7)]
    files = {f"{top}/train/{name}": data for name, data in _tree(images).items()}
    files |= {f"{top}/val/{name}.JPEG": photographs[i] for i, (name, _) in enumerate(solution)}
    files["LOC_val_solution.csv"] = csv_of("ImageId,PredictionString", solution)
    files["LOC_synset_mapping.txt"] = "".join(f"{w} {words}\n" for w, words in zip(WNIDS, WORDS, strict=True))
    source = write_tree(tmp_path / "src", files)
    for split in ("train", "val"):
        done = data_prep("imagenet", source, tmp_path / split, "--split", split)
        assert done.returncode == 0 and "imagenet (kaggle)" in done.stdout, done.stderr
        assert read_manifest(tmp_path / split).class_names == WORDS
    assert samples(tmp_path / "train") == _by_key(images)
    assert class_of(tmp_path / "val") == {name: prediction[:9] for name, prediction in solution}


def test_missing_forced_layout_is_a_user_error(images, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", {"ILSVRC2012_img_train.tar": _train_archive(images)})
    done = data_prep("imagenet", source, tmp_path / "out", "--layout", "kaggle")
    assert done.returncode == 2 and "layout kaggle" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["tars", "tar of tars", "tar.gz of tars", "folders"])
def test_imagenet21k(images, tmp_path, data_prep, form):
    tars = {f"{wnid}.tar": tar_of(files) for wnid, files in images.items()}
    source = tmp_path / "src"
    if form == "tars":
        words = "".join(f"{wnid}\t{text}\n" for wnid, text in zip(WNIDS, WORDS, strict=True))
        write_tree(source, {**tars, "words.txt": words})
    elif form == "folders":
        write_tree(source, _tree(images))
    else:
        nested = {f"winter21/{name}": data for name, data in tars.items()}
        source.write_bytes(tar_of(nested, mode="w:gz" if "gz" in form else "w"))
    done = data_prep("imagenet21k", source, tmp_path / "out", "--shard-size", 5, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path / "out") == _by_key(images)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == WNIDS and manifest.class_names == (WORDS if form == "tars" else ())
    assert all(key.startswith(wnid) for key, wnid in class_of(tmp_path / "out").items())


def test_unusual_files_and_members_in_an_archive(photographs, tmp_path, data_prep):
    odd = oddities(photographs[7])
    wnid = WNIDS[0]
    files = {f"{wnid}_{name}.JPEG": data for name, (data, _) in odd.items()}
    files |= {f"/etc/{wnid}_absolute.JPEG": photographs[1], f"../{wnid}_climbing.JPEG": photographs[1]}
    device = tarfile.TarInfo(f"{wnid}_device.JPEG")
    device.type = tarfile.CHRTYPE
    hard = link(f"{wnid}_hard.JPEG", tarfile.LNKTYPE)
    inner = tar_of(files, link(f"{wnid}_soft.JPEG"), hard, device)
    twice = tar_of({f"{wnid}_sound.JPEG": photographs[2]})
    members = inner[: inner.rindex(bytes(1024)) // 512 * 512].rstrip(b"\0")
    inner = members + bytes(-len(members) % 512) + twice  # appends the same name again, like `tar -r`
    source = write_tree(tmp_path / "src", {"ILSVRC2012_img_train.tar": tar_of({f"{wnid}.tar": inner})})
    out = tmp_path / "out"
    done = data_prep("imagenet", source, out, "--shard-size", 6, "--workers", 2)
    assert done.returncode == 0, done.stderr
    reasons = {name.rpartition(f"{wnid}_")[2].removesuffix(".JPEG"): reason for name, reason in quarantine(out).items()}
    expected = {name: end[13:] for name, (_, end) in odd.items() if end.startswith("quarantined")}
    expected |= {"absolute": "unsafe_name", "climbing": "unsafe_name"}
    expected |= {"soft": "link", "hard": "link", "device": "special_file", "sound": "duplicate_key"}
    assert reasons == expected
    built = samples(out)
    assert {key.removeprefix(f"{wnid}_") for key in built} == {
        name for name, (_, end) in odd.items() if not end.startswith("quarantined")
    }
    for name, (data, end) in odd.items():
        if end == "same":
            assert built[f"{wnid}_{name}"] == data
    repairs = read_manifest(out).repairs
    assert {end[10:] for _, end in odd.values() if end.startswith("repaired")} <= set(repairs)
    assert data_prep("verify", out, "--deep").returncode == 0


def test_archive_set_is_byte_identical_for_any_workers(images, tmp_path, data_prep):
    source = write_tree(tmp_path / "src", {"ILSVRC2012_img_train.tar": _train_archive(images)})
    for workers in (1, 2, 4):
        data_prep("imagenet", source, tmp_path / f"by{workers}", "--shard-size", 2, "--workers", workers)
    assert read_tree(tmp_path / "by1") == read_tree(tmp_path / "by2") == read_tree(tmp_path / "by4")


@pytest.mark.parametrize("cut", [700, 4000, 1024])
def test_truncated_archive_is_a_user_error(images, tmp_path, data_prep, cut):
    archive = _train_archive(images).rstrip(b"\0")
    source = write_tree(tmp_path / "src", {"ILSVRC2012_img_train.tar": archive[: -cut // 512 * 512]})
    done = data_prep("imagenet", source, tmp_path / "out")
    assert done.returncode == 2 and "truncated" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
