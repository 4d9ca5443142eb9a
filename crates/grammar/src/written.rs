//! JSON as answers have it.

use std::io;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// Between the members of an object and the items of an array, and behind a key. One blank, as in most of the JSON that
/// a model has read, and no other: what leaves no choice costs no draw, and nothing stalls in blanks.
pub(crate) const SEPARATORS: [&str; 2] = [", ", ": "];

/// A value as a grammar of a schema writes it: one blank behind commas and colons, none elsewhere.
#[must_use]
pub fn written(value: &Value) -> String {
    let mut text = Vec::new();
    let result = value.serialize(&mut Serializer::with_formatter(&mut text, Separated));
    result.expect("values of JSON can be written, and memory takes all that is");
    String::from_utf8(text).expect("JSON is written in UTF-8")
}

struct Separated;

impl Formatter for Separated {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        between(to, first)
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        to: &mut W,
        first: bool,
    ) -> io::Result<()> {
        between(to, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(SEPARATORS[1].as_bytes())
    }
}

fn between<W: ?Sized + io::Write>(to: &mut W, first: bool) -> io::Result<()> {
    if first { Ok(()) } else { to.write_all(SEPARATORS[0].as_bytes()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_blank_stands_behind_commas_and_colons() {
        let value = json!({"a": [1, "b, c", {}], "d": {"e": null, "f": []}});
        let text = r#"{"a": [1, "b, c", {}], "d": {"e": null, "f": []}}"#;
        assert_eq!(written(&value), text);
    }
}
