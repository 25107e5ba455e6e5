//! [`Objects`] of an object store: which file does what. One attempt per request, as everywhere in this room.

use super::version::{KEY_BYTES_MAX, Place, file_locator, place};
use super::{Cursor, ObjectBackend, PAGE_KEYS, copy, directory, not_a_directory};
use crate::objects::{Body, Condition, Metadata, ObjectLimits, Objects, OpenUpload, Part, UploadId};
use crate::{ListPage, names};
use async_trait::async_trait;
use bytes::Bytes;
use efc_common::node::{Entry, Node};
use efc_common::{Error, Kind, Result};
use std::ops::Range;

#[async_trait]
impl Objects for ObjectBackend {
    async fn limits(&self) -> Result<ObjectLimits> {
        self.object_limits().await
    }

    fn child(&self, dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes> {
        child(dir, name, directory)
    }

    async fn put(&self, locator: &Bytes, body: Body, metadata: &Metadata, condition: &Condition) -> Result<Node> {
        self.put_object(locator, body, metadata, condition).await
    }

    async fn begin(&self, locator: &Bytes, metadata: &Metadata) -> Result<UploadId> {
        self.begin_upload(locator, metadata).await
    }

    async fn part(&self, locator: &Bytes, upload: &UploadId, number: u32, body: Body) -> Result<Part> {
        self.upload_part(locator, upload, number, &body).await
    }

    async fn part_copy(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        number: u32,
        source: (&Bytes, &Bytes),
        range: Range<u64>,
    ) -> Result<Part> {
        self.copy_part(locator, upload, number, source, range).await
    }

    async fn complete(
        &self,
        locator: &Bytes,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Node> {
        self.complete_upload(locator, upload, parts, condition).await
    }

    async fn abort(&self, locator: &Bytes, upload: &UploadId) -> Result<()> {
        self.abort_upload(locator, upload).await
    }

    async fn open_uploads(&self) -> Result<Vec<OpenUpload>> {
        self.list_uploads().await
    }

    async fn append(&self, locator: &Bytes, position: u64, body: Body, metadata: &Metadata) -> Result<Node> {
        self.append_object(locator, position, body, metadata).await
    }

    async fn copy(
        &self,
        source: (&Bytes, &Bytes),
        target: &Bytes,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Node> {
        if copy::size_of(source.1)? > copy::SINGLE_BYTES_MAX {
            return copy::by_parts(self, source, target, metadata, condition, copy::part_bytes()).await;
        }
        self.copy_object(source, target, metadata, condition).await
    }

    async fn delete(&self, locators: &[Bytes]) -> Result<Vec<(usize, Error)>> {
        self.delete_objects(locators).await
    }

    async fn head(&self, locator: &Bytes) -> Result<(Node, Metadata)> {
        self.head_object(locator).await
    }

    async fn keys_below(&self, dir: &Bytes, from: Option<Bytes>) -> Result<ListPage> {
        let Place::Directory(prefix) = place(dir) else { return Err(not_a_directory()) };
        let cursor = from.as_deref().map_or(Ok(Cursor::default()), Cursor::decode)?;
        let listing = self.list_keys(prefix, false, PAGE_KEYS, &cursor.token).await?;
        if listing.next.as_ref().is_some_and(|next| *next == cursor.token) {
            return Err(Error::new(Kind::Corrupt, "the server's listing does not advance"));
        }
        let entry = |object: super::list::Object| {
            let start = object.key.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
            let name = Bytes::copy_from_slice(&names::encode(&object.key[start..], false));
            Entry { name, node: directory::file_node(object) }
        };
        Ok(ListPage {
            entries: listing.objects.into_iter().map(entry).collect(),
            next: listing.next.map(|token| Cursor { token, ..Cursor::default() }.encode()),
            hidden: listing.unusable.into_iter().map(|(key, why)| (key.into(), why)).collect(),
        })
    }
}

fn child(dir: &Bytes, name: &[u8], directory: bool) -> Result<Bytes> {
    let Place::Directory(prefix) = place(dir) else { return Err(not_a_directory()) };
    let shown = name.escape_ascii();
    let segment = names::decode(name).ok_or_else(|| {
        let text =
            format!("no object can have the name `{shown}`: `%efc-` is kept for keys that have no name of their own");
        Error::new(Kind::Invalid, text)
    })?;
    if directory && segment.beside_directory {
        return Err(Error::new(Kind::Invalid, format!("`{shown}` is the name of an object beside a directory")));
    }
    let mut key = [prefix, &segment.bytes].concat();
    if directory {
        key.push(b'/');
    }
    match key.len() {
        0 => Err(Error::new(Kind::Invalid, format!("an object at the root of a bucket cannot be called `{shown}`"))),
        1..=KEY_BYTES_MAX => Ok(if directory { key.into() } else { file_locator(key) }),
        n => Err(Error::new(
            Kind::NameTooLong,
            format!("the path makes a key of {n} bytes: object stores take {KEY_BYTES_MAX}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::version::key_of;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_shown_name_leads_back_to_its_key(
            dir in vec(prop_oneof![Just(b'/'), Just(b'd'), Just(b'.')], 0..5),
            segment in vec(prop_oneof![Just(b'.'), Just(0u8), Just(b'%'), Just(b'a'), Just(0xffu8)], 0..5),
            beside: bool,
        ) {
            let dir: Bytes = if dir.is_empty() { dir.into() } else { [&dir[..], b"/"].concat().into() };
            let key = [&dir[..], &segment].concat();
            prop_assume!(!key.is_empty());
            let locator = child(&dir, &names::encode(&segment, beside), false).expect("a file");
            prop_assert_eq!(place(&locator), Place::File(&key));
            let directory = child(&dir, &names::encode(&segment, false), true).expect("a directory");
            prop_assert_eq!(key_of(&directory).expect("key"), [&key[..], b"/"].concat());
        }
    }

    #[test]
    fn names_that_cannot_be() {
        let dir = Bytes::from_static(b"d/");
        for name in [&b"x%efc-y"[..], b"", b".", b"..", b"a/b", b"a\0b"] {
            let e = child(&dir, name, false).expect_err("refused");
            assert!(e.is(Kind::Invalid), "{e}");
        }
        assert!(child(&dir, b"a%efc-file", true).is_err_and(|e| e.is(Kind::Invalid)));
        assert!(child(&Bytes::new(), b"%efc-empty", false).is_err_and(|e| e.is(Kind::Invalid)));
        assert!(child(&dir, &[b'x'; 1023], false).is_err_and(|e| e.is(Kind::NameTooLong)));
        assert!(child(&dir, &[b'x'; 1022], true).is_err_and(|e| e.is(Kind::NameTooLong)));
        assert_eq!(child(&dir, &[b'x'; 1022], false).expect("1,024 bytes").len(), 1024);
        assert!(child(&Bytes::from_static(b"f"), b"x", false).is_err_and(|e| e.is(Kind::NotADirectory)));
    }
}
