//! The folder of sessions: `FOLDER/OWNER/NAME.session`.
//!
//! A file gets its name when all of it is on the medium, and is replaced as a whole. What a killed program
//! left half-written is removed at the next start, before the files are brought under the cap. One process
//! owns a folder: the lock goes with it, however it ends.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::SessionError;

const EXTENSION: &str = "session";
/// Of a file that is being written. No name of a session has it.
const PARTIAL: &str = "partial";
const LOCK: &str = "LOCK";
/// Characters of a name.
const LONGEST: usize = 64;

/// The name of a session; safe as part of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionName(String);

impl SessionName {
    /// Takes a name.
    ///
    /// # Errors
    /// Empty, longer than 64 characters, or with others than `A-Z a-z 0-9 . _ -`, of which `.` and `-` may not
    /// be the first.
    pub fn new(name: &str) -> Result<SessionName, SessionError> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let is_first = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.len() <= LONGEST && name.starts_with(is_first) && name.chars().all(is_plain) {
            return Ok(SessionName(name.to_owned()));
        }
        Err(SessionError::Name { found: name.to_owned(), longest: LONGEST })
    }

    /// As it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A file that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Of the session.
    pub(super) name: SessionName,
    pub(super) bytes: u64,
    /// When it was last saved or opened.
    pub(super) used: SystemTime,
}

/// A folder of files with a limit on their bytes.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    cap_bytes: u64,
    /// Held as long as the folder is.
    _lock: File,
}

/// A file and whose it is.
#[derive(Debug)]
struct Entry {
    path: PathBuf,
    owner: PathBuf,
    bytes: u64,
    used: SystemTime,
}

impl Folder {
    /// Takes a folder, which is made when it is not there, removes what was left half-written, and brings the
    /// rest under the cap.
    pub(super) fn open(path: &Path, cap_bytes: u64) -> Result<Folder, SessionError> {
        fs::create_dir_all(path).map_err(SessionError::io(path))?;
        let lock_path = path.join(LOCK);
        let lock = File::create(&lock_path).map_err(SessionError::io(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(SessionError::InUse { path: path.to_owned() });
            }
            Err(fs::TryLockError::Error(source)) => {
                return Err(SessionError::io(lock_path)(source));
            }
        }
        let folder = Folder { path: path.to_owned(), cap_bytes, _lock: lock };
        folder.remove_partial()?;
        folder.make_room(0, None)?;
        Ok(folder)
    }

    /// Writes a file of `len_bytes` in the place of the one of this name. `owner` is a plain name.
    pub(super) fn replace(
        &mut self,
        owner: &str,
        name: &SessionName,
        len_bytes: u64,
        write: impl FnOnce(&mut dyn Write) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        if len_bytes > self.cap_bytes {
            return Err(SessionError::TooLarge { bytes: len_bytes, cap_bytes: self.cap_bytes });
        }
        let path = self.file(owner, name);
        let folder = self.path.join(owner);
        fs::create_dir_all(&folder).map_err(SessionError::io(&folder))?;
        self.make_room(len_bytes, Some(&path))?;
        let partial = path.with_extension(PARTIAL);
        let written = write_whole(&partial, write).and_then(|()| {
            fs::rename(&partial, &path).map_err(SessionError::io(&path))?;
            sync_folder(&folder)?;
            // The owner's own folder may be new.
            sync_folder(&self.path)
        });
        if written.is_err() {
            // A full disk is not to stay full; the next start would remove it, too.
            fs::remove_file(&partial).ok();
        }
        written
    }

    /// Opens a file for a look, which is no use of it.
    pub(super) fn look(&self, owner: &str, name: &SessionName) -> Result<File, SessionError> {
        let path = self.file(owner, name);
        File::open(&path).map_err(|source| missing(name, &path, source))
    }

    /// Opens a file, which counts as used now.
    pub(super) fn open_file(&self, owner: &str, name: &SessionName) -> Result<File, SessionError> {
        let file = self.look(owner, name)?;
        // On a medium that is read only the order of use stays what it was.
        file.set_modified(SystemTime::now()).ok();
        Ok(file)
    }

    /// Removes a file.
    pub(super) fn remove(&mut self, owner: &str, name: &SessionName) -> Result<(), SessionError> {
        let path = self.file(owner, name);
        fs::remove_file(&path).map_err(|source| missing(name, &path, source))?;
        sync_folder(&self.path.join(owner))
    }

    /// The sessions of an owner, by name.
    pub(super) fn list(&self, owner: &str) -> Result<Vec<Kept>, SessionError> {
        let folder = self.path.join(owner);
        let mut listed = Vec::new();
        for entry in self.entries()?.into_iter().filter(|entry| entry.owner == folder) {
            let stem = entry.path.file_stem().and_then(|name| name.to_str());
            // Whoever put a file of another name there has to find it himself.
            let Some(Ok(name)) = stem.map(SessionName::new) else { continue };
            listed.push(Kept { name, bytes: entry.bytes, used: entry.used });
        }
        listed.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
        Ok(listed)
    }

    fn file(&self, owner: &str, name: &SessionName) -> PathBuf {
        // Not `with_extension`: a name may have dots.
        self.path.join(owner).join(format!("{}.{EXTENSION}", name.as_str()))
    }

    /// Removes files until `more` bytes fit: of the owner that has most, the one that was used longest ago.
    /// `spared` is to be replaced, and neither removed nor counted.
    fn make_room(&self, more: u64, spared: Option<&Path>) -> Result<(), SessionError> {
        let mut entries = self.entries()?;
        entries.retain(|entry| Some(entry.path.as_path()) != spared);
        loop {
            let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
            if total.saturating_add(more) <= self.cap_bytes {
                return Ok(());
            }
            let Some(at) = victim(&entries) else { return Ok(()) };
            let gone = entries.swap_remove(at);
            tracing::info!(file = %gone.path.display(), "a session makes room for others");
            fs::remove_file(&gone.path).map_err(SessionError::io(gone.path))?;
        }
    }

    fn remove_partial(&self) -> Result<(), SessionError> {
        for (_, file) in self.files()? {
            if file.extension().is_some_and(|extension| extension == PARTIAL) {
                fs::remove_file(&file).map_err(SessionError::io(file))?;
            }
        }
        Ok(())
    }

    fn entries(&self) -> Result<Vec<Entry>, SessionError> {
        let mut entries = Vec::new();
        for (owner, path) in self.files()? {
            if path.extension().is_none_or(|extension| extension != EXTENSION) {
                continue;
            }
            let metadata = fs::metadata(&path).map_err(SessionError::io(&path))?;
            let used = metadata.modified().map_err(SessionError::io(&path))?;
            entries.push(Entry { path, owner, bytes: metadata.len(), used });
        }
        Ok(entries)
    }

    /// All files, each with its owner's folder.
    fn files(&self) -> Result<Vec<(PathBuf, PathBuf)>, SessionError> {
        let mut files = Vec::new();
        for owner in paths(&self.path)?.into_iter().filter(|path| path.is_dir()) {
            let inside = paths(&owner)?.into_iter().filter(|path| path.is_file());
            files.extend(inside.map(|file| (owner.clone(), file)));
        }
        Ok(files)
    }
}

fn paths(folder: &Path) -> Result<Vec<PathBuf>, SessionError> {
    let entries = fs::read_dir(folder).map_err(SessionError::io(folder))?;
    entries
        .map(|entry| Ok(entry.map_err(SessionError::io(folder))?.path()))
        .collect::<Result<_, SessionError>>()
}

/// The file that goes first.
fn victim(entries: &[Entry]) -> Option<usize> {
    let of_owner = |entry: &Entry| -> u64 {
        entries.iter().filter(|other| other.owner == entry.owner).map(|other| other.bytes).sum()
    };
    let order = |entry: &Entry| (std::cmp::Reverse(of_owner(entry)), entry.used);
    (0..entries.len()).min_by_key(|&at| order(&entries[at]))
}

fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), SessionError>,
) -> Result<(), SessionError> {
    let mut file = BufWriter::new(File::create(path).map_err(SessionError::io(path))?);
    write(&mut file)?;
    let file = file.into_inner().map_err(|error| SessionError::io(path)(error.into_error()))?;
    file.sync_all().map_err(SessionError::io(path))
}

fn sync_folder(path: &Path) -> Result<(), SessionError> {
    // Folders cannot be opened for syncing on Windows; there the rename is durable by itself.
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).map_err(SessionError::io(path))?;
    }
    Ok(())
}

fn missing(name: &SessionName, path: &Path, source: io::Error) -> SessionError {
    if source.kind() == io::ErrorKind::NotFound {
        return SessionError::NotFound { name: name.as_str().to_owned() };
    }
    SessionError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn name(name: &str) -> SessionName {
        SessionName::new(name).unwrap()
    }

    fn save(folder: &mut Folder, owner: &str, session: &str, bytes: usize) {
        let write = |file: &mut dyn Write| {
            file.write_all(&vec![7; bytes]).map_err(SessionError::io("test"))
        };
        folder.replace(owner, &name(session), bytes as u64, write).unwrap();
    }

    /// Sets the time of the last use, in seconds from now back.
    fn age(folder: &Folder, owner: &str, session: &str, seconds: u64) {
        let file = File::open(folder.file(owner, &name(session))).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    }

    fn names(folder: &Folder, owner: &str) -> Vec<String> {
        folder.list(owner).unwrap().into_iter().map(|listed| listed.name.0).collect()
    }

    fn bytes_on_disk(path: &Path) -> u64 {
        let size = |path: PathBuf| {
            if path.is_dir() { bytes_on_disk(&path) } else { fs::metadata(path).unwrap().len() }
        };
        paths(path).unwrap().into_iter().map(size).sum()
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "a b", "ä", "a\0", "x:y"]
        {
            assert!(matches!(SessionName::new(bad), Err(SessionError::Name { .. })), "{bad:?}");
        }
        assert!(SessionName::new(&"x".repeat(65)).is_err());
        for good in ["a", "_a", "A-b_c.9", &"x".repeat(64)] {
            assert_eq!(SessionName::new(good).unwrap().as_str(), good);
        }
    }

    /// K4 of the field faults: superseded and half-written files do not stay behind.
    #[test]
    fn a_thousand_turns_and_a_kill_leave_what_the_cap_allows() {
        let place = tempfile::tempdir().unwrap();
        let cap = 10_000;
        let mut folder = Folder::open(place.path(), cap).unwrap();
        for turn in 0..1000 {
            save(&mut folder, "me", &format!("talk{}", turn % 30), 900);
            assert!(bytes_on_disk(place.path()) <= cap, "turn {turn}");
        }
        drop(folder);
        // As a kill leaves it, and as a start with a smaller cap finds it.
        fs::write(place.path().join("me/talk1.partial"), vec![1; 50_000]).unwrap();
        let folder = Folder::open(place.path(), 3_000).unwrap();
        assert!(bytes_on_disk(place.path()) <= 3_000);
        assert_eq!(names(&folder, "me").len(), 3);
        assert!(!place.path().join("me/talk1.partial").exists());
    }

    #[test]
    fn the_longest_unused_of_the_owner_with_most_goes_first() {
        let place = tempfile::tempdir().unwrap();
        let mut folder = Folder::open(place.path(), 1000).unwrap();
        save(&mut folder, "few", "old", 200);
        age(&folder, "few", "old", 900);
        for (session, seconds) in [("a", 300), ("b", 400), ("c", 200)] {
            save(&mut folder, "many", session, 250);
            age(&folder, "many", session, seconds);
        }
        folder.open_file("many", &name("b")).unwrap(); // it is used again
        save(&mut folder, "few", "new", 250);
        assert_eq!(names(&folder, "many"), ["b", "c"]);
        assert_eq!(names(&folder, "few"), ["new", "old"]);
        assert_eq!(names(&folder, "nobody"), Vec::<String>::new());
    }

    #[test]
    fn one_that_is_replaced_makes_no_others_go_and_one_that_fails_changes_nothing() {
        let place = tempfile::tempdir().unwrap();
        let mut folder = Folder::open(place.path(), 1000).unwrap();
        save(&mut folder, "me", "a", 500);
        save(&mut folder, "me", "b", 500);
        save(&mut folder, "me", "b", 480);
        assert_eq!(names(&folder, "me"), ["a", "b"]);
        let fails = |file: &mut dyn Write| {
            file.write_all(&[1; 100]).unwrap();
            Err(SessionError::Lost)
        };
        assert!(folder.replace("me", &name("b"), 400, fails).is_err());
        let listed = folder.list("me").unwrap();
        assert_eq!(listed.iter().map(|listed| listed.bytes).collect::<Vec<_>>(), [500, 480]);
        assert_eq!(bytes_on_disk(place.path()), 980, "nothing half-written");
        let error = folder.replace("me", &name("c"), 1001, fails).unwrap_err();
        assert!(matches!(error, SessionError::TooLarge { bytes: 1001, cap_bytes: 1000 }));
        assert_eq!(names(&folder, "me"), ["a", "b"]);
    }

    #[test]
    fn a_folder_has_one_owner_until_that_is_gone() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path(), 1000).unwrap();
        let error = Folder::open(place.path(), 1000).unwrap_err();
        assert!(matches!(error, SessionError::InUse { .. }), "{error}");
        drop(folder);
        Folder::open(place.path(), 1000).unwrap();
    }

    #[test]
    fn what_is_not_there_is_named() {
        let place = tempfile::tempdir().unwrap();
        let mut folder = Folder::open(place.path(), 1000).unwrap();
        save(&mut folder, "me", "a", 10);
        for error in [
            folder.open_file("other", &name("a")).unwrap_err(),
            folder.open_file("me", &name("b")).unwrap_err(),
            folder.remove("other", &name("a")).unwrap_err(),
        ] {
            assert!(matches!(error, SessionError::NotFound { .. }), "{error}");
        }
        folder.remove("me", &name("a")).unwrap();
        assert_eq!(names(&folder, "me"), Vec::<String>::new());
    }
}
