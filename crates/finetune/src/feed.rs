//! The lessons of each step, made in a thread of their own while the step before is computed.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use reroute_zoo::Lesson;

use crate::data::Example;
use crate::settings::Course;
use crate::{Preparation, TuneError};

/// Steps that are made ahead.
const AHEAD: usize = 2;

/// What a step learns from.
pub(crate) struct Portion {
    /// Forward passes, each of lessons by the number of their example.
    pub(crate) passes: Vec<Vec<(usize, Arc<Lesson>)>>,
    /// Examples that could not be used.
    pub(crate) skipped: Vec<TuneError>,
}

/// Lessons without pixels, by the number of their example: their visual tokens are known.
pub(crate) type Seen = Arc<Mutex<HashMap<usize, Arc<Lesson>>>>;

pub(crate) struct Feed<'a> {
    pub(crate) preparation: Preparation,
    pub(crate) examples: &'a [Example],
    pub(crate) course: &'a Course,
    /// Examples that cannot be used are left out.
    pub(crate) skips: bool,
    pub(crate) seen: Seen,
    /// Which of how many peers it is for.
    pub(crate) peer: (usize, usize),
}

impl<'a> Feed<'a> {
    /// Starts with a step.
    pub(crate) fn start<'s>(
        self,
        scope: &'s Scope<'s, 'a>,
        step: usize,
    ) -> Receiver<Result<Portion, TuneError>>
    where
        'a: 's,
    {
        let (sender, receiver) = sync_channel(AHEAD);
        scope.spawn(move || self.run(step, &sender));
        receiver
    }

    fn run(&self, first: usize, sender: &SyncSender<Result<Portion, TuneError>>) {
        let mut order = Order::new(self.examples.len(), self.course.seed);
        let mut bad = HashSet::new();
        for step in first..self.course.steps {
            let portion = self.portion(step, &mut order, &mut bad);
            let failed = portion.is_err();
            // Nobody listens where a run has ended.
            if sender.send(portion).is_err() || failed {
                return;
            }
        }
    }

    /// What is bad is named once; a step may have nothing to learn from.
    fn portion(
        &self,
        step: usize,
        order: &mut Order,
        bad: &mut HashSet<usize>,
    ) -> Result<Portion, TuneError> {
        let Course {
            batch, accumulate, ..
        } = *self.course;
        let (mut passes, mut skipped) = (Vec::new(), Vec::new());
        let (peer, peers) = self.peer;
        for pass in (peer..accumulate).step_by(peers) {
            let mut lessons = Vec::new();
            for place in 0..batch {
                let index = order.example((step * accumulate + pass) * batch + place);
                if bad.contains(&index) {
                    continue;
                }
                match self.lesson(index) {
                    Ok(lesson) => lessons.push((index, lesson)),
                    Err(error) if self.skips => {
                        bad.insert(index);
                        skipped.push(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            if !lessons.is_empty() {
                passes.push(lessons);
            }
        }
        match skipped.last() {
            Some(error) if bad.len() == self.examples.len() => Err(TuneError::NoExample {
                what: "examples",
                reason: error.to_string(),
            }),
            _ => Ok(Portion { passes, skipped }),
        }
    }

    fn lesson(&self, index: usize) -> Result<Arc<Lesson>, TuneError> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let known = seen.get(&index).cloned();
        drop(seen);
        match known {
            Some(lesson) => Ok(lesson),
            None => Ok(self.preparation.lesson(&self.examples[index])?.into()),
        }
    }
}

/// The order of examples: each epoch another, the same for the same seed wherever a run begins.
struct Order {
    examples: usize,
    seed: u64,
    epoch: usize,
    shuffled: Vec<usize>,
}

impl Order {
    fn new(examples: usize, seed: u64) -> Self {
        let mut order = Self {
            examples,
            seed,
            epoch: 0,
            shuffled: Vec::new(),
        };
        order.shuffle(0);
        order
    }

    fn shuffle(&mut self, epoch: usize) {
        self.epoch = epoch;
        self.shuffled = (0..self.examples).collect();
        self.shuffled.shuffle(&mut random(self.seed, epoch));
    }

    fn example(&mut self, place: usize) -> usize {
        let (epoch, at) = (place / self.examples, place % self.examples);
        if epoch != self.epoch {
            self.shuffle(epoch);
        }
        self.shuffled[at]
    }
}

/// Which of several is drawn for a step.
pub(crate) fn drawn(seed: u64, step: usize, of: usize) -> usize {
    // Another stream than that of the epochs.
    random(!seed, step).random_range(0..of)
}

/// A seed of its own for a step.
pub(crate) fn mixed(seed: u64, step: usize) -> u64 {
    random(seed.rotate_left(32), step).random()
}

fn random(seed: u64, index: usize) -> StdRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&(index as u64).to_le_bytes());
    StdRng::from_seed(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_each_example_once_wherever_it_begins() {
        let mut order = Order::new(7, 3);
        let places: Vec<usize> = (0..21).map(|place| order.example(place)).collect();
        for epoch in places.chunks(7) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_ne!(places[..7], places[7..14]);
        let mut later = Order::new(7, 3);
        assert_eq!(later.example(17), places[17]);
        let all: Vec<usize> = (0..50).map(|step| drawn(1, step, 3)).collect();
        assert!((0..3).all(|one| all.contains(&one)));
    }
}
