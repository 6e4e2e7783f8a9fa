import io
import json
import os
from pathlib import Path

import pytest

from knnlm.datastore.corpus import write_corpus
from knnlm.datastore.text import read_documents
from knnlm.errors import InvalidRequest
from knnlm.messages import Document
from knnlm.testing import byte_tokenizer


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\ntwo\n")
    assert list(read_documents([path])) == [Document("a.txt", "one\n\ntwo\n")]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", b"\xef\xbb\xbfone")
    lines = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "two"}')
    assert [d.text for d in read_documents([text, lines])] == ["one", "two"]


def test_json_lines_give_ids_or_line_numbers(tmp_path: Path) -> None:
    lines = '{"id": "x", "text": "one"}\n\n{"text": "two"}\n{"id": 0, "text": "three"}\n{"id": null, "text": "four"}'
    path = write(tmp_path / "a.jsonl", lines)
    documents = list(read_documents([path]))
    assert [d.id for d in documents] == ["x", "a.jsonl:3", "0", "a.jsonl:5"]
    assert [d.text for d in documents] == ["one", "two", "three", "four"]


def test_white_space_is_no_document(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.txt", " \n\t"),
        write(tmp_path / "b.jsonl", '{"text": " "}'),
        write(tmp_path / "c.md", ""),
    ]
    assert list(read_documents(paths)) == []


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"id": 1}', '{"text": 5}', '{"text": null}', '{"text": "\\ud800"}', "1" * 5000, "[" * 100_000]
)
def test_malformed_json_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
    documents = read_documents([path])
    assert next(documents).text == "fine"
    with pytest.raises(InvalidRequest, match=r"a\.jsonl, line 2"):
        next(documents)


@pytest.mark.parametrize("name", ["a\x00b", "\n", "a\x7f", "\x85"])
def test_ids_that_no_command_line_can_name_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"id": name, "text": "one"}))
    with pytest.raises(InvalidRequest, match=r'a\.jsonl, line 1: "id" has the control character'):
        list(read_documents([path]))
    with pytest.raises(InvalidRequest, match="has the control character") as caught:
        write_corpus([Document(name, "one")], byte_tokenizer(), 300, tmp_path, lambda _: None, parse_special=False)
    assert caught.value.param == "documents"


def test_a_file_whose_name_has_a_control_character_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a\nb.txt", "one")
    with pytest.raises(InvalidRequest, match=r"has the control character '.n' at 1: expected an id without"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused_with_the_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"text": "naïve"}'.encode("latin-1"))
    with pytest.raises(InvalidRequest, match=rf"{name} is not UTF-8"):
        list(read_documents([path]))


def test_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.TXT", "skip.py", ".hidden.txt", ".git/d.txt"):
        write(tmp_path / name, name)
    assert [d.id for d in read_documents([tmp_path])] == ["a.md", "b.txt", "sub/c.TXT"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="no such file or folder: nowhere"):
        list(read_documents(["nowhere"]))
    with pytest.raises(InvalidRequest, match=r"no file with one of \.txt"):
        list(read_documents([tmp_path / "empty"]))
    with pytest.raises(InvalidRequest, match=r"suffix '\.py'"):
        list(read_documents([write(tmp_path / "a.py", "x")]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    path.chmod(0)
    with pytest.raises(InvalidRequest, match=r"a\.txt cannot be read"):
        list(read_documents([path]))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('{"text": "one"}\n{"id": "b", "text": "two"}\n', [("stdin:1", "one"), ("b", "two")]),
        ('{"text": "one"}', [("stdin:1", "one")]),
        ("plain\ntext\n", [("stdin", "plain\ntext\n")]),
        ("\nplain", [("stdin", "\nplain")]),
        ("x", [("stdin", "x")]),
        ("", []),
    ],
)
def test_standard_input_is_json_lines_or_one_document(data: str, expected: list[tuple[str, str]]) -> None:
    assert list(read_documents(["-"], stdin=io.StringIO(data))) == [Document(*e) for e in expected]


def test_standard_input_errors_name_it() -> None:
    with pytest.raises(InvalidRequest, match="standard input, line 2 is not JSON"):
        list(read_documents(["-"], stdin=io.StringIO('{"text": "a"}\nnothing')))
    with pytest.raises(InvalidRequest, match="standard input is not UTF-8"):
        list(read_documents(["-"], stdin=io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")))


def test_parquet_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [0, None, 2], "other": [1, 2, 3], "text": ["one", "two", " "]}), path)
    assert list(read_documents([path])) == [Document("0", "one"), Document("a.parquet:2", "two")]
    pq.write_table(pa.table({"body": ["one"]}), path)
    with pytest.raises(InvalidRequest, match='no column "text"; it has body'):
        list(read_documents([path]))
    pq.write_table(pa.table({"text": ["one", None]}), path)
    with pytest.raises(InvalidRequest, match=r'row 2: "text" is NoneType'):
        list(read_documents([path]))
    with pytest.raises(InvalidRequest, match="is not a Parquet file"):
        list(read_documents([write(tmp_path / "b.parquet", b"PAR1 nothing PAR1")]))


def test_damaged_parquet_page_is_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i} " * 20 for i in range(500)]}), path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidRequest, match=r"a\.parquet"):
        list(read_documents([path]))
