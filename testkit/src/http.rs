//! The smallest HTTP/1.1 client that can set up tests: blocking, kept-alive, whole bodies in memory. It is ours so that what fills and
//! inspects a server in a test is not the code under test.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Connect, and each read or write on the socket, end after this.
const IO_DEADLINE: Duration = Duration::from_secs(60);
/// More than this in one answer is refused.
const BODY_LIMIT_BYTES: usize = 2 << 30;

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header of that (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The answer itself if its status is 2xx.
    ///
    /// # Errors
    /// Else an error with status and body.
    pub fn ok(self) -> Result<Answer> {
        if (200..300).contains(&self.status) {
            return Ok(self);
        }
        bail!("HTTP {}: {}", self.status, self.text())
    }
}

/// A kept-alive connection to `host:port`.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    reusable: bool,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// When the name does not resolve or nobody answers.
    pub fn open(authority: &str) -> Result<Connection> {
        let addr: SocketAddr =
            authority.to_socket_addrs().with_context(|| authority.to_string())?.next().context("no address")?;
        let stream =
            TcpStream::connect_timeout(&addr, IO_DEADLINE).with_context(|| format!("connect to {authority}"))?;
        stream.set_read_timeout(Some(IO_DEADLINE))?;
        stream.set_write_timeout(Some(IO_DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream: BufReader::new(stream), reusable: true })
    }

    /// May another request be sent?
    pub fn is_reusable(&self) -> bool {
        self.reusable
    }

    /// Sends one request (`headers` must hold Host) and reads the whole answer.
    ///
    /// # Errors
    /// When the connection breaks or the answer is no HTTP.
    pub fn send(&mut self, method: &str, target: &str, headers: &[(String, String)], body: &[u8]) -> Result<Answer> {
        let mut head = format!("{method} {target} HTTP/1.1\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("content-length: {}\r\n\r\n", body.len());
        self.reusable = false;
        let socket = self.stream.get_mut();
        socket.write_all(head.as_bytes())?;
        socket.write_all(body)?;
        let answer = self.receive(method == "HEAD")?;
        self.reusable = answer.header("connection").is_none_or(|v| !v.eq_ignore_ascii_case("close"));
        Ok(answer)
    }

    fn receive(&mut self, head_only: bool) -> Result<Answer> {
        let status = loop {
            let line = self.line()?;
            let status: u16 = line.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no HTTP status line")?;
            if status != 100 {
                break status;
            }
            while !self.line()?.is_empty() {}
        };
        let mut answer = Answer { status, ..Answer::default() };
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').context("a header without a colon")?;
            answer.headers.push((name.to_ascii_lowercase(), value.trim().to_string()));
        }
        if head_only || status == 204 || status == 304 {
            return Ok(answer);
        }
        if answer.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
            loop {
                let line = self.line()?;
                let size =
                    usize::from_str_radix(line.split(';').next().unwrap_or("").trim(), 16).context("chunk size")?;
                self.take(size, &mut answer.body)?;
                self.line()?;
                if size == 0 {
                    return Ok(answer);
                }
            }
        }
        match answer.header("content-length") {
            Some(v) => {
                let size = v.parse().context("content-length")?;
                self.take(size, &mut answer.body)?;
            }
            None => {
                self.stream.read_to_end(&mut answer.body)?;
            }
        }
        Ok(answer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("the server closed the connection");
        }
        Ok(line.trim_end_matches(['\r', '\n']).to_string())
    }

    fn take(&mut self, size: usize, body: &mut Vec<u8>) -> Result<()> {
        if body.len() + size > BODY_LIMIT_BYTES {
            bail!("a body of more than {BODY_LIMIT_BYTES} bytes");
        }
        let start = body.len();
        body.resize(start + size, 0);
        self.stream.read_exact(&mut body[start..])?;
        Ok(())
    }
}

/// One unsigned request to `http://host:port/path?query` on a connection of its own.
///
/// # Errors
/// As [`Connection::send`].
pub fn request(method: &str, url: &str, body: &[u8]) -> Result<Answer> {
    let rest = url.strip_prefix("http://").context("only http:// is spoken")?;
    let slash = rest.find('/').unwrap_or(rest.len());
    let (authority, target) = (&rest[..slash], &rest[slash..]);
    let headers = [("host".to_string(), authority.to_string()), ("connection".into(), "close".into())];
    Connection::open(authority)?.send(method, if target.is_empty() { "/" } else { target }, &headers, body)
}
