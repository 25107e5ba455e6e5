"""Judges the OSS test server with oss2, the first official SDK: V1 and V4, path style and virtual host."""
import hashlib
import time

import oss2
import requests
from oss2.models import PartInfo, Tagging, TaggingRule

import common
from common import equal

A = common.arguments()
common.resolve_test_domain()
ODD = ["plain", "a b/ü+&?=%.txt", "dir/sub/日本", "tab\tnew\nline", "//double//", "<xml>&amp;\"'", "e" * 1023]
KIB100 = 100 * 1024


def refused(status, code, call):
    return common.refused(status, code, call, error=oss2.exceptions.OssError, read=lambda e: (e.status, e.code))


def _crc(data):
    c = oss2.utils.Crc64()
    c.update(data)
    return c.crc


class Judge:
    def __init__(self, version, host):
        self.version, self.host = version, host
        self.endpoint = f"http://{host}:{A.port}"
        self.name = f"oss2-{version}-{'path' if host[0].isdigit() else 'vhost'}"
        self.bucket = self.open(A.key, A.secret)
        self.service = oss2.Service(self.auth(A.key, A.secret), self.endpoint, region=A.region)

    def auth(self, key, secret, token=None):
        provider = oss2.credentials.StaticCredentialsProvider(key, secret, token)
        return oss2.ProviderAuthV4(provider) if self.version == "v4" else oss2.ProviderAuth(provider)

    def open(self, key, secret, token=None, bucket=None, region=A.region):
        return oss2.Bucket(self.auth(key, secret, token), self.endpoint, bucket or self.name, region=region)

    def buckets(self):
        b = self.bucket
        refused(404, "NoSuchBucket", lambda: b.get_object("x"))
        b.create_bucket()
        assert self.name in [i.name for i in self.service.list_buckets().buckets]
        found = self.service.list_buckets(prefix=self.name, max_keys=1)
        equal([i.name for i in found.buckets], [self.name])
        info = b.get_bucket_info()
        equal((info.name, info.location, info.acl.grant), (self.name, "oss-" + A.region, "private"))
        equal(b.get_bucket_location().location, "oss-" + A.region)
        equal(b.get_bucket_acl().acl, "private")
        b.put_object("stat", b"12345")
        stat = b.get_bucket_stat()
        equal((stat.object_count, stat.storage_size_in_bytes), (1, 5))
        refused(409, "BucketNotEmpty", b.delete_bucket)
        b.delete_object("stat")

    def objects(self):
        b = self.bucket
        for key in ODD:
            body = key.encode() * 3
            put = b.put_object(key, body, headers={"x-oss-meta-who": "judge", "Content-Type": "text/x-odd"})
            equal(put.etag, hashlib.md5(body).hexdigest().upper(), key)
            equal(put.crc, _crc(body), key)
            got = b.get_object(key)
            equal(got.read(), body, key)
            equal(got.server_crc, got.client_crc, key)
            head = b.head_object(key)
            equal((head.content_length, head.content_type, head.object_type), (len(body), "text/x-odd", "Normal"), key)
            equal(head.headers["x-oss-meta-who"], "judge")
            assert abs(head.last_modified - time.time()) < 60
            meta = b.get_object_meta(key)
            equal((meta.content_length, meta.etag), (len(body), put.etag), key)
            assert b.object_exists(key)
        equal(b.get_object("plain", params={"response-content-type": "x/y"}).headers["Content-Type"], "x/y")
        refused(404, "NoSuchKey", lambda: b.get_object("none"))
        assert not b.object_exists("none")
        equal(refused(404, "NoSuchKey", lambda: b.get_object_meta("none")).status, 404)
        b.delete_object("none")
        b.put_object("empty", b"")
        equal(b.get_object("empty").read(), b"")
        refused(400, "InvalidDigest", lambda: b.put_object("md5", b"x", headers={"Content-MD5": "1B2M2Y8AsgTpgAmY7PhCfg=="}))
        b.put_object("once", b"1")
        refused(409, "FileAlreadyExists", lambda: b.put_object("once", b"2", headers={"x-oss-forbid-overwrite": "true"}))
        equal(b.get_object("once").read(), b"1")

    def ranges_and_conditions(self):
        b = self.bucket
        data = bytes(range(250)) * 4
        etag = b.put_object("r", data).etag
        equal(b.get_object("r", byte_range=(10, 19)).read(), data[10:20])
        equal(b.get_object("r", byte_range=(990, None)).read(), data[990:])
        equal(b.get_object("r", byte_range=(None, 5)).read(), data[-5:])
        standard = {"x-oss-range-behavior": "standard"}
        got = b.get_object("r", byte_range=(500, 2000), headers=standard)
        equal((got.status, got.headers["Content-Range"], got.read()), (206, "bytes 500-999/1000", data[500:]))
        refused(416, "InvalidRange", lambda: b.get_object("r", byte_range=(1000, 2000), headers=standard))
        for wrong in [(500, 2000), (1000, 2000)]:
            got = b.get_object("r", byte_range=wrong)
            equal((got.status, got.read()), (200, data), f"range {wrong}")
        quoted = f'"{etag}"'
        for tag in (etag, quoted):
            equal(b.get_object("r", headers={"If-Match": tag}).read(), data)
        refused(412, "PreconditionFailed", lambda: b.get_object("r", headers={"If-Match": '"0"'}))
        for call in (b.get_object, b.head_object):
            e = None
            try:
                call("r", headers={"If-None-Match": quoted})
            except oss2.exceptions.NotModified as caught:
                e = caught
            equal(e and e.status, 304)
        equal(b.get_object("r", headers={"If-None-Match": '"0"'}).read(), data)
        past, future = "Sat, 01 Jan 2000 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
        equal(b.get_object("r", headers={"If-Modified-Since": past}).status, 200)
        refused(412, "PreconditionFailed", lambda: b.get_object("r", headers={"If-Unmodified-Since": past}))
        try:
            b.get_object("r", headers={"If-Modified-Since": future})
            raise AssertionError("not 304")
        except oss2.exceptions.NotModified:
            pass

    def append(self):
        b = self.bucket
        first = b.append_object("log", 0, b"hello ")
        equal(first.next_position, 6)
        second = b.append_object("log", 6, b"world", init_crc=first.crc)
        equal((second.next_position, second.crc), (11, _crc(b"hello world")))
        e = refused(409, "PositionNotEqualToLength", lambda: b.append_object("log", 0, b"x"))
        equal(e.next_position, 11)
        head = b.head_object("log")
        equal((head.object_type, head.headers["x-oss-next-append-position"]), ("Appendable", "11"))
        equal(b.get_object("log").read(), b"hello world")
        b.put_object("fixed", b"x")
        refused(409, "ObjectNotAppendable", lambda: b.append_object("fixed", 1, b"y"))

    def lists(self):
        b = self.bucket
        for i in range(25):
            b.put_object(f"l/{i:02d}", b"x" * i)
        for key in ["l/d1/a", "l/d1/b", "l/d2/a", "l/&<\n>"]:
            b.put_object(key, b"d")
        names = sorted([f"l/{i:02d}" for i in range(25)] + ["l/d1/", "l/d2/", "l/&<\n>"])
        for size in (1, 3, 7, 28, 1000):
            seen = [o.key for o in oss2.ObjectIterator(b, prefix="l/", delimiter="/", max_keys=size)]
            equal(seen, names, f"v1, {size} a page")
            seen = [o.key for o in oss2.ObjectIteratorV2(b, prefix="l/", delimiter="/", max_keys=size)]
            equal(sorted(seen), names, f"v2, {size} a page")
        flat = [o.key for o in oss2.ObjectIteratorV2(b, prefix="l/d", max_keys=2)]
        equal(flat, ["l/d1/a", "l/d1/b", "l/d2/a"])
        page = b.list_objects_v2(prefix="l/", start_after="l/20", max_keys=2, fetch_owner=True)
        equal([o.key for o in page.object_list], ["l/21", "l/22"])
        assert page.object_list[0].owner.id and page.is_truncated
        equal((page.object_list[0].type, page.object_list[0].size), ("Normal", 21))
        equal(page.object_list[0].etag, b.head_object("l/21").etag)
        refused(400, "InvalidArgument", lambda: b.list_objects(max_keys=1001))
        refused(400, "InvalidArgument", lambda: b.list_objects_v2(continuation_token="made-up"))
        equal(len(b.list_objects(prefix="nothing/").object_list), 0)

    def multipart(self):
        b = self.bucket
        one, two = b"1" * KIB100, b"2" * 1000
        up = b.init_multipart_upload("multi", headers={"x-oss-meta-m": "1"}).upload_id
        assert up in [u.upload_id for u in oss2.MultipartUploadIterator(b)]
        p2 = b.upload_part("multi", up, 2, two)
        p1 = b.upload_part("multi", up, 1, one)
        parts = list(oss2.PartIterator(b, "multi", up, max_parts=1))
        equal([(p.part_number, p.size, p.etag) for p in parts], [(1, len(one), p1.etag), (2, len(two), p2.etag)])
        want = [PartInfo(1, p1.etag, len(one), p1.crc), PartInfo(2, p2.etag, len(two), p2.crc)]
        refused(400, "InvalidPartOrder", lambda: _raw_complete(b, "multi", up, want[::-1]))
        refused(400, "InvalidPart", lambda: b.complete_multipart_upload("multi", up, [PartInfo(1, "0" * 32)]))
        done = b.complete_multipart_upload("multi", up, want)
        equal(done.crc, _crc(one + two))
        digest = hashlib.md5(hashlib.md5(one).digest() + hashlib.md5(two).digest()).hexdigest().upper()
        equal(done.etag, digest + "-2")
        head = b.head_object("multi")
        equal((head.object_type, head.headers["x-oss-meta-m"], head.content_length), ("Multipart", "1", len(one + two)))
        equal(b.get_object("multi", byte_range=(KIB100 - 5, KIB100 + 4)).read(), b"1" * 5 + b"2" * 5)
        refused(404, "NoSuchUpload", lambda: b.upload_part("multi", up, 3, b"x"))
        up = b.init_multipart_upload("small").upload_id
        tiny = [PartInfo(n, b.upload_part("small", up, n, b"x").etag) for n in (1, 2)]
        refused(400, "EntityTooSmall", lambda: b.complete_multipart_upload("small", up, tiny))
        b.abort_multipart_upload("small", up)
        refused(404, "NoSuchUpload", lambda: b.abort_multipart_upload("small", up))
        up = b.init_multipart_upload("copied").upload_id
        c1 = b.upload_part_copy(self.name, "multi", (0, KIB100 - 1), "copied", up, 1)
        c2 = b.upload_part_copy(self.name, "multi", (KIB100, KIB100 + 999), "copied", up, 2)
        b.complete_multipart_upload("copied", up, None, headers={"x-oss-complete-all": "yes"})
        equal(b.get_object("copied").read(), one + two)
        equal((c1.etag, c2.etag), (p1.etag, p2.etag))

    def copies_links_tags(self):
        b = self.bucket
        b.put_object("src ü", b"body", headers={"x-oss-meta-a": "1"})
        done = b.copy_object(self.name, "src ü", "dst")
        equal(done.etag, b.head_object("src ü").etag)
        equal(b.head_object("dst").headers["x-oss-meta-a"], "1")
        b.copy_object(self.name, "src ü", "dst", headers={"x-oss-metadata-directive": "REPLACE", "x-oss-meta-a": "2"})
        equal(b.head_object("dst").headers["x-oss-meta-a"], "2")
        refused(412, "PreconditionFailed", lambda: b.copy_object(self.name, "src ü", "dst", headers={"x-oss-copy-source-if-match": '"0"'}))
        refused(404, "NoSuchKey", lambda: b.copy_object(self.name, "none", "dst"))
        b.put_symlink("src ü", "link")
        equal(b.get_symlink("link").target_key, "src ü")
        got = b.get_object("link")
        equal((got.read(), b.head_object("link").object_type), (b"body", "Symlink"))
        equal([o.type for o in b.list_objects(prefix="link").object_list], ["Symlink"])
        b.put_symlink("nowhere", "broken")
        refused(404, "SymlinkTargetNotExist", lambda: b.get_object("broken"))
        refused(400, "NotSymlink", lambda: b.get_symlink("dst"))
        rule = TaggingRule()
        rule.add("k ü", "v&1")
        b.put_object_tagging("dst", Tagging(rule))
        equal(b.get_object_tagging("dst").tag_set.tagging_rule, {"k ü": "v&1"})
        b.delete_object_tagging("dst")
        equal(b.get_object_tagging("dst").tag_set.tagging_rule, {})

    def signatures(self):
        b = self.bucket
        b.put_object("signed ü", b"body")
        for slash_safe in (False, True):
            url = b.sign_url("GET", "signed ü", 60, slash_safe=slash_safe)
            equal(requests.get(url).content, b"body")
            equal(b.get_object_with_url(url).read(), b"body")
        equal(requests.get(b.sign_url("GET", "signed ü", 60, params={"response-content-type": "x/z"})).headers["Content-Type"], "x/z")
        equal(requests.put(b.sign_url("PUT", "by-url", 60), data=b"put").status_code, 200)
        equal(b.get_object("by-url").read(), b"put")
        url = b.sign_url("GET", "signed ü", 60)
        late = requests.get(b.sign_url("GET", "signed ü", -1))
        equal((late.status_code, "Request has expired" in late.text), (403, True))
        other = requests.get(url.replace("signed", "by-url").replace("by-url%20%C3%BC", "by-url"))
        assert other.status_code == 403 and "SignatureDoesNotMatch" in other.text, other.text
        equal(requests.delete(url).status_code, 403)
        refused(403, "SignatureDoesNotMatch", lambda: self.open(A.key, "wrong").get_object("signed ü"))
        refused(403, "InvalidAccessKeyId", lambda: self.open("nobody", A.secret).get_object("signed ü"))
        sts = self.open(A.sts_key, A.sts_secret, A.sts_token)
        equal(sts.get_object("signed ü").read(), b"body")
        equal(requests.get(sts.sign_url("GET", "signed ü", 60)).content, b"body")
        refused(403, "InvalidSecurityToken", lambda: self.open(A.sts_key, A.sts_secret, "old").get_object("signed ü"))
        refused(403, "InvalidSecurityToken", lambda: self.open(A.sts_key, A.sts_secret).get_object("signed ü"))
        if self.version == "v4":
            refused(400, "AuthorizationHeaderMalformed", lambda: self.open(A.key, A.secret, region="mars").get_object("signed ü"))
            b.put_object("extra", b"x")
            equal(requests.get(b.sign_url("GET", "extra", 60, headers={"zz": "1"}, additional_headers={"zz"}), headers={"zz": "1"}).content, b"x")
            equal(requests.get(b.sign_url("GET", "extra", 60, headers={"zz": "1"}, additional_headers={"zz"}), headers={"zz": "2"}).status_code, 403)
        anonymous = oss2.Bucket(oss2.AnonymousAuth(), self.endpoint, self.name)
        refused(403, "AccessDenied", lambda: anonymous.get_object("signed ü"))
        b.put_bucket_acl("public-read")
        equal(anonymous.get_object("signed ü").read(), b"body")
        refused(403, "AccessDenied", lambda: anonymous.put_object("x", b"y"))
        b.put_bucket_acl("private")

    def skew(self):
        real = oss2.utils.http_date
        from datetime import datetime, timedelta
        import oss2.auth as auth_module

        class Late(datetime):
            @classmethod
            def utcnow(cls):
                return datetime.utcnow() - timedelta(hours=1)

        keep = auth_module.datetime
        oss2.utils.http_date = lambda *a: real(time.time() - 3600)
        auth_module.datetime = Late
        try:
            refused(403, "RequestTimeTooSkewed", lambda: self.bucket.get_object("plain"))
        finally:
            oss2.utils.http_date = real
            auth_module.datetime = keep

    def clean_up(self):
        b = self.bucket
        while True:
            keys = [o.key for o in b.list_objects(max_keys=1000).object_list]
            if not keys:
                break
            equal(sorted(b.batch_delete_objects(keys).deleted_keys), sorted(keys))
        b.delete_bucket()
        refused(404, "NoSuchBucket", b.get_bucket_info)

    def run(self):
        for step in (self.buckets, self.objects, self.ranges_and_conditions, self.append, self.lists, self.multipart,
                     self.copies_links_tags, self.signatures, self.skew, self.clean_up):
            start = time.time()
            step()
            print(f"{self.name}: {step.__name__} ok ({time.time() - start:.2f} s)", flush=True)


def _raw_complete(b, key, upload_id, parts):
    """The SDK sorts parts; this sends them as they are."""
    body = "".join(f"<Part><PartNumber>{p.part_number}</PartNumber><ETag>\"{p.etag}\"</ETag></Part>" for p in parts)
    return b._Bucket__do_object("POST", key, params={"uploadId": upload_id}, data=f"<CompleteMultipartUpload>{body}</CompleteMultipartUpload>")


for version in ("v1", "v4"):
    for host in ("127.0.0.1", common.DOMAIN):
        Judge(version, host).run()
