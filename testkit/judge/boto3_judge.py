"""Judges the S3 dialect of the test server with boto3: path style and virtual host."""
import hashlib

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import ClientError

import common
from common import equal

A = common.arguments()
common.resolve_test_domain()
ODD = ["plain", "a b/ü+&?=%.txt", "tab\tnew\nline", "//double//", "<xml>&amp;\"'"]


def refused(status, code, call):
    read = lambda e: (e.response["ResponseMetadata"]["HTTPStatusCode"], e.response["Error"]["Code"])
    return common.refused(status, code, call, error=ClientError, read=read)


def open_client(style, host, key=A.key, secret=A.secret, token=None):
    config = Config(signature_version="s3v4", s3={"addressing_style": style}, retries={"max_attempts": 1})
    return boto3.client("s3", endpoint_url=f"http://{host}:{A.port}", region_name="us-east-1", aws_access_key_id=key,
                        aws_secret_access_key=secret, aws_session_token=token, config=config)


def judge(style, host):
    s3, bucket = open_client(style, host), f"boto3-{style}"
    s3.create_bucket(Bucket=bucket)
    assert bucket in [b["Name"] for b in s3.list_buckets()["Buckets"]]
    for key in ODD:
        body = key.encode() * 3
        put = s3.put_object(Bucket=bucket, Key=key, Body=body, Metadata={"who": "judge"})
        equal(put["ETag"], f'"{hashlib.md5(body).hexdigest()}"')
        got = s3.get_object(Bucket=bucket, Key=key)
        equal((got["Body"].read(), got["Metadata"]), (body, {"who": "judge"}), key)
    keys = [o["Key"] for p in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 2}) for o in p["Contents"]]
    equal(keys, sorted(ODD))
    page = s3.list_objects(Bucket=bucket, Delimiter="/")
    equal([c["Prefix"] for c in page["CommonPrefixes"]], ["/", "a b/"])
    data = bytes(range(250)) * 4
    etag = s3.put_object(Bucket=bucket, Key="r", Body=data)["ETag"]
    equal(s3.get_object(Bucket=bucket, Key="r", Range="bytes=500-2000")["Body"].read(), data[500:])
    refused(416, "InvalidRange", lambda: s3.get_object(Bucket=bucket, Key="r", Range="bytes=1000-"))
    refused(412, "PreconditionFailed", lambda: s3.get_object(Bucket=bucket, Key="r", IfMatch='"0"'))
    refused(304, "304", lambda: s3.get_object(Bucket=bucket, Key="r", IfNoneMatch=etag))
    refused(412, "PreconditionFailed", lambda: s3.put_object(Bucket=bucket, Key="r", Body=b"", IfNoneMatch="*"))
    refused(404, "NoSuchKey", lambda: s3.get_object(Bucket=bucket, Key="none"))
    refused(404, "404", lambda: s3.head_object(Bucket=bucket, Key="none"))
    refused(403, "SignatureDoesNotMatch", lambda: open_client(style, host, secret="wrong").list_objects_v2(Bucket=bucket))
    refused(403, "InvalidAccessKeyId", lambda: open_client(style, host, key="nobody").list_objects_v2(Bucket=bucket))
    refused(403, "InvalidToken", lambda: open_client(style, host, A.sts_key, A.sts_secret, "old").list_objects_v2(Bucket=bucket))
    sts = open_client(style, host, A.sts_key, A.sts_secret, A.sts_token)
    equal(sts.get_object(Bucket=bucket, Key="r")["Body"].read(), data)
    for client in (s3, sts):
        url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "a b/ü+&?=%.txt"}, ExpiresIn=60)
        if style == "path":
            equal(requests.get(url).status_code, 200, url)
            equal(requests.delete(url).status_code, 403, url)
    one, two = b"1" * (5 << 20), b"2" * 1000
    up = s3.create_multipart_upload(Bucket=bucket, Key="multi")["UploadId"]
    parts = [{"PartNumber": n, "ETag": s3.upload_part(Bucket=bucket, Key="multi", UploadId=up, PartNumber=n, Body=b)["ETag"]} for n, b in ((1, one), (2, two))]
    s3.complete_multipart_upload(Bucket=bucket, Key="multi", UploadId=up, MultipartUpload={"Parts": parts})
    equal(s3.get_object(Bucket=bucket, Key="multi")["Body"].read(), one + two)
    s3.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "a b/ü+&?=%.txt"})
    s3.upload_fileobj(__import__("io").BytesIO(one * 2), bucket, "managed")
    keys = [o["Key"] for o in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    done = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": k} for k in keys]})
    equal(sorted(d["Key"] for d in done["Deleted"]), sorted(keys))
    s3.delete_bucket(Bucket=bucket)
    print(f"boto3, {style}: ok", flush=True)


judge("path", "127.0.0.1")
judge("virtual", common.DOMAINS[1])
