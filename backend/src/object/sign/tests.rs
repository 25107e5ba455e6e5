//! Signatures against published examples and, for keys both can sign, against reqsign.

use super::*;
use efc_common::source::Secret;
use proptest::prelude::*;
use reqsign_core::{Context, SignRequest};
use std::time::Duration;

fn keys(id: &str, secret: &str, token: &str) -> StaticKeys {
    StaticKeys { id: id.into(), secret: Secret::new(secret), token: Secret::new(token) }
}

fn at(secs: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(secs)
}

fn signature(headers: &HeaderMap) -> String {
    let value = headers[AUTHORIZATION].to_str().expect("ascii");
    value.rsplit_once("Signature=").map_or(value, |(_, s)| s).to_string()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut out: Vec<_> = list.iter().map(|(n, v)| (encode_query(n.as_bytes()), encode_query(v.as_bytes()))).collect();
    out.sort();
    out
}

/// The examples of the AWS documentation (24 May 2013, examplebucket).
#[test]
fn aws_published_examples() {
    let keys = keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "");
    let sign = Signature::S3 { region: "us-east-1".into() };
    for (query, expected) in [
        (pairs(&[("lifecycle", "")]), "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        (
            pairs(&[("prefix", "J"), ("max-keys", "2")]),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ] {
        let mut headers = HeaderMap::new();
        let host = "examplebucket.s3.amazonaws.com";
        let t = Target {
            method: "GET",
            host,
            path: "/",
            resource: b"/examplebucket/",
            query: &query,
            payload: EMPTY_SHA256,
        };
        sign.sign(&keys, at(1_369_353_600), &t, &mut headers).expect("signs");
        assert_eq!(signature(&headers), expected);
        assert_eq!(headers["x-amz-date"], "20130524T000000Z");
    }
}

/// The example of the OSS documentation for V1 (object `nelson` of bucket `oss-example`).
#[test]
fn oss_v1_published_example() {
    let keys = keys("44CF9590006BF252F707", "OtxrzxIsfpFjA7SwPzILwy8Bw21TLhquhboDYROV", "");
    let mut headers = HeaderMap::new();
    put(&mut headers, "content-md5", "ODBGOERFMDMzQTczRUY3NUE3NzA5QzdFNUYzMDQxNEM=").expect("md5");
    put(&mut headers, "content-type", "text/html").expect("type");
    put(&mut headers, "x-oss-meta-author", "foo@bar.com").expect("meta");
    put(&mut headers, "x-oss-magic", "abracadabra").expect("magic");
    let now = httpdate::parse_http_date("Thu, 17 Nov 2005 18:49:58 GMT").expect("date");
    let t = Target {
        method: "PUT",
        host: "h",
        path: "/nelson",
        resource: b"/oss-example/nelson",
        query: &[],
        payload: EMPTY_SHA256,
    };
    Signature::OssV1.sign(&keys, now, &t, &mut headers).expect("signs");
    assert_eq!(headers[AUTHORIZATION], "OSS 44CF9590006BF252F707:26NBxoKdsyly4EDv6inkoDft/yA=");
}

/// The request that the official OSS SDKs use as their V4 reference.
#[test]
fn oss_v4_published_example() {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-oss-head1", "value"),
        ("abc", "value"),
        ("zabc", "value"),
        ("xyz", "value"),
        ("content-type", "text/plain"),
    ] {
        put(&mut headers, name, value).expect("header");
    }
    let query = pairs(&[
        ("param1", "value1"),
        ("+param1", "value3"),
        ("|param1", "value4"),
        ("+param2", ""),
        ("|param2", ""),
        ("param2", ""),
    ]);
    let t = Target {
        method: "PUT",
        host: "h",
        path: "/",
        resource: b"/bucket/1234+-/123/1.txt",
        query: &query,
        payload: EMPTY_SHA256,
    };
    let sign = Signature::OssV4 { region: "cn-hangzhou".into() };
    sign.sign(&keys("ak", "sk", ""), at(1_702_743_657), &t, &mut headers).expect("signs");
    assert_eq!(
        headers[AUTHORIZATION],
        "OSS4-HMAC-SHA256 Credential=ak/20231216/cn-hangzhou/oss/aliyun_v4_request,\
         Signature=e21d18daa82167720f9b1047ae7e7f1ce7cb77a31e8203a7d5f4624fa0284afe"
    );
}

fn parts(uri: &str) -> http::request::Parts {
    http::Request::get(uri).body(()).expect("request").into_parts().0
}

/// When reqsign signed, from the date header it set.
fn moment(text: &str) -> SystemTime {
    let t =
        format!("{}-{}-{}T{}:{}:{}Z", &text[..4], &text[4..6], &text[6..8], &text[9..11], &text[11..13], &text[13..15]);
    at(t.parse::<Timestamp>().expect("timestamp").as_second() as u64)
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().build().expect("runtime").block_on(future)
}

fn key() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 +=&%?#~*'()!é漢/._-]{1,24}"
        .prop_filter("no dot segments", |k| !k.split('/').any(|s| s == "." || s == ".."))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn s3_agrees_with_reqsign(key in key(), prefix in key(), with_token: bool) {
        let keys = keys("AK", "SK/+=", if with_token { "tok/en+" } else { "" });
        let query = pairs(&[("list-type", "2"), ("prefix", &prefix), ("delimiter", "/"), ("location", "")]);
        let path = format!("/b/{}", encode_path(key.as_bytes()));
        let mut theirs = parts(&format!("http://h:1{path}?{}", super::query(&query, false)));
        put(&mut theirs.headers, "x-amz-content-sha256", EMPTY_SHA256).expect("hash");
        let cred = reqsign_aws_v4::Credential {
            access_key_id: keys.id.clone(),
            secret_access_key: keys.secret.expose().into(),
            session_token: with_token.then(|| keys.token.expose().into()),
            expires_in: None,
        };
        let signer = reqsign_aws_v4::RequestSigner::new("s3", "r-1");
        run(signer.sign_request(&Context::new(), &mut theirs, Some(&cred), None)).expect("reqsign signs");
        let now = moment(theirs.headers["x-amz-date"].to_str().expect("date"));
        let mut ours = HeaderMap::new();
        let resource = format!("/b/{key}");
        let t = Target { method: "GET", host: "h:1", path: &path, resource: resource.as_bytes(), query: &query, payload: EMPTY_SHA256 };
        Signature::S3 { region: "r-1".into() }.sign(&keys, now, &t, &mut ours).expect("we sign");
        prop_assert_eq!(&ours[AUTHORIZATION], &theirs.headers[AUTHORIZATION]);
    }

    #[test]
    fn oss_agrees_with_reqsign(key in key(), token in "[a-z+/=]{0,9}", v4: bool, virtual_host: bool) {
        let keys = keys("AK", "SK/+=", &token);
        let query = pairs(&[("list-type", "2"), ("prefix", "p q+"), ("continuation-token", "a+/=b"), ("location", "")]);
        let host = if virtual_host { "b.h:1" } else { "h:1" };
        let path = format!("{}/{}", if virtual_host { "" } else { "/b" }, encode_path(key.as_bytes()));
        let mut theirs = parts(&format!("http://{host}{path}?{}", super::query(&query, false)));
        put(&mut theirs.headers, "x-oss-range-behavior", "standard").expect("header");
        let mut ours = theirs.headers.clone();
        let cred = reqsign_aliyun_oss::Credential {
            access_key_id: keys.id.clone(),
            access_key_secret: keys.secret.expose().into(),
            security_token: (!token.is_empty()).then(|| token.clone()),
            expires_in: None,
        };
        let version = if v4 { reqsign_aliyun_oss::SigningVersion::V4 } else { reqsign_aliyun_oss::SigningVersion::V1 };
        let signer = reqsign_aliyun_oss::RequestSigner::new("b").with_region("r-1").with_signing_version(version);
        run(signer.sign_request(&Context::new(), &mut theirs, Some(&cred), None)).expect("reqsign signs");
        let (now, sign) = if v4 {
            (moment(theirs.headers["x-oss-date"].to_str().expect("date")), Signature::OssV4 { region: "r-1".into() })
        } else {
            let date = theirs.headers[DATE].to_str().expect("date");
            (httpdate::parse_http_date(date).expect("date"), Signature::OssV1)
        };
        let resource = format!("/b/{key}");
        let t = Target { method: "GET", host, path: &path, resource: resource.as_bytes(), query: &query, payload: EMPTY_SHA256 };
        sign.sign(&keys, now, &t, &mut ours).expect("we sign");
        prop_assert_eq!(signature(&ours), signature(&theirs.headers));
    }
}

#[test]
fn keys_that_are_not_utf8_are_encoded_byte_by_byte() {
    assert_eq!(encode_path(b"a/\xff\n +~"), "a/%FF%0A%20%2B~");
    assert_eq!(encode_query(b"a/b"), "a%2Fb");
    assert_eq!([base64(b""), base64(b"f"), base64(b"fo"), base64(b"foo")], ["", "Zg==", "Zm8=", "Zm9v"]);
}
