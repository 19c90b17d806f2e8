"""One image: passed through, repaired or refused, by its content."""

import io

import numpy as np
import pytest
from bytes_of import picture_bytes, pixels_of
from oddities import exif, huge_header, oddities, with_segment
from PIL import Image

from data_prep.images import Policy, prepare
from data_prep.jpeg import JpegError, walk
from data_prep.pixels import ImageError


@pytest.mark.parametrize("check", ["decode", "structure"])
def test_each_oddity_ends_where_it_should(photographs, check):
    for name, (data, end) in oddities(photographs[7]).items():
        kind, _, reason = end.partition(": ")
        if kind == "quarantined":
            if (name, check) == ("ended_early", "structure"):
                continue  # its markers are whole; only a decoder sees that image data are missing
            with pytest.raises(ImageError) as error:
                prepare(data, Policy(check))
            assert error.value.reason == reason, name
            continue
        image = prepare(data, Policy(check))
        assert (image.data == data) == (kind == "same"), name
        assert reason in image.repairs or not reason, name
        decoded = Image.open(io.BytesIO(image.data))
        assert decoded.format == "JPEG" and decoded.mode == ("L" if image.grey else "RGB"), name
        assert decoded.size == (image.width, image.height), name


def test_repaired_pixels_are_the_sources(photographs):
    made = oddities(photographs[7])
    for name in ("png", "webp", "tiff", "bmp", "cmyk"):
        source = made[name][0]
        assert np.abs(pixels_of(prepare(source, Policy()).data) - pixels_of(source)).mean() < 5, name
    deep = Image.open(io.BytesIO(made["deep"][0]))
    values = np.asarray(deep).astype(float) / 65535 * 255
    assert np.abs(pixels_of(prepare(made["deep"][0], Policy()).data)[:, :, 0] - values).mean() < 3
    broken = prepare(made["broken_exif"][0], Policy())
    assert broken.data == photographs[7], "a broken EXIF is cut out and the picture not re-encoded"


def test_transparency_becomes_white(photographs):
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert pixels_of(prepare(picture_bytes(clear, "PNG"), Policy()).data).min() > 250


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied_as_pillow_does_or_ignored(photographs, orientation):
    plain = Image.open(io.BytesIO(photographs[7])).convert("RGB").resize((64, 40))
    data = picture_bytes(plain, "JPEG", quality=95, exif=exif(orientation))
    assert prepare(data, Policy(orientation="ignore")).data == data
    turned = prepare(data, Policy(orientation="apply"))
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert np.abs(pixels_of(turned.data) - expected).mean() < 4
    assert turned.repairs == ("exif_orientation",) and walk(turned.data).orientation == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_counter_clockwise(photographs, degrees):
    turned = prepare(photographs[7], Policy(), degrees)
    expected = np.rot90(pixels_of(photographs[7]), degrees // 90)
    assert np.abs(pixels_of(turned.data) - expected).mean() < 5 and turned.repairs == ("rotation",)


def test_resize_shrinks_the_shorter_side_as_pillows_lanczos_and_never_enlarges(photographs):
    image = prepare(photographs[7], Policy(resize=48))
    assert min(image.width, image.height) == 48
    source = Image.open(io.BytesIO(photographs[7])).convert("RGB")
    expected = np.asarray(source.resize((image.width, image.height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels_of(image.data) - expected).mean() < 6
    larger = prepare(photographs[7], Policy(resize=5000))
    assert (larger.width, larger.height) == source.size


def test_a_large_picture_decoded_at_a_fraction_keeps_the_same_look(photographs):
    large = (
        Image.open(io.BytesIO(photographs[7])).convert("RGB").resize((1600, 1200), Image.Resampling.BICUBIC)
    )
    image = prepare(picture_bytes(large, "JPEG", quality=95), Policy(resize=64))
    expected = np.asarray(large.resize((image.width, image.height), Image.Resampling.LANCZOS)).astype(int)
    assert (image.width, image.height) == (85, 64)
    assert np.abs(pixels_of(image.data) - expected).mean() < 6


def test_quality_re_encodes_everything(photographs):
    image = prepare(photographs[7], Policy(quality=30))
    assert len(image.data) < len(photographs[7]) / 2 and image.repairs == ()


def test_rgb_coded_jpegs_are_re_encoded_since_decoders_disagree_on_them(photographs):
    picture = Image.open(io.BytesIO(photographs[7])).convert("RGB")
    data = picture_bytes(picture, "JPEG", quality=95, keep_rgb=True)
    image = prepare(data, Policy())
    assert image.repairs == ("rgb_jpeg",)
    assert np.abs(pixels_of(image.data) - np.asarray(picture).astype(int)).mean() < 6


def test_the_pixel_limit_is_checked_before_anything_is_decoded(photographs):
    with pytest.raises(ImageError, match=r"30000 x 30000 px is more than the limit of 100,000,000 pixels"):
        prepare(huge_header(photographs[0]), Policy())
    with pytest.raises(ImageError, match="limit of 50 pixels"):
        prepare(picture_bytes(Image.new("RGB", (8, 8)), "PNG"), Policy(max_pixels=50))


def test_an_endless_number_of_scans_is_refused(photographs):
    picture = Image.open(io.BytesIO(photographs[0])).resize((16, 16))
    data = picture_bytes(picture, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(JpegError) as error:
        walk(data[:-2] + scan * 300 + b"\xff\xd9")
    assert error.value.reason == "too_many_scans"


def test_the_walk_finds_what_pillow_finds(photographs):
    for data in photographs:
        found, image = walk(data), Image.open(io.BytesIO(data))
        assert (found.width, found.height) == image.size
        assert found.components == len(image.getbands())
    turned = with_segment(photographs[0], b"Exif\0\0" + exif(6).removeprefix(b"Exif\0\0"))
    assert walk(turned).orientation == 6
