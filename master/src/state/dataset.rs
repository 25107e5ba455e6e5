//! What a valid dataset is. Checked at the door, before anything is proposed: apply trusts it.

use super::Dataset;
use efc_common::policy::Consistency;
use efc_common::source::{SecretRef, SourceSpec};
use efc_common::{Error, Kind, Result};
use std::collections::BTreeSet;

const NAME_BYTES_MAX: usize = 63;
const MOUNTS_MAX: usize = 256;
const PATH_BYTES_MAX: usize = 4096;
const SOURCE_BYTES_MAX: usize = 64 << 10;
/// Of one dataset's sources together: it is one log entry.
const SOURCES_BYTES_MAX: usize = 1 << 20;

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message)
}

/// Checks every field that a client gives.
///
/// # Errors
/// [`Kind::Invalid`] naming the field and the cure.
pub(crate) fn check(d: &Dataset) -> Result<()> {
    check_name(&d.name)?;
    check_consistency(&d.consistency)?;
    if d.mounts.is_empty() || d.mounts.len() > MOUNTS_MAX {
        return Err(invalid(format!("dataset `{}` has {} mounts; give 1 to {MOUNTS_MAX}", d.name, d.mounts.len())));
    }
    let bytes: usize = d.mounts.iter().map(|m| m.source_json.len()).sum();
    if bytes > SOURCES_BYTES_MAX {
        return Err(invalid(format!(
            "dataset `{}` describes its sources in {bytes} bytes; at most {SOURCES_BYTES_MAX}",
            d.name
        )));
    }
    let mut paths = BTreeSet::new();
    for m in &d.mounts {
        check_path(&m.path)?;
        if !paths.insert(m.path.as_str()) {
            return Err(invalid(format!("two mounts have the path `{}`", m.path)));
        }
        check_source(&m.source_json).map_err(|e| e.with("mount", &m.path))?;
    }
    Ok(())
}

/// A DNS label: so that a name can become a host name, a PVC or a directory.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let bytes = name.as_bytes();
    let good = (1..=NAME_BYTES_MAX).contains(&bytes.len())
        && bytes.iter().all(|b| inner(*b))
        && !name.starts_with('-')
        && !name.ends_with('-');
    match good {
        true => Ok(()),
        false => Err(invalid(format!(
            "dataset name `{name}` must be 1 to {NAME_BYTES_MAX} of a-z, 0-9 and -, not beginning or ending with -"
        ))),
    }
}

fn check_consistency(text: &str) -> Result<()> {
    text.parse::<Consistency>().map(drop)
}

fn check_path(path: &str) -> Result<()> {
    let parts_good = |rest: &str| {
        rest.split('/').all(|p| !p.is_empty() && p != "." && p != ".." && p.len() <= 255 && !p.contains('\0'))
    };
    let good = path.len() <= PATH_BYTES_MAX && (path == "/" || path.strip_prefix('/').is_some_and(parts_good));
    match good {
        true => Ok(()),
        false => Err(invalid(format!(
            "mount path `{path}` must be `/` or absolute, without empty, `.` or `..` parts and without a trailing /"
        ))),
    }
}

fn check_source(json: &str) -> Result<()> {
    if json.len() > SOURCE_BYTES_MAX {
        return Err(invalid(format!("a source of {} bytes; at most {SOURCE_BYTES_MAX}", json.len())));
    }
    let spec: SourceSpec = serde_json::from_str(json)
        .map_err(|e| invalid("source_json is not a source description in JSON".into()).caused_by(e))?;
    if spec.secret == SecretRef::Keys {
        return Err(invalid(
            "a dataset cannot hold literal keys; name where they are: env, dir:/path, process:/command, role or oidc"
                .into(),
        ));
    }
    // The parts must be what parsing the URL would give: one spelling of one source.
    let again = SourceSpec::parse(&spec.url(), spec.options.clone(), spec.secret.clone())?;
    match again == spec {
        true => Ok(()),
        false => Err(invalid(format!(
            "source_json says kind, endpoint, bucket or path in another way than {} is read; make it by parsing the URL",
            spec.url()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Mount;
    use std::collections::BTreeMap;

    fn source(url: &str, secret: SecretRef) -> String {
        let mut options = BTreeMap::new();
        if url.starts_with("oss") {
            options.insert("region".to_string(), "cn-hangzhou".to_string());
        }
        serde_json::to_string(&SourceSpec::parse(url, options, secret).expect("url")).expect("json")
    }

    fn dataset(name: &str, consistency: &str, mounts: &[(&str, String)]) -> Dataset {
        Dataset {
            name: name.into(),
            id: 0,
            mounts: mounts
                .iter()
                .map(|(p, s)| Mount { path: (*p).into(), source_json: s.clone(), read_only: true })
                .collect(),
            consistency: consistency.into(),
            cache_ttl_seconds: 0,
            cache_pin: false,
            created_ms: 0,
        }
    }

    #[test]
    fn good_ones_pass() {
        for url in ["s3://b/x/y", "s3://b", "oss://b/p", "nfs://nas/export", "nfs://[::1]:12049/e", "file:///data"] {
            let d = dataset(
                "a-1",
                "ttl=30",
                &[("/", source(url, SecretRef::Env)), ("/sub/x", source(url, SecretRef::Env))],
            );
            check(&d).unwrap_or_else(|e| panic!("{url}: {e}"));
        }
    }

    #[test]
    fn bad_ones_name_the_field() {
        let s = || source("s3://b", SecretRef::Anonymous);
        for name in ["", "-a", "a-", "A", "a_b", "a.b", &"x".repeat(64)] {
            assert!(
                check(&dataset(name, "immutable", &[("/", s())])).is_err_and(|e| e.message().contains("name")),
                "{name}"
            );
        }
        for c in ["", "strict=", "ttl=", "ttl=-1"] {
            assert!(check(&dataset("a", c, &[("/", s())])).is_err_and(|e| e.message().contains("consistency")), "{c}");
        }
        for p in ["", "x", "/x/", "//", "/a//b", "/..", "/a/./b", "/a\0"] {
            assert!(check(&dataset("a", "immutable", &[(p, s())])).is_err_and(|e| e.message().contains("path")), "{p}");
        }
        assert!(check(&dataset("a", "immutable", &[])).is_err());
        assert!(
            check(&dataset("a", "immutable", &[("/", s()), ("/", s())])).is_err_and(|e| e.message().contains("two"))
        );
        let keys = source("s3://b", SecretRef::Keys);
        assert!(check(&dataset("a", "immutable", &[("/", keys)])).is_err_and(|e| e.message().contains("literal keys")));
        assert!(check(&dataset("a", "immutable", &[("/", "{}".into())])).is_err());
        let odd = s().replace("\"b\"", "\"b/c\"");
        assert!(check(&dataset("a", "immutable", &[("/", odd)])).is_err());
    }
}
