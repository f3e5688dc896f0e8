//! A folder that is written beside the place it is meant for, and put there in one step.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::shards::is_weights_file;
use crate::{CONFIG, SaveError};

/// `.NAME.partial-PROCESS-NUMBER` beside NAME. Whatever lies there goes away with this: what could not be
/// finished, or what has been replaced.
pub(crate) struct Staging<'a> {
    own: Own,
    /// The folder that it lies in.
    parent: PathBuf,
    /// Bytes of the whole checkpoint.
    needed: u64,
    /// Whether a file of this name may be replaced.
    replaces: &'a dyn Fn(&str) -> bool,
}

impl<'a> Staging<'a> {
    /// Begins a folder of so many bytes in all that will be called `to`. What is there by this name must
    /// be a checkpoint in which nothing is called otherwise than `replaces` allows.
    pub(crate) fn begin(
        to: &Path,
        needed: u64,
        replaces: &'a dyn Fn(&str) -> bool,
    ) -> Result<Self, SaveError> {
        let Some(name) = to.file_name() else {
            return Err(SaveError::Target {
                path: to.to_path_buf(),
                problem: "does not end in a name; give the folder by its name",
            });
        };
        let parent = match to.parent() {
            Some(parent) if parent != Path::new("") => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        // Without a separator behind it, which would lead through a link.
        let to = parent.join(name);
        Own::recover(&to);
        is_there(&to, replaces)?;
        let failed = failure(&parent, needed, &parent);
        let made = fs::create_dir_all(&parent).and_then(|()| fs4::available_space(&parent));
        let available = made.map_err(failed)?;
        if needed > available {
            return Err(SaveError::DiskFull {
                path: parent,
                needed,
                available,
            });
        }
        let own = Own::begin(&to).map_err(failure(&parent, needed, &parent))?;
        Ok(Self {
            own,
            parent,
            needed,
            replaces,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.own.partial
    }

    /// A new file.
    pub(crate) fn create(&self, name: &str) -> Result<File, SaveError> {
        let path = self.path().join(name);
        File::create_new(&path).map_err(self.failed(&path))
    }

    /// A new file of this content.
    pub(crate) fn put(&self, name: &str, content: &[u8]) -> Result<(), SaveError> {
        let mut file = self.create(name)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(self.failed(&self.path().join(name)))
    }

    /// What to make of an error of the system.
    pub(crate) fn failed(&self, path: &Path) -> impl FnOnce(io::Error) -> SaveError + use<> {
        failure(&self.parent, self.needed, path)
    }

    /// Puts the folder in its place; what was there is removed.
    pub(crate) fn finish(self) -> Result<(), SaveError> {
        sync(self.path());
        self.place()?;
        sync(&self.parent);
        Ok(())
    }

    fn place(&self) -> Result<(), SaveError> {
        let to = &self.own.to;
        // What was found in the beginning may have changed.
        if !is_there(to, self.replaces)? {
            match fs::rename(self.path(), to) {
                Err(_) if is_there(to, self.replaces)? => {} // Another save was faster.
                placed => return placed.map_err(self.failed(to)),
            }
        }
        // Who may read the old one may read the new one, and nobody else.
        let permissions = to.metadata().map(|old| old.permissions());
        let kept = permissions.and_then(|old| fs::set_permissions(self.path(), old));
        kept.map_err(self.failed(to))?;
        self.own.exchange().map_err(self.failed(to))
    }
}

/// Whether something that may be replaced is there: an empty folder, or a checkpoint.
fn is_there(to: &Path, replaces: &dyn Fn(&str) -> bool) -> Result<bool, SaveError> {
    let target = |problem| {
        Err(SaveError::Target {
            path: to.to_path_buf(),
            problem,
        })
    };
    let failed = |source| SaveError::Io {
        path: to.to_path_buf(),
        source,
    };
    match to.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
        Ok(found) if found.is_symlink() => {
            return target("is a link; give the folder that it leads to");
        }
        Ok(found) if !found.is_dir() => return target("is a file; give a folder"),
        Ok(_) => {}
    }
    let mut entries = Vec::new();
    for entry in to.read_dir().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_file = entry.file_type().map_err(failed)?.is_file();
        entries.push((entry.file_name().to_string_lossy().into_owned(), is_file));
    }
    // By its path: while names were read, another save may have put a new folder there.
    let has_config = to.join(CONFIG).symlink_metadata().is_ok();
    let has_weights = entries.iter().any(|(name, _)| is_weights_file(name));
    if !(entries.is_empty() || has_config && has_weights) {
        return target(
            "is there and no checkpoint, for it has no config.json or no weights; save elsewhere, or \
             remove it",
        );
    }
    let other = { entries.into_iter() }.find(|(name, is_file)| !is_file || !replaces(name));
    match other {
        None => Ok(true),
        Some((entry, _)) => Err(SaveError::Occupied {
            path: to.to_path_buf(),
            entry,
        }),
    }
}

/// What one save has beside the place that it writes for.
///
/// The lock is held as long as the rest is there. So a save knows what others are writing from what they
/// have left when they were killed, and removes the latter, but for a checkpoint that had only been moved
/// away: that is put back.
struct Own {
    /// The place.
    to: PathBuf,
    partial: PathBuf,
    /// What `partial` replaces, for a moment, where two folders cannot change places in one step.
    replaced: PathBuf,
    lock_path: PathBuf,
    /// Locked, where the system has locks; elsewhere nothing is taken for left over.
    _lock: File,
}

const LOCK: &str = "lock";

impl Own {
    /// Makes an empty folder.
    fn begin(to: &Path) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let mut stem = stem(to);
            stem.push(format!("{}-{number}", std::process::id()));
            let lock_path = to.with_file_name(&stem).with_added_extension(LOCK);
            let lock = match File::create_new(&lock_path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                lock => lock?,
            };
            let is_taken = matches!(lock.try_lock(), Err(TryLockError::WouldBlock));
            // Who looked for what is left over may have been faster, and removes it.
            if is_taken || lock_path.symlink_metadata().is_err() {
                continue;
            }
            let own = Self::of(to, lock_path, lock);
            fs::create_dir(&own.partial)?;
            return Ok(own);
        }
    }

    fn of(to: &Path, lock_path: PathBuf, lock: File) -> Self {
        let partial = lock_path.with_extension("");
        Self {
            to: to.to_path_buf(),
            replaced: partial.with_added_extension("replaced"),
            partial,
            lock_path,
            _lock: lock,
        }
    }

    /// Removes what killed processes have left.
    fn recover(to: &Path) {
        let stem = stem(to);
        let entries = to.parent().and_then(|parent| parent.read_dir().ok());
        for entry in entries.into_iter().flatten().flatten() {
            let begins = |name: &OsStr| {
                let name = name.as_encoded_bytes();
                name.starts_with(stem.as_encoded_bytes())
            };
            let is_lock = entry.path().extension() == Some(OsStr::new(LOCK))
                && begins(&entry.file_name())
                && entry.file_type().is_ok_and(|kind| kind.is_file());
            let open = || File::options().write(true).open(entry.path()).ok();
            let lock = is_lock.then(open).flatten();
            if let Some(lock) = lock.filter(|lock| lock.try_lock().is_ok()) {
                drop(Self::of(to, entry.path(), lock));
            }
        }
    }

    /// Makes the folder change places with what is at `to`.
    ///
    /// Linux and macOS do it in one step: at no time is there neither. Elsewhere, and on file systems that
    /// cannot, the old one is moved away first, and back if that is all that could be done.
    fn exchange(&self) -> io::Result<()> {
        match exchange_at_once(&self.partial, &self.to) {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Unsupported | ErrorKind::InvalidInput
                ) =>
            {
                self.exchange_in_steps()
            }
            done => done,
        }
    }

    fn exchange_in_steps(&self) -> io::Result<()> {
        fs::rename(&self.to, &self.replaced)?;
        fs::rename(&self.partial, &self.to)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if self.replaced.is_dir() {
            let is_gone = |error: io::Error| error.kind() == ErrorKind::NotFound;
            let done = match self.to.symlink_metadata().is_err_and(is_gone) {
                true => fs::rename(&self.replaced, &self.to),
                false => fs::remove_dir_all(&self.replaced),
            };
            if done.is_err() {
                return; // The next save tries again.
            }
        }
        let _ = fs::remove_dir_all(&self.partial);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// What the names beside a place begin with that belong to it.
fn stem(to: &Path) -> OsString {
    let mut stem = OsString::from(".");
    stem.push(to.file_name().unwrap_or_default());
    stem.push(".partial-");
    stem
}

/// What to make of an error of the system in writing so many bytes below `parent`.
fn failure(parent: &Path, needed: u64, path: &Path) -> impl FnOnce(io::Error) -> SaveError + use<> {
    let (parent, path) = (parent.to_path_buf(), path.to_path_buf());
    move |source| match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => SaveError::DiskFull {
            available: fs4::available_space(&parent).unwrap_or(0),
            path: parent,
            needed,
        },
        _ => SaveError::Io { path, source },
    }
}

/// The names in a folder outlive a loss of power, where a system can be asked for that.
fn sync(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange_at_once(new: &Path, old: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange_at_once(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::mem::forget;
    use std::path::Path;

    use super::Own;

    fn fill(path: &Path, content: &str) {
        fs::create_dir_all(path).expect("a temporary folder");
        fs::write(path.join("file"), content).expect("a temporary file");
    }

    fn content(path: &Path) -> String {
        fs::read_to_string(path.join("file")).expect("it is there")
    }

    /// Where a system cannot do it in one step; who is killed in between finds the old folder back.
    #[test]
    fn folders_change_places_in_steps_and_none_is_lost() {
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let to = scratch.path().join("to");
        let left = || fs::read_dir(scratch.path()).expect("it is there").count();
        fill(&to, "old");
        let own = Own::begin(&to).expect("a free name");
        fill(&own.partial, "new");
        own.exchange_in_steps().expect("both are there");
        drop(own);
        assert_eq!((content(&to).as_str(), left()), ("new", 1));

        let own = Own::begin(&to).expect("a free name");
        fs::remove_dir(&own.partial).expect("it is empty");
        own.exchange_in_steps().expect_err("there is nothing new");
        drop(own);
        assert_eq!((content(&to).as_str(), left()), ("new", 1));

        let own = Own::begin(&to).expect("a free name");
        fs::rename(&to, &own.replaced).expect("a free name");
        Own::recover(&to);
        assert!(!to.exists(), "somebody is still at it");
        own._lock.unlock().expect("it is locked");
        forget(own);
        Own::recover(&to);
        assert_eq!((content(&to).as_str(), left()), ("new", 1));
    }
}
