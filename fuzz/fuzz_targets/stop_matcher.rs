//! Stop strings and a text, separated by NUL; the first byte says into what pieces the text is
//! cut. However it is cut, the same text is released, and no stop string is in it.

#![no_main]

use exrail_text::StopMatcher;
use libfuzzer_sys::fuzz_target;

fn stream(stops: &[String], pieces: impl Iterator<Item = String>) -> (String, Option<usize>) {
    let mut matcher = StopMatcher::new(stops.to_vec());
    let mut released = String::new();
    let mut stopped = None;
    for piece in pieces {
        let out = matcher.push(&piece);
        released.push_str(&out.text);
        stopped = out.stopped;
    }
    released.push_str(&matcher.finish());
    (released, stopped)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((cut, rest)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(rest);
    let mut fields: Vec<String> = text.split('\0').take(8).map(String::from).collect();
    let Some(text) = fields.pop() else { return };
    let characters: Vec<char> = text.chars().collect();
    let pieces = characters.chunks(1 + usize::from(*cut % 7)).map(|it| it.iter().collect());
    let streamed = stream(&fields, pieces);
    assert_eq!(streamed, stream(&fields, std::iter::once(text.clone())));
    assert!(text.starts_with(&streamed.0));
    assert!(fields.iter().all(|stop| stop.is_empty() || !streamed.0.contains(stop.as_str())));
});
