//! Reads server-sent events, as far as the completions API uses them: the `data` field only.
//!
//! Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream". Comments and other fields
//! are skipped, several `data` lines of one event are joined by line feeds.

use std::io::{self, BufRead, Read};

/// Longest line that is accepted, so that a broken server cannot fill the memory.
const LINE_LEN_MAX: u64 = 16 << 20;

/// Iterator over the data of each event of a response body.
pub struct Events<R> {
    body: R,
}

impl<R: BufRead> Events<R> {
    /// Reads events from `body` until it ends.
    pub fn new(body: R) -> Self {
        Self { body }
    }

    fn line(&mut self) -> io::Result<Option<String>> {
        let mut line = Vec::new();
        if self.body.by_ref().take(LINE_LEN_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if line.last() != Some(&b'\n') && line.len() as u64 == LINE_LEN_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an event line is too long"));
        }
        let text = String::from_utf8(line)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
    }
}

impl<R: BufRead> Iterator for Events<R> {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut data: Option<String> = None;
        loop {
            match self.line() {
                Err(error) => return Some(Err(error)),
                // An event that the end of the stream cuts off is not an event.
                Ok(None) => return None,
                Ok(Some(line)) if line.is_empty() => {
                    if let Some(data) = data.take() {
                        return Some(Ok(data));
                    }
                }
                Ok(Some(line)) => {
                    let Some(value) = line.strip_prefix("data:") else { continue };
                    let value = value.strip_prefix(' ').unwrap_or(value);
                    match &mut data {
                        Some(data) => {
                            data.push('\n');
                            data.push_str(value);
                        }
                        None => data = Some(value.to_owned()),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Events;

    fn check(stream: &str, expected: &[&str]) {
        let events: Vec<String> = Events::new(stream.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(events, expected, "{stream:?}");
    }

    #[test]
    fn events_are_separated_by_empty_lines() {
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data: a\r\n\r\ndata:b\r\n\r\n", &["a", "b"]);
        check("data: a\ndata: b\n\n", &["a\nb"]);
    }

    #[test]
    fn comments_and_other_fields_are_skipped() {
        check(": ping\n\nevent: x\nid: 1\ndata: a\n\n", &["a"]);
    }

    #[test]
    fn an_unfinished_event_is_dropped() {
        check("data: a\n\ndata: b\n", &["a"]);
    }
}
