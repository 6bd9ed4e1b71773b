"""Fetching Omniglot, against a server of our own on this machine."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mann_fast.data import FetchError, cache_folder, fetch_omniglot
from mann_fast.data.fetch import CHECKSUMS, OFFICIAL

CONTENT = {name: bytes(i * j % 251 for i in range(200_000)) for j, name in enumerate(CHECKSUMS, 3)}
MD5 = {name: hashlib.md5(data).hexdigest() for name, data in CONTENT.items()}
NAMES = list(CONTENT)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path.rsplit("/", 1)[1], self.headers.get("Range")))
        data = server.content.get(self.path.rsplit("/", 1)[1])
        if data is None:
            self.send_error(404)
            return
        begin = 0
        wanted = re.match(r"bytes=(\d+)-$", self.headers.get("Range") or "")
        if wanted and server.ranges:
            begin = int(wanted[1])
            if begin >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.length:
            self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        body = data[begin:]
        if server.break_after is not None:
            body = body[: server.break_after]
            server.break_after = None
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.requests = dict(CONTENT), []
    server.ranges, server.length, server.break_after = True, True, None
    server.url = f"http://127.0.0.1:{server.server_port}/python"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch(server, folder, **options):
    return fetch_omniglot(folder, base_url=server.url, checksums=MD5, progress=False, **options)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_fetches_both_archives_once(server, tmp_path):
    assert fetch(server, tmp_path / "new" / "cache") == tmp_path / "new" / "cache"
    assert files(tmp_path / "new" / "cache") == CONTENT
    fetch(server, tmp_path / "new" / "cache")
    assert server.requests == [(name, None) for name in NAMES]


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_after_a_broken_transfer(server, tmp_path, ranges):
    server.ranges, server.break_after = ranges, 70_000
    with pytest.raises(FetchError, match=r"broke after 70000 of 200000 bytes\); 70000 bytes are kept"):
        fetch(server, tmp_path)
    assert files(tmp_path) == {f"{NAMES[0]}.part": CONTENT[NAMES[0]][:70_000]}
    fetch(server, tmp_path)
    assert server.requests[1] == (NAMES[0], "bytes=70000-")
    assert files(tmp_path) == CONTENT


def test_breaks_off_twice_and_resumes(server, tmp_path):
    for at in (50_000, 60_000):
        server.break_after = at
        with pytest.raises(FetchError, match="are kept"):
            fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert [request[1] for request in server.requests[:3]] == [None, "bytes=50000-", "bytes=110000-"]
    assert files(tmp_path) == CONTENT


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    (tmp_path / f"{NAMES[0]}.part").write_bytes(CONTENT[NAMES[0]])
    fetch(server, tmp_path)
    assert files(tmp_path) == CONTENT


@pytest.mark.parametrize("part", [b"something else", b"x" * 300_000])
def test_a_wrong_part_is_removed_and_the_next_try_succeeds(server, tmp_path, part):
    (tmp_path / f"{NAMES[0]}.part").write_bytes(part)
    with pytest.raises(FetchError, match="expected .*; the file was removed, try again"):
        fetch(server, tmp_path)
    assert files(tmp_path) == {}
    fetch(server, tmp_path)
    assert files(tmp_path) == CONTENT


def test_a_wrong_checksum_leaves_nothing_and_keeps_what_was_there(server, tmp_path):
    server.content[NAMES[1]] = b"not the archive"
    with pytest.raises(FetchError, match=f"{NAMES[1]} has MD5 .*, expected {MD5[NAMES[1]]}"):
        fetch(server, tmp_path)
    assert files(tmp_path) == {NAMES[0]: CONTENT[NAMES[0]]}


def test_a_damaged_archive_in_the_cache_is_fetched_again(server, tmp_path):
    (tmp_path / NAMES[0]).write_bytes(CONTENT[NAMES[0]][:1000])
    fetch(server, tmp_path)
    assert files(tmp_path) == CONTENT


def test_a_server_that_does_not_tell_the_length(server, tmp_path):
    server.length = False
    reports = []
    fetch_omniglot(
        tmp_path, base_url=server.url, checksums=MD5, progress=lambda *report: reports.append(report)
    )
    assert files(tmp_path) == CONTENT
    assert reports[-1] == (NAMES[1], 200_000, None)


def test_progress_counts_to_the_whole(server, tmp_path):
    (tmp_path / f"{NAMES[0]}.part").write_bytes(CONTENT[NAMES[0]][:150_000])
    reports = []
    fetch_omniglot(
        tmp_path, base_url=server.url, checksums=MD5, progress=lambda *report: reports.append(report)
    )
    first = [report for report in reports if report[0] == NAMES[0]]
    assert all(total == 200_000 for _, _, total in reports)
    assert 150_000 < first[0][1] <= first[-1][1] == 200_000
    assert [have for _, have, _ in first] == sorted(have for _, have, _ in first)


def test_the_bar_works_and_is_silent_without_a_terminal(server, tmp_path, capsys):
    fetch_omniglot(tmp_path, base_url=server.url, checksums=MD5)
    assert files(tmp_path) == CONTENT
    assert capsys.readouterr() == ("", "")


def test_not_found(server, tmp_path):
    del server.content[NAMES[0]]
    with pytest.raises(
        FetchError, match=f"{NAMES[0]} could not be fetched: the server answered 404 Not Found"
    ):
        fetch(server, tmp_path)
    assert files(tmp_path) == {}


def test_offline(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        FetchError, match=f"(?s)could not be fetched .*put {NAMES[0]} into .* by hand"
    ) as caught:
        fetch(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == {}


def test_official_place_and_checksums():
    assert OFFICIAL == "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    assert CHECKSUMS == {
        "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
        "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
    }


def test_cache_folder(monkeypatch, tmp_path, server):
    monkeypatch.delenv("MANN_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mann_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mann_fast"
    monkeypatch.setenv("MANN_FAST_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert fetch(server, None) == tmp_path / "own" / "omniglot"
    assert files(tmp_path / "own" / "omniglot") == CONTENT
