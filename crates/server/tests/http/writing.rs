//! Replies at length (§1.4): as long as asked, whatever would end them.

use exrail_server::writing::EngineWriter;
use exrail_verify::{FrameMessage, Said, WriteOn as _};

use crate::support::warm;

const TOKENS: usize = 40;

#[test]
fn a_reply_has_as_many_tokens_as_were_asked_for_and_their_entropies() {
    let server = warm(&[], None);
    let services = server.state.services().unwrap();
    let writer = EngineWriter::new(&services.engine);
    let message = |content: &str| FrameMessage { role: "user", content: content.to_owned() };
    let (a, b) = (message("Where is the key?"), message("What is in cabinet A?"));
    let write = |seed| writer.write_on(&[(&a, seed), (&b, seed)], TOKENS).unwrap();
    let said = write(1);
    assert_eq!(said.iter().map(Vec::len).collect::<Vec<_>>(), [TOKENS; 2]);
    let tokens = || said.iter().flatten();
    assert!(tokens().all(|token| token.entropy.is_finite() && token.entropy > 0.0));
    let text = |said: &[Said]| said.iter().map(|token| token.text.as_str()).collect::<String>();
    assert!(!text(&said[0]).is_empty() && text(&said[0]) != text(&said[1]));
    assert_eq!(write(1), said, "the same seed");
    assert_ne!(write(2), said, "another one");
    let none = services.engine.counters().sequences_running;
    assert_eq!(none, 0);
}

#[test]
fn a_reply_that_does_not_fit_is_an_error() {
    let server = warm(&[], None);
    let services = server.state.services().unwrap();
    let message = FrameMessage { role: "user", content: "Where?".to_owned() };
    let asked = [(&message, 1)];
    let n_tokens = services.engine.facts().context + 1;
    assert!(EngineWriter::new(&services.engine).write_on(&asked, n_tokens).is_err());
}
