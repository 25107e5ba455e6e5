//! The official SDKs judge our test store. Needs the Python environment that `./run setup` makes, and fails without it.

use anyhow::Result;
use efc_testkit::process::run_to_end;
use efc_testkit::{Identity, OssOptions, OssServer, venv};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn judge(script: &str, options: OssOptions) -> Result<OssServer> {
    let sts = Identity { token: Some("ststoken/+=".into()), ..Identity::new("STS.efckey", "stssecret") };
    let mut identities = options.identities.clone();
    identities.push(sts);
    let server = OssServer::start_with(OssOptions { identities, ..options })?;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("judge").join(script);
    let mut command = Command::new(venv::program("python")?);
    command.arg("-B").arg(path).arg(server.addr().port().to_string());
    // A proxy of the machine must not see requests to loopback.
    command.env("NO_PROXY", "*").env("no_proxy", "*");
    run_to_end("judge", command, Duration::from_secs(60))?;
    Ok(server)
}

#[test]
fn oss2_passes_our_oss() {
    let stats = judge("oss2_judge.py", OssOptions::default()).unwrap().stats();
    for kind in ["v1_header", "v1_query", "v4_header", "v4_query", "anonymous"] {
        assert!(stats.signatures.contains_key(kind), "{kind} was not used: {stats:?}");
    }
    assert_eq!(stats.of("unknown"), 0, "{stats:?}");
}

#[test]
fn alibabacloud_oss_v2_passes_our_oss() {
    let stats = judge("oss_v2_judge.py", OssOptions::default()).unwrap().stats();
    for kind in ["v1_header", "v1_query", "v4_header", "v4_query"] {
        assert!(stats.signatures.contains_key(kind), "{kind} was not used: {stats:?}");
    }
    assert_eq!(stats.of("unknown"), 0, "{stats:?}");
}

#[test]
fn boto3_passes_our_s3() {
    let stats = judge("boto3_judge.py", OssOptions::s3()).unwrap().stats();
    assert!(stats.of("part") >= 2 && stats.of("copy") >= 1, "{stats:?}");
    assert_eq!(stats.of("unknown"), 0, "{stats:?}");
}
