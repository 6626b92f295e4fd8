"""Multi-part uploads to S3 that were never completed: no listing of objects shows their parts, but they cost money."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger(__name__)

_MOST_PAGES = 1000


class UnfinishedUploads:
    """The unfinished uploads below a place; on other file systems than S3 there are none.

    Args:
        system: File system of fsspec.
        since: When the writer began; younger uploads may be those of another writer at work.
    """

    def __init__(self, system: Any, since: datetime | None = None) -> None:  # noqa: ANN401 - fsspec has no types
        protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
        self._system = system if "s3" in protocols and hasattr(system, "call_s3") else None
        self._since = since or datetime.now(UTC)
        self._complained = False

    @property
    def exist(self) -> bool:
        """Whether the file system has such uploads."""
        return self._system is not None

    def abort(self, path: str, *, below: bool = False, known: frozenset[str] | None = None) -> frozenset[str]:
        """Abort uploads, and so delete their parts.

        Storage that does not allow it is no error: one warning says how to delete them.

        Args:
            path: Bucket and key.
            below: Abort those of every key below `path` too.
            known: Abort all but these; None: those that began before this writer.

        Returns:
            The identifiers of uploads that were left alone.
        """
        if self._system is None:
            return frozenset()
        bucket, _, key = path.partition("/")
        n_aborted, left = 0, set()
        try:
            for upload in list(self._iter_uploads(bucket, key)):
                if upload["Key"] != key and not (below and upload["Key"].startswith(f"{key}/")):
                    continue
                if upload["Initiated"] < self._since if known is None else upload["UploadId"] not in known:
                    self._abort(bucket, upload)
                    n_aborted += 1
                else:
                    left.add(upload["UploadId"])
        except FileNotFoundError:  # no such bucket, or another process was faster
            return frozenset(left)
        except OSError as error:
            self._complain(path, error)
        if n_aborted:
            logger.info(f"aborted {n_aborted:,} unfinished upload{'s' * (n_aborted > 1)} below 's3://{path}'")
        return frozenset(left)

    def find(self, path: str) -> frozenset[str]:
        """Identifiers of the unfinished uploads of one key; none where they cannot be listed."""
        if self._system is None:
            return frozenset()
        bucket, _, key = path.partition("/")
        try:
            return frozenset(each["UploadId"] for each in self._iter_uploads(bucket, key) if each["Key"] == key)
        except OSError:
            return frozenset()

    def _iter_uploads(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """All unfinished uploads of keys that start with a prefix."""
        assert self._system is not None
        place: dict[str, str] = {}
        for _ in range(_MOST_PAGES):
            page = self._system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **place)
            yield from page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return
            place = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, bucket: str, upload: dict[str, Any]) -> None:
        """Abort one upload."""
        assert self._system is not None
        self._system.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _complain(self, path: str, error: OSError) -> None:
        """Say once that uploads cannot be listed or aborted."""
        if not self._complained:
            self._complained = True
            logger.warning(
                f"unfinished uploads below 's3://{path}' cannot be listed or aborted ({error}); parts of killed builds "
                "may stay in the bucket. Permit s3:ListBucketMultipartUploads and s3:AbortMultipartUpload, or give the "
                "bucket a lifecycle rule that deletes incomplete uploads"
            )
