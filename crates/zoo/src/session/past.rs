use burn::tensor::backend::Backend;
use reroute::KvCache;
use reroute_family::SlotTokens;

use super::pictures::PictureKey;
use crate::{KeptVisuals, Modality, View};

/// What a request left behind: keys and values, and what stands in each of their rows.
#[derive(Debug, Clone)]
pub struct Past<B: Backend> {
    /// The model that computed it.
    pub(super) model: u64,
    pub(super) cache: KvCache<B>,
    pub(super) rows: Vec<Row>,
}

/// What stands in a row of a prompt: rows that are the same behind the same rows have the same keys and
/// values, as far as no decision comes between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Row {
    /// A token of text.
    Text(u32),
    /// A visual token of a picture, as the reduction left it: which of them.
    Visual(PictureKey, u32),
}

impl<B: Backend> Past<B> {
    /// Leading rows that are those of `rows`, too.
    pub(super) fn shared(&self, rows: &[Row]) -> usize {
        let pairs = self.rows.iter().zip(rows);
        pairs.take_while(|(a, b)| a == b).count()
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> u64 {
        self.cache.allocated_bytes(0) + (self.rows.len() * size_of::<Row>()) as u64
    }
}

/// What stands in each row that a reduction has kept of a prompt. `pictures` are its images and videos in
/// order of appearance, `ids` the token ids of the rows.
pub(super) fn rows(
    ids: &[u32],
    slots: SlotTokens,
    pictures: &[(View, PictureKey)],
    kept: Option<&KeptVisuals>,
) -> Vec<Row> {
    let mut tokens = Modality::ALL.map(|modality| {
        let of_kind = pictures.iter().filter(|(view, _)| kind(view) == modality);
        let kept = kept.map(|kept| match modality {
            Modality::Image => &kept.images[..],
            Modality::Video => &kept.videos[..],
        });
        let tokens = of_kind.enumerate().flat_map(|(at, (view, key))| {
            let kept = kept.and_then(|kept| kept.get(at));
            let count = kept.map_or(view.token_count(), |kept| kept.places.len());
            (0..count as u32).map(|token| Row::Visual(*key, token))
        });
        tokens.collect::<Vec<_>>().into_iter()
    });
    let row = |&id: &u32| {
        let visual = slots.modality(id);
        let visual = visual.and_then(|modality| tokens[modality as usize].next());
        visual.unwrap_or(Row::Text(id))
    };
    ids.iter().map(row).collect()
}

fn kind(view: &View) -> Modality {
    match view.time {
        None => Modality::Image,
        Some(_) => Modality::Video,
    }
}
