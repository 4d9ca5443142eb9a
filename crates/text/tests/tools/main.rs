//! Tool calls: formats found, answers locked and read, chats with calls rendered.

#![expect(clippy::unwrap_used, reason = "in a test a failure here is a failure of the test")]
#![expect(clippy::wildcard_enum_match_arm, reason = "whatever else it is, the test fails")]

mod calls;
mod formats;
mod grammar;
mod templates;
