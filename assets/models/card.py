"""Put the files' sums and what measure.py found into the card: `python assets/models/card.py` rewrites README.md.

What stands between `<!-- name -->` and `<!-- end -->` there is written here; everything else is prose.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from minisd.critters import WORDS
from minisd.files import sha256
from minisd.weights import read_tensors

HERE = Path(__file__).parent
WHAT = {
    "unet.safetensors": "the noise predictor",
    "vae.safetensors": "the autoencoder",
    "text.safetensors": "the text tower",
    "image_tower.safetensors": "the mini CLIP's image tower",
    "unet.lora.safetensors": "changes of the noise predictor",
    "control.lora.safetensors": "the ControlNet's changes and own parts",
    "classifier.safetensors": "the classifier of noisy latents",
    "pixels.safetensors": "draws small pictures without latents and words",
    "depth.safetensors": "the depth estimator",
    "oracle.safetensors": "reads attributes back from pictures",
    "segmenter.safetensors": "tells parts, so that they can be counted",
}
ATTRIBUTES = [name for name in WORDS if name != "studio"]


def table(*rows: Iterable[str]) -> str:
    """Rows of cells, the first one the head."""
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rest])


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def files() -> str:
    rows = [("file", "what", "numbers", "size", "SHA-256")]
    for path in sorted(HERE.rglob("*.safetensors"), key=lambda p: (len(p.parts), p)):
        numbers = sum(t.numel() for t in read_tensors(path).values())
        name = path.relative_to(HERE).as_posix()
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        rows.append((f"`{name}`", WHAT[path.name], f"{numbers / 1e6:.2f} M", size, f"`{sha256(path)}`"))
    return table(*rows)


def obeyed(counts: dict[str, dict[str, float]], out_of: str = "total") -> list[str]:
    """Shares by attribute, and their mean: of all pictures, or of what the oracle would read rightly of renders."""
    shares = [counts[a]["right"] / counts[a][out_of] for a in ATTRIBUTES]
    return [percent(share) for share in (*shares, sum(shares) / len(shares))]


def adherence(measured: dict) -> str:
    found = measured["adherence"] | measured["distilled"]
    rows = [[name, str(max(n["total"] for n in c.values())), *obeyed(c)] for name, c in found.items()]
    best = "held-out, guidance 4, 20 steps"
    last = [f"{best}, divided by the oracle's accuracy", "", *obeyed(found[best], "of renders")]
    return table(("read back", "prompts", *ATTRIBUTES, "mean"), *rows, last)


def oracle(measured: dict) -> str:
    def shares(read: dict) -> list[str]:
        return [f"{100 * read[a]['all']:.1f}%" for a in ATTRIBUTES]

    return table(
        ("on", *ATTRIBUTES),
        [f"{measured['renders']} fresh renders", *shares(measured["oracle_on_renders"])],
        ["the autoencoder's reconstructions of them", *shares(measured["oracle_on_reconstructions"])],
    )


def styles(measured: dict) -> str:
    read = measured["oracle_on_renders"]
    rows = [
        [style, *(f"{100 * read[a][style]:.1f}%" if style in read[a] else "-" for a in ATTRIBUTES)]
        for style in WORDS["style"]
    ]
    return table(("style", *ATTRIBUTES), *rows)


def zero_shot(measured: dict) -> str:
    found = measured["zero_shot"]
    return table(
        ("", *found),
        ["right", *(percent(f["right"]) for f in found.values())],
        ["by chance", *(percent(f["chance"]) for f in found.values())],
    )


WHOSE = {
    "renders": "fresh renders",
    "reconstructions": "their reconstructions",
    "drawn": "drawn",
    "distilled": "drawn in 4 steps, distilled",
}


def anatomy(measured: dict) -> str:
    found = measured["anatomy"]
    parts = [name for name in found["renders"]["all"] if name != "of"]
    labelled = [
        [f"counted as they are labelled: {WHOSE[name]}", str(found[name]["all"]["of"]), *tenths(shares, parts)]
        for name, shares in found["as labelled"].items()
    ]
    usual = [
        [f"as many as is usual: {whose}", str(found[name]["all"]["of"]), *tenths(found[name]["all"], parts)]
        for name, whose in WHOSE.items()
    ]
    return table(("pictures", "of", *parts), *labelled, *usual)


def tenths(shares: dict[str, float], names: Iterable[str]) -> list[str]:
    return [f"{100 * shares[name]:.1f}%" for name in names]


def whole(measured: dict) -> str:
    rows = [
        [whose, *(f"{percent(measured['anatomy'][name][style]['whole'])}" for style in WORDS["style"])]
        for name, whose in WHOSE.items()
    ]
    return table(("as many of everything as is usual", *WORDS["style"]), *rows)


def depth(measured: dict) -> str:
    found = measured["depth"]
    return table(
        ("pictures", "the estimator's mean error", "depths kept", "by chance"),
        [f"{found['pictures']}", *(f"{found[name]:.3f}" for name in ("error", "kept", "by chance"))],
    )


BLOCKS = {
    "depth": depth,
    "zero shot": zero_shot,
    "adherence": adherence,
    "oracle": oracle,
    "styles": styles,
    "anatomy": anatomy,
    "whole": whole,
}


def written(card: str) -> str:
    """The card with everything between its marks made anew."""
    measured = json.loads((HERE / "measured.json").read_text(encoding="utf-8"))
    blocks = {"files": files(), **{name: make(measured) for name, make in BLOCKS.items()}}
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->\n\n", "\n\n<!-- end -->"
        before, _, rest = card.partition(start)
        _, _, after = rest.partition(end)
        assert after, f"the card has no place for {name}"
        card = before + start + block + end + after
    return card


if __name__ == "__main__":
    path = HERE / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
