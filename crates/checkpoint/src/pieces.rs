//! Bytes that are made piece after piece while they are read.

use std::io::{self, Read};

/// A reader of what `next` appends.
pub(crate) struct Pieces<F> {
    next: F,
    piece: Vec<u8>,
    /// Bytes of the piece that are delivered.
    at: usize,
    /// Bytes that are left.
    left: u64,
}

impl<F: FnMut(&mut Vec<u8>) -> io::Result<()>> Pieces<F> {
    /// `left` bytes, but for the first `skipped` of the first piece.
    pub(crate) fn new(next: F, skipped: usize, left: u64) -> io::Result<Self> {
        let mut pieces = Self {
            next,
            piece: Vec::new(),
            at: 0,
            left,
        };
        if skipped > 0 {
            (pieces.next)(&mut pieces.piece)?;
            pieces.at = skipped.min(pieces.piece.len());
        }
        Ok(pieces)
    }
}

impl<F: FnMut(&mut Vec<u8>) -> io::Result<()>> Read for Pieces<F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || into.is_empty() {
            return Ok(0);
        }
        if self.at == self.piece.len() {
            self.piece.clear();
            self.at = 0;
            (self.next)(&mut self.piece)?;
        }
        let ready = &self.piece[self.at..];
        let count = ready.len().min(into.len());
        let count = count.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        into[..count].copy_from_slice(&ready[..count]);
        self.at += count;
        self.left -= count as u64;
        Ok(count)
    }
}
