//! Leases on the wire: the only place that knows both `control.proto` and the words of [`efc_common::lease`]. What comes from outside is
//! checked here: lengths of keys and lists, codes, and that nothing needed is missing.

use crate::control;
use crate::lock;
use bytes::Bytes;
use control::lease_ask::Ask as WireAsk;
use control::lease_tell::Tell as WireTell;
use efc_common::hint::{HINT_KEYS_MAX, Hint};
use efc_common::id::{Incarnation, SessionId};
use efc_common::lease::{
    Ask, Claim, DirKey, FileKey, GrantNumber, KEY_BYTES_MAX, Mode, Reason, RequestId, Scope, Tell, Times, Want,
};
use efc_common::lock::{LockState, LockTell};
use efc_common::{Error, Kind, Result};
use std::time::Duration;

/// Wants in one message, and claims.
pub const LIST_MAX: usize = 2048;
/// Files that one grant or claim excepts.
pub const EXCEPTIONS_MAX: usize = 4096;
/// Longest message a side takes.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Lease times beyond this are no one's intent, and within it sums of times do not overflow.
const LEASE_MAX: Duration = Duration::from_secs(24 * 3600);

/// What a session says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Up {
    /// Who speaks on this stream; first and only once.
    Hello {
        /// Who.
        session: SessionId,
        /// In which life.
        incarnation: Incarnation,
    },
    /// The session lives.
    Renew {
        /// Its number, for the answer.
        renewal: u64,
    },
    /// Something about leases.
    Ask(Ask),
    /// What an owner of advisory locks has and wants.
    Locks(LockState),
}

/// What a master says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Down {
    /// First on a stream.
    Welcome(Welcome),
    /// The master led when it had heard this renewal.
    Renewed {
        /// Which.
        renewal: u64,
    },
    /// This life is over, or not known here.
    NotRenewed {
        /// Which.
        renewal: u64,
        /// Why.
        reason: Reason,
    },
    /// Something about leases.
    Tell(Tell),
    /// Something about advisory locks.
    Lock(LockTell),
    /// Others changed something, says the store.
    Hint(Hint),
}

/// Who grants, and by which times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// Counts the leaders' times of office.
    pub term: u64,
    /// Silence after which a session is fenced.
    pub lease: Duration,
    /// How much earlier it stops believing.
    pub margin: Duration,
}

impl Welcome {
    /// From the numbers of a message.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for times by which nothing could be believed.
    pub fn new(term: u64, lease_ms: u64, margin_ms: u64) -> Result<Welcome> {
        let (lease, margin) = (Duration::from_millis(lease_ms), Duration::from_millis(margin_ms));
        if lease > LEASE_MAX || margin >= lease {
            return bad("impossible lease times");
        }
        Ok(Welcome { term, lease, margin })
    }

    /// The times that follow; those that are each side's own have their defaults.
    pub fn times(&self) -> Times {
        let defaults = Times::default();
        let again = defaults.again.min(self.lease / 4);
        Times { lease: self.lease, margin: self.margin, again, ..defaults }
    }
}

pub(crate) fn bad<T>(what: &'static str) -> Result<T> {
    Err(Error::new(Kind::Corrupt, what))
}

pub(crate) fn need<T>(part: Option<T>, what: &'static str) -> Result<T> {
    part.ok_or_else(|| Error::new(Kind::Corrupt, what))
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

fn mode(exclusive: bool) -> Mode {
    if exclusive { Mode::Exclusive } else { Mode::Shared }
}

fn scope_out(s: &Scope) -> Option<control::LeaseScope> {
    let (kind, file) = match s {
        Scope::Dir(_) => (control::LeaseScopeKind::LeaseScopeDir, Bytes::new()),
        Scope::File(_, f) => (control::LeaseScopeKind::LeaseScopeFile, f.as_bytes().clone()),
        Scope::Subtree(_) => (control::LeaseScopeKind::LeaseScopeSubtree, Bytes::new()),
    };
    Some(control::LeaseScope { kind: kind.into(), dir: s.dir().as_bytes().clone(), file })
}

fn scope_in(s: Option<control::LeaseScope>) -> Result<Scope> {
    let s = need(s, "a lease without a scope")?;
    let kind = s.kind();
    let dir = DirKey::from_bytes(s.dir)?;
    match kind {
        control::LeaseScopeKind::LeaseScopeFile => Ok(Scope::File(dir, FileKey::new(s.file)?)),
        _ if !s.file.is_empty() => bad("a directory's lease with a file"),
        control::LeaseScopeKind::LeaseScopeDir => Ok(Scope::Dir(dir)),
        control::LeaseScopeKind::LeaseScopeSubtree => Ok(Scope::Subtree(dir)),
        control::LeaseScopeKind::LeaseScopeUnknown => bad("a lease of an unknown kind"),
    }
}

fn want_out(w: &Want) -> control::LeaseWant {
    control::LeaseWant { scope: scope_out(&w.scope), exclusive: w.mode == Mode::Exclusive }
}

fn want_in(w: control::LeaseWant) -> Result<Want> {
    let (scope, mode) = (scope_in(w.scope)?, mode(w.exclusive));
    if matches!(scope, Scope::Subtree(_)) && mode == Mode::Shared {
        return bad("a subtree is not wanted shared");
    }
    Ok(Want { scope, mode })
}

fn wants_in(wants: Vec<control::LeaseWant>) -> Result<Vec<Want>> {
    if wants.len() > LIST_MAX {
        return bad("too many wants in one message");
    }
    wants.into_iter().map(want_in).collect()
}

fn files_out(files: &[FileKey]) -> Vec<Bytes> {
    files.iter().map(|f| f.as_bytes().clone()).collect()
}

fn files_in(files: Vec<Bytes>, scope: &Scope) -> Result<Vec<FileKey>> {
    if files.len() > EXCEPTIONS_MAX {
        return bad("too many exceptions in one lease");
    }
    if !files.is_empty() && !matches!(scope, Scope::Dir(_)) {
        return bad("only a directory's lease has exceptions");
    }
    files.into_iter().map(FileKey::new).collect()
}

fn claim_out(c: &Claim) -> control::LeaseClaim {
    control::LeaseClaim {
        scope: scope_out(&c.scope),
        exclusive: c.mode == Mode::Exclusive,
        number: c.number.0,
        exceptions: files_out(&c.exceptions),
    }
}

fn claim_in(c: control::LeaseClaim) -> Result<Claim> {
    let scope = scope_in(c.scope)?;
    let exceptions = files_in(c.exceptions, &scope)?;
    Ok(Claim { scope, mode: mode(c.exclusive), number: GrantNumber(c.number), exceptions })
}

fn reason_out(r: Reason) -> i32 {
    let code = match r {
        Reason::Fenced => control::LeaseReason::Fenced,
        Reason::Unknown => control::LeaseReason::Unknown,
        Reason::QueueFull => control::LeaseReason::QueueFull,
        Reason::TooMany => control::LeaseReason::TooMany,
        Reason::Conflict => control::LeaseReason::Conflict,
    };
    code.into()
}

fn reason_in(code: control::LeaseReason) -> Result<Reason> {
    match code {
        control::LeaseReason::Fenced => Ok(Reason::Fenced),
        control::LeaseReason::Unknown => Ok(Reason::Unknown),
        control::LeaseReason::QueueFull => Ok(Reason::QueueFull),
        control::LeaseReason::TooMany => Ok(Reason::TooMany),
        control::LeaseReason::Conflict => Ok(Reason::Conflict),
        control::LeaseReason::None => bad("a refusal without a reason"),
    }
}

/// A session's word for the wire.
pub fn up_to_wire(up: &Up) -> control::LeaseAsk {
    let ask = match up {
        Up::Hello { session, incarnation } => {
            WireAsk::Hello(control::LeaseHello { session: session.0, incarnation: incarnation.0 })
        }
        Up::Renew { renewal } => WireAsk::Renew(control::LeaseRenew { renewal: *renewal }),
        Up::Ask(Ask::Acquire { request, wants }) => {
            WireAsk::Acquire(control::LeaseAcquire { request: request.0, wants: wants.iter().map(want_out).collect() })
        }
        Up::Ask(Ask::Cancel { wants }) => {
            WireAsk::Cancel(control::LeaseCancel { wants: wants.iter().map(want_out).collect() })
        }
        Up::Ask(Ask::Release { scope, number, keep_shared }) => WireAsk::Release(control::LeaseRelease {
            scope: scope_out(scope),
            number: number.0,
            keep_shared: *keep_shared,
        }),
        Up::Locks(state) => WireAsk::Locks(lock::state_out(state)),
        Up::Ask(Ask::Reclaim { request, term, claims, part, parts, locks }) => {
            WireAsk::Reclaim(control::LeaseReclaim {
                request: request.0,
                term: *term,
                claims: claims.iter().map(claim_out).collect(),
                part: u32::try_from(*part).unwrap_or(u32::MAX),
                parts: u32::try_from(*parts).unwrap_or(u32::MAX),
                locks: locks.iter().map(lock::state_out).collect(),
            })
        }
    };
    control::LeaseAsk { ask: Some(ask) }
}

/// A session's word from the wire.
///
/// # Errors
/// [`Kind::Corrupt`], [`Kind::Invalid`] or [`Kind::NameTooLong`] for what no session says.
pub fn up_from_wire(message: control::LeaseAsk) -> Result<Up> {
    Ok(match need(message.ask, "an empty message about leases")? {
        WireAsk::Hello(h) => Up::Hello { session: SessionId(h.session), incarnation: Incarnation(h.incarnation) },
        WireAsk::Renew(r) => Up::Renew { renewal: r.renewal },
        WireAsk::Locks(s) => Up::Locks(lock::state_in(s)?),
        WireAsk::Acquire(a) => Up::Ask(Ask::Acquire { request: RequestId(a.request), wants: wants_in(a.wants)? }),
        WireAsk::Cancel(c) => Up::Ask(Ask::Cancel { wants: wants_in(c.wants)? }),
        WireAsk::Release(r) => Up::Ask(Ask::Release {
            scope: scope_in(r.scope)?,
            number: GrantNumber(r.number),
            keep_shared: r.keep_shared,
        }),
        WireAsk::Reclaim(r) => {
            if r.claims.len() > LIST_MAX || r.part >= r.parts {
                return bad("a claim that is no part of a whole");
            }
            let claims = r.claims.into_iter().map(claim_in).collect::<Result<Vec<_>>>()?;
            let (request, part, parts) = (RequestId(r.request), r.part as usize, r.parts as usize);
            let locks = r.locks.into_iter().map(lock::state_in).collect::<Result<Vec<_>>>()?;
            if part > 0 && !locks.is_empty() {
                return bad("locks are claimed with the first part");
            }
            Up::Ask(Ask::Reclaim { request, term: r.term, claims, part, parts, locks })
        }
    })
}

/// A hint for the wire.
pub fn hint_to_wire(hint: &Hint) -> control::BucketHint {
    control::BucketHint { bucket: hint.bucket.clone(), keys: hint.keys.clone() }
}

/// A hint from the wire.
///
/// # Errors
/// [`Kind::Corrupt`] for one of too many keys, or of too long ones.
pub fn hint_from_wire(h: control::BucketHint) -> Result<Hint> {
    if h.keys.len() > HINT_KEYS_MAX || h.keys.iter().any(|k| k.len() > KEY_BYTES_MAX) {
        return bad("a hint of too many keys, or of too long ones");
    }
    Ok(Hint { bucket: h.bucket, keys: h.keys })
}

/// A master's word for the wire.
pub fn down_to_wire(down: &Down) -> control::LeaseTell {
    let tell = match down {
        Down::Welcome(w) => WireTell::Welcome(control::LeaseWelcome {
            term: w.term,
            lease_ms: millis(w.lease),
            margin_ms: millis(w.margin),
        }),
        Down::Renewed { renewal } => WireTell::Renewed(control::LeaseRenewed { renewal: *renewal }),
        Down::Lock(tell) => lock::tell_out(tell),
        Down::Hint(hint) => WireTell::Hint(hint_to_wire(hint)),
        Down::NotRenewed { renewal, reason } => {
            WireTell::NotRenewed(control::LeaseNotRenewed { renewal: *renewal, reason: reason_out(*reason) })
        }
        Down::Tell(Tell::Grant { request, asked, scope, mode, number, exceptions }) => {
            WireTell::Grant(control::LeaseGrant {
                request: request.0,
                asked: scope_out(asked),
                scope: scope_out(scope),
                exclusive: *mode == Mode::Exclusive,
                number: number.0,
                exceptions: files_out(exceptions),
            })
        }
        Down::Tell(Tell::Recall { scope, number, keep_shared }) => WireTell::Recall(control::LeaseRecall {
            scope: scope_out(scope),
            number: number.0,
            keep_shared: *keep_shared,
        }),
        Down::Tell(Tell::Refuse { request, asked, reason }) => WireTell::Refuse(control::LeaseRefuse {
            request: request.0,
            asked: scope_out(asked),
            reason: reason_out(*reason),
        }),
    };
    control::LeaseTell { tell: Some(tell) }
}

/// A master's word from the wire.
///
/// # Errors
/// As [`up_from_wire`].
pub fn down_from_wire(message: control::LeaseTell) -> Result<Down> {
    Ok(match need(message.tell, "an empty message about leases")? {
        WireTell::Welcome(w) => Down::Welcome(Welcome::new(w.term, w.lease_ms, w.margin_ms)?),
        WireTell::Renewed(r) => Down::Renewed { renewal: r.renewal },
        WireTell::Hint(h) => Down::Hint(hint_from_wire(h)?),
        WireTell::LockHeard(h) => Down::Lock(lock::heard_in(h)?),
        WireTell::LockSettled(s) => Down::Lock(lock::settled_in(s)?),
        WireTell::NotRenewed(r) => Down::NotRenewed { renewal: r.renewal, reason: reason_in(r.reason())? },
        WireTell::Grant(g) => {
            let scope = scope_in(g.scope)?;
            Down::Tell(Tell::Grant {
                request: RequestId(g.request),
                asked: scope_in(g.asked)?,
                exceptions: files_in(g.exceptions, &scope)?,
                scope,
                mode: mode(g.exclusive),
                number: GrantNumber(g.number),
            })
        }
        WireTell::Recall(r) => Down::Tell(Tell::Recall {
            scope: scope_in(r.scope)?,
            number: GrantNumber(r.number),
            keep_shared: r.keep_shared,
        }),
        WireTell::Refuse(r) => Down::Tell(Tell::Refuse {
            request: RequestId(r.request),
            reason: reason_in(r.reason())?,
            asked: scope_in(r.asked)?,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use efc_common::id::SourceId;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use prost::Message;

    fn dir() -> impl Strategy<Value = DirKey> {
        (any::<[u8; 16]>(), vec(any::<u8>(), 0..40)).prop_map(|(s, k)| DirKey::new(SourceId(s), &k).expect("short"))
    }

    fn file() -> impl Strategy<Value = FileKey> {
        vec(any::<u8>(), 0..40).prop_map(|b| FileKey::new(b.into()).expect("short"))
    }

    fn scope() -> impl Strategy<Value = Scope> {
        prop_oneof![
            dir().prop_map(Scope::Dir),
            (dir(), file()).prop_map(|(d, f)| Scope::File(d, f)),
            dir().prop_map(Scope::Subtree)
        ]
    }

    fn want() -> impl Strategy<Value = Want> {
        (scope(), any::<bool>()).prop_map(|(scope, x)| {
            let mode = mode(x || matches!(scope, Scope::Subtree(_)));
            Want { scope, mode }
        })
    }

    /// A scope and exceptions that go with it.
    fn held() -> impl Strategy<Value = (Scope, Vec<FileKey>)> {
        (scope(), vec(file(), 0..4)).prop_map(|(s, f)| match s {
            Scope::Dir(_) => (s, f),
            s => (s, Vec::new()),
        })
    }

    fn claim() -> impl Strategy<Value = Claim> {
        (held(), any::<bool>(), any::<u64>()).prop_map(|((scope, exceptions), x, n)| Claim {
            scope,
            mode: mode(x),
            number: GrantNumber(n),
            exceptions,
        })
    }

    fn up() -> impl Strategy<Value = Up> {
        prop_oneof![
            any::<(u64, u64)>().prop_map(|(s, i)| Up::Hello { session: SessionId(s), incarnation: Incarnation(i) }),
            any::<u64>().prop_map(|renewal| Up::Renew { renewal }),
            (any::<u64>(), vec(want(), 0..5))
                .prop_map(|(r, wants)| Up::Ask(Ask::Acquire { request: RequestId(r), wants })),
            vec(want(), 0..5).prop_map(|wants| Up::Ask(Ask::Cancel { wants })),
            (scope(), any::<u64>(), any::<bool>()).prop_map(|(scope, n, keep_shared)| {
                Up::Ask(Ask::Release { scope, number: GrantNumber(n), keep_shared })
            }),
            (any::<u64>(), any::<u64>(), vec(claim(), 0..4), 0usize..5, 1usize..5).prop_map(
                |(r, term, claims, part, more)| {
                    let request = RequestId(r);
                    Up::Ask(Ask::Reclaim { request, term, claims, part, parts: part + more, locks: vec![] })
                }
            ),
            (any::<u64>(), vec(lock::tests::state(), 0..3)).prop_map(|(term, locks)| {
                let request = RequestId(1);
                Up::Ask(Ask::Reclaim { request, term, claims: vec![], part: 0, parts: 1, locks })
            }),
            lock::tests::state().prop_map(Up::Locks),
        ]
    }

    fn reason() -> impl Strategy<Value = Reason> {
        proptest::sample::select(vec![
            Reason::Fenced,
            Reason::Unknown,
            Reason::QueueFull,
            Reason::TooMany,
            Reason::Conflict,
        ])
    }

    fn down() -> impl Strategy<Value = Down> {
        prop_oneof![
            (any::<u64>(), 1u64..1_000_000, any::<u64>()).prop_map(|(term, lease, margin)| {
                Down::Welcome(Welcome::new(term, lease, margin % lease).expect("possible"))
            }),
            any::<u64>().prop_map(|renewal| Down::Renewed { renewal }),
            (any::<u64>(), reason()).prop_map(|(renewal, reason)| Down::NotRenewed { renewal, reason }),
            (any::<(u64, u64, bool)>(), scope(), held()).prop_map(|((r, n, x), asked, (scope, exceptions))| {
                let (request, number, mode) = (RequestId(r), GrantNumber(n), mode(x));
                Down::Tell(Tell::Grant { request, asked, scope, mode, number, exceptions })
            }),
            (scope(), any::<u64>(), any::<bool>()).prop_map(|(scope, n, keep_shared)| {
                Down::Tell(Tell::Recall { scope, number: GrantNumber(n), keep_shared })
            }),
            (any::<u64>(), scope(), reason())
                .prop_map(|(r, asked, reason)| { Down::Tell(Tell::Refuse { request: RequestId(r), asked, reason }) }),
            lock::tests::tell().prop_map(Down::Lock),
            (any::<String>(), vec(vec(any::<u8>(), 0..30).prop_map(Bytes::from), 0..4))
                .prop_map(|(bucket, keys)| Down::Hint(Hint { bucket, keys })),
        ]
    }

    proptest! {
        #[test]
        fn words_survive_the_wire(up in up(), down in down()) {
            let bytes = up_to_wire(&up).encode_to_vec();
            prop_assert_eq!(up_from_wire(control::LeaseAsk::decode(&bytes[..]).expect("decode")).expect("valid"), up);
            let bytes = down_to_wire(&down).encode_to_vec();
            let back = control::LeaseTell::decode(&bytes[..]).expect("decode");
            prop_assert_eq!(down_from_wire(back).expect("valid"), down);
        }

        #[test]
        fn garbage_is_an_error_or_sense(up in up(), down in down(), at: usize, byte: u8, cut: usize) {
            for bytes in [up_to_wire(&up).encode_to_vec(), down_to_wire(&down).encode_to_vec()] {
                let mut bytes = bytes;
                if !bytes.is_empty() {
                    let n = bytes.len();
                    bytes[at % n] = byte;
                    bytes.truncate(1 + cut % n);
                }
                // Whatever is let in is a word that can be said.
                if let Some(up) = control::LeaseAsk::decode(&bytes[..]).ok().and_then(|m| up_from_wire(m).ok()) {
                    prop_assert_eq!(up_from_wire(up_to_wire(&up)).expect("said again"), up);
                }
                if let Some(down) = control::LeaseTell::decode(&bytes[..]).ok().and_then(|m| down_from_wire(m).ok()) {
                    prop_assert_eq!(down_from_wire(down_to_wire(&down)).expect("said again"), down);
                }
            }
        }
    }

    fn wire_scope(kind: i32, dir: usize, file: usize) -> Option<control::LeaseScope> {
        Some(control::LeaseScope { kind, dir: vec![0; dir].into(), file: vec![0; file].into() })
    }

    #[test]
    fn bounds_are_checked() {
        let release = |scope| {
            let r = control::LeaseRelease { scope, number: 1, keep_shared: false };
            up_from_wire(control::LeaseAsk { ask: Some(WireAsk::Release(r)) })
        };
        assert!(
            release(wire_scope(1, 16, 0)).is_ok() && release(wire_scope(2, 16 + KEY_BYTES_MAX, KEY_BYTES_MAX)).is_ok()
        );
        for (kind, dir, file) in [
            (0, 16, 0),
            (4, 16, 0),
            (1, 15, 0),
            (1, 16, 1),
            (3, 16, 1),
            (1, 17 + KEY_BYTES_MAX, 0),
            (2, 16, 1 + KEY_BYTES_MAX),
        ] {
            assert!(release(wire_scope(kind, dir, file)).is_err(), "{kind} {dir} {file}");
        }
        assert!(release(None).is_err());
        let want = |exclusive| control::LeaseWant { scope: wire_scope(3, 16, 0), exclusive };
        let acquire = |wants| {
            up_from_wire(control::LeaseAsk { ask: Some(WireAsk::Acquire(control::LeaseAcquire { request: 1, wants })) })
        };
        assert!(acquire(vec![want(true); LIST_MAX]).is_ok());
        assert!(acquire(vec![want(true); LIST_MAX + 1]).is_err());
        assert!(acquire(vec![want(false)]).is_err());
        let reclaim = |part, parts| {
            let r = control::LeaseReclaim { part, parts, ..Default::default() };
            up_from_wire(control::LeaseAsk { ask: Some(WireAsk::Reclaim(r)) })
        };
        assert!(reclaim(0, 1).is_ok() && reclaim(0, 0).is_err() && reclaim(2, 2).is_err());
        assert!(up_from_wire(control::LeaseAsk { ask: None }).is_err());
        assert!(down_from_wire(control::LeaseTell { tell: None }).is_err());
        assert!(Welcome::new(1, 1000, 1000).is_err() && Welcome::new(1, u64::MAX, 0).is_err());
    }
}
