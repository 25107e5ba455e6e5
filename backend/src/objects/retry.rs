//! Asks an object store again after passing faults; see [`crate::retry`]. What leaves here has been retried.
//!
//! A change whose answer was lost may have happened. Where that does not matter (PUT without a condition, a part, a copy to another key, a deletion) it is simply
//! sent again. Where it does, it is sent again too, and when the store then refuses it for good, the question is whether our own first attempt
//! is the reason:
//!
//! | change | it was us when HEAD shows |
//! |---|---|
//! | conditional PUT, conditional copy with metadata, copy onto itself | our mark |
//! | completion of an upload begun in this process | our mark, given when the upload was begun |
//! | append | the size that this append makes |
//! | conditional copy that keeps metadata | the version of the source |
//!
//! The mark is a random number in the user metadata ([`MARK`], 16 hexadecimal digits), because nothing else is certain: ETags are MD5 sums at some stores and under
//! some encryptions only, and two empty files made with O_EXCL look alike. It stays on the object, is never shown, and costs no request. An
//! upload that another process began has no mark known here: its lost completion ends as the store's refusal, and the caller looks itself.
//! A beginning whose answer is lost leaves an upload behind that the sweep of open uploads finds.

use crate::ListPage;
use crate::count::Request;
use crate::object::copy;
use crate::object::delete::BATCH_KEYS;
use crate::object::multipart::{COMPLETE_PATIENCE, copy_patience};
use crate::objects::{
    Body, Condition, DynObjects, MARK, Metadata, ObjectLimits, Objects, OpenUpload, Part, UploadId, allowance,
    body_bytes, new_mark,
};
use crate::retry::{Outage, Policy};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::Node;
use efc_common::{Error, Kind, Result, Retry as Verdict};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Most uploads whose marks are remembered; what is begun beyond has none.
const MARKS_MAX: usize = 1 << 16;

/// The decorator.
pub(crate) struct Retry {
    inner: DynObjects,
    policy: Arc<Policy>,
    /// Marks of uploads that were begun and not ended.
    marks: Mutex<HashMap<UploadId, String>>,
}

impl Retry {
    /// Retries calls of `inner` as `policy` says.
    pub(crate) fn new(inner: DynObjects, policy: Arc<Policy>) -> Retry {
        Retry { inner, policy, marks: Mutex::default() }
    }

    /// A call that may be made twice. `extra` is added to the deadline.
    async fn again<T, C>(&self, request: Request, extra: Duration, mut call: impl FnMut() -> C) -> Result<T>
    where
        C: Future<Output = Result<T>>,
    {
        let mut outage = Outage::new(self.policy.deadline() + extra);
        loop {
            match outage.attempt(call()).await {
                Ok(answer) => return Ok(answer),
                Err(e) => outage.failed(&self.policy, request, e).await?,
            }
        }
    }

    /// A call that must not take effect twice. When it is refused after an attempt that nobody knows the end of, `done` says whether it
    /// had taken effect.
    async fn sure<T, C, D>(
        &self,
        request: Request,
        extra: Duration,
        mut call: impl FnMut() -> C,
        done: impl FnOnce() -> D,
    ) -> Result<T>
    where
        C: Future<Output = Result<T>>,
        D: Future<Output = Result<Option<T>>>,
    {
        let mut outage = Outage::new(self.policy.deadline() + extra);
        let mut doubtful = false;
        loop {
            match outage.attempt(call()).await {
                Ok(answer) => return Ok(answer),
                Err(e) if doubtful && e.retry() == Verdict::Never => return done().await?.ok_or(e),
                Err(e) => {
                    doubtful = true;
                    outage.failed(&self.policy, request, e).await?;
                }
            }
        }
    }

    /// What HEAD says now; `None` where there is nothing.
    async fn found(&self, locator: &Bytes) -> Result<Option<(Node, Metadata)>> {
        match self.again(Request::Getattr, Duration::ZERO, || self.inner.head(locator)).await {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.is(Kind::NotFound) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The object, if it bears our mark.
    async fn marked(&self, locator: &Bytes, mark: Option<&str>) -> Result<Option<Node>> {
        let Some(mark) = mark else { return Ok(None) };
        Ok(self.made_by(locator, &[mark.into()]).await?.map(|(node, _)| node))
    }

    /// One batch; keys whose failure may pass are tried again.
    async fn delete_batch(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        let mut outage = Outage::new(self.policy.deadline());
        let mut open: Vec<usize> = (0..locators.len()).collect();
        let mut failed = Vec::new();
        loop {
            let keys: Vec<Bytes> = open.iter().map(|i| locators[*i].clone()).collect();
            let e = match outage.attempt(self.inner.delete(&keys)).await {
                Ok(answer) => {
                    let (later, never): (Vec<_>, Vec<_>) =
                        answer.into_iter().partition(|(_, e)| e.retry() == Verdict::Later);
                    failed.extend(never.into_iter().map(|(i, e)| (open[i], e)));
                    open = later.iter().map(|(i, _)| open[*i]).collect();
                    match later.into_iter().next() {
                        None => {
                            failed.sort_by_key(|(i, _)| *i);
                            return Ok(failed);
                        }
                        Some((_, e)) => e,
                    }
                }
                Err(e) => e,
            };
            outage.failed(&self.policy, Request::Delete, e).await?;
        }
    }
}

/// The mark that `metadata` gives, or a new one, and `metadata` with it.
fn mark(metadata: &Metadata) -> (String, Metadata) {
    let mut marked = metadata.clone();
    let mark = marked.other.entry(MARK.to_string()).or_insert_with(new_mark).clone();
    (mark, marked)
}

#[async_trait]
impl Objects for Retry {
    async fn limits(&self) -> Result<ObjectLimits> {
        self.again(Request::Other, self.policy.deadline(), || self.inner.limits()).await
    }

    fn child(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes> {
        self.inner.child(dir, name, directory)
    }

    async fn put(&self, locator: &Bytes, body: Body, metadata: &Metadata, condition: &Condition) -> Result<Node> {
        let extra = allowance(body_bytes(&body));
        if *condition == Condition::Any {
            return self
                .again(Request::Put, extra, || self.inner.put(locator, body.clone(), metadata, condition))
                .await;
        }
        let (mark, metadata) = mark(metadata);
        let call = || self.inner.put(locator, body.clone(), &metadata, condition);
        self.sure(Request::Put, extra, call, || self.marked(locator, Some(&mark))).await
    }

    async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<UploadId> {
        let (mark, metadata) = mark(metadata);
        let id = self.again(Request::Other, Duration::ZERO, || self.inner.begin(locator, &metadata)).await?;
        let mut marks = self.marks.lock();
        if marks.len() < MARKS_MAX {
            marks.insert(id.clone(), mark);
        }
        Ok(id)
    }

    async fn part(&self, locator: &Bytes, upload: &UploadId, number: u32, body: Body) -> Result<Part> {
        let extra = allowance(body_bytes(&body));
        self.again(Request::Part, extra, || self.inner.part(locator, upload, number, body.clone())).await
    }

    async fn part_copy(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        source: (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part> {
        let extra = copy_patience(range.end.saturating_sub(range.start));
        let call = || self.inner.part_copy(locator, upload, number, source, range.clone());
        self.again(Request::Copy, extra, call).await
    }

    async fn complete(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Node> {
        let mark = self.marks.lock().get(upload).cloned();
        let call = || self.inner.complete(locator, upload, parts, condition);
        let done = || self.marked(locator, mark.as_deref());
        let node = self.sure(Request::Complete, COMPLETE_PATIENCE, call, done).await?;
        self.marks.lock().remove(upload);
        Ok(node)
    }

    async fn abort(&self, locator: &Bytes, upload: &UploadId) -> Result<()> {
        self.marks.lock().remove(upload);
        self.again(Request::Other, Duration::ZERO, || self.inner.abort(locator, upload)).await
    }

    async fn open_uploads(&self) -> Result<Vec<OpenUpload>> {
        self.again(Request::List, Duration::ZERO, || self.inner.open_uploads()).await
    }

    async fn append(&self, locator: &Bytes, position: u64, body: Body, metadata: &Metadata) -> Result<Node> {
        let bytes = body_bytes(&body);
        let call = || self.inner.append(locator, position, body.clone(), metadata);
        let done = || async move {
            let found = self.found(locator).await?;
            Ok(found.map(|(node, _)| node).filter(|node| node.attr.size == position + bytes))
        };
        self.sure(Request::Append, allowance(bytes), call, done).await
    }

    async fn copy(
        &self,
        source: (&Bytes, &Bytes),
        target: &Bytes,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node> {
        let size = copy::size_of(source.1)?;
        if size > copy::SINGLE_BYTES_MAX {
            return copy::by_parts(self, source, target, metadata, condition, copy::part_bytes()).await;
        }
        let extra = copy_patience(size);
        if *condition == Condition::Any && source.0 != target {
            return self.again(Request::Copy, extra, || self.inner.copy(source, target, metadata, condition)).await;
        }
        let marked = metadata.map(mark);
        let given = marked.as_ref().map(|(_, m)| m);
        let call = || self.inner.copy(source, target, given, condition);
        let done = || async {
            match &marked {
                Some((mark, _)) => self.marked(target, Some(mark)).await,
                None => Ok(self.found(target).await?.map(|(node, _)| node).filter(|node| node.version == *source.1)),
            }
        };
        self.sure(Request::Copy, extra, call, done).await
    }

    async fn delete(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        let mut failed = Vec::new();
        for (n, batch) in locators.chunks(BATCH_KEYS).enumerate() {
            let of_batch = self.delete_batch(batch).await?;
            failed.extend(of_batch.into_iter().map(|(i, e)| (n * BATCH_KEYS + i, e)));
        }
        Ok(failed)
    }

    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        let (node, mut metadata) = self.again(Request::Getattr, Duration::ZERO, || self.inner.head(locator)).await?;
        metadata.other.remove(MARK);
        Ok((node, metadata))
    }

    async fn made_by(&self, locator: &Bytes, marks: &[String]) -> Result<Option<(Node, Metadata)>> {
        let Some((node, mut metadata)) = self.found(locator).await? else { return Ok(None) };
        let mark = metadata.other.remove(MARK);
        Ok(mark.is_some_and(|m| marks.contains(&m)).then_some((node, metadata)))
    }

    async fn keys_below(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        self.again(Request::List, Duration::ZERO, || self.inner.keys_below(dir, from.clone())).await
    }
}
