"""German prose out of Debian packages: what is kept of a page, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from recipes.pretraining import german

ABOUT = "Absatz Nummer {} handelt von der Verwaltung der Pakete, die auf dem <code>System</code> installiert sind."
PAGE = """<html><head><style>p {{ color: red }}</style></head><body><h1>Die Pakete und das System</h1>
{}<pre>der die das und ist nicht ein eine mit von zu</pre>
<p>This paragraph has not been translated, and is of no use to a model that is to learn the other language.</p>
<p>Zu kurz.</p>
<div class="para">Auch so stehen Abs&auml;tze in den Seiten, die aus DocBook entstanden sind.</div>
</body></html>"""


def write_package(path: Path, pages: dict[str, str]) -> Path:
    """A .deb, as `ar` writes it, of an odd length in the middle."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, page in pages.items():
            member = tarfile.TarInfo(f"./usr/share/doc/{name}")
            member.size = len(page.encode())
            archive.addfile(member, io.BytesIO(page.encode()))
    content = b"!<arch>\n"
    for name, body in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    path.write_bytes(content)
    return path


def test_german_paragraphs_are_kept_once_and_divided_in_pieces(tmp_path, capsys):
    page = PAGE.format("".join(f"<p>{ABOUT.format(n)}</p>" for n in range(800)))
    one = write_package(tmp_path / "one.deb", {"de/a.html": page, "en/a.html": page.replace("Absatz", "Paragraph")})
    two = write_package(tmp_path / "two.deb", {"b.de.html": page})
    assert german.main([str(one), str(two), "--output_dir", str(tmp_path / "text")]) == 0
    splits = {split: (tmp_path / "text" / f"{split}.txt").read_text(encoding="utf-8") for split in ("train", "valid")}
    paragraphs = {split: text.strip().split("\n\n") for split, text in splits.items()}
    assert paragraphs["valid"] == [
        ABOUT.format(n).replace("<code>", "").replace("</code>", "") for n in [*range(380, 400), *range(780, 800)]
    ]
    assert len(paragraphs["train"]) == len(set(paragraphs["train"])) == 761
    assert paragraphs["train"][-1] == "Auch so stehen Absätze in den Seiten, die aus DocBook entstanden sind."
    assert "761 paragraphs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({"en/a.html": "<p>x</p>"}, "has no German text; leave it out, or name its German version (-de)."),
        (b"text", "is no Debian package; name .deb files"),
        (f"!<arch>\n{'data.tar.zst':<48}{4:<10}`\nzstd".encode(), "has a data.tar.zst that Python cannot read"),
    ],
)
def test_what_has_no_german_text_is_refused(tmp_path, capsys, pages, message):
    path = tmp_path / "x.deb"
    path.write_bytes(pages) if isinstance(pages, bytes) else write_package(path, pages)
    assert german.main([str(path), "--output_dir", str(tmp_path / "text")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "text").exists()
