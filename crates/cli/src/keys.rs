//! Keys that change while the server runs.

use std::{fs::Metadata, path::Path, time::Duration};

use anyhow::Result;
use exrail_server::{KeyError, Keys};
use tokio::signal::unix::{SignalKind, signal};

use crate::options::Access;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Reads the key file again whenever it has changed or SIGHUP comes, as long as the server runs. A file that cannot
/// be read, or holds no usable key, changes nothing: the keys stay as they were, and the log says why.
pub(crate) async fn follow(access: Access, replace: impl Fn(Keys) -> Result<(), KeyError>) {
    let Some(file) = access.api_key_file.clone() else { return };
    let mut hang_up = match signal(SignalKind::hangup()) {
        Ok(hang_up) => hang_up,
        Err(error) => {
            tracing::error!(%error, "API keys are not read again: no handler for SIGHUP");
            return;
        }
    };
    let mut seen = stamp(&file);
    let mut look = tokio::time::interval(LOOK);
    loop {
        let asked = tokio::select! {
            _ = look.tick() => false,
            _ = hang_up.recv() => true,
        };
        let now = stamp(&file);
        if !asked && now == seen {
            continue;
        }
        seen = now;
        match read_again(&access, &replace) {
            Ok(n_keys) => tracing::info!(n_keys, "API keys were read again"),
            Err(error) => tracing::error!("API keys stay as they were: {error:#}"),
        }
    }
}

fn read_again(access: &Access, replace: &impl Fn(Keys) -> Result<(), KeyError>) -> Result<usize> {
    let keys = access.keys()?;
    let n_keys = keys.len();
    replace(keys)?;
    Ok(n_keys)
}

/// What changes with a file; none while there is none.
fn stamp(file: &Path) -> Option<(std::time::SystemTime, u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let of = |data: Metadata| Some((data.modified().ok()?, data.len(), data.ino()));
    std::fs::metadata(file).ok().and_then(of)
}
