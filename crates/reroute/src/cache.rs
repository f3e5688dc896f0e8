use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use reducers::KvType;
use reroute_layers::Cached;

use crate::block::Run;
use crate::host::read_back;
use crate::pool::Pool;
use crate::{Place, RerouteError};

/// Rows that a layer's cache grows by at least when it is full.
const GROWTH: usize = 128;

/// A full cache grows by one part in so many: what copying costs a row then does not depend on how
/// many there are, and a fifth of the memory at most has nothing in it yet.
const GROWTH_SHARE: usize = 4;

/// Samples that a cache has at most, each counted once a layer.
const MAX_ENTRIES: usize = 1 << 24;

/// Most rows that room is made for at once: a limit that nobody reaches shall not cost its memory.
const MAX_ROOM: usize = 1 << 14;

/// Keys and values of every layer and sample. Each layer has a length of its own: it holds exactly
/// the rows that the layer processed.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    /// `[layers][samples]`
    layers: Vec<Vec<Entry<B>>>,
    /// Rows of each sample so far: prompt and generated tokens, deferred ones included.
    rows: Vec<usize>,
    /// Position of each sample's next token: that of the full prompt, whatever was deferred. `None`
    /// once rows have been forgotten.
    next_position: Vec<Option<i64>>,
    /// By how much the next position is lower in a layer, `[layers][samples]`: rows that a schedule
    /// removed and whose positions it gave away.
    lowered: Vec<Vec<i64>>,
    /// What a later turn of each sample chooses from, if it was asked for.
    pools: Vec<Option<Pool<B>>>,
    /// Rows that each sample is still to grow by, if that is known.
    room: Vec<Option<usize>>,
}

/// One sample's keys and values in one layer.
#[derive(Debug, Clone)]
struct Entry<B: Backend> {
    /// Keys and values, `[kv_heads, head_dim, capacity]` each; `None` before the first row.
    buffers: Option<[Cached<B>; 2]>,
    /// The rows in use, ascending, numbered within the sample.
    rows: Vec<usize>,
}

/// One layer's share of a [`KvCache`].
pub(crate) struct LayerCache<'a, B: Backend> {
    samples: &'a mut [Entry<B>],
    room: &'a [Option<usize>],
    kv: KvType,
}

impl<B: Backend> LayerCache<'_, B> {
    /// Whether these runs are the first of their samples, and kept as they are: each then attends to
    /// itself alone.
    pub(crate) fn begins(&self, runs: &[Run], dtype: DType) -> bool {
        let is_empty = |run: &Run| self.samples[run.sample].buffers.is_none();
        let is_once = runs.is_sorted_by(|a, b| a.sample < b.sample);
        is_once && self.kv.dtype() == dtype && runs.iter().all(is_empty)
    }

    /// Appends a run's rows to its sample's and returns all keys and values of the sample, as they are
    /// kept: whoever reads them, now or later, reads the same numbers.
    ///
    /// # Shapes
    /// - `new`: keys and values, `[kv_heads, head_dim, rows]`
    /// - returns `[kv_heads, head_dim, length]`, twice
    pub(crate) fn append(
        &mut self,
        run: &Run,
        new: [Tensor<B, 3>; 2],
    ) -> Result<[Cached<B>; 2], RerouteError> {
        let [keys, values] = new.map(|rows| Cached::of(rows, self.kv.dtype()));
        let entry = &mut self.samples[run.sample];
        let room = self.room[run.sample];
        let used = entry.rows.len();
        entry.rows.extend(&run.rows);
        // Taking the buffers hands them over, so that backends can write in place.
        let buffers = match entry.buffers.take() {
            Some([all_keys, all_values]) => [
                write(all_keys, used, keys, room)?,
                write(all_values, used, values, room)?,
            ],
            None => [keys, values],
        };
        entry.buffers = Some(buffers.clone());
        Ok(buffers.map(|all| in_use(all, entry.rows.len())))
    }
}

impl<B: Backend> Entry<B> {
    /// Keys and values in use; `None` if there are none.
    fn held(&self) -> Option<[Cached<B>; 2]> {
        let buffers = self.buffers.clone().filter(|_| !self.rows.is_empty())?;
        Some(buffers.map(|all| in_use(all, self.rows.len())))
    }

    /// Rows that there is memory for.
    fn capacity(&self) -> usize {
        self.buffers.as_ref().map_or(0, |[keys, _]| keys.dims()[2])
    }

    /// Bytes of keys and values of a row.
    fn row_bytes(&self) -> u64 {
        let row = self.buffers.iter().flatten().map(|buffer| {
            let [kv_heads, head_dim, _] = buffer.dims();
            kv_heads * KvType::from(buffer.dtype()).head_bytes(head_dim)
        });
        row.sum::<usize>() as u64
    }
}

impl<B: Backend> KvCache<B> {
    /// An empty cache.
    ///
    /// # Errors
    /// [`RerouteError::Cache`] for more layers and samples than there can be.
    pub fn new(layers: usize, samples: usize) -> Result<Self, RerouteError> {
        check_size(layers, samples)?;
        Ok(Self::of(layers, samples))
    }

    /// An empty cache of as many layers as there are.
    pub(crate) fn of(layers: usize, samples: usize) -> Self {
        let entry = Entry {
            buffers: None,
            rows: Vec::new(),
        };
        Self {
            layers: vec![vec![entry; samples]; layers],
            rows: vec![0; samples],
            next_position: vec![Some(0); samples],
            lowered: vec![vec![0; samples]; layers],
            pools: vec![None; samples],
            room: vec![None; samples],
        }
    }

    /// Adds the samples of another cache behind those of this one. Nothing is copied.
    ///
    /// # Errors
    /// [`RerouteError::Cache`] for a cache of other depth, or too many samples.
    pub fn extend(&mut self, other: Self) -> Result<(), RerouteError> {
        if other.layers() != self.layers() {
            return Err(RerouteError::Cache {
                given: format!("{} layers", other.layers()),
                expected: format!("{} layers", self.layers()),
            });
        }
        check_size(
            self.layers(),
            self.samples().saturating_add(other.samples()),
        )?;
        for (layer, more) in self.layers.iter_mut().zip(other.layers) {
            layer.extend(more);
        }
        for (lowered, more) in self.lowered.iter_mut().zip(other.lowered) {
            lowered.extend(more);
        }
        self.rows.extend(other.rows);
        self.next_position.extend(other.next_position);
        self.pools.extend(other.pools);
        self.room.extend(other.room);
        Ok(())
    }

    /// Takes a sample out; those behind it move up by one.
    ///
    /// # Errors
    /// [`RerouteError::Sample`] if there is no such sample.
    pub fn remove(&mut self, sample: usize) -> Result<Self, RerouteError> {
        self.check_sample(sample)?;
        let layers = self.layers.iter_mut();
        let lowered = self.lowered.iter_mut();
        Ok(Self {
            layers: layers.map(|layer| vec![layer.remove(sample)]).collect(),
            lowered: lowered.map(|layer| vec![layer.remove(sample)]).collect(),
            rows: vec![self.rows.remove(sample)],
            next_position: vec![self.next_position.remove(sample)],
            pools: vec![self.pools.remove(sample)],
            room: vec![self.room.remove(sample)],
        })
    }

    /// Says that a sample is to grow by `rows` tokens at most. When its buffers are full, room is made for
    /// all of them: what is there is then copied once, whatever is generated. Without it, buffers that are
    /// full grow by a quarter.
    ///
    /// # Errors
    /// [`RerouteError::Sample`] if there is no such sample.
    pub fn reserve(&mut self, sample: usize, rows: usize) -> Result<(), RerouteError> {
        self.check_sample(sample)?;
        self.room[sample] = Some(rows);
        Ok(())
    }

    /// Gives back the room of a sample that nothing is in.
    ///
    /// # Errors
    /// [`RerouteError::Sample`] if there is no such sample.
    pub fn compact(&mut self, sample: usize) -> Result<(), RerouteError> {
        self.check_sample(sample)?;
        self.room[sample] = None;
        for layer in &mut self.layers {
            let entry = &mut layer[sample];
            let rows = entry.rows.len();
            let buffers = entry.buffers.take().filter(|_| rows > 0);
            if let Some([keys, values]) = buffers {
                entry.buffers = Some([exact(keys, rows)?, exact(values, rows)?]);
            }
        }
        Ok(())
    }

    /// One layer's share, which keeps what is added in a type.
    pub(crate) fn layer(&mut self, layer: usize, kv: KvType) -> LayerCache<'_, B> {
        LayerCache {
            samples: &mut self.layers[layer],
            room: &self.room,
            kv,
        }
    }

    /// What a later turn chooses from, of every sample that has it.
    pub(crate) fn pools(&self) -> impl Iterator<Item = &Pool<B>> {
        self.pools.iter().flatten()
    }

    /// Keeps what later turns choose from.
    pub(crate) fn keep_pools(&mut self, pools: Vec<Option<Pool<B>>>) {
        self.pools = pools;
    }

    /// Hands over what this turn chooses from.
    pub(crate) fn take_pool(&mut self, sample: usize) -> Option<Pool<B>> {
        self.pools[sample].take()
    }

    /// The keys of one sample in one layer, `[kv_heads, head_dim, length]`, as floats of a type; `None` if
    /// there are none.
    pub(crate) fn keys(&self, layer: usize, sample: usize, dtype: DType) -> Option<Tensor<B, 3>> {
        let [keys, _] = self.layers.get(layer)?.get(sample)?.held()?;
        Some(keys.widened(dtype))
    }

    /// What the cache holds, to compare with what a decoder makes: layers, and channels of all keys of
    /// a row and their type, if there is a row.
    pub(crate) fn format(&self) -> (usize, Option<([usize; 2], KvType)>) {
        let held = self.layers.iter().flatten();
        let buffers = held.filter_map(|entry| entry.buffers.as_ref()).next();
        let format = buffers.map(|[keys, _]| {
            let [kv_heads, head_dim, _] = keys.dims();
            ([kv_heads, head_dim], keys.dtype().into())
        });
        (self.layers.len(), format)
    }

    /// Whether there is such a sample.
    pub(crate) fn check_sample(&self, sample: usize) -> Result<(), RerouteError> {
        let samples = self.samples();
        match sample < samples {
            true => Ok(()),
            false => Err(RerouteError::Sample { sample, samples }),
        }
    }

    /// Says which row and which position come next in a sample.
    pub(crate) fn continue_at(&mut self, sample: usize, row: usize, position: i64) {
        self.rows[sample] = row;
        self.next_position[sample] = Some(position);
    }

    /// Lowers the positions of the samples' next tokens in a layer.
    pub(crate) fn lower(&mut self, layer: usize, by: Vec<i64>) {
        self.lowered[layer] = by;
    }

    /// By how much positions of the samples are lower in a layer.
    pub(crate) fn lowered(&self, layer: usize) -> &[i64] {
        &self.lowered[layer]
    }

    /// The first layer that holds renumbered rows of a sample from `row` on.
    pub(crate) fn renumbered_from(&self, sample: usize, row: usize) -> Option<usize> {
        (0..self.layers.len()).find(|&layer| {
            let last = self.layers[layer][sample].rows.last();
            self.lowered[layer][sample] != 0 && last.is_some_and(|&last| last >= row)
        })
    }

    /// The row and the position of a sample's next token, which it takes. A truncated sample has none.
    pub(crate) fn take_next(&mut self, sample: usize) -> Result<(usize, i64), RerouteError> {
        let position = self.next_position[sample].as_mut();
        let position = position.ok_or(RerouteError::Truncated { sample })?;
        let next = (self.rows[sample], *position);
        self.rows[sample] += 1;
        *position += 1;
        self.room[sample] = self.room[sample].and_then(|rows| rows.checked_sub(1));
        Ok(next)
    }

    /// Forgets the rows of a sample from `row` on, as when the text after it has changed.
    ///
    /// The next thing to do with the cache is [`Decoder::resume`](crate::Decoder::resume), whose
    /// prompt says where positions go on.
    ///
    /// # Errors
    /// [`RerouteError::Sample`] if there is no such sample.
    pub fn truncate(&mut self, sample: usize, row: usize) -> Result<(), RerouteError> {
        self.check_sample(sample)?;
        if row < self.rows[sample] {
            for layer in 0..self.layers.len() {
                self.truncate_layer(layer, sample, row);
            }
            self.rows[sample] = row;
            self.next_position[sample] = None;
        }
        Ok(())
    }

    pub(crate) fn truncate_layer(&mut self, layer: usize, sample: usize, row: usize) {
        let rows = &mut self.layers[layer][sample].rows;
        rows.truncate(rows.partition_point(|&held| held < row));
    }

    /// The leading rows of a sample that every layer holds.
    pub(crate) fn held_by_all(&self, sample: usize) -> usize {
        let held = self.layers.iter().map(|layer| {
            let rows = layer[sample].rows.iter().enumerate();
            rows.take_while(|&(at, &row)| at == row).count()
        });
        held.min().unwrap_or(0)
    }

    /// The position that a sample's next token will have; 0 where there is no such sample, or where
    /// [`truncate`](Self::truncate) has forgotten rows.
    pub fn next_position(&self, sample: usize) -> i64 {
        self.known_position(sample).unwrap_or(0)
    }

    /// The position of a sample's next token, unless rows have been forgotten.
    pub(crate) fn known_position(&self, sample: usize) -> Option<i64> {
        self.next_position.get(sample).copied().flatten()
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.rows.len()
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Rows of a sample so far: those of the prompt and of generated tokens, deferred ones included. 0
    /// where there is no such sample.
    pub fn rows(&self, sample: usize) -> usize {
        self.rows.get(sample).copied().unwrap_or(0)
    }

    /// Rows held per layer for one sample; 0 where there is no such sample.
    pub fn lengths(&self, sample: usize) -> Vec<usize> {
        let length = |entry: &Entry<B>| entry.rows.len();
        self.per_layer(sample, length)
    }

    /// Bytes of the rows in use, per layer, for one sample; 0 where there is no such sample.
    pub fn bytes(&self, sample: usize) -> Vec<u64> {
        self.per_layer(sample, |entry| entry.row_bytes() * entry.rows.len() as u64)
    }

    /// Bytes that keys and values of one sample take in memory, room for further rows and what a later
    /// turn chooses from included; 0 where there is no such sample.
    pub fn allocated_bytes(&self, sample: usize) -> u64 {
        let entries = self.layers.iter().filter_map(|layer| layer.get(sample));
        let entries = entries.map(|entry| entry.row_bytes() * entry.capacity() as u64);
        let pool = self.pools.get(sample).and_then(Option::as_ref);
        let pool = pool.map(|pool| &pool.hidden_states);
        let pool = pool.map_or(0, |x| x.shape().num_elements() * x.dtype().size());
        entries.sum::<u64>() + pool as u64
    }

    fn per_layer<T: Default>(&self, sample: usize, of: impl Fn(&Entry<B>) -> T) -> Vec<T> {
        let entry = |layer: &Vec<Entry<B>>| layer.get(sample).map(&of).unwrap_or_default();
        self.layers.iter().map(entry).collect()
    }

    /// Where a sample's numbers stop being finite, as its keys and values tell: `None` if all of them
    /// are finite. Reads everything back: for errors only.
    pub(crate) fn first_not_finite(&self, sample: usize) -> Result<Option<Place>, RerouteError> {
        for (index, layer) in self.layers.iter().enumerate() {
            let Some(held) = layer[sample].held() else {
                continue;
            };
            let rows = layer[sample].rows.len();
            let held: Vec<Vec<f32>> = held
                .into_iter()
                .map(|of| read_back(of.widened(DType::F32), "keys and values"))
                .collect::<Result<_, _>>()?;
            let channels = || held.iter().flat_map(|of| of.chunks_exact(rows));
            if channels().flatten().all(|x| x.is_finite()) {
                continue;
            }
            // A row that came in with a number that is none has no key and no value that is one.
            let came_in = (0..rows).any(|row| channels().all(|channel| channel[row].is_nan()));
            return Ok(Some(match (came_in, index.checked_sub(1)) {
                (true, Some(before)) => Place::Layer(before),
                (true, None) => Place::Input,
                (false, _) => Place::Layer(index),
            }));
        }
        Ok(None)
    }
}

/// Whether there can be a cache for so many layers and samples.
fn check_size(layers: usize, samples: usize) -> Result<(), RerouteError> {
    match layers.max(1).saturating_mul(samples.max(1)) <= MAX_ENTRIES {
        true => Ok(()),
        false => Err(RerouteError::Cache {
            given: format!("{layers} layers of {samples} samples"),
            expected: format!("{MAX_ENTRIES} samples of all layers at most"),
        }),
    }
}

/// The rows of a buffer that are in use.
fn in_use<B: Backend>(all: Cached<B>, rows: usize) -> Cached<B> {
    match all.dims()[2] == rows {
        true => all,
        false => all.narrow(0, rows),
    }
}

/// The rows of a buffer that are in use, in one of their size.
fn exact<B: Backend>(all: Cached<B>, rows: usize) -> Result<Cached<B>, RerouteError> {
    match all.dims()[2] == rows {
        true => Ok(all),
        false => Ok(all.zeros(rows).write(0, in_use(all, rows))?),
    }
}

/// Writes rows at `start`, growing the buffer when it is full; `room` is how many rows are to follow.
fn write<B: Backend>(
    all: Cached<B>,
    start: usize,
    new: Cached<B>,
    room: Option<usize>,
) -> Result<Cached<B>, RerouteError> {
    let capacity = all.dims()[2];
    let end = start + new.dims()[2];
    let all = if end > capacity {
        let follow = match room {
            Some(rows) => rows.min(MAX_ROOM),
            None => GROWTH.max(end / GROWTH_SHARE),
        };
        let spare = all.zeros(end - capacity + follow);
        all.followed_by(spare)?
    } else {
        all
    };
    Ok(all.write(start, new)?)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use burn_flex::{Flex, FlexDevice};

    use super::*;

    /// Where it is known how long an answer may get, what is there moves once.
    #[test]
    fn a_cache_that_is_reserved_is_copied_once() {
        let mut cache = KvCache::<Flex>::new(1, 1).unwrap();
        let append = |cache: &mut KvCache<Flex>, rows: std::ops::Range<usize>| {
            let number = Tensor::full([2, 4, rows.len()], rows.start as f32, &FlexDevice);
            let run = Run {
                sample: 0,
                packed: 0..rows.len(),
                queries: 0..rows.len(),
                rows: rows.collect(),
            };
            let new = [number.clone(), number];
            cache.layer(0, KvType::F32).append(&run, new).unwrap();
            let [buffer, _] = cache.layers[0][0].buffers.as_ref().unwrap();
            buffer.dims()[2]
        };
        append(&mut cache, 0..30);
        cache.continue_at(0, 30, 30);
        cache.reserve(0, 4096).unwrap();
        for row in 30..30 + 4096 {
            assert_eq!(cache.take_next(0).unwrap().0, row);
            assert_eq!(append(&mut cache, row..row + 1), 30 + 4096);
        }
        // Whoever goes on nevertheless pays as without.
        cache.take_next(0).unwrap();
        assert!(append(&mut cache, 4126..4127) >= 4127 + GROWTH);
    }

    /// Every copy of a full buffer makes room for a share of what it holds: few copies, and little room
    /// that nothing is in.
    #[test]
    fn copies_of_a_growing_cache_are_few() {
        let mut cache = KvCache::<Flex>::new(1, 1).unwrap();
        let (mut copies, mut capacity, mut copied) = (0, 0, 0);
        for row in 0..4096 {
            let number = Tensor::full([2, 4, 1], row as f32, &FlexDevice);
            let run = Run {
                sample: 0,
                packed: 0..1,
                queries: 0..1,
                rows: vec![row],
            };
            let new = [number.clone(), number];
            let [keys, _] = cache.layer(0, KvType::F32).append(&run, new).unwrap();
            assert_eq!(keys.dims(), [2, 4, row + 1]);
            let [buffer, _] = cache.layers[0][0].buffers.as_ref().unwrap();
            let [_, _, now] = buffer.dims();
            if now != capacity {
                (copies, capacity, copied) = (copies + 1, now, copied + row);
                assert!(now <= row + 1 + GROWTH.max((row + 1) / GROWTH_SHARE));
            }
        }
        assert!(copies <= 20, "{copies} copies");
        assert!(copied <= 5 * 4096, "{copied} rows copied");
        let [keys, _] = cache.layers[0][0].held().unwrap();
        let keys = keys.widened(DType::F32).into_data();
        let keys: Vec<f32> = keys.into_vec().unwrap();
        assert!(
            keys.chunks(4096)
                .flat_map(|rows| rows.iter().enumerate())
                .all(|(row, &key)| key == row as f32)
        );
    }
}
