"""`prepare` passes an image through, repairs or rejects it, by its content."""

import io

import numpy as np
import pytest
from file_contents import decode_pixels, encode_image
from oddities import exif, huge_header, oddities, with_segment
from PIL import Image, ImageOps
from sampled_jpeg import sampled_jpeg

from data_prep.images import Policy, prepare
from data_prep.jpeg import parse_jpeg
from data_prep.pixels import ImageError


@pytest.mark.parametrize("check", ["decode", "structure"])
def test_unusual_files_are_kept_repaired_or_rejected(photographs, check):
    for name, (data, end) in oddities(photographs[7]).items():
        kind, _, reason = end.partition(": ")
        if kind == "quarantined":
            if (name, check) == ("ended_early", "structure"):
                continue  # its markers are complete; only a decoder notices missing image data
            with pytest.raises(ImageError) as error:
                prepare(data, Policy(check))
            assert error.value.reason == reason, name
            continue
        image = prepare(data, Policy(check))
        assert (image.data == data) == (kind == "same"), name
        assert reason in image.repairs or not reason, name
        decoded = Image.open(io.BytesIO(image.data))
        assert decoded.format == "JPEG" and decoded.mode == ("L" if image.gray else "RGB"), name
        assert decoded.size == (image.width, image.height), name


def test_repair_keeps_the_pixels(photographs):
    files = oddities(photographs[7])
    for name in ("png", "webp", "tiff", "bmp", "cmyk"):
        source = files[name][0]
        assert np.abs(decode_pixels(prepare(source, Policy()).data) - decode_pixels(source)).mean() < 5, name
    deep = Image.open(io.BytesIO(files["deep"][0]))
    values = np.asarray(deep).astype(float) / 65535 * 255
    assert np.abs(decode_pixels(prepare(files["deep"][0], Policy()).data)[:, :, 0] - values).mean() < 3
    broken = prepare(files["broken_exif"][0], Policy())
    assert broken.data == photographs[7], "a broken EXIF block is removed without re-encoding"


CHROMA = {  # factors of Y, Cb and Cr, and whether DALI's GPU decoder documents the sampling
    "4:1:0": (((4, 2), (1, 1), (1, 1)), True),
    "4:1:1": (((4, 1), (1, 1), (1, 1)), True),
    "4:2:2 by 4 x 1 and 2 x 1": (((4, 1), (2, 1), (2, 1)), True),
    "2 x 4": (((2, 4), (1, 1), (1, 1)), False),
    "1 x 4": (((1, 4), (1, 1), (1, 1)), False),
    "Cb unlike Cr": (((2, 2), (2, 1), (1, 2)), False),
    "chroma above luma": (((1, 1), (2, 1), (2, 1)), False),
}


@pytest.mark.parametrize("check", ["decode", "structure"])
@pytest.mark.parametrize("name", CHROMA)
def test_rare_chroma_samplings_are_kept_or_re_encoded(name, check):
    factors, is_kept = CHROMA[name]
    data = sampled_jpeg(factors)
    image = prepare(data, Policy(check))
    assert (image.data == data, image.repairs) == (is_kept, () if is_kept else ("chroma_sampling",))
    assert (image.width, image.height, image.gray) == (64, 64, False)
    assert np.abs(decode_pixels(image.data) - decode_pixels(data)).mean() < 4
    assert prepare(data, Policy(check, resize=16)).width == 16
    with pytest.raises(ImageError) as error:
        prepare(data[:-60], Policy(check))
    assert error.value.reason == "truncated"


def test_dali_decodes_rare_chroma_samplings_to_pillows_pixels():
    from nvidia.dali import fn, pipeline_def

    files = [sampled_jpeg(factors) for factors, _ in CHROMA.values()]

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None)
    def decode():
        encoded = fn.external_source(lambda: [np.frombuffer(data, np.uint8) for data in files])
        return fn.decoders.image(encoded, jpeg_fancy_upsampling=True)

    pipeline = decode()
    pipeline.build()
    (decoded,) = pipeline.run()
    for data, pixels in zip(files, decoded, strict=True):
        assert np.abs(np.asarray(pixels).astype(int) - decode_pixels(data)).mean() < 1


def _icc(*parts: tuple[int, int, bytes]) -> list[bytes]:
    return [b"ICC_PROFILE\0" + bytes([number, count]) + content for number, count, content in parts]


@pytest.mark.parametrize("check", ["decode", "structure"])
@pytest.mark.parametrize(
    "segments",
    [
        _icc((1, 2, b"profile")),
        _icc((1, 1, b"profile"), (1, 1, b"profile")),
        _icc((0, 1, b"profile")),
        _icc((1, 1, b"")),
    ],
    ids=["half", "twice", "number 0", "empty"],
)
def test_incomplete_icc_profile_is_removed_like_broken_exif(photographs, segments, check):
    data = with_segment(photographs[7], b"Exif\0\0MM\0*\xff\xff\xff\xff")
    for segment in segments:
        data = with_segment(data, segment, 0xE2)
    image = prepare(data, Policy(check))
    assert image.data == photographs[7] and image.repairs == ("broken_exif", "broken_icc")


def test_complete_icc_profile_is_kept(photographs):
    data = photographs[7]
    for segment in _icc((1, 2, b"pro"), (2, 2, b"file")):
        data = with_segment(data, segment, 0xE2)
    assert prepare(data, Policy()).data == data


def test_transparency_becomes_white(photographs):
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert decode_pixels(prepare(encode_image(clear, "PNG"), Policy()).data).min() > 250


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied_or_ignored(photographs, orientation):
    plain = Image.open(io.BytesIO(photographs[7])).convert("RGB").resize((64, 40))
    data = encode_image(plain, "JPEG", quality=95, exif=exif(orientation))
    assert prepare(data, Policy(orientation="ignore")).data == data
    turned = prepare(data, Policy(orientation="apply"))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert np.abs(decode_pixels(turned.data) - expected).mean() < 4
    assert turned.repairs == ("exif_orientation",) and parse_jpeg(turned.data).orientation == 1


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_counter_clockwise(photographs, degrees):
    turned = prepare(photographs[7], Policy(), degrees)
    expected = np.rot90(decode_pixels(photographs[7]), degrees // 90)
    assert np.abs(decode_pixels(turned.data) - expected).mean() < 5 and turned.repairs == ("rotation",)


def test_resize_matches_pillows_lanczos_and_never_enlarges(photographs):
    image = prepare(photographs[7], Policy(resize=48))
    assert min(image.width, image.height) == 48
    source = Image.open(io.BytesIO(photographs[7])).convert("RGB")
    expected = np.asarray(source.resize((image.width, image.height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode_pixels(image.data) - expected).mean() < 6
    larger = prepare(photographs[7], Policy(resize=5000))
    assert (larger.width, larger.height) == source.size


def test_scaled_decoding_of_a_large_image_looks_the_same(photographs):
    large = Image.open(io.BytesIO(photographs[7])).convert("RGB").resize((1600, 1200), Image.Resampling.BICUBIC)
    image = prepare(encode_image(large, "JPEG", quality=95), Policy(resize=64))
    expected = np.asarray(large.resize((image.width, image.height), Image.Resampling.LANCZOS)).astype(int)
    assert (image.width, image.height) == (85, 64)
    assert np.abs(decode_pixels(image.data) - expected).mean() < 6


def test_quality_re_encodes_everything(photographs):
    image = prepare(photographs[7], Policy(quality=30))
    assert len(image.data) < len(photographs[7]) / 2 and image.repairs == ()


def test_rgb_coded_jpeg_is_re_encoded(photographs):
    source = Image.open(io.BytesIO(photographs[7])).convert("RGB")
    data = encode_image(source, "JPEG", quality=95, keep_rgb=True)
    image = prepare(data, Policy())
    assert image.repairs == ("rgb_jpeg",)
    assert np.abs(decode_pixels(image.data) - np.asarray(source).astype(int)).mean() < 6


def test_pixel_limit_is_checked_before_decoding(photographs):
    with pytest.raises(ImageError, match="30000 x 30000 px"):
        prepare(huge_header(photographs[0]), Policy())
    with pytest.raises(ImageError, match="50 pixels"):
        prepare(encode_image(Image.new("RGB", (8, 8)), "PNG"), Policy(max_pixels=50))


def test_jpeg_with_too_many_scans_is_rejected(photographs):
    source = Image.open(io.BytesIO(photographs[0])).resize((16, 16))
    data = encode_image(source, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError) as error:
        parse_jpeg(data[:-2] + scan * 300 + b"\xff\xd9")
    assert error.value.reason == "too_many_scans"


def test_parsed_header_agrees_with_pillow(photographs):
    for data in photographs:
        info, image = parse_jpeg(data), Image.open(io.BytesIO(data))
        assert (info.width, info.height) == image.size
        assert info.components == len(image.getbands())
    turned = with_segment(photographs[0], b"Exif\0\0" + exif(6).removeprefix(b"Exif\0\0"))
    assert parse_jpeg(turned).orientation == 6
