//! Opens tiers: makes the files, reads the record index of a tier that has a directory, and makes the files agree with it again.
//!
//! After this every live slot has a sound record, every other slot is a hole, and the tier is within its quota, whatever state
//! the last process left. Data is not read here: each granule is verified when it is read.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use efc_common::error::Context;
use efc_common::id::SegmentKey;
use efc_common::{Error, Kind, Result};
use efc_proto::shared::{Seals, read_only};

use super::counters::{Counters, Removal};
use super::index::{Found, Index, Record, index_bytes};
use super::policy::Policy;
use super::segment::{Share, Tier, slot_offset};
use super::slab::{INDEX_SLACK_SLOTS, SLOTS_MAX, Slab, SlabSpec, punch};
use super::table::cost;
use super::whole::WholeFile;
use super::{Clock, DiskTier, MemoryTier, check_quota};

/// Shares a memory tier of `quota` bytes, which may grow up to the memory of this machine: there are never more slots than pages. Seals that are not used cost nothing.
fn share(data: &File, whole: Option<&WholeFile>, quota: u64) -> Result<Share> {
    let machine = rustix::system::sysinfo();
    let most = quota.max(machine.totalram as u64 * machine.mem_unit as u64);
    let slots = (most / 4096 + 1).min(SLOTS_MAX as u64) as u32;
    let (seals, seals_file) = Seals::create(slots * (1 + whole.is_some() as u32))?;
    let mut files = vec![read_only(data)?, seals_file];
    if let Some(whole) = whole {
        files.push(read_only(whole.file())?);
    }
    Ok(Share { seals, files })
}

/// What all tiers of a store share.
pub(super) struct Opener {
    pub(super) policy: Policy,
    pub(super) clock: Arc<Clock>,
    pub(super) counters: Arc<Counters>,
}

impl Opener {
    /// Opens the memory tier.
    pub(super) fn memory(&self, m: &MemoryTier, reserve: u64) -> Result<Arc<Slab>> {
        check_quota("memory", m.quota_bytes)?;
        match &m.path {
            None => {
                let fd = rustix::fs::memfd_create("efc-cache", rustix::fs::MemfdFlags::CLOEXEC)
                    .map_err(std::io::Error::from)
                    .context("create the cache's memory file")?;
                let mut spec = self.spec(Tier::Memory, "memory".into(), m.quota_bytes, reserve, File::from(fd), None);
                spec.whole = WholeFile::create()
                    .inspect_err(
                        |e| tracing::info!(error = %e, "memory tier without large folios; it works, a little slower"),
                    )
                    .ok();
                spec.share = share(&spec.data, spec.whole.as_ref(), m.quota_bytes)
                    .inspect_err(|e| tracing::warn!(error = %e, "memory cannot be shared with mounts of this host"))
                    .ok();
                Ok(Slab::new(spec))
            }
            Some(path) => self.directory(Tier::Memory, "memory".into(), path, m.quota_bytes, reserve),
        }
    }

    /// Opens a disk tier. A disk that fails, is full or is read-only comes back out of use.
    pub(super) fn disk(&self, d: &DiskTier, position: u16) -> Result<Arc<Slab>> {
        let name = format!("disk:{}", d.path.display());
        check_quota(&name, d.quota_bytes)?;
        let tier = Tier::Disk(position);
        match self.directory(tier, name.clone(), &d.path, d.quota_bytes, 0) {
            Err(e) if e.is(Kind::Io) || e.is(Kind::NoSpace) => {
                tracing::error!(tier = name, error = %e, "cache disk cannot be opened and is left out; mend it and restart");
                let nothing = File::open("/dev/null").context("open /dev/null")?;
                let slab = Slab::new(self.spec(tier, name, d.quota_bytes, 0, nothing, None));
                slab.eject();
                Ok(slab)
            }
            other => other.map_err(|e| e.with("cache_dir", d.path.display())),
        }
    }

    fn spec(&self, tier: Tier, name: String, quota: u64, reserve: u64, data: File, index: Option<Index>) -> SlabSpec {
        let (clock, counters) = (self.clock.clone(), self.counters.clone());
        SlabSpec {
            tier,
            name,
            quota,
            reserve,
            policy: self.policy,
            data,
            whole: None,
            index,
            share: None,
            clock,
            counters,
        }
    }

    fn directory(&self, tier: Tier, name: String, path: &Path, quota: u64, reserve: u64) -> Result<Arc<Slab>> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).context("make cache directory")?;
        // First the index: its lock covers the data file.
        let (index, found) = Index::open(&path.join("index"))?;
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("data"))
            .context("open cache data file")?;
        // A slot is read as a whole or by granule; read-ahead past it would read other files' slots.
        rustix::fs::fadvise(&data, 0, None, rustix::fs::Advice::Random)
            .map_err(std::io::Error::from)
            .context("fadvise")?;
        let data_bytes = data.metadata().context("stat cache data file")?.len();
        check_punch(&data, data_bytes)?;
        let plan = self.plan(&found, data_bytes, quota.saturating_sub(reserve));
        if found.reset {
            tracing::warn!(tier = name, "cache index is of another format; the cache starts empty");
        }
        self.counters.corrupt(tier, found.damaged.len() as u64);
        self.counters.removed(tier, Removal::Corrupt, found.damaged.len() as u64);
        self.counters.removed(tier, Removal::Ttl, plan.expired);
        self.counters.removed(tier, Removal::Capacity, plan.over_quota);
        mend(&data, &index, &plan).context("mend cache files")?;
        tracing::info!(
            tier = name,
            segments = plan.keep.len(),
            damaged = found.damaged.len(),
            expired = plan.expired,
            over_quota = plan.over_quota,
            "cache tier opened"
        );
        let slab = Slab::new(self.spec(tier, name, quota, reserve, data, Some(index)));
        slab.adopt(&plan.keep, plan.slots);
        Ok(slab)
    }

    /// Decides which records live on.
    fn plan(&self, found: &Found, data_bytes: u64, quota: u64) -> Plan {
        let mut plan = Plan { dead: found.damaged.clone(), ..Plan::default() };
        let now = self.clock.now_ms();
        // Newest first, pinned before all: what does not fit the quota any more is the oldest.
        let mut live = found.live.clone();
        live.sort_unstable_by_key(|(_, r)| (!r.pinned, std::cmp::Reverse(r.generation)));
        let mut seen: HashSet<SegmentKey> = HashSet::with_capacity(live.len());
        let slots_seen = live.iter().map(|(s, _)| *s as u64 + 1).max().unwrap_or(0);
        let room = quota.saturating_sub(index_bytes(slots_seen + INDEX_SLACK_SLOTS));
        let mut used = 0;
        for (slot, r) in live {
            if slot_offset(slot) + r.len as u64 > data_bytes || !seen.insert(r.key) {
                plan.dead.push(slot);
            } else if !r.pinned && r.expires_ms != 0 && r.expires_ms <= now {
                plan.expired += 1;
                plan.dead.push(slot);
            } else if used + cost(r.len) > room {
                plan.over_quota += 1;
                plan.dead.push(slot);
            } else {
                used += cost(r.len);
                plan.keep.push((slot, r));
            }
        }
        // Oldest first, so that a policy sees them in the order they came.
        plan.keep.sort_unstable_by_key(|(_, r)| r.generation);
        plan.slots = plan.keep.iter().map(|(s, _)| s + 1).max().unwrap_or(0);
        plan
    }
}

#[derive(Default)]
struct Plan {
    /// Oldest first.
    keep: Vec<(u32, Record)>,
    /// Slots whose record has to be cleared.
    dead: Vec<u32>,
    /// Slots the files keep.
    slots: u32,
    expired: u64,
    over_quota: u64,
}

/// Clears dead records, cuts the files after the last live slot, and punches every slot between that has no record: also the
/// bytes of an insert that was killed before its record was written.
fn mend(data: &File, index: &Index, plan: &Plan) -> std::io::Result<()> {
    for slot in plan.dead.iter().filter(|s| **s < plan.slots) {
        index.clear(*slot)?;
    }
    index.truncate(plan.slots)?;
    data.set_len(slot_offset(plan.slots))?;
    let mut live: Vec<u32> = plan.keep.iter().map(|(s, _)| *s).collect();
    live.sort_unstable();
    let mut next = 0;
    for slot in live {
        if slot > next {
            punch(data, next..slot)?;
        }
        next = slot + 1;
    }
    Ok(())
}

/// Is the file system able to give back a part of a file?
fn check_punch(data: &File, data_bytes: u64) -> Result<()> {
    let past_end = (data_bytes / slot_offset(1) + 1) as u32;
    punch(data, past_end..past_end + 1).map_err(|e| match e.kind() {
        std::io::ErrorKind::Unsupported => Error::new(
            Kind::Invalid,
            "the cache directory's file system cannot punch holes; use ext4, xfs, btrfs or tmpfs",
        ),
        _ => Error::from(e),
    })
}
