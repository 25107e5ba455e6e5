//! `efc master`: members of the master group.

use super::status::{self, Master, masters_table};
use crate::context::Context;
use clap::{Args, Subcommand};
use efc_common::{Error, Kind, Result};
use efc_proto::control::StatusReply;
use serde::Serialize;

#[derive(Debug, Subcommand)]
pub(crate) enum MasterCommand {
    /// Make the master that runs at ADDR a voter; waits until it has caught up.
    #[command(
        after_help = "A master started with `efc-master --join` adds itself; this repeats it by hand and is harmless.\n\nExample: efc master add 4 10.0.0.4:7480"
    )]
    Add(AddArgs),
    /// Take a master out of the group; stop its process afterwards.
    #[command(after_help = "Example: efc master remove 4")]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// Its node id.
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    id: u64,
    /// host:port of its gRPC service.
    addr: String,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveArgs {
    /// Its node id.
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    id: u64,
}

/// JSON of `efc master add|remove`.
#[derive(Debug, Serialize)]
struct Report {
    /// Node id of the leader.
    leader: u64,
    /// The group after the change.
    masters: Vec<Master>,
}

pub(crate) async fn run(context: &Context, command: MasterCommand) -> Result<()> {
    let master = context.master()?;
    let group: StatusReply = match command {
        MasterCommand::Add(a) => master.add_master(a.id, &a.addr).await?,
        MasterCommand::Remove(a) => match master.remove_master(a.id).await {
            Err(e) if e.is(Kind::NotFound) => {
                let what = format!("there is no master {}; `efc status` lists them", a.id);
                return Err(Error::new(Kind::NotFound, what).caused_by(e));
            }
            other => other?,
        },
    };
    let masters = status::members(&master, &group).await;
    context.output.print(&Report { leader: group.leader_node, masters }, |r| masters_table(&r.masters))
}
