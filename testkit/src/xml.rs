//! A writer of the small XML documents that object stores answer with.

use crate::sign::encode;
use std::fmt::Write;

/// A document under construction.
#[derive(Debug)]
pub struct Xml(String);

impl Xml {
    /// Starts a document with its root element; `attributes` is written as given (` xmlns="..."`).
    pub fn new(root: &str, attributes: &str) -> Xml {
        Xml(format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<{root}{attributes}>"))
    }

    /// Opens an element.
    pub fn open(&mut self, name: &str) -> &mut Self {
        let _ = write!(self.0, "<{name}>");
        self
    }

    /// Closes an element.
    pub fn close(&mut self, name: &str) -> &mut Self {
        let _ = write!(self.0, "</{name}>");
        self
    }

    /// An element with text.
    pub fn text(&mut self, name: &str, text: &str) -> &mut Self {
        self.open(name).characters(text).close(name)
    }

    /// Text inside the open element.
    pub fn characters(&mut self, text: &str) -> &mut Self {
        escape(text, &mut self.0);
        self
    }

    /// An element with a number, a truth value ...
    pub fn value(&mut self, name: &str, value: impl std::fmt::Display) -> &mut Self {
        let _ = write!(self.0, "<{name}>{value}</{name}>");
        self
    }

    /// An element with a key: percent-encoded if `url`, else as text. Bytes that are no UTF-8 can only be told with `url`.
    pub fn key(&mut self, name: &str, key: &[u8], url: bool) -> &mut Self {
        if url { self.text(name, &encode(key, true)) } else { self.text(name, &String::from_utf8_lossy(key)) }
    }

    /// Closes the root and gives the text.
    pub fn finish(mut self, root: &str) -> String {
        self.close(root);
        self.0
    }
}

/// Control characters become numeric references, as S3 writes them although XML 1.0 forbids most.
fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => {
                let _ = write!(out, "&#x{:X};", c as u32);
            }
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let mut x = Xml::new("R", "");
        x.text("a", "<&\"\n\u{1}é").key("k", b"a b/\xff", true).value("n", 7);
        let want = "<R><a>&lt;&amp;&quot;&#xA;&#x1;é</a><k>a%20b/%FF</k><n>7</n></R>";
        assert!(x.finish("R").ends_with(want));
    }
}
