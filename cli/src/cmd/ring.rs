//! `efc ring show`: the members of the ring, or who owns one file's blocks or one directory's listing.

use crate::context::{Cluster, Context};
use crate::dataset::{DatasetPath, Tree};
use crate::output::{fields, percent};
use crate::table::Table;
use clap::{Args, Subcommand};
use efc_client::ring::RingWatch;
use efc_common::block::{BLOCK_BYTES, split_blocks};
use efc_common::id::ContentId;
use efc_common::node::FileKind;
use efc_common::ring::{Ring, RingKey};
use efc_common::{Error, Kind, Result};
use serde::Serialize;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// Owners that are asked before the origin is.
const OWNERS: usize = 2;

#[derive(Debug, Subcommand)]
pub(crate) enum RingCommand {
    /// The members; with KEY who owns it.
    #[command(
        after_help = "Examples:\n  efc ring show\n  efc ring show dataset://images/train/a.tar\n  efc ring show \
dataset://images/train/a.tar@8388608\n\nA file whose own name ends in @NUMBER is written with an offset: name@7@0."
    )]
    Show(ShowArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// dataset://name/path, with @OFFSET only the block that holds that byte.
    key: Option<OsString>,
}

/// JSON of `efc ring show`.
#[derive(Debug, Serialize)]
struct Members {
    /// Cluster id.
    cluster: String,
    /// Epoch of the ring.
    epoch: u64,
    /// Its members, by id.
    members: Vec<Member>,
}

/// A member of the ring.
#[derive(Debug, Clone, Serialize)]
struct Member {
    /// Worker id.
    id: String,
    /// Data plane `host:port`.
    addr: String,
    /// Its host's name.
    host: String,
    /// Failure zone, empty if none.
    zone: String,
    /// Its capacity in MiB.
    weight: u64,
    /// Share of all keys it owns, 0 to 1.
    share: f64,
}

/// JSON of `efc ring show KEY`.
#[derive(Debug, Serialize)]
struct Key {
    /// The path.
    path: String,
    /// `file` or `directory`.
    kind: &'static str,
    /// Epoch of the ring.
    epoch: u64,
    /// Identity of the file's content at this version, hexadecimal; null for a directory.
    content: Option<String>,
    /// Size of the file, bytes.
    size: u64,
    /// Its blocks, or the one that was asked for.
    blocks: Vec<Block>,
    /// Of a directory: who keeps its listing, first owner first. Empty where each client lists by itself.
    listing_owners: Vec<Owner>,
}

/// A block of 4 MiB.
#[derive(Debug, Serialize)]
struct Block {
    /// Where it begins in the file.
    offset: u64,
    /// Its bytes.
    length: u64,
    /// Who is asked for it, first owner first.
    owners: Vec<Owner>,
}

/// An owner.
#[derive(Debug, Serialize)]
struct Owner {
    /// Worker id.
    id: String,
    /// Data plane `host:port`.
    addr: String,
}

pub(crate) async fn run(context: &Context, command: RingCommand) -> Result<()> {
    let RingCommand::Show(args) = command;
    let cluster = context.cluster().await?;
    match args.key {
        None => context.output.print(&members(&cluster), members_table),
        Some(text) => {
            let (path, offset) = parse_key(&text)?;
            context.output.print(&key(&cluster, &path, offset).await?, key_table)
        }
    }
}

fn members(cluster: &Cluster) -> Members {
    let ring = &cluster.ring;
    let total: u64 = ring.members().iter().map(|m| m.weight).sum();
    let member = |m: &efc_common::ring::Member| Member {
        id: m.id.0.clone(),
        addr: m.addr.clone(),
        host: m.host.clone(),
        zone: m.zone.clone(),
        weight: m.weight,
        share: m.weight as f64 / total as f64,
    };
    let members = ring.members().iter().map(member).collect();
    Members { cluster: cluster.me.cluster.clone(), epoch: ring.epoch().0, members }
}

/// Splits `@OFFSET` off a key.
fn parse_key(text: &OsStr) -> Result<(DatasetPath, Option<u64>)> {
    let bytes = text.as_bytes();
    let cut = bytes.iter().rposition(|b| *b == b'@').map(|i| (&bytes[..i], &bytes[i + 1..]));
    let offset = cut.and_then(|(_, digits)| std::str::from_utf8(digits).ok()?.parse::<u64>().ok());
    match (cut, offset) {
        (Some((path, _)), Some(offset)) => Ok((DatasetPath::required(OsStr::from_bytes(path))?, Some(offset))),
        _ => Ok((DatasetPath::required(text)?, None)),
    }
}

async fn key(cluster: &Cluster, path: &DatasetPath, offset: Option<u64>) -> Result<Key> {
    let ring = &cluster.ring;
    let mut tree = Tree::open(cluster, &RingWatch::fixed(ring.clone()), &path.name).await?;
    let (origin, node) = tree.resolve(&path.parts).await?;
    let mut key = Key {
        path: path.to_string(),
        kind: "file",
        epoch: ring.epoch().0,
        content: None,
        size: node.attr.size,
        blocks: Vec::new(),
        listing_owners: Vec::new(),
    };
    match node.attr.kind {
        FileKind::Directory => {
            (key.kind, key.size) = ("directory", 0);
            if origin.backend.capabilities().shared_listing {
                key.listing_owners = owners(ring, RingKey::directory(origin.id, &node.locator));
            }
            return Ok(key);
        }
        FileKind::File => {}
        _ => {
            return Err(Error::new(
                Kind::Invalid,
                format!("{path} is neither a file nor a directory; nothing of it is cached"),
            ));
        }
    }
    let content = ContentId::new(origin.id, &node.locator, &node.version);
    let range = match offset {
        Some(at) if at >= key.size => {
            return Err(Error::new(
                Kind::Invalid,
                format!("{path} has {} bytes; offset {at} is beyond its end", key.size),
            ));
        }
        Some(at) => {
            let start = at / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
            start..key.size.min(start + BLOCK_BYTES as u64)
        }
        None => 0..key.size,
    };
    let block = |r: std::ops::Range<u64>| {
        let owners = owners(ring, RingKey::block(content, r.start));
        Block { offset: r.start, length: r.end - r.start, owners }
    };
    key.content = Some(content.to_string());
    key.blocks = split_blocks(range).map(block).collect();
    Ok(key)
}

fn owners(ring: &Ring, key: RingKey) -> Vec<Owner> {
    ring.owners(key, OWNERS).into_iter().map(|m| Owner { id: m.id.0.clone(), addr: m.addr.clone() }).collect()
}

fn members_table(r: &Members) -> String {
    let mut t = Table::new(&["ID", "ADDRESS", "HOST", "ZONE", "WEIGHT", "SHARE"]);
    let text = |s: &String| if s.is_empty() { "-".into() } else { s.clone() };
    let total = r.members.iter().map(|m| m.weight).sum();
    for m in &r.members {
        t.row([
            m.id.clone(),
            m.addr.clone(),
            text(&m.host),
            text(&m.zone),
            m.weight.to_string(),
            percent(m.weight, total),
        ]);
    }
    format!("epoch {} of cluster {}\n{t}", r.epoch, r.cluster)
}

fn key_table(k: &Key) -> String {
    let show = |o: &[Owner]| o.iter().map(|o| format!("{} ({})", o.id, o.addr)).collect::<Vec<_>>().join(", ");
    if k.kind == "directory" {
        let owners = if k.listing_owners.is_empty() { "each client by itself".into() } else { show(&k.listing_owners) };
        return fields(&[("path", k.path.clone()), ("epoch", k.epoch.to_string()), ("listed by", owners)]);
    }
    let head = fields(&[
        ("path", k.path.clone()),
        ("content", k.content.clone().unwrap_or_default()),
        ("size", k.size.to_string()),
        ("epoch", k.epoch.to_string()),
    ]);
    let mut t = Table::new(&["OFFSET", "LENGTH", "OWNERS"]);
    k.blocks.iter().for_each(|b| t.row([b.offset.to_string(), b.length.to_string(), show(&b.owners)]));
    format!("{head}\n{t}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_may_have_an_offset() {
        let parse = |t: &str| parse_key(OsStr::new(t)).map(|(p, o)| (p.to_string(), o)).expect("key");
        assert_eq!(parse("dataset://x/a"), ("dataset://x/a".into(), None));
        assert_eq!(parse("dataset://x/a@4194304"), ("dataset://x/a".into(), Some(4194304)));
        assert_eq!(parse("dataset://x/a@b"), ("dataset://x/a@b".into(), None));
        assert_eq!(parse("dataset://x/a@7@0"), ("dataset://x/a@7".into(), Some(0)));
        assert!(parse_key(OsStr::new("a@1")).is_err_and(|e| e.is(Kind::Invalid)));
    }
}
