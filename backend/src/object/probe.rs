//! Which conditions a store really honours. Some S3-compatible servers take `If-None-Match` and `If-Match` on a write without a word and overwrite all
//! the same, some only in PUT and not in the completion of an upload; an OSS bucket with versioning ignores forbid-overwrite. So each is tried
//! once, at the first conditional change or the first question for limits, on a key of its own that is removed afterwards.
//!
//! The same for copies: a server that copies whatever the source has become (moto) must not put pieces of files together.
//!
//! Amazon's own endpoints are known and not asked. Who may not write there, or is refused for the header, has no conditions.

use super::ObjectBackend;
use super::client::Dialect;
use super::put::{if_match, refused};
use super::version::Version;
use crate::objects::{Condition, Metadata, ObjectLimits, Part, UploadId};
use bytes::Bytes;
use efc_common::{Error, Kind, Result, Retry};
use http::header;

/// What the store decides itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Conditions {
    /// [`Condition::Absent`].
    pub(super) absent: bool,
    /// [`Condition::Version`].
    pub(super) version: bool,
    /// That the source of a copy is still the version meant.
    pub(super) source: bool,
}

/// What stands there for a moment.
const BODY: &[u8] = b"probe";
/// An ETag that no object has.
const OTHER_ETAG: &[u8] = b"00000000000000000000000000000000";

impl ObjectBackend {
    /// See [`crate::objects::Objects::limits`].
    pub(super) async fn object_limits(&self) -> Result<ObjectLimits> {
        let conditions = self.conditions().await?;
        Ok(ObjectLimits {
            part_bytes_min: self.client.dialect.pick(5 << 20, 100 << 10),
            part_bytes_max: 5 << 30,
            parts_max: 10_000,
            append: self.client.dialect == Dialect::Oss,
            compose: conditions.source,
            conditional: conditions.absent,
            conditional_version: conditions.version,
        })
    }

    /// What the store decides itself; asks it the first time.
    pub(super) async fn conditions(&self) -> Result<Conditions> {
        self.conditions.get_or_try_init(|| self.probe()).await.copied()
    }

    async fn probe(&self) -> Result<Conditions> {
        if self.client.is_amazon() {
            return Ok(Conditions { absent: true, version: true, source: true });
        }
        let mut key = self.path.to_vec();
        key.extend_from_slice(format!(".efc/probe-{:016x}", rand::random::<u64>()).as_bytes());
        let locator = Bytes::from(key);
        let mut uploads = Vec::new();
        let found = self.try_conditions(&locator, &mut uploads).await;
        // Whatever came out, nothing may stay behind; what cannot be removed now is a dozen bytes, and a warning.
        for upload in &uploads {
            let _ = self.abort_upload(&locator, upload).await;
        }
        if let Err(e) = self.delete_one(&locator).await {
            tracing::warn!(key = %locator.escape_ascii(), error = %e, "a probe of the store's conditions could not be removed");
        }
        match found {
            Err(e) if matches!(e.kind(), Kind::PermissionDenied | Kind::Unsupported | Kind::Invalid) => {
                tracing::warn!(error = %e, "conditional writes could not be tried; conditions are looked at before each change");
                Ok(Conditions::default())
            }
            found => found.inspect(|c| tracing::debug!(absent = c.absent, version = c.version, "conditional writes")),
        }
    }

    async fn try_conditions(&self, locator: &Bytes, uploads: &mut Vec<UploadId>) -> Result<Conditions> {
        let body = [Bytes::from_static(BODY)];
        let other = Condition::Version(Bytes::new());
        let first = self.put_raw(locator, vec![self.absent_header()], &body).await?;
        let again = self.put_raw(locator, vec![self.absent_header()], &body).await;
        let mut found =
            Conditions { absent: refuses(again.map_err(|e| refused(e, &Condition::Absent)))?, ..Conditions::default() };
        if self.client.dialect == Dialect::S3 {
            let wrong = self.put_raw(locator, vec![if_match(header::IF_MATCH, OTHER_ETAG)?], &body).await;
            found.version = refuses(wrong.map_err(|e| refused(e, &other)))?;
        }
        if let (true, Some(etag)) = (found.version, first.get(header::ETAG)) {
            // A condition that never holds is none either.
            let right = self.put_raw(locator, vec![(header::IF_MATCH, etag.clone())], &body).await;
            found.version = !refuses(right.map_err(|e| refused(e, &other)))?;
        }
        let id = self.trial_upload(locator, uploads).await?.0;
        let version = Version { size: BODY.len() as u64, mtime_secs: 0, etag: OTHER_ETAG.to_vec() };
        let copied = self.copy_part_raw(locator, &id, 1, (locator, &version), 0..version.size).await;
        found.source = refuses(copied.map_err(|e| refused(e, &other)))?;
        for (honoured, header) in
            [(&mut found.absent, self.absent_header()), (&mut found.version, if_match(header::IF_MATCH, OTHER_ETAG)?)]
        {
            if *honoured {
                let (id, part) = self.trial_upload(locator, uploads).await?;
                let done = self.complete_raw(locator, &id, &[part], vec![header]).await;
                *honoured = refuses(done.map_err(|e| refused(e, &other)))?;
            }
        }
        Ok(found)
    }

    /// An upload of one part.
    async fn trial_upload(&self, locator: &Bytes, uploads: &mut Vec<UploadId>) -> Result<(UploadId, Part)> {
        let id = self.begin_upload(locator, &Metadata::default()).await?;
        uploads.push(id.clone());
        let part = self.upload_part(locator, &id, 1, &[Bytes::from_static(BODY)]).await?;
        Ok((id, part))
    }
}

/// Was it refused for its condition? Other refusals that are final (the server does not know the header) mean no.
fn refuses<T>(answer: Result<T>) -> Result<bool> {
    match answer {
        Ok(_) => Ok(false),
        Err(e) if e.is(Kind::Conflict) => Ok(true),
        Err(e) if e.retry() == Retry::Later => Err(e),
        Err(e) if e.is(Kind::Unsupported) || e.is(Kind::Invalid) => Ok(false),
        Err(e) => Err(Error::new(e.kind(), "a trial of conditional writes failed").caused_by(e)),
    }
}
