//! The test store from outside: signatures of the S3 dialect, faults, counters. What the official SDKs say is in `judges.rs`.

use anyhow::Result;
use efc_testkit::http::{self, Answer, Connection};
use efc_testkit::{Action, Fault, OssOptions, OssServer, S3Target};
use std::time::{Duration, Instant};

fn s3() -> Result<OssServer> {
    let server = OssServer::start_with(OssOptions::s3())?;
    server.put("bkt", "k", vec![7u8; 1 << 20]);
    Ok(server)
}

fn code(answer: Result<Answer>) -> Result<(u16, String)> {
    let answer = answer?;
    let text = answer.text();
    let code = text.split("<Code>").nth(1).and_then(|t| t.split("</Code>").next()).unwrap_or("").to_string();
    Ok((answer.status, code))
}

#[test]
fn s3_signatures_are_verified() {
    let server = s3().unwrap();
    let good = server.target();
    assert_eq!(good.get("bkt", b"k").unwrap().len(), 1 << 20);
    good.put("bkt", "odd key/ü+&?=%".as_bytes(), b"x").unwrap();
    assert_eq!(server.get("bkt", "odd key/ü+&?=%").unwrap(), "x");
    let refused = [
        (S3Target { secret: "wrong".into(), ..good.clone() }, 403, "SignatureDoesNotMatch"),
        (S3Target { key_id: "nobody".into(), ..good.clone() }, 403, "InvalidAccessKeyId"),
        (S3Target { region: "mars-1".into(), ..good.clone() }, 400, "AuthorizationHeaderMalformed"),
    ];
    for (target, status, want) in refused {
        assert_eq!(code(target.request("GET", "/bkt/k", b"")).unwrap(), (status, want.to_string()));
    }
    let anonymous = || code(http::request("GET", &format!("{}/bkt/k", server.endpoint()), b"")).unwrap();
    assert_eq!(anonymous(), (403, "AccessDenied".to_string()));
    server.set_acl("bkt", "public-read");
    assert_eq!(anonymous().0, 200);
    assert_eq!(code(good.request("GET", "/bkt/none", b"")).unwrap(), (404, "NoSuchKey".to_string()));
    assert_eq!(code(good.request("GET", "/none/k", b"")).unwrap(), (404, "NoSuchBucket".to_string()));
}

#[test]
fn every_fault_strikes_and_passes() {
    let server = s3().unwrap();
    let target = server.target();
    let get = || target.get("bkt", b"k");
    let sent = |action| server.fault(Fault::on("get", action).times(1));

    sent(Action::Status { status: 503, code: String::new() });
    assert!(get().unwrap_err().root_cause().to_string().contains("ServiceUnavailable"));
    sent(Action::Drop);
    assert!(get().is_err());
    sent(Action::Reset { after_bytes: 300_000 });
    assert!(get().is_err());
    sent(Action::Truncate { after_bytes: 300_000 });
    assert!(get().is_err());
    sent(Action::Corrupt { at_byte: 300_000 });
    let body = get().unwrap();
    let wrong: Vec<usize> = (0..body.len()).filter(|i| body[*i] != 7).collect();
    assert_eq!(wrong, [300_000]);
    for action in [Action::Latency { ms: 200 }, Action::Pause { after_bytes: 300_000, ms: 200 }] {
        sent(action);
        let start = Instant::now();
        assert_eq!(get().unwrap(), [7u8; 1 << 20]);
        assert!(start.elapsed() >= Duration::from_millis(200));
    }
    assert_eq!(get().unwrap(), [7u8; 1 << 20]);
    assert_eq!(server.stats().faults, 7);
}

#[test]
fn a_change_in_mid_read_is_refused_by_if_match() {
    let server = s3().unwrap();
    let target = server.target();
    server.fault(Fault::on("get", Action::Mutate).after(1).times(1));
    let mut connection = Connection::open(target.authority()).unwrap();
    let mut read = |etag: &str, range: &str| {
        target.request_on(&mut connection, "GET", "/bkt/k", &[("if-match", etag), ("range", range)], b"").unwrap()
    };
    let first = read("*", "bytes=0-99");
    assert_eq!((first.status, first.body.as_slice()), (206, &[7u8; 100][..]));
    let etag = first.header("etag").unwrap().to_string();
    assert_eq!(read(&etag, "bytes=100-199").status, 412);
    let fresh = read("*", "bytes=100-199");
    assert_eq!(fresh.body, [!7u8; 100]);
    assert_ne!(fresh.header("etag").unwrap(), etag);
}

#[test]
fn the_side_door_sets_faults_and_shows_counters() {
    let server = s3().unwrap();
    let side = |method, path: &str, body: &str| {
        http::request(method, &format!("{}/-/{path}", server.endpoint()), body.as_bytes()).unwrap()
    };
    let rule = r#"{"op":"get","count":1,"action":"status","status":500}"#;
    assert_eq!(side("POST", "fault", rule).status, 200);
    assert_eq!(side("POST", "fault", r#"{"action":"explode"}"#).status, 400);
    assert!(side("GET", "fault", "").text().contains("\"status\":500"));
    assert_eq!(server.target().request("GET", "/bkt/k", b"").unwrap().status, 500);
    assert_eq!(server.target().request("GET", "/bkt/k", b"").unwrap().status, 200);
    let stats: serde_json::Value = serde_json::from_slice(&side("GET", "stats", "").body).unwrap();
    assert_eq!(stats["requests"]["get"], 2);
    assert_eq!(stats["errors"]["InternalError"], 1);
    assert_eq!(stats["in_flight_max"], 1);
    assert!(stats["bytes_out"].as_u64().unwrap() > 1 << 20);
    side("POST", "reset", "");
    assert_eq!(server.stats(), Default::default());
    side("POST", "fault", rule);
    side("DELETE", "fault", "");
    assert_eq!(server.target().request("GET", "/bkt/k", b"").unwrap().status, 200);
}
