//! The tasks that work for the desk: one looks at the clock, one finds proofs that this master leads (one proof for all who wait for one), one
//! has the ends of silent sessions agreed on. Each may wait long for the other masters, none holds the desk up.

use super::desk::Desk;
use crate::raft::Node;
use crate::state::{Command, State};
use efc_common::Kind;
use efc_common::metrics::counter;
use efc_common::task::TaskGroup;
use std::sync::Arc;

/// Looks at the clock for the desk. When the process stops it ends the streams.
pub(crate) async fn keep_time(desk: Arc<Desk>, tasks: TaskGroup) {
    loop {
        let nap = desk.look();
        tokio::select! {
            () = tasks.stopped() => return desk.close(),
            () = desk.sooner.notified() => {}
            () = tokio::time::sleep(nap) => {}
        }
    }
}

/// Finds the proofs that renewals and the engine wait for. One that fails is asked for again: by the session, or by the engine.
pub(crate) async fn prove(desk: Arc<Desk>, node: Arc<Node>) {
    loop {
        desk.proofs.notified().await;
        let Some(batch) = desk.to_prove() else { continue };
        match node.linearizable().await {
            Ok(()) if node.read(State::office) == batch.office => desk.proved(batch),
            Ok(()) => tracing::debug!(office = batch.office, "is over"),
            Err(e) => tracing::debug!(error = %e, "cannot prove that this master leads"),
        }
    }
}

/// Has the ends of sessions agreed on. What fails is asked for again by the engine.
pub(crate) async fn fence(desk: Arc<Desk>, node: Arc<Node>) {
    loop {
        desk.fences.notified().await;
        let Some((office, sessions)) = desk.to_fence() else { continue };
        for (session, incarnation) in sessions {
            match node.propose(Command::ExpireSession { session, incarnation, office }).await {
                Ok(_) => {
                    counter!("efc_master_fences_total").increment(1);
                    tracing::warn!(%session, "was silent for too long or answered no recall, and is fenced");
                }
                // It ended by itself meanwhile, or this office has.
                Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Stale) => {}
                Err(e) => {
                    tracing::debug!(%session, error = %e, "could not be fenced");
                    break;
                }
            }
            desk.look();
        }
    }
}
