use crate::VisionError;

/// Patches of one image or video.
///
/// The patches of a frame stand in *merge order*: groups of `spatial_merge_size²` neighbours, which
/// become one visual token, row by row; the patches of a group row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Frames: 1 for an image, pictures of a video divided by `temporal_patch_size`.
    pub t: usize,
    /// Patches from top to bottom.
    pub h: usize,
    /// Patches from left to right.
    pub w: usize,
}

impl Grid {
    /// Number of patches; `usize::MAX` where the number does not fit.
    pub fn patches(&self) -> usize {
        self.t.saturating_mul(self.h).saturating_mul(self.w)
    }

    /// Number of visual tokens, of `merge · merge` patches each; `merge` must not be 0.
    pub fn tokens(&self, merge: usize) -> usize {
        self.patches() / (merge * merge)
    }

    /// Row and column of every patch, in merge order, frame by frame.
    pub(crate) fn places(self, merge: usize) -> impl Iterator<Item = [usize; 2]> {
        let Self { t, h, w } = self;
        let place = move |patch: usize| {
            let (group, inside) = (patch / (merge * merge), patch % (merge * merge));
            let (row, column) = (group / (w / merge), group % (w / merge));
            [
                row * merge + inside / merge,
                column * merge + inside % merge,
            ]
        };
        (0..t).flat_map(move |_| (0..h * w).map(place))
    }
}

/// Whether `patches` patches are those of the grids, and every frame divides into merge groups.
pub(crate) fn check(grids: &[Grid], patches: usize, merge: usize) -> Result<(), VisionError> {
    let wrong = |reason| Err(VisionError::Patches(reason));
    for &Grid { t, h, w } in grids {
        if t == 0 || h == 0 || w == 0 || !h.is_multiple_of(merge) || !w.is_multiple_of(merge) {
            return wrong(format!(
                "a grid of {t}×{h}×{w} (frames, height, width) must not be empty, and height and \
                 width must be multiples of spatial_merge_size {merge}; resize as the checkpoint's \
                 preprocessor does"
            ));
        }
    }
    let expected = grids.iter().map(Grid::patches);
    let expected = expected.fold(0, usize::saturating_add);
    if expected != patches || patches == 0 {
        return wrong(format!(
            "{patches} patches were given for {} grids of {expected} patches in all; pass the grids \
             that preprocessing returned with the patches, at least one",
            grids.len()
        ));
    }
    Ok(())
}
