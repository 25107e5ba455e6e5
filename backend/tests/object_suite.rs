//! The backend suite over object stores: our own OSS server (signatures V1 and V4 verified), its S3 dialect, SeaweedFS and moto; each
//! plain, and our own behind injected faults. What is special to object stores stands in `object_wire.rs`.

use efc_backend::connect::connect_counted;
use efc_backend::suite::{self, Store};
use efc_common::source::{Secret, SecretRef, SourceSpec, StaticKeys};
use efc_testkit::{Moto, OssOptions, OssServer, S3Target, Weed};

/// Our server seen from behind.
struct Behind<'a>(&'a OssServer);

impl Store for Behind<'_> {
    fn put(&self, path: &[u8], data: &[u8]) {
        self.0.put("bucket", path, data.to_vec());
    }

    fn overwrite(&self, _path: &[u8], _data: &[u8]) -> bool {
        false
    }

    fn mkdir(&self, path: &[u8]) -> bool {
        self.0.put("bucket", [path, b"/"].concat(), Vec::new());
        true
    }

    fn symlink(&self, _path: &[u8], _target: &[u8]) {
        unreachable!("object stores have no symbolic links");
    }

    fn set_xattr(&self, _path: &[u8], _name: &str, _value: &[u8]) {
        unreachable!("object stores have no extended attributes");
    }

    fn accepts(&self, _name: &[u8]) -> bool {
        true
    }
}

/// A real S3 server, filled through its own API.
struct Remote {
    target: S3Target,
    /// It takes a backslash for a slash (SeaweedFS).
    folds_backslashes: bool,
}

impl Store for Remote {
    fn put(&self, path: &[u8], data: &[u8]) {
        self.target.put("bucket", path, data).expect("put");
    }

    fn overwrite(&self, _path: &[u8], _data: &[u8]) -> bool {
        false
    }

    fn mkdir(&self, path: &[u8]) -> bool {
        self.put(&[path, b"/"].concat(), b"");
        true
    }

    fn symlink(&self, _path: &[u8], _target: &[u8]) {
        unreachable!("object stores have no symbolic links");
    }

    fn set_xattr(&self, _path: &[u8], _name: &str, _value: &[u8]) {
        unreachable!("object stores have no extended attributes");
    }

    fn accepts(&self, name: &[u8]) -> bool {
        let text = std::str::from_utf8(name).is_ok_and(|n| !n.chars().any(char::is_control));
        text && !(self.folds_backslashes && name.contains(&b'\\'))
    }
}

async fn run(url: &str, options: &[(&str, &str)], store: &dyn Store, faults: bool) {
    let mut options: std::collections::BTreeMap<String, String> =
        options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    if faults {
        options.insert("fault".into(), "error=0.05,short=0.05,reset=0.05,seed=20".into());
    }
    let spec = SourceSpec::parse(url, options, SecretRef::Keys).expect("a source");
    let keys = StaticKeys { id: "efckey".into(), secret: Secret::new("efcsecret"), token: Secret::default() };
    let origin = connect_counted(&spec, Some(&keys)).await.expect("connect");
    suite::run(origin.backend, store).await;
    let stats = origin.counters.stats();
    assert_eq!(faults, stats.retries > 20, "{stats:?}");
}

/// A server of ours has a runtime, which it must not make inside of ours.
fn start(options: OssOptions) -> OssServer {
    let server = std::thread::spawn(|| OssServer::start_with(options)).join().expect("a thread");
    let server = server.expect("a server");
    server.create_bucket("bucket");
    server
}

async fn oss(sig: &str, faults: bool) {
    let server = start(OssOptions::default());
    let options = [("endpoint", server.endpoint()), ("region", "cn-hangzhou".into()), ("sig", sig.into())];
    let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (*k, v.as_str())).collect();
    run("oss://bucket/", &options, &Behind(&server), faults).await;
    assert_eq!(server.stats().of("head_bucket"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oss_v4() {
    oss("v4", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oss_v1_with_faults() {
    oss("v1", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3() {
    let server = start(OssOptions::s3());
    run("s3://bucket/", &[("endpoint", &server.endpoint())], &Behind(&server), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seaweedfs() {
    let server = Weed::start().expect("weed");
    let target = server.target();
    target.create_bucket("bucket").expect("bucket");
    let endpoint = target.endpoint.clone();
    run("s3://bucket/", &[("endpoint", &endpoint)], &Remote { target, folds_backslashes: true }, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moto() {
    let server = Moto::start().expect("moto");
    let target = server.target();
    target.create_bucket("bucket").expect("bucket");
    let endpoint = target.endpoint.clone();
    run("s3://bucket/", &[("endpoint", &endpoint)], &Remote { target, folds_backslashes: false }, false).await;
}
