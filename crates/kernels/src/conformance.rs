//! The suite that every backend runs; see the next commit.
