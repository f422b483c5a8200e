"""Download against a server on this machine that lies in every way a server can."""

import hashlib
import http.server
import threading
from types import SimpleNamespace

import pytest

from fedmentor_core.data import fetch as fetch_module
from fedmentor_core.data.catalogue import RAW_URL, CatalogueEntry, CatalogueFile, catalogue, find_corpus
from fedmentor_core.data.fetch import fetch
from fedmentor_core.errors import ConfigError, DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {"data/first file.csv": b"text,label\n" + b"invented,1\n" * 9000, "second.csv": b"text\ninvented\n"}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        state = self.server.state
        state.requests.append(self.path)
        answer = state.answers.pop(0) if state.answers else "right"
        name = self.path.removeprefix(f"/owner/name/{COMMIT}/").replace("%20", " ")
        if answer == "missing" or name not in CONTENT:
            self.send_error(404)
            return
        if answer == "busy":
            self.send_error(503)
            return
        body = CONTENT[name]
        sent = {
            "changed": body[:-3] + b"9\n\n",
            "longer": body + b"more\n",
            "truncated": body[: len(body) // 2],
        }
        self.send_response(200)
        if answer != "ends early":
            self.send_header("Content-Length", str(len(body if answer == "truncated" else sent.get(answer, body))))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if answer == "ends early" else sent.get(answer, body))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    files = tuple(
        CatalogueFile(
            file=f"corpus/{'ab'[i]}.csv",
            repo="owner/name",
            commit=COMMIT,
            path=path,
            sha256=hashlib.sha256(body).hexdigest(),
            n_bytes=len(body),
            n_rows=1,
        )
        for i, (path, body) in enumerate(CONTENT.items())
    )
    entry = CatalogueEntry(name="corpus", title="An invented corpus", licences={"owner/name": "none"}, files=files)
    monkeypatch.setattr(fetch_module, "find_corpus", lambda name: entry)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.state = SimpleNamespace(answers=[], requests=[])
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    running.state.url = f"http://127.0.0.1:{running.server_address[1]}"
    yield running.state
    running.shutdown()
    running.server_close()
    thread.join()


def get(server, folder, **options):
    return fetch("corpus", folder, base_url=server.url, backoff_seconds=0.01, timeout_seconds=5, **options)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_file_arrives_whole_with_progress(server, tmp_path):
    seen = []
    report = get(server, tmp_path, progress=lambda *step: seen.append(step))
    assert report.fetched == ("corpus/a.csv", "corpus/b.csv")
    assert (tmp_path / "corpus/a.csv").read_bytes() == CONTENT["data/first file.csv"]
    assert files_in(tmp_path) == ["corpus/a.csv", "corpus/b.csv"]
    sizes = [n for name, n, _ in seen if name == "corpus/a.csv"]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(CONTENT["data/first file.csv"]) == seen[0][2]


def test_files_that_are_right_are_not_fetched_again(server, tmp_path):
    get(server, tmp_path)
    server.requests.clear()
    assert get(server, tmp_path).already_right == ("corpus/a.csv", "corpus/b.csv")
    assert server.requests == []


def test_another_file_in_the_place_is_refused_and_left_alone(server, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.csv").write_text("mine")
    with pytest.raises(DataError, match="already there, with other content"):
        get(server, tmp_path)
    assert (tmp_path / "corpus/a.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("answers", "says", "n_requests"),
    [
        (["changed"], "got sha256 .* allowed: ", 1),
        (["longer"], "got more than the", 1),
        (["missing"], "the server answered 404; 1 of 3 tries", 1),
        (["busy"] * 3, "the server answered 503; 3 of 3 tries", 3),
        (["truncated"] * 3, "3 of 3 tries", 3),
        (["ends early"] * 3, "of .* bytes; 3 of 3 tries", 3),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing_behind(server, tmp_path, answers, says, n_requests):
    server.answers[:] = answers
    with pytest.raises(DataError, match=says):
        get(server, tmp_path)
    assert files_in(tmp_path) == []
    assert len(server.requests) == n_requests


def test_a_hiccup_is_tried_again(server, tmp_path):
    server.answers[:] = ["busy", "truncated", "right"]
    get(server, tmp_path)
    assert files_in(tmp_path) == ["corpus/a.csv", "corpus/b.csv"]


def test_what_arrived_before_a_failure_is_kept_for_the_next_time(server, tmp_path):
    server.answers[:] = ["right", "missing"]
    with pytest.raises(DataError):
        get(server, tmp_path)
    assert files_in(tmp_path) == ["corpus/a.csv"]
    assert get(server, tmp_path).fetched == ("corpus/b.csv",)


def test_no_server_is_a_clear_error(server, tmp_path):
    with pytest.raises(DataError, match=r"could not be fetched .*refused"):
        fetch("corpus", tmp_path, base_url="http://127.0.0.1:9/{repo}/{commit}/{path}", attempts=1)


def test_only_http_is_allowed(tmp_path):
    with pytest.raises(ConfigError, match="http or https"):
        fetch("irf", tmp_path, base_url="file:///etc")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"got 'dreadit'; allowed: counsel_chat, dreaddit, .*mean 'dreaddit'"):
        find_corpus("dreadit")


def test_the_catalogue_is_whole_and_pinned():
    entries = catalogue()
    assert {name: len(entry.files) for name, entry in entries.items()} == {
        "dreaddit": 10,
        "irf": 9,
        "multiwd": 8,
        "safety": 10,
        "counsel_chat": 1,
    }
    files = [file for entry in entries.values() for file in entry.files]
    assert len({file.file for file in files}) == len({file.sha256 for file in files}) == 38
    assert all(set(entry.licences) == {file.repo for file in entry.files} for entry in entries.values())
    assert RAW_URL.startswith("https://")
