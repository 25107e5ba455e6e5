//! The starters of real servers: they answer, refuse what they should, and go away.

use anyhow::Result;
use efc_testkit::process::connects;
use efc_testkit::{Moto, S3Target, Weed};

fn round_trip(target: &S3Target) -> Result<()> {
    target.create_bucket("bucket-1")?;
    for (key, body) in [("plain", "x"), ("a b/ü+&?", "hello"), ("empty", "")] {
        target.put("bucket-1", key.as_bytes(), body.as_bytes())?;
        assert_eq!(target.get("bucket-1", key.as_bytes())?, body.as_bytes(), "{key}");
    }
    target.delete("bucket-1", b"plain")?;
    assert!(target.get("bucket-1", b"plain").is_err_and(|e| e.to_string().contains("bucket-1/plain")));
    let listing = target.request("GET", "/bucket-1?list-type=2&prefix=a%20b%2F", b"")?.ok()?.text();
    assert!(listing.contains("<KeyCount>1</KeyCount>"), "{listing}");
    Ok(())
}

#[test]
fn weed_serves_and_checks_signatures() {
    let mut weed = Weed::start().unwrap();
    round_trip(&weed.target()).unwrap();
    let forger = S3Target { secret: "wrong".into(), ..weed.target() };
    let answer = forger.request("GET", "/bucket-1/empty", b"").unwrap();
    assert_eq!(answer.status, 403, "{}", answer.text());
    let target = weed.target();
    weed.kill();
    assert!(target.request("GET", "/", b"").is_err());
}

#[test]
fn two_motos() {
    let (a, b) = (Moto::start().unwrap(), Moto::start().unwrap());
    round_trip(&a.target()).unwrap();
    assert_eq!(b.target().request("GET", "/bucket-1", b"").unwrap().status, 404);
    let port: u16 = a.target().endpoint.rsplit(':').next().unwrap().parse().unwrap();
    drop(a);
    assert!(!connects(port));
}
