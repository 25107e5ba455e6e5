//! Wire contracts: gRPC for the control plane, frames for the data plane, and the only conversions between wire and house types.

#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]
/// Generated control-plane types (`efc/control.proto`).
pub mod control {
    tonic::include_proto!("efc.control");
}
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]
/// Generated data-plane messages (`efc/data.proto`).
pub mod data {
    include!(concat!(env!("OUT_DIR"), "/efc.data.rs"));
}
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]
/// Generated state of a mount process (`efc/state.proto`).
pub mod state {
    include!(concat!(env!("OUT_DIR"), "/efc.state.rs"));
}

pub mod convert;
pub mod frame;
pub mod lease;
pub mod lock;
pub mod shared;
pub mod status;
