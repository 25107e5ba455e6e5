//! Errors as the stores word them: an HTTP status, a code that SDKs branch on, a message, sometimes headers.

use super::Dialect;
use crate::xml::Xml;

/// A refusal.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    /// HTTP status.
    pub(super) status: u16,
    /// The store's code, for example `NoSuchKey`.
    pub(super) code: String,
    /// Text for humans.
    pub(super) message: String,
    /// Further response headers.
    pub(super) headers: Vec<(String, String)>,
    /// Further XML elements.
    pub(super) details: Vec<(&'static str, String)>,
}

impl ApiError {
    /// An error with its message.
    pub(super) fn new(status: u16, code: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { status, code: code.into(), message: message.into(), headers: Vec::new(), details: Vec::new() }
    }

    /// Adds a response header.
    pub(super) fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Adds an element to the error document.
    pub(super) fn detail(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.details.push((name, value.into()));
        self
    }

    /// 404 for an object.
    pub(super) fn no_such_key(key: &[u8]) -> Self {
        ApiError::new(404, "NoSuchKey", "The specified key does not exist.").detail("Key", String::from_utf8_lossy(key))
    }

    /// 404 for a bucket.
    pub(super) fn no_such_bucket(name: &str) -> Self {
        ApiError::new(404, "NoSuchBucket", "The specified bucket does not exist.").detail("BucketName", name)
    }

    /// 400 for a parameter.
    pub(super) fn invalid_argument(message: impl Into<String>) -> Self {
        ApiError::new(400, "InvalidArgument", message)
    }

    /// 403.
    pub(super) fn access_denied(message: impl Into<String>) -> Self {
        ApiError::new(403, "AccessDenied", message)
    }

    /// 405 for a combination of method and resource nobody offers.
    pub(super) fn method_not_allowed() -> Self {
        ApiError::new(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
    }

    /// 412 for a condition on headers.
    pub(super) fn precondition_failed(condition: &str) -> Self {
        ApiError::new(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold.")
            .detail("Condition", condition)
    }

    /// The error document.
    pub(super) fn document(&self, dialect: Dialect, request_id: &str, host: &str) -> String {
        let mut x = Xml::new("Error", "");
        x.text("Code", &self.code).text("Message", &self.message).text("RequestId", request_id).text("HostId", host);
        for (name, value) in &self.details {
            x.text(name, value);
        }
        if dialect == Dialect::Oss {
            x.text("EC", "0000-00000000");
        }
        x.finish("Error")
    }
}
