//! XML beside listings: the small documents that changes send and are answered with. Pure, but for [`fields`], which reads an answer.
//!
//! Three S3 requests (copy, part copy, completion) send status 200 before they know how it ends, keep the connection alive with blanks, and may then
//! put an error document into the body: a success is only what names the root element that was asked for.

use super::client::Client;
use super::error;
use super::list::{Element, each_element};
use efc_common::{Error, Kind, Result, Retry};
use http::{HeaderMap, Response};
use hyper::body::Incoming;
use percent_encoding::percent_decode;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Longest of these answers that is read: a thousand keys, deleted one by one, as long and as oddly spelt as can be.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// The elements below `root`, by name, and the headers of the answer.
pub(super) async fn fields(
    client: &Client,
    answer: Response<Incoming>,
    root: &str,
) -> Result<(HeaderMap, BTreeMap<String, String>)> {
    let (head, body) = answer.into_parts();
    let body = client.collect(body, ANSWER_BYTES_MAX).await?;
    let mut found = BTreeMap::new();
    walk(client, &head.headers, &body, root, |path, value| {
        if let [_, name] = path {
            found.insert(name.clone(), value);
        }
    })?;
    Ok((head.headers, found))
}

/// As [`fields`], with every element that closes, by its path from the root.
pub(super) async fn elements(
    client: &Client,
    answer: Response<Incoming>,
    root: &str,
    step: impl FnMut(&[String], String),
) -> Result<()> {
    let (head, body) = answer.into_parts();
    let body = client.collect(body, ANSWER_BYTES_MAX).await?;
    walk(client, &head.headers, &body, root, step)
}

fn walk(
    client: &Client,
    headers: &HeaderMap,
    body: &[u8],
    root: &str,
    mut step: impl FnMut(&[String], String),
) -> Result<()> {
    let mut seen = String::new();
    let text = String::from_utf8_lossy(body.trim_ascii());
    each_element(&text, |event| {
        match event {
            Element::Start([name]) => seen.clone_from(name),
            Element::Start(_) => {}
            Element::End(path, value) => step(path, value),
        }
        Ok(())
    })?;
    match seen.as_str() {
        name if name == root => Ok(()),
        "Error" => {
            let status = error::status_of(&error::Document::parse(body).code);
            Err(error::refused(&client.about, status, headers, body).0)
        }
        other => {
            let message = format!("{} answered with <{other}> instead of <{root}>", client.about.endpoint);
            Err(Error::new(Kind::Corrupt, message).with_retry(Retry::Later))
        }
    }
}

/// A key as an answer spells it.
pub(super) fn key(text: &str, encoded: bool) -> Vec<u8> {
    if encoded { percent_decode(text.replace('+', " ").as_bytes()).collect() } else { text.as_bytes().to_vec() }
}

/// Appends `<name>text</name>`.
pub(super) fn element(out: &mut String, name: &str, text: &str) {
    // Writing to a String cannot fail.
    let _ = write!(out, "<{name}>{}</{name}>", quick_xml::escape::escape(text));
}
