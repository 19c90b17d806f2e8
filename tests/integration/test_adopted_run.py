"""A training run on adopted WebDataset tars."""

import forkserver
import webdataset
from runs import SMALL, Run


def test_training_reads_each_adopted_sample_once_an_epoch(photographs, tmp_path):
    folder, batch = tmp_path / "tars", SMALL["data.global_batch"]
    folder.mkdir()
    images = [path.read_bytes() for path in sorted(photographs.rglob("*.*"))][: 4 * batch]
    images.insert(5, images[5][:-500])  # truncated, so it is in no index
    with webdataset.ShardWriter(str(folder / "%02d.tar"), maxcount=15, verbose=0) as sink:
        for number, data in enumerate(images):
            sink.write({"__key__": f"part/{number:03d}", "JPEG": data, "json": {"number": number}})
    done = forkserver.run(["-m", "data_prep", "adopt", folder])
    assert done.returncode == 0, done.stderr
    run = Run(folder, tmp_path / "run")
    metrics = run.train(train__steps=8, data__trace=True)
    assert metrics[-1]["epoch"] == 2
    lines = [line.split() for line in (run.directory / "samples" / "rank-0.txt").read_text().splitlines()]
    valid = sorted(f"part/{number:03d}" for number in range(len(images)) if number != 5)
    for epoch in (range(4), range(4, 8)):
        assert sorted(key for step, key in lines if int(step) in epoch) == valid
