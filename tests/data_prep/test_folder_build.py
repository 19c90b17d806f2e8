"""`python -m data_prep folder`: what is built, and which inputs and arguments are errors."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from file_contents import read_tree
from shard_contents import samples

from data_prep.shard_set import ShardSetError, check_shard_bytes, check_shard_files, read_manifest


def test_set_has_the_bytes_and_labels_of_the_folder(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    done = data_prep("folder", image_folder, out, "--shard-size", "8")
    assert (done.returncode, done.stdout.count("\n")) == (0, 2), done.stderr
    manifest = read_manifest(out)
    check_shard_files(out, manifest)
    for shard in manifest.shards:
        check_shard_bytes(out, shard)
    assert (manifest.num_samples, manifest.classes) == (30, ("ant", "bee", "cat"))
    assert [shard.samples for shard in manifest.shards] == [8, 8, 8, 6]
    source = {f"{p.parent.name}_{p.stem}": p for p in image_folder.rglob("*.jpg")}
    assert samples(out) == {key: path.read_bytes() for key, path in source.items()}
    labels = samples(out, "cls")
    assert labels == {key: b"%d" % manifest.classes.index(p.parent.name) for key, p in source.items()}
    assert data_prep("verify", out).returncode == 0
    assert "| samples | 30 |" in data_prep("info", out).stdout


def test_seed_determines_a_shuffle_over_all_shards(image_folder, tmp_path, data_prep):
    orders = []
    for seed in (0, 0, 1):
        out = tmp_path / f"shards{len(orders)}"
        data_prep("folder", image_folder, out, "--shard-size", "10", "--seed", seed)
        orders.append(list(samples(out)))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]
    assert all(len({key[:3] for key in orders[0][i : i + 10]}) > 1 for i in (0, 10, 20))


def test_dali_webdataset_reader_returns_the_source_bytes(image_folder, tmp_path, data_prep):
    from nvidia.dali import fn, pipeline_def

    out = tmp_path / "shards"
    data_prep("folder", image_folder, out, "--shard-size", "8")
    shards = read_manifest(out).shards

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read():
        image, label = fn.readers.webdataset(
            paths=[str(out / f"{shard.name}.tar") for shard in shards],
            index_paths=[str(out / f"{shard.name}.idx") for shard in shards],
            ext=["jpg", "cls"],
        )
        return image, label

    pipeline = read()
    pipeline.build()
    files = []
    for _ in range(30):
        image, label = pipeline.run()
        files.append((image.at(0).tobytes(), label.at(0).tobytes()))
    assert files == list(zip(samples(out).values(), samples(out, "cls").values(), strict=True))


def test_webdataset_returns_the_source_bytes(image_folder, tmp_path, data_prep):
    import webdataset

    out = tmp_path / "shards"
    data_prep("folder", image_folder, out, "--shard-size", "8")
    paths = [str(out / f"{shard.name}.tar") for shard in read_manifest(out).shards]
    files = {s["__key__"]: (s["jpg"], s["cls"]) for s in webdataset.WebDataset(paths, shardshuffle=False)}
    labels = samples(out, "cls")
    assert files == {key: (data, labels[key]) for key, data in samples(out).items()}


def test_set_is_byte_identical_for_any_number_of_workers(image_folder, tmp_path, data_prep):
    (image_folder / "ant" / "notes.txt").write_text("no image")
    sets = []
    for workers in (1, 2, 4):
        out = tmp_path / f"by{workers}"
        assert data_prep("folder", image_folder, out, "--shard-size", 7, "--workers", workers).returncode == 0
        sets.append(read_tree(out))
    assert sets[0] == sets[1] == sets[2]
    assert set(sets[0]) >= {"manifest.json", "quarantine.jsonl", "card.md", "contact_sheet.png"}


def test_building_a_complete_set_again_changes_nothing(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", image_folder, out)
    before = read_tree(out)
    again = data_prep("folder", image_folder, out)
    assert again.returncode == 0 and "already complete" in again.stdout
    assert read_tree(out) == before


def test_content_decides_not_the_file_name(image_folder, tmp_path, data_prep, photographs):
    (image_folder / "bee" / "photograph.txt").write_bytes(photographs[40])
    (image_folder / "bee" / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (image_folder / "bee" / "empty.jpg").write_bytes(b"")
    (image_folder / "bee" / "cut.jpg").write_bytes(photographs[41][:-700])
    os.symlink("/etc/hostname", image_folder / "bee" / "link.jpg")
    out = tmp_path / "shards"
    assert data_prep("folder", image_folder, out).returncode == 0
    assert samples(out)["bee_photograph"] == photographs[40]
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == {
        "bee/page.jpg": "not_an_image",
        "bee/empty.jpg": "empty",
        "bee/cut.jpg": "truncated",
        "bee/link.jpg": "link",
    }
    assert read_manifest(out).inputs == 35


@pytest.mark.parametrize("labels, expected", [("none", ()), ("auto", ()), ("folders", ("ant", "bee", "cat"))])
def test_image_beside_class_folders_disables_auto_labels(
    image_folder, tmp_path, data_prep, photographs, labels, expected
):
    (image_folder / "loose.jpg").write_bytes(photographs[40])
    data_prep("folder", image_folder, tmp_path / "shards", "--labels", labels)
    manifest = read_manifest(tmp_path / "shards")
    assert manifest.classes == expected
    assert manifest.num_samples == (30 if expected else 31)


def test_names_with_equal_keys_are_quarantined(tmp_path, data_prep, photographs):
    source = tmp_path / "images"
    (source / "a").mkdir(parents=True)
    for name, data in zip(("a/b.jpg", "a_b.png", "a b.jpg", "ä b.jpg"), photographs, strict=False):
        (source / name).write_bytes(data)
    out = tmp_path / "shards"
    assert data_prep("folder", source, out).returncode == 0
    assert len(samples(out)) == 3, "a hash keeps names apart whose characters are replaced"
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "duplicate_key"
    assert json.loads(line)["source"] == "a_b.png" and "a/b.jpg" in json.loads(line)["detail"]


def test_dry_run_prints_the_plan_and_writes_nothing(image_folder, tmp_path, data_prep):
    done = data_prep("folder", image_folder, tmp_path / "shards", "--dry-run", "--shard-size", 8)
    assert done.returncode == 0 and "30 inputs, 3 classes" in done.stdout and "4 shards" in done.stdout
    assert not (tmp_path / "shards").exists()


def test_wrong_paths_are_user_errors_and_leave_nothing(tmp_path, data_prep, image_folder):
    empty, texts, occupied = tmp_path / "empty", tmp_path / "texts", tmp_path / "occupied"
    for folder in (empty, texts, occupied):
        folder.mkdir()
    (texts / "a.txt").write_text("no image")
    (occupied / "thesis.tex").write_text("precious")
    out = tmp_path / "shards"
    for source, target, named in [
        (tmp_path / "missing", out, f"SRC {tmp_path / 'missing'}"),
        (empty, out, f"SRC {empty}"),
        (texts, out, "a.txt"),
        (image_folder / "ant" / "000.jpg", out, f"SRC {image_folder / 'ant' / '000.jpg'}"),
        (image_folder, occupied, f"OUT {occupied}"),
        (image_folder, image_folder / "shards", f"OUT {image_folder / 'shards'}"),
        (image_folder, texts / "a.txt", f"OUT {texts / 'a.txt'}"),
    ]:
        done = data_prep("folder", source, target)
        assert (done.returncode, done.stdout.count("shards:")) == (2, 0), done
        line = done.stderr.splitlines()[-1]
        assert line.startswith("data_prep: error: ") and named in line and "Traceback" not in done.stderr
    assert not out.exists()
    assert read_tree(occupied) == {"thesis.tex": b"precious"} and read_tree(texts) == {"a.txt": b"no image"}


@pytest.mark.parametrize(
    "arguments", [(), ("folder",), ("folders", "a", "b"), ("folder", "a", "b", "--workers", "0"), ("info", "a", "b")]
)
def test_wrong_arguments_are_one_line_and_exit_code_2(data_prep, arguments):
    done = data_prep(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("data_prep: error: ")
    assert done.stderr.count("\n") == 1 and "--help" in done.stderr and not done.stdout


def test_set_that_lost_a_shard_is_not_complete(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", image_folder, out, "--shard-size", 8)
    (out / "folder-train-000002.tar").unlink()
    done = data_prep("folder", image_folder, out, "--shard-size", 8)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "folder-train-000002.tar" in done.stderr and f"remove {out}" in done.stderr


def test_folder_of_images_is_not_a_set_but_can_become_one(image_folder, data_prep):
    for command in ("verify", "info"):
        done = data_prep(command, image_folder)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"`python -m data_prep folder {image_folder} OUT`" in done.stderr
        done = data_prep(command, image_folder / "ant" / "000.jpg" / "x")
        assert done.returncode == 2 and "does not exist" in done.stderr


def test_another_set_in_out_is_left_alone(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    data_prep("folder", image_folder, out)
    before = read_tree(out)
    other = data_prep("folder", image_folder, out, "--seed", 1)
    assert other.returncode == 2 and f"OUT {out}" in other.stderr and "seed 0, not 1" in other.stderr
    (image_folder / "cat" / "new.jpg").write_bytes((image_folder / "ant" / "000.jpg").read_bytes())
    other = data_prep("folder", image_folder, out)
    assert other.returncode == 2 and f"OUT {out}" in other.stderr and "other files" in other.stderr
    assert read_tree(out) == before


def test_missing_manifest_error_names_the_command_to_run(tmp_path, data_prep):
    with pytest.raises(ShardSetError, match=r"not a shard set.*python -m data_prep folder"):
        read_manifest(tmp_path)
    (tmp_path / ".build").mkdir()
    with pytest.raises(ShardSetError, match=r"unfinished.*python -m data_prep"):
        read_manifest(tmp_path)
    for command in ("verify", "info"):
        done = data_prep(command, tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_build_state_with_the_former_field_name_continues(image_folder, tmp_path, data_prep):
    out = tmp_path / "shards"
    (image_folder / "ant" / ".hidden.jpg").touch()
    data_prep("folder", image_folder, out, "--task-index", 0, "--num-tasks", 1)
    path = out / ".build" / "build.json"
    path.write_text(path.read_text().replace('"rejected"', '"refused"'))
    assert data_prep("finalize", out).returncode == 0
    assert read_manifest(out).quarantined == 1


def test_help_has_an_example_and_imports_nothing_heavy(data_prep):
    names = ("folder", "imagenet", "imagenet21k", "openimages", "coco", "finalize", "verify", "info")
    for command in ([], *([name] for name in names)):
        done = data_prep(*command, "--help")
        assert done.returncode == 0 and "python -m data_prep" in done.stdout.split("options:")[0]
    code = "import sys, data_prep.__main__, data_prep.shard_set; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"PIL", "simplejpeg", "torch", "nvidia.dali", "tqdm"} & set(loaded.split())


def test_set_that_is_moved_stays_complete(image_folder, tmp_path, data_prep):
    data_prep("folder", image_folder, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert data_prep("verify", tmp_path / "there").returncode == 0
