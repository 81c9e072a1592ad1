"""An FTP view of a bucket in S3, or what speaks its protocol: STOR is a multipart upload that runs meanwhile.

`boto3` knows nothing of gevent; `patch_all()` makes its sockets wait cooperatively, so that each session has
its own pace. An upload that is aborted leaves nothing in the bucket. Try it:

    pip install boto3 'moto[server]' && moto_server -p 5000 &
    export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION=us-east-1
    python examples/object_store.py --endpoint http://127.0.0.1:5000 --create my-bucket &
    curl -T README.md ftp://alice:secret@127.0.0.1:2121/docs/README.md
    curl ftp://alice:secret@127.0.0.1:2121/docs/

Credentials and region are found as boto3 does. It listens on 127.0.0.1 only, since the password is known to
everybody. Ctrl-C or SIGTERM stops it: transfers that run have 10 seconds to finish.
"""

if __name__ == "__main__":  # before any other import; who imports this module decides for himself
    from gevent import monkey

    monkey.patch_all()

import argparse
import errno
import signal
from collections.abc import Iterator
from typing import Any

import boto3
import gevent
from botocore.config import Config
from botocore.exceptions import ClientError
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler

from bridge import GeventFTPServer
from bridge.filesystems.virtual import Entry, VirtualFS

DRAIN = 10.0  # seconds
PATIENCE = 30.0  # seconds the store may say nothing
CONNECTIONS = 50  # to the store that are kept
PART = 8 << 20  # bytes: S3 wants at least 5 MiB and at most 10 000 parts; each upload keeps one in memory


def connect(endpoint: str | None) -> Any:
    """A client of the store at *endpoint*, by default Amazon's."""
    config: Any = Config(
        connect_timeout=PATIENCE,
        read_timeout=PATIENCE,
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path"},
    )
    return boto3.client("s3", endpoint_url=endpoint, config=config)


def missing(error: ClientError) -> bool:
    """Whether there is no such object."""
    return error.response["Error"]["Code"] in ("404", "NoSuchKey")


class MultipartUpload:
    """An object that is made part by part, and there when all are."""

    def __init__(self, store: Any, bucket: str, key: str) -> None:
        self.store = store
        self.target = {"Bucket": bucket, "Key": key}
        self.upload: dict[str, Any] | None = None  # what names it, once it is more than one part
        self.parts: list[dict[str, Any]] = []
        self.part = bytearray()

    def write(self, data: bytes) -> None:
        """Keep *data*; send it if it makes a part."""
        self.part += data
        if len(self.part) >= PART:
            self.send()

    def send(self) -> None:
        """Send what is there as the next part."""
        if self.upload is None:
            begun = self.store.create_multipart_upload(**self.target)
            self.upload = {**self.target, "UploadId": begun["UploadId"]}
        number = len(self.parts) + 1
        done = self.store.upload_part(**self.upload, PartNumber=number, Body=bytes(self.part))
        self.parts.append({"PartNumber": number, "ETag": done["ETag"]})
        self.part.clear()

    def close(self) -> None:
        """Make the object."""
        if self.upload is None:
            self.store.put_object(**self.target, Body=bytes(self.part))
            return
        if self.part:
            self.send()
        self.store.complete_multipart_upload(**self.upload, MultipartUpload={"Parts": self.parts})

    def abort(self) -> None:
        """Leave nothing behind: parts of an upload that is never completed cost money."""
        if self.upload is not None:
            self.store.abort_multipart_upload(**self.upload)


class BucketFS(VirtualFS):
    """The objects in `bucket`; a directory is what several keys have before a slash."""

    store: Any
    bucket: str

    def entry(self, path: str) -> Entry | None:
        """An object of this key, or else a directory if keys begin with it."""
        key = path[1:]
        name = key.rpartition("/")[2]
        try:
            found = self.store.head_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if not missing(error):
                raise
            inside = self.store.list_objects_v2(Bucket=self.bucket, Prefix=f"{key}/", MaxKeys=1)
            return Entry(name, type="dir") if inside["KeyCount"] else None
        return Entry(name, found["ContentLength"], found["LastModified"].timestamp())

    def entries(self, path: str) -> Iterator[Entry]:
        """A thousand at a time, as they come from the store."""
        prefix = f"{path[1:]}/".lstrip("/")
        pages = self.store.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/"):
            for each in page.get("CommonPrefixes", ()):
                yield Entry(each["Prefix"][len(prefix) : -1], type="dir")
            for each in page.get("Contents", ()):
                yield Entry(each["Key"][len(prefix) :], each["Size"], each["LastModified"].timestamp())

    def open_read(self, path: str) -> Any:
        """The object's content, as it comes."""
        try:
            return self.store.get_object(Bucket=self.bucket, Key=path[1:])["Body"]
        except ClientError as error:
            if missing(error):
                raise FileNotFoundError(errno.ENOENT, "no such object") from error
            raise

    def open_write(self, path: str) -> MultipartUpload:
        """A new object, which takes the place of the one there is only when it is complete."""
        return MultipartUpload(self.store, self.bucket, path[1:])

    def remove(self, path: str) -> None:
        """Delete the object."""
        self.store.delete_object(Bucket=self.bucket, Key=path[1:])


def build(store: Any, bucket: str, port: int = 0) -> GeventFTPServer:
    """An FTP server on 127.0.0.1 that shows *bucket* of *store*, to be started."""
    users = DummyAuthorizer()
    users.add_user("alice", "secret", "/", perm="eldrw")
    filesystem = type("FS", (BucketFS,), {"store": store, "bucket": bucket})
    handler = type("Handler", (FTPHandler,), {"authorizer": users, "abstracted_fs": filesystem})
    return GeventFTPServer(("127.0.0.1", port), handler)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="An FTP view of a bucket.")
    parser.add_argument("bucket", metavar="BUCKET")
    parser.add_argument("--create", action="store_true", help="make the bucket first")
    parser.add_argument("--endpoint", metavar="URL", help="of the store (default: Amazon's)")
    parser.add_argument("--port", type=int, default=2121, help="0 for any free one (default: %(default)s)")
    options = parser.parse_args()

    store = connect(options.endpoint)
    if options.create:
        store.create_bucket(Bucket=options.bucket)
    server = build(store, options.bucket, options.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, server.stop, DRAIN)
    server.start()
    print(f"FTP: ftp://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()
    store.close()


if __name__ == "__main__":
    main()
