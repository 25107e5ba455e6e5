//! Each kind of secret against what gives it: environment, files, programs, fake metadata and STS services.

use super::*;
use efc_common::Retry;
use reqsign_core::StaticEnv;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

/// A metadata service or STS: answers by `METHOD /path` (without the query) and remembers what it was asked. One request a connection.
struct Service {
    addr: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Service {
    fn start(answers: &[(&str, String)]) -> Service {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("its address");
        let answers: HashMap<String, String> = answers.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if answer(stream, &answers, &log).is_none() {
                    return;
                }
            }
        });
        Service { addr, asked, thread: Some(thread) }
    }

    fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    fn asked(&self) -> String {
        self.asked.lock().join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // A connection that says nothing ends it.
        drop(TcpStream::connect(self.addr));
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

fn answer(mut stream: TcpStream, answers: &HashMap<String, String>, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length =
        head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let mut words = head.split_whitespace();
    let target = format!("{} {}", words.next()?, words.next()?);
    log.lock().push(format!("{head}{}", String::from_utf8_lossy(&body)));
    let (status, body) = match answers.get(target.split('?').next()?) {
        Some(body) => ("200 OK", body.as_str()),
        None => ("404 Not Found", ""),
    };
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}").ok()
}

fn spec(kind: SourceKind, secret: &str) -> SourceSpec {
    SourceSpec {
        kind,
        endpoint: "http://h".into(),
        bucket: "b".into(),
        path: String::new(),
        options: Default::default(),
        secret: secret.parse().expect("a secret reference"),
    }
}

fn env(vars: &[(&str, &str)]) -> StaticEnv {
    StaticEnv { home_dir: None, envs: vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect() }
}

fn make(kind: SourceKind, secret: &str, vars: &[(&str, &str)]) -> Result<Credentials> {
    Credentials::with_env(&spec(kind, secret), None, env(vars))
}

async fn triple(c: &Credentials) -> (String, String, String) {
    let keys = c.get().await.expect("keys").expect("not anonymous").keys.clone();
    (keys.id.clone(), keys.secret.expose().into(), keys.token.expose().into())
}

fn is(id: &str, secret: &str, token: &str) -> (String, String, String) {
    (id.into(), secret.into(), token.into())
}

/// RFC 3339, in an hour.
fn soon() -> String {
    let now = SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    reqsign_core::time::Timestamp::from_second(now as i64 + 3600).expect("a time").format_rfc3339_zulu()
}

#[tokio::test]
async fn literal_keys_environment_and_anonymous() {
    let oss = [
        ("ALIBABA_CLOUD_ACCESS_KEY_ID", "a"),
        ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "s"),
        ("ALIBABA_CLOUD_SECURITY_TOKEN", "t"),
    ];
    assert_eq!(triple(&make(SourceKind::Oss, "env", &oss).expect("oss")).await, is("a", "s", "t"));
    let both = [&oss[..], &[("OSS_ACCESS_KEY_ID", "b"), ("OSS_ACCESS_KEY_SECRET", "c")]].concat();
    assert_eq!(triple(&make(SourceKind::Oss, "env", &both).expect("oss")).await, is("b", "c", ""));
    let aws = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "s")];
    assert_eq!(triple(&make(SourceKind::S3, "env", &aws).expect("aws")).await, is("a", "s", ""));
    let e = make(SourceKind::S3, "env", &oss).err().expect("other store's variables do not count");
    assert!(e.is(Kind::Invalid) && e.message().contains("AWS_ACCESS_KEY_ID"), "{e}");
    assert!(make(SourceKind::S3, "keys", &aws).is_err(), "keys must come beside the source");
    assert!(make(SourceKind::S3, "anonymous", &[]).expect("anonymous").get().await.expect("fine").is_none());
}

#[tokio::test]
async fn secret_files_are_read_again_when_they_change() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().display().to_string();
    let c = make(SourceKind::Oss, &format!("dir:{path}"), &[]).expect("credentials");
    let e = c.get().await.expect_err("an empty directory");
    assert!(e.is(Kind::Invalid) && e.message().contains("access-key-id"), "{e}");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
    write("access-key-id", "a\n");
    write("access-key-secret", " s\n");
    let first = c.get().await.expect("keys").expect("keys");
    assert_eq!(triple(&c).await, is("a", "s", ""));
    write("session-token", "t");
    let again = c.get().await.expect("keys").expect("keys");
    assert!(Arc::ptr_eq(&first, &again), "the files are not looked at again within a second");
    tokio::time::sleep(DIR_INTERVAL).await;
    assert_eq!(triple(&c).await, is("a", "s", "t"));
    write("akId", "b");
    write("akSecret", "u");
    tokio::time::sleep(DIR_INTERVAL).await;
    assert_eq!(triple(&c).await, is("b", "u", ""));
}

/// A program of the test's: a shell script, so that its text may change while it is in use.
fn program(dir: &Path, script: &str) -> String {
    let path = dir.join("program");
    std::fs::write(&path, script).expect("write the program");
    format!("process:/bin/sh {}", path.display())
}

#[tokio::test]
async fn a_program_runs_once_for_all_who_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let runs = dir.path().join("runs");
    let json = format!(
        r#"{{"Version":1,"AccessKeyId":"a","SecretAccessKey":"s","SessionToken":"t","Expiration":"{}"}}"#,
        soon()
    );
    let script = format!("echo x >> {}; echo '{json}'", runs.display());
    let c = make(SourceKind::S3, &program(dir.path(), &script), &[]).expect("credentials");
    let all = futures::future::join_all((0..50).map(|_| c.get())).await;
    assert!(all.iter().all(|k| k.as_ref().is_ok_and(|k| k.as_ref().is_some_and(|k| k.keys.id == "a"))));
    let count = || std::fs::read_to_string(&runs).expect("runs").lines().count();
    assert_eq!((count(), c.label()), (1, "process:/bin/sh"));
    // The store refuses the keys: one new run, and no more for a while.
    let held = c.get().await.expect("keys").expect("keys");
    assert!(c.refused(&held) && c.refused(&held), "all who were refused may ask again");
    let renewed = c.get().await.expect("keys").expect("keys");
    assert_eq!(count(), 2);
    assert!(c.refused(&held), "renewed since");
    assert!(!c.refused(&renewed), "the new keys are no better");
    assert_eq!(count(), 2);
}

#[tokio::test]
async fn what_programs_print() {
    let dir = tempfile::tempdir().expect("a directory");
    for json in [
        r#"{"AccessKeyId":"a","AccessKeySecret":"s","SecurityToken":"t"}"#,
        r#"{"mode":"StsToken","access_key_id":"a","access_key_secret":"s","sts_token":"t"}"#,
    ] {
        let c = make(SourceKind::Oss, &program(dir.path(), &format!("echo '{json}'")), &[]).expect("credentials");
        assert_eq!(triple(&c).await, is("a", "s", "t"));
    }
    for (script, text) in [
        ("echo oops >&2; exit 3", "exit status: 3: oops"),
        ("echo not json", "did not print credentials"),
        (r#"echo '{"AccessKeyId":"","AccessKeySecret":"s"}'"#, "empty key"),
        (r#"echo '{"AccessKeyId":"a","AccessKeySecret":"hush","Expiration":"tomorrow"}'"#, "RFC 3339"),
        (
            r#"echo '{"AccessKeyId":"a","AccessKeySecret":"hush","Expiration":"2020-01-01T00:00:00Z"}'"#,
            "expired already",
        ),
        ("head -c 1000000 /dev/zero", "did not print credentials"),
    ] {
        let c = make(SourceKind::Oss, &program(dir.path(), script), &[]).expect("credentials");
        let e = c.get().await.expect_err(text).to_string();
        assert!(e.contains(text) && !e.contains("hush"), "`{e}` lacks `{text}`");
    }
    let c = make(SourceKind::Oss, "process:/nonexistent/program", &[]).expect("credentials");
    assert!(c.get().await.is_err_and(|e| e.is(Kind::Invalid)));
}

#[tokio::test]
async fn keys_are_renewed_early_and_the_old_ones_bridge_a_failure() {
    let keys = StaticKeys { id: "old".into(), secret: Secret::new("s"), token: Secret::default() };
    let now = SystemTime::now();
    let minute = Duration::from_secs(60);
    let held = |since: u32, left: u32| Held {
        obtained: now - since * minute,
        expires: Some(now + left * minute),
        ..Held::new(keys.clone(), None)
    };
    assert!(!held(54, 6).wants_renewal(now) && held(56, 4).wants_renewal(now));
    assert!(!held(7, 3).wants_renewal(now) && held(9, 1).wants_renewal(now));

    let dir = tempfile::tempdir().expect("a directory");
    let c = make(SourceKind::S3, &program(dir.path(), "exit 1"), &[]).expect("credentials");
    let Source::Renewed { state, .. } = &c.source else { panic!("a program renews") };
    state.lock().held = Some(Arc::new(held(56, 4)));
    assert_eq!(triple(&c).await.0, "old");
    assert!(state.lock().rest_until.is_some(), "the next try waits");
    *state.lock() =
        State { held: Some(Arc::new(Held { expires: Some(now - minute), ..held(56, 4) })), ..State::default() };
    let e = c.get().await.expect_err("expired keys are not used");
    assert_eq!(e.retry(), Retry::Later, "{e}");
}

#[tokio::test]
async fn roles_of_machines() {
    let keys = |secret: &str, token: &str| {
        format!(r#"{{"Code":"Success","AccessKeyId":"a","{secret}":"s","{token}":"t","Expiration":"{}"}}"#, soon())
    };
    let ram = keys("AccessKeySecret", "SecurityToken");
    let ecs = Service::start(&[
        ("PUT /latest/api/token", "TOKEN".into()),
        ("GET /latest/meta-data/ram/security-credentials/", "role-x".into()),
        ("GET /latest/meta-data/ram/security-credentials/role-x", ram.clone()),
        ("GET /latest/meta-data/ram/security-credentials/role-y", ram),
    ]);
    let vars = [("ALIBABA_CLOUD_ECS_METADATA_SERVICE_ENDPOINT", ecs.url())];
    let vars: Vec<(&str, &str)> = vars.iter().map(|(k, v)| (*k, v.as_str())).collect();
    assert_eq!(triple(&make(SourceKind::Oss, "role", &vars).expect("role")).await, is("a", "s", "t"));
    assert!(ecs.asked().to_ascii_lowercase().contains("x-aliyun-ecs-metadata-token: token"), "{}", ecs.asked());
    assert_eq!(triple(&make(SourceKind::Oss, "role:role-y", &vars).expect("role")).await, is("a", "s", "t"));

    let ec2 = Service::start(&[
        ("PUT /latest/api/token", "TOKEN".into()),
        ("GET /latest/meta-data/iam/security-credentials/", "role-x".into()),
        ("GET /latest/meta-data/iam/security-credentials/role-x", keys("SecretAccessKey", "Token")),
    ]);
    let c = make(SourceKind::S3, "role", &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &ec2.url())]).expect("role");
    assert_eq!(triple(&c).await, is("a", "s", "t"));
    assert!(ec2.asked().to_ascii_lowercase().contains("x-aws-ec2-metadata-token: token"), "{}", ec2.asked());
}

#[tokio::test]
async fn federation() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("token");
    std::fs::write(&file, "JWT").expect("write");
    let file = file.display().to_string();
    let keys = format!(
        r#"{{"Credentials":{{"AccessKeyId":"a","AccessKeySecret":"s","SecurityToken":"t","Expiration":"{}"}}}}"#,
        soon()
    );
    let sts = Service::start(&[("GET /", keys)]);
    let c = make(
        SourceKind::Oss,
        "oidc",
        &[
            ("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/r"),
            ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "acs:ram::1:oidc-provider/p"),
            ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", &file),
            ("ALIBABA_CLOUD_STS_ENDPOINT", &sts.url()),
        ],
    );
    assert_eq!(triple(&c.expect("oidc")).await, is("a", "s", "t"));
    assert!(sts.asked().contains("OIDCToken=JWT"), "{}", sts.asked());

    let keys = format!(
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>a</AccessKeyId>\
         <SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>{}</Expiration></Credentials>\
         </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
        soon()
    );
    let sts = Service::start(&[("POST /", keys)]);
    let vars = [
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", file.as_str()),
        ("AWS_ENDPOINT_URL_STS", &sts.url()),
    ];
    assert_eq!(triple(&make(SourceKind::S3, "oidc", &vars).expect("oidc")).await, is("a", "s", "t"));
    assert!(sts.asked().contains("WebIdentityToken=JWT"), "{}", sts.asked());
    let e = make(SourceKind::S3, "oidc", &[]).expect("oidc").get().await.expect_err("nothing is set");
    assert!(e.to_string().contains("AWS_WEB_IDENTITY_TOKEN_FILE"), "{e}");
}
