//! Stands in on processors of other kinds, which have none of these instructions: nothing here has a value.

use crate::blocks::{Blocks, CHUNK, CHUNKS, Coding, Factors, Span};
use crate::product::layout::{InputChunk, QuadRows, QuadTokens, Sums, WeightChunk};
use crate::product::one_row::ByteInputs;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Bytes {}

impl Bytes {
    pub(crate) fn without_vnni() -> Option<Self> {
        None
    }

    pub(crate) fn avx_vnni() -> Option<Self> {
        None
    }

    pub(crate) fn avx512_vnni() -> Option<Self> {
        None
    }

    pub(crate) fn dots<C: Coding, const N: usize, const M: usize>(
        self,
        _: Blocks<'_>,
        _: [usize; N],
        _: [&ByteInputs; M],
    ) -> [[f32; M]; N] {
        match self {}
    }

    pub(crate) fn read<C: Coding>(self, _: Span<'_, C>, _: &mut [[u8; CHUNK]; CHUNKS]) -> Factors {
        match self {}
    }
}

/// Unknown.
pub(crate) fn clock() -> f64 {
    f64::NAN
}

impl Bytes {
    pub(crate) fn multiplies(self, _: u8) -> bool {
        match self {}
    }

    pub(crate) fn multiply<C: Coding>(
        self,
        _: QuadRows<'_, { avx2::ROWS }>,
        _: QuadTokens<'_>,
        _: &mut Sums<{ avx2::ROWS }>,
        _: bool,
    ) {
        match self {}
    }
}

pub(crate) mod avx2 {
    pub(crate) const ROWS: usize = 6;
}

pub(crate) struct Loop {
    pub(crate) instruction: &'static str,
    pub(crate) operations: f64,
    never: Bytes,
}

impl Loop {
    pub(crate) fn run(&self, _: usize) {
        match self.never {}
    }

    pub(crate) fn f32() -> Option<Self> {
        None
    }

    pub(crate) fn bf16() -> Option<Self> {
        None
    }

    pub(crate) fn bytes() -> Option<Self> {
        None
    }
}

pub(crate) mod amx {
    use super::{InputChunk, Sums, WeightChunk};

    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Amx {}

    pub(crate) enum Tiles {}

    pub(crate) const ROWS: usize = 32;

    impl Amx {
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn tiles(self) -> Tiles {
            match self {}
        }
    }

    impl Tiles {
        pub(crate) fn multiply(
            &self,
            _: &[WeightChunk<ROWS>],
            _: &[InputChunk],
            _: &mut Sums<ROWS>,
            _: bool,
        ) {
            match *self {}
        }
    }
}

pub(crate) mod avx512 {
    use super::{CHUNK, CHUNKS, Coding, InputChunk, QuadRows, QuadTokens, Span, Sums, WeightChunk};

    pub(crate) const ROWS: usize = 12;

    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Bf16 {}

    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Vnni {}

    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Widen {}

    impl Bf16 {
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn multiply(
            self,
            _: &[WeightChunk<ROWS>],
            _: &[InputChunk],
            _: &mut Sums<ROWS>,
            _: bool,
        ) {
            match self {}
        }
    }

    impl Vnni {
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn multiply<C: Coding>(
            self,
            _: QuadRows<'_, ROWS>,
            _: QuadTokens<'_>,
            _: &mut Sums<ROWS>,
            _: bool,
        ) {
            match self {}
        }
    }

    impl Widen {
        pub(crate) fn detect() -> Option<Self> {
            None
        }

        pub(crate) fn widen<C: Coding>(self, _: Span<'_, C>, _: [&mut [u16; CHUNK]; CHUNKS]) {
            match self {}
        }
    }
}
