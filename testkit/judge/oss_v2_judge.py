"""Judges the OSS test server with alibabacloud-oss-v2, the second official SDK: V1 and V4, path style and virtual host."""
import hashlib
import time
from datetime import timedelta

import alibabacloud_oss_v2 as oss
import requests

import common
from common import equal

A = common.arguments()
common.resolve_test_domain()
ODD = ["plain", "a b/ü+&?=%.txt", "dir/sub/日本", "tab\tnew\nline", "//double//", "<xml>&amp;\"'", "e" * 1023]
KIB100 = 100 * 1024


def refused(status, code, call):
    read = lambda e: (e.unwrap().status_code, e.unwrap().code)
    return common.refused(status, code, call, error=oss.exceptions.OperationError, read=read).unwrap()


class Judge:
    def __init__(self, version, host):
        self.version, self.host = version, host
        self.name = f"oss-v2-{version}-{'path' if host[0].isdigit() else 'vhost'}"
        self.client = self.open(A.key, A.secret)

    def open(self, key, secret, token=None, region=A.region):
        config = oss.config.load_default()
        config.credentials_provider = oss.credentials.StaticCredentialsProvider(key, secret, token)
        config.region, config.signature_version = region, self.version
        config.endpoint = f"http://{self.host}:{A.port}"
        config.retry_max_attempts = 1
        return oss.Client(config)

    def call(self, name, kind, client=None, **fields):
        return getattr(client or self.client, name)(getattr(oss, kind)(bucket=self.name, **fields))

    def put(self, key, body, client=None, **fields):
        return self.call("put_object", "PutObjectRequest", client, key=key, body=body, **fields)

    def get(self, key, client=None, **fields):
        return self.call("get_object", "GetObjectRequest", client, key=key, **fields)

    def head(self, key, **fields):
        return self.call("head_object", "HeadObjectRequest", key=key, **fields)

    def buckets(self):
        refused(404, "NoSuchBucket", lambda: self.get("x"))
        self.call("put_bucket", "PutBucketRequest")
        found = self.client.list_buckets(oss.ListBucketsRequest(prefix=self.name, max_keys=1))
        equal([b.name for b in found.buckets], [self.name])
        info = self.call("get_bucket_info", "GetBucketInfoRequest").bucket_info
        equal((info.name, info.location, info.acl), (self.name, "oss-" + A.region, "private"))
        equal(self.call("get_bucket_location", "GetBucketLocationRequest").location, "oss-" + A.region)
        self.put("stat", b"12345")
        stat = self.call("get_bucket_stat", "GetBucketStatRequest")
        equal((stat.object_count, stat.storage), (1, 5))
        refused(409, "BucketNotEmpty", lambda: self.call("delete_bucket", "DeleteBucketRequest"))
        self.call("delete_object", "DeleteObjectRequest", key="stat")

    def objects(self):
        for key in ODD:
            body = key.encode() * 3
            put = self.put(key, body, metadata={"who": "judge"}, content_type="text/x-odd")
            equal(put.etag.strip('"'), hashlib.md5(body).hexdigest().upper(), key)
            got = self.get(key)
            equal(got.body.read(), body, key)
            equal((got.hash_crc64, got.metadata["who"]), (put.hash_crc64, "judge"), key)
            head = self.head(key)
            equal((head.content_length, head.content_type, head.object_type), (len(body), "text/x-odd", "Normal"), key)
            assert abs(head.last_modified.timestamp() - time.time()) < 60
            meta = self.call("get_object_meta", "GetObjectMetaRequest", key=key)
            equal((meta.content_length, meta.etag), (len(body), put.etag), key)
        equal(self.get("plain", response_content_type="x/y").content_type, "x/y")
        refused(404, "NoSuchKey", lambda: self.get("none"))
        refused(404, "NoSuchKey", lambda: self.head("none"))
        assert not self.client.is_object_exist(self.name, "none") and self.client.is_object_exist(self.name, "plain")
        self.put("empty", b"")
        equal(self.get("empty").body.read(), b"")
        refused(400, "InvalidDigest", lambda: self.put("md5", b"x", content_md5="1B2M2Y8AsgTpgAmY7PhCfg=="))
        self.put("once", b"1")
        refused(409, "FileAlreadyExists", lambda: self.put("once", b"2", forbid_overwrite=True))
        equal(self.get("once").body.read(), b"1")

    def ranges_and_conditions(self):
        data = bytes(range(250)) * 4
        etag = self.put("r", data).etag
        equal(self.get("r", range_header="bytes=10-19").body.read(), data[10:20])
        got = self.get("r", range_header="bytes=500-2000", range_behavior="standard")
        equal((got.status_code, got.content_range, got.body.read()), (206, "bytes 500-999/1000", data[500:]))
        refused(416, "InvalidRange", lambda: self.get("r", range_header="bytes=1000-", range_behavior="standard"))
        equal(self.get("r", range_header="bytes=500-2000").body.read(), data)
        equal(self.get("r", if_match=etag).body.read(), data)
        refused(412, "PreconditionFailed", lambda: self.get("r", if_match='"0"'))
        for call in (self.get, self.head):
            try:
                call("r", if_none_match=etag)
                raise AssertionError("not 304")
            except oss.exceptions.OperationError as e:
                equal(e.unwrap().status_code, 304)

    def append(self):
        append = lambda position, body: self.call("append_object", "AppendObjectRequest", key="log", position=position, body=body)
        equal(append(0, b"hello ").next_position, 6)
        equal(append(6, b"world").next_position, 11)
        e = refused(409, "PositionNotEqualToLength", lambda: append(3, b"x"))
        equal(e.headers["x-oss-next-append-position"], "11")
        head = self.head("log")
        equal((head.object_type, head.next_append_position), ("Appendable", 11))
        equal(self.get("log").body.read(), b"hello world")

    def lists(self):
        for i in range(25):
            self.put(f"l/{i:02d}", b"x" * i)
        for key in ["l/d1/a", "l/d1/b", "l/d2/a", "l/&<\n>"]:
            self.put(key, b"d")
        names = sorted([f"l/{i:02d}" for i in range(25)] + ["l/d1/", "l/d2/", "l/&<\n>"])
        for size in (1, 3, 7, 1000):
            pages = list(self.client.list_objects_v2_paginator(limit=size).iter_page(oss.ListObjectsV2Request(bucket=self.name, prefix="l/", delimiter="/")))
            seen = [o.key for p in pages for o in p.contents or []] + [c.prefix for p in pages for c in p.common_prefixes or []]
            equal(sorted(seen), names, f"v2, {size} a page")
            equal(sum(p.key_count for p in pages), len(names))
            pages = list(self.client.list_objects_paginator(limit=size).iter_page(oss.ListObjectsRequest(bucket=self.name, prefix="l/", delimiter="/")))
            seen = [o.key for p in pages for o in p.contents or []] + [c.prefix for p in pages for c in p.common_prefixes or []]
            equal(sorted(seen), names, f"v1, {size} a page")
        page = self.call("list_objects_v2", "ListObjectsV2Request", prefix="l/", start_after="l/20", max_keys=2, fetch_owner=True)
        equal([(o.key, o.object_type, o.size, o.owner.display_name) for o in page.contents], [("l/21", "Normal", 21, "efc"), ("l/22", "Normal", 22, "efc")])
        refused(400, "InvalidArgument", lambda: self.call("list_objects_v2", "ListObjectsV2Request", max_keys=1001))

    def multipart(self):
        one, two = b"1" * KIB100, b"2" * 1000
        start = lambda key: self.call("initiate_multipart_upload", "InitiateMultipartUploadRequest", key=key).upload_id
        part = lambda key, up, n, body: self.call("upload_part", "UploadPartRequest", key=key, upload_id=up, part_number=n, body=body)
        up = start("multi ü")
        uploads = self.call("list_multipart_uploads", "ListMultipartUploadsRequest").uploads
        equal([(u.key, u.upload_id) for u in uploads], [("multi ü", up)])
        parts = [oss.UploadPart(part_number=n, etag=part("multi ü", up, n, body).etag) for n, body in ((1, one), (2, two))]
        listed = self.call("list_parts", "ListPartsRequest", key="multi ü", upload_id=up).parts
        equal([(p.part_number, p.size) for p in listed], [(1, len(one)), (2, len(two))])
        complete = lambda key, up, **more: self.call("complete_multipart_upload", "CompleteMultipartUploadRequest", key=key, upload_id=up, **more)
        wrong = oss.CompleteMultipartUpload(parts=parts[::-1])
        refused(400, "InvalidPartOrder", lambda: complete("multi ü", up, complete_multipart_upload=wrong))
        done = complete("multi ü", up, complete_multipart_upload=oss.CompleteMultipartUpload(parts=parts))
        digest = hashlib.md5(hashlib.md5(one).digest() + hashlib.md5(two).digest()).hexdigest().upper()
        equal((done.key, done.etag), ("multi ü", f'"{digest}-2"'))
        got = self.get("multi ü")
        equal((got.body.read(), got.object_type, got.hash_crc64), (one + two, "Multipart", done.hash_crc64))
        up = start("copied")
        for n, wanted in ((1, f"bytes=0-{KIB100 - 1}"), (2, f"bytes={KIB100}-{KIB100 + 999}")):
            self.call("upload_part_copy", "UploadPartCopyRequest", key="copied", upload_id=up, part_number=n, source_key="multi ü", source_range=wanted)
        complete("copied", up, complete_all="yes")
        equal(self.get("copied").body.read(), one + two)
        up = start("gone")
        self.call("abort_multipart_upload", "AbortMultipartUploadRequest", key="gone", upload_id=up)
        refused(404, "NoSuchUpload", lambda: part("gone", up, 1, b"x"))

    def copies_links_tags(self):
        self.put("src ü", b"body", metadata={"a": "1"})
        copy = lambda **more: self.call("copy_object", "CopyObjectRequest", key="dst", source_key="src ü", **more)
        equal(copy().etag, self.head("src ü").etag)
        equal(self.head("dst").metadata["a"], "1")
        copy(metadata_directive="REPLACE", metadata={"a": "2"})
        equal(self.head("dst").metadata["a"], "2")
        refused(412, "PreconditionFailed", lambda: copy(if_match='"0"'))
        self.call("put_symlink", "PutSymlinkRequest", key="link", symlink_target="src%20%C3%BC")
        equal(self.call("get_symlink", "GetSymlinkRequest", key="link").target, "src%20%C3%BC")
        equal((self.get("link").body.read(), self.head("link").object_type), (b"body", "Symlink"))
        tags = oss.Tagging(tag_set=oss.TagSet(tags=[oss.Tag(key="k ü", value="v&1")]))
        self.call("put_object_tagging", "PutObjectTaggingRequest", key="dst", tagging=tags)
        got = self.call("get_object_tagging", "GetObjectTaggingRequest", key="dst").tag_set.tags
        equal([(t.key, t.value) for t in got], [("k ü", "v&1")])
        equal(self.head("dst").tagging_count, 1)

    def signatures(self):
        self.put("signed ü", b"body")
        sign = lambda client, seconds=60: client.presign(oss.GetObjectRequest(bucket=self.name, key="signed ü"), expires=timedelta(seconds=seconds)).url
        url = sign(self.client)
        equal(requests.get(url).content, b"body")
        equal(requests.delete(url).status_code, 403)
        put = self.client.presign(oss.PutObjectRequest(bucket=self.name, key="by-url"))
        equal(requests.put(put.url, data=b"put", headers=put.signed_headers).status_code, 200)
        equal(self.get("by-url").body.read(), b"put")
        refused(403, "SignatureDoesNotMatch", lambda: self.get("plain", self.open(A.key, "wrong")))
        refused(403, "InvalidAccessKeyId", lambda: self.get("plain", self.open("nobody", A.secret)))
        sts = self.open(A.sts_key, A.sts_secret, A.sts_token)
        equal(requests.get(sign(sts)).content, b"body")
        if self.version == "v4":  # with V1 this SDK sends the token in a header that is not OSS's
            equal(self.get("signed ü", sts).body.read(), b"body")
            refused(403, "InvalidSecurityToken", lambda: self.get("plain", self.open(A.sts_key, A.sts_secret, "old")))
            refused(400, "AuthorizationHeaderMalformed", lambda: self.get("plain", self.open(A.key, A.secret, region="mars")))

    def clean_up(self):
        while True:
            keys = [o.key for o in self.call("list_objects_v2", "ListObjectsV2Request", max_keys=1000).contents or []]
            if not keys:
                break
            objects = [oss.DeleteObject(key=k) for k in keys]
            done = self.call("delete_multiple_objects", "DeleteMultipleObjectsRequest", encoding_type="url", objects=objects)
            equal(sorted(d.key for d in done.deleted_objects), sorted(keys))
        self.call("delete_bucket", "DeleteBucketRequest")
        refused(404, "NoSuchBucket", lambda: self.call("get_bucket_info", "GetBucketInfoRequest"))

    def run(self):
        for step in (self.buckets, self.objects, self.ranges_and_conditions, self.append, self.lists, self.multipart,
                     self.copies_links_tags, self.signatures, self.clean_up):
            start = time.time()
            step()
            print(f"{self.name}: {step.__name__} ok ({time.time() - start:.2f} s)", flush=True)


for version in ("v1", "v4"):
    for host in ("127.0.0.1", common.DOMAIN):
        Judge(version, host).run()
