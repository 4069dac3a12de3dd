"""weights/download.py against a local server that cuts, lies, and answers with web pages."""

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
        server = self.server
        kind = server.faults.pop(0) if server.faults else None
        server.requests.append(dict(self.headers))
        content = server.files.get(self.path)
        if kind == "rude":
            self.wfile.write(b"\x1b]0;rude\x07 words\r\n\r\n")  # no HTTP, and no text to print
            self.close_connection = True
            return None
        if kind == "rude reason":
            return self.send_error(404, "rude words")
        if kind == "rude address":
            return self.reply(302, b"", {"Location": "http://[rude words", "Content-Length": 0})
        if kind == "rude scheme":
            return self.reply(302, b"", {"Location": "file:///rude/words", "Content-Length": 0})
        if isinstance(kind, int) and kind >= 400 or content is None:
            return self.send_error(kind or 404)
        if kind == "html":
            headers = {"Content-Type": "text/html; charset=utf-8"}
            return self.reply(200, b"<html>sign in</html>", headers)
        if kind == "redirect":
            return self.reply(302, b"", {"Location": server.url + self.path, "Content-Length": 0})
        wanted = self.headers.get("Range", "bytes=0-")
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
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
        if kind == "endless":  # more than the file has, and no length is announced
            del headers["Content-Length"]
            body += bytes(20 << 20)
        self.reply(status, bytes(body), headers)

    def reply(self, status, body, headers):
        self.send_response(status, "rude words")
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.server.sent += len(body)  # before the client can have it all and look
        self.wfile.write(body)


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
    ([], 1), (["redirect"], 2), (["html"], 2), (["flip"], 2), (["other length"], 2),
    (["no length"], 1), (["no tag"], 1), ([503, 429, 500], 4), ([("cut", 100_000)], 2),
    ([("cut", 0)] * 5, 6), ([("cut", 1000), "ignore range"], 2),
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
    (["html"] * 2, "a web page"), (["flip"] * 2, "sha256"),
    (["other length"] * 2, "300,004 bytes"), ([404], "404"), ([403], "403"), ([500] * 6, "500"),
    ([("cut", 0)] * 6, "cut at 0 of 300,000 bytes")])
def test_faults_that_stay(server, fetch, tmp_path, faults, words):
    (tmp_path / "file.bin").write_bytes(b"older")
    server.faults = list(faults)
    with pytest.raises(download.DownloadError) as caught:
        fetch()
    assert server.url in str(caught.value) and words in str(caught.value)
    assert (tmp_path / "file.bin").read_bytes() == b"older" and server.faults == []


def test_a_server_that_never_ends(server, fetch, tmp_path):
    """The known size is the limit; where none is known, one by the kind of file."""
    server.faults = ["endless"]
    assert fetch() == CONTENT and len(server.requests) == 2
    for size, limit in ((len(CONTENT), "300,000"), (None, "16,777,216")):
        server.faults, server.requests = ["endless"] * 2, []
        with pytest.raises(download.DownloadError, match=f"sends more than {limit} bytes, twice"):
            fetch(size, None)
        assert len(server.requests) == 2
        (tmp_path / "file.bin").unlink(missing_ok=True)
    server.files["/file.bin"] = bytes((16 << 20) + 1)  # announced, so nothing of it is fetched
    with pytest.raises(download.DownloadError, match="announces 16,777,217 bytes, more than the 16,777,216"):
        fetch(None, None)


def test_a_server_that_sends_one_byte_at_a_time_is_given_up(server, fetch):
    server.faults = [("cut", 1)] * 200
    with pytest.raises(download.DownloadError, match="not whole after 100 attempts .cut at 100 of 300,000 bytes"):
        fetch()
    assert len(server.requests) == 100


@pytest.mark.parametrize("kind, words", [
    ("rude", "not HTTP"), ("rude reason", "answers 404 (Not Found)"), ("rude address", "leads to none"),
    ("rude scheme", "answers 302 (Found)"), (503, "answers 503 (Service Unavailable)")])
def test_no_word_of_the_server_is_printed(server, fetch, capsys, kind, words, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:10])
    server.faults = [kind] * 20
    with pytest.raises(download.DownloadError) as caught:
        fetch()
    printed = "".join(capsys.readouterr())
    assert words in str(caught.value) + printed
    for text in (str(caught.value), printed):
        assert "rude" not in text and "\x1b" not in text


def test_there_is_something_to_see_from_the_first_second(server, fetch, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(download, "receive", lambda *given, plain=download.receive: (
        shown.append(capsys.readouterr().out), plain(*given)))
    server.faults = [503]
    fetch()
    assert shown[0] == "file.bin: connecting\n"
    assert shown[1] == "file.bin: the server answers 503 (Service Unavailable); trying again in 0 s\n"
    assert "checking file.bin" in capsys.readouterr().err


def test_going_on_after_a_stop(server, fetch, tmp_path):
    """An earlier run has left a file: whole, in part, too long, or of another version."""
    part, note = tmp_path / "file.bin.part", tmp_path / "file.bin.part.etag"
    for left, tag, sent in (
            (CONTENT, None, 0),
            (CONTENT[:200_000], '"one"', 100_000),
            (CONTENT + b"x", None, 300_000),
            (b"y" * 200_000, '"two"', 300_000),
            (CONTENT[:200_000], None, 100_000)):
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


@pytest.fixture
def model(server, tmp_path, monkeypatch):
    """(the command that fetches a model of two files, the folder that it goes to)"""
    files = {"unet/config.json": [8, None], "unet/w.safetensors": [len(CONTENT), SHA256]}
    about = {"someone/model": {"revision": "abc", "files": files}}
    monkeypatch.setitem(download.OFFICIAL, "repositories", about)
    monkeypatch.setitem(download.OFFICIAL["downloads"], "sd15", {"someone/model": list(files)})
    root = "/someone/model/resolve/abc/"
    server.files = {root + "unet/config.json": b'{"a": 1}', root + "unet/w.safetensors": CONTENT}
    folder = tmp_path / "out"
    return ["sd15", "--out", str(folder), "--mirror", server.url + "/"], folder


def test_a_whole_model_from_a_mirror(server, model, tmp_path, capsys):
    """Each file at its pinned revision."""
    command, folder = model
    assert download.main(command) == 0 and len(server.requests) == 2
    assert (folder / "unet" / "w.safetensors").read_bytes() == CONTENT
    assert download.main([*command[:3], "--mirror", "somewhere"]) == 2
    assert "--mirror" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert download.main(["sd15", "--out", str(tmp_path / "file"), "--mirror", server.url]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_run_again_it_verifies_what_is_there(server, model, capsys):
    """What is right is left; a cut file, and one with a single bit flipped, are fetched again."""
    command, folder = model
    assert download.main(command) == 0 and len(server.requests) == 2
    capsys.readouterr()
    assert download.main(command) == 0 and len(server.requests) == 2
    assert "w.safetensors: already there, its sha256 is right" in capsys.readouterr().out

    path = folder / "unet" / "w.safetensors"
    flipped = bytearray(CONTENT)
    flipped[len(flipped) // 2] ^= 1
    for requests, wrong, words in (
            (3, CONTENT[:-1], "299,999 bytes"), (4, flipped, "its sha256 is")):
        path.write_bytes(wrong)
        assert download.main(command) == 0 and len(server.requests) == requests
        output = capsys.readouterr().out
        assert words in output and "fetching it again" in output
        assert path.read_bytes() == CONTENT
    (folder / "unet" / "config.json").write_bytes(b'{"a": 1 ')  # of unknown hash, but not JSON
    assert download.main(command) == 0 and len(server.requests) == 5


def test_help_says_that_it_verifies(capsys):
    with pytest.raises(SystemExit):
        download.main(["--help"])
    assert "it checks the size and sha256 of the files that are there" in " ".join(
        capsys.readouterr().out.split())


def test_a_full_disk_is_told_before_the_download(server, tmp_path):
    with pytest.raises(download.DownloadError, match="the disk has"):
        download.fetch(server.url + "/file.bin", tmp_path / "x", size=1 << 60)
    assert server.requests == []


def test_the_table_of_official_files():
    """Every listed download is a known file of a pinned revision. Weights have a sha256."""
    table = json.loads(SCRIPT.with_name("official.json").read_text())
    assert set(table["downloads"]) == {
        "sdxl-base", "sdxl-refiner", "sdxl-turbo", "sd15", "vae-fp16-fix", "clip-l"}
    for about in table["repositories"].values():
        for name, (size, sha256) in about["files"].items():
            assert size is None or size > 0
            if sha256 is None:
                assert name.endswith(".json")
            else:
                assert re.fullmatch("[0-9a-f]{64}", sha256), name
    for sources in table["downloads"].values():
        for repository, paths in sources.items():
            about = table["repositories"][repository]
            assert re.fullmatch("[0-9a-f]{40}", about["revision"])
            assert set(paths) <= set(about["files"]) and len(set(paths)) == len(paths)


def test_the_sizes_that_the_readme_names():
    table = json.loads(SCRIPT.with_name("official.json").read_text())
    rows = re.findall(r"^\| `(.+?)` \| .+ \| (.+) \| .+ \|$", SCRIPT.with_name("README.md").read_text(), re.M)
    assert {name for name, _ in rows} == set(table["downloads"])
    for name, named_size in rows:
        known = unknown = 0
        for repository, paths in table["downloads"][name].items():
            for path in paths:
                size, _ = table["repositories"][repository]["files"][path]
                known += size or 0
                unknown += size is None and path.endswith(".safetensors")
        size = f"{known / 1e9:.1f} GB"
        if unknown:
            size = f"{size} and the VAE" if known else "not known"
        assert named_size == size, name
