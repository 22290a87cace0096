"""Files that people bring as text: byte order marks, JSON lines, PDF and docx, and what is named and refused."""

from __future__ import annotations

import io
import json
import sys
import zipfile

import docx
import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.bench import documents
from kvprofile.corpus.sources import load_corpus
from kvprofile.corpus.text_files import read_text
from kvprofile.errors import InputError
from kvprofile.questions import user_tasks

MARK = "\ufeff".encode()
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda text: text.strip() and not text.startswith("\ufeff")
)


def pdf(*pages):
    """A PDF of one line of text a page, made by hand: what pypdf reads must not be what pypdf wrote."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode())
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
        page = f"/MediaBox [0 0 612 792] /Resources {font} /Contents {4 + 2 * number} 0 R"
        objects.append(f"<< /Type /Page /Parent 2 0 R {page} >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    content += b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    return content + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, content.index(b"xref\n0"))


def word(*parts):
    """A docx of paragraphs (strings) and tables (lists of rows)."""
    document = docx.Document()
    for part in parts:
        if isinstance(part, str):
            document.add_paragraph(part)
            continue
        table = document.add_table(len(part), len(part[0]))
        for row, cells in zip(table.rows, part, strict=True):
            for cell, text in zip(row.cells, cells, strict=True):
                cell.text = text
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()


def archive(*members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for member in members:
            made.writestr(member, "x")
    return stream.getvalue()


@given(st.lists(TEXTS, min_size=1, max_size=4), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines_are_the_same_documents_from_a_file_a_folder_and_stdin(tmp_path_factory, texts, mark, ending):
    folder = tmp_path_factory.mktemp("corpus")
    content = ending.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    content = MARK * mark + content
    (folder / "docs.jsonl").write_bytes(content)
    assert [each.text for each in load_corpus(str(folder / "docs.jsonl")).texts] == texts
    whole = load_corpus(str(folder))
    assert [each.text for each in whole.texts] == texts
    assert all(each.name.startswith("docs.jsonl/line ") for each in whole.texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert [each.text for each in load_corpus("-").texts] == texts


def test_a_limit_counts_lines(tmp_path):
    (tmp_path / "docs.jsonl").write_text('"one"\n"two"\n"three"\n')
    assert [each.name for each in load_corpus(str(tmp_path / "docs.jsonl"), limit=2).texts] == ["line 1", "line 2"]


def test_lines_that_are_not_texts_are_named(tmp_path):
    file = tmp_path / "docs.jsonl"
    for content, message in [('{"text": "a"}\n{', "line 2 is not JSON"), ('{"body": "a"}', 'line 1 has no "text"')]:
        file.write_text(content)
        with pytest.raises(InputError, match=f"docs.jsonl {message}"):
            load_corpus(str(file))


@given(TEXTS)
def test_a_byte_order_mark_is_never_text(tmp_path_factory, text):
    """In a corpus, a file of questions, a benchmark's document and its questions."""
    folder = tmp_path_factory.mktemp("marked")
    (folder / "a.md").write_bytes(MARK + text.encode())
    assert read_text(folder / "a.md") == text
    assert load_corpus(str(folder / "a.md")).texts[0].text == text
    (folder / "a.json").write_bytes(MARK + b'{"questions": [{"text": "Where?"}]}')
    assert documents.load((str(folder / "a.md"),))[0].text == text
    asked = {"context": text, "questions": [{"text": "Where?", "answer": "here"}]}
    (folder / "q.jsonl").write_bytes(MARK + json.dumps(asked).encode())
    assert user_tasks.load(str(folder / "q.jsonl"), 1, 1).exercises[0].context == text
    assert documents.load((str(folder / "q.jsonl"),))[0].text == text


def test_text_of_a_pdf(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf("The ferry leaves at nine.", "Page two."))
    assert load_corpus(str(tmp_path / "a.pdf")).texts[0].text == "The ferry leaves at nine.\n\nPage two."
    (tmp_path / "scan.pdf").write_bytes(pdf("", ""))
    with pytest.raises(InputError, match="holds no text, only pictures perhaps"):
        read_text(tmp_path / "scan.pdf")
    locked = pypdf.PdfWriter(io.BytesIO(pdf("secret")))
    locked.encrypt("key", algorithm="RC4-128")
    locked.write(tmp_path / "locked.pdf")
    with pytest.raises(InputError, match="is a PDF with a password"):
        read_text(tmp_path / "locked.pdf")
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.7\n" + b"x" * 100)
    with pytest.raises(InputError, match="is a PDF that pypdf cannot read"):
        read_text(tmp_path / "cut.pdf")


def test_text_of_a_docx(tmp_path):
    (tmp_path / "a.docx").write_bytes(word("One.", [["a", "b"], ["c", "d"]], "Zwei: ü."))
    assert load_corpus(str(tmp_path)).texts[0].text == "One.\na\tb\nc\td\nZwei: ü."
    (tmp_path / "cut.docx").write_bytes(archive("word/document.xml"))
    with pytest.raises(InputError, match="is a docx that python-docx cannot read"):
        read_text(tmp_path / "cut.docx")


@pytest.mark.parametrize(("library", "content"), [("pypdf", pdf("a")), ("docx", word("a"))])
def test_without_the_extra_the_line_says_what_to_install(tmp_path, monkeypatch, library, content):
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=r"a is a (PDF|docx); pip install 'kvprofile\[documents\]'"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (archive("xl/workbook.xml"), "an xlsx"),
        (archive("ppt/presentation.xml"), "a pptx"),
        (archive("META-INF/container.xml"), "an EPUB"),
        (archive("content.xml"), "an OpenDocument file"),
        (archive("a"), "a zip archive"),
        (b"PK\x03\x04 cut off", "a zip archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file"),
        (b"{\\rtf1 text}", "RTF"),
        (b"\x1f\x8b\x08\0", "gzip"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_other_formats_are_named(tmp_path, content, kind):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=f"a is {kind}, not UTF-8 text; convert it first"):
        load_corpus(str(tmp_path / "a"))
