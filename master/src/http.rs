//! What a person or a monitoring system reads: `/metrics` (Prometheus), `/healthz`, `/status` (JSON).

use crate::raft::Node;
use crate::service::status_reply;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use efc_common::Error;
use std::sync::Arc;
use tokio::net::TcpListener;

/// Serves until `stop` resolves. `metrics` renders the exposition text.
///
/// # Errors
/// The I/O error of the listener.
pub(crate) async fn serve(
    listener: TcpListener,
    node: Arc<Node>,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (health, status) = (node.clone(), node);
    let app = Router::new()
        .route("/metrics", get(move || std::future::ready(metrics())))
        .route("/healthz", get(move || std::future::ready(healthz(&health))))
        .route("/status", get(move || std::future::ready(axum::Json(status_json(&status)))));
    axum::serve(listener, app).with_graceful_shutdown(stop).await.map_err(Error::from)
}

/// Healthy is a node that knows a leader.
fn healthz(node: &Node) -> (StatusCode, &'static str) {
    match node.view().leader {
        Some(_) => (StatusCode::OK, "ok\n"),
        None => (StatusCode::SERVICE_UNAVAILABLE, "no leader\n"),
    }
}

fn status_json(node: &Node) -> serde_json::Value {
    let s = status_reply(node);
    let masters: Vec<_> = s
        .masters
        .iter()
        .map(|m| serde_json::json!({"node": m.node, "addr": m.addr, "voter": m.voter, "matched": m.matched}))
        .collect();
    serde_json::json!({
        "cluster": s.cluster, "node": s.node, "leader": s.leader, "leader_node": s.leader_node,
        "leader_addr": s.leader_addr, "term": s.term, "last_log": s.last_log, "applied": s.applied,
        "masters": masters, "ring_epoch": s.ring_epoch, "workers": s.workers, "datasets": s.datasets,
        "sessions": s.sessions, "version": s.version,
    })
}
