"""German prose out of Debian's manuals: train.txt and valid.txt, for a model that was trained on English.

    apt-get download debian-paketmanagement-buch debian-handbook debian-reference-de installation-guide-amd64 \\
        developers-reference-de debian-faq-de maint-guide-de
    python -m recipes.pretraining.german *.deb --output_dir data/german

Reads the packages without installing them. Kept are the paragraphs in German, each once: a translation is often
unfinished, and the manuals share notices. Licences stay those of the packages: the GPL, CC BY-SA, or their own.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from recipes import errors

PAGES = re.compile(r"(/de(-DE)?/[^/]+|\.de|/debian-paketmanagement\.allinone)\.html$")
SHORTEST = 60  # characters; a shorter paragraph is a label or an option
PIECE, EVERY = 20, 20  # paragraphs in a row; of so many pieces one is for validation
GERMAN = re.compile(r"\b(der|die|das|und|ist|nicht|ein|eine|mit|von|zu|für|auf|sie|werden|den|dem|wird|im|kann)\b")
ENGLISH = re.compile(r"\b(the|of|and|to|is|that|for|with|you|are|this|be|can|on|it|as|by|or|an)\b")


class Paragraphs(HTMLParser):
    """The text of each <p> and of each <div class="para">, which is what DocBook writes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._parts: list[str] | None = None
        self._hidden = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("pre", "script", "style")
        if tag in ("p", "pre", "table", "ul", "ol", "dl", "div"):
            self._end()
        if tag == "p" or (tag == "div" and ("class", "para") in attributes):
            self._parts = []

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("pre", "script", "style")
        if tag in ("p", "div"):
            self._end()

    def handle_data(self, data: str) -> None:
        if self._parts is not None and not self._hidden:
            self._parts.append(data)

    def _end(self) -> None:
        if self._parts is not None:
            self.found.append(" ".join("".join(self._parts).split()))
        self._parts = None


def pages(package: Path) -> Iterator[str]:
    """The German pages of a .deb, by name: an ar archive, of whose members data.tar.* holds the files."""
    content = package.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise ValueError(f"{package} is no Debian package; name .deb files, as apt-get download writes them.")
    position = 8
    while position < len(content):
        name, size = content[position : position + 16].decode().strip(), int(content[position + 48 : position + 58])
        start = position + 60
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(content[start : start + size])) as archive:
                    members = [member for member in archive if member.isfile() and PAGES.search(member.name)]
                    for member in sorted(members, key=lambda member: member.name):
                        yield archive.extractfile(member).read().decode("utf-8", errors="replace")
            except tarfile.TarError as error:  # Ubuntu's are compressed by zstd
                message = f"{package} has a {name} that Python cannot read ({error}); take Debian's."
                raise ValueError(message) from error
        position = start + size + size % 2


def is_german(text: str) -> bool:
    text = text.lower()
    german = len(GERMAN.findall(text))
    return german > len(text.split()) / 20 and german > 2 * len(ENGLISH.findall(text))


def paragraphs(package: Path) -> list[str]:
    found = []
    for page in pages(package):
        parser = Paragraphs()
        parser.feed(page)
        parser.close()
        found += [text for text in parser.found if len(text) >= SHORTEST and is_german(text)]
    if not found:
        raise ValueError(f"{package} has no German text; leave it out, or name its German version (-de).")
    return found


def write(packages: list[Path], folder: Path) -> None:
    kept = list(dict.fromkeys(text for package in packages for text in paragraphs(package)))
    splits: dict[str, list[str]] = {"train": [], "valid": []}
    for number, text in enumerate(kept):
        splits["valid" if number // PIECE % EVERY == EVERY - 1 else "train"].append(text)
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        path = folder / f"{split}.txt"
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        print(f"{path}: {len(texts):,} paragraphs, {path.stat().st_size:,} bytes")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help=".deb files")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for train.txt and valid.txt")
    options = parser.parse_args(words)
    try:
        write(options.packages, options.output_dir)
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
