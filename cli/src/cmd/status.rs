//! `efc status`: the master group as its leader sees it, checked against what each master says of itself.

use crate::context::Context;
use crate::output::{fields, warn};
use crate::table::Table;
use efc_client::master::MasterClient;
use efc_common::Result;
use efc_proto::control::StatusReply;
use futures::future::join_all;
use serde::Serialize;
use std::time::Duration;

/// How long one master may take to answer.
const MASTER_DEADLINE: Duration = Duration::from_secs(2);

/// Arguments of `efc status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: efc --master 10.0.0.1:7480 status -o json")]
pub(crate) struct StatusArgs {}

/// JSON of `efc status`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Cluster id.
    cluster: String,
    /// Software version of the master that answered.
    version: String,
    /// Node id of the leader, null if nobody leads.
    leader: Option<u64>,
    /// Its address, empty if nobody leads.
    leader_addr: String,
    /// Raft term.
    term: u64,
    /// Index of the last log entry.
    last_log: u64,
    /// Index of the last applied entry.
    applied: u64,
    /// The group.
    masters: Vec<Master>,
    /// Epoch of the worker ring.
    ring_epoch: u64,
    /// Workers in the ring.
    workers: u64,
    /// Datasets.
    datasets: u64,
    /// Client sessions.
    sessions: u64,
    /// One sentence for each thing that is not well.
    warnings: Vec<String>,
}

/// One master in the JSON of `efc status`, `efc nodes --masters` and `efc master`.
#[derive(Debug, Serialize)]
pub(crate) struct Master {
    /// Node id.
    node: u64,
    /// `host:port`.
    addr: String,
    /// `leader`, `voter` or `learner`.
    role: &'static str,
    /// Log entries it is behind the leader, as the leader knows; null if nobody leads.
    lag: Option<u64>,
    /// Index of the entry it has applied, as it says itself; null if it does not answer.
    applied: Option<u64>,
    /// Why it does not answer, else null.
    error: Option<String>,
}

pub(crate) async fn run(context: &Context) -> Result<()> {
    let report = ask(&context.master()?).await?;
    report.warnings.iter().for_each(|w| warn(w));
    context.output.print(&report, table)
}

/// Asks the group and then every master for itself.
pub(crate) async fn ask(client: &MasterClient) -> Result<Report> {
    let group = client.status().await?;
    let masters = members(client, &group).await;
    let mut warnings: Vec<String> = Vec::new();
    if group.leader_node == 0 {
        warnings.push("no master leads now: nothing can be changed until a majority of them runs".into());
    }
    for m in &masters {
        if let Some(e) = &m.error {
            warnings.push(format!("master {} at {} does not answer: {e}", m.node, m.addr));
        }
    }
    // Given on the command line and not of the group under this name: worth a word only if nobody is there.
    let strangers: Vec<String> = client.addrs().into_iter().filter(|a| masters.iter().all(|m| m.addr != *a)).collect();
    let brief = client.with_deadline(MASTER_DEADLINE);
    for (addr, said) in join_all(strangers.iter().map(async |a| (a, brief.status_of(a).await))).await {
        if let Err(e) = said {
            warnings.push(format!("{addr} was given as a master but does not answer: {e}"));
        }
    }
    Ok(Report {
        cluster: group.cluster,
        version: group.version,
        leader: Some(group.leader_node).filter(|n| *n != 0),
        leader_addr: group.leader_addr,
        term: group.term,
        last_log: group.last_log,
        applied: group.applied,
        masters,
        ring_epoch: group.ring_epoch,
        workers: group.workers,
        datasets: group.datasets,
        sessions: group.sessions,
        warnings,
    })
}

/// The masters of `group`, each asked for itself.
pub(crate) async fn members(client: &MasterClient, group: &StatusReply) -> Vec<Master> {
    let brief = client.with_deadline(MASTER_DEADLINE);
    let mut masters = join_all(group.masters.iter().map(async |m| {
        let said = match tokio::time::timeout(MASTER_DEADLINE, brief.status_of(&m.addr)).await {
            Ok(Ok(s)) if s.node == m.node => Ok(s.applied),
            Ok(Ok(s)) => Err(format!("node {} answers there", s.node)),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("nothing came within {} s", MASTER_DEADLINE.as_secs())),
        };
        let leads = m.node == group.leader_node;
        let lag = if leads { 0 } else { group.last_log.saturating_sub(m.matched) };
        Master {
            node: m.node,
            addr: m.addr.clone(),
            role: if leads {
                "leader"
            } else if m.voter {
                "voter"
            } else {
                "learner"
            },
            // Only the leader knows how far the others are.
            lag: Some(lag).filter(|_| group.leader),
            applied: said.as_ref().ok().copied(),
            error: said.err(),
        }
    }))
    .await;
    masters.sort_by_key(|m| m.node);
    masters
}

/// Masters as a table.
pub(crate) fn masters_table(masters: &[Master]) -> String {
    let mut t = Table::new(&["NODE", "ADDRESS", "ROLE", "LAG", "APPLIED", "ANSWERS"]);
    let number = |n: Option<u64>| n.map_or("-".into(), |n| n.to_string());
    for m in masters {
        let answers = if m.error.is_none() { "yes" } else { "no" };
        t.row([m.node.to_string(), m.addr.clone(), m.role.into(), number(m.lag), number(m.applied), answers.into()]);
    }
    t.to_string()
}

fn table(r: &Report) -> String {
    let leader = r.leader.map_or("none".into(), |n| format!("{n} ({})", r.leader_addr));
    let head = fields(&[
        ("cluster", r.cluster.clone()),
        ("version", r.version.clone()),
        ("leader", leader),
        ("term", r.term.to_string()),
        ("log", format!("{} ({} applied)", r.last_log, r.applied)),
        ("ring epoch", r.ring_epoch.to_string()),
        ("workers", r.workers.to_string()),
        ("datasets", r.datasets.to_string()),
        ("sessions", r.sessions.to_string()),
    ]);
    format!("{head}\n{}", masters_table(&r.masters))
}
