//! placeholder until h/master lands
use arc_swap::ArcSwap;
use efc_common::ring::Ring;
use std::sync::Arc;
/// Placeholder.
pub struct RingWatch(ArcSwap<Ring>);
impl RingWatch {
    /// A ring that never changes.
    pub fn fixed(ring: Ring) -> Arc<Self> {
        Arc::new(RingWatch(ArcSwap::from_pointee(ring)))
    }
    /// The ring in use.
    pub fn current(&self) -> Arc<Ring> {
        self.0.load_full()
    }
}
