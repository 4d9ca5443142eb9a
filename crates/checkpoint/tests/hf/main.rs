//! Hugging Face folders: those that must load, and those that must not.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod families;
mod folder;
mod hostile;
mod mutations;
mod published;
mod quantised;
mod settings;
