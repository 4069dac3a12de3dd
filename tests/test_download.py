"""weights/download.py against a server on this machine that cuts, lies, and answers with web pages."""

import hashlib
import importlib.util
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "weights" / "download.py"
spec = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(spec)
spec.loader.exec_module(download)

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes}. `faults`: one per request, in turn, then none; see Handler."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.sent, self.tag = {}, [], [], 0, '"one"'
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, kind = self.server, self.server.faults.pop(0) if self.server.faults else None
        server.requests.append(dict(self.headers))
        content = server.files.get(self.path)
        if isinstance(kind, int) and kind >= 400 or content is None:
            return self.send_error(kind or 404)
        if kind == "html":
            return self.reply(200, b"<html>sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if kind == "redirect":
            return self.reply(302, b"", {"Location": server.url + self.path, "Content-Length": 0})
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if kind == "ignore range" or self.headers.get("If-Range", server.tag) != server.tag:
            start = 0
        if start >= len(content):
            return self.send_error(416)
        headers, status = {"ETag": server.tag}, 206 if start else 200
        if start:
            begin = start + 1 if kind == "wrong range" else start
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        if kind == "no tag":
            del headers["ETag"]
        body = bytearray(content[start:])
        if kind == "flip":
            body[len(body) // 2] ^= 1
        if kind == "other length":
            body += b"more"
        length = len(body)
        if isinstance(kind, tuple):  # ("cut", bytes): close the connection after so many
            body = body[:kind[1]]
        if kind != "no length":
            headers["Content-Length"] = length
        self.reply(status, bytes(body), headers)

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)


@pytest.fixture
def server():
    with Server() as running:
        running.files["/file.bin"] = CONTENT
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    """fetch(size, sha256): the file's content as downloaded; nothing else may lie in the folder."""
    def run(size=len(CONTENT), sha256=SHA256, path="/file.bin"):
        target = tmp_path / "file.bin"
        try:
            download.fetch(server.url + path, target, size, sha256, pause=0.001)
        finally:
            left = {p.name for p in tmp_path.iterdir()}
            assert left <= {"file.bin", "file.bin.part", "file.bin.part.etag"}
        assert left == {"file.bin"}
        return target.read_bytes()
    return run


@pytest.mark.parametrize("faults, requests", [
    ([], 1), (["redirect"], 2), (["html"], 2), (["flip"], 2), (["other length"], 2), (["no length"], 1), (["no tag"], 1),
    ([503, 429, 500], 4), ([("cut", 100_000)], 2), ([("cut", 0)] * 5, 6), ([("cut", 1000), "ignore range"], 2),
    ([("cut", 1000), "wrong range"], 3), ([("cut", 5000), 416], 3), ([("cut", 5000), "html"], 3),
    (["redirect", ("cut", 70_000), "redirect"], 4)])
def test_faults_that_pass(server, fetch, faults, requests):
    server.faults = list(faults)
    assert fetch() == CONTENT and server.faults == [] and len(server.requests) == requests


@pytest.mark.parametrize("cuts", range(0, 21, 5))
def test_a_connection_cut_again_and_again(server, fetch, cuts):
    chance = random.Random(cuts)
    server.faults = [("cut", chance.randrange(1, 14_000)) for _ in range(cuts)]
    assert fetch() == CONTENT
    assert server.sent < 1.1 * len(CONTENT) and len(server.requests) == cuts + 1
    assert all("If-Range" in headers for headers in server.requests[1:])


@pytest.mark.parametrize("faults, words", [
    (["html"] * 2, "a web page"), (["flip"] * 2, "sha256"), (["other length"] * 2, "300,004 bytes"),
    ([404], "404"), ([403], "403"), ([500] * 6, "500"), ([("cut", 0)] * 6, "cut at 0 of 300,000 bytes")])
def test_faults_that_stay(server, fetch, tmp_path, faults, words):
    (tmp_path / "file.bin").write_bytes(b"older")
    server.faults = list(faults)
    with pytest.raises(download.DownloadError) as caught:
        fetch()
    assert server.url in str(caught.value) and words in str(caught.value)
    assert (tmp_path / "file.bin").read_bytes() == b"older" and server.faults == []


def test_going_on_after_a_stop(server, fetch, tmp_path):
    """What an earlier run has left is used: whole, in part, too long, or of another version of the file."""
    part, note = tmp_path / "file.bin.part", tmp_path / "file.bin.part.etag"
    for left, tag, sent in ((CONTENT, None, 0), (CONTENT[:200_000], '"one"', 100_000), (CONTENT + b"x", None, 300_000),
                            (b"y" * 200_000, '"two"', 300_000), (CONTENT[:200_000], None, 100_000)):
        part.write_bytes(left)
        if tag:
            note.write_text(tag)
        server.sent = 0
        assert fetch() == CONTENT and server.sent == sent
        (tmp_path / "file.bin").unlink()


@pytest.mark.parametrize("size, sha256", [(None, SHA256), (len(CONTENT), None), (None, None)])
def test_size_or_hash_not_known(server, fetch, size, sha256):
    server.faults = [("cut", 100_000)]
    assert fetch(size, sha256) == CONTENT


def test_no_server(tmp_path):
    with Server() as closed:
        url = closed.url
    with pytest.raises(download.DownloadError, match="no connection after 6 attempts"):
        download.fetch(url + "/x", tmp_path / "x", pause=0.001)


@pytest.mark.parametrize("url", ["http://[half", "http://server:port", "http://a b"])
def test_no_address(url, tmp_path):
    with pytest.raises(download.DownloadError, match="is no address"):
        download.fetch(url + "/x", tmp_path / "x", pause=0.001)


def test_json_of_unknown_hash_must_be_json(server, tmp_path):
    server.files["/config.json"] = b'{"a": 1}'
    server.faults = ["flip"]  # breaks the JSON
    download.fetch(server.url + "/config.json", tmp_path / "config.json", pause=0.001)
    assert (tmp_path / "config.json").read_bytes() == b'{"a": 1}'


def test_a_whole_model_from_a_mirror(server, tmp_path, monkeypatch, capsys):
    """Each file at its pinned revision; what is there and right is left, what is wrong is fetched again."""
    files = {"unet/config.json": [8, None], "unet/w.safetensors": [len(CONTENT), SHA256]}
    monkeypatch.setitem(download.OFFICIAL, "repositories", {"someone/model": {"revision": "abc", "files": files}})
    monkeypatch.setitem(download.OFFICIAL["downloads"], "sd15", {"someone/model": list(files)})
    root = "/someone/model/resolve/abc/"
    server.files = {root + "unet/config.json": b'{"a": 1}', root + "unet/w.safetensors": CONTENT}
    command = ["sd15", "--out", str(tmp_path / "out"), "--mirror", server.url + "/"]
    assert download.main(command) == 0 and len(server.requests) == 2
    assert (tmp_path / "out" / "unet" / "w.safetensors").read_bytes() == CONTENT
    assert download.main(command) == 0 and len(server.requests) == 2
    (tmp_path / "out" / "unet" / "w.safetensors").write_bytes(bytes(len(CONTENT)))
    assert download.main(command) == 0 and len(server.requests) == 3
    assert "fetching it again" in capsys.readouterr().out
    assert download.main([*command[:3], "--mirror", "somewhere"]) == 2
    assert "--mirror" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert download.main(["sd15", "--out", str(tmp_path / "file"), "--mirror", server.url]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_full_disk_is_told_before_the_download(server, tmp_path):
    with pytest.raises(download.DownloadError, match="the disk has"):
        download.fetch(server.url + "/file.bin", tmp_path / "x", size=1 << 60)
    assert server.requests == []


def test_the_table_of_official_files():
    """Every listed download is a known file of a pinned revision; hashes are sha256, and weights have one."""
    table = json.loads(SCRIPT.with_name("official.json").read_text())
    assert set(table["downloads"]) == {"sdxl-base", "sdxl-refiner", "sdxl-turbo", "sd15", "vae-fp16-fix", "clip-l"}
    for repository, about in table["repositories"].items():
        for name, (size, sha256) in about["files"].items():
            assert size is None or size > 0
            assert sha256 is None and name.endswith(".json") or re.fullmatch("[0-9a-f]{64}", sha256), name
    for name, sources in table["downloads"].items():
        for repository, paths in sources.items():
            assert re.fullmatch("[0-9a-f]{40}", table["repositories"][repository]["revision"])
            assert set(paths) <= set(table["repositories"][repository]["files"]) and len(set(paths)) == len(paths)
