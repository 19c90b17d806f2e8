"""`python -m data_prep adopt`: resuming, array tasks, changed tars, and what is an error."""

import json
import random
import signal
import subprocess
import time
from subprocess import DEVNULL, PIPE

import pytest
from file_contents import encode_image, read_tree
from forkserver import ForkedProcess, run
from PIL import Image
from published import tar_of, write_tree
from shard_contents import quarantine

from data_prep import labels
from data_prep.shard_set import read_manifest


def make_tars(folder, photographs, tars=4, images=6, extra: dict[str, bytes] | None = None):
    folder.mkdir(exist_ok=True)
    for number in range(tars):
        files = {}
        for i in range(images):
            key = f"{number:02d}{i:03d}"
            files |= {f"{key}.jpg": photographs[(number * images + i) % 60], f"{key}.cls": b"%d" % (i % 3)}
        (folder / f"{number:02d}.tar").write_bytes(tar_of(files | (extra or {})))
    return folder


@pytest.fixture
def tars(tmp_path, photographs):
    """Four tars of six photographs in three classes, each with an unusable sample."""
    return make_tars(tmp_path / "tars", photographs, extra={"bad.jpg": b"no image", "bad.cls": b"0"})


def error_line(done) -> str:
    """Return the only line on stderr that is no log message."""
    (line,) = (line for line in done.stderr.splitlines() if " INFO]" not in line)
    return line


def test_adopt_killed_at_random_times_is_byte_identical(tmp_path, photographs):
    extra = {"bad.jpg": b"no image", "bad.cls": b"0"}
    undisturbed = make_tars(tmp_path / "undisturbed", photographs, tars=6, images=40, extra=extra)
    interrupted = make_tars(tmp_path / "interrupted", photographs, tars=6, images=40, extra=extra)
    tars = {path.name: path.read_bytes() for path in interrupted.glob("*.tar")}
    run(["-c", "pass"])  # start the fork server before measuring
    start = time.monotonic()
    assert run(["-m", "data_prep", "adopt", undisturbed, "--workers", "2"]).returncode == 0
    duration = time.monotonic() - start
    rng, kills = random.Random(0), 0
    while kills < 10:
        process = ForkedProcess(
            ["-m", "data_prep", "adopt", interrupted, "--workers", "2"], stdout=DEVNULL, stderr=PIPE
        )
        try:
            process.wait(rng.uniform(0.05, 0.95) * duration)
            assert process.returncode == 0, process.communicate()
            duration *= 0.8  # the machine has become faster
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if (interrupted / "manifest.json").exists():
            (interrupted / "manifest.json").unlink()  # begin again
            for name in ("quarantine.jsonl", "card.md", "card.json", "contact_sheet.png"):
                (interrupted / name).unlink(missing_ok=True)
    assert run(["-m", "data_prep", "adopt", interrupted]).returncode == 0
    assert read_tree(interrupted) == read_tree(undisturbed)
    assert {path.name: path.read_bytes() for path in interrupted.glob("*.tar")} == tars


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1, 0)])
def test_tasks_in_any_order_adopt_the_same_set(tmp_path, photographs, data_prep, order):
    alone, shared = (make_tars(tmp_path / name, photographs) for name in ("alone", "shared"))
    for folder in (alone, shared):
        (folder / "03.tar").rename(folder / "adopt.tar")  # no name of a tar may be that of the state
    assert data_prep("adopt", alone).returncode == 0
    for index in order:
        assert data_prep("adopt", shared, "--task-index", index, "--num-tasks", 3).returncode == 0
    assert not (shared / "manifest.json").exists()
    assert data_prep("finalize", shared).returncode == 0
    assert read_tree(shared) == read_tree(alone)
    assert "already complete" in data_prep("finalize", shared).stdout


def test_finalize_names_a_tar_that_is_not_indexed(tars, data_prep):
    data_prep("adopt", tars, "--task-index", 1, "--num-tasks", 2)
    done = data_prep("finalize", tars)
    assert done.returncode == 2 and "00.tar" in done.stderr and done.stderr.count("\n") == 1


def test_adopting_again_changes_nothing(tars, data_prep):
    data_prep("adopt", tars)
    before = read_tree(tars)
    assert "already complete" in data_prep("adopt", tars).stdout
    assert read_tree(tars) == before


def test_changed_tars_and_options_are_adopted_again(tars, photographs, data_prep):
    data_prep("adopt", tars)
    (tars / "04.tar").write_bytes(tar_of({"new.jpg": photographs[40], "new.cls": b"2"}))
    assert data_prep("adopt", tars).returncode == 0
    assert read_manifest(tars).num_samples == 25
    (tars / "04.tar").unlink()
    assert data_prep("adopt", tars, "--labels", "none").returncode == 0
    assert read_manifest(tars).classes == () and data_prep("verify", tars).returncode == 0


def test_a_tar_changed_in_place_is_adopted_again(tars, data_prep):
    data_prep("adopt", tars)
    time.sleep(0.01)  # another modification time
    time.sleep(0.02)  # another modification time
    with open(tars / "02.tar", "r+b") as file:
        file.seek(600)
        file.write(bytes(100))  # damages the first image
    assert data_prep("verify", tars).returncode == 1
    data_prep("adopt", tars)
    assert quarantine(tars)["02000.jpg"] == "damaged" and data_prep("verify", tars).returncode == 0


@pytest.mark.parametrize("arguments", [("--label-key", "species"), ("--labels", "folders")])
def test_options_that_find_no_label_leave_the_set_as_it_is(tars, data_prep, arguments):
    data_prep("adopt", tars)
    before = read_tree(tars)
    done = data_prep("adopt", tars, *arguments)
    assert done.returncode == 2 and "00.tar: no sample has a label" in error_line(done)
    assert read_tree(tars) == before


def test_a_failed_adoption_does_not_block_the_next(tmp_path, photographs, data_prep):
    """A set whose tars have changed is adopted again even if an adoption in between found no usable sample."""
    folder = write_tree(tmp_path / "tars", {"0.tar": tar_of({"a.jpg": photographs[0]})})
    data_prep("adopt", folder)
    for files, code in (({"a.jpg": b"no image"}, 2), ({"a.jpg": photographs[1]}, 0)):
        (folder / "0.tar").write_bytes(tar_of(files))
        assert data_prep("adopt", folder).returncode == code
    assert data_prep("verify", folder).returncode == 0


def test_a_label_of_any_json_text_is_kept(tmp_path, photographs, data_prep):
    files = {
        "a.jpg": photographs[0],
        "a.json": b'{"name": "\\ud800x"}',
        "b.jpg": photographs[1],
        "b.json": b'{"name": "y"}',
    }
    folder = write_tree(tmp_path / "tars", {"0.tar": tar_of(files)})
    assert data_prep("adopt", folder, "--label-key", "name").returncode == 0
    assert read_manifest(folder).classes == ("?x", "y")


def test_identifiers_are_no_classes(monkeypatch):
    monkeypatch.setattr(labels, "MAX_CLASSES", 3)
    assert labels.find_classes("cab") == ("a", "b", "c")
    with pytest.raises(ValueError, match="more than 3 different labels"):
        labels.find_classes("abcd")


def test_tars_in_subfolders_are_mentioned(tars, data_prep):
    (tars / "val").mkdir()
    (tars / "03.tar").rename(tars / "val" / "03.tar")
    done = data_prep("adopt", tars)
    assert done.returncode == 0 and "subfolders are not read (val)" in done.stderr


def test_a_tar_replaced_during_the_adoption_is_read_again(tars, photographs, data_prep):
    data_prep("adopt", tars, "--task-index", 0, "--num-tasks", 2)
    time.sleep(0.01)  # another modification time
    data = bytearray((tars / "02.tar").read_bytes())
    data[600:700] = bytes(100)  # damages the first image
    (tars / "02.tar").write_bytes(data)
    data_prep("adopt", tars)
    assert quarantine(tars)["02000.jpg"] == "damaged" and data_prep("verify", tars).returncode == 0


def test_structure_check_keeps_what_only_decoding_finds(tmp_path, photographs, data_prep):
    data = bytearray(photographs[0])
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    samples = {}
    for check in ("structure", "decode"):
        folder = tmp_path / check
        folder.mkdir()
        (folder / "0.tar").write_bytes(tar_of({"a.jpg": bytes(data), "b.jpg": photographs[1]}))
        assert data_prep("adopt", folder, "--check", check).returncode == 0
        samples[check] = read_manifest(folder).num_samples
    assert samples == {"structure": 2, "decode": 1}


@pytest.mark.parametrize("num_pngs, is_advised", [(1, False), (2, True)])
def test_more_than_a_percent_to_reencode_names_webdataset(tmp_path, photographs, data_prep, num_pngs, is_advised):
    png = encode_image(Image.new("RGB", (20, 20)), "PNG")
    files = {f"{i}.jpg": photographs[i % 60] for i in range(120)} | {f"p{i}.png": png for i in range(num_pngs)}
    write_tree(tmp_path / "tars", {"0.tar": tar_of(files)})
    done = data_prep("adopt", tmp_path / "tars", "--check", "structure")
    assert done.returncode == 0 and (f"data_prep webdataset {tmp_path / 'tars'} OUT" in done.stdout) == is_advised


def test_only_unusable_samples_are_an_error_and_leave_nothing(tmp_path, data_prep):
    png = encode_image(Image.new("RGB", (20, 20)), "PNG")
    folder = write_tree(tmp_path / "tars", {"0.tar": tar_of({"a.png": png})})
    done = data_prep("adopt", folder)
    assert done.returncode == 2 and "data_prep webdataset" in error_line(done)
    assert [path.name for path in folder.iterdir()] == ["0.tar"]


def _html(folder, photographs):
    (folder / "01.tar").write_text("<!DOCTYPE html><html>404</html>" * 40)


def _gzip(folder, photographs):
    (folder / "02.tar").write_bytes(tar_of({"a.jpg": photographs[0]}, mode="w:gz"))


def _no_tars(folder, photographs):
    for path in folder.glob("*.tar"):
        path.unlink()


def _tars_below(folder, photographs):
    (folder / "train").mkdir()
    for path in folder.glob("*.tar"):
        path.rename(folder / "train" / path.name)


def _foreign_card(folder, photographs):
    (folder / "card.md").write_text("my notes")


def _foreign_manifest(folder, photographs):
    (folder / "manifest.json").write_text("{}")


def _identifiers(folder, photographs):
    (folder / "01.tar").write_bytes(tar_of({"a.jpg": photographs[0], "a.cls": b"123456789"}))


def _directory(folder, photographs):
    (folder / "05.tar").mkdir()


@pytest.mark.parametrize(
    "spoil, name, arguments",
    [
        (_html, "01.tar", ()),
        (_gzip, "02.tar", ()),
        (_no_tars, "tars", ()),
        (_tars_below, "train", ()),
        (_foreign_card, "card.md", ()),
        (_foreign_manifest, "manifest.json", ()),
        (_identifiers, "123456789", ()),
        (_directory, "05.tar", ()),
        (lambda *_: None, "--label-key", ("--label-key", "species", "--labels", "cls")),
    ],
)
def test_an_unusable_folder_is_one_line(tars, photographs, data_prep, spoil, name, arguments):
    spoil(tars, photographs)
    before = {path: path.read_bytes() for path in tars.rglob("*.*") if path.is_file()}
    done = data_prep("adopt", tars, *arguments)
    assert done.returncode == 2 and name in error_line(done)
    assert before.items() <= {path: path.read_bytes() for path in before}.items()


def test_a_built_set_is_not_adopted(image_folder, tmp_path, data_prep):
    data_prep("folder", image_folder, tmp_path / "set")
    before = read_tree(tmp_path / "set")
    done = data_prep("adopt", tmp_path / "set")
    assert done.returncode == 2 and "already a shard set" in done.stderr and read_tree(tmp_path / "set") == before


def test_nothing_is_built_into_tars_that_are_being_adopted(tars, image_folder, data_prep):
    data_prep("adopt", tars, "--task-index", 0, "--num-tasks", 2)
    assert data_prep("folder", image_folder, tars).returncode == 2
    data_prep("adopt", tars)
    assert data_prep("folder", image_folder, tars).returncode == 2 and read_manifest(tars).is_adopted


def test_other_files_beside_the_tars_are_kept(tars, data_prep):
    others = {"00_stats.json": b"{}", ".note.7.tmp": b"1", "00.parquet": b"PAR1", "wids.json": b"{}"}
    write_tree(tars, others)
    assert data_prep("adopt", tars).returncode == 0
    assert others.items() <= read_tree(tars).items()


def test_verify_finds_a_changed_adopted_tar(tars, data_prep):
    data_prep("adopt", tars)
    data = bytearray((tars / "01.tar").read_bytes())
    data[0:5] = b"99999"  # another name in the first header
    (tars / "01.tar").write_bytes(data)
    done = data_prep("verify", tars)
    assert done.returncode == 1 and "01.tar" in done.stdout and "sha256" in done.stdout


@pytest.mark.parametrize("where", ["tars", "parent"])
@pytest.mark.parametrize("ending, command", [("tar", "adopt"), ("tar.gz", "webdataset"), ("parquet", "parquet")])
def test_other_commands_name_the_right_one(tmp_path, photographs, data_prep, ending, command, where):
    folder = write_tree(tmp_path / "data" / "part", {f"0.{ending}": b"", "1.json": b"{}"})
    path = folder if where == "tars" else folder.parent
    pretrain = run(["-m", "pipeline", "pretrain", "demo_emae", "--data", path, "--run", tmp_path / "run"])
    for done in (pretrain, data_prep("folder", path, tmp_path / "out"), data_prep("verify", path)):
        assert done.returncode == 2 and f"data_prep {command} {folder}" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_records_hold_no_time_and_no_path(tars, data_prep):
    """Byte identity of the set in another place."""
    data_prep("adopt", tars)
    assert str(tars.parent).encode() not in b"".join(read_tree(tars).values())
    assert json.loads((tars / "manifest.json").read_text())["source"] == "adopted"
