"""An S3 that keeps its objects in a dictionary: the part of the protocol that pyarrow's client speaks, without checking signatures."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class FakeS3(ThreadingHTTPServer):
    """One bucket called `bucket`, for who has its access key."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.access_key = "id"
        self.failures = 0
        """Requests that are yet to be answered with 503."""
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeS3
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_PUT(self) -> None:
        self.route("PUT")

    def do_POST(self) -> None:
        self.route("POST")

    def do_DELETE(self) -> None:
        self.route("DELETE")

    def route(self, method: str) -> None:
        body = self.body()
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if self.server.failures > 0:
            self.server.failures -= 1
            return self.error(503, "SlowDown")
        if f"Credential={self.server.access_key}/" not in self.headers.get("Authorization", ""):
            return self.error(403, "InvalidAccessKeyId")
        if bucket != "bucket":
            return self.error(404, "NoSuchBucket")
        with self.server.lock:
            return self.of_object(method, key, query, body) if key else self.of_bucket(method, query, body)

    def body(self) -> bytes:
        """The request's body; the client sends checksummed bodies in chunks of its own (aws-chunked)."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return content
        plain = b""
        while content:
            line, _, content = content.partition(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if size == 0:
                break
            plain, content = plain + content[:size], content[size + 2 :]
        return plain

    def of_bucket(self, method: str, query: dict[str, str], body: bytes) -> None:
        if method == "POST" and "delete" in query:
            for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.server.objects.pop(key, None)
            return self.answer(200, f"<DeleteResult {XMLNS}></DeleteResult>")
        if method == "GET":
            return self.listing(query.get("prefix", ""), query.get("delimiter", ""))
        return self.answer(200)

    def listing(self, prefix: str, delimiter: str) -> None:
        keys = sorted(key for key in self.server.objects if key.startswith(prefix))
        folders = set()
        if delimiter:
            folders = {prefix + key[len(prefix) :].split(delimiter)[0] + delimiter for key in keys if delimiter in key[len(prefix) :]}
            keys = [key for key in keys if delimiter not in key[len(prefix) :]]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        count = f"<KeyCount>{len(keys) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        self.answer(200, f"<ListBucketResult {XMLNS}><Name>bucket</Name>{count}{contents}{common}</ListBucketResult>")

    def of_object(self, method: str, key: str, query: dict[str, str], body: bytes) -> None:  # noqa: PLR0911 - a table of routes
        objects, uploads = self.server.objects, self.server.uploads
        if method == "POST" and "uploads" in query:
            uploads[key] = {}
            return self.answer(200, f"<InitiateMultipartUploadResult {XMLNS}><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        if method == "POST" and "uploadId" in query:
            objects[key] = b"".join(part for _, part in sorted(uploads.pop(key).items()))
            return self.answer(200, f'<CompleteMultipartUploadResult {XMLNS}><ETag>"e"</ETag></CompleteMultipartUploadResult>')
        if method == "PUT" and "partNumber" in query:
            uploads[key][int(query["partNumber"])] = body
        elif method == "PUT" and "x-amz-copy-source" in self.headers:
            objects[key] = objects[unquote(self.headers["x-amz-copy-source"]).lstrip("/").partition("/")[2]]
            return self.answer(200, f'<CopyObjectResult {XMLNS}><ETag>"e"</ETag></CopyObjectResult>')
        elif method == "PUT":
            objects[key] = body
        elif method == "DELETE":
            objects.pop(key, None)
            return self.answer(204)
        elif key not in objects:
            return self.error(404, "NoSuchKey")
        else:
            return self.content(objects[key])
        return self.answer(200)

    def content(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, data)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        return self.answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")

    def answer(self, status: int, body: str | bytes = b"", headers: dict[str, str] | None = None) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        shared = {"ETag": '"e"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        for name, value in (shared | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""
