"""Pictures in and out: PIL images, tensors in [-1, 1], files, grids and GIFs.

A network sees `Float[Tensor, "b 3 h w"]` in [-1, 1]. A person has files of every kind: `read`, `to_rgb` make one kind
of them, and say what is wrong with the rest. Nothing written ever replaces a file unasked.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from . import checks
from .files import replacing

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others are rare, or run a program of their own
MAX_PIXELS = 89_000_000  # a larger picture is taken for a decompression bomb


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture file, loaded whole. Whatever Pillow stumbles over becomes one ValueError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, at a lower limit
            image = Image.open(path, formats=FORMATS)
        with image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; scale it down first"
                )
            image.load()
            yield image
    except FileNotFoundError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # what damaged files raise has no class in common
        raise ValueError(f"{path}: {error}") from error


def read(path: str | Path, background: str = "white") -> Image.Image:
    """Reads a picture file as RGB, upright, transparent parts on the background colour.

    Raises FileNotFoundError, and ValueError with the path and the reason where the file holds no whole picture.
    """
    with _opened(path) as image:
        return to_rgb(image, background)


def read_depth(path: str | Path) -> Image.Image:
    """Reads a picture of depths, upright, with all levels that it has. Raises as `read` does."""
    with _opened(path) as image:
        return ImageOps.exif_transpose(image)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG: what `save` was given, or what another program wrote. Raises as `read` does."""
    with _opened(path) as image:
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Any PIL image as upright 8-bit RGB: grey, palette, CMYK, alpha on a background, 16-bit and float scaled.

    16-bit pictures are scaled by 65535. Float pictures hold 0 to 1; one that doesn't is stretched from its least value
    to its greatest, and so is a 32-bit one.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"a picture is a PIL image, not {type(image).__name__}; minisd.image.read opens a file")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def levels(image: Image.Image, size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """The numbers of a grey picture as they are, 16-bit and float ones too, scaled and cropped to size as `fit` does.

    A picture in colour counts as its grey one.
    """
    if isinstance(image, Image.Image) and image.mode.startswith(("I", "F")):
        image = ImageOps.exif_transpose(image)
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("the picture holds values that are not finite (NaN or infinity)")
        grey = Image.fromarray(values)
    else:
        grey = to_rgb(image).convert("L").convert("F")
    return torch.from_numpy(np.array(fit(grey, size)))[None, None]


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the picture holds values that are not finite (NaN or infinity)")
    full = 1 if image.mode == "F" else 65535
    low, high = (0, full) if 0 <= values.min() and values.max() <= full else (values.min(), values.max())
    return Image.fromarray(np.round((values - low) / ((high - low) or 1) * 255).astype(np.uint8))


def fit(image: Image.Image, size: tuple[int, int] | None = None, multiple: int = 8) -> Image.Image:
    """Scales a picture until it covers size (width, height), and crops what stands over, equally on both sides.

    Without a size, sides go down to the next multiple of `multiple`, with a warning where that changes the picture.
    """
    if size is None:
        width, height = (max(side // multiple, 1) * multiple for side in image.size)
        size = width, height
        if size != image.size:
            checks.warn(
                f"the picture is {image.width} x {image.height}; sides are multiples of {multiple}, "
                f"so it is resized to {size[0]} x {size[1]}"
            )
    return image if size == image.size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def from_pil(images: Image.Image | Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """PIL images of one size as a batch in [-1, 1]."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images or any(image.size != images[0].size for image in images):
        raise ValueError(f"a batch needs pictures of one size, not {[image.size for image in images]}; see image.fit")
    pixels = np.stack([np.asarray(to_rgb(image)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(pixels: Float[Tensor, "*b c h w"]) -> Image.Image | list[Image.Image]:
    """A picture in [-1, 1] as a PIL image, a batch as a list of them; one channel makes a grey one.

    Values beyond [-1, 1] are clamped; NaN and infinity raise ValueError.
    """
    if pixels.ndim not in (3, 4) or pixels.shape[-3] not in (1, 3):
        raise ValueError(f"a picture is [3, h, w] or [1, h, w], a batch [b, 3, h, w], not {list(pixels.shape)}")
    if not pixels.isfinite().all():
        raise ValueError("the picture holds values that are not finite (NaN or infinity)")
    if pixels.ndim == 4:
        return [one_to_pil(picture) for picture in pixels]
    return one_to_pil(pixels)


def one_to_pil(pixels: Float[Tensor, "c h w"]) -> Image.Image:
    eight_bit = ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(eight_bit.squeeze(2) if eight_bit.shape[2] == 1 else eight_bit)


def edges(image: Float[Tensor, "b c h w"], least: float = 0.025, blur: float = 1.4) -> Float[Tensor, "b 1 h w"]:
    """The edges of pictures in [-1, 1], as lines a pixel thin: 1, on 0 (Canny 1986, sections V to VII).

    The grey picture is smoothed by a Gaussian of deviation `blur` pixels. There is an edge where its slope is steepest
    across the edge, and at least `least`, in the range from black to white per pixel. (One threshold, not two.)
    """
    grey = (image.mean(dim=1, keepdim=True) + 1) / 2
    reach = math.ceil(3 * blur)
    bell = torch.exp(-((torch.arange(-reach, reach + 1, device=image.device) / blur) ** 2) / 2).to(grey)
    bell = bell / bell.sum()
    grey = F.pad(grey, [reach] * 4, mode="replicate")
    grey = F.conv2d(F.conv2d(grey, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    height, width = grey.shape[-2:]

    def shifted(around: Tensor, dy: int, dx: int) -> Tensor:
        return around[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    around = F.pad(grey, [1] * 4, mode="replicate")
    down = (shifted(around, 1, 0) - shifted(around, -1, 0)) / 2
    across = (shifted(around, 0, 1) - shifted(around, 0, -1)) / 2
    slope = torch.hypot(down, across)
    around = F.pad(slope, [1] * 4)
    sector = (torch.atan2(down, across) / (math.pi / 4)).round().remainder(4)  # of the slope's direction
    found = torch.zeros_like(slope, dtype=torch.bool)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        steepest = (slope > shifted(around, -dy, -dx)) & (slope >= shifted(around, dy, dx))
        found |= (sector == number) & steepest
    return (found & (slope >= least)).to(image)


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2, color: str = "white") -> Image.Image:
    """A contact sheet of pictures of one size, row by row; without columns, about as wide as high."""
    if not images or any(image.size != images[0].size for image in images):
        raise ValueError(f"a grid needs pictures of one size, not {[image.size for image in images]}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), color)
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def check_output(path: str | Path, suffix: str = ".png", force: bool = False) -> Path:
    """Raises before any work is done where a picture could not be saved: the reason, and what to do."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: the name must end in {suffix}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists and is kept; choose another name, or pass force=True (--force)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    try:  # under a name as long as the longest that saving needs
        trial = path.with_name(f".{path.name}.{os.getpid()}.check.part")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise type(error)(f"{path}: nothing can be written there ({error.strerror})") from error
    if (free := shutil.disk_usage(path.parent).free) < 2**24:
        raise OSError(f"{path}: only {free / 2**20:.0f} MiB are left on the disk")
    return path


def free_name(path: Path) -> Path:
    """The path itself, or where a file has come up there meanwhile, the next free one: `cat.png`, `cat-2.png`, ..."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def save(
    image: Image.Image, path: str | Path, metadata: Mapping[str, object] | None = None, *, force: bool = False
) -> Path:
    """Saves a PNG with its metadata as text chunks, whole or not at all; an existing file is replaced only by force."""
    path = check_output(path, force=force)
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, str(value))
    return _write(path, image, pnginfo=text)


def save_gif(images: Sequence[Image.Image], path: str | Path, *, milliseconds: int = 80, force: bool = False) -> Path:
    """Saves pictures as an endless GIF, each shown for a while; an existing file is replaced only by force."""
    path = check_output(path, ".gif", force=force)
    first, *rest = (image.convert("RGB") for image in images)
    return _write(path, first, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _write(path: Path, image: Image.Image, **options) -> Path:
    """Encodes in memory first, so that a picture that can't be encoded touches no file."""
    buffer = io.BytesIO()
    image.save(buffer, path.suffix[1:], **options)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path
