//! Which peers are there, and how far: a file of each in the folder of the run, locked while it lives.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::{PREFIX, names};
use crate::TuneError;

/// How often, and with what pauses, a peer tries to lock its own file, which others may be looking at.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Arrivals {
    folder: PathBuf,
    peer: usize,
    count: usize,
    own: File,
}

impl Arrivals {
    /// Says that a peer is there.
    pub(super) fn new(folder: &Path, peer: usize, count: usize) -> Result<Self, TuneError> {
        fs::create_dir_all(folder).map_err(TuneError::io(folder))?;
        let path = folder.join(format!("{PREFIX}{peer}"));
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).write(true);
        let own = options.open(&path).map_err(TuneError::io(&path))?;
        let is_taken = || matches!(own.try_lock(), Err(TryLockError::WouldBlock));
        let mut tries = 0;
        while is_taken() {
            tries += 1;
            if tries == TRIES {
                return Err(TuneError::PeersLost {
                    peers: names(&[peer]),
                    reason: "is there twice".into(),
                });
            }
            thread::sleep(PAUSE);
        }
        let folder = folder.to_owned();
        Ok(Self {
            folder,
            peer,
            count,
            own,
        })
    }

    /// Says that this one waits for others, for a sum.
    pub(super) fn arrive(&mut self, sum: usize) -> Result<(), TuneError> {
        let written = self.own.set_len(0).and_then(|()| {
            self.own.rewind()?;
            writeln!(self.own, "{sum}")
        });
        written.map_err(TuneError::io(&self.folder))
    }

    /// The others that have ended.
    pub(super) fn dead(&self) -> Vec<usize> {
        self.others(|peer| !self.is_alive(peer))
    }

    /// The others that have ended or not come to a sum yet.
    pub(super) fn missing(&self, sum: usize) -> Vec<usize> {
        self.others(|peer| !self.is_alive(peer) || self.at(peer).is_none_or(|at| at < sum))
    }

    fn others(&self, is: impl Fn(usize) -> bool) -> Vec<usize> {
        let others = (0..self.count).filter(|&peer| peer != self.peer);
        others.filter(|&peer| is(peer)).collect()
    }

    fn path(&self, peer: usize) -> PathBuf {
        self.folder.join(format!("{PREFIX}{peer}"))
    }

    /// Where files cannot be locked all that have a file are alive.
    fn is_alive(&self, peer: usize) -> bool {
        match File::open(self.path(peer)) {
            Ok(file) => file.try_lock_shared().is_err(),
            Err(_) => false,
        }
    }

    fn at(&self, peer: usize) -> Option<usize> {
        let text = fs::read_to_string(self.path(peer)).ok()?;
        text.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_ended_or_is_late_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let new = |peer| Arrivals::new(folder.path(), peer, 3).expect("a peer");
        let (mut first, mut second) = (new(0), new(1));
        assert_eq!(first.dead(), [2]);
        let third = new(2);
        assert!(first.dead().is_empty());
        assert!(Arrivals::new(folder.path(), 1, 3).is_err());
        first.arrive(10).expect("can be written");
        second.arrive(10).expect("can be written");
        assert_eq!(first.missing(10), [2]);
        drop(second);
        assert_eq!(first.dead(), [1]);
        assert_eq!(first.missing(10), [1, 2]);
        assert_eq!(third.missing(10), [1]);
        new(1).arrive(9).expect("can be written");
        assert_eq!(third.missing(10), [1]);
    }
}
