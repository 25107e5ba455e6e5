//! Budgets: bytes that may be held at once, and rates. Over budget a caller waits; nothing aborts.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Unit of accounting, bytes: a [`ByteBudget`] rounds every hold up to it.
const UNIT: u64 = 4096;

/// A hard budget of bytes. Holds are RAII; who finds it spent waits in line (first come, first served).
#[derive(Debug, Clone)]
pub struct ByteBudget {
    slots: Arc<Semaphore>,
    total: Arc<AtomicU64>,
    waits: Arc<AtomicU64>,
}

/// Bytes held from a [`ByteBudget`]; given back on drop.
#[derive(Debug)]
pub struct Hold {
    _permit: OwnedSemaphorePermit,
    bytes: u64,
}

impl Hold {
    /// How many bytes are held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl ByteBudget {
    /// A budget of `total` bytes (at least one unit of 4 KiB).
    pub fn new(total: u64) -> Self {
        let units = units_of(total);
        let total = Arc::new(AtomicU64::new(units * UNIT));
        ByteBudget { slots: Arc::new(Semaphore::new(units as usize)), total, waits: Arc::default() }
    }

    /// Makes it a budget of `total` bytes. What is held beyond that is given back as its holders come to it; until then nobody gets more. Whoever waits in line at this moment must
    /// want no more than the new total. Runs inside a tokio runtime.
    pub fn resize(&self, total: u64) {
        let units = units_of(total);
        let before = self.total.swap(units * UNIT, Relaxed) / UNIT;
        if units >= before {
            return self.slots.add_permits((units - before) as usize);
        }
        let (slots, taken) = (self.slots.clone(), (before - units) as u32);
        tokio::spawn(async move {
            match slots.acquire_many_owned(taken).await {
                Ok(permits) => permits.forget(),
                Err(_) => unreachable!("a ByteBudget's semaphore is never closed"),
            }
        });
    }

    fn units(&self, bytes: u64) -> u32 {
        // A single request larger than the whole budget may run alone rather than wait for ever.
        bytes.div_ceil(UNIT).clamp(1, self.total() / UNIT) as u32
    }

    /// Waits until `bytes` are free and holds them.
    pub async fn hold(&self, bytes: u64) -> Hold {
        if let Some(h) = self.try_hold(bytes) {
            return h;
        }
        self.waits.fetch_add(1, Relaxed);
        match self.slots.clone().acquire_many_owned(self.units(bytes)).await {
            Ok(permit) => Hold { _permit: permit, bytes },
            Err(_) => unreachable!("a ByteBudget's semaphore is never closed"),
        }
    }

    /// Holds `bytes` if they are free now.
    pub fn try_hold(&self, bytes: u64) -> Option<Hold> {
        let permit = self.slots.clone().try_acquire_many_owned(self.units(bytes)).ok()?;
        Some(Hold { _permit: permit, bytes })
    }

    /// The whole budget, bytes.
    pub fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Bytes held now.
    pub fn used(&self) -> u64 {
        self.total().saturating_sub(self.slots.available_permits() as u64 * UNIT)
    }

    /// How often a caller had to wait.
    pub fn waits(&self) -> u64 {
        self.waits.load(Relaxed)
    }
}

fn units_of(total: u64) -> u64 {
    (total / UNIT).clamp(1, u32::MAX as u64)
}

/// A token bucket: `rate` units a second with a burst of one second's worth. A rate of 0 means no limit. The rate can change at any time.
#[derive(Debug)]
pub struct RateLimit {
    /// Changed with `state` locked.
    rate: AtomicU64,
    state: Mutex<Bucket>,
    changed: Notify,
}

/// Who has taken his units waits until as many were allowed as had been taken by then.
#[derive(Debug)]
struct Bucket {
    /// Units ever taken.
    taken: f64,
    /// Units ever allowed; at most one second's worth more than were taken.
    allowed: f64,
    /// Allowed up to this time.
    at: Instant,
}

impl Bucket {
    fn refill(&mut self, rate: f64) {
        let now = Instant::now();
        let allowed = self.allowed + now.duration_since(self.at).as_secs_f64() * rate;
        (self.allowed, self.at) = (allowed.min(self.taken + rate), now);
    }
}

impl RateLimit {
    /// A limit of `rate` units (bytes, requests) a second; 0 = unlimited.
    pub fn new(rate: u64) -> Self {
        let bucket = Bucket { taken: 0.0, allowed: rate as f64, at: Instant::now() };
        RateLimit { rate: AtomicU64::new(rate), state: Mutex::new(bucket), changed: Notify::new() }
    }

    /// From now on it is `rate` units a second, also for those who wait at this moment.
    pub fn set(&self, rate: u64) {
        let mut bucket = self.state.lock();
        let before = self.rate.swap(rate, Relaxed);
        bucket.refill(before as f64);
        // What was taken without a limit is nobody's debt.
        let credit = if before == 0 { rate as f64 } else { bucket.allowed - bucket.taken };
        bucket.allowed = bucket.taken + credit.min(rate as f64);
        drop(bucket);
        self.changed.notify_waiters();
    }

    /// Units a second; 0 = unlimited.
    pub fn rate(&self) -> u64 {
        self.rate.load(Relaxed)
    }

    /// Takes `units`, waiting until the bucket allows them. A call larger than the burst runs into debt and the next
    /// callers wait it out, so the long-run rate holds for any size of call.
    pub async fn take(&self, units: u64) {
        if self.rate() == 0 {
            return;
        }
        let mine = {
            let mut bucket = self.state.lock();
            bucket.refill(self.rate() as f64);
            bucket.taken += units as f64;
            bucket.taken
        };
        loop {
            let changed = self.changed.notified();
            let wait = {
                let mut bucket = self.state.lock();
                let rate = self.rate() as f64;
                bucket.refill(rate);
                if rate == 0.0 || bucket.allowed >= mine {
                    return;
                }
                Duration::from_secs_f64((mine - bucket.allowed) / rate)
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn over_budget_waits_until_bytes_return() {
        let b = ByteBudget::new(1 << 20);
        let first = b.hold(1 << 20).await;
        assert_eq!(b.used(), 1 << 20);
        assert!(b.try_hold(1).is_none());
        let waiter = tokio::spawn({
            let b = b.clone();
            async move { b.hold(4096).await.bytes() }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(first);
        assert_eq!(waiter.await.expect("waiter"), 4096);
        assert_eq!((b.used(), b.waits()), (0, 1));
    }

    #[tokio::test]
    async fn a_request_larger_than_the_budget_runs_alone() {
        let b = ByteBudget::new(8192);
        let h = b.hold(1 << 30).await;
        assert_eq!((h.bytes(), b.used()), (1 << 30, 8192));
    }

    #[tokio::test]
    async fn a_budget_grows_at_once_and_shrinks_as_bytes_return() {
        let b = ByteBudget::new(1 << 20);
        let (first, second) = (b.hold(512 << 10).await, b.hold(512 << 10).await);
        b.resize(256 << 10);
        tokio::task::yield_now().await;
        assert_eq!((b.total(), b.used()), (256 << 10, 256 << 10));
        drop(first);
        tokio::task::yield_now().await;
        assert!(b.try_hold(4096).is_none(), "256 KiB are owed still");
        drop(second);
        tokio::task::yield_now().await;
        assert_eq!(b.used(), 0);
        let whole = b.hold(1 << 20).await;
        assert_eq!(b.used(), 256 << 10);
        b.resize(1 << 20);
        assert_eq!((b.total(), b.used()), (1 << 20, 256 << 10));
        let rest = b.try_hold(768 << 10).expect("the rest is free");
        drop((whole, rest));
        assert_eq!(b.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn long_run_rate_holds() {
        let l = RateLimit::new(1000);
        let t = Instant::now();
        for _ in 0..50 {
            l.take(100).await;
        }
        // 5000 units: 1000 of burst, then 4 s at 1000/s.
        let s = t.elapsed().as_secs_f64();
        assert!((3.9..4.2).contains(&s), "{s}");
    }

    #[tokio::test(start_paused = true)]
    async fn another_rate_counts_at_once_for_those_who_wait_too() {
        let l = Arc::new(RateLimit::new(10));
        let t = Instant::now();
        let seconds = || t.elapsed().as_secs_f64();
        l.take(10).await;
        let waiters: Vec<_> = [600, 400]
            .map(|units| {
                tokio::spawn({
                    let l = l.clone();
                    async move { l.take(units).await }
                })
            })
            .into();
        // 10 units of the 1,000 by now; what remains comes at 100 a second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        l.set(100);
        assert_eq!(l.rate(), 100);
        let mut waiters = waiters.into_iter();
        waiters.next().expect("first").await.expect("first");
        assert!((6.8..7.1).contains(&seconds()), "{}", seconds());
        waiters.next().expect("second").await.expect("second");
        assert!((10.8..11.1).contains(&seconds()), "{}", seconds());
        // Without a limit nobody waits, nor owes anything when there is one again.
        let waiter = tokio::spawn({
            let l = l.clone();
            async move { l.take(1_000_000).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        l.set(0);
        waiter.await.expect("waiter");
        l.take(1_000_000).await;
        assert!((10.8..11.2).contains(&seconds()), "{}", seconds());
        l.set(10);
        l.take(10).await;
        assert!((10.8..11.2).contains(&seconds()), "{}", seconds());
        l.take(10).await;
        assert!((11.8..12.2).contains(&seconds()), "{}", seconds());
    }
}
