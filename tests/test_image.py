"""Pictures of every kind in, one kind out; files saved whole or not at all."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import image as im

RED, GREY = (255, 0, 0), (128, 128, 128)


def solid(mode, color, size=(16, 8)):
    return Image.new(mode, size, color)


def sixteen_bit(value):
    return Image.fromarray(np.full((8, 16), value, np.uint16))


def floats(*values):
    return Image.fromarray(np.resize(np.array(values, np.float32), (8, 16)))


def palette(transparent):
    picture = solid("RGB", RED).quantize(4)
    if transparent:
        picture.info["transparency"] = 0
    return picture


@pytest.mark.parametrize(
    "picture, pixel",
    [
        pytest.param(solid("RGB", RED), RED, id="RGB"),
        pytest.param(solid("RGBA", (255, 0, 0, 255)), RED, id="RGBA opaque"),
        pytest.param(solid("RGBA", (255, 0, 0, 0)), (255, 255, 255), id="RGBA clear: background"),
        pytest.param(solid("RGBA", (255, 0, 0, 128)), (255, 127, 127), id="RGBA half"),
        pytest.param(solid("LA", (0, 0)), (255, 255, 255), id="LA clear"),
        pytest.param(solid("L", 128), GREY, id="L"),
        pytest.param(solid("1", 1), (255, 255, 255), id="1 bit"),
        pytest.param(solid("CMYK", (0, 255, 255, 0)), RED, id="CMYK"),
        pytest.param(solid("HSV", (0, 255, 255)), RED, id="HSV"),
        pytest.param(palette(False), RED, id="palette"),
        pytest.param(palette(True), (255, 255, 255), id="palette with a clear entry"),
        pytest.param(sixteen_bit(32896), GREY, id="16 bit"),
        pytest.param(sixteen_bit(65535), (255, 255, 255), id="16 bit white"),
        pytest.param(solid("I", 32896), GREY, id="32 bit"),
        pytest.param(floats(0.5), GREY, id="float in 0..1"),
        pytest.param(floats(-1, 3), (0, 0, 0), id="float beyond 0..1: stretched"),
        pytest.param(floats(300), (0, 0, 0), id="float, all the same"),
    ],
)
def test_any_mode_becomes_rgb(picture, pixel, tmp_path):
    converted = im.to_rgb(picture)
    assert (converted.mode, converted.size, converted.getpixel((0, 0))) == ("RGB", (16, 8), pixel)
    suffix = ".tif" if picture.mode in ("F", "CMYK", "I", "I;16") else ".png"
    if picture.mode != "HSV":  # no file format holds it
        picture.save(tmp_path / f"picture{suffix}")
        assert im.read(tmp_path / f"picture{suffix}").getpixel((0, 0)) == pixel


def test_a_float_picture_keeps_its_steps():
    pixels = np.asarray(im.to_rgb(floats(*np.linspace(-1, 3, 128))))[..., 0].ravel()
    assert (np.diff(pixels.astype(int)) == 2).mean() > 0.95 and pixels[-1] == 255


def test_transparency_goes_on_the_background_asked_for():
    assert im.to_rgb(solid("RGBA", (255, 0, 0, 0)), background="#000080").getpixel((0, 0)) == (0, 0, 128)


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (15, 7)), (6, (7, 0)), (8, (0, 15))])
def test_photographs_are_turned_upright(orientation, corner, tmp_path):
    picture = solid("RGB", "white")
    picture.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "photo.png", exif=exif)
    upright = im.read(tmp_path / "photo.png")
    assert upright.getpixel(corner) == (0, 0, 0)


def png(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


def encoded(kind):
    noise = Image.effect_noise((64, 64), 50).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, reason",
    [
        pytest.param(b"", "not a picture", id="empty"),
        pytest.param(b"a cat on a beach", "not a picture", id="text"),
        pytest.param(b"<!DOCTYPE html><html></html>", "not a picture", id="web page"),
        pytest.param(encoded("PNG")[:3000], "truncated", id="truncated PNG"),
        pytest.param(encoded("JPEG")[:1000], "truncated", id="truncated JPEG"),
        pytest.param(encoded("PNG")[:30], "not a picture", id="PNG header only"),
        pytest.param(png(9_500, 9_500), "90250000|90,250,000|9500 x 9500", id="90 megapixels"),
        pytest.param(png(60_000, 60_000), "bomb", id="3600 megapixels"),
    ],
)
def test_what_is_no_picture_is_refused_with_path_and_reason(content, reason, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    for reader in (im.read, im.read_metadata):
        with pytest.raises(ValueError, match=reason) as caught:
            reader(path)
        assert str(path) in str(caught.value)


def test_a_missing_file_a_folder_and_a_float_of_nan_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        im.read(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"directory|Permission"):
        im.read(tmp_path)
    floats(0.5, np.nan).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match=r"nan\.tif.*not finite"):
        im.read(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match=r"not ndarray; minisd\.image\.read"):
        im.to_rgb(np.zeros((8, 8, 3)))


@pytest.mark.parametrize("size, fitted", [((513, 770), (512, 768)), ((1, 1), (8, 8)), ((64, 7), (64, 8))])
def test_odd_sizes_are_fitted_and_said_so(size, fitted):
    with pytest.warns(UserWarning, match=f"{size[0]} x {size[1]}.*{fitted[0]} x {fitted[1]}"):
        assert im.fit(solid("RGB", RED, size)).size == fitted


def test_fit_scales_to_cover_and_crops_the_middle(recwarn):
    picture = solid("RGB", RED, (300, 100))
    picture.paste("blue", (90, 0, 210, 100))
    middle = im.fit(picture, (50, 50))
    assert middle.size == (50, 50) and middle.getpixel((25, 25)) == (0, 0, 255) == middle.getpixel((2, 25))
    assert im.fit(solid("RGB", RED, (64, 32))).size == (64, 32) and not recwarn.list


def test_tensors_and_pictures_are_each_others_inverse():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = values.float() / 127.5 - 1
    pictures = im.to_pil(x)
    assert [np.asarray(picture).tolist() for picture in pictures] == [values[0].permute(1, 2, 0).tolist()] * 2
    assert torch.equal(im.from_pil(pictures), x)
    assert im.from_pil(pictures[0]).shape == (1, 3, 16, 16)
    assert im.to_pil(x[0]).tobytes() == pictures[0].tobytes()
    assert im.to_pil(x[0, :1]).mode == "L"


def test_values_beyond_the_range_are_clamped_and_nan_is_refused():
    assert im.to_pil(torch.tensor([-2.0, -1, 0, 1, 9]).expand(3, 1, 5)).tobytes()[::3] == bytes([0, 0, 128, 255, 255])
    with pytest.raises(ValueError, match="not finite"):
        im.to_pil(torch.full((3, 8, 8), float("nan")))
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\]"):
        im.to_pil(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="one size"):
        im.from_pil([solid("RGB", RED), solid("RGB", RED, (8, 8))])


def test_grid_lays_pictures_row_by_row():
    colors = ["red", "lime", "blue", "black", "yellow"]
    sheet = im.grid([solid("RGB", color, (4, 4)) for color in colors], columns=3, gap=2)
    assert sheet.size == (16, 10)
    assert [sheet.getpixel((x, y)) for y in (0, 6) for x in (0, 6, 12)] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0), (255, 255, 255),
    ]  # fmt: skip
    assert im.grid([solid("RGB", RED, (4, 4))] * 9).size == (16, 16)
    with pytest.raises(ValueError, match="one size"):
        im.grid([])


SETTINGS = {"prompt": "a cat — 猫 😀\n\x1b[31m", "seed": 7, "guidance": 7.5}


def test_a_picture_carries_its_settings(tmp_path):
    path = im.save(solid("RGB", RED), tmp_path / "cat.png", SETTINGS)
    assert im.read_metadata(path) == {key: str(value) for key, value in SETTINGS.items()}
    assert im.read(path).getpixel((0, 0)) == RED
    solid("RGB", RED).save(tmp_path / "other.jpg")
    assert im.read_metadata(tmp_path / "other.jpg") == {}


def test_nothing_is_overwritten_unless_forced(tmp_path):
    path = im.save(solid("RGB", RED), tmp_path / "cat.png")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"cat\.png exists"):
        im.save(solid("RGB", "blue"), path)
    assert path.read_bytes() == before
    im.save(solid("RGB", "blue"), path, force=True)
    assert im.read(path).getpixel((0, 0)) == (0, 0, 255)


def test_a_save_that_fails_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    path = im.save(solid("RGB", RED), tmp_path / "cat.png")
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        im.save(solid("RGB", "blue"), path, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.png"] and path.read_bytes() == before


def test_where_nothing_can_be_saved_is_said_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    for path, error, message in [
        (tmp_path / "cat.jpg", ValueError, r"end in \.png"),
        (tmp_path / "folder.png", IsADirectoryError, "is a folder"),
        (tmp_path / "none" / "cat.png", FileNotFoundError, "there is no folder"),
    ]:
        with pytest.raises(error, match=message):
            im.check_output(path)
    with pytest.raises(OSError, match="nothing can be written there"):
        im.check_output(tmp_path / f"{'a' * 250}.png")  # a name that leaves no room for a temporary one's
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]

    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refused)
    with pytest.raises(PermissionError, match=r"cat\.png: nothing can be written there \(Permission denied\)"):
        im.check_output(tmp_path / "cat.png")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    with pytest.raises(OSError, match="only 1 MiB"):
        im.check_output(tmp_path / "cat.png")


def test_a_gif_has_all_its_frames(tmp_path):
    frames = [solid("RGB", color) for color in ("red", "lime", "blue")]
    with Image.open(im.save_gif(frames, tmp_path / "walk.gif", milliseconds=120)) as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 120, 0)
    with pytest.raises(FileExistsError):
        im.save_gif(frames, tmp_path / "walk.gif")


@pytest.mark.parametrize("slope", [(0, 1), (1, 0), (1, 1), (1, -1), (2, 1)], ids=str)
def test_edges_are_one_pixel_thin_and_where_black_meets_white(slope):
    at = torch.arange(48) - 23.5
    beyond = slope[0] * at[:, None] + slope[1] * at
    beyond = beyond / np.hypot(*slope)  # distance from the edge in pixels
    found = im.edges((beyond > 0).float().expand(2, 3, -1, -1) * 2 - 1)
    assert found.shape == (2, 1, 48, 48) and set(found.unique().tolist()) == {0, 1}
    inner = found[0, 0, 4:-4, 4:-4] == 1
    assert (beyond[4:-4, 4:-4][inner].abs() <= 1.5).all()
    assert 40 <= inner.sum() <= 80  # a line of some 40 to 57 pixels, nowhere two thick but at its steps


def test_a_slope_that_is_too_gentle_is_no_edge():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert im.edges(ramp).sum() == 0  # 1/63 a pixel
    assert im.edges(torch.zeros(1, 3, 16, 16)).sum() == 0
    step = torch.where(torch.arange(64) < 32, -0.1, 0.1).expand(1, 3, 64, 64)
    steepest = 0.1 / (
        1.4 * (2 * np.pi) ** 0.5
    )  # of a step of 0.1 from black to white, smoothed: 0.0285; differences of two pixels see 0.025
    assert im.edges(step, least=0.8 * steepest).sum() == 64 and im.edges(step, least=1.1 * steepest).sum() == 0
