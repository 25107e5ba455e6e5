//! `efc sessions`: who has what mounted.

use crate::context::Context;
use crate::output::span;
use crate::table::Table;
use efc_common::Result;
use serde::Serialize;

/// Arguments of `efc sessions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: efc sessions -o json")]
pub(crate) struct SessionsArgs {}

/// JSON of `efc sessions`.
#[derive(Debug, Serialize)]
struct Report {
    /// Open sessions.
    sessions: Vec<Session>,
}

/// One mount.
#[derive(Debug, Serialize)]
struct Session {
    /// Number of the session.
    session: u64,
    /// Counts its lives.
    incarnation: u64,
    /// `host:pid:mountpoint`.
    client: String,
    /// Dataset name, or the source URL of a mount without one.
    dataset: String,
    /// Since it was last heard of, milliseconds.
    silent_ms: u64,
}

pub(crate) async fn run(context: &Context) -> Result<()> {
    let mut sessions: Vec<Session> = context.master()?.list_sessions().await?.into_iter().map(session).collect();
    sessions.sort_by_key(|s| s.session);
    context.output.print(&Report { sessions }, |r| {
        let mut t = Table::new(&["SESSION", "CLIENT", "DATASET", "SILENT"]);
        for s in &r.sessions {
            t.row([s.session.to_string(), s.client.clone(), s.dataset.clone(), span(s.silent_ms)]);
        }
        t.to_string()
    })
}

fn session(s: efc_proto::control::Session) -> Session {
    Session {
        session: s.session,
        incarnation: s.incarnation,
        client: s.client,
        dataset: s.dataset,
        silent_ms: s.silent_ms,
    }
}
