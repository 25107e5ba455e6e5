//! `/metrics` (Prometheus text), `/healthz` and `/stats` (JSON) of a worker: read-only, for machines and for `curl`.

use crate::server::Server;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json};
use axum::routing::get;
use efc_common::task::TaskGroup;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::net::TcpListener;

type Render = Arc<dyn Fn() -> String + Send + Sync>;

#[derive(Clone)]
struct Shared {
    server: Arc<Server>,
    metrics: Option<Render>,
}

/// Serves until the group stops.
pub(crate) fn serve(server: Arc<Server>, listener: TcpListener, metrics: Option<Render>, tasks: &TaskGroup) {
    let app = Router::new()
        .route("/metrics", get(exposition))
        .route("/healthz", get(async || "ok\n"))
        .route("/stats", get(stats))
        .with_state(Shared { server, metrics });
    tasks.spawn(async move {
        if let Err(e) = axum::serve(listener, app).await {
            tracing::error!(error = %e, "http server ended");
        }
    });
}

async fn exposition(State(s): State<Shared>) -> impl IntoResponse {
    // Refreshes the tiers' gauges.
    s.server.service().cache_stats().await;
    match &s.metrics {
        Some(render) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], render()).into_response(),
        None => (StatusCode::NOT_FOUND, "no metrics recorder in this process\n").into_response(),
    }
}

async fn stats(State(s): State<Shared>) -> Json<Value> {
    let service = s.server.service();
    let c = service.cache_stats().await;
    let tiers: Vec<Value> = c
        .tiers
        .iter()
        .map(|t| {
            json!({"name": t.name, "capacity_bytes": t.capacity, "used_bytes": t.used, "segments": t.segments,
                   "pinned_bytes": t.pinned, "ejected": t.ejected})
        })
        .collect();
    Json(json!({
        "id": s.server.hello().peer,
        "cluster": s.server.cluster(),
        "ring_epoch": s.server.epoch(),
        "connections": s.server.connections(),
        "tiers": tiers,
        "served_bytes": {"memory": c.served_memory_bytes, "disk": c.served_disk_bytes, "origin": c.served_origin_bytes},
        "hits": c.hits,
        "misses": c.misses,
        "origin": {"requests": c.origin_requests, "bytes": service.fetcher.bytes.load(Relaxed)},
        "corrupt": c.corrupt,
        "evictions": c.evictions,
        "inflight_bytes": service.budget.used(),
        "listing_bytes": service.listings.bytes(),
    }))
}
