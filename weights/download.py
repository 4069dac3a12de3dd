"""Fetch official weights: python weights/download.py sdxl-base [--out DIR] [--mirror URL]

Each file comes from a pinned revision, resumes after a cut, is checked by size and sha256 (official.json) and gets its
name only when it is whole. Needs the standard library and tqdm only.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
OFFICIAL = json.loads((HERE / "official.json").read_text(encoding="utf-8"))
HUB = "https://huggingface.co"
BLOCK = 1 << 20
TIMEOUT = 60  # seconds without a byte
NETWORK = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
ATTEMPTS = 6  # in a row that bring nothing new; a cut after some progress starts the count again


class DownloadError(Exception):
    """Why a file cannot be had, in one sentence."""


class Wrong(Exception):
    """What arrived cannot be the file; it is discarded and fetched once more."""


def fetch(url, target, size=None, sha256=None, pause=1.0):
    """Bring `url` to the file `target`; bytes of an earlier, cut attempt (`target`.part) are kept.

    `size`, `sha256`: of the right file, None where not known. `pause`: seconds before the second attempt, doubled for
    each further one. Raises DownloadError; `target` is then as it was before.
    """
    part, discarded, fruitless = target.with_name(target.name + ".part"), 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    if size and shutil.disk_usage(target.parent).free < size - length_of(part):
        raise DownloadError(f"{target} needs {size:,} bytes and the disk has {shutil.disk_usage(target.parent).free:,} "
                            "free; make room or choose another --out")
    while True:
        before = length_of(part)
        try:
            receive(url, part, size)
            check(part, size, sha256)
            break
        except Wrong as error:
            discard(part)
            discarded += 1
            if discarded == 2:
                raise DownloadError(f"{url}: {error}, twice; try later or another --mirror") from None
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):  # those two ask to come again later
                raise DownloadError(f"{url}: the server answers {error.code} ({error.reason}); "
                                    "check the address or try another --mirror") from None
            fruitless, reason = fruitless + 1, f"the server answers {error.code}"
        except (ValueError, http.client.InvalidURL) as error:
            raise DownloadError(f"{url}: is no address ({error}); check --mirror") from None
        except NETWORK as error:
            fruitless, reason = 0 if length_of(part) > before else fruitless + 1, getattr(error, "reason", error)
        if fruitless == ATTEMPTS:
            raise DownloadError(f"{url}: no connection after {ATTEMPTS} attempts ({reason}); the same command "
                                "goes on from here")
        time.sleep(pause * 2 ** fruitless if fruitless else 0)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    discard(part)  # only its note is left


def receive(url, part, size):
    """One request: append to `part` what it lacks. Returns when the server has sent all it announced."""
    have, note = length_of(part), part.with_name(part.name + ".etag")
    if size and have > size:
        raise Wrong(f"{have:,} bytes are there already, and the file has {size:,}")
    if have and have == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "minipic", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if note.exists():  # another version of the file since the cut: the server then sends all of it
            request.add_header("If-Range", note.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after `have`: either it is whole, which `check` finds out, or it is wrong
            if size is None:
                return
            raise Wrong(f"the server has no byte {have:,} of a file of {size:,} bytes") from None
        raise
    with answer:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise Wrong("the server sends a web page instead of the file")
        total = announced(answer, have)
        if size and total and total != size:
            raise Wrong(f"the server announces {total:,} bytes and the official file has {size:,}")
        have = have if answer.status == 206 else 0  # 200: the server ignored the range and starts again
        tag = answer.headers.get("ETag", "")
        if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
            note.write_text(tag)
        with open(part, "ab" if have else "wb") as file, tqdm(
                desc=part.name.removesuffix(".part"), total=total, initial=have, unit="B", unit_scale=True) as bar:
            while block := answer.read1(BLOCK):
                file.write(block)
                bar.update(len(block))
    if length_of(part) < (total or size or 0):
        raise ConnectionError(f"cut at {length_of(part):,} of {total or size:,} bytes")


def announced(answer, have):
    """The whole file's length by the answer's headers, None where they do not say."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length")
        return int(length) if length and length.isdigit() else None
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if not sent or int(sent[1]) != have:
        raise Wrong(f"the server sends the range {answer.headers.get('Content-Range')!r}, not from byte {have:,}")
    return int(sent[2])


def check(path, size, sha256):
    """Raise Wrong unless the file has this size and hash; of a JSON file of unknown hash, that it is JSON."""
    if size and length_of(path) != size:
        raise Wrong(f"{length_of(path):,} bytes arrived, and the official file has {size:,}")
    if sha256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise Wrong(f"its sha256 is {digest.hexdigest()[:16]}... and the official file's is {sha256[:16]}...")
    elif path.name.removesuffix(".part").endswith(".json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise Wrong("what arrived is not JSON") from None


def length_of(path):
    return path.stat().st_size if path.exists() else 0


def discard(part):
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)


def download(name, out, mirror=HUB, pause=1.0):
    """All files of one entry of official.json's `downloads` into the folder `out`; right ones already there stay."""
    if not mirror.startswith(("http://", "https://")):
        raise DownloadError(f"--mirror {mirror}: expected an address that begins with https:// or http://")
    for repository, paths in OFFICIAL["downloads"][name].items():
        about = OFFICIAL["repositories"][repository]
        for path in paths:
            size, sha256 = about["files"][path]
            target = out / path
            if target.exists():
                try:
                    check(target, size, sha256)
                    print(f"{target}: already there")
                    continue
                except Wrong as error:
                    print(f"{target}: {error}; fetching it again")
            fetch(f"{mirror.rstrip('/')}/{repository}/resolve/{about['revision']}/{path}", target, size, sha256, pause)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=OFFICIAL["downloads"], help="which model")
    parser.add_argument("--out", type=Path, help="folder for its files (default: weights/NAME)")
    parser.add_argument("--mirror", default=HUB, help="another server with the same paths (default: %(default)s)")
    arguments = parser.parse_args(argv)
    out = arguments.out or HERE / arguments.name
    try:
        download(arguments.name, out, arguments.mirror)
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{out}: cannot write there ({error}); make room or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{arguments.name} is in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
