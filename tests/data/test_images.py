"""Every kind of picture file, and every way to be none."""

from __future__ import annotations

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.errors import DataError
from utils.images import check_image, image_size, is_image, is_video, list_images, read_at_least, read_image

RGB = np.zeros((32, 64, 3), np.uint8)  # quarters that JPEG blocks of 16 do not straddle
RGB[:16, :32], RGB[:16, 32:], RGB[16:, :32], RGB[16:, 32:] = (200, 30, 60), (20, 180, 90), (240, 240, 10), (5, 5, 5)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    path = save(tmp_path / "a.img", Image.fromarray(RGB), format=kind, exif=exif, **options)
    image = read_image(path)
    assert image_size(path) == (image.shape[1], image.shape[0])
    assert (image.shape[0] == 64) == (orientation >= 5)
    # the stored corners top left, top right, bottom left land where the standard says (Exif 2.3, 4.6.4, table 6)
    turned = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1]}
    flat = RGB.transpose(1, 0, 2)
    turned |= {5: flat, 6: flat[:, ::-1], 7: flat[::-1, ::-1], 8: flat[::-1]}
    inner = (slice(4, -4, 8), slice(4, -4, 8))
    assert np.abs(image[inner].astype(int) - turned[orientation][inner]).max() <= 12


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_png_modes(tmp_path: Path, mode: str) -> None:
    image = read_image(save(tmp_path / "a.png", Image.fromarray(RGB).convert(mode)))
    assert image.shape == (32, 64, 3) and image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
    if mode == "RGBA":
        np.testing.assert_array_equal(image, RGB)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(tmp_path: Path, kind: str) -> None:
    image = read_image(save(tmp_path / "a.img", Image.fromarray(RGB).convert("CMYK"), format=kind))
    assert np.abs(image[5:15:4, 5:25:4].astype(int) - (200, 30, 60)).max() <= 8


def test_sixteen_bits(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((20, 30), 40000, np.uint16))
    assert (read_image(tmp_path / "a.png") == 156).all()


def test_any_file_name(tmp_path: Path) -> None:
    path = save(tmp_path / "Müller 猫.png", Image.fromarray(RGB))
    np.testing.assert_array_equal(read_image(path), RGB)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"not a picture at all", "not an image"),
        (jpeg()[:-2], "cut short"),
        (jpeg()[:900], "cut short"),
        (jpeg()[:20], "cut short"),
        (png()[:-12], "cut short"),
        (png()[:20], "cut short"),
        (jpeg()[:700] + b"\0" * 500 + jpeg()[1200:], None),
    ],
)
def test_what_is_not_a_whole_picture_is_named(
    tmp_path: Path, content: bytes, reason: str | None, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    if reason is None:  # spoilt inside: decoded as far as it goes, or refused, but never anything else
        try:
            assert read_image(path).shape == (50, 70, 3)
        except DataError as error:
            assert str(path) in str(error)
        return
    for function in (read_image, check_image):
        with pytest.raises(DataError, match=f"a.jpg: .*{reason}"):
            function(path)
    assert capfd.readouterr().err == ""


def test_missing_and_too_large(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "a.jpg")
    path = save(tmp_path / "a.png", Image.fromarray(RGB))
    with pytest.raises(DataError, match="64x32 is more than 2,000 pixels"):
        read_image(path, max_pixels=2000)
    small = save(tmp_path / "b.png", Image.fromarray(RGB[:5, :20]))
    with pytest.raises(DataError, match="20x5 pixels, smaller than 10"):
        check_image(small)


def test_bytes_after_the_end_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg() + b"maker's trailer")
    assert check_image(path) == (70, 50) and read_image(path).shape == (50, 70, 3)


def test_suffixes() -> None:
    assert is_image("A.JPG") and is_image(Path("x/y.webp")) and not is_image("a.txt") and not is_image("a.gif")
    assert is_video("a.MP4") and is_video("a.gif") and not is_video("a.png")


def test_folders_lists_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images/b.jpg", "images/deep/a.PNG", "images/notes.txt", "images/._b.jpg", "other/c.jpg", "d.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "images")
    (tmp_path / "images/self").symlink_to(tmp_path / "images")
    listed = tmp_path / "list.txt"
    listed.write_text(f"./other/c.jpg\n\n{tmp_path}/d.bmp\nother/c.jpg\n")
    found = list_images([tmp_path / "images", listed])
    assert [Path(f).relative_to(tmp_path).as_posix() for f in found] == [
        "d.bmp",
        "images/b.jpg",
        "images/deep/a.PNG",
        "other/c.jpg",
    ]
    assert len(list_images(tmp_path / "loop")) == 2
    assert list_images(str(tmp_path / "d.bmp")) == [str(tmp_path / "d.bmp")]
    listed.write_text("./other/c.jpg\n./other/gone.jpg\n")
    with pytest.raises(DataError, match=r"list.txt:2: no such image"):
        list_images(listed)
    with pytest.raises(DataError, match="nowhere: no such folder or file"):
        list_images(tmp_path / "nowhere")


def test_a_png_cut_in_its_middle_is_found_by_the_scan(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(noise))
    assert check_image(path) == (64, 64)
    data = path.read_bytes()
    path.write_bytes(data[:3000] + data[-12:])  # IEND is still there
    with pytest.raises(DataError, match="cut short"):
        check_image(path)


def test_a_webp_cut_short_is_found_by_the_scan(tmp_path: Path) -> None:
    path = save(tmp_path / "a.webp", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.webp"):
        check_image(path)


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="not a file"):
        check_image(tmp_path / "a.jpg")


def test_a_list_may_hold_comments(tmp_path: Path) -> None:
    save(tmp_path / "#1.png", Image.fromarray(RGB))
    (tmp_path / "list.txt").write_text("# pictures\n./#1.png\n#1.png\n")
    assert list_images(tmp_path / "list.txt") == [str(tmp_path / "#1.png")]


@pytest.mark.parametrize(
    ("least", "shape"), [((400, 240), (240, 400)), ((201, 10), (240, 400)), ((200, 120), (120, 200))]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_read_reduced_but_never_smaller_than_needed(
    tmp_path: Path, least: tuple, shape: tuple, mode: str
) -> None:
    ramp = np.linspace(0, 255, 400, dtype=np.uint8)[None, :, None].repeat(240, 0).repeat(3, 2)
    path = save(tmp_path / "a.jpg", Image.fromarray(ramp).convert(mode), quality=95)
    image, size = read_at_least(path, *least)
    assert size == (400, 240) and image.shape == (*shape, 3)
    wanted = cv2.resize(read_image(path), shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(image - wanted).max() <= 3
    assert read_at_least(path, 50, 30)[0].shape == (30, 50, 3) and read_at_least(path, 1, 1)[0].shape == (30, 50, 3)
    lossless = save(tmp_path / "a.png", Image.fromarray(ramp))
    assert read_at_least(lossless, 50, 30)[0].shape == (240, 400, 3)


def test_a_turned_jpeg_is_reduced_by_its_shown_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", Image.fromarray(np.zeros((101, 403, 3), np.uint8)), exif=exif)
    image, size = read_at_least(path, 40, 200)
    assert size == (101, 403) and image.shape == (202, 51, 3)
    assert read_at_least(path, 52, 200)[0].shape == (403, 101, 3)
