//! What a person or a monitoring system reads: `/metrics` (Prometheus), `/healthz`, `/status` (JSON); and what stores tell: `/events`.

use crate::events::{self, Told};
use crate::raft::Node;
use crate::service::status_reply;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use efc_client::master::MasterClient;
use efc_common::metrics::counter;
use efc_common::{Error, Kind};
use std::collections::BTreeMap;
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
    events: Option<Events>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (health, status) = (node.clone(), node);
    let app = Router::new()
        .route("/metrics", get(move || std::future::ready(metrics())))
        .route("/healthz", get(move || std::future::ready(healthz(&health))))
        .route("/status", get(move || std::future::ready(axum::Json(status_json(&status)))))
        .route("/events", post(take_events).with_state(events.map(Arc::new)));
    axum::serve(listener, app).with_graceful_shutdown(stop).await.map_err(Error::from)
}

/// Who takes events, and passes them on to the leader.
pub(crate) struct Events {
    token: String,
    /// Finds the leader by itself, beginning with this node.
    leader: MasterClient,
}

impl Events {
    /// For senders that know `token`; `own` is this node's gRPC address.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an empty token.
    pub(crate) fn new(token: String, own: &str) -> Result<Events, Error> {
        if token.is_empty() {
            return Err(Error::new(Kind::Invalid, "--events-token is empty: anybody would know it"));
        }
        Ok(Events { token, leader: MasterClient::new(vec![own.to_string()])? })
    }
}

async fn take_events(
    State(events): State<Option<Arc<Events>>>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, String) {
    let Some(events) = events else {
        return (StatusCode::NOT_FOUND, "this master takes no events: start it with --events-token\n".into());
    };
    let bearer = headers.get("authorization").and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
    let given = bearer.or(query.get("token").map(String::as_str)).unwrap_or_default();
    if !same(given.as_bytes(), events.token.as_bytes()) {
        return (StatusCode::FORBIDDEN, "not the word given with --events-token\n".into());
    }
    match events::read(&body) {
        Err(e) => (StatusCode::BAD_REQUEST, format!("{e}\n")),
        Ok(Told::Confirm(url)) => {
            tracing::warn!(url, "SNS asks whether its messages are wanted: visit this address to say yes");
            (StatusCode::OK, "visit the address in the master's log\n".into())
        }
        Ok(Told::Changes(hints)) => {
            let keys: usize = hints.iter().map(|h| h.keys.len()).sum();
            counter!("efc_master_event_keys_total").increment(keys as u64);
            match events.leader.hint(&hints).await {
                Ok(sessions) => (StatusCode::OK, format!("{keys} keys, {sessions} mounts\n")),
                Err(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{e}\n")),
            }
        }
    }
}

/// Are they equal? Takes as long for each guess of a length.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
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
