from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mechedit.benchmarks import fetch as fetching
from mechedit.benchmarks.fetch import FILES, FetchError, fetch

pytestmark = pytest.mark.anywhere

CONTENT = json.dumps([{"known_id": index} for index in range(5000)]).encode()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, ranges too; breaks off after `cut` bytes where that is set."""

    asked: list[str | None]
    cut: int | None
    content: bytes
    tag: str = '"first"'

    def do_GET(self):
        if self.path != "/known_1000.json":
            self.send_error(404)
            return
        begins = self.headers.get("Range")
        self.asked.append(begins)
        begin = int(begins.removeprefix("bytes=").removesuffix("-")) if begins else 0
        if self.headers.get("If-Range", self.tag) != self.tag:
            begin = 0
        if begin >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.content) - begin))
        self.send_header("ETag", self.tag)
        self.end_headers()
        self.wfile.write(self.content[begin : None if self.cut is None else begin + self.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    handler = type("Own", (Server,), {"asked": [], "cut": None, "content": CONTENT})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{served.server_port}"
    yield handler
    served.shutdown()
    served.server_close()


def test_a_file_is_fetched_once_and_its_hash_is_kept(server, tmp_path):
    said = []
    path = fetch("known", tmp_path, address=server.address, progress=lambda *each: said.append(each))
    assert path == tmp_path / "known_1000.json"
    assert path.read_bytes() == CONTENT
    assert json.loads((tmp_path / "hashes.json").read_text()) == {path.name: hashlib.sha256(CONTENT).hexdigest()}
    assert said
    fetch("known", tmp_path, address=server.address)
    assert len(server.asked) == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_download_that_broke_off_goes_on(server, tmp_path):
    server.cut = 20_000
    with pytest.raises(FetchError, match="goes on from there"):
        fetch("known", tmp_path, address=server.address)
    assert not (tmp_path / "known_1000.json").exists()
    server.cut = None
    assert fetch("known", tmp_path, address=server.address).read_bytes() == CONTENT
    begin = int(server.asked[-1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < begin <= 20_000


def test_a_whole_part_needs_nothing_more_and_one_of_another_file_is_left(server, tmp_path):
    part = tmp_path / "known_1000.json.part"
    part.write_bytes(CONTENT)
    part.with_name(part.name + ".etag").write_text(server.tag)
    assert fetch("known", tmp_path, address=server.address).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]
    for begun, tag in ((CONTENT[:100], '"older"'), (b"x" * 100, None), (CONTENT + b"more", '"first"')):
        other = tmp_path / f"{len(begun)}{tag}"
        other.mkdir()
        (other / part.name).write_bytes(begun)
        if tag:
            (other / (part.name + ".etag")).write_text(tag)
        assert fetch("known", other, address=server.address).read_bytes() == CONTENT


def test_what_changed_at_its_source_is_not_kept(server, tmp_path):
    path = fetch("known", tmp_path, address=server.address)
    path.unlink()
    server.content = CONTENT.replace(b"4999", b"5000")
    with pytest.raises(FetchError, match="changed at its source"):
        fetch("known", tmp_path, address=server.address)
    assert not path.exists()
    with pytest.raises(FetchError, match=f"{'0' * 64} expected"):
        fetch("known", tmp_path / "other", address=server.address, sha256="0" * 64)
    path.write_bytes(b"damaged")
    server.content = CONTENT
    assert fetch("known", tmp_path, address=server.address).read_bytes() == CONTENT, "a damaged file is fetched again"


PAGES = {
    "a login page": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "one after blank lines": b"\n\n \xef\xbb\xbf<html>log in</html>",
    "an answer that is no list": b'{"error": "log in"}',
    "words": b"Please log in",
    "nothing": b"",
    "a list that stops": CONTENT[:-5],
}


@pytest.mark.parametrize("name", PAGES)
def test_what_does_not_look_like_the_file_is_not_kept_nor_its_hash(name, server, tmp_path):
    server.content = PAGES[name]
    if not PAGES[name]:
        server.do_GET = lambda self: (
            self.send_response(200),
            self.send_header("Content-Length", "0"),
            self.end_headers(),
        )
    with pytest.raises(FetchError, match=r"in place of known_1000\.json. Nothing is kept"):
        fetch("known", tmp_path, address=server.address)
    assert not any(
        each.name in ("known_1000.json", "hashes.json", "known_1000.json.part") for each in tmp_path.iterdir()
    )


def test_a_hash_is_the_same_in_capitals_and_must_be_one(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = fetch("known", tmp_path, address=server.address, sha256=digest.upper())
    assert path.read_bytes() == CONTENT
    (tmp_path / "hashes.json").write_text(json.dumps({path.name: digest.upper()}))
    fetch("known", tmp_path, address=server.address)
    assert len(server.asked) == 1, "what is there has the hash that is wanted"
    for wrong in ("5", digest[:-1], digest + "\n", ""):
        with pytest.raises(FetchError, match="64 hexadecimal digits"):
            fetch("known", tmp_path, address=server.address, sha256=wrong)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("suffix", [".part", ".part.etag", ".part.lock"])
@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_link_put_where_a_download_goes_is_not_followed(suffix, link, server, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "data"
    folder.mkdir()
    getattr(folder / f"known_1000.json{suffix}", link)(victim)
    with pytest.raises(FetchError, match="no file of its own"):
        fetch("known", folder, address=server.address)
    assert victim.read_text() == "precious"


def test_a_link_of_ones_own_to_the_file_stays(server, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "known_1000.json").symlink_to(store / "known.json")
    fetch("known", tmp_path, address=server.address)
    assert (tmp_path / "known_1000.json").is_symlink()
    assert (store / "known.json").read_bytes() == CONTENT


@pytest.mark.parametrize("text", ["5", "[]", '{"known_1000.json": 5}', "[" * 100_000, "", "\\xff", "null"])
def test_hashes_that_are_none_are_told(text, server, tmp_path):
    (tmp_path / "hashes.json").write_text(text)
    with pytest.raises(FetchError, match="is damaged"):
        fetch("known", tmp_path, address=server.address)


def test_errors_say_what_to_do(server, tmp_path):
    with pytest.raises(FetchError, match="there are counterfact, zsre, known"):
        fetch("imagenet", tmp_path)
    with pytest.raises(FetchError, match=r"(?s)404.*without a network, copy the file"):
        fetch("zsre", tmp_path, address=server.address)
    with pytest.raises(FetchError, match="Nothing came; without a network"):
        fetch("known", tmp_path, address="http://127.0.0.1:9")
    (tmp_path / "hashes.json").write_text("{")
    with pytest.raises(FetchError, match=r"hashes.json is damaged"):
        fetch("known", tmp_path, address=server.address)


def test_the_command_fetches_what_is_named(server, tmp_path, monkeypatch, capsys):
    from mechedit import cli

    monkeypatch.setattr(fetching, "ADDRESS", server.address)
    assert cli.main(["fetch", "known", "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "known_1000.json") in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["fetch", "zsre", "--out", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        cli.main(["fetch", "imagenet", "--out", str(tmp_path)])
    assert set(FILES) == {"counterfact", "zsre", "known", "snippets", "idf", "vocabulary"}
