"""Fetch official weights: python weights/download.py sdxl-base [--out DIR] [--mirror URL]

Each file comes from a pinned revision, goes on after a cut, is checked by size and sha256, and gets
its name only when it is whole. Files that are there already are checked too, so the same command
verifies a model that was fetched before. Sizes and hashes are in official.json. Needs the standard
library and tqdm only.
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
BLOCK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
NETWORK_ERRORS = (
    urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
ATTEMPTS = 6  # in a row that bring nothing new; a cut after some progress starts the count again
ATTEMPTS_IN_ALL = 100
LIMITS = {".json": 16 << 20, ".safetensors": 16 << 30}  # bytes of files whose size is not known
LIMIT = 16 << 20  # of any other such file


class DownloadError(Exception):
    """Why a file cannot be had, in one sentence."""


class WrongFile(Exception):
    """What is there, or what arrived, cannot be the official file."""


class Cut(ConnectionError):
    """The connection ended before the file did."""


# One file ---------------------------------------------------------------------------------------


def fetch(url: str, target: Path, size: int | None = None, sha256: str | None = None,
          pause: float = 1.0):
    """Bring `url` to the file `target`. Bytes of an earlier attempt, in `target.part`, are kept.

    size, sha256: of the right file, None where not known. pause: seconds before the second attempt,
    doubled for each further one. Raises DownloadError; `target` is then as it was before.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    check_space(target, length_of(part), size)
    print(f"{target.name}: connecting", flush=True)
    discarded = 0  # wrong files that arrived; one is fetched again
    fruitless = 0  # attempts in a row that brought nothing new
    for _ in range(ATTEMPTS_IN_ALL):
        before = length_of(part)
        try:
            receive(url, part, size)
            check(part, size, sha256)
            break
        except WrongFile as error:
            discard(part)
            reason = str(error)
            discarded += 1
            if discarded == 2:
                problem = f"{error}, twice; try later or another --mirror"
                raise DownloadError(f"{url}: {problem}") from None
        except urllib.error.HTTPError as error:
            reason = describe(error)
            if error.code < 500 and error.code not in (408, 429):  # it does not ask to come again
                raise DownloadError(
                    f"{url}: {reason}; check the address or try another --mirror") from None
            fruitless += 1
        except (ValueError, http.client.InvalidURL):
            raise DownloadError(f"{url}: is no address, or leads to none; check --mirror") from None
        except NETWORK_ERRORS as error:
            reason = describe(error)
            fruitless = 0 if length_of(part) > before else fruitless + 1
        if fruitless == ATTEMPTS:
            raise DownloadError(
                f"{url}: no connection after {ATTEMPTS} attempts ({reason}); the same command goes "
                "on from here")
        wait = pause * 2 ** fruitless if fruitless else 0
        print(f"{target.name}: {reason}; trying again in {wait:.0f} s", flush=True)
        time.sleep(wait)
    else:
        raise DownloadError(
            f"{url}: not whole after {ATTEMPTS_IN_ALL} attempts ({reason}); the same command goes "
            "on from here")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    discard(part)  # only its note is left


def describe(error: Exception) -> str:
    """Why a request failed, in words of this computer; none of the server's are printed."""
    if isinstance(error, urllib.error.HTTPError):
        meaning = http.client.responses.get(error.code, "no such code")
        return f"the server answers {error.code} ({meaning})"
    cause = getattr(error, "reason", error)
    if isinstance(cause, Cut):
        return str(cause)
    if isinstance(cause, TimeoutError):
        return f"nothing came for {TIMEOUT} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return "its answer is not HTTP, or it breaks off"


def check_space(target: Path, present: int, size: int | None):
    """DownloadError where the disk has no room for the bytes of a file that are not present."""
    free = shutil.disk_usage(target.parent).free
    if size and free < size - present:
        raise DownloadError(
            f"{target} needs {size:,} bytes and the disk has {free:,} free; make room or choose "
            "another --out")


def receive(url: str, part: Path, size: int | None):
    """One request: append to `part` what it lacks. Returns when all that was announced is there."""
    present = length_of(part)
    note = note_of(part)
    if size and present > size:
        raise WrongFile(f"{present:,} bytes are there already, and the file has {size:,}")
    if size and present == size:
        return

    request = urllib.request.Request(
        url, headers={"User-Agent": "minipic", "Accept-Encoding": "identity"})
    if present:
        request.add_header("Range", f"bytes={present}-")
        if note.exists():  # of another version of the file, the server then sends all
            request.add_header("If-Range", note.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # There is nothing after these bytes: the file is whole, which `check` finds out, or wrong.
        if size is None:
            return
        raise WrongFile(
            f"the server has no byte {present:,} of a file of {size:,} bytes") from None

    with answer:
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise WrongFile("the server sends a web page instead of the file")
        total = announced_size(answer, present)
        if size and total and total != size:
            raise WrongFile(
                f"the server announces {total:,} bytes and the official file has {size:,}")
        limit = size or LIMITS.get(Path(part.stem).suffix, LIMIT)
        if total and total > limit:
            raise WrongFile(
                f"the server announces {total:,} bytes, more than the {limit:,} that are fetched")
        if answer.status != 206:  # the server ignored the range and starts again
            present = 0
        tag = answer.headers.get("ETag", "")
        if re.fullmatch('"[!-~]{1,200}"', tag):  # a weak one, W/"...", does not promise the bytes
            note.write_text(tag)
        write(answer, part, present, total or size, limit)
    if length_of(part) < (total or size or 0):
        raise Cut(f"cut at {length_of(part):,} of {total or size:,} bytes")


def announced_size(answer: http.client.HTTPResponse, present: int) -> int | None:
    """The whole file's size by the answer's headers, None where they do not say."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length")
        return int(length) if length and length.isdigit() else None
    sent = answer.headers.get("Content-Range")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", sent or "")
    if not match or int(match[1]) != present:
        raise WrongFile(f"the server sends another range than the one from byte {present:,}")
    return int(match[2])


def write(
        answer: http.client.HTTPResponse, part: Path, present: int, total: int | None, limit: int):
    """Append the answer's bytes to `part`, of which the first `present` bytes are there.

    total: bytes of the whole file, for the bar. limit: no more than these are written.
    """
    name = part.name.removesuffix(".part")
    bar = tqdm(desc=name, total=total, initial=present, unit="B", unit_scale=True)
    with open(part, "ab" if present else "wb") as file, bar:
        while block := answer.read1(BLOCK):
            present += len(block)
            if present > limit:
                raise WrongFile(f"the server sends more than {limit:,} bytes")
            file.write(block)
            bar.update(len(block))


def check(path: Path, size: int | None, sha256: str | None):
    """WrongFile unless the file has this size and hash; JSON of unknown hash must be JSON."""
    if size and length_of(path) != size:
        raise WrongFile(f"it has {length_of(path):,} bytes and the official file has {size:,}")
    if sha256:
        digest = sha256_of(path)
        if digest != sha256:
            raise WrongFile(
                f"its sha256 is {digest[:16]}... and the official file's is {sha256[:16]}...")
    elif path.name.removesuffix(".part").endswith(".json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise WrongFile("it is not JSON") from None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    name = path.name.removesuffix(".part")
    bar = tqdm(
        desc=f"checking {name}", total=length_of(path), unit="B", unit_scale=True, leave=False)
    with open(path, "rb") as file, bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def length_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def note_of(part: Path) -> Path:
    """Where the server's tag of the version that `part` belongs to is kept."""
    return part.with_name(part.name + ".etag")


def discard(part: Path):
    part.unlink(missing_ok=True)
    note_of(part).unlink(missing_ok=True)


# A model ----------------------------------------------------------------------------------------


def download(name: str, out: Path, mirror: str = HUB, pause: float = 1.0):
    """All files of one entry of official.json's `downloads` into the folder `out`.

    Files that are there and are right stay, wrong ones are fetched again.
    """
    if not mirror.startswith(("http://", "https://")):
        raise DownloadError(
            f"--mirror {mirror}: expected an address that begins with https:// or http://")
    for repository, paths in OFFICIAL["downloads"][name].items():
        about = OFFICIAL["repositories"][repository]
        root = f"{mirror.rstrip('/')}/{repository}/resolve/{about['revision']}"
        for path in paths:
            size, sha256 = about["files"][path]
            target = out / path
            if not is_right(target, size, sha256):
                fetch(f"{root}/{path}", target, size, sha256, pause)


def is_right(target: Path, size: int | None, sha256: str | None) -> bool:
    """Whether the official file is there already; says what is wrong with a file that is not it."""
    if not target.exists():
        return False
    try:
        check(target, size, sha256)
    except WrongFile as error:
        print(f"{target}: {error}; fetching it again")
        return False
    print(f"{target}: already there" + (", its sha256 is right" if sha256 else ""))
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Fetch official weights. Run again, it verifies: it checks the size and sha256 "
                    "of the files that are there and fetches those that are missing or wrong.")
    parser.add_argument("name", choices=OFFICIAL["downloads"], help="which model")
    parser.add_argument("--out", type=Path, help="folder for its files (default: weights/NAME)")
    parser.add_argument(
        "--mirror", default=HUB, help="another server with the same paths (default: %(default)s)")
    arguments = parser.parse_args(argv)
    out = arguments.out or HERE / arguments.name
    try:
        download(arguments.name, out, arguments.mirror)
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{out}: cannot write there ({error}); make room or choose another --out",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{arguments.name} is in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
