//! Advisory locks on the wire: parts of the messages of [`crate::lease`]. What comes from outside is checked here.

use crate::control;
use crate::lease::{bad, need};
use control::lease_tell::Tell as WireTell;
use efc_common::Result;
use efc_common::lock::{LOCKS_MAX, Lock, LockFile, LockOwner, LockState, LockTell, LockWant, Patience, Verdict};

fn range_out(l: &Lock) -> control::LockRange {
    control::LockRange { start: l.start, end: l.end, exclusive: l.exclusive }
}

fn range_in(l: control::LockRange) -> Result<Lock> {
    if l.end < l.start {
        return bad("a lock that ends before it begins");
    }
    Ok(Lock { start: l.start, end: l.end, exclusive: l.exclusive })
}

fn want_out(w: &LockWant) -> control::LockWant {
    let patience = match w.patience {
        Patience::Test => control::LockPatience::Test,
        Patience::Try => control::LockPatience::Try,
        Patience::Wait => control::LockPatience::Wait,
    };
    control::LockWant { id: w.id, lock: Some(range_out(&w.lock)), patience: patience.into() }
}

fn want_in(w: control::LockWant) -> Result<LockWant> {
    let patience = match control::LockPatience::try_from(w.patience) {
        Ok(control::LockPatience::Test) => Patience::Test,
        Ok(control::LockPatience::Try) => Patience::Try,
        Ok(control::LockPatience::Wait) => Patience::Wait,
        Err(_) => return bad("a lock wanted in an unknown way"),
    };
    Ok(LockWant { id: w.id, lock: range_in(need(w.lock, "a want without a lock")?)?, patience })
}

/// What an owner has and wants.
pub fn state_out(s: &LockState) -> control::LockState {
    control::LockState {
        file: s.file.as_bytes().clone(),
        owner: s.owner.0,
        pid: s.pid,
        version: s.version,
        held: s.held.iter().map(range_out).collect(),
        wants: s.wants.iter().map(want_out).collect(),
    }
}

/// The same, from outside.
///
/// # Errors
/// [`efc_common::Kind::Corrupt`].
pub fn state_in(s: control::LockState) -> Result<LockState> {
    if s.held.len() > LOCKS_MAX || s.wants.len() > LOCKS_MAX {
        return bad("too many locks of one owner");
    }
    Ok(LockState {
        file: LockFile::from_bytes(s.file)?,
        owner: LockOwner(s.owner),
        pid: s.pid,
        version: s.version,
        held: s.held.into_iter().map(range_in).collect::<Result<_>>()?,
        wants: s.wants.into_iter().map(want_in).collect::<Result<_>>()?,
    })
}

pub(crate) fn tell_out(tell: &LockTell) -> WireTell {
    match tell {
        LockTell::Heard { file, owner, version } => {
            WireTell::LockHeard(control::LockHeard { file: file.as_bytes().clone(), owner: owner.0, version: *version })
        }
        LockTell::Settled { file, owner, id, verdict } => {
            let (code, by, pid) = match verdict {
                Verdict::Granted => (control::LockVerdict::Granted, None, 0),
                Verdict::Denied { by, pid } => (control::LockVerdict::Denied, Some(range_out(by)), *pid),
                Verdict::Deadlock => (control::LockVerdict::Deadlock, None, 0),
                Verdict::TooMany => (control::LockVerdict::TooMany, None, 0),
            };
            let (file, owner) = (file.as_bytes().clone(), owner.0);
            WireTell::LockSettled(control::LockSettled { id: *id, verdict: code.into(), by, pid, file, owner })
        }
    }
}

pub(crate) fn heard_in(h: control::LockHeard) -> Result<LockTell> {
    Ok(LockTell::Heard { file: LockFile::from_bytes(h.file)?, owner: LockOwner(h.owner), version: h.version })
}

pub(crate) fn settled_in(s: control::LockSettled) -> Result<LockTell> {
    let verdict = match control::LockVerdict::try_from(s.verdict) {
        Ok(control::LockVerdict::Granted) => Verdict::Granted,
        Ok(control::LockVerdict::Denied) => {
            Verdict::Denied { by: range_in(need(s.by, "a denial without a lock")?)?, pid: s.pid }
        }
        Ok(control::LockVerdict::Deadlock) => Verdict::Deadlock,
        Ok(control::LockVerdict::TooMany) => Verdict::TooMany,
        Err(_) => return bad("an unknown verdict"),
    };
    Ok(LockTell::Settled { file: LockFile::from_bytes(s.file)?, owner: LockOwner(s.owner), id: s.id, verdict })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use efc_common::id::SourceId;
    use efc_common::lock::LOCK_FILE_BYTES_MAX;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn file() -> impl Strategy<Value = LockFile> {
        (any::<[u8; 16]>(), vec(any::<u8>(), 0..40)).prop_map(|(s, k)| LockFile::new(SourceId(s), &k).expect("short"))
    }

    fn lock() -> impl Strategy<Value = Lock> {
        any::<(u64, u64, bool)>().prop_map(|(a, b, exclusive)| Lock { start: a.min(b), end: a.max(b), exclusive })
    }

    fn want() -> impl Strategy<Value = LockWant> {
        let patience = proptest::sample::select(vec![Patience::Test, Patience::Try, Patience::Wait]);
        (any::<u64>(), lock(), patience).prop_map(|(id, lock, patience)| LockWant { id, lock, patience })
    }

    pub(crate) fn state() -> impl Strategy<Value = LockState> {
        (file(), any::<(u64, u32, u64)>(), vec(lock(), 0..4), vec(want(), 0..4)).prop_map(
            |(file, (owner, pid, version), held, wants)| LockState {
                file,
                owner: LockOwner(owner),
                pid,
                version,
                held,
                wants,
            },
        )
    }

    pub(crate) fn tell() -> impl Strategy<Value = LockTell> {
        let verdict = prop_oneof![
            Just(Verdict::Granted),
            (lock(), any::<u32>()).prop_map(|(by, pid)| Verdict::Denied { by, pid }),
            Just(Verdict::Deadlock),
            Just(Verdict::TooMany)
        ];
        prop_oneof![
            (file(), any::<(u64, u64)>()).prop_map(|(file, (o, version))| LockTell::Heard {
                file,
                owner: LockOwner(o),
                version
            }),
            (file(), any::<(u64, u64)>(), verdict).prop_map(|(file, (o, id), verdict)| LockTell::Settled {
                file,
                owner: LockOwner(o),
                id,
                verdict
            })
        ]
    }

    #[test]
    fn what_no_session_says_is_refused() {
        let good = control::LockState::default();
        assert!(state_in(good.clone()).is_ok());
        let backwards = control::LockRange { start: 2, end: 1, exclusive: false };
        let many = vec![control::LockRange::default(); LOCKS_MAX + 1];
        let bad = [
            control::LockState { file: vec![0; LOCK_FILE_BYTES_MAX + 1].into(), ..good.clone() },
            control::LockState { held: vec![backwards], ..good.clone() },
            control::LockState { held: many, ..good.clone() },
            control::LockState { wants: vec![control::LockWant::default()], ..good.clone() },
        ];
        assert!(bad.into_iter().all(|s| state_in(s).is_err()));
        assert!(settled_in(control::LockSettled { verdict: 9, ..Default::default() }).is_err());
        assert!(settled_in(control::LockSettled { verdict: 1, ..Default::default() }).is_err());
    }
}
