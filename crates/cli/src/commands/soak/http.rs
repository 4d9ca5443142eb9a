//! Just enough HTTP/1.1 for the soak, on bare sockets: a client that can hang up at any byte.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    time::Duration,
};

/// Longest line of a head or chunk size.
const MAX_LINE_BYTES: u64 = 16 << 10;

/// Where the end of a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// After so many bytes.
    Length(usize),
    /// After a chunk of size 0.
    Chunked,
    /// Where the connection ends.
    Close,
    /// Read already.
    Ended,
}

/// A server and the key that it is asked with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) address: SocketAddr,
    pub(super) key: &'a str,
}

/// A request that was sent; its answer is read piece by piece.
pub(super) struct Exchange {
    reader: BufReader<TcpStream>,
    framing: Framing,
}

impl Exchange {
    /// Sends a request on a connection of its own.
    ///
    /// # Errors
    /// No connection, or it broke.
    pub(super) fn send(
        target: Target<'_>,
        method: &str,
        path: &str,
        body: &[u8],
        timeout: Duration,
    ) -> io::Result<Self> {
        let mut stream = TcpStream::connect_timeout(&target.address, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        stream.set_nodelay(true)?;
        let Target { address, key } = target;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
             Authorization: Bearer {key}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        Ok(Self { reader: BufReader::new(stream), framing: Framing::Close })
    }

    /// Waits up to `patience` for the answer to begin; false when it did not.
    ///
    /// # Errors
    /// The connection broke.
    pub(super) fn begins_within(&mut self, patience: Duration) -> io::Result<bool> {
        let stream = self.reader.get_ref();
        let timeout = stream.read_timeout()?;
        stream.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let began = match self.reader.fill_buf() {
            Ok(bytes) => Ok(!bytes.is_empty()),
            Err(error) if is_timeout(&error) => Ok(false),
            Err(error) => Err(error),
        };
        self.reader.get_ref().set_read_timeout(timeout)?;
        began
    }

    /// Reads the head and returns the status.
    ///
    /// # Errors
    /// The connection broke, or what came is no HTTP.
    pub(super) fn status(&mut self) -> io::Result<u16> {
        let line = self.line()?;
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.ok_or_else(|| invalid(format!("status line `{line}`")))?;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                return Ok(status);
            }
            if let Some(length) = line.strip_prefix("content-length:") {
                let length = length.trim().parse();
                self.framing = Framing::Length(length.map_err(|_| invalid(line.clone()))?);
            } else if line.replace(' ', "") == "transfer-encoding:chunked" {
                self.framing = Framing::Chunked;
            }
        }
    }

    /// The next piece of the body; `None` at its proper end.
    ///
    /// # Errors
    /// The body was cut before its end.
    pub(super) fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        match self.framing {
            Framing::Ended => Ok(None),
            Framing::Length(length) => {
                self.framing = Framing::Ended;
                self.exactly(length).map(Some)
            }
            Framing::Chunked => self.chunk(),
            Framing::Close => {
                self.framing = Framing::Ended;
                let mut rest = Vec::new();
                self.reader.read_to_end(&mut rest)?;
                Ok(Some(rest))
            }
        }
    }

    /// The rest of the body.
    ///
    /// # Errors
    /// The body was cut before its end.
    pub(super) fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece()? {
            body.extend(piece);
        }
        Ok(body)
    }

    /// Closes both directions at once, whatever is still under way.
    pub(super) fn hang_up(self) {
        // The other side may have closed first; either way the connection is gone.
        let _ignored = self.reader.get_ref().shutdown(Shutdown::Both);
    }

    fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line()?;
        let size = usize::from_str_radix(line.trim(), 16);
        let size = size.map_err(|_| invalid(format!("chunk size `{line}`")))?;
        let chunk = self.exactly(size)?;
        self.line()?;
        if size == 0 {
            self.framing = Framing::Ended;
            return Ok(None);
        }
        Ok(Some(chunk))
    }

    fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.by_ref().take(MAX_LINE_BYTES).read_line(&mut line)?;
        let whole = line.strip_suffix("\r\n");
        whole.map(str::to_owned).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// A whole answer: status and body.
///
/// # Errors
/// The connection broke.
pub(super) fn ask(
    target: Target<'_>,
    method: &str,
    path: &str,
    body: &[u8],
    timeout: Duration,
) -> io::Result<(u16, String)> {
    let mut exchange = Exchange::send(target, method, path, body, timeout)?;
    let status = exchange.status()?;
    Ok((status, String::from_utf8_lossy(&exchange.rest()?).into_owned()))
}

/// [`ask`] without a body.
///
/// # Errors
/// The connection broke.
pub(super) fn get(target: Target<'_>, path: &str) -> io::Result<(u16, String)> {
    ask(target, "GET", path, b"", Duration::from_secs(30))
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn invalid(found: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected HTTP, found {found}"))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// Answers one request with `reply` and closes.
    fn answer(reply: &'static str) -> Target<'static> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::Builder::new()
            .name("fake-server".into())
            .spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let _n_read = stream.read(&mut request).unwrap();
                stream.write_all(reply.as_bytes()).unwrap();
            })
            .unwrap();
        Target { address, key: "" }
    }

    #[test]
    fn a_chunked_body_is_joined() {
        let reply = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
                     3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        assert_eq!(get(answer(reply), "/").unwrap(), (200, "abcde".into()));
    }

    #[test]
    fn a_body_with_a_length_is_read() {
        let reply = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno";
        assert_eq!(get(answer(reply), "/").unwrap(), (503, "no".into()));
    }

    #[test]
    fn a_cut_body_is_an_error_and_no_end() {
        let reply = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
        assert_eq!(get(answer(reply), "/").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
