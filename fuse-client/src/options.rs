//! Mount options: one table that `--help`, the parser and the error for an unknown option all read.

use crate::fs::attr::Ownership;
use efc_common::error::Context as _;
use efc_common::policy::Consistency;
use efc_common::source::{self, SecretRef, StaticKeys};
use efc_common::units::{parse_bytes, parse_duration, show_bytes};
use efc_common::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// One mount option.
#[derive(Debug, Clone, Copy)]
pub struct MountOption {
    /// Name as in `-o name=value` or `-o name`.
    pub name: &'static str,
    /// Shape of the value; empty for a flag.
    pub value: &'static str,
    /// One line of help.
    pub help: &'static str,
    /// A mount can take it over while it serves.
    live: bool,
}

const fn o(name: &'static str, value: &'static str, help: &'static str) -> MountOption {
    MountOption { name, value, help, live: false }
}

const fn live(name: &'static str, value: &'static str, help: &'static str) -> MountOption {
    MountOption { name, value, help, live: true }
}

/// Every mount option that is not a source option (those stand in [`source::OPTIONS`]).
pub const OPTIONS: &[MountOption] = &[
    o("ro", "", "read-only (default): nothing is ever changed at the source, writing is answered EROFS"),
    o("rw", "", "read-write: changes go through to the source"),
    o("writable", "", "the same as rw; for mount(8), which says rw on its own account"),
    o(
        "consistency",
        "strict[=SECONDS]|ttl=SECONDS|immutable",
        "how long names and attributes may be believed. strict (default with rw): what another mount of the cluster changes is seen at once, what is changed past EFC \
after SECONDS (60). ttl (default with ro, 60): any change is seen after that time. immutable: for good",
    ),
    o("allow_other", "", "let other users in (default when root mounts)"),
    o("default_permissions", "", "let the kernel check modes and owners (default)"),
    o("no_default_permissions", "", "do not check modes and owners"),
    o("uid", "UID", "owner of everything (default: the origin's, else who mounts)"),
    o("gid", "GID", "group of everything (default: the origin's, else who mounts)"),
    o("file_mode", "OCTAL", "permission bits of files (default: the origin's, else 0644)"),
    o("dir_mode", "OCTAL", "permission bits of directories (default: the origin's, else 0755)"),
    o("umask", "OCTAL", "bits taken away from every mode (default 000)"),
    o("master", "HOST:PORT[;HOST:PORT...]", "join this cluster; without it a master and a worker start with the mount"),
    o("data_dir", "DIR", "state of the embedded cluster (default /var/lib/efc/MOUNTPOINT)"),
    live("cache_memory", "SIZE", "memory tier of the embedded worker (default 1GiB or 10% of memory, the smaller)"),
    o("cache_dir", "DIR", "disk tier of the embedded worker (default: none)"),
    live("cache_size", "SIZE", "quota of cache_dir (default 10GiB)"),
    live("memory", "SIZE", "budget of this process (default 1GiB or 10% of memory, the smaller)"),
    o(
        "writeback",
        "",
        "object stores: close does not wait for the store, fsync does; a node that dies loses what was closed and not synced",
    ),
    o(
        "staging",
        "DIR",
        "where files of object stores wait that are being written (default data_dir/staging, else /var/tmp/efc)",
    ),
    live("staging_size", "SIZE", "room there; over it writers see ENOSPC (default 10GiB)"),
    live("readahead", "SIZE", "how far a sequential stream is read ahead at most (default 32MiB; 0 = off)"),
    live("read_deadline", "DURATION", "a read ends with EIO after this (default 150s)"),
    live("log_level", "FILTER", "what is logged, in place of --log-level (a comma is written \\,)"),
    o("threads", "N", "threads that take kernel requests (default: cores, 2 to 16)"),
    o(
        "subpath",
        "DIR",
        "mount this directory of the source, by one mount that all with the same source and options share on this node",
    ),
    o("no_failover", "", "no holder: the mount dies with its process"),
    live("secret", "REF", "credentials: env (default), dir:/path, process:/command, role[:NAME], oidc, anonymous"),
    live("passwd_file", "FILE", "file with KEY_ID:KEY_SECRET[:TOKEN], mode 0600"),
    o("workers_only", "", "testing only: never go to the origin past the workers"),
];

/// Those that a mount can take over while it serves, of the source's too.
pub fn all_live() -> Vec<&'static str> {
    OPTIONS.iter().filter(|o| o.live).map(|o| o.name).chain(source::RATES).collect()
}

/// Are these `-o` texts options of which a mount takes others over while it serves? Their values are not looked at.
///
/// # Errors
/// [`Kind::Unsupported`] for what needs another process.
pub fn check_live(texts: &[String]) -> Result<()> {
    let all = all_live();
    for (name, value) in split(texts) {
        if !all.contains(&name.as_str()) {
            let option = value.map_or(name.clone(), |v| format!("{name}={v}"));
            let text = format!(
                "option `{name}` needs another process, which is a short pause: efc-fuse upgrade MOUNTPOINT --option {option} (without one: {})",
                all.join(", ")
            );
            return Err(Error::new(Kind::Unsupported, text));
        }
    }
    Ok(())
}

/// Parsed options of a mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Consistency level, if given; a dataset may have one, else it is strict for read-write mounts and [`Consistency::default`] for others.
    pub consistency: Option<Consistency>,
    /// Changes are permitted.
    pub read_write: bool,
    /// Other users may enter.
    pub allow_other: bool,
    /// The kernel checks modes.
    pub default_permissions: bool,
    /// Owners and modes.
    pub ownership: Ownership,
    /// Masters; empty = embedded cluster.
    pub masters: Vec<String>,
    /// State of the embedded cluster.
    pub data_dir: Option<PathBuf>,
    /// Memory tier of the embedded worker, bytes.
    pub cache_memory_bytes: u64,
    /// Disk tier of the embedded worker.
    pub cache_dir: Option<PathBuf>,
    /// Its quota, bytes.
    pub cache_size_bytes: u64,
    /// Budget of this process, bytes.
    pub memory_bytes: u64,
    /// A process of its own keeps what another mount process needs to take over.
    pub failover: bool,
    /// A directory of the source, bound from a mount that others share.
    pub subpath: Option<String>,
    /// Files are committed behind their close.
    pub writeback: bool,
    /// Staging directory.
    pub staging: Option<PathBuf>,
    /// Room in it, bytes.
    pub staging_bytes: u64,
    /// Furthest read-ahead of a stream, bytes.
    pub readahead_bytes: u64,
    /// Longest a read may take.
    pub read_deadline: Duration,
    /// What is logged, if not what `--log-level` says.
    pub log_level: Option<String>,
    /// Kernel request threads.
    pub threads: usize,
    /// Where credentials come from.
    pub secret: SecretRef,
    /// Literal keys.
    pub keys: Option<StaticKeys>,
    passwd_file: Option<String>,
    /// Never go to the origin past the workers.
    pub workers_only: bool,
    /// Options of the source.
    pub source: BTreeMap<String, String>,
}

/// Splits `-o` texts at commas; `\,` is a comma inside a value.
fn split(texts: &[String]) -> Vec<(String, Option<String>)> {
    let mut out = Vec::new();
    for text in texts {
        let mut item = String::new();
        let mut chars = text.chars().peekable();
        let mut items = Vec::new();
        while let Some(c) = chars.next() {
            match c {
                '\\' if chars.peek() == Some(&',') => item.extend(chars.next()),
                ',' => items.push(std::mem::take(&mut item)),
                c => item.push(c),
            }
        }
        items.push(item);
        out.extend(items.into_iter().filter(|i| !i.is_empty()).map(|i| match i.split_once('=') {
            Some((k, v)) => (k.to_string(), Some(v.to_string())),
            None => (i, None),
        }));
    }
    out
}

/// The options in `texts` but for `name`, one each.
pub fn all_but(texts: &[String], name: &str) -> Vec<String> {
    let others = split(texts).into_iter().filter(|(n, _)| n != name);
    others.map(|(name, value)| text(name, value)).collect()
}

/// A text in which commas do not separate options.
pub fn escaped(text: &str) -> String {
    text.replace(',', "\\,")
}

/// An option as it is written.
fn text(name: String, value: Option<String>) -> String {
    match value {
        Some(value) => format!("{name}={}", escaped(&value)),
        None => name,
    }
}

/// Puts the options in `new` at the end of `all`, in which each text is one option, without those of these names that were there. There is one place from which credentials come.
pub fn replace(all: &mut Vec<String>, new: &[String]) {
    const CREDENTIALS: [&str; 2] = ["secret", "passwd_file"];
    for (name, value) in split(new) {
        let replaced = if CREDENTIALS.contains(&name.as_str()) { &CREDENTIALS[..] } else { &[name.as_str()] };
        replaced.iter().for_each(|name| *all = all_but(all, name));
        all.push(text(name, value));
    }
}

impl MountOptions {
    /// Parses the `-o` texts, checking every name and value. `who` mounts: its uid and gid.
    ///
    /// # Errors
    /// [`Kind::Invalid`] that names the option and what to write instead.
    pub fn parse(texts: &[String], who: (u32, u32)) -> Result<Self> {
        let tenth = memory_limit_bytes() / 10;
        let mut m = MountOptions {
            consistency: None,
            read_write: false,
            allow_other: who.0 == 0,
            default_permissions: true,
            ownership: Ownership {
                uid: None,
                gid: None,
                file_mode: None,
                dir_mode: None,
                umask: 0,
                mount_uid: who.0,
                mount_gid: who.1,
            },
            masters: Vec::new(),
            data_dir: None,
            cache_memory_bytes: tenth.min(1 << 30),
            cache_dir: None,
            cache_size_bytes: 10 << 30,
            memory_bytes: tenth.min(1 << 30),
            staging: None,
            staging_bytes: 10 << 30,
            readahead_bytes: 32 << 20,
            read_deadline: Duration::from_secs(150),
            log_level: None,
            threads: std::thread::available_parallelism().map_or(4, |n| n.get()).clamp(2, 16),
            secret: SecretRef::Env,
            keys: None,
            passwd_file: None,
            workers_only: false,
            failover: true,
            subpath: None,
            writeback: false,
            source: BTreeMap::new(),
        };
        for (name, value) in split(texts) {
            m.set(&name, value)?;
        }
        if let (SecretRef::Keys, Some(path)) = (&m.secret, &m.passwd_file) {
            m.keys = Some(read_passwd(path).context("option `passwd_file`")?);
        }
        m.check()?;
        Ok(m)
    }

    fn set(&mut self, name: &str, value: Option<String>) -> Result<()> {
        if source::OPTIONS.iter().any(|o| o.name == name) {
            let value = value.ok_or_else(|| invalid(name, "needs a value"))?;
            if source::RATES.contains(&name) {
                parse_bytes(&value).map_err(|e| invalid(name, e.message()))?;
            }
            self.source.insert(name.into(), value);
            return Ok(());
        }
        // Generic mount(8) words that a FUSE mount of ours fulfils anyway.
        if [
            "noatime",
            "nodiratime",
            "relatime",
            "nosuid",
            "nodev",
            "_netdev",
            "nofail",
            "defaults",
            "auto",
            "noauto",
            "user",
        ]
        .contains(&name)
        {
            return Ok(());
        }
        let Some(known) = OPTIONS.iter().find(|o| o.name == name) else {
            return Err(Error::new(
                Kind::Invalid,
                format!("option `{name}` is unknown; `efc-fuse mount --help` lists all options"),
            ));
        };
        match (known.value.is_empty(), value) {
            (true, None) => self.set_flag(name),
            (true, Some(_)) => return Err(invalid(name, "takes no value")),
            (false, None) => return Err(invalid(name, &format!("needs a value: {name}={}", known.value))),
            (false, Some(v)) => self.set_value(name, &v).map_err(|e| invalid(name, e.message()))?,
        }
        Ok(())
    }

    fn set_flag(&mut self, name: &str) {
        match name {
            "ro" => self.read_write = false,
            "rw" | "writable" => self.read_write = true,
            "allow_other" => self.allow_other = true,
            "default_permissions" => self.default_permissions = true,
            "no_default_permissions" => self.default_permissions = false,
            "workers_only" => self.workers_only = true,
            "writeback" => self.writeback = true,
            "no_failover" => self.failover = false,
            _ => {}
        }
    }

    fn set_value(&mut self, name: &str, v: &str) -> Result<()> {
        let octal = || match u32::from_str_radix(v, 8) {
            Ok(m) if m <= 0o7777 => Ok(m),
            _ => Err(Error::new(Kind::Invalid, format!("`{v}` is not an octal mode such as 0644"))),
        };
        let number = || v.parse::<u32>().map_err(|_| Error::new(Kind::Invalid, format!("`{v}` is not a number")));
        match name {
            "consistency" => self.consistency = Some(v.parse()?),
            "uid" => self.ownership.uid = Some(number()?),
            "gid" => self.ownership.gid = Some(number()?),
            "file_mode" => self.ownership.file_mode = Some(octal()?),
            "dir_mode" => self.ownership.dir_mode = Some(octal()?),
            "umask" => self.ownership.umask = octal()?,
            "master" => self.masters = v.split([';', ' ']).filter(|s| !s.is_empty()).map(Into::into).collect(),
            "subpath" => self.subpath = Some(v.into()),
            "data_dir" => self.data_dir = Some(v.into()),
            "cache_memory" => self.cache_memory_bytes = parse_bytes(v)?,
            "cache_dir" => self.cache_dir = Some(v.into()),
            "cache_size" => self.cache_size_bytes = parse_bytes(v)?,
            "memory" => self.memory_bytes = parse_bytes(v)?,
            "staging" => self.staging = Some(v.into()),
            "staging_size" => self.staging_bytes = parse_bytes(v)?,
            "readahead" => self.readahead_bytes = parse_bytes(v)?,
            "read_deadline" => self.read_deadline = parse_duration(v)?,
            "log_level" => {
                efc_common::log::check_level(v)?;
                self.log_level = Some(v.into());
            }
            "threads" => self.threads = number()? as usize,
            "secret" => self.secret = v.parse()?,
            "passwd_file" => {
                self.passwd_file = Some(v.into());
                self.secret = SecretRef::Keys;
            }
            _ => unreachable!("every option of the table that takes a value has an arm"),
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        const MEMORY_MIN: u64 = 32 << 20;
        if self.memory_bytes < MEMORY_MIN {
            return Err(invalid("memory", &format!("must be at least {}", show_bytes(MEMORY_MIN))));
        }
        if self.cache_memory_bytes < MEMORY_MIN {
            return Err(invalid("cache_memory", &format!("must be at least {}", show_bytes(MEMORY_MIN))));
        }
        if !(1..=256).contains(&self.threads) {
            return Err(invalid("threads", "must be 1 to 256"));
        }
        if self.read_deadline < Duration::from_secs(1) {
            return Err(invalid("read_deadline", "must be at least 1s"));
        }
        let embedded = self.data_dir.is_some() || self.cache_dir.is_some();
        if embedded && !self.masters.is_empty() {
            return Err(Error::new(
                Kind::Invalid,
                "options `data_dir` and `cache_dir` belong to the embedded cluster and cannot stand beside `master`",
            ));
        }
        Ok(())
    }
}

fn invalid(name: &str, what: &str) -> Error {
    Error::new(Kind::Invalid, format!("option `{name}`: {what}"))
}

fn read_passwd(path: &str) -> Result<StaticKeys> {
    use std::os::unix::fs::PermissionsExt;
    let bad = |what: &str| Error::new(Kind::Invalid, format!("{path}: {what}"));
    let meta = std::fs::metadata(path).map_err(|e| bad(&format!("cannot be read: {e}")))?;
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(bad("others may read it; run chmod 600 on it"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| bad(&format!("cannot be read: {e}")))?;
    let mut fields = text.trim().splitn(3, ':');
    match (fields.next(), fields.next(), fields.next()) {
        (Some(id), Some(secret), token) if !id.is_empty() && !secret.is_empty() => Ok(StaticKeys {
            id: id.into(),
            secret: source::Secret::new(secret),
            token: source::Secret::new(token.unwrap_or("")),
        }),
        _ => Err(bad("must hold one line KEY_ID:KEY_SECRET or KEY_ID:KEY_SECRET:TOKEN")),
    }
}

/// What this process may use: the cgroup's limit, else the machine's memory, bytes.
pub fn memory_limit_bytes() -> u64 {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let cgroup = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| {
        let path = text.lines().find_map(|l| l.strip_prefix("0::"))?.to_string();
        number(&format!("/sys/fs/cgroup{path}/memory.max")).or_else(|| number("/sys/fs/cgroup/memory.max"))
    });
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    });
    let v1 = number("/sys/fs/cgroup/memory/memory.limit_in_bytes");
    [cgroup, v1, machine].into_iter().flatten().min().unwrap_or(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MountOptions> {
        MountOptions::parse(&[text.to_string()], (1000, 1000))
    }

    #[test]
    fn values_reach_their_fields() {
        let m =
            parse("ro,consistency=ttl=5,uid=3,umask=027,master=a:1;b:2,readahead=8MiB,endpoint=http://h:1,region=x")
                .expect("valid");
        assert_eq!(m.consistency, Some(Consistency::Ttl(Duration::from_secs(5))));
        assert_eq!((m.ownership.uid, m.ownership.umask, m.readahead_bytes), (Some(3), 0o027, 8 << 20));
        assert_eq!(m.masters, ["a:1", "b:2"]);
        assert_eq!(m.source["endpoint"], "http://h:1");
        assert!(!m.allow_other);
        assert_eq!(parse("data_dir=/x\\,y").expect("comma").data_dir, Some("/x,y".into()));
    }

    #[test]
    fn what_is_set_takes_the_place_of_what_was() {
        let mut all = Vec::new();
        replace(&mut all, &["readahead=1,log_level=info\\,h2=trace".into(), "ro".into()]);
        assert_eq!(all, ["readahead=1", "log_level=info\\,h2=trace", "ro"]);
        replace(&mut all, &["log_level=warn".into(), "ro".into()]);
        assert_eq!(all, ["readahead=1", "log_level=warn", "ro"]);
        replace(&mut all, &["passwd_file=/a".into()]);
        replace(&mut all, &["secret=dir:/b".into()]);
        assert_eq!(all[3..], ["secret=dir:/b"]);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, names) in [
            ("nonsense", "nonsense"),
            ("uid", "uid"),
            ("uid=x", "uid"),
            ("ro=1", "ro"),
            ("umask=999", "umask"),
            ("memory=1MiB", "memory"),
            ("consistency=stricter", "consistency"),
            ("secret=dir:relative", "secret"),
            ("threads=0", "threads"),
            ("master=a:1,cache_dir=/x", "cache_dir"),
            ("passwd_file=/nonexistent", "passwd_file"),
            ("endpoint", "endpoint"),
            ("bandwidth=much", "bandwidth"),
        ] {
            let e = parse(text).expect_err(text);
            assert!(e.is(Kind::Invalid) && e.message().contains(names), "{text}: {e}");
        }
    }

    #[test]
    fn the_last_of_ro_and_rw_counts() {
        let read_write = |text| parse(text).expect(text).read_write;
        assert_eq!((read_write("uid=1"), read_write("rw"), read_write("rw,ro")), (false, true, false));
    }

    #[test]
    fn every_option_of_the_table_has_an_arm() {
        for o in OPTIONS.iter().filter(|o| !o.value.is_empty()) {
            // Any answer will do; a missing arm would panic.
            let _ = parse(&format!("{}=x", o.name));
        }
    }

    #[test]
    fn a_passwd_file_must_be_private() {
        use std::os::unix::fs::PermissionsExt;
        let f = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(f.path(), "id:sec:tok\n").expect("write");
        let path = f.path().to_str().expect("utf8");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        assert!(read_passwd(path).is_err_and(|e| e.message().contains("chmod 600")));
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        let k = read_passwd(path).expect("keys");
        assert_eq!((k.id.as_str(), k.secret.expose(), k.token.expose()), ("id", "sec", "tok"));
    }
}
