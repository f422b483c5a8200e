"""Reading tables: every fault names file and place, and never quotes the text."""

import json

import pytest

from fedmentor_core.data.files import read_csv, read_jsonl, require_columns, resolve
from fedmentor_core.errors import ConfigError, DataError

SECRET = "a very private sentence"


def write(tmp_path, content, name="rows.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_keeps_every_value_as_it_is(tmp_path):
    path = write(tmp_path, '\ufefftext,label\r\n"two\nlines, ""quoted""",1\r\n\r\nNA,0\r\n')
    columns, rows = read_csv(path)
    assert columns == ["text", "label"]
    assert rows == [{"text": 'two\nlines, "quoted"', "label": "1"}, {"text": "NA", "label": "0"}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (b" \n\n", "empty file"),
        (b"text,label\n", "no rows"),
        (f"text,label\n{SECRET},1\n{SECRET},1,2\n".encode(), r"row 2 \(line 3\) has 3 fields"),
        (f'text,label\n"{SECRET},1\n'.encode(), "broken CSV near row 1"),
        (f"text,text\n{SECRET},1\n".encode(), "names a column twice"),
        (b"text,label\nfine,1\nna\xefve " + SECRET.encode() + b",0\n", r"offset 20 \(line 3, which is row 2"),
    ],
)
def test_broken_csv(tmp_path, content, says):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=says) as caught:
        read_csv(path)
    assert "rows.csv" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_jsonl_takes_missing_values_and_other_types(tmp_path):
    lines = [{"t": "a\u2028b", "y": 1}, {"t": None, "y": True, "z": 2.0}]
    path = write(tmp_path, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    columns, rows = read_jsonl(path)
    assert columns == ["t", "y", "z"]
    assert rows == [{"t": "a\u2028b", "y": "1", "z": ""}, {"t": "", "y": "true", "z": "2"}]


@pytest.mark.parametrize("line", ["[1, 2]", '{"t": "' + SECRET, "7"])
def test_jsonl_line_that_is_no_object(tmp_path, line):
    with pytest.raises(DataError, match="line 2 is not a JSON object") as caught:
        read_jsonl(write(tmp_path, '{"t": "a"}\n' + line + "\n"))
    assert SECRET not in str(caught.value)


def test_missing_root_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root is not set"):
        resolve(None, "irf/raw_train.csv", need_root=True)
    with pytest.raises(ConfigError, match="not a folder"):
        resolve(str(tmp_path / "nowhere"), "irf/raw_train.csv", need_root=True)


def test_wrong_path_names_close_files(tmp_path):
    (tmp_path / "irf").mkdir()
    write(tmp_path / "irf", "x", "raw_train.csv")
    with pytest.raises(DataError, match=r"raw_train\.csv"):
        resolve(str(tmp_path), "irf/raw_trian.csv")
    with pytest.raises(DataError, match=r"Close names .*: irf"):
        resolve(str(tmp_path), "irff/raw_train.csv")
    with pytest.raises(DataError, match="is not a file"):
        resolve(str(tmp_path), "irf")


def test_missing_column_lists_the_columns_that_exist():
    with pytest.raises(DataError, match=r"columns\.post .*'txt'.*'text', 'label'.*Did you mean 'text'"):
        require_columns("rows.csv", ["text", "label"], {"columns.post": "txt"})
