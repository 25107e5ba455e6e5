//! Claims: what sessions believe by grants of earlier leaders, told to a new one. Two claims of believers never contradict each other; if two do,
//! one of them is out of date, and it is the later one that is refused.

use super::engine::{Engine, Phase, Turn};
use super::table::{Hold, forbids};
use efc_common::id::SessionId;
use efc_common::lease::{Claim, DirKey, FileKey, Mode, Reason, RequestId, Scope};
use std::collections::BTreeSet;

impl Engine {
    pub(super) fn reclaim(&mut self, t: &mut Turn<'_>, session: SessionId, request: RequestId, claims: Vec<Claim>) {
        for claim in claims {
            if let Some(held) = self.hold(session, &claim.scope).filter(|h| !h.implied) {
                // Said twice, or late: what it still holds it may have again, as it holds it now. A recall answers as well as a grant.
                if held.recall.is_none() {
                    let (scope, mode) = (claim.scope, held.mode);
                    self.give(t, session, request, scope.clone(), scope, mode);
                }
                continue;
            }
            let open = self.phase == Phase::Claims && claim.number.term() < self.term;
            if !(open && self.admit(session, &claim)) {
                self.refuse(t, session, request, claim.scope, Reason::Conflict);
                continue;
            }
            let scope = claim.scope.clone();
            self.give(t, session, request, scope.clone(), scope, claim.mode);
            if let Scope::Dir(key) = &claim.scope {
                self.imply(session, key, &claim.exceptions);
            }
        }
    }

    /// A session has claimed all when all parts of one request have come: one that got lost may speak of what it still believes.
    pub(super) fn note_part(
        &mut self,
        t: &mut Turn<'_>,
        session: SessionId,
        request: RequestId,
        part: usize,
        parts: usize,
    ) {
        let Some((latest, came)) = self.owed.get_mut(&session) else { return };
        if request > *latest {
            (*latest, *came) = (request, BTreeSet::new());
        }
        if request == *latest && part < parts {
            came.insert(part);
        }
        if request == *latest && came.len() >= parts {
            self.owed.remove(&session);
            self.close_claims_if_complete(t);
        }
    }

    /// Can this be believed beside what others have claimed? Makes the split files it speaks of.
    fn admit(&mut self, session: SessionId, claim: &Claim) -> bool {
        if self.grants.len() >= 2 * self.bounds.leases {
            return false;
        }
        let foreign = |s: &super::subtree::Subtree| s.held().is_some() && s.session != session;
        if self.subtrees.iter().any(|s| foreign(s) && claim.scope.dir().is_in(&s.prefix)) {
            return false;
        }
        match &claim.scope {
            Scope::Dir(key) => self.admit_dir(session, key, claim.mode, &claim.exceptions),
            Scope::File(key, file) => {
                let dir = self.dirs.entry(key.clone()).or_default();
                if !dir.files.contains_key(file) {
                    if forbids(&dir.holders, session, claim.mode) || dir.files.len() >= self.bounds.splits {
                        return false;
                    }
                    dir.split(file);
                }
                dir.files.get(file).is_some_and(|s| !forbids(&s.holders, session, claim.mode))
            }
            Scope::Subtree(prefix) => {
                let mut below = self.dirs.range(prefix.clone()..).take_while(|(k, _)| k.is_in(prefix));
                let nested = self.subtrees.iter().any(|s| foreign(s) && s.prefix.is_in(prefix));
                !nested
                    && self.subtrees.len() < self.bounds.subtrees
                    && below.all(|(_, d)| !d.is_used_by_others(session, 0))
            }
        }
    }

    fn admit_dir(&mut self, session: SessionId, key: &DirKey, mode: Mode, exceptions: &[FileKey]) -> bool {
        let dir = self.dirs.entry(key.clone()).or_default();
        let believed = |f: &FileKey| !exceptions.contains(f);
        if forbids(&dir.holders, session, mode)
            || dir.files.iter().any(|(f, s)| believed(f) && forbids(&s.holders, session, mode))
            || dir.files.len() + exceptions.len() > 2 * self.bounds.splits
        {
            return false;
        }
        for file in exceptions {
            if !dir.files.contains_key(file) {
                dir.split(file);
            }
        }
        true
    }

    /// The split files that a claimed directory covers nevertheless: a join that only some of its believers have heard of.
    fn imply(&mut self, session: SessionId, key: &DirKey, exceptions: &[FileKey]) {
        let Some(dir) = self.dirs.get_mut(key) else { return };
        let Some(whole) = dir.holders.get(&session) else { return };
        let implied = Hold { implied: true, recall: None, ..whole.clone() };
        for (file, split) in &mut dir.files {
            if !exceptions.contains(file) {
                split.holders.entry(session).or_insert_with(|| implied.clone());
            }
        }
    }
}
